"""make_pairs.py: what it chooses and rejects, and that no kill, fault or order of answers changes or loses a pair."""

import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from fault_server import QUESTIONS, FaultServer, good_question

import make_pairs
from socratiq.data import Row
from socratiq.pairs.checks import Answer, AnswerLog, Job, Request, digest
from socratiq.pairs.writers import Halted, LimitReached, OpenAIWriter, RowFailed
from socratiq.run.errors import UserError

ROOT = Path(__file__).parent.parent
KEY = "sk-test-0123456789abcdef"
TYPES = ["Analogy", "Clarity", "Fear appeal"]


# --- stand-ins: a scorer that goes by one word a type, a writer that says what it is told ---------------------------


class Number(float):
    def item(self):
        return float(self)


class CueScorer:
    """Strength 0.9 of the type whose cue word stands in the question, 0.1 of the others."""

    types = TYPES
    cues = {"Analogy": "alike", "Clarity": "mean", "Fear appeal": "likely"}  # noqa: RUF012

    def strength(self, question, type):
        return 0.9 if self.cues[type] in question else 0.1

    def components(self, contexts, questions, types):
        strengths = [Number(self.strength(q, t)) for q, t in zip(questions, types, strict=True)]
        probe = [Number(0.9 if "doubtful" in q else 0.1) for q in questions]
        return {"strength": strengths, "probe": probe, "form": [Number("stutter" not in q) for q in questions]}


class SaysWriter:
    """`say` maps (job row, attempt) to a text, an Answer, or an exception to raise."""

    model, name, slots, group = "said", "said", 4, 1

    def __init__(self, say, group=1):
        self.say, self.group, self.asked, self.halt = say, group, [], threading.Event()

    def request(self, job):
        return Request(
            job.row, len(job.attempts) + 1, {"row": job.row, "n": len(job.attempts), "type": job.asked_type()}
        )

    def answers(self, requests):
        self.asked += [(request.row, request.attempt) for request in requests]
        said = [self.say(request.row, request.attempt) for request in requests]
        for one in said:
            if isinstance(one, BaseException):
                raise one
        return [one if isinstance(one, Answer) else Answer(one) for one in said]


def jobs_of(number: int, chosen_score: float = 0.9) -> list[Job]:
    return [
        Job(
            row=f"{n:016x}",
            index=n,
            source=f"rows.csv row {n}",
            context=f"Text number {n} says that dogs are the better cats because they come when they are called.",
            type="Clarity",
            chosen="What do you mean by a better cat?",
            chosen_score=chosen_score,
            other_types=["Analogy", "Fear appeal"],
        )
        for n in range(number)
    ]


def make(tmp_path, say, number=1, max_attempts=3, min_gap=0.3, jobs=None, group=1):
    jobs = jobs or jobs_of(number)
    writer = SaysWriter(say, group) if callable(say) else say
    log = AnswerLog(tmp_path / "a.jsonl", writer.model)
    ticks = []
    try:
        verify = make_pairs.verifier(CueScorer(), 0.25, min_gap)
        make_pairs.write_rejected(jobs, writer, log, verify, max_attempts, ticks.append)
        assert sum(ticks) == len(jobs)
    finally:
        log.close()
    return jobs, writer


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_choose():
    import torch

    rows = [
        Row("c1", "How are dogs and cats alike?", "Clarity", "r 1"),  # recognised as something else than its label
        Row("c1", "What do you mean?", "Clarity", "r 2"),
        Row("c2", "What do you mean?", "Clarity", "r 3"),  # the same question about another text
        Row("c2", "What do you mean?", "Analogy", "r 4"),  # a copy under another label
        Row("c2", "You are stupid?", "others", "r 5"),
        Row("c3", "No question at all.", "Clarity", "r 6"),
        Row("c3", "How likely is that?", "Fear appeal", "r 7"),
    ]
    strengths = torch.tensor([[0.8, 0.1, 0.1]] + [[0.1, 0.7, 0.1]] * 3 + [[0.9, 0.1, 0.1]] * 2 + [[0.1, 0.2, 0.39]])
    args = make_pairs.parse_arguments(["--writer", "local"])
    jobs, dropped = make_pairs.choose(rows, strengths, TYPES, {"c2"}, args)
    assert [(job.index, job.type, job.split) for job in jobs] == [
        (0, "Analogy", "train"),
        (1, "Clarity", "train"),
        (2, "Clarity", "held_out"),
    ]
    assert jobs[0].chosen_score == pytest.approx(0.8) and jobs[0].other_types == ["Clarity", "Fear appeal"]
    assert len({job.row for job in jobs}) == 3
    reasons = {index: line["reason"] for index, line in dropped}
    assert "stands in the data before" in reasons[3]
    assert reasons[4] == "labelled others"
    assert reasons[5] == "not well formed: not a question"
    assert "--chosen-min" in reasons[6]


