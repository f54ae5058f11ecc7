"""Stage 2: pairs of questions about one text, one of the requested type and one that is not, for DPO to learn from.

    python make_pairs.py                                        the SFT model writes the rejected questions
    OPENAI_API_KEY=... python make_pairs.py --api-model gpt-4o-mini
    python make_pairs.py --base-url http://localhost:8000/v1 --api-model NAME         any OpenAI-compatible server
    python make_pairs.py --data judged.csv                      people's verdicts: no writer, no scorer, no model

For every question of the data:

    (a) grade       a scorer that never saw its text gives it a strength for each type
    (b) choose      its strongest type reaches --chosen-min: it is the `chosen` one, under that recognised type
    (c) write       the writer is asked for a question of another type about the same text (a server is told which type
                    to avoid)
    (d) verify      well formed, and strength for the chosen type <= --rejected-max: `rejected` it is; otherwise the
                    writer is asked for the next type (a server sees the earlier attempts), up to --max-attempts times
    (e) mirror      a rejected question that is surely of some other type is also the `chosen` one of a pair for that
                    type, and the person's question its `rejected`

(c) and (d) go in rounds: all open rows are asked for, then all answers are verified in the order of the data. Each
answer is on the disk before it is used (FILE.answers.jsonl), so that the same command after a kill asks only for what
is missing and ends with the same bytes.

Why mirror? People wrote the chosen questions and a machine the rejected ones, and the shortest way to tell the two
apart is to look at who wrote them. Without mirrored pairs DPO went that way (docs/dpo.md, Results). In a mirrored
pair that rule fails.

Why not simply take another question of the same text? Few texts have questions of two types, and those that have would
decide alone what DPO learns. Why grade questions that carry a label? Labels are noisy, and a pair whose chosen question
is not of its type teaches the reverse. Rows with a human verdict (`preference`, or `label` with useful, unhelpful or
invalid) need none of this: within a text and type, one judged good is `chosen` and one judged bad `rejected`.

No model learns from held-out texts. SFT and the graders of (a) learn from all training texts. The saved scorer, which
verifies in (d) and gives PPO its reward, and the judge of `socratiq.evaluate` learn from two shares of them without a
common text (from all, if a share lacks a type).
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from socratiq.data import Row, load_rows, split_by_context
from socratiq.pairs.answers import Answer, AnswerLog, Request, ask_all, digest
from socratiq.pairs.checks import Job, flaw
from socratiq.pairs.human import human_pairs
from socratiq.prompts import build_prompt
from socratiq.run import options as cli
from socratiq.run.errors import UserError, main, warn
from socratiq.run.files import atomic_write, remove, to_json
from socratiq.run.folder import fingerprint
from socratiq.scorer.gates import GATES
from socratiq.taxonomy import OTHERS


def parse_arguments(argv: list[str] | None = None):
    told = "The texts leave this machine only with --api-model, --base-url or --writer openai (key: OPENAI_API_KEY)."
    parser = cli.Parser(description="Make pairs of a chosen and a rejected question for train_dpo.py.", epilog=told)
    strength = cli.number(float, least=0, most=1, metavar="P")
    add = parser.add_argument_group("in and out").add_argument
    add("--data", default="sample", metavar="SOURCE", help='"sample", "socratiq", a file, folder, address or Hub id')
    add("--types", type=cli.names, help="only rows of these types; default: all")
    add("--scorer", type=Path, default="runs/scorer", metavar="FOLDER", help="fitted on --data if it is missing")
    add("--scorer-model", default="smollm2", metavar="MODEL", help='language model of a new scorer, or "none"')
    add("--policy", default="runs/sft", metavar="MODEL", help="SFT model, the local writer")
    add("--out", type=Path, default="runs/pairs.jsonl", metavar="FILE", help="the pairs, and beside it two logs")
    add("--limit", type=cli.count, metavar="N", help="use at most N chosen questions, spread over the data")
    add("--shard", type=shard, default="1/1", metavar="I/N", help="only part I of N, into pairs.IofN.jsonl")
    add("--held-out", type=cli.fraction, default=0.1, metavar="SHARE", help="share of the texts kept for evaluation")
    add("--seed", type=cli.zero_or_more, default=0, help="seed of the split and the local writer")
    add("--max-per-question", type=cli.count, default=1, help="use each human-judged question in at most N pairs")

    add = parser.add_argument_group("thresholds of strength: a probability, 0 to 1").add_argument
    add("--chosen-min", type=strength, default=0.4, help="lowest strength of a chosen question")
    add("--rejected-max", type=strength, default=0.1, help="highest strength of a rejected question")
    add("--max-attempts", type=cli.count, default=4, help="questions asked for per row, then it is dropped")

    add = parser.add_argument_group("who writes the rejected questions: the SFT model, or a server").add_argument
    add("--writer", choices=["local", "openai"], help="default: local, unless --api-model or --base-url is given")
    add("--dry-run", action="store_true", help="show the first requests and an estimate; ask nothing, write nothing")
    add("--api-model", metavar="NAME", help="name of the model on the server (default: gpt-4o-mini)")
    add("--base-url", metavar="URL", help="address of the server, such as http://localhost:8000/v1")
    add("--concurrency", type=cli.count, default=8, metavar="N", help="requests under way at the same time")
    add("--max-requests", type=cli.zero_or_more, metavar="N", help="stop after N to this model, earlier runs included")
    add("--max-usd", type=cli.not_negative, metavar="USD", help="stop at this cost, earlier runs of the model included")
    prices = "US dollars for a million prompt tokens and a million answer tokens"
    add("--usd-per-mtok", type=cli.not_negative, nargs=2, default=(0, 0), metavar=("IN", "OUT"), help=prices)
    add("--api-max-tokens", type=cli.count, default=200, metavar="N", help="longest answer; reasoning models need more")
    add("--timeout", type=cli.positive, default=120.0, metavar="SECONDS", help="longest silence of the server")

    add = parser.add_argument_group("the local writer: the SFT model, asked for another type").add_argument
    add("--batch-size", type=cli.count, default=16, metavar="N", help="questions sampled at the same time")
    add("--max-prompt-tokens", type=cli.count, default=512, metavar="TOKENS", help="a longer text loses its tail")
    add("--max-new-tokens", type=cli.count, default=64, metavar="TOKENS", help="longest question")
    cli.add_device_arguments(add, plain="slower, the same questions")

    args = parser.parse_args(argv)
    if args.writer is None and (args.api_model or args.base_url):
        args.writer = "openai"
    if args.max_usd is not None and not all(args.usd_per_mtok):
        parser.error("--max-usd: give the prices too, --usd-per-mtok IN OUT")
    if args.rejected_max > args.chosen_min:
        parser.error(f"--rejected-max {args.rejected_max}: must not be above --chosen-min {args.chosen_min}")
    part = "" if args.shard == (1, 1) else ".{}of{}".format(*args.shard)
    names = [f"{args.out.stem}{part}{end}" for end in (args.out.suffix, ".answers.jsonl", ".dropped.jsonl")]
    args.out, args.answers, args.dropped = (args.out.parent / name for name in names)
    if args.out.exists() and not args.dropped.exists():
        parser.error(f"--out {args.out}: a folder, or not made here (no {args.dropped.name} beside it); choose another")
    return args


def shard(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4)"""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1/4, the first of four parts")
    return int(part), int(parts)


