"""Training on models small enough to know the answer: does each loss, followed downhill, do what its paper promises?"""

from itertools import pairwise
from math import exp, log

import pytest
import torch
from small import EOS, VOCABULARY, small_policy, small_rows

from socratiq import losses
from socratiq.batch import make_batch
from socratiq.policy import token_logprobs
from socratiq.sampling import sample


def close(actual, expected, tolerance):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------- SFT


@pytest.mark.parametrize("lora_rank", [0, 8], ids=["every-weight", "adapters"])
def test_sft_overfits_one_row(lora_rank):
    policy = small_policy(lora_rank=lora_rank)
    prompt, question = [1, 5, 7, 3], [8, 4, 9, 9, 6, EOS]
    batch = make_batch([prompt], [[question]])
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.02)
    history = []
    for _ in range(60):
        loss = losses.sft_loss(token_logprobs(policy, batch)["logprobs"], batch.mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] > 1 and history[-1] < 0.01
    assert sample(policy, [prompt], 1, max_new_tokens=10, eos_id=EOS, temperature=0) == [[question]]  # EOS and all


# ---------------------------------------------------------------------------------------------------------- DPO


def train_on_one_pair(kind, beta=0.5, lr=3e-5, steps=15):
    """Plain gradient descent on one pair: the reward margin beta * h before each step, and the loss."""
    policy = small_policy()
    batch = make_batch(*small_rows(samples=2, rows=1))
    reference = losses.sequence_logps(token_logprobs(policy, batch)["logprobs"], batch.mask).detach()
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=lr)
    margins, history = [], []
    for _ in range(steps):
        logps = losses.sequence_logps(token_logprobs(policy, batch)["logprobs"], batch.mask)
        loss, chosen, rejected = losses.dpo_loss(*logps.unbind(1), *reference.unbind(1), beta, kind=kind)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        margins.append((chosen - rejected).item())
        history.append(loss.item())
    return margins, history


def rises(numbers):
    return all(later > earlier for earlier, later in pairwise(numbers))


def test_dpo_on_one_pair_drives_the_margin_up_from_0():
    margins, history = train_on_one_pair("sigmoid")
    assert margins[0] == 0 and history[0] == pytest.approx(log(2))
    assert rises(margins) and rises(history[::-1])


def test_ipo_on_one_pair_drives_the_margin_to_one_half():
    margins, _ = train_on_one_pair("ipo")
    assert margins[0] == 0 and rises(margins[:5])
    assert margins[-1] == pytest.approx(0.5, abs=0.01)  # beta h = beta / (2 beta), and there it stays


def test_hinge_on_one_pair_stops_at_a_margin_of_one():
    margins, history = train_on_one_pair("hinge", lr=1e-4)
    assert margins[0] == 0 and rises(margins[:4])
    assert margins[-1] >= 1 and margins[-1] == margins[-2] and history[-1] == 0


# ---------------------------------------------------------------------------------------------------------- PPO

PROMPT, TARGET = [1, 5, 7, 3], 6  # the policy begins by answering 6 with a probability of 0.07


def bandit(kl_coef, steps=60, samples=64, lr=0.02, max_new_tokens=1, kl_target=None):
    """PPO where the reward is 1 if the target token appears. Returns the policy, and per step mean score and mean KL.

    The steps are those of train_ppo.py: rollout, score, shaped rewards, advantages, two epochs of clipped updates.
    """
    policy = small_policy(value_head=True)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=lr, eps=1e-5, weight_decay=0.0)
    control = losses.AdaptiveKL(kl_coef, kl_target or 1.0, horizon=2 * samples)
    mean_scores, kls = [], []
    for step in range(steps):
        completions = sample(policy, [PROMPT], samples, max_new_tokens, eos_id=EOS, seeds=[step])
        batch = make_batch([PROMPT], completions)
        scores = ((batch.tokens == TARGET) & batch.mask.bool()).any(-1).float()
        with torch.no_grad():
            if step == 0:
                policy.value_head.bias.fill_(scores.mean())
            old = token_logprobs(policy, batch)
            with policy.reference():
                reference = token_logprobs(policy, batch)["logprobs"]
        rewards = losses.shape_rewards(scores, old["logprobs"], reference, batch.mask, control.value)
        advantages, returns = losses.gae(rewards, old["values"], batch.mask, gamma=1.0, lam=0.95)
        advantages = losses.whiten(advantages, batch.mask)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        for _ in range(2):
            new = token_logprobs(policy, batch)
            policy_part, _ = losses.policy_loss(new["logprobs"], old["logprobs"], advantages, batch.mask, clip=0.2)
            value_part, _ = losses.value_loss(new["values"], old["values"], returns, batch.mask, clip=0.2)
            optimizer.zero_grad()
            (policy_part + 0.1 * value_part).backward()
            optimizer.step()
        kl = losses.kl_estimate(old["logprobs"], reference, "k1", batch.mask).sum(-1).mean()
        if kl_target:
            control.update(kl, samples)
        mean_scores.append(scores.mean().item())
        kls.append(kl.item())
    return policy, mean_scores, kls


def first_token(policy):
    """Probabilities of the first token of the answer by policy and reference, (V,) each: computed, not estimated."""
    batch = make_batch([PROMPT], [[[token] for token in range(VOCABULARY)]])
    with torch.no_grad():
        now = token_logprobs(policy, batch)["logprobs"].flatten().exp()
        with policy.reference():
            return now, token_logprobs(policy, batch)["logprobs"].flatten().exp()


@pytest.fixture(scope="module")
def trained():
    """kl_coef -> (probabilities by the trained policy, by the reference)."""
    return {kl_coef: first_token(bandit(kl_coef)[0]) for kl_coef in (0.0, 0.3, 1.0, 100.0)}


def test_ppo_goes_from_chance_to_certainty(trained):
    policy, reference = trained[0.0]
    assert reference[TARGET] < 0.1 and policy[TARGET] > 0.9


def test_ppo_under_a_kl_penalty_ends_at_the_policy_that_theory_predicts(trained):
    """The maximum of E[r] - c KL(pi, pi_ref) is pi(y) = pi_ref(y) exp(r(y) / c) / Z (Rafailov et al. 2023 eq. 4)."""
    for kl_coef in (0.3, 1.0, 100.0):  # at the last one the policy does not move
        policy, reference = trained[kl_coef]
        optimum = reference.clone()
        optimum[TARGET] *= exp(1 / kl_coef)
        optimum /= optimum.sum()
        close(policy, optimum, 0.05)


def test_ppo_finds_the_token_anywhere_in_a_longer_answer():
    """The score arrives at the end of up to four tokens, and GAE carries it back to the one that earned it."""
    _, scores, _ = bandit(kl_coef=0.01, max_new_tokens=4)
    assert scores[0] < 0.4 and min(scores[-5:]) > 0.9


def test_adaptive_kl_coef_brings_the_kl_back_to_its_target():
    _, _, free = bandit(kl_coef=0.1)
    _, _, steered = bandit(kl_coef=0.1, steps=80, lr=0.01, kl_target=0.5)  # at 0.02 it is sure before the price rises
    assert sum(free[-10:]) / 10 > 2
    assert 0.1 < sum(steered[-10:]) / 10 < 1
