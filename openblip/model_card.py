"""The README.md of a saved model: what it is, how to load it, what it was trained on, its figures."""

import json
from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: {library}
{licence}tags: [{kind}, image-text]
---

# {name}

A model that {use}. {cls} with {millions:.1f}M parameters, for images of
{size}; saved by openblip {version}.

```python
{code}
```

{frozen}## Trained on

{trained_on}
"""

_OURS = """\
import openblip

model = openblip.load("path/to/this/folder")
{example}"""

_THEIRS = """\
from PIL import Image
from transformers import AutoProcessor, {cls}

processor = AutoProcessor.from_pretrained("path/to/this/folder")
model = {cls}.from_pretrained("path/to/this/folder")
{example}"""
_INPUTS = (
    'inputs = processor(images=Image.open("a.jpg").convert("RGB"), text="{text}", return_tensors="pt")\n'
)
_SAID = "print(processor.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))"
_THEIR_EXAMPLES = {  # by the class of transformers
    "BlipForConditionalGeneration": _INPUTS.format(text="{prompt}") + _SAID,
    "BlipForQuestionAnswering": _INPUTS.format(text="what is the dog doing?") + _SAID,
    "BlipForImageTextRetrieval": _INPUTS.format(text="a dog on a beach")
    + """\
cosine = model(**inputs, use_itm_head=False).itm_score
inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")  # as this model was trained
print(cosine, model(**inputs).itm_score.softmax(dim=1)[:, 1])""",
    "Blip2ForImageTextRetrieval": _INPUTS.format(text="a dog on a beach")
    + """\
print(model(**inputs).logits_per_image, model(**inputs, use_image_text_matching_head=True).logits_per_image)""",
    "Blip2ForConditionalGeneration": _INPUTS.format(text="Question: what is the dog doing? Short answer:")
    + _SAID,
    "InstructBlipForConditionalGeneration": _INPUTS.format(text="What is the dog doing?") + _SAID,
    "CLIPModel": _INPUTS.format(text="a dog on a beach") + "print(model(**inputs).logits_per_image)",
}
_MATCHING = (
    "says how well a text fits an image and embeds both for search",
    'model.match("a.jpg", "a dog on a beach")',
)
_CAPTIONS = ("captions images", 'model.caption("a.jpg")')
_ANSWERS = ("answers questions about them", 'model.answer("a.jpg", "what is the dog doing?")')
_CHATS = (
    "holds conversations about any number of pictures, captions them and answers questions about them",
    """\
model.chat("which is older?", ["a.jpg", "b.jpg"])  # one conversation, or a list of them
talk = model.conversation()  # several turns
talk.say("what is this?", "a.jpg")
model.caption("a.jpg")
model.answer("a.jpg", "what is the dog doing?")""",
)
_READS = (  # a BLIP-3 before instruction tuning
    "goes on with documents of pictures and text, and so captions pictures",
    'model.caption("a.jpg")',
)
_USES = {  # what it is for, and a line of code
    "blip_vqa": ("answers questions about images", 'model.answer("a.jpg", "what is the dog doing?")'),
    "blip_nlvr": ("says whether a sentence is true of two images", "model.model  # the BlipNlvr"),
    "clip": ("embeds images and texts for search", 'model.embed_images("a.jpg")'),
    "vit": ("turns an image into tokens", "model.model  # the VisionTransformer"),
}


def model_card(
    model: Any,
    kind: str,
    name: str,
    version: str,
    info: dict[str, Any],
    frozen: Mapping[str, str] | None = None,
    *,
    transformers: str | None = None,
) -> str:
    """README.md of the model `name`, of a `kind` that `convert.weights.SYSTEMS` lists; `info` and `frozen` as
    `save_pretrained` takes them. transformers: the class there that the folder is for, instead of ours.
    """
    config = model.config
    use, example = _use(config, kind, info)
    info = dict(info)
    trained_on, metrics = info.pop("trained_on", "Not stated."), info.pop("metrics", {})
    licence, commands = info.pop("licence", None), info.pop("commands", [])
    code = _OURS.format(example=example)
    if transformers is not None:
        begun = str(info.get("prompt", "")).strip()
        shown = _THEIR_EXAMPLES.get(transformers, "").replace("{prompt}", begun)
        code = _THEIRS.format(cls=transformers, example=shown)
    text = _CARD.format(
        kind=kind,
        name=name,
        use=use,
        cls=type(model).__name__,
        millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        size=_size(config),
        version=version,
        library="openblip" if transformers is None else "transformers",
        licence=f"license: {licence}\n" if licence else "",
        code=code.rstrip(),
        trained_on=trained_on,
        frozen=_frozen(config, frozen or {}, is_whole=transformers is not None),
    )
    if commands:
        text += "\n".join(["\n## Commands\n", "```bash", *commands, "```", ""])
    if metrics:
        rows = [
            f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |"
            for key, value in metrics.items()
        ]
        text += "\n".join(["\n## Figures\n", "| metric | value |", "|---|---|", *rows, ""])
    if info:
        rows = [f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in info.items()]
        text += "\n".join(["\n## More\n", *rows, ""])
    return text


def _use(config: Any, kind: str, info: Mapping[str, Any]) -> tuple[str, str]:
    """What a model is for, by the parts it has and by what it learnt, and code that shows it."""
    if kind in _USES:
        return _USES[kind]
    if kind == "blip3":
        return _READS if info.get("stage") == "blip3_pretrain" else _CHATS
    has_lm = kind == "blip2_llm"
    stage1 = config.blip2 if has_lm else config
    able = [_CAPTIONS] if has_lm or stage1.decoder else []
    able += [_ANSWERS] if has_lm else []
    able += [_MATCHING] if stage1.encoder else []
    if not able:
        return "turns an image into query tokens for a language model", "model.model  # the Blip2"
    uses, examples = zip(*able)
    use = ", ".join(uses)
    if has_lm and config.qformer_text:
        use += "; its Q-Former reads the instruction (InstructBLIP)"
    return use, "\n".join(examples)


def _size(config: Any) -> str:
    """What it says of the size of images."""
    side = getattr(config, "vision", config).image_size
    pixels = f"{side} x {side} pixels"
    if getattr(config, "sampling", "fixed") == "fixed":
        return pixels
    most = max(columns * rows for columns, rows in config.grids)
    return f"any size, which it sees as a whole and in up to {most} tiles of {pixels}"


def _frozen(config: Any, named: Mapping[str, str], *, is_whole: bool) -> str:
    """The section about what was not trained and is not in this folder, or, if it `is_whole`, only held here."""
    lm, stage1 = getattr(config, "lm", None), getattr(config, "blip2", config)
    where = "" if is_whole else ", not in this folder"
    lines = [f"- {module}: {source}{where}" for module, source in named.items()]
    if getattr(stage1, "freeze_vision", False) and not any("vision" in module for module in named):
        lines.insert(0, "- vision, the image tower")
    if lm is not None and not lm.trainable:
        place = f"from {lm.source} (sha256 {lm.sha256}){where}" if lm.source else "in this folder"
        adapters = "; its LoRA adapters were trained" if lm.lora is not None else ""
        lines.append(f"- lm, the language model ({lm.config['model_type']}): {place}{adapters}")
    return "\n".join(["## Frozen parts\n", *lines, "", ""]) if lines else ""