def test_pairs_that_can_be_turned_round():
    import torch

    class FixedScorer:
        types, lm = TYPES, None

        def strengths(self, contexts, questions):
            graded = [[0.1, 0.8, 0.1], [0.1, 0.39, 0.1], [0.1, 0.8, 0.1], [0.7, 0.1, 0.1], [0.1, 0.8, 0.1]]
            return torch.tensor([*graded, [0.1, 0.8, 0.1]])

    jobs = jobs_of(6)
    for job in jobs:
        job.type, job.rejected, job.label = "Analogy", f"Clear {job.index}?", "Analogy"
    jobs[4].label = TYPES[1]  # a person called the chosen question what the mirrored pair would ask for

    class Graded:  # the chosen questions, out of fold: the third is also of the other type, to one the sixth is
        types = TYPES
        strengths = torch.tensor(
            [[0.9, 0.05, 0.1], [0.9, 0.05, 0.1], [0.9, 0.3, 0.1], [0.9, 0.1, 0.1], [0.9, 0.05, 0.1], [0.9, 0.05, 0.1]]
        )
        highest = strengths.clone()
        highest[5, 1] = 0.5

    args = make_pairs.parse_arguments(["--writer", "local", "--mirror"])
    turned = make_pairs.mirrored(jobs, FixedScorer(), Graded, args)
    assert list(turned) == [0]
    assert turned[0] == {
        "type": TYPES[1], "chosen": "Clear 0?", "rejected": jobs[0].chosen, "chosen_score": 0.8, "rejected_score": 0.05,
        "rejected_type": "Analogy", "rejected_parts": {"strength": 0.05},
    }  # fmt: skip
    jobs[0].attempts = [{"question": "Clear 0?", "score": 0.1, "flaw": "", "type": "Clarity", "parts": {"form": 1.0}}]
    line = make_pairs.pair(jobs[0], "local")
    both = make_pairs.turned_round(line, turned[0])
    assert list(both)[: len(line)] == list(line) and both["mirrored"]
    assert both["chosen"] == line["rejected"] and both["rejected"] == line["chosen"]
    assert TYPES[1] in both["prompt"] and TYPES[1] not in line["prompt"]
    assert make_pairs.mirrored([], FixedScorer(), Graded, args) == {}


def test_no_label_of_a_held_out_text_reaches_a_grade():
    """Held-out texts are graded, and nothing about any text changes when their labels do."""
    import torch

    wordings = {"Clarity": "What do you mean by good {}?", "Analogy": "Are {} really like clouds?"}
    rows = [
        Row(f"I think that {subject} are good.", wording.format(subject), type, "")
        for subject in SUBJECTS
        for type, wording in wordings.items()
    ]
    held_out = {row.context for row in rows if "dogs" in row.context or "ships" in row.context}
    turned = {"Clarity": "Analogy", "Analogy": "Fear appeal"}
    other = [row._replace(type=turned[row.type]) if row.context in held_out else row for row in rows]
    found, again = (make_pairs.grade(some, held_out, 0, None) for some in (rows, other))
    assert found.types == again.types == ["Analogy", "Clarity"]
    assert torch.equal(found.strengths, again.strengths)
    assert [found.types[i] for i in found.strengths.argmax(1)] == [row.type for row in rows]
    assert make_pairs.grade(rows, set(), 0, None).strengths.shape == (24, 2)


