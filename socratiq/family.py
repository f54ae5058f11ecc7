"""Does this family of models give transformers' own log-probs, up to rounding? One check instead of lists of names.

The project runs several sequences as one (batch.py), with attention of its own, and reads log-probs from the trunk and
the head. A family with recurrent layers, with logits changed after the head, or with dropout that cannot be switched
off would be silently wrong. So a few tokens go through transformers' own forward too, in sequences of their own.
"""

from __future__ import annotations

import torch

from socratiq.batch import make_batch
from socratiq.policy import Policy, token_logprobs
from socratiq.run.errors import UserError
from socratiq.sampling import sample

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25}  # nats a token: rounding, and far below a wrong computation
NEW_TOKENS = 4  # drawn by the sampler


def check_family(policy: Policy, name: str) -> None:
    """Raise UserError in one line unless the policy agrees with transformers' own forward of the same model.

    Two prompts with two completions each, in one batch, with a backward pass if anything is trained; and four greedy
    tokens from the sampler.
    """
    family = type(policy.lm).__name__
    try:
        difference = largest_difference(policy)
    except Exception as error:  # a family this project was not made for raises nearly anything
        raise UserError(f"--model {name}: {family} is not supported ({type(error).__name__}: {error})") from None
    dtype = torch.bfloat16 if policy.autocast else next(policy.lm.parameters()).dtype
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"--model {name}: {family} is not supported: its log-probs would be wrong by {difference:.2g} nats a "
            "token; use a Llama-like model"
        )


def largest_difference(policy: Policy) -> float:
    """The largest difference of any token's log-prob, in nats."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = policy.lm.get_input_embeddings().num_embeddings
    start, *rest = (torch.randint(vocabulary, (length,), generator=draw).tolist() for length in (2, 2, 2, 4, 4))
    prompts = [start + rest[0], start + rest[1]]
    greedy = [row[0] for row in sample(policy, prompts, 1, NEW_TOKENS, eos_id=-1, temperature=0)]
    completions = [[greedy[0], rest[2]], [greedy[1], rest[3]]]
    logprobs = token_logprobs(policy, make_batch(prompts, completions).to(policy.device))["logprobs"]  # (2, 2, C)
    trained = list(policy.trainable().values())
    if trained:  # some families fail in the backward pass only
        torch.autograd.grad(logprobs.sum(), trained[:1], allow_unused=True)
    sequences = [prompt + completion for prompt, row in zip(prompts, completions, strict=True) for completion in row]
    own = own_logprobs(policy, torch.tensor(sequences, device=policy.device))[:, -NEW_TOKENS:]  # (4, C, V)
    own = own.unflatten(0, (2, 2))  # (2, 2, C, V)
    of_tokens = own.gather(-1, torch.tensor(completions, device=own.device)[..., None])[..., 0]
    unlikely = (own.max(-1).values - of_tokens)[:, 0]  # no token is likelier than the one that the sampler drew
    return max((of_tokens - logprobs).abs().max().item(), unlikely.max().item())


@torch.no_grad()
def own_logprobs(policy: Policy, sequences: torch.Tensor) -> torch.Tensor:
    """log-softmax (N, T - 1, V) of the next token, by transformers' own forward. sequences (N, T), no padding."""
    implementation = policy.lm.config._attn_implementation
    policy.lm.set_attn_implementation("eager")
    try:
        with policy.precision():
            logits = policy.lm(input_ids=sequences, use_cache=False).logits[:, :-1]
    finally:
        policy.lm.set_attn_implementation(implementation)
    return logits.float().log_softmax(-1)
