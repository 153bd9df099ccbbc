"""LAVIS's original files of BLIP-2 and InstructBLIP, made of the weights of transformers' models, become ours and give
what transformers gives; towers give what slow plain forwards give.

transformers has one epsilon for the tower and the norm behind it; here its peer gets that of the released code, 1e-5.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Blip2Config as TheirBlip2Config,
)
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from openblip import api, cli
from openblip.config import UserError
from openblip.convert.lavis_towers import LAYOUTS as TOWER_LAYOUTS
from openblip.convert.weights import WeightsError
from openblip.data.transforms import ImageTransform
from openblip.hub import load_pretrained, save_for_transformers, save_pretrained
from openblip.models.blip2 import Blip2Config
from openblip.models.qformer import QFormerConfig
from openblip.models.vit import VisionTransformer, clip_vit_l, eva_vit_g
from openblip.recipes.blip2 import blip2_stage1
from openblip.train.ingredients import prepare
from tests.data.test_prompts import byte_level
from tests.parity import test_blip2_llm, test_blip2_retrieval
from tests.parity.lavis_files import (
    LAYER,
    lavis_names,
    openai_names,
    plain_clip,
    plain_eva,
    split_tower,
    stage1_extras,
    with_last_block,
)
from tests.parity.peers import (
    CLS,
    DEC,
    TOLERANCE,
    blip2_sections,
    language_model,
    norms_that_do_not_round,
    other_activation,
    other_eps,
    pixels,
    random_peer,
    swapped_k_and_v,
    swapped_q_and_k,
    texts,
    without,
)
from tests.tiny_models import drawing

WIDTH = 176  # two heads of 88
IMAGES, LARGER = pixels(2, 3, 32, 32), pixels(2, 3, 48, 48)
KINDS = {  # which projection the file has, which language model
    "opt": ("opt_proj", "opt"),
    "t5": ("t5_proj", "t5"),
    "instruct llama": ("llm_proj", "llama"),
    "instruct t5": ("t5_proj", "t5"),
}


def sections(**qformer) -> dict:
    """Heads of EVA's and BERT's sizes: shapes do not tell how many there are."""
    found = blip2_sections(**qformer)
    found["vision_config"] |= {"hidden_size": WIDTH, "intermediate_size": 40, "num_attention_heads": 2}
    found["qformer_config"] |= {"hidden_size": 128, "num_attention_heads": 2}
    return found


def drawn(cls: type, config):
    """A random peer whose weights are numbers of float32, with EVA's biases and the released epsilon."""
    peer = random_peer(cls, config)
    with torch.no_grad():
        for layer in peer.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[WIDTH : 2 * WIDTH] = 0
        for parameter in peer.parameters():
            parameter.copy_(parameter.float())
    peer.vision_model.post_layernorm.eps = 1e-5
    return peer


@pytest.fixture(scope="module", autouse=True)
def exact_norms():
    with norms_that_do_not_round():
        yield


