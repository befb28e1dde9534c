"""What a reasoning-gym data set's own scorer says."""

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from grpo_lab.scoring import reward
from grpo_lab.text import extract as extracted
from grpo_lab.text_metrics import missing_package
from grpo_lab.types import Completion

# In 0.1.25 the scorers of these sets, searched for eval and its like, run no text as a program; tried on hostile answers
# they end at once. A set that a later version adds is refused until someone has looked.
_SAFE = """
ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation
caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio color_cube_rotation
complex_arithmetic count_bits count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice
emoji_mystery family_relationships figlet_font fraction_simplification futoshiki game_of_life gcd group_anagrams
gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm leg_counting
letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid
needle_haystack number_filtering number_format number_sequence palindrome_generation palindrome_partitioning
path_star polynomial_equations pool_matrix power_function prime_factorization products quantum_lock ransom_note
rearc rectangle_count rotate_matrix rotten_oranges self_reference sentence_reordering shortest_path
simple_equations simple_geometry sokoban spell_backward string_manipulation string_splitting string_synthesis
sudoku survo syllogism time_intervals tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting
zebra_puzzles
"""
SAFE = frozenset(_SAFE.split())
_EXECUTES = "its scorer executes what the model writes"
_EXECUTES_DATA = "its scorer executes what stands in the data, which may come from a file"
_ITSELF = "its scorer does not give its own answers 1"
REFUSED = {
    "countdown": _EXECUTES,
    "puzzle24": _EXECUTES,
    "simple_integration": _EXECUTES,
    "intermediate_integration": _EXECUTES,
    "polynomial_multiplication": _EXECUTES,
    "string_insertion": _EXECUTES,
    "spiral_matrix": _EXECUTES,
    "binary_matrix": _EXECUTES,
    "n_queens": _EXECUTES,
    "composite": "it may hold sets whose scorers execute what the model writes; name the sets one by one",
    "number_sorting": _EXECUTES_DATA,
    "bitwise_arithmetic": _EXECUTES_DATA,
    "coin_flip": "its scorer hangs on 1e999999999",
    "game_of_life_halting": "its scorer takes any text for an answer",
    "boxnet": _ITSELF,
    "graph_color": _ITSELF,
    "propositional_logic": _ITSELF,
    "rubiks_cube": _ITSELF,
    "rush_hour": _ITSELF,
}
_NO_NUMBER = re.compile(r"\b(?:nan|inf|infinity)\b", re.IGNORECASE)
# What scorers raise on answers in another form than theirs, such as words where they expect numbers.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, AssertionError)


@reward
def reasoning_gym(
    completion: Completion,
    *,
    answer: str,
    metadata: dict[str, Any],
    exact: bool = True,
    config: dict[str, Any] | None = None,
    extract: Literal["none", "xml", "hash", "boxed"] = "xml",
) -> float:
    r"""The score that a reasoning-gym data set gives the answer: 1.0 or 0.0, or from 0 to 1 with `exact: false`.

    For rows of `source: reasoning_gym`; the column `metadata` says which set. `config` repeats `data.options` where a
    scorer depends on them. The answer stands in <answer> tags ("xml"), after `####` ("hash"), in \boxed{} or is all of
    the completion ("none").

    Partial credit is the set's own and can be gamed: many sets pay for any text (0.01), or for the right answer among
    others (its share of the text). So `exact` is on: 1.0 only where the scorer says 1. An answer that is longer than
    four times the right one and 64 characters, says nan, or is in a form that the scorer cannot read scores 0.

    Sets whose scorers execute text, hang, or cannot be trusted otherwise are refused with the reason; the list
    is at the top of this file.

    Args:
        extract: "none" the whole completion, "xml" in <answer> tags, "hash" after `####`, "boxed" in \boxed{}; the last such place.
    """
    name = metadata.get("source_dataset")
    if name not in SAFE:
        raise ValueError(
            f'reasoning-gym\'s "{name}" is refused: {REFUSED.get(str(name), "nobody has read its scorer yet")}'
        )
    scorer = _scorer(name, tuple(sorted((config or {}).items())))
    text = extracted(completion.text, extract)
    if text is None or len(text) > 4 * len(answer) + 64 or (_NO_NUMBER.search(text) and not _NO_NUMBER.search(answer)):
        return 0.0
    try:
        score = _scored(scorer, text, answer, metadata)
    except _MALFORMED:
        score = 0.0
    # only now: a scorer that fails on its own answer says nothing about the model's
    if score < 1 and _scored(scorer, answer, answer, metadata) < 1:
        raise ValueError(f'the scorer of reasoning-gym\'s "{name}" does not give 1 to its own answer {answer!r:.80}')
    return float(score >= 1) if exact else min(1.0, max(0.0, score))


def _scored(scorer: Callable[..., float], text: str, answer: str, metadata: dict[str, Any]) -> float:
    return float(scorer(text, {"answer": answer, "metadata": copy.deepcopy(metadata)}))


@lru_cache(maxsize=256)
def _scorer(name: str, config: tuple[tuple[str, Any], ...]) -> Callable[..., float]:
    """The score function of a set with its configuration; the set's problems are not made."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise missing_package("reasoning_gym", "gym", error) from error
    kind, settings = DATASETS[name]
    known = {field.name for field in dataclasses.fields(settings)}
    unknown = [key for key, _ in config if key not in known]
    if unknown:
        raise ValueError(f'config: reasoning-gym\'s "{name}" has no option "{unknown[0]}"')
    scorer: Callable[..., float] = kind(settings(**dict(config))).score_answer
    return scorer
