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
        ("gaps.csv", as_csv(RECORDS).replace("\n", "\n\n", 1) + "\n\n"),
        ("array.json", json.dumps(RECORDS, indent=2)),
        ("lines.json", json_lines(RECORDS)),
        ("bom.json", "\ufeff" + json.dumps(RECORDS)),
        ("lines.jsonl", json_lines(RECORDS)),
        ("gaps.jsonl", "\n" + json_lines(RECORDS).replace("\n", "\r\n\r\n")),
        ("lines.ndjson", "\ufeff" + json_lines(RECORDS).rstrip("\n")),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert plain(load_rows(str(tmp_path / name))) == EXPECTED
    assert capsys.readouterr().err == ""


def test_parquet_with_numbered_classes(tmp_path):
    from datasets import ClassLabel, Dataset

    table = Dataset.from_list([{**record, "image": b"unread"} for record in RECORDS])
    table = table.cast_column("type", ClassLabel(names=["others", "CauseToEffect", "clarity"]))
    table.to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))
    assert plain(rows) == EXPECTED
    assert rows[2].source == f"{tmp_path}/rows.parquet row 3"


def test_one_object_is_one_row(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[0], indent=1))
    assert plain(load_rows(str(tmp_path / "one.json"))) == EXPECTED[:1]


def test_sources_name_the_row(tmp_path):
    """Of a csv without the header, as a spreadsheet's reader counts; blank lines do not count anywhere."""
    (tmp_path / "rows.csv").write_text("context,question,type\n\n" + as_csv(RECORDS).split("\n", 1)[1])
    (tmp_path / "rows.jsonl").write_text("\n" + json_lines(RECORDS))
    for path in (tmp_path / "rows.csv", tmp_path / "rows.jsonl"):
        assert [row.source for row in load_rows(str(path))] == [f"{path} row {number}" for number in (1, 2, 3)]


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


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(as_csv(RECORDS[:1]))
    assert len(load_rows(str(path))) == 1
    path.write_text(as_csv(RECORDS))
    assert len(load_rows(str(path))) == 3


# ----------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "names",
    [
        ("context", "question", "type"),
        ("thought", "question", "label"),
        ("Context", "Question", "Type"),
        ("THOUGHT", " question", "schema"),
    ],
)
def test_column_spellings(tmp_path, names):
    path = tmp_path / "rows.csv"
    path.write_text(f",{','.join(names)},id\n0,I think so.,Why?,reasons_evidence,7\n")
    assert plain(load_rows(str(path))) == [("I think so.", "Why?", "Reasons and evidence")]


def test_socratiq_full_files(tmp_path):
    path = tmp_path / "full.csv"
    path.write_text(
        ",input,target\n0,implication_consequences: Say: we ban it.,What then?\n1,moral_appeal: We must.,Must we?\n"
    )
    assert plain(load_rows(str(path))) == [
        ("Say: we ban it.", "What then?", "Implications and consequences"),
        ("We must.", "Must we?", "Moral appeal"),
    ]


