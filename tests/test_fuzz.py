"""Whatever is thrown at the loaders and at the template: rows or one clear line, and never a control token."""

import csv
import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from socratiq.data import Row, clean, load_rows, split_by_context
from socratiq.prompts import TEMPLATE_HEAD, TEMPLATE_TAIL, build_prompt, encode_completion, encode_prompt
from socratiq.run.errors import UserError
from socratiq.taxonomy import TYPES, display_name

# The same examples in every run, and no clock: a shared machine is slow at times.
fuzz = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Texts in which the things that matter turn up far more often than among random letters.
MARKERS = ["### Response:\n", "\n\n### Response:\n", "### Input:\n", "### Instruction:", "{type}", "{context}"]
CONTROLS = "<|im_end|> <|im_start|>system\n <|endoftext|> <s> </s> <unk> [INST] <|eot_id|> <pad> <think> </tool_call>"
PIECES = [TEMPLATE_HEAD, *MARKERS, *CONTROLS.split(" "), "clarity: ", "others: ", "Why? ", "NA", "null", "nan", "None"]
PIECES += [*",\"'\n\r\t;\\\0 ?", "\r\n", "\x1b[31m", "\u202e", "\u200b", "\ufeff", "\u2028", "\x85"]
PIECES += ["é", "e\u0301", "👩‍👩‍👧", "漢字", "ﷺ", "𝕳"]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=8).map("".join)
whole_texts = texts.filter(lambda text: clean(text))
labels = st.sampled_from([spelling for kind in TYPES for spelling in kind.spellings] + ["others", "moral_appeal"])
COLUMNS = ("context", "thought", "question", "type", "label", "schema", "input", "target", "preference", "Context")
names = st.sampled_from([*COLUMNS, "intervention", "cqs"])
values = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.lists(texts, max_size=2)


def check(rows, typed=True):
    """What every row that was loaded promises."""
    assert rows and len({(*row[:3], row.preference) for row in rows}) == len(rows)
    for row in rows:
        assert row.context and row.question and row.source and (row.type or not typed)
        assert row.preference in ("", "chosen", "rejected")
        assert clean(row.context) == row.context and clean(row.question) == row.question
        assert display_name(row.type) == row.type
        assert not set(row.question + row.type) & set("\n\r\t\x00\u2028\u202e\ufeff")
        row.context.encode(), row.question.encode(), row.type.encode()


def load(path, typed=True):
    """Rows that keep their promise, or an error of one line that names the file."""
    try:
        check(load_rows(str(path)), typed)
    except UserError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1000, message


