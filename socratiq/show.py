"""One real batch of each stage, token by token, so that one sees what the tensors mean.

    python -m socratiq.show                              # SFT, DPO and PPO on the embedded model and rows
    python -m socratiq.show --stage dpo --model runs/sft

Each stage is shown before its first update and after it: the log-probs of the human question rise, the DPO loss leaves
ln 2, the ratio leaves 1. SFT and DPO begin with policy = reference; PPO begins with a policy that a few updates of SFT
have moved, so that there is a KL to see. Nothing is written.
"""

import os
import shutil
import sys

from socratiq.run import options as cli
from socratiq.run.errors import UserError, main

COLOURS = {"prompt": "36", "completion": "32", "eos": "1;33", "padding": "2"}  # cyan, green, bold yellow, dim
PROMPT_SHOWN = 3  # of the prompt, only the last tokens are shown
BETA, KL_COEF, GAMMA, LAM, CLIP, SAMPLES = 0.1, 0.05, 1.0, 0.95, 0.2, 2


def parse_arguments():
    parser = cli.Parser(prog="python -m socratiq.show", description="Show one real batch of each stage, aligned.")
    parser.add_argument("--stage", default="all", choices=["all", "sft", "dpo", "ppo"], help="which to show")
    parser.add_argument("--model", default="smollm2", help='"smollm2", "tiny", a checkpoint folder, or a Hub id')
    parser.add_argument(
        "--data", default="sample", metavar="SOURCE", help='"sample", "socratiq", a file, a folder, or a Hub id'
    )
    parser.add_argument(
        "--scorer", default="runs/scorer", metavar="FOLDER", help="PPO's scorer; fitted if there is none"
    )
    parser.add_argument("--max-new-tokens", type=cli.count, default=24, metavar="TOKENS", help="longest PPO sample")
    parser.add_argument("--seed", type=cli.zero_or_more, default=0, help="seed of everything random")
    parser.add_argument("--width", type=cli.count, metavar="COLUMNS", help="of the page; default: the terminal's")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="auto: on a terminal")
    return parser.parse_args()


class Page:
    """Prints rows of cells that stand under each other, one column a token, wrapped to the width of the page."""

    def __init__(self, width: int | None, color: str):
        self.width = width or min(shutil.get_terminal_size((110, 24)).columns, 160)
        self.color = color == "always" or (color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)

    def title(self, text: str) -> None:
        print(f"\n\n{self.paint(text, '1')}\n{'=' * len(text)}")

    def table(self, kinds: list[str], rows: dict[str, list[str]]) -> None:
        """kinds: "prompt", "completion", "eos" or "padding" of each column; rows: name -> one text per column."""
        margin = max(map(len, rows)) + 1
        widths = [max(len(row[i]) for row in rows.values()) + 2 for i in range(len(kinds))]
        start = 0
        while start < len(kinds):
            end = start + 1
            while end < len(kinds) and sum(widths[start : end + 1]) <= self.width - margin:
                end += 1
            print()
            for name, row in rows.items():
                cells = (self.paint(row[i].rjust(widths[i]), COLOURS[kinds[i]]) for i in range(start, end))
                print((name.ljust(margin) + "".join(cells)).rstrip())
            start = end

    def paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.color and text.strip() else text


