"""BLIP: what is shared, how often an image is projected, video, frozen towers, halves."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from openblip.config import ConfigError
from openblip.models.blip import Blip, BlipConfig, blip_base, blip_large, without_decoder, without_encoder
from openblip.models.generation import GenerationConfig
from openblip.models.text import Memory, TextConfig
from openblip.models.vit import VisionConfig

VISION = VisionConfig(32, 8, 24, 2, 4, 32)
TEXT = TextConfig(
    60, 16, 2, 4, 24, max_position_embeddings=16, dropout=0.0, cls_token_id=54, sep_token_id=55,
    dec_token_id=56, enc_token_id=57,
)  # fmt: skip
CONFIG = BlipConfig(VISION, TEXT, projection_dim=12)


def blip(**changes) -> Blip:
    model = Blip(replace(CONFIG, **changes)).double().eval()
    with torch.no_grad():  # larger than at the start of training, so that everything shows
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


def texts(rows: int, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(3, length + 1, (rows,))
    mask = (torch.arange(length) < lengths[:, None]).long()
    tokens = torch.randint(1, 54, (rows, length)) * mask
    tokens[:, 0] = 54
    return tokens, mask


@pytest.mark.parametrize(
    ("shared", "millions"),
    [
        (("embeddings", "self_attention", "cross_attention", "feed_forward"), 224),
        (("embeddings", "self_attention", "feed_forward"), 252),
        (("embeddings", "cross_attention", "feed_forward"), 252),
        ((), 361),
    ],
    ids=["all", "all but cross-attention", "all but self-attention", "nothing"],
)
def test_parameters_of_the_sharing_ablation(shared, millions):
    """BLIP table 3: everything of a ViT-B model counts, once: ViT at 224 px, text, LM head without the tied
    words, ITC projections, ITM head, temperature."""
    with torch.device("meta"):
        model = Blip(replace(blip_base(), share=shared))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def test_the_large_model():
    with torch.device("meta"):
        model = Blip(blip_large())
    vision = sum(parameter.numel() for parameter in model.vision.parameters())
    assert round(vision / 1e6) == 303
    assert model.text_encoder.layers[3].cross_attention.attention.kv.in_features == 1024
    assert model.text_encoder.layers[3].cross_attention.attention.q.in_features == 768


def test_all_but_self_attention_stays_the_same_in_training():
    model = Blip(CONFIG).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = [value.clone() for value in model.parameters()]
    tokens, mask = texts(2)
    for _ in range(2):
        optimizer.zero_grad()
        memory = model.memory(model.encode_image(images(2).float()))
        itm = F.cross_entropy(model.itm_logits(memory, tokens, mask), torch.tensor([0, 1]))
        itc = (
            model.text_features(tokens, mask) @ model.image_features(model.encode_image(images(2).float())).T
        ).sum()
        lm = F.cross_entropy(
            model.lm_logits(model.lm_states(memory, tokens, mask)).flatten(0, 1), tokens.flatten()
        )
        (itm + itc + lm).backward()
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    assert sum(moved) == len(moved) - 1, "everything learns but the temperature, which is not in these losses"
    encoder, decoder = model.text_encoder.state_dict(), model.text_decoder.state_dict()
    for name, value in encoder.items():
        assert torch.equal(value, decoder[name]) == ("self_attention" not in name), name
    own = {name.split(".", 2)[2] for name in encoder if "self_attention" in name}
    assert {"self_attention.attention.out.weight", "self_attention.residual.norm.weight"} <= own


def losses_and_gradients(model: Blip, make_memory, pixel_values) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Two images, three matching rows each (own text, two others), and one caption each."""
    torch.manual_seed(3)
    (rows, rows_mask), (captions, captions_mask) = texts(6), texts(2)
    embeds = model.encode_image(pixel_values)
    rows_memory, captions_memory = make_memory(embeds)
    itm = F.cross_entropy(model.itm_logits(rows_memory, rows, rows_mask), torch.tensor([1, 0, 0] * 2))
    logits = model.lm_logits(model.lm_states(captions_memory, captions, captions_mask))
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), captions[:, 1:].flatten())
    model.zero_grad()
    pixel_values.grad = None
    (itm + lm).backward()
    gradients = [
        value.grad.clone() for value in [pixel_values, *model.parameters()] if value.grad is not None
    ]
    return torch.stack([itm, lm]).detach(), gradients


