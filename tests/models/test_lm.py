"""Our decoding over a transformers model gives what transformers' own gives, and does less work for it."""

import pytest
import torch

from openblip.config import ConfigError, UserError, from_dict, to_dict
from openblip.models.adapters import LoraSettings
from openblip.models.generation import GenerationConfig, generate
from openblip.models.lm import LanguageModel, LmConfig
from tests.models.tiny_lms import CONFIGS, DECODER_ONLY, ENCODER_DECODER, VOCAB, tiny_lm

ALL = DECODER_ONLY + ENCODER_DECODER
QUERIES = 3


def inputs(lm, lengths=(5, 2, 3)):
    """Soft prompts [B, Q, H] and prompts [B, P] of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    soft = torch.randn(len(lengths), QUERIES, lm.hidden_size, generator=generator).to(lm.model.dtype)
    ids = torch.randint(5, VOCAB - 12, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return soft, ids.masked_fill(mask == 0, lm.pad_token_id), mask


def assert_same(lm, ours, theirs):
    """Up to rounding; Gemma 2 is the one in float32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 if lm.model.dtype is torch.float64 else 2e-5)


def write(lm, soft, ids, mask, **options):
    decoding = lm.decode(soft, ids, mask)
    return generate(
        decoding,
        decoding.start_ids,
        GenerationConfig(**options),
        eos_token_id=lm.eos_token_ids,
        pad_token_id=lm.pad_token_id,
    )


def peer(lm, soft, ids, mask, **options):
    """What transformers generates from the same vectors, each prompt for itself: new ids, row by row."""
    rows = []
    for row in range(len(ids)):
        kept = ids[row : row + 1, mask[row].bool()]
        embeds = torch.cat([soft[row : row + 1], lm.embed(kept)], dim=1)
        out = lm.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            eos_token_id=lm.eos_token_ids,
            pad_token_id=lm.pad_token_id,
            **({"decoder_start_token_id": lm.start_token_id} if lm.is_encoder_decoder else {}),
            **options,
        )
        rows += out[:, 1:].tolist() if lm.is_encoder_decoder else out.tolist()
    return rows


def texts(generated):
    return [row[:length].tolist() for row, length in zip(generated.sequences, generated.lengths, strict=True)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 1}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -1.0}],
    ids=["greedy", "beams"],
)
def test_the_same_ids_as_transformers(name, options):
    lm = tiny_lm(name)
    soft, ids, mask = inputs(lm)
    ours = texts(write(lm, soft, ids, mask, max_new_tokens=9, repetition_penalty=1.3, **options))
    theirs = peer(lm, soft, ids, mask, max_new_tokens=9, repetition_penalty=1.3, do_sample=False, **options)
    theirs = [row[: len(text)] for row, text in zip(theirs, ours, strict=True)]
    assert ours == theirs
    assert len({tuple(text) for text in ours}) > 1  # the prompts matter


@pytest.mark.parametrize(
    ("name", "side"), [*((name, "right") for name in ALL), ("llama", "left"), ("t5", "left")]
)
def test_a_batch_of_mixed_lengths_equals_each_alone(name, side):
    lm = tiny_lm(name)
    soft, ids, mask = inputs(lm)
    if side == "left":
        order = mask.argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    lines = torch.randint(5, VOCAB, (3, 4))
    together = lm.decode(soft, ids, mask)
    steps = [together(together.start_ids, None), *(together(lines[:, i : i + 1], None) for i in range(4))]
    for row in range(3):
        kept = ids[row : row + 1, mask[row].bool()]
        alone = lm.decode(soft[row : row + 1], kept)
        one = [alone(alone.start_ids, None), *(alone(lines[row, i].view(1, 1), None) for i in range(4))]
        for ours, theirs in zip(steps, one, strict=True):
            assert_same(lm, ours[row], theirs[0])


