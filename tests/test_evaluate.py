"""Figures worked out by hand, intervals, packed reading against reading one by one, and the whole command on `tiny`."""

import json
import math
import types

import pytest
import torch
from fault_server import FaultServer

from socratiq import evaluate
from socratiq.evaluation import api_judge, bootstrap, figures, measures
from socratiq.evaluation.questions import Answer, Model, Readings, Task
from socratiq.run.errors import UserError

# ---------------------------------------------------------------------------------------------- words, counted by hand


def test_words_keep_apostrophes_and_drop_punctuation():
    assert measures.words("Why, don’t they — 2 of 3 — pay?") == ["why", "don't", "they", "2", "of", "3", "pay"]


def test_distinct_is_different_ngrams_over_ngrams():
    questions = ["why do they", "why do we"]  # words: why do they why do we; pairs: why-do do-they why-do do-we
    assert measures.distinct(questions, 1) == 4 / 6
    assert measures.distinct(questions, 2) == 3 / 4
    assert measures.distinct([], 2) == measures.distinct(["why"], 2) == 0


def test_duplicates_are_said_before_word_for_word():
    assert measures.duplicates(["Why?", "why", "Who?", "why!"]) == 0.5
    assert measures.duplicates([]) == 0


def test_copying_is_the_longest_run_over_the_length():
    assert measures.copying("Is a borrowed drill really broken?", "A borrowed drill comes back broken.") == 3 / 6
    assert measures.copying("A drill?", "A drill.") == 1
    assert measures.copying("", "A drill.") == measures.copying("Why?", "") == 0
    assert measures.copying("Is art good?", "Smart, is it.") == 1 / 3  # "art" within "smart" is no copy


def test_relatedness_counts_content_words_by_their_beginnings():
    context = "Smokers argue that taxes on tobacco are unfair."
    assert (
        measures.relatedness("What argument makes a tobacco tax unfair?", context) == 3 / 5
    )  # argu toba unfa; make tax
    assert measures.relatedness("What does argument mean?", context) == 1 / 2
    assert measures.relatedness("Why is it so?", context) == 0


@pytest.mark.parametrize(
    ("question", "fine"),
    [
        ("What do you mean by fair?", True),
        ("What do you mean", False),
        ("What? Why?", False),
        ("Why?", False),
        ("What do you\nmean by fair?", False),
        ("", False),
        ("The tax on sugar is fair and good?", False),  # copied
    ],
)
def test_well_formed(question, fine):
    assert measures.well_formed(question, "The tax on sugar is fair and good.") is fine


# ------------------------------------------------------------------------------------------------ overlap, by the paper


def test_bleu_counts_by_hand():
    # said: the the the cat (4); reference: the cat sat (3). Clipped unigrams: the 1, cat 1; pairs: the-cat 1 of 3.
    counts = measures.bleu_counts("the the the cat", ["the cat sat"])
    assert counts == [2, 1, 0, 0, 4, 3, 2, 1, 4, 3]
    precisions = [2 / 4, 2 / 4, 1 / 3, 1 / 2]  # (matches + 1) / (n-grams + 1) for n > 1
    assert measures.bleu_of_counts(counts) == pytest.approx(math.prod(precisions) ** 0.25)  # longer: no penalty


def test_bleu_brevity_penalty_and_nearest_reference():
    counts = measures.bleu_counts("a b", ["a b c d", "a b c d e f"])
    assert counts[-2:] == [2, 4]
    assert measures.bleu_of_counts(counts) == pytest.approx(math.exp(1 - 4 / 2))  # all that was said matched
    assert measures.bleu_counts("a b c", ["a b", "a b c d"])[-1] == 2  # of two as near the shorter one


def test_bleu_takes_the_larger_count_of_several_references():
    assert measures.bleu_counts("a a b", ["a a", "a b"])[0] == 3


def test_bleu_of_a_copy_is_one_and_of_nothing_zero():
    assert measures.bleu(["why is the sky blue"], [["why is the sky blue"]]) == pytest.approx(1)
    assert measures.bleu(["why"], [["how"]]) == measures.bleu([""], [["how"]]) == 0


def test_rouge_l_by_hand():
    # LCS of "police killed the gunman" and "police kill the gunman": police the gunman = 3; F1 = 2*3 / (4+4)
    assert measures.rouge_l("police killed the gunman", ["police kill the gunman"]) == 6 / 8
    assert measures.rouge_l("police killed the gunman", ["the gunman kill police"]) == 4 / 8  # Lin 2004's example
    assert measures.rouge_l("a b", ["c", "b a b"]) == 4 / 5
    assert measures.rouge_l("", ["a"]) == measures.rouge_l("a", [""]) == 0


