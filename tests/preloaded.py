"""Imported once by the process that tests/test_make_pairs.py forks its scripts from: what is slow the first time."""

import openai
import openai.resources.chat  # loaded at the first request otherwise
import torch

import socratiq.models
import socratiq.sampling
import socratiq.scorer.scorer  # noqa: F401  (with it, all three are loaded)

torch.set_num_threads(1)
weight = torch.zeros(2, requires_grad=True)
optimizer = torch.optim.LBFGS([weight], line_search_fn="strong_wolfe")


def loss():
    optimizer.zero_grad()
    value = (weight - 1).square().sum()
    value.backward()
    return value


optimizer.step(loss)
openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1/v1").close()
