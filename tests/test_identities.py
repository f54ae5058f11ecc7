"""Identities that hold for the whole machine, model included, plain and with the engine: how the work is laid out
must not matter."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from small import EOS, small_lm, small_policy, small_rows, stir

from socratiq.batch import make_batch
from socratiq.engine import attention, speed_up
from socratiq.losses import dpo_loss, gae, kl_estimate, masked_mean, policy_loss, sequence_logps, sft_loss, whiten
from socratiq.models import load_policy
from socratiq.policy import token_logprobs
from socratiq.sampling import sample


@pytest.fixture(params=["plain", "cpu", "cuda"])
def make_policy(request):
    """`small_policy`: plain, with the engine's twins for a CPU, and with those for a GPU (on the CPU all the same)."""

    def make(**options):
        policy = small_policy(**options)
        if request.param != "plain":
            speed_up(policy, torch.device(request.param))
            policy.keep_reference()  # with the twins' layers in it, as the scripts have it
        return policy

    return make


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, check_dtype=False)


def plain_lm(policy):
    """The same weights in a plain transformers model, with transformers' own attention."""
    lm = small_lm(attention="sdpa")
    lm.load_state_dict(policy.lm.state_dict())
    return lm


def one_by_one(lm, prompt, completion, temperature=1.0):
    """The textbook way, one forward for one sequence: log-probs of all tokens (C, V), last hidden states (C, H)."""
    ids = torch.tensor([prompt + completion])
    out = lm(ids, output_hidden_states=True)
    before = slice(len(prompt) - 1, ids.shape[1] - 1)  # the state before a token predicts it
    return (out.logits[0, before] / temperature).log_softmax(-1), out.hidden_states[-1][0, before]


def of(logprobs, completion):
    """(C, V) -> (C,), those of the completion's own tokens."""
    return logprobs.gather(-1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0]


def gradients(policy):
    return torch.cat([weight.grad.flatten() for weight in policy.trainable().values()])


# ------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(("samples", "temperature", "start"), [(1, 1.0, []), (2, 0.7, [1]), (5, 1.0, [9] * 7)])
def test_packed_rows_equal_one_forward_per_sequence(make_policy, samples, temperature, start):
    policy = make_policy(value_head=True)
    torch.nn.init.normal_(policy.value_head.weight)
    prompts, completions = small_rows(samples)
    prompts = [start + prompt[1:] for prompt in prompts]
    completions[1][-1] = []  # an empty one among the others
    batch = make_batch(prompts, completions)
    assert batch.rows.shared == len(start)
    out = token_logprobs(policy, batch, temperature)
    lm = plain_lm(policy)
    for b, prompt in enumerate(prompts):
        for k, completion in enumerate(completions[b]):
            logprobs, hidden = one_by_one(lm, prompt, completion, temperature)
            close(out["logprobs"][b, k, : len(completion)], of(logprobs, completion))
            close(out["values"][b, k, : len(completion)], policy.value_head(F.normalize(hidden, dim=-1))[:, 0])
            assert batch.mask[b, k].sum() == len(completion)
    for name in ("logprobs", "values"):
        assert (out[name][~batch.mask.bool()] == 0).all()


def test_gradient_of_packed_rows_equals_one_forward_per_sequence(make_policy):
    policy = make_policy()
    prompts, completions = small_rows(samples=3)
    completions[1][0] = []
    batch = make_batch(prompts, completions)
    sft_loss(token_logprobs(policy, batch)["logprobs"], batch.mask).backward()
    packed = gradients(policy)

    plain = plain_lm(policy)
    total = sum(len(completion) for row in completions for completion in row)
    for prompt, row in zip(prompts, completions, strict=True):
        for completion in row:
            logprobs, _ = one_by_one(plain, prompt, completion)
            (-of(logprobs, completion).sum() / total).backward()
    close(packed, torch.cat([weight.grad.flatten() for weight in plain.parameters()]))


