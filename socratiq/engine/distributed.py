"""Several processes (torchrun), each with its part of the model and of the rows; with one process, nothing at all.

    torchrun --nproc-per-node 8 train_sft.py --model meta-llama/Llama-3.1-8B

The same command gives the same run on any number of processes. --batch-size and every other argument count for all of
them together; the numbers logged and the weights written differ by rounding alone, and a run begun on two processes
can be continued on one. How:

- The model is sharded (FSDP2): every process holds 1/world of each weight, its gradient and its moments. A layer's
  weights are gathered just before the layer runs and let go just after.
- The rows of each forward pass are dealt out like cards: row i goes to process i modulo world. A process that gets none
  runs an empty batch, since gathering needs everybody.
- Losses are divided by the tokens of all processes, and gradients added up (FSDP would take their mean).
- What a later step needs whole (scores and old log-probs in PPO, metrics) is collected, and then computed by each
  process for itself, on the same numbers with the same result.
- The first process alone prints and writes, except for checkpoints, to which every process adds a file with its part.

Until `start` finds that torchrun started more than one process, every function here hands back what it was given, and
torch.distributed is not imported (but for `load_parts`, where one process continues what several began).
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import warnings
from pathlib import Path

from socratiq.run.errors import UserError
from socratiq.run.files import remove, sync

_rank, _world = 0, 1


def start(device: str) -> None:
    """Join the other processes, if torchrun started any. `device` is the --device argument.

    CUDA processes take the GPU of their local rank and talk over NCCL; what lives on the CPU goes over gloo.
    """
    global _rank, _world
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _world > 1:
        return
    import torch
    import torch.distributed as dist

    if device == "mps":
        raise UserError("--device mps: several processes need --device cpu or cuda")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"torchrun started more processes than there are GPUs here; use --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    atexit.register(dist.destroy_process_group)
    _rank, _world = dist.get_rank(), dist.get_world_size()
    if _rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def rank() -> int:
    """Number of this process, 0 for the one that prints and writes."""
    return _rank


def world() -> int:
    """How many processes there are."""
    return _world


# --- rows and numbers -----------------------------------------------------------------------------------------------


def share(items) -> list:
    """This process's items: every world-th. May be empty."""
    return list(items)[_rank::_world]


