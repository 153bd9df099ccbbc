"""A released xGen-MM checkpoint, read as Blip3, gives what its parts give when they are put together slowly."""

import json

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import Phi3ForCausalLM

import openblip
from openblip.config import UserError
from openblip.convert.recognise import from_checkpoint_
from openblip.convert.weights import WeightsError
from openblip.hub import load_pretrained
from openblip.models.blip3 import Blip3
from tests.convert.test_preprocessor import photo, released_tiles
from tests.data.test_chat import XGENMM_SYSTEM, bytes_tokenizer
from tests.parity.peers import TOLERANCE, other_activation, other_eps, pixels, swapped_q_and_k, without
from tests.parity.peers_xgenmm import LATENTS, PATCH, SIDE, Released, logits, released, resample

CONFIG = {
    "model_type": "xgenmm",
    "vision_encoder_config": {"model_type": "xgenmm_vision_encoder", "image_aspect_ratio": "anyres",
                              "anyres_patch_sampling": True},
    "vision_tokenizer_config": {"model_type": "xgenmm_vision_tokenizer"},
    "text_config": {"model_type": "phi3", "initial_tokenizer_len": 50, "num_attention_heads": 4, "eos_token_id": 2,
                    "bos_token_id": 1, "pad_token_id": 2},
}  # fmt: skip
# Wide, tall, square, and one of the picture's own shape: masks of rows, of columns, across strips, and none.
GRIDS = [(2, 1, 90, 32), (1, 3, 20, 90), (2, 2, 61, 40), (3, 1, 96, 32)]


@pytest.fixture(scope="module")
def peer() -> Released:
    """As a folder has it: 50 words of 60 rows are in use, four heads that share two keys."""
    return released(hidden=16, heads=4, kv_heads=2, rows=60, first=50)


@pytest.fixture
def model(peer) -> Blip3:
    return read(peer)


def read(peer: Released, config: dict = CONFIG) -> Blip3:
    tensors = {f"vlm.{name}": value for name, value in peer.checkpoint().items()}
    return from_checkpoint_(dict(config), tensors, "folder")[0]