def test_limit_and_shards_take_the_same_rows_again():
    jobs = [job for job in jobs_of(200)]
    for job in jobs:
        job.row = digest(job.index)
    few = make_pairs.picked(jobs, 20, None)
    more = make_pairs.picked(jobs, 50, None)
    assert len(few) == 20 and len(more) == 50 and {job.row for job in few} <= {job.row for job in more}
    assert [job.index for job in more] == sorted(job.index for job in more)
    assert max(job.index for job in few) > 150  # spread over the data
    shards = [make_pairs.picked(jobs, None, (part, 3)) for part in (1, 2, 3)]
    assert sorted(job.index for part in shards for job in part) == list(range(200))
    assert min(map(len, shards)) > 40
    shards = [make_pairs.picked(jobs, 20, (part, 3)) for part in (1, 2, 3)]
    assert sorted(job.index for part in shards for job in part) == [job.index for job in few], (
        "of the whole, not of each"
    )


# --- asking and verifying -------------------------------------------------------------------------------------------


def test_the_first_good_answer_becomes_the_rejected_question(tmp_path):
    (job,), writer = make(tmp_path, lambda row, n: "How are dogs and cats alike?")
    assert job.rejected == "How are dogs and cats alike?" and job.dropped is None
    assert job.attempts[0]["score"] == pytest.approx(0.1) and len(writer.asked) == 1
    assert job.attempts[0]["parts"] == {"strength": 0.1, "probe": 0.1, "form": 1.0}


@pytest.mark.parametrize(
    ("first", "flaw"),
    [
        ("What does better mean, then?", "still of the unwanted type"),
        ("Is it doubtful how dogs differ?", "still of the unwanted type"),  # by the probe, not by the n-grams
        ("Does it stutter stutter stutter?", "stutters"),
        ("Dogs are better.", "not a question"),
        ("What do you mean by a better cat?", "equal to the chosen question"),
        (Answer("I cannot help.", "refusal"), "refused to answer"),
        (Answer("", "content_filter"), "stopped by the content filter"),
        (Answer("", "empty"), "empty"),
        (Answer("What would", "length"), "cut off (not a question)"),
    ],
)
def test_a_bad_answer_is_asked_for_again(tmp_path, first, flaw):
    (job,), writer = make(tmp_path, lambda row, n: first if n == 1 else "How are dogs and cats alike?")
    assert [attempt["flaw"] for attempt in job.attempts] == [flaw, ""]
    assert job.rejected == "How are dogs and cats alike?"
    assert writer.asked == [(job.row, 1), (job.row, 2)]


def test_a_row_is_dropped_after_the_last_attempt(tmp_path):
    (job,), writer = make(tmp_path, lambda row, n: "What does this mean, please?", max_attempts=3)
    assert job.rejected is None and job.dropped == "no rejected question: still of the unwanted type"
    assert len(writer.asked) == 3 == len({attempt["type"] for attempt in job.attempts}) + 1


def test_the_gap_is_required(tmp_path):
    (job,), _ = make(tmp_path, lambda row, n: "How are both alike?", jobs=jobs_of(1, chosen_score=0.35))
    assert job.dropped == "no rejected question: too near to the chosen question (--min-gap)"


def test_a_rerun_asks_for_nothing(tmp_path):
    def say(row, n):
        return "What does it mean at all?" if int(row, 16) % 2 and n < 3 else "How are dogs and cats alike?"

    first, writer = make(tmp_path, say, number=30)
    assert len(writer.asked) == 15 + 3 * 15
    before = (tmp_path / "a.jsonl").read_bytes()
    again, writer = make(tmp_path, say, number=30)
    assert writer.asked == [] and again == first
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_groups_go_through_together(tmp_path):
    def say(row, n):
        return "What does it mean at all?" if int(row, 16) % 3 == 0 and n < 2 else "How are dogs and cats alike?"

    alone, _ = make(tmp_path / "1", say, number=10)
    (tmp_path / "2").mkdir()
    grouped, writer = make(tmp_path / "2", say, number=10, group=4)
    assert grouped == alone
    assert len(writer.asked) == 10 + 4