def test_an_image_projected_once_is_an_image_projected_each_time():
    model, pixel_values = blip(), images(2).requires_grad_()
    of_row = torch.tensor([0, 0, 0, 1, 1, 1])

    def once(embeds):
        return (memory := model.memory(embeds)), memory

    def by_index(embeds):
        return (memory := model.memory(embeds)).rows(of_row), memory

    def each_time(embeds):
        return model.encoder_memory(embeds[of_row]), model.decoder_memory(embeds)

    wanted = losses_and_gradients(model, each_time, pixel_values)
    assert len(wanted[1]) > 50
    for make in (once, by_index):
        found = losses_and_gradients(model, make, pixel_values)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    mixed = losses_and_gradients(model, lambda embeds: each_time(embeds.flip(0)), pixel_values)
    assert (mixed[0] - wanted[0]).abs().max() > 1e-3, "another image gives another loss"


def test_negatives_are_an_index_into_the_memory():
    model, (tokens, mask) = blip(), texts(4)
    embeds = model.encode_image(images(4))
    others = torch.tensor([2, 3, 3, 0])
    torch.testing.assert_close(
        model.itm_logits(model.memory(embeds).rows(others), tokens, mask),
        model.itm_logits(model.memory(embeds[others]), tokens, mask),
    )


@torch.no_grad()
def test_the_first_token_says_what_is_asked():
    model, (tokens, mask) = blip(), texts(3)
    memory = model.memory(model.encode_image(images(3)))
    other = tokens.clone()
    other[:, 0] = 7
    for ask in (
        lambda ids: model.text_features(ids, mask),
        lambda ids: model.itm_logits(memory, ids, mask),
        lambda ids: model.lm_states(memory, ids, mask),
    ):
        assert torch.equal(ask(tokens), ask(other)), "overwritten, whatever it was"
        assert not torch.equal(ask(tokens), ask(torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1)))
    said = [model.itm_logits(memory, tokens, mask)]
    model.config = replace(CONFIG, text=replace(TEXT, enc_token_id=54))
    said.append(model.itm_logits(memory, tokens, mask))
    assert (said[0] - said[1]).abs().max() > 1e-3, "[ENC] is not [CLS]"


@torch.no_grad()
def test_features_have_length_one():
    model, (tokens, mask) = blip(), texts(3)
    embeds = model.encode_image(images(3))
    for features in (model.image_features(embeds), model.text_features(tokens, mask)):
        assert features.shape == (3, 12)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        model.image_features(embeds), F.normalize(model.vision_proj(embeds[:, 0]), dim=-1)
    )


@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_video_is_the_tokens_of_its_frames(frames):
    model, (tokens, mask) = blip(), texts(2)
    video = images(2 * frames).unflatten(0, (2, frames))
    embeds = model.encode_image(video)
    assert embeds.shape == (2, frames * 17, 24)
    for clip in range(2):
        for t in range(frames):
            frame = model.encode_image(video[clip, t][None])[0]
            torch.testing.assert_close(embeds[clip, 17 * t : 17 * (t + 1)], frame)
    first = torch.stack([model.vision_proj(embeds[:, 17 * t]) for t in range(frames)]).mean(dim=0)
    torch.testing.assert_close(model.image_features(embeds, frames), F.normalize(first, dim=-1))
    assert model.itm_logits(model.memory(embeds), tokens, mask).shape == (2, 2)


def test_a_frozen_tower_is_not_trained():
    model = Blip(replace(CONFIG, vision=replace(VISION, drop_path_rate=0.9), freeze_vision=True)).train()
    assert model.training and not model.vision.training and not model.vision.blocks[1].training
    model.eval().train()
    assert not model.vision.training and model.text_encoder.training
    pixel_values = images(4).float().requires_grad_()
    embeds = model.encode_image(pixel_values)
    assert not embeds.requires_grad
    assert torch.equal(embeds, model.encode_image(pixel_values)), "no drop path"
    model.image_features(embeds).sum().backward()
    assert all(parameter.grad is None for parameter in model.vision.parameters())
    assert model.vision_proj.weight.grad is not None and pixel_values.grad is None
    model.set_grad_checkpointing()
    assert model.vision.checkpointed == 0, "there is nothing to recompute"
    free = Blip(CONFIG).train()
    assert free.vision.training and free.encode_image(pixel_values).requires_grad


