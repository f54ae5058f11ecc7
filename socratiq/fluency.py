"""Does a question read as one piece? What a frozen language model says of it, for `socratiq.scorer`.

Three answers, of which the worst counts:

    odd     ramps over five signs: the log-probs of its tokens, their mean, that of the lowest quarter, of the lowest
            two; the log-prob per word; and how much likelier, per word, the question is than its own words from last to
            first. The last is about 0 for a salad of words, however likely each of them is.
    signs   a logistic over the five: a question that is a little odd in everything
    whole   a linear probe on the model's hidden states and the signs, which sees seams

The latter two are learnt: genuine questions against the same questions broken. An optimiser must please all three.
"""

import math
import random

import torch

from socratiq import attacks, gates
from socratiq.grading import place
from socratiq.logistic import calibrated, fit_probe, probe_logits

BROKEN = ("swapped", "halves turned", "crossed", "glued", "shuffled after opener")  # seams, a question has one of them
EDITED, OF_TEXT = 0.25, 0.3  # a salad has at least this share of its words replaced, this share of them by the text's
SHARES = (0.1, 0.1, 0.1, 0.05, 0.05)  # of genuine questions that pay something for each of `signs_of`
FLOOR = 0.2  # what looks odd to the ramps keeps this: one genuine question in twenty does to a small model
# Log-odds in favour of a question, lest the honest pay: where one is as likely broken as not, .95 and .88 are left.
DOUBTS = {"signs": 3.0, "whole": 2.0}
LEAST = -20.0  # every sign of what is too short to have any


class Fluency:
    """Fitted by `Fluency.fit`; `tensors` and `ramps` are what is to be kept of it."""

    def __init__(self, tensors: dict[str, torch.Tensor], ramps):
        self.tensors, self.ramps = tensors, [gates.Ramp(*ramp) for ramp in ramps]

    @classmethod
    def fit(cls, lm, rows, parts: int) -> "Fluency":
        """On `rows`, sorted, as a language model reads them; the texts are cut in `parts` to calibrate."""
        rows = [r for r in rows if r.type != "others"]
        broken = broken_rows(rows)
        signs, features = read(lm, [r.question for r in rows] + [question for _, question in broken])
        target = torch.tensor([[1.0]] * len(rows) + [[0.0]] * len(broken))
        part = [place(context) % parts for context in [r.context for r in rows] + [context for context, _ in broken]]
        whole, whole_bias = calibrated(fit_probe, probe_logits, features, target, part)
        weight, bias = calibrated(fit_probe, probe_logits, signs, target, part)
        genuine = signs[: len(rows)].T.tolist()
        ramps = [gates.Ramp.below(values, share) for values, share in zip(genuine, SHARES, strict=True)]
        return cls({"whole": whole, "whole_bias": whole_bias, "signs": weight, "signs_bias": bias}, ramps)

    def __call__(self, lm, questions: list[str]) -> torch.Tensor:
        """(N,) in 0..1."""
        signs, features = read(lm, questions)
        odd = torch.tensor([min(r(x) for r, x in zip(self.ramps, of, strict=True)) for of in signs.tolist()])
        found = [FLOOR + (1 - FLOOR) * odd]
        for name, x in (("signs", signs), ("whole", features)):
            logits = probe_logits(x, self.tensors[name], self.tensors[f"{name}_bias"])[:, 0]
            found.append(torch.sigmoid(logits + DOUBTS[name]))
        return torch.stack(found).amin(0)


def broken_rows(rows) -> list[tuple[str, str]]:
    """(context, question): each question broken at a seam, and a salad made of it by replacing words."""
    words = [word for row in rows for word in row.question.strip().rstrip("?").split()]
    found = []
    for i, row in enumerate(rows):
        other, rng = rows[(i + len(rows) // 2) % len(rows)].question, random.Random(row.question)
        kinds = dict(attacks.broken(row, other, [], rng))
        for question in (kinds[BROKEN[i % len(BROKEN)]], edited(row, words, rng)):
            if question.strip() != row.question.strip():  # two words may have no other order
                found.append((row.context, question))
    return found


def edited(row, words: list[str], rng: random.Random) -> str:
    """The question with words of its text and of other questions in the place of a quarter to all of its own."""
    said = row.question.strip().rstrip("?").split()
    for i in rng.sample(range(len(said)), math.ceil(rng.uniform(EDITED, 1) * len(said))):
        said[i] = rng.choice(row.context.split() or words) if rng.random() < OF_TEXT else rng.choice(words)
    return " ".join(said) + "?"


def read(lm, questions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs (N, 5), and (N, 2 H + 5): hidden states and signs."""
    alone, turned = lm.read_alone(questions), lm.read_alone([backwards(q) for q in questions])
    signs = torch.tensor(
        [signs_of(q, a.logprobs, b.logprobs) for q, a, b in zip(questions, alone, turned, strict=True)]
    )
    return signs, torch.cat([torch.stack([a.features for a in alone]), signs], 1)


def signs_of(question: str, logprobs: torch.Tensor, turned: torch.Tensor) -> list[float]:
    """Mean log-prob of a question's tokens (n,), of their lowest quarter, of their lowest two; per word: their sum, and
    what it is above that of the words from last to first, (m,).

    The first token, which follows nothing, is none of the lowest.
    """
    if len(logprobs) < 2:
        return [LEAST] * 5
    low, words = logprobs[1:].sort().values, max(1, len(gates.words(question)))
    usual = [x.mean().item() for x in (logprobs, low[: max(1, len(low) // 4)], low[:2])]
    return [*usual, logprobs.sum().item() / words, (logprobs.sum() - turned.sum()).item() / words]


def backwards(question: str) -> str:
    """The same words, from last to first."""
    return " ".join(reversed(question.strip().rstrip("?").split())) + "?"
