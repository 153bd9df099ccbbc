"""BLIP's original checkpoints: every tensor in its place, as transformers and a plain reference compute with it."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from openblip.convert.recognise import find_layout, from_checkpoint_
from openblip.convert.weights import WeightsError
from openblip.data.text import bert_uncased
from openblip.data.transforms import CLIP_MEAN, ImageTransform
from openblip.hub import load_pretrained
from openblip.models.blip import Blip, blip_base, blip_large
from openblip.models.blip_nlvr import BlipNlvr
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.text import TextConfig
from openblip.models.vit import vit_base, vit_large
from openblip.recipes import recipe_named
from openblip.train.ingredients import prepare
from tests.convert.official_blip import Official, State, for_transformers, save
from tests.parity import test_blip_captioning as captioning
from tests.parity import test_blip_retrieval as retrieval
from tests.parity import test_blip_vqa as vqa
from tests.parity.peers import CLS, DEC, ENC, SEP, TOLERANCE, other_eps, pixels, texts, without

STATES = {
    "pretrain": Official().pretrain(),
    "retrieval": Official().retrieval(),
    "retrieval of LAVIS": Official().retrieval("queue_ptr"),
    "itm": Official().itm(),
    "caption": Official().caption(),
    "vqa": Official(vision=128).vqa(),  # transformers can only build a decoder that attends to states as wide
    "nlvr": Official(vision=128, layers=12).nlvr(),
}
PEERS = {
    "retrieval": (BlipForImageTextRetrieval, retrieval.gap),
    "caption": (BlipForConditionalGeneration, captioning.gap),
    "vqa": (BlipForQuestionAnswering, vqa.gap),
}
PAIRS = [(kind, kind) for kind in PEERS] + [
    ("pretrain", "retrieval"), ("pretrain", "caption"), ("itm", "retrieval"), ("retrieval of LAVIS", "retrieval"),
]  # fmt: skip


def ours(kind: str, **changes: torch.Tensor):
    return from_checkpoint_({}, STATES[kind] | changes, kind)[0]


def peer_of(kind: str, use: str) -> torch.nn.Module:
    """transformers' model for `use`, with the weights of a checkpoint; all its own are replaced."""
    state = for_transformers(STATES[kind])
    width = state["vision_model.post_layernorm.bias"].numel()
    text = {
        "vocab_size": 130, "hidden_size": 128, "intermediate_size": 136, "num_hidden_layers": 2, "sep_token_id": SEP,
        "num_attention_heads": 2, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": DEC,
        "eos_token_id": SEP,
    }  # fmt: skip
    vision = {
        "hidden_size": width, "intermediate_size": width + 8, "num_hidden_layers": 3, "layer_norm_eps": 1e-6,
        "num_attention_heads": width // 64, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=12)
    peer = PEERS[use][0](config).double().eval()
    wanted = peer.state_dict().keys()
    peer.load_state_dict({name: state[name] for name in wanted})
    return peer


@pytest.mark.parametrize(("kind", "use"), PAIRS)
def test_it_computes_what_transformers_computes(kind, use, tmp_path):
    found = load_pretrained(save(STATES[kind], tmp_path / "x.pth"), dtype=None)
    assert PEERS[use][1](found.model, peer_of(kind, use)) < TOLERANCE


FAULTS = {
    "q and k": lambda state: swap_q_and_k_(state, "blocks.1.attn.qkv"),
    "text q and k": lambda state: exchange_(
        state, "layer.1.attention.self.query", "layer.1.attention.self.key"
    ),
    "k and v": lambda state: exchange_(
        state, "layer.0.crossattention.self.key", "layer.0.crossattention.self.value"
    ),
    "norms": lambda state: exchange_(state, "blocks.0.norm1", "blocks.0.norm2"),
    "positions": lambda state: state.update(
        {"visual_encoder.pos_embed": state["visual_encoder.pos_embed"].flip(1)}
    ),
}


def exchange_(state: State, one: str, other: str) -> None:
    for name in [name for name in state if one in name]:
        state[name], state[name.replace(one, other)] = state[name.replace(one, other)], state[name]


def swap_q_and_k_(state: State, layer: str) -> None:
    for name in [name for name in state if layer in name]:
        q, k, v = state[name].chunk(3)
        state[name] = torch.cat([k, q, v])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", PEERS)
def test_a_tensor_in_another_place_is_seen(kind, fault):
    state = dict(STATES[kind])
    FAULTS[fault](state)
    assert PEERS[kind][1](from_checkpoint_({}, state, kind)[0], peer_of(kind, kind)) > 1e-3


@pytest.mark.parametrize("kind", PEERS)
def test_a_part_that_is_built_differently_is_seen(kind):
    text = "text_decoder." if kind == "caption" else "text_encoder."
    for fault in (other_eps("vision.", 10), other_eps(text, 1e7), without("vision.norm")):
        model = ours(kind)
        fault(model)
        assert PEERS[kind][1](model, peer_of(kind, kind)) > TOLERANCE


# ---------------------------------------------------------------------------------------------------- NLVR2


def slow_nlvr(state: State, left: torch.Tensor, right: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits [2] of one sentence [L] over two images [3, S, S], by the names of the checkpoint."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x, eps):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(q, k, v):
        heads = []
        for part in range(0, q.shape[-1], 64):
            one = slice(part, part + 64)
            heads.append((q[:, one] @ k[:, one].T / 64**0.5).softmax(-1) @ v[:, one])
        return torch.cat(heads, dim=-1)

    def see(image):
        vit, kernel = "visual_encoder", state["visual_encoder.patch_embed.proj.weight"]
        patches = [
            (kernel * image[:, y : y + 8, x : x + 8]).sum((1, 2, 3))
            for y in range(0, 32, 8)
            for x in range(0, 32, 8)
        ]
        x = torch.stack(patches) + state[f"{vit}.patch_embed.proj.bias"]
        x = torch.cat([state[f"{vit}.cls_token"][0], x]) + state[f"{vit}.pos_embed"][0]
        for block in (f"{vit}.blocks.{number}" for number in range(3)):
            q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
            x = x + linear(f"{block}.attn.proj", attend(q, k, v))
            x = x + linear(
                f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
            )
        return norm(f"{vit}.norm", x, 1e-6)

    def look(name, x, memory):
        q, k, v = (
            linear(f"{name}.{part}", y) for part, y in (("query", x), ("key", memory), ("value", memory))
        )
        return attend(q, k, v)

    images, bert = (see(left), see(right)), "text_encoder.embeddings"
    x = state[f"{bert}.word_embeddings.weight"][torch.cat([torch.tensor([ENC]), ids[1:]])]
    x = norm(f"{bert}.LayerNorm", x + state[f"{bert}.position_embeddings.weight"][: len(ids)], 1e-12)
    for number in range(12):
        layer = f"text_encoder.encoder.layer.{number}"
        own, cross = f"{layer}.attention", f"{layer}.crossattention"
        x = norm(
            f"{own}.output.LayerNorm", x + linear(f"{own}.output.dense", look(f"{own}.self", x, x)), 1e-12
        )
        seen = [
            linear(f"{cross}.output.dense{i}", look(f"{cross}.self{i}", x, image))
            for i, image in enumerate(images)
        ]
        both = sum(seen) / 2 if number < 6 else linear(f"{cross}.output.merge_layer", torch.cat(seen, dim=-1))
        x = norm(f"{cross}.output.LayerNorm", x + both, 1e-12)
        wide = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", wide), 1e-12)
    return linear("cls_head.2", linear("cls_head.0", x[0]).clamp(min=0))


LEFT, RIGHT = pixels(2, 3, 32, 32), pixels(2, 3, 32, 32, seed=2)
IDS, MASK = texts([9, 6], first=CLS)


@torch.no_grad()
def nlvr_gap(model) -> float:
    logits = model.logits(model.memory(model.encode_image(torch.cat([LEFT, RIGHT]))), IDS, MASK)
    slow = [
        slow_nlvr(STATES["nlvr"], left, right, ids[mask.bool()])
        for left, right, ids, mask in zip(LEFT, RIGHT, IDS, MASK)
    ]
    return float((logits - torch.stack(slow)).abs().max())


def test_nlvr2_computes_what_a_plain_reference_computes():
    assert nlvr_gap(ours("nlvr")) < TOLERANCE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("crossattention.self0", "crossattention.self1"),
        ("layer.3.crossattention.output.dense0", "layer.3.crossattention.output.dense1"),
        ("layer.6.crossattention.output.merge_layer", "layer.7.crossattention.output.merge_layer"),
        ("layer.5.crossattention.output.LayerNorm", "layer.5.output.LayerNorm"),
    ],
)
def test_what_is_exchanged_in_nlvr2_is_seen(one, other):
    state = dict(STATES["nlvr"])
    exchange_(state, one, other)
    assert nlvr_gap(from_checkpoint_({}, state, "nlvr")[0]) > 1e-3


