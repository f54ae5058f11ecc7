"""The figures of compare.py as one Markdown table.

python bench/table.py bench/figures.jsonl
"""

import json
import statistics
import sys
from pathlib import Path


def middle(numbers: list[float], digits: int = 1) -> str:
    """Median, and in brackets the range."""
    low, high = f"{min(numbers):.{digits}f}", f"{max(numbers):.{digits}f}"
    return f"{statistics.median(numbers):.{digits}f}" + (f" ({low}-{high})" if low != high else "")


def line(figures: dict) -> list[str]:
    """The cells of one comparison."""
    ours, trl = figures["ours"], figures.get("trl")
    what = f"{figures['work']}, {'LoRA ' + str(figures['lora_rank']) if figures['lora_rank'] else 'full'}"
    cells = [
        what,
        figures["dtype"],
        f"{figures['batch']} x {figures['samples']}",
        middle(ours["seconds"]),
        middle(trl["seconds"]) if trl else "-",
        middle(ours["tokens_per_second"], 0),
        middle(trl["tokens_per_second"], 0) if trl else "-",
        middle(figures["ratio"], 2) if trl else "-",
        middle(figures["cpu_ratio"], 2) if trl else "-",
        f"{statistics.median(ours['share_of_peak']):.0%}" if ours["share_of_peak"] else "-",
        f"{ours['peak_mb']:.0f} / {trl['peak_mb']:.0f} ({ours['peak_mb'] / trl['peak_mb']:.2f})" if trl else "-",
    ]
    if trl and trl["losses"] and ours["losses"]:
        first, last = (f"{ours['losses'][i]:.4f} / {trl['losses'][i]:.4f}" for i in (0, -1))
        return [*cells, f"{first}, {last}"]
    return [*cells, "-"]


HEAD = [
    "work",
    "precision",
    "rows x K",
    "s a step, ours",
    "TRL",
    "tokens/s, ours",
    "TRL",
    "times as fast",
    "by CPU seconds",
    "share of peak",
    "peak MB, ours / TRL",
    "loss first, last (ours / TRL)",
]

if __name__ == "__main__":
    print("| " + " | ".join(HEAD) + " |")
    print("|" + " --- |" * len(HEAD))
    for text in Path(sys.argv[1]).read_text().splitlines():
        print("| " + " | ".join(line(json.loads(text))) + " |")
