"""The sampler's keys and values: those of a prompt once for all its K samples, with room behind for what they write.

Prompts of like length make a block, filled up to its longest, whose next tokens attend in one call. On the CPU blocks
are small, so that little is filled up, a prompt leaves when its last sample has finished, and nobody looks behind the
last token. On a GPU there is one block, every tensor keeps its shape and its place, and finished samples stay, unheard:
starting kernels takes longer there than running them, and a list of kernels that is always the same is started as one,
by a CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from socratiq import distributed, fused
from socratiq.batch import RowAttention, attend, short

BLOCK = 8  # prompts, on the CPU


class Block:
    """G prompts with K samples each. Token t of sample k has the place longest + t * K + k, behind those of prompts."""

    def __init__(self, first: int, tokens: list[torch.Tensor], samples: int, room: int, device: torch.device):
        """`tokens[g]` are the places of prompt first + g's tokens among those that are run; `room` is K * T or more."""
        lengths = [len(own) for own in tokens]
        self.prompts, self.samples = list(range(first, first + len(tokens))), samples
        self.longest = max(lengths)
        self.width = self.longest + room
        self.width += -self.width % 8  # as the kernels like it
        # The token at each place of a prompt (G, longest); behind its end stands its last one, unseen.
        take = [F.pad(own, (0, self.longest - len(own)), value=int(own[-1])) for own in tokens]
        self.take = torch.stack(take).to(device)
        self.seen = (torch.arange(self.width) < torch.tensor(lengths)[:, None])[:, None, None].to(
            device
        )  # of the prompts
        self.sample = torch.arange(samples, device=device)
        self.slots = self.longest - samples + self.sample  # (K,) places of the last token, before there is one
        # Heads that share a key head ask together, but for a single token on the CPU, where each asks as fast.
        self.together = samples > 1 or fused.starts_cost(device)
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keys, values (G, kv_heads, width, d)
        self.mask: torch.Tensor | None = None  # (G, heads together, K, width), added to the scores

    def keep(self, layer: int, q, k, v) -> None:
        """Take over keys and values of the prompts from (1, kv_heads, N, d), and get ready for q (1, heads, N, d)."""
        room = self.width - self.longest

        def kept(x):  # -> (G, kv_heads, width, d); not empty: 0 times garbage may be NaN
            mine = x[0].index_select(1, self.take.flatten()).unflatten(1, self.take.shape).transpose(0, 1)
            return torch.cat([mine, mine.new_zeros(()).expand(*mine.shape[:2], room, mine.shape[3])], dim=2)

        self.layers[layer] = kept(k), kept(v)
        if self.mask is None:
            mask = k.new_zeros(self.seen.shape).masked_fill_(~self.seen, float("-inf"))
            self.mask = mask.repeat(1, q.shape[1] // k.shape[1] if self.together else 1, self.samples, 1)

    def leave(self, going_on: list[int]) -> None:
        """Give up the prompts that are not among these."""
        rows = [row for row, prompt in enumerate(self.prompts) if prompt in going_on]
        if len(rows) < len(self.prompts):
            self.prompts, rows = [self.prompts[row] for row in rows], torch.tensor(rows, dtype=torch.long)
            self.mask = self.mask[rows]
            self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}

    def turn(self, end: int | None) -> None:
        """Go on to the next token. Of the places `end` are looked at, or those that are written to."""
        self.slots += self.samples
        self.mask[:, :, self.sample, self.slots] = 0
        end = int(self.slots[-1]) + 1 if end is None else end
        self.added = self.mask.flatten(1, 2)[:, None, :, :end]  # (G, 1, heads together * K, end)

    def decode(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """q (1, heads, G * K, d), k and v (1, kv_heads, G * K, d) -> (G * K, heads, d)."""
        keys, values = self.layers[layer]
        end, together = self.added.shape[-1], self.mask.shape[1]
        q, k, v = (x[0].unflatten(1, (-1, self.samples)).transpose(0, 1) for x in (q, k, v))  # (G, heads, K, d)
        keys.index_copy_(2, self.slots, k)
        values.index_copy_(2, self.slots, v)
        q = q.unflatten(1, (-1, together)).flatten(2, 3) if together > 1 else q  # (G, kv_heads, together * K, d)
        out = F.scaled_dot_product_attention(
            *(q, keys[:, :, :end], values[:, :, :end], self.added), scale=scale, enable_gqa=together == 1
        )
        out = out.unflatten(2, (together, -1)).flatten(1, 2) if together > 1 else out  # (G, heads, K, d)
        return out.transpose(1, 2).flatten(0, 1)


class Cache:
    """Keys and values of B prompts, the shorter ones first, that begin with `shared` tokens in common."""

    def __init__(self, lengths: list[int], samples: int, max_new_tokens: int, shared: int, device: torch.device):
        self.static, self.samples, self.steps = fused.starts_cost(device), samples, 0
        self.rows = RowAttention([length - shared for length in lengths], [None] * len(lengths), shared)
        start, own = torch.arange(shared), torch.arange(shared, shared + sum(self.rows.lengths))
        tokens = [torch.cat([start, part]) for part in own.split(self.rows.lengths)]
        size, room = len(lengths) if self.static else BLOCK, max(samples * max_new_tokens, fused.ROUND)
        self.blocks = [Block(b, tokens[b : b + size], samples, room, device) for b in range(0, len(lengths), size)]
        self.positions = (
            torch.tensor(lengths, device=device).repeat_interleave(samples) - 1
        )  # (B * K,) of the last token
        self.tokens = torch.zeros_like(self.positions)
        self.places: torch.Tensor | None = (
            None  # (N,) among all samples of the prompts still there; None if they are all
        )

    def prefill(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """Causal attention within each prompt, as in training, keeping keys and values."""
        for block in self.blocks:
            block.keep(layer, q, k, v)
        if self.static:
            return self.rows(layer, q, k, v, scale)
        shared, lengths, asking = (
            self.rows.shared,
            self.rows.lengths,
            q.split([self.rows.shared, *self.rows.lengths], 2),
        )
        out = []
        if shared:
            k0, v0 = k[:, :, :shared], v[:, :, :shared]
            out = [attend(asking[0], k0, v0, self.rows.mask(None, asking[0], k0), scale)]
        for block in self.blocks:  # where a prompt's keys stand together, so that none has to be copied again
            keys, values = block.layers[layer]
            for row, b in enumerate(block.prompts):
                length = shared + lengths[b]
                mask = self.rows.mask(b, asking[b + 1], keys[:, :, :length])
                # The mask of a short row is that of one filled up (fused.additive_mask).
                fill = -lengths[b] % fused.ROUND if short(asking[b + 1], keys[:, :, :length]) else 0
                asked = (x[row : row + 1, :, : length + fill] for x in (keys, values))
                filled = F.pad(asking[b + 1], (0, 0, 0, fill))
                seen = F.scaled_dot_product_attention(filled, *asked, attn_mask=mask, scale=scale, enable_gqa=True)
                out.append(seen[:, :, : lengths[b]])
        return torch.cat(out, dim=2).transpose(1, 2)

    def step(self, policy, alive: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Run the model on the token that each of the samples `alive` (N,) has drawn last -> logits (N, V)."""
        self.steps += 1
        self.positions += 1
        if not self.static:
            prompts, own = (alive // self.samples).unique(return_inverse=True)
            for block in self.blocks:
                block.leave(prompts.tolist())
            self.blocks = [block for block in self.blocks if block.prompts]
            everybody = len(alive) == len(prompts) * self.samples
            self.places = None if everybody else own * self.samples + alive % self.samples
        self.counts = [len(block.prompts) * self.samples for block in self.blocks]
        for block in self.blocks:
            block.turn(block.width if self.static else None)
        if not self.static:
            return self.forward(policy, tokens, self.positions[alive])
        self.tokens[alive] = tokens
        if self.steps == 1 or alive.device.type != "cuda" or distributed.world() > 1:
            return self.forward(policy, self.tokens, self.positions)[alive]
        if self.steps == 2:  # the first has made what kernels make once
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.forward(policy, self.tokens, self.positions)
        self.graph.replay()
        return self.logits[alive]

    def forward(self, policy, tokens, positions) -> torch.Tensor:
        read = torch.arange(len(tokens), device=tokens.device)
        return policy(tokens, positions, self.decode, read)["logits"]

    def decode(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """One new token for each of N samples: q (1, heads, N, d), k and v (1, kv_heads, N, d) -> (1, N, heads, d)."""
        q, k, v = (self.spread(x).split(self.counts, dim=2) for x in (q, k, v))
        out = torch.cat([block.decode(layer, *part, scale) for block, *part in zip(self.blocks, q, k, v, strict=True)])
        return (out if self.places is None else out.index_select(0, self.places))[None]

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """From N samples to all of the prompts still there: (1, heads, N, d). What finished ones hold never matters."""
        if self.places is None:
            return x
        return x.new_zeros(1, x.shape[1], sum(self.counts), x.shape[3]).index_copy_(2, self.places, x)
