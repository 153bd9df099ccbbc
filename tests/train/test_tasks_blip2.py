"""BLIP-2's stages against slow references, to the end of what they can learn, stopped and resumed, on two processes.

Run by torchrun, this file is what the two processes do.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from openblip.config import ConfigError
from openblip.models.generation import GenerationConfig
from openblip.train import distributed, log, matching
from openblip.train.checkpoint import CheckpointError
from openblip.train.loop import fit
from openblip.train.tasks_blip2 import Blip2LlmTask, Blip2LlmTaskConfig, Blip2Task, Blip2TaskConfig
from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("no_pictures")


def stage1(decoder: bool = True, **changes) -> Blip2Task:
    torch.manual_seed(0)
    return Blip2Task(tiny.stir_(tiny.blip2(decoder=decoder)), Blip2TaskConfig(**changes))


def reference(task: Blip2Task, batch: dict, negatives: list[Tensor]) -> dict[str, Tensor]:
    """The losses pair by pair, every pass with an image memory of its own and without padding; ITG under the
    joint mask. Given are the hard negatives, which are random.
    """
    model, config, image_ids = task.model, task.config, batch["image_ids"].tolist()
    rows, queries = len(image_ids), model.config.qformer.num_query_tokens

    def text(row: int, first: int = tiny.CLS) -> Tensor:
        real = int(batch["attention_mask"][row].sum())
        return torch.cat([torch.tensor([first]), batch["input_ids"][row, 1:real]])[None]

    def memory(row: int):
        return model.memory(model.vision(batch["pixel_values"][row, None]))

    images, texts = [], []
    for row in range(rows):
        states = model.vision_proj(model.qformer.encode_queries(memory(row))[0])
        images.append(states / states.norm(dim=1, keepdim=True))
        words = model.text_proj(model.qformer.encode_text(text(row))[0, 0])
        texts.append(words / words.norm())
    cosine = torch.stack([torch.stack([(image @ word).max() for word in texts]) for image in images])
    itc = torch.zeros((), dtype=torch.float64)
    for logits in (cosine / model.temperature, cosine.T / model.temperature):
        for row in range(rows):
            same = [float(other == image_ids[row]) for other in image_ids]
            if not config.match_ids:
                same = [float(other == row) for other in range(rows)]
            for other, truth in enumerate(same):
                target = (1 - config.label_smoothing) * truth / sum(same) + config.label_smoothing / rows
                itc = itc - target * logits[row].log_softmax(dim=0)[other] / (2 * rows)

    def matching_loss(image: int, word: int, label: int) -> Tensor:
        each = model.itm_head(model.qformer.encode_both(memory(image), text(word))[:, :queries])
        return F.cross_entropy(each.mean(dim=1), torch.tensor([label]))

    count = config.match_pairs or rows
    itm = [matching_loss(row, row, 1) for row in range(count)]
    itm += [matching_loss(row, int(negatives[0][row]), 0) for row in range(count)]
    itm += [matching_loss(int(negatives[1][row]), row, 0) for row in range(count)]
    losses = {"itc": itc, "itm": torch.stack(itm).mean()}
    if model.config.decoder:
        spoken = []
        for row in range(config.write_pairs or rows):
            ids, seen = text(row, tiny.DEC), memory(row)
            x = torch.cat([model.qformer._queries(1), model.qformer._words(ids, 0)], dim=1)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mask[:queries, :queries] = True
            for number, layer in enumerate(model.qformer.layers):
                look = seen.layer(number) if layer.cross_attention is not None else None
                x, _ = layer(x, queries, mask[None, None], None, look)
            logits = model.lm_logits(x[0, queries:-1])
            spoken.append(F.cross_entropy(logits, ids[0, 1:], label_smoothing=0.1, reduction="none"))
        losses["itg"] = torch.cat(spoken).mean()
    return losses


STAGES = {
    "pretrain": {},
    "retrieval": {"match_ids": True, "negative_floor": 0.2},
    "no ITG": {"decoder": False},
    "ITM on some": {"match_pairs": 2},
    "ITG on some": {"write_pairs": 3},
}


@pytest.mark.parametrize("name", STAGES)
def test_losses_and_gradients_equal_a_reference_that_does_one_pair_at_a_time(name, monkeypatch):
    task = stage1(**STAGES[name]).double()
    batch = tiny.doubled(tiny.pairs(5))
    batch["image_ids"] = torch.tensor([7, 8, 7, 9, 10])  # two captions of one picture
    batch["input_ids"][:, 0] = 9  # each use puts its own token there
    drawn, draw = [], matching.hard_negatives

    def recording(similarity, forbidden, **options):
        index, exists = draw(similarity, forbidden, **options)
        drawn.append((similarity, forbidden, index))
        return index, exists

    monkeypatch.setattr(matching, "hard_negatives", recording)
    task.begin_step(3)
    losses = task(batch)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {key: weight.grad for key, weight in task.named_parameters()}
    task.zero_grad(set_to_none=True)
    wanted = reference(task, batch, [index for _, _, index in drawn])
    torch.stack(list(wanted.values())).sum().backward()

    assert losses.keys() == wanted.keys()
    for key, loss in wanted.items():
        assert loss.item() == pytest.approx(losses[key].item(), abs=1e-10)
    for key, weight in task.named_parameters():
        assert (weight.grad is None) == (gradients[key] is None), key
        if weight.grad is not None:
            assert torch.allclose(gradients[key], weight.grad, atol=1e-10, rtol=1e-9), key
    same = batch["image_ids"][:, None] == batch["image_ids"][None]
    for _, forbidden, index in drawn:
        assert torch.equal(forbidden, same) and not same[torch.arange(5), index].any()


def test_the_image_is_projected_once_for_all_losses(monkeypatch):
    task, calls = stage1(), []
    project = type(task.model.qformer).memory
    monkeypatch.setattr(
        type(task.model.qformer), "memory", lambda self, x, *a: calls.append(len(x)) or project(self, x, *a)
    )
    task.begin_step(0)
    task(tiny.pairs(4))
    assert calls == [4]


def test_one_pair_alone_trains():
    """LAVIS's squeeze fails there (spec of the release): no negative, and one candidate."""
    task = stage1()
    task.begin_step(0)
    losses = task(tiny.pairs(1))
    torch.stack(list(losses.values())).sum().backward()
    assert losses["itc"].item() == 0 and all(loss.isfinite() for loss in losses.values())
    assert all(weight.grad.isfinite().all() for weight in task.parameters() if weight.grad is not None)


