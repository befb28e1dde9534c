"""Where freed memory goes, counted in pages that the next tensor of the same size has to ask for."""

import resource
import sys

import pytest
import torch
from torch import nn

from grpo_lab.policy.freed import give_freed_memory_back

MIB_48 = 12 << 20  # numbers of 4 bytes


def fresh_pages():
    torch.ones(MIB_48)  # and freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(MIB_48)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_beside_a_large_model_freed_memory_goes_back(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"):
        monkeypatch.delenv(name, raising=False)
    give_freed_memory_back(nn.Linear(4096, 4097, device="meta"))
    assert fresh_pages() > 1000
