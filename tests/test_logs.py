"""Proves what a run leaves behind: a metrics file without gaps or doubles after any interruption, curves, tables.

    python -m pytest tests/test_logs.py
"""
import json
import signal
import sys
import types

import pytest

import logs
from tokenizer import train


def steps(folder):
    """The steps of metrics.jsonl, read strictly: every line is a JSON object (and NaN is not JSON)."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse)["step"] for line in text.splitlines()]


def write(folder, numbers, **metrics):
    """A log with a line for each step."""
    log = logs.MetricLog(folder)
    for step in numbers:
        log.log(step, **metrics)
    return log


def test_resume_drops_later_lines_and_leaves_no_gaps_or_doubles(tmp_path):
    write(tmp_path, [1, 2, 2, 3, 4, 5], loss=1.0).file.close()  # step 2 twice: training and held-out line
    log = logs.MetricLog(tmp_path, resume_step=3)
    for step in (4, 5, 6):
        log.log(step, loss=0.5)
    assert steps(tmp_path) == [1, 2, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in logs.read_metrics(tmp_path)] == [1.0] * 4 + [0.5] * 3
    log.file.close()


def test_a_new_run_starts_an_empty_log(tmp_path):
    write(tmp_path, [1, 2], loss=1.0).file.close()
    (tmp_path / "curves.png").write_bytes(b"old")
    write(tmp_path, [1], loss=2.0).file.close()
    assert steps(tmp_path) == [1]
    assert not (tmp_path / "curves.png").exists()


def test_half_written_last_line_is_ignored(tmp_path):
    write(tmp_path, [1, 2], loss=1.0).file.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')  # what kill -9 can leave
    assert [row["step"] for row in logs.read_metrics(tmp_path)] == [1, 2]
    log = logs.MetricLog(tmp_path, resume_step=3)
    log.log(3, loss=0.5)
    assert steps(tmp_path) == [1, 2, 3]
    log.file.close()


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = write(tmp_path, [7], loss=1.0, note="中文")
    assert logs.read_metrics(tmp_path) == [{"step": 7, "loss": 1.0, "note": "中文"}]
    log.file.close()


def test_failed_resume_start_leaves_the_record(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3], loss=1.0).file.close()

    def full(*names):
        raise OSError("no space left on device")

    monkeypatch.setattr(logs.os, "replace", full)
    with pytest.raises(OSError):
        logs.MetricLog(tmp_path, resume_step=2)
    assert steps(tmp_path) == [1, 2, 3]


def test_numbers_that_json_lacks_become_null(tmp_path):
    write(tmp_path, [1], loss=float("nan"), grad_norm=float("inf"), lr=1 / 3, count=10**12).file.close()
    assert steps(tmp_path) == [1]
    assert logs.read_metrics(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.3333333,
                                            "count": 10**12}]


def test_other_ranks_write_nothing(tmp_path):
    log = logs.MetricLog(tmp_path / "run", is_main=False)
    log.log(1, loss=1.0)
    log.save_json("args.json", {})
    log.close()
    assert not list(tmp_path.iterdir())


PRETRAIN = [{"loss": 3.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 900}, {"val_loss": 3.1, "bits_per_byte": 1.5}]
RL = [{"reward": 0.3, "kl": 0.01, "entropy": 2.0, "clipfrac": 0.1, "value_loss": 0.5, "length": 20.0, "signal": 0.5},
      {"val_reward": 0.4, "exact_match": 0.2, "pass_at_1": 0.3}]


@pytest.mark.parametrize("kinds", [PRETRAIN, RL], ids=["pretrain", "rl"])
def test_curves_are_drawn_as_png(tmp_path, kinds):
    log = logs.MetricLog(tmp_path)
    for step in range(1, 60):
        log.log(step, **{name: value / step for name, value in kinds[0].items()})
        if step % 20 == 0:
            log.log(step, **kinds[1])
    log.log(60, **{name: float("nan") for name in kinds[0]})  # a step that was skipped
    log.close()
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5000


def test_every_metric_of_a_run_finds_a_panel(tmp_path):
    drawn = {key for _, keys in logs.PANELS for key in keys}
    assert not {key for kind in (*PRETRAIN, *RL) for key in kind} - drawn


def test_curves_without_numbers_are_left_out(tmp_path):
    write(tmp_path, [1, 2], note="nothing to draw", loss=float("nan")).close()
    write(tmp_path / "empty", []).close()
    assert not (tmp_path / "empty" / "curves.png").exists()


def test_rate_counts_tokens_since_the_last_call(tmp_path, monkeypatch):
    now = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(now))
    log = logs.MetricLog(tmp_path, is_main=False)
    log.count(100)
    log.count(100)
    assert log.rate() == 100
    assert log.rate() == 0


def test_table_aligns_chinese():
    text = logs.table(["skill", "n", "样本"], [["加法", 12, "三加四"], ["addition", 3, "ok"]])
    assert text == ("skill     n   样本\n"
                    "--------  --  ------\n"
                    "加法      12  三加四\n"
                    "addition  3   ok")


# -- Trackers ----------------------------------------------------------------------------------------------------------
class Fake:
    """Stands for all three trackers: notes each call; raises in the one it is told to."""

    def __init__(self, monkeypatch, fails=""):
        self.calls, self.fails = [], fails
        for name in ("wandb", "swanlab"):
            module = types.ModuleType(name)
            module.init, module.log, module.finish = self.make("init"), self.make("log"), self.make("finish")
            monkeypatch.setitem(sys.modules, name, module)
            monkeypatch.delenv(f"{name.upper()}_API_KEY", raising=False)
            monkeypatch.delenv(f"{name.upper()}_MODE", raising=False)
        board = types.ModuleType("torch.utils.tensorboard")
        self.add_scalar, self.close, init = self.make("log"), self.make("finish"), self.make("init")
        board.SummaryWriter = lambda *args, **options: init(*args, **options) or self
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)

    def make(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            if name == "init":
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # as swanlab's does
            if name == self.fails:
                raise SystemExit(1) if name == "finish" else RuntimeError("no route to host\nand more")

        return call

    def names(self):
        return [name for name, *_ in self.calls]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder: nobody is logged in."""
    monkeypatch.setattr(logs.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)
    (tmp_path / "home" / ".swanlab").mkdir(parents=True)
    return tmp_path / "home"