class Show:
    """The policy, the example, and one method for each stage."""

    def __init__(self, args):
        import torch

        from socratiq.data import load_rows
        from socratiq.models import load_policy, load_tokenizer
        from socratiq.taxonomy import OTHERS

        self.args, self.page, self.torch = args, Page(args.width, args.color), torch
        self.rows = load_rows(args.data)
        self.about = pick_text([row for row in self.rows if row.type not in ("", OTHERS)], args.data)
        self.tokenizer = load_tokenizer(args.model)
        self.eos = self.tokenizer.eos_token_id
        self.policy = load_policy(args.model, "auto", "float32", lora_rank=8, value_head=True, seed=args.seed)
        self.prompt, self.question = self.encode(self.about[0])
        self.begin_anew()
        print(f"text     {self.about[0].context}\ntype     {self.about[0].type}")
        print(f"prompt   {len(self.prompt)} tokens; the last {PROMPT_SHOWN} are shown. A space is written ·")

    def sft(self) -> None:
        """K = 1: the log-prob of every token of the human question."""
        from socratiq import losses

        self.page.title("SFT: K = 1, the human question")
        batch = self.batch([self.prompt], [[self.question]])

        def step():
            logprobs = self.logprobs(batch)["logprobs"]
            return losses.sft_loss(logprobs, batch.mask), logprobs

        (loss, logprobs), (loss_after, after) = self.learn(step)
        self.table(batch, 0, {"log pi": logprobs, "  after": after})
        print(f"\nloss = - (sum of log pi) / (sum of mask) = {loss:.4f}; after one update {loss_after:.4f}")

    def dpo(self) -> None:
        """K = 2: the chosen and the rejected question behind one prompt, by policy and reference."""
        from socratiq import losses

        self.page.title("DPO: K = 2, a chosen and a rejected question behind one prompt")
        self.begin_anew()
        batch = self.batch([self.prompt], [[self.question, self.encode(self.about[1])[1]]])
        reference = self.reference(batch)
        ref_logps = losses.sequence_logps(reference, batch.mask)[0]  # (2,) chosen, rejected

        def step():
            logprobs = self.logprobs(batch)["logprobs"]
            logps = losses.sequence_logps(logprobs, batch.mask)[0]
            return losses.dpo_loss(*logps, *ref_logps, BETA), logps, logprobs

        before, after = self.learn(step)
        for k, name in enumerate(("chosen", "rejected")):
            print(f"\n{name}: {self.about[k].question}")
            self.table(batch, k, {"log pi_ref": reference, "log pi": before[2], "  after": after[2]})
        for when, ((loss, chosen, rejected), logps, _) in (("before", before), ("after one update", after)):
            up, down = (f"({now:.2f} + {-then:.2f})" for now, then in zip(logps, ref_logps, strict=True))
            print(f"\n{when}: h = {up} - {down} = {(chosen - rejected) / BETA:.2f}")
            print(f"loss = - log sigmoid({BETA} h) = {loss:.4f}   rewards {chosen:.3f} and {rejected:.3f}")

    def ppo(self) -> None:
        """K = 2 samples: from log-probs to KL, reward, advantage and ratio."""
        from socratiq import losses
        from socratiq.prompts import decode
        from socratiq.sampling import sample
        from socratiq.scorer.scorer import Scorer

        self.page.title(f"PPO: K = {SAMPLES}, questions of the policy's own")
        self.begin_anew()
        prompts, questions = zip(*map(self.encode, self.about[:4]), strict=True)
        some = self.batch(list(prompts), [[question] for question in questions])
        for _ in range(6):  # away from the reference, and towards questions
            self.learn(lambda: (losses.sft_loss(self.logprobs(some)["logprobs"], some.mask),), lr=1e-3)

        # 1. The prompt. 2. Questions. 3. Scores.
        args = self.args
        completions = sample(self.policy, [self.prompt], SAMPLES, args.max_new_tokens, self.eos, seeds=args.seed)
        batch = self.batch([self.prompt], completions)
        asked = [decode(self.tokenizer, ids) for ids in completions[0]]
        trained = os.path.exists(os.path.join(args.scorer, "scorer.json"))
        scorer = Scorer.load(args.scorer) if trained else Scorer.fit(self.rows)
        context, type = self.about[0].context, self.about[0].type
        if type not in scorer.types:
            raise UserError(f"--scorer {args.scorer}: it does not know the type {type!r}; name one fitted on --data")
        raw = scorer.reward([context] * SAMPLES, asked, [type] * SAMPLES)[None].to(batch.mask.device)  # (1, K)
        scores = losses.missing_eos_penalty(raw, batch.tokens, batch.mask, self.eos, penalty=1.0)

        # 4. Log-probs and values. 5. Rewards and advantages.
        with self.torch.no_grad():
            old = self.logprobs(batch)
        reference = self.reference(batch)
        kl = losses.kl_estimate(old["logprobs"], reference, "k1", batch.mask)
        rewards = losses.shape_rewards(scores, old["logprobs"], reference, batch.mask, KL_COEF)
        advantages, returns = losses.gae(rewards, old["values"], batch.mask, GAMMA, LAM)
        white = losses.whiten(advantages, batch.mask)

        # 6. One update.
        def step():
            new = self.logprobs(batch)
            policy_loss, _ = losses.policy_loss(new["logprobs"], old["logprobs"], white, batch.mask, CLIP)
            value_loss, _ = losses.value_loss(new["values"], old["values"], returns, batch.mask, CLIP)
            return policy_loss + 0.1 * value_loss, policy_loss, (new["logprobs"] - old["logprobs"]).exp()

        (_, loss, _), (_, loss_after, ratio) = self.learn(step, lr=3e-5)
        for k in range(SAMPLES):
            end = "ends in EOS" if completions[0][k][-1] == self.eos else "cut off: 1 less for the missing EOS"
            print(f"\nsample {k + 1}: {asked[k]}")
            print(f"the scorer's reward {raw[0, k]:.3f}, {end}: score {scores[0, k]:.3f}")
            quantities = {"log pi": old["logprobs"], "log pi_ref": reference, "KL (k1)": kl, "reward": rewards}
            quantities |= {"value": old["values"], "advantage": advantages, "  whitened": white, "return": returns}
            self.table(batch, k, {**quantities, "ratio after": ratio})
        print(f"\nreward = - {KL_COEF} KL, and the score on the last token. GAE with gamma {GAMMA:g}, lambda {LAM:g}.")
        print(f"policy loss = - mean of whitened = {abs(loss):.4f} at ratio 1; after one update {loss_after:.4f}")

    # --- what the stages share

    def encode(self, row):
        """Token ids of a row's prompt and question."""
        from socratiq.prompts import encode_completion, encode_prompt

        prompt = encode_prompt(self.tokenizer, row.context, row.type, 512)
        return prompt, encode_completion(self.tokenizer, row.question)

    def batch(self, prompts, completions):
        from socratiq.batch import make_batch

        return make_batch(prompts, completions).to(self.policy.device)

    def logprobs(self, batch):
        from socratiq.policy import token_logprobs

        return token_logprobs(self.policy, batch)

    def reference(self, batch):
        with self.policy.reference():
            return self.logprobs(batch)["logprobs"]

    def begin_anew(self) -> None:
        """Fresh adapters: the policy is the reference."""
        from socratiq import lora

        with self.torch.no_grad():
            for _, adapter in lora.adapters(self.policy.lm):
                adapter.lora_B.zero_()

    def learn(self, step, lr: float = 3e-4):
        """What `step` returns before one update and after it; the loss, or a tuple that begins with it, comes first."""
        optimizer = self.torch.optim.AdamW(self.policy.trainable().values(), lr=lr, weight_decay=0.0)
        before = step()
        optimizer.zero_grad()
        (before[0][0] if isinstance(before[0], tuple) else before[0]).backward()
        optimizer.step()
        with self.torch.no_grad():
            return before, step()

    def table(self, batch, k: int, quantities) -> None:
        """The end of the prompt and completion k of the first row. quantities: name -> (1, K, C)."""
        length, width = int(batch.mask[0, k].sum()), batch.mask.shape[-1]
        ids = batch.tokens[0, k, :length].tolist()
        first, place = len(self.prompt), int(batch.mask[0, :k].sum())  # after the prompt, and after the siblings
        shown = min(PROMPT_SHOWN, first)
        padding = width - length

        def row(prompt, completion, pad=""):
            return [*map(str, prompt or [""] * shown), *map(str, completion), *[pad] * padding]

        tail = range(first - shown, first)
        kinds = ["eos" if id == self.eos else "completion" for id in ids]
        rows = {
            "token": row(self.spell(self.prompt[-shown:]), self.spell(ids), "-"),
            "index": row(tail, range(first + place, first + place + length)),
            "position": row(tail, range(first, first + length)),
            "scored at": row([], batch.read[place : place + length].tolist()),
            "mask": row([], [1] * length, "0"),
        }
        for name, x in quantities.items():
            rows[name] = row([], [f"{value:.2f}" for value in x[0, k, :length].tolist()])
        self.page.table(["prompt"] * shown + kinds + ["padding"] * padding, rows)

    def spell(self, ids: list[int]) -> list[str]:
        """Tokens as visible words: spaces as ·, line ends as ↵, what is no text by itself as the tokenizer names it."""
        words = []
        for id, piece in zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True):
            text = self.tokenizer.decode([id])
            if piece.startswith("▁") and not text.startswith(" "):  # sentencepiece drops a space at the start
                text = " " + text
            text = text.replace("\n", "↵").replace(" ", "·")
            words.append(text if text.isprintable() and text and "\ufffd" not in text else piece)
        return words


def pick_text(rows, data: str):
    """The questions about one text, two of different type first: the shortest text that has them."""
    by_context = {}
    for row in rows:
        by_context.setdefault(row.context, []).append(row)
    for context in sorted(by_context, key=len):
        first, *rest = by_context[context]
        for i, other in enumerate(rest):
            if other.type != first.type:
                return [first, other, *rest[:i], *rest[i + 1 :]]
    raise UserError(f"--data {data}: no text has questions of two types, so there is no pair to show")


def run():
    args = parse_arguments()
    show = Show(args)
    for stage in ("sft", "dpo", "ppo"):
        if args.stage in ("all", stage):
            getattr(show, stage)()


if __name__ == "__main__":
    main(run)
