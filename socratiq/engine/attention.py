"""Twins of batch.RowAttention: a backward pass made for short rows on a CPU, and all rows in one call on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from socratiq.batch import RowAttention, Rows

SHORT = 512  # keys of a row up to which the CPU makes its weights (heads, L, shared + L) in the backward pass
AT_ONCE = 2048  # keys of a row up to which a GPU attends to all rows in one call


class ShortRows:
    """For a CPU: PyTorch's kernel forward, products of matrices backward; long rows as in the plain class.

    The kernel's own backward pass is made for long rows: in bfloat16 it takes twice as long on a row of 200 tokens.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        causal = torch.ones(rows.shared, rows.shared, dtype=torch.bool).tril()
        self.visible = [causal, *rows.visible]  # the common start is one more row, which sees itself alone
        self.masks: list[torch.Tensor] = []  # made in the first layer, used in all: 0 where a token may look, else -inf

    def __call__(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """q (1, heads, N, d), k and v (1, kv_heads, N, d) -> (1, N, heads, d). More tokens than the rows' get 0."""
        shared, lengths, _ = self.rows
        surplus = q.shape[2] - shared - sum(lengths)
        if surplus:  # padding.py
            out = self(layer, *(x[:, :, :-surplus] for x in (q, k, v)), scale)
            return F.pad(out, (0, 0, 0, 0, 0, surplus))
        if shared + max(lengths) > SHORT:
            return RowAttention(self.rows)(layer, q, k, v, scale)
        if not self.masks:
            self.masks = [q.new_zeros(x.shape).masked_fill_(~x, float("-inf")) for x in self.visible]
        sizes = [shared, *lengths]
        (q0, *q_rows), (k0, *k_rows), (v0, *v_rows) = (x.split(sizes, dim=2) for x in (q, k, v))
        outputs = [ShortRow.apply(q0, k0, v0, self.masks[0], scale)] if shared else []
        for q_row, k_row, v_row, mask in zip(q_rows, k_rows, v_rows, self.masks[1:], strict=True):
            keys, values = torch.cat([k0, k_row], dim=2), torch.cat([v0, v_row], dim=2)
            outputs.append(ShortRow.apply(q_row, keys, values, mask, scale))  # (1, heads, L, d)
        return torch.cat(outputs, dim=2).transpose(1, 2)  # (1, N, heads, d)


class ShortRow(torch.autograd.Function):
    """softmax(scale q k^T + mask) v, whose weights (heads, Lq, Lk) are made again in the backward pass.

    q (1, heads, Lq, d), k and v (1, kv_heads, Lk, d), mask (Lq, Lk) -> (1, heads, Lq, d). In the backward pass heads
    that share a key head are stacked into one matrix.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.scale = mask, scale
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v = (x[0] for x in ctx.saved_tensors)
        stacked = len(k), -1, q.shape[-1]
        asking, d_out_ = (q * ctx.scale).reshape(stacked), d_out[0].reshape(stacked)  # (kv_heads, group * Lq, d)
        scores = torch.bmm(asking, k.mT)  # (kv_heads, group * Lq, Lk)
        scores.unflatten(1, (-1, q.shape[1])).add_(ctx.mask)
        weights = scores.softmax(-1)
        d_v = torch.bmm(weights.mT, d_out_)
        d_weights = torch.bmm(d_out_, v.mT)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)  # p * (dp - sum(p dp))
        d_q = torch.bmm(d_scores, k).mul_(ctx.scale).view(q.shape)
        d_k = torch.bmm(d_scores.mT, asking)
        return d_q[None], d_k[None], d_v[None], None, None


class RowsAtOnce:
    """For a GPU, where starting a kernel takes longer than a row: one call, rows filled up to the longest."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.grid: tuple | None = None  # made in the first layer, used in all

    def __call__(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """q (1, heads, N, d), k and v (1, kv_heads, N, d) -> (1, N, heads, d)."""
        shared, lengths, _ = self.rows
        if shared + max(lengths) > AT_ONCE:
            return RowAttention(self.rows)(layer, q, k, v, scale)
        group = q.shape[1] // k.shape[1]  # heads that share a key head ask together: keys are held once for all
        self.grid = self.grid or self.make_grid(q, group)
        take, back, mask = self.grid
        rows, width = take.shape

        def filled(x):  # (1, heads, N, d) -> (R, heads, L, d)
            return x[0].index_select(1, take.flatten()).unflatten(1, (rows, width)).transpose(0, 1)

        def with_start(x):  # (1, kv_heads, N, d) -> (R, kv_heads, shared + L, d)
            return torch.cat([x[:, :, :shared].expand(rows, -1, -1, -1), filled(x)], dim=2)

        asking = filled(q).unflatten(1, (-1, group)).flatten(2, 3)  # (R, kv_heads, group * L, d)
        out = F.scaled_dot_product_attention(asking, with_start(k), with_start(v), attn_mask=mask, scale=scale)
        out = out.unflatten(2, (group, width)).permute(0, 3, 1, 2, 4)  # (R, L, kv_heads, group, d)
        return out.flatten(2, 3).flatten(0, 1).index_select(0, back)[None]

    def make_grid(self, q, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where tokens stand when R rows of L places are attended to at once, the common start being a row of its own.

        Returns the token (R, L) at each place, the place (N,) in R * L of each token, and the mask that is added to the
        scores (R, 1, group * L, shared + L). Behind the end of a row stands its last token, which no other sees there.
        """
        shared, lengths, visible = self.rows
        causal = F.pad(torch.ones(shared, shared, dtype=torch.bool, device=q.device).tril(), (shared, 0))
        if shared:
            lengths, visible = [shared, *lengths], [causal, *visible]
        width = max(lengths)
        width += -(shared + width) % 8  # as the kernels like it
        places, ends = torch.arange(width), torch.tensor(lengths).cumsum(0)
        starts = ends - torch.tensor(lengths)
        take = torch.minimum(starts[:, None] + places, ends[:, None] - 1)
        back = torch.cat([row * width + places[:length] for row, length in enumerate(lengths)])
        seen = torch.ones(len(lengths), width, shared + width, dtype=torch.bool, device=q.device)
        for row, may_look in enumerate(visible):
            seen[row, : len(may_look)] = F.pad(may_look, (0, shared + width - may_look.shape[1]))
        mask = q.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        return take.to(q.device), back.to(q.device), mask.repeat(1, group, 1)[:, None]
