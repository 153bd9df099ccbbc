"""`open_source`: every format people have gives the same rows, from anywhere, in splits and in shards."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openblip.config import UserError
from openblip.data.discover import expand_braces
from openblip.data.image import open_image
from openblip.data.rows import RowReader
from openblip.data.sources import BadRow, ByteRange, Source, open_source
from tests.data.made import (
    CAPTIONS,
    COLOURS,
    FORMATS,
    as_jsonl,
    as_parquet_structs,
    as_tars,
    csv_text,
    jsonl,
    parquet_bytes,
    png,
    tar_bytes,
    write,
    write_images,
)


@pytest.fixture
def opened(tmp_path):
    def open_(path, **options) -> Source:
        return open_source(path, **{"cache_dir": tmp_path / "cache", **options})

    return open_


def colour(row) -> tuple[int, int, int]:
    return open_image(row.image).getpixel((1, 1))


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_gives_the_same_rows(format_, tmp_path, opened):
    source = opened(FORMATS[format_](tmp_path / "data"))
    rows = [source[index] for index in (2, 0, 1)]
    assert len(source) == 3
    assert [row.captions for row in rows] == [CAPTIONS[n] for n in "cab"]
    assert [colour(row) for row in rows] == [COLOURS[n] for n in "cab"]
    assert len({row.id for row in rows}) == 3
    copy = pickle.loads(pickle.dumps(source))
    assert [row.id for row in copy] == [row.id for row in source]
    assert colour(copy[-1]) == COLOURS["c"]


@pytest.mark.parametrize(
    "format_", [name for name, make in FORMATS.items() if "folder" not in name and name != "tars"]
)
def test_the_format_is_in_the_content_not_in_the_name(format_, tmp_path, opened):
    path = FORMATS[format_](tmp_path / "data")
    path = path / "0.parquet" if path.is_dir() else path
    plain = path.rename(path.with_name("plain"))
    assert opened(plain)[0].captions == CAPTIONS["a"]


def test_remote_folders_and_files(tmp_path, opened):
    memory = fsspec.filesystem("memory")
    for name, make in FORMATS.items():
        folder = tmp_path / name
        path = make(folder)
        memory.put(str(folder), f"/{name}", recursive=True)
        source = opened(f"memory://{name}/{path.relative_to(folder)}".removesuffix("/."))
        assert [colour(row) for row in source] == list(COLOURS.values()), name
        assert [row.captions for row in source] == list(CAPTIONS.values()), name
    for pattern in ("memory://tars/0000*.tar", "memory://tars/{00000..00001}.tar"):
        assert len(opened(pattern)) == 3


def test_patterns_of_tars(tmp_path, opened):
    folder = as_tars(tmp_path / "data")
    assert len(opened(folder / "00000.tar")) == 2
    assert [colour(row) for row in opened(f"{folder}/{{00001,00000}}.tar")] == [COLOURS[n] for n in "cab"]
    assert len(opened(f"{folder}/*.tar")) == 3
    with pytest.raises(UserError, match=r"00002\.tar: there is no such file.*\{00000\.\.00002\}"):
        opened(f"{folder}/{{00000..00002}}.tar")


def test_openblips_own_list_of_bad_rows_is_no_data(tmp_path, opened):
    record = jsonl([{"reason": "not_image", "where": "x", "detail": "y"}])
    folder = tmp_path / "pictures"
    write_images(folder)
    write(folder / "index/bad_rows.jsonl", record)
    write(folder / "bad_rows.jsonl", record)
    assert [row.id for row in opened(folder, require_captions=False)] == [
        f"images/{name}.png" for name in COLOURS
    ]
    table = as_jsonl(tmp_path / "table", "some.jsonl")
    write(table / "bad_rows.jsonl", record)
    for path in (table, table / "*.jsonl"):
        assert [row.captions for row in opened(path)] == list(CAPTIONS.values())


TURNS = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json", "plain"])
@pytest.mark.parametrize(
    "lists",
    [
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]},
        {"chosen": TURNS, "rejected": TURNS},
        {"captions": [{"raw": "a cat"}]},
    ],
)
def test_one_row_with_a_list_of_objects_is_a_row(lists, name, tmp_path, opened):
    source = opened(write(tmp_path / name, jsonl([{"image": "a.png", **lists}])))
    assert (len(source), source.columns) == (1, ["image", *lists])
    assert source[0].image == str(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["captions", "conversations", "data"])
def test_a_list_of_rows_in_an_object_is_the_table_whatever_its_name(name, tmp_path, opened):
    rows = [{"image": f"{n}.png", "captions": texts} for n, texts in CAPTIONS.items()]
    source = opened(write(tmp_path / "x.json", json.dumps({name: rows})))
    assert [row.captions for row in source] == list(CAPTIONS.values())


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_json_lines_with_a_long_first_line(name, tmp_path, opened):
    rows = [{"image": "a.png", "caption": "x" * (300 << 10)}, {"image": "a.png", "caption": "short"}]
    source = opened(write(tmp_path / name, jsonl(rows)))
    assert [row.captions for row in source] == [[row["caption"]] for row in rows]
    assert [row.where for row in source] == [f"{name} line 1", f"{name} line 2"]


def test_a_file_named_jsonl_with_a_broken_first_line_or_written_as_one_document(tmp_path, opened):
    rows = [{"image": f"{n}.png", "caption": n} for n in "ab"]
    broken = opened(write(tmp_path / "broken.jsonl", '{"image": "a.png", "capt\n' + jsonl(rows)))
    assert (len(broken), broken[1].captions) == (3, ["a"])
    with pytest.raises(BadRow, match=r"broken\.jsonl line 1: .*\(not_json\)"):
        broken[0]
    for number, document in enumerate([rows, {"data": rows}]):
        source = opened(write(tmp_path / f"{number}.jsonl", json.dumps(document, indent=1)))
        assert [row.captions for row in source] == [["a"], ["b"]]


def test_csv_with_spaces_as_flickr30k_has_them(tmp_path, opened):
    text = 'image_name| comment_number| comment\na.png| 0| "Two men | three hats"\na.png| 1|  One man .\n'
    (row,) = opened(write(tmp_path / "results.csv", text))
    assert (row.captions, row.extra) == (["Two men | three hats", "One man ."], {"comment_number": "0"})


def test_parquet_as_hugging_face_writes_it(tmp_path, opened):
    """With the image type in its schema, which would decode every image that is looked at."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["x", "y"]),
        }
    )
    rows = {"image": [png(COLOURS["b"])], "caption": ["green"], "label": ["y"]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
        tmp_path / "data/train-00000-of-00001.parquet"
    )
    (row,) = opened(tmp_path / "data", split="train")
    assert (colour(row), row.captions, row.label, row.id) == (
        COLOURS["b"],
        ["green"],
        1,
        "train-00000-of-00001.parquet#0",
    )


