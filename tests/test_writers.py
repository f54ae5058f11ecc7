"""The writers against a server that misbehaves over real HTTP, and the words and the log they work with."""

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path

import pytest
from fault_server import FaultServer

from socratiq.pairs.checks import Answer, AnswerLog, Job, Request, clean_question, digest, flaw, messages, other_types
from socratiq.pairs.writers import Budget, Halted, LimitReached, OpenAIWriter, RowFailed, retry_after
from socratiq.run.errors import UserError

KEY = "sk-test-0123456789abcdef"
CONTEXT = "My neighbour drives everywhere, and since the tram came fewer people do. Cars are a habit, not a need."


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def job(row: str = "0123456789abcdef", **fields) -> Job:
    fields = {"context": CONTEXT, "type": "Clarity", "chosen": "What do you mean by a habit?", **fields}
    fields.setdefault("other_types", ["Analogy", "Assumptions", "Fear appeal"])
    return Job(row=row, index=0, source="rows.csv row 1", chosen_score=0.9, **fields)


def writer(server: FaultServer, **options) -> OpenAIWriter:
    options = {"key": KEY, "timeout": 0.4, "retry_delay": 0.01, "max_retries": 3, **options}
    return OpenAIWriter("some-model", server.url, **options)


def ask(server: FaultServer, **options) -> Answer:
    asking = writer(server, **options)
    return asking.answers([asking.request(job())])[0]


# --- transport ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    ["429", "429 after 0.05", "500", "503", "503 after 0.05", "slow", "drop", "reset", "invalid json", "html",
     "json list", "odd json"],
)  # fmt: skip
def test_a_request_without_an_answer_is_sent_again(fault):
    with FaultServer([fault, fault, "ok"]) as server:
        answer = ask(server)
        assert answer.text.endswith("?") and answer.finish == "stop"
        assert [seen.fault for seen in server.requests] == [fault, fault, "ok"]
        assert server.requests[0].body == server.requests[2].body
        assert answer.prompt_tokens > 0 and answer.completion_tokens > 0


@pytest.mark.parametrize("fault", ["429", "503", "drop", "invalid json"])
def test_a_row_is_given_up_after_the_last_retry(fault):
    with FaultServer([fault] * 9) as server:
        with pytest.raises(RowFailed) as failure:
            ask(server, max_retries=2)
        assert failure.value.transient
        assert len(server.requests) == 3


def test_a_server_that_is_not_there():
    with FaultServer() as server:
        pass
    asking = OpenAIWriter("m", server.url, KEY, retry_delay=0, max_retries=1)
    with pytest.raises(RowFailed, match="connection") as failure:
        asking.answers([asking.request(job())])
    assert failure.value.transient and asking.budget.requests == 2


def test_retry_after_is_obeyed_by_all_threads():
    with FaultServer(["429 after 0.5"]) as server:
        asking = writer(server)
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(asking.answers, [asking.request(job())])
            while not asking.retries:
                time.sleep(0.005)
            others = [pool.submit(asking.answers, [asking.request(job(f"{n:016x}"))]) for n in range(3)]
            assert all(future.result()[0].text for future in [first, *others])
        refused, *later = server.requests
        assert len(later) == 4
        assert min(seen.time for seen in later) - refused.time >= 0.5


def test_without_retry_after_the_delay_doubles():
    with FaultServer(["503", "503", "503"]) as server:
        ask(server, retry_delay=0.08)
        times = [seen.time for seen in server.requests]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        for gap, delay in zip(gaps, (0.08, 0.16, 0.32), strict=True):
            assert gap >= 0.75 * delay


def test_retry_after_in_all_spellings():
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert 8 < retry_after({"retry-after": formatdate(time.time() + 10, usegmt=True)}) <= 10
    assert retry_after({"retry-after": formatdate(time.time() - 10, usegmt=True)}) == 0
    for nothing in ({}, {"retry-after": "soon"}, {"retry-after": "-4"}, {"retry-after": "nan"}):
        assert retry_after(nothing) is None


def test_halting_wakes_a_writer_that_waits():
    with FaultServer(["429 after 30"]) as server:
        asking = writer(server)
        threading.Timer(0.3, asking.halt.set).start()
        started = time.monotonic()
        with pytest.raises(Halted):
            asking.answers([asking.request(job())])
        assert time.monotonic() - started < 5
        assert len(server.requests) == 1


