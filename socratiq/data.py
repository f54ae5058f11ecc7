"""Rows in: load, check, tidy, and split by context. A row is a context, a question about it, and the question's type.

    rows = load_rows("questions.csv")
    train, held_out = split_by_context(rows, held_out=0.1, seed=0)

Data sets of the Hugging Face Hub are read through `datasets`, files with the standard library and pyarrow: the readers
of files in `datasets` guess (1.50 becomes a number, "2020-01-01" a date), move every column by one where all rows have
a field too many, cannot say in which row a file is broken, and keep copies. Here, whatever is wrong ends as one
UserError that names file, row, field and mend, and a changed file is read anew.
"""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import unicodedata
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from socratiq.run.errors import UserError, warn
from socratiq.taxonomy import OTHERS, TYPES, display_name


class Row(NamedTuple):
    """One question about one text.

    context:  the text, tidied by `clean`
    question: one line, tidied by `clean`
    type:     display name such as "Cause to effect", "others" for what is no critical question, or "" for a question
              that carries a human verdict and no type: it serves for pairs, the scorer and the judge learn nothing of it
    source:   where it was read, for messages: "questions.csv row 12 (line 13)"
    preference: the human verdict: "chosen", "rejected", or "" if there is none
    """

    context: str
    question: str
    type: str
    source: str
    preference: str = ""


# Field of a row -> the column names in use, the first one found is read; upper and lower case do not matter.
COLUMNS = {
    "context": ("context", "thought"),
    "question": ("question",),
    "type": ("type", "label", "schema"),
}
# A human verdict on a question, in a column `preference` or, in the words of the shared task on critical questions of
# 2025 (ArgMining), in `label`, which then is no type.
VERDICTS = {"useful": "chosen", "unhelpful": "rejected", "invalid": "rejected"}
PAIRED_COLUMNS = ("input", "target")  # SocratiQ's full files: input is "type: context", target the question
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
SAMPLE = Path(__file__).parent / "sample" / "rows.jsonl"
SOCRATIQ = "https://raw.githubusercontent.com/NUS-IDS/eacl23_soqg/main/data/soqg_samples/"
SOCRATIQ_FILES = {  # split -> files; the test files are read only when asked for, lest somebody train on them unawares
    "train": ("train_chunk_I.csv", "train_chunk_II.csv", "train_chunk_III.csv"),
    "validation": ("valid.csv",),
    "test": ("test.csv",),
}
LONGEST_TYPE = 80  # characters; a longer "type" is a text from the wrong column
TOLERATED = 0.01  # share of unusable rows that a data set from elsewhere may have: its reader cannot mend them


# ---------------------------------------------------------------------------------------------------- load and check


def load_rows(source: str, split: str | None = None) -> list[Row]:
    """Every row of `source`, checked and tidied, in the order of the files.

    source: "sample" (the rows that come with the package), "socratiq" (the public SocratiQ files), a csv, tsv, json,
            jsonl or parquet file, a folder of them, an http(s) address of one, or a Hub id: "owner/name" or
            "owner/name:configuration"
    split:  only this split of a Hub data set, of SocratiQ, or of a folder whose files are named after their split;
            without it all splits one after the other (of SocratiQ: all but "test")

    An exact copy of an earlier row is left out, and a question that stands under two types is kept under both; a
    warning counts each. Raises UserError at the first unusable row; only data sets from the network, which cannot be
    mended in place, may have up to 1% of them, left out with a warning.
    """
    remote = source == "socratiq" or _is_address(source) or not _is_local(source)
    columns: dict[tuple, dict] = {}  # names of a record -> field -> column; a file has few sets of names
    texts: dict[str, str] = {}  # one copy of every context, however many questions it has
    seen: dict[tuple[str, str], dict] = {}  # (context, question) -> type -> verdicts
    rows, copies, unusable, first_problem = [], 0, 0, None
    for place, record in _records(source, split):
        try:
            context, question, type, preference = _fields(place, record, columns)
        except UserError as problem:
            if not remote:
                raise
            unusable += 1
            first_problem = first_problem or problem
            continue
        context = texts.setdefault(context, context)
        types = seen.setdefault((context, question), {})
        if preference in types.get(type, []):
            copies += 1
        else:
            types.setdefault(type, []).append(preference)
            rows.append(Row(context, question, type, place, preference))

    if unusable > TOLERATED * (len(rows) + copies + unusable):
        raise first_problem
    if not rows:
        raise UserError(f"{source}: holds no rows; a row needs a context, a question and a type")
    if unusable:
        warn(f"{source}: left out {_count(unusable, 'unusable row')}, the first being {first_problem}")
    if copies:
        warn(f"{source}: left out {_count(copies, 'exact copy', 'exact copies')} of earlier rows")
    disputed = [question for (_, question), types in seen.items() if len(types) > 1]
    if disputed:
        warn(
            f"{source}: {_count(len(disputed), 'question')} of the same context under more than one type, kept under "
            f"each; the first: {_shorten(disputed[0])!r}"
        )
    return rows


