"""Rows and pairs in: read, check, tidy, and split by context.

    rows = load_rows("questions.csv")
    train, held_out = split_by_context(rows, held_out=0.1, seed=0)

A row is a text, a question about it and the question's type; a pair is a prompt with a better and a worse answer. Both
come through the same readers. A problem ends as one UserError that names file, row, field and what to do.

csv is read by the standard library in its strict mode. pandas would cut off a cell where all rows have one too many,
and drop the quotes of a cell that is quoted in part.
"""

import csv
import hashlib
import http.client
import json
import math
import os
import re
import unicodedata
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from socratiq.run.errors import UserError, warn
from socratiq.taxonomy import OTHERS, display_name


class Row(NamedTuple):
    """One question about one text."""

    context: str  # tidied by `clean`
    question: str  # on one line, tidied by `clean`
    type: str  # display name such as "Cause to effect"; "others": no critical question; "": only a verdict is known
    source: str  # where it was read, for messages: "questions.csv row 12"; the header is not counted
    preference: str = ""  # the human verdict: "chosen", "rejected", or "" if there is none


class Pair(NamedTuple):
    """A prompt with a better and a worse answer: one line of runs/pairs.jsonl, or of other preference data."""

    prompt: str
    chosen: str
    rejected: str
    context: str  # "" if the line has none
    type: str  # "" if the line has none
    source: str  # "runs/pairs.jsonl row 12"


Records = list[tuple[str, dict]]  # (place such as "questions.csv row 12", {column in lower case: value}), unchecked

# Names of each field's column. `intervention`, `cq` and the verdicts are those of the 2025 shared task on critical
# questions, whose verdicts stand in its column `label`; others have a column `preference`.
COLUMNS = {
    "context": ("context", "thought", "intervention"),
    "question": ("question", "cq"),
    "type": ("type", "label", "schema"),
}
VERDICTS = {"useful": "chosen", "unhelpful": "rejected", "invalid": "rejected"}
VERDICTS |= {"chosen": "chosen", "rejected": "rejected", "": ""}
# SocratiQ's labels as they stand in front of a context. Case matters: a text may well begin with "Clarity: ...".
PREFIX = re.compile("(clarity|assumptions|reasons_evidence|(implication|alternate)[a-z_]+|others): *(?=\\S)")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
ADDRESS = ("https://", "http://")
SAMPLE = Path(__file__).parent / "sample" / "rows.jsonl"
SOCRATIQ = "https://raw.githubusercontent.com/NUS-IDS/eacl23_soqg/main/data/mturk_annotations/mturk_train_valid.csv"
LONGEST_TYPE = 80  # characters; a longer "type" is a text from the wrong column


# --- rows -----------------------------------------------------------------------------------------------------------


def load_rows(source: str, types: list[str] | None = None) -> list[Row]:
    """Every row of `source`, checked and tidied, in the order of the files.

    source: "sample" (the rows that come with the package), "socratiq" (SocratiQ's human-labelled rows, from the web), a
            csv, tsv, json, jsonl, parquet or arrow file, a folder of them, an http(s) address of one, or a Hub id:
            "owner/name" or "owner/name:configuration"

    types:  only rows of these types, and those labelled `others`; default: all

    Raises UserError at the first unusable row, or for a type that no row has. Copies are left out with a warning; a
    question that stands under two types is kept under both.
    """
    rows = []
    for name, records in _read_all(source, "--data takes sample, socratiq, a file, a folder, an address or a Hub id"):
        rows += _without_prefix(name, _rows_of(name, records))
    if not rows:
        raise UserError(f"{source}: holds no rows; a row needs a context, a question and a type")
    unique: dict[tuple, Row] = {}
    for row in rows:
        unique.setdefault((row.context, row.question, row.type, row.preference), row)
    if len(unique) < len(rows):
        warn(f"{source}: exact copies of earlier rows left out: {len(rows) - len(unique):,}")
    known = {row.type for row in unique.values()}
    wanted = {display_name(name) for name in types} if types else known
    for name in sorted(wanted - known):
        raise UserError(f"--types: {source} has no row of type {name!r}; it has {', '.join(sorted(known))}")
    return [row for row in unique.values() if row.type in {*wanted, OTHERS}]


def _rows_of(name: str, records: Records) -> list[Row]:
    labels_are_verdicts = any(_verdict(record.get("label")) for _, record in records)
    for _, record in records:
        if labels_are_verdicts:
            record["preference"] = _verdict(record.pop("label", None))
        if record.keys() >= {"input", "target"} and "question" not in record:  # SocratiQ's full files
            label, _, context = str(record["input"]).partition(":")
            record |= {"type": label, "context": context, "question": record["target"]}
    context, question = (_column(name, records, field) for field in ("context", "question"))
    type_column = _column(name, records, "type", needed="preference" not in _names(records))
    rows = []
    for place, record in records:
        preference = _verdict(_text(place, record, "preference", needed=False))
        if preference is None:
            found = _shorten(repr(record["preference"]))
            raise UserError(f"{place}: the preference is {found}; write chosen, rejected or nothing")
        label = _text(place, record, type_column, needed=not preference) if type_column else ""
        type_name = display_name(" ".join(label.split()))
        if len(type_name) > LONGEST_TYPE or (label and not type_name):
            expected = f"a name of at most {LONGEST_TYPE} characters such as 'Cause to effect'"
            raise UserError(f"{place}: the type is {_shorten(label)!r}; expected {expected}")
        asked = " ".join(_text(place, record, question).split())
        rows.append(Row(_text(place, record, context), asked, type_name, place, preference))
    return rows


def _verdict(value) -> str | None:
    """ "chosen", "rejected" or "" as a verdict's words mean it; None for other words."""
    return VERDICTS.get(str(value).strip().lower())


def _names(records: Records) -> set[str]:
    return {column for _, record in records for column in record}


def _column(name: str, records: Records, field: str, needed: bool = True) -> str:
    """The column that holds a field, the first one of those in use; "" if there is none and none is needed."""
    present, wanted = _names(records), COLUMNS.get(field, (field,))
    found = [column for column in wanted if column in present]
    if needed and records and not found:
        seen = ", ".join(repr(_shorten(column, 20)) for column in sorted(present) if column) or "none at all"
        hint = f"name one of them {' or '.join(wanted)}"
        raise UserError(f"{name}: no column for the {field}; the columns are {seen}; {hint}")
    if len(found) > 1:
        warn(f"{name}: columns {' and '.join(found)} could be the {field}; reading {found[0]}")
    return found[0] if found else ""


def _without_prefix(name: str, rows: list[Row]) -> list[Row]:
    """Some files made from SocratiQ keep its label in front of every context: "reasons_evidence: I think ..."."""
    labels = [PREFIX.match(row.context) for row in rows]
    if not rows or not all(labels):
        return rows
    warn(f"{name}: a label in front of every context, such as {labels[0][0]!r}, cut off in all {len(rows):,} rows")
    return [row._replace(context=row.context[label.end() :]) for row, label in zip(rows, labels, strict=True)]


# --- pairs ----------------------------------------------------------------------------------------------------------


def load_pairs(source: str) -> list[Pair]:
    """The pairs of a source, in its order; it can be all that `load_rows` takes. Raises UserError as that does."""
    pairs = []
    for name, records in _read_all(source, "make_pairs.py writes the file that --pairs takes"):
        fields = [_column(name, records, field) for field in ("prompt", "chosen", "rejected")]
        for place, record in records:
            _, chosen, rejected = (_text(place, record, field) for field in fields)
            if chosen == rejected:
                raise UserError(f"{place}: chosen and rejected are the same text; remove the row")
            prompt = _UNSEEN.sub("", record["prompt"])  # which keeps the newline at its end
            context, type_name = (str(record.get(field) or "") for field in ("context", "type"))
            pairs.append(Pair(prompt, chosen, rejected, context, type_name, place))
    if not pairs:
        raise UserError(f"{source}: no pairs in the file; run make_pairs.py")
    return pairs


# --- tidy text ------------------------------------------------------------------------------------------------------

_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# Control characters but for newline and tab; marks that turn the direction of writing or take no width and could hide
# text from the reader; halves of surrogate pairs, which no file can hold. The joiners of emoji and Indic scripts stay.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"
)


def clean(text: str) -> str:
    """The text in Unicode's composed form (NFC), newlines as \\n, without invisible characters, stripped."""
    text = _UNSEEN.sub("", _LINE_ENDS.sub("\n", text))
    return unicodedata.normalize("NFC", text).strip()


