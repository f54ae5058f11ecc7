"""Is this family of models right to the last digit? One check, whenever a model is opened, instead of lists of names.

The project runs several sequences as one (batch.py), with attention of its own, and reads log-probs from the trunk and
the head. A family with recurrent layers, with logits changed after the head, or with dropout that cannot be switched
off would be silently wrong. So a few tokens go through transformers' own forward too, one sequence at a time.
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
    lengths = [2, 1, 2, 2, 3]  # common start, the rest of two prompts, and a completion of each
    start, *parts = (torch.randint(vocabulary, (length,), generator=draw).tolist() for length in lengths)
    prompts = [start + parts[0], start + parts[1]]
    greedy = [row[0] for row in sample(policy, prompts, 1, NEW_TOKENS, eos_id=-1, temperature=0)]
    completions = [[greedy[0], parts[2]], [greedy[1], parts[3]]]
    logprobs = token_logprobs(policy, make_batch(prompts, completions).to(policy.device))["logprobs"]  # (2, 2, C)
    trained = list(policy.trainable().values())
    if trained:  # some families fail in the backward pass only
        torch.autograd.grad(logprobs.sum(), trained[:1], allow_unused=True)
    implementation, found = policy.lm.config._attn_implementation, []
    policy.lm.set_attn_implementation("eager")
    try:
        for b, prompt in enumerate(prompts):
            for k, completion in enumerate(completions[b]):
                own = own_logprobs(policy, prompt, completion)  # (T, V)
                of_tokens = own.gather(1, torch.tensor(completion, device=own.device)[:, None])[:, 0]
                found.append((of_tokens - logprobs[b, k, : len(completion)]).abs().max().item())
                if k == 0:  # no token is likelier than the one that the sampler drew
                    found.append((own.max(-1).values - of_tokens).max().item())
    finally:
        policy.lm.set_attn_implementation(implementation)
    return max(found)


@torch.no_grad()
def own_logprobs(policy: Policy, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log-softmax (T, V) at each completion token, by transformers' own forward of one sequence."""
    with policy.precision():
        ids = torch.tensor([prompt + completion], device=policy.device)
        logits = policy.lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)