def picture(number: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    grid = GRIDS[number]
    return pixels(1 + grid[0] * grid[1], 3, SIDE * PATCH, SIDE * PATCH, seed=number), grid


TEXTS = {
    "one picture": ([0], [5, "i", 7, 8, 9]),
    "two pictures and a break": ([1, 2], [1, 5, "i", 6, "e", "i", 7, 8, "e"]),
    "nothing but words": ([], [5, 6, 7, 8]),
    "cut without a margin": ([3], ["i", 5]),
}


@torch.no_grad()
def ours(model: Blip3, pictures, text: list[int | str]) -> Tensor:
    if pictures:
        embeds = model.encode_image(torch.cat([tiles for tiles, _ in pictures]))
        runs = model.vision_runs(embeds, torch.tensor([grid for _, grid in pictures]))
        assert [len(run) for run in runs] == [
            model.config.vision_length(columns, rows) for _, (columns, rows, *_) in pictures
        ]
    else:
        runs = []
    ids: list[int] = []
    waiting = iter(runs)
    for word in text:
        ids += [model.image_token_id] * len(next(waiting)) if word == "i" else [word]
    ids = [model.end_of_chunk_id if word == "e" else word for word in ids]
    return model.lm.logits(model.lm.states_of(model.embed(torch.tensor([ids]), runs)))[0]


_WANTED: dict[tuple[int, str], Tensor] = {}  # logits of a peer, by its first added id and the text


def gap(model: Blip3, peer: Released, name: str) -> float:
    numbers, text = TEXTS[name]
    pictures = [picture(number) for number in numbers]
    words = [{"i": peer.first, "e": peer.first + 2}.get(word, word) for word in text]
    if (peer.first, name) not in _WANTED:
        _WANTED[peer.first, name] = logits(peer, pictures, words)
    theirs = _WANTED[peer.first, name]
    mine = ours(model, pictures, text)
    assert mine.shape == theirs.shape
    return float((mine - theirs).abs().max())


@pytest.mark.parametrize("name", TEXTS)
def test_logits_are_those_of_the_parts_put_together(model, peer, name):
    assert gap(model, peer, name) < TOLERANCE


def test_the_peer_looks_at_its_pictures(peer):
    text = [5, peer.first, 7]
    first, second = picture(0), (picture(0)[0].flip(3), GRIDS[0])
    assert (logits(peer, [first], text)[-1] - logits(peer, [second], text)[-1]).abs().max() > 0.1


def swapped_phi3(model: Blip3) -> None:
    """Queries and keys of the language model's fused projection, as far as there are keys."""
    for layer in model.lm.model.model.layers:
        weight = layer.self_attn.qkv_proj.weight
        weight.data = torch.cat([weight[16:24], weight[8:16], weight[:8], weight[24:]]).detach()


def swapped_keys_and_values(model: Blip3) -> None:
    for layer in model.resampler.layers:
        layer.kv.weight.data = layer.kv.weight.data.roll(len(layer.kv.weight) // 2, dims=0)


def tiles_for_strips(model: Blip3) -> None:
    model.config.tile_grouping = "tile"


FAULTS = {
    "SigLIP: q and k": swapped_q_and_k("vision.blocks.1"),
    "SigLIP: exact GELU": other_activation("vision.blocks.0", "gelu"),
    "SigLIP: eps": other_eps("vision", 10),
    "SigLIP: no final norm": without("vision.norm"),
    "resampler: no norm of the latents": without("resampler.layers.1.norm_latents"),
    "resampler: no norm of the media": without("resampler.layers.0.norm_media"),
    "resampler: keys and values": swapped_keys_and_values,
    "resampler: eps": other_eps("resampler", 10),
    "tiles for strips": tiles_for_strips,
    "Phi-3: q and k": swapped_phi3,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(model, peer, fault):
    FAULTS[fault](model)
    assert gap(model, peer, "two pictures and a break") > TOLERANCE


def test_the_mask_is_seen(model, peer):
    pictures = [(picture(1)[0], (1, 3, 31, 93))]  # another shape on the same grid: no margin
    text = [peer.first, 5]
    theirs = logits(peer, [picture(1)], text)
    assert (ours(model, pictures, ["i", 5]) - theirs)[-1].abs().max() > TOLERANCE


@torch.no_grad()
def test_the_resampler_alone(model, peer):
    media = pixels(3, SIDE * SIDE, 32, seed=9)
    mask = torch.rand(3, SIDE * SIDE, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[2] = False  # a strip that is all padding
    found = model.resampler(media, mask)
    wanted = torch.stack([resample(peer.sampler, x, m) for x, m in zip(media, mask)])
    assert found.shape == (3, LATENTS, 16) and (found - wanted).abs().max() < TOLERANCE
    assert found.isfinite().all() and (found - model.resampler(media)).abs().max() > 1e-3


@torch.no_grad()
def test_the_language_model_alone(model, peer):
    ids = torch.tensor([[1, 5, 49, 7]])
    mine = model.lm.logits(model.lm.states_of(model.lm.embed(ids)))
    assert isinstance(model.lm.model, Phi3ForCausalLM)
    assert (mine[..., :50] - peer.lm(ids).logits[..., :50]).abs().max() < TOLERANCE


# ----------------------------------------------------------------------------------- geometry and what is in the file


def test_the_geometry_comes_from_shapes_and_the_folder(model, peer):
    config = model.config
    assert (config.vision.image_size, config.vision.patch_size, config.tile_side) == (32, 8, 4)
    assert (config.vision.hidden_size, config.vision.intermediate_size, config.vision.num_hidden_layers) == (
        32,
        40,
        2,
    )
    assert (config.resampler.num_latents, config.resampler.head_dim, config.resampler.output_size) == (
        LATENTS,
        4,
        16,
    )
    phi3 = config.lm.config
    assert (phi3["vocab_size"], phi3["num_attention_heads"], phi3["num_key_value_heads"]) == (60, 4, 2)
    assert (config.tile_grouping, config.sampling, config.grids[0]) == ("strip", "anyres", (1, 2))
    assert (model.image_token_id, model.end_of_chunk_id, model.lm.vocab_size) == (50, 52, 53)
    assert config.lm.family == "xgenmm" and model.lm.eos_token_ids == [2]


@torch.no_grad()
def test_a_training_checkpoint_has_phi3_minis_heads_and_words():
    """Without a config.json: 32 heads, and 32012 words of 32064 rows in use."""
    peer = released(hidden=64, heads=32, rows=32064, first=32012)
    tensors = peer.checkpoint()
    tensors["lang_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(1)
    model, report = from_checkpoint_({}, tensors, "checkpoint.pt")
    assert (model.image_token_id, model.end_of_chunk_id) == (32012, 32014)
    assert model.lm.model.config.num_attention_heads == 32 == model.lm.model.config.num_key_value_heads
    assert gap(model, peer, "two pictures and a break") < TOLERANCE
    assert report.layout == "xGen-MM XGenMMPerceiver" and not report.fresh and not report.tied
    heads = {name for name in report.ignored if name.startswith("vision_encoder.head.")}
    assert len(heads) == 11 and len(report.ignored) == 12
    assert len(report.loaded) == len(model.state_dict())
    named = {f"module.{name}": value for name, value in peer.checkpoint().items()}
    again, _ = from_checkpoint_({}, named, "checkpoint.pt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_released_size_is_what_the_shapes_of_the_released_model_say():
    """Shapes alone, on the meta device: SigLIP-SO400M, 16 x 96, Phi-3-mini."""
    from openblip.convert.xgenmm import _config
    from openblip.recipes import recipe_named

    shapes = {
        "vision_encoder.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "vision_encoder.embeddings.position_embedding.weight": (729, 1152),
        "vision_tokenizer.latents": (128, 1152),
        "vision_tokenizer.projection.weight": (3072, 1152),
        "lang_model.model.embed_tokens.weight": (32064, 3072),
    }
    shapes |= {f"vision_encoder.encoder.layers.{n}.mlp.fc1.weight": (4304, 1152) for n in range(27)}
    for n in range(6):
        shapes |= {f"vision_tokenizer.layers.{n}.0.to_q.weight": (1536, 1152),
                   f"vision_tokenizer.layers.{n}.1.1.weight": (4608, 1152)}  # fmt: skip
    for n in range(32):
        shapes |= {f"lang_model.model.layers.{n}.self_attn.qkv_proj.weight": (9216, 3072),
                   f"lang_model.model.layers.{n}.mlp.gate_up_proj.weight": (16384, 3072)}  # fmt: skip
    config = _config({}, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    recipe = recipe_named("xgenmm_sft").blip3
    assert config.vision == recipe.vision and config.resampler == recipe.resampler
    assert (config.grids, config.tile_grouping, config.sampling) == (recipe.grids, "strip", "anyres")
    phi3 = config.lm.config
    assert (phi3["num_key_value_heads"], phi3["intermediate_size"], phi3["num_hidden_layers"]) == (
        32,
        8192,
        32,
    )
    assert config.lm.first_added_id == 32012 and config.vision_length(2, 2) == 640


def test_what_a_folder_says_is_read(peer):
    told = {"anyres_patch_sampling": False, "anyres_grids": [[32, 64], [64, 64]]}
    config = read(peer, CONFIG | {"vision_encoder_config": told}).config
    assert (config.sampling, config.grids) == ("anyres_fixed_sampling", [(1, 2), (2, 2)])


def test_what_is_no_xgenmm_is_refused(peer):
    def without_any(*names: str) -> dict[str, Tensor]:
        found = peer.checkpoint().items()
        return {f"vlm.{name}": value for name, value in found if not name.startswith(names)}

    with pytest.raises(UserError, match="no vision_encoder: the released training script"):
        from_checkpoint_(dict(CONFIG), without_any("vision_encoder."), "folder")
    with pytest.raises(
        WeightsError, match=r"missing: vision_tokenizer\.norm\.bias, vision_tokenizer\.norm\.weight"
    ):
        from_checkpoint_(dict(CONFIG), without_any("vision_tokenizer.norm."), "folder")
    with pytest.raises(UserError, match=r"gate_up_proj\.weight: there is no such tensor"):
        from_checkpoint_(dict(CONFIG), without_any("lang_model.model.layers.0.mlp."), "folder")
    with pytest.raises(UserError, match="32012 words of the tokenizer, and the language model has 60"):
        from_checkpoint_({}, peer.checkpoint(), "checkpoint.pt")
    with pytest.raises(UserError, match="image_aspect_ratio 'pad'"):
        read(peer, CONFIG | {"vision_encoder_config": {"image_aspect_ratio": "pad"}})
    with pytest.raises(UserError, match="5 heads of the language model, and a width of 16"):
        read(peer, CONFIG | {"text_config": {"initial_tokenizer_len": 50, "num_attention_heads": 5}})
    with pytest.raises(UserError, match=r"model_type 'llama'; v1\.5 has phi3"):
        read(peer, CONFIG | {"text_config": {"model_type": "llama"}})


# ------------------------------------------------------------------------------------------- a folder of the hub

WORDS = 266  # of the tokenizer, <pad> among them: what is behind is added


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights in several files, a tokenizer that knows the added words, an image processor: and what they are of."""
    place = tmp_path_factory.mktemp("xgenmm")
    peer = released(hidden=16, heads=4, rows=WORDS + 14, first=WORDS)
    tensors = {f"vlm.{name}": value.float().contiguous() for name, value in peer.checkpoint().items()}
    save_torch_state_dict(tensors, place, max_shard_size="40KB")
    text = CONFIG["text_config"] | {"initial_tokenizer_len": WORDS}
    (place / "config.json").write_text(json.dumps(CONFIG | {"text_config": text}))
    processor = {
        "image_processor_type": "Blip3ImageProcessor", "size": [32, 32], "resize_mode": "squash",
        "interpolation_mode": "bicubic", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (place / "preprocessor_config.json").write_text(json.dumps(processor))
    words = bytes_tokenizer(None)._tokenizer
    words.add_special_tokens(
        {"additional_special_tokens": ["<image>", "<image placeholder>", "<|endofchunk|>"]}
    )
    words.save_pretrained(place)
    return place, peer, words


def test_a_folder_of_the_hub_answers_as_its_parts_do(folder):
    """From the picture and the question to the words: the released prompt, the tiles, greedy decoding."""
    place, peer, words = folder
    assert len(list(place.glob("model-*.safetensors"))) > 1
    pipeline = openblip.load(place)
    image = photo(90, 61)
    said = []
    answer = pipeline.chat("<image>\nWhat?", [image], max_new_tokens=6)

    def ids(text: str) -> list[int]:
        return words(text, add_special_tokens=False)["input_ids"]

    prompt = [*ids(f"{XGENMM_SYSTEM}<|user|>\n"), WORDS, *ids("\nWhat?<|end|>\n<|assistant|>\n")]
    tiles = released_tiles(image, 32, 0.5, 0.5).double()
    columns, rows = {3: (2, 1), 5: (2, 2)}[len(tiles)]
    for _ in range(6):
        scores = logits(peer, [(tiles, (columns, rows, *image.size))], [*prompt, *said])[-1]
        scores[WORDS : WORDS + 2] = -torch.inf  # pictures are no words
        said.append(int(scores.argmax()))
    ends = {2, WORDS + 2, ids("<|end|>")[0]}
    stop = next((i for i, word in enumerate(said) if word in ends), len(said))
    assert answer == words.decode(said[:stop], skip_special_tokens=True).strip() and stop


def test_a_tokenizer_with_other_ids_is_refused(folder, tmp_path):
    place, *_ = folder
    words = bytes_tokenizer(None)._tokenizer
    words.add_special_tokens({"additional_special_tokens": ["<|other|>", "<image>"]})
    words.save_pretrained(tmp_path)
    assert load_pretrained(place, tokenizer=place).lm_tokenizer.id_of("<image>") == WORDS
    with pytest.raises(UserError, match="the tokenizer's <image> is 267, the model's 266: no match"):
        load_pretrained(place, tokenizer=tmp_path)


def test_a_training_checkpoint_takes_its_tokenizer_from_a_folder(tmp_path):
    small = released(hidden=64, heads=32, rows=32064, first=32012)
    torch.save({"epoch": 0, "model_state_dict": small.checkpoint()}, tmp_path / "checkpoint_0.pt")
    assert load_pretrained(tmp_path / "checkpoint_0.pt").lm_tokenizer is None
    loaded = load_pretrained(tmp_path / "checkpoint_0.pt", tokenizer=tmp_words(tmp_path, 32012))
    assert loaded.lm_tokenizer.id_of("<image>") == loaded.model.image_token_id == 32012


def tmp_words(folder, count: int):
    """A tokenizer of so many words, <pad> the last, and the three that are added behind it, as released."""
    words = bytes_tokenizer(None)._tokenizer
    words.add_tokens([f"w{number}" for number in range(len(words), count - 1)])
    words.add_special_tokens({"pad_token": "<padding>"})
    words.add_special_tokens(
        {"additional_special_tokens": ["<image>", "<image placeholder>", "<|endofchunk|>"]}
    )
    words.save_pretrained(folder / "words")
    return folder / "words"
