"""Stage 4: proximal policy optimisation. The model learns to ask questions that the scorer rewards.

    python train_ppo.py                          # runs/dpo and runs/scorer into runs/ppo

Algorithm (Schulman et al. 2017; Ziegler et al. 2019 for language models). One iteration:

 1. Prompts: contexts of the training split, each with a type drawn at random.
 2. Rollout: K questions a prompt, temperature 1, the full distribution.
 3. Score: the reward of each question in 0..1, less a penalty if the end-of-sequence token is missing.
 4. Old log-probs and values from the policy, log-probs from the frozen reference, by the forward that trains.
 5. Rewards per token: - kl_coef * (log pi - log pi_ref), the score added on the last. Advantages by GAE, whitened.
 6. Update: a few epochs over minibatches, clipped policy loss + vf_coef * clipped value loss.

What differs from the usual implementation:
 1. Policy and value share one trunk and one forward pass; the value head is a single linear layer that starts at zero.
 2. The reference is the model this stage began with: adapters switched off (a copy only with --lora-rank 0).
 3. The K questions of a prompt share its computation, in sampling and in training (socratiq/batch.py).
 4. Rewards are not whitened, advantages are. Dropout is off. Adam's epsilon is 1e-5.
 5. An update stops early when the approximate KL from the rollout's policy exceeds --target-kl.
"""

from socratiq.engine import distributed
from socratiq.run import options as cli
from socratiq.run.errors import main


def parse_arguments():
    parser = cli.Parser(
        description="PPO: learn to ask questions that the scorer rewards, near the model one began with."
    )
    cli.add_model_arguments(parser, model="runs/dpo")
    data = parser.add_argument_group("data and reward")
    data.add_argument(
        "--data",
        type=cli.source,
        default="sample",
        help='whose contexts are asked about: "sample", "socratiq", a file, a folder',
    )
    data.add_argument("--held-out", type=cli.fraction, default=0.1, help="share of the contexts kept for evaluation")
    data.add_argument(
        "--scorer", default="runs/scorer", metavar="FOLDER", help="folder of the scorer that gives the reward"
    )
    data.add_argument(
        "--reward",
        default=None,
        metavar="MODULE:FUNCTION",
        help="a reward of your own: f(contexts, questions, types) -> floats",
    )
    data.add_argument(
        "--missing-eos-penalty", type=cli.not_negative, default=1.0, help="taken off the score without an end"
    )
    data.add_argument(
        "--diversity",
        action="store_true",
        help="pay less for a question that repeats others of the same batch (socratiq/scorer/diversity.py)",
    )
    rollout = parser.add_argument_group("rollout")
    rollout.add_argument("--batch-size", type=cli.count, default=16, metavar="PROMPTS", help="prompts per iteration")
    rollout.add_argument("--samples-per-prompt", type=cli.count, default=4, metavar="K", help="questions per prompt")
    rollout.add_argument("--max-new-tokens", type=cli.count, default=48, metavar="TOKENS", help="longest question")
    rollout.add_argument("--temperature", type=cli.positive, default=1.0, help="of rollout, reference and update alike")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--steps", type=cli.count, default=30, metavar="ITERATIONS", help="rollouts, each with its update"
    )
    training.add_argument("--ppo-epochs", type=cli.count, default=2, help="passes over each rollout")
    training.add_argument("--minibatches", type=cli.count, default=2, metavar="N", help="optimiser steps per pass")
    training.add_argument(
        "--lr",
        type=cli.positive,
        default=None,
        help="peak learning rate (4e-4 with adapters, 1e-5 without; a fifth for 8B)",
    )
    training.add_argument("--warmup", type=cli.fraction, default=0.05, help="share of the iterations that warm up")
    training.add_argument(
        "--clip", type=cli.positive, default=0.2, help="range of the ratio, and of the value's change"
    )
    training.add_argument("--vf-coef", type=cli.not_negative, default=0.1, help="weight of the value loss")
    training.add_argument("--gamma", type=cli.number(float, above=0, most=1), default=1.0, help="discount per token")
    training.add_argument("--lam", type=cli.number(float, least=0, most=1), default=0.95, help="lambda of GAE")
    training.add_argument(
        "--kl-coef", type=cli.not_negative, default=0.02, help="price of a nat of KL to the reference"
    )
    training.add_argument(
        "--kl-target",
        type=cli.positive,
        default=None,
        metavar="NATS",
        help="adapt --kl-coef towards this KL per question",
    )
    training.add_argument("--kl-horizon", type=cli.positive, default=2000, metavar="SAMPLES", help="how fast it adapts")
    training.add_argument(
        "--target-kl", type=cli.positive, default=0.1, metavar="NATS", help="approximate KL that ends an update"
    )
    training.add_argument("--max-grad-norm", type=cli.positive, default=1.0, help="gradients are clipped to this norm")
    training.add_argument(
        "--eval-every", type=cli.count, default=10, metavar="ITERATIONS", help="between held-out figures"
    )
    training.add_argument(
        "--eval-prompts", type=cli.count, default=32, metavar="PROMPTS", help="held-out prompts evaluated"
    )
    cli.add_run_arguments(parser, out="runs/ppo")
    parser.set_defaults(checkpoint_every=1)
    args = parser.parse_args()
    if args.kl_target and args.batch_size * args.samples_per_prompt >= 5 * args.kl_horizon:
        parser.error(
            "--kl-horizon: must be above a fifth of the samples of an iteration, or --kl-coef can turn negative"
        )
    args.lr = args.lr or (4e-4 if args.lora_rank else 1e-5)
    return args


