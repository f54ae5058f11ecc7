"""Stage 1: supervised fine-tuning. A language model learns to answer the prompt with a question of the asked type.

    python train_sft.py                          # smollm2 on the rows that ship, into runs/sft
    python train_sft.py --data rows.csv --steps 20

Algorithm. For every row, tokens y of the question given the prompt x (text and type):

    loss = - sum_t log pi(y_t | x, y_<t) / (number of question tokens)

summed over all rows of an update, so that a long question weighs more than a short one and splitting the update into
smaller batches changes nothing.

What differs from the plainest SFT:
 1. Only the question and its end-of-sequence token are learnt, never the prompt.
 2. Rows are laid end to end, without padding (socratiq/batch.py); inside an update they are sorted by length.
 3. The head runs on question positions only.
 4. Rows labelled "others" are left out.
 5. The last epoch is saved, though the loss on held-out rows rises after the first or second: questions go on improving
    (README; so do Ouyang et al. 2022, section 3.5, with 16 epochs). --keep best saves the one with the lowest loss.
"""

from socratiq.engine import distributed
from socratiq.run import options as cli
from socratiq.run.errors import bar, main


def parse_arguments():
    parser = cli.Parser(description="SFT: learn to ask questions from (context, question, type) rows.")
    cli.add_model_arguments(parser, model="smollm2")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=cli.source,
        default="sample",
        help='"sample", "socratiq", a file, a folder, an address or a Hub id',
    )
    data.add_argument("--held-out", type=cli.fraction, default=0.1, help="share of the contexts kept for evaluation")
    data.add_argument(
        "--eval-rows", type=cli.count, default=128, metavar="ROWS", help="at most so many held-out rows are evaluated"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=cli.count, default=5, help="passes over the rows")
    training.add_argument("--steps", type=cli.count, metavar="UPDATES", help="updates in all, instead of --epochs")
    training.add_argument("--batch-size", type=cli.count, default=8, metavar="ROWS", help="rows per forward pass")
    training.add_argument("--accumulate", type=cli.count, default=1, metavar="N", help="forward passes per update")
    training.add_argument(
        "--lr",
        type=cli.positive,
        default=None,
        help="peak learning rate (1e-3 with adapters, 1e-4 without; a fifth for 8B)",
    )
    training.add_argument(
        "--keep",
        choices=["last", "best"],
        default="last",
        help="epoch that is saved: the last, or the best by held-out loss",
    )
    training.add_argument("--warmup", type=cli.fraction, default=0.05, help="share of the updates that warm up")
    training.add_argument("--max-grad-norm", type=cli.positive, default=1.0, help="gradients are clipped to this norm")
    cli.add_run_arguments(parser, out="runs/sft")
    args = parser.parse_args()
    args.lr = args.lr or (1e-3 if args.lora_rank else 1e-4)
    return args


