"""Proves that an interrupted run goes on as if nothing had happened: weights, optimizer state and logged lines are
bit-equal to those of a run that was never stopped.

    python -m pytest tests/test_resume.py
"""
import argparse
import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from conftest import by_sum
from safetensors.torch import load_file
from test_ddp import free_port

import checkpoint
import common
import dataset
import logs
import metrics
import records
import train_grpo
import train_ppo
from model import Transformer
from train_pretrain import mean_cost, row_parts, trained_blocks

NAMES = ["train_pretrain", "train_sft"]
# all stages, with the flags that bring a state of their own into play
STAGES = {"train_pretrain": [], "train_sft": [], "train_reward": [], "train_dpo": [],
          "train_ppo": ["--adaptive_kl", "2"], "train_grpo": ["--updates_per_rollout", "2", "--beta", "0.1"],
          "train_distill": ["--alpha", "0.5"]}
STEPS = 6
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Killed(BaseException):
    """Stands for kill -9: no script catches it."""


class Moment:
    """Where a run ends before its time. As a context it watches the run from the start."""

    def __init__(self, kill=99, inside=None, behind=False, signals=(99,)):
        """kill: dies when it begins the step after this one. inside: (step, n), dies in the n-th backward pass of that
        step. behind: dies when the last checkpoint is whole. signals: (step, signals that come while it is done)."""
        self.kill, self.inside, self.behind, self.signals = kill, inside, behind, signals
        self.begun = self.passes = 0

    def step(self, real, *inputs):
        """In place of common.lr_scale(), which every script calls once at the beginning of a step."""
        self.begun, self.passes = self.begun + 1, 0
        if self.begun > self.kill:
            raise Killed
        for number in self.signals[1:] if self.begun == self.signals[0] else ():
            os.kill(os.getpid(), number)
        return real(*inputs)

    def backward(self, real, *inputs):
        """In place of torch.Tensor.backward()."""
        self.passes += 1
        if (self.begun, self.passes) == self.inside:
            raise Killed
        return real(*inputs)

    def end(self, folder):
        """In place of logs.plot_curves(), the last thing a run does; also saves its second."""
        if self.behind:
            raise Killed


