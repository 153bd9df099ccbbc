"""LAVIS's original files of BLIP-2's stage 1, made of the weights of transformers' models, become ours and give what
transformers gives; what is missing or wrong in a file of either stage is said by name.
"""

import pytest
import torch
from safetensors.torch import save_file
from transformers import Blip2Config as TheirBlip2Config
from transformers import Blip2ForImageTextRetrieval

from openblip.config import UserError
from openblip.convert.weights import WeightsError
from openblip.hub import load_pretrained, save_pretrained
from tests.parity import test_blip2_retrieval
from tests.parity.lavis_files import (
    LAYER,
    lavis_names,
    plain_clip,
    split_tower,
    stage1_extras,
    with_last_block,
)
from tests.parity.peers import (
    CLS,
    DEC,
    TOLERANCE,
    norms_that_do_not_round,
    other_eps,
    pixels,
    swapped_k_and_v,
    swapped_q_and_k,
    texts,
)
from tests.parity.peers_lavis import (
    IMAGES,
    LARGER,
    clip_file,
    drawn,
    eva_file,
    sections,
    stage2_files,
)


@pytest.fixture(scope="module", autouse=True)
def exact_norms():
    with norms_that_do_not_round():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return stage2_files(tmp_path_factory)


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


@pytest.fixture(scope="module")
def eva(tmp_path_factory):
    return eva_file(tmp_path_factory)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_file(tmp_path_factory)


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
