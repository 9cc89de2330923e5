"""Proves that the number of processes does not change what is computed: two gloo processes equal one with the same
global batch, accumulation equals a larger batch, and nothing hangs.

    python -m pytest tests/test_ddp.py
"""
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file, save_file

import checkpoint
import common
import logs

ROOT = Path(common.__file__).parent
gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo backend")

# name of the case: script, kind of model, flags. A micro-step of two processes with 2 rows each is one of 4 rows alone.
CASES = {
    "pretrain dense": ("train_pretrain", "dense", []),
    "pretrain moe": ("train_pretrain", "moe", []),
    "pretrain shared": ("train_pretrain", "shared", []),
    "pretrain dead": ("train_pretrain", "dead", []),
    "sft dense": ("train_sft", "dense", []),
    "sft moe": ("train_sft", "moe", ["--gradient_checkpointing", "1"]),
    "sft shared": ("train_sft", "shared", ["--optimizer", "adamw"]),
    "pretrain lion": ("train_pretrain", "dense", ["--optimizer", "lion"]),
    "pretrain schedulefree": ("train_pretrain", "moe", ["--optimizer", "schedulefree"]),
    "pretrain sophia": ("train_pretrain", "dense", ["--optimizer", "sophia", "--hessian_interval", "3"]),
    "sft sophia": ("train_sft", "shared", ["--optimizer", "sophia", "--hessian_interval", "2"]),
    "lora dense": ("train_sft", "dense", ["--lora_rank", "2", "--gradient_checkpointing", "1"]),
    "lora moe": ("train_sft", "moe", ["--lora_rank", "2"]),
    "lora shared": ("train_sft", "shared", ["--lora_rank", "2", "--optimizer", "adamw"]),
}
BALANCE = ["--router_aux_loss_coef", "0.1", "--router_bias_rate", "0.01"]  # large enough to show a wrong weighting


def free_port():
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def nothing(folder):
    """In place of drawing curves, which costs a second."""


@pytest.fixture(autouse=True, scope="module")
def no_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "plot_curves", nothing)
        yield


def worker(rank, jobs):
    """One of two processes: runs every job's main(), with the environment that torchrun would give it."""
    logs.plot_curves = nothing
    for module, argv, port in jobs:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        script = importlib.import_module(module)
        script.main(script.parse_args(argv))


