"""What a frozen language model can say about a question: is it fluent, is it about this text, of which type is it?

Two short readings answer all three. Alone, after an empty line:  log p(question)  and hidden states in the middle of
the model and late in it. After the text:  log p(question | text)  and the same states there. Questions about the same
text hang on one run of that text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from socratiq.batch import common_start, make_batch
from socratiq.models import load_policy, load_tokenizer, pick_device
from socratiq.policy import Policy, token_logprobs
from socratiq.prompts import plain_ids

BETWEEN = "\n\n"  # stands between a text and the question, and alone before a question that is read alone
DEPTHS = (0.5, 0.8)  # where hidden states are read, as shares of the layers: type is clearest at both together
QUESTION_TOKENS, CONTEXT_TOKENS, FORWARD_TOKENS = 96, 384, 2048  # longer texts are cut; tokens run at once
REMEMBERED = 5_000  # questions: 70 kB each
SENTENCE = "What do you mean by that?"


class Reading(NamedTuple):
    """A question read after an empty line, or after a text."""

    ids: list[int]  # its n tokens
    logprobs: torch.Tensor  # (n,) of each, given what stands before it
    hidden: torch.Tensor  # (n, 2 H) hidden states there, at both DEPTHS

    @property
    def features(self) -> torch.Tensor:
        """(4 H,) the mean of the states, and the last ones. Of no token it is zeros."""
        mean = self.hidden.sum(0) / max(1, len(self.ids))
        return torch.cat([mean, self.hidden[-1] if self.ids else mean])


class LanguageModel:
    """A frozen policy and its tokenizer, as the scorer sees them. Remembers what it has read."""

    def __init__(self, policy: Policy, tokenizer, name: str = ""):
        self.policy, self.tokenizer, self.name = policy, tokenizer, name
        self.alone: dict[str, Reading] = {}
        self.given: dict[tuple[str, str], Reading] = {}

    def read_alone(self, questions: list[str]) -> list[Reading]:
        """Every question by itself."""
        unread = sorted({q for q in questions if q not in self.alone}, key=lambda q: (len(q), q))
        if len(self.alone) > REMEMBERED:
            self.alone = {q: self.alone[q] for q in questions if q in self.alone}
        ids = {q: self._ids(q, QUESTION_TOKENS) for q in unread}
        for part in _parts(unread, lambda q: len(ids[q]) + 1, FORWARD_TOKENS // 4):
            # Siblings after one short prompt: a single row, in which no question sees another.
            readings = self._forward([self._ids(BETWEEN)], [[ids[q] for q in part]])[0]
            self.alone |= dict(zip(part, readings, strict=True))
        return [self.alone[q] for q in questions]

    def read_given(self, contexts: list[str], questions: list[str]) -> list[Reading]:
        """Every question after its context."""
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
            for c, readings in zip(part, self._forward([prompts[c] for c in part], rows), strict=True):
                self.given |= {(c, q): reading for q, reading in zip(unread[c], readings)}  # noqa: B905  (empty ones)
        return [self.given[pair] for pair in pairs]

    def forget(self) -> None:
        """What a question is worth depends, in the last bits, on what it is read together with: a fresh start."""
        self.alone, self.given = {}, {}

    def signature(self) -> list[float]:
        """Log-probs of a fixed question: tells whether another model is the one that a scorer was fitted with."""
        return [round(x, 3) for x in self.read_alone([SENTENCE])[0].logprobs.tolist()]

    def _ids(self, text: str, longest: int | None = None) -> list[int]:
        return plain_ids(self.tokenizer, text)[:longest]

    def _forward(self, prompts, completions) -> list[list[Reading]]:
        """What completions[b][k] is after prompts[b], on the CPU in float32: one packed batch."""
        seen: list[torch.Tensor] = []

        def keep(module, args, output):
            seen.append((output[0] if isinstance(output, tuple) else output)[0].float().cpu())  # (1, N, H) -> (N, H)

        with self.policy.reference() as policy:
            layers = policy.lm.model.layers
            most = max(1, len(layers) - 1)  # the last layer runs on scored tokens alone
            depths = [min(most, math.ceil(depth * len(layers))) for depth in DEPTHS]
            hooks = [layers[depth - 1].register_forward_hook(keep) for depth in depths]
            try:
                logprobs = token_logprobs(policy, make_batch(prompts, completions).to(policy.device))["logprobs"]
            finally:
                for hook in hooks:
                    hook.remove()
        shared, logprobs = common_start(prompts), logprobs.float().cpu()
        found, start = [], shared
        for b, row in enumerate(completions):  # end to end: the rest of the prompt, then its completions
            start += len(prompts[b]) - shared
            found.append([])
            for k, ids in enumerate(row):
                states = [layer[start : start + len(ids)] for layer in seen]  # (n, H) each
                found[b].append(Reading(ids, logprobs[b, k, : len(ids)], torch.cat(states, 1)))
                start += len(ids)
        return found


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


def open_language_model(name: str, device: str = "auto", dtype: str = "auto") -> LanguageModel | None:
    """The frozen model of that name; None for "none"."""
    if name == "none":
        return None
    policy = load_policy(name, device, dtype, trainable=False)
    policy.lm.to(pick_device(device))  # of several processes each has one of its own
    return LanguageModel(policy, load_tokenizer(name), name)
