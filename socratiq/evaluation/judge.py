"""A second opinion for evaluation only: a classifier of question types that no stage is trained on.

A policy that has learnt to please the scorer need not please anybody else. The judge has little in common with it:

- other texts: its own share of the training texts, unless they are too few (`scorer.grading.rows_to_learn_from`);
- other features: runs of characters and the first words of a question, not words and word pairs;
- another objective: least squares, not likelihood.

`evaluate` fits it anew each time, in seconds. It decides nothing in training and is never saved.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F

from socratiq.run.errors import UserError
from socratiq.scorer.gates import tokens
from socratiq.scorer.ngrams import logistic_regression

BUCKETS = 2**14
RIDGE = 0.3  # weight of |w|^2 against the squared errors
MAX_ROWS = 4000  # the fit inverts a matrix of rows x rows


class Judge(NamedTuple):
    """Strengths of question types, by `Judge.fit(rows)`."""

    types: list[str]
    weight: torch.Tensor  # (BUCKETS, T)
    rarity: torch.Tensor  # (BUCKETS,): log of rows / rows with the feature
    slope: torch.Tensor  # (T,) and
    bias: torch.Tensor  # (T,): from scores to probabilities

    @classmethod
    def fit(cls, rows) -> Judge:
        """Fit on rows with .context, .question and .type; "others" is no type, and a row without one is left out.

        Raises UserError if no row has a type.
        """
        rows = sorted((zlib.crc32(row.context.encode()), row.question, row.type) for row in rows if row.type)[:MAX_ROWS]
        types = sorted({name for *_, name in rows} - {"others"})
        if not types:
            raise UserError(
                "too few rows to fit the judge: no row outside the held-out texts has a type; give more rows"
            )
        present = torch.zeros(len(rows), BUCKETS)
        for i, (_, question, _) in enumerate(rows):
            present[i, buckets(question)] = 1.0
        count = present.sum(0)
        rarity = torch.where(count > 0, torch.log((1 + len(rows)) / (1 + count)), 0.0)  # (BUCKETS,)
        x = F.normalize(present * rarity)  # (N, BUCKETS), rows of length 1: long questions weigh no more
        target = torch.tensor([[float(of_row == name) for name in types] for *_, of_row in rows])  # (N, T)
        weight, unseen = ridge(x, target - target.mean(0))
        columns = zip(unseen.split(1, dim=1), target.split(1, dim=1), strict=True)
        platt = [logistic_regression(score, of_type, 1e-4) for score, of_type in columns]  # Platt 1999, for each type
        slope, bias = (torch.cat([part.view(1) for part in parts]) for parts in zip(*platt, strict=True))
        return cls(types, weight, rarity, slope, bias)

    def strengths(self, contexts: list[str], questions: list[str]) -> torch.Tensor:
        """(N, T) in 0..1, columns in the order of `.types`: how likely each question is of each type.

        The contexts, which the scorer wants, play no part.
        """
        score = torch.zeros(len(questions), len(self.types))
        for i, question in enumerate(questions):
            found = buckets(question)
            score[i] = self.rarity[found] @ self.weight[found] / self.rarity[found].norm().clamp(min=1e-9)
        return torch.sigmoid(score * self.slope + self.bias)


def buckets(question: str) -> list[int]:
    """Hashes of the runs of 2 to 5 characters, of the first three words by position, and of the first 2 and 3 words."""
    said = tokens(question)
    text = f"^{' '.join(said)} "
    pieces = {text[i : i + n] for n in (2, 3, 4, 5) for i in range(len(text) - n + 1)}
    pieces |= {f"{i}={word}" for i, word in enumerate(said[:3])}
    pieces |= {f"0={' '.join(said[:n])}" for n in (2, 3)}
    return sorted({zlib.crc32(piece.encode()) % BUCKETS for piece in pieces})


def ridge(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression of y (N, T) on x (N, D): weights (D, T), and the prediction of each row by a fit without it.

    In the dual form, w = x' (x x' + ridge)^-1 y, the matrix to invert is N x N instead of D x D. The leave-one-out
    predictions then cost nothing: y_i - dual_i / inverse_ii.
    """
    inverse = torch.linalg.inv(x @ x.T + RIDGE * torch.eye(len(x)))
    dual = inverse @ y
    return x.T @ dual, y - dual / inverse.diagonal()[:, None]
