"""The papers' protocols against slow, plain ones: every pair scored, the rule written out."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from openblip.api import load
from openblip.config import UserError
from openblip.data.collate import picture_key
from openblip.data.features import build_features
from openblip.data.rows import BadRows, Row
from openblip.data.sources import open_source
from openblip.data.text import clean_caption
from openblip.eval import benchmarks
from openblip.eval.benchmarks import (
    by_picture,
    captioning,
    from_cache,
    from_pictures,
    retrieval,
    usable_rows,
    vqa,
)
from openblip.eval.captions import caption_scores
from tests.curate.made import tiny_blip
from tests.data.made import parquet_bytes, png, write
from tests.tiny_models import drawing, save_clip

CAPTIONS = ["A red circle!", "two dogs in the snow", "the word", "a much longer text about nothing at all",
            "green", "one more", "someone on a bicycle", "night", "a boat on the sea", "twelve"]  # fmt: skip


@pytest.fixture(scope="module")
def pipeline():
    return tiny_blip(4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Six pictures, the even ones with two captions."""
    folder = tmp_path_factory.mktemp("pictures")
    found, left = [], list(CAPTIONS)
    for number in range(6):
        path = folder / f"{number}.png"
        drawing(9 * number).save(path)
        count = 1 if number % 2 else 2
        found.append(Row(f"id{number}", [str(path)], [left.pop() for _ in range(count)]))
    return found


@pytest.fixture(scope="module")
def plain(pipeline, rows):
    """(cosine, ITM logit of a match, ITM log odds) [images, texts], the image of each text; one pair at a time."""
    texts = [clean_caption(text) for row in rows for text in row.captions]
    owner = [number for number, row in enumerate(rows) for _ in row.captions]
    model = pipeline.model
    cosine, logit, odds = (np.zeros((len(rows), len(texts))) for _ in range(3))
    with torch.inference_mode():
        for i, row in enumerate(rows):
            (embeds, _) = next(pipeline.encoded([row.image]))
            for j, text in enumerate(texts):
                ids = pipeline.tokens([text])
                features = model.text_features(ids["input_ids"], ids["attention_mask"])
                cosine[i, j] = (model.image_features(embeds) * features).sum()
                scores = model.itm_logits(
                    model.encoder_memory(embeds), ids["input_ids"], ids["attention_mask"]
                )
                logit[i, j], odds[i, j] = scores[0, 1], scores[0, 1] - scores[0, 0]
    return cosine, logit, odds, owner


def plain_recalls(scores, owner) -> dict[str, float]:
    """Counted one by one; what ties with a right answer stands before it."""
    images, texts = scores.shape
    found = {}
    for k in (1, 5, 10):
        hits = 0
        for i in range(images):
            own = [j for j in range(texts) if owner[j] == i]
            best = max(scores[i, j] for j in own)
            hits += sum(scores[i, j] >= best for j in range(texts) if j not in own) < k
        found[f"tr@{k}"] = hits / images
    for k in (1, 5, 10):
        hits = 0
        for j in range(texts):
            hits += sum(scores[i, j] >= scores[owner[j], j] for i in range(images) if i != owner[j]) < k
        found[f"ir@{k}"] = hits / texts
    return found


@pytest.mark.parametrize("k", [1, 2, 4, 100])
def test_retrieval_is_cosine_then_itm_of_the_k_best(pipeline, rows, plain, k):
    cosine, logit, odds, owner = plain
    found = retrieval(pipeline, rows, k=k)
    assert (found["images"], found["texts"]) == (6, 9)
    assert {name: found["itc"][name] for name in plain_recalls(cosine, owner)} == pytest.approx(
        plain_recalls(cosine, owner)
    )
    chosen = np.zeros_like(cosine, bool)
    for i in range(6):
        for j in range(9):
            of_image = sorted(cosine[i], reverse=True)[: min(k, 9)]
            of_text = sorted(cosine[:, j], reverse=True)[: min(k, 6)]
            chosen[i, j] = cosine[i, j] >= of_image[-1] or cosine[i, j] >= of_text[-1]
    by_both = odds + cosine / pipeline.model.temperature.item()
    for name, scores in (("itm", logit + cosine), ("itm_itc", by_both)):
        expected = plain_recalls(np.where(chosen, scores, -np.inf), owner)
        assert {key: found[name][key] for key in expected} == pytest.approx(expected)
        assert found[name]["r_mean"] == pytest.approx(sum(expected.values()) / 6)