def test_order_siblings_and_neighbours_change_nothing(make_policy):
    policy = make_policy()
    prompts, completions = small_rows(samples=2)
    first = sequence_logps(*scored(policy, prompts, completions))[:, 0]
    order = [2, 0, 3, 1]
    in_another_order = [prompts[i] for i in order], [completions[i] for i in order]
    close(sequence_logps(*scored(policy, *in_another_order))[:, 0], first[order])
    only_children = [row[:1] for row in completions]
    close(sequence_logps(*scored(policy, prompts, only_children))[:, 0], first)
    other_siblings = [[row[0], [5, 9, 4, EOS]] for row in completions]
    close(sequence_logps(*scored(policy, prompts, other_siblings))[:, 0], first)
    beside = [*prompts, [1] * 20], [*only_children, [[7] * 30 + [EOS]]]  # a row far longer than all others
    close(sequence_logps(*scored(policy, *beside))[:4, 0], first)


def scored(policy, prompts, completions, temperature=1.0):
    """Log-probs and mask, (B, K, C) each."""
    batch = make_batch(prompts, completions)
    return token_logprobs(policy, batch, temperature)["logprobs"], batch.mask


# ---------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("plain", [True, False])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(lora_rank, plain):
    prompts, completions = small_rows(samples=2)
    batch = make_batch(prompts, completions)
    losses, gradient, passes = [], [], []
    for grad_checkpoint in (False, True):
        options = {"value_head": True, "grad_checkpoint": grad_checkpoint, "plain": plain}
        policy = load_policy("tiny", "cpu", "float32", lora_rank, **options)
        stir(policy)  # adapters as they begin would leave half of the gradients zero
        ran = []
        policy.lm.model.layers[0].self_attn.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        out = token_logprobs(policy, batch)
        loss = sft_loss(out["logprobs"], batch.mask) + masked_mean(out["values"].square(), batch.mask)
        loss.backward()
        losses.append(loss.detach())
        gradient.append(gradients(policy))
        passes.append(len(ran))
    assert passes == [1, 2], "with checkpointing a layer runs once more, in the backward pass"
    assert gradient[0].norm() > 0.1
    close(losses[1], losses[0], 1e-6)
    close(gradient[1], gradient[0], 1e-6)


# ----------------------------------------------------------------------------------------------- the first step

both_references = pytest.mark.parametrize("lora_rank", [0, 4], ids=["kept-copy", "adapters-off"])


@both_references
def test_first_dpo_loss_is_ln_2_and_initial_kl_is_0(make_policy, lora_rank):
    policy = make_policy(lora_rank=lora_rank)
    prompts, completions = small_rows(samples=2)
    logprobs, mask = scored(policy, prompts, completions)
    with policy.reference():
        reference, _ = scored(policy, prompts, completions)
    logps, ref_logps = sequence_logps(logprobs, mask), sequence_logps(reference, mask)
    loss, *rewards = dpo_loss(*logps.unbind(1), *ref_logps.unbind(1), beta=0.1)
    close(loss, torch.full((4,), log(2)), 1e-6)
    close(torch.stack(rewards), torch.zeros(2, 4), 1e-6)
    for kind in ("k1", "k2", "k3"):
        close(kl_estimate(logprobs, reference, kind, mask), torch.zeros(mask.shape), 1e-6)


def test_first_ratio_is_1_and_first_policy_loss_is_minus_mean_advantage(make_policy):
    policy = make_policy(lora_rank=4, value_head=True)
    prompts, _ = small_rows()
    completions = sample(policy, prompts, 4, max_new_tokens=6, eos_id=EOS)
    with torch.no_grad():  # the rollout's log-probs, all rows at once
        old, mask = scored(policy, prompts, completions)
    torch.manual_seed(0)
    advantages = whiten(torch.randn(mask.shape), mask)
    for rows in ([0, 1, 2, 3], [3, 1], [2]):  # the update's, in whatever minibatch
        batch = make_batch([prompts[i] for i in rows], [completions[i] for i in rows])
        length = batch.mask.shape[-1]
        new = token_logprobs(policy, batch)["logprobs"]
        assert new.requires_grad
        close((new - old[rows, :, :length]).exp(), torch.ones(batch.mask.shape), 1e-5)
        part = advantages[rows, :, :length]
        loss, clipfrac = policy_loss(new, old[rows, :, :length], part, batch.mask, clip=0.2)
        close(loss, -masked_mean(part, batch.mask), 1e-5)
        assert clipfrac == 0


