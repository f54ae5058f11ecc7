"""The theory, chapter by chapter: `pytest tests/test_losses.py -v` prints its table of contents.

Every number is worked out by hand in the comment beside it and held to 1e-6 in float64: values and gradients.
Identities carry their name. The last chapters hold for all functions at once: values outside the mask never matter,
padding and order of rows change nothing, and every gradient agrees with central differences.

`python tests/mutants.py` plants one error at a time in losses.py and counts how many of them this file notices.
"""

from math import exp, inf, log, nan, sqrt
from pathlib import Path
from types import SimpleNamespace

import mutants
import pytest
import torch

from socratiq import losses
from socratiq.losses import (
    AdaptiveKL,
    dpo_loss,
    entropy,
    explained_variance,
    gae,
    gather_logprobs,
    kl_estimate,
    masked_mean,
    masked_var,
    missing_eos_penalty,
    policy_loss,
    rloo,
    sequence_logps,
    sft_loss,
    shape_rewards,
    value_loss,
    whiten,
)

LN2 = log(2)


def vector(*values):
    """A float64 tensor that asks for its gradient."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(actual, expected, tolerance=1e-6):
    """Equal shapes, and equal values to 1e-6."""
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert torch.allclose(actual, expected, rtol=0, atol=tolerance), f"{actual} is not {expected}"


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def gradient(output, *inputs):
    """d output / d input, zeros where nothing arrives; a vector of outputs is summed first."""
    grads = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    return grads[0] if len(inputs) == 1 else grads


class TestMaskedMean:
    x, mask = vector(1, 2, 6, 100), torch.tensor([1, 1, 1, 0])

    def test_is_the_mean_of_the_masked_slots(self):
        mean = masked_mean(self.x, self.mask)
        close(mean, 3)  # (1 + 2 + 6) / 3
        close(gradient(mean, self.x), [1 / 3, 1 / 3, 1 / 3, 0])

    def test_weighs_tokens_alike_not_rows(self):
        x, mask = vector([1, 2, 3], [10, 0, 0]), torch.tensor([[1, 1, 1], [1, 0, 0]])
        close(masked_mean(x, mask), 4)  # (1 + 2 + 3 + 10) / 4; the mean of the row means would be (2 + 10) / 2 = 6

    def test_divides_by_the_total_it_is_given(self):
        close(masked_mean(self.x, self.mask, total=18), 0.5)  # 9 / 18
        close(masked_mean(self.x, self.mask, total=torch.tensor(18)), 0.5)
        close(masked_mean(self.x, self.mask, total=0.5), 18)  # averaging over devices may leave half a token


class TestMaskedVariance:
    def test_divides_by_n_minus_one(self):
        x = vector(2, 4, 9, 100)
        variance = masked_var(x, torch.tensor([1, 1, 1, 0]))
        close(variance, 13)  # mean 5: (9 + 1 + 16) / 2
        close(gradient(variance, x), [-3, -1, 4, 0])  # 2 (x - mean) / 2
        close(masked_var(x, torch.tensor([0, 1, 0, 0])), 0)  # of one slot


class TestWhitening:
    x, mask = vector(2, 4, 6, 100), torch.tensor([1, 1, 1, 0])

    def test_subtracts_the_mean_and_divides_by_the_deviation(self):
        white = whiten(self.x, self.mask)
        close(white, [-1, 0, 1, 0])  # mean 4, variance (4 + 0 + 4) / 2 = 4, deviation 2
        # d white_3 / d x_j = (1[j = 3] - 1/3) / 2 - (x_3 - 4)(x_j - 4) / (2 * 2^3)
        close(gradient(white[2], self.x), [-1 / 6 + 1 / 4, -1 / 6, 1 / 3 - 1 / 4, 0])

    def test_can_change_the_scale_alone(self):
        close(whiten(self.x, self.mask, shift_mean=False), [1, 2, 3, 0])  # deviation 2

    def test_has_an_epsilon_of_1e_8_under_the_root(self):
        white = whiten(vector(1e-4, 2e-4, 3e-4, 9), self.mask)  # variance 1e-8, and 1e-8 more
        close(white, [-1 / sqrt(2), 0, 1 / sqrt(2), 0])


class TestGatherLogprobs:
    def test_is_the_log_of_the_softmax_at_the_token(self):
        logits = vector([log(1), log(2), log(3)], [log(4), log(1), log(5)])  # softmax 1/6, 1/3, 1/2; 4/10, 1/10, 5/10
        logprobs = gather_logprobs(logits, torch.tensor([2, 0]))  # each token at its own position
        close(logprobs, [log(1 / 2), log(4 / 10)])
        close(gradient(logprobs, logits), [[-1 / 6, -1 / 3, 1 - 1 / 2], [1 - 4 / 10, -1 / 10, -5 / 10]])  # 1[v = y] - p

    def test_shares_logits_or_tokens_among_rows(self):
        logits, tokens = randn(2, 3, 7), torch.tensor([[1, 6, 0], [2, 2, 5]])
        close(gather_logprobs(logits[0], tokens)[1], gather_logprobs(logits[0], tokens[1]))
        close(gather_logprobs(logits, tokens[0])[1], gather_logprobs(logits[1], tokens[0]))

    def test_does_not_notice_a_constant_added_to_the_logits(self):
        logits, tokens = randn(5, 7), torch.randint(7, (5,))
        close(gather_logprobs(logits + 1e4, tokens), gather_logprobs(logits, tokens))  # and exp(1e4) does not overflow

    def test_allows_forbidden_tokens(self):
        logits = vector([0, 0, -inf])
        logprob = gather_logprobs(logits, torch.tensor([0]))
        close(logprob, [-LN2])
        close(gradient(logprob, logits), [[1 / 2, -1 / 2, 0]])

    def test_a_broken_position_breaks_no_other(self):
        logits = vector([nan, 1], [0, 0])
        loss = sft_loss(gather_logprobs(logits, torch.tensor([0, 0])), torch.tensor([0, 1]))
        close(loss, LN2)
        close(gradient(loss, logits)[1], [-1 / 2, 1 / 2])


class TestSequenceLogps:
    logprobs, mask = vector([-1, -2, -4], [-8, -16, -32]), torch.tensor([[1, 1, 1], [1, 1, 0]])

    def test_sum_the_tokens_of_a_completion(self):
        close(sequence_logps(self.logprobs, self.mask), [-7, -24])
        close(gradient(sequence_logps(self.logprobs, self.mask), self.logprobs), [[1, 1, 1], [1, 1, 0]])

    def test_can_average_instead(self):
        close(sequence_logps(self.logprobs, self.mask, average=True), [-7 / 3, -12])


class TestEntropy:
    def test_of_a_uniform_distribution_is_the_log_of_its_size(self):
        close(entropy(torch.zeros(2, 3, 4)), [[log(4)] * 3] * 2)

    def test_of_one_half_and_two_quarters(self):
        logits = vector([log(2), log(1), log(1)])
        h = entropy(logits)
        close(h, [1.5 * LN2])  # 1/2 ln 2 + 1/4 ln 4 + 1/4 ln 4
        # - p (ln p + H): - 1/2 (- ln 2 + 1.5 ln 2) and - 1/4 (- 2 ln 2 + 1.5 ln 2)
        close(gradient(h, logits), [[-0.25 * LN2, 0.125 * LN2, 0.125 * LN2]])

    def test_of_a_certain_token_is_zero(self):
        logits = vector([0, -inf, -inf])
        close(entropy(logits), [0])
        close(gradient(entropy(logits), logits), [[0, 0, 0]])


class TestSFT:
    def test_loss_is_minus_the_mean_log_probability(self):
        logprobs = vector(log(1 / 2), log(1 / 4), log(1 / 8))
        loss = sft_loss(logprobs, torch.tensor([1, 1, 0]))
        close(loss, 1.5 * LN2)  # (ln 2 + 2 ln 2) / 2
        close(loss.exp(), sqrt(8))  # the perplexity: the geometric mean of 2 and 4
        close(gradient(loss, logprobs), [-1 / 2, -1 / 2, 0])
        window = sft_loss(logprobs, torch.ones(3), total=12)  # the tokens of the whole accumulation window
        close(window, 0.5 * LN2)  # (1 + 2 + 3) ln 2 / 12
        close(gradient(window, logprobs), [-1 / 12] * 3)

    def test_loss_with_uniform_logits_over_4_tokens_is_ln_4(self):
        logits = torch.zeros(2, 3, 4)
        close(sft_loss(gather_logprobs(logits, torch.ones(2, 3, dtype=torch.long)), torch.ones(2, 3)), log(4))

    def test_gradient_on_the_logits_is_softmax_minus_one_hot_over_n(self):
        logits = vector([log(1), log(3)], [log(1), log(1)])
        loss = sft_loss(gather_logprobs(logits, torch.tensor([0, 1])), torch.ones(2))
        close(loss, (log(4) + log(2)) / 2)
        close(gradient(loss, logits), [[(1 / 4 - 1) / 2, (3 / 4) / 2], [(1 / 2) / 2, (1 / 2 - 1) / 2]])


class TestDPO:
    """One pair: the chosen gained 2 nats on the reference and the rejected lost 1, so h = 2 - (-1) = 3."""

    pair = vector(-10), vector(-11), vector(-12), vector(-10)

    @pytest.mark.parametrize(
        ("kind", "smoothing", "loss", "gradient_on_chosen"),
        [
            # - log sigmoid(0.1 * 3) = 0.554355, and - beta sigmoid(- beta h) = - 0.0425557
            ("sigmoid", 0, log(1 + exp(-0.3)), -0.1 / (1 + exp(0.3))),
            # 0.8 * 0.554355 + 0.2 * 0.854355, and - beta (sigmoid(- beta h) - e)
            ("sigmoid", 0.2, 0.8 * log(1 + exp(-0.3)) + 0.2 * log(1 + exp(0.3)), -0.1 * (1 / (1 + exp(0.3)) - 0.2)),
            ("ipo", 0, 4, -4),  # (3 - 1 / (2 * 0.1))^2 = (3 - 5)^2, and 2 (3 - 5)
            ("hinge", 0, 0.7, -0.1),  # 1 - 0.1 * 3
        ],
        ids=["sigmoid", "label_smoothing", "ipo", "hinge"],
    )
    def test_loss_by_hand(self, kind, smoothing, loss, gradient_on_chosen):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        actual, chosen_rewards, rejected_rewards = dpo_loss(*self.pair, 0.1, smoothing, kind)
        close(actual, [loss])
        close(gradient(actual, chosen), [gradient_on_chosen])
        close(gradient(actual, rejected), [-gradient_on_chosen])
        for reference_gradient in gradient(actual, ref_chosen, ref_rejected):
            close(reference_gradient, [0])
        close(chosen_rewards, [0.2])  # 0.1 * (-10 + 12)
        close(rejected_rewards, [-0.1])  # 0.1 * (-11 + 10)
        assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad

    @pytest.mark.parametrize(
        ("kind", "smoothing", "h", "loss", "gradient_on_chosen"),
        [
            ("sigmoid", 0, log(3) / 0.1, 0.2876821, -0.1 / 4),  # - log sigmoid(ln 3) = - ln (3/4)
            ("sigmoid", 0, -1e4, 1e3, -0.1),  # log sigmoid, not log of sigmoid, which would be - inf
            ("sigmoid", 0.1, log(9) / 0.1, -0.9 * log(0.9) - 0.1 * log(0.1), 0),  # sigmoid(beta h) = 1 - e: at rest
            ("ipo", 0, 5, 0, 0),  # h = 1 / (2 beta), its margin: at rest
            ("hinge", 0, 20, 0, 0),  # beta h = 2 > 1: at rest
        ],
    )
    def test_loss_at_a_logit(self, kind, smoothing, h, loss, gradient_on_chosen):
        chosen, zero = vector(h), vector(0)
        actual, _, _ = dpo_loss(chosen, zero, zero, zero, 0.1, smoothing, kind)
        close(actual, [loss])
        close(gradient(actual, chosen), [gradient_on_chosen])

    @pytest.mark.parametrize(("kind", "loss"), [("sigmoid", LN2), ("ipo", 25), ("hinge", 1)])  # ipo: 1 / (4 beta^2)
    def test_first_loss_is_ln_2_and_for_ipo_25_and_for_hinge_1(self, kind, loss):
        logps = randn(5), randn(5)
        losses, chosen_rewards, rejected_rewards = dpo_loss(*logps, *logps, beta=0.1, kind=kind)  # policy = reference
        close(losses, [loss] * 5)
        close(chosen_rewards, [0] * 5)
        close(rejected_rewards, [0] * 5)

    def test_of_rewards_and_a_reference_of_zero_is_the_bradley_terry_loss_of_a_reward_model(self):
        chosen, rejected, zero = vector(2, 0), vector(1, 2), torch.zeros(2)
        loss, _, _ = dpo_loss(chosen, rejected, zero, zero, beta=1)
        close(loss, -torch.sigmoid(chosen - rejected).log())
        close(loss, [log(1 + exp(-1)), log(1 + exp(2))])  # r_w - r_l = 1 and -2
        close(gradient(loss, chosen), [-1 / (1 + exp(1)), -1 / (1 + exp(-2))])  # - P(rejected beats chosen)

    def test_is_antisymmetric_in_chosen_and_rejected(self):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        swapped = rejected, chosen, ref_rejected, ref_chosen
        (loss, up, down), (swapped_loss, *swapped_rewards) = dpo_loss(*self.pair, 0.1), dpo_loss(*swapped, 0.1)
        close(swapped_loss - loss, [0.3])  # log sigmoid(z) - log sigmoid(-z) = z: the logit has changed its sign
        close(torch.stack(swapped_rewards), torch.stack([down, up]))
        # Smoothed by e is swapped and smoothed by 1 - e.
        close(dpo_loss(*self.pair, 0.1, label_smoothing=0.2)[0], dpo_loss(*swapped, 0.1, label_smoothing=0.8)[0])

    @pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
    def test_beta_scales_the_logit(self, kind):
        stretched = [logps * 5 for logps in self.pair]
        close(dpo_loss(*self.pair, beta=0.5, kind=kind)[0], dpo_loss(*stretched, beta=0.1, kind=kind)[0])

    def test_names_the_kinds_it_knows(self):
        with pytest.raises(ValueError, match="'sigmoid', 'ipo' and 'hinge', not 'kto'"):
            dpo_loss(*self.pair, beta=0.1, kind="kto")


class TestKL:
    @pytest.mark.parametrize(
        ("kind", "of_ln_2", "of_minus_ln_2", "gradient_at_ln_2"),
        [
            ("k1", LN2, -LN2, 1),  # 0.693; a single sample of k1 may be negative
            ("k2", LN2**2 / 2, LN2**2 / 2, LN2),  # 0.240; d
            ("k3", 1 / 2 - 1 + LN2, 2 - 1 - LN2, 1 / 2),  # 0.193; 1 - exp(-d)
        ],
    )
    def test_of_a_log_ratio_of_ln_2(self, kind, of_ln_2, of_minus_ln_2, gradient_at_ln_2):
        logprobs, ref = vector(log(1 / 2)), vector(log(1 / 4))
        kl = kl_estimate(logprobs, ref, kind)
        close(kl, [of_ln_2])
        close(kl_estimate(ref, logprobs, kind), [of_minus_ln_2])
        close(gradient(kl, logprobs), [gradient_at_ln_2])
        close(gradient(kl, ref), [-gradient_at_ln_2])

    @pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
    def test_of_a_policy_against_itself_is_zero_and_k2_and_k3_are_never_negative(self, kind):
        d = torch.linspace(-5, 5, 1001).double()
        close(kl_estimate(d, d, kind), torch.zeros(1001))
        assert (kl_estimate(d, torch.zeros(()), kind) >= 0).all() == (kind != "k1")

    def test_k1_and_k3_are_unbiased_and_k2_agrees_to_second_order(self):
        p, direction = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.1, 0.1, -0.2]).double()
        for step in (1, 1e-1, 1e-2):
            q = p + step * direction
            k1, k2, k3 = ((p * kl_estimate(p.log(), q.log(), kind)).sum() for kind in ("k1", "k2", "k3"))
            kl = (p * (p / q).log()).sum()  # about 0.07 step^2
            close(torch.stack([k1, k3]), [kl, kl], tolerance=1e-12)
            assert abs(k2 - kl) < 0.02 * step**3

    def test_k1_as_a_loss_teaches_nothing_and_k2_teaches_kl(self):
        # E[grad k1] = E[grad log p] = 0 whatever q is, while E[d grad d] = grad KL: why k1 stands in the reward.
        logits, q = vector(0.3, -0.2, 1.0), torch.tensor([0.5, 0.3, 0.2]).double()
        logp = logits.log_softmax(-1)
        p = logp.exp()
        close(gradient(p.detach() * kl_estimate(logp, q.log(), "k1"), logits), [0, 0, 0])
        close(gradient(p.detach() * kl_estimate(logp, q.log(), "k2"), logits), gradient(p * (logp - q.log()), logits))

    def test_k3_keeps_its_digits_near_zero(self):
        close(kl_estimate(vector(1e-9), vector(0), "k3") * 2e18, [1], tolerance=1e-3)  # d^2 / 2 = 5e-19

    def test_is_zero_outside_a_mask(self):
        d, mask = vector(LN2, LN2), torch.tensor([1, 0])
        close(kl_estimate(d, vector(0, 0), mask=mask), [LN2, 0])  # k1 is the default
        close(kl_estimate(d, vector(0, 0), "k3", mask), [LN2 - 1 / 2, 0])

    def test_names_the_kinds_it_knows(self):
        with pytest.raises(ValueError, match="'k1', 'k2' and 'k3', not 'k4'"):
            kl_estimate(vector(0), vector(0), "k4")


class TestAdaptiveKL:
    """Target 6 nats, 256 completions an update, horizon 10,000: full error of 0.2 moves the coefficient by 0.512%."""

    @pytest.mark.parametrize(
        ("kl", "error"),
        [(6.0, 0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2)],  # the last two are clipped, from 9 and -1
    )
    def test_moves_the_coefficient_by_the_clipped_error(self, kl, error):
        control = AdaptiveKL(0.2, target=6, horizon=10_000)
        close(control.update(torch.tensor(kl), samples=256), 0.2 * (1 + error * 256 / 10_000))

    def test_goes_on_from_where_it_was(self):
        controller = AdaptiveKL(0.2, target=6, horizon=100)
        controller.update(60, samples=50)  # 0.2 * (1 + 0.2 * 50 / 100) = 0.22
        close(controller.update(60, samples=50), 0.242)
        close(controller.value, 0.242)


class TestMissingEOS:
    def test_is_penalised_and_looked_for_in_the_completion_only(self):
        tokens = torch.tensor([[5, 6, 2], [5, 6, 7], [5, 6, 2]])  # 2 is EOS
        mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]])  # the last row was cut off and then padded with EOS
        scores = missing_eos_penalty(vector(0.5, 0.5, 0.5), tokens, mask, eos_id=2, penalty=1.0)
        close(scores, [0.5, -0.5, -0.5])


class TestShapedRewards:
    """log pi - log pi_ref = 0.5, 0, -1 at a KL coefficient of 0.1: the KL costs -0.05, 0 and +0.1."""

    logprobs, ref = vector(-1, -2, -3), vector(-1.5, -2, -2)

    @pytest.mark.parametrize(
        ("score", "mask", "expected"),
        [
            (1, [1, 1, 1], [-0.05, 0, 1.1]),  # EOS carries the score
            (2, [1, 1, 0], [-0.05, 2, 0]),  # nothing after EOS is rewarded
            (1, [0, 1, 0], [0, 1, 0]),  # padding on the left takes no part
            (nan, [0, 0, 0], [0, 0, 0]),  # an empty completion gets none
        ],
    )
    def test_by_hand(self, score, mask, expected):
        close(shape_rewards(torch.tensor(score), self.logprobs, self.ref, torch.tensor(mask), kl_coef=0.1), expected)

    def test_add_up_to_score_minus_kl_of_the_completion(self):
        b = example()
        rewards = shape_rewards(b.scores, b.new, b.ref, b.mask, kl_coef=0.3)
        kl = sequence_logps(b.new, b.mask) - sequence_logps(b.ref, b.mask)
        close(rewards.sum(-1), torch.where(b.mask.any(-1), b.scores, 0) - 0.3 * kl)


class TestGAE:
    @pytest.mark.parametrize(
        ("rewards", "values", "gamma", "lam", "advantages", "returns"),
        [
            # backwards: delta = 1 - 0.5, 0.5 - 0.5, 0.5 - 0.5;   A = 0.5, 0 + 0.5 * 0.5, 0 + 0.5 * 0.25
            ([0, 0, 1], [0.5, 0.5, 0.5], 1, 0.5, [0.125, 0.25, 0.5], [0.625, 0.75, 1]),
            # delta_3 = 2 - 3 = -1;  delta_2 = 0 + 0.9 * 3 - 2 = 0.7;  delta_1 = 1 + 0.9 * 2 - 1 = 1.8
            # A_3 = -1;  A_2 = 0.7 + 0.45 * (-1) = 0.25;  A_1 = 1.8 + 0.45 * 0.25 = 1.9125
            ([1, 0, 2], [1, 2, 3], 0.9, 0.5, [1.9125, 0.25, -1], [2.9125, 2.25, 2]),
            # lambda = 1: returns 1 + 2/2 + 4/4, 2 + 4/2, 4, from which the values have cancelled out
            ([1, 2, 4], [0.3, 0.7, -0.2], 0.5, 1, [3 - 0.3, 4 - 0.7, 4 + 0.2], [3, 4, 4]),
            # lambda = 0: r_t + V_{t+1} / 2 - V_t, and the return is r_t + V_{t+1} / 2
            ([1, 2, 4], [0.3, 0.7, -0.2], 0.5, 0, [1.35 - 0.3, 1.9 - 0.7, 4 + 0.2], [1.35, 1.9, 4]),
            ([0, 0, 1], [0.25, 0.5, 1], 0.5, 0.7, [0, 0, 0], [0.25, 0.5, 1]),  # the values foresee everything
            ([0, 0, 3], [0, 0, 0], 1, 1, [3, 3, 3], [3, 3, 3]),  # without values the score reaches every token
        ],
        ids=["reward_at_the_end", "discount", "monte_carlo", "td_error", "perfect_values", "no_values"],
    )
    def test_by_hand(self, rewards, values, gamma, lam, advantages, returns):
        results = gae(vector(*rewards), vector(*values), torch.ones(3), gamma, lam)
        close(torch.stack(results), [advantages, returns])

    def test_is_the_discounted_sum_of_td_errors_on_the_tokens_alone(self):
        b, gamma, lam = example(), 0.9, 0.8
        advantages, returns = gae(b.rewards, b.values, b.mask, gamma, lam)
        for row, here in enumerate(b.mask.bool()):  # eq. 16
            reward, value = b.rewards[row, here], b.values[row, here]
            delta = reward + gamma * torch.cat([value[1:], value.new_zeros(1)])[: len(value)] - value
            expected = [((gamma * lam) ** torch.arange(len(delta) - t) * delta[t:]).sum() for t in range(len(delta))]
            close(advantages[row, here], expected)
            close(returns[row, here] - value, expected)


class TestRLOO:
    @pytest.mark.parametrize(
        ("rewards", "mask", "advantages"),
        [
            ([[0, 0, 3], [1, -0.5, 0.5]], [[1, 1, 1], [1, 1, 1]], [[2, 2, 2], [-2, -2, -2]]),  # R = 3 and 1
            ([[1], [2], [6]], [[1], [1], [1]], [[-3], [-1.5], [4.5]]),  # the others' means are 4, 3.5, 1.5
            # R = 2 and 4: completions of different length keep their own tokens
            ([[1, 1, 9], [4, 9, 9]], [[1, 1, 0], [1, 0, 0]], [[-2, -2, 0], [2, 0, 0]]),
            ([[[3], [1]], [[10], [50]]], [[[1], [1]], [[1], [1]]], [[[2], [-2]], [[-40], [40]]]),  # prompts do not mix
        ],
        ids=["two_samples", "three_samples", "lengths", "two_prompts"],
    )
    def test_by_hand(self, rewards, mask, advantages):
        close(rloo(vector(*rewards), torch.tensor(mask)), advantages)

    def test_gives_the_gradient_of_the_expected_reward(self):
        # Over all pairs of samples from p: E[mean_k A_k grad log p(y_k)] = grad E[R], by central differences.
        logits, reward, estimate = vector(0.3, -0.2, 1.0), torch.tensor([1.0, -2.0, 0.5]).double(), 0.0
        logp = logits.log_softmax(-1)
        for pair in torch.cartesian_prod(torch.arange(3), torch.arange(3)):
            advantages = rloo(reward[pair, None], torch.ones(2, 1))[:, 0]
            estimate = estimate + logp[pair].sum().exp().detach() * (advantages * logp[pair]).mean()
        by_differences = [
            ((logits + step).softmax(-1) - (logits - step).softmax(-1)) @ reward / 2e-4 for step in 1e-4 * torch.eye(3)
        ]
        close(gradient(estimate, logits), torch.stack(by_differences).detach())

    @pytest.mark.parametrize("shape", [(1, 3), (2, 1, 3), (3,)])
    def test_refuses_a_single_sample(self, shape):
        with pytest.raises(ValueError, match="K >= 2"):
            rloo(torch.ones(shape), torch.ones(shape))


class TestPolicyLoss:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "gradient_on_logprob", "clipped"),
        [
            (1.1, 1, -1.1, -1.1, 0),  # inside the range: - A ratio, and d ratio / d log pi = ratio
            (0.9, -1, 0.9, 0.9, 0),
            (1.5, 1, -1.2, 0, 1),  # has moved far enough the right way: no more credit, no gradient
            (0.5, -1, 0.8, 0, 1),
            (0.5, 1, -0.5, -0.5, 0),  # has moved far the wrong way: the max lets the full gradient through
            (1.5, -1, 1.5, 1.5, 0),
        ],
    )
    def test_by_hand_at_clip_0_2(self, ratio, advantage, loss, gradient_on_logprob, clipped):
        new, old = vector(log(ratio) - 3), vector(-3)
        actual, clipfrac = policy_loss(new, old, vector(advantage), torch.ones(1), clip=0.2)
        close(actual, loss)
        close(gradient(actual, new), [gradient_on_logprob])
        close(clipfrac, clipped)

    def test_averages_over_tokens_or_over_those_of_the_window(self):
        new, old = vector([log(1.1), log(1.5)], [log(0.5), 9]), torch.zeros(2, 2)
        advantages, mask = vector([2, 1], [-3, 9]), torch.tensor([[1, 1], [1, 0]])
        for total, tokens in ((None, 3), (8, 8)):
            loss, clipfrac = policy_loss(new, old, advantages, mask, clip=0.2, total=total)
            close(loss, (-2.2 - 1.2 + 2.4) / tokens)  # -2 * 1.1, -1 * 1.2, 3 * 0.8
            close(clipfrac, 2 / tokens)
            close(gradient(loss, new), [[-2.2 / tokens, 0], [0, 0]])

    def test_first_pass_has_ratio_1_and_loss_minus_mean_advantage(self):
        b = example()
        new = b.new.clone().requires_grad_()
        loss, clipfrac = policy_loss(new, b.new, b.advantages, b.mask, clip=0.2)
        close(loss, -masked_mean(b.advantages, b.mask))
        close(clipfrac, 0)
        close(gradient(loss, new), -b.advantages * b.mask / b.mask.sum())  # the policy gradient: - A grad log pi


class TestValueLoss:
    @pytest.mark.parametrize(
        ("value", "old", "target", "loss", "gradient_on_value", "clipped"),
        [
            (1.3, 1, 2, 0.245, -0.7, 0),  # inside the range: (1.3 - 2)^2 / 2
            (2, 1, 3, 1.125, 0, 1),  # V_clip = 1.5: max(1, 2.25) / 2, and V_clip no longer moves with V
            (2, 1, 0, 2, 2, 0),  # the wrong way: max(4, 2.25) / 2
            (0, 1, -1, 1.125, 0, 1),  # V_clip = 0.5: max(1, 2.25) / 2
            (0, 1, 2, 2, -2, 0),  # the wrong way: max(4, 2.25) / 2
        ],
    )
    def test_by_hand_at_clip_0_5(self, value, old, target, loss, gradient_on_value, clipped):
        values = vector(value)
        actual, clipfrac = value_loss(values, vector(old), vector(target), torch.ones(1), clip=0.5)
        close(actual, loss)
        close(gradient(actual, values), [gradient_on_value])
        close(clipfrac, clipped)

    def test_averages_over_tokens_or_over_those_of_the_window(self):
        values, old = vector([1.3, 2], [2, 9]), torch.ones(2, 2)
        returns, mask = vector([2, 3], [0, 9]), torch.tensor([[1, 1], [1, 0]])
        for total, tokens in ((None, 3), (8, 8)):
            loss, clipfrac = value_loss(values, old, returns, mask, clip=0.5, total=total)
            close(loss, (0.245 + 1.125 + 2) / tokens)
            close(clipfrac, 1 / tokens)
            close(gradient(loss, values), [[-0.7 / tokens, 0], [2 / tokens, 0]])

    def test_rounding_is_no_clip(self):
        old = 0.1 * torch.randn(1000)  # in float32, old + (new - old) is not quite new
        new, returns = old + 0.4 * torch.rand(1000) - 0.2, torch.randn(1000)
        _, clipfrac = value_loss(new, old, returns, torch.ones(1000), clip=0.21)
        close(clipfrac, 0)


class TestExplainedVariance:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([1, 2, 3, 0], 1),  # the returns
            ([11, 12, 13, 0], 1),  # a constant error goes unnoticed
            ([5, 5, 5, 0], 0),  # a constant
            ([3, 2, 1, 0], -3),  # misleading: R - V = -2, 0, 2: 1 - 4 / 1
            ([1, 2, 2, 0], 1 - 1 / 3),  # R - V = 0, 0, 1: variance 1/3, where R has variance 1
        ],
    )
    def test_by_hand(self, values, expected):
        close(explained_variance(vector(*values), vector(1, 2, 3, 50), torch.tensor([1, 1, 1, 0])), expected)

    def test_is_0_where_returns_do_not_vary(self):
        for constant in (0.0, 0.1, 1e6):  # 0.1 has no exact mean in float32: rounding must not look like variance
            returns = torch.full((7, 3), constant)
            close(explained_variance(torch.randn(7, 3), returns, torch.ones(7, 3)), 0)


# ------------------------------------------------------------------------ what holds for all functions with a mask


def ragged(rows, time):
    """A mask of contiguous completions: full, short, a single token, none, starting late ... one row each."""
    shapes = [(0, time), (0, time // 2), (0, 1), (1, 1), (time // 3, time), (1, time - 1)]
    mask = torch.zeros(rows, time, dtype=torch.float64)
    for row in range(rows):
        start, end = shapes[row % len(shapes)]
        mask[row, start:end] = 1
    return mask


PER_TOKEN = ("x", "new", "old", "ref", "values", "rewards", "advantages", "returns")


def example(rows=6, time=6, dtype=torch.float64):
    """Everything that the functions below take, at random: (rows, time) each, scores (rows,), the tokens' own total."""
    torch.manual_seed(0)
    b = SimpleNamespace(mask=ragged(rows, time).to(dtype))
    for name in PER_TOKEN:
        setattr(b, name, randn(rows, time).to(dtype))
    b.scores = randn(rows).to(dtype)
    b.tokens = torch.randint(5, (rows, time))
    b.total = None
    return b


