"""What a frozen language model can say about a question: is it fluent, is it about this text, of which type is it?

Two short readings answer all three. Alone, after an empty line:  log p(question)  and the hidden states in the middle
of the model. After the text:  log p(question | text). Questions about the same text hang on one run of that text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from socratiq.batch import make_batch
from socratiq.model import Policy, token_logprobs
from socratiq.prompts import plain_ids

BETWEEN = "\n\n"  # stands between a text and the question, and alone before a question that is read alone
DEPTH = 0.5  # where the hidden states are read, as a share of the layers: type is clearest in the middle
QUESTION_TOKENS, CONTEXT_TOKENS, FORWARD_TOKENS = 96, 384, 2048  # longer texts are cut; tokens run at once
REMEMBERED = 20_000
SENTENCE = "What do you mean by that?"


class Alone(NamedTuple):
    """A question read after an empty line."""

    logprobs: torch.Tensor  # (n,) of each of its tokens
    features: torch.Tensor  # (2 H,) hidden states: mean over the question, and at its end


class LanguageModel:
    """A frozen policy and its tokenizer, as the scorer sees them. Remembers what it has read."""

    def __init__(self, policy: Policy, tokenizer, name: str = ""):
        self.policy, self.tokenizer, self.name = policy, tokenizer, name
        self.alone: dict[str, Alone] = {}
        self.given: dict[tuple[str, str], torch.Tensor] = {}

    def read_alone(self, questions: list[str]) -> list[Alone]:
        """Every question by itself."""
        unread = sorted({q for q in questions if q not in self.alone}, key=lambda q: (len(q), q))
        if len(self.alone) > REMEMBERED:
            self.alone = {q: self.alone[q] for q in questions if q in self.alone}
        ids = {q: self._ids(q, QUESTION_TOKENS) for q in unread}
        for part in _parts(unread, lambda q: len(ids[q]) + 1, FORWARD_TOKENS // 4):
            # Siblings after one short prompt: a single row, in which no question sees another.
            logprobs, hidden = self._forward([self._ids(BETWEEN)], [[ids[q] for q in part]])
            start = len(self._ids(BETWEEN))
            for k, q in enumerate(part):
                own = hidden[start : start + len(ids[q])]  # (n, H)
                features = torch.cat([own.mean(0), own[-1]]) if len(own) else hidden.new_zeros(2 * hidden.shape[1])
                self.alone[q] = Alone(logprobs[0, k, : len(ids[q])], features)
                start += len(ids[q])
        return [self.alone[q] for q in questions]

    def read_given(self, contexts: list[str], questions: list[str]) -> list[torch.Tensor]:
        """log p(token | context, tokens before) of every question after its context: (n,) each."""
        pairs = list(zip(contexts, questions, strict=True))
        if len(self.given) > REMEMBERED:
            self.given = {pair: self.given[pair] for pair in pairs if pair in self.given}
        unread: dict[str, list[str]] = {}
        for c, q in sorted(set(pairs) - self.given.keys()):
            unread.setdefault(c, []).append(q)
        prompts = {c: self._ids(c, CONTEXT_TOKENS) + self._ids(BETWEEN) for c in unread}
        asked = {c: [self._ids(q, QUESTION_TOKENS) for q in unread[c]] for c in unread}
        for part in _parts(list(unread), lambda c: len(prompts[c]) + sum(map(len, asked[c])), FORWARD_TOKENS):
            widest = max(len(asked[c]) for c in part)
            rows = [asked[c] + [[]] * (widest - len(asked[c])) for c in part]
            logprobs, _ = self._forward([prompts[c] for c in part], rows)
            for b, c in enumerate(part):
                for k, q in enumerate(unread[c]):
                    self.given[c, q] = logprobs[b, k, : len(asked[c][k])]
        return [self.given[pair] for pair in pairs]

    def forget(self) -> None:
        """What a question is worth depends, in the last bits, on what it is read together with: a fresh start."""
        self.alone, self.given = {}, {}

    def signature(self) -> list[float]:
        """Log-probs of a fixed question: tells whether another model is the one that a scorer was fitted with."""
        return [round(x, 3) for x in self.read_alone([SENTENCE])[0].logprobs.tolist()]

    def _ids(self, text: str, longest: int | None = None) -> list[int]:
        return plain_ids(self.tokenizer, text)[:longest]

    def _forward(self, prompts, completions) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (B, K, C) and hidden states (N, H) of one packed batch, on the CPU in float32."""
        seen: list[torch.Tensor] = []

        def keep(module, args, output):
            seen.append((output[0] if isinstance(output, tuple) else output)[0].float().cpu())  # (1, N, H) -> (N, H)

        with self.policy.reference() as policy:
            layers = policy.lm.model.layers
            hook = layers[max(0, math.ceil(DEPTH * len(layers)) - 1)].register_forward_hook(keep)
            try:
                logprobs = token_logprobs(policy, make_batch(prompts, completions).to(policy.device))["logprobs"]
            finally:
                hook.remove()
        return logprobs.float().cpu(), seen[0]


def _parts(items: list, size, most: int):
    """Items in runs whose sizes add up to at most `most`, one item at least."""
    part, total = [], 0
    for item in items:
        if part and total + size(item) > most:
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part
