"""Bad input, one row of a table each: what is put in, and the one line that comes out, with exit status 2.

Lines are compared whole; only what another library says, or another row of the table holds, is left open (`...`).
"""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from socratiq.data import load_pairs, load_rows
from socratiq.run import errors

GOOD = b"context,question,type\nSome text.,Why?,clarity\n"


def message_of(capsys, function, quiet=True) -> str:
    """Run `function` as a script's main; the one line that it leaves on stderr, without "error: "."""
    with pytest.raises(SystemExit) as stop:
        errors.main(function)
    out, err = capsys.readouterr()
    line = err.splitlines()[-1] if err else ""
    assert stop.value.code == 2
    assert out == "" or not quiet
    assert err == line + "\n" and line.startswith("error: "), err
    return line.removeprefix("error: ")


def assert_same(found: str, expected: str) -> None:
    pattern = ".+".join(re.escape(part) for part in expected.split("..."))
    assert re.fullmatch(pattern, found), f"\nfound:    {found}\nexpected: {expected}"


def csv_row(line: bytes) -> bytes:
    return GOOD + line + b"\n"


def json_line(**changed) -> bytes:
    row = {"context": "Some text.", "question": "Why?", "type": "clarity"}
    return (json.dumps(row) + "\n" + json.dumps({**row, **changed}) + "\n").encode()


NOTHING = ": holds no rows; a row needs a context, a question and a type"
KINDS = ".csv, .tsv, .json, .jsonl, .ndjson, .parquet, .arrow"
UNREADABLE = "; correct the file or its name"
COLUMNS = "; name one of them context or thought or intervention"
MANY = ": cannot be read (row {}, around line {}: more or fewer cells than the 3 columns"
CELLS = "; put a cell that holds ',' or quotes in double quotes, and write its own quotes twice)" + UNREADABLE
EMPTY = "is empty; fill it in or remove the row"
NAME = "; expected a name of at most 80 characters such as 'Cause to effect'"

