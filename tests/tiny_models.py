"""Tiny random models in folders as users have them, and a folder of pictures to try them on."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from openblip.api import Pipeline
from openblip.data.text import Tokenizer, bert_uncased
from openblip.data.transforms import ImageTransform
from openblip.hub import save_pretrained
from openblip.models.blip2 import Blip2, Blip2Config
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.clip import Clip, ClipConfig, ClipTextConfig, clip_vision
from openblip.models.qformer import QFormerConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig
from tests.curate.made import tiny_blip
from tests.data.test_chat import CHATML

VISION = VisionConfig(32, 16, 16, 2, 2, 32)
TEXT = TextConfig(30524, 16, 2, 2, 32, dropout=0.0)
COLOURS = ("red", "green", "blue", "yellow", "white", "purple", "orange", "gray")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar", "diamond", "frame")


def save(pipeline: Pipeline, folder: Path) -> Path:
    save_pretrained(
        pipeline.model, folder, tokenizer=pipeline.tokenizer, transform=pipeline.transform, info=pipeline.info
    )
    return folder


def save_blip(folder: Path, seed: int = 1, **parts: bool) -> Path:
    return save(tiny_blip(seed, **parts), folder)


def save_vqa(folder: Path) -> Path:
    torch.manual_seed(3)
    model = BlipVqa(BlipVqaConfig(VISION, TEXT))
    _liven_(model)
    save_pretrained(model, folder, tokenizer=bert_uncased(), transform=ImageTransform(image_size=32))
    return folder


def save_blip2(folder: Path, seed: int = 5, *, vision: VisionConfig = VISION) -> Path:
    torch.manual_seed(seed)
    text = QFormerConfig(30524, 16, 2, 2, 32, dropout=0.0, num_query_tokens=3)
    model = Blip2(Blip2Config(vision, text, projection_dim=8))
    _liven_(model)
    save_pretrained(model, folder, tokenizer=bert_uncased(), transform=ImageTransform(image_size=32))
    return folder


def save_blip2_llm(
    folder: Path,
    lm: str = "llama",
    *,
    instruct: bool = False,
    heads: bool = True,
    vision: VisionConfig = VISION,
    **changes: Any,
) -> Path:
    """Stage 2 with a random language model of the family `lm` (and `changes`), whose words are the bytes; it can chat.

    The image and the instruction have a say in what is written. With `heads`, stage 1 is kept whole.
    """
    from openblip.data.prompts import LmTokenizer
    from openblip.models.blip2_llm import Blip2Llm, Blip2LlmConfig
    from openblip.models.lm import LmConfig
    from tests.data.test_prompts import CHAT, byte_level
    from tests.models.tiny_lms import CONFIGS

    encoder_decoder = lm in ("t5", "bart")
    tokenizer = byte_level(chat=None if encoder_decoder else CHAT)
    words = LmTokenizer(tokenizer, lm, encoder_decoder=encoder_decoder)
    settings = {**CONFIGS[lm], "vocab_size": len(tokenizer), "max_position_embeddings": 160}
    settings |= {"pad_token_id": words.pad_id, "eos_token_id": words.end_id}
    settings |= {"decoder_start_token_id": words.pad_id} if encoder_decoder else {}
    settings |= changes
    qformer = QFormerConfig(30524, 16, 2, 2, 32, dropout=0.0, num_query_tokens=3, text=heads or instruct)
    stage1 = Blip2Config(vision, qformer, projection_dim=8, encoder=heads, decoder=heads)
    torch.manual_seed(6)
    model = Blip2Llm(Blip2LlmConfig(LmConfig(settings), stage1, qformer_text=instruct))
    for part in (model.blip2, model.projection):
        _liven_(part)
    save_pretrained(
        model,
        folder,
        tokenizer=bert_uncased() if qformer.text else None,
        transform=ImageTransform(image_size=32),
        lm_tokenizer=words,
    )
    return folder


def save_blip3(
    folder: Path,
    lm: str = "llama",
    *,
    condition: bool = False,
    lora: bool = False,
    source: Path | None = None,
    stage: str = "blip3_sft",
    context: int = 400,
    **geometry: Any,
) -> Path:
    """BLIP-3 around a random language model of the family `lm`, whose words are ASCII; what is seen has a say.

    With a `source`, the language model is put into that folder, and only named in the other.
    """
    from openblip.convert.lm import load_lm
    from openblip.models.adapters import LoraSettings
    from openblip.models.blip3 import Blip3, Blip3Config
    from openblip.models.lm import LanguageModel, LmConfig
    from openblip.models.resampler import ResamplerConfig
    from tests.models.tiny_lms import CONFIGS

    words = ascii_words()
    settings = {**CONFIGS[lm], "vocab_size": len(words._tokenizer), "max_position_embeddings": context}
    settings |= {"pad_token_id": words.pad_id, "eos_token_id": words.end_id}
    if "sliding_window" in settings:
        settings["sliding_window"] = 40  # a few lines
    adapters = LoraSettings(rank=2, target_modules=["q_proj", "v_proj"]) if lora else None
    torch.manual_seed(7)
    if source is None:
        language = LanguageModel(LmConfig(settings, lora=adapters, added_tokens=3))
    else:
        LanguageModel(LmConfig(settings)).model.save_pretrained(source)
        words.save(source)
        language = load_lm(str(source), lora=adapters, added_tokens=3)
    width = language.hidden_size if condition else None
    resampler = ResamplerConfig(16, 3, 1, 2, 8, 2, language.hidden_size, condition_size=width)
    model = Blip3(Blip3Config(language.config, VISION, resampler, **geometry), language)
    for part in filter(None, (model.vision, model.resampler, model.temporal)):
        _liven_(part)
    for name, weight in model.lm.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    transform = ImageTransform(image_size=32)
    save_pretrained(model, folder, transform=transform, info={"stage": stage}, lm_tokenizer=words)
    return folder


def ascii_words() -> Any:
    """Every ASCII character is a word, and so is a line break with an "a"; ChatML, whose turns end with another token
    than texts do."""
    from openblip.data.prompts import LmTokenizer

    special = ["<s>", "<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = ["Ġ", "Ċ", *(chr(code) for code in range(33, 127))]
    vocab = {word: number for number, word in enumerate([*special, *letters, "Ċa"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("Ċ", "a")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(word, special=True) for word in special])
    return LmTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", chat_template=CHATML
        )
    )


def save_clip(folder: Path) -> Path:
    """Its vocabulary: the bytes, alone and at the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Tokenizer.from_bpe(folder / "vocab.json", folder / "merges.txt")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    words = ClipTextConfig(vocab_size=len(tokens), eos_token_id=len(tokens) - 1, **sizes)
    model = Clip(ClipConfig(clip_vision(32, 16, **sizes), words, projection_dim=8))
    save_pretrained(model, folder, tokenizer=tokenizer, transform=ImageTransform(32, resize="crop"))
    return folder


