import time

import pytest

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.yaml_loader import MAX_DEPTH, Place, parse_yaml


def read(text):
    node = parse_yaml(text, lambda line, column: Place("x.yaml", "/folder", line=line, column=column))
    return None if node is None else node.plain()


def refusal(text):
    with pytest.raises(RecipeError) as caught:
        read(text)
    return str(caught.value)


@pytest.mark.parametrize(
    "written, meant",
    [
        ("1e-6", 1e-6),
        ("5.0e-6", 5e-6),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("+1.", 1.0),
        ("0", 0),
        ("-12", -12),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalars_mean_numbers_booleans_and_null(written, meant):
    value = read(f"key: {written}")["key"]
    assert value == meant
    assert type(value) is type(meant)


@pytest.mark.parametrize(
    "written",
    [
        "yes",
        "no",
        "on",
        "off",
        "True",
        "y",
        "2024-01-01",
        "007",
        "0x1f",
        "1_000",
        "12:30:00",
        ".nan",
        ".inf",
        "1e",
        "=",
    ],
)
def test_everything_else_is_text(written):
    assert read(f"key: {written}") == {"key": written}


def test_quoted_scalars_are_text():
    assert read("""{a: "1", b: 'true', c: "null"}""") == {"a": "1", "b": "true", "c": "null"}


def test_keys_are_text():
    assert read("{1: a, true: b, null: c}") == {"1": "a", "true": "b", "null": "c"}


def test_no_document_is_none():
    assert read("# only a comment\n") is None


def test_duplicate_keys_are_refused():
    text = "stages:\n  a: {steps: 1}\n  b: {steps: 2}\n  a: {steps: 3}\n"
    assert refusal(text) == "x.yaml:4:3: stages.a: duplicate key; first on line 2"


def test_aliases_are_refused():
    assert (
        refusal("a: &top {b: 1}\nc: *top\n")
        == 'x.yaml:2:4: c: alias "*top": recipes have no aliases; write the value out'
    )


def test_merge_keys_are_refused():
    assert (
        refusal("a:\n  <<: {b: 1}\n")
        == 'x.yaml:2:3: a: merge key "<<": recipes have none; write the values out or use extends'
    )


@pytest.mark.parametrize(
    "value, tag",
    [
        ("!!python/object/apply:os.system [ls]", "tag:yaml.org,2002:python/object/apply:os.system"),
        ("!!str 1", "tag:yaml.org,2002:str"),
        ("! 1", "!"),
        ("!own {}", "!own"),
    ],
)
def test_tags_are_refused(value, tag):
    assert refusal(f"a: {value}") == f'x.yaml:1:4: a: tag "{tag}": recipes have no tags; write the plain value'


def test_a_tagged_key_is_refused():
    assert refusal("!!python/name:os.x a: 1").startswith('x.yaml:1:1: tag "tag:yaml.org,2002:python/name:os.x"')


def test_a_key_that_is_no_text_is_refused():
    assert refusal("a:\n  ? [1, 2]\n  : 3\n") == "x.yaml:2:5: a: a key must be plain text"


def test_a_second_document_is_refused():
    assert refusal("a: 1\n---\nb: 2\n") == "x.yaml:2:1: a second document starts here; a recipe is one document"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 19, "9" * 5000])
def test_numbers_beyond_64_bits_are_refused(number):
    assert refusal(f"a: {number}").endswith("is too large a number; quote it if it is text")


def test_half_a_character_is_refused():
    assert refusal('a: "\\ud800"') == "x.yaml:1:4: a: half a character (a surrogate) is not allowed"


def test_broken_yaml_names_the_position():
    assert refusal("a: 1\nb: [1, 2\nc: 3\n") == "x.yaml:3:2: not valid yaml: expected ',' or ']', but got ':'"


def test_a_control_character_is_refused():
    assert refusal("a: 1\nb: x\x07y\n") == "x.yaml:2:5: not valid yaml: character U+0007 is not allowed"


def test_the_deepest_allowed_nesting_is_read():
    assert read("[" * MAX_DEPTH + "]" * MAX_DEPTH)


@pytest.mark.parametrize(
    "bomb",
    [
        "[" * 100_000,
        "{a: " * 25_000,
        "- " * 50_000,
        "? " * 50_000,
        "[\n" * 50_000,
        "".join(" " * depth + "a:\n" for depth in range(400)),
        "a: &a [1, 1]\n" + "".join(f"b{i}: &b{i} [*a, *a, *a, *a]\n" for i in range(500)),
        "&a [*a]",
    ],
    ids=["flow lists", "flow mappings", "dashes", "keys", "lines", "indentation", "aliases", "itself"],
)
def test_bombs_are_refused_in_well_under_a_second(bomb):
    started = time.process_time()
    assert refusal(bomb).count("\n") == 0
    assert time.process_time() - started < 0.8


def test_nesting_beyond_the_cap_says_so():
    assert refusal("a: " + "[" * 33) == "x.yaml:1:35: a[0][0]: nested deeper than 32 levels"
