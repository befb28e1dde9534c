"""Whether a program that the model wrote passes hidden tests, run in a sandbox."""

import re

from grpo_lab.errors import RecipeError
from grpo_lab.sandbox import Isolation, Limits, Task, isolation, judge, require
from grpo_lab.scoring import checked_by, reward
from grpo_lab.types import Group

_FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def _permitted(*, allow_code_execution: bool, minimum_isolation: Isolation, **_: object) -> str:
    if not allow_code_execution:
        raise RecipeError("runs programs that the model wrote; say so with options: {allow_code_execution: true}")
    require(minimum_isolation)
    return f"runs programs that the model wrote; their isolation: {isolation()[0]}"


@reward(range=(0.0, 1.0), waits=True)
@checked_by(_permitted)
def code(
    group: Group,
    *,
    test: str,
    entry_point: str,
    setup: str = "",
    allow_code_execution: bool = False,
    minimum_isolation: Isolation = "full",
    cpu_seconds: int = 5,
    memory_mib: int = 512,
) -> list[float]:
    """1.0 if the answer's program passes the column `test`, which calls its function `entry_point`, else 0.0.

    The program is the last block fenced with ``` that the answer holds, or else all of it. `setup` names a column with
    code that goes before it, and before the tests (HumanEval: prompt): imports, helpers, or the function's head, which
    an answer then continues or defines anew. `test` is Python with asserts, or defines `check(candidate)`.

    The program sees the arguments of the tests' calls and nothing else of them, and its answers count as plain values
    (numbers, text, lists, dicts, sets): what it changes in its arguments is not seen. It may take `cpu_seconds` and
    `memory_mib` for all tests together. Nothing runs unless `allow_code_execution`, nor with less isolation than
    `minimum_isolation` (full, no-network, limits-only, none).
    """
    _permitted(allow_code_execution=allow_code_execution, minimum_isolation=minimum_isolation)
    before = str(group.example.columns[setup]) if setup else ""
    tasks = [Task(_program(before, each.text), entry_point, test, before) for each in group.completions]
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=4.0 * cpu_seconds, memory_mib=memory_mib)
    return [float(verdict.passed) for verdict in judge(tasks, limits, minimum=minimum_isolation)]


def _program(before: str, text: str) -> str:
    blocks = _FENCED.findall(text)
    return f"{before}{'' if before.endswith(chr(10)) or not before else chr(10)}{blocks[-1] if blocks else text}"
