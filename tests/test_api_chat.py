"""BLIP-3 in a user's hands: a batch is each alone, a stream is the whole, and mistakes are one line."""

import io

import pytest
import torch
import torch.nn.functional as F

from openblip.api import ChatPipeline, load
from openblip.api_arguments import marked, placed
from openblip.config import UserError
from openblip.curate.capfilt import CapFilt
from openblip.data.rows import Row
from openblip.eval.benchmarks import captioning, retrieval, vqa
from openblip.hub import load_pretrained, save_pretrained
from openblip.models.int8 import Int8Linear
from openblip.models.packed import PackedLinear
from tests.tiny_chat import KINDS, config, said, save_kinds, unequal_pictures
from tests.tiny_models import save_blip3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_kinds(tmp_path_factory)


@pytest.fixture(scope="module")
def models(folders):
    return {name: load(folder, batch_size=3) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def images():
    return unequal_pictures()


def talks(images):
    """Unequal conversations with their images."""
    a, b, c, d = images
    return [
        (said("what is this?"), [b]),
        (said("<image> or <image>: which?", "the first", "and now <image>\nwhat?"), [a, c, d]),
        (said("hello"), []),
        (said("hello", "yes", "<image> this?"), [c]),
        ([{"role": "system", "content": "Be brief."}, *said("a" * 120)], a),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_unequal_conversations_is_each_alone(models, images, kind):
    model, given = models[kind], talks(images)
    assert isinstance(model, ChatPipeline)
    together = model.chat([talk for talk, _ in given], [shown for _, shown in given], max_new_tokens=12)
    assert together == [model.chat(talk, shown, max_new_tokens=12) for talk, shown in given]
    assert len(set(together)) > 3
    other = model.chat(given[0][0], images[2], max_new_tokens=12)
    assert other != together[0], "the picture has a say"


def test_a_stream_says_what_the_whole_says(models, images):
    model = models["plain"]
    for options in ({}, {"do_sample": True, "seed": 3}):
        options = {"max_new_tokens": 12, **options}
        pieces = list(model.chat_stream("what?", images[1], **options))
        assert "".join(pieces) == model.chat("what?", images[1], **options) and len(pieces) > 4
        talk = model.conversation()
        assert "".join(talk.stream("what?", images[1], **options)) == "".join(pieces)
        caption = model.caption(images[1], **options)
        assert "".join(model.caption_stream(images[1], **options)) == caption


def test_where_pictures_stand():
    one, two = said("<image>\nx"), said("<image>\n<image>\nx")
    for given in ("x", "x <image>", "<image>x", " <image>\nx "):
        assert placed(given, 1, "") == one == placed(said(given), 1, "")
    assert placed("x", 2, "") == two, "a text alone needs no markers"
    assert placed(said("a <image> b <image>"), 2, "") == said("a <image> b <image>")
    assert placed(said("a", "b", "see <image>?"), 1, "") == said("a", "b", "see <image>?"), (
        "where it was shown"
    )
    assert placed(said("a", "b", "c"), 1, "") == said("<image>\na", "b", "c")
    assert placed(said("a", "<image>", "c"), 1, "") == said("<image>\na", "<image>", "c")
    assert placed(said("a", "", "c"), 0, "") == said("a", "", "c"), "a model may have said nothing"
    system = {"role": "system", "content": "Be brief."}
    assert placed([system, *said("a")], 1, "") == [system, *said("<image>\na")]
    parts = [{"type": "image"}, {"type": "text", "text": "x"}]
    assert placed([{"role": "user", "content": parts}], 1, "") == one
    assert [marked("x", n, "") for n in (0, 1, 2)] == ["x", one[0]["content"], two[0]["content"]]


def test_pictures_come_in_every_form(models, images, tmp_path):
    model, options = models["plain"], {"max_new_tokens": 8}
    images[0].save(tmp_path / "a.png")
    file = io.BytesIO()
    images[1].save(file, "PNG")
    wanted = model.chat(said("<image> <image> x"), images[:2], **options)
    assert model.chat(said("<image> <image> x"), [tmp_path / "a.png", file.getvalue()], **options) == wanted
    parts = [
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "image", "image": images[1]},
        {"type": "text", "text": "x"},
    ]
    lines = model.chat(said("<image>\n<image>\nx"), images[:2], **options)
    assert (
        model.chat([{"role": "user", "content": parts}], **options)
        == lines
        == model.chat("x", images[:2], **options)
    )
    assert model.chat(["x", "y"], **options) == [model.chat("x", **options), model.chat("y", **options)]
    assert model.chat(["x", "y"], [images[0], None], **options)[0] == model.chat("x", images[0], **options)


def test_what_does_not_fit_is_said_with_by_how_much(models, images, tmp_path):
    model = models["plain"]
    tokens = len(model.reader.chat_prompt("x" * 100, [images[0]], "").tokens)
    room = 400 - tokens
    longest = model.chat("x" * 100, images[0], max_new_tokens=room, min_new_tokens=room)
    assert len(longest) > room // 2
    write = rf"and {room + 1} to write \(max_new_tokens\) are 1 more than the 400"
    too_much = rf"{tokens} tokens, 15 of them for 1 images, {write}"
    for call in (model.chat, model.chat_stream, model.conversation().stream):
        with pytest.raises(UserError, match=f"chat: {too_much}"):
            call("x" * 100, images[0], max_new_tokens=room + 1)
    # Where nothing is said, an answer may have a quarter of this context, and never silently less.
    filled = "x" * (400 - 100 + 1 - len(model.reader.chat_prompt("x", [images[0]], "").tokens))
    assert len(model.chat(filled, images[0], min_new_tokens=100)) > 50
    for call in (model.chat, model.conversation().say):
        with pytest.raises(UserError, match=r"and 100 to write .* are 1 more than the 400"):
            call(filled + "x", images[0])
    with pytest.raises(UserError, match=r"conversation 1: .*, and 100 to write .* are \d+ more than the 400"):
        model.chat(["x", "x" * 400])
    talk = model.conversation()
    talk.say("hi", max_new_tokens=4)
    before = list(talk.messages)
    for text, shown, line in (
        ("x" * 400, [], "more than the 400"),
        ("x", tmp_path / "none.png", "no file"),
        ("<image> x", [], "1 <image> markers for 0 images"),
        ("", [], "is empty"),
        ("<|im_end|>", [], "control token"),
    ):
        with pytest.raises(UserError, match=line):
            talk.stream(text, shown)
        assert talk.messages == before and talk.images == []
    assert isinstance(talk.say("go on", max_new_tokens=4), str)


def test_mistakes_are_said_at_once_and_by_name(models, images, tmp_path):
    model, image = models["plain"], images[0]
    (tmp_path / "broken.png").write_bytes(b"broken")
    robot = [{"role": "robot", "content": "hi"}]
    mistakes = [
        (lambda: model.chat([]), "chat: a list of messages is wanted"),
        (lambda: model.chat(robot), "chat: message 0 is by 'robot'"),
        (lambda: model.chat([said("x"), robot]), "conversation 1: message 0 is by 'robot'"),
        (lambda: model.chat(said("x", "y")), "the prompt ends with an answer"),
        (lambda: model.chat(said("x"), images[:2]), "0 <image> markers for 2 images"),
        (lambda: model.chat(said("<image> <image>"), image), "2 <image> markers for 1 images"),
        (lambda: model.chat(said("x <|im_start|>")), "control token"),
        (lambda: model.chat(["x", "y"], image), "2 conversations but one image"),
        (lambda: model.chat(["x", "y"], [image]), "2 conversations but images for 1"),
        (lambda: model.chat(["x", "y"], [image, tmp_path / "broken.png"]), "conversation 1: .*not_an_image"),
        (lambda: model.chat("x", image, beams=2), "beams.*num_beams"),
        (lambda: model.chat_stream("x", image, num_beams=2), "beam search cannot stream"),
        (lambda: model.chat_stream(["x", "y"]), "one conversation at a time"),
        (lambda: model.conversation().say("x", num_beams=2), "beam search cannot stream"),
        (lambda: model.answer(image, "x", prompt="y"), "has no {} where the question goes"),
        (lambda: model.answer(image, " "), "a question has no words"),
        (lambda: model.answer(image, "x", answers=["no", " "]), "has no words"),
        (lambda: model.answer(image, "x", answers=["y" * 400]), "more than the 400"),
        (lambda: model.match(image, "a dog"), "matching: this Blip3 model has no part for it"),
        (lambda: model.embed_images(image), "embedding: this Blip3"),
        (lambda: model.embed_texts("x"), "embedding: this Blip3"),
        (lambda: model.localize(image, "x"), "localisation: this Blip3"),
        (lambda: model.encoded([image]), "as many tiles as it needs"),
        (lambda: retrieval(model, [Row("a", [image], ["x"])]), "embedding: this Blip3"),
        (lambda: CapFilt(model, model), "filter: this model has no ITM head"),
    ]
    for call, line in mistakes:
        with pytest.raises(UserError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["plain", "conditioned", "base"])
def test_captions_and_answers(models, images, kind, monkeypatch):
    model, options = models[kind], {"max_new_tokens": 8}
    written = model.caption(images, **options)
    assert written == [model.caption(image, **options) for image in images] and len(set(written)) > 1
    asked = model.chat("Describe the image.", images[1], **options)
    assert (written[1] == asked) == (kind != "base"), "documents are not asked for"
    if kind != "base":
        monkeypatch.setitem(model.info, "prompt", "Say it.")
        assert model.caption(images[1], **options) == model.chat("Say it.", images[1], **options)
    questions = ["which?", "is it?", "what?", "a?"]
    answers = model.answer(images, questions, prompt="Q: {}", **options)
    assert answers == [model.chat(f"Q: {q}", image, **options) for q, image in zip(questions, images)]
    several = model.caption(images[:2], num_beams=3, num_return_sequences=2, **options)
    assert [len(texts) for texts in several] == [2, 2]
    alone = model.caption(images[1], num_beams=3, num_return_sequences=2, **options)
    assert alone == several[1]


def test_a_base_model_goes_on_with_the_document_it_would_have_read(models, images):
    model = models["base"]
    prompt = model.reader.document_prompt("a photo", [images[0]], "")
    first, words = model.model.image_token_id, model.reader.words
    assert prompt.tokens.ids == [*words.start_ids, *[first] * 15, *words.encode("a photo")]
    with torch.inference_mode():
        embeds, mask = model.reader.embedded([prompt])
        ids = model.model.generate(embeds, mask, config(8)).sequences[0]
    assert model.caption(images[0], "a photo", max_new_tokens=8) == model.reader.decode(ids.tolist())


@pytest.mark.parametrize("kind", ["plain", "conditioned"])
def test_ranking_picks_the_likeliest_answer(models, images, kind):
    model, questions = models[kind], ["which?", "is it a longer question?", "what?", "a?"]
    answers = ["red", "a dog", "q", "sky", "much longer", "7"]
    scores = []
    for question, image in zip(questions, images, strict=True):
        row = []
        for answer in answers:
            prompt = model.reader.chat_prompt(question, [image], "")
            tail = [*model.reader.words.encode(answer), model.reader.chat_format.end_id]
            with torch.inference_mode():
                head, _ = model.reader.embedded([prompt])
                embeds = torch.cat([head, model.model.lm.embed(torch.tensor([tail]))], dim=1)
                labels = torch.tensor([[-100] * head.shape[1] + tail])
                logits, wanted = model.model.labelled_logits(embeds, labels)
                row.append((-F.cross_entropy(logits, wanted, reduction="sum").item(), len(tail)))
        scores.append(row)
    by_sum = [answers[max(range(6), key=lambda i: row[i][0])] for row in scores]
    by_mean = [answers[max(range(6), key=lambda i: row[i][0] / row[i][1])] for row in scores]
    assert model.answer(images, questions, answers=answers) == by_sum
    assert model.answer(images, questions, answers=answers, length_penalty=1.0) == by_mean
    assert len({*by_sum, *by_mean}) > 1


def test_the_protocols_take_it(models, images):
    model = models["plain"]
    rows = [
        Row(f"{n}", [image], ["a red circle"], question="which?", answers=["red"])
        for n, image in enumerate(images)
    ]
    found = captioning(model, rows, max_new_tokens=6)
    options = {"min_new_tokens": 3, "max_new_tokens": 6}
    assert list(found["captions"].values()) == model.caption(images, **options)
    assert vqa(model, rows, max_new_tokens=4)["answers"] == model.answer(
        images, ["which?"] * 4, max_new_tokens=4
    )


def test_the_end_of_a_turn_ends_an_answer(models):
    """The template's end, which is another token than the language model's own."""
    reader = models["plain"].reader
    lm, end = models["plain"].model.lm, reader.chat_format.end_id
    assert reader.ends["eos_token_id"] == [lm.eos_token_ids[0], models["plain"].model.end_of_chunk_id, end]
    ids = reader.words.encode("ab")
    for stop in reader.ends["eos_token_id"]:
        assert reader.decode([*ids, stop, *ids]) == "ab"
    assert reader.answer_ids("ab") == [*ids, end]


@pytest.mark.parametrize("lora", [False, True])
def test_a_language_model_inside_or_named_comes_back(tmp_path, images, lora):
    for name, source in (("inside", None), ("named", tmp_path / f"lm{lora}")):
        folder = save_blip3(tmp_path / f"{name}{lora}", source=source, lora=lora)
        found = load_pretrained(folder)
        assert found.model.lm.config.source == (None if source is None else str(source))
        assert (folder / "lm_tokenizer").exists() == (source is None)
        model = load(folder)
        answer = model.chat("what?", images[1], max_new_tokens=12)
        again = tmp_path / f"again{name}{lora}"
        save_pretrained(
            found.model, again, transform=found.transform, info=found.info, lm_tokenizer=found.lm_tokenizer
        )
        second = load(again)
        assert second.chat("what?", images[1], max_new_tokens=12) == answer and second.info == model.info
        theirs = second.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in model.model.state_dict().items())
        card = (folder / "README.md").read_text()
        assert "model.conversation()" in card and ("LoRA" in card) == lora


