"""The scorer: strengths, calibration, gates, the second layer, files, figures; and which rows it learns from."""

import copy
import json
import math
import random
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from socratiq.data import Row, load_rows, split_by_context
from socratiq.run.errors import UserError
from socratiq.scorer import fit, fluency, gates, grading, word_order
from socratiq.scorer import ngrams as logistic
from socratiq.scorer.diversity import batch_diversity, diversity_factor
from socratiq.scorer.grading import judge_split, rows_to_learn_from
from socratiq.scorer.language_model import LanguageModel, Reading
from socratiq.scorer.scorer import VERSION, Scorer, cross_validate

TOPICS = [
    "dogs",
    "trams",
    "taxes",
    "farms",
    "films",
    "bikes",
    "books",
    "games",
    "rivers",
    "phones",
    "clocks",
    "gardens",
]
TOPICS += ["lamps", "ships", "towers", "bridges"]
CUES = {
    "Clarity": ("What exactly do you mean by {0} here?", "Could you define what you call {0} in this case?"),
    "Assumptions": ("Are you assuming that {0} never change?", "Do you take it for granted that {0} are good?"),
    "Reasons": ("Why do you think that {0} matter so much?", "What evidence is there about {0} at all?"),
    "others": ("Who even likes {0} anyway, you fool?",),
}


def made_rows(topics=TOPICS) -> list[Row]:
    """Seven rows for each of 16 texts, of three types that cue words give away."""
    rows = []
    for topic in topics:
        context = f"Everybody in our town talks about {topic}. I think {topic} should be left alone, since they work."
        rows += [Row(context, form.format(topic), kind, "") for kind, forms in CUES.items() for form in forms]
    return rows


ROWS = made_rows()


class FakeModel:
    """Reads as a language model would that finds "matter" dull and every text helpful: no torch model behind it."""

    name = "fake"

    def __init__(self, seed=0.0):
        self.seed = seed
        self.reads = 0

    def forget(self):
        pass

    def read_alone(self, questions):
        self.reads += len(questions)
        found = []
        for question in questions:
            said = gates.words(question)
            logprobs = torch.tensor([-2.0 - 0.1 * len(w) - 9.0 * ("zq" in w) for w in said] or [])
            cues = ("mean", "assuming", "granted", "define", "why")
            # and which word stands before, by the length of both: a little of the order of words
            seen = [[float(cue == w) for cue in cues] + [float(len(v) == n) * len(w) for n in range(1, 9)]
                    for v, w in zip(["", *said], said)]  # noqa: B905  # fmt: skip
            hidden = torch.tensor(seen).reshape(-1, len(cues) + 8)
            found.append(Reading([zlib.crc32(w.encode()) for w in said], logprobs - self.seed, hidden))
        return found

    def read_given(self, contexts, questions):
        there = [set(gates.words(c)) for c in contexts]
        return [
            a._replace(logprobs=a.logprobs + torch.tensor([1.5 * (w in t) for w in gates.words(q)] or []))
            for a, q, t in zip(self.read_alone(questions), questions, there, strict=True)
        ]

    def signature(self):
        return [-1.0 - self.seed, -2.0]


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
    rows = [r for r in made_rows(["kites", "violins"]) if r.type != "others"]
    strengths = scorer.strengths([r.context for r in rows], [r.question for r in rows])
    assert strengths.shape == (len(rows), 3) and strengths.dtype == torch.float32
    assert ((strengths > 0) & (strengths < 1)).all()
    assert [scorer.types[i] for i in strengths.argmax(1)] == [r.type for r in rows]


def test_a_question_can_be_of_two_types(scorer):
    both = "What exactly do you mean by dogs here, and are you assuming that dogs never change?"
    strengths = dict(zip(scorer.types, scorer.strengths([""], [both])[0].tolist(), strict=True))
    assert strengths["Clarity"] > 0.4 and strengths["Assumptions"] > 0.4 and strengths["Reasons"] < 0.2


def test_others_are_negatives_of_every_type(scorer):
    strengths = scorer.strengths([""], ["Who even likes kites anyway, you fool?"])
    assert strengths.max() < 0.2


def test_each_question_is_graded_by_itself(scorer):
    questions = [r.question for r in ROWS[:20]]
    together = scorer.strengths([""] * 20, questions)
    alone = torch.cat([scorer.strengths([""], [q]) for q in questions])
    assert torch.allclose(together, alone, atol=1e-6)
    assert scorer.strengths([], []).shape == (0, 3)


