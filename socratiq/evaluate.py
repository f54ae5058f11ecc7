"""What did it learn? The questions of every stage about texts that none of them has seen, in figures with intervals.

    python -m socratiq.evaluate                        # the base model, sft, dpo and ppo -> runs/evaluation.json
    python -m socratiq.evaluate runs --limit 64
    OPENAI_API_KEY=... python -m socratiq.evaluate --judge-api gpt-4o-mini

Every model is asked for every type of question about every held-out text, with the same prompt and the same random
numbers. Two classifiers then say of which type each question is: the scorer, which DPO and PPO were trained against,
and a judge that no stage has met (socratiq/evaluation/judge.py). A gain that only the scorer sees is a gain at pleasing
the scorer. Human questions about the same texts are measured the same way; that row is the baseline.

Intervals are 95% bootstrap intervals over texts (socratiq/evaluation/figures.py).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from socratiq.evaluation.table import FIGURES, samples, tables
from socratiq.run import options
from socratiq.run.errors import UserError, bar, main, warn
from socratiq.run.files import atomic_write

STAGES = ("base", "sft", "dpo", "ppo")


def parse_arguments(argv: list[str] | None = None):
    parser = options.Parser(prog="python -m socratiq.evaluate", description="Compare the stages on held-out texts.")
    parser.add_argument("runs", nargs="?", default="runs", help="folder that holds sft, dpo, ppo, scorer")
    add = parser.add_argument_group("models; one that is not there is left out, and so is one named none").add_argument
    add("--base", metavar="MODEL", help="default: the model that SFT began with, else smollm2")
    for stage in STAGES[1:]:
        add(f"--{stage}", metavar="MODEL", help=f"default: {stage} in that folder")
    add("--scorer", metavar="FOLDER", help="default: scorer in that folder")
    add = parser.add_argument_group("texts; default: as --sft was trained").add_argument
    add("--data", type=options.source, help='"sample", "socratiq", a file, a folder, an address or a Hub id')
    add("--held-out", type=options.fraction, metavar="SHARE", help="share of the texts held out")
    add("--seed", type=options.zero_or_more, metavar="N", help="seed of that split and of the questions")
    add("--limit", type=options.count, default=16, metavar="TEXTS", help="held-out texts at most, drawn by the seed")
    add = parser.add_argument_group("asking").add_argument
    add("--samples-per-prompt", type=options.count, default=1, metavar="K", help="questions for each text and type")
    add("--max-new-tokens", type=options.count, default=48, metavar="TOKENS", help="longest question")
    add("--max-prompt-tokens", type=options.count, default=512, metavar="TOKENS", help="a longer text loses its tail")
    add("--temperature", type=options.positive, default=1.0, help="of sampling; 1 is that of training")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where it is fast")
    add = parser.add_argument_group("grades by an OpenAI-compatible server (key in OPENAI_API_KEY)").add_argument
    add("--judge-api", metavar="NAME", help="model that grades every question; costs money")
    add("--base-url", metavar="URL", help="address, such as http://localhost:8000/v1")
    add("--max-requests", type=options.count, metavar="N", help="stop after so many requests, earlier runs' included")
    add = parser.add_argument_group("out").add_argument
    add("--out", metavar="FILE", help="default: evaluation.json in that folder; grades are kept beside it")
    args = parser.parse_args(argv)
    for name in (*STAGES[1:], "scorer"):
        if getattr(args, name) is None:
            setattr(args, name, str(Path(args.runs, name)))
    args.out = args.out or str(Path(args.runs, "evaluation.json"))
    return args


# --- which models, texts and classifiers ----------------------------------------------------------------------------


def training_arguments(model: str) -> dict:
    """train_args.json of a stage's folder; {} for a model without one."""
    file = Path(model) / "train_args.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); train again or name another folder") from None


def fill_in(args) -> None:
    """Base model, data and split are those of SFT unless the user gave others."""
    before = training_arguments(args.sft)
    for name, default in (("base", "smollm2"), ("data", "sample"), ("held_out", 0.1), ("seed", 0)):
        if getattr(args, name) is None:
            setattr(args, name, before.get("model" if name == "base" else name, default))
    for stage in STAGES[1:]:
        trained = vars(args) | training_arguments(getattr(args, stage))
        other_split = (trained["held_out"], trained["seed"]) != (args.held_out, args.seed)
        if trained["data"] == args.data and other_split:
            warn(f"--{stage} was trained with another --held-out or --seed and may have seen these texts")


