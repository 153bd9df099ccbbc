"""Bad rows are met one by one, with file, line and reason, and stop nothing; mistakes are explained."""

import ast
import csv
import json
import pickle
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import openblip
from openblip.config import UserError
from openblip.data.image import BadImage, open_image
from openblip.data.sources import BadRow, BadRows, Source, open_source
from tests.data.made import as_jsonl, csv_text, jsonl, parquet_bytes, png, tar_bytes, write


@pytest.fixture
def opened(tmp_path):
    def open_(path, **options) -> Source:
        return open_source(path, **{"cache_dir": tmp_path / "cache", **options})

    return open_


def colour(row) -> tuple[int, int, int]:
    return open_image(row.image).getpixel((1, 1))


# --- bad rows ---


def reasons(source: Source) -> dict[str, str]:
    """Where and why, of every bad row."""
    found = {}
    for index in range(len(source)):
        try:
            assert source[index].captions
        except BadRow as error:
            found[error.where] = error.reason
    return found


def test_bad_rows_of_jsonl(tmp_path, opened):
    lines = [
        b'{"file_name": "a.png", "caption": "good"}',
        b'{"file_name": "a.png", "caption": "caf\xe9"}',
        b'{"file_name": "a.png", "caption": "half a pair \\ud83d"}',
        b"",
        b'{"file_name": "a.png", "caption": "  "}',
        b'{"file_name": "a.png", "caption": null}',
        b'{"file_name": "", "caption": "x"}',
        b'{"caption": "x"}',
        b'{"file_name": "a.png", "capt',
        b'["a.png", "x"]',
        b'{"file_name": "a.png", "caption": {"en": 3}}',
        b'{"file_name": "a.png", "caption": 5}',
        b'{"file_name": "https://example.com/a.png", "caption": "x"}',
        b'{"file_name": 3, "caption": "x"}',
        b'{"file_name": "b.png", "captions": ["good", null, ""]}',
    ]
    path = write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(lines))
    source = opened(path)
    assert len(source) == 14
    assert reasons(source) == {
        "x.jsonl line 2": "not_utf8",
        "x.jsonl line 3": "not_utf8",
        "x.jsonl line 5": "missing_caption",
        "x.jsonl line 6": "missing_caption",
        "x.jsonl line 7": "missing_image",
        "x.jsonl line 8": "missing_image",
        "x.jsonl line 9": "not_json",
        "x.jsonl line 10": "not_json",
        "x.jsonl line 11": "missing_caption",
        "x.jsonl line 12": "not_text",
        "x.jsonl line 13": "remote_image",
        "x.jsonl line 14": "missing_image",
    }
    assert [row.captions for row in source.rows(BadRows())] == [["good"], ["good"]]


def test_bad_rows_of_csv(tmp_path, opened):
    lines = (
        b'image,caption|a.png,one|a.png,caf\xe9|a.png,|a.png,two|b.png,no, quotes|,x|"c.png","a|b"||d.png|'
    )
    source = opened(write(tmp_path / "x.csv", lines.replace(b"|", b"\n")))
    good = list(source.rows(BadRows()))
    assert [row.captions for row in good] == [
        ["one", "two"],
        ["a\nb"],
    ]  # the bad between them are lost to nobody
    assert [row.where for row in good] == ["x.csv line 2", "x.csv line 8"]
    assert reasons(source) == {
        "x.csv line 3": "not_utf8",
        "x.csv line 4": "missing_caption",
        "x.csv line 6": "columns",
        "x.csv line 7": "missing_image",
        "x.csv line 11": "missing_caption",
    }


