"""Proves that the number of processes, and what they share (ZeRO, FSDP), does not change what is computed: two and four
gloo processes equal one with the same global batch, accumulation equals a larger batch, a run may go on in another way,
and nothing hangs.

    python -m pytest tests/test_ddp.py
    python -m pytest tests/test_ddp.py -m "slow or not slow"      # every case with two and with four processes
"""
import argparse
import dataclasses
import functools
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
from conftest import by_sum
from safetensors.torch import load_file, save_file

import checkpoint
import common
import logs
import records
import sharding
import train_grpo

ROOT = Path(common.__file__).parent
gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo backend")

# FSDP2 runs on CPUs from torch 2.7 on
no_fsdp = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on CPUs")

# name of the case: script, kind of model, flags. A micro-step of two processes with 2 rows each, or of four with one,
# is one of 4 rows alone.
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
    "pretrain short rows": ("train_pretrain", "moe", ["--length_warmup", "0.8"]),
    "pretrain fewer blocks": ("train_pretrain", "shared", ["--depth_warmup", "0.5"]),
    "pretrain fp32": ("train_pretrain", "dense", ["--dtype", "float32"]),
    "reward moe": ("train_reward", "moe", []),
    "dpo shared": ("train_dpo", "shared", []),
    "distill moe": ("train_distill", "moe", ["--alpha", "0.5", "--temperature", "2"]),
    "distill sft shared": ("train_distill", "shared", ["--stage", "sft"]),
    "pretrain dense zero": ("train_pretrain", "dense", ["--optimizer", "adamw", "--zero", "1"]),
    "pretrain moe zero": ("train_pretrain", "moe", ["--optimizer", "adamw", "--zero", "1"]),
    "sft shared zero": ("train_sft", "shared", ["--optimizer", "adamw", "--zero", "1"]),
    "pretrain dense fsdp": ("train_pretrain", "dense", ["--optimizer", "adamw", "--fsdp", "1"]),
    "pretrain moe fsdp": ("train_pretrain", "moe", ["--optimizer", "adamw", "--fsdp", "1", "--gradient_checkpointing"]),
    "sft dense fsdp": ("train_sft", "dense", ["--optimizer", "adamw", "--fsdp", "1"]),
    "sft shared fsdp": ("train_sft", "shared", ["--optimizer", "adamw", "--fsdp", "1", "--weight_decay", "0.1"]),
    "lora dense": ("train_sft", "dense", ["--lora_rank", "2", "--gradient_checkpointing", "1"]),
    "lora moe": ("train_sft", "moe", ["--lora_rank", "2"]),
    "lora shared": ("train_sft", "shared", ["--lora_rank", "2", "--optimizer", "adamw"]),
}
# By default these run with four processes, and all others but SLOW with two; the rest is slow.
FOUR = {"pretrain moe", "sft shared", "reward moe", "dpo shared", "sft shared zero", "pretrain dense fsdp"}
SLOW = {"pretrain dense zero", "sft dense fsdp"}


def marks(case, world):
    """Marks of a case with so many processes."""
    by_default = world == (4 if case in FOUR else 2) and case not in SLOW
    return [no_fsdp] * ("fsdp" in case) + [pytest.mark.slow] * (not by_default)


RUNS = [pytest.param(case, world, id=f"{case} {world}", marks=marks(case, world)) for case in CASES for world in (2, 4)]
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


def worker(rank, world, jobs):
    """One of several processes: runs every job's main(), with the environment that torchrun would give it."""
    logs.plot_curves = nothing
    for module, argv, port in jobs:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        script = importlib.import_module(module)
        script.main(script.parse_args(argv))


def launch(world, jobs):
    """Run jobs, each a script's name and its flags, one after the other with so many processes."""
    jobs = [(name, argv, free_port()) for name, argv in jobs]
    context = torch.multiprocessing.spawn(worker, (world, jobs), nprocs=world, join=False)
    deadline = time.monotonic() + 600
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{world} processes hang")


