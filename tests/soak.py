"""Kills in earnest, over the four scripts: `make soak`, or `python tests/soak.py --kills 500`.

Every script is killed again and again and started with the same command until it is done. Kills come at random disk
operations (before one, after it, or when half of a line or of a file is written) and at random times.
In the end the files must be the same bytes as those of a run that was never killed. make_pairs.py asks a server that
counts: an answer that was on the disk when the kill came must never be asked for again.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import make_inputs
from fault_server import FaultServer
from scripts import Scripts, told
from test_make_pairs import make_rows, outputs, sometimes_bad
from test_resume import CASES, command, contents, left_over

from socratiq.pairs.answers import digest

HOWS = ("before", "after", "line", "file", "time")


def kill_until_done(start, kills: int, chance, counts: dict, seconds: float, tally) -> None:
    """Up to `kills` kills of one run, then its end. start(at, how) starts it or continues it."""
    while True:
        how = chance.choice([how for how in HOWS if counts.get(how, 1)]) if kills > 0 else None
        # Rather an early operation: what is left of a run has fewer of them.
        at = int(counts[how] * chance.random() ** 2) if how in counts else None
        job = start(at=at, how=how or "before")
        if how == "time":
            time.sleep(chance.random() * seconds)
            job.kill(signal.SIGKILL)
        status, _, complained = job.wait()
        if status == -signal.SIGKILL:
            tally[how] += 1
            kills -= 1
        elif status:
            raise SystemExit(f"exit status {status}: {complained}")
        else:
            return


def soak_training(case: str, kills: int, scripts, inputs: Path, folder: Path, tally, chance) -> int:
    """Kills of one training script, in as many runs as it takes; how many runs there were."""
    folder.mkdir()
    (folder / "whole").mkdir()
    started = time.monotonic()
    status, said, complained = scripts.run(command(case, inputs), cwd=folder / "whole", at=-1)
    seconds = time.monotonic() - started
    assert status == 0, complained
    wanted, counts = contents(folder / "whole" / "out"), told(said)

    before, runs = tally.total(), 0
    while tally.total() - before < kills:
        place = folder / str(runs)
        place.mkdir()
        start = partial(scripts.start, command(case, inputs), cwd=place)
        kill_until_done(start, min(6, kills), chance, counts, seconds, tally)
        assert contents(place / "out") == wanted, f"{case}: other bytes in {place}"
        assert not left_over(place / "out"), place
        runs += 1
    return runs


def soak_pairs(kills: int, scripts, folder: Path, tally, chance) -> tuple[int, int]:
    """Kills of make_pairs.py; how many runs there were, and how many requests were sent twice, being under way."""
    folder.mkdir()
    make_rows(folder / "rows.jsonl")

    def start(server, out, concurrency, **how):
        options = f"--data rows.jsonl --scorer scorer --scorer-model none --base-url {server.url} --timeout 1"
        options += f" --out {out}/pairs.jsonl --concurrency {concurrency}"
        environment = {"OPENAI_API_KEY": "sk-soak", "NO_PROXY": "127.0.0.1"}
        return scripts.start(["make_pairs.py", *options.split()], cwd=folder, env=environment, **how)

    def asked(server, first=0):
        return [digest({"messages": request.body["messages"]}) for request in server.requests[first:]]

    with FaultServer(answer=sometimes_bad) as server:
        started = time.monotonic()
        status, said, complained = start(server, "whole", 1, at=-1).wait()
        seconds = time.monotonic() - started
        assert status == 0, complained
        wanted, counts, needed = outputs(folder / "whole"), told(said), asked(server)
        assert len(set(needed)) == len(needed), "no two rows make the same request"

    def killed_run(out: Path) -> int:
        log, first, on_disk = out / "pairs.answers.jsonl", 0, set()
        with FaultServer(answer=sometimes_bad, latency=0.005) as server:

            def check():
                assert not on_disk & {*asked(server, first)}, "an answer that was on the disk was asked for again"

            def check_and_start(**how):
                nonlocal on_disk, first
                check()
                first = len(server.requests)
                complete = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
                on_disk = {json.loads(line)["prompt"] for line in complete}
                return start(server, out, 3, **how)

            kill_until_done(check_and_start, min(6, kills), chance, counts, seconds, tally)
            check()
            assert outputs(out) == wanted, "other pairs"
            assert {*asked(server)} == {*needed}, "an answer was lost or made up"
            return len(server.requests) - len(needed)

    before, runs, twice = tally.total(), 0, 0
    while tally.total() - before < kills:
        twice += killed_run(folder / str(runs))
        runs += 1
    return runs, twice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=120, help="how many, over all scripts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    each = -(-args.kills // (len(CASES) + 2))  # make_pairs.py has one case, which counts twice
    total = Counter()
    with tempfile.TemporaryDirectory() as place, Scripts() as scripts:
        folder = Path(place)
        (folder / "inputs").mkdir()
        make_inputs(folder / "inputs")
        for case in CASES:
            tally = Counter()
            chance = random.Random(f"{args.seed} {case}")
            runs = soak_training(case, each, scripts, folder / "inputs", folder / case, tally, chance)
            print(f"{case}: {tally.total()} kills in {runs} runs ({dict(tally)}), same bytes", flush=True)
            total += tally
        tally = Counter()
        chance = random.Random(f"{args.seed} pairs")
        runs, twice = soak_pairs(2 * each, scripts, folder / "pairs", tally, chance)
        total += tally
        print(
            f"make_pairs: {tally.total()} kills in {runs} runs ({dict(tally)}), same bytes, no answer on the disk paid "
            f"for again; {twice} requests were under way at a kill and sent again"
        )
    print(f"{total.total()} kills in all: {dict(total)}")


if __name__ == "__main__":
    main()