# --- when going on is useless -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("401", "OPENAI_API_KEY was refused"),
        ("402", "used up"),
        ("quota", "insufficient_quota"),
        ("403", "may not do that"),
        ("404", "--api-model"),
        ("503 after 5000", "come back in 5000 seconds"),
    ],
)
def test_hopeless_at_once(fault, says):
    with FaultServer([fault]) as server:
        with pytest.raises(UserError, match=says) as failure:
            ask(server)
        assert len(server.requests) == 1
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        assert "\n" not in str(failure.value)
        assert KEY not in "".join(traceback.format_exception(failure.value))  # the chain of causes is cut


def test_a_server_that_wants_a_key():
    with FaultServer(["401"]) as server, pytest.raises(UserError, match="set OPENAI_API_KEY"):
        ask(server, key=None)


def test_a_redirect_is_not_followed():
    with FaultServer() as other, FaultServer(["redirect"], target=other.url.removesuffix("/v1")) as server:
        with pytest.raises(UserError, match=f"redirects to {other.url}") as failure:
            ask(server)
        assert other.requests == []  # neither key nor text
        assert KEY not in str(failure.value)


@pytest.mark.parametrize(("fault", "says"), [("too long", "400: too many tokens"), ("400 detail", "pinned to 'a'")])
def test_a_request_the_server_refuses_costs_only_its_row(fault, says):
    with FaultServer([fault]) as server:
        asking = writer(server)
        with pytest.raises(RowFailed, match=says) as failure:
            asking.answers([asking.request(job())])
        assert not failure.value.transient
        assert len(server.requests) == 1
        assert asking.answers([asking.request(job())])[0].text


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-schlüssel", "sk a"])
def test_a_key_no_header_can_carry_is_refused_without_being_shown(key):
    with pytest.raises(UserError, match="OPENAI_API_KEY") as failure:
        OpenAIWriter("m", "http://127.0.0.1:1/v1", key)
    assert key not in str(failure.value)


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://host/v1", "http://", "nonsense"])
def test_a_malformed_address(address):
    with pytest.raises(UserError, match="--base-url"):
        OpenAIWriter("m", address, KEY)


def test_passwords_in_the_address_are_not_shown():
    assert "secret" not in OpenAIWriter("m", "https://user:secret@host/v1", KEY).address


def test_scrub_leaves_no_key_and_no_control_characters():
    scrub = OpenAIWriter("m", "http://127.0.0.1:1/v1", KEY).scrub
    said = scrub(f"key {KEY} or sk-proj-zzzz***zzzz\x1b[31m\nred " + "long " * 100)
    assert KEY not in said and "zzzz" not in said and "\x1b" not in said and "\n" not in said and len(said) <= 200


# --- content ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "finish", "text"),
    [
        ("empty choices", "empty", ""),
        ("null choices", "empty", ""),
        ("empty content", "stop", ""),
        ("null content", "stop", ""),
        ("refusal", "refusal", "I cannot help with that."),
        ("content filter", "content_filter", ""),
        ("400 content filter", "content_filter", ""),
        ("cut off", "length", "What would"),
    ],
)
def test_an_answer_without_a_question_is_still_an_answer(fault, finish, text):
    with FaultServer([fault]) as server:
        answer = ask(server)
        assert (answer.finish, answer.text) == (finish, text)
        assert len(server.requests) == 1


def test_missing_token_counts_are_guessed():
    with FaultServer(["no usage"]) as server:
        answer = ask(server)
        assert answer.prompt_tokens > 50 and answer.completion_tokens > 3


def test_what_is_sent():
    with FaultServer() as server:
        asking = writer(server, temperature=0.5, max_tokens=77)
        first = job()
        asking.answers([asking.request(first)])
        sent = server.requests[0]
        assert sent.path == "/v1/chat/completions"
        assert sent.body["model"] == "some-model" and sent.body["max_tokens"] == 77 and sent.body["temperature"] == 0.5
        text = sent.body["messages"][-1]["content"]
        assert CONTEXT in text and 'not be a question of the type "Clarity"' in text
        assert f'of the type "{first.asked_type()}"' in text
        assert "about 7 words" in text


def test_no_key_sends_none_of_ours():
    with FaultServer() as server:
        ask(server, key=None)
        assert KEY not in str(server.requests[0].headers)


