"""How strongly a question is of each type, and the reward made of it.

    python -m socratiq.scorer --data sample --out runs/scorer --model smollm2

    reward = strength of the wanted type ^ 0.7 * form * originality * sentence * relatedness * fluency

Strength is one logistic output per type over n-grams, so that a question can be of two types; with a language model it
is the geometric mean of that and of a second opinion, a linear probe on the model's hidden states. The model also says
how much likelier the text makes a question (relatedness) and how odd its tokens are (fluency). Every gate is in 0..1
and near 1 for nearly all genuine questions. Strength counts a little less than the gates: a string made to please a
classifier has strengths of 1 and loses nothing by it, while genuine questions that are hard to classify are worth more.
Rows labelled `others` are negatives.

Without a language model there is no fluency, and relatedness counts shared words: good enough for grading types and for
a quick look. As a reward for PPO it was gamed within 16 iterations.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from socratiq.prompts import build_prompt
from socratiq.run.errors import UserError
from socratiq.scorer import gates, grading
from socratiq.scorer.gates import GATES, Ramp
from socratiq.scorer.grading import Figures, place
from socratiq.scorer.language_model import LanguageModel, Reading, open_language_model
from socratiq.scorer.ngrams import fit_strengths, mean_opinion, minimise, opinions
from socratiq.taxonomy import OTHERS

EXPONENT = 0.7  # of the strength; 0.5 and 1 are each worse against one kind of string or another
DOUBT = 1.0  # relatedness is sigmoid(log-odds + DOUBT), in doubt for the question
L2_RELATED = 1e-3
GATE_ROWS = 256  # rows from which relatedness and fluency are learnt: a language model has to read their texts
ODD = 0.05  # share of genuine questions that pay something for each sign of fluency
VERSION = 6  # of the saved files; 6: fluency by log-probs alone
SETTINGS = ("texts", "model", "signature", "rarity", "sentence", "fluency")


class Scorer:
    """Strengths per question type, gates, reward. Build one with `Scorer.fit` or `Scorer.load`."""

    def __init__(self, types: list[str], tensors: dict[str, torch.Tensor], settings: dict, lm: LanguageModel | None):
        self.types = types
        self.tensors = tensors  # weight, bias; probe, probe_bias with a language model; related, related_bias
        self.settings = settings  # the texts it was fitted on, the language model's name and signature, the gates'
        self.lm = lm

    @classmethod
    def fit(cls, rows, lm: LanguageModel | None = None) -> Scorer:
        """Fit on rows with .context, .question and .type; those without a type are left out.

        The same rows in any order give the same scorer. Raises UserError if no row has a type.
        """
        rows = sorted((r for r in rows if r.type), key=lambda r: (r.question, r.type, r.context))
        types = sorted({r.type for r in rows} - {OTHERS})
        contexts, questions = [r.context for r in rows], [r.question for r in rows]
        settings = {"texts": sorted(set(map(place, contexts))), "model": lm.name if lm else "none"}
        settings |= {"signature": lm.signature() if lm else [], "rarity": gates.fit_rarity(contexts)}
        settings["sentence"] = gates.fit_sentence(contexts, questions)
        scorer = cls(types, fit_strengths(rows, types, features_of(lm, questions)), settings, lm)
        scorer.fit_gates(sorted(rows, key=lambda r: place(r.context))[:GATE_ROWS])
        return scorer

    def fit_gates(self, rows) -> None:
        """Relatedness: weights and bias that tell each question's own text from another one of these rows, the
        next in a fixed random order. Fluency: ramps below which few genuine questions are."""
        texts = sorted({r.context for r in rows}, key=lambda text: (place(text), text))
        other = dict(zip(texts, texts[1:] + texts[:1], strict=True))
        contexts = [r.context for r in rows] + [other[r.context] for r in rows]
        questions = [r.question for r in rows] * 2
        alone, given = self.read(contexts, questions)
        x = self.evidence(contexts, questions, alone, given)
        own = torch.arange(len(x))[:, None] < len(rows)
        w, b = torch.zeros(x.shape[1], 1), torch.zeros(1)
        minimise(lambda: x @ w + b, [w, b], own.float(), L2_RELATED)
        self.tensors["related"], self.tensors["related_bias"] = w, b
        signs = zip(*map(fluency_signs, given[: len(rows)]), strict=True)  # of each sign, those of all rows
        self.settings["fluency"] = [Ramp.below(list(sign), ODD) for sign in signs]

    def read(self, contexts: list[str], questions: list[str]) -> tuple[list[Reading], list[Reading]]:
        """What the language model reads: the questions alone, and after their contexts. Nothing without one."""
        if self.lm is None:
            return [], []
        return self.lm.read([""] * len(questions), questions), self.lm.read(contexts, questions)

    def strengths(self, contexts: list[str], questions: list[str]) -> torch.Tensor:
        """(N, T) in 0..1, columns in the order of `.types`: how strongly each question is of each type."""
        return mean_opinion(opinions(self.tensors, questions, features_of(self.lm, questions)))

    def evidence(self, contexts, questions, alone: list[Reading], given: list[Reading]) -> torch.Tensor:
        """(N, 1 or 2) signs that a question is about its context: the rarest word that both share, and with a language
        model how much likelier the context makes it.

        That is log p(question | context) - log p(question) without the first token, which every text helps, over the
        root of the question's length: long questions have more to gain.
        """
        rarity = self.settings["rarity"]
        columns = [[gates.rarest_shared(c, q, rarity)] for c, q in zip(contexts, questions, strict=True)]
        for column, a, g in zip(columns, alone, given, strict=False):
            column.append((g.logprobs - a.logprobs)[1:].sum().item() / max(1, len(g.logprobs)) ** 0.5)
        return torch.tensor(columns)

    def fluency(self, given: Reading) -> float:
        """The worse of a question's two signs counts."""
        signs = zip(self.settings["fluency"], fluency_signs(given), strict=True)
        return min(Ramp(*ramp)(sign) for ramp, sign in signs)

    def graded(self, contexts, questions, types) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The reward (N,), and every part of it by name, each (N,) in 0..1. Raises UserError for an unknown type."""
        unknown = set(types) - set(self.types)
        if unknown:
            raise UserError(f"the scorer does not know the type {min(unknown)!r}; it knows {', '.join(self.types)}")
        if not questions:
            return torch.zeros(0), {}
        alone, given = self.read(contexts, questions)
        found = opinions(self.tensors, questions, torch.stack([a.features for a in alone]) if alone else None)
        column = torch.tensor([self.types.index(t) for t in types])[:, None]
        evidence = self.evidence(contexts, questions, alone, given)
        log_odds = (evidence @ self.tensors["related"] + self.tensors["related_bias"])[:, 0]  # against another text
        prompts = map(build_prompt, contexts, types)
        parts = {
            "strength": mean_opinion(found).gather(1, column)[:, 0],
            "form": torch.tensor([gates.form(q) for q in questions]),
            "originality": torch.tensor([*map(gates.originality, prompts, questions)]),
            "sentence": torch.tensor([gates.sentence(q, **self.settings["sentence"]) for q in questions]),
            "relatedness": torch.sigmoid(log_odds + DOUBT),
        }
        if self.lm:
            parts["fluency"] = torch.tensor([*map(self.fluency, given)])
        reward = parts["strength"] ** EXPONENT * torch.stack([parts[name] for name in GATES if name in parts]).prod(0)
        if self.lm:
            parts |= {name: x.gather(1, column)[:, 0] for name, x in zip(("ngrams", "probe"), found, strict=True)}
        return reward, parts

    def reward(self, contexts: list[str], questions: list[str], types: list[str]) -> torch.Tensor:
        """(N,) in 0..1."""
        return self.graded(contexts, questions, types)[0]

    def explain(self, context: str, question: str) -> dict:
        """All that the scorer thinks of one question: by type its strength and reward, and every gate."""
        n = len(self.types)
        reward, parts = self.graded([context] * n, [question] * n, self.types)
        found = {name: dict(zip(self.types, x.tolist(), strict=True)) for name, x in parts.items()}
        found |= {name: parts[name][0].item() for name in GATES if name in parts}
        return found | {"reward": dict(zip(self.types, reward.tolist(), strict=True))}

    def save(self, folder: str | Path) -> None:
        """Write scorer.safetensors and scorer.json."""
        from safetensors.torch import save

        from socratiq.run.files import atomic_write

        settings = {"version": VERSION, "types": self.types, **self.settings}
        atomic_write(Path(folder) / "scorer.safetensors", save(self.tensors))
        atomic_write(Path(folder) / "scorer.json", json.dumps(settings, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", dtype: str = "auto") -> Scorer:
        """Read what `save` wrote, and open the language model that it was fitted with.

        Raises UserError if there is nothing that can be read, or if that is another model now.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(Path(folder) / "scorer.safetensors")
            settings = json.loads((Path(folder) / "scorer.json").read_text(encoding="utf-8"))
            if settings.pop("version", 1) != VERSION:
                raise ValueError("fitted by another version of socratiq")
            tensors["weight"], tensors["bias"], tensors["related_bias"]  # a KeyError if one is missing
            types, settings = settings["types"], {name: settings[name] for name in SETTINGS}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"{folder}: no scorer that can be read ({error}); fit one with python -m socratiq.scorer --out {folder}"
            ) from None
        lm = open_language_model(settings["model"], device, dtype)
        known, now = settings["signature"], lm.signature() if lm else []
        if len(known) != len(now) or any(abs(a - b) > 0.25 for a, b in zip(known, now, strict=True)):
            raise UserError(f"{folder}: {settings['model']} has changed since the scorer was fitted; fit it anew")
        return cls(types, tensors, settings, lm)


