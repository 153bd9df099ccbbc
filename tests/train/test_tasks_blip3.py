"""BLIP-3's stages: losses by hand, what trains and what does not, DPO's known cases, overfitting, resuming.

Run by torchrun, this file is what the two processes do.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from openblip.config import ConfigError, UserError
from openblip.models.generation import GenerationConfig
from openblip.train import distributed, log
from openblip.train.loop import fit
from openblip.train.objectives import dpo_loss, sequence_log_probs
from openblip.train.tasks_blip3 import Blip3Task, Blip3TaskConfig, DpoTask, DpoTaskConfig, diffused
from tests.models.tiny_blip3 import PIXELS, text, tiny_blip3
from tests.models.tiny_lms import EOS, PAD
from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]
GRIDS = [(2, 1, 64, 32), (0, 0, 30, 30), (1, 2, 20, 60)]


def blip3(**settings):
    return tiny_blip3(**settings).float()


def batch(rows: int = 8, seed: int = 0, *, model=None, images: bool = True) -> dict:
    """Row r shows one picture, cut in one of three ways, and a text of two to five words that ends."""
    generator = torch.Generator().manual_seed(seed)
    config = (model or tiny_blip3()).config
    grids = [GRIDS[(row + seed) % 3] for row in range(rows)] if images else []
    texts, labels = [], []
    for row in range(rows):
        words = torch.randint(6, 40, (2 + (row + seed) % 4,), generator=generator).tolist()
        runs = [config.vision_length(*grids[row][:2])] if images else []
        ids = text(*(["i"] if images else []), 5, *words, EOS, runs=runs)
        texts.append(ids)
        labels.append([-100] * (len(ids) - len(words) - 1) + words + [EOS])
    width = max(map(len, texts))
    tiles = sum(1 + columns * down for columns, down, _, _ in grids)
    found = {
        "input_ids": torch.tensor([ids + [PAD] * (width - len(ids)) for ids in texts]),
        "labels": torch.tensor([ids + [-100] * (width - len(ids)) for ids in labels]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts]),
        "grids": torch.tensor(grids, dtype=torch.int64).reshape(-1, 4),
        "ids": [f"{seed}/{row}" for row in range(rows)],
    }
    if images:
        found["pixel_values"] = torch.randn(tiles, 3, PIXELS, PIXELS, generator=generator)
    return found


def pairs(count: int = 4, seed: int = 0, *, images: bool = True) -> dict:
    """Two answers to each picture, or text, the chosen ones first."""
    chosen = batch(count, seed, images=images)
    other = batch(count, seed + 17, images=images)
    rejected = []
    for ids, labels in zip(chosen["input_ids"].tolist(), chosen["labels"].tolist()):
        prompt = ids[: next(i for i, label in enumerate(labels) if label != -100)]
        rejected.append(prompt)
    answers = [[label for label in row if label != -100] for row in other["labels"].tolist()]
    rows = [prompt + answer for prompt, answer in zip(rejected, answers)]
    width = max(*map(len, rows), chosen["input_ids"].shape[1])
    ids = F.pad(chosen["input_ids"], (0, width - chosen["input_ids"].shape[1]), value=PAD)
    labels = F.pad(chosen["labels"], (0, width - chosen["labels"].shape[1]), value=-100)
    more = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    told = [[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in zip(rejected, answers)]
    return {
        **chosen,
        "input_ids": torch.cat([ids, more]),
        "labels": torch.cat([labels, torch.tensor(told)]),
        "image_index": torch.arange(count if images else 0).repeat(2),
        "ids": chosen["ids"] * 2,
    }


def log_probs(model, found: dict, row: int) -> torch.Tensor:
    """log P of the answer in one row, the row read alone and every word's logits made."""
    ids, labels = found["input_ids"][row], found["labels"][row]
    length = int((labels != -100).nonzero().max()) + 1
    runs = model.vision_runs(model.encode_image(found["pixel_values"]), found["grids"])
    own = int(found.get("image_index", torch.arange(len(ids)))[row])
    logits = model.lm.logits(model.lm.states_of(model.embed(ids[None, :length], [runs[own]])))[0]
    places = [place for place in range(length) if labels[place] != -100]
    return torch.stack([logits[place - 1].log_softmax(dim=0)[labels[place]] for place in places]).sum()