def collect(items: list) -> list:
    """The way back: every process's share, in the order from which they were dealt. Items are tensors, or JSON."""
    if _world == 1:
        return items
    shares = _exchange(items)
    return [shares[i % _world][i // _world] for i in range(sum(map(len, shares)))]


def _exchange(value) -> list:
    """Every process's value, by rank. It travels as JSON, since PyTorch's own way for objects would pickle it."""
    import torch
    import torch.distributed as dist

    def pack(x):  # floats come back as they were: Python writes as many digits as that takes
        return {"tensor": x.tolist(), "dtype": str(x.dtype).removeprefix("torch.")}

    def unpack(x):
        return torch.tensor(x["tensor"], dtype=getattr(torch, x["dtype"])) if x.keys() == {"tensor", "dtype"} else x

    data = json.dumps(value, default=pack).encode()
    data = data.ljust(most(len(data)))  # all of one length; JSON allows for blanks at the end
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    everyones = [torch.empty_like(mine) for _ in range(_world)]
    dist.all_gather(everyones, mine)
    return [json.loads(theirs.numpy().tobytes(), object_hook=unpack) for theirs in everyones]


def all_sum(x):
    """The sum over all processes of a number, a tensor, or a dict of numbers."""
    if _world == 1:
        return x
    import torch
    import torch.distributed as dist

    if isinstance(x, dict):
        total = all_sum(torch.stack([torch.as_tensor(value).detach().double() for value in x.values()]))
        return dict(zip(x, total.unbind(), strict=True))
    total = x.detach().clone() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(total)
    return total if isinstance(x, torch.Tensor) else total.item()


def most(number: int) -> int:
    """The largest of the processes' numbers."""
    if _world == 1:
        return number
    import torch
    import torch.distributed as dist

    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def first(function):
    """What `function()` returns, or the UserError it raises, in the first process; the others do not run it."""
    if _world == 1:
        return function()
    result, error = None, None
    if _rank == 0:
        try:
            result = function()
        except UserError as raised:
            error = str(raised)
    result, error = _exchange([result, error])[0]
    if error is not None:
        raise UserError(error)
    return result


# --- the model ------------------------------------------------------------------------------------------------------


def shard(policy) -> None:
    """Give every process its part of the policy: each decoder layer is one unit, the rest (embedding, heads) another.

    Comes after adapters, value head and reference copy are in place and before the optimiser, which then holds moments
    for this process's part alone.
    """
    if _world == 1:
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cuda" if torch.cuda.is_initialized() else "cpu", (_world,))
    # Under autocast a layer computes in bfloat16, so its weights travel in bfloat16 and its gradients are added in
    # float32. Without this autocast would keep a bfloat16 copy of every layer until the backward pass.
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for lm in [policy.lm] + ([policy.frozen] if policy.frozen else []):
        for layer in lm.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=mixed if policy.autocast else MixedPrecisionPolicy())
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    # FSDP warns of outputs changed in place, which would pass by its hooks. Nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for unit in units(policy):
        unit.set_gradient_divide_factor(1.0)  # add gradients up: the losses are divided by the tokens of all processes
        unit.set_force_sum_reduction_for_comms(True)


def units(policy) -> list:
    """The modules whose weights are gathered together; none with one process."""
    if _world == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def whole(tensor):
    """All of a tensor that is spread over the processes; any other tensor as it is. All processes call it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(tensors: dict) -> dict:
    """All of every tensor, in the CPU memory of the first process; the others get {}. One process keeps what it has."""
    if _world == 1:
        return tensors
    gathered = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)  # on every process, but only one tensor at a time
        if _rank == 0:
            gathered[name] = tensor.to("cpu", copy=True)  # without the padding that uneven shards leave behind it
    return gathered


def part(tensor, parameter):
    """This process's part of a whole tensor that belongs to a parameter: its weight, or one of its moments."""
    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor  # one process, or a number such as the optimiser's step count
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def save_parts(tensors: dict, folder: Path) -> dict:
    """Write the tensors that are spread over the processes into `folder`, each process its part; hand back the others.

    All is on the disk when this returns. The files are safetensors and say in their headers where a part belongs; only
    the plan of who writes what is pickled, on its way between these processes.
    """
    spread = {name: tensor for name, tensor in tensors.items() if hasattr(tensor, "full_tensor")}
    if spread:
        import torch.distributed.checkpoint as dcp

        first(lambda: remove(folder))  # left behind by a kill, perhaps of more processes: those files would be read too
        # A file is put together in memory, so 64 tensors make one: it is small beside what this process holds.
        files = {name: 1 + number // 64 for number, name in enumerate(spread)}
        try:
            dcp.save(spread, storage_writer=dcp.HuggingFaceStorageWriter(folder, files, save_distributed=True))
        except dcp.api.CheckpointException as failed:
            raise failed.failures[min(failed.failures)][0] from None  # a full disk, say
        for place in (folder, folder.parent):
            sync(place)
    return {name: tensor for name, tensor in tensors.items() if name not in spread}


def load_parts(folder: Path, parameters: dict) -> dict:
    """This process's part of every tensor in `folder`, however many processes wrote it; one process gets all of it.

    A tensor is called KIND.NAME and is spread as parameters[NAME] is: that weight, or one of its moments.
    """
    import torch
    import torch.distributed.checkpoint as dcp

    reader, tensors = dcp.HuggingFaceStorageReader(folder), {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        tensors[name] = torch.empty_like(parameters[name.partition(".")[2]], requires_grad=False)
        if sum(chunk.sizes.numel() for chunk in stored.chunks) != tensors[name].numel():
            raise KeyError(f"a part of {name} is missing in {folder}")
    # Everybody knows what to read: nothing has to be planned together, which is what the warning is about.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
