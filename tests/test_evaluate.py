"""Figures worked out by hand, intervals, packed reading against reading one by one, and the whole command on `tiny`."""

import json
import math
import shutil
import types

import pytest
import torch
from fault_server import FaultServer

from socratiq import evaluate
from socratiq.data import Row
from socratiq.evaluation import api_judge, asking, figures, measures, table
from socratiq.evaluation.asking import Task
from socratiq.report.page import percent
from socratiq.run.errors import UserError

# ------------------------------------------------------------------------------------------- questions, counted by hand


def test_distinct_2_is_different_word_pairs_over_word_pairs():
    assert measures.distinct_2(["why do they", "Why, do we?"]) == 3 / 4  # why-do do-they why-do do-we
    assert measures.distinct_2([]) == measures.distinct_2(["why"]) == 0


def test_duplicates_are_said_before_word_for_word():
    assert measures.duplicates(["Why?", "why", "Who?", "why!"]) == 0.5
    assert measures.duplicates([]) == 0


def test_relatedness_counts_content_words_by_their_beginnings():
    text = "Smokers argue that taxes on tobacco are unfair."
    assert measures.relatedness("What argument makes a tobacco tax unfair?", text) == 3 / 5  # argu toba unfa; not tax
    assert measures.relatedness("What does argument mean?", text) == 1 / 2
    assert measures.relatedness("Why is it so?", text) == 0


def test_well_formed():
    """As pairs are checked: test_flaw in tests/test_pairs.py."""
    text = "The tax on sugar is fair and good."
    assert measures.well_formed("What do you mean by fair?", text)
    for question in ("What do you mean", "What do you\nmean by fair?", "", "The tax on sugar is fair and good?"):
        assert not measures.well_formed(question, text), question


# ------------------------------------------------------------------------------------------------------- the figures


class Sees:
    """A classifier that takes the first word of a question for its type."""

    types = ("Analogy", "Clarity")

    def strengths(self, contexts, questions):
        return torch.tensor([[0.9, 0.2] if question.startswith("Analogy") else [0.1, 0.6] for question in questions])

    def reward(self, contexts, questions, types):
        return self.strengths(contexts, questions)[:, 0] / 2


def record(context, question="Why?", type="Analogy", **fields):
    return {"context": context, "type": type, "question": question, "eos": True, **fields}


def measured(*records, **classifiers):
    measures.measure(list(records), ["Cats are dogs.", "Dogs are cats, mostly."], {"judge": Sees()} | classifiers)
    return list(records)


def lengths(values):
    """One question about each text, of which only the length is known."""
    return [{"context": number, "words": value} for number, value in enumerate(values)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_records_carry_strength_type_and_reward():
    first, second = measured(record(0, "Analogy or what?"), record(1, "What are cats then?", eos=False), scorer=Sees())
    assert (first["judge"], first["judge_type"], first["scorer/reward"], first["words"]) == (0.9, "Analogy", 0.45, 3)
    assert (second["scorer"], second["scorer_type"], second["relatedness"]) == (0.1, "Clarity", 1)
    found = figures.figures_of([first, second], figures.draws(2, generator(), 0))
    values = {name: entry["value"] for name, entry in found.items()}
    assert values["judge/accuracy"] == values["scorer/accuracy"] == values["eos"] == 0.5
    assert values["scorer/reward"] == pytest.approx((0.45 + 0.05) / 2) and values["words"] == 3.5


def test_a_mean_is_over_questions_and_is_resampled_by_text():
    records = measured(record(0, "Analogy?"), record(0), record(1, "Analogy?"))
    sums = figures.sums_by_text(records, 2)["judge/accuracy"]
    weights = torch.tensor([[1, 1], [2, 0], [0, 2]], dtype=torch.float64)
    assert figures.values("judge/accuracy", sums, weights).tolist() == [2 / 3, 1 / 2, 1]


def test_perplexity_is_exp_of_the_mean_per_token():
    records = measured(record(0, base_nats=math.log(2), base_tokens=1), record(0, base_nats=math.log(8), base_tokens=2))
    sums = figures.sums_by_text(records, 1)["base_perplexity"]
    found = figures.values("base_perplexity", sums, torch.ones(1, 1, dtype=torch.float64))
    assert found.item() == pytest.approx(16 ** (1 / 3))


def test_every_resample_draws_as_many_texts_as_there_are():
    weights = figures.draws(7, generator(), 50)
    assert weights.shape == (51, 7) and (weights.sum(1) == 7).all() and (weights[0] == 1).all()
    assert (weights == figures.draws(7, generator(), 50)).all() and (weights[1:] != 1).any()
    assert figures.draws(1, generator()).tolist() == [[1]]  # a single text gives no interval


def test_the_interval_has_the_width_that_theory_gives():
    values = torch.randn(400, generator=generator(1), dtype=torch.float64)
    found = figures.figures_of(lengths(values.tolist()), figures.draws(400, generator(), 4000))["words"]
    assert found["low"] < found["value"] < found["high"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.06)


def test_questions_that_repeat_their_text_do_not_narrow_the_interval():
    values, weights = [0, 1, 1, 0, 1, 0, 0, 1, 1], figures.draws(9, generator(), 500)
    assert figures.figures_of(lengths(values), weights) == figures.figures_of(lengths(values) * 5, weights)


def test_a_figure_undefined_in_some_resample_has_no_interval():
    assert figures.entry(torch.tensor([0.5, 0.1, math.nan])) == {"value": 0.5}
    assert figures.entry(torch.tensor([math.nan])) == {"value": None}


def test_a_change_is_compared_text_by_text():
    # Some texts are easy and some hard: the intervals of both stages overlap, the one of their difference excludes 0.
    earlier, later = lengths([0, 0.1, 0.8, 0.9]), lengths([0.1, 0.2, 0.9, 1])
    weights = figures.draws(4, generator(), 500)
    earlier[0]["eos"] = True  # only the earlier stage has this figure
    assert figures.change(earlier, later, weights) == {"words": {"value": 0.1, "low": 0.1, "high": 0.1}}
    before, after = (figures.figures_of(records, weights)["words"] for records in (earlier, later))
    assert before["high"] > after["low"]


# ------------------------------------------------------------------------------------------------------ asking, reading

TASKS = [Task(0, "Cats are dogs.", "Analogy"), Task(0, "Cats are dogs.", "Clarity"), Task(1, "Dogs bark.", "Analogy")]


@pytest.fixture(scope="module")
def tiny():
    return asking.load_policy("tiny", dtype="float32", trainable=False), asking.load_tokenizer("tiny")


def asked(tiny, tasks, **changed):
    options = {"samples_per_prompt": 2, "max_new_tokens": 5, "max_prompt_tokens": 512, "temperature": 1.0, "seed": 3}
    args = types.SimpleNamespace(**(options | changed))
    return asking.ask(*tiny, tasks, args, ""), args


def test_texts_are_drawn_by_the_seed_and_stand_in_their_order():
    rows = [Row(f"Text {n}.", "Why?", "Analogy", "") for n in range(20)]
    drawn = [[task.context for task in asking.choose_tasks(rows, ["Analogy"], 5, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 5
    assert drawn[0] != [row.context for row in rows[:5]]
    assert drawn[0] == [row.context for row in rows if row.context in drawn[0]]


def test_people_are_those_who_asked_about_the_drawn_texts_and_were_not_called_bad():
    row = Row("Cats are dogs.", "Analogy of cats?", "Analogy", "")
    rows = [row, row._replace(preference="rejected"), row._replace(context="Cows.")]
    assert asking.ask_people(rows, TASKS) == [record(0, "Analogy of cats?")]


def test_a_question_depends_on_text_type_and_seed_alone(tiny):
    together, _ = asked(tiny, TASKS)
    assert asked(tiny, TASKS[2:])[0] == together[4:]
    assert asked(tiny, TASKS[2:], seed=2)[0] != together[4:]
    assert [(r["context"], r["type"]) for r in together[::2]] == [(task.number, task.type) for task in TASKS]


def test_reading_all_questions_of_a_task_at_once_is_reading_one_by_one(tiny):
    from socratiq.batch import make_batch

    policy, tokenizer = tiny
    records, args = asked(tiny, TASKS)
    records += [record(1, "Do dogs bark?"), record(1, "", eos=False)]
    asking.read(policy, tokenizer, TASKS, records, args)
    contexts = [TASKS[0].context, TASKS[2].context]
    for found in records:
        prompt = asking.encode_prompt(tokenizer, contexts[found["context"]], found["type"], 512)
        ids = asking.encode_record(tokenizer, found)
        with torch.no_grad():
            alone = asking.token_logprobs(policy, make_batch([prompt], [[ids]]))["logprobs"]
        assert found["base_nats"] == pytest.approx(-alone.sum().item(), abs=1e-3)
        assert found["base_tokens"] == len(ids) >= 1
        assert (ids[-1] == tokenizer.eos_token_id) == (found["eos"] or len(ids) == 1)


# ----------------------------------------------------------------------------------------------------- grades by an API


def graded(stages, server, tmp_path, max_requests=None):
    """As in two runs of the command: the log is opened anew each time."""
    args = types.SimpleNamespace(judge_api="m", base_url=server.url, max_requests=max_requests, out=tmp_path / "e.json")
    writer, log = api_judge.open_api(args)
    api_judge.grade(stages, ["A text."], writer, log)
    log.file.close()


def records(*questions):
    return [record(0, question, "Clarity") for question in questions]


def test_grades_are_asked_once_and_kept(tmp_path):
    said = '```json\n{"type": 4, "relevance": 5, "quality": 2}\n```'
    with FaultServer(answer=lambda body: said) as server:
        stages = {"sft": records("Why?", "Who?"), "ppo": records("Why?")}
        graded(stages, server, tmp_path)
        assert len(server.requests) == 2  # "Why?" is paid for once
        assert stages["ppo"][0]["grades"] == {"type": 4, "relevance": 5, "quality": 2}
        again = {"sft": records("Why?", "Who?")}
        graded(again, server, tmp_path)
        assert len(server.requests) == 2 and again["sft"][1]["grades"]["quality"] == 2
        assert "no instructions" in server.requests[0].body["messages"][0]["content"]
    found = figures.sums_by_text(measured(*stages["sft"]), 1)
    assert found["api/relevance"].tolist() == [[10, 2]]


@pytest.mark.parametrize("said", ["", "five of five", '{"type": 6, "relevance": 1, "quality": 1}', '{"type": 3}', "{{"])
def test_an_answer_that_is_no_grade_is_no_grade(said):
    assert api_judge.read_grades(said) is None


def test_an_answer_without_grades_is_asked_for_once_more(tmp_path, capsys):
    said = iter(["no", '{"type": 4, "relevance": 5, "quality": 2}', "no", "no"])
    with FaultServer(answer=lambda body: next(said)) as server:
        stages = {"sft": records("Why?")}
        graded(stages, server, tmp_path)
        assert stages["sft"][0]["grades"]["type"] == 4
        for _ in range(2):  # and never a third time
            graded({"sft": records("Why?", "Who?")}, server, tmp_path)
            assert "questions without a grade: 1 (two answers held no grades)" in capsys.readouterr().err
        assert len(server.requests) == 4
        graded({"sft": records("How?")}, server, tmp_path, max_requests=4)
    assert "questions without a grade: 1 (not asked: --max-requests 4)" in capsys.readouterr().err


def test_a_server_that_gives_up_costs_the_grades_alone(tmp_path, capsys):
    with FaultServer(["401"]) as server:
        graded({"sft": records("Why?")}, server, tmp_path)
    assert "questions without a grade: 1 (http://127.0.0.1:" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def place(tmp_path, inputs, monkeypatch):
    """A folder with rows.jsonl, a scorer, and the tiny model as runs/sft and runs/dpo; there is no runs/ppo."""
    from socratiq.models import resolve

    monkeypatch.chdir(tmp_path)
    shutil.copy(inputs / "rows.jsonl", tmp_path)
    for stage in ("sft", "dpo"):
        shutil.copytree(resolve("tiny"), tmp_path / "runs" / stage)
    settings = {"stage": "sft", "model": "tiny", "data": "rows.jsonl", "held_out": 0.3, "seed": 0}
    (tmp_path / "runs" / "sft" / "train_args.json").write_text(json.dumps(settings))
    (tmp_path / "runs" / "scorer").symlink_to(inputs / "scorer")
    return tmp_path


SMALL = ["--limit", "3", "--max-new-tokens", "6", "--dtype", "float32"]
FEW = [*SMALL, "--base", "none", "--dpo", "none"]


def evaluation(place):
    return json.loads((place / "runs" / "evaluation.json").read_text())


def test_evaluate_from_end_to_end(place, capsys, monkeypatch):
    from socratiq.evaluation.judge import Judge

    seen, fit = [], Judge.fit
    monkeypatch.setattr(Judge, "fit", lambda rows: seen.extend(rows) or fit(rows))
    before = sorted(place.rglob("*"))
    evaluate.run(SMALL)
    said, complained = capsys.readouterr()
    assert "judge and scorer learnt from" in complained  # tests/conftest.py gives this scorer all training texts
    assert "left out: ppo: runs/ppo is not there or not finished; train_ppo.py makes it" in said
    assert "3 held-out texts of rows.jsonl, 2 types, 3 models" in said
    found, written = evaluation(place), place / "runs" / "evaluation.json"
    assert set(place.rglob("*")) - set(before) == {written}  # nothing but its own file
    assert list(found["stages"]) == ["human", "base", "sft", "dpo"]
    assert found["settings"]["held_out"] == 0.3  # as in SFT
    assert list(found["steps"]) == ["base -> sft", "sft -> dpo"]
    assert seen and not {row.context for row in seen} & set(found["contexts"])
    of = found["stages"]["dpo"]
    assert len(of["questions"]) == 3 * 2 and set(of["by_type"]) == {"Analogy", "Clarity"}
    assert set(of["figures"]) == {name for name in table.FIGURES if not name.startswith("api")}
    assert found["stages"]["sft"]["questions"] == of["questions"]  # the same random numbers for every stage
    first = written.read_bytes()
    evaluate.run(SMALL)
    assert written.read_bytes() == first


def test_without_scorer_base_and_engine_the_rest_is_measured(place, capsys, monkeypatch):
    opened, load = [], asking.load_policy
    monkeypatch.setattr(asking, "load_policy", lambda *of, **how: opened.append(how["plain"]) or load(*of, **how))
    (place / "runs" / "scorer").unlink()
    evaluate.run([*FEW, "--temperature", "0.7", "--samples-per-prompt", "2", "--plain"])
    assert opened == [True]
    found = evaluation(place)
    assert "left out: scorer: runs/scorer is not there or not finished; make_pairs.py" in capsys.readouterr().out
    assert found["classifiers"] == ["judge"] and not (place / "runs" / "scorer").exists()
    of = found["stages"]["sft"]
    assert len(of["questions"]) == 3 * 2 * 2
    assert "base_perplexity" not in of["figures"] and "scorer/reward" not in of["figures"]


def test_a_scorer_that_has_seen_a_held_out_text_does_not_grade_it(place, capsys):
    with pytest.raises(UserError, match=r"--scorer runs/scorer was fitted on \d of the \d held-out texts"):
        evaluate.run([*FEW, "--seed", "4"])
    assert "--sft was trained with another --held-out or --seed and may have seen these" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--held-out", "0"], "no text is held out"),
        (["--dpo", "runs/other"], "--dpo runs/other"),
        (["--sft", "none"], "no model to evaluate"),
        (["--judge-api", "m"], "set OPENAI_API_KEY"),
        (["--data", "other.jsonl"], r"--scorer runs/scorer does not know the type 'Fear appeal'; name another one, or"),
    ],
)
def test_an_error_names_the_option(place, monkeypatch, more, says):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    if more != ["--dpo", "runs/other"]:  # the others show before any model is asked
        monkeypatch.setattr(asking, "ask_models", None)
    rows = [{"context": f"Other text {n}.", "question": "Is it so?", "type": "Fear appeal"} for n in range(9)]
    lines = [(place / "rows.jsonl").read_text(), *(json.dumps(row) + "\n" for row in rows)]
    (place / "other.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match=says):
        evaluate.run([*FEW, *more])


def test_broken_arguments_of_a_stage_are_named(place):
    (place / "runs" / "sft" / "train_args.json").write_text("{")
    with pytest.raises(UserError, match=r"train_args.json: not JSON"):
        evaluate.run(FEW)


# ------------------------------------------------------------------------------------------------------ what is printed


def test_numbers_in_the_table_are_short():
    assert table.shown({"value": 0.123, "low": 0.05, "high": 1.0}, "judge/accuracy") == "12% [5 100]"
    assert table.shown({"value": -0.001, "low": -0.2, "high": 0.3}, "judge/accuracy") == "0% [-20 30]"
    assert table.shown({"value": 0.125}, "judge/accuracy") == percent(0.125) + "%" == "13%"  # as in the report
    assert table.shown({"value": -0.001, "low": -0.2, "high": 0.3}, "scorer/reward") == ".00 [-.20 .30]"
    assert table.shown({"value": 1234.5, "low": 1, "high": 2}, "base_perplexity", span=False) == "1234"
    assert table.shown(None, "words") == table.shown({"value": None}, "words") == "-"


def test_the_table_has_a_row_for_each_stage_and_names_chance():
    def stage(value):
        figures = {"judge/accuracy": {"value": value, "low": 0.1, "high": 0.9}, "words": {"value": 9.5}}
        figures["api/type"] = {"value": 3.5, "low": 3, "high": 4}
        questions = [record(0, f"Is it {value}?", "Analogy", judge=value)]
        return {"figures": figures, "by_type": {"Analogy": figures}, "questions": questions}

    result = {
        "types": ["Analogy", "Clarity"], "contexts": ["A text."], "stages": {"human": stage(0.5), "sft": stage(0.25)},
        "steps": {"sft -> dpo": {"judge/accuracy": {"value": 0.2, "low": -0.1, "high": 0.5}}},
    }  # fmt: skip
    said = table.tables(result).splitlines()
    assert "Analogy            25%  50%" in said and "Clarity            -    -" in said
    assert "sft -> dpo changes it by 20 points [-10 50], may be chance" in said
    assert any("chance: 50%" in line for line in said)
    assert said[-11:-8] == ["        type, API", "sft     3.5 [3.0 4.0]", "people  3.5 [3.0 4.0]"]
    assert said[-7:-4] == ["        words", "sft     9.5", "people  9.5"]
    assert said[-3:] == ["        right type, judge", "sft     25% [10 90]", "people  50% [10 90]"]
    assert table.samples(result).splitlines()[-2:] == ["     sft  0.25  Is it 0.25?", "  people  0.50  Is it 0.5?"]
