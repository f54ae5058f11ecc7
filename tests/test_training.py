"""The optimiser, the schedule, the order of rows, and what becomes of numbers that are not finite."""

import math

import pytest
import torch
from small import small_policy, small_rows

from socratiq import training
from socratiq.batch import make_batch
from socratiq.losses import sft_loss
from socratiq.policy import token_logprobs
from socratiq.run.errors import UserError

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
