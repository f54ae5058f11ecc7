"""Shapes and numbers at the edge: single rows, batches larger than the data, empty questions, NaN in a forward pass."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_family import write
from test_resume import command

from socratiq.models import load_tokenizer
from socratiq.prompts import plain_ids


def logged(scripts, arguments, folder: Path, **options) -> list[dict]:
    """The metrics of a run that ends well, every one of them a number, as in its last line."""
    status, said, complained = scripts.run(arguments, cwd=folder, **options)
    assert (status, complained) == (0, "") and not re.search("None|nan", said.splitlines()[-1])
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(x is not None for line in lines for x in line.values())
    return lines


def stopped(scripts, arguments, folder: Path) -> str:
    """The one line with which a run stops that leaves no model."""
    status, _, complained = scripts.run(arguments, cwd=folder)
    assert status == 2 and complained.startswith("error: ") and complained.count("\n") == 1
    assert not (folder / "out" / "config.json").exists()
    return complained


def edited(inputs: Path, folder: Path, edit) -> Path:
    """A copy of the inputs whose rows.jsonl and pairs.jsonl went through `edit`, a function of their text."""
    own = folder / "inputs"
    shutil.copytree(inputs, own)
    for name in ("rows.jsonl", "pairs.jsonl"):
        (own / name).write_text(edit((own / name).read_text()))
    return own


# --- sizes


SIZES = {
    "a batch larger than the data": ["--batch-size", "1000"],
    "windows larger than the data": ["--batch-size", "7", "--accumulate", "9"],
    "one row at a time": ["--batch-size", "1", "--accumulate", "5", "--steps", "2"],
    "nothing held out": ["--held-out", "0", "--steps", "2"],
    "one text held out": ["--held-out", "0.0001", "--steps", "2", "--eval-rows", "1"],
    "all but one text held out": ["--held-out", "0.9999", "--steps", "2"],
    "more steps than an epoch has": ["--batch-size", "40", "--steps", "3"],
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["sft", "dpo"])
def test_sizes(case, size, scripts, inputs, tmp_path):
    lines = logged(scripts, [*command(case, inputs), *SIZES[size]], tmp_path)
    evaluated = any(name.startswith("eval/") for line in lines for name in line)
    assert evaluated == (size != "nothing held out")
    assert [line["step"] for line in lines] == list(range(0 if evaluated else 1, lines[-1]["step"] + 1))


@pytest.mark.parametrize("case", ["sft", "dpo", "ppo"])
def test_a_single_row(case, scripts, inputs, tmp_path):
    own = edited(inputs, tmp_path, lambda text: text.partition("\n")[0])
    lines = logged(scripts, [*command(case, own), "--steps", "2"], tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert not any(name.startswith("eval/") for line in lines for name in line)


ROLLOUTS = {  # arguments, updates a step
    "one question a prompt": (["--samples-per-prompt", "1"], 4),
    "one token": (["--batch-size", "1", "--samples-per-prompt", "1", "--max-new-tokens", "1"], 2),
    "more prompts than texts": (["--batch-size", "23"], 4),
    "more minibatches than prompts": (["--batch-size", "3", "--minibatches", "7"], 6),
    "minibatches that do not divide": (["--batch-size", "7", "--minibatches", "3", "--ppo-epochs", "1"], 3),
    "nothing held out": (["--held-out", "0"], 4),
    "no price on the KL": (["--kl-coef", "0"], 4),
    "stop at the first sign of movement": (["--target-kl", "1e-12", "--reward", "patches:wordy"], None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts(name, scripts, inputs, tmp_path):
    more, updates = ROLLOUTS[name]
    case = "ppo full" if "--kl-coef" in more else "ppo"  # which has a --kl-target
    lines = logged(scripts, [*command(case, inputs), "--steps", "2", *more], tmp_path)
    counts = {line["updates"] for line in lines if line["step"]}
    assert counts == {updates} if updates else max(counts) < 4


def test_a_rollout_of_empty_questions(scripts, inputs, tmp_path):
    """The end of sequence and nothing else: a question of no words, which earns next to nothing, and no NaN."""
    for line in logged(scripts, command("ppo", inputs), tmp_path, patch="patches:all_end_at_once")[1:]:
        assert line["length"] == 1 and line["eos_rate"] == 1 and line["objective/scores"] < 0.05
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {sample["question"] for sample in samples} == {""}


# --- more tokens than the model has positions


@pytest.mark.parametrize(
    ("case", "more", "named"),
    [
        ("sft", [], "rows.jsonl row "),
        ("dpo", [], "pairs.jsonl row "),
        ("ppo", ["--max-prompt-tokens", "145"], "--max-prompt-tokens and --max-new-tokens: 151 tokens"),
    ],
)
def test_more_tokens_than_positions(case, more, named, scripts, inputs, tmp_path):
    short = write(tmp_path / "short", "llama", max_position_embeddings=150)  # a prompt here takes about 140
    complained = stopped(scripts, [*command(case, inputs), "--model", short, *more], tmp_path)
    assert named in complained and "the model's max_position_embeddings is 150" in complained
    assert not (tmp_path / "out").exists()


# --- numbers that are not finite


@pytest.mark.parametrize("case", ["sft", "dpo"])
def test_the_row_that_gives_nan_is_named(case, scripts, inputs, tmp_path):
    """A model that is NaN on one text: the run stops before the weights change, and names that text's row."""
    own = edited(inputs, tmp_path, lambda text: text.replace("that bikes are", "that \u2603 bikes are"))
    poisoned = write(tmp_path / "poisoned", "llama")
    weights = load_file(f"{poisoned}/model.safetensors")
    weights["model.embed_tokens.weight"][plain_ids(load_tokenizer("tiny"), "\u2603")[-1]] = math.nan
    save_file(weights, f"{poisoned}/model.safetensors", {"format": "pt"})
    complained = stopped(scripts, [*command(case, own), "--model", poisoned, "--batch-size", "8"], tmp_path)
    assert complained.startswith(f"error: {case} step ")
    assert ": loss is nan, gradient norm is nan; this step was not taken; " in complained
    lines = {f"{own / ('rows.jsonl' if case == 'sft' else 'pairs.jsonl')} row {n}" for n in (11, 12)}
    assert any(line in complained for line in lines)


REWARDS = """
calls = []
def once_nan(contexts, questions, types):
    calls.append(1)
    return [float("nan") if len(calls) == 3 else len(question) / 100 for question in questions]
def infinite(contexts, questions, types):
    return [float("inf")] * len(questions)
def huge(contexts, questions, types):
    return [3e38 * (-1) ** i for i, question in enumerate(questions)]
"""


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("once_nan", "ppo step 2: the sum of the scores is nan; "),  # call 1 evaluates, call 2 is step 1
        ("infinite", "ppo step 1: the sum of the scores is inf; "),
        ("huge", "ppo step 1: "),
    ],
)
def test_a_reward_that_is_not_finite(function, named, scripts, inputs, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    arguments = [*command("ppo", inputs), "--reward", f"rewards:{function}", "--kl-target", "0.1"]
    complained = stopped(scripts, arguments, tmp_path)
    assert complained.startswith(f"error: {named}")
    assert "rows.jsonl row " in complained and "asked for" in complained


def test_weights_that_run_away(scripts, inputs, tmp_path):
    """An absurd learning rate: the run stops in the step after, with one line, instead of training on NaN."""
    complained = stopped(scripts, [*command("sft", inputs), "--lr", "1e30", "--warmup", "0"], tmp_path)
    assert complained.startswith("error: sft step 2: ")