def test_the_same_rows_in_any_order_give_the_same_bytes(tmp_path, scorer):
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    scorer.save(tmp_path / "a")
    Scorer.fit(shuffled, seed=7).save(tmp_path / "b")
    for name in ("scorer.safetensors", "scorer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saved_and_loaded_it_says_the_same(tmp_path, scorer):
    scorer.save(tmp_path / "scorer")
    loaded = Scorer.load(tmp_path / "scorer")
    for row in ROWS[:7]:
        assert loaded.explain(row.context, row.question) == scorer.explain(row.context, row.question)
    assert sum(file.stat().st_size for file in (tmp_path / "scorer").iterdir()) < 5e6
    assert sorted(file.name for file in (tmp_path / "scorer").iterdir()) == ["scorer.json", "scorer.safetensors"]


@pytest.mark.parametrize("harm", ["gone", "json", "cut", "part", "list", "buckets"])
def test_a_broken_folder_is_one_line(tmp_path, scorer, harm):
    folder = tmp_path / "scorer"
    scorer.save(folder)
    if harm == "gone":
        (folder / "scorer.json").unlink()
    elif harm == "json":
        (folder / "scorer.json").write_text("{")
    elif harm == "cut":
        data = (folder / "scorer.safetensors").read_bytes()
        (folder / "scorer.safetensors").write_bytes(data[:1000])
    elif harm == "part":
        settings = json.loads((folder / "scorer.json").read_text())
        del settings["order"]
        (folder / "scorer.json").write_text(json.dumps(settings))
    elif harm == "buckets":
        tensors = load_file(folder / "scorer.safetensors")
        tensors["buckets"] += 2**20
        save_file(tensors, folder / "scorer.safetensors")
    else:
        (folder / "scorer.json").write_text("[]")
    with pytest.raises(UserError, match="no scorer that can be read"):
        Scorer.load(folder)


@pytest.mark.parametrize("version", [None, VERSION - 1, VERSION + 1])
def test_a_scorer_of_another_version_is_refused(tmp_path, scorer, version):
    """Its weights belong to other features: it would grade, and wrongly."""
    scorer.save(tmp_path)
    settings = json.loads((tmp_path / "scorer.json").read_text())
    assert settings.pop("version") == VERSION
    settings |= {} if version is None else {"version": version}
    (tmp_path / "scorer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"another version of socratiq.*fit one with"):
        Scorer.load(tmp_path)


# --- what rows may look like ----------------------------------------------------------------------------------------


def test_one_type_only():
    scorer = Scorer.fit([r for r in ROWS if r.type == "Clarity"])
    assert scorer.types == ["Clarity"]
    assert scorer.reward(["dogs are good"], [ROWS[0].question], ["Clarity"])[0] > 0.1


def test_a_type_with_a_single_row():
    scorer = Scorer.fit([*ROWS, Row("A text of stones.", "Is a stone like a star?", "Analogy", "")])
    assert "Analogy" in scorer.types
    assert torch.isfinite(scorer.strengths([""], ["Is a stone like a star?"])).all()


def test_no_negatives():
    scorer = Scorer.fit([r for r in ROWS if r.type != "others"])
    assert scorer.types == ["Assumptions", "Clarity", "Reasons"]


@pytest.mark.parametrize("rows", [[], [r for r in ROWS if r.type == "others"]])
def test_rows_without_a_type_are_refused(rows):
    with pytest.raises(UserError, match="too few rows"):
        Scorer.fit(rows)


def test_a_single_row_a_single_text():
    scorer = Scorer.fit(ROWS[:1])
    reward = scorer.reward([ROWS[0].context], [ROWS[0].question], [ROWS[0].type])
    assert torch.isfinite(reward).all() and 0 <= reward[0] <= 1


def test_contradicting_labels_are_reported_and_survived():
    row = ROWS[0]
    scorer = Scorer.fit([*ROWS, row._replace(type="Reasons")])
    assert len(scorer.warnings) == 1
    assert row.question in scorer.warnings[0] and "Clarity and Reasons" in scorer.warnings[0]
    assert Scorer.fit(ROWS).warnings == []


def test_a_type_that_is_not_known_is_refused(scorer):
    for call in (scorer.reward, scorer.components):
        with pytest.raises(UserError, match=r"does not know the type 'Irony'; it knows Assumptions, Clarity, Reasons"):
            call(["a text"], ["Why is that?"], ["Irony"])


ODD = ["", " ", "?", "\n", "a", "a?", "🤔?", "?" * 500, "x " * 3000 + "?", "\x00\x01?", "为什么？", "'''?", "_?_ a ?"]


@pytest.mark.parametrize("layer", ["bare", "deep"])
def test_odd_texts_are_graded_like_any(request, scorer, deep, layer):
    used = scorer if layer == "bare" else deep
    for context in ("", "?", ROWS[0].context):
        reward, parts = used.graded([context] * len(ODD), ODD, ["Clarity"] * len(ODD))
        assert all(((x >= 0) & (x <= 1)).all() for x in [reward, *parts.values()])
        assert reward.max() < 0.05


@settings(max_examples=60, deadline=None)
@given(context=st.text(max_size=80), question=st.text(max_size=120))
def test_any_text_has_a_reward(scorer, context, question):
    reward = scorer.reward([context], [question], ["Reasons"])
    assert reward.shape == (1,) and 0 <= reward[0] <= 1


# --- the reward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["bare", "deep"])
def test_the_reward_is_a_power_of_the_strength_times_the_gates(scorer, deep, layer):
    used = scorer if layer == "bare" else deep
    rows = [r for r in ROWS if r.type != "others"][:12]
    columns = [r.context for r in rows], [r.question for r in rows], [r.type for r in rows]
    reward, parts = used.graded(*columns)
    last = ["order", "relatedness"] if layer == "bare" else ["relatedness", "fluency"]
    gates_of = ["form", "originality", "sentence", *last]
    assert list(parts) == ["strength", *gates_of] + (["ngrams", "probe"] if layer == "deep" else [])
    expected = parts["strength"] ** 0.7
    for name in gates_of:
        expected = expected * parts[name]
    assert torch.allclose(reward, expected)
    assert torch.equal(reward, used.reward(*columns))
    assert all(torch.equal(parts[name], x) for name, x in used.components(*columns).items())
    assert used.graded([], [], [])[0].shape == (0,)
    assert all(x.shape == (0,) for x in used.graded([], [], [])[1].values())


def test_explain_says_what_reward_and_strengths_say(deep):
    row = ROWS[0]
    said = deep.explain(row.context, row.question)
    n = len(deep.types)
    rewards = deep.reward([row.context] * n, [row.question] * n, deep.types)
    assert said["reward"] == dict(zip(deep.types, rewards.tolist(), strict=True))
    strengths = deep.strengths([row.context], [row.question])[0].tolist()
    assert said["strength"] == pytest.approx(dict(zip(deep.types, strengths, strict=True)))
    assert set(said) == {"strength", "ngrams", "probe", "reward"} | {
        "form", "originality", "sentence", "relatedness", "fluency",
    }  # fmt: skip
    assert json.loads(json.dumps(said)) == said


def test_genuine_questions_pay_little_for_the_gates(scorer):
    rows = [r for r in made_rows(["kites", "violins", "comets"]) if r.type != "others"]
    reward = scorer.reward([r.context for r in rows], [r.question for r in rows], [r.type for r in rows])
    assert reward.mean() > 0.65 and (reward < 0.1).float().mean() <= 0.1


# --- gates, by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Why do you think so?", 1.0),
        ("  Why do you think so?  ", 1.0),
        ("Why do you think so ?", 1.0),
        ("Why do you call this “fair”?", 1.0),
        ("So, do, you, really think so?", 0.5),  # a mark for two words: less than .4 a word cost nothing, .6 all
        ("What if?", 0.25),  # two words of the five that pay nothing
        ("Why do you?", 0.5),
        ("Why do you think so", 0.0),
        ("Why do you think so.", 0.0),
        ("Why? Do you think so?", 0.0),
        ("Why do you think so??", 0.0),
        ("Why do you\nthink so?", 0.0),
        ("Why do you think so? Yes", 0.0),
        ("Why?", 0.0),
        ("?", 0.0),
        ("", 0.0),
        ("Why do you think so <|im_end|>?", 0.0),
        ("### Why do you think so?", 0.0),
        ("[INST] Why do you think so?", 0.0),
        ("why why why why why why why?", 0.0),
        ("why do you why do you why do you?", 0.0),
        (" ".join(f"w{i}" for i in range(24)) + "?", 1.0),
        (" ".join(f"w{i}" for i in range(35)) + "?", 0.5),
        (" ".join(f"w{i}" for i in range(46)) + "?", 0.0),
    ],
)
def test_form(question, expected):
    assert gates.form(question) == pytest.approx(expected)