def _text(place: str, record: dict, column: str, needed: bool = True) -> str:
    """A value as tidy text. Raises UserError if it is no text, or empty where it is needed."""
    value = record.get(column)
    if not isinstance(value, str | None):
        kind = type(value).__name__
        raise UserError(f"{place}: the {column} is {_shorten(repr(value), 40)} ({kind}); write it as text")
    text = clean(value or "")
    if needed and not text:
        raise UserError(f"{place}: the {column} is empty; fill it in or remove the row")
    return text


def _shorten(text: str, longest: int = 60) -> str:
    """A text for a message: on one line, cut if long."""
    text = " ".join(clean(text).split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


# --- find and read --------------------------------------------------------------------------------------------------


def _read_all(source: str, hint: str) -> list[tuple[str, Records]]:
    """Name and records of every file, or split of a Hub data set. `hint` says how a missing source can be helped."""
    location = {"sample": str(SAMPLE), "socratiq": SOCRATIQ}.get(source, source)
    if os.path.isdir(location):
        return _read_folder(Path(location))
    if location.startswith(ADDRESS) and "@" in location.split("/")[2]:
        raise UserError("an address must not hold a name or password; download the file and name that")
    if os.path.exists(location) or location.startswith(ADDRESS):
        return [(source, _read(source, location))]
    hub_id = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+(:[\w.-]+)?", source)
    if not hub_id or os.path.exists(hub_id[1]) or source.lower().endswith(SUFFIXES):
        raise UserError(f"{source or repr(source)}: no such file or folder; {hint}")
    return _read_hub(source)


def _read_folder(folder: Path) -> list[tuple[str, Records]]:
    """The data files below a folder, by name. Those without questions describe the others, as `datasets` does it."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    files = [str(path) for path in found if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    tables = {name: _read(name, name) for name in files}
    if not tables:
        raise UserError(f"{folder}: no data files in this folder; expected files ending in {', '.join(SUFFIXES)}")
    data = {name: table for name, table in tables.items() if _names(table) & {"question", "cq", "target", "chosen"}}
    if data and len(data) < len(tables):
        warn(f"{folder}: files without a column of questions left out: {', '.join(sorted(tables.keys() - data))}")
    return list((data or tables).items())


def _read_hub(source: str) -> list[tuple[str, Records]]:
    """All splits of a data set of the Hub, which stays in the Hub's own cache."""
    import datasets

    repository, _, configuration = source.partition(":")
    try:
        splits = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # of many kinds, from several packages
        problem = "no such file or folder here, and the Hub gave no data set of that name"
        hint = "check the name (owner/name or owner/name:configuration), the network and `hf auth whoami`"
        raise UserError(f"{source}: {problem} ({_shorten(str(error.__cause__ or error), 200)}); {hint}") from None
    names = {split: f"{source} {split}" for split in splits}
    return [(name, _records(name, _rows_of_arrow(splits[split].data.table))) for split, name in names.items()]


def _read(name: str, location: str) -> Records:
    """The records of one file on the disk or at an address; `name` is what messages call it."""
    path = re.sub("[?#].*", "", location) if location.startswith(ADDRESS) else location
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{name}: unknown kind of file {suffix or '(no suffix)'!r}; expected {', '.join(SUFFIXES)}")
    try:
        with urllib.request.urlopen(location, timeout=60) if "://" in path else open(location, "rb") as file:
            content = file.read()
        if suffix in (".parquet", ".arrow"):
            return _records(name, _rows_of_arrow(_arrow_table(content, suffix)))
        text = content.decode("utf-8-sig")
        return _records(name, _read_csv(text) if suffix in (".csv", ".tsv") else _read_json(text, suffix))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        reason = f"byte 0x{error.object[error.start]:02x} in line {line} is not UTF-8; save it as UTF-8"
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        reason = _shorten(str(error).strip("<>"), 200)
    raise UserError(f"{name}: cannot be read ({reason}); correct the file or its name")


def _records(name: str, rows: Iterable) -> Records:
    """Rows of any format with their places, and their columns in lower case."""
    records = []
    for number, row in enumerate(rows, 1):
        place = f"{name} row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object of named fields, found {_shorten(json.dumps(row), 40)}")
        records.append((place, {column.strip().lower(): value for column, value in row.items()}))
    return records


