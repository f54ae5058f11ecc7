"""The judge: what it reads, that it judges, and that nothing about it is random."""

import pytest
import torch
from test_scorer import TOPICS, columns_of, made_rows

from socratiq.evaluation.judge import BUCKETS, RIDGE, Judge, buckets, ridge
from socratiq.run.errors import UserError

ROWS = made_rows(TOPICS[:8])


def test_the_judge_judges():
    judge = Judge.fit(ROWS)
    *columns, types = columns_of(made_rows(["kites", "violins"]))
    strengths = judge.strengths(*columns)
    assert judge.types == ["Assumptions", "Clarity", "Reasons"]
    assert [judge.types[i] for i in strengths.argmax(1)] == types
    assert ((strengths > 0) & (strengths < 1)).all()
    assert (strengths.sum(1) - 1).abs().mean() < 0.3  # calibrated: about one type each
    assert torch.equal(Judge.fit(ROWS[::-1]).strengths(*columns), strengths)  # the order of the rows plays no part
    assert judge.strengths([], []).shape == (0, 3)
    odd = ["", "?", "\u2603", "a" * 5000, "\n\t", "Why\0?"]
    assert torch.isfinite(judge.strengths([""] * len(odd), odd)).all()


def test_leave_one_out_predictions_are_those_of_a_fit_without_the_row():
    """The calibration would be overconfident if a row's own label were in its prediction."""
    x, y = (torch.randn(6, n, generator=torch.Generator().manual_seed(n)) for n in (4, 2))
    unseen = ridge(x, y)[1]
    for i in range(6):
        rest = [n for n in range(6) if n != i]
        weight = torch.linalg.solve(x[rest].T @ x[rest] + RIDGE * torch.eye(4), x[rest].T @ y[rest])
        torch.testing.assert_close(x[i] @ weight, unseen[i])
        torch.testing.assert_close(ridge(x[rest], y[rest])[0], weight)


def test_the_judge_reads_characters_and_places():
    assert buckets("Why so?") != buckets("So why?")
    assert set(buckets("reasons")) & set(buckets("reasoning"))
    assert buckets("Don’t WE?") == buckets("don't we?")
    assert all(0 <= bucket < BUCKETS for bucket in buckets("Why so?"))


def test_rows_without_a_type_teach_nothing():
    untyped = [row._replace(type="") for row in ROWS]
    strengths = Judge.fit(ROWS).strengths([""], ["Why so?"])
    assert torch.equal(Judge.fit(ROWS + untyped).strengths([""], ["Why so?"]), strengths)
    with pytest.raises(UserError, match="too few rows"):
        Judge.fit([*untyped, *(row for row in ROWS if row.type == "others")])
