"""BLIP-2 in a user's hands: the same calls as BLIP's, with one vector per query."""

import numpy as np
import pytest

from openblip.api import load
from openblip.config import UserError
from openblip.eval.benchmarks import captioning, retrieval
from openblip.search.scan import scan
from tests.tiny_models import drawing, save_blip2

TEXTS = ["a red circle", "two dogs in the snow", "something else entirely, with more words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_blip2(tmp_path_factory.mktemp("models") / "blip2")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, batch_size=2)


@pytest.fixture(scope="module")
def images():
    return [drawing(number) for number in (0, 9, 18)]


def test_an_image_has_a_vector_per_query_and_the_best_counts(model, images):
    vectors, texts = model.embed_images(images), model.embed_texts(TEXTS)
    assert vectors.shape == (3, 3, 8) and texts.shape == (3, 8)
    assert model.embed_images(images[0]).shape == (3, 8)
    assert model.embed_images([]).shape == (0, 3, 8)
    assert np.allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)
    cosine = model.similarity(vectors, texts)
    assert np.allclose(cosine, np.einsum("bqp,rp->bqr", vectors, texts).max(axis=1), atol=1e-6)
    assert cosine.std() > 1e-3


def test_match_says_the_cosine_of_the_embeddings(model, images):
    cosine = model.similarity(model.embed_images(images), model.embed_texts(TEXTS))
    found = model.match(images, TEXTS)
    assert np.allclose(found.cosine, cosine.diagonal(), atol=1e-5)
    every = model.match(images, [TEXTS] * 3)
    assert np.allclose(every.cosine, cosine, atol=1e-5)
    assert np.allclose(every.probability.diagonal(), found.probability, atol=1e-5)
    assert every.probability.std() > 1e-3


def test_it_writes_captions_each_its_own(model, images):
    together = model.caption(images, max_new_tokens=4)
    assert together == [model.caption(image, max_new_tokens=4) for image in images]
    assert len(set(together)) > 1, "the image has a say"
    assert "".join(model.caption_stream(images[0], max_new_tokens=4)) == model.caption(
        images[0], num_beams=1, max_new_tokens=4
    )


def test_a_saved_folder_is_the_model_again(folder, images, tmp_path):
    from openblip.hub import load_pretrained, save_pretrained

    found = load_pretrained(folder)
    save_pretrained(found.model, tmp_path, tokenizer=found.tokenizer, transform=found.transform)
    again = load(tmp_path)
    assert np.array_equal(again.embed_images(images), load(folder).embed_images(images))


class Rows(list):
    """Rows as a source gives them."""

    def rows(self, bad):
        return iter(self)

    def light(self, index):
        return self[index]


@pytest.fixture
def rows(images, tmp_path):
    from openblip.data.rows import Row

    found = Rows()
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
        path = str(tmp_path / f"{number}.png")
        found.append(Row(id=str(number), images=[path], captions=[TEXTS[number]], where="here"))
    return found


def test_protocols_take_it(model, rows):
    found = retrieval(model, rows, k=2)
    assert found.keys() >= {"itc", "itm"} and found["images"] == 3
    cosine = model.similarity(model.embed_images([row.image for row in rows]), model.embed_texts(TEXTS))
    first = sum(cosine[i].argmax() == i for i in range(3)) / 3
    assert found["itc"]["tr@1"] == pytest.approx(first)
    assert captioning(model, rows, max_new_tokens=4, min_new_tokens=1)["captions"].keys() == {"0", "1", "2"}


def test_search_takes_it(model, rows):
    found = scan(model, rows, TEXTS[0], top=3, rerank=0)
    cosine = model.similarity(model.embed_images([row.image for row in rows]), model.embed_texts(TEXTS[:1]))[
        :, 0
    ]
    assert [one["id"] for one in found] == [str(i) for i in np.argsort(-cosine, kind="stable")]
    assert len(scan(model, rows, TEXTS[0], top=2, rerank=2)) == 2


def test_what_it_cannot_do_is_said(model, images):
    with pytest.raises(UserError, match="question answering: this Blip2 model"):
        model.answer(images[0], "what is this?")
    with pytest.raises(UserError, match="localisation: this Blip2 model"):
        model.localize(images[0], "a dog")
