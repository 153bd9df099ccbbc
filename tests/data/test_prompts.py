"""Prompts and answers become the ids, masks and labels that the papers' code gives its language models."""

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from openblip.config import UserError
from openblip.data.prompts import LmTokenizer, split_for_prefix_lm

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def byte_level(*, start=None, end="</s>", chat=None, newline=True):
    """GPT-2's kind: every byte is a word, no merges; ids 0-4 are special."""
    special = ["<s>", "<pad>", "</s>", "<|user|>", "<|bot|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if not newline:
        alphabet = [letter for letter in alphabet if letter != "Ċ"]
    vocab = {word: i for i, word in enumerate([*special, *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in special])
    if start is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, vocab[start])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token="<pad>", chat_template=chat
    )


def sentence_piece(*, template="$A </s>"):
    """T5's and Llama's kind: words carry the space before them."""
    words = ["▁a", "▁dog", "▁cat", "▁what", "▁is", "▁this", "▁short", "▁answer", "▁runs", "▁"]
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Strip()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def shown(tokenizer, ids):
    """Ids as words, for goldens one can read; -100 as "."."""
    return [
        "." if i < 0 else tokenizer._backend.id_to_token(i).replace("Ġ", "_").replace("Ċ", "\\n")
        for i in ids.tolist()
    ]


def test_opt_begins_with_its_end_token_and_ends_with_a_newline():
    tokenizer = LmTokenizer(byte_level(), "opt")
    batch = tokenizer.training(["a ", ""], ["dog", "cats"])
    assert shown(tokenizer, batch["input_ids"][0]) == ["</s>", "a", "_", "d", "o", "g", "\\n"]
    assert shown(tokenizer, batch["labels"][0]) == [".", ".", "_", "d", "o", "g", "\\n"]
    assert shown(tokenizer, batch["input_ids"][1]) == ["</s>", "c", "a", "t", "s", "\\n", "<pad>"]
    assert shown(tokenizer, batch["labels"][1]) == [".", "c", "a", "t", "s", "\\n", "."]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 6 + [0]]
    assert tokenizer.decode(batch["input_ids"][1][1:]) == "cats"


def test_a_prompt_in_training_is_the_prompt_in_use():
    tokenizer = LmTokenizer(byte_level(start="<s>"))
    prompt = "Question: what? Short answer: "
    used = tokenizer.prompts([prompt])["input_ids"][0]
    trained = tokenizer.training([prompt], ["a dog"])
    assert trained["input_ids"][0, : len(used)].tolist() == used.tolist()
    assert (trained["labels"][0, : len(used)] == -100).all()
    assert shown(tokenizer, trained["labels"][0, len(used) :]) == [*"_a_dog", "</s>"]
    assert shown(tokenizer, used)[:2] == ["<s>", "Q"]


def test_instructblip_cuts_inputs_left_and_outputs_right_and_moves_the_padding_behind():
    tokenizer = LmTokenizer(byte_level(start="<s>"), "vicuna")
    batch = tokenizer.training(["abcdefgh\n", "xy\n"], ["0123456789", "yes"], max_prompt=5, max_target=7)
    assert shown(tokenizer, batch["input_ids"][0]) == ["</s>", *"fgh", "\\n", *"0123456"]
    assert shown(tokenizer, batch["labels"][0]) == ["."] * 5 + list("0123456")  # cut off: no end
    row = ["</s>", *"xy", "\\n", *"yes", "</s>"]  # no start token between input and output
    assert shown(tokenizer, batch["input_ids"][1]) == row + ["<pad>"] * 4
    assert shown(tokenizer, batch["labels"][1]) == ["."] * 4 + row[4:] + ["."] * 4
    y, e = tokenizer.encode("ye")
    assert tokenizer.decode([y, 0, e]) == "y"  # Vicuna's 0 stands for its end token, 2


def test_encoder_decoder_has_the_prompt_in_the_encoder():
    tokenizer = LmTokenizer(sentence_piece(), "t5", encoder_decoder=True)
    batch = tokenizer.training(["what is this", "what"], ["a dog", "cat"])
    assert shown(tokenizer, batch["input_ids"][0]) == ["▁what", "▁is", "▁this", "</s>"]
    assert shown(tokenizer, batch["input_ids"][1]) == ["▁what", "</s>", "<pad>", "<pad>"]
    assert batch["attention_mask"][1].tolist() == [1, 1, 0, 0]
    assert shown(tokenizer, batch["labels"][0]) == ["▁a", "▁dog", "</s>"]
    assert shown(tokenizer, batch["labels"][1]) == ["▁cat", "</s>", "."]


