"""The sampler's cache on a GPU, where starting a kernel takes longer than running a small one.

Every tensor keeps its shape and its place: prompts are filled up to the longest, and samples that have finished stay in
the work, unheard. So a step is a fixed list of kernels, which a CUDA graph starts as one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from socratiq import distributed
from socratiq.batch import RowAttention


class StaticCache:
    """Keys and values of B prompts, once each, and behind each room for what its K samples write.

    A prompt's part is its `longest` places, then for every token t and sample k the place longest + t * K + k.
    """

    def __init__(self, lengths: list[int], samples: int, max_new_tokens: int, shared: int, device: torch.device):
        self.samples, self.longest, self.graph = samples, max(lengths), None
        self.room = samples * max_new_tokens
        self.room += -(self.longest + self.room) % 8  # as the kernels like it
        self.rows = RowAttention([length - shared for length in lengths], [None] * len(lengths), shared)
        places, ends = torch.arange(self.longest), shared + torch.tensor(self.rows.lengths).cumsum(0)
        own = torch.minimum(ends[:, None] - torch.tensor(lengths)[:, None] + places, ends[:, None] - 1)  # (B, longest)
        self.take = torch.where(places < shared, places, own).to(device)  # the token at each place
        self.seen = (places < torch.tensor(lengths)[:, None]).to(device)  # (B, longest) places of prompts
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keys, values (B, kv_heads, longest + room, d)
        self.sample = torch.arange(samples, device=device)
        self.slots = self.longest - samples + self.sample  # (K,) places of the last token written, before there is one
        self.everything = torch.arange(len(lengths) * samples, device=device)
        self.tokens = torch.zeros_like(self.everything)
        self.positions = torch.tensor(lengths, device=device).repeat_interleave(samples) - 1
        self.mask: torch.Tensor | None = None  # (B, heads per key head, K, longest + room), added to the scores

    def prefill(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """Causal attention within each prompt, as in training, keeping keys and values."""

        def kept(x):  # (1, kv_heads, N, d)
            return F.pad(x[0][:, self.take].transpose(0, 1), (0, 0, 0, self.room))

        self.layers[layer] = kept(k), kept(v)
        if self.mask is None:
            seen = F.pad(self.seen, (0, self.room))[:, None, None]
            mask = k.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
            self.mask = mask.repeat(1, q.shape[1] // k.shape[1], self.samples, 1)
        return self.rows(layer, q, k, v, scale)

    def step(self, policy, alive: torch.Tensor, tokens: torch.Tensor, step: int) -> torch.Tensor:
        """Run the model on the token that each of the samples `alive` (N,) has drawn last -> logits (N, V)."""
        self.tokens[alive] = tokens
        self.positions += 1
        self.slots += self.samples
        self.mask[:, :, self.sample, self.slots] = 0
        if step == 0 or self.tokens.device.type != "cuda" or distributed.world() > 1:
            return self.forward(policy)[alive]
        if self.graph is None:  # the first step has made what kernels make once
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.forward(policy)
        self.graph.replay()
        return self.logits[alive]

    def forward(self, policy) -> torch.Tensor:
        return policy(self.tokens, self.positions, self.decode, self.everything)["logits"]  # (B * K, V)

    def decode(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """One new token for every sample: q (1, heads, B * K, d) -> (1, B * K, heads, d)."""
        keys, values = self.layers[layer]
        for whole, new in ((keys, k), (values, v)):
            whole.index_copy_(2, self.slots, new[0].unflatten(1, (-1, self.samples)).transpose(0, 1))
        kv_heads = keys.shape[1]
        # Heads that share a key head ask together: (B, kv_heads, heads per key head * K, d)
        asking = q[0].unflatten(1, (-1, self.samples)).unflatten(0, (kv_heads, -1)).permute(2, 0, 1, 3, 4).flatten(2, 3)
        mask = self.mask.flatten(1, 2)[:, None]
        out = F.scaled_dot_product_attention(asking, keys, values, attn_mask=mask, scale=scale)
        out = out.unflatten(2, (-1, self.samples)).permute(0, 3, 1, 2, 4)  # (B, K, kv_heads, heads per key head, d)
        return out.flatten(2, 3).flatten(0, 1)[None]
