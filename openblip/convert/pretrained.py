"""A checkpoint of another layout with all that belongs to it: model, image transform, tokenizers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openblip.config import UserError
from openblip.convert.files import read_object
from openblip.convert.lavis_blip2 import bring_in_
from openblip.convert.layout import Tensors, model_from_
from openblip.convert.lm import lm_folder
from openblip.convert.preprocessor import image_transform
from openblip.convert.recognise import find_layout
from openblip.convert.weights import LoadReport
from openblip.data.prompts import LmTokenizer
from openblip.data.text import Tokenizer, bert_uncased
from openblip.data.tokens import AddedTokens
from openblip.data.transforms import ImageTransform
from openblip.models.blip2_llm import Blip2Llm
from openblip.models.lm import LanguageModel
from openblip.models.text import TextConfig

_BERT_WORDS = TextConfig().dec_token_id  # how many there are: [DEC] comes behind them


@dataclass
class Pretrained:
    """A model as it was saved, in eval mode, and what belongs to it."""

    model: Any  # of `convert.weights.SYSTEMS`
    tokenizer: Tokenizer | None
    transform: ImageTransform | None
    info: dict[str, Any]
    report: LoadReport
    frozen: dict[str, str] = field(default_factory=dict)  # parts that came from elsewhere: {module: source}
    lm_tokenizer: LmTokenizer | None = None  # of its language model


def from_another_layout_(
    place: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    image_size: int | None = None,
    tokenizer: str | Path | None = None,
    vision: str | Path | None = None,
    lm: str | Path | None = None,
) -> Pretrained:
    """What a folder of transformers, or a file of weights, makes of us; empties `tensors`.

    Args:
        place: the folder or file.
        config: its config.json; {} for a file.
        tensors: its weights.
        image_size: for images of this many pixels instead.
        tokenizer: a folder with the tokenizer of a model that comes without: its own text part's, or if nothing but
            its language model reads, that of the language model.
        vision, lm: of a file that holds no image tower or no language model, see `lavis_blip2.bring_in_`.

    Errors are those of `recognise.find_layout` and `layout.model_from_`.
    """
    parts = bring_in_(tensors, str(place), vision=vision, lm=lm)
    layout = find_layout(config, tensors, str(place))
    settings = {**config, **parts.config}
    model, report = model_from_(layout, settings, tensors, str(place), image_size=image_size, lm=parts.lm)
    report.ignored |= parts.ignored
    report.notes += parts.notes
    files = [place / name for name in ("preprocessor_config.json", "processor_config.json")]
    processor = next((read_object(file) for file in files if file.is_file()), None)
    tower = getattr(model.config, "vision", model.config)
    transform, notes = image_transform(layout.images, tower.image_size, processor)
    report.notes += notes
    words, lm_place = None, place
    if reads_text(model.config):
        words = _tokenizer(model, place, report) if tokenizer is None else Tokenizer.load(tokenizer)
    elif tokenizer is not None:
        lm_place = Path(tokenizer)
    lm_words = lm_tokenizer(model, lm_place)
    if lm_words is not None:
        _check_added_words(lm_words, model.lm, str(lm_place))
    info = {"converted_from": report.layout, **layout.info}
    return Pretrained(model, words, transform, info, report, lm_tokenizer=lm_words)


def reads_text(config: Any) -> bool:
    """Whether a model reads texts with a part of its own; a bare tower, BLIP-2's stage 2 and BLIP-3 do not."""
    return config.text is not None


def _check_added_words(words: LmTokenizer, lm: LanguageModel, where: str) -> None:
    """xGen-MM's <image> and its like: where the tokenizer knows them, it is by the ids that the model has rows for."""
    for number, name in enumerate(AddedTokens.NAMES[: lm.config.added_tokens]):
        got, wanted = words.id_of(name), lm.first_added_id + number
        if got not in (None, wanted):
            raise UserError(f"{where}: the tokenizer's {name} is {got}, the model's {wanted}: no match")


def _tokenizer(model: Any, place: Path, report: LoadReport) -> Tokenizer | None:
    """The checkpoint's own tokenizer or, if its words are BERT's, the installed one."""
    own = place
    if isinstance(model, Blip2Llm):  # InstructBLIP keeps the Q-Former's beside that of the language model
        own = place / "qformer_tokenizer"
    if any((own / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        return Tokenizer.load(own)
    text = getattr(model.config, "text", None) or getattr(model.config, "qformer", None)
    missing = f"no tokenizer in this {'folder' if place.is_dir() else 'file'}"
    if getattr(text, "dec_token_id", None) != _BERT_WORDS:
        report.notes.append(missing)
        return None
    try:
        found = bert_uncased()
    except UserError as error:
        report.notes.append(f"{missing}: {error}")
        return None
    report.notes.append(f"{missing}: its words are those of bert-base-uncased, from an installed package")
    return found


def lm_tokenizer(model: Any, folder: Path) -> LmTokenizer | None:
    """The tokenizer of a model's language model, if it has one: from its source, or from a folder."""
    if not hasattr(model, "lm"):
        return None
    settings = model.lm.config
    place = str(folder) if settings.source is None else lm_folder(settings.source)
    files = [Path(place) / name for name in ("tokenizer.json", "tokenizer_config.json")]
    is_on_hub = settings.source is not None and not Path(place).exists()
    if not is_on_hub and not any(file.is_file() for file in files):
        return None
    family = settings.family or settings.config["model_type"]
    return LmTokenizer.load(place, family, encoder_decoder=model.lm.is_encoder_decoder)
