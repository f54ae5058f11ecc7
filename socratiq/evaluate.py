"""What did it learn? The questions of every stage about texts that none of them has seen, in figures with intervals.

    python -m socratiq.evaluate runs                   # the base model, sft, dpo and ppo -> runs/evaluation.json
    python -m socratiq.evaluate runs --limit 64
    OPENAI_API_KEY=... python -m socratiq.evaluate --judge-api gpt-4o-mini

Every model is asked for every type of question about every held-out text, with the very same prompt and the same random
numbers. Two classifiers then say of which type each question is: the scorer, which DPO and PPO were trained against,
and a judge that no stage has met. A gain that only the scorer sees is a gain at pleasing the scorer. What people asked
about the same texts goes through the same mill, as the mark to compare with ("human").

Intervals are 95% bootstrap intervals over texts (socratiq/evaluation/bootstrap.py).
"""

from __future__ import annotations

import itertools
import json
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

from socratiq.run import options as cli
from socratiq.run.errors import UserError, main, warn
from socratiq.run.files import atomic_write
from socratiq.scorer import fit

STAGES = ("base", "sft", "dpo", "ppo")
SETTINGS = (
    "data", "held_out", "seed", "limit", "samples_per_prompt", "max_new_tokens", "max_prompt_tokens", "temperature",
    "bootstrap", "judge_api",
)  # fmt: skip


class Figure(NamedTuple):
    """One row of the table. `better`: +1 more is better, -1 less is better, 0 neither (compare with the human row)."""

    title: str
    better: int
    meaning: str


FIGURES = {
    "judge/accuracy": Figure("right type, by the judge", 1, "share of questions whose strongest type is the asked one"),
    "judge/strength": Figure("strength, by the judge", 1, "mean probability of the asked type"),
    "scorer/accuracy": Figure("right type, by the scorer", 1, "the same by the scorer that the stages were trained on"),
    "scorer/strength": Figure("strength, by the scorer", 1, "mean probability of the asked type"),
    "scorer/reward": Figure("reward", 1, "the strength and the gates of the scorer in one number: what PPO maximises"),
    "api/type": Figure("grade for the type", 1, "1 to 5 by an API model: is it of the asked type?"),
    "api/relevance": Figure("grade for relevance", 1, "1 to 5 by an API model: is it about this very text?"),
    "api/quality": Figure("grade for quality", 1, "1 to 5 by an API model: is it clear, fluent and critical?"),
    "well_formed": Figure("well formed", 1, "share that is one question of 3 to 60 words on one line, not a copy"),
    "eos": Figure("ended by itself", 1, "share that drew the end-of-sequence token within --max-new-tokens"),
    "words": Figure("words", 0, "mean length"),
    "relatedness": Figure("relatedness", 1, "mean share of content words whose first four letters the text has too"),
    "copying": Figure("copying", -1, "longest run of words that stands in the text, as a share of the question"),
    "distinct_1": Figure("distinct-1", 1, "different words / words, over all questions"),
    "distinct_2": Figure("distinct-2", 1, "different word pairs / word pairs, over all questions"),
    "duplicates": Figure("duplicates", -1, "share of questions that were asked before, word for word"),
    "base_perplexity": Figure("perplexity, base model", -1, "of the questions under the base model: low is fluent"),
    "kl_to_sft": Figure("KL to SFT, k1", 0, "nats per question between this model and SFT, by its own questions"),
    "kl_to_sft_k3": Figure("KL to SFT, k3", 0, "the same by the estimator that is never negative"),
    "human_perplexity": Figure("perplexity of human", -1, "per token of the held-out human questions, by this model"),
    "bleu": Figure("BLEU", 1, "corpus BLEU-4 against the human questions of the same text and type"),
    "rouge_l": Figure("ROUGE-L", 1, "mean ROUGE-L F1 against the same"),
}


