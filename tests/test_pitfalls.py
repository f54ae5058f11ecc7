"""The classic mistakes of preference training, named after the mistake.

The first half tries the building blocks, on a Llama of a few thousand weights. The second half watches the scripts
themselves (tests/observed.py): what they hand to the losses, and what they log. Some mistakes are caught elsewhere:

    shift, padding, values    test_identities.py: packed rows equal one forward per sequence, whatever their neighbours
    empty completions         test_identities.py: one stands among the packed rows
    dropout                   test_family.py: in train mode too, whatever the model's configuration asks for
    split                     test_data.py: test_split_by_context, test_nothing_to_hold_out
    reward slot, missing EOS  test_losses.py: TestShapedRewards, TestMissingEOS
    value clip                test_losses.py: TestValueLoss
"""

import json
from itertools import pairwise
from math import log
from types import SimpleNamespace

import pytest
import torch
from observed import observations
from small import EOS, VOCABULARY, small_policy, small_rows, stir
from transformers import AutoModelForCausalLM

from socratiq import lora, losses
from socratiq.batch import make_batch
from socratiq.models import load_policy, load_tokenizer
from socratiq.policy import token_logprobs
from socratiq.prompts import encode_completion, encode_prompt
from socratiq.sampling import sample
from socratiq.saving import save_policy, whole_state_dict


def close(actual, expected, tolerance=1e-5):
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, check_dtype=False)


# ----------------------------------------------------------------------------------------- the building blocks


@pytest.mark.parametrize("adds_bos", [True, False])
def test_boundary(adds_bos):
    """Prompt and completion are tokenised apart and joined as ids; one BOS if the tokenizer has one, never two."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_bos_token = adds_bos
    prompt = encode_prompt(tokenizer, "Dogs are good. <s> ### Response:", "Clarity", 512)
    question = encode_completion(tokenizer, " Why?")
    assert prompt.count(tokenizer.bos_token_id) == adds_bos and (prompt[0] == tokenizer.bos_token_id) == adds_bos
    assert tokenizer.bos_token_id not in question
    assert make_batch([prompt], [[question]]).input_ids.tolist() == prompt + question
    for other in ("?", "\nWhy?", "Response: why?"):  # nothing in a question can reach back into the prompt
        joined = prompt + encode_completion(tokenizer, other)
        assert joined[: len(prompt)] == prompt and joined[-1] == tokenizer.eos_token_id


def test_eos():
    """Appended once, supervised, kept in rollouts; nothing comes after it."""
    tokenizer = load_tokenizer("tiny")
    question = encode_completion(tokenizer, "Why are dogs good?")
    assert question[-1] == tokenizer.eos_token_id and question.count(tokenizer.eos_token_id) == 1
    assert make_batch([[1, 5]], [[question]]).mask.sum() == len(question)  # EOS is in the mask, so it is learnt
    policy = small_policy()
    prompts, _ = small_rows()
    written = [ids for row in sample(policy, prompts, 8, max_new_tokens=12, eos_id=EOS) for ids in row]
    assert sum(ids[-1] == EOS for ids in written) > 8
    assert all(EOS not in ids[:-1] and 1 <= len(ids) <= 12 for ids in written)


def test_pad_is_eos():
    """Masks come from lengths. A token that happens to be the padding's id counts, wherever it stands."""
    completions = [[[0, 5, 0, EOS], [EOS]], [[EOS, EOS, 4], [0, 0]]]
    batch = make_batch([[1, 3], [1, 4]], completions)
    assert batch.mask.sum(-1).tolist() == [[4, 1], [3, 2]]
    assert len(batch.input_ids) == 13  # nothing is padded before the model, and the common start stands there once
    logprobs = token_logprobs(small_policy(), batch)["logprobs"]
    assert (logprobs[batch.mask.bool()] < 0).all() and (logprobs[~batch.mask.bool()] == 0).all()


def test_precision():
    """Under bfloat16 autocast log-probs and losses are float32, and probabilities still add up to one."""
    policy = small_policy()
    policy.autocast = True
    batch = make_batch([[1, 5, 7]], [[[token] for token in range(VOCABULARY)]])
    logprobs = token_logprobs(policy, batch)["logprobs"]
    assert logprobs.dtype == torch.float32
    close(logprobs.exp().sum(), 1.0, 1e-5)  # a log-softmax in bfloat16 would be off by 1e-2
    loss = losses.sft_loss(logprobs, batch.mask)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in policy.trainable().values())