def _liven_(model: torch.nn.Module) -> None:
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)


def drawing(number: int, side: int = 48) -> Image.Image:
    """One of 64 pictures: a shape in a colour on black."""
    image = Image.new("RGB", (side, side), "black")
    draw, colour = ImageDraw.Draw(image), COLOURS[number % 8]
    a, b, middle = side // 6, side - side // 6, side // 2
    box = (a, a, b, b)
    match SHAPES[number // 8 % 8]:
        case "circle":
            draw.ellipse(box, fill=colour)
        case "square":
            draw.rectangle(box, fill=colour)
        case "triangle":
            draw.polygon([(middle, a), (b, b), (a, b)], fill=colour)
        case "cross":
            draw.line((a, a, b, b), fill=colour, width=side // 6)
            draw.line((a, b, b, a), fill=colour, width=side // 6)
        case "ring":
            draw.ellipse(box, outline=colour, width=side // 8)
        case "bar":
            draw.rectangle((a, middle - a // 2, b, middle + a // 2), fill=colour)
        case "diamond":
            draw.polygon([(middle, a), (b, middle), (middle, b), (a, middle)], fill=colour)
        case "frame":
            draw.rectangle(box, outline=colour, width=side // 8)
    return image


def picture_folder(folder: Path, count: int = 8) -> Path:
    """images/*.png with captions.jsonl: one caption each, the first half in split "train", the rest in "test"."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(count):
        name = f"images/{number:02d}.png"
        drawing(number).save(folder / name)
        row = {"file_name": name, "captions": [f"a {COLOURS[number % 8]} {SHAPES[number // 8 % 8]}"]}
        lines.append(json.dumps(row | {"split": "train" if number < count // 2 else "test"}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))
    return folder


def question_folder(folder: Path, count: int = 4) -> Path:
    """Pictures with a question, asked of ten people."""
    picture_folder(folder, count)
    lines = [
        {"file_name": f"images/{n:02d}.png", "question": "which colour?", "answers": [COLOURS[n % 8]] * 10}
        for n in range(count)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
