"""The language model that sees: soft prompts, losses where labels are, captions, ranking, video, instructions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from openblip.config import ConfigError, UserError, from_dict, to_dict
from openblip.convert.huggingface import to_huggingface
from openblip.models.blip2 import Blip2Config
from openblip.models.blip2_llm import Blip2Llm, Blip2LlmConfig, without_stage1
from openblip.models.generation import GenerationConfig
from openblip.models.lm import LmConfig
from openblip.models.qformer import QFormerConfig
from openblip.models.vit import VisionConfig
from tests.models.tiny_lms import CONFIGS, VOCAB, tiny_lm

VISION = VisionConfig(
    image_size=8,
    patch_size=4,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
)


def tiny(lm="llama", instruct=False, queries=3):
    """A model in float64; the image reaches the language model loud and clear."""
    qformer = QFormerConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_query_tokens=queries,
        dec_token_id=39,
        cls_token_id=3,
        sep_token_id=4,
        text=instruct,
    )
    stage1 = Blip2Config(VISION, qformer, encoder=False, decoder=False)
    config = Blip2LlmConfig(LmConfig(dict(CONFIGS[lm])), stage1, qformer_text=instruct)
    model = Blip2Llm(config, tiny_lm(lm))
    with torch.no_grad():
        for module in (model.blip2, model.projection):
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def batch(rows=3, prompt=4):
    pixels = torch.randn(rows, 3, 8, 8, dtype=torch.float64)
    return pixels, torch.randint(5, VOCAB - 12, (rows, prompt))


def test_only_the_bridge_trains():
    model = tiny().train()
    trained = {
        ".".join(name.split(".")[:2]) for name, value in model.named_parameters() if value.requires_grad
    }
    assert trained == {"blip2.ln_vision", "blip2.qformer", "projection.weight", "projection.bias"}
    assert not any(module.training for module in [*model.vision.modules(), *model.lm.model.modules()])
    pixels, ids = batch()
    labels = ids.masked_fill(torch.arange(4) < 2, -100)
    logits, wanted = model.labelled_logits(model.soft_prompt(model.encode_image(pixels)), ids, None, labels)
    F.cross_entropy(logits, wanted).backward()
    without = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []
    assert model.blip2.qformer.query_tokens.grad.abs().sum() > 0
    assert all(value.grad is None for value in [*model.vision.parameters(), *model.lm.parameters()])


@pytest.mark.parametrize("lm", ["llama", "opt", "t5", "bart"])
def test_loss_is_that_of_transformers_over_the_same_labels(lm):
    model = tiny(lm)
    pixels, ids = batch()
    soft = model.soft_prompt(model.encode_image(pixels))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    whole = torch.cat([torch.ones(3, 3, dtype=torch.long), mask], dim=1)
    embeds = torch.cat([soft, model.lm.embed(ids)], dim=1)
    if model.lm.is_encoder_decoder:
        labels = torch.randint(5, VOCAB, (3, 5)).masked_fill(torch.arange(5) > 3, -100)
        given = labels
    else:
        labels = ids.masked_fill((mask == 0) | (torch.arange(4) < torch.tensor([[1], [0], [1]])), -100)
        given = torch.cat([torch.full((3, 3), -100), labels], dim=1)  # of queries, too
    theirs = model.lm.model(inputs_embeds=embeds, attention_mask=whole, labels=given).loss
    logits, wanted = model.labelled_logits(soft, ids, mask, labels)
    assert len(logits) == int((labels != -100).sum())
    ours = F.cross_entropy(logits, wanted)
    assert abs(ours.item() - theirs.item()) < 1e-6  # some of theirs are made in float32


@pytest.mark.parametrize("lm", ["llama", "opt", "gpt_neox", "gemma2", "phi3"])
def test_texts_that_share_a_picture_learn_as_each_alone(lm, monkeypatch):
    """Same losses, same gradients; the soft prompt is run once."""
    model = tiny(lm)
    pixels, _ = batch()
    ids = torch.randint(5, VOCAB - 12, (12, 6))
    ends = torch.tensor([6, 1, 3, 2, 5, 4, 6, 2, 1, 3, 3, 1])
    labels = ids.masked_fill(torch.arange(6) >= ends[:, None], -100)
    labels[3:5, 0] = -100  # a prompt, of which nothing is asked

    def learn(shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        soft = model.soft_prompt(model.encode_image(pixels))
        soft = soft if shared else soft.repeat_interleave(4, dim=0)
        logits, wanted = model.labelled_logits(soft, ids, None, labels)
        assert torch.equal(wanted, labels[labels != -100])
        F.cross_entropy(logits, wanted).backward()
        return logits.detach(), model.blip2.qformer.query_tokens.grad.clone()

    seen = []
    run = model.lm.model.base_model.forward
    alone = learn(shared=False)
    monkeypatch.setattr(
        model.lm.model.base_model,
        "forward",
        lambda *args, **given: seen.append(given["inputs_embeds"].shape[:2].numel()) or run(*args, **given),
    )
    together = learn(shared=True)
    tolerance = 1e-12 if lm in ("opt", "gpt_neox") else 1e-5  # RMSNorm computes in float32
    for found, wanted in zip(together, alone):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    assert alone[1].abs().max() > 1e-2
    assert seen == [3 * 3, 3 * 2, 3 * 3, 3 * 5], "texts in four groups by length, of which one needs no pass"


def test_texts_cannot_share_a_picture_everywhere():
    labels = torch.randint(5, 20, (6, 4))
    model = tiny("t5")
    with pytest.raises(ConfigError, match="not for an encoder-decoder"):
        model.labelled_logits(torch.zeros(3, 3, model.lm.hidden_size).double(), labels, None, labels)


@pytest.mark.parametrize("lm", ["llama", "t5"])
def test_a_caption_depends_on_its_image_and_prompt_and_not_on_its_batch(lm):
    model = tiny(lm)
    pixels, ids = batch()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    soft = model.soft_prompt(model.encode_image(pixels))
    config = GenerationConfig(num_beams=3, max_new_tokens=6, min_new_tokens=6)
    together = model.generate(soft, ids, mask, config).sequences
    for row in range(3):
        one = model.soft_prompt(model.encode_image(pixels[row : row + 1]))
        alone = model.generate(one, ids[row : row + 1, mask[row].bool()], None, config).sequences
        assert torch.equal(together[row], alone[0])
    assert not torch.equal(together, model.generate(soft.flip(0), ids, mask, config).sequences)
    assert not torch.equal(together, model.generate(soft, ids.flip(1), mask, config).sequences)


def test_an_empty_prompt_and_a_stream():
    model = tiny()
    pixels, _ = batch(2)
    soft = model.soft_prompt(model.encode_image(pixels))
    nothing = torch.empty(2, 0, dtype=torch.long)
    config = GenerationConfig(max_new_tokens=5, do_sample=True, seed=4)
    whole = model.generate(soft, nothing, None, config).sequences
    assert torch.equal(torch.stack(list(model.stream(soft, nothing, None, config)), dim=1), whole)


@pytest.mark.parametrize("lm", ["llama", "opt", "t5", "bart"])
@pytest.mark.parametrize("chunk", [2, 16])
def test_ranking_is_the_loss_of_each_answer(lm, chunk):
    model = tiny(lm)
    pixels, ids = batch(2)
    prompt_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    soft = model.soft_prompt(model.encode_image(pixels))
    lengths = [3, 1, 4]
    answers = torch.randint(5, VOCAB, (3, 4))
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    found = model.rank(soft, ids, answers, mask, prompt_mask=prompt_mask, chunk=chunk)
    mean = model.rank(soft, ids, answers, mask, prompt_mask=prompt_mask, chunk=chunk, length_penalty=1.0)
    for row in range(2):
        kept = ids[row : row + 1, prompt_mask[row].bool()]
        for number, length in enumerate(lengths):
            text = answers[number : number + 1, :length]
            if model.lm.is_encoder_decoder:
                args = (soft[row : row + 1], kept, None, text)
            else:
                labels = torch.cat([torch.full_like(kept, -100), text], dim=1)
                args = (soft[row : row + 1], torch.cat([kept, text], dim=1), None, labels)
            wanted = -F.cross_entropy(*model.labelled_logits(*args), reduction="sum")
            torch.testing.assert_close(found[row, number], wanted, rtol=0, atol=1e-9)
            torch.testing.assert_close(mean[row, number], wanted / length, rtol=0, atol=1e-9)


def test_candidates_of_their_own_for_each_image():
    model = tiny()
    pixels, ids = batch(2)
    soft = model.soft_prompt(model.encode_image(pixels))
    answers = torch.randint(5, VOCAB, (2, 3, 4))
    ours = model.rank(soft, ids, answers, torch.ones_like(answers))
    for row in range(2):
        one = slice(row, row + 1)
        alone = model.rank(soft[one], ids[one], answers[row], torch.ones_like(answers[row]))
        torch.testing.assert_close(ours[one], alone, rtol=0, atol=1e-9)


def test_gradient_checkpointing_changes_nothing_and_runs_the_language_model_again():
    model, (pixels, ids) = tiny().train(), batch(2)
    runs, found = [], []
    layer = model.lm.model.base_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout
        soft = model.soft_prompt(model.encode_image(pixels))
        model.labelled_logits(soft, ids, torch.ones_like(ids), ids)[0].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert found[0].abs().max() > 0 and len(runs) == 3, "once, then once more in the backward pass"


def test_queries_may_have_projections_of_their_own():
    plain = tiny()
    model = Blip2Llm(replace(plain.config, query_projections=True), plain.lm).double().eval()
    model.blip2 = plain.blip2
    pixels, ids = batch(2)
    embeds = model.encode_image(pixels)
    soft = model.soft_prompt(embeds)
    states = model.blip2.qformer.encode_queries(model.blip2.memory(embeds))
    for query, (weight, bias) in enumerate(zip(model.projection.weight, model.projection.bias, strict=True)):
        torch.testing.assert_close(soft[:, query], states[:, query] @ weight + bias, rtol=0, atol=1e-12)
    assert (soft[:, 0] - soft[:, 1]).abs().max() > 0.05, "apart from the start"
    frames = torch.stack([embeds, embeds.flip(0)], dim=1)  # each frame's queries have their maps again
    both = model.soft_prompt(frames)
    torch.testing.assert_close(both, torch.cat([soft, soft.flip(0)], dim=1), rtol=0, atol=1e-12)
    model.labelled_logits(soft, ids, torch.ones_like(ids), ids)[0].sum().backward()
    assert all(weight.abs().max() > 0 for weight in model.projection.weight.grad)
    assert without_stage1(model).projection.weight.equal(model.projection.weight)
    assert from_dict(Blip2LlmConfig, to_dict(model.config), "here") == model.config
    with pytest.raises(UserError, match="one projection for all queries"):
        to_huggingface(model)


def test_a_first_token_stands_before_the_soft_prompt_and_is_read():
    plain = tiny()
    model = Blip2Llm(replace(plain.config, first_token_id=5), plain.lm).double().eval()
    model.blip2, model.projection = plain.blip2, plain.projection
    pixels, ids = batch(2)
    embeds = model.encode_image(pixels)
    soft, alone = model.soft_prompt(embeds), plain.soft_prompt(embeds)
    assert soft.shape == (2, 4, 16) and torch.equal(soft[:, 1:], alone)
    assert torch.equal(soft[:, 0], model.lm.embed(torch.tensor([5, 5])))
    mask = torch.ones_like(ids)
    found = model.labelled_logits(soft, ids, mask, ids)[0]
    with torch.no_grad():  # as transformers reads the same embeddings in a row
        row = torch.cat([soft, model.lm.embed(ids)], dim=1)
        wanted = plain.lm.model(inputs_embeds=row).logits[:, 3:-1].flatten(0, 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert (found - plain.labelled_logits(alone, ids, mask, ids)[0]).abs().max() > 1e-3
    assert from_dict(Blip2LlmConfig, to_dict(model.config), "here") == model.config
    with pytest.raises(ConfigError, match=f"first_token_id {VOCAB}: the language model has {VOCAB}"):
        Blip2Llm(replace(plain.config, first_token_id=VOCAB), plain.lm)
    with pytest.raises(UserError, match="no token before the soft prompt"):
        to_huggingface(model)


def test_instructions_change_what_the_queries_see():
    model = tiny(instruct=True)
    pixels, _ = batch(2)
    embeds = model.encode_image(pixels)
    words = torch.tensor([[3, 9, 10, 4], [3, 9, 4, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    soft = model.soft_prompt(embeds, words, mask)
    assert soft.shape == (2, 3, 16)
    alone = model.soft_prompt(embeds[1:], words[1:, :3], mask[1:, :3])
    torch.testing.assert_close(soft[1:], alone, rtol=0, atol=1e-10)
    other = model.soft_prompt(embeds, words.masked_fill(words == 9, 11), mask)
    assert (soft - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="wants instruction ids"):
        model.soft_prompt(embeds)
    with pytest.raises(ValueError, match="takes no instruction ids"):
        tiny().soft_prompt(embeds, words, mask)
    with pytest.raises(ConfigError, match="text part"):
        Blip2LlmConfig(LmConfig(dict(CONFIGS["llama"])), qformer_text=True)


@pytest.mark.parametrize("instruct", [False, True])
def test_a_video_is_its_frames_in_a_row(instruct):
    model = tiny(instruct=instruct)
    video = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    words = (torch.tensor([[3, 9, 4], [3, 10, 4]]), None) if instruct else (None, None)
    soft = model.soft_prompt(model.encode_image(video), *words)
    assert soft.shape == (2, 12, 16)
    for frame in range(4):
        one = model.soft_prompt(model.encode_image(video[:, frame]), *words)
        torch.testing.assert_close(soft[:, 3 * frame : 3 * frame + 3], one, rtol=0, atol=1e-10)


def test_a_prompt_that_does_not_fit_is_refused_by_how_much():
    model = tiny()
    soft = torch.zeros(1, 3, 16, dtype=torch.float64)
    with pytest.raises(UserError, match="72 positions, 8 more than the 64"):
        model.generate(soft, torch.zeros(1, 60, dtype=torch.long), None, GenerationConfig(max_new_tokens=9))


def test_the_config_survives_json():
    config = tiny(instruct=True).config
    assert from_dict(Blip2LlmConfig, to_dict(config), "here") == config


def test_parameters_of_the_paper():
    """107.13M trained with OPT-2.7B, 108.31M with Flan-T5-XXL: Q-Former, ln_vision and projection."""
    from openblip.models.qformer import QFormer

    with torch.device("meta"):
        bridge = [
            *QFormer(QFormerConfig(text=False), 1408).parameters(),
            *torch.nn.LayerNorm(1408).parameters(),
        ]
        for hidden, millions in ((2560, 107.13), (4096, 108.31)):
            trained = [*bridge, *torch.nn.Linear(768, hidden).parameters()]
            assert round(sum(value.numel() for value in trained) / 1e6, 2) == millions