def test_merged_weights(tmp_path):
    """Adapters are merged in float32 beside bfloat16 weights: others open the folder in float32, by default, and the
    next stage in what it asks for."""
    tokenizer, policy = load_tokenizer("tiny"), load_policy("tiny", "cpu", "bfloat16", lora_rank=4)
    stir(policy)
    save_policy(policy, tokenizer, tmp_path / "model", "tiny")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    ours = lora.merged_state_dict(policy.lm, whole_state_dict(policy.lm))
    assert {x.dtype for x in ours.values()} == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(theirs, {name: weight.float() for name, weight in ours.items()}, rtol=0, atol=0)
    again = load_policy(str(tmp_path / "model"), "cpu", "bfloat16", lora_rank=4)
    assert {x.dtype for x in again.lm.parameters() if not x.requires_grad} == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------- the scripts


def run(scripts, inputs, folder, script, *options):
    """One script on `tiny` and a few rows: what was observed, the metrics by step, the folder it wrote."""
    data = ["--pairs", inputs / "pairs.jsonl"] if script == "train_dpo.py" else ["--data", inputs / "rows.jsonl"]
    command = [script, "--model", "tiny", "--dtype", "float32", "--device", "cpu", "--held-out", "0.2", *data]
    status, _, complained = scripts.run([*command, "--out", "out", *options], cwd=folder, patch="observed:watch")
    assert (status, complained) == (0, "")
    metrics = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(seen=observations(folder), metrics=metrics, out=folder / "out")


@pytest.fixture(scope="module")
def dpo(scripts, inputs, tmp_path_factory):
    return run(scripts, inputs, tmp_path_factory.mktemp("dpo"), "train_dpo.py", "--steps", 6, "--lr", "1e-3")


@pytest.fixture(scope="module")
def ppo(scripts, inputs, tmp_path_factory):
    options = "--allow-bare-scorer --steps 2 --batch-size 4 --samples-per-prompt 3 --minibatches 2 --ppo-epochs 2 "
    options += "--max-new-tokens 8 --temperature 0.8 --lr 1e-3 --eval-prompts 2 --target-kl 100"
    folder = tmp_path_factory.mktemp("ppo")
    return run(scripts, inputs, folder, "train_ppo.py", "--scorer", inputs / "scorer", *options.split())


def test_sequence_score(dpo, scripts, inputs, tmp_path):
    """DPO sums log-probs over the completion; only IPO averages them."""
    assert not any(call["average"] for call in dpo.seen["sequence_logps"])
    ipo = run(scripts, inputs, tmp_path, "train_dpo.py", "--steps", 1, "--loss", "ipo")
    assert all(call["average"] for call in ipo.seen["sequence_logps"])


def test_temperature(ppo):
    """The same in rollout, reference and update."""
    assert {call["temperature"] for call in ppo.seen["token_logprobs"] + ppo.seen["sample"]} == {0.8}


def test_old_log_probs(ppo):
    """Recomputed by the forward that trains, so that the first ratio of every rollout is 1."""
    assert {a["name"] for a, b in pairwise(ppo.seen[""]) if b["name"] == "policy_loss"} == {"token_logprobs"}
    moved = [((x["new_logprobs"] - x["old_logprobs"]) * x["mask"]).abs().max() for x in ppo.seen["policy_loss"]]
    assert len(moved) == 8 and max(moved[::4]) < 1e-5  # two rollouts, four updates each
    assert min(moved[1:4] + moved[5:]) > 1e-5


def test_whitening(ppo):
    """Advantages are whitened, over the mask, once per rollout and after the returns; rewards and returns are not."""
    assert len(ppo.seen["whiten"]) == len(ppo.seen["gae"]) == 2
    for step in range(2):
        advantages, returns = ppo.seen["gae"][step]["result"]
        white = ppo.seen["whiten"][step]
        assert torch.equal(white["x"], advantages) and white["shift_mean"]
        assert torch.equal(ppo.seen["gae"][step]["rewards"], ppo.seen["shape_rewards"][step]["result"])
        close(losses.masked_mean(white["result"], white["mask"]), 0.0)
        for call in ppo.seen["value_loss"][4 * step : 4 * step + 4]:
            assert set(call["returns"].flatten().tolist()) <= set(returns.flatten().tolist())
        for call in ppo.seen["policy_loss"][4 * step : 4 * step + 4]:
            assert set(call["advantages"].flatten().tolist()) <= set(white["result"].flatten().tolist())


def test_reference(dpo, ppo):
    """First DPO loss = ln 2; first KL = 0; the reference gets no gradient."""
    close(dpo.metrics[0]["eval/loss"], log(2), 1e-6)
    close(ppo.metrics[1]["objective/kl"], 0.0, 1e-6)
    reference = [call for call in ppo.seen["token_logprobs"] if call["reference"]]
    assert reference and not any(call["gradients"] for call in reference)


def test_adam_epsilon(ppo, dpo):
    """1e-5 in PPO, where gradients are small and noisy; Adam's own 1e-8 elsewhere."""
    assert [call["eps"] for call in ppo.seen["make_optimizer"]] == [1e-5]
    assert [call["eps"] for call in dpo.seen["make_optimizer"]] == [1e-8]


def test_accumulation(scripts, inputs, tmp_path):
    """1 x 8 = 2 x 4 = 8 x 1: an update is divided by the tokens of its whole window, a short last one included."""
    runs = []
    for batch_size, accumulate in ((8, 1), (4, 2), (1, 8)):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        options = ["--epochs", 1, "--lr", "1e-3", "--batch-size", batch_size, "--accumulate", accumulate]
        runs.append(run(scripts, inputs, folder, "train_sft.py", *options))
    windows = [call["mask"].shape[0] for call in runs[0].seen["sft_loss"] if call["gradients"]]
    assert windows[0] == 8 and 0 < windows[-1] < 8  # the last one is short
    for other in runs[1:]:
        for line, expected in zip(other.metrics, runs[0].metrics, strict=True):
            for name in {"loss", "grad_norm", "eval/loss"} & expected.keys():
                assert line[name] == pytest.approx(expected[name], rel=1e-4)


def test_metrics(ppo):
    """Worked out here over real tokens alone; policy to reference (k1, k3) and new to old have names of their own."""
    for step, line in enumerate(ppo.metrics[1:]):
        shaped, scored = ppo.seen["shape_rewards"][step], ppo.seen["missing_eos_penalty"][step]
        d, ended = shaped["logprobs"] - shaped["ref_logprobs"], scored["tokens"] == scored["eos_id"]
        sums = {"objective/kl": d, "objective/kl_k3": (-d).exp() - 1 + d, "objective/rlhf_reward": shaped["result"]}
        for name, x in (sums | {"length": torch.ones_like(d), "eos_rate": ended}).items():
            assert line[name] == pytest.approx(x[shaped["mask"].bool()].sum().item() / 12, abs=1e-5)
        updates = ppo.seen["policy_loss"][4 * step : 4 * step + 4]
        assert line["policy/clipfrac"] == pytest.approx(sum(call["result"][1].item() for call in updates) / 4)
        moved = [(x["new_logprobs"] - x["old_logprobs"])[x["mask"].bool()] for x in updates]
        assert line["policy/approxkl"] == pytest.approx(sum((d.exp() - 1 - d).mean().item() for d in moved) / 4, 1e-4)


def test_chosen_reward_falls_in_dpo(dpo, scripts, inputs, tmp_path):
    """Both log-probs are logged, so that the drift shows; --sft-coef, the remedy, holds the chosen one up."""
    assert all({"logps/chosen", "logps/rejected", "rewards/chosen"} <= line.keys() for line in dpo.metrics[1:])
    held = run(scripts, inputs, tmp_path, "train_dpo.py", "--steps", 6, "--lr", "1e-3", "--sft-coef", "1")
    assert held.metrics[-1]["eval/logps/chosen"] > dpo.metrics[-1]["eval/logps/chosen"]
    assert held.metrics[-1]["eval/rewards/margins"] > 0


def test_reward_hacking(ppo):
    """What shows it is logged: the parts of the reward, length, and questions with their scores to be read."""
    last = ppo.metrics[-1]
    assert sum(name.startswith("reward/") for name in last) >= 3 and last["length"] > 0
    samples = [json.loads(line) for line in (ppo.out / "samples.jsonl").read_text().splitlines()]
    assert {"train", "held_out"} == {sample["split"] for sample in samples}
    assert all({"step", "question", "score", "context", "type"} <= sample.keys() for sample in samples)