def test_recomputing_activations_changes_nothing():
    model, pixel_values = Blip(CONFIG).double().train(), images(2).requires_grad_()

    def memory(embeds):
        return (memory := model.memory(embeds)), memory

    plain = losses_and_gradients(model, memory, pixel_values)
    model.set_grad_checkpointing()
    assert model.vision.checkpointed == 2 and model.text_decoder.checkpointing
    torch.testing.assert_close(losses_and_gradients(model, memory, pixel_values), plain, rtol=0, atol=0)


@torch.no_grad()
def test_decoding_by_steps_is_decoding_at_once():
    model = blip()
    memory, tokens = model.memory(model.encode_image(images(2))), torch.randint(1, 50, (2, 6))
    wanted = model.lm_logits(model.lm_states(memory, tokens))
    step = model.decoding_step(memory)
    found = [step(tokens[:, :2], None)] + [step(tokens[:, i : i + 1], None) for i in range(2, 6)]
    torch.testing.assert_close(torch.stack(found, dim=1), wanted[:, 1:], rtol=0, atol=1e-12)

    # Beams: rows 0 and 1 are of image 0, rows 2 and 3 of image 1; each goes on from a row of the step before.
    step = model.decoding_step(memory)
    step(tokens[:, :2], None)
    words = torch.randint(1, 50, (4, 2))
    step(words[:, :1], torch.tensor([0, 0, 1, 1]))
    found = step(words[:, 1:], torch.tensor([1, 0, 3, 3]))
    past = torch.cat([tokens[[0, 0, 1, 1], :2], words[[1, 0, 3, 3], :1], words[:, 1:]], dim=1)
    torch.testing.assert_close(
        found, model.lm_logits(model.lm_states(memory, past))[:, -1], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.9}])
@torch.no_grad()
def test_a_caption_does_not_depend_on_its_batch(options):
    model, config = blip(), GenerationConfig(max_new_tokens=8, **options)
    embeds, prompt = model.encode_image(images(4)), torch.full((4, 1), 54)
    together = model.generate(model.memory(embeds), prompt, config, seeds=[1, 2, 3, 4])
    for i in range(4):
        alone = model.generate(model.memory(embeds[i : i + 1]), prompt[:1], config, seeds=[i + 1])
        length = int(alone.lengths[0])
        assert together.lengths[i] == length
        assert torch.equal(together.sequences[i, :length], alone.sequences[0, :length])
    assert len(together.sequences.unique(dim=0)) > 1


@torch.no_grad()
def test_halves_are_models_of_their_own():
    model, (tokens, mask), pixel_values = blip(), texts(3), images(3)
    memory = model.memory(model.encode_image(pixel_values))
    itm, lm = model.itm_logits(memory, tokens, mask), model.lm_states(memory, tokens, mask)
    retrieval, captioner = without_decoder(model), without_encoder(model)
    assert not hasattr(retrieval, "text_decoder") and not hasattr(captioner, "itm_head")
    assert retrieval.temperature.dtype == torch.float64 and not retrieval.training
    for part in (retrieval, captioner):
        for value in part.parameters():
            value_of = {id(theirs) for theirs in model.parameters()}
            assert id(value) not in value_of and value.dtype == torch.float64
    assert torch.equal(
        retrieval.itm_logits(retrieval.memory(retrieval.encode_image(pixel_values)), tokens, mask), itm
    )
    assert torch.equal(
        captioner.lm_states(captioner.memory(captioner.encode_image(pixel_values)), tokens, mask), lm
    )
    for value in [*retrieval.parameters(), *captioner.parameters()]:
        value.add_(1)
    memory = model.memory(model.encode_image(pixel_values))
    assert torch.equal(model.itm_logits(memory, tokens, mask), itm), "the whole model was left alone"


def test_two_kinds_of_cross_attention_have_two_memories():
    model = blip(share=("embeddings", "self_attention", "feed_forward"))
    embeds = model.encode_image(images(2))
    with pytest.raises(ValueError, match="use encoder_memory or decoder_memory"):
        model.memory(embeds)
    one, two = model.encoder_memory(embeds), model.decoder_memory(embeds)
    assert isinstance(one, Memory) and not torch.equal(one.layers[0][0], two.layers[0][0])
    shared = blip()
    one, two = shared.encoder_memory(embeds), shared.decoder_memory(embeds)
    assert torch.equal(one.layers[1][1], two.layers[1][1])


def test_impossible_configs():
    with pytest.raises(
        ConfigError, match="share: unknown part 'everything'; the parts are embeddings, self_att"
    ):
        BlipConfig(share=("everything",))
    with pytest.raises(ConfigError, match="needs encoder or decoder"):
        BlipConfig(encoder=False, decoder=False)
