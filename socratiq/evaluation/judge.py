"""A second opinion for evaluation only, on rows and by means that the scorer never had.

    python -m socratiq.evaluation.judge --data sample --out runs/judge

A policy that has learnt to please the scorer need not please anybody else. The judge is what it never met: it reads
runs of characters, not words; knows which words a question begins with; takes no more notice of a long question than of
a short one; and is fitted by least squares, not by likelihood.

Who learns from which texts (`scorer.grading.rows_to_learn_from`): the held-out ones are seen by nobody. The judge has a
share of the training texts, and the saved scorer, which verifies rejected questions and gives PPO its reward, has the
other share. All training texts, the judge's too, are seen by the policy in SFT, DPO and PPO, and by the graders with
which make_pairs.py chooses questions, none of which grades a text that it has seen.
"""

if __name__ == "__main__":  # from a file of its own, so that --help need not wait for torch
    from socratiq.run import errors
    from socratiq.scorer import fit

    raise SystemExit(errors.main(fit.fit_judge))

import json
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

from socratiq.run.errors import UserError
from socratiq.scorer import gates
from socratiq.scorer.grading import place, texts_of
from socratiq.scorer.ngrams import minimise

BUCKETS = 2**14
RIDGE = 0.3  # weight of |w|^2 against the squared errors
MOST = 4000  # rows; the fit solves for a square matrix of as many


def pieces(question: str) -> list[int]:
    """Buckets of the runs of 2 to 5 characters, the first three words by place, and the first two and three words."""
    said = gates.tokens(question)
    text = f"^{' '.join(said)} "
    found = {text[i : i + n] for n in (2, 3, 4, 5) for i in range(len(text) - n + 1)}
    found |= {f"{i}={word}" for i, word in enumerate(said[:3])} | {f"0={' '.join(said[:n])}" for n in (2, 3)}
    return sorted({zlib.crc32(piece.encode()) % BUCKETS for piece in found})


class Judge:
    """Strengths of question types. Build one with `Judge.fit` or `Judge.load`; the same calls as the scorer's."""

    def __init__(self, types: list[str], tensors: dict[str, torch.Tensor], texts: list[int] | None = None):
        self.types, self.tensors = types, tensors
        self.texts = texts  # that it was fitted on (`grading.texts_of`); None in what earlier versions saved

    @classmethod
    def fit(cls, rows, seed: int = 0) -> "Judge":
        """Fit on rows with .context, .question, .type, "others" being of no type. Nothing here is random."""
        rows = sorted(rows, key=lambda r: (place(r.context), r.question, r.type, r.context))[:MOST]
        types = sorted({r.type for r in rows} - {"others"})
        if not types:
            raise UserError("too few rows to fit a judge: it needs questions of a type")
        present = torch.zeros(len(rows), BUCKETS)
        for row, r in zip(present, rows, strict=True):
            row[pieces(r.question)] = 1.0
        count = present.sum(0)
        rarity = torch.where(count > 0, torch.log((1 + len(rows)) / (1 + count)), 0.0)
        x = F.normalize(present * rarity)  # (N, BUCKETS) of length 1
        target = torch.tensor([[float(r.type == name) for name in types] for r in rows])  # (N, T)
        centred = target - target.mean(0)
        # Ridge regression in its dual form: w = x' (x x' + ridge)^-1 y, a matrix of N x N instead of BUCKETS x BUCKETS.
        inverse = torch.linalg.inv(x @ x.T + RIDGE * torch.eye(len(rows)))
        dual = inverse @ centred
        # What each row would have been given by a fit without it, in closed form; probabilities are learnt from that.
        unseen = centred - dual / inverse.diagonal()[:, None]
        slope, bias = torch.zeros(len(types)), torch.zeros(len(types))
        minimise(lambda: unseen * slope + bias, [slope, bias], target, 1e-4)
        tensors = {"weight": x.T @ dual, "rarity": rarity, "slope": slope, "bias": bias}
        return cls(types, tensors, texts_of(rows))

    def strengths(self, contexts: list[str], questions: list[str]) -> torch.Tensor:
        """(N, T) in 0..1, columns in the order of `.types`: how likely each question is of each type."""
        t, rows = self.tensors, []
        for question in questions:
            ids = pieces(question)
            x = t["rarity"][ids]
            rows.append(x @ t["weight"][ids] / x.norm().clamp(min=1e-9))
        score = torch.stack(rows) if rows else torch.zeros(0, len(self.types))
        return torch.sigmoid(score * t["slope"] + t["bias"])

    highest = strengths  # of its opinions there is but one

    def save(self, folder: str | Path) -> None:
        """Write judge.safetensors and judge.json."""
        from safetensors.torch import save

        from socratiq.run.files import atomic_write

        atomic_write(Path(folder) / "judge.safetensors", save({k: v.contiguous() for k, v in self.tensors.items()}))
        known = {"types": self.types, "texts": self.texts}
        atomic_write(Path(folder) / "judge.json", json.dumps(known, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Judge":
        """Read what `save` wrote. Raises UserError if there is nothing that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            known = json.loads((Path(folder) / "judge.json").read_text(encoding="utf-8"))
            tensors = load_file(Path(folder) / "judge.safetensors")
            tensors = {name: tensors[name] for name in ("weight", "rarity", "slope", "bias")}
            return cls(known["types"], tensors, known.get("texts"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"{folder}: no judge that can be read ({error}); fit one with "
                f"python -m socratiq.evaluation.judge --out {folder}"
            ) from None