UNCLOSED = {
    "to the end of the file": (
        '1.png,"12 inch pipe|2.png,a dog|3.png,a cow|',
        ["line 2"],
        ["a dog", "a cow"],
    ),
    "in the last row": ('1.png,a dog|2.png,"12 inch pipe', ["line 3"], ["a dog"]),
    "up to the next quoted text": (
        '1.png,"12 inch pipe|2.png,a dog|3.png,"a cow, grazing"|4.png,a hen|',
        ["line 2"],
        ["a dog", "a cow, grazing", "a hen"],
    ),
    "up to a quote in a text": ('1.png,"12 inch|2.png,a 14" pipe|', ["line 2"], ['a 14" pipe']),
    "twice": ('1.png,"12 inch|2.png,"14 inch|3.png,a cow|', ["line 2", "line 3"], ["a cow"]),
    "after a text of two lines": (
        '1.png,"a|cat"|2.png,"12 inch|3.png,"a|cow"|4.png,a hen|',
        ["line 4"],
        ["a\ncat", "a\ncow", "a hen"],
    ),
}


@pytest.mark.parametrize("case", UNCLOSED)
def test_a_quote_that_is_not_closed_in_csv_swallows_no_rows(case, tmp_path, opened):
    text, bad, captions = UNCLOSED[case]
    source = opened(write(tmp_path / "x.csv", "image,caption\n" + text.replace("|", "\n")))
    assert reasons(source) == {f"x.csv {line}": "columns" for line in bad}
    assert [row.captions for row in source.rows(BadRows())] == [[caption] for caption in captions]
    with pytest.raises(BadRow, match="a cell begins with a quote and does not end with one"):
        list(source)


def test_a_quote_that_is_not_closed_in_a_long_csv_swallows_no_rows(tmp_path, opened):
    """The csv module gives up after 128 KiB of one cell and goes on below it."""
    lines = "".join(f"{i}.png,{'x' * 90} {i}\n" for i in range(4000))
    source = opened(write(tmp_path / "x.csv", f'image,caption\nbad.png,"12 inch\n{lines}'))
    assert len(source) == 4001
    assert reasons(source) == {"x.csv line 2": "columns"}
    assert [source[index].where for index in (1, 4000)] == ["x.csv line 3", "x.csv line 4002"]


def test_bad_rows_of_coco(tmp_path, opened):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}, {"id": 3}]
    annotations = [
        {"image_id": 1, "caption": "x"},
        {"image_id": 9, "caption": "y"},
        {"image_id": 3, "caption": "z"},
    ]
    path = write(tmp_path / "x.json", json.dumps({"images": images, "annotations": annotations}))
    assert reasons(opened(path)) == {
        "x.json images[1]": "missing_caption",
        "x.json images[2]": "missing_image",
        "x.json image_id 9": "unknown_image",
    }


def test_bad_rows_of_parquet(tmp_path, opened):
    bad_text = pa.array([b"fine", b"caf\xe9", None, b"fine"]).cast(pa.binary()).view(pa.string())
    columns = {"image": [b"1", b"2", b"3", None], "caption": bad_text}
    assert reasons(opened(write(tmp_path / "x", parquet_bytes(columns)))) == {
        "x row 1": "not_utf8",
        "x row 2": "missing_caption",
        "x row 3": "missing_image",
    }


def test_bad_rows_of_tars(tmp_path, opened):
    image = png((0, 0, 0))
    members = {
        "0.png": image,
        "0.txt": b"good",
        "1.png": image,
        "1.txt": b"caf\xe9",
        "2.txt": b"no picture",
        "3.png": image,
        "4.png": image,
        "4.txt": b"x",
        "4.json": b"{",
        "5.png": image,
        "5.txt": b"x" * (2 << 20),
        ".hidden": b"",
    }
    path = write(tmp_path / "x.tar", tar_bytes(members))
    expected = {
        "x.tar 1": "not_utf8",
        "x.tar 2": "missing_image",
        "x.tar 3": "missing_caption",
        "x.tar 4": "not_json",
        "x.tar 5": "not_text",
    }
    assert reasons(opened(path)) == expected
    whole = path.read_bytes()
    for size in (whole.index(b"4.png") + 700, whole.index(b"4.png")):  # in a picture, and before a header
        cut = opened(write(tmp_path / "cut.tar", whole[:size]))
        assert reasons(cut)["cut.tar"] == "truncated_tar"
        assert cut[0].captions == ["good"]
    damaged = bytearray(whole)
    damaged[whole.index(b"4.png") + 150] ^= 0xFF  # the header's checksum
    assert reasons(opened(write(tmp_path / "damaged.tar", bytes(damaged))))["damaged.tar"] == "truncated_tar"