FUNCTIONS = {
    "masked_mean": lambda b: masked_mean(b.x, b.mask, b.total),
    "masked_var": lambda b: masked_var(b.x, b.mask),
    "whiten": lambda b: whiten(b.x, b.mask),
    "whiten-keep-mean": lambda b: whiten(b.x, b.mask, shift_mean=False),
    "sequence_logps": lambda b: sequence_logps(b.new, b.mask),
    "sequence_logps-average": lambda b: sequence_logps(b.new, b.mask, average=True),
    "sft_loss": lambda b: sft_loss(b.new, b.mask, b.total),
    "kl_estimate-k1": lambda b: kl_estimate(b.new, b.ref, "k1", b.mask),
    "kl_estimate-k2": lambda b: kl_estimate(b.new, b.ref, "k2", b.mask),
    "kl_estimate-k3": lambda b: kl_estimate(b.new, b.ref, "k3", b.mask),
    "missing_eos_penalty": lambda b: missing_eos_penalty(b.scores, b.tokens, b.mask, 2, 1.0),
    "shape_rewards": lambda b: shape_rewards(b.scores, b.new, b.ref, b.mask, 0.1),
    "gae": lambda b: gae(b.rewards, b.values, b.mask, 0.9, 0.8),
    "rloo": lambda b: rloo(b.rewards, b.mask),  # all rows are completions of one prompt
    "policy_loss": lambda b: policy_loss(b.new, b.old, b.advantages, b.mask, 0.2, b.total),
    "value_loss": lambda b: value_loss(b.values, b.old, b.returns, b.mask, 0.2, b.total),
    "explained_variance": lambda b: explained_variance(b.values, b.returns, b.mask),
}
TOKENS = torch.tensor([0, 3, 1, 2, 3, 0])  # of six rows, whose six columns serve as vocabulary
WITHOUT_MASK = {
    "gather_logprobs": lambda b: gather_logprobs(b.x, TOKENS),
    "entropy": lambda b: entropy(b.x),
    "dpo_loss-sigmoid": lambda b: dpo_loss(b.new[0], b.new[1], b.ref[0], b.ref[1], 0.3)[0],
    "dpo_loss-smoothed": lambda b: dpo_loss(b.new[0], b.new[1], b.ref[0], b.ref[1], 0.3, 0.1)[0],
    "dpo_loss-ipo": lambda b: dpo_loss(b.new[0], b.new[1], b.ref[0], b.ref[1], 0.3, kind="ipo")[0],
    "dpo_loss-hinge": lambda b: dpo_loss(b.new[0], b.new[1], b.ref[0], b.ref[1], 0.3, kind="hinge")[0],
    "dpo_loss-from-tokens": lambda b: dpo_loss(*sequence_logps(b.new, b.mask)[:2], *b.ref[0, :2], 0.3)[0],
    "sft_loss-from-logits": lambda b: sft_loss(gather_logprobs(b.x, TOKENS), b.mask[0]),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_function_of_rows = pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "rloo"])


