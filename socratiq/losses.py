"""The formulas of the three losses as pure functions of tensors: no model, no tokenizer, no configuration.

Read it from top to bottom, in the order in which a training run uses the formulas:

    masks         masked_mean, masked_var, whiten
    log-probs     gather_logprobs, sequence_logps, entropy
    SFT           sft_loss
    DPO           dpo_loss
    KL            kl_estimate, AdaptiveKL
    PPO           missing_eos_penalty, shape_rewards, gae, rloo, policy_loss, value_loss, explained_variance

These rules hold everywhere:

- Time is the last dimension (of logits the last but one). What stands before it broadcasts: (T,), (B, T) and (B, K, T)
  all work.
- `mask` is 1 on completion tokens, EOS included, and 0 elsewhere. Values where it is 0 never matter, NaN and infinity
  included: they are overwritten *before* any arithmetic, which keeps results and gradients clean.
  (Multiplying by the mask afterwards would fail: 0 * NaN is NaN.) A mask without a single 1 gives 0.
- Sums are taken in float32 or wider: half precision is raised to float32, float64 stays.
- The losses of SFT and PPO are scalars: means over *all* tokens of the batch, not means of the completions' means.
  (DPO has one loss for each pair.) `total` replaces the number of tokens in the denominator. Give it the tokens of the
  whole accumulation window (and of all devices): the parts then add up to exactly the loss of one large batch.

Papers: DPO, Rafailov et al. 2023 (arXiv 2305.18290). cDPO, Mitchell 2023 ("A note on DPO with noisy preferences").
IPO, Azar et al. 2023 (2310.12036). SLiC, Zhao et al. 2023 (2305.10425). PPO, Schulman et al. 2017 (1707.06347).
GAE, Schulman et al. 2015 (1506.02438). RLOO, Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free!") and
Ahmadian et al. 2024 (2402.14740). RLHF, Ziegler et al. 2019 (1909.08593) and Huang et al. 2024 (2403.17031).
Value clipping, Engstrom et al. 2020 (2005.12729). KL estimators, Schulman 2020 (joschu.net/blog/kl-approx.html).
"""

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------- masks


def masked_mean(x, mask, total=None):
    """Mean over all masked slots: sum_t m_t x_t / sum_t m_t.

    x, mask (..., T) -> scalar. Differentiable in x. `total`, a number or a scalar tensor, replaces sum_t m_t.
    """
    x, mask = torch.broadcast_tensors(_wide(x), mask.bool())  # a broadcast mask counts once per copy
    total = torch.as_tensor(mask.sum() if total is None else total).to(x.dtype)  # may be a number: no device sync
    return _masked(x, mask).sum() / total.masked_fill(total == 0, 1)


def masked_var(x, mask):
    """Unbiased variance over all masked slots: sum_t m_t (x_t - mean)^2 / (n - 1), with n = sum_t m_t.

    x, mask (..., T) -> scalar. Differentiable in x. A single slot has variance 0.
    """
    x, mask = torch.broadcast_tensors(_wide(x), mask.bool())
    deviation = _masked(x - masked_mean(x, mask), mask)
    return deviation.square().sum() / (mask.sum() - 1).clamp(min=1)


def whiten(x, mask, shift_mean=True):
    """Mean 0 and variance 1 over the masked slots: (x - mean) / sqrt(var + 1e-8), var unbiased.

    x, mask (..., T) -> (..., T), 0 where mask is 0. Differentiable in x. `shift_mean=False` subtracts no mean: only the
    scale changes, and every sign stays. PPO whitens advantages, after GAE has made the returns, but not rewards.
    """
    x = _masked(x, mask)
    mean = masked_mean(x, mask) if shift_mean else 0
    return _masked((x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8), mask)


def _masked(x, mask):
    """x in float32 or wider, with 0 written over every slot where mask is 0.

    It stops gradients too: where mask is 0 the gradient is 0, even if NaN arrives from above. So each loss passes its
    differentiable input through this function first, and its sum through masked_mean last.
    """
    return torch.where(mask.bool(), _wide(x), 0.0)