def test_earlier_attempts_are_shown_and_another_type_is_asked_for():
    again = job()
    before = again.asked_type()
    again.attempts.append({"question": "What is meant?", "score": 0.7, "flaw": "still of the unwanted type"})
    again.attempts.append({"question": "", "score": None, "flaw": "refused to answer"})
    text = messages(again)[-1]["content"]
    assert "- What is meant? (still of the unwanted type)" in text and "refused" not in text
    assert again.asked_type() != before
    asked = set()
    for _ in range(3):
        asked.add(again.asked_type())
        again.attempts.append({"question": "", "score": None, "flaw": "empty"})
    assert asked == set(again.other_types)


def test_other_types_of_a_set_with_one_type_come_from_the_table():
    assert other_types("A", ["A", "B"]) == ["B"]
    assert "Analogy" in other_types("Clarity", ["Clarity"]) and "Clarity" not in other_types("Clarity", ["Clarity"])


def test_a_huge_text_is_cut():
    assert len(messages(job(context="word " * 50_000))[-1]["content"]) < 14_000


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("Why is that so?", "Why is that so?"),
        ('  "Why is that so?"\n', "Why is that so?"),
        ("**Why is that so?**", "Why is that so?"),
        ("1. Why is that so?\n2. How?", "Why is that so?"),
        ("- Why is that so?", "Why is that so?"),
        ("Sure! Here is one:\n\nWhy is that so?", "Why is that so?"),
        ("Question: Why is that so?", "Why is that so?"),
        ("**Question:** Why is that so?", "Why is that so?"),
        ("<think>Why? Because.</think>\nWhy is that so?", "Why is that so?"),
        ("Why? I wonder.</think>\nWhy is that so?", "Why is that so?"),
        ("<think>never ends", ""),
        ("“Why is that so?”", "Why is that so?"),
        ("Why\u202e is\x00 that\u200b so?", "Why is that so?"),
        ("Is 3.5 enough?", "Is 3.5 enough?"),
        ("No question here.", "No question here."),
        ("", ""),
    ],
)
def test_clean_question(answer, question):
    assert clean_question(answer) == question
    assert clean_question(question) == question


@pytest.mark.parametrize(
    ("question", "wrong"),
    [
        ("How would a shop owner see this?", ""),
        ("", "empty"),
        ("???", "empty"),
        ("I think so.", "not a question"),
        ("Why so? Because it is.", "not a question"),
        ("Why so? And why that?", "more than one question"),
        ("Why though?", "too short"),
        ("Why " + "and so on " * 25 + "?", "too long"),
        ("what do you mean by a HABIT ?", "equal to the chosen question"),
        ("So what do you mean by a habit?", "nearly equal to the chosen question"),
        ("What do others mean by such a habit?", ""),
        ("Cars are a habit, not a need?", "copies the text"),
        ("Since the tram came fewer people do?", "copies the text"),
        ("### Response: why is that so?", "echoes the template"),
        ("Why is that so <|im_end|> then?", "echoes the template"),
        ("电车为什么会这样 改变 人们的 习惯?", ""),
    ],
)
def test_flaw(question, wrong):
    assert flaw(question, CONTEXT, "What do you mean by a habit?") == wrong


# --- budget -----------------------------------------------------------------------------------------------------------


def test_max_requests_holds_over_threads():
    with FaultServer() as server:
        budget = Budget(max_requests=25)
        asking = writer(server, budget=budget, timeout=5)

        def one(number):
            try:
                return asking.answers([asking.request(job(f"{number:016x}"))])
            except LimitReached as limit:
                assert "--max-requests 25" in str(limit)

        with ThreadPoolExecutor(16) as pool:
            done = [result for result in pool.map(one, range(60)) if result]
        assert len(done) == len(server.requests) == budget.requests == 25


def test_retries_count_as_requests():
    with FaultServer(["503"] * 9) as server, pytest.raises(LimitReached):
        ask(server, budget=Budget(max_requests=2))
    assert len(server.requests) == 2


def test_max_usd_is_never_passed_and_nearly_used():
    with FaultServer() as server:
        budget = Budget(max_usd=0.02, usd_per_mtok_in=1.0, usd_per_mtok_out=10.0)
        asking = writer(server, budget=budget, timeout=5)

        def one(number):
            try:
                asking.answers([asking.request(job(f"{number:016x}"))])
                return 1
            except LimitReached:
                return 0

        with ThreadPoolExecutor(16) as pool:
            done = sum(pool.map(one, range(200)))
        assert 0.015 < budget.usd <= 0.02
        assert budget.reserved == pytest.approx(0)
        assert done == len(server.requests)
        assert budget.usd == pytest.approx((budget.prompt_tokens + 10 * budget.completion_tokens) / 1e6)


