"""Twin of sampling.Cache for a GPU, where starting kernels takes longer than running them.

Every tensor keeps its shape and its place, and finished samples stay, their logits ignored. So the kernels of a token
are always the same, and a CUDA graph starts all of them at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from socratiq.batch import RowAttention, make_batch
from socratiq.engine import distributed


class StaticCache:
    """Keys and values of B prompts with K samples each, in B rows of one length.

    A row holds its prompt, filled up to the longest, then token t of sample k at the place longest + t * K + k.
    """

    def __init__(self, policy, prompts: list[list[int]], samples: int, max_new_tokens: int):
        self.policy, self.samples, self.count, device = policy, samples, len(prompts), policy.device
        self.batch = make_batch(prompts, [[[0]]] * self.count).to(device)  # one token each, never read
        self.attend = policy.twin(RowAttention)(self.batch.rows)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.longest = int(lengths.max())
        self.width = self.longest + samples * max_new_tokens
        self.width += -self.width % 8  # as the kernels like it
        # The token that stands at each place of a prompt (B, longest); behind its end its last one, unseen.
        shared, own, _ = self.batch.rows
        places = torch.minimum(torch.arange(self.longest), lengths[:, None] - 1)
        starts = torch.tensor(own).cumsum(0) - torch.tensor(own)
        self.take = (places + starts[:, None] * (places >= shared)).to(device)
        self.seen = (torch.arange(self.width) < lengths[:, None]).to(device)  # (B, width)
        self.sample = torch.arange(samples, device=device)
        self.slots = self.longest - samples + self.sample  # (K,) of the next tokens, one token early
        self.positions = lengths.to(device).repeat_interleave(samples) - 1  # (B*K,), likewise
        self.tokens = torch.zeros_like(self.positions)
        self.everyone = torch.arange(len(self.tokens), device=device)
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keys, values (B, kv_heads, width, d)
        self.mask: torch.Tensor | None = None  # (B, heads of a key head, K, width), added to the scores
        self.steps = 0

    def prefill(self) -> torch.Tensor:
        """Run every prompt -> logits (B, V) of the first token of its completions."""
        batch = self.batch
        hidden = self.policy.hidden(batch.input_ids, batch.position_ids, self._keep_prompts, batch.read)
        return self.policy.lm.lm_head(hidden)

    def step(self, alive: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Run the token that each living sample (N,) has just drawn -> logits (N, V) of its next one."""
        self.steps += 1
        self.tokens[alive] = tokens
        self.positions += 1
        self.slots += self.samples
        self.mask[:, :, self.sample, self.slots] = 0
        if self.steps == 1 or alive.device.type != "cuda" or distributed.world() > 1:
            return self._run()[alive]
        if self.steps == 2:  # the first ran without a graph, so that kernels could set up
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._run()
        self.graph.replay()
        return self.logits[alive]

    def _run(self) -> torch.Tensor:
        return self.policy.lm.lm_head(self.policy.hidden(self.tokens, self.positions, self._decode, self.everyone))

    def _keep_prompts(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        def kept(x):  # (1, kv_heads, N, d) -> (B, kv_heads, width, d); zeros, since 0 times garbage may be NaN
            prompts = x[0].index_select(1, self.take.flatten()).unflatten(1, self.take.shape).transpose(0, 1)
            return F.pad(prompts, (0, 0, 0, self.width - self.longest))

        self.layers[layer] = kept(k), kept(v)
        if self.mask is None:
            mask = k.new_zeros(self.seen.shape).masked_fill_(~self.seen, float("-inf"))
            self.mask = mask[:, None, None].repeat(1, q.shape[1] // k.shape[1], self.samples, 1)
        return self.attend(layer, q, k, v, scale)

    def _decode(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """One token of every sample: q (1, heads, B*K, d), k and v (1, kv_heads, B*K, d) -> (1, B*K, heads, d)."""
        q, k, v = (x[0].unflatten(1, (self.count, self.samples)).transpose(0, 1) for x in (q, k, v))
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.slots, k)
        values.index_copy_(2, self.slots, v)
        group = self.mask.shape[1]  # heads that share a key head ask together
        q = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, kv_heads, group * K, d)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask.flatten(1, 2)[:, None], scale=scale)
        out = out.unflatten(2, (group, -1)).flatten(1, 2)  # (B, heads, K, d)
        return out.transpose(1, 2).flatten(0, 1)[None]
