"""The scorer: strengths, calibration, gates, the language model's opinion, files, figures, and the reward."""

import argparse
import itertools
import json
import math
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from socratiq.batch import make_batch
from socratiq.data import Row, load_rows, split_by_context
from socratiq.models import load_policy
from socratiq.policy import Policy, token_logprobs
from socratiq.prompts import plain_ids
from socratiq.reward import load_reward
from socratiq.run.errors import UserError
from socratiq.scorer import gates, grading
from socratiq.scorer import ngrams as logistic
from socratiq.scorer.__main__ import run as fit_scorer
from socratiq.scorer.grading import rows_to_learn_from
from socratiq.scorer.language_model import LanguageModel, Reading, open_language_model
from socratiq.scorer.scorer import VERSION, Scorer, cross_validate, fluency_signs, mean_opinion

TOPICS = "dogs trams taxes farms films bikes books games rivers phones clocks gardens lamps ships towers bridges"
TOPICS = TOPICS.split()
CUES = {
    "Clarity": ("What exactly do you mean by {0} here?", "Could you define what you call {0} in this case?"),
    "Assumptions": ("Are you assuming that {0} never change?", "Do you take it for granted that {0} are good?"),
    "Reasons": ("Why do you think that {0} matter so much?", "What evidence is there about {0} at all?"),
    "others": ("Who even likes {0} anyway, you fool?",),
}


def made_rows(topics=TOPICS) -> list[Row]:
    """Seven rows for each of 16 texts, of three types that cue words give away. tests/test_judge.py has them too."""
    rows = []
    for topic in topics:
        context = f"Everybody in our town talks about {topic}. I think {topic} should be left alone, since they work."
        rows += [Row(context, form.format(topic), kind, "") for kind, forms in CUES.items() for form in forms]
    return rows


def columns_of(rows) -> list[list[str]]:
    """Contexts, questions and types of the rows that have a type."""
    return [list(column) for column in zip(*[row[:3] for row in rows if row.type != "others"], strict=True)]


ROWS = made_rows()


class FakeModel:
    """Reads as a language model would that finds "zq" odd and every shared word likely: no torch model behind it."""

    name = "fake"

    def read(self, contexts, questions):
        found = []
        for context, question in zip(contexts, questions, strict=True):
            said, there = gates.words(question), set(gates.words(context))
            logprobs = [-2.0 - 0.1 * len(w) - 9.0 * ("zq" in w) + 1.5 * (w in there) for w in said]
            cues = [float(cue in said) for cue in ("mean", "assuming", "granted", "define", "why")]
            found.append(Reading(torch.tensor(logprobs), torch.tensor(cues)))
        return found


@pytest.fixture(scope="module")
def scorer():
    return Scorer.fit(ROWS)


@pytest.fixture(scope="module")
def deep():
    """A scorer with a second layer."""
    return Scorer.fit(ROWS, lm=FakeModel())


# --- strengths ------------------------------------------------------------------------------------------------------


def test_strengths_are_one_probability_a_type_and_find_the_type(scorer):
    assert scorer.types == ["Assumptions", "Clarity", "Reasons"]  # from the rows, "others" not among them
    contexts, questions, types = columns_of(made_rows(["kites", "violins"]))
    strengths = scorer.strengths(contexts, questions)
    assert strengths.shape == (len(types), 3) and strengths.dtype == torch.float32
    assert ((strengths > 0) & (strengths < 1)).all()
    assert [scorer.types[i] for i in strengths.argmax(1)] == types
    assert scorer.strengths([], []).shape == (0, 3)


def test_a_question_can_be_of_two_types_or_of_none(scorer):
    both = "What exactly do you mean by dogs here, and are you assuming that dogs never change?"
    none = "Who even likes kites anyway, you fool?"  # rows labelled `others` are negatives of every type
    (assumptions, clarity, reasons), of_none = scorer.strengths([""] * 2, [both, none])
    assert clarity > 0.4 and assumptions > 0.4 and reasons < 0.2 and of_none.max() < 0.2


def test_the_same_rows_in_any_order_give_the_same_bytes(tmp_path, scorer):
    scorer.save(tmp_path / "a")
    Scorer.fit(random.Random(1).sample(ROWS, len(ROWS))).save(tmp_path / "b")
    first, again = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "ab")
    assert first == again and first.keys() == {"scorer.json", "scorer.safetensors"}


