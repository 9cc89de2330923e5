"""Proves the ground every script stands on: flags, schedule, device choice, signals, error messages.

    python -m pytest tests/test_common.py
"""
import argparse
import contextlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import BF16_SPEEDUP, KINDS, parse, run_args

import checkpoint
import common
from configuration import PRESETS, ModelConfig
from model import Transformer
from train_pretrain import smaller_preset

with contextlib.suppress(ImportError):  # Windows
    import pty

SCHEDULES = ("linear", "cosine", "wsd", "constant")


def refusal(capsys, *argv):
    """The message with which a command line is refused; checks the exit code and that it is short."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 2 and message.startswith("error: ")
    return message


# -- Learning rate ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_evenly_and_is_never_zero(schedule):
    scales = [common.lr_scale(step, 100, 9, schedule) for step in range(10)]
    assert scales == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_schedules_end_at_the_floor(schedule):
    assert common.lr_scale(100, 100, 10, schedule) == pytest.approx(0)
    assert common.lr_scale(100, 100, 10, schedule, floor=0.1) == pytest.approx(0.1)
    assert common.lr_scale(99, 100, 10, schedule) > 0, "the last step still learns"
    falling = [common.lr_scale(step, 100, 10, schedule) for step in range(10, 101)]
    assert falling == sorted(falling, reverse=True)


def test_schedules_pass_through_their_known_points():
    assert common.lr_scale(55, 100, 10, "linear") == pytest.approx(0.5)
    assert common.lr_scale(55, 100, 10, "cosine") == pytest.approx(0.5)
    assert common.lr_scale(10 + 22.5, 100, 10, "cosine") == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    # wsd: stable until 60% of what follows the warm-up, then straight down
    assert common.lr_scale(10 + 54, 100, 10, "wsd") == pytest.approx(1)
    assert common.lr_scale(10 + 72, 100, 10, "wsd") == pytest.approx(0.5)
    assert common.lr_scale(99, 100, 10, "constant") == 1


def test_warm_up_below_one_is_a_share_of_the_steps():
    for step in range(40):
        assert common.lr_scale(step, 200, 0.05) == common.lr_scale(step, 200, 10)
    assert common.lr_scale(0, 200, 0) == 1
    assert common.lr_scale(0, 200, 1) == 0.5, "1 is one step, not all of them"


def test_unknown_schedule_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'step' is unknown.*linear, cosine, wsd, constant"):
        common.lr_scale(5, 10, 0, "step")


def test_epochs_become_steps_and_max_steps_wins():
    args = parse("--batch_size", "4", "--accumulation_steps", "2", "--epochs", "1.5")
    assert common.count_steps(args, samples=100, per_step=16) == math.ceil(150 / 16)
    assert common.count_steps(args, samples=1, per_step=16) == 1
    for step in range(11):  # a resume with the same flags has the same length
        assert common.count_steps(args, 100, 16, {"step": step, "position": 16 * step}) == max(10, step)
    # 40 of 150 samples are drawn, with 4 a step; the other 110 take 14 steps of 8
    assert common.count_steps(args, 100, 8, {"step": 10, "position": 40}) == 10 + 14
    args.max_steps = 7
    assert common.count_steps(args, samples=100, per_step=16) == 7


def test_patience_with_a_number_that_is_not_measured_ends_at_the_first_evaluation():
    args = parse("--patience", "2", "--patience_metric", "val_loss", "--eval_interval", "1")
    with pytest.raises(ValueError, match="did not measure it.*measured were exact_match"):
        common.watch_evaluation(None, args, {"step": 1, "max_steps": 9}, {"exact_match": 0.5, "val_loss": None})


# -- Command line ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words, value", [([], 0), (["--use_moe"], 1), (["--use_moe", "1"], 1), (["--use_moe", "0"], 0),
                                          (["--use-moe=0"], 0)])
def test_switch_takes_a_value_or_none(words, value):
    assert parse(*words).use_moe == value


def test_switch_that_is_on_by_default_can_be_switched_off():
    assert parse().keep_resume == 1
    assert parse("--keep_resume", "0").keep_resume == 0


@pytest.mark.parametrize("words", [["--use_moe", "True"], ["--use_moe", "2"]])
def test_switch_refuses_other_words(words, capsys):
    assert "--use_moe" in refusal(capsys, *words)


def test_hyphens_are_accepted_in_flags_and_kept_in_values():
    args = parse("--batch-size", "3", "--data-path", "my-data/a-b.jsonl", "--save-dir=my-out")
    assert (args.batch_size, args.data_path, args.save_dir) == (3, ["my-data/a-b.jsonl"], "my-out")


@pytest.mark.parametrize("words", [["--learn", "0.5"], ["--batch", "3"], ["--lerning_rate", "0.5"], ["stray"]])
def test_abbreviations_and_unknown_flags_are_refused(words, capsys):
    assert words[0] in refusal(capsys, *words)


@pytest.mark.parametrize("flag, value", [
    ("--batch_size", "0"), ("--batch_size", "-1"), ("--batch_size", "1.5"), ("--batch_size", "1" + "0" * 400),
    ("--learning_rate", "0"), ("--learning_rate", "-0.1"), ("--learning_rate", "nan"), ("--learning_rate", "3"),
    ("--warmup_steps", "-1"), ("--epochs", "inf"), ("--epochs", "0"), ("--grad_clip", "-1"),
    ("--log_interval", "0"), ("--threads", "-2"),
    ("--dtype", "int8"), ("--optimizer", "sgd"), ("--schedule", "step"), ("--seed", "x")], ids=lambda v: v[:20])
def test_absurd_values_are_refused(flag, value, capsys):
    assert flag in refusal(capsys, flag, value)


def test_every_flag_shows_help_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "samples per process and micro-step (default: 8)" in " ".join(text.split())


# -- Device and dtype ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "xpu"])
def test_unknown_device_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match="cannot be used.*here there are: cpu.*leave the flag out"):
        common.pick_device(name)


def test_auto_device_prefers_cuda_then_mps_then_cpu(monkeypatch):
    cuda, mps = [True], [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps[0])
    assert common.pick_device("auto") == (torch.device("cuda"), "a card found")
    cuda[0] = False
    assert common.pick_device("auto")[0].type == "mps"
    mps[0] = False
    assert common.pick_device("auto") == (torch.device("cpu"), "no GPU found")


@pytest.mark.parametrize("name, major, expected", [
    ("auto", 9, torch.bfloat16), ("auto", 8, torch.bfloat16), ("auto", 7, torch.float16), ("bf16", 7, torch.float16),
    ("bfloat16", 8, torch.bfloat16), ("fp32", 9, torch.float32), ("fp16", 9, torch.float16),
    ("float64", 7, torch.float64)])
def test_cuda_dtype_follows_the_compute_capability(name, major, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert common.pick_dtype(name, torch.device("cuda"))[0] == expected


@pytest.mark.parametrize("name, speedup, expected", [
    ("auto", 2.5, torch.bfloat16), ("auto", 1.1, torch.float32), ("auto", 0.0, torch.float32),
    ("bf16", 0.4, torch.bfloat16), ("fp32", 9.0, torch.float32), ("fp64", 9.0, torch.float64)])
def test_cpu_dtype_follows_the_measured_speed(name, speedup, expected, monkeypatch):
    monkeypatch.setattr(common, "bf16_speedup", lambda: speedup)
    assert common.pick_dtype(name, torch.device("cpu"))[0] == expected


def test_bf16_is_refused_where_it_crashes(monkeypatch):
    monkeypatch.setattr(common, "bf16_speedup", lambda: 0.0)
    with pytest.raises(ValueError, match="bf16"):
        common.pick_dtype("bf16", torch.device("cpu"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_probe_survives_a_crash_and_a_hang():
    assert common._in_child(lambda: 1.5) == 1.5
    assert common._in_child(lambda: os.kill(os.getpid(), signal.SIGKILL)) is None
    assert common._in_child(lambda: time.sleep(60), patience=0.1) is None


def test_setup_seeds_everything_and_says_what_it_chose(tmp_path, capsys):
    runtime = common.setup(run_args(tmp_path))
    first = torch.rand(3)
    common.setup(run_args(tmp_path))
    assert torch.equal(first, torch.rand(3))
    assert "device cpu (asked for), dtype float32 (asked for), 1 process(es) x 1 thread(s)" in capsys.readouterr().out
    assert not runtime.scaler.is_enabled()


def test_resumed_run_keeps_probed_dtype_but_threads_only_for_as_many_processes(tmp_path, monkeypatch):
    facts = {"dtype": "float32", "threads": 1, "world_size": 1}
    (tmp_path / "run").mkdir()
    checkpoint.write_minillm(tmp_path / "run", {"runtime": facts})
    monkeypatch.setattr(common, "bf16_speedup", lambda: 99.0)
    args = run_args(tmp_path, from_resume=1, dtype="auto", threads=0)
    runtime = common.setup(args, checkpoint.earlier_choice(args, "key"))
    assert (runtime.dtype, runtime.threads) == (torch.float32, 1)
    checkpoint.write_minillm(tmp_path / "run", {"runtime": facts | {"world_size": 4, "threads": 1000}})
    runtime = common.setup(args, checkpoint.earlier_choice(args, "key"))
    assert (runtime.dtype, runtime.threads) != (torch.float32, 1000) and runtime.threads < 1000
    args = run_args(tmp_path, dtype="auto")
    assert common.setup(args, checkpoint.earlier_choice(args, "key")).dtype == torch.bfloat16, "a fresh run probes"
    torch.set_num_threads(1)


# -- Start-up check --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", common.DTYPES)
def test_sound_machine_is_far_inside_the_tolerance_and_no_random_state_moves(name):
    dtype = common.DTYPES[name]
    if dtype == torch.bfloat16 and not BF16_SPEEDUP:
        pytest.skip("bf16 products crash on this CPU")
    before = torch.get_rng_state()
    assert common.deviation(torch.device("cpu"), dtype) < common.TOLERANCES[dtype] / 4
    assert torch.equal(before, torch.get_rng_state())


def broken(monkeypatch, *where, fault=lambda tensors: [t * 1.5 for t in tensors]):
    """Make tiny_step compute wrong numbers on the named devices or dtypes; everything else is computed on the CPU."""
    right = common.tiny_step(torch.device("cpu"), torch.float32)

    def tiny_step(device, dtype):
        return fault(right) if {device.type, str(dtype)[6:], (device.type, str(dtype)[6:])} & set(where) else right

    monkeypatch.setattr(common, "tiny_step", tiny_step)


def settled(device, dtype, **options):
    """(device, dtype) that fall_back() leaves of these, as words."""
    runtime = common.Runtime(torch.device(device), common.DTYPES[dtype], **options)
    common.fall_back(runtime)
    return runtime.device.type, str(runtime.dtype)[6:]


def only_one_wrong(tensors):
    return [*tensors[:-2], tensors[-2] + 0.1 * tensors[-2].norm(), tensors[-1]]


def no_kernel(tensors):
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize("fault", [lambda tensors: [t * 1.5 for t in tensors], only_one_wrong, no_kernel,
                                   lambda tensors: [*tensors[:-1], tensors[-1] * math.nan]],
                         ids=["all wrong", "one gradient wrong", "no kernel", "nan"])
@pytest.mark.parametrize("where, left", [(("cuda", "bfloat16"), ("cuda", "float32")), ("cuda", ("cpu", "float32"))])
def test_wrong_numbers_lead_to_fp32_then_to_the_cpu_with_a_message(where, left, fault, monkeypatch, capsys):
    broken(monkeypatch, where, fault=fault)
    assert settled("cuda", "bfloat16") == left
    text = capsys.readouterr().out
    assert text.startswith("cuda with bfloat16: a tiny training step ") and "not used" in text
    assert text.count("\n") == (2 if left[0] == "cpu" else 1)


def test_sound_device_is_kept_without_a_word(monkeypatch, capsys):
    broken(monkeypatch, "mps")
    assert settled("cuda", "bfloat16") == ("cuda", "bfloat16")
    assert settled("cpu", "float32") == ("cpu", "float32")
    assert not capsys.readouterr().out


def test_full_memory_is_no_reason_to_fall_back(monkeypatch):
    def full(tensors):
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken(monkeypatch, "cuda", fault=full)
    with pytest.raises(torch.OutOfMemoryError):
        settled("cuda", "float32")


def test_ranks_fall_back_together_and_cannot_leave_their_gpus(monkeypatch):
    broken(monkeypatch)
    # another rank found what this one did not
    monkeypatch.setattr(common.Runtime, "gather", lambda self, value: [value, 9.0 if self.dtype is half else value])
    half = torch.bfloat16
    with pytest.raises(ValueError, match="computes wrong numbers.*; 2 processes .*; give --device cpu"):
        settled("cuda", "bfloat16", world_size=2)
    assert settled("cpu", "bfloat16", world_size=2) == ("cpu", "float32")


def test_setup_uses_what_the_check_leaves(tmp_path, monkeypatch, capsys):
    broken(monkeypatch, "bfloat16", "float16")
    monkeypatch.setattr(common, "bf16_speedup", lambda: 9.0)
    for dtype in ("auto", "fp16"):
        runtime = common.setup(run_args(tmp_path, dtype=dtype))
        assert runtime.dtype == torch.float32 and not runtime.scaler.is_enabled()
    text = capsys.readouterr().out
    assert "dtype float32 (instead of bfloat16)" in text and "dtype float32 (instead of float16)" in text


# -- python common.py --check ----------------------------------------------------------------------------------------
def program(*words, **environment):
    """A finished `python common.py ...` in a process of its own."""
    return subprocess.run([sys.executable, common.__file__, *words], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


def test_check_looks_at_everything_and_succeeds_here():
    done = program("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[-9:-1]] == ["python", "packages", "device", "dtype", "cores", "memory",
                                                         "disk", "rust"]
    assert lines[-1] == "well enough to train" and f"torch {torch.__version__.split('+')[0]}" in done.stdout


def test_common_without_a_command_says_what_it_is():
    done = program()
    assert done.returncode == 2 and "python common.py --check" in done.stderr and not done.stdout


def test_missing_package_is_one_message_with_the_fix(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    done = program("--check", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "No module named torch;" in done.stderr and "bash run.sh setup" in done.stderr


def hints():
    """What has a fix: name -> (fix, whether training is impossible)."""
    return {what: (fix, fatal) for what, _, fix, fatal in common.check_machine() if fix}


@pytest.fixture
def healthy(monkeypatch):
    """A machine with nothing to complain about."""
    monkeypatch.setattr(common, "_check_device", lambda: [])
    monkeypatch.setattr(common, "_check_rust", lambda: ("rust", "minillm_bpe", "", False))
    monkeypatch.setattr(common, "free_memory", lambda: 9e9)
    monkeypatch.setattr(common.os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    monkeypatch.setattr(common.shutil, "disk_usage", lambda folder: argparse.Namespace(free=9e9))
    assert not hints()


def test_each_shortage_is_named_with_a_fix(healthy, monkeypatch, capsys):
    for free, expected in ((1.9e9, False), (1e8, True)):
        monkeypatch.setattr(common, "free_memory", lambda free=free: free)
        monkeypatch.setattr(common.shutil, "disk_usage", lambda folder, free=free: argparse.Namespace(free=free))
        found = hints()
        assert set(found) == {"memory", "disk"} and {fatal for _, fatal in found.values()} == {expected}
        assert "--preset nano" in found["memory"][0] and "--save_dir" in found["disk"][0]
        assert common.main(common.parse_args(["--check"])) == int(expected)
        text = capsys.readouterr().out
        assert ("training is impossible; to be fixed first: memory, disk" in text) == expected
        assert text.count("IMPOSSIBLE") == 2 * expected


def test_busy_cores_old_packages_and_a_read_only_folder_are_named(healthy, monkeypatch):
    monkeypatch.setattr(common.os, "getloadavg", lambda: (99.0, 0.0, 0.0), raising=False)
    monkeypatch.setattr(common.os, "access", lambda *words: False)
    monkeypatch.setattr(common.importlib.metadata, "version", lambda name: "2.5.1" if name == "torch" else "2099.1")
    found = hints()
    assert set(found) == {"cores", "packages", "disk"}
    assert "torch>=2.6" in found["packages"][0] and "numpy" not in found["packages"][0] and found["packages"][1]
    assert "cannot be written" in found["disk"][0] and found["disk"][1] and not found["cores"][1]


@pytest.mark.parametrize("name, instead", [("minillm_bpe", "Python tokenizer serves"),
                                           ("minillm_decode", "torch decodes")])
def test_missing_rust_module_is_no_obstacle(monkeypatch, name, instead):
    monkeypatch.setitem(sys.modules, name, None)
    _, found, fix, fatal = common._check_rust()
    assert name in found and instead in fix and "bash run.sh setup" in fix and not fatal


def test_check_reports_a_device_that_computes_wrong_numbers(monkeypatch):
    monkeypatch.setattr(common, "pick_device", lambda name: (torch.device("cuda"), "a card found"))
    monkeypatch.setattr(common, "pick_dtype", lambda name, device: (torch.bfloat16, "capability 9"))
    broken(monkeypatch, ("cuda", "bfloat16"))
    device, dtype = common._check_device()
    assert not device[2] and "runs take float32" in dtype[2]
    broken(monkeypatch, "cuda")
    device, dtype = common._check_device()
    assert "runs go to cpu" in device[2]


def test_shares_of_all_ranks_put_together_are_the_list(monkeypatch):
    for world in (1, 2, 3):
        items = list(range(7))
        ranks = [common.Runtime(torch.device("cpu"), torch.float32, rank, world) for rank in range(world)]
        shares = [runtime.shard(items) for runtime in ranks]
        monkeypatch.setattr(common.Runtime, "gather", lambda self, value, shares=shares: shares)
        assert all(runtime.unshard(share) == items for runtime, share in zip(ranks, shares, strict=True))


def test_in_lockstep_every_rank_takes_everything():
    runtime = common.Runtime(torch.device("cpu"), torch.float32, 1, 2, lockstep=True)
    assert runtime.shard([1, 2, 3]) == runtime.unshard([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize("words, expected", [
    ("--seed 1", "python train.py --seed 1 --from_resume 1"),
    ("--overwrite 1 --seed 1", "python train.py --seed 1 --from_resume 1"),
    ("--overwrite --from-resume 0 --seed=1", "python train.py --seed=1 --from_resume 1"),
    ("--seed 1 --from_resume=1 --use_moe 1", "python train.py --seed 1 --use_moe 1 --from_resume 1")])
def test_resume_command_can_be_pasted(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    assert common.resume_command() == expected


def test_resume_command_quotes_and_keeps_the_launcher(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data_path", "my data/*.jsonl"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert common.resume_command() == ("torchrun --nproc_per_node 2 train.py --data_path 'my data/*.jsonl' "
                                       "--from_resume 1")


# -- Guards ----------------------------------------------------------------------------------------------------------
def scaler(scale):
    """A gradient scaler at this scale; None = none in use."""
    return argparse.Namespace(is_enabled=lambda: scale is not None, get_scale=lambda: scale)


def guard(dtype=torch.float32, scale=None):
    return common.NonFinite(common.Runtime(torch.device("cpu"), dtype, scaler=scaler(scale)))


def test_nonfinite_step_is_skipped_counted_and_explained(capsys):
    check = guard()
    assert not check.skip(1, 2.0, 1.0, 1e-3)
    assert check.skip(2, math.nan, 1.0, 1e-3)
    text = capsys.readouterr().out
    assert all(words in text for words in ("step 3", "loss nan", "1.00e-03", "float32", "learning rate is too high"))
    assert check.skip(3, 2.0, math.inf, 1e-3)
    assert not check.skip(4, 2.0, 1.0, 1e-3)
    assert check.skip(5, math.nan, 1.0, 1e-3) and check.skip(6, math.nan, 1.0, 1e-3)
    assert check.total == 4
    with pytest.raises(ValueError, match="3 steps in a row, last at step 8.*--learning_rate"):
        check.skip(7, math.nan, 1.0, 1e-3)


def test_fp16_overflow_belongs_to_the_scaler_until_its_scale_is_used_up():
    check = guard(torch.float16, scale=1024.0)
    assert not any(check.skip(step, 2.0, math.inf, 1e-3) for step in range(5))
    assert check.skip(6, math.nan, math.inf, 1e-3), "a loss that is not finite is no matter of scale"
    assert guard(torch.float16, scale=1.0).skip(1, 2.0, math.inf, 1e-3)


def test_budget_sets_the_steps_from_the_measured_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    runtime = common.Runtime(torch.device("cpu"), torch.float32)
    budget = common.Budget(minutes=2)
    total = 10_000
    seen = []
    for done in range(1, 15):
        now[0] += 2.0 if done <= 4 else 0.5  # the first steps are slow and must not count
        total = budget.steps(done, total, runtime)
        seen.append(total)
    assert seen[:8] == [10_000] * 8
    # at step 9, 10.5 s are gone: 0.96 * 120 - 10.5 at half a second each are left. The clock starts with the first step
    assert len(set(seen[8:])) == 1
    assert abs(seen[-1] - (9 + (0.96 * 120 - 10.5) / 0.5)) <= 2
    assert common.Budget(minutes=0).steps(50, 77, runtime) == 77
    now[0] = 100.0
    growing = common.Budget(minutes=2, slower=1.5)
    for done in range(1, 10):
        now[0] += 2.0 if done <= 4 else 0.5
        total = growing.steps(done, 10_000, runtime)
    assert abs(total - (9 + (0.96 * 120 - 10.5) / 0.75)) <= 2, "steps to come take half as long again as those measured"


def test_budget_never_adds_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    runtime = common.Runtime(torch.device("cpu"), torch.float32)
    budget = common.Budget(minutes=60)
    assert [budget.steps(done, 12, runtime) for done in range(1, 13) if not now.__setitem__(0, done)] == [12] * 12


def eta_lines(monkeypatch, capsys, seconds, max_steps, smaller=None):
    """What Eta prints in 30 steps of so many seconds each, the first five of which take ten times as long."""
    clock = itertools.accumulate(seconds * (10 if step < 5 else 1) for step in itertools.count())
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    eta = common.Eta(common.Runtime(torch.device("cpu"), torch.float32), smaller)
    for step in range(1, 31):
        eta.report(step, max_steps)
    return capsys.readouterr().out


def test_time_left_is_said_once_and_without_the_warm_up(monkeypatch, capsys):
    assert eta_lines(monkeypatch, capsys, 6, 120) == "100 steps are left, about 10 min\n"
    assert eta_lines(monkeypatch, capsys, 0.5, 120) == "100 steps are left, about 50 s\n"
    assert not eta_lines(monkeypatch, capsys, 6, 20), "nothing is left to wait for"


def test_long_run_names_the_smaller_preset_with_its_time(monkeypatch, capsys):
    long = eta_lines(monkeypatch, capsys, 109.8, 120, lambda: ("nano", 0.25))
    assert long == "100 steps are left, about 3 h 3 min; --preset nano would take about 46 min\n"
    assert "preset" not in eta_lines(monkeypatch, capsys, 109.8, 120, lambda: None)
    assert "preset" not in eta_lines(monkeypatch, capsys, 71, 120, lambda: ("nano", 0.25)), "below two hours"


def test_next_smaller_preset_costs_no_random_numbers():
    before = torch.get_rng_state()
    with torch.device("meta"):
        models = {name: Transformer(ModelConfig.preset(name, vocab_size=6400)) for name in PRESETS}
    found = {name: smaller_preset(model, 256) for name, model in models.items()}
    assert torch.equal(before, torch.get_rng_state())
    assert {name: other and other[0] for name, other in found.items()} == {
        "nano": None, "tiny": "nano", "small": "tiny", "base": "small", "moe": "small"}
    assert found["small"][1] == models["tiny"].flops_per_token(256) / models["small"].flops_per_token(256)


def memory(kind, free, monkeypatch, rows=3):
    """(numbers of memory_line for a small model in MB, its whole text, bytes that a forward of `rows` rows keeps)."""
    monkeypatch.setattr(common, "free_memory", lambda: free)
    config = ModelConfig(vocab_size=4000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, dropout=0.1,
                         intermediate_size=256, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
                         pad_token_id=2, **KINDS[kind])
    model, frozen = Transformer(config).train(), torch.nn.Linear(500, 1000).requires_grad_(False)
    runtime = common.Runtime(torch.device("cpu"), torch.float32)

    def forward(ids):
        return model(ids, target_mask=torch.ones_like(ids))

    before = torch.get_rng_state()
    text = common.memory_line(runtime, [model, frozen], rows, 200, forward)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert model.update_router_bias(0.001) is None, "no visit was counted"
    model.eval()
    kept = common._saved_bytes(runtime, list(model.parameters()), forward, torch.randint(0, 4000, (rows, 200)))
    return [int(n) for n in re.findall(r" (\d+)", text)][:5], text, model.num_parameters(), kept


@pytest.mark.parametrize("kind, rows", [*((kind, 3) for kind in KINDS), ("dense", 1)])
def test_memory_of_a_step_is_what_a_forward_keeps(kind, rows, monkeypatch):
    (held, gradients, state, activations, total), text, count, kept = memory(kind, 9e9, monkeypatch, rows)
    assert (held, gradients, state) == (round((4 * count + 4 * 501_000) / 1e6), round(4 * count / 1e6),
                                        round(8 * count / 1e6))
    assert activations == pytest.approx(kept / 1e6, rel=0.02, abs=0.5) and activations >= 2 * rows
    assert abs(total - held - gradients - state - activations) <= 2 and text.endswith("; 9000 MB are free")


def test_zero_counts_this_ranks_share_of_the_optimizer(monkeypatch):
    monkeypatch.setattr(common, "free_memory", lambda: None)
    model, runtime = torch.nn.Linear(1000, 1000, bias=False), common.Runtime(torch.device("cpu"), torch.float32, 0, 4)
    text = common.memory_line(runtime, [model], 1, 4, lambda ids: model(torch.ones(1, 1000)), zero=True)
    assert "parameters 4 + gradients 4 + optimizer 2 + activations 0 = 10 MB" in text


def test_too_little_memory_is_said_before_the_first_step(monkeypatch):
    assert "too little: halve --batch_size" in memory("dense", 9e6, monkeypatch)[1]
    assert memory("dense", None, monkeypatch)[1].endswith(" MB"), "where the system does not say"


def test_budget_measures_once_also_when_the_run_is_resumed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    runtime = common.Runtime(torch.device("cpu"), torch.float32)

    def steps(first, total):
        budget = common.Budget(minutes=1)
        for done in range(first, first + 20):
            now[0] += 1
            total = budget.steps(done, total, runtime)
        return total

    assert steps(first=10, total=33) == 33, "stopped after the measurement: its result stays"
    assert steps(first=5, total=9999) < 70, "stopped before: it is measured now"


# -- Signals ---------------------------------------------------------------------------------------------------------
def training(saved, deaf=False, nohup=False):
    """A training loop of 200 steps, as a script would run it; a deaf one never gets to its save."""

    def main(args):
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does before it starts a program
        stop = common.StopSignal()
        print("ready", flush=True)
        for step in range(200):
            time.sleep(0.05)
            number = stop.stop(common.Runtime(None, None))
            if number and not deaf:
                print(f"saved at step {step}", flush=True)
                saved.write_text("saved")
                raise common.Interrupted(number)

    common.run(main, argparse.Namespace)


class Child:
    """A forked process that trains (a new Python would import torch for seconds), with its output behind a pipe or,
    with terminal=True, a terminal."""

    def __init__(self, saved, terminal=False, **options):
        reader, writer = (None, None) if terminal else os.pipe()
        self.pid, master = pty.fork() if terminal else (os.fork(), None)
        self.output = master if terminal else reader
        if self.pid == 0:
            try:
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup
                for descriptor in (1, 2) if writer else ():
                    os.dup2(writer, descriptor)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                training(saved, **options)
            finally:
                os._exit(99)
        if writer:
            os.close(writer)
        self.text = b""
        self.read_until(b"ready")

    def read_until(self, word):
        while word not in self.text:
            self.text += os.read(self.output, 1000)

    def send(self, number):
        os.kill(self.pid, number)

    def wait(self, seconds=30.0):
        """Exit code; None when it is still running after that time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@posix
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signal_finishes_the_step_saves_and_exits_with_its_code(tmp_path, name, code):
    child = Child(tmp_path / "saved")
    child.send(getattr(signal, name))
    assert child.wait() == code
    child.read_until(b"saved at step")
    assert b"stopping after this step" in child.text and b"Traceback" not in child.text
    assert (tmp_path / "saved").exists()