@pytest.mark.parametrize("name", ALL)
def test_the_cache_changes_nothing_and_training_sees_the_same(name):
    lm = tiny_lm(name)
    soft, ids, _ = inputs(lm, lengths=(4, 4))
    text = torch.randint(5, VOCAB, (2, 5))
    decoding = lm.decode(soft, ids)
    cached = [decoding(decoding.start_ids, None), *(decoding(text[:, i : i + 1], None) for i in range(4))]
    if lm.is_encoder_decoder:
        states = lm.states(soft, ids, None, labels=text)
    else:
        states = lm.states(soft, torch.cat([ids, text], dim=1))[:, 4:]
    assert_same(lm, torch.stack(cached, dim=1), lm.logits(states))


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_the_model_itself(name):
    lm = tiny_lm(name)
    soft, ids, mask = inputs(lm)
    embeds = torch.cat([soft, lm.embed(ids)], dim=1)
    whole = torch.cat([torch.ones(3, QUERIES, dtype=torch.long), mask], dim=1)
    if lm.is_encoder_decoder:
        labels = torch.randint(5, VOCAB, (3, 4)).masked_fill(torch.tensor([[0, 0, 0, 1]] * 3).bool(), -100)
        before = labels.masked_fill(labels == -100, lm.pad_token_id)[:, :-1]
        before = torch.cat([torch.full((3, 1), lm.start_token_id), before], dim=1)
        theirs = lm.model(inputs_embeds=embeds, attention_mask=whole, decoder_input_ids=before).logits
        ours = lm.logits(lm.states(soft, ids, mask, labels))
        assert_same(lm, ours, theirs)
    else:
        theirs = lm.model(inputs_embeds=embeds, attention_mask=whole).logits[:, QUERIES - 1 : -1]
        ours = lm.logits(lm.states(soft, ids, mask))
        assert_same(lm, ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_prefix_is_run_once_per_image(name):
    lm = tiny_lm(name)
    soft, ids, mask = inputs(lm)
    seen = []
    first = lm.model.get_encoder() if lm.is_encoder_decoder else lm.model.base_model
    first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    write(lm, soft, ids, mask, num_beams=4, max_new_tokens=6, min_new_tokens=6)
    assert seen[0] == (3, QUERIES + 5)  # images, not beams
    assert seen[1:] == ([] if lm.is_encoder_decoder else [(12, 1)] * 5)


def test_beams_reorder_only_the_text():
    lm = tiny_lm("llama")
    soft, ids, mask = inputs(lm, lengths=(4, 4))
    decoding = lm.decode(soft, ids, mask)
    decoding(decoding.start_ids, None)
    rows = torch.arange(2).repeat_interleave(3)
    decoding(torch.tensor([[5], [6], [7], [8], [9], [10]]), rows)
    before = [layer.keys.clone() for layer in decoding.cache.layers]
    swapped = torch.tensor([1, 1, 0, 5, 4, 3])
    decoding._follow(swapped)
    for layer, keys in zip(decoding.cache.layers, before, strict=True):
        torch.testing.assert_close(layer.keys, keys[swapped], rtol=0, atol=0)
        assert torch.equal(layer.keys[:, :, :-1], keys[:, :, :-1])  # equal already: the rows share a prefix


def test_a_fork_leaves_the_original_as_it_was():
    lm = tiny_lm("llama")
    soft, ids, mask = inputs(lm)
    decoding = lm.decode(soft, ids, mask)
    decoding(decoding.start_ids, None)
    token = torch.full((3, 1), 7)
    wanted = decoding.fork()(token, None)
    decoding.fork()(torch.full((3, 1), 9), None)
    assert torch.equal(decoding(token, None), wanted)


def test_frozen_and_yet_a_way_for_the_gradient():
    lm = tiny_lm("opt")  # with dropout 0.1
    lm.train()
    assert not any(module.training for module in lm.model.modules())
    soft, ids, mask = inputs(lm)
    soft.requires_grad_()
    lm.logits(lm.states(soft, ids, mask)).logsumexp(dim=-1).sum().backward()
    assert soft.grad.abs().min() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lm.parameters())