HARMS = [("scorer.json", "{", ""), ("scorer.json", "[]", ""), ("scorer.safetensors", "cut", "")]
# The weights of another version belong to other features: they would grade, and wrongly.
HARMS += [("scorer.json", json.dumps({"version": other}), "another version") for other in (None, VERSION - 1)]


@pytest.mark.parametrize(("name", "content", "problem"), HARMS)
def test_a_folder_that_is_no_scorer_of_this_version_is_refused(tmp_path, scorer, name, content, problem):
    scorer.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"no scorer that can be read \(.*{problem}.*; fit one with"):
        Scorer.load(tmp_path)


# --- what rows may look like ----------------------------------------------------------------------------------------


ANALOGY = Row("A text of stones.", "Is a stone like a star?", "Analogy", "")


# One type, no negatives, a type with a single row, one row.
FEW = [[r for r in ROWS if r.type == "Clarity"], [r for r in ROWS if r.type != "others"], [*ROWS, ANALOGY], ROWS[:1]]


@pytest.mark.parametrize("rows", FEW)
def test_few_rows_make_a_scorer(rows):
    scorer = Scorer.fit(rows)
    assert scorer.types == sorted({r.type for r in rows} - {"others"})
    reward = scorer.reward(["dogs are good", ""], [ROWS[0].question, ANALOGY.question], ["Clarity"] * 2)
    assert ((reward >= 0) & (reward <= 1)).all() and reward[0] > 0.1


def test_a_type_that_is_not_known_is_refused(scorer):
    with pytest.raises(UserError, match=r"does not know the type 'Irony'; it knows Assumptions, Clarity, Reasons"):
        scorer.reward(["a text"], ["Why is that?"], ["Irony"])


ODD = ["", " ", "?", "\n", "a", "a?", "🤔?", "?" * 500, "x " * 3000 + "?", "\x00\x01?", "为什么？", "'''?", "_?_ a ?"]


def test_odd_texts_are_graded_like_any(scorer, deep):
    for context, used in itertools.product(("", "?", ROWS[0].context), (scorer, deep)):
        reward, parts = used.graded([context] * len(ODD), ODD, ["Clarity"] * len(ODD))
        assert all(((x >= 0) & (x <= 1)).all() for x in [reward, *parts.values()])
        assert reward.max() < 0.05


@settings(max_examples=60, deadline=None)
@given(context=st.text(max_size=80), question=st.text(max_size=120))
def test_any_text_has_a_reward(scorer, context, question):
    reward = scorer.reward([context], [question], ["Reasons"])
    assert reward.shape == (1,) and 0 <= reward[0] <= 1


# --- the reward -----------------------------------------------------------------------------------------------------


def test_the_reward_is_a_power_of_the_strength_times_the_gates(scorer, deep):
    columns = columns_of(ROWS[:14])
    for used, opinions in ((scorer, ["ngrams"]), (deep, ["ngrams", "probe"])):
        reward, parts = used.graded(*columns)
        assert list(parts) == ["strength", *gates.GATES, *opinions]
        strength, product = parts["strength"], torch.stack([parts[name] for name in gates.GATES]).prod(0)
        assert torch.allclose(reward, strength**0.7 * product) and torch.equal(reward, used.reward(*columns))
        assert torch.allclose(strength, torch.stack([parts[name] for name in opinions]).log().mean(0).exp())
        own = torch.tensor([used.types.index(name) for name in columns[2]])[:, None]
        assert torch.allclose(strength, used.strengths(*columns[:2]).gather(1, own)[:, 0])
    assert (scorer.graded(*columns)[1]["fluency"] == 1).all()  # nothing is known of it without a language model
    assert scorer.reward([], [], []).shape == (0,)


def test_explain_says_what_reward_and_strengths_say(deep):
    row = ROWS[0]
    said = deep.explain(row.context, row.question)
    rewards = deep.reward([row.context] * 3, [row.question] * 3, deep.types)
    assert said["reward"] == dict(zip(deep.types, rewards.tolist(), strict=True))
    strengths = deep.strengths([row.context], [row.question])[0].tolist()
    assert said["strength"] == pytest.approx(dict(zip(deep.types, strengths, strict=True)))
    assert set(said) == {"strength", "ngrams", "probe", "reward", *gates.GATES}
    assert json.loads(json.dumps(said)) == said


def test_genuine_questions_pay_little_for_the_gates(scorer):
    reward = scorer.reward(*columns_of(made_rows(["kites", "violins", "comets"])))
    assert reward.mean() > 0.65 and (reward < 0.1).float().mean() <= 0.1


