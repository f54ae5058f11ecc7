"""Ask the finished model: critical questions about a text, the best first.

    python -m socratiq.ask "Phones should be banned at school, as pupils cannot concentrate." --type "Cause to effect"
    python -m socratiq.ask --file essay.txt                  every type, the best of four questions each
    cat essay.txt | python -m socratiq.ask --json

The scorer ranks the questions by the reward that PPO maximises. The number before a question is its strength, the
probability that it is of the type that was asked for. The reward looks at form, relatedness to the text and more, too;
a low part is named behind the question, and --json gives every part.
"""

import json
import random
import sys
from pathlib import Path

from socratiq.data import clean
from socratiq.run import options
from socratiq.run.errors import UserError, main, warn
from socratiq.scorer.gates import GATES
from socratiq.taxonomy import TYPES, display_name

LOW = 0.7  # a gate below it is worth a remark
STAGES = ("runs/ppo", "runs/dpo", "runs/sft")  # the first one that is finished is asked


def parse_arguments(argv: list[str] | None = None):
    parser = options.Parser(prog="python -m socratiq.ask", description="Ask critical questions about a text.")
    add = parser.add_mutually_exclusive_group().add_argument
    add("text", nargs="?", help="the text; without it and --file, standard input is read")
    add("--file", metavar="FILE", help="read the text from a file")
    add = parser.add_argument
    add("--type", action="append", metavar="TYPE", help="in any spelling; repeat for more types (default: all)")
    add("--n", type=options.count, default=4, help="questions drawn for each type; of several types the best is shown")
    add("--json", action="store_true", help="print all questions and every part of their rewards as one JSON object")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="MODEL", help="folder, Hub id, smollm2 or tiny (default: runs/ppo, else runs/dpo, runs/sft)")
    add("--scorer", metavar="FOLDER", help='ranks the questions; "none": no ranking (default: scorer beside the model)')
    add("--temperature", type=options.not_negative, default=0.8, help="lower is safer, higher is bolder")
    add("--seed", type=options.zero_or_more, help="the same questions again (default: new ones each time)")
    add("--max-new-tokens", type=options.count, default=64, metavar="TOKENS", help="longest question")
    add("--max-prompt-tokens", type=options.count, default=512, metavar="TOKENS", help="a longer text loses its tail")
    options.add_device_arguments(add, plain="slower, the same questions")
    return parser.parse_args(argv)


def find_model(args) -> tuple[str, str]:
    """Names of the model and of the scorer's folder, "none" to rank nothing. Raises UserError if nothing is trained."""
    finished = [stage for stage in STAGES if Path(stage, "config.json").exists()]
    options.check(args.model or finished, "no finished model in runs; name one: --model runs/demo/ppo after make demo")
    name = args.model or finished[0]
    if not args.model and name != STAGES[0]:
        warn(f"{STAGES[0]} is not there yet; asking {name}")
    scorer = Path(name).parent / "scorer" if Path(name).is_dir() else Path("runs/scorer")
    if args.scorer or scorer.exists():
        return name, args.scorer or str(scorer)
    warn(f"{scorer} is not there; the questions are not ranked")
    return name, "none"


def read_text(args) -> str:
    """The text of the command line, the file or standard input, tidied."""
    where, text = "the text", args.text
    if text is None:
        where = args.file or "standard input"
        options.check(args.file or not sys.stdin.isatty(), "no text: give one in quotes, name a --file, or pipe one in")
        try:
            content = Path(args.file).read_bytes() if args.file else sys.stdin.buffer.read()
            text = content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read as UTF-8 text ({error})") from None
    options.check(clean(text) != "", f"{where} is empty; there is nothing to ask about")
    return clean(text)


def choose_types(wanted: list[str] | None, known: list[str]) -> list[str]:
    """The known types that are meant, in any spelling; all of them for None."""
    names = list(dict.fromkeys(display_name(said) for said in wanted or known))
    unknown = [name for name in names if name not in known]
    options.check(not unknown, f"--type: no such type {', '.join(unknown)}; choose one of {', '.join(known)}")
    return names


def rank(scorer, context: str, type_name: str, questions: list[str]) -> list[dict]:
    """The questions as records, the one with the highest reward first; without a scorer in their own order."""
    if scorer is None:
        return [{"question": question} for question in questions]
    rewards, parts = scorer.graded([context] * len(questions), questions, [type_name] * len(questions))
    strongest = scorer.strengths([context] * len(questions), questions).argmax(1).tolist()
    records = []
    for i, question in enumerate(questions):
        record = {"question": question, "reward": round(rewards[i].item(), 4), "reads_as": scorer.types[strongest[i]]}
        records.append(record | {"parts": {name: round(part[i].item(), 4) for name, part in parts.items()}})
    return sorted(records, key=lambda record: -record["reward"])


def line(record: dict, type_name: str) -> str:
    """One question for the terminal, with its strength and what speaks against it, and without control characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in record["question"])
    parts = record.get("parts", {})
    against = [f"reads as {record['reads_as']}"] if record.get("reads_as", type_name) != type_name else []
    low = sorted((parts[name], fault) for name, fault in GATES.items() if parts.get(name, 1) < LOW)
    against += [f"{fault}, {value:.2f}" for value, fault in low[:1]]
    strength = f"{parts['strength']:.2f}  " if parts else ""
    return f"  {strength}{' '.join(text.split()) or '(nothing)'}" + (f"  ({'; '.join(against)})" if against else "")


def run(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    name, scorer_folder = find_model(args)
    context = read_text(args)

    from socratiq.models import load_policy, load_tokenizer
    from socratiq.prompts import decode, encode_prompt
    from socratiq.sampling import sample
    from socratiq.scorer.scorer import Scorer
    from socratiq.training import derive_seed

    scorer = None if scorer_folder == "none" else Scorer.load(scorer_folder, args.device, args.dtype)
    types = choose_types(args.type, scorer.types if scorer else [kind.name for kind in TYPES])
    tokenizer = load_tokenizer(name)
    policy = load_policy(name, args.device, args.dtype, trainable=False, plain=args.plain)
    prompts = [encode_prompt(tokenizer, context, type_name, args.max_prompt_tokens) for type_name in types]
    if len(prompts[0]) < len(encode_prompt(tokenizer, context, types[0], sys.maxsize)):
        warn(f"the text is longer than --max-prompt-tokens {args.max_prompt_tokens}; its tail is not read")
    seed = random.getrandbits(31) if args.seed is None else args.seed
    seeds = [derive_seed(seed, "ask", context, type_name) for type_name in types]
    eos = tokenizer.eos_token_id
    completions = sample(policy, prompts, args.n, args.max_new_tokens, eos, args.temperature, seeds)
    found = {}
    for type_name, samples in zip(types, completions, strict=True):
        questions = list(dict.fromkeys(decode(tokenizer, ids) for ids in samples))
        found[type_name] = rank(scorer, context, type_name, questions)
    if args.json:
        listed = [{"type": type_name, "questions": records} for type_name, records in found.items()]
        print(json.dumps({"model": name, "context": context, "types": listed}, ensure_ascii=False, indent=1))
        return
    for type_name, records in found.items():
        shown = records[:1] if len(found) > 1 else records
        print(type_name, *(line(record, type_name) for record in shown), sep="\n")


if __name__ == "__main__":
    main(run)
