"""BLIP-3 from documents and conversations to a model: pre-training, instruction tuning on it, DPO; saved and loaded."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from openblip.config import UserError
from openblip.data.features import TileCache
from openblip.data.image import open_image
from openblip.data.sources import open_source
from openblip.data.tiles import TileTransform
from openblip.hub import load_pretrained
from openblip.models.blip3 import Blip3, Blip3Config
from openblip.models.lm import LmConfig
from openblip.models.resampler import ResamplerConfig
from openblip.models.temporal import TemporalConfig
from openblip.models.vit import VisionTransformer
from openblip.recipes import Language, Recipe
from openblip.train.config import TrainConfig
from openblip.train.ingredients import prepare
from openblip.train.stage import cache_features, run_stage
from openblip.train.tasks_blip3 import DpoTaskConfig
from tests.data.test_prompts import byte_level
from tests.models.tiny_lms import CONFIGS, tiny_lm
from tests.tiny_models import COLOURS, SHAPES, _liven_, drawing
from tests.train import tiny

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CHAT = (
    "{% for m in messages %}{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)

pytestmark = pytest.mark.usefixtures("no_pictures")


def say(number: int) -> str:
    return f"a {COLOURS[number % 8]} {SHAPES[number // 8 % 8]}"


def write(folder, lines):
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_source(folder, cache_dir=folder.parent / f"cache-{folder.name}", require_captions=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents, conversations and preferences about the same eight pictures."""
    folder = tmp_path_factory.mktemp("data")
    names = {}
    for kind in ("documents", "chats", "pairs"):
        (folder / kind).mkdir()
        for number in range(8):
            drawing(number).save(folder / kind / f"{number}.png")
    names["documents"] = write(
        folder / "documents",
        [
            {"images": [f"{n}.png", None, f"{(n + 1) % 8}.png", None], "texts": [None, say(n), None, "more"]}
            for n in range(8)
        ],
    )
    names["chats"] = write(
        folder / "chats",
        [
            {
                "image": f"{n}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": say(n)},
                    *(
                        [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
                        if n % 2
                        else []
                    ),
                ],
            }
            for n in range(8)
        ],
    )
    names["pairs"] = write(
        folder / "pairs",
        [
            {"image": f"{n}.png", "prompt": "What is it?", "chosen": say(n), "rejected": say(n + 3)}
            for n in range(8)
        ],
    )
    return names


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = byte_level(chat=CHAT)
    with pytest.MonkeyPatch.context() as patch:
        small = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "eos_token_id": 2}
        patch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], **small})
        tiny_lm("llama").float().model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Language(str(folder))


def recipe(stage: str, language: Language, *, train: dict | None = None, **changes) -> Recipe:
    config = Blip3Config(
        LmConfig({"model_type": "llama"}, added_tokens=3), tiny.vision(**SIZES),
        ResamplerConfig(16, 3, 2, 2, 8, 2, 1), grids=[(1, 2), (2, 1)],
    )  # fmt: skip
    steps = {
        "max_steps": 2,
        "batch_size": 4,
        "lr": 1e-3,
        "schedule": "constant",
        "log_every": 1,
        "save_every": None,
    }
    settings = {"blip3": config, "language": language, "workers": 0, "augment": None, "max_length": 96}
    return Recipe(stage, TrainConfig(**steps | (train or {})), **settings | changes)


@pytest.fixture(scope="module")
def base(data, language, tmp_path_factory):
    chosen = recipe("blip3_pretrain", language, pack=True)
    return run_stage(chosen, data["documents"], tmp_path_factory.mktemp("base")).folder


def test_pretraining_on_documents_saves_the_bridge_alone(base, language):
    saved = load_file(base / "model.safetensors")
    assert not any(name.startswith("lm.model.") for name in saved) and "lm.added_words.weight" in saved
    found = load_pretrained(base)
    model = found.model
    assert isinstance(model, Blip3) and found.info["stage"] == "blip3_pretrain" and found.tokenizer is None
    assert model.config.resampler.output_size == model.lm.hidden_size, "it follows the language model"
    assert torch.equal(model.lm.added_words.weight, saved["lm.added_words.weight"])
    assert found.lm_tokenizer.has_chat_template and found.transform.image_size == 16
    wanted = {name: value for name, value in model.state_dict().items() if name in saved}
    assert all(torch.equal(value, saved[name]) for name, value in wanted.items())


