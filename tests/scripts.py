"""Scripts in processes of their own that start at once: forked from one that has imported everything already.

    with Scripts() as scripts:
        job = scripts.start(["train_sft.py", "--model", "tiny", ...], cwd=folder)
        job.kill(signal.SIGKILL)
        status, said, complained = job.wait()

A script is a real process, killed by real signals; it only saves the seconds that importing torch takes. To be killed
at one exact point it can count its own disk operations (a line appended, a file written, synced, renamed, cut or
removed) and kill itself "before" or "after" one of them, or when one "line" or "file" is half written.
"""

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Scripts:
    """The process that forks. Its children run one after the other or side by side."""

    def __init__(self):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv, cwd=ROOT, env=None, at=None, how="before", patch=None) -> "Job":
        """Start a script with arguments. `patch` names a function "module:name" to call in the child beforehand."""
        out, err = (tempfile.mkstemp()[1] for _ in range(2))
        request = {"argv": [str(x) for x in argv], "cwd": str(cwd), "env": env or {}, "out": out, "err": err}
        return Job(self, self.ask(**request, at=at, how=how, patch=patch), out, err)

    def run(self, argv, **options):
        """Start a script and wait for it: exit status (minus the signal that killed it), stdout, stderr."""
        return self.start(argv, **options).wait()


class Job:
    def __init__(self, scripts, pid, out, err):
        self.scripts, self.pid, self.out, self.err = scripts, pid, out, err

    def kill(self, number) -> None:
        with contextlib.suppress(ProcessLookupError):  # a dead child stays until `wait`, so the pid is never another's
            os.kill(self.pid, number)

    def wait(self):
        status = self.scripts.ask(wait=self.pid)
        said, complained = Path(self.out).read_text(), Path(self.err).read_text()
        # `tiny` is untrained, so the scorer gives its questions nothing: PPO says so, once a run.
        complained = re.sub(r"warning: ppo step \d+: every score is 0, .*\n", "", complained)
        os.unlink(self.out)
        os.unlink(self.err)
        return status, said, complained

    def until(self, condition, seconds=120) -> None:
        """Wait until the condition holds or the script has ended."""
        end = time.monotonic() + seconds
        while not condition() and not self.ended() and time.monotonic() < end:
            time.sleep(0.001)

    def ended(self) -> bool:
        """Whether the script has ended; it stays a zombie until `wait`."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def told(said: str) -> dict[str, int]:
    """What a run with `at` -1 counted, by the kill (`how`) that it is for."""
    operations, lines, files = map(int, said.splitlines()[-1].split())
    return {"before": operations, "after": operations, "line": lines, "file": files}


# --- the other side -------------------------------------------------------------------------------------------------


def serve() -> None:
    preload()
    patience = time.monotonic() + 20  # a loader's thread may still be on its way out
    while (threads := len(os.listdir("/proc/self/task"))) > 1 and time.monotonic() < patience:
        time.sleep(0.05)
    assert threads == 1, f"{threads} threads: a fork would take only one of them along"
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        print(json.dumps(answer), flush=True)


def preload() -> None:
    """Import what the scripts import, and open a model, which fills the caches of transformers."""
    import torch

    torch.set_num_threads(1)
    scripts = ("train_sft", "train_dpo", "train_ppo", "make_pairs", "socratiq.evaluate")
    for name in (*scripts, "safetensors.torch", "openai.resources.chat", "socratiq.scorer.scorer"):
        importlib.import_module(name)
    from socratiq.models import load_policy, load_tokenizer

    load_tokenizer("tiny")
    load_policy("tiny")


def child(request: dict) -> None:
    # After a fork PyTorch makes its thread pool anew at the first use, which two threads must not do at once.
    importlib.import_module("torch").set_num_threads(1)
    for path, number in ((request["out"], 1), (request["err"], 2)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.close(0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = request["argv"]
    if request["patch"]:
        sys.path.insert(0, str(Path(__file__).parent))
        module, name = request["patch"].split(":")
        getattr(importlib.import_module(module), name)()
    if request["at"] is not None:
        count_operations(request["at"], request["how"])
    status = 1
    try:
        from socratiq.run.errors import main

        script = importlib.import_module(Path(sys.argv[0]).stem)
        main(getattr(script, "run_stage", None) or script.run)
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def count_operations(at: int, how: str) -> None:
    """Kill this process "before" or "after" disk operation number `at`, or within "line" or "file" number `at`.

    All are counted from 0. With `at` -1 there is no kill, and what there was of each is told in the end.
    """
    import safetensors.torch

    import socratiq.run.folder

    done = {"operations": 0, "line": 0, "file": 0}

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(operation, kind=None, half=None):
        def wrapper(*args, **options):
            if how == "before" and done["operations"] == at:
                die()
            if kind == how and done[kind] == at:
                half(*args, **options)
                die()
            result = operation(*args, **options)
            if how == "after" and done["operations"] == at:
                die()
            done["operations"] += 1
            if kind:
                done[kind] += 1
            return result

        return wrapper

    append, save = socratiq.run.folder.append_jsonl, safetensors.torch.save_file

    def half_a_line(path, value, **options):
        line = json.dumps(value).encode()
        with open(path, "ab") as file:
            file.write(line[: len(line) // 2])

    def half_a_file(tensors, path, *rest, **options):
        save(tensors, path, *rest, **options)
        os.truncate(path, os.stat(path).st_size // 2)

    socratiq.run.folder.append_jsonl = counted(append, "line", half_a_line)
    safetensors.torch.save_file = counted(save, "file", half_a_file)
    for name in ("replace", "fsync", "truncate", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    if at == -1:
        leave = os._exit

        def tell(status):
            os.write(1, ("\n" + " ".join(map(str, done.values()))).encode())
            leave(status)

        os._exit = tell


if __name__ == "__main__":
    serve()
