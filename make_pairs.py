"""Stage 2: pairs of questions about one text, one of the wanted type and one that is not, for DPO to learn from.

    python make_pairs.py                                        the SFT model writes the rejected questions
    OPENAI_API_KEY=... python make_pairs.py --api-model gpt-4o-mini
    python make_pairs.py --base-url http://localhost:8000/v1 --api-model NAME         any OpenAI-compatible server

For every question of the data:

    (a) grade       a scorer that never saw its text gives it a strength for each type
    (b) choose      strength >= --chosen-min for some type: it is the `chosen` one, under that recognised type
    (c) write       the writer is asked for a question about the same text that is precisely not of that type
    (d) verify      well formed, strength for the chosen type <= --rejected-max, and a gap >= --min-gap: `rejected` it
                    is; otherwise the writer is asked again, the earlier attempts shown, up to --max-attempts times
    (e) mirror      a rejected question that is surely of some other type is also the `chosen` one of a pair for that
                    type, and the person's question its `rejected` (--no-mirror leaves these pairs out)

Why mirror? People wrote the chosen questions and a machine the rejected ones, and the shortest way to tell the two
apart is to look at who wrote them. Without mirrored pairs DPO went that way: on the embedded rows, at a learning rate
of 3e-4, every pair was right after five updates, and after an epoch the chosen questions were 30 nats less likely than
before, at margins of 3. A mirrored pair makes authorship worthless.

Why not simply take another question of the same text? Few texts have questions of two types, and those that have would
decide alone what DPO learns. Why grade questions that carry a label? Labels are noisy, and a pair whose chosen question
is not of its type teaches the reverse.

Who sees what: nothing learns from held-out texts. SFT and the graders of (a) learn from all training texts, the judge's
share included. The saved scorer, which verifies in (d) and gives PPO its reward, and the judge of `socratiq.evaluate`
learn from two shares of them that have no text in common.

Every answer is on the disk before its row goes on (runs/pairs.answers.jsonl). The same command after a kill asks only
for what is missing, and ends with the same bytes: pairs stand in the order of the data, whatever the order of answers.
"""

import argparse
import os
import signal
import sys
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from socratiq.pairs.checks import Answer, AnswerLog, Job, Request, clean_question, digest, flaw, other_types
from socratiq.pairs.writers import Budget, Halted, LimitReached, LocalWriter, OpenAIWriter, RowFailed, fingerprint
from socratiq.run import options as cli
from socratiq.run.errors import Stopped, UserError, bar, main, speaks, warn
from socratiq.run.files import atomic_write, to_json
from socratiq.scorer import fit
from socratiq.scorer.gates import GATES, words

