"""The README.md of a saved model: what it is, how to load it, what it was trained on, its figures."""

import json
from typing import Any

_CARD = """---
library_name: openblip
tags: [{kind}, image-text]
---

# {name}

A model that {use}. {cls} with {millions:.1f}M parameters, for images of
{side} x {side} pixels; saved by openblip {version}.

```python
import openblip

model = openblip.load("path/to/this/folder")
{example}
```

## Trained on

{trained_on}
"""

_MATCHING = (
    "says how well a text fits an image and embeds both for search",
    'model.match("a.jpg", "a dog on a beach")',
)
_USES = {  # what it is for, and a line of code
    "captioner": ("captions images", 'model.caption("a.jpg")'),
    "retrieval": _MATCHING,
    "blip": (f"captions images, {_MATCHING[0]}", f'model.caption("a.jpg")\n{_MATCHING[1]}'),
    "blip_vqa": ("answers questions about images", 'model.answer("a.jpg", "what is the dog doing?")'),
    "blip2": (f"captions images, {_MATCHING[0]}", f'model.caption("a.jpg")\n{_MATCHING[1]}'),
    "blip2_llm": (
        "captions images and answers questions about them",
        'model.answer("a.jpg", "what is the dog doing?")',
    ),
    "blip_nlvr": ("says whether a sentence is true of two images", "model.model  # the BlipNlvr"),
    "clip": ("embeds images and texts for search", 'model.embed_images("a.jpg")'),
    "vit": ("turns an image into tokens", "model.model  # the VisionTransformer"),
}


def model_card(model: Any, kind: str, name: str, version: str, info: dict[str, Any]) -> str:
    """README.md of the model `name`, of a `kind` that `convert.weights.SYSTEMS` lists; `info` as `save_pretrained`
    takes it.
    """
    config, system = model.config, kind
    if kind == "blip" and not (config.encoder and config.decoder):
        kind = "retrieval" if config.encoder else "captioner"
    use, example = _USES[kind]
    info = dict(info)
    trained_on, metrics = info.pop("trained_on", "Not stated."), info.pop("metrics", {})
    text = _CARD.format(
        kind=system,
        name=name,
        use=use,
        cls=type(model).__name__,
        millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        side=getattr(config, "vision", config).image_size,
        version=version,
        example=example,
        trained_on=trained_on,
    )
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
