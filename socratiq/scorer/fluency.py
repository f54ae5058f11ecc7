"""Does a question read as one piece? What a frozen language model says of it, for `socratiq.scorer.scorer`.

Seven signs, of which the worst counts, of the question's tokens as the model reads them after the text: what people
ask is odd by itself more often than about their text. Four are plain, with a ramp each: the mean of the log-probs, that
of the lowest quarter, of the lowest two; and their sum per word.

Three are learnt, with a slope each. A linear probe looks at every token and says whether it may follow the one before
(`joints`). It learns that from genuine questions and from the same questions broken, in which a token is in its place
if the pair that it ends stands in a question that the broken one was made of.
The signs are the mean of its log-odds, that of the lowest quarter, and the log-probability that all joints hold. A
probe on whole questions has one label for each of them; this one has a label a token, and an optimiser must please it
at every word.
"""

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F

from socratiq.scorer import attacks, gates
from socratiq.scorer.grading import place
from socratiq.scorer.ngrams import fit_probe, probe_logits

BROKEN = ("swapped", "halves turned", "crossed", "glued", "shuffled after opener")  # seams, a question has one of them
EDITED, OF_TEXT = 0.25, 0.3  # a salad has at least this share of its words replaced, this share of them by the text's
LEARN_FROM = 800  # rows: their texts have to be read, and each row has a dozen tokens or more to learn from
PLAIN = 0.05  # of genuine questions that pay something for each plain sign
FLOOR = 0.2  # what is odd by plain signs alone keeps this: rare names and slips of the pen are, to a small model
JOINTS = (0.02, 0.15)  # shares of genuine questions that lose most, and anything, by each learnt sign
STEEP = 0.65  # exp(-STEEP), .52, is left at the first of these shares; 2 took .02 from the AUC by type
NOTHING = 0.01  # less is 0: a search that starts from nonsense finds no slope to climb
UNHEARD = -15.0  # log-probs below tell no more: one rare name must not outweigh a question
PLAIN_SIGNS = 4
LEAST = -1e3  # every sign of what is too short to have any


class Slope(NamedTuple):
    """1 at `high` and beyond, exp(-STEEP) at `low`, and so on: unlike on a ramp, worse questions still pay less."""

    low: float
    high: float

    def __call__(self, x: float) -> float:
        value = math.exp(min(0.0, STEEP * (x - self.high) / (self.high - self.low)))
        return value if value > NOTHING else 0.0

    @classmethod
    def below(cls, genuine: list[float]) -> "Slope":
        """By the shares JOINTS of genuine values."""
        ordered = sorted(genuine) or [0.0]
        low, high = (ordered[int(share * len(ordered))] for share in JOINTS)
        return cls(low if low < high else high - 1, high)  # a nat wide, if there are few values


class Fluency:
    """Fitted by `Fluency.fit`; `tensors` and `ramps` are what is to be kept of it."""

    def __init__(self, tensors: dict[str, torch.Tensor], ramps):
        self.tensors, self.ramps = tensors, ramps  # (low, high) of every sign: PLAIN_SIGNS ramps, then slopes
        self.plain = [gates.Ramp(*ramp) for ramp in ramps[:PLAIN_SIGNS]]
        self.learnt = [Slope(*ramp) for ramp in ramps[PLAIN_SIGNS:]]

    @classmethod
    def fit(cls, lm, rows, parts: int) -> "Fluency":
        """On `rows` as a language model reads them. The slopes of what is learnt stand where questions fall that it was
        not learnt from: the texts are cut in `parts` for that."""
        rows = sorted((r for r in rows if r.type != "others"), key=lambda r: place(r.context))[:LEARN_FROM]
        broken = broken_rows(rows)
        contexts = [r.context for r in rows] + [context for context, _, _ in broken]
        questions = [r.question for r in rows] + [question for _, question, _ in broken]
        whole = [[r.question] for r in rows] + [made_of for _, _, made_of in broken]
        x = tokens(lm, contexts, questions)
        read = lm.read_alone(questions)
        y = [in_place(a.ids, [s.ids for s in lm.read_alone(of)]) for a, of in zip(read, whole, strict=True)]
        part = [place(context) % parts for context in contexts]
        unseen = [torch.zeros(0)] * len(rows)
        for k in sorted(set(part)):
            rest = [i for i, p in enumerate(part) if p != k] or range(len(part))  # one text: no others to learn from
            probe = fit_probe(torch.cat([x[i] for i in rest]), torch.cat([y[i] for i in rest]))
            for i in range(len(rows)):
                if part[i] == k:
                    unseen[i] = probe_logits(x[i], *probe)[:, 0]
        given = lm.read_given(contexts[: len(rows)], questions[: len(rows)])
        plain = zip(*[plain_signs(r.question, g.logprobs) for r, g in zip(rows, given, strict=True)], strict=True)
        ramps = [gates.Ramp.below(list(sign), PLAIN) for sign in plain]
        ramps += [Slope.below(list(sign)) for sign in zip(*map(joint_signs, unseen), strict=True)]
        weight, bias = fit_probe(torch.cat(x), torch.cat(y))
        return cls({"joints": weight, "joints_bias": bias}, ramps)

    def __call__(self, lm, contexts: list[str], questions: list[str]) -> torch.Tensor:
        """(N,) in 0..1."""
        found = []
        given = lm.read_given(contexts, questions)
        for q, g, x in zip(questions, given, tokens(lm, contexts, questions), strict=True):
            joints = probe_logits(x, self.tensors["joints"], self.tensors["joints_bias"])[:, 0]
            odd = min(ramp(sign) for ramp, sign in zip(self.plain, plain_signs(q, g.logprobs), strict=True))
            learnt = [slope(sign) for slope, sign in zip(self.learnt, joint_signs(joints), strict=True)]
            found.append(min(FLOOR + (1 - FLOOR) * odd, *learnt))
        return torch.tensor(found)


