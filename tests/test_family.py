"""A model's family is either right to the last digit or refused in one line (socratiq/family.py).

Tiny random models in the shapes of real families go through transformers' own saving and our own opening.
"""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from socratiq import lora
from socratiq.family import check_family, largest_difference
from socratiq.models import load_policy, load_tokenizer
from socratiq.run.errors import UserError
from socratiq.saving import save_policy

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # so that a wrong computation shows
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def write(folder, family, **more):
    """A random model of the family in `folder`, with tiny's tokenizer."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **more}))
    for name, weight in lm.named_parameters():
        if "norm" in name or "bias" in name:  # not 1, not 0
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    lm.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


SUPPORTED = {family: {} for family in ("qwen2", "qwen3", "olmo2", "smollm3", "granite", "phi3")} | {
    "llama": {"attention_dropout": 0.5},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"sliding_window": 64},
    "starcoder2": {"residual_dropout": 0.5},
    "seed_oss": {"residual_dropout": 0.5},
    "mixtral": EXPERTS,
}


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_these_families_agree_with_transformers(tmp_path, family, grad_checkpoint):
    folder = write(tmp_path / family, family, **SUPPORTED[family])
    for plain in (False, True):
        opened = load_policy(folder, "cpu", "float32", lora_rank=4, grad_checkpoint=grad_checkpoint, plain=plain)
        opened.train()  # as a user might: no dropout is left to switch on
        assert largest_difference(opened) < 1e-3


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),  # a short convolution
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),  # a recurrence
        ("granite", {"logits_scaling": 8.0}),  # something after the head
        ("cohere", {"logit_scale": 0.06}),
        ("gemma2", {"sliding_window": 64}),  # scores are capped
        ("stablelm", {}),  # its layers hand no arguments on
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),  # no .model.layers
    ],
)
def test_these_families_are_refused_in_one_line(tmp_path, family, more):
    folder = write(tmp_path / family, family, **more)
    with pytest.raises(UserError) as refused:
        load_policy(folder, "cpu", "float32", lora_rank=4)
    message = str(refused.value)
    assert message.startswith(f"--model {folder}: ") and "ForCausalLM" in message and "\n" not in message


def late_multiplier(module, args, out):
    out.logits = out.logits * 1.5


def live_dropout(module, args, out):
    return torch.nn.functional.dropout(out, 0.5, training=True)


def convolution(module, args, out):
    return out + out.roll(1, 1)  # over the sequence as it stands, so that rows mix


@pytest.mark.parametrize(
    ("place", "change"),
    [("", late_multiplier), ("model.layers.1.mlp", live_dropout), ("model.layers.1.mlp", convolution)],
)
def test_a_computation_that_transformers_does_not_share_is_caught(place, change):
    opened = load_policy("tiny", "cpu", "float32")
    check_family(opened, "tiny")
    opened.lm.get_submodule(place).register_forward_hook(change)
    with pytest.raises(UserError, match="LlamaForCausalLM is not supported: its log-probs would be wrong by"):
        check_family(opened, "tiny")


@pytest.mark.parametrize(("family", "layers", "count"), [("phi3", 2, 4), ("starcoder2", 2, 6), ("llama", 2, 7)])
def test_every_linear_layer_of_a_block_gets_an_adapter(tmp_path, family, layers, count):
    opened = load_policy(write(tmp_path / family, family), "cpu", "float32", lora_rank=4)
    assert len(list(lora.adapters(opened.lm))) == layers * count
    assert not any(name.startswith("lm_head") for name, _ in lora.adapters(opened.lm))


def test_a_router_gets_no_adapter_and_experts_without_one_are_named(tmp_path, capsys):
    opened = load_policy(write(tmp_path / "mixtral", "mixtral", **EXPERTS), "cpu", "float32", lora_rank=4)
    names = {name.rsplit(".", 1)[-1] for name, _ in lora.adapters(opened.lm)}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= names and not names & {"gate", "router"}
    assert "adapters on 8 linear layers; without: " in capsys.readouterr().out


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(tmp_path):
    folder = write(tmp_path / "small", "llama", vocab_size=1000)
    with pytest.raises(UserError, match=r"its tokenizer has 1024 tokens, its embedding only 1000 rows"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("setting", "tokens"),
    [
        ({"max_position_embeddings": 100}, 101),
        ({"sliding_window": 50}, 51),
        ({"attention_chunk_size": 60}, 61),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 40}}, 41),
    ],
)
def test_sequences_beyond_what_the_project_implements_are_refused(setting, tokens):
    opened = load_policy("tiny", "cpu", "float32")
    for name, value in setting.items():
        setattr(opened.lm.config, name, value)
    opened.check_length(tokens - 1, "rows.csv row 1")
    expected = rf"rows.csv row 1: {tokens} tokens, but the model's \w+ is {tokens - 1}; shorten"
    with pytest.raises(UserError, match=expected):
        opened.check_length(tokens, "rows.csv row 1")


def test_what_is_written_stops_where_it_learnt_to_stop(tmp_path):
    """The tokenizer's EOS comes first in both configs; a published temperature beside greedy decoding is no error."""
    opened, tokenizer = load_policy("tiny", "cpu", "float32"), load_tokenizer("tiny")
    opened.lm.config.eos_token_id, opened.lm.generation_config.eos_token_id = 7, [7, 8]
    opened.lm.generation_config.do_sample, opened.lm.generation_config.temperature = False, 0.9
    save_policy(opened, tokenizer, tmp_path, "tiny")
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.eos_token_id, 7, 8]


def test_others_open_a_merged_mixture_of_experts(tmp_path):
    folder = write(tmp_path / "mixtral", "mixtral", **EXPERTS)
    opened = load_policy(folder, "cpu", "float32", lora_rank=4)
    with torch.no_grad():
        for _, adapter in lora.adapters(opened.lm):
            torch.nn.init.normal_(adapter.lora_B, std=0.1)
    save_policy(opened, load_tokenizer("tiny"), tmp_path / "out", folder)
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    ids = torch.tensor([[1, 5, 7, 9]])
    opened.lm.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, opened.lm(ids).logits, rtol=0, atol=1e-4)
