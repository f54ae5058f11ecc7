"""Stage 4: proximal policy optimisation. The model learns to ask questions that the scorer rewards.

    python train_ppo.py                          # runs/dpo and runs/scorer into runs/ppo
    python train_ppo.py --advantages rloo        # no critic: the siblings of a question are its baseline

Algorithm (Schulman et al. 2017; Ziegler et al. 2019 for language models). One iteration:

 1. Prompts: contexts of the training split, each with a type drawn at random.
 2. Rollout: K questions a prompt, temperature 1, the full distribution.
 3. Scores: the reward model (socratiq/scorer) scores each question, 0 to 1; a missing EOS costs a penalty.
 4. Old log-probs and values from the policy, log-probs from the frozen reference, by the forward that trains.
 5. Rewards per token: - kl_coef * (log pi - log pi_ref), the score added on the last. Advantages by GAE, whitened; or
    by RLOO (Ahmadian et al. 2024), scaled to unit variance.
 6. Update: a few epochs over minibatches, clipped policy loss + vf_coef * clipped value loss.

Details:
 1. Policy and value share one trunk and one forward pass. The value head is a single linear layer on the trunk's
    detached states of norm 1; its weight starts at zero, its bias at the mean of the first scores (docs/ppo.md).
 2. The reference is the model this stage began with: adapters switched off (a copy only with --lora-rank 0).
 3. The K questions of a prompt share its computation, in sampling and in training (socratiq/batch.py).
 4. Advantages are whitened, rewards are not. Dropout is off. Adam's epsilon is 1e-5.
 5. An update ends early, after the step that finds the approximate KL from the rollout's policy above --target-kl.
"""

from socratiq.engine import distributed
from socratiq.run import options
from socratiq.run.errors import main, warn


def parse_arguments():
    parser = options.Parser(description="PPO: learn to ask questions that the scorer rewards, near the starting model.")
    options.add_model_arguments(parser, model="runs/dpo")
    add = parser.add_argument_group("data and reward").add_argument
    add("--data", default="sample", metavar="SOURCE", help='texts: "sample", "socratiq", a file, a folder')
    add("--held-out", type=options.fraction, default=0.1, help="share of the contexts kept for evaluation")
    add("--scorer", default="runs/scorer", metavar="FOLDER", help="folder of the scorer that gives the reward")
    add("--allow-bare-scorer", action="store_true", help="take a scorer without a language model, which PPO soon games")
    add("--reward", metavar="MODULE:FUNCTION", help="a reward of your own: f(contexts, questions, types) -> floats")
    add("--missing-eos-penalty", type=options.not_negative, default=1.0, help="off a question's score if it lacks EOS")
    add = parser.add_argument_group("rollout").add_argument
    add("--batch-size", type=options.count, default=16, metavar="PROMPTS", help="prompts per iteration")
    add("--samples-per-prompt", type=options.count, default=4, metavar="K", help="questions per prompt")
    add("--max-new-tokens", type=options.count, default=48, metavar="TOKENS", help="longest question")
    add("--temperature", type=options.positive, default=1.0, help="of rollout, reference and update alike")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=options.count, default=30, metavar="ITERATIONS", help="rollouts, each with its update")
    add("--advantages", choices=["gae", "rloo"], default="gae", help="with a critic, or with the siblings as baseline")
    add("--ppo-epochs", type=options.count, default=2, help="passes over each rollout")
    add("--minibatches", type=options.count, default=2, metavar="N", help="optimiser steps per pass")
    add("--lr", type=options.positive, help="peak learning rate (default: 4e-4 with adapters, 1e-5 without)")
    add("--warmup", type=options.fraction, default=0.05, help="share of the iterations that warm up")
    add("--clip", type=options.positive, default=0.2, help="clip range of the ratio and of the value's change")
    add("--vf-coef", type=options.not_negative, default=0.1, help="weight of the value loss (GAE)")
    add("--gamma", type=options.number(float, above=0, most=1), default=1.0, help="discount per token (GAE)")
    add("--lam", type=options.number(float, least=0, most=1), default=0.95, help="lambda of GAE")
    add("--kl-coef", type=options.not_negative, default=0.02, help="penalty per nat of KL to the reference")
    add("--kl-target", type=options.positive, metavar="NATS", help="adapt --kl-coef towards this KL per question")
    add("--kl-horizon", type=options.positive, default=2000, metavar="SAMPLES", help="of --kl-target: more is slower")
    add("--target-kl", type=options.positive, default=0.1, metavar="NATS", help="KL per token that ends an update")
    add("--max-grad-norm", type=options.positive, default=1.0, help="gradients are clipped to this norm")
    add("--eval-every", type=options.count, default=10, metavar="ITERATIONS", help="between held-out figures")
    add("--eval-prompts", type=options.count, default=32, metavar="PROMPTS", help="held-out prompts evaluated")
    options.add_run_arguments(parser, out="runs/ppo")
    parser.set_defaults(checkpoint_every=1)
    args = parser.parse_args()
    if args.kl_target and args.batch_size * args.samples_per_prompt >= 5 * args.kl_horizon:
        parser.error("--kl-horizon: must be above a fifth of an iteration's samples, or --kl-coef can turn negative")
    if args.kl_target and not args.kl_coef:
        parser.error("--kl-target: multiplies --kl-coef, which must then be above 0")
    if args.advantages == "rloo" and args.samples_per_prompt < 2:
        parser.error("--advantages rloo: needs siblings to compare with; use --samples-per-prompt 2 or more")
    args.lr = args.lr or (4e-4 if args.lora_rank else 1e-5)
    return args


