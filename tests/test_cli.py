"""The command line: answers are JSON, mistakes are one line and exit code 2, help costs no torch."""

import inspect
import json
import subprocess
import sys

import pytest

import openblip
from openblip import cli
from openblip.config import save_json
from tests.tiny_models import picture_folder, question_folder
from tests.tiny_recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


def test_caption_match_and_vqa(root, answer):
    pictures = [root / "data/images" / f"{n:02d}.png" for n in (0, 1)]
    said = answer("caption", *pictures, "--model", root / "blip", "--max-new-tokens", 4)
    assert said == dict(
        zip(
            map(str, pictures),
            openblip.load(root / "blip").caption(pictures, max_new_tokens=4),
            strict=True,
        )
    )
    sampled = (
        "caption",
        pictures[0],
        "--model",
        root / "blip",
        "--do-sample",
        "--max-new-tokens",
        3,
        "--seed",
    )
    assert answer(*sampled, 1) == answer(*sampled, 1) != answer(*sampled, 2)
    found = answer("match", pictures[0], "a red circle", "a dog", "--model", root / "filter")
    assert [one["text"] for one in found] == ["a red circle", "a dog"]
    assert all(0 < one["probability"] < 1 and -1 <= one["cosine"] <= 1 for one in found)
    assert found[0]["probability"] != found[1]["probability"]
    options = ("--model", root / "vqa", "--answers", "red", "blue")
    said = answer("vqa", pictures[0], "which colour?", *options)
    assert said["question"] == "which colour?" and said["answer"] in ("red", "blue")


def test_without_json_answers_are_lines_for_people(root, capsys):
    picture = root / "data/images/00.png"
    cli.main(["match", str(picture), "a red circle", "--model", str(root / "filter")])
    line = capsys.readouterr().out.strip()
    assert line.endswith("a red circle") and 0 < float(line.split()[0]) < 1
    cli.main(["info", str(root / "data")])
    assert "rows: 8" in capsys.readouterr().out


def test_search_with_clip_ranks_by_cosine_and_says_so(root, capsys):
    call = ["search", "red", "--data", str(root / "data"), "--model", str(root / "clip"), "--json"]
    cli.main(call)
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert len(found) == 8 and all(hit["score"] == hit["cosine"] for hit in found)
    assert "no ITM head: ranked by cosine alone" in said.err
    cli.main([*call, "--rerank", "0"])
    again = capsys.readouterr()
    assert json.loads(again.out) == found and again.err == "", "nobody asked for more"


def test_search_finds_and_says_what_it_could_not_read(root, answer, capsys, tmp_path):
    call = ("search", "a red circle", "--data", root / "data", "--model", root / "filter")
    found = answer(*call, "--top", 3)
    assert len(found) == 3 and {"id", "score", "cosine", "where", "row"} == set(found[0])
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    assert len(answer(*call, "--split", "test", "--top", 9)) == 4
    folder = picture_folder(tmp_path / "plain", 3)
    (folder / "captions.jsonl").write_text(
        "".join(json.dumps({"file_name": f"images/{n:02d}.png"}) + "\n" for n in range(3))
    )
    (folder / "images/01.png").write_bytes(b"broken")
    cli.main(["search", "red", "--data", str(folder), "--model", str(root / "filter"), "--json"])
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 2, "pictures need no captions to be found"
    assert "1 rows could not be used: not_an_image 1" in said.err


def test_eval_retrieval_caption_and_vqa(root, answer, tmp_path):
    data = ("--data", root / "data", "--split", "test")
    out = tmp_path / "figures.json"
    found = answer("eval", "retrieval", *data, "--model", root / "filter", "--k", 2, "--out", out)
    assert (found["images"], found["texts"]) == (4, 4)
    keys = {"tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10", "r_mean"}
    assert keys <= set(found["itc"]) and keys <= set(found["itm"])
    record = json.loads(out.read_text())
    assert record["figures"] == found and (record["split"], record["k"]) == ("test", 2)
    assert "itm" not in answer("eval", "retrieval", *data, "--model", root / "clip")
    found = answer("eval", "caption", *data, "--model", root / "blip", "--num-beams", 1)
    assert len(found["captions"]) == 4 and found["cider"] >= 0
    found = answer("eval", "vqa", "--data", root / "asked", "--model", root / "vqa", "--num-beams", 1)
    assert len(found["answers"]) == 4 and 0 <= found["accuracy"] <= 1


