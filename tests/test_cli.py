"""The command line: answers are JSON, mistakes are one line and exit code 2, help costs no torch."""

import inspect
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

import openblip
from openblip import cli
from openblip.config import save_json
from openblip.data.sources import open_source
from openblip.hub import load_pretrained
from openblip.recipes import Recipe, recipe_named
from openblip.train.config import TrainConfig
from tests.tiny_models import picture_folder, question_folder, save_blip, save_clip, save_vqa
from tests.tiny_recipes import tiny_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """blip, filter, vqa and clip: models; data: 8 pictures, 4 in each split; asked: 4 with questions."""
    root = tmp_path_factory.mktemp("cli")
    save_blip(root / "blip")
    save_blip(root / "filter", seed=2, decoder=False, share=())
    save_vqa(root / "vqa")
    save_clip(root / "clip")
    picture_folder(root / "data")
    question_folder(root / "asked")
    return root


@pytest.fixture(autouse=True)
def own_cache(root, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")


@pytest.fixture
def answer(capsys):
    """What a command prints with --json."""

    def run(*arguments):
        capsys.readouterr()
        cli.main([*map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def mistake(capsys):
    """The one line a command ends with, with exit code 2."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([*map(str, arguments)])
        said = capsys.readouterr()
        assert caught.value.code == 2 and said.out == ""
        (line,) = said.err.strip().splitlines()
        return line

    return run


def test_train_from_a_recipe_file_and_use_what_it_made(root, answer, tmp_path):
    save_json(tiny_recipe(), tmp_path / "tiny.json")
    data = ("--data", root / "data", "--out", tmp_path / "run", "--split", "train")
    found = answer("train", tmp_path / "tiny.json", *data, "--steps", 2, "--seed", 7)
    assert found["step"] == 2 and found["interrupted"] is False
    assert {"itc", "itm", "lm"} <= set(found["losses"])
    facts = answer("info", found["model"])
    assert facts["model"] == "Blip" and facts["info"]["steps"] == 2
    more = ("--init", found["model"], "--data", root / "data", "--out", tmp_path / "captioner")
    save_json(tiny_recipe("caption"), tmp_path / "caption.json")
    captioner = answer("train", tmp_path / "caption.json", *more)
    assert captioner["step"] == 3
    two = ("--data", root / "data", root / "data", "--take", 3, 5, "--out", tmp_path / "mixed")
    assert answer("train", tmp_path / "tiny.json", *two, "--steps", 1)["step"] == 1
    picture = root / "data/images/00.png"
    options = ("--model", captioner["model"], "--max-new-tokens", 3)
    assert list(answer("caption", picture, *options)) == [str(picture)]


def test_capfilt_writes_job_datasets_and_report_and_may_be_called_again(root, answer, tmp_path):
    call = ["capfilt", "--data", root / "data", "--out", tmp_path / "job"]
    call += ["--captioner", root / "blip", "--filter", root / "filter", "--human", root / "data"]
    found = answer(*call, "--threshold", 0)
    assert (found["images"], found["rows"], found["found_done"], found["bad"]) == (8, 8, 0, {})
    assert found["texts"] >= 9, "the web's and written ones"
    tables = [pq.read_table(file) for file in sorted((tmp_path / "job/parquet").glob("*.parquet"))]
    kinds = [one["kind"] for table in tables for row in table["provenance"].to_pylist() for one in row]
    assert kinds.count("web") == kinds.count("human") == 8 and kinds.count("synthetic") == found["texts"] - 8
    tars = open_source(tmp_path / "job/webdataset", cache_dir=tmp_path / "cache")
    assert len(tars) == 16 and all(row.captions for row in tars)
    report = (tmp_path / "job/report.html").read_text()
    assert "data:image/" in report and "http" not in report.replace("http://www.w3.org", "")
    again = answer(*call, "--top-k", 1)
    assert again["found_done"] == again["shards"] == found["shards"], "no text is judged twice"
    table = pq.read_table(sorted((tmp_path / "job/parquet").glob("*.parquet"))[0])
    assert all(len(captions) == 1 for captions in table["captions"].to_pylist()), "but kept by the new rule"


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


def test_bootstrap_hands_on_what_it_was_told(root, answer, monkeypatch, tmp_path):
    told = {}

    def run_rounds(web, human, out, config, **options):
        told.update(options, web=len(web), human=len(human), out=out, config=config)
        return [{"round": 1, "model": "x"}, {"round": 2, "model": "y"}]

    monkeypatch.setattr("openblip.curate.rounds.run_rounds", run_rounds)
    save_json(tiny_recipe("caption", 5), tmp_path / "caption.json")
    call = [
        "bootstrap",
        "--data",
        root / "data",
        "--split",
        "train",
        "--human",
        root / "data",
        "--out",
        tmp_path,
    ]
    call += [
        "--rounds",
        2,
        "--caption",
        tmp_path / "caption.json",
        "--threshold",
        0.7,
        "--captions",
        3,
        "--seed",
        9,
    ]
    assert [one["model"] for one in answer(*call, "--model", root / "blip")] == ["x", "y"]
    assert (told["web"], told["human"], told["rounds"], told["out"]) == (4, 8, 2, tmp_path)
    assert told["model"] == str(root / "blip") and told["batch_size"] == 32
    config = told["config"]
    assert config.caption.train.max_steps == 5 and config.pretrain == recipe_named("small_pretrain")
    assert (config.threshold, config.capfilt.seed, config.capfilt.generation.num_return_sequences) == (
        0.7,
        9,
        3,
    )


def test_push_says_where_it_is(root, answer, mistake, monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(
        "openblip.hub.push_to_hub",
        lambda *of, **how: told.append((*of, how)) or "https://hub.example/ann/blip",
    )
    assert answer("push", root / "blip", "ann/blip", "--private") == {"url": "https://hub.example/ann/blip"}
    assert told == [(root / "blip", "ann/blip", {"private": True})]
    monkeypatch.undo()
    assert "no config.json" in mistake("push", tmp_path, "ann/blip")


def test_train_takes_a_vocabulary_for_clip(root, answer, mistake, tmp_path):
    geometry = load_pretrained(root / "clip").model.config
    train = TrainConfig(max_steps=1, batch_size=2, save_every=None)
    save_json(Recipe("clip", train, clip=geometry, augment=None, workers=0), tmp_path / "clip.json")
    call = ("train", tmp_path / "clip.json", "--data", root / "data", "--out", tmp_path / "run")
    assert "vocabulary" in mistake(*call)
    assert answer(*call, "--tokenizer", root / "clip")["step"] == 1
    assert answer("info", tmp_path / "run/model")["model"] == "Clip"


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
    assert len(found) == 3 and {"id", "score", "cosine", "where"} == set(found[0])
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
    assert "1 rows could not be read" in said.err


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


def test_an_interrupt_is_one_line_and_130(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("openblip.quickstart.run.run", stop)
    with pytest.raises(SystemExit) as caught:
        cli.main(["quickstart"])
    assert caught.value.code == 130 and len(capsys.readouterr().err.strip().splitlines()) == 1


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
    "source": "SOURCE", "target": "OUT",
}  # fmt: skip


def test_help_names_every_command_and_option_and_loads_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    top, *pages = done.stdout.split("===== \n")[-1].split("===== ")
    assert len(pages) == len(cli.COMMANDS) == 13
    for (name, command), page in zip(cli.COMMANDS.items(), pages, strict=True):
        assert page.startswith(name) and name in top
        parameters = inspect.signature(command).parameters
        for parameter, what in parameters.items():
            shown = POSITIONAL.get(parameter, f"--{parameter.replace('_', '-')}")
            assert shown in page, f"{name}: {parameter} is not in its help"
            assert what.default is not inspect.Parameter.empty or "(required)" in page
