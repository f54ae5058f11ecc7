"""The reward that PPO maximises: the scorer, or a function of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

from socratiq.run.errors import UserError
from socratiq.scorer import fit
from socratiq.scorer.language_model import open_language_model
from socratiq.scorer.scorer import Scorer


def load_scorer(folder: str | Path, device: str = "auto", dtype: str = "auto") -> Scorer:
    """The scorer in a folder, together with the language model that it was fitted with: the same reward everywhere."""
    scorer = Scorer.load(folder)
    return scorer.with_language_model(open_language_model(scorer.settings.get("model", "none"), device, dtype))


class Reward:
    """Called with (contexts, questions, types), gives the rewards (N,) and, by name, the parts they are made of."""

    def __init__(self, function, types: list[str]):
        self.function, self.types = function, types

    def __call__(self, contexts, questions, types):
        rewards, parts = self.function(contexts, questions, types)
        try:
            rewards = torch.as_tensor(rewards, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"the reward function gave {type(rewards).__name__}, not numbers: return one a question"
            ) from None
        if rewards.shape != (len(questions),):
            raise UserError(f"the reward function gave {tuple(rewards.shape)} numbers for {len(questions)} questions")
        return rewards, parts


def load_reward(args, held_out: list[str], types: list[str]) -> Reward:
    """The reward of --scorer, or `module:function` of --reward, found from the folder one is in.

    Questions are asked of the types that the scorer knows, for a function those of the rows, `types`. Raises UserError
    if there is no such reward, or if the scorer has learnt from a text that is held out.
    """
    name = args.reward
    if name is None:
        scorer = load_scorer(args.scorer, args.device, args.dtype)
        model = scorer.settings.get("model", "none")
        fit.check_unseen("scorer", args, scorer.settings.get("texts"), held_out, model)
        return Reward(scorer.graded, scorer.types)
    if not types:
        raise UserError(f"{args.data}: no row names a type to ask for; label some, or leave out --reward")
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise UserError(f"--reward {name}: expected MODULE:FUNCTION, such as my_reward:reward")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--reward {name}: {error}") from None
    if not callable(function):
        raise UserError(f"--reward {name}: {function_name} is no function")
    return Reward(lambda *columns: (function(*columns), {}), types)
