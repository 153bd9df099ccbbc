"""BLIP for NLVR2 against a plain reference, written here from the paper and the released code."""

import math
from dataclasses import replace

import torch

from openblip.models.blip_nlvr import BlipNlvr, BlipNlvrConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig

VISION = VisionConfig(32, 8, 24, 2, 4, 32)
TEXT = TextConfig(60, 16, 4, 4, 24, max_position_embeddings=16, dropout=0.0, enc_token_id=57)


def nlvr() -> BlipNlvr:
    model = BlipNlvr(BlipNlvrConfig(VISION, TEXT)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def norm(weights, name, x):
    centred = x - x.mean()
    return (
        centred / torch.sqrt(centred.square().mean() + 1e-12) * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def linear(weights, name, x):
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def heads(q, keys, values):
    """One query over all keys, head by head: 4 heads of 4."""
    out = []
    for h in range(4):
        part = slice(4 * h, 4 * h + 4)
        scores = torch.stack([q[part] @ key[part] / math.sqrt(4) for key in keys]).softmax(dim=0)
        out.append(sum(score * value[part] for score, value in zip(scores, values)))
    return torch.cat(out)


def slow_logits(w: dict[str, torch.Tensor], left, right, ids: list[int]) -> torch.Tensor:
    """Logits of one sentence over two images (tokens [N, D] each), token by token."""
    words = [57, *ids[1:]]
    x = [
        norm(w, "text_encoder.embeddings.norm", w["text_encoder.embeddings.word.weight"][word] +
             w["text_encoder.embeddings.position.weight"][i])
        for i, word in enumerate(words)
    ]  # fmt: skip
    for layer in range(4):
        at = f"text_encoder.layers.{layer}."
        qkv = [linear(w, f"{at}self_attention.attention.qkv", token).chunk(3) for token in x]
        keys, values = [k for _, k, _ in qkv], [v for _, _, v in qkv]
        x = [
            norm(w, f"{at}self_attention.residual.norm",
                 token + linear(w, f"{at}self_attention.attention.out", heads(q, keys, values)))
            for token, (q, _, _) in zip(x, qkv)
        ]  # fmt: skip
        cross = f"{at}cross_attention."
        out = []
        for token in x:
            seen = []
            for side, image in (("left", left), ("right", right)):
                pairs = [linear(w, f"{cross}{side}.kv", patch).chunk(2) for patch in image]
                looked = heads(
                    linear(w, f"{cross}{side}.q", token), [k for k, _ in pairs], [v for _, v in pairs]
                )
                seen.append(linear(w, f"{cross}{side}.out", looked))
            merged = sum(seen) / 2 if layer < 2 else linear(w, f"{cross}merge", torch.cat(seen))
            out.append(norm(w, f"{cross}residual.norm", token + merged))
        x = [
            norm(w, f"{at}feed_forward.residual.norm", token + linear(w, f"{at}feed_forward.mlp.fc2",
                 torch.nn.functional.gelu(linear(w, f"{at}feed_forward.mlp.fc1", token))))
            for token in out
        ]  # fmt: skip
    return linear(w, "cls_head.2", linear(w, "cls_head.0", x[0]).clamp(min=0))


@torch.no_grad()
def test_logits_are_those_of_the_plain_reference():
    model = nlvr()
    left, right = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    lengths, ids = [6, 4, 5], torch.randint(1, 50, (3, 6))
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    embeds = model.encode_image(torch.cat([left, right]))
    logits = model.logits(model.memory(embeds), ids, mask)
    assert logits.shape == (3, 2)
    for i, length in enumerate(lengths):
        wanted = slow_logits(model.state_dict(), embeds[i], embeds[3 + i], ids[i, :length].tolist())
        torch.testing.assert_close(logits[i], wanted, rtol=0, atol=1e-10)
        swapped = slow_logits(model.state_dict(), embeds[3 + i], embeds[i], ids[i, :length].tolist())
        assert (swapped - wanted).abs().max() > 1e-4, "left is not right"


def test_twins_merge_by_a_mean_below_and_a_map_above():
    with torch.device("meta"):
        model = BlipNlvr(BlipNlvrConfig())
    merges = [layer.cross_attention.merge for layer in model.text_encoder.layers]
    assert merges[:6] == [None] * 6
    assert all((merge.in_features, merge.out_features) == (1536, 768) for merge in merges[6:])
    assert (model.config.vision.image_size, model.config.vision.drop_path_rate) == (384, 0.1)


def test_negatives_are_an_index_into_both_memories():
    model, ids = nlvr(), torch.randint(1, 50, (4, 5))
    embeds = model.encode_image(torch.randn(8, 3, 32, 32, dtype=torch.float64))
    order = torch.tensor([3, 3, 0, 1])
    torch.testing.assert_close(
        model.logits(model.memory(embeds).rows(order), ids),
        model.logits(model.memory(torch.cat([embeds[:4][order], embeds[4:][order]])), ids),
    )


def test_a_frozen_tower_is_not_trained():
    model = BlipNlvr(BlipNlvrConfig(replace(VISION, drop_path_rate=0.9), TEXT, freeze_vision=True)).train()
    assert not model.vision.training and model.text_encoder.training
    assert not model.encode_image(torch.randn(2, 3, 32, 32)).requires_grad
    assert all(not parameter.requires_grad for parameter in model.vision.parameters())


def test_recomputing_activations_changes_nothing():
    model, ids = nlvr().train(), torch.randint(1, 50, (2, 5))
    pixel_values = torch.randn(4, 3, 32, 32, dtype=torch.float64)

    def run():
        model.zero_grad()
        logits = model.logits(model.memory(model.encode_image(pixel_values)), ids)
        logits.square().sum().backward()
        return logits, [parameter.grad.clone() for parameter in model.parameters()]

    plain = run()
    model.set_grad_checkpointing()
    assert model.text_encoder.checkpointing and model.vision.checkpointed == 2
    torch.testing.assert_close(run(), plain, rtol=0, atol=0)
