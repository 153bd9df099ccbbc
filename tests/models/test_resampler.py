"""The perceiver resampler: a second, naive one to compare with, and who may look at whom."""

import math

import pytest
import torch

from openblip.config import ConfigError, from_dict, to_dict
from openblip.models.resampler import PerceiverResampler, ResamplerConfig

G, N, L, K, D, C = 3, 7, 4, 5, 8, 6
SIZES = {"hidden_size": D, "num_latents": K, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 4}
PLAIN = ResamplerConfig(**SIZES, output_size=10)
CONFIGS = {
    "plain": PLAIN,
    "unprojected": ResamplerConfig(**SIZES, output_size=None),
    "frames": ResamplerConfig(**SIZES, output_size=10, max_frames=4),
    "condition": ResamplerConfig(**SIZES, output_size=10, condition_size=C),
}


def randomised(config):
    """Weights large enough that every path shows in the output; norms, too, are not what they begin with."""
    torch.manual_seed(0)
    resampler = PerceiverResampler(config).double().eval()
    with torch.no_grad():
        for value in resampler.parameters():
            value.copy_(torch.randn_like(value) * 0.5)
    return resampler


def noise(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def real(*shape, seed=2):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    return mask.index_fill(-1, torch.tensor([0]), True)


def naive(weights, config, media, condition=None):
    """One group [N, D], one query and one head at a time; only what is real is given. -> [K, H]."""

    def norm(x, name):
        spread = ((x - x.mean()) ** 2).mean() + 1e-5
        return (x - x.mean()) / spread.sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    rows = list(weights["latents"])
    if condition is not None:
        projected = weights["condition_projection.weight"], weights["condition_projection.bias"]
        rows += [projected[0] @ norm(word, "condition_norm") + projected[1] for word in condition]
    heads, d = config.num_attention_heads, config.head_dim
    for number in range(config.num_hidden_layers):
        layer = f"layers.{number}"
        latents = [norm(row, f"{layer}.norm_latents") for row in rows]
        seen = [norm(token, f"{layer}.norm_media") for token in media] + latents
        key_value = [weights[f"{layer}.kv.weight"] @ token for token in seen]
        keys, values = ([pair[half * heads * d :][: heads * d] for pair in key_value] for half in (0, 1))
        after = []
        for row, latent in zip(rows, latents, strict=True):
            query = weights[f"{layer}.q.weight"] @ latent
            mixed = []
            for head in range(heads):
                part = slice(head * d, (head + 1) * d)
                powers = [math.exp(float(query[part] @ key[part]) / math.sqrt(d)) for key in keys]
                mixed.append(
                    sum(p / sum(powers) * value[part] for p, value in zip(powers, values, strict=True))
                )
            row = row + weights[f"{layer}.out.weight"] @ torch.cat(mixed)
            inner = weights[f"{layer}.fc1.weight"] @ norm(row, f"{layer}.norm_ff")
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))  # the exact GELU
            after.append(row + weights[f"{layer}.fc2.weight"] @ inner)
        rows = after
    out = torch.stack([norm(row, "norm") for row in rows[: config.num_latents]])
    if config.output_size is None:
        return out
    return out @ weights["projection.weight"].T + weights["projection.bias"]


@pytest.mark.parametrize("name", ["plain", "unprojected", "condition"])
def test_it_is_the_naive_resampler_of_what_is_real(name):
    config = CONFIGS[name]
    resampler, media, mask = randomised(config), noise(G, N, D), real(G, N)
    words, words_mask = (noise(G, L, C, seed=3), real(G, L)) if name == "condition" else (None, None)
    found = resampler(media, mask, words, words_mask)
    assert found.shape == (G, K, config.output_size or D)
    assert not mask.all()
    for group in range(G):
        condition = None if words is None else words[group][words_mask[group]]
        wanted = naive(resampler.state_dict(), config, media[group][mask[group]], condition)
        assert (found[group] - wanted).abs().max() < 1e-12


def test_frames_are_marked_with_their_time_and_joined():
    config, media, mask = CONFIGS["frames"], noise(G, 3, N, D), real(G, 3, N)
    resampler = randomised(config)
    found = resampler(media, mask)
    marked = media + resampler.frame_embedding.detach()[:3].view(3, 1, D)
    for group in range(G):
        wanted = naive(resampler.state_dict(), config, marked[group].reshape(-1, D)[mask[group].reshape(-1)])
        assert (found[group] - wanted).abs().max() < 1e-12
    assert (found - resampler(media.flip(1), mask.flip(1))).abs().max() > 1e-3  # time matters
    order = torch.tensor([3, 0, 6, 2, 1, 5, 4])
    assert (found - resampler(media[:, :, order], mask[:, :, order])).abs().max() < 1e-12  # place does not


def test_the_order_of_the_media_does_not_matter():
    resampler, media, mask = randomised(PLAIN), noise(G, N, D), real(G, N)
    order = torch.tensor([3, 0, 6, 2, 1, 5, 4])
    assert (resampler(media) - resampler(media[:, order])).abs().max() < 1e-12
    assert (resampler(media, mask) - resampler(media[:, order], mask[:, order])).abs().max() < 1e-12


