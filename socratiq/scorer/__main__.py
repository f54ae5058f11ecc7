"""Fit the scorer, say by cross-validation how good it is, save it: python -m socratiq.scorer --help"""

from socratiq.run import options
from socratiq.run.errors import main


def run(argv: list[str] | None = None) -> None:
    parser = options.Parser(prog="python -m socratiq.scorer", description="Fit the scorer, and say how good it is.")
    add = parser.add_argument
    add("--data", default="sample", metavar="SOURCE", help="rows of context, question and type")
    add("--out", default="runs/scorer", metavar="FOLDER", help="folder of the scorer")
    add("--model", default="none", help='language model, such as "smollm2": PPO needs a scorer with one')
    add("--held-out", type=options.fraction, default=0.1, metavar="SHARE", help="share of texts kept for evaluation")
    add("--seed", type=options.zero_or_more, default=0, help="seed of that split")
    options.add_device_arguments(add)
    args = parser.parse_args(argv)

    from socratiq.data import load_rows
    from socratiq.scorer import grading
    from socratiq.scorer.language_model import open_language_model
    from socratiq.scorer.scorer import Scorer, cross_validate, mean_opinion

    rows = grading.examples(load_rows(args.data))
    lm = open_language_model(args.model, args.device, args.dtype)
    learn_from = grading.rows_to_learn_from(rows, args.held_out, args.seed)[1]
    scorer = Scorer.fit(learn_from, lm)
    types, found = cross_validate(rows, lm)
    for name, value in grading.figures(types, mean_opinion(found), [row.type for row in rows]).items():
        print(f"{value:.3f}  {name}")
    scorer.save(args.out)
    print(f"\nscorer fitted on {len(learn_from)} of {len(rows)} rows, in {args.out}")
    if lm is None:
        print("without a language model (--model smollm2) it is easy to fool: train_ppo.py will refuse it as a reward")


if __name__ == "__main__":
    main(run)