def test_training_on_some_tokens_and_judging_on_all(monkeypatch):
    task = stage1(keep_tokens=0.5)
    seen, memory = [], type(task.model).memory
    monkeypatch.setattr(type(task.model), "memory", lambda self, x: seen.append(x) or memory(self, x))
    batch = tiny.pairs(4)
    for step in (0, 0, 1):
        task.train().begin_step(step)
        task(batch)
    task.eval()
    task(batch)
    whole = task.model.vision(batch["pixel_values"])
    assert [x.shape[1] for x in seen] == [2, 2, 2, 5]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    for row in range(4):  # of its own tokens, no two the same
        found = (seen[0][row][:, None] == whole[row][None]).all(dim=2)
        assert (found.sum(dim=1) == 1).all() and found.any(dim=0).sum() == 2


def test_training_sees_some_channels_of_a_picture_and_judging_all(monkeypatch):
    task = stage1()
    task.model.config.image_dropout = 0.5
    seen = []
    monkeypatch.setattr(task.model.qformer, "memory", seen.append)
    embeds = torch.randn(64, 5, task.model.config.vision.hidden_size)
    whole = task.eval().model.ln_vision(embeds)
    task.model.memory(embeds)
    task.train().model.memory(embeds)
    assert torch.equal(seen[0], whole)
    kept = seen[1] != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept)), "the same channels of all tokens of a picture"
    torch.testing.assert_close(seen[1][kept], 2 * whole[kept])
    shares = kept[:, 0].float().mean(dim=1)
    assert shares.mean() == pytest.approx(0.5, abs=0.05) and shares.std() > 0, "each picture's own"
    with pytest.raises(ConfigError, match="image_dropout is a share"):
        replace(task.model.config, image_dropout=1.0)