def test_the_loss_is_the_mean_over_all_labels():
    model, found = blip3(), batch()
    loss = Blip3Task(model, Blip3TaskConfig()).train()(found)["lm"]
    total = sum(log_probs(model, found, row) for row in range(8))
    assert loss.item() == pytest.approx(-total.item() / (found["labels"] != -100).sum().item(), rel=1e-5)


def test_what_is_trained():
    """The resampler and the added words; with adapters those too; a trainable language model whole; never the tower."""
    for settings, others in (
        ({}, ()),
        ({"lora": tiny.ADAPTERS}, ("lora_",)),
        ({"trainable": True}, ("lm.model",)),
    ):
        model = blip3(**settings)
        task = Blip3Task(model, Blip3TaskConfig()).train()
        task(batch())["lm"].backward()
        for name, weight in model.named_parameters():
            is_due = name.startswith(("resampler.", "lm.added_")) or any(other in name for other in others)
            assert (weight.grad is not None) == is_due, name
        assert not model.vision.training and model.lm.model.training == bool(settings.get("trainable"))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_batch_without_pictures_still_reaches_every_weight(freeze):
    """Or another process would wait for its gradients in vain."""
    model = blip3(video="attention", freeze_vision=freeze)
    task = Blip3Task(model, Blip3TaskConfig()).train()
    for images in (True, False):
        model.zero_grad()
        task(batch(images=images))["lm"].backward()
        assert all(w.grad is not None for w in model.parameters() if w.requires_grad)
        resampled = model.resampler.latents.grad.abs().max()
        assert (resampled > 0) == images
    assert any(weight.requires_grad for weight in model.vision.parameters()) != freeze


def test_adapters_may_learn_at_a_rate_of_their_own():
    task = Blip3Task(blip3(lora=tiny.ADAPTERS), Blip3TaskConfig(lm_lr_scale=0.1))
    scales = {name: task.lr_scale(name) for name, weight in task.named_parameters() if weight.requires_grad}
    assert all(scale == (0.1 if "lora_" in name else 1) for name, scale in scales.items())
    assert set(scales.values()) == {0.1, 1}


@pytest.mark.parametrize("settings", [{}, {"lora": tiny.ADAPTERS}, {"trainable": True}])
def test_it_learns_a_batch_by_heart(settings):
    model = blip3(**settings)
    found = batch(2)
    with torch.no_grad():  # a random output layer of 16 columns can be sure of hardly any word
        model.lm.model.get_output_embeddings().weight.mul_(6)
    task = Blip3Task(model, Blip3TaskConfig()).train()
    steps, lr = (60, 1e-2) if settings else (200, 4e-2)
    assert tiny.trained(task, found, steps, lr=lr)["lm"] < 0.2
    with torch.no_grad():
        runs = model.eval().vision_runs(model.encode_image(found["pixel_values"]), found["grids"])
        for row in range(2):
            first = int((found["labels"][row] != -100).nonzero()[0])
            seen = model.embed(found["input_ids"][row : row + 1, :first], runs[row : row + 1])
            said = model.generate(seen, torch.ones(1, first), GenerationConfig(max_new_tokens=8))
            wanted = found["labels"][row]
            assert said.sequences[0].tolist() == wanted[wanted != -100].tolist()


@pytest.mark.parametrize("settings", [{"trainable": True}, {"lora": tiny.ADAPTERS}, {}])
def test_activations_recomputed_change_nothing(settings):
    """A frozen language model keeps them too, for what is trained in it or before it."""
    gradients, runs, ran = [], [], []
    model = blip3(**settings)
    model.lm.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    task = Blip3Task(model, Blip3TaskConfig()).train()
    for is_on in (False, True, False):
        model.zero_grad()
        ran.clear()
        task.set_grad_checkpointing(is_on)
        task(batch())["lm"].backward()
        runs.append(len(ran))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert runs == [1, 2, 1] and gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-5, atol=1e-6)


