"""How sure is a figure? The bootstrap over texts (Efron 1979), for every figure that is a function of sums.

Questions about one text are not independent, so texts are drawn, with replacement, and not questions. A figure is a
function of sums over texts: a mean is (sum of x, count), a perplexity exp of one, corpus BLEU a function of ten sums. A
resample then only adds up another choice of texts, and two models are compared on the same choices, text by text.

The interval speaks of other texts like these, not of another training run. Under about ten texts it is too narrow.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Sums(NamedTuple):
    """A figure: `values` (texts, S) float64 are added up over the texts, then `finish` makes it of the S sums."""

    values: torch.Tensor
    finish: Callable[[Sequence[float]], float]

    def figure(self) -> float:
        return self.finish(self.values.sum(0).tolist())

    def resampled(self, weights: torch.Tensor) -> torch.Tensor:
        """The figure in each of R resamples: weights (R, texts) -> (R,)."""
        return torch.tensor([self.finish(sums) for sums in (weights @ self.values).tolist()], dtype=torch.float64)


def by_text(texts: int, places: Sequence[int], *columns: Sequence[float], finish) -> Sums:
    """Sums of S columns of N numbers, number n belonging to text places[n]."""
    values = torch.tensor(columns, dtype=torch.float64).T  # (N, S)
    table = torch.zeros(texts, len(columns), dtype=torch.float64)
    return Sums(table.index_add_(0, torch.tensor(places, dtype=torch.long), values), finish)


def mean(sums: Sequence[float]) -> float:
    return sums[0] / sums[1] if sums[1] else math.nan


def exp_mean(sums: Sequence[float]) -> float:
    return math.exp(min(mean(sums), 700.0)) if sums[1] else math.nan


def resamples(texts: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, texts): how often each text is drawn in each of `count` draws of `texts` texts with replacement."""
    drawn = torch.randint(texts, (count, texts), generator=generator)
    return torch.zeros(count, texts, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def interval(values: torch.Tensor) -> tuple[float, float] | None:
    """The middle 95% of a resampled figure (R,); None if some resample left it undefined."""
    if not bool(torch.isfinite(values).all()):
        return None
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
