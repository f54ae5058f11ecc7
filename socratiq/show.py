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
from itertools import pairwise

from socratiq.run import options
from socratiq.run.errors import UserError, main
from socratiq.taxonomy import OTHERS

COLOURS = {"prompt": "\033[36m", "completion": "\033[32m", "eos": "\033[1;33m", "padding": "\033[2m"}
SIGNS = str.maketrans({"Ġ": "·", "▁": "·", "Ċ": "↵", "\n": "↵"})  # how tokenizers write a space and a line end
PROMPT_SHOWN = 3  # of the prompt, only the last tokens are shown
BETA, KL_COEF, GAMMA, LAM, CLIP, VF_COEF, SAMPLES, MAX_NEW_TOKENS = 0.1, 0.05, 1.0, 0.95, 0.2, 0.1, 2, 24


def parse_arguments():
    parser = options.Parser(prog="python -m socratiq.show", description="Show one real batch of each stage, aligned.")
    add = parser.add_argument
    add("--stage", default="all", choices=["all", "sft", "dpo", "ppo"], help="which to show")
    add("--model", default="smollm2", help='"smollm2", "tiny", a checkpoint folder, or a Hub id')
    add("--data", default="sample", metavar="SOURCE", help='"sample", a file, a folder, an address or a Hub id')
    add("--scorer", default="runs/scorer", metavar="FOLDER", help="PPO's; not there: one is fitted, without a model")
    return parser.parse_args()


