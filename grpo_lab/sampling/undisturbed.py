"""A guard around libraries that change the whole process."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
import torch._dynamo


@contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what vLLM changes for the whole process: random generators, `torch.set_num_threads`, the environment.

    On a CPU nothing is compiled meanwhile: vLLM's helpers would take minutes, for a loop that is no faster.
    """
    state, numpy_state = random.getstate(), numpy.random.get_state()
    set_num_threads, environment = torch.set_num_threads, dict(os.environ)
    try:
        with torch.random.fork_rng(), torch._dynamo.config.patch(disable=not torch.cuda.is_available()):
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        for name in os.environ.keys() | environment.keys():
            if not name.startswith("VLLM_"):  # which it reads again
                if name in environment:
                    os.environ[name] = environment[name]
                else:
                    del os.environ[name]