def parse_arguments(argv: list[str] | None = None):
    parser = cli.Parser(prog="python -m socratiq.evaluate", description="Compare the stages on held-out texts.")
    parser.add_argument("runs", nargs="?", default="runs", help="folder with sft, dpo, ppo, scorer and judge")
    models = parser.add_argument_group("models; a stage that is not there yet is left out, and so is one named none")
    models.add_argument("--base", metavar="MODEL", help="default: the model that SFT began with, else smollm2")
    for stage in STAGES[1:]:
        models.add_argument(f"--{stage}", metavar="MODEL", help=f"default: {stage} in that folder")
    models.add_argument("--scorer", metavar="FOLDER", help="default: scorer in that folder, fitted there if missing")
    models.add_argument("--judge", metavar="FOLDER", help="default: judge in that folder, likewise; none goes without")
    data = parser.add_argument_group("texts; what is not given here is as it was when --sft was trained")
    data.add_argument("--data", type=cli.source, help='"sample", "socratiq", a file, a folder, an address or a Hub id')
    data.add_argument("--held-out", type=cli.fraction, metavar="SHARE", help="share of texts held out")
    data.add_argument("--seed", type=cli.zero_or_more, metavar="N", help="seed of that split and of the questions")
    data.add_argument("--limit", type=cli.count, default=16, metavar="TEXTS", help="at most so many held-out texts")
    asking = parser.add_argument_group("asking")
    asking.add_argument(
        "--samples-per-prompt", type=cli.count, default=1, metavar="K", help="questions a text and type"
    )
    asking.add_argument("--max-new-tokens", type=cli.count, default=48, metavar="TOKENS", help="longest question")
    asking.add_argument(
        "--max-prompt-tokens", type=cli.count, default=512, metavar="TOKENS", help="a longer text loses its tail"
    )
    asking.add_argument("--temperature", type=cli.positive, default=1.0, help="1 is what the stages were trained for")
    asking.add_argument("--batch-size", type=cli.count, default=96, metavar="PROMPTS", help="prompts at the same time")
    asking.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    asking.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: what is fast")
    grading = parser.add_argument_group("grades by an OpenAI-compatible server (key in OPENAI_API_KEY)")
    grading.add_argument("--judge-api", metavar="NAME", help="model that grades every question; costs money")
    grading.add_argument("--base-url", metavar="URL", help="address, such as http://localhost:8000/v1")
    grading.add_argument("--max-requests", type=cli.count, metavar="N", help="refuse to ask more often")
    grading.add_argument("--concurrency", type=cli.count, default=8, metavar="N", help="requests under way at once")
    out = parser.add_argument_group("out")
    out.add_argument("--out", metavar="FILE", help="default: evaluation.json in the folder of runs")
    out.add_argument("--bootstrap", type=cli.count, default=2000, metavar="N", help="resamples behind an interval")
    out.add_argument("--show", type=cli.zero_or_more, default=3, metavar="N", help="texts whose questions are printed")
    args = parser.parse_args(argv)
    if args.scorer == "none":
        parser.error("--scorer none: without a scorer there are no figures; name a folder, or leave it out")
    if args.judge == "openai":
        parser.error("--judge openai: a judge is a folder; for grades by an API model use --judge-api NAME")
    for name in (*STAGES[1:], "scorer", "judge"):
        if getattr(args, name) is None:
            setattr(args, name, str(Path(args.runs, name)))
    args.out = args.out or str(Path(args.runs, "evaluation.json"))
    return args


# --- which models, texts and classifiers ----------------------------------------------------------------------------


def fill_in(args) -> None:
    """What the user left open is as it was in SFT: its model as base, its data, its split."""
    known = Path(args.sft) / "train_args.json"
    try:
        before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    except ValueError as error:
        raise UserError(f"{known}: not JSON ({error}); train again or name another --sft") from None
    for name, setting, otherwise in (
        ("base", "model", "smollm2"),
        ("data", "data", "sample"),
        ("held_out", "held_out", 0.1),
        ("seed", "seed", 0),
    ):
        if getattr(args, name) is None:
            setattr(args, name, before.get(setting, otherwise))
    for stage in STAGES[1:]:
        known = Path(getattr(args, stage)) / "train_args.json"
        try:
            trained = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
        except ValueError:
            trained = {}
        split = [trained.get("held_out", args.held_out), trained.get("seed", args.seed)]
        if trained.get("data", args.data) == args.data and split != [args.held_out, args.seed]:
            warn(f"{known.parent} was trained with another --held-out or --seed and may have seen these texts")


def present(args) -> tuple[dict[str, str], list[str]]:
    """Models by stage, and a line for each stage that is left out."""
    models, skipped = {}, []
    for stage in STAGES:
        name = getattr(args, stage)
        if name == "none":
            skipped.append(f"{stage}: not asked for")
        elif name == str(Path(args.runs, stage)) and not (Path(name) / "config.json").exists():
            skipped.append(f"{stage}: {name} " + ("has no finished model" if Path(name).exists() else "is not there"))
        else:
            models[stage] = name
    if not models:
        raise UserError("no model to evaluate; name one with --base, --sft, --dpo or --ppo")
    return models, skipped


