"""Stage 1: supervised fine-tuning. A language model learns to answer the prompt with a question of the requested type.

    python train_sft.py                          # smollm2 on the rows that ship, into runs/sft
    python train_sft.py --data rows.csv --steps 20

Algorithm. For every row, tokens y of the question given the prompt x (text and type):

    loss = - sum_t log pi(y_t | x, y_<t) / (number of question tokens)

over all rows of an update. One update:

 1. Rows: the next window of the epoch's random order.
 2. Forward and backward, batch by batch. Each batch's loss is divided by the tokens of the whole window, so that
    splitting an update into smaller batches changes nothing.
 3. Update: clip the gradient, AdamW, linear warm-up and decay.
 4. At the end of an epoch: the loss on held-out rows.

Departures from the plainest SFT:
 1. Only the question and its end-of-sequence token are learnt, never the prompt.
 2. Rows are laid end to end, without padding (socratiq/batch.py); inside an update they are sorted by length.
 3. The head runs on question positions only.
 4. Rows labelled "others" and questions that people judged bad are left out.
 5. The final weights are saved, though the loss on held-out rows rises after the first or second epoch: the questions
    keep improving (docs/sft.md). Ouyang et al. 2022, section 3.5, also train on, for 16 epochs.
"""

from socratiq.engine import distributed
from socratiq.run import options
from socratiq.run.errors import UserError, bar, main


