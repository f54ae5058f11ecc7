"""The whole pipeline on one page: curves with their healthy ranges, figures, and what every stage asks, side by side.

    python -m socratiq.report runs                      -> runs/report.html
    python -m socratiq.report runs --watch              written anew every 10 seconds while training runs
    python -m socratiq.report runs --tensorboard DIR    the curves for TensorBoard as well

One file that works offline, in light and dark, on a phone and on paper. It shows whatever is there: runs that are under
way, stages that are missing, and, after `python -m socratiq.evaluate`, the comparison of the stages on held-out texts.
Everything that comes from data or models is escaped, and the page's content policy admits no script but its own.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import re
import time
from html import escape
from pathlib import Path
from typing import NamedTuple

from socratiq.report import charts
from socratiq.report.metrics import CHARTS, Chart
from socratiq.run import options as cli
from socratiq.run.errors import UserError
from socratiq.run.files import atomic_write

PAGES = Path(__file__).parent
OPTION = re.compile(r"(--[a-z][a-z-]+(?: [\d.]+)?)")  # "--lr" in a caption
MOST_TEXTS = 24  # texts whose questions are shown; the rest is in evaluation.json
STAGES = {
    "base": ("Base", "A pretrained model that never saw this task goes on writing after the prompt as best it can."),
    "sft": (
        "SFT",
        "Learns from rows of text, type and question to answer the prompt with one question: "
        "cross-entropy on the question's tokens.",
    ),
    "pairs": (
        "Pairs",
        "Puts beside each good question one about the same text that is not of its type, verified by the scorer.",
    ),
    "dpo": (
        "DPO",
        "Learns to find the chosen question likelier than the rejected one, measured against the model it began as.",
    ),
    "ppo": (
        "PPO",
        "Asks, is scored, and makes what scored well likelier, at a price for every nat it drifts from its beginning.",
    ),
    "human": ("People", "The questions that people asked about the same texts."),
}


def parse_arguments(argv: list[str] | None = None):
    parser = cli.Parser(prog="python -m socratiq.report", description="Write one HTML page about a folder of runs.")
    parser.add_argument("runs", nargs="?", default="runs", help="folder with sft, dpo, ppo, evaluation.json")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in that folder")
    parser.add_argument(
        "--watch", nargs="?", type=seconds, const=10.0, metavar="SECONDS", help="write it anew until Ctrl-C"
    )
    parser.add_argument("--tensorboard", metavar="FOLDER", help="write the curves as TensorBoard events, too")
    return parser.parse_args(argv)


def seconds(text: str) -> float:
    """What --watch takes, or the folder that somebody has put behind it."""
    try:
        return cli.positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; the folder comes first, as in: runs --watch") from None


# --- what is there --------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The folder of one training run, as far as it has come."""

    name: str  # of the folder
    stage: str  # "sft", "dpo", "ppo"
    args: dict
    metrics: list[dict]
    timings: list[dict]
    samples: list[dict]
    finished: bool

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) wherever this metric was logged as a number."""
        return charts.finite((row.get("step"), row.get(metric)) for row in self.metrics)


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file that may be growing: a last line without its newline is left alone."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    rows = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"{path} line {number}: not JSON ({error}); mend or remove the line") from None
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_object(path: Path) -> dict:
    """The JSON object in a file; {} if there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or write it anew") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_runs(folder: Path) -> list[Run]:
    """Every training run in the folder, in the order of the stages."""
    runs = []
    for known in sorted(folder.glob("*/train_args.json")):
        args, place = read_object(known), known.parent
        stage = args.get("stage", place.name)
        if stage in CHARTS:
            logs = [read_lines(place / f"{name}.jsonl") for name in ("metrics", "timings", "samples")]
            runs.append(Run(place.name, stage, args, *logs, (place / "summary.json").exists()))
    return sorted(runs, key=lambda run: list(CHARTS).index(run.stage))