GIVE_UP_AFTER = 5  # rows without an answer, one after the other, before the server is believed to be down
SCORER_MODEL = "smollm2"  # PPO learns to please n-grams alone with questions that fit every text (README)
WRONG_FINISH = {"refusal": "refused to answer", "content_filter": "stopped by the content filter"}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_arguments(argv: list[str] | None = None):
    parser = cli.Parser(
        description="Make pairs of a chosen and a rejected question for train_dpo.py.",
        epilog="A server's key is read from OPENAI_API_KEY, its address from --base-url or OPENAI_BASE_URL. "
        "With --writer openai the texts of --data are sent to that server.",
        usage="make_pairs.py [--writer local|openai] [options]",
    )
    strength = cli.number(float, least=0, most=1)
    add = parser.add_argument_group("in and out").add_argument
    add(
        "--data",
        type=cli.source,
        default="sample",
        help='"sample", "socratiq", a file, a folder, an address or a Hub id',
    )
    add("--scorer", default="runs/scorer", metavar="FOLDER", help="judges the questions; fitted on --data if missing")
    add(
        "--policy",
        default="runs/sft",
        metavar="MODEL",
        help="SFT model, the local writer",
    )
    add(
        "--out",
        default="runs/pairs.jsonl",
        metavar="FILE",
        help="beside a pairs.jsonl: pairs.dropped.jsonl and pairs.answers.jsonl",
    )
    add("--limit", type=cli.count, metavar="N", help="use at most N chosen questions, spread over the data")
    add(
        "--shard",
        type=shard,
        metavar="I/N",
        help="only part I of N of these, into pairs.IofN.jsonl: a part for each machine",
    )
    add("--held-out", type=cli.fraction, default=0.1, metavar="SHARE", help="share of the texts kept for evaluation")
    add("--seed", type=cli.zero_or_more, default=0, help="seed of the split, the scorer and the local writer")

    add = parser.add_argument_group("what is chosen and what rejected, by strength: a probability, 0 to 1").add_argument
    add("--chosen-min", type=strength, default=0.4, metavar="P", help="lowest strength of a chosen question")
    add("--rejected-max", type=strength, default=0.1, metavar="P", help="highest strength of a rejected question")
    add("--min-gap", type=strength, default=0.3, metavar="P", help="lowest difference between the two")
    add(
        "--max-attempts",
        type=cli.count,
        default=4,
        metavar="N",
        help="questions asked for per row before it is dropped",
    )
    add(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where the rejected question is surely of another type, it is also the chosen one of that type, with the "
        "chosen one as rejected: who wrote a question then says less about which is preferred (default: --mirror)",
    )
    add(
        "--scorer-model",
        metavar="MODEL",
        help="language model that a new scorer is fitted with: a second opinion, and what keeps PPO from gaming it; "
        f'"none" is quicker, for a look (default: {SCORER_MODEL})',
    )

    add = parser.add_argument_group("who writes the rejected questions").add_argument
    add("--writer", choices=["openai", "local"], help="default: openai given a key or --base-url, else local")
    add("--dry-run", action="store_true", help="show the first requests and an estimate; ask nothing, write nothing")

    add = parser.add_argument_group("--writer openai: any OpenAI-compatible server").add_argument
    add("--api-model", default="gpt-4o-mini", metavar="NAME", help="name of the model on the server")
    add("--base-url", metavar="URL", help="address of the server, such as http://localhost:8000/v1")
    add("--concurrency", type=cli.count, default=8, metavar="N", help="requests under way at the same time")
    add("--max-requests", type=cli.zero_or_more, metavar="N", help="stop after N requests, earlier runs included")
    add(
        "--max-usd",
        type=cli.not_negative,
        metavar="USD",
        help="stop before the cost passes this, earlier runs included",
    )
    add("--usd-per-mtok-in", type=cli.not_negative, metavar="USD", help="price of a million prompt tokens")
    add("--usd-per-mtok-out", type=cli.not_negative, metavar="USD", help="price of a million answer tokens")
    add("--api-max-tokens", type=cli.count, default=200, metavar="N", help="longest answer; reasoning models need more")
    add("--timeout", type=cli.positive, default=120.0, metavar="SECONDS", help="longest silence of the server")
    add("--max-retries", type=cli.zero_or_more, default=8, metavar="N", help="sends a request again if no answer came")
    add(
        "--retry-delay", type=cli.not_negative, default=1.0, metavar="SECONDS", help="before the first; then it doubles"
    )

    add = parser.add_argument_group("--writer local: the SFT model, asked for another type").add_argument
    add("--batch-size", type=cli.count, default=16, metavar="N", help="questions sampled at the same time")
    add("--temperature", type=cli.not_negative, metavar="T", help="default: 0.5 here; for a server, what it likes")
    add("--max-prompt-tokens", type=cli.count, default=512, metavar="TOKENS", help="a longer text loses its tail")
    add("--max-new-tokens", type=cli.count, default=64, metavar="TOKENS", help="longest question")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where it is fast")

    args = parser.parse_args(argv)
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    args.writer_was_named = args.writer is not None
    args.writer = args.writer or ("openai" if key or args.base_url else "local")
    if args.writer == "openai" and not (key or args.base_url or os.environ.get("OPENAI_BASE_URL")):
        parser.error("--writer openai: set OPENAI_API_KEY, or give --base-url of a server that wants no key")
    if args.max_usd is not None and (args.usd_per_mtok_in is None or args.usd_per_mtok_out is None):
        parser.error("--max-usd: give the prices too, --usd-per-mtok-in and --usd-per-mtok-out")
    if args.rejected_max > args.chosen_min:
        parser.error(f"--rejected-max {args.rejected_max}: must not be above --chosen-min {args.chosen_min}")
    args.out = Path(args.out)
    if not args.shard and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        share_out(parser, args)
    if args.shard:
        args.out = args.out.with_name(f"{args.out.stem}.{args.shard[0]}of{args.shard[1]}{args.out.suffix}")
    return args


