"""The room pairs/: writers against a server that misbehaves over real HTTP, the log of answers, the words that go out
and come in."""

import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from fault_server import FaultServer, good_question

from socratiq.data import Row
from socratiq.pairs.answers import Answer, AnswerLog, NoAnswer, Refused, Request, ask_all
from socratiq.pairs.checks import Job, clean_question, flaw, messages
from socratiq.pairs.writers import LocalWriter, OpenAIWriter
from socratiq.run.errors import UserError

KEY = "sk-test-0123456789abcdef"
CONTEXT = "My neighbour drives everywhere, and since the tram came fewer people do. Cars are a habit, not a need."
CHOSEN = "What do you mean by a habit?"


@pytest.fixture(autouse=True)
def quick_and_direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def job(context: str = CONTEXT, other_types=("Analogy", "Assumptions", "Fear appeal")) -> Job:
    types = {"Clarity": (0.9, 0.9)} | dict.fromkeys(other_types, (0.1, 0.1))
    return Job(Row(context, CHOSEN, "Clarity", "rows.csv row 1"), types)


def writer(server: FaultServer, **options) -> OpenAIWriter:
    return OpenAIWriter("some-model", server.url, **{"timeout": 0.4, "max_retries": 3, **options})


def ask(server: FaultServer, **options) -> Answer:
    asking = writer(server, **options)
    return asking.answers([Request("r", 1, asking.body(job()))])[0]


def requests(number: int) -> list[Request]:
    return [request(f"r{n}", text=f"question {n}") for n in range(number)]


def request(row="r1", attempt=1, text="x") -> Request:
    return Request(row, attempt, {"messages": [{"role": "user", "content": text}]})


# --- transport ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [("429", "429: slow down"), ("drop", "connection"), ("slow", "--timeout"), ("html", "not a completion: <html>"),
     ("200 busy", "provider is busy"), ("200 error", "provider went away")],
)  # fmt: skip
def test_a_request_is_given_up_after_the_last_retry(fault, says):
    with FaultServer([fault] * 9) as server:
        with pytest.raises(NoAnswer, match=says) as failure:
            ask(server, max_retries=2)
        assert not isinstance(failure.value, Refused) and len(server.requests) == 3


# --- when going on is useless -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("401", "OPENAI_API_KEY is missing or was refused"),
        ("402", "quota of this account is used up"),
        ("quota", "quota of this account is used up .*exceeded your current quota"),
        ("200 no credit", "used up .*add credit first"),
        ("403", "may not do that"),
        ("404", "no model 'some-model', or --base-url is wrong"),
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


def test_a_redirect_is_not_followed():
    with FaultServer() as other, FaultServer(["redirect"], target=other.url.removesuffix("/v1")) as server:
        with pytest.raises(UserError, match=f"redirects to {other.url}") as failure:
            ask(server)
        assert other.requests == []  # neither key nor text
        assert KEY not in str(failure.value)


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-schlüssel", "sk a"])
def test_a_key_no_header_can_carry_is_refused_without_being_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as failure:
        OpenAIWriter("m", "http://127.0.0.1:1/v1")
    assert key not in str(failure.value)


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://host/v1", "http://"])
def test_a_malformed_address(address):
    with pytest.raises(UserError, match="--base-url"):
        OpenAIWriter("m", address)


def test_passwords_in_the_address_are_not_shown():
    assert "secret" not in OpenAIWriter("m", "https://user:secret@host/v1").address


def test_scrub_leaves_no_key_and_no_control_characters():
    scrub = OpenAIWriter("m", "http://127.0.0.1:1/v1").scrub
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
        ("cut off", "length", "What would"),
        ("parts", "stop", "Why is that so?"),
    ],
)
def test_an_answer_is_taken_as_it_is(fault, finish, text):
    with FaultServer([fault]) as server:
        answer = ask(server)
        assert (answer.finish, answer.text) == (finish, text)
        assert len(server.requests) == 1


def test_half_a_surrogate_pair_is_left_out():
    """JSON may hold it, as an escape; no file can."""
    with FaultServer(answer=lambda body: "Why so\ud83d then?") as server:
        assert ask(server).text == "Why so then?"


def test_content_that_is_no_text_is_no_answer():
    with FaultServer(["odd content"]) as server, pytest.raises(NoAnswer, match="not a completion"):
        ask(server)


def test_missing_token_counts_are_guessed():
    with FaultServer(["no usage"]) as server:
        answer = ask(server)
        assert answer.prompt_tokens > 50 and answer.completion_tokens > 3


def test_without_a_key_none_is_sent_and_the_temperature_is_left_to_the_server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with FaultServer() as server:
        ask(server)
    (sent,) = server.requests
    assert sent.path == "/v1/chat/completions" and sent.body.keys() == {"messages", "model", "max_tokens"}
    assert sent.body["model"] == "some-model" and KEY not in str(sent.headers)


