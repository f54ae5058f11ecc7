"""The command line of the scorer: fit it, say by cross-validation how good it is, save it.

    python -m socratiq.scorer --help

It stands apart from scorer.py, so that help and mistyped arguments need not wait for torch.
"""

from collections.abc import Iterable

from socratiq.run import options as cli
from socratiq.run.errors import UserError, warn

SHOWN = 3  # warnings


def command(name: str, folder: str, args, model: str = "none") -> str:
    """The line that fits the "scorer" or the "judge" on rows of --data, without the texts held out of these."""
    line = f"python -m socratiq.{name} --data {args.data} --held-out {args.held_out} --seed {args.seed} --out {folder}"
    return line + (f" --model {model}" if model != "none" else "")


def check_unseen(name: str, args, texts: list[int] | None, held_out: Iterable[str], model: str = "none") -> None:
    """Raise UserError if a held-out text is among the `texts` (grading.texts_of) of the "scorer" or "judge" of args."""
    from socratiq.scorer.grading import place

    folder = getattr(args, name)
    if texts is None:
        warn(f"--{name} {folder} does not say which texts it was fitted on; it may have seen the held-out ones")
        return
    held_out = {place(text) for text in held_out}
    seen = len(held_out.intersection(texts))
    if seen:
        raise UserError(
            f"--{name} {folder} was fitted on {seen} of the {len(held_out)} held-out texts; delete it, or fit it anew: "
            + command(name, folder, args, model)
        )


def parser_of(name: str, description: str, help: str) -> cli.Parser:
    """What both are told: the rows, the folder, the split, the folds."""
    parser = cli.Parser(prog=f"python -m socratiq.{name}", description=description)
    parser.add_argument("--data", type=cli.source, default="sample", help="rows of context, question and type")
    parser.add_argument("--out", default=f"runs/{name}", metavar="FOLDER", help=f"folder of the {name}")
    parser.add_argument("--held-out", type=cli.fraction, default=0.1, metavar="SHARE", help=help)
    parser.add_argument("--seed", type=cli.zero_or_more, default=0, help="seed of that split")
    parser.add_argument("--folds", type=cli.number(int, least=2), default=5, help="of the cross-validation by text")
    return parser


def fit_scorer(argv: list[str] | None = None) -> None:
    parser = parser_of(
        "scorer",
        "Fit the scorer, and say how good it is.",
        help="share of the texts kept for evaluation; it learns from those that are left but for the judge's, as in "
        "make_pairs.py; 0 fits it on all rows, for use elsewhere",
    )
    parser.add_argument("--model", default="none", help="language model for the second layer, such as smollm2")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: what is fast")
    args = parser.parse_args(argv)

    from socratiq.data import load_rows
    from socratiq.scorer.grading import rows_to_learn_from
    from socratiq.scorer.language_model import open_language_model
    from socratiq.scorer.scorer import Scorer, cross_validate

    rows = load_rows(args.data)
    lm = open_language_model(args.model, args.device, args.dtype)
    learn_from = rows_to_learn_from(rows, args.held_out, args.seed)[1] if args.held_out else rows
    scorer = Scorer.fit(learn_from, lm=lm)
    for warning in scorer.warnings[:SHOWN]:
        print(f"warning: {warning}")
    if len(scorer.warnings) > SHOWN:
        print(f"warning: and {len(scorer.warnings) - SHOWN} more of this kind")
    print(cross_validate(rows, args.folds, lm=lm))
    scorer.save(args.out)
    print(f"\nscorer fitted on {len(learn_from)} of {len(rows)} rows, in {args.out}")
    if not args.held_out:
        print("it has seen every text: make_pairs.py, train_ppo.py and evaluate, which hold some out, will refuse it")
