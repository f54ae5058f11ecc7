"""Put the finished model to use: critical questions about a text, the best first.

    python -m socratiq.ask "Phones should be banned at school, as pupils cannot concentrate." --type "Cause to effect"
    python -m socratiq.ask --file essay.txt                  every type, the best of four questions each
    cat essay.txt | python -m socratiq.ask --json
    python -m socratiq.ask                                   on a terminal: asks for texts until Ctrl-D
    python -m socratiq.ask --serve                           a page in the browser, on this machine only

Questions are ranked by the scorer's reward; the number before each is its strength, the probability that it is of the
asked type. The reward counts form, relatedness to the text and more, too; where one of them is low, it is named. --json
gives every part. On a terminal one sees the questions being written.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import textwrap
import time
from pathlib import Path

from socratiq.run import options as cli
from socratiq.run.errors import UserError, main, warn
from socratiq.scorer.gates import GATES, LOW

LONGEST_FILE = 1_000_000  # bytes; the model reads some 2,000 characters
MOST_SERVED = 8  # questions a type on the page
LIVE_LINES = 12  # at most so many questions are shown while they are written


def parse_arguments(argv: list[str] | None = None):
    parser = cli.Parser(prog="python -m socratiq.ask", description="Ask critical questions about a text.")
    parser.add_argument("text", nargs="?", help="the text; without it and --file, standard input is read")
    parser.add_argument("--file", metavar="FILE", help="read the text from a file")
    parser.add_argument(
        "--type", action="append", metavar="TYPE", help="type of question, any spelling; again for more; default: all"
    )
    parser.add_argument(
        "--n", type=cli.number(int, least=1, most=64), default=4,
        help=f"questions drawn for each type; at most 64, on the page {MOST_SERVED}",
    )  # fmt: skip
    parser.add_argument(
        "--show", type=cli.count, metavar="N", help="the best N of them; default: all for one type, else 1"
    )
    parser.add_argument("--json", action="store_true", help="print all of them as one JSON object")
    parser.add_argument(
        "--serve", nargs="?", type=cli.number(int, least=0, most=65535), const=8765, metavar="PORT",
        help="a web page on 127.0.0.1 instead (8765; 0 takes any free port)",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="MODEL", help="default: runs/ppo, or the last stage that is finished")
    model.add_argument("--scorer", metavar="FOLDER", help="default: scorer beside the model; none does not rank")
    model.add_argument("--temperature", type=cli.not_negative, default=0.8, help="lower is safer, higher bolder")
    model.add_argument("--seed", type=cli.zero_or_more, metavar="N", help="the same questions again; default: new ones")
    model.add_argument("--max-new-tokens", type=cli.count, default=64, metavar="TOKENS", help="longest question")
    model.add_argument(
        "--max-prompt-tokens", type=cli.count, default=512, metavar="TOKENS", help="a longer text loses its tail"
    )
    model.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    model.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: what is fast")
    args = parser.parse_args(argv)
    if args.text is not None and args.file is not None:
        parser.error("a text and --file: give one of them")
    if args.serve is not None:
        for name in ("text", "file", "type", "show", "json", "seed"):
            given = getattr(args, name)
            if given is not None and given is not False:
                named = "a text" if name == "text" else f"--{name}"
                parser.error(f"--serve and {named}: text and types are given in the browser, which shows all questions")
        if args.n > MOST_SERVED:
            parser.error(f"--serve and --n {args.n}: the page asks at most {MOST_SERVED} questions a type")
    return args


def find_model(args) -> tuple[str, str | None]:
    """Names of the model and of the scorer's folder, which may be None. Raises UserError if nothing is trained yet."""
    name = args.model
    if name is None:
        stages = [f"runs/{stage}" for stage in ("ppo", "dpo", "sft")]
        name = next((stage for stage in stages if (Path(stage) / "config.json").exists()), None)
        if name is None:
            raise UserError("no finished model in runs: train one (make demo), or name one, such as --model smollm2")
        if name != stages[0]:
            warn(f"{stages[0]} is not there yet; asking {name}")
    if args.scorer == "none":
        return name, None
    scorer = Path(args.scorer) if args.scorer else Path(name).parent / "scorer"
    if args.scorer is None and not Path(name).is_dir():
        scorer = Path("runs/scorer")
    if args.scorer is None and not scorer.exists():
        warn(f"{scorer} is not there; the questions are not ranked")
        return name, None
    return name, str(scorer)


def read_text(args) -> str | None:
    """The text of the command line, file or standard input; None if somebody at a terminal is to be asked for it."""
    from socratiq.data import clean

    if args.text is not None and args.text != "-":
        text, where = args.text, "the text"
    elif args.file is None and sys.stdin.isatty() and args.text != "-":
        return None
    else:
        where = args.file or "standard input"
        try:
            with open(args.file, "rb") if args.file else sys.stdin.buffer as stream:
                content = stream.read(LONGEST_FILE + 1)
            if len(content) > LONGEST_FILE:  # first: it may end in mid-character
                raise UserError(f"{where}: more than {LONGEST_FILE:,} bytes; give the passage to be questioned")
            text = content.decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    text = clean(text)
    if not text:
        raise UserError(f"{where} is empty; there is nothing to ask about")
    return text