def test_rows_too_broken_to_name_their_split_are_met_in_all(tmp_path, opened):
    rows = [{"file_name": "a.png", "caption": "x", "split": name} for name in ("train", "val", "val")]
    source = opened(write(tmp_path / "x.jsonl", jsonl(rows) + "{broken}\n"), split="val")
    assert len(source) == 3
    assert reasons(source) == {"x.jsonl line 4": "not_json"}


@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=3),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=25, deadline=None)
def test_any_text_survives_every_text_format(tmp_path_factory, captions):
    folder = tmp_path_factory.mktemp("any")
    captions = [["first"], *captions]
    rows = [{"file_name": f"{i}.png", "captions": texts} for i, texts in enumerate(captions)]
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(len(captions))]
    notes = [{"image_id": i, "caption": text} for i, texts in enumerate(captions) for text in texts]
    cells = [[f"{i}.png", text] for i, texts in enumerate(captions) for text in texts]
    paths = [
        write(
            folder / "x.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "{}\n"
        ),
        write(folder / "x.json", json.dumps({"images": images, "annotations": notes})),
        write(folder / "x.csv", csv_text([["image", "caption"], *cells], quoting=csv.QUOTE_ALL)),
    ]
    expected = [
        texts for texts in ([text.strip() for text in texts if text.strip()] for texts in captions) if texts
    ]
    for path in paths:
        source = open_source(path, cache_dir=folder / "cache")
        assert [row.captions for row in source.rows(BadRows())] == expected, path.suffix


# --- mistakes ---

MISTAKES = {
    "no such path": (lambda folder: folder / "none", r"none: there is no such file or folder"),
    "no such pattern": (lambda folder: folder / "*.tar", r"no file matches the pattern"),
    "no such protocol": (lambda folder: "nope://x/y", r"nope://x/y: Protocol not known"),
    "empty folder": (
        lambda folder: folder,
        r"the folder is empty; openblip reads a folder with metadata\.csv",
    ),
    "other things": (
        lambda folder: write(folder / "README.md", "hi").parent,
        r"found README\.md; openblip reads",
    ),
    "empty file": (lambda folder: write(folder / "x.jsonl", ""), r"x\.jsonl: the file is empty"),
    "only a header": (lambda folder: write(folder / "x.csv", "image,caption\n"), r"x\.csv has no rows"),
    "a picture": (
        lambda folder: write(folder / "x.jpg", png((0, 0, 0))),
        r"neither parquet nor a tar nor text",
    ),
    "utf-16": (lambda folder: write(folder / "x.csv", "image,caption\n".encode("utf-16")), r"text in UTF-8"),
    "packed": (
        lambda folder: write(folder / "x.tar.gz", b"\x1f\x8b\x08" + bytes(9)),
        r"compressed; unpack it first",
    ),
    "prose": (lambda folder: write(folder / "x.txt", "one fine day"), r"neither JSON nor a header"),
    "broken json": (
        lambda folder: write(folder / "x.json", '{"images": [\n'),
        r"x\.json: neither JSON nor JSON lines",
    ),
    "nothing readable": (
        lambda folder: write(folder / "x.jsonl", "{a}\n{b}\n"),
        r"none of the first rows .*line 1",
    ),
    "broken parquet": (
        lambda folder: write(folder / "x", b"PAR1" + b"x" * 99),
        r"x: not a readable parquet file",
    ),
    "coco instances": (
        lambda folder: write(folder / "x.json", '{"images": [{"id": 1}], "annotations": [{"bbox": []}]}'),
        r"annotations have no captions but bbox; COCO's captions_\*\.json do",
    ),
    "two tables": (
        lambda folder: write(folder / "y.csv", "a,b").parent / write(folder / "x.csv", "a,b").parent,
        r"x\.csv, y\.csv are 2 different tables; name the one to read",
    ),
    "two descriptions": (
        lambda folder: (
            write(folder / "metadata.csv", "a,b").parent / write(folder / "captions.jsonl", "a").parent
        ),
        r"metadata\.csv, captions\.jsonl are both here; name the one to read",
    ),
    "no captions": (
        lambda folder: write(folder / "x.csv", "image,n\na.png,1\n"),
        r"which column is the caption\?.* n$",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake, tmp_path, opened):
    make, message = MISTAKES[mistake]
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=message):
        opened(make(tmp_path / "data"))


