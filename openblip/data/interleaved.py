"""Documents of text and images in the order in which a page had them, as ids to read and write (§4.4, §4.5).

    start  text  <image> × K  text  <|endofchunk|>  <image> × K  text  <|endofchunk|>  end

A chunk is all the text between two images; it is stripped, and empty ones are no chunk. Each chunk that comes after an
image ends with <|endofchunk|>, so that a model shown a few examples knows where the next begins; the text before the
first image and an image with no text behind it have none. Every text token, <|endofchunk|> and the end token are
counted, images and the start are not. (OpenFlamingo's documents; it puts a token also behind an image without text.)
xGen-MM's released code does not count <|endofchunk|>, against its authors' intention, as a remark in it says; with
`count_end_of_chunk` False, nor does this.

A document that is too long, or has more images than are wanted, ends before the image that does not fit, or inside its
last text: without an end token.
Several documents are packed into one row by `pack`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from openblip.data.prompts import LmTokenizer
from openblip.data.rows import BadRow, Reference, Row, read_text
from openblip.data.tokens import AddedTokens, Tokens

IMAGE = AddedTokens.NAMES[0]


@dataclass(frozen=True)
class Document:
    """Texts in order, with None where the next of `images` stands. `id` and `where` are the row's.

    goes_on: it was cut, so this is not its end.
    """

    parts: list[str | None]
    images: list[Reference]
    id: str
    where: str
    goes_on: bool = False

    def before_image(self, number: int) -> "Document":
        """What comes before image `number`."""
        places = [place for place, part in enumerate(self.parts) if part is None]
        return replace(self, parts=self.parts[: places[number]], images=self.images[:number], goes_on=True)

    def without_images(self, missing: Collection[int]) -> "Document":
        """All but the images of these numbers; the texts around one become one chunk."""
        parts: list[str | None] = []
        number = -1
        for part in self.parts:
            number += part is None
            if part is not None or number not in missing:
                parts.append(part)
        images = [image for index, image in enumerate(self.images) if index not in missing]
        return replace(self, parts=parts, images=images)


def read_document(row: Row, rng: np.random.Generator | None = None) -> Document:
    """The document of a row.

    Parallel `texts` and `images` with None in one where the other stands (OBELICS, MINT-1T; where both stand, the
    image comes first), a text with <image> markers and as many images, or one image and its caption: of several
    `rng` draws one, without it the first is taken.

    Raises:
        BadRow: markers and images differ in number, no text at all, or something that is no text.
    """
    parts: list[str | None]
    if "document" in row.extra:
        parts = [None if part is None else read_text(part, row.where) for part in row.extra["document"]]
    elif row.captions:
        text = row.captions[0 if rng is None else int(rng.integers(len(row.captions)))]
        pieces = text.split(IMAGE)
        if len(pieces) == 1 and len(row.images) == 1:
            pieces = ["", text]
        if len(pieces) - 1 != len(row.images):
            found = f"{len(pieces) - 1} {IMAGE} markers for {len(row.images)} images"
            raise BadRow("image_count", row.where, f"the text has {found}")
        parts = [pieces[0]]
        for piece in pieces[1:]:
            parts += [None, piece]
    else:
        parts = []
    parts = [part for part in parts if part is None or part.strip()]
    if all(part is None for part in parts):
        raise BadRow("missing_caption", row.where, "no text in the document")
    return Document(parts, row.images, row.id, row.where)


def document_tokens(
    document: Document,
    lengths: Sequence[int],
    tokenizer: LmTokenizer,
    added: AddedTokens,
    max_length: int | None = None,
    *,
    count_end_of_chunk: bool = True,
) -> Tokens:
    """Ids and labels as at the head of this file, at most `max_length`.

    `runs` of the result says how many of the images are left. What a text says is never control: a typed
    <|endofchunk|> is encoded letter by letter.

    Args:
        lengths: vision tokens of each image, in order.
    """
    pieces = [Tokens.text(tokenizer.start_ids, counted=False)]
    chunk: list[str] = []
    seen = 0

    def end_chunk() -> None:
        if chunk:
            pieces.append(Tokens.text(tokenizer.encode("\n\n".join(chunk)), counted=True))
            if seen:
                pieces.append(Tokens.text([added.end_of_chunk], counted=count_end_of_chunk))
            chunk.clear()

    for part in document.parts:
        if part is not None:
            chunk.append(part.strip())
            continue
        end_chunk()
        pieces.append(Tokens.image(added.image, lengths[seen]))
        seen += 1
    end_chunk()
    if not document.goes_on:
        pieces.append(Tokens.text([tokenizer.end_id], counted=True))
    tokens = Tokens.join(pieces)
    return tokens if max_length is None else tokens.cut(max_length)


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Documents of these lengths into rows of at most `max_length` tokens: the numbers of each row's documents.

    First fit: every document, in order, goes into the first row with room for it. One longer than `max_length` has a
    row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number, length in enumerate(lengths):
        at = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(max_length)
        rows[at].append(number)
        room[at] -= length
    return rows
