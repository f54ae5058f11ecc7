"""Strengths of question types by logistic regression, written by hand: one output per type.

Features x are (N, D): hashed n-grams (sparse), or a language model's hidden states. Logits are x @ weight + bias.
"""

import zlib
from itertools import chain, pairwise

import numpy as np
import torch
import torch.nn.functional as F

from socratiq.run.errors import UserError
from socratiq.scorer import gates
from socratiq.scorer.grading import place

BUCKETS = 2**18  # 2,535 questions have 63,000 grams: in 2^16 most met another there, at .003 to .02 of macro-F1
L2_NGRAMS, L2_PROBE = 3e-4, 2e-5  # by cross-validation on people's labels of five types
L2_CALIBRATION = 1e-4
CALIBRATION_PARTS = 3


def ngrams(question: str) -> list[int]:
    """Buckets of the set of words, neighbouring pairs, pairs with a gap, word beginnings and pairs of those."""
    w = ["<s>", *gates.tokens(question), "</s>"]
    stems = [token[:4] + "*" for token in w]
    pairs, gaps = chain(pairwise(w), pairwise(stems)), zip(w, w[2:], strict=False)
    grams = {*w, *stems, *map(" ".join, pairs), *map(" _ ".join, gaps)}
    return sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in grams})


def bags(questions: list[str]) -> torch.Tensor:
    """(N, BUCKETS) sparse, 1.0 where a question has an n-gram of a bucket."""
    found = [ngrams(question) for question in questions]
    rows = np.repeat(np.arange(len(found)), np.fromiter(map(len, found), np.int64))
    indices = torch.from_numpy(np.stack([rows, np.fromiter(chain(*found), np.int64)]))
    size, ones = (len(found), BUCKETS), torch.ones(len(rows))
    return torch.sparse_coo_tensor(indices, ones, size, is_coalesced=True, check_invariants=False)


def logistic_regression(x: torch.Tensor, target: torch.Tensor, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (D, T) and bias (T,) for x (N, D), which may be sparse, and target (N, T), which is 0 or 1.

    They minimise the mean over rows of the summed cross-entropies plus l2 / 2 |weight|^2; by L-BFGS from zero.
    """
    weight = torch.zeros(x.shape[1], target.shape[1], requires_grad=True)
    bias = torch.zeros(target.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weight + bias, target, reduction="sum") / len(target)
        value = value + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def fit_ngrams(x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (BUCKETS, T) and bias (T,). Grams that lean to a type may weigh more than those that all share."""
    used = x.coalesce().indices()[1].unique()  # fit only the U buckets that occur
    x = x.index_select(1, used)
    # Each gram is scaled by the root of its types' KL divergence from their shares in all rows.
    by_type, base = x.T @ target + 0.5, (target.sum(0) + 0.5) / (target + 0.5).sum()
    share = by_type / by_type.sum(1, keepdim=True)  # (U, T)
    telling = (share * (share / base).log()).sum(1).clamp(min=0.02).sqrt()  # (U,)
    weight, bias = logistic_regression((x * telling).coalesce(), target, L2_NGRAMS)
    return torch.zeros(BUCKETS, target.shape[1]).index_copy_(0, used, weight * telling[:, None]), bias


def fit_probe(x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (D, T) and bias (T,) of a linear layer over hidden states (N, D), standardised while it is fitted."""
    mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6) * x.shape[1] ** 0.5
    weight, bias = logistic_regression((x - mean) / scale, target, L2_PROBE)
    weight = weight / scale[:, None]
    return weight, bias - mean @ weight


def calibrated(fit, x: torch.Tensor, target: torch.Tensor, part: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of fit(x, target), scaled so that sigmoids of the logits are right about unseen rows.

    Few rows give cautious weights, many give bold ones. So each part of the rows (numbered by `part`) is graded by a
    fit to the others, and one slope and one offset for all types are learnt from those logits (Platt 1999).
    """
    weight, bias = fit(x, target)
    if len(set(part)) == 1:
        return weight, bias
    unseen = torch.zeros_like(target)
    for k in sorted(set(part)):
        held, rest = (torch.tensor([i for i, p in enumerate(part) if (p == k) == own]) for own in (True, False))
        w, b = fit(x.index_select(0, rest), target[rest])
        unseen[held] = x.index_select(0, held) @ w + b
    slope, offset = logistic_regression(unseen.view(-1, 1), target.view(-1, 1), L2_CALIBRATION)
    return weight * slope, bias * slope + offset


def fit_strengths(rows, types: list[str], features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weight and bias of the n-grams and, with features (N, D > 0) of the rows' questions, of the probe on these.

    Raises UserError if no row has a type.
    """
    target = torch.tensor([[float(row.type == name) for name in types] for row in rows])  # (N, T)
    part = [place(row.context) % CALIBRATION_PARTS for row in rows]
    if not target.any():  # among all rows, or among those that a fold leaves
        raise UserError("too few rows to fit a scorer: it needs questions of a type, about at least a handful of texts")
    tensors = {}
    tensors["weight"], tensors["bias"] = calibrated(fit_ngrams, bags([row.question for row in rows]), target, part)
    if features.shape[1]:
        tensors["probe"], tensors["probe_bias"] = calibrated(fit_probe, features, target, part)
    return tensors


def opinions(tensors: dict[str, torch.Tensor], questions: list[str], features: torch.Tensor) -> torch.Tensor:
    """(1 or 2, N, T) in 0..1: how strongly each question is of each type, by n-grams and by the probe on features."""
    logits = [bags(questions) @ tensors["weight"] + tensors["bias"]]
    if features.shape[1]:
        logits.append(features @ tensors["probe"] + tensors["probe_bias"])
    return torch.sigmoid(torch.stack(logits))


def mean_opinion(found: torch.Tensor) -> torch.Tensor:
    """(N, T) the geometric mean of the opinions (1 or 2, N, T): the strength."""
    return found.prod(0) ** (1 / len(found))