def results(name, b):
    """The function's results as a tuple, of one or of two."""
    out = {**FUNCTIONS, **WITHOUT_MASK}[name](b)
    return out if isinstance(out, tuple) else (out,)


def changed(b, change):
    """The same batch with `change` applied to every tensor."""
    return SimpleNamespace(**{name: change(x) if torch.is_tensor(x) else x for name, x in vars(b).items()})


def replaced(b, **columns):
    return SimpleNamespace(**{**vars(b), **columns})


@pytest.mark.parametrize("poison", [nan, inf, -inf, 1e30])
@every_function
def test_values_outside_the_mask_never_matter(name, poison):
    runs = []
    for filling in (0.0, poison):
        b = example()
        columns = {name: torch.where(b.mask.bool(), getattr(b, name), filling).requires_grad_() for name in PER_TOKEN}
        outputs = results(name, replaced(b, **columns))
        differentiable = [out.square().sum() for out in outputs if out.requires_grad]
        grads = gradient(torch.stack(differentiable), *columns.values()) if differentiable else ()
        runs.append((*outputs, *grads))
    for clean, poisoned in zip(*runs, strict=True):
        assert poisoned.isfinite().all()
        close(poisoned, clean)


@every_function
def test_extra_padding_changes_nothing(name):
    b, rows = example(), 6
    padded = changed(b, lambda x: x if x.dim() == 1 else torch.cat([x, x.new_zeros(rows, 3)], -1))
    for expected, actual in zip(results(name, b), results(name, padded), strict=True):
        if actual.shape[-1:] == (9,):  # one value per token: nothing may stand in the new padding
            close(actual[:, 6:], torch.zeros(rows, 3))
            actual = actual[:, :6]
        close(actual, expected)


