"""What a reward is: a marked function, and what its parameters say about it."""

import asyncio
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    overload,
    runtime_checkable,
)

from grpo_lab.errors import RecipeError, RewardError

Scope = Literal["completion", "group", "completions"]
Function = TypeVar("Function", bound=Callable[..., Any])

SCOPES: tuple[Scope, ...] = ("completion", "group", "completions")
BATCH_PARAMETERS = ("prompts", "completions", "completion_ids")
# What TRL's trainer passes beside columns, and what of it is not to be had here, so that a function must do without.
TRL_EXTRAS = ("trainer_state", "log_extra", "log_metric")
TRL_ONLY = ("environments",)
_MARK = "grpo_lab_reward"
_CHECK = "grpo_lab_check"


@overload
def reward(function: Function) -> Function: ...
@overload
def reward(
    *,
    range: tuple[float | int, float | int] | None = None,  # noqa: A002 - reads well as a mark
    waits: bool = False,
) -> Callable[[Function], Function]: ...
def reward(
    function: Any = None,
    *,
    range: tuple[float | int, float | int] | None = None,  # noqa: A002
    waits: bool = False,
) -> Any:
    """Mark a function as a reward, so that it is found in its file under its own name.

    `@reward(range=(0, 1))` also says which values it can return (infinite ends are allowed): `validate` then knows the
    range of the composed reward, and `rewards test` its maximum. An object with `__call__` is marked as it is made:
    `novelty = reward(Novelty())`, and found under the name that it is given there.

    Its parameters say the rest. `completion`, `group` or `completions` (one of them) is what it scores: one answer,
    all answers to one prompt, or all answers of a step (TRL's batched contract). In the first two scopes a
    keyword-only parameter without default is a column of the data set, one with a default is an option of the recipe,
    checked against its annotation. In the batched scope every other name is a column.

    `waits=True` is for what comes with grpo-lab and waits for others, a server or programs: `score_while_sampling` may then
    call it in a process of its own, where a user's reward always is.

    It returns a finite number, or None for "does not apply to this example" (a list of them for more than one
    completion). Exceptions, nan and wrong types are failures, which are counted and never scored as 0.
    """
    if function is None:
        return partial(reward, range=range, waits=waits)
    if inspect.isclass(function):
        raise TypeError(f"mark an object, not its class: {function.__name__.lower()} = reward({function.__name__}())")
    if range is not None and not range[0] < range[1]:
        raise ValueError(f"range should be (lowest, highest), got {range}")
    function.__dict__[_MARK] = {
        "range": None if range is None else (float(range[0]), float(range[1])),
        "waits": waits,
    }
    return function


def checked_by(check: Callable[..., str]) -> Callable[[Function], Function]:
    """Have `check(**options)` called before anything is scored, with the recipe's options and the defaults of others.

    It returns what a person should know of the reward at the start of a stage (or an empty text), and raises RecipeError
    for options that do not go together, SetupError for what the machine lacks.
    """

    def mark(function: Function) -> Function:
        function.__dict__[_CHECK] = check
        return function

    return mark


def is_marked(function: object) -> bool:
    """Whether `@reward` stands above the function, or `reward(...)` around the object."""
    return not inspect.isclass(function) and _MARK in getattr(function, "__dict__", {})


@runtime_checkable
class Stateful(Protocol):
    """A reward whose state a checkpoint keeps, as JSON values (tuples come back as lists, keys as text)."""

    def state_dict(self) -> Any:
        """What it needs to go on later as if nothing had happened."""

    def load_state_dict(self, state: Any) -> None:
        """Go on from a state that `state_dict` gave."""


def plain_state(function: Any, label: str) -> Any:
    """The state of a stateful reward, None of another.

    Raises:
        RewardError: it is no JSON, or there is none to be had.
    """
    if not isinstance(function, Stateful):
        return None
    try:
        state = function.state_dict()
        json.dumps(state, allow_nan=False)
    except Exception as error:  # user code
        message = f'reward "{label}": state_dict() must give JSON values: {type(error).__name__}: {error}'
        raise RewardError(message) from error
    return state


class Option(NamedTuple):
    """What a recipe may set: its type (`Parameter.empty` = any) and its default."""

    annotation: Any
    default: Any


