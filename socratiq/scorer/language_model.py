"""What a frozen language model can say about a question: is it fluent, is it about this text, of which type is it?

Two readings answer all three: log-probs and hidden states of the question after the text, and after an empty text.
Questions about the same text share one run of that text.
"""

import math
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch

from socratiq.batch import make_batch
from socratiq.models import load_policy, load_tokenizer, pick_device
from socratiq.policy import Policy, token_logprobs
from socratiq.prompts import plain_ids
from socratiq.run.errors import bar

BETWEEN = "\n\n"  # stands between a text and the question
DEPTHS = (0.5, 0.8)  # where hidden states are read, as shares of the layers: type is clearest at both together
QUESTION_TOKENS, CONTEXT_TOKENS = 96, 384  # longer ones are cut
AT_ONCE = 32  # questions about the same text


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
        pairs = sorted(set(zip(contexts, questions, strict=True)))
        asked = {context: [q for _, q in some] for context, some in groupby(pairs, itemgetter(0))}
        parts = [(c, some[i : i + AT_ONCE]) for c, some in asked.items() for i in range(0, len(some), AT_ONCE)]
        found: dict[tuple[str, str], Reading] = {}
        for context, some in bar(parts, desc="read", delay=2):
            found |= {(context, q): reading for q, reading in zip(some, self._read(context, some), strict=True)}
        return [found[pair] for pair in zip(contexts, questions, strict=True)]

    def _read(self, context: str, questions: list[str]) -> list[Reading]:
        """Questions about one text: a packed batch of one prompt."""
        prompt = plain_ids(self.tokenizer, context)[:CONTEXT_TOKENS] + plain_ids(self.tokenizer, BETWEEN)
        completions = [plain_ids(self.tokenizer, question)[:QUESTION_TOKENS] for question in questions]
        states: list[torch.Tensor] = []

        def keep(module, args, output):
            states.append(output[0].float().cpu().flatten(0, -2))  # (N, H); some families give a tuple

        with self.policy.reference() as policy:
            layers = policy.lm.model.layers
            low, high = (layers[math.ceil(depth * len(layers)) - 1] for depth in DEPTHS)
            with low.register_forward_hook(keep), high.register_forward_hook(keep):
                batch = make_batch([prompt], [completions]).to(policy.device)
                logprobs = token_logprobs(policy, batch)["logprobs"][0].float().cpu()  # (K, C)
        lengths = [len(ids) for ids in completions]
        own = torch.cat(states, 1)[len(prompt) :].split(lengths)  # (n, 2 H) of each question
        features = [torch.cat([x.sum(0), x[-1:].sum(0) * len(x)]) / max(1, len(x)) for x in own]
        return [Reading(row[:n], x) for row, n, x in zip(logprobs, lengths, features, strict=True)]


def read(lm: LanguageModel | None, questions: list[str], contexts: list[str] | None = None) -> list[Reading]:
    """Every question after its context, or alone; without a language model the readings are empty."""
    nothing = Reading(torch.zeros(0), torch.zeros(0))
    return lm.read(contexts or [""] * len(questions), questions) if lm else [nothing] * len(questions)


def open_language_model(name: str, device="auto", dtype="auto", plain=False) -> LanguageModel | None:
    """The frozen model of that name; None for "none"."""
    if name == "none":
        return None
    policy = load_policy(name, device, dtype, trainable=False, plain=plain)
    policy.lm.to(pick_device(device))  # of several processes each has one of its own
    return LanguageModel(policy, load_tokenizer(name), name)
