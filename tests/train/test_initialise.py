"""Pretrained parts go into a model that has one of their geometry: all of a part, or nothing."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPModel,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
)
from transformers.models.vit.modeling_vit import ViTModel

from openblip.config import UserError
from openblip.convert.weights import WeightsError
from openblip.data.transforms import CLIP_MEAN
from openblip.hub import save_pretrained
from openblip.models.blip import Blip, BlipConfig
from openblip.models.blip2 import Blip2, Blip2Config
from openblip.models.qformer import QFormerConfig
from openblip.models.text import TextConfig
from openblip.models.vit import (
    HuggingFaceVision,
    VisionConfig,
    VisionTransformer,
    clip_vit_l,
    eva_vit_g,
    resize_position_embedding,
)
from openblip.recipes import Recipe
from openblip.recipes.blip2 import blip2_stage1, blip2_stage2, instructblip
from openblip.train.config import TrainConfig
from openblip.train.ingredients import prepare
from openblip.train.initialise import load_text_, load_tower_
from tests.parity.peers import clip_config, dinov2_config, pixels, random_peer, save_words
from tests.parity.test_towers import WIDE, as_timm

SIGLIP = {
    "model_type": "siglip_vision_model", "image_size": 36, "patch_size": 14, "hidden_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24, "vision_use_head": False,
}  # fmt: skip
SMALL = VisionConfig(32, 8, 24, 3, 4, 32)
TEXT = TextConfig(130, 16, 2, 4, 24, max_position_embeddings=24, dec_token_id=128, enc_token_id=129)


# ----------------------------------------------------------------------------------------- backbones of transformers


def backbone(**changes) -> HuggingFaceVision:
    """A SigLIP tower; 36 pixels are two patches of 14, and what is over is left out, as at 384 px."""
    torch.manual_seed(0)
    settings = SIGLIP | changes
    return HuggingFaceVision(VisionConfig(36, 14, settings["hidden_size"], 2, 2, 24, backbone=settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A SigLIP with both of its towers, as it is on the hub."""
    text = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = {name: value for name, value in SIGLIP.items() if name not in ("model_type", "vision_use_head")}
    config = SiglipConfig(text_config={**text, "vocab_size": 20, "projection_size": 12}, vision_config=vision)
    torch.manual_seed(1)
    model = SiglipModel(config).eval()
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return model, folder


def native(**changes) -> VisionTransformer:
    """The same tower as one of ours."""
    config = VisionConfig(36, 14, 12, 2, 2, 24, hidden_act="gelu_tanh", class_token=False)
    torch.manual_seed(0)
    return VisionTransformer(replace(config, **changes)).eval()


@pytest.mark.parametrize("make", [backbone, native])
def test_the_tower_of_a_larger_model_is_taken(whole, make):
    model, folder = whole
    vision = make().eval()
    images = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        theirs = model.vision_model(pixel_values=images).last_hidden_state
        assert (vision(images)[:, 1:] - theirs).abs().max() > 1e-3
        report, transform = load_tower_(vision, str(folder))
        found = vision(images)
    assert theirs.shape == (2, 4, 12)
    torch.testing.assert_close(found[:, 1:], theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 0], theirs.mean(dim=1), rtol=0, atol=1e-6)
    assert sorted(report.loaded) == sorted(getattr(vision, "model", vision).state_dict())
    assert transform is None if make is backbone else transform.mean == (0.5, 0.5, 0.5)


def test_another_geometry_is_refused_and_nothing_changes(whole):
    for vision, deeper in ((backbone(hidden_size=16), backbone(num_hidden_layers=3)),
                           (native(hidden_size=16), native(num_hidden_layers=3))):  # fmt: skip
        before = {name: value.clone() for name, value in vision.state_dict().items()}
        with pytest.raises(WeightsError, match="of another shape"):
            load_tower_(vision, str(whole[1]))
        with pytest.raises(WeightsError, match="missing"):
            load_tower_(deeper, str(whole[1]))
        assert all(torch.equal(value, before[name]) for name, value in vision.state_dict().items())
    with pytest.raises(UserError, match="its num_attention_heads is 2, not 4"):
        load_tower_(native(num_attention_heads=4), str(whole[1]))
    with pytest.raises(UserError, match="its hidden_act is gelu_tanh, not gelu"):
        load_tower_(native(hidden_act="gelu"), str(whole[1]))
    with pytest.raises(WeightsError, match=r"no place for: blocks\.1"):
        load_tower_(native(num_hidden_layers=1), str(whole[1]))  # its norm is of the last block


