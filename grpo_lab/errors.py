"""The errors a user can act on. Each knows its exit code; anything else is a bug of ours and exits 70."""


class GrpoLabError(Exception):
    """An error whose message names the place, what was found and what to do; the CLI prints it without a traceback."""

    exit_code = 70


class UsageError(GrpoLabError):
    """The command line makes no sense."""

    exit_code = 2


class RecipeError(GrpoLabError, ValueError):
    """The recipe or its data cannot be used. Holds every problem found, one line each."""

    exit_code = 3

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class SetupError(GrpoLabError):
    """The machine or the environment lacks something: a package, memory, a device."""

    exit_code = 4


class RewardError(GrpoLabError, RuntimeError):
    """A reward broke its contract, or failed more often than the recipe's budget allows."""

    exit_code = 5


class NumericError(GrpoLabError, ArithmeticError):
    """Training produced numbers that are not numbers, repeatedly."""

    exit_code = 6


class StaleWeightsError(GrpoLabError):
    """Completions were sampled by other weights than those that learn from them."""

    exit_code = 6


class CheckpointError(GrpoLabError):
    """A checkpoint cannot be read, or does not belong to this recipe."""

    exit_code = 7


class DiskError(GrpoLabError, OSError):
    """A file could not be written."""

    exit_code = 8


class StopRequested(GrpoLabError):
    """SIGTERM or Ctrl-C arrived; the state was saved and `--resume` continues it."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class ProcessError(GrpoLabError):
    """A process that this one started failed. It has said why on standard error; its exit code is handed on."""

    exit_code = 4

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)