def features_of(lm: LanguageModel | None, questions: list[str]) -> torch.Tensor | None:
    """(N, 4 H) hidden states of the questions read alone, for the probe; None without a language model."""
    if lm is None or not questions:
        return None
    return torch.stack([reading.features for reading in lm.read([""] * len(questions), questions)])


def fluency_signs(given: Reading) -> tuple[float, float]:
    """Mean log-prob of a question's tokens after its text, and of their lowest quarter.

    The first token, which follows nothing, is none of the lowest.
    """
    low = given.logprobs[1:].sort().values
    if not len(low):
        return -100.0, -100.0  # too short to have any
    return given.logprobs.mean().item(), low[: max(1, len(low) // 4)].mean().item()


def cross_validate(rows, folds: int = 5, lm: LanguageModel | None = None, held_out=frozenset()) -> Figures:
    """Grade every row by a fit that saw neither it nor its text: strengths (N, T) in the order of the rows.

    Rows whose context is `held_out` are graded by a fit to all others, and teach nothing.
    """
    types = sorted({r.type for r in rows if r.context not in held_out} - {OTHERS})
    questions = [r.question for r in rows]
    features = features_of(lm, questions)
    fold = [folds if r.context in held_out else place(r.context) % folds for r in rows]
    found = torch.zeros(1 + (lm is not None), len(rows), len(types))
    for k in sorted(set(fold)):
        learn = [i for i, f in enumerate(fold) if f not in (k, folds)]
        grade = [i for i, f in enumerate(fold) if f == k]
        tensors = fit_strengths([rows[i] for i in learn], types, None if lm is None else features[learn])
        found[:, grade] = opinions(tensors, [questions[i] for i in grade], None if lm is None else features[grade])
    return grading.figures(types, mean_opinion(found), found.amax(0), [r.type for r in rows])
