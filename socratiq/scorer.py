"""Strength of each question type in a question, and the reward made of it.

    python -m socratiq.scorer --data sample --out runs/scorer

One linear layer over hashed n-grams gives one independent strength per type (a question can be of two types). The reward
multiplies the strength of the wanted type by cheap gates, so that cue words alone earn nothing. Fitted in seconds from
labelled rows; rows labelled `others` are negatives.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from socratiq import gates
from socratiq.errors import UserError

BUCKETS = 2**16


def ngrams(question: str) -> list[int]:
    """Buckets of the set of words, neighbouring pairs, pairs with a gap and word beginnings of a question."""
    w = ["<s>", *gates.words(question), "</s>"]
    grams = {*w, *zip(w, w[1:], strict=False), *((a, "_", b) for a, b in zip(w, w[2:], strict=False))}
    grams |= {gates.stem(x) + "*" for x in w}
    return sorted({zlib.crc32(" ".join(g if isinstance(g, tuple) else (g,)).encode()) % BUCKETS for g in grams})


def bags(questions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bucket ids of all questions in one row (M,), and where each question's begin (N,)."""
    ids = [ngrams(q) for q in questions]
    starts = torch.tensor([0] + [len(i) for i in ids[:-1]]).cumsum(0)[: len(ids)]
    return torch.tensor([b for i in ids for b in i], dtype=torch.long), starts


class Figures(NamedTuple):
    """What cross-validation measured. `strengths` (N, T) are out of fold: no row graded by a scorer that saw it."""

    types: list[str]
    strengths: torch.Tensor
    accuracy: float
    macro_f1: float
    f1: dict[str, float]
    ece: float
    confusion: torch.Tensor  # (T, T): rows true type, columns strongest type


class Scorer:
    """Strengths per question type, gates, reward. Build one with `Scorer.fit` or `Scorer.load`."""

    def __init__(self, types: list[str], weight: torch.Tensor, bias: torch.Tensor, overlap: gates.Overlap):
        self.types, self.weight, self.bias, self.overlap = types, weight, bias, overlap  # weight (BUCKETS, T)
        self.lm = None
        self.warnings: list[str] = []

    @classmethod
    def fit(cls, rows, seed: int = 0, lm=None) -> "Scorer":
        """Fit on rows with .context, .question, .type; rows of type "others" are negatives for every type."""
        rows = sorted(rows, key=lambda r: (r.question, r.type, r.context))  # the order of the rows never matters
        types = sorted({r.type for r in rows} - {"others"})
        if not types:  # in all rows, or in those that a fold leaves
            raise UserError(
                "too few rows to fit a scorer: it needs questions of a type, about at least a handful of texts"
            )
        weight, bias = fit_linear([r.question for r in rows], [r.type for r in rows], types)
        scorer = cls(types, weight, bias, gates.Overlap.fit([r.context for r in rows]))
        scorer.warnings = contradictions(rows)
        return scorer

    def with_language_model(self, lm) -> "Scorer":
        """The same scorer, with a frozen language model (`LanguageModel`) at hand."""
        self.lm = lm
        return self

    def strengths(self, contexts: list[str], questions: list[str]) -> torch.Tensor:
        """(N, T) in 0..1, columns in the order of `.types`: how strongly each question is of each type."""
        if not questions:
            return torch.zeros(0, len(self.types))
        ids, starts = bags(questions)
        scale = torch.rsqrt(torch.diff(starts, append=torch.tensor([len(ids)])).float()).unsqueeze(1)
        return torch.sigmoid(F.embedding_bag(ids, self.weight, starts, mode="sum") * scale + self.bias)

    def components(self, contexts: list[str], questions: list[str], types: list[str]) -> dict[str, torch.Tensor]:
        """Every factor of the reward by name, each (N,) in 0..1. An unknown type raises KeyError."""
        index = {name: i for i, name in enumerate(self.types)}
        columns = torch.tensor([index[t] for t in types], dtype=torch.long)
        pairs = list(zip(contexts, questions, strict=True))
        return {
            "strength": self.strengths(contexts, questions).gather(1, columns[:, None])[:, 0],
            "form": torch.tensor([gates.form(q) for _, q in pairs]),
            "copying": torch.tensor([min(1.0, max(0.0, (14 - gates.copied(c, q)) / 7)) for c, q in pairs]),
            "relatedness": torch.tensor([0.6 + 0.4 * min(1.0, self.overlap(c, q) / 0.3) for c, q in pairs]),
        }

    def reward(self, contexts: list[str], questions: list[str], types: list[str], lm=None) -> torch.Tensor:
        """(N,) in 0..1: the product of the components."""
        return torch.stack(list(self.components(contexts, questions, types).values())).prod(0)

    def is_not(self, context: str, question: str, type: str, rejected_max: float) -> bool:
        """Whether n-grams (and the probe, with a language model) agree that the question is not of the type."""
        return self.strengths([context], [question])[0, self.types.index(type)].item() <= rejected_max

    def explain(self, context: str, question: str) -> dict:
        """All that the scorer thinks of one question: strengths by type, every component, reward by type."""
        n = len(self.types)
        parts = self.components([context] * n, [question] * n, self.types)
        reward = self.reward([context] * n, [question] * n, self.types)
        named = {name: value[0].item() for name, value in parts.items() if name != "strength"}
        return {
            "strengths": dict(zip(self.types, parts["strength"].tolist(), strict=True)),
            **named,
            "reward": dict(zip(self.types, reward.tolist(), strict=True)),
        }

    def save(self, folder: str | Path) -> None:
        """Write scorer.safetensors and scorer.json."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weight": self.weight.contiguous(), "bias": self.bias}, folder / "scorer.safetensors")
        settings = {"types": self.types, "idf": self.overlap.idf, "rarest": self.overlap.rarest}
        (folder / "scorer.json").write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Scorer":
        """Read what `save` wrote."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(Path(folder) / "scorer.safetensors")
            settings = json.loads((Path(folder) / "scorer.json").read_text(encoding="utf-8"))
            overlap = gates.Overlap(settings["idf"], settings["rarest"])
            return cls(settings["types"], tensors["weight"], tensors["bias"], overlap)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{folder}: no scorer that can be read ({error}); fit one with python -m socratiq.scorer --out {folder}"
            ) from None


