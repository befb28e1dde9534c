import sys

import pytest

from grpo_lab.errors import RecipeError
from grpo_lab.scoring import discover
from grpo_lab.types import Completion

SHORT = """
from grpo_lab.scoring import reward

@reward
def short(completion):
    return -float(len(completion.text))

def helper(completion):
    return 0.0
"""


@pytest.fixture
def shipped(tmp_path):
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "short.py").write_text(SHORT)
    return folder


@pytest.fixture
def plugin(tmp_path):
    def write(text, name="mine.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def problems_of(*plugins, shipped):
    with pytest.raises(RecipeError) as error:
        discover(plugins, shipped=shipped)
    return error.value.problems


def test_every_shipped_reward_is_found_and_can_be_read():
    registry = discover()
    assert {"accuracy", "format", "length"} <= set(registry.names())
    for name in registry.names():
        described = registry.get(name).describe()
        assert described["name"] == name
        assert described["source"] == f"rewards/{name}.py"
        assert described["doc"].endswith(".")


def test_the_files_name_is_the_rewards_name(shipped):
    registry = discover(shipped=shipped)
    assert registry.names() == ["short"]
    assert registry.get("short").function(Completion("abc", (1,), finished=True)) == -3.0
    assert registry.get("short") is registry.get("short")


def test_a_shipped_file_runs_only_when_asked_for(shipped):
    (shipped / "broken.py").write_text("1 / 0")
    registry = discover(shipped=shipped)
    assert registry.names() == ["broken", "short"]
    registry.get("short")
    with pytest.raises(RecipeError) as error:
        registry.get("broken")
    assert str(error.value) == f"{shipped}/broken.py:1: ZeroDivisionError: division by zero"


def test_a_shipped_file_without_its_function_is_refused(shipped):
    (shipped / "long.py").write_text(SHORT)
    with pytest.raises(RecipeError) as error:
        discover(shipped=shipped).get("long")
    assert str(error.value) == f"{shipped}/long.py: has no function long marked with @reward"


def test_marked_functions_of_a_plugin_are_rewards(shipped, plugin):
    file = plugin(SHORT.replace("def short", "def brief"))
    registry = discover([file], shipped=shipped)
    assert registry.names() == ["brief", "short"]
    assert registry.get("brief").source == str(file)


def test_a_plugin_folder_is_all_its_files_but_the_private_ones(shipped, plugin):
    plugin(SHORT.replace("def short", "def one"), "folder/a.py")
    plugin(SHORT.replace("def short", "def two"), "folder/b.py")
    folder = plugin("1 / 0", "folder/_c.py").parent
    assert discover([folder], shipped=shipped).names() == ["one", "short", "two"]


def test_what_a_plugin_imports_is_not_its_own(shipped, plugin):
    shared = plugin(SHORT, "shared_rewards_for_test.py")
    sys.path.insert(0, str(shared.parent))
    try:
        file = plugin("from shared_rewards_for_test import short\n" + SHORT.replace("def short", "def brief"))
        assert discover([file], shipped=shipped).names() == ["brief", "short"]
    finally:
        sys.path.remove(str(shared.parent))
        del sys.modules["shared_rewards_for_test"]


def test_a_plugin_leaves_the_import_path_alone_and_may_define_dataclasses(shipped, plugin):
    before = list(sys.path)
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
    )
    discover([plugin(text + SHORT.replace("from grpo_lab", "\nfrom grpo_lab").replace("def short", "def brief"))])
    assert sys.path == before


def test_an_object_of_a_plugin_has_its_variables_name_and_trl_objects_need_no_mark(shipped, plugin):
    code = "class Seen:\n    def __call__(self, {}, **kwargs):\n        return [0.0]\n{}\n"
    marked = plugin("from grpo_lab.scoring import reward\n" + code.format("completions", "novelty = reward(Seen())"))
    for_trl = plugin(code.format("completions", "seen = Seen()"), "for_trl.py")
    assert discover([marked, for_trl], shipped=shipped).names() == ["novelty", "seen", "short"]


