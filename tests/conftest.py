"""What several test files share: small inputs for the scripts, and the process that forks them (tests/scripts.py)."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors this small a second thread only waits


@pytest.fixture(scope="session")
def scripts():
    """Starts scripts without the seconds that importing torch takes."""
    from scripts import Scripts

    with Scripts() as running:
        yield running


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with rows.jsonl (12 short texts, 24 questions), pairs.jsonl (24 pairs), scorer/ and deep_scorer/."""
    from socratiq.data import Row, split_by_context
    from socratiq.prompts import build_prompt
    from socratiq.scorer.language_model import open_language_model
    from socratiq.scorer.scorer import Scorer

    folder = tmp_path_factory.mktemp("inputs")
    subjects = ["dogs", "trams", "taxes", "farms", "films", "bikes"]
    subjects += ["books", "games", "ships", "birds", "songs", "roads"]
    rows, pairs = [], []
    for subject in subjects:
        context = f"I think that {subject} are good."
        questions = {"Clarity": f"What do you mean by good {subject}?", "Analogy": f"Are {subject} really like clouds?"}
        for (kind, question), other in zip(questions.items(), reversed(questions.values()), strict=True):
            about = {"context": context, "type": kind}
            rows.append({**about, "question": question})
            pairs.append({**about, "prompt": build_prompt(context, kind), "chosen": question, "rejected": other})
    for name, lines in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    every_row = [Row(row["context"], row["question"], row["type"], "") for row in rows]
    learn_from = split_by_context(every_row, 0.3, seed=0)[0]  # one that has seen held-out texts is refused
    Scorer.fit(learn_from).save(folder / "scorer")
    Scorer.fit(learn_from, lm=open_language_model("tiny", "cpu", "float32")).save(folder / "deep_scorer")
    return folder
