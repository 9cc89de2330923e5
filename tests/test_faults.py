"""Proves that faults cost no training: numbers that are not finite, a full disk, damaged checkpoints, too little
memory, and (slow) kill -9 and signals at moments that nobody chose, in real processes.

    python -m pytest tests/test_faults.py
    python -m pytest -m slow tests/test_faults.py -s     # the loops of kills; they print what they did
"""
import contextlib
import copy
import functools
import importlib
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import by_sum, cut, flip
from safetensors.torch import load_file
from test_resume import STAGES, assert_same_run, lines, same

import checkpoint
import common
import logs
import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_reward
from model import MoE, Transformer

ROOT = Path(common.__file__).parent
# exactly one optimizer step in each step of PPO and GRPO as well
ONE_UPDATE = {"train_ppo": ["--ppo_epochs", "1", "--rollout_size", "2"], "train_grpo": ["--beta", "0.1"]}
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.fixture
def run(stage, monkeypatch, tmp_path):
    """run(name, folder, *flags, before=None, **options) -> final metrics; before(step) is called at the beginning of
    each step. run.states: what was given to each save, by step."""
    monkeypatch.setattr(train_grpo, "reward_correct", by_sum)
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: setattr(self, "requested", 0))
    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)  # a second each
    lr_scale, save = common.lr_scale, checkpoint.save

    def recording(runtime, args, parts, state, facts, finished=False):
        start.states[state["progress"]["step"]] = copy.deepcopy(state)
        return save(runtime, args, parts, state, facts, finished)

    def start(name, folder, *flags, before=lambda step: None, through=None, **options):
        module, argv = stage(name, "--dtype", "float32", "--save_weight", folder, "--max_steps", "6", *flags, **options)
        start.states = {}
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", recording)
            patch.setattr(common, "lr_scale", lambda step, *rest: before(step) or lr_scale(step, *rest))
            call = through or (lambda main, parse: main(parse()))
            return call(module.main, lambda: module.parse_args(argv))

    start.out = tmp_path / "out"
    return start


# -- Numbers that are not finite ---------------------------------------------------------------------------------------
LOSSES = {"train_pretrain": (Transformer, "forward"), "train_sft": (Transformer, "forward"),
          "train_reward": (train_reward, "pairwise_loss"), "train_dpo": (train_dpo, "dpo_loss"),
          "train_ppo": (train_ppo, "policy_loss"), "train_grpo": (train_grpo, "grpo_loss"),
          "train_distill": (train_distill, "distill_kl")}


class Poison:
    """Puts NaN into the loss, or into one gradient behind a sound loss, in the given steps (counted from 0)."""

    def __init__(self, monkeypatch, name, where, steps):
        self.steps, self.active = steps, False
        if where == "loss":
            owner, attribute = LOSSES[name]
            real = getattr(owner, attribute)
            monkeypatch.setattr(owner, attribute, lambda *a, **k: self.loss(real(*a, **k)))
        else:
            monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", functools.partial(
                self.gradient, torch.nn.utils.clip_grad_norm_))

    def before(self, step):
        self.active = step in self.steps

    def loss(self, result):
        if not self.active or not torch.is_grad_enabled():  # an evaluation or a rollout
            return result
        return (result[0] * math.nan, *result[1:]) if isinstance(result, tuple) else result * math.nan

    def gradient(self, real, parameters, limit):
        parameters = list(parameters)
        if self.active:
            next(p for p in parameters if p.grad is not None).grad.view(-1)[0] = math.nan
        return real(parameters, limit)


# among such steps a run does not save; here it does, so that the state behind one can be looked at
SAVES_ALL_THE_SAME = property(lambda self: 0, lambda self, value: None)


def optimizer_states(state):
    """What the optimizers of a resume state have gathered; their rates follow the schedule all the same."""
    return [optimizer["state"] for optimizer in state.get("optimizers") or [state["optimizer"]]]


POISONED = [(name, where, "dense", []) for name in STAGES for where in ("loss", "gradient")]
POISONED += [("train_pretrain", "gradient", "dense", ["--optimizer", optimizer, "--hessian_interval", "5"])
             for optimizer in ("adamw", "lion", "sophia", "schedulefree")]
