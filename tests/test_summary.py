import io

import pytest
from rich.console import Console

from grpo_lab.summary import before_and_after, pairs, show


def row(id_: str, arm: str, accuracy: float | None, *, text: str = "", tokens: int = 4, finished: bool = True) -> dict:
    """One line of an evaluation's file. What could not be scored is null there."""
    return {
        "arm": arm,
        "id": id_,
        "sample": 0,
        "prompt": f"{id_}?",
        "completion": text,
        "num_tokens": tokens,
        "finished": finished,
        "terms": {"accuracy": accuracy},
        "reward": accuracy,
    }


def test_means_before_after_and_of_the_difference_by_hand():
    before = [row("a", "greedy", 0.0), row("b", "greedy", 1.0), row("c", "greedy", 0.0), row("d", "greedy", 0.0)]
    after = [row("a", "greedy", 1.0), row("b", "greedy", 1.0), row("c", "greedy", 1.0), row("d", "greedy", 0.0)]
    table = before_and_after(before, after)
    assert list(table) == ["greedy/accuracy", "greedy/reward", "greedy/completion tokens", "greedy/completion ended"]
    accuracy = table["greedy/accuracy"]
    assert accuracy["num_prompts"] == 4
    assert [accuracy[key]["mean"] for key in ("before", "after", "change")] == [0.25, 0.75, 0.5]
    # Wilson for 1 of 4 and 3 of 4
    assert (accuracy["before"]["low"], accuracy["before"]["high"]) == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert (accuracy["after"]["low"], accuracy["after"]["high"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert accuracy["change"]["low"] <= 0.5 <= accuracy["change"]["high"]
    assert table["greedy/completion tokens"]["change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_samples_of_one_prompt_are_one_observation():
    """Four samples of each of two prompts: two differences, of 0.5 and 0, and not eight."""
    before = [row(id_, "sampled", 0.0) for id_ in "aaaabbbb"]
    after = [row("a", "sampled", value) for value in (1.0, 1.0, 0.0, 0.0)] + [
        row("b", "sampled", 0.0) for _ in range(4)
    ]
    accuracy = before_and_after(before, after)["sampled/accuracy"]
    assert (accuracy["num_prompts"], accuracy["change"]["mean"]) == (2, 0.25)
    assert (accuracy["change"]["low"], accuracy["change"]["high"]) == (0.0, 0.5)


def test_arms_are_compared_each_with_itself():
    before = [row("a", "greedy", 0.0), row("a", "sampled", 1.0)]
    after = [row("a", "greedy", 1.0), row("a", "sampled", 1.0)]
    table = before_and_after(before, after)
    assert (table["greedy/accuracy"]["change"]["mean"], table["sampled/accuracy"]["change"]["mean"]) == (1.0, 0.0)


def test_prompts_to_which_a_reward_does_not_apply_are_left_out_of_its_row():
    before = [row("a", "greedy", 0.0), row("b", "greedy", None)]
    after = [row("a", "greedy", 1.0), row("b", "greedy", None)]
    table = before_and_after(before, after)
    assert table["greedy/accuracy"]["num_prompts"] == 1
    assert table["greedy/accuracy"]["change"]["mean"] == 1.0
    assert table["greedy/completion tokens"]["num_prompts"] == 2
    nowhere = before_and_after([row("a", "greedy", None)], [row("a", "greedy", None)])
    assert list(nowhere) == ["greedy/completion tokens", "greedy/completion ended"]


def test_the_three_answers_that_gained_most_are_shown_then_the_first_ones():
    before = [row(id_, "greedy", value, text=f"old {id_}") for id_, value in zip("abcde", (1, 1, 0, 0, 1), strict=True)]
    after = [row(id_, "greedy", value, text=f"new {id_}") for id_, value in zip("abcde", (1, 0, 1, 0, 1), strict=True)]
    found = pairs([*before, row("a", "sampled", 0.0)], [*after, row("a", "sampled", 1.0)])
    assert [pair["prompt"] for pair in found] == ["c?", "a?", "d?"]
    assert found[0] == {
        "prompt": "c?",
        "before": "old c",
        "after": "new c",
        "reward_before": 0,
        "reward_after": 1,
    }


def test_an_answer_that_could_not_be_scored_is_no_gain():
    before = [row("a", "greedy", None), row("b", "greedy", 0.0)]
    after = [row("a", "greedy", None), row("b", "greedy", 0.5)]
    assert [pair["prompt"] for pair in pairs(before, after)] == ["b?", "a?"]


def shown(prompt: str, answer: str, width: int = 120) -> str:
    before, after = [row("a", "greedy", 0.0, text=answer)], [row("a", "greedy", 1.0, text=answer)]
    example = {"prompt": prompt, "before": answer, "after": answer, "reward_before": 0.0, "reward_after": 1.0}
    summary = {
        "run": "runs/toy",
        "stages": {
            "warm_start": {"final": "runs/toy/warm_start/final", "eval_loss": {"before": 5.5, "after": 0.25}},
            "grpo": {
                "final": "runs/toy/grpo/final",
                "held_out": before_and_after(before, after),
                "examples": [example],
            },
        },
    }
    out = io.StringIO()
    show(summary, Console(file=out, width=width))
    return out.getvalue()


def test_what_is_shown_at_the_end():
    lines = [line.rstrip() for line in shown("1+1=", "2").splitlines()]
    assert lines[:2] == ["warm_start: held-out loss 5.500 -> 0.250", "grpo: held-out, 1 prompts, 95 % intervals"]
    (accuracy,) = [line for line in lines if line.strip().startswith("greedy/accuracy")]
    assert accuracy.split() == [
        *("greedy/accuracy", "0.000", "[0.000,", "0.793]"),
        *("1.000", "[0.207,", "1.000]", "+1.000", "[+1.000,", "+1.000]"),
    ]
    start = lines.index("  prompt  1+1=")
    assert lines[start:] == [
        "  prompt  1+1=",
        "  before  2",
        "  after   2",
        "",
        "run:   runs/toy  (metrics.jsonl, rollouts/ and evaluations/ lie in each stage's folder)",
        "model: runs/toy/grpo/final  (loads with transformers)",
        "next:  grpo-lab eval runs/toy --samples 8   measures it further",
        "       grpo-lab train <recipe> --name other seed=1   is the same recipe with other draws",
    ]


def test_hostile_answers_are_shown_and_do_nothing():
    text = shown("[red]why[/red]", "\x1b[31mred\n\u202eback[/]")
    assert "  prompt  [red]why[/red]\n" in text
    assert "  after   \\x1b[31mred\\n\\u202eback[/]\n" in text


def test_on_a_terminal_of_eighty_columns_intervals_stand_whole_under_their_means():
    text = shown("1+1=", "2", width=80)
    assert "…" not in text
    assert "[0.000, 0.793]" in text
    assert "[+1.000, +1.000]" in text
