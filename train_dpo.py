"""Stage 3: direct preference optimisation. The model learns to prefer questions of the asked type.

    python train_dpo.py                          # runs/sft and runs/pairs.jsonl into runs/dpo

Algorithm (Rafailov et al. 2023, eq. 7). For every pair of a chosen and a rejected question y_w, y_l to a prompt x:

    loss = - log sigmoid( beta * [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ] )

with log pi(y|x) the sum over the tokens of y, and pi_ref the model as it was before this stage.

What differs from the paper:
 1. Both questions of a pair hang on one prompt, which is run once (socratiq/batch.py).
 2. The reference's log-probs are computed once, before the first update, by the model itself: it *is* the reference
    then. They are kept in reference.safetensors; no second model is ever in memory.
 3. Options: label smoothing (conservative DPO), the IPO and hinge losses, and an SFT term on the chosen question
    against the known drift in which both log-probs fall and the chosen one merely falls less (watch logps/chosen).
 4. With --loss ipo the log-probs are means per token, not sums, so that length does not set the scale.
"""

from socratiq.engine import distributed
from socratiq.run import options as cli
from socratiq.run.errors import bar, main


def parse_arguments():
    parser = cli.Parser(description="DPO: learn to prefer the chosen over the rejected question of each pair.")
    cli.add_model_arguments(parser, model="runs/sft")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--pairs", default="runs/pairs.jsonl", metavar="FILE", help="JSON lines with prompt, chosen and rejected"
    )
    data.add_argument("--held-out", type=cli.fraction, default=0.1, help="share of the contexts kept for evaluation")
    data.add_argument(
        "--eval-rows", type=cli.count, default=128, metavar="PAIRS", help="at most so many held-out pairs are evaluated"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--loss", default="sigmoid", choices=["sigmoid", "ipo", "hinge"], help="kind of preference loss"
    )
    training.add_argument(
        "--beta", type=cli.positive, default=0.1, help="how strongly the policy is tied to the reference"
    )
    training.add_argument(
        "--label-smoothing",
        type=cli.number(float, least=0, below=0.5, metavar="SHARE"),
        default=0.0,
        help="share of labels taken to be wrong",
    )
    training.add_argument(
        "--sft-coef", type=cli.not_negative, default=0.0, help="weight of an SFT loss on the chosen question"
    )
    training.add_argument("--epochs", type=cli.count, default=2, help="passes over the pairs")
    training.add_argument("--steps", type=cli.count, metavar="UPDATES", help="updates in all, instead of --epochs")
    training.add_argument("--batch-size", type=cli.count, default=8, metavar="PAIRS", help="pairs per forward pass")
    training.add_argument("--accumulate", type=cli.count, default=1, metavar="N", help="forward passes per update")
    training.add_argument(
        "--lr",
        type=cli.positive,
        default=None,
        help="peak learning rate (1e-4 with adapters, 1e-5 without; a fifth for 8B)",
    )
    training.add_argument("--warmup", type=cli.fraction, default=0.1, help="share of the updates that warm up")
    training.add_argument("--max-grad-norm", type=cli.positive, default=1.0, help="gradients are clipped to this norm")
    cli.add_run_arguments(parser, out="runs/dpo")
    args = parser.parse_args()
    if args.label_smoothing and args.loss != "sigmoid":
        parser.error("--label-smoothing: only the sigmoid loss knows it; leave it out, or choose --loss sigmoid")
    args.lr = args.lr or (1e-4 if args.lora_rank else 1e-5)
    return args