def test_ramp():
    up, down = gates.Ramp(1, 3), gates.Ramp(4, 2)
    assert [up(x) for x in (0, 1, 2, 3, 9)] == [0, 0, 0.5, 1, 1]
    assert [down(x) for x in (0, 2, 3, 4, 9)] == [1, 1, 0.5, 0, 0]
    fitted = gates.Ramp.below([float(x) for x in range(101)], 0.1)
    assert fitted == (-30.0, 10.0)  # nine of ten pay nothing; 0 as far below the tenth as the median, 50, lies above
    assert gates.Ramp.below([], 0.1)(5.0) == 1.0


def test_a_slope_by_hand():
    slope = fluency.Slope.below([float(x) for x in range(101)])
    assert slope == (2.0, 15.0)  # the shares .02 and .15 of genuine values
    assert [slope(x) for x in (15.0, 99.0)] == [1.0, 1.0] and slope(2.0) == pytest.approx(math.exp(-fluency.STEEP))
    assert slope(8.5) == pytest.approx(math.exp(-0.5 * fluency.STEEP)) and slope(-99.0) == 0.0
    assert fluency.Slope.below([3.0]) == (2.0, 3.0) and fluency.Slope.below([])(0.0) == 1.0


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
    parts = scorer.components(["My trams are slow."] * 2, [copied, "Are your trams slow?"], ["Clarity"] * 2)
    assert parts["originality"].tolist() == [0.0, 1.0]