def test_a_half_written_group_is_asked_for_as_a_whole_and_keeps_what_it_had(tmp_path):
    first, _ = make(tmp_path, lambda row, n: f"How are dogs and cats alike in {row}?", number=8, group=4)
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(b"".join(whole.splitlines(True)[:6]))
    again, writer = make(tmp_path, lambda row, n: f"How are dogs and cats alike in {row}?", number=8, group=4)
    assert [row for row, _ in writer.asked] == [job.row for job in again[4:]]
    assert again == first and (tmp_path / "a.jsonl").read_bytes() == whole


def test_a_limit_stops_the_asking_but_not_the_replay(tmp_path):
    make(tmp_path, lambda row, n: "How are dogs and cats alike?", jobs=jobs_of(20)[15:])

    def say(row, n):
        return LimitReached("--max-requests 5") if int(row, 16) >= 5 else "How are dogs and cats alike?"

    jobs, _ = make(tmp_path, say, number=20)
    kept = [job.index for job in jobs if job.rejected]
    assert kept == [0, 1, 2, 3, 4, 15, 16, 17, 18, 19]
    assert {job.dropped for job in jobs if not job.rejected} == {"not asked: --max-requests 5"}


def test_failures_of_single_rows(tmp_path):
    def say(row, n):
        return RowFailed("503", True) if int(row, 16) % 2 else "How are dogs and cats alike?"

    jobs, _ = make(tmp_path, say, number=12)
    assert [job.dropped for job in jobs[1::2]] == ["no answer: 503"] * 6
    healed, writer = make(tmp_path, lambda row, n: "How are dogs and cats alike?", number=12)
    assert all(job.rejected for job in healed) and len(writer.asked) == 6


def test_a_server_that_is_down_ends_the_run(tmp_path):
    asked = []

    def say(row, n):
        asked.append(row)
        return RowFailed("connection refused", True)

    with pytest.raises(UserError, match=r"5 rows .* connection refused.*same command"):
        make(tmp_path, say, number=100)
    assert len(asked) < 20


def test_a_fatal_error_waits_for_what_is_under_way(tmp_path):
    def say(row, n):
        if row == f"{2:016x}":
            return UserError("the key was refused")
        time.sleep(0.1)
        return "How are dogs and cats alike?"

    writer = SaysWriter(say)
    with pytest.raises(UserError, match="the key was refused"):
        make(tmp_path, writer, number=50)
    assert writer.halt.is_set()
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == len(writer.asked) - 1 < 8


def test_a_bug_in_a_writer_is_not_swallowed(tmp_path):
    with pytest.raises(ZeroDivisionError):
        make(tmp_path, lambda row, n: ZeroDivisionError(), number=3)


def test_halted_rows_are_left_for_later(tmp_path):
    writer = SaysWriter(lambda row, n: Halted())
    writer.halt.set()
    log = AnswerLog(tmp_path / "a.jsonl", "said")
    jobs = jobs_of(3)
    make_pairs.write_rejected(jobs, writer, log, lambda pairs: None, 3, lambda n: None)
    assert not any(job.settled for job in jobs) and writer.asked == []


def test_64_requests_are_under_way_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    everybody_is_there = threading.Event()

    def patient(body):  # the first answer comes when 64 questions have
        if server.most_at_once >= 64:
            everybody_is_there.set()
        assert everybody_is_there.wait(20)
        return good_question(body)

    with FaultServer(answer=patient) as server:
        make(tmp_path, OpenAIWriter("m", server.url, KEY, concurrency=64, timeout=30), number=100)
        assert server.most_at_once == 64


# --- the script, as a user runs it ----------------------------------------------------------------------------------