def test_the_other_name_of_the_limit_is_tried_once_and_remembered():
    with FaultServer(["max_tokens"]) as server:
        asking = writer(server, max_tokens=77)
        for _ in range(2):
            assert asking.answers([Request("r", 1, asking.body(job()))])[0].text
        limits = [(seen.body.get("max_tokens"), seen.body.get("max_completion_tokens")) for seen in server.requests]
        assert limits == [(77, None), (None, 77), (None, 77)]
    with FaultServer(["max_tokens", "400"]) as server, pytest.raises(Refused, match="bad parameter"):
        ask(server)


# --- asking for many --------------------------------------------------------------------------------------------------


def test_as_many_requests_are_under_way_as_concurrency_says(tmp_path):
    log, under_way = AnswerLog(tmp_path / "a.jsonl", "m"), []

    def count():
        time.sleep(0.3)  # for one too many to come
        under_way.append(len(server.requests) - len(log.answers))

    all_are_there = threading.Barrier(64, count, timeout=20)

    def patient(body):  # no answer comes before 64 questions have
        all_are_there.wait()
        return good_question(body)

    with FaultServer(answer=patient) as server:
        assert ask_all(writer(server, concurrency=64, timeout=30), requests(128), log, "") == {}
    assert under_way == [64, 64] and len(log.answers) == 128


def test_max_usd_stops_at_the_limit(tmp_path):
    """What was under way when the limit was reached comes on top, at most one request a thread."""
    with FaultServer() as server:
        log = AnswerLog(tmp_path / "a.jsonl", "m", max_usd=0.002, prices=(1.0, 10.0))
        unanswered = ask_all(writer(server, concurrency=4, timeout=5), requests(200), log, "")
        assert set(unanswered.values()) == {"not asked: --max-usd 0.002"}
        dearest = max((a.prompt_tokens + 10 * a.completion_tokens) / 1e6 for a in log.answers.values())
        assert 0.002 <= log.usd <= 0.002 + 4 * dearest
        assert log.usd == pytest.approx((log.prompt_tokens + 10 * log.completion_tokens) / 1e6)


def test_a_request_the_server_refuses_costs_only_its_row(tmp_path):
    with FaultServer(["ok", "400 detail", "400 content filter", *["too long"] * 5]) as server:
        log = AnswerLog(tmp_path / "a.jsonl", "m")
        unanswered = ask_all(writer(server, concurrency=1), requests(8), log, "")
        assert list(unanswered) == [f"r{number}" for number in range(1, 8)] and len(server.requests) == 8
        said = ["""{"detail": "Server is pinned to 'a'; requested 'b'."}""", "filtered", *["too many tokens"] * 5]
        assert list(unanswered.values()) == [f"no answer: the server answered 400: {reason}" for reason in said]
        assert ask_all(writer(server), requests(8), log, "") == {} and len(server.requests) == 8 + 7


@pytest.mark.parametrize(("fault", "says"), [("503", "503: overloaded"), ("400", "bad"), ("wordless", "--api-max-tok")])
def test_a_server_of_no_use_ends_the_run(tmp_path, fault, says):
    """Down, or refusing everything, or thinking until the limit: after five in a row, not after all."""
    with FaultServer([fault] * 99) as server:
        log = AnswerLog(tmp_path / "a.jsonl", "m")
        with pytest.raises(UserError, match=f"5 requests in a row.*{says}"):
            ask_all(writer(server, concurrency=1, max_retries=0), requests(50), log, "")
        assert len(server.requests) == 5


def test_a_fatal_error_waits_for_the_requests_under_way(tmp_path):
    asked = []

    def answers(requests):
        asked.append(requests)
        if requests[0].row == "r2":
            raise UserError("the key was refused")
        time.sleep(0.1)
        return [Answer("Why?")]

    log = AnswerLog(tmp_path / "a.jsonl", "m")
    with pytest.raises(UserError, match="the key was refused"):
        ask_all(SimpleNamespace(group=1, slots=4, answers=answers), requests(50), log, "")
    assert len(log.path.read_text().splitlines()) == len(asked) - 1 < 8


def test_a_group_of_which_a_part_is_lost_is_asked_for_as_a_whole_and_keeps_the_rest(tmp_path):
    def asked() -> list[str]:
        rows, log = [], AnswerLog(tmp_path / "a.jsonl", "m")

        def answers(requests):
            rows.extend(request.row for request in requests)
            return [Answer(f"Why {request.row}?") for request in requests]

        ask_all(SimpleNamespace(group=4, slots=1, answers=answers), requests(8), log, "")
        log.file.close()
        return rows

    assert len(asked()) == 8
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(b"".join(whole.splitlines(True)[:6]))
    assert asked() == ["r4", "r5", "r6", "r7"] and (tmp_path / "a.jsonl").read_bytes() == whole


