"""How strongly a question is of each type, and the reward made of it.

    python -m socratiq.scorer --data sample --out runs/scorer --model smollm2

    reward = strength of the requested type ^ 0.7 * form * originality * sentence * relatedness * fluency

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from socratiq.prompts import build_prompt
from socratiq.run.errors import UserError
from socratiq.run.files import atomic_write
from socratiq.run.folder import fingerprint
from socratiq.scorer import gates
from socratiq.scorer.grading import place
from socratiq.scorer.language_model import LanguageModel, Reading, open_language_model, read
from socratiq.scorer.ngrams import fit_strengths, logistic_regression, mean_opinion, opinions
from socratiq.taxonomy import OTHERS

EXPONENT = 0.7  # of the strength; 0.5 and 1 are each worse against one kind of string or another
DOUBT = 1.0  # relatedness is sigmoid(log-odds + DOUBT), in doubt for the question
L2_RELATED = 1e-3
GATE_ROWS = 256  # rows from which relatedness and fluency are learnt: a language model has to read their texts
ODD = 0.05  # share of genuine questions that pay something for each sign of fluency
FOLDS = 5  # of the cross-validation
VERSION = 8  # of the saved files


class Scorer:
    """Strengths per question type, gates, reward. Build one with `Scorer.fit` or `Scorer.load`."""

    def __init__(self, tensors: dict[str, torch.Tensor], settings: dict, lm: LanguageModel | None):
        self.types: list[str] = settings["types"]
        self.tensors = tensors  # weight, bias; probe, probe_bias with a language model; related, related_bias
        self.settings = settings  # the texts it was fitted on, the language model's name, the gates'
        self.lm = lm

    @classmethod
    def fit(cls, rows, lm: LanguageModel | None = None) -> Scorer:
        """Fit on rows with .context, .question and .type; those without a type are left out.

        The same rows in any order give the same scorer. Raises UserError if no row has a type.
        """
        rows = sorted((r for r in rows if r.type), key=lambda r: (r.question, r.type, r.context))
        types = sorted({r.type for r in rows} - {OTHERS})
        contexts, questions = [r.context for r in rows], [r.question for r in rows]
        settings = {"version": VERSION, "types": types, "model": lm.name if lm else "none"}
        settings |= {"model content": fingerprint(lm.name) if lm and lm.name else None}
        settings |= {"texts": sorted(set(map(place, contexts)))}
        settings |= {"rarity": gates.fit_rarity(contexts), "sentence": gates.fit_sentence(contexts, questions)}
        scorer = cls(fit_strengths(rows, types, features(read(lm, questions))), settings, lm)
        scorer.fit_gates(sorted(rows, key=lambda r: place(r.context))[:GATE_ROWS])
        return scorer

    def fit_gates(self, rows) -> None:
        """Relatedness: weights and bias that tell each question's own text from another one of these rows, the
        next in a fixed random order. Fluency: ramps below which few genuine questions are."""
        texts = sorted({r.context for r in rows}, key=lambda text: (place(text), text))
        other = dict(zip(texts, texts[1:] + texts[:1], strict=True))
        contexts = [r.context for r in rows] + [other[r.context] for r in rows]
        questions = [r.question for r in rows] * 2
        given = read(self.lm, questions, contexts)
        x = self.evidence(contexts, questions, read(self.lm, questions), given)
        own = torch.arange(len(x))[:, None] < len(rows)
        self.tensors["related"], self.tensors["related_bias"] = logistic_regression(x, own.float(), L2_RELATED)
        signs = zip(*map(fluency_signs, given[: len(rows)]), strict=True)  # of each sign, those of all rows
        self.settings["fluency"] = [gates.ramp_below(list(sign), ODD) for sign in signs]

    def strengths(self, contexts: list[str], questions: list[str]) -> torch.Tensor:
        """(N, T) in 0..1, columns in the order of `.types`: how strongly each question is of each type."""
        return mean_opinion(opinions(self.tensors, questions, features(read(self.lm, questions))))

    def evidence(self, contexts, questions, alone: list[Reading], given: list[Reading]) -> torch.Tensor:
        """(N, 2) signs that a question is about its context: the rarest word that both share, and how much likelier the
        context makes it; 0 without a language model.

        That is log p(question | context) - log p(question) without the first token, which every text helps, over the
        root of the question's length: long questions have more to gain.
        """
        rarity = self.settings["rarity"]
        shared = [gates.rarest_shared(c, q, rarity) for c, q in zip(contexts, questions, strict=True)]
        gains = [g.logprobs - a.logprobs for a, g in zip(alone, given, strict=True)]
        likelier = [gain[1:].sum().item() / max(1, len(gain)) ** 0.5 for gain in gains]
        return torch.tensor([shared, likelier]).T

    def fluency(self, given: Reading) -> float:
        """The worse of a question's two signs counts."""
        signs = zip(self.settings["fluency"], fluency_signs(given), strict=True)
        return min(gates.ramp(sign, *bounds) for bounds, sign in signs)

    def graded(self, contexts, questions, types) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The reward (N,), and every part of it by name, each (N,) in 0..1. Raises UserError for an unknown type."""
        if unknown := set(types) - set(self.types):
            raise UserError(f"the scorer does not know the type {min(unknown)!r}; it knows {', '.join(self.types)}")
        alone, given = read(self.lm, questions), read(self.lm, questions, contexts)
        column = torch.tensor([self.types.index(t) for t in types], dtype=torch.long)[None, :, None]
        found = opinions(self.tensors, questions, features(alone)).take_along_dim(column, 2)  # (1 or 2, N, 1)
        evidence = self.evidence(contexts, questions, alone, given)
        log_odds = (evidence @ self.tensors["related"] + self.tensors["related_bias"])[:, 0]  # against another text
        parts = {
            "strength": mean_opinion(found)[:, 0],
            "form": torch.tensor([gates.form(q) for q in questions]),
            "originality": torch.tensor([*map(gates.originality, map(build_prompt, contexts, types), questions)]),
            "sentence": torch.tensor([gates.sentence(q, **self.settings["sentence"]) for q in questions]),
            "relatedness": torch.sigmoid(log_odds + DOUBT),
            "fluency": torch.tensor([self.fluency(reading) for reading in given]),
        }
        reward = parts["strength"] ** EXPONENT * torch.stack([parts[name] for name in gates.GATES]).prod(0)
        return reward, parts | dict(zip(("ngrams", "probe"), found[..., 0], strict=False))

    def reward(self, contexts: list[str], questions: list[str], types: list[str]) -> torch.Tensor:
        """(N,) in 0..1."""
        return self.graded(contexts, questions, types)[0]

    def explain(self, context: str, question: str) -> dict:
        """All that the scorer thinks of one question: by type its strength and reward, and every gate."""
        n = len(self.types)
        reward, parts = self.graded([context] * n, [question] * n, self.types)
        found = {"reward": reward, **parts}
        by_type = {name: dict(zip(self.types, x.tolist(), strict=True)) for name, x in found.items()}
        return by_type | {name: parts[name][0].item() for name in gates.GATES}

    def save(self, folder: str | Path) -> None:
        """Write scorer.safetensors and scorer.json."""
        atomic_write(Path(folder) / "scorer.safetensors", save(self.tensors))
        atomic_write(Path(folder) / "scorer.json", json.dumps(self.settings, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device="auto", dtype="auto", held_out=(), types=(), plain=False) -> Scorer:
        """Read what `save` wrote, and open the language model that it was fitted with.

        PPO, pairs, show, ask and evaluate all open the reward of a run here. Raises UserError if there is nothing that
        can be read, if it has learnt from a text that is held out, or if it does not know one of the types.
        """
        try:
            tensors = load_file(Path(folder) / "scorer.safetensors")
            settings = json.loads((Path(folder) / "scorer.json").read_text(encoding="utf-8"))
            if settings.get("version") != VERSION:
                raise ValueError("fitted by another version of socratiq")
        except (OSError, ValueError, AttributeError, SafetensorError) as error:
            remedy = f"fit one with python -m socratiq.scorer --out {folder}"
            raise UserError(f"{folder}: no scorer that can be read ({error}); {remedy}") from None
        held_out, anew = set(map(place, held_out)), "delete it, and make_pairs.py will fit it anew"
        if seen := len(held_out.intersection(settings["texts"])):
            raise UserError(f"--scorer {folder} was fitted on {seen} of the {len(held_out)} held-out texts; {anew}")
        if unknown := set(types).difference(settings["types"]):
            raise UserError(f"--scorer {folder} does not know the type {min(unknown)!r}; name another one, or {anew}")
        if settings["model content"] not in (None, fingerprint(settings["model"])):
            raise UserError(f"--scorer {folder}: {settings['model']} has changed since; {anew}")
        return cls(tensors, settings, open_language_model(settings["model"], device, dtype, plain))


def features(readings: list[Reading]) -> torch.Tensor:
    """(N, D) hidden states for the probe; D is 0 without a language model."""
    return torch.stack([reading.features for reading in readings]) if readings else torch.zeros(0, 0)


def fluency_signs(given: Reading) -> tuple[float, float]:
    """Mean log-prob of a question's tokens after its text, and of their lowest quarter.

    The first token, which follows nothing, is none of the lowest.
    """
    low = given.logprobs[1:].sort().values
    if not len(low):
        return -100.0, -100.0  # too short to have any
    return given.logprobs.mean().item(), low[: max(1, len(low) // 4)].mean().item()


def cross_validate(rows, lm: LanguageModel | None = None, held_out=frozenset()) -> tuple[list[str], torch.Tensor]:
    """Types, and opinions (1 or 2, N, T) of every row by a fit that saw neither it nor its text: five folds of texts.

    Rows whose context is `held_out` are graded by a fit to all others, and teach nothing.
    """
    types = sorted({r.type for r in rows if r.context not in held_out} - {OTHERS})
    questions = [r.question for r in rows]
    states = features(read(lm, questions))
    fold = [FOLDS if r.context in held_out else place(r.context) % FOLDS for r in rows]
    found = torch.zeros(1 + (lm is not None), len(rows), len(types))
    for k in sorted(set(fold)):
        learn = [i for i, f in enumerate(fold) if f not in (k, FOLDS)]
        grade = [i for i, f in enumerate(fold) if f == k]
        tensors = fit_strengths([rows[i] for i in learn], types, states[learn])
        found[:, grade] = opinions(tensors, [questions[i] for i in grade], states[grade])
    return types, found