# --------------------------------------------------------------------------------- every tensor, and no other


@pytest.mark.parametrize("kind", STATES)
def test_every_tensor_is_loaded_or_accounted_for(kind):
    model, report = from_checkpoint_({}, dict(STATES[kind]), "the file")
    classes = {"vqa": BlipVqa, "nlvr": BlipNlvr}
    assert type(model) is classes.get(kind, Blip) and not model.training
    assert report.fresh.keys() == ({"temperature"} if kind == "itm" else set())
    spare = {*report.ignored, *report.tied}
    once = {re.sub(r"\.\d+\.", ".#.", name): name for name in STATES[kind]}  # of every layer's the last
    for name in once.values():
        if name in report.tied.values():
            continue  # its copy has the values, though some of these the geometry is read off
        state = {key: value for key, value in STATES[kind].items() if key != name}
        if name in spare:
            assert not from_checkpoint_({}, state, "the file")[1].fresh.keys() - report.fresh.keys()
        elif name == "temp" and "retrieval" in kind:  # which makes an ITM model of it, and is said
            assert from_checkpoint_({}, state, "the file")[1].fresh.keys() == {"temperature"}
        else:
            with pytest.raises(WeightsError, match=rf"the file: .*{re.escape(name)}"):
                from_checkpoint_({}, state, "the file")