POISONED += [(name, "loss", "shared", []) for name in ("train_pretrain", "train_sft")]


@pytest.mark.parametrize("name, where, kind, flags", POISONED, ids=lambda value: "-".join(value[:2])
                         if isinstance(value, list) else value)
def test_step_that_is_not_finite_is_skipped_counted_and_explained(run, monkeypatch, capsys, name, where, kind, flags):
    """Weights, router bias and optimizer stay as they were; the next step moves them again."""
    poison = Poison(monkeypatch, name, where, {2})
    monkeypatch.setattr(common.NonFinite, "in_a_row", SAVES_ALL_THE_SAME, raising=False)
    flags = ["--save_interval", "1", *ONE_UPDATE.get(name, []), *flags]
    final = run(name, "run", *flags, before=poison.before, kind=kind)
    assert final["skipped_steps"] == 1 and final["steps"] == 6
    states = run.states
    assert same(optimizer_states(states[2]), optimizer_states(states[3]))
    if "schedulefree" in flags:  # its weights were at the point of the gradient and back: a last bit may have changed
        assert all((states[3]["model"][key] - value).abs().max() < 1e-6 for key, value in states[2]["model"].items())
    else:
        assert same(states[2]["model"], states[3]["model"])
    for step in (1, 3):
        assert not same(states[step]["model"], states[step + 1]["model"]), "other steps do move"
    assert all(tensor.isfinite().all() for tensor in states[6]["model"].values())
    said, = [line for line in capsys.readouterr().out.split("\n") if "step skipped" in line]
    assert "step 3: loss " in said and "the learning rate is too high" in said
    row, = [row for row in lines(run.out / "run") if row["step"] == 3]
    assert row["grad_norm"] is None
    assert (row.get("loss", row.get("policy_loss")) is None) == (where == "loss"), "NaN is written as null"


@pytest.mark.parametrize("name", ["train_pretrain", "train_sft"])
def test_resume_behind_a_skipped_step_is_exact(run, monkeypatch, name):
    """What the router counted in the skipped step must not count in the next one: it is in no checkpoint."""
    poison, visits, real = Poison(monkeypatch, name, "loss", {1, 2}), [], MoE.update_bias
    monkeypatch.setattr(common.NonFinite, "in_a_row", SAVES_ALL_THE_SAME, raising=False)
    monkeypatch.setattr(MoE, "update_bias", lambda layer, rate, counts: visits.append(counts.sum()) or real(
        layer, rate, counts))

    def dying(step):
        poison.before(step)
        if step == 3:
            raise KeyboardInterrupt

    flags = ["--save_interval", "1", "--router_bias_rate", "0.1", "--batch_size", "1"]
    run(name, "whole", *flags, before=poison.before, kind="shared")
    assert max(visits) <= 64 * 2, "a row of 64 tokens, two experts each"
    with pytest.raises(KeyboardInterrupt):
        run(name, "broken", *flags, before=dying, kind="shared")
    run(name, "broken", *flags, "--from_resume", "1", kind="shared")
    assert same(*(load_file(run.out / folder / "model.safetensors") for folder in ("whole", "broken")))


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("name", STAGES)
def test_three_such_steps_in_a_row_end_the_run_and_a_lower_rate_goes_on(run, monkeypatch, capsys, name, where):
    poison, codes = Poison(monkeypatch, name, where, {3, 4, 5}), []
    monkeypatch.setattr(os, "_exit", codes.append)
    flags = ["--max_steps", "8", "--save_interval", "2", *ONE_UPDATE.get(name, [])]
    run(name, "run", *flags, before=poison.before, through=common.run)
    told = capsys.readouterr()
    assert codes == [2] and "Traceback" not in told.err
    message, = re.findall("error: .*", told.err)
    assert "3 steps in a row, last at step 6" in message and "--from_resume 1 and a lower --learning_rate" in message
    assert told.out.count("step skipped") == 3
    sound = run.states[2]["model"]  # at step 4, among those that are not finite, nothing is saved
    assert checkpoint.read_minillm(run.out / "run")["progress"]["step"] == 2
    poison.active = False
    final = run(name, "run", *flags, "--learning_rate", "1e-7", "--muon_learning_rate", "1e-7", "--from_resume", "1")
    assert final["steps"] == 8 and final["skipped_steps"] == 0
    assert "going on with changed flags: " in capsys.readouterr().out
    assert all(row["lr"] <= 1e-7 for row in lines(run.out / "run") if "lr" in row and row["step"] > 2)
    first = "policy." if name == "train_ppo" else ""  # the value model has a rate of its own
    moved = max((run.states[8]["model"][key] - value).abs().max() for key, value in sound.items()
                if key.startswith(first))
    assert moved < 1e-5, "it goes on from the sound weights, at the lower rate"


