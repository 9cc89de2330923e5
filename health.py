"""How a run is doing beside its loss: gradients and updates by layer group, load of the experts, activations on demand,
memory and load of the machine; and an alarm, in one line with the likely cause, when one leaves its healthy range.

A step is seen through the hooks that torch gives optimizers and modules: before optimizer.step() the gradients are
there, behind it the moved weights. So a training loop needs two lines, one that makes the Watch and one that logs what
it saw, and steps that are not logged cost nothing.

What decides a number decides its name: sys_* depends on clock and machine and differs from run to run; all others are
functions of the training, and a resumed run logs the same.

    update-to-weight ratio of a group = norm(weights after the step - before) / norm(weights before)
"""

import contextlib
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

SAMPLE = 4096  # entries of each tensor in the update-to-weight ratio: a second copy of all weights may not fit
# Healthy ranges. They are wide: an alarm that is raised for nothing teaches readers to overlook the true one.
LEAST_GRADIENT = 1e-5    # of the whole norm, in each group
LARGEST_UPDATE = 0.2     # of a group's weights, in one step
LEAST_LOAD = 0.01        # of an expert's even share
LARGEST_ACTIVATION = 1e6
LARGEST_IN_FP16 = 2e4    # which ends at 65504
LARGEST_MEMORY = 0.95    # of the machine's or the card's


def group_of(name):
    """The layer group of a parameter: "embed", "attn", "mlp" (experts and router too) or "head". A norm belongs to what
    it stands in front of, so the squares of the four norms add up to that of the whole gradient."""
    if "embed_tokens" in name:
        return "embed"  # where the head is tied, it is the same tensor
    if "self_attn" in name or "input_layernorm" in name:
        return "attn"
    return "mlp" if ".mlp." in name or "post_attention_layernorm" in name else "head"


