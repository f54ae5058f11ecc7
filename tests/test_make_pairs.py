"""make_pairs.py: what it chooses and rejects, and that no kill, fault or order of answers changes or loses a pair."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from fault_server import QUESTIONS, FaultServer, good_question

import make_pairs
from socratiq.data import Row
from socratiq.pairs.answers import Answer, digest
from socratiq.pairs.checks import Job
from socratiq.pairs.human import human_pairs

ROOT = Path(__file__).parent.parent
KEY = "sk-test-0123456789abcdef"
TYPES = ["Analogy", "Clarity", "Fear appeal"]
SUBJECTS = "dogs trams schools taxes phones farms films wolves bikes books games ships".split()  # noqa: SIM905


# --- choosing and verifying -------------------------------------------------------------------------------------------


def arguments(*given):
    return make_pairs.parse_arguments(["--writer", "local", *given])


def strengths(*values, highest=None):
    return dict(zip(TYPES, zip(values, highest or values, strict=True), strict=True))


def clarity(number=0, chosen_strength=0.9, label="Clarity"):
    context = f"Text number {number} says that dogs are the better cats because they come when they are called."
    row = Row(context, "What do you mean by a better cat?", label, f"rows.csv row {number}")
    return Job(row, strengths(0.1, chosen_strength, 0.1))


def test_choose():
    rows = [
        (Row("c1", "How are dogs and cats alike?", "Clarity", "r 1"), (0.8, 0.1, 0.1)),  # not what its label says
        (Row("c1", "What do you mean?", "Clarity", "r 2"), (0.1, 0.7, 0.1)),
        (Row("c2", "What do you mean?", "Clarity", "r 3"), (0.1, 0.7, 0.1)),  # the same question about another text
        (Row("c2", "What do you mean?", "Analogy", "r 4"), (0.1, 0.7, 0.1)),  # a copy under another label
        (Row("c2", "You are stupid?", "others", "r 5"), (0.9, 0.1, 0.1)),
        (Row("c3", "No question at all.", "Clarity", "r 6"), (0.9, 0.1, 0.1)),
        (Row("c3", "How likely is that?", "Fear appeal", "r 7"), (0.1, 0.2, 0.39)),
    ]
    jobs = [Job(row, strengths(*values)) for row, values in rows]
    make_pairs.choose(jobs, 0.4)
    assert [job.type for job in jobs if not job.dropped] == ["Analogy", "Clarity", "Clarity"]
    assert jobs[0].strength == 0.8
    assert "stands in the data before" in jobs[3].dropped
    assert jobs[4].dropped == "labelled others"
    assert jobs[5].dropped == "not well formed: not a question"
    assert "--chosen-min" in jobs[6].dropped


class CueScorer:
    """Strength 0.9 of the type whose cue word stands in the question, 0.1 of the others."""

    cues = {"Analogy": "alike", "Clarity": "mean", "Fear appeal": "likely"}  # noqa: RUF012

    def graded(self, contexts, questions, types):
        import torch

        strength = [0.9 if self.cues[name] in q else 0.1 for q, name in zip(questions, types, strict=True)]
        parts = {"strength": strength, "form": ["stutter" not in q for q in questions]}
        parts["probe"] = [0.9 if "doubtful" in q else 0.1 for q in questions]
        return None, {name: torch.tensor(values, dtype=torch.float64) for name, values in parts.items()}


GOOD = "How are dogs and cats alike?"


@pytest.mark.parametrize(
    ("answer", "flaw"),
    [
        (GOOD, ""),
        ("What does better mean, then?", "still of the unwanted type"),
        ("Is it doubtful how dogs differ?", "still of the unwanted type"),  # by the probe, not by the n-grams
        ("Does it stutter stutter stutter?", "stutters"),
        ("Dogs are better.", "not a question"),
        (Answer("I cannot help.", "refusal"), "finish_reason refusal: not a question"),
        (Answer("", "content_filter"), "finish_reason content_filter: empty"),
        (Answer("", "empty"), "finish_reason empty: empty"),
        (Answer("What would", "length"), "finish_reason length: not a question"),
        (Answer(GOOD, "length"), ""),
    ],
)
def test_verify(answer, flaw):
    answer = answer if isinstance(answer, Answer) else Answer(answer)
    job, other = clarity(), clarity(1)
    make_pairs.verify([(job, answer), (other, Answer(GOOD))], CueScorer(), 0.25)
    assert job.attempts[0]["flaw"] == flaw and bool(job.rejected) == (not flaw) and not job.dropped
    assert other.rejected == GOOD and other.attempts[0]["strength"] == 0.1
    if flaw:
        make_pairs.verify([(job, answer)], CueScorer(), 0.25)
        assert job.without_pair()["reason"] == f"no rejected question: {flaw}" and len(job.attempts) == 2


def test_pairs_that_can_be_mirrored():
    def pairs(*given, found=(0.8, 0.1, 0.1), own=(0.05, 0.9, 0.1), highest=None, label="Clarity"):
        job = clarity(label=label)
        job.types, job.rejected = strengths(*own, highest=highest), GOOD
        job.attempts = [{"question": GOOD, "strength": 0.1, "flaw": "", "type": "Fear appeal"}]
        return make_pairs.pairs_of(job, dict(zip(TYPES, found, strict=True)), "train", "local", arguments(*given))

    plain, turned = pairs()
    assert "in the format Analogy" in turned["prompt"] and turned["type"] == "Analogy" and turned["mirrored"]
    assert "in the format Clarity" in plain["prompt"]
    assert (plain["chosen_strength"], plain["rejected_strength"]) == (0.9, 0.1)
    assert (turned["chosen"], turned["chosen_strength"]) == (GOOD, 0.8) and plain["rejected"] == GOOD
    assert (turned["rejected"], turned["rejected_strength"]) == (plain["chosen"], 0.05)
    assert pairs(found=(0.39, 0.1, 0.1)) == [plain], "the rejected question is not surely of another type"
    assert pairs(found=(0.1, 0.8, 0.1)) == [plain], "it is of the chosen question's"
    assert len(pairs(own=(0.3, 0.9, 0.1))) == 1, "the chosen question is of that type too"
    assert len(pairs(highest=(0.5, 0.9, 0.1))) == 1, "to one opinion"
    assert len(pairs(label="Analogy")) == 1, "a person called it so"


def test_no_label_of_a_held_out_text_reaches_a_grade():
    """Held-out texts are graded, and nothing about any text changes when their labels do."""
    wordings = {"Clarity": "What do you mean by good {}?", "Analogy": "Are {} really like clouds?"}
    texts = {f"I think that {subject} are good.": subject for subject in SUBJECTS}
    asked = [(text, subject, type) for text, subject in texts.items() for type in wordings]
    rows = [Row(text, wordings[type].format(subject), type, "") for text, subject, type in asked]
    held_out = {row.context for row in rows if "dogs" in row.context or "ships" in row.context}
    turned = {"Clarity": "Analogy", "Analogy": "Fear appeal"}
    other = [row._replace(type=turned[row.type]) if row.context in held_out else row for row in rows]
    found, again = (make_pairs.grade(some, held_out, None) for some in (rows, other))
    assert [job.types for job in found] == [job.types for job in again] and set(found[0].types) == set(wordings)
    assert [job.type for job in found] == [row.type for row in rows]


def test_limit_and_shards_take_the_same_rows_again():
    keys = [digest(number) for number in range(200)]

    def picked(*given):
        return make_pairs.picked(keys, arguments(*given))

    few = picked("--limit", "20")
    assert len(few) == 20 and few < picked("--limit", "50")
    assert max(keys.index(key) for key in few) > 150  # spread over the data
    assert set.union(*(picked("--limit", "20", "--shard", f"{part}/3") for part in (1, 2, 3))) == few


# --- people's verdicts ------------------------------------------------------------------------------------------------


def test_human_pairs():
    def rows(context, kind, good, bad):
        said = [("chosen", n) for n in range(good)] + [("rejected", n) for n in range(bad)] + [("", 0)]
        return [Row(context, f"{side}{n}?", kind, f"{context}{kind}{side}{n}", side) for side, n in said]

    def found(data, most=1):
        return [(good.question[6:-1], bad.question[8:-1]) for good, bad in human_pairs(data, most)]

    assert found(rows("a", "", 3, 2)) == [("0", "0"), ("1", "1")]
    assert found(rows("a", "", 2, 3), most=2) == [("0", "0"), ("1", "1"), ("0", "1"), ("1", "2")]
    assert len(found(rows("a", "", 3, 1), most=9)) == 3, "no two questions twice together"
    assert found(rows("a", "", 1, 0) + rows("b", "", 0, 1) + rows("b", "Clarity", 1, 0)) == []
    both = [Row("a", "Why?", "", "1", "chosen"), Row("a", "Why?", "", "2", "rejected")]
    assert human_pairs(both, 1) == [], "people disagreed"


def test_human_verdicts_need_no_writer_no_scorer_and_no_model(tmp_path):
    """The file of the 2025 shared task on critical questions, read directly, by a process that never loads torch."""
    verdicts = ["Useful", "useful", "Unhelpful", "INVALID"]
    asked = [{"cq": f"Is question {i} good?", "label": said} for i, said in enumerate(verdicts)]
    told = {f"text {n}": {"intervention": f"Trams number {n} are loud.", "cqs": asked} for n in range(10)}
    (tmp_path / "cqs.json").write_text(json.dumps(told))
    code = "import make_pairs as m, sys; m.run(); assert not {'torch', 'openai', 'transformers'} & set(sys.modules)"
    asked = [sys.executable, "-c", code, "--data", tmp_path / "cqs.json", "--out", tmp_path / "p.jsonl"]
    done = subprocess.run([*asked, "--dry-run"], capture_output=True, text=True, cwd=ROOT)
    assert "40 rows, 20 pairs; no request" in done.stdout and os.listdir(tmp_path) == ["cqs.json"]
    done = subprocess.run([*asked, "--limit", "15"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 15 and "40 rows, 15 pairs" in done.stdout and "writer: none" in done.stdout
    assert {line["chosen"] for line in lines} == {"Is question 0 good?", "Is question 1 good?"}
    assert {line["rejected"] for line in lines} == {"Is question 2 good?", "Is question 3 good?"}
    assert all(line["context"] in line["prompt"] and line["writer"] == "human" for line in lines)
    assert {line["split"] for line in lines} == {"train", "held_out"}


# --- the script, as a user runs it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    """Three types that a scorer tells apart at a glance, about twelve texts. No two rows make the same request."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    wordings = {
        "Clarity": "What exactly do you mean by all {} being good?",
        "Analogy": "Are {} and clouds really alike in the way that matters?",
        "Fear appeal": "How likely is the disaster that you warn of, just with {}?",
    }
    lines = [
        {"context": f"I think that {subject} are good, since my street says so.", "question": text, "label": type}
        for n, subject in enumerate(SUBJECTS)
        for type, wording in wordings.items()
        for text in (wording.format(subject), QUESTIONS[type][n % 2])  # the words the fault server uses too
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def start_in(scripts, rows_file):
    """start_in(folder, *arguments): the script under way; its scorer is a common one, fitted once."""

    def started(folder, *more, **kill):
        common = ["--data", rows_file, "--scorer", rows_file.parent / "scorer", "--scorer-model", "none"]
        env = {"NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": KEY}
        options = {"cwd": folder, "env": env, "patch": "patches:quick_retries", **kill}
        return scripts.start(["make_pairs.py", *common, *more], **options)

    return started


@pytest.fixture
def start(start_in, tmp_path):
    return partial(start_in, tmp_path)


@pytest.fixture
def run(start):
    """run(*arguments): exit status, standard output and standard error of the script."""
    return lambda *more: start(*more).wait()


def api(server, *more):
    return ["--base-url", server.url, "--timeout", "3", "--out", "pairs.jsonl", *more]


def outputs(folder: Path, name="pairs") -> tuple[bytes, bytes]:
    return (folder / f"{name}.jsonl").read_bytes(), (folder / f"{name}.dropped.jsonl").read_bytes()


def sometimes_bad(body) -> str:
    """A good question, but for one text in three the first answer is of the type that was not wanted."""
    text = body["messages"][-1]["content"]
    unwanted = re.search(r'not be a question of the type "([^"]+)"', text)[1]
    if len(text.split("\n")[1]) % 3 == 0 and "earlier tries" not in text:
        return QUESTIONS[unwanted][0]
    return good_question(body)


@pytest.fixture(scope="module")
def reference(start_in, tmp_path_factory):
    """An uninterrupted run, one request at a time -> outputs, standard output, the requests of the server."""
    folder = tmp_path_factory.mktemp("reference")
    with FaultServer(answer=sometimes_bad) as server:
        prices = ["--usd-per-mtok", "1", "2"]
        status, said, complained = start_in(folder, *api(server, "--concurrency", "1", *prices)).wait()
        assert status == 0, complained
        return outputs(folder), said, server.requests


def test_the_pairs_file(reference):
    from socratiq.prompts import build_prompt

    (pairs, dropped), said, requests = reference
    pairs = [json.loads(line) for line in pairs.decode().splitlines()]
    dropped = [json.loads(line) for line in dropped.decode().splitlines()]
    turned = [pair for pair in pairs if pair.get("mirrored")]
    assert turned and len(pairs) - len(turned) >= 50 and len(pairs) - len(turned) + len(dropped) == 72
    for pair in pairs:
        assert list(pair)[:5] == ["prompt", "chosen", "rejected", "type", "context"]
        assert pair["prompt"] == build_prompt(pair["context"], pair["type"])
        assert pair["chosen_strength"] >= 0.4 and pair["rejected_strength"] <= 0.1
        assert pair["writer"] == "openai:gpt-4o-mini"
    assert len(requests) > len(pairs) - len(turned), "some were asked for twice"
    contexts = {split: {p["context"] for p in pairs if p["split"] == split} for split in ("train", "held_out")}
    assert all(contexts.values()) and not contexts["train"] & contexts["held_out"]
    assert all(line["reason"] and line["question"] for line in dropped)

    assert f"72 rows, {len(pairs)} pairs in pairs.jsonl, {len(turned)} of them mirrored" in said
    assert f"openai:gpt-4o-mini: {len(requests)} requests now" in said and "USD" in said
    assert "writer: openai:gpt-4o-mini; the texts go to http://127.0.0.1" in said and KEY not in said
    assert said.endswith("next:  python train_dpo.py --pairs pairs.jsonl\n")


def test_nothing_depends_on_concurrency_or_faults(reference, run, tmp_path):
    faults = ["429", "503", "ok", "drop", "429", "ok", "slow", "invalid json", "reset", "500", "html"] * 4
    faults += ["json list", "200 busy", "200 error"] * 4
    random.Random(1).shuffle(faults)
    with FaultServer(faults, answer=sometimes_bad) as server:
        status, _, complained = run(*api(server, "--concurrency", "16", "--timeout", "1"))
        assert status == 0, complained
        assert outputs(tmp_path) == reference[0]
        good = [json.dumps(seen.body) for seen in server.requests if seen.fault == "ok"]
        assert len(good) == len(set(good)) == len(reference[2])

        status, said, _ = run(*api(server))  # a rerun pays for nothing twice
        assert status == 0 and "0 requests now" in said
        assert outputs(tmp_path) == reference[0]
        assert len([seen for seen in server.requests if seen.fault == "ok"]) == len(good)


def test_kills(reference, start, tmp_path):
    """By the clock, or before or after a sync: the same bytes in the end, and no answer on disk is asked for again."""
    log, chance = tmp_path / "pairs.answers.jsonl", random.Random(os.environ.get("SEED", 7))
    concurrency, on_disk = 3, set()

    def key(seen):  # the name of the answer to this request in the log
        return digest({"messages": seen.body["messages"]})

    with FaultServer(answer=sometimes_bad, latency=0.01) as server:
        for how in ("time", "after", "time", "before", "time", None):
            first, at = len(server.requests), chance.randint(0, 12) if how in ("before", "after") else None
            script = start(*api(server, "--concurrency", concurrency), at=at, how=how)
            if how == "time":
                wanted = first + chance.randint(0, 12)
                script.until(lambda wanted=wanted: len(server.requests) >= wanted)
                time.sleep(chance.random() * 0.02)
                script.kill(signal.SIGKILL)
            status, _, complained = script.wait()
            assert not on_disk & {key(seen) for seen in server.requests[first:]}
            whole_lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
            on_disk = {json.loads(line)["prompt"] for line in whole_lines}
            if status == 0:
                break
            assert status == -signal.SIGKILL, complained
            assert not (tmp_path / "pairs.jsonl").exists()
        asked = [key(seen) for seen in server.requests]
        assert outputs(tmp_path) == reference[0]
        assert on_disk == set(asked) and len(on_disk) == len(reference[2])
        assert len(asked) - len(set(asked)) <= 5 * concurrency  # those that were under way


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_polite_stop_loses_nothing(reference, start, run, tmp_path, number, status):
    with FaultServer(answer=sometimes_bad, latency=0.05) as server:
        script = start(*api(server, "--concurrency", "2"))
        script.until(lambda: len(server.requests) >= 7)
        script.kill(number)
        left, _, complained = script.wait()
        assert left == status, complained
        assert "the same command goes on" in complained and "Traceback" not in complained
        answers = (tmp_path / "pairs.answers.jsonl").read_text().splitlines()
        assert len(answers) == len(server.requests) < 20
        assert run(*api(server))[0] == 0
        assert outputs(tmp_path) == reference[0]
        assert len(server.requests) == len(reference[2])  # nothing was asked twice


def test_a_hopeless_server_ends_the_run_with_one_line_that_shows_no_key(run, tmp_path):
    with FaultServer(["ok", "ok", "401"]) as server:
        status, said, complained = run(*api(server, "--concurrency", "1"))
        assert status == 2 and len(server.requests) == 3
    assert complained.startswith("error: ") and "OPENAI_API_KEY" in complained and complained.count("\n") == 1
    assert not (tmp_path / "pairs.jsonl").exists()
    assert len((tmp_path / "pairs.answers.jsonl").read_text().splitlines()) == 2
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in said + complained + written


def test_max_requests_counts_earlier_runs(reference, run, tmp_path):
    with FaultServer(answer=sometimes_bad) as server:
        for most in ("15", "20"):
            status, said, _ = run(*api(server, "--max-requests", most))
            assert status == 0 and len(server.requests) == int(most)
            assert f"not kept: not asked: --max-requests {most}" in said
        assert run(*api(server))[0] == 0
        assert outputs(tmp_path) == reference[0] and len(server.requests) == len(reference[2])


def test_shards_make_up_the_whole(reference, run, tmp_path):
    with FaultServer(answer=sometimes_bad) as server:
        lines = []
        for part in ("1/2", "2/2"):
            status, said, _ = run(*api(server, "--shard", part))
            assert status == 0 and f"pairs.{part[0]}of2.jsonl" in said
            lines += outputs(tmp_path, f"pairs.{part.replace('/', 'of')}")[0].splitlines()
        assert sorted(lines) == sorted(reference[0][0].splitlines())
        assert len(server.requests) == len(reference[2])


def test_dry_run_asks_nothing_and_writes_nothing(run, tmp_path):
    with FaultServer() as server:
        prices = ["--usd-per-mtok", "0.15", "0.6"]
        status, said, complained = run(*api(server, "--dry-run", *prices, "--scorer", "scorer"))
        assert status == 0, complained
        assert server.requests == [] and list(tmp_path.iterdir()) == []
    assert "Ask one critical question" in said and " USD" in said and "72 requests" in said


LOCAL = ["--policy", "tiny", "--batch-size", "3", "--max-new-tokens", "8", "--limit", "14", "--device", "cpu",
         "--dtype", "float32", "--max-attempts", "2"]  # fmt: skip


def test_local_writer_survives_kills(start, run, tmp_path):
    """The untrained model never asks anything of use; its words, and why they were dropped, must be the same bytes."""
    (tmp_path / "whole.jsonl").write_text("pairs of an earlier run")
    (tmp_path / "whole.dropped.jsonl").touch()
    status, said, complained = run(*LOCAL, "--out", "whole.jsonl")
    assert status == 1 and "local: 28 requests now" in said and "writer: local" in said, "a key alone names no server"
    assert "no pair was made" in complained and "not kept: no rejected question" in said
    assert not (tmp_path / "whole.jsonl").exists()
    log = tmp_path / "killed.answers.jsonl"
    for wanted in (2, 9):
        script = start(*LOCAL, "--out", "killed.jsonl")
        script.until(lambda wanted=wanted: log.exists() and log.read_bytes().count(b"\n") >= wanted)
        script.kill(signal.SIGKILL)
        script.wait()
    log.write_bytes(log.read_bytes()[:-10])  # and half a line is lost
    assert run(*LOCAL, "--out", "killed.jsonl")[0] == 1
    for kind in ("dropped", "answers"):
        found = [sorted((tmp_path / f"{name}.{kind}.jsonl").read_bytes().splitlines()) for name in ("whole", "killed")]
        assert found[0] == found[1] and found[0]


# --- arguments: more of them in tests/test_bad_input.py ---------------------------------------------------------------


def test_a_server_is_asked_only_if_an_option_says_so(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert make_pairs.parse_arguments([]).writer is None  # local, or none if people said which questions they prefer
    for option in (["--base-url", "http://localhost:1/v1"], ["--api-model", "m"], ["--writer", "openai"]):
        assert make_pairs.parse_arguments(option).writer == "openai"
    assert make_pairs.parse_arguments(["--writer", "local", "--api-model", "m"]).writer == "local"
