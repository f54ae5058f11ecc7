"""Bad input, one row of a table each: what is put in, and the one line that comes out, with exit status 2.

`{path}` in an expected line stands for the file. Lines are compared whole; only what another library says is left open
(`...`).
"""

import json
import re

import pytest

from socratiq import errors
from socratiq.data import load_pairs, load_rows

GOOD = b"context,question,type\nSome text.,Why?,clarity\n"


def message_of(capsys, function) -> str:
    """Run `function` as a script's main; the one line that it leaves on stderr, without "error: "."""
    with pytest.raises(SystemExit) as stop:
        errors.main(function)
    out, err = capsys.readouterr()
    line = err.splitlines()[-1] if err else ""
    assert stop.value.code == 2
    assert out == ""
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


FILES = [
    # ---- files that are not what they are called
    ("rows.csv", b"", "{path}: the file is empty; it must hold at least one row"),
    ("rows.jsonl", b"", "{path}: the file is empty; it must hold at least one row"),
    ("rows.csv", b"\n\n", "{path}: holds no rows; a row needs a context, a question and a type"),
    ("rows.csv", b"context,question,type\n", "{path}: holds no rows; a row needs a context, a question and a type"),
    ("rows.jsonl", b" \n", "{path}: holds no rows; a row needs a context, a question and a type"),
    ("rows.json", b"[]", "{path}: holds no rows; a row needs a context, a question and a type"),
    ("rows.json", b'{"data": []}', "{path}: holds no rows; a row needs a context, a question and a type"),
    (
        "rows.txt",
        GOOD,
        "{path}: unknown kind of file '.txt'; expected .csv, .tsv, .json, .jsonl, .ndjson, .parquet",
    ),
    (
        "rows",
        GOOD,
        "{path}: unknown kind of file '(no suffix)'; expected .csv, .tsv, .json, .jsonl, .ndjson, .parquet",
    ),
    ("rows.csv", b"<!DOCTYPE html>\n<p>", "{path}: the file is a web page, not data; give the address of the raw file"),
    ("rows.csv", GOOD.decode().encode("utf-16"), "{path}: the file is in UTF-16; save it as UTF-8"),
    (
        "rows.csv",
        csv_row(b"A caf\xe9.,Why?,clarity"),
        "{path} line 3: byte 0xe9 at position 6 is not UTF-8; save the file as UTF-8",
    ),
    (
        "rows.jsonl",
        json_line() + b'{"context": "\xff"}',
        "{path} line 3: byte 0xff at position 14 is not UTF-8; save the file as UTF-8",
    ),
    (
        "rows.json",
        b'[{"context":\n"caf\xe9"}]',
        "{path} line 2: byte 0xe9 at position 5 is not UTF-8; save the file as UTF-8",
    ),
    ("rows.parquet", GOOD, "{path}: not a parquet file that can be read (...); write it anew"),
    # ---- columns
    (
        "rows.csv",
        b"text,ask\na,b\n",
        "{path} row 1 (line 2): no column for the context; the columns are 'text', 'ask'; "
        "name one of them 'context' or 'thought'",
    ),
    (
        "rows.csv",
        b"I think so.,Why?,clarity\nOr not.,Why?,clarity\n",
        "{path} row 1 (line 2): no column for the context; the columns are 'I think so.', 'Why?', 'clarity'; "
        "name one of them 'context' or 'thought'",
    ),
    (
        "rows.csv",
        b"context,ask,type\na,b,c\n",
        "{path} row 1 (line 2): no column for the question; the columns are 'context', 'ask', 'type'; "
        "name one of them 'question'",
    ),
    (
        "rows.csv",
        b"thought,Question,kind\na,b,c\n",
        "{path} row 1 (line 2): no column for the type; the columns are 'thought', 'Question', 'kind'; "
        "name one of them 'type' or 'label' or 'schema'",
    ),
    (
        "rows.csv",
        b"input,question\nclarity: a,b\n",
        "{path} row 1 (line 2): no column for the context; the columns are 'input', 'question'; "
        "name one of them 'context' or 'thought'",
    ),
    (
        "rows.csv",
        b"context,question,question,type\na,b,c,d\n",
        "{path} line 1: two columns are named 'question'; rename one",
    ),
    (
        "rows.jsonl",
        json_line() + b'{"context": "a", "type": "b"}\n',
        "{path} line 3: no column for the question; the columns are 'context', 'type'; name one of them 'question'",
    ),
    (
        "rows.json",
        b"[{}]",
        "{path} row 1: no column for the context; the columns are none at all; name one of them 'context' or 'thought'",
    ),
    (
        "rows.json",
        b'{"rows": "none"}',
        "{path} row 1: no column for the context; the columns are 'rows'; name one of them 'context' or 'thought'",
    ),
    # ---- csv
    (
        "rows.csv",
        csv_row(b"Well, yes.,Why?,clarity"),
        "{path} row 2 (line 3): 4 cells under 3 columns; put a cell that holds ',' in double quotes",
    ),
    (
        "rows.csv",
        b"context,question,type\nWell, yes.,Why?,clarity\n",  # all rows too long by one: readers that guess shift them
        "{path} row 1 (line 2): 4 cells under 3 columns; put a cell that holds ',' in double quotes",
    ),
    (
        "rows.csv",
        csv_row(b"Some text.,Why?"),
        "{path} row 2 (line 3): 2 cells under 3 columns; fill in the missing cells or remove the row",
    ),
    (
        "rows.csv",
        csv_row(b'"Some\ntext.",Why?,clarity\n"No end,Why?,clarity\nMore.,Why?,clarity'),
        "{path} row 3 (line 5): broken csv (unexpected end of data); close every quote, "
        "and write a quote inside a cell twice",
    ),
    (
        "rows.csv",
        csv_row(b'"He" said.,Why?,clarity'),
        "{path} row 2 (line 3): broken csv (...); close every quote, and write a quote inside a cell twice",
    ),
    (
        "rows.tsv",
        b"context\tquestion\ttype\nSome text.\tWhy?\n",
        "{path} row 1 (line 2): 2 cells under 3 columns; fill in the missing cells or remove the row",
    ),
    # ---- fields
    (
        "rows.csv",
        csv_row(b",Why?,clarity"),
        "{path} row 2 (line 3): the context is empty; fill it in or remove the row",
    ),
    (
        "rows.csv",
        csv_row(b'Some text.,"  \n ",clarity'),
        "{path} row 2 (line 3): the question is empty; fill it in or remove the row",
    ),
    (
        "rows.csv",
        csv_row(b"Some text.,Why?,"),
        "{path} row 2 (line 3): the type is empty; fill it in or remove the row",
    ),
    (
        "rows.csv",
        b"thought,question,label\n\xe2\x80\x8b\x00,Why?,clarity\n",  # a zero-width space and a NUL
        "{path} row 1 (line 2): the context (column 'thought') is empty; fill it in or remove the row",
    ),
    (
        "rows.csv",
        csv_row(b"Some text.,Why?," + b"This is a text and no type. " * 9),
        "{path} row 2 (line 3): the type is 'This is a text and no type. This is a text and no type. T...'; "
        "expected a name of at most 80 characters such as 'Cause to effect'",
    ),
    (
        "rows.csv",
        csv_row(b"Some text.,Why?,-"),
        "{path} row 2 (line 3): the type is '-'; expected a name of at most 80 characters such as 'Cause to effect'",
    ),
    (
        "rows.csv",
        b"input,target\nclarity: A text.,Why?\nA text without its type.,Why?\n",
        "{path} row 2 (line 3): column 'input' must be \"type: context\", found 'A text without its type.'",
    ),
    (
        "rows.csv",
        b"input,target\nclarity: ,Why?\n",
        "{path} row 1 (line 2): column 'input' must be \"type: context\", found 'clarity:'",
    ),
    (
        "rows.csv",
        b"input,target\nclarity: A text.,\n",
        "{path} row 1 (line 2): the target is empty; fill it in or remove the row",
    ),
    ("rows.jsonl", json_line(question=3), "{path} line 2: the question is 3 (int); write it as text"),
    ("rows.jsonl", json_line(question=True), "{path} line 2: the question is True (bool); write it as text"),
    ("rows.jsonl", json_line(context=["a", "b"]), "{path} line 2: the context is ['a', 'b'] (list); write it as text"),
    ("rows.jsonl", json_line(type={"name": "x"}), "{path} line 2: the type is {'name': 'x'} (dict); write it as text"),
    ("rows.jsonl", json_line(type=1), "{path} line 2: the type is 1 (int); write it as text"),
    ("rows.jsonl", json_line(context=None), "{path} line 2: the context is missing; fill it in or remove the row"),
    ("rows.jsonl", json_line(context=float("nan")), "{path} line 2: the context is NaN; fill it in or remove the row"),
    ("rows.jsonl", json_line(question=""), "{path} line 2: the question is empty; fill it in or remove the row"),
    (
        "rows.jsonl",
        json_line(question="\u202e\u200b"),
        "{path} line 2: the question is empty; fill it in or remove the row",
    ),
    # ---- json
    (
        "rows.jsonl",
        json_line() + b'{"context": "Some te',
        "{path} line 3: not JSON from character 13 on (Unterminated string starting at); mend it",
    ),
    ("rows.jsonl", json_line() + b"oops\n", "{path} line 3: not JSON from character 1 on (Expecting value); mend it"),
    ("rows.jsonl", b"{'context': 'a'}\n", "{path} line 1: not JSON from character 2 on (...); mend it"),
    (
        "rows.jsonl",
        json_line() + b'["a", "b"]\n',
        '{path} line 3: expected an object of named fields, found ["a", "b"]',
    ),
    ("rows.json", b'[{"context": "a"},\n{]', "{path}: not JSON from line 2 character 2 on (...); mend it"),
    (
        "rows.json",
        b'[1, {"context": "a"}]',
        "{path} row 1: expected an object of named fields, found 1",
    ),
    (
        "rows.json",
        b'"a text"',
        '{path} row 1: expected an object of named fields, found "a text"',
    ),
    ("rows.json", b"[" * 100_000, "{path}: not JSON that can be read (nested too deeply)"),
    ("rows.json", b"[" + b"9" * 5000 + b"]", "{path}: not JSON that can be read (...)"),
    (
        "rows.json",
        b'{"context": ["a", "b"], "question": ["c"], "type": ["d"]}',
        "{path}: the columns differ in length ('context' 2, 'question' 1, 'type' 1); expected a list of rows",
    ),
]


@pytest.mark.parametrize("name, content, expected", FILES)
def test_bad_files(tmp_path, capsys, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    assert_same(message_of(capsys, lambda: load_rows(str(path))), expected.replace("{path}", str(path)))


TABLES = [
    (
        {"context": ["a", None], "question": ["b", "c"], "type": ["d", "e"]},
        "{path} row 2: the context is missing; fill it in or remove the row",
    ),
    (
        {"context": ["a", "b"], "question": [1.5, float("nan")], "type": ["d", "e"]},
        "{path} row 1: the question is 1.5 (float); write it as text",
    ),
    (
        {"text": ["a"]},
        "{path}: no column for the context; the columns are 'text'; name one of them 'context' or 'thought'",
    ),
    (
        {"context": ["a"], "text": ["a"], "type": ["c"]},
        "{path}: no column for the question; the columns are 'context', 'text', 'type'; name one of them 'question'",
    ),
    (
        {"context": [], "question": [], "type": []},
        "{path}: holds no rows; a row needs a context, a question and a type",
    ),
]


@pytest.mark.parametrize("columns, expected", TABLES)
def test_bad_parquet(tmp_path, capsys, columns, expected):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert_same(message_of(capsys, lambda: load_rows(str(path))), expected.replace("{path}", str(path)))


HOW = "--data takes sample, socratiq, a file, a folder, an https address or a Hub id owner/name"
FETCH = "mend the address or the network, or download the file elsewhere and give its path"
SOURCES = [
    ("gone.csv", None, f"gone.csv: no such file or folder; {HOW}"),
    ("sampel", None, f"sampel: no such file or folder; {HOW}"),
    ("folder/gone", None, f"folder/gone: no such file or folder; {HOW}"),
    ("/gone/rows.csv", None, f"/gone/rows.csv: no such file or folder; {HOW}"),
    ("", None, f"'': no such file or folder; {HOW}"),
    ("x" * 5000, None, f"xxx...xxx: no such file or folder; {HOW}"),
    (
        "folder",
        None,
        "folder: no data files in this folder; expected files ending in .csv, .tsv, .json, .jsonl, .ndjson, .parquet",
    ),
    ("full", "dev", "full: no file is named after the split 'dev', such as dev.csv"),
    (
        "full",
        None,
        "full/bad.csv row 1 (line 2): no column for the context; the columns are 'a', 'b'; "
        "name one of them 'context' or 'thought'",
    ),
    (
        "full/bad.csv",
        "test",
        "full/bad.csv: a single file has no split 'test'; leave the split out or give a folder",
    ),
    ("sample", "test", "sample: a single file has no split 'test'; leave the split out or give a folder"),
    ("socratiq", "dev", "socratiq: has no split 'dev'; choose one of train, validation, test"),
    ("http://127.0.0.1:9/rows.csv", None, f"http://127.0.0.1:9/rows.csv: could not be fetched (...); {FETCH}"),
    ("https://[broken/rows.csv", None, f"https://[broken/rows.csv: could not be fetched (...); {FETCH}"),
]


@pytest.mark.parametrize("source, split, expected", SOURCES)
def test_bad_sources(tmp_path, monkeypatch, capsys, source, split, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "bad.csv").write_text("a,b\n1,2\n")
    assert_same(message_of(capsys, lambda: load_rows(source, split)), expected)


PAIR = {"prompt": "Ask.", "chosen": "Why?", "rejected": "What?"}
PAIRS = [
    (b"", "{path}: the file is empty; it must hold at least one row"),
    (b"\n", "{path}: no pairs in the file; run make_pairs.py"),
    (b"prompt,chosen,rejected\n", "{path} line 1: not JSON from character 1 on (Expecting value); mend it"),
    (b"[1]\n", "{path} line 1: expected an object of named fields, found [1]"),
    (b'\n{"prompt": "caf\xe9"}\n', "{path} line 2: byte 0xe9 at position 16 is not UTF-8; save the file as UTF-8"),
    (
        {"question": "Why?", "good": "a", "bad": "b"},
        "{path} line 1: no field 'prompt'; the fields are 'question', 'good', 'bad'; make_pairs.py writes all three",
    ),
    ({**PAIR, "chosen": " \n"}, "{path} line 1: the chosen is empty; fill it in or remove the row"),
    ({**PAIR, "rejected": None}, "{path} line 1: the rejected is missing; fill it in or remove the row"),
    ({**PAIR, "rejected": 3}, "{path} line 1: the rejected is 3 (int); write it as text"),
    ({**PAIR, "prompt": ["Ask."]}, "{path} line 1: the prompt is ['Ask.'] (list); write it as text"),
    (
        {**PAIR, "chosen": [{"role": "assistant", "content": "Why?"}]},
        "{path} line 1: the chosen is [{'role': 'assistant', 'content': 'Wh... (list); write it as text",
    ),
    (
        {**PAIR, "chosen": "What? \u200b"},
        "{path} line 1: chosen and rejected are the same text; remove the line",
    ),
]


@pytest.mark.parametrize("content, expected", PAIRS)
def test_bad_pairs(tmp_path, capsys, content, expected):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert_same(message_of(capsys, lambda: load_pairs(str(path))), expected.replace("{path}", str(path)))


def test_no_pairs(capsys):
    assert_same(
        message_of(capsys, lambda: load_pairs("gone.jsonl")),
        "--pairs gone.jsonl: no such file; make_pairs.py writes it",
    )
