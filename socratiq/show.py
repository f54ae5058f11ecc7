"""One real batch of each stage, token by token, to see what the tensors hold.

    python -m socratiq.show                              # SFT, DPO and PPO on the embedded model and rows
    python -m socratiq.show --stage dpo --model runs/sft

Each stage is shown before an update and after it: the log-probs of the human question rise, the DPO loss leaves ln 2,
the ratio leaves 1. SFT and DPO begin with policy = reference; PPO begins with a policy that a few updates of SFT have
moved, so that there is a KL to see. Losses and reward are those of the training scripts. Nothing is written.
"""

import os
import shutil
import sys

from socratiq.run import options
from socratiq.run.errors import UserError, main, warn
from socratiq.taxonomy import OTHERS

COLOURS = {"prompt": "36", "completion": "32", "eos": "1;33", "padding": "2"}  # cyan, green, bold yellow, dim
PROMPT_SHOWN = 3  # of the prompt, only the last tokens are shown
BETA, KL_COEF, GAMMA, LAM, CLIP, VF_COEF, SAMPLES = 0.1, 0.05, 1.0, 0.95, 0.2, 0.1, 2


def parse_arguments():
    parser = options.Parser(prog="python -m socratiq.show", description="Show one real batch of each stage, aligned.")
    add = parser.add_argument
    add("--stage", default="all", choices=["all", "sft", "dpo", "ppo"], help="which to show")
    add("--model", default="smollm2", help='"smollm2", "tiny", a checkpoint folder, or a Hub id')
    add("--data", default="sample", type=options.source, help='"sample", a file, a folder, an address or a Hub id')
    add("--scorer", default="runs/scorer", metavar="FOLDER", help="PPO's scorer; if it is not there, one is fitted")
    add("--max-new-tokens", type=options.count, default=24, metavar="TOKENS", help="longest PPO sample")
    add("--seed", type=options.zero_or_more, default=0, help="seed of every random draw")
    return parser.parse_args()