class Files:
    """A peer and its files: what LAVIS saved of it, the tower with one block more, the language model's folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        instruct = kind.startswith("instruct")
        projection, family = KINDS[kind]
        words = byte_level()
        settings = language_model(family) | {"vocab_size": len(words), "eos_token_id": 2, "pad_token_id": 1}
        config = (InstructBlipConfig if instruct else TheirBlip2Config)(
            **sections(), num_query_tokens=5, image_token_index=1, text_config=settings
        )
        self.peer = drawn(
            InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration, config
        )
        self.whole = lavis_names(self.peer.state_dict(), projection)
        self.bridge, tower = split_tower(self.whole)
        self.file, self.vision, self.lm = folder / "bridge.pth", folder / "tower.pth", folder / "lm"
        torch.save({"model": self.bridge}, self.file)
        torch.save(with_last_block(tower), self.vision)
        self.peer.language_model.float().save_pretrained(self.lm)
        self.peer.double()
        if (
            family == "t5"
        ):  # Flan-T5's own configuration has another GELU than the released BLIP-2 ran it with
            path = self.lm / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"dense_act_fn": "gelu_new"}))
        words.save_pretrained(self.lm)

    def load(self, **changes):
        given = {"vision": self.vision, "lm": str(self.lm), "dtype": torch.float64} | changes
        found = load_pretrained(given.pop("file", self.file), **given)
        found.model.double()
        return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made: dict[str, Files] = {}

    def get(kind: str) -> Files:
        if kind not in made:
            made[kind] = Files(tmp_path_factory.mktemp("lavis"), kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """(peer, folder with bridge.pth, tower.pth, and trained.pth, which has both)."""
    folder = tmp_path_factory.mktemp("stage1")
    config = TheirBlip2Config(
        **sections(use_qformer_text_input=True), num_query_tokens=5, image_text_hidden_size=12
    )
    peer = drawn(Blip2ForImageTextRetrieval, config)
    whole = lavis_names(peer.state_dict())
    whole |= stage1_extras(whole)
    bridge, tower = split_tower(whole)
    torch.save({"model": bridge, "epoch": 3}, folder / "bridge.pth")
    torch.save({"model": whole}, folder / "trained.pth")
    torch.save(with_last_block(tower), folder / "tower.pth")
    return peer, folder


# ------------------------------------------------------------------------------------------------- towers


@pytest.fixture(scope="module")
def eva(tmp_path_factory):
    """(file, its tensors, transformers' model of its blocks but the last)."""
    peer = random_peer(Blip2VisionModel, TheirBlip2Config(**sections()).vision_config, seed=3)
    with torch.no_grad():
        for layer in peer.encoder.layers:
            layer.self_attn.qkv.bias[WIDTH : 2 * WIDTH] = 0
    peer.post_layernorm = torch.nn.Identity()
    state = {f"vision_model.{name}": value for name, value in peer.state_dict().items()}
    tower = with_last_block(split_tower(lavis_names(state))[1])
    file = tmp_path_factory.mktemp("eva") / "eva_vit_g.pth"
    torch.save(tower, file)
    return file, tower, peer


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(file, its tensors, transformers' model of all of its blocks)."""
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8, attn_implementation="sdpa",
    )  # fmt: skip
    peer = random_peer(CLIPVisionModel, config, seed=4)
    tower = openai_names(peer.state_dict())
    file = tmp_path_factory.mktemp("clip") / "clip_vit_L.pth"
    torch.save(tower, file)
    return file, tower, peer


@torch.no_grad()
def test_eva_gives_what_its_file_says(eva):
    file, tower, peer = eva
    found = load_pretrained(file, dtype=torch.float64)
    assert type(found.model) is VisionTransformer and found.report.layout == "LAVIS EVA-CLIP ViT-g"
    given = found.model(IMAGES)
    assert (given - plain_eva(tower, IMAGES, heads=2, blocks=3)).abs().max() < TOLERANCE
    assert (given - peer(IMAGES).last_hidden_state).abs().max() < TOLERANCE
    assert (given - plain_eva(tower, IMAGES, heads=2, blocks=4)).abs().max() > 0.01, "the last block counts"
    assert found.report.ignored.keys() == {name for name in tower if name.startswith("blocks.3.")}
    assert found.transform.image_size == 32 and found.transform.resize == "squash"


@torch.no_grad()
def test_clip_gives_what_its_file_says(clip, tmp_path):
    file, tower, peer = clip
    found = load_pretrained(file, dtype=torch.float64)
    given = found.model(IMAGES)
    assert (given - plain_clip(tower, IMAGES, heads=2, blocks=2)).abs().max() < TOLERANCE
    seen = peer(IMAGES, output_hidden_states=True).hidden_states
    assert (given - seen[-2]).abs().max() < TOLERANCE and (given - seen[-1]).abs().max() > 0.01
    last = {name for name in tower if name.startswith("transformer.resblocks.2.")}
    assert found.report.ignored.keys() == last | {"ln_post.weight", "ln_post.bias", "proj"}


@torch.no_grad()
def test_positions_are_resized_as_lavis_resizes_them(eva, clip):
    for (file, tower, _), plain, blocks, corners in ((eva, plain_eva, 3, False), (clip, plain_clip, 2, True)):
        found = load_pretrained(file, image_size=48, dtype=torch.float64)
        assert found.report.interpolated.keys() == {"position_embedding"}
        given = found.model(LARGER)
        wanted = plain(tower, LARGER, heads=2, blocks=blocks, align_corners=corners)
        other = plain(tower, LARGER, heads=2, blocks=blocks, align_corners=not corners)
        assert (given - wanted).abs().max() < TOLERANCE
        assert (given - other).abs().max() > 1e-3, "the corners count"


@pytest.mark.parametrize(
    "fault",
    [other_eps("blocks.1", 10), swapped_q_and_k("blocks.2"), other_activation("blocks.0", "gelu_tanh")],
    ids=["eps", "q and k", "tanh GELU"],
)
@torch.no_grad()
def test_a_fault_of_eva_is_seen(eva, fault):
    model = load_pretrained(eva[0], dtype=torch.float64).model
    fault(model)
    assert (model(IMAGES) - plain_eva(eva[1], IMAGES, heads=2, blocks=3)).abs().max() > TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("pre_norm", 0.1), other_eps("blocks.1", 0.1), swapped_q_and_k("blocks.1"),
        other_activation("blocks.0", "gelu"), without("pre_norm"),
    ],
    ids=["eps before", "eps", "q and k", "GELU", "no norm before"],
)  # fmt: skip
@torch.no_grad()
def test_a_fault_of_clip_is_seen(clip, fault):
    model = load_pretrained(clip[0], dtype=torch.float64).model
    fault(model)
    assert (model(IMAGES) - plain_clip(clip[1], IMAGES, heads=2, blocks=2)).abs().max() > TOLERANCE


