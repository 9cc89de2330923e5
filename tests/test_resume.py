"""Proves that an interrupted run goes on as if nothing had happened: weights, optimizer state and logged lines are
bit-equal to those of a run that was never stopped.

    python -m pytest tests/test_resume.py
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import common
import logs
import optim
from model import Transformer

ROOT = Path(common.__file__).parent
NAMES = ["train_pretrain", "train_sft"]
STEPS = 6


class Killed(BaseException):
    """Stands for kill -9: no script catches it."""


@pytest.fixture
def run(stage, monkeypatch, tmp_path):
    """run(name, folder, *flags, kill=None, stop=None) -> final metrics, or None when it was killed before step `kill`
    or stopped by a signal after step `stop`."""
    seen = {}

    def dying(optimizer, scale):
        seen["begun"] += 1
        if seen["begun"] > seen["kill"]:
            raise Killed
        return real(optimizer, scale)

    real = optim.set_lr
    monkeypatch.setattr(optim, "set_lr", dying)
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: None)
    monkeypatch.setattr(common.StopSignal, "stop",
                        lambda self, runtime: signal.SIGTERM if seen["begun"] == seen["stop"] else 0)

    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)  # a second each; test_logs.py draws some

    def start(name, folder, *flags, kill=99, stop=None, **options):
        seen.update(begun=0, kill=kill, stop=stop)
        module, argv = stage(name, "--dtype", "float32", "--max_steps", str(STEPS), "--save_weight", folder,
                             "--accumulation_steps", "2", *flags, **options)
        try:
            return module.main(module.parse_args(argv))
        except (Killed, common.Interrupted):
            return None

    return start


@pytest.fixture
def dropped_folder(model_folder, tmp_path):
    """A model with dropout: its random numbers must go on where they stopped, too."""
    model = Transformer.from_pretrained(model_folder())
    config = json.loads((model_folder() / "config.json").read_text())
    folder = tmp_path / "dropout"
    model.save_pretrained(folder)
    for file in model_folder().iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"dropout": 0.2}))
    assert Transformer.from_pretrained(folder).config.dropout == 0.2
    return folder


def lines(out, name):
    """Logged lines without what a clock decides."""
    return [{key: value for key, value in row.items() if key != "tokens_per_s"}
            for row in logs.read_metrics(out / "logs" / name)]


def same(a, b):
    """Whether two nested states are bit-equal."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(out, first, second):
    weights = [load_file(out / name / "model.safetensors") for name in (first, second)]
    assert same(*weights)
    states = [torch.load(out / name / "resume" / "state.pt") for name in (first, second)]
    for part in ("model", "optimizer", "scaler", "progress", "rng"):
        assert same(states[0][part], states[1][part]), part
    assert lines(out, first) == lines(out, second)
    assert [row["step"] for row in lines(out, second) if "loss" in row] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion", "sophia", "schedulefree"])
@pytest.mark.parametrize("name", NAMES)
def test_killed_run_equals_uninterrupted_run(run, dropped_folder, tmp_path, name, optimizer):
    # a curvature estimate in steps 1 and 4: the resumed run begins between them
    flags = ["--save_interval", "2", "--eval_interval", "2", "--optimizer", optimizer, "--hessian_interval", "3"]
    whole = run(name, "whole", *flags, parent=dropped_folder)
    # dies at the start of step 4 of 6, when step 3 is done and logged but only step 2 is saved
    assert run(name, "broken", *flags, kill=3, parent=dropped_folder) is None
    assert len([row for row in lines(tmp_path / "out", "broken") if "loss" in row]) == 3
    again = run(name, "broken", *flags, "--from_resume", "1", parent=dropped_folder)
    assert_same_run(tmp_path / "out", "whole", "broken")
    assert again == whole


@pytest.mark.parametrize("kind, optimizer", [("dense", "muon"), ("dense", "sophia"), ("dense", "schedulefree"),
                                             ("moe", "adamw"), ("shared", "muon")])
