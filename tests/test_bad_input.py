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

import pandas
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


def pair(**changed) -> bytes:
    return json.dumps({**PAIR, **changed}).encode()


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
PAIR = {"prompt": "Ask.", "chosen": "Why?", "rejected": "What?"}
NAME = "; expected a name of at most 80 characters such as 'Cause to effect'"

FILES = [  # each message begins with the path of the file; tests/test_fuzz.py tries files of any other content
    # ---- files that are not what they are called
    ("rows.csv", b"", NOTHING),
    ("rows.csv", b"context,question,type\n", NOTHING),
    ("rows.jsonl", b" \n", NOTHING),
    ("rows.json", b"[]", NOTHING),
    ("rows.txt", GOOD, f": unknown kind of file '.txt'; expected {KINDS}"),
    ("rows", GOOD, f": unknown kind of file '(no suffix)'; expected {KINDS}"),
    ("rows.csv", GOOD.decode().encode("utf-16"), ": cannot be read (byte 0xff in line 1 is not UTF-8; save ..."),
    ("rows.json", b'[{"context":\n"caf\xe9"}]', ": cannot be read (byte 0xe9 in line 2 is not UTF-8; save it as ..."),
    ("rows.parquet", GOOD, ": cannot be read (...)" + UNREADABLE),
    ("rows.arrow", GOOD, ": cannot be read (...)" + UNREADABLE),
    # ---- columns
    ("rows.csv", b"text,ask\na,b\n", ": no column for the context; the columns are 'ask', 'text'" + COLUMNS),
    ("rows.csv", b"context,ask,type\na,b,c\n", ": no column for the question; ...; name one of them question or cq"),
    ("rows.csv", b"thought,Question,kind\na,b,c\n", ": no column for the type; ...; name one of them type or ..."),
    ("rows.csv", b"input,question\na: b,c\n", ": no column for the context; ..." + COLUMNS),
    ("rows.jsonl", json_line() + b'{"context": "a", "type": "b"}\n', f" row 3: the question {EMPTY}"),
    ("rows.json", b"[{}]", ": no column for the context; the columns are none at all" + COLUMNS),
    # ---- csv
    ("rows.csv", csv_row(b"Well, yes.,Why?,clarity"), MANY.format(2, 3) + CELLS),
    # all rows too long by one: readers that guess shift them
    ("rows.csv", b"context,question,type\nWell, yes.,Why?,clarity\n", MANY.format(1, 2) + CELLS),
    ("rows.csv", csv_row(b"Some text.,Why?"), MANY.format(2, 3) + CELLS),
    ("rows.csv", csv_row(b'"A\nb.",a,b\n"No end,a,b\nc'), ": cannot be read (row 3, around line 4: ..." + CELLS),
    ("rows.csv", b"context,question,type,Type\na,b,c,d\n", ": cannot be read (two columns are named 'type'; ..."),
    ("rows.csv", csv_row(b'"He" said.,Why?,clarity'), ": cannot be read (row 2, around line 2: ..." + CELLS),
    # ---- fields
    ("rows.csv", csv_row(b",Why?,clarity"), f" row 2: the context {EMPTY}"),
    ("rows.csv", csv_row(b'Some text.,"  \n ",clarity'), f" row 2: the question {EMPTY}"),
    ("rows.csv", csv_row(b"Some text.,Why?,"), f" row 2: the type {EMPTY}"),
    # a zero-width space and a control character
    ("rows.csv", b"thought,question,label\n\xe2\x80\x8b\x01,Why?,b\n", f" row 1: the thought {EMPTY}"),
    ("rows.csv", csv_row(b"a,b?," + b"A text and no type. " * 9), " ... the type is 'A text ...'" + NAME),
    ("rows.csv", csv_row(b"Some text.,Why?,-"), " row 2: the type is '-'" + NAME),
    ("rows.csv", b"input,target\na: A text.,Why?\nWithout a type.,Why?\n", f" row 2: the context {EMPTY}"),
    ("rows.csv", b"input,target\nclarity: A text.,\n", f" row 1: the question {EMPTY}"),
    ("rows.csv", b"thought,cq,preference\na,b,good\n", " ...: the preference is 'good'; write chosen, rejected ..."),
    ("rows.jsonl", json_line(question=3), " row 2: the question is 3 (int); write it as text"),
    ("rows.jsonl", json_line(context=["a", "b"]), " row 2: the context is ['a', 'b'] (list); write it as text"),
    ("rows.jsonl", json_line(context=None), f" row 2: the context {EMPTY}"),
    ("rows.jsonl", json_line(context=float("nan")), " row 2: the context is nan (float); write it as text"),
    # ---- json
    ("rows.jsonl", json_line() + b'{"context": "Some te', ": cannot be read (Unterminated string ...: line 3 ..."),
    ("rows.jsonl", b"{'context': 'a'}\n", ": cannot be read (...: line 1 column 2 (char 1))" + UNREADABLE),
    ("rows.jsonl", json_line() + b'["a", "b"]\n', ' row 3: expected an object of named fields, found ["a", "b"]'),
    ("rows.json", b'[{"context": "a"},\n{]', ": cannot be read (...: line 2 column 2 (char 20))" + UNREADABLE),
    ("rows.json", b'[1, {"context": "a"}]', " row 1: expected an object of named fields, found 1"),
    ("rows.json", b"[" * 100_000, ": cannot be read (maximum recursion depth exceeded...)" + UNREADABLE),
    ("rows.json", b"[" + b"9" * 5000 + b"]", ": cannot be read (...)" + UNREADABLE),
    ("rows.json", b'{"context": "a", "cq": "b", "type": ["c", "d"]}', " row 1: the type is ['c', 'd'] (list); ..."),
    # ---- the shared task's format
    ("rows.json", b'{"A": {"intervention": "a", "cqs": ["b"]}}', " row 1: expected an object of named fields, ..."),
    ("rows.json", b'{"A": {"intervention": "a", "cqs": [{"label": "Useful"}]}}', ": no column for the question; ..."),
    ("rows.json", b'{"A": {"cqs": [{"cq": "b", "label": "Useful"}]}}', ": no column for the context; ..."),
    # ---- pairs, which the same readers read
    ("pairs.jsonl", b"\n", ": no pairs in the file; run make_pairs.py"),
    ("pairs.jsonl", b'{"bad": "b"}', ": no column for the prompt; the columns are 'bad'; name one of them prompt"),
    ("pairs.jsonl", pair(chosen=" \n"), f" row 1: the chosen {EMPTY}"),
    ("pairs.jsonl", pair(chosen="What? \u200b"), " row 1: chosen and rejected are the same text; remove the row"),
    ("pairs.jsonl", pair(rejected=3), " row 1: the rejected is 3 (int); write it as text"),
    ("pairs.jsonl", pair(prompt=["Ask."]), " row 1: the prompt is ['Ask.'] (list); write it as text"),
]


