"""`ask` on the command line, with the tiny model and with made-up questions."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from socratiq import ask
from socratiq.run.errors import UserError

TEXT = "I think that dogs are good."
SAID = ["no question", "What do you mean by good dogs?", "Are dogs really like clouds?"]


@pytest.fixture
def typed(monkeypatch):
    """Standard input: not a terminal, with these bytes in it."""

    def put(content: bytes, terminal: bool = False):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: terminal))

    return put


@pytest.fixture
def command(inputs, capsys):
    """Runs `ask` with the tiny model; what it printed."""

    def run(*argv):
        ask.run([*argv, "--model", "tiny", "--scorer", str(inputs / "scorer"), "--max-new-tokens", "6", "--seed", "1"])
        return capsys.readouterr().out

    return run


def test_questions_are_ranked_by_the_reward(inputs):
    from socratiq.scorer.scorer import Scorer

    scorer = Scorer.load(inputs / "scorer")
    ranked = ask.rank(scorer, TEXT, "Clarity", SAID)
    assert ranked[0]["question"] == SAID[1] and ranked[0]["reads_as"] == "Clarity"
    assert [r["reward"] for r in ranked] == sorted((r["reward"] for r in ranked), reverse=True)
    expected = scorer.reward([TEXT] * 3, [record["question"] for record in ranked], ["Clarity"] * 3).tolist()
    assert [record["reward"] for record in ranked] == pytest.approx(expected, abs=1e-4)
    assert ask.rank(None, TEXT, "Clarity", SAID) == [{"question": question} for question in SAID]


def test_types_in_any_spelling():
    known = ["Analogy", "Clarity", "Reasons and evidence"]
    assert ask.choose_types(None, known) == known
    assert ask.choose_types(["clarification", "reasons_evidence", "CLARITY"], known) == known[1:]
    with pytest.raises(UserError, match="no such type Clairty; choose one of Analogy, Clarity, Reasons and evidence"):
        ask.choose_types(["Clairty"], known)


def test_the_best_of_every_type_or_all_of_one(command):
    assert [line for line in command(TEXT).splitlines() if not line.startswith("  ")] == ["Analogy", "Clarity"]
    assert len(command(TEXT).splitlines()) == len(command(TEXT, "--type", "Clarity", "--n", "3").splitlines()) == 4


def test_json_holds_all_that_was_drawn(command):
    found = json.loads(command(TEXT, "--json", "--n", "3", "--type", "clarity", "--type", "Clarity"))
    (of_type,) = found["types"]
    assert (found["context"], found["model"]) == (TEXT, "tiny")
    assert of_type["type"] == "Clarity" and len(of_type["questions"]) == 3
    assert set(of_type["questions"][0]) == {"question", "reward", "reads_as", "parts"}


def test_plain_asks_the_same_questions(command):
    assert command(TEXT, "--json", "--plain", "--dtype", "float32") == command(TEXT, "--json", "--dtype", "float32")


def test_a_question_comes_once(command):
    found = json.loads(command(TEXT, "--json", "--temperature", "0"))
    assert [len(of_type["questions"]) for of_type in found["types"]] == [1, 1]


def test_text_from_a_file_and_from_standard_input(command, tmp_path, typed):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode() + b"\r\n")
    typed(TEXT.encode())
    assert command("--file", str(file)) == command() == command(TEXT)


@pytest.mark.parametrize(
    ("content", "problem"), [(b" \n\t", "is empty"), (b"caf\xe9", "cannot be read as UTF-8 text .*position 3")]
)
def test_texts_that_cannot_be_read(command, tmp_path, typed, content, problem):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"text.txt.*{problem}"):
        command("--file", str(tmp_path / "text.txt"))
    typed(content)
    with pytest.raises(UserError, match=f"standard input.*{problem}"):
        command()


def test_a_missing_text_is_one_line(command, typed):
    typed(b"", terminal=True)
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        command("--file", "none.txt")
    with pytest.raises(UserError, match="no text: give one in quotes"):
        command()


def test_a_text_that_is_cut_is_warned_of(inputs, capsys):
    ask.run([TEXT * 200, "--model", "tiny", "--scorer", "none", "--n", "1", "--max-new-tokens", "2"])
    assert "longer than --max-prompt-tokens 512; its tail is not read" in capsys.readouterr().err


def test_the_last_finished_stage_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished model in runs"):
        ask.run([TEXT])
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    (tmp_path / "runs" / "sft" / "config.json").write_text("{}")
    assert ask.find_model(ask.parse_arguments([TEXT])) == ("runs/sft", "none")
    assert capsys.readouterr().err.count("warning:") == 2  # no ppo, no scorer
    (tmp_path / "runs" / "scorer").mkdir()
    assert ask.find_model(ask.parse_arguments([TEXT])) == ("runs/sft", "runs/scorer")
    assert ask.find_model(ask.parse_arguments([TEXT, "--model", "smollm2"])) == ("smollm2", "runs/scorer")
    assert ask.find_model(ask.parse_arguments([TEXT, "--scorer", "none"])) == ("runs/sft", "none")


def test_a_model_cannot_move_the_cursor():
    assert ask.line({"question": "a\x1b[2Jb\nc\x07 \u202ed"}, "Clarity") == "  a [2Jb c d"
    assert ask.line({"question": "\x07"}, "Clarity") == "  (nothing)"


def test_a_fault_stands_behind_its_question():
    good = {"question": "Why?", "reads_as": "Clarity", "parts": {"strength": 0.9, "form": 1.0}}
    far = good | {"parts": {"strength": 0.9, "form": ask.LOW - 0.1, "relatedness": 0.1, "probe": 0.01}}
    assert ask.line(good, "Clarity") == "  0.90  Why?"
    assert ask.line(far, "Clarity") == "  0.90  Why?  (not about the text, 0.10)"
    assert ask.line(far, "Analogy") == "  0.90  Why?  (reads as Clarity; not about the text, 0.10)"
