"""Gradients written by hand (fused.py, lora.py, short rows in batch.py) against autograd on the plain expression."""

import random
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from small import small_lm

from socratiq import lora
from socratiq.batch import RowAttention, attend, common_start, make_batch, ready_mask
from socratiq.engine import fused
from socratiq.engine.cache import Cache
from socratiq.engine.packed import packed
from socratiq.lora import AddLowRank
from socratiq.policy import Policy


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def compare(ours, plain, inputs):
    """Same value and same gradient for each input, to float32 rounding."""
    value, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(value, inputs, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asking, asked", [(7, 7), (3, 7), (1, 5)])
def test_attention_of_a_short_row(asking, asked):
    mask = torch.ones(asking, asked, dtype=torch.bool).tril(asked - asking)

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)

    inputs = numbers(1, 6, asking, 8), numbers(1, 2, asked, 8), numbers(1, 2, asked, 8)
    compare(lambda q, k, v: attend(q, k, v, ready_mask(None, q, k), 0.3), plain, inputs)


def test_attention_of_a_long_row_is_that_of_a_short_one(monkeypatch):
    q, k, v = numbers(1, 6, 5, 8), numbers(1, 2, 9, 8), numbers(1, 2, 9, 8)
    short = attend(q, k, v, ready_mask(None, q, k), 0.3)
    monkeypatch.setattr("socratiq.batch.SHORT", 0)
    torch.testing.assert_close(attend(q, k, v, ready_mask(None, q, k), 0.3), short, rtol=1e-5, atol=1e-5)


def test_rms_norm():
    def plain(x, weight):
        return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    compare(lambda x, w: fused.RMSNorm.apply(x, w, 1e-5, x.dtype), plain, (numbers(2, 5, 16), numbers(16)))


def test_rotary_embedding():
    angles = numbers(1, 5, 4).detach()
    cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))

    def plain(x):
        a, b = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(2) + torch.cat([-b, a], dim=-1) * sin.unsqueeze(2)

    compare(lambda x: fused.Rotary.apply(x, cos, sin), plain, (numbers(1, 5, 3, 8),))


def test_swiglu():
    compare(fused.SwiGLU.apply, lambda gate, up: F.silu(gate) * up, (numbers(2, 5, 16), numbers(2, 5, 16)))


@pytest.mark.parametrize("biased", [False, True])
def test_an_adapted_linear_layer(biased):
    weight, bias = numbers(6, 8).detach(), numbers(6).detach() if biased else None

    def plain(x, A, B):
        return F.linear(x, weight, bias) + 0.5 * (x @ A.T) @ B.T

    inputs = numbers(1, 5, 8), numbers(3, 8), numbers(6, 3)
    compare(lambda x, *rest: AddLowRank.apply(x, None, weight, bias, *rest, 0.5), plain, inputs)


def test_an_adapter_beside_another_kind_of_layer():
    def plain(x, y, A, B):
        return y + 0.5 * (x @ A.T) @ B.T

    inputs = numbers(1, 5, 8), numbers(1, 5, 6), numbers(3, 8), numbers(6, 3)
    compare(lambda x, y, *rest: AddLowRank.apply(x, y.clone(), None, None, *rest, 0.5), plain, inputs)


@pytest.mark.parametrize(
    "prompts, shared",
    [
        ([], 0),
        ([[1, 2]], 0),  # a single row has nobody to share with
        ([[1, 2, 3], [1, 2, 4, 5]], 2),
        ([[1, 2], [1, 2]], 1),  # each keeps a token of its own
        ([[1], [1, 2]], 0),
        ([[1, 2], [3, 2]], 0),
    ],
)
def test_common_start(prompts, shared):
    assert common_start(prompts) == shared


