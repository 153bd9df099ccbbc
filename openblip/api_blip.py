"""BLIP, its VQA model, stage 1 of BLIP-2 and CLIP in a user's hands: caption, match, answer, embed, localise.

Images are paths, bytes, PIL images or lists of them; results are strings, floats and NumPy arrays. Every
image goes through the model's own transform, every text through its own tokenizer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from openblip.api_arguments import Image, ahead, check_room, listed, options, questioned, row_seeds
from openblip.config import UserError
from openblip.data.image import open_image
from openblip.data.text import Tokenizer, clean_caption, clean_question
from openblip.data.transforms import ImageTransform
from openblip.hub import Pretrained
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.blip_vqa import BlipVqa
from openblip.models.clip import Clip
from openblip.models.generation import GenerationConfig, stream
from openblip.models.localize import localize, merge_word_pieces
from openblip.models.packed import pack_
from openblip.models.vit import ImageTower

MAX_CAPTION_TOKENS = 35  # the released code's limit when matching and embedding
_MAY_CHANGE = ("\ufffd", "'")  # an end of a text that more tokens may turn into another
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Match:
    """How well text and image go together: P(match) of the ITM head, cosine of the ITC features; arrays [B]."""

    probability: np.ndarray
    cosine: np.ndarray


@dataclass
class Localization:
    """Where a text looks: one heat map [h, w] in 0…1 per word, in `maps` [W, h, w]; `mean` is their mean, so scaled."""

    words: list[str]
    maps: np.ndarray
    mean: np.ndarray
    image: PILImage.Image

    def picture(self) -> PILImage.Image:
        """The image with each word's heat map over it, side by side."""
        from openblip.picture import draw_heatmaps

        return draw_heatmaps(self.image, ["mean", *self.words], np.stack([self.mean, *self.maps]))


