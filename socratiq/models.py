"""Models: open one as a policy. saving.py writes it back as a plain Hugging Face folder.

Here the engine meets the core: `load_policy` puts its faster twins into the policy, unless it is asked for a plain one.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from socratiq import builtin, lora
from socratiq.engine import distributed, speed_up
from socratiq.family import check_family
from socratiq.policy import Policy
from socratiq.run.errors import UserError, first_line

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
huggingface_hub.utils.logging.set_verbosity_error()  # no line for every attempt to reach the Hub


def pick_device(name: str) -> torch.device:
    """The device behind --device; "auto" takes CUDA, then MPS, then the CPU. Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch sees no Apple GPU here; use --device auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """For "auto" bfloat16 where the hardware multiplies in it (CUDA from Ampere on, AVX-512 BF16), else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
        fast = "AVX512" in capabilities and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def load_policy(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    lora_rank: int = 0,
    value_head: bool = False,
    trainable: bool = True,
    seed: int = 0,
    grad_checkpoint: bool = False,
    load_in_4bit: bool = False,
    plain: bool = False,
    deterministic: bool = False,
) -> Policy:
    """Open "smollm2", "tiny", a folder or a Hub id as a policy.

    With `lora_rank` > 0 the base weights are frozen (in `dtype`, or in 4 bits) and adapters train in float32; with 0
    every weight trains, in float32 under bfloat16 autocast. With `trainable` False nothing trains and weights are held
    in `dtype`. With `grad_checkpoint` a layer keeps its input alone for the backward pass, which runs it once more.
    `plain` leaves the engine out: slower, the same numbers. `deterministic` gives the same bytes on a GPU too. Raises
    UserError in one line if the model cannot be used.
    """
    if deterministic:
        repeatable()
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    full = trainable and lora_rank == 0
    # The dtype is this run's choice, whatever the folder's config says.
    lm = open_model(name, torch.float32 if full else torch_dtype, load_in_4bit, full)
    # Of several processes each takes its part of a trained model alone to its device.
    lm.to("cpu" if trainable and distributed.world() > 1 else torch_device).eval()
    for module in lm.modules():  # in eval mode bitsandbytes may repack a weight, after which it passes no gradient
        if type(module).__name__ == "Linear4bit":
            module.train()
    torch.manual_seed(seed)
    lm.requires_grad_(full)
    if trainable and lora_rank:
        if lora_rank > lm.config.hidden_size:
            raise UserError(
                f"--lora-rank {lora_rank}: above the model's width of {lm.config.hidden_size}; 8 to 64 are usual"
            )
        without = lora.add_lora(lm, lora_rank)
        names = f"; without: {', '.join(without)}" if without else ""
        print(f"adapters on {sum(1 for _ in lora.adapters(lm))} linear layers{names}")
    if grad_checkpoint:
        checkpoint_layers(lm)
    policy = Policy(lm, value_head=value_head, autocast=torch_dtype == torch.bfloat16)
    if not plain:
        speed_up(policy, torch_device)
    check_family(policy, name)
    return policy


def repeatable() -> None:
    """Choose kernels that add in a fixed order, as those of the CPU do; where a GPU has none, PyTorch raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrices are multiplied
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)


def checkpoint_layers(lm: PreTrainedModel) -> None:
    """Recompute every layer in the backward pass, with dropout off.

    transformers' layers checkpoint in train mode only, which would switch dropout and a router's noise on as well, so
    the train flag is set on the layers alone and not on the modules inside them.
    """
    lm.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for layer in lm.model.layers:
        layer.training = True


def open_model(name: str, dtype: torch.dtype, load_in_4bit: bool = False, full: bool = False) -> PreTrainedModel:
    """The transformers model behind a name, with this project's attention, in `dtype`, its layers perhaps in 4 bits."""
    source = resolve(name)
    options = {"dtype": dtype, "attn_implementation": "socratiq", "use_safetensors": True, "trust_remote_code": False}
    if load_in_4bit:  # NF4 with quantised scales (QLoRA, Dettmers et al. 2023): 4.13 bits a weight
        check_4bit(full)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        options["config"] = without_dropout(AutoConfig.from_pretrained(source, trust_remote_code=False))
        lm, found = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
    except Exception as error:  # a broken folder makes transformers raise nearly anything
        raise UserError(f"--model {name}: no model that can be read ({first_line(error)})") from None
    if not hasattr(getattr(lm, "model", None), "layers") or not hasattr(lm, "lm_head"):
        raise UserError(
            f"--model {name}: {type(lm).__name__} has no .model.layers and .lm_head; use a Llama-like model"
        )
    if found["missing_keys"]:  # transformers would put random numbers there and go on
        missing = sorted(found["missing_keys"])
        raise UserError(f"--model {name}: {len(missing)} weights are missing, such as {missing[0]}; get it anew")
    return lm


def without_dropout(config):
    """The config with dropout and a router's noise off: PPO's ratio and DPO's reference need the same numbers twice."""
    for name, value in vars(config).items():
        if value and name.endswith(("dropout", "pdrop", "dropout_prob", "jitter_noise")):
            setattr(config, name, 0.0)
    return config


def check_4bit(full: bool) -> None:
    """Raise UserError unless --load-in-4bit can be done."""
    if full:
        raise UserError("--load-in-4bit: weights of 4 bits cannot be trained; use adapters (--lora-rank above 0)")
    if distributed.world() > 1:
        raise UserError("--load-in-4bit: packed weights cannot be spread over processes; start one, or leave it out")
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--load-in-4bit needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def load_tokenizer(name: str):
    """The tokenizer behind a name. Raises UserError if it cannot be read or knows no end of sequence."""
    source = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        rows = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config().vocab_size
    except Exception as error:  # as above
        raise UserError(
            f"--model {name}: no tokenizer that can be read ({first_line(error)}); name smollm2, tiny, a checkpoint "
            "folder or a Hub id"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer has no end-of-sequence token; choose another model")
    if len(tokenizer) > rows:
        raise UserError(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its embedding only {rows} rows")
    return tokenizer


def resolve(name: str) -> str:
    """A folder or Hub id that transformers opens; the two built-in names are made in the cache first."""
    if name in ("smollm2", "tiny"):
        return str(distributed.first(lambda: builtin.folder_of(name)))
    folder = Path(name)
    if name and folder.is_dir():
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise UserError(f"--model {name}: the folder holds an adapter; name the merged model, {folder.parent}")
        if not (folder / "config.json").exists():
            raise UserError(f"--model {name}: the folder holds no config.json, so it is no model; run the stage before")
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"--model {name}: no *.safetensors in the folder (pickled weights are never loaded)")
    elif name.count("/") != 1 or name.startswith((".", "/", "~", "runs/")):
        raise UserError(
            f"--model {name}: no such folder; name smollm2, tiny, a folder that a stage wrote, or a Hub id owner/name"
        )
    return name
