"""How much memory a stage needs, from the numbers in a model's config alone: no weights, no GPU.

    python -m socratiq.memory                                  # Llamas of 1B to 70B, on 1 and on 8 devices
    python -m socratiq.memory --model meta-llama/Llama-3.1-8B --grad-checkpoint --batch-size 16
    python -m socratiq.memory --model smollm2 --lora-rank 0    # every weight trained

The formulas count tensors, in bytes and per device. What they leave out: the CUDA context and kernels (about 1 GB) and
what an allocator holds in reserve (allow a tenth). bench/memory_check.py compares them with what processes really take.

Letters: L layers, H hidden size, F width of the MLP, Q = heads * head size, S = key heads * head size, V vocabulary,
r rank; N tokens that run through the layers at once, M tokens of them that are scored; e bytes of a number in the
matrix products: 2 in bfloat16, 4 in float32.
"""

from __future__ import annotations

from typing import NamedTuple

from socratiq import cli
from socratiq.errors import UserError, main

ROUND = 32  # the length of a short row is filled up to a multiple of it in the CPU's attention (fused.py)
HEAD_CHUNK = 512  # scored positions whose logits exist at a time (model.py)
STAGES = ("sft", "dpo", "ppo", "sampling")


class Shape(NamedTuple):
    """A Llama-like model in eight numbers."""

    layers: int  # L
    hidden: int  # H
    mlp: int  # F
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int  # V
    tied: bool  # embedding and head are one matrix

    @property
    def linear(self) -> int:
        """Weights in the projections of one layer: query and output, key and value, gate, up and down."""
        Q, S = self.heads * self.head_size, self.key_heads * self.head_size
        return 2 * self.hidden * Q + 2 * self.hidden * S + 3 * self.hidden * self.mlp

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of the head unless it is the same matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        return self.layers * (self.linear + 2 * self.hidden) + self.embedding + self.hidden  # with the norms

    def adapters(self, rank: int) -> int:
        """Weights of the adapters: r * (in + out) for each projection."""
        Q, S = self.heads * self.head_size, self.key_heads * self.head_size
        return self.layers * rank * (2 * (self.hidden + Q) + 2 * (self.hidden + S) + 3 * (self.hidden + self.mlp))


SHAPES = {
    "tiny": Shape(2, 64, 128, 4, 2, 16, 1024, True),
    "smollm2": Shape(30, 576, 1536, 9, 3, 64, 49152, True),
    "Llama 1B": Shape(16, 2048, 8192, 32, 8, 64, 128256, True),  # Llama 3.2
    "Llama 3B": Shape(28, 3072, 8192, 24, 8, 128, 128256, True),  # Llama 3.2
    "Llama 8B": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),  # Llama 3.1
    "Llama 70B": Shape(80, 8192, 28672, 64, 8, 128, 128256, False),  # Llama 3.1
}


class Work(NamedTuple):
    """What is done with the model. `rows` are prompts in one forward pass, on all devices together."""

    stage: str = "sft"
    rank: int = 16  # of the adapters; 0 trains every weight
    half: bool = True  # bfloat16 matrix products
    devices: int = 1
    rows: int = 8
    samples: int = 1  # completions per prompt: SFT 1, DPO 2, PPO and sampling K
    prompt: int = 512  # tokens
    completion: int = 64  # tokens
    shared: int = 0  # tokens that all prompts begin with: they run once
    grad_checkpoint: bool = False
    four_bit: bool = False
    rollout: int | None = None  # PPO: prompts sampled at a time; `rows` are those of a minibatch
    copies_rows: bool = False  # the CPU's attention copies keys and values of short rows, and what all share with them
    packs_weights: bool = False  # the CPU of one process samples with a packed copy of the weights (packed.py)


