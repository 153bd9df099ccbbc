"""BLIP as its makers published it: the `.pth` files of salesforce/BLIP and of BLIP in LAVIS, which have the same names.

    class in LAVIS / in BLIP         what is in it                                       ours
    BlipPretrain / BLIP_Pretrain     encoder and decoder tied, momentum twin, queues     Blip
    BlipRetrieval / BLIP_Retrieval   encoder, ITC and ITM heads, twin, queues            Blip without decoder
    BlipITM / BLIP_ITM               the same with neither twin nor temperature          Blip without decoder
    BlipCaption / BLIP_Decoder       decoder                                             Blip without encoder
    BlipVQA / BLIP_VQA               encoder and decoder, not tied                       BlipVqa
    BlipNLVR / BLIP_NLVR             encoder with twin cross-attention, a head           BlipNlvr

There is no configuration in them: the geometry is read off the shapes, and what no shape shows is that of the released
code: heads of 64, exact GELU, epsilons of 1e-6 for images and 1e-12 for texts, [DEC] and [ENC] the last two words.
Nor is there a vocabulary; it is bert-base-uncased's.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from openblip.convert import huggingface_names as tables
from openblip.convert.layout import COUNTED, Layout, Names, shape_of, under
from openblip.convert.weights import WeightsError
from openblip.models.blip import BlipConfig
from openblip.models.blip_nlvr import BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqaConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig

_BLOCK = "visual_encoder.blocks.{}."
_VISION: Names = {
    "vision.class_embedding": "visual_encoder.cls_token",
    "vision.position_embedding": "visual_encoder.pos_embed",
    "vision.patch_embedding": "visual_encoder.patch_embed.proj",
    "vision.blocks.{}.norm1": f"{_BLOCK}norm1",
    "vision.blocks.{}.attention.qkv": f"{_BLOCK}attn.qkv",
    "vision.blocks.{}.attention.out": f"{_BLOCK}attn.proj",
    "vision.blocks.{}.norm2": f"{_BLOCK}norm2",
    "vision.blocks.{}.mlp.fc1": f"{_BLOCK}mlp.fc1",
    "vision.blocks.{}.mlp.fc2": f"{_BLOCK}mlp.fc2",
    "vision.norm": "visual_encoder.norm",
}
_HEADS: Names = {
    "vision_proj": "vision_proj",
    "text_proj": "text_proj",
    "itm_head": "itm_head",
    "temperature": "temp",
}
_CROSS = "text_encoder.encoder.layer.{}.crossattention."


def _twin(ours: str, number: int) -> Names:
    """One of NLVR2's two cross-attentions."""
    theirs = f"{_CROSS}self{number}."
    return {
        f"{ours}.q": f"{theirs}query",
        f"{ours}.kv": (f"{theirs}key", f"{theirs}value"),
        f"{ours}.out": f"{_CROSS}output.dense{number}",
    }


_NLVR = (
    tables.BLIP_ENCODER
    | under("text_encoder.layers.{}.cross_attention", _twin("left", 0) | _twin("right", 1))
    | {
        "text_encoder.layers.{}.cross_attention.merge": f"{_CROSS}output.merge_layer",
        "cls_head.{}": "cls_head.{}",
    }
)
_TRAINING = COUNTED | {
    r"\w+_m\..*": "the momentum twin; a training that goes on from here makes its own, equal to the model",
    r"(image|text|idx)_queue|queue_ptr|ptr_queue": "the queue; a training that goes on from here fills its own",
}
_TEMPERATURE = {"temperature": (0.07, "the file has no ITC temperature; this is where training starts")}
_PROMPT = {"prompt": "a picture of "}  # BLIP §4.1: every caption of the fine-tuning begins with it


def _vision(tensors: Mapping[str, Tensor], *, drop_path: float = 0.0) -> VisionConfig:
    """ViT-B or ViT-L, whose code always drops paths, for square images."""
    width, _, patch, _ = shape_of(tensors, "visual_encoder.patch_embed.proj.weight")
    patches = shape_of(tensors, "visual_encoder.pos_embed")[1] - 1
    side = round(patches**0.5)
    if side * side != patches:
        raise WeightsError(f"visual_encoder.pos_embed has {patches} patches, which is no square of them")
    return VisionConfig(
        image_size=side * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=_layers(tensors, "visual_encoder.blocks."),
        num_attention_heads=_heads(width, "visual_encoder"),
        intermediate_size=shape_of(tensors, "visual_encoder.blocks.0.mlp.fc1.weight")[0],
        drop_path_rate=0.1 if width > 768 else drop_path,
    )


