"""The room of a run, in this process: its folder and checkpoint, fingerprints, files, options, and one-line errors."""

import argparse
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from small import small_policy

from socratiq.builtin import MAKERS, folder_of
from socratiq.data import SUFFIXES
from socratiq.models import load_policy, load_tokenizer
from socratiq.run import errors
from socratiq.run.errors import UserError
from socratiq.run.files import atomic_write, replacing
from socratiq.run.folder import BUILT_IN, Run, fingerprint, peak_memory_mb


def arguments(out, **more):
    given = {"out": str(out), "model": "tiny", "restart": False, "checkpoint_every": 5, "lr": 0.1}
    return argparse.Namespace(**{**given, **more})


@pytest.fixture(autouse=True)
def handlers():
    """A run takes the signals of its process; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def new_run(out, **more):
    return Run(arguments(out, **more), "sft")


def test_the_memory_is_that_of_the_device(monkeypatch):
    """On a machine with a GPU, --device cpu computes, and takes memory, elsewhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    assert peak_memory_mb("auto") == peak_memory_mb("cuda") == 5.0
    assert 5.0 != peak_memory_mb("cpu") > 0


# --- checkpoints


def test_a_line_of_the_log_is_json_whatever_the_number(tmp_path):
    new_run(tmp_path).log(3, loss=torch.tensor(0.1), bad=math.nan, worse=-math.inf, name="x", count=torch.tensor(2))
    line = '{"step": 3, "loss": 0.1, "bad": null, "worse": null, "name": "x", "count": 2}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line


def test_a_folder_of_something_else_is_refused(tmp_path):
    new_run(tmp_path)  # an empty one will do
    assert new_run(tmp_path, restart=True).then == "; the same command without --restart continues"
    with pytest.raises(UserError, match="is the folder of --model"):
        new_run(tmp_path, model=str(tmp_path))
    for content in ("[]", '{"stage": "dpo"}'):
        (tmp_path / "train_args.json").write_text(content)
        for restart in (False, True):
            with pytest.raises(UserError, match="exists and is no run of train_sft"):
                new_run(tmp_path, restart=restart)


def test_arguments_of_another_version_do_not_count(tmp_path):
    run = new_run(tmp_path / "out", old=1)
    run.load(policy := small_policy(), torch.optim.AdamW(policy.trainable().values()))
    new_run(tmp_path / "out", new=2)
    with pytest.raises(UserError, match=r"--lr 0\.1, now it is 0\.2"):
        new_run(tmp_path / "out", old=1, lr=0.2)


# --- inputs


def changes(name, path, content) -> bool:
    """Whether the input `name` counts as another one when the file holds this."""
    before = fingerprint(name)
    path.write_bytes(content)
    return fingerprint(name) != before


def test_an_input_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MAKERS.keys() <= BUILT_IN
    (tmp_path / "socratiq").mkdir()
    (tmp_path / "socratiq" / "rows.jsonl").write_text("a folder of that name is not meant")
    for name in ("meta-llama/Llama-3.1-8B", "sample", "socratiq", "missing.csv", "installed_package:reward"):
        assert fingerprint(name) is None
    model = tmp_path / "model"
    model.mkdir()
    assert fingerprint("model") is None  # an empty folder
    assert changes("model", model / "config.json", b"{}")
    monkeypatch.setattr("socratiq.run.folder.READ_LAST", 100)  # of large weights the end counts, and the length
    for weights, counts in ((b"a" * 999, True), (b"b" + b"a" * 998, False), (b"a" * 998 + b"b", True), (b"b", True)):
        assert changes("model", model / "model.safetensors", weights) == counts
    assert not changes("model", model / "README.md", b"says nothing of the model")
    assert not changes("model", model / "training_args.bin", b"nor does this")
    for content in (b"def wordy(contexts, questions, types): ...", b"def wordy(*_): ..."):
        assert changes("rewards:wordy", tmp_path / "rewards.py", content)
    assert "content of --reward" in new_run(tmp_path / "out", reward="rewards:wordy", scorer="model").arguments
    assert "content of --scorer" not in new_run(tmp_path / "out", reward="rewards:wordy", scorer="model").arguments
    for suffix in SUFFIXES:  # the room of a run imports no other one, so its list of endings is its own
        assert changes(".", tmp_path / f"rows{suffix}", b"a") and changes(".", tmp_path / f"rows{suffix}", b"b")


# --- the end of a step


def unended_steps(out):
    """A run of five steps: itself, and the function that ends the step, for each step."""
    run, policy = new_run(out, checkpoint_every=2), small_policy()
    optimizer = torch.optim.AdamW(policy.trainable().values())
    run.load(policy, optimizer)
    for step in run.steps(0, 5):
        yield run, partial(run.end_step, step + 1, policy, optimizer, {}, {}, seconds=1, tokens=1)


def test_a_checkpoint_is_written_when_it_is_due(tmp_path):
    steps = []
    for run, end_step in unended_steps(tmp_path / "out"):
        run.checkpoint_file.unlink(missing_ok=True)
        end_step(checkpoint=len(steps) == 2)
        steps.append(run.checkpoint_file.exists())
    assert steps == [False, True, True, True, True]  # every second step, where asked for, and the last


def test_a_folder_that_is_removed_during_the_run_is_told_in_one_line(tmp_path, capsys):
    def step():
        for run, end_step in unended_steps(tmp_path / "out"):
            shutil.rmtree(run.out)
            end_step()

    def sample():
        for run, _ in unended_steps(tmp_path / "out"):
            shutil.rmtree(run.out)
            run.log_sample(question="Why?")

    for function, name in ((step, "metrics.jsonl"), (sample, "samples.jsonl")):
        assert ended(function, capsys) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path}/out/{name}: No such file or directory; ") and said.count("\n") == 1


# --- files


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "below" / "file"
    atomic_write(path, "old")
    with pytest.raises(ValueError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise ValueError
    assert path.read_text() == "old" and [path] == list(path.parent.iterdir())
    with replacing(path) as temporary:  # a folder in the place of a file, then another folder
        temporary.mkdir()
        (temporary / "a").touch()
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "b").touch()
    assert [file.name for file in path.iterdir()] == ["b"]


# --- one line at the end


def ended(function, capsys) -> int:
    """The exit status of a script whose main function this is."""
    with pytest.raises(SystemExit) as left:
        errors.main(function)
    return left.value.code


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (errors.Stopped("stopped", 143), 143, "stopped"),
        (PermissionError(errno.EACCES, "denied", "a.csv"), 2, "error: a.csv: Permission denied; name another place"),
        (PermissionError(errno.EPERM, "denied"), 2, "error: a file of the output folder: Operation not permitted; "),
        (OSError(errno.ENOSPC, "full", "a"), 1, "error: no space left on the disk while writing a; "),
        (ValueError("I/O error (os error 28)"), 1, "error: no space left on the disk while writing a file of "),
    ],
)
def test_the_line_and_the_status(error, status, line, capsys):
    def fail():
        raise error

    assert ended(fail, capsys) == status
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1 and "None" not in said


@pytest.mark.parametrize(("error", "says"), [("KeyboardInterrupt", ""), ("ValueError", "Traceback")])
def test_ctrl_c_before_the_main_function_is_silent(error, says):
    done = subprocess.run([sys.executable, "-c", f"import socratiq\nraise {error}"], capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith(says) and bool(done.stderr) == bool(says)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        errors.main(lambda: 1 / 0)


def process(code, *arguments, **environment):
    """Python code in a process of its own that imports no torch."""
    code = f"import sys, time, pathlib\nfrom socratiq.run.errors import main\n{code}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env={**os.environ, **environment}, **pipes)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_text_that_a_terminal_cannot_show_ends_nothing(encoding):
    code = "from socratiq.run.errors import bar\n"
    code += "main(lambda: (print('\u2192 caf\u00e9 \u2603'), bar().write('\U0001f600')))"
    out, complained = process(code, PYTHONIOENCODING=encoding, PYTHONUTF8="0").communicate()
    assert complained == "" and out.count("\n") == 2
    assert ("\\u2603" in out and "\\U0001f600" in out) == (encoding != "utf-8")


@pytest.mark.parametrize(("number", "status", "line"), [(2, 130, "SIGINT: stopped\n"), (15, 143, "SIGTERM: stopped\n")])
@pytest.mark.parametrize("importing", [True, False])
def test_a_signal_ends_the_process_in_one_line_also_amid_imports(number, status, line, importing, tmp_path):
    """Libraries catch exceptions around their imports: a process that went on would say so."""
    swallow = "import time\ntry:\n    print('here', flush=True)\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    (tmp_path / "library.py").write_text(swallow)
    wait = "import library" if importing else "print('here', flush=True)\n    time.sleep(60)"
    job = process(
        f"sys.path.insert(0, sys.argv[1])\ndef work():\n    {wait}\n    print('went on')\nmain(work)", str(tmp_path)
    )
    assert job.stdout.readline() == "here\n"
    job.send_signal(number)
    assert (*job.communicate(), job.returncode) == ("", line, status)


def test_tiny_is_made_at_its_first_use(monkeypatch, tmp_path):
    monkeypatch.setenv("SOCRATIQ_CACHE", str(tmp_path / "cache"))
    made = folder_of("tiny")
    assert made == tmp_path / "cache" / "tiny" and json.loads((made / "config.json").read_text())["dtype"] == "float32"
    assert load_policy(str(made), "cpu", "float32").lm.config.eos_token_id == load_tokenizer(str(made)).eos_token_id


def test_a_place_for_the_built_in_models_is_asked_for(monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", "SOCRATIQ_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(UserError, match=r"set SOCRATIQ_CACHE to a folder that can be written$"):
        folder_of("tiny")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where there is no home folder at all
    with pytest.raises(UserError, match="set SOCRATIQ_CACHE"):
        folder_of("tiny")