def dead_expert(folder, target):
    """A copy of a model with shared experts whose expert 0 is never chosen, on no rank and in no step."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            tensor[0] = -100.0
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def results(tmp_path_factory, model_folder, stage_of):
    """results[case] -> (folder of the run with two processes, folder of the run with one)."""
    jobs, made = [], {}
    for case, (name, kind, flags) in CASES.items():
        tmp_path = tmp_path_factory.mktemp("ddp")
        parent = dead_expert(model_folder("shared"), tmp_path / "dead") if kind == "dead" else None
        common_flags = ["--accumulation_steps", "2", "--max_steps", "4", *BALANCE, *flags]
        options = dict(kind="dense" if parent else kind, parent=parent)
        script, one = stage_of(tmp_path, name, *common_flags, "--batch_size", "4", "--save_weight", "one", **options)
        _, two = stage_of(tmp_path, name, *common_flags, "--batch_size", "2", "--save_weight", "two", **options)
        script.main(script.parse_args(one))
        jobs.append((name, two, free_port()))
        made[case] = (tmp_path / "out" / "two", tmp_path / "out" / "one")
    context = torch.multiprocessing.spawn(worker, (jobs,), nprocs=2, join=False)
    deadline = time.monotonic() + 600
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("two processes hang")
    return made


def difference(first, second):
    """Largest difference between the weights of two checkpoints."""
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys() and all(tensor.dtype == torch.float64 for tensor in a.values())
    return max((a[name] - b[name]).abs().max().item() for name in a)


def history(folder):
    """Logged rows of a run, keyed by step and name, without what a clock decides."""
    rows = logs.read_metrics(folder.parent / "logs" / folder.name)
    return {(row["step"], key): value for row in rows for key, value in row.items()
            if key not in ("step", "tokens_per_s")}


@gloo
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_the_same_global_batch(results, case):
    two, one = results[case]
    assert difference(two, one) < 1e-9
    start = CASES[case][1]
    assert start == "dead" or difference_from_start(one) > 1e-4, "something was learnt"
    assert history(two) == pytest.approx(history(one), rel=1e-6)
    assert {"loss", "lr", "grad_norm", "val_loss"} <= {key for _, key in history(two)}


def difference_from_start(folder):
    """How far a run has moved its weights."""
    parent = Path(checkpoint.read_minillm(folder)["parents"][0])
    a, b = load_file(folder / "model.safetensors"), load_file(parent / "model.safetensors")
    return max((a[name] - b[name]).abs().max().item() for name in a)


@gloo
def test_dead_expert_neither_hangs_nor_moves(results):
    two, _ = results["pretrain dead"]
    before = load_file(Path(checkpoint.read_minillm(two)["parents"][0]) / "model.safetensors")
    after = load_file(two / "model.safetensors")
    dead = [name for name in after if ".experts.0." in name]
    assert dead and all(torch.equal(after[name], before[name].double()) for name in dead)
    assert not all(torch.equal(after[name], before[name].double()) for name in after if ".experts.1." in name)


@pytest.mark.parametrize("kind", ["dense", "moe", "shared"])
@pytest.mark.parametrize("name", ["train_pretrain", "train_sft"])
def test_accumulation_equals_a_larger_batch(stage, tmp_path, name, kind):
    sizes = {"k": ("1", "4"), "b": ("4", "1"), "both": ("2", "2")}
    for folder, (batch, accumulation) in sizes.items():
        module, argv = stage(name, "--batch_size", batch, "--accumulation_steps", accumulation, "--max_steps", "3",
                             "--save_weight", folder, *BALANCE, kind=kind)
        module.main(module.parse_args(argv))
    out = tmp_path / "out"
    assert difference(out / "k", out / "b") < 1e-9 and difference(out / "both", out / "b") < 1e-9
    assert history(out / "k") == pytest.approx(history(out / "b"), rel=1e-6)


@pytest.mark.parametrize("name", ["train_pretrain", "train_sft"])
def test_micro_batches_have_unequal_token_counts(stage, name):
    """Without this the tests above would pass for a mean of means as well."""
    module, argv = stage(name)
    args = module.parse_args(argv)
    from dataset import PretrainData, SFTData
    from tokenizer import Tokenizer
    kind = PretrainData if name == "train_pretrain" else SFTData
    data = kind(args.data_path, Tokenizer.from_pretrained(args.from_weight), args.max_seq_len, args.cache_dir,
                args.seed)
    counts = [data.batch(data.position_batch(first, 2))["mask"][:, 1:].sum().item() for first in range(0, 16, 2)]
    assert len(set(counts)) > 1


FAILING = """
import os
import checkpoint
import cli
import common
import optim
import train_pretrain

real = optim.set_lr

def failing(optimizer, scale):
    failing.steps += 1
    if os.environ["RANK"] == "1" and failing.steps == 4:
        open(os.environ["MARK"], "w").close()
        raise ValueError("injected failure; a test did it; nothing to fix")
    return real(optimizer, scale)

failing.steps = 0
optim.set_lr = failing
common.run(train_pretrain.main, train_pretrain.parse_args)
"""


@gloo
def test_failing_rank_ends_the_launch_and_one_process_can_go_on(stage, tmp_path):
    """The real launcher; rank 1 fails in step 4. Then a single process with the doubled batch resumes from step 2."""
    mark = tmp_path / "failed"
    (tmp_path / "failing.py").write_text(FAILING)
    flags = ["--max_steps", "6", "--save_interval", "2"]
    _, argv = stage("train_pretrain", *flags, "--save_weight", "broken")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MARK": str(mark)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
               str(free_port()), str(tmp_path / "failing.py"), *argv]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True, text=True)
    try:
        text = process.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert time.time() - mark.stat().st_mtime < 60, text
    assert process.returncode != 0
    assert "rank 1: error: injected failure" in text
    assert checkpoint.read_minillm(tmp_path / "out" / "broken")["progress"]["step"] == 2
    module, argv = stage("train_pretrain", *flags, "--batch_size", "4", "--save_weight", "broken", "--from_resume", "1")
    module.main(module.parse_args(argv))
    module, argv = stage("train_pretrain", *flags, "--batch_size", "4", "--save_weight", "whole")
    module.main(module.parse_args(argv))
    assert difference(tmp_path / "out" / "broken", tmp_path / "out" / "whole") < 1e-9