def leave_at_once(code):
    """In place of os._exit(), which would end pytest."""
    raise Killed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs that were never stopped, each made once: what -> (folder, final metrics)."""
    return {}


@pytest.fixture
def run(stage, stage_of, monkeypatch, tmp_path, tmp_path_factory, finished):
    """run(name, folder, *flags, **moment) -> final metrics, or None when it was killed or stopped at this Moment.
    run.whole(name, *flags) -> (folder, final metrics) of a run that was never stopped."""
    monkeypatch.setattr(train_grpo, "reward_correct", by_sum)
    monkeypatch.setattr(os, "_exit", leave_at_once)
    before = [signal.signal(number, signal.SIG_DFL) for number in SIGNALS]  # SIG_DFL: pytest may run under nohup

    def start(name, folder, *flags, made=stage, rows=24, kind="dense", parent=None, **moment):
        module, argv = made(name, "--dtype", "float32", "--max_steps", str(STEPS), "--save_weight", folder,
                            "--accumulation_steps", "2", *STAGES[name], *flags, rows=rows, kind=kind, parent=parent)
        now = Moment(**moment)
        with monkeypatch.context() as patch:
            patch.setattr(common, "lr_scale", functools.partial(now.step, common.lr_scale))
            patch.setattr(torch.Tensor, "backward", functools.partialmethod(
                lambda tensor, real, *inputs: now.backward(real, tensor, *inputs), torch.Tensor.backward))
            patch.setattr(logs, "plot_curves", now.end)
            try:
                return module.main(module.parse_args(argv))
            except (Killed, common.Interrupted):
                return None

    def whole(name, *flags, **options):
        what = (name, flags, str(options))
        if what not in finished:
            folder = tmp_path_factory.mktemp("whole")
            final = start(name, "run", *flags, made=functools.partial(stage_of, folder), **options)
            finished[what] = (folder / "out" / "run", final)
        return finished[what]

    start.whole, start.out = whole, tmp_path / "out"
    yield start
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


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


def lines(folder):
    """Logged lines of a run without what clock and machine decide."""
    rows = records.read_metrics(folder.parent / "logs" / folder.name)
    return [{key: value for key, value in row.items()
             if key != "tokens_per_s" and not key.startswith(("time_", "sys_"))} for row in rows]


def same(a, b):
    """Whether two nested states are equal bit by bit (NaN as well: DPO's table has it where nothing was asked)."""
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(first, second, steps=STEPS):
    """Weights, whole resume state (optimizer, random numbers, best policy, tables ...) and logged lines are equal."""
    assert same(*(load_file(folder / "model.safetensors") for folder in (first, second)))
    states = [torch.load(folder / "resume" / "state.pt") for folder in (first, second)]
    assert states[0].keys() == states[1].keys() and {"model", "rng", "progress"} < states[0].keys()
    for part in states[0].keys() - {"args"}:
        assert same(states[0][part], states[1][part]), f"{second.name}: {part}"
    assert lines(first) == lines(second)
    assert [row["step"] for row in lines(second) if "lr" in row] == list(range(1, steps + 1))


FLAGS = ["--save_interval", "2", "--eval_interval", "2"]
EACH = ["--save_interval", "1", "--eval_interval", "2"]  # the same run, saved after each step
MOMENTS = {"in the second step": dict(kill=1), "in an accumulation window": dict(inside=(4, 2)),
           "in the last step": dict(inside=(STEPS, 1)), "behind the last save": dict(behind=True)}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", STAGES)
def test_killed_stage_equals_uninterrupted_stage(run, name, moment):
    """Saved after steps 2 and 4: what came later is done again, in the first case everything."""
    whole, final = run.whole(name, *FLAGS)
    assert run(name, "broken", *FLAGS, **MOMENTS[moment]) is None
    assert run(name, "broken", *FLAGS, "--from_resume", "1") == final
    assert_same_run(whole, run.out / "broken")
    assert all(row["grad_norm"] for row in lines(whole) if "lr" in row), "something was learnt in every step"


@pytest.mark.parametrize("name", STAGES)
def test_run_killed_after_its_first_step_goes_on_from_there(run, name, capsys):
    whole, final = run.whole(name, *FLAGS)
    assert run(name, "broken", *EACH, kill=1) is None
    assert run(name, "broken", *EACH, "--from_resume", "1") == final
    assert f"resumed at step 1 of {STEPS}" in capsys.readouterr().out
    assert_same_run(whole, run.out / "broken")


@pytest.mark.parametrize("name", STAGES)
def test_same_seed_gives_the_same_log_line_by_line_and_another_seed_another(run, name):
    whole, final = run.whole(name, *FLAGS)
    assert run(name, "again", *FLAGS) == final
    assert_same_run(whole, run.out / "again")
    run(name, "other", *FLAGS, "--seed", "7")
    assert len(lines(run.out / "other")) == len(lines(whole)) and lines(run.out / "other") != lines(whole)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion", "sophia", "schedulefree"])
@pytest.mark.parametrize("name", NAMES)
def test_killed_run_equals_uninterrupted_run(run, dropped_folder, tmp_path, name, optimizer):
    # a curvature estimate in steps 1 and 4: the resumed run begins between them
    flags = ["--save_interval", "2", "--eval_interval", "2", "--optimizer", optimizer, "--hessian_interval", "3"]
    run(name, "whole", *flags, parent=dropped_folder)
    # dies at the start of step 4 of 6, when step 3 is done and logged but only step 2 is saved
    assert run(name, "broken", *flags, kill=3, parent=dropped_folder) is None
    assert len([row for row in lines(run.out / "broken") if "loss" in row]) == 3
    run(name, "broken", *flags, "--from_resume", "1", parent=dropped_folder)
    assert_same_run(run.out / "whole", run.out / "broken")


@pytest.mark.parametrize("kind, optimizer", [("dense", "muon"), ("dense", "sophia"), ("dense", "schedulefree"),
                                             ("moe", "adamw"), ("shared", "muon")])
def test_killed_run_with_adapters_equals_uninterrupted_run(run, tmp_path, kind, optimizer):
    """Also with dropout on the adapters and noise on the embeddings. The frozen base is not in the resume state: it is
    read from the parent."""
    flags = ["--save_interval", "2", "--lora_rank", "2", "--lora_dropout", "0.3", "--optimizer", optimizer,
             "--hessian_interval", "3", "--neftune_alpha", "5"]
    whole = run("train_sft", "whole", *flags, kind=kind)
    run("train_sft", "broken", *flags, kill=3, kind=kind)
    assert run("train_sft", "broken", *flags, "--from_resume", "1", kind=kind) == whole
    assert_same_run(run.out / "whole", run.out / "broken")
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
    found = [[(row["loss"], row["grad_norm"]) for row in lines(run.out / o) if "loss" in row]
             for o in ("lion", "sophia")]
    assert found[0] == found[1] and len(found[0]) == STEPS


@pytest.mark.parametrize("kind", ["moe", "shared"])
@pytest.mark.parametrize("name", NAMES)
def test_killed_moe_run_equals_uninterrupted_run(run, tmp_path, name, kind):
    run(name, "whole", "--save_interval", "2", kind=kind)
    run(name, "broken", "--save_interval", "2", kill=3, kind=kind)
    run(name, "broken", "--save_interval", "2", "--from_resume", "1", kind=kind)
    assert_same_run(run.out / "whole", run.out / "broken")


@pytest.mark.parametrize("name", STAGES)
def test_resume_is_exact_at_and_around_an_epoch_boundary(run, name):
    """An epoch ends inside a step, exactly behind one, or inside a micro-batch: wherever, no sample is lost."""
    flags = ["--batch_size", "1", "--save_interval", "1", "--max_seq_len", "48"]
    rows = 4 if name == "train_grpo" else 7  # GRPO draws one prompt a step, in groups of two answers
    whole, _ = run.whole(name, *flags, rows=rows)
    stats = json.loads((whole.parent / "logs" / "run" / "dataset_stats.json").read_text())["train"]
    samples = stats.get("windows") or stats.get("rows") or stats["used"]
    assert samples < checkpoint.read_minillm(whole)["progress"]["position"], "the run is longer than an epoch"
    for kill in (2, 3, 4) if name in NAMES else (3,):
        run(name, f"broken{kill}", *flags, kill=kill, rows=rows)
        run(name, f"broken{kill}", *flags, "--from_resume", "1", rows=rows)
        assert_same_run(whole, run.out / f"broken{kill}")


def test_killed_run_with_a_live_reference_equals_uninterrupted_run(run):
    """DPO with the frozen model in memory instead of a table in the checkpoint."""
    flags = ["--save_interval", "2", "--reference", "live"]
    whole, final = run.whole("train_dpo", *flags)
    assert run("train_dpo", "broken", *flags, kill=3) is None
    assert run("train_dpo", "broken", *flags, "--from_resume", "1") == final
    assert_same_run(whole, run.out / "broken")


# -- Signals -----------------------------------------------------------------------------------------------------------
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@posix
@pytest.mark.parametrize("name, signals", [
    ("train_pretrain", ["SIGINT"]), ("train_pretrain", ["SIGTERM"]), ("train_pretrain", ["SIGHUP"]),
    ("train_sft", ["SIGTERM", "SIGTERM"]), ("train_reward", ["SIGINT", "SIGHUP"]), ("train_dpo", ["SIGINT"]),
    ("train_ppo", ["SIGHUP"]), ("train_grpo", ["SIGTERM"])], ids=lambda value: " ".join([value] * isinstance(value, str)
                                                                                     or value))
def test_signal_finishes_the_step_saves_and_prints_the_command_that_goes_on(run, name, signals, capsys):
    """Real signals, in the middle of step 3; a second one that is no Ctrl-C changes nothing."""
    whole, final = run.whole(name, *FLAGS)
    assert run(name, "broken", *FLAGS, signals=(3, *(getattr(signal, word) for word in signals))) is None
    text = capsys.readouterr().out
    assert "saved at step 3. Go on with: python " in text and text.rstrip().endswith("--from_resume 1")
    assert run(name, "broken", *FLAGS, "--from_resume", "1") == final
    assert_same_run(whole, run.out / "broken")


@posix
@pytest.mark.parametrize("name", NAMES)
def test_second_ctrl_c_harms_nothing(run, name):
    whole, final = run.whole(name, *FLAGS)
    assert run(name, "broken", *EACH, signals=(3, signal.SIGINT, signal.SIGINT)) is None
    assert checkpoint.read_minillm(run.out / "broken")["progress"]["step"] == 2
    assert run(name, "broken", *EACH, "--from_resume", "1") == final
    assert_same_run(whole, run.out / "broken")


@posix
@pytest.mark.parametrize("name", STAGES)
def test_signal_in_the_last_step_loses_nothing(run, name):
    whole, final = run.whole(name, *FLAGS)
    assert run(name, "broken", *FLAGS, signals=(STEPS, signal.SIGTERM)) is None
    assert not checkpoint.read_minillm(run.out / "broken")["finished"]
    assert run(name, "broken", *FLAGS, "--from_resume", "1") == final
    assert_same_run(whole, run.out / "broken")
    assert checkpoint.read_minillm(run.out / "broken")["finished"]


@pytest.mark.parametrize("name", STAGES)
def test_patience_ends_a_run_that_stands_still_and_a_killed_one_at_the_same_step(run, name, capsys):
    """Rates at which no weight moves: the second evaluation is as good as the first, the third step is the last. With
    patience for more, the same run goes on."""
    rates = {"--learning_rate": "1e-30", "--muon_learning_rate": "1e-30", "--value_learning_rate": "1e-30"}
    rates = [word for flag, rate in rates.items() if flag != "--value_learning_rate" or name == "train_ppo"
             for word in (flag, rate)]
    flags = ["--eval_interval", "1", "--save_interval", "1", *rates]
    whole = run(name, "whole", *flags, "--patience", "1")
    assert whole["steps"] == 3 and capsys.readouterr().out.count("patience is over") == 1
    assert run(name, "broken", *flags, "--patience", "1", kill=2) is None
    assert run(name, "broken", *flags, "--patience", "1", "--from_resume", "1") == whole
    assert_same_run(run.out / "whole", run.out / "broken", steps=3)
    assert run(name, "broken", *flags, "--patience", "5", "--from_resume", "1")["steps"] == STEPS
    assert "going on with changed flags: --patience: was 1, is 5" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train_sft", "train_dpo", "train_ppo", "train_grpo", "train_distill"])
def test_fixed_prompts_leave_a_run_as_it_is_and_a_killed_one_runs_them_at_the_same_evaluations(run, name, tmp_path,
                                                                                               dropped_folder):
    """Evaluations 1 to 3 are behind steps 2, 4 and 6; every second runs the suite, and the last. DPO alone has none
    before its first step. With dropout a draw too many would change all that follows."""
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps({"prompt": "What is 2 + 3?", "answer": "5", "check": "number"}) + "\n")
    chat = [*FLAGS, *["--stage", "sft"] * (name == "train_distill")]
    flags = [*chat, "--regression_interval", "2", "--regression_path", str(suite)]
    parent = dropped_folder if name in ("train_sft", "train_distill") else None
    final = run(name, "whole", *flags, parent=parent)
    assert run(name, "broken", *flags, kill=3, parent=parent) is None
    assert run(name, "broken", *flags, "--from_resume", "1", parent=parent) == final
    assert_same_run(run.out / "whole", run.out / "broken")
    measured = [row["step"] for row in lines(run.out / "whole") if "regression_pass_rate" in row]
    assert measured == [0, 4, 6][name == "train_dpo":]
    run(name, "without", *chat, parent=parent)
    bare = [{key: value for key, value in row.items() if key != "regression_pass_rate"}
            for row in lines(run.out / "whole")]
    assert bare == lines(run.out / "without")
    assert same(*(load_file(run.out / folder / "model.safetensors") for folder in ("whole", "without")))


