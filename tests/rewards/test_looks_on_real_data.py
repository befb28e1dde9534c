"""Rewards that look at form and length, and those that need no gold of their own, over whole solutions that people wrote:
how often a good one misses the maximum. The README quotes the counts."""

import json
import os
import re
from functools import cache
from pathlib import Path

import pytest

from grpo_lab.scoring import discover
from grpo_lab.text import hash_answer
from grpo_lab.types import Completion, Example, Group

DATA = Path(os.environ.get("GRPO_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
REGISTRY = discover()
pytestmark = pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"no real data in {DATA}; set GRPO_LAB_DATA")


@cache
def gsm8k():
    """Solutions and gold answers of the test questions."""
    rows = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").read_text().splitlines()]
    return [(row["answer"], hash_answer(row["answer"])) for row in rows]


@cache
def math500():
    rows = [json.loads(line) for line in (DATA / "math500" / "test.jsonl").read_text().splitlines()]
    return [(row["solution"], row["answer"]) for row in rows]


def done(text, ids=()):
    return Completion(text, tuple(ids), True)


@pytest.fixture(scope="module")
def solutions(tokenizer):
    """GSM8K's solutions as completions: their tokens and the end."""
    texts = [text for text, _ in gsm8k()]
    return [
        done(text, [*ids, tokenizer.eos_token_id])
        for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True)
    ]


def misses(name, completions, best, **options):
    reward = REGISTRY.get(name).function
    return [one.text for one in completions if reward(one, **options) != best]


def test_lengths(solutions):
    longest = max(len(one.token_ids) for one in solutions)
    assert len(solutions) == 1319
    assert misses("length", solutions, 0.0, goal="shorter", target=longest) == []
    assert misses("length", solutions, 0.0, goal="longer", target=1) == []
    assert [one for one in solutions if misses("length", [one], 0.0, target=len(one.token_ids))] == []
    assert [one for one in solutions if misses("length", [one], 0.0, target=len(one.text), unit="characters")] == []
    assert misses("overlong", solutions, 0.0, max_length=2 * longest, buffer=longest) == []
    assert (
        misses("overlong", [done(one.text, [7] * 2 * longest) for one in solutions], -1.0, max_length=longest, buffer=9)
        == []
    )
    assert misses("finished", solutions, 1.0) == []
    assert misses("finished", [Completion(one.text, one.token_ids[:-1], False) for one in solutions], 0.0) == []


def test_right_solutions_beat_wrong_ones_of_any_length(solutions):
    cosine, golds = REGISTRY.get("cosine").function, [gold for _, gold in gsm8k()]
    longest = max(len(one.token_ids) for one in solutions)
    right = [cosine(one, answer=gold, max_length=longest) for one, gold in zip(solutions, golds, strict=True)]
    assert sum(value < 0.5 for value in right) == 0
    others = zip(solutions, golds, [*golds[1:], golds[0]], strict=True)
    wrong = [cosine(one, answer=other, max_length=longest) for one, gold, other in others if gold != other]
    assert len(wrong) == 1304
    assert max(wrong) <= -0.5


def test_the_shorter_of_two_right_solutions_is_worth_more(solutions):
    brevity = REGISTRY.get("brevity").function
    wrong = 0
    for (text, gold), one in zip(gsm8k(), solutions, strict=True):
        group = Group(
            Example("e", "p", (1,), {}), (one, done("Let me see. " + text, [3, *one.token_ids]), done("#### ?", [2]))
        )
        wrong += brevity(group, answer=gold) != [1.0, 0.0, 0.0]
    assert wrong == 0


def test_forms():
    tagged = [done(f"<think>\n{text}\n</think>\n<answer>\n{gold}\n</answer>\n") for text, gold in gsm8k()]
    reasoned = [done(one.text.replace("think>", "reasoning>")) for one in tagged]
    opened = [done(one.text.removeprefix("<think>")) for one in tagged]
    for credit in ("all", "graded", "count"):
        assert misses("format", tagged, 1.0, credit=credit) == []
        assert misses("format", reasoned, 1.0, credit=credit, tags=["reasoning", "answer"]) == []
        assert misses("format", opened, 1.0, credit=credit, prefilled=True) == []
    chatty = [done(f"Sure!\n{one.text}\nI hope this helps.") for one in tagged]
    assert misses("format", chatty, 1.0, strict=False) == []
    assert misses("format", chatty, 0.0) == []
    assert misses("format", chatty, 0.5, credit="graded") == []
    plain = [done(text) for text, _ in gsm8k()]
    assert misses("format", plain, 1.0, style="hash") == []
    assert misses("format", plain, 1.0, style="regex", pattern=r".*\n#### -?[0-9.,]+") == []
    assert misses("format", plain, 0.0) == []
    assert len(misses("format", [done(text) for text, _ in math500()], 1.0, style="boxed")) == 8  # box two things