def tokens(lm, contexts: list[str], questions: list[str]) -> list[torch.Tensor]:
    """(n - 1, 2 H + 2) for each question: all its tokens but the first, which follows nothing.

    Hidden states after the text at two depths, log-probs after it and alone.
    """
    found = []
    for a, g in zip(lm.read_alone(questions), lm.read_given(contexts, questions), strict=True):
        logprobs = torch.stack([g.logprobs, a.logprobs], 1).clamp(min=UNHEARD)
        found.append(torch.cat([g.hidden, logprobs], 1)[1:])
    return found


def in_place(ids: list[int], made_of: list[list[int]]) -> torch.Tensor:
    """(n - 1, 1): 1.0 for each token that follows the one before it in one of the questions `made_of` too."""
    pairs = {pair for other in made_of for pair in zip(other, other[1:])}  # noqa: B905, RUF007
    return torch.tensor([float(pair in pairs) for pair in zip(ids, ids[1:])])[:, None]  # noqa: B905, RUF007


def plain_signs(question: str, logprobs: torch.Tensor) -> list[float]:
    """Mean log-prob of a question's tokens (n,), of their lowest quarter, of their lowest two; their sum per word.

    The first token, which follows nothing, is none of the lowest.
    """
    if len(logprobs) < 2:
        return [LEAST] * PLAIN_SIGNS
    low, words = logprobs[1:].sort().values, max(1, len(gates.words(question)))
    usual = [x.mean().item() for x in (logprobs, low[: max(1, len(low) // 4)], low[:2])]
    return [*usual, logprobs.sum().item() / words]


def joint_signs(logits: torch.Tensor) -> list[float]:
    """Mean of the log-odds (n - 1,) that tokens are in their places, of their lowest quarter; and the log-probability
    that all of them are."""
    if not len(logits):
        return [LEAST] * 3
    low = logits.sort().values[: max(1, len(logits) // 4)]
    return [logits.mean().item(), low.mean().item(), F.logsigmoid(logits).sum().item()]


def broken_rows(rows) -> list[tuple[str, str, list[str]]]:
    """(context, question, made of): each question broken at a seam, and a salad made of it by replacing words."""
    words = [word for row in rows for word in row.question.strip().rstrip("?").split()]
    found = []
    for i, row in enumerate(rows):
        other, rng = rows[(i + len(rows) // 2) % len(rows)].question, random.Random(row.question)
        seam = dict(attacks.broken(row, other, [], rng))[BROKEN[i % len(BROKEN)]]
        for question, made_of in ((seam, [row.question, other]), (edited(row, words, rng), [row.question])):
            if question.strip() != row.question.strip():  # two words may have no other order
                found.append((row.context, question, made_of))
    return found


def edited(row, words: list[str], rng: random.Random) -> str:
    """The question with words of its text and of other questions in the place of a quarter to all of its own."""
    said = row.question.strip().rstrip("?").split()
    for i in rng.sample(range(len(said)), math.ceil(rng.uniform(EDITED, 1) * len(said))):
        said[i] = rng.choice(row.context.split() or words) if rng.random() < OF_TEXT else rng.choice(words)
    return " ".join(said) + "?"