def test_a_pattern_over_folders_keeps_each_files_own_folder(tmp_path, opened):
    for name in ("x", "y"):
        columns = {"image": [f"{name}.png"], "caption": [name]}
        write(tmp_path / f"data/{name}/part.parquet", parquet_bytes(columns))
        write(tmp_path / f"data/{name}/{name}.png", png((0, 0, 0)))
    rows = list(opened(f"{tmp_path}/data/*/part.parquet"))
    assert [(row.id, colour(row)) for row in rows] == [("x/x.png", (0, 0, 0)), ("y/y.png", (0, 0, 0))]


def test_a_url_in_a_row_is_followed_only_where_the_source_itself_is():
    def image(base: str, value: str):
        return RowReader(base).row({"image": value, "caption": "x"}, "here", "0", None).image

    assert image("https://host/data", "https://host/other/a.png") == ByteRange("https://host/other/a.png")
    assert image("https://host/data", "../a.png") == ByteRange("https://host/a.png")
    assert image("/data", "/elsewhere/a.png") == "/elsewhere/a.png"
    for base in ("https://host/data", "s3://bucket/data", "/data"):
        for value in ("https://host.evil/a.png", "http://host/a.png", "s3://bucket2/a.png"):
            with pytest.raises(BadRow, match="remote_image"):
                image(base, value)


