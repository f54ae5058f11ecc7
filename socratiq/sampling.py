"""Batched sampling with a key-value cache: each prompt is run once for its K samples, finished samples leave the work.

The cache has two parts. The prompts' keys and values are held once per prompt and shared by its K samples; each sample
holds only the keys and values of what it wrote itself. Projections, MLP and head run on the living samples alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from socratiq import allocator, distributed
from socratiq.batch import RowAttention, common_start
from socratiq.model import Policy
from socratiq.packed import packed


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
    # Every random number of the run, drawn beforehand: sample k of prompt b uses uniforms[b, k, t] for its token t.
    uniforms = torch.stack(
        [torch.rand(samples, max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).flatten(0, 1)  # (B*K, T)
    uniforms = uniforms.to(policy.device)

    # 1. Prefill: the common start of all prompts, then the rest of each; only each prompt's last state is read.
    shared = common_start(prompts)
    parts = [prompts[0][:shared], *(prompt[shared:] for prompt in prompts)]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    cache = Cache(lengths.tolist(), samples, max_new_tokens, shared)
    input_ids = torch.tensor([token for part in parts for token in part], device=policy.device)
    position_ids = torch.cat([torch.arange(shared), *(torch.arange(shared, length) for length in lengths)])
    position_ids = position_ids.to(policy.device)
    read = (shared + (lengths - shared).cumsum(0) - 1).to(policy.device)
    logits = policy(input_ids, position_ids, cache.prefill, read)["logits"].repeat_interleave(samples, 0)  # (B*K, V)

    # 2. Decode the living samples, one token each at a time.
    alive = torch.arange(batch * samples, device=policy.device)  # (N,) samples that have not finished
    last_position = (lengths - 1).repeat_interleave(samples).to(policy.device)  # (B*K,)
    completions: list[list[int]] = [[] for _ in range(batch * samples)]
    for step in range(max_new_tokens):
        tokens = draw(logits, uniforms[alive, step], temperature)  # (N,)
        for sample_index, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            completions[sample_index].append(token)
            if on_token:
                on_token(sample_index, token)
        going_on = tokens != eos_id
        alive, tokens = alive[going_on], tokens[going_on]
        if step + 1 == max_new_tokens or distributed.most(len(alive)) == 0:
            break
        if len(alive) == 0:  # other processes are still writing: run the model with them, on a token nobody reads
            nothing = torch.zeros(1, dtype=torch.long, device=policy.device)
            logits = policy(nothing, nothing, RowAttention([1], [None]), nothing)["logits"][:0]
            continue
        cache.keep(alive, step)
        everything = torch.arange(len(alive), device=policy.device)
        logits = policy(tokens, last_position[alive] + step + 1, cache.decode, everything)["logits"]  # (N, V)
    return [completions[b * samples : (b + 1) * samples] for b in range(batch)]


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution. logits (N, V), uniforms (N,) in [0, 1) -> (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)  # (N, V)
    target = uniforms[:, None] * cumulative[:, -1:]  # the last entry is 1 but for rounding
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class Cache:
    """Keys and values of B prompts (once each) and of what their K samples have written."""

    def __init__(self, lengths: list[int], samples: int, max_new_tokens: int, shared: int = 0):
        self.lengths, self.samples, self.max_new = lengths, samples, max_new_tokens
        self.rows = RowAttention([length - shared for length in lengths], [None] * len(lengths), shared)
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> keys, values (B, kv_heads, P, d)
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> keys, values (B*K, kv_heads, T, d)
        self.group = torch.arange(len(lengths))  # which of the B prompts the cache still holds
        self.blocked: torch.Tensor | None = None  # (B, 1, 1, P) -inf where a shorter prompt has no token, else 0
        self.slots: torch.Tensor | None = None  # (N,) where the living samples stand in the B*K grid
        self.step = 0

    def prefill(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """Causal attention within each prompt, as in training, keeping keys and values."""
        longest = max(self.lengths)

        def padded(x):  # (1, kv_heads, N, d) -> (B, kv_heads, P, d)
            out = x.new_zeros(len(self.lengths), x.shape[1], longest, x.shape[3])
            start, *rows = x[0].split([self.rows.shared, *self.rows.lengths], dim=1)
            for b, row in enumerate(rows):
                out[b, :, : self.lengths[b]] = torch.cat([start, row], dim=1)
            return out

        self.prompt[layer] = padded(k), padded(v)
        shape = (len(self.lengths) * self.samples, k.shape[1], self.max_new, k.shape[3])
        self.own[layer] = k.new_empty(shape), v.new_empty(shape)
        return self.rows(layer, q, k, v, scale)

    def keep(self, alive: torch.Tensor, step: int) -> None:
        """Say which samples (indices into B*K) are decoded next; prompts without a living sample leave the cache."""
        self.step = step
        if self.blocked is None:
            lengths = torch.tensor(self.lengths, device=alive.device)
            past_the_end = torch.arange(max(self.lengths), device=alive.device) >= lengths[:, None, None, None]
            keys = self.prompt[0][0]
            self.blocked = keys.new_zeros(past_the_end.shape).masked_fill(past_the_end, float("-inf"))
            self.group = self.group.to(alive.device)
        needed = torch.isin(self.group, alive // self.samples)  # (B',)
        if needed.sum() < 0.8 * len(needed):  # copying has a price, so not for every single prompt
            prompts = needed.nonzero().squeeze(-1)
            grid = (prompts[:, None] * self.samples + torch.arange(self.samples, device=alive.device)).flatten()
            self.prompt = {layer: (k[prompts], v[prompts]) for layer, (k, v) in self.prompt.items()}
            self.own = {layer: (k[grid], v[grid]) for layer, (k, v) in self.own.items()}
            self.blocked, self.group = self.blocked[prompts], self.group[prompts]
        self.slots = torch.searchsorted(self.group, alive // self.samples) * self.samples + alive % self.samples

    def decode(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """One new token for each of N living samples: q (1, heads, N, d) -> (1, N, heads, d).

        Each attends to its prompt and to its own tokens. Scores over both are put side by side for one softmax.
        """
        (prompt_k, prompt_v), (own_k, own_v) = self.prompt[layer], self.own[layer]
        prompts, kv_heads, width, d = prompt_k.shape
        length, grouped = self.step + 1, q.shape[1] // kv_heads
        own_k[self.slots, :, self.step] = k[0].transpose(0, 1)
        own_v[self.slots, :, self.step] = v[0].transpose(0, 1)
        own_k, own_v = own_k[:, :, :length].flatten(0, 1), own_v[:, :, :length].flatten(0, 1)  # (B*K*kv_heads, T, d)
        prompt_k, prompt_v = prompt_k.flatten(0, 1), prompt_v.flatten(0, 1)  # (B*kv_heads, P, d)

        grid = q.new_zeros(prompts * self.samples, *q.shape[1::2])  # (B*K, heads, d), zero where a sample has finished
        grid[self.slots] = q[0].transpose(0, 1) * scale
        own_q = grid.view(-1, grouped, d)  # (B*K*kv_heads, grouped, d): heads that share a key head stand together

        def to_shared(x):  # (B*K*kv_heads, grouped, n) -> (B*kv_heads, K*grouped, n): samples of a prompt together
            x = x.view(prompts, self.samples, kv_heads, grouped, -1)
            return x.transpose(1, 2).reshape(prompts * kv_heads, self.samples * grouped, -1)

        def to_own(x):  # the way back
            x = x.view(prompts, kv_heads, self.samples, grouped, -1)
            return x.transpose(1, 2).reshape(prompts * self.samples * kv_heads, grouped, -1)

        blocked = self.blocked.expand(-1, kv_heads, -1, -1).flatten(0, 1)  # (B*kv_heads, 1, P)
        scores = torch.cat([torch.baddbmm(blocked, to_shared(own_q), prompt_k.mT), to_shared(own_q @ own_k.mT)], dim=-1)
        weights = scores.softmax(-1)  # (B*kv_heads, K*grouped, P+T); summed up in float32 whatever the precision
        mixed = torch.baddbmm(to_own(weights[..., :width] @ prompt_v), to_own(weights[..., width:]), own_v)
        return mixed.view(-1, kv_heads * grouped, d)[self.slots][None]  # (1, N, heads, d)