def picked(keys: list[str], args) -> set[str]:
    """At most --limit of the digests, and of these the shard's: more data or a higher limit moves none."""
    kept = sorted(set(keys))[: args.limit]
    part, parts = args.shard
    return {key for key in kept if int(key, 16) % parts == part - 1}


def grade(rows: list[Row], held_out: set[str], lm) -> list[Job]:
    """(a) A job for each row, with the row's strengths by a scorer that never saw its text.

    Training texts are graded by cross-validation among themselves, held-out ones by a scorer fitted on all training
    texts: no label of a held-out text has a say in a training pair.
    """
    from socratiq.scorer.scorer import cross_validate, mean_opinion

    types, found = cross_validate(rows, lm, held_out)
    graded = zip(rows, mean_opinion(found).tolist(), found.amax(0).tolist(), strict=True)
    return [Job(row, dict(zip(types, zip(*both, strict=True), strict=True))) for row, *both in graded]


def choose(jobs: list[Job], chosen_min: float) -> None:
    """(b) Drop the jobs whose question cannot be a chosen one."""
    seen = set()
    for job in jobs:
        ill_formed = flaw(job.row.question, job.row.context)
        rules = {
            "labelled others": job.row.type == OTHERS,
            "the same question stands in the data before": job.key in seen,
            "no type is strong enough (--chosen-min)": job.strength < chosen_min,
            f"not well formed: {ill_formed}": ill_formed,
        }
        job.dropped = next((reason for reason, holds in rules.items() if holds), "")
        seen.add(job.key)


