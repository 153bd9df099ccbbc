"""BLIP-3 beside transformers' LLaVA of the same sizes, on random weights.

    python benchmarks/blip3.py [--only train words anyres tiles chat] [--runs 5] [--quick] [--clock cpu]

train    one training step, tower frozen, language model trained whole; chats of 40 to 59 words about one picture
words    30 greedy words about each of 4 pictures
anyres   64 greedy words about one picture of 5 tiles, against transformers' LLaVA-NeXT
tiles    the tower and the resampler on all tiles of some pictures at once, against one tile at a time
chat     the second answer of a chat, its first word and 64, going on from the cache, against reading all of it again

Tower, language model and texts are equal on both sides; what lies between is not, and is the nature of the two: LLaVA
projects each of the tower's N tokens, ours resamples them to K. So there are two lines: with K = N the language models
read as much, and ours pays for its resampler; with K = 64, which is how it is meant, they do not.
"""

from typing import Any

import torch
from blip2 import SMOLLM2
from paired import Bench, main, same_ids
from torch import Tensor

from openblip.models.blip3 import ADDED_TOKENS, Blip3, Blip3Config
from openblip.models.clip import clip_vision
from openblip.models.generation import GenerationConfig
from openblip.models.lm import LmConfig
from openblip.models.packed import pack_
from openblip.models.resampler import ResamplerConfig
from openblip.models.vit import VisionConfig
from openblip.train.tasks_blip3 import Blip3Task, Blip3TaskConfig

USUAL = 64  # K of ours
QUICK: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
Batch = dict[str, Tensor]


def sizes(quick: bool) -> tuple[VisionConfig, dict[str, Any]]:
    """CLIP's ViT-B/16 at 224 px and SmolLM2-135M's geometry."""
    if not quick:
        return clip_vision(), dict(SMOLLM2)
    small = {**QUICK, "intermediate_size": 96}
    return clip_vision(**small), {**SMOLLM2, **small, "vocab_size": 512, "num_key_value_heads": 3}