@pytest.mark.parametrize(
    ("width", "blocks", "used"), [(1408, 40, 39), (1408, 39, 39), (1024, 24, 23), (1024, 23, 23)]
)
def test_of_the_released_towers_the_second_last_block_is_the_last(width, blocks, used):
    """Whether a file has one more or not."""
    empty = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    if width == 1408:
        tensors = {"patch_embed.proj.weight": empty(width, 3, 14, 14), "pos_embed": empty(1, 257, width)}
        tensors |= {f"blocks.{number}.mlp.fc1.weight": empty(6144, width) for number in range(blocks)}
    else:
        tensors = {"conv1.weight": empty(width, 3, 14, 14), "positional_embedding": empty(257, width)}
        name = "transformer.resblocks.{}.mlp.c_fc.weight"
        tensors |= {name.format(number): empty(4096, width) for number in range(blocks)}
    config = TOWER_LAYOUTS[width == 1024].config({}, tensors)
    assert (config.num_hidden_layers, config.num_attention_heads, config.image_size) == (used, 16, 224)
    assert config.intermediate_size == (6144 if width == 1408 else 4096) and config.patch_size == 14


def test_the_towers_of_the_paper_have_their_geometry():
    with torch.device("meta"):
        giant, large = VisionTransformer(eva_vit_g()), VisionTransformer(clip_vit_l())
    count = [sum(value.numel() for value in tower.parameters()) for tower in (giant, large)]
    assert [round(number / 1e6) for number in count] == [986, 291]