@every_function
def test_batch_order_changes_nothing(name):
    b, order = example(), torch.tensor([3, 5, 0, 4, 1, 2])
    for expected, actual in zip(results(name, b), results(name, changed(b, lambda x: x[order])), strict=True):
        close(actual, expected if expected.dim() == 0 else expected[order])


@every_function_of_rows
def test_completions_may_stand_side_by_side_or_alone(name):
    """(B, K, T) and (T,) give what the same rows give as (B, T)."""
    b = example()
    packed = changed(b, lambda x: x.unflatten(0, (2, 3)))  # (6, T) -> (2, 3, T): two prompts with K = 3
    for expected, actual in zip(results(name, b), results(name, packed), strict=True):
        close(actual, expected if expected.dim() == 0 else expected.unflatten(0, (2, 3)))
    for row in (0, 1, 4):
        alone, kept = changed(b, lambda x, row=row: x[row]), changed(b, lambda x, row=row: x[row : row + 1])
        for expected, actual in zip(results(name, kept), results(name, alone), strict=True):
            close(actual, expected.reshape(actual.shape))


@every_function
def test_a_mask_may_be_boolean_or_integer_or_shared_by_all_rows(name):
    b = example()
    same_for_all = b.mask[1:2].expand(6, 6)
    for full, mask in ((b.mask, b.mask.bool()), (b.mask, b.mask.long()), (same_for_all, b.mask[1])):
        both = results(name, replaced(b, mask=full)), results(name, replaced(b, mask=mask))
        for expected, actual in zip(*both, strict=True):
            close(actual, expected)