SUBJECTS = [
    "dogs",
    "trams",
    "schools",
    "taxes",
    "phones",
    "farms",
    "films",
    "wolves",
    "bikes",
    "books",
    "games",
    "ships",
]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    """Three types that a scorer tells apart at a glance, about twelve texts. No two rows make the same request."""
    wordings = {
        "Clarity": "What exactly do you mean by all {} being good?",
        "Analogy": "Are {} and clouds really alike in the way that matters?",
        "Fear appeal": "How likely is the disaster that you warn of, just with {}?",
    }
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"context": f"I think that {subject} are good, since my street says so.", "question": text, "label": type}
        for n, subject in enumerate(SUBJECTS)
        for type, wording in wordings.items()
        for text in (wording.format(subject), QUESTIONS[type][n % 2])  # the words the fault server uses too
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(rows_file, out, *more, scorer=None) -> list[str]:
    scorer = scorer or rows_file.parent / "scorer"  # a common one, fitted once
    return [str(x) for x in ("--data", rows_file, "--scorer", scorer, "--scorer-model", "none", "--out", out, *more)]


def environment(key: str | None) -> dict:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", **({"OPENAI_API_KEY": key} if key else {})}


class Script:
    """The script in a process of its own, forked from one that has imported torch already: imports take seconds."""

    def __init__(self, arguments: list[str], key: str | None = KEY):
        self.output, self.errors = tempfile.mkstemp()[1], tempfile.mkstemp()[1]
        places = environment(key), arguments, self.output, self.errors
        self.process = forks.Process(target=play, args=places)
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        if self.running:
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = 60) -> "Script":
        self.process.join(seconds)
        assert not self.running
        self.returncode = self.process.exitcode
        self.stdout, self.stderr = Path(self.output).read_text(), Path(self.errors).read_text()
        os.unlink(self.output), os.unlink(self.errors)
        return self


def play(env: dict, arguments: list[str], output: str, errors: str) -> None:
    """What the forked process does: `python make_pairs.py ARGUMENTS`."""
    importlib.import_module("torch").set_num_threads(1)  # before there are threads: see child() of scripts.py
    os.environ.clear()
    os.environ.update(env)
    os.chdir(tempfile.gettempdir())  # where there is no runs/sft, as there is here after `make demo`
    for file, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["make_pairs.py", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    make_pairs.main(make_pairs.run)


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["preloaded", "test_make_pairs"])


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The process that forks looks for its modules where this one does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [before])])
    os.environ["OMP_NUM_THREADS"] = "1"
    yield


def run(rows_file, out, *more, key: str | None = KEY, **options) -> Script:
    return Script(command(rows_file, out, *more, **options), key).wait()


def api(server, *more):
    return ["--base-url", server.url, "--timeout", "3", "--retry-delay", "0.01", *more]