def test_a_recipe_begins_with_the_file_of_a_tower(eva, clip):
    geometry = {"image_size": 48, "patch_size": 8, "num_attention_heads": 2, "intermediate_size": 40}
    kinds = [
        (eva, eva_vit_g(**geometry, hidden_size=WIDTH, num_hidden_layers=3), plain_eva, False),
        (clip, clip_vit_l(**geometry, hidden_size=128, num_hidden_layers=2), plain_clip, True),
    ]
    qformer = QFormerConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    for (file, tensors, _), vision, plain, corners in kinds:
        recipe = replace(
            blip2_stage1(), vision_init=str(file), text_init=None, blip2=Blip2Config(vision, qformer)
        )
        made = prepare(recipe, [])
        tokens = made.model.encode_image(LARGER.float())
        tensors = {name: value.float() for name, value in tensors.items()}
        blocks = vision.num_hidden_layers
        wanted = plain(tensors, LARGER.float(), heads=2, blocks=blocks, align_corners=corners)
        torch.testing.assert_close(tokens, wanted, rtol=1e-4, atol=1e-4)
        assert not made.model.vision.patch_embedding.weight.requires_grad
        assert made.transform == ImageTransform(48) and made.frozen == {}, "it is saved with the model"


def test_a_tower_that_is_not_whole_is_named(eva, clip, tmp_path):
    for (_, tower, _), gone in (
        (eva, "blocks.1.attn.v_bias"),
        (clip, "transformer.resblocks.0.attn.in_proj_bias"),
    ):
        broken = {name: value for name, value in tower.items() if name != gone} | {"extra": torch.zeros(1)}
        torch.save(broken, tmp_path / "tower.pth")
        wanted = "blocks.1.attn.qkv.bias" if gone.endswith("v_bias") else gone
        with pytest.raises(WeightsError, match=rf"1 missing: {wanted}; .*extra"):
            load_pretrained(tmp_path / "tower.pth")


# ------------------------------------------------------------------------------------------------- stage 1


def test_stage1_gives_what_transformers_gives(stage1):
    peer, folder = stage1
    found = load_pretrained(folder / "bridge.pth", vision=folder / "tower.pth", dtype=torch.float64)
    assert test_blip2_retrieval.gap(found.model, peer) < TOLERANCE
    config = found.model.config
    assert (config.ln_vision_eps, config.vision.layer_norm_eps) == (1e-5, 1e-6)
    assert config.encoder and config.decoder and config.qformer.cross_attention_frequency == 2
    assert (config.qformer.dec_token_id, config.qformer.vocab_size) == (DEC, DEC + 1)
    assert abs(float(found.model.temperature.detach()) - 0.05) < 1e-6
    assert {name for name in found.report.ignored if "tower.pth" not in name} == {
        "Qformer.bert.embeddings.position_ids"
    }
    assert all(
        why.startswith("of the last block") for name, why in found.report.ignored.items() if "tower" in name
    )
    assert any("vision comes from" in note for note in found.report.notes)
    assert found.report.loaded == list(found.model.state_dict()) and not found.report.fresh


@torch.no_grad()
def test_the_head_that_writes_is_that_of_the_file(stage1):
    folder = stage1[1]
    file = torch.load(folder / "trained.pth", weights_only=True)["model"]
    model = load_pretrained(folder / "trained.pth", dtype=torch.float64).model
    states = pixels(2, 3, 128)
    head = "Qformer.cls.predictions."
    h = states @ file[f"{head}transform.dense.weight"].T + file[f"{head}transform.dense.bias"]
    h = torch.nn.functional.gelu(h)
    norm = file[f"{head}transform.LayerNorm.weight"], file[f"{head}transform.LayerNorm.bias"]
    h = torch.nn.functional.layer_norm(h, (128,), *norm, eps=1e-12)
    wanted = h @ file[f"{head}decoder.weight"].T + file[f"{head}decoder.bias"]
    assert (model.lm_logits(states) - wanted).abs().max() < TOLERANCE


