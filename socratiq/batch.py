"""One prompt and its K completions side by side, rows laid end to end, no padding anywhere.

A row is one prompt and the K completions that hang on it (SFT K=1, DPO K=2, PPO K=samples per prompt). The prompt is
run once, however many completions follow:

    index       0 1 2 3 4   5 6 7   8 9
    token       p p p p p   a a E   b E       E = end of sequence
    position    0 1 2 3 4   5 6 7   5 6       both completions continue after the prompt
    sees        prompt      prompt,a  prompt,b   (causal, and never the sibling)
    scored at   . . . . .   4 5 6   4 8       index of the hidden state that predicts the token

The B rows of a batch stand one behind the other in a single sequence of N tokens. What all prompts begin with (the
instruction, a quarter of a typical prompt) stands in front, once: every row sees it, and it is run once. Everything a
transformer does to tokens one by one (projections, norms, MLP: nearly all of its time) therefore runs without padding.
Attention, the only part in which tokens meet, runs row by row, or on a GPU as one call. The language-model head runs on
the scored positions alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from socratiq.engine import fused

FILLED = 512  # batches of more tokens are filled up to a multiple of fused.ROUND, so that sizes repeat
SHORT = 512  # keys of a row up to which the CPU's attention is that of fused.py
AT_ONCE = 2048  # and up to which a GPU attends to all rows in one call


class Batch(NamedTuple):
    """B prompts with K completions each, of at most C tokens."""

    input_ids: torch.Tensor  # (N,) the common start of all prompts, then the rest of each row, end to end
    position_ids: torch.Tensor  # (N,) position of each token in its own sequence
    attend: RowAttention  # attention within each row
    tokens: torch.Tensor  # (B, K, C) completion tokens, EOS included; 0 where mask is 0
    mask: torch.Tensor  # (B, K, C) float, 1.0 on completion tokens
    read: torch.Tensor  # (M,) for each of the M scored tokens, the index in N of the state that predicts it

    def to(self, device) -> Batch:
        return self._replace(
            **{name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "tokens", "mask", "read")}
        )


class RowAttention:
    """Attention inside each row of a batch: causal, and blind to sibling completions.

    The first `shared` tokens are the common start of all rows; `lengths` are the rows' own token counts. `masks[b]` is
    (L, shared + L), True where row b may look, or None for a plain causal row (K = 1).
    """

    def __init__(self, lengths: list[int], masks: list[torch.Tensor | None], shared: int = 0):
        self.lengths, self.masks, self.shared = lengths, masks, shared
        self.ready: dict = {}  # masks as `attend` wants them: made in the first layer, used in all

    def __call__(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """q (1, heads, N, d), k and v (1, kv_heads, N, d) -> (1, N, heads, d)."""
        if fused.starts_cost(q.device) and self.shared + max(self.lengths) <= AT_ONCE:
            return self.at_once(q, k, v, scale)
        (q0, *q_rows), (k0, *k_rows), (v0, *v_rows) = (x.split([self.shared, *self.lengths], dim=2) for x in (q, k, v))
        outputs = [attend(q0, k0, v0, self.mask(None, q0, k0), scale)] if self.shared else []
        for b, (q_row, k_row, v_row) in enumerate(zip(q_rows, k_rows, v_rows, strict=True)):
            if self.shared:
                k_row, v_row = torch.cat([k0, k_row], dim=2), torch.cat([v0, v_row], dim=2)
            outputs.append(attend(q_row, k_row, v_row, self.mask(b, q_row, k_row), scale))  # each (1, heads, L, d)
        return torch.cat(outputs, dim=2).transpose(1, 2)  # (1, N, heads, d)

    def at_once(self, q, k, v, scale: float) -> torch.Tensor:
        """The same in one call, rows filled up to the longest (fused.starts_cost)."""
        take, back, mask = self.grid(q, groups := q.shape[1] // k.shape[1])
        rows, width = take.shape

        def filled(x):  # (1, heads, N, d) -> (R, heads, L, d)
            return x.transpose(1, 2)[0].index_select(0, take.flatten()).unflatten(0, (rows, width)).transpose(1, 2)

        def whole(x):  # (1, kv_heads, N, d) -> (R, kv_heads, shared + L, d)
            return torch.cat([x[:, :, : self.shared].expand(rows, -1, -1, -1), filled(x)], dim=2)

        # Heads that share a key head ask together, so that keys need not be held once for each.
        asking = filled(q).unflatten(1, (-1, groups)).flatten(2, 3)  # (R, kv_heads, groups * L, d)
        out = F.scaled_dot_product_attention(asking, whole(k), whole(v), attn_mask=mask, scale=scale)
        out = out.unflatten(2, (groups, width)).permute(0, 3, 1, 2, 4)  # (R, L, kv_heads, groups, d)
        return out.flatten(2, 3).flatten(0, 1).index_select(0, back)[None]

    def grid(self, q, groups: int):
        """Where tokens stand when R rows of L places are attended to at once, the common start being a row of its own.

        Returns the token (R, L) at each place, the place (N,) in R * L of each token, and what is added to the scores
        (R, 1, groups * L, shared + L). A place behind the end of a row holds its last token, which nobody sees there.
        """
        if q.dtype not in self.ready:
            lengths, masks = [self.shared, *self.lengths], [None, *self.masks]
            if not self.shared:
                lengths, masks = lengths[1:], masks[1:]
            width = max(lengths)
            width += -(self.shared + width) % 8  # as the kernels like it
            places, ends = torch.arange(width), torch.tensor(lengths).cumsum(0)
            starts = ends - torch.tensor(lengths)
            take = torch.minimum(starts[:, None] + places, ends[:, None] - 1)
            back = torch.cat([row * width + places[:length] for row, length in enumerate(lengths)])
            visible = torch.ones(len(lengths), width, self.shared + width, dtype=torch.bool)
            for row, (length, mask) in enumerate(zip(lengths, masks, strict=True)):
                causal = places[:length, None] >= places
                own = causal if mask is None else F.pad(mask[:, self.shared :], (0, width - length))
                visible[row, :length] = F.pad(own, (self.shared, 0), value=row > 0)  # row 0 has the start as its own
            take, back, visible = (x.to(q.device) for x in (take, back, visible))
            added = q.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
            self.ready[q.dtype] = take, back, added.repeat(1, groups, 1)[:, None]
        return self.ready[q.dtype]

    def mask(self, b: int | None, q, k):
        """Of row b, or of the common start (None); causal rows of one length have one."""
        visible = None if b is None else self.masks[b]
        key = (q.dtype, q.shape[2], k.shape[2]) if visible is None else (q.dtype, b)
        if key not in self.ready:
            self.ready[key] = ready_mask(visible, q, k)
        return self.ready[key]


def ready_mask(visible: torch.Tensor | None, q, k):
    """What `attend` wants to know for these q and k, made of (Lq, Lk), True where q may look, or of None for causal."""
    if short(q, k):  # on the CPU
        return fused.additive_mask(visible, q, k)
    return causal_lower_right(q.shape[2], k.shape[2]) if visible is None else visible.to(q.device)


def short(q, k) -> bool:
    """Whether the attention of fused.py is the faster one."""
    return q.device.type == "cpu" and k.shape[2] <= SHORT


def attend(q, k, v, mask, scale: float) -> torch.Tensor:
    """Attention of the last Lq tokens of a row to all its Lk, with the mask that `ready_mask` made for them.

    q (1, heads, Lq, d), k and v (1, kv_heads, Lk, d) -> (1, heads, Lq, d).
    """
    if short(q, k):
        return fused.RowAttention.apply(q, k, v, mask, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def make_batch(prompts: list[list[int]], completions: list[list[list[int]]], samples: int | None = None) -> Batch:
    """Lay out B prompts and their completions; completions[b][k] ends in EOS. Every row has the same K, `samples`.

    An empty prompt is refused (nothing would predict the first token); an empty completion has mask 0 everywhere.
    B = 0 makes a batch of one token that nobody reads: among several processes, one without rows still has to run the
    model. `samples` need only be given where that can happen.
    """
    batch, samples = len(prompts), samples or len(completions[0])
    longest = max(1, max((len(completion) for row in completions for completion in row), default=1))
    tokens = torch.zeros(batch, samples, longest, dtype=torch.long)
    mask = torch.zeros(batch, samples, longest)
    shared = common_start(prompts)
    input_ids, position_ids, read, lengths, masks = prompts[0][:shared] if prompts else [], [*range(shared)], [], [], []
    for b, (prompt, row) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError("a prompt needs at least one token")
        if len(row) != samples:
            raise ValueError(f"every prompt needs {samples} completions, prompt {b} has {len(row)}")
        start = len(input_ids)
        input_ids += prompt[shared:]
        position_ids += range(shared, len(prompt))
        last = len(input_ids) - 1  # of the prompt
        for k, completion in enumerate(row):
            # The last prompt token predicts the first completion token, which predicts the second, and so on.
            own_start = len(input_ids)
            read += [last, *range(own_start, own_start + len(completion) - 1)][: len(completion)]
            input_ids += completion
            position_ids += range(len(prompt), len(prompt) + len(completion))
            tokens[b, k, : len(completion)] = torch.tensor(completion, dtype=torch.long)
            mask[b, k, : len(completion)] = 1.0
        lengths.append(len(input_ids) - start)
        masks.append(sibling_mask(len(prompt), [len(c) for c in row])[shared:] if samples > 1 else None)
    if not prompts:
        input_ids, position_ids, lengths, masks = [0], [0], [1], [None]
    if len(input_ids) > FILLED:  # one more row, which nobody reads
        fill = -len(input_ids) % fused.ROUND
        input_ids, position_ids = input_ids + [0] * fill, position_ids + [0] * fill
        lengths, masks = lengths + [fill] * (fill > 0), masks + [None] * (fill > 0)
    return Batch(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        attend=RowAttention(lengths, masks, shared),
        tokens=tokens,
        mask=mask,
        read=torch.tensor(read, dtype=torch.long),
    )


def common_start(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; every prompt keeps at least one of its own. 0 for fewer than two."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in dictionary order: what these two share, all share
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if first[i] != last[i]), max(0, longest))


def sibling_mask(prompt: int, completions: list[int]) -> torch.Tensor:
    """(L, L) of one row, True where it may look: causal, no completion sees another. L = prompt + sum(completions)."""
    owner = torch.tensor([0] * prompt + [k + 1 for k, length in enumerate(completions) for _ in range(length)])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return causal & ((owner[:, None] == owner[None, :]) | (owner[None, :] == 0))  # own tokens, or the prompt
