"""A disk that is full and a process that is killed, both real."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from grpo_lab.tracking.run_folder import RunFolder

FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}


@pytest.fixture
def disk_full_after() -> Callable[[int], AbstractContextManager[None]]:
    """While it is entered, the kernel refuses to let any file grow beyond so many bytes."""

    @contextmanager
    def limit(num_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def killed_at() -> Callable[[int, Callable[[], object]], bool]:
    """Do work in a child process that is killed (-9) just before its n-th file operation; False if it got through."""

    def run(n: int, work: Callable[[], object]) -> bool:
        child = os.fork()
        if child == 0:
            left = [n]

            def count(event: str, _: object) -> None:
                if event in FILE_OPERATIONS:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            try:
                sys.addaudithook(count)
                work()
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
        return os.WIFSIGNALED(status)

    return run


@pytest.fixture
def run_folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.create(
        tmp_path / "runs" / "toy", recipe_text="name: toy\n", resolved_text="name: toy\n", plugins=[], facts={}
    ) as run:
        yield run