def _wide(x):
    """x in float32 or wider."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# ------------------------------------------------------------------------------------------------------ log-probs


def gather_logprobs(logits, tokens):
    """Log-probability of each token under its logits: log pi_t = z_t[y_t] - logsumexp_v z_t[v].

    logits (..., T, V), tokens (..., T) -> (..., T). logits[t] must be those that *predict* tokens[t]: they come from
    the hidden state before the token. Differentiable in logits: d log pi / d z[v] = 1[v = y] - softmax(z)[v].

    This is log_softmax at one token, without storing the other V - 1 log-probs.
    """
    logits = _wide(logits)
    shape = torch.broadcast_shapes(logits.shape[:-1], tokens.shape)
    z_y = logits.expand(*shape, -1).gather(-1, tokens.expand(shape).unsqueeze(-1)).squeeze(-1)
    return z_y - logits.logsumexp(-1)


def sequence_logps(logprobs, mask, average=False):
    """Log-probability of a whole completion: log pi(y | x) = sum_t m_t log pi(y_t | x, y_<t).

    logprobs, mask (..., T) -> (...). Differentiable in logprobs. DPO is defined on this sum. `average` divides it by
    the length, which is a different objective, used with IPO. An empty completion has 0.
    """
    logprobs, mask = torch.broadcast_tensors(_wide(logprobs), mask.bool())
    logps = _masked(logprobs, mask).sum(-1)
    return logps / mask.sum(-1).clamp(min=1) if average else logps


def entropy(logits):
    """Entropy of the next-token distribution, in nats: H_t = - sum_v p_t[v] log p_t[v], p = softmax(z).

    logits (..., T, V) -> (..., T). Differentiable, but usually only logged. A forbidden token, logit -inf, adds 0.
    """
    logp = _wide(logits).log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)  # p log p -> 0 as p -> 0


# ------------------------------------------------------------------------------------------------------------ SFT


def sft_loss(logprobs, mask, total=None):
    """Cross-entropy on completion tokens: L = - sum_t m_t log pi(y_t | x, y_<t) / sum_t m_t.

    logprobs, mask (..., T) -> scalar. Differentiable in logprobs. exp(L) is the perplexity. Every *token* weighs the
    same, so a long completion counts for more than a short one. `total` replaces sum_t m_t, see the top of this file.
    """
    return -masked_mean(logprobs, mask, total)


# ------------------------------------------------------------------------------------------------------------ DPO


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    label_smoothing=0.0,
    kind="sigmoid",
):
    """Learn from pairs: the chosen completion should gain more over the reference than the rejected one.

    With h = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)], for one pair (y_w chosen, y_l rejected):

        sigmoid    L = - (1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)      DPO eq. 7 (e = 0), cDPO eq. 3 (e > 0)
        ipo        L = (h - 1 / (2 beta))^2                                        IPO eq. 17
        hinge      L = max(0, 1 - beta h)                                          SLiC, on the DPO logit

    e = label_smoothing is the expected share of swapped labels; ipo and hinge ignore it. The logps are sums over the
    completion (sequence_logps). With averages instead, h is per token, and so is IPO's target margin 1 / (2 beta).

    The rewards are those that a policy implies, up to a term of the prompt alone, DPO eq. 5:

        r(x, y) = beta log pi(y | x) / pi_ref(y | x)

    A reward model learns by the same formula (Bradley-Terry): - log sigmoid(r_w - r_l) is dpo_loss(r_w, r_l, 0, 0, 1).

    Four tensors (B,) -> losses (B,), chosen_rewards (B,), rejected_rewards (B,). The caller averages the losses.
    Differentiable in the policy's logps; the reference's are constants, the rewards are detached.
    """
    chosen_logratios = _wide(policy_chosen_logps) - _wide(ref_chosen_logps).detach()
    rejected_logratios = _wide(policy_rejected_logps) - _wide(ref_rejected_logps).detach()
    h = chosen_logratios - rejected_logratios
    if kind == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif kind == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    elif kind == "hinge":
        losses = F.relu(1 - beta * h)
    else:
        raise ValueError(f"dpo_loss knows the kinds 'sigmoid', 'ipo' and 'hinge', not {kind!r}")
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


# ------------------------------------------------------------------------------------------------------------- KL


def kl_estimate(logprobs, ref_logprobs, kind="k1", mask=None):
    """KL(pi || pi_ref) from one sample y_t ~ pi. With d = log pi(y_t) - log pi_ref(y_t), Schulman 2020:

        k1 = d                      unbiased, negative whenever the reference likes the token better
        k2 = d^2 / 2                biased, low variance, never negative
        k3 = exp(-d) - 1 + d        unbiased and never negative: the best to log

    For small d: k3 = k2 - d^3 / 6 + ..., and E[k1] = E[k3] exactly. The samples must come from `logprobs`' policy.

    logprobs, ref_logprobs (..., T) -> (..., T), per token. Differentiable in both. With `mask`, 0 where mask is 0.
    """
    d = _wide(logprobs) - _wide(ref_logprobs)
    if mask is not None:
        d = _masked(d, mask)
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d  # expm1 keeps the digits that exp(-d) - 1 loses near d = 0
    raise ValueError(f"kl_estimate knows the kinds 'k1', 'k2' and 'k3', not {kind!r}")


class AdaptiveKL:
    """A controller that moves the KL coefficient until the KL meets its target, Ziegler et al. 2019, sec. 2.2 (with
    samples / horizon, as in their code, in the place of the paper's constant K_beta):

        e = clip(KL / target - 1, -0.2, 0.2)        coefficient <- coefficient * (1 + e * samples / horizon)

    `kl` and `target` are in nats per completion; `samples` is the number of completions since the last update. `value`
    is the current coefficient and the only state.
    """

    def __init__(self, init, target, horizon):
        self.value, self.target, self.horizon = float(init), float(target), float(horizon)

    def update(self, kl, samples):
        """kl, samples: numbers or scalar tensors -> the new coefficient."""
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * float(samples) / self.horizon
        return self.value


# ------------------------------------------------------------------------------------------------------------ PPO


def missing_eos_penalty(scores, tokens, mask, eos_id, penalty):
    """score - penalty for a completion without EOS, score for one that has it. (Huang et al. 2024 put -1 in its place.)

    scores (...,), tokens and mask (..., T) -> (...,). Only masked tokens are searched: padding is often the same token.
    Without the penalty a completion cut off at the limit would score like a finished one.
    """
    finished = ((tokens == eos_id) & mask.bool()).any(-1)
    return torch.where(finished, _wide(scores), _wide(scores) - penalty)


@torch.no_grad()
def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Reward per token: r_t = - kl_coef * (log pi(y_t) - log pi_ref(y_t)) + 1[t is the last token] * score.

    Ziegler et al. 2019 eq. 2, spread over the tokens (k1 adds up to the log-ratio of the whole completion).

    scores (...,), the rest (..., T) -> (..., T), 0 where mask is 0. The score lands on the last masked token, which is
    EOS if there is one; an empty completion gets none. Detached: rewards are constants of the policy gradient.
    """
    mask = mask.bool()
    tokens_left = mask.flip(-1).cumsum(-1).flip(-1)  # number of tokens from t to the end, t included
    is_last = mask & (tokens_left == 1)
    kl = kl_estimate(logprobs, ref_logprobs, "k1", mask)
    return -kl_coef * kl + _masked(scores.unsqueeze(-1), is_last)


@torch.no_grad()
def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation, and the returns that the value head learns. GAE eq. 16, computed backwards:

        delta_t = r_t + gamma V_{t+1} - V_t              V after the last token is 0
        A_t     = delta_t + gamma lam A_{t+1}            so that A_t = sum_l (gamma lam)^l delta_{t+l}
        R_t     = A_t + V_t

    V_t is the value of the state *before* token t. lam = 0: the TD error; lam = 1: discounted return minus value.
    "Next" means the next masked token: padding on either side is skipped.

    rewards, values, mask (..., T) -> advantages, returns (..., T), not whitened, 0 where mask is 0. Both are detached:
    constants of the update.
    """
    rewards, values, mask = torch.broadcast_tensors(_wide(rewards), _wide(values), mask.bool())
    advantages = torch.zeros_like(rewards - values)
    next_value = next_advantage = 0.0  # nothing comes after the end
    for t in reversed(range(mask.shape[-1])):
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        advantages[..., t] = delta + gamma * lam * next_advantage
        next_advantage = torch.where(mask[..., t], advantages[..., t], next_advantage)
        next_value = torch.where(mask[..., t], values[..., t], next_value)
    return _masked(advantages, mask), _masked(advantages + values, mask)


@torch.no_grad()
def rloo(rewards, mask):
    """REINFORCE leave-one-out: the K - 1 siblings of a completion are its baseline, so no value head is needed.

        R_k = sum_t m_t r_t                     A_k = R_k - 1/(K - 1) sum_{j != k} R_j         the same at every token

    Kool et al. 2019; Ahmadian et al. 2024. A completion is one action, and R_k includes its KL penalty
    (shape_rewards). GRPO's advantage is the same divided by the standard deviation of the K returns, up to a constant.

    rewards, mask (..., K, T) -> advantages (..., K, T), not whitened, 0 where mask is 0. Detached: constants of the
    update. Raises ValueError if K is 1: an only child has no siblings.
    """
    samples = rewards.shape[-2] if rewards.dim() > 1 else 1
    if samples < 2:
        raise ValueError("rloo compares the completions of a prompt: it needs K >= 2 of them, rewards (..., K, T)")
    returns = _masked(rewards, mask).sum(-1, keepdim=True)  # (..., K, 1)
    siblings = (returns.sum(-2, keepdim=True) - returns) / (samples - 1)  # (..., K, 1) mean return of the others
    return _masked(returns - siblings, mask)


def policy_loss(new_logprobs, old_logprobs, advantages, mask, clip, total=None):
    """The clipped surrogate, PPO eq. 7, as a loss to be minimised. With ratio_t = pi(y_t) / pi_old(y_t):

        L_t = max(- A_t ratio_t, - A_t clip(ratio_t, 1 - clip, 1 + clip))        L = sum_t m_t L_t / sum_t m_t

    The max keeps the more pessimistic of the two. Once the ratio has left the range in the direction of A_t, the
    gradient is 0; on the other side it pulls back. Before the first step of an update ratio = 1 and L = - mean A.

    Four tensors (..., T) -> loss, clipfrac (share of tokens where the clipped term wins), both scalars. Differentiable
    in new_logprobs only: old_logprobs and advantages are constants. `total` replaces sum_t m_t in both results.
    """
    advantages = _wide(advantages).detach()
    ratio = _masked(_wide(new_logprobs) - _wide(old_logprobs).detach(), mask).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.max(unclipped, clipped), mask, total)
    return loss, masked_mean((clipped > unclipped).to(loss), mask, total)


def value_loss(new_values, old_values, returns, mask, clip, total=None):
    """Squared error of the value head, clipped to within `clip` of the rollout's values:

        V_clip = clip(V, V_old - clip, V_old + clip)
        L_t    = 1/2 max((V - R)^2, (V_clip - R)^2)                              L = sum_t m_t L_t / sum_t m_t

    Not in the PPO paper but in its code (Engstrom et al. 2020).

    Four tensors (..., T) -> loss, clipfrac (share of tokens where the clipped term wins), both scalars. Differentiable
    in new_values only: old_values and returns are constants. `total` replaces sum_t m_t in both results.
    """
    new_values, old_values, returns = _masked(new_values, mask), _wide(old_values).detach(), _wide(returns).detach()
    # V_old + clip(V - V_old) would round: values inside the range would count as clipped.
    clipped_values = new_values.clamp(old_values - clip, old_values + clip)
    unclipped = (new_values - returns).square()
    clipped = (clipped_values - returns).square()
    loss = 0.5 * masked_mean(torch.max(unclipped, clipped), mask, total)
    return loss, masked_mean((clipped > unclipped).to(loss), mask, total)


@torch.no_grad()
def explained_variance(values, returns, mask):
    """The share of the returns' variance that the value head predicted: 1 - Var(R - V) / Var(R), over the masked slots.

    Three tensors (..., T) -> scalar, detached. 1: all of it. 0: no better than a constant. Below 0: worse than one.
    Returns that do not vary give 0.
    """
    total = masked_var(returns, mask)
    left = masked_var(_wide(returns) - _wide(values), mask)
    noise = torch.finfo(total.dtype).eps * masked_mean(_wide(returns).square(), mask)  # rounding looks like variance
    return torch.where(total > noise, 1 - left / total, 0.0)
