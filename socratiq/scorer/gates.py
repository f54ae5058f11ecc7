"""Cheap gates: is this text one question, in words of its own, and about this context?

The reward (scorer.py) multiplies the strength of a type by the gates of this file. A gate is a number in 0..1
that is near 1 for almost every genuine question, so that honest questions pay (nearly) nothing, and falls to 0 for the
strings that an optimiser finds when it chases cue words alone. Pure text and counts: no language model is needed.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s]|_")
WORD = re.compile(r"[^\W\d_]+")  # letters alone, in the case that they have
INSIDE = re.compile(r"(?<=[\w,;] )[^\W\d_]+")  # the same behind a word or a comma, where no sentence begins


def tokens(text: str) -> list[str]:
    """Lower-cased words and punctuation marks, in order."""
    return TOKEN.findall(text.lower().replace("’", "'"))


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation, in order: "Why, don’t they?" -> ["why", "don't", "they"]."""
    return [token for token in tokens(text) if token[0].isalnum()]


def stem(word: str) -> str:
    """The first four letters: enough to match "argue", "argument" and "arguing"."""
    return word[:4]


class Ramp(NamedTuple):
    """0 at `low` and beyond, 1 at `high` and beyond, a straight line between."""

    low: float
    high: float

    def __call__(self, x: float) -> float:
        return min(1.0, max(0.0, (x - self.low) / (self.high - self.low)))

    @classmethod
    def below(cls, genuine: list[float], share: float) -> "Ramp":
        """1 for all but the lowest `share` of genuine values, and 0 from as far below as their median lies above."""
        ordered = sorted(genuine) or [0.0]
        lowest, median = ordered[int(share * len(ordered))], ordered[len(ordered) // 2]
        return cls(lowest - max(median - lowest, 0.25), lowest)  # at least a quarter nat wide, if there are few values


class Gate(NamedTuple):
    """How people are told of a gate."""

    title: str  # what it looks at
    failed: str  # what is wrong with a question that does not pass


GATES = {  # in the order in which the reward multiplies them
    "form": Gate("form", "stutters"),
    "originality": Gate("originality", "copies the text"),
    "sentence": Gate("sentence form", "not written as one sentence"),
    "order": Gate("word order", "words in no order"),
    "relatedness": Gate("relatedness to the text", "not about the text"),
    "fluency": Gate("fluency", "not fluent"),
}
LOW = 0.7  # a gate below it is worth a remark to whoever reads the question

STUB = Ramp(1, 5)  # words: "What if?" could be asked of anything
BREVITY = Ramp(46, 24)  # words: two questions glued together make a long one
VARIETY = Ramp(0.3, 0.6)  # distinct words among all words
MARKUP = re.compile(r"<[|｜/\w]|##|\[/?[A-Z_]+\]")  # of prompts and chats, such as <|im_end|>, <s>, ### and [INST]
MARKS = Ramp(0.6, 0.4)  # marks per word: a list with a comma after every word is no question
NEW_PAIRS = Ramp(0.6, 0.9)  # distinct neighbouring pairs among all pairs
OWN_WORDS = Ramp(0.2, 0.5)  # share of the words outside the longest run copied from the prompt


def form(question: str) -> float:
    """1 for one line that ends in its only question mark and has 5 to 24 words, hardly a word or pair said twice."""
    text = question.strip()
    said = words(text)
    if not re.fullmatch(r"[^?？\n]*[^\W_][^?？\n\w]*[?？]", text) or not 2 <= len(said) <= 45 or MARKUP.search(text):
        return 0.0
    pairs = list(zip(said, said[1:]))  # noqa: B905, RUF007  (neighbours; itertools.pairwise reads no better)
    marks = len(tokens(text)) - len(said) - 1
    distinct = VARIETY(len(set(said)) / len(said)) * NEW_PAIRS(len(set(pairs)) / len(pairs))
    return STUB(len(said)) * BREVITY(len(said)) * MARKS(marks / len(said)) * distinct


def longest_run(said: list[str], text: list[str]) -> int:
    """Length of the longest run of the words said that stands in the words of a text."""
    whole, longest = f" {' '.join(text)} ", 0
    for start in range(len(said)):
        while start + longest < len(said) and f" {' '.join(said[start : start + longest + 1])} " in whole:
            longest += 1
    return longest


def originality(prompt: str, question: str) -> float:
    """0 where the question is little more than a piece of the prompt (its text, or the instruction) and a "?"."""
    said = words(question)
    run = longest_run(said, words(prompt))
    return OWN_WORDS(1 - run / len(said)) if run >= 4 else 1.0


class Sentence:
    """1 for a question that begins as those of the rows do, and once: "Why work Why not rest?" is two in one line.

    Where nearly all questions of the rows begin with a capital letter, one that does not is worth nothing. Nor is one
    that has, behind a word or a comma, a capitalised word with which questions begin, unless such words mostly have
    their capital there (names, I).
    """

    RARE, SEEN = 0.05, 3  # so few of the rows' questions begin in lower case; so many with the same word

    def __init__(self, openers: list[str], capital: bool):
        self.openers, self.capital = frozenset(openers), capital

    @classmethod
    def fit(cls, contexts: list[str], questions: list[str]) -> "Sentence":
        first = Counter(match.group() for match in map(WORD.match, questions) if match)
        inside = Counter(word for text in {*contexts, *questions} for word in cls.inside(text))
        openers = [w for w, n in first.items() if n >= cls.SEEN and w[0].isupper() and inside[w.lower()] > inside[w]]
        return cls(sorted(openers), sum(q[:1].islower() for q in questions) < cls.RARE * len(questions))

    @staticmethod
    def inside(text: str) -> list[str]:
        """Words where no sentence begins."""
        return INSIDE.findall(" ".join(text.split()))

    def __call__(self, question: str) -> float:
        begins = not (self.capital and question.lstrip()[:1].islower())
        return float(begins and self.openers.isdisjoint(self.inside(question)))


class Overlap:
    """Relatedness without a model, by the word beginnings that question and context share, weighed by their rarity."""

    def __init__(self, idf: dict[str, float], rarest: float):
        self.idf, self.rarest = idf, rarest

    @classmethod
    def fit(cls, contexts: list[str]) -> "Overlap":
        texts = sorted(set(contexts))
        count = Counter(s for text in texts for s in {stem(word) for word in words(text)})
        return cls({s: math.log((1 + len(texts)) / n) for s, n in sorted(count.items())}, math.log(1 + len(texts)))

    def __call__(self, context: str, question: str) -> tuple[float, float]:
        """The weight of the rarest word that both have, and the sum of the weights that the context lacks."""
        asked = {s: self.idf.get(s, self.rarest) for s in sorted({stem(word) for word in words(question)})}
        there = {stem(word) for word in words(context)}
        return max((x for s, x in asked.items() if s in there), default=0.0), sum(
            x for s, x in asked.items() if s not in there
        )


class Fitted(NamedTuple):
    """The gates that learn from rows, and are saved as settings."""

    sentence: Sentence
    overlap: Overlap

    @classmethod
    def fit(cls, contexts: list[str], questions: list[str]) -> "Fitted":
        return cls(Sentence.fit(contexts, questions), Overlap.fit(contexts))

    def state(self) -> dict:
        """What `of` takes back."""
        sentence, overlap = self
        settings = {"openers": sorted(sentence.openers), "capital": sentence.capital}
        return settings | {"rarest": overlap.rarest, "idf": overlap.idf}

    @classmethod
    def of(cls, settings: dict) -> "Fitted":
        """What `state` gave; what is read of the settings is taken out of them."""
        openers, capital, idf, rarest = map(settings.pop, ("openers", "capital", "idf", "rarest"))
        return cls(Sentence(openers, capital), Overlap(idf, rarest))