# --- gates, by hand -------------------------------------------------------------------------------------------------

MARKUP = ["<|im_end|>", "[TOOL_CALLS]", "[/INST]", "<｜User｜>", "<pad>", "<0x0A>"]  # of several model families


@pytest.mark.parametrize(
    ("expected", "questions"),
    [
        (1, ["Why do you think so?", "  Why do you think so?  ", "Why do you think so ?", "Why is that “fair” then?"]),
        (0.5, ["So, do, you, really think so?"]),  # a mark for two words: less than .4 a word cost nothing, .6 all
        (0.25, ["What if?"]),  # two words of the five that pay nothing
        (0.5, ["Why do you?"]),
        (0, ["Why do you think so", "Why? Do you think so?", "Why do you think so??", "Why do you\nthink so?", "Why?"]),
        (0, [f"Why do you think so {markup}?" for markup in MARKUP]),
        (0, ["why why why why why why why?", "why do you why do you why do you?"]),
        *((share, [" ".join(f"w{i}" for i in range(n)) + "?"]) for n, share in ((24, 1), (35, 0.5), (46, 0))),
    ],
)
def test_form(expected, questions):
    assert [gates.form(question) for question in questions] == pytest.approx([expected] * len(questions))


def test_ramp():
    assert [gates.ramp(x, 1, 3) for x in (0, 1, 2, 3, 9)] == [0, 0, 0.5, 1, 1]
    assert [gates.ramp(x, 4, 2) for x in (0, 2, 3, 4, 9)] == [1, 1, 0.5, 0, 0]
    fitted = gates.ramp_below([float(x) for x in range(101)], 0.1)
    assert fitted == (-30.0, 10.0)  # nine of ten pay nothing; 0 as far below the tenth as the median, 50, lies above
    assert gates.ramp_below([3.0], 0.1) == (2.75, 3.0)


def test_originality_by_the_longest_copied_run():
    context = "The mayor says that our old trams are too slow for anyone who has work to do."
    assert gates.originality(context, "Why should speed matter more than price?") == 1.0
    assert gates.originality(context, "Our old trams are too slow?") == 0.0
    # six of nine words are copied in one run, three are the question's own: a third, in a ramp from .2 to .5
    question = "Would you say our old trams are too slow?"
    assert gates.originality(context, question) == pytest.approx((1 / 3 - 0.2) / 0.3)
    assert gates.originality("", "Why should speed matter?") == 1.0


def test_a_question_copied_from_the_instruction_is_not_original(scorer):
    copied = "You will see a text and you should generate one critical question in the format Clarity?"
    parts = scorer.graded(["My trams are slow."] * 2, [copied, "Are your trams slow?"], ["Clarity"] * 2)[1]
    assert parts["originality"].tolist() == [0.0, 1.0]


def test_a_sentence_begins_once_and_as_the_rows_do():
    ends = ("?", "?", ", and so will I?")
    asked = [f"{word} the tram of Ann{end}" for word in ("Is", "Was", "Ann's") for end in ends]
    fitted = gates.fit_sentence(["Ann is late. Was she? It was Ann, they say."], asked)
    assert fitted == {"openers": ["Is", "Was"], "capital": True}  # Ann has a capital inside as well
    for question in [*asked, "Is Ann late?", "What is said: Is it late?", "“is” means what?", "5 is what?", "¿Is?", ""]:
        assert gates.sentence(question, **fitted), question
    for question in ("is Ann late?", "Ann is late Was she?", "If it is, Was it?", "If it is,\n Was it?"):
        assert not gates.sentence(question, **fitted), question
    loose = gates.fit_sentence([], ["why so?", *asked[:8]])  # one of nine of these rows begins like that
    assert gates.sentence("why not?", **loose)
    assert gates.sentence("你为什么?", **gates.fit_sentence([""], ["你为什么?"] * 9))


def test_the_rarest_shared_word_by_hand():
    rarity = gates.fit_rarity(["cats chase mice", "cats sleep", "cats sleep"])
    log = math.log
    assert rarity == pytest.approx({"cats": log(3 / 2), "chas": log(3), "mice": log(3), "slee": log(3), "": log(3)})
    assert gates.rarest_shared("Cats and mice eat cheese", "Do mice or cats sleep?", rarity) == pytest.approx(log(3))
    assert gates.rarest_shared("Cats", "Which cat? Cats.", rarity) == pytest.approx(log(3 / 2))
    assert gates.rarest_shared("Dogs bark", "Do dogs bark?", rarity) == pytest.approx(log(3))  # words never met
    assert gates.rarest_shared("", "", rarity) == 0.0