@pytest.mark.parametrize("name, content, expected", FILES)
def test_bad_files(tmp_path, capsys, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    load = load_pairs if "pairs" in name else load_rows
    assert_same(message_of(capsys, lambda: load(str(path))), str(path) + expected)


def test_a_bad_cell_of_a_table(tmp_path, capsys):
    path = tmp_path / "rows.parquet"
    pandas.DataFrame({"context": ["a", "b"], "question": ["a?", None], "type": ["c", "d"]}).to_parquet(path)
    assert_same(message_of(capsys, lambda: load_rows(str(path))), f"{path} row 2: the question {EMPTY}")


HOW = "no such file or folder; --data takes sample, socratiq, a file, a folder, an address or a Hub id"
SOURCES = [
    ("gone.csv", f"gone.csv: {HOW}"),
    ("sampel", f"sampel: {HOW}"),
    ("folder/gone", f"folder/gone: {HOW}"),
    ("", f"'': {HOW}"),
    ("x" * 5000, f"xxx...xxx: {HOW}"),
    ("folder", f"folder: no data files in this folder; expected files ending in {KINDS}"),
    ("full", "full/bad.csv: no column for the context; the columns are 'a', 'b'" + COLUMNS),
    ("a/b", "a/b: no such file or folder here, and the Hub gave no data set of that name (...); check the name ..."),
    ("http://me:pw@host/a.csv", "an address must not hold a name or password; download the file and name that"),
    ("https://[broken/rows.csv", "https://[broken/rows.csv: cannot be read (...)" + UNREADABLE),
]


@pytest.mark.parametrize("source, expected", SOURCES)
def test_bad_sources(tmp_path, monkeypatch, capsys, source, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "bad.csv").write_text("a,b\n1,2\n")
    assert_same(message_of(capsys, lambda: load_rows(source)), expected)


# ---------------------------------------------------------------------------------------------------- the four scripts

# Short names in the tables below; what a command names more than once, the last one counts.
COMMANDS = {
    "SFT": "train_sft --model tiny --data two.jsonl --steps 1",
    "PAIRS": "make_pairs --policy tiny --writer local --data two.jsonl --scorer scorer.new --scorer-model none",
    "DPO": "train_dpo --model tiny --pairs pairs.jsonl --steps 1",
    "PPO": "train_ppo --model tiny --data two.jsonl --steps 1 --scorer scorer --allow-bare-scorer",
}

ARGUMENTS = [  # before anything slow is imported; each message ends in (see SCRIPT --help)
    ("train_sft --batch-size x", "argument --batch-size: 'x' is not a whole number"),
    ("train_sft --epochs 1.5", "argument --epochs: '1.5' is not a whole number"),
    ("train_sft --dtype int8", "argument --dtype: invalid choice: 'int8' (...)"),
    ("train_sft --device tpu", "argument --device: invalid choice: 'tpu' (...)"),
    ("train_sft --batch 4", "unrecognized arguments: --batch 4"),
    ("train_sft --model", "argument --model: expected one argument"),
    ("train_dpo --label-smoothing 0.5", "argument --label-smoothing: must be below 0.5, not 0.5"),
    ("train_dpo --label-smoothing 0.1 --loss ipo", "--label-smoothing: only the sigmoid loss knows it;..."),
    ("train_dpo --loss kto", "argument --loss: invalid choice: 'kto' (...)"),
    ("train_ppo --kl-target 1 --kl-coef 0", "--kl-target: multiplies --kl-coef, which must then be above 0"),
    (f"train_sft --seed {2**64}", f"argument --seed: must be at most {2**63 - 1}, not {2**64}"),
    ("train_ppo --kl-target 1 --kl-horizon 10", "--kl-horizon: must be above a fifth of an iteration's samples,..."),
    ("make_pairs --usd-per-mtok -1 1", "argument --usd-per-mtok: must be at least 0, not -1"),
    ("make_pairs --rejected-max 0.9", "--rejected-max 0.9: must not be above --chosen-min 0.4"),
    ("make_pairs --shard 5/4", "argument --shard: '5/4' is not like 1/4, the first of four parts"),
    ("make_pairs --max-usd 1", "--max-usd: give the prices too, --usd-per-mtok IN OUT"),
    ("make_pairs --writer pigeon", "argument --writer: invalid choice: 'pigeon' (...)"),
]
BOUNDS = {  # what is said of a number, and the options that refuse it
    "must be at least 1, not 0": ["train_sft --steps", "train_ppo --samples-per-prompt", "make_pairs --limit"],
    "must be at least 1, not -3": ["train_sft --batch-size", "make_pairs --concurrency"],
    "must be at least 0, not -1": ["train_sft --lora-rank", "train_ppo --kl-coef"],
    "must be above 0, not 0": ["train_sft --lr", "train_dpo --beta", "train_ppo --temperature"],
    "must be above 0, not nan": ["train_sft --lr", "make_pairs --timeout"],
    "must be finite, not inf": ["train_dpo --beta"],
    "must be below 1, not 1": ["train_sft --held-out", "make_pairs --held-out"],
    "must be at most 1, not 1.1": ["train_ppo --gamma", "make_pairs --chosen-min"],
}
for said, options in BOUNDS.items():
    number = said.split()[-1]
    ARGUMENTS += [(f"{option} {number}", f"argument {option.split()[1]}: {said}") for option in options]
MODELS = "name smollm2, tiny, a folder that a stage wrote, or a Hub id owner/name"
NO_SCORER = ": no scorer that can be read (...); fit one with python -m socratiq.scorer --out "
SEEN = "--scorer scorer was fitted on 1 of the 1 held-out texts; delete it, and make_pairs.py will fit it anew"
TOO_FEW = "too few rows to fit a scorer: it needs questions of a type, about at least a handful of texts"
PICKLED = "pickled: no *.safetensors in the folder (pickled weights are never loaded)"
NOT_OURS = "exists and is no run of train_sft.py; name another place"
NOT_MADE_HERE = "a folder, or not made here (no ... beside it); choose another (...)"
RUNS = [
    # ---- data
    ("SFT --data gone.csv", f"gone.csv: {HOW}"),
    ("SFT --data others.jsonl", "others.jsonl: no rows to learn from: all are labelled 'others' or ...; add others"),
    ("SFT --data bad.csv", f"bad.csv row 1: the question {EMPTY}"),
    ("SFT --max-prompt-tokens 5", "--max-prompt-tokens 5: the template alone takes ... tokens; allow more than that"),
    ("DPO --pairs gone.jsonl", "gone.jsonl: no such file or folder; make_pairs.py writes the file that --pairs takes"),
    ("DPO --pairs two.jsonl", "two.jsonl: no column for the prompt; the columns are 'context', 'question', ..."),
    ("DPO --pairs long.jsonl", "long.jsonl row 1: the prompt has ... tokens; raise --max-prompt-tokens or remove ..."),
    ("PPO --data gone.csv", f"gone.csv: {HOW}"),
    ("PAIRS --data gone.csv", f"gone.csv: {HOW}"),
    ("PAIRS --data others.jsonl", TOO_FEW),
    ("PAIRS --data one.jsonl", TOO_FEW),
    ("PAIRS --writer openai", "set OPENAI_API_KEY, or give --base-url of a server that wants no key"),
    # ---- models
    ("SFT --model ./gone", f"--model ./gone: no such folder; {MODELS}"),
    ("DPO --model runs/sft", f"--model runs/sft: no such folder; {MODELS}"),
    ("SFT --model smolm2", f"--model smolm2: no such folder; {MODELS}"),
    ("SFT --model=", f"--model : no such folder; {MODELS}"),
    ("SFT --model nobody/nothing", "--model nobody/nothing: no tokenizer that can be read (...); name ..."),
    ("SFT --model folder", "--model folder: the folder holds no config.json, so it is no model; run the stage before"),
    ("SFT --model pickled", f"--model {PICKLED}"),
    ("SFT --model sft/adapter", "--model sft/adapter: the folder holds an adapter; name the merged model, sft"),
    ("SFT --model wordless", "--model wordless: no tokenizer that can be read (...); name smollm2, tiny, ..."),
    ("SFT --model garbled", "--model garbled: no tokenizer that can be read (...); name smollm2, tiny, ..."),
    ("SFT --model cut", "--model cut: no model that can be read (...)"),
    ("SFT --model holed", "--model holed: 1 weights are missing, such as ...; get it anew"),
    ("SFT --model other", "--model other: GPT2LMHeadModel has no .model.layers and .lm_head; use a Llama-like model"),
    ("SFT --model remote", "--model remote: no tokenizer that can be read (...custom code...); name ..."),
    ("SFT --load-in-4bit --lora-rank 0", "--load-in-4bit: weights of 4 bits cannot be trained; use adapters (...)"),
    ("DPO --load-in-4bit", "--load-in-4bit needs bitsandbytes: pip install bitsandbytes"),
    ("PPO --lora-rank 9999", "--lora-rank 9999: above the model's width of 64; 8 to 64 are usual"),
    ("PAIRS --policy pickled", f"--policy {PICKLED}..."),
    ("PAIRS --policy runs/sft", f"--policy runs/sft: no such folder; {MODELS} (train_sft.py writes runs/sft)"),
    # ---- scorers and rewards
    ("PPO --scorer gone", f"gone{NO_SCORER}gone"),
    ("PPO --scorer garbled", f"garbled{NO_SCORER}garbled"),
    ("PPO --held-out 0.5", SEEN),
    ("PAIRS --held-out 0.5 --scorer scorer", SEEN),
    ("PAIRS --held-out 0 --scorer scorer --data odd.jsonl", "--scorer scorer does not know the type 'Irony'; ..."),
    ("PPO --reward my_reward:reward --data others.jsonl", "others.jsonl: no row names a type to ask for; label ..."),
    ("PPO --reward my_reward", "--reward my_reward: ...; expected MODULE:FUNCTION, such as my_reward:reward"),
    ("PPO --reward no_such_module:f", "--reward no_such_module:f: No module named 'no_such_module'; ..."),
    ("PPO --reward json:gone", "--reward json:gone: module 'json' has no attribute 'gone'; ..."),
    ("PPO --reward json:__name__", "--reward json:__name__: that is no function; ..."),
    # ---- places
    ("SFT --out folder", f"--out folder {NOT_OURS}"),
    ("SFT --out file", "--out file: file is not a folder that can be written; name another place"),
    ("SFT --out file/below", "--out file/below: ...file is not a folder that can be written; name another place"),
    ("SFT --out dpo", f"--out dpo {NOT_OURS}"),
    ("SFT --out sft", "sft was begun with --accumulate 9, now it is 1; use the old one, --restart to begin anew, ..."),
    ("PAIRS --out folder", f"--out folder: {NOT_MADE_HERE}"),
    ("PAIRS --out two.jsonl", f"--out two.jsonl: {NOT_MADE_HERE}"),
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
    write("odd.jsonl", *rows, {**rows[0], "type": "irony"})
    write("others.jsonl", *({**row, "type": "others"} for row in rows))
    write("pairs.jsonl", PAIR, {**PAIR, "prompt": "Ask again."})
    write("long.jsonl", {**PAIR, "prompt": "word " * 2000})
    (folder / "bad.csv").write_text("context,question,type\nSome text.,,clarity\n")
    (folder / "file").write_text("precious")
    (folder / "folder").mkdir()
    (folder / "folder" / "thesis.txt").write_text("precious")
    Scorer.fit(load_rows(str(folder / "two.jsonl"))).save(folder / "scorer")
    for stage in ("sft", "dpo"):
        (folder / stage).mkdir()
        (folder / stage / "train_args.json").write_text(json.dumps({"stage": stage, "accumulate": 9}))
    (folder / "sft" / "adapter").mkdir()
    (folder / "sft" / "adapter" / "adapter_config.json").write_text("{}")

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
    mine = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "remote" / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": mine}))
    (folder / "remote" / "code.py").write_text("raise SystemExit('remote code was run')")
    return folder


def run_script(monkeypatch, command, *more):
    """A script's main, in this process."""
    name, *argv = command.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv, *more])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    script = importlib.import_module(name)
    return getattr(script, "run_stage", None) or script.run