def outputs(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_name(out.stem + ".dropped.jsonl").read_bytes()


def sometimes_bad(body) -> str:
    """A good question, but for one text in three the first answer is of the type that was not wanted."""
    text = body["messages"][-1]["content"]
    unwanted = re.search(r'not be a question of the type "([^"]+)"', text)[1]
    if len(text.split("\n")[1]) % 3 == 0 and "earlier tries" not in text:
        return {
            "Clarity": "What exactly do you mean by good, please?",
            "Analogy": "Are both really alike in the way that matters?",
            "Fear appeal": "How likely is the disaster that you warn of?",
        }[unwanted]
    return good_question(body)


@pytest.fixture(scope="module")
def reference(rows_file, tmp_path_factory):
    """An uninterrupted run, one request at a time -> outputs, standard output, the requests of the server."""
    out = tmp_path_factory.mktemp("reference") / "pairs.jsonl"
    with FaultServer(answer=sometimes_bad) as server:
        done = run(
            rows_file, out, *api(server, "--concurrency", "1", "--usd-per-mtok-in", "1", "--usd-per-mtok-out", "2")
        )
        assert done.returncode == 0, done.stderr
        return outputs(out), done.stdout, server.requests


def test_a_scorer_that_has_seen_held_out_texts_verifies_nothing(rows_file, tmp_path, capsys):
    from socratiq.data import load_rows
    from socratiq.scorer.scorer import Scorer

    Scorer.fit(load_rows(str(rows_file))).save(tmp_path / "scorer")
    before = sorted(tmp_path.rglob("*"))
    done = run(rows_file, tmp_path / "p.jsonl", "--base-url", "http://127.0.0.1:9", scorer=tmp_path / "scorer")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
    assert f"--scorer {tmp_path / 'scorer'} was fitted on" in done.stderr and "held-out texts; delete it" in done.stderr


def test_the_pairs_file(reference, rows_file):
    from socratiq.prompts import build_prompt

    (pairs, dropped), said, requests = reference
    pairs = [json.loads(line) for line in pairs.decode().splitlines()]
    dropped = [json.loads(line) for line in dropped.decode().splitlines()]
    turned = [pair for pair in pairs if pair.get("mirrored")]
    assert len(pairs) - len(turned) >= 50 and len(pairs) - len(turned) + len(dropped) == 72
    for pair in turned:  # each stands after the pair that it mirrors
        before = pairs[pairs.index(pair) - 1]
        assert (before["chosen"], before["rejected"]) == (pair["rejected"], pair["chosen"])
        assert before["type"] != pair["type"] and before["context"] == pair["context"]
    order = ["prompt", "chosen", "rejected", "type", "context", "chosen_score", "rejected_score", "attempts", "writer"]
    for pair in pairs:
        assert list(pair)[: len(order)] == order
        assert pair["prompt"] == build_prompt(pair["context"], pair["type"])
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen_score"] >= 0.4 and pair["rejected_score"] <= 0.1
        assert pair["chosen_score"] - pair["rejected_score"] >= 0.3
        assert pair["rejected_parts"]["strength"] == pair["rejected_score"]
        parts = ["strength", "form", "originality", "sentence", "order", "relatedness"]
        assert list(pair["rejected_parts"]) == (parts[:1] if pair.get("mirrored") else parts)
        assert pair["writer"] == "openai:gpt-4o-mini"
    assert {pair["attempts"] for pair in pairs} >= {1, 2}
    assert {pair["split"] for pair in pairs} == {"train", "held_out"}
    contexts = {split: {p["context"] for p in pairs if p["split"] == split} for split in ("train", "held_out")}
    assert not contexts["train"] & contexts["held_out"]
    assert all(line["reason"] and line["question"] for line in dropped)

    assert f"72 rows, {len(pairs) - len(turned) + sum('no rejected' in d['reason'] for d in dropped)} chosen" in said
    assert f"{len(pairs)} pairs" in said
    assert f"{len(requests)} requests now" in said and "USD" in said
    assert "attempts needed: 1: " in said and "mean length: chosen" in said
    assert said.strip().splitlines()[-1].startswith("next:  python train_dpo.py --pairs ")
    assert KEY not in said


def test_nothing_depends_on_concurrency_or_faults(reference, rows_file, tmp_path):
    faults = ["429", "503", "ok", "drop", "429 after 0.1", "ok", "slow", "invalid json", "reset", "500", "html"] * 4
    random.Random(1).shuffle(faults)
    with FaultServer(faults, answer=sometimes_bad) as server:
        out = tmp_path / "pairs.jsonl"
        done = run(rows_file, out, *api(server, "--concurrency", "16", "--max-retries", "20"))
        assert done.returncode == 0, done.stderr
        assert outputs(out) == reference[0]
        good = [json.dumps(seen.body) for seen in server.requests if seen.fault == "ok"]
        assert len(good) == len(set(good)) == len(reference[2])

        again = run(rows_file, out, *api(server))  # a rerun pays for nothing twice
        assert again.returncode == 0 and "0 requests now" in again.stdout
        assert outputs(out) == reference[0]
        assert len([seen for seen in server.requests if seen.fault == "ok"]) == len(good)


def test_kills(reference, rows_file, tmp_path):
    """kill -9 at random moments: the same bytes in the end, and no answer that was on disk is asked for again."""
    out, chance = tmp_path / "pairs.jsonl", random.Random(7)
    log = tmp_path / "pairs.answers.jsonl"
    concurrency, kills, on_disk = 3, 0, set()

    def key(seen):  # what the log calls the answer to this request
        return digest({"messages": seen.body["messages"]})

    with FaultServer(answer=sometimes_bad, latency=0.01) as server:
        arguments = command(rows_file, out, *api(server, "--concurrency", str(concurrency)))
        while True:
            start = len(server.requests)
            script = Script(arguments)
            if kills < 8:
                wanted = start + chance.randint(0, 12)
                while len(server.requests) < wanted and script.running:
                    time.sleep(0.001)
                time.sleep(chance.random() * 0.02)
                script.send(signal.SIGKILL)
                kills += 1
            script.wait()
            assert not on_disk & {key(seen) for seen in server.requests[start:]}
            whole = log.read_bytes()[: log.read_bytes().rfind(b"\n") + 1] if log.exists() else b""
            on_disk = {json.loads(line)["prompt"] for line in whole.splitlines()}
            if script.returncode == 0:
                break
            assert script.returncode == -signal.SIGKILL, script.stderr
            assert not out.exists()
        asked = [key(seen) for seen in server.requests]
        assert outputs(out) == reference[0]
        assert on_disk == set(asked) and len(on_disk) == len(reference[2])
        assert len(asked) - len(set(asked)) <= kills * concurrency  # those that were under way


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_polite_stop_loses_nothing(reference, rows_file, tmp_path, number, status):
    out = tmp_path / "pairs.jsonl"
    with FaultServer(answer=sometimes_bad, latency=0.05) as server:
        script = Script(command(rows_file, out, *api(server, "--concurrency", "2")))
        while len(server.requests) < 7:
            time.sleep(0.005)
        script.send(number)
        said = script.wait().stderr
        assert script.returncode == status, said
        assert "the same command goes on" in said and "Traceback" not in said
        answers = (tmp_path / "pairs.answers.jsonl").read_text().splitlines()
        assert len(answers) == len(server.requests) < 20
        assert run(rows_file, out, *api(server)).returncode == 0
        assert outputs(out) == reference[0]
        assert len(server.requests) == len(reference[2])  # nothing was asked twice


@pytest.mark.parametrize(
    ("fault", "says"), [("401", "OPENAI_API_KEY"), ("quota", "insufficient_quota"), ("404", "--api-model")]
)
def test_hopeless_servers_end_the_run_with_one_line(rows_file, tmp_path, fault, says):
    out = tmp_path / "pairs.jsonl"
    with FaultServer(["ok", "ok", *[fault] * 99]) as server:
        done = run(rows_file, out, *api(server, "--concurrency", "1"))
        assert done.returncode == 2 and len(server.requests) == 3
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and says in last and "2 answers are kept" in last
        assert "Traceback" not in done.stderr and not out.exists()
        written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
        assert KEY not in done.stdout + done.stderr + written


def test_max_requests_then_on(reference, rows_file, tmp_path):
    out = tmp_path / "pairs.jsonl"
    with FaultServer(answer=sometimes_bad) as server:
        done = run(rows_file, out, *api(server, "--max-requests", "20"))
        assert done.returncode == 0 and len(server.requests) == 20
        assert re.search(r"not kept: not asked: --max-requests 20", done.stdout)
        plain = [line for line in out.read_text().splitlines() if '"mirrored"' not in line]
        assert 0 < len(plain) <= 20
        assert run(rows_file, out, *api(server)).returncode == 0
        assert outputs(out) == reference[0] and len(server.requests) == len(reference[2])


def test_shards_make_up_the_whole(reference, rows_file, tmp_path):
    with FaultServer(answer=sometimes_bad) as server:
        lines = []
        for part in ("1/2", "2/2"):
            done = run(rows_file, tmp_path / "pairs.jsonl", *api(server, "--shard", part))
            assert done.returncode == 0
            lines += (tmp_path / f"pairs.{part.replace('/', 'of')}.jsonl").read_bytes().splitlines()
        assert "cat" in done.stdout
        assert sorted(lines) == sorted(reference[0][0].splitlines())
        assert len(server.requests) == len(reference[2])


def test_dry_run_asks_nothing_and_writes_nothing(rows_file, tmp_path):
    with FaultServer() as server:
        prices = ["--usd-per-mtok-in", "0.15", "--usd-per-mtok-out", "0.6"]
        done = run(rows_file, tmp_path / "pairs.jsonl", *api(server, "--dry-run", *prices), scorer=tmp_path / "scorer")
        assert done.returncode == 0, done.stderr
        assert server.requests == [] and list(tmp_path.iterdir()) == []
    assert "Ask one critical question" in done.stdout and " USD" in done.stdout and "at least" in done.stdout


def test_local_writer_survives_kills(rows_file, tmp_path):
    """The untrained model never asks anything of use; what it said, and why it was dropped, must be the same bytes."""
    local = ["--writer", "local", "--policy", "tiny", "--batch-size", "3", "--max-new-tokens", "8", "--limit", "14",
             "--device", "cpu", "--dtype", "float32", "--max-attempts", "2"]  # fmt: skip
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    done = run(rows_file, whole, *local, key=None)
    assert done.returncode == 0, done.stderr
    assert "local: 28 requests now" in done.stdout
    log = tmp_path / "killed.answers.jsonl"
    for wanted in (2, 9):
        arguments = command(rows_file, killed, *local)
        script = Script(arguments, key=None)
        while script.running and (not log.exists() or log.read_bytes().count(b"\n") < wanted):
            time.sleep(0.001)
        script.send(signal.SIGKILL)
        script.wait()
    log.write_bytes(log.read_bytes()[:-10])  # and half a line is lost
    assert run(rows_file, killed, *local, key=None).returncode == 0
    assert outputs(killed) == outputs(whole)
    answers = [sorted((tmp_path / f"{name}.answers.jsonl").read_bytes().splitlines()) for name in ("whole", "killed")]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-usd", "1"], "--usd-per-mtok-in"),
        (["--writer", "openai"], "OPENAI_API_KEY"),
        (["--writer", "carrier-pigeon"], "--writer"),
        (["--limit", "0"], "--limit"),
        (["--concurrency", "-1"], "--concurrency"),
        (["--chosen-min", "1.5"], "--chosen-min"),
        (["--chosen-min", "0.05"], "--rejected-max"),
        (["--shard", "5/4"], "--shard"),
        (["--shard", "x"], "--shard"),
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "nan"], "--timeout"),
        (["--usd-per-mtok-in", "-1"], "--usd-per-mtok-in"),
        (["--held-out", "1"], "--held-out"),
        (["--no-such-thing"], "--no-such-thing"),
    ],
)
def test_arguments(monkeypatch, capsys, arguments, says):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit) as left:
        make_pairs.parse_arguments(arguments)
    said = capsys.readouterr().err
    assert left.value.code == 2 and says in said and said.count("\n") == 1


