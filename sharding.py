"""Models beyond one card: the processes of a run share what one of them could not hold.

Bytes on each of N cards for P parameters in fp32, activations apart:
                weights    gradients    AdamW
    DDP         4 P        4 P          8 P        every process holds everything
    --zero 1    4 P        4 P          8 P / N    each steps its share of the weights and sends it to the others
    --fsdp 1    4 P / N    4 P / N      8 P / N    and the weights of one block at a time, while it computes

What is computed is the same, and so is the checkpoint: whole weights, and AdamW's state as one process would have
written it. So a run may go on in another way, or with another number of processes. What this file does not do: read
flags, and average gradients, which is the job of DistributedDataParallel, or of FSDP itself.

Sources: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054; --zero 1 is its first stage, --fsdp 1 its third); Zhao et al.
2023, PyTorch FSDP (arXiv:2304.11277).
"""

import torch

# torch.distributed's parts are imported where they are used: they cost most of a second, and not every build has them


def modes(args, runtime):
    """(zero, fsdp): what this run shares. With one process there is nobody to share with; it says so and goes on, for
    the result is the same."""
    if runtime.world_size == 1 and (args.zero or args.fsdp):
        runtime.print("one process has nobody to share with: --zero and --fsdp change nothing here; they are for "
                      "torchrun --nproc_per_node N")
        return False, False
    return bool(args.zero), bool(args.fsdp)


def shard(model, blocks, runtime):
    """Spread a model over all ranks (FSDP2), in place, before its optimizer is made: its parameters become DTensors, of
    which each rank holds a slice of the rows. Only for its forward and its backward a block is whole.

    Args:
        model: equal on all ranks, best on the CPU: then a card never holds more of it than one block.
        blocks: the modules inside it that are gathered one at a time.
    Raises: ValueError on a CPU with torch 2.6.
    """
    if runtime.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):  # FSDP2 asks for it
        raise ValueError(f"--fsdp 1 on the CPU with torch {torch.__version__}; FSDP2 runs there from torch 2.7 on; "
                         "update torch, or give --zero 1")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # embedding, last norm and head: one group, because a tied head is the embedding
    register_fsdp_forward_method(model, "hidden_states")  # where generate() enters the model
    runtime.lockstep = True


def whole(tensor):
    """The full tensor of a DTensor, on every rank (all must call it, in the same order); any other value as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(model, optimizer, runtime):
    """What to save: model.state_dict() and optimizer.state_dict() as one process alone would have them.

    All ranks must call it. Shared tensors are gathered one by one into the main memory of rank 0, in fp32 with FSDP 12
    bytes a parameter; what the other ranks get is of no use.
    """
    def gathered(tensor):
        full = whole(tensor)
        if full is tensor:
            return tensor
        return full.cpu() if runtime.is_main else None

    # with keep_vars a tied weight is one object under two names: gathered once, and one tensor in the file
    named = model.state_dict(keep_vars=True)
    once = {id(tensor): gathered(tensor.detach()) for tensor in {id(t): t for t in named.values()}.values()}
    weights = {name: once[id(tensor)] for name, tensor in named.items()}
    if hasattr(optimizer, "consolidate_state_dict"):  # ZeRO: each rank's share, to rank 0
        optimizer.consolidate_state_dict(to=0)
        return weights, optimizer.state_dict() if runtime.is_main else {}
    state = optimizer.state_dict()
    state["state"] = {i: {key: gathered(value) for key, value in values.items()}
                      for i, values in state["state"].items()}
    return weights, state


def load_full_state(model, optimizer, weights, state, load):
    """Inverse of full_state(): give each rank its share of whole weights and of AdamW's whole state. All ranks must
    call it. load: optim.load_state, which puts a state into an optimizer that is not ZeRO's."""
    model.load_state_dict({name: _like(weights[name], mine) for name, mine in model.state_dict().items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # numbered so in the state
    if hasattr(optimizer, "consolidate_state_dict"):
        # straight into the optimizer of this rank's share: ZeRO's own loader keeps a second copy beside it, and the
        # step counts on the CPU, where the fused AdamW of a GPU does not find them
        number = {p: i for i, p in enumerate(parameters)}
        own = [p for group in optimizer.optim.param_groups for p in group["params"]]
        share = {i: state["state"][number[p]] for i, p in enumerate(own) if number[p] in state["state"]}
        optimizer.optim.load_state_dict(optimizer.optim.state_dict() | {"state": share})
        return
    spread = {i: {key: _like(value, parameters[i]) for key, value in values.items()}
              for i, values in state["state"].items()}
    load(optimizer, state | {"state": spread})


def _like(full, mine):
    """A full tensor, spread over the ranks as `mine` is; as it is where `mine` is not spread, or for a step count."""
    if not hasattr(mine, "placements") or not full.ndim:
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(mine.device), mine.device_mesh, mine.placements)
