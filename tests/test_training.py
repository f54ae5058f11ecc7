"""The folder of a run, the optimiser's state, the schedule, and what becomes of numbers that are not finite."""

import argparse
import json
import math

import pytest
import torch
from safetensors.torch import load_file
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
        training.update(run, policy, optimizer, step, 0.01, loss.detach(), 1.0, [], None)
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


def test_the_optimiser_is_adamw_with_its_moments_made_beforehand():
    mine, plain = small_policy(), small_policy()
    optimizer = training.make_optimizer(mine, 0.01)
    theirs = torch.optim.AdamW(plain.trainable().values(), lr=0.01, weight_decay=0.0, fused=True)
    assert len(optimizer.state) == len(mine.trainable()) and not theirs.state
    for policy, own in ((mine, optimizer), (plain, theirs)):
        for step in range(3):
            for number, parameter in enumerate(policy.trainable().values()):
                draw = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            own.step()
    for one, other in zip(mine.trainable().values(), plain.trainable().values(), strict=True):
        assert torch.equal(one, other)
        assert optimizer.state[one].keys() == theirs.state[other].keys()
        for kind, value in theirs.state[other].items():
            assert torch.equal(optimizer.state[one][kind], value) and optimizer.state[one][kind].dtype == value.dtype


def test_a_device_without_foreach_kernels_clips_as_well(monkeypatch, tmp_path):
    """MPS has none; PyTorch takes the slower way by itself, if it is not told to take the faster one."""
    run, found = new_run(tmp_path / "out"), []
    for there in (True, False):
        for name in ("_device_has_foreach_support", "_has_foreach_support"):
            monkeypatch.setattr(torch.nn.utils.clip_grad, name, lambda *asked, there=there: there)
        policy = small_policy()
        for weight in policy.trainable().values():
            weight.grad = torch.ones_like(weight)
        plain = torch.optim.SGD(policy.trainable().values())
        found.append((training.update(run, policy, plain, 1, 0.1, 1.0, 0.5, [], None), policy))
    (norm, one), (other_norm, other) = found
    torch.testing.assert_close(norm, other_norm)
    for mine, theirs in zip(one.trainable().values(), other.trainable().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


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
    (tmp_path / "out" / "best.safetensors").write_text("")
    run.skipped = 2
    run.finish(steps=1, loss=torch.tensor(math.inf))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == {"steps": 1, "loss": None, "skipped": 2}
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


# --- numbers that are not finite


class Task:
    """A small policy, its optimiser with a history, and rows of which `bad` ones give a loss or gradient that is not
    finite."""

    def __init__(self, tmp_path, bad=(), kind="loss", skip=0):
        self.policy = small_policy()
        self.optimizer = torch.optim.AdamW(self.policy.trainable().values(), lr=0.01)
        self.run = new_run(tmp_path / "out", skip_nonfinite=skip)
        self.run.load(self.policy, self.optimizer)
        some_updates(self.policy, self.optimizer, self.run, [1])
        self.prompts, self.completions = small_rows(rows=4)
        self.bad, self.kind = bad, kind

    def loss(self, rows):
        batch = make_batch([self.prompts[i] for i in rows], [self.completions[i] for i in rows])
        logprobs = token_logprobs(self.policy, batch)["logprobs"]
        losses = -logprobs.sum((1, 2))
        for place, i in enumerate(rows):
            if i in self.bad and self.kind == "loss":
                losses = losses * torch.tensor([math.nan if k == place else 1.0 for k in range(len(rows))])
            if i in self.bad and self.kind == "gradient":  # sqrt has an infinite slope at 0, though a value
                losses = losses + torch.sqrt(logprobs[place].sum() * 0)
            if i in self.bad and self.kind == "sum":  # each is finite, both together are not
                losses = losses / losses.detach() * 2e38
        return losses.sum(), logprobs

    def alone(self, i):
        loss, logprobs = self.loss([i])
        return training.Suspect(f"row {i}", self.prompts[i], self.completions[i], {"logprobs": logprobs}, loss)

    def update(self, rows=(0, 1, 2, 3)):
        loss, _ = self.loss(list(rows))
        loss.backward()
        return training.update(
            self.run, self.policy, self.optimizer, 7, 0.01, loss.detach(), 1.0, list(rows), self.alone
        )

    def everything(self):
        """Weights and optimiser state, copied."""
        state = [
            {key: x.clone() for key, x in self.optimizer.state[p].items()} for p in self.policy.trainable().values()
        ]
        return [p.detach().clone() for p in self.policy.trainable().values()], state

    def untouched_since(self, before):
        after = self.everything()
        assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        for a, b in zip(before[1], after[1], strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
        assert all(parameter.grad is None for parameter in self.policy.parameters())


@pytest.mark.parametrize(
    ("kind", "bad", "named"),
    [
        ("loss", [2], "row 2: loss nan, gradient norm nan"),
        ("loss", [0, 3], "row 0, row 3: loss nan"),
        ("gradient", [1], "row 1: loss "),
        ("sum", [0, 1, 2, 3], "row 0, row 1, row 2 and 1 more: loss inf"),
    ],
)
def test_a_bad_number_never_reaches_the_weights(tmp_path, kind, bad, named):
    task = Task(tmp_path, bad, kind)
    before = task.everything()
    with pytest.raises(UserError) as error:
        task.update()
    message = str(error.value)
    assert f"sft step 7, {named}" in message and "\n" not in message
    assert "(logprobs -" in message and "nonfinite/step-7.safetensors" in message and "--skip-nonfinite" in message
    task.untouched_since(before)


def test_the_rows_at_fault_can_be_replayed(tmp_path):
    task = Task(tmp_path, [1, 3])
    with pytest.raises(UserError):
        task.update()
    rows = list(training.replay(tmp_path / "out" / "nonfinite" / "step-7.safetensors"))
    assert [name for name, _, _ in rows] == ["row 1", "row 3"]
    for i, (_, batch, tensors) in zip((1, 3), rows, strict=True):
        wanted = make_batch([task.prompts[i]], [task.completions[i]])
        assert torch.equal(batch.input_ids, wanted.input_ids) and torch.equal(batch.mask, wanted.mask)
        assert torch.equal(token_logprobs(task.policy, batch)["logprobs"], tensors["logprobs"])


def test_so_many_updates_may_be_skipped(tmp_path, capsys):
    task = Task(tmp_path, [2], skip=2)
    before = task.everything()
    assert task.update() is None and task.update() is None
    task.untouched_since(before)
    assert capsys.readouterr().err.count("; skipped\n") == 2
    assert task.update(rows=[0, 1]) is not None  # a good update in between changes the weights, not the count
    with pytest.raises(UserError, match="row 2"):
        task.update()
    task.run.save(task.policy, task.optimizer, {"step": 7})
    resumed = new_run(tmp_path / "out", skip_nonfinite=2)
    resumed.load(task.policy, task.optimizer)
    assert resumed.skipped == 3


def test_a_gradient_is_clipped_to_its_norm(tmp_path):
    task = Task(tmp_path)
    loss, _ = task.loss([0, 1, 2, 3])
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in task.policy.trainable().values()]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    before = task.everything()[1]
    clip = norm / 3
    said = training.update(task.run, task.policy, task.optimizer, 7, 0.01, loss.detach(), clip, [], None)
    assert said.item() == pytest.approx(norm, rel=1e-5)
    for gradient, old, new in zip(gradients, before, task.everything()[1], strict=True):
        moved = (new["exp_avg"] - 0.9 * old["exp_avg"]) / 0.1  # the gradient that Adam saw
        torch.testing.assert_close(moved, gradient / 3, rtol=1e-3, atol=1e-6)


def test_ranges_count_what_is_not_finite():
    assert training.span(torch.tensor([1.0, -2.0])) == "-2..1"
    assert training.span(torch.tensor([1.0, math.nan, math.inf])) == "1..1 and 2 not finite"
    assert training.span(torch.tensor([math.nan])) == "nan..nan and 1 not finite"
    assert training.span(torch.tensor([])) == "nan..nan"


def test_a_reward_that_is_not_finite_is_written_down_without_a_loss(tmp_path):
    run = new_run(tmp_path / "out")
    run.load(policy := small_policy(), torch.optim.AdamW(policy.trainable().values()))
    suspect = training.Suspect("row 1", [1, 5], [[4, 2], [2]], {"scores": torch.tensor([0.5, math.nan])})
    with pytest.raises(UserError, match="row 1: reward nan"):
        training.refuse(run, 3, "reward nan for 'Why?'", [suspect])
    file = tmp_path / "out" / "nonfinite" / "step-3.safetensors"
    assert load_file(file)["0.scores"][0] == 0.5
    [(_, batch, _)] = training.replay(file)
    assert batch.mask.shape == (1, 2, 2)