def test_layers_that_cannot_be_run_again_are_said(monkeypatch):
    model = blip3()
    monkeypatch.setattr(model.lm.model, "modules", lambda: iter([model.lm.model.lm_head]))
    with pytest.raises(ConfigError, match="grad_checkpointing: not for the layers of a llama"):
        model.set_grad_checkpointing()


def test_dpo_by_hand():
    """Gains of 2 and −1 nats at β 0.5: −log σ(1.5) = 0.2014."""
    assert dpo_loss(torch.tensor([2.0]), torch.tensor([-1.0]), 0.5).item() == pytest.approx(
        0.201413, abs=1e-6
    )
    some, others = torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.4])
    wanted = sum(math.log(1 + math.exp(-0.1 * gap)) for gap in (0.2, -0.6)) / 2
    assert dpo_loss(some, others, 0.1).item() == pytest.approx(wanted, abs=1e-6)


def test_dpo_as_beta_vanishes():
    """−log σ(x) = log 2 − x / 2 + x² / 8 − …: at a small β the loss is log 2 − β · mean gap / 2."""
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 100, dtype=torch.float64)
    gap, beta = (chosen - rejected).mean(), 1e-5
    slope = (dpo_loss(chosen, rejected, beta) - math.log(2)) / beta
    assert slope.item() == pytest.approx(-gap.item() / 2, abs=1e-4)


def test_log_probabilities_are_summed_by_row():
    logits, labels = torch.randn(5, 7), torch.tensor([1, 2, 3, 4, 5])
    rows = torch.tensor([0, 0, 2, 2, 2])
    found = sequence_log_probs(logits, labels, rows, 3)
    each = logits.log_softmax(dim=1)[torch.arange(5), labels]
    torch.testing.assert_close(found, torch.stack([each[:2].sum(), torch.tensor(0.0), each[2:].sum()]))


def test_dpo_starts_at_log_2_and_prefers_what_was_chosen():
    model, found = blip3(lora=tiny.ADAPTERS), pairs()
    task = DpoTask(model, DpoTaskConfig(beta=0.5)).train()
    reference = {name: weight.clone() for name, weight in model.named_parameters()}
    assert task(found)["dpo"].item() == pytest.approx(math.log(2), abs=1e-5)
    with torch.no_grad():
        before = torch.stack([log_probs(model, found, row) for row in range(8)])
    tiny.trained(task, found, 30, lr=5e-3)
    with torch.no_grad():
        now = torch.stack([log_probs(model, found, row) for row in range(8)])
        gains = now - before
        loss = task(found)["dpo"]
    assert (gains[:4] > gains[4:]).all()
    assert loss.item() == pytest.approx(dpo_loss(gains[:4], gains[4:], 0.5).item(), abs=1e-4)
    for name, weight in task.reference.named_buffers():
        assert torch.equal(weight, reference[name.replace("/", ".")]), "the reference stays as it was"
    trained = {name for name, weight in model.named_parameters() if not torch.equal(weight, reference[name])}
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == wanted - {"lm.added_words.weight"}, "which are in none of these texts"