def verify(answered: list[tuple[Job, Answer]], scorer, rejected_max: float) -> None:
    """(d) Note the answers as attempts. A question is `rejected` if all opinions agree that it is not of the type."""
    for job, answer in answered:
        job.attempts.append(job.attempt(answer))
    readable = [job for job, _ in answered if not job.attempts[-1]["flaw"]]
    columns = [job.row.context for job in readable], [job.attempts[-1]["question"] for job in readable]
    parts = scorer.graded(*columns, [job.type for job in readable])[1]
    for index, job in enumerate(readable):
        found = {name: values[index].item() for name, values in parts.items()}
        low = [fault for name, fault in GATES.items() if found.get(name, 1) < 0.5]
        if max(found.get(name, 0) for name in ("strength", "ngrams", "probe")) > rejected_max:
            low.append("still of the unwanted type")
        job.attempts[-1] |= {"strength": round(found["strength"], 4), "flaw": low[0] if low else ""}
        job.rejected = "" if low else job.attempts[-1]["question"]


def pair(row: Row, type_: str, chosen: str, rejected: str, split: str, writer: str, **figures) -> dict:
    """A line of --out: the three columns that every DPO trainer reads, then where they come from."""
    line = {"prompt": build_prompt(row.context, type_), "chosen": chosen, "rejected": rejected, "type": type_}
    return line | {"context": row.context, "split": split, "source": row.source, "writer": writer, **figures}


def pairs_of(job: Job, strengths: dict[str, float], split: str, writer: str, args) -> list[dict]:
    """The pair of a job, and (e) its mirrored pair if the rejected question, of these strengths, allows for one.

    The same thresholds hold, and no question is rejected for the type that a person labelled it with.
    """
    figures = {"chosen_strength": round(job.strength, 4), "rejected_strength": job.attempts[-1]["strength"]}
    pairs = [pair(job.row, job.type, job.row.question, job.rejected, split, writer, **figures)]
    other = max(strengths, key=strengths.get)
    own, highest = job.types.get(other, (1.0, 1.0))
    sure = strengths[other] >= args.chosen_min and highest <= args.rejected_max
    if sure and other not in (job.type, job.row.type):
        figures = {"chosen_strength": round(strengths[other], 4), "rejected_strength": round(own, 4), "mirrored": True}
        pairs.append(pair(job.row, other, job.rejected, job.row.question, split, writer, **figures))
    return pairs


def save(args, pairs: list[dict], dropped: list[dict], rows: int) -> None:
    """Write both files, say what was made, what was not and why, and what to type next."""
    atomic_write(args.dropped, "".join(to_json(line) + "\n" for line in dropped))
    turned = sum("mirrored" in line for line in pairs)
    print(f"{rows} rows, {len(pairs)} pairs in {args.out}, {turned} of them mirrored")
    for reason, count in Counter(": ".join(line["reason"].split(": ")[:2]) for line in dropped).most_common():
        print(f"  {count:6d} not kept: {reason}")
    if not pairs:
        remove(args.out)
        warn("no pair was made, for the reasons above; see also --rejected-max and --max-attempts")
        raise SystemExit(1)
    atomic_write(args.out, "".join(to_json(line) + "\n" for line in pairs))
    print(f"next:  python train_dpo.py --pairs {args.out}")