def test_a_fine_tuned_model_holds_its_tower(stage1):
    peer, folder = stage1
    found = load_pretrained(folder / "trained.pth", dtype=torch.float64)
    assert test_blip2_retrieval.gap(found.model, peer) < TOLERANCE
    frozen = load_pretrained(folder / "bridge.pth", vision=folder / "tower.pth", dtype=torch.float64).model
    assert all(torch.equal(v, frozen.state_dict()[n]) for n, v in found.model.state_dict().items())
    with pytest.raises(UserError, match="holds an image tower of its own"):
        load_pretrained(folder / "trained.pth", vision=folder / "tower.pth")
    larger = load_pretrained(folder / "trained.pth", image_size=48)
    assert larger.model.config.vision.image_size == 48 == larger.transform.image_size
    assert larger.report.interpolated.keys() == {"vision.position_embedding"}


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("ln_vision", 0.1),
        other_eps("qformer.", 1e7),
        swapped_k_and_v("qformer.layers.2"),
        swapped_q_and_k("qformer.layers.1"),
        test_blip2_retrieval.queries_through_the_text_ffn,
        lambda model: model.itm_head.weight.data.copy_(model.itm_head.weight.flip(0)),
    ],
    ids=["ln_vision eps 1e-6", "Q-Former eps", "cross k and v", "q and k", "one FFN", "class 0 = match"],
)
def test_a_fault_of_stage1_is_seen(stage1, fault):
    model = load_pretrained(stage1[1] / "trained.pth", dtype=torch.float64).model
    fault(model)
    assert test_blip2_retrieval.gap(model, stage1[0]) > TOLERANCE


@torch.no_grad()
def test_stage1_on_clip(stage1, clip, tmp_path):
    """blip2_pretrained_vitL.pth: the same Q-Former on tokens of another tower."""
    folder = stage1[1]
    bridge = torch.load(folder / "bridge.pth", weights_only=True)["model"]
    width = 128
    for name in list(bridge):
        if ".crossattention.self.key.weight" in name or ".crossattention.self.value.weight" in name:
            bridge[name] = bridge[name][:, :width].clone()
        elif name.startswith("ln_vision"):
            bridge[name] = bridge[name][:width].clone()
    torch.save({"model": bridge}, tmp_path / "vitL.pth")
    found = load_pretrained(tmp_path / "vitL.pth", vision=clip[0], dtype=torch.float64)
    assert found.report.layout == "LAVIS BLIP-2 stage 1 (CLIP ViT-L)"
    embeds = found.model.encode_image(IMAGES)
    assert (embeds - plain_clip(clip[1], IMAGES, heads=2, blocks=2)).abs().max() < TOLERANCE
    other = load_pretrained(folder / "trained.pth", dtype=torch.float64).model
    ids, mask = texts([6, 4], first=CLS)
    features = found.model.text_features(ids, mask)
    assert torch.equal(features, other.text_features(ids, mask)), "the image has no say in a text"
    larger = load_pretrained(tmp_path / "vitL.pth", vision=clip[0], image_size=48, dtype=torch.float64).model
    wanted = plain_clip(clip[1], LARGER, heads=2, blocks=2, align_corners=True)
    assert (larger.encode_image(LARGER) - wanted).abs().max() < TOLERANCE


# ------------------------------------------------------------------------------------------------- stage 2