def track(folder, tracker, resume_step=None):
    """A short run's log with a tracker; returns the steps of its metrics.jsonl."""
    log = logs.MetricLog(folder, resume_step=resume_step, tracker=tracker)
    log.log(1, loss=2.0, lr=0.5, skipped=float("nan"), note="words", by_skill={"sum": 1})
    log.log(2, val_loss=1.5)
    log.close()
    return steps(folder)


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_tracker_gets_every_number_and_is_offline_by_default(tracker, tmp_path, home, monkeypatch):
    fake, before = Fake(monkeypatch), signal.getsignal(signal.SIGINT)
    track(tmp_path / "run", tracker)
    assert fake.names() == ["init", "log", "log", "finish"]
    options = fake.calls[0][2]
    assert options["mode"] == "offline" and {"run", str(tmp_path / "run")} <= set(options.values())
    assert [call[1:] for call in fake.calls[1:3]] == [(({"loss": 2.0, "lr": 0.5},), {"step": 1}),
                                                      (({"val_loss": 1.5},), {"step": 2})]
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C must go on to save the run"


def test_tensorboard_gets_every_number_and_hides_what_a_resume_repeats(tmp_path, home, monkeypatch):
    fake = Fake(monkeypatch)
    track(tmp_path / "run", "tensorboard")
    assert [args for name, args, _ in fake.calls if name == "log"] == [("loss", 2.0, 1), ("lr", 0.5, 1),
                                                                       ("val_loss", 1.5, 2)]
    track(tmp_path / "run", "tensorboard", resume_step=0)
    assert [options for name, _, options in fake.calls if name == "init"] == [{"purge_step": 0}, {"purge_step": 1}]


@pytest.mark.parametrize("tracker, login", [("wandb", ".netrc"), ("swanlab", ".swanlab/.netrc")])
def test_tracker_is_online_for_those_who_are_logged_in(tracker, login, tmp_path, home, monkeypatch):
    fake = Fake(monkeypatch)
    (home / login).write_text("machine example.com login x\n")
    track(tmp_path / "run", tracker)
    (home / login).write_text(f"machine api.{tracker}.example login x\n")
    track(tmp_path / "run", tracker)
    (home / login).unlink()
    monkeypatch.setenv(f"{tracker.upper()}_API_KEY", "x")
    track(tmp_path / "run", tracker)
    assert [options["mode"] for name, _, options in fake.calls if name == "init"] == ["offline", None, None]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "swanlab"])
def test_tracker_that_raises_costs_one_line_and_nothing_else(tracker, fails, tmp_path, home, monkeypatch, capsys):
    fake, before = Fake(monkeypatch, fails), signal.getsignal(signal.SIGINT)
    assert track(tmp_path / "run", tracker) == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before
    assert fake.names().count(fails) == 1, "not asked again"
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and text.count(";") == 2 and text.startswith("tracker off (")
    assert ("no route to host" in text) == (fails != "finish") and "and more" not in text


@pytest.mark.parametrize("tracker", ["wandb", "swanlab", "torch.utils.tensorboard"])
def test_missing_tracker_costs_one_line_and_nothing_else(tracker, tmp_path, home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, tracker, None)  # import raises ImportError
    assert track(tmp_path / "run", tracker.split(".")[-1]) == [1, 2]
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and tracker in text


def test_no_tracker_is_opened_by_default_or_by_other_ranks(tmp_path, home, monkeypatch):
    fake = Fake(monkeypatch)
    track(tmp_path / "run", "none")
    logs.MetricLog(tmp_path / "rank1", is_main=False, tracker="wandb").log(1, loss=1.0)
    assert not fake.calls


# -- Samples -----------------------------------------------------------------------------------------------------------
def test_samples_show_chinese_and_pieces_of_characters():
    tokenizer = train(["猫猫猫猫 cat cat"], vocab_size=270, backend="python", progress=False)
    ids = tokenizer.encode("猫\n") + tokenizer.encode("狗")
    text = logs.show_samples([("x", ids, [0, *[1] * (len(ids) - 1)])], tokenizer)
    lines = text.split("\n")
    assert lines[0] == f"-- x: {len(ids) - 1} of {len(ids)} tokens trained"
    assert [line.split() for line in lines if line.startswith("'猫'")] == [["'猫'", "'\\n'", "yes"]]
    assert lines[1:3] == ["猫", "狗"], "the whole text is readable"
    assert "'\\xe7'" in text, "a part of a character"


def test_middle_of_a_long_sample_is_left_out(tokenizer):
    ids = list(range(30, 130))
    whole = logs.show_samples([("x", ids, [1] * 100)], tokenizer, limit=1000).split("\n")
    short = logs.show_samples([("x", ids, [1] * 100)], tokenizer, targets=False, limit=10).split("\n")
    marked = [line for line in short if line.endswith("  yes")]
    assert len([line for line in whole if line.endswith("  yes")]) == 99
    assert len(marked) == 10 and any(line.startswith("(90 more)") for line in short)