def test_the_common_start_stands_in_the_batch_once():
    batch = make_batch([[5, 6, 7], [5, 6, 8, 9]], [[[1, 2]], [[3, 2]]])
    assert batch.input_ids.tolist() == [5, 6, 7, 1, 2, 8, 9, 3, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert batch.read.tolist() == [2, 3, 6, 7]


def test_a_large_batch_is_filled_up_with_tokens_that_nobody_reads():
    prompt, completions = [7] * 600, [[1, 2], [3]]
    batch = make_batch([prompt, [8] * 9], [completions, completions])
    assert batch.input_ids.numel() == 640 and sum(batch.attend.lengths) == 640
    assert batch.attend.lengths[:2] == [603, 12] and batch.read.max() < 615


def test_every_linear_layer_norm_and_mlp_is_taken_over():
    lm = small_lm()
    fused.fuse(lm)
    taken = [type(module).__name__ for module in lm.modules() if "forward" in vars(module)]
    layers = ["LlamaAttention", "LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm", "LlamaRMSNorm"] * 2
    assert sorted(taken) == sorted(["Linear"] * 15 + layers)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    inputs = numbers(2, 5, 8), numbers(6, 8), numbers(6) if bias else None
    compare(
        lambda *given: fused.Linear.apply(*given, *[None] * (not bias)),
        lambda *given: F.linear(*given),
        inputs[: 2 + bias],
    )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_mlp_computes_its_product_again_to_the_same_gradients(autocast, rank):
    gradients = []
    for fuse in (False, True):
        lm = small_lm().eval()
        if rank:
            lora.add_lora(lm, rank)
            for _, adapter in lora.adapters(lm):
                torch.nn.init.normal_(adapter.lora_B)
        if fuse:
            fused.fuse(lm)
        mlp, x = lm.model.layers[0].mlp, numbers(1, 9, 32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = mlp(x)
        y.float().square().sum().backward()
        trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
        gradients.append([x.grad, *[parameter.grad for parameter in trained]])
    close = 5e-2 if autocast else 1e-5
    for mine, plain in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(mine, plain, rtol=close, atol=close * plain.abs().max().item())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_fused_layers_have_the_same_values_and_gradients_and_end_at_the_tokens_read(autocast, training, rank):
    read, results = torch.tensor([3, 4, 4, 8]), []
    for fuse in (False, True):
        lm = small_lm().train(training)
        if rank:
            lora.add_lora(lm, rank)
            for _, adapter in lora.adapters(lm):
                torch.nn.init.normal_(adapter.lora_B, std=0.3)
        if fuse:
            fused.fuse(lm)
        ids, attend = torch.arange(9)[None], RowAttention([9], [None])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            trunk = lm.model(input_ids=ids, position_ids=ids, attend=attend, read=read, use_cache=False)
        hidden = trunk.last_hidden_state if fuse else trunk.last_hidden_state.index_select(1, read)
        hidden.float().square().mul(numbers(1, 4, 32).detach()).sum().backward()
        results.append([hidden, *[parameter.grad for parameter in lm.model.parameters() if parameter.requires_grad]])
    close = 5e-2 if autocast else 1e-5
    for mine, plain in zip(*results[::-1], strict=True):
        torch.testing.assert_close(mine.float(), plain.float(), rtol=close, atol=close * plain.abs().max().item())


def test_what_is_computed_again_is_computed_once_for_all_who_ask_and_is_not_kept():
    calls, (x, a, b) = [], (numbers(3, 4), numbers(4, 2), numbers(4, 5))

    def compute():
        calls.append(1)
        return x.detach() * 2

    y = x * 2
    with fused.again(y, compute):
        loss = (y @ a).sum() + (y.square().sum(-1, keepdim=True) @ b[:1]).sum()
    kept = weakref.ref(y.untyped_storage())
    del y
    assert kept() is None and not calls
    loss.backward()
    assert len(calls) == 1
    torch.testing.assert_close(a.grad, (2 * x.detach()).sum(0)[:, None].expand(4, 2))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_compute_the_same(autocast, bias):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias), torch.nn.Linear(40, 16, bias=bias))
    lora.add_lora(layers, 4, targets=("0",))
    layers[0].lora_B.data.normal_()
    x, close = torch.randn(1, 5, 24), 2e-2 if autocast else 1e-5
    results = []
    for enabled in (True, False):
        lora.enable(layers, enabled)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain = layers(x)
            with packed(layers, rows=5):
                results.append(layers(x))
                torch.testing.assert_close(results[-1], plain, rtol=close, atol=close)
            assert torch.equal(layers(x), plain)
    assert not torch.allclose(*results, rtol=1e-1)


