"""Which rewards there are: shipped files, plugins, installed packages and dotted paths, in one namespace."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from pathlib import Path
from types import ModuleType

from grpo_lab.bundled import rewards_folder
from grpo_lab.errors import RecipeError
from grpo_lab.recipe import did_you_mean
from grpo_lab.scoring.mark import Reward, is_marked, read_reward

ENTRY_POINTS = "grpo_lab.rewards"


@dataclass(frozen=True)
class Source:
    """Where a reward is, and how to read it: a shipped file is only run when its reward is asked for."""

    shown: str
    read: Callable[[], Reward]


class Registry:
    """Rewards by name. What was read once is kept."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._read = {name: cache(source.read) for name, source in sources.items()}
        self._read_dotted = cache(_read_dotted)

    def names(self) -> list[str]:
        """All names, sorted. A dotted path is found by `get` only."""
        return sorted(self._read)

    def get(self, name: str) -> Reward:
        """The reward of that name; a name with a dot is imported.

        Raises:
            RecipeError: there is none, or its source cannot be used.
        """
        if name in self._read:
            return self._read[name]()
        if "." in name:
            return self._read_dotted(name)
        raise RecipeError(f'unknown reward "{name}"{did_you_mean(name, self.names())}')


def discover(plugins: Sequence[str | Path] = (), *, shipped: Path | None = None) -> Registry:
    """Find all rewards: one per file of the shipped folder, the marked functions of the plugins (files, or folders of
    files; in a file that marks none, its functions over `completions`, as TRL has them), and what installed packages
    offer under the entry point group `grpo_lab.rewards`.

    Plugins are Python and are run here. A file of a plugin folder whose name starts with `_` is left alone.

    Raises:
        RecipeError: every plugin that cannot be used, and every name that stands twice.
    """
    found = _shipped(rewards_folder() if shipped is None else shipped)
    found += [(point.name, Source(point.value, partial(_read_entry_point, point))) for point in _entry_points()]
    problems: list[str] = []
    for plugin in plugins:
        try:
            found += [pair for file in _files(Path(plugin)) for pair in _plugin(file)]
        except RecipeError as error:
            problems += error.problems
    sources: dict[str, Source] = {}
    for name, source in found:
        if name in sources:
            problems.append(f'reward "{name}" stands twice: {sources[name].shown} and {source.shown}; rename one')
        sources[name] = source
    if problems:
        raise RecipeError(problems)
    return Registry(sources)


def _shipped(folder: Path) -> list[tuple[str, Source]]:
    return [
        (file.stem, Source(f"{folder.name}/{file.name}", partial(_read_shipped, file)))
        for file in sorted(folder.glob("*.py"))
        if not file.name.startswith("_")
    ]


def _read_shipped(file: Path) -> Reward:
    """The function that has the file's name."""
    function = _marked(_run_file(file)).get(file.stem)
    if function is None:
        raise RecipeError(f"{file}: has no function {file.stem} marked with @reward")
    return read_reward(function, name=file.stem, source=f"{file.parent.name}/{file.name}", version=_version("grpo-lab"))


def _files(plugin: Path) -> list[Path]:
    if not plugin.exists():
        raise RecipeError(f"plugins: no file or folder {plugin}")
    if plugin.is_file():
        return [plugin]
    files = [file for file in sorted(plugin.glob("*.py")) if not file.name.startswith("_")]
    if not files:
        raise RecipeError(f"plugins: no Python files in {plugin}")
    return files


def _plugin(file: Path) -> list[tuple[str, Source]]:
    module = _run_file(file)
    functions = _marked(module) or _batched(module)
    if not functions:
        raise RecipeError(f"{file}: defines no reward; put @reward (from grpo_lab.scoring) above the function")
    rewards = [read_reward(function, name=name, source=str(file)) for name, function in functions.items()]
    return [(reward.name, Source(str(file), partial(_known, reward))) for reward in rewards]


def _known(reward: Reward) -> Reward:
    return reward


def _marked(module: ModuleType) -> dict[str, Callable[..., object]]:
    """The rewards that a file defines itself, not those it imports: functions and, by their variable, objects."""
    return {
        value.__name__ if inspect.isroutine(value) else name: value
        for name, value in vars(module).items()
        if is_marked(value) and value.__module__ == module.__name__
    }


def _batched(module: ModuleType) -> dict[str, Callable[..., object]]:
    """A file written for TRL marks nothing: its public functions and objects over `completions` are its rewards."""
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value)
        and not inspect.isclass(value)
        and getattr(value, "__module__", None) == module.__name__
        and not name.startswith("_")
        and "completions" in inspect.signature(value).parameters
    }


def _run_file(file: Path) -> ModuleType:
    """Run a Python file as a module under a private name; `sys.path` stays as it is."""
    path = file.resolve()
    name = f"_grpo_lab_rewards_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"plugins: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RecipeError(_cause(error, file)) from error
    return module


def _cause(error: BaseException, file: Path) -> str:
    """`file:line: what happened`, where the line is the file's own and not that of a library it calls."""
    if isinstance(error, SyntaxError):
        inside = error.filename == str(file.resolve())
        return f"{file if inside else error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file.resolve())]
    line = f":{frames[-1].lineno}" if frames else ""
    return f"{file}{line}: {type(error).__name__}: {error}"


def _entry_points() -> list[EntryPoint]:
    return sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)


def _read_entry_point(point: EntryPoint) -> Reward:
    try:
        function = point.load()
    except (Exception, SystemExit) as error:
        raise RecipeError(f'reward "{point.name}" ({point.value}): {type(error).__name__}: {error}') from error
    offered_by = _version(point.dist.name) if point.dist is not None else None
    return read_reward(function, name=point.name, source=point.value, version=offered_by)


def _read_dotted(name: str) -> Reward:
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise RecipeError(f'reward "{name}": {type(error).__name__}: {error}') from error
    try:
        function = getattr(module, attribute)
    except AttributeError as error:
        public = [each for each in dir(module) if not each.startswith("_")]
        raise RecipeError(
            f'reward "{name}": no "{attribute}" in {module_name}{did_you_mean(attribute, public)}'
        ) from error
    packages = packages_distributions().get(name.partition(".")[0], [])
    return read_reward(function, name=name, source=name, version=_version(packages[0]) if packages else None)


def _version(package: str) -> str:
    return f"{package} {version(package)}"
