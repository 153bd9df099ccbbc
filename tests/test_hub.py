"""Models come back from their folders as they were, and never half."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from openblip.config import ConfigError, UserError
from openblip.convert.weights import SYSTEMS, WeightsError
from openblip.data.text import Tokenizer
from openblip.data.transforms import ImageTransform
from openblip.hub import load_pretrained, save_pretrained
from openblip.model_card import model_card
from openblip.models.blip import Blip
from openblip.models.blip_nlvr import BlipNlvr, BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.clip import Clip, ClipConfig, ClipTextConfig, clip_vision
from openblip.models.vit import HuggingFaceVision, VisionConfig, VisionTransformer
from tests.parity.peers import CLS, SEP, pixels
from tests.tiny_blip import BLIP, TEXT, VISION, files_in, tokenizer_of_words

HF_VISION = VisionConfig(32, 8, 24, 2, 4, backbone={
    "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
})  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return tokenizer_of_words(tmp_path_factory.mktemp("vocabulary") / "vocab.txt")


MODELS = {
    "blip": lambda: Blip(BLIP),
    "all shared": lambda: Blip(
        replace(BLIP, share=("embeddings", "self_attention", "cross_attention", "feed_forward"))
    ),
    "captioner": lambda: Blip(replace(BLIP, share=(), encoder=False)),
    "frozen SigLIP": lambda: Blip(replace(BLIP, vision=HF_VISION, freeze_vision=True)),
    "vqa": lambda: BlipVqa(BlipVqaConfig(VISION, TEXT)),
    "nlvr": lambda: BlipNlvr(BlipNlvrConfig(VISION, TEXT)),
    "clip": lambda: Clip(
        ClipConfig(
            clip_vision(32, 8, hidden_size=24, num_hidden_layers=2, num_attention_heads=4),
            ClipTextConfig(100, 16, 2, 4, 24, eos_token_id=99),
        )
    ),
    "vit": lambda: VisionTransformer(replace(VISION, layer_scale=1.0)),
    "SigLIP": lambda: HuggingFaceVision(HF_VISION),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_comes_back_as_it_was(kind, tmp_path):
    model = MODELS[kind]()
    save_pretrained(model, tmp_path / "it")
    loaded = load_pretrained(tmp_path / "it")
    assert type(loaded.model) is type(model) and loaded.model.config == model.config
    assert not loaded.model.training
    state = loaded.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name, p in loaded.model.named_parameters() if not p.requires_grad]
    assert not any(tensor.is_meta for tensor in [*loaded.model.parameters(), *loaded.model.buffers()])
    assert not loaded.report.ignored and not loaded.report.fresh
    assert (loaded.tokenizer, loaded.transform, loaded.info) == (None, None, {})


def test_what_belongs_to_it_comes_back(tokenizer, tmp_path):
    transform = ImageTransform(32, resize="crop", mean=(0.1, 0.2, 0.3))
    info = {
        "trained_on": "ten photographs",
        "metrics": {"tr@1": 0.51234567, "steps": 40},
        "prompt": "a photo of ",
    }
    save_pretrained(Blip(BLIP), tmp_path, tokenizer=tokenizer, transform=transform, info=info)
    loaded = load_pretrained(str(tmp_path))
    assert loaded.transform == transform and loaded.info == info
    assert loaded.tokenizer(["w7 w9"])["input_ids"].tolist() == [[CLS, 7, 9, SEP]]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for said in (
        "ten photographs",
        "| tr@1 | 0.5123 |",
        "| steps | 40 |",
        '- prompt: "a photo of "',
        "32 x 32",
        ".load(",
    ):
        assert said in card


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path):
    save_pretrained(Blip(BLIP), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("text_decoder.") and "self_attention" not in name for name in stored)
    loaded = load_pretrained(tmp_path)
    model = loaded.model
    assert model.text_decoder.embeddings is model.text_encoder.embeddings
    assert model.text_decoder.layers[0].cross_attention is model.text_encoder.layers[0].cross_attention
    assert model.text_decoder.layers[0].self_attention is not model.text_encoder.layers[0].self_attention
    assert loaded.report.tied["text_decoder.embeddings.word.weight"] == "text_encoder.embeddings.word.weight"
    assert f"tied: {len(loaded.report.tied)} names" in str(loaded.report)
    assert f"{len(stored)} tensors loaded" in str(loaded.report)


def test_a_file_with_both_copies_is_read_if_they_are_equal(tmp_path):
    save_pretrained(Blip(BLIP), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    copy = "text_decoder.layers.1.feed_forward.mlp.fc1.bias"
    stored[copy] = stored["text_encoder.layers.1.feed_forward.mlp.fc1.bias"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    load_pretrained(tmp_path)
    stored[copy][0] += 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"{re.escape(copy)} and text_encoder\S+ differ"):
        load_pretrained(tmp_path)


def test_large_models_are_cut_into_files_and_old_files_are_cleared(tmp_path, monkeypatch):
    import huggingface_hub

    whole = huggingface_hub.save_torch_state_dict
    model = Blip(BLIP)
    save_pretrained(model, tmp_path)
    cut = lambda *args, max_shard_size, **rest: whole(*args, max_shard_size=20_000, **rest)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", cut)
    save_pretrained(model, tmp_path)
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(load_pretrained(tmp_path).model.itm_head.weight, model.itm_head.weight)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"model-00002\S+: not there, though the index lists it"):
        load_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", whole)
    save_pretrained(model, tmp_path)
    assert files_in(tmp_path) == ["README.md", "config.json", "model.safetensors"]


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    save_pretrained(Blip(BLIP), tmp_path / "it")
    shutil.move(tmp_path / "it" / "model.safetensors", tmp_path / "elsewhere.safetensors")
    for places in ({"temperature": "../elsewhere.safetensors"}, {}, []):
        (tmp_path / "it" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError, match="weight_map does not name the files beside it"):
            load_pretrained(tmp_path / "it")


def test_a_loaded_model_can_be_changed_and_saved_to_its_own_folder(tmp_path):
    save_pretrained(Blip(BLIP), tmp_path)
    model = load_pretrained(tmp_path).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    model.encode_image(pixels(1, 3, 32, 32).float())  # what it holds was not pulled away


def test_a_save_that_fails_leaves_no_config(tmp_path, monkeypatch, tokenizer):
    save_pretrained(Blip(BLIP), tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr(Tokenizer, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(Blip(BLIP), tmp_path, tokenizer=tokenizer)
    assert files_in(tmp_path) == ["README.md", "config.json", "model.safetensors"]
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_are_brought_to_a_dtype(tmp_path):
    save_pretrained(Blip(BLIP).to(torch.float16), tmp_path)
    assert load_pretrained(tmp_path).model.itm_head.weight.dtype == torch.float32
    assert load_pretrained(tmp_path, dtype=None).model.itm_head.weight.dtype == torch.float16


def test_position_embeddings_are_resized_once_for_another_image_size(tmp_path):
    model = Blip(BLIP).eval()
    save_pretrained(model, tmp_path, transform=ImageTransform(32))
    loaded = load_pretrained(tmp_path, image_size=48)
    assert loaded.model.config.vision.image_size == 48 == loaded.transform.image_size
    assert loaded.report.interpolated == {"vision.position_embedding": "4 x 4 -> 6 x 6 patches, bicubic"}
    images = pixels(1, 3, 48, 48).float()
    torch.testing.assert_close(
        loaded.model.encode_image(images), model.encode_image(images)
    )  # resized as it runs
    assert load_pretrained(tmp_path, image_size=32).report.interpolated == {}
    with pytest.raises(ConfigError, match="multiple of patch_size"):
        load_pretrained(tmp_path, image_size=36)


def broken(change):
    """Something to do to a folder: `change` its tensors."""

    def spoil(folder):
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken(lambda s: s.pop("itm_head.bias")), "1 missing: itm_head.bias"),
        (broken(lambda s: s.pop("text_encoder.embeddings.word.weight")), "2 missing: text_decoder.embed"),
        (broken(lambda s: s.update(more=torch.ones(2))), "1 this model has no place for: more"),
        (broken(lambda s: s.update({"itm_head.bias": torch.ones(3)})), r"bias is \[3\], the model"),
        (lambda f: (f / "config.json").unlink(), "no config.json in it"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "wanted an object, got a list"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights in it; wanted one of model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"nonsense"), "damaged"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors: damaged"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(spoil, message, tmp_path):
    save_pretrained(Blip(BLIP), tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blop"}, "model_type 'blop'; known are blip, blip_vqa"),
        ({"model": {"hidden": 3}}, 'config.json: model: unknown key "hidden"'),
        ({"model": {"text": {"num_hidden_layer": 3}}}, 'did you mean "num_hidden_layers"'),
        ({"image_transform": {"resize": "stretch"}}, "image_transform"),
        ({"colour": 1}, 'unknown key "colour"'),
    ],
)
def test_a_config_that_is_none_is_refused(change, message, tmp_path):
    save_pretrained(Blip(BLIP), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with (
        pytest.raises(ConfigError, match=message)
        if "model_type" not in change
        else pytest.raises(UserError, match=message)
    ):
        load_pretrained(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="dec_id is 128, the model's dec_token_id 127"):
        save_pretrained(
            Blip(replace(BLIP, text=replace(TEXT, dec_token_id=127))), tmp_path, tokenizer=tokenizer
        )
    with pytest.raises(UserError, match="has 130 tokens, the model knows 129"):
        save_pretrained(
            Blip(replace(BLIP, text=replace(TEXT, vocab_size=129))), tmp_path, tokenizer=tokenizer
        )
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_of_ours_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="a Linear cannot be saved; what can is blip"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)


def test_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="no folder can be made there"):
            save_pretrained(Blip(BLIP), tmp_path / place)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "no such folder"),
        ("nosuch", "no such folder or file .a name on the Hugging Face hub looks like owner/name"),
        ("some-owner/some-name", "some-owner/some-name: no such folder here, and the hub does not give it"),
    ],
)
def test_a_name_that_is_nowhere(name, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(name)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """The hub itself is out of reach: its client is replaced by one that has the folder."""
    import huggingface_hub

    save_pretrained(Blip(BLIP), tmp_path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: asked.append((name, options)) or str(tmp_path),
    )
    assert isinstance(load_pretrained("owner/name").model, Blip)
    assert asked == [("owner/name", {"allow_patterns": ["*.json", "*.jinja", "*.txt", "model*.safetensors"]})]


class Bare:
    """As much of a model as a card needs."""

    class config:
        image_size, encoder, decoder, qformer_text = 32, True, True, False

    config.blip2 = config

    def parameters(self):
        return [torch.zeros(3)]


@pytest.mark.parametrize("kind", SYSTEMS)
def test_every_system_has_a_model_card(kind):
    page = model_card(Bare(), kind, "mine", "1.0", {"metrics": {"r": 0.5}})
    assert "# mine" in page and "saved by openblip 1.0" in page and "| r | 0.5 |" in page
