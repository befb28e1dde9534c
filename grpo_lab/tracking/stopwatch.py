"""Where a step's time goes. Times are never part of the deterministic metrics."""

import resource
import sys
import time


class Stopwatch:
    """Seconds per phase of one step.

    >>> clock = Stopwatch()
    >>> clock.lap("sample")
    >>> list(clock.seconds)
    ['sample_seconds']
    """

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """What passed since the last lap belongs to `phase`, which may come more than once."""
        now = time.perf_counter()
        self.seconds[f"{phase}_seconds"] = self.seconds.get(f"{phase}_seconds", 0.0) + now - self.last
        self.last = now

    def report(self, *, completions: int, tokens: int) -> dict[str, float]:
        """The phases, the whole step, speeds and the process's peak resident memory."""
        total = self.last - self.started
        return {
            **self.seconds,
            "step_seconds": total,
            "completions_per_second": completions / total,
            "tokens_per_second": tokens / total,
            "peak_memory_mib": peak_memory_mib(),
        }


def peak_memory_mib() -> float:
    """The most resident memory this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)  # Linux counts KiB, macOS bytes
