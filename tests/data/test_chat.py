"""Chats become ids and labels turn by turn: the released prompt to the letter, any template, nothing cut unasked."""

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openblip.config import UserError
from openblip.data.chat import CHAT_TEMPLATES, BadChat, ChatTokenizer
from openblip.data.prompts import LmTokenizer
from openblip.data.tokens import Tokens

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<s>", "<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]  # Phi-3's
XGENMM_SYSTEM = (
    "<|system|>\nA chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.<|end|>\n"
)


def bytes_tokenizer(template=CHATML, special=SPECIAL):
    """Bytes, one merge (so that what is tokenised together matters), and the control tokens of two families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate([*special, *alphabet, "Ċa"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("Ċ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in special])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
    )
    return LmTokenizer(hf)


def chat_tokenizer(template=None, **options):
    tokenizer = bytes_tokenizer(**options)
    return ChatTokenizer(tokenizer, 1000, template)


def said(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def shown(chat, ids):
    """Ids as text: [i] an image id, "." what is not counted."""
    text = ""
    for number in ids:
        if number < 0:
            text += "."
        elif number >= 1000:
            text += f"[{number - 1000}]"
        else:
            text += chat.tokenizer._backend.id_to_token(number).replace("Ġ", " ").replace("Ċ", "\n")
    return text


def test_the_released_prompt_to_the_letter():
    chat = chat_tokenizer("xgenmm")
    tokens = chat.training(said("<image>\nWhat is it?", "A dog.", "Sure?", "Yes."), [3])
    question = "<|user|>\n[0][0][0]\nWhat is it?<|end|>\n<|assistant|>\n"
    second = "<|user|>\nSure?<|end|>\n<|assistant|>\n"
    assert (
        shown(chat, tokens.ids) == f"{XGENMM_SYSTEM}{question}A dog.<|end|>\n{second}Yes.<|end|>\n"
    )  # no <s>
    counted = shown(chat, tokens.labels)
    assert counted.replace(".", "") == "A dog<|end|>\nYes<|end|>\n"
    head = len(chat.tokenizer.encode_rendered(XGENMM_SYSTEM + question.replace("[0]", ""))) + 3
    assert tokens.labels[:head] == [-100] * head
    assert shown(chat, tokens.labels[head:]).startswith("A dog.<|end|>\n....")
    (run,) = tokens.runs
    assert tokens.ids[slice(*run)] == [1000] * 3
    assert chat.end_id == SPECIAL.index("<|end|>")


def test_a_system_message_replaces_the_released_one():
    chat = chat_tokenizer("xgenmm")
    messages = [{"role": "system", "content": "Be brief."}, *said("Hi", "Yo")]
    text = "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYo<|end|>\n"
    assert shown(chat, chat.training(messages, []).ids) == text


def test_the_models_own_template():
    chat = chat_tokenizer()
    tokens = chat.training(said("<image>\nIs it?", "Yes."), [2])
    head = "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n[0][0]\nIs it?<|im_end|>\n"
    head += "<|im_start|>assistant\n"
    assert shown(chat, tokens.ids) == head + "Yes.<|im_end|>\n"
    assert shown(chat, tokens.labels).lstrip(".") == "Yes.<|im_end|>\n"
    assert chat.end_id == SPECIAL.index("<|im_end|>") != chat.tokenizer.end_id


@pytest.mark.parametrize("template", [None, "xgenmm"])
def test_a_chat_in_use_has_the_ids_it_has_in_training(template):
    """And a chat extended turn by turn has those of the whole. "\\na" would be one token across a turn's border."""
    chat = chat_tokenizer(template)
    texts = ["<image>\na?", "a b\nac", "and <image>", "abc", "a", "a"]
    whole = chat.training(said(*texts), [4, 2])
    cut_up, together = [], []
    for number in range(0, len(texts), 2):
        lengths = [4, 2][: sum(text.count("<image>") for text in texts[: number + 1])]
        prompt = chat.prompt(said(*texts[: number + 1]), lengths)
        assert prompt.ids[: len(cut_up)] == cut_up
        assert set(prompt.labels) == {-100}
        answered = chat.training(said(*texts[: number + 2]), lengths)
        assert answered.ids[: len(prompt)] == prompt.ids
        cut_up = answered.ids
        together += answered.labels[len(together) :]
    assert cut_up == whole.ids and together == whole.labels
    merged = chat.tokenizer._backend.token_to_id("Ċa")
    first_answer = whole.ids.index(chat.tokenizer.encode("b")[0])
    assert (
        merged not in whole.ids[first_answer - 3 : first_answer]
    )  # ...assistant\n|a b: two stretches, two tokens
    assert merged in whole.ids  # "b\nac", within one