def share_out(parser, args) -> None:
    """Under torchrun every process makes one part, on a GPU of its own; they need not talk to each other."""
    if not (Path(args.scorer) / "scorer.json").exists():  # all of them would fit and write it at the same time
        line = fit.command("scorer", args.scorer, args, args.scorer_model or SCORER_MODEL)
        parser.error(f"--scorer {args.scorer}: not there; before torchrun, fit it: {line}")
    args.shard = int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"])
    if args.device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def shard(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4)"""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1/4, the first of four parts")
    return int(part), int(parts)


# ---------------------------------------------------------------------------------------------------------------------
# (a), (b): grade and choose


def choose(rows, strengths, types: list[str], held_out: set[str], args) -> tuple[list[Job], list[tuple[int, dict]]]:
    """Which questions become `chosen`, and what became of the others.

    strengths: (N, T), out of fold. Rows labelled `others` are left out whatever their strength: a person said that
    they are no question of any type.
    """
    jobs, dropped, seen = [], [], {}
    best, best_type = strengths.max(dim=1)
    for index, (row, score, column) in enumerate(zip(rows, best.tolist(), best_type.tolist(), strict=True)):
        question = " ".join(row.question.split())
        ill_formed = flaw(question, row.context)
        if row.type == "others":
            reason = "labelled others"
        elif (row.context, question) in seen:
            reason = "the same question stands in the data before"
        elif score < args.chosen_min:
            reason = "no type is strong enough (--chosen-min)"
        elif ill_formed:
            reason = f"not well formed: {ill_formed}"
        else:
            reason = None
        seen.setdefault((row.context, question), index)
        if reason:
            dropped.append((index, left_over(row.source, types[column], row.context, question, score, [], reason)))
            continue
        jobs.append(
            Job(
                row=digest([row.context, question]),
                index=index,
                source=row.source,
                context=row.context,
                type=types[column],
                label=row.type,
                chosen=question,
                chosen_score=score,
                split="held_out" if row.context in held_out else "train",
                other_types=other_types(types[column], types),
            )
        )
    return jobs, dropped


def left_over(source, type, context, question, score, attempts, reason) -> dict:
    """A line of the file of dropped rows."""
    return {
        "reason": reason, "source": source, "type": type, "question": question, "score": round(score, 4),
        "context": context, "attempts": attempts,
    }  # fmt: skip


def picked(jobs: list[Job], limit: int | None, part: tuple[int, int] | None) -> list[Job]:
    """At most `limit` of the jobs, and of these the shard's: all shards together have the jobs of a run without any.

    Both go by the rows' digests: more data or a higher limit moves none.
    """
    if limit is not None and len(jobs) > limit:
        kept = {job.row for job in sorted(jobs, key=lambda job: job.row)[:limit]}
        jobs = [job for job in jobs if job.row in kept]
    if part:
        jobs = [job for job in jobs if zlib.crc32(job.row.encode()) % part[1] == part[0] - 1]
    return jobs


# ---------------------------------------------------------------------------------------------------------------------
# (c), (d): write and verify


def write_rejected(
    jobs: list[Job], writer, log: AnswerLog, verify: Callable, max_attempts: int, tick: Callable
) -> None:
    """Ask until every job is settled: `rejected` found, or `dropped` with a reason. tick(n): n more of them are.

    Worker threads only carry requests. This thread does all the rest: it writes what arrived to the disk (one sync for
    all of it), has it verified as one batch, and hands out the next requests. So 64 requests under way cost no lock and
    no waiting, and neither file nor scorer is ever used by two threads.

    Raises UserError when going on is useless and Stopped after SIGINT or SIGTERM, in both cases only after the answers
    under way are on the disk: they are paid for.
    """
    todo = deque(jobs[i : i + writer.group] for i in range(0, len(jobs), writer.group))
    arrivals: SimpleQueue = SimpleQueue()
    under_way, failures, limit, fatal = 0, 0, None, None

    def carry(group: list[Job], requests: list[Request]) -> None:
        try:
            arrivals.put((group, requests, writer.answers(requests)))
        except BaseException as error:
            arrivals.put((group, requests, error))

    with ThreadPoolExecutor(writer.slots) as pool, halting(writer.halt) as signals:
        while under_way or (todo and not writer.halt.is_set()):
            # 1. Hand out requests while there is room; what is on the disk already needs no asking.
            arrived: list[tuple[list[Job], list[Request], list[Answer]]] = []
            while todo and under_way < writer.slots and len(arrived) < 256 and not writer.halt.is_set():
                group = todo.popleft()
                requests = [writer.request(job) for job in group]
                if all(log.get(request) is not None for request in requests):
                    arrived.append((group, requests, [log.get(request) for request in requests]))
                elif limit:
                    tick(settle(group, f"not asked: {limit}"))
                else:
                    pool.submit(carry, group, requests)
                    under_way += 1

            # 2. Take what has arrived; with nothing in hand, wait for something.
            for group, requests, result in drain(arrivals, wait=not arrived and under_way > 0):
                under_way -= 1
                if not isinstance(result, BaseException):
                    arrived.append((group, requests, result))
                    failures = 0
                elif isinstance(result, LimitReached):
                    limit = str(result)
                    todo.appendleft(group)
                elif isinstance(result, RowFailed):
                    tick(settle(group, f"no answer: {result}"))
                    failures += 1
                    if failures >= GIVE_UP_AFTER and (result.transient or not log.answers):
                        fatal = fatal or UserError(
                            f"{failures} rows one after the other got no answer; the last: {result}"
                        )
                        writer.halt.set()
                elif not isinstance(result, Halted):
                    fatal = fatal or result
                    writer.halt.set()

            # 3. To the disk first. An answer that was there before stays what it was.
            log.add(pair for _, requests, answers in arrived for pair in zip(requests, answers, strict=True))

            # 4. Verify, and put what is not settled back in front.
            for group, requests, _ in arrived:  # each by itself: what a model reads together depends on who came first
                verify([(job, log.get(request)) for job, request in zip(group, requests, strict=True)])
            for group, _, _ in reversed(arrived):
                for job in group:
                    if not job.settled and len(job.attempts) >= max_attempts:
                        job.dropped = f"no rejected question: {job.attempts[-1]['flaw']}"
                unsettled = [job for job in group if not job.settled]
                tick(len(group) - len(unsettled))
                if unsettled:
                    todo.appendleft(unsettled)

    kept = f"{len(log.answers)} answers are kept in {log.path}; the same command goes on from there"
    if fatal is not None:
        if isinstance(fatal, UserError):
            raise UserError(f"{fatal}. {kept}")
        raise fatal
    if signals:
        raise Stopped(f"stopped. {kept}", 128 + signals[0])


def settle(group: list[Job], reason: str) -> int:
    """Give these jobs up -> how many they are."""
    for job in group:
        job.dropped = reason
    return len(group)


def drain(queue: SimpleQueue, wait: bool) -> Iterable:
    """All that is in the queue; with `wait`, at least one thing."""
    try:
        while True:
            yield queue.get(block=wait)
            wait = False
    except Empty:
        return


@contextmanager
def halting(halt: threading.Event):
    """Ctrl-C and SIGTERM set `halt` and are noted in the list this yields; the second one ends the process at once."""
    caught: list[int] = []

    def handler(number, frame):
        caught.append(number)
        halt.set()
        signal.signal(number, signal.SIG_DFL)
        print("finishing the requests under way (again to quit at once)", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    except BaseException:
        halt.set()  # nobody should wait out a Retry-After for a run that has failed
        raise
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def verifier(scorer, rejected_max: float, min_gap: float) -> Callable:
    """-> verify(pairs of job and answer): notes the attempt in each job, and the rejected question if it will do."""

    def verify(pairs: list[tuple[Job, Answer]]) -> None:
        tried = []
        for job, answer in pairs:
            question = clean_question(answer.text)
            wrong = WRONG_FINISH.get(answer.finish) or flaw(question, job.context, job.chosen)
            if wrong and answer.finish == "length":
                wrong = f"cut off ({wrong})"
            attempt = {"question": "" if answer.finish in WRONG_FINISH else question, "score": None, "flaw": wrong}
            attempt |= {"type": job.asked_type(), "parts": None}
            tried.append((job, attempt))
        readable = [(job, attempt) for job, attempt in tried if not attempt["flaw"]]
        if readable:
            contexts, questions = [job.context for job, _ in readable], [a["question"] for _, a in readable]
            parts = scorer.components(contexts, questions, [job.type for job, _ in readable])
            for i, (job, attempt) in enumerate(readable):
                attempt["parts"] = {name: round(values[i].item(), 4) for name, values in parts.items()}
                attempt["score"] = attempt["parts"]["strength"]
                opinions = [parts[name][i].item() for name in ("strength", "ngrams", "probe") if name in parts]
                low = [gate.failed for name, gate in GATES.items() if name in parts and parts[name][i] < 0.5]
                if low:
                    attempt["flaw"] = low[0]
                else:
                    gap = job.chosen_score - attempt["score"]
                    attempt["flaw"] = too_strong(max(opinions), gap, rejected_max, min_gap)
        for job, attempt in tried:
            job.attempts.append(attempt)
            if not attempt["flaw"]:
                job.rejected = attempt["question"]

    return verify


def too_strong(highest: float, gap: float, rejected_max: float, min_gap: float) -> str:
    """Why a question of these strengths cannot be the rejected one; "" if it can. `highest` is the highest opinion.

    Verified is what every opinion agrees on: n-grams alone are blind to wordings they never saw.
    """
    if highest > rejected_max:
        return "still of the unwanted type"
    return "too near to the chosen question (--min-gap)" if gap < min_gap else ""


def mirrored(jobs: list[Job], scorer, figures, args) -> dict[int, dict]:
    """By the index of its job, what changes in a pair when it is turned round, for those that can be.

    People write the chosen questions and a model the rejected ones: DPO can tell the two apart by that alone,
    whatever their types. In a turned pair the model's question is the better one, being of the type that this
    pair asks for, by the same thresholds. Nobody's question is rejected for the type that a person labelled it with.
    """
    if not jobs:
        return {}
    if scorer.lm is not None:
        scorer.lm.forget()
    found = scorer.strengths([job.context for job in jobs], [job.rejected for job in jobs])  # (N, T)
    turned = {}
    for job, strengths in zip(jobs, found, strict=True):
        score, column = strengths.max(0)
        type, score = scorer.types[column], score.item()
        if type in (job.type, job.label) or type not in figures.types or score < args.chosen_min:
            continue
        place = job.index, figures.types.index(type)
        other, highest = figures.strengths[place].item(), figures.highest[place].item()
        if not too_strong(highest, score - other, args.rejected_max, args.min_gap):
            turned[job.index] = {
                "type": type, "chosen": job.rejected, "rejected": job.chosen, "chosen_score": round(score, 4),
                "rejected_score": round(other, 4), "rejected_type": job.type,
                "rejected_parts": {"strength": round(other, 4)},  # a person's question passed no gates
            }  # fmt: skip
    return turned


# ---------------------------------------------------------------------------------------------------------------------
# What goes out


def pair(job: Job, writer: str) -> dict:
    """A line of OUT: the three columns every DPO trainer reads, then where they come from."""
    from socratiq.prompts import build_prompt

    return {
        "prompt": build_prompt(job.context, job.type), "chosen": job.chosen, "rejected": job.rejected,
        "type": job.type, "context": job.context,
        "chosen_score": round(job.chosen_score, 4), "rejected_score": job.attempts[-1]["score"],
        "attempts": len(job.attempts), "writer": writer, "rejected_type": job.attempts[-1]["type"],
        "split": job.split, "source": job.source, "rejected_parts": job.attempts[-1]["parts"],
    }  # fmt: skip


def turned_round(line: dict, changes: dict) -> dict:
    """The line of a mirrored pair, from that of the pair."""
    from socratiq.prompts import build_prompt

    return line | changes | {"prompt": build_prompt(line["context"], changes["type"]), "mirrored": True}


def check_output(out: Path, answers: Path) -> None:
    """Nobody's file is overwritten: OUT may only be there if an earlier run of this script made it."""
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; give the name of a file in it, such as {out / 'pairs.jsonl'}")
    if out.exists() and not answers.exists():
        raise UserError(
            f"--out {out}: exists, and no {answers.name} beside it says that it was made here; choose another"
        )


