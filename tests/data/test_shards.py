"""Files as shards: none is opened before its turn, rows are those of the whole source, trouble stays in its file."""

import pickle

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from openblip.config import UserError
from openblip.data import sources
from openblip.data.shards import ShardFiles, open_shards
from openblip.data.sources import Source, open_source
from tests.data.made import as_jsonl, parquet_bytes, png, tar_bytes, write


def tars(folder, count=3):
    for number in range(count):
        members = {f"{number}{i}.png": png((number, i, 0)) for i in range(2)}
        members |= {f"{number}{i}.txt": f"caption {number} {i}".encode() for i in range(2)}
        write(folder / f"{number:05d}.tar", tar_bytes(dict(sorted(members.items()))))
    return folder


def said(rows):
    return [
        (row.id, row.captions, row.image.read(), row.where) for row in (rows[i] for i in range(len(rows)))
    ]


def test_shards_have_the_rows_of_the_whole_source_and_cross_to_other_processes(tmp_path):
    whole = open_source(tars(tmp_path / "web"), cache_dir=tmp_path / "c")
    found = open_shards(tmp_path / "web", cache_dir=tmp_path / "c")
    assert isinstance(found, ShardFiles)
    assert [shard.name for shard in found.shards()] == [shard.name for shard in whole.shards()]
    sent = pickle.loads(pickle.dumps(found))
    alone = [line for shard in found.shards() for line in said(sent.part(shard.name))]
    assert len(alone) == 6 and alone == said(whole)
    assert [line for shard in whole.shards() for line in said(whole.part(shard.name))] == alone
    with pytest.raises(UserError, match="there is no shard 'x'"):
        found.part("x")


def test_only_the_first_file_is_opened_to_begin_with(tmp_path, monkeypatch):
    opened = []
    real = sources.tables.line_table
    monkeypatch.setattr(
        sources.tables, "line_table", lambda url, *rest: opened.append(url[-9:]) or real(url, *rest)
    )
    found = open_shards(tars(tmp_path / "web"), cache_dir=tmp_path / "c")
    assert opened == ["00000.tar"]
    assert len(found.part("00002")) == 2 and opened[1:] == ["00002.tar"]


def test_a_file_that_is_not_what_its_name_says_fails_alone(tmp_path):
    write(tars(tmp_path / "web") / "00001.tar", b"404: not found")
    found = open_shards(tmp_path / "web", cache_dir=tmp_path / "c")
    assert [shard.name for shard in found.shards()] == ["00000", "00001", "00002"]
    assert len(found.part("00000")) == len(found.part("00002")) == 2
    with pytest.raises(Exception, match="truncated header"):
        found.part("00001")
    for name in ("00000.tar", "00002.tar"):
        write(tmp_path / "web" / name, b"")
    with pytest.raises(UserError, match="none of the first files can be opened; the first says"):
        open_shards(tmp_path / "web", cache_dir=tmp_path / "c")


def test_identity_follows_a_files_name_size_and_reading_and_no_other_file(tmp_path):
    before = open_shards(tars(tmp_path / "web", 2), cache_dir=tmp_path / "c")
    tars(tmp_path / "web", 3)
    more = open_shards(tmp_path / "web", cache_dir=tmp_path / "c")
    assert [more.identity(name) for name in ("00000", "00001")] == [
        before.identity(name) for name in ("00000", "00001")
    ]
    (tmp_path / "web").rename(tmp_path / "moved")
    moved = open_shards(tmp_path / "moved", cache_dir=tmp_path / "c")
    assert moved.identity("00000") == before.identity("00000") != moved.identity("00001")
    bare = open_shards(tmp_path / "moved", require_captions=False, cache_dir=tmp_path / "c")
    assert bare.identity("00000") != moved.identity("00000")
    longer = (tmp_path / "moved/00000.tar").read_bytes() + bytes(512)
    write(tmp_path / "moved/00000.tar", longer)
    assert open_shards(tmp_path / "moved", cache_dir=tmp_path / "c").identity("00000") != moved.identity(
        "00000"
    )


def test_other_formats_and_splits_inside_files_are_sources(tmp_path):
    found = open_shards(as_jsonl(tmp_path / "rows"), cache_dir=tmp_path / "c")
    assert isinstance(found, Source) and [shard.name for shard in found.shards()] == ["captions-00000"]
    assert found.identity("captions-00000") == found.fingerprint
    assert len(found.part("captions-00000")) == 3
    columns = {"image": [png((1, 2, 3))] * 2, "caption": ["a", "b"], "split": ["train", "val"]}
    write(tmp_path / "p/0.parquet", parquet_bytes(columns))
    assert isinstance(open_shards(tmp_path / "p", cache_dir=tmp_path / "c"), ShardFiles)
    val = open_shards(tmp_path / "p", split="val", cache_dir=tmp_path / "c")
    assert isinstance(val, Source) and [row.captions for row in val] == [["b"]]
    for split in ("train", "val"):
        tars(tmp_path / "split" / split, 1)
    one = open_shards(tmp_path / "split", split="val", cache_dir=tmp_path / "c")
    assert isinstance(one, ShardFiles) and [shard.name for shard in one.shards()] == ["val--00000"]


def test_a_wrong_column_is_said_at_once(tmp_path):
    columns = {"bild": [png((1, 2, 3))], "caption": ["a"]}
    write(tmp_path / "p/0.parquet", parquet_bytes(columns))
    with pytest.raises(UserError, match="which column is the image"):
        open_shards(tmp_path / "p", cache_dir=tmp_path / "c")


class Unreachable(MemoryFileSystem):
    """A bucket behind a network that is down."""

    protocol = "unreachable"
    cachable = False

    def info(self, path, **_):
        raise ConnectionError("Cannot connect to host store.example:443")

    ls = isfile = isdir = exists = info


@pytest.mark.parametrize("opening", [open_source, open_shards])
def test_an_unreachable_remote_is_one_line(opening, tmp_path):
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    with pytest.raises(UserError, match=r"^unreachable://web/: cannot be reached: Cannot connect to host"):
        opening("unreachable://web/", cache_dir=tmp_path / "c")


def test_two_files_of_one_shard_name_are_refused(tmp_path):
    write(tars(tmp_path / "a", 1) / "b/00000.tar", (tmp_path / "a/00000.tar").read_bytes())
    write(tmp_path / "a/b--00000.tar", (tmp_path / "a/00000.tar").read_bytes())
    with pytest.raises(UserError, match="two files would make shards of one name"):
        open_shards(f"{tmp_path}/a/{{b--00000,b/00000}}.tar", cache_dir=tmp_path / "c")


def test_remote_files_are_shards_as_local_ones_are(tmp_path):
    memory = fsspec.filesystem("memory")
    for path in sorted(tars(tmp_path / "web").iterdir()):
        memory.pipe(f"/bucket/web/{path.name}", path.read_bytes())
    local = open_shards(tmp_path / "web", cache_dir=tmp_path / "c")
    found = open_shards("memory://bucket/web/*.tar", cache_dir=tmp_path / "c")
    assert [said(found.part(shard.name)) for shard in found.shards()] == [
        said(local.part(shard.name)) for shard in local.shards()
    ]
    assert found.identity("00001") == local.identity("00001")
    memory.rm("/bucket", recursive=True)
    with pytest.raises(FileNotFoundError):
        found.part("00001")[0].image.read()
