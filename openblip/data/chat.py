"""Conversations to ids and labels, by the language model's own chat template or the released xGen-MM prompt.

    ids      <|user|> <image> × K "what?" <|assistant|>    "a dog" <|end|>    <|user|> ...
    labels      -100     -100      -100       -100         "a dog" <|end|>      -100   ...

The template is rendered turn by turn into stretches: all that leads up to an answer, and the answer with the end of
its turn. Each stretch is tokenised by itself, so that the ids of a chat are the same in training and in use, and the
same whether it is encoded as a whole or was extended turn by turn.

Control tokens that somebody typed into a message are refused; what a model said in a chat may spell them, and is read
as the text it is. Only whole exchanges are left out of a conversation
that is too long for training; a chat that is too long in use is an error.
"""

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from openblip.config import UserError
from openblip.data.prompts import LmTokenizer, Message
from openblip.data.tokens import AddedTokens, Tokens

IMAGE = AddedTokens.NAMES[0]

# §4.4. No start token; a system message is put in front where there is none.
_XGENMM = """\
{%- if messages[0].role != "system" -%}
{{ "<|system|>\\nA chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
detailed, and polite answers to the user's questions.<|end|>\\n" }}
{%- endif -%}
{%- for message in messages -%}
{{ "<|" + message.role + "|>\\n" + message.content + "<|end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|assistant|>\\n" }}
{%- endif -%}
"""
CHAT_TEMPLATES = {"xgenmm": _XGENMM}
_PROBE = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


