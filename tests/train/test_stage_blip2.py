"""BLIP-2 from a folder of pictures to a model that talks: stage 1, stage 2 on it, instructions; saved and loaded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from openblip.config import UserError
from openblip.convert.weights import LoadReport, WeightsError
from openblip.data.collate_lm import InstructDataset
from openblip.data.mixture import MixedRows
from openblip.data.rows import BadRows
from openblip.data.sources import open_source
from openblip.hub import Pretrained, load_pretrained
from openblip.models.adapters import LoraSettings
from openblip.models.blip2 import Blip2, Blip2Config
from openblip.models.blip2_llm import Blip2Llm
from openblip.models.qformer import QFormerConfig
from openblip.recipes import Augment, Language, Recipe
from openblip.train.config import TrainConfig
from openblip.train.ingredients import prepare
from openblip.train.stage import _loader, run_stage
from openblip.train.tasks_blip2 import Blip2LlmTaskConfig, Blip2TaskConfig
from tests.data.test_prompts import byte_level
from tests.models.tiny_lms import CONFIGS, tiny_lm
from tests.tiny_models import picture_folder
from tests.train import tiny

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    picture_folder(folder, 8)
    return open_source(folder, cache_dir=tmp_path_factory.mktemp("cache"))


def save_lm(folder: Path, name: str = "llama") -> Path:
    """A random language model and a tokenizer of bytes, as transformers keeps them."""
    tokenizer = byte_level()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, name, {**CONFIGS[name], "vocab_size": len(tokenizer)})
        lm = tiny_lm(name).float()
    lm.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return save_lm(tmp_path_factory.mktemp("lm"))


def recipe(stage: str = "blip2_stage1", **changes) -> Recipe:
    text = QFormerConfig(30524, **SIZES, max_position_embeddings=40, num_query_tokens=3, freeze_words=True)
    train = TrainConfig(max_steps=2, batch_size=4, lr=1e-3, schedule="constant", log_every=1, save_every=None)
    settings = {
        "blip2": Blip2Config(tiny.vision(**SIZES), text, projection_dim=8),
        "workers": 0,
        "augment": None,
    }
    return Recipe(stage, train, **settings | changes)


@pytest.fixture(scope="module")
def stage1(rows, tmp_path_factory):
    return run_stage(recipe(calibrate=6), rows, tmp_path_factory.mktemp("stage1")).folder


def stage2(language: Path, stage1: Path, **changes) -> Recipe:
    return recipe(
        "blip2_stage2", init=str(stage1), language=Language(str(language)), prompt="a photo of", **changes
    )


def test_stage1_uses_cached_features_and_can_be_loaded(stage1, rows):
    assert (stage1.parent / "features" / "features.bin").is_file()
    found = load_pretrained(stage1)
    assert isinstance(found.model, Blip2) and found.info["stage"] == "blip2_stage1"
    assert found.tokenizer is not None and found.transform.image_size == 16


def test_calibration_centres_what_the_heads_see(rows):
    made = prepare(recipe(calibrate=8), rows)
    pixels = torch.stack([made.transform(picture(row)) for row in rows])
    with torch.no_grad():
        model = made.model.eval()
        seen = model.ln_vision(model.encode_image(pixels)).flatten(0, 1)
        assert seen.mean(dim=0).abs().max() < 1e-4
        assert (seen.std(dim=0) - 1).abs().max() < 1e-3
        states = model.qformer.encode_queries(model.memory(model.encode_image(pixels))).flatten(0, 1)
        assert model.vision_proj(states).mean(dim=0).abs().max() < 1e-4


def picture(row):
    from openblip.data.image import open_image

    return open_image(row.image)


@pytest.mark.parametrize("keeps", [False, True])
def test_stage2_stands_on_stage1_and_names_its_language_model(keeps, stage1, language, rows, tmp_path):
    task = Blip2LlmTaskConfig(stage1=Blip2TaskConfig(match_ids=True) if keeps else None)
    done = run_stage(stage2(language, stage1, blip2_llm_task=task), rows, tmp_path)
    assert done.fit.losses.keys() == ({"itc", "itm", "itg", "lm"} if keeps else {"lm"})
    saved = load_file(done.folder / "model.safetensors")
    assert not any(name.startswith("lm.") for name in saved)
    assert any("itm_head" in name for name in saved) == keeps
    card = json.loads((done.folder / "config.json").read_text())
    assert card["model"]["lm"]["source"] == str(language) and len(card["model"]["lm"]["sha256"]) == 64
    found = load_pretrained(done.folder)
    assert isinstance(found.model, Blip2Llm) and found.info["prompt"] == "a photo of"
    assert found.lm_tokenizer.decode(found.lm_tokenizer.encode("a dog")) == "a dog"
    begun = prepare(stage2(language, stage1, blip2_llm_task=task), rows).model.blip2.state_dict()
    first = load_pretrained(stage1).model.state_dict()
    assert "qformer.query_tokens" in begun
    assert all(torch.equal(value, first[name]) for name, value in begun.items()), "it began with stage 1"
    trained = found.model.blip2.state_dict()
    assert not torch.equal(trained["qformer.query_tokens"], first["qformer.query_tokens"]), "and went on"
    again = run_stage(stage2(language, done.folder), rows, tmp_path / "again")
    assert again.fit.step == 2, "and stage 2 may go on from stage 2"


def test_stage2_learns_all_captions_of_a_picture_together(stage1, language, rows, tmp_path):
    chosen = replace(stage2(language, stage1), captions=3)
    batch = next(_loader(chosen, prepare(chosen, rows), rows, None, [], BadRows()).batches())
    size = chosen.train.batch_size
    assert len(batch["pixel_values"]) == size and len(batch["labels"]) == 3 * size
    assert run_stage(chosen, rows, tmp_path).fit.losses.keys() == {"lm"}
    with pytest.raises(UserError, match=r"captions: 2 of a picture .* stage 2 alone"):
        run_stage(replace(recipe("blip2_stage1"), captions=2), rows, tmp_path / "first")


def test_stage2_without_stage1_begins_as_stage1_does(language, rows, monkeypatch):
    monkeypatch.setattr(
        "openblip.train.ingredients.load_tower_", lambda vision, source: (LoadReport(source), None)
    )
    chosen = recipe("blip2_stage2", language=Language(str(language)), vision_init="somewhere", calibrate=6)
    alone = prepare(chosen, rows).model
    first = prepare(replace(chosen, stage="blip2_stage1"), rows).model.state_dict()
    mine = alone.blip2.state_dict()
    assert isinstance(alone, Blip2Llm) and "qformer.query_tokens" in mine
    assert all(torch.equal(value, first[name]) for name, value in mine.items())


def test_another_language_model_is_refused(stage1, language, rows, tmp_path):
    folder = run_stage(stage2(language, stage1), rows, tmp_path / "run").folder
    other = tmp_path / "other"
    save_lm(other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["model"]["lm"]["source"] = str(other)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="another language model than the one this was trained with"):
        load_pretrained(folder)


def test_instructions_from_rows_to_a_model(stage1, language, rows, tmp_path):
    folder = tmp_path / "asked"
    picture_folder(folder, 8)
    lines = [
        {"file_name": f"images/{path.name}", "instruction": "What is this?", "output": [path.stem, "a thing"]}
        for path in sorted(folder.glob("images/*.png"))
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = open_source(folder, cache_dir=tmp_path / "cache", require_captions=False)
    chosen = recipe("instruct", init=str(stage1), language=Language(str(language)))
    found = load_pretrained(run_stage(chosen, asked, tmp_path / "run").folder)
    assert found.model.config.qformer_text and found.model.blip2.qformer.config.text
    made, one = prepare(chosen, asked), asked[3]
    mixed = MixedRows([asked, [one, one]])
    loader = _loader(chosen, made, mixed, None, [], BadRows())
    assert loader.dataset.shares == pytest.approx({"0": 2 / 3, "1": 1 / 3}), "√8 to √2"
    drawn = [loader.dataset.get(0, np.random.default_rng(place)) for place in range(20)]
    assert {sample["id"] for sample in drawn if sample["dataset"] == "1"} == {f"1/{one.id}"}
    counted = _loader(chosen, made, MixedRows([asked, [one]], [4, 2]), None, [], BadRows())
    assert isinstance(counted.dataset, InstructDataset) and len(counted.dataset) == 6, (
        "as many as were asked for"
    )
    run_stage(chosen, mixed, tmp_path / "mixed")


def test_stage2_learns_to_take_instructions_if_its_qformer_can_read(stage1, language, rows, tmp_path):
    kept = Blip2LlmTaskConfig(stage1=Blip2TaskConfig(match_ids=True))
    reads = load_pretrained(
        run_stage(stage2(language, stage1, blip2_llm_task=kept), rows, tmp_path / "a").folder
    )
    before = reads.model.state_dict()
    asked = recipe("instruct", init="given", language=Language(str(language)))
    model = prepare(asked, rows, reads).model
    assert model.config.qformer_text and not model.config.blip2.encoder
    after = model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items()) and len(after) < len(before)
    blind = load_pretrained(run_stage(stage2(language, stage1), rows, tmp_path / "b").folder)
    with pytest.raises(UserError, match="has no text part to read an instruction with"):
        prepare(asked, rows, blind)


def test_what_is_of_training_the_recipe_says_and_not_the_start(stage1, language, rows):
    begun = load_pretrained(stage1)
    begun.frozen["vision"] = "dinov2_small"
    loose = replace(recipe().blip2, freeze_vision=False, image_dropout=0.5)
    made = prepare(recipe(init=str(stage1), blip2=loose), rows, begun)
    assert not made.model.config.freeze_vision and made.model.config.image_dropout == 0.5
    assert all(weight.requires_grad for weight in made.model.vision.parameters())
    assert "vision" not in made.frozen, "a tower that is trained is no longer its package's"
    again = prepare(recipe(init=str(stage1)), rows, begun)
    assert not any(weight.requires_grad for weight in again.model.vision.parameters())
    begun = load_pretrained(stage1)
    begun.frozen["vision"] = "dinov2_small"
    assert prepare(stage2(language, stage1), rows, begun).frozen["blip2.vision"] == "dinov2_small"
    begun = load_pretrained(stage1)
    begun.frozen["vision"] = "dinov2_small"
    made = prepare(stage2(language, stage1, blip2=loose), rows, begun)
    assert not made.model.config.blip2.freeze_vision and "blip2.vision" not in made.frozen


def test_adapters_are_put_into_a_stage2_that_has_none(stage1, language, rows, tmp_path):
    begun = load_pretrained(run_stage(stage2(language, stage1), rows, tmp_path / "plain").folder)
    before = {name: value.clone() for name, value in begun.model.state_dict().items()}
    chosen = recipe("blip2_stage2", language=Language(str(language), lora=LoraSettings(rank=2)))
    model = prepare(chosen, rows, begun).model
    after = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    assert model.lm.config.lora == LoraSettings(rank=2)
    assert any("lora_" in name and weight.requires_grad for name, weight in model.named_parameters())
    fresh = [name for name in after if "lora_" not in name and name not in before]
    assert not fresh and all(
        torch.equal(after[name], value) for name, value in before.items() if name in after
    )
    done = run_stage(chosen, rows, tmp_path / "adapted", init=Pretrained(**{**vars(begun), "model": model}))
    assert load_pretrained(done.folder).model.lm.config.lora == LoraSettings(rank=2)


@pytest.mark.parametrize("stage", ["blip2_stage1", "blip2_stage2"])
def test_fine_tuning_goes_on_at_a_larger_size_with_the_tower(stage, stage1, language, rows, tmp_path):
    """As the recipes for COCO do."""
    start = stage1
    if stage == "blip2_stage2":
        start = run_stage(stage2(language, stage1), rows, tmp_path / "two").folder
    chosen = replace(recipe(stage, language=Language(str(language))), init=str(start))
    larger = replace(chosen.blip2, vision=replace(chosen.blip2.vision, image_size=32), freeze_vision=False)
    chosen = replace(chosen, blip2=larger, blip2_llm_task=Blip2LlmTaskConfig(vision_lr_decay=0.9))
    chosen = replace(chosen, blip2_task=Blip2TaskConfig(match_ids=True, vision_lr_decay=0.9))
    done = run_stage(chosen, rows, tmp_path / "fine")
    assert not (tmp_path / "fine" / "features").exists()
    tuned, before = load_pretrained(done.folder).model.vision, prepare(chosen, rows).model.vision
    assert tuned.position_embedding.shape == (1, 1 + 4 * 4, 16)
    moved = {n for n, p in tuned.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {name for name, _ in tuned.named_parameters()}


def test_settings_that_are_not_read_are_refused(rows, tmp_path):
    chosen = recipe()
    with pytest.raises(UserError, match=r"blip2_stage1: train\.batch_tokens is for BLIP-3"):
        run_stage(replace(chosen, train=replace(chosen.train, batch_tokens=99)), rows, tmp_path)
    with pytest.raises(UserError, match="blip3_sft: BLIP-3 sees whole pictures, so `augment` is null"):
        run_stage(replace(chosen, stage="blip3_sft", augment=Augment()), rows, tmp_path)
    with pytest.raises(UserError, match="vision_lr_decay: is for a tower of ours that is trained"):
        run_stage(replace(chosen, blip2_task=Blip2TaskConfig(vision_lr_decay=0.9)), rows, tmp_path)


def test_a_foreign_model_is_met_before_training_and_not_replaced(rows, tmp_path):
    page = tmp_path / "model" / "README.md"
    page.parent.mkdir()
    page.write_text("mine")
    with pytest.raises(UserError, match=r"README\.md would be replaced, and openblip did not write that"):
        run_stage(recipe(), rows, tmp_path)
    assert page.read_text() == "mine" and not (tmp_path / "checkpoints").exists()


def test_features_of_other_blocks_are_refused(rows, tmp_path):
    vision = replace(recipe().blip2.vision, num_hidden_layers=3, output_blocks=(1, 3))
    chosen = recipe(blip2=replace(recipe().blip2, vision=vision))
    run_stage(chosen, rows, tmp_path / "one", features=tmp_path / "features")
    other = replace(chosen, blip2=replace(chosen.blip2, vision=replace(vision, output_blocks=(2, 3))))
    with pytest.raises(UserError, match="vision_config"):
        run_stage(other, rows, tmp_path / "two", features=tmp_path / "features")


@pytest.mark.parametrize(
    "changes, message",
    [({"init": None}, "fine-tunes a pre-trained model"), ({"language": None}, "names no language model")],
)
def test_what_stage2_lacks_is_named(changes, message, stage1, language, rows):
    with pytest.raises(UserError, match=message):
        prepare(replace(stage2(language, stage1), **changes), rows)


def test_stage2_on_another_system_is_refused(stage1, language, rows):
    init = load_pretrained(stage1)
    init.model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="begins with a BLIP-2, not with a Linear"):
        prepare(stage2(language, stage1), rows, init)