def test_the_report_names_twin_and_queues_with_why():
    report = from_checkpoint_({}, dict(STATES["pretrain"]), "the file")[1]
    twin = {name for name in STATES["pretrain"] if "_m." in name}
    queues = {"image_queue", "text_queue", "queue_ptr"}
    counted = {"text_encoder.embeddings.position_ids", "text_decoder.bert.embeddings.position_ids"}
    assert report.ignored.keys() == twin | queues | counted
    lines = [line for line in str(report).splitlines() if "ignored" in line]
    assert len(lines) == 3 and any(f"{len(twin) - 1} tensors, such as" in line for line in lines)
    assert report.layout == "LAVIS BlipPretrain"
    bert = "text_decoder.bert.embeddings.word_embeddings.weight"
    assert report.tied["text_decoder.cls.predictions.decoder.weight"] == bert
    assert report.tied[bert] == "text_encoder.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("kind", STATES)
def test_a_tensor_too_many_is_named(kind):
    for name in ("visual_encoder.blocks.0.attn.lora", "text_encoder_n.bias", "logit_scale"):
        with pytest.raises(WeightsError, match=f"the file: .*no place for: {name}"):
            from_checkpoint_({}, STATES[kind] | {name: torch.ones(1)}, "the file")


def test_copies_that_differ_are_named():
    tied = from_checkpoint_({}, dict(STATES["pretrain"]), "the file")[1].tied
    assert len(tied) == 2 + 4 + 2 * 16, (
        "output layer; embeddings; cross-attention and feed-forward of two layers"
    )
    for name in tied:
        other = STATES["pretrain"][name] + 1e-9
        with pytest.raises(WeightsError, match=rf"the file: .*{re.escape(name)}.* differ"):
            from_checkpoint_({}, STATES["pretrain"] | {name: other}, "the file")


def test_shapes_that_make_no_blip_are_refused():
    positions = STATES["caption"]["visual_encoder.pos_embed"]
    with pytest.raises(WeightsError, match="pos_embed has 12 patches, which is no square"):
        from_checkpoint_({}, STATES["caption"] | {"visual_encoder.pos_embed": positions[:, :13]}, "the file")
    with pytest.raises(WeightsError, match="visual_encoder is 100 wide: heads are 64"):
        from_checkpoint_({}, Official(vision=100).caption(), "the file")
    with pytest.raises(WeightsError, match=r"itm_head.bias is \[3\]"):
        from_checkpoint_({}, STATES["itm"] | {"itm_head.bias": torch.ones(3)}, "the file")


# ------------------------------------------------------------------------------------------------- the file


