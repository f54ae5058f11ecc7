"""Logistic regression, by hand: one output per type, over hashed n-grams or over hidden states."""

import zlib

import torch
import torch.nn.functional as F

from socratiq.scorer import gates

BUCKETS = 2**18  # 2,535 questions have 63,000 grams: in 2^16 most met another there, at .003 to .02 of macro-F1
AT_ONCE = 4096  # questions whose grams are in memory together when they are graded
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


def fit_ngrams(questions: list[str], target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (BUCKETS, T) and bias (T,). Grams that lean to a type may weigh more than those that all share."""
    ids, starts = bags(questions)
    used, ids = ids.unique(return_inverse=True)  # fit only the U buckets that occur
    row = torch.bucketize(torch.arange(len(ids)), starts, right=True) - 1
    by_type = torch.zeros(len(used), target.shape[1]).index_add_(0, ids, target[row])
    # Each gram's weight is w * telling: the root of its types' KL divergence from their shares in all rows.
    share, base = (by_type + 0.5) / (by_type + 0.5).sum(1, keepdim=True), (target.sum(0) + 0.5) / (target + 0.5).sum()
    telling = (share * (share / base).log()).sum(1, keepdim=True).clamp(min=0.02).sqrt()  # (U, 1)
    w, b = torch.zeros(len(used), target.shape[1]), torch.zeros(target.shape[1])

    def logits():  # F.embedding_bag's gradient takes three times as long
        return torch.zeros_like(target).index_add(0, row, (w * telling).index_select(0, ids)) + b

    minimise(logits, [w, b], target, L2_NGRAMS)
    return torch.zeros(BUCKETS, target.shape[1]).index_copy_(0, used, w * telling), b


def ngram_logits(questions: list[str], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(N, T) from weight (BUCKETS, T) and bias (T,)."""
    logits = [torch.zeros(0, weight.shape[1])]
    for start in range(0, len(questions), AT_ONCE):
        ids, starts = bags(questions[start : start + AT_ONCE])
        logits.append(F.embedding_bag(ids, weight, starts, mode="sum") + bias)
    return torch.cat(logits)


def probe_logits(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(N, T) from features (N, D), weight (D, T) and bias (T,)."""
    return features @ weight + bias


def fit_probe(features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (D, T) and bias (T,) of a linear layer over hidden states (N, D), standardised while it is fitted."""
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6) * features.shape[1] ** 0.5
    x = (features - mean) / scale
    w, b = torch.zeros(x.shape[1], target.shape[1]), torch.zeros(target.shape[1])
    minimise(lambda: x @ w + b, [w, b], target, L2_PROBE)
    w = w / scale[:, None]
    return w, b - mean @ w


def calibrated(fit, logits, inputs, target: torch.Tensor, part: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of fit(inputs, target), scaled so that sigmoids of the logits are right about unseen rows.

    Few rows give cautious weights, many give bold ones. So each part of the rows (numbered by `part`) is graded by a
    fit to the others, and one slope and one offset for all types are learnt from those logits.
    """
    weight, bias = fit(inputs, target)
    unseen, slope, offset = torch.zeros_like(target), torch.zeros(1), torch.zeros(1)
    for k in sorted(set(part)) if len(set(part)) > 1 else ():
        held = [i for i, p in enumerate(part) if p == k]
        rest = [i for i, p in enumerate(part) if p != k]
        unseen[held] = logits(pick(inputs, held), *fit(pick(inputs, rest), target[rest]))
    if len(set(part)) > 1:
        minimise(lambda: unseen * (1 + slope) + offset, [slope, offset], target, 1e-3)
    return weight * (1 + slope), bias * (1 + slope) + offset


def pick(inputs, indices: list[int]):
    """Rows of a list or of a tensor."""
    return inputs[indices] if isinstance(inputs, torch.Tensor) else [inputs[i] for i in indices]
