"""From questions to figures: a record for each question, figures with intervals for each stage, steps between them."""

from __future__ import annotations

import math

import torch

from socratiq.evaluation import measures
from socratiq.evaluation.bootstrap import Sums, by_text, exp_mean, interval, mean
from socratiq.evaluation.questions import Answer, Readings, Task
from socratiq.losses import kl_estimate

CLASSIFIERS = ("judge", "scorer")


def records_of(tasks: list[Task], answers: list[list[Answer]], classifiers: dict) -> list[dict]:
    """What is known of each question of one stage, in the order of tasks and answers.

    classifiers: {"judge": Judge, "scorer": Scorer} or the scorer alone. Raises nothing: a text is a text, even "".
    """
    pairs = [(task, answer) for task, row in zip(tasks, answers, strict=True) for answer in row]
    if not pairs:
        return []
    contexts, questions = [task.context for task, _ in pairs], [answer.text for _, answer in pairs]
    types = [task.type for task, _ in pairs]
    records = [
        {
            "context": task.place,
            "type": task.type,
            "question": answer.text,
            "words": len(measures.words(answer.text)),
            "ended": answer.ended,
            "well_formed": measures.well_formed(answer.text, task.context),
            "relatedness": round(measures.relatedness(answer.text, task.context), 4),
            "copying": round(measures.copying(answer.text, task.context), 4),
        }
        for task, answer in pairs
    ]
    rewards = classifiers["scorer"].reward(contexts, questions, types)  # first: what it has read is remembered
    for name, classifier in classifiers.items():
        strengths = classifier.strengths(contexts, questions)  # (N, T)
        rows = zip(records, strengths.tolist(), strengths.argmax(1).tolist(), strict=True)
        for record, strength, strongest in rows:
            record[name] = round(strength[classifier.types.index(record["type"])], 4)
            record[f"{name}_type"] = classifier.types[strongest]
    for record, reward in zip(records, rewards.tolist(), strict=True):
        record["reward"] = round(reward, 4)
    return records


def figures_of_records(records: list[dict], texts: int) -> dict[str, Sums]:
    """The figures that are means over the questions of one stage."""

    def average(pick, some=records):
        places, ones = [record["context"] for record in some], [1.0] * len(some)
        return by_text(texts, places, [float(pick(record)) for record in some], ones, finish=mean)

    found = classified(records, texts)
    found["scorer/reward"] = average(lambda record: record["reward"])
    graded = [record for record in records if "grades" in record]
    for name in graded[0]["grades"] if graded else ():
        found[f"api/{name}"] = average(lambda record, name=name: record["grades"][name], graded)
    for name in ("well_formed", "words", "relatedness", "copying"):
        found[name] = average(lambda record, name=name: record[name])
    found["eos"] = average(lambda record: record["ended"])
    return found


def classified(records: list[dict], texts: int) -> dict[str, Sums]:
    """Accuracy and strength by each classifier, over these records."""
    places, ones, found = [record["context"] for record in records], [1.0] * len(records), {}
    for name in CLASSIFIERS:
        if f"{name}_type" in records[0]:
            right = [float(record[f"{name}_type"] == record["type"]) for record in records]
            found[f"{name}/accuracy"] = by_text(texts, places, right, ones, finish=mean)
            found[f"{name}/strength"] = by_text(texts, places, [r[name] for r in records], ones, finish=mean)
    return found


def overlap_with_humans(tasks: list[Task], answers: list[list[Answer]], texts: int) -> dict[str, Sums]:
    """BLEU and ROUGE-L of each question against the human ones of the same text and type, where there are any."""
    compared = [(task, answer) for task, row in zip(tasks, answers, strict=True) if task.human for answer in row]
    if not compared:
        return {}
    places = [task.place for task, _ in compared]
    counts = [measures.bleu_counts(answer.text, task.human) for task, answer in compared]
    rouge = [measures.rouge_l(answer.text, task.human) for task, answer in compared]
    return {
        "bleu": by_text(texts, places, *zip(*counts, strict=True), finish=measures.bleu_of_counts),
        "rouge_l": by_text(texts, places, rouge, [1.0] * len(rouge), finish=mean),
    }


def figures_of_readings(
    stage: str,
    tasks: list[Task],
    answers: dict[str, list[list[Answer]]],
    readings: Readings,
    texts: int,
    exact_kl: bool,
) -> dict[str, Sums]:
    """Perplexities, and with `exact_kl` (questions drawn at temperature 1) the KL from this stage to SFT."""
    places = {
        name: [task.place for task, row in zip(tasks, answers[name], strict=True) for _ in row]
        for name in (stage, "human")
    }

    def perplexity(name, logprobs):
        return by_text(
            texts, places[name], [-x.sum().item() for x in logprobs], [float(len(x)) for x in logprobs], finish=exp_mean
        )

    found = {}
    if stage in readings.base:
        found["base_perplexity"] = perplexity(stage, readings.base[stage])
    if stage in readings.human:
        found["human_perplexity"] = perplexity("human", readings.human[stage])
    if exact_kl and stage in readings.sft and stage in readings.own:
        pairs = list(zip(readings.own[stage], readings.sft[stage], strict=True))
        for name, kind in (("kl_to_sft", "k1"), ("kl_to_sft_k3", "k3")):
            nats = [kl_estimate(own, sft, kind).sum().item() for own, sft in pairs]
            found[name] = by_text(texts, places[stage], nats, [1.0] * len(nats), finish=mean)
    return found


def diversity(records: list[dict]) -> dict[str, float]:
    """Figures about all questions together. No interval: a text drawn twice would look like a model that repeats."""
    said = [record["question"] for record in records]
    return {
        "distinct_1": measures.distinct(said, 1),
        "distinct_2": measures.distinct(said, 2),
        "duplicates": measures.duplicates(said),
    }


def entry(value: float, resampled: torch.Tensor | None = None) -> dict:
    """A figure for the file: {"value", "low", "high"}, without low and high where there is no interval."""
    span = interval(resampled) if resampled is not None and len(resampled) else None
    return {"value": _round(value)} | ({"low": _round(span[0]), "high": _round(span[1])} if span else {})


def entries(sums: dict[str, Sums], weights: torch.Tensor) -> dict[str, dict]:
    """Every figure with its interval; weights (R, texts) from `bootstrap.resamples`, R = 0 for no intervals."""
    return {name: entry(x.figure(), x.resampled(weights)) for name, x in sums.items()}


def step(earlier: dict[str, Sums], later: dict[str, Sums], weights: torch.Tensor) -> dict[str, dict]:
    """later - earlier for every figure that both have; the interval is of the difference, over the same resamples."""
    return {
        name: entry(later[name].figure() - x.figure(), later[name].resampled(weights) - x.resampled(weights))
        for name, x in earlier.items()
        if name in later
    }


def _round(x: float) -> float | None:
    return float(f"{x:.5g}") if math.isfinite(x) else None