def test_common_subsequence_against_every_subsequence():
    from itertools import combinations

    def by_force(a, b):
        def subsequences(x):
            return {tuple(x[i] for i in chosen) for n in range(len(x) + 1) for chosen in combinations(range(len(x)), n)}

        return max(map(len, subsequences(a) & subsequences(b)))

    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        a, b = (torch.randint(3, (int(n),), generator=generator).tolist() for n in torch.randint(1, 7, (2,)))
        assert measures.common_subsequence(a, b) == by_force(a, b)


# -------------------------------------------------------------------------------------------------------- the bootstrap


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_mean_is_over_questions_and_is_resampled_by_text():
    sums = bootstrap.by_text(2, [0, 0, 1], [1, 0, 1], [1, 1, 1], finish=bootstrap.mean)
    assert sums.figure() == 2 / 3
    weights = torch.tensor([[1, 1], [2, 0], [0, 2]], dtype=torch.float64)
    assert sums.resampled(weights).tolist() == [2 / 3, 1 / 2, 1]


def test_every_resample_draws_as_many_texts_as_there_are():
    weights = bootstrap.resamples(7, 50, generator())
    assert weights.shape == (50, 7) and (weights.sum(1) == 7).all()
    assert (weights == bootstrap.resamples(7, 50, generator())).all()


def test_the_interval_has_the_width_that_theory_gives():
    values = torch.randn(400, generator=generator(1), dtype=torch.float64)
    sums = bootstrap.by_text(400, range(400), values.tolist(), [1.0] * 400, finish=bootstrap.mean)
    low, high = bootstrap.interval(sums.resampled(bootstrap.resamples(400, 4000, generator())))
    assert low < sums.figure() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.06)


def test_questions_that_repeat_their_text_do_not_narrow_the_interval():
    once = bootstrap.by_text(9, range(9), [0, 1, 1, 0, 1, 0, 0, 1, 1], [1] * 9, finish=bootstrap.mean)
    often = bootstrap.by_text(9, list(range(9)) * 5, [0, 1, 1, 0, 1, 0, 0, 1, 1] * 5, [1] * 45, finish=bootstrap.mean)
    weights = bootstrap.resamples(9, 500, generator())
    assert bootstrap.interval(once.resampled(weights)) == bootstrap.interval(often.resampled(weights))


def test_perplexity_is_exp_of_the_mean_per_token():
    sums = bootstrap.by_text(1, [0, 0], [math.log(2), math.log(8)], [1, 2], finish=bootstrap.exp_mean)
    assert sums.figure() == pytest.approx(16 ** (1 / 3))


def test_a_figure_undefined_in_some_resample_has_no_interval():
    assert bootstrap.interval(torch.tensor([0.1, math.nan])) is None
    assert figures.entry(0.5, torch.tensor([0.1, math.nan])) == {"value": 0.5}
    assert figures.entry(math.nan) == {"value": None}


def test_a_step_is_compared_text_by_text():
    # One text is easy and one is hard: the intervals of both stages overlap, the one of their difference excludes 0.
    earlier = bootstrap.by_text(4, range(4), [0.0, 0.1, 0.8, 0.9], [1] * 4, finish=bootstrap.mean)
    later = bootstrap.by_text(4, range(4), [0.1, 0.2, 0.9, 1.0], [1] * 4, finish=bootstrap.mean)
    weights = bootstrap.resamples(4, 500, generator())
    change = figures.step({"x": earlier, "y": earlier}, {"x": later}, weights)
    assert list(change) == ["x"]
    assert change["x"]["value"] == change["x"]["low"] == change["x"]["high"] == 0.1
    assert figures.entries({"x": earlier}, weights)["x"]["high"] > figures.entries({"x": later}, weights)["x"]["low"]


# ------------------------------------------------------------------------------------------------------ asking, reading


class Sees:
    """A classifier that takes the first word of a question for its type."""

    types = ("Analogy", "Clarity")

    def strengths(self, contexts, questions):
        return torch.tensor([[0.9, 0.2] if question.startswith("Analogy") else [0.1, 0.6] for question in questions])

    def reward(self, contexts, questions, types):
        return self.strengths(contexts, questions)[:, 0] / 2


TASKS = [
    Task(0, "Cats are dogs.", "Analogy", ["Analogy of cats?"]),
    Task(0, "Cats are dogs.", "Clarity", []),
    Task(1, "Dogs are cats, mostly.", "Analogy", ["Are dogs like cats?", "How so?"]),
]


