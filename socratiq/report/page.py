"""The whole pipeline on one page: curves with their healthy ranges, figures, and the questions of every stage.

    python -m socratiq.report runs                      -> runs/report.html
    python -m socratiq.report runs --tensorboard DIR    the curves for TensorBoard as well

One file that works offline, in light and dark, on a phone and on paper. It shows the runs it finds, finished or under
way, and after `python -m socratiq.evaluate` the comparison of the stages on held-out texts. The template, report.html,
escapes all text of data and models, and the page's content policy admits no script.
"""

import fnmatch
import json
import re
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from socratiq.evaluation.table import whole_percent
from socratiq.report.metrics import Metric, read_metrics
from socratiq.run.errors import UserError
from socratiq.run.files import atomic_write
from socratiq.run.options import Parser

STAGES = {
    "human": ("People", "The questions that people asked about the same texts."),
    "base": ("Base", "A pretrained model that never saw this task continues the prompt as best it can."),
    "sft": ("SFT", "Learns from rows of text, type and question to answer the prompt with one question."),
    "pairs": ("Pairs", "Sets beside each good question one about the same text that is not of its type."),
    "dpo": ("DPO", "Learns to find the chosen question more likely than the rejected one."),
    "ppo": ("PPO", "Asks, is scored, and makes good scores more likely, at a price for every nat of drift."),
}
TRAINED = {"sft": "eval/loss", "dpo": "eval/loss", "ppo": "eval/scores"}  # the metric that a stage is known by


class Run(NamedTuple):
    """The folder of one training run, as far as it has come."""

    name: str  # of the folder
    stage: str  # "sft", "dpo", "ppo"
    args: dict
    samples: list[dict]
    series: dict[str, list[tuple[float, float]]]  # by metric: (step, value) wherever it was logged as a finite number
    finished: float  # when, in seconds since 1970; 0 while it is under way

    def charts(self) -> list[dict]:
        """The metrics of docs/metrics.md that were logged, then one for each other metric."""
        from socratiq.report.charts import draw

        rows = [metric for metric in read_metrics() if self.stage in metric.stages]
        known = {name for row in rows for pattern in row.names for name in fnmatch.filter(self.series, pattern)}
        rows += [Metric([name], [], name) for name in self.series if name not in known | {"step"}]
        charts = []
        for row in rows:
            colors, held_out = cycle((self.stage, "second", "dpo", "sft", "human", "held")), cycle(("held", "human"))
            curves = [
                (name, points, next(held_out if name.startswith("eval/") else colors))
                for pattern in row.names
                for name in fnmatch.filter(self.series, pattern)
                if (points := [point for point in self.series[name] if point[0] >= row.since])
            ]
            if curves:
                charts.append({"row": row, "curves": curves, "drawing": draw(curves, row)})
        return charts

    def asked(self) -> list[tuple[tuple[str, str], list[dict]]]:
        """((context, type), the first, middle and last sample) of a few held-out tasks."""
        tasks: dict[tuple[str, str], list[dict]] = {}
        for sample in self.samples:
            if sample.get("split") == "held_out":
                tasks.setdefault((str(sample.get("context")), str(sample.get("type"))), []).append(sample)
        return [
            (task, [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})]) for task, found in tasks.items()
        ]


# --- what is there --------------------------------------------------------------------------------------------------


def read_json(path: Path, line: str | None = None) -> dict:
    """The JSON object in a file, or in a line of it; {} if there is none. Raises UserError for anything else."""
    try:
        found = json.loads(line or "{}") if line is not None or not path.is_file() else json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); repair or remove it") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}; repair or remove it")
    return found


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file. A last line without its newline is still being written: it is left alone."""
    lines = path.read_text("utf-8", "replace").split("\n")[:-1] if path.is_file() else []
    return [read_json(Path(f"{path} line {number}"), line) for number, line in enumerate(lines, 1)]


def read_runs(folder: Path) -> list[Run]:
    """Every training run in the folder, in the order of the stages."""
    runs = []
    for path in sorted(folder.glob("*/train_args.json")):
        args, place, end = read_json(path), path.parent, path.with_name("summary.json")
        stage = str(args.get("stage", place.name))
        series: dict[str, list] = {}
        if stage in TRAINED:
            for row in read_lines(place / "metrics.jsonl") + read_lines(place / "timings.jsonl"):
                for name, value in row.items():
                    if is_finite(value) and is_finite(row.get("step")):
                        series.setdefault(name, []).append((row["step"], value))
            samples = read_lines(place / "samples.jsonl")
            runs.append(Run(place.name, stage, args, samples, series, end.stat().st_mtime if end.exists() else 0))
    return sorted(runs, key=lambda run: list(TRAINED).index(run.stage))


def is_finite(x) -> bool:
    """Whether x is a number, not NaN, and not so large that it stands for infinity."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e12