@dataclass(frozen=True)
class Reward:
    """A reward function and what was read off its parameters.

    `columns` are the data set columns it cannot do without. A batched reward receives what it has `named`, as far as
    it is there, and all columns if it `takes_all_columns` (`**kwargs`). `source` is its file or dotted name as the
    user knows it, `path` and `sha256` are those of the file it is defined in.
    """

    name: str
    function: Callable[..., Any] = field(repr=False)
    scope: Scope
    columns: tuple[str, ...]
    options: Mapping[str, Option]
    doc: str
    source: str
    path: Path
    sha256: str
    named: frozenset[str] = frozenset()
    takes_all_columns: bool = False
    check: Callable[..., str] | None = field(default=None, repr=False)
    range: tuple[float, float] | None = None
    waits: bool = False
    version: str = ""

    @property
    def may_keep_state(self) -> bool:
        """Whether it is an object and no plain function. Functions are taken to keep nothing between calls."""
        return not inspect.isroutine(self.function)

    def describe(self) -> dict[str, Any]:
        """What `grpo-lab rewards ls` shows; plain values only."""
        return {
            "name": self.name,
            "scope": self.scope,
            "options": {
                name: {"type": _type_name(option.annotation), "default": option.default, "doc": self._about(name)}
                for name, option in self.options.items()
            },
            "columns": list(self.columns),
            "doc": self.doc,
            "manual": (inspect.getdoc(self.function) or "").partition("\n\nArgs:")[0],
            "range": None if self.range is None else [end if math.isfinite(end) else None for end in self.range],
            "state": (isinstance(self.function, Stateful) and "kept") or ("lost" if self.may_keep_state else "none"),
            "source": self.source,
            "version": self.version,
            "sha256": self.sha256,
        }

    def _about(self, option: str) -> str:
        """What the docstring says about an option: its line under `Args:`, else the sentences that quote its name."""
        text = inspect.getdoc(self.function) or ""
        line = re.search(rf"^ +{option}(?: \(.*?\))?: (.+(?:\n {{5,}}.+)*)", text, re.MULTILINE)
        if line:
            return " ".join(line[1].split())
        sentences = re.split(r"(?<=[.!?:])\s+(?=[A-Z\"<`])", " ".join(text.split()))
        return " ".join(each for each in sentences if re.search(rf"`{option}\b", each))


def read_reward(function: Any, *, name: str, source: str, version: str | None = None) -> Reward:
    """Read a function's scope, columns and options off its signature; without a `version` its file's hash is one.

    Raises:
        RecipeError: the signature does not follow the contract.
    """
    place = f'reward "{name}" ({source})'
    try:
        parameters = inspect.signature(function).parameters
        path = Path(inspect.getsourcefile(inspect.unwrap(_defined(function))) or "")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (TypeError, ValueError, OSError) as error:
        raise RecipeError(f"{place}: is not a Python function with a source file: {error}") from error
    scope = _scope(parameters, place)
    batched = scope == "completions"
    columns, options = (_batched(parameters, place), {}) if batched else _single(function, scope, place)
    if not batched and inspect.iscoroutinefunction(function):
        raise RecipeError(f'{place}: is async; only a reward over "completions" can be')
    marked = getattr(function, "__dict__", {}).get(_MARK, {})
    return Reward(
        name=name,
        function=function,
        scope=scope,
        columns=columns,
        options=options,
        doc=(inspect.getdoc(function) or "").split("\n", 1)[0],
        source=source,
        path=path,
        sha256=digest,
        named=frozenset(parameters),
        check=vars(function).get(_CHECK) if inspect.isfunction(function) else None,
        takes_all_columns=batched and any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values()),
        range=marked.get("range"),
        waits=marked.get("waits", False),
        version=version or digest[:12],
    )


def invoke(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a reward function; an async one is run to its end."""
    result = function(**arguments)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _defined(function: Callable[..., Any]) -> Any:
    """What has a source file: the function itself, or the class of a callable object."""
    return function if inspect.isroutine(function) else type(function)


def _scope(parameters: Mapping[str, Parameter], place: str) -> Scope:
    found: list[Scope] = [scope for scope in SCOPES if scope in parameters]
    if not found and any(name in parameters for name in BATCH_PARAMETERS):
        return "completions"
    if len(found) != 1:
        what = f"takes {' and '.join(found)}" if found else "takes none of completion, group, completions"
        raise RecipeError(f"{place}: {what}; name exactly one parameter after what it scores")
    return found[0]


def _single(function: Callable[..., Any], scope: Scope, place: str) -> tuple[tuple[str, ...], dict[str, Option]]:
    """Columns and options of a reward over one completion or one group."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except NameError as error:
        raise RecipeError(f"{place}: an annotation cannot be read: {error}") from error
    others = [each for each in parameters.values() if each.name != scope]
    for each in others:
        if each.kind is not Parameter.KEYWORD_ONLY:
            raise RecipeError(f'{place}: "{each}" must be keyword-only: put a * after {scope}')
    columns = tuple(each.name for each in others if each.default is Parameter.empty)
    options = {each.name: Option(each.annotation, each.default) for each in others if each.name not in columns}
    return columns, options


def _batched(parameters: Mapping[str, Parameter], place: str) -> tuple[str, ...]:
    """The columns that a reward under TRL's contract cannot do without; it has no options."""
    variadic = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    required = tuple(
        each.name
        for each in parameters.values()
        if each.default is Parameter.empty and each.kind not in variadic and each.name not in BATCH_PARAMETERS
    )
    for name in required:
        if name in TRL_ONLY:
            raise RecipeError(f'{place}: needs "{name}", which only TRL\'s trainer has; give it a default')
    return tuple(name for name in required if name not in TRL_EXTRAS)


def _type_name(annotation: Any) -> str:
    if annotation is Parameter.empty:
        return "any"
    if get_origin(annotation) is Annotated:  # its extra checks have no name worth showing
        annotation = get_args(annotation)[0]
    return inspect.formatannotation(annotation).replace("typing.", "")