def test_a_tar_member_is_read_by_its_position(tmp_path, opened):
    source = opened(as_tars(tmp_path / "data"))
    reference = source[1].image
    assert isinstance(reference, ByteRange)
    whole = Path(reference.url).read_bytes()
    assert reference.read() == whole[reference.start : reference.stop] == png(COLOURS["b"])
    assert source[1].id == "000000001"
    assert source[1].extra == {"status": "success"}
    assert source[1].where == "00000.tar 000000001"


def test_the_txt_is_the_caption_and_samples_of_other_tars_do_not_share_ids(tmp_path, opened):
    for name in ("x", "y"):
        members = {"d/s1.json": b'{"caption": "no"}', "d/s1.jpg": png((0, 0, 0)), "d/s1.txt": name.encode()}
        write(tmp_path / f"data/{name}.tar", tar_bytes(members))
    rows = list(opened(tmp_path / "data"))
    assert [(row.id, row.captions) for row in rows] == [("x/s1", ["x"]), ("y/s1", ["y"])]


def test_questions_answers_and_extra_columns(tmp_path, opened):
    official = {"image": "a.png", "question": "how many?", "answers": [{"answer": "2"}, {"answer": "two"}]}
    rows = [
        {"image": "a.png", "question": "colour?", "answer": "red", "question_id": 7, "human": True},
        official,
        {"image": "b.png", "question": "how many?", "answer": 2, "label": 1},
    ]
    source = opened(write(tmp_path / "vqa.json", json.dumps(rows)))
    assert [row.id for row in source] == ["a.png", "a.png", "b.png"]  # the picture, which the first two share
    assert [row.question for row in source] == ["colour?", "how many?", "how many?"]
    assert [row.answers for row in source] == [["red"], ["2", "two"], ["2"]]
    assert source[0].extra == {"question_id": 7, "human": True}
    assert (source[2].label, source[2].captions) == (1, [])
    rows = [["image", "caption", "question"], ["a.png", "x", "one?"], ["a.png", "x", "two?"]]
    assert [row.question for row in opened(write(tmp_path / "x.csv", csv_text(rows)))] == ["one?", "two?"]
    with_ids = [{"id": 31, "question": "?", "image": "a.png"}, {"id": 32, "caption": "!", "image": "a.png"}]
    source = opened(write(tmp_path / "ids.jsonl", jsonl(with_ids)))
    assert [row.id for row in source] == ["a.png", "32"]  # the first names a question
    assert source[0].extra == {"id": 31}


def test_pairs_of_images(tmp_path, opened):
    rows = [
        {"images": ["l.png", "r.png"], "sentence": "one is red", "label": "True", "identifier": "x-0"},
        {"left_image": "l.png", "right_image": "r.png", "sentence": "none is", "label": False},
    ]
    for row in opened(write(tmp_path / "nlvr2.jsonl", jsonl(rows))):
        assert row.images == [str(tmp_path / "l.png"), str(tmp_path / "r.png")]
        assert row.captions in (["one is red"], ["none is"])
        assert row.label in ("True", False)
        assert row.image == row.images[0]


def test_columns_and_root_can_be_named(tmp_path, opened):
    write_images(tmp_path / "pictures")
    rows = [
        ["id", "photo", "words", "caption"],
        ["7", "images/a.png", "yes", "no"],
        ["7", "images/a.png", "yes!", "no"],
    ]
    path = write(tmp_path / "elsewhere/x.csv", csv_text(rows))
    names = {"image_column": "photo", "caption_column": "words", "image_root": tmp_path / "pictures"}
    source = opened(path, **names)
    assert len(source) == 1
    assert (source[0].id, source[0].captions, source[0].extra) == ("7", ["yes", "yes!"], {"caption": "no"})
    assert colour(source[0]) == COLOURS["a"]
    with pytest.raises(
        UserError, match=r"no column 'wrods' \(caption_column\); there are: id, photo, words, caption"
    ):
        opened(path, **{**names, "caption_column": "wrods"})
    with pytest.raises(
        UserError, match=r"which column is the image\? .*there are: id, photo, words, caption"
    ):
        opened(path)