def paint(text: str, code: str) -> str:
    """The text in a colour, on a terminal that wants colours."""
    wanted = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{code}m{text}\033[0m" if wanted and text.strip() else text


def print_table(kinds: list[str], rows: dict[str, list[str]]) -> None:
    """Rows of cells under each other, one column a token, wrapped to the width of the terminal.

    kinds: "prompt", "completion", "eos" or "padding" of each column; rows: name -> one text per column.
    """
    room = min(shutil.get_terminal_size((110, 24)).columns, 160) - max(map(len, rows)) - 1
    widths = [max(len(row[i]) for row in rows.values()) + 2 for i in range(len(kinds))]
    start = 0
    while start < len(kinds):
        end = start + 1
        while end < len(kinds) and sum(widths[start : end + 1]) <= room:
            end += 1
        print()
        for name, row in rows.items():
            cells = [paint(row[i].rjust(widths[i]), COLOURS[kinds[i]]) for i in range(start, end)]
            print((name.ljust(max(map(len, rows)) + 1) + "".join(cells)).rstrip())
        start = end


def pick_rows(rows, data: str):
    """Two rows of different type about one text, the shortest that has them."""
    by_context = {}
    for row in rows:
        by_context.setdefault(row.context, []).append(row)
    for context in sorted(by_context, key=len):
        first, *rest = by_context[context]
        for other in rest:
            if other.type != first.type:
                return first, other
    raise UserError(f"--data {data}: no text has questions of two types, so there is no pair to show")


class Show:
    """The policy, the example, and one method for each stage."""

    def __init__(self, args):
        from socratiq.data import load_rows
        from socratiq.models import load_tokenizer

        self.args, self.rows = args, load_rows(args.data)
        self.about = pick_rows([row for row in self.rows if row.type not in ("", OTHERS)], args.data)
        self.tokenizer = load_tokenizer(args.model)
        self.eos = self.tokenizer.eos_token_id
        self.prompt, self.question = self.encode(self.about[0])
        print(f"text     {self.about[0].context}\ntype     {self.about[0].type}")
        print(f"prompt   {len(self.prompt)} tokens; the last {PROMPT_SHOWN} are shown. A space is written ·")

    def sft(self) -> None:
        """K = 1: the log-prob of every token of the human question."""
        from socratiq import losses

        self.begin("SFT: K = 1, the human question")
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

        self.begin("DPO: K = 2, a chosen and a rejected question behind one prompt")
        batch = self.batch([self.prompt], [[self.question, self.encode(self.about[1])[1]]])
        reference = self.reference(batch)
        ref_logps = losses.sequence_logps(reference, batch.mask)[0]  # (2,) chosen, rejected

        def step():
            logprobs = self.logprobs(batch)["logprobs"]
            logps = losses.sequence_logps(logprobs, batch.mask)[0]
            return *losses.dpo_loss(*logps, *ref_logps, BETA), logps, logprobs

        before, after = self.learn(step)
        for k, name in enumerate(("chosen", "rejected")):
            print(f"\n{name}: {self.about[k].question}")
            self.table(batch, k, {"log pi_ref": reference, "log pi": before[-1], "  after": after[-1]})
        for when, (loss, chosen, rejected, logps, _) in (("before", before), ("after one update", after)):
            up, down = (f"({now:.2f} + {-then:.2f})" for now, then in zip(logps, ref_logps, strict=True))
            print(f"\n{when}: h = {up} - {down} = {(chosen - rejected) / BETA:.2f}")
            print(f"loss = - log sigmoid({BETA} h) = {loss:.4f}   rewards {chosen:.3f} and {rejected:.3f}")

    def ppo(self) -> None:
        """K = 2 samples: from log-probs to KL, reward, advantage and ratio."""
        from socratiq import losses
        from socratiq.prompts import decode
        from socratiq.sampling import sample

        self.begin(f"PPO: K = {SAMPLES}, questions of the policy's own")
        human = self.batch([self.prompt], [[self.question]])
        for _ in range(3):  # away from the reference, and towards a question
            self.learn(lambda: (losses.sft_loss(self.logprobs(human)["logprobs"], human.mask),), lr=1e-3)

        # 1. The prompt. 2. Questions. 3. Scores.
        length, seeds = self.args.max_new_tokens, [self.args.seed]
        completions = sample(self.policy, [self.prompt], SAMPLES, length, self.eos, seeds=seeds)
        batch = self.batch([self.prompt], completions)
        asked = [decode(self.tokenizer, ids) for ids in completions[0]]
        raw = self.reward(asked)[None].to(batch.mask.device)  # (1, K)
        scores = losses.missing_eos_penalty(raw, batch.tokens, batch.mask, self.eos, penalty=1.0)

        # 4. Log-probs and values. 5. Rewards and advantages.
        old = {name: x.detach() for name, x in self.logprobs(batch).items()}
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
            return policy_loss + VF_COEF * value_loss, policy_loss, (new["logprobs"] - old["logprobs"]).exp()

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

    # --- shared by the stages

    def begin(self, title: str) -> None:
        """Print a title, and open the policy anew: its adapters do nothing yet, so it is the reference."""
        from socratiq.models import load_policy

        print(f"\n\n{paint(title, '1')}\n{'=' * len(title)}")
        self.policy = load_policy(self.args.model, dtype="float32", lora_rank=8, value_head=True, seed=self.args.seed)

    def encode(self, row) -> tuple[list[int], list[int]]:
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

    def reward(self, questions: list[str]):
        """(K,) what PPO pays for questions about the text: by the saved scorer, or by one fitted on the rows."""
        from socratiq.scorer.reward import load_scorer
        from socratiq.scorer.scorer import Scorer

        if os.path.isdir(self.args.scorer):
            scorer = load_scorer(self.args.scorer, dtype="float32")
        else:
            warn(f"--scorer {self.args.scorer} is not there; one is fitted now, without a language model")
            scorer = Scorer.fit([row for row in self.rows if row.type])
        row = self.about[0]
        return scorer.reward([row.context] * len(questions), questions, [row.type] * len(questions))

    def learn(self, step, lr: float = 3e-4):
        """What `step` returns before one update and after it; the loss comes first."""
        import torch

        optimizer = torch.optim.AdamW(self.policy.trainable().values(), lr=lr, weight_decay=0.0)
        before = step()
        optimizer.zero_grad()
        before[0].backward()
        optimizer.step()
        with torch.no_grad():
            return before, step()

    def table(self, batch, k: int, quantities) -> None:
        """The end of the prompt and completion k of the first row. quantities: name -> (1, K, C)."""
        length, width = int(batch.mask[0, k].sum()), batch.mask.shape[-1]
        ids = batch.tokens[0, k, :length].tolist()
        first, siblings = len(self.prompt), int(batch.mask[0, :k].sum())
        shown = self.prompt[-PROMPT_SHOWN:]

        def row(prompt, completion, padding=""):
            return [*map(str, prompt or [""] * len(shown)), *map(str, completion), *[padding] * (width - length)]

        end = range(first - len(shown), first)
        rows = {
            "token": row(self.spell(shown), self.spell(ids), "-"),
            "index": row(end, range(first + siblings, first + siblings + length)),
            "position": row(end, range(first, first + length)),
            "scored at": row([], batch.read[siblings : siblings + length].tolist()),
            "mask": row([], [1] * length, "0"),
        }
        for name, x in quantities.items():
            rows[name] = row([], [f"{value:.2f}" for value in x[0, k, :length].tolist()])
        kinds = ["eos" if token == self.eos else "completion" for token in ids]
        print_table(["prompt"] * len(shown) + kinds + ["padding"] * (width - length), rows)

    def spell(self, ids: list[int]) -> list[str]:
        """Tokens as the tokenizer writes them, but for its signs for a space (now ·) and a line end (now ↵)."""
        signs = str.maketrans({"Ġ": "·", "▁": "·", "Ċ": "↵", "\n": "↵"})
        return [piece.translate(signs) for piece in self.tokenizer.convert_ids_to_tokens(ids)]


def run() -> None:
    args = parse_arguments()
    show = Show(args)
    for stage in ("sft", "dpo", "ppo") if args.stage == "all" else (args.stage,):
        getattr(show, stage)()


if __name__ == "__main__":
    main(run)