def test_adapters_are_put_in_for_instructions_and_go_on_in_dpo(base, data, language, tmp_path):
    before = load_pretrained(base).model.state_dict()
    taught = replace(language, lora=tiny.ADAPTERS)
    chosen = recipe("blip3_sft", taught, init=str(base), bucket=True)
    begun = prepare(chosen, data["chats"]).model.state_dict()
    kept = {name: value for name, value in begun.items() if name in before}
    assert (
        all(torch.equal(value, before[name]) for name, value in kept.items()) and "resampler.latents" in kept
    )
    assert any("lora_" in name for name in begun)
    sft = run_stage(chosen, data["chats"], tmp_path / "sft").folder
    after = load_pretrained(sft).model
    assert after.lm.config.lora == tiny.ADAPTERS and after.lm.config.source == language.source
    assert not torch.equal(after.resampler.latents, before["resampler.latents"])
    all_pairs = {"batch_size": 8, "lr": 1e-4}
    dpo = run_stage(
        recipe("blip3_dpo", taught, init=str(sft), train=all_pairs), data["pairs"], tmp_path / "dpo"
    )
    assert dpo.fit.losses.keys() == {"dpo"}
    assert dpo.fit.losses["dpo"] < 0.6932, "after the first step chosen answers have gained"
    assert load_pretrained(dpo.folder).info["stage"] == "blip3_dpo"


def test_a_language_model_that_trains_whole_is_saved_whole(base, data, language, tmp_path):
    whole = replace(language, trainable=True)
    folder = run_stage(recipe("blip3_sft", whole, init=str(base)), data["chats"], tmp_path / "sft").folder
    found = load_pretrained(folder)
    assert found.model.lm.config.source is None and found.model.lm.config.trainable
    assert (folder / "lm_tokenizer").is_dir() and found.lm_tokenizer.has_chat_template
    first = load_pretrained(base).model.lm.model.state_dict()
    assert any(not torch.equal(v, first[name]) for name, v in found.model.lm.model.state_dict().items())
    dpo = recipe("blip3_dpo", replace(language, lora=tiny.ADAPTERS), init=str(folder))
    again = load_pretrained(run_stage(dpo, data["pairs"], tmp_path / "dpo").folder)
    kept = {
        n.replace("base_layer.", ""): v
        for n, v in again.model.lm.model.state_dict().items()
        if "lora_" not in n
    }
    assert all(torch.equal(v, kept[name]) for name, v in found.model.lm.model.state_dict().items())
    assert again.model.lm.config.lora == tiny.ADAPTERS


def test_a_model_of_pictures_gets_an_encoder_for_videos(base, data, language, tmp_path):
    chosen = recipe("blip3_sft", language, init=str(base), frames=3)
    videos = replace(chosen.blip3, temporal=TemporalConfig(1, "attention", num_tokens=2, frame_tokens=3))
    chosen = replace(chosen, blip3=videos)
    model = prepare(chosen, data["chats"]).model
    assert (
        model.config.temporal.hidden_size == model.lm.hidden_size and model.config.temporal.frame_tokens == 3
    )
    first = load_pretrained(base).model.state_dict()
    assert all(
        torch.equal(v, first[name]) for name, v in model.state_dict().items() if "temporal" not in name
    )
    found = load_pretrained(run_stage(chosen, data["chats"], tmp_path / "run").folder).model
    assert found.temporal is not None and found.config.vision_length(0, 0, 3) == 2


@pytest.mark.parametrize("sampling", ["anyres", "fixed", "anyres_fixed_sampling"])
@pytest.mark.parametrize("reads", [False, True])
def test_a_stage_may_sample_otherwise_than_the_model_it_begins_with(
    base, data, language, tmp_path, sampling, reads
):
    chosen = recipe("blip3_sft", language, init=str(base), sampling=sampling, max_length=128)
    if reads:
        resampler = replace(chosen.blip3.resampler, condition_size=32)
        chosen = replace(chosen, blip3=replace(chosen.blip3, resampler=resampler))
    first, model = load_pretrained(base).model, prepare(chosen, data["chats"]).model
    alone = replace(chosen, stage="blip3_pretrain", init=None)
    assert prepare(alone, data["documents"]).model.config.sampling == sampling, (
        "with nothing to begin with, too"
    )
    assert model.config.sampling == sampling and (model.resampler.config.condition_size is not None) == reads
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    fresh = weights.keys() - first.state_dict().keys()
    assert {name.split(".")[1] for name in fresh} == (
        {"condition_norm", "condition_projection"} if reads else set()
    )
    found = load_pretrained(run_stage(chosen, data["chats"], tmp_path).folder).model
    assert found.config == model.config
    moved = found.state_dict()["resampler.condition_projection.weight"] if reads else None
    assert moved is None or not torch.equal(moved, weights["resampler.condition_projection.weight"])
    assert (
        prepare(replace(chosen, sampling=None, init=str(tmp_path / "model")), data["chats"]).model.config
        == found.config
    )