def read_evaluation(folder: Path) -> dict:
    """evaluation.json, if it is there and looks like one."""
    found = read_object(folder / "evaluation.json")
    if found and not all(name in found for name in ("stages", "contexts", "types", "meanings", "classifiers")):
        raise UserError(f"{folder / 'evaluation.json'}: not written by socratiq.evaluate; remove it")
    return found


# --- pieces of the page ---------------------------------------------------------------------------------------------


def e(value) -> str:
    """Text for HTML."""
    return escape(str(value))


def tint(stage: str) -> str:
    return f'style="--c:var(--{stage if stage in STAGES else "second"})"'


def share(x: float) -> str:
    """A share in whole percent; a half goes up, as in the tables with two decimals."""
    return f"{charts.half_up(100 * x)}%"


def points(x: float) -> str:
    """A difference of two shares, in percentage points."""
    whole = charts.half_up(100 * x)
    return f"+{whole}" if whole > 0 else str(whole).replace("-", "−")


def beginning(text: str, longest: int) -> str:
    """The first words of a text, with "…" if that is not all of it."""
    return text if len(text) <= longest else text[:longest].rsplit(" ", 1)[0] + " …"


def figure(title: str, drawing: str, caption: str = "", legend: str = "", unit: str = "") -> str:
    unit = f" <small>{e(unit)}</small>" if unit else ""
    return (
        f'<figure class="card"><header><h3>{e(title)}{unit}</h3>{legend}</header>{drawing}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def chart_figure(chart: Chart, run: Run) -> str:
    """One chart of a run, "" if none of its metrics was logged."""
    curves = [(curve, [p for p in run.series(curve.metric) if p[0] >= chart.since]) for curve in chart.curves]
    curves = [(curve, points) for curve, points in curves if points]
    if not curves:
        return ""
    lines = [
        charts.Line(curve.label, points, curve.color, dots=curve.metric.startswith("eval/")) for curve, points in curves
    ]
    band = chart.band
    if callable(band):
        starts = {curve.metric: charts.start(line) for (curve, _), line in zip(curves, lines, strict=True)}
        band = band(starts, run.args)
    drawing = charts.line_chart(lines, chart.title, band, chart.mark, chart.floor)
    swatches = [
        f'<span class="{"" if line.dots else "line"}" style="--c:var(--{line.color})">{e(line.label)}</span>'
        for line in lines
    ]
    if 'class="band"' in drawing:
        swatches.append('<span class="shade">healthy</span>')
    meaning, healthy, sick = (OPTION.sub(r"<code>\1</code>", e(x)) for x in (chart.meaning, chart.healthy, chart.sick))
    caption = f"<p>{meaning}</p><p><b>Healthy:</b> {healthy}</p><p><b>Sick:</b> {sick}</p>"
    return figure(chart.title, drawing, caption, f'<div class="legend">{"".join(swatches)}</div>', chart.unit)


def other_charts(run: Run) -> str:
    """What else was logged, folded away: one plain chart a metric."""
    drawn = {curve.metric for chart in CHARTS[run.stage] for curve in chart.curves} | {"step"}
    names = sorted({name for row in run.metrics for name in row} - drawn)
    timed = {"tokens_per_second": "tokens per second", "peak_memory_mb": "peak memory, MB"}
    plain = [(name, run.series(name)) for name in names]
    plain += [
        (title, charts.finite((row.get("step"), row.get(name)) for row in run.timings)) for name, title in timed.items()
    ]
    figures = [
        figure(name, charts.line_chart([charts.Line(name, points, "second")], name)) for name, points in plain if points
    ]
    return folded(f"{len(figures)} more curves", f'<div class="grid">{"".join(figures)}</div>') if figures else ""


def folded(title: str, content: str) -> str:
    return f'<details class="more"><summary>{e(title)}</summary>{content}</details>'


def settings(args: dict) -> str:
    items = "".join(
        f"<li><code>--{e(name.replace('_', '-'))} {e(value)}</code></li>"
        for name, value in args.items()
        if name not in ("stage", "contents") and value is not None  # neither is an option
    )
    return folded("every setting", f'<ul class="settings">{items}</ul>')


def percent(entry: dict | None) -> str:
    return share(entry["value"]) if entry and isinstance(entry.get("value"), int | float) else "–"


# --- sections -------------------------------------------------------------------------------------------------------


def headline(evaluation: dict, runs: list[Run]) -> str:
    """The result in one sentence."""
    if not evaluation:
        if not runs:
            return "Nothing has been trained here yet."
        return (
            "The curves of training are below. <code>python -m socratiq.evaluate</code> adds the comparison of all "
            "stages on texts that none of them has seen."
        )
    measured, judge = chief(evaluation)
    found = {stage: percent(of["figures"].get(measured)) for stage, of in evaluation["stages"].items()}
    stages = [stage for stage in ("base", "sft", "dpo", "ppo") if stage in found]
    names = {"base": "of the base model's questions", "sft": "after SFT", "dpo": "after DPO", "ppo": "after PPO"}
    parts = [f'<b style="color:var(--{stage})">{found[stage]}</b> {names[stage]}' for stage in stages]
    said = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else "no questions"
    human = f' (people: <b style="color:var(--human)">{found["human"]}</b>)' if "human" in found else ""
    return (
        "The task: ask a critical question of a given type about a new text. "
        f"{judge[0].upper()}{judge[1:]} recognises the asked type in {said}{human}."
    )


def chief(evaluation: dict) -> tuple[str, str]:
    """The figure that counts most, and who measured it."""
    if "judge" in evaluation["classifiers"]:
        return "judge/accuracy", "a judge that no stage was trained against"
    return "scorer/accuracy", "the scorer"


def road(evaluation: dict, runs: list[Run], pairs: list[dict]) -> str:
    """The stages in a row, each with what it does and the number it is known by."""
    measured = chief(evaluation)[0] if evaluation else None
    stops = []
    for stage, (title, sentence) in STAGES.items():
        run = next((run for run in reversed(runs) if run.stage == stage), None)
        of_stage = evaluation.get("stages", {}).get(stage, {})
        if stage == "human" or not (run or of_stage or (stage == "pairs" and pairs)):
            continue
        big = ""
        if of_stage:
            big = f"{percent(of_stage['figures'].get(measured))}<small>of the asked type</small>"
        elif stage == "pairs":
            big = f"{len(pairs):,}<small>pairs of chosen and rejected</small>"
        if run:
            big += f"<small>{e(learnt(run))}</small>"
        stops.append(
            f'<div class="card stop" {tint(stage)}><h3>{title}</h3><p>{sentence}</p><div class="big">{big}</div></div>'
        )
    return f'<section id="road"><div class="road">{"".join(stops)}</div></section>' if stops else ""


def learnt(run: Run) -> str:
    """What a run has achieved so far, in a few words."""
    if not run.metrics:
        return "has begun"
    metric, title, style = {
        "sft": ("eval/loss", "held-out loss", ".2f"),
        "dpo": ("eval/rewards/accuracies", "held-out accuracy", ".0%"),
        "ppo": ("eval/scores", "held-out score", ".2f"),
    }[run.stage]
    points = run.series(metric)
    step = run.metrics[-1].get("step", 0)
    so_far = "" if run.finished else f"; under way, step {step}"
    if not points:
        return f"{step} updates" + so_far
    first, last = points[0][1], points[-1][1]
    if run.stage == "dpo" or len(points) == 1:  # before DPO every pair is a draw: its first accuracy says nothing
        return f"{title} {last:{style}}" + so_far
    return f"{title} {first:{style}}\u00a0→\u00a0{last:{style}}" + so_far


def outdated(folder: Path, runs: list[Run]) -> list[str]:
    """Names of the runs that were finished after evaluation.json was written."""
    written = (folder / "evaluation.json").stat().st_mtime
    ends = [(run.name, folder / run.name / "summary.json") for run in runs if run.finished]
    return [name for name, end in ends if end.exists() and end.stat().st_mtime > written]


def result(evaluation: dict, remarks: list[str]) -> str:
    """Accuracy of each stage with its interval, beside the table of all figures."""
    measured, _ = chief(evaluation)
    stages = evaluation["stages"]
    human = stages.get("human", {}).get("figures", {}).get(measured)
    dots = [
        charts.Dot(STAGES.get(stage, (stage,))[0], found["value"], stage, found.get("low"), found.get("high"))
        for stage, of in stages.items()
        if (found := of["figures"].get(measured)) and found["value"] is not None
    ]
    chance = 1 / max(1, len(evaluation["types"]))
    drawing = charts.dot_chart([("", dots)], "Right type by stage", (chance, "chance"), spread=True)
    caption = (
        f"Share of the questions whose strongest type is the asked one; 95% intervals over "
        f"{len(evaluation['contexts'])} held-out texts."
        + (" People are the mark, not 100%: their questions are not always told apart." if human else "")
    )
    rows = "".join(
        f"<tr><td>{' → '.join(e(STAGES.get(stage, (stage,))[0]) for stage in name.split(' -> '))}</td>"
        f"<td>{points(change['value'])} points"
        + (f"<small>{points(change['low'])} to {points(change['high'])}</small>" if "low" in change else "")
        + f"{'' if certain(change) else '<small>may be chance</small>'}</td></tr>"
        for name, found in evaluation.get("steps", {}).items()
        if (change := found.get(measured)) and change["value"] is not None
    )
    steps = figure(
        "What each stage changed",
        f"<table><tbody>{rows}</tbody></table>",
        "Difference of two shares in percentage points, on the same texts, with its own 95% interval: sharper than "
        "comparing the intervals of the two, since what makes a text easy or hard falls out. An interval with 0 in it "
        "may be chance.",
    )
    remarks = [f"Left out: {reason}." for reason in evaluation.get("left_out", [])] + remarks
    noted = "".join(f'<p class="intro">{e(remark)}</p>' for remark in remarks)
    return (
        '<section id="result"><h2>The result</h2><p class="intro">Every model is asked every type of question about '
        "texts that no stage has seen, with the same prompt and the same random numbers. What counts is the judge, "
        "against which no stage was trained; the scorer is what DPO and PPO were trained to please. If only the scorer "
        f"is impressed, it was gamed.</p>{noted}"
        f'<div class="two">{figure("Right type", drawing, caption)}{steps if rows else ""}</div>'
        f"{figures_table(evaluation)}</section>"
    )


def certain(entry: dict) -> bool:
    return "low" in entry and not entry["low"] <= 0 <= entry["high"]


def figures_table(evaluation: dict) -> str:
    stages = evaluation["stages"]
    head = "".join(f"<th {tint(stage)}>{e(STAGES.get(stage, (stage,))[0])}</th>" for stage in stages)
    rows, meanings = [], []
    for name, meaning in evaluation["meanings"].items():
        entries = [stages[stage]["figures"].get(name) for stage in stages]
        if any(entries):
            cells = "".join(f"<td>{cell(entry)}</td>" for entry in entries)
            arrow = {1: " ↑", -1: " ↓"}.get(meaning["better"], "")
            rows.append(f'<tr><td title="{e(meaning["meaning"])}">{e(meaning["title"])}{arrow}</td>{cells}</tr>')
            meanings.append(f"<dt>{e(meaning['title'])}</dt><dd>{e(meaning['meaning'])}</dd>")
    body = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    caption = (
        "↑ higher is better, ↓ lower is better, the others have no better side. "
        '<span class="broad">Small: 95% intervals over the texts.</span>'
        '<span class="narrow">A wider screen shows the 95% intervals, too.</span>'
    )
    return (
        f'<figure class="card wide"><div class="scroll">{body}</div><figcaption>{caption}</figcaption>'
        + folded("what each figure means", f"<dl>{''.join(meanings)}</dl>")
        + "</figure>"
    )


def short(x) -> str:
    """A number in two decimals; anything else as text."""
    if not isinstance(x, int | float):
        return e(x)
    return f"{x:.2f}" if abs(x) < 100 else f"{x:.0f}"


def cell(entry: dict | None) -> str:
    if not entry or entry.get("value") is None:
        return ""

    span = f"<small>{short(entry['low'])} – {short(entry['high'])}</small>" if "low" in entry else ""
    return short(entry["value"]) + span


def by_type(evaluation: dict) -> str:
    measured, _ = chief(evaluation)
    stages = evaluation["stages"]
    rows = []
    for type in evaluation["types"]:
        dots = [
            charts.Dot(STAGES.get(stage, (stage,))[0], found["value"], stage)
            for stage, of in stages.items()
            if (found := of["by_type"].get(type, {}).get(measured)) and found["value"] is not None
        ]
        if dots:
            rows.append((type, dots))
    half = -(-len(rows) // 2)
    mark = (1 / max(1, len(rows)), "chance")
    parts = [charts.dot_chart(some, "Right type, by type", mark) for some in (rows[:half], rows[half:]) if some]
    legend = "".join(f"<span {tint(stage)}>{e(STAGES.get(stage, (stage,))[0])}</span>" for stage in stages)
    return (
        '<section id="types"><h2>Type by type</h2><p class="intro">The same share for each type. Where the questions '
        "of people are seldom recognised either, the type is hard to tell from the others, for the judge or by nature."
        "</p>"
        f'<div class="card"><div class="legend">{legend}</div><div class="two">{"".join(parts)}</div></div></section>'
    )


def distributions(evaluation: dict) -> str:
    """A card for each stage: how the strengths of its questions are spread, by judge and by scorer."""
    cards = []
    for stage, of in evaluation["stages"].items():
        who, drawings = STAGES.get(stage, (stage,))[0], ""
        for name in evaluation["classifiers"]:
            values = [record[name] for record in of["questions"] if isinstance(record.get(name), int | float)]
            drawing = charts.histogram(values, f"{who}: strengths by the {name}", stage)
            drawings += f'<div><p class="as">by the {e(name)}</p>{drawing}</div>'
        cards.append(figure(who, f'<div class="both">{drawings}</div>'))
    return (
        '<section id="scores"><h2>How the scores are spread</h2><p class="intro">Strength of the asked type in each '
        "question, from 0 (surely not) to 1 (surely); the higher a bar, the more questions. Learning moves the mass "
        "from left to right; a heap at 1 that "
        "only the scorer sees is a sign of gaming.</p>"
        f'<div class="road">{"".join(cards)}</div></section>'
    )


def side_by_side(evaluation: dict) -> str:
    """Every text with the questions of all stages: the first answer to each type, unpicked."""
    names, texts = evaluation["classifiers"], []
    first: dict[tuple, dict] = {}
    for stage, of in evaluation["stages"].items():
        for record in of["questions"]:
            first.setdefault((record["context"], record["type"], stage), record)
    for place, context in enumerate(evaluation["contexts"][:MOST_TEXTS]):
        types = []
        for type in evaluation["types"]:
            said = [
                question(stage, first[place, type, stage], names)
                for stage in evaluation["stages"]
                if (place, type, stage) in first
            ]
            types.append(f'<div class="type"><h3>{e(type)}</h3>{"".join(said)}</div>')
        cut = e(beginning(context, 150))
        texts.append(
            f'<details class="card text"{" open" if place == 0 else ""}><summary><span class="cut">{cut}</span>'
            f'<span class="full">{e(context)}</span></summary><div class="asked">{"".join(types)}</div></details>'
        )
    more = len(evaluation["contexts"]) - len(texts)
    by = ", then ".join(f"by the {name}" for name in names)
    return (
        '<section id="questions"><h2>Side by side</h2><p class="intro">What each stage asks about the same text, the '
        f"first answer, unpicked. The number is the strength of the asked type {e(by)}; where the first of them sees "
        "another type, it is named. Grey: what is not one well-formed question.</p>"
        + "".join(texts)
        + (f'<p class="intro">{more} more texts are in evaluation.json.</p>' if more > 0 else "")
        + "</section>"
    )


def question(stage: str, record: dict, classifiers: list[str]) -> str:
    """A question with who asked it and its strengths."""
    strengths = [record.get(name) for name in classifiers]
    strengths = [x for x in strengths if isinstance(x, int | float) and math.isfinite(x)]
    shown = "".join(f"<b>{x:.2f}</b> " if i == 0 else f"{x:.2f}" for i, x in enumerate(strengths))
    part = f"{100 * min(1.0, max(0.0, strengths[0])):.0f}%" if strengths else "0%"
    seen = record.get(f"{classifiers[0]}_type")
    other = f'<span class="as">reads as {e(seen)}</span>' if seen and seen != record.get("type") else ""
    kind = "" if record.get("well_formed", True) else ' class="no"'
    return (
        f'<div class="said" {tint(stage)}><span class="who">{e(STAGES.get(stage, (stage,))[0])}</span>'
        f"<q{kind}>{e(record.get('question', '')) or '(nothing)'}{other}</q>"
        f'<span class="score">{shown}<i style="--part:{part}"></i></span></div>'
    )


def pairs_section(pairs: list[dict], dropped: list[dict]) -> str:
    """What make_pairs.py made: how far apart the two questions of a pair are, and some of them."""
    if not pairs:
        return ""
    figures = []
    for side, color in (("chosen", "dpo"), ("rejected", "second")):
        values = [pair[f"{side}_score"] for pair in pairs if isinstance(pair.get(f"{side}_score"), int | float)]
        if values:
            drawing = charts.histogram(values, f"{side} strengths", color)
            figures.append(figure(f"{side.capitalize()}: strength of the type", drawing))
    examples = []
    for pair in pairs[:: max(1, len(pairs) // 4)][:4]:
        rows = "".join(
            f'<div class="said" {tint(color)}><span class="who">{side}</span><q>{e(pair.get(side, ""))}</q>'
            f'<span class="score"><b>{short(pair.get(f"{side}_score", ""))}</b></span></div>'
            for side, color in (("chosen", "dpo"), ("rejected", "base"))
        )
        text = f'<p class="as">{e(beginning(str(pair.get("context", "")), 220))}</p>'
        examples.append(f'<div class="type"><h3>{e(pair.get("type", ""))}</h3>{text}{rows}</div>')
    reasons: dict[str, int] = {}
    for line in dropped:
        reason = str(line.get("reason", "")).split(": ")[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    listed = "".join(
        f"<dt>{count:,}</dt><dd>{e(reason)}</dd>" for reason, count in sorted(reasons.items(), key=lambda x: -x[1])
    )
    return (
        f'<section id="pairs"><h2>Pairs</h2><p class="intro">{e(STAGES["pairs"][1])} {len(pairs):,} pairs were kept. '
        "The two heaps should lie apart: pairs whose rejected question is of the type after all would undo what SFT "
        f'learned.</p><div class="grid">{"".join(figures)}</div><div class="asked">{"".join(examples)}</div>'
        + (folded(f"{len(dropped):,} rows not kept, by reason", f"<dl>{listed}</dl>") if listed else "")
        + "</section>"
    )


def run_section(run: Run, number: int) -> str:
    title, sentence = STAGES[run.stage]
    seconds = sum(seconds for _, seconds in charts.finite((0, row.get("seconds")) for row in run.timings))
    model = e(run.args.get("model", "?"))
    facts = [f"folder {e(run.name)}", f"began with {model}"]
    if run.metrics:
        facts.append(f"step {e(run.metrics[-1].get('step', '?'))}" + ("" if run.finished else ", under way"))
    if seconds:
        facts.append(f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds")
    figures = "".join(chart_figure(chart, run) for chart in CHARTS[run.stage])
    return (
        f'<section id="run{number}"><h2>{title}</h2><p class="intro">{e(sentence)}</p>'
        f'<ul class="facts" style="margin:0 0 16px">{"".join(f"<li>{fact}</li>" for fact in facts)}</ul>'
        + (f'<div class="grid">{figures}</div>' if figures else '<p class="empty">Nothing has been logged yet.</p>')
        + on_the_way(run)
        + other_charts(run)
        + settings(run.args)
        + "</section>"
    )


def on_the_way(run: Run) -> str:
    """The questions of samples.jsonl to the same held-out tasks, from the first time to the last."""
    tasks: dict[tuple[str, str], list[dict]] = {}
    for sample in run.samples:
        if sample.get("split") == "held_out":
            tasks.setdefault((str(sample.get("context")), str(sample.get("type"))), []).append(sample)
    shown = []
    for (context, type), samples in list(tasks.items())[:6]:
        picked = samples if len(samples) <= 4 else [samples[i * (len(samples) - 1) // 3] for i in range(4)]
        rows = "".join(
            f'<div class="said" {tint(run.stage)}><span class="who">step {e(sample.get("step"))}</span>'
            f"<q>{e(sample.get('question', ''))}</q>"
            f'<span class="score"><b>{short(sample.get("score", ""))}</b></span></div>'
            for sample in picked
        )
        text = f'<p class="as">{e(beginning(context, 220))}</p>'
        shown.append(f'<div class="type"><h3>{e(type)}</h3>{text}{rows}</div>')
    if not shown:
        return ""
    return (
        '<h3 style="margin-top:28px">What it asked on the way</h3><p class="intro">The same held-out texts and random '
        f'numbers each time, with the reward.</p><div class="asked" style="margin-top:0">{"".join(shown)}</div>'
    )


READING = (
    ("Faint and bold line", "Every logged value, and its moving average. Dots are held-out figures."),
    ("Shaded", "The healthy range for a run like this one. It is a rule of thumb, not a law: look at the trend first."),
    ("Held out", "Texts that no stage was trained on. Only these say whether something was learned or remembered."),
    ("Strength", "The probability that a question is of the asked type, by a small classifier of labelled questions."),
    ("Scorer and judge", "The scorer is the reward of PPO and the check of the pairs. The judge saw other rows and "
     "looks at other features, and no stage was trained against it."),
    ("Interval", "Where the figure lies in the middle 95% of draws when the held-out texts are drawn anew from "
     "themselves. It speaks of other texts like these, not of another training run, and with fewer than ten texts it "
     "is too narrow."),
    ("Nat", "The unit of log-probabilities and KL: a factor of e = 2.718. ln 2 = 0.693 nats is a coin toss."),
    ("Reward hacking", "Scores rise and questions get worse. Compare judge with scorer, watch length, entropy, "
     "sameness and the parts of the reward, and read the questions."),
)  # fmt: skip


def build(folder: Path, refresh: float | None = None) -> str:
    """The page about a folder of runs. With `refresh` it reloads itself every so many seconds."""
    runs, evaluation = read_runs(folder), read_evaluation(folder)
    pairs, dropped = read_lines(folder / "pairs.jsonl"), read_lines(folder / "pairs.dropped.jsonl")
    sections = [road(evaluation, runs, pairs)]
    links = []
    if evaluation:
        remarks = [f"Older than the model in {name}: evaluate again." for name in outdated(folder, runs)]
        sections += [
            result(evaluation, remarks),
            by_type(evaluation),
            distributions(evaluation),
            side_by_side(evaluation),
        ]
        links += [("result", "Result"), ("types", "By type"), ("scores", "Scores"), ("questions", "Side by side")]
    for number, run in enumerate(runs):
        if run.stage != "sft" and pairs and ("pairs", "Pairs") not in links:
            sections.append(pairs_section(pairs, dropped))
            links.append(("pairs", "Pairs"))
        sections.append(run_section(run, number))
        alone = sum(other.stage == run.stage for other in runs) == 1
        links.append((f"run{number}", STAGES[run.stage][0] if alone else run.name))
    if pairs and ("pairs", "Pairs") not in links:
        sections.append(pairs_section(pairs, dropped))
        links.append(("pairs", "Pairs"))
    links.append(("reading", "How to read it"))
    reading = "".join(f"<dt>{e(name)}</dt><dd>{e(meaning)}</dd>" for name, meaning in READING)
    sections.append(
        f'<section id="reading"><h2>How to read it</h2><div class="card"><dl>{reading}</dl></div></section>'
    )

    facts = {"data": None, "model": None}
    if runs:
        facts = {"data": runs[0].args.get("data"), "model": runs[0].args.get("model")}
    if evaluation:
        facts["held-out texts"] = len(evaluation["contexts"])
        facts["types"] = len(evaluation["types"])
    listed = "".join(f"<li>{e(name)}: {e(value)}</li>" for name, value in facts.items() if value is not None)
    navigation = "".join(f'<a href="#{place}">{e(title)}</a>' for place, title in links)
    live = '<p><span class="live">training is being watched; this page renews itself</span></p>' if refresh else ""
    style, script = ((PAGES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="refresh" content="{max(1, round(refresh))}">' if refresh else "",
            f"<title>socratiq: what the model learned to ask</title>\n<style>\n{style}</style>\n</head>\n<body>",
            f'<header>{live}<h1>What the model learned to ask</h1><p class="lead">{headline(evaluation, runs)}</p>',
            f'<ul class="facts">{listed}</ul>',
            f"<nav>{navigation}</nav></header>",
            "<main>",
            *(section for section in sections if section),
            "</main>",
            "<footer>Written by <code>python -m socratiq.report</code> from metrics.jsonl, samples.jsonl, pairs.jsonl "
            "and evaluation.json. Everything is in this one file.</footer>",
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def export_tensorboard(runs: list[Run], folder: str, written: dict[str, float]) -> int:
    """The metrics of every run as TensorBoard events, one subfolder a run -> how many numbers.

    `written` holds the last step by run; only later ones are added, and it is brought up to date. Raises UserError if
    the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    count = 0
    for run in runs:
        names = sorted({name for row in run.metrics for name in row} - {"step"})
        points = [(name, *point) for name in names for point in run.series(name)]
        points = [point for point in points if point[1] > written.get(run.name, -1)]
        if points:
            with SummaryWriter(str(Path(folder) / run.name)) as writer:
                for name, step, value in points:
                    writer.add_scalar(name, value, int(step))
            written[run.name] = max(step for _, step, _ in points)
            count += len(points)
    return count


def write(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    folder = Path(args.runs)
    out = Path(args.out) if args.out else folder / "report.html"
    if not folder.is_dir() and not args.watch:
        raise UserError(f"{folder}: no such folder; train something first, or name the folder that holds sft, dpo, ppo")
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; give the name of a file")
    if not args.watch:
        runs = read_runs(folder)
        known = [folder / "evaluation.json", folder / "pairs.jsonl"]
        if not runs and not any(path.exists() for path in known):
            raise UserError(f"{folder}: holds no run of train_sft.py, train_dpo.py or train_ppo.py yet")
        atomic_write(out, build(folder))
        if args.tensorboard:
            written = export_tensorboard(runs, args.tensorboard, {})
            print(
                f"{written:,} numbers in {args.tensorboard}; look at them with: tensorboard --logdir {args.tensorboard}"
            )
        print(f"{out}: {', '.join(run.name for run in runs) or 'no runs'}; open it in a browser")
        return
    print(f"{out} is written anew every {args.watch:g} seconds; Ctrl-C ends it", flush=True)
    written: dict[str, float] = {}
    try:
        while True:
            atomic_write(out, build(folder, args.watch))
            if args.tensorboard:
                export_tensorboard(read_runs(folder), args.tensorboard, written)
            time.sleep(args.watch)
    finally:
        atomic_write(out, build(folder))  # the last one does not renew itself