def test_killed_run_with_adapters_equals_uninterrupted_run(run, tmp_path, kind, optimizer):
    """Also with dropout on the adapters. The frozen base is not in the resume state: it is read from the parent."""
    flags = ["--save_interval", "2", "--lora_rank", "2", "--lora_dropout", "0.3", "--optimizer", optimizer,
             "--hessian_interval", "3"]
    whole = run("train_sft", "whole", *flags, kind=kind)
    run("train_sft", "broken", *flags, kill=3, kind=kind)
    assert run("train_sft", "broken", *flags, "--from_resume", "1", kind=kind) == whole
    assert_same_run(tmp_path / "out", "whole", "broken")
    files = [load_file(tmp_path / "out" / name / "adapter" / "adapter_model.safetensors")
             for name in ("whole", "broken")]
    assert same(*files)
    state = torch.load(tmp_path / "out" / "broken" / "resume" / "state.pt", weights_only=True)
    assert state["model"] and all(".lora_" in name for name in state["model"])


def test_resume_with_adapters_refuses_another_base(run, model_folder, tmp_path):
    shutil.copytree(model_folder(), tmp_path / "base")
    flags = ["--save_interval", "2", "--lora_rank", "2"]
    run("train_sft", "broken", *flags, kill=3, parent=tmp_path / "base")
    model = Transformer.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="the checkpoint it started from have changed"):
        run("train_sft", "broken", *flags, "--from_resume", "1", parent=tmp_path / "base")


@pytest.mark.parametrize("name", NAMES)
def test_curvature_estimate_leaves_the_step_itself_alone(run, dropped_folder, tmp_path, name):
    """It runs without dropout, so it takes no random number from the step, and its gradient does not stay."""
    for optimizer in ("lion", "sophia"):
        # a rate too small for fp32: all steps see the same weights
        run(name, optimizer, "--optimizer", optimizer, "--learning_rate", "1e-30", "--hessian_interval", "1",
            parent=dropped_folder)
    found = [[(row["loss"], row["grad_norm"]) for row in lines(tmp_path / "out", o) if "loss" in row]
             for o in ("lion", "sophia")]
    assert found[0] == found[1] and len(found[0]) == STEPS


@pytest.mark.parametrize("kind", ["moe", "shared"])
@pytest.mark.parametrize("name", NAMES)
def test_killed_moe_run_equals_uninterrupted_run(run, tmp_path, name, kind):
    run(name, "whole", "--save_interval", "2", kind=kind)
    run(name, "broken", "--save_interval", "2", kill=3, kind=kind)
    run(name, "broken", "--save_interval", "2", "--from_resume", "1", kind=kind)
    assert_same_run(tmp_path / "out", "whole", "broken")


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact_at_and_around_an_epoch_boundary(run, tmp_path, name, capsys):
    """An epoch ends inside a step, exactly behind one, or inside a micro-batch: wherever, no sample is lost."""
    flags = ["--batch_size", "1", "--accumulation_steps", "2", "--save_interval", "1", "--max_seq_len", "48"]
    run(name, "whole", *flags, rows=7)
    text = json.loads((tmp_path / "out" / "logs" / "whole" / "dataset_stats.json").read_text())["train"]
    samples = text.get("windows") or text.get("rows")
    assert samples and samples < 2 * STEPS, "the run is longer than an epoch"
    for kill in (2, 3, 4):
        folder = f"broken{kill}"
        run(name, folder, *flags, kill=kill, rows=7)
        run(name, folder, *flags, "--from_resume", "1", rows=7)
        assert_same_run(tmp_path / "out", "whole", folder)


@pytest.mark.parametrize("name", NAMES)
def test_signal_saves_and_prints_the_command_that_goes_on(run, tmp_path, name, capsys):
    run(name, "whole")
    assert run(name, "broken", stop=3) is None
    text = capsys.readouterr().out
    assert "saved at step 3. Go on with: python " in text and text.rstrip().endswith("--from_resume 1")
    run(name, "broken", "--from_resume", "1")
    assert_same_run(tmp_path / "out", "whole", "broken")


