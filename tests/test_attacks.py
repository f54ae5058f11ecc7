"""Strings that try to fool the scorer must not pay like genuine questions about held-out texts.

python -m pytest -m slow tests/test_attacks.py      with smollm2 as its language model: minutes
python bench/scorer_ablation.py                     what each kind of string earns
"""

import random
from types import SimpleNamespace

import attacks
import pytest

from socratiq.data import load_rows, split_by_context
from socratiq.evaluation.measures import well_formed
from socratiq.models import load_tokenizer
from socratiq.prompts import decode, encode_completion
from socratiq.scorer import gates
from socratiq.scorer.language_model import open_language_model
from socratiq.scorer.scorer import Scorer


@pytest.fixture(scope="module")
def suite() -> SimpleNamespace:
    """Genuine questions about held-out texts, and attacks on one of them a text, of another type each time."""
    learn_from, held_out = split_by_context(load_rows("sample"), 0.1, seed=0)
    genuine = [row for row in held_out if row.type != "others"]
    texts, types = (sorted({row[field] for row in genuine}) for field in (0, 2))
    attacked = [r for r in genuine if types.index(r.type) == texts.index(r.context) % len(types)]
    return SimpleNamespace(learn_from=learn_from, genuine=genuine, strings=attacks.degenerate(attacked))


def graded(scorer: Scorer, suite) -> tuple[float, list[tuple[attacks.Attack, float]]]:
    """What the scorer pays: the mean of genuine questions, and each string with its reward."""
    genuine = scorer.reward(*zip(*[row[:3] for row in suite.genuine], strict=True))
    rewards = scorer.reward(*zip(*[attack[1:] for attack in suite.strings], strict=True))
    return genuine.mean().item(), list(zip(suite.strings, rewards.tolist(), strict=True))


def test_no_kind_of_string_pays_like_a_question_even_without_a_language_model(suite):
    """By the mean of each kind. Nine strings of 308 get through, since n-grams hardly see the order of words: PPO is
    refused this scorer."""
    mean, strings = graded(Scorer.fit(suite.learn_from), suite)
    kinds = {attack.kind for attack, _ in strings}
    assert len(strings) >= 200 and len(kinds) >= 35
    assert mean > 0.45 and sum(reward >= mean for _, reward in strings) <= 10
    for kind in kinds:
        rewards = [reward for attack, reward in strings if attack.kind == kind]
        assert sum(rewards) / len(rewards) < mean, kind


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_a_control_token_in_mid_question_is_seen(suite, name):
    """Ids as a policy may sample them, not their spelling: only the final EOS, and what padding follows, is no text."""
    tokenizer, row = load_tokenizer(name), suite.genuine[0]
    ids, eos = encode_completion(tokenizer, row.question), tokenizer.eos_token_id
    assert decode(tokenizer, ids) == decode(tokenizer, ids[:-1]) == decode(tokenizer, [*ids, eos, 0]) == row.question
    assert gates.form(row.question) > 0 and well_formed(row.question, row.context)
    controls = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special and id != eos]
    assert len(controls) >= 2
    for control in controls:
        for place in (0, len(ids) // 2, len(ids) - 1):
            asked = decode(tokenizer, [*ids[:place], control, *ids[place:]])
            assert tokenizer.decode([control]) in asked
            assert gates.form(asked) == 0 and not well_formed(asked, row.context), asked


@pytest.fixture(scope="module")
def deep(request, suite) -> Scorer:
    """The scorer with smollm2, for those who ask for slow tests."""
    if "slow" not in request.config.option.markexpr:
        pytest.skip("takes minutes: python -m pytest -m slow tests/test_attacks.py")
    return Scorer.fit(suite.learn_from, lm=open_language_model("smollm2"))


@pytest.mark.slow
def test_with_a_language_model_hardly_a_string_pays_like_a_question(suite, deep):
    """One of 308 does: one question's end on another's beginning, where the joint is a comma."""
    mean, strings = graded(deep, suite)
    through = [attack.kind for attack, reward in strings if reward >= mean]
    assert mean > 0.5 and len(through) <= 2 and {*through} <= {"crossed"}


BEATEN = pytest.mark.xfail(
    reason="all three climbs get through: .83, 1.00, .93, genuine questions have .54", strict=True
)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["words", pytest.param("question", marks=BEATEN)])
def test_two_thousand_edits_do_not_make_a_question(suite, deep, start):
    """Hill climbing, word by word, from random words and from a genuine question about another text."""
    rng = random.Random(0)
    words = sorted({word for row in suite.learn_from for word in row.question.rstrip("?").split()})
    own = [row for row in suite.genuine if row.type == "Clarity"][:3]
    mean, _ = graded(deep, suite)
    for row, other in zip(own, own[1:] + own[:1], strict=True):
        first = " ".join(rng.sample(words, 10)) if start == "words" else other.question

        def pays(questions, row=row):
            return deep.reward([row.context] * len(questions), questions, [row.type] * len(questions)).tolist()

        best, value = attacks.climb(pays, first, words + row.context.split())
        assert value < mean, best
