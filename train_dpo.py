"""Stage 3: direct preference optimisation. The model learns to prefer questions of the requested type.

    python train_dpo.py                          # runs/sft and runs/pairs.jsonl into runs/dpo

Algorithm (Rafailov et al. 2023, eq. 7). For every pair of a chosen and a rejected question y_w, y_l to a prompt x:

    loss = - log sigmoid( beta * [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ] )

with log pi(y|x) the sum over the tokens of y, and pi_ref the model before this stage. One update:

 1. Pairs: the next window of the epoch's random order.
 2. Forward and backward, batch by batch.
 3. Update: clip the gradient, AdamW, linear warm-up and decay.
 4. At the end of an epoch: the same figures on held-out pairs.

Departures from the paper:
 1. Both questions of a pair share one prompt, which is run once (socratiq/batch.py).
 2. The reference's log-probs are computed once, before the first update, by the model itself: it *is* the reference
    then. No second model is ever in memory.
 3. Options: label smoothing (conservative DPO), the IPO and hinge losses, and an SFT term on the chosen question
    against the known drift in which both log-probs fall and the chosen one merely falls less (watch logps/chosen).
 4. With --loss ipo the log-probs are means per token, not sums, so that length does not set the scale.
"""

from socratiq.engine import distributed
from socratiq.run import options
from socratiq.run.errors import bar, main

REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
FIGURES = ["loss", *REWARDS, "logps/chosen", "logps/rejected"]