def test_eval_goes_past_bad_rows_and_broken_pictures_and_counts_them(root, answer, capsys, tmp_path):
    folder = picture_folder(tmp_path / "data", 8)
    lines = (folder / "captions.jsonl").read_text().splitlines()
    lines[2] = '{"file_name": "images/02.png"}'  # no caption
    (folder / "captions.jsonl").write_text("\n".join([*lines, "{no json", lines[1]]))
    (folder / "images/03.png").write_bytes((folder / "images/03.png").read_bytes()[:100])
    (folder / "images/04.png").unlink()
    skipped = {"missing_caption": 1, "not_json": 1, "truncated": 1, "missing": 1}
    call, out = ("--data", folder, "--model"), tmp_path / "not/there/figures.json"
    found = answer("eval", "retrieval", *call, root / "filter", "--out", out)
    assert (found["images"], found["texts"], found["skipped"]) == (5, 6, skipped)
    assert json.loads(out.read_text())["figures"] == found
    found = answer("eval", "caption", *call, root / "blip", "--num-beams", 1)
    assert len(found["captions"]) == 5 and found["skipped"] == skipped
    cli.main(["eval", "retrieval", *map(str, call), str(root / "filter")])
    said = capsys.readouterr()
    assert "skipped" not in said.out and "4 rows could not be used" in said.err and "truncated 1" in said.err

    asked = question_folder(tmp_path / "asked", 4)
    with (asked / "captions.jsonl").open("a") as file:
        file.write('{"file_name": "images/00.png", "question": "what?"}\n')
    (asked / "images/01.png").write_bytes(b"")
    found = answer("eval", "vqa", "--data", asked, "--model", root / "vqa", "--num-beams", 1)
    assert len(found["answers"]) == 3 and found["skipped"] == {"missing_answer": 1, "empty": 1}


def test_eval_finds_out_at_once_that_its_figures_have_no_place(root, mistake, monkeypatch, tmp_path):
    monkeypatch.setattr("openblip.api.load", lambda model: pytest.fail("loaded a model first"))
    call = ("eval", "retrieval", "--data", root / "data", "--model", root / "filter", "--out")
    assert "is a folder; name a file" in mistake(*call, tmp_path)
    (tmp_path / "file").write_text("")
    assert "its folder cannot be made" in mistake(*call, tmp_path / "file/figures.json")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "must not be written" in mistake(*call, tmp_path / "figures.json")


def test_info_of_a_model_of_data_and_of_openblip(root, answer):
    found = answer("info", root / "filter")
    assert found["model"] == "Blip" and found["config"]["decoder"] is False and found["parameters"] > 10_000
    found = answer("info", root / "data")
    assert found["rows"] == 8 and found["splits"] == {"train": 4, "test": 4}
    assert {"file_name", "captions"} <= set(found["columns"])
    found = answer("info")
    assert found["openblip"] == openblip.__version__ and "blip_base" in found["recipes"]


def test_a_users_mistake_is_one_line_and_exit_code_2(root, mistake, tmp_path):
    picture, data = root / "data/images/00.png", ("--data", root / "data")
    assert "absent" in mistake("info", tmp_path / "absent")
    assert "absent" in mistake("caption", picture, "--model", tmp_path / "absent")
    assert "no config.json" in mistake("caption", picture, "--model", root / "data")
    assert "absent.png" in mistake("caption", tmp_path / "absent.png", "--model", root / "blip")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:100])
    line = mistake("caption", picture, tmp_path / "half.png", "--model", root / "blip")
    assert "bad image (truncated)" in line and "half.png" in line
    assert "no image given" in mistake("caption", "--model", root / "blip")
    assert "captioning" in mistake("caption", picture, "--model", root / "filter")
    assert "max_new_tokens" in mistake("caption", picture, "--model", root / "blip", "--max-new-tokens", 0)
    assert "text" in mistake("match", picture, "--model", root / "filter")
    line = mistake("eval", "retrieval", *data, "--split", "val", "--model", root / "filter")
    assert "val" in line and "train" in line and "test" in line
    assert "k is at least 1" in mistake("eval", "retrieval", *data, "--model", root / "filter", "--k", 0)
    assert "question" in mistake("eval", "vqa", *data, "--model", root / "vqa")
    line = mistake("train", "blip_bas", *data, "--out", tmp_path / "run")
    assert "blip_bas" in line and "blip_base" in line
    assert "absent.json" in mistake("train", tmp_path / "absent.json", *data, "--out", tmp_path / "run")
    save_json(tiny_recipe(), tmp_path / "good.json")
    (tmp_path / "odd.json").write_text('{"stage": "pretrain", "train": {"max_step": 3}}')
    assert "max_steps" in mistake("train", tmp_path / "odd.json", *data, "--out", tmp_path / "run")
    line = mistake("train", tmp_path / "good.json", *data, "--take", 1, 2, "--out", tmp_path / "run")
    assert "1 data sets to mix, and 2 numbers of rows" in line
    line = mistake("train", "small_caption", *data, "--out", tmp_path / "run")
    assert "caption: fine-tunes a pre-trained model" in line and "--init" in line
    assert "noise" in mistake("quickstart", *data, "--noise", 2, "--out", tmp_path / "story")
    models = ("--captioner", root / "filter", "--filter", root / "filter")
    assert "captioner" in mistake("capfilt", *data, "--out", tmp_path / "job", *models)
    assert "absent" in mistake("search", "x", "--data", tmp_path / "absent", "--model", root / "filter")


