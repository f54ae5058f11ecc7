"""Figures of a classifier of question types: accuracy, F1, calibration, confusion, and what a threshold is worth."""

import zlib
from typing import NamedTuple

import torch

CHOSEN = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # thresholds shown for --chosen-min
SHARE = 0.4  # of the texts that `judge_split` gives to the judge
REJECTED = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # and for --rejected-max


class Figures(NamedTuple):
    """`strengths` (N, T) are those that were graded; the rest says how they compare with the labels."""

    types: list[str]
    strengths: torch.Tensor
    accuracy: float  # strongest type = labelled type, over rows of a known type
    macro_f1: float
    f1: dict[str, float]
    auc: dict[str, float]  # P(a question of the type is given a higher strength for it than one of another type)
    ece: float  # mean gap between strength and share of positives, ten equal bins, over all N T strengths
    confusion: torch.Tensor  # (T, T): row labelled type, column strongest type
    chosen: list[tuple[float, float, float]]  # (at least, precision, share of questions kept)
    rejected: list[tuple[float, float, float]]  # (at most, precision of "not of this type", share of own-type let in)
    highest: torch.Tensor  # (N, T) the highest of the opinions that each strength is made of

    def __str__(self) -> str:
        wide = max(map(len, self.types))
        short = [name[:9] for name in self.types]
        lines = [f"accuracy {self.accuracy:.3f}   macro-F1 {self.macro_f1:.3f}   calibration error {self.ece:.3f}", ""]
        lines.append(f"{'labelled, by strongest':<{wide}}     F1    AUC  " + "".join(f"{name:>10}" for name in short))
        for name, row in zip(self.types, self.confusion.tolist(), strict=True):
            lines.append(
                f"{name:<{wide}}  {self.f1[name]:.3f}  {self.auc[name]:.3f}  "
                + "".join(f"{count:>10}" for count in row)
            )
        lines += ["", "--chosen-min    right   kept"]
        lines += [f"{at:>12.2f} {precision:>8.1%} {kept:>6.1%}" for at, precision, kept in self.chosen]
        lines += ["", "--rejected-max  right   own type let in"]
        lines += [f"{at:>14.2f} {precision:>6.1%} {kept:>8.1%}" for at, precision, kept in self.rejected]
        return "\n".join(lines)


def place(context: str) -> int:
    """Where a text stands in a fixed random order in which spacing and case play no part."""
    return zlib.crc32(" ".join(context.casefold().split()).encode())


def judge_split(rows, share: float = SHARE) -> tuple[list, list]:
    """Rows for the judge, about `share` of the texts, and rows for the scorer that gives rewards; no text is in both.

    A hash of the text decides, so that adding rows moves no others, and folds and held-out texts are independent of it.
    """
    chosen = {c for c in {r.context for r in rows} if zlib.crc32(f"judge {place(c)}".encode()) < share * 2**32}
    return [r for r in rows if r.context in chosen], [r for r in rows if r.context not in chosen]


def rows_to_learn_from(rows, held_out: float, seed: int) -> tuple[list, list]:
    """The rows that judge and scorer are fitted on: neither sees a held-out text, nor a text of the other one.

    With too few texts for both to meet every type, both get all that are not held out.
    """
    from socratiq.data import split_by_context

    rows = [row for row in rows if row.type]  # a question with a verdict alone tells nothing about types
    train = split_by_context(rows, held_out, seed)[0]
    parts = judge_split(train)
    types = {row.type for row in train}
    return parts if all({row.type for row in part} == types for part in parts) else (train, train)


def texts_of(rows) -> list[int]:
    """What a judge or a scorer keeps of the texts that it is fitted on: the place of each, sorted."""
    return sorted({place(r.context) for r in rows})


def contradictions(rows) -> list[str]:
    """One line for each question about one text that carries two types."""
    seen: dict[tuple[str, str], set[str]] = {}
    for r in rows:
        seen.setdefault((r.context, r.question), set()).add(r.type)
    return [f"{q!r} is labelled {' and '.join(sorted(t))} for one text" for (_, q), t in seen.items() if len(t) > 1]


def cross_validate(fit, rows, folds: int = 5) -> Figures:
    """Figures of strengths that are out of fold: `fit(rows)` never sees the text of a row that its result grades."""
    types = sorted({r.type for r in rows} - {"others"})
    strengths, highest = torch.zeros(2, len(rows), len(types))
    fold = [place(r.context) % folds for r in rows]
    for k in sorted(set(fold)):
        held = [i for i, f in enumerate(fold) if f == k]
        fitted = fit([r for r, f in zip(rows, fold, strict=True) if f != k])
        asked = [rows[i].context for i in held], [rows[i].question for i in held]
        where = torch.tensor(held)[:, None], torch.tensor([types.index(name) for name in fitted.types])
        strengths[where], highest[where] = fitted.strengths(*asked), fitted.highest(*asked)
    return figures(types, strengths, [r.type for r in rows], highest)


def figures(
    types: list[str], strengths: torch.Tensor, labels: list[str], highest: torch.Tensor | None = None
) -> Figures:
    """Compare strengths (N, T) with the labels of the N rows; a label that is no type makes a row all negative."""
    known = torch.tensor([label in types for label in labels])
    truth = torch.tensor([types.index(label) for label in labels if label in types], dtype=torch.long)
    guess = strengths[known].argmax(1)
    confusion = torch.zeros(len(types), len(types), dtype=torch.long)
    confusion.index_put_((truth, guess), torch.ones_like(truth), accumulate=True)
    hit, total = confusion.diagonal().float(), confusion.sum(0) + confusion.sum(1)
    f1 = 2 * hit / total.clamp(min=1)

    target = torch.tensor([[float(label == name) for name in types] for label in labels])
    bins = (strengths * 10).long().clamp(0, 9).flatten()
    gap = torch.zeros(10).index_add_(0, bins, (strengths - target).flatten()).abs()

    right, top = guess == truth, strengths[known].amax(1)

    def share(of: torch.Tensor) -> float:
        return of.float().mean().item() if len(of) else float("nan")

    return Figures(
        types=types,
        strengths=strengths,
        accuracy=share(right),
        macro_f1=f1.mean().item(),
        f1=dict(zip(types, f1.tolist(), strict=True)),
        auc={name: auc(x[y == 1], x[y == 0]) for name, x, y in zip(types, strengths.T, target.T, strict=True)},
        ece=gap.sum().item() / max(1, target.numel()),
        confusion=confusion,
        chosen=[(at, share(right[top >= at]), share(top >= at)) for at in CHOSEN],
        rejected=[(at, share(target[strengths <= at] == 0), share(strengths[target == 1] <= at)) for at in REJECTED],
        highest=strengths if highest is None else highest,
    )


def auc(high: torch.Tensor, low: torch.Tensor) -> float:
    """Probability that a number of `high` (N,) is above one of `low` (M,), ties counting half; nan if one is empty."""
    both, group = torch.cat([high, low]).unique(return_inverse=True)
    ones = torch.ones(len(group))
    n_high, n_low = torch.zeros(len(both)), torch.zeros(len(both))
    n_high.index_add_(0, group[: len(high)], ones[: len(high)])
    n_low.index_add_(0, group[len(high) :], ones[len(high) :])
    below = n_low.cumsum(0) - n_low / 2
    return ((n_high * below).sum() / (len(high) * len(low))).item() if len(high) and len(low) else float("nan")
