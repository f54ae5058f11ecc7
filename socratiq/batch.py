"""One prompt and its K completions side by side, rows laid end to end: the model runs no padding.

Here a row is one prompt and its K completions (SFT K=1, DPO K=2, PPO K=samples per prompt). The prompt is
run once, however many completions follow:

    index       0 1 2 3 4   5 6 7   8 9
    token       p p p p p   a a E   b E       E = end of sequence
    position    0 1 2 3 4   5 6 7   5 6       both completions continue after the prompt
    sees        prompt      prompt,a  prompt,b   (causal, and never the sibling)
    read        . . . . .   4 5 6   4 8       index of the hidden state that predicts the token

The B rows of a batch follow each other in a single sequence of N tokens. All prompts begin with the same
instruction, a quarter of a typical prompt: it comes first, once, and every row sees it. Projections, norms and MLP,
nearly all of a transformer's time, work on tokens one by one and so run without padding. Attention, the only part in
which tokens meet, runs row by row. The language-model head runs on the scored positions alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Rows(NamedTuple):
    """Where the rows are in the sequence of N tokens: N = shared + sum(lengths)."""

    shared: int  # tokens of the common start, which every row sees
    lengths: list[int]  # tokens of each row behind the common start
    visible: list[torch.Tensor]  # per row (L, shared + L), True where a token of the row may look


class Batch(NamedTuple):
    """B prompts with K completions each, of at most C tokens."""

    input_ids: torch.Tensor  # (N,) the common start of all prompts, then the rest of each row, end to end
    position_ids: torch.Tensor  # (N,) position of each token in its own sequence
    rows: Rows  # which tokens see each other
    tokens: torch.Tensor  # (B, K, C) completion tokens, EOS included; 0 where mask is 0
    mask: torch.Tensor  # (B, K, C) float, 1.0 on completion tokens
    read: torch.Tensor  # (M,) in the order of tokens[mask]: the index in N of the state that predicts each

    def to(self, device) -> Batch:
        """The same batch on another device."""
        rows = self.rows._replace(visible=[visible.to(device) for visible in self.rows.visible])
        return Batch(*(part if part is self.rows else part.to(device) for part in self))._replace(rows=rows)


def make_batch(prompts: list[list[int]], completions: list[list[list[int]]]) -> Batch:
    """Lay out B prompts and their completions; completions[b][k] ends in EOS. Every prompt has the same K.

    An empty completion has mask 0 everywhere. Raises ValueError for an empty prompt: nothing would predict the first
    token.
    """
    tokens, mask = pad_completions(completions)
    shared = common_start(prompts)
    input_ids, position_ids, read = list(prompts[0][:shared]), list(range(shared)), []
    lengths, visible = [], []
    for prompt, row in zip(prompts, completions, strict=True):
        if not prompt:
            raise ValueError("a prompt needs at least one token")
        row_start = len(input_ids)
        input_ids += prompt[shared:]
        position_ids += range(shared, len(prompt))
        last_of_prompt = len(input_ids) - 1
        for completion in row:
            # The last prompt token predicts the first completion token, which predicts the second, and so on.
            start = len(input_ids)
            read += [last_of_prompt, *range(start, start + len(completion) - 1)][: len(completion)]
            input_ids += completion
            position_ids += range(len(prompt), len(prompt) + len(completion))
        lengths.append(len(input_ids) - row_start)
        visible.append(sibling_mask(len(prompt), [len(completion) for completion in row])[shared:])
    return Batch(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        rows=Rows(shared, lengths, visible),
        tokens=tokens,
        mask=mask,
        read=torch.tensor(read, dtype=torch.long),
    )


def pad_completions(completions: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [b][k] -> tokens (B, K, C), 0 behind each completion, and mask (B, K, C), 1.0 on its tokens."""
    samples = len(completions[0])
    longest = max(1, max(len(completion) for row in completions for completion in row))
    tokens = torch.zeros(len(completions), samples, longest, dtype=torch.long)
    for b, row in enumerate(completions):
        if len(row) != samples:
            raise ValueError(f"every prompt needs {samples} completions, prompt {b} has {len(row)}")
        for k, completion in enumerate(row):
            tokens[b, k, : len(completion)] = torch.tensor(completion, dtype=torch.long)
    lengths = torch.tensor([[len(completion) for completion in row] for row in completions])  # (B, K)
    return tokens, (torch.arange(longest) < lengths[..., None]).float()


def common_start(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; every prompt keeps at least one of its own. 0 for fewer than two."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in dictionary order: what these two share, all share
    longest = max(0, min(map(len, prompts)) - 1)
    return next((i for i in range(longest) if first[i] != last[i]), longest)


def sibling_mask(prompt: int, completions: list[int]) -> torch.Tensor:
    """(S, S) of one row, True where it may look: causal, no completion sees another. S = prompt + sum(completions)."""
    owner = torch.tensor([0] * prompt + [k + 1 for k, length in enumerate(completions) for _ in range(length)])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return causal & ((owner[:, None] == owner[None, :]) | (owner[None, :] == 0))  # own tokens, or the prompt


class RowAttention:
    """Attention inside each row of a batch: causal, and blind to sibling completions."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __call__(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """q (1, heads, N, d), k and v (1, kv_heads, N, d) -> (1, N, heads, d)."""
        shared, lengths, visible = self.rows
        (q0, *q_rows), (k0, *k_rows), (v0, *v_rows) = (x.split([shared, *lengths], dim=2) for x in (q, k, v))
        outputs = []
        if shared:
            outputs.append(F.scaled_dot_product_attention(q0, k0, v0, is_causal=True, scale=scale, enable_gqa=True))
        for q_row, k_row, v_row, may_look in zip(q_rows, k_rows, v_rows, visible, strict=True):
            keys, values = torch.cat([k0, k_row], dim=2), torch.cat([v0, v_row], dim=2)
            outputs.append(
                F.scaled_dot_product_attention(q_row, keys, values, attn_mask=may_look, scale=scale, enable_gqa=True)
            )  # (1, heads, L, d)
        return torch.cat(outputs, dim=2).transpose(1, 2)  # (1, N, heads, d)