def summary(
    args, rows: int, jobs: list[Job], turned: int, dropped: list[dict], writer, budget: Budget, paid_before: int
) -> None:
    """What was made, what was not and why, what it cost, what to type next."""
    kept = [job for job in jobs if job.rejected is not None]
    also = f", {turned} of them others turned round (--mirror)" if args.mirror else ""
    part = f"part {args.shard[0]} of {args.shard[1]}: " if args.shard else ""
    made = f"{len(kept) + turned} pairs in {args.out}{also}"
    print(f"{part}{rows} rows, {len(jobs)} chosen questions, {made}", flush=True)
    if not speaks():  # under torchrun the first process alone says more, of its own part
        return
    reasons = Counter(": ".join(line["reason"].split(": ")[:2]) for line in dropped)  # what a server said is cut off
    for reason, count in reasons.most_common():
        print(f"  {count:6d} not kept: {reason}")
    if kept:
        attempts = Counter(len(job.attempts) for job in kept)
        print("attempts needed: " + ", ".join(f"{n}: {attempts[n]}" for n in sorted(attempts)))
        lengths = [sum(len(words(getattr(job, side))) for job in kept) / len(kept) for side in ("chosen", "rejected")]
        print(f"mean length: chosen {lengths[0]:.1f} words, rejected {lengths[1]:.1f} words")
        if max(lengths) > 1.3 * min(lengths):
            warn("chosen and rejected differ much in length; DPO may learn the length instead of the type")
    print(
        f"{writer.name}: {budget.requests - paid_before} requests now, {budget.requests} in all, "
        f"{budget.prompt_tokens:,} prompt and {budget.completion_tokens:,} answer tokens",
        end="",
    )
    print(f", {budget.usd:.4f} USD" if budget.usd else "")
    waiting = [job for job in jobs if job.dropped and job.dropped.startswith(("no answer", "not asked"))]
    if waiting:
        print(
            f"{len(waiting)} rows wait for an answer: {waiting[0].dropped}. The same command asks for them again"
            + (", with a higher limit." if waiting[0].dropped.startswith("not asked") else ".")
        )
    if not kept:
        warn("no pair was made; see the reasons above and --chosen-min, --rejected-max, --min-gap")
    elif args.shard:
        pattern = args.out.with_name(args.out.name.replace(f".{args.shard[0]}of", ".*of"))
        print(
            f"next, when all {args.shard[1]} shards are done:  cat {pattern} > runs/pairs.jsonl && python train_dpo.py"
        )
    else:
        print("next:  python train_dpo.py" + ("" if str(args.out) == "runs/pairs.jsonl" else f" --pairs {args.out}"))


