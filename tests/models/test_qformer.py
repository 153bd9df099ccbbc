"""The Q-Former: who sees whom in each of the three objectives, and one query pass for two of them."""

import pytest
import torch

from openblip.config import ConfigError, UserError
from openblip.models.blip2 import Blip2, Blip2Config
from openblip.models.generation import GenerationConfig
from openblip.models.qformer import QFormer, QFormerConfig
from openblip.models.text import Cache, TextConfig, TextTransformer
from openblip.models.vit import VisionConfig

Q, L = 3, 4
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
CONFIG = QFormerConfig(**SIZES, vocab_size=40, max_position_embeddings=12, dropout=0.0, num_query_tokens=Q,
                       cls_token_id=1, sep_token_id=2, dec_token_id=3)  # fmt: skip
IDS = torch.tensor([[1, 11, 12, 2]])

# Rows: who looks, queries then text; columns: at whom. The paper's figure 2, the last text token being padding
# for "itm" and "itc".
TABLES = {
    "itc": """
        1 1 1 . . . .
        1 1 1 . . . .
        1 1 1 . . . .
        . . . 1 1 1 .
        . . . 1 1 1 .
        . . . 1 1 1 .
        . . . 1 1 1 1
    """,
    "itm": """
        1 1 1 1 1 1 .
        1 1 1 1 1 1 .
        1 1 1 1 1 1 .
        1 1 1 1 1 1 .
        1 1 1 1 1 1 .
        1 1 1 1 1 1 .
        1 1 1 1 1 1 1
    """,
    "itg": """
        1 1 1 . . . .
        1 1 1 . . . .
        1 1 1 . . . .
        1 1 1 1 . . .
        1 1 1 1 1 . .
        1 1 1 1 1 1 .
        1 1 1 1 1 1 1
    """,
}


