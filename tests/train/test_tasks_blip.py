"""BLIP pre-training and retrieval against a slow reference, and their twin, queue, ramp and temperature."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.config import ConfigError
from openblip.models.blip import Blip
from openblip.train import matching
from openblip.train.tasks import BlipTask, BlipTaskConfig, FeatureQueue, MomentumTwin
from tests.train import tiny

pytestmark = pytest.mark.usefixtures("no_pictures")


# --- BLIP pre-training and retrieval against a slow reference -----------------------------------------------


def blip_task(*, dropout: float = 0.0, decoder: bool = True, frozen: bool = False, **changes) -> BlipTask:
    """A task in the middle of its life: weights stirred, a twin that lags behind, a queue of real ids."""
    torch.manual_seed(0)
    model = tiny.blip(dropout=dropout, decoder=decoder, freeze_vision=frozen)
    task = BlipTask(tiny.stir_(model), BlipTaskConfig(**{"queue_size": 6} | changes))
    tiny.stir_(task.twin, seed=1)
    return task


def reference(task: BlipTask, batch: dict, text_of_image: Tensor, image_of_text: Tensor) -> dict[str, Tensor]:
    """The losses pair by pair and row by row, each text pass with an image memory of its own.

    Given are the hard negatives, which are random.
    """
    model, twin, queue, config = task.model, task.twin, task.queue, task.config
    ids, mask, image_ids = batch["input_ids"], batch["attention_mask"], batch["image_ids"].tolist()
    rows, encoder = len(ids), model.text_encoder

    def with_first(token: int, row: int) -> tuple[Tensor, Tensor]:
        real = int(mask[row].sum())
        return torch.cat([torch.tensor([token]), ids[row, 1:real]])[None], torch.ones(1, real)

    def embeds(row: int, vision: nn.Module = model.vision) -> Tensor:
        return (
            batch["image_embeds"][row, None]
            if "image_embeds" in batch
            else vision(batch["pixel_values"][row, None])
        )

    def features(row: int, of) -> tuple[Tensor, Tensor]:
        vision = model.vision if of is model or of.vision is None else of.vision
        image = of.vision_proj(embeds(row, vision)[0, 0])
        text = of.text_proj(of.text_encoder(*with_first(tiny.CLS, row))[0, 0])
        return image / image.norm(), text / text.norm()

    with torch.no_grad():
        teachers = [features(row, twin) for row in range(rows)]
        image_candidates = [image for image, _ in teachers] + list(queue.images)
        text_candidates = [text for _, text in teachers] + list(queue.texts)
    candidate_ids = image_ids + queue.ids.tolist()
    itc = torch.zeros((), dtype=torch.float64)
    for row in range(rows):
        for own, teacher, candidates in zip(
            features(row, model), teachers[row], (text_candidates, image_candidates)
        ):
            predicted = torch.stack([own @ other / model.temperature for other in candidates])
            believed = (
                torch.stack([teacher @ other / model.temperature for other in candidates]).detach().exp()
            )
            same = [
                float(candidate_ids[j] == image_ids[row] if config.match_ids else j == row)
                for j in range(len(candidates))
            ]
            for j, truth in enumerate(same):
                target = task.alpha * believed[j] / believed.sum() + (1 - task.alpha) * truth / sum(same)
                itc = itc - target * (predicted[j] - predicted.exp().sum().log()) / (2 * rows)

    def matching(image: int, text: int, label: int) -> Tensor:
        states = encoder(*with_first(tiny.ENC, text), encoder.memory(embeds(image)))
        return F.cross_entropy(model.itm_head(states[:, 0]), torch.tensor([label]))

    itm = [matching(row, row, 1) for row in range(rows)]
    for row in range(rows):
        itm.append(matching(row, int(text_of_image[row]), 0))
        itm.append(matching(int(image_of_text[row]), row, 0))
    losses = {"itc": itc, "itm": torch.stack(itm).mean()}
    if model.config.decoder:
        decoder, spoken = model.text_decoder, []
        for row in range(rows):
            words, real = with_first(tiny.DEC, row)
            states = decoder(words, real, decoder.memory(embeds(row)), causal=True)
            logits = model.lm_head(states[0, :-1], decoder.embeddings.word.weight).log_softmax(dim=1)
            smooth = config.label_smoothing
            for place, label in enumerate(words[0, 1:].tolist()):
                spoken.append(-(1 - smooth) * logits[place, label] - smooth * logits[place].mean())
        losses["lm"] = torch.stack(spoken).mean()
    return losses


def recorded_draws(patch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(similarity, forbidden, index) of every draw of hard negatives from now on."""
    draws: list[tuple[Tensor, Tensor, Tensor]] = []
    draw = matching.hard_negatives

    def recording(similarity: Tensor, forbidden: Tensor, **options):
        index, exists = draw(similarity, forbidden, **options)
        draws.append((similarity.detach(), forbidden, index))
        return index, exists

    patch.setattr(matching, "hard_negatives", recording)
    return draws


