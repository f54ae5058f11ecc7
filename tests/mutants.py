"""Do the tests notice? Plants one error at a time in losses.py and runs test_losses.py on each.

    python tests/mutants.py              all mutants, one line each, then the survivors
    python tests/mutants.py gae whiten   those of two functions only

A mutant is one text replaced by another: a sign flipped, a mask dropped, an index shifted, min and max swapped,
something detached or no longer detached, a sum in place of a mean. It is killed if a test fails. Exit status 1 if fewer
than 95% are killed, or if a text is no longer found (then losses.py has changed, and this list must follow).

Importing torch takes seconds and a mutant a fraction of one, so that all of them are forked from one process that has
imported torch and collected the tests already.
"""

import argparse
import inspect
import multiprocessing
import os
import re
import sys
from pathlib import Path

TESTS = Path(__file__).parent
LOSSES = TESTS.parent / "socratiq" / "losses.py"
REQUIRED = 0.95

# function: {text: what takes its place, one mutant each}. A text must occur exactly once *within its function*.
MUTANTS = {
    "masked_mean": {
        "_masked(x, mask).sum() /": [
            "x.sum() /", "(x * mask).sum() /", "_masked(x, mask).mean() /", "-_masked(x, mask).sum() /",
            "_masked(x, mask).detach().sum() /",
        ],
        "mask.sum() if": ["mask.numel() if", "mask.sum(-1) if", "(mask.sum() - 1) if"],
        "mask.sum() if total is None else total": ["mask.sum()"],
        ".masked_fill(total == 0, 1)": ["", ".clamp(min=1)"],
        "torch.broadcast_tensors(_wide(x), mask.bool())": ["_wide(x), mask.bool()"],
        ".to(x.dtype)": [".long()"],
    },
    "masked_var": {
        "(mask.sum() - 1)": ["mask.sum()", "(mask.sum() - 2)", "(mask.numel() - 1)"],
        ".clamp(min=1)": [""],
        "x - masked_mean(x, mask)": ["x", "x + masked_mean(x, mask)", "x - x.mean()"],
        "_masked(x - masked_mean(x, mask), mask)": ["x - masked_mean(x, mask)"],
        ".square()": [".abs()"],
        "deviation.square()": ["deviation.detach().square()"],
        "torch.broadcast_tensors(_wide(x), mask.bool())": ["_wide(x), mask.bool()"],
    },
    "whiten": {
        "x = _masked(x, mask)\n": ["x = _wide(x)\n"],
        "(x - mean)": ["(x + mean)", "(mean - x)"],
        "torch.rsqrt(": ["torch.sqrt("],
        "torch.rsqrt(masked_var(x, mask) + 1e-8)": ["1 / (torch.sqrt(masked_var(x, mask)) + 1e-8)"],
        "1e-8": ["1e-6"],
        "if shift_mean else 0": ["if not shift_mean else 0", "if True else 0"],
        "_masked((x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8), mask)": [
            "(x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)"
        ],
        "masked_var(x, mask)": ["masked_var(x, mask).detach()"],
        "masked_mean(x, mask)": ["masked_mean(x, mask).detach()"],
    },
    "_masked": {
        "mask.bool(), _wide(x), 0.0": ["mask.bool(), 0.0, _wide(x)", "mask.bool(), _wide(x), 1.0"],
        "torch.where(mask.bool(), _wide(x), 0.0)": ["_wide(x) * mask"],
        "_wide(x), 0.0": ["x, 0.0"],
    },
    "_wide": {
        "x if x.dtype in (torch.float32, torch.float64) else x.float()": ["x"],
        "(torch.float32, torch.float64)": ["(torch.float32,)", "(torch.float32, torch.float64, torch.bfloat16)"],
        "x.float()": ["x.double()"],
    },
    "gather_logprobs": {
        "z_y - logits.logsumexp(-1)": [
            "z_y + logits.logsumexp(-1)", "logits.logsumexp(-1) - z_y", "z_y - logits.logsumexp(-1).mean()",
            "z_y - logits.exp().sum(-1).log()", "z_y - logits.logsumexp(-2)",
            "z_y - logits.logsumexp(-1).detach()", "z_y.detach() - logits.logsumexp(-1)",
            "z_y - logits.amax(-1)",
        ],
        "logits = _wide(logits)": ["pass"],
        "tokens.expand(shape)": [
            "tokens.roll(1, -1).expand(shape)", "(tokens - 1).clamp(min=0).expand(shape)", "tokens",
        ],
        "logits.expand(*shape, -1)": ["logits"],
    },
    "sequence_logps": {
        "_masked(logprobs, mask).sum(-1)": [
            "logprobs.sum(-1)", "_masked(logprobs, mask).mean(-1)", "_masked(logprobs, mask)[..., :-1].sum(-1)",
            "_masked(logprobs, mask).detach().sum(-1)",
        ],
        "if average": ["if not average"],
        "mask.sum(-1).clamp(min=1)": ["mask.shape[-1]"],
        ".clamp(min=1)": [""],
        "average=False": ["average=True"],
    },
    "entropy": {
        "return -(": ["return ("],
        ".sum(-1)  # p": [".mean(-1)  # p"],
        ".masked_fill(logp == -torch.inf, 0)": [""],
        "logp.exp() *": ["logp.exp().detach() *", "logp *"],
        "_wide(logits)": ["logits"],
    },
    "sft_loss": {
        "-masked_mean(logprobs, mask, total)": [
            "masked_mean(logprobs, mask, total)", "-masked_mean(logprobs, mask)", "-_masked(logprobs, mask).sum()",
            "-masked_mean(logprobs[..., 1:], mask[..., 1:], total)", "-_wide(logprobs).mean()",
            "-masked_mean(sequence_logps(logprobs, mask, True), mask.any(-1))",
        ],
    },
    "dpo_loss": {
        "_wide(policy_chosen_logps) - ": ["_wide(policy_chosen_logps) + "],
        "_wide(policy_rejected_logps) - ": ["_wide(policy_rejected_logps) + "],
        "chosen_logratios - rejected_logratios": [
            "rejected_logratios - chosen_logratios", "chosen_logratios + rejected_logratios",
            "chosen_logratios - rejected_logratios.mean()", "chosen_logratios - rejected_logratios.detach()",
            "chosen_logratios.detach() - rejected_logratios",
        ],
        "_wide(ref_chosen_logps).detach()": ["_wide(ref_chosen_logps)"],
        "_wide(ref_rejected_logps).detach()": ["_wide(ref_rejected_logps)", "_wide(ref_chosen_logps).detach()"],
        "-(1 - label_smoothing)": ["(1 - label_smoothing)", "-(1 + label_smoothing)", "-1"],
        "- label_smoothing * F.logsigmoid": ["+ label_smoothing * F.logsigmoid"],
        "F.logsigmoid(-beta * h)": ["F.logsigmoid(beta * h)"],
        "F.logsigmoid(beta * h)": ["F.logsigmoid(-beta * h)", "F.logsigmoid(h)", "(beta * h).sigmoid().log()"],
        "h - 1 / (2 * beta)": ["h + 1 / (2 * beta)", "h - 1 / beta"],
        ".square()": [".abs()"],
        "F.relu(1 - beta * h)": ["F.relu(1 + beta * h)", "1 - beta * h", "F.relu(beta - h)"],
        "beta * chosen_logratios.detach()": [
            "beta * chosen_logratios", "chosen_logratios.detach()", "-beta * chosen_logratios.detach()",
            "beta * rejected_logratios.detach()",
        ],
        "beta * rejected_logratios.detach()": ["beta * rejected_logratios", "beta * chosen_logratios.detach()"],
        "return losses, beta": ["return losses.mean(), beta"],
        'kind == "sigmoid"': ['kind != "ipo"'],
    },
    "kl_estimate": {
        "_wide(logprobs) - _wide(ref_logprobs)": [
            "_wide(ref_logprobs) - _wide(logprobs)", "logprobs - ref_logprobs",
            "_wide(logprobs) - _wide(ref_logprobs).detach()",
        ],
        "d.square() / 2": ["d.square()", "d.abs() / 2"],
        "torch.expm1(-d) + d": [
            "torch.expm1(d) - d", "torch.expm1(-d) - d", "torch.exp(-d) + d", "torch.exp(-d) - 1 + d",
        ],
        "d = _masked(d, mask)": ["d = d * mask", "pass"],
        'kind="k1"': ['kind="k3"'],
    },
    "AdaptiveKL": {
        "min(max(": ["max(min("],
        "/ self.target - 1": ["/ self.target"],
        "float(kl) / self.target - 1": ["1 - float(kl) / self.target"],
        "-0.2), 0.2)": ["-0.2), 0.1)", "-0.1), 0.2)"],
        "1 + error": ["1 - error"],
        "self.value *=": ["self.value ="],
        "* float(samples)": [""],
        "/ self.horizon": [""],
    },
    "missing_eos_penalty": {
        " & mask.bool()": [""],
        ".any(-1)": [".all(-1)", "[..., -1]"],
        "tokens == eos_id": ["tokens != eos_id"],
        "_wide(scores) - penalty": ["_wide(scores) + penalty"],
        "_wide(scores), _wide(scores) - penalty": ["_wide(scores) - penalty, _wide(scores)"],
    },
    "shape_rewards": {
        "-kl_coef * kl": ["kl_coef * kl", "-kl"],
        "tokens_left == 1": ["tokens_left == 2", "tokens_left == mask.sum(-1, keepdim=True)"],
        "mask & (tokens_left == 1)": ["tokens_left == 1", "mask"],
        "mask.flip(-1).cumsum(-1).flip(-1)": ["mask.cumsum(-1)"],
        '"k1", mask': ['"k3", mask', '"k1"'],
        "logprobs, ref_logprobs, \"k1\"": ["ref_logprobs, logprobs, \"k1\""],
        "+ _masked(scores": ["- _masked(scores"],
        "_masked(scores.unsqueeze(-1), is_last)": ["_wide(scores).unsqueeze(-1) * is_last"],
        "@torch.no_grad()\n": [""],
    },
    "gae": {
        "+ gamma * next_value": ["- gamma * next_value", "+ next_value", ""],
        "- values[..., t]\n": ["+ values[..., t]\n", "\n", "- values[..., t - 1]\n"],
        "gamma * lam * next_advantage": ["lam * next_advantage", "gamma * next_advantage"],
        "delta + gamma": ["delta - gamma"],
        "delta = rewards[..., t]": ["delta = rewards[..., t - 1]"],
        "reversed(range(mask.shape[-1]))": ["range(mask.shape[-1])"],
        "next_advantage = torch.where(mask[..., t], advantages[..., t], next_advantage)": [
            "next_advantage = delta", "next_advantage = advantages[..., t]",
        ],
        "next_value = torch.where(mask[..., t], values[..., t], next_value)": [
            "next_value = values[..., t]", "next_value = rewards[..., t]",
        ],
        "return _masked(advantages, mask)": ["return advantages", "return whiten(advantages, mask)"],
        "_masked(advantages + values, mask)": [
            "advantages + values", "_masked(advantages - values, mask)", "_masked(advantages, mask)",
        ],
        "@torch.no_grad()\n": [""],
        "next_value = next_advantage = 0.0": ["next_value, next_advantage = values[..., -1], 0.0"],
    },
    "rloo": {
        "@torch.no_grad()\n": [""],
        "if samples < 2": ["if samples < 1", "if samples < 3"],
        "if rewards.dim() > 1 else 1": [""],
        "rewards.shape[-2]": ["rewards.shape[-1]", "rewards.shape[0]"],
        "_masked(rewards, mask).sum(-1, keepdim=True)": [
            "_wide(rewards).sum(-1, keepdim=True)", "_masked(rewards, mask).mean(-1, keepdim=True)",
            "_masked(rewards, mask)", "_masked(rewards, mask)[..., -1:]",
        ],
        "returns.sum(-2, keepdim=True) - returns": [
            "returns.sum(-2, keepdim=True)", "returns.sum(-2, keepdim=True) + returns",
            "returns.sum(0, keepdim=True) - returns", "returns.sum() - returns",
        ],
        "(samples - 1)": ["samples", "1"],
        "_masked(returns - siblings, mask)": [
            "returns - siblings", "(returns - siblings).expand(mask.shape)", "_masked(returns + siblings, mask)",
            "_masked(siblings - returns, mask)", "_masked(returns, mask)", "_masked(rewards - siblings, mask)",
        ],
    },
    "policy_loss": {
        "_wide(advantages).detach()": ["_wide(advantages)"],
        "_wide(old_logprobs).detach()": ["_wide(old_logprobs)"],
        "_wide(new_logprobs) -": ["_wide(new_logprobs).detach() -", "_wide(new_logprobs) +"],
        "_masked(_wide(new_logprobs) - _wide(old_logprobs).detach(), mask).exp()": [
            "(_wide(new_logprobs) - _wide(old_logprobs).detach()).exp()",
        ],
        ", mask).exp()": [", mask) + 1"],
        "unclipped = -advantages": ["unclipped = advantages"],
        "clipped = -advantages * ratio.clamp": ["clipped = advantages * ratio.clamp"],
        "1 - clip, 1 + clip": ["1 + clip, 1 - clip", "1 - clip, 1", "1 - clip, None", "None, 1 + clip", "-clip, clip"],
        "torch.max(unclipped, clipped)": ["torch.min(unclipped, clipped)", "clipped", "unclipped"],
        "masked_mean(torch.max(unclipped, clipped), mask, total)": [
            "torch.max(unclipped, clipped).mean()", "sft_loss(torch.max(unclipped, clipped), mask, 1)",
        ],
        "torch.max(unclipped, clipped), mask, total": ["torch.max(unclipped, clipped), mask"],
        "clipped > unclipped": ["clipped < unclipped", "clipped >= unclipped", "clipped != unclipped"],
        ".to(loss), mask, total)": [".to(loss), mask)", ".to(loss), mask, 1)"],
    },
    "value_loss": {
        "0.5 * ": [""],
        "_masked(new_values, mask)": ["_wide(new_values)", "_masked(new_values, mask).detach()"],
        "_wide(old_values).detach()": ["_wide(old_values)"],
        "_wide(returns).detach()": ["_wide(returns)"],
        "clamp(old_values - clip": [
            "clamp(-old_values - clip", "clamp(returns - clip", "clamp(old_values - 1", "clamp(None",
        ],
        ", old_values + clip)": [", returns + clip)", ", old_values + 1)", ", None)"],
        "old_values - clip, old_values + clip": ["-clip, clip"],
        "new_values.clamp(old_values": ["new_values.detach().clamp(old_values"],
        "new_values.clamp(old_values - clip, old_values + clip)": [
            "old_values + (new_values - old_values).clamp(-clip, clip)",
        ],
        "(new_values - returns)": ["(new_values + returns)"],
        "(clipped_values - returns)": ["(clipped_values + returns)"],
        "(clipped_values - returns).square()": ["(clipped_values - returns).abs()"],
        "torch.max(unclipped, clipped)": ["torch.min(unclipped, clipped)", "clipped", "unclipped"],
        "masked_mean(torch.max(unclipped, clipped), mask, total)": ["torch.max(unclipped, clipped).mean()"],
        "torch.max(unclipped, clipped), mask, total": ["torch.max(unclipped, clipped), mask"],
        "clipped > unclipped": ["clipped < unclipped", "clipped >= unclipped", "clipped != unclipped"],
        ".to(loss), mask, total)": [".to(loss), mask)"],
    },
    "explained_variance": {
        "1 - left / total": ["left / total", "1 - total / left", "1 + left / total"],
        "_wide(returns) - _wide(values), mask": ["_wide(returns) + _wide(values), mask", "_wide(values), mask"],
        "masked_var(_wide(returns) - _wide(values), mask)": ["masked_mean((returns - values).square(), mask)"],
        "torch.where(total > noise, 1 - left / total, 0.0)": ["1 - left / total"],
        "total > noise": ["total > 0"],
        "masked_var(returns, mask)": ["masked_var(values, mask)", "masked_var(returns, mask >= 0)"],
        "@torch.no_grad()\n": [""],
    },
}  # fmt: skip


