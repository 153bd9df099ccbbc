"""Texts for a language model: prompts, chats and answers to ids, training samples with their labels, ids to text.

    decoder-only        input_ids   start  prompt    target   end   padding
                        labels      -100   -100      target   end   -100

    encoder-decoder     input_ids   (start) prompt (end)  padding
                        labels      (start) target  end   -100

A prompt is tokenised by itself, in training as in use, and the target behind it by itself; the space between them
belongs to the target. The image is no token here: its soft prompt stands before all of this.

Shapes: B texts, L tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
from torch import Tensor

from openblip.config import UserError

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[Message]

# InstructBLIP: instructions of at most 128 tokens, cut on the left; outputs of 256 with the start token that is then
# taken off, cut on the right (§3.5 of its released code's reading in LAVIS, blip2_vicuna_instruct).
INSTRUCT_PROMPT, INSTRUCT_TARGET = 128, 255


@dataclass(frozen=True)
class TextQuirks:
    """Where a family's texts differ from what its tokenizer says.

    start: the token before a text, whatever the tokenizer puts there. end: what ends a text, instead of the
    tokenizer's end token. rewrite: ids that a model writes in place of others.
    """

    start: str | None = None
    end: str | None = None
    rewrite: Mapping[int, int] = field(default_factory=dict)


# By model_type; "vicuna" is a llama whose tokenizer the released InstructBLIP changed.
QUIRKS = {
    "opt": TextQuirks(start="</s>", end="\n"),
    "vicuna": TextQuirks(start="</s>", end="</s>", rewrite={0: 2}),
}


class LmTokenizer:
    """The tokenizer of a language model: a fast one of transformers, without its surprises.

    What a text says is never control: "</s>" in a caption is encoded letter by letter. In the messages of a chat it is
    refused, since a chat template marks its turns with such words.

    Args:
        tokenizer: of transformers.
        family: the model's `model_type`, or another name in `QUIRKS`.
        encoder_decoder: prompts go to an encoder, which wants the tokenizer's end token behind them.

    Raises:
        UserError: not a fast tokenizer, or its vocabulary lacks what the family wants.
    """

    def __init__(self, tokenizer: Any, family: str = "", *, encoder_decoder: bool = False) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise UserError(
                f"{type(tokenizer).__name__}: not a fast tokenizer; give a folder with tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())  # a copy, to be set up as we need it
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.encoder_decoder = encoder_decoder
        self.quirks = QUIRKS.get(family, TextQuirks())
        probe = self.encode("a")
        whole = self._backend.encode("a").ids  # with what the tokenizer puts around a text
        at = next(i for i in range(len(whole)) if whole[i : i + len(probe)] == probe)
        self.start_ids: list[int] = whole[:at]
        self.prompt_end_ids: list[int] = whole[at + len(probe) :] if encoder_decoder else []
        if self.quirks.start is not None:
            self.start_ids = [self._id(self.quirks.start)]
        self._adds_space = (self._backend.id_to_token(probe[0]) or "").startswith("▁")
        self.end_id = self._end_id()
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad is None else pad

    @classmethod
    def load(cls, source: str | Path, family: str = "", *, encoder_decoder: bool = False) -> "LmTokenizer":
        """From a folder or a name on the hub. Raises UserError: there is none, or transformers is not installed."""
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UserError("this tokenizer needs transformers: pip install 'openblip[lm]'") from None
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source))
        except Exception as error:  # transformers and tokenizers raise many kinds for a file they cannot read
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{source}: no tokenizer to load here: {line}") from None
        return cls(tokenizer, family, encoder_decoder=encoder_decoder)

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads."""
        self._tokenizer.save_pretrained(str(folder))

    def id_of(self, token: str) -> int | None:
        """The id of a token as it is written; None if there is no such token."""
        return self._backend.token_to_id(token)

    @property
    def has_chat_template(self) -> bool:
        """Whether a prompt may be a chat."""
        return bool(self._tokenizer.chat_template)

    @property
    def chat_template(self) -> str | None:
        """How the messages of a chat become a text (Jinja)."""
        return self._tokenizer.chat_template

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """A copy of what cuts texts into words; what stands around a text is that of the tokenizer it came from."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    @property
    def special_tokens(self) -> dict[str, str]:
        """Those of "bos_token", "eos_token", "unk_token" and "pad_token" that the tokenizer it came from has."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        found = {name: getattr(self._tokenizer, name) for name in names}
        return {name: str(token) for name, token in found.items() if token is not None}

    def encode(self, text: str) -> list[int]:
        """The ids of a text alone. A lone surrogate, which JSON can hold and UTF-8 cannot, is read as "?"."""
        return self._backend.encode(_sound(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Generated ids [L] -> text, without special tokens and without what follows the end."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        ids = [self.quirks.rewrite.get(number, number) for number in ids]
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        return self._backend.decode(ids, skip_special_tokens=True).strip()

    def prompts(
        self,
        prompts: Sequence[Prompt],
        max_length: int | None = None,
        *,
        padding: Literal["left", "right"] = "right",
    ) -> dict[str, Tensor]:
        """Prompts, texts or chats -> {"input_ids", "attention_mask"} [B, L], mask 1 for what is real.

        A prompt of more than `max_length` tokens loses its beginning, but not the start token. Without `max_length`
        nothing is cut: the language model says if it is too much.

        Raises UserError: a chat, and the language model has no chat template; or a chat with control tokens in it.
        """
        rows = [self._prompt_ids(prompt, max_length) for prompt in prompts]
        ids, mask = self._padded(rows, self.pad_id, padding)
        return {"input_ids": ids, "attention_mask": mask}

    def training(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[str],
        *,
        max_prompt: int = INSTRUCT_PROMPT,
        max_target: int = INSTRUCT_TARGET,
    ) -> dict[str, Tensor]:
        """Pairs -> {"input_ids", "attention_mask", "labels"}, see the head of this file; padding last.

        Prompts are cut on the left, targets on the right, where they lose their end: a text cut off has not ended.

        Raises UserError: a target without words, or what `prompts` raises.
        """
        heads = [self._prompt_ids(prompt, max_prompt) for prompt in prompts]
        tails = [
            self.target_ids(prompt, text, max_target) for prompt, text in zip(prompts, targets, strict=True)
        ]
        if self.encoder_decoder:
            ids, mask = self._padded(heads, self.pad_id)
            return {"input_ids": ids, "attention_mask": mask, "labels": self._padded(tails, -100)[0]}
        rows = [head + tail for head, tail in zip(heads, tails)]
        labels = [[-100] * len(head) + tail for head, tail in zip(heads, tails)]
        ids, mask = self._padded(rows, self.pad_id)
        return {"input_ids": ids, "attention_mask": mask, "labels": self._padded(labels, -100)[0]}

    def target_ids(self, prompt: Prompt, target: str, max_length: int = INSTRUCT_TARGET) -> list[int]:
        """What a model is to write after the prompt, with the token that ends it."""
        if not target.strip():
            raise UserError(f"the text to write after the prompt {_shown(prompt)} has no words")
        if self.encoder_decoder:
            return [*self.start_ids, *self.encode(target), self.end_id][:max_length]
        is_continued = isinstance(prompt, str) and prompt.strip() and not prompt.endswith("\n")
        gap = " " if is_continued and not self._adds_space and not target[0].isspace() else ""
        return [*self.encode(gap + target), self.end_id][:max_length]

    def candidates(self, prompt: Prompt, texts: Sequence[str]) -> dict[str, Tensor]:
        """Answers to choose from after one prompt, for ranking: {"answer_ids", "answer_mask"} [C, L]."""
        ids, mask = self._padded([self.target_ids(prompt, text) for text in texts], self.pad_id)
        return {"answer_ids": ids, "answer_mask": mask}

    def _prompt_ids(self, prompt: Prompt, max_length: int | None) -> list[int]:
        if isinstance(prompt, str):
            start, text = self.start_ids, self.encode(prompt.rstrip(" "))
        else:
            start, text = [], self._chat_ids(prompt)
        if max_length is not None:
            room = max(0, max_length - len(start) - len(self.prompt_end_ids))
            text = text[max(0, len(text) - room) :]
        return [*start, *text, *self.prompt_end_ids]

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Messages in the form the language model was taught, up to where it answers."""
        for message in messages:
            if (token := self.control_in(message["content"])) is not None:
                raise UserError(f"the message {_shown(message['content'])} holds the control token {token}")
        return self.encode_rendered(self.render(messages))

    def control_in(self, text: str) -> str | None:
        """The first control token that a text spells out, which in a chat would be one."""
        return next((token for token in self._control if token in text), None)

    def render(self, messages: Sequence[Message], template: str | None = None, *, answer: bool = True) -> str:
        """Messages as the language model was taught to read them, or by another chat template (Jinja).

        With `answer`, up to where it answers; else the messages alone.

        Raises UserError: there is no template, or it does not take these messages.
        """
        if template is None and not self.has_chat_template:
            raise UserError("this language model has no chat template: give the prompt as plain text")
        turns = [dict(message) for message in messages]
        try:
            return self._tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # a template, somebody else's program, says no in whatever way it likes
            raise UserError(f"the chat template does not take these messages: {error}") from None

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of what `render` gave, or of a piece of it: control tokens are what they say."""
        return self._with_control.encode(_sound(text), add_special_tokens=False).ids

    @cached_property
    def _control(self) -> list[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special]

    @cached_property
    def _with_control(self) -> tokenizers.Tokenizer:
        """A copy of our own, since the tokenizer of transformers changes its state when it is called."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def _padded(
        self, rows: Sequence[Sequence[int]], fill: int, padding: str = "right"
    ) -> tuple[Tensor, Tensor]:
        """Rows in one tensor [B, L], L the longest, and the mask of what is real."""
        width = max(map(len, rows), default=0)
        ids = torch.full((len(rows), width), fill, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if padding == "left" else slice(0, len(row))
            ids[number, place] = torch.tensor(row, dtype=torch.int64)
            mask[number, place] = 1
        return ids, mask

    def _end_id(self) -> int:
        if self.quirks.end is not None:
            known = self.id_of(self.quirks.end)
            ids = self.encode(self.quirks.end) if known is None else [known]
            if len(ids) != 1:
                raise UserError(
                    f"the tokenizer has no single token for {self.quirks.end!r}, which ends a text here"
                )
            return ids[0]
        if self._tokenizer.eos_token_id is None:
            raise UserError("the tokenizer names no end token (eos_token)")
        return self._tokenizer.eos_token_id

    def _id(self, token: str) -> int:
        found = self.id_of(token)
        if found is None:
            raise UserError(f"the tokenizer lacks the token {token}, with which a text begins here")
        return found


def split_for_prefix_lm(text: str, rng: np.random.Generator) -> tuple[str, str]:
    """A caption in two: what the encoder reads, and what the decoder is to write (BLIP-2 §3.3, prefix LM).

    Cut between words at a place drawn from `rng`; the first part may be empty, the second is not.
    """
    words = text.split()
    cut = int(rng.integers(max(1, len(words))))
    return " ".join(words[:cut]), " ".join(words[cut:])


def _sound(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _shown(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else str(list(prompt))
    return repr(text if len(text) <= 60 else text[:57] + "...")
