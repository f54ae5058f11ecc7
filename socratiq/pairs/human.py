"""Pairs from people's verdicts on questions: no writer, no scorer, no model."""

from socratiq.data import Row


def human_pairs(rows: list[Row], most: int) -> list[tuple[Row, Row]]:
    """(chosen, rejected) from questions about one text, of one type if they have types.

    Each question is used at most `most` times, and no two of them twice together.
    """
    groups: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        group = groups.setdefault((row.context, row.type), {"chosen": [], "rejected": [], "": []})
        group[row.preference].append(row)
    pairs = []
    for group in groups.values():
        chosen, rejected = group["chosen"], group["rejected"]
        longer = max(chosen, rejected, key=len)
        for _ in range(min(most, len(longer))):
            both = zip(chosen, rejected, strict=False)
            pairs += [(good, bad) for good, bad in both if good.question != bad.question]
            longer.append(longer.pop(0))  # the next round brings other partners together
    return pairs
