"""BLIP-3: what the resampler sees of a picture, where vision tokens stand, and that rows do not disturb each other."""

import pytest
import torch

from openblip.config import ConfigError, UserError
from openblip.models.blip3 import Blip3Config
from openblip.models.generation import GenerationConfig
from openblip.models.lm import LmConfig
from openblip.models.resampler import ResamplerConfig
from openblip.models.temporal import TemporalConfig
from openblip.models.tiling import content_mask
from openblip.models.vit import VisionConfig
from tests.models.tiny_blip3 import END_OF_CHUNK, HIDDEN, IMAGE, LATENTS, SIDE, WIDTH, text, tiles, tiny_blip3
from tests.models.tiny_lms import CONFIGS, EOS

WIDE, TALL, WHOLE = (2, 1, 400, 100), (1, 3, 90, 300), (0, 0, 50, 50)


def naive_groups(embeds, grid, grouping, side=SIDE):
    """Tiles of one picture, base first, [1 + T, N, D] -> groups and masks, token by token."""
    columns, rows, width, height = grid
    if not columns:
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool)
    canvas = {}
    for tile, tokens in enumerate(embeds[1:]):
        for place, token in enumerate(tokens):
            y, x = tile // columns * side + place // side, tile % columns * side + place % side
            canvas[y, x] = token
    shown = content_mask(columns, rows, side, width, height)
    if grouping == "strip":
        order = [(y, x) for y in range(rows * side) for x in range(columns * side)]
    else:
        order = [
            (row * side + place // side, column * side + place % side)
            for row in range(rows) for column in range(columns) for place in range(side * side)
        ]  # fmt: skip
    size = side * side
    groups = [torch.stack([canvas[at] for at in order[i : i + size]]) for i in range(0, len(order), size)]
    masks = [torch.stack([shown[at] for at in order[i : i + size]]) for i in range(0, len(order), size)]
    return torch.stack([embeds[0], *groups]), torch.stack([torch.ones(size, dtype=torch.bool), *masks])


@pytest.mark.parametrize("grouping", ["strip", "tile"])
def test_every_group_is_sampled_by_itself_without_the_padding(grouping):
    model = tiny_blip3(tile_grouping=grouping)
    embeds, grids = tiles([WIDE, WHOLE, TALL])
    runs = model.vision_runs(embeds, grids)
    assert [len(run) for run in runs] == [model.config.vision_length(c, r) for c, r, _, _ in grids.tolist()]
    for run, part, grid in zip(runs, embeds[:, 1:].split([3, 1, 4]), grids.tolist(), strict=True):
        groups, masks = naive_groups(part, grid, grouping)
        wanted = [model.resampler(group[None], mask[None])[0] for group, mask in zip(groups, masks)]
        torch.testing.assert_close(run, torch.cat(wanted), rtol=0, atol=1e-12)
    assert not content_mask(*WIDE[:2], SIDE, *WIDE[2:]).all(), "or nothing would be masked here"


def test_strips_and_tiles_differ_where_a_canvas_is_wide():
    embeds, grids = tiles([WIDE, TALL])
    strip, tile = (tiny_blip3(tile_grouping=kind).vision_runs(embeds, grids) for kind in ("strip", "tile"))
    assert (strip[0] - tile[0]).abs().max() > 1e-3
    assert torch.equal(strip[1], tile[1]), "with one column they are the same"


def test_black_borders_have_no_say():
    model = tiny_blip3()
    embeds, grids = tiles([WIDE])
    before = model.vision_runs(embeds, grids)[0]
    shown = content_mask(*WIDE[:2], SIDE, *WIDE[2:])
    y, x = (~shown).nonzero()[0].tolist()
    tile, place = 1 + y // SIDE * WIDE[0] + x // SIDE, 1 + y % SIDE * SIDE + x % SIDE
    changed = embeds.clone()
    changed[tile, place] += 10
    assert torch.equal(model.vision_runs(changed, grids)[0], before)
    changed[:, 0] += 10
    assert torch.equal(model.vision_runs(changed, grids)[0], before), "nor has the summary token"
    changed[0, 1] += 10
    assert not torch.equal(model.vision_runs(changed, grids)[0], before)


def test_fixed_sampling_of_all_tiles_looks_at_them_together():
    model = tiny_blip3(sampling="anyres_fixed_sampling")
    embeds, grids = tiles([WIDE, WHOLE, TALL])
    runs = model.vision_runs(embeds, grids)
    assert [len(run) for run in runs] == [LATENTS] * 3
    for run, part, grid in zip(runs, embeds[:, 1:].split([3, 1, 4]), grids.tolist(), strict=True):
        groups, masks = naive_groups(part, grid, "tile")
        wanted = model.resampler(groups.flatten(0, 1)[None], masks.flatten()[None])[0]
        torch.testing.assert_close(run, wanted, rtol=0, atol=1e-12)


def test_a_question_tells_the_resampler_what_to_look_for():
    model = tiny_blip3(condition=True)
    embeds, grids = tiles([WIDE, WIDE])
    embeds[3:] = embeds[:3]
    ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    one, other = model.vision_runs(embeds, grids, condition_ids=ids, condition_mask=mask)
    assert (one - other).abs().max() > 1e-3
    ids[1, 2] = 20
    again = model.vision_runs(embeds, grids, condition_ids=ids, condition_mask=mask)
    assert torch.equal(again[1], other), "padding is no question"
    with pytest.raises(ValueError, match="condition"):
        model.vision_runs(embeds, grids)
    with pytest.raises(ValueError, match="condition"):
        tiny_blip3().vision_runs(embeds, grids, condition_ids=ids, condition_mask=mask)


@pytest.mark.parametrize("kind", ["mean", "attention", "ttm"])
def test_a_video_is_one_run_of_its_frames(kind):
    model = tiny_blip3(video=kind)
    embeds, grids = tiles([WHOLE, *[WHOLE] * 4])
    picture, video = model.vision_runs(embeds, grids[:2], frames=[1, 4])
    assert len(picture) == LATENTS and len(video) == model.config.vision_length(0, 0, 4)
    frames = torch.stack([model.resampler(frame[None])[0] for frame in embeds[1:, 1:]])
    torch.testing.assert_close(video, model.temporal(frames[None])[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no temporal encoder"):
        tiny_blip3().vision_runs(embeds, grids[:2], frames=[1, 4])


def test_vision_tokens_stand_where_their_ids_do():
    model = tiny_blip3()
    embeds, grids = tiles([WIDE, WHOLE])
    runs = model.vision_runs(embeds, grids)
    lengths = [len(run) for run in runs]
    ids = torch.tensor([text(5, "i", 6, 7, "i", 8, END_OF_CHUNK, runs=lengths)])
    seen = model.embed(ids, runs)[0]
    words = model.lm.model.get_input_embeddings().weight
    a, b = lengths
    assert torch.equal(seen[0], words[5]) and torch.equal(seen[1 : 1 + a], runs[0])
    assert torch.equal(seen[a + 3 : a + 3 + b], runs[1]) and torch.equal(seen[a + 3 + b], words[8])
    assert torch.equal(seen[-1], model.lm.added_words.weight[2])
    twice = model.embed(ids.repeat(2, 1), runs, torch.tensor([0, 1, 0, 1]))
    assert torch.equal(twice[0], seen) and torch.equal(twice[1], seen)
    with pytest.raises(ValueError, match=f"{a + b} <image> ids in the texts, and {a} vision tokens"):
        model.embed(ids, runs[:1])
    with pytest.raises(ValueError, match="4 tiles, and the grids of 1 images ask for 3"):
        model.vision_runs(embeds, grids[:1])


@pytest.mark.parametrize("lm", ["llama", "gemma2", "opt"])
def test_logits_are_the_language_models_and_then_those_of_the_added_words(lm):
    model = tiny_blip3(lm)
    embeds, grids = tiles([WIDE])
    runs = model.vision_runs(embeds, grids)
    ids = torch.tensor([text(5, "i", 6, 7, 8, END_OF_CHUNK, runs=[len(runs[0])])])
    labels = torch.where(ids == IMAGE, -100, ids)
    seen = model.embed(ids, runs).to(next(model.lm.model.parameters()).dtype)
    logits, wanted = model.labelled_logits(seen, labels)
    assert wanted.tolist() == [6, 7, 8, END_OF_CHUNK]
    theirs = model.lm.model(inputs_embeds=seen, output_hidden_states=True)
    torch.testing.assert_close(logits[:, :IMAGE], theirs.logits[0, -5:-1], rtol=0, atol=1e-5)
    states = model.lm.states_of(seen)[0, -5:-1]
    torch.testing.assert_close(logits[:, IMAGE:], states @ model.lm.added_head.weight.T, rtol=0, atol=1e-9)


def test_a_smaller_vocabulary_ends_where_the_added_words_begin():
    """The released tokenizer has 32,012 tokens, Phi-3 32,064 rows: the rest is out of use."""
    config = LmConfig(dict(CONFIGS["llama"]), added_tokens=3, first_added_id=50)
    lm = tiny_blip3().lm
    lm.config = config
    assert lm.vocab_size == 53 and lm.logits(torch.zeros(1, HIDDEN, dtype=torch.float64)).shape == (1, 53)
    assert torch.equal(lm.embed(torch.tensor([52])), lm.added_words.weight[2:])
    with pytest.raises(ConfigError, match="first_added_id 99"):
        type(lm)(LmConfig(dict(CONFIGS["llama"]), added_tokens=3, first_added_id=99))


@pytest.mark.parametrize("lm", ["llama", "qwen2", "phi3", "gemma", "gpt_neox", "gpt2"])
def test_packed_texts_do_not_see_each_other(lm):
    """Each as if it were alone; phi3 looks back six tokens at most."""
    model = tiny_blip3(lm)
    embeds, grids = tiles([WHOLE, WHOLE])
    runs = model.vision_runs(embeds, grids)
    one = text(5, "i", 6, 7, 8, 9, 10, runs=[len(runs[0])])
    other = text("i", 11, 12, 13, runs=[len(runs[1])])
    packed = torch.tensor([one + other])
    positions = torch.tensor([[*range(len(one)), *range(len(other))]])
    labels = torch.where(packed == IMAGE, -100, packed)
    labels[0, len(one)] = -100
    together, _ = model.labelled_logits(model.embed(packed, runs), labels, positions)
    alone = []
    for ids, run in ((one, runs[:1]), (other, runs[1:])):
        row = torch.tensor([ids])
        alone.append(model.labelled_logits(model.embed(row, run), torch.where(row == IMAGE, -100, row))[0])
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)
    blind, _ = model.labelled_logits(model.embed(packed, runs), labels)
    assert (blind - together).abs().max() > 1e-3, "without positions the second sees the first"


def test_opt_takes_no_positions_so_nothing_is_packed():
    model = tiny_blip3("opt")
    model.lm.takes_positions = False
    with pytest.raises(ConfigError, match="takes no position ids"):
        model.lm.states_of(
            torch.zeros(1, 2, HIDDEN, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int64)
        )


def scratch(model, ids, runs, new_tokens):
    """Greedy, everything read anew for every word."""
    said = []
    for _ in range(new_tokens):
        row = torch.tensor([ids + said])
        seen = model.lm.states_of(model.embed(row, runs))
        logits = model.lm.logits(seen[:, -1])
        logits[:, IMAGE:END_OF_CHUNK] = -torch.inf
        said.append(int(logits.argmax()))
        if said[-1] in (EOS, END_OF_CHUNK):
            break
    return said


def chats(model):
    """Three rows of unequal length with pictures, and without."""
    embeds, grids = tiles([WIDE, WHOLE, TALL])
    runs = model.vision_runs(embeds, grids)
    lengths = [len(run) for run in runs]
    rows = [
        (text(5, "i", 6, "i", 7, runs=lengths[:2]), runs[:2]),
        ([9, 10, 11], []),
        (text(12, "i", 13, runs=lengths[2:]), runs[2:]),
    ]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[1] * (width - len(row)) + row for row, _ in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row, _ in rows])
    return rows, model.embed(ids, runs), mask