# -- A full disk -------------------------------------------------------------------------------------------------------
class Tap:
    """A file in which there is no room while `full`."""

    full = False

    def __init__(self, file):
        self.file = file

    def write(self, data):
        if Tap.full:
            raise OSError(28, "No space left on device")
        return self.file.write(data[:50])  # the system may take less than it was given

    def close(self):
        self.file.close()


@pytest.mark.parametrize("name", STAGES)
def test_disk_that_is_full_for_a_while_costs_neither_training_nor_a_line_of_the_log(run, monkeypatch, capsys, name):
    flags = ["--save_interval", "1", "--eval_interval", "2"]
    whole = run(name, "whole", *flags)
    real = checkpoint._check_space

    def check_space(*inputs):
        if Tap.full:
            raise OSError(28, "No space left on device")
        real(*inputs)

    monkeypatch.setattr(checkpoint, "_check_space", check_space)
    monkeypatch.setattr(logs, "open", lambda *a, **k: Tap(open(*a, **k)), raising=False)
    capsys.readouterr()
    final = run(name, "run", *flags, before=lambda step: setattr(Tap, "full", step in (2, 3)))
    told = capsys.readouterr().out
    assert final == whole
    assert_same_run(run.out / "whole", run.out / "run")
    assert told.count("Training goes on; last good checkpoint: step 2") == 2
    assert told.count("metrics.jsonl cannot be written") == 1


# -- Damaged checkpoints -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("harm", [cut, flip])
@pytest.mark.parametrize("file", ["model.safetensors", "resume/state.pt"])
def test_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(run, capsys, harm, file):
    def dying(step):
        if step == 5:
            raise KeyboardInterrupt

    flags = ["--save_interval", "2"]
    whole = run("train_pretrain", "whole", *flags)
    with pytest.raises(KeyboardInterrupt):
        run("train_pretrain", "broken", *flags, before=dying)
    harm(run.out / "broken" / file)
    assert run("train_pretrain", "broken", *flags, "--from_resume", "1") == whole
    told = capsys.readouterr().out
    assert f"{file} has" in told and "broken.previous instead" in told and "resumed at step 2" in told
    assert_same_run(run.out / "whole", run.out / "broken")


# -- Too little memory -------------------------------------------------------------------------------------------------
@pytest.mark.slow
@posix
def test_too_little_memory_is_one_message_with_the_flags_to_change(stage):
    """A real allocation that fails, because the process may not have more."""
    _, argv = stage("train_pretrain", "--batch_size", "20000", "--max_seq_len", "256", rows=4)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
    code = limit + "import common, train_pretrain; common.run(train_pretrain.main, train_pretrain.parse_args)"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3, done.stderr
    assert "--batch_size 10000 --accumulation_steps 2" in done.stderr and "--max_seq_len 128" in done.stderr
    assert "Traceback" not in done.stderr


# -- Real processes, killed at random ----------------------------------------------------------------------------------
KILLS = 6  # of each stage
LONG = 20  # steps; each is saved, so that many kills fall into a save
BEGUN = "memory of a step"  # what a script prints when its signals are caught, right before the loop


def real_run(name, argv, log):
    """The body of a child: the script as its last line starts it, with its output in a file."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    logs.plot_curves = lambda folder: None
    train_grpo.reward_correct = by_sum
    sys.argv = [f"{name}.py", *argv]
    module = importlib.import_module(name)
    common.run(module.main, module.parse_args)


@pytest.fixture(scope="module")
def children():
    """children(name, argv, log) -> a started process. A server that has imported torch once forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "conftest", *STAGES])

    def start(*what):
        process = context.Process(target=real_run, args=what)
        process.start()
        return process

    return start