def _text(tensors: Mapping[str, Tensor], bert: str) -> TextConfig:
    """BERT with two more words, under the prefix `bert`."""
    words, width = shape_of(tensors, f"{bert}.embeddings.word_embeddings.weight")
    return TextConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=_layers(tensors, f"{bert}.encoder.layer."),
        num_attention_heads=_heads(width, bert),
        intermediate_size=shape_of(tensors, f"{bert}.encoder.layer.0.intermediate.dense.weight")[0],
        max_position_embeddings=shape_of(tensors, f"{bert}.embeddings.position_embeddings.weight")[0],
        dec_token_id=words - 2,
        enc_token_id=words - 1,
    )


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    return len(numbers)


def _heads(width: int, part: str) -> int:
    if width % 64:
        raise WeightsError(
            f"{part} is {width} wide: heads are 64 wide in BLIP, and that is no multiple of it"
        )
    return width // 64


def _projection(tensors: Mapping[str, Tensor]) -> int:
    return shape_of(tensors, "vision_proj.weight")[0]


def _pretrain(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlipConfig:
    text = _text(tensors, "text_encoder")
    return BlipConfig(_vision(tensors), text, projection_dim=_projection(tensors))


def _retrieval(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlipConfig:
    text, width = _text(tensors, "text_encoder"), _projection(tensors)
    return BlipConfig(_vision(tensors), text, projection_dim=width, share=(), decoder=False)


def _captioner(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlipConfig:
    return BlipConfig(_vision(tensors), _text(tensors, "text_decoder.bert"), share=(), encoder=False)


def _vqa(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlipVqaConfig:
    return BlipVqaConfig(_vision(tensors, drop_path=0.1), _text(tensors, "text_encoder"))


def _nlvr(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlipNlvrConfig:
    return BlipNlvrConfig(_vision(tensors, drop_path=0.1), _text(tensors, "text_encoder"))


_IMAGES, _ENCODER, _DECODER = "visual_encoder.patch_embed", "text_encoder.embeddings", "text_decoder.bert"

LAYOUTS = (
    Layout(
        origin="LAVIS", name="BlipPretrain", marks=(_IMAGES, _ENCODER, _DECODER, "itm_head"),
        names=_VISION | tables.BLIP_ENCODER | tables.BLIP_DECODER | _HEADS, config=_pretrain, images="blip",
        tied=tables.BLIP_TIED, ignored=_TRAINING,
    ),
    Layout(
        origin="LAVIS", name="BlipVQA", marks=(_IMAGES, _ENCODER, _DECODER),
        names=_VISION | tables.BLIP_ENCODER | tables.BLIP_DECODER, config=_vqa, images="blip",
        tied=tables.BLIP_TIED, ignored=_TRAINING,
    ),
    Layout(
        origin="LAVIS", name="BlipCaption", marks=(_IMAGES, _DECODER),
        names=_VISION | tables.BLIP_DECODER, config=_captioner, images="blip",
        tied=tables.BLIP_TIED, ignored=_TRAINING, info=_PROMPT,
    ),
    Layout(
        origin="LAVIS", name="BlipRetrieval", marks=(_IMAGES, _ENCODER, "itm_head", "temp"),
        names=_VISION | tables.BLIP_ENCODER | _HEADS, config=_retrieval, images="blip", ignored=_TRAINING,
    ),
    Layout(
        origin="LAVIS", name="BlipITM", marks=(_IMAGES, _ENCODER, "itm_head"),
        names=_VISION | tables.BLIP_ENCODER | _HEADS, config=_retrieval, images="blip", ignored=_TRAINING,
        fresh=_TEMPERATURE,
    ),
    Layout(
        origin="LAVIS", name="BlipNLVR", marks=(_IMAGES, f"{_CROSS}self0".format(0), "cls_head"),
        names=_VISION | _NLVR, config=_nlvr, images="blip", ignored=_TRAINING,
    ),
)  # fmt: skip