def mutate(source, function, old, new):
    """The source with `old` replaced by `new` in the code (not the docstring) of one function."""
    blocks = source.split("\n\n\n")  # as ruff parts top-level definitions
    [block] = [block for block in blocks if re.search(rf"^(def|class) {function}\b", block, re.MULTILINE)]
    head, docstring, code = re.split('(""".*?""")', block, maxsplit=1, flags=re.DOTALL)
    found = head.count(old) + code.count(old)
    if found != 1:
        raise SystemExit(f"mutants.py: in {function}, {old!r} occurs {found} times, not once")
    return source.replace(block, head.replace(old, new) + docstring + code.replace(old, new))


class Runner:
    """A pytest plugin: in place of running the tests once, it runs them on each mutant, in a fork of their own."""

    def __init__(self, listed, jobs):
        self.listed, self.jobs = listed, jobs
        self.killed, self.survivors = [], []

    def pytest_runtestloop(self, session):
        global tests
        tests = [(item, item.nodeid + inspect.getsource(item.function)) for item in session.items]  # for every fork
        source = LOSSES.read_text()
        mutants = [(function, mutate(source, function, old, new)) for function, old, new in self.listed]
        with multiprocessing.get_context("fork").Pool(self.jobs, maxtasksperchild=1) as pool:
            killers = pool.imap(killer, [("", source), *mutants], chunksize=1)
            if (failed := next(killers)) is not None:
                raise SystemExit(f"the tests must pass before any mutant is planted; {failed} fails")
            for (function, old, new), test in zip(self.listed, killers, strict=True):
                change = f"{function}: {old.strip()} -> {new.strip() or '(nothing)'}"
                print(f"survived  {change}" if test is None else f"killed    {change}    by {test}", flush=True)
                (self.survivors if test is None else self.killed).append(change)
        return True