STAGES = {
    "pretrain": {},
    "retrieval": {"decoder": False, "match_ids": True, "negative_floor": 0.0},
    "frozen tower": {"frozen": True, "match_ids": True},
    "local negatives": {"negatives": "local"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_blip_losses_and_gradients_equal_a_reference_that_projects_images_anew_each_time(stage, monkeypatch):
    task = blip_task(**STAGES[stage], alpha_ramp_steps=10).double()
    batch = tiny.doubled(tiny.pairs(5))
    batch["image_ids"] = torch.tensor([7, 8, 7, 9, 10])  # two captions of one picture
    batch["input_ids"][:, 0] = 9  # each use puts its own token there
    task.queue.ids.copy_(torch.tensor([9, -100, 7, 55, 8, -100]))
    if stage == "frozen tower":
        with torch.no_grad():
            batch["image_embeds"] = task.model.vision(batch.pop("pixel_values"))
    task.begin_step(5)
    draws = recorded_draws(monkeypatch)
    queue = FeatureQueue(6, 16).double()
    queue.load_state_dict(task.queue.state_dict())

    losses = task(batch)
    (sim_i2t, forbidden, text_of_image), (sim_t2i, _, image_of_text) = draws
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: weight.grad for name, weight in task.named_parameters()}

    task.zero_grad(set_to_none=True)
    task.queue = queue  # as it was before the step
    wanted = reference(task, batch, text_of_image, image_of_text)
    torch.stack(list(wanted.values())).sum().backward()
    assert losses.keys() == wanted.keys() == {"itc", "itm"} | ({"lm"} if task.model.config.decoder else set())
    for name, loss in wanted.items():
        assert loss.item() == pytest.approx(losses[name].item(), abs=1e-10)
    for name, weight in task.named_parameters():
        assert (weight.grad is None) == (gradients[name] is None), name
        if weight.grad is not None:
            assert torch.allclose(gradients[name], weight.grad, atol=1e-10, rtol=1e-9), name

    with torch.no_grad():
        model = task.model
        embeds = (
            batch["image_embeds"] if stage == "frozen tower" else model.encode_image(batch["pixel_values"])
        )
        images, texts = (
            model.image_features(embeds),
            model.text_features(batch["input_ids"], batch["attention_mask"]),
        )
        swapped = batch["input_ids"].index_fill(1, torch.tensor([0]), tiny.CLS)
        teachers = task.twin.features({**batch, "image_embeds": embeds}, swapped)
        assert torch.allclose(sim_i2t, images @ teachers[1].T / model.temperature, atol=1e-10)
        assert torch.allclose(sim_t2i, texts @ teachers[0].T / model.temperature, atol=1e-10)
    same = torch.tensor([[a == b for b in (7, 8, 7, 9, 10)] for a in (7, 8, 7, 9, 10)])
    assert torch.equal(forbidden, same) and sim_i2t.shape == sim_t2i.shape == (5, 5)
    for index in (text_of_image, image_of_text):
        assert not same[torch.arange(5), index].any()


@pytest.mark.parametrize("share", [(), ("embeddings", "feed_forward")])
def test_an_encoder_and_a_decoder_with_cross_attentions_of_their_own_give_what_shared_ones_give(share):
    """BLIP's table 3 trains them too; with the same weights in both places nothing can differ."""
    batch, losses = tiny.doubled(tiny.pairs(4)), []
    shared, apart = blip_task().double(), blip_task().double()
    apart.model = Blip(replace(shared.model.config, share=share)).double()
    apart.model.load_state_dict(shared.model.state_dict())
    apart.queue.load_state_dict(shared.queue.state_dict())
    for task in (shared, apart):
        task.begin_step(3)
        losses.append({name: loss.item() for name, loss in task.eval()(batch).items()})
    assert losses[1] == pytest.approx(losses[0], abs=1e-12) and set(losses[0]) == {"itc", "itm", "lm"}


def test_gradient_checkpointing_changes_nothing():
    found = []
    for enabled in (False, True):
        task = blip_task().double()
        task.set_grad_checkpointing(enabled)
        task.begin_step(0)
        torch.stack(list(task(tiny.doubled(tiny.pairs(4))).values())).sum().backward()
        found.append(
            {name: weight.grad for name, weight in task.named_parameters() if weight.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-12, rtol=0)


def test_one_pair_has_no_negative_and_trains_all_the_same():
    task, batch = blip_task(), tiny.pairs(1)
    task.begin_step(0)
    losses = task(batch)
    memory = task.model.memory(task.model.encode_image(batch["pixel_values"]))
    logits = task.model.itm_logits(memory, batch["input_ids"], batch["attention_mask"])
    wanted = F.cross_entropy(logits, torch.tensor([1]))
    torch.testing.assert_close(losses["itm"], wanted)
    torch.stack(list(losses.values())).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in task.parameters() if weight.grad is not None)


def test_pairs_of_one_picture_only_have_no_negative_either():
    task, batch = blip_task(match_ids=True), tiny.pairs(3)
    batch["image_ids"] = torch.full((3,), 4)
    task.begin_step(0)
    memory = task.model.memory(task.model.encode_image(batch["pixel_values"]))
    logits = task.model.itm_logits(memory, batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(task(batch)["itm"], F.cross_entropy(logits, torch.ones(3, dtype=torch.long)))


def test_draws_depend_on_seed_and_step_alone(monkeypatch):
    draws = recorded_draws(monkeypatch)
    for number, (seed, step) in enumerate(((0, 3), (0, 3), (0, 4), (1, 3))):
        task = blip_task(seed=seed, momentum=1.0)
        torch.manual_seed(number)  # the global state has no say
        task.begin_step(step)
        task(tiny.pairs(16))
    first, again, other_step, other_seed = (
        torch.cat([draws[2 * k][2], draws[2 * k + 1][2]]) for k in range(4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_step) and not torch.equal(first, other_seed)


# --- twin, queue, ramp, temperature -------------------------------------------------------------------------


def test_queue_replaces_its_oldest_entries_and_wraps():
    queue = FeatureQueue(5, 2)
    noise = queue.images.clone(), queue.texts.clone()
    assert queue.ids.tolist() == [-100] * 5
    assert torch.allclose(noise[0].norm(dim=1), torch.ones(5)) and not torch.equal(*noise)

    def push(*ids: int) -> None:
        values = torch.tensor(ids, dtype=torch.float32)[:, None].expand(-1, 2)
        queue.push_(values, -values, torch.tensor(ids))

    push(1, 2)
    assert queue.ids.tolist() == [1, 2, -100, -100, -100] and queue.pointer.item() == 2
    assert torch.equal(queue.images[2:], noise[0][2:]) and torch.equal(queue.texts[2:], noise[1][2:])
    push(3, 4)
    push(5, 6)
    assert queue.ids.tolist() == [6, 2, 3, 4, 5] and queue.pointer.item() == 1
    assert queue.images[:, 0].tolist() == [6, 2, 3, 4, 5] and queue.texts[:, 1].tolist() == [
        -6,
        -2,
        -3,
        -4,
        -5,
    ]
    push(*range(10, 17))  # more than it holds: the last ones stay, and the place goes on counting
    assert sorted(queue.ids.tolist()) == [12, 13, 14, 15, 16] and queue.pointer.item() == 3
    assert queue.images[:, 0].tolist() == queue.ids.tolist()
    push(20)
    assert 12 not in queue.ids.tolist(), "the oldest went first"


def test_a_step_pushes_the_twins_features_and_evaluation_none():
    task, batch = blip_task(), tiny.pairs(4)
    task.begin_step(0)
    images, texts = task.twin.features(batch, batch["input_ids"])
    task.eval()
    task(batch)
    assert task.queue.pointer.item() == 0
    task.train()
    task(batch)
    assert torch.equal(task.queue.images[:4], images) and torch.equal(task.queue.texts[:4], texts)
    assert task.queue.ids.tolist() == [0, 1, 2, 3, -100, -100]


def test_without_a_queue_the_batch_is_all_there_is():
    task = blip_task(queue_size=0)
    task.begin_step(0)
    assert task(tiny.pairs(4))["itc"].isfinite()


def test_soft_targets_ramp_up():
    task = blip_task(alpha=0.4, alpha_ramp_steps=10)
    found = []
    for step in (0, 5, 10, 99):
        task.begin_step(step)
        found.append(task.alpha)
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.4])
    at_once = blip_task(alpha=0.4)
    at_once.begin_step(0)
    assert at_once.alpha == 0.4


@pytest.mark.parametrize("value, wanted", [(9.0, 0.5), (-1.0, 0.001), (0.07, 0.07)])
def test_temperature_is_kept_in_its_bounds(value, wanted):
    task = blip_task()
    task.model.temperature.data.fill_(value)
    task.begin_step(0)
    assert task.model.temperature.item() == pytest.approx(wanted)


def test_twin_starts_as_a_copy_and_follows_by_the_formula():
    torch.manual_seed(0)
    model = tiny.blip(dropout=0.1)
    task = BlipTask(model, BlipTaskConfig(queue_size=4, momentum=0.9))
    followed = {name: model.get_parameter(name).detach().clone() for name, _ in task.twin.named_parameters()}
    assert {name.split(".")[0] for name in followed} == {"vision", "text_encoder", "vision_proj", "text_proj"}
    assert not any("cross_attention" in name for name in followed)
    for step in range(3):
        tiny.stir_(model, seed=step)
        followed = {
            name: 0.9 * old + 0.1 * model.get_parameter(name).detach() for name, old in followed.items()
        }
        task.begin_step(step)
    for name, wanted in followed.items():
        torch.testing.assert_close(task.twin.get_parameter(name).detach(), wanted, atol=1e-6, rtol=0)


def test_no_gradient_reaches_the_twin_or_the_queue():
    task = blip_task(dropout=0.1).train()
    assert not any(module.training for module in task.twin.modules()), "a teacher drops nothing"
    task.begin_step(0)
    torch.stack(list(task(tiny.pairs(4)).values())).sum().backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in task.twin.parameters())
    assert not any(buffer.requires_grad for buffer in task.queue.buffers())
    missing = [name for name, weight in task.model.named_parameters() if weight.grad is None]
    assert missing == [], "and every weight of the model gets one"


def test_a_frozen_tower_has_no_twin_and_no_gradient():
    task = blip_task(frozen=True)
    assert MomentumTwin(task.model).vision is None
    task.begin_step(0)
    torch.stack(list(task(tiny.pairs(4)).values())).sum().backward()
    assert all(weight.grad is None for weight in task.model.vision.parameters())


def test_pretrained_text_may_learn_slower_than_fresh_parts():
    task = blip_task(text_lr_scale=0.3)
    scales = {name: task.lr_scale(name) for name, _ in task.named_parameters()}
    slow = {name for name, scale in scales.items() if scale == 0.3}
    assert set(scales.values()) == {0.3, 1.0}
    assert all("text_encoder" in name or "text_decoder" in name for name in slow)
    assert "model.text_encoder.embeddings.word.weight" in slow
    assert not any("cross_attention" in name or "proj" in name or "head" in name for name in slow)


@pytest.mark.parametrize("wrong", [{"negatives": "all"}, {"momentum": 1.5}, {"alpha": -0.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BlipTaskConfig(**wrong)
