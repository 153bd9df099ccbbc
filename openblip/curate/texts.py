"""Rules for texts by themselves, whatever the picture: how long, and in which script.

Like the filter's threshold they are applied when scores are read, so that another rule asks no model.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from openblip.config import UserError

SCRIPTS = (
    *("latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "bengali", "tamil", "telugu", "thai"),
    *("hangul", "hiragana", "katakana", "cjk", "armenian", "georgian", "ethiopic"),
)


@dataclass(frozen=True)
class TextRules:
    """Which texts may be kept at all, web's and written ones alike.

    min_words, max_words: of words between spaces; None: any number. script: of `SCRIPTS`; two (`hiragana`, `cjk`) may
        stand together. script_share: of the letters, at least. The language itself is not told: French is Latin, too.

    Raises UserError: a number or a script that makes no sense.
    """

    min_words: int = 0
    max_words: int | None = None
    script: Sequence[str] = ()
    script_share: float = 0.9

    def __post_init__(self) -> None:
        if self.min_words < 0 or (self.max_words is not None and self.max_words < max(1, self.min_words)):
            raise UserError(
                f"max_words is at least min_words and 1, got {self.min_words} to {self.max_words}"
            )
        if unknown := [name for name in self.script if name not in SCRIPTS]:
            raise UserError(f"script: {unknown[0]!r} is not known; there are: {', '.join(SCRIPTS)}")
        if not 0 <= self.script_share <= 1:
            raise UserError(f"script_share is a share between 0 and 1, got {self.script_share}")

    def allows(self, text: str) -> bool:
        """Whether a text keeps the rules. One without any letter has no script, and is refused if one is asked for."""
        words = len(text.split())
        if words < self.min_words or (self.max_words is not None and words > self.max_words):
            return False
        if not self.script:
            return True
        scripts = [_script(letter) for letter in text if letter.isalpha()]
        found = sum(script in self.script for script in scripts)
        return bool(scripts) and found >= self.script_share * len(scripts)


@lru_cache(maxsize=65_536)
def _script(letter: str) -> str:
    """`latin` for `é`: the first word of the letter's name in Unicode."""
    return unicodedata.name(letter, "").partition(" ")[0].lower()
