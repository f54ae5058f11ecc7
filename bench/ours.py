"""Our side of a comparison: the steps of train_sft.py, train_dpo.py and train_ppo.py, and the sampler."""

import json
import sys
from pathlib import Path

import side

plan = json.loads(Path(sys.argv[1]).read_text())
parent = side.Parent(plan)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

torch.set_num_threads(plan["threads"])

from socratiq import losses, training  # noqa: E402
from socratiq.batch import make_batch  # noqa: E402
from socratiq.models import load_policy  # noqa: E402
from socratiq.policy import token_logprobs  # noqa: E402
from socratiq.sampling import sample  # noqa: E402

work, size = plan["work"], plan["batch"]
policy = load_policy(
    plan["model"],
    device=plan["device"],
    dtype=plan["dtype"],
    lora_rank=plan["lora_rank"],
    value_head=work == "ppo",
    trainable=work != "generate",
    plain=plan["plain"],
)
if work != "generate":
    optimizer = training.make_optimizer(policy, plan["lr"], eps=1e-5 if work == "ppo" else 1e-8)
if work == "ppo":
    policy.keep_reference()


def update(loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def sft(rows):
    batch = make_batch([row["prompt"] for row in rows], [[row["chosen"]] for row in rows]).to(policy.device)
    return update(losses.sft_loss(token_logprobs(policy, batch)["logprobs"], batch.mask))


def pair_logps(rows):
    completions = [[row["chosen"], row["rejected"]] for row in rows]
    batch = make_batch([row["prompt"] for row in rows], completions).to(policy.device)
    return losses.sequence_logps(token_logprobs(policy, batch)["logprobs"], batch.mask)  # (B, 2)


def dpo(rows):
    # train_dpo.py computes the reference before the first update: one pass without gradients for each pair of the data.
    # It belongs to the price of a pair, so it is timed here, as it is on the other side.
    with torch.no_grad(), policy.reference():
        reference = pair_logps(rows)
    logps = pair_logps(rows)
    each, _, _ = losses.dpo_loss(logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1], 0.1)
    return update(each.mean())


def ppo(rows):  # a step is many updates, so there is no one loss
    prompts, samples = [row["prompt"] for row in rows], plan["samples"]
    completions = sample(policy, prompts, samples, plan["new_tokens"], eos_id=-1, seeds=0)
    everything = make_batch(prompts, completions).to(policy.device)
    with torch.no_grad():
        old = token_logprobs(policy, everything)
        with policy.reference():
            reference = token_logprobs(policy, everything)["logprobs"]
    mask = everything.mask
    scores = torch.zeros(len(prompts), samples, device=policy.device)
    rewards = losses.shape_rewards(scores, old["logprobs"], reference, mask, 0.05)
    advantages, returns = losses.gae(rewards, old["values"], mask, 1.0, 0.95)
    advantages = losses.whiten(advantages, mask)
    for _ in range(plan["epochs"]):
        for chosen in torch.randperm(len(prompts)).split(len(prompts) // plan["minibatches"]):
            batch = make_batch([prompts[i] for i in chosen], [completions[i] for i in chosen]).to(policy.device)
            new = token_logprobs(policy, batch)
            loss, _ = losses.policy_loss(new["logprobs"], old["logprobs"][chosen], advantages[chosen], batch.mask, 0.2)
            value_loss, _ = losses.value_loss(new["values"], old["values"][chosen], returns[chosen], batch.mask, 0.2)
            update(loss + 0.1 * value_loss)


def generate(rows):
    sample(policy, [row["prompt"] for row in rows], plan["samples"], plan["new_tokens"], eos_id=-1, seeds=0)


step, told = {"sft": sft, "dpo": dpo, "ppo": ppo, "generate": generate}[work], {}
for start in range(0, len(plan["rows"]), size):
    parent.wait(**told)
    told = {"loss": step(plan["rows"][start : start + size])}
parent.wait(**told)
