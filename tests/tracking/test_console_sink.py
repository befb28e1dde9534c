import io
import subprocess
import sys

import pytest
from rich.console import Console

from grpo_lab.tracking.console import ConsoleSink, safe
from grpo_lab.types import StepEnd

METRICS = {"loss": 0.00123456, "reward": 0.53125, "kl": 0.0012, "completions/mean_length": 87.25, "entropy": 1.0}
TIMING = {"step_seconds": 1.234, "tokens_per_second": 812.4}


def step_end(step, metrics=METRICS, timing=TIMING, stage="reasoning"):
    return StepEnd(stage, step, 250, metrics, timing)


def plain(*, quiet=False, width=20):
    output = io.StringIO()
    return output, ConsoleSink(Console(file=output, force_terminal=False, width=width), quiet=quiet)


def test_without_a_terminal_each_step_is_exactly_one_plain_line():
    output, sink = plain()
    sink.evaluation("reasoning", 0, {"reward": 0.25, "pass@1": 0.5}, [])
    sink.step(step_end(1))
    sink.step(step_end(2, {"loss": 2.5}, {}, "warm_start"))
    sink.event("reasoning", 2, "advice", "no group has signal", {})
    sink.event("reasoning", 2, "info", "checkpoint saved", {})
    sink.close()
    assert output.getvalue() == (
        "reasoning evaluation after 0 steps: reward 0.25, pass@1 0.5\n"
        "reasoning 1/250: reward 0.5312, KL 0.0012, length 87.25, loss 0.001235, 812 tokens/s, 1.23 s\n"
        "warm_start 2/250: loss 2.5\n"
        "reasoning advice at step 2: no group has signal\n"
        "reasoning info at step 2: checkpoint saved\n"
    )


def test_quiet_shows_only_what_went_wrong():
    output, sink = plain(quiet=True)
    sink.step(step_end(1))
    sink.evaluation("reasoning", 1, {"reward": 0.25}, [])
    sink.event("reasoning", 1, "info", "checkpoint saved", {})
    sink.event("reasoning", 1, "warning", "a checkpoint was skipped", {})
    sink.close()
    assert output.getvalue() == "reasoning warning at step 1: a checkpoint was skipped\n"


def test_a_terminal_shows_a_live_bar_with_numbers():
    output = io.StringIO()
    sink = ConsoleSink(Console(file=output, force_terminal=True, width=160))
    sink.step(step_end(101))
    sink.step(step_end(102))
    sink.event("reasoning", 102, "advice", "[red]look[/red]", {})
    sink.close()
    sink.close()
    assert "102/250" in output.getvalue()
    assert "reward 0.5312, KL 0.0012, length 87.25" in output.getvalue()
    assert "[red]look[/red]" in output.getvalue()
    assert output.getvalue().count("\x1b[?25h") == output.getvalue().count("\x1b[?25l") > 0  # the cursor is back


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\x00b\x07\x08\x7f", "a\\x00b\\x07\\x08\\x7f"),
        ("\u202egnp\u2066", "\\u202egnp\\u2066"),
        ("line\nline\r\t", "line\\nline\\r\\t"),
        ("\x9b31m\x85\u2028", "\\x9b31m\\x85\\u2028"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("[bold red]é 漢字 😀[/]", "[bold red]é 漢字 😀[/]"),
    ],
)
def test_hostile_text_is_shown_and_does_nothing(text, shown):
    assert safe(text) == shown
    output, sink = plain()
    sink.event("grpo", 1, "failure", f"completion: {text}", {})
    assert output.getvalue() == f"grpo failure at step 1: completion: {shown}\n"


def test_standard_output_stays_free_and_no_colour_is_written_into_a_pipe():
    code = (
        "from grpo_lab.tracking.console import ConsoleSink\n"
        "ConsoleSink().event('grpo', 1, 'warning', 'look: 12 \\u6f22 \\x1b[31m', {})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONUTF8": "1"})
    assert done.stdout == b""
    assert done.stderr.decode() == "grpo warning at step 1: look: 12 漢 \\x1b[31m\n"


def test_a_reader_that_leaves_does_not_end_the_run():
    code = (
        "from grpo_lab.tracking.console import ConsoleSink\n"
        "sink = ConsoleSink()\n"
        "for step in range(5): sink.event('grpo', step, 'warning', 'x' * 100_000, {})\n"
        "print('trained to the end')\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stderr.close()
    assert run.stdout.read() == b"trained to the end\n"
    run.stdout.close()
    run.wait()