def choose_tasks(rows, held_out_rows, limit: int, seed: int) -> list:
    """A Task for every type of the data and each of at most `limit` held-out texts, drawn at random."""
    import torch

    from socratiq.evaluation.questions import Task
    from socratiq.taxonomy import OTHERS, TYPES
    from socratiq.training import generator

    contexts = list(dict.fromkeys(row.context for row in held_out_rows))
    drawn = torch.randperm(len(contexts), generator=generator(seed, "evaluated texts"))[:limit].tolist()
    contexts = [contexts[i] for i in sorted(drawn)]
    known = [kind.name for kind in TYPES]
    types = {row.type for row in rows} - {OTHERS}
    types = [name for name in known if name in types] + sorted(types - set(known))
    human: dict[tuple[str, str], list[str]] = {}
    for row in held_out_rows:
        human.setdefault((row.context, row.type), []).append(row.question)
    return [
        Task(place, context, type, human.get((context, type), []))
        for place, context in enumerate(contexts)
        for type in types
    ]


def load_classifiers(args, rows, types: list[str], contexts: list[str]) -> dict:
    """{"judge": Judge, "scorer": Scorer}, each fitted on its share of the training texts if it is not there.

    One that is there, from a run with another split perhaps, must not have learnt from a text that is to be graded.
    """
    from socratiq.evaluation.judge import Judge
    from socratiq.scorer.grading import rows_to_learn_from
    from socratiq.scorer.scorer import Scorer

    judge_rows, scorer_rows = rows_to_learn_from(rows, args.held_out, args.seed)
    found = {}
    for name, kind, rows in (("judge", Judge, judge_rows), ("scorer", Scorer, scorer_rows)):
        folder = getattr(args, name)
        if name == "judge" and folder == "none":
            continue
        if Path(folder).exists():
            found[name] = known = kind.load(folder)
            texts = known.texts if name == "judge" else known.settings.get("texts")
            model = "none" if name == "judge" else known.settings.get("model", "none")
            fit.check_unseen(name, args, texts, contexts, model)
        else:
            found[name] = kind.fit(rows)
            found[name].save(folder)
            texts = len({row.context for row in rows})
            print(f"{name}: fitted on {texts} texts that are not held out, now in {folder}")
        unknown = [type for type in types if type not in found[name].types]
        if unknown:
            raise UserError(
                f"--{name} {folder} does not know the type {unknown[0]!r} of {args.data}; it was fitted on other rows: "
                "name another folder, where one for these rows will be fitted"
            )
    return found


# --- what is printed ------------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """Figures by stage, then the judge's accuracy by type, then what each step changed."""
    stages = list(result["stages"])
    measured = f"{result['classifiers'][0]}/accuracy"
    width = max(len(title) for title in [figure.title + " +" for figure in FIGURES.values()] + result["types"]) + 1

    def line(title: str, cells: list[str]) -> str:
        return f"{title:<{width}}" + "".join(f"{cell:>20}" for cell in cells)

    lines = [line("", stages)]
    for name, figure in FIGURES.items():
        cells = [shown(result["stages"][stage]["figures"].get(name)) for stage in stages]
        if any(cells):
            lines.append(line(f"{figure.title} {' +-'[figure.better]}", cells))
    lines += ["", line(FIGURES[measured].title, stages)]
    for type in result["types"]:
        by_type = [result["stages"][stage]["by_type"].get(type, {}).get(measured) for stage in stages]
        lines.append(line(type, [shown(found, spans=False) for found in by_type]))
    lines += ["", "change, text by text"]
    for name, differences in result["steps"].items():
        change = differences[measured]
        sure = "low" in change and not change["low"] <= 0 <= change["high"]
        lines.append(line(name, [shown(change)]) + ("" if sure else "   may be chance"))
    return "\n".join(line.rstrip() for line in lines)


def shown(entry: dict | None, spans: bool = True) -> str:
    """ ".62 [.51 .71]", without the interval if not `spans`; "" without a figure."""
    if entry is None or entry["value"] is None:
        return ""

    def digits(x: float) -> str:
        if abs(x) < 0.995:
            return f"{x if abs(x) >= 0.005 else 0.0:.2f}".replace("0.", ".", 1)
        return f"{x:.1f}" if abs(x) < 1000 else f"{x:.0f}"

    span = f" [{digits(entry['low'])} {digits(entry['high'])}]" if spans and "low" in entry else ""
    return digits(entry["value"]) + span


