"""The policy: a causal language model, its value head and its frozen reference, and the log-probs of a batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from socratiq import lora
from socratiq.batch import Batch, RowAttention
from socratiq.losses import entropy, gather_logprobs
from socratiq.run.errors import UserError


def _attention(module, query, key, value, attention_mask, scaling, attend=None, softcap=None, s_aux=None, **kwargs):
    """transformers calls this in every layer; `attend` (RowAttention, or the sampler's cache) does the work."""
    if attend is None:
        raise TypeError("a socratiq model is called through Policy, which says how its rows attend")
    if softcap is not None or s_aux is not None:
        raise UserError(f"{type(module).__name__} caps its scores or has sinks, which this project does not implement")
    # Under autocast the rotary embedding leaves q and k in float32; the matrix multiplications want one dtype.
    return attend(module.layer_idx, query.to(value.dtype), key.to(value.dtype), value, scaling), None


AttentionInterface.register("socratiq", _attention)


class Policy(nn.Module):
    """A causal language model, an optional value head on the same trunk, and the way to its frozen reference."""

    def __init__(self, lm: nn.Module, value_head: bool = False, autocast: bool = False):
        super().__init__()
        self.lm = lm
        # Starts at zero: every first value is the bias, which train_ppo.py sets to the mean score.
        self.value_head = nn.Linear(lm.config.hidden_size, 1) if value_head else None
        if value_head:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.value_head.to(self.device)
        self.autocast = autocast
        self.frozen: nn.Module | None = None  # a copy of lm, only where there are no adapters to switch off
        self.twins: dict[Callable, Callable] = {}  # plain function or class -> a faster one with the same results

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def precision(self) -> torch.autocast:
        """bfloat16 autocast, or nothing. Within the outermost one a trained weight is cast to bfloat16 once."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def twin(self, plain: Callable) -> Callable:
        """The faster twin of a plain function or class if there is one (models.py puts them there), else `plain`."""
        return self.twins.get(plain, plain)

    def hidden(self, input_ids, position_ids, attend, read) -> torch.Tensor:
        """Final hidden states (M, H) at the indices `read` (M,) of a sequence of N tokens.

        input_ids, position_ids (N,); attend(layer, q, k, v, scale) says which of them see each other.
        """
        trunk = self.lm.model(
            input_ids=input_ids[None], position_ids=position_ids[None], attend=attend, use_cache=False
        )
        return trunk.last_hidden_state[0].index_select(0, read)

    def keep_reference(self) -> None:
        """Remember the present weights as the reference: adapters can be switched off, else a copy is needed."""
        if not any(lora.adapters(self.lm)):
            self.frozen = copy.deepcopy(self.lm).requires_grad_(False)

    @contextlib.contextmanager
    def reference(self):
        """Inside, this is the frozen reference policy: adapters off, or the kept copy, and no gradients."""
        trained = self.lm
        if self.frozen is not None:
            self.lm = self.frozen
        lora.enable(trained, False)
        try:
            with torch.no_grad():
                yield self
        finally:
            self.lm = trained
            lora.enable(trained, True)

    def check_length(self, tokens: int, what: str) -> None:
        """Raise UserError if a sequence of that many tokens is longer than the model was made for.

        A sliding window, chunked attention and a rotary embedding that switches its factors change what a long sequence
        sees; this project implements none of them, so the sequence has to end before.
        """
        config = self.lm.config
        names = ["max_position_embeddings", "sliding_window", "attention_chunk_size"]
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("longrope", "dynamic"):
            names.append("original_max_position_embeddings")
        limits = {name: getattr(config, name, None) or rope.get(name) for name in names}
        for name, limit in limits.items():
            if limit and tokens > limit:
                remedy = "shorten the text or lower --max-prompt-tokens"
                raise UserError(f"{what}: {tokens} tokens, but the model's {name} is {limit}; {remedy}")

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        parameters = self.named_parameters()
        return {name: x for name, x in parameters if x.requires_grad and not name.startswith("frozen.")}


def token_logprobs(
    policy: Policy, batch: Batch, temperature: float = 1.0, watch: bool = False
) -> dict[str, torch.Tensor]:
    """log pi(y_t | prompt, y_<t) of every completion token: the one quantity that all three trainers need.

    Returns "logprobs" (B, K, C) float32, 0 where the mask is 0, and in the same shape "values" if the policy has a
    value head and, with `watch`, the "entropy" of each distribution, without gradients.
    """
    scored = batch.mask.bool()
    attend = policy.twin(RowAttention)(batch.rows)
    with policy.precision():
        hidden = policy.hidden(batch.input_ids, batch.position_ids, attend, batch.read)  # (M, H)
        found = policy.twin(head_logprobs)(policy.lm.lm_head, hidden, batch.tokens[scored], temperature, watch)
    if policy.value_head is not None:
        # States of norm 1: at smollm2's norm of about 43 a step of Adam, which moves each weight by the learning rate
        # (4e-4), could move V by 0.4 of the reward's range of 1. Detached: a critic that predicts nothing must not
        # change the trunk.
        found["values"] = policy.value_head(F.normalize(hidden.detach().float(), dim=-1)).squeeze(-1)  # (M,)
    return {name: torch.zeros_like(batch.mask).masked_scatter(scored, x) for name, x in found.items()}  # (B, K, C)


def head_logprobs(lm_head, hidden, tokens, temperature: float, watch: bool) -> dict[str, torch.Tensor]:
    """The head on the states (M, H) that predict the tokens (M,) -> "logprobs" (M,) and, to `watch`, "entropy" (M,)."""
    logits = lm_head(hidden).float() / temperature  # (M, V)
    found = {"logprobs": gather_logprobs(logits, tokens)}
    if watch:
        found["entropy"] = entropy(logits.detach())
    return found