def run_stage():
    args = parse_arguments()
    run = distributed.open_run(args, "sft")
    if run.finished:
        return
    import math
    import time

    import torch
    from safetensors.torch import load_file, save_file

    from socratiq import training
    from socratiq.batch import make_batch
    from socratiq.data import load_rows, split_by_context
    from socratiq.losses import sft_loss
    from socratiq.models import load_policy, load_tokenizer, save_policy, token_logprobs
    from socratiq.prompts import encode_completion, encode_prompt
    from socratiq.run.files import replacing
    from socratiq.taxonomy import OTHERS

    # Data: token ids of prompt and question, tokenised apart.
    rows = [row for row in load_rows(args.data) if row.type != OTHERS and row.preference != "rejected"]
    cli.check(bool(rows), f"{args.data}: no rows to learn from; every row is labelled {OTHERS!r}")
    train_rows, held_out_rows = split_by_context(rows, args.held_out, args.seed)
    tokenizer = load_tokenizer(args.model)

    def encode(row):
        prompt = encode_prompt(tokenizer, row.context, row.type, args.max_prompt_tokens)
        return prompt, encode_completion(tokenizer, row.question)

    train = [encode(row) for row in bar(train_rows, desc="tokenising")]
    held_out = [encode(row) for row in held_out_rows[: args.eval_rows]]

    # Model and optimiser.
    training.repeatable(args.deterministic)
    policy = load_policy(args.model, args.device, args.dtype, **cli.model_options(args))
    distributed.shard(policy)
    optimizer = training.make_optimizer(policy, args.lr)
    for row, (prompt, question) in zip(train_rows + held_out_rows, train + held_out, strict=False):
        policy.check_length(len(prompt) + len(question), f"{row.source} under --max-prompt-tokens")

    def batch_of(pairs):
        prompts, completions = [prompt for prompt, _ in pairs], [[completion] for _, completion in pairs]
        return make_batch(prompts, completions, samples=1).to(policy.device)

    def alone(i):
        """Row i for the case that it gives a number that is not finite."""
        batch = batch_of([train[i]])
        logprobs = token_logprobs(policy, batch)["logprobs"]
        loss = sft_loss(logprobs, batch.mask)
        return training.Suspect(train_rows[i].source, train[i][0], [train[i][1]], {"logprobs": logprobs}, loss)

    def evaluate():
        """Mean loss per question token over the held-out rows."""
        total, tokens = 0.0, sum(len(question) for _, question in held_out)
        with torch.no_grad():
            for start in range(0, len(held_out), args.batch_size):
                batch = batch_of(distributed.share(held_out[start : start + args.batch_size]))
                total += sft_loss(token_logprobs(policy, batch)["logprobs"], batch.mask, total=1).item()
        return distributed.all_sum(total) / tokens

    # Loop.
    window = args.batch_size * args.accumulate
    per_epoch = math.ceil(len(train) / window)
    steps = args.steps or args.epochs * per_epoch
    state = run.load(policy, optimizer)
    best, best_loss = run.out / "best.safetensors", state.get("best_loss")
    first_loss, last_loss = state.get("first_loss"), state.get("last_loss")
    if not state and held_out:
        first_loss = evaluate()
        run.log(0, **{"eval/loss": first_loss, "eval/perplexity": training.perplexity(first_loss)})
    for step in run.steps(state.get("step", 0), steps):
        started = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        chosen = training.epoch_windows(len(train), window, args.seed, epoch)[place]
        chosen.sort(key=lambda i: len(train[i][0]) + len(train[i][1]))  # rows of like length share a forward pass
        tokens = sum(len(train[i][1]) for i in chosen)  # question tokens of the whole update
        loss = 0.0
        for start in range(0, len(chosen), args.batch_size):
            batch = batch_of([train[i] for i in distributed.share(chosen[start : start + args.batch_size])])
            logprobs = token_logprobs(policy, batch)["logprobs"]  # (B, 1, C)
            part = sft_loss(logprobs, batch.mask, total=tokens)
            part.backward()
            loss += part.item()
        loss = distributed.all_sum(loss)
        lr = training.learning_rate(step, steps, math.ceil(args.warmup * steps), args.lr)
        norm = training.update(run, policy, optimizer, step + 1, lr, loss, args.max_grad_norm, chosen, alone)
        seconds = time.perf_counter() - started
        metrics = {"loss": loss, "learning_rate": lr, "grad_norm": norm, "epoch": (step + 1) / per_epoch}

        if (place + 1 == per_epoch or step + 1 == steps) and held_out:  # the end of an epoch
            metrics["eval/loss"] = evaluate()
            metrics["eval/perplexity"] = training.perplexity(metrics["eval/loss"])
            last_loss = metrics["eval/loss"]
            better = last_loss < (math.inf if best_loss is None else best_loss)
            best_loss = last_loss if better else best_loss
            if better and args.keep == "best":
                weights = distributed.gather({name: x.detach() for name, x in policy.trainable().items()})
                if distributed.rank() == 0:
                    with replacing(best) as temporary:
                        save_file({name: x.contiguous() for name, x in weights.items()}, temporary)
        state = {"best_loss": best_loss, "first_loss": first_loss, "last_loss": last_loss}
        run.end_step(
            step + 1, policy, optimizer, metrics, state, seconds=seconds,
            tokens=sum(len(train[i][0]) + len(train[i][1]) for i in chosen), show={"loss": loss},
            checkpoint=place + 1 == per_epoch,
        )  # fmt: skip

    # Save, of the best epoch if there is one.
    if distributed.first(best.exists):
        weights = policy.trainable()
        for name, tensor in load_file(best, device=str(policy.device)).items():
            weights[name].data.copy_(distributed.part(tensor, weights[name]))
    save_policy(policy, tokenizer, run.out, args.model)
    kept_loss = best_loss if args.keep == "best" else last_loss
    run.finish(steps=steps, **{"eval/loss first": first_loss, "eval/loss kept": kept_loss, "eval/loss best": best_loss})
    fell = f"{steps} updates"
    if kept_loss is not None:
        lowest = f" ({best_loss:.3f} at its lowest)" if best_loss is not None and best_loss < kept_loss else ""
        fell = f"held-out loss {first_loss:.3f} -> {kept_loss:.3f}{lowest} over {steps} updates"
    print(f"sft: {fell}, model in {run.out}. Next: python make_pairs.py --policy {run.out}")


if __name__ == "__main__":
    main(run_stage)
