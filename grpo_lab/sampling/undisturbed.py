"""A guard around libraries that change the whole process."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
import torch._dynamo


@contextmanager
def undisturbed(**environment: str) -> Iterator[None]:
    """Undo what vLLM changes for the whole process: random generators, `torch.set_num_threads`, the environment.

    On a CPU nothing is compiled meanwhile: vLLM's helpers would take minutes, for a loop that is no faster.

    Args:
        environment: variables that are set meanwhile. Other VLLM_ variables are left, as it reads them again.
    """
    state, numpy_state = random.getstate(), numpy.random.get_state()
    set_num_threads, before = torch.set_num_threads, dict(os.environ)
    try:
        os.environ.update(environment)
        with torch.random.fork_rng(), torch._dynamo.config.patch(disable=not torch.cuda.is_available()):
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        for name in os.environ.keys() | before.keys():
            if name.startswith("VLLM_") and name not in environment:
                continue
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)