def test_records_carry_strength_type_and_reward():
    answers = [[Answer("Analogy or what?", [5], True)], [], [Answer("What is a cat then?", [6], False)]]
    first, second = figures.records_of(TASKS, answers, {"judge": Sees(), "scorer": Sees()})
    assert (first["judge"], first["judge_type"], first["reward"], first["ended"]) == (0.9, "Analogy", 0.45, True)
    assert (second["context"], second["scorer"], second["scorer_type"]) == (1, 0.1, "Clarity")
    assert second["well_formed"] and not second["ended"]
    found = figures.figures_of_records([first, second], 2)
    assert found["judge/accuracy"].figure() == 0.5
    assert found["scorer/strength"].figure() == 0.5
    assert found["eos"].figure() == 0.5
    assert figures.records_of(TASKS, [[], [], []], {"scorer": Sees()}) == []


def test_reading_many_stages_at_once_is_reading_one_by_one():
    from socratiq.batch import make_batch
    from socratiq.models import token_logprobs

    model = Model("tiny", dtype="float32")
    said = model.ask(TASKS, samples=2, max_new_tokens=5, temperature=1.0, seed=3)
    people = model.human(TASKS)
    found = model.read(TASKS, {"people": people, "said": said}, batch_size=2, desc="")
    assert [len(x) for x in found["people"]] == [len(answer.ids) for row in people for answer in row]
    for name, rows in (("people", people), ("said", said)):
        singles = [(task, answer) for task, row in zip(TASKS, rows, strict=True) for answer in row]
        for (task, answer), together in zip(singles, found[name], strict=True):
            with torch.no_grad():
                alone = token_logprobs(model.policy, make_batch([model.prompt(task)], [[answer.ids]]))["logprobs"][0, 0]
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_what_is_asked_depends_on_text_type_and_seed_alone():
    model = Model("tiny", dtype="float32")
    together = model.ask(TASKS, 2, 6, 1.0, seed=1)
    assert model.ask(TASKS[2:], 2, 6, 1.0, seed=1) == together[2:]
    assert model.ask(TASKS[2:], 2, 6, 1.0, seed=2) != together[2:]


def test_kl_and_perplexity_by_hand():
    tasks = [Task(0, "a", "Clarity", ["x"]), Task(1, "b", "Clarity", [])]
    rows = {"sft": [[Answer("q", [1, 2], True)], [Answer("r", [3], True)]], "human": [[Answer("x", [4], True)], []]}
    own = [torch.tensor([-1.0, -2.0]), torch.tensor([-1.5])]
    other = [torch.tensor([-1.5, -2.0]), torch.tensor([-1.0])]
    readings = Readings({"sft": own}, {"sft": [torch.tensor([-2.0])]}, {"sft": other}, {"sft": other})
    found = figures.figures_of_readings("sft", tasks, rows, readings, 2, exact_kl=True)
    assert found["kl_to_sft"].figure() == pytest.approx((0.5 + -0.5) / 2)
    k3 = (math.exp(-0.5) - 1 + 0.5) + (math.exp(0.5) - 1 - 0.5)  # d = log pi - log sft = 0.5, 0 and -0.5
    assert found["kl_to_sft_k3"].figure() == pytest.approx(k3 / 2)
    assert found["base_perplexity"].figure() == pytest.approx(math.exp((1.5 + 2 + 1) / 3))
    assert found["human_perplexity"].figure() == pytest.approx(math.exp(2))
    assert "kl_to_sft" not in figures.figures_of_readings("sft", tasks, rows, readings, 2, exact_kl=False)


def test_overlap_is_measured_where_people_asked():
    answers = [[Answer("Analogy of cats?", [1], True)], [Answer("anything", [1], True)], [Answer("How so?", [1], True)]]
    found = figures.overlap_with_humans(TASKS, answers, 2)
    assert found["rouge_l"].figure() == 1
    assert figures.overlap_with_humans([TASKS[1]], [answers[1]], 2) == {}


# ----------------------------------------------------------------------------------------------------- grades by an API


def grading(url, tmp_path, **changed):
    settings = {"judge_api": "m", "base_url": url, "max_requests": None, "concurrency": 2, "out": tmp_path / "e.json"}
    return types.SimpleNamespace(**(settings | changed))


def records(*questions):
    return [{"context": 0, "type": "Clarity", "question": question} for question in questions]


