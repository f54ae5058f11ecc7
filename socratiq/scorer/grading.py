"""Which rows the judge and the scorer learn from, and how well strengths of question types agree with the labels."""

import zlib

import torch
import torch.nn.functional as F

from socratiq.data import split_by_context

JUDGE_SHARE = 0.4  # of the texts that are not held out


def place(context: str) -> int:
    """Where a text stands in a fixed random order in which spacing and case play no part."""
    return zlib.crc32(" ".join(context.casefold().split()).encode())


def examples(rows) -> list:
    """The rows that teach a type: they have one, and people did not judge their question bad."""
    return [row for row in rows if row.type and row.preference != "rejected"]


def rows_to_learn_from(rows, held_out: float, seed: int) -> tuple[list, list]:
    """The rows that judge and scorer are fitted on: neither sees a held-out text, nor a text of the other one.

    A hash of the text decides, so that adding rows moves no others, and folds and held-out texts are independent of it.
    With too few texts for both to meet every type, both get all that are not held out.
    """
    train = examples(split_by_context(rows, held_out, seed)[0])
    judges = [zlib.crc32(f"judge {place(row.context)}".encode()) < JUDGE_SHARE * 2**32 for row in train]
    parts = tuple([row for row, own in zip(train, judges, strict=True) if own == judge] for judge in (True, False))
    types = {row.type for row in train}
    return parts if all({row.type for row in part} == types for part in parts) else (train, train)


def figures(types: list[str], strengths: torch.Tensor, labels: list[str]) -> dict[str, float]:
    """Compare strengths (N, T) with the labels of the N rows; a label that is no type makes a row all negative.

    Accuracy and F1 are those of the strongest type, over the rows of a known type. The calibration error is the mean
    gap between strength and share of positives in ten equal bins, over all N T strengths.
    """
    target = torch.tensor([[float(label == name) for name in types] for label in labels])
    known = target.any(1)
    guess = F.one_hot(strengths[known].argmax(1), len(types))
    right, either = (guess * target[known]).sum(0), (guess + target[known]).sum(0)
    f1 = 2 * right / either.clamp(min=1)
    bins = (strengths * 10).long().clamp(0, 9).flatten()
    gap = torch.zeros(10).index_add_(0, bins, (strengths - target).flatten()).abs().sum() / target.numel()
    overall = {"accuracy": right.sum() / known.sum(), "macro-F1": f1.mean(), "calibration error": gap}
    by_type = {f"F1 of {name}": value for name, value in zip(types, f1.tolist(), strict=True)}
    return {name: value.item() for name, value in overall.items()} | by_type