FILES = [  # each message begins with the path of the file
    # ---- files that are not what they are called
    ("rows.csv", b"", NOTHING),
    ("rows.jsonl", b"", NOTHING),
    ("rows.csv", b"\n\n", NOTHING),
    ("rows.csv", b"context,question,type\n", NOTHING),
    ("rows.jsonl", b" \n", NOTHING),
    ("rows.json", b"[]", NOTHING),
    ("rows.txt", GOOD, f": unknown kind of file '.txt'; expected {KINDS}"),
    ("rows", GOOD, f": unknown kind of file '(no suffix)'; expected {KINDS}"),
    ("rows.csv", b"<!DOCTYPE html>\n<p>", ": no column for the context; the columns are '<!doctype html>'" + COLUMNS),
    ("rows.csv", GOOD.decode().encode("utf-16"), ": cannot be read (byte 0xff in line 1 is not UTF-8; save ..."),
    ("rows.csv", csv_row(b"A caf\xe9.,Why?,clarity"), ": cannot be read (byte 0xe9 in line 3 is not UTF-8; save ..."),
    ("rows.jsonl", json_line() + b'{"context": "\xff"}', ": cannot be read (byte 0xff in line 3 is not UTF-8; ..."),
    ("rows.json", b'[{"context":\n"caf\xe9"}]', ": cannot be read (byte 0xe9 in line 2 is not UTF-8; save it as ..."),
    ("rows.parquet", GOOD, ": cannot be read (...)" + UNREADABLE),
    ("rows.arrow", GOOD, ": cannot be read (...)" + UNREADABLE),
    # ---- columns
    ("rows.csv", b"text,ask\na,b\n", ": no column for the context; the columns are 'ask', 'text'" + COLUMNS),
    ("rows.csv", b"I think so.,Why?,clarity\nOr not.,Why?,clarity\n", ": no column for the context; ..."),
    (
        "rows.csv",
        b"context,ask,type\na,b,c\n",
        ": no column for the question; the columns are 'ask', 'context', 'type'; name one of them question or cq",
    ),
    (
        "rows.csv",
        b"thought,Question,kind\na,b,c\n",
        ": no column for the type; the columns are 'kind', 'question', 'thought'; "
        "name one of them type or label or schema",
    ),
    ("rows.csv", b"input,question\na: b,c\n", ": no column for the context; ..." + COLUMNS),
    ("rows.jsonl", json_line() + b'{"context": "a", "type": "b"}\n', f" row 3: the question {EMPTY}"),
    ("rows.json", b"[{}]", ": no column for the context; the columns are none at all" + COLUMNS),
    ("rows.json", b'{"rows": "none"}', ": no column for the context; the columns are 'rows'" + COLUMNS),
    # ---- csv
    ("rows.csv", csv_row(b"Well, yes.,Why?,clarity"), MANY.format(2, 3) + CELLS),
    # all rows too long by one: readers that guess shift them
    ("rows.csv", b"context,question,type\nWell, yes.,Why?,clarity\n", MANY.format(1, 2) + CELLS),
    ("rows.csv", csv_row(b"Some text.,Why?"), MANY.format(2, 3) + CELLS),
    (
        "rows.csv",
        csv_row(b'"Some\ntext.",a,b\n"No end,a,b\nMore.,a,b'),
        ": cannot be read (row 3, around line 4: ..." + CELLS,
    ),
    ("rows.csv", csv_row(b'"He" said.,Why?,clarity'), ": cannot be read (row 2, around line 2: ..." + CELLS),
    ("rows.tsv", b"context\tquestion\ttype\nSome text.\tWhy?\n", MANY.format(1, 2) + "; ..."),
    # ---- fields
    ("rows.csv", csv_row(b",Why?,clarity"), f" row 2: the context {EMPTY}"),
    ("rows.csv", csv_row(b'Some text.,"  \n ",clarity'), f" row 2: the question {EMPTY}"),
    ("rows.csv", csv_row(b"Some text.,Why?,"), f" row 2: the type {EMPTY}"),
    # a zero-width space and a control character
    ("rows.csv", b"thought,question,label\n\xe2\x80\x8b\x01,Why?,b\n", f" row 1: the thought {EMPTY}"),
    (
        "rows.csv",
        csv_row(b"Some text.,Why?," + b"This is a text and no type. " * 9),
        " row 2: the type is 'This is a text and no type. This is a text and no type. T...'" + NAME,
    ),
    ("rows.csv", csv_row(b"Some text.,Why?,-"), " row 2: the type is '-'" + NAME),
    ("rows.csv", b"input,target\na: A text.,Why?\nWithout a type.,Why?\n", f" row 2: the context {EMPTY}"),
    ("rows.csv", b"input,target\nclarity: ,Why?\n", f" row 1: the context {EMPTY}"),
    ("rows.csv", b"input,target\nclarity: A text.,\n", f" row 1: the question {EMPTY}"),
    (
        "rows.csv",
        b"context,question,preference\na,b,good\n",
        " row 1: the preference is 'good'; write chosen, rejected or nothing",
    ),
    ("rows.jsonl", json_line(question=3), " row 2: the question is 3 (int); write it as text"),
    ("rows.jsonl", json_line(question=True), " row 2: the question is True (bool); write it as text"),
    ("rows.jsonl", json_line(context=["a", "b"]), " row 2: the context is ['a', 'b'] (list); write it as text"),
    ("rows.jsonl", json_line(type={"name": "x"}), " row 2: the type is {'name': 'x'} (dict); write it as text"),
    ("rows.jsonl", json_line(type=1), " row 2: the type is 1 (int); write it as text"),
    ("rows.jsonl", json_line(context=None), f" row 2: the context {EMPTY}"),
    ("rows.jsonl", json_line(context=float("nan")), " row 2: the context is nan (float); write it as text"),
    ("rows.jsonl", json_line(question=""), f" row 2: the question {EMPTY}"),
    ("rows.jsonl", json_line(question="\u202e\u200b"), f" row 2: the question {EMPTY}"),
    # ---- json
    (
        "rows.jsonl",
        json_line() + b'{"context": "Some te',
        ": cannot be read (Unterminated string starting at: line 3 ...",
    ),
    ("rows.jsonl", json_line() + b"oops\n", ": cannot be read (Expecting value: line 3 column 1 (...))" + UNREADABLE),
    ("rows.jsonl", b"{'context': 'a'}\n", ": cannot be read (...: line 1 column 2 (char 1))" + UNREADABLE),
    ("rows.jsonl", json_line() + b'["a", "b"]\n', ' row 3: expected an object of named fields, found ["a", "b"]'),
    ("rows.json", b'[{"context": "a"},\n{]', ": cannot be read (...: line 2 column 2 (char 20))" + UNREADABLE),
    ("rows.json", b'[1, {"context": "a"}]', " row 1: expected an object of named fields, found 1"),
    ("rows.json", b'"a text"', ' row 1: expected an object of named fields, found "a text"'),
    ("rows.json", b"[" * 100_000, ": cannot be read (maximum recursion depth exceeded...)" + UNREADABLE),
    ("rows.json", b"[" + b"9" * 5000 + b"]", ": cannot be read (...)" + UNREADABLE),
    (
        "rows.json",
        b'{"context": ["a", "b"], "question": ["c", "d"], "type": ["e", "f"]}',
        " row 1: the type is ['e', 'f'] (list); write it as text",
    ),
    # ---- the shared task's format
    ("rows.json", b'{"A": {"intervention": "a", "cqs": ["b"]}}', " row 1: expected an object of named fields, ..."),
    ("rows.json", b'{"A": {"intervention": "a", "cqs": [{"label": "Useful"}]}}', ": no column for the question; ..."),
    ("rows.json", b'{"A": {"cqs": [{"cq": "b", "label": "Useful"}]}}', ": no column for the context; ..."),
]


