"""Models come back from their folders as they were, from transformers' folders too, and never half."""

import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Model,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from openblip.config import ConfigError, UserError
from openblip.convert.weights import SYSTEMS, WeightsError
from openblip.data.text import Tokenizer
from openblip.data.transforms import ImageTransform
from openblip.hub import load_pretrained, push_to_hub, save_for_transformers, save_pretrained
from openblip.model_card import model_card
from openblip.models.blip import Blip, BlipConfig, without_decoder, without_encoder
from openblip.models.blip_nlvr import BlipNlvr, BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.clip import Clip, ClipConfig, ClipTextConfig, clip_vision
from openblip.models.text import TextConfig
from openblip.models.vit import HuggingFaceVision, VisionConfig, VisionTransformer
from tests.parity.peers import (
    CLS,
    DEC,
    ENC,
    SEP,
    blip_config,
    clip_config,
    dinov2_config,
    pixels,
    random_peer,
    texts,
)

VISION = VisionConfig(32, 8, 24, 2, 4, 32)
TEXT = TextConfig(130, 16, 2, 4, 24, max_position_embeddings=24, dec_token_id=DEC, enc_token_id=ENC)
BLIP = BlipConfig(VISION, TEXT, projection_dim=12)
HF_VISION = VisionConfig(32, 8, 24, 2, 4, backbone={
    "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
})  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """128 words with [CLS] 101 and [SEP] 102, to which [DEC] 128 and [ENC] 129 are added."""
    words = [f"w{i}" for i in range(128)]
    words[0], words[100], words[CLS], words[SEP] = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(words), encoding="utf-8")
    return Tokenizer.from_vocab(path)


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


def files_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


# ---------------------------------------------------------------------------------- folders of transformers

PEERS = {
    "captioning": (BlipForConditionalGeneration, blip_config),
    "retrieval": (BlipForImageTextRetrieval, blip_config),
    "vqa": (BlipForQuestionAnswering, lambda: blip_config(text_width=16, vision_width=16)),
    "clip": (CLIPModel, clip_config),
    "dinov2": (Dinov2Model, dinov2_config),
}


@pytest.mark.parametrize("kind", PEERS)
def test_a_folder_of_transformers_is_read(kind, tmp_path):
    cls, config = PEERS[kind]
    peer = random_peer(cls, config())
    peer.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.float64)
    embeds = (loaded.model.encode_image if hasattr(loaded.model, "encode_image") else loaded.model)(
        pixels(1, 3, 32, 32)
    )
    vision = peer if kind == "dinov2" else peer.vision_model
    assert (embeds - vision(pixels(1, 3, 32, 32)).last_hidden_state).abs().max() < 1e-9
    assert loaded.info == {"converted_from": f"transformers {cls.__name__}"}
    assert "no preprocessor_config.json" in str(loaded.report)
    assert ("temperature" in loaded.report.fresh) == (kind == "retrieval")
    assert ("embeddings.mask_token" in loaded.report.ignored) == (kind == "dinov2")


@pytest.mark.parametrize("kind", PEERS)
def test_a_folder_for_transformers_is_read_by_it(kind, tmp_path):
    cls, config = PEERS[kind]
    peer = random_peer(cls, config()).float()
    peer.save_pretrained(tmp_path / "theirs")
    save_for_transformers(load_pretrained(tmp_path / "theirs").model, tmp_path / "ours")
    again, told = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["unexpected_keys"] and set(told["missing_keys"]) <= {"embeddings.mask_token"}
    for name, value in peer.state_dict().items():
        assert name == "embeddings.mask_token" or torch.equal(again.state_dict()[name], value), name
    images = pixels(1, 3, 32, 32).float()
    vision = (lambda model: model) if kind == "dinov2" else (lambda model: model.vision_model)
    assert torch.equal(vision(again.eval())(images)[0], vision(peer)(images)[0])


def test_both_halves_go_to_transformers_one_by_one(tmp_path):
    model = Blip(BLIP).eval()
    with pytest.raises(UserError, match="no BLIP with both halves"):
        save_for_transformers(model, tmp_path)
    save_for_transformers(without_encoder(model), tmp_path / "captioner")
    save_for_transformers(without_decoder(model), tmp_path / "filter")
    images, (ids, mask) = pixels(2, 3, 32, 32).float(), texts([6, 6], first=DEC)
    with torch.no_grad():
        memory = model.memory(model.encode_image(images))
        captioner = BlipForConditionalGeneration.from_pretrained(tmp_path / "captioner").eval()
        torch.testing.assert_close(
            model.lm_logits(model.lm_states(memory, ids, mask)), captioner(images, ids, mask).logits
        )
        retrieval = BlipForImageTextRetrieval.from_pretrained(tmp_path / "filter").eval()
        ids[:, 0] = ENC
        torch.testing.assert_close(
            model.itm_logits(memory, ids, mask), retrieval(ids, images, attention_mask=mask).itm_score
        )


