"""How sure a measured mean is: 95 % intervals for shares, for means over prompts, and for paired differences."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Where the true share lies, at 95 %: Wilson's score interval, sensible also at 0 and at 1.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)                       Wilson (1927), JASA 22

    >>> [round(bound, 3) for bound in wilson_interval(200, 200)]
    [0.981, 1.0]
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    p, z2 = successes / trials, Z95 * Z95
    centre = p + z2 / (2 * trials)
    spread = Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    low, high = (centre - spread) / (1 + z2 / trials), (centre + spread) / (1 + z2 / trials)
    # at the edges centre and spread cancel exactly; floats do not
    return (0.0 if successes == 0 else low, 1.0 if successes == trials else high)


def bootstrap_interval(values: Float[Tensor, "P"], *, num_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Where the mean over prompts lies, at 95 %: percentile bootstrap over prompts, deterministic by `seed`.

    Give one value per prompt (the mean of its samples), since samples of one prompt are not independent; give
    differences (after - before) for a paired comparison.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.double()
    index = torch.randint(len(values), (num_resamples, len(values)), generator=generator)
    return percentiles(values[index].mean(1))


def bootstrap_sums(
    statistics: Float[Tensor, "P S"], *, num_resamples: int = 2000, seed: int = 0
) -> Float[Tensor, "R S"]:
    """The sums of `statistics` over resampled prompts, for metrics of a whole corpus (F1, BLEU) that are no means.

    The same number of prompts and `seed` draw the same prompts, so that two policies can be compared in pairs.

    >>> bootstrap_sums(torch.ones(4, 1), num_resamples=2).tolist()
    [[4.0], [4.0]]
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(statistics)
    index = torch.randint(size, (num_resamples, size), generator=generator)
    counts = torch.zeros(num_resamples, size, dtype=torch.float64)
    return counts.scatter_add_(1, index, torch.ones_like(counts)) @ statistics.double()


def percentiles(values: Float[Tensor, "R"]) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of a bootstrap's values."""
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