@pytest.mark.parametrize("name, content, expected", FILES)
def test_bad_files(tmp_path, capsys, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    assert_same(message_of(capsys, lambda: load_rows(str(path))), str(path) + expected)


TABLES = [
    ({"context": ["a", None], "question": ["b", "c"], "type": ["d", "e"]}, f" row 2: the context {EMPTY}"),
    (
        {"context": ["a", "b"], "question": [1.5, float("nan")], "type": ["d", "e"]},
        " row 1: the question is 1.5 (float); write it as text",
    ),
    ({"text": ["a"]}, ": no column for the context; the columns are 'text'" + COLUMNS),
    (
        {"context": ["a"], "text": ["a"], "type": ["c"]},
        ": no column for the question; ...; name one of them question or cq",
    ),
    ({"context": [], "question": [], "type": []}, NOTHING),
]


@pytest.mark.parametrize("columns, expected", TABLES)
def test_bad_parquet(tmp_path, capsys, columns, expected):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert_same(message_of(capsys, lambda: load_rows(str(path))), str(path) + expected)


HOW = "no such file or folder; --data takes sample, socratiq, a file, a folder, an address or a Hub id"
SOURCES = [
    ("gone.csv", f"gone.csv: {HOW}"),
    ("sampel", f"sampel: {HOW}"),
    ("folder/gone", f"folder/gone: {HOW}"),
    ("/gone/rows.csv", f"/gone/rows.csv: {HOW}"),
    ("", f"'': {HOW}"),
    ("x" * 5000, f"xxx...xxx: {HOW}"),
    ("folder", f"folder: no data files in this folder; expected files ending in {KINDS}"),
    ("full", "full/bad.csv: no column for the context; the columns are 'a', 'b'" + COLUMNS),
    ("http://127.0.0.1:9/rows.csv", "http://127.0.0.1:9/rows.csv: cannot be read (...)" + UNREADABLE),
    ("https://[broken/rows.csv", "https://[broken/rows.csv: cannot be read (...)" + UNREADABLE),
    ("http://me:pw@host/a.csv", "http://me:pw@host/a.csv: cannot be read (nonnumeric port: ...)" + UNREADABLE),
]


@pytest.mark.parametrize("source, expected", SOURCES)
def test_bad_sources(tmp_path, monkeypatch, capsys, source, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "bad.csv").write_text("a,b\n1,2\n")
    assert_same(message_of(capsys, lambda: load_rows(source)), expected)


PAIR = {"prompt": "Ask.", "chosen": "Why?", "rejected": "What?"}
PAIRS = [
    (b"", ": no pairs in the file; run make_pairs.py"),
    (b"\n", ": no pairs in the file; run make_pairs.py"),
    (b"prompt,chosen,rejected\n", ": cannot be read (Expecting value: line 1 column 1 (char 0))" + UNREADABLE),
    (b"[1]\n", " row 1: expected an object of named fields, found [1]"),
    (b'\n{"prompt": "caf\xe9"}\n', ": cannot be read (byte 0xe9 in line 2 is not UTF-8; ...)" + UNREADABLE),
    (
        {"question": "Why?", "good": "a", "bad": "b"},
        ": no column for the prompt; the columns are 'bad', 'good', 'question'; name one of them prompt",
    ),
    ({**PAIR, "chosen": " \n"}, f" row 1: the chosen {EMPTY}"),
    ({**PAIR, "rejected": None}, f" row 1: the rejected {EMPTY}"),
    ({**PAIR, "rejected": 3}, " row 1: the rejected is 3 (int); write it as text"),
    ({**PAIR, "prompt": ["Ask."]}, " row 1: the prompt is ['Ask.'] (list); write it as text"),
    ({**PAIR, "chosen": [{"role": "a"}]}, " row 1: the chosen is [{'role': 'a'}] (list); write it as text"),
]


@pytest.mark.parametrize("content, expected", PAIRS)
def test_bad_pairs(tmp_path, capsys, content, expected):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert_same(message_of(capsys, lambda: load_pairs(str(path))), str(path) + expected)


def test_no_pairs(capsys):
    expected = "gone.jsonl: no such file or folder; make_pairs.py writes the file that --pairs takes"
    assert_same(message_of(capsys, lambda: load_pairs("gone.jsonl")), expected)


# ---------------------------------------------------------------------------------------------------- the four scripts

SFT = ["train_sft", "--model", "tiny", "--data", "two.jsonl", "--steps", "1"]
PAIRING = ["make_pairs", "--policy", "tiny", "--writer", "local", "--data", "two.jsonl", "--scorer", "scorer.new"]
PAIRING += ["--scorer-model", "none"]
DPO = ["train_dpo", "--model", "tiny", "--pairs", "pairs.jsonl", "--steps", "1"]
PPO = [
    "train_ppo",
    "--model",
    "tiny",
    "--data",
    "two.jsonl",
    "--steps",
    "1",
    "--scorer",
    "scorer",
    "--allow-bare-scorer",
]

ARGUMENTS = [  # before anything slow is imported
    (
        ["train_sft", "--batch-size", "-3"],
        "argument --batch-size: must be at least 1, not -3 (see train_sft.py --help)",
    ),
    (["train_sft", "--batch-size", "x"], "argument --batch-size: 'x' is not a whole number (see train_sft.py --help)"),
    (["train_sft", "--steps", "0"], "argument --steps: must be at least 1, not 0 (see train_sft.py --help)"),
    (["train_sft", "--epochs", "1.5"], "argument --epochs: '1.5' is not a whole number (see train_sft.py --help)"),
    (["train_sft", "--lr", "0"], "argument --lr: must be above 0, not 0 (see train_sft.py --help)"),
    (["train_sft", "--lr", "nan"], "argument --lr: must be above 0, not nan (see train_sft.py --help)"),
    (["train_sft", "--held-out", "1"], "argument --held-out: must be below 1, not 1 (see train_sft.py --help)"),
    (["train_sft", "--lora-rank", "-1"], "argument --lora-rank: must be at least 0, not -1 (see train_sft.py --help)"),
    (["train_sft", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (...) (see train_sft.py --help)"),
    (["train_sft", "--device", "tpu"], "argument --device: invalid choice: 'tpu' (...) (see train_sft.py --help)"),
    (["train_sft", "--batchsize", "4"], "unrecognized arguments: --batchsize 4 (see train_sft.py --help)"),
    (["train_sft", "--batch", "4"], "unrecognized arguments: --batch 4 (see train_sft.py --help)"),
    (["train_sft", "--model"], "argument --model: expected one argument (see train_sft.py --help)"),
    (["train_dpo", "--beta", "0"], "argument --beta: must be above 0, not 0 (see train_dpo.py --help)"),
    (["train_dpo", "--beta", "inf"], "argument --beta: must be finite, not inf (see train_dpo.py --help)"),
    (["train_dpo", "--label-smoothing", "0.5"], "argument --label-smoothing: must be below 0.5, not 0.5 (...)"),
    (
        ["train_dpo", "--label-smoothing", "0.1", "--loss", "ipo"],
        "--label-smoothing: only the sigmoid loss knows it;...",
    ),
    (
        ["train_ppo", "--kl-target", "1", "--kl-horizon", "10"],
        "--kl-horizon: must be above a fifth of an iteration's samples,...",
    ),
    (["train_dpo", "--loss", "kto"], "argument --loss: invalid choice: 'kto' (...) (see train_dpo.py --help)"),
    (["train_ppo", "--temperature", "0"], "argument --temperature: must be above 0, not 0 (see train_ppo.py --help)"),
    (["train_ppo", "--samples-per-prompt", "0"], "argument --samples-per-prompt: must be at least 1, not 0 (...)"),
    (["train_ppo", "--gamma", "1.1"], "argument --gamma: must be at most 1, not 1.1 (see train_ppo.py --help)"),
    (["train_ppo", "--kl-coef", "-1"], "argument --kl-coef: must be at least 0, not -1 (see train_ppo.py --help)"),
    (["make_pairs", "--chosen-min", "2"], "argument --chosen-min: must be at most 1, not 2 (see make_pairs.py --help)"),
    (["make_pairs", "--rejected-max", "0.9"], "--rejected-max 0.9: must not be above --chosen-min ..."),
    (["make_pairs", "--shard", "5/4"], "argument --shard: '5/4' is not like 1/4, the first of four parts (...)"),
    (["make_pairs", "--max-usd", "1"], "--max-usd: give the prices too, --usd-per-mtok IN OUT (...)"),
]
MODELS = "name smollm2, tiny, a folder that a stage wrote, or a Hub id owner/name"
RUNS = [
    (["make_pairs", "--writer", "openai"], "set OPENAI_API_KEY, or give --base-url of a server that wants no key"),
    # ---- data
    ([*SFT, "--data", "gone.csv"], f"gone.csv: {HOW}"),
    ([*SFT, "--data", "others.jsonl"], "others.jsonl: no rows to learn from; every row is labelled 'others'"),
    ([*SFT, "--data", "bad.csv"], "bad.csv row 1: the question is empty; fill it in or remove the row"),
    (
        [*SFT, "--max-prompt-tokens", "5"],
        "--max-prompt-tokens 5: the template alone takes ... tokens; allow more than that",
    ),
    ([*DPO, "--pairs", "gone.jsonl"], "gone.jsonl: no such file or folder; make_pairs.py writes the file ..."),
    (
        [*DPO, "--pairs", "two.jsonl"],
        "two.jsonl: no column for the prompt; the columns are 'context', 'question', 'type'; name one of them prompt",
    ),
    (
        [*DPO, "--pairs", "long.jsonl"],
        "long.jsonl row 1: the prompt has ... tokens; raise --max-prompt-tokens or remove the line",
    ),
    ([*PPO, "--data", "gone.csv"], f"gone.csv: {HOW}"),
    ([*PAIRING, "--data", "gone.csv"], f"gone.csv: {HOW}"),
    (
        [*PAIRING, "--data", "others.jsonl"],
        "too few rows to fit a scorer: it needs questions of a type, about at least a handful of texts",
    ),
    (
        [*PAIRING, "--data", "one.jsonl"],
        "too few rows to fit a scorer: it needs questions of a type, about at least a handful of texts",
    ),
    # ---- models
    ([*SFT, "--model", "./gone"], f"--model ./gone: no such folder; {MODELS}"),
    ([*DPO, "--model", "runs/sft"], f"--model runs/sft: no such folder; {MODELS}"),
    ([*SFT, "--model", "smolm2"], f"--model smolm2: no such folder; {MODELS}"),
    ([*SFT, "--model", ""], f"--model : no such folder; {MODELS}"),
    ([*SFT, "--model", "nobody/nothing"], "--model nobody/nothing: no tokenizer that can be read (...); name ..."),
    (
        [*SFT, "--model", "folder"],
        "--model folder: the folder holds no config.json, so it is no model; run the stage before",
    ),
    (
        [*SFT, "--model", "pickled"],
        "--model pickled: no *.safetensors in the folder (pickled weights are never loaded)",
    ),
    ([*SFT, "--model", "wordless"], "--model wordless: no tokenizer that can be read (...); name smollm2, tiny, ..."),
    ([*SFT, "--model", "garbled"], "--model garbled: no tokenizer that can be read (...); name smollm2, tiny, ..."),
    ([*SFT, "--model", "cut"], "--model cut: no model that can be read (...)"),
    ([*SFT, "--model", "holed"], "--model holed: 1 weights are missing, such as ...; write it anew"),
    (
        [*SFT, "--model", "other"],
        "--model other: GPT2LMHeadModel has no .model.layers and .lm_head; use a Llama-like model",
    ),
    ([*SFT, "--model", "remote"], "--model remote: no tokenizer that can be read (...custom code...); name ..."),
    (
        [*SFT, "--load-in-4bit", "--lora-rank", "0"],
        "--load-in-4bit: weights of 4 bits cannot be trained; use adapters (--lora-rank above 0)",
    ),
    ([*DPO, "--load-in-4bit"], "--load-in-4bit needs bitsandbytes: pip install bitsandbytes"),
    ([*PPO, "--lora-rank", "9999"], "--lora-rank 9999: above the model's width of 64; 8 to 64 are usual"),
    (
        [*PAIRING, "--policy", "pickled"],
        "--policy pickled: no *.safetensors in the folder (pickled weights are never loaded)...",
    ),
    (
        [*PAIRING, "--policy", "runs/sft"],
        f"--policy runs/sft: no such folder; {MODELS} (train_sft.py writes runs/sft)",
    ),
    # ---- scorers and rewards
    (
        [*PPO, "--scorer", "gone"],
        "gone: no scorer that can be read (...); fit one with python -m socratiq.scorer --out gone",
    ),
    ([*PPO, "--scorer", "garbled"], "garbled: no scorer that can be read (...); fit one with ..."),
    (
        [*PPO, "--held-out", "0.5"],
        "--scorer scorer was fitted on 1 of the 1 held-out texts; delete it and make_pairs.py will fit it anew, or fit "
        "it by python -m socratiq.scorer with the same --data and --held-out",
    ),
    (
        [*PPO, "--reward", "my_reward:reward", "--data", "others.jsonl"],
        "others.jsonl: no row names a type to ask for; label some, or leave out --reward",
    ),
    ([*PPO, "--reward", "my_reward"], "--reward my_reward: ...; expected MODULE:FUNCTION, such as my_reward:reward"),
    (
        [*PPO, "--reward", "no_such_module:reward"],
        "--reward no_such_module:reward: No module named 'no_such_module'; ...",
    ),
    ([*PPO, "--reward", "json:gone"], "--reward json:gone: module 'json' has no attribute 'gone'; ..."),
    ([*PPO, "--reward", "json:__name__"], "--reward json:__name__: __name__ is no function"),
    # ---- places
    ([*SFT, "--out", "folder"], "--out folder exists and is no run of train_sft.py; name another place"),
    ([*SFT, "--out", "file"], "--out file: file is not a folder that can be written; name another place"),
    (
        [*SFT, "--out", "file/below"],
        "--out file/below: ...file is not a folder that can be written; name another place",
    ),
    ([*SFT, "--out", "dpo"], "--out dpo exists and is no run of train_sft.py; name another place"),
    ([*SFT, "--out", "ppo"], "--out ppo exists and is no run of train_sft.py; name another place"),
    (
        [*SFT, "--out", "sft"],
        "sft was begun with --accumulate 9, now it is 1; use the old one, --restart to begin anew, or another --out",
    ),
    (
        [*PAIRING, "--out", "folder"],
        "--out folder: a folder, or not made here (no folder.dropped.jsonl beside it); choose another (...)",
    ),
    (
        [*PAIRING, "--out", "two.jsonl"],
        "--out two.jsonl: a folder, or not made here (no two.dropped.jsonl beside it); choose another (...)",
    ),
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with one of every bad thing that the table names, and the good things that it needs."""
    import torch
    from safetensors.torch import load_file, save_file

    from socratiq.models import resolve
    from socratiq.scorer.scorer import Scorer

    folder = tmp_path_factory.mktemp("workshop")
    rows = [{"context": f"Text {n}.", "question": f"Why {n}?", "type": "clarity"} for n in range(3)]

    def write(name, *records):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    write("two.jsonl", *rows[:2])
    write("one.jsonl", rows[0])
    write("others.jsonl", *({**row, "type": "others"} for row in rows))
    write("pairs.jsonl", PAIR, {**PAIR, "prompt": "Ask again."})
    write("long.jsonl", {**PAIR, "prompt": "word " * 2000})
    (folder / "bad.csv").write_text("context,question,type\nSome text.,,clarity\n")
    (folder / "file").write_text("precious")
    (folder / "folder").mkdir()
    (folder / "folder" / "thesis.txt").write_text("precious")
    Scorer.fit(load_rows(str(folder / "two.jsonl"))).save(folder / "scorer")
    for stage in ("sft", "dpo", "ppo"):
        (folder / stage).mkdir()
        (folder / stage / "train_args.json").write_text(json.dumps({"stage": stage, "accumulate": 9}))

    tiny = resolve("tiny")
    weights = load_file(f"{tiny}/model.safetensors")
    for name in ("pickled", "wordless", "garbled", "cut", "holed", "other", "remote"):
        shutil.copytree(tiny, folder / name)
    torch.save(weights, folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    for file in (folder / "wordless").glob("token*"):
        file.unlink()
    (folder / "garbled" / "config.json").write_text('{"model_type": "lla')
    cut = folder / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    missing = {name: weight for name, weight in weights.items() if "layers.0.mlp.up_proj" not in name}
    save_file(missing, folder / "holed" / "model.safetensors", {"format": "pt"})
    (folder / "other" / "config.json").write_text('{"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 1}')
    config = json.loads((folder / "remote" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "remote" / "config.json").write_text(json.dumps(config))
    (folder / "remote" / "code.py").write_text("raise SystemExit('remote code was run')")
    return folder


def run_script(monkeypatch, argv):
    """A script's main, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{argv[0]}.py", *argv[1:]])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    script = importlib.import_module(argv[0])
    return script.run if argv[0] == "make_pairs" else script.run_stage


@pytest.mark.parametrize("argv, expected", ARGUMENTS)
def test_bad_arguments(monkeypatch, capsys, argv, expected):
    assert_same(message_of(capsys, run_script(monkeypatch, argv)), expected)


@pytest.mark.parametrize("argv, expected", RUNS)
def test_bad_runs(workshop, monkeypatch, capsys, argv, expected):
    monkeypatch.chdir(workshop)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not installed, even where it is
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = contents(workshop)
    out = [] if "--out" in argv else ["--out", "out.jsonl" if argv[0] == "make_pairs" else "out"]
    try:
        assert_same(message_of(capsys, run_script(monkeypatch, argv + out), quiet=False), expected)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert contents(workshop) == before  # nothing half-written, nothing overwritten


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("script", ["train_sft", "make_pairs", "train_dpo", "train_ppo"])
def test_a_bad_argument_ends_a_real_process_at_once(script):
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, f"{script}.py", "--seed", "-1"], cwd=root, capture_output=True, text=True)
    expected = f"error: argument --seed: must be at least 0, not -1 (see {script}.py --help)\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", expected)


# ---------------------------------------------------------------------------------------------------------- the help


@pytest.mark.parametrize(
    "module",
    ["train_sft", "make_pairs", "train_dpo", "train_ppo", "socratiq.ask", "socratiq.evaluate", "socratiq.show"],
)
def test_the_help_names_units_and_one_default(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(module).parse_arguments()
    said = " ".join(capsys.readouterr().out.split())
    assert not re.search("--[a-z-]+ [A-Z]+_[A-Z_]+", said), "--held-out HELD_OUT tells nobody anything"
    assert "(default: True)" not in said and not re.search(r"default: [^()]*\) \(default", said)
