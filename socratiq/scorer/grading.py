"""Which rows the judge and the scorer learn from, and how well strengths of question types agree with the labels."""

import zlib
from typing import NamedTuple

import torch

from socratiq.data import split_by_context

JUDGE_SHARE = 0.4  # of the texts that are not held out


def place(context: str) -> int:
    """Where a text stands in a fixed random order in which spacing and case play no part."""
    return zlib.crc32(" ".join(context.casefold().split()).encode())


def rows_to_learn_from(rows, held_out: float, seed: int) -> tuple[list, list]:
    """The rows that judge and scorer are fitted on: neither sees a held-out text, nor a text of the other one.

    A hash of the text decides, so that adding rows moves no others, and folds and held-out texts are independent of it.
    With too few texts for both to meet every type, both get all that are not held out.
    """
    train = [row for row in split_by_context(rows, held_out, seed)[0] if row.type]  # a verdict alone teaches no type
    judges = [zlib.crc32(f"judge {place(row.context)}".encode()) < JUDGE_SHARE * 2**32 for row in train]
    parts = tuple([row for row, own in zip(train, judges, strict=True) if own == judge] for judge in (True, False))
    types = {row.type for row in train}
    return parts if all({row.type for row in part} == types for part in parts) else (train, train)


class Figures(NamedTuple):
    """Strengths (N, T) that were graded, and how they compare with the labels."""

    types: list[str]
    strengths: torch.Tensor
    highest: torch.Tensor  # (N, T) the highest of the opinions that each strength is made of
    accuracy: float  # strongest type = labelled type, over rows of a known type
    f1: list[float]  # of each type
    macro_f1: float
    ece: float  # mean gap between strength and share of positives, ten equal bins, over all N T strengths
    confusion: torch.Tensor  # (T, T): row labelled type, column strongest type

    def __str__(self) -> str:
        wide = max(map(len, self.types))
        lines = [f"accuracy {self.accuracy:.3f}   macro-F1 {self.macro_f1:.3f}   calibration error {self.ece:.3f}", ""]
        lines.append(f"{'labelled':<{wide}}     F1   strongest: " + ", ".join(self.types))
        for name, f1, row in zip(self.types, self.f1, self.confusion.tolist(), strict=True):
            lines.append(f"{name:<{wide}}  {f1:.3f}" + "".join(f"{count:>7}" for count in row))
        return "\n".join(lines)


def figures(types: list[str], strengths: torch.Tensor, highest: torch.Tensor, labels: list[str]) -> Figures:
    """Compare strengths (N, T) with the labels of the N rows; a label that is no type makes a row all negative."""
    known = torch.tensor([label in types for label in labels])
    truth = torch.tensor([types.index(label) for label in labels if label in types], dtype=torch.long)
    guess = strengths[known].argmax(1)
    confusion = torch.zeros(len(types), len(types), dtype=torch.long)
    confusion.index_put_((truth, guess), torch.ones_like(truth), accumulate=True)
    f1 = 2 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
    target = torch.tensor([[float(label == name) for name in types] for label in labels])
    bins = (strengths * 10).long().clamp(0, 9).flatten()
    gap = torch.zeros(10).index_add_(0, bins, (strengths - target).flatten()).abs().sum() / target.numel()
    accuracy, macro_f1 = (guess == truth).float().mean().item(), f1.mean().item()
    return Figures(types, strengths, highest, accuracy, f1.tolist(), macro_f1, gap.item(), confusion)
