"""LAVIS's original files of BLIP-2's stage 2 and of InstructBLIP, made of the weights of transformers' models, become
ours and give what transformers gives.
"""

import json

import pytest
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from openblip import api, cli
from openblip.config import UserError
from openblip.hub import load_pretrained, save_for_transformers, save_pretrained
from tests.parity import test_blip2_llm
from tests.parity.lavis_files import LAYER
from tests.parity.peers import (
    TOLERANCE,
    norms_that_do_not_round,
    other_eps,
    swapped_k_and_v,
    swapped_q_and_k,
)
from tests.parity.peers_lavis import KINDS, stage2_files
from tests.tiny_models import drawing


@pytest.fixture(scope="module", autouse=True)
def exact_norms():
    with norms_that_do_not_round():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return stage2_files(tmp_path_factory)


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