@pytest.mark.parametrize("kept", [0, 2**20], ids=["embedded twice", "embeddings kept"])
def test_how_pairs_are_put_in_batches_changes_no_score(pipeline, rows, plain, kept, monkeypatch):
    cosine, logit, odds, _ = plain
    by_both = odds + cosine / pipeline.model.temperature.item()
    judged = []

    def note(scores, owner):
        judged.append(scores)
        return {}

    def embeds(some):
        asked.extend(row.id for row in some)
        return from_pictures(pipeline)(some)

    monkeypatch.setattr(benchmarks, "recall_at", note)
    for pairs, projected in ((64, 4), (5, 4), (3, 2), (1, 1)):
        asked: list[str] = []
        settings = {"_PAIRS": pairs, "_PROJECTED": projected, "_KEPT": kept}
        for name, value in settings.items():
            monkeypatch.setattr(benchmarks, name, value)
        retrieval(pipeline, rows, k=2, embeds=embeds)
        assert len(asked) == len(rows) * (1 if kept else 2)
        itm, both = judged[-2:]
        scored = itm > -torch.inf
        assert itm[scored].tolist() == pytest.approx((logit + cosine)[scored].tolist(), abs=1e-5)
        assert both[scored].tolist() == pytest.approx(by_both[scored].tolist(), abs=1e-4)
        per_image = scored.sum(dim=1).tolist()
        assert len(set(per_image)) > 1 and min(per_image) >= 2, "images with more and fewer candidates"


def test_the_rule_makes_a_difference_here(pipeline, plain):
    """Cosine, ITM alone, and their sums rank these pairs differently, so the test above can fail."""
    cosine, logit, odds, owner = plain
    by_both = odds + cosine / pipeline.model.temperature.item()
    found = [plain_recalls(scores, owner) for scores in (cosine, logit + cosine, by_both, -cosine)]
    assert all(one != other for one, other in itertools.combinations(found, 2))
    assert (np.argsort(logit, axis=1) != np.argsort(logit + cosine, axis=1)).any()


def test_rows_of_one_picture_are_one_picture(pipeline, rows):
    """VQA's and many caption files have a line for each text; figures are those of the joined ones."""
    apart = [replace(row, captions=[text]) for row in rows for text in row.captions]
    apart = [*apart[::2], *apart[1::2]]  # not even neighbours
    joined = by_picture(apart)
    assert len(apart) == 9 and len(joined) == 6
    assert {row.id: set(row.captions) for row in joined} == {row.id: set(row.captions) for row in rows}
    assert retrieval(pipeline, apart, k=4) == retrieval(pipeline, joined, k=4)
    assert retrieval(pipeline, apart, rerank=False)["images"] == 6
    options = {"max_new_tokens": 4, "num_beams": 1}
    found = captioning(pipeline, apart, **options)
    assert found == captioning(pipeline, joined, **options) and len(found["captions"]) == 6
    references = {row.id: row.captions for row in rows}
    assert found["cider"] == pytest.approx(caption_scores(found["captions"], references)["cider"])


def test_rows_of_a_source_are_looked_at_and_hold_no_bytes(tmp_path):
    pictures = [png((9 * number, 0, 0)) for number in range(5)]
    pictures[3] = b"broken"
    columns = {"image": pictures, "text": ["one", "two", None, "four", "five"]}
    source = open_source(write(tmp_path / "x.parquet", parquet_bytes(columns)), cache_dir=tmp_path / "cache")
    bad, told = BadRows(), []
    found = usable_rows("retrieval", source, bad, report=lambda *done: told.append(done))
    assert [row.captions for row in found] == [["one"], ["two"], ["five"]]
    assert dict(bad.counts) == {"missing_caption": 1, "not_an_image": 1} and bad.seen == 5
    assert told == [(number, 5) for number in range(1, 6)]
    assert not any(isinstance(row.image, bytes) for row in found)
    assert [row.image.read() for row in found] == [pictures[number] for number in (0, 1, 4)]
    with pytest.raises(UserError, match=r"no row can be used for vqa: not_an_image 5"):
        columns["text"], columns["image"] = ["x"] * 5, [b"broken"] * 5
        broken = open_source(write(tmp_path / "y.parquet", parquet_bytes(columns)), cache_dir=tmp_path / "c")
        usable_rows("vqa", broken, BadRows())


def test_some_rows_alone_are_the_same_ones_every_time(tmp_path):
    lines = "".join(f'{{"file_name": "{n}.png", "captions": ["text {n}"]}}\n' for n in range(40))
    for number in range(40):
        drawing(number).save(tmp_path / f"{number}.png")
    write(tmp_path / "captions.jsonl", lines.encode())
    source, bad = open_source(tmp_path, cache_dir=tmp_path / "cache"), BadRows()

    def drawn(take: int) -> list[int]:
        return [int(row.captions[0].split()[1]) for row in usable_rows("caption", source, bad, take=take)]

    some = drawn(10)
    assert len(set(some)) == 10 and some == sorted(some) != list(range(10))
    assert drawn(10) == some and set(some) < set(drawn(20)) and drawn(99) == list(range(40))
    assert bad.seen == 10 + 10 + 20 + 40
    with pytest.raises(UserError, match="take is 1 or more, got 0"):
        usable_rows("caption", source, bad, take=0)