def test_what_a_bert_gave_may_learn_slower():
    task = stage1(text_lr_scale=0.3)
    slow = {name for name, _ in task.named_parameters() if task.lr_scale(name) == 0.3}
    assert (
        "model.qformer.word.weight" in slow
        and "model.qformer.layers.0.query_feed_forward.mlp.fc1.weight" in slow
    )
    assert not any(
        "cross" in name or "query_tokens" in name or "head" in name or "proj" in name for name in slow
    )


def test_what_a_bert_gave_learns_slower_in_stage_2_too():
    task = stage2(text_lr_scale=0.3)
    slow = {name for name, _ in task.named_parameters() if task.lr_scale(name) == 0.3}
    assert "model.blip2.qformer.layers.0.query_feed_forward.mlp.fc1.weight" in slow
    assert not any("cross" in name or "projection" in name or "lm." in name for name in slow)


def test_a_tower_may_learn_slower_the_deeper_it_is():
    for task in (stage1(vision_lr_decay=0.5), stage2(vision_lr_decay=0.5)):
        scales = {name: task.lr_scale(name) for name, _ in task.named_parameters()}
        slow = {name: scale for name, scale in scales.items() if scale != 1}
        assert set(slow.values()) == {0.5, 0.25, 0.125} and all(".vision." in name for name in slow)


