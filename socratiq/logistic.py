"""Logistic regression, by hand: one output per type, over hashed n-grams or over hidden states."""

import zlib

import torch
import torch.nn.functional as F

from socratiq import gates

BUCKETS = 2**16
L2_NGRAMS, L2_PROBE = 3e-4, 2e-5  # by cross-validation on people's labels of five types


def ngrams(question: str) -> list[int]:
    """Buckets of the set of words, neighbouring pairs, pairs with a gap, word beginnings and pairs of those."""
    w = ["<s>", *gates.tokens(question), "</s>"]
    stems = [gates.stem(token) + "*" for token in w]
    grams = {*w, *stems}
    grams |= {f"{a} {b}" for tokens in (w, stems) for a, b in zip(tokens, tokens[1:])}  # noqa: B905, RUF007
    grams |= {f"{a} _ {b}" for a, b in zip(w, w[2:])}  # noqa: B905
    return sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in grams})


def bags(questions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Buckets of all questions in one row (M,), and where each question's begin (N,)."""
    ids = [ngrams(question) for question in questions]
    sizes = torch.tensor([len(i) for i in ids], dtype=torch.long)
    return torch.tensor([bucket for i in ids for bucket in i], dtype=torch.long), sizes.cumsum(0) - sizes


def minimise(logits, parameters: list[torch.Tensor], target: torch.Tensor, l2: float, steps: int = 60) -> None:
    """Logistic regression by L-BFGS from zero: mean over rows of the cross-entropies, plus l2 / 2 |weights|^2.

    `logits()` gives (N, T) from the parameters (weights first, biases last); target (N, T) is 0 or 1.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.LBFGS(parameters, max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(logits(), target, reduction="sum") / len(target)
        value = value + l2 / 2 * parameters[0].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    for parameter in parameters:
        parameter.requires_grad_(False)


def fit_ngrams(questions: list[str], target: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"weight" (BUCKETS, T), "bias" (T,)}. Grams that lean to a type may weigh more than those that all share."""
    ids, starts = bags(questions)
    used, ids = ids.unique(return_inverse=True)  # fit only the U buckets that occur
    row = torch.bucketize(torch.arange(len(ids)), starts, right=True) - 1
    count = torch.zeros(len(used)).index_add_(0, ids, torch.ones(len(ids)))
    by_type = torch.zeros(len(used), target.shape[1]).index_add_(0, ids, target[row])
    # Each gram's weight is w * telling: the root of its types' KL divergence from their shares in all rows.
    share, base = (by_type + 0.5) / (by_type + 0.5).sum(1, keepdim=True), (target.sum(0) + 0.5) / (target + 0.5).sum()
    telling = (share * (share / base).log()).sum(1).clamp(min=0.02).sqrt() * (count > 0)  # (U,)
    w, b = torch.zeros(len(used), target.shape[1]), torch.zeros(target.shape[1])
    minimise(lambda: F.embedding_bag(ids, w * telling[:, None], starts, mode="sum") + b, [w, b], target, L2_NGRAMS)
    weight = torch.zeros(BUCKETS, target.shape[1])
    weight[used] = w * telling[:, None]
    return {"weight": weight, "bias": b}


def fit_probe(features: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"probe" (D, T), "probe_bias" (T,)}: a linear layer over hidden states (N, D), which are standardised first."""
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6) * features.shape[1] ** 0.5
    x = (features - mean) / scale
    w, b = torch.zeros(x.shape[1], target.shape[1]), torch.zeros(target.shape[1])
    minimise(lambda: x @ w + b, [w, b], target, L2_PROBE)
    w = w / scale[:, None]
    return {"probe": w, "probe_bias": b - mean @ w}