# ------------------------------------------------------------------------------------------------------------ loaders


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
@fuzz
@given(st.data())
def test_any_bytes(tmp_path, suffix, data):
    heads = [b"", b"context,question,type\n", b"input\ttarget\n", b'[{"context": "', b"PAR1", b"{"]
    content = data.draw(st.sampled_from(heads))
    content += data.draw(st.binary(max_size=60) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    load(path)


@fuzz
@given(st.lists(st.dictionaries(names, values, max_size=5) | values, max_size=4), st.booleans(), st.booleans())
def test_any_json(tmp_path, records, as_lines, ascii):
    as_ascii = ascii or any("\ud800" <= letter <= "\udfff" for letter in json.dumps(records, ensure_ascii=False))
    dumped = [json.dumps(record, ensure_ascii=as_ascii) for record in records]
    path = tmp_path / ("rows.jsonl" if as_lines else "rows.json")
    path.write_text("\n".join(dumped) if as_lines else f"[{', '.join(dumped)}]", encoding="utf-8")
    load(path, typed=not any(isinstance(record, dict) and "preference" in record for record in records))


@fuzz
@given(st.lists(st.lists(texts, min_size=2, max_size=5), max_size=5), st.sampled_from([",", ";", "\t"]))
def test_any_csv(tmp_path, records, delimiter):
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file, delimiter=delimiter).writerows([["context", "question", "type"], *records])
    load(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@fuzz
@given(records=st.lists(st.tuples(whole_texts, whole_texts, labels), min_size=1, max_size=4))
def test_what_is_written_comes_back(tmp_path, capsys, suffix, records):
    records = [(f"text {context}", f"why {question}", label) for context, question, label in records]
    names, path = ("context", "question", "type"), tmp_path / f"rows.{suffix}"
    with open(path, "w", newline="", encoding="utf-8", errors="ignore") as file:
        if suffix == "csv":
            csv.writer(file).writerows([names, *records])
        else:
            file.writelines(f"{json.dumps(dict(zip(names, r, strict=True)), ensure_ascii=False)}\n" for r in records)
    expected = [(clean(c), " ".join(clean(q).split()), display_name(label)) for c, q, label in records]
    rows = load_rows(str(path))
    assert [row[:3] for row in rows] == list(dict.fromkeys(expected))
    check(rows)
    capsys.readouterr()


@fuzz
@given(texts)
def test_clean_texts_stay_clean(text):
    tidy = clean(text)
    assert clean(tidy) == tidy
    tidy.encode()  # no half of a surrogate pair is left
    assert all(letter.isprintable() or letter in "\n\t" or ord(letter) > 127 for letter in tidy)
    letters, kept = ([c for c in said if c in string.ascii_letters] for said in (text, tidy))
    assert letters == kept or "\u0301" in text


@fuzz
@given(labels | texts)
def test_any_label_has_one_display_name(label):
    name = display_name(label)
    assert display_name(name) == name
    assert display_name(f"  {label} ") == name


@fuzz
@given(
    st.lists(st.sampled_from([f"text {n}" for n in range(12)] + ["TEXT  1", "text\n2"]), max_size=30),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 5),
)
def test_any_split(contexts, share, seed):
    rows = [Row(context, f"{n}?", "Clarity", "here") for n, context in enumerate(contexts)]
    sides = split_by_context(rows, share, seed)
    assert sorted(sides[0] + sides[1]) == sorted(rows)
    train, held_out = ({" ".join(row.context.lower().split()) for row in side} for side in sides)
    assert not train & held_out
    assert len(train | held_out) < 2 or share == 0 or (train and held_out)


# ----------------------------------------------------------------------------------------------------------- template


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def tokenizer(request):
    from socratiq.models import load_tokenizer

    found = load_tokenizer(request.param)
    found.add_tokens(["<think>", "</tool_call>"])  # as ordinary tokens, as Qwen3's tokenizer has them
    return found


# SmolLM2's vocabulary has no bytes for the planes of Unicode that hold no letters yet.
contexts = whole_texts.map(clean).filter(lambda text: not any(0x40000 <= ord(letter) < 0xE0000 for letter in text))
questions = contexts.map(lambda text: " ".join(text.split()))


@fuzz
@given(contexts, questions, st.sampled_from([kind.name for kind in TYPES] + ["Moral {type} appeal"]))
def test_prompt_and_question_can_be_told_apart(context, question, type):
    prompt = build_prompt(context, type)
    head = TEMPLATE_HEAD.replace("{type}", type)
    assert prompt == head + context + TEMPLATE_TAIL
    # A question is one line, so the last tail is the template's own, whatever markers stand in the context.
    assert (prompt + question).rpartition(TEMPLATE_TAIL) == (head + context, TEMPLATE_TAIL, question)


@fuzz
@given(context=contexts, question=questions)
def test_texts_never_become_control_tokens(tokenizer, context, question):
    controls = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    prompt = encode_prompt(tokenizer, context, "Clarity", 10_000)
    completion = encode_completion(tokenizer, question)
    assert not controls & set(prompt[1:])
    assert prompt[0] not in controls - {tokenizer.bos_token_id}
    assert not controls & set(completion[:-1]) and completion[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(completion[:-1]) == question


@fuzz
@given(context=contexts, repeats=st.integers(1, 60), room=st.integers(0, 120))
def test_a_long_context_loses_its_tail_and_nothing_else(tokenizer, context, repeats, room):
    context = clean(f"Once {context} " * repeats)
    least = len(encode_prompt(tokenizer, "", "Clarity", 10_000))
    prompt = encode_prompt(tokenizer, context, "Clarity", least + room)
    assert len(prompt) <= least + room
    text = tokenizer.decode(prompt)
    head = TEMPLATE_HEAD.replace("{type}", "Clarity")
    assert text.startswith(head) and text.endswith(TEMPLATE_TAIL)
    kept = text.removeprefix(head).removesuffix(TEMPLATE_TAIL)
    assert context.startswith(kept)
    if kept != context:  # what was cut had to be: little room is left
        assert len(prompt) > least + room / 2 - 12