def run_stage():
    args = parse_arguments()
    run = distributed.open_run(args, "ppo")
    if run.finished:
        return
    import functools
    import math
    import time
    from typing import NamedTuple

    import torch

    from socratiq import losses, training
    from socratiq.batch import make_batch
    from socratiq.data import load_rows, split_by_context
    from socratiq.models import load_policy, load_tokenizer, save_policy, token_logprobs
    from socratiq.prompts import decode, encode_prompt
    from socratiq.sampling import sample
    from socratiq.scorer.diversity import batch_diversity, diversity_factor
    from socratiq.scorer.reward import load_reward
    from socratiq.taxonomy import OTHERS

    class Rollout(NamedTuple):
        """What one iteration learns from: B prompts, K questions each, at most C tokens."""

        tasks: list  # B pairs of context and type
        prompts: list  # B lists of token ids
        completions: list  # [b][k] lists of token ids
        old_logprobs: torch.Tensor  # (B, K, C) by the policy that wrote them
        values: torch.Tensor  # (B, K, C) by that policy's value head
        advantages: torch.Tensor  # (B, K, C) whitened
        returns: torch.Tensor  # (B, K, C) what the value head should have said

    # Data: contexts only; the questions are the model's own.
    train_rows, held_out_rows = split_by_context(load_rows(args.data), args.held_out, args.seed)
    sources = {row.context: row.source for row in reversed(train_rows)}  # where a context stands first
    train_contexts = list(dict.fromkeys(row.context for row in train_rows))
    held_out_contexts = list(dict.fromkeys(row.context for row in held_out_rows))

    # Model, reward, optimiser.
    tokenizer = load_tokenizer(args.model)
    training.repeatable(args.deterministic)
    policy = load_policy(args.model, args.device, args.dtype, value_head=True, **cli.model_options(args))
    policy.check_length(args.max_prompt_tokens + args.max_new_tokens, "--max-prompt-tokens and --max-new-tokens")
    policy.keep_reference()
    distributed.shard(policy)
    types = sorted({row.type for row in train_rows + held_out_rows} - {OTHERS})
    reward = load_reward(args, held_out_contexts, types)
    optimizer = training.make_optimizer(policy, args.lr, eps=1e-5)
    kl_control = losses.AdaptiveKL(args.kl_coef, args.kl_target or 1.0, args.kl_horizon)

    def draw_prompts(contexts, count, *purpose):
        """`count` (context, type) tasks, drawn anew for each purpose; no context twice before all were used."""
        draw = training.generator(args.seed, *purpose)
        order = torch.cat([torch.randperm(len(contexts), generator=draw) for _ in range(-(-count // len(contexts)))])
        types = torch.randint(len(reward.types), (count,), generator=draw).tolist()
        return [(contexts[i], reward.types[t]) for i, t in zip(order.tolist(), types, strict=False)]

    def ask(tasks, *purpose, temperature=args.temperature, samples=args.samples_per_prompt):
        """Steps 2 and 3: questions to the tasks, as ids and text, their scores (B, K), and the parts of the scores."""
        prompts = [encode_prompt(tokenizer, context, type, args.max_prompt_tokens) for context, type in tasks]
        mine = distributed.share(range(len(tasks)), 0)  # a process without a task repeats the first
        completions = sample(
            policy,
            [prompts[b] for b in mine],
            samples,
            args.max_new_tokens,
            tokenizer.eos_token_id,
            temperature=temperature,
            seeds=[training.derive_seed(args.seed, *purpose, b) for b in mine],
        )
        questions = [[decode(tokenizer, ids) for ids in row] for row in completions]
        contexts, types = zip(*[tasks[b] for b in mine for _ in range(samples)], strict=True)
        scores, parts = reward(list(contexts), [question for row in questions for question in row], list(types))

        def all_tasks(rows):
            """One entry for each of `mine` -> one for each of `tasks`."""
            return distributed.collect(list(rows), len(tasks))

        def grid(x):  # (mine * K,) -> (tasks, K)
            return torch.stack(all_tasks(x.cpu().view(len(mine), samples)))

        completions, questions = all_tasks(completions), [text for row in all_tasks(questions) for text in row]
        return prompts, completions, questions, grid(scores), {name: grid(x) for name, x in parts.items()}

    def batches(prompts, completions, size):
        """(rows, batch) of consecutive rows, `size` at a time; of these, the rows of this process."""
        for start in range(0, len(prompts), size):
            rows = distributed.share(range(start, min(start + size, len(prompts))))
            batch = make_batch([prompts[i] for i in rows], [completions[i] for i in rows], args.samples_per_prompt)
            yield rows, batch.to(policy.device)

    def evaluate(step):
        """Mean score on held-out contexts; the same tasks and random numbers every time."""
        tasks = draw_prompts(held_out_contexts, args.eval_prompts, "eval tasks")
        _, completions, questions, scores, _ = ask(tasks, "eval samples", samples=1)
        for (context, type), question, score in zip(tasks[:8], questions, scores.flatten().tolist(), strict=False):
            run.sample(
                step=step, split="held_out", type=type, context=context, question=question, score=round(score, 4)
            )
        ended = [ids[-1] == tokenizer.eos_token_id for row in completions for ids in row]
        return {"eval/scores": scores.mean(), "eval/eos_rate": sum(ended) / len(ended)}

    def loss_of(rollout, chosen):
        """Step 6 for these prompts of a rollout: the loss, its figures, and the tensors it is made of.

        Of several processes each has its part of the prompts and of the loss; the figures are of all.
        """
        tokens = sum(len(ids) for i in chosen for ids in rollout.completions[i])
        chosen = distributed.share(chosen)
        prompts, completions = [rollout.prompts[i] for i in chosen], [rollout.completions[i] for i in chosen]
        batch = make_batch(prompts, completions, args.samples_per_prompt).to(policy.device)
        mask, length = batch.mask, batch.mask.shape[-1]
        old_logprobs, values, advantages, returns = (
            getattr(rollout, name)[chosen, :, :length] for name in ("old_logprobs", "values", "advantages", "returns")
        )
        new = token_logprobs(policy, batch, args.temperature)
        policy_loss, clipfrac = losses.policy_loss(new["logprobs"], old_logprobs, advantages, mask, args.clip, tokens)
        value_loss, value_clipfrac = losses.value_loss(new["values"], values, returns, mask, args.clip, tokens)
        with torch.no_grad():
            moved = losses.kl_estimate(old_logprobs, new["logprobs"], "k3", mask)  # from old to new
            ratio = (new["logprobs"] - old_logprobs).exp()
            figures = {
                "policy/approxkl": losses.masked_mean(moved, mask, tokens),
                "policy/clipfrac": clipfrac,
                "policy/loss": policy_loss.detach(),
                "val/loss": value_loss.detach(),
                "val/clipfrac": value_clipfrac,
                "val/ratio": losses.masked_mean(ratio, mask, tokens),
            }
        tensors = {**new, "old_logprobs": old_logprobs, "advantages": advantages, "returns": returns}
        return policy_loss + args.vf_coef * value_loss, distributed.all_sum(figures), tensors

    def suspect(rollout, i):
        """Prompt i of a rollout for the case that it gives a number that is not finite."""
        loss, _, tensors = loss_of(rollout, [i])
        return training.Suspect(name_of(rollout.tasks[i]), rollout.prompts[i], rollout.completions[i], tensors, loss)

    def name_of(task):
        return f"{sources[task[0]]} asked for {task[1]}"

    def refuse_rollout(step, rollout, tensors, questions, finite):
        """Stop, or warn, when `finite` (B,) is not true of every prompt of a rollout."""
        bad = (~tensors["scores"].flatten().isfinite()).nonzero().flatten().tolist()
        reward = f"reward {tensors['scores'].flatten()[bad[0]]:g} for {questions[bad[0]]!r}" if bad else None
        suspects = [
            training.Suspect(name_of(task), prompt, completions, {name: x[b] for name, x in tensors.items()})
            for b, (task, prompt, completions) in enumerate(
                zip(rollout.tasks, rollout.prompts, rollout.completions, strict=True)
            )
            if not finite[b]
        ]
        training.refuse(run, step + 1, reward or "a log-prob or value of the rollout is not finite", suspects)

    # Loop.
    minibatches = min(args.minibatches, args.batch_size)
    minibatch = math.ceil(args.batch_size / minibatches)  # prompts
    state = run.load(policy, optimizer)
    kl_control.value = state.get("kl_coef", kl_control.value)
    evaluation, history = state.get("evaluation", {}), state.get("history", [])
    if not state and held_out_contexts:
        evaluation = {name: float(x) for name, x in evaluate(0).items()}
        run.log(0, **evaluation)
    for step in run.steps(state.get("step", 0), args.steps):
        started = time.perf_counter()

        # 1. Prompts. 2. Questions. 3. Scores.
        tasks = draw_prompts(train_contexts, args.batch_size, "tasks", step)
        prompts, completions, questions, raw_scores, parts = ask(tasks, "samples", step)
        # Only for its (B, K, C) grid: with the prompts would come masks for the attention of the whole rollout.
        everything = make_batch([[0]] * len(prompts), completions).to(policy.device)
        tokens, mask = everything.tokens, everything.mask  # (B, K, C)
        raw_scores = raw_scores.to(policy.device)
        scores = raw_scores
        if args.diversity:
            parts["diversity"] = torch.tensor(diversity_factor(questions)).view(raw_scores.shape)
            scores = raw_scores * parts["diversity"].to(policy.device)
        scores = losses.missing_eos_penalty(scores, tokens, mask, tokenizer.eos_token_id, args.missing_eos_penalty)

        # 4. Log-probs of policy and reference, values.
        old = {name: torch.zeros_like(mask) for name in ("logprobs", "values", "entropy", "reference")}
        with torch.no_grad():
            for rows, batch in batches(prompts, completions, minibatch):
                length = batch.mask.shape[-1]
                for name, x in token_logprobs(policy, batch, args.temperature, watch=True).items():
                    old[name][rows, :, :length] = x
                with policy.reference():
                    old["reference"][rows, :, :length] = token_logprobs(policy, batch, args.temperature)["logprobs"]
        old = {name: distributed.all_sum(x) for name, x in old.items()}  # each had its rows, the rest was zero

        # 5. Rewards and advantages.
        kl_coef = kl_control.value
        rewards = losses.shape_rewards(scores, old["logprobs"], old["reference"], mask, kl_coef)
        advantages, returns = losses.gae(rewards, old["values"], mask, args.gamma, args.lam)
        finite = raw_scores.isfinite().all(-1) & returns.isfinite().flatten(1).all(-1)  # (B,)
        advantages = losses.whiten(advantages, mask)
        rollout = Rollout(tasks, prompts, completions, old["logprobs"], old["values"], advantages, returns)
        epochs = args.ppo_epochs
        if not finite.all():
            epochs = 0  # nothing to be learnt from this rollout
            refuse_rollout(step, rollout, {"scores": raw_scores, **old}, questions, finite)

        # 6. Update.
        lr = training.learning_rate(step, args.steps, math.ceil(args.warmup * args.steps), args.lr)
        seen = []
        for epoch in range(epochs):
            draw = training.generator(args.seed, "minibatches", step, epoch)
            order = torch.randperm(len(prompts), generator=draw).tolist()
            for chosen in (order[start::minibatches] for start in range(minibatches)):
                loss, figures, _ = loss_of(rollout, chosen)
                loss.backward()
                norm = training.update(
                    run, policy, optimizer, step + 1, lr, distributed.all_sum(loss.detach()), args.max_grad_norm,
                    chosen, functools.partial(suspect, rollout),
                )  # fmt: skip
                if norm is None:  # skipped
                    continue
                seen.append({**figures, "grad_norm": norm})
                if seen[-1]["policy/approxkl"] > args.target_kl:
                    break
            else:
                continue
            break  # out of both loops: the policy has moved far enough from the one that wrote the questions

        seconds = time.perf_counter() - started

        # Figures.
        kl = losses.kl_estimate(old["logprobs"], old["reference"], "k1", mask).sum(-1).mean()  # nats per question
        k3 = losses.kl_estimate(old["logprobs"], old["reference"], "k3", mask).sum(-1).mean()
        metrics = {name: torch.stack([figures[name] for figures in seen]).mean() for name in (seen or [{}])[0]}
        metrics |= {
            "objective/kl": kl,
            "objective/kl_k3": k3,
            "objective/kl_coef": kl_coef,
            "objective/scores": raw_scores.mean(),
            "objective/scores_std": raw_scores.std() if raw_scores.numel() > 1 else 0.0,
            "objective/rlhf_reward": rewards.sum(-1).mean(),
            "objective/entropy": losses.masked_mean(old["entropy"], mask),
            "val/explained_variance": losses.explained_variance(old["values"], returns, mask),
            "eos_rate": ((tokens == tokenizer.eos_token_id) & mask.bool()).any(-1).float().mean(),
            "length": mask.sum(-1).mean(),
            "learning_rate": lr,
            "updates": len(seen),
            **{f"reward/{name}": x.mean() for name, x in parts.items()},
            **batch_diversity(questions),
        }
        if args.kl_target and finite.all():
            kl_control.update(kl, samples=raw_scores.numel())
        if held_out_contexts and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
            evaluation = {name: float(x) for name, x in evaluate(step + 1).items()}
            metrics |= evaluation
        best_first = raw_scores.flatten().argsort(descending=True).tolist()
        for i in (best_first[0], best_first[len(best_first) // 2], best_first[-1]):  # best, median, worst
            context, type = tasks[i // args.samples_per_prompt]
            score = round(raw_scores.flatten()[i].item(), 4)
            run.sample(step=step + 1, split="train", type=type, context=context, question=questions[i], score=score)
            if step % 5 == 0 or step + 1 == args.steps:
                in_a_line = " ".join(questions[i].split())[:200]
                run.progress.write(f"step {step + 1:3d}  score {score:.2f}  {type}: {in_a_line}")
        if finite.all():
            history.append(raw_scores.mean().item())
        state = {"kl_coef": kl_control.value, "evaluation": evaluation, "history": history}
        run.end_step(
            step + 1, policy, optimizer, metrics, state, seconds=seconds,
            tokens=int(mask.sum()) + sum(map(len, prompts)), show={"score": raw_scores.mean(), "kl": kl},
        )  # fmt: skip

    save_policy(policy, tokenizer, run.out, args.model)
    quarter = max(1, len(history) // 4)
    first, last = sum(history[:quarter]) / quarter, sum(history[-quarter:]) / quarter
    run.finish(steps=args.steps, scores_first_quarter=first, scores_last_quarter=last, **evaluation)
    print(
        f"ppo: mean score {first:.3f} in the first quarter, {last:.3f} in the last, model in {run.out}. "
        f"Next: python -m socratiq.report {run.out.parent}"
    )


if __name__ == "__main__":
    main(run_stage)