def test_a_model_built_differently_does_not_go_to_transformers(tmp_path):
    for change in ({"layer_scale": 1.0}, {"patch_bias": False}):
        model = without_decoder(Blip(replace(BLIP, vision=replace(VISION, **change))))
        with pytest.raises(UserError, match=r"built differently: vision\.(blocks|patch)"):
            save_for_transformers(model, tmp_path)
    with pytest.raises(UserError, match=r"Dinov2Model .*differently: blocks\.0\.scale1"):
        save_for_transformers(VisionTransformer(VISION), tmp_path)
    with pytest.raises(UserError, match="needs images and texts of one width"):
        save_for_transformers(BlipVqa(BlipVqaConfig(VISION, TEXT)), tmp_path)
    with pytest.raises(UserError, match="no class for a BlipNlvr"):
        save_for_transformers(BlipNlvr(BlipNlvrConfig(VISION, TEXT)), tmp_path)


@pytest.fixture
def captioner(tmp_path):
    """A folder of transformers, and its weights to spoil."""
    random_peer(BlipForConditionalGeneration, blip_config()).save_pretrained(tmp_path)
    return tmp_path


def test_old_pickled_weights_with_all_their_copies_are_read(captioner):
    weights = load_file(captioner / "model.safetensors")
    (captioner / "model.safetensors").unlink()
    bert = "text_decoder.bert.embeddings."
    copies = {
        "text_decoder.cls.predictions.decoder.weight": weights[f"{bert}word_embeddings.weight"],
        "text_decoder.cls.predictions.decoder.bias": weights["text_decoder.cls.predictions.bias"],
        f"{bert}position_ids": torch.arange(24)[None],
    }
    torch.save(weights | copies, captioner / "pytorch_model.bin")
    report = load_pretrained(captioner).report
    assert report.tied.keys() == copies.keys() - {f"{bert}position_ids"}
    assert report.ignored == {f"{bert}position_ids": "0, 1, 2, … are counted at run time"}
    assert "ignored: text_decoder.bert.embeddings.position_ids" in str(report)


def test_a_tied_tensor_may_bear_the_name_of_its_copy(captioner):
    weights = load_file(captioner / "model.safetensors")
    before = load_pretrained(captioner).model.lm_head.bias
    weights["text_decoder.cls.predictions.decoder.bias"] = weights.pop("text_decoder.cls.predictions.bias")
    save_file(weights, captioner / "model.safetensors")
    assert torch.equal(load_pretrained(captioner).model.lm_head.bias, before)


COPY = "text_decoder.cls.predictions.decoder.bias"
LAYER_1 = "text_decoder.bert.encoder.layer.1."


class Evil:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("vision_model.post_layernorm.bias"), "1 missing: vision_model.post_layernorm.bias"),
        (lambda w: w.pop(f"{LAYER_1}attention.self.key.weight"), rf"1 missing: {LAYER_1}\S+key.weight"),
        (lambda w: w.update({"vision_model.extra": torch.ones(1)}), "no place for: vision_model.extra"),
        (lambda w: w.update({COPY: torch.ones(130)}), f"{COPY} and .* differ"),
        (lambda w: w.update({"vision_model.post_layernorm.bias": torch.ones(7)}), r"norm.bias is \[7\]"),
        (lambda w: [w.pop(name) for name in list(w) if "vision" in name], "'blip' with tensors under text_"),
    ],
)  # fmt: skip
def test_their_weights_fit_or_are_refused_by_name(captioner, spoil, message):
    weights = load_file(captioner / "model.safetensors")
    spoil(weights)
    save_file(weights, captioner / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_pretrained(captioner)


def test_a_pickle_that_would_run_code_is_refused(captioner):
    (captioner / "model.safetensors").unlink()
    torch.save({"a": Evil()}, captioner / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"pytorch_model.bin: cannot be read as weights: it would call posix.system;"
    ):
        load_pretrained(captioner)
    torch.save([1, 2], captioner / "pytorch_model.bin")
    with pytest.raises(UserError, match="wanted names and tensors"):
        load_pretrained(captioner)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision_config", {"image_size": [32, 64]}, r"image_size \[32, 64\]: only square"),
        ("text_config", {"hidden_act": "swish"}, "hidden_act 'swish'"),
        (None, {"text_config": [1]}, "config.json: text_config is no object"),
        ("text_config", {"hidden_size": "16"}, "config.json: text_config: hidden_size"),
        (
            None,
            {"model_type": "llava"},
            "model_type 'llava' with tensors under text_decoder, vision_model",
        ),
    ],
)
def test_their_config_is_understood_or_refused(captioner, section, change, message):
    path = captioner / "config.json"
    config = json.loads(path.read_text())
    (config if section is None else config[section]).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_pretrained(captioner)


def test_what_their_config_leaves_out_is_what_transformers_assumes():
    from transformers import BlipConfig, CLIPConfig, Dinov2Config

    from openblip.convert.huggingface_config import clip, dinov2, retrieval, vqa

    for convert, their_class in (
        (vqa, BlipConfig),
        (retrieval, BlipConfig),
        (clip, CLIPConfig),
        (dinov2, Dinov2Config),
    ):
        assert convert({"model_type": their_class.model_type}) == convert(their_class().to_dict())