@pytest.mark.parametrize("time", [6, 0])
@every_function
def test_a_batch_without_tokens_gives_zero(name, time):
    b = changed(replaced(example(), mask=torch.zeros(6, 6)), lambda x: x[..., :time] if x.dim() == 2 else x)
    for out in results(name, b):
        close(out, b.scores - 1 if name == "missing_eos_penalty" else torch.zeros(out.shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*FUNCTIONS, *WITHOUT_MASK])
def test_computes_in_float32_or_wider(name, dtype):
    b = example(dtype=dtype)
    exact = changed(b, lambda x: x.double() if x.is_floating_point() else x)
    for out, expected in zip(results(name, b), results(name, exact), strict=True):
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        close(out, expected, tolerance=2e-5)  # bfloat16 arithmetic would be off by 1e-2


LEARNS = {"policy_loss": "new", "value_loss": "values"}  # of these the loss has a gradient, in this input alone


@pytest.mark.parametrize("name", ["shape_rewards", "gae", "rloo", "explained_variance", *LEARNS])
def test_constants_of_the_update_get_no_gradient_and_inputs_stay(name):
    b = changed(example(), lambda x: x.requires_grad_() if x.is_floating_point() else x)
    before = changed(b, torch.clone)
    outputs = [out for out in results(name, b) if out.requires_grad]
    assert len(outputs) == (name in LEARNS)
    for column in PER_TOKEN:
        assert torch.equal(getattr(b, column), getattr(before, column))
        if outputs:
            assert gradient(outputs[0], getattr(b, column)).any() == (column == LEARNS[name])


@pytest.mark.parametrize("name", ["masked_mean", "sft_loss", "policy_loss", "value_loss"])
def test_accumulation_1x8_is_4x2_is_8x1(name):
    """Parts of a window, each divided by the tokens of the whole window, add up to one large batch."""
    b = changed(example(rows=8), lambda x: x.requires_grad_() if x.is_floating_point() else x)
    b.total = b.mask.sum().detach()
    in_one = torch.stack(results(name, replaced(b, total=None)))  # the loss, and the share of clipped tokens
    columns = [getattr(b, column) for column in PER_TOKEN]
    for sizes in ([8], [4, 4], [2] * 4, [1] * 8, [3, 3, 2]):  # the last one ends in a short batch
        rows = torch.arange(8).split(sizes)
        parts = [changed(b, lambda x, some=some: x[some] if x.dim() else x) for some in rows]
        accumulated = sum(torch.stack(results(name, part)) for part in parts)
        close(accumulated, in_one)
        close(torch.stack(gradient(accumulated, *columns)), torch.stack(gradient(in_one, *columns)))


# ------------------------------------------------------------------------------------ every gradient, once more

CONSTANT = ["missing_eos_penalty", "shape_rewards", "gae", "rloo", "explained_variance"]  # of the update: no gradient


@pytest.mark.parametrize("name", [name for name in (*FUNCTIONS, *WITHOUT_MASK) if name not in CONSTANT])
def test_gradient_agrees_with_central_differences(name):
    b = example()
    columns = {column: getattr(b, column).requires_grad_() for column in PER_TOKEN}
    output = results(name, b)[0]
    learnt = [column for column in PER_TOKEN if gradient(output, columns[column]).any()]
    assert learnt
    assert torch.autograd.gradcheck(
        lambda *inputs: results(name, replaced(b, **dict(zip(learnt, inputs, strict=True))))[0],
        [columns[column] for column in learnt],
    )


def test_every_mutant_can_be_planted():
    """The list of tests/mutants.py follows losses.py, word for word."""
    source = mutants.LOSSES.read_text()
    for function, texts in mutants.MUTANTS.items():
        for old, several in texts.items():
            assert source not in {mutants.mutate(source, function, old, new) for new in several}


def test_losses_import_nothing_but_torch():
    source = Path(losses.__file__).read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import torch", "import torch.nn.functional as F"]