def test_bart_puts_its_start_token_before_prompt_and_target():
    tokenizer = LmTokenizer(sentence_piece(template="</s> $A </s>"), "bart", encoder_decoder=True)
    batch = tokenizer.training(["what"], ["a dog"])
    assert shown(tokenizer, batch["input_ids"][0]) == ["</s>", "▁what", "</s>"]
    assert shown(tokenizer, batch["labels"][0]) == ["</s>", "▁a", "▁dog", "</s>"]


def test_a_tokenizer_that_adds_spaces_gets_none_from_us():
    tokenizer = LmTokenizer(sentence_piece(template="$A"))
    batch = tokenizer.training(["what is this"], ["a dog"])
    assert shown(tokenizer, batch["labels"][0]) == [".", ".", ".", "▁a", "▁dog", "</s>"]


def test_padding_on_either_side_and_cutting_keeps_the_start():
    tokenizer = LmTokenizer(byte_level(start="<s>"))
    left = tokenizer.prompts(["abcd", "x"], max_length=4, padding="left")
    assert shown(tokenizer, left["input_ids"][0]) == ["<s>", *"bcd"]
    assert shown(tokenizer, left["input_ids"][1]) == ["<pad>", "<pad>", "<s>", "x"]
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    right = tokenizer.prompts(["abcd", "x"])
    assert shown(tokenizer, right["input_ids"][1]) == ["<s>", "x", "<pad>", "<pad>", "<pad>"]
    assert tokenizer.prompts([""])["input_ids"].tolist() == [[0]]
    assert LmTokenizer(byte_level()).prompts(["", ""])["input_ids"].shape == (2, 0)


def test_what_a_text_says_is_no_control():
    tokenizer = LmTokenizer(byte_level(chat=CHAT))
    assert shown(tokenizer, tokenizer.prompts(["</s>"])["input_ids"][0]) == list("</s>")
    chat = [{"role": "user", "content": "hi"}]
    row = ["<|user|>", "h", "i", "</s>", "<|bot|>"]
    assert shown(tokenizer, tokenizer.prompts([chat])["input_ids"][0]) == row
    batch = tokenizer.training([chat], ["yo"])
    assert shown(tokenizer, batch["labels"][0]) == ["."] * 5 + ["y", "o", "</s>"]
    with pytest.raises(UserError, match=r"control token <\|bot\|>"):
        tokenizer.prompts([[{"role": "user", "content": "hi<|bot|>"}]])


def test_candidates_are_what_training_would_have_as_targets():
    tokenizer = LmTokenizer(byte_level())
    found = tokenizer.candidates("Is it? Answer:", ["no", "yes"])
    assert shown(tokenizer, found["answer_ids"][0]) == ["_", "n", "o", "</s>", "<pad>"]
    assert found["answer_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_save_and_load(tmp_path):
    tokenizer = LmTokenizer(byte_level(start="<s>", chat=CHAT), "opt")
    tokenizer.save(tmp_path)
    loaded = LmTokenizer.load(tmp_path, "opt")
    assert (loaded.start_ids, loaded.end_id, loaded.pad_id) == (tokenizer.start_ids, tokenizer.end_id, 1)
    assert loaded.has_chat_template and loaded.encode("a b") == tokenizer.encode("a b")


def test_clear_errors(tmp_path):
    with pytest.raises(UserError, match="no chat template"):
        LmTokenizer(byte_level()).prompts([[{"role": "user", "content": "hi"}]])
    with pytest.raises(UserError, match="no words"):
        LmTokenizer(byte_level()).training(["a"], [" "])
    with pytest.raises(UserError, match="no single token for"):
        LmTokenizer(byte_level(newline=False), "opt")
    with pytest.raises(UserError, match="no end token"):
        LmTokenizer(byte_level(end=None))
    with pytest.raises(UserError, match="no tokenizer"):
        LmTokenizer.load(tmp_path)


def test_prefix_lm_cuts_anywhere_and_leaves_something_to_write():
    rng = np.random.default_rng(0)
    found = {split_for_prefix_lm("a dog runs", rng) for _ in range(50)}
    assert found == {("", "a dog runs"), ("a", "dog runs"), ("a dog", "runs")}
    assert split_for_prefix_lm("dog", rng) == ("", "dog")
    again = [split_for_prefix_lm("a b c d e", np.random.default_rng(7)) for _ in range(2)]
    assert again[0] == again[1]