@pytest.mark.parametrize("command, expected", RUNS)
def test_bad_runs(workshop, monkeypatch, capsys, command, expected):
    monkeypatch.chdir(workshop)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not installed, even where it is
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before, short = contents(workshop), command.split()[0]
    out = [] if "--out" in command else ["--out", "out.jsonl" if short == "PAIRS" else "out"]
    try:
        main = run_script(monkeypatch, command.replace(short, COMMANDS[short]), *out)
        assert_same(message_of(capsys, main, quiet=False), expected)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert contents(workshop) == before  # nothing half-written, nothing overwritten


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("command, expected", ARGUMENTS)
def test_bad_arguments(monkeypatch, capsys, command, expected):
    expected += f" (see {command.split()[0]}.py --help)"
    assert_same(message_of(capsys, run_script(monkeypatch, command)), expected)


SLOW = ("torch", "transformers", "openai", "datasets", "pandas")
MODULES = ["train_sft", "make_pairs", "train_dpo", "train_ppo"]
MODULES += [f"socratiq.{name}" for name in ("ask", "evaluate", "show", "scorer", "report")]


@pytest.mark.parametrize("module", MODULES)
def test_help_and_a_mistake_answer_at_once(module):
    """In real processes, which cannot import what is slow. The help names units, and a default once."""
    block = f"import runpy, sys; sys.modules |= dict.fromkeys({SLOW}); "
    code, root = block + f"runpy.run_module({module!r}, None, '__main__', True)", Path(__file__).parent.parent

    def answer(argument):
        done = subprocess.run([sys.executable, "-c", code, argument], cwd=root, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    status, said, complained = answer("--help")
    said = " ".join(said.split())
    assert (status, complained) == (0, "") and said.startswith("usage: ") and "default: " in said
    assert not re.search("--[a-z-]+ [A-Z]+_[A-Z_]+", said), "--held-out HELD_OUT tells nobody anything"
    assert "(default: True)" not in said and not re.search(r"default: [^()]*\) \(default", said)
    status, said, complained = answer("--no-such-option")
    assert (status, said) == (2, "")
    assert re.fullmatch(r"error: unrecognized arguments: --no-such-option \(see .+ --help\)\n", complained)
