"""The metrics to watch, in charts: what each means, what is healthy, what it looks like when something is wrong.

The report draws its curves from here, with the healthy range shaded, and what else was logged plainly below. Names are
those of metrics.jsonl; a table in the README has all of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class Curve(NamedTuple):
    """One metric in a chart."""

    metric: str
    label: str
    color: str  # a colour of the report's style sheet: a stage, "held", "second", ...


class Chart(NamedTuple):
    """Metrics that are looked at together.

    band:  the healthy range (low, high), infinite where open, or a function of (where each metric's curve begins,
           arguments of the run) that gives one or None
    mark:  a value to compare with and what it is
    floor: a value the axis should show if it is near
    since: the first step that is drawn: before the first update some figures say nothing
    unit:  of the vertical axis
    """

    title: str
    curves: tuple[Curve, ...]
    meaning: str
    healthy: str
    sick: str
    band: tuple[float, float] | Callable[[dict, dict], tuple[float, float] | None] | None = None
    mark: tuple[float, str] | None = None
    floor: float | None = None
    since: int = 0
    unit: str = ""


def near_start(metric: str, low: float, high: float):
    """A band that runs from `low` to `high` times where the metric's curve begins."""

    def band(first: dict, args: dict):
        if metric not in first:
            return None
        return tuple(sorted((low * first[metric], high * first[metric])))

    return band


def clip_norm(first: dict, args: dict):
    norm = args.get("max_grad_norm")
    return (0, norm) if isinstance(norm, int | float) else None


def few_more(first: dict, args: dict):
    start = first.get("diversity/repeated_openers")
    return None if start is None else (0, max(0.1, 1.5 * start))  # a rollout may begin without any


GRADIENT = Chart(
    "Gradient norm",
    (Curve("grad_norm", "before clipping", "second"),),
    "Length of the gradient before it is clipped to --max-grad-norm (shaded: not clipped at all).",
    "Settles after the warm-up, without leaps. Being clipped at every step is common and does no harm by itself.",
    "Leaps of ten times and more, together with leaps of the loss: the learning rate is too high.",
    clip_norm,
    floor=0,
)

