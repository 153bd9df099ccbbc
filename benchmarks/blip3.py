"""BLIP-3 beside transformers' LLaVA of the same sizes, paired in one process on random weights: median ratios of time.

    python benchmarks/blip3.py [--runs 5] [--only train write tiles chat memory] [--quick]

train     one training step, tower frozen, language model trained whole; chats of 40 to 59 words about one picture
write     30 greedy words about each of 4 pictures
tiles     the tower and the resampler on all tiles of some pictures at once, against one tile at a time
chat      the second answer of a chat, going on from what is cached, against reading the whole chat again
memory    peak memory of two training steps, each side in a process of its own

Above 1, ours takes less time, or less memory. Tower, language model and texts are equal on both sides; what lies
between is not, and is the nature of the two: LLaVA projects each of the tower's N tokens, ours resamples them to K.
So there are two lines: with K = N the language models read as much, and ours pays for its resampler; with K = 64, which
is how it is meant, they do not. `--quick` shows that it runs, with parts too small for its figures to mean anything.
"""

import argparse
import resource
import subprocess
import sys
from typing import Any

import torch
from blip2 import SMOLLM2, paired
from torch import Tensor

from openblip.models.blip3 import ADDED_TOKENS, Blip3, Blip3Config
from openblip.models.clip import clip_vision
from openblip.models.generation import GenerationConfig
from openblip.models.lm import LmConfig
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
    task = Blip3Task(model, Blip3TaskConfig())
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(batch)["lm"]
    loss.backward()


def their_step(model: Any, batch: Batch) -> None:
    """Forward and backward."""
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


def train(runs: int, quick: bool) -> None:
    """One step of instruction tuning."""
    for latents in (None, USUAL):
        train_one(latents, runs, quick)


def train_one(latents: int | None, runs: int, quick: bool, rows: int = 8) -> None:
    """The same, for one K."""
    ours, own, theirs, other = sides(latents, rows, quick)
    ours.train()
    theirs.train()
    name = f"training step, batch {rows}, bf16, K = {latents or 'N'}"
    paired(name, lambda: their_step(theirs, other), lambda: our_step(ours, own), runs)


def write(runs: int, quick: bool) -> None:
    """Greedy words behind prompts of mixed lengths."""
    for dtype in (torch.float32, torch.bfloat16):
        for latents in (None, USUAL):
            write_one(dtype, latents, runs, quick)


def write_one(
    dtype: torch.dtype, latents: int | None, runs: int, quick: bool, rows: int = 4, new: int = 30
) -> None:
    """The same, in one precision and for one K."""
    ours, own, theirs, other = sides(latents, rows, quick, words=10)
    ours.eval().to(dtype)
    theirs.eval().to(dtype)
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
        )  # fmt: skip

    assert our_words().shape[1] == new and their_words().shape[1] == ids.shape[1] + new
    paired(f"{new} words, batch {rows}, {str(dtype)[6:]}, K = {latents or 'N'}", their_words, our_words, runs)


def tiles(runs: int, quick: bool) -> None:
    """Two pictures of 5 tiles and two of 4."""
    torch.manual_seed(0)
    model = our_model(USUAL, quick, sampling="anyres").eval()
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

    # Not all numbers: alone, a tile does not know which of its tokens show black margins.
    assert torch.allclose(at_once()[:USUAL], one_by_one()[:USUAL], atol=1e-4)
    paired(f"{count} tiles of 4 pictures at once", one_by_one, at_once, runs)


def chat(runs: int, quick: bool, new: int = 20) -> None:
    """One picture of 5 tiles, 40 words, an answer, 20 words more."""
    torch.manual_seed(0)
    model = our_model(USUAL, quick, sampling="anyres").eval()
    vision = model.config.vision
    pixels = torch.randn(5, 3, vision.image_size, vision.image_size)
    grids = torch.tensor([[2, 2, 448, 448]])
    image = torch.full((1, model.config.vision_length(2, 2)), model.image_token_id)
    first = torch.cat([image, torch.randint(10, 400, (1, 40))], dim=1)
    more = torch.randint(10, 400, (1, 20))
    settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new)

    def answer(decoding: Any) -> Tensor:
        return torch.stack([*model.stream(decoding, settings)], dim=1)

    def read(ids: Tensor) -> Any:
        embeds = model.embed(ids, model.vision_runs(model.encode_image(pixels), grids))
        return model.begin(embeds, torch.ones_like(ids))

    with torch.inference_mode():
        begun = read(first)
        said = answer(begun)
        kept = first.shape[1] + new - 1  # the last word was written, and not read
        then = model.embed(torch.cat([said[:, -1:], more], dim=1), [])

    @torch.inference_mode()
    def going_on() -> Tensor:
        begun.rewind(kept, then)
        return answer(begun)

    @torch.inference_mode()
    def again() -> Tensor:
        return answer(read(torch.cat([first, said, more], dim=1)))

    assert torch.equal(going_on(), again()), "both must say the same before they are timed"
    paired("second answer of a chat, from the cache", again, going_on, runs)


def peak(side: str, quick: bool) -> None:
    """Peak memory of this process after two training steps of 8 rows, in GB."""
    vision = sizes(quick)[0]
    tokens = USUAL if side == "ours" else tower_tokens(vision)
    model: Any = their_model(quick) if side == "theirs" else our_model(tokens, quick)
    image_id = model.config.image_token_index if side == "theirs" else model.image_token_id
    batch = chats(8, tokens, image_id, 40, vision)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    for _ in range(2):
        optimizer.zero_grad()
        (their_step if side == "theirs" else our_step)(model.train(), batch)
        optimizer.step()
    per_gb = 2**30 if sys.platform == "darwin" else 2**20
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_gb:.2f}")


def memory(quick: bool) -> None:
    """Theirs / ours, and ours in GB."""
    found = {}
    for side in ("theirs", "ours-N", "ours"):
        command = [sys.executable, __file__, "--only", side, *(["--quick"] if quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side] = float(done.stdout)
    for side, name in (("ours-N", "N"), ("ours", USUAL)):
        label = f"peak memory of a training step, batch 8, K = {name}"
        print(f"{label:56}{found['theirs'] / found[side]:6.2f}  (ours {found[side]:.2f} GB)", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["train", "write", "tiles", "chat", "memory"])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    for name in options.only:
        if name in ("theirs", "ours", "ours-N"):
            peak(name, options.quick)
        elif name == "memory":
            memory(options.quick)
        else:
            call = {"train": train, "write": write, "tiles": tiles, "chat": chat}[name]
            call(options.runs, options.quick)


if __name__ == "__main__":
    main()
