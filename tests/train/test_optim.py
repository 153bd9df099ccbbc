import math

import pytest
import torch
from torch import nn

from openblip.config import ConfigError, UserError, from_dict
from openblip.models.vit import VisionTransformer
from openblip.train import optim
from openblip.train.config import TrainConfig
from tests.train import tiny


def curve(**settings) -> list[float]:
    config = TrainConfig(**settings)
    return [optim.learning_rate(config, step) for step in range(config.max_steps)]


def test_warmup_then_cosine_every_step():
    lrs = curve(max_steps=30, warmup_steps=10, warmup_lr=0.1, lr=1.1, min_lr=0.1, schedule="cosine")
    assert lrs[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert lrs[10] == 1.1
    assert lrs[15] == pytest.approx(0.1 + 0.5 * (1 + math.sqrt(0.5)))
    assert lrs[20] == pytest.approx(0.6)
    assert lrs[29] == pytest.approx(0.1 + 0.5 * (1 + math.cos(math.pi * 19 / 20)))
    config = TrainConfig(max_steps=30, warmup_steps=10, lr=1.1, min_lr=0.1)
    assert optim.learning_rate(config, 30) == optim.learning_rate(config, 99) == pytest.approx(0.1)


def test_linear_and_constant():
    assert curve(max_steps=4, lr=1.0, min_lr=0.2, schedule="linear") == pytest.approx([1.0, 0.8, 0.6, 0.4])
    constant = curve(max_steps=4, lr=1.0, warmup_steps=2, warmup_lr=0.0, schedule="constant")
    assert constant == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("warmup", [0, 3, 12])
def test_step_decay_is_the_schedule_of_the_released_blip(warmup):
    """Its two functions and its epoch loop, written out: warm-up inside epoch 0 only, then 0.9 per epoch."""
    lr, min_lr, start, per_epoch, epochs = 3e-4, 2e-4, 1e-6, 8, 6
    expected = []
    for epoch in range(epochs):
        current = max(min_lr, lr * 0.9**epoch)
        for i in range(per_epoch):
            if epoch == 0 and warmup:
                current = min(lr, start + (lr - start) * i / warmup)
            expected.append(current)
    lrs = curve(
        max_steps=per_epoch * epochs,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=warmup,
        warmup_lr=start,
        schedule="step_decay",
        steps_per_epoch=per_epoch,
    )
    assert lrs == pytest.approx(expected, rel=1e-12)
    assert lrs[-1] == min_lr


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Linear(3, 4)
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.query_tokens = nn.Parameter(torch.randn(1, 2, 4))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm([2, 4])  # its weight has two dimensions
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.head = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.decoder = nn.ModuleDict({"shared": self.blocks[0]})


def decayed_names(module: nn.Module, groups: list[dict]) -> set[str]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[p] for group in groups if group["weight_decay"] > 0 for p in group["params"]}


def test_what_decays():
    module = Towers()
    groups = optim.param_groups(module, 0.05, no_decay={"position"})
    blocks = {f"blocks.{i}.weight" for i in range(3)}
    assert decayed_names(module, groups) == {"embeddings.weight", "head.weight", "query_tokens"} | blocks
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything))  # the shared block is there once
    assert set(everything) == {p for p in module.parameters() if p.requires_grad}


def test_no_decay_knows_each_name_of_a_shared_parameter_and_no_others():
    module = Towers()
    groups = optim.param_groups(module, 0.05, no_decay={"position", "decoder.shared.weight"})
    assert "blocks.0.weight" not in decayed_names(module, groups)
    with pytest.raises(ValueError, match="'positions', but no parameter"):
        optim.param_groups(module, 0.05, no_decay={"positions"})


def test_nothing_to_train_is_said():
    with pytest.raises(UserError, match="nothing to train"):
        optim.param_groups(nn.Linear(2, 2).requires_grad_(False), 0.05)