def _fields(place: str, record: dict, columns: dict) -> tuple[str, str, str, str]:
    """Context, question, type (display name) and preference of one record."""
    record, preference = _verdict(place, record)
    names = tuple(record)
    if names not in columns:
        columns[names] = _choose_columns(place, names, {"type"} if preference else set())
    column = columns[names]
    values = {field: _text(place, field, name, record[name]) for field, name in column.items()}
    if "input" in values:
        label, colon, context = values["input"].partition(":")
        if not colon or not context.strip() or len(label) > LONGEST_TYPE:
            raise UserError(
                f'{place}: column {column["input"]!r} must be "type: context", found {_shorten(values["input"])!r}'
            )
        context, question, type = context.strip(), values["target"], label
    else:
        context, question, type = values["context"], values["question"], values.get("type", "")
        context = _without_label(context)
    question = " ".join(question.split())
    if preference and not type:
        return context, question, "", preference
    name = display_name(" ".join(type.split()))
    if not name or len(name) > LONGEST_TYPE:
        raise UserError(
            f"{place}: the type is {_shorten(type)!r}; expected a name of at most {LONGEST_TYPE} characters such as "
            f"{TYPES[0].name!r}"
        )
    return context, question, name, preference


def _verdict(place: str, record: dict) -> tuple[dict, str]:
    """The record without its human verdict, and the verdict: "chosen", "rejected" or ""."""
    spelled = {str(name).strip().lower(): name for name in record}
    said = record.get(spelled.get("label"))
    if isinstance(said, str) and said.strip().lower() in VERDICTS:
        rest = {name: value for name, value in record.items() if name != spelled["label"]}
        return rest, VERDICTS[said.strip().lower()]
    said = record.get(spelled.get("preference"))
    if said is None or said == "":
        return record, ""
    word = str(said).strip().lower()
    if word not in ("chosen", "rejected", *VERDICTS):
        raise UserError(f"{place}: the preference is {_shorten(str(said))!r}; write chosen, rejected or nothing")
    return record, VERDICTS.get(word, word)


def _choose_columns(place: str, names: tuple, optional: set[str] = frozenset()) -> dict[str, str]:
    """Which column holds which field: {"context": "thought", ...} or {"input": "input", "target": "target"}."""
    spelled: dict[str, str] = {}
    for name in names:
        spelled.setdefault(str(name).strip().lower(), name)
    found = {field: [spelled[name] for name in known if name in spelled] for field, known in COLUMNS.items()}
    if not (found["context"] and found["question"]) and all(name in spelled for name in PAIRED_COLUMNS):
        return {name: spelled[name] for name in PAIRED_COLUMNS}
    for field, choices in found.items():
        if not choices and field not in optional:
            present = ", ".join(repr(_shorten(str(name), 20)) for name in names if str(name).strip()) or "none at all"
            raise UserError(
                f"{place}: no column for the {field}; the columns are {present}; name one of them "
                f"{' or '.join(repr(known) for known in COLUMNS[field])}"
            )
        if len(choices) > 1:
            warn(f"{place}: columns {' and '.join(map(repr, choices))} could be the {field}; reading {choices[0]!r}")
    return {field: choices[0] for field, choices in found.items() if choices}


def _columns_to_read(place: str, names: list[str]) -> list[str]:
    verdicts = [name for name in names if name.strip().lower() in ("label", "preference")]
    return list(dict.fromkeys([*_choose_columns(place, tuple(names), {"type"}).values(), *verdicts]))


def _text(place: str, field: str, column: str, value) -> str:
    """A value as tidy text, or the UserError that says what is wrong with it."""
    where = f"{place}: the {field}" + ("" if field == column else f" (column {column!r})")
    if value is None:
        raise UserError(f"{where} is missing; fill it in or remove the row")
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{where} is NaN; fill it in or remove the row")
    if not isinstance(value, str):
        raise UserError(f"{where} is {_shorten(repr(value), 40)} ({type(value).__name__}); write it as text")
    text = clean(value)
    if not text:
        raise UserError(f"{where} is empty; fill it in or remove the row")
    return text


