"""The reward that PPO maximises: the scorer's, or a function of your own."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable

import torch

from socratiq.run.errors import UserError
from socratiq.scorer.scorer import Scorer


def load_reward(args, held_out: list[str], types: list[str]) -> tuple[Callable, list[str]]:
    """The reward of --scorer, or `module:function` of --reward, found from the current folder.

    Returns a function of contexts, questions and types, and the types to ask for: those of the scorer, or of the rows,
    `types`. The function gives the rewards (N,) and, by name, the parts that they are made of. Raises UserError if
    there is no such reward, if the scorer has learnt from a text that is held out, or if it has no language model
    (n-grams alone were gamed within 16 iterations) and --allow-bare-scorer is not given.
    """
    if args.reward is None:
        scorer = Scorer.load(args.scorer, args.device, args.dtype, held_out, plain=args.plain)
        if scorer.lm is None and not args.allow_bare_scorer:
            instead = "delete it and run make_pairs.py --scorer-model smollm2, or give --allow-bare-scorer"
            raise UserError(f"--scorer {args.scorer} has no language model, and PPO games n-grams alone; {instead}")
        return scorer.graded, scorer.types
    if not types:
        raise UserError(f"{args.data}: no row names a type to ask for; label some, or leave out --reward")
    expected = "expected MODULE:FUNCTION, such as my_reward:reward"
    sys.path.insert(0, os.getcwd())
    try:
        function = pkgutil.resolve_name(args.reward)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(f"--reward {args.reward}: {error}; {expected}") from None
    if not callable(function):
        raise UserError(f"--reward {args.reward}: that is no function; {expected}")

    def reward(contexts: list[str], questions: list[str], types: list[str]) -> tuple[torch.Tensor, dict]:
        values = function(contexts, questions, types)
        try:
            return torch.as_tensor(values, dtype=torch.float32).view(len(questions)), {}
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"--reward {args.reward}: not {len(questions)} numbers, one a question: {error}") from None

    return reward, types