@pytest.mark.parametrize("name", STAGES)
def test_a_run_may_go_on_in_fp16_which_had_no_scaler_until_then(run, name):
    """`--dtype` may change on a resume; the state of a scaler that was not in use is empty."""
    run(name, "run", "--max_steps", "1")
    final = run(name, "run", "--max_steps", "2", "--dtype", "fp16", "--from_resume", "1")
    assert final["steps"] == 2


@pytest.mark.parametrize("metric, values, patience, over", [
    ("val_loss", [3, 2, 1], 2, False), ("val_loss", [3, 1, 2, 1], 2, True), ("val_loss", [3, 1, 2, 0.9], 2, False),
    ("val_reward", [1], 1, False), ("val_reward", [1, 1], 1, True), ("exact_match", [1, 3, 2], 1, True),
    ("pass_at_1", [1, 3, 2, 4], 2, False), ("val_loss", [5, 6, 7], 0, False),
    ("regression_pass_rate", [0.5, 0.6], 1, False), ("regression_pass_rate", [0.6, 0.5, 0.6], 2, True)])
def test_patience_is_over_when_nothing_became_better(metric, values, patience, over):
    args = argparse.Namespace(patience=patience, patience_metric=metric)
    assert common.out_of_patience({"watched": values}, args) is over