@pytest.mark.parametrize(
    "wrong", [{"negatives": "all"}, {"keep_tokens": 0.0}, {"match_pairs": 0}, {"write_pairs": 0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Blip2TaskConfig(**wrong)


def test_stage1_learns_eight_pairs():
    torch.manual_seed(1)
    config = Blip2TaskConfig(
        match_ids=True, negative_floor=1.0, label_smoothing=0.0
    )  # negatives drawn evenly
    task, batch = Blip2Task(tiny.stir_(tiny.blip2()), config), tiny.pairs()
    losses = tiny.trained(task, batch, 300, lr=5e-3)
    assert losses["itc"] < 0.05 and losses["itm"] < 0.05 and losses["itg"] < 0.05
    model, everyone = task.model.eval(), torch.arange(8)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        embeds = model.encode_image(batch["pixel_values"])
        memory = model.memory(embeds)
        cosine = model.similarity(model.image_features(embeds), model.text_features(ids, mask))
        match = model.itm_logits(memory, ids.repeat(8, 1), mask.repeat(8, 1)).softmax(dim=1)[:, 1].view(8, 8)
        for scores in (cosine, match):
            assert torch.equal(scores.argmax(dim=0), everyone) and torch.equal(scores.argmax(dim=1), everyone)
        for beams in (1, 3):
            config = GenerationConfig(num_beams=beams, max_new_tokens=8)
            found = model.generate(memory, ids[:, :1], config).sequences
            for row, written in enumerate(found.tolist()):
                wanted = ids[row, 1 : int(mask[row].sum())].tolist()
                assert written[: len(wanted)] == wanted


def test_stage1_in_two_parts_is_bitwise_stage1_in_one(tmp_path):
    def run(seed: int, steps: int, folder: str):
        torch.manual_seed(seed)
        task = Blip2Task(tiny.blip2(dropout=0.1), Blip2TaskConfig(keep_tokens=0.7))
        task.model.vision.load_state_dict(tower)
        return fit(task, tiny.Batches(tiny.pairs), tiny.settings(steps, accumulate=2), tmp_path / folder)

    tower = tiny.blip2().vision.state_dict()  # frozen, so checkpoints hold its hash alone
    whole = run(0, 5, "whole")
    run(0, 2, "parts")
    parts = run(1, 5, "parts")  # nothing may come from its own initial weights
    assert whole.step == parts.step == 5
    for file in ("model", "optimizer", "rng"):
        one, two = (load_file(result.checkpoint / f"{file}.safetensors") for result in (whole, parts))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []


# --- stage 2 and InstructBLIP ------------------------------------------------------------------------------


def stage2(**changes) -> Blip2LlmTask:
    torch.manual_seed(0)
    kind = {name: changes.pop(name, False) for name in ("instruct", "lora")}
    model = tiny.blip2_llm(heads="stage1" in changes, **kind)
    tiny.stir_(model.blip2)
    return Blip2LlmTask(model, Blip2LlmTaskConfig(**changes))


@pytest.mark.parametrize("instruct", [False, True])
def test_the_loss_is_that_of_the_language_model_row_by_row(instruct):
    """Transformers' own forward, fed the soft prompt and one row's real tokens."""
    task, batch = stage2(instruct=instruct).double().eval(), tiny.doubled(tiny.asked(4))
    if not instruct:
        del batch["qformer_ids"], batch["qformer_mask"]
    model, losses = task.model, []
    for row in range(4):
        embeds = model.encode_image(batch["pixel_values"][row, None])
        real = int(batch["text_mask"][row].sum())
        given = (batch["qformer_ids"][row, None, :real],) if instruct else ()
        soft = model.soft_prompt(embeds, *given)
        ids = batch["input_ids"][row, None, : int(batch["attention_mask"][row].sum())]
        inputs = torch.cat([soft, model.lm.embed(ids)], dim=1)
        logits = model.lm.model(inputs_embeds=inputs).logits[0, soft.shape[1] :].double()
        losses.append(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"))
    torch.testing.assert_close(task(batch)["lm"], torch.cat(losses).mean(), atol=1e-9, rtol=0)


def test_stage1_beside_stage2_is_both(monkeypatch):
    """The losses of the two tasks alone, from one query pass."""
    both = stage2(stage1=Blip2TaskConfig(match_ids=True)).double()
    batch = tiny.doubled(tiny.told(4))
    memories, memory = [], type(both.model.blip2).memory
    monkeypatch.setattr(
        type(both.model.blip2), "memory", lambda self, x: memories.append(1) or memory(self, x)
    )
    both.begin_step(2)
    found = both(batch)
    assert len(memories) == 1
    first = Blip2Task(both.model.blip2, Blip2TaskConfig(match_ids=True))
    first.begin_step(2)
    texts = {"input_ids": batch["text_ids"], "attention_mask": batch["text_mask"]}
    wanted = first({**batch, **texts}) | Blip2LlmTask(both.model, Blip2LlmTaskConfig())(batch)
    assert found.keys() == {"itc", "itm", "itg", "lm"}
    for name, loss in wanted.items():
        assert loss.item() == pytest.approx(found[name].item(), abs=1e-10)


def test_stage1_beside_stage2_needs_its_heads():
    with pytest.raises(ConfigError, match="stage1: its losses need a stage 1 with its heads"):
        Blip2LlmTask(tiny.blip2_llm(), Blip2LlmTaskConfig(stage1=Blip2TaskConfig()))


def test_the_language_model_stays_what_it_was():
    task = stage2().train()
    before = {name: value.clone() for name, value in task.model.lm.state_dict().items()}
    tiny.trained(task, tiny.told(4), 3)
    assert not any(module.training for module in task.model.lm.model.modules())
    after = task.model.lm.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert task.model.projection.weight.grad.abs().sum() > 0


def written(task: Blip2LlmTask, batch: dict, **options) -> list[list[int]]:
    """What the model writes after the prompts, up to the end token."""
    model = task.model.eval()
    with torch.no_grad():
        embeds = model.encode_image(batch["pixel_values"])
        given = (batch["qformer_ids"], batch["qformer_mask"]) if model.config.qformer_text else ()
        soft = model.soft_prompt(embeds, *given)
        config = GenerationConfig(max_new_tokens=8, **options)
        found = model.generate(soft, batch["input_ids"][:, :1], config=config)
    return [
        row[:length] for row, length in zip(found.sequences.tolist(), found.lengths.tolist(), strict=True)
    ]


@pytest.mark.parametrize("instruct", [False, True])
def test_stage2_learns_eight_texts_by_heart(instruct):
    """With adapters and a loud output layer: a language model of random weights cannot be sure of anything."""
    torch.manual_seed(2)
    batch = tiny.asked() if instruct else tiny.told()
    task = stage2(instruct=instruct, lora=True)
    task.model.lm.model.lm_head.weight.data *= 5
    assert tiny.trained(task, batch, 250, lr=5e-3)["lm"] < 0.05
    wanted = [[token for token in row if token >= 0] for row in batch["labels"].tolist()]
    assert written(task, batch) == wanted and written(task, batch, num_beams=3) == wanted


@pytest.mark.parametrize("name", ["stage2", "instruct"])
def test_stage2_in_two_parts_is_bitwise_stage2_in_one(name, tmp_path):
    made = tiny.asked if name == "instruct" else tiny.told

    def run(seed: int, steps: int, folder: str):
        torch.manual_seed(seed)
        model = tiny.blip2_llm(instruct=name == "instruct", heads=name == "stage2", dropout=0.1)
        model.vision.load_state_dict(tower)
        config = Blip2LlmTaskConfig(keep_tokens=0.7, stage1=Blip2TaskConfig() if name == "stage2" else None)
        return fit(Blip2LlmTask(model, config), tiny.Batches(made), tiny.settings(steps), tmp_path / folder)

    tower = tiny.blip2().vision.state_dict()
    whole = run(0, 4, "whole")
    run(0, 2, "parts")
    parts = run(1, 4, "parts")
    for file in ("model", "optimizer", "rng"):
        one, two = (load_file(result.checkpoint / f"{file}.safetensors") for result in (whole, parts))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
    kept = load_file(whole.checkpoint / "model.safetensors")
    assert kept.keys() and not any("lm.model" in key or ".vision." in key for key in kept)


def test_a_checkpoint_is_as_large_as_what_is_trained_and_wants_its_language_model(tmp_path):
    def run(lm: str, steps: int):
        torch.manual_seed(0)
        task = Blip2LlmTask(tiny.blip2_llm(lm), Blip2LlmTaskConfig())
        return task, fit(task, tiny.Batches(tiny.told), tiny.settings(steps), tmp_path)

    task, result = run("llama", 1)
    trained = sum(value.numel() * value.element_size() for value in task.parameters() if value.requires_grad)
    tensors = load_file(result.checkpoint / "model.safetensors")
    assert sum(value.numel() * value.element_size() for value in tensors.values()) <= 1.05 * trained
    with pytest.raises(CheckpointError, match="trained with other frozen weights"):
        run("qwen2", 2)


def shared_task() -> Blip2Task:
    torch.manual_seed(distributed.rank())  # DDP begins with the weights of rank 0
    return Blip2Task(tiny.blip2(freeze_words=True), Blip2TaskConfig(match_ids=True))


def test_two_processes_train_as_one(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, __file__, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    fit(shared_task(), tiny.Batches(tiny.pairs, shared=True), tiny.settings(3), tmp_path / "one")
    one, two = (
        [json.loads(line)["losses"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == {"itc", "itm", "itg"} and a == pytest.approx(b, abs=1e-5)


def test_the_query_pass_of_itc_is_the_past_of_itg(monkeypatch):
    task, passes = stage1(), []
    run = type(task.model.qformer)._run

    def counting(self, x, queries, mask, memory, cache):
        passes.append((queries, x.shape[1], cache.length if cache else None))
        return run(self, x, queries, mask, memory, cache)

    monkeypatch.setattr(type(task.model.qformer), "_run", counting)
    task.begin_step(0)
    task(tiny.pairs(4))
    assert passes[0] == (3, 3, 0), "the queries, once, into the cache"
    assert passes[-1] == (0, 7, 3), "the text over it"
    assert sum(queries == length for queries, length, _ in passes) == 1


if __name__ == "__main__":
    distributed.init_from_env()
    log.draw_curves = lambda metrics, picture: None
    fit(shared_task(), tiny.Batches(tiny.pairs, shared=True), tiny.settings(3), Path(sys.argv[1]))
    distributed.shutdown()