def estimate(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes per device, part by part, at the moment of the highest need ("at"), and their "total"."""
    moments = {"sampling": sampling(shape, work)} if work.stage in ("ppo", "sampling") else {}
    if work.stage != "sampling":
        moments |= {"forward": forward(shape, work), "backward": backward(shape, work)}
    at, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    return {**parts, "total": sum(parts.values()), "at": at}


# --- what is always there -------------------------------------------------------------------------------------------


def held(shape: Shape, work: Work) -> dict[str, float]:
    """Weights, adapters and optimiser: they stay from the first step to the last."""
    full = work.stage != "sampling" and work.rank == 0
    e = 2 if work.half else 4
    if full:
        weights = 4 * shape.weights  # trained weights are float32
    elif work.four_bit:
        # 4 bits a weight, a scale of 8 bits for 64 weights, a scale of 32 bits for 256 scales
        projections = shape.layers * shape.linear
        weights = projections * (4 + 8 / 64 + 32 / 64 / 256) / 8 + e * (shape.weights - projections)
    else:
        weights = e * shape.weights
    # PPO needs the model as it was: adapters are switched off, without them there is a copy
    reference = 4 * shape.weights if full and work.stage == "ppo" else 0
    if reference and work.half and work.devices == 1:
        head = 0 if shape.tied else shape.vocabulary * shape.hidden
        reference -= 2 * (shape.layers * shape.linear + head)  # these are in bfloat16
    adapters = shape.adapters(work.rank) if work.stage != "sampling" else 0
    trained = shape.weights if full else adapters
    return {
        "weights": weights / work.devices + gathered(shape, work, e, full),
        "reference": reference / work.devices,
        "adapters": 4 * adapters / work.devices,
        "optimiser": 8 * trained / work.devices if work.stage != "sampling" else 0,  # Adam's two moments
    }


def gathered(shape: Shape, work: Work, e: int, full: bool) -> float:
    """Several devices: what is whole on each for the moment. Embedding and head throughout; of the layers the one at
    work, the next one on its way, and the buffer it arrives in."""
    if work.devices == 1:
        return 0
    return (4 if full else e) * shape.embedding + 3 * e * shape.linear


# --- training -------------------------------------------------------------------------------------------------------


def tokens(work: Work) -> tuple[int, int, int]:
    """(N, M, rows) of one device: tokens that run through the layers, tokens scored, prompts."""
    rows = -(-work.rows // work.devices)
    completions = rows * work.samples * work.completion
    return work.shared + rows * (work.prompt - work.shared) + completions, completions, rows


def layer_activations(shape: Shape, work: Work, last: bool = False) -> float:
    """What one layer keeps for its backward pass, and nothing else is needed from it.

    The last one goes on from its attention with the scored tokens alone (fused.py), unless it is computed again.
    """
    N, M, rows = tokens(work)
    e, Q, S = 2 if work.half else 4, shape.heads * shape.head_size, shape.key_heads * shape.head_size
    stream = (
        4 if work.rank == 0 else e
    )  # trained embeddings are float32, and so is the sum that runs through the layers
    normed = e * shape.hidden * work.grad_checkpoint  # otherwise computed again, like gate times up
    kept = N * (
        stream * shape.hidden  # the sum before attention
        + normed
        + e * (Q + 2 * S)  # query, key, value
        + 3 * e * work.rank  # x A^T of their adapters
    )
    kept += (M if last else N) * (
        e * Q  # output of the attention, the input of the output projection
        + stream * shape.hidden  # the sum before the MLP
        + normed
        + 2 * e * shape.mlp  # gate and up
        + 4 * e * work.rank  # x A^T of these adapters
    )
    if work.copies_rows:
        own = work.prompt - work.shared + work.samples * work.completion  # tokens of a row beside the shared ones
        filled = -(-own // ROUND) * ROUND
        kept += rows * e * (2 * S * (work.shared + filled - own) + Q * (filled - own))
    return kept


def activations(shape: Shape, work: Work) -> float:
    """All that the layers keep between forward and backward."""
    N, _, rows = tokens(work)
    e = 2 if work.half else 4
    # Who sees whom, a byte each, and what the CPU adds to the scores of short rows.
    masks = (1 + e * work.copies_rows) * rows * (work.prompt + work.samples * work.completion) ** 2
    masks *= work.samples > 1  # otherwise rows of one length have one
    masks *= 2 if work.stage == "ppo" else 1  # those of the rollout's last batch are still there
    if work.grad_checkpoint:  # the input of each layer, and the layer that is being computed again
        stream = 4 if work.rank == 0 else e
        return shape.layers * stream * N * shape.hidden + layer_activations(shape, work) + masks
    return (shape.layers - 1) * layer_activations(shape, work) + layer_activations(shape, work, last=True) + masks


def logits(shape: Shape, work: Work) -> float:
    """One chunk of logits, its gradient, and the gradient before the temperature."""
    _, M, _ = tokens(work)
    return 3 * (2 if work.half else 4) * min(M, HEAD_CHUNK) * shape.vocabulary


def in_passing(shape: Shape, work: Work) -> float:
    """What a layer needs for a moment in its backward pass: gate times up, gradients of all three, and of the sum, the
    normed tokens again."""
    N, _, _ = tokens(work)
    e = 2 if work.half else 4
    return N * (5 * e * shape.mlp + 3 * 4 * shape.hidden + e * shape.hidden)


def forward(shape: Shape, work: Work) -> dict[str, float]:
    """Between forward and backward: everything is kept, and the backward pass has begun."""
    full = work.rank == 0
    return {
        **held(shape, work),
        "gradients": 4 * shape.vocabulary * shape.hidden if full else 0,  # of the head
        "activations": activations(shape, work) + in_passing(shape, work),
        "logits": logits(shape, work),
    }


def backward(shape: Shape, work: Work) -> dict[str, float]:
    """At the end of the backward pass: all gradients are there, and the first layer's activations still."""
    full = work.rank == 0
    trained = shape.weights if full else shape.adapters(work.rank)
    whole = (
        (4 * shape.embedding + 2 * (4 + 2) * shape.linear) if full and work.devices > 1 else 0
    )  # before they are dealt
    return {
        **held(shape, work),
        "gradients": 4 * trained / work.devices + whole,
        "activations": layer_activations(shape, work) + in_passing(shape, work),
        "logits": 0,
    }


# --- sampling -------------------------------------------------------------------------------------------------------


def copies(shape: Shape, work: Work) -> float:
    """Weights held once more while tokens are sampled: packed, or cast by autocast, which FSDP does by itself."""
    matrices = shape.layers * shape.linear + shape.vocabulary * shape.hidden
    if work.packs_weights:
        adapters = shape.adapters(work.rank) if work.stage != "sampling" else 0
        return (2 if work.half else 4) * (matrices + adapters)
    trained = work.stage != "sampling" and work.rank == 0
    return 2 * matrices if trained and work.half and work.devices == 1 else 0


def sampling(shape: Shape, work: Work) -> dict[str, float]:
    """The larger of two moments: the first layers' work on all prompts, and the last token with the cache full."""
    rows = -(-(work.rollout or work.rows) // work.devices)
    e, S = 2 if work.half else 4, shape.key_heads * shape.head_size
    # Keys and values of the prompts, once for all their samples, and of what the samples write.
    cache = rows * 2 * e * shape.layers * S * (work.prompt + work.samples * work.completion)
    N = work.shared + rows * (work.prompt - work.shared)
    prompts = N * (e * (3 * shape.mlp + 2 * shape.hidden) + 4 * shape.hidden)
    # Logits of all samples: as they come, in float32, their softmax, its cumulative sum.
    drawn = rows * work.samples * shape.vocabulary * (e + 3 * 4)
    first = {"activations": prompts + copies(shape, work), "logits": 0}
    last = {"activations": copies(shape, work), "logits": drawn}
    return {**held(shape, work), **max(first, last, key=lambda parts: sum(parts.values())), "cache": cache}


# --- the table ------------------------------------------------------------------------------------------------------


def shape_of(name: str) -> Shape:
    """The shape behind a built-in name, a folder or a Hub id; of these only config.json is read."""
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        heads = config.num_attention_heads
        return Shape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            mlp=config.intermediate_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
        )
    except Exception as error:  # a folder without config, no network, a model of another kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        known = ", ".join(SHAPES)
        raise UserError(
            f"--model {name}: no config of a Llama-like model there ({reason}); known are {known}"
        ) from None


COLUMNS = ("weights", "reference", "adapters", "optimiser", "gradients", "activations", "logits", "cache", "total")


def table(names: list[str], works: list[Work]) -> str:
    """One line per model and work, in GB (10^9 bytes)."""
    lines = [f"{'model':<10} {'devices':>7} {'stage':>8}" + "".join(f"{name:>12}" for name in COLUMNS) + "  at"]
    for name in names:
        for work in works:
            parts = estimate(shape_of(name), work)
            cells = "".join(f"{parts.get(column, 0) / 1e9:12.2f}" for column in COLUMNS)
            lines.append(f"{name:<10} {work.devices:>7} {work.stage:>8}{cells}  {parts['at']}")
    return "\n".join(lines)


def run() -> None:
    parser = cli.Parser(prog="python -m socratiq.memory", description="Memory of every stage, from the config alone.")
    parser.add_argument("--model", default=None, help="a built-in name, a folder or a Hub id; all Llamas by default")
    parser.add_argument("--devices", type=cli.count, nargs="+", default=[1, 8], metavar="N", help="processes, one each")
    parser.add_argument("--lora-rank", type=cli.count_or_none, default=16, metavar="R", help="0 trains every weight")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the matrix products")
    parser.add_argument("--batch-size", type=cli.count, default=8, metavar="ROWS", help="prompts per forward pass")
    parser.add_argument("--samples-per-prompt", type=cli.count, default=4, metavar="K", help="of PPO and sampling")
    parser.add_argument("--max-prompt-tokens", type=cli.count, default=512, metavar="TOKENS", help="of every prompt")
    parser.add_argument("--max-new-tokens", type=cli.count, default=64, metavar="TOKENS", help="of every completion")
    parser.add_argument("--grad-checkpoint", action="store_true", help="as in training")
    parser.add_argument("--load-in-4bit", action="store_true", help="as in training")
    args = parser.parse_args()
    cli.check(
        not (args.load_in_4bit and (args.lora_rank == 0 or max(args.devices) > 1)),
        "--load-in-4bit goes with adapters on one device: add --devices 1 and a --lora-rank above 0",
    )
    works = [
        Work(
            stage=stage,
            rank=args.lora_rank,
            half=args.dtype == "bfloat16",
            devices=devices,
            rows=args.batch_size,
            samples={"sft": 1, "dpo": 2}.get(stage, args.samples_per_prompt),
            prompt=args.max_prompt_tokens,
            completion=args.max_new_tokens,
            grad_checkpoint=args.grad_checkpoint,
            four_bit=args.load_in_4bit,
        )
        for devices in args.devices
        for stage in STAGES
    ]
    print(
        f"GB per device: {'rank ' + str(args.lora_rank) if args.lora_rank else 'every weight trained'}, {args.dtype}, "
        f"{args.batch_size} prompts of {args.max_prompt_tokens} tokens on all devices together, completions of "
        f"{args.max_new_tokens}{', gradient checkpointing' * args.grad_checkpoint}{', 4 bits' * args.load_in_4bit}"
    )
    print(table([args.model] if args.model else [name for name in SHAPES if "Llama" in name], works))


if __name__ == "__main__":
    main(run)