@pytest.mark.parametrize("name", ALL)
def test_plain_attention_sees_what_the_usual_one_does(name):
    lm = tiny_lm(name)
    soft, ids, mask = inputs(lm)
    labels = ids.masked_fill(mask == 0, -100)

    def states():
        if lm.is_encoder_decoder:
            return lm.states(soft, ids, mask, labels)
        several = lm.states_of_several(soft, ids.repeat(2, 1), mask.sum(dim=1).repeat(2))
        return torch.cat([lm.states(soft, ids, mask), several])  # padding and all

    usual = states()
    lm.model.set_attn_implementation("eager")
    assert len(usual) == (3 if lm.is_encoder_decoder else 9)
    torch.testing.assert_close(states(), usual, rtol=0, atol=2e-5)  # its softmax is in float32 always


def test_a_step_of_training_in_bfloat16_takes_plain_attention_and_writing_the_usual():
    lm = tiny_lm("llama").bfloat16()
    soft, ids, mask = inputs(lm)
    taken = lambda: lm.model.config._attn_implementation  # noqa: E731
    assert taken() == "sdpa"
    lm.states(soft.requires_grad_(), ids, mask)
    assert taken() == "eager"
    with torch.no_grad():
        write(lm, soft, ids, mask, max_new_tokens=2)
        assert taken() == "sdpa"
    lm.states(soft, ids, mask)
    lm.double().states(soft.double(), ids, mask)
    assert taken() == "sdpa"
    lm.bfloat16().set_grad_checkpointing()  # the second run must find what the first did
    lm.states(soft, ids, mask)
    assert taken() == "sdpa"


def test_a_choice_of_attention_that_somebody_made_stays():
    lm = tiny_lm("llama").bfloat16()
    lm.model.set_attn_implementation("eager")
    soft, ids, mask = inputs(lm)
    lm.states(soft, ids, mask)
    with torch.no_grad():
        lm.states(soft, ids, mask)
    assert lm.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_lora_trains_adapters_and_nothing_else(name):
    pytest.importorskip("peft")
    lm = tiny_lm(name, lora=LoraSettings(rank=2, dropout=0.5))
    trained = {key for key, parameter in lm.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in key for key in trained)
    lm.train()
    training = {key for key, module in lm.model.named_modules() if module.training}
    assert training and all("lora_dropout" in key for key in training)
    assert not any(module.training for module in lm.eval().modules())
    soft, ids, mask = inputs(lm)
    plain = tiny_lm(name)
    labels = torch.randint(5, VOCAB, (3, 5))
    args = (soft, ids, mask, labels if lm.is_encoder_decoder else None)
    assert_same(lm, lm.states(*args), plain.states(*args))  # B begins at zero


def test_what_the_config_says():
    opt, t5, bart = (tiny_lm(name) for name in ("opt", "t5_tied", "bart"))
    assert (opt.hidden_size, opt.vocab_size, opt.context_length) == (12, VOCAB, 64)
    assert opt.eos_token_ids == [50]
    assert (t5.start_token_id, t5.context_length) == (0, None)  # T5 names no start: its padding
    assert bart.start_token_id == 2
    many = tiny_lm("llama")
    many.config.config["eos_token_id"] = [2, 7]
    assert many.eos_token_ids == [2, 7]
    assert from_dict(LmConfig, to_dict(opt.config), "here") == opt.config


def test_clear_errors():
    with pytest.raises(ConfigError, match="model_type"):
        LmConfig({})
    with pytest.raises(ConfigError, match="no_such_model"):
        LanguageModel(LmConfig({"model_type": "no_such_model"}))
    lm = tiny_lm("llama")
    with pytest.raises(UserError, match="70 positions, 6 more than the 64"):
        lm.states(torch.zeros(1, 3, 16), torch.zeros(1, 67, dtype=torch.long))
    with pytest.raises(ConfigError, match="eos_token_id"):
        LanguageModel(LmConfig({**CONFIGS["llama"], "eos_token_id": None})).eos_token_ids  # noqa: B018
