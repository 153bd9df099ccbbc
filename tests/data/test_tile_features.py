"""The cache of pictures cut into tiles: as many entries as tiles, found by picture; interrupted, continued, refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.config import UserError, to_dict
from openblip.data.features import FeatureCache, TileCache, build_features
from openblip.data.rows import BadRow, BadRows, Row
from openblip.data.tiles import TileTransform
from openblip.data.transforms import ImageTransform
from tests.data.test_features import MADE_BY, Encoder, contents

TRANSFORM = TileTransform(ImageTransform(8), ((1, 2), (2, 1), (3, 1)))
SIZES = [(10, 10), (90, 30), (30, 90), (40, 20), (200, 40)]  # 3, 4, 3, 3, 4 tiles


def picture(number: int) -> bytes:
    width, height = SIZES[number % len(SIZES)]
    rng, file = np.random.default_rng(number), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


ROWS = [Row(f"{n}.png", [picture(n)], ["x"], where=f"row {n}") for n in range(8)]
ROWS += [Row("pair", [picture(8), picture(9)], ["x"])]
KEYS = [*(f"{n}.png" for n in range(8)), "pair#0", "pair#1"]


def build(folder, encode=None, rows=ROWS, transform=TRANSFORM, **options) -> TileCache:
    made_by = {**MADE_BY, "transform": to_dict(transform.base), "grids": transform.grids}
    settings = {"batch_size": 3, "dtype": "float32"}
    return TileCache(
        build_features(folder, made_by, rows, transform, encode or Encoder(), **settings | options)
    )


def tiles(number: int, transform=TRANSFORM):
    return transform(Image.open(io.BytesIO(picture(number))))


@pytest.mark.parametrize("transform", [TRANSFORM, TileTransform(ImageTransform(8), ())])
@pytest.mark.parametrize("workers", [0, 3])
def test_read_back_as_encoded(tmp_path, transform, workers):
    encode = Encoder()
    cache = build(tmp_path, encode, transform=transform, workers=workers)
    assert len(cache) == 10 and max(encode.batches) <= 4
    for number, key in enumerate(KEYS):
        wanted, found = tiles(number, transform), cache.lookup(key)
        assert found.grid == wanted.grid and found.frames == 1
        assert torch.equal(found.embeds, Encoder()(wanted.pixel_values))
    size = sum(len(tiles(number, transform).pixel_values) for number in range(10))
    assert (tmp_path / "features.bin").stat().st_size == size * 4 * 48 * 4, "not a tile more than there are"


@pytest.mark.parametrize("limit", [0, 3, 13, 20, 33])
def test_interrupted_and_continued_is_the_same(tmp_path, limit):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "broken", Encoder(limit))
    with pytest.raises(UserError, match=r"there are no features|only \d of 10 pictures are done"):
        build_features_opened(tmp_path / "broken")
    rest = Encoder()
    build(tmp_path / "broken", rest)
    build(tmp_path / "whole")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    if limit:
        counts = [len(tiles(number).pixel_values) for number in range(10)]
        done = max(stop for stop in (0, 3, 6, 9) if sum(counts[:stop]) <= limit - 3)
        looked_at = {0, done // 2, done - 1} if done else set()
        assert sum(rest.batches) == sum(counts[done:]) + sum(counts[number] for number in looked_at)


def build_features_opened(folder):
    made_by = {**MADE_BY, "transform": to_dict(TRANSFORM.base), "grids": TRANSFORM.grids}
    return TileCache(FeatureCache(folder, made_by))


@pytest.mark.parametrize("file", ["features.bin", "grids.bin"])
def test_whichever_file_lags_behind_says_how_far_it_is(tmp_path, file):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "broken", Encoder(25))
    path = tmp_path / "broken" / file
    path.write_bytes(path.read_bytes()[:-20])  # six pictures were there; now the sixth is not whole
    build(tmp_path / "broken")
    build(tmp_path / "whole")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_other_grids_and_no_grids_are_refused(tmp_path):
    build(tmp_path)
    before = contents(tmp_path)
    for grids, said in ((((1, 2), (2, 1)), r"is \[\[1, 2\], \[2, 1\]\]"), ((), r"is \[\]")):
        with pytest.raises(UserError, match=rf"grids was \[\[1, 2\], \[2, 1\], \[3, 1\]\] and {said}"):
            build(tmp_path, transform=TileTransform(TRANSFORM.base, grids))
    with pytest.raises(UserError, match=r"grids was .* and is None"):
        build_features(tmp_path, MADE_BY, ROWS, TRANSFORM.base, Encoder())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("file", ["features.bin", "grids.bin"])
def test_damage_is_seen(tmp_path, file):
    build(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(UserError, match="damaged"):
        build_features_opened(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="damaged"):
        build_features_opened(tmp_path)


def test_what_cannot_be_read_or_encoded_is_named(tmp_path):
    rows = [Row("bad", [b"junk"], ["x"], where="line 1"), *ROWS[:2]]
    bad = BadRows(max_share=1.0)
    cache = build(tmp_path / "a", rows=rows, bad=bad)
    assert bad.counts == {"not_an_image": 1}
    with pytest.raises(BadRow, match="bad: could not be read") as caught:
        cache.lookup("bad")
    assert caught.value.reason == "no_features"
    assert torch.equal(cache.lookup("1.png").embeds, Encoder()(tiles(1).pixel_values))

    def encode(pixels):
        return Encoder()(pixels).fill_(torch.nan) if pixels.shape[0] == 1 else Encoder()(pixels)

    with pytest.raises(
        UserError, match=r"NaN or infinity in float32 for '1\.png'"
    ):  # whose last tile is alone
        build(tmp_path / "b", encode, rows=rows)
