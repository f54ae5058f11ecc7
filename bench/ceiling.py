"""How much of a question's score could a critic foresee? Ridge regression from hidden states, R^2 on unseen texts.

    python bench/ceiling.py runs/dpo --scorer runs/scorer --data rows.csv --texts 500 --samples 6

The model asks K questions about each of B training texts, of one type drawn at random, as PPO does; the scorer scores
them. Then each layer's states that predict a question's tokens, the value head's input among them, have to tell the
score of the whole question. Five folds of texts; the penalty is chosen by a sixth of the other folds' texts.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from socratiq import training
from socratiq.batch import make_batch
from socratiq.data import load_rows, split_by_context
from socratiq.models import load_policy, load_tokenizer
from socratiq.policy import token_logprobs
from socratiq.prompts import decode, encode_prompt
from socratiq.run.errors import bar
from socratiq.sampling import sample
from socratiq.scorer import Scorer

AT_ONCE = 8  # texts
PENALTIES = [10.0**k for k in range(-3, 3)]  # of standardised features, times the number of rows


def r_squared(x: torch.Tensor, y: torch.Tensor, text: torch.Tensor) -> float:
    """x (N, H), y (N,), text (N,): the number of each row's text -> 1 - squared error / variance on unseen texts."""
    predicted = torch.zeros_like(y)
    for fold in range(5):
        rest = text % 5 != fold
        inner = rest & (text // 5 % 6 != 0)
        held = rest & ~inner
        errors = {c: (ridge(x, y, inner, held, c) - y[held]).square().mean().item() for c in PENALTIES}
        best = min(errors, key=errors.get)
        predicted[~rest] = ridge(x, y, rest, ~rest, best)
    return 1 - ((predicted - y).square().mean() / y.var(correction=0)).item()


def ridge(x: torch.Tensor, y: torch.Tensor, learn: torch.Tensor, tell: torch.Tensor, penalty: float) -> torch.Tensor:
    """Predictions for the rows `tell` from a fit to the rows `learn`."""
    mean, deviation, level = x[learn].mean(0), x[learn].std(0).clamp(min=1e-6), y[learn].mean()
    a, b = (x[learn] - mean) / deviation, (x[tell] - mean) / deviation
    gram = a.T @ a + penalty * len(a) * torch.eye(x.shape[1], dtype=x.dtype)
    return b @ torch.linalg.solve(gram, a.T @ (y[learn] - level)) + level


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--scorer", default="runs/scorer")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--max-prompt-tokens", type=int, default=128)
    args = parser.parse_args()

    policy, tokenizer = load_policy(args.model, trainable=False), load_tokenizer(args.model)
    contexts = list(dict.fromkeys(row.context for row in split_by_context(load_rows(args.data))[0]))
    contexts, scorer = training.draw(contexts, args.texts, 0), Scorer.load(args.scorer)
    drawn = torch.randint(len(scorer.types), (len(contexts),), generator=torch.Generator().manual_seed(0))
    types = [scorer.types[i] for i in drawn.tolist()]
    layers = policy.lm.model.layers
    watched = {f"layer {len(layers) * part // 6}": layers[len(layers) * part // 6 - 1] for part in (2, 3, 4, 5)}
    watched["the value head's input"] = policy.lm.model.norm
    states: dict[str, list] = {name: [] for name in watched}
    outputs: dict[str, torch.Tensor] = {}  # (1, N, H) each
    for name, module in watched.items():
        module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    text, token, last, scores = [], [], [], []
    for start in bar(range(0, len(contexts), AT_ONCE), desc="ask"):
        some, of = contexts[start : start + AT_ONCE], types[start : start + AT_ONCE]
        prompts = [encode_prompt(tokenizer, *task, args.max_prompt_tokens) for task in zip(some, of, strict=True)]
        asked = sample(policy, prompts, args.samples, args.max_new_tokens, tokenizer.eos_token_id, seeds=start)
        questions = [decode(tokenizer, ids) for row in asked for ids in row]
        repeated = [[x for x in column for _ in range(args.samples)] for column in (some, of)]
        scores += scorer.reward(repeated[0], questions, repeated[1]).tolist()
        batch = make_batch(prompts, asked).to(policy.device)
        with torch.no_grad():
            token_logprobs(policy, batch)  # the last forward pass of this round: `outputs` holds its states
        for name, out in outputs.items():
            states[name].append(out[0].index_select(0, batch.read).cpu())  # (M, H)
        for b, row in enumerate(asked):
            for ids in row:
                text += [start + b] * len(ids)
                token += range(len(ids))
                last += [i + 1 == len(ids) and ids[-1] == tokenizer.eos_token_id for i in range(len(ids))]
    text, token, last = torch.tensor(text), torch.tensor(token), torch.tensor(last)
    question = (token == 0).cumsum(0) - 1  # (M,) the number of each token's question
    score = torch.tensor(scores, dtype=torch.float64)
    of_text = score.view(-1, args.samples)
    within = of_text.var(1).mean() / score.var()
    print(f"{len(scores)} questions, score {score.mean():.3f}, deviation {score.std():.3f}, prompts {1 - within:.3f}")
    places = {"before the first token": token == 0, "after 4 tokens": token == 4, "predicts EOS": last}
    places["all tokens, one set of weights"] = token >= 0
    print("| | " + " | ".join(watched) + " |")
    for name, place in places.items():
        found = (torch.cat(states[layer])[place].double() for layer in watched)
        row = [r_squared(x, score[question[place]], text[place]) for x in found]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)


if __name__ == "__main__":
    main()
