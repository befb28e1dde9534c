"""A recipe written out in full, and what differs between two recipes."""

import json
import re
from typing import Any

import yaml

from grpo_lab.recipe.schema import Recipe
from grpo_lab.recipe.yaml_loader import Loc, format_loc, resolve_scalar


class _Dumper(yaml.SafeDumper):
    """Writes what our loader reads back: no aliases, and quotes where the text would be read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Yaml reads all of these as the end of a line, and would turn them into "\n" unless they are escaped.
_OTHER_LINE_ENDS = re.compile("[\r\x85\u2028\u2029]")


def _write_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None
    if _OTHER_LINE_ENDS.search(text) or not _reads_as_itself(text):
        style = '"'
    elif "\n" in text:
        style = "|"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _reads_as_itself(text: str) -> bool:
    try:
        return resolve_scalar(text) == text
    except OverflowError:
        return False


_Dumper.add_representer(str, _write_text)


def resolved_yaml(recipe: Recipe) -> str:
    """Every value written out as yaml; loading it gives an equal recipe, from any folder."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def difference(old: Recipe, new: Recipe) -> list[str]:
    """What changed, one line each: `stages.grpo.algorithm.beta: 0.04 -> 0.1`. Empty when nothing did."""
    lines = _differences(old.model_dump(mode="json"), new.model_dump(mode="json"), ())
    if sorted(old.stages) == sorted(new.stages) and list(old.stages) != list(new.stages):
        lines.append(f"stages: order {', '.join(old.stages)} -> {', '.join(new.stages)}")
    return lines


_ABSENT = object()


def _differences(old: Any, new: Any, loc: Loc) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list):
        pairs = [
            (index, dict(enumerate(old)).get(index, _ABSENT), dict(enumerate(new)).get(index, _ABSENT))
            for index in range(max(len(old), len(new)))
        ]
    else:
        return [] if old == new else [f"{format_loc(loc)}: {_shown(old)} -> {_shown(new)}"]
    return [line for key, before, after in pairs for line in _differences(before, after, (*loc, key))]


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