class BadChat(UserError):
    """Messages that cannot be encoded.

    `reason` is one of `control_token` (typed into a message), `chat_template` (the template does not take these
    messages), `too_long`, `image_count` (not as many images as markers). `detail` is a sentence for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that the exception survives pickling between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


class ChatTokenizer:
    """Messages with <image> markers to `Tokens`.

    `added` are the ids beyond the language model's vocabulary, `end_id` the token that ends an answer.

    Args:
        tokenizer: of the language model.
        first_added_id: the id of <image>, as many as the language model has rows of its own.
        template: a name in `CHAT_TEMPLATES`, or a chat template in Jinja; None for the language model's own.

    Raises:
        UserError: there is no template, its answers end with no token of the tokenizer, or what it makes of a chat
            changes what it made of the chat's beginning.
    """

    def __init__(self, tokenizer: LmTokenizer, first_added_id: int, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.added = AddedTokens(first_added_id)
        self.template = None if template is None else CHAT_TEMPLATES.get(template, template)
        _, (answer, _), _ = self._stretches(_PROBE)
        ids = [i for i in tokenizer.encode_rendered(answer) if i not in tokenizer.encode(answer)]
        if not ids:
            raise UserError(
                f"an answer ends with {answer[1:]!r} in this chat template, which is no token of the tokenizer"
            )
        self.end_id: int = ids[0]

    def training(
        self, messages: Sequence[Message], lengths: Sequence[int], max_length: int | None = None
    ) -> Tokens:
        """A conversation that ends with an answer; the answers are counted.

        Of one with more than `max_length` tokens the first exchanges are kept, as many as fit whole; if not even
        one does, its answer is cut on the right and loses its end. So no image is cut or left out but the last
        ones, with all that is said after them: `runs` of the result says how many there still are.

        Args:
            lengths: vision tokens of each image, in order.

        Raises:
            BadChat: see there; `too_long` if the first question alone fills `max_length`.
        """
        return self._fitted(list(self._tokens(messages, lengths)), max_length)

    def preference(
        self,
        messages: Sequence[Message],
        answer: str,
        lengths: Sequence[int],
        max_length: int | None = None,
    ) -> Tokens:
        """A prompt that ends with the user, and one answer to it, which alone is counted, and cut if need be.

        Raises:
            BadChat: see there; `too_long` if the prompt alone fills `max_length`.
        """
        *prompt, last = self._tokens([*messages, {"role": "assistant", "content": answer}], lengths)
        before = Tokens.join(prompt)
        before = Tokens(before.ids, [-100] * len(before), before.runs)
        return self._fitted([before, last], max_length)

    def prompt(
        self, messages: Sequence[Message], lengths: Sequence[int], max_length: int | None = None
    ) -> Tokens:
        """A chat up to where the model answers; nothing is counted, and nothing is cut.

        What the assistant said holds neither markers nor control tokens, though it may spell them.

        Raises:
            BadChat: see there; `too_long` says by how many tokens.
        """
        tokens = Tokens.join(self._tokens(messages, lengths, in_use=True))
        if max_length is not None and len(tokens) > max_length:
            images = f", {sum(lengths)} of them for {len(lengths)} images" if lengths else ""
            raise BadChat(
                "too_long",
                f"the chat has {len(tokens)} tokens{images}: {len(tokens) - max_length} more than the {max_length} "
                "that there is room for",
            )
        return Tokens(tokens.ids, [-100] * len(tokens), tokens.runs)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Generated ids [L] -> text, without special tokens and without what follows the end of the answer."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        return self.tokenizer.decode([number for number in ids if number < self.added.first_id])

    def _fitted(self, stretches: list[Tokens], max_length: int | None) -> Tokens:
        """As many pairs (question, answer) as fit, at least the beginning of the first answer."""
        whole = Tokens.join(stretches)
        if max_length is None or len(whole) <= max_length:
            return whole
        kept = 0
        for number in range(2, len(stretches) + 1, 2):
            if sum(map(len, stretches[:number])) <= max_length:
                kept = number
        fitted = Tokens.join(stretches[: max(kept, 2)]).cut(max_length)
        if len(fitted) <= len(stretches[0]):
            detail = f"the first question has {len(stretches[0])} tokens with its images, which leaves no room for "
            raise BadChat("too_long", f"{detail}an answer in {max_length}")
        return fitted

    def _tokens(
        self, messages: Sequence[Message], lengths: Sequence[int], *, in_use: bool = False
    ) -> Iterator[Tokens]:
        """The stretches of a chat: question, answer, question, ...; in use, answers are text whatever they spell."""
        said = [message["content"] for message in messages if in_use and message["role"] == "assistant"]
        read = [message["content"] for message in messages if not in_use or message["role"] != "assistant"]
        markers = sum(text.count(IMAGE) for text in read)
        if markers != len(lengths):
            raise BadChat("image_count", f"the text has {markers} {IMAGE} markers for {len(lengths)} images")
        for text in read:
            self._check(text.replace(IMAGE, ""))
        rest, answers = iter(lengths), iter(said)
        for text, counted in self._stretches(messages):
            if counted and in_use:
                yield self._verbatim(text, next(answers))
                continue
            pieces = []
            for number, piece in enumerate(text.split(IMAGE)):
                if number:
                    pieces.append(Tokens.image(self.added.image, next(rest)))
                pieces.append(Tokens.text(self.tokenizer.encode_rendered(piece), counted=counted))
            yield Tokens.join(pieces)

    def _verbatim(self, text: str, said: str) -> Tokens:
        """The stretch of an answer, in which what was said is no marker and no control token."""
        if self._typed(said) is None:  # in one piece, as in training
            return Tokens.text(self.tokenizer.encode_rendered(text), counted=True)
        before, found, after = text.partition(said)
        if not found:  # the template changes what was said
            self._check(said)
        ids = [*self.tokenizer.encode_rendered(before), *self.tokenizer.encode(said)]
        return Tokens.text([*ids, *self.tokenizer.encode_rendered(after)], counted=True)

    def _check(self, text: str) -> None:
        """Raises BadChat: a control token in it."""
        if (typed := self._typed(text)) is not None:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise BadChat("control_token", f"the message {shown!r} holds the control token {typed}")

    def _typed(self, text: str) -> str | None:
        """The first control token that a text spells out."""
        typed = self.tokenizer.control_in(text)
        return typed or next((name for name in AddedTokens.NAMES if name in text), None)

    def _stretches(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """(text, whether it is an answer) in turn, beginning with a question; together the whole chat."""
        stretches: list[tuple[str, bool]] = []
        before = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            for stop, answer in ((number, True), (number + 1, False)):
                before = self._extend(stretches, before, messages[:stop], answer)
        if not messages or messages[-1]["role"] != "assistant":
            self._extend(stretches, before, messages, True)
        return stretches

    def _extend(
        self, stretches: list[tuple[str, bool]], before: str, messages: Sequence[Message], answer: bool
    ) -> str:
        """Append what `messages` add to the rendered text `before`, and return the longer text."""
        try:
            text = self.tokenizer.render(messages, self.template, answer=answer)
        except UserError as error:
            raise BadChat("chat_template", str(error)) from None
        if not text.startswith(before):
            start = next((i for i, pair in enumerate(zip(before, text)) if pair[0] != pair[1]), len(text))
            shown = re.sub(r"\s+", " ", before[max(0, start - 20) : start + 20])
            raise BadChat(
                "chat_template",
                f"this chat template changes earlier turns when a chat goes on (near {shown!r}); give another template",
            )
        stretches.append((text[len(before) :], not answer))
        return text


def chat_tokenizer(words: LmTokenizer, first_added_id: int, family: str) -> ChatTokenizer:
    """How conversations are told to a model: as its family is, if that is in `CHAT_TEMPLATES`, or else as its language
    model was. Raises what `ChatTokenizer` raises."""
    return ChatTokenizer(words, first_added_id, family if family in CHAT_TEMPLATES else None)
