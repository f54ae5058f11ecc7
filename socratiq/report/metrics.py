"""Every logged metric: its meaning, its healthy range, and how it looks when something is wrong.

The one source for the charts of the report and for the table in docs/metrics.md, which this prints:

    python -m socratiq.report.metrics
"""

import math
from typing import NamedTuple


class Band(NamedTuple):
    """A healthy range, infinite where open. With `of_start` in multiples of the value at which a curve begins."""

    low: float
    high: float
    of_start: bool = False


class Metric(NamedTuple):
    """Metrics that are looked at together: one chart of the report, one row of docs/metrics.md.

    names:  as in metrics.jsonl, separated by spaces; "reward/*" stands for all that begin with "reward/"
    stages: that log it, separated by spaces
    unit:   of the vertical axis
    band:   the healthy range; a metric without one is folded away under "more curves"
    mark:   (value, label) of a line to compare with
    since:  first step drawn
    """

    names: str
    stages: str
    title: str
    unit: str = ""
    band: Band | None = None
    meaning: str = ""
    healthy: str = ""
    sick: str = ""
    mark: tuple = ()
    since: int = 0


# fmt: off
METRICS = (
    Metric("loss eval/loss", "sft", "Loss", "nats per token", Band(0.4, 0.95, of_start=True),
           "Cross-entropy per question token, in training and on held-out texts.",
           "Falls fast for some dozen updates, then slowly. Held out may rise again once rows are memorised.",
           "Held out never falls: check labels and --lr. Rises, and questions get worse: fewer --epochs."),
    Metric("eval/perplexity", "sft", "Held-out perplexity", "tokens", Band(0.05, 0.8, of_start=True),
           "exp(held-out loss): the number of equally likely tokens the model hesitates between.",
           "Falls, stays well above 1.", "Unchanged: nothing was learned. Near 1: a held-out text was trained on."),
    Metric("loss eval/loss", "dpo", "Loss", "nats per pair", Band(0.2, math.log(2)),
           "-log sigmoid of the margin. Policy and reference are equal at first: it starts at ln 2 = 0.693 (hinge: 1).",
           "Sinks steadily below ln 2, held out as well.",
           "Near 0 at once: the pairs differ in something trivial. Above ln 2: reversed.", (math.log(2), "ln 2")),
    Metric("rewards/accuracies eval/rewards/accuracies", "dpo", "Accuracy", "share of pairs", Band(0.7, 0.95),
           "Share of pairs with a positive margin. 0 before the first update, where every pair is a draw (not drawn).",
           "Climbs from 0.5 to between 0.7 and 0.95.",
           "Stuck at 0.5: the pairs carry no signal. 1 at once: they differ in length or so.", (0.5, "chance"), 2),
    Metric("rewards/margins eval/rewards/margins", "dpo", "Margin", "beta × nats", Band(0.5, 3),
           "Reward of the chosen question minus that of the rejected one.", "Grows to 0.5 to 3, then flattens.",
           "Held out at 0 or below: nothing carries over. Growth without end: over-optimised; train for fewer steps."),
    Metric("rewards/chosen rewards/rejected eval/rewards/chosen eval/rewards/rejected",
           "dpo", "Rewards", "beta × nats", Band(-1, math.inf),
           "beta · log(policy / reference) of each question: above 0 is more likely than before DPO.",
           "Rejected falls; chosen stays near 0 or rises.",
           "Both fall, chosen only less: good questions are forgotten; --sft-coef 0.1, higher --beta.", (0, "start")),
    Metric("logps/chosen logps/rejected eval/logps/chosen eval/logps/rejected",
           "dpo", "Log-probabilities", "nats per question", Band(0.9, 1.1, of_start=True),
           "Sum of the log-probs of a question's tokens.", "Chosen stays within 10% of its start; rejected sinks.",
           "Chosen falls by tens of nats: the model forgets how to ask; --sft-coef 0.1 holds it."),
    Metric("objective/scores eval/scores", "ppo", "Score", "0 to 1", Band(1, math.inf, of_start=True),
           "Mean reward of each rollout before the KL penalty, and of the same held-out tasks every time.",
           "Rises and flattens, held out as well.",
           "Flat: --lr too low or --kl-coef too high. Jumps, or held out falls: it found a trick; read the questions."),
    Metric("reward/*", "ppo", "Parts of the score", "0 to 1", Band(0.7, 1),
           "Factors of the reward: strength is the probability of the asked type, the others are gates.",
           "Strength rises, the gates stay near 1.", "A gate falls while strength rises: cue words without sense."),
    Metric("objective/kl objective/kl_k3", "ppo", "KL to the reference", "nats per question", Band(0, 10),
           "Distance from the model PPO began with, by the estimators k1 and k3.",
           "Starts at 0, grows, flattens below about 10. k1 may dip below 0 by chance; k3 cannot.",
           "Climbs without end: raise --kl-coef. Negative k1 for long: sampling and training disagree, a bug."),
    Metric("objective/entropy", "ppo", "Entropy", "nats per token", Band(0.5, 1.15, of_start=True),
           "How undecided the policy is about the next token.", "Sinks slowly, keeps more than half of its start.",
           "Falls towards 0: the same question every time; raise --kl-coef, lower --lr."),
    Metric("policy/clipfrac val/clipfrac", "ppo", "Clip fraction", "share of tokens", Band(0.01, 0.25),
           "Share of tokens on which the clip cuts the gradient off, in the policy loss and in the value loss.",
           "0.01 to 0.25.", "Near 0: hardly any update. Above 0.3: steps too long; lower --lr or --ppo-epochs."),
    Metric("policy/approxkl", "ppo", "KL of one update", "nats per token", Band(0, 0.02),
           "Distance (k3) from the policy that wrote the questions to the updated one. --target-kl ends an update.",
           "Below 0.02.", "Above it again and again: lower --lr."),
    Metric("length", "ppo", "Length", "tokens", Band(0.7, 1.3, of_start=True),
           "Mean tokens of a question, end-of-sequence included.",
           "Within 30% of the start.", "Creeps to --max-new-tokens, or to a stub: length is being rewarded."),
    Metric("eos_rate eval/eos_rate", "ppo", "Ended", "share of questions", Band(0.95, 1),
           "Share of questions that end with the end-of-sequence token in time.",
           "Above 0.95.", "Falls: --missing-eos-penalty too small, or --max-new-tokens too short."),
    Metric("val/explained_variance", "ppo", "Explained variance", "", Band(0, 1),
           "Share of the variance of the returns that the value head predicts.", "Starts near 0 and rises.",
           "Negative for long: worse than a constant; lower --vf-coef or --lr.", (0, "a constant")),
    Metric("val/ratio", "ppo", "Ratio", "new / old", Band(0.95, 1.05),
           "Mean probability ratio of the updated policy to the one that wrote the questions, over all minibatches.",
           "1 ± 0.05.", "Far from 1: steps too long; lower --lr or --ppo-epochs.", (1, "unchanged")),
    Metric("val/loss", "ppo", "Value loss", "", Band(0, 1, of_start=True),
           "Half the squared error of the value head, clipped.",
           "Falls in the first iterations, then stays low.", "Grows: see Explained variance."),
    Metric("objective/zero_std", "ppo", "Prompts without a signal", "share of prompts", Band(0, 0.25),
           "Share of prompts whose questions all got the same reward.",
           "Near 0.", "Near 1: nothing to prefer, so nothing to learn; raise --samples-per-prompt."),
    Metric("policy/ratio_error", "ppo", "First ratio", "|ratio - 1|", None,
           "Largest |ratio - 1| of the first minibatch, where nothing has changed since the rollout.",
           "0 up to rounding.", "Above 0.1: rollout and update compute different log-probs, a bug."),
    Metric("objective/scores_std", "ppo", "Spread of the scores", "0 to 1", None,
           "Standard deviation of a rollout's rewards.", "Above 0.", "Near 0: nothing to learn from."),
    Metric("objective/rlhf_reward", "ppo", "Reward after penalties", "", None,
           "Score minus penalties (KL, missing end).", "Rises.", "Falls while scores rise: KL eats the gain."),
    Metric("objective/kl_coef", "ppo", "KL coefficient", "per nat", None,
           "Penalty per nat of KL.", "Constant, or follows --kl-target."),
    Metric("policy/loss", "ppo", "Policy loss", "", None, "The clipped surrogate loss.", "Small, around 0."),
    Metric("updates", "ppo", "Updates", "", None, "Optimiser steps on this rollout.",
           "--ppo-epochs times --minibatches.", "Fewer: --target-kl ended the update early."),
    Metric("distinct_2", "ppo", "Distinct word pairs", "share of word pairs", Band(0.8, 1.2, of_start=True),
           "Different word pairs / all word pairs of a rollout's questions (distinct-2).",
           "Steady.", "Falls while scores rise: one phrase has won; see Entropy."),
    Metric("grad_norm", "sft dpo ppo", "Gradient norm", "", Band(0, 1),
           "Norm of the gradient before it is clipped to --max-grad-norm.",
           "Settles after the warm-up. Being clipped at every step (above the shade) is common and harmless.",
           "Leaps of ten times and more, together with the loss: --lr is too high."),
    Metric("learning_rate", "sft dpo ppo", "Learning rate", "", None, "Of this update.", "Warms up, then decays to 0."),
    Metric("epoch", "sft dpo", "Epoch", "", None, "Passes over the rows so far."),
    Metric("tokens_per_second", "sft dpo ppo", "Speed", "tokens per second", None, "In timings.jsonl.", "Steady."),
    Metric("seconds", "sft dpo ppo", "Time", "seconds per step", None, "In timings.jsonl.", "Steady."),
    Metric("peak_memory_mb", "sft dpo ppo", "Peak memory", "MB", None, "In timings.jsonl.", "Flat.", "Grows: a leak."),
)
# fmt: on


def markdown() -> str:
    """The table as Markdown."""
    lines = ["| metric | stage | meaning | healthy | sick |", "|---|---|---|---|---|"]
    for metric in METRICS:
        names = ", ".join(f"`{name}`" for name in metric.names.split())
        cells = [names, metric.stages.upper(), metric.meaning, metric.healthy, metric.sick]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