def fit_linear(questions: list[str], labels: list[str], types: list[str], l2: float = 2e-5):
    """One logistic output per type over n-gram buckets, by L-BFGS from zero: weight (BUCKETS, T), bias (T,)."""
    ids, starts = bags(questions)
    used, ids = ids.unique(return_inverse=True)  # fit only the buckets that occur
    scale = torch.rsqrt(torch.diff(starts, append=torch.tensor([len(ids)])).float()).unsqueeze(1)
    target = torch.tensor([[float(label == t) for t in types] for label in labels])
    w = torch.zeros(len(used), len(types), requires_grad=True)
    b = torch.zeros(len(types), requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        logits = F.embedding_bag(ids, w, starts, mode="sum") * scale + b
        value = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(labels)
        value = value + l2 / 2 * w.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    weight = torch.zeros(BUCKETS, len(types))
    weight[used] = w.detach()
    return weight, b.detach()


def contradictions(rows) -> list[str]:
    """One line for each (context, question) that carries two types."""
    seen: dict[tuple[str, str], set[str]] = {}
    for r in rows:
        seen.setdefault((r.context, r.question), set()).add(r.type)
    return [
        f"two types for one question: {q!r} is {' and '.join(sorted(t))}" for (_, q), t in seen.items() if len(t) > 1
    ]


def fold_of(context: str, folds: int) -> int:
    return zlib.crc32(context.strip().encode()) % folds


def cross_validate(rows, folds: int = 5, seed: int = 0, lm=None) -> Figures:
    """Grade every row by a scorer that saw neither it nor its context."""
    types = sorted({r.type for r in rows} - {"others"})
    strengths = torch.zeros(len(rows), len(types))
    for fold in range(folds):
        held = [i for i, r in enumerate(rows) if fold_of(r.context, folds) == fold]
        scorer = Scorer.fit([r for r in rows if fold_of(r.context, folds) != fold], seed)
        if not held:
            continue
        out = scorer.strengths([rows[i].context for i in held], [rows[i].question for i in held])
        strengths[torch.tensor(held)[:, None], torch.tensor([types.index(t) for t in scorer.types])] = out
    return figures(types, strengths, [r.type for r in rows])


def figures(types: list[str], strengths: torch.Tensor, labels: list[str]) -> Figures:
    """Accuracy, F1 per type and confusion over rows of a known type; ECE over all strengths, ten equal bins."""
    known = torch.tensor([label in types for label in labels])
    truth = torch.tensor([types.index(label) for label in labels if label in types])
    guess = strengths[known].argmax(1)
    confusion = torch.zeros(len(types), len(types), dtype=torch.long)
    confusion.index_put_((truth, guess), torch.ones_like(truth), accumulate=True)
    hit = confusion.diagonal().float()
    f1 = 2 * hit / (confusion.sum(0) + confusion.sum(1)).clamp_min(1)
    target = torch.tensor([[float(label == t) for t in types] for label in labels])
    bins = (strengths * 10).long().clamp(max=9).flatten()
    gap = torch.zeros(10).index_add_(0, bins, (strengths - target).flatten()).abs()
    return Figures(
        types, strengths, (hit.sum() / len(truth)).item(), f1.mean().item(),
        dict(zip(types, f1.tolist(), strict=True)), (gap.sum() / target.numel()).item(), confusion,
    )  # fmt: skip


def batch_diversity(questions: list[str]) -> dict[str, float]:
    """Shares of questions in a batch that repeat an opener (first three words) or nearly repeat another question."""
    repeats, near = repeated(questions)
    n = max(1, len(questions))
    return {"diversity/repeated_openers": sum(repeats) / n, "diversity/near_duplicates": sum(near) / n}


def repeated(questions: list[str]) -> tuple[list[bool], list[bool]]:
    """For each question: does another one share its first three words; two thirds of its words?"""
    said = [gates.words(q) for q in questions]
    openers = [tuple(w[:3]) for w in said]
    sets = [set(w) for w in said]
    near = [any(i != j and len(a & b) >= 2 / 3 * len(a | b) for j, b in enumerate(sets)) for i, a in enumerate(sets)]
    return [openers.count(o) > 1 for o in openers], near


def main(argv: list[str] | None = None) -> int:
    raise SystemExit("command line: to come")


if __name__ == "__main__":
    sys.exit(main())