@pytest.mark.parametrize("lm", ["llama", "phi3", "gpt2", "opt"])
def test_a_batch_of_unequal_rows_is_each_alone(lm):
    model = tiny_blip3(lm)
    rows, embeds, mask = chats(model)
    config = GenerationConfig(max_new_tokens=6)
    together = model.generate(embeds, mask, config)
    for (ids, runs), found, length in zip(rows, together.sequences.tolist(), together.lengths.tolist()):
        assert found[:length] == scratch(model, ids, runs, 6)
    beams = GenerationConfig(max_new_tokens=6, num_beams=3)
    best = model.generate(embeds, mask, beams)
    for number, (ids, runs) in enumerate(rows):
        seen = model.embed(torch.tensor([ids]), runs)
        alone = model.generate(seen, torch.ones(1, len(ids)), beams)
        assert alone.scores[0] == pytest.approx(best.scores[number].item(), abs=1e-9)
        length = int(alone.lengths[0])
        assert alone.sequences[0, :length].tolist() == best.sequences[number, :length].tolist()


def test_pictures_are_no_words_to_say():
    model = tiny_blip3()
    _, embeds, mask = chats(model)
    with torch.no_grad():
        states = model.lm.states_of(embeds)[:, -1]
        model.lm.added_head.weight[:2] = 1000 * states[0]
    said = model.generate(embeds, mask, GenerationConfig(max_new_tokens=3)).sequences
    assert not ((said == IMAGE) | (said == IMAGE + 1)).any()
    with torch.no_grad():
        model.lm.added_head.weight[2] = 1000 * states[0]
    ended = model.generate(embeds[:1], mask[:1], GenerationConfig(max_new_tokens=3))
    assert ended.sequences[0].tolist() == [END_OF_CHUNK], "the end of a chunk ends a text"


