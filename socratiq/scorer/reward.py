"""The reward that PPO maximises: the scorer, or a function of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from socratiq.run.errors import UserError
from socratiq.scorer.grading import place
from socratiq.scorer.scorer import Scorer


def load_scorer(folder: str | Path, device: str = "auto", dtype: str = "auto") -> Scorer:
    """The scorer in a folder with its language model: PPO, pairs, show, ask and evaluate all open it here."""
    return Scorer.load(folder, device, dtype)


def check_unseen(scorer: Scorer, held_out: Iterable[str], folder: str) -> None:
    """Raise UserError if the scorer of --scorer `folder` has learnt from a text that is held out."""
    held_out = set(map(place, held_out))
    if seen := len(held_out.intersection(scorer.settings["texts"])):
        raise UserError(
            f"--scorer {folder} was fitted on {seen} of the {len(held_out)} held-out texts; delete it and "
            "make_pairs.py will fit it anew, or fit it by python -m socratiq.scorer with the same --data and --held-out"
        )


class Reward(NamedTuple):
    """function(contexts, questions, types) gives the rewards (N,) and, by name, the parts they are made of."""

    function: Callable
    types: list[str]  # that questions are asked of

    def __call__(self, contexts: list[str], questions: list[str], types: list[str]):
        """Raises UserError if a function of the user's own does not give one number for each question."""
        rewards, parts = self.function(contexts, questions, types)
        try:
            rewards = torch.as_tensor(rewards, dtype=torch.float32).view(len(questions))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the reward function must return {len(questions)} numbers, one a question: {error}"
            ) from None
        return rewards, parts


def load_reward(args, held_out: list[str], types: list[str]) -> Reward:
    """The reward of --scorer, or `module:function` of --reward, found from the current folder.

    Questions are asked of the types that the scorer knows, for a function those of the rows, `types`. Raises UserError
    if there is no such reward, if the scorer has learnt from a text that is held out, or if it has no language model
    (n-grams alone were gamed within 16 iterations) and --allow-bare-scorer is not given.
    """
    if args.reward is None:
        scorer = load_scorer(args.scorer, args.device, args.dtype)
        check_unseen(scorer, held_out, args.scorer)
        if scorer.lm is None and not args.allow_bare_scorer:
            raise UserError(
                f"--scorer {args.scorer} has no language model, and PPO soon games n-grams alone: delete it and run "
                "make_pairs.py --scorer-model smollm2, or give --allow-bare-scorer"
            )
        return Reward(scorer.graded, scorer.types)
    if not types:
        raise UserError(f"{args.data}: no row names a type to ask for; label some, or leave out --reward")
    module_name, _, function_name = args.reward.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"--reward {args.reward}: {error}; expected MODULE:FUNCTION, such as my_reward:reward"
        ) from None
    if not callable(function):
        raise UserError(f"--reward {args.reward}: {function_name} is no function")
    return Reward(lambda *columns: (function(*columns), {}), types)
