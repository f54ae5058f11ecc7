"""The report: any run, finished or not, becomes a page; nothing that data or models say becomes part of its code."""

import json
import math
import os
import re
import sys
from html.parser import HTMLParser

import pytest

from socratiq.report import charts
from socratiq.report import page as report
from socratiq.report.metrics import CHARTS
from socratiq.run.errors import UserError

# ------------------------------------------------------------------------------------------------------------- a folder


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, stage, rows, name=None, samples=(), **args):
    place = folder / (name or stage)
    write(place / "metrics.jsonl", *rows)
    write(place / "timings.jsonl", {"step": 1, "seconds": 61.0, "tokens_per_second": 100.0, "peak_memory_mb": 9.0})
    write(place / "samples.jsonl", *samples)
    (place / "train_args.json").write_text(json.dumps({"stage": stage, "model": "tiny", "data": "sample", **args}))


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
        "stages": {name: stage for name in ("human", "base", "sft", "dpo", "ppo")},
    }  # fmt: skip


def every_metric(stage, steps=15):
    names = {curve.metric for chart in CHARTS[stage] for curve in chart.curves} | {"learning_rate"}
    return [{"step": step, **{name: 0.1 * step + 0.3 for name in names}} for step in range(steps)]


@pytest.fixture
def runs(tmp_path):
    for stage in CHARTS:
        make_run(tmp_path, stage, every_metric(stage))
    sample = {"split": "held_out", "type": "Clarity", "context": "A text.", "question": "Why?", "score": 0.4}
    write(tmp_path / "ppo" / "samples.jsonl", *({"step": step, **sample} for step in range(9)))
    pair = {"prompt": "p", "chosen": "Good?", "rejected": "Bad?", "type": "Clarity", "context": "A text."}
    write(tmp_path / "pairs.jsonl", *[pair | {"chosen_score": 0.9, "rejected_score": 0.1}] * 5)
    write(tmp_path / "pairs.dropped.jsonl", {"reason": "labelled others"})
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    return tmp_path