@posix
def test_second_ctrl_c_leaves_at_once(tmp_path):
    child = Child(tmp_path / "saved", deaf=True)
    child.send(signal.SIGINT)
    child.read_until(b"stopping")
    child.send(signal.SIGINT)
    assert child.wait(5) == 130
    assert not (tmp_path / "saved").exists()


@posix
def test_closed_terminal_does_not_prevent_the_save(tmp_path):
    child = Child(tmp_path / "saved", terminal=True)
    os.close(child.output)  # the window is closed: SIGHUP, and every later print fails
    assert child.wait() == 129
    assert (tmp_path / "saved").read_text() == "saved"


@posix
def test_nohup_outlives_the_terminal(tmp_path):
    child = Child(tmp_path / "saved", nohup=True)
    child.send(signal.SIGHUP)
    assert child.wait(0.3) is None
    child.send(signal.SIGTERM)
    assert child.wait() == 143


# -- Errors ----------------------------------------------------------------------------------------------------------
def outcome(monkeypatch, capsys, error, **flags):
    """(exit code, what is printed to stderr) of a script whose main raises `error`."""

    def main(args):
        raise error

    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    common.run(main, lambda: argparse.Namespace(batch_size=8, accumulation_steps=2, max_seq_len=256, **flags))
    assert len(codes) == 1
    return codes[0], capsys.readouterr().err


