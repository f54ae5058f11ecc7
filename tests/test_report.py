"""The report: any run, finished or not, becomes a page; nothing that data or models say becomes part of its code."""

import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from socratiq.report import charts, metrics, page
from socratiq.run.errors import UserError

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "dpo", "ppo")

# ------------------------------------------------------------------------------------------------------------- a folder


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, stage, rows, name=None, samples=(), **args):
    place = folder / (name or stage)
    write(place / "metrics.jsonl", *rows)
    write(place / "timings.jsonl", {"step": 1, "seconds": 61.0, "tokens_per_second": 100.0, "peak_memory_mb": 9.0})
    write(place / "samples.jsonl", *samples)
    write(place / "train_args.json", {"stage": stage, "model": "tiny", "data": "sample", **args})


def evaluation(say="Why is that so?", type="Clarity", context="A text."):
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    record = {
        "context": 0, "type": type, "question": say, "well_formed": True, "judge": 0.7, "judge_type": type,
        "scorer": 0.8, "scorer_type": say,
    }  # fmt: skip
    stage = {
        "model": say, "figures": {"judge/accuracy": figure, say: figure, "words": {"value": None}},
        "by_type": {type: {"judge/accuracy": figure}}, "questions": [record],
    }  # fmt: skip
    return {
        "settings": {"data": say}, "classifiers": ["judge", "scorer"], "left_out": [say], "types": [type],
        "contexts": [context], "steps": {"base -> sft": {"judge/accuracy": figure}},
        "meanings": {n: {"title": say, "better": 1, "meaning": say} for n in ("judge/accuracy", say, "words")},
        "stages": dict.fromkeys(("human", "base", *STAGES, say), stage),
    }  # fmt: skip


def of_stage(stage):
    """The rows of the page of metrics for a stage."""
    return [metric for metric in metrics.read_metrics() if stage in metric.stages]


def every_metric(stage, steps=15):
    names = {name.replace("*", "form") for row in of_stage(stage) for name in row.names}
    return [{"step": step, **{name: 0.1 * step + 0.3 for name in names}} for step in range(steps)]


@pytest.fixture
def runs(tmp_path):
    """All three stages with few metrics: a chart takes time. Pairs and an evaluation."""
    sample = {"split": "held_out", "type": "Clarity", "context": "A text.", "question": "Why?", "score": 0.4}
    rows = [{"step": step, "loss": 3.0 - step, "eval/loss": 3.0} for step in range(3)]
    for stage in STAGES:
        make_run(tmp_path, stage, rows, samples=[{"step": step, **sample} for step in range(9)])
    pair = {"prompt": "p", "chosen": "Good?", "rejected": "Bad?", "type": "Clarity", "context": "A text."}
    write(tmp_path / "pairs.jsonl", *[pair | {"chosen_strength": 0.9, "rejected_strength": 0.1}] * 5)
    write(tmp_path / "pairs.dropped.jsonl", {"reason": "labelled others"})
    write(tmp_path / "evaluation.json", evaluation())
    return tmp_path