def run_stage():
    args = parse_arguments()
    run = distributed.open_run(args, "ppo")
    if run.finished:
        return
    import math
    import time
    from typing import NamedTuple

    import torch

    from socratiq import losses, training
    from socratiq.batch import make_batch, pad_completions
    from socratiq.data import load_rows, split_by_context
    from socratiq.evaluation.measures import distinct_2
    from socratiq.models import load_policy, load_tokenizer
    from socratiq.policy import token_logprobs
    from socratiq.prompts import decode, encode_prompt
    from socratiq.reward import load_reward
    from socratiq.sampling import sample
    from socratiq.saving import save_policy
    from socratiq.taxonomy import OTHERS

    class Rollout(NamedTuple):
        """What one iteration learns from: B prompts, K questions each, at most C tokens."""

        tasks: list  # B pairs of context and type
        prompts: list  # B lists of token ids
        completions: list  # [b][k] lists of token ids
        questions: list  # B * K texts
        scores: torch.Tensor  # (B, K) of the questions
        parts: dict  # name -> (B * K,): what each score is made of

    # Data: contexts only; the questions are the model's own.
    train_rows, held_out_rows = split_by_context(load_rows(args.data), args.held_out, args.seed)
    sources = {row.context: row.source for row in reversed(train_rows)}  # the first row of a context wins
    train_contexts = list(dict.fromkeys(row.context for row in train_rows))
    held_out_contexts = list(dict.fromkeys(row.context for row in held_out_rows))

    # Model, reward, optimiser.
    tokenizer = load_tokenizer(args.model)
    critic = args.advantages == "gae"
    policy = load_policy(args.model, args.device, args.dtype, value_head=critic, **options.model_options(args))
    policy.check_length(args.max_prompt_tokens + args.max_new_tokens, "--max-prompt-tokens and --max-new-tokens")
    policy.keep_reference()
    distributed.shard(policy)
    row_types = sorted({row.type for row in train_rows + held_out_rows} - {OTHERS, ""})
    reward_model, types = load_reward(args, held_out_contexts, row_types)
    optimizer = training.make_optimizer(policy, args.lr, eps=1e-5)

    def draw_tasks(contexts, count, *purpose):
        """`count` (context, type) tasks, drawn anew for each purpose; no context twice before all were used."""
        draw, passes = training.generator(args.seed, *purpose), math.ceil(count / len(contexts))
        order = torch.cat([torch.randperm(len(contexts), generator=draw) for _ in range(passes)])
        drawn_types = torch.randint(len(types), (count,), generator=draw)
        return [(contexts[i], types[t]) for i, t in zip(order.tolist(), drawn_types.tolist(), strict=False)]

    def roll_out(tasks, samples, *purpose):
        """Steps 2 and 3: K = `samples` questions for each task, and their scores, which one process asks for."""
        prompts = [encode_prompt(tokenizer, context, type_name, args.max_prompt_tokens) for context, type_name in tasks]
        mine = distributed.share(range(len(tasks)))
        own = [prompts[b] for b in mine]
        seeds = [training.derive_seed(args.seed, *purpose, b) for b in mine]
        eos_id = tokenizer.eos_token_id
        with distributed.unsharded(policy):
            completions = sample(policy, own, samples, args.max_new_tokens, eos_id, args.temperature, seeds)
        completions = distributed.collect(completions, len(tasks))
        questions = [decode(tokenizer, ids) for row in completions for ids in row]
        contexts, asked_for = zip(*[task for task in tasks for _ in range(samples)], strict=True)
        scores, parts = distributed.first(lambda: reward_model(list(contexts), questions, list(asked_for)))
        return Rollout(tasks, prompts, completions, questions, scores.view(len(tasks), samples), parts)

    def batch_of(rollout, indices):
        """These prompts of a rollout, and their questions; with several processes each takes its share, or none."""
        mine = distributed.share(indices)
        prompts, completions = [rollout.prompts[b] for b in mine], [rollout.completions[b] for b in mine]
        batch = make_batch(prompts or [[0]], completions or [[[]] * args.samples_per_prompt])
        return mine, batch.to(policy.device)

    def keep_samples(step, split, rollout, picked):
        """These questions of a rollout go to samples.jsonl -> a line of text for each."""
        lines = []
        for i in picked:
            (context, type_name), question = rollout.tasks[i // rollout.scores.shape[1]], rollout.questions[i]
            score = round(rollout.scores.flatten()[i].item(), 4)
            run.log_sample(step=step, split=split, type=type_name, context=context, question=question, score=score)
            lines.append(f"step {step:3d}  score {score:.2f}  {type_name}: {' '.join(question.split())[:200]}")
        return lines

    def evaluate(step):
        """Mean score on held-out contexts; the same tasks and random numbers every time."""
        rollout = roll_out(draw_tasks(held_out_contexts, args.eval_prompts, "eval tasks"), 1, "eval samples")
        keep_samples(step, "held_out", rollout, range(min(8, args.eval_prompts)))
        ended = [ids[-1] == tokenizer.eos_token_id for row in rollout.completions for ids in row]
        return {"eval/scores": rollout.scores.mean().item(), "eval/eos_rate": sum(ended) / len(ended)}

    # Loop.
    prompts_per_forward = math.ceil(args.batch_size / args.minibatches)
    kl_control = losses.AdaptiveKL(args.kl_coef, args.kl_target or 1.0, args.kl_horizon)
    state = run.load(policy, optimizer) or {"kl_coef": args.kl_coef}
    kl_control.value = state["kl_coef"]
    if "step" not in state and held_out_contexts:
        state["first"] = state["last"] = evaluate(0)
        run.log(0, **state["first"])
    for step in run.steps(state.get("step", 0), args.steps):
        started = time.perf_counter()
        this_step = f"ppo step {step + 1}"

        # 1. Prompts. 2. Questions. 3. Scores.
        tasks = draw_tasks(train_contexts, args.batch_size, "tasks", step)
        rollout = roll_out(tasks, args.samples_per_prompt, "samples", step)
        tokens, mask = (x.to(policy.device) for x in pad_completions(rollout.completions))  # (B, K, C)
        raw_scores = rollout.scores.to(policy.device)  # (B, K)
        names = [f"{sources[context]} asked for {type_name}" for context, type_name in tasks]
        training.check_finite({"the sum of the scores": raw_scores.sum().item()}, this_step, names)
        scores = losses.missing_eos_penalty(raw_scores, tokens, mask, tokenizer.eos_token_id, args.missing_eos_penalty)
        if step == 0 and (raw_scores == raw_scores[0, 0]).all():
            warn(f"{this_step}: every score is {raw_scores[0, 0].item():g}, so nothing is learnt of the task")

        # 4. Log-probs of policy and reference, values.
        if critic and step == 0:
            with torch.no_grad():
                policy.value_head.bias.fill_(scores.mean().item())  # the critic begins as the constant baseline
        old = {name: torch.zeros_like(mask) for name in ("logprobs", "values", "entropy", "ref_logprobs")}
        with torch.no_grad():
            for part in torch.arange(len(tasks)).split(prompts_per_forward):
                mine, batch = batch_of(rollout, part.tolist())
                found = token_logprobs(policy, batch, args.temperature, watch=True)
                with policy.reference():
                    found["ref_logprobs"] = token_logprobs(policy, batch, args.temperature)["logprobs"]
                for name, x in found.items():
                    old[name][mine, :, : x.shape[-1]] = x[: len(mine)]
        old = {name: distributed.all_sum(x) for name, x in old.items()}  # zeros but for each process's own prompts

        # 5. Rewards and advantages.
        rewards = losses.shape_rewards(scores, old["logprobs"], old["ref_logprobs"], mask, kl_control.value)
        if critic:
            advantages, returns = losses.gae(rewards, old["values"], mask, args.gamma, args.lam)
        else:
            advantages = returns = losses.rloo(rewards, mask)  # no critic, so no returns: they are not used
        training.check_finite({"the sum of the advantages": advantages.sum().item()}, this_step, names)
        advantages = losses.whiten(advantages, mask, shift_mean=critic)  # RLOO's keep their signs

        # 6. Update.
        lr = training.learning_rate(step, args.steps, math.ceil(args.warmup * args.steps), args.lr)
        updates = []
        for minibatch in training.minibatches(len(tasks), args.minibatches, args.ppo_epochs, args.seed, step):
            mb_tokens = sum(len(ids) for b in minibatch for ids in rollout.completions[b])
            mine, batch = batch_of(rollout, minibatch)
            mb_mask = batch.mask  # (b, K, C) for the minibatch's b prompts, like all that begin with mb_
            of_rollout = (old["logprobs"], advantages, old["values"], returns)
            mb_old, mb_advantages, mb_values, mb_returns = (x[mine or [0], :, : mb_mask.shape[-1]] for x in of_rollout)
            new = token_logprobs(policy, batch, args.temperature)
            loss, clipfrac = losses.policy_loss(new["logprobs"], mb_old, mb_advantages, mb_mask, args.clip, mb_tokens)
            with torch.no_grad():
                moved = losses.kl_estimate(mb_old, new["logprobs"], "k3", mb_mask)  # from old to new
                ratio = (new["logprobs"] - mb_old).exp()
            figures = {
                "policy/approxkl": losses.masked_mean(moved, mb_mask, mb_tokens),
                "policy/clipfrac": clipfrac,
                "policy/loss": loss.detach(),
                "val/ratio": losses.masked_mean(ratio, mb_mask, mb_tokens),
            }
            if critic:
                values = new["values"]
                value_loss, clipfrac = losses.value_loss(values, mb_values, mb_returns, mb_mask, args.clip, mb_tokens)
                figures |= {"val/loss": value_loss.detach(), "val/clipfrac": clipfrac}
                loss = loss + args.vf_coef * value_loss
            loss.backward()
            if not updates:  # before the first step the ratio is 1, so this is rounding
                ratio_error = ((ratio - 1).abs() * mb_mask).max().item()
            figures = distributed.all_sum({**figures, "loss": loss.detach()})
            mb_loss, mb_names = float(figures.pop("loss")), [names[b] for b in minibatch]
            norm = training.update(policy, optimizer, mb_loss, lr, args.max_grad_norm, this_step, mb_names)
            updates.append({**figures, "grad_norm": norm})
            if figures["policy/approxkl"] > args.target_kl:
                break  # the policy has moved far enough from the one that wrote the questions
        seconds = time.perf_counter() - started

        # Figures.
        logprobs = old["logprobs"], old["ref_logprobs"]
        kl, kl_k3 = (losses.kl_estimate(*logprobs, kind, mask).sum(-1).mean() for kind in ("k1", "k3"))  # per question
        metrics = {name: sum(float(figures[name]) for figures in updates) / len(updates) for name in updates[0]}
        metrics |= {
            "objective/kl": kl,
            "objective/kl_k3": kl_k3,
            "objective/kl_coef": kl_control.value,
            "objective/scores": raw_scores.mean(),
            "objective/scores_std": raw_scores.std() if raw_scores.numel() > 1 else 0.0,
            "objective/zero_std": (raw_scores == raw_scores[:, :1]).all(-1).float().mean(),  # share of the prompts
            "objective/rlhf_reward": rewards.sum(-1).mean(),
            "objective/entropy": losses.masked_mean(old["entropy"], mask),
            "policy/ratio_error": ratio_error,
            "eos_rate": ((tokens == tokenizer.eos_token_id) & mask.bool()).any(-1).float().mean(),
            "length": mask.sum(-1).mean(),
            "learning_rate": lr,
            "updates": len(updates),
            "distinct_2": distinct_2(rollout.questions),
            **{f"reward/{name}": part.mean() for name, part in rollout.parts.items()},
        }
        if critic:
            metrics["val/explained_variance"] = losses.explained_variance(old["values"], returns, mask)
        if args.kl_target:  # without it the coefficient stays
            kl_control.update(kl, samples=raw_scores.numel())
        if held_out_contexts and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
            state["last"] = evaluate(step + 1)
            metrics |= state["last"]
        best_first = raw_scores.flatten().argsort(descending=True).tolist()
        picked = best_first[0], best_first[len(best_first) // 2], best_first[-1]  # best, median, worst
        for line in keep_samples(step + 1, "train", rollout, picked):
            if step % 5 == 0 or step + 1 == args.steps:
                run.progress.write(line)
        state["kl_coef"] = kl_control.value
        seen = int(mask.sum()) + sum(map(len, rollout.prompts))  # tokens
        progress = {"seconds": seconds, "tokens": seen, "show": {"score": raw_scores.mean(), "kl": kl}}
        run.end_step(step + 1, policy, optimizer, metrics, state, **progress)

    save_policy(policy, tokenizer, run.out, args.model)
    run.finish(steps=args.steps, **state.get("last", {}))
    learnt = "held-out score {first[eval/scores]:.3f} -> {last[eval/scores]:.3f}, " if held_out_contexts else ""
    learnt = learnt.format(**state)
    print(f"ppo: {learnt}{args.steps} iterations, model in {run.out}. Next: python -m socratiq.report {run.out.parent}")


if __name__ == "__main__":
    main(run_stage)
