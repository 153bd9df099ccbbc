"""What people call an emoji in English, and which emoji are variants of one picture.

Names come from the package `emoji` (Unicode's CLDR, and the aliases of chat programs) and from Unicode's own
table of characters, which often says what is to be seen: "face with party horn and party hat" is there what
CLDR calls "partying face".
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

Key = tuple[int, ...]  # the code points of an emoji, without variation selectors

_VARIATION, _JOINER, _RIGHTWARDS, _FEMALE, _MALE = 0xFE0F, 0x200D, 0x27A1, 0x2640, 0x2642
_REGIONAL = range(0x1F1E6, 0x1F200)  # two of these are the flag of a country
_TAGS = range(0xE0020, 0xE0080)  # a black flag and these are the flag of a region

_PYTHON_UNICODE = 14  # what Python 3.11 knows; newer ones know more, and are to give the same names
# Unicode calls what is drawn in outline white and what is filled black (its "heavy black heart" is red), and
# names many symbols after how they are set in type.
_TYPE = {
    *("black", "white", "heavy", "negative", "squared", "circled", "latin", "katakana", "ideograph"),
    *("symbol", "sign", "ornament", "component"),
}
_JOKES = {"shit", "hankey", "harambe"}  # nobody would write these under a picture in earnest

_PERSON, _CHILD, _OLD, _CROWNED, _PREGNANT, _CLOCK = 0x1F9D1, 0x1F9D2, 0x1F9D3, 0x1FAC5, 0x1FAC4, 0x1F550
_HEART, _KISS_MARK, _HANDSHAKE = 0x2764, 0x1F48B, 0x1F91D
_VARIANTS = {  # code points -> what they have in common
    **dict.fromkeys((0x1F468, 0x1F469), (_PERSON,)),  # man, woman
    **dict.fromkeys((0x1F466, 0x1F467), (_CHILD,)),  # boy, girl
    **dict.fromkeys((0x1F474, 0x1F475), (_OLD,)),
    **dict.fromkeys((0x1F934, 0x1F478), (_CROWNED,)),  # prince, princess
    **dict.fromkeys((0x1F930, 0x1FAC3), (_PREGNANT,)),
    **dict.fromkeys((0x1F46B, 0x1F46C, 0x1F46D), (_PERSON, _HANDSHAKE)),  # two holding hands
    **dict.fromkeys(range(_CLOCK, _CLOCK + 24), (_CLOCK,)),
    0x1F46A: (_PERSON, _CHILD),  # family
    0x1F491: (_PERSON, _HEART),  # couple with heart
    0x1F48F: (_PERSON, _HEART, _KISS_MARK),  # kiss
}


def key_of(codes: Iterable[int]) -> Key:
    """Code points as a key: the variation selector, which only asks for colour, is left out."""
    return tuple(code for code in codes if code != _VARIATION)


def family(key: Key) -> str:
    """One text for emoji that differ only by gender, direction, the people in a family or the time of day.

    "man running", "woman running" and "person running facing right" are one family, as are all clock faces.
    """
    left_out = {_JOINER, _RIGHTWARDS, _FEMALE, _MALE} if len(key) > 1 else set()
    codes = [same for code in key if code not in left_out for same in _VARIANTS.get(code, (code,))]
    return "-".join(f"{code:X}" for code in dict.fromkeys(codes))  # each once: a family of two is one of four


def english_names() -> dict[Key, list[str]]:
    """All names of every emoji that has one, CLDR's first. A name belongs to one emoji only.

    What several emoji are called goes to the one that CLDR calls so, or else to none: the face of a cat is
    "cat face" and not "cat".
    """
    from emoji import EMOJI_DATA

    names: dict[Key, list[str]] = {}
    for text, data in EMOJI_DATA.items():
        key = key_of(map(ord, text))
        known = names.setdefault(key, [_words(data["en"])])
        known += map(_words, data.get("alias", ()))
        if len(key) == 1 and data["E"] <= _PYTHON_UNICODE:
            known.append(unicodedata.name(text[0]).lower())
    for key, (first, *others) in names.items():
        if key[0] in _REGIONAL or key[-1] in _TAGS:  # CLDR says "flag: Norway"; the package kept "Norway"
            others = [text for text in others if text.startswith("flag for ")]
            first = f"flag for {first}"
        names[key] = _distinct([first, *(text for text in others if _is_fit(text, first))])
    firsts = {_letters(first) for first, *_ in names.values()}
    claims = Counter(_letters(text) for _, *others in names.values() for text in others)
    return {
        key: [first, *(t for t in others if claims[_letters(t)] == 1 and _letters(t) not in firsts)]
        for key, (first, *others) in names.items()
    }


def _words(name: str) -> str:
    """ ":red_heart:" -> "red heart"."""
    return name.strip(":").replace("_", " ").strip()


def _is_fit(text: str, first: str) -> bool:
    """Whether an alias is a name that somebody would write: no "cat2", "+1", "tm", "squared cl"."""
    words = set(re.split(r"\W+", text.lower()))
    return (
        len(text) > 2
        and not re.search(r"\d", text)
        and not words & _JOKES
        and not (words & _TYPE) - set(re.split(r"\W+", first.lower()))
    )


def _distinct(texts: Iterable[str]) -> list[str]:
    """Texts without those that differ from an earlier one by spaces, case, accents or punctuation only."""
    seen: dict[str, str] = {}
    for text in texts:
        seen.setdefault(_letters(text), text)
    return list(seen.values())


def _letters(text: str) -> str:
    """Letters and digits only, lower case, no accents: "T-shirt" and "t shirt" are one name."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.sub(r"[^a-z0-9#*]", "", plain)