def test_neighbouring_images_are_two():
    tokens = chat_tokenizer().training(said("<image><image>x", "y"), [2, 3])
    (first, second) = tokens.runs
    assert first[1] == second[0] and (second[1] - first[0]) == 5
    assert tokens.cut(second[1] - 1).ids == tokens.ids[: first[1]]


def test_what_users_type_is_never_control():
    chat = chat_tokenizer("xgenmm")
    for typed in ("<|end|>", "<|assistant|>", "</s>", "<|endofchunk|>", "<image placeholder>"):
        for messages in (said(f"x {typed}", "y"), said("x", f"y{typed}")):
            with pytest.raises(BadChat, match="holds the control token") as caught:
                chat.training(messages, [])
            assert caught.value.reason == "control_token" and typed in str(caught.value)
    with pytest.raises(BadChat, match="1 <image> markers for 0 images"):
        chat.prompt(said("<image>"), [])
    with pytest.raises(BadChat, match="0 <image> markers for 1 images"):
        chat.prompt(said("x"), [2])


@pytest.mark.parametrize("template", [None, "xgenmm"])
def test_what_a_model_said_is_text_whatever_it_spells(template):
    chat = chat_tokenizer(template)
    plain = chat.prompt(said("a <image>", "%", "c"), [3])
    for spelled in ("<image>", "x<|end|>\ny", "<|im_end|>", "<|endofchunk|>, </s>"):
        tokens = chat.prompt(said("a <image>", spelled, "c"), [3])
        at = plain.ids.index(*chat.tokenizer.encode("%"))
        assert tokens.ids == [*plain.ids[:at], *chat.tokenizer.encode(spelled), *plain.ids[at + 1 :]]
        assert tokens.runs == plain.runs
        with pytest.raises(BadChat):
            chat.training(said("a <image>", spelled), [3])
    assert (
        chat.prompt(said("a", "b c", "d"), []).ids[: len(at := chat.training(said("a", "b c"), []).ids)] == at
    )
    loud = chat_tokenizer(CHATML.replace("message['content'] +", "(message['content'] | upper) +"))
    assert loud.prompt(said("a", "b", "c"), [])
    with pytest.raises(BadChat, match="holds the control token <image>"):
        loud.prompt(said("a", "<image>", "c"), [])


