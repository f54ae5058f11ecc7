"""What the stages write, opened by other people's programs: transformers, peft and TRL.

    python -m venv .venv-trl && .venv-trl/bin/pip install -r bench/requirements.txt
    .venv-trl/bin/python bench/interop.py runs

For every stage in the folder (sft, dpo, ppo) and for its pairs.jsonl:
 1. AutoModelForCausalLM opens the stage's folder, by default in the precision that it was written in, and gives finite
    logits.
 2. peft.PeftModel opens the adapter on the base model; its logits are those of the merged folder.
 3. TRL's DPOTrainer reads the pairs; its token ids are ours; it trains one step on them.

Run it where the runs were made, from the folder they were started in: an adapter names its base as the run did.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

TEXT = "### Input:\nThe mayor wants to close the library because fewer people borrow books.\n\n### Response:\n"
MAX_TOKENS = 2048


def logits_of(lm, tokenizer):
    with torch.no_grad():
        return lm.double()(**tokenizer(TEXT, return_tensors="pt")).logits  # float64: what is compared are the files


def check_stage(folder: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert lm.dtype == torch.float32, "adapters are merged in float32, and every weight trains in it"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    merged = logits_of(lm, tokenizer)
    assert merged.isfinite().all()
    print(f"{folder}: AutoModelForCausalLM opens it, logits from {merged.min():.2f} to {merged.max():.2f}", flush=True)
    if (folder / "adapter").is_dir():
        check_adapter(folder, tokenizer, merged)


def check_adapter(folder: Path, tokenizer, merged) -> None:
    from peft import PeftModel

    from socratiq.models import pick_dtype, resolve

    # Frozen weights were held in the precision of the run; "auto" is what this machine is fast in.
    dtype = pick_dtype(json.loads((folder / "train_args.json").read_text())["dtype"], torch.device("cpu"))
    named = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(resolve(named), dtype=dtype)
    without = (logits_of(base, tokenizer) - merged).abs().max().item()
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    apart, size = (logits_of(adapted, tokenizer) - merged).abs().max().item(), merged.abs().max().item()
    print(
        f"{folder}: peft's adapter on {named} gives the merged model's logits, at most {size:.1f}, to {apart:.1e}; "
        f"without the adapter to {without:.1e}",
        flush=True,
    )
    assert apart < 1e-5 * size < without  # merged weights are rounded to float32


def check_pairs(path: Path, model: Path) -> None:
    import datasets
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from socratiq.data import load_pairs
    from socratiq.prompts import encode_completion, encode_pair_prompt

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # Some tokenizers put a blank before every text (sentencepiece: Llama 2, `tiny`), and so before a question that is
    # read apart, as ours are. TRL reads prompt and question in one go and cuts them: there the first word differs.
    blank = tokenizer.tokenize("Why")[0].startswith("\u2581")

    def reading(ids: list[int]):
        return tokenizer.decode(ids).strip() if blank else ids

    with tempfile.TemporaryDirectory() as folder:
        data = datasets.load_dataset("json", data_files=str(path), split="train[:16]", cache_dir=folder)
        config = DPOConfig(
            output_dir=folder, max_steps=1, per_device_train_batch_size=2, max_length=MAX_TOKENS, report_to="none",
            use_cpu=True, bf16=False, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        trainer = DPOTrainer(lm, args=config, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        theirs = list(trainer.train_dataset)
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        loss = trainer.train().training_loss
        moved = any(not torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())
    same = 0
    for row, pair in zip(theirs, load_pairs(str(path)), strict=False):
        questions = [encode_completion(tokenizer, question) for question in (pair.chosen, pair.rejected)]
        same += row["prompt_ids"] == encode_pair_prompt(tokenizer, pair, MAX_TOKENS) and all(
            reading(row[name]) == reading(ours)
            for name, ours in zip(("chosen_ids", "rejected_ids"), questions, strict=True)
        )
    what = "token ids in the prompt and our text in the questions" if blank else "token ids"
    print(f"{path}: TRL's DPOTrainer reads it; {same} of {len(theirs)} pairs have our {what}")
    print(f"{path}: it trains a step on them; the loss is {loss:.4f} (ln 2 = 0.6931)")
    assert same == len(theirs) > 0 and moved and abs(loss - 0.6931) < 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with sft/, dpo/, ppo/ and pairs.jsonl, or some of them")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about itself
    logging.disable_progress_bar()
    stages = [args.runs / stage for stage in ("sft", "dpo", "ppo") if (args.runs / stage / "config.json").exists()]
    if not stages:
        sys.exit(f"error: {args.runs}: no folder sft, dpo or ppo with a model in it")
    for stage in stages:
        check_stage(stage)
    if (args.runs / "pairs.jsonl").exists():
        check_pairs(args.runs / "pairs.jsonl", stages[0])


if __name__ == "__main__":
    main()