def test_it_is_told_how_far_it_is(pipeline, rows):
    told = []
    retrieval(pipeline, rows, k=2, report=lambda *done: told.append(done))
    assert told == [(4, 12), (6, 12), (10, 12), (12, 12)], "embedded, then reranked"
    told.clear()
    captioning(pipeline, rows, max_new_tokens=4, num_beams=1, report=lambda *done: told.append(done))
    assert told == [(6, 6)]


def test_without_rerank_there_is_cosine_alone_and_so_for_clip(pipeline, rows, tmp_path):
    assert set(retrieval(pipeline, rows, rerank=False)) == {"itc", "images", "texts"}
    assert set(retrieval(load(save_clip(tmp_path / "clip")), rows)) == {"itc", "images", "texts"}


def test_clip_reads_captions_as_they_are_and_blip_reads_them_cleaned(pipeline, tmp_path, monkeypatch, rows):
    clip, seen = load(save_clip(tmp_path / "clip")), []
    told = [replace(rows[0], captions=["A Dog. Two (cats)!"]), rows[1]]
    for model in (clip, pipeline):
        embed = model.embed_texts
        monkeypatch.setattr(
            model, "embed_texts", lambda texts, embed=embed: seen.append(texts[0]) or embed(texts)
        )
        retrieval(model, told, rerank=False)
    assert seen == ["A Dog. Two (cats)!", "a dog two cats"]


def test_cached_features_give_what_pictures_give(pipeline, rows, tmp_path):
    model = pipeline.model
    cache = build_features(
        tmp_path, {"of": "test"}, rows, pipeline.transform, lambda x: model.encode_image(x), dtype="float32"
    )
    assert cache.lookup(picture_key(rows[0])).shape == (5, 16)
    embeds = from_cache(cache)
    options = {"max_new_tokens": 4, "min_new_tokens": 1}
    from_pictures = captioning(pipeline, rows, **options)
    assert captioning(pipeline, rows, embeds=embeds, **options) == from_pictures
    assert retrieval(pipeline, rows, k=3, embeds=embeds) == retrieval(pipeline, rows, k=3)
    captions = from_pictures["captions"]
    assert list(captions) == [row.id for row in rows] and len(set(captions.values())) > 1
    alone = pipeline.caption([row.image for row in rows], num_beams=3, **options)
    assert list(captions.values()) == alone


class Answers:
    """A pipeline that answers from a list."""

    def __init__(self, said):
        self.said, self.asked = said, []

    def answer(self, images, questions, *, answers=None, **generation):
        self.asked.append((images, questions, answers, generation))
        return self.said


def test_vqa_counts_the_annotators(rows):
    def asked(number, answers):
        return Row("same picture", [f"{number}.png"], [], question=f"q{number}", answers=answers)

    questions = [
        asked(0, ["red"] * 10),  # all: 1
        asked(1, ["red"] * 2 + ["blue"] * 8),  # 2 of 10: 8 leave both, 2 leave one: (8 · 2/3 + 2 · 1/3) / 10
        asked(2, ["two"] * 10),
    ]
    model = Answers(["red", "red", "none"])
    found = vqa(model, [rows[0], *questions], num_beams=2, answers=["red", "none"])
    assert found["accuracy"] == pytest.approx((1 + 0.6 + 0) / 3)
    assert found["answers"] == ["red", "red", "none"]
    assert model.asked == [
        (["0.png", "1.png", "2.png"], ["q0", "q1", "q2"], ["red", "none"], {"num_beams": 2})
    ]


def test_vqa_does_not_mix_two_ways_to_count():
    kinds = [
        Row(f"{n}", [f"{n}.png"], [], question="q", answers=["a"] * n, where=f"row {n}") for n in (10, 3)
    ]
    model = Answers(["a", "a"])
    with pytest.raises(UserError, match=r"row 10 has 10 answers and row 3 3; .* measure the two kinds apart"):
        vqa(model, kinds)
    assert not model.asked, "said before any work is done"
    assert vqa(Answers(["b"]), kinds[1:])["accuracy"] == 0


def test_what_cannot_be_evaluated_is_said(pipeline, rows):
    with pytest.raises(UserError, match="no row has a question"):
        vqa(pipeline, rows)
    with pytest.raises(UserError, match="every row needs a caption"):
        retrieval(pipeline, [*rows, Row("x", ["x.png"], [])])
    with pytest.raises(UserError, match="k is at least 1, got 0"):
        retrieval(pipeline, rows, k=0)
    with pytest.raises(UserError, match="captioning: this Blip"):
        captioning(tiny_blip(1, decoder=False, share=()), rows)
