"""Write a policy as a plain Hugging Face folder: adapters merged, and the adapter alone in PEFT's format."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from socratiq import lora
from socratiq.engine import distributed
from socratiq.policy import Policy
from socratiq.run.files import remove, sync


def save_model(lm: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer, folder: Path) -> None:
    """Write a plain Hugging Face checkpoint: safetensors, config, generation config, tokenizer.

    `state` is the state dict of the model without adapters. EOS becomes the one that was trained, so that `generate`
    stops there too.
    """
    lm.hf_quantizer = None  # the state is dequantised
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    stops_at_eos(lm, tokenizer.eos_token_id)
    if lm.config.tie_word_embeddings:  # gathered from several processes, the two are no longer one tensor
        state.pop("lm_head.weight", None)
    lm.save_pretrained(folder, state_dict=dict(state))  # which it empties, of a model made from a config
    tokenizer.save_pretrained(folder)
    # The dtype that others load by default: the widest, so that merged float32 weights are not rounded.
    lm.config.dtype = functools.reduce(torch.promote_types, (x.dtype for x in state.values() if x.is_floating_point()))
    lm.config.save_pretrained(folder)


def stops_at_eos(lm: PreTrainedModel, eos_id: int) -> None:
    """Let the saved configs name `eos_id` first, and hold no sampling options that transformers would refuse."""
    for config in (lm.config, lm.generation_config):
        ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        others = [other for other in ids if other not in (None, eos_id)]
        config.eos_token_id = [eos_id, *others] if isinstance(config.eos_token_id, list) else eos_id
    if not lm.generation_config.do_sample:  # a published temperature beside it makes save_pretrained raise
        lm.generation_config.temperature = lm.generation_config.top_p = lm.generation_config.top_k = None


def save_policy(policy: Policy, tokenizer, folder: str | Path, base_name: str) -> None:
    """Write the policy into `folder` as a plain checkpoint, adapters merged, and the adapter alone under adapter/.

    Every file is written beside the folder first and moved in when all are complete; config.json, without which the
    folder is no model, comes last.
    """
    state = distributed.gather(whole_state_dict(policy.lm))
    if distributed.rank() > 0:
        return
    folder = Path(folder)
    partial = folder / ".model.partial"
    remove(partial)
    save_model(policy.lm, lora.merged_state_dict(policy.lm, state), tokenizer, partial)
    remove(folder / "adapter")
    if any(lora.adapters(policy.lm)):
        save_adapter(policy.lm, state, partial / "adapter", base_name)
    for file in (file for file in partial.rglob("*") if file.is_file()):
        shutil.copymode(partial / "config.json", file)  # safetensors lets nobody else read what it writes
        sync(file)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    partial.rmdir()
    sync(folder)


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict; a weight quantised to 4 bits stands in it as the numbers that its forward pass uses."""
    state = model.state_dict()
    for name, module in model.named_modules():
        quantised = getattr(getattr(module, "weight", None), "quant_state", None)
        if quantised is not None:
            from bitsandbytes.functional import dequantize_4bit

            for key in [key for key in state if key.startswith(f"{name}.weight.")]:  # scales and tables
                del state[key]
            state[f"{name}.weight"] = dequantize_4bit(module.weight.data, quantised)
    return state


def save_adapter(model: nn.Module, state: dict[str, torch.Tensor], folder: Path, base_name: str) -> None:
    """Write the adapters of a state dict in PEFT's file format: adapter_model.safetensors and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, targets = {}, set()
    for name, adapter in lora.adapters(model):
        tensors[f"base_model.model.{name}.lora_A.weight"] = state[f"{name}.lora_A"].contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = state[f"{name}.lora_B"].contiguous()
        targets.add(name.rsplit(".", 1)[-1])
        rank = state[f"{name}.lora_A"].shape[0]
        alpha = adapter.scale * rank
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