def _read_csv(text: str) -> Iterator[dict]:
    """Separated by comma, semicolon or tab, whichever the header has most of, or as Excel's first line `sep=;` says."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 131,072 characters
    text = text.lstrip("\r\n")
    excel = re.match("sep=(.)\r?\n", text)
    delimiter = excel[1] if excel else max(",;\t", key=text.partition("\n")[0].count)
    lines = (line[0] for line in re.finditer(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+", text))
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    if excel:
        next(reader.reader)
    number = 1
    try:
        header = [cell.strip().lower() for cell in reader.fieldnames or ()]
        twice = [cell for cell in header if cell and header.count(cell) > 1]
        if twice:
            raise ValueError(f"two columns are named {twice[0]!r}; rename one")
        for row in reader:
            if any(row.pop(None, ())) or None in row.values():
                raise csv.Error(f"more or fewer cells than the {len(reader.fieldnames)} columns")
            yield row
            number += 1
    except csv.Error as error:
        hint = f"put a cell that holds {delimiter!r} or quotes in double quotes, and write its own quotes twice"
        raise ValueError(f"row {number}, around line {reader.line_num}: {error}; {hint}") from None


def _read_json(text: str, suffix: str) -> list:
    """One object after the other, each on a line or more; a .json file can hold a single table instead."""
    decoder, rows, end = json.JSONDecoder(), [], 0
    while found := re.compile(r"\S").search(text, end):
        value, end = decoder.raw_decode(text, found.start())
        rows.append(value)
    return _json_table(value) if suffix == ".json" and len(rows) == 1 else rows


def _json_table(value) -> list:
    """The rows of [row, ...], of the shared task's {name: {..., "cqs": [question, ...]}, ...}, or a single row."""
    if isinstance(value, list):
        return value
    texts = list(value.values()) if isinstance(value, dict) else []
    if texts and all(isinstance(text, dict) and isinstance(text.get("cqs"), list) for text in texts):
        return [text | asked if isinstance(asked, dict) else asked for text in texts for asked in text["cqs"]]
    return [value]


def _arrow_table(content: bytes, suffix: str):
    from pyarrow import BufferReader, ipc, parquet

    file = BufferReader(content)
    return parquet.read_table(file) if suffix == ".parquet" else ipc.open_stream(file).read_all()


def _rows_of_arrow(table) -> list[dict]:
    """`datasets` stores a class as a number: its name is put there, or None for -1, which means no label."""
    notes = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    rows = table.to_pylist()
    for column, feature in notes.get("info", {}).get("features", {}).items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            classes = dict(enumerate(feature["names"]))
            for row in rows:
                row[column] = classes.get(row.get(column))
    return rows


# --- split ----------------------------------------------------------------------------------------------------------


def split_by_context(rows: list, held_out: float = 0.1, seed: int = 0) -> tuple[list, list]:
    """Rows (or Pairs) to train on and those held out, about `held_out` of the contexts, no context on both sides.

    A hash of the seed and the context alone decides on which side a context falls; contexts that differ only in case or
    spacing are the same. The order of the rows does not matter, and adding rows moves no others. Each side gets at
    least one context if there are two (which can move that one, in tiny data); a single context stays in training, and
    nothing is held out. held_out = 0 holds nothing out. A Pair that does not know its context goes by its prompt.

    Raises UserError unless 0 <= held_out < 1.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"the share of contexts to hold out must be at least 0 and below 1, not {held_out}")
    contexts = [row.context or row.prompt for row in rows]
    positions = {context: _position(context, seed) for context in set(contexts)}
    order = sorted(set(positions.values()))
    limit = held_out if len(order) > 1 else 0.0
    if limit > 0:  # the first position is held out and the last one is not, whatever the share
        limit = min(max(limit, math.nextafter(order[0], 1)), order[-1])
    sides: tuple[list, list] = ([], [])
    for row, context in zip(rows, contexts, strict=True):
        sides[positions[context] < limit].append(row)
    return sides


def _position(context: str, seed: int) -> float:
    """Where a context lies between 0 and 1, evenly spread over contexts and reshuffled by the seed."""
    key = " ".join(context.casefold().split())
    return int.from_bytes(hashlib.sha256(f"{seed}\n{key}".encode()).digest()[:6], "big") / 2**48