def test_what_it_is_the_tensors_say_and_not_the_name(tmp_path):
    for kind, layout in (
        ("vqa", "BlipVQA"),
        ("caption", "BlipCaption"),
        ("itm", "BlipITM"),
        ("nlvr", "BlipNLVR"),
    ):
        file = save(STATES[kind], tmp_path / "model_base_retrieval_coco.pth")
        assert load_pretrained(file).report.layout == f"LAVIS {layout}"
    halves = {
        name: value.half() if value.is_floating_point() else value for name, value in STATES["itm"].items()
    }
    save_file(halves, tmp_path / "bare.safetensors")
    assert load_pretrained(tmp_path / "bare.safetensors").model.itm_head.bias.dtype == torch.float32
    assert (
        load_pretrained(tmp_path / "bare.safetensors", dtype=None).model.itm_head.bias.dtype == torch.float16
    )


def test_what_belongs_to_it(tmp_path):
    found = load_pretrained(save(Official(words=30524).caption(), tmp_path / "x.pth"))
    assert found.transform == ImageTransform(32, mean=CLIP_MEAN, resize="squash")
    assert found.info == {"converted_from": "LAVIS BlipCaption", "prompt": "a picture of "}
    assert (found.tokenizer.dec_id, found.tokenizer.enc_id, found.tokenizer.vocab_size) == (
        30522,
        30523,
        30524,
    )
    assert "its words are those of bert-base-uncased" in str(found.report)
    bert_uncased().save(tmp_path / "words")
    given = load_pretrained(tmp_path / "x.pth", tokenizer=tmp_path / "words")
    assert given.tokenizer.vocab_size == 30524 and "no tokenizer" not in str(given.report)
    other = load_pretrained(save(STATES["retrieval"], tmp_path / "x.pth"))
    assert other.tokenizer is None and "no tokenizer in this file" in str(other.report)


def test_images_of_another_size_interpolate_the_positions(tmp_path):
    found = load_pretrained(save(STATES["retrieval"], tmp_path / "x.pth"), image_size=48, dtype=None)
    table = STATES["retrieval"]["visual_encoder.pos_embed"]
    grid = table[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    wanted = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 36, -1)], dim=1)
    torch.testing.assert_close(found.model.vision.position_embedding.data, wanted, rtol=0, atol=1e-12)
    assert found.model.config.vision.image_size == 48 == found.transform.image_size
    assert found.report.interpolated == {"vision.position_embedding": "4 x 4 -> 6 x 6 patches, bicubic"}


class Hollow(Official):
    """Shapes alone."""

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")


def test_the_released_geometries_are_read_off_the_shapes():
    def config(official: Official, kind: str):
        state = getattr(official, kind)()
        return find_layout({}, state, "the file").config({}, state)

    base = {"vision": 768, "text": 768, "blocks": 12, "layers": 12, "patch": 16}
    base |= {"words": 30524, "projection": 256}
    large = {**base, "vision": 1024, "blocks": 24}
    for sizes, image, wanted in ((base, 224, blip_base(224)), (large, 384, blip_large(384))):
        found = config(Hollow(**sizes, image_size=image), "pretrain")
        assert found == replace(
            wanted,
            vision=replace(wanted.vision, intermediate_size=wanted.vision.hidden_size + 8),
            text=replace(wanted.text, intermediate_size=776, max_position_embeddings=24),
        )
    text = TextConfig(intermediate_size=776, max_position_embeddings=24)
    found = config(Hollow(**base, image_size=480), "vqa")
    assert found == BlipVqaConfig(vit_base(480, drop_path_rate=0.1, intermediate_size=776), text)
    assert config(Hollow(**large, image_size=384), "nlvr").vision == replace(
        vit_large(384), intermediate_size=1032
    )


def test_a_vqa_of_vit_large_has_a_decoder_of_the_texts_width():
    model = from_checkpoint_({}, Official(vision=192).vqa(), "the file")[0]
    layers = (*model.text_encoder.layers, *model.text_decoder.layers)
    kv = [layer.cross_attention.attention.kv.weight.shape[1] for layer in layers]
    assert kv == [192, 192, 128, 128]


def test_a_fine_tune_begins_with_a_checkpoint(tmp_path):
    file = save(Official(words=30524).pretrain(), tmp_path / "model_base.pth")
    recipe = recipe_named("retrieval_coco")
    recipe = replace(recipe, init=str(file), model=replace(recipe.model, vision=vit_base(48, patch_size=8)))
    made = prepare(recipe, [])
    start = load_pretrained(file, image_size=48).model
    assert made.model.config.vision.image_size == 48 and not made.model.config.decoder
    assert all(
        torch.equal(value, start.state_dict()[name]) for name, value in made.model.state_dict().items()
    )