def tower_tokens(vision: VisionConfig) -> int:
    """N, without the class token."""
    return (vision.image_size // vision.patch_size) ** 2


def our_model(latents: int, quick: bool, **changes: Any) -> Blip3:
    """Ours; the tower is frozen."""
    vision, lm = sizes(quick)
    width = vision.hidden_size
    resampler = ResamplerConfig(
        width, latents, 2 if quick else 6, width // 64 or 1, 64, output_size=lm["hidden_size"]
    )
    language = LmConfig(lm, trainable=True, added_tokens=len(ADDED_TOKENS))
    return Blip3(Blip3Config(language, vision, resampler, **{"sampling": "fixed", **changes}))


def their_model(quick: bool) -> Any:
    """transformers' LLaVA; the tower is frozen, and all its layers are used."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, lm = sizes(quick)
    names = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "hidden_act")  # fmt: skip
    tower = CLIPVisionConfig(**{name: getattr(vision, name) for name in names})
    config = LlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**lm), vision_feature_layer=-1,
        image_token_index=lm["vocab_size"] - 1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return model


def check_sizes(ours: Blip3, theirs: Any) -> None:
    """Stop unless towers and language models are as large as each other, but for a norm that LLaVA has no use for."""
    count = [sum(weight.numel() for weight in part.parameters()) for part in (
        ours.vision, theirs.model.vision_tower, ours.lm.model.base_model, theirs.model.language_model,
    )]  # fmt: skip
    assert 0 <= count[1] - count[0] <= 2 * ours.config.vision.hidden_size, count
    assert count[2] == count[3], count


def chats(rows: int, vision_tokens: int, image_id: int, words: int, config: VisionConfig) -> Batch:
    """A picture, a question, an answer of half the words; padded to the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = words + torch.arange(rows) * 19 % 20
    width = int(lengths.max())
    ids = torch.randint(10, 400, (rows, width), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    counted = (torch.arange(width) >= lengths[:, None] // 2) & mask.bool()
    runs = torch.full((rows, vision_tokens), image_id)
    side = config.image_size
    return {
        "input_ids": torch.cat([runs, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(runs), mask], dim=1),
        "labels": torch.cat([torch.full_like(runs, -100), ids.where(counted, -100)], dim=1),
        "pixel_values": torch.randn(rows, 3, side, side, generator=generator),
        "grids": torch.tensor([[0, 0, side, side]] * rows),
    }


def our_step(model: Blip3, batch: Batch) -> None:
    """Forward and backward."""
    model.zero_grad()
    task = Blip3Task(model, Blip3TaskConfig())
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(batch)["lm"]
    loss.backward()


def their_step(model: Any, batch: Batch) -> None:
    """Forward and backward."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**{name: value for name, value in batch.items() if name != "grids"}).loss
    loss.backward()


def sides(latents: int | None, rows: int, quick: bool, words: int = 40) -> tuple[Blip3, Batch, Any, Batch]:
    """Both models with a batch each. latents None: as many as the tower has tokens."""
    torch.manual_seed(0)
    vision = sizes(quick)[0]
    tokens = tower_tokens(vision)
    ours, theirs = our_model(latents or tokens, quick), their_model(quick)
    check_sizes(ours, theirs)
    own = chats(rows, latents or tokens, ours.image_token_id, words, vision)
    other = chats(rows, tokens, theirs.config.image_token_index, words, vision)
    return ours, own, theirs, other


def train(bench: Bench) -> None:
    """One step of instruction tuning."""
    for latents in (None, USUAL):
        train_one(latents, bench)


def train_one(latents: int | None, bench: Bench, rows: int = 8) -> None:
    """The same, for one K."""
    ours, own, theirs, other = sides(latents, rows, bench.quick)
    ours.train()
    theirs.train()
    name = f"training step, batch {rows}, bf16, K = {latents or 'N'}"
    calls = lambda: their_step(theirs, other), lambda: our_step(ours, own)
    bench.paired(name, *calls, None, dtype=torch.bfloat16)


def words(bench: Bench) -> None:
    """Greedy words behind prompts of mixed lengths."""
    for dtype in bench.precisions:
        for latents in (None, USUAL):
            words_one(dtype, latents, bench)


def words_one(dtype: torch.dtype, latents: int | None, bench: Bench, rows: int = 4, new: int = 30) -> None:
    """The same, in one precision and for one K."""
    ours, own, theirs, other = sides(latents, rows, bench.quick, words=10)
    pack_(ours.eval().requires_grad_(False).to(dtype))
    theirs.eval().requires_grad_(False).to(dtype)
    pixels = own["pixel_values"].to(dtype)
    settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new)
    padding = (other["attention_mask"] == 0).sum(dim=1).tolist()
    ids, mask = (  # transformers wants the padding first
        torch.stack([row.roll(count) for row, count in zip(other[name], padding)])
        for name in ("input_ids", "attention_mask")
    )

    @torch.inference_mode()
    def our_words() -> Tensor:
        embeds = ours.embed(own["input_ids"], ours.vision_runs(ours.encode_image(pixels), own["grids"]))
        return ours.generate(embeds, own["attention_mask"], settings).sequences

    @torch.inference_mode()
    def their_words() -> Tensor:
        return theirs.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, do_sample=False, max_new_tokens=new,
            min_new_tokens=new, eos_token_id=2, pad_token_id=2,
        )[:, ids.shape[1] :]  # fmt: skip

    name = f"{new} words, batch {rows}, {str(dtype)[6:]}, K = {latents or 'N'}"
    bench.paired(name, their_words, our_words, as_many, dtype=dtype)


def their_anyres(quick: bool) -> Any:
    """transformers' LLaVA-NeXT; pictures of up to twice its tower's side are cut into 2 × 2 tiles."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    plain, side = their_model(quick).config, sizes(quick)[0].image_size
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**plain.vision_config.to_dict()), vision_feature_layer=-1,
        text_config=LlamaConfig(**plain.text_config.to_dict()), image_token_index=plain.image_token_index,
        image_grid_pinpoints=[[2 * side, 2 * side]], tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config)


def anyres(bench: Bench, new: int = 64) -> None:
    """One picture of 5 tiles and 40 words. There all tokens of all tiles are read, here 64 of each."""
    torch.manual_seed(0)
    new = 5 if bench.quick else new
    ours, theirs = our_model(USUAL, bench.quick, sampling="anyres"), their_anyres(bench.quick)
    check_sizes(ours, theirs)
    vision = ours.config.vision
    side, across = vision.image_size, 2 * vision.image_size // vision.patch_size
    pixels, question = torch.randn(5, 3, side, side), torch.randint(10, 400, (1, 40))
    grids, size = torch.tensor([[2, 2, 2 * side, 2 * side]]), torch.tensor([[2 * side, 2 * side]])
    own = torch.full((1, ours.config.vision_length(2, 2)), ours.image_token_id)
    count = tower_tokens(vision) + across * (across + 1)  # there every row of a picture ends with a token
    other = torch.full((1, count), theirs.config.image_token_index)
    settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new)
    for dtype in bench.precisions:
        pack_(ours.eval().requires_grad_(False).to(dtype))
        theirs.eval().requires_grad_(False).to(dtype)

        @torch.inference_mode()
        def our_words(dtype: torch.dtype = dtype) -> Tensor:
            runs = ours.vision_runs(ours.encode_image(pixels.to(dtype)), grids)
            ids = torch.cat([own, question], dim=1)
            return ours.generate(ours.embed(ids, runs), torch.ones_like(ids), settings).sequences

        @torch.inference_mode()
        def their_words(dtype: torch.dtype = dtype) -> Tensor:
            ids = torch.cat([other, question], dim=1)
            return theirs.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels[None].to(dtype),
                image_sizes=size, do_sample=False, max_new_tokens=new, min_new_tokens=new, eos_token_id=2,
                pad_token_id=2,
            )[:, ids.shape[1] :]  # fmt: skip

        name = f"{new} words about a picture of 5 tiles, {str(dtype)[6:]}, against LLaVA-NeXT"
        bench.paired(name, their_words, our_words, as_many, dtype=dtype)


