"""The sampler's keys and values: those of a prompt once for all its K samples, with room behind for what they write.

Prompts of like length make a block, filled up to its longest, whose next tokens attend in one call. On the CPU little
is filled up, prompts whose last samples have finished leave, several at a time, and nobody looks behind the last token.
On a GPU there is one block, every tensor keeps its shape and its place, and finished samples stay, unheard: starting
kernels takes longer there than running them, and a list of kernels that is always the same is started as one, by a CUDA
graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from socratiq.batch import RowAttention, attend
from socratiq.engine import distributed, fused

# On the CPU:
FILL = 900  # tokens that the prompts of a block are filled up with at most: reading as many costs as much as a call
STAY = 0.75  # of a block's prompts, at most, go on when the others leave it, since all that stays is copied


class Block:
    """G prompts with K samples each. Token t of sample k has the place longest + t * K + k, behind those of prompts."""

    def __init__(self, prompts: list[int], tokens: list[torch.Tensor], samples: int, room: int, device: torch.device):
        """`tokens[b]` are the places of prompt b's tokens among those that are run; `room` is K * T or more."""
        tokens = [tokens[b] for b in prompts]
        lengths = [len(own) for own in tokens]
        self.prompts, self.samples = prompts, samples
        self.longest = max(lengths)
        self.width = self.longest + room
        self.width += -self.width % 8  # as the kernels like it
        # The token at each place of a prompt (G, longest); behind its end stands its last one, unseen.
        take = [F.pad(own, (0, self.longest - len(own)), value=int(own[-1])) for own in tokens]
        self.take = torch.stack(take).to(device)
        seen = torch.arange(self.width) < torch.tensor(lengths)[:, None]  # of the prompts
        self.seen = seen[:, None, None].to(device)  # (G, 1, 1, width)
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

    def leave(self, going_on: set[int]) -> None:
        """Give up the prompts that are not among these, if they are many enough."""
        rows = [row for row, prompt in enumerate(self.prompts) if prompt in going_on]
        if len(rows) <= STAY * len(self.prompts):
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
        """q (G, heads, K, d), k and v (G, kv_heads, K, d) -> (G, heads, K, d)."""
        keys, values = self.layers[layer]
        end, together = self.added.shape[-1], self.mask.shape[1]
        keys.index_copy_(2, self.slots, k)
        values.index_copy_(2, self.slots, v)
        q = q.unflatten(1, (-1, together)).flatten(2, 3) if together > 1 else q  # (G, kv_heads, together * K, d)
        out = F.scaled_dot_product_attention(
            *(q, keys[:, :, :end], values[:, :, :end], self.added), scale=scale, enable_gqa=together == 1
        )
        return out.unflatten(2, (together, -1)).flatten(1, 2) if together > 1 else out


def groups(lengths: list[int]) -> list[list[int]]:
    """Prompts, the shorter ones first, in runs of like length."""
    found = [[0]]
    for b in range(1, len(lengths)):
        if sum(lengths[b] - lengths[other] for other in found[-1]) <= FILL:
            found[-1].append(b)
        else:
            found.append([b])
    return found


class Cache:
    """Keys and values of B prompts, the shorter ones first, that begin with `shared` tokens in common."""

    def __init__(self, lengths: list[int], samples: int, max_new_tokens: int, shared: int, device: torch.device):
        self.static, self.samples, self.steps = fused.starts_cost(device), samples, 0
        self.rows = RowAttention([length - shared for length in lengths], [None] * len(lengths), shared)
        start, own = torch.arange(shared), torch.arange(shared, shared + sum(self.rows.lengths))
        tokens = [torch.cat([start, part]) for part in own.split(self.rows.lengths)]
        runs = [list(range(len(lengths)))] if self.static else groups(lengths)
        self.blocks = [Block(run, tokens, samples, samples * max_new_tokens, device) for run in runs]
        self.positions = torch.tensor(lengths, device=device).repeat_interleave(samples) - 1  # (B * K,), the last ones
        self.tokens = torch.zeros_like(self.positions)
        self.places: torch.Tensor | None = None  # (N,) among the samples of all prompts still there; None: all of them

    def prefill(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """Causal attention within each prompt, as in training, keeping keys and values."""
        for block in self.blocks:
            block.keep(layer, q, k, v)
        if self.static:
            return self.rows(layer, q, k, v, scale)
        shared, lengths = self.rows.shared, self.rows.lengths
        asking = q.split([shared, *lengths], 2)
        out = []
        if shared:
            k0, v0 = k[:, :, :shared], v[:, :, :shared]
            out = [attend(asking[0], k0, v0, self.rows.mask(None, asking[0], k0), scale)]
        for block in self.blocks:  # where a prompt's keys stand together, common start and all
            for row, b in enumerate(block.prompts):
                asked = [x[row : row + 1, :, : shared + lengths[b]] for x in block.layers[layer]]
                out.append(attend(asking[b + 1], *asked, self.rows.mask(b, asking[b + 1], asked[0]), scale))
        return torch.cat(out, dim=2).transpose(1, 2)

    def step(self, policy, alive: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Run the model on the token that each of the samples `alive` (N,) has drawn last -> logits (N, V)."""
        self.steps += 1
        self.positions += 1
        if not self.static:
            prompts = alive // self.samples
            going_on = set(prompts.tolist())
            for block in self.blocks:
                block.leave(going_on)
            self.blocks = [block for block in self.blocks if block.prompts]
            there = torch.tensor([prompt for block in self.blocks for prompt in block.prompts])
            everybody = len(alive) == len(there) * self.samples
            places = torch.searchsorted(there, prompts) * self.samples + alive % self.samples
            self.places = None if everybody else places
        self.counts = [len(block.prompts) for block in self.blocks]
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
        parts = (self.by_prompt(x).split(self.counts) for x in (q, k, v))
        out = torch.cat([block.decode(layer, *part, scale) for block, *part in zip(self.blocks, *parts, strict=True)])
        out = out.transpose(1, 2).flatten(0, 1)  # (N, heads, d)
        return (out if self.places is None else out.index_select(0, self.places))[None]

    def by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """(1, heads, N, d) -> (prompts still there, heads, K, d). What finished samples hold never matters."""
        x = x[0]
        if self.places is not None:
            x = x.new_zeros(len(x), sum(self.counts) * self.samples, x.shape[2]).index_copy_(1, self.places, x)
        return x.unflatten(1, (-1, self.samples)).transpose(0, 1)
