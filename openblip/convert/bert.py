"""BERT's checkpoints into our text transformers: what the texts of BLIP, and the Q-Former of BLIP-2, begin with.

    BertModel                           embeddings, encoder.layer, pooler
    BertForMaskedLM, BertForPreTraining the same below bert., and cls.predictions, a head that writes

What BLIP has and BERT has not: cross-attention keeps the weights it has, and each word that BLIP adds starts as the
mean of all words plus a little noise, always the same: modules that encoder and decoder share may be loaded through
both. What BERT has and BLIP has not is left out: types of tokens and the pooler.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from openblip.convert.huggingface_names import bert_names
from openblip.convert.layout import COUNTED, Names, their_names
from openblip.convert.weights import LoadReport, merge_tied_, refuse
from openblip.models.text import LanguageModelHead, TextTransformer

_NEW_WORD_STD = 0.02  # BERT's initializer_range
_WORDS = "embeddings.word.weight"
_HEAD = "lm_head."
_NAMES: Names = bert_names("") | {
    f"{_HEAD}dense": "cls.predictions.transform.dense",
    f"{_HEAD}norm": "cls.predictions.transform.LayerNorm",
    f"{_HEAD}bias": "cls.predictions.bias",
}
_TIED = (
    ("embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
)
_IGNORED = {
    **COUNTED,
    r"embeddings\.token_type_embeddings\.weight": "which of two texts a token is of: BLIP reads one, and has no types",
    r"pooler\..*": "BLIP has no pooler",
    r"cls\.seq_relationship\..*": "tells whether two texts follow each other",
}


@torch.no_grad()
def bert_(
    text: TextTransformer, tensors: Mapping[str, Tensor], where: str, head: LanguageModelHead | None = None
) -> LoadReport:
    """Initialise a text transformer from the state dict of a BERT, in place, and a head that writes with it.

    Raises WeightsError: tensors that are missing, not known, of another shape, or tied but different; by name.
    """
    left = {_name_of_today(name): value for name, value in tensors.items()}
    report = LoadReport(where, "BERT", tied=merge_tied_(left, _TIED, where))
    own = text.state_dict()
    if head is not None:
        own |= {f"{_HEAD}{name}": value for name, value in head.state_dict().items()}
    writes = any(name.startswith("cls.predictions.") for name in left)
    state: dict[str, Tensor] = dict(own)
    missing: list[str] = []
    wrong: list[str] = []
    for name, mine in own.items():
        if ".cross_attention." in name or (name.startswith(_HEAD) and not writes):
            report.fresh[name] = "as it was; there is none in this BERT"
            continue
        theirs = their_names(name, _NAMES)
        if absent := [their for their in theirs if their not in left]:
            missing += absent
            continue
        value = torch.cat([left.pop(their) for their in theirs])
        if name in (_WORDS, f"{_HEAD}bias") and len(value) < len(mine):
            report.fresh[f"{name}[{len(value)}:]"] = "of words that BERT has not"
            value = torch.cat([value, _new_rows(value, len(mine) - len(value))])
        if value.shape != mine.shape:
            wrong.append(f"{name} is {list(value.shape)}, the model wants {list(mine.shape)}")
        state[name] = value
        report.loaded.append(name)
    without_head = {r"cls\.predictions\..*": "writes, and there is no such head here"} if head is None else {}
    for pattern, why in (_IGNORED | without_head).items():
        for name in [name for name in left if re.fullmatch(pattern, name)]:
            report.ignored[name] = why
            del left[name]
    refuse(where, missing=missing, unknown=left.keys(), wrong=wrong)
    text.load_state_dict({name: value for name, value in state.items() if not name.startswith(_HEAD)})
    if head is not None:
        head.load_state_dict(
            {name.removeprefix(_HEAD): value for name, value in state.items() if name.startswith(_HEAD)}
        )
    return report


def _name_of_today(name: str) -> str:
    """Files of the first PyTorch BERT call a LayerNorm's weight gamma and its bias beta."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name).removeprefix("bert.")


def _new_rows(words: Tensor, count: int) -> Tensor:
    """Rows [count, D] of words never seen before: the mean word, and noise to tell them apart. A bias [count]: 0."""
    if words.ndim == 1:
        return words.new_zeros(count)
    noise = torch.randn(count, words.shape[1], generator=torch.Generator().manual_seed(0))
    return words.mean(dim=0) + _NEW_WORD_STD * noise.to(words.dtype)