def run_stage():
    args = parse_arguments()
    run = distributed.open_run(args, "dpo")
    if run.finished:
        return
    import math
    import time

    import torch
    from safetensors.torch import load_file, save_file

    from socratiq import training
    from socratiq.batch import make_batch
    from socratiq.data import load_pairs, split_by_context
    from socratiq.losses import dpo_loss, sequence_logps, sft_loss
    from socratiq.models import load_policy, load_tokenizer, save_policy, token_logprobs
    from socratiq.prompts import encode_completion, encode_pair_prompt
    from socratiq.run.files import replacing

    # Data: token ids of prompt, chosen and rejected.
    train_pairs, held_out_pairs = split_by_context(load_pairs(args.pairs), args.held_out, args.seed)
    tokenizer = load_tokenizer(args.model)
    pairs = train_pairs + held_out_pairs[: args.eval_rows]
    encoded = [
        (
            encode_pair_prompt(tokenizer, pair, args.max_prompt_tokens),
            [encode_completion(tokenizer, pair.chosen), encode_completion(tokenizer, pair.rejected)],
        )
        for pair in bar(pairs, desc="tokenising")
    ]
    train, held_out = range(len(train_pairs)), range(len(train_pairs), len(pairs))

    # Model and optimiser.
    training.repeatable(args.deterministic)
    policy = load_policy(args.model, args.device, args.dtype, **cli.model_options(args))
    distributed.shard(policy)
    optimizer = training.make_optimizer(policy, args.lr)
    for pair, (prompt, questions) in zip(pairs, encoded, strict=True):
        policy.check_length(len(prompt) + max(map(len, questions)), pair.source)

    def forward(chosen):
        """Log-probs of the two questions of these pairs: per completion (B, 2), and per token with their mask."""
        batch = make_batch([encoded[i][0] for i in chosen], [encoded[i][1] for i in chosen], samples=2)
        batch = batch.to(policy.device)
        logprobs = token_logprobs(policy, batch)["logprobs"]  # (B, 2, C)
        return sequence_logps(logprobs, batch.mask, average=args.loss == "ipo"), logprobs, batch

    # The reference, once: before its first update the policy is the reference.
    state = run.load(policy, optimizer)
    reference_file = run.out / "reference.safetensors"
    if not distributed.first(reference_file.exists):
        cli.check(not state, f"{reference_file} is gone; put it back, or --restart to begin anew")
        reference_logps = torch.zeros(len(pairs), 2)
        with torch.no_grad():
            for start in bar(range(0, len(pairs), args.batch_size), desc="reference"):
                mine = distributed.share(range(start, min(start + args.batch_size, len(pairs))))
                reference_logps[mine] = forward(mine)[0].cpu()
        reference_logps = distributed.all_sum(reference_logps)
        if distributed.rank() == 0:
            with replacing(reference_file) as temporary:
                save_file({"logps": reference_logps}, temporary)
        distributed.first(reference_file.exists)  # the others wait for it
    reference_logps = load_file(reference_file)["logps"].to(policy.device)  # (pairs, 2)

    def preference(chosen):
        """Losses (B,) of these pairs and the figures worth logging, each (B,)."""
        logps, logprobs, batch = forward(chosen)
        reference = reference_logps[list(chosen)]
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1], args.beta, args.label_smoothing, args.loss
        )
        figures = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "logps/chosen": logps[:, 0].detach(),
            "logps/rejected": logps[:, 1].detach(),
        }
        return losses, figures, logprobs, batch

    def loss_of(chosen, pairs_in_all, chosen_tokens_in_all):
        """The part of an update's loss that these pairs make, their figures, and their log-probs."""
        losses, figures, logprobs, batch = preference(chosen)
        loss = losses.sum() / pairs_in_all
        if args.sft_coef:
            loss = loss + args.sft_coef * sft_loss(logprobs[:, 0], batch.mask[:, 0], total=chosen_tokens_in_all)
        return loss, figures, logprobs

    def alone(i):
        """Pair i for the case that it gives a number that is not finite."""
        loss, _, logprobs = loss_of([i], 1, len(encoded[i][1][0]))
        tensors = {"logprobs": logprobs, "reference_logps": reference_logps[i]}
        return training.Suspect(pairs[i].source, *encoded[i], tensors, loss)

    def evaluate():
        """Means over the held-out pairs."""
        parts = []
        with torch.no_grad():
            for start in range(held_out.start, held_out.stop, args.batch_size):
                mine = distributed.share(range(start, min(start + args.batch_size, held_out.stop)))
                losses, figures, _, _ = preference(mine)
                parts.append({"loss": losses, **figures})
        sums = distributed.all_sum({name: torch.cat([part[name] for part in parts]).sum() for name in parts[0]})
        return {f"eval/{name}": x.item() / len(held_out) for name, x in sums.items()}

    # Loop.
    window = args.batch_size * args.accumulate
    per_epoch = math.ceil(len(train) / window)
    steps = args.steps or args.epochs * per_epoch
    evaluation = state.get("evaluation", {})
    if not state and held_out:
        evaluation = evaluate()  # the first DPO loss is ln 2: policy and reference are the same
        run.log(0, **evaluation)
    for step in run.steps(state.get("step", 0), steps):
        started = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        chosen = training.epoch_windows(len(train), window, args.seed, epoch)[place]
        chosen.sort(key=lambda i: len(encoded[i][0]))
        chosen_tokens = sum(len(encoded[i][1][0]) for i in chosen)
        loss, sums = 0.0, {}
        for start in range(0, len(chosen), args.batch_size):
            mine = distributed.share(chosen[start : start + args.batch_size])
            part, figures, _ = loss_of(mine, len(chosen), chosen_tokens)
            part.backward()
            loss += part.item()
            sums = {name: sums.get(name, 0) + x.sum() / len(chosen) for name, x in figures.items()}
        loss, sums = distributed.all_sum(loss), distributed.all_sum(sums)
        lr = training.learning_rate(step, steps, math.ceil(args.warmup * steps), args.lr)
        norm = training.update(run, policy, optimizer, step + 1, lr, loss, args.max_grad_norm, chosen, alone)
        seconds = time.perf_counter() - started
        metrics = {"loss": loss, "learning_rate": lr, "grad_norm": norm, "epoch": (step + 1) / per_epoch, **sums}
        if (place + 1 == per_epoch or step + 1 == steps) and held_out:
            evaluation = evaluate()
            metrics |= evaluation
        run.end_step(
            step + 1, policy, optimizer, metrics, {"evaluation": evaluation}, seconds=seconds,
            tokens=sum(len(encoded[i][0]) + sum(map(len, encoded[i][1])) for i in chosen),
            show={"loss": loss, "margin": sums["rewards/margins"]}, checkpoint=place + 1 == per_epoch,
        )  # fmt: skip

    save_policy(policy, tokenizer, run.out, args.model)
    run.finish(steps=steps, **evaluation)
    learnt = f"{steps} updates"
    if held_out:
        learnt = (
            f"held-out margin {evaluation['eval/rewards/margins']:.3f}, "
            f"accuracy {evaluation['eval/rewards/accuracies']:.0%} after {steps} updates"
        )
    print(f"dpo: {learnt}, model in {run.out}. Next: python train_ppo.py --model {run.out}")


if __name__ == "__main__":
    main(run_stage)