def test_files_of_the_first_clip_converter(tmp_path):
    from openblip.convert.huggingface_config import clip

    full = clip_config().to_dict()
    wrong = full["text_config"] | {"num_hidden_layers": 9}
    assert clip(full | {"text_config": wrong, "text_config_dict": full["text_config"]}) == clip(full)
    assert clip(full | {"text_config_dict": None}) == clip(full)


@pytest.mark.parametrize(
    "processor",
    [
        BlipImageProcessorPil(size={"height": 32, "width": 32}),
        BlipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, resample=2),
        BlipImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ],
    ids=["BLIP", "another norm", "no norm", "CLIP"],
)  # fmt: skip
def test_their_image_processor_becomes_our_transform(processor, tmp_path):
    kind = "clip" if "CLIP" in type(processor).__name__ else "captioning"
    cls, config = PEERS[kind]
    random_peer(cls, config()).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert "preprocessor" not in str(loaded.report)
    noise = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (loaded.transform(image) - theirs).abs().max() < 1e-5


def test_their_tokenizer_comes_along(captioner, tokenizer):
    tokenizer.save(captioner)
    loaded = load_pretrained(captioner)
    assert loaded.tokenizer.vocab_size == 130 and "no tokenizer" not in str(loaded.report)
    (captioner / "tokenizer.json").unlink()
    assert "no tokenizer in this folder" in str(load_pretrained(captioner).report)


class Hub:
    """What huggingface_hub's HfApi is asked for, and what the repository then holds. `refuses`: calls that fail."""

    def __init__(self, folder, refuses: dict[str, Exception] | None = None) -> None:
        self.folder, self.refuses, self.asked = folder, refuses or {}, []

    def __call__(self, token=None):
        self.asked.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append(("create", repo_id, private, exist_ok))
        if "create" in self.refuses:
            raise self.refuses["create"]
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
        self.asked.append(("upload", repo_id, delete_patterns))
        if "upload" in self.refuses:
            raise self.refuses["upload"]
        from huggingface_hub.utils import filter_repo_objects

        names = list(filter_repo_objects(files_in(folder_path), allow_patterns=allow_patterns))
        self.folder.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(folder_path / name, self.folder / name)


@pytest.mark.parametrize("how", ["folder", "loaded"])
def test_a_model_pushed_to_the_hub_is_whole_there_and_nothing_else_is(how, tokenizer, tmp_path, monkeypatch):
    model = Blip(BLIP)
    save_pretrained(model, tmp_path / "mine", tokenizer=tokenizer, info={"trained_on": "ten photographs"})
    (tmp_path / "mine/notes.txt").write_text("not for the public")
    hub = Hub(tmp_path / "there")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    what = str(tmp_path / "mine") if how == "folder" else load_pretrained(tmp_path / "mine")
    assert push_to_hub(what, "ann/blip", private=True, token="secret") == "https://hub.example/ann/blip"
    stale = ["model*.safetensors", "model*.safetensors.index.json"]
    assert hub.asked == [
        ("token", "secret"),
        ("create", "ann/blip", True, True),
        ("upload", "ann/blip", stale),
    ]
    wanted = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert files_in(tmp_path / "there") == wanted
    found = load_pretrained(tmp_path / "there")
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in found.model.state_dict().items()
    )
    assert found.info == {"trained_on": "ten photographs"} and found.tokenizer is not None
    if how == "loaded":
        assert "# blip\n" in (tmp_path / "there/README.md").read_text(), "named as on the hub"


def test_what_is_not_a_complete_model_of_ours_is_not_pushed(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "there")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    save_pretrained(Blip(BLIP), tmp_path / "mine")
    save_for_transformers(without_decoder(Blip(BLIP)), tmp_path / "theirs")
    shutil.copytree(tmp_path / "mine", tmp_path / "cut")
    os.truncate(tmp_path / "cut/model.safetensors", 5000)
    for folder, name, message in (
        ("mine", "blip", "looks like owner/name"),
        ("absent", "ann/blip", "no config.json in it"),
        ("theirs", "ann/blip", "not a folder of openblip's"),
        ("cut", "ann/blip", "damaged"),
    ):
        with pytest.raises(UserError, match=message):
            push_to_hub(tmp_path / folder, name)
    assert not any(asked[0] in ("create", "upload") for asked in hub.asked)


@pytest.mark.parametrize("call", ["create", "upload"])
def test_what_the_hub_says_no_to_is_one_line(call, tmp_path, monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    save_pretrained(Blip(BLIP), tmp_path / "mine")
    answer = SimpleNamespace(headers={}, request=None, status_code=403)
    for error, said in (
        (
            HfHubHTTPError("403 Forbidden: no right to write\n\nRequest ID: 7", response=answer),
            "403 Forbidden: no right to write",
        ),
        (HTTPError("the connection was refused"), "the connection was refused"),
        (ValueError(), "ValueError"),
    ):
        monkeypatch.setattr("huggingface_hub.HfApi", Hub(tmp_path / "there", {call: error}))
        with pytest.raises(UserError) as caught:
            push_to_hub(tmp_path / "mine", "ann/blip")
        assert str(caught.value) == f"ann/blip: the hub did not take it: {said}"


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