def print_samples(result: dict, count: int) -> None:
    """What all stages asked about a few texts, one type each: the first answer, unpicked, with the judge's strength."""
    for place, context in enumerate(result["contexts"][:count]):
        type = result["types"][place % len(result["types"])]
        print(f"\n{textwrap.shorten(context, 160, placeholder=' ...')}\n  {type}")
        for stage, found in result["stages"].items():
            first = next((r for r in found["questions"] if (r["context"], r["type"]) == (place, type)), None)
            if first:
                print(f"  {stage:>5}  {first[result['classifiers'][0]]:.2f}  {' '.join(first['question'].split())}")


# --------------------------------------------------------------------------------------------------------------------


def run(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(argv)
    fill_in(args)
    models, skipped = present(args)

    # 1. Texts that were held out, and the classifiers, fitted on the other ones where they are missing.
    from socratiq.data import load_rows, split_by_context
    from socratiq.evaluation import figures
    from socratiq.evaluation.bootstrap import resamples
    from socratiq.evaluation.questions import ask_all
    from socratiq.scorer.language_model import open_language_model
    from socratiq.training import generator

    rows = load_rows(args.data)
    _, held_out_rows = split_by_context(rows, args.held_out, args.seed)
    tasks = choose_tasks(rows, held_out_rows, args.limit, args.seed)
    cli.check(bool(tasks), f"{args.data}: no text is held out; raise --held-out, or give more than one text")
    contexts, types = list(dict.fromkeys(task.context for task in tasks)), list(dict.fromkeys(t.type for t in tasks))
    classifiers = load_classifiers(args, rows, types, contexts)
    for reason in skipped:
        print(f"left out: {reason}")
    print(f"{len(contexts)} held-out texts of {args.data}, {len(types)} types, {len(models)} models", flush=True)

    # 2. Ask and read, one model at a time; then judge.
    answers, readings = ask_all(models, tasks, args)
    partner = open_language_model(classifiers["scorer"].settings.get("model", "none"), args.device, args.dtype)
    classifiers["scorer"].with_language_model(partner)
    records = {stage: figures.records_of(tasks, rows, classifiers) for stage, rows in answers.items()}
    if not records["human"]:
        del records["human"], answers["human"]
    if args.judge_api:
        from socratiq.evaluation.api_judge import grade

        grade(records, contexts, args)

    # 3. Figures. With a single text there is nothing to resample.
    size = len(contexts)
    weights = resamples(size, args.bootstrap if size > 1 else 0, generator(args.seed, "bootstrap"))
    sums = {}
    for stage, some in records.items():
        sums[stage] = figures.figures_of_records(some, size)
        if stage in models:
            sums[stage] |= figures.overlap_with_humans(tasks, answers[stage], size)
        if "human" in answers:
            sums[stage] |= figures.figures_of_readings(stage, tasks, answers, readings, size, args.temperature == 1)
    stages = {}
    for stage, some in records.items():
        found = figures.entries(sums[stage], weights)
        found |= {name: figures.entry(value) for name, value in figures.diversity(some).items()}
        by_type = {type: [record for record in some if record["type"] == type] for type in types}
        stages[stage] = {
            "model": models.get(stage, "people"),
            "figures": {name: found[name] for name in FIGURES if name in found},
            "by_type": {
                type: figures.entries(figures.classified(of_type, size), weights)
                for type, of_type in by_type.items()
                if of_type
            },
            "questions": some,
        }
    steps = list(itertools.pairwise(models)) + ([("sft", "ppo")] if {"sft", "dpo", "ppo"} <= set(models) else [])
    result = {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "classifiers": list(classifiers),
        "left_out": skipped,
        "meanings": {name: figure._asdict() for name, figure in FIGURES.items()},
        "types": types,
        "contexts": contexts,
        "steps": {f"{a} -> {b}": figures.step(sums[a], sums[b], weights) for a, b in steps},
        "stages": stages,
    }
    atomic_write(args.out, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(table(result))
    print_samples(result, args.show)
    print(
        f"\n+ more is better, - less is better; [95% interval over texts]; all questions are in {args.out}\n"
        f"{time.perf_counter() - started:.0f} s. Next: python -m socratiq.report {Path(args.out).parent}"
    )


if __name__ == "__main__":
    main(run)
