"""Batched sampling with a key-value cache: each prompt is run once for its K samples, finished samples leave the work.

Keys and values are held once per prompt, for all its K samples (cache.py); no sample sees what a sibling wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from socratiq.batch import RowAttention, common_start
from socratiq.engine import allocator, distributed
from socratiq.engine.cache import Cache
from socratiq.engine.packed import packed
from socratiq.models import Policy


def sample(
    policy: Policy,
    prompts: list[list[int]],
    samples_per_prompt: int,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    seeds: Sequence[int] | int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[list[int]]]:
    """Sample K completions for each of B prompts from the full distribution (no top-k, no top-p).

    Args:
        prompts: B lists of token ids, each of at least one token.
        temperature: logits are divided by it; 0 takes the most likely token.
        seeds: one number per prompt, or one for all. A prompt's samples depend on its own seed and on nothing else: not
            on its neighbours in the batch, not on the order in which samples finish.
        on_token: called with (index of the sample, token id) as tokens are drawn, for streaming.
    Returns:
        completions[b][k], token ids up to and including EOS where one was drawn within `max_new_tokens`.
    Raises:
        UserError: the longest prompt and `max_new_tokens` are more tokens than the model has positions.
    """
    longest = max(map(len, prompts))
    policy.check_length(longest + max_new_tokens, f"a prompt of {longest} tokens and --max-new-tokens {max_new_tokens}")
    # Under one autocast for all tokens each weight is cast to bfloat16 once, not once per token.
    with torch.no_grad(), policy.precision(), packed(policy.lm, len(prompts) * samples_per_prompt):
        found = _sample(policy, prompts, samples_per_prompt, max_new_tokens, eos_id, temperature, seeds, on_token)
    allocator.give_back()  # the packed weights and the cache
    return found


def _sample(policy, prompts, samples, max_new_tokens, eos_id, temperature, seeds, on_token):
    batch = len(prompts)
    seeds = [seeds + b for b in range(batch)] if isinstance(seeds, int) else list(seeds)
    order = sorted(range(batch), key=lambda b: len(prompts[b]))  # as the cache wants them
    prompts, seeds = [prompts[b] for b in order], [seeds[b] for b in order]
    # Every random number of the run, drawn beforehand: sample k of prompt b uses uniforms[b, k, t] for its token t.
    uniforms = torch.stack(
        [torch.rand(samples, max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).flatten(0, 1)  # (B*K, T)
    uniforms = uniforms.to(policy.device)

    # 1. Prefill: the common start of all prompts, then the rest of each; only each prompt's last state is read.
    shared = common_start(prompts)
    parts = [prompts[0][:shared], *(prompt[shared:] for prompt in prompts)]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    cache = Cache(lengths.tolist(), samples, max_new_tokens, shared, policy.device)
    input_ids = torch.tensor([token for part in parts for token in part], device=policy.device)
    position_ids = torch.cat([torch.arange(shared), *(torch.arange(shared, length) for length in lengths)])
    position_ids = position_ids.to(policy.device)
    read = (shared + (lengths - shared).cumsum(0) - 1).to(policy.device)
    logits = policy(input_ids, position_ids, cache.prefill, read)["logits"].repeat_interleave(samples, 0)  # (B*K, V)

    # 2. Decode the living samples, one token each at a time.
    alive = torch.arange(batch * samples, device=policy.device)  # (N,) samples that have not finished
    completions: list[list[int]] = [[] for _ in range(batch * samples)]
    for step in range(max_new_tokens):
        tokens = draw(logits, uniforms[alive, step], temperature)  # (N,)
        for sample_index, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            completions[sample_index].append(token)
            if on_token:
                on_token(order[sample_index // samples] * samples + sample_index % samples, token)
        going_on = tokens != eos_id
        alive, tokens = alive[going_on], tokens[going_on]
        if step + 1 == max_new_tokens or distributed.most(len(alive)) == 0:
            break
        if len(alive) == 0:  # other processes are still writing: run the model with them, on a token nobody reads
            nothing = torch.zeros(1, dtype=torch.long, device=policy.device)
            logits = policy(nothing, nothing, RowAttention([1], [None]), nothing)["logits"][:0]
            continue
        logits = cache.step(policy, alive, tokens)  # (N, V)
    found = {b: completions[i * samples : (i + 1) * samples] for i, b in enumerate(order)}
    return [found[b] for b in range(batch)]


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution. logits (N, V), uniforms (N,) in [0, 1) -> (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature  # a pass over all of them less
    cumulative = logits.softmax(-1).cumsum(-1)  # (N, V)
    target = uniforms[:, None] * cumulative[:, -1:]  # the last entry is 1 but for rounding
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