# --- what is shown --------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """On one line, without control characters: a model may write what would move the cursor."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def columns() -> int | None:
    """Width of the terminal that is printed to; None for a file or a pipe, where a question keeps its line."""
    return shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else None


class Live:
    """Questions in the making, one line each, redrawn in place; gone when the ranked ones are printed."""

    def __init__(self, types: list[str], samples: int):
        self.samples = samples
        self.shown = list(range(len(types) * samples))
        if len(self.shown) > LIVE_LINES:
            self.shown = self.shown[::samples][:LIVE_LINES]  # the first sample of each type
        self.types, self.lines, self.drawn, self.last = types, {}, False, 0.0

    def __call__(self, i: int, text: str) -> None:
        self.lines[i] = text
        if time.perf_counter() - self.last > 0.06:
            self.draw()

    def draw(self) -> None:
        self.last, width = time.perf_counter(), shutil.get_terminal_size().columns - 1
        up = f"\x1b[{len(self.shown)}A" if self.drawn else ""
        room = min(max(map(len, self.types)), width // 3)
        heads = [name if len(name) <= room else name[: room - 1] + "…" for name in self.types]
        rows = [f"{heads[i // self.samples]:<{room}}  {plain(self.lines.get(i, ''))}"[:width] for i in self.shown]
        sys.stdout.write(up + "".join(f"\x1b[2K{row}\n" for row in rows))
        sys.stdout.flush()
        self.drawn = True

    def clear(self) -> None:
        if self.drawn:
            sys.stdout.write(f"\x1b[{len(self.shown)}A\x1b[J")
            sys.stdout.flush()


def remark(record: dict, type: str) -> str:
    """What speaks against a question: it reads as another type, or the lowest gate of its reward is low."""
    said = [f"reads as {record['strongest']}"] if record.get("strongest", type) != type else []
    gates = {name: value for name, value in record.get("parts", {}).items() if name in GATES and value < LOW}
    if gates:
        worst = min(gates, key=gates.__getitem__)
        said.append(f"low {GATES[worst].title}, {gates[worst]:.2f}")
    return f"  ({'; '.join(said)})" if said else ""


def show(found: list[dict], count: int | None, width: int | None = None) -> str:
    """The best questions of each type, with their strengths; folded if a width is given."""
    lines = []
    for of_type in found:
        lines.append(of_type["type"])
        for record in of_type["questions"][: count or (None if len(found) == 1 else 1)]:
            strength = f"{record['strength']:.2f}  " if "strength" in record else ""
            line = f"  {strength}{plain(record['question']) or '(nothing)'}{remark(record, of_type['type'])}"
            indent = " " * (2 + len(strength))
            lines.append(textwrap.fill(line, max(40, width), subsequent_indent=indent) if width else line)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------


def ask_once(asker, context: str, types: list[str], args) -> list[dict]:
    """Ask about one text, and show the questions as they are written if somebody is watching."""
    if asker.is_cut(context):
        warn(f"the text is longer than --max-prompt-tokens {args.max_prompt_tokens}; its tail is not read")
    live = Live(types, args.n) if sys.stdout.isatty() and not args.json else None
    seed = random.getrandbits(31) if args.seed is None else args.seed
    found = asker.ask(context, types, args.n, args.max_new_tokens, args.temperature, seed, live)
    if live:
        live.clear()
    return found


def converse(asker, types: list[str], args) -> None:
    """Texts from the terminal until Ctrl-D. A line that names a type, or "all", asks about the last text again."""
    import contextlib

    from socratiq.data import clean

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (makes input() editable)
    numbered = ", ".join(f"{i} {name}" for i, name in enumerate(asker.types, 1))
    said = (
        f"Paste a text and end it with an empty line. Then, for the same text: a type ({numbered}) or all. Ctrl-D ends."
    )
    print(textwrap.fill(said, columns() or 10_000, break_on_hyphens=False))
    context = ""
    while True:
        lines: list[str] = []
        try:
            while not lines or lines[-1].strip():
                lines.append(input("> " if not lines else "  "))
                if len(lines) == 1 and chosen(asker, lines[0]):
                    break
        except EOFError:
            print()
            return
        if again := chosen(asker, lines[0]):
            types = again
        else:
            context = clean("\n".join(lines)) or context
        if not context:
            print("paste a text first")
        else:
            print(show(ask_once(asker, context, types, args), args.show, columns()))


def chosen(asker, line: str) -> list[str] | None:
    """The types that a line names, or None if it is no such line."""
    if line.strip().lower() == "all":
        return asker.types
    try:
        return [asker.type_named(line)] if line.strip() else None
    except UserError:
        return None


def run(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    name, scorer = find_model(args)
    text = read_text(args) if args.serve is None else None

    from socratiq.evaluation.questions import Asker

    asker = Asker(name, scorer, args.device, args.dtype, args.max_prompt_tokens)
    types = list(dict.fromkeys(asker.type_named(said) for said in args.type)) if args.type else asker.types
    if args.serve is not None:
        from socratiq.serve import serve

        serve(asker, args)
    elif text is None:
        converse(asker, types, args)
    else:
        found = ask_once(asker, text, types, args)
        if args.json:
            print(json.dumps({"model": name, "context": text, "types": found}, ensure_ascii=False, indent=1))
        else:
            print(show(found, args.show, columns()))


if __name__ == "__main__":
    main(run)