def test_a_label_in_front_of_every_context_is_cut_off_with_a_count(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    contexts = ["reasons_evidence: I think so.", "others:   Well.", "implication_consequences: Say: yes."]
    path.write_text(json_lines([{"context": text, "question": "Why?", "schema": "Analogy"} for text in contexts]))
    assert [row.context for row in load_rows(str(path))] == ["I think so.", "Well.", "Say: yes."]
    assert capsys.readouterr().err == (
        f"warning: {path}: a label in front of every context, such as 'reasons_evidence: ', cut off in all 3 rows\n"
    )


@pytest.mark.parametrize(
    "contexts",
    [
        ["reasons: there are three of them"],  # a label of other data, and the start of a sentence
        ["Clarity: a word on it."],
        ["clarity:"],
        ["clarity: I think so.", "I think not."],  # not in front of every one
    ],
)
def test_no_other_context_is_cut(tmp_path, capsys, contexts):
    path = tmp_path / "rows.jsonl"
    path.write_text(json_lines([{"context": text, "question": "Why?", "type": "Analogy"} for text in contexts]))
    assert [row.context for row in load_rows(str(path))] == contexts
    assert capsys.readouterr().err == ""


def test_two_columns_for_one_field_are_settled_with_a_warning(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("context,question,type,label\na,b?,clarity,assumptions\nc,d?,clarity,assumptions\n")
    assert [row.type for row in load_rows(str(path))] == ["Clarity", "Clarity"]
    assert capsys.readouterr().err == (f"warning: {path}: columns type and label could be the type; reading type\n")


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


def test_a_question_is_one_line_and_a_context_may_be_long(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('context,question,type\n"' + "word " * 40_000 + '","Why\n\n this?",clarity\n')
    [row] = load_rows(str(path))
    assert row.question == "Why this?"
    assert len(row.context) == 199_999


def test_copies_are_dropped_with_a_warning_and_contradictions_kept(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text(
        "context,question,type\na,b?,clarity\na , b?,Clarity\na,b?,clarity\na,b?,assumptions\na,c?,clarity\n"
    )
    assert plain(load_rows(str(path))) == [("a", "b?", "Clarity"), ("a", "b?", "Assumptions"), ("a", "c?", "Clarity")]
    assert capsys.readouterr().err == f"warning: {path}: exact copies of earlier rows left out: 2\n"


# ---------------------------------------------------------------------------------------------------------- verdicts


def test_verdicts_in_a_column_of_their_own(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "context,question,type,preference\na,b?,clarity,chosen\na,c?,,Rejected\na,d?,clarity,\na,e?,,Useful\n"
    )
    found = [(row.question, row.type, row.preference) for row in load_rows(str(path))]
    assert found == [("b?", "Clarity", "chosen"), ("c?", "", "rejected"), ("d?", "Clarity", ""), ("e?", "", "chosen")]


def test_labels_that_are_verdicts_are_no_types(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("context,question,label,schema\na,b?,Useful,Analogy\na,c?,UNHELPFUL,\na,d?,undecided,Analogy\n")
    found = [(row.question, row.type, row.preference) for row in load_rows(str(path))]
    assert found == [("b?", "Analogy", "chosen"), ("c?", "", "rejected"), ("d?", "Analogy", "")]
    assert capsys.readouterr().err == ""


def test_the_shared_task_on_critical_questions(tmp_path):
    path = tmp_path / "validation.json"
    asked = [("Which noise?", "Useful"), ("What is a tram?", "Unhelpful"), ("Do you like trams?", "Invalid")]
    questions = [{"id": f"A_1_{n}", "cq": question, "label": label} for n, (question, label) in enumerate(asked)]
    text = {"intervention_id": "A_1", "intervention": "A: Trams are loud.", "schemes": ["Sign"], "cqs": questions}
    path.write_text(json.dumps({"A_1": text, "B_1": {**text, "intervention": "B: No.", "cqs": questions[:1]}}))
    assert load_rows(str(path)) == [
        ("A: Trams are loud.", "Which noise?", "", f"{path} row 1", "chosen"),
        ("A: Trams are loud.", "What is a tram?", "", f"{path} row 2", "rejected"),
        ("A: Trams are loud.", "Do you like trams?", "", f"{path} row 3", "rejected"),
        ("B: No.", "Which noise?", "", f"{path} row 4", "chosen"),
    ]


# ------------------------------------------------------------------------------------------------- from the network


@pytest.fixture
def server(tmp_path):
    """(folder, address) of a server on loopback that serves the folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=partial(http.serve_forever, poll_interval=0.02), daemon=True).start()
    yield folder, f"http://127.0.0.1:{http.server_port}/"
    http.shutdown()
    http.server_close()


def test_an_address(server):
    folder, address = server
    (folder / "rows.csv").write_text(as_csv(RECORDS))
    rows = load_rows(address + "rows.csv?raw=true")
    assert plain(rows) == EXPECTED
    assert rows[0].source == address + "rows.csv?raw=true row 1"
    with pytest.raises(UserError, match=r"gone.csv: cannot be read \(HTTP Error 404"):
        load_rows(address + "gone.csv")


def test_socratiq_is_an_address(server, monkeypatch):
    folder, address = server
    monkeypatch.setattr(data, "SOCRATIQ", address + "mturk.csv")
    (folder / "mturk.csv").write_text(",thought,question,label\n0,A text.,What?,clarity\n")
    assert plain(load_rows("socratiq")) == [("A text.", "What?", "Clarity")]


def test_a_hub_data_set_with_splits_and_configurations(monkeypatch):
    import datasets

    asked = []

    def load_dataset(repository, configuration=None):
        asked.append((repository, configuration))
        if configuration is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['plain']")
        parts = {"train": RECORDS[:2], "test": RECORDS[2:]}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("someone/questions:plain")
    assert asked == [("someone/questions", "plain")]
    assert plain(rows) == EXPECTED
    assert rows[2].source == "someone/questions:plain test row 1"
    with pytest.raises(UserError, match=r"Config name is missing.*plain.*owner/name:configuration"):
        load_rows("someone/questions")


def test_no_network_is_one_clear_line():
    program = (
        "from socratiq.run.errors import main; from socratiq.data import load_rows; main(lambda: load_rows('a/b'))"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: a/b: no such file or folder here, and the Hub gave no data set of that name")
    assert run.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ sample


def test_the_sample(capsys):
    rows = load_rows("sample")
    counts = Counter(row.type for row in rows)
    assert set(counts) == {*(kind.name for kind in TYPES), OTHERS}
    assert min(counts.values()) >= 40
    assert rows[0].source == "sample row 1"
    assert capsys.readouterr().err == ""
    train, held_out = split_by_context(rows)
    assert {row.type for row in train} == {row.type for row in held_out} == set(counts)


# ------------------------------------------------------------------------------------------------------------- split


def rows_of(*contexts):
    return [Row(context, "Why?", "Clarity", "here") for context in contexts]


def test_split_by_context():
    rows = rows_of(*(f"text {n // 3}" for n in range(3000)))
    train, held_out = split_by_context(rows, held_out=0.1, seed=0)
    assert len(train) + len(held_out) == 3000
    assert not {row.context for row in train} & {row.context for row in held_out}
    assert 220 < len(held_out) < 380  # 100 of 1000 contexts, give or take four standard deviations
    assert split_by_context(rows, 0.1, 0) == (train, held_out)
    assert split_by_context(rows, 0.1, 1)[1] != held_out
    assert split_by_context(rows[::-1], 0.1, 0) == (train[::-1], held_out[::-1])
    assert set(held_out) < set(split_by_context(rows, 0.2, 0)[1])


def test_added_rows_move_no_others():
    few, many = rows_of(*(f"text {n}" for n in range(200))), rows_of(*(f"text {n}" for n in range(400)))
    assert set(split_by_context(few)[1]) == set(split_by_context(many)[1]) & set(few)


def test_case_and_spacing_do_not_leak_a_context():
    for seed in range(20):
        pairs = rows_of(*(f"Some text {n}" for n in range(10)), *(f"some  TEXT\n{n}" for n in range(10)))
        _, held_out = split_by_context(pairs, 0.5, seed)
        assert Counter(row.context.split()[-1] for row in held_out).keys() == {
            number for number, count in Counter(row.context.split()[-1] for row in held_out).items() if count == 2
        }


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_two_contexts_are_one_for_each_side(share):
    for seed in range(10):
        train, held_out = split_by_context(rows_of("a", "b", "a"), share, seed)
        assert {row.context for row in train} | {row.context for row in held_out} == {"a", "b"}
        assert train and held_out


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
    records = [
        {"prompt": "Ask.\n", "chosen": " Why?\ud83d", "rejected": "What?", "context": "A text.", "type": "Clarity"},
        {"prompt": "Ask again.", "chosen": "Why?", "rejected": "What?", "extra": 1},
        {"prompt": "Ask more.", "chosen": "Why?", "rejected": "What?", "context": None},
    ]
    path.write_text("\n" + json_lines(records))
    pairs = load_pairs(str(path))
    assert pairs[0] == ("Ask.\n", "Why?", "What?", "A text.", "Clarity", f"{path} row 1")
    assert pairs[1] == ("Ask again.", "Why?", "What?", "", "", f"{path} row 2")
    train, held_out = split_by_context(pairs, 0.5)  # those without a context go by their prompts
    assert train and held_out and len(train) + len(held_out) == 3


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.json", "pairs.parquet"])
def test_pairs_come_from_every_kind_of_file(tmp_path, name):
    records = [{"prompt": f"Ask {n}.\n", "chosen": "Why?", "rejected": "What?", "context": ""} for n in range(2)]
    if name == "pairs.parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name)
    else:
        (tmp_path / name).write_text(as_csv(records) if name == "pairs.csv" else json.dumps(records))
    assert [pair[:5] for pair in load_pairs(str(tmp_path / name))] == [(*r.values(), "") for r in records]


# -------------------------------------------------------------------------------------------------------------- size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_hundred_thousand_rows_in_bounded_memory_and_time(tmp_path):
    """About 3 s and 130 MB on one core of a laptop for this 50 MB file; the bounds are loose for slow machines."""
    path = tmp_path / "many.csv"
    with open(path, "w") as file:
        file.write("context,question,type\n")
        for number in range(100_000):
            file.write(f'"{number} {"some words, " * 40}","Why is it number {number}?",clarity\n')
    program = (
        "import time; from socratiq.data import load_rows, split_by_context\n"
        f"train, held_out = split_by_context(load_rows({str(path)!r}))\n"
        "print(len(train) + len(held_out), round(time.process_time()))\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"  # peak, in kB
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rows, seconds, kilobytes = map(int, run.stdout.split())
    assert rows == 100_000
    assert kilobytes < 250_000
    assert seconds < 30


def test_only_rows_of_some_types_and_the_negatives(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json_lines(RECORDS))
    assert [row.type for row in load_rows(str(file), ["clarity"])] == ["Clarity", "others"]
    with pytest.raises(UserError, match=r"--types: .* no row of type 'Fear appeal'; it has Cause to effect, Clarity, "):
        load_rows(str(file), ["FearAppeal"])