def finish(process, code=0):
    process.join(300)
    assert process.exitcode == code


@pytest.fixture
def hunted(stage, children, tmp_path, name):
    """(start(folder, wait) -> process, in whose loop the training begins; seconds that this takes) after a whole run
    into out/whole. Without wait it has only been started."""

    def start(folder, wait=True):
        log = tmp_path / f"{folder}.log"
        begun = log.read_text().count(BEGUN) if log.exists() else 0
        process = begin(folder)
        while wait and process.exitcode is None and (not log.exists() or log.read_text().count(BEGUN) == begun):
            time.sleep(0.002)
        return process

    def begin(folder):
        _, argv = stage(name, "--dtype", "float32", "--max_steps", str(LONG), "--save_interval", "1", "--eval_interval",
                        "5", "--from_resume", "1", "--save_weight", folder, *STAGES[name])
        return children(name, argv, tmp_path / f"{folder}.log")

    finish(start("warm"))  # the first one also builds the token cache and starts the server
    process, began = start("whole"), time.monotonic()
    finish(process)
    return start, time.monotonic() - began


def saved_step(folder):
    """Step of the checkpoint that a resume would find; 0 when there is none yet."""
    try:
        with contextlib.redirect_stdout(None):
            return checkpoint.read_minillm(checkpoint.find(folder.parent, folder.name))["progress"]["step"]
    except FileNotFoundError:
        return 0


def changed_at(path):
    """When a folder was changed last; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.slow
@posix
@pytest.mark.parametrize("name", STAGES)
def test_kill_nine_at_random_moments_never_loses_a_run(hunted, tmp_path, name):
    """Runs are killed and resumed until there were enough kills; none is left behind a checkpoint it had, and what
    comes out in the end is bit-equal to the run that nobody killed."""
    start, seconds = hunted
    draw, out = random.Random(name), tmp_path / "out"
    kills, between, lineages, progress = 0, 0, 0, []
    while kills < KILLS:
        folder, before = f"run{lineages}", 0
        lineages += 1
        for _ in range(3):  # then it may finish
            process = start(folder, wait=draw.random() < 0.9)
            unfinished = changed_at(out / f"{folder}.tmp")
            process.join(draw.uniform(0, 0.6) * seconds)
            alive = process.exitcode is None
            process.kill()
            process.join()
            kills += alive
            between += changed_at(out / f"{folder}.tmp") not in (None, unfinished)
            now = saved_step(out / folder)
            assert now >= before, "a checkpoint that was there is gone"
            progress, before = [*progress, now], now
        finish(start(folder))
        assert_same_run(out / "whole", out / folder, LONG)
    print(f"\n{name}: {kills} kills in {lineages} runs of {LONG} steps, {between} of them in the middle of a save; "
          f"found at steps {progress}; every run ended bit-equal")


@pytest.mark.slow
@posix
@pytest.mark.parametrize("name", STAGES)
def test_signals_at_random_moments_never_lose_a_run(hunted, tmp_path, name):
    """One run after the other is stopped by each signal, also twice; then it finishes, bit-equal."""
    start, seconds = hunted
    draw, out, codes, log = random.Random(name), tmp_path / "out", [], tmp_path / "run.log"
    for numbers in ([signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGTERM] * 2, [signal.SIGINT] * 2):
        process, before = start("run"), saved_step(out / "run")
        time.sleep(draw.uniform(0, 0.15) * seconds)
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
            time.sleep(0.02)
        process.join(120)
        codes.append(process.exitcode)
        assert process.exitcode in (0, 128 + numbers[0]) and saved_step(out / "run") >= before
    finish(start("run"))
    assert_same_run(out / "whole", out / "run", LONG)
    text = log.read_text()
    assert "Traceback" not in text
    print(f"\n{name}: exit codes {codes}, {text.count('Go on with: ')} times the command to go on; ended bit-equal")