@pytest.mark.parametrize("lm", ["llama", "qwen2", "gpt_neox"])
def test_a_conversation_goes_on_in_its_cache(lm):
    """What was read stays read: the second answer is that of the whole conversation read from scratch."""
    model = tiny_blip3(lm)
    embeds, grids = tiles([WIDE, WHOLE])
    runs = model.vision_runs(embeds, grids)
    lengths = [len(run) for run in runs]
    first = text(5, "i", 6, runs=lengths[:1])
    decoding = model.begin(model.embed(torch.tensor([first]), runs[:1]), torch.ones(1, len(first)))
    config = GenerationConfig(max_new_tokens=5)
    said = [int(token) for token in model.stream(decoding, config)]
    assert said == scratch(model, first, runs[:1], 5)
    kept = len(first) + 2  # the user likes the first two words of the answer only
    then = text(20, "i", 21, runs=lengths[1:])
    whole = first + said[:2] + then
    decoding.rewind(kept, model.embed(torch.tensor([then]), runs[1:]))
    again = [int(token) for token in model.stream(decoding, config)]
    assert again == scratch(model, whole, runs, 5)
    with pytest.raises(ValueError, match="tokens to keep"):
        decoding.rewind(999, embeds[:1])


def test_what_does_not_fit_into_the_context_is_said():
    model = tiny_blip3()
    _, embeds, mask = chats(model)
    with pytest.raises(UserError, match=r"take \d+ positions, \d+ more than the 64"):
        model.generate(embeds, mask, GenerationConfig(max_new_tokens=60))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resampler": ResamplerConfig(WIDTH + 2, output_size=HIDDEN)}, "resampler.hidden_size is 14"),
        ({"lm": LmConfig(dict(CONFIGS["llama"]))}, "lm.added_tokens is 0"),
        ({"grids": []}, "grids: none"),
        ({"resampler": ResamplerConfig(WIDTH, max_frames=8)}, "resampler.max_frames is 8"),
        ({"temporal": TemporalConfig(3072, frame_tokens=64)}, "temporal.frame_tokens is 64, .* 128"),
    ],
)
def test_parts_that_do_not_fit_are_said(changes, message):
    lm = LmConfig(dict(CONFIGS["llama"]), added_tokens=3)
    settings = {"lm": lm, "vision": VisionConfig(16, 8, WIDTH, 2, 2, 24), "resampler": ResamplerConfig(WIDTH)}
    with pytest.raises(ConfigError, match=message):
        Blip3Config(**settings | changes)


def test_a_language_model_with_an_encoder_or_of_another_width_is_refused():
    with pytest.raises(ConfigError, match="decoder-only"):
        tiny_blip3("t5")
    from openblip.models.blip3 import Blip3

    lm = LmConfig(dict(CONFIGS["llama"]), added_tokens=3)
    config = Blip3Config(lm, VisionConfig(16, 8, WIDTH, 2, 2, 24), ResamplerConfig(WIDTH, output_size=8))
    with pytest.raises(ConfigError, match="output_size is 8, the language model's width 16"):
        Blip3(config)