@pytest.mark.parametrize(
    "question",
    [
        "你为什么认为电车应该比公共汽车更便宜？",  # Chinese: 18 characters, about six words
        "この町の電車が遅いと思うのはなぜですか？",  # Japanese
        "ทำไมคุณถึงคิดว่ารถรางควรถูกกว่ารถเมล์?",  # Thai
        "आप क्यों सोचते हैं कि ट्रेन सस्ती होनी चाहिए?",  # Hindi, whose vowel signs are no letters to \w
        "لماذا تعتقد أن القطار يجب أن يكون أرخص؟",  # Arabic
        "왜 전차가 버스보다 더 싸야 한다고 생각하시나요?",  # Korean
    ],
)
def test_form_in_other_scripts(question):
    assert gates.form(question) == 1.0
    assert gates.form(question[:-1]) == 0.0  # no question mark
    assert gates.form(question[:-1] * 8 + "?") < 0.1
    assert "".join(gates.words(question)) == "".join(question.lower()[:-1].split())


def test_words_of_mixed_scripts():
    assert gates.words("Why 电车, don’t 5?") == ["why", "电", "车", "don't", "5"]
    assert gates.count_words(["why", "电", "车", "รุ", "น"]) == pytest.approx(1 + 4 / 3)


# --- logistic regression --------------------------------------------------------------------------------------------


def test_logistic_regression_ends_where_the_gradient_is_zero():
    torch.manual_seed(0)
    x, y = torch.randn(200, 3), (torch.rand(200, 1) < 0.4).float()
    w, b = logistic.logistic_regression(x, y, 0.1)
    error = torch.sigmoid(x @ w + b) - y
    assert torch.allclose(x.T @ error / 200 + 0.1 * w, torch.zeros(3, 1), atol=1e-4)
    assert abs(error.mean()) < 1e-4 and not w.requires_grad
    again, _ = logistic.logistic_regression(x.to_sparse(), y, 0.1)
    assert torch.allclose(again, w, atol=1e-4)


def test_calibrated_makes_bold_weights_modest():
    """Labels are a coin of .7 whatever the features say, and the fit remembers every row: unseen rows get about .7."""
    torch.manual_seed(0)
    x = torch.randn(400, 300)
    y = (torch.rand(400, 1) < 0.7).float()
    part = [i % 4 for i in range(400)]
    bold, bold_bias = logistic.fit_probe(x, y)
    weight, bias = logistic.calibrated(logistic.fit_probe, x, y, part)
    new = torch.randn(2000, 300)
    assert torch.sigmoid(new @ bold + bold_bias).std() > 0.2
    fair = torch.sigmoid(new @ weight + bias)
    assert fair.std() < 0.1 and abs(fair.mean() - y.mean()) < 0.05


# --- the second layer -----------------------------------------------------------------------------------------------


def test_fluency_and_relatedness_by_the_model(deep):
    contexts, questions, types = columns_of(row for row in ROWS if "think" in row.question)
    fine = deep.graded(contexts, questions, types)[1]
    broken = deep.graded(contexts, [q.replace("think", "zqthink") for q in questions], types)[1]
    other = "Nobody here has ever been to a harbour. Boats are not for us."
    elsewhere = deep.graded([other] * len(types), questions, types)[1]
    assert fine["fluency"].mean() > 0.5 and broken["fluency"].max() < 0.1
    assert fine["relatedness"].min() > 0.8 and elsewhere["relatedness"].max() < 0.5


def test_signs_of_a_question_by_hand():
    logprobs = torch.tensor([-9.0, -1.0, -2.0, -6.0, -4.0])
    # low: -6, -4, -2, -1; a quarter is one of them
    assert fluency_signs(Reading(logprobs, None)) == pytest.approx((-4.4, -6.0))
    assert fluency_signs(Reading(logprobs[:1], None)) == (-100.0, -100.0)


@pytest.fixture(scope="module")
def tiny():
    return open_language_model("tiny", "cpu", "float32")


def test_a_saved_scorer_has_its_language_model_again(tmp_path, tiny, monkeypatch):
    """There is one reward: the same from `fit` and from `load`, until the model is trained again."""
    monkeypatch.setattr("socratiq.scorer.scorer.fingerprint", lambda name: f"content of {name}")
    fitted = Scorer.fit(ROWS[:56], lm=tiny)
    fitted.save(tmp_path)
    assert Scorer.load(tmp_path, "cpu", "float32").explain(*ROWS[0][:2]) == fitted.explain(*ROWS[0][:2])
    monkeypatch.setattr("socratiq.scorer.scorer.fingerprint", lambda name: "trained again")
    with pytest.raises(UserError, match="tiny has changed since; delete it"):
        Scorer.load(tmp_path)


