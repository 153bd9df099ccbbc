"""Temporal encoders: shapes, what they know of time, and the masks and the machine written out a second time."""

import math

import pytest
import torch
import torch.nn.functional as F

from openblip.config import ConfigError, from_dict, to_dict
from openblip.models.temporal import TemporalConfig, build_temporal, time_embedding

B, T, K, D, M = 2, 5, 6, 8, 3
KINDS = {
    "mean": TemporalConfig(D, "mean", num_tokens=K, frame_tokens=K),
    "attention": TemporalConfig(D, "attention", num_tokens=M, frame_tokens=K),
    "ttm": TemporalConfig(D, "ttm", num_tokens=M, frame_tokens=K, num_hidden_layers=2, num_attention_heads=2),
}


def made(kind):
    """Weights large enough that every path shows in the output."""
    torch.manual_seed(0)
    encoder = build_temporal(KINDS[kind]).double().eval()
    with torch.no_grad():
        for value in encoder.parameters():
            value.copy_(torch.randn_like(value) * 0.5)
    return encoder


@pytest.fixture
def video():
    return torch.randn(B, T, K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def soft_masks(weights, name, tokens):
    """TokenLearner for one video, one mask at a time: tokens [N, D] -> [M, D]."""
    normed = F.layer_norm(
        tokens, (tokens.shape[1],), weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"]
    )
    out = []
    for mask in range(len(weights[f"{name}.fc2.weight"])):
        powers = []
        for token in normed:
            inner = weights[f"{name}.fc1.weight"] @ token
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            powers.append(math.exp(float(weights[f"{name}.fc2.weight"][mask] @ inner)))
        out.append(sum(power / sum(powers) * token for power, token in zip(powers, tokens, strict=True)))
    return torch.stack(out)


@pytest.mark.parametrize("kind", list(KINDS))
def test_any_number_of_frames_becomes_the_tokens_of_one_video(kind, video):
    encoder = made(kind)
    for frames in (1, 2, T):
        found = encoder(video[:, :frames])
        assert found.shape == (B, KINDS[kind].num_tokens, D) and found.isfinite().all()
    for row in range(B):
        assert (encoder(video)[row] - encoder(video[row : row + 1])[0]).abs().max() < 1e-12


@pytest.mark.parametrize("kind", list(KINDS))
def test_only_the_turing_machine_knows_the_order_of_frames(kind, video):
    encoder = made(kind)
    for order in ([4, 3, 2, 1, 0], [1, 0, 2, 3, 4]):
        change = (encoder(video[:, order]) - encoder(video)).abs().max()
        assert (change > 1e-4) if kind == "ttm" else (change < 1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_frame_and_token_matters(kind, video):
    encoder = made(kind)
    video.requires_grad_()
    encoder(video).square().sum().backward()
    assert (video.grad.abs().amax(dim=-1) > 1e-9).all()
    for name, value in encoder.named_parameters():
        assert value.grad is not None and value.grad.abs().max() > 1e-9, name
    assert (kind == "mean") == (not list(encoder.parameters()))


def test_mean_is_over_the_frames(video):
    wanted = sum(video[:, frame] for frame in range(T)) / T
    assert (made("mean")(video) - wanted).abs().max() < 1e-12


def test_attention_is_soft_masks_over_all_tokens_of_all_frames(video):
    encoder = made("attention")
    for row in range(B):
        wanted = soft_masks(encoder.state_dict(), "pool", video[row].reshape(T * K, D))
        assert (encoder(video)[row] - wanted).abs().max() < 1e-12
    same = encoder(torch.ones_like(video))
    assert (same - 1).abs().max() < 1e-12  # masks sum to one


def test_the_turing_machine_reads_processes_and_writes_per_group(video):
    encoder = made("ttm")
    weights = encoder.state_dict()
    found, times = encoder(video), time_embedding(T, D).double()
    for row in range(B):
        memory = weights["memory"]
        for number in range(T):
            after = []
            for group in range(K):
                token = video[row, number, group] + times[number]
                tokens = torch.cat([memory[group], token[None]])
                processed = encoder.process(tokens[None])[0].detach()
                after.append(soft_masks(weights, "write", torch.cat([memory[group], processed, token[None]])))
            memory = torch.stack(after)
        wanted = soft_masks(weights, "pool", memory.reshape(-1, D))
        assert (found[row] - wanted).abs().max() < 1e-12


def test_processing_is_attention_within_a_group():
    """Groups meet only in the last pooling: an encoder whose pooling is cut off keeps them apart."""
    encoder = made("ttm")
    encoder.pool = torch.nn.Identity()
    video = torch.randn(1, T, K, D, dtype=torch.float64)
    moved = video.clone()
    moved[:, 2, 4] += torch.randn(D, dtype=torch.float64)
    change = (encoder(moved) - encoder(video)).abs().view(K, 4, D).amax(dim=(1, 2)) > 1e-9
    assert change.tolist() == [False, False, False, False, True, False]


def test_memory_of_the_paper_has_512_states():
    with torch.device("meta"):
        encoder = build_temporal(TemporalConfig(1152))
    assert encoder.memory.shape == (128, 4, 1152)


def test_time_embedding_is_that_of_the_transformer():
    table = time_embedding(64, 10)
    assert table.shape == (64, 10) and time_embedding(3, 7).shape == (3, 7)
    for frame in (0, 1, 63):
        angles = [frame / 10000 ** (2 * (channel // 2) / 10) for channel in range(10)]
        wanted = [math.cos(a) if channel % 2 else math.sin(a) for channel, a in enumerate(angles)]
        assert (table[frame] - torch.tensor(wanted)).abs().max() < 1e-5
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 0.1  # frames are told apart


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "mean"}, "leaves the 128 tokens of a frame; num_tokens is 32"),
        ({"num_tokens": 0}, "num_tokens must be at least 1"),
        ({"num_attention_heads": 3}, "multiple of num_attention_heads 3"),
    ],
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TemporalConfig(16, **arguments)


def test_frames_of_another_number_of_tokens_are_refused(video):
    with pytest.raises(ValueError, match=f"4 tokens per frame, wanted {K}"):
        made("ttm")(video[:, :, :4])


def test_a_config_survives_json():
    for config in KINDS.values():
        assert from_dict(TemporalConfig, to_dict(config), "here") == config
