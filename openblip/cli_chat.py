"""`openblip chat`: a conversation with a BLIP-3, at the keyboard or by arguments. Answers go to standard output, all
else to standard error.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openblip.cli_make import given, print_answer, print_mistake
from openblip.config import UserError

if TYPE_CHECKING:
    from openblip.api import Talk

Pictures = tyro.conf.UseAppendAction[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="IMAGE")]]
Turns = tyro.conf.UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")]]

_COMMANDS = (
    "/image FILE adds a picture or video to what you say next, /undo takes the last turn back, /quit ends"
)


def chat(
    model: str,
    image: Pictures = (),
    message: Turns = (),
    system: str | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int | None = None,
    do_sample: bool = False,
    top_p: float = 0.9,
    seed: int | None = None,
    json: bool = False,
) -> None:
    """Talk with a BLIP-3 about pictures and videos, in several turns; Ctrl-D ends. `/image FILE` shows it one more.

    Args:
        model: a BLIP-3 (folder or hub name).
        image: a picture, or a video such as clip.mp4, that belongs to the first message; give it once for each.
        message: what to say, instead of asking for it; give it once for each turn. A marker <image> may stand where a
            picture stands, otherwise they stand in front.
        system: told to the model before the conversation.
        max_new_tokens: longest answer; by default 768, or a quarter of a small context. There must be room for it.
        min_new_tokens: shortest answer.
        do_sample: nucleus sampling instead of the likeliest token each time.
        top_p: of nucleus sampling.
        seed: of sampling.
        json: print {messages, answers} as JSON when all messages are answered.
    """
    if json and not message:
        raise UserError("chat: --json is for conversations that are given: add --message")
    from openblip.api import ChatPipeline, load

    for path in image:
        _look_at(path)  # before the model is loaded, which takes longer
    options = given(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
    options |= {"do_sample": True, "top_p": top_p, **given(seed=seed)} if do_sample else {}
    pipeline = load(model)
    if not isinstance(pipeline, ChatPipeline):
        raise UserError(f"chat: wants a BLIP-3, and {model} is a {type(pipeline.model).__name__}")
    talk = pipeline.conversation(system)
    if not message:
        _converse(talk, list(image), options)
        return
    answers = []
    for number, text in enumerate(message):
        pieces = talk.stream(text, image if number == 0 else (), **options)
        answers.append(_print_pieces(pieces, not json))
    if json:
        print_answer({"messages": talk.messages, "answers": answers}, json, str)


def _converse(talk: "Talk", images: list[Path], options: dict[str, Any]) -> None:
    """Read lines until there are no more. A mistake costs one line, and the conversation goes on."""
    print(_COMMANDS, file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text == "/quit":
            print(file=sys.stderr)
            return
        try:
            if text.startswith("/"):
                _command(text, talk, images)
            elif text:
                _print_pieces(talk.stream(text, images, **options), True)
                images.clear()
        except UserError as error:
            print_mistake(error)
        except KeyboardInterrupt:
            print("\nstopped: this turn does not count", file=sys.stderr)


def _command(text: str, talk: "Talk", images: list[Path]) -> None:
    """`images` are those that were not shown yet."""
    name, _, rest = text.partition(" ")
    if name == "/image" and rest:
        path = Path(rest.strip()).expanduser()
        _look_at(path)
        images.append(path)
    elif text == "/undo" and images:
        images.clear()
        print("nothing was said yet: pictures taken back", file=sys.stderr)
    elif text == "/undo":
        talk.undo()
        print("the last turn was taken back", file=sys.stderr)
    else:
        raise UserError(f"{name}: {_COMMANDS}")


def _look_at(path: Path) -> None:
    """Raises BadImage: a picture or video that cannot be read."""
    from openblip.data.image import open_image
    from openblip.data.video import as_video, read_frames

    open_image(path) if as_video(path) is None else read_frames(path, 1)


def _print_pieces(pieces: Iterator[str], shown: bool) -> str:
    """All of an answer, which is shown as it is written."""
    said = []
    for piece in pieces:
        said.append(piece)
        if shown:
            print(piece, end="", flush=True)
    if shown:
        print()
    return "".join(said)