def test_a_folder_of_pictures_has_no_captions(tmp_path, opened):
    write_images(tmp_path / "data")
    source = opened(tmp_path / "data", require_captions=False)
    assert [(row.id, row.captions) for row in source] == [(f"images/{n}.png", []) for n in "abc"]
    with pytest.raises(UserError, match="require_captions=False"):
        opened(tmp_path / "data")


# --- splits ---


def split_column_jsonl(folder: Path) -> Path:
    rows = [
        {"file_name": f"{i}.png", "caption": "x", "split": "val" if i % 3 == 2 else "train"} for i in range(9)
    ]
    return write(folder / "data.jsonl", jsonl(rows))


def split_column_csv(folder: Path) -> Path:
    rows = [[f"{i}.png", "x", "val" if i % 3 == 2 else "train"] for i in range(9)]
    return write(folder / "data.csv", csv_text([["image", "caption", "split"], *rows]))


def split_column_parquet(folder: Path) -> Path:
    columns = {"image": [f"{i}.png" for i in range(9)], "caption": ["x"] * 9}
    return write(folder / "p", parquet_bytes({**columns, "split": ["train", "train", "val"] * 3}))


def split_folders(folder: Path) -> Path:
    for name, count in {"train": 6, "val": 3}.items():
        write(
            folder / name / "metadata.jsonl",
            jsonl([{"file_name": f"{i}.png", "text": "x"} for i in range(count)]),
        )
    return folder


def split_files(folder: Path) -> Path:
    for name, count in {"train": 6, "val": 3}.items():
        write(
            folder / f"{name}.jsonl",
            jsonl([{"file_name": f"{name}{i}.png", "text": "x"} for i in range(count)]),
        )
    return folder


def split_shards(folder: Path) -> Path:
    for name, count in {
        "train-00000-of-00002": 4,
        "train-00001-of-00002": 2,
        "val-00000-of-00001": 3,
    }.items():
        columns = {"image": [f"{name}{i}.png" for i in range(count)], "caption": ["x"] * count}
        write(folder / f"data/{name}.parquet", parquet_bytes(columns))
    return folder


SPLITS = [
    split_column_jsonl,
    split_column_csv,
    split_column_parquet,
    split_folders,
    split_files,
    split_shards,
]


@pytest.mark.parametrize("make", SPLITS)
def test_splits(make, tmp_path, opened):
    path = make(tmp_path / "data")
    whole, train, val = opened(path), opened(path, split="train"), opened(path, split="val")
    assert (whole.splits, val.splits) == ({"train": 6, "val": 3}, {"val": 3})
    assert (len(whole), len(train), len(val)) == (9, 6, 3)
    assert {row.split for row in train} == {"train"}
    assert {row.split for row in val} == {"val"}
    assert sorted(row.id for row in (*train, *val)) == sorted({row.id for row in whole})
    assert pickle.loads(pickle.dumps(val))[1] == val[1]
    assert len({whole.fingerprint, train.fingerprint, val.fingerprint}) == 3
    assert sum(shard.stop - shard.start for shard in val.shards()) == 3
    with pytest.raises(UserError, match=r"no split 'test'; there are: train \(6 rows\), val \(3 rows\)"):
        opened(path, split="test")


# --- the source as a whole ---


def test_index_slice_of_bounds_and_what_info_shows(tmp_path, opened):
    source = opened(as_jsonl(tmp_path / "data"))
    assert source[-1] == source[2]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"row {index} of"):
            source[index]
    assert (source.kind, source.columns, source.splits) == ("jsonl", ["file_name", "captions"], {})