def test_dpo_in_bf16_trains_on_its_own_weights(tmp_path):
    """Autocast keeps the casts of a step's weights, so the reference's must not be made of the policy's."""
    task = DpoTask(blip3(lora=tiny.ADAPTERS), DpoTaskConfig(beta=0.5)).train()

    def by_hand():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return torch.stack([log_probs(task.model, pairs(), row) for row in range(8)])

    before = by_hand()
    made = tiny.Batches(lambda rows, start: pairs(rows // 2))
    fitted = fit(task, made, tiny.settings(10, lr=1e-2, precision="bf16"), tmp_path)
    gains = by_hand() - before
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(pairs())["dpo"].item()
    assert loss == pytest.approx(dpo_loss(gains[:4], gains[4:], 0.5).item(), abs=0.01)
    assert loss < fitted.losses["dpo"] < 0.05


def test_a_frozen_tower_sees_each_picture_once(monkeypatch):
    model, found = blip3(lora=tiny.ADAPTERS), pairs()
    task = DpoTask(model, DpoTaskConfig(noise_step=500, max_new_tokens=2)).train()
    seen, look = [], model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda pixels: seen.append(len(pixels)) or look(pixels))
    task.begin_step(0)
    task(found)
    assert seen == [10, 10], "and once with noise over it"


def test_a_second_rejected_answer_comes_from_noisy_pictures():
    model, found = blip3(lora=tiny.ADAPTERS), pairs()
    task = DpoTask(model, DpoTaskConfig(beta=0.5, noise_step=500, max_new_tokens=4, seed=3)).train()
    task.begin_step(0)
    losses = task(found)
    assert losses["dpo_noise"].item() == pytest.approx(math.log(2), abs=1e-5)
    task.begin_step(0)
    misled = task._misled(found)
    task.begin_step(0)
    noisy = diffused(found["pixel_values"], 500, task.draws)
    runs = model.eval().vision_runs(model.encode_image(noisy), found["grids"])
    for row in range(4):
        first = int((found["labels"][row] != -100).nonzero()[0])
        assert torch.equal(misled["input_ids"][row, :first], found["input_ids"][row, :first])
        seen = model.embed(found["input_ids"][row : row + 1, :first], runs[row : row + 1])
        said = model.generate(seen, torch.ones(1, first), GenerationConfig(max_new_tokens=4))
        answer = misled["labels"][row]
        assert answer[answer != -100].tolist() == said.sequences[0, : said.lengths[0]].tolist()
    token = misled["input_ids"][0, int((found["labels"][0] != -100).nonzero()[0])].item()
    task.ends = [token]
    task.begin_step(0)
    assert (task._misled(found)["labels"][0] != -100).sum() == 1, "what ends a turn ends an answer"
    with pytest.raises(UserError, match="noise is put on pixels"):
        task(
            {
                **{k: v for k, v in found.items() if k != "pixel_values"},
                "tile_embeds": torch.zeros(10, 17, 12),
            }
        )


def test_a_prompt_without_a_picture_has_no_answer_to_noise():
    """Its answer would be what the model says anyway, and that is not to be unlearnt."""
    model, found = blip3(lora=tiny.ADAPTERS), pairs()
    tiles = 1 + int(found["grids"][0, :2].prod())
    for row in (0, 4):
        ids = found["input_ids"][row]
        ids[ids == model.image_token_id] = 5
    mixed = {
        **found,
        "grids": found["grids"][1:],
        "pixel_values": found["pixel_values"][tiles:],
        "image_index": torch.arange(3).repeat(2),
    }
    task = DpoTask(model, DpoTaskConfig(beta=0.5, noise_step=500, max_new_tokens=4)).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    task.begin_step(0)
    loss = task(mixed)["dpo_noise"].item()
    task.begin_step(0)
    told, gains = task._gains({**mixed, **task._misled(mixed)}), task._gains(mixed)[:4]
    by_row = [dpo_loss(gains[row : row + 1], told[row : row + 1], 0.5).item() for row in range(4)]
    assert loss == pytest.approx(sum(by_row[1:]) / 3, rel=1e-5)
    assert abs(by_row[0] - loss) > 1e-3, "the row would have made a difference"
    losses = task(pairs(images=False))
    assert losses["dpo_noise"].item() == 0 and losses["dpo"].item() > 0
    sum(losses.values()).backward()


def test_noise_takes_a_picture_over():
    pictures = torch.ones(2, 3, 64, 64)
    draws = [torch.Generator().manual_seed(1) for _ in range(3)]
    little, half, all_of_it = (diffused(pictures, step, g) for step, g in zip((1, 500, 1000), draws))
    assert (little - 1).abs().mean() < 0.01 and little.mean() > half.mean() > all_of_it.mean()
    assert abs(all_of_it.mean()) < 0.35 and all_of_it.std() == pytest.approx(1, abs=0.1)
    for step in (1, 500, 1000):  # variance is kept: a picture of unit variance stays one
        mean = diffused(pictures, step, torch.Generator().manual_seed(2)).mean()
        spread = diffused(pictures, step, torch.Generator().manual_seed(2)).var()
        assert mean**2 + spread == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("change", [{"beta": 0.0}, {"noise_step": 0}, {"noise_step": 1001}])
def test_impossible_settings(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        DpoTaskConfig(**change)


@pytest.mark.parametrize("kind", ["lm", "dpo"])
def test_a_run_that_was_stopped_is_the_run_that_was_not(kind, tmp_path):
    """Bit for bit, with adapters; DPO's reference comes back from the checkpoint."""

    def task():
        model = blip3(lora=tiny.ADAPTERS)
        if kind == "lm":
            return Blip3Task(model, Blip3TaskConfig())
        return DpoTask(model, DpoTaskConfig(noise_step=300, max_new_tokens=3))

    made = tiny.Batches(batch if kind == "lm" else lambda rows, start: pairs(rows // 2, start))
    whole, first, again = task(), task(), task()
    fit(whole, made, tiny.settings(4), tmp_path / "whole")
    fit(first, made, tiny.settings(2), tmp_path / "parts")
    fit(again, made, tiny.settings(4), tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert (whole.model.resampler.latents != task().model.resampler.latents).any()


class Shares:
    """Batches of two halves, one for each rank; in the third step the second half has no picture."""

    def batches(self, start: int):
        while True:
            halves = [batch(4, 2 * start), batch(4, 2 * start + 1, images=start != 2)]
            mine = halves if distributed.world_size() == 1 else [halves[distributed.rank()]]
            width = max(half["labels"].shape[1] for half in mine)
            fills = {"input_ids": PAD, "labels": -100, "attention_mask": 0}
            found = {
                name: torch.cat([F.pad(h[name], (0, width - h[name].shape[1]), value=fill) for h in mine])
                for name, fill in fills.items()
            }
            for name in ("grids", "pixel_values"):
                found[name] = torch.cat([half[name] for half in mine if name in half] or [torch.zeros(0, 4)])
            if not len(found["grids"]):
                del found["pixel_values"]
            yield {**found, "ids": [name for half in mine for name in half["ids"]]}
            start += 1


class PairShares:
    """The same of preferences, all with pictures: what is chosen stands first."""

    def batches(self, start: int):
        while True:
            halves = [pairs(2, 2 * start), pairs(2, 2 * start + 1)]
            mine = halves if distributed.world_size() == 1 else [halves[distributed.rank()]]
            width = max(half["labels"].shape[1] for half in mine)
            found = {}
            for name, fill in {"input_ids": PAD, "labels": -100}.items():
                rows = [F.pad(half[name], (0, width - half[name].shape[1]), value=fill) for half in mine]
                found[name] = torch.cat([part[:2] for part in rows] + [part[2:] for part in rows])
            for name in ("grids", "pixel_values"):
                found[name] = torch.cat([half[name] for half in mine])
            images = torch.arange(len(found["grids"])).repeat(2)
            yield {**found, "image_index": images, "ids": [name for half in mine for name in half["ids"]]}
            start += 1


def two_runs(folder: Path, name: str) -> None:
    task = DpoTask(blip3(lora=tiny.ADAPTERS), DpoTaskConfig(beta=0.5))
    fit(task, PairShares(), tiny.settings(4, lr=1e-2), folder / f"{name}-dpo")
    for kind in ("adapters", "whole"):
        model = blip3(**({"lora": tiny.ADAPTERS} if kind == "adapters" else {"trainable": True}))
        settings = tiny.settings(4, shard=kind == "whole")
        fit(Blip3Task(model, Blip3TaskConfig()), Shares(), settings, folder / f"{name}-{kind}")


def test_two_processes_train_as_one(tmp_path):
    """With adapters, DPO, and in shards the whole language model; one of them once without any picture."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    two_runs(tmp_path, "one")
    for kind, loss in (("adapters", "lm"), ("whole", "lm"), ("dpo", "dpo")):
        one, two = (
            [json.loads(line)["losses"][loss] for line in (tmp_path / f"{name}-{kind}/metrics.jsonl").open()]
            for name in ("one", "two")
        )
        assert len(one) == 4 and one == pytest.approx(two, abs=1e-5) and len(set(one)) == 4


def test_dpo_does_not_go_in_shards():
    with pytest.raises(ConfigError, match="shard: DPO"):
        DpoTask(blip3(lora=tiny.ADAPTERS), DpoTaskConfig()).shard_units()


if __name__ == "__main__":
    distributed.init_from_env()
    log.draw_curves = lambda metrics, picture: None
    two_runs(Path(sys.argv[1]), "two")
    distributed.shutdown()