def show_plan(requests: list[Request], args) -> None:
    """--dry-run: the first two requests, word for word, and what the first round takes."""
    for request in requests[:2]:
        print(json.dumps(request.body, ensure_ascii=False, indent=1).replace("\\n", "\n"))
    sent, answered = sum(len(to_json(request.body)) // 4 for request in requests), 30 * len(requests)
    usd = (sent * args.usd_per_mtok[0] + answered * args.usd_per_mtok[1]) / 1e6
    print(f"first of at most {args.max_attempts} rounds: {len(requests)} requests, less those answered before;")
    print(f"about {sent:,} prompt tokens, {answered:,} answer tokens, {usd:.4f} USD")


def run() -> None:
    args = parse_arguments()
    rows = load_rows(args.data, args.types)
    held_out = {row.context for row in split_by_context(rows, args.held_out, args.seed)[1]}
    split = {row.context: "held_out" if row.context in held_out else "train" for row in rows}

    if args.writer is None and any(row.preference for row in rows):
        print("writer: none; people said which questions they prefer", flush=True)
        found = human_pairs(rows, args.max_per_question)
        pairs = [pair(a, a.type, a.question, b.question, split[a.context], "human") for a, b in found]
        keys = [digest([line[column] for column in ("prompt", "chosen", "rejected")]) for line in pairs]
        kept = picked(keys, args)
        pairs = [line for line, key in zip(pairs, keys, strict=True) if key in kept]
        if args.dry_run:
            return print(f"{len(rows)} rows, {len(pairs)} pairs; no request")
        used = {row for both in found for row in both}
        left = [{"reason": "no partner (--max-per-question)", **row._asdict()} for row in rows if row not in used]
        return save(args, pairs, left, len(rows))

    from socratiq.models import load_policy, load_tokenizer
    from socratiq.pairs.writers import LocalWriter, OpenAIWriter
    from socratiq.scorer import Scorer, grading, language_model

    # The writer, before any long work: a mistake in its arguments should show at once.
    if args.writer == "openai":
        options = {"concurrency": args.concurrency, "max_tokens": args.api_max_tokens, "timeout": args.timeout}
        writer = OpenAIWriter(args.api_model or "gpt-4o-mini", args.base_url, **options)
    else:
        try:
            tokenizer = load_tokenizer(args.policy)
            policy = load_policy(args.policy, args.device, args.dtype, trainable=False, plain=args.plain)
        except UserError as error:
            raise UserError(f"{error} (train_sft.py writes runs/sft)".replace("--model", "--policy")) from None
        model = fingerprint(args.policy) or args.policy
        settings = {name: getattr(args, name) for name in ("seed", "max_prompt_tokens", "max_new_tokens")}
        writer = LocalWriter(policy, tokenizer, model, args.batch_size, settings)
    print(f"writer: {writer.name}; the texts go to {writer.address}", flush=True)

    # The scorer, saved or new. It learns neither from held-out texts nor from the judge's.
    saved = (args.scorer / "scorer.json").exists()
    rows = grading.examples(rows)
    if saved:
        types = {row.type for row in rows} - {OTHERS}
        scorer = Scorer.load(args.scorer, args.device, args.dtype, held_out, types, args.plain)
    else:
        lm = language_model.open_language_model(args.scorer_model, args.device, args.dtype, args.plain)
        scorer = Scorer.fit(grading.rows_to_learn_from(rows, args.held_out, args.seed)[1], lm)

    # (a) Grade and (b) choose.
    jobs = grade(rows, held_out, scorer.lm)
    if not (saved or args.dry_run):  # rows that cannot be graded leave no scorer behind
        scorer.save(args.scorer)
    choose(jobs, args.chosen_min)
    kept = picked([job.key for job in jobs if not job.dropped], args)
    jobs = [job for job in jobs if job.dropped or job.key in kept]

    if args.dry_run:
        return show_plan([Request(job.key, 1, writer.body(job)) for job in jobs if not job.dropped], args)

    # (c) Write and (d) verify, in rounds.
    log = AnswerLog(args.answers, writer.model, args.max_requests, args.max_usd, args.usd_per_mtok)
    before = log.requests
    for number in range(1, args.max_attempts + 1):
        waiting = [job for job in jobs if not (job.rejected or job.dropped)]
        requests = [Request(job.key, number, writer.body(job)) for job in waiting]
        unanswered = ask_all(writer, requests, log, f"round {number}")
        for job in waiting:
            job.dropped = unanswered.get(job.key, "")
        both = zip(waiting, requests, strict=True)
        verify([(job, log.get(request)) for job, request in both if not job.dropped], scorer, args.rejected_max)

    # (e) Mirror, and save.
    kept = [job for job in jobs if job.rejected]
    found = scorer.strengths([job.row.context for job in kept], [job.rejected for job in kept]).tolist()
    pairs = []
    for job, strengths in zip(kept, found, strict=True):
        by_type = dict(zip(scorer.types, strengths, strict=True))
        pairs += pairs_of(job, by_type, split[job.row.context], writer.name, args)
    dropped = [job.without_pair() for job in jobs if not job.rejected]
    used = f"{log.prompt_tokens:,} prompt and {log.completion_tokens:,} answer tokens, {log.usd:.4f} USD"
    print(f"{writer.name}: {log.requests - before} requests now, {log.requests} in all, {used}")
    save(args, pairs, dropped, len(rows))


if __name__ == "__main__":
    main(run)
