"""Figures about questions that need no model: form, diversity, nearness to the text, overlap with human questions.

All of them are counts of words, so that each can be checked by hand. A word is a run of letters and digits, in lower
case, apostrophes included ("don't" is one word); punctuation does not count.
"""

import math
from collections import Counter

from socratiq.pairs.checks import flaw
from socratiq.scorer.gates import longest_run, words

# Words that any English text has: sharing them does not make a question one about this text.
COMMON = frozenset(
    """
    a about after all also an and any are as at be because been being but by can could did do does doing don't for
    from get had has have he her his how i if in into is it it's its just like make many may me might more most much
    my no not of on one only or other our out over people really same say she should so some such than that the
    their them then there these they thing things think this those to too up us use very was we were what when where
    whether which while who why will with would you your
    """.split()  # noqa: SIM905
)


def ngrams(said: list[str], n: int) -> list[tuple[str, ...]]:
    """Every run of n neighbouring words."""
    return list(zip(*(said[i:] for i in range(n)), strict=False))


def well_formed(question: str, context: str) -> bool:
    """One question on one line: ends in its only question mark, 3 to 60 words, not copied from the text."""
    return "\n" not in question and flaw(question, context) == ""


def relatedness(question: str, context: str) -> float:
    """Share of the question's content words whose first four letters begin a word of the text too; 0 without any.

    Crude on purpose: no stage is rewarded by it, and it can be read off the page. What genuine questions reach is the
    mark to compare with, see the "human" row of the evaluation.
    """
    asked = {word[:4] for word in words(question) if word not in COMMON}
    return len(asked & {word[:4] for word in words(context)}) / len(asked) if asked else 0.0


def copying(question: str, context: str) -> float:
    """Length of the longest run of question words that stands in the text, as a share of the question's words."""
    said = words(question)
    return longest_run(said, words(context)) / len(said) if said else 0.0


def distinct(questions: list[str], n: int) -> float:
    """Different n-grams / all n-grams over all questions together (Li et al. 2016, "distinct-n").

    More words mean a lower figure, so compare only sets of about the same size.
    """
    grams = [gram for question in questions for gram in ngrams(words(question), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def duplicates(questions: list[str]) -> float:
    """Share of the questions whose words were all said before, in the same order, by an earlier question."""
    return 1 - len({tuple(words(question)) for question in questions}) / len(questions) if questions else 0.0


# --- overlap with references ----------------------------------------------------------------------------------------


def bleu_counts(question: str, references: list[str], most: int = 4) -> list[int]:
    """What corpus BLEU needs to know of one question: clipped matches and n-grams for n = 1..most, then two lengths.

    Papineni et al. 2002: an n-gram counts as matched at most as often as the reference that has it most often says it.
    The length compared is that of the nearest reference in length, the shorter one of two equally near.
    """
    said, said_by_others = words(question), [words(reference) for reference in references]
    matches, totals = [], []
    for n in range(1, most + 1):
        allowed = Counter()
        for reference in said_by_others:
            allowed |= Counter(ngrams(reference, n))  # the larger count of the two
        found = Counter(ngrams(said, n))
        matches.append(sum((found & allowed).values()))
        totals.append(sum(found.values()))
    nearest = min((abs(len(reference) - len(said)), len(reference)) for reference in said_by_others)[1]
    return [*matches, *totals, len(said), nearest]


def bleu_of_counts(counts: list[float]) -> float:
    """Corpus BLEU in 0..1 from the summed `bleu_counts` of all questions:

        BLEU = BP * exp( 1/N sum_n log p_n )        BP = exp(1 - r/c) if c < r else 1

    with p_n matches by n-grams, c the words said and r those of the references. For n > 1 both counts are raised by 1
    (Lin and Och 2004), or one order without a match would make a small set 0.
    """
    most = (len(counts) - 2) // 2
    matches, totals, (said, wanted) = counts[:most], counts[most : 2 * most], counts[2 * most :]
    if not matches[0]:
        return 0.0
    precisions = [(matches[i] + (i > 0)) / (totals[i] + (i > 0)) for i in range(most)]
    brevity = min(0.0, 1 - wanted / said)
    return math.exp(brevity + sum(math.log(p) for p in precisions) / most)


def bleu(questions: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU of questions against one or more references each, 0..1."""
    counts = [bleu_counts(question, others) for question, others in zip(questions, references, strict=True)]
    return bleu_of_counts([sum(column) for column in zip(*counts, strict=True)])


def rouge_l(question: str, references: list[str]) -> float:
    """ROUGE-L F1 (Lin 2004), the best over the references, 0..1.

    With the longest common subsequence LCS (same words in the same order, gaps allowed) of question and reference:

        recall = LCS / words of the reference      precision = LCS / words of the question      F1 = 2PR / (P + R)
    """
    said = words(question)
    best = 0.0
    for reference in references:
        wanted = words(reference)
        if said and wanted:  # 2PR / (P + R) = 2 LCS / (both lengths)
            best = max(best, 2 * common_subsequence(said, wanted) / (len(said) + len(wanted)))
    return best


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence of two lists, row by row of the usual table."""
    row = [0] * (len(b) + 1)  # row[j]: of the part of `a` so far and b[:j]
    for word in a:
        above_left = 0
        for j, other in enumerate(b, 1):
            above_left, row[j] = row[j], above_left + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
