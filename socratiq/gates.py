"""Cheap gates: is this text a question at all, in a plausible word order, and about this context?

The reward of `socratiq.scorer` multiplies strengths by the gates of this file. Each gate is a number in 0..1 that is
close to 1 for almost every genuine question, so that honest questions pay (nearly) nothing, and falls towards 0 for the
strings that an optimiser finds when it only chases cue words. No language model is needed here.
"""

import math
import re
from collections import Counter

TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation marks, in order."""
    return TOKEN.findall(text.lower().replace("’", "'"))


def stem(word: str) -> str:
    """The first four letters: enough to match "argue", "argument" and "arguing"."""
    return word[:4]


def form(question: str) -> float:
    """1 for one line that ends in its only question mark, 2 to 45 words, hardly any word or word pair said twice."""
    text = question.strip()
    said = [w for w in words(text) if w[0].isalnum()]
    if text.count("?") != 1 or not text.endswith("?") or "\n" in text or not 2 <= len(said) <= 45:
        return 0.0
    pairs = list(zip(said, said[1:], strict=False))
    distinct_words = len(set(said)) / len(said)
    distinct_pairs = len(set(pairs)) / len(pairs)
    return min(1.0, distinct_words / 0.6) * min(1.0, distinct_pairs / 0.9) ** 4


def copied(context: str, question: str) -> int:
    """The longest run of question words that stands in the context word for word."""
    text = " " + " ".join(words(context)) + " "
    said = [w for w in words(question) if w[0].isalnum()]
    longest = 0
    for start in range(len(said)):
        while start + longest < len(said) and " " + " ".join(said[start : start + longest + 1]) + " " in text:
            longest += 1
    return longest


class Overlap:
    """Relatedness without a model: the share of a question's idf weight whose word stems the context also has."""

    def __init__(self, idf: dict[str, float], rarest: float):
        self.idf, self.rarest = idf, rarest

    @classmethod
    def fit(cls, contexts: list[str]) -> "Overlap":
        texts = sorted(set(contexts))
        count = Counter(s for text in texts for s in {stem(w) for w in words(text)})
        return cls({s: math.log((1 + len(texts)) / n) for s, n in count.items()}, math.log(1 + len(texts)))

    def __call__(self, context: str, question: str) -> float:
        asked = {stem(w) for w in words(question) if w[0].isalnum()}
        there = {stem(w) for w in words(context)}
        weight = {s: self.idf.get(s, self.rarest) for s in asked}
        return sum(weight[s] for s in asked & there) / max(1e-9, sum(weight.values()))