@pytest.mark.parametrize("flags", [
    ["--length_warmup", "0.8"],  # rows of an eighth, a quarter and a half of the length come before
    ["--depth_warmup", "0.5"]])  # the upper half of the blocks joins with step 4
def test_killed_run_that_begins_smaller_equals_uninterrupted_run(run, flags):
    """Killed in step 4, saved behind step 2, of 6."""
    interval = ["--save_interval", "2"]
    whole = run("train_pretrain", "whole", *flags, *interval)
    run("train_pretrain", "broken", *flags, *interval, kill=3)
    assert run("train_pretrain", "broken", *flags, *interval, "--from_resume", "1") == whole
    assert_same_run(run.out / "whole", run.out / "broken")
    assert run("train_pretrain", "plain", *interval)["val_loss"] != whole["val_loss"]


def test_blocks_that_have_joined_stay_when_a_resume_moves_the_end_away(run):
    """The upper block joined with step 4 of 6; of 12 steps, step 5 would still be one of the lower half."""
    flags = ["--depth_warmup", "0.5", "--save_interval", "4"]
    run("train_pretrain", "longer", *flags, kill=4)
    before = load_file(run.out / "longer" / "model.safetensors")
    run("train_pretrain", "longer", *flags, "--from_resume", "1", "--max_steps", "12", "--save_interval", "1", kill=1)
    after = load_file(run.out / "longer" / "model.safetensors")
    assert not [name for name in before if torch.equal(before[name], after[name])], "every weight has moved in step 5"