# Case matters here: data sets write the label as `clarity: ...`, while a text may well begin with "Clarity: ...".
_LABEL = re.compile(rf"(?:{'|'.join(spelling for kind in TYPES for spelling in kind.spellings)}|{OTHERS}): *(?=\S)")


def _without_label(context: str) -> str:
    """Some files made from SocratiQ keep its label in the context ("reasons_evidence: I think ..."): cut it off."""
    label = _LABEL.match(context)
    return context[label.end() :] if label else context


# --------------------------------------------------------------------------------------------------------- tidy text

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


def _shorten(text: str, longest: int = 60) -> str:
    """A text for a message: on one line, cut if long."""
    text = " ".join(clean(text).split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _count(number: int, thing: str, things: str | None = None) -> str:
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


# ------------------------------------------------------------------------------------------------------- find and read


def _is_address(source: str) -> bool:
    return source.startswith(("https://", "http://"))


def _is_local(source: str) -> bool:
    """A file or folder, there or missing. What looks like owner/name, with no folder `owner` here, is a Hub id."""
    hub_id = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+(:[\w.-]+)?", source)
    return not hub_id or Path(hub_id[1]).exists() or _kind(source) in SUFFIXES


def _kind(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _records(source: str, split: str | None) -> Iterator[tuple[str, dict]]:
    """(place, record) of every row of `source`, in order. A record maps column names to values, unchecked."""
    if source == "sample":
        if not SAMPLE.exists():
            raise UserError(f"{SAMPLE}: the rows of --data sample are missing; install the package again")
        _no_split(source, split)
        yield from _read(SAMPLE, SAMPLE.suffix, "sample")
    elif source == "socratiq":
        if split not in (None, *SOCRATIQ_FILES):
            raise UserError(f"socratiq: has no split {split!r}; choose one of {', '.join(SOCRATIQ_FILES)}")
        for name in [name for part in ([split] if split else ("train", "validation")) for name in SOCRATIQ_FILES[part]]:
            with _downloaded(SOCRATIQ + name) as path:
                yield from _read(path, ".csv", name)
    elif _is_address(source):
        _no_split(source, split)
        with _downloaded(source) as path:
            yield from _read(path, _kind(urlsplit(source).path), source)
    elif not _is_local(source):
        yield from _read_hub(source, split)
    elif os.path.isdir(source):
        for path in _files(Path(source), split):
            yield from _read(path, path.suffix.lower(), str(path))
    elif os.path.exists(source):
        _no_split(source, split)
        yield from _read(Path(source), _kind(source), source)
    else:
        raise UserError(
            f"{source or repr(source)}: no such file or folder; --data takes sample, socratiq, a file, a folder, "
            "an https address or a Hub id owner/name"
        )


def _no_split(source: str, split: str | None) -> None:
    if split is not None:
        raise UserError(f"{source}: a single file has no split {split!r}; leave the split out or give a folder")


def _files(folder: Path, split: str | None) -> list[Path]:
    """The data files below a folder, by name; with a split those named after it: train.csv, data/train-0001.parquet."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{folder}: no data files in this folder; expected files ending in {', '.join(SUFFIXES)}")
    if split is not None:
        files = [path for path in files if re.match(rf"{re.escape(split)}(?![a-z])", path.name)]
        if not files:
            raise UserError(f"{folder}: no file is named after the split {split!r}, such as {split}.csv")
    return files


def _read(path: Path, kind: str, name: str) -> Iterator[tuple[str, dict]]:
    """The records of one local file of this kind (suffix); `name` is what messages call it."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".parquet": _read_parquet}
    readers |= {".jsonl": _read_json_lines, ".ndjson": _read_json_lines}
    if kind not in readers:
        raise UserError(f"{name}: unknown kind of file {kind or '(no suffix)'!r}; expected {', '.join(SUFFIXES)}")
    try:
        with open(path, "rb") as file:
            head = file.read(256)
        if not head:
            raise UserError(f"{name}: the file is empty; it must hold at least one row")
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{name}: the file is in UTF-16; save it as UTF-8")
        if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
            raise UserError(f"{name}: the file is a web page, not data; give the address of the raw file")
        yield from readers[kind](path, name)
    except UnicodeDecodeError:
        raise _not_utf8(path, name) from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None


def _not_utf8(path: Path, name: str) -> UserError:
    """Where a file stops being UTF-8; decoders only know the place in their own buffer."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return UserError(
                    f"{name} line {number}: byte 0x{line[error.start]:02x} at position {error.start + 1} is not UTF-8; "
                    "save the file as UTF-8"
                )
    return UserError(f"{name}: not UTF-8; save the file as UTF-8")


def _read_csv(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    """Separated by comma, semicolon or tab, whichever the header has most of; a cell in quotes may hold newlines."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 131,072 characters
    with open(path, encoding="utf-8-sig", newline="") as file:
        delimiter = max(",;\t", key=file.readline().count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header, number, line = None, 0, 1
        try:
            for cells in reader:
                first_line, line = line, reader.line_num + 1
                if not cells:  # an empty line
                    continue
                if header is None:
                    header = cells
                    twice = next((cell for cell in cells if cell.strip() and cells.count(cell) > 1), None)
                    if twice is not None:
                        raise UserError(f"{name} line {first_line}: two columns are named {twice!r}; rename one")
                    continue
                number += 1
                place = f"{name} row {number} (line {first_line})"
                if len(cells) < len(header) or any(cells[len(header) :]):
                    fewer = "fill in the missing cells or remove the row"
                    mend = (
                        fewer if len(cells) < len(header) else f"put a cell that holds {delimiter!r} in double quotes"
                    )
                    raise UserError(
                        f"{place}: {_count(len(cells), 'cell')} under {_count(len(header), 'column')}; {mend}"
                    )
                yield place, dict(zip(header, cells, strict=False))
        except csv.Error as error:
            raise UserError(
                f"{name} row {number + 1} (line {line}): broken csv ({error}); close every quote, and write a quote "
                "inside a cell twice"
            ) from None


def _parse(text: str, place: str):
    """The value that a JSON text stands for."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{place}: not JSON that can be read (nested too deeply)") from None
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f"line {error.lineno} "
        raise UserError(f"{place}: not JSON from {line}character {error.colno} on ({error.msg}); mend it") from None
    except ValueError as error:  # a number with thousands of digits
        raise UserError(f"{place}: not JSON that can be read ({error})") from None


def _read_json_lines(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{name} line {number}"
                yield place, _record(_parse(line.rstrip(), place), place)


def _read_json(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    """[row, ...], {"data": [row, ...]}, {"context": [...], "question": [...], ...}, or JSON lines after all."""
    text = path.read_text(encoding="utf-8-sig")
    first_line, _, others = text.strip().partition("\n")
    if others and first_line.rstrip().endswith("}") and first_line.startswith("{"):
        yield from _read_json_lines(path, name)
        return
    value = _parse(text, name)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict) and value and all(isinstance(x, dict) and "cqs" in x for x in value.values()):
        value = [
            {"context": text.get("intervention"), "question": asked.pop("cq", None), **asked}
            for text in value.values()
            for asked in text["cqs"]
        ]
    if isinstance(value, dict) and value and all(isinstance(column, dict | list) for column in value.values()):
        value = _rows_of_columns(value, name)
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"{name} row {number}"
        yield place, _record(row, place)


def _rows_of_columns(columns: dict, name: str) -> list[dict]:
    """The form in which pandas writes a table: {"context": {"0": ..., "1": ...}, ...}, or the same with lists."""
    lists = {key: list(column.values()) if isinstance(column, dict) else column for key, column in columns.items()}
    if len({len(column) for column in lists.values()}) > 1:
        lengths = ", ".join(f"{_shorten(key, 20)!r} {len(column)}" for key, column in lists.items())
        raise UserError(f"{name}: the columns differ in length ({lengths}); expected a list of rows")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _record(value, place: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object of named fields, found {_shorten(json.dumps(value), 40)}")
    return value


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(path)
        columns = _columns_to_read(name, table.schema_arrow.names)
        notes = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))  # written by `datasets`
        features = notes.get("info", {}).get("features", {})
        classes = {column: features.get(column, {}).get("names") for column in columns}
        batches = table.iter_batches(batch_size=1000, columns=columns)
        for number, record in enumerate((record for batch in batches for record in batch.to_pylist()), 1):
            yield f"{name} row {number}", _with_class_names(record, classes)
    except ArrowException as error:
        raise UserError(f"{name}: not a parquet file that can be read ({_first_line(error)}); write it anew") from None


def _read_hub(source: str, split: str | None) -> Iterator[tuple[str, dict]]:
    """A data set of the Hub, kept in the Hub's own cache. All its splits one after the other, or the named one."""
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # what goes wrong becomes our one line
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    repository, _, configuration = source.partition(":")
    try:
        splits = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # of many kinds, from several packages
        if "Config name is missing" in str(error):
            names = ", ".join(datasets.get_dataset_config_names(repository))
            raise UserError(f"{source}: has several configurations; name one as {source}:NAME ({names})") from None
        raise UserError(
            f"{source}: no such file or folder here, and the Hub could not provide a data set of that name "
            f"({_first_line(error)}); mend the name or the network, or log in with `hf auth login` if it is gated"
        ) from None
    if split is not None and split not in splits:
        raise UserError(f"{source}: has no split {split!r}; choose one of {', '.join(splits)}")
    for part in [split] if split else splits:
        name, table = f"{source} {part}", splits[part]
        columns = _columns_to_read(name, table.column_names)
        classes = {column: getattr(table.features[column], "names", None) for column in columns}
        for number, record in enumerate(table.select_columns(columns), 1):
            yield f"{name} row {number}", _with_class_names(record, classes)


def _with_class_names(record: dict, classes: dict) -> dict:
    """`datasets` stores a class as a number; put its name there, or None for -1, which means no label."""
    for column, names in classes.items():
        if names and isinstance(record[column], int):
            record[column] = names[record[column]] if 0 <= record[column] < len(names) else None
    return record


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)[:200].rstrip(".")


@contextmanager
def _downloaded(address: str) -> Iterator[Path]:
    """The file at an address, as a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer, open(path, "wb") as file:
                shutil.copyfileobj(answer, file)
        except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors, a malformed address a ValueError
            reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
            raise UserError(
                f"{address}: could not be fetched ({reason}); mend the address or the network, or download the file "
                "elsewhere and give its path"
            ) from None
        yield path


# ------------------------------------------------------------------------------------------------------------- split


def split_by_context(rows: list, held_out: float = 0.1, seed: int = 0) -> tuple[list, list]:
    """Rows (or Pairs) to train on and those held out, about `held_out` of the contexts, no context on both sides.

    Which side a context falls on is decided by a hash of the seed and the context alone, contexts that differ in case
    or spacing being the same: the order of the rows does not matter, and adding rows moves no others. Each side gets at
    least one context if there are two (which can move that one, in tiny data); a single context stays in training,
    and nothing is held out. held_out = 0 holds nothing out. A Pair that does not know its context goes by its prompt.

    Raises UserError unless 0 <= held_out < 1.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"the share of contexts to hold out must be at least 0 and below 1, not {held_out}")
    contexts = [row.context or row.prompt for row in rows]
    places = {context: _place(context, seed) for context in set(contexts)}
    order = sorted(set(places.values()))
    limit = held_out if len(order) > 1 else 0.0
    if limit > 0:  # the first place is held out and the last one is not, whatever the share
        limit = min(max(limit, math.nextafter(order[0], 1)), order[-1])
    held = [places[context] < limit for context in contexts]
    return list(compress(rows, [not out for out in held])), list(compress(rows, held))


def _place(context: str, seed: int) -> float:
    """Where a context lies between 0 and 1, evenly spread over contexts and reshuffled by the seed."""
    key = " ".join(context.casefold().split())
    return int.from_bytes(hashlib.sha256(f"{seed}\n{key}".encode()).digest()[:6], "big") / 2**48


# --- pairs ----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A prompt with a better and a worse answer: one line of runs/pairs.jsonl, or of anybody's preference data."""

    prompt: str
    chosen: str
    rejected: str
    context: str  # "" if the line has none
    type: str  # "" if the line has none
    source: str  # "runs/pairs.jsonl line 12"


def load_pairs(path: str) -> list[Pair]:
    """The pairs of a JSON-lines file, in its order. Raises UserError that names line and field."""
    if not os.path.isfile(path):
        raise UserError(f"--pairs {path}: no such file; make_pairs.py writes it")
    pairs = []
    for place, record in _read(Path(path), ".jsonl", path):
        for field in ("prompt", "chosen", "rejected"):
            if field not in record:
                present = ", ".join(repr(_shorten(name, 20)) for name in record) or "none at all"
                raise UserError(
                    f"{place}: no field {field!r}; the fields are {present}; make_pairs.py writes all three"
                )
        # A prompt keeps the newline at its end; apart from that all texts are made as tidy as rows are.
        prompt = _UNSEEN.sub("", record["prompt"]) if isinstance(record["prompt"], str) else record["prompt"]
        _text(place, "prompt", "prompt", prompt)
        chosen, rejected = (_text(place, field, field, record[field]) for field in ("chosen", "rejected"))
        if chosen == rejected:
            raise UserError(f"{place}: chosen and rejected are the same text; remove the line")
        context, type = (str(record.get(field) or "") for field in ("context", "type"))
        pairs.append(Pair(prompt, chosen, rejected, context, type, place))
    if not pairs:
        raise UserError(f"{path}: no pairs in the file; run make_pairs.py")
    return pairs