@pytest.mark.parametrize("kind", KINDS)
def test_stage2_gives_what_transformers_gives(files, kind):
    it = files(kind)
    found = it.load()
    assert test_blip2_llm.gap(found.model, it.peer) < TOLERANCE
    name = "InstructBLIP" if kind.startswith("instruct") else "BLIP-2 stage 2"
    assert found.report.layout == f"LAVIS {name}, {KINDS[kind][0]} (EVA-CLIP ViT-g)"
    assert not found.report.fresh and all("tower.pth" in name for name in found.report.ignored)
    names = [name for name in found.model.state_dict() if not name.startswith("lm.model.")]
    assert found.report.loaded == names, "all that is not the language model's"
    assert f"lm comes from {it.lm}" in found.report.notes


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_is_as_the_released_code_changed_it(files, kind):
    found = files(kind).load()
    words, lm = found.lm_tokenizer, found.model.lm
    is_opt, is_vicuna, is_t5 = kind == "opt", kind == "instruct llama", kind.endswith("t5")
    assert words.start_ids == ([2] if is_opt or is_vicuna else []), "</s> before a text"
    assert words.end_id == (words.encode("\n")[0] if is_opt else 2)
    assert lm.eos_token_ids == [words.end_id], "and so it ends"
    assert words.quirks.rewrite == ({0: 2} if is_vicuna else {})
    assert lm.config.family == ("vicuna" if is_vicuna else "")
    if is_t5:
        assert lm.model.config.dense_act_fn == "gelu", "and not its own gelu_new"
    assert found.tokenizer is None, "a Q-Former that reads has BERT's words, and these tiny ones other words"


def test_the_gelu_of_flan_t5_is_seen(files, monkeypatch):
    it = files("t5")
    monkeypatch.setattr("openblip.convert.lavis_blip2.RELEASED_BLIP2", {})
    assert test_blip2_llm.gap(it.load().model, it.peer) > TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("blip2.ln_vision", 0.1),
        other_eps("blip2.vision.", 10),
        swapped_q_and_k("blip2.vision.blocks.0"),
        swapped_k_and_v("blip2.qformer.layers.0"),
        lambda model: model.projection.bias.data.zero_(),
    ],
    ids=["ln_vision eps 1e-6", "vision eps", "vision q and k", "cross k and v", "no projection bias"],
)
def test_a_fault_of_stage2_is_seen(files, fault):
    it = files("instruct llama")
    model = it.load().model
    fault(model)
    assert test_blip2_llm.gap(model, it.peer) > TOLERANCE


def swapped(file: dict[str, Tensor], one: str, other: str) -> dict[str, Tensor]:
    return file | {one: file[other], other: file[one]}


def test_two_tensors_exchanged_in_the_file_are_seen(files, tmp_path):
    """The reader's key tables are right, or this would not be red."""
    it = files("instruct llama")
    pairs = [
        (f"{LAYER}0.intermediate.dense.weight", f"{LAYER}0.intermediate_query.dense.weight"),
        (f"{LAYER}2.crossattention.output.LayerNorm.bias", f"{LAYER}2.attention.output.LayerNorm.bias"),
        (f"{LAYER}1.output.LayerNorm.weight", f"{LAYER}1.output_query.LayerNorm.weight"),
        ("visual_encoder.blocks.1.attn.q_bias", "visual_encoder.blocks.1.attn.v_bias"),
        ("visual_encoder.blocks.1.norm1.weight", "visual_encoder.blocks.1.norm2.weight"),
    ]
    for one, other in pairs:
        torch.save(swapped(it.whole, one, other), tmp_path / "it.pth")
        found = it.load(file=tmp_path / "it.pth", vision=None)
        assert test_blip2_llm.gap(found.model, it.peer) > TOLERANCE, one
    torch.save(it.whole, tmp_path / "it.pth")
    assert test_blip2_llm.gap(it.load(file=tmp_path / "it.pth", vision=None).model, it.peer) < TOLERANCE


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_what_stage1_left_in_a_file_of_stage2_is_passed_over_and_said(files, kind, tmp_path):
    it = files(kind)
    left = {
        "Qformer.bert.embeddings.position_ids": torch.arange(24)[None],
        "Qformer.bert.embeddings.position_embeddings.weight": torch.zeros(24, 128),
        "Qformer.cls.predictions.bias": torch.zeros(9),
    }
    left[f"{LAYER}0.output.dense.weight"] = torch.zeros(128, 24)
    if kind == "opt":  # no InstructBLIP was made of one
        left["Qformer.bert.embeddings.word_embeddings.weight"] = torch.zeros(129, 128)
        left[f"{LAYER}0.intermediate.dense.bias"] = torch.zeros(24)
    torch.save({"model": it.bridge | left}, tmp_path / "it.pth")
    found = it.load(file=tmp_path / "it.pth")
    said = {name: why for name, why in found.report.ignored.items() if "tower.pth" not in name}
    assert said.keys() == left.keys()
    assert said[f"{LAYER}0.output.dense.weight"] == "of texts, which the Q-Former of stage 2 does not read"
    assert test_blip2_llm.gap(found.model, it.peer) < TOLERANCE