def test_blocks_join_later_only_where_they_can(run):
    trained, _ = run.whole("train_pretrain")
    for flags, parent in ([["--optimizer", "sophia"], None], [["--optimizer", "schedulefree"], None], [[], trained]):
        with pytest.raises(ValueError, match="--depth_warmup 0.5 with --(optimizer|from_weight) .*leave"):
            run("train_pretrain", "refused", "--depth_warmup", "0.5", *flags, parent=parent)


def test_half_of_the_blocks_are_trained_in_their_share():
    assert [trained_blocks(done / 4, 0.5, 6) for done in range(5)] == [3, 3, 6, 6, 6]
    assert [trained_blocks(0.0, share, blocks) for share, blocks in [(0.0, 4), (1.0, 4), (0.5, 1), (0.5, 5)]] == [
        4, 2, 1, 2]


def test_rows_grow_in_thirds_of_their_share():
    assert [row_parts(done / 8, 0.75) for done in range(9)] == [8, 8, 4, 4, 2, 2, 1, 1, 1]
    assert {row_parts(done / 8, 0.0) for done in range(9)} == {1}


@pytest.mark.parametrize("depth, length, costs", [
    (0.0, 0.0, (60, 60, 60, 60)), (0.5, 0.0, (42, 42, 60, 60)), (0.0, 0.75, (46, 48, 52, 60)),
    (0.5, 0.75, (35, 36, 52, 60))])