def test_two_rewards_of_one_name_are_refused(shipped, plugin):
    file = plugin(SHORT)
    assert problems_of(file, shipped=shipped) == [
        f'reward "short" stands twice: shipped/short.py and {file}; rename one'
    ]


def test_all_problems_of_all_plugins_are_reported_with_file_line_and_cause(shipped, plugin):
    typo = plugin("x = 1\ndef short(completion:\n", "typo.py")
    missing = plugin("import os\nimport no_such_package\n", "missing.py")
    raising = plugin("import json\n\njson.loads('{')\n", "raising.py")
    leaving = plugin("import sys\nsys.exit(3)\n", "leaving.py")
    empty = plugin("", "empty.py")
    absent = typo.parent / "absent.py"
    bare = typo.parent / "bare"
    bare.mkdir()
    wrong = plugin(SHORT.replace("(completion)", "(text)"), "wrong.py")
    found = problems_of(typo, missing, raising, leaving, empty, absent, bare, wrong, shipped=shipped)
    assert found == [
        f"{typo}:2: SyntaxError: '(' was never closed",
        f"{missing}:2: ModuleNotFoundError: No module named 'no_such_package'",
        f"{raising}:3: JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        f"{leaving}:2: SystemExit: 3",
        f"{empty}: defines no reward; put @reward (from grpo_lab.scoring) above the function",
        f"plugins: no file or folder {absent}",
        f"plugins: no Python files in {bare}",
        f'reward "short" ({wrong}): takes none of completion, group, completions; '
        "name exactly one parameter after what it scores",
    ]
    assert RecipeError(found).exit_code == 3


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(RecipeError) as error:
        discover().get("lenght")
    assert str(error.value) == 'unknown reward "lenght"; did you mean "length"?'


def test_installed_packages_offer_rewards(shipped, plugin, monkeypatch):
    package = plugin(SHORT.replace("def short", "def brief"), "installed_rewards_for_test.py").parent
    info = package / "installed_rewards_for_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-rewards-for-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[grpo_lab.rewards]\ncrisp = installed_rewards_for_test:brief\ngone = installed_rewards_for_test:gone\n"
    )
    monkeypatch.syspath_prepend(package)
    registry = discover(shipped=shipped)
    assert registry.names() == ["crisp", "gone", "short"]
    assert registry.get("crisp").source == "installed_rewards_for_test:brief"
    assert registry.get("crisp").version == "installed-rewards-for-test 1.0"
    with pytest.raises(RecipeError) as error:
        registry.get("gone")
    assert str(error.value) == (
        'reward "gone" (installed_rewards_for_test:gone): '
        "AttributeError: module 'installed_rewards_for_test' has no attribute 'gone'"
    )


def test_a_dotted_path_is_imported(plugin, shipped, monkeypatch):
    monkeypatch.syspath_prepend(plugin(SHORT, "dotted_rewards_for_test.py").parent)
    registry = discover(shipped=shipped)
    found = registry.get("dotted_rewards_for_test.helper")
    assert (found.name, found.source, found.scope) == (
        "dotted_rewards_for_test.helper",
        "dotted_rewards_for_test.helper",
        "completion",
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_package.reward", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("json.JSONDecodr", 'no "JSONDecodr" in json; did you mean "JSONDecoder"?'),
    ],
)
def test_a_dotted_path_that_leads_nowhere_says_why(name, message):
    with pytest.raises(RecipeError) as error:
        discover().get(name)
    assert str(error.value) == f'reward "{name}": {message}'


def test_a_file_written_for_trl_needs_no_mark(plugin, shipped):
    code = (
        "from statistics import mean\n"
        "def long_enough(completions, **kwargs):\n    return [float(len(text) > 3) for text in completions]\n"
        "def _helper(completions):\n    return completions\n"
        "def other(x):\n    return x\n"
    )
    registry = discover([plugin(code, "for_trl.py")], shipped=shipped)
    assert set(registry.names()) - set(discover(shipped=shipped).names()) == {"long_enough"}
    assert registry.get("long_enough").scope == "completions"
