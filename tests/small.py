"""A Llama of a few thousand weights, and batches for it: small enough to try every claim on within seconds."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from socratiq import lora
from socratiq.policy import Policy

VOCABULARY, EOS = 12, 2


def small_lm(seed=0, attention="socratiq", vocabulary=VOCABULARY):
    """A two-layer Llama with random weights, large enough for its distributions to be far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def small_policy(seed=0, lora_rank=0, value_head=False, vocabulary=VOCABULARY):
    """A policy around `small_lm`. With a rank, adapters that still do nothing; the reference is kept in either case."""
    lm = small_lm(seed, vocabulary=vocabulary)
    if lora_rank:
        lora.add_lora(lm, lora_rank)
    policy = Policy(lm, value_head=value_head)
    policy.keep_reference()
    return policy


def small_rows(samples=1, rows=4, seed=0):
    """Ragged prompts (3 to 8 tokens) and completions (1 to 6 tokens, EOS at the end): prompts[b], completions[b][k]."""
    torch.manual_seed(seed)

    def tokens(least, most):
        length = int(torch.randint(least, most + 1, ()))
        return torch.randint(3, VOCABULARY, (length,)).tolist()

    prompts = [[1, *tokens(2, 7)] for _ in range(rows)]
    return prompts, [[[*tokens(0, 5), EOS] for _ in range(samples)] for _ in range(rows)]


def stir(policy, seed=1, size=0.1):
    """Move every trainable weight a little, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.add_(size * torch.randn_like(weight))