@pytest.mark.parametrize("name", NAMES)
def test_signal_in_the_last_step_loses_nothing(run, tmp_path, name):
    whole = run(name, "whole")
    run(name, "broken", stop=STEPS)
    again = run(name, "broken", "--from_resume", "1")
    assert_same_run(tmp_path / "out", "whole", "broken")
    assert checkpoint.read_minillm(tmp_path / "out" / "broken")["finished"]
    assert again["val_loss"] == whole["val_loss"]


@pytest.mark.parametrize("name", NAMES)
def test_finished_run_can_be_made_longer(run, tmp_path, name):
    flags = ["--schedule", "constant", "--warmup_steps", "2"]
    run(name, "whole", *flags)
    run(name, "short", *flags, "--max_steps", "3")
    run(name, "short", *flags, "--from_resume", "1")
    weights = [load_file(tmp_path / "out" / folder / "model.safetensors") for folder in ("whole", "short")]
    assert same(*weights)


@pytest.mark.parametrize("name", NAMES)
def test_needed_stage_is_resumed_then_skipped(run, tmp_path, name, capsys):
    run(name, "broken", "--save_interval", "2", "--if_needed", "1", kill=3)
    final = run(name, "broken", "--save_interval", "2", "--if_needed", "1")
    assert "was interrupted: resuming" in capsys.readouterr().out
    before = (tmp_path / "out" / "broken" / "model.safetensors").stat().st_mtime_ns
    again = run(name, "broken", "--save_interval", "2", "--if_needed", "1")
    assert "skipped" in capsys.readouterr().out
    assert again == final
    assert (tmp_path / "out" / "broken" / "model.safetensors").stat().st_mtime_ns == before


def test_full_disk_at_the_end_is_no_success(run, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "_check_space", lambda *inputs: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises((ValueError, OSError)):
        run("train_pretrain", "full")


def test_kill_nine_in_the_middle_of_saving_loses_no_more_than_one_interval(stage, tmp_path):
    """A real process that saves at every step is killed at moments that nobody chose."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    flags = ["--save_interval", "1", "--dtype", "float32", "--max_steps", "40"]
    module, argv = stage("train_pretrain", *flags, "--save_weight", "broken", "--from_resume", "1")
    process = subprocess.Popen([sys.executable, str(ROOT / "train_pretrain.py"), *argv], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = tmp_path / "out" / "logs" / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if record.exists() and len(record.read_text().splitlines()) > 6:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was still training"
    module.main(module.parse_args(argv))
    _, argv = stage("train_pretrain", *flags, "--save_weight", "whole")
    module.main(module.parse_args(argv))
    assert lines(tmp_path / "out", "whole") == lines(tmp_path / "out", "broken")
    weights = [load_file(tmp_path / "out" / folder / "model.safetensors") for folder in ("whole", "broken")]
    assert same(*weights)


def test_killed_run_with_replay_equals_uninterrupted_run(run, tmp_path):
    """Pretraining text beside the conversations: its place goes on as well, also behind its last window."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} is a number that was read before."}) + "\n" for i in range(9)))
    flags = ["--replay_path", str(text), "--replay_rows", "1", "--save_interval", "2"]
    whole = run("train_sft", "whole", *flags)
    stats = json.loads((tmp_path / "out" / "logs" / "whole" / "dataset_stats.json").read_text())
    assert stats["replay"]["windows"] < 2 * STEPS, "the text is read more than once"
    run("train_sft", "broken", *flags, kill=3)
    assert run("train_sft", "broken", *flags, "--from_resume", "1") == whole
    assert_same_run(tmp_path / "out", "whole", "broken")
    plain = run("train_sft", "plain", "--save_interval", "2")
    assert plain["val_loss"] != whole["val_loss"]
