"""The figures of the evaluation and the tables that the terminal shows of them."""

from __future__ import annotations

import math
import textwrap
from typing import NamedTuple

NAMES = {"base": "base", "sft": "sft", "dpo": "dpo", "ppo": "ppo", "human": "people"}  # in the order of the tables


class Figure(NamedTuple):
    """What a column says. `better`: +1 more is better, -1 less is better, 0 neither (compare with people)."""

    title: str
    better: int
    percent: bool
    meaning: str


FIGURES = {
    "judge/accuracy": Figure("right type, judge", 1, True, "strongest type is the asked one, by a judge no stage met"),
    "scorer/accuracy": Figure("right type, scorer", 1, True, "the same by the scorer that DPO and PPO aim to please"),
    "scorer/reward": Figure("reward", 1, False, "strength of the type times the scorer's gates: what PPO maximises"),
    "well_formed": Figure("well formed", 1, True, "one question of 3 to 60 words on one line, not a copy of the text"),
    "eos": Figure("ended", 1, True, "drew the end-of-sequence token within --max-new-tokens"),
    "words": Figure("words", 0, False, "mean length of a question"),
    "relatedness": Figure("relatedness", 1, True, "share of content words whose first four letters the text has too"),
    "distinct_2": Figure("distinct-2", 1, True, "different word pairs / word pairs, over all questions"),
    "duplicates": Figure("duplicates", -1, True, "questions that were asked before, word for word"),
    "base_perplexity": Figure("perplexity", -1, False, "per token, under the base model: low is fluent"),
    "api/type": Figure("type, API", 1, False, "1 to 5 by an API model: is it of the requested type?"),
    "api/relevance": Figure("relevance, API", 1, False, "1 to 5 by an API model: is it about this very text?"),
    "api/quality": Figure("quality, API", 1, False, "1 to 5 by an API model: is it clear, fluent and critical?"),
}
CHIEF = "judge/accuracy"
TABLES = (  # names of the figures side by side, the chief ones last; the table with the words shows no intervals
    ("api/type", "api/relevance", "api/quality"),
    ("eos", "words", "relatedness", "distinct_2", "duplicates", "base_perplexity"),
    ("judge/accuracy", "scorer/accuracy", "scorer/reward", "well_formed"),
)


def tables(result: dict) -> str:
    """Right type by type, what each stage changed, how the questions read, and last the chief figures by stage."""
    stages = {stage: result["stages"][stage] for stage in NAMES if stage in result["stages"]}
    rows = {"right type, judge": [NAMES[stage] for stage in stages]}
    for kind in result["types"]:
        rows[kind] = [shown(found["by_type"].get(kind, {}).get(CHIEF), CHIEF, False) for found in stages.values()]
    changes = []
    for step, differences in result["steps"].items():
        change = differences[CHIEF]
        certain = "low" in change and not change["low"] <= 0 <= change["high"]
        changed = shown(change, CHIEF).replace("%", " points")
        changes.append(f"{step} changes it by {changed}" + ", may be chance" * (not certain))
    chance = f"{1 / len(result['types']):.0%}"
    changes.append(f"[ ]: 95% interval over texts; right type by chance: {chance}; --help explains the figures")
    blocks = [aligned(rows), "\n".join(changes)]
    for names in TABLES:
        names = [name for name in names if any(name in found["figures"] for found in stages.values())]
        rows = {"": [FIGURES[name].title for name in names]}
        for stage, found in stages.items():
            rows[NAMES[stage]] = [shown(found["figures"].get(name), name, "words" not in names) for name in names]
        blocks += [aligned(rows)] if names else []
    return "\n\n".join(blocks)


def aligned(rows: dict[str, list[str]]) -> str:
    """Cells under each other, two spaces apart, the first column being the keys."""
    lines = [[title, *cells] for title, cells in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def whole_percent(x: float) -> int:
    """A share in whole percent, a half rounded up."""
    return math.floor(100 * x + 0.5 + 1e-9)


def shown(entry: dict | None, name: str, span: bool = True) -> str:
    """A figure as "62% [51 71]" or ".62 [.51 .71]", without its interval unless `span`; "-" if there is none."""
    if entry is None or entry["value"] is None:
        return "-"

    def digits(x: float) -> str:
        if FIGURES[name].percent:
            return f"{whole_percent(x)}"
        if abs(x) < 0.995:
            return f"{round(x, 2) + 0.0:.2f}".replace("0.", ".", 1)
        return f"{x:.1f}" if abs(x) < 1000 else f"{x:.0f}"

    interval = f" [{digits(entry['low'])} {digits(entry['high'])}]" if span and "low" in entry else ""
    return digits(entry["value"]) + "%" * FIGURES[name].percent + interval


def samples(result: dict, count: int = 3) -> str:
    """The questions of all stages about a few texts, one type each: the first answer, with the judge's strength."""
    lines = ["Questions, unpicked, and the judge's probability that each is of the requested type:"]
    for number, context in enumerate(result["contexts"][:count]):
        asked = number, result["types"][number % len(result["types"])]
        lines += ["", textwrap.shorten(context, 160, placeholder=" ..."), f"  {asked[1]}"]
        for stage in filter(result["stages"].get, NAMES):
            questions = result["stages"][stage]["questions"]
            same = [record for record in questions if (record["context"], record["type"]) == asked]
            lines += [f"  {NAMES[stage]:>6}  {r['judge']:.2f}  {' '.join(r['question'].split())}" for r in same[:1]]
    return "\n".join(lines)