def test_grades_are_asked_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    said = '```json\n{"type": 4, "relevance": 5, "quality": 2}\n```'
    with FaultServer(answer=lambda body: said) as server:
        stages = {"sft": records("Why?", "Who?"), "ppo": records("Why?")}
        api_judge.grade(stages, ["A text."], grading(server.url, tmp_path))
        assert len(server.requests) == 2  # "Why?" is paid for once
        assert stages["ppo"][0]["grades"] == {"type": 4, "relevance": 5, "quality": 2}
        again = {"sft": records("Why?", "Who?")}
        api_judge.grade(again, ["A text."], grading(server.url, tmp_path))
        assert len(server.requests) == 2 and again["sft"][1]["grades"]["quality"] == 2
        assert "no instructions" in server.requests[0].body["messages"][0]["content"]


@pytest.mark.parametrize("said", ["", "five of five", '{"type": 6, "relevance": 1, "quality": 1}', '{"type": 3}', "{{"])
def test_an_answer_that_is_no_grade_is_no_grade(said):
    assert api_judge.read_grades(said) is None


def test_ungraded_questions_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FaultServer(answer=lambda body: "no") as server:
        stages = {"sft": records("Why?")}
        api_judge.grade(stages, ["A text."], grading(server.url, tmp_path))
    assert "grades" not in stages["sft"][0]
    assert "1 questions have no grade" in capsys.readouterr().err


