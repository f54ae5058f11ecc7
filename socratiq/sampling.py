"""Batched sampling with a key-value cache: each prompt is run once for its K samples, finished samples leave the work.

Keys and values are held once per prompt, for all its K samples, with room behind them for what the samples write, token
by token; no sample sees what a sibling wrote. Nothing is run for padding or for samples that have finished, but for a
GPU (static_cache.py), to which that is cheaper than new shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F

from socratiq import allocator, distributed, fused
from socratiq.batch import RowAttention, common_start
from socratiq.model import Policy
from socratiq.packed import packed
from socratiq.static_cache import StaticCache


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
    if fused.starts_cost(policy.device):
        cache = StaticCache(lengths.tolist(), samples, max_new_tokens, shared, policy.device)
    else:
        cache = Cache(lengths.tolist(), samples, max_new_tokens, shared)
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
                on_token(sample_index, token)
        going_on = tokens != eos_id
        alive, tokens = alive[going_on], tokens[going_on]
        if step + 1 == max_new_tokens or distributed.most(len(alive)) == 0:
            break
        if len(alive) == 0:  # other processes are still writing: run the model with them, on a token nobody reads
            nothing = torch.zeros(1, dtype=torch.long, device=policy.device)
            logits = policy(nothing, nothing, RowAttention([1], [None]), nothing)["logits"][:0]
            continue
        logits = cache.step(policy, alive, tokens, step)  # (N, V)
    return [completions[b * samples : (b + 1) * samples] for b in range(batch)]


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution. logits (N, V), uniforms (N,) in [0, 1) -> (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature  # a pass over all of them less
    cumulative = logits.softmax(-1).cumsum(-1)  # (N, V)
    target = uniforms[:, None] * cumulative[:, -1:]  # the last entry is 1 but for rounding
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class Cache:
    """Keys and values of B prompts, once each, and behind each what its K samples have written, token by token."""

    def __init__(self, lengths: list[int], samples: int, max_new_tokens: int, shared: int = 0):
        self.lengths, self.samples, self.room = lengths, samples, samples * max_new_tokens
        self.rows = RowAttention([length - shared for length in lengths], [None] * len(lengths), shared)
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keys, values (1, kv_heads, sum of below, d)
        self.starts = [0, *accumulate(length + self.room for length in lengths)]  # of each prompt's part, and the end
        self.mask: torch.Tensor | None = None  # (K, longest + room): 0 where a sample may look, -inf at its siblings'

    def prefill(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """Causal attention within each prompt, as in training, keeping keys and values."""
        behind = torch.zeros_like(k[:, :, :1]).expand(-1, -1, self.room, -1)  # not empty: 0 times garbage may be NaN

        def kept(x):  # (1, kv_heads, N, d)
            start, *rows = x.split([self.rows.shared, *self.rows.lengths], dim=2)
            return torch.cat([part for row in rows for part in (start, row, behind)], dim=2)

        self.layers[layer] = kept(k), kept(v)
        # Heads that share a key head ask together, unless they are so few that threads would share them unevenly.
        self.grouped = q.shape[1] // k.shape[1] if self.samples > 1 else 1
        if self.mask is None and self.samples > 1:
            own = torch.eye(self.samples, dtype=torch.bool, device=k.device).repeat(1, self.room // self.samples)
            self.mask = F.pad(k.new_zeros(own.shape).masked_fill_(~own, float("-inf")), (max(self.lengths), 0))
        return self.rows(layer, q, k, v, scale)

    def step(self, policy, alive: torch.Tensor, tokens: torch.Tensor, step: int) -> torch.Tensor:
        """Run the model on the token that each of the samples `alive` (N,) has drawn last -> logits (N, V)."""
        self.keep(alive, step)
        positions = torch.tensor(self.lengths, device=alive.device)[alive // self.samples] + step
        return policy(tokens, positions, self.decode, torch.arange(len(alive), device=alive.device))["logits"]

    def keep(self, alive: torch.Tensor, step: int) -> None:
        """Say which samples (indices into B*K, in order) are decoded next, and how many tokens they had before."""
        prompts, living = (alive // self.samples).unique_consecutive(return_counts=True)
        self.living = living.tolist()  # samples of each prompt that still has some
        longest = max(self.lengths)
        self.cuts, self.visible, slots, end = [], [], [], 0
        for b, mine in zip(prompts.tolist(), (alive % self.samples).split(self.living), strict=True):
            start, length, written = self.starts[b], self.lengths[b], step * self.samples
            slots.append(start + length + written + mine)
            self.cuts.append(start - end)  # what is passed over
            end = start + length + written + self.samples
            self.cuts.append(end - start)  # what is looked at
            seen = slice(longest - length, longest + written + self.samples)
            self.visible.append(None if self.mask is None else self.mask[:, seen][mine.repeat_interleave(self.grouped)])
        self.cuts.append(self.starts[-1] - end)
        self.slots = torch.cat(slots)  # (N,) where the new keys and values go

    def decode(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """One new token for each of N living samples: q (1, heads, N, d) -> (1, N, heads, d)."""
        keys, values = (x.index_copy_(2, self.slots, new) for x, new in zip(self.layers[layer], (k, v), strict=True))
        q = q.unflatten(1, (-1, self.grouped)).transpose(2, 3).flatten(2, 3)  # (1, kv_heads, N * grouped, d)
        asking = q.split([self.grouped * living for living in self.living], dim=2)
        asked = (x.split(self.cuts, dim=2)[1::2] for x in (keys, values))
        out = [  # each (1, kv_heads, K' * grouped, d)
            F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=scale, enable_gqa=True)
            for *qkv, mask in zip(asking, *asked, self.visible, strict=True)
        ]
        return torch.cat(out, dim=2).unflatten(2, (-1, self.grouped)).transpose(1, 2).flatten(2, 3)
