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
MADE_BY = {"sft": "train_sft.py", "dpo": "train_dpo.py", "ppo": "train_ppo.py", "scorer": "make_pairs.py"}


def parse_arguments(argv: list[str] | None = None):
    parser = options.Parser(prog="python -m socratiq.evaluate", description="Compare the stages on held-out texts.")
    parser.epilog = "; ".join(f"{figure.title}: {figure.meaning}" for figure in FIGURES.values())
    parser.add_argument("runs", nargs="?", default="runs", help="folder that holds sft, dpo, ppo, scorer")
    parser.add_argument("--out", metavar="FILE", help="default: evaluation.json in that folder; grades are beside it")
    add = parser.add_argument_group("models; one that is not there is left out, and so is one named none").add_argument
    add("--base", metavar="MODEL", help="default: the model that SFT began with, else smollm2")
    for name in MADE_BY:
        add(f"--{name}", metavar="FOLDER", help=f"default: {name} in that folder")
    add = parser.add_argument_group("texts; default: as --sft was trained").add_argument
    add("--data", metavar="SOURCE", help='"sample", "socratiq", a file, a folder, an address or a Hub id')
    add("--types", type=options.names, help="only rows of these types")
    add("--held-out", type=options.fraction, metavar="SHARE", help="share of the texts held out")
    add("--seed", type=options.zero_or_more, metavar="N", help="seed of that split and of the questions")
    add("--limit", type=options.count, default=16, metavar="TEXTS", help="held-out texts at most, drawn by the seed")
    add = parser.add_argument_group("asking").add_argument
    add("--samples-per-prompt", type=options.count, default=1, metavar="K", help="questions for each text and type")
    add("--max-new-tokens", type=options.count, default=48, metavar="TOKENS", help="longest question")
    add("--max-prompt-tokens", type=options.count, default=512, metavar="TOKENS", help="a longer text loses its tail")
    add("--temperature", type=options.positive, default=1.0, help="of sampling; 1 is that of training")
    options.add_device_arguments(add, plain="slower, the same questions")
    add = parser.add_argument_group("grades by an OpenAI-compatible server (key in OPENAI_API_KEY)").add_argument
    add("--judge-api", metavar="NAME", help="model that grades every question; costs money")
    add("--base-url", metavar="URL", help="address, such as http://localhost:8000/v1")
    add("--max-requests", type=options.count, metavar="N", help="stop after so many requests, earlier runs' included")
    args = parser.parse_args(argv)
    for name in MADE_BY:
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
    for name, default in (("base", "smollm2"), ("data", "sample"), ("types", None), ("held_out", 0.1), ("seed", 0)):
        if getattr(args, name) is None:
            setattr(args, name, before.get("model" if name == "base" else name, default))
    for stage in STAGES[1:]:
        trained = vars(args) | training_arguments(getattr(args, stage))
        if trained["data"] == args.data and (trained["held_out"], trained["seed"]) != (args.held_out, args.seed):
            warn(f"--{stage} was trained with another --held-out or --seed and may have seen these texts")


def find_parts(args) -> tuple[dict[str, str], list[str]]:
    """The models by stage and the scorer, and a line for each that is left out."""
    found, left_out = {}, []
    for name in ("base", *MADE_BY):
        folder, last_file = getattr(args, name), "scorer.json" if name == "scorer" else "config.json"
        if folder == "none":
            left_out.append(f"{name}: not asked for")
        elif folder == str(Path(args.runs, name)) and not Path(folder, last_file).exists():
            left_out.append(f"{name}: {folder} is not there or not finished; {MADE_BY[name]} makes it")
        else:
            found[name] = folder
    return found, left_out


# --------------------------------------------------------------------------------------------------------------------


def run(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    fill_in(args)
    models, left_out = find_parts(args)
    with_scorer = models.pop("scorer", None)
    options.check(bool(models), "no model to evaluate; name one with --base, --sft, --dpo or --ppo")

    from socratiq.data import load_rows, split_by_context
    from socratiq.evaluation import api_judge, figures
    from socratiq.evaluation.asking import ask_models, ask_people, choose_tasks
    from socratiq.evaluation.judge import Judge
    from socratiq.evaluation.measures import measure
    from socratiq.scorer.grading import place, rows_to_learn_from
    from socratiq.scorer.scorer import Scorer
    from socratiq.training import generator

    api = api_judge.open_api(args) if args.judge_api else None  # before any long work: a mistake should show at once

    # 1. Held-out texts, a judge fitted on other ones, and the scorer of DPO and PPO.
    rows = load_rows(args.data, args.types)
    _, held_out_rows = split_by_context(rows, args.held_out, args.seed)
    options.check(bool(held_out_rows), f"{args.data}: no text is held out; raise --held-out or give more texts")
    judge_rows = rows_to_learn_from(rows, args.held_out, args.seed)[0]
    judge = Judge.fit(judge_rows)
    tasks = choose_tasks(held_out_rows, judge.types, args.limit, args.seed)
    contexts = list(dict.fromkeys(task.context for task in tasks))
    classifiers = {"judge": judge}
    if with_scorer:
        scorer = Scorer.load(args.scorer, args.device, args.dtype, contexts, judge.types, args.plain)
        if shared := {place(row.context) for row in judge_rows}.intersection(scorer.settings["texts"]):
            warn(f"judge and scorer learnt from {len(shared)} texts in common, so the judge is less independent")
        classifiers["scorer"] = scorer
    for reason in left_out:
        print(f"left out: {reason}")
    print(f"{len(contexts)} held-out texts of {args.data}, {len(judge.types)} types, {len(models)} models", flush=True)

    # 2. People have asked already; the models ask, one after the other. The base model reads all questions.
    people = ask_people(held_out_rows, tasks)
    records = {"human": people} if people else {}
    ask_models(models, tasks, records, args)

    # 3. Measure each question.
    for of_stage in bar(records.values(), desc="measuring"):
        measure(of_stage, contexts, classifiers)
    if api:
        api_judge.grade(records, contexts, *api)

    # 4. Figures with intervals, for each stage, for each of its types, and for the change from one stage to the next.
    weights = figures.draws(len(contexts), generator(args.seed, "bootstrap"))
    stages = {}
    for stage in ("human", *models) if people else models:
        by_type = {name: [record for record in records[stage] if record["type"] == name] for name in judge.types}
        stages[stage] = {
            "model": models.get(stage, "people"),
            "figures": figures.figures_of(records[stage], weights) | figures.repetition(records[stage]),
            "by_type": {name: figures.figures_of(some, weights) for name, some in by_type.items() if some},
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
        "steps": {f"{a} -> {b}": figures.change(records[a], records[b], weights) for a, b in steps},
        "stages": stages,
    }
    atomic_write(args.out, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(f"\n{samples(result)}\n\nAll questions are in {args.out}. Next: python -m socratiq.report {args.runs}")
    print(f"\n{tables(result)}")


if __name__ == "__main__":
    main(run)
