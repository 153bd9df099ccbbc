"""Stages from a folder of pictures to a saved model: whole, run again, interrupted, with bad rows, with a cache."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import openblip
from openblip.config import ConfigError, UserError
from openblip.convert.weights import LoadReport
from openblip.data.collate import PairCollator, PairDataset
from openblip.data.loader import Loader
from openblip.data.rows import Row
from openblip.data.sources import Source, open_source
from openblip.data.text import bert_uncased
from openblip.hub import Pretrained, load_pretrained
from openblip.models.blip import Blip, BlipConfig, without_encoder
from openblip.models.blip_nlvr import BlipNlvr
from openblip.models.blip_vqa import BlipVqa
from openblip.models.clip import Clip, ClipConfig, ClipTextConfig, clip_vision
from openblip.models.text import TextConfig
from openblip.recipes import Augment, Recipe
from openblip.train import checkpoint
from openblip.train.config import TrainConfig
from openblip.train.ingredients import prepare
from openblip.train.loop import fit
from openblip.train.stage import _begun, cache_features, run_stage
from openblip.train.tasks import BlipTask, BlipTaskConfig
from tests.tiny_models import picture_folder, save_clip
from tests.train import tiny

WORDS = ("red", "green", "blue", "grey", "pink", "brown")
STEPS = 3
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in WORDS:
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def source(folder: Path, name: str, records: list[dict], cache: Path) -> Source:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_source(path, cache_dir=cache)


@pytest.fixture(scope="module")
def data(pictures, tmp_path_factory) -> dict[str, Source]:
    """Rows for each stage."""
    cache = tmp_path_factory.mktemp("cache")
    captions = [{"file_name": f"{word}.png", "caption": f"a {word} thing"} for word in WORDS]
    asked = [
        {"file_name": f"{word}.png", "question": "what colour?", "answers": [word, word, "none"]}
        for word in WORDS
    ]
    stated = [
        {"left_image": f"{a}.png", "right_image": f"{b}.png", "caption": f"{a} is left", "label": a < b}
        for a, b in zip(WORDS, WORDS[::-1])
    ]
    pairs = source(pictures, "captions", captions, cache)
    return {
        **dict.fromkeys(("pretrain", "retrieval", "caption"), pairs),
        "vqa": source(pictures, "questions", asked, cache),
        "nlvr": source(pictures, "statements", stated, cache),
    }


def recipe(stage: str = "pretrain", *, frozen: bool = False, steps: int = STEPS, **changes) -> Recipe:
    model = BlipConfig(
        vision=tiny.vision(**SIZES),
        text=TextConfig(**SIZES, max_position_embeddings=32, dropout=0.1),
        projection_dim=8,
        freeze_vision=frozen,
    )
    train = TrainConfig(
        max_steps=steps, batch_size=2, lr=1e-3, schedule="constant", log_every=1, save_every=None
    )
    task = BlipTaskConfig(queue_size=8, match_ids=True, momentum=0.9)
    settings = {"augment": None if frozen else Augment(), "workers": 0}
    return Recipe(stage, train, model=model, task=task, **settings | changes)


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"], "losses": line["losses"]} for line in lines if "losses" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(folder).model.state_dict()


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys() and [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture(scope="module")
def first(data, tmp_path_factory) -> Path:
    """The run folder of a pre-training."""
    run_dir = tmp_path_factory.mktemp("pretrain")
    run_stage(recipe(), data["pretrain"], run_dir)
    return run_dir


def test_pretraining_leaves_a_model_that_loads_and_speaks(first, pictures):
    model = openblip.load(first / "model")
    assert isinstance(model.caption(pictures / "red.png", max_new_tokens=3), str)
    assert 0 <= model.match(pictures / "red.png", "a red thing").probability.item() <= 1
    assert model.info["stage"] == "pretrain" and model.info["steps"] == STEPS and model.info["bad_rows"] == {}
    assert [line["step"] for line in metrics(first)] == [1, 2, 3]
    assert metrics(first)[0]["losses"].keys() == {"itc", "itm", "lm"}
    prepared = prepare(recipe(), []).model.state_dict()
    assert not torch.equal(weights(first / "model")["lm_head.bias"], prepared["lm_head.bias"]), (
        "it was trained"
    )


@pytest.mark.parametrize("stage", ["retrieval", "caption", "vqa", "nlvr"])
def test_fine_tuning_begins_with_the_pretrained_model(stage, data, first, tmp_path, pictures):
    prompt = "a picture of " if stage == "caption" else ""
    run_stage(recipe(stage, init=str(first / "model"), prompt=prompt), data[stage], tmp_path)
    losses = {"retrieval": {"itc", "itm"}, "caption": {"lm"}, "vqa": {"lm"}, "nlvr": {"nlvr"}}[stage]
    assert [line["losses"].keys() for line in metrics(tmp_path)] == [losses] * STEPS
    model = openblip.load(tmp_path / "model")
    kind = {"vqa": BlipVqa, "nlvr": BlipNlvr}.get(stage, Blip)
    assert type(model.model) is kind and model.info["stage"] == stage
    before, after = weights(first / "model"), model.model.state_dict()
    moved = (before["vision.class_embedding"] - after["vision.class_embedding"]).abs().max()
    assert 0 < moved < 4 * STEPS * 1e-3, "weights of the start, moved by three steps"
    if stage == "retrieval":
        assert not model.model.config.decoder
        assert 0 <= model.match(pictures / "red.png", "red").probability.item() <= 1
    elif stage == "caption":
        assert not model.model.config.encoder and model.info["prompt"] == prompt
        assert isinstance(model.caption(pictures / "red.png", max_new_tokens=2), str)
    elif stage == "vqa":
        assert model.answer(pictures / "red.png", "what colour?", answers=["red", "none"]) in ("red", "none")


def test_a_finished_run_is_not_trained_again(data, first):
    files = ("metrics.jsonl", "model/model.safetensors", "model/config.json", "config.json")
    before = {name: (first / name).read_bytes() for name in files}
    newest = checkpoint.latest(first)
    stamp = newest.stat().st_mtime_ns
    result = run_stage(recipe(), data["pretrain"], first)
    assert result.fit.step == STEPS and not result.fit.interrupted
    assert {name: (first / name).read_bytes() for name in files} == before
    assert checkpoint.latest(first) == newest and newest.stat().st_mtime_ns == stamp


def test_a_run_of_something_else_is_neither_taken_nor_gone_on_with(data, first, pictures, tmp_path):
    begun, model = (first / "begun.json").read_bytes(), (first / "model/model.safetensors").read_bytes()
    records = [{"file_name": f"{word}.png", "caption": f"a {word} thing"} for word in WORDS[:5]]
    others = source(pictures, "others", records, tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"made otherwise: data.rows was 6 and is 5; data.sha256 was .* use a new"
    ):
        run_stage(recipe(), others, first)
    changed = recipe()
    changed.train.lr = 2e-3
    with pytest.raises(
        UserError, match=r"otherwise: recipe.train.lr was 0.001 and is 0.002; use a new folder$"
    ):
        run_stage(changed, data["pretrain"], first)
    with pytest.raises(UserError, match=r"init.model.safetensors was None and is "):
        run_stage(recipe(init=str(first / "model")), data["pretrain"], first)
    for init in (first / "model", first / "model/model.safetensors"):
        known = _begun(recipe(init=str(init)), data["pretrain"])
        assert list(known["init"]) == ["model.safetensors"] and known["recipe"]["init"] is None, (
            "what it is, not where"
        )
    assert _begun(recipe(init="ann/blip"), data["pretrain"])["recipe"]["init"] == "ann/blip"
    assert (first / "begun.json").read_bytes() == begun, "a refused call leaves no trace"
    assert (first / "model/model.safetensors").read_bytes() == model

    swapped = [Row(word, [str(pictures / f"{word}.png")], [f"a {word} thing"]) for word in WORDS]
    run_stage(recipe(), swapped, tmp_path / "run")
    swapped[0].captions, swapped[1].captions = swapped[1].captions, swapped[0].captions
    with pytest.raises(UserError, match=r"otherwise: data.sha256 was"):
        run_stage(recipe(), swapped, tmp_path / "run")


def test_a_run_may_be_made_longer_and_log_more(data, tmp_path):
    run_stage(recipe(steps=1), data["pretrain"], tmp_path)
    longer = recipe(steps=2, workers=1)
    longer.train.warmup_steps, longer.train.save_every, longer.train.keep_checkpoints = 1, 1, 3
    assert run_stage(longer, data["pretrain"], tmp_path).fit.step == 2
    begun = json.loads((tmp_path / "begun.json").read_text())
    del begun["recipe"]["prompt"]  # a setting that was unknown when the run began
    (tmp_path / "begun.json").write_text(json.dumps(begun))
    assert run_stage(longer, data["pretrain"], tmp_path).fit.step == 2


def test_what_never_trained_a_step_binds_nobody(data, tmp_path):
    with pytest.raises(UserError, match="6 rows do not fill one batch of 64"):
        wrong = recipe()
        wrong.train.batch_size = 64
        run_stage(wrong, data["pretrain"], tmp_path)
    assert run_stage(recipe(steps=1), data["pretrain"], tmp_path).fit.step == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_an_interrupted_run_goes_on_as_if_it_never_was(frozen, data, tmp_path):
    def stop(task, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    chosen = recipe(frozen=frozen, calibrate=6 if frozen else 0)
    chosen.train.eval_every = 1
    rows = data["pretrain"]
    whole = run_stage(chosen, rows, tmp_path / "whole", evaluate=lambda task, step: {})
    stopped = run_stage(chosen, rows, tmp_path / "parts", evaluate=stop)
    assert stopped.fit.interrupted and stopped.fit.step < STEPS and not stopped.folder.exists()
    resumed = run_stage(chosen, rows, tmp_path / "parts", evaluate=stop)
    assert resumed.fit.step == STEPS and not resumed.fit.interrupted
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert_equal(weights(resumed.folder), weights(whole.folder))


@pytest.mark.parametrize("frozen", [False, True])
def test_bad_rows_are_listed_and_the_run_goes_on(frozen, pictures, tmp_path):
    (pictures / "broken.png").write_bytes((pictures / "red.png").read_bytes()[:200])
    records = [{"file_name": f"{word}.png", "caption": f"a {word} thing"} for word in (*WORDS[:3], "broken")]
    rows = source(pictures, "bad", records, tmp_path / "cache")
    chosen = recipe(frozen=frozen, steps=4)  # two epochs: the bad row is met twice
    run_stage(chosen, rows, tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in listed} == (
        {"truncated", "no_features"} if frozen else {"truncated"}
    )
    assert any("bad.jsonl" in entry["where"] for entry in listed), "it names the row"
    counted = load_pretrained(tmp_path / "run/model").info["bad_rows"]
    assert sum(counted.values()) == len(listed) >= 2
    run_stage(chosen, rows, tmp_path / "run")
    assert load_pretrained(tmp_path / "run/model").info["bad_rows"] == counted, "a second call forgets none"


def test_cached_features_train_as_pictures_do(data, tmp_path):
    """bfloat16 keeps three digits of a feature; the losses must agree as far as that goes."""
    chosen, rows = recipe(frozen=True, calibrate=6), data["pretrain"]
    chosen.train.precision = "bf16"
    chosen.model.text.dropout = 0.0
    run_stage(chosen, rows, tmp_path / "cached")
    assert (tmp_path / "cached/features/features.bin").exists()

    made = prepare(chosen, rows)
    cache = cache_features(made, rows, tmp_path / "features", workers=0)
    dataset = PairDataset(rows, made.transform)
    plain = dataset.get(2, np.random.default_rng(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embeds = made.model.vision(plain["pixel_values"][None])[0]
    assert torch.equal(cache.lookup(plain["id"]), embeds.bfloat16().float())

    torch.manual_seed(0)
    loader = Loader(dataset, PairCollator(made.tokenizer, chosen.max_length), 2, chosen.train.seed)
    task = BlipTask(made.model, replace(chosen.task, alpha_ramp_steps=6))  # two epochs of three steps
    fit(task, loader, chosen.train, tmp_path / "pictures")
    for cached, opened in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "pictures"), strict=True):
        assert cached["losses"] == pytest.approx(opened["losses"], rel=0.02)


def test_views_of_a_picture_are_kept_and_drawn_from(data, tmp_path):
    rows = data["pretrain"]
    chosen = recipe(frozen=True, calibrate=6, augment=Augment((0.3, 0.6), randaugment=False, views=2))
    done = run_stage(chosen, rows, tmp_path / "run", features=tmp_path / "features")
    files = {name: tmp_path / "features" / name / "features.bin" for name in (".", "view1", "view2")}
    kept = {name: file.read_bytes() for name, file in files.items()}
    assert len(set(kept.values())) == 3 and len({len(value) for value in kept.values()}) == 1
    for file in files.values():
        assert (file.parent / "features.json").exists()
    again = run_stage(chosen, rows, tmp_path / "again", features=tmp_path / "features")
    assert_equal(weights(done.folder), weights(again.folder))
    assert {name: file.read_bytes() for name, file in files.items()} == kept, "nothing was made twice"
    plain = run_stage(replace(chosen, augment=None), rows, tmp_path / "plain", features=tmp_path / "features")
    different = [metrics(run.parent) for run in (done.folder, plain.folder)]
    assert different[0] != different[1], "training sees them"
    wider = replace(chosen, augment=Augment((0.2, 0.6), randaugment=False, views=2))
    with pytest.raises(UserError, match=r"view1: holds features made otherwise: transform.scale"):
        run_stage(wider, rows, tmp_path / "wider", features=tmp_path / "features")
    with pytest.raises(UserError, match=r"augment.views: .* elsewhere it is 0"):
        run_stage(replace(chosen, keep_features=False), rows, tmp_path / "unkept")
    with pytest.raises(ConfigError, match="views is 0 or more"):
        Augment(views=-1)


def test_the_same_recipe_prepares_the_same_model_whatever_was_drawn_before(data):
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(prepare(recipe(frozen=True, calibrate=6), data["pretrain"]).model.state_dict())
    assert_equal(*made)


def test_where_one_person_was_asked_an_answer_weighs_what_the_recipe_says(data, first, pictures, tmp_path):
    records = [{"file_name": f"{word}.png", "question": "what?", "answer": word} for word in WORDS]
    asked = source(pictures, "genome", records, tmp_path / "cache")
    losses = []
    for weight in (1.0, 0.2):
        chosen = recipe("vqa", steps=1, init=str(first / "model"), single_answer_weight=weight, augment=None)
        chosen.model.text.dropout = 0.0
        run_stage(chosen, asked, tmp_path / str(weight))
        losses.append(metrics(tmp_path / str(weight))[0]["losses"]["lm"])
    assert losses[1] == pytest.approx(0.2 * losses[0], rel=0.05)


def test_a_stage_refuses_a_start_it_cannot_use(data, first, tmp_path):
    def start(model) -> Pretrained:
        return Pretrained(model, bert_uncased(), None, {}, load_pretrained(first / "model").report)

    captioner = start(without_encoder(load_pretrained(first / "model").model))
    for stage in ("pretrain", "retrieval", "vqa", "nlvr"):
        with pytest.raises(UserError, match=f"{stage}: needs a model with its text encoder"):
            run_stage(recipe(stage), data[stage], tmp_path, init=captioner)
    with pytest.raises(UserError, match="begins with a pre-trained Blip, not with a BlipVqa"):
        run_stage(recipe("caption"), data["caption"], tmp_path, init=start(tiny.vqa()))


@pytest.mark.parametrize("stage", ["retrieval", "caption", "vqa", "nlvr"])
def test_a_fine_tune_does_not_silently_begin_with_random_weights(stage, data, first, tmp_path):
    with pytest.raises(UserError, match=f"{stage}: fine-tunes a pre-trained model.*--init FOLDER"):
        run_stage(recipe(stage), data[stage], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    wanted = weights(first / "model")["vision.class_embedding"]
    for made in (
        prepare(recipe(stage, init=str(first / "model")), []),
        prepare(recipe(stage), [], init=load_pretrained(first / "model")),
    ):
        assert torch.equal(made.model.state_dict()["vision.class_embedding"], wanted)


@pytest.mark.parametrize("stage", ["retrieval", "caption", "vqa", "nlvr"])
def test_a_fine_tune_drops_as_much_of_the_tower_as_its_recipe_says(stage):
    chosen = recipe(stage)
    chosen.model.vision = replace(chosen.model.vision, num_hidden_layers=2)
    start = Blip(chosen.model)
    chosen.model = replace(chosen.model, vision=replace(chosen.model.vision, drop_path_rate=0.3))
    init = Pretrained(start, bert_uncased(), None, {}, LoadReport())
    made = prepare(chosen, [], init=init).model
    assert [block.drop_path.rate for block in made.vision.blocks] == [0, 0.3]
    assert made.config.vision.drop_path_rate == 0.3 and start.config.vision.drop_path_rate == 0
    assert_equal(made.vision.state_dict(), start.vision.state_dict())


def test_a_fine_tune_may_begin_with_pretrained_parts(monkeypatch):
    monkeypatch.setattr(
        "openblip.convert.parts.minilm_text_", lambda text: text.embeddings.word.weight.data.fill_(3)
    )
    made = prepare(recipe("retrieval", text_init="minilm"), [])
    assert (made.model.text_encoder.embeddings.word.weight == 3).all()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[Recipe, Source]:
    """A recipe with the vocabulary and geometry of a tiny CLIP, and eight drawings."""
    folder = tmp_path_factory.mktemp("clip")
    words = load_pretrained(save_clip(folder / "vocabulary")).model.config.text
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = ClipTextConfig(vocab_size=words.vocab_size, eos_token_id=words.eos_token_id, **sizes)
    geometry = ClipConfig(clip_vision(32, 8, **sizes), text, projection_dim=16)
    train = TrainConfig(
        max_steps=100,
        batch_size=8,
        lr=2e-3,
        schedule="constant",
        log_every=1,
        save_every=None,
        weight_decay=0.0,
    )
    chosen = Recipe(
        "clip",
        train,
        clip=geometry,
        tokenizer=str(folder / "vocabulary"),
        augment=None,
        workers=0,
        max_length=24,
    )
    return chosen, open_source(picture_folder(folder / "data", 8), cache_dir=folder / "cache")


def test_clip_from_drawings_to_vectors_that_find_them(clip, tmp_path):
    chosen, rows = clip
    done = run_stage(chosen, rows, tmp_path)
    losses = [line["losses"] for line in metrics(tmp_path)]
    assert losses[0].keys() == {"itc"} and losses[0]["itc"] > 1.5 > 0.5 > losses[-1]["itc"]
    model = openblip.load(done.folder)
    assert type(model.model) is Clip and model.info["stage"] == "clip" and model.transform.resize == "crop"
    images = model.embed_images([row.image for row in rows])
    texts = model.embed_texts([row.captions[0] for row in rows])
    assert images.shape == texts.shape == (8, chosen.clip.projection_dim)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)
    assert ((images @ texts.T).argmax(axis=1) == np.arange(8)).all(), "each drawing finds its own caption"


def test_clip_begins_with_a_vocabulary_or_with_a_clip(clip, first, tmp_path):
    chosen, rows = clip
    with pytest.raises(UserError, match="set the recipe's `tokenizer`"):
        run_stage(replace(chosen, tokenizer=None), rows, tmp_path)
    with pytest.raises(UserError, match="begins with a CLIP and its tokenizer"):
        run_stage(replace(chosen, init=str(first / "model")), rows, tmp_path)
    more = prepare(replace(chosen, tokenizer=None, init=chosen.tokenizer), rows)
    assert_equal(more.model.state_dict(), weights(Path(chosen.tokenizer)))
