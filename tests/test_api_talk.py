"""A talk with a BLIP-3 is its conversation read anew, turn by turn, and its last turn can be taken back."""

import pytest
import torch

from openblip.api import load
from openblip.api_arguments import marked
from openblip.config import UserError
from tests.tiny_chat import KINDS, config, said, save_kinds, unequal_pictures
from tests.tiny_models import drawing


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_kinds(tmp_path_factory)


@pytest.fixture(scope="module")
def models(folders):
    return {name: load(folder, batch_size=3) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def images():
    return unequal_pictures()


@pytest.fixture
def ran(monkeypatch):
    """How many tokens a language model was run on: [each call, ...]."""

    def watch(pipeline):
        counts, base = [], pipeline.model.lm.model.base_model
        handle = base.register_forward_pre_hook(
            lambda module, args, kwargs: counts.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        handles.append(handle)
        return counts

    handles = []
    yield watch
    for handle in handles:
        handle.remove()


@pytest.fixture
def written(monkeypatch):
    """The ids of prompts and answers of a talk, turn by turn: [(prompt ids, answer ids), ...]."""

    def watch(pipeline):
        found, reader = [], pipeline.reader
        prompt_of, columns = reader.prompt, reader.columns

        def prompt(*args):
            made = prompt_of(*args)
            found.append((made.tokens.ids, []))
            return made

        def logged(*args):
            for token in columns(*args):
                found[-1][1].append(int(token[0]))
                yield token

        monkeypatch.setattr(reader, "prompt", prompt)
        monkeypatch.setattr(reader, "columns", logged)
        return found

    return watch


@pytest.mark.parametrize("kind", KINDS)
def test_a_talk_says_what_its_conversation_read_anew_says(models, images, kind, ran, written):
    model = models[kind]
    turns = [("hi", []), ("what\nis <image>?", [images[1]]), ("a", []), ("and", images[2:]), ("so\na?", [])]
    found, turn = written(model), []
    talk = model.conversation("Be brief.")
    counts = ran(model)
    for text, new in turns:
        del counts[:]
        answer = talk.say(text, new, max_new_tokens=9)
        if kind in ("plain", "fixed", "together", "base"):
            before = [*turn[-1][0], *turn[-1][1][:-1]] if turn else []
            prompt, ids = found[-1]
            kept = next((i for i, pair in enumerate(zip(before, prompt)) if pair[0] != pair[1]), len(before))
            assert counts == [len(prompt) - kept, *[1] * (len(ids) - 1)], "what is new in the turn, no more"
        turn.append(found[-1])
        assert talk.messages[-2:] == [
            {"role": "user", "content": marked(text, len(new), "")},
            {"role": "assistant", "content": answer},
        ]
        assert answer == model.chat(talk.messages[:-1], talk.images, max_new_tokens=9)
        with torch.inference_mode():
            prompt = model.reader.chat_prompt(talk.messages[:-1], talk.images, "")
            alone = list(model.reader.columns(model.model.begin(*model.reader.embedded([prompt])), config(9)))
        assert turn[-1][1] == [int(token) for token in alone], "token by token"
    assert talk.images == [images[1], *images[2:]]


def test_an_answer_spelled_as_its_tokenizer_spells_is_not_read_again(models, images, ran, monkeypatch):
    """And one that is not, is, from where it differs. "\\na" is one token, if it is read and not written."""
    model, words = models["plain"], models["plain"].reader.words
    counts, end = ran(model), model.reader.chat_format.end_id
    columns = model.reader.columns
    for answer, again in ((words.encode("a dog"), 0), ([*words.encode("is\n"), *words.encode("a cat")], 7)):
        forced = iter([*answer, end])

        def dictated(decoding, config, forced=forced):
            """Runs what the model would run, and writes something else."""
            decoding(decoding.start_ids, None)
            for token in forced:
                yield torch.tensor([token])
                if token != end:
                    decoding(torch.tensor([[token]]), None)

        talk = model.conversation()
        monkeypatch.setattr(model.reader, "columns", dictated)
        assert talk.say("what?", images[0]) in ("a dog", "is\na cat")
        monkeypatch.setattr(model.reader, "columns", columns)
        del counts[:]
        talk.say("b", max_new_tokens=1)
        template = "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
        new = len(words.encode_rendered(template))
        # "is\na cat": "is" is kept, "\na", " ", "c", "a", "t" are five tokens.
        assert counts == [new + (5 if again else 0)]


@pytest.mark.parametrize("spelled", ["<image> or <image>", "so <|im_end|> it is", "<|endofchunk|>"])
def test_a_talk_goes_on_whatever_an_answer_spells(models, images, spelled, monkeypatch):
    """Letter by letter, as any model may."""
    model, columns = models["plain"], models["plain"].reader.columns
    letters, end = model.reader.words.encode(spelled), model.reader.chat_format.end_id

    def dictated(decoding, config):
        decoding(decoding.start_ids, None)
        for token in (*letters, end):
            yield torch.tensor([token])
            if token != end:
                decoding(torch.tensor([[token]]), None)

    talk = model.conversation()
    monkeypatch.setattr(model.reader, "columns", dictated)
    assert talk.say("what?", images[0]) == spelled
    monkeypatch.setattr(model.reader, "columns", columns)
    answer = talk.say("and <image>?", images[1], max_new_tokens=8)
    assert answer == model.chat(talk.messages[:-1], images[:2], max_new_tokens=8)
    talk.undo()
    assert talk.images == images[:1] and talk.messages[-1]["content"] == spelled
    assert talk.say("and <image>?", images[1], max_new_tokens=8) == answer
    assert model.chat(said("a", spelled, "<image> b"), images[0], max_new_tokens=2) is not None


@pytest.mark.parametrize("kind", ["plain", "conditioned", "window"])
def test_the_last_turn_can_be_taken_back(models, images, kind):
    model = models[kind]
    talk = model.conversation()
    first = talk.say("what?", images[0], max_new_tokens=8)
    second = talk.say("and?", images[3], max_new_tokens=8)
    talk.undo()
    assert talk.images == images[:1] and len(talk.messages) == 2
    third = talk.say("and?", drawing(63), max_new_tokens=8)  # of the same size: the ids are the same
    assert third == model.chat(talk.messages[:-1], [images[0], drawing(63)], max_new_tokens=8)
    talk.undo()
    assert talk.say("and?", images[3], max_new_tokens=8) == second
    talk.undo()
    talk.undo()
    assert (talk.messages, talk.images) == ([], [])
    assert talk.say("what?", images[0], max_new_tokens=8) == first
    with pytest.raises(UserError, match="nothing has been said"):
        model.conversation("Be brief.").undo()


def test_the_second_of_two_pictures_is_seen_where_only_it_changed(models, images):
    """Two pictures of one size give the same ids: what is kept must not depend on ids alone."""
    model = models["plain"]
    answers = set()
    for other in (drawing(n) for n in range(30, 38)):
        talk = model.conversation()
        talk.say("x", images[0], max_new_tokens=2)
        talk.say("what?", drawing(1), max_new_tokens=2)
        talk.undo()
        answers.add(talk.say("what?", other, max_new_tokens=8))
    assert len(answers) > 1


def test_a_turn_that_is_not_listened_to_is_none(models, images):
    model, options = models["plain"], {"max_new_tokens": 8}
    for question in ("what?", "is it?", "b", "c", "which one is it?", "and this?"):
        talk = model.conversation()
        first = talk.say(question, images[0], **options)
        stream = talk.stream("and?", images[1], **options)
        next(stream)
        stream.close()
        assert (talk.messages[-1]["content"], talk.images) == (first, images[:1])
        anew = model.chat(said(f"<image>\n{question}", first, "so?"), images[0], **options)
        assert talk.say("so?", **options) == anew
