"""The geometry of a tiny BLIP, the words it knows, and the names of the files it is saved in."""

from pathlib import Path

from openblip.data.text import Tokenizer
from openblip.models.blip import BlipConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig
from tests.parity.peers import CLS, DEC, ENC, SEP

VISION = VisionConfig(32, 8, 24, 2, 4, 32)
TEXT = TextConfig(130, 16, 2, 4, 24, max_position_embeddings=24, dec_token_id=DEC, enc_token_id=ENC)
BLIP = BlipConfig(VISION, TEXT, projection_dim=12)


def tokenizer_of_words(path: Path) -> Tokenizer:
    """128 words with [CLS] 101 and [SEP] 102, to which [DEC] 128 and [ENC] 129 are added."""
    words = [f"w{i}" for i in range(128)]
    words[0], words[100], words[CLS], words[SEP] = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    path.write_text("\n".join(words), encoding="utf-8")
    return Tokenizer.from_vocab(path)


def files_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
