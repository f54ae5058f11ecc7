"""Each twin of the engine against the plain function that it stands for, in value and gradient (test_identities.py runs
the identities under both)."""

import pytest
import torch
from small import EOS, small_policy, small_rows, stir
from test_family import write

from socratiq import lora
from socratiq.batch import make_batch
from socratiq.engine import head, padding, speed_up
from socratiq.engine.packed import can_pack, packed
from socratiq.models import load_policy, load_tokenizer
from socratiq.policy import head_logprobs, token_logprobs
from socratiq.prompts import encode_completion, encode_prompt
from socratiq.sampling import sample

DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])  # whose twins are used; all run on the CPU


def results(policy, rows, temperature=0.7):
    """Log-probs, values and entropies of a batch, and the gradients of all trained weights."""
    out = token_logprobs(policy, make_batch(*rows), temperature, watch=True)
    (out["logprobs"].sum() + out["values"].sum()).backward()
    return [*out.values(), *(weight.grad for weight in policy.trainable().values())]


def assert_same(found, close=1e-5):
    """Both results, of the plain functions first, agree but for rounding."""
    for plain, twin in zip(*found, strict=True):
        torch.testing.assert_close(twin, plain, rtol=close, atol=close * max(1.0, plain.abs().max().item()))


def distance(found, exact) -> float:
    """The largest difference of two results, as a share of the largest number beside it."""
    return max(((x - y).abs().max() / y.abs().max().clamp(min=1)).item() for x, y in zip(found, exact, strict=True))


# ------------------------------------------------------------------------------------------------- whole models


@DEVICES
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_tiny_has_the_same_log_probs_and_gradients_and_samples_the_same_tokens(device, samples, lora_rank):
    tokenizer = load_tokenizer("tiny")
    prompts = [encode_prompt(tokenizer, "Dogs are good. " * n, "Clarity", 200) for n in (1, 4, 2)]
    texts = ["What is good?", "Why?", "Which dogs do you mean, and who says that they are good?"]
    completions = [[encode_completion(tokenizer, text) for text in texts[:samples]]] * 3
    found, sampled = [], []
    for plain in (True, False):
        policy = load_policy("tiny", "cpu", "float32", lora_rank, value_head=True, plain=True)
        if not plain:
            speed_up(policy, torch.device(device))
        stir(policy)
        found.append(results(policy, (prompts, completions)))
        sampled.append(sample(policy, prompts, samples, 12, tokenizer.eos_token_id, seeds=3))
    assert_same(found)
    assert sampled[0] == sampled[1]


FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 16},  # as Mistral-Nemo's, not hidden_size / heads
    "qwen2": {},  # biases at query, key and value
    "qwen3": {},  # norms of query and key
    "gemma": {},  # gelu: its MLP is none of fused.py's
}


@DEVICES
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same(family, autocast, device, tmp_path):
    folder, found, sampled = write(tmp_path, family, **FAMILIES[family]), [], []
    for plain, rounded in ((True, False), (True, autocast), (False, autocast)):
        policy = load_policy(folder, "cpu", "float32", lora_rank=4, value_head=True, plain=True)
        policy.autocast = rounded
        stir(policy)
        if not plain:
            speed_up(policy, torch.device(device))
            taken = {type(module).__name__ for module in policy.modules() if "forward" in vars(module)}
            assert taken == {"LoRALinear"} | ({f"{family.title()}MLP"} - {"GemmaMLP"})
        found.append(results(policy, small_rows(samples=2)))
        sampled.append(sample(policy, small_rows()[0], 2, 8, eos_id=EOS, temperature=0))
    if autocast and family == "gemma":  # bfloat16 alone moves its gradients by .3
        assert distance(found[2], found[0]) < 1.25 * distance(found[1], found[0])
    else:
        assert_same(found[1:], 0.1 if autocast else 1e-4)
    assert autocast or sampled[1] == sampled[2]


def test_plain_leaves_the_engine_out():
    plain, engine = (load_policy("tiny", "cpu", "float32", 4, plain=plain) for plain in (True, False))
    assert not plain.twins and not any("forward" in vars(module) for module in plain.modules())
    assert engine.twins and any("forward" in vars(module) for module in engine.modules())


# ----------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("chunk", [5, 29, 30])
def test_the_head_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr(head, "CHUNK", chunk)
    rows, found = small_rows(samples=2), []
    assert len(make_batch(*rows).read) == 29
    for plain in (True, False):
        policy = small_policy(value_head=True)
        if not plain:
            policy.twins[head_logprobs] = head.in_chunks
        found.append(results(policy, rows))
    assert_same(found)


def test_logits_in_bfloat16_are_divided_by_the_temperature_in_float32():
    """As the sampler does: the policy that is scored is the one that was sampled."""
    lm_head = torch.nn.Linear(8, 50, bias=False, dtype=torch.bfloat16)
    hidden, tokens = torch.randn(6, 8, dtype=torch.bfloat16), torch.arange(6)
    expected = (lm_head(hidden).float() / 0.7).log_softmax(-1)[torch.arange(6), tokens]
    torch.testing.assert_close(head_logprobs(lm_head, hidden, tokens, 0.7, False)["logprobs"], expected)


# ------------------------------------------------------------------------------------------------------ padding


def test_in_bfloat16_batches_are_padded_to_sizes_that_repeat_and_only_rounding_changes():
    rows, found, sizes = small_rows(samples=2), [], []
    assert len(make_batch(*rows).input_ids) % padding.MULTIPLE
    for bfloat16 in (False, True):
        policy = small_policy(value_head=True)
        policy.autocast = bfloat16
        speed_up(policy, torch.device("cpu"))
        assert ("hidden" in vars(policy)) == bfloat16
        if bfloat16:
            policy.lm.model.layers[0].register_forward_hook(lambda layer, given, out: sizes.append(out.shape[1]))
            policy.lm.lm_head.register_forward_hook(lambda head, given, out: sizes.append(out.shape[0]))
            token_logprobs(policy, make_batch(*rows))
            assert len(sizes) == 2 and not any(size % padding.MULTIPLE for size in sizes)
        policy.autocast = False  # the same layout, compared in float32
        found.append(results(policy, rows))
    assert_same(found)


# ------------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_compute_the_same_and_are_plain_again_afterwards(autocast, bias):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias), torch.nn.Linear(40, 16, bias=bias))
    layers[0] = lora.LoRALinear(layers[0], 4, 8.0)
    layers[0].lora_B.data.normal_()
    x, close = torch.randn(1, 5, 24), 2e-2 if autocast else 1e-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for enabled in (True, False):
            lora.enable(layers, enabled)
            plain = layers(x)
            with packed(layers, rows=5):
                packs = can_pack(layers[1].weight, torch.bfloat16 if autocast else torch.float32)
                assert packs == ("forward" in vars(layers[1])) == ("forward" in vars(layers[0].base))
                assert packs or autocast  # bfloat16 needs a processor that multiplies in it
                torch.testing.assert_close(layers(x), plain, rtol=close, atol=close)
            assert torch.equal(layers(x), plain)
        with pytest.raises(RuntimeError), packed(layers, rows=1):
            layers(torch.randn(1, 9))
    assert not any("forward" in vars(module) for module in layers.modules())
