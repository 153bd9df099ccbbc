"""Stage 2 and InstructBLIP in a user's hands: the same calls as BLIP's, and a language model that answers."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openblip import cli
from openblip.api import LlmPipeline, load
from openblip.api_llm import QUESTION, quantise_
from openblip.config import UserError
from openblip.curate.capfilt import CapFilt
from openblip.data.prompts import LmTokenizer
from openblip.data.rows import Row
from openblip.data.text import bert_uncased
from openblip.eval.benchmarks import captioning, retrieval, vqa
from openblip.hub import load_pretrained, save_pretrained
from openblip.models.adapters import LoraSettings
from openblip.models.int8 import Int8Linear
from openblip.models.packed import PackedLinear
from openblip.search.scan import scan
from tests.data.test_prompts import byte_level
from tests.models.tiny_lms import tiny_lm
from tests.tiny_models import drawing, picture_folder, question_folder, save_blip, save_blip2_llm

QUESTIONS = ["which colour is it?", "is it a dog?", "what?"]
TEXTS = ["a red circle", "two dogs in the snow", "something else entirely"]
KINDS = {
    "llama": {"lm": "llama"},
    "opt": {"lm": "opt", "heads": False},
    "t5": {"lm": "t5", "heads": False},
    "instruct": {"lm": "llama", "instruct": True, "heads": False},
    "instruct_t5": {"lm": "t5", "instruct": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save_blip2_llm(root / name, **options) for name, options in KINDS.items()}


@pytest.fixture(scope="module")
def models(folders):
    return {name: load(folder, batch_size=2) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def images():
    return [drawing(number) for number in (0, 9, 18)]


@pytest.fixture
def given(monkeypatch):
    """What a method of a model is called with: [(positional, named), ...]."""

    def watch(model, name):
        calls, method = [], getattr(model, name)

        def call(*positional, **named):
            calls.append((positional, named))
            return method(*positional, **named)

        monkeypatch.setattr(model, name, call)
        return calls

    return watch


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_gets_its_own_whatever_its_batch(models, images, kind):
    model = models[kind]
    assert isinstance(model, LlmPipeline)
    together = model.caption(images, max_new_tokens=6)
    assert together == [model.caption(image, max_new_tokens=6) for image in images]
    said = model.answer(images, QUESTIONS)
    assert said == [model.answer(*pair) for pair in zip(images, QUESTIONS, strict=True)]
    assert len({*said, *together}) > 2, "image and question have a say"
    assert model.answer(images, "what?")[2] == said[2]
    assert model.answer(images[:1] * 3, QUESTIONS)[2] == model.answer(images[0], "what?")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_says_what_the_greedy_caption_says(models, images, kind):
    for options in ({}, {"do_sample": True, "seed": 3}):
        pieces = list(models[kind].caption_stream(images[1], max_new_tokens=12, **options))
        greedy = {"num_beams": 1, **options}
        assert "".join(pieces) == models[kind].caption(images[1], max_new_tokens=12, **greedy)


def test_a_stream_waits_for_the_rest_of_a_letter(models, images, monkeypatch):
    model = models["llama"]
    ids = model.lm_tokenizer.encode("a café, 🐕 now")
    columns = [torch.tensor([number]) for number in [*ids, model.lm_tokenizer.end_id]]
    monkeypatch.setattr(model.model, "stream", lambda *args, **options: iter(columns))
    pieces = list(model.caption_stream(images[0]))
    assert "".join(pieces) == "a café, 🐕 now" and "\ufffd" not in "".join(pieces) and len(pieces) > 9


def test_prompts_are_the_models_own_or_the_callers(models, images, monkeypatch, given):
    model = models["llama"]
    calls = given(model.model, "generate")
    monkeypatch.setitem(model.info, "prompt", "a photo of ")
    for prompt, told in ((None, "a photo of"), ("I see", "I see"), ("", "")):
        model.caption(images[:1], prompt, max_new_tokens=2)
        assert model.lm_tokenizer.decode(calls[-1][0][1][0]) == told


def test_the_papers_settings_hold_until_others_are_given(models, images, given):
    model = models["llama"]
    calls = given(model.model, "generate")

    def settings(*names):
        return [getattr(calls[-1][0][3], name) for name in names]

    model.caption(images[0])
    assert settings("num_beams", "max_new_tokens", "length_penalty") == [5, 30, 1]
    model.answer(images[0], "what?")
    assert settings("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty") == [5, 10, 1, -1]
    model.answer(images[0], "what?", do_sample=True, top_p=0.5, seed=1)
    assert settings("num_beams", "top_p") == [1, 0.5]
    model.caption(images[0], num_beams=2, max_new_tokens=3)
    assert settings("num_beams", "max_new_tokens") == [2, 3]
    with pytest.raises(UserError, match=r"unknown.* .beams..*num_beams"):
        model.answer(images[0], "what?", beams=2)


def likelihood(pipeline, image, question, answer):
    """(summed log P of the answer and its end, number of tokens), by teacher forcing of this one pair."""
    model, words = pipeline.model, pipeline.lm_tokenizer
    prompt = QUESTION.replace("{}", question)
    embeds, _ = next(pipeline.encoded([image]))
    read = pipeline.tokenizer([prompt]) if model.config.qformer_text else None
    soft = model.soft_prompt(embeds, *([read["input_ids"], read["attention_mask"]] if read else []))
    batch = words.training([prompt], [answer])
    with torch.no_grad():
        logits, labels = model.labelled_logits(
            soft, batch["input_ids"], batch["attention_mask"], batch["labels"]
        )
    return -F.cross_entropy(logits, labels, reduction="sum").item(), len(labels)


@pytest.mark.parametrize("kind", ["llama", "t5", "instruct", "instruct_t5"])
def test_ranking_picks_what_the_summed_log_likelihood_says(models, images, kind):
    model, answers = models[kind], ["red", "a dog", "q", "sky", "much longer", "7", "two", "tree"]
    score = [
        [likelihood(model, image, question, answer) for answer in answers]
        for image, question in zip(images, QUESTIONS, strict=True)
    ]
    by_sum = [answers[int(np.argmax([total for total, _ in row]))] for row in score]
    by_mean = [answers[int(np.argmax([total / count for total, count in row]))] for row in score]
    assert model.answer(images, QUESTIONS, answers=answers) == by_sum
    assert model.answer(images, QUESTIONS, answers=answers, length_penalty=1.0) == by_mean
    assert model.answer(images[1], QUESTIONS[1], answers=answers) == by_sum[1]
    assert len({*by_sum, *by_mean}) > 1


@pytest.mark.parametrize("kind", ["llama", "instruct"])
def test_multiple_choice_ranks_each_images_own_choices(models, images, given, kind):
    model = models[kind]
    shown = given(model, "_shown")
    sets = [["a red box", "a cat"], ["one", "two", "no"], ["a red box", "a cat"]]
    chosen = model.choose(images, QUESTIONS, sets)
    assert shown[1][0][1] == [f"Question: {QUESTIONS[1]} Options: (a) one, (b) two, (c) no. Short answer:"]
    for image, question, those, answer in zip(images, QUESTIONS, sets, chosen, strict=True):
        told = ", ".join(f"({letter}) {text}" for letter, text in zip("abc", those))
        prompt = f"Question: {{}} Options: {told}. Short answer:"
        assert answer == model.answer(image, question, answers=those, prompt=prompt)
    assert model.choose(images[0], QUESTIONS[0], sets[0]) == chosen[0]
    with pytest.raises(UserError, match="choose: give choices"):
        model.choose(images, QUESTIONS, [["a"], []])
    with pytest.raises(UserError, match="twice"):
        model.choose(images[0], QUESTIONS[0], ["a"], prompt="{}")


def test_the_question_reaches_both_readers(models, images, given):
    model, words = models["instruct"], bert_uncased()
    shown, told = given(model.model, "soft_prompt"), given(model.model, "generate")
    model.answer(images[0], "is it red?", prompt="Tell: {}", max_new_tokens=2)
    ids, mask = shown[-1][0][1:]
    assert words.decode(ids[0], skip_special=False) == "[CLS] tell : is it red? [SEP]"
    assert mask.all() and model.lm_tokenizer.decode(told[-1][0][1][0]) == "Tell: is it red?"
    model.caption(images[0], "say it", max_new_tokens=2)
    assert words.decode(shown[-1][0][1][0]) == "say it"
    vectors = [model.model.soft_prompt(*call[0]) for call in shown[:2]]
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    plain = given(models["llama"].model, "soft_prompt")
    models["llama"].answer(images[0], "is it red?", max_new_tokens=2)
    assert len(plain[-1][0]) == 1, "the Q-Former of BLIP-2 reads nothing"


def test_the_qformer_reads_the_end_of_a_long_question_and_no_padding(models, given):
    model, embeds = models["instruct"], torch.randn(2, 5, 16)
    shown = given(model.model, "soft_prompt")
    long = " ".join(str(number) for number in range(200))
    together, ids, _ = model._shown(embeds, [long, "what?"])
    assert ids.shape[1] == len(long), "the language model is told all of it"
    read, mask = shown[-1][0][1:]
    assert read.shape == (2, 128) and read[0, 0] == 101 and read[0, -1] == 102
    assert bert_uncased().decode(read[0]).split()[-1] == "199" and mask.sum(dim=1).tolist() == [128, 4]
    alone, _, _ = model._shown(embeds[1:], ["what?"])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)


def test_a_chat_follows_the_template(models, images, given):
    model = models["instruct"]
    shown, told = given(model.model, "soft_prompt"), given(model.model, "generate")
    first = [{"role": "user", "content": "What is it?"}]
    more = [*first, {"role": "assistant", "content": "A dog."}, {"role": "user", "content": "Sure?"}]
    together = model.chat(images[:2], [first, more], max_new_tokens=4)
    ids, mask = told[-1][0][1:3]
    texts = [
        model.lm_tokenizer._backend.decode(row[keep.bool()].tolist(), False) for row, keep in zip(ids, mask)
    ]
    assert texts[0] == "<|user|>What is it?</s><|bot|>"
    assert texts[1] == "<|user|>What is it?</s><|assistant|>A dog.</s><|user|>Sure?</s><|bot|>"
    assert bert_uncased().decode(shown[-1][0][1][1]) == "sure?"
    assert told[-1][0][3].repetition_penalty == 1.5
    assert model.chat(images[0], first, max_new_tokens=4) == together[0]
    assert model.chat(images[:2], first, max_new_tokens=4)[0] == together[0]


def test_what_is_no_conversation_is_said(models, images):
    model, image = models["llama"], images[0]
    user = {"role": "user", "content": "hi"}
    mistakes = [
        (model, [], "last message .* must be the user's"),
        (model, [user, {"role": "assistant", "content": "hi"}], "last message .* must be the user's"),
        (model, [{"role": "robot", "content": "hi"}], "a message is .*not .*robot"),
        (model, [{"role": "user"}], "a message is"),
        (model, "hi", "1 images but 2 conversations"),
        (model, [[user], [user]], "1 images but 2 conversations"),
        (model, [{"role": "user", "content": "a </s> b"}], "control token"),
        (model, [{"role": "user", "content": "x" * 200}], "more than the 160"),
        (models["t5"], [user], "no chat template"),
    ]
    for pipeline, messages, line in mistakes:
        with pytest.raises(UserError, match=line):
            pipeline.chat(image, messages)


def test_a_template_that_refuses_is_one_line(models, images, monkeypatch):
    words = LmTokenizer(byte_level(chat="{{ raise_exception('system first') }}"))
    monkeypatch.setattr(models["llama"], "lm_tokenizer", words)
    with pytest.raises(UserError, match="chat template does not take these messages: system first"):
        models["llama"].chat(images[0], [{"role": "user", "content": "hi"}])


def test_the_heads_of_stage_1_go_on_matching(folders, models, images, tmp_path):
    found = load_pretrained(folders["llama"])
    save_pretrained(found.model.blip2, tmp_path, tokenizer=found.tokenizer, transform=found.transform)
    stage1, model = load(tmp_path, batch_size=2), models["llama"]
    assert np.array_equal(model.embed_images(images), stage1.embed_images(images))
    assert np.array_equal(model.embed_texts(TEXTS), stage1.embed_texts(TEXTS))
    cosine = model.similarity(model.embed_images(images), model.embed_texts(TEXTS))
    assert np.allclose(model.match(images, [TEXTS] * 3).cosine, cosine, atol=1e-5)
    theirs = stage1.match(images, [TEXTS] * 3).probability
    assert np.array_equal(model.match(images, [TEXTS] * 3).probability, theirs) and theirs.std() > 1e-3
    assert model.embed_images([]).shape == (0, 3, 8) and model.can_match and model.can_caption


def test_what_it_cannot_do_is_said(folders, models, images):
    bare, whole, image = models["opt"], models["llama"], images[0]
    mistakes = [
        (lambda: bare.match(image, "a dog"), "matching: this model was saved without the heads of stage 1"),
        (lambda: bare.embed_images(image), "embedding: this model was saved without the heads"),
        (lambda: bare.embed_texts("a dog"), "embedding: this model was saved without the heads"),
        (lambda: bare.localize(image, "a dog"), "localisation: this Blip2Llm model has no part for it"),
        (lambda: whole.localize(image, "a dog"), "localisation: this Blip2Llm model has no part for it"),
        (lambda: whole.caption(image, "x" * 150), "183 positions, 23 more than the 160"),
        (lambda: whole.answer(image, "x" * 200, answers=["no"]), "more than the 160"),
        (lambda: list(whole.caption_stream(image, "x" * 200)), "more than the 160"),
        (lambda: whole.answer(image, "what?", prompt="Say:"), "has no {} where the question goes"),
        (lambda: whole.answer(image, "  "), "a question has no words"),
        (lambda: whole.answer(image, "what?", answers=[]), "`answers` is an empty list"),
        (lambda: whole.answer(image, "what?", answers=["no", " "]), "has no words"),
        (lambda: whole.answer(images, ["what?"]), "3 images but 1 questions"),
        (lambda: list(whole.caption_stream(image, num_beams=2)), "beam search cannot stream"),
        (lambda: load(folders["llama"], dtype="int4"), '"fp32", "bf16" or "int8", not'),
    ]
    for call, line in mistakes:
        with pytest.raises(UserError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_half_and_eight_bits(folders, models, images, kind):
    half, eight = load(folders[kind], dtype="bf16"), load(folders[kind], dtype="int8")
    for model in (half, eight):
        assert {value.dtype for value in model.model.parameters()} == {torch.bfloat16}
        assert isinstance(model.caption(images[0], max_new_tokens=4), str)
        assert model.answer(images[0], "what?", answers=["red", "no"]) in ("red", "no")
    kinds = [type(module) for module in eight.model.lm.modules()]
    assert kinds.count(Int8Linear) > 8 and kinds.count(PackedLinear) == 1, "all but the last"
    assert not any(isinstance(module, Int8Linear) for module in eight.model.blip2.modules())
    exact, near, nearer = (_prefix_states(model, images[0]) for model in (models[kind], eight, half))
    assert 0 < (nearer - exact).norm() < 0.2 * exact.norm() and 0 < (near - exact).norm() < 0.2 * exact.norm()
    assert not torch.equal(near, nearer)


def _prefix_states(pipeline, image):
    embeds, _ = next(pipeline.encoded([image]))
    soft, ids, mask = pipeline._shown(embeds, ["a dog"])
    with torch.inference_mode():
        return pipeline.model.lm_states(soft, ids, mask, ids).float()


def test_rotary_frequencies_stay_exact_in_half_precision(folders, models):
    half = load(folders["llama"], dtype="bf16")
    ours = dict(half.model.lm.named_buffers())
    assert ours and all(
        torch.equal(value, ours[name]) for name, value in models["llama"].model.lm.named_buffers()
    )


def test_eight_bits_are_for_frozen_language_models(tmp_path):
    with pytest.raises(UserError, match=r"int8.* is for language models; this model takes fp32 or bf16"):
        load(save_blip(tmp_path), dtype="int8")
    with pytest.raises(UserError, match="adapters"):
        quantise_(tiny_lm("llama", lora=LoraSettings(rank=2)))


@pytest.mark.parametrize("kind", ["opt", "instruct_t5"])
def test_a_saved_folder_is_the_model_again(folders, models, images, tmp_path, kind):
    found = load_pretrained(folders[kind])
    assert (found.tokenizer is None) == (kind == "opt")
    options = {"tokenizer": found.tokenizer, "transform": found.transform, "lm_tokenizer": found.lm_tokenizer}
    save_pretrained(found.model, tmp_path / "again", info={"prompt": "a"}, **options)
    again = load(tmp_path / "again")
    assert again.caption(images, max_new_tokens=5) == models[kind].caption(images, "a", max_new_tokens=5)
    del options["lm_tokenizer"]
    save_pretrained(found.model, tmp_path / "mute", **options)
    with pytest.raises(UserError, match="without the tokenizer of its language model"):
        load(tmp_path / "mute")


def test_a_named_language_model_comes_back_as_it_was_told(folders, tmp_path):
    from openblip.convert.lm import load_lm

    found = load_pretrained(folders["llama"])
    found.model.lm.model.save_pretrained(tmp_path / "lm")
    found.lm_tokenizer.save(tmp_path / "lm")
    found.model.lm = load_lm(str(tmp_path / "lm"), changes={"eos_token_id": 77, "rms_norm_eps": 0.5})
    found.model.lm.config.family = found.model.config.lm.family = "vicuna"
    found.model.config.lm = found.model.lm.config
    save_pretrained(found.model, tmp_path / "m", tokenizer=found.tokenizer, transform=found.transform)
    again = load_pretrained(tmp_path / "m")
    assert again.model.lm.eos_token_ids == [77]
    assert again.model.lm.model.model.norm.variance_epsilon == 0.5
    assert again.lm_tokenizer.quirks.rewrite == {0: 2} and again.model.config.lm.family == "vicuna"
    assert "/lm (sha256" in (tmp_path / "m" / "README.md").read_text()


@pytest.fixture(scope="module")
def rows(images, tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        asked = {"question": QUESTIONS[number], "answers": ["red"] * 10}
        found.append(
            Row(str(number), [str(folder / f"{number}.png")], [TEXTS[number]], where="here", **asked)
        )
    return found


def test_protocols_take_it(models, rows, given):
    model, pictures = models["llama"], [row.image for row in rows]
    found = retrieval(model, rows, k=2)
    assert found.keys() >= {"itc", "itm"} and found["images"] == 3
    with pytest.raises(UserError, match="without the heads"):
        retrieval(models["opt"], rows)
    calls = given(model.model, "generate")

    def cached(block):
        return torch.cat([embeds for embeds, _ in model.encoded([row.image for row in block])])

    told = captioning(model, rows, prompt="a", embeds=cached, max_new_tokens=4)
    assert list(told["captions"].values()) == model.caption(pictures, "a", max_new_tokens=4)
    assert calls[0][0][3].num_beams == 5 and calls[0][0][3].min_new_tokens == 1
    said = vqa(model, rows, prompt="{} It is", max_new_tokens=4)
    assert said["answers"] == model.answer(pictures, QUESTIONS, prompt="{} It is", max_new_tokens=4)


class Rows(list):
    """Rows as a source gives them."""

    def rows(self, bad):
        return iter(self)

    def light(self, index):
        return self[index]


def test_search_and_capfilt_take_it(models, rows):
    model = models["llama"]
    found = scan(model, Rows(rows), TEXTS[0], top=3, rerank=3)
    looked = model.match([row.image for row in rows], TEXTS[0])
    scores = torch.logit(torch.from_numpy(looked.probability), eps=1e-6).numpy()
    scores += looked.cosine / model.matcher.temperature.item()
    assert [int(one["id"]) for one in found] == np.argsort(-scores, kind="stable").tolist()
    assert all(one["score"] >= other["score"] for one, other in pairwise(found))
    job = CapFilt(model, model)
    texts = job(rows, job.embed(rows, [drawing(number) for number in (0, 9, 18)]))
    assert {text.kind for text in texts} == {"web", "synthetic"}
    with pytest.raises(UserError, match="filter: this model has no ITM head"):
        CapFilt(model, models["opt"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return picture_folder(root / "pictures", 4), question_folder(root / "asked", 2)


def test_the_command_line_takes_it(folders, models, data, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pictures, asked = data
    one, model = pictures / "images/00.png", ("--model", str(folders["llama"]))

    def answer(*words):
        capsys.readouterr()
        cli.main([*map(str, words), "--json"])
        return json.loads(capsys.readouterr().out)

    said = answer("caption", one, *model, "--max-new-tokens", 4)
    assert said == {str(one): models["llama"].caption(one, max_new_tokens=4)}
    assert [hit["text"] for hit in answer("match", one, "a dog", "a cat", *model)] == ["a dog", "a cat"]
    told = answer("vqa", one, "which?", *model, "--prompt", "{} Say")
    assert told["answer"] == models["llama"].answer(one, "which?", prompt="{} Say")
    chosen = answer("vqa", one, "which?", *model, "--answers", "red", "no")
    assert chosen["answer"] == models["llama"].answer(one, "which?", answers=["red", "no"])
    assert len(answer("search", "a dog", "--data", pictures, *model, "--top", 2)) == 2
    figures = answer(
        "eval", "caption", "--data", pictures, *model, "--prompt", "a", "--out", tmp_path / "f.json"
    )
    assert len(figures["captions"]) == 4
    record = json.loads((tmp_path / "f.json").read_text())
    assert record["num_beams"] == 5 and record["prompt"] == "a"
    assert {"itc", "itm"} <= answer("eval", "retrieval", "--data", pictures, *model).keys()
    assert len(answer("eval", "vqa", "--data", asked, *model)["answers"]) == 2
    assert answer("info", folders["llama"])["model"] == "Blip2Llm"
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(["caption", str(one), *model, "--prompt", "x" * 200])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and "more than the 160" in line