class Page(HTMLParser):
    """Tags that were opened and closed, ids, links, texts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.texts, self.handlers = [], [], [], [], [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src"):
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append(value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def test_the_page_holds_every_stage_and_needs_nothing_from_elsewhere(runs):
    page = report.build(runs)
    found = Page(page)
    assert found.tags.count("script") == 1 and not found.handlers
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(r"(?:src|href)=.?https?:|@import|url\(", page)
    assert "default-src 'none'" in page and 'http-equiv="refresh"' not in page
    for stage in CHARTS:
        for chart in CHARTS[stage]:
            assert f"<h3>{chart.title}" in page
    assert "What it asked on the way" in page and "step 8" in page
    assert "5 pairs were kept" in page
    assert "prefers-color-scheme: dark" in page


def test_the_same_runs_give_the_same_page(runs):
    assert report.build(runs) == report.build(runs)


HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&{{}}\u202e"


def test_hostile_text_stays_text(tmp_path):
    for stage in CHARTS:
        rows = [{"step": step, HOSTILE: 1.0, "loss": 2.0, "note": HOSTILE} for step in range(3)]
        sample = {"split": "held_out", "type": HOSTILE, "context": HOSTILE, "question": HOSTILE, "score": HOSTILE}
        make_run(tmp_path, stage, rows, samples=[{"step": HOSTILE, **sample}], data=HOSTILE, lr=HOSTILE, **{HOSTILE: 1})
    make_run(tmp_path, "ppo", [{"step": 1}], name='x" onload="alert(3)')
    write(tmp_path / "pairs.jsonl", {"chosen": HOSTILE, "rejected": HOSTILE, "type": HOSTILE, "chosen_score": HOSTILE})
    write(tmp_path / "pairs.dropped.jsonl", {"reason": HOSTILE})
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(HOSTILE, HOSTILE, HOSTILE)))
    page = report.build(tmp_path)
    found = Page(page)
    assert found.tags.count("script") == 1 and "img" not in found.tags and not found.handlers
    assert "<img" not in page and "alert(1)</script>" not in page
    assert any("alert(1)" in text for text in found.texts)  # shown, as text


def test_runs_that_have_hardly_begun(tmp_path):
    make_run(tmp_path, "sft", [])
    make_run(tmp_path, "dpo", [{"step": 0, "eval/loss": 0.69, "eval/rewards/accuracies": 0.0}])
    page = report.build(tmp_path)
    Page(page)
    assert "Nothing has been logged yet" in page and "under way" in page and "PPO" not in page.split("<main>")[0]


def test_a_line_that_is_being_written_is_left_alone(tmp_path):
    make_run(tmp_path, "sft", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    with open(tmp_path / "sft" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert report.read_runs(tmp_path)[0].series("loss") == [(1, 3.0), (2, 2.0)]
    with open(tmp_path / "sft" / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="line 3: not JSON"):
        report.build(tmp_path)


def test_a_folder_behind_watch_is_told_where_it_belongs(capsys):
    with pytest.raises(SystemExit) as left:
        report.write(["--watch", "runs"])
    assert left.value.code == 2 and "the folder comes first, as in: runs --watch" in capsys.readouterr().err


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path):
    rows = [{"step": step, "loss": loss} for step, loss in enumerate([None, 2.0, "x", True, 1e300, 1.0])]
    make_run(tmp_path, "sft", rows)
    assert report.read_runs(tmp_path)[0].series("loss") == [(1, 2.0), (5, 1.0)]
    write(tmp_path / "sft" / "metrics.jsonl", {"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")})
    Page(report.build(tmp_path))


def test_two_runs_of_a_stage_are_named_by_their_folders(tmp_path):
    for name in ("ppo", "ppo-low-kl"):
        make_run(tmp_path, "ppo", every_metric("ppo"), name=name)
    make_run(tmp_path, "foreigner", [{"step": 1}])  # not ours
    page = report.build(tmp_path)
    assert ">ppo-low-kl</a>" in page and "foreigner" not in page


def test_evaluation_alone_and_training_alone(runs, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "evaluation.json").write_text(json.dumps(evaluation()))
    Page(report.build(alone))
    (runs / "evaluation.json").unlink()
    assert "python -m socratiq.evaluate" in report.build(runs)
    without_judge = evaluation()
    without_judge["classifiers"] = ["scorer"]
    (alone / "evaluation.json").write_text(json.dumps(without_judge))
    Page(report.build(alone))


def test_figures_older_than_a_model_are_marked(runs):
    (runs / "dpo" / "summary.json").write_text("{}")
    os.utime(runs / "evaluation.json", (1, 1))
    page = report.build(runs)
    assert "Older than the model in dpo: evaluate again." in page and "Older than the model in sft" not in page


# ---------------------------------------------------------------------------------------------------------- the command


def test_write_prints_where_and_refuses_what_is_no_folder_of_runs(runs, tmp_path, capsys):
    report.write([str(runs)])
    assert capsys.readouterr().out.startswith(f"{runs / 'report.html'}: sft, dpo, ppo;")
    Page((runs / "report.html").read_text(encoding="utf-8"))
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, problem in ((empty, "holds no run"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=problem):
            report.write([str(place)])
    with pytest.raises(UserError, match="a folder; give the name of a file"):
        report.write([str(runs), "--out", str(empty)])
    (runs / "evaluation.json").write_text("{}")
    report.write([str(runs)])
    for content, problem in (("[", "not JSON"), ("[]", "expected a JSON object"), ('{"a": 1}', "not written by")):
        (runs / "evaluation.json").write_text(content)
        with pytest.raises(UserError, match=problem):
            report.write([str(runs)])


def test_watching_renews_the_page_until_it_is_ended(runs, monkeypatch):
    seen = []

    def sleep(seconds):
        seen.append((runs / "report.html").read_text())
        make_run(runs, "ppo", every_metric("ppo", 4), name="late")
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        report.write([str(runs), "--watch", "3"])
    assert all('http-equiv="refresh" content="3"' in page for page in seen)
    assert ">late</a>" not in seen[0] and ">late</a>" in seen[1]
    assert "refresh" not in (runs / "report.html").read_text().split("<style>")[0]


def test_watching_waits_for_a_folder_that_is_not_there_yet(tmp_path, monkeypatch):
    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        report.write([str(tmp_path / "later"), "--watch"])
    assert "Nothing has been trained here yet" in (tmp_path / "later" / "report.html").read_text()


def test_tensorboard_gets_every_number(runs, tmp_path, monkeypatch, capsys):
    written = []

    class Writer:
        def __init__(self, folder):
            self.run = folder.rsplit("/", 1)[1]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_scalar(self, name, value, step):
            written.append((self.run, name, value, step))

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    report.write([str(runs), "--tensorboard", str(tmp_path / "events")])
    assert ("sft", "eval/loss", pytest.approx(0.5), 2) in written
    assert f"{len(written):,} numbers" in capsys.readouterr().out
    known, before = {}, len(written)
    assert report.export_tensorboard(report.read_runs(runs), "events", known) == before
    make_run(runs, "sft", every_metric("sft", 16))
    assert 0 < report.export_tensorboard(report.read_runs(runs), "events", known) < 10  # what is new since then
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        report.write([str(runs), "--tensorboard", str(tmp_path / "events")])


# --------------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize(
    ("low", "high", "count", "found"),
    [
        (0, 1, 4, [0, 0.5, 1]),
        (0, 4, 4, [0, 1, 2, 3, 4]),
        (-60, -45, 4, [-60, -55, -50, -45]),
        (0.69, 0.71, 4, [0.69, 0.695, 0.7, 0.705, 0.71]),
    ],
)
def test_ticks_are_round(low, high, count, found):
    assert charts.ticks(low, high, count) == pytest.approx(found)


def test_steps_have_whole_ticks():
    assert charts.ticks(0, 2, 5, whole=True) == [0, 1, 2]


def test_the_axis_reaches_what_is_near_and_leaves_what_is_far():
    low, high = charts.limits([2.0, 3.0], [3.5, 50.0, math.inf])
    assert low < 2 and 3.5 < high < 4
    low, high = charts.limits([1.0, 1.0], [])
    assert low < 1 < high


def test_many_points_are_averaged():
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    thin = charts.thinned(points)
    assert len(thin) <= charts.MOST_POINTS
    assert sum(value for _, value in thin) / len(thin) == pytest.approx(0.5, abs=0.01)
    assert charts.thinned(points[:10]) == points[:10]


def test_smoothing_keeps_a_straight_line_and_calms_a_jagged_one():
    straight = [(float(i), 2.0 * i) for i in range(60)]
    for (_, before), (_, after) in zip(straight[5:-5], charts.smooth(straight)[5:-5], strict=True):
        assert after == pytest.approx(before)
    jagged = [(float(i), float(i % 2)) for i in range(60)]
    assert all(0.2 < value < 0.8 for _, value in charts.smooth(jagged))


def test_a_noisy_curve_begins_at_its_average_and_held_out_dots_at_the_first():
    jagged = [(i, float(10 * (i % 2))) for i in range(60)]  # the average reaches three points ahead
    assert charts.start(charts.Line("a", jagged, "sft")) == 5
    assert charts.start(charts.Line("a", jagged, "sft", dots=True)) == 0
    assert charts.start(charts.Line("a", [(0, math.nan), (1, 7.0), (2, 8.0)], "sft")) == 7


def test_dots_that_would_hide_one_another_hang_below():
    assert charts.below([10, 50, 10.5, 12, 50]) == [0, 0, 1, 2, 1]
    dots = [charts.Dot(name, 0.5, "sft") for name in "abc"]
    heights = set(re.findall(r'<circle[^>]* cy="([\d.]+)"', charts.dot_chart([("type", dots)], "name")))
    assert len(heights) == 3


def test_a_half_is_rounded_up_as_in_the_tables():
    assert report.share(0.905) == "91%" and report.share(0.025) == "3%" and report.share(0.0) == "0%"
    assert report.points(0.035) == "+4" and report.points(-0.15) == "−15" and report.points(0.001) == "0"


def test_the_healthy_range_is_shaded_only_where_it_can_be_seen():
    line = charts.Line("x", [(0, 0.5), (1, 0.6)], "sft")
    assert 'class="band"' in charts.line_chart([line], "x", band=(0.4, 0.55))
    assert 'class="band"' not in charts.line_chart([line], "x", band=(90, 100))
    assert 'class="band"' in charts.line_chart([line], "x", band=(0.55, math.inf))
    assert "nothing logged yet" in charts.line_chart([charts.Line("x", [], "sft")], "x")


def test_histograms_count_everything_once():
    drawn = charts.histogram([0.0, 0.04, 0.5, 1.0, 1.2, -1.0], "x", "sft")
    assert sum(int(count) for count in re.findall(r": (\d+)</title>", drawn)) == 6
    Page(charts.histogram([], "x", "sft"))


@pytest.mark.parametrize("x", [0, 1e-9, 0.00321, 0.5, 12.345, 1234, 123456, -3.2])
def test_numbers_are_short(x):
    assert len(charts.number(x)) <= 7