class Page(HTMLParser):
    """A page whose tags are all closed: tags, ids, links, texts, and attributes that would run code."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(page)
        assert not self.open, self.open
        self.ids = [value for name, value in self.attributes if name == "id"]
        self.links = [value for name, value in self.attributes if name in ("href", "src", "xlink:href")]
        self.handlers = [value for name, value in self.attributes if name.startswith("on")]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def test_the_page_holds_every_stage_and_needs_nothing_from_elsewhere(runs):
    for stage in STAGES:
        write(runs / stage / "metrics.jsonl", *every_metric(stage))
    html = page.build(runs)
    found = Page(html)
    assert html == page.build(runs)  # the same runs, the same bytes
    assert "script" not in found.tags and not found.handlers
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(r"(?:src|href)=.?https?:|@import|url\((?!#)", html)
    assert "default-src 'none'" in html and "script-src" not in html
    for metric in metrics.read_metrics():
        assert html.count(f"<h3>{metric.title.split(' (')[0]} ") >= len(metric.stages)
    assert "Questions on the way" in html and "step 8" in html
    assert "5 pairs were kept" in html and "labelled others" in html
    assert "chosen, mean 0.9" in html and "rejected, mean 0.1" in html
    assert "50%</b>" in html and "prefers-color-scheme: dark" in html


HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&{{}}\u202e$\\frac{"


def test_hostile_text_stays_text(tmp_path):
    for stage in STAGES:
        rows = [{"step": step, HOSTILE: 1.0, "loss": 2.0, "note": HOSTILE} for step in range(3)]
        sample = {"split": "held_out", "type": HOSTILE, "context": HOSTILE, "question": HOSTILE, "score": HOSTILE}
        make_run(tmp_path, stage, rows, samples=[{"step": HOSTILE, **sample}], data=HOSTILE, lr=HOSTILE, **{HOSTILE: 1})
    make_run(tmp_path, "ppo", [{"step": 1}], name='x" onload="alert(3)')
    write(tmp_path / "pairs.jsonl", dict.fromkeys(("chosen", "rejected", "type", "chosen_strength"), HOSTILE))
    write(tmp_path / "pairs.dropped.jsonl", {"reason": HOSTILE})
    write(tmp_path / "evaluation.json", evaluation(HOSTILE, HOSTILE, HOSTILE))
    html = page.build(tmp_path)
    found = Page(html)
    assert not {"script", "img"} & {*found.tags} and not found.handlers
    assert "<img" not in html and "alert(1)</script>" not in html
    assert any("alert(1)" in text for text in found.texts)  # shown, as text


names = st.sampled_from(["step", "loss", "type", "context", "question", "split", "score", "chosen_strength", "x"])
plain = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8)
values = plain | st.lists(plain, max_size=2) | st.dictionaries(st.text(max_size=4), plain, max_size=2)
lines = st.lists(st.dictionaries(names, values), max_size=4)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=HealthCheck)
@given(lines, lines, values)
def test_any_json_becomes_a_page(tmp_path, logged, asked, anything):
    samples = [{"split": "held_out", **row} for row in asked]
    make_run(tmp_path, "sft", logged, samples=samples, model=anything, lr=anything)
    write(tmp_path / "pairs.jsonl", *asked)
    write(tmp_path / "pairs.dropped.jsonl", {"reason": anything})
    assert "script" not in Page(page.build(tmp_path)).tags


def test_runs_that_have_hardly_begun(tmp_path):
    make_run(tmp_path, "sft", [])
    (tmp_path / "sft" / "timings.jsonl").unlink()
    make_run(tmp_path, "dpo", [{"step": 0, "eval/loss": 0.69, "eval/rewards/accuracies": 0.0}])
    html = page.build(tmp_path)
    Page(html)
    assert "Nothing has been logged yet" in html and "under way" in html and "PPO" not in html.split("<main>")[0]


def test_a_line_that_is_being_written_is_left_alone(tmp_path):
    make_run(tmp_path, "sft", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    with open(tmp_path / "sft" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert page.read_runs(tmp_path)[0].series["loss"] == [(1, 3.0), (2, 2.0)]
    with open(tmp_path / "sft" / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="line 3: not JSON"):
        page.build(tmp_path)


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path):
    rows = [{"step": step, "loss": loss} for step, loss in enumerate([None, 2.0, "x", True, 1e300, 1.0])]
    make_run(tmp_path, "sft", rows)
    assert page.read_runs(tmp_path)[0].series["loss"] == [(1, 2.0), (5, 1.0)]
    write(tmp_path / "sft" / "metrics.jsonl", {"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf})
    Page(page.build(tmp_path))


def test_two_runs_of_a_stage_are_named_by_their_folders(tmp_path):
    for name in ("ppo", "ppo-low-kl"):
        make_run(tmp_path, "ppo", [{"step": step, "val/loss": 2.0} for step in range(3)], name=name)
    make_run(tmp_path, "foreigner", [{"step": 1}])  # not ours
    html = page.build(tmp_path)
    assert ">ppo-low-kl</a>" in html and "foreigner" not in html
    ids = Page(html).ids
    assert len(ids) == len(set(ids))


def test_evaluation_alone_and_training_alone(runs, tmp_path):
    write(tmp_path / "alone" / "evaluation.json", evaluation() | {"classifiers": ["scorer"]})
    Page(page.build(tmp_path / "alone"))
    (runs / "evaluation.json").unlink()
    assert "python -m socratiq.evaluate" in page.build(runs)


def test_figures_older_than_a_model_are_marked(runs):
    (runs / "dpo" / "summary.json").write_text("{}")
    os.utime(runs / "evaluation.json", (1, 1))
    html = page.build(runs)
    assert "Older than the model in dpo: evaluate again." in html and "Older than the model in sft" not in html


# ---------------------------------------------------------------------------------------------------------- the command


def test_write_prints_where_and_refuses_a_folder_without_runs(runs, tmp_path, capsys):
    page.write([str(runs)])
    assert capsys.readouterr().out.startswith(f"{runs / 'report.html'}: sft, dpo, ppo;")
    Page((runs / "report.html").read_text(encoding="utf-8"))
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, problem in ((empty, "holds no run"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=problem):
            page.write([str(place)])
    with pytest.raises(UserError, match="a folder; give the name of a file"):
        page.write([str(runs), "--out", str(empty)])
    (runs / "evaluation.json").write_text("{}")
    page.write([str(runs)])
    for content, problem in (("[", "not JSON"), ("[]", "expected a JSON object"), ('{"a": 1}', "not written by")):
        (runs / "evaluation.json").write_text(content)
        with pytest.raises(UserError, match=problem):
            page.write([str(runs)])


def test_tensorboard_gets_every_number(runs, monkeypatch, capsys):
    module = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    writer = module.SummaryWriter.return_value = MagicMock()
    page.write([str(runs), "--tensorboard", "events"])
    assert [call.args[0] for call in module.SummaryWriter.call_args_list] == [f"events/{stage}" for stage in STAGES]
    written = [call.args for call in writer.__enter__.return_value.add_scalar.call_args_list]
    assert written.count(("eval/loss", 3.0, 2)) == 3 and len(written) == 3 * (3 * 3 + 4)
    assert "tensorboard --logdir events" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        page.write([str(runs), "--tensorboard", "events"])


# ------------------------------------------------------------------------------------------------- the page of metrics

NAMES = """
    loss learning_rate grad_norm tokens_per_second rewards/chosen rewards/rejected rewards/margins rewards/accuracies
    logps/chosen logps/rejected objective/kl objective/scores objective/rlhf_reward objective/entropy objective/kl_coef
    policy/approxkl policy/clipfrac policy/loss val/loss val/clipfrac val/explained_variance val/ratio eos_rate