@pytest.mark.parametrize("error, code, words", [
    (ValueError("line 3 is bad; the rule; the fix"), 2, "error: line 3 is bad; the rule; the fix\n"),
    (FileNotFoundError("no such file"), 2, "error: no such file\n"),
    (torch.OutOfMemoryError("CUDA out of memory"), 3, "--batch_size 4 --accumulation_steps 4"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "--max_seq_len 128"),
    (MemoryError(), 3, "out of memory"),
    (common.Interrupted(15), 143, ""), (KeyboardInterrupt(), 130, "")])
def test_user_errors_are_one_message_and_an_exit_code(monkeypatch, capsys, error, code, words):
    got, text = outcome(monkeypatch, capsys, error)
    assert got == code
    assert words in text and "Traceback" not in text and text.count("\n") <= 1


def test_debug_shows_the_traceback(monkeypatch, capsys):
    assert "Traceback" in outcome(monkeypatch, capsys, ValueError("bad"), debug=1)[1]


def test_rank_is_named_in_the_message(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert outcome(monkeypatch, capsys, ValueError("bad"))[1] == "rank 1: error: bad\n"


def test_bug_of_ours_is_not_hidden(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="shapes"):
        outcome(monkeypatch, capsys, RuntimeError("shapes do not fit"))


def test_success_returns(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("no exit needed"))
    common.run(lambda args: {}, lambda: argparse.Namespace())


@pytest.mark.parametrize("flags, advice", [
    (dict(batch_size=6, accumulation_steps=2), "--batch_size 3 --accumulation_steps 4 (the result stays the same)"),
    (dict(batch_size=9), "--batch_size 3 --accumulation_steps 3 (the"),
    (dict(batch_size=1, gradient_checkpointing=0), "with --gradient_checkpointing 1, or --max_seq_len 64"),
    (dict(batch_size=1, gradient_checkpointing=1), "with --max_seq_len 64"),
    (dict(batch_size=8, replay_path=["text.jsonl"]), "--batch_size 4 --accumulation_steps 2, or")])
def test_advice_when_memory_is_out_keeps_the_rows_of_a_step(flags, advice):
    args = argparse.Namespace(**{"accumulation_steps": 1, "max_seq_len": 128} | flags)
    assert advice in common._smaller(args)
