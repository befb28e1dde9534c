import sys
import time

import pytest

from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import discover, problems
from grpo_lab.types import Completion

REGISTRY = discover()
json = REGISTRY.get("json").function
adversarial = pytest.param
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def score(text, **options):
    return json(Completion(text, (1, 2, 3), finished=True), **options)


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"a": 1}', 1.0),
        ("  [1, 2.5e3, null]\n", 1.0),
        ('```json\n{"a": 1}\n```', 1.0),
        ('```\n{"a": 1}\n```', 1.0),
        ('{"a": "```"}', 1.0),
        ('{"a": "\\u00e9 \\n"}', 1.0),
        adversarial("", 0.0, id="empty"),
        adversarial("12", 0.0, id="a-bare-number"),
        adversarial('"word"', 0.0, id="a-bare-word"),
        adversarial('{"a": 1', 0.0, id="cut-off"),
        adversarial("{'a': 1}", 0.0, id="python"),
        adversarial('{"a": 1,}', 0.0, id="trailing-comma"),
        adversarial('{"a": 1} // done', 0.0, id="comment"),
        adversarial('{"a": 1}{"a": 1}', 0.0, id="two-documents"),
        adversarial('Here: {"a": 1}', 0.0, id="chatter"),
        adversarial('{"a": NaN}', 0.0, id="nan"),
        adversarial("[Infinity, -Infinity]", 0.0, id="infinity"),
        adversarial('{"a": 1, "a": 2}', 0.0, id="a-key-twice"),
        adversarial('[{"x": {"a": 1, "a": 1}}]', 0.0, id="a-key-twice-further-in"),
        adversarial("[1e999]", 0.0, id="a-float-too-large"),
        adversarial(f"[{'9' * 100_000}]", 0.0, id="a-hundred-thousand-digits"),
        adversarial(f"[{'9' * 400}]", 0.0, id="an-integer-beyond-any-float"),
        adversarial("[" * 100_000, 0.0, id="deep-and-open"),
        adversarial("[" * 100_000 + "]" * 100_000, 0.0, id="deep"),
        adversarial("[" * 101 + "]" * 101, 0.0, id="too-deep"),
        adversarial("[" * 100 + "]" * 100, 1.0, id="just-not-too-deep"),
        adversarial('{"a":' * 101 + "1" + "}" * 101, 0.0, id="too-deep-objects"),
        adversarial('{"a": "\n"}', 0.0, id="raw-line-break"),
        adversarial("\ufeff{}", 0.0, id="byte-order-mark"),
        adversarial("```python\n{}\n```", 0.0, id="another-language"),
        adversarial("```json\n{}\n```\n```json\n{}\n```", 0.0, id="two-fences"),
        adversarial("[\u0661]", 0.0, id="arabic-digit"),
    ],
)
def test_valid_json(text, expected):
    started = time.perf_counter()
    assert score(text) == expected
    assert time.perf_counter() - started < 1


def test_options():
    assert score("```\n{}\n```", fenced=False) == 0.0
    assert score("so <answer>{}</answer>", extract="xml") == 1.0
    assert score("{}", extract="xml") == 0.0


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"name": "Ann", "age": 3}', 1.0),
        ('{"name": "Ann", "age": 3.0}', 1.0),  # JSON schema: an integer is a number without fraction
        ('{"name": "Ann", "age": -1}', 0.25),
        ('{"name": "Ann"}', 0.25),
        adversarial("{}", 0.25, id="empty-object"),
        adversarial("[]", 0.25, id="a-list"),
        adversarial('{"name": "Ann", "age": true}', 0.25, id="true-is-no-integer"),
        adversarial('{"name": "Ann", "age": "3"}', 0.25, id="text-is-no-integer"),
        adversarial('{"name": "Ann", "age": 3, "more": 1}', 0.25, id="more-than-asked"),
        adversarial('{"name": "Ann", "age": 3', 0.0, id="cut-off"),
        adversarial('{"name": "Ann", "age": 3, "age": 3}', 0.0, id="a-key-twice"),
        adversarial("", 0.0, id="empty"),
    ],
)
def test_schema(text, expected):
    pytest.importorskip("jsonschema")
    assert score(text, schema=SCHEMA, partial=0.25) == expected


def test_a_schema_may_ask_for_a_bare_number():
    pytest.importorskip("jsonschema")
    assert score("12", schema={"type": "integer"}) == 1.0


def test_a_schema_that_is_none_is_found_with_the_recipe():
    pytest.importorskip("jsonschema")
    terms = [RewardTerm(name="json", options={"schema": {"properties": {"a": {"type": "integr"}}}})]
    [(loc, message)] = problems(terms, REGISTRY, ())
    assert loc == (0, "options", "schema")
    assert "schema['properties']['a']['type'] is no JSON schema: 'integr' is not valid" in message


def test_a_schema_elsewhere_is_never_fetched(monkeypatch):
    pytest.importorskip("jsonschema")

    tried = []  # an exception alone would be taken for an unreachable document
    monkeypatch.setattr("socket.socket.connect", lambda *place: tried.append(place))
    with pytest.raises(Exception, match="Unresolvable: http://127.0.0.1:9/other.json"):
        score("{}", schema={"$ref": "http://127.0.0.1:9/other.json"})
    assert tried == []


def test_a_missing_package_is_found_with_the_recipe(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    terms = [RewardTerm(name="json", options={"schema": {"type": "array"}})]
    with pytest.raises(SetupError) as error:
        problems(terms, discover(), ())
    assert str(error.value).endswith('; pip install "grpo-lab[metrics]"')
    assert problems([RewardTerm(name="json")], discover(), ()) == []  # without a schema it is not needed


def test_its_option_is_shown_by_its_type():
    shown = REGISTRY.get("json").describe()["options"]["schema"]
    assert (shown["type"], shown["default"]) == ("dict[str, Any] | None", None)