# --- answers on disk --------------------------------------------------------------------------------------------------


def kept(path, requests=(), answers=(), model="m") -> AnswerLog:
    """The log after these answers were added; closed again, it still says what it has."""
    log = AnswerLog(path, model)
    log.add(list(requests), list(answers))
    log.file.close()
    return log


def test_the_log_gives_back_what_it_was_given(tmp_path):
    path = tmp_path / "sub" / "pairs.answers.jsonl"
    kept(path, [request(), request(attempt=2)], [Answer("Why é?", "stop", 5, 2), Answer("", "refusal")])
    kept(path, [request()], [Answer("another", "stop", 1, 1)])  # the answer that was there stays
    again = kept(path)
    assert again.get(request()) == Answer("Why é?", "stop", 5, 2)
    assert again.get(request(attempt=2)).finish == "refusal"
    assert again.requests == 2 == len(path.read_text(encoding="utf-8").splitlines())
    assert again.prompt_tokens == 5 and again.completion_tokens == 2
    for other in (request(row="r2"), request(attempt=3), request(text="y")):
        assert again.get(other) is None
    other_model = kept(path, model="n")
    assert other_model.get(request()) is None and other_model.requests == 0


def test_every_cut_of_the_log_is_repaired(tmp_path):
    path = tmp_path / "a.jsonl"
    answers = [Answer(f"Öde {n}?", "stop", n, n) for n in (1, 2, 3)]
    kept(path, [request(attempt=n) for n in (1, 2, 3)], answers)
    whole = path.read_bytes()
    for cut in range(whole.rstrip(b"\n").rfind(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert len(kept(path).answers) == 2
        kept(path, [request(attempt=3)], answers[2:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("content", ['{"row": 1}\n', "nonsense\n{}\n", "[1]\n"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl line 1"):
        AnswerLog(tmp_path / "a.jsonl", "m")


def test_one_run_at_a_time(tmp_path):
    """A killed one gives the log up: test_kills in tests/test_make_pairs.py."""
    log = AnswerLog(tmp_path / "a.jsonl", "m")
    code = f"from socratiq.pairs.answers import AnswerLog; AnswerLog({str(log.path)!r}, 'm')"
    root = Path(__file__).parent.parent
    another = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "a.jsonl: another process writes there" in another().stderr
    log.file.close()
    assert another().stderr == ""


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_request_names_both_types_and_shows_earlier_attempts():
    again = job()
    before = again.asked_type()
    text = messages(again)[-1]["content"]
    assert CONTEXT in text and f'of the type "{before}"' in text and 'not be a question of the type "Clarity"' in text
    assert "about 7 words" in text and "earlier" not in text
    again.attempts.append({"question": "What is meant?", "flaw": "still of the unwanted type"})
    again.attempts.append({"question": "", "flaw": "refused to answer"})
    text = messages(again)[-1]["content"]
    assert "- What is meant? (still of the unwanted type)" in text and "refused" not in text


def test_attempts_ask_for_all_other_types_in_turn():
    again, asked = job(), set()
    for _ in range(3):
        asked.add(again.asked_type())
        again.attempts.append({"question": "", "flaw": "empty"})
    assert asked == {"Analogy", "Assumptions", "Fear appeal"}
    assert job(other_types=()).asked_type() not in ("", "Clarity")  # from the table, where the data has one type


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
        ("<think>Why? Because.</think>\nWhy is that so?", "Why is that so?"),
        ("Why? I wonder.</think>\nWhy is that so?", "Why is that so?"),
        ("<think>never ends", ""),
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
        ("电车为什么会这样改变人们的习惯？", ""),
        ("هل كل من يملك سيارة يستعملها كل يوم؟", ""),
        ("为什么？怎么会这样？", "more than one question"),
    ],
)
def test_flaw(question, wrong):
    assert flaw(question, CONTEXT, CHOSEN) == wrong


# --- the local writer -------------------------------------------------------------------------------------------------


def test_local_writer_samples_the_same_again_and_by_its_seed():
    from socratiq.models import load_policy, load_tokenizer

    policy, tokenizer = load_policy("tiny", "cpu", "float32", trainable=False), load_tokenizer("tiny")

    def sampled(seed=0):
        settings = {"seed": seed, "max_prompt_tokens": 512, "max_new_tokens": 6}
        local = LocalWriter(policy, tokenizer, "tiny", 16, settings)
        return local.answers([Request(f"{n:016x}", 1, local.body(job())) for n in range(3)])

    first = sampled()
    assert first == sampled() != sampled(seed=1)
    assert len({answer.text for answer in first}) == 3
    assert all(answer.prompt_tokens > 20 and 0 < answer.completion_tokens <= 6 for answer in first)
