"""The command line: one function per command, whose signature is its schema. Heavy imports happen inside.

A user's mistake is one line on standard error and exit code 2; `--json` prints an answer for machines.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from openblip.cli_chat import chat
from openblip.cli_convert import convert
from openblip.cli_make import (
    as_json,
    bootstrap,
    capfilt,
    given,
    print_answer,
    print_mistake,
    push,
    quickstart,
    train,
)
from openblip.cli_search import index, search
from openblip.cli_shared import AS_USUAL, How, as_lines, at_least, check_file, progress, say_skipped
from openblip.config import UserError

# Positional arguments, under the names that help shows them by.
Paths = tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="IMAGE ...")]]
ImagePath = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="IMAGE")]]
Texts = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")]]
Question = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="QUESTION")]]
What = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="WHAT")]]


def caption(
    images: Paths,
    model: str,
    prompt: str | None = None,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int | None = None,
    do_sample: bool = False,
    top_p: float = 0.9,
    seed: int | None = None,
    json: bool = False,
) -> None:
    """Write a caption for each image.

    Args:
        images: picture files.
        model: a captioning model (folder or hub name).
        prompt: words the caption begins with; what a BLIP-3 is asked, "Describe the image." by default.
        num_beams: of beam search; ignored when sampling. By default the papers': 3, 5 for BLIP-2, 1 for BLIP-3.
        max_new_tokens: longest caption; by default 20, 30 for BLIP-2, 64 for BLIP-3.
        min_new_tokens: shortest caption.
        do_sample: nucleus sampling instead of beam search.
        top_p: of nucleus sampling.
        seed: of sampling.
        json: print {image: caption} as JSON.
    """
    from openblip.api import load

    if not images:
        raise UserError("caption: no image given")
    options = given(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
    sampling = {"do_sample": True, "top_p": top_p, "seed": seed}
    options |= sampling if do_sample else given(num_beams=num_beams)
    written = load(model).caption(list(images), prompt, **options)
    answer = {str(image): text for image, text in zip(images, written, strict=True)}
    print_answer(answer, json, lambda: "\n".join(f"{image}: {text}" for image, text in answer.items()))


def match(image: ImagePath, texts: Texts, model: str, json: bool = False) -> None:
    """Say how well texts match an image: P(match) of the ITM head, and cosine of the ITC features.

    Args:
        image: a picture file.
        texts: one or more texts.
        model: a retrieval model (folder or hub name).
        json: print a list of {text, probability, cosine} as JSON.
    """
    from openblip.api import load

    found = load(model).match(image, list(texts))
    answer = [
        {"text": text, "probability": float(p), "cosine": float(c)}
        for text, p, c in zip(texts, found.probability, found.cosine, strict=True)
    ]
    print_answer(
        answer,
        json,
        lambda: "\n".join(f"{a['probability']:.3f}  {a['cosine']:.3f}  {a['text']}" for a in answer),
    )


def vqa(
    image: ImagePath,
    question: Question,
    model: str,
    answers: tuple[str, ...] = (),
    prompt: str | None = None,
    json: bool = False,
) -> None:
    """Answer a question about an image.

    Args:
        image: a picture file.
        question: what to ask.
        model: a VQA model, or one with a language model (folder or hub name).
        answers: choose among these instead of answering freely.
        prompt: how a language model is asked, with {} for the question. By default, that of BLIP-2 is asked
            "Question: {} Short answer:", and that of BLIP-3 the question itself.
        json: print {question, answer} as JSON.
    """
    from openblip.api import load

    said = load(model).answer(image, question, answers=list(answers) or None, **given(prompt=prompt))
    print_answer({"question": question, "answer": said}, json, lambda: str(said))


def eval(
    task: tyro.conf.Positional[Literal["retrieval", "caption", "vqa"]],
    data: str,
    model: str,
    k: int = 128,
    num_beams: int | None = None,
    prompt: str | None = None,
    dtype: Literal["fp32", "bf16", "int8"] = "fp32",
    take: int | None = None,
    out: Path | None = None,
    how: How = AS_USUAL,
    json: bool = False,
) -> None:
    """Evaluate a model as the papers do: retrieval with ITM rerank, captions (BLEU, ROUGE-L, CIDEr-D), VQA accuracy.

    Args:
        task: what to evaluate.
        data: rows with captions, or with questions and answers.
        model: folder or hub name.
        k: candidates that the ITM head reranks, for each image and each text.
        num_beams: of beam search; by default the papers': 3, 5 for BLIP-2, 1 for BLIP-3.
        prompt: what captions begin with, or how a language model is asked (see caption and vqa).
        dtype: precision the model runs in.
        take: measure on so many rows alone, drawn by the seed 42.
        out: a file for the figures, with the model and the data they belong to.
        json: print the figures as JSON; "skipped" counts the rows that could not be used, by reason; rows
            without a question are not looked at for vqa, and not counted.
    """
    from openblip.api import load
    from openblip.data.rows import BadRows
    from openblip.eval import benchmarks

    at_least(1, k=k, num_beams=num_beams, take=take)
    source, bad = how.open(data), BadRows()
    if out is not None:
        check_file(out)
    pipeline = load(model, dtype=dtype)
    with progress("looking at every picture", json) as report:
        rows = benchmarks.usable_rows(task, source, bad, take=take, report=report)
    with progress(task, json) as report:
        if task == "retrieval":
            figures = benchmarks.retrieval(pipeline, rows, k=k, report=report)
        else:
            protocol = benchmarks.captioning if task == "caption" else benchmarks.vqa
            if num_beams is None:
                num_beams = pipeline.caption_options["num_beams"]  # the same for answers
            figures = protocol(pipeline, rows, num_beams=num_beams, report=report, **given(prompt=prompt))
    figures["skipped"] = dict(bad.counts)
    record = {"task": task, "model": model, "data": data, "split": how.split, "k": k, "num_beams": num_beams}
    record |= {"dtype": dtype}
    record |= given(prompt=prompt, take=take)
    if out is not None:
        out.write_text(as_json({**record, "figures": figures}), encoding="utf-8")
    shown = {name: v for name, v in figures.items() if name not in ("captions", "answers", "skipped")}
    print_answer(figures, json, lambda: as_lines(shown))
    say_skipped(bad)


def info(what: What = "", how: How = AS_USUAL, json: bool = False) -> None:
    """Say what a model or a data set holds; without an argument: the version and the recipes.

    Args:
        what: a model folder, a file of weights, a hub name, or data: a file, a folder, a pattern, local or remote
            (`s3://...`).
        json: print it as JSON.
    """
    from openblip import __version__

    if not what:
        from openblip.recipes import RECIPES

        found: dict[str, Any] = {"openblip": __version__, "recipes": list(RECIPES)}
    elif _is_data(what):
        source = how.open(what, require_captions=False)
        found = {"rows": len(source), "kind": source.kind, "columns": source.columns, "splits": source.splits}
    else:
        from openblip.config import to_dict
        from openblip.hub import load_pretrained

        made = load_pretrained(what)
        count = sum(parameter.numel() for parameter in made.model.parameters())
        found = {
            "model": type(made.model).__name__,
            "parameters": count,
            "config": to_dict(made.model.config),
        }
        found |= {"info": made.info, "weights": str(made.report)}
    print_answer(found, json, lambda: as_lines(found))


def _is_data(what: str) -> bool:
    """Whether `info` is asked about data, and not about a model or a name on the hub."""
    from openblip.convert.files import SUFFIXES

    if "://" in what or set(what) & set("*?[{"):  # which no model's name has
        return True
    place = Path(what)
    is_model = (place / "config.json").is_file() or (place.is_file() and place.suffix in SUFFIXES)
    return place.exists() and not is_model


COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "train": train,
    "capfilt": capfilt,
    "bootstrap": bootstrap,
    "caption": caption,
    "match": match,
    "vqa": vqa,
    "chat": chat,
    "search": search,
    "index": index,
    "eval": eval,
    "info": info,
    "convert": convert,
    "push": push,
}


def main(arguments: list[str] | None = None) -> None:
    """The `openblip` command. Exits with 2 and one line for a user's mistake, 130 when interrupted."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="openblip", description="The BLIP line of vision-language models.", args=arguments
        )
    except (UserError, OSError) as error:
        mistake = _mistake(error)
        if mistake is None or os.environ.get("OPENBLIP_TRACEBACK"):
            raise
        print_mistake(mistake)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        goes_on = _goes_on(sys.argv[1:] if arguments is None else arguments)
        print(
            f"openblip: interrupted{'; the same call goes on from here' if goes_on else ''}", file=sys.stderr
        )
        raise SystemExit(130) from None


def _mistake(error: UserError | OSError) -> Exception | None:
    """What is said of an error if it is the user's: a path that is absent, forbidden, too long or no folder."""
    in_the_way = error.filename if isinstance(error, FileExistsError | NotADirectoryError) else None
    if in_the_way is not None and not Path(in_the_way).is_dir():
        return UserError(f"{in_the_way}: there is a file where a folder is wanted; name another place")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UserError(f"{str(error.filename)[:60]}...: too long for the name of a file")
    return error if isinstance(error, UserError | FileNotFoundError | PermissionError) else None


def _goes_on(arguments: Sequence[str]) -> bool:
    """Whether the same call goes on where this one was interrupted; other commands keep nothing."""
    if arguments[:1] == ["index"]:
        return arguments[1:2] in (["build"], ["add"])
    is_dry = not {"--dry-run", "--dry_run"}.isdisjoint(arguments)
    return arguments[:1] in (["quickstart"], ["train"], ["capfilt"], ["bootstrap"]) and not is_dry