def test_half_and_eight_bits(folders, models, images, tmp_path):
    half, eight = load(folders["plain"], dtype="bf16"), load(folders["plain"], dtype="int8")
    prompt = models["plain"].reader.chat_prompt("what?", [images[1]], "")

    def states(model):
        with torch.inference_mode():
            embeds, _ = model.reader.embedded([prompt])
            return model.model.lm.states_of(embeds).float()

    for model in (half, eight):
        assert {value.dtype for value in model.model.parameters()} == {torch.bfloat16}
        talk = model.conversation()
        assert talk.say("what?", images[1], max_new_tokens=4) == model.chat(
            "what?", images[1], max_new_tokens=4
        )
        assert model.answer(images[0], "what?", answers=["red", "no"]) in ("red", "no")
        exact, near = states(models["plain"]), states(model)
        assert 0 < (near - exact).norm() < 0.3 * exact.norm()
    layers = [type(module) for module in eight.model.lm.model.modules()]
    assert layers.count(Int8Linear) > 8 and layers.count(PackedLinear) == 1, "all but the last"
    assert not any(isinstance(module, Int8Linear) for module in eight.model.resampler.modules())
    with pytest.raises(UserError, match="adapters, which need floating point"):
        load(save_blip3(tmp_path / "lora", lora=True), dtype="int8")


def test_a_model_without_what_it_needs(folders, images, tmp_path):
    found = load_pretrained(folders["plain"])
    save_pretrained(found.model, tmp_path / "mute", transform=found.transform)
    with pytest.raises(UserError, match="without the tokenizer of its language model"):
        load(tmp_path / "mute")
    found.lm_tokenizer._tokenizer.chat_template = None
    save_pretrained(
        found.model, tmp_path / "plain", transform=found.transform, lm_tokenizer=found.lm_tokenizer,
        info={"stage": "blip3_pretrain"},
    )  # fmt: skip
    model = load(tmp_path / "plain")
    assert isinstance(model.caption(images[0], max_new_tokens=4), str)
    with pytest.raises(UserError, match="no chat template"):
        model.chat("x")