def show_plan(jobs: list[Job], writer, log: AnswerLog | None, args) -> None:
    """--dry-run: the first requests, word for word, and an estimate of what all of them take."""
    requests = [writer.request(job) for job in jobs]
    open_requests = [request for request in requests if log is None or log.get(request) is None]
    for request in open_requests[:2]:
        for part in request.body.get("messages", [{"role": "prompt", "content": to_json(request.body)}]):
            print(f"--- {part['role']}\n{part['content']}")
    print("---")
    tokens = sum(len(to_json(request.body)) // 4 for request in open_requests)
    answer_tokens = 30 * len(open_requests)
    print(f"{len(jobs)} chosen questions, {len(jobs) - len(open_requests)} of them with a first answer on disk")
    print(
        f"at least {len(open_requests)} requests to {writer.model}, at most {args.max_attempts * len(jobs)}; "
        f"the first round takes about {tokens:,} prompt and {answer_tokens:,} answer tokens"
    )
    if args.usd_per_mtok_in is not None or args.usd_per_mtok_out is not None:
        usd = (tokens * (args.usd_per_mtok_in or 0) + answer_tokens * (args.usd_per_mtok_out or 0)) / 1e6
        most = 1.5 * args.max_attempts * usd * len(jobs) / max(1, len(open_requests))
        print(f"about {usd:.4f} USD for the first round, at most some {most:.4f} USD")


# ---------------------------------------------------------------------------------------------------------------------


def open_policy(args):
    """The SFT model and its tokenizer, frozen."""
    if args.policy == "runs/sft" and not Path(args.policy).exists():
        raise UserError("runs/sft is not there: run `python train_sft.py` first, or name a model with --policy")
    from socratiq.models import load_policy, load_tokenizer

    try:
        tokenizer = load_tokenizer(args.policy)
        return load_policy(args.policy, args.device, args.dtype, trainable=False, seed=args.seed), tokenizer
    except UserError as error:
        raise UserError(str(error).replace("--model", "--policy")) from None


def grade(rows, held_out: set[str], seed: int, lm):
    """Figures of all rows, graded by scorers that never saw their texts.

    Questions about training texts are graded by cross-validation among these, those about held-out texts by a scorer
    fitted on all training rows: no label of a held-out text has a say in a training pair.
    """
    from socratiq.scorer import grading
    from socratiq.scorer.scorer import Scorer, cross_validate

    train, held = ([i for i, row in enumerate(rows) if (row.context in held_out) == out] for out in (False, True))
    learn_from = [rows[i] for i in train]
    found = cross_validate(learn_from, seed=seed, lm=lm)
    strengths, highest = found.strengths.new_zeros(2, len(rows), len(found.types))
    strengths[train], highest[train] = found.strengths, found.highest
    if held:
        # It knows the same types, those of the training rows.
        fitted = Scorer.fit(learn_from, seed, lm, only_strengths=True)
        asked = [rows[i].context for i in held], [rows[i].question for i in held]
        strengths[held], highest[held] = fitted.strengths(*asked), fitted.highest(*asked)
    return grading.figures(found.types, strengths, [row.type for row in rows], highest)


def open_scorer(args, rows, held_out: set[str]):
    """The scorer of --scorer, or a new one, which learns neither from held-out texts nor from the judge's -> it, and
    the figures of all rows.

    A scorer that was fitted with a language model names it, and is handed it again.
    """
    from socratiq.scorer.grading import rows_to_learn_from
    from socratiq.scorer.language_model import open_language_model
    from socratiq.scorer.scorer import Scorer

    there = (Path(args.scorer) / "scorer.json").exists()
    scorer = Scorer.load(args.scorer) if there else None
    if there and args.scorer_model not in (None, "none", scorer.settings.get("model")):
        raise UserError(
            f"--scorer-model {args.scorer_model}: the scorer in {args.scorer} was fitted without it; name another"
        )
    model = scorer.settings.get("model", "none") if there else args.scorer_model or SCORER_MODEL
    if there:
        fit.check_unseen("scorer", args, scorer.settings.get("texts"), held_out, model)
    lm = open_language_model(model, args.device, args.dtype)
    if not there:
        learn_from = rows_to_learn_from(rows, args.held_out, args.seed)[1]
        scorer = Scorer.fit(learn_from, seed=args.seed, lm=lm)
    scorer.with_language_model(lm)
    if lm is not None:
        lm.forget()  # figures are to the last bit the same whether the scorer was fitted a moment ago or found
    figures = grade(rows, held_out, args.seed, lm)
    if not there and not args.dry_run:  # not before: rows that cannot be graded should leave no scorer behind
        scorer.save(args.scorer)
    unknown = [name for name in figures.types if name not in scorer.types]
    if unknown:
        raise UserError(
            f"--scorer {args.scorer} does not know the type {unknown[0]!r} of --data {args.data}; it was fitted on "
            "other rows: name another folder, where a scorer for these rows will be fitted"
        )
    second = f"n-grams and {model}" if lm else "n-grams alone"
    tell(f"scorer: {args.scorer}, {'as it was found' if there else 'fitted now'}, judging by {second}")
    return scorer, figures


def run() -> None:
    args = parse_arguments()
    answers_path = args.out.with_name(args.out.stem + ".answers.jsonl")
    check_output(args.out, answers_path)
    if not args.writer_was_named:
        tell({
            "openai": "writer: openai, since a key or an address is given (--writer local for the SFT model)",
            "local": f"writer: local, the model in {args.policy}, since OPENAI_API_KEY is not set",
        }[args.writer])  # fmt: skip

    # 1. The rows, and which of their texts the trainers hold out.
    from socratiq.data import load_rows, split_by_context

    rows = load_rows(args.data)
    held_out = {row.context for row in split_by_context(rows, args.held_out, args.seed)[1]}

    # 2. The writer, before any long work: a mistake in its arguments should show at once.
    budget = Budget(args.max_requests, args.max_usd, args.usd_per_mtok_in or 0.0, args.usd_per_mtok_out or 0.0)
    writer = None
    if args.writer == "openai":
        writer = OpenAIWriter(
            args.api_model,
            args.base_url,
            os.environ.get("OPENAI_API_KEY"),
            budget=budget,
            concurrency=args.concurrency,
            max_tokens=args.api_max_tokens,
            temperature=args.temperature,
            timeout=args.timeout,
            max_retries=args.max_retries,
            retry_delay=args.retry_delay,
        )
    if args.writer == "local":
        writer = LocalWriter(
            *open_policy(args),
            fingerprint(args.policy),
            budget=budget,
            seed=args.seed,
            batch_size=args.batch_size,
            temperature=0.5 if args.temperature is None else args.temperature,
            max_prompt_tokens=args.max_prompt_tokens,
            max_new_tokens=args.max_new_tokens,
        )

    # 3. (a) Grade every question; (b) choose.
    scorer, figures = open_scorer(args, rows, held_out)
    jobs, dropped = choose(rows, figures.strengths, figures.types, held_out, args)
    agreed = sum(rows[job.index].type == job.type for job in jobs)
    tell(
        f"{len(rows)} rows, {len(jobs)} of them chosen at --chosen-min {args.chosen_min}"
        + (f"; the recognised type is the labelled one for {agreed / len(jobs):.0%}" if jobs else "")
    )
    all_chosen = len(jobs)
    jobs = picked(jobs, args.limit, args.shard)
    if len(jobs) < all_chosen:
        tell(f"working on {len(jobs)} of them (--limit, --shard)")

    limit = args.api_max_tokens if args.writer == "openai" else 0
    if args.dry_run:
        show_plan(jobs, writer, AnswerLog(answers_path, writer.model, limit) if answers_path.exists() else None, args)
        return

    # 4. (c) Write and (d) verify.
    log = AnswerLog(answers_path, writer.model, limit)
    for answer in log.paid():
        budget.spent(answer)
    paid_before = budget.requests
    with bar(total=len(jobs), desc="pairs") as progress:
        verify = verifier(scorer, args.rejected_max, args.min_gap)
        write_rejected(jobs, writer, log, verify, args.max_attempts, progress.update)
    writer.close()

    # 5. Both files as a whole, in the order of the data.
    kept = [job for job in jobs if job.rejected is not None]
    dropped += [
        (j.index, left_over(j.source, j.type, j.context, j.chosen, j.chosen_score, j.attempts, j.dropped))
        for j in jobs
        if j.rejected is None
    ]
    dropped = [line for _, line in sorted(dropped, key=lambda both: both[0])]
    atomic_write(args.out.with_name(args.out.stem + ".dropped.jsonl"), lines(dropped))
    pairs = [pair(job, writer.name) for job in kept]
    turned = mirrored(kept, scorer, figures, args) if args.mirror else {}
    pairs = [
        line
        for job, line in zip(kept, pairs, strict=True)
        for line in ([line, turned_round(line, turned[job.index])] if job.index in turned else [line])
    ]
    atomic_write(args.out, lines(pairs))
    summary(args, len(rows), jobs, len(turned), dropped, writer, budget, paid_before)


def tell(line: str) -> None:
    """One line on stdout; under torchrun the first process tells for all."""
    if speaks():
        print(line, flush=True)


def lines(values: Iterable[dict]) -> str:
    return "".join(to_json(value) + "\n" for value in values)


if __name__ == "__main__":
    main(run)
