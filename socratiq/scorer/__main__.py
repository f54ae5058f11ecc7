"""Fit the scorer, say by cross-validation how good it is, save it: python -m socratiq.scorer --help"""

from socratiq.run import options
from socratiq.run.errors import main


def run(argv: list[str] | None = None) -> None:
    parser = options.Parser(prog="python -m socratiq.scorer", description="Fit the scorer, and say how good it is.")
    add = parser.add_argument
    held_out = "share of the texts kept for evaluation; it learns from the rest less the judge's; 0: from all rows"
    model = 'language model for the second opinion, relatedness and fluency, such as "smollm2"; PPO needs one'
    add("--data", default="sample", metavar="SOURCE", help="rows of context, question and type")
    add("--out", default="runs/scorer", metavar="FOLDER", help="folder of the scorer")
    add("--model", default="none", help=model)
    add("--held-out", type=options.fraction, default=0.1, metavar="SHARE", help=held_out)
    add("--seed", type=options.zero_or_more, default=0, help="seed of that split")
    add("--folds", type=options.number(int, least=2), default=5, help="of the cross-validation by text")
    options.add_device_arguments(add)
    args = parser.parse_args(argv)

    from socratiq.data import load_rows
    from socratiq.scorer.grading import rows_to_learn_from
    from socratiq.scorer.language_model import open_language_model
    from socratiq.scorer.scorer import Scorer, cross_validate

    rows = [row for row in load_rows(args.data) if row.type]
    lm = open_language_model(args.model, args.device, args.dtype)
    learn_from = rows_to_learn_from(rows, args.held_out, args.seed)[1] if args.held_out else rows
    scorer = Scorer.fit(learn_from, lm)
    print(cross_validate(rows, args.folds, lm))
    scorer.save(args.out)
    print(f"\nscorer fitted on {len(learn_from)} of {len(rows)} rows, in {args.out}")
    if not args.held_out:
        print("it has seen every text: make_pairs.py, train_ppo.py and evaluate, which hold some out, will refuse it")
    if lm is None:
        print("without a language model (--model smollm2) it is easy to fool: train_ppo.py will refuse it as a reward")


if __name__ == "__main__":
    main(run)