def killer(mutant):
    """Put a mutant (function, source) in place of losses.py and run the tests: the name of one that fails, or None."""
    from _pytest.runner import runtestprotocol

    from socratiq import losses

    function, source = mutant
    exec(compile(source, str(LOSSES), "exec"), vars(losses))
    names = vars(tests[0][0].module)
    names.update({name: value for name, value in vars(losses).items() if name in names and not name.startswith("__")})
    for item, _ in sorted(tests, key=lambda test: function not in test[1]):  # first the tests that name the function
        if any(report.failed for report in runtestprotocol(item, nextitem=None, log=False)):
            return item.nodeid.partition("::")[2]
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functions", nargs="*", help="only the mutants of these functions")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes side by side")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # forked processes share the cores
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and each costs time
    sys.path.insert(0, str(TESTS.parent))
    import pytest

    chosen = {function: MUTANTS[function] for function in args.functions or MUTANTS}
    listed = [(f, old, new) for f, texts in chosen.items() for old, several in texts.items() for new in several]
    runner = Runner(listed, args.jobs)
    pytest.main(["-q", "-s", "-p", "no:cacheprovider", str(TESTS / "test_losses.py")], plugins=[runner])
    total, killed, survivors = len(runner.listed), len(runner.killed), runner.survivors
    if killed + len(survivors) < total:
        raise SystemExit("mutants.py: stopped before the last mutant, see above")
    print(f"\n{killed} of {total} mutants killed ({killed / total:.1%}, {REQUIRED:.0%} required)")
    print("\n".join(["survivors:", *survivors] if survivors else ["no survivors"]))
    return 0 if killed >= REQUIRED * total else 1


if __name__ == "__main__":
    sys.exit(main())
