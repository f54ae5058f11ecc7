"""The metrics that the stages log, from docs/metrics.md, the one place that explains them."""

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
# "0.4 to 0.95 × start", "0.7 to 0.95 from step 2; line at 0.5: coin toss", or nothing
RANGE = re.compile(r"(?:(\S+) to (\S+)( × start)?(?: from step (\d+))?(?:; line at (\S+): (.+))?)?")


class Metric(NamedTuple):
    """An entry of the page: metrics that are looked at together, in one chart of the report."""

    names: list[str]  # as in metrics.jsonl; "reward/*" stands for all that begin with "reward/"
    stages: list[str]  # "sft", "dpo", "ppo"
    title: str
    meaning: str = ""
    healthy: str = ""
    sick: str = ""
    band: tuple = ()  # healthy range (low, high), infinite where open
    relative: bool = False  # the band is in multiples of the value at which the first curve begins
    since: int = 0  # first step that is drawn
    mark: tuple = ()  # (value, label) of a line to compare with


def read_metrics() -> list[Metric]:
    """The entries of the page, in its order: title, names and range, meaning, what is healthy and what is sick."""
    metrics = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        stages, *entries = section.split("\n### ")
        for entry in entries:
            title, names, meaning, *_ = entry.strip().split("\n\n")
            low, high, relative, since, at, label = RANGE.fullmatch(names.partition(" · range ")[2]).groups()
            band, mark = (float(low), float(high)) if low else (), (float(at), label) if at else ()
            which = re.findall("`(.+?)`", names), stages.strip().lower().split(", "), title
            advice = dict(re.findall("^- (Healthy|Sick): (.+)", entry.replace("`", ""), re.MULTILINE))
            explanations = meaning.replace("`", ""), advice.get("Healthy", ""), advice.get("Sick", "")
            metrics.append(Metric(*which, *explanations, band, bool(relative), int(since or 0), mark))
    return metrics
