"""Where freed memory goes, counted in pages that the next tensor of the same size has to ask for."""

import resource
import sys

import pytest
import torch
from torch import nn

from grpo_lab.policy.freed import govern_freed_memory

MIB_48 = 12 << 20  # numbers of 4 bytes; glibc by itself never keeps a block as large


def fresh_pages():
    torch.ones(MIB_48)  # and freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(MIB_48)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_beside_a_small_model_and_goes_back_beside_a_large_one(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"):
        monkeypatch.delenv(name, raising=False)
    small, large = nn.Linear(2, 2), nn.Linear(4096, 4097, device="meta")
    govern_freed_memory(large)
    assert fresh_pages() > 1000
    govern_freed_memory(small)
    assert fresh_pages() < 1000
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    govern_freed_memory(large)  # a person's own setting is not touched
    assert fresh_pages() < 1000
