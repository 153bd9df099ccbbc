"""BLIP-3 / xGen-MM (Xue et al. 2024): any-resolution pictures among the words of a language model.

    picture ─ base + tiles [1 + T, 3, S, S] ─ image tower (frozen) ─ groups of N tokens ─ resampler ─ K tokens each
                                                                                              │
    ids   <|user|> what is this <image><image>…<image> ? <|assistant|>                        │
    words     e        e  e  e     └───────── replaced by ───────────┘ ◄──────────────────────┘
    └─────────────────────────── language model ── next word

An image stands in the text as a run of `<image>` ids, one for each of its vision tokens: `Blip3Config.vision_length`.
What is trained: the resampler, the added words, and of the language model nothing, adapters, or all.

Shapes: B rows of text, L their tokens, T tiles of all images together, N = n · n tokens of a tile, D their width,
I images in order of appearance, K tokens the resampler makes of a tile, H width of the language model, V its
vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openblip.config import ConfigError
from openblip.models.decoding import Decoding
from openblip.models.generation import Generated, GenerationConfig, generate, stream
from openblip.models.lm import LanguageModel, LmConfig
from openblip.models.resampler import PerceiverResampler, ResamplerConfig
from openblip.models.temporal import TemporalConfig, build_temporal
from openblip.models.tiling import content_mask, merge_tiles, regroup
from openblip.models.tower import TowerModel
from openblip.models.vit import VisionConfig

ADDED_TOKENS = (
    "<image>",
    "<image placeholder>",
    "<|endofchunk|>",
)  # their order is that of the released weights
Sampling = Literal["anyres", "fixed", "anyres_fixed_sampling"]


@dataclass
class Blip3Config:
    """xGen-MM's geometry by default, but for the image tower, whose own is ViT-B/16's.

    sampling: "anyres" samples each tile by itself; "fixed" sees the picture squashed into one tile;
        "anyres_fixed_sampling" samples all tiles together, once (the paper's ablation).
    tile_grouping: what "anyres" gives the resampler at a time: each "tile", or, as the released weights were trained,
        as many tokens in the reading order of the whole canvas, a "strip".
    grids: (columns, rows) of tiles that a picture may be cut into; of two that fit alike the first is taken.
    temporal: for video: what becomes of the tokens of its frames.

    Raises ConfigError: parts that do not fit each other, or a language model with an encoder or without added tokens.
    """

    lm: LmConfig
    vision: VisionConfig = field(default_factory=VisionConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    sampling: Sampling = "anyres"
    tile_grouping: Literal["strip", "tile"] = "tile"
    grids: list[tuple[int, int]] = field(default_factory=lambda: [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)])
    temporal: TemporalConfig | None = None
    freeze_vision: bool = True

    def __post_init__(self) -> None:
        width = self.vision.output_size
        if self.resampler.hidden_size != width:
            raise ConfigError(
                f"resampler.hidden_size is {self.resampler.hidden_size}, the image tower's {width}"
            )
        if self.lm.added_tokens != len(ADDED_TOKENS):
            raise ConfigError(
                f"lm.added_tokens is {self.lm.added_tokens}, wanted {len(ADDED_TOKENS)}: {ADDED_TOKENS}"
            )
        if self.sampling != "fixed" and not self.grids:
            raise ConfigError(f"grids: none, and the sampling {self.sampling!r} cuts pictures into tiles")
        if self.resampler.max_frames is not None:
            raise ConfigError(
                f"resampler.max_frames is {self.resampler.max_frames}: here it samples frame by frame, and `temporal` "
                "puts them together; wanted null"
            )
        if self.temporal is not None and self.temporal.frame_tokens != self.resampler.num_latents:
            raise ConfigError(
                f"temporal.frame_tokens is {self.temporal.frame_tokens}, what the resampler makes of a frame "
                f"{self.resampler.num_latents} (num_latents)"
            )
        if self.temporal is not None and self.temporal.hidden_size != self.resampler.output_size:
            raise ConfigError(
                f"temporal.hidden_size is {self.temporal.hidden_size}, what comes out of the resampler "
                f"{self.resampler.output_size}"
            )

    @property
    def tile_side(self) -> int:
        """Tokens of a tile across and down, n."""
        return self.vision.image_size // self.vision.patch_size

    @property
    def text(self) -> None:
        """Nothing but the language model reads text: there is no other tokenizer to agree with."""
        return None

    @property
    def used_grids(self) -> tuple[tuple[int, int], ...]:
        """The grids a picture is cut into: none for "fixed"."""
        return () if self.sampling == "fixed" else tuple((columns, rows) for columns, rows in self.grids)

    def vision_length(self, columns: int, rows: int, frames: int = 1) -> int:
        """Vision tokens, and so `<image>` ids, of a picture cut into columns x rows tiles (0, 0: uncut), or of a video.

        Raises ValueError: a video, and there is no temporal encoder.
        """
        if frames > 1:
            if self.temporal is None:
                raise ValueError(f"a video of {frames} frames, and this model has no temporal encoder")
            return self.temporal.num_tokens
        groups = 1 + columns * rows if self.sampling == "anyres" else 1
        return self.resampler.num_latents * groups


class Blip3(TowerModel):
    """Image tower, resampler, language model. `lm`: the one with its weights; None: fresh ones.

    Raises ConfigError: the language model has an encoder, or another width than comes out of the resampler.
    """

    config: Blip3Config

    def __init__(self, config: Blip3Config, lm: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.resampler = PerceiverResampler(config.resampler)
        self.temporal = None if config.temporal is None else build_temporal(config.temporal)
        self.lm = LanguageModel(config.lm) if lm is None else lm
        if self.lm.is_encoder_decoder:
            raise ConfigError(
                "lm: BLIP-3 puts pictures among the words, so its language model is decoder-only"
            )
        if self.lm.hidden_size != config.resampler.output_size:
            raise ConfigError(
                f"resampler.output_size is {config.resampler.output_size}, the language model's width "
                f"{self.lm.hidden_size}"
            )

    @property
    def image_token_id(self) -> int:
        """The id that stands for one vision token."""
        return self.lm.first_added_id

    @property
    def end_of_chunk_id(self) -> int:
        """The id that ends a text which belongs to an image, in interleaved documents."""
        return self.lm.first_added_id + ADDED_TOKENS.index("<|endofchunk|>")

    def vision_runs(
        self,
        tile_embeds: Tensor,
        grids: Tensor,
        *,
        frames: Sequence[int] | None = None,
        condition_ids: Tensor | None = None,
        condition_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """What the language model sees of each image: I tensors [K · groups, H].

        Args:
            tile_embeds: [T, 1 + N, D] of `encode_image`, base first, then tiles row by row, image after image.
            grids: [I, 4] int64: columns and rows of tiles, width and height of the picture. (0, 0, ...): base alone.
            frames: images that are videos have more than 1: so many bases, one per frame.
            condition_ids, condition_mask: [I, L'] text that tells the resampler what matters, if it is made for that.

        Raises ValueError: the tiles are not as many as the grids say, or there is a condition and no use for it.
        """
        frames = [1] * len(grids) if frames is None else list(frames)
        counts = [f * (1 + c * r) for f, (c, r) in zip(frames, grids[:, :2].tolist(), strict=True)]
        if sum(counts) != len(tile_embeds):
            raise ValueError(
                f"{len(tile_embeds)} tiles, and the grids of {len(grids)} images ask for {sum(counts)}"
            )
        if (condition_ids is None) != (self.config.resampler.condition_size is None):
            raise ValueError("a condition is what a resampler with condition_size reads, and no other")
        if not counts:
            return []
        patches = tile_embeds[:, 1:]  # without the summary token
        together = self.config.sampling == "anyres_fixed_sampling"
        groups, masks = [], []
        for tiles, (columns, rows, width, height) in zip(patches.split(counts), grids.tolist(), strict=True):
            tokens, real = self._groups(tiles, columns, rows, width, height)
            groups.append(tokens.flatten(0, 1)[None] if together and columns else tokens)
            masks.append(real.flatten()[None] if together and columns else real)
        sizes = [len(tokens) for tokens in groups]
        x, mask = (_stacked(groups), _stacked(masks)) if together else (torch.cat(groups), torch.cat(masks))
        condition: dict[str, Tensor] = {}
        if condition_ids is not None:
            assert condition_mask is not None
            repeats = torch.tensor(sizes, device=x.device)
            words = self.lm.embed(condition_ids).detach().to(x.dtype)
            condition["condition"] = words.repeat_interleave(repeats, dim=0)
            condition["condition_mask"] = condition_mask.bool().repeat_interleave(repeats, dim=0)
        seen = self.resampler(x, None if bool(mask.all()) else mask, **condition).split(sizes)
        return [self._run(tokens, count) for tokens, count in zip(seen, frames, strict=True)]

    def embed(self, input_ids: Tensor, runs: Sequence[Tensor], image_index: Tensor | None = None) -> Tensor:
        """Words and vision tokens: input_ids [B, L] and the runs of their images -> [B, L, H].

        image_index [J]: the image of each run of `<image>` ids, in order of appearance, where texts share images.
        Raises ValueError: there are more or fewer `<image>` ids than vision tokens.
        """
        words = self.lm.embed(input_ids)
        places = input_ids == self.image_token_id
        chosen = list(runs) if image_index is None else [runs[i] for i in image_index.tolist()]
        have, wanted = sum(map(len, chosen)), int(places.sum())
        if have != wanted:
            raise ValueError(f"{wanted} <image> ids in the texts, and {have} vision tokens to put there")
        if not chosen:
            return words
        return words.masked_scatter(places[..., None], torch.cat(chosen).to(words.dtype))

    def labelled_logits(
        self, embeds: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logits [M, V], their labels [M]) where labels [B, L] are not −100, and nowhere else; padding last.

        embeds [B, L, H]; logits of a label come from the token before it. position_ids: see `LanguageModel.states_of`.
        """
        wanted = labels[:, 1:] != -100
        states = self.lm.states_of(embeds, position_ids)[:, :-1][wanted]
        return self.lm.logits(states), labels[:, 1:][wanted]

    def generate(
        self,
        embeds: Tensor,
        mask: Tensor,
        config: GenerationConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
        ends: Sequence[int] = (),
    ) -> Generated:
        """Continue what is embedded [B, L, H]; mask [B, L], 0 for padding, anywhere. See `generation.generate`.

        ends: see `ends`. Raises UserError: prompt and new tokens do not fit into the context.
        """
        decoding = self.begin(embeds, mask)
        config = config or GenerationConfig()
        decoding.require_room(config.max_new_tokens)
        return generate(self.step(decoding), decoding.start_ids, config, seeds=seeds, **self.ends(ends))

    def stream(
        self,
        decoding: Decoding,
        config: GenerationConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """The columns of what `generate` returns, each as soon as it is known; `decoding` is from `begin`."""
        config = config or GenerationConfig()
        decoding.require_room(config.max_new_tokens)
        return stream(self.step(decoding), decoding.start_ids, config, seeds=seeds, **self.ends())

    def begin(self, embeds: Tensor, mask: Tensor) -> Decoding:
        """What is read of prompts [B, L, H], to be continued, and gone on with in a conversation."""
        return self.lm.continue_from(embeds, mask.bool())

    def step(self, decoding: Decoding) -> Any:
        """The step of `generation`: next-word logits, in which pictures are no words."""
        first = self.image_token_id

        def step(ids: Tensor, parents: Tensor | None) -> Tensor:
            logits = decoding(ids, parents)
            logits[:, first : self.end_of_chunk_id] = -torch.inf
            return logits

        return step

    def ends(self, more: Sequence[int] = ()) -> dict[str, Any]:
        """The tokens that end a text, and the one that fills what stands behind.

        more: further ones, such as a chat template's, which may be another than ends the language model's texts.
        """
        ids = dict.fromkeys([*self.lm.eos_token_ids, self.end_of_chunk_id, *more])
        return {"eos_token_id": list(ids), "pad_token_id": self.lm.pad_token_id}

    def _groups(
        self, tiles: Tensor, columns: int, rows: int, width: int, height: int
    ) -> tuple[Tensor, Tensor]:
        """A picture's tokens in groups [G, N, D], base first, and which of them show the picture [G, N]."""
        side = self.config.tile_side
        real = torch.ones(tiles.shape[:2], dtype=torch.bool, device=tiles.device)
        if columns * rows == 0:
            return tiles, real
        canvas = merge_tiles(tiles[1:], columns, rows)
        shown = content_mask(columns, rows, side, width, height).to(tiles.device)
        grouped, mask = regroup(canvas, shown, self.config.tile_grouping, side)
        return torch.cat([tiles[:1], grouped]), torch.cat([real[:1], mask])

    def _run(self, tokens: Tensor, frames: int) -> Tensor:
        """One image's groups [G, K, H] as one run; a video's through the temporal encoder."""
        if frames == 1:
            return tokens.flatten(0, 1)
        if self.temporal is None:
            raise ValueError(f"a video of {frames} frames, and this model has no temporal encoder")
        return self.temporal(tokens[None])[0]


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """[G, N_i, ...] of several lengths in one tensor, filled up with zeros, or False."""
    return nn.utils.rnn.pad_sequence([row for group in rows for row in group], batch_first=True)