@torch.no_grad()
def test_texts_are_those_that_transformers_writes(files, tmp_path):
    """By openblip.load(file, vision=, lm=) and a call for a caption."""
    it = files("opt")
    image = tmp_path / "it.png"
    drawing(9, side=40).save(image)
    ours = api.load(it.file, vision=it.vision, lm=it.lm, device="cpu")
    seen, write = [], ours.model.generate

    def generate(*args, **named):
        seen.append(write(*args, **named).sequences[0].tolist())
        return write(*args, **named)

    ours.model.generate = generate
    shown = ours.transform(drawing(9, side=40))[None]
    peer, told = it.peer.float(), []
    for text in ("", "a photo of"):
        ours.caption(image, text, num_beams=3, max_new_tokens=8)
        ids = torch.tensor([[1] * 5 + ours.lm_tokenizer.prompts([text])["input_ids"][0].tolist()])
        ids = peer.generate(
            pixel_values=shown, input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=3,
            max_new_tokens=8, min_new_tokens=1, eos_token_id=ours.lm_tokenizer.end_id,
        )[0, ids.shape[1] :]  # fmt: skip
        told.append(ids.tolist())
    peer.double()
    assert [mine[: len(their)] for mine, their in zip(seen, told, strict=True)] == told
    assert told[0] != told[1], "the prompt has a say"


@pytest.mark.parametrize("kind", ["opt", "instruct t5"])
def test_it_is_saved_with_its_language_model_named_and_goes_to_transformers(files, kind, tmp_path):
    it = files(kind)
    found = it.load(dtype=torch.float32)
    found.model.float()
    parts = {"tokenizer": found.tokenizer, "transform": found.transform, "lm_tokenizer": found.lm_tokenizer}
    if kind == "opt":
        save_pretrained(found.model, tmp_path / "ours", info=found.info, **parts)
        again = load_pretrained(tmp_path / "ours")
        assert again.model.config == found.model.config and again.model.config.lm.source == str(it.lm)
        state = again.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
        assert again.lm_tokenizer.end_id == found.lm_tokenizer.end_id
    else:
        found.tokenizer = None  # of another size than this tiny Q-Former's words
    with pytest.raises(UserError, match="`approximate`"):
        save_for_transformers(found, tmp_path / "theirs")
    save_for_transformers(found, tmp_path / "theirs", approximate=True)
    theirs = type(it.peer).from_pretrained(tmp_path / "theirs").eval()
    rows = len(it.peer.get_input_embeddings().weight)
    for name, value in it.peer.float().state_dict().items():
        wanted = theirs.state_dict()[name]
        assert torch.equal(wanted[:rows] if wanted.shape != value.shape else wanted, value), name
    it.peer.double()


def test_the_command_converts_a_file_with_its_parts(files, tmp_path, capsys):
    it = files("opt")
    parts = ["--vision", str(it.vision), "--lm", str(it.lm), "--dtype", "fp32", "--json"]
    order = ["convert", str(it.file), str(tmp_path / "out"), "--to", "transformers", *parts]
    with pytest.raises(SystemExit):
        cli.main(order)
    assert "approximate" in capsys.readouterr().err
    cli.main([*order, "--approximate"])
    told = json.loads(capsys.readouterr().out)["report"]
    assert any("epsilon of the tower" in note for note in told["notes"])
    assert any("has 1 row(s) more" in note or "have 1 row(s) more" in note for note in told["notes"])
    assert Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").config.image_token_id == 261


