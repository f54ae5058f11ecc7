"""What is each part of the scorer worth? Rewards of genuine questions against all that should earn less, out of fold.

    python bench/scorer_ablation.py --data rows.csv                              # the bare scorer: a minute
    python bench/scorer_ablation.py --data rows.csv --model smollm2 --texts 300  # with a language model: long on a CPU

Every row is graded by a scorer that saw neither it nor its text. AUC: how often a genuine question, asked for its own
type, earns more than an attack. Nothing in the scorer is fitted on any of the attacks, here and in tests/attacks.py.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from attacks import Attack, degenerate

from socratiq.data import load_rows
from socratiq.scorer.gates import GATES
from socratiq.scorer.grading import figures, place
from socratiq.scorer.language_model import open_language_model
from socratiq.scorer.scorer import EXPONENT, Scorer, cross_validate, mean_opinion


def another_text(rows) -> list[Attack]:
    """Each genuine question put to a text it was not asked about, under its own type."""
    step = max(1, len(rows) // 2)
    pairs = [(r, rows[(i + step) % len(rows)]) for i, r in enumerate(rows)]
    return [Attack("another text", o.context, r.question, r.type) for r, o in pairs if o.context != r.context]


TEMPLATES = ("Why do you think {} matters?", "What do you mean by {}?", "Are you assuming that {} is real?")


def rare_word(rows) -> list[Attack]:
    """One fluent frame around the rarest long word of the text: relevant at a glance, the same question every time."""
    texts = [{w.strip(".,;:!?\"'()").lower() for w in r.context.split()} for r in rows]
    count = Counter(w for text in texts for w in text)
    found = []
    for i, (r, text) in enumerate(zip(rows, texts, strict=True)):
        long_words = (w for w in text if w.isalpha() and len(w) > 4)
        rarest = min(long_words, key=lambda w: (count[w], -len(w), w), default="it")
        found.append(Attack("rare word", r.context, TEMPLATES[i % len(TEMPLATES)].format(rarest), r.type))
    return found


def auc(high: torch.Tensor, low: torch.Tensor) -> float:
    """Probability that a number of `high` (N,) is above one of `low` (M,), ties counting half."""
    low = low.sort().values
    below, upto = (torch.searchsorted(low, high, right=right).double() for right in (False, True))
    return ((below + upto) / 2).mean().item() / len(low)


def groups(scorer: Scorer, held, broken_rows: int) -> dict[str, list[Attack]]:
    """Genuine questions and those that should earn less."""
    typed = [r for r in held if r.type in scorer.types]
    own = [Attack("own", r.context, r.question, r.type) for r in typed]
    negatives = [r for r in held if r.type == "others"]
    strongest = scorer.strengths([r.context for r in negatives], [r.question for r in negatives]).argmax(1)
    others = [  # for the type it looks most like
        Attack("others", r.context, r.question, scorer.types[i])
        for r, i in zip(negatives, strongest.tolist(), strict=True)
    ]
    return {
        "own": own,
        "wrong type": [a._replace(type=t) for a in own for t in scorer.types if t != a.type],
        "another text": another_text(typed),
        "others": others,
        "broken": degenerate(typed[:broken_rows]),
        "rare word": rare_word(typed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--model", default="none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--texts", type=int, default=10**9, help="grade the rows of this many texts only")
    parser.add_argument("--broken", type=int, default=20, help="rows of each fold that are broken in every way")
    args = parser.parse_args()

    rows = load_rows(args.data)
    lm = open_language_model(args.model, args.device, args.dtype)
    types, found = cross_validate(rows, lm)
    for name, value in figures(types, mean_opinion(found), [row.type for row in rows]).items():
        print(f"{value:.3f}  {name}", flush=True)
    graded_texts = set(sorted({r.context for r in rows}, key=place)[: args.texts])
    kinds: list[str] = []  # of the broken strings
    earned: dict[str, dict[str, list]] = {}
    for fold in range(5):
        scorer = Scorer.fit([r for r in rows if place(r.context) % 5 != fold], lm=lm)
        held = [r for r in rows if place(r.context) % 5 == fold and (r.context in graded_texts or r.type == "others")]
        for name, strings in groups(scorer, held, args.broken).items():
            kinds += [a.kind for a in strings] if name == "broken" else []
            for part, values in scorer.graded(*zip(*[a[1:] for a in strings], strict=True))[1].items():
                power = EXPONENT if part not in GATES else 1
                earned.setdefault(name, {}).setdefault(part, []).append(values**power)
    parts = {name: {part: torch.cat(values) for part, values in of.items()} for name, of in earned.items()}

    factors = ["strength", *(name for name in GATES if name in parts["own"])]
    forms = {"all": factors} | {f"without {f}": [g for g in factors if g != f] for f in factors}
    forms |= {f"{name} for strength": [name, *factors[1:]] for name in ("ngrams", "probe") if name in parts["own"]}
    against = [name for name in parts if name != "own"]
    print(f"{'reward':<24}{'mean':>7}{'< .10':>7}" + "".join(f"{name:>14}" for name in against))
    for form, used in forms.items():
        value = {name: torch.stack([of[f] for f in used]).prod(0) for name, of in parts.items()}
        own = value["own"]
        cells = [f"{form:<24}{own.mean():>7.3f}{(own < 0.1).float().mean():>7.3f}"]
        print("".join(cells + [f"{auc(own, value[name]):>14.3f}" for name in against]))

    broken, mean = (torch.stack([parts[name][f] for f in factors]).prod(0) for name in ("broken", "own"))
    print(f"\n{'kind':<24}{'strings':>8}{'mean':>8}{'highest':>9}{'above mean genuine':>20}")
    for kind in sorted(set(kinds)):
        x = broken[torch.tensor([k == kind for k in kinds])]
        print(f"{kind:<24}{len(x):>8}{x.mean():>8.3f}{x.max():>9.3f}{(x > mean.mean()).float().mean():>20.1%}")


if __name__ == "__main__":
    main()
