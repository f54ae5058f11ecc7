"""Several processes (torchrun), each with its part of the model and of the rows; with one process, nothing at all.

    torchrun --nproc-per-node 8 train_sft.py --model meta-llama/Llama-3.1-8B

The same command gives the same run on any number of processes: --batch-size and every other argument count for all of
them together, the numbers logged and the weights written differ by rounding alone, and a run begun on two processes can
be continued on one.

- The model is sharded (FSDP2): every process holds 1/world of each weight, its gradient and its moments. A layer's
  weights are gathered just before the layer runs and dropped just after.
- Row i of a forward pass goes to process i modulo world. Gathering needs every process, so one without rows runs a
  filler row that counts for nothing.
- Losses are divided by the tokens of all processes, and gradients are summed (FSDP would take their mean).
- Only the first process prints and writes, except for checkpoints, to which every process adds files with its part.

With one process the functions here change nothing, and torch.distributed is not imported (except to read a
checkpoint that several processes wrote).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import warnings
from pathlib import Path

from socratiq.run.errors import UserError
from socratiq.run.files import remove, sync
from socratiq.run.folder import Run

dist = None  # torch.distributed, once this process has joined others


def rank() -> int:
    """Number of this process, 0 for the one that prints and writes."""
    return dist.get_rank() if dist else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist else 1


def open_run(args, stage: str) -> Run:
    """Join the other processes if torchrun started any, and open the run in --out."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.plain or args.device == "mps":
            raise UserError("several processes need --device cpu or cuda, and no --plain")
        join(args.device)
    began_on_several = any(Path(args.out).glob("checkpoint-*"))
    return ShardedRun(args, stage) if dist or began_on_several else Run(args, stage)


def join(device: str) -> None:
    """Join the processes that torchrun started. CUDA processes take the GPU of their local rank and talk over NCCL."""
    global dist
    import torch
    import torch.distributed as dist

    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"torchrun started more processes than there are GPUs here; use --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # tensors on the CPU go over gloo
    atexit.register(dist.destroy_process_group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)


# --- rows and numbers -----------------------------------------------------------------------------------------------


def share(items) -> list:
    """This process's items: every world-th, or none."""
    return list(items)[rank() :: world()]


def collect(items: list, count: int) -> list:
    """The way back: all `count` items in the order from which they were shared out, on every process."""
    if dist is None:
        return items
    shares = [None] * world()
    dist.all_gather_object(shares, items)  # pickled, but on the way between our own processes only
    return [shares[i % world()][i // world()] for i in range(count)]


def first(function):
    """What `function()` returns in the first process, or the UserError it raises; the others do not run it."""
    if dist is None:
        return function()
    found = [None, None]  # result and error
    if rank() == 0:
        try:
            found[0] = function()
        except UserError as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1]:
        raise found[1]
    return found[0]


def all_sum(x):
    """The sum over all processes of a number, a tensor, or a dict of numbers."""
    if dist is None:
        return x
    import torch

    if isinstance(x, dict):
        total = all_sum(torch.stack([torch.as_tensor(value).detach().double() for value in x.values()]))
        return dict(zip(x, total.unbind(), strict=True))
    total = x.detach().clone() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(total)
    return total if isinstance(x, torch.Tensor) else total.item()


# --- the model ------------------------------------------------------------------------------------------------------


def shard(policy) -> None:
    """Give every process its part of the policy: each decoder layer is one unit, the rest (embedding, heads) another.

    Comes after adapters, value head and reference copy are in place and before the optimiser, which then holds moments
    for this process's part alone.
    """
    if dist is None:
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cuda" if torch.cuda.is_initialized() else "cpu", (world(),))
    # Under autocast a layer computes in bfloat16, so its weights travel in bfloat16 and its gradients are added in
    # float32. Without this autocast would keep a bfloat16 copy of every layer until the backward pass.
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for lm in [policy.lm] + ([policy.frozen] if policy.frozen else []):
        for layer in lm.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=mixed if policy.autocast else MixedPrecisionPolicy())
    # The heads run after `hidden`, which stands for the policy's forward: their weights stay whole until the backward.
    fully_shard(policy, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(policy, "hidden")
    # FSDP warns of outputs changed in place, which would bypass its hooks. Nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for unit in _units(policy):
        unit.set_gradient_divide_factor(1.0)  # sum the gradients: the losses are divided by the tokens of all processes
        unit.set_force_sum_reduction_for_comms(True)


def _units(policy) -> list:
    """The modules whose weights are gathered together; none with one process."""
    return [module for module in policy.modules() if hasattr(module, "reshard")]


@contextlib.contextmanager
def unsharded(policy):
    """Inside, all weights are whole on every process, so that each can sample without waiting for the others."""
    for unit in _units(policy):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in _units(policy):
        unit.set_reshard_after_forward(unit is not policy, recurse=False)
        unit.reshard()


def gather(tensors: dict) -> dict:
    """All of every tensor, in the CPU memory of the first process; the others get {}. One process keeps what it has."""
    if dist is None:
        return tensors
    gathered = {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # everywhere, but one at a time
        if rank() == 0:
            gathered[name] = tensor.to("cpu", copy=True)  # without the padding that uneven shards leave behind it
    return gathered


# --- the run --------------------------------------------------------------------------------------------------------


class ShardedRun(Run):
    """A run that several processes share, or that several began and one continues.

    Weights and moments are written through torch.distributed.checkpoint into a folder checkpoint-STEP, each process its
    part, as safetensors: nothing is pickled on the disk. checkpoint.safetensors comes after them and names the folder.
    """

    writes = property(lambda self: rank() == 0)
    _in_first = staticmethod(first)

    def save(self, policy, optimizer, state: dict) -> None:
        for unit in _units(policy):
            unit.reshard()  # after an evaluation without a backward pass the heads are whole
        super().save(policy, optimizer, state)

    def _write_checkpoint(self, tensors: dict, state: dict) -> None:
        if dist is None:
            return super()._write_checkpoint(tensors, state)
        import torch.distributed.checkpoint as dcp

        # Every checkpoint has a folder of its own, so that the one before stays whole.
        folder = self.out / f"checkpoint-{state['step']}"
        first(lambda: remove(folder))  # left behind by a kill, perhaps of more processes: their files would be read too
        files = {name: 1 + number // 64 for number, name in enumerate(tensors)}  # a file is assembled in memory
        try:
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(folder, files, save_distributed=True))
        except dcp.api.CheckpointException as failed:
            raise failed.failures[min(failed.failures)][0] from None  # a full disk, say
        sync(folder)
        if self.writes:
            super()._write_checkpoint({}, {**state, "parts": folder.name})
            for other in set(self.out.glob("checkpoint-*")) - {folder}:
                remove(other)

    def _read_tensors(self, state: dict, parameters: dict, device) -> dict:
        import torch
        import torch.distributed.checkpoint as dcp

        # One process wrote a single file into the run's folder.
        reader, tensors = dcp.HuggingFaceStorageReader(self.out / state.pop("parts", "")), {}
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            like = parameters.get(name.partition(".")[2])
            if like is None:
                continue  # a weight of model.safetensors: the one process was killed when it had saved the model
            like = like if stored.size else torch.zeros(())  # a step count
            tensors[name] = torch.empty_like(like, requires_grad=False)
            if sum(chunk.sizes.numel() for chunk in stored.chunks) != tensors[name].numel():
                raise KeyError(f"a part of {name} is missing in {reader.path}")
        # Every process knows what to read: nothing has to be planned together, which is what the warning is about.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors
