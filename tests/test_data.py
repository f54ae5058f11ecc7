"""Loading rows from every kind of file and place, tidying them, and splitting them by context."""

import json
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from socratiq import data
from socratiq.data import Row, clean, load_pairs, load_rows, split_by_context
from socratiq.run.errors import UserError
from socratiq.taxonomy import OTHERS, TYPES

RECORDS = [
    {"context": "Cars cause noise, and 'noise' is bad.", "question": "Do cars cause it?", "type": "CauseToEffect"},
    {"context": 'He said "no".\nThen he left.', "question": "What is no?", "type": "clarity"},
    {"context": "NA", "question": "null", "type": "others"},
]
EXPECTED = [
    ("Cars cause noise, and 'noise' is bad.", "Do cars cause it?", "Cause to effect"),
    ('He said "no".\nThen he left.', "What is no?", "Clarity"),
    ("NA", "null", "others"),
]


def plain(rows):
    return [row[:3] for row in rows]


def as_csv(records, delimiter=",", newline="\n"):
    def cell(text):
        return '"' + text.replace('"', '""').replace("\n", newline) + '"'

    lines = [delimiter.join(records[0]), *(delimiter.join(map(cell, record.values())) for record in records)]
    return newline.join(lines) + newline


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def rows_of_file(tmp_path):
    """rows_of_file(content, name): write this file and load it."""

    def write_and_load(content, name="rows.csv"):
        (tmp_path / name).write_bytes(content.encode())
        return load_rows(str(tmp_path / name))

    return write_and_load


# ------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    "name, content",
    [
        ("comma.csv", as_csv(RECORDS)),
        ("semicolon.csv", as_csv(RECORDS, ";")),
        ("excel.csv", "sep=;\r\n" + as_csv(RECORDS, ";", newline="\r\n")),
        ("old_mac.csv", as_csv(RECORDS, newline="\r")),
        ("tab.tsv", as_csv(RECORDS, "\t")),
        ("windows.csv", "\ufeff" + as_csv(RECORDS, newline="\r\n")),
        ("CAPITALS.CSV", as_csv(RECORDS)),
        ("gaps.csv", "\n\n" + as_csv(RECORDS).replace("\n", "\n\n", 1) + "\n\n"),
        ("array.json", json.dumps(RECORDS, indent=2)),
        ("lines.json", json_lines(RECORDS)),
        ("bom.json", "\ufeff" + json.dumps(RECORDS)),
        ("lines.jsonl", json_lines(RECORDS)),
        ("gaps.jsonl", "\n" + json_lines(RECORDS).replace("\n", "\r\n\r\n")),
        ("lines.ndjson", "\ufeff" + json_lines(RECORDS).rstrip("\n")),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(rows_of_file, capsys, name, content):
    assert plain(rows_of_file(content, name)) == EXPECTED
    assert capsys.readouterr().err == ""


def test_parquet_with_numbered_classes(tmp_path):
    from datasets import ClassLabel, Dataset

    table = Dataset.from_list([{**record, "image": b"unread"} for record in RECORDS])
    table = table.cast_column("type", ClassLabel(names=["others", "CauseToEffect", "clarity"]))
    table.to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))
    assert plain(rows) == EXPECTED
    assert rows[2].source == f"{tmp_path}/rows.parquet row 3"


def test_sources_name_the_row(tmp_path, rows_of_file):
    """Of a csv without the header, as a spreadsheet's reader counts; blank lines do not count anywhere."""
    gaps = "context,question,type\n\n" + as_csv(RECORDS).split("\n", 1)[1]
    for name, content in (("rows.csv", gaps), ("rows.jsonl", "\n" + json_lines(RECORDS))):
        assert [row.source for row in rows_of_file(content, name)] == [f"{tmp_path}/{name} row {n}" for n in (1, 2, 3)]


def test_a_folder_is_read_file_by_file(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "deep" / "train-00001.jsonl").write_text(json_lines(RECORDS[:1]))
    (tmp_path / "test.csv").write_text(as_csv(RECORDS[1:2]))
    (tmp_path / "training_notes.txt").write_text("no data")
    (tmp_path / ".hidden" / "train.csv").write_text("broken")
    assert plain(load_rows(str(tmp_path))) == EXPECTED[:2]
    assert capsys.readouterr().err == ""
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"features": {"context": {}}}}))
    assert plain(load_rows(str(tmp_path))) == EXPECTED[:2]
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: files without a column of questions left out: {tmp_path}/dataset_infos.json\n"
    )


def test_a_folder_of_save_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {"train": Dataset.from_list(RECORDS[:2]), "test": Dataset.from_list(RECORDS[2:])}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert plain(load_rows(str(tmp_path / "saved"))) == [EXPECTED[2], *EXPECTED[:2]]  # by the names of the files


# ----------------------------------------------------------------------------------------------------------- columns


SPELLINGS = ["thought,question,label", "Context,Question,Type", "THOUGHT, question,schema", "intervention,cq,type"]


@pytest.mark.parametrize("names", SPELLINGS)
def test_column_spellings(rows_of_file, names):
    rows = rows_of_file(f",{names},id\n0,I think so.,Why?,reasons_evidence,7\n")
    assert plain(rows) == [("I think so.", "Why?", "Reasons and evidence")]


def test_socratiq_full_files(rows_of_file):
    content = ",input,target\n0,implication_consequences: Say: no.,What then?\n1,moral_appeal: We must.,Must we?\n"
    expected = [("Say: no.", "What then?", "Implications and consequences"), ("We must.", "Must we?", "Moral appeal")]
    assert plain(rows_of_file(content)) == expected


def asked_about(contexts):
    return json_lines([{"context": context, "question": "Why?", "type": "Analogy"} for context in contexts])


def test_a_label_in_front_of_every_context_is_cut_off_with_a_count(rows_of_file, capsys):
    contexts = ["reasons_evidence: I think so.", "others:   Well.", "implication_consequences: Say: yes."]
    rows = rows_of_file(asked_about(contexts), "rows.jsonl")
    assert [row.context for row in rows] == ["I think so.", "Well.", "Say: yes."]
    said = "rows.jsonl: a label in front of every context, such as 'reasons_evidence: ', cut off in all 3 rows\n"
    assert capsys.readouterr().err.endswith(said)


UNCUT = [["reasons: there are three of them"], ["Clarity: a word on it."]]  # a label of other data, a sentence
UNCUT += [["clarity:"], ["clarity: I think so.", "I think not."]]  # no text, and not in front of every one


@pytest.mark.parametrize("contexts", UNCUT)
def test_no_other_context_is_cut(rows_of_file, capsys, contexts):
    assert [row.context for row in rows_of_file(asked_about(contexts), "rows.jsonl")] == contexts
    assert capsys.readouterr().err == ""


def test_two_columns_for_one_field_are_settled_with_a_warning(rows_of_file, capsys):
    rows = rows_of_file("context,question,type,label\na,b?,clarity,assumptions\nc,d?,clarity,assumptions\n")
    assert [row.type for row in rows] == ["Clarity", "Clarity"]
    assert capsys.readouterr().err.endswith("columns type and label could be the type; reading type\n")


# -------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "raw, tidy",
    [
        ("  a b \n", "a b"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a\x00b\x1b[31mc\x7f", "ab[31mc"),
        ("pay \u202e001\u202c now\u2066!\u2069\u200b\ufeff", "pay 001 now!"),
        ("cafe\u0301", "café"),
        ("half a pair: \ud83d!", "half a pair: !"),
        ("👩‍👩‍👧 🏴‍☠️ 👍🏽 क्‍ष", "👩‍👩‍👧 🏴‍☠️ 👍🏽 क्‍ष"),
        ("### Response:\n<|im_end|></s>", "### Response:\n<|im_end|></s>"),
        ("a\tb\n\nc", "a\tb\n\nc"),
    ],
)
def test_clean(raw, tidy):
    assert clean(raw) == tidy
    assert clean(tidy) == tidy


def test_a_question_is_one_line_and_a_context_may_be_long(rows_of_file):
    [row] = rows_of_file('context,question,type\n"' + "word " * 40_000 + '","Why\n\n this?",clarity\n')
    assert row.question == "Why this?" and len(row.context) == 199_999


def test_copies_are_dropped_with_a_warning_and_contradictions_kept(tmp_path, rows_of_file, capsys):
    rows = rows_of_file("context,question,type\na,b?,clarity\na , b?,Clarity\na,b?,assumptions\na,c?,clarity\n")
    assert plain(rows) == [("a", "b?", "Clarity"), ("a", "b?", "Assumptions"), ("a", "c?", "Clarity")]
    assert capsys.readouterr().err == f"warning: {tmp_path}/rows.csv: exact copies of earlier rows left out: 1\n"


# ---------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "lines",
    [  # a column of their own, or labels that are verdicts and no types
        ("type,preference", "clarity,chosen", ",Rejected", "clarity,", ",Useful"),
        ("label,schema", "Useful,clarity", "UNHELPFUL,", "undecided,clarity", "useful,"),
    ],
)
def test_verdicts(rows_of_file, capsys, lines):
    header, *cells = lines
    rows = rows_of_file(f"context,question,{header}\n" + "".join(f"a,b{n}?,{cell}\n" for n, cell in enumerate(cells)))
    verdicts = [("Clarity", "chosen"), ("", "rejected"), ("Clarity", ""), ("", "chosen")]
    assert [(row.type, row.preference) for row in rows] == verdicts and capsys.readouterr().err == ""


def test_the_shared_task_on_critical_questions(tmp_path):
    path = tmp_path / "validation.json"
    asked = [("Which noise?", "Useful"), ("What is a tram?", "Unhelpful"), ("Do you like trams?", "Invalid")]
    questions = [{"id": f"A_1_{n}", "cq": question, "label": label} for n, (question, label) in enumerate(asked)]
    text = {"intervention_id": "A_1", "intervention": "A: Trams are loud.", "schemes": ["Sign"], "cqs": questions}
    path.write_text(json.dumps({"A_1": text, "B_1": {**text, "intervention": "B: No.", "cqs": questions[:1]}}))
    rows = load_rows(str(path))
    assert [row.preference for row in rows] == ["chosen", "rejected", "rejected", "chosen"]
    assert rows[1][:4] == ("A: Trams are loud.", "What is a tram?", "", f"{path} row 2")
    assert rows[3][:4] == ("B: No.", "Which noise?", "", f"{path} row 4")


# ------------------------------------------------------------------------------------------------- from the network


def test_an_address(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text(as_csv(RECORDS))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{http.server_port}/"
        rows = load_rows(address + "rows.csv?raw=true")
        with pytest.raises(UserError, match=r"gone.csv: cannot be read \(HTTP Error 404"):
            load_rows(address + "gone.csv")
        monkeypatch.setattr(data, "SOCRATIQ", address + "rows.csv")
        assert plain(load_rows("socratiq")) == plain(rows) == EXPECTED
        http.shutdown()
    assert rows[0].source == address + "rows.csv?raw=true row 1"


def test_a_hub_data_set_with_splits_and_configurations(monkeypatch):
    import datasets

    def load_dataset(repository, configuration=None):
        if configuration is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['plain']")
        assert (repository, configuration) == ("someone/questions", "plain")
        parts = {"train": RECORDS[:2], "test": RECORDS[2:]}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("someone/questions:plain")
    assert plain(rows) == EXPECTED
    assert rows[2].source == "someone/questions:plain test row 1"
    with pytest.raises(UserError, match=r"Config name is missing.*plain.*owner/name:configuration"):
        load_rows("someone/questions")


# ------------------------------------------------------------------------------------------------------------ sample


def test_the_sample(capsys):
    rows = load_rows("sample")
    counts = Counter(row.type for row in rows)
    assert set(counts) == {*(kind.name for kind in TYPES), OTHERS}
    assert min(counts.values()) >= 40
    assert capsys.readouterr().err == ""
    train, held_out = split_by_context(rows)
    assert {row.type for row in train} == {row.type for row in held_out} == set(counts)


# ------------------------------------------------------------------------------------------------------------- split


def rows_of(*contexts):
    return [Row(context, "Why?", "Clarity", "here") for context in contexts]


def test_split_by_context():
    rows = rows_of(*(f"text {n // 3}" for n in range(3000)))
    train, held_out = split_by_context(rows, held_out=0.1, seed=0)
    assert 220 < len(held_out) < 380  # 100 of 1000 contexts, give or take four standard deviations
    assert split_by_context(rows, 0.1, 0) == (train, held_out)
    assert split_by_context(rows, 0.1, 1)[1] != held_out
    assert split_by_context(rows[::-1], 0.1, 0) == (train[::-1], held_out[::-1])
    assert set(held_out) < set(split_by_context(rows, 0.2, 0)[1])


def test_added_rows_move_no_others():
    few, many = rows_of(*(f"text {n}" for n in range(200))), rows_of(*(f"text {n}" for n in range(400)))
    assert set(split_by_context(few)[1]) == set(split_by_context(many)[1]) & set(few)


def test_nothing_to_hold_out():
    assert split_by_context(rows_of("a", "A ")) == (rows_of("a", "A "), [])
    assert split_by_context(rows_of("a", "b"), held_out=0) == (rows_of("a", "b"), [])
    assert split_by_context([]) == ([], [])
    for share in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(UserError, match="the share of contexts to hold out must be at least 0 and below 1"):
            split_by_context(rows_of("a", "b"), held_out=share)


# ------------------------------------------------------------------------------------------------------------- pairs


def test_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    full = {"prompt": "Ask.\n", "chosen": " Why?\ud83d", "rejected": "What?", "context": "A text.", "type": "Clarity"}
    short = {"prompt": "Ask more.", "chosen": "Why?", "rejected": "What?", "context": None, "extra": 1}
    path.write_text("\n" + json_lines([full, short]))
    pairs = load_pairs(str(path))
    assert pairs[0] == ("Ask.\n", "Why?", "What?", "A text.", "Clarity", f"{path} row 1")
    assert pairs[1] == ("Ask more.", "Why?", "What?", "", "", f"{path} row 2")
    assert [len(side) for side in split_by_context(pairs, 0.5)] == [1, 1]  # one without a context goes by its prompt


def test_pairs_come_from_every_kind_of_file(tmp_path):
    """Through the readers of rows; the newline at the end of a prompt stays."""
    records = [{"prompt": f"Ask {n}.\n", "chosen": "Why?", "rejected": "What?", "context": ""} for n in range(2)]
    (tmp_path / "pairs.csv").write_text(as_csv(records))
    assert [pair[:5] for pair in load_pairs(str(tmp_path / "pairs.csv"))] == [(*r.values(), "") for r in records]


# -------------------------------------------------------------------------------------------------------------- size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_many_rows_in_bounded_memory(tmp_path):
    """About 90 MB for this file of 16 MB."""
    path = tmp_path / "many.csv"
    lines = (f'"{number} {"some words, " * 40}","Why is it number {number}?",clarity\n' for number in range(30_000))
    with open(path, "w") as file:
        file.writelines(["context,question,type\n", *lines])
    program = (
        f"from socratiq.data import load_rows; print(len(load_rows({str(path)!r})))\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"  # peak, in kB
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rows, kilobytes = map(int, run.stdout.split())
    assert rows == 30_000 and kilobytes < 120_000


def test_only_rows_of_some_types_and_the_negatives(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json_lines(RECORDS))
    source = str(tmp_path / "rows.jsonl")
    assert [row.type for row in load_rows(source, ["clarity"])] == ["Clarity", "others"]
    with pytest.raises(UserError, match=r"--types: .* no row of type 'Fear appeal'; it has Cause to effect, Clarity, "):
        load_rows(source, ["FearAppeal"])
