"""python -m socratiq.show: its numbers are the identities that it teaches, and its columns stand under each other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from socratiq import show
from socratiq.data import Row
from socratiq.run.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pages():
    """Every stage on the tiny model, printed once."""
    command = [sys.executable, "-m", "socratiq.show", "--model", "tiny", "--scorer", "no/such/folder"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    head, *stages = re.split(r"\n\n\n(?=\w+: K = )", done.stdout)
    return head, dict(zip(("sft", "dpo", "ppo"), stages, strict=True))


def rows_of(page, name):
    """The numbers of all rows of one name, in order."""
    lines = [line[len(name) :].split() for line in page.splitlines() if re.match(re.escape(name) + r" {2,}", line)]
    return [float(cell) for line in lines for cell in line]


def test_shows_the_text_and_all_stages(pages):
    head, stages = pages
    assert head.startswith("text ") and "\ntype " in head and "tokens; the last 3 are shown" in head
    assert "</s>" in stages["sft"] and "</s>" in stages["dpo"]  # EOS has a column of its own
    assert "\033" not in "".join(stages.values())  # no colours where nobody sees them


def test_tokens_stand_above_their_numbers(pages):
    for page in pages[1].values():
        blocks = [block.splitlines() for block in page.split("\n\n") if block.startswith("token")]
        assert blocks and max(len(line) for block in blocks for line in block) <= 120
        for token, index, position, *_ in blocks:
            ends = [[match.end() for match in re.finditer(r"\S+", line)][1:] for line in (token, index, position)]
            assert ends[1] == ends[2] and ends[0][: len(ends[1])] == ends[1]


def test_sft_loss_is_minus_the_mean_of_the_log_probs_shown(pages):
    page = pages[1]["sft"]
    before, after = (float(x) for x in re.search(r"= (\S+); after one update (\S+)", page).groups())
    logprobs = rows_of(page, "log pi")
    assert before == pytest.approx(-sum(logprobs) / len(logprobs), abs=0.01)
    assert after < before
    assert len(logprobs) == sum(rows_of(page, "mask"))


def test_a_token_is_scored_one_place_before_its_own(pages):
    page = pages[1]["sft"]
    index, read = rows_of(page, "index"), rows_of(page, "scored at")
    assert read == [i - 1 for i in index[-len(read) :]]


def test_siblings_share_positions_but_not_places(pages):
    chosen, rejected = (part for part in re.split(r"\n(?:chosen|rejected): ", pages[1]["dpo"])[1:])
    assert rows_of(chosen, "position")[3:6] == rows_of(rejected, "position")[3:6]
    assert rows_of(rejected, "index")[3] == rows_of(chosen, "index")[-1] + 1
    assert rows_of(rejected, "scored at")[0] == rows_of(chosen, "scored at")[0]  # the last prompt token


def test_dpo_starts_at_ln_2_and_leaves_it(pages):
    page = pages[1]["dpo"]
    assert rows_of(page, "log pi_ref") == rows_of(page, "log pi")
    losses = [float(x) for x in re.findall(r"log sigmoid\(0.1 h\) = (\S+)", page)]
    assert losses[0] == 0.6931 and losses[1] < losses[0]


def test_ppo_rewards_and_advantages_add_up(pages):
    page = pages[1]["ppo"]
    _, *samples = re.split(r"\nsample \d: ", page)
    for sample in samples:
        score = float(re.search(r"score (-?\d\.\d+)\n", sample)[1])
        kl, rewards = rows_of(sample, "KL (k1)"), rows_of(sample, "reward")
        assert any(kl)
        expected = [-0.05 * x for x in kl]
        expected[-1] += score
        assert rewards == pytest.approx(expected, abs=0.011)
        assert rows_of(sample, "return") == rows_of(sample, "advantage")  # values are still 0
        assert rows_of(sample, "advantage")[-1] == pytest.approx(rewards[-1], abs=0.011)
        assert ("cut off" in sample) != ("ends in EOS" in sample)


def test_ppo_prints_the_reward_of_the_saved_scorer(inputs, capsys, monkeypatch):
    from socratiq.scorer.scorer import Scorer

    options = ["--stage", "ppo", "--model", "tiny"]
    files = ["--scorer", str(inputs / "deep_scorer"), "--data", str(inputs / "rows.jsonl")]
    monkeypatch.setattr("sys.argv", ["show", *options, *files])
    show.run()
    page = capsys.readouterr().out
    text, kind = re.search(r"text +(.+)\ntype +(.+)", page).groups()
    scorer = Scorer.load(inputs / "deep_scorer", dtype="float32")  # with the language model that it was fitted with
    for asked, paid in re.findall(r"sample \d: (.*)\nthe scorer's reward (\S+),", page):
        assert float(paid) == pytest.approx(scorer.reward([text], [asked], [kind]).item(), abs=0.001)


def test_picks_the_shortest_text_with_two_types():
    rows = [Row("a long text", "1?", "Analogy", "")] + [Row("text", f"{t}?", t, "") for t in ("Clarity", "Analogy")]
    assert [row.type for row in show.pick_rows(rows, "x.csv")] == ["Clarity", "Analogy"]
    with pytest.raises(UserError, match=r"--data x.csv: no text has questions of two types"):
        show.pick_rows(rows[:2], "x.csv")
