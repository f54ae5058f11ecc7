"""How strongly a question is of each type, and the reward made of it.

    python -m socratiq.scorer --data sample --out runs/scorer                   # seconds, no model
    python -m socratiq.scorer --data sample --out runs/scorer --model smollm2   # harder to fool

    reward = strength of the wanted type ^ 0.7 * form * originality * sentence * relatedness * order (or fluency)

Strength is one logistic output per type over n-grams, so that a question can be of two types. With a language model it
becomes the geometric mean with a second opinion, a linear probe on the model's hidden states; the model also judges how
much more likely the text makes a question, and in the place of word order (word_order.py) how fluent it is
(fluency.py). Every gate is in 0..1 and near 1 for nearly all genuine questions. Strength counts a little less
than the gates: whoever games a classifier gets strengths of 1 and loses nothing by it, while honest questions that are
merely hard to classify are worth more. Rows labelled `others` are negatives.
"""

import json
from pathlib import Path

import torch

from socratiq.prompts import build_prompt
from socratiq.run.errors import UserError
from socratiq.scorer import gates, grading
from socratiq.scorer.fluency import Fluency
from socratiq.scorer.gates import GATES
from socratiq.scorer.grading import Figures, contradictions, place, texts_of
from socratiq.scorer.ngrams import BUCKETS, calibrated, fit_ngrams, fit_probe, minimise, ngram_logits, probe_logits
from socratiq.scorer.word_order import WordOrder

CALIBRATION_PARTS = 3
L2_RELATED = 1e-3
EXPONENT = 0.7  # of the strength; 0.5 and 1 are each worse against one kind of string or another (README)
SURE, DOUBT = 1.5, 1.0  # relatedness is sigmoid(SURE * (log-odds + DOUBT)), in doubt for the question
VERSION = 5  # of what is saved; 5: word order by pairs of words and a net
RELATED_ROWS = 256  # rows whose texts the language model reads when fitted: two numbers are learnt from them