def test_word_order_knows_a_question_from_its_shuffled_words():
    rows = load_rows("sample")
    held = sorted({r.context for r in rows})[:15]
    order = word_order.WordOrder.fit(*zip(*[r[:2] for r in rows if r.context not in held], strict=True))
    genuine = [r.question for r in rows if r.context in held]
    rng = random.Random(0)
    shuffled = [" ".join(rng.sample(q[:-1].split(), len(q[:-1].split()))) + "?" for q in genuine]
    assert grading.auc(order.gains(genuine), order.gains(shuffled)) > 0.96
    assert order(genuine).mean() > 0.9


def order_of(vocabulary, pairs, **settings):
    """Word order by counted pairs alone: its net says nothing."""
    size = len(vocabulary) + len(word_order.SHAPES)
    ids = {word: i for i, word in enumerate([*vocabulary, *word_order.SHAPES])}
    tensors = {
        "order_pairs": torch.tensor([ids[a] * size + ids[b] for a, b in pairs]),
        "order_counts": torch.tensor(list(pairs.values())),
        "order_table": torch.zeros(2 * word_order.SIDE * size, 1),
        "order_hidden": torch.zeros(1),
        "order_out": torch.zeros(1),
        "order_bias": torch.zeros(1),
    }
    return word_order.WordOrder(tensors, {"vocabulary": vocabulary, **settings})


def test_word_order_by_hand():
    """ "Why not?" after "Why not ask? Why ask?": starts, ends and marks are counted as words are."""
    pairs = {("<start>", "why"): 2, ("why", "not"): 1, ("why", "ask"): 1, ("not", "ask"): 1, ("ask", "?"): 2}
    pairs["?", "<end>"] = 2  # 9 joints

    def excess(seen, expected):
        return math.log((seen + 0.1) / (expected + 0.1))

    # start why, why not, not ?, ? end
    gains = [excess(2, 2 * 2 / 9), excess(1, 2 * 1 / 9), excess(0, 1 * 2 / 9), excess(2, 2 * 2 / 9)]
    gain = (sum(gains) + min(gains)) / 5 + math.log(0.5)  # a net without weights gives every joint one chance in two
    order = order_of(["why", "not", "ask", "?"], pairs, low=gain + 0.5, median=gain + 1.5)
    assert order.gains(["Why not?"]).item() == pytest.approx(gain)
    # half of the way from the median down to the low once more: exp(-5 / 2)
    assert order(["Why not?"]).item() == pytest.approx(math.exp(-2.5))
    assert order(["Why ask?"]).item() == 1.0  # it has gained more than the low


def test_word_order_counts_what_it_is_fitted_on():
    fitted = word_order.WordOrder.fit(["No."] * 2, ["Why not ask?", "Why ask?"])
    size, ids = len(fitted.ids), fitted.ids
    counts = dict(zip(fitted.tensors["order_pairs"].tolist(), fitted.tensors["order_counts"].tolist(), strict=True))
    assert counts[ids["<start>"] * size + ids["why"]] == 2 and counts[ids["why"] * size + ids["not"]] == 1
    assert sum(counts.values()) == 5 + 4 + 3  # the text's words and marks, too
    assert [fitted.shape(token) for token in ("why", "going", "art", "1984", "…")] == [
        "why", "<ing>", "<>", "<number>", "<mark>",
    ]  # fmt: skip


def test_the_net_of_word_order_by_hand():
    """Of two words; each joint has the words 0 1 0 1 0 1 around it."""
    joints = torch.tensor([[0, 1, 0, 1, 0, 1]])
    table = torch.zeros(2 * 6, 2)
    for place, word in enumerate(joints[0].tolist()):
        table[place * 2 + word] = torch.tensor([1.0, -1.0])
    table[1] = 99.0  # word 1 in the first place, which has word 0
    hidden, out, bias = torch.tensor([0.5, 0.5]), torch.tensor([2.0, 7.0]), torch.tensor([-1.0])
    assert word_order.whole(joints, table, hidden, out, bias).tolist() == [2 * 6.5 - 1]  # the second is below 0


def test_broken_joints():
    here, there = torch.arange(6).expand(6, -1), torch.arange(10, 16).expand(6, -1)
    broken = word_order.broken_joints(here, there, torch.arange(6)[:, None])
    assert broken.tolist() == [
        [0, 2, 1, 3, 4, 5],
        [0, 1, 3, 2, 4, 5],
        [0, 1, 2, 4, 3, 5],
        *[[0, 1, 2, 13, 14, 15]] * 3,
    ]