def test_a_wrong_model_and_a_missing_key_are_said(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        api_judge.grade({}, [], grading(None, tmp_path))
    with FaultServer(["404"]) as server, pytest.raises(UserError, match="--judge-api"):
        api_judge.grade({"sft": records("Why?")}, ["A text."], grading(server.url, tmp_path))


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def place(tmp_path, inputs, monkeypatch):
    """A folder with rows.jsonl and the tiny model as runs/sft and runs/dpo; there is no runs/ppo."""
    from socratiq.models import resolve

    monkeypatch.chdir(tmp_path)
    tiny = resolve("tiny")
    (tmp_path / "rows.jsonl").write_bytes((inputs / "rows.jsonl").read_bytes())
    runs = tmp_path / "runs"
    runs.mkdir()
    for stage in ("sft", "dpo"):
        (runs / stage).mkdir()
        for file in evaluate.Path(tiny).iterdir():
            (runs / stage / file.name).symlink_to(file)
    settings = {"stage": "sft", "model": "tiny", "data": "rows.jsonl", "held_out": 0.4, "seed": 0}
    (runs / "sft" / "train_args.json").write_text(json.dumps(settings))
    return tmp_path


SMALL = ["--limit", "3", "--max-new-tokens", "6", "--bootstrap", "50", "--dtype", "float32"]


def test_evaluate_from_end_to_end(place, capsys, monkeypatch):
    from socratiq.evaluation.judge import Judge
    from socratiq.scorer.scorer import Scorer

    fitted_on, fits = {}, {kind: kind.fit for kind in (Judge, Scorer)}
    for kind in fits:
        note = lambda rows, kind=kind: fitted_on.update({kind: {row.context for row in rows}}) or fits[kind](rows)  # noqa: E731
        monkeypatch.setattr(kind, "fit", note)
    evaluate.run(SMALL)
    said = capsys.readouterr().out
    assert "left out: ppo: runs/ppo is not there" in said
    assert "3 held-out texts of rows.jsonl, 2 types, 3 models" in said
    written = (place / "runs" / "evaluation.json").read_bytes()
    found = json.loads(written)
    assert list(found["stages"]) == ["human", "base", "sft", "dpo"]
    assert found["settings"]["held_out"] == 0.4  # as in SFT
    assert list(found["steps"]) == ["base -> sft", "sft -> dpo"]
    assert not (fitted_on[Judge] | fitted_on[Scorer]) & set(found["contexts"])
    assert not fitted_on[Judge] & fitted_on[Scorer]
    of = found["stages"]["dpo"]
    assert len(of["questions"]) == 3 * 2
    for name, figure in of["figures"].items():
        assert set(figure) <= {"value", "low", "high"} and name in evaluate.FIGURES
        if "low" in figure:
            assert figure["low"] <= figure["value"] + 1e-9 and figure["value"] <= figure["high"] + 1e-9, name
    assert of["figures"]["kl_to_sft"]["value"] == pytest.approx(0, abs=1e-5)  # the very same model
    assert of["figures"]["human_perplexity"] == found["stages"]["base"]["figures"]["human_perplexity"]
    assert found["stages"]["human"]["figures"]["well_formed"]["value"] == 1
    assert found["stages"]["sft"]["questions"] == of["questions"]  # the same random numbers for every stage
    assert set(of["by_type"]) == {"Analogy", "Clarity"}

    evaluate.run([*SMALL, "--show", "0"])  # the judge and the scorer are there now
    assert (place / "runs" / "evaluation.json").read_bytes() == written
    assert "fitted" not in capsys.readouterr().out


def test_evaluate_without_judge_base_and_people(place, capsys):
    evaluate.run([*SMALL, "--judge", "none", "--base", "none", "--temperature", "0.7", "--samples-per-prompt", "2"])
    found = json.loads((place / "runs" / "evaluation.json").read_text())
    assert found["classifiers"] == ["scorer"]
    of = found["stages"]["sft"]
    assert len(of["questions"]) == 3 * 2 * 2
    assert "kl_to_sft" not in of["figures"] and "base_perplexity" not in of["figures"]


def test_a_single_text_has_figures_and_no_intervals(place):
    evaluate.run([*SMALL, "--limit", "1", "--dpo", "none", "--base", "none"])
    found = json.loads((place / "runs" / "evaluation.json").read_text())
    assert "low" not in found["stages"]["sft"]["figures"]["judge/accuracy"]


def test_a_split_that_sft_did_not_have_is_warned_of(place, capsys):
    evaluate.run([*SMALL, "--seed", "5", "--dpo", "none", "--base", "none"])
    assert "may have seen these texts" in capsys.readouterr().err


def test_who_has_seen_a_held_out_text_does_not_grade_it(place, capsys):
    """After another split nobody grades with the judge and the scorer of the one before; old ones cannot tell."""
    few = [*SMALL, "--base", "none", "--dpo", "none"]
    evaluate.run(few)  # fits both
    capsys.readouterr()
    for name in ("judge", "scorer"):
        with pytest.raises(UserError, match=rf"--{name} runs/{name} was fitted on \d of the 3 held-out texts") as said:
            evaluate.run([*few, "--seed", "4"])
        line = f"python -m socratiq.{name} --data rows.jsonl --held-out 0.4 --seed 4 --out runs/{name}"
        assert str(said.value).endswith(f"delete it, or fit it anew: {line}")
        known = place / "runs" / name / f"{name}.json"
        read = json.loads(known.read_text())
        assert read.pop("texts")
        known.write_text(json.dumps(read))  # as an earlier version wrote it
    capsys.readouterr()
    evaluate.run([*few, "--seed", "4"])
    assert [line for line in capsys.readouterr().err.splitlines() if "which texts" in line] == [
        f"warning: --{name} runs/{name} does not say which texts it was fitted on; it may have seen the held-out ones"
        for name in ("judge", "scorer")
    ]


def test_what_cannot_be_evaluated_is_said(place):
    with pytest.raises(UserError, match="no text is held out"):
        evaluate.run([*SMALL, "--held-out", "0"])
    with pytest.raises(UserError, match="--dpo runs/other"):
        evaluate.run([*SMALL, "--dpo", "runs/other"])
    with pytest.raises(UserError, match="no model to evaluate"):
        evaluate.run([*SMALL, "--base", "none", "--sft", "none", "--dpo", "none", "--ppo", "none"])
    row = {"context": "Some other text.", "question": "Is it so?", "type": "Fear appeal"}
    other = place / "other.jsonl"
    other.write_text((place / "rows.jsonl").read_text() + json.dumps(row) + "\n")
    evaluate.run([*SMALL, "--base", "none", "--dpo", "none"])  # fits runs/scorer
    with pytest.raises(UserError, match="--judge runs/judge does not know the type 'Fear appeal'"):
        evaluate.run([*SMALL, "--data", "other.jsonl"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--scorer", "none"], "without a scorer there are no figures"), (["--judge", "openai"], "use --judge-api NAME")],
)
def test_no_folder_is_made_of_a_misunderstanding(place, capsys, arguments, says):
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as left:
        evaluate.run([*SMALL, *arguments])
    complained = capsys.readouterr().err
    assert left.value.code == 2 and says in complained and complained.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_numbers_in_the_table_are_short():
    assert evaluate.shown({"value": 0.123, "low": 0.05, "high": 1.0}) == ".12 [.05 1.0]"
    assert evaluate.shown({"value": -0.001, "low": -0.2, "high": 0.3}) == ".00 [-.20 .30]"
    assert evaluate.shown({"value": 1234.5}) == "1234" and evaluate.shown(None) == evaluate.shown({"value": None}) == ""