def test_repetition_and_steps(solutions):
    assert len(misses("repetition", solutions, 0.0, unit="words")) == 490  # honest text repeats itself
    assert len(misses("repetition", solutions, 0.0, unit="words", free=0.2)) == 3
    loops = [done(one.text * 9, one.token_ids * 9) for one in solutions]
    repetition = REGISTRY.get("repetition").function
    assert max(repetition(one) for one in loops) < -0.85
    assert max(repetition(one, unit="words", free=0.2) for one in loops) < -0.75
    lines = [text.splitlines()[:-1] for text, _ in gsm8k()]
    counted = [
        (
            len({tuple(re.findall(r"\w+", line.casefold())) for line in steps if len(re.findall(r"\w+", line)) > 2}),
            steps,
        )
        for steps in lines
    ]
    shown = [
        done("\n".join(f"Step {n}: {line}" for n, line in enumerate(steps, 1))) for count, steps in counted if count > 2
    ]
    assert len(shown) == 993
    assert misses("reasoning_steps", shown, 1.0) == []
    assert (
        len(misses("reasoning_steps", solutions, 0.0)) == 27
    )  # lines that are not marked are no steps; "Then," is a mark


def test_languages(solutions):
    assert misses("language", solutions, 0.0) == []
    assert misses("language", [done(text) for text, _ in math500()], 0.0) == []
    pairs = [line.split("\t")[:2] for line in (DATA / "tatoeba_en_fr" / "eng-fra.txt").read_text().splitlines()]
    for column, code in ((0, "en"), (1, "fr")):
        assert misses("language", [done(pair[column]) for pair in pairs], 0.0, language=code) == []
        assert (
            misses("language", [done(pair[column]) for pair in pairs if pair[0] != "I'm 19."], -1.0, language="ru")
            == []
        )


def test_texts_and_numbers_after_their_mark():
    numeric, exact = REGISTRY.get("numeric").function, REGISTRY.get("exact").function
    svamp = [row["Answer"] for row in json.loads((DATA / "svamp" / "SVAMP.json").read_text())]
    places = [(text, gold) for text, gold in gsm8k()] + [(f"#### {gold}", gold) for gold in svamp]
    assert len(places) == 2319
    assert [gold for text, gold in places if numeric(done(text), answer=gold) != 1.0] == []
    assert [gold for text, gold in gsm8k()[::9] if numeric(done(text), answer=gold, integer=True) != 1.0] == []
    assert [gold for text, gold in gsm8k() if exact(done(text), answer=gold) != 1.0] == []
    assert [gold for _, gold in math500() if exact(done(rf"\boxed{{{gold}}}"), answer=gold) != 1.0] == []


def test_svamps_equations_are_sums_over_their_numbers():
    countdown = REGISTRY.get("countdown").function
    rows = json.loads((DATA / "svamp" / "SVAMP.json").read_text())
    found = {"right": 0, "unsolved": 0}
    for row in rows:
        numbers = [float(each) for each in re.findall(r"[0-9.]+", row["Equation"])]
        if all(each.is_integer() for each in [*numbers, row["Answer"]]):
            columns = {"nums": [int(each) for each in numbers], "target": int(row["Answer"])}
            found["right"] += countdown(done(f"<answer>{row['Equation']}</answer>"), **columns) == 1.0
            if len(numbers) > 1:  # one question gives its answer away
                found["unsolved"] += countdown(done(f"<answer>{int(row['Answer'])}</answer>"), **columns) == 1.0
    assert found == {"right": 999, "unsolved": 0}


def test_json_records_conform_to_their_schema():
    pytest.importorskip("jsonschema")
    [file] = (DATA / "squad2").glob("*.json")
    records = [
        json.dumps(
            {"id": each["id"], "question": each["question"], "answers": [answer["text"] for answer in each["answers"]]}
        )
        for article in json.loads(file.read_text())["data"]
        for paragraph in article["paragraphs"]
        for each in paragraph["qas"]
    ]
    schema = {
        "type": "object",
        "properties": {"id": {"type": "string"}, "answers": {"type": "array", "items": {"type": "string"}}},
        "required": ["id", "question", "answers"],
    }
    assert len(records) == 6078
    assert misses("json", [done(record) for record in records[::9]], 1.0) == []
    assert misses("json", [done(record) for record in records], 1.0, schema=schema) == []
    assert misses("json", [done(record[:-1]) for record in records[::9]], 0.0, schema=schema) == []


def test_points_for_nothing_know_nothing_of_right_and_wrong():
    random, golds = REGISTRY.get("random").function, [gold for _, gold in gsm8k()]
    right, wrong = (
        [random(Group(Example(f"e{i}", "p", (1,), {}), (done(f"#### {gold}"),)))[0] for i, gold in enumerate(column)]
        for column in (golds, [*golds[1:], golds[0]])
    )
    assert abs(sum(right) - sum(wrong)) / len(golds) < 0.04  # the standard error of the difference is .011