def test_a_sentence_begins_once_and_as_the_rows_do():
    asked = [
        f"{word} the tram of Ann{'' if i else ', and so will I'}?" for word in ("Is", "Was", "Ann's") for i in range(3)
    ]
    sentence = gates.Sentence.fit(["Ann is late. Was she? It was Ann, they say."], asked)
    assert sentence.openers == {"Is", "Was"} and sentence.capital  # Ann has a capital inside as well
    assert all(
        map(sentence, [*asked, "Is Ann late?", "What is said: Is it late?", "“is” means what?", "5 is what?", "¿Is?"])
    )
    for question in ("is Ann late?", "Ann is late Was she?", "If it is, Was it?", "If it is,\n Was it?"):
        assert not sentence(question), question
    assert gates.Sentence.fit([], ["why so?", *asked[:8]])("why not?")  # one of nine of these rows begins like that
    assert gates.Sentence.fit([], [])("why not Why not?") and gates.Sentence.fit([""], ["你为什么?"] * 9)("你为什么?")
    assert gates.Sentence.fit([], [])("") == gates.Sentence.fit([], asked)("") == 1.0


def test_overlap_by_hand():
    overlap = gates.Overlap.fit(["cats chase mice", "cats sleep", "cats sleep"])
    assert overlap.idf == pytest.approx(
        {"cats": math.log(3 / 2), "chas": math.log(3), "mice": math.log(3), "slee": math.log(3)}
    )
    best, missing = overlap("Mice eat cheese", "Do mice sleep, chaser?")
    assert best == pytest.approx(math.log(3))  # mice
    assert missing == pytest.approx(3 * math.log(3))  # do (never met), sleep, chaser
    assert overlap("", "") == (0.0, 0)


# --- logistic regression --------------------------------------------------------------------------------------------


def test_minimise_finds_where_the_gradient_is_zero():
    torch.manual_seed(0)
    x, y = torch.randn(200, 3), (torch.rand(200, 1) < 0.4).float()
    w, b = torch.zeros(3, 1), torch.zeros(1)
    logistic.minimise(lambda: x @ w + b, [w, b], y, 0.1)
    error = torch.sigmoid(x @ w + b) - y
    assert torch.allclose(x.T @ error / 200 + 0.1 * w, torch.zeros(3, 1), atol=1e-4)
    assert abs(error.mean()) < 1e-4 and not w.requires_grad


def test_calibrated_makes_bold_weights_modest():
    """Labels are a coin of .7 whatever the features say, and the fit remembers every row: unseen rows get about .7."""
    torch.manual_seed(0)
    x = torch.randn(400, 300)
    y = (torch.rand(400, 1) < 0.7).float()
    part = [i % 4 for i in range(400)]
    bold, bold_bias = logistic.fit_probe(x, y)
    weight, bias = logistic.calibrated(logistic.fit_probe, logistic.probe_logits, x, y, part)
    new = torch.randn(2000, 300)
    assert torch.sigmoid(new @ bold + bold_bias).std() > 0.2
    fair = torch.sigmoid(new @ weight + bias)
    assert fair.std() < 0.1 and abs(fair.mean() - y.mean()) < 0.05


def test_ngrams_are_a_set_and_keep_order():
    a, b = logistic.ngrams("Do you see why"), logistic.ngrams("Why you see do")
    assert a == sorted(set(a)) and a != b
    assert logistic.ngrams("DO you  see why") == a
    assert set(logistic.ngrams("you")) < set(logistic.ngrams("you you")) | set(logistic.ngrams("you"))


# --- the second layer -----------------------------------------------------------------------------------------------


def test_with_a_model_strength_is_the_mean_of_two_opinions(deep):
    rows = ROWS[:10]
    contexts, questions = [r.context for r in rows], [r.question for r in rows]
    expected = (deep.by_ngrams(questions) * deep.by_probe(questions)).sqrt()
    assert torch.allclose(deep.strengths(contexts, questions), expected)
    highest = torch.maximum(deep.by_ngrams(questions), deep.by_probe(questions))
    assert torch.equal(deep.highest(contexts, questions), highest) and (highest >= expected - 1e-6).all()
    assert deep.highest([], []).shape == (0, len(deep.types))


def test_fluency_and_relatedness_by_the_model(deep):
    rows = [r for r in ROWS if "think" in r.question]
    contexts, questions, types = ([row[field] for row in rows] for field in range(3))
    other = "Nobody here has ever been to a harbour. Boats are not for us."
    fine, broken, elsewhere = (
        deep.components(c, q, types)
        for c, q in (
            (contexts, questions),
            (contexts, [q.replace("think", "zqthink") for q in questions]),
            ([other] * len(rows), questions),
        )
    )
    assert fine["fluency"].mean() > 0.5 and broken["fluency"].max() < 0.1
    assert fine["relatedness"].min() > 0.8 and elsewhere["relatedness"].max() < 0.5


def test_signs_of_a_question_by_hand():
    logprobs = torch.tensor([-9.0, -1.0, -2.0, -6.0, -4.0])
    # low: -6, -4, -2, -1; a quarter is one of them; four words, 22 nats
    assert fluency.plain_signs("Why do you ask?", logprobs) == pytest.approx([-4.4, -6.0, -5.0, -5.5])
    assert fluency.plain_signs("?", logprobs[:1]) == [fluency.LEAST] * 4
    # odds of 3 to 1 and 1 to 3: even on the whole, and both joints hold with probability 3/4 * 1/4
    odds = torch.tensor([3.0, 1 / 3]).log()
    assert fluency.joint_signs(odds) == pytest.approx([0.0, -math.log(3), math.log(3 / 16)], abs=1e-6)
    assert fluency.joint_signs(odds[:0]) == [fluency.LEAST] * 3