FAMILIES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"head_dim": 16},  # as Mistral-Nemo's, not hidden_size / heads
    "Qwen2": {},  # biases at query, key and value
    "Qwen3": {"head_dim": 8},  # norms of query and key
    "Gemma": {"head_dim": 8},  # none of fused.py's: gelu, and norms by 1 + weight
}


@pytest.mark.parametrize("adapted", [(), ("q_proj", "up_proj"), lora.TARGETS])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_models_compute_the_same(family, autocast, adapted):
    """Prefill and every token after it, for three prompts of which one ends early."""
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**shape, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")
    lm = model._from_config(config, attn_implementation="socratiq").eval()
    fused.fuse(lm)
    if adapted:
        lora.add_lora(lm, 4, targets=adapted)
    for name, weight in lm.named_parameters():
        if "norm" in name or "bias" in name or "lora_B" in name:  # not 1, not 0
            weight.data.add_(0.1 * torch.randn_like(weight))
    whole = [fused.is_fused_layer(layer) for layer in lm.model.layers]
    assert whole == [family != "Gemma"] * 2

    prompts = [[1, 5, 8], [1, 5, 7, 9], [1, 5, 7, 6, 11, 3]]

    def logits():
        cache, given = Cache([3, 4, 6], 1, 4, 0, torch.device("cpu")), [token for prompt in prompts for token in prompt]
        positions = [place for prompt in prompts for place in range(len(prompt))]
        yield policy(*map(torch.tensor, (given, positions)), cache.prefill, torch.tensor([2, 6, 12]))["logits"]
        for step, alive in enumerate(([0, 1, 2], [0, 2], [0, 2])):
            yield cache.step(policy, torch.tensor(alive), torch.tensor([b + 20 + step for b in alive]))

    policy = Policy(lm, autocast=autocast)
    with torch.no_grad(), policy.precision():
        plain = list(logits())
        with packed(lm, rows=3):
            read = list(logits())
        again = list(logits())
    close = 0.1 if autocast else 1e-4
    for a, b, c in zip(plain, read, again, strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=close, atol=close)
        assert torch.equal(a, c)


def test_packed_layers_are_plain_again_after_an_error():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(RuntimeError), torch.no_grad(), packed(layer, rows=1):
        layer(torch.randn(1, 9))
    assert "forward" not in vars(layer[0])


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("shared", [0, 7])
def test_rows_attended_to_at_once_are_those_one_by_one(samples, shared):
    """As a GPU does it, on rows of all lengths: the value, and the gradient of every query, key and value."""
    draw = random.Random(samples)
    prompts = [[9] * shared + [b] + [5] * draw.randrange(20) for b in range(5)]
    completions = [[[1] * draw.randrange(9) for _ in range(samples)] for _ in prompts]
    rows = make_batch(prompts, completions).attend
    tokens = rows.shared + sum(rows.lengths)
    inputs = numbers(1, 6, tokens, 8), numbers(1, 2, tokens, 8), numbers(1, 2, tokens, 8)
    compare(lambda *qkv: rows.at_once(*qkv, 0.3), lambda *qkv: rows(0, *qkv, 0.3), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_as_one_kernel_is_the_same_norm(dtype, monkeypatch):
    norm, x = torch.nn.Module(), numbers(2, 5, 16)
    norm.weight, norm.variance_epsilon = torch.nn.Parameter(1 + numbers(16).detach()), 1e-5
    ours = fused.normed(norm, x, dtype)
    monkeypatch.setattr(fused, "starts_cost", lambda device: True)
    plain = fused.normed(norm, x, dtype)
    assert ours.dtype == plain.dtype == dtype
    close = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, plain, **close)
    for a, b in zip(*(torch.autograd.grad(y.sum(), (x, norm.weight)) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, **close)
