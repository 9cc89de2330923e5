"""What every training script needs of its surroundings: processes, device and dtype, steps and rates, signals, clear
errors. As a program it looks at the machine and says what to fix:

    python common.py --check

Here is only what is identical in every stage and has one right answer. It knows no model: whatever it measures or
compares comes in as an argument. What this file does not do: flags (cli.py), folders on the disk (checkpoint.py).

Sources: launch variables as torchrun sets them; WSD schedule from Hu et al. 2024 (arXiv:2404.06395).
"""

import argparse
import contextlib
import ctypes
import datetime
import importlib.metadata
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
except ImportError as missing:  # where --check is needed most
    sys.exit(f"error: {missing}; training needs the packages of requirements.txt; install them: bash run.sh setup")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
# Largest relative error of a tiny step in each dtype: several times that of a sound machine. On CUDA fp32 may be TF32
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 4e-2}


# ----------------------------------------------------------------------------------------------------------------------
# Processes, device, dtype
@dataclass
class Runtime:
    """One process's view of the run: device, autocast dtype, rank, and the few collective calls the loops need."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    threads: int = 1
    lockstep: bool = False    # the weights are spread over the ranks (FSDP): every forward takes all of them
    scaler: torch.amp.GradScaler = field(default=None, repr=False)
    started: float = field(default_factory=time.time)   # less the seconds of the run that is being resumed

    @property
    def is_main(self):
        """True in the one process that prints and writes."""
        return self.rank == 0

    def print(self, *parts):
        """Print on rank 0 only, at once (the output of run.sh is piped into a log)."""
        if self.is_main:
            print(*parts, flush=True)

    def autocast(self):
        """Autocast to the run's dtype; a no-op for float32 and float64."""
        # its cache would keep a cast copy of every block until the end of the forward, which FSDP is to spare
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16),
                              cache_enabled=not self.lockstep)

    def barrier(self):
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, *values):
        """Sum numbers over all ranks, in float64. Returns one float, or a list for several."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.world_size > 1:
            # NCCL only moves CUDA tensors; gloo moves CPU tensors
            total = total.to(self.device) if dist.get_backend() == "nccl" else total
            dist.all_reduce(total)
        return total.tolist() if len(values) > 1 else total.item()

    def reduce(self, tensor):
        """Sum a tensor over all ranks in place and return it (router counts, gradients of recorded rollouts)."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """True on every rank when it is true on one: decisions to stop or skip must be common, or the others wait for
        ever."""
        return self.sum(bool(flag)) > 0

    def gather(self, value):
        """Every rank's `value` (any picklable object), as a list in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def shard(self, items):
        """This rank's share of a list: every world_size-th item. In lockstep every rank takes them all, for one that
        had fewer would leave the others waiting in a forward."""
        return items if self.lockstep else items[self.rank::self.world_size]

    def unshard(self, share):
        """Inverse of shard: every rank's share, put together again in the order of the whole list, on every rank."""
        shares = [list(share)] if self.lockstep else self.gather(list(share))
        return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]

    def close(self):
        """Leave the process group; the last call of a run that went well."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name):
    """Choose the device. Returns (torch.device, reason). Raises ValueError with the choices for an unknown or absent
    one."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"{torch.cuda.get_device_name(0)} found"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU found"
        return torch.device("cpu"), "no GPU found"
    choices = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + [f"cuda:{i}"
                                                                       for i in range(torch.cuda.device_count())]
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used ({str(error).splitlines()[0][:100]}); here there are: "
                         f"{', '.join(choices)}; leave the flag out to take the best one") from None
    return device, "asked for"


def bf16_speedup(size=384):
    """How many times faster a bf16 matrix product is than an fp32 one on one core of this CPU; 0.0 where it crashes."""
    def seconds(dtype):
        a = torch.randn(size, size).to(dtype)                       # [size, size]
        times = []
        for _ in range(16):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times)

    if not hasattr(os, "fork") or sys.platform == "darwin":
        return seconds(torch.float32) / seconds(torch.bfloat16)
    # Some virtual machines announce AMX units that the hypervisor does not let a program use: the first bf16 product
    # then kills the process. So a forked child tries it, at first as the CPU says, then with AMX ruled out (oneDNN
    # reads the variable at its first product, which in this process has not happened yet).
    for instruction_set in (None, "AVX512_CORE_BF16"):
        if instruction_set:
            os.environ["ONEDNN_MAX_CPU_ISA"] = instruction_set
        ratio = _in_child(lambda: seconds(torch.float32) / seconds(torch.bfloat16))
        if ratio is not None:
            return ratio
    return 0.0