# ------------------------------------------------------------------------------------------------- mistakes


def test_what_a_file_needs_is_said(files, stage1, eva, clip, tmp_path):
    it, folder = files("opt"), stage1[1]

    def refused(message, file=it.file, **given):
        with pytest.raises(UserError, match=message) as caught:
            load_pretrained(file, **given)
        assert "\n" not in str(caught.value)

    refused(r"holds no image tower; give `vision`, the file of EVA-CLIP ViT-g \(eva_vit_g.pth\)", lm=it.lm)
    refused("holds no language model; give `lm`, .* of the type opt and the width 16", vision=it.vision)
    refused("no such file of an image tower", vision=tmp_path / "none.pth", lm=it.lm)
    refused("no image tower of BLIP-2", vision=it.file, lm=it.lm)
    refused("tokens of this tower are 128 wide, and .*bridge.pth looks at 176", vision=clip[0], lm=it.lm)
    refused("a llama of the width 16; .* wants .* type opt", vision=it.vision, lm=files("instruct llama").lm)
    refused("no tokenizer to load here", vision=it.vision, lm=tmp_path / "none")
    refused(
        "stage 1 of BLIP-2, which has no language model",
        folder / "bridge.pth",
        vision=folder / "tower.pth",
        lm=it.lm,
    )
    refused("`vision` and `lm` are for LAVIS's files", eva[0], lm=it.lm)
    wide = {**it.bridge, "opt_proj.weight": torch.zeros(2560, 128), "opt_proj.bias": torch.zeros(2560)}
    torch.save(wide, tmp_path / "wide.pth")
    refused("and the width 2560, such as facebook/opt-2.7b", tmp_path / "wide.pth", vision=it.vision)
    save_pretrained(load_pretrained(eva[0]).model, tmp_path / "ours")
    refused("leave `vision` and `lm` out", tmp_path / "ours", vision=it.vision)


def test_a_key_too_few_or_too_many_is_named(files, stage1, tmp_path):
    it = files("instruct llama")
    broken = {name: value for name, value in it.bridge.items() if name != f"{LAYER}2.attention.self.key.bias"}
    torch.save({"model": broken | {f"{LAYER}0.adapter.weight": torch.zeros(1)}}, tmp_path / "it.pth")
    with pytest.raises(WeightsError, match=r"1 missing: .*2.attention.self.key.bias; .*0.adapter.weight"):
        it.load(file=tmp_path / "it.pth")
    whole = torch.load(stage1[1] / "trained.pth", weights_only=True)["model"]
    whole["Qformer.cls.predictions.decoder.weight"][3] += 1
    torch.save({"model": whole}, tmp_path / "it.pth")
    with pytest.raises(WeightsError, match=r"decoder.weight and .*word_embeddings.weight differ"):
        load_pretrained(tmp_path / "it.pth")


def test_a_whole_clip_gives_its_image_tower(clip, stage1, tmp_path):
    """OpenCLIP's and OpenAI's files, as safetensors: the image tower is under `visual.`."""
    from openblip.convert.lavis_towers import read_tower

    whole = {f"visual.{name}": value for name, value in clip[1].items()}
    whole |= {"token_embedding.weight": torch.zeros(3, 4), "positional_embedding": torch.zeros(7, 4)}
    save_file(whole, tmp_path / "clip.safetensors")
    model, _, report = read_tower(tmp_path / "clip.safetensors", torch.float64)
    assert (model(IMAGES) - plain_clip(clip[1], IMAGES, heads=2, blocks=2)).abs().max() < TOLERANCE
    assert report.ignored["token_embedding.weight"] == "of CLIP's texts"
    assert report.ignored["positional_embedding"] == "of CLIP's texts"