def find_models(args) -> tuple[dict[str, str], list[str]]:
    """Models by stage, and a line for each stage that is left out."""
    models, left_out = {}, []
    for stage in STAGES:
        name = getattr(args, stage)
        if name == "none":
            left_out.append(f"{stage}: not asked for")
        elif name == str(Path(args.runs, stage)) and not Path(name, "config.json").exists():
            left_out.append(f"{stage}: {name} holds no finished model")
        else:
            models[stage] = name
    options.check(bool(models), "no model to evaluate; name one with --base, --sft, --dpo or --ppo")
    return models, left_out


def open_scorer(args, types: list[str], contexts: list[str]):
    """The saved scorer, or why its figures are left out.

    Raises UserError if it has learnt from a text that is to be graded, or does not know a type.
    """
    from socratiq.scorer.fit import check_unseen
    from socratiq.scorer.reward import load_scorer

    if args.scorer == "none":
        return None, ["scorer: not asked for"]
    if args.scorer == str(Path(args.runs, "scorer")) and not Path(args.scorer).exists():
        return None, [f"scorer: {args.scorer} is not there, make_pairs.py fits it; figures of the scorer are missing"]
    scorer = load_scorer(args.scorer, args.device, args.dtype)
    check_unseen("scorer", args, scorer.settings.get("texts"), contexts, scorer.settings.get("model", "none"))
    missing = [name for name in types if name not in scorer.types]
    options.check(not missing, f"--scorer {args.scorer} does not know {missing} of {args.data}; name another, or none")
    return scorer, []


# --------------------------------------------------------------------------------------------------------------------


def run(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    fill_in(args)
    models, left_out = find_models(args)

    from socratiq.data import load_rows, split_by_context
    from socratiq.evaluation import figures
    from socratiq.evaluation.asking import ask_models, ask_people, choose_tasks
    from socratiq.evaluation.judge import Judge
    from socratiq.scorer.grading import rows_to_learn_from
    from socratiq.training import generator

    # 1. Held-out texts, a judge fitted on other ones, and the scorer of DPO and PPO.
    rows = load_rows(args.data)
    _, held_out_rows = split_by_context(rows, args.held_out, args.seed)
    options.check(bool(held_out_rows), f"{args.data}: no text is held out; raise --held-out or give more texts")
    judge = Judge.fit(rows_to_learn_from(rows, args.held_out, args.seed)[0])
    tasks = choose_tasks(held_out_rows, judge.types, args.limit, args.seed)
    contexts = list(dict.fromkeys(task.context for task in tasks))
    scorer, reasons = open_scorer(args, judge.types, contexts)
    classifiers = {"judge": judge, "scorer": scorer} if scorer else {"judge": judge}
    left_out += reasons
    for reason in left_out:
        print(f"left out: {reason}")
    print(f"{len(contexts)} held-out texts of {args.data}, {len(judge.types)} types, {len(models)} models", flush=True)

    # 2. People have asked already; the models ask, one after the other. The base model reads all questions.
    people = ask_people(held_out_rows, tasks)
    records = {"human": people} if people else {}
    ask_models(models, tasks, records, args)

    # 3. Measure each question.
    for of_stage in bar(records.values(), desc="measuring"):
        figures.measure(of_stage, contexts, classifiers)
    if args.judge_api:
        from socratiq.evaluation.api_judge import grade

        grade(records, contexts, args)

    # 4. Figures with intervals, for each stage, for each of its types, and for the change from one stage to the next.
    size = len(contexts)
    weights = figures.draws(size, generator(args.seed, "bootstrap"))
    sums = {stage: figures.sums_by_text(of_stage, size) for stage, of_stage in records.items()}
    stages = {}
    for stage in ("human", *models) if people else models:
        by_type = {name: [record for record in records[stage] if record["type"] == name] for name in judge.types}
        by_type = {name: figures.sums_by_text(some, size) for name, some in by_type.items() if some}
        stages[stage] = {
            "model": models.get(stage, "people"),
            "figures": figures.figures_of(sums[stage], weights) | figures.repetition(records[stage]),
            "by_type": {name: figures.figures_of(some, weights) for name, some in by_type.items()},
            "questions": records[stage],
        }
    steps = list(itertools.pairwise(models)) + ([("sft", "ppo")] if {"sft", "dpo", "ppo"} <= set(models) else [])
    result = {
        "settings": {name: value for name, value in vars(args).items() if name != "base_url"},
        "classifiers": list(classifiers),
        "left_out": left_out,
        "meanings": {name: figure._asdict() for name, figure in FIGURES.items()},
        "types": judge.types,
        "contexts": contexts,
        "steps": {f"{a} -> {b}": figures.change(sums[a], sums[b], weights) for a, b in steps},
        "stages": stages,
    }
    atomic_write(args.out, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(f"\n{tables(result)}\n\n{samples(result)}")
    print(f"\nAll questions are in {args.out}. Next: python -m socratiq.report {args.runs}")


if __name__ == "__main__":
    main(run)
