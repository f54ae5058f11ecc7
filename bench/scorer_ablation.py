"""What is each part of the scorer worth? Rewards of genuine questions against all that should earn less, out of fold.

    python bench/scorer_ablation.py --data rows.csv                              # the bare scorer: a minute
    python bench/scorer_ablation.py --data rows.csv --model smollm2 --texts 300  # with a language model: long on a CPU

Every row is graded by a scorer that saw neither it nor its text. AUC: how often a genuine question, asked for its own
type, earns more than an attack.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from socratiq.data import load_rows
from socratiq.scorer import attacks
from socratiq.scorer.grading import auc, figures, place
from socratiq.scorer.language_model import open_language_model
from socratiq.scorer.scorer import EXPONENT, GATES, Scorer


def groups(scorer: Scorer, held, broken_texts: int) -> dict[str, list[attacks.Attack]]:
    """Genuine questions and those that should earn less, as (kind, context, question, type)."""
    typed = [r for r in held if r.type in scorer.types]
    broken = attacks.degenerate(typed[:broken_texts])
    own = [attacks.Attack("own", r.context, r.question, r.type) for r in typed]
    wrong = [a._replace(type=t) for a in own for t in scorer.types if t != a.type]
    negatives = [r for r in held if r.type == "others"]
    strongest = scorer.strengths([r.context for r in negatives], [r.question for r in negatives]).argmax(1)
    others = [
        attacks.Attack("others", r.context, r.question, scorer.types[i])  # for the type it looks most like
        for r, i in zip(negatives, strongest.tolist(), strict=True)
    ]
    return {
        "own": own,
        "wrong type": wrong,
        "another text": attacks.another_text(typed),
        "others": others,
        "degenerate": broken,
        "- mended": [in_sentence_case(attack) for attack in broken],
        "rare word": attacks.rare_word(typed),
    }


def in_sentence_case(attack: attacks.Attack) -> attacks.Attack:
    """With its capitals mended, as whoever knows of `gates.Sentence` would write it."""
    return attack._replace(question=attack.question[:1].upper() + attack.question[1:].lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--model", default="none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--texts", type=int, default=10**9, help="grade the rows of this many texts only")
    parser.add_argument("--broken", type=int, default=20, help="rows of each fold that are broken in every way")
    parser.add_argument("--keep", type=Path, help="write all graded strings there (torch), to look at")
    args = parser.parse_args()

    rows = load_rows(args.data)
    lm = open_language_model(args.model, args.device, args.dtype)
    graded_texts = set(sorted({r.context for r in rows}, key=place)[: args.texts])
    strings: dict[str, list] = {}
    parts: dict[str, list] = {}
    unseen, labels = [], []
    for fold in range(5):
        scorer = Scorer.fit([r for r in rows if place(r.context) % 5 != fold], lm=lm)
        held = [r for r in rows if place(r.context) % 5 == fold]
        unseen.append(scorer.strengths([r.context for r in held], [r.question for r in held]))
        labels += [r.type for r in held]
        held = [r for r in held if r.context in graded_texts or r.type == "others"]
        for name, some in groups(scorer, held, args.broken).items():
            strings.setdefault(name, []).extend(some)
            parts.setdefault(name, []).append(scorer.components(*zip(*[a[1:] for a in some], strict=True)))
    found = {name: {part: torch.cat([p[part] for p in some]) for part in some[0]} for name, some in parts.items()}
    if args.keep:
        torch.save((strings, found), args.keep)

    print(f"{figures(scorer.types, torch.cat(unseen), labels)}\n")
    for parts_of in found.values():  # as the reward counts it
        parts_of |= {name: parts_of[name] ** EXPONENT for name in ("strength", "ngrams", "probe") if name in parts_of}
    factors = ["strength", *(name for name in GATES if name in found["own"])]
    forms = {"all": factors} | {f"without {f}": [g for g in factors if g != f] for f in factors}
    forms["strength alone"] = ["strength"]
    if lm is not None:
        forms |= {"n-grams for strength": ["ngrams", *factors[1:]], "probe for strength": ["probe", *factors[1:]]}
    against = [name for name in found if name != "own"]
    print(f"{'reward':<24}{'mean':>7}{'< .10':>7}" + "".join(f"{name:>14}" for name in against))
    for form, used in forms.items():
        value = {name: torch.stack([x[f] for f in used]).prod(0) for name, x in found.items()}
        own = value["own"]
        cells = [f"{form:<24}{own.mean():>7.3f}{(own < 0.1).float().mean():>7.3f}"]
        print("".join(cells + [f"{auc(own, value[name]):>14.3f}" for name in against]))
    print()
    rewards = torch.stack([found["degenerate"][f] for f in factors]).prod(0)
    kinds = [a.kind for a in strings["degenerate"]]
    mean = torch.stack([found["own"][f] for f in factors]).prod(0).mean()
    print(f"{'kind':<24}{'strings':>8}{'mean':>8}{'highest':>9}{'above mean genuine':>20}")
    for kind in sorted(set(kinds)):
        x = rewards[torch.tensor([k == kind for k in kinds])]
        print(f"{kind:<24}{len(x):>8}{x.mean():>8.3f}{x.max():>9.3f}{(x > mean).float().mean():>20.1%}")


if __name__ == "__main__":
    main()
