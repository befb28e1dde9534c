"""The page of corrections names files and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "recipes" / "CORRECTIONS.md").read_text().splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if not row.startswith(("| the snippet", "|---"))]
NAMED = re.compile(r"`((?:grpo_lab|rewards|tests)/[\w/]+\.py)(?:::(\w+))?`")


def test_the_page_has_rows():
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:60])
def test_every_row_names_a_file_and_a_test_that_exist(row):
    found = NAMED.findall(row)
    assert any(not test for _, test in found), "no file is named"
    assert any(test for _, test in found), "no test is named"
    for file, test in found:
        assert (ROOT / file).is_file(), file
        if test:
            tree = ast.parse((ROOT / file).read_text())
            assert test in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], f"{file}::{test}"