@pytest.mark.parametrize(
    "arguments", [["fly"], ["caption", "--modle", "x"], ["eval", "everything"], ["train"]]
)
def test_what_the_parser_refuses_ends_with_2_too(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and capsys.readouterr().err.strip()


def test_a_file_where_a_folder_is_wanted_is_one_line(root, mistake, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    stages = ("pretrain", "caption", "retrieval")
    for stage in stages:
        save_json(tiny_recipe(stage), tmp_path / f"{stage}.json")
    recipes = [part for stage in stages for part in (f"--{stage}", tmp_path / f"{stage}.json")]
    data = ("--data", root / "data")
    for call in (
        ("quickstart", *data),
        ("bootstrap", *data, "--human", root / "data", *recipes),
        ("train", tmp_path / "pretrain.json", *data),
    ):
        for out in (file, file / "below"):
            assert f"{file}" in (line := mistake(*call, "--out", out)), call
            assert "Errno" not in line and ("folder" in line or "directory" in line), line
    assert file.read_text() == "mine"


def test_a_name_too_long_for_a_file_is_one_short_line(mistake):
    line = mistake("info", "a" * 5000)
    assert "aaa...: too long for the name of a file" in line and len(line) < 200


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), FileExistsError("no name"), BrokenPipeError()]
)
def test_errors_of_the_system_that_are_not_the_users_keep_their_traceback(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("openblip.quickstart.run.run", fail)
    with pytest.raises(OSError) as caught:
        cli.main(["quickstart"])
    assert caught.value is error


def test_numbers_that_make_no_sense_are_refused_before_any_work(root, mistake, monkeypatch):
    monkeypatch.setattr("openblip.api.load", lambda *_, **__: pytest.fail("loaded a model first"))
    call = ("eval", "caption", "--data", root / "data", "--model", root / "blip")
    assert "--num-beams is at least 1, got 0" in mistake(*call, "--num-beams", 0)
    assert "--take is at least 1, got -3" in mistake(*call, "--take", -3)


def test_a_caption_longer_than_the_model_is_refused_before_decoding(root, mistake, monkeypatch):
    monkeypatch.setattr("openblip.models.blip.Blip.lm_states", lambda *_, **__: pytest.fail("decoded"))
    picture, model = root / "data/images/00.png", ("--model", root / "blip", "--prompt", "")
    positions = openblip.load(root / "blip").model.config.text.max_position_embeddings
    line = mistake("caption", picture, *model, "--max-new-tokens", positions + 1)
    assert f"max_new_tokens is at most {positions}, got {positions + 1}" in line


def test_an_interrupt_is_one_line_and_130(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("openblip.quickstart.run.run", stop)
    with pytest.raises(SystemExit) as caught:
        cli.main(["quickstart"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 130 and line == "openblip: interrupted; the same call goes on from here"


@pytest.mark.parametrize(
    ("call", "goes_on"),
    [
        ("train small_pretrain", True), ("capfilt --data x", True), ("bootstrap", True), ("index build x", True),
        ("index add x", True), ("capfilt --data x --dry-run", False), ("capfilt --dry_run", False),
        ("index delete x", False), ("index stats x", False), ("search x", False), ("eval vqa", False),
        ("caption train", False), ("vqa", False), ("convert capfilt train", False), ("chat", False), ("", False),
    ],
)  # fmt: skip
def test_only_what_is_kept_is_said_to_go_on(call, goes_on, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tyro.extras.subcommand_cli_from_dict", stop)
    for given in (call.split(), None):  # None: those of the process
        monkeypatch.setattr("sys.argv", ["openblip", *call.split()])
        with pytest.raises(SystemExit) as caught:
            cli.main(given)
        line = capsys.readouterr().err.strip()
        assert caught.value.code == 130 and line.startswith("openblip: interrupted")
        assert ("goes on" in line) == goes_on, line


HELP = """
import sys
from openblip.cli import COMMANDS, main
for arguments in [["--help"]] + [[name, "--help"] for name in COMMANDS]:
    print("=====", *arguments[:-1])
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code in (0, None), (arguments, end.code)
heavy = {"torch", "transformers", "datasets", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


POSITIONAL = {
    "recipe": "RECIPE", "images": "IMAGE ...", "image": "IMAGE", "texts": "TEXT ...", "question": "QUESTION",
    "query": "QUERY", "what": "WHAT", "task": "{retrieval,caption,vqa}", "folder": "FOLDER", "name": "OWNER/NAME",
    "source": "SOURCE", "target": "OUT", "action": "{build,add,delete,stats}",
}  # fmt: skip


def test_help_names_every_command_and_option_and_loads_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    top, *pages = done.stdout.split("===== \n")[-1].split("===== ")
    assert len(pages) == len(cli.COMMANDS) == 14
    for (name, command), page in zip(cli.COMMANDS.items(), pages, strict=True):
        assert page.startswith(name) and name in top
        parameters = inspect.signature(command).parameters
        for parameter, what in parameters.items():
            if parameter == "how":
                assert "--image-root" in page and "folder that relative image paths start from" in page
                continue
            if parameter == "on":
                assert "--cpus-per-actor" in page and "this process, or Ray" in page
                continue
            option = f"--{parameter.replace('_', '-')}"
            shown = POSITIONAL.get(parameter, option) in page or option in page
            assert shown, f"{name}: {parameter} is not in its help"
            assert what.default is not inspect.Parameter.empty or "(required)" in page