def test_what_cannot_be_had_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tower_(backbone(), str(tmp_path))
    with pytest.raises(UserError, match=r"no config\.json in it"):
        load_tower_(native(), str(tmp_path))
    with pytest.raises(UserError, match="dinov2_small: is read into a tower of ours"):
        load_tower_(backbone(), "dinov2_small")
    save_pretrained(backbone(), tmp_path / "backbone")
    with pytest.raises(UserError, match="without an image tower of ours"):
        load_tower_(native(), str(tmp_path / "backbone"))


# ------------------------------------------------------------------------------------------------ towers of ours


@torch.no_grad()
def test_clips_tower_is_taken_without_its_last_block(tmp_path):
    """As BLIP-2 has it: 23 blocks of 24, no norm behind them."""
    peer = random_peer(CLIPModel, clip_config()).float()
    peer.save_pretrained(tmp_path)
    vision = VisionTransformer(
        VisionConfig(
            32, 8, 24, 1, 4, 32, "quick_gelu", 1e-5, patch_bias=False, pre_norm=True, final_norm=False
        )
    ).eval()
    report, transform = load_tower_(vision, str(tmp_path))
    images = pixels(2, 3, 32, 32).float()
    wanted = peer.vision_model(images, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(vision(images), wanted, rtol=0, atol=1e-5)
    assert all(name.startswith("blocks.1.") for name in report.ignored) and report.ignored
    assert transform.resize == "crop" and transform.mean == CLIP_MEAN


@torch.no_grad()
def test_a_file_of_deit_is_taken_and_its_positions_are_resized(tmp_path):
    peer = random_peer(ViTModel, ViTConfig(**WIDE, layer_norm_eps=1e-6)).float()
    torch.save({"model": as_timm(peer)}, tmp_path / "deit_base.pth")
    vision = VisionTransformer(VisionConfig(48, 8, 128, 3, 2, 32, drop_path_rate=0.1)).eval()
    report, _ = load_tower_(vision, str(tmp_path / "deit_base.pth"))
    images = pixels(2, 3, 48, 48).float()
    wanted = peer(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(vision(images), wanted, rtol=0, atol=1e-4)
    assert report.interpolated == {"position_embedding": "4 x 4 -> 6 x 6 patches, bicubic"}
    assert not report.notes
    folder = tmp_path / "timm"  # as timm's own are on the hub, with a config.json that is not transformers'
    folder.mkdir()
    save_file(as_timm(peer), folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "vit_base_patch16_224", "num_classes": 10}')
    again = VisionTransformer(vision.config)
    load_tower_(again, str(folder))
    assert all(torch.equal(value, vision.state_dict()[name]) for name, value in again.state_dict().items())


def test_another_epsilon_is_told(tmp_path):
    random_peer(ViTModel, ViTConfig(**WIDE)).float().save_pretrained(tmp_path)
    report, _ = load_tower_(VisionTransformer(VisionConfig(32, 8, 128, 3, 2, 32)), str(tmp_path))
    assert report.notes == ["its norms have an epsilon of 1e-12, here 1e-06"]


def test_a_model_of_ours_gives_its_tower(tmp_path):
    torch.manual_seed(2)
    tower = VisionTransformer(SMALL)
    blip = Blip(BlipConfig(SMALL, TEXT, projection_dim=8))
    for name, model in {"tower": tower, "blip": blip}.items():
        save_pretrained(model, tmp_path / name)
        vision = VisionTransformer(SMALL)
        load_tower_(vision, str(tmp_path / name))
        wanted = getattr(model, "vision", model).state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in vision.state_dict().items())


# ----------------------------------------------------------------------------------------- towers of BLIP-2


def eva_file(path, blocks: int = 3, side: int = 2) -> dict[str, torch.Tensor]:
    """An EVA-CLIP of one head of 88 channels, of which all blocks but the last are used."""
    torch.manual_seed(2)
    width = 88
    tensors = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 1 + side * side, width),
        "patch_embed.proj.weight": torch.randn(width, 3, 8, 8),
        "patch_embed.proj.bias": torch.randn(width),
    }
    shapes = {"norm1": (width,), "norm2": (width,), "attn.proj": (width, width), "mlp.fc1": (20, width)}
    shapes |= {"mlp.fc2": (width, 20)}
    for number in range(blocks):
        for name, shape in shapes.items():
            tensors[f"blocks.{number}.{name}.weight"] = torch.randn(shape)
            tensors[f"blocks.{number}.{name}.bias"] = torch.randn(shape[0])
        tensors[f"blocks.{number}.attn.qkv.weight"] = torch.randn(3 * width, width)
        tensors |= {f"blocks.{number}.attn.{one}_bias": torch.randn(width) for one in "qv"}
    torch.save(tensors, path)
    return tensors


