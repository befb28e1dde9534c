"""Where freed memory goes, counted in pages that the next tensor of the same size has to ask for.

In processes of their own: which heap a block comes from depends on all that a process has done before.
"""

import os
import subprocess
import sys

import pytest

COUNTED = """
import resource, sys
import torch
from torch import nn
from grpo_lab.policy.freed import govern_freed_memory

govern_freed_memory({"small": nn.Linear(2, 2), "large": nn.Linear(4096, 4097, device="meta")}[sys.argv[1]])
for _ in range(30):  # the heap takes some rounds until what is free fits an aligned block
    torch.ones(12 << 20)  # 48 MiB, and freed; glibc by itself never keeps a block as large
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(12 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")


def fresh_pages(size, **environment):
    """Beside a model of that size."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", COUNTED, size]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_kept_beside_a_small_model():
    assert fresh_pages("small") < 1000


def test_freed_memory_goes_back_beside_a_large_model():
    assert fresh_pages("large") > 1000


def test_what_the_environment_says_of_freed_memory_stays():
    assert fresh_pages("small", MALLOC_MMAP_THRESHOLD_="65536") > 1000