@pytest.mark.parametrize("sampling", ["anyres", "fixed", "anyres_fixed_sampling"])
def test_cached_tiles_train_as_pictures_do(base, data, language, tmp_path, sampling, monkeypatch):
    """bfloat16 keeps three digits of a feature; the losses must agree as far as that goes."""
    losses, seen, look = {}, [], VisionTransformer.forward
    monkeypatch.setattr(VisionTransformer, "forward", lambda *args: seen.append(len(args[1])) or look(*args))

    def begun():
        """What is seen has a say."""
        found = load_pretrained(base)
        found.model.config.sampling = sampling
        _liven_(found.model.resampler)
        return found

    rows = data["documents"]
    for name in ("cached", "opened", "others"):
        torch.manual_seed(1)
        chosen = recipe(
            "blip3_pretrain", language, train={"precision": "bf16"}, keep_features=name != "opened"
        )
        if name == "others":  # another picture in the place of each
            monkeypatch.setattr(
                "openblip.data.features.picture_key", lambda row, number: f"{row.id}#{1 - number}"
            )
        run_stage(chosen, rows, tmp_path / name, init=begun())
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["losses"]["lm"] for line in lines]
        assert (tmp_path / name / "features/grids.bin").exists() == (name != "opened")
        if (
            name == "cached"
        ):  # sixteen pictures, two in each document, are seen once, and the first to know the shape
            assert sum(seen) == 17 * (1 if sampling == "fixed" else 3)
    assert losses["cached"] == pytest.approx(losses["opened"], rel=2e-3)
    assert losses["others"] != pytest.approx(losses["opened"], rel=4e-3)
    made = prepare(chosen, rows, begun())
    monkeypatch.undo()
    cache = TileCache(cache_features(made, rows, tmp_path / "cached/features", workers=0))
    picture = TileTransform(made.transform, made.model.config.used_grids)(open_image(rows[3].images[1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = made.model.encode_image(picture.pixel_values).bfloat16().float()
    found = cache.lookup(f"{rows[3].id}#1")
    assert torch.equal(found.embeds, wanted) and found.grid == picture.grid


def test_a_token_budget_in_place_of_a_number_of_rows(base, data, language, tmp_path):
    chosen = recipe("blip3_sft", language, init=str(base), train={"batch_tokens": 160, "batch_size": 1})
    assert run_stage(chosen, data["chats"], tmp_path).fit.step == 2
    with pytest.raises(UserError, match="DPO is a mean over pairs"):
        run_stage(replace(chosen, stage="blip3_dpo"), data["pairs"], tmp_path / "dpo")


def test_bad_rows_are_listed_and_the_run_goes_on(base, language, tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    drawing(0).save(folder / "0.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a thing"}]
    rows = write(
        folder,
        [
            *[{"image": "0.png", "conversations": turns} for _ in range(8)],
            {"image": "broken.png", "conversations": turns},
            {"image": "0.png", "conversations": [{"from": "human", "value": "<image> <image>"}, turns[1]]},
            {"image": "0.png", "conversations": [{"from": "somebody", "value": "What?"}, turns[1]]},
            {"image": "0.png", "conversations": turns[:1]},
        ],
    )
    chosen = recipe("blip3_sft", language, init=str(base), train={"max_steps": 3, "batch_size": 4})
    done = run_stage(chosen, rows, tmp_path / "run")
    assert done.fit.step == 3
    reasons = {
        json.loads(line)["reason"] for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()
    }
    wrong = {"not_an_image", "image_count", "unknown_role", "missing_answer"}
    assert reasons == wrong | {"no_features"}, "the picture is met again when its features are asked for"
    assert load_pretrained(done.folder).info["bad_rows"].keys() == reasons


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("blip3_sft", {}, "blip3_sft: begins with a trained BLIP-3"),
        ("blip3_pretrain", {"language": None}, "names no language model"),
        ("blip3_pretrain", {"vision_init": "somewhere"}, "somewhere: no such folder or file"),
    ],
)
def test_what_a_stage_lacks_is_named(stage, changes, message, data, language):
    with pytest.raises(UserError, match=message):
        prepare(replace(recipe(stage, language), **changes), data["chats"])


def test_what_does_not_go_together_is_named(base, data, language, tmp_path):
    videos = replace(
        recipe("blip3_sft", language).blip3, temporal=TemporalConfig(1, "mean", num_tokens=3, frame_tokens=3)
    )
    taught = replace(language, lora=tiny.ADAPTERS)
    for wrong, rows in (
        (recipe("blip3_sft", language, init=str(base), blip3=videos), data["chats"]),
        (recipe("blip3_dpo", taught, init=str(base), dpo_task=DpoTaskConfig(noise_step=9)), data["pairs"]),
    ):
        with pytest.raises(
            UserError, match=r"only a frozen tower, shown pictures without .* noise and no videos"
        ):
            run_stage(wrong, rows, tmp_path, features=tmp_path / "features")
    init = load_pretrained(base)
    init.model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="begins with a BLIP-3, not with a Linear"):
        prepare(recipe("blip3_sft", language), data["chats"], init)
