"""Batched sampling with a key-value cache: each prompt is run once for its K samples, finished samples leave the work.

Keys and values of a prompt are held once for all its samples; no sample sees what a sibling wrote.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from socratiq.batch import RowAttention, make_batch
from socratiq.policy import Policy


def sample(
    policy: Policy,
    prompts: list[list[int]],
    samples_per_prompt: int,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    seeds: Sequence[int] | int = 0,
) -> list[list[list[int]]]:
    """Sample K completions for each of B prompts from the full distribution (no top-k, no top-p).

    Args:
        prompts: B lists of token ids, each of at least one token.
        temperature: logits are divided by it; 0 takes the most likely token.
        seeds: one number per prompt, or one to which a prompt's place is added. The random numbers of a prompt come
            from its own seed alone, whatever its neighbours and the order in which samples finish.
    Returns:
        completions[b][k], token ids up to and including EOS where one was drawn within `max_new_tokens`.
    Raises:
        UserError: the longest prompt and `max_new_tokens` are more tokens than the model has positions.
    """
    if not prompts:
        return []
    longest = max(map(len, prompts))
    policy.check_length(longest + max_new_tokens, f"a prompt of {longest} tokens and --max-new-tokens {max_new_tokens}")
    seeds = [seeds + b for b in range(len(prompts))] if isinstance(seeds, int) else seeds
    # Every random number of the call, drawn beforehand: sample k of prompt b uses uniforms[b, k, t] for its token t.
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniforms = torch.stack([torch.rand(samples_per_prompt, max_new_tokens, generator=stream) for stream in streams])
    # Under one autocast for all tokens each weight is cast to bfloat16 once, not once per token.
    with torch.no_grad(), policy.precision():
        found = policy.twin(generate)(policy, prompts, uniforms.to(policy.device), eos_id, temperature)
    return [found[b * samples_per_prompt : (b + 1) * samples_per_prompt] for b in range(len(prompts))]


def generate(policy: Policy, prompts: list[list[int]], uniforms, eos_id: int, temperature: float) -> list[list[int]]:
    """Run the prompts, then draw one token a step for every living sample. uniforms (B, K, T) -> B * K completions."""
    uniforms = uniforms.flatten(0, 1)  # (B*K, T)
    count, max_new_tokens = uniforms.shape
    samples = count // len(prompts)
    cache = policy.twin(Cache)(policy, prompts, samples, max_new_tokens)
    logits = cache.prefill().repeat_interleave(samples, 0)  # (B*K, V)
    alive = torch.arange(count, device=policy.device)  # (N,) the samples that have not ended
    completions: list[list[int]] = [[] for _ in range(count)]
    for step in range(max_new_tokens):
        tokens = draw(logits, uniforms[alive, step], temperature)  # (N,)
        for n, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            completions[n].append(token)
        going_on = tokens != eos_id
        alive, tokens = alive[going_on], tokens[going_on]
        if len(alive) == 0 or step + 1 == max_new_tokens:
            break
        logits = cache.step(alive, tokens)  # (N, V)
    return completions


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution. logits (N, V), uniforms (N,) in [0, 1) -> (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)  # (N, V)
    target = uniforms[:, None] * cumulative[:, -1:]  # the last entry is 1 but for rounding
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class Cache:
    """Keys and values of B prompts and, behind each prompt's, of the tokens that its K samples wrote."""

    def __init__(self, policy: Policy, prompts: list[list[int]], samples: int, max_new_tokens: int):
        self.policy, self.prompts, self.samples = policy, prompts, samples
        self.keys: dict[int, list[torch.Tensor]] = {}  # layer -> per prompt (1, kv_heads, prompt + written, d)
        self.values: dict[int, list[torch.Tensor]] = {}
        # Which sample of the prompt wrote the token behind each key; -1 for the prompt's own tokens, which all see.
        self.writers = [torch.full((len(prompt),), -1, device=policy.device) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
        self.positions = lengths.repeat_interleave(samples)  # (B*K,) of each sample's next token

    def prefill(self) -> torch.Tensor:
        """Run every prompt -> logits (B, V) of the first token of its completions."""
        # A completion of one token: `read` is then each prompt's last state. The token itself is cut off below.
        batch = make_batch(self.prompts, [[[0]]] * len(self.prompts)).to(self.policy.device)
        self.rows, self.attend = batch.rows, self.policy.twin(RowAttention)(batch.rows)
        hidden = self.policy.hidden(batch.input_ids, batch.position_ids, self._keep_prompts, batch.read)  # (B, H)
        return self.policy.lm.lm_head(hidden)

    def step(self, alive: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Run the token that each living sample (N,) has just drawn -> logits (N, V) of its next one."""
        own = [alive[alive // self.samples == b] % self.samples for b in range(len(self.prompts))]
        self.writers = [torch.cat([writers, k]) for writers, k in zip(self.writers, own, strict=True)]
        self.visible = [  # per prompt (living samples, keys)
            (writers < 0) | (writers == k[:, None]) for writers, k in zip(self.writers, own, strict=True)
        ]
        positions = self.positions[alive]
        self.positions[alive] += 1
        hidden = self.policy.hidden(tokens, positions, self._append, torch.arange(len(tokens), device=tokens.device))
        return self.policy.lm.lm_head(hidden)

    def _keep_prompts(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        for kept, x in ((self.keys, k), (self.values, v)):
            start, *rows = x.split([self.rows.shared, *self.rows.lengths], dim=2)
            kept[layer] = [torch.cat([start, row[:, :, :-1]], dim=2) for row in rows]
        return self.attend(layer, q, k, v, scale)

    def _append(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """One token of each living sample: q (1, heads, N, d), k and v (1, kv_heads, N, d) -> (1, N, heads, d)."""
        counts = [len(visible) for visible in self.visible]
        outputs = []
        for b, (q_b, k_b, v_b) in enumerate(zip(*(x.split(counts, dim=2) for x in (q, k, v)), strict=True)):
            if counts[b] == 0:
                continue
            keys = self.keys[layer][b] = torch.cat([self.keys[layer][b], k_b], dim=2)
            values = self.values[layer][b] = torch.cat([self.values[layer][b], v_b], dim=2)
            outputs.append(
                F.scaled_dot_product_attention(
                    q_b, keys, values, attn_mask=self.visible[b], scale=scale, enable_gqa=True
                )
            )  # (1, heads, living samples, d)
        return torch.cat(outputs, dim=2).transpose(1, 2)
