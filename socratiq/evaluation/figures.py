"""From the records of a stage's questions (measures.py) to its figures, with intervals.

How sure is a figure? Questions about one text are not independent, so the bootstrap (Efron 1979) draws texts, with
replacement, and not questions. Two stages are compared on the same draws. The interval speaks of other texts like
these, not of another training run, and is too narrow under about ten texts.
"""

from __future__ import annotations

import math

import torch

from socratiq.evaluation.measures import distinct_2, duplicates

QUESTION_MEANS = ("scorer/reward", "well_formed", "eos", "words", "relatedness")


def parts(record: dict) -> dict[str, tuple[float, float]]:
    """What one question adds to the figures that are means: numerator and denominator by name."""
    found = {name: (record[name], 1) for name in QUESTION_MEANS if name in record}
    for name in ("judge", "scorer"):
        if name in record:
            found[f"{name}/accuracy"] = record[f"{name}_type"] == record["type"], 1
    if "base_nats" in record:
        found["base_perplexity"] = record["base_nats"], record["base_tokens"]
    return found | {f"api/{name}": (grade, 1) for name, grade in record.get("grades", {}).items()}


def sums_by_text(records: list[dict], texts: int) -> dict[str, torch.Tensor]:
    """For each figure that is a mean (texts, 2) float64: numerators and denominators, added up for each text."""
    found: dict[str, torch.Tensor] = {}
    for record in records:
        for name, part in parts(record).items():
            table = found.setdefault(name, torch.zeros(texts, 2, dtype=torch.float64))
            table[record["context"]] += torch.tensor(part, dtype=torch.float64)
    return found


def draws(texts: int, generator: torch.Generator, count: int = 2000) -> torch.Tensor:
    """(1 + count, texts): how often each text counts. Row 0 is the data, each text once; the others are resamples.

    With a single text there is nothing to resample, and row 0 is all.
    """
    count = count if texts > 1 else 0
    drawn = torch.randint(texts, (count, texts), generator=generator)
    resamples = torch.zeros(count, texts, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    return torch.cat([torch.ones(1, texts, dtype=torch.float64), resamples])


def values(name: str, sums: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The figure on each draw: sums (texts, 2) of `sums_by_text` and weights (1 + R, texts) of `draws` -> (1 + R,)."""
    numerator, denominator = (weights @ sums).T
    return (numerator / denominator).exp() if name == "base_perplexity" else numerator / denominator


def figures_of(records: list[dict], weights: torch.Tensor) -> dict[str, dict]:
    """Every figure that is a mean over these questions, with its interval. weights (1 + R, texts) from `draws`."""
    sums = sums_by_text(records, weights.shape[1])
    return {name: entry(values(name, x, weights)) for name, x in sums.items()}


def change(earlier: list[dict], later: list[dict], weights: torch.Tensor) -> dict[str, dict]:
    """later - earlier for every figure that both have; the interval is that of the difference, on the same draws."""
    a, b = sums_by_text(earlier, weights.shape[1]), sums_by_text(later, weights.shape[1])
    return {name: entry(values(name, b[name], weights) - values(name, a[name], weights)) for name in a if name in b}


def entry(values: torch.Tensor) -> dict:
    """A figure for the file, from its values on all draws: "value", and the middle 95% from "low" to "high".

    There is no interval where a resample leaves the figure undefined: none of its texts has a question that counts.
    """
    found, resampled = {"value": rounded(values[0].item())}, values[1:]
    if len(resampled) and bool(resampled.isfinite().all()):
        low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        found |= {"low": rounded(low), "high": rounded(high)}
    return found


def rounded(x: float) -> float | None:
    return float(f"{x:.5g}") if math.isfinite(x) else None


def repetition(records: list[dict]) -> dict[str, dict]:
    """Figures about all questions together. No interval: a text drawn twice would look like a model that repeats."""
    questions = [record["question"] for record in records]
    return {count.__name__: entry(torch.tensor([count(questions)])) for count in (distinct_2, duplicates)}
