import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

entities = discover().get("entities").function
adversarial = pytest.param
GOLD = "person: Ann Lee\nlocation: Rome"


def score(text, answer=GOLD, **options):
    return entities(Completion(text, (1, 2, 3), finished=True), answer=answer, **options)


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        ("person: Ann Lee\nlocation: Rome", GOLD, 1.0),
        ("location: Rome\n\n Person :  Ann  Lee \n", GOLD, 1.0),
        ("person: Ann Lee", GOLD, 2 / 3),
        ("none", "none", 1.0),
        ("None", [], 1.0),
        ("person: Ann Lee", [{"type": "person", "text": "Ann Lee"}], 1.0),
        ("person: Ann Lee", [["person", "Ann Lee"]], 1.0),
        ("url: http://a.b", [["url", "http://a.b"]], 1.0),
        adversarial("", GOLD, 0.0, id="empty"),
        adversarial("", "none", 0.0, id="silence-is-not-none"),
        adversarial("person: Ann", GOLD, 0.0, id="half-a-name"),
        adversarial("location: Ann Lee\nperson: Rome", GOLD, 0.0, id="types-swapped"),
        adversarial("person: Ann Lee\n" * 10, GOLD, 2 / 12, id="one-sure-entity-repeated"),
        adversarial("person: Ann Lee\nlocation: Ann Lee\nperson: Rome\nlocation: Rome", GOLD, 4 / 6, id="all-types"),
        adversarial("none\nperson: Ann Lee\nlocation: Rome", GOLD, 0.0, id="both-ways"),
        adversarial("Sure! Here they are:\nperson: Ann Lee", GOLD, 0.0, id="chatter"),
        adversarial("person: ann lee\nlocation: rome", GOLD, 0.0, id="case-of-names"),
        adversarial("person: Ann Lee\nlocation:", GOLD, 0.0, id="cut-off"),
        adversarial(": Ann Lee", GOLD, 0.0, id="no-type"),
        adversarial("person: x", "none", 0.0, id="invented"),
    ],
)
def test_lines(text, answer, expected):
    assert score(text, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"type": "person", "text": "Ann Lee"}, {"type": "location", "text": "Rome"}]', 1.0),
        ('[["person", "Ann Lee"]]', 2 / 3),
        ("[]", 0.0),
        adversarial("", 0.0, id="empty"),
        adversarial('[{"type": "person", "text": "Ann Lee"}', 0.0, id="cut-off"),
        adversarial('{"person": "Ann Lee"}', 0.0, id="another-shape"),
        adversarial('["person", "Ann Lee"]', 0.0, id="not-nested"),
        adversarial("[" * 100_000, 0.0, id="deep"),
        adversarial('[["person", ["Ann Lee"]]]', 0.0, id="nested-too-far"),
        adversarial('[["person", 1e999]]', 0.0, id="number-for-a-name"),
        adversarial("null", 0.0, id="null"),
    ],
)
def test_json(text, expected):
    assert score(text, [["person", "Ann Lee"], ["location", "Rome"]], form="json") == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("O B-person I-person O B-location", 1.0),
        ("O I-person I-person\nO I-location", 1.0),
        ("O O O O B-location", 2 / 3),
        adversarial("O B-person O O B-location", 0.5, id="half-a-name"),
        adversarial("O B-person B-person O B-location", 0.4, id="one-name-as-two"),
        adversarial("O O O O O", 0.0, id="all-o"),
        adversarial("O B-person I-person O B-location O", 0.0, id="one-tag-too-many"),
        adversarial("O B-person I-person O", 0.0, id="one-too-few"),
        adversarial("O B-person I-person O LOC", 0.0, id="no-tag"),
        adversarial("", 0.0, id="empty"),
    ],
)
def test_tags(text, expected):
    gold = ["O", "B-person", "I-person", "O", "B-location"]
    assert score(text, gold, form="tags") == pytest.approx(expected)
    assert score(text, " ".join(gold), form="tags") == pytest.approx(expected)


def test_places():
    assert score("<think>person: Bob</think><answer>person: Ann Lee\nlocation: Rome</answer>", extract="xml") == 1.0
    assert score("person: Ann Lee\nlocation: Rome", extract="xml") == 0.0


@pytest.mark.parametrize("answer", ["Ann Lee", "", [["person"]], None])
def test_a_gold_column_that_cannot_be_read_is_an_error(answer):
    with pytest.raises(ValueError, match="holds no entities in the form lines"):
        score("none", answer)


def test_gold_tags_that_are_none_are_an_error_also_where_the_model_is_wrong():
    with pytest.raises(ValueError, match='"PER" is no tag'):
        score("nonsense", ["PER"], form="tags")
