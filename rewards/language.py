"""A penalty for answering in another language."""

import re
import unicodedata
from collections import Counter
from functools import cache
from typing import Any, Literal

from grpo_lab.scoring import reward
from grpo_lab.types import Completion

_RUN = re.compile(r"[^\W\d_]+")
# The scripts of languages that are not written in Latin letters, as Unicode names its characters.
_SCRIPTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("ru", "uk", "be", "bg", "mk", "kk", "ky", "mn", "tg"), frozenset({"CYRILLIC"})),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ug"), frozenset({"ARABIC"})),
    **dict.fromkeys(("hi", "mr", "ne"), frozenset({"DEVANAGARI"})),
    **dict.fromkeys(("he", "yi"), frozenset({"HEBREW"})),
    "el": frozenset({"GREEK"}),
    "zh": frozenset({"CJK"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
    "ko": frozenset({"HANGUL"}),
    "th": frozenset({"THAI"}),
    "ka": frozenset({"GEORGIAN"}),
    "hy": frozenset({"ARMENIAN"}),
    "am": frozenset({"ETHIOPIC"}),
    **{
        code: frozenset({name})
        for code, name in (("bn", "BENGALI"), ("ta", "TAMIL"), ("te", "TELUGU"), ("gu", "GUJARATI"))
    },
    **{
        code: frozenset({name})
        for code, name in (("kn", "KANNADA"), ("ml", "MALAYALAM"), ("pa", "GURMUKHI"), ("km", "KHMER"))
    },
}
_WITHOUT_SPACES = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "KHMER"})
_LATIN = re.compile(
    "af|az|br|bs|ca|cs|cy|da|de|en|eo|es|et|eu|fi|fr|ga|gl|hr|ht|hu|id|is|it|la|lt|lv|mg|ms|mt|nl|no|oc|pl|pt|ro|rw|sk|"
    "sl|sq|sv|sw|tl|tr|uz|vi|wa|xh|zu"
)
_SENTENCE = re.compile(r"[^.!?。！？\n]+(?:[.!?。！？\n]+|$)")
_SHORTEST = 20  # letters: less says too little to tell French from Spanish


@reward(range=(-1.0, 0.0))
def language(
    completion: Completion,
    *,
    language: str = "en",
    by: Literal["script", "model"] = "script",
) -> float:
    """Minus the share of letters that are not in the language: 0 for a consistent completion, -1 for another language.

    "script" compares alphabets: quick, certain and without a dependency, but blind between languages that share one
    (English and French). Digits, signs and lone letters (x, π) belong to no language. "model" has py3langid name the
    language of every sentence (`pip install "grpo-lab[metrics]"`), short ones together until they have 20 letters; of
    what remains only the script counts. Languages are ISO 639-1 codes. A completion without letters gets 0: it is a
    penalty to set beside a reward, and pays for nothing.

    Args:
        language: the language that is wanted, as an ISO 639-1 code.
        by: "script" compares alphabets, "model" has py3langid name the language of sentences.
    """
    expected = _SCRIPTS.get(language, frozenset({"LATIN"}) if _LATIN.fullmatch(language) else None)
    if expected is None:
        raise ValueError(f"language: unknown language {language!r}; use an ISO 639-1 code such as en, fr, zh")
    wrong = total = 0
    for piece in [completion.text] if by == "script" else _pieces(completion.text):
        scripts = _letters(piece)
        size = scripts.total()
        total += size
        foreign = sum(count for script, count in scripts.items() if script not in expected)
        if by == "model" and size >= _SHORTEST and 2 * foreign < size and _model().classify(piece)[0] != language:
            foreign = size
        wrong += foreign
    return -wrong / total if total else 0.0


def _pieces(text: str) -> list[str]:
    """Sentences; short ones are read together with those that follow."""
    pieces, open_piece, size = [], "", 0
    for sentence in _SENTENCE.findall(text):
        open_piece += sentence
        size += _letters(sentence).total()
        if size >= _SHORTEST:
            pieces.append(open_piece)
            open_piece, size = "", 0
    return [*pieces, open_piece]


def _letters(text: str) -> Counter[str]:
    """Letters by script; a lone letter is a symbol, except where words are not told apart by spaces."""
    found: Counter[str] = Counter()
    for run in _RUN.findall(text):
        scripts = [_script(char) for char in run]
        found.update(script for script in scripts if len(run) > 1 or script in _WITHOUT_SPACES)
    return found


@cache
def _script(char: str) -> str:
    name = unicodedata.name(unicodedata.normalize("NFKC", char)[0], "UNKNOWN")
    return name.removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split(" ")[0]


@cache
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError('language with by: model needs py3langid: pip install "grpo-lab[metrics]"') from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)
