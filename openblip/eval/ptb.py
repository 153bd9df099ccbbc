"""The Penn Treebank tokenizer of the COCO caption evaluation, without Java.

Caption metrics are defined on the tokens of Stanford's PTBTokenizer 3.4.1 (`-preserveLines -lowerCase`) less
a list of punctuation. This file gives the same tokens. It was written from the outside, by asking the Java
program what it does with hundreds of thousands of short strings; `tests/eval/test_ptb.py` holds some of its
answers.
"""

import re

# Tokens the COCO evaluation throws away. Its list also has brackets in capitals, which never occur in
# lower-cased text: "-lrb-" and "-rrb-" stay and are counted as words, in every published figure.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# How a token is written, if not in lower case. Which quote, dash or dots does not matter: all are dropped.
_WRITTEN = {
    **{"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
    **{"€": "$", "\x80": "$", "\u20a0": "$", "¤": "$", "£": "#", "¢": "cents"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">"},
    **dict.fromkeys([*'"‘‛’“”«»‹›\x91\x92\x93\x94', "&quot;", "&apos;", "‘‘", "’’"], "'"),
    **dict.fromkeys([*"–—―\x96\x97", "---", "----", "&mdash;", "&ndash;"], "--"),
    **dict.fromkeys(["…", "....", ".....", ". . .", ". . . ."], "..."),
}

# Bricks. Letters are those of the Basic Multilingual Plane with their combining marks; superscripts,
# fractions and circled numbers are no letters.
_NOT = "_²³¹¼-¾⁰⁴-⁹₀-₉\u2150-\u2189①-⓿❶-➓〇〡-〩㈀-㋿\U00010000-\U0010ffff"
_MARKS = "\u0300-\u036f\u0591-\u05c2\u064b-\u065e\u0900-\u0903\u093c-\u094d\u0981-\u0bcd\u0e31-\u0e4e"
_L = rf"(?:[^\W\d{_NOT}]|[{_MARKS}])"  # a letter
_N = rf"(?:[^\W{_NOT}]|[{_MARKS}])"  # a letter or a digit
_WORD = rf"{_L}{_N}*(?:[.!?]{_L}{_N}*)*"
_COMPOUND = rf"{_N}(?:{_N}|[.,])*(?:[-‐‑]{_N}+)+"
_A = "(?:['’\x92]|&apos;)"  # the apostrophe of 's
_Q = "(?:['’‘‛`\x91\x92]|&apos;)"  # the apostrophe of n't and o'clock, misspellings included
_NET = r"[^\s\"<>|(){}]"  # anything in an address; bounds on its parts keep long strings from taking for ever
_HOST = r"[^\s\"<>|(){}.]{1,63}"  # between its dots
_LABEL = r"[^\s\"<>|.!?(){},\-\d_/$:;='`^\\\[\]@]{1,63}"  # between the dots of an address without https
_PATH = rf"{_NET}{{0,999}}[^\s\"<>|(){{}}.,!?-]"
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s<>\"']+)"  # of an attribute in a tag
_EYES, _CHEEK = "[<>]?[:;=][-o']?", "[-^=~<>x']"

# Abbreviations that keep their full stop, in any capitals: titles and the like ...
_TITLES = """
    adj adm adv alex assoc asst attys? ave brig capt cf cie cmdr col comdr cpl dept det drs? elec ens ft gen
    govs? hon insp invt jos lieut lt maj messrs mlle mme mrs? ms msgr mt natl pfc pres profs? pvt reps? rev
    sens? sfc sgt spc ste? supts? treas vs wm
"""
# ... those that may end a sentence ...
_ENDINGS = """
    ala? apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb fla
    fri ga inc ind intl jan jr jul jun kans? ky ltd mar md mich minn mon? mont neb nev nov oct okla penn plc
    rd rt sept? seq sq sr sys tel tenn thu thurs tues? univ va vt wed wisc? wyo
"""
# ... those that must begin with a capital, and those that must stand before a number.
_STATES = "ark az del ill la mass miss ore pa tex wash"
_NUMBERED = "art ca figs? nos? op pp prop"
# Words that begin a sentence: "plan b. The" ends in "b", while "b. Smith" begins with "b."
_STARTERS = """
    a about according additionally after an as at but earlier he her here however if in it last many more
    now once one other our she since so some such that the their then there these they this we what when
    while yet you
"""
_FILES = """
    bat bmp c cgi cpp dll docx? exe gif gz h html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql tar
    txt wav x xml zip
"""


def _any(words: str) -> str:
    return "(?i:" + "|".join(words.split()) + ")"


# (token, what must stand behind it). The longest match, with what stands behind, wins; of equals the first.
_RULES = tuple(
    re.compile(rf"({token}){behind}")
    for token, behind in [
        # words, words in two, contractions
        (_any("can"), _any("not")),
        (_any("gon wan"), _any("na")),
        (_any("got"), _any("ta")),
        (_any("lem gim"), _any("me")),
        (_any("'t"), _any("is was")),
        (_WORD, ""),
        (_WORD, rf"(?i:{_A}(?:[msd]|re|ve|ll))"),
        (rf"(?:{_L}{_N}*)?[A-MO-Za-mo-z]", rf"(?i:n{_Q}t)"),
        (rf"(?i:n{_Q}t)", ""),
        (r"(?i:'(?:[msd]|re|ve|ll))", r"(?:[\W\d_]|$)"),
        (r"(?i:(?:[’\x92]|&apos;)(?:[msd]|re|ve|ll))", ""),
        # words with an apostrophe of their own
        (rf"(?i:{_A}(?:n{_A}?|em|till?|cause|[2-9]0s)|(?:[ldjy]|ol|dunkin|somethin){_A})", ""),
        (rf"(?i:c'mon|c{_A}est|qu{_A}il|s{_A}mores|cap{_A}n|ma{_Q}am|e{_Q}er|o{_Q}o)", ""),
        (rf"[A-HJ-XZn]{_Q}{_L}{{2,}}|{_L}+[aeiouyAEIOUY]{_Q}[aeiouA-Z]{_L}*", ""),
        (rf"(?:{_N}+[-_])*[dDlLoO]{_Q}{_N}{{2,}}(?:[-_]{_N}+)*", ""),
        (rf"{_A}\d\d(?=\s|$)", ""),
        ("'", rf"{_L}[^\s']"),
        # full stops that belong to a word
        (rf"{_any(_ENDINGS)}\.", r"[\s\S]{0,2}"),
        (rf"(?=[A-Z]){_any(_STATES)}\.", r"[\s\S]{0,2}"),
        (rf"{_any(_TITLES)}\.|[Pp]?[Pp]t[ey]s?\.|[Mm][ft]g\.|[Pp][Hh]\.[Dd]\.", ""),
        (rf"{_any(_NUMBERED)}\.", r"\s?\d"),
        (rf"[A-Za-z]\.(?!\s+(?=[A-Z]){_any(_STARTERS)}(?:\s|$))", ""),
        (rf"(?:{_N}+-)*[A-Za-z](?:\.[A-Za-z])+\.(?:-{_N}+)*", ""),
        (rf"(?:{_WORD}|{_COMPOUND}|{_N}+|[A-Z]+(?:[&+][A-Z]+)+)\.", "[,;:、]"),
        # compounds, numbers, dates
        (rf"(?:{_N}+|[A-Za-z]{{1,2}}\.)(?:[-‐‑_]{_N}+)*", ""),
        (_COMPOUND, ""),
        (r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", ""),
        (r"[-+]?(?:\d*(?:[.,:]\d+)+|\d+)", ""),
        (r"(?:\d{1,4}[- \xa0])?\d{1,4}/\d{1,4}", ""),
        (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", ""),
        (r"\(\d{3}\)[ \xa0]?\d{3}[- \xa0]\d{4}", ""),
        (r"[A-Z]+(?:(?:[&+]|&amp;)[A-Z]+)+|[A-Z]+\$|(?i:c\+\+|[cf]#)", ""),
        # names of the net, mark-up, faces
        (rf"{_N}+(?:\.{_N}+)*\.{_any(_FILES)}(?!{_N}|/)", ""),
        (rf"(?i:https?)://{_HOST}\.{_PATH}|www\.(?:[\w-]+\.)+[a-z]+", ""),
        (rf"(?:{_LABEL}\.)+{_any('com net org edu')}(?:/{_NET}{_PATH})?", ""),
        (rf"<?[A-Za-z0-9]{_NET}{{0,63}}@{_HOST}(?:\.{_HOST})*>?|@[A-Za-z_]\w*|#[A-Za-z]+", ""),
        (rf"</?[A-Za-z!?][\w:.-]*(?:\s+[\w:.-]+(?:={_VALUE})?)*\s*/?\s*>|<!--.*?-->", ""),
        (r"&(?i:amp|lt|gt|quot|apos|mdash|ndash);|&#\d+;", ""),
        (rf"(?:{_EYES}[DPpO@()\[\]|\\]|:3)(?!{_N})|\({_CHEEK}_?{_CHEEK}\)|{_CHEEK}_{_CHEEK}", ""),
        # the rest: runs that stay together, then the single characters the program knows
        (r"-+|\.{3,5}|\. \. \.(?: \.)?|[?!]+|\*+|#+|@+|_+|<<|>>|``|''|‘‘|’’|[²³¹⁰⁴-⁹]+|[₀-₉]+", ""),
        (r"[!-~¡-¿×÷\x80\x91-\x94\x96\x97–-‣…‰-⁂⁄₠€،؛؟।\u2100-\u215e\u2190-\u2bff、。〒・！-･]", ""),
    ]
)
# Most words, without trying every rule: those in plain lower case. And the full stop or comma between spaces.
_EASY = re.compile(r"\s*(?:(?!(?:cannot|gonna|wanna|gotta|lemme|gimme)\b)([a-z]+)|[.,])(?=\s|$)")


def tokenize(caption: str) -> list[str]:
    """Tokens of `caption` in lower case, without punctuation, as the COCO caption evaluation sees them.

    "It's a dog's (small) T-shirt." gives it 's a dog 's -lrb- small -rrb- t-shirt. What the Java program
    cannot tokenize (emoji among others) is dropped, as it does. A mixed number ("1 1/2") is one token with a
    no-break space inside. The program reads a whole corpus as one text; here no caption sees its neighbour.
    """
    tokens, at = [], 0
    caption = caption.replace("\xad", "")  # soft hyphens
    while at < len(caption):
        if easy := _EASY.match(caption, at):
            at = easy.end()
            if easy[1]:
                tokens.append(easy[1])
            continue
        best = max(filter(None, (rule.match(caption, at) for rule in _RULES)), key=re.Match.end, default=None)
        if best is None:  # white space, or a character the program does not know
            at += 1
            continue
        at = best.end(1)
        token = _written(best[1].lower())
        if token not in PUNCTUATION:
            tokens.append(token)
    return tokens


def _written(token: str) -> str:
    token = _WRITTEN.get(token, token).replace("(", "-lrb-").replace(")", "-rrb-")
    if contraction := re.fullmatch(rf"{_A}([msd]|re|ve|ll)", token):
        return "'" + contraction[1]
    if re.fullmatch(rf"n{_Q}t", token):
        return "n't" if re.search(_A, token) else "n`t"
    return re.sub(r"\s", "\xa0", token)  # within a tag or a number