def test_first_values_are_0_so_that_the_first_return_is_the_reward(make_policy):
    policy = make_policy(value_head=True)
    prompts, completions = small_rows(samples=2)
    batch = make_batch(prompts, completions)
    values = token_logprobs(policy, batch)["values"]
    assert (values == 0).all()
    rewards = torch.randn(batch.mask.shape) * batch.mask
    _, returns = gae(rewards, values, batch.mask, gamma=1.0, lam=1.0)
    close(returns[..., 0], rewards.sum(-1))


@both_references
def test_the_reference_never_changes(make_policy, lora_rank):
    policy = make_policy(lora_rank=lora_rank)
    prompts, completions = small_rows()
    first, mask = scored(policy, prompts, completions)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        sft_loss(*scored(policy, prompts, completions)).backward()
        optimizer.step()
    with policy.reference():
        reference, _ = scored(policy, prompts, completions)
        assert not reference.requires_grad
    assert torch.equal(reference, first.detach())  # bit for bit
    moved, _ = scored(policy, prompts, completions)
    assert sft_loss(moved, mask) < sft_loss(first, mask) - 0.01


# ------------------------------------------------------------------------------------------------------ sampling


def test_greedy_decoding_picks_what_the_training_forward_finds_most_likely(make_policy):
    policy = make_policy()
    lm = plain_lm(policy)
    prompts, _ = small_rows(rows=6)
    completions = sample(policy, prompts, 1, max_new_tokens=8, eos_id=EOS, temperature=0)
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        assert one_by_one(lm, prompt, completion)[0].argmax(-1).tolist() == completion


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_sampled_token_is_the_one_that_its_random_number_asks_for(make_policy, temperature):
    """Of four samples a prompt, some of which end long before their siblings, by one forward for one sequence."""
    policy = make_policy()
    lm = plain_lm(policy)
    prompts, _ = small_rows(rows=6)
    written = sample(policy, prompts, 4, max_new_tokens=12, eos_id=EOS, temperature=temperature, seeds=range(6))
    assert {len(completion) for row in written for completion in row} > {1, 2, 12}
    for prompt, row, seed in zip(prompts, written, range(6), strict=True):
        uniforms = torch.rand(4, 12, generator=torch.Generator().manual_seed(seed))
        for completion, u in zip(row, uniforms, strict=True):
            cumulative = one_by_one(lm, prompt, completion, temperature)[0].exp().cumsum(-1)  # (C, V)
            above, u = of(cumulative, completion), u[: len(completion)]
            below = above - of(cumulative.diff(dim=-1, prepend=torch.zeros(len(completion), 1)), completion)
            assert (below - 1e-4 <= u).all() and (u <= above + 1e-4).all()


def test_long_prompts_are_sampled_as_short_ones_are(make_policy, monkeypatch):
    policy = make_policy()
    prompts, _ = small_rows(rows=6)
    short = sample(policy, prompts, 2, max_new_tokens=8, eos_id=EOS, seeds=3)
    monkeypatch.setattr(attention, "SHORT", 0)
    monkeypatch.setattr(attention, "AT_ONCE", 0)
    assert sample(policy, prompts, 2, max_new_tokens=8, eos_id=EOS, seeds=3) == short


@pytest.mark.parametrize("samples", [1, 3])
def test_a_prompt_s_samples_do_not_depend_on_its_neighbours(make_policy, samples):
    """Of 20 prompts, some of which are over long before the others."""
    policy = make_policy()
    prompts, _ = small_rows(rows=20)
    together = sample(policy, prompts, samples, max_new_tokens=30, eos_id=EOS, seeds=range(20))
    for seed, (prompt, row) in enumerate(zip(prompts, together, strict=True)):
        assert sample(policy, [prompt], samples, max_new_tokens=30, eos_id=EOS, seeds=[seed]) == [row]