def test_which_writer(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert make_pairs.parse_arguments([]).writer == "local"
    assert make_pairs.parse_arguments(["--base-url", "http://localhost:1/v1"]).writer == "openai"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert make_pairs.parse_arguments([]).writer == "openai"
    assert make_pairs.parse_arguments(["--writer", "local"]).writer == "local"


def test_nobody_elses_file_is_overwritten(rows_file, tmp_path):
    out = tmp_path / "thesis.txt"
    out.write_text("mine")
    done = run(rows_file, out, "--writer", "local", key=None)
    assert done.returncode == 2 and "choose another" in done.stderr and out.read_text() == "mine"
    done = run(rows_file, tmp_path, "--writer", "local", key=None)
    assert done.returncode == 2 and "a folder" in done.stderr


def test_without_a_model_the_message_says_what_to_run(rows_file, tmp_path):
    done = run(rows_file, tmp_path / "pairs.jsonl", key=None)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "train_sft.py" in done.stderr and "OPENAI_API_KEY is not set" in done.stdout


def test_help_is_quick():
    started = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / "make_pairs.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--writer" in done.stdout
    assert time.monotonic() - started < 2
    heavy = "import make_pairs, sys; print({'torch', 'openai', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], cwd=ROOT, text=True).strip() == "set()"