def test_readings_are_those_of_one_question_at_a_time(tiny):
    contexts, questions = [r.context for r in ROWS[:20]], [r.question for r in ROWS[:20]]
    for texts in ([""] * 20, contexts):
        for text, question, reading in zip(texts, questions, tiny.read(texts, questions), strict=True):
            before, between, asked = (plain_ids(tiny.tokenizer, part) for part in (text, "\n\n", question))
            with torch.no_grad():
                alone = token_logprobs(tiny.policy, make_batch([before + between], [[asked]]))["logprobs"][0, 0]
            assert torch.allclose(reading.logprobs, alone, atol=1e-5)
            apart = tiny.read([text], [question])[0]  # no sibling beside it
            assert torch.allclose(reading.features, apart.features, atol=1e-4)


def test_states_are_those_of_the_middle_and_of_four_fifths(tiny):
    """On ten layers: after five of them and after eight, as transformers counts them."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 10}
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny.tokenizer), initializer_range=0.3, **sizes))
    text, question = "Bikes are loud.", "Why do you think so?"
    before, between, asked = (plain_ids(tiny.tokenizer, part) for part in (text, "\n\n", question))
    with torch.no_grad():
        states = lm(torch.tensor([before + between + asked]), output_hidden_states=True).hidden_states
    low, high = (states[layers][0, -len(asked) :] for layers in (5, 8))  # (n, H); the first are the embeddings
    lm.set_attn_implementation("socratiq")
    policy = Policy(lm)
    policy.keep_reference()
    (reading,) = LanguageModel(policy, tiny.tokenizer).read([text], [question])
    assert torch.allclose(reading.features, torch.cat([low.mean(0), high.mean(0), low[-1], high[-1]]), atol=1e-4)


def test_long_texts_are_read_in_part_and_empty_ones_too(tiny):
    questions = ["Why do you think so?", "", "?", "so " * 500 + "?"]
    after = tiny.read(["word " * 3000, "", "a", "b"], questions)
    assert [len(reading.logprobs) for reading in after[1:]] == [0, 2, 96]
    assert after[1].features.abs().sum() == 0 and all(reading.features.isfinite().all() for reading in after)


def test_it_reads_with_the_frozen_reference(tiny):
    """Adapters that PPO trains must not change what the scorer thinks."""
    policy = load_policy("tiny", "cpu", "float32", lora_rank=2)
    lm = LanguageModel(policy, tiny.tokenizer)
    before = lm.read(["A text."], ["Why do you think so?"])[0]
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter)
    after = lm.read(["A text."], ["Why do you think so?"])[0]
    assert torch.equal(before.logprobs, after.logprobs) and torch.equal(before.features, after.features)


# --- figures --------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    strengths = torch.tensor([[0.9, 0.2], [0.6, 0.7], [0.1, 0.8], [0.3, 0.4]])
    found = grading.figures(["A", "B"], strengths, ["A", "A", "B", "others"])
    assert list(found) == ["accuracy", "macro-F1", "calibration error", "F1 of A", "F1 of B"]
    # bins of one each: .9 of a positive, .2 of a negative, .6 +, .7 -, .1 -, .8 +, .3 -, .4 -
    gap = (0.1 + 0.2 + 0.4 + 0.7 + 0.1 + 0.2 + 0.3 + 0.4) / 8
    assert list(found.values()) == pytest.approx([2 / 3, 2 / 3, gap, 2 / 3, 2 / 3])
    found = grading.figures(["A", "B"], strengths, ["A", "A", "A", "others"])
    assert (found["F1 of A"], found["F1 of B"], found["macro-F1"]) == pytest.approx((0.5, 0, 0.25))


def test_cross_validation_never_shows_a_text_to_its_own_grader():
    """Other labels of a text change the grades of others, not its own."""
    rows = made_rows(TOPICS[:5])
    rows += [r._replace(context=r.context.upper() + "  ") for r in rows]  # the same texts, written otherwise
    own = torch.tensor([" dogs" in r.context.lower() for r in rows])
    turned = [r._replace(type="Clarity") if of_dogs else r for r, of_dogs in zip(rows, own, strict=True)]
    found, again = (cross_validate(some)[1][0] for some in (rows, turned))
    assert torch.equal(found[own], again[own]) and not torch.equal(found, again)


def test_cross_validation_grades_rows_where_they_stand():
    (types, found), (_, backwards) = cross_validate(ROWS), cross_validate(ROWS[::-1])
    assert grading.figures(types, mean_opinion(found), [r.type for r in ROWS])["accuracy"] > 0.95
    assert torch.allclose(found, backwards.flip(1), atol=1e-3)


# --- who learns from which texts ------------------------------------------------------------------------------------


def test_judge_and_scorer_learn_from_different_texts_and_neither_from_held_out_ones():
    rows = load_rows("sample")
    held_out = {r.context for r in split_by_context(rows, 0.2, 3)[1]}
    for_judge, for_scorer = rows_to_learn_from(rows, 0.2, 3)
    seen = [{r.context for r in part} for part in (for_judge, for_scorer)]
    assert not seen[0] & seen[1] and not (seen[0] | seen[1]) & held_out
    assert len(seen[0] | seen[1]) + len(held_out) == len({r.context for r in rows})
    assert 0.2 < len(for_judge) / len(rows) < 0.6
    backwards = rows_to_learn_from(rows[::-1], 0.0, 0)
    assert [part[::-1] for part in backwards] == list(rows_to_learn_from(rows, 0.0, 0))  # order plays no part
    few = [r for r in rows if r.context in sorted(seen[1])[:2]]
    judged = few[0]._replace(type="", preference="chosen")  # a verdict on a question teaches nothing about types
    bad = few[0]._replace(preference="rejected")  # nor does a question that people judged bad
    assert rows_to_learn_from([*few, judged, bad], 0.0, 0) == (few, few)


# --- command line ---------------------------------------------------------------------------------------------------


def test_command_line(capsys, tmp_path, scorer):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"context": r.context, "question": r.question, "type": r.type}) for r in ROWS]
    path.write_text("\n".join(lines) + "\n")
    fit_scorer(["--data", str(path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for text in ("macro-F1", "calibration error", str(tmp_path / "out"), "train_ppo.py will refuse it as a reward"):
        assert text in said
    held_out = {r.context for r in split_by_context(ROWS)[1]}
    Scorer.load(tmp_path / "out", held_out=held_out)  # it has not seen what is held out by default
    scorer.save(tmp_path / "all")
    with pytest.raises(UserError, match=f"all was fitted on {len(held_out)} of the {len(held_out)} held-out texts"):
        Scorer.load(tmp_path / "all", held_out=held_out)


# --- the reward of PPO ----------------------------------------------------------------------------------------------


def ppo_arguments(**given):
    others = {"reward": None, "scorer": "", "data": "rows", "device": "cpu", "dtype": "float32", "plain": False}
    return argparse.Namespace(**{**others, "allow_bare_scorer": False, **given})


def test_ppo_refuses_a_scorer_without_a_language_model(tmp_path, scorer):
    scorer.save(tmp_path)
    with pytest.raises(UserError, match=r"has no language model.*--allow-bare-scorer"):
        load_reward(ppo_arguments(scorer=tmp_path), [], [])
    allowed, types = load_reward(ppo_arguments(scorer=tmp_path, allow_bare_scorer=True), [], [])
    columns = [ROWS[0].context], [ROWS[0].question], ["Clarity"]
    assert types == scorer.types and torch.equal(allowed(*columns)[0], scorer.reward(*columns))


REWARDS = """
def length(contexts, questions, types): return [len(q) for q in questions]
def too_few(contexts, questions, types): return [1.0]
def words(contexts, questions, types): return ["good"] * len(questions)
def number(contexts, questions, types): return 1.0
"""


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    (tmp_path / "half_a_reward.py").write_text("def reward(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def reward(name):
        return load_reward(ppo_arguments(reward=f"own_rewards:{name}"), [], ["Clarity"])[0]

    values, parts = reward("length")(["", ""], ["a?", "bc?"], ["Clarity"] * 2)
    assert values.tolist() == [2.0, 3.0] and values.dtype == torch.float32 and parts == {}
    for name in ("too_few", "words", "number"):
        with pytest.raises(UserError, match="not 2 numbers, one a question"):
            reward(name)(["", ""], ["a?", "bc?"], ["Clarity"] * 2)
    with pytest.raises(UserError, match="half_a_reward:reward: invalid syntax"):
        load_reward(ppo_arguments(reward="half_a_reward:reward"), [], ["Clarity"])