def test_masked_media_have_no_influence_and_get_no_gradient():
    resampler, media, mask = randomised(PLAIN), noise(G, N, D), real(G, N)
    other = torch.where(mask[..., None], media, noise(G, N, D, seed=9) * 100).requires_grad_()
    found = resampler(other, mask)
    assert torch.equal(found, resampler(media, mask))
    assert torch.equal(found, resampler(media, mask.long()))  # 1 and 0 as well as True and False
    assert (found - resampler(media)).abs().max() > 1e-3
    assert torch.equal(resampler(media), resampler(media, torch.ones(G, N, dtype=torch.bool)))
    found.sum().backward()
    assert (other.grad[~mask] == 0).all() and (other.grad[mask].abs().sum(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_group_without_real_media_is_finite(dtype):
    resampler, media = randomised(PLAIN).to(dtype), noise(G, N, D).to(dtype)
    mask = real(G, N)
    mask[1] = False
    found = resampler(media, mask)
    assert found.isfinite().all()
    found.float().square().mean().backward()
    assert all(value.grad.isfinite().all() for value in resampler.parameters())
    if dtype is torch.float64:
        assert (found[1] - naive(resampler.state_dict(), PLAIN, [])).abs().max() < 1e-12


def test_groups_do_not_see_each_other():
    resampler, media, mask = randomised(PLAIN), noise(G, N, D), real(G, N)
    together = resampler(media, mask)
    for group in range(G):
        alone = resampler(media[group : group + 1], mask[group : group + 1])
        assert (together[group] - alone[0]).abs().max() < 1e-12


def test_a_condition_matters_and_its_padding_does_not():
    resampler, media, words = randomised(CONFIGS["condition"]), noise(G, N, D), noise(G, L, C, seed=3)
    mask, words_mask = real(G, N), real(G, L)
    found = resampler(media, mask, words, words_mask)
    assert found.shape == (G, K, 10)
    padded = torch.where(words_mask[..., None], words, torch.tensor(7.0, dtype=torch.float64))
    assert torch.equal(found, resampler(media, mask, padded, words_mask.long()))
    assert not torch.equal(found, resampler(media, mask, padded + 1, words_mask))
    for column in range(L):
        moved = words.clone()
        moved[:, column, 0] += 1
        change = (resampler(media, mask, moved, words_mask) - found).abs().amax(dim=(1, 2)) > 1e-6
        assert torch.equal(change, words_mask[:, column])
    without = resampler(media, mask)  # the same weights, asked nothing
    nothing = resampler(media, mask, words, torch.zeros_like(words_mask))
    assert (without - nothing).abs().max() < 1e-12
    assert (without - found).abs().max() > 1e-3


def test_words_go_through_the_layers_and_look_at_the_media():
    resampler, words = randomised(CONFIGS["condition"]), noise(1, L, C, seed=3)
    seen = []
    resampler.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output[:, K:]))
    for seed in (1, 8):
        resampler(noise(1, N, D, seed=seed), None, words)
    assert seen[0].shape == (1, L, D) and (seen[0] - seen[1]).abs().max() > 1e-3


def count(module):
    return sum(value.numel() for value in module.parameters())


def test_parameter_count_of_the_released_model():
    with torch.device("meta"):
        released = PerceiverResampler(ResamplerConfig())
    layer = released.layers[0]
    feed_forward = count(layer.norm_ff) + count(layer.fc1) + count(layer.fc2)
    assert count(layer) - feed_forward == 7_082_496 and feed_forward == 10_619_136
    assert count(released) == 109_901_568


def test_no_biases_but_the_norms_and_the_last_projection():
    biases = {name for name in PerceiverResampler(PLAIN).state_dict() if name.endswith(".bias")}
    assert {name for name in biases if "norm" not in name} == {"projection.bias"}


def test_latents_begin_as_standard_normal_noise():
    latents = PerceiverResampler(ResamplerConfig(**{**SIZES, "num_latents": 4000}, max_frames=4000)).latents
    assert abs(latents.mean()) < 0.05 and abs(latents.std() - 1) < 0.05


def test_gradient_checkpointing_changes_nothing():
    resampler, media, mask = randomised(CONFIGS["condition"]), noise(G, N, D), real(G, N)
    words, words_mask = noise(G, L, C, seed=3), real(G, L)
    gradients = []
    for enabled in (False, True):
        resampler.train().zero_grad()
        resampler.set_grad_checkpointing(enabled)
        resampler(media, mask, words, words_mask).square().sum().backward()
        gradients.append([value.grad.clone() for value in resampler.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
    assert all(value.abs().max() > 1e-8 for value in gradients[0])  # gradients reach every parameter


def test_gradient_checkpointing_keeps_only_the_latents_of_a_layer():
    kept = []
    resampler, media = randomised(PLAIN).train(), noise(G, N, D)
    for enabled in (False, True):
        sizes = []
        resampler.set_grad_checkpointing(enabled)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x
        ):
            resampler(media)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_media_and_conditions_it_was_not_made_for_are_refused():
    plain, frames = randomised(PLAIN), randomised(CONFIGS["frames"])
    with pytest.raises(ValueError, match="max_frames is not set"):
        plain(noise(G, 2, N, D))
    with pytest.raises(ValueError, match=r"reads \[G, F, N, D\]"):
        frames(noise(G, N, D))
    with pytest.raises(ValueError, match="5 frames; this resampler has 4"):
        frames(noise(G, 5, N, D))
    with pytest.raises(ValueError, match="without condition_size"):
        plain(noise(G, N, D), None, noise(G, L, C))
    with pytest.raises(ConfigError, match="num_latents must be positive, got 0"):
        ResamplerConfig(num_latents=0)
    with pytest.raises(ConfigError, match="max_frames must be positive"):
        ResamplerConfig(max_frames=0)


def test_a_config_survives_json():
    for config in CONFIGS.values():
        assert from_dict(ResamplerConfig, to_dict(config), "here") == config