def parse_arguments():
    parser = options.Parser(description="SFT: learn to ask questions from (context, question, type) rows.")
    options.add_model_arguments(parser, model="smollm2")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="sample", metavar="SOURCE", help='"sample", "socratiq", a file, folder, address or Hub id')
    add("--types", type=options.names, help="only rows of these types; default: all")
    add("--held-out", type=options.fraction, default=0.1, help="share of the contexts kept for evaluation")
    add("--eval-rows", type=options.count, default=128, metavar="ROWS", help="held-out rows evaluated, at most")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=options.count, default=5, help="passes over the rows")
    add("--steps", type=options.count, metavar="UPDATES", help="updates in all, instead of --epochs")
    add("--batch-size", type=options.count, default=8, metavar="ROWS", help="rows per forward pass")
    add("--accumulate", type=options.count, default=1, metavar="N", help="forward passes per update")
    add("--lr", type=options.positive, help="peak learning rate (default: 1e-3 with adapters, 1e-4 without)")
    add("--warmup", type=options.fraction, default=0.05, help="share of the updates that warm up")
    add("--max-grad-norm", type=options.positive, default=1.0, help="gradients are clipped to this norm")
    options.add_run_arguments(parser, out="runs/sft")
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

    from socratiq import training
    from socratiq.batch import make_batch
    from socratiq.data import load_rows, split_by_context
    from socratiq.losses import sft_loss
    from socratiq.models import load_policy, load_tokenizer
    from socratiq.policy import token_logprobs
    from socratiq.prompts import encode_completion, encode_prompt
    from socratiq.saving import save_policy
    from socratiq.taxonomy import OTHERS

    # Data: token ids of prompt and question, tokenised apart.
    rows = [row for row in load_rows(args.data, args.types) if row.type != OTHERS and row.preference != "rejected"]
    if not rows:
        raise UserError(f"{args.data}: no rows to learn from: all are labelled {OTHERS!r} or judged bad; add others")
    train_rows, held_out_rows = split_by_context(rows, args.held_out, args.seed)
    rows = train_rows + training.draw(held_out_rows, args.eval_rows, args.seed)
    tokenizer = load_tokenizer(args.model)
    limit = args.max_prompt_tokens
    prompts = [encode_prompt(tokenizer, row.context, row.type, limit) for row in bar(rows, desc="tokenising")]
    questions = [encode_completion(tokenizer, row.question) for row in rows]
    train, held_out = range(len(train_rows)), range(len(train_rows), len(rows))

    # Model and optimiser.
    policy = load_policy(args.model, args.device, args.dtype, **options.model_options(args))
    lengths = [len(prompt) + len(question) for prompt, question in zip(prompts, questions, strict=True)]
    for row, length in zip(rows, lengths, strict=True):
        policy.check_length(length, row.source)
    distributed.shard(policy)
    optimizer = training.make_optimizer(policy, args.lr)

    def batch_of(indices):
        """The batch of these rows; with several processes, each takes its share."""
        mine = distributed.share(indices)
        # A process without rows still has to run the model: on a prompt without a question.
        batch = make_batch([prompts[i] for i in mine] or [[0]], [[questions[i]] for i in mine] or [[[]]])
        return batch.to(policy.device)

    @torch.no_grad()
    def evaluate():
        """Mean loss per question token over the held-out rows."""
        loss, tokens = 0.0, sum(len(questions[i]) for i in held_out)
        for start in range(held_out.start, held_out.stop, args.batch_size):
            batch = batch_of(range(start, min(start + args.batch_size, held_out.stop)))
            loss += sft_loss(token_logprobs(policy, batch)["logprobs"], batch.mask, tokens).item()
        return distributed.all_sum(loss)

    # Loop.
    window_size = args.batch_size * args.accumulate
    per_epoch = math.ceil(len(train) / window_size)
    steps = args.steps or args.epochs * per_epoch
    state = run.load(policy, optimizer)
    if not state and held_out:
        state["first_loss"] = state["last_loss"] = evaluate()
        run.log(0, **{"eval/loss": state["first_loss"], "eval/perplexity": training.perplexity(state["first_loss"])})
    for step in run.steps(state.get("step", 0), steps):
        started = time.perf_counter()

        # 1. Rows.
        epoch, place = divmod(step, per_epoch)
        window = training.epoch_windows(len(train), window_size, args.seed, epoch)[place]
        window.sort(key=lambda i: lengths[i])
        tokens = sum(len(questions[i]) for i in window)

        # 2. Forward and backward.
        loss = 0.0
        for start in range(0, len(window), args.batch_size):
            batch = batch_of(window[start : start + args.batch_size])
            logprobs = token_logprobs(policy, batch)["logprobs"]  # (B, 1, C)
            mb_loss = sft_loss(logprobs, batch.mask, total=tokens)
            mb_loss.backward()
            loss += mb_loss.item()

        # 3. Update.
        loss = distributed.all_sum(loss)
        lr = training.learning_rate(step, steps, math.ceil(args.warmup * steps), args.lr)
        sources = [rows[i].source for i in window]
        norm = training.update(policy, optimizer, loss, lr, args.max_grad_norm, f"sft step {step + 1}", sources)
        metrics = {"loss": loss, "learning_rate": lr, "grad_norm": norm, "epoch": (step + 1) / per_epoch}
        seconds = time.perf_counter() - started

        # 4. Evaluation.
        epoch_ends = place + 1 == per_epoch or step + 1 == steps
        if epoch_ends and held_out:
            state["last_loss"] = evaluate()
            metrics |= {"eval/loss": state["last_loss"], "eval/perplexity": training.perplexity(state["last_loss"])}
        progress = {"seconds": seconds, "tokens": sum(lengths[i] for i in window), "show": {"loss": loss}}
        run.end_step(step + 1, policy, optimizer, metrics, state, **progress, checkpoint=epoch_ends)

    save_policy(policy, tokenizer, run.out, args.model)
    run.finish(steps=steps, **{"eval/loss first": state.get("first_loss"), "eval/loss last": state.get("last_loss")})
    learnt = f"held-out loss {state['first_loss']:.3f} -> {state['last_loss']:.3f}" if held_out else "learnt"
    print(f"sft: {learnt} over {steps} updates, model in {run.out}. Next: python make_pairs.py --policy {run.out}")


if __name__ == "__main__":
    main(run_stage)