def local(tensor):
    """This rank's part of a tensor that FSDP has spread, any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sampled(p):
    """At most about SAMPLE entries of a parameter, evenly spread, as a view. The odd stride takes them from all
    columns."""
    flat = local(p.detach()).reshape(-1)
    return flat[::max(1, len(flat) // SAMPLE) | 1]


def at_rest(optimizer, p):
    """sampled(p) as it is between two steps. Before a step of Schedule-Free p is its gradient point y, and x, to which
    the step leads back, follows from y = (1-b1) z + b1 x (optim.ScheduleFree)."""
    z = optimizer.state.get(p, {}).get("z")  # no other optimizer has it, nor has a first step: there x = y = z
    return sampled(p) if z is None else sampled(p).lerp(sampled(z), 1 - 1 / optimizer.param_groups[0]["betas"][0])


class Watch:
    """Looks at the steps that will be logged, and says what it saw.

    Args:
        model, optimizer: as trained; of PPO the policy's.
        progress: the run's own dict with step and max_steps: tells which step is being done.
        args: namespace with log_interval and health; with health 1 the residual stream behind each block is looked at.
        runtime: common.Runtime.
        log: logs.MetricLog; gets machine.json and expert_load.json, and knows which alarms this run has raised.
    """

    def __init__(self, model, optimizer, progress, args, runtime, log):
        self.progress, self.args, self.runtime, self.log = progress, args, runtime, log
        self.groups = {}  # group -> its trained parameters
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.groups.setdefault(group_of(name), []).append(p)
        self.shares, self.updates, self.stream, self.before = {}, {}, {}, None
        optimizer.register_step_pre_hook(self._gradients)
        optimizer.register_step_post_hook(self._updates)
        mixtures = [m for m in model.modules() if type(m).__name__ == "MoE"]
        self.visits = [None] * len(mixtures)  # of each layer: tokens of every expert, [E]
        uncompiled = torch.compiler.disable  # what is due differs from step to step: each would be compiled anew
        for i, mixture in enumerate(mixtures):
            mixture.register_forward_hook(uncompiled(
                lambda module, inputs, output, i=i: self._count(i, module, *inputs)))
        blocks = [m for m in model.modules() if type(m).__name__ == "Block"] if args.health else []
        for i, block in enumerate(blocks):
            block.register_forward_hook(uncompiled(lambda module, inputs, output, i=i: self._activations(i, output)))
        self.clock = time.perf_counter(), time.process_time()
        log.save_json("machine.json", machine(runtime.device))

    def _due(self):
        """Whether the step that is being done will be logged."""
        step = self.progress["step"] + 1
        return step == 1 or step % self.args.log_interval == 0 or step >= self.progress["max_steps"]

    def _sum(self, values):
        """Sums over the ranks where each holds a part of every tensor (FSDP); elsewhere all hold the same."""
        values = values.tolist()
        return self.runtime.sum(*values, 0.0)[:-1] if self.runtime.lockstep else values

    @torch.no_grad()
    def _gradients(self, optimizer, *_):
        """Before a step: share of each group in the gradient, and a sample of the weights."""
        if not self._due() or self.shares:  # of several steps between two lines (PPO) the first
            return
        norms = [torch.nn.utils.get_total_norm([local(p.grad) for p in ps if p.grad is not None] or [torch.zeros(1)])
                 for ps in self.groups.values()]
        squares = self._sum(torch.stack([norm.double() for norm in norms]) ** 2)
        whole = math.sqrt(sum(squares)) or 1.0
        self.shares = {group: math.sqrt(square) / whole for group, square in zip(self.groups, squares, strict=True)}
        self.before = [torch.cat([at_rest(optimizer, p) for p in ps]) for ps in self.groups.values()]  # cat copies

    @torch.no_grad()
    def _updates(self, optimizer, *_):
        """Behind a step: how far it moved the sample."""
        if self.before is None:
            return
        pairs = [(old.double(), torch.cat([sampled(p) for p in ps]).double())
                 for old, ps in zip(self.before, self.groups.values(), strict=True)]
        self.before = None
        moved, size = (self._sum(torch.stack(x)) for x in (
            [((new - old) ** 2).sum() for old, new in pairs], [(old ** 2).sum() for old, _ in pairs]))
        self.updates = {group: math.sqrt(m / s) if s else 0.0
                        for group, m, s in zip(self.groups, moved, size, strict=True)}

    def _count(self, layer, mixture, x, token_mask=None):
        """Behind a mixture of experts: count the visits of real tokens in the training forward (not of rollouts and
        evaluations). Without a mask nobody knows which tokens are padding, all of which goes to the same experts."""
        if token_mask is None or not torch.is_grad_enabled() or not self._due():
            return
        with torch.no_grad():
            chosen = mixture.gate(x.reshape(-1, x.shape[-1]))[2][token_mask.flatten()]          # [real tokens, k]
            counts = torch.bincount(chosen.flatten(), minlength=len(mixture.experts))           # [E]
        self.visits[layer] = counts if self.visits[layer] is None else self.visits[layer] + counts

    @torch.no_grad()
    def _activations(self, layer, output):
        """Behind a block: root mean square and largest entry of the residual stream; of the last micro-batch."""
        if self._due():
            x = output[0].detach().float()  # [B,T,D]
            self.stream[layer] = torch.stack([x.square().mean().sqrt(), x.abs().max()])

    def numbers(self, grad_norm):
        """What was seen since the last call, for the log, with an "alarm" where something is unhealthy for the first
        time; all ranks call it. grad_norm: norm of the whole gradient before clipping, which the groups share."""
        row = {f"grad_{group}": share * grad_norm for group, share in self.shares.items()}
        row |= {f"update_{group}": ratio for group, ratio in self.updates.items()}
        stream, self.shares, self.updates, self.stream = self.stream, {}, {}, {}
        visits = [counts for counts in self.visits if counts is not None]  # of the layers that ran: --depth_warmup
        self.visits = [None] * len(self.visits)
        if visits:
            counts = self.runtime.reduce(torch.stack(visits).double())              # [L,E]
            load = counts / counts.mean(1, keepdim=True).clamp(min=1)
            row |= {"expert_max": load.max().item(), "expert_min": load.min().item()}
            table = [[round(x, 4) for x in line] for line in load.tolist()]
            with contextlib.suppress(OSError):  # a full disk is no reason to lose a training
                self.log.save_json("expert_load.json", {"step": self.progress["step"], "load": table})
        if stream:
            columns = torch.stack([stream[layer] for layer in sorted(stream)]).t().tolist()  # [L,2] -> 2 lists
            # null where it is not finite: JSON knows no infinity
            row["act_rms"], row["act_max"] = ([float(f"{x:.4g}") if math.isfinite(x) else None for x in column]
                                              for column in columns)
        return self._raise(row, unhealthy(row, grad_norm, self.runtime.dtype), "alarm") | self._machine()

    def _machine(self):
        """The sys_* numbers of this process; on rank 0, which logs."""
        if not self.runtime.is_main:
            return {}
        before, self.clock = self.clock, (time.perf_counter(), time.process_time())
        wall, cpu = (now - then for now, then in zip(self.clock, before, strict=True))
        row = {"sys_cpu": round(cpu / max(wall, 1e-9), 2)}
        used, there = memory_used(), memory_there()
        if used:
            row["sys_rss_mb"] = round(used / 1e6)
        crowded = [f"sys_rss_mb {used / 1e6:.0f} of {there / 1e6:.0f} MB of main memory; the system will swap, or end "
                   "the run; likely: other programs, or a --batch_size or --max_seq_len too large"
                   ] if used and there and used > LARGEST_MEMORY * there else []
        if self.runtime.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.runtime.device)
            whole = torch.cuda.get_device_properties(self.runtime.device).total_memory
            row["sys_cuda_mb"] = round(peak / 1e6)
            with contextlib.suppress(Exception):  # needs NVIDIA's own package, and a card that tells
                row["sys_gpu"] = torch.cuda.utilization(self.runtime.device)
            crowded += [f"sys_cuda_mb {peak / 1e6:.0f} of {whole / 1e6:.0f} MB of the card; a longer row may not fit; "
                        "halve --batch_size and double --accumulation_steps"] if peak > LARGEST_MEMORY * whole else []
        return self._raise(row, crowded, "sys_alarm")

    def _raise(self, row, alarms, key):
        """The row with the first alarm that this run, or the one it resumes, has not raised yet. An alarm is known by
        its first word, the number that it is about."""
        said = {text.split(" ")[0] for text in self.log.alarms}
        fresh = [text for text in alarms if text.split(" ")[0] not in said]
        return row | {key: fresh[0]} if fresh else row


def unhealthy(row, grad_norm, dtype):
    """What is outside its healthy range in a row of numbers(), one line each, beginning with the number's name."""
    said = []
    for key, value in row.items():
        if key.startswith("grad_") and grad_norm and value < LEAST_GRADIENT * grad_norm:
            said.append(f"{key} {value:.1e} of {grad_norm:.1e}: these layers get no gradient and stay as they are; "
                        "likely: they are cut off from the loss, or their activations are dead or saturated")
        if key.startswith("update_") and value > LARGEST_UPDATE:
            said.append(f"{key} {value:.2g}: a single step rewrites so much of these weights; likely: rate too high; "
                        "lower --learning_rate or --muon_learning_rate, or a longer --warmup_steps")
    if row.get("expert_min", 1) < LEAST_LOAD:
        said.append(f"expert_min {row['expert_min']:.2g}: an expert is hardly visited, its weights learn nothing; "
                    "likely: balance too weak; raise --router_aux_loss_coef or --router_bias_rate")
    limit = LARGEST_IN_FP16 if dtype == torch.float16 else LARGEST_ACTIVATION
    if any(x is None or x > limit for x in row.get("act_max", ())):
        said.append(f"act_max {row['act_max']} behind the blocks; above {limit:g} they near the end of the dtype; "
                    "likely: rate too high, or weights that grow (--weight_decay); in fp16: --dtype bf16 or fp32")
    return said


# -- The machine -------------------------------------------------------------------------------------------------------
def memory_used():
    """Bytes of main memory that this process holds now (its peak where the system tells no more); None where it is
    silent."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def memory_there():
    """Bytes of main memory that this process may use in all (the container's limit counts); None where the system is
    silent."""
    limits = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def machine(device):
    """What a run runs on, for machine.json: versions, processor, memory, GPU, commit of this code."""
    here = Path(__file__).parent
    facts = {"python": platform.python_version(), "torch": torch.__version__,
             "numpy": importlib.metadata.version("numpy"), "system": platform.platform(terse=True),
             "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
             "memory_gb": round((memory_there() or 0) / 1e9, 1)}
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        facts["cpu"] = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    if device.type == "cuda":
        facts["gpu"] = f"{torch.cuda.get_device_name(device)}, {torch.cuda.device_count()} of them"
    if (here / ".git").exists():  # else git would answer for a folder that this one happens to lie in
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            facts["commit"] = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], check=True,
                                             capture_output=True, text=True, timeout=10).stdout.strip()
    return facts