def test_tower_lr_scale_reaches_the_weights():
    """Adam's first step is as long as the learning rate, whatever the gradient: weights show the scale."""
    tower = VisionTransformer(tiny.vision(hidden_size=8, num_hidden_layers=3, num_attention_heads=2))
    module = nn.ModuleDict({"vision": tower, "ln_vision": nn.LayerNorm(8), "head": nn.Linear(4, 4)})
    groups = optim.param_groups(module, 0.0, lr_scale=lambda name: optim.tower_lr_scale(name, 0.5, 3))
    optimizer = torch.optim.AdamW(groups)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optim.set_lr_(optimizer, 0.1)
    optimizer.step()
    moved = {n: (before[n] - p.detach()).abs().mean().item() / 0.1 for n, p in module.named_parameters()}
    blocks = {f"vision.blocks.{number}.": 0.5 ** (3 - number) for number in range(3)}
    first = dict.fromkeys(("vision.patch", "vision.class", "vision.position"), 0.5**4)
    behind = dict.fromkeys(("vision.norm.", "ln_vision.", "head."), 1.0)
    for name, distance in moved.items():
        (factor,) = [scale for start, scale in (blocks | first | behind).items() if name.startswith(start)]
        assert distance == pytest.approx(factor, rel=1e-3), name


def test_ema_follows_its_formula_and_gives_the_weights_back():
    module = nn.Linear(2, 1, bias=False)
    module.weight.data.fill_(1.0)
    ema = optim.Ema(module, decay=0.3)
    module.weight.data.fill_(2.0)
    ema.update_(module, 0)  # d = min(0.3, 1/10)
    assert ema.weights["weight"].tolist()[0] == pytest.approx([1.9, 1.9])
    ema.update_(module, 50)  # d = 0.3
    assert ema.weights["weight"].tolist()[0] == pytest.approx([1.97, 1.97])
    with pytest.raises(RuntimeError, match="evaluation broke"), ema.swapped_into_(module):
        assert torch.equal(module.weight, ema.weights["weight"])
        raise RuntimeError("evaluation broke")
    assert module.weight.tolist()[0] == [2.0, 2.0]
    ema.copy_to_(module)
    assert torch.equal(module.weight, ema.weights["weight"])


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("max_steps", 0, "1 or more"),
        ("batch_size", -4, "1 or more"),
        ("batch_tokens", 0, "1 or more, or null"),
        ("accumulate", 0, "1 or more"),
        ("lr", 0.0, "above 0"),
        ("lr", math.nan, "above 0"),
        ("min_lr", 1.0, r"0 to lr \(0.0003\)"),
        ("warmup_steps", 1001, r"0 to max_steps \(1000\)"),
        ("schedule", "cosin", "one of cosine, linear, constant, step_decay"),
        ("weight_decay", -0.1, "0 or more"),
        ("betas", (0.9, 1.0), r"two numbers in \[0, 1\)"),
        ("eps", 0.0, "above 0"),
        ("clip_norm", 0.0, "above 0, or null"),
        ("precision", "fp16", "one of fp32, bf16"),
        ("ema_decay", 1.0, "between 0 and 1, or null"),
        ("log_every", 0, "1 or more"),
        ("save_every", 0, "1 or more, or null"),
        ("eval_every", 0, "1 or more, or null"),
        ("keep_checkpoints", 0, "1 or more"),
        ("seed", -1, "0 or more"),
        ("decay_rate", 1.1, "above 0 and at most 1"),
        ("loss_weights", {"itc": -1.0}, "weights of 0 or more"),
    ],
)
def test_impossible_values_name_the_field_and_what_is_right(field, value, right):
    with pytest.raises(ConfigError, match=f"^{field}: got .* wanted .*{right}"):
        TrainConfig(**{field: value})


def test_config_dependencies_and_place_in_the_file():
    with pytest.raises(ConfigError, match="steps_per_epoch: got None"):
        TrainConfig(schedule="step_decay")
    with pytest.raises(ConfigError, match=r"warmup_lr: got 0\.01"):
        TrainConfig(warmup_steps=5, warmup_lr=0.01)
    with pytest.raises(ConfigError, match=r"run\.json: .*clip_norm: got 0.0"):
        from_dict(TrainConfig, {"clip_norm": 0.0}, "run.json")
