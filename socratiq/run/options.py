"""What the command lines of all scripts share: one-line errors, checked numbers, the arguments every stage has.

Imports neither torch nor transformers, so that --help and a mistyped argument answer at once.
"""

import argparse
import math
import sys

from socratiq.run.errors import UserError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for None, True and False, which tell nobody anything, and for a number its kind or unit."""

    def _get_help_string(self, action):
        said = action.default is None or isinstance(action.default, bool)
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


def number(kind=float, above=None, least=None, most=None, below=None, metavar=None):
    """An argument type: a finite number of this kind between bounds, `above` and `below` exclusive.

    --help shows the `metavar`, by default N for a whole number and X for another one.
    """

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        bounds = [
            (above is None or value > above, f"above {above}"),
            (least is None or value >= least, f"at least {least}"),
            (below is None or value < below, f"below {below}"),
            (most is None or value <= most, f"at most {most}"),
        ]
        wrong = [rule for holds, rule in bounds if not holds]
        if wrong or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be {' and '.join(wrong) or 'finite'}, not {text}")
        return value

    convert.metavar = metavar or ("N" if kind is int else "X")
    return convert


positive = number(float, above=0)
not_negative = number(float, least=0)
fraction = number(float, least=0, below=1, metavar="SHARE")
count = number(int, least=1)
count_or_none = number(int, least=0)


def source(text: str) -> str:
    """An argument type: what --data takes. An address with a password is refused: arguments are written into files."""
    if "://" in text and "@" in text.split("://", 1)[1].split("/", 1)[0]:
        raise argparse.ArgumentTypeError("an address must not hold a name or password; download the file and name that")
    return text


source.metavar = "SOURCE"


def add_run_arguments(parser: Parser, out: str) -> None:
    """The arguments that every training stage has."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", default=out, metavar="FOLDER", help="folder for the model, the logs and the checkpoint")
    group.add_argument("--seed", type=count_or_none, default=0, help="seed of everything random")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="precision of the matrix products; trained weights and losses stay float32 (auto: bfloat16 where fast)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU too the same command gives the same bytes, somewhat slower (on the CPU it does so anyway)",
    )
    group.add_argument(
        "--checkpoint-every", type=count, default=25, metavar="STEPS", help="steps between checkpoints to resume from"
    )
    group.add_argument(
        "--restart", action="store_true", help="throw away what --out holds of this stage and begin anew"
    )
    group.add_argument(
        "--skip-nonfinite",
        type=count_or_none,
        default=0,
        metavar="N",
        help="skip up to N updates whose loss or gradient is not finite, instead of stopping at the first",
    )


def add_model_arguments(parser: Parser, model: str) -> None:
    """Which model is trained, and how much of it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=model,
        help='"smollm2", "tiny", a checkpoint folder, or a Hub id such as meta-llama/Llama-3.1-8B',
    )
    group.add_argument(
        "--lora-rank", type=count_or_none, default=16, metavar="R", help="rank of the adapters; 0 trains every weight"
    )
    group.add_argument(
        "--max-prompt-tokens", type=count, default=512, metavar="TOKENS", help="a longer context loses its tail"
    )
    group.add_argument(
        "--grad-checkpoint",
        action="store_true",
        help="keep less for the backward pass and compute it again: less memory, a third more time, the same numbers",
    )
    group.add_argument(
        "--load-in-4bit",
        action="store_true",
        help="hold the frozen weights under the adapters in 4 bits (needs bitsandbytes); what is written is not packed",
    )


def model_options(args) -> dict:
    """What `load_policy` is told of these arguments, beside model, device and dtype."""
    return {name: getattr(args, name) for name in ("lora_rank", "seed", "grad_checkpoint", "load_in_4bit")}


def check(condition: bool, message: str) -> None:
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(message)