def alone(stage, name, *flags, **options):
    """Run a script in this process."""
    module, argv = stage(name, *flags, **options)
    module.main(module.parse_args(argv))


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
def results(request, tmp_path_factory, model_folder, stage_of):
    """results[case, processes] -> (folder of that run, folder of the run with one), for the selected tests."""
    wanted = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted = {(w.params["case"], w.params["world"]) for w in wanted if w and "case" in w.params}
    wanted.add(("pretrain dead", 2))  # has a test of its own
    jobs, made = {2: [], 4: []}, {}
    for case, (name, kind, flags) in CASES.items():
        tmp_path = tmp_path_factory.mktemp("ddp")
        parent = dead_expert(model_folder("shared"), tmp_path / "dead") if kind == "dead" else None
        balance = BALANCE if BALANCE[0] in ACCUMULATED[name] else []
        flags = ["--accumulation_steps", "2", "--max_steps", "5", *balance, *flags]
        options = dict(kind="dense" if parent else kind, parent=parent)
        worlds = [world for world in (2, 4) if (case, world) in wanted]
        for world in worlds:
            jobs[world].append((name, stage_of(tmp_path, name, *flags, "--batch_size", str(4 // world),
                                               "--save_weight", str(world), **options)[1]))
            made[case, world] = (tmp_path / "out" / str(world), tmp_path / "out" / "one")
        if worlds:
            alone(functools.partial(stage_of, tmp_path), name, *flags, "--batch_size", "4", "--save_weight", "one",
                  **options)
    for world in (2, 4):
        launch(world, jobs[world])
    return made


def difference(first, second, dtype=torch.float64):
    """Largest difference between the weights of two checkpoints."""
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys() and all(tensor.dtype == dtype for tensor in a.values())
    return max((a[name] - b[name]).abs().max().item() for name in a)


def resume_state(folder):
    """What a run would go on from."""
    return torch.load(folder / "resume" / "state.pt")


def history(folder):
    """Logged rows of a run, keyed by step and name, without what clock and machine decide, and without ratios of a
    sample of the weights, which FSDP takes from other places."""
    rows = records.read_metrics(folder.parent / "logs" / folder.name)
    return {(row["step"], key): value for row in rows for key, value in row.items()
            if key not in ("step", "tokens_per_s") and not key.startswith(("time_", "sys_", "update_"))
            and isinstance(value, (int, float))}


@gloo
@pytest.mark.parametrize("case, world", RUNS)
def test_several_processes_equal_one_with_the_same_global_batch(results, case, world):
    several, one = results[case, world]
    fp32 = case.endswith("fp32")
    assert difference(several, one, torch.float32 if fp32 else torch.float64) < (1e-5 if fp32 else 1e-9)
    start = CASES[case][1]
    assert start == "dead" or difference_from_start(one) > 1e-4, "something was learnt"
    assert history(several) == pytest.approx(history(one), rel=1e-4 if fp32 else 1e-6)
    assert {"loss", "lr", "grad_norm", "val_loss"} <= {key for _, key in history(several)}
    if "zero" in case or "fsdp" in case:
        assert_same_layout(resume_state(several), resume_state(one))


def assert_same_layout(shared, plain):
    """The saved state is that of one process: no trace of who held what."""
    assert shared["optimizer"]["param_groups"] == plain["optimizer"]["param_groups"]
    for a, b in [(shared["model"], plain["model"]), *((shared["optimizer"]["state"][i], entry)
                                                      for i, entry in plain["optimizer"]["state"].items())]:
        assert a.keys() == b.keys()
        for name in a:
            assert type(a[name]) is torch.Tensor and (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
            assert (a[name] - b[name]).abs().max() < 1e-9
    addresses = [state["model"]["lm_head.weight"].data_ptr() == state["model"]["model.embed_tokens.weight"].data_ptr()
                 for state in (shared, plain)]
    assert addresses == [True, True], "a tied weight is in the file once"


@gloo
@no_fsdp
def test_shared_runs_resume_to_the_last_bit_and_in_any_other_way(stage, tmp_path):
    """One launch for both, to spare the starts of processes."""
    jobs, out = [], tmp_path / "out"
    flags = ["--optimizer", "adamw", "--schedule", "constant", "--warmup_steps", "2", "--from_resume", "1"]
    # an evaluation stands before the stop: it leaves FSDP's modules in another state than a step
    for mode in ("zero", "fsdp"):
        own = [*flags, f"--{mode}", "1", "--dtype", "float32", "--eval_interval", "2", "--save_weight"]
        jobs += [("train_pretrain", stage("train_pretrain", *own, *others, kind="shared")[1])
                 for others in ((f"{mode} cut", "--max_steps", "2"), (f"{mode} cut",), (f"{mode} whole",))]
    # one process, then two with DDP, ZeRO and FSDP for a step each, then one again: as if it were one throughout
    changing = functools.partial(stage, "train_sft", *flags, "--save_weight", "changing", "--max_steps", kind="moe")
    alone(changing, "1", "--batch_size", "4")
    jobs += [("train_sft", changing(*others)[1])
             for others in (("2",), ("3", "--zero", "1"), ("4", "--fsdp", "1"), ("5", "--zero", "1"), ("6",))]
    launch(2, jobs)
    alone(changing, "7", "--batch_size", "4", "--fsdp", "1")  # alone --fsdp does nothing
    alone(stage, "train_sft", *flags, "--max_steps", "7", "--batch_size", "4", "--save_weight", "one", kind="moe")
    assert difference(out / "changing", out / "one") < 1e-9
    assert history(out / "changing")[7, "loss"] == pytest.approx(history(out / "one")[7, "loss"], rel=1e-9)
    for mode in ("zero", "fsdp"):
        cut, whole = out / f"{mode} cut", out / f"{mode} whole"
        assert difference(cut, whole, torch.float32) == 0 and history(cut) == history(whole)
        entries = [resume_state(folder)["optimizer"]["state"] for folder in (cut, whole)]
        assert all(torch.equal(entries[0][i][name], value) for i in entries[1] for name, value in entries[1][i].items())


def test_one_process_shares_nothing_and_says_so(capsys):
    runtime = common.Runtime(torch.device("cpu"), torch.float32)
    args = argparse.Namespace(zero=0, fsdp=1)
    assert sharding.modes(args, runtime) == (False, False)
    assert "one process has nobody to share with" in capsys.readouterr().out
    runtime.world_size = 2
    assert sharding.modes(args, runtime) == (False, True)
    assert capsys.readouterr().out == ""


def test_fsdp_on_a_cpu_with_an_old_torch_is_refused(monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(ValueError, match="--fsdp 1 on the CPU with torch .*; FSDP2 runs there from torch 2.7 on; "):
        sharding.shard(None, [], common.Runtime(torch.device("cpu"), torch.float32))


def difference_from_start(folder):
    """How far a run has moved its weights."""
    parent = Path(checkpoint.read_minillm(folder)["parents"][0])
    a, b = load_file(folder / "model.safetensors"), load_file(parent / "model.safetensors")
    return max((a[name] - b[name]).abs().max().item() for name in a.keys() & b.keys())  # a score head is new


@gloo
def test_dead_expert_neither_hangs_nor_moves(results):
    two, _ = results["pretrain dead", 2]
    before = load_file(Path(checkpoint.read_minillm(two)["parents"][0]) / "model.safetensors")
    after = load_file(two / "model.safetensors")
    dead = [name for name in after if ".experts.0." in name]
    assert dead and all(torch.equal(after[name], before[name].double()) for name in dead)
    assert not all(torch.equal(after[name], before[name].double()) for name in after if ".experts.1." in name)


ACCUMULATED = {"train_pretrain": BALANCE, "train_sft": BALANCE, "train_reward": [], "train_dpo": [],
               "train_ppo": ["--target_kl", "0"], "train_grpo": ["--beta", "0.1"],
               "train_distill": [*BALANCE, "--alpha", "0.5", "--reverse", "1"]}


@pytest.mark.parametrize("name, kind", [(name, kind) for name in ACCUMULATED for kind in ("dense", "moe", "shared")
                                        if kind != "shared" or BALANCE[0] in ACCUMULATED[name]])
def test_accumulation_equals_a_larger_batch(stage, tmp_path, monkeypatch, name, kind):
    """The gradient of every step, and the weights and the log after three; rows are of unequal length."""
    monkeypatch.setattr(train_grpo, "reward_correct", by_sum)
    gradients, real = {}, torch.nn.utils.clip_grad_norm_

    def recording(parameters, limit):
        parameters = list(parameters)
        gradients.setdefault(folder, []).append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return real(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    for folder, (batch, accumulation) in {"b": ("4", "1"), "k": ("1", "4"), "both": ("2", "2")}.items():
        module, argv = stage(name, "--batch_size", batch, "--accumulation_steps", accumulation, "--max_steps", "3",
                             "--save_weight", folder, *ACCUMULATED[name], kind=kind)
        module.main(module.parse_args(argv))
    out = tmp_path / "out"
    assert max(g.abs().max() for g in gradients["b"]) > 1e-3
    states = {folder: torch.load(out / folder / "resume" / "state.pt")["model"] for folder in gradients}
    for folder in ("k", "both"):
        for a, b in zip(gradients[folder], gradients["b"], strict=True):
            assert (a - b).abs().max() < 1e-9
        assert all((states[folder][name] - value).abs().max() < 1e-9 for name, value in states["b"].items())
        assert history(out / folder) == pytest.approx(history(out / "b"), rel=1e-6)


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
import signal
import common
import optim
import train_pretrain

real = optim.set_lr

def failing(optimizer, scale):
    failing.steps += 1
    if os.environ["RANK"] == "1" and failing.steps == 4 and not os.path.exists(os.environ["MARK"]):
        open(os.environ["MARK"], "w").close()
        if "TORCHELASTIC_MAX_RESTARTS" in os.environ and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("injected failure; a test did it; nothing to fix")
    return real(optimizer, scale)

failing.steps = 0
optim.set_lr = failing
common.run(train_pretrain.main, train_pretrain.parse_args)
"""


def torchrun(tmp_path, argv, *options):
    """(exit code, output, seconds from the failure to the end) of FAILING under the real launcher, whose rank 1 fails
    in step 4: by an error, or by kill -9 where restarts are allowed."""
    mark = tmp_path / "failed"
    (tmp_path / "failing.py").write_text(FAILING)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MARK": str(mark)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *options, "--master_port",
               str(free_port()), str(tmp_path / "failing.py"), *argv]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True, text=True)
    try:
        text = process.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, text, time.time() - mark.stat().st_mtime


@gloo
@pytest.mark.parametrize("mode", [[], pytest.param(["--optimizer", "adamw", "--fsdp", "1"],
                                                   marks=[pytest.mark.slow, no_fsdp])], ids=["ddp", "fsdp"])
def test_failing_rank_ends_the_launch_and_one_process_can_go_on(stage, tmp_path, mode):
    """Then a single process with the doubled batch resumes from step 2."""
    flags = ["--max_steps", "6", "--save_interval", "2", *mode]
    code, text, seconds = torchrun(tmp_path, stage("train_pretrain", *flags, "--save_weight", "broken")[1])
    assert seconds < 60 and code != 0, text
    assert "rank 1: error: injected failure" in text
    assert checkpoint.read_minillm(tmp_path / "out" / "broken")["progress"]["step"] == 2
    alone(stage, "train_pretrain", *flags, "--batch_size", "4", "--save_weight", "broken", "--from_resume", "1")
    alone(stage, "train_pretrain", *flags, "--batch_size", "4", "--save_weight", "whole")
    assert difference(tmp_path / "out" / "broken", tmp_path / "out" / "whole") < 1e-9


@gloo
def test_killed_rank_is_started_again_and_the_run_goes_on_by_itself(stage, tmp_path):
    """With --overwrite 1 over an older run, and with a fixed port, whose store still has the addresses of the dead."""
    flags = ["--max_steps", "6", "--save_interval", "2"]
    alone(stage, "train_pretrain", *flags, "--batch_size", "4", "--save_weight", "whole")
    shutil.copytree(tmp_path / "out" / "whole", tmp_path / "out" / "broken")
    argv = stage("train_pretrain", *flags, "--save_weight", "broken", "--overwrite", "1")[1]
    code, text, _ = torchrun(tmp_path, argv, "--max-restarts", "1")
    assert code == 0, text
    assert text.count("resumed at step 2 of 6") == 1, text
    assert difference(tmp_path / "out" / "broken", tmp_path / "out" / "whole") < 1e-9
    assert history(tmp_path / "out" / "broken") == pytest.approx(history(tmp_path / "out" / "whole"), rel=1e-6)


@pytest.mark.parametrize("script, flags", [("train_pretrain", []), ("train_sft", ["--eval_prompts", "0"]),
                                           ("train_distill", [])])
def test_each_rank_draws_its_own_dropout(stage, monkeypatch, script, flags):
    """A rank is pretended: all are seeded alike at first, and only the draws of the training may differ."""
    setup, lr_scale, drawn = common.setup, common.lr_scale, []
    monkeypatch.setattr(common, "setup", lambda *inputs: dataclasses.replace(setup(*inputs), rank=ranks.pop(0)))
    monkeypatch.setattr(common, "lr_scale", lambda *inputs: drawn.append(torch.rand(4)) or lr_scale(*inputs))
    monkeypatch.setattr(checkpoint, "begin", lambda *inputs: "fresh")  # rank 0 decides it for all
    ranks = [0, 1, 1]
    while ranks:
        module, argv = stage(script, "--max_steps", "1", *flags)
        module.main(module.parse_args(argv))
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[0], drawn[1])
