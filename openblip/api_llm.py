"""Stage 2 of BLIP-2 and InstructBLIP in a user's hands: the same calls, with a language model that does the talking.

A prompt goes to the language model as it is written; the Q-Former of an InstructBLIP model reads it too, at most 128
tokens of it, of which the last are kept (Dai et al. 2023, as in the released code).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from openblip.api_arguments import Image, listed, options, questioned, row_seeds
from openblip.api_blip import Pipeline
from openblip.config import UserError
from openblip.data.prompts import INSTRUCT_PROMPT, LmTokenizer, Message, Prompt
from openblip.hub import Pretrained
from openblip.models.generation import GenerationConfig
from openblip.models.int8 import to_int8_
from openblip.models.lm import LanguageModel

QUESTION = "Question: {} Short answer:"  # BLIP-2 §4.1
CHOICE = "Question: {} Options: {}. Short answer:"  # InstructBLIP, appendix on its templates
_ROLES = ("system", "user", "assistant")


class LlmPipeline(Pipeline):
    """A `Blip2Llm` with its tokenizers and image transform, ready for use. Made by `api.load`.

    It matches and embeds if the heads of stage 1 were kept.
    """

    # How the papers decode: BLIP-2 §4 captions and answers, InstructBLIP's code talks.
    caption_options: ClassVar[dict[str, Any]] = {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 1}
    answer_options: ClassVar[dict[str, Any]] = {
        **{"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1},
        "length_penalty": -1.0,
    }
    chat_options: ClassVar[dict[str, Any]] = {
        **{"num_beams": 5, "max_new_tokens": 256, "min_new_tokens": 1},
        "repetition_penalty": 1.5,
    }

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "fp32",
        batch_size: int = 16,
    ) -> None:
        if pretrained.lm_tokenizer is None:
            raise UserError(
                "this model came without the tokenizer of its language model, so it cannot be used"
            )
        is_int8 = dtype == "int8"
        super().__init__(pretrained, device=device, dtype="bf16" if is_int8 else dtype, batch_size=batch_size)
        self.lm_tokenizer: LmTokenizer = pretrained.lm_tokenizer
        if is_int8:
            quantise_(self.model.lm)

    @property
    def matcher(self) -> Any:
        """The heads of stage 1; None if the model was saved without."""
        return self.model.blip2 if self.model.config.blip2.encoder else None

    @property
    def can_caption(self) -> bool:
        """Always."""
        return True

    def answer(
        self,
        images: Image | Sequence[Image],
        questions: str | Sequence[str],
        *,
        answers: Sequence[str] | None = None,
        prompt: str = QUESTION,
        **generation: Any,
    ) -> str | list[str]:
        """Answer a question about each image: freely, or, given `answers`, the one of them that fits best.

        prompt: what the model is told, with {} for the question. The best answer is the likeliest as a whole; with
        length_penalty=1, the one whose tokens are the likeliest on average (see `Blip2Llm.rank`).
        """
        config = options(self.answer_options, generation)
        single, images, questions = questioned(images, questions, answers)
        if "{}" not in prompt:
            raise UserError(f"answer: the prompt {prompt!r} has no {{}} where the question goes")
        if not all(question.strip() for question in questions):
            raise UserError("answer: a question has no words")
        prompts = [prompt.replace("{}", question.strip()) for question in questions]
        if answers is None:
            said = self._replies(images, prompts, config)
        else:
            penalty = generation.get("length_penalty", 0.0)
            said = [answers[best] for best in self._best(images, prompts, answers, penalty)]
        return said[0] if single else said

    def choose(
        self,
        images: Image | Sequence[Image],
        questions: str | Sequence[str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        prompt: str = CHOICE,
        length_penalty: float = 0.0,
    ) -> str | list[str]:
        """Multiple choice: which of `choices` answers the question about each image.

        choices: of all images, or a list of them for each. prompt: with {} for the question and {} for the choices,
        which are told as "(a) ..., (b) ...". Each choice is scored by the likelihood of its words (see
        `Blip2Llm.rank`), so the answer does not depend on the model's writing letters.
        """
        single, images, questions = questioned(images, questions, None)
        given: list[Any] = list(choices)
        sets = [given] * len(images) if given and isinstance(given[0], str) else given
        if len(sets) != len(images) or not all(sets):
            raise UserError("choose: give choices, one list for all images or a list for each of them")
        if prompt.count("{}") != 2:
            raise UserError(
                f"choose: the prompt {prompt!r} needs {{}} twice, for the question and the choices"
            )
        told = [", ".join(f"({chr(97 + n)}) {text}" for n, text in enumerate(those)) for those in sets]
        prompts = [
            prompt.replace("{}", question.strip(), 1).replace("{}", those, 1)
            for question, those in zip(questions, told, strict=True)
        ]
        chosen: list[str] = []
        for embeds, part in self.encoded(images):
            for one, text, those in zip(embeds.split(1), prompts[part], sets[part], strict=True):
                chosen.append(those[int(self._scores(one, [text], those, length_penalty).argmax())])
        return chosen[0] if single else chosen

    def chat(
        self,
        images: Image | Sequence[Image],
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        **generation: Any,
    ) -> str | list[str]:
        """Go on with a conversation about each image, by the language model's chat template.

        messages: [{"role": "user", "content": "..."}, ...], the last of them the user's; one conversation for all
        images, or a list of one for each. InstructBLIP's Q-Former reads the last message.

        Raises UserError: no chat template, not such messages, or no room for them.
        """
        config = options(self.chat_options, generation)
        single, images = listed(images)
        given: list[Any] = list(messages)
        talks = [given] * len(images) if not given or isinstance(given[0], Mapping) else given
        if len(talks) != len(images):
            raise UserError(f"chat: {len(images)} images but {len(talks)} conversations; give one per image")
        for talk in talks:
            _check_conversation(talk)
        said = self._replies(images, talks, config)
        return said[0] if single else said

    # --- inside ---------------------------------------------------------------------------------------------

    def _replies(
        self, images: Sequence[Image], prompts: Sequence[Prompt], config: GenerationConfig
    ) -> list[str]:
        said: list[str] = []
        for embeds, part in self.encoded(images):
            with torch.inference_mode():
                shown = self._shown(embeds, prompts[part])
                seeds = row_seeds(config.seed, len(images))[part]
                found = self.model.generate(*shown, config, seeds=seeds).sequences
            said += [self._decode(row) for row in found.tolist()][:: config.num_return_sequences]
        return said

    def _best(
        self, images: Sequence[Image], prompts: Sequence[str], answers: Sequence[str], length_penalty: float
    ) -> list[int]:
        """The index of the best answer for each image. Prompts of one template: they end alike."""
        best: list[int] = []
        for embeds, part in self.encoded(images):
            best += self._scores(embeds, prompts[part], answers, length_penalty).argmax(dim=1).tolist()
        return best

    @torch.inference_mode()
    def _scores(
        self, embeds: Tensor, prompts: Sequence[str], answers: Sequence[str], length_penalty: float
    ) -> Tensor:
        """How likely each answer is for each image [b, C]."""
        soft, ids, mask = self._shown(embeds, prompts)
        those = self.lm_tokenizer.candidates(prompts[0], answers)
        those = {name: value.to(self.device) for name, value in those.items()}
        return self.model.rank(soft, ids, **those, prompt_mask=mask, length_penalty=length_penalty)

    def _shown(self, embeds: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
        """What the language model is shown: soft prompt [b, Q, H], prompt ids and their mask [b, P]."""
        words = self.lm_tokenizer.prompts(prompts)
        read: list[Tensor] = []
        if self.model.config.qformer_text:
            room = min(INSTRUCT_PROMPT, self.model.config.blip2.qformer.max_position_embeddings)
            texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
            found = self.tokenizer(texts, room, keep="end")
            read = [found["input_ids"].to(self.device), found["attention_mask"].to(self.device)]
        soft = self.model.soft_prompt(embeds, *read)
        return soft, words["input_ids"].to(self.device), words["attention_mask"].to(self.device)

    def _write(
        self, embeds: Tensor, prompt: str | None, config: GenerationConfig, seeds: Sequence[int] | None
    ) -> Tensor:
        shown = self._shown(embeds, [self._prompt(prompt)] * len(embeds))
        return self.model.generate(*shown, config, seeds=seeds).sequences

    def _stream(self, embeds: Tensor, prompt: str | None, config: GenerationConfig) -> Iterator[Tensor]:
        shown = self._shown(embeds, [self._prompt(prompt)] * len(embeds))
        return self.model.stream(*shown, config, seeds=row_seeds(config.seed, len(embeds)))

    def _decode(self, ids: list[int]) -> str:
        return self.lm_tokenizer.decode(ids)

    def _require(self, has_part: bool, purpose: str) -> None:
        if not has_part and self.matcher is None and purpose in ("matching", "embedding"):
            raise UserError(f"{purpose}: this model was saved without the heads of stage 1, which do that")
        super()._require(has_part, purpose)


def _check_conversation(messages: Any) -> None:
    """Raises UserError if it is none: a list of messages, the last of which the user's."""
    for message in messages:
        is_sound = isinstance(message, Mapping) and message.get("role") in _ROLES
        if not is_sound or not isinstance(message.get("content"), str):
            raise UserError(
                f'chat: a message is {{"role": {" or ".join(_ROLES)}, "content": a text}}, not {message!r}'
            )
    if not messages or messages[-1]["role"] != "user":
        raise UserError("chat: the last message of a conversation must be the user's")


def quantise_(lm: LanguageModel) -> None:
    """8 bits for the linear layers of a language model, all but the last. Raises UserError: it has adapters."""
    if lm.config.lora is not None:
        raise UserError(
            'dtype "int8": this language model has adapters, which need floating point; use "bf16"'
        )
    to_int8_(lm.model, keep=(lm.model.get_output_embeddings(),))
