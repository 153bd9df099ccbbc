"""Folders of transformers are read as they are meant or refused by name, and ours are read by transformers."""

import json
import os
from dataclasses import replace

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

from openblip.config import UserError
from openblip.data.text import Tokenizer
from openblip.hub import load_pretrained, save_for_transformers
from openblip.models.blip import Blip, without_decoder, without_encoder
from openblip.models.blip_nlvr import BlipNlvr, BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.vit import VisionTransformer
from tests.parity.peers import DEC, ENC, blip_config, clip_config, dinov2_config, pixels, random_peer, texts
from tests.tiny_blip import BLIP, TEXT, VISION, tokenizer_of_words

PEERS = {
    "captioning": (BlipForConditionalGeneration, blip_config),
    "retrieval": (BlipForImageTextRetrieval, blip_config),
    "vqa": (BlipForQuestionAnswering, lambda: blip_config(text_width=16, vision_width=16)),
    "clip": (CLIPModel, clip_config),
    "dinov2": (Dinov2Model, dinov2_config),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return tokenizer_of_words(tmp_path_factory.mktemp("vocabulary") / "vocab.txt")


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
