"""A data set's own split, where it comes without one: seeded, stratified, and with what belongs together kept together."""

from collections.abc import Iterable, Mapping
from random import Random
from typing import Any

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Partition
from grpo_lab.seeds import derive_seed


def part(rows: Iterable[Mapping[str, Any]], partition: Partition) -> list[int]:
    """The numbers of the rows in the part that `partition.take` names, in the rows' order.

    Groups (single rows without `group`) are shuffled within each value of `stratify`; the first go to the test part,
    the next to validation. A group is counted under its first row's value.

    >>> rows = [{"label": "ab"[number % 2]} for number in range(20)]
    >>> [rows[place]["label"] for place in part(rows, Partition(take="test", test=0.2, stratify="label"))].count("a")
    2
    """
    groups: dict[str, list[int]] = {}
    strata: dict[str, list[str]] = {}
    for place, row in enumerate(rows):
        group = str(place) if partition.group is None else str(_value(row, partition.group, "group"))
        if group not in groups:
            value = "" if partition.stratify is None else str(_value(row, partition.stratify, "stratify"))
            strata.setdefault(value, []).append(group)
        groups.setdefault(group, []).append(place)
    chosen: list[str] = []
    for value, names in sorted(strata.items()):
        order = Random(derive_seed(partition.seed, "partition", value)).sample(names, len(names))
        test = round(partition.test * len(order))
        validation = test + round(partition.validation * len(order))
        parts = {"test": order[:test], "validation": order[test:validation], "train": order[validation:]}
        chosen += parts[partition.take]
    return sorted(place for group in chosen for place in groups[group])


def _value(row: Mapping[str, Any], column: str, key: str) -> Any:
    if column not in row:
        raise RecipeError(f'data.partition.{key}: column "{column}" is not in the data; it has: {", ".join(row)}')
    return row[column]
