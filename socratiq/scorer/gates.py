"""Cheap gates: is this text one question, in words of its own, and about this context?

The reward (scorer.py) multiplies the strength of a type by gates. A gate is a number in 0..1. It is near 1 for almost
every genuine question, so that honest questions pay (nearly) nothing, and falls to 0 for the strings that an optimiser
finds when it chases cue words alone. This file holds those that need no language model.
"""

import math
import re
import unicodedata
from collections import Counter
from difflib import SequenceMatcher

# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without spaces: each character is a token.
SPACELESS = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff"
SIGNS = "".join(c for c in map(chr, range(0x300, 0x1E00)) if unicodedata.category(c)[0] == "M")  # vowels, accents
LETTERS = rf"[^\W_{SPACELESS}]+(?:[{SIGNS}]+[^\W_{SPACELESS}]*)*"
TOKEN = re.compile(rf"{LETTERS}(?:'{LETTERS})*|[{SPACELESS}][{SIGNS}]*|[^\w\s]|_")
WORD = re.compile(r"[^\W\d_]+")  # letters alone, in the case that they have
INSIDE = re.compile(r"(?<=[\w,;] )[^\W\d_]+")  # the same behind a word or a comma, where no sentence begins


def tokens(text: str) -> list[str]:
    """Lower-cased words and punctuation marks, in order; characters in scripts without spaces."""
    return TOKEN.findall(text.lower().replace("’", "'"))


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation, in order: "Why, don’t they?" -> ["why", "don't", "they"]."""
    return [token for token in tokens(text) if token[0].isalnum()]


def count_words(said: list[str]) -> float:
    """How many words these are; three characters of scripts without spaces count as one."""
    return sum(1 / 3 if re.match(f"[{SPACELESS}]", word) else 1 for word in said)


def stems(text: str) -> set[str]:
    """The first four letters of its words: enough to match "argue", "argument" and "arguing"."""
    return {word[:4] for word in words(text)}


def ramp(x: float, low: float, high: float) -> float:
    """0 at `low` and beyond, 1 at `high` and beyond, a straight line between."""
    return min(1.0, max(0.0, (x - low) / (high - low)))


def ramp_below(genuine: list[float], share: float) -> tuple[float, float]:
    """Low and high: 1 for all but the lowest `share` of genuine values; 0 as far below as their median is above."""
    ordered = sorted(genuine)
    lowest, median = ordered[int(share * len(ordered))], ordered[len(ordered) // 2]
    return lowest - max(median - lowest, 0.25), lowest  # at least a quarter nat wide, if there are few values


GATES = {  # in the order in which the reward multiplies them: what is wrong with a question that does not pass
    "form": "stutters",
    "originality": "copies the text",
    "sentence": "not written as one sentence",
    "relatedness": "not about the text",
    "fluency": "not fluent",
}

STUB = (1, 5)  # words: "What if?" could be asked of anything
BREVITY = (46, 24)  # words: two questions glued together make a long one
NEW_RUNS = (0.6, 0.9)  # distinct pairs of neighbours among all pairs
MARKS = (0.6, 0.4)  # marks per word: a list with a comma after every word is no question
MARK = "?？؟"  # Latin, Chinese and Japanese, Arabic
MARKUP = re.compile(r"<[|｜/\w]|##|\[/?[A-Z_]+\]")  # of prompts and chats, such as <|im_end|>, <s>, ### and [INST]
OWN_WORDS = (0.2, 0.5)  # share of the words outside the longest run copied from the prompt


def form(question: str) -> float:
    """1 for one line that ends in its only question mark and has 5 to 24 words, hardly a pair said twice."""
    text = question.strip()
    said = words(text)
    if not re.fullmatch(rf"[^{MARK}\n]*[^\W_][^{MARK}\n\w]*[{MARK}]", text) or len(said) < 2 or MARKUP.search(text):
        return 0.0
    length, marks = count_words(said), (len(tokens(text)) - len(said) - 1) / len(said)
    size = 2 if length == len(said) else 4  # four characters repeat as seldom as two words
    runs = list(zip(*(said[i:] for i in range(size)), strict=False)) or said
    distinct = len(set(runs)) / len(runs)
    return ramp(length, *STUB) * ramp(length, *BREVITY) * ramp(marks, *MARKS) * ramp(distinct, *NEW_RUNS)


def longest_run(said: list[str], text: list[str]) -> int:
    """Length of the longest run of the words said that stands in the words of a text."""
    return SequenceMatcher(None, text, said, autojunk=False).find_longest_match().size


def originality(prompt: str, question: str) -> float:
    """0 where the question is little more than a piece of the prompt (its text, or the instruction) and a "?"."""
    said = words(question)
    run = longest_run(said, words(prompt))
    return ramp(1 - run / len(said), *OWN_WORDS) if run >= 4 else 1.0


# --- learnt from rows, kept as settings -----------------------------------------------------------------------------

LOWER_CASE, SEEN = 0.05, 3  # so few of the rows' questions begin in lower case; so many with the same word


def fit_sentence(contexts: list[str], questions: list[str]) -> dict:
    """With which capitalised words questions begin ("openers"), and whether they begin with a capital at all."""
    first = Counter(match.group() for match in map(WORD.match, questions) if match)
    inside = Counter(word for text in {*contexts, *questions} for word in words_inside(text))
    openers = [w for w, n in first.items() if n >= SEEN and w[0].isupper() and inside[w.lower()] > inside[w]]
    lower = sum(question[:1].islower() for question in questions)
    return {"openers": sorted(openers), "capital": lower < LOWER_CASE * len(questions)}


def sentence(question: str, openers: list[str], capital: bool) -> float:
    """1 for a question that begins as those of the rows do, and once: "Why work Why not rest?" is two in one line.

    Where nearly all questions of the rows begin with a capital letter, one that does not is worth nothing. Nor is one
    that has an opener behind a word or a comma. Words that mostly have their capital there (names, I) are no openers.
    """
    begins = not (capital and question.lstrip()[:1].islower())
    return float(begins and not set(openers) & set(words_inside(question)))


def words_inside(text: str) -> list[str]:
    """Words where no sentence begins."""
    return INSIDE.findall(" ".join(text.split()))


def fit_rarity(contexts: list[str]) -> dict[str, float]:
    """Inverse document frequency of the word beginnings of these texts; that of a word never met stands under ""."""
    texts = set(contexts)
    count = Counter(beginning for text in texts for beginning in stems(text))
    return {s: math.log((1 + len(texts)) / n) for s, n in sorted(count.items())} | {"": math.log(1 + len(texts))}


def rarest_shared(context: str, question: str, rarity: dict[str, float]) -> float:
    """The rarity of the rarest word beginning that text and question share; 0 if they share none."""
    both = stems(context) & stems(question)
    return max((rarity.get(beginning, rarity[""]) for beginning in both), default=0.0)