def print_table(kinds: list[str], rows: dict[str, list[str]]) -> None:
    """Rows of cells under each other, one column a token, wrapped to the width of the terminal.

    kinds: "prompt", "completion", "eos" or "padding" of each column, a colour each on a terminal that wants colours;
    rows: name -> one text per column; a short row is empty at its end.
    """
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    margin, width = max(map(len, rows)) + 1, max(len(cell) for row in rows.values() for cell in row) + 2
    at_once = max(1, (shutil.get_terminal_size((110, 24)).columns - margin) // width)  # tokens beside each other
    for start in range(0, len(kinds), at_once):
        print()
        for name, row in rows.items():
            cells = [cell.rjust(width) for cell in row[start : start + at_once]]
            if coloured:
                cells = [f"{COLOURS[kind]}{cell}\033[0m" for kind, cell in zip(kinds[start:], cells, strict=False)]
            print((name.ljust(margin) + "".join(cells)).rstrip())


def pick_rows(rows, data: str):
    """Two rows of different type about one text, the shortest that has them."""
    for first, other in pairwise(sorted(rows, key=lambda row: (len(row.context), row.context))):
        if first.context == other.context and first.type != other.type:
            return first, other
    raise UserError(f"--data {data}: no text has questions of two types, so there is no pair to show")


class Show:
    """The policy, the example, and one method for each stage."""

    def __init__(self, args):
        from socratiq.data import load_rows
        from socratiq.models import load_tokenizer
        from socratiq.prompts import encode_completion, encode_prompt

        self.args, self.rows = args, load_rows(args.data)
        self.about = pick_rows([row for row in self.rows if row.type not in ("", OTHERS)], args.data)
        self.tokenizer = load_tokenizer(args.model)
        self.eos = self.tokenizer.eos_token_id
        self.context, self.type = self.about[0].context, self.about[0].type
        self.prompt = encode_prompt(self.tokenizer, self.context, self.type, 512)
        self.questions = [encode_completion(self.tokenizer, row.question) for row in self.about]
        print(f"text     {self.context}\ntype     {self.type}")
        print(f"prompt   {len(self.prompt)} tokens; the last {PROMPT_SHOWN} are shown. A space is written ·")

    def sft(self) -> None:
        """K = 1: the log-prob of every token of the human question."""
        self.begin("SFT: K = 1, the human question")
        batch = self.batch(self.questions[:1])
        (loss, logprobs), (loss_after, after) = self.learn(lambda: self.sft_step(batch))
        self.table(batch, 0, {"log pi": logprobs, "  after": after})
        print(f"\nloss = - (sum of log pi) / (sum of mask) = {loss:.4f}; after one update {loss_after:.4f}")

    def dpo(self) -> None:
        """K = 2: the chosen and the rejected question behind one prompt, by policy and reference."""
        from socratiq import losses

        self.begin("DPO: K = 2, a chosen and a rejected question behind one prompt")
        batch = self.batch(self.questions)
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
        human = self.batch(self.questions[:1])
        for _ in range(3):  # away from the reference, and towards a question
            self.learn(lambda: self.sft_step(human), lr=1e-3)

        # 1. The prompt. 2. Questions. 3. Scores.
        (completions,) = sample(self.policy, [self.prompt], SAMPLES, MAX_NEW_TOKENS, self.eos, seeds=[0])
        batch = self.batch(completions)
        asked = [decode(self.tokenizer, ids) for ids in completions]
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
            end = "ends in EOS" if completions[k][-1] == self.eos else "cut off: 1 less for the missing EOS"
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

        print(f"\n\n{title}\n{'=' * len(title)}")
        self.policy = load_policy(self.args.model, dtype="float32", lora_rank=8, value_head=True)

    def batch(self, completions):
        """A batch of one row: the prompt and its completions."""
        from socratiq.batch import make_batch

        return make_batch([self.prompt], [completions]).to(self.policy.device)

    def logprobs(self, batch):
        from socratiq.policy import token_logprobs

        return token_logprobs(self.policy, batch)

    def sft_step(self, batch):
        from socratiq import losses

        logprobs = self.logprobs(batch)["logprobs"]
        return losses.sft_loss(logprobs, batch.mask), logprobs

    def reference(self, batch):
        with self.policy.reference():
            return self.logprobs(batch)["logprobs"]

    def reward(self, questions: list[str]):
        """(K,) what PPO pays for questions about the text: by the saved scorer, or by one fitted on the rows."""
        from socratiq.scorer.scorer import Scorer

        saved = os.path.isdir(self.args.scorer)
        typed = [row for row in self.rows if row.type]
        scorer = Scorer.load(self.args.scorer, dtype="float32") if saved else Scorer.fit(typed)
        return scorer.reward([self.context] * len(questions), questions, [self.type] * len(questions))

    def learn(self, step, lr: float = 3e-4):
        """What `step` returns before one update and after it; the loss comes first."""
        import torch

        optimizer = torch.optim.AdamW(self.policy.trainable().values(), lr=lr, weight_decay=0.0)
        optimizer.zero_grad()
        before = step()
        before[0].backward()
        optimizer.step()
        with torch.no_grad():
            return before, step()

    def table(self, batch, k: int, quantities) -> None:
        """The end of the prompt and completion k of the first row. quantities: name -> (1, K, C)."""
        mask = batch.mask[0, k].int().tolist()
        length, padding = mask.count(1), mask.count(0)
        first, siblings = len(self.prompt), int(batch.mask[0, :k].sum())
        ids = self.prompt[-PROMPT_SHOWN:] + batch.tokens[0, k, :length].tolist()
        tokens = [piece.translate(SIGNS) for piece in self.tokenizer.convert_ids_to_tokens(ids)]
        end, blank = range(first - PROMPT_SHOWN, first), [""] * PROMPT_SHOWN
        rows = {
            "token": tokens + ["-"] * padding,
            "index": [*end, *range(first + siblings, first + siblings + length)],
            "position": [*end, *range(first, first + length)],
            "scored at": blank + batch.read[siblings : siblings + length].tolist(),
            "mask": blank + mask,
        }
        for name, x in quantities.items():
            rows[name] = blank + [f"{value:.2f}" for value in x[0, k, :length].tolist()]
        kinds = ["eos" if token == self.eos else "completion" for token in ids[PROMPT_SHOWN:]]
        kinds = ["prompt"] * PROMPT_SHOWN + kinds + ["padding"] * padding
        print_table(kinds, {name: [str(cell) for cell in row] for name, row in rows.items()})


def run() -> None:
    args = parse_arguments()
    show = Show(args)
    for stage in ("sft", "dpo", "ppo") if args.stage == "all" else (args.stage,):
        getattr(show, stage)()


if __name__ == "__main__":
    main(run)