def test_steps_to_come_cost_what_their_blocks_and_rows_do(depth, length, costs):
    """A head of 6 * 2 * 2 operations, two blocks of 10 and 1 for each token of a row; costs: of each quarter."""
    config = argparse.Namespace(num_hidden_layers=2, vocab_size=2, hidden_size=2)
    model = argparse.Namespace(config=config, flops_per_token=lambda tokens: 24 + 2 * (10 + tokens))
    args = argparse.Namespace(depth_warmup=depth, length_warmup=length, max_seq_len=8)
    assert mean_cost(model, args) == pytest.approx(sum(costs) / 4 / costs[0])


# -- Another number of processes ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def recording():
    """List that gets the samples which the loop of a training script draws: indices of windows, rows or pairs; in PPO
    and GRPO the numbers of the sampled answers, which say for which prompt they are."""
    drawn, begun = [], []
    lr_scale, position_batch, complete = common.lr_scale, dataset.TokenData.position_batch, metrics.complete

    def begin(*inputs):  # what is drawn before is no step: the pairs that DPO's reference scores
        begun.append(1)
        return lr_scale(*inputs)

    def batch(self, start, count):
        indices = position_batch(self, start, count)
        drawn.extend(indices.tolist() if begun and self.kind != "prompt" else ())
        return indices

    def answers(*inputs, **options):
        drawn.extend(number for number in options.get("row_seeds", ()) if number < train_ppo.EVAL_ROWS)
        return complete(*inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "lr_scale", begin)
        patch.setattr(dataset.TokenData, "position_batch", batch)
        patch.setattr(metrics, "complete", answers)
        patch.setattr(train_grpo, "reward_correct", by_sum)
        patch.setattr(logs, "plot_curves", lambda folder: None)
        yield drawn


def drawn_by(name, argv):
    """Samples that a run in this process draws."""
    module = importlib.import_module(name)
    with recording() as drawn:
        module.main(module.parse_args(argv))
    return drawn


def one_of_two(rank, jobs):
    """One of two processes: runs all jobs and writes down what it draws."""
    for name, argv, port, record in jobs:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        Path(f"{record}.{rank}").write_text(json.dumps(drawn_by(name, argv)))


