"""A first file for a reward of one's own, with cases beside it, both ready to be changed."""

import keyword
from pathlib import Path

from grpo_lab.bench.cases import cases_beside
from grpo_lab.bundled import rewards_folder
from grpo_lab.errors import UsageError

CODE = '''"""What this file rewards, in one line."""

from grpo_lab.scoring import reward
from grpo_lab.text import last_number
from grpo_lab.types import Completion


@reward(range=(0, 1))
def {name}(completion: Completion, *, answer: str, partial: float = 0.2) -> float | None:
    """1 if the last number is the answer, `partial` if there is a number at all, else 0; None without an answer.

    Parameters after the * without a default are columns of the data set (answer), those with one are options of the
    recipe (partial). Return None where the reward does not apply. Raise if something is wrong: a failure is counted, never
    scored as 0. completion.text is the answer, completion.token_ids its tokens, completion.finished whether it ended by
    itself.
    """
    if answer == "":
        return None
    found = last_number(completion.text)
    if found is None:
        return 0.0
    return 1.0 if found == answer else partial
'''

# Each line: what was answered, in which row, and what it must be worth. Add the answers that you are afraid of.
CASES = """\
{"completion": "6 * 7 = 42", "columns": {"answer": "42"}, "expected": 1.0, "why": "right"}
{"completion": "6 * 7 = 43", "columns": {"answer": "42"}, "expected": 0.2, "why": "wrong, but a number"}
{"completion": "I do not know", "columns": {"answer": "42"}, "expected": 0.0, "why": "no number"}
{"completion": "", "columns": {"answer": "42"}, "expected": 0.0, "why": "an empty answer"}
{"completion": "42 or 43", "columns": {"answer": "42"}, "expected": 0.2, "why": "several guesses: only the last counts"}
{"completion": "42", "columns": {"answer": ""}, "expected": null, "why": "a row without an answer: the reward abstains"}
"""


def write_starter(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `NAME.py` and `NAME.cases.jsonl`; nothing that exists is touched.

    Raises:
        UsageError: the name cannot be a function's or is a shipped reward's, a file exists, or the folder does not.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f'"{name}" cannot be the name of a Python function; use letters, digits and _')
    if (rewards_folder() / f"{name}.py").exists():
        raise UsageError(f'"{name}" is the name of a shipped reward; choose another')
    file = folder / f"{name}.py"
    cases = cases_beside(str(file))
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    for path in (file, cases):
        if path.exists():
            raise UsageError(f"{path}: exists already; choose another name")
    for path, text in ((file, CODE.replace("{name}", name)), (cases, CASES)):
        with path.open("x", encoding="utf-8") as new:
            new.write(text)
    return file, cases