def as_many(theirs: Tensor, ours: Tensor) -> bool:
    """As many words: models that differ between tower and language model say different ones."""
    return theirs.shape == ours.shape


def tiles(bench: Bench) -> None:
    """Two pictures of 5 tiles and two of 4."""
    torch.manual_seed(0)
    model = our_model(USUAL, bench.quick, sampling="anyres").eval().requires_grad_(False)
    pack_(model)
    grids = torch.tensor([[2, 2, 448, 448], [3, 1, 900, 300], [2, 2, 500, 480], [1, 3, 200, 600]])
    count = int((1 + grids[:, 0] * grids[:, 1]).sum())
    side = model.config.vision.image_size
    pixels = torch.randn(count, 3, side, side)

    @torch.inference_mode()
    def at_once() -> Tensor:
        return torch.cat(model.vision_runs(model.encode_image(pixels), grids))

    @torch.inference_mode()
    def one_by_one() -> Tensor:
        base = torch.tensor([[0, 0, side, side]])
        return torch.cat([model.vision_runs(model.encode_image(one[None]), base)[0] for one in pixels])

    def alike(theirs: Tensor, ours: Tensor) -> bool:
        """Not all numbers: alone, a tile does not know which of its tokens show black margins."""
        return torch.allclose(theirs[:USUAL], ours[:USUAL], atol=1e-4)

    bench.paired(f"{count} tiles of 4 pictures at once", one_by_one, at_once, alike, dtype=torch.float32)


def chat(bench: Bench) -> None:
    """The second answer's first word, and all of it."""
    for new in (1, 5 if bench.quick else 64):
        chat_one(bench, new)


def chat_one(bench: Bench, new: int) -> None:
    """One picture of 5 tiles, 40 words, an answer of 20, 20 words more, and an answer of `new` words."""
    torch.manual_seed(0)
    answered = 5 if bench.quick else 20
    model = our_model(USUAL, bench.quick, sampling="anyres").eval().requires_grad_(False)
    pack_(model)
    vision = model.config.vision
    pixels = torch.randn(5, 3, vision.image_size, vision.image_size)
    grids = torch.tensor([[2, 2, 448, 448]])
    image = torch.full((1, model.config.vision_length(2, 2)), model.image_token_id)
    first = torch.cat([image, torch.randint(10, 400, (1, 40))], dim=1)
    more = torch.randint(10, 400, (1, 20))

    def answer(decoding: Any, new: int = new) -> Tensor:
        settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new)
        return torch.stack([*model.stream(decoding, settings)], dim=1)

    def read(ids: Tensor) -> Any:
        embeds = model.embed(ids, model.vision_runs(model.encode_image(pixels), grids))
        return model.begin(embeds, torch.ones_like(ids))

    with torch.inference_mode():
        begun = read(first)
        said = answer(begun, answered)
        kept = first.shape[1] + answered - 1  # the last word was written, and not read
        then = model.embed(torch.cat([said[:, -1:], more], dim=1), [])

    @torch.inference_mode()
    def going_on() -> Tensor:
        begun.rewind(kept, then)
        return answer(begun)

    @torch.inference_mode()
    def again() -> Tensor:
        return answer(read(torch.cat([first, said, more], dim=1)))

    name = f"second answer of a chat, {new} {'word' if new == 1 else 'words'}, from the cache"
    bench.paired(name, again, going_on, same_ids, dtype=torch.float32)


ROWS = {"train": train, "words": words, "anyres": anyres, "tiles": tiles, "chat": chat}

if __name__ == "__main__":
    main(__doc__, ROWS)
