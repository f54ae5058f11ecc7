"""The folder of a run, the optimiser's state, the schedule, and what becomes of numbers that are not finite."""

import argparse
import json
import math

import pytest
import torch
from small import small_policy, small_rows, stir

from socratiq import training
from socratiq.batch import make_batch
from socratiq.losses import sft_loss
from socratiq.policy import token_logprobs
from socratiq.run.errors import UserError
from socratiq.run.folder import Run, fingerprint


def arguments(out, **more):
    given = {"out": str(out), "model": "tiny", "restart": False, "skip_nonfinite": 0, "checkpoint_every": 5, "lr": 0.1}
    return argparse.Namespace(**{**given, **more})


@pytest.fixture(autouse=True)
def handlers():
    """A run takes the signals of its process; give them back."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def new_run(out, **more):
    return Run(arguments(out, **more), "sft")


def some_updates(policy, optimizer, run, steps):
    """`steps` SFT updates on small rows; the losses."""
    prompts, completions = small_rows(rows=4)
    said = []
    for step in steps:
        batch = make_batch(prompts, completions)
        out = token_logprobs(policy, batch)
        loss = sft_loss(out["logprobs"], batch.mask)
        if "values" in out:
            loss = loss + sft_loss(out["values"] - 1, batch.mask).square()
        loss.backward()
        training.update(policy, optimizer, loss.item(), 0.01, 1.0, f"sft step {step}", [])
        said.append(loss.item())
    return said


# --- schedule, order, seeds


def test_the_learning_rate_rises_and_falls():
    rates = [training.learning_rate(step, 10, 2, 1.0) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert training.learning_rate(0, 1, 0, 1.0) == 1.0  # one step without warm-up
    assert training.learning_rate(0, 1, 1, 1.0) == 1.0  # one step, all of it warm-up


@pytest.mark.parametrize(("rows", "window"), [(10, 3), (3, 10), (1, 1), (4, 4)])
def test_an_epoch_has_every_row_once(rows, window):
    windows = training.epoch_windows(rows, window, seed=0, epoch=0)
    assert sorted(row for part in windows for row in part) == list(range(rows))
    assert all(len(part) == window for part in windows[:-1]) and 0 < len(windows[-1]) <= window
    assert windows == training.epoch_windows(rows, window, seed=0, epoch=0)


def test_seeds_depend_on_their_purpose_alone():
    seeds = {training.derive_seed(*purpose) for purpose in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 2)]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert training.derive_seed(0, "order", 3) == training.derive_seed(0, "order", 3)


def test_perplexity_of_a_hopeless_model_is_infinite_and_no_error():
    assert training.perplexity(math.log(3)) == pytest.approx(3)
    assert training.perplexity(1e6) == math.inf and math.isnan(training.perplexity(math.nan))


def test_the_memory_is_that_of_the_device(tmp_path, monkeypatch):
    """On a machine with a GPU, --device cpu computes, and takes memory, elsewhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    for device, there in (("cpu", False), ("auto", True), ("cuda", True)):
        run = new_run(tmp_path / device, device=device)
        run.load(policy := small_policy(), optimizer := torch.optim.AdamW(policy.trainable().values()))
        for step in run.steps(0, 1):
            run.end_step(step + 1, policy, optimizer, {}, {}, seconds=1.0, tokens=10)
        line = json.loads((tmp_path / device / "timings.jsonl").read_text())
        assert (line["peak_memory_mb"] == 5.0) == there and line["peak_memory_mb"] > 0


# --- the optimiser


def test_the_optimiser_is_adamw_without_weight_decay():
    optimizer = training.make_optimizer(policy := small_policy(), 0.01, eps=1e-5)
    assert type(optimizer) is torch.optim.AdamW
    [group] = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.01, (0.9, 0.999), 1e-5, 0.0)
    assert all(a is b for a, b in zip(group["params"], policy.trainable().values(), strict=True))