def test_a_cache_that_cannot_be_written(tmp_path):
    blocked = write(tmp_path / "file", "in the way")
    with pytest.raises(UserError, match=r"cannot write to the cache .* cache_dir= names another folder"):
        open_source(as_jsonl(tmp_path / "data"), cache_dir=blocked)


def read_all(source: Source, bad: BadRows) -> int:
    """As callers do: rows, then their pictures. The number of good ones."""
    good = 0
    for row in source.rows(bad):
        with bad.skipping(row.where):
            open_image(b"" if row.where == "x.jsonl line 40" else row.image)
            good += 1
    return good


def test_bad_rows_are_counted_listed_and_too_many_end_the_run(tmp_path, opened):
    write(tmp_path / "a.png", png((0, 0, 0)))
    rows = [{"file_name": "a.png", "caption": "" if i % 4 == 1 else "x"} for i in range(40)]
    source = opened(write(tmp_path / "x.jsonl", jsonl(rows)))
    bad = BadRows(tmp_path / "bad_rows.jsonl", max_share=11 / 40, min_seen=40)
    assert read_all(source, bad) == 29
    assert bad.seen == 40
    assert bad.total == 11
    assert bad.summary() == "missing_caption 10, empty 1"
    listed = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert Counter(entry["reason"] for entry in listed) == bad.counts
    assert [listed[index]["where"] for index in (0, -1)] == ["x.jsonl line 2", "x.jsonl line 40"]

    with pytest.raises(
        UserError, match=r"11 of 40 rows are bad \(missing_caption 10, empty 1\), more than .* 0\.25 "
    ):
        read_all(source, BadRows(max_share=0.25, min_seen=40))
    assert read_all(source, BadRows(max_share=0, min_seen=41)) == 29, (
        "judged before there was enough to judge"
    )
    with pytest.raises(UserError, match="between 0 and 1"):
        BadRows(max_share=5)


def test_other_errors_pass_through_and_bad_rows_survive_pickling():
    with pytest.raises(ZeroDivisionError), BadRows().skipping():
        raise ZeroDivisionError
    copy = pickle.loads(pickle.dumps(BadRow("not_utf8", "x line 3", "why")))
    assert (str(copy), copy.reason) == ("x line 3: why (not_utf8)", "not_utf8")


def reasons_in_the_code() -> dict[str, set[str]]:
    """What `BadRow` and `BadImage` are raised with anywhere in the package; of "reason|detail" the reason."""
    found: dict[str, set[str]] = {"BadRow": set(), "BadImage": set()}
    for path in Path(openblip.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
            if name in found:
                reason = node.args[0]  # a word, or that of another error passed on
                assert isinstance(reason, ast.Constant | ast.Attribute | ast.Name), f"{path}:{node.lineno}"
                found[name] |= {reason.value} if isinstance(reason, ast.Constant) else set()
            elif path.name == "lines.py" and isinstance(node, ast.Constant) and isinstance(node.value, str):
                found["BadRow"] |= set(re.findall(r"^([a-z_0-9]+)\|", node.value))
    return found


@pytest.mark.parametrize("error", [BadRow, BadImage])
def test_the_list_of_reasons_is_complete_and_has_no_other(error):
    listed = set(re.findall(r"`([a-z_0-9]+)`", error.__doc__)) - {"reason", "where", "detail", "max_pixels"}
    assert len(listed) > 8 and listed == reasons_in_the_code()[error.__name__]
