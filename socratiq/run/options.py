"""The parts that all command lines share: one-line errors, checked numbers, the arguments of every stage.

Imports neither torch nor transformers, so that --help and a mistyped argument answer at once.
"""

import argparse
import math
import sys
from operator import ge, gt, le, lt

from socratiq.run.errors import UserError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults except None, True, False and tuples, and for a number its kind or unit."""

    def _get_help_string(self, action):
        said = action.default is None or isinstance(action.default, bool | tuple)
        return action.help if said else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", None) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults and whose errors are one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


BOUNDS = {"above": ("above", gt), "least": ("at least", ge), "most": ("at most", le), "below": ("below", lt)}


def number(kind=float, metavar=None, **bounds):
    """An argument type: a finite number of this kind within bounds such as `least=0, below=1` (the names of BOUNDS).

    --help shows the `metavar`, by default N for a whole number and X for another one.
    """

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        rules = [(*BOUNDS[name], bound) for name, bound in bounds.items()]
        broken = [f"{words} {bound}" for words, holds, bound in rules if not holds(value, bound)]
        if broken or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be {' and '.join(broken) or 'finite'}, not {text}")
        return value

    convert.metavar = metavar or ("N" if kind is int else "X")
    return convert


positive = number(float, above=0)
not_negative = number(float, least=0)
fraction = number(float, least=0, below=1, metavar="SHARE")
LARGEST = 2**63 - 1  # of a whole number: torch holds 64 bits
count = number(int, least=1, most=LARGEST)
zero_or_more = number(int, least=0, most=LARGEST)


def names(text: str) -> list[str]:
    """An argument type: names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


names.metavar = "A,B,C"


def add_device_arguments(add, plain: str = "") -> None:
    """Where to compute and how precisely; with `plain`, its help, the option that leaves the engine out."""
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where it is fast")
    if plain:
        add("--plain", action="store_true", help=f"without the speed-ups of the engine: {plain}")


def add_run_arguments(parser: Parser, out: str) -> None:
    """The arguments that every training stage has."""
    add = parser.add_argument_group("run").add_argument
    add("--out", default=out, metavar="FOLDER", help="folder for the model, the logs and the checkpoint")
    add("--seed", type=zero_or_more, default=0, help="seed of every random draw")
    add_device_arguments(add, plain="one process, slower, the same numbers")
    add("--deterministic", action="store_true", help="the same bytes on a GPU too, slower (a CPU needs no option)")
    add("--checkpoint-every", type=count, default=25, metavar="STEPS", help="steps between checkpoints to resume from")
    add("--restart", action="store_true", help="delete this stage's run in --out and begin anew")


def add_model_arguments(parser: Parser, model: str) -> None:
    """Which model is trained, and how much of it."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default=model, help='"smollm2", "tiny", a checkpoint folder, or a Hub id: meta-llama/Llama-3.1-8B')
    add("--lora-rank", type=zero_or_more, default=16, metavar="R", help="rank of the adapters; 0 trains every weight")
    add("--max-prompt-tokens", type=count, default=512, metavar="TOKENS", help="a longer context loses its tail")
    add("--grad-checkpoint", action="store_true", help="recompute activations: less memory, a third more time")
    add("--load-in-4bit", action="store_true", help="hold frozen weights in 4 bits (needs bitsandbytes and adapters)")


def model_options(args) -> dict:
    """The arguments of `load_policy` beside model, device and dtype."""
    names = ("lora_rank", "seed", "grad_checkpoint", "load_in_4bit", "plain", "deterministic")
    return {name: getattr(args, name) for name in names}


def check(condition: bool, message: str) -> None:
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(message)