@pytest.fixture(scope="module")
def changing(tmp_path_factory, stage_of):
    """changing[name] -> (folder, samples) of a run with one, two and again one process, two steps each; and of one that
    did the six steps alone. The step's batch stays as large."""
    made, jobs = {}, []
    for name in STAGES:
        folder = tmp_path_factory.mktemp("changing")

        def argv(processes, steps, *flags, name=name, folder=folder):
            return stage_of(folder, name, *STAGES[name], "--batch_size", str(4 // processes), "--max_steps", str(steps),
                            "--schedule", "constant", "--warmup_steps", "0", *flags)[1]

        made[name] = folder, argv, drawn_by(name, argv(1, 2))
        jobs.append((name, argv(2, 4, "--from_resume", "1"), free_port(), str(folder / "drawn")))
    context = torch.multiprocessing.spawn(one_of_two, (jobs,), nprocs=2, join=False)
    deadline = time.monotonic() + 600
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("two processes hang")
    runs = {}
    for name, (folder, argv, drawn) in made.items():
        for rank in range(2):
            drawn += json.loads((folder / f"drawn.{rank}").read_text())
        drawn += drawn_by(name, argv(1, 6, "--from_resume", "1"))
        alone = drawn_by(name, argv(1, 6, "--save_weight", "alone"))
        runs[name] = (folder / "out" / "run", drawn), (folder / "out" / "alone", alone)
    return runs


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo backend")
@pytest.mark.parametrize("name", STAGES)
def test_one_two_and_again_one_process_lose_no_sample_and_see_none_twice(changing, name):
    (folder, drawn), (alone, expected) = changing[name]
    assert len(expected) == 24 and Counter(drawn) == Counter(expected)
    if name not in (*NAMES, "train_distill"):  # there an epoch has as many samples as these steps draw; here it has not
        assert sorted(expected) == list(range(24))
    states = [torch.load(path / "resume" / "state.pt")["model"] for path in (folder, alone)]
    assert all((states[0][key] - value).abs().max() < 1e-9 for key, value in states[1].items())


# -- Other ends and beginnings -----------------------------------------------------------------------------------------
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
    assert_same_run(run.out / "whole", run.out / "broken")
    plain = run("train_sft", "plain", "--save_interval", "2")
    assert plain["val_loss"] != whole["val_loss"]


def test_resume_with_another_batch_goes_on_in_the_replayed_text_where_it_stopped(run, tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} is a number that was read before."}) + "\n" for i in range(99)))
    drawn, real = [], dataset.PretrainData.position_batch

    def position_batch(self, first, count):
        drawn.extend(range(first, first + count))
        return real(self, first, count)

    monkeypatch.setattr(dataset.PretrainData, "position_batch", position_batch)
    flags = ["--replay_path", str(text), "--replay_rows", "2", "--save_interval", "1"]
    run("train_sft", "broken", *flags, "--batch_size", "1", kill=3)
    run("train_sft", "broken", *flags, "--batch_size", "3", "--from_resume", "1")
    assert drawn == list(range(STEPS * 2 * 2)), "2 rows in each of 2 micro-batches of every step"


def test_dpo_resumed_with_a_smaller_batch_has_references_for_all_it_draws(run):
    """3 steps drew 24 pairs; as many pairs as 8 steps of the smaller batch would have drawn are but 16."""
    flags = ["--save_interval", "1", "--eval_interval", "0"]
    run("train_dpo", "broken", *flags, "--batch_size", "4", "--max_steps", "3", rows=48)
    final = run("train_dpo", "broken", *flags, "--batch_size", "1", "--max_steps", "8", "--from_resume", "1", rows=48)
    assert final["skipped_steps"] == 0 and final["steps"] == 8


def test_ppo_that_was_stopped_by_its_limits_stays_so_after_a_resume(run):
    flags = ["--kl_limit", "1e-9", "--learning_rate", "0.01", "--target_kl", "0", "--save_interval", "1"]
    whole = run("train_ppo", "whole", *flags)
    assert whole["stopped"] and whole["steps"] < STEPS
    run("train_ppo", "broken", *flags, signals=(whole["steps"], signal.SIGTERM))
    assert run("train_ppo", "broken", *flags, "--from_resume", "1") == whole


def test_reward_scale_survives_a_resume_without_an_evaluation(run):
    flags = ["--eval_interval", "2", "--save_interval", "1"]
    run("train_reward", "broken", *flags, kill=2)
    before = checkpoint.read_minillm(run.out / "broken")
    run("train_reward", "broken", *flags, "--from_resume", "1", kill=1)
    after = checkpoint.read_minillm(run.out / "broken")
    assert before["progress"]["step"] == 2 and after["progress"]["step"] == 3 and before["score_std"] != 1
    assert [after[key] for key in ("score_mean", "score_std")] == [before[key] for key in ("score_mean", "score_std")]