class Scorer:
    """Strengths per question type, gates, reward. Build one with `Scorer.fit` or `Scorer.load`."""

    def __init__(self, types, tensors, fitted: gates.Fitted, settings: dict):
        self.types: list[str] = types
        self.tensors: dict[str, torch.Tensor] = tensors  # weight, bias, related; with a language model probe, ...
        self.gates = fitted
        self.order = WordOrder(tensors, settings["order"]) if "order" in settings else None
        self.settings = settings  # word order; the texts it was fitted on; of a language model name, signature, fluency
        self.lm = None
        self.warnings: list[str] = []

    @classmethod
    def fit(cls, rows, seed: int = 0, lm=None, only_strengths: bool = False) -> "Scorer":
        """Fit on rows with .context, .question, .type. `lm` (LanguageModel) adds the second layer.

        The order of the rows never matters, nor does the seed: what is drawn is the same each time. Raises UserError if
        no row has a type. `.warnings` of the result names questions that carry two types. With `only_strengths` the
        result can grade types and gives no rewards: most of the time goes into what the gates have to learn.
        """
        rows = sorted(rows, key=lambda r: (r.question, r.type, r.context))
        types = sorted({r.type for r in rows} - {"others"})
        if not types:  # in all rows, or in those that a fold leaves
            raise UserError(
                "too few rows to fit a scorer: it needs questions of a type, about at least a handful of texts"
            )
        contexts, questions = [r.context for r in rows], [r.question for r in rows]
        target = torch.tensor([[float(r.type == name) for name in types] for r in rows])  # (N, T)
        part = [place(context) % CALIBRATION_PARTS for context in contexts]
        weight, bias = calibrated(fit_ngrams, ngram_logits, questions, target, part)
        tensors, settings = {"weight": weight, "bias": bias}, {"texts": texts_of(rows)}
        if not only_strengths:
            order = WordOrder.fit(contexts, questions)
            tensors |= order.tensors
            settings["order"] = order.settings
        scorer = cls(types, tensors, gates.Fitted.fit(contexts, questions), settings)
        scorer.warnings = contradictions(rows)
        if not only_strengths:
            tensors["related"] = scorer.fit_relatedness(rows)
        if lm is not None:
            scorer.lm = lm
            features = torch.stack([a.features for a in lm.read_alone(questions)])
            weight, bias = calibrated(fit_probe, probe_logits, features, target, part)
            tensors |= {"probe": weight, "probe_bias": bias}
            if only_strengths:
                return scorer
            fluency = Fluency.fit(lm, rows, CALIBRATION_PARTS)
            tensors |= fluency.tensors
            scorer.settings |= {"model": lm.name, "signature": lm.signature(), "fluency": fluency.ramps}
            some = sorted(rows, key=lambda r: place(r.context))[:RELATED_ROWS]
            tensors["related_model"] = scorer.fit_relatedness(some)
        return scorer

    def fit_relatedness(self, rows) -> torch.Tensor:
        """Weights and, last, bias that tell each question's own text from another one of these rows.

        The other one is the next in a fixed random order.
        """
        texts = sorted({r.context for r in rows}, key=lambda text: (place(text), text))
        other = dict(zip(texts, texts[1:] + texts[:1], strict=True))
        pairs = [(text, r.question, own) for r in rows for text, own in ((r.context, 1.0), (other[r.context], 0.0))]
        x = self.evidence([text for text, _, _ in pairs], [question for _, question, _ in pairs])  # (2 N, 2 or 3)
        w, b = torch.zeros(x.shape[1], 1), torch.zeros(1)
        minimise(lambda: x @ w + b, [w, b], torch.tensor([[own] for _, _, own in pairs]), L2_RELATED)
        return torch.cat([w[:, 0], b])

    def with_language_model(self, lm) -> "Scorer":
        """This scorer with the language model that it was fitted with; None leaves it as it is."""
        if lm is not None:
            known, now = self.settings.get("signature"), lm.signature()
            if known is None:
                raise UserError("this scorer was fitted without a language model; fit it anew")
            if len(known) != len(now) or max(abs(a - b) for a, b in zip(known, now, strict=True)) > 0.25:
                raise UserError(f"this scorer was fitted with another language model ({self.settings['model']})")
            self.lm = lm
        return self

    # --- strengths --------------------------------------------------------------------------------------------------

    def by_ngrams(self, questions: list[str]) -> torch.Tensor:
        """(N, T) in 0..1 by n-grams alone."""
        return torch.sigmoid(ngram_logits(questions, self.tensors["weight"], self.tensors["bias"]))

    def by_probe(self, questions: list[str]) -> torch.Tensor:
        """(N, T) in 0..1 by the probe on the language model's hidden states alone."""
        features = torch.stack([a.features for a in self.lm.read_alone(questions)])
        return torch.sigmoid(probe_logits(features, self.tensors["probe"], self.tensors["probe_bias"]))

    def strengths(self, contexts: list[str], questions: list[str]) -> torch.Tensor:
        """(N, T) in 0..1, columns in the order of `.types`: how strongly each question is of each type."""
        if not questions:
            return torch.zeros(0, len(self.types))
        by_ngrams = self.by_ngrams(questions)
        return by_ngrams if self.lm is None else (by_ngrams * self.by_probe(questions)).sqrt()

    def highest(self, contexts: list[str], questions: list[str]) -> torch.Tensor:
        """(N, T) in 0..1: the higher opinion, since what is surely not of a type is not so by all who were asked."""
        if self.lm is None or not questions:
            return self.strengths(contexts, questions)
        return torch.maximum(self.by_ngrams(questions), self.by_probe(questions))

    # --- reward -----------------------------------------------------------------------------------------------------

    def evidence(self, contexts: list[str], questions: list[str]) -> torch.Tensor:
        """(N, 2 or 3) signs that a question is about its context: words shared and not (gates.Overlap), and with a
        language model how much likelier the context makes it.

        That is log p(question | context) - log p(question) without the first token, which every text helps, over the
        root of the question's length: long questions have more to gain.
        """
        columns = list(zip(*map(self.gates.overlap, contexts, questions), strict=True))
        if self.lm is not None:
            both = zip(self.lm.read_given(contexts, questions), self.lm.read_alone(questions), strict=True)
            columns.append([(g.logprobs - a.logprobs)[1:].sum().item() / max(1, len(g.ids)) ** 0.5 for g, a in both])
        return torch.tensor(columns).T

    def graded(self, contexts, questions, types) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The reward (N,), and every part of it by name, each (N,) in 0..1. Raises UserError for an unknown type."""
        columns = torch.tensor([self._column(t) for t in types], dtype=torch.long)
        left_out = "order" if self.lm else "fluency"  # a language model judges the order of words better
        if not questions:
            return torch.zeros(0), {name: torch.zeros(0) for name in ("strength", *GATES) if name != left_out}
        if self.lm is not None:
            self.lm.forget()  # the same questions get the same bytes, whatever was graded before
        rows = list(zip(contexts, questions, types, strict=True))
        parts = {
            "strength": self.strengths(contexts, questions).gather(1, columns[:, None])[:, 0],
            "form": torch.tensor([gates.form(q) for q in questions]),
            "originality": torch.tensor([gates.originality(build_prompt(c, t), q) for c, q, t in rows]),
            "sentence": torch.tensor([self.gates.sentence(q) for q in questions]),
        }
        if self.lm is None:
            parts["order"] = self.order(questions)
        *w, bias = self.tensors["related" if self.lm is None else "related_model"]
        own_text = self.evidence(contexts, questions) @ torch.stack(w) + bias  # log-odds against another text
        parts["relatedness"] = torch.sigmoid(SURE * (own_text + DOUBT))
        if self.lm is not None:
            parts["fluency"] = Fluency(self.tensors, self.settings["fluency"])(self.lm, contexts, questions)
        reward = parts["strength"] ** EXPONENT * torch.stack([parts[name] for name in GATES if name in parts]).prod(0)
        if self.lm is not None:
            parts["ngrams"] = self.by_ngrams(questions).gather(1, columns[:, None])[:, 0]
            parts["probe"] = self.by_probe(questions).gather(1, columns[:, None])[:, 0]
        return reward, parts

    def components(self, contexts: list[str], questions: list[str], types: list[str]) -> dict[str, torch.Tensor]:
        """Every part of the reward by name, each (N,)."""
        return self.graded(contexts, questions, types)[1]

    def reward(self, contexts: list[str], questions: list[str], types: list[str]) -> torch.Tensor:
        """(N,) in 0..1."""
        return self.graded(contexts, questions, types)[0]

    def explain(self, context: str, question: str) -> dict:
        """All that the scorer thinks of one question: by type its strength and reward, and every gate."""
        n = len(self.types)
        reward, parts = self.graded([context] * n, [question] * n, self.types)
        by_type = {name: parts[name] for name in ("strength", "ngrams", "probe") if name in parts} | {"reward": reward}
        return {name: dict(zip(self.types, x.tolist(), strict=True)) for name, x in by_type.items()} | {
            name: x[0].item() for name, x in parts.items() if name not in by_type
        }

    def _column(self, type: str) -> int:
        if type not in self.types:
            raise UserError(f"the scorer does not know the type {type!r}; it knows {', '.join(self.types)}")
        return self.types.index(type)

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write scorer.safetensors and scorer.json."""
        from safetensors.torch import save

        from socratiq.run.files import atomic_write

        used = self.tensors["weight"].any(1).nonzero()[:, 0]  # most buckets are empty
        settings = {"version": VERSION, "types": self.types, **self.settings, **self.gates.state()}
        tensors = {**self.tensors, "weight": self.tensors["weight"][used], "buckets": used}
        atomic_write(
            Path(folder) / "scorer.safetensors",
            save({k: v if v.is_floating_point() else v.to(torch.int32) for k, v in tensors.items()}),
        )
        atomic_write(Path(folder) / "scorer.json", json.dumps(settings, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Scorer":
        """Read what `save` wrote. Raises UserError if there is nothing that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(Path(folder) / "scorer.safetensors")
            read = json.loads((Path(folder) / "scorer.json").read_text(encoding="utf-8"))
            if read.pop("version", 1) != VERSION:
                raise ValueError("fitted by another version of socratiq")
            fitted = gates.Fitted.of(read)
            weight, used = tensors["weight"], tensors.pop("buckets").long()
            tensors["weight"] = torch.zeros(BUCKETS, weight.shape[1]).index_copy_(0, used, weight)
            tensors["bias"], tensors["related"], tensors["order_out"], read["order"]["median"]  # a KeyError if missing
            return cls(read.pop("types"), tensors, fitted, read)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"{folder}: no scorer that can be read ({error}); fit one with python -m socratiq.scorer --out {folder}"
            ) from None


def cross_validate(rows, folds: int = 5, seed: int = 0, lm=None) -> Figures:
    """Grade every row by a scorer that saw neither it nor its context: `.strengths` (N, T) in the order of the rows."""
    return grading.cross_validate(lambda some: Scorer.fit(some, seed, lm, only_strengths=True), rows, folds)