def test_minibatches_cut_random_orders_of_all_rows():
    parts = training.minibatches(5, parts=2, passes=3, seed=0, step=4)
    assert [len(part) for part in parts] == [3, 2] * 3
    orders = [parts[i] + parts[i + 1] for i in (0, 2, 4)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and len({tuple(order) for order in orders}) == 3
    assert parts == training.minibatches(5, 2, 3, 0, 4) != training.minibatches(5, 2, 3, 0, 5)


def test_held_out_rows_are_drawn_by_the_seed_and_keep_their_order():
    drawn = [training.draw(list(range(100)), 10, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 10
    assert all(rows == sorted(rows) and rows != list(range(10)) for rows in drawn)
    assert training.draw([5, 3], 10, 0) == [5, 3]


def test_distinct_2_counts_pairs_of_neighbouring_words():
    assert training.distinct_2(["why is it so", "Why is it not"]) == pytest.approx(4 / 6)
    assert training.distinct_2(["why", ""]) == 0.0


# --- checkpoints


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_brings_everything_back(tmp_path, lora_rank, fused):
    """Weights, both moments and the step count of each parameter, in their types; the state; the logs' lengths."""

    def parts():
        policy = small_policy(lora_rank=lora_rank, value_head=True)
        optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.01, fused=fused)
        return policy, optimizer

    policy, optimizer = parts()
    run = new_run(tmp_path / "out")
    assert run.load(policy, optimizer) == {}
    first = some_updates(policy, optimizer, run, range(1, 4))
    run.log(3, loss=torch.tensor(0.1), bad=math.nan, worse=-math.inf, name="x", count=torch.tensor(2))
    state = {"step": 3, "kl_coef": 0.1 + 0.2, "history": [1 / 3], "nothing": None}
    run.save(policy, optimizer, state)
    run.log(4, loss=1.0)  # will be logged again
    then = some_updates(policy, optimizer, run, range(4, 6))

    again, second = parts()
    stir(again)
    resumed = new_run(tmp_path / "out")
    loaded = resumed.load(again, second)
    assert {name: loaded[name] for name in state} == state
    line = '{"step": 3, "loss": 0.1, "bad": null, "worse": null, "name": "x", "count": 2}\n'
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == line
    assert some_updates(again, second, resumed, range(4, 6)) == then and first[0] > then[-1]
    for one, other in zip(policy.trainable().values(), again.trainable().values(), strict=True):
        assert torch.equal(one, other)
        assert optimizer.state[one].keys() == second.state[other].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, second.state[other][key]), key
            assert (value.dtype, value.device) == (second.state[other][key].dtype, second.state[other][key].device)


def test_the_end_leaves_a_summary_and_no_checkpoint(tmp_path, capsys):
    policy = small_policy()
    optimizer = torch.optim.AdamW(policy.trainable().values())
    run = new_run(tmp_path / "out")
    run.load(policy, optimizer)
    run.save(policy, optimizer, {"step": 1})
    run.finish(steps=1, loss=torch.tensor(math.inf))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == {"steps": 1, "loss": None}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train_args.json", "summary.json"}
    assert new_run(tmp_path / "out").finished
    assert "is finished already" in capsys.readouterr().out


def test_arguments_of_another_version_do_not_count(tmp_path):
    run = new_run(tmp_path / "out", old=1)
    run.load(policy := small_policy(), torch.optim.AdamW(policy.trainable().values()))
    new_run(tmp_path / "out", new=2)
    with pytest.raises(UserError, match=r"--lr 0\.1, now it is 0\.2"):
        new_run(tmp_path / "out", old=1, lr=0.2)


# --- inputs


def test_fingerprints(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    assert fingerprint("model", str(model)) is None  # no model in it
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"a" * 1000)
    first = fingerprint("model", str(model))
    (model / "metrics.jsonl").write_text("says nothing of the model")
    (model / "checkpoint.safetensors").write_text("nor does this")
    assert fingerprint("model", str(model)) == first and len(first) == 16
    (model / "model.safetensors").write_bytes(b"a" * 999 + b"b")
    assert fingerprint("model", str(model)) != first
    assert fingerprint("model", "meta-llama/Llama-3.1-8B") is None
    assert fingerprint("data", "sample") is None and fingerprint("data", "socratiq") is None
    assert fingerprint("data", str(tmp_path / "missing.csv")) is None


def test_a_reward_is_known_by_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rewards.py").write_text("def wordy(contexts, questions, types): ...")
    first = fingerprint("reward", "mine.rewards:wordy")
    (tmp_path / "mine" / "rewards.py").write_text("def wordy(contexts, questions, types): return 1")
    assert first and fingerprint("reward", "mine.rewards:wordy") not in (first, None)
    assert fingerprint("reward", "installed_package:reward") is None


def test_of_large_weights_samples_are_read_up_to_the_end(tmp_path, monkeypatch):
    from socratiq.run import folder as run

    monkeypatch.setattr(run, "READ_WHOLE", 10_000)
    monkeypatch.setattr(run, "SAMPLES", 4)
    path = tmp_path / "model.safetensors"
    content = bytearray(100_000)
    seen = set()
    for place in (0, 99_999, 33_000):
        content[place] = 1
        path.write_bytes(content)
        seen.add(fingerprint("model", str(path)))
    assert len(seen) == 3
    content[20_000] = 1  # between two samples
    path.write_bytes(content)
    assert fingerprint("model", str(path)) in seen


# --- the update, and numbers that are not finite


def gradient_step(bad=None, clip=1.0):
    """A policy with the gradient of one SFT loss, stepped; its weights before and after, and its optimiser."""
    policy = small_policy()
    optimizer = training.make_optimizer(policy, 0.01)
    batch = make_batch(*small_rows(rows=4))
    logprobs = token_logprobs(policy, batch)["logprobs"]
    loss = sft_loss(logprobs, batch.mask)
    if bad == "loss":
        loss = loss * math.nan
    if bad == "gradient":  # sqrt has an infinite slope at 0, though a value
        loss = loss + torch.sqrt(logprobs.sum() * 0)
    loss.backward()
    gradients = [weight.grad.clone() for weight in policy.trainable().values()]
    before = [weight.detach().clone() for weight in policy.trainable().values()]
    rows = [f"rows.csv row {i}" for i in range(10)]

    def step():
        return training.update(policy, optimizer, loss.item(), 0.02, clip, "sft step 7", rows)

    return policy, optimizer, gradients, before, step


@pytest.mark.parametrize(
    ("bad", "named"), [("loss", "loss is nan, gradient norm is nan"), ("gradient", "gradient norm is ")]
)
def test_a_bad_number_never_reaches_the_weights(bad, named):
    policy, optimizer, _, before, step = gradient_step(bad)
    with pytest.raises(UserError) as error:
        step()
    message = str(error.value)
    assert message.startswith(f"sft step 7: {named}") and "\n" not in message
    assert "rows.csv row 0, " in message and "rows.csv row 7 and 2 more" in message
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable().values(), strict=True))
    assert not optimizer.state


def test_a_gradient_is_clipped_to_its_norm():
    norm = gradient_step()[4]()
    policy, optimizer, gradients, before, step = gradient_step(clip=norm / 3)
    assert norm == pytest.approx(math.sqrt(sum(float(x.square().sum()) for x in gradients)), rel=1e-5)
    assert step() == pytest.approx(norm, rel=1e-5)
    for weight, old, gradient in zip(policy.trainable().values(), before, gradients, strict=True):
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], 0.1 * gradient / 3, rtol=1e-3, atol=1e-7)
        assert weight.grad is None and (weight - old).abs().max() <= 0.02 * 1.01  # Adam's first step is the rate


def test_check_finite_says_nothing_of_finite_numbers():
    training.check_finite({"loss": 1e300, "norm": 0.0}, "dpo step 1", [])
