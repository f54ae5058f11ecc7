"""What is measured of each question, by the classifiers and by counting words.

The counts can be checked by hand. A word is a run of letters and digits, in lower
case, apostrophes included ("don't" is one word); punctuation does not count.
"""

from itertools import pairwise

from socratiq.pairs.checks import flaw
from socratiq.scorer.gates import words

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


def measure(records: list[dict], contexts: list[str], classifiers: dict) -> None:
    """Add the measurements of each question to its record.

    classifiers: {"judge": Judge}, and "scorer": Scorer if there is one.
    """
    texts, questions = [contexts[record["context"]] for record in records], [record["question"] for record in records]
    for record, text, question in zip(records, texts, questions, strict=True):
        record["words"] = len(words(question))
        record["well_formed"] = well_formed(question, text)
        record["relatedness"] = round(relatedness(question, text), 4)
    for name, classifier in classifiers.items():
        for record, strengths in zip(records, classifier.strengths(texts, questions).tolist(), strict=True):
            record[name] = round(strengths[classifier.types.index(record["type"])], 4)
            record[f"{name}_type"] = classifier.types[strengths.index(max(strengths))]
    if "scorer" in classifiers:
        rewards = classifiers["scorer"].reward(texts, questions, [record["type"] for record in records]).tolist()
        for record, reward in zip(records, rewards, strict=True):
            record["scorer/reward"] = round(reward, 4)


def well_formed(question: str, context: str) -> bool:
    """One question on one line: ends in its only question mark, 3 to 60 words, not copied from the text."""
    return "\n" not in question and flaw(question, context) == ""


def relatedness(question: str, context: str) -> float:
    """Share of the question's content words whose first four letters begin a word of the text too; 0 without any.

    Crude on purpose: no stage is rewarded by it, and it can be checked by eye. Compare with the row of people.
    """
    asked = {word[:4] for word in words(question) if word not in COMMON}
    return len(asked & {word[:4] for word in words(context)}) / len(asked) if asked else 0.0


def duplicates(questions: list[str]) -> float:
    """Share of the questions whose words were all said before, in the same order, by an earlier question."""
    return 1 - len({tuple(words(question)) for question in questions}) / len(questions) if questions else 0.0


def distinct_2(questions: list[str]) -> float:
    """Different pairs of neighbouring words / all such pairs, over all questions together (Li et al. 2016, distinct-n).

    Low when a policy repeats itself. More words mean a lower figure, so compare only sets of about the same size.
    """
    pairs = [pair for question in questions for pair in pairwise(words(question))]
    return len(set(pairs)) / max(1, len(pairs))