def _in_child(function, patience=10.0):
    """Result (a float) of function() in a forked child with one thread; None when the child dies or hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)  # the parent's thread pool does not survive a fork; a parallel region would hang
            os.write(writer, str(function()).encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + patience
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.005)
    answer = os.read(reader, 64)
    os.close(reader)
    return float(answer) if answer else None


def pick_dtype(name, device):
    """Choose the autocast dtype. Returns (torch.dtype, reason). On CUDA by compute capability, on a CPU by a few
    milliseconds of timing."""
    name = SHORT_DTYPES.get(name, name)
    if device.type == "cuda":
        # is_bf16_supported() answers True on cards that only emulate it
        major = torch.cuda.get_device_capability(device)[0]
        if name in ("auto", "bfloat16") and major >= 8:
            return torch.bfloat16, f"compute capability {major}"
        if name in ("auto", "bfloat16"):
            return torch.float16, f"no bf16 units in compute capability {major}"
    elif name in ("auto", "bfloat16") and device.type == "cpu":
        ratio = bf16_speedup()
        if name == "bfloat16" and not ratio:
            raise ValueError("--dtype bfloat16 cannot be used: bf16 products crash on this CPU; leave the flag out")
        if name == "auto":
            why = f"a bf16 product is {ratio:.1f}x as fast as an fp32 one" if ratio else "bf16 products crash here"
            return (torch.bfloat16 if ratio > 1.2 else torch.float32), why
    elif name == "auto":
        return torch.float32, f"safe choice on {device.type}"
    return DTYPES[name], "asked for"


def tiny_step(device, dtype):
    """Forward and backward of one attention block with residual, head and loss, always from the same numbers.

    Pure torch: what is looked at is the machine, not a model. Global random states stay as they are.

    Args:
        device: torch.device; dtype: autocast dtype, as a run uses it (float64 without autocast).
    Returns: the gradients of input, projections and head, and the loss: float32 tensors on the CPU.
    """
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (torch.randn(shape, generator=draw) * shape[-2] ** -0.5).to(device, wide).requires_grad_()

    x, w_qkv, w_out, head = leaf(2, 64, 64), leaf(64, 192), leaf(64, 64), leaf(64, 128)     # [B, T, D], [in, out]
    targets = torch.randint(128, (2 * 64,), generator=draw).to(device)                      # [B * T]
    with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        q, k, v = (x @ w_qkv).view(2, 64, 3, 4, 16).permute(2, 0, 3, 1, 4)                  # [B, H, T, D / H] each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = (x + mixed.transpose(1, 2).flatten(2) @ w_out) @ head                      # [B, T, V]
    loss = F.cross_entropy(logits.flatten(0, 1).to(x.dtype), targets)
    loss.backward()
    return [t.detach().float().cpu() for t in (x.grad, w_qkv.grad, w_out.grad, head.grad, loss)]


def deviation(device, dtype):
    """How far a tiny step is off the same step on the CPU in fp32: the largest relative error (L2 norm) of its tensors,
    inf where it fails or is not finite."""
    try:
        pairs = list(zip(tiny_step(device, dtype), tiny_step(torch.device("cpu"), torch.float32), strict=True))
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with the device, somebody else fills it
    except (RuntimeError, TypeError):
        return math.inf  # a card for which this torch has no kernels; float64 on an Apple GPU
    errors = [((found - right).norm() / right.norm()).item() for found, right in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def fall_back(runtime):
    """Keep device and dtype of the Runtime if a tiny step on them agrees with the CPU in fp32; else change them, with a
    message: to fp32 on that device, else to the CPU. All ranks decide alike. Raises ValueError where several processes
    would have to leave their GPUs."""
    cpu = torch.device("cpu")
    for device, dtype in ((runtime.device, runtime.dtype), (runtime.device, torch.float32), (cpu, torch.float32)):
        if (device, dtype) == (cpu, torch.float32):
            break  # the yardstick itself
        error = max(runtime.gather(deviation(device, dtype)))
        if error <= TOLERANCES[dtype]:
            break
        what = (f"is off the CPU's by {error:.1e} (at most {TOLERANCES[dtype]:g} is rounding)" if error < math.inf else
                "fails or is not finite")
        runtime.print(f"{device} with {str(dtype)[6:]}: a tiny training step {what}, its numbers cannot be trusted: "
                      "not used")
    if runtime.world_size > 1 and device.type != runtime.device.type:
        raise ValueError(f"{runtime.device} computes wrong numbers (see above); {runtime.world_size} processes were "
                         f"started for GPUs and cannot move; give --device cpu, or repair driver and torch")
    runtime.device, runtime.dtype = device, dtype


def _join(backend):
    """Join the process group that torchrun announces."""
    timeout = datetime.timedelta(minutes=30)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    # With a fixed --master_port all restarts of a launch share one store: under its own name each start finds the
    # addresses of its own processes there, not those of the dead
    store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def setup(args, earlier=None):
    """Join the process group torchrun announces, choose device, dtype and threads, seed everything, say what was
    chosen. Where device and dtype compute wrong numbers, safer ones are taken (fall_back()).

    Args:
        args: namespace with device, dtype, threads, seed.
        earlier: what the run that goes on had chosen (checkpoint.earlier_choice()), or None.
    Returns: Runtime.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device, why_device = pick_device(args.device)
    if world > 1:
        if device.type == "mps":
            raise ValueError(f"{world} processes on mps; Apple GPUs serve one process; start without torchrun, or give "
                             f"--device cpu")
        if device.type == "cuda":
            if local_world > torch.cuda.device_count():
                raise ValueError(f"{local_world} processes on {torch.cuda.device_count()} GPU(s); each needs its own; "
                                 f"give --nproc_per_node {torch.cuda.device_count()}, or --device cpu")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        _join("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and torch.cuda.device_count() > 1 and world == 1 and args.device == "auto":
        print(f"{torch.cuda.device_count()} GPUs are visible, using 1. For all: torchrun --nproc_per_node "
              f"{torch.cuda.device_count()} " + " ".join(sys.argv), flush=True)
    # what a probe decided once holds for the whole run: a resumed run must not change its numbers because the machine
    # is busy today
    earlier = earlier or {}
    cores = count_cores()
    # torchrun leaves the thread count to an environment variable; too many threads cost 5 to 8 times, so it is set here
    threads = args.threads or earlier.get("threads") or max(1, cores // local_world)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    if args.dtype == "auto" and earlier.get("dtype"):
        # through pick_dtype: bf16 may need its AMX check in this process as well
        dtype, why_dtype = pick_dtype(earlier["dtype"], device)[0], "as before the resume"
    else:
        dtype, why_dtype = pick_dtype(args.dtype, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    seed_everything(args.seed)
    runtime = Runtime(device, dtype, rank, world, local_rank, threads)
    # every rank timed for itself, and timings near the limit differ; all must compute alike
    runtime.dtype = dtype = runtime.gather(dtype)[0]
    fall_back(runtime)
    why_device = why_device if runtime.device == device else f"instead of {device}"
    why_dtype = why_dtype if runtime.dtype == dtype else f"instead of {str(dtype)[6:]}"
    # fp16 has a narrow range: without a scaler small gradients become 0. Elsewhere a disabled scaler is a plain
    # pass-through.
    runtime.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    runtime.print(f"device {runtime.device} ({why_device}), dtype {str(runtime.dtype)[6:]} ({why_dtype}), "
                  f"{world} process(es) x {threads} thread(s)")
    if not (getattr(args, "val_path", True) or args.val_ratio):
        runtime.print("--val_ratio 0 without --val_path: nothing is held out; held-out numbers are of training data")
    return runtime


def count_cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory():
    """Let glibc keep large blocks it has got instead of returning them: every step asks for the same ones again, and
    fresh pages cost about 8% of a CPU step (docs/benchmarks.md). Elsewhere than on Linux with glibc: nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)      # M_MMAP_THRESHOLD: its maximum, blocks below come from the heap
        libc.mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD: never shrink the heap


def seed_everything(seed):
    """Seed Python, numpy and torch. The same on every rank: whatever must differ by sample is keyed by the sample's
    index."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------------------
# Steps and learning rate
def lr_scale(step, max_steps, warmup_steps, schedule="linear", floor=0.0):
    """Factor on the peak learning rate at optimizer step `step` (0-based): linear warm-up, then the named shape down
    to `floor`.

    warmup_steps below 1 is a share of max_steps. "wsd" holds 1 until the last 40% of the steps behind it, then falls
    linearly.
    """
    warmup = warmup_steps * max_steps if warmup_steps < 1 else warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)  # never 0: a first step with rate 0 would be wasted
    progress = min(1.0, (step - warmup) / max(1.0, max_steps - warmup))
    if schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        fall = 1 - progress
    elif schedule == "wsd":
        fall = min(1.0, (1 - progress) / 0.4)
    elif schedule == "constant":
        fall = 1.0
    else:
        raise ValueError(f"schedule {schedule!r} is unknown; it is one of linear, cosine, wsd, constant; choose one of "
                         f"them")
    return floor + (1 - floor) * fall


def count_steps(args, samples, per_step, progress=None):
    """Optimizer steps of a run: --max_steps, or --epochs over `samples`, of which each step draws `per_step` (the last,
    partly filled step counts). progress: of a resumed run, whose earlier steps may have drawn another number."""
    done = progress or {"step": 0, "position": 0}
    left = max(0, math.ceil(args.epochs * samples) - done["position"])
    return args.max_steps or max(1, done["step"] + math.ceil(left / per_step))


class Budget:
    """--max_minutes: after a few steps the number of steps is set from the measured speed, so that the schedule still
    ends at zero."""

    def __init__(self, minutes, probe_steps=8, slower=1.0):
        """slower: how many times as long as one of the first steps a step will take, in the mean of the run."""
        self.minutes = minutes
        self.probe_steps = probe_steps
        self.slower = slower
        self.times = []
        self.start = time.perf_counter()

    def steps(self, done, max_steps, runtime):
        """Call once after every step with the number of steps done; returns the (perhaps changed) total, the same on
        all ranks."""
        if not self.times and done > self.probe_steps + 1:
            self.minutes = 0  # a resumed run: what was measured before the stop holds, or it would be another run
        if not self.minutes or len(self.times) > self.probe_steps:
            return max_steps
        self.times.append(time.perf_counter())
        if len(self.times) <= self.probe_steps:
            return max_steps
        # the first steps warm caches up, so only the later half is timed; 4% is kept for evaluations and the last save
        half = self.probe_steps // 2
        per_step = (self.times[-1] - self.times[half]) / (self.probe_steps - half)
        left = 0.96 * 60 * self.minutes - (self.times[-1] - self.start)
        total = int(runtime.sum(done + max(1, int(left / (per_step * self.slower)))) / runtime.world_size)
        if max_steps and max_steps < total:
            runtime.print(f"--max_minutes {self.minutes:g} would do for {total} steps; --max_steps or --epochs end the "
                          f"run after {max_steps}")
        return min(max_steps, total) if max_steps else total


def out_of_patience(progress, args):
    """Whether the last --patience evaluations brought nothing better than what was before them."""
    values = progress.get("watched", [])
    if not args.patience or len(values) <= args.patience:
        return False
    falls = args.patience_metric in ("val_loss", "val_kl", "bits_per_byte")  # the smaller, the better
    before, recent = values[:-args.patience], values[-args.patience:]
    return min(recent) >= min(before) if falls else max(recent) <= max(before)


def check_patience(args, numbers):
    """ValueError for a --patience_metric that an evaluation (its dict of numbers) does not measure; also to be asked of
    the one before the first step, so that no step is lost."""
    # that one has an interval of its own
    if args.patience and numbers.get(args.patience_metric) is None and args.patience_metric != "regression_pass_rate":
        known = ", ".join(name for name, number in numbers.items() if isinstance(number, float))
        raise ValueError(f"--patience_metric {args.patience_metric}; this evaluation did not measure it, so --patience "
                         f"would wait for ever; measured were {known}")


def watch_evaluation(runtime, args, progress, numbers):
    """--patience: note an evaluation (its dict of numbers, the same on all ranks). When patience is over, the next step
    is made the last one, at the end of the schedule and with the whole evaluation. What was noted is in `progress`, so
    a resumed run ends where it would have ended."""
    check_patience(args, numbers)
    value = numbers.get(args.patience_metric)
    if args.patience and value is not None:
        progress.setdefault("watched", []).append(value)
        if out_of_patience(progress, args) and progress["step"] + 1 < progress["max_steps"]:
            progress["max_steps"] = progress["step"] + 1
            runtime.print(f"patience is over: {args.patience_metric} has not become better in {args.patience} "
                          "evaluations; one more step ends the run")


class Eta:
    """After 20 steps of a start: one line with the time that is left, measured on the last ten of them."""

    def __init__(self, runtime, smaller=None):
        """smaller: function () -> (preset, its share of this model's operations) or None, asked when it takes long."""
        self.runtime = runtime
        self.smaller = smaller
        self.times = []

    def report(self, step, max_steps):
        """Call once after every step; prints at the 20th. Above two hours a smaller preset is named with its time."""
        if len(self.times) == 20:
            return
        self.times.append(time.perf_counter())
        if len(self.times) < 20 or step >= max_steps:
            return
        left = (self.times[19] - self.times[9]) / 10 * (max_steps - step)
        other = self.smaller() if self.smaller and left > 2 * 3600 else None
        advice = f"; --preset {other[0]} would take about {_duration(left * other[1])}" if other else ""
        self.runtime.print(f"{max_steps - step} steps are left, about {_duration(left)}{advice}")


def _duration(seconds):
    """Seconds as words: 40 s, 12 min, 3 h 5 min."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


def memory_line(runtime, modules, rows, length, forward, zero=False):
    """What a step will take of the memory, in one line to be printed before the first, with what is free.

    Activations are measured on one row and on two, without dropout, and extended to `rows`. The optimizer is counted
    with two values a parameter (Muon keeps one). Temporary results come on top (docs/training.md has a measurement).

    Args:
        modules: all modules in memory, trained ones and frozen ones.
        rows, length: shape of the largest micro-batch.
        forward: function (ids int64 [n, length]) -> what the loss is made of, with the autograd graph behind it.
        zero: the optimizer's state is shared among the ranks. In lockstep everything is, and activations are not
            measured: among what a forward keeps are then weights that FSDP frees.
    """
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    mine = [(p.requires_grad, p.to_local() if runtime.lockstep else p) for p in parameters]
    held, trained = (sum(p.numel() * p.element_size() for train, p in mine if train or not only)
                     for only in (False, True))
    parts = {"parameters": held, "gradients": trained,
             "optimizer": 2 * trained / (runtime.world_size if zero else 1)}
    if not runtime.lockstep:
        modes = [module.training for module in modules]
        for module in modules:
            module.eval()  # no dropout, so that random states stay as they are, and no router counts
        one, two = (_saved_bytes(runtime, parameters, forward, torch.zeros(n, length, dtype=torch.int64))
                    for n in (1, min(2, rows)))
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
        parts["activations"] = one + (rows - 1) * (two - one)
    cuda = runtime.device.type == "cuda"
    free = torch.cuda.mem_get_info(runtime.device)[0] if cuda else free_memory()
    # the parameters are there already
    short = free is not None and sum(parts.values()) - held > free
    shown = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
    apart = "activations and temporary results" if runtime.lockstep else "temporary results"
    return (f"memory of a step, {apart} apart: {shown} = {sum(parts.values()) / 1e6:.0f} MB"
            + (f"; {free / 1e6:.0f} MB are free" if free is not None else "")
            + ("; too little: halve --batch_size and double --accumulation_steps" if short else ""))


def _saved_bytes(runtime, parameters, forward, ids):
    """Bytes that forward(ids) keeps for its backward pass, each storage once, without the parameters themselves."""
    known, sizes = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), runtime.autocast():
        graph = forward(ids.to(runtime.device))  # held until here is done: a freed address could be used twice
    del graph
    return sum(size for address, size in sizes.items() if address not in known)


def check_vocabulary(config, tokenizer, source):
    """ValueError when the tokenizer has ids for which the model from `source` has no row."""
    if config.vocab_size <= tokenizer.max_id:
        raise ValueError(f"token id {tokenizer.max_id} >= vocabulary {config.vocab_size} of {source}; tokenizer and "
                         "model do not match; use the tokenizer saved with the model")


def check_ratio(name, deviation, step, runtime):
    """Two forwards of the same policy must agree: ratios of their probabilities are 1, off by at most 1e-5 in fp32 and
    fp64, or the run ends. Other dtypes round: a warning above 0.05, in the first step. deviation: the largest |q - 1|.
    """
    tf32 = runtime.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    if runtime.dtype in (torch.float32, torch.float64) and not tf32:
        # nan passes: what is not finite is told apart elsewhere, and skipped
        assert not deviation > 1e-5, f"{name} is off 1 by {deviation:.1e}: the two forwards are not of one policy"
    elif deviation > 0.05 and step == 0:
        runtime.print(f"warning: {name} is off 1 by {deviation:.3f}; rounding of {str(runtime.dtype)[6:]} explains "
                      "about 0.05. --dtype float32 shows whether it is only that")


class NonFinite:
    """Counts steps whose loss or gradient is not finite; such a step is skipped, and three in a row end the run.

    Among them nothing is saved: the weights of the last step before may be what is wrong, and the checkpoint from which
    the message tells to go on is then an older one."""

    def __init__(self, runtime, limit=3):
        self.runtime = runtime
        self.limit = limit
        self.total = self.in_a_row = 0

    def skip(self, step, loss, grad_norm, learning_rate):
        """True when step `step` (0-based; messages count from 1, as metrics.jsonl does) must not be applied. `loss` and
        `grad_norm` must be equal on all ranks. Raises ValueError after `limit` in a row."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return False
        scaler = self.runtime.scaler
        if math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() > 1:
            return False  # fp16: an overflow is how the scaler finds its scale; it skips the step itself
        self.total += 1
        self.in_a_row += 1
        half = self.runtime.dtype == torch.float16
        cause = "fp16 overflow: try --dtype bf16 or fp32" if half else "usual cause: the learning rate is too high"
        self.runtime.print(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, rate {learning_rate:.2e}, dtype "
                           f"{self.runtime.dtype}: step skipped ({self.in_a_row} in a row; {cause})")
        if self.in_a_row >= self.limit:
            raise ValueError(f"loss or gradient was not finite in {self.limit} steps in a row, last at step "
                             f"{step + 1}; training cannot go on, the last checkpoint is untouched; go on from it with "
                             f"--from_resume 1 and a lower --learning_rate ({cause})")
        return True


# ----------------------------------------------------------------------------------------------------------------------
# Signals and errors
class Interrupted(Exception):
    """Raised by a script after it has saved because of a signal; carries the signal's number."""


def resume_command():
    """The shell command that goes on with this run."""
    flags = []
    dropped = False
    for word in sys.argv[1:]:
        # the value of a dropped switch goes with it: "--overwrite 1" is two words
        dropped = word.startswith(("--overwrite", "--from_resume", "--from-resume")) or dropped and word in ("0", "1")
        flags += [] if dropped else [word]
    world = int(os.environ.get("WORLD_SIZE", 1))
    launch = "python" if world == 1 else f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', world)}"
    return f"{launch} {shlex.join([sys.argv[0], *flags])} --from_resume 1"


def in_folder(args):
    """The flag that the next command needs to look where this run was written; nothing for the usual folder."""
    return "" if args.save_dir == "out" else f" --save_dir {shlex.quote(str(args.save_dir))}"


def leave(runtime, number, step, saved):
    """Say how to go on after signal `number` and raise Interrupted. `saved`: whether the save at this step worked."""
    if saved:
        runtime.print(f"saved at step {step}. Go on with: {resume_command()}")
    else:
        runtime.print(f"stopped at step {step}; the last good checkpoint is older. Make room, then: {resume_command()}")
    raise Interrupted(number)


class StopSignal:
    """Catches Ctrl-C, SIGTERM and SIGHUP: the first asks the loop to finish its step and save, a second Ctrl-C leaves
    at once."""

    def __init__(self):
        self.requested = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            # nohup has told this process to ignore SIGHUP: the user wants it to outlive the terminal
            ignored = name == "SIGHUP" and hasattr(signal, name) and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            if hasattr(signal, name) and not ignored:
                with contextlib.suppress(ValueError):  # not in the main thread (tests)
                    signal.signal(getattr(signal, name), self._catch)

    def _catch(self, number, frame):
        if self.requested and number == signal.SIGINT:
            os._exit(128 + number)  # saves are atomic, so leaving in the middle of one harms nothing
        self.requested = number
        text = b"stopping after this step (Ctrl-C again: at once, without saving)\n"
        # not print(): the signal may have come in the middle of one, and a second one inside it raises. A terminal
        # that was closed (SIGHUP) refuses every later line as well, and the save must not fail because of that
        for descriptor in (2, 1):
            try:
                os.write(descriptor, text if descriptor == 1 else b"\n")
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    def stop(self, runtime):
        """Number of the signal, the same on all ranks (launchers do not deliver it to all at the same step), or 0."""
        return max(runtime.gather(self.requested)) if runtime.world_size > 1 else self.requested


def run(main, parse_args):
    """The last line of every script: main(parse_args()), with what a user can cause turned into one message and an
    exit code.

    Exit codes: 0 done, 2 wrong input, 3 out of memory, 128 + signal after an orderly stop, or (13) when whoever read
    the output has left.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character must not end a run
        stream.reconfigure(errors="replace")
    args = parse_args()
    try:
        main(args)
        sys.stdout.flush()
        code = 0
    except BrokenPipeError:
        # head or less: no error to speak of, but Python would complain while closing the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    except Interrupted as stop:
        code = 128 + stop.args[0]
    except KeyboardInterrupt:
        code = 130
    except (torch.OutOfMemoryError, MemoryError):
        code = _fail(args, _smaller(args), 3)
    except RuntimeError as error:
        # the CPU and Apple allocators have no class of their own
        compiling = type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
        if compiling and getattr(args, "use_compile", 0):
            cause = str(error).strip().splitlines()[0]
            code = _fail(args, f"--use_compile 1: torch.compile failed ({cause}); on CPUs it needs a C++ compiler; "
                         "install g++ or clang, or leave the flag out", 2)
        elif not re.search("can't allocate memory|not enough memory|out of memory", str(error)):
            raise
        else:
            code = _fail(args, _smaller(args), 3)
    except (ValueError, OSError) as error:
        code = _fail(args, error, 2)
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    if code:
        # no clean-up: the other ranks may already be gone, and waiting for them would hang
        sys.stderr.flush()
        os._exit(code)


def _smaller(args):
    """The out-of-memory message: the flags to change, with values."""
    batch, length = getattr(args, "batch_size", 2), getattr(args, "max_seq_len", 512)
    parts = next((n for n in range(2, batch + 1) if batch % n == 0), 1)  # as many micro-steps in place of one
    # of replay every micro-step takes as many rows, however many others it has
    same = "" if getattr(args, "replay_path", []) else " (the result stays the same)"
    advice = [f"--batch_size {batch // parts} --accumulation_steps {parts * getattr(args, 'accumulation_steps', 1)}"
              f"{same}"] * (parts > 1)
    advice += ["--gradient_checkpointing 1"] * (getattr(args, "gradient_checkpointing", 1) == 0)
    return f"out of memory; less is needed with {', or '.join([*advice, f'--max_seq_len {max(1, length // 2)}'])}"


def _fail(args, error, code):
    if getattr(args, "debug", 0):
        traceback.print_exc()
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{rank}error: {error}", file=sys.stderr, flush=True)
    return code


# ----------------------------------------------------------------------------------------------------------------------
# python common.py --check
def _packages():
    """(installed "name version" list, missing or too old "name>=version" list) of requirements.txt."""
    text = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8")
    installed, lacking = [], []
    for name, least in re.findall(r"^([\w-]+)>=([\d.]+)", text, re.M):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        as_numbers = [[int(n) for n in re.findall(r"\d+", v.split("+")[0])[:3]] for v in (version, least)]
        if as_numbers[0] >= as_numbers[1]:
            installed.append(f"{name} {version}")
        else:
            lacking.append(f"{name}>={least}")
    return installed, lacking


def free_memory():
    """Bytes of main memory this process can still get (the container's limit counts); None where the system does not
    say."""
    limits = []
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        limits.append(1024 * int(found[1]))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        # files that were read count as used, but give way
        cache = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
        limits.append(limit - used + int(cache[1] if cache else 0))
    if not limits:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # macOS: all there is, which is not all free
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def _check_device():
    """Rows of check_machine() for device and dtype, after the same comparison with the CPU as at a run's start."""
    device, why = pick_device("auto")
    dtype, why_dtype = pick_dtype("auto", device)
    runtime = Runtime(device, dtype)
    fall_back(runtime)
    unseen = device.type == "cpu" and shutil.which("nvidia-smi")
    advice = "there is an NVIDIA driver, but torch sees no GPU; install the torch build for it (pytorch.org)"
    if runtime.device != device:
        advice = f"update driver and torch; until then runs go to {runtime.device}"
    slower = f"update driver and torch; until then runs take {str(runtime.dtype)[6:]}"
    return [("device", f"{device} ({why})", advice if unseen or runtime.device != device else "", False),
            ("dtype", f"{str(dtype)[6:]} ({why_dtype})", slower if runtime.dtype != dtype else "", False)]


def _check_rust():
    """Row of check_machine() for the compiled tokenizer and the compiled step of decoding."""
    found, fixes = [], []
    for name, instead in (("minillm_bpe", "the Python tokenizer serves, with equal tokens but slower"),
                          ("minillm_decode", "torch decodes, with equal answers but slower")):
        try:
            importlib.import_module(name)
            found.append(f"{name} {importlib.metadata.version(name)}")
        except ImportError as error:
            found.append(f"{name}: {error}")
            fixes.append(instead)
    how = "bash run.sh setup" if shutil.which("cargo") else "install cargo (rustup.rs), then: bash run.sh setup"
    return "rust", ", ".join(found), "; ".join([*fixes, how]) if fixes else "", False


def check_machine(folder="."):
    """What a run needs of this machine, which would write into `folder`.

    Returns: list of (what, found, fix or "" where all is well, True where no run is possible without the fix).
    """
    cores, free, space = count_cores(), free_memory(), shutil.disk_usage(folder).free
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    installed, lacking = _packages()
    old, shut = sys.version_info < (3, 10), not os.access(folder, os.W_OK)

    def fix(wanted, text):
        return text if wanted else ""

    return [
        ("python", platform.python_version(), fix(old, "3.10 to 3.13 is needed: PYTHON=python3.12 bash run.sh"), old),
        ("packages", ", ".join(installed), fix(
            lacking, f"missing or too old: {', '.join(lacking)}; run: bash run.sh setup"), bool(lacking)),
        *_check_device(),
        ("cores", f"{cores}, as many threads in a run", fix(
            busy > 0.7 * cores, f"{busy:.1f} of them are busy; stop other programs, or give fewer --threads"), False),
        ("memory", "not known here" if free is None else f"{free / 1e9:.1f} GB free", fix(
            free is not None and free < 3e9, "close other programs, or take --preset nano and a small --batch_size"),
         free is not None and free < 0.5e9),
        ("disk", f"{space / 1e9:.1f} GB free in {Path(folder).resolve()}", fix(
            shut, "this folder cannot be written: give --save_dir") or fix(
            space < 2e9, "make room, or give --save_dir on another disk"), shut or space < 0.2e9),
        _check_rust()]


def parse_args(argv=None):
    """Flags of `python common.py`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=int, choices=(0, 1), nargs="?", const=1, default=0,
                        help="print what this machine offers to a run, each line with OK or the fix")
    return parser.parse_args(argv)


def main(args):
    """Print the check. Returns the exit code: 0 when training is possible, 1 when something makes it impossible."""
    if not args.check:
        print("error: nothing to do; this file is the ground of the training scripts; look at the machine with: "
              "python common.py --check", file=sys.stderr)
        return 2
    rows = check_machine()
    for what, found, advice, fatal in rows:
        print(f"{what:<9} {found}: {'IMPOSSIBLE, ' if fatal else ''}{advice or 'OK'}")
    fatal = [what for what, *_, impossible in rows if impossible]
    print(f"training is impossible; to be fixed first: {', '.join(fatal)}" if fatal else "well enough to train")
    return int(bool(fatal))


if __name__ == "__main__":
    sys.exit(main(parse_args()))