def randomised(model):
    """Weights large enough that every path shows in the output."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.5)
    return model.double().eval()


@pytest.fixture
def qformer():
    return randomised(QFormer(CONFIG, encoder_width=8))


@pytest.fixture
def image():
    return torch.randn(1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def states(qformer, image, objective):
    """Outputs [1, Q + L, D] of an objective, queries first."""
    padded = torch.tensor([[1, 1, 1, 0]])
    memory = qformer.memory(image)
    if objective == "itm":
        return qformer.encode_both(memory, IDS, padded)
    if objective == "itc":
        return torch.cat([qformer.encode_queries(memory), qformer.encode_text(IDS, padded)], dim=1)
    cache = Cache(CONFIG.num_hidden_layers)
    queries = qformer.encode_queries(memory, cache=cache)
    return torch.cat([queries, qformer.decode(IDS, None, cache)], dim=1)


@pytest.mark.parametrize("objective", list(TABLES))
def test_masks_are_those_of_the_paper(qformer, image, objective, monkeypatch):
    """Move one input at a time; the outputs that move looked at it, directly or by way of others.

    With one layer there is no "by way of others", so the table is the mask itself. Padding rows see themselves
    through the residual stream, which is why the last row has its own column.
    """
    del qformer.layers[1:]
    monkeypatch.setattr(qformer.config, "num_hidden_layers", 1)
    calm = states(qformer, image, objective)
    seen = torch.zeros(Q + L, Q + L, dtype=torch.bool)
    queries, words = type(qformer)._queries, type(qformer)._words
    for column in range(Q + L):

        def moved_queries(self, rows, column=column):
            x = queries(self, rows).clone()
            if column < Q:
                x[:, column] += 1
            return x

        def moved_words(self, ids, first, column=column):
            x = words(self, ids, first).clone()
            if column >= Q:
                x[:, column - Q] += 1
            return x

        monkeypatch.setattr(type(qformer), "_queries", moved_queries)
        monkeypatch.setattr(type(qformer), "_words", moved_words)
        seen[:, column] = (states(qformer, image, objective) - calm).abs().amax(dim=(0, 2)) > 1e-9
    rows = [line.split() for line in TABLES[objective].strip().splitlines()]
    wanted = torch.tensor([[cell == "1" for cell in row] for row in rows])
    assert torch.equal(seen, wanted)


def test_itg_over_the_cache_is_the_joint_pass_under_the_unilm_mask(qformer, image):
    found = states(qformer, image, "itg")
    memory = qformer.memory(image)
    x = torch.cat([qformer._queries(1), qformer._words(IDS, 0)], dim=1)
    mask = torch.ones(Q + L, Q + L, dtype=torch.bool).tril()
    mask[:Q, :Q] = True
    for number, layer in enumerate(qformer.layers):
        seen = memory.layer(number) if layer.cross_attention is not None else None
        x, _ = layer(x, Q, mask[None, None], None, seen)
    assert (found - x).abs().max() < 1e-10


def test_only_queries_look_at_the_image_and_only_in_every_second_layer(qformer, image):
    assert [layer.cross_attention is not None for layer in qformer.layers] == [True, False, True, False]
    text = qformer.encode_text(IDS)
    queries, both = (states(qformer, image, name)[:, :Q] for name in ("itc", "itm"))
    other = image + 1
    assert torch.equal(text, qformer.encode_text(IDS))
    assert (states(qformer, other, "itc")[:, :Q] - queries).abs().max() > 1e-3
    assert (states(qformer, other, "itm")[:, :Q] - both).abs().max() > 1e-3
    del qformer.layers[1:]  # in one layer, nothing of the image has reached the text yet
    first, second = (states(qformer, picture, "itm")[:, Q:] for picture in (image, other))
    assert torch.equal(first, second)


def test_words_are_decoded_one_by_one_as_they_are_at_once(qformer, image):
    memory = qformer.memory(image)
    cache = Cache(CONFIG.num_hidden_layers)
    qformer.encode_queries(memory, cache=cache)
    steps = [qformer.decode(IDS[:, i : i + 1], None, cache) for i in range(L)]
    at_once = states(qformer, image, "itg")[:, Q:]
    assert (torch.cat(steps, dim=1) - at_once).abs().max() < 1e-10


def test_padding_changes_nothing(qformer, image):
    memory = qformer.memory(image)
    longer = torch.cat([IDS, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    mask = (torch.arange(6) < 4).long()[None]
    alone, padded = qformer.encode_both(memory, IDS), qformer.encode_both(memory, longer, mask)
    assert (padded[:, : Q + L] - alone).abs().max() < 1e-12
    assert (qformer.encode_text(longer, mask)[:, :L] - qformer.encode_text(IDS)).abs().max() < 1e-12


def test_memory_is_shared_out_by_rows(qformer):
    images = torch.randn(3, 5, 8, dtype=torch.float64)
    memory = qformer.memory(images)
    index = torch.tensor([2, 0, 0, 1])
    together = qformer.encode_both(memory.rows(index), IDS.repeat(4, 1))
    for row, number in enumerate(index.tolist()):
        alone = qformer.encode_both(qformer.memory(images[number : number + 1]), IDS)
        assert (together[row] - alone[0]).abs().max() < 1e-12
    assert len(qformer.encode_queries(memory.rows(index))) == 4


def test_begins_with_a_bert_whose_ffn_the_queries_get_too():
    bert = TextTransformer(TextConfig(**SIZES, vocab_size=41, max_position_embeddings=12, dropout=0.0))
    randomised(bert)
    qformer = QFormer(CONFIG, encoder_width=8)
    fresh = {name: value.clone() for name, value in qformer.state_dict().items()}
    qformer.copy_text_(bert)
    qformer.double().eval()
    ids = torch.tensor([[1, 39, 5, 2]])
    assert (qformer.encode_text(ids) - bert(ids)).abs().max() < 1e-12
    for layer in qformer.layers:
        pairs = zip(layer.query_feed_forward.parameters(), layer.feed_forward.parameters(), strict=True)
        assert all(torch.equal(query, text) for query, text in pairs)
    for name, value in qformer.state_dict().items():
        kept = "query_tokens" in name or "cross_attention" in name
        assert torch.equal(value.float(), fresh[name]) == kept, name


def test_a_bert_of_another_size_is_refused():
    bert = TextTransformer(TextConfig(**{**SIZES, "num_hidden_layers": 2}, vocab_size=41))
    with pytest.raises(ConfigError, match="num_hidden_layers is 2, not 4"):
        QFormer(CONFIG, encoder_width=8).copy_text_(bert)


def test_without_text_it_has_the_query_path_alone(image):
    whole = randomised(QFormer(CONFIG, encoder_width=8))
    config = QFormerConfig(**{**vars(CONFIG), "text": False})
    half = QFormer(config, encoder_width=8).double().eval()
    wanted = half.state_dict().keys()
    assert not any("word" in name or ".feed_forward" in name for name in wanted)
    half.load_state_dict({name: value for name, value in whole.state_dict().items() if name in wanted})
    memory = whole.memory(image)
    assert torch.equal(half.encode_queries(half.memory(image)), whole.encode_queries(memory))
    with pytest.raises(ValueError, match="without its text part"):
        half.encode_text(IDS)


def test_past_the_last_position_is_an_error(qformer):
    with pytest.raises(UserError, match="13 tokens: this model has 12 positions"):
        qformer.encode_text(torch.ones(1, 13, dtype=torch.long))


def count(module):
    return sum(value.numel() for value in module.parameters())


def test_parameter_counts_of_the_paper():
    """Stage 1 with ViT-g trains 186.7M (the paper says 188M); stage 2 107M with OPT-2.7B, 108M with Flan-T5-XXL."""
    width = 1408
    with torch.device("meta"):
        vision = VisionConfig(hidden_size=width, num_attention_heads=16, num_hidden_layers=1)
        stage1 = Blip2(Blip2Config(vision))  # freezes its tower
        queries = QFormer(QFormerConfig(text=False), width)
    trained = sum(value.numel() for value in stage1.parameters() if value.requires_grad)
    assert trained == 186_705_470
    for hidden, wanted in ((2560, 107_133_696), (4096, 108_314_880)):
        assert count(queries) + count(stage1.ln_vision) + 768 * hidden + hidden == wanted


@pytest.fixture
def model():
    vision = VisionConfig(
        image_size=4, patch_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    return randomised(Blip2(Blip2Config(vision, CONFIG, projection_dim=6)))


def test_cosine_is_that_of_the_query_that_fits_best(model):
    embeds = torch.randn(2, 5, 8, dtype=torch.float64)
    images, texts = (
        model.image_features(embeds),
        model.text_features(IDS.repeat(3, 1) + torch.arange(3)[:, None]),
    )
    found = model.similarity(images, texts)
    assert found.shape == (2, 3)
    for image in range(2):
        for text in range(3):
            dots = [(images[image, query] @ texts[text]).item() for query in range(Q)]
            assert found[image, text].item() == pytest.approx(max(dots), abs=1e-12)


def test_itm_takes_the_mean_over_the_queries(model):
    embeds = torch.randn(1, 5, 8, dtype=torch.float64)
    memory = model.memory(embeds)
    each = model.itm_head(model.qformer.encode_both(memory, IDS)[:, :Q])
    assert each.std(dim=1).min() > 1e-5
    assert torch.allclose(model.itm_logits(memory, IDS), each.mean(dim=1), atol=1e-12)


def test_captions_come_from_the_queries(model):
    """A beam is a row of text over its image's queries: alone, in a batch, and by whole passes, all the same."""
    embeds = torch.randn(2, 5, 8, dtype=torch.float64)
    prompt = torch.tensor([[1, 7], [1, 7]])
    config = GenerationConfig(num_beams=2, max_new_tokens=5)
    together = model.generate(model.memory(embeds), prompt, config)
    for row in range(2):
        alone = model.generate(model.memory(embeds[row : row + 1]), prompt[:1], config)
        length = int(alone.lengths[0])
        assert torch.equal(together.sequences[row, :length], alone.sequences[0, :length])
    greedy = model.generate(
        model.memory(embeds[:1]), prompt[:1], GenerationConfig(max_new_tokens=5)
    ).sequences
    written = torch.tensor([[3, 7]])
    for token in greedy[0]:
        cache = Cache(4)
        model.qformer.encode_queries(model.memory(embeds[:1]), cache=cache)
        logits = model.lm_logits(model.qformer.decode(written, None, cache)[:, -1])
        assert int(logits.argmax()) == int(token)
        written = torch.cat([written, token.view(1, 1)], dim=1)


def test_gradient_checkpointing_changes_nothing(model):
    embeds = torch.randn(2, 5, 8, dtype=torch.float64)
    gradients = []
    for enabled in (False, True):
        model.train().zero_grad()
        model.set_grad_checkpointing(enabled)
        memory = model.memory(embeds)
        loss = model.itm_logits(memory, IDS.repeat(2, 1)).square().sum()
        (loss + model.image_features(embeds).sum()).backward()
        gradients.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    assert len(gradients[0]) > 40
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_the_frozen_tower_stays_out(model):
    model.train()
    assert not model.vision.training and model.qformer.training
    pixels = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    model.image_features(model.encode_image(pixels)).sum().backward()
    assert all(value.grad is None for value in model.vision.parameters())
    assert model.ln_vision.weight.grad is not None


def test_images_with_different_numbers_of_texts_are_matched_as_if_copied():
    """Rows of one image that lie together look at it as it is; rows in another order at copies of it."""
    vision = VisionConfig(16, 8, 16, 1, 2, 24)
    model = randomised(Blip2(Blip2Config(vision, CONFIG, projection_dim=8)))
    memory = model.memory(torch.randn(3, 5, 16, dtype=torch.float64))
    ids, image = torch.randint(4, 40, (4, L)), torch.tensor([0, 0, 0, 2])
    turned = torch.tensor([3, 0, 1, 2])
    together, copied = memory.rows(image), memory.rows(image[turned])
    assert together.counts == [3, 0, 1] and copied.counts is None
    with torch.no_grad():
        first, second = model.itm_logits(together, ids), model.itm_logits(copied, ids[turned])
    assert torch.allclose(first[turned], second, atol=1e-12)
    assert not torch.allclose(first[0], first[1], atol=1e-3), "texts differ"