def test_a_broken_off_request_counts_as_possibly_paid():
    with FaultServer(["drop", "503", "ok"]) as server:
        budget = Budget(max_usd=1.0, usd_per_mtok_in=1.0, usd_per_mtok_out=1.0)
        answer = ask(server, budget=budget)
        assert budget.usd > budget.cost(answer.prompt_tokens, answer.completion_tokens)
        assert budget.requests == 3


# --- answers on disk --------------------------------------------------------------------------------------------------


def request(row="r1", attempt=1, text="x") -> Request:
    return Request(row, attempt, {"messages": [{"role": "user", "content": text}]})


def test_the_log_gives_back_what_it_was_given(tmp_path):
    path = tmp_path / "sub" / "pairs.answers.jsonl"
    log = AnswerLog(path, "m")
    log.add([(request(), Answer("Why é?", "stop", 5, 2)), (request(attempt=2), Answer("", "refusal"))])
    log.add([(request(), Answer("another", "stop", 1, 1))])  # what was there stays
    log.close()
    again = AnswerLog(path, "m")
    assert again.get(request()) == Answer("Why é?", "stop", 5, 2)
    assert again.get(request(attempt=2)).finish == "refusal"
    assert len(again.paid()) == 2 == len(path.read_text(encoding="utf-8").splitlines())
    for other in (request(row="r2"), request(attempt=3), request(text="y")):
        assert again.get(other) is None
    again.close()
    other_model = AnswerLog(path, "n")
    assert other_model.get(request()) is None and other_model.paid() == []


def test_an_answer_cut_off_at_a_lower_limit_is_asked_for_again(tmp_path):
    path = tmp_path / "a.jsonl"
    log = AnswerLog(path, "m", max_tokens=200)
    log.add([(request(), Answer("", "length", 5, 200)), (request(attempt=2), Answer("Why?", "stop", 5, 9))])
    log.close()
    log = AnswerLog(path, "m", max_tokens=200)  # the same limit: the same answer, for nothing
    assert log.get(request()).finish == "length"
    log.close()
    log = AnswerLog(path, "m", max_tokens=4000)
    assert log.get(request()) is None and log.get(request(attempt=2)).text == "Why?"
    log.add([(request(), Answer("What for?", "stop", 5, 700))])
    log.close()
    log = AnswerLog(path, "m", max_tokens=4000)
    assert log.get(request()).text == "What for?"
    assert sorted(answer.completion_tokens for answer in log.paid()) == [9, 200, 700]
    log.close()


def test_every_cut_of_the_log_is_repaired(tmp_path):
    path = tmp_path / "a.jsonl"
    log = AnswerLog(path, "m")
    log.add([(request(attempt=n), Answer(f"Öde {n}?", "stop", n, n)) for n in (1, 2, 3)])
    log.close()
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        log = AnswerLog(path, "m")
        assert len(log.answers) == 2
        log.add([(request(attempt=3), Answer("Öde 3?", "stop", 3, 3))])
        log.close()
        assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"row": 1}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 1"):
        AnswerLog(path, "m")
    path.write_text("nonsense\n{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 1"):
        AnswerLog(path, "m")


def test_one_run_at_a_time(tmp_path):
    held = "from socratiq.pairs.checks import AnswerLog\nlog = AnswerLog('a.jsonl', 'm')\nprint('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another"):
            AnswerLog(tmp_path / "a.jsonl", "m")
        other.kill()
    AnswerLog(tmp_path / "a.jsonl", "m").close()


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": "ü"}) == digest(json.loads('{"b": "ü", "a": 1}')) != digest({"a": 1, "b": "u"})


# --- the local writer -------------------------------------------------------------------------------------------------


def test_local_writer_samples_the_same_again_and_by_its_seed():
    from socratiq.models import load_policy, load_tokenizer
    from socratiq.pairs.writers import LocalWriter

    policy, tokenizer = load_policy("tiny", "cpu", "float32", trainable=False), load_tokenizer("tiny")
    jobs = [job(f"{n:016x}") for n in range(3)]

    def sampled(**options):
        local = LocalWriter(policy, tokenizer, "tiny", max_new_tokens=6, **options)
        return local.answers([local.request(one) for one in jobs])

    first = sampled()
    assert first == sampled() != sampled(seed=1)
    assert len({answer.text for answer in first}) == 3
    assert all(answer.prompt_tokens > 20 and 0 < answer.completion_tokens <= 6 for answer in first)
