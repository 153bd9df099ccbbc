"""Each task to the end of what it can learn, stopped and resumed, on two processes; BLIP's losses have their own file.

Run by torchrun, this file is what the two processes do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from openblip.models.generation import GenerationConfig
from openblip.train import checkpoint, distributed, log
from openblip.train.loop import NonFiniteError, fit
from openblip.train.tasks import BlipTask, BlipTaskConfig, CaptionTask, ClipTask, NlvrTask, Task, VqaTask
from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("no_pictures")


# --- the other tasks against one sample at a time -----------------------------------------------------------


def test_caption_loss_is_the_mean_over_labelled_tokens_of_captions_alone():
    model, batch = tiny.stir_(tiny.blip(encoder=False)).double(), tiny.doubled(tiny.prompted(4))
    losses = []
    for row in range(4):
        real = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row, None, :real].clone()
        ids[0, 0] = tiny.DEC
        memory = model.text_decoder.memory(model.vision(batch["pixel_values"][row, None]))
        logits = model.lm_logits(model.text_decoder(ids, None, memory, causal=True))[0]
        for place in range(2, real):  # behind [DEC] and the word of the prompt
            losses.append(F.cross_entropy(logits[place - 1], ids[0, place], label_smoothing=0.1))
    torch.testing.assert_close(
        CaptionTask(model)(batch)["lm"], torch.stack(losses).mean(), atol=1e-10, rtol=0
    )


def test_vqa_loss_is_that_of_every_answer_alone():
    model, batch = tiny.stir_(tiny.vqa()).double(), tiny.doubled(tiny.questions(4))
    total = 0.0
    for answer, question in enumerate(batch["answer_question"].tolist()):
        asked, said = (
            batch[f"{kind}"][row, None, : int(batch[mask][row].sum())]
            for kind, mask, row in (
                ("input_ids", "attention_mask", question),
                ("answer_ids", "answer_mask", answer),
            )
        )
        embeds = model.encode_image(batch["pixel_values"][question, None])
        logits = model.lm_logits(model.lm_states(model.question_memory(embeds, asked), said))[0]
        loss = F.cross_entropy(logits[:-1], said[0, 1:], label_smoothing=0.1, reduction="sum")
        total += batch["answer_weights"][answer] * loss
    assert len(batch["answer_question"]) == 6
    torch.testing.assert_close(VqaTask(model)(batch)["lm"], total / 4, atol=1e-10, rtol=0)


def test_nlvr_loss_is_that_of_every_pair_alone():
    model, batch = tiny.stir_(tiny.nlvr()).double(), tiny.doubled(tiny.statements(4))
    losses = []
    for row in range(4):
        real = int(batch["attention_mask"][row].sum())
        memory = model.memory(model.encode_image(batch["pixel_values"][[row, 4 + row]]))
        logits = model.logits(memory, batch["input_ids"][row, None, :real])
        losses.append(F.cross_entropy(logits, batch["labels"][row, None]))
    torch.testing.assert_close(NlvrTask(model)(batch)["nlvr"], torch.stack(losses).mean(), atol=1e-10, rtol=0)


def test_clip_loss_is_over_all_pairs_of_the_batch():
    model, batch = tiny.stir_(tiny.clip()).double(), tiny.doubled(tiny.pairs(4))
    images = torch.cat([model.image_features(model.vision(one[None])) for one in batch["pixel_values"]])
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    texts = torch.cat([model.text_features(ids[None, :n]) for ids, n in zip(batch["input_ids"], lengths)])
    logits = model.logit_scale.exp() * images @ texts.T
    wanted = -(logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).mean() / 2
    torch.testing.assert_close(ClipTask(model)(batch)["itc"], wanted, atol=1e-10, rtol=0)


def test_a_scale_beyond_its_cap_comes_back():
    task = ClipTask(tiny.clip())
    task.model.logit_scale.data.fill_(9.0)
    task.begin_step(0)
    assert task.model.clamped_scale().item() == pytest.approx(100, rel=1e-5)
    task(tiny.pairs(4))["itc"].backward()
    assert task.model.logit_scale.grad.abs() > 0


# --- overfitting --------------------------------------------------------------------------------------------


def spoken(sequences: Tensor) -> list[list[int]]:
    return [[token for token in row if token != 0] for row in sequences.tolist()]


def written(ids: Tensor, start: int) -> list[list[int]]:
    return [[token for token in row if token != 0] for row in ids[:, start:].tolist()]


def assert_captions_come_back(model, batch: dict, prompt: int) -> None:
    model.eval()
    with torch.no_grad():
        embeds = model.encode_image(batch["pixel_values"])
        for beams in (1, 3):
            config = GenerationConfig(num_beams=beams, max_new_tokens=8)
            found = model.generate(model.decoder_memory(embeds), batch["input_ids"][:, :prompt], config)
            assert spoken(found.sequences) == written(batch["input_ids"], prompt)


def test_clip_learns_eight_pairs():
    task, batch = ClipTask(tiny.stir_(tiny.clip())), tiny.pairs()
    assert tiny.trained(task, batch, 60)["itc"] < 0.02


def assert_retrieval_is_perfect(model, batch: dict) -> None:
    """By cosine, and by the matching head over all 64 pairs."""
    model.eval()
    everyone = torch.arange(8)
    with torch.no_grad():
        embeds = model.encode_image(batch["pixel_values"])
        texts = model.text_features(batch["input_ids"], batch["attention_mask"])
        cosines = model.image_features(embeds) @ texts.T
        memory = model.encoder_memory(embeds)
        logits = model.itm_logits(
            memory, batch["input_ids"].repeat(8, 1), batch["attention_mask"].repeat(8, 1)
        )
        matches = logits.softmax(dim=1)[:, 1].view(8, 8)
    for scores in (cosines, matches):
        assert torch.equal(scores.argmax(dim=0), everyone) and torch.equal(scores.argmax(dim=1), everyone)
    assert (matches.diag() > 0.5).all() and (matches > 0.5).sum() == 8


# For the matching head to meet all 56 wrong pairs of a batch in so few steps, negatives are drawn almost evenly.
EVENLY = {"match_ids": True, "alpha": 0.0, "momentum": 0.9, "negative_floor": 0.3}


def test_pretraining_learns_eight_pairs():
    torch.manual_seed(1)
    config = BlipTaskConfig(queue_size=16, label_smoothing=0.0, **EVENLY)
    task, batch = BlipTask(tiny.stir_(tiny.blip()), config), tiny.pairs()
    losses = tiny.trained(task, batch, 150)
    assert losses["itm"] < 0.05 and losses["lm"] < 0.03
    assert losses["itc"] < 1.2  # three positives share each target: not below log 3 = 1.0986
    assert_retrieval_is_perfect(task.model, batch)
    assert_captions_come_back(task.model, batch, prompt=1)


def test_retrieval_learns_eight_pairs():
    torch.manual_seed(1)
    task = BlipTask(tiny.stir_(tiny.blip(decoder=False)), BlipTaskConfig(queue_size=0, **EVENLY))
    batch = tiny.pairs()
    losses = tiny.trained(task, batch, 150)
    assert losses["itc"] < 0.05 and losses["itm"] < 0.05
    assert_retrieval_is_perfect(task.model, batch)


def test_captioning_learns_eight_captions_by_heart():
    task, batch = CaptionTask(tiny.stir_(tiny.blip(encoder=False)), label_smoothing=0.0), tiny.prompted()
    assert tiny.trained(task, batch, 100)["lm"] < 0.03
    assert_captions_come_back(task.model, batch, prompt=2)


def test_vqa_learns_eight_answers_by_heart():
    task, batch = VqaTask(tiny.stir_(tiny.vqa()), label_smoothing=0.0), tiny.questions()
    once = batch["answer_weights"] >= 0.7  # the answer most people gave
    for name in ("answer_ids", "answer_mask", "answer_weights", "answer_question"):
        batch[name] = batch[name][once]
    assert tiny.trained(task, batch, 100)["lm"] < 0.05
    model = task.model.eval()
    with torch.no_grad():
        embeds = model.encode_image(batch["pixel_values"])
        memory = model.question_memory(embeds, batch["input_ids"], batch["attention_mask"])
        for beams in (1, 3):
            found = model.generate(memory, GenerationConfig(num_beams=beams, max_new_tokens=8))
            assert spoken(found.sequences) == written(batch["answer_ids"], 1)


def test_nlvr_learns_eight_judgements():
    task, batch = NlvrTask(tiny.stir_(tiny.nlvr())), tiny.statements()
    assert tiny.trained(task, batch, 60)["nlvr"] < 0.02


# --- in the loop: stopped and resumed, broken, on two processes ---------------------------------------------


def retrieval() -> Task:
    config = BlipTaskConfig(
        queue_size=20, match_ids=True, negatives="local", momentum=0.9, alpha_ramp_steps=4
    )
    return BlipTask(tiny.blip(dropout=0.1, decoder=False), config)


def pretraining() -> Task:
    config = BlipTaskConfig(queue_size=20, momentum=0.9, alpha_ramp_steps=4)
    return BlipTask(tiny.blip(dropout=0.1, vision=tiny.vision(drop_path_rate=0.1)), config)


RESUMED = {
    "clip": (lambda: ClipTask(tiny.clip()), tiny.pairs, 1),
    "pretrain": (pretraining, tiny.pairs, 2),
    "retrieval": (retrieval, tiny.pairs, 1),
    "caption": (lambda: CaptionTask(tiny.blip(encoder=False, dropout=0.1)), tiny.prompted, 1),
    "vqa": (lambda: VqaTask(tiny.vqa(dropout=0.1)), tiny.questions, 1),
    "nlvr": (lambda: NlvrTask(tiny.nlvr(dropout=0.1)), tiny.statements, 1),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_in_two_parts_is_bitwise_the_run_in_one(name, tmp_path):
    build, made, accumulate = RESUMED[name]

    def run(seed: int, steps: int, folder: str):
        torch.manual_seed(seed)
        return fit(
            build(), tiny.Batches(made), tiny.settings(steps, accumulate=accumulate), tmp_path / folder
        )

    whole = run(0, 5, "whole")
    run(0, 2, "parts")
    parts = run(1, 5, "parts")  # nothing may come from its own initial weights
    assert whole.step == parts.step == 5 and whole.losses == parts.losses
    for file in ("model", "optimizer", "rng"):
        one, two = (load_file(result.checkpoint / f"{file}.safetensors") for result in (whole, parts))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
    if name in ("pretrain", "retrieval"):
        kept = load_file(parts.checkpoint / "model.safetensors")
        assert {"queue.images", "queue.texts", "queue.ids", "queue.pointer"} <= kept.keys()
        assert kept["queue.pointer"].item() == 5 * 8 * accumulate % 20
        assert any(key.startswith("twin.text_encoder.") for key in kept)


def test_a_broken_picture_is_named_by_the_finite_guard(tmp_path):
    def broken(rows: int, seed: int) -> dict:
        batch = tiny.pairs(rows, seed)
        batch["pixel_values"][3] = float("nan")
        return batch

    with pytest.raises(NonFiniteError, match="loss itc is nan"):
        fit(pretraining(), tiny.Batches(broken), tiny.settings(1), tmp_path)
    assert "0/3" in (tmp_path / "bad_batch.json").read_text()


def shared_task(name: str) -> BlipTask:
    torch.manual_seed(distributed.rank())  # DDP begins with the weights of rank 0
    config = BlipTaskConfig(queue_size=20, match_ids=name == "retrieval", momentum=0.9, alpha_ramp_steps=2)
    return BlipTask(tiny.blip(decoder=name == "pretrain"), config)


def losses_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["losses"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(tmp_path):
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
    for name in ("pretrain", "retrieval"):
        alone = shared_task(name)
        fit(alone, tiny.Batches(tiny.pairs, shared=True), tiny.settings(3), tmp_path / "one" / name)
        one, two = losses_of(tmp_path / "one" / name), losses_of(tmp_path / "two" / name)
        assert len(one) == len(two) == 3
        for a, b in zip(one, two):
            assert a == pytest.approx(b, abs=1e-5)
        weights = load_file(checkpoint.latest(tmp_path / "two" / name) / "model.safetensors")
        assert torch.equal(weights["queue.ids"], alone.queue.ids)
        torch.testing.assert_close(weights["queue.images"], alone.queue.images, atol=1e-4, rtol=0)


if __name__ == "__main__":
    distributed.init_from_env()
    log.draw_curves = lambda metrics, picture: None
    for stage in ("pretrain", "retrieval"):
        fit(
            shared_task(stage),
            tiny.Batches(tiny.pairs, shared=True),
            tiny.settings(3),
            Path(sys.argv[1]) / "two" / stage,
        )
    distributed.shutdown()
