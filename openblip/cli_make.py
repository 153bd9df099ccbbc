"""The commands that make something: models, cleaned data, a page on the hub. Those that use it are in `cli`."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openblip.cli_shared import AS_USUAL, HERE, How, Where, job_progress, progress

if TYPE_CHECKING:
    from openblip.curate.human import HumanRows
    from openblip.data.shards import InShards
    from openblip.recipes import Recipe

ASIDE = 3  # exit code of a job that is done but for some shards

# Positional arguments, under the names that help shows them by.
RecipeName = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RECIPE")]]
ModelFolder = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
RepoName = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")]]


def quickstart(
    data: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    noise: float = 0.4,
    human: int = 300,
    test: int = 400,
    how: How = AS_USUAL,
    json: bool = False,
) -> None:
    """Take noisy pairs, train BLIP, bootstrap the captions with CapFilt, train again, and show what it gained.

    Args:
        data: your own pictures with true captions (any layout `openblip info` understands); otherwise OpenMoji
            drawings from registry packages.
        out: folder for models, report.html and results.json; a second call goes on where the first one stopped. By
            default `quickstart`, and with data of yours `quickstart-` and their name.
        seed: of the split, the planted noise, and all training.
        noise: share of the web pairs whose captions are planted wrong.
        human: how many pairs count as human-labelled: 86 or more, for three quarters fill the filter's batch of 64.
        test: how many pairs are kept for the test.
        json: print the results as JSON.
    """
    from openblip.quickstart.run import run

    # Of its own, or a second call would find the models of other data there.
    folder = out or Path("quickstart" if data is None else f"quickstart-{_name_of(data)}")
    results = run(data, folder, seed=seed, noise=noise, human=human, test=test, **vars(how))
    print_answer(
        results, json, lambda: f"report: {folder / 'report.html'}\nresults: {folder / 'results.json'}"
    )


def train(
    recipe: RecipeName,
    data: tuple[str, ...],
    out: Path,
    take: tuple[int, ...] = (),
    init: str | None = None,
    tokenizer: str | None = None,
    features: Path | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    how: How = AS_USUAL,
    json: bool = False,
) -> None:
    """Train one stage. Interrupted (exit code 130), the same call goes on; torchrun shares the batches among processes.

    Args:
        recipe: the name of a recipe (`openblip info` lists them), or a JSON file of one.
        data: image-text pairs, questions, or whatever the stage needs; several are trained on together, instructions in
            proportion to the square root of the sizes (InstructBLIP §2.4) unless `take` says otherwise.
        out: run folder; the model lands in its `model` folder.
        take: how many rows of each of several data sets, drawn by the seed 42; otherwise all of them.
        init: model folder, file of original weights, or hub name to begin with; a fine-tune needs one.
        tokenizer: folder with a vocabulary, for a CLIP that begins with nothing.
        features: folder for what a frozen vision tower makes of the pictures; stages on the same pictures share it.
        steps: optimizer steps, instead of the recipe's.
        batch_size: pairs per step, instead of the recipe's.
        lr: learning rate, instead of the recipe's.
        seed: instead of the recipe's.
        json: print where the model is and the last losses as JSON.
    """
    from dataclasses import replace

    from openblip.config import UserError
    from openblip.data.collate import Rows
    from openblip.data.mixture import MixedRows
    from openblip.train import distributed
    from openblip.train.stage import run_stage

    chosen = _recipe(recipe)
    changes = given(max_steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    if "max_steps" in changes:
        changes["warmup_steps"] = min(chosen.train.warmup_steps, changes["max_steps"])
    if "lr" in changes:
        changes["min_lr"] = min(chosen.train.min_lr, changes["lr"])
        changes["warmup_lr"] = min(chosen.train.warmup_lr, changes["lr"])
    begin, words = init or chosen.init, tokenizer or chosen.tokenizer
    chosen = replace(chosen, train=replace(chosen.train, **changes), init=begin, tokenizer=words)
    if not data:
        raise UserError("train: no data given")
    sources = [how.open(one, require_captions=chosen.stage != "instruct") for one in data]
    rows: Rows = sources[0] if len(sources) == 1 and not take else MixedRows(sources, take or None)
    with progress("looking at every picture", json) as report:
        result = run_stage(chosen, rows, out, features=features, report=report)
    stopped = result.fit.interrupted
    if distributed.is_main():
        where = {
            "checkpoint" if stopped else "model": str(result.fit.checkpoint if stopped else result.folder)
        }
        answer = {**where, "step": result.fit.step, "losses": result.fit.losses, "interrupted": stopped}
        goes_on = (
            f"interrupted after step {result.fit.step}: the same call goes on from {result.fit.checkpoint}"
        )
        print_answer(answer, json, lambda: goes_on if stopped else f"model: {result.folder}")
    distributed.shutdown()
    if stopped:
        raise SystemExit(130)


def capfilt(
    data: str,
    out: Path,
    captioner: tuple[str, ...],
    filter: str,
    captions: int = 1,
    prompt: str | None = None,
    top_p: float = 0.9,
    threshold: float = 0.5,
    top_k: int | None = None,
    human: str | None = None,
    calibrate: str | None = None,
    captionless: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    dtype: Literal["fp32", "bf16"] = "fp32",
    decoders: int = 1,
    dedup: int | None = None,
    min_words: int = 0,
    max_words: int | None = None,
    script: tuple[str, ...] = (),
    max_bad_share: float = 0.1,
    on: Where = HERE,
    dry_run: bool = False,
    price: float | None = None,
    retry: bool = False,
    anew: bool = False,
    write: tuple[Literal["parquet", "webdataset", "uids"], ...] = ("parquet", "webdataset"),
    how: How = AS_USUAL,
    json: bool = False,
) -> None:
    """Clean a web data set: write captions, judge web and written ones, keep what matches (BLIP §3.3).

    `openblip bootstrap` makes captioner and filter itself, and the better model, in one round or several. Interrupted,
    the same call goes on; for what is finished no model is asked again. Exit code 3: done, but for shards that had
    to be put aside.

    Args:
        data: web pairs, any layout `openblip info` understands; of tars or parquet files, each is a shard.
        out: job folder: scores, progress.html, report.html, and the cleaned data as parquet and webdataset tars.
        captioner: a captioning model (folder or hub name), or several: each writes its captions.
        filter: a retrieval model.
        captions: written per picture, by each captioner.
        prompt: begin of every written caption; the captioner's own if not given.
        top_p: of nucleus sampling.
        threshold: keep texts with at least this P(match); may be changed later without judging again.
        top_k: BLIP-2's rule instead: keep each picture's k best texts by ITC similarity.
        human: human-labelled pairs to add unchanged.
        calibrate: human-labelled pairs that the filter was not trained on, to fit P(match) from both of its heads;
            otherwise it is that of the ITM head alone. A small filter wants it (docs/results.md).
        captionless: take pictures without captions too; they get written ones only.
        seed: with a picture's id, decides what is sampled.
        batch_size: pictures at a time.
        dtype: precision the models run in.
        decoders: threads that read and decode while the models work, for each worker.
        dedup: leave out pictures that look like an earlier one, by at most so many bits (0 to 8) of a perceptual hash.
        min_words: of a kept text; like the threshold, this and the next two may be changed later.
        max_words: of a kept text.
        script: of at least 90% of its letters: latin, cyrillic, arabic, cjk, ...
        max_bad_share: a shard with a larger share of unusable rows is put aside.
        dry_run: work on 200 pictures, publish nothing, and say what all of them would take.
        price: of a worker for an hour, for a dry run to say the cost.
        retry: try shards again that were put aside.
        anew: do shards again that were done with other models or settings; otherwise such a folder is refused.
        write: what becomes of the kept texts; uids: of pairs whose web text is kept, as DataComp exchanges them.
        how: of `data`; `human` and `calibrate` are read as usual.
        json: print the counts as JSON.
    """
    from dataclasses import replace

    from openblip.curate import engine
    from openblip.curate.capfilt import CapFiltConfig, check_rule, nucleus
    from openblip.curate.human import HumanRows
    from openblip.curate.job import job_folder
    from openblip.curate.loading import NamedCapFilt
    from openblip.curate.shard import check_work
    from openblip.curate.texts import TextRules

    on_ray = on.ray()
    rules = TextRules(min_words, max_words, script)
    check_rule(threshold, 1 if top_k is None else top_k)
    check_work(batch_size, decoders, max_bad_share)
    source: InShards = how.open_shards(data, require_captions=not captionless)
    folder = job_folder(out)
    generation = replace(nucleus(), top_p=top_p, num_return_sequences=captions)
    config = CapFiltConfig(generation, prompt, seed)
    worker = NamedCapFilt(
        [_absolute(name) for name in captioner], _absolute(filter), config, folder.resolve(), dtype
    )
    if calibrate is not None:
        held_out = HumanRows(AS_USUAL.open(calibrate), folder / "bad_calibration_rows.jsonl")
        with progress("fitting the filter's scale", json) as report:
            worker.calibrate(held_out, report)
    if dry_run:
        from openblip.curate.estimate import estimate

        found = estimate(worker, source, batch_size=batch_size, decoders=decoders, price=price)
        print_answer(vars(found), json, found.text)
        return
    if dedup is not None:
        from openblip.curate.dedup import deduplicate

        with progress("hashing pictures", json) as report:
            source, again = deduplicate(source, folder, dedup, workers=decoders, report=report)
        print(f"{again:,} pictures look like an earlier one", file=sys.stderr)
    with progress("looking at the human pairs", json) as report:
        extra = HumanRows(AS_USUAL.open(human), folder / "bad_human_rows.jsonl", report) if human else None
    with job_progress(json) as tell:
        result = engine.run(
            worker, source, folder, batch_size=batch_size, max_bad_share=max_bad_share, decoders=decoders,
            threshold=threshold, ray=on_ray, anew=anew, retry=retry, progress=tell,
        )  # fmt: skip
    rule: dict[str, Any] = {"rule": "itm", "threshold": threshold}
    if top_k is not None:
        rule = {"rule": "top_k", "k": top_k}
    rule["texts"] = None if rules == TextRules() else rules
    made_of = [result.sha256, result.bad, str(rule), threshold, sorted(write), extra and extra.fingerprint]
    _write_kept(folder, source, made_of, rule, threshold, write, extra)
    print_answer(vars(result), json, lambda: f"report: {folder / 'report.html'}")
    if result.aside:
        name, reason = next(iter(result.aside.items()))
        print(
            f"openblip: {len(result.aside)} of {result.shards} shards were put aside ({name}: {reason}); "
            f"{folder}/quarantine-*.json say why, --retry tries them again",
            file=sys.stderr,
        )
        raise SystemExit(ASIDE)


def _write_kept(
    folder: Path,
    source: "InShards",
    made_of: list[Any],
    rule: dict[str, Any],
    threshold: float,
    write: tuple[str, ...],
    extra: "HumanRows | None",
) -> None:
    """Datasets and report, over what this command wrote before, unless that was made of the same."""
    from openblip.curate import dataset
    from openblip.curate.job import publish
    from openblip.curate.report import write_report
    from openblip.curate.uids import write_uids

    places = {"parquet": "parquet", "webdataset": "webdataset", "uids": "uids.npy"}
    there = all((folder / places[kind]).exists() for kind in write) and (folder / "report.html").exists()
    stamp, now = folder / "written.json", as_json(made_of)
    if there and stamp.is_file() and stamp.read_text(encoding="utf-8") == now:
        return
    stamp.unlink(missing_ok=True)
    if "parquet" in write:
        dataset.write_parquet(folder, source, folder / "parquet", human=extra, over=True, **rule)
    if "webdataset" in write:
        dataset.write_webdataset(folder, source, folder / "webdataset", human=extra, over=True, **rule)
    if "uids" in write:
        write_uids(folder, source, folder / "uids.npy", **rule)
    write_report(folder, source, folder / "report.html", threshold=threshold, texts=rule["texts"])
    publish(stamp, now.encode())


def bootstrap(
    data: str,
    human: str,
    out: Path,
    rounds: int = 1,
    model: str | None = None,
    pretrain: str = "small_pretrain",
    caption: str = "small_caption",
    retrieval: str = "small_retrieval",
    captions: int = 1,
    threshold: float = 0.5,
    held_out: int = 0,
    seed: int = 0,
    batch_size: int = 32,
    on: Where = HERE,
    how: How = AS_USUAL,
    json: bool = False,
) -> None:
    """The whole of CapFilt, in rounds: captioner and filter from a model, cleaned data, a better model (BLIP §3.3).

    A round fine-tunes captioner and filter from the newest model on the human pairs, cleans the web pairs with
    them, and pre-trains a new model on what is left and the human pairs. The next round cleans the same web pairs
    again, with what it makes of the new model. Interrupted, or called with more rounds, it goes on.

    Args:
        data: web pairs, any layout `openblip info` understands.
        human: human-labelled pairs.
        out: folder; round N leaves its report, its data and its model in roundN.
        rounds: how many.
        model: pre-trained on the web pairs already (folder or hub name); otherwise that comes first, in round0.
        pretrain: recipe of every pre-training: a name (`openblip info` lists them) or a JSON file.
        caption: recipe of the captioner's fine-tune.
        retrieval: recipe of the filter's fine-tune.
        captions: written per picture.
        threshold: keep texts with at least this P(match).
        held_out: keep every so many-th human pair out of the filter's training, to fit P(match) from both of its heads;
            0: it is that of the ITM head alone. The small recipes want 4 (docs/results.md).
        seed: with a picture's id, decides what is sampled.
        batch_size: pictures at a time, when cleaning.
        how: of `data`; `human` is read as usual.
        json: print the figures of every round as JSON.
    """
    from dataclasses import replace

    from openblip.curate.capfilt import CapFiltConfig, nucleus
    from openblip.curate.rounds import RoundsConfig, run_rounds

    worker = CapFiltConfig(replace(nucleus(), num_return_sequences=captions), seed=seed)
    recipes = _recipe(pretrain), _recipe(caption), _recipe(retrieval)
    config = RoundsConfig(*recipes, worker, threshold, held_out)
    found = run_rounds(
        how.open(data), AS_USUAL.open(human), out, config,
        rounds=rounds, model=model, batch_size=batch_size, ray=on.ray(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    print_answer(found, json, lambda: f"model: {found[-1]['model']}")


def push(folder: ModelFolder, name: RepoName, private: bool = False, json: bool = False) -> None:
    """Publish a model folder on the Hugging Face hub; log in first with `hf auth login`, or set HF_TOKEN.

    Args:
        folder: of a model that openblip saved.
        name: on the hub.
        private: for you alone, if it is new there.
        json: print {url} as JSON.
    """
    from openblip.hub import push_to_hub

    url = push_to_hub(folder, name, private=private)
    print_answer({"url": url}, json, lambda: url)


def _absolute(model: str) -> str:
    """The path of a local model from wherever it is asked for; a name on the hub stays."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _name_of(data: str) -> str:
    """The last part of a path or URL, as a name of a folder."""
    return re.sub(r"[^\w.-]+", "-", Path(data).resolve().name).strip("-.") or "data"


def _recipe(name: str) -> "Recipe":
    """By its name, or from a JSON file."""
    from openblip.config import load_json
    from openblip.recipes import Recipe, recipe_named

    return load_json(Recipe, name) if name.endswith(".json") else recipe_named(name)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: for the others, the model has a default."""
    return {name: value for name, value in options.items() if value is not None}


def print_mistake(error: Exception) -> None:
    """One line on standard error."""
    print(f"openblip: {' '.join(str(error).split())}", file=sys.stderr)


def print_answer(value: Any, json: bool, text: Callable[[], str]) -> None:
    """Print what a command found: as JSON for programs, else as `text` says it to people."""
    print(as_json(value) if json else text())


def as_json(value: Any) -> str:
    """Indented JSON; what it does not know is written as text."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
