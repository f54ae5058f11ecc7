"""The memory table, from a model's config alone, against figures that are known or worked out by hand.

What real processes take is another matter: bench/memory_check.py.
"""

import sys

import pytest
from transformers import LlamaConfig

from socratiq import errors, memory
from socratiq.memory import SHAPES, Work, estimate, held, shape_of

LLAMA_8B = SHAPES["Llama 8B"]
WEIGHTS_8B = 8_030_261_248


@pytest.mark.parametrize(
    "name, weights",
    [  # as their publishers count them
        ("smollm2", 134_515_008),
        ("Llama 1B", 1_235_814_400),
        ("Llama 3B", 3_212_749_824),
        ("Llama 8B", WEIGHTS_8B),
        ("Llama 70B", 70_553_706_496),
    ],
)
def test_known_models_have_as_many_weights_as_they_are_known_for(name, weights):
    assert SHAPES[name].weights == weights


def test_a_shape_is_read_from_config_json_alone(tmp_path):
    config = LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert shape_of(str(tmp_path)) == LLAMA_8B


def test_adapters_by_hand():
    """r * (in + out) for each of seven projections: query and output are 4096 x 4096, key and value 4096 x 1024."""
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert LLAMA_8B.adapters(16) == 32 * 16 * layer == 41_943_040


def test_adapters_are_counted_as_training_makes_them():
    from socratiq.model import load_policy

    policy = load_policy("tiny", "cpu", "float32", lora_rank=4)
    trained = sum(weight.numel() for weight in policy.trainable().values())
    assert trained == SHAPES["tiny"].adapters(4)
    assert sum(weight.numel() for weight in policy.lm.parameters()) - trained == SHAPES["tiny"].weights


def test_llama_8b_with_adapters_in_bfloat16():
    parts = estimate(LLAMA_8B, Work(stage="sft", rank=16, half=True))
    assert parts["weights"] == 2 * WEIGHTS_8B == pytest.approx(16.06e9, rel=1e-4)
    assert parts["adapters"] == 4 * 41_943_040  # float32
    assert parts["optimiser"] == 8 * 41_943_040  # Adam's two moments, float32
    assert parts["reference"] == 0  # adapters off is the reference
    assert parts["total"] == sum(x for name, x in parts.items() if name not in ("total", "at"))


def test_every_weight_trained_takes_16_bytes_a_weight():
    """Weight 4, gradient 4, moments 8; and PPO keeps a copy as the reference."""
    work = Work(stage="ppo", rank=0, half=True, samples=2)
    parts = memory.backward(LLAMA_8B, work)
    assert parts["weights"] + parts["gradients"] + parts["optimiser"] == 16 * WEIGHTS_8B
    wide = 128256 * 4096 + 65 * 4096  # embedding and norms, by which nobody multiplies in bfloat16
    assert parts["reference"] == 2 * WEIGHTS_8B + 2 * wide
    assert memory.backward(LLAMA_8B, work._replace(stage="dpo"))["reference"] == 0  # its log-probs are on the disk
    assert estimate(LLAMA_8B, work)["total"] > 3 * estimate(LLAMA_8B, work._replace(rank=16))["total"]


@pytest.mark.parametrize("rank", [0, 16])
def test_eight_devices_hold_an_eighth_each_and_what_is_gathered(rank):
    work = Work(rank=rank)
    one, eight = held(LLAMA_8B, work), held(LLAMA_8B, work._replace(devices=8))
    for name in ("adapters", "optimiser"):
        assert eight[name] == one[name] / 8
    gathered = eight["weights"] - one["weights"] / 8  # embedding and head (in float32 if trained) and three layers
    assert gathered == (2 if rank else 4) * 2 * 128256 * 4096 + 3 * 2 * LLAMA_8B.linear
    assert estimate(LLAMA_8B, work._replace(devices=8))["total"] < estimate(LLAMA_8B, work)["total"]


def test_four_bits_a_weight_and_a_little():
    work = Work(rank=16)
    projections = 32 * LLAMA_8B.linear
    rest = 2 * (WEIGHTS_8B - projections)  # embedding, head and norms stay in bfloat16
    packed = held(LLAMA_8B, work._replace(four_bit=True))["weights"] - rest
    assert packed / projections * 8 == pytest.approx(4.127, abs=1e-3)  # bits; QLoRA's 4 + 0.127


def test_what_saves_memory_saves_it():
    for stage in ("sft", "dpo", "ppo"):
        work = Work(stage=stage, samples=2, rows=16)
        total = estimate(LLAMA_8B, work)["total"]
        assert estimate(LLAMA_8B, work._replace(grad_checkpoint=True))["total"] < total
        assert estimate(LLAMA_8B, work._replace(rows=8))["total"] < total
        assert estimate(LLAMA_8B, work._replace(four_bit=True))["total"] < total


def test_a_cpu_samples_with_a_packed_copy_of_the_weights():
    work = Work(stage="sampling", prompt=200, completion=16)
    plain, packed = (estimate(SHAPES["smollm2"], work._replace(packs_weights=packs)) for packs in (False, True))
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536  # query and output, key and value, gate, up and down
    assert packed["total"] - plain["total"] == 2 * (30 * layer + 49152 * 576)


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "--model", "Llama 8B", "--devices", "1", "8"])
    errors.main(memory.run)
    said, head, *lines = capsys.readouterr().out.splitlines()
    assert "rank 16, bfloat16" in said
    assert len(lines) == 2 * len(memory.STAGES)
    assert "16.06" in lines[0] and head.split()[3:] == [*memory.COLUMNS, "at"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "./gone"], "error: --model ./gone: no config of a Llama-like model there ("),
        (["--model", "nobody/nothing"], "error: --model nobody/nothing: no config of a Llama-like model there ("),
        (["--load-in-4bit", "--lora-rank", "0"], "error: --load-in-4bit goes with adapters on one device"),
        (["--devices", "0"], "error: argument --devices: must be at least 1, not 0"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, arguments, says):
    monkeypatch.setattr(sys, "argv", ["memory", *arguments])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as left:
        errors.main(memory.run)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(says) and said.count("\n") == 1