CHARTS: dict[str, tuple[Chart, ...]] = {
    "sft": (
        Chart(
            "Loss",
            (Curve("loss", "training", "sft"), Curve("eval/loss", "held out", "held")),
            "Cross-entropy per question token, in nats: how surprised the model is by the human question (shaded: "
            "something was learnt, and not all by heart).",
            "Falls fast for some dozen updates, then slowly. The held-out dots follow for an epoch or two. With few "
            "rows they then turn up: rows are learnt by heart. The model's own questions may go on improving all the "
            "same (README), which socratiq.evaluate tells.",
            "The held-out dots never fall: labels, learning rate. They turn up and the questions get worse, too: fewer "
            "--epochs, or --keep best. Leaps: lower --lr.",
            near_start("eval/loss", 0.4, 0.95),
            unit="nats per token",
        ),
        Chart(
            "Held-out perplexity",
            (Curve("eval/perplexity", "held out", "held"),),
            "exp(held-out loss): among how many equally likely tokens the model is undecided, on average.",
            "At its lowest a fraction of what it was before the first update. Human questions keep it well above 1.",
            "Unchanged: nothing was learned (learning rate, labels). Near 1: a held-out text was trained on.",
            near_start("eval/perplexity", 0.05, 0.8),
            floor=1,
            unit="tokens",
        ),
        GRADIENT,
    ),
    "dpo": (
        Chart(
            "Loss",
            (Curve("loss", "training", "dpo"), Curve("eval/loss", "held out", "held")),
            "-log sigmoid of the margin. Policy and reference are equal at first, so it starts at ln 2 = 0.693.",
            "Sinks steadily below ln 2, held-out pairs along with it.",
            "Near 0 within an epoch: the pairs are too easy, or beta too small. Above ln 2: it learns the reverse.",
            (0.2, math.log(2)),
            (math.log(2), "ln 2: knows nothing"),
            unit="nats per pair",
        ),
        Chart(
            "Accuracy",
            (Curve("rewards/accuracies", "training", "dpo"), Curve("eval/rewards/accuracies", "held out", "held")),
            "Share of pairs whose chosen question gained more on the reference than the rejected one.",
            "Climbs from a coin toss to between 70 and 95%.",
            "Stuck at 50%: the pairs carry no signal. 100% at once: they differ in something trivial, such as length.",
            (0.7, 0.95),
            (0.5, "coin toss"),
            since=2,  # up to the first update every pair is a draw
            unit="share of pairs",
        ),
        Chart(
            "Margin",
            (Curve("rewards/margins", "training", "dpo"), Curve("eval/rewards/margins", "held out", "held")),
            "Reward of the chosen question less that of the rejected one: beta times the difference of log-ratios.",
            "Grows from 0 to between 0.5 and 3 and flattens.",
            "Held-out margin at 0 or below: nothing carries over. Growing without end: over-optimised; fewer updates.",
            (0.5, 3),
            floor=0,
            unit="beta × nats",
        ),
        Chart(
            "Rewards",
            (Curve("rewards/chosen", "chosen", "dpo"), Curve("rewards/rejected", "rejected", "second")),
            "beta times log(policy / reference) of each question: above 0 is likelier than it was before DPO (shaded: "
            "where the chosen one should stay).",
            "Rejected falls; chosen stays near 0 or rises.",
            "Both fall and chosen merely falls less, the well-known drift: the model forgets good questions too; "
            "add --sft-coef 0.1, or a higher --beta.",
            (-1, math.inf),
            (0.0, "as before DPO"),
            unit="beta × nats",
        ),
        Chart(
            "Log-probabilities",
            (Curve("logps/chosen", "chosen", "dpo"), Curve("logps/rejected", "rejected", "second")),
            "Sum of log-probs over the tokens of a question (shaded: chosen within 10% of where it began).",
            "Chosen stays in the shade; rejected sinks below.",
            "Chosen sinks too: see Rewards.",
            near_start("logps/chosen", 0.9, 1.1),
            unit="nats per question",
        ),
        GRADIENT,
    ),
    "ppo": (
        Chart(
            "Score",
            (Curve("objective/scores", "training", "ppo"), Curve("eval/scores", "held out", "held")),
            "Mean reward of the questions of each rollout, by the scorer, before the price of KL (shaded: above "
            "the start).",
            "Rises and flattens; the held-out dots rise with it.",
            "Flat: learning rate too low or KL too dear. Rises while questions get odd: the scorer is being gamed. "
            "Read the questions below.",
            lambda first, args: (first.get("objective/scores", 0.0), math.inf),
            floor=0,
        ),
        Chart(
            "What the score is made of",
            (
                Curve("reward/strength", "strength", "ppo"),
                Curve("reward/form", "form", "dpo"),
                Curve("reward/relatedness", "relatedness", "sft"),
                Curve("reward/originality", "originality", "human"),
                Curve("reward/order", "word order", "second"),
                Curve("reward/fluency", "fluency", "held"),
            ),
            "The factors of the reward. Strength is the probability of the asked type; the others are gates (shaded: "
            "where nearly all human questions have them).",
            "Strength rises, the gates stay near 1.",
            "A gate falls while strength rises: the policy trades sense for cue words.",
            (0.7, 1),
            floor=1,
        ),
        Chart(
            "KL to the reference",
            (Curve("objective/kl", "k1", "ppo"), Curve("objective/kl_k3", "k3", "second")),
            "How far the questions have moved from the model PPO began with, in nats per question.",
            "Starts at 0, grows, flattens below about 10. k1 may dip below 0 by chance; k3 cannot.",
            "Climbs without end: raise --kl-coef. Negative k1 for long: sampling and training disagree, a bug.",
            (0, 10),
            floor=0,
            unit="nats per question",
        ),
        Chart(
            "Entropy",
            (Curve("objective/entropy", "per token", "ppo"),),
            "How undecided the model is about the next token, in nats (shaded: half of the start and above).",
            "Sinks slowly.",
            "Falls towards 0: it asks the same thing over and over; raise --kl-coef, lower --lr.",
            near_start("objective/entropy", 0.5, 1.15),
            floor=0,
            unit="nats",
        ),
        Chart(
            "Clip fraction",
            (Curve("policy/clipfrac", "policy", "ppo"), Curve("val/clipfrac", "value", "second")),
            "Share of tokens on which the clip decides: the ratio left 1 ± --clip on the side where the "
            "gradient is cut off.",
            "Between 0.01 and 0.25.",
            "Near 0: hardly anything is updated. Above 0.3: steps too long; lower --lr or --ppo-epochs.",
            (0.01, 0.25),
            floor=0,
            unit="share of tokens",
        ),
        Chart(
            "KL of one update",
            (Curve("policy/approxkl", "k3, per token", "ppo"),),
            "How far one update moves the policy from the one that wrote the questions.",
            "Below 0.02, and under --target-kl, where an update stops early.",
            "Above it again and again: lower --lr.",
            (0, 0.02),
            floor=0,
            unit="nats",
        ),
        Chart(
            "Length",
            (Curve("length", "training", "ppo"),),
            "Mean tokens of a question, end-of-sequence included (shaded: within 30% of the start).",
            "Stays about where it began.",
            "Grows to --max-new-tokens, or shrinks to a stub: length is being rewarded.",
            near_start("length", 0.7, 1.3),
            unit="tokens",
        ),
        Chart(
            "Ended by itself",
            (Curve("eos_rate", "training", "ppo"), Curve("eval/eos_rate", "held out", "held")),
            "Share of questions that drew the end-of-sequence token in time.",
            "Above 0.95.",
            "Falls: the missing-EOS penalty is too small, or --max-new-tokens too short.",
            (0.95, 1.0),
            floor=1,
            unit="share of questions",
        ),
        Chart(
            "Explained variance",
            (Curve("val/explained_variance", "value head", "ppo"),),
            "How much of the returns the value head foresees: 1 all, 0 as much as their mean.",
            "Starts near 0 and rises.",
            "Negative for long: the value head misleads; lower --vf-coef or --lr.",
            (0, 1),
            (0.0, "no better than the mean"),
        ),
        Chart(
            "Ratio",
            (Curve("val/ratio", "new / old", "ppo"),),
            "Mean probability ratio between the policy and the one that wrote the questions, over all minibatches, "
            "both by the forward pass that trains.",
            "Within a few percent of 1: up to rounding it is 1 for the first minibatch, and the later ones move away.",
            "Far from 1: steps too long; lower --lr or --ppo-epochs.",
            (0.95, 1.05),
            (1.0, "unchanged"),
        ),
        Chart(
            "Sameness",
            (
                Curve("diversity/repeated_openers", "same first three words", "second"),
                Curve("diversity/near_duplicates", "nearly the same question", "ppo"),
            ),
            "Shares of a rollout's questions that resemble another one in it (shaded: up to half more than at the "
            "start, for the first three words).",
            "Stays about where it began.",
            "Climbs towards 1: one phrase has won; see Entropy.",
            few_more,
            floor=0,
            unit="share of questions",
        ),
        Chart(
            "Value loss",
            (Curve("val/loss", "value head", "second"),),
            "Half the squared error of the value head, clipped (shaded: below the start).",
            "Falls in the first iterations, then stays low.",
            "Grows: see Explained variance.",
            near_start("val/loss", 0, 1),
            floor=0,
        ),
        GRADIENT,
    ),
}