def eva(**changes) -> VisionTransformer:
    settings = {"hidden_size": 88, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 20}
    return VisionTransformer(
        VisionConfig(**{"image_size": 16, "patch_size": 8, "final_norm": False, **settings, **changes})
    )


def test_a_file_of_eva_is_known_by_its_keys(tmp_path):
    tensors = eva_file(tmp_path / "any.name")
    vision = eva(drop_path_rate=0.1)
    load_tower_(vision, str(tmp_path / "any.name"))
    assert torch.equal(vision.blocks[1].mlp.fc1.weight, tensors["blocks.1.mlp.fc1.weight"])
    bias = vision.blocks[0].attention.qkv.bias
    assert torch.equal(bias[:88], tensors["blocks.0.attn.q_bias"]) and not bias[88:176].any()
    larger = eva(image_size=32)
    load_tower_(larger, str(tmp_path / "any.name"))
    wanted = resize_position_embedding(tensors["pos_embed"], (4, 4))
    assert torch.equal(larger.position_embedding, wanted)


def test_a_file_of_another_geometry_is_refused(tmp_path):
    eva_file(tmp_path / "eva.pth")
    before = eva(num_hidden_layers=3)
    state = {name: value.clone() for name, value in before.state_dict().items()}
    with pytest.raises(WeightsError, match=r"missing: blocks\.2\.attention"):
        load_tower_(before, str(tmp_path / "eva.pth"))
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    with pytest.raises(WeightsError, match=r"missing: norm\.bias, norm\.weight"):
        load_tower_(eva(final_norm=True), str(tmp_path / "eva.pth"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="a file with tensors under weight is not known"):
        load_tower_(eva(), str(tmp_path / "other.pth"))


def test_a_recipe_begins_with_a_file_of_a_tower(tmp_path):
    tensors = eva_file(tmp_path / "eva.pth")
    qformer = QFormerConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    stage1 = Blip2Config(eva().config, qformer)
    recipe = replace(blip2_stage1(), vision_init=str(tmp_path / "eva.pth"), text_init=None, blip2=stage1)
    made = prepare(recipe, [])
    assert torch.equal(made.model.vision.patch_embedding.weight, tensors["patch_embed.proj.weight"])
    assert not made.model.vision.patch_embedding.weight.requires_grad
    assert made.transform.image_size == 16 and made.frozen == {}, "and is saved with the model"


def test_the_towers_of_the_paper_have_their_geometry():
    with torch.device("meta"):
        giant, large = VisionTransformer(eva_vit_g()), VisionTransformer(clip_vit_l())
    count = [sum(value.numel() for value in tower.parameters()) for tower in (giant, large)]
    assert [round(number / 1e6) for number in count] == [986, 291]


# --------------------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT with a head that writes, and its vocabulary."""
    config = BertConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=24, layer_norm_eps=1e-12,
    )  # fmt: skip
    peer = random_peer(BertForMaskedLM, config).float()
    folder = tmp_path_factory.mktemp("bert")
    peer.save_pretrained(folder)
    save_words(folder)
    return peer, folder


def test_encoder_and_decoder_begin_with_a_bert(bert):
    peer, folder = bert
    model = Blip(BlipConfig(SMALL, TEXT, projection_dim=8))
    reports, tokenizer = load_text_(model, str(folder))
    assert len(reports) == 2 and (tokenizer.dec_id, tokenizer.enc_id) == (128, 129)
    words = peer.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.text_encoder.embeddings.word.weight[:128], words)
    assert model.text_decoder.embeddings.word is model.text_encoder.embeddings.word
    for text in (model.text_encoder, model.text_decoder):
        dense = peer.bert.encoder.layer[1].attention.output.dense.weight
        assert torch.equal(text.layers[1].self_attention.attention.out.weight, dense)
    assert torch.equal(model.lm_head.dense.weight, peer.cls.predictions.transform.dense.weight)
    assert "lm_head.dense.weight" in reports[1].loaded and "lm_head.dense.weight" not in reports[0].loaded
    assert "embeddings.word.weight[128:]" in reports[0].fresh
    alone = Blip(BlipConfig(SMALL, TEXT, projection_dim=8, decoder=False))
    assert len(load_text_(alone, str(folder))[0]) == 1
    with pytest.raises(UserError, match=r"\[DEC\] is 128 behind its words, the model's 129"):
        load_text_(Blip(BlipConfig(SMALL, replace(TEXT, dec_token_id=129), projection_dim=8)), str(folder))
    with pytest.raises(UserError, match="a BERT of 4 heads, and the model's texts have 2"):
        load_text_(
            Blip(BlipConfig(SMALL, replace(TEXT, num_attention_heads=2), projection_dim=8)), str(folder)
        )