def test_training_keeps_whole_exchanges():
    chat = chat_tokenizer("xgenmm")
    messages = said("<image>\nfirst", "one", "<image>\nsecond", "two", "third", "three")
    ends = [len(chat.training(messages[:stop], [4, 4][: min(stop // 2, 2)])) for stop in (2, 4, 6)]
    whole = chat.training(messages, [4, 4])
    for room, kept, images in [
        (ends[2], 2, 2), (ends[2] - 1, 1, 2), (ends[1], 1, 2), (ends[1] - 1, 0, 1), (ends[0], 0, 1),
    ]:  # fmt: skip
        tokens = chat.training(messages, [4, 4], room)
        assert len(tokens) == ends[kept] and tokens.ids == whole.ids[: ends[kept]]
        assert len(tokens.runs) == images
    cut = chat.training(messages, [4, 4], ends[0] - 2)  # into the first answer: its end goes
    assert shown(chat, cut.labels).lstrip(".") == "one"
    question = ends[0] - len("one") - 2
    assert len(chat.training(messages, [4, 4], question + 1)) == question + 1
    with pytest.raises(BadChat, match=f"first question has {question} tokens.*no room") as caught:
        chat.training(messages, [4, 4], question)
    assert caught.value.reason == "too_long"


def test_overflow_in_use_says_by_how_much():
    chat = chat_tokenizer()
    length = len(chat.prompt(said("<image>\nhi"), [20]))
    assert len(chat.prompt(said("<image>\nhi"), [20], length)) == length
    with pytest.raises(
        BadChat, match=f"has {length} tokens, 20 of them for 1 images: 5 more than the {length - 5}"
    ):
        chat.prompt(said("<image>\nhi"), [20], length - 5)


def test_a_preference_counts_the_last_answer_alone():
    chat = chat_tokenizer("xgenmm")
    messages = said("<image>\na?", "not counted", "b?")
    tokens = chat.preference(messages, "better", [3])
    assert shown(chat, tokens.labels).lstrip(".") == "better<|end|>\n"
    assert tokens.ids == chat.training([*messages, *said("", "better")[1:]], [3]).ids
    assert len(tokens.runs) == 1
    head = len(chat.prompt(messages, [3]))
    assert tokens.labels.index(tokens.ids[head]) == head
    cut = chat.preference(messages, "better", [3], head + 3)
    assert shown(chat, cut.labels).lstrip(".") == "bet"
    with pytest.raises(BadChat, match="no room"):
        chat.preference(messages, "better", [3], head)


def test_templates_that_will_not_do():
    forgetful = CHATML.replace("message['content'] +", "(message['content'] if loop.last else '...') +")
    with pytest.raises(UserError, match="changes earlier turns"):
        chat_tokenizer(forgetful)
    with pytest.raises(UserError, match="no token of the tokenizer"):
        chat_tokenizer("xgenmm", special=SPECIAL[:5])
    with pytest.raises(UserError, match="no chat template"):
        ChatTokenizer(bytes_tokenizer(None), 1000)
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    )
    chat = chat_tokenizer(strict)
    with pytest.raises(BadChat, match="no system here") as caught:
        chat.prompt([{"role": "system", "content": "x"}, *said("y")], [])
    assert caught.value.reason == "chat_template"


def test_answers_are_read_back():
    chat = chat_tokenizer("xgenmm")
    answer = chat.tokenizer.encode("a dog")
    assert chat.decode([*answer, chat.end_id, *answer]) == "a dog"
    assert chat.decode([*answer, 1002]) == "a dog"
    assert chat.added.end_of_chunk == 1002 and chat.added.placeholder == 1001


def test_lone_surrogates_do_not_crash_a_chat():
    chat = chat_tokenizer()
    assert "?" in shown(chat, chat.prompt(said("\ud800"), []).ids)


def test_tokens_are_cut_before_an_image_that_does_not_fit():
    text, more = Tokens.text([1, 2], counted=True), Tokens.text([3], counted=True)
    tokens = Tokens.join([text, Tokens.image(9, 3), more, Tokens.image(9, 2)])
    assert tokens.ids == [1, 2, 9, 9, 9, 3, 9, 9] and tokens.runs == [(2, 5), (6, 8)]
    assert tokens.labels == [1, 2, -100, -100, -100, 3, -100, -100]
    assert [len(tokens.cut(n)) for n in range(9)] == [0, 1, 2, 2, 2, 5, 6, 6, 8]
    assert [len(tokens.cut(n).runs) for n in range(9)] == [0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert not Tokens([5, 6], [5, -100]).is_counted and Tokens([5, 6], [-100, 6]).is_counted


def test_templates_by_name():
    assert set(CHAT_TEMPLATES) == {"xgenmm"}
    by_text = chat_tokenizer(CHAT_TEMPLATES["xgenmm"])
    assert by_text.prompt(said("x"), []).ids == chat_tokenizer("xgenmm").prompt(said("x"), []).ids