"""


def test_the_page_is_read_to_its_last_entry_and_knows_names_and_options_that_exist():
    table = metrics.read_metrics()
    assert len(table) == metrics.PAGE.read_text(encoding="utf-8").count("\n### ")
    assert all(row.names and row.title and row.meaning and {*row.stages} <= {*STAGES} for row in table)
    assert {*NAMES.split()} <= {name for row in table for name in row.names}
    accuracy = next(row for row in table if row.names[0] == "rewards/accuracies")
    assert (accuracy.band, accuracy.relative, accuracy.since) == ((0.7, 0.95), False, 2)
    assert accuracy.mark == (0.5, "coin toss")
    assert [row.band for row in table if row.relative][-1] == (0.8, 1.2)
    for stage in STAGES:
        names = [name for row in of_stage(stage) for name in row.names]
        assert len(names) == len(set(names))
        source = "".join((ROOT / name).read_text() for name in (f"train_{stage}.py", "socratiq/run/options.py"))
        for row in of_stage(stage):
            for option in re.findall(r"--[a-z-]+", row.meaning + row.healthy + row.sick):
                assert f'"{option}"' in source, f"{row.names}: {option}"


# --------------------------------------------------------------------------------------------------------------- charts


def test_many_points_are_averaged_and_smoothing_keeps_a_straight_line_and_calms_a_jagged_one():
    thin = charts.thinned([(float(i), float(i % 2)) for i in range(10_000)])
    assert len(thin) <= charts.MOST_POINTS and thin[:, 1].mean() == pytest.approx(0.5, abs=0.01)
    steps = np.arange(60)
    straight = np.column_stack([steps, 2.0 * steps])
    assert charts.smooth(straight)[5:-5] == pytest.approx(straight[5:-5])
    jagged = charts.smooth(np.column_stack([steps, steps % 2.0]))
    assert 0.2 < jagged[:, 1].min() < jagged[:, 1].max() < 0.8 and (jagged[:, 0] == steps).all()


@pytest.mark.parametrize(
    ("low", "high", "whole", "found"),
    [
        (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.13, 0.31, False, [-0.1, 0, 0.1, 0.2, 0.3]),
        (1.0, 3.0, True, [1, 2, 3]),
        (7.0, 7.0, True, [7]),
        (2e6, 2.1e6, False, [2e6, 2.02e6, 2.04e6, 2.06e6, 2.08e6, 2.1e6]),
    ],
)
def test_axes_have_few_and_round_numbers(low, high, whole, found):
    assert charts.ticks(low, high, whole) == pytest.approx(found)


def test_the_healthy_range_is_shaded_only_where_it_can_be_seen():
    def shaded(points, *band, relative=False):
        row = metrics.Metric(["x"], ["sft"], "X", band=band, relative=relative)
        return "var(--band)" in charts.draw([("x", points, "sft")], row)

    points = [(0, 0.5), (1, 0.6)]
    assert shaded(points, 0.4, 0.55) and shaded(points, 0.55, math.inf) and not shaded(points, 90, 100)
    assert shaded(points, 0.9, 1.1, relative=True) and not shaded(points, 2, 3, relative=True)
    assert shaded([(0, -50.0), (1, -52.0)], 0.9, 1.1, relative=True)
    assert shaded([(0, 0.0), (1, 0.1)], 1, math.inf, relative=True)  # 0 times infinity is no number
    assert not shaded([(0, -1.0), (1, -1.5)], 0.1, math.inf, relative=True)
    jagged = [(i, float(10 * (i % 2))) for i in range(60)]  # begins at 0, its average at 5
    assert shaded(jagged, 1, 1.4, relative=True)


def test_histograms_count_every_number_once():
    assert page.bars([0.0, 0.04, 0.5, 1.0, 1.2, -1.0, None, "x", math.nan]) == [3, *[0] * 9, 1, *[0] * 8, 2]