def test_a_q_former_begins_with_a_bert(bert):
    peer, folder = bert
    qformer = QFormerConfig(
        129, 16, 2, 4, 24, max_position_embeddings=24, dec_token_id=128, num_query_tokens=3
    )
    model = Blip2(Blip2Config(SMALL, qformer, projection_dim=8))
    queries = model.qformer.query_tokens.detach().clone()
    reports, tokenizer = load_text_(model, str(folder))
    layer, theirs = model.qformer.layers[1], peer.bert.encoder.layer[1]
    for block in (layer.feed_forward, layer.query_feed_forward):
        assert torch.equal(block.mlp.fc1.weight, theirs.intermediate.dense.weight)
        assert torch.equal(block.residual.norm.weight, theirs.output.LayerNorm.weight)
    assert torch.equal(model.qformer.word.weight[:128], peer.bert.embeddings.word_embeddings.weight)
    assert torch.equal(model.lm_head.norm.bias, peer.cls.predictions.transform.LayerNorm.bias)
    assert torch.equal(model.qformer.query_tokens, queries) and tokenizer.dec_id == 128
    assert list(reports[0].fresh) == ["embeddings.word.weight[128:]", "lm_head.bias[128:]"]


# ------------------------------------------------------------------------------------------------------- recipes


def test_blip2_begins_with_clips_tower_and_a_bert_and_stage_2_with_stage_1(bert, tmp_path):
    """As the recipe says, at a toy's size: all blocks of CLIP's tower but the last."""
    peer, folder = bert
    clip = random_peer(CLIPModel, clip_config()).float()
    clip.save_pretrained(tmp_path)
    theirs = clip.config.vision_config
    vision = replace(
        clip_vit_l(), image_size=theirs.image_size, patch_size=theirs.patch_size, hidden_size=theirs.hidden_size,
        num_hidden_layers=theirs.num_hidden_layers - 1, num_attention_heads=theirs.num_attention_heads,
        intermediate_size=theirs.intermediate_size,
    )  # fmt: skip
    qformer = QFormerConfig(
        129, 16, 2, 4, 24, max_position_embeddings=24, dec_token_id=128, num_query_tokens=3
    )
    recipe = blip2_stage1()
    assert recipe.vision_init and recipe.text_init, "a frozen tower that begins with nothing teaches nothing"
    made = prepare(
        replace(
            recipe, blip2=Blip2Config(vision, qformer, projection_dim=8), vision_init=str(tmp_path),
            text_init=str(folder),
        ),
        [],
    )  # fmt: skip
    images = pixels(2, 3, theirs.image_size, theirs.image_size).float()
    with torch.no_grad():
        wanted = clip.vision_model(images, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(made.model.vision.eval()(images), wanted, rtol=1e-4, atol=1e-4)
    words = peer.bert.embeddings.word_embeddings.weight
    assert torch.equal(made.model.qformer.word.weight[:128], words)
    assert made.transform.mean == CLIP_MEAN and made.transform.resize == "squash"
    for later in (blip2_stage2(), instructblip()):
        with pytest.raises(UserError, match="fine-tunes a pre-trained model"):
            prepare(later, [])


def test_a_recipe_begins_with_both(bert, tmp_path):
    peer = random_peer(Dinov2Model, dinov2_config()).float()
    peer.save_pretrained(tmp_path)
    vision = VisionConfig(32, 8, 24, 3, 4, 96, layer_scale=1.0)
    for frozen in (True, False):
        model = BlipConfig(vision, TEXT, projection_dim=8, freeze_vision=frozen)
        recipe = Recipe(
            "pretrain", TrainConfig(), model=model, vision_init=str(tmp_path), text_init=str(bert[1])
        )
        made = prepare(recipe, [])
        assert torch.equal(made.model.vision.class_embedding, peer.embeddings.cls_token)
        assert made.tokenizer.vocab_size == 130 and len(made.reports) == 3
        # A tower that is trained gets CLIP's statistics, as released; one that stays gets its own.
        assert made.transform.mean == ((0.485, 0.456, 0.406) if frozen else CLIP_MEAN)
        assert (made.transform.image_size, made.transform.resize, made.transform.draft_size) == (
            32,
            "squash",
            32,
        )