def test_a_token_is_in_its_place_after_the_one_it_follows_in_a_question():
    assert fluency.in_place([1, 2, 3, 9], [[1, 2, 3, 4]])[:, 0].tolist() == [1, 1, 0]
    assert fluency.in_place([3, 4, 1, 2], [[1, 2, 3, 4]])[:, 0].tolist() == [1, 0, 1]  # the seam of its turned halves
    assert fluency.in_place([1, 2, 7, 8], [[1, 2, 3], [6, 7, 8]])[:, 0].tolist() == [1, 0, 1]  # of two crossed
    assert fluency.in_place([1], [[1]]).shape == (0, 1)


def test_every_question_is_broken_twice_the_same_way_each_time():
    rows = sorted((r for r in ROWS if r.type != "others"), key=lambda r: (r.question, r.type, r.context))
    broken = fluency.broken_rows(rows)
    assert broken == fluency.broken_rows(rows) and 1.8 * len(rows) < len(broken) <= 2 * len(rows)
    genuine = {r.question for r in rows}
    assert not {question for _, question, _ in broken} & genuine
    assert all(set(made_of) <= genuine for _, _, made_of in broken)
    assert fluency.broken_rows([Row("", "Why?", "Clarity", "")]) == []  # nothing to break it with


def test_a_model_is_handed_over_once_and_must_be_the_same(tmp_path, deep, scorer):
    deep.save(tmp_path / "deep")
    loaded = Scorer.load(tmp_path / "deep")
    assert loaded.lm is None and loaded.settings["model"] == "fake"
    row = ROWS[0]
    bare = loaded.reward([row.context], [row.question], [row.type])  # without the model: the first layer
    assert bare == pytest.approx(scorer.reward([row.context], [row.question], [row.type]))
    assert loaded.with_language_model(FakeModel()) is loaded
    assert loaded.explain(row.context, row.question) == deep.explain(row.context, row.question)
    assert loaded.with_language_model(None).lm is not None
    with pytest.raises(UserError, match="another language model"):
        Scorer.load(tmp_path / "deep").with_language_model(FakeModel(seed=3.0))
    with pytest.raises(UserError, match="without a language model"):
        Scorer.fit(ROWS[:20]).with_language_model(FakeModel())


@pytest.fixture(scope="module")
def tiny():
    from socratiq.models import load_policy, load_tokenizer

    return load_policy("tiny", "cpu", "float32", trainable=False), load_tokenizer("tiny")


def one_by_one(policy, tokenizer, prefix: str, question: str) -> torch.Tensor:
    """log p(token | prefix, tokens before) by a forward of its own for every question."""
    from socratiq.batch import make_batch
    from socratiq.policy import token_logprobs
    from socratiq.prompts import plain_ids

    batch = make_batch([plain_ids(tokenizer, prefix)], [[plain_ids(tokenizer, question)]])
    with torch.no_grad():
        return token_logprobs(policy, batch)["logprobs"][0, 0]


def test_readings_are_those_of_one_question_at_a_time(tiny):
    lm = LanguageModel(*tiny)
    contexts, questions = zip(*[(r.context, r.question) for r in ROWS[:9]], strict=True)
    for question, alone in zip(questions, lm.read_alone(list(questions)), strict=True):
        assert torch.allclose(alone.logprobs, one_by_one(*tiny, "\n\n", question), atol=1e-5)
        again = LanguageModel(*tiny).read_alone([question])[0]  # no sibling beside it
        assert torch.allclose(alone.features, again.features, atol=1e-4)
    for context, question, after in zip(contexts, questions, lm.read_given(contexts, questions), strict=True):
        assert after.ids == lm.alone[question].ids and len(after.hidden) == len(after.logprobs) == len(after.ids)
        apart = LanguageModel(*tiny).read_given([context], [question])[0]
        assert torch.allclose(after.logprobs, apart.logprobs, atol=1e-5)
        assert torch.allclose(after.hidden, apart.hidden, atol=1e-4)


