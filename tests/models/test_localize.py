"""Grad-CAM of cross-attention: right gradients, right grid, and it finds what was planted."""

from dataclasses import replace

import pytest
import torch

from openblip.models import layers
from openblip.models.blip import Blip, BlipConfig, without_encoder
from openblip.models.localize import default_layer, localize, merge_word_pieces
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig

TEXT = TextConfig(
    60, 16, 3, 2, 24, max_position_embeddings=8, dropout=0.0, cls_token_id=54, sep_token_id=55,
    dec_token_id=56, enc_token_id=57,
)  # fmt: skip
CONFIG = BlipConfig(VisionConfig(16, 8, 10, 1, 2, 12), TEXT, projection_dim=4, share=(), decoder=False)


def blip() -> Blip:
    model = Blip(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two images of 2 x 3 patches, texts of four and three tokens."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return torch.randn(2, 7, 10, dtype=torch.float64), torch.randint(1, 50, (2, 4)) * mask, mask


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gradients_are_those_of_small_differences(layer, monkeypatch):
    """The attention of one layer is nudged, entry by entry, and the score is read again."""
    model, (embeds, ids, mask) = blip(), inputs()
    attend, plain, call = layers.attend, {}, {"count": 0}

    def nudged(q, k, v, mask=None, *, weights=None, nudge=None, **rest):
        if weights is None:  # self-attention
            return attend(q, k, v, mask, **rest)
        out = attend(q, k, v, mask, weights=weights, **rest)
        if call["count"] == layer:
            plain["attention"] = weights[-1].detach()
            if call["nudge"] is not None:
                out = (weights[-1] + call["nudge"]) @ v
        call["count"] += 1
        return out

    def score(nudge) -> float:
        call.update(count=0, nudge=nudge)
        return float(model.itm_logits(model.memory(embeds), ids, mask, weights=[])[:, 1].sum())

    monkeypatch.setattr(layers, "attend", nudged)
    with torch.no_grad():
        score(None)
        attention = plain["attention"]
        gradient, step = torch.zeros_like(attention), 1e-6
        for entry in range(attention.numel()):
            nudge = torch.zeros_like(attention)
            nudge.view(-1)[entry] = step
            gradient.view(-1)[entry] = (score(nudge) - score(-nudge)) / (2 * step)
    monkeypatch.undo()
    wanted = (attention * gradient.clamp(min=0)).mean(dim=1)[:, :, 1:].reshape(2, 4, 2, 3)
    found = localize(model, embeds, (2, 3), ids, mask, layer=layer)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
    assert found[:, 0].amax(dim=(1, 2)).min() > 1e-5, "the text as a whole has a map"
    assert (found[:, 1:3].abs().max() > 1e-5) == (layer < 2), "words have one, but in the last layer"
    assert (found[1, 3] == 0).all(), "padding has none"


def test_maps_follow_the_patches_in_raster_order():
    model, (embeds, ids, mask) = blip(), inputs()
    maps = localize(model, embeds, (2, 3), ids, mask)
    order = torch.tensor([0, 4, 2, 1, 6, 5, 3])  # the class token stays, patches change places
    moved = localize(model, embeds[:, order], (3, 2), ids, mask)
    torch.testing.assert_close(moved.flatten(2), maps.flatten(2)[..., order[1:] - 1])
    assert moved.shape == (2, 4, 3, 2)


def test_the_default_layer_is_the_released_ones():
    assert [default_layer(depth) for depth in (1, 2, 3, 6, 12, 24)] == [0, 0, 1, 3, 7, 14]
    model, (embeds, ids, mask) = blip(), inputs()
    maps = localize(model, embeds, (2, 3), ids, mask)
    assert torch.equal(maps, localize(model, embeds, (2, 3), ids, mask, layer=1))
    assert not torch.equal(maps, localize(model, embeds, (2, 3), ids, mask, layer=0))


def test_the_model_is_left_alone_whatever_the_mode():
    model, (embeds, ids, mask) = blip(), inputs()
    wanted = localize(model, embeds, (2, 3), ids, mask)
    assert not wanted.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(localize(model, embeds, (2, 3), ids, mask), wanted)
    with torch.inference_mode():
        made_there = embeds.clone(), ids.clone(), mask.clone()
        assert torch.equal(localize(model, made_there[0], (2, 3), *made_there[1:]), wanted)
    model.requires_grad_(False)
    assert torch.equal(localize(model, embeds, (2, 3), ids, mask), wanted)


def test_a_text_alone_has_the_map_it_has_in_a_batch():
    model, (embeds, ids, mask) = blip(), inputs()
    together = localize(model, embeds, (2, 3), ids, mask)
    alone = localize(model, embeds[1:], (2, 3), ids[1:, :3])
    torch.testing.assert_close(together[1:, :3], alone)


def test_what_cannot_be_localised():
    model, (embeds, ids, mask) = blip(), inputs()
    with pytest.raises(ValueError, match="6 patches are no grid of 2 x 2"):
        localize(model, embeds, (2, 2), ids, mask)
    with pytest.raises(ValueError, match="layer 3: the text encoder has layers 0 to 2"):
        localize(model, embeds, (2, 3), ids, mask, layer=3)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        localize(model.train(), embeds, (2, 3), ids, mask)
    captioner = without_encoder(Blip(replace(CONFIG, decoder=True)).eval())
    with pytest.raises(ValueError, match="no text encoder"):
        localize(captioner, embeds, (2, 3), ids, mask)


def test_pieces_become_words():
    maps = torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    words, merged = merge_word_pieces(["a", "snow", "##man", "##s"], maps)
    assert words == ["a", "snowmans"]
    assert merged.shape == (2, 2, 3) and merged[:, 0, 0].tolist() == [0, 2]
    assert merge_word_pieces(["##man"], maps[:1])[0] == ["man"]


def a_model_that_looks_for_things() -> Blip:
    """Built by hand. Image features 0 to 4 are five things, words 10 to 14 their names.

    In layer 0 a word looks at the patches that have its thing and takes what it sees into dimensions 5 to 9;
    in layer 1 [ENC] collects these from all words into dimension 10, on which the score is read.
    """
    model = Blip(replace(CONFIG, text=replace(TEXT, num_hidden_layers=2))).double().eval()
    with torch.no_grad():
        for name, parameter in model.text_encoder.named_parameters():
            parameter.fill_(1 if name.endswith("norm.weight") else 0)
        words = model.text_encoder.embeddings.word.weight
        words[10:15] = torch.eye(16)[:5]
        words[57], words[55] = torch.eye(16)[15], torch.eye(16)[14]  # [ENC], [SEP]
        first, second = model.text_encoder.layers
        look = first.cross_attention.attention
        for thing in range(5):
            look.q.weight[thing, thing] = 2  # head 0: the name ...
            look.kv.weight[thing, thing] = 2  # ... against the thing: 16 keys, then 16 values
            look.kv.weight[16 + thing, thing] = 1
            look.out.weight[5 + thing, thing] = 1
        collect = second.self_attention.attention
        collect.qkv.weight[32, 5:10] = 1  # 16 queries, 16 keys, 16 values
        collect.out.weight[10, 0] = 1
        model.itm_head.weight.zero_()
        model.itm_head.bias.zero_()
        model.itm_head.weight[1, 10] = 1
    return model


def test_it_finds_what_was_planted():
    model = a_model_that_looks_for_things()
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(50, 12, generator=generator).argsort(dim=1)[:, :2]  # two patches of 3 x 4
    things = torch.rand(50, 5, generator=generator).argsort(dim=1)[
        :, :3
    ]  # two that are there, and one that is not
    rows = torch.arange(50)
    embeds = 0.3 * torch.randn(50, 13, 10, generator=generator, dtype=torch.float64)
    for i in range(2):
        embeds[rows, 1 + places[:, i], things[:, i]] += 3

    def text(*named: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [torch.full((50,), 54), *(10 + thing for thing in named), torch.full((50,), 55)], dim=1
        )

    there, absent = (model.itm_logits(model.memory(embeds), text(things[:, i]))[:, 1] for i in (0, 2))
    assert (there > absent).all(), "the model does what it was built for"
    maps = localize(model, embeds, (3, 4), text(things[:, 1], things[:, 0]))
    for word, i in ((1, 1), (2, 0)):
        assert torch.equal(maps[:, word].flatten(1).argmax(dim=1), places[:, i])
