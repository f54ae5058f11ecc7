"""What a frozen language model can say about a question: is it fluent, is it about this text, of which type is it?

Two readings answer all three: log-probs and hidden states of the question after the text, and after an empty text.
Questions about the same text hang on one run of that text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from socratiq.batch import common_start, make_batch
from socratiq.models import load_policy, load_tokenizer, pick_device
from socratiq.policy import Policy, token_logprobs
from socratiq.prompts import plain_ids
from socratiq.run.errors import bar

BETWEEN = "\n\n"  # stands between a text and the question
DEPTHS = (0.5, 0.8)  # where hidden states are read, as shares of the layers: type is clearest at both together
QUESTION_TOKENS, CONTEXT_TOKENS = 96, 384  # longer ones are cut
AT_ONCE = 16  # questions
SENTENCE = "What do you mean by that?"


class Reading(NamedTuple):
    """A question of n tokens after a text."""

    logprobs: torch.Tensor  # (n,) of each token, given what stands before it
    features: torch.Tensor  # (4 H,) hidden states at both DEPTHS: their mean over the tokens, and the last ones


class LanguageModel:
    """A frozen policy and its tokenizer, as the scorer sees them."""

    def __init__(self, policy: Policy, tokenizer, name: str = ""):
        self.policy, self.tokenizer, self.name = policy, tokenizer, name

    def read(self, contexts: list[str], questions: list[str]) -> list[Reading]:
        """Every question after its context; an empty context reads it alone."""
        asked = list(zip(contexts, questions, strict=True))
        pairs = sorted(set(asked), key=lambda pair: (pair[0], len(pair[1]), pair[1]))
        found: dict[tuple[str, str], Reading] = {}
        for start in bar(range(0, len(pairs), AT_ONCE), desc="read", delay=2):
            found |= self._forward(pairs[start : start + AT_ONCE])
        return [found[pair] for pair in asked]

    def signature(self) -> list[float]:
        """Log-probs of a fixed question: tells whether another model is the one that a scorer was fitted with."""
        return [round(x, 3) for x in self.read([""], [SENTENCE])[0].logprobs.tolist()]

    def _ids(self, text: str, longest: int | None = None) -> list[int]:
        return plain_ids(self.tokenizer, text)[:longest]

    def _forward(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Reading]:
        """One packed batch of (context, question), read on the CPU in float32."""
        asked: dict[str, list[str]] = {}
        for context, question in pairs:
            asked.setdefault(context, []).append(question)
        prompts, widest = (
            [self._ids(c, CONTEXT_TOKENS) + self._ids(BETWEEN) for c in asked],
            max(map(len, asked.values())),
        )
        completions = [
            [self._ids(q, QUESTION_TOKENS) for q in row] + [[]] * (widest - len(row)) for row in asked.values()
        ]
        states: list[torch.Tensor] = []

        def keep(module, args, output):
            states.append((output[0] if isinstance(output, tuple) else output)[0].float().cpu())  # (1, N, H) -> (N, H)

        with self.policy.reference() as policy:
            layers = policy.lm.model.layers
            deepest = max(1, len(layers) - 1)  # the last layer may run on scored tokens alone
            depths = [min(deepest, math.ceil(depth * len(layers))) for depth in DEPTHS]
            hooks = [layers[depth - 1].register_forward_hook(keep) for depth in depths]
            try:
                logprobs = token_logprobs(policy, make_batch(prompts, completions).to(policy.device))["logprobs"]
            finally:
                for hook in hooks:
                    hook.remove()
        found, shared = {}, common_start(prompts)
        rest = torch.cat(states, 1)[shared:]  # (N, 2 H), row by row: the rest of the prompt, then its completions
        for b, (context, questions) in enumerate(asked.items()):
            rest = rest[len(prompts[b]) - shared :]
            for k, question in enumerate(questions):
                n = len(completions[b][k])
                last = rest[n - 1] if n else torch.zeros(rest.shape[1])
                features = torch.cat([rest[:n].sum(0) / max(1, n), last])
                found[context, question] = Reading(logprobs[b, k, :n].float().cpu(), features)
                rest = rest[n:]
        return found


def open_language_model(name: str, device: str = "auto", dtype: str = "auto") -> LanguageModel | None:
    """The frozen model of that name; None for "none"."""
    if name == "none":
        return None
    policy = load_policy(name, device, dtype, trainable=False)
    policy.lm.to(pick_device(device))  # of several processes each has one of its own
    return LanguageModel(policy, load_tokenizer(name), name)
