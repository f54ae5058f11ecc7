"""Looking at a batch of questions together: what no reward of single questions can see."""

from collections import Counter

from socratiq.scorer.gates import words

OPENER = 3  # words
NEAR = 2 / 3  # shared words among all words of two questions, from which on they count as the same


def batch_diversity(questions: list[str]) -> dict[str, float]:
    """Share of questions that begin in the same three words as another one, and share that say nearly the same."""
    openers, near = _openers(questions), _near(questions)
    n = max(1, len(questions))
    return {
        "diversity/repeated_openers": sum(count > 1 for count in openers) / n,
        "diversity/near_duplicates": sum(count > 0 for count in near) / n,
    }


def diversity_factor(questions: list[str]) -> list[float]:
    """A factor in 0..1 for the reward of each question of a batch, 1 where nothing repeats.

    1 / sqrt(how many of the batch say nearly the same, itself included), times 1 where at most half of the batch begins
    in the same three words, falling to 1/2 where all of it does.
    """
    n = len(questions)
    return [
        (1 + near) ** -0.5 * (min(1.0, 1.5 - opener / n) if opener > 1 else 1.0)
        for opener, near in zip(_openers(questions), _near(questions), strict=True)
    ]


def _openers(questions: list[str]) -> list[int]:
    """How many questions of the batch begin as this one does, itself included."""
    openers = [tuple(words(q)[:OPENER]) for q in questions]
    count = Counter(openers)
    return [count[opener] for opener in openers]


def _near(questions: list[str]) -> list[int]:
    """How many others of the batch use nearly the same words."""
    said = [frozenset(words(q)) for q in questions]
    return [
        sum(len(mine & other) >= NEAR * len(mine | other) for j, other in enumerate(said) if j != i)
        for i, mine in enumerate(said)
    ]