def read_evaluation(path: Path) -> dict:
    """evaluation.json and when it was written; {} if there is none."""
    found = read_json(path)
    if not found:
        return {}
    if not {"stages", "contexts", "types", "classifiers", "steps", "meanings"} <= found.keys():
        raise UserError(f"{path}: not written by socratiq.evaluate; remove it")
    stages = {name: found["stages"][name] for name in STAGES if name in found["stages"]}
    return found | {"stages": stages, "written": path.stat().st_mtime}


# --- the page -------------------------------------------------------------------------------------------------------


def percent(x: float, sign: str = "") -> str:
    """A share in whole percent, as in the terminal's table; sign "+" is for a difference of two shares."""
    whole = whole_percent(x)
    return f"{whole:{sign}d}".replace("-", "−") if whole or not sign else "0"


def short(x) -> str:
    """A number in two decimals, or two figures if it is small; anything else as text."""
    return str(x) if not is_finite(x) else f"{x:.2g}" if 0 < abs(x) < 0.1 else f"{x:.{2 if abs(x) < 100 else 0}f}"


def bars(values) -> list[int]:
    """How many of the numbers among the values lie in each twentieth of 0..1."""
    places = [min(19, max(0, int(20 * value))) for value in values if is_finite(value)]
    return [places.count(i) for i in range(20)]


def code(text: str):
    """HTML of a caption, its options in code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(--[a-z-]+)", r"<code>\1</code>", str(escape(text))))


def build(folder: Path) -> str:
    """The page about a folder of runs."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=here, autoescape=True, trim_blocks=True, undefined=ChainableUndefined)
    environment.filters |= {"percent": percent, "short": short, "bars": bars, "code": code}
    environment.tests["finite"] = is_finite
    reasons = [str(row.get("reason", "")).split(": ")[0] for row in read_lines(folder / "pairs.dropped.jsonl")]
    return environment.get_template("report.html").render(
        stages=STAGES,
        trained=TRAINED,
        runs=read_runs(folder),
        evaluation=read_evaluation(folder / "evaluation.json"),
        pairs=read_lines(folder / "pairs.jsonl"),
        dropped=Counter(reasons).most_common(),
    )


def export_tensorboard(runs: list[Run], folder: str) -> None:
    """Write the metrics of every run as TensorBoard events, one subfolder a run.

    Raises UserError if the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    for run in runs:
        with SummaryWriter(str(Path(folder) / run.name)) as writer:
            for name, points in run.series.items():
                for step, value in points:
                    writer.add_scalar(name, value, int(step))


def write(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m socratiq.report", description="Write one HTML page about a folder of runs.")
    parser.add_argument("runs", nargs="?", default="runs", help="folder with sft, dpo, ppo, evaluation.json")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in that folder")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="write the curves as TensorBoard events, too")
    args = parser.parse_args(argv)
    folder = Path(args.runs)
    out = Path(args.out or folder / "report.html")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; train something first, or name the folder that holds sft, dpo, ppo")
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; give the name of a file")
    runs = read_runs(folder)
    if not runs and not any((folder / name).exists() for name in ("evaluation.json", "pairs.jsonl")):
        raise UserError(f"{folder}: holds no run of train_sft.py, train_dpo.py or train_ppo.py yet")
    atomic_write(out, build(folder))
    if args.tensorboard:
        export_tensorboard(runs, args.tensorboard)
        print(f"look at the same curves with: tensorboard --logdir {args.tensorboard}")
    print(f"{out}: {', '.join(run.name for run in runs) or 'no runs'}; open it in a browser")