def parse_arguments():
    parser = options.Parser(description="DPO: learn to prefer the chosen over the rejected question of each pair.")
    options.add_model_arguments(parser, model="runs/sft")
    add = parser.add_argument_group("data").add_argument
    add("--pairs", default="runs/pairs.jsonl", metavar="FILE", help="rows of prompt, chosen and rejected")
    add("--held-out", type=options.fraction, default=0.1, help="share of the contexts kept for evaluation")
    add("--eval-rows", type=options.count, default=128, metavar="PAIRS", help="held-out pairs evaluated, at most")
    add = parser.add_argument_group("training").add_argument
    add("--loss", default="sigmoid", choices=["sigmoid", "ipo", "hinge"], help="kind of preference loss")
    add("--beta", type=options.positive, default=0.1, help="how strongly the policy is tied to the reference")
    add(
        "--label-smoothing", type=options.number(least=0, below=0.5), default=0.0, help="share of labels that are wrong"
    )
    add("--sft-coef", type=options.not_negative, default=0.0, help="weight of an SFT loss on the chosen question")
    add("--epochs", type=options.count, default=2, help="passes over the pairs")
    add("--steps", type=options.count, metavar="UPDATES", help="updates in all, instead of --epochs")
    add("--batch-size", type=options.count, default=8, metavar="PAIRS", help="pairs per forward pass")
    add("--accumulate", type=options.count, default=1, metavar="N", help="forward passes per update")
    add("--lr", type=options.positive, help="peak learning rate (default: 1e-4 with adapters, 1e-5 without)")
    add("--warmup", type=options.fraction, default=0.1, help="share of the updates that warm up")
    add("--max-grad-norm", type=options.positive, default=1.0, help="gradients are clipped to this norm")
    options.add_run_arguments(parser, out="runs/dpo")
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

    from socratiq import training
    from socratiq.batch import make_batch
    from socratiq.data import load_pairs, split_by_context
    from socratiq.losses import dpo_loss, sequence_logps, sft_loss
    from socratiq.models import load_policy, load_tokenizer
    from socratiq.policy import token_logprobs
    from socratiq.prompts import encode_completion, encode_pair_prompt
    from socratiq.saving import save_policy

    # Data: token ids of each pair's prompt and two questions, chosen and rejected.
    train_pairs, held_out_pairs = split_by_context(load_pairs(args.pairs), args.held_out, args.seed)
    pairs = train_pairs + training.draw(held_out_pairs, args.eval_rows, args.seed)
    tokenizer = load_tokenizer(args.model)
    prompts = [encode_pair_prompt(tokenizer, pair, args.max_prompt_tokens) for pair in bar(pairs, desc="tokenising")]
    questions = [[encode_completion(tokenizer, text) for text in (pair.chosen, pair.rejected)] for pair in pairs]
    train, held_out = range(len(train_pairs)), range(len(train_pairs), len(pairs))

    # Model and optimiser.
    policy = load_policy(args.model, args.device, args.dtype, **options.model_options(args))
    for i, pair in enumerate(pairs):
        policy.check_length(len(prompts[i]) + max(map(len, questions[i])), pair.source)
    distributed.shard(policy)
    optimizer = training.make_optimizer(policy, args.lr)

    def forward(mine):
        """Sequence log-probs (B, 2) of these pairs, token log-probs and mask (B, 2, C)."""
        # A process without pairs still has to run the model: on a prompt without questions.
        batch = make_batch([prompts[i] for i in mine] or [[0]], [questions[i] for i in mine] or [[[], []]])
        batch = batch.to(policy.device)
        logprobs = token_logprobs(policy, batch)["logprobs"][: len(mine)]  # (B, 2, C)
        mask = batch.mask[: len(mine)]
        return sequence_logps(logprobs, mask, average=args.loss == "ipo"), logprobs, mask

    def figures_of(losses, chosen_rewards, rejected_rewards, logps):
        """The sums of FIGURES over some pairs, (7,)."""
        margins = chosen_rewards - rejected_rewards
        columns = [losses, chosen_rewards, rejected_rewards, margins, (margins > 0).float(), logps[:, 0], logps[:, 1]]
        return torch.stack(columns).detach().sum(-1)

    def batches(indices):
        """These pairs, `--batch-size` at a time; with several processes, each takes its share of every batch."""
        return [distributed.share(indices[i : i + args.batch_size]) for i in range(0, len(indices), args.batch_size)]

    # The reference, once: before its first update the policy is the reference.
    state = run.load(policy, optimizer)
    if "reference_logps" not in state:
        reference_logps = torch.zeros(len(pairs), 2)
        with torch.no_grad():
            for mine in bar(batches(range(len(pairs))), desc="reference"):
                reference_logps[mine] = forward(mine)[0].cpu()
        state["reference_logps"] = distributed.all_sum(reference_logps).tolist()
    reference_logps = torch.tensor(state["reference_logps"], device=policy.device)  # (pairs, 2)

    @torch.no_grad()
    def evaluate():
        """The mean of FIGURES over the held-out pairs."""
        sums = torch.zeros(len(FIGURES), device=policy.device)
        for mine in batches(held_out):
            logps = forward(mine)[0]
            found = dpo_loss(*logps.T, *reference_logps[mine].T, args.beta, args.label_smoothing, args.loss)
            sums += figures_of(*found, logps)
        means = distributed.all_sum(sums) / len(held_out)
        return {f"eval/{name}": mean for name, mean in zip(FIGURES, means.tolist(), strict=True)}

    # Loop.
    window_size = args.batch_size * args.accumulate
    per_epoch = math.ceil(len(train) / window_size)
    steps = args.steps or args.epochs * per_epoch
    if "step" not in state and held_out:
        state["evaluation"] = evaluate()  # the first DPO loss is ln 2: policy and reference are the same
        run.log(0, **state["evaluation"])
    for step in run.steps(state.get("step", 0), steps):
        started = time.perf_counter()

        # 1. Pairs.
        epoch, place = divmod(step, per_epoch)
        window = training.epoch_windows(len(train), window_size, args.seed, epoch)[place]
        window.sort(key=lambda i: len(prompts[i]))
        chosen_tokens = sum(len(questions[i][0]) for i in window)

        # 2. Forward and backward.
        loss, sums = 0.0, torch.zeros(len(FIGURES), device=policy.device)
        for mine in batches(window):
            logps, logprobs, mask = forward(mine)
            ref_logps = reference_logps[mine]  # (B, 2): chosen and rejected, as logps
            losses, *rewards = dpo_loss(*logps.T, *ref_logps.T, args.beta, args.label_smoothing, args.loss)
            sums += figures_of(losses, *rewards, logps)
            mb_loss = losses.sum() / len(window)
            if args.sft_coef:
                mb_loss = mb_loss + args.sft_coef * sft_loss(logprobs[:, 0], mask[:, 0], total=chosen_tokens)
            mb_loss.backward()
            loss += mb_loss.item()

        # 3. Update.
        means = distributed.all_sum(sums) / len(window)
        figures = dict(zip(FIGURES, means.tolist(), strict=True)) | {"loss": distributed.all_sum(loss)}
        lr = training.learning_rate(step, steps, math.ceil(args.warmup * steps), args.lr)
        this_step, sources = f"dpo step {step + 1}", [pairs[i].source for i in window]
        norm = training.update(policy, optimizer, figures["loss"], lr, args.max_grad_norm, this_step, sources)
        metrics = {**figures, "learning_rate": lr, "grad_norm": norm, "epoch": (step + 1) / per_epoch}
        seconds = time.perf_counter() - started

        # 4. Evaluation.
        epoch_ends = place + 1 == per_epoch or step + 1 == steps
        if epoch_ends and held_out:
            state["evaluation"] = evaluate()
            metrics |= state["evaluation"]
        seen = sum(len(prompts[i]) + sum(map(len, questions[i])) for i in window)  # tokens
        progress = {"seconds": seconds, "tokens": seen, "show": {"margin": figures["rewards/margins"]}}
        run.end_step(step + 1, policy, optimizer, metrics, state, **progress, checkpoint=epoch_ends)

    save_policy(policy, tokenizer, run.out, args.model)
    evaluation = state.get("evaluation", {})
    run.finish(steps=steps, **evaluation)
    learnt = "held-out margin {eval/rewards/margins:.3f}, accuracy {eval/rewards/accuracies:.0%}, " if held_out else ""
    learnt = learnt.format(**evaluation)
    print(f"dpo: {learnt}{steps} updates, model in {run.out}. Next: python train_ppo.py --model {run.out}")


if __name__ == "__main__":
    main(run_stage)