class Pipeline:
    """A model with its tokenizer and image transform, ready for use. Made by `api.load`."""

    # Unless a caller says otherwise: the beams of BLIP's evaluation.
    caption_options: ClassVar[dict[str, Any]] = {"num_beams": 3, "max_new_tokens": 20}
    answer_options: ClassVar[dict[str, Any]] = {"num_beams": 3, "max_new_tokens": 9, "min_new_tokens": 1}

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "fp32",
        batch_size: int = 16,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is for language models; this model takes {' or '.join(DTYPES)}")
        self.model = pack_(pretrained.model.eval().requires_grad_(False).to(device))
        _cast_(self.model, DTYPES[dtype])
        reads = self.model.config.text is not None
        if pretrained.transform is None or (pretrained.tokenizer is None and reads):
            raise UserError(
                "this model came without its tokenizer or its image transform, so it cannot be used"
            )
        self.tokenizer = cast(Tokenizer, pretrained.tokenizer)  # None where nothing is read, as said above
        self.transform: ImageTransform = pretrained.transform
        self.info: dict[str, Any] = pretrained.info
        self.device, self.dtype, self.batch_size = torch.device(device), DTYPES[dtype], batch_size

    @property
    def matcher(self) -> Any:
        """The part of the model that embeds images and texts in one space; None if it has none."""
        has_heads = isinstance(self.model, Blip | Blip2) and self.model.config.encoder
        return self.model if has_heads or isinstance(self.model, Clip) else None

    @property
    def can_caption(self) -> bool:
        """Whether there is a decoder that writes captions."""
        return isinstance(self.model, Blip | Blip2) and self.model.config.decoder

    @property
    def can_match(self) -> bool:
        """Whether there is an ITM head. CLIP has none: its cosine is all there is."""
        return self.matcher is not None and not isinstance(self.matcher, Clip)

    # --- what users ask for ---------------------------------------------------------------------------------

    def caption(
        self,
        images: Image | Sequence[Image],
        prompt: str | None = None,
        *,
        seeds: Sequence[int] | None = None,
        **generation: Any,
    ) -> str | list[str] | list[list[str]]:
        """Captions: a string for one image, a list for a list (of lists with num_return_sequences > 1).

        prompt: the words a caption begins with; they are not part of the result. None takes the model's own, which
        it was trained with (`info["prompt"]`; none in transformers' folders), "" none. Options are those of
        transformers: num_beams, max_new_tokens, min_new_tokens, do_sample, top_p, temperature,
        repetition_penalty, length_penalty, num_return_sequences, seed. `seeds`: one per image, for sampling
        that does not depend on the batch.
        """
        self._require(self.can_caption, "captioning")
        config = options(self.caption_options, generation)
        single, images = listed(images)
        seeds = list(seeds) if seeds is not None else row_seeds(config.seed, len(images))
        if len(seeds) != len(images):
            raise UserError(f"caption: {len(images)} images but {len(seeds)} seeds; give one per image")
        captions = self._captions(images, prompt, config, seeds)
        flat = captions if config.num_return_sequences > 1 else [texts[0] for texts in captions]
        return flat[0] if single else flat

    def caption_stream(self, image: Image, prompt: str | None = None, **generation: Any) -> Iterator[str]:
        """The caption of one image, piece by piece as it is written (greedy or sampled, no beams)."""
        self._require(self.can_caption, "captioning")
        config = options({**self.caption_options, "num_beams": 1}, generation)
        return self._pieces(image, lambda embeds: self._stream(embeds, prompt, config))

    @torch.inference_mode()  # around each step of the generator, not around what the caller does in between
    def _pieces(self, image: Image, write: Callable[[Tensor], Iterator[Tensor]]) -> Iterator[str]:
        embeds, _ = next(self.encoded([image]))
        yield from spoken(write(embeds), self._decode)

    def match(
        self, images: Image | Sequence[Image], texts: str | Sequence[str] | Sequence[Sequence[str]]
    ) -> Match:
        """P(match) and cosine of image i with text i; with a list of texts per image, arrays [B, texts].

        One image may be given with many texts (arrays [texts], also for a single one), or one text with many
        images.
        """
        self._require(self.can_match, "matching")
        single, images = listed(images)
        if not images:
            raise UserError("match: no image given")
        given: list[Any] = [texts] if isinstance(texts, str) else list(texts)
        if single and (not given or isinstance(given[0], str)):
            given = [given]
        elif len(given) == 1 and len(images) > 1:
            given = given * len(images)
        if len(given) != len(images):
            raise UserError(
                f"match: {len(images)} images but {len(given)} texts; give one text (or list) per image"
            )
        per_image = [[text] if isinstance(text, str) else list(text) for text in given]
        if len({len(row) for row in per_image}) > 1 or not per_image[0]:
            raise UserError("match: every image needs the same number of texts, one or more")
        found = [self.match_embeds(embeds, per_image[part]) for embeds, part in self.encoded(images)]
        probability = np.concatenate([one.probability for one in found])
        cosine = np.concatenate([one.cosine for one in found])
        flat = all(isinstance(text, str) for text in given)
        if single:
            probability, cosine = probability[0], cosine[0]
        elif flat:
            probability, cosine = probability[:, 0], cosine[:, 0]
        return Match(probability, cosine)

    def answer(
        self,
        images: Image | Sequence[Image],
        questions: str | Sequence[str],
        *,
        answers: Sequence[str] | None = None,
        **generation: Any,
    ) -> str | list[str]:
        """Answer a question about each image: freely, or, given `answers`, the one of them that fits best."""
        self._require(isinstance(self.model, BlipVqa), "question answering")
        config = options(self.answer_options, generation)
        single, images, questions = questioned(images, questions, answers)
        said: list[str] = []
        for embeds, part in self.encoded(images):
            with torch.inference_mode():
                asked = self.tokens([clean_question(question) for question in questions[part]])
                memory = self.model.question_memory(embeds, asked["input_ids"], asked["attention_mask"])
                if answers is None:
                    found = self.model.generate(memory, config)
                    best_of = found.sequences.tolist()[:: config.num_return_sequences]
                    said += [self.tokenizer.decode(row) for row in best_of]
                else:
                    candidates = self.tokens(list(answers))
                    best = self.model.rank(memory, candidates["input_ids"], candidates["attention_mask"])
                    said += [answers[index] for index in best.tolist()]
        return said[0] if single else said

    def embed_images(self, images: Image | Sequence[Image]) -> np.ndarray:
        """float32 [B, P] ([P] for one image): token 0 projected and L2-normalised, the ITC vector.

        Its dot product with `embed_texts` is the cosine that retrieval ranks by. BLIP-2 gives one vector per
        query, [B, Q, P]; there it is the largest of the Q dot products (see `similarity`). An image tower by itself
        gives its token 0 as it is.
        """
        model: Any = self.model if isinstance(self.model, ImageTower) else self.matcher
        self._require(model is not None, "embedding")
        single, images = listed(images)
        if not images:
            queries = [model.config.qformer.num_query_tokens] if isinstance(model, Blip2) else []
            width = getattr(model.config, "projection_dim", None) or model.config.output_size
            return np.zeros((0, *queries, width), np.float32)
        with torch.inference_mode():
            parts = [model.image_features(embeds).float().cpu() for embeds, _ in self.encoded(images)]
        vectors = torch.cat(parts).numpy()
        return vectors[0] if single else vectors

    def embed_texts(self, texts: str | Sequence[str]) -> np.ndarray:
        """float32 [R, P] ([P] for one text): [CLS] projected and L2-normalised (CLIP: the end-of-text token)."""
        self._require(self.matcher is not None, "embedding")
        single, texts = (True, [texts]) if isinstance(texts, str) else (False, list(texts))
        if not texts:
            return np.zeros((0, self.matcher.config.projection_dim), np.float32)
        vectors = np.concatenate(
            [self._text_features(texts[i : i + 64]).float().cpu().numpy() for i in range(0, len(texts), 64)]
        )
        return vectors[0] if single else vectors

    def similarity(self, image_vectors: np.ndarray, text_vectors: np.ndarray) -> np.ndarray:
        """What `embed_images` and `embed_texts` gave for B images and R texts -> cosines float32 [B, R]."""
        self._require(self.matcher is not None, "embedding")
        images, texts = torch.from_numpy(image_vectors), torch.from_numpy(text_vectors)
        return self.matcher.similarity(images, texts).numpy()

    def localize(self, image: Image, text: str, *, layer: int | None = None) -> Localization:
        """Where the ITM head looks for each word of the text: Grad-CAM of cross-attention (see `models.localize`)."""
        self._require(isinstance(self.model, Blip) and self.model.config.encoder, "localisation")
        picture = open_image(image)
        tokens = self.tokens([clean_caption(text)])
        depth = self.model.config.text.num_hidden_layers
        if tokens["input_ids"].shape[1] < 3:
            raise UserError(f"localize: there is no word in {text!r}")
        if layer is not None and not 0 <= layer < depth:
            raise UserError(f"localize: layer {layer}; the text encoder has layers 0 to {depth - 1}")
        pixel_values = self.transform(picture)[None].to(self.device, self.dtype)
        patch = self.model.config.vision.patch_size
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        embeds = self.model.encode_image(pixel_values)
        maps = localize(self.model, embeds, grid, **tokens, layer=layer)[0, 1:-1]  # without [ENC] and [SEP]
        pieces = [self.tokenizer.decode([token]) for token in tokens["input_ids"][0, 1:-1].tolist()]
        words, maps = merge_word_pieces(pieces, maps)
        scale = maps.amax().clamp(min=1e-12)
        arrays = (maps / scale).float().cpu().numpy()
        mean = arrays.mean(axis=0)
        return Localization(words, arrays, mean / max(mean.max(), 1e-12), picture)

    # --- the same on image embeddings, for callers that hold many texts per image ---------------------------

    def encoded(self, images: Sequence[Image]) -> Iterator[tuple[Tensor, slice]]:
        """(image_embeds [b, N, D], which images they are) batch by batch; the next batch is decoded meanwhile."""

        def pixels(part: slice) -> Tensor:
            size = self.transform.draft_size  # what is larger may be decoded at a fraction of its size
            return torch.stack([self.transform(open_image(one, draft_size=size)) for one in images[part]])

        parts = [
            slice(i, min(i + self.batch_size, len(images))) for i in range(0, len(images), self.batch_size)
        ]
        for part, values in zip(parts, ahead(pixels, parts), strict=True):
            with torch.inference_mode():
                embeds = self.model.encode_image(values.to(self.device, self.dtype))
            yield embeds, part

    @torch.inference_mode()
    def caption_embeds(
        self,
        embeds: Tensor,
        prompt: str | None,
        config: GenerationConfig,
        seeds: Sequence[int] | None = None,
    ) -> list[list[str]]:
        """num_return_sequences captions for each of image_embeds [b, N, D]."""
        texts = [self._decode(row) for row in self._write(embeds, prompt, config, seeds).tolist()]
        n = config.num_return_sequences
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    @torch.inference_mode()
    def match_embeds(self, embeds: Tensor, texts: Sequence[Sequence[str]]) -> Match:
        """texts: k of them for each of image_embeds [b, N, D] -> arrays [b, k]. The image is projected once."""
        flat = [clean_caption(text) for row in texts for text in row]
        tokens = self.tokens(flat)
        images, shape = len(texts), (len(texts), -1)
        memory = self.matcher.encoder_memory(embeds)
        logits = self.matcher.itm_logits(memory, tokens["input_ids"], tokens["attention_mask"])
        features = self.matcher.text_features(tokens["input_ids"], tokens["attention_mask"])
        every = self.matcher.similarity(self.matcher.image_features(embeds), features)  # [b, b · k]
        own = torch.arange(images, device=every.device)
        cosine = every.view(images, *shape)[own, own]
        probability = logits.float().softmax(dim=-1)[:, 1].view(shape)
        return Match(probability.cpu().numpy(), cosine.float().cpu().numpy())

    def match_ragged(self, embeds: Tensor, texts: Sequence[Sequence[str]]) -> list[Match]:
        """`match_embeds` for images with different numbers of texts: one Match per image, arrays of its length."""
        width = max(len(row) for row in texts)
        padded = [[*row, *[""] * (width - len(row))] for row in texts]
        found = self.match_embeds(embeds, padded)
        return [
            Match(probability[: len(row)], cosine[: len(row)])
            for row, probability, cosine in zip(texts, found.probability, found.cosine, strict=True)
        ]

    # --- inside ---------------------------------------------------------------------------------------------

    def _captions(
        self, images: Sequence[Image], prompt: str | None, config: GenerationConfig, seeds: Sequence[int]
    ) -> list[list[str]]:
        """num_return_sequences captions of each image."""
        captions: list[list[str]] = []
        for embeds, part in self.encoded(images):
            captions += self.caption_embeds(embeds, prompt, config, seeds[part])
        return captions

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [R, L] of texts, padded to the longest, on the model's device."""
        found = self.tokenizer(list(texts), max_length=MAX_CAPTION_TOKENS)
        return {name: value.to(self.device) for name, value in found.items()}

    @torch.inference_mode()
    def _text_features(self, texts: list[str]) -> Tensor:
        if isinstance(self.matcher, Clip):
            tokens = self.tokenizer(texts, max_length=self.matcher.config.text.max_position_embeddings)
            tokens = {name: value.to(self.device) for name, value in tokens.items()}
        else:
            tokens = self.tokens([clean_caption(text) for text in texts])
        return self.matcher.text_features(tokens["input_ids"], tokens["attention_mask"])

    def _write(
        self, embeds: Tensor, prompt: str | None, config: GenerationConfig, seeds: Sequence[int] | None
    ) -> Tensor:
        """Ids of captions [b · n, T] for image_embeds [b, N, D]; what `_decode` reads."""
        memory, ids = self.model.decoder_memory(embeds), self._prompt_ids(prompt, len(embeds), config)
        return self.model.generate(memory, ids, config, seeds=seeds).sequences

    def _stream(self, embeds: Tensor, prompt: str | None, config: GenerationConfig) -> Iterator[Tensor]:
        """The columns of what `_write` returns, each as soon as it is known."""
        text = self.model.config.text
        ids = self._prompt_ids(prompt, len(embeds), config)
        ids[:, 0] = text.dec_token_id
        return stream(
            self.model.decoding_step(self.model.decoder_memory(embeds)),
            ids,
            config,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            seeds=row_seeds(config.seed, len(embeds)),
        )

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def _prompt(self, prompt: str | None) -> str:
        """None: the words the model was trained to begin with, if any."""
        return self.info.get("prompt", "") if prompt is None else prompt

    def _prompt_ids(self, prompt: str | None, rows: int, config: GenerationConfig) -> Tensor:
        """[CLS] and the prompt's words, without [SEP]: [rows, L]. Raises UserError: no room for what is asked for."""
        ids = self.tokens([self._prompt(prompt)])["input_ids"][:, :-1]
        check_room(self.model.config.text.max_position_embeddings, ids.shape[1], config)
        return ids.repeat(rows, 1)

    def _require(self, has_part: bool, purpose: str) -> None:
        if not has_part:
            raise UserError(f"{purpose}: this {type(self.model).__name__} model has no part for it")


def spoken(columns: Iterator[Tensor], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """A text piece by piece, as its tokens [1] come; a piece waits until no further token can change it."""
    ids: list[int] = []
    said = now = ""
    for token in columns:
        ids.append(int(token[0]))
        now = decode(ids)
        if not now.endswith(_MAY_CHANGE):
            yield now[len(said) :]
            said = now
    if said != now:
        yield now[len(said) :]


def _cast_(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: buffers, such as the frequencies of rotary embeddings, are as exact as they must be."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
