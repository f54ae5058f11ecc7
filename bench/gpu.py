"""On a GPU: are its numbers the CPU's, how quick are updates and sampling, and how much memory do they take?

    python bench/gpu.py                        # models shaped like SmolLM2-135M and Llama 3.1 8B; a few minutes
    python bench/gpu.py --shape 135M --steps 8
    python bench/gpu.py --shape tiny --device cpu   # tries this script where there is no GPU

Weights are random, which changes neither time nor memory; the 8B ones are made on the GPU and written to a temporary
folder, 16 GB. Rows are the embedded ones, and for the memory rows of 512 tokens with completions of 64.
"""

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from socratiq import losses, training
from socratiq.batch import make_batch
from socratiq.data import load_rows
from socratiq.models import load_policy, load_tokenizer
from socratiq.policy import token_logprobs
from socratiq.prompts import encode_completion, encode_prompt
from socratiq.sampling import sample

# width, MLP, layers, heads, key heads, vocabulary, one matrix for embedding and head
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 1024, True),
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
}
ROWS, PROMPTS, NEW = 8, 16, 48


def make_model(shape: str, tokenizer, device: str, folder: str) -> None:
    """Random weights of that shape, with distributions far from uniform, as a checkpoint in `folder`."""
    width, mlp, layers, heads, key_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=max(vocabulary, len(tokenizer)),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        lm = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def milliseconds(work, device: str, steps: int) -> list[float]:
    """Of `steps` calls of work(step), after two that are not counted."""
    took = []
    for step in range(steps + 2):
        started = time.perf_counter()
        work(step)
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(1e3 * (time.perf_counter() - started))
    return took[2:]


def median(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.0f} ms ({min(numbers):.0f}-{max(numbers):.0f})"


def gigabytes(device: str) -> float:
    """The most held since the last question."""
    if device != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def check_numbers(folder: str, device: str, prompts, questions) -> None:
    """float32, the same rows on both devices: log-probs, gradients, and what is sampled."""
    for rank in (0, 8):
        seen = []
        for where in ("cpu", device):
            policy = load_policy(folder, where, "float32", lora_rank=rank, seed=1)
            for name, weight in policy.trainable().items():
                if "lora_B" in name:  # not 0, as adapters begin
                    weight.data.copy_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
            batch = make_batch(prompts[:4], [questions[i : i + 3] for i in range(4)]).to(policy.device)
            logprobs = token_logprobs(policy, batch)["logprobs"]
            losses.sft_loss(logprobs, batch.mask).backward()
            gradient = torch.cat([weight.grad.flatten().double().cpu() for weight in policy.trainable().values()])
            seen.append((logprobs.detach().cpu(), gradient))
        (a, b), (c, d) = seen
        print(f"rank {rank}: log-probs differ by {(a - c).abs().max():.1e} at most, ", end="")
        print(f"the gradient by {((b - d).norm() / b.norm()):.1e} of its length")
    policy = load_policy(folder, device, "float32", trainable=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    ours = sample(policy, prompts[:8], 1, 16, eos_id=-1, temperature=0)
    greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    for prompt, (written,) in zip(prompts, ours, strict=False):
        theirs = plain.generate(torch.tensor([prompt], device=device), **greedy)[0, len(prompt) :].tolist()
        assert written == theirs, (written, theirs)
    print("the most likely tokens are those of generate")


def check_updates(folder: str, device: str, steps: int, prompts, questions, **options) -> None:
    """Updates of SFT, DPO and PPO, by how many completions a prompt has; and the memory they take."""
    policy = load_policy(folder, device, "bfloat16", value_head=True, **options)
    optimizer = training.make_optimizer(policy, 1e-5)
    long = [(list(range(20, 600)) * 2)[i : i + 512] for i in range(ROWS)]  # different from their first token on

    def update(rows, asked):
        batch = make_batch(rows, asked).to(policy.device)
        out = token_logprobs(policy, batch)
        (losses.sft_loss(out["logprobs"], batch.mask) + 0 * out["values"].sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch.input_ids.numel()

    for stage, samples in (("sft", 1), ("dpo", 2), ("ppo", 4)):
        gigabytes(device)
        ran = []

        def on_rows(step, samples=samples, ran=ran):
            first = step * ROWS % (len(prompts) - ROWS)
            asked = [[questions[(i + k) % len(questions)] for k in range(samples)] for i in range(first, first + ROWS)]
            ran.append(update(prompts[first : first + ROWS], asked))

        took = milliseconds(on_rows, device, steps)
        tokens = statistics.median(tokens / ms * 1e3 for tokens, ms in zip(ran[2:], took, strict=True))
        print(f"{stage}: {ROWS} rows x {samples}: {median(took)} an update, {tokens:.0f} tokens run a second")
        gigabytes(device)
        took = milliseconds(lambda step, k=samples: update(long, [[[9] * 64] * k] * ROWS), device, 2)
        tokens = ROWS * (512 + 64 * samples)
        speed = tokens / min(took) * 1e3
        held = gigabytes(device)
        print(f"     of 512 + {samples} x 64 tokens: {median(took)}, {speed:.0f} tokens a second, {held:.2f} GB")
    for samples in (1, 4):
        took = milliseconds(lambda step, k=samples: sample(policy, prompts[:PROMPTS], k, NEW, -1), device, 2)
        print(f"sampling {PROMPTS} x {samples} x {NEW}: {median(took)}, {gigabytes(device):.2f} GB")


def beside_generate(folder: str, device: str, tokenizer, prompts) -> None:
    """Sampling beside transformers' generate: the same frozen weights, in turns."""
    policy = load_policy(folder, device, "bfloat16", trainable=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    given = tokenizer.pad({"input_ids": prompts[:PROMPTS]}, return_tensors="pt").to(device)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 64, "min_new_tokens": 64}
    for samples in (1, 4):
        ours, theirs = [], []
        for _ in range(2):
            ours += milliseconds(lambda step, k=samples: sample(policy, prompts[:PROMPTS], k, 64, -1), device, 1)
            theirs += milliseconds(
                lambda step, k=samples: plain.generate(**given, **settings, num_return_sequences=k), device, 1
            )
        ratio = statistics.median(theirs) / statistics.median(ours)
        print(f"{PROMPTS} x {samples} x 64: {median(ours)}, generate {median(theirs)}, {ratio:.1f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", default=["135M", "8B"], choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=5, help="updates that are counted")
    parser.add_argument("--four-bit", action="store_true", help="8B in 4 bits too (needs bitsandbytes)")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "a CPU"
    print(f"PyTorch {torch.__version__} on {name}")
    tokenizer = load_tokenizer("smollm2")
    rows = [row for row in load_rows("sample") if row.type != "others"]
    random.Random(0).shuffle(rows)
    prompts = [encode_prompt(tokenizer, row.context, row.type, 512) for row in rows]
    questions = [encode_completion(tokenizer, row.question) for row in rows]
    for shape in args.shape:
        print(f"\n{shape}")
        with tempfile.TemporaryDirectory() as folder:
            make_model(shape, tokenizer, args.device, folder)
            if shape != "8B":
                check_numbers(folder, args.device, prompts, questions)
                beside_generate(folder, args.device, tokenizer, prompts)
            check_updates(folder, args.device, args.steps, prompts, questions, lora_rank=16)
            if shape == "8B":
                for option in ["grad_checkpoint"] + ["load_in_4bit"] * args.four_bit:
                    gc.collect()
                    print(f"\n{shape}, {option}")
                    check_updates(folder, args.device, args.steps, prompts, questions, lora_rank=16, **{option: True})


if __name__ == "__main__":
    main()