def test_states_are_those_of_the_middle_and_of_four_fifths():
    """On ten layers: after five of them and after eight, as transformers counts them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from socratiq.models import load_tokenizer
    from socratiq.policy import Policy
    from socratiq.prompts import plain_ids

    tokenizer = load_tokenizer("tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=10, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    plain = LlamaForCausalLM(copy.deepcopy(config)).eval()
    lm = LlamaForCausalLM._from_config(config, attn_implementation="socratiq")
    lm.load_state_dict(plain.state_dict())
    policy = Policy(lm)
    policy.keep_reference()
    text, question = "Bikes are loud.", "Why do you think so?"
    before, between, asked = (plain_ids(tokenizer, part) for part in (text, "\n\n", question))
    before += between
    with torch.no_grad():
        states = plain(torch.tensor([before + asked]), output_hidden_states=True).hidden_states
    states = [x[0, len(before) :] for x in states]  # (n, H); the first are the embeddings
    (reading,) = LanguageModel(policy, tokenizer).read_given([text], [question])
    assert torch.allclose(reading.hidden, torch.cat([states[5], states[8]], 1), atol=1e-4)
    wanted = torch.cat([states[5].mean(0), states[8].mean(0), states[5][-1], states[8][-1]])
    assert torch.allclose(reading.features, wanted, atol=1e-4)


def test_it_reads_nothing_twice_and_long_texts_in_part(tiny, monkeypatch):
    lm = LanguageModel(*tiny)
    questions = ["Why do you think so?", "", "?", "so " * 500 + "?"]
    first = lm.read_alone(questions)
    after = lm.read_given(["word " * 3000, "", "a", "b"], questions)
    assert len(first[1].logprobs) == len(after[1].logprobs) == 0 and len(first[3].ids) == len(after[3].ids) == 96
    assert all(len(a.logprobs) == len(g.logprobs) for a, g in zip(first, after, strict=True))
    monkeypatch.setattr(lm, "_forward", None)  # would fail if called
    assert lm.read_alone(questions)[0] is first[0]
    assert lm.read_given(["a"], ["?"])[0] is after[2]


def test_it_reads_with_the_frozen_reference(tiny):
    """Adapters that PPO trains must not change what the scorer thinks."""
    from socratiq.models import load_policy

    policy = load_policy("tiny", "cpu", "float32", lora_rank=2)
    policy.keep_reference()
    before = LanguageModel(policy, tiny[1]).read_alone(["Why do you think so?"])[0]
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter)
    after = LanguageModel(policy, tiny[1]).read_alone(["Why do you think so?"])[0]
    assert torch.equal(before.logprobs, after.logprobs) and torch.equal(before.features, after.features)


def test_the_whole_second_layer_on_the_tiny_model(tiny, tmp_path):
    lm = LanguageModel(*tiny, name="tiny")
    rows = ROWS[:56]
    scorer = Scorer.fit(rows, lm=lm)
    scorer.save(tmp_path / "scorer")
    again = Scorer.load(tmp_path / "scorer").with_language_model(LanguageModel(*tiny, name="tiny"))
    columns = [r.context for r in rows[:6]], [r.question for r in rows[:6]], ["Clarity"] * 6
    assert torch.allclose(again.reward(*columns), scorer.reward(*columns), atol=1e-5)
    assert set(scorer.components(*columns)) > {"fluency", "probe", "ngrams"}


# --- figures --------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    strengths = torch.tensor([[0.9, 0.2], [0.6, 0.7], [0.1, 0.8], [0.3, 0.4]])
    found = grading.figures(["A", "B"], strengths, ["A", "A", "B", "others"])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.confusion.tolist() == [[1, 1], [0, 1]]
    assert found.f1 == pytest.approx({"A": 2 / 3, "B": 2 / 3}) and found.macro_f1 == pytest.approx(2 / 3)
    assert found.auc == pytest.approx({"A": 1.0, "B": 1.0})
    # bins of one each: .9 of a positive, .2 of a negative, .6 +, .7 -, .1 -, .8 +, .3 -, .4 -
    assert found.ece == pytest.approx((0.1 + 0.2 + 0.4 + 0.7 + 0.1 + 0.2 + 0.3 + 0.4) / 8)
    at = {threshold: (precision, kept) for threshold, precision, kept in found.chosen}
    assert at[0.8] == (1.0, pytest.approx(2 / 3)) and at[0.3] == (pytest.approx(2 / 3), 1.0)
    low = {threshold: (right, own) for threshold, right, own in found.rejected}
    assert low[0.3] == (1.0, 0.0) and math.isnan(low[0.05][0])
    assert "macro-F1 0.667" in str(found) and "--rejected-max" in str(found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=9), st.lists(st.integers(0, 5), max_size=9))
def test_auc_counts_pairs(high, low):
    found = grading.auc(torch.tensor(high, dtype=torch.float), torch.tensor(low, dtype=torch.float))
    if not high or not low:
        assert math.isnan(found)
    else:
        wins = sum((a > b) + 0.5 * (a == b) for a in high for b in low)
        assert found == pytest.approx(wins / len(high) / len(low))


def test_cross_validation_never_shows_a_text_to_its_own_grader():
    class Recorder:
        types = ("Clarity",)

        def __init__(self, rows):
            self.seen = {" ".join(r.context.lower().split()) for r in rows}

        def strengths(self, contexts, questions):
            return torch.tensor([[float(" ".join(c.lower().split()) in self.seen)] for c in contexts])

        highest = strengths

    rows = ROWS + [r._replace(context=r.context.upper() + "  ") for r in ROWS]  # the same texts, written otherwise
    found = grading.cross_validate(Recorder, rows)
    assert found.strengths.shape == (len(rows), 3) and found.strengths.sum() == 0


def test_cross_validation_grades_rows_where_they_stand():
    found = cross_validate(ROWS)
    assert found.accuracy > 0.95 and found.strengths.shape == (len(ROWS), 3)
    backwards = cross_validate(ROWS[::-1])
    assert torch.allclose(found.strengths, backwards.strengths.flip(0))


def test_it_is_fast_enough_on_the_rows_that_ship():
    rows = load_rows("sample")
    start = time.process_time()
    scorer = Scorer.fit(rows)
    assert time.process_time() - start < 10
    questions = [r.question for r in rows] * 3
    start = time.process_time()
    scorer.strengths(questions, questions)
    assert len(questions) / (time.process_time() - start) > 3000  # 20,000 on a quiet machine


# --- a batch --------------------------------------------------------------------------------------------------------


def test_batch_diversity_by_hand():
    questions = ["Why do you think cats purr?", "Why do you think cats sing?", "What is a cat?", "Who told you that?"]
    found = batch_diversity(questions)
    assert found == {"diversity/repeated_openers": 0.5, "diversity/near_duplicates": 0.5}  # 5 of 7 words are shared
    assert diversity_factor(questions) == pytest.approx([0.5**0.5, 0.5**0.5, 1.0, 1.0])
    assert diversity_factor(["Why is it so?"] * 4) == pytest.approx([0.25] * 4)
    assert batch_diversity([]) == {"diversity/repeated_openers": 0.0, "diversity/near_duplicates": 0.0}
    assert diversity_factor([]) == []
    assert batch_diversity(["", ""])["diversity/near_duplicates"] == 1.0


# --- who learns from which texts ------------------------------------------------------------------------------------


def test_judge_rows_and_others_share_no_text():
    rows = load_rows("sample")
    mine, rest = judge_split(rows)
    assert not {r.context for r in mine} & {r.context for r in rest} and len(mine) + len(rest) == len(rows)
    assert 0.2 < len(mine) / len(rows) < 0.6
    assert judge_split(rows[::-1])[0] == mine[::-1]  # order plays no part
    assert set(judge_split(rows[:200])[0]) <= set(mine)  # more rows move none
    assert judge_split(rows, 1.0) == (rows, []) and judge_split(rows, 0.0) == ([], rows)


def test_judge_and_scorer_learn_from_different_texts_and_neither_from_held_out_ones():
    rows = load_rows("sample")
    held_out = {r.context for r in split_by_context(rows, 0.2, 3)[1]}
    for_judge, for_scorer = rows_to_learn_from(rows, 0.2, 3)
    seen = [{r.context for r in part} for part in (for_judge, for_scorer)]
    assert not seen[0] & seen[1] and not (seen[0] | seen[1]) & held_out
    assert len(seen[0] | seen[1]) + len(held_out) == len({r.context for r in rows})
    few = [r for r in rows if r.context in sorted(seen[1])[:2]]
    assert rows_to_learn_from(few, 0.0, 0) == (few, few)


# --- command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    clear = next(r for r in rows_to_learn_from(ROWS, 0.1, 0)[1] if r.type == "Clarity")  # one the scorer learns from
    doubled = [*ROWS, clear._replace(type="Reasons")]
    lines = [json.dumps({"context": r.context, "question": r.question, "type": r.type}) for r in doubled]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_command_line(capsys, tmp_path, rows_file):
    fit.fit_scorer(["--data", str(rows_file), "--out", str(tmp_path / "out"), "--folds", "3"])
    said = capsys.readouterr().out
    for text in ("macro-F1", "--chosen-min", "--rejected-max", "calibration error", str(tmp_path / "out")):
        assert text in said
    assert "is labelled Clarity and Reasons" in said
    # Without a word about it, it has not seen what is held out by default.
    held_out = {r.context for r in split_by_context(ROWS)[1]}
    texts = Scorer.load(tmp_path / "out").settings["texts"]
    assert held_out and texts == sorted(texts) and not {grading.place(text) for text in held_out}.intersection(texts)
    assert {grading.place(r.context) for r in ROWS} > set(texts)
    fit.fit_scorer(["--data", str(rows_file), "--out", str(tmp_path / "all"), "--folds", "2", "--held-out", "0"])
    assert "will refuse it" in capsys.readouterr().out
    assert Scorer.load(tmp_path / "all").settings["texts"] == grading.texts_of(ROWS)


def test_help_and_mistakes_need_no_torch():
    """A real process whose torch cannot be imported still answers; and the module is what its command line runs."""
    blocked = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = {}; runpy.run_module('{}', None, '__main__')"
    )
    for argv, status, says in ((["--help"], 0, "of the cross-validation"), (["--folds", "1"], 2, "must be at least 2")):
        command = [sys.executable, "-c", blocked.format(argv, "socratiq.scorer")]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == status and says in done.stdout + done.stderr, done.stderr
        assert done.stderr.count("\n") == (status != 0)
