"""Tiny BLIP-3s of every kind that chats, and pictures and conversations to give them."""

from tests.tiny_models import drawing, save_blip3

KINDS = {
    "plain": {},
    "fixed": {"sampling": "fixed"},
    "together": {"sampling": "anyres_fixed_sampling", "tile_grouping": "strip"},
    "conditioned": {"condition": True},
    "window": {"lm": "phi3", "tile_grouping": "strip"},
    "base": {"stage": "blip3_pretrain"},
}


def save_kinds(tmp_path_factory):
    """The folder of each kind, by its name."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_blip3(root / name, **options) for name, options in KINDS.items()}


def unequal_pictures():
    """Small, wide, tall: cut into different numbers of tiles."""
    return [drawing(0), drawing(9).resize((120, 40)), drawing(18).resize((40, 130)), drawing(27)]


def said(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def config(limit):
    from openblip.models.generation import GenerationConfig

    return GenerationConfig(max_new_tokens=limit)