@pytest.mark.parametrize("format_", FORMATS)
def test_fingerprint_follows_the_content_not_the_place(format_, tmp_path, opened):
    path = FORMATS[format_](tmp_path / "data")
    first = opened(path).fingerprint
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    moved = tmp_path / "moved" / path.relative_to(tmp_path / "data")
    assert opened(moved).fingerprint == first
    assert opened(moved, require_captions=False).fingerprint != first
    if format_ == "folder with captions.jsonl":
        file = moved / "captions.jsonl"
        write(file, file.read_bytes().replace(b"a red square", b"a bad square"))  # the same size
        assert opened(moved).fingerprint != first


def test_a_changed_file_is_read_again(tmp_path, opened):
    folder = as_jsonl(tmp_path / "data")
    assert opened(folder)[0].captions == CAPTIONS["a"]
    stamp = (folder / "captions.jsonl").stat().st_mtime_ns
    write(folder / "captions.jsonl", jsonl([{"file_name": "images/a.png", "caption": "new"}] * 2))
    os.utime(folder / "captions.jsonl", ns=(stamp, stamp + 1_000_000_000))
    assert [row.captions for row in opened(folder)] == [["new"], ["new"]]


def test_shards_follow_the_files_or_a_fixed_number_of_rows(tmp_path, opened):
    tars = opened(as_tars(tmp_path / "tars")).shards()
    assert [(shard.name, shard.start, shard.stop) for shard in tars] == [("00000", 0, 2), ("00001", 2, 3)]
    parquet = opened(as_parquet_structs(tmp_path / "parquet"))
    assert [row.where for row in parquet] == ["0.parquet row 0", "0.parquet row 1", "1.parquet row 0"]
    assert [(shard.name, shard.start, shard.stop) for shard in parquet.shards()] == [("0", 0, 2), ("1", 2, 3)]
    rows = [
        {"file_name": f"{i}.png", "caption": "x", "split": "even" if i % 2 == 0 else "odd"}
        for i in range(2500)
    ]
    path = write(tmp_path / "x.jsonl", jsonl(rows))
    ranges = [(shard.name, shard.start, shard.stop) for shard in opened(path).shards()]
    assert ranges == [("x-00000", 0, 1000), ("x-00001", 1000, 2000), ("x-00002", 2000, 2500)]
    assert [shard.stop for shard in opened(path, split="odd").shards()] == [1000, 1250]
    nested = opened(split_folders(tmp_path / "nested")).shards()
    assert [(shard.name, shard.start, shard.stop) for shard in nested] == [
        ("train--metadata-00000", 0, 6),
        ("val--metadata-00000", 6, 9),
    ]


def test_many_rows_are_mapped_not_held(tmp_path, opened):
    path = write(
        tmp_path / "x.jsonl", jsonl([{"file_name": f"{i}.png", "caption": "x" * 100} for i in range(50_000)])
    )
    before = pa.total_allocated_bytes()
    source = opened(path)
    assert source[49_999].id == "49999.png"
    assert path.stat().st_size > 6_000_000
    assert pa.total_allocated_bytes() - before < 1_000_000
    assert len(pickle.dumps(source)) < 20_000


def test_importing_costs_neither_datasets_nor_arrow_nor_torch():
    code = (
        "import sys, openblip.data.sources as _; print({'datasets', 'pyarrow', 'torch'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- names ---


@given(
    first=st.integers(0, 50),
    count=st.integers(1, 30),
    width=st.integers(1, 6),
    tail=st.sampled_from(["", ".tar"]),
)
def test_braces_with_numbers(first, count, width, tail):
    numbers = range(first, first + count)
    pattern = f"a/{{{first:0{width}d}..{numbers[-1]:0{width}d}}}{tail}"
    assert expand_braces(pattern) == [f"a/{number:0{width}d}{tail}" for number in numbers]


def test_braces_with_names():
    assert expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand_braces("plain") == ["plain"]
