"""Proves what a run leaves behind: a metrics file without gaps or doubles after any interruption, curves, tables.

    python -m pytest tests/test_logs.py
"""
import io
import json
import re
import signal
import sys
import types

import pytest
from conftest import DATA

import common
import logs
import records
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
    assert [row["loss"] for row in records.read_metrics(tmp_path)] == [1.0] * 4 + [0.5] * 3
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
        file.write('{}\n[1]\n{"step": "x"}\n{"step": 3, "lo')  # what others, and what kill -9 can leave
    assert [row["step"] for row in records.read_metrics(tmp_path)] == [1, 2]
    log = logs.MetricLog(tmp_path, resume_step=3)
    log.log(3, loss=0.5)
    assert steps(tmp_path) == [1, 2, 3]
    log.file.close()


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = write(tmp_path, [7], loss=1.0, note="中文")
    assert records.read_metrics(tmp_path) == [{"step": 7, "loss": 1.0, "note": "中文"}]
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
    assert records.read_metrics(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.3333333,
                                            "count": 10**12}]


def test_alarms_are_printed_and_known_behind_a_resume(tmp_path, capsys):
    log = write(tmp_path, [1], loss=1.0)
    log.log(2, loss=1.0, alarm="grad_attn 0: cut off", sys_alarm="sys_rss_mb 9: full")
    log.log(3, alarm="update_mlp 1: too high")
    assert capsys.readouterr().out == ("    step 2: grad_attn 0: cut off\n    step 2: sys_rss_mb 9: full\n"
                                       "    step 3: update_mlp 1: too high\n")
    log.file.close()
    again = logs.MetricLog(tmp_path, resume_step=2)
    assert again.alarms == ["grad_attn 0: cut off", "sys_rss_mb 9: full"], "that of step 3 may come again"
    assert logs.MetricLog(tmp_path, is_main=False).alarms == []
    again.file.close()


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


# -- Live --------------------------------------------------------------------------------------------------------------
def test_curves_are_drawn_at_their_interval_and_cost_no_throughput(tmp_path, monkeypatch):
    now, drawn = [0.0], []

    def draw(folder):
        now[0] += 100.0
        drawn.append(steps(folder)[-1])

    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(logs, "plot_curves", draw)
    log = logs.MetricLog(tmp_path, plot_interval=20)
    for step in range(1, 51):
        now[0] += 1.0
        log.count(7)
        if step % 8 == 0:
            assert log.rate() == 7
            log.log(step, loss=1.0)
    assert drawn == [24, 48], "at the first line 20 steps behind the last picture"
    log.close()
    assert drawn == [24, 48, 48]
    logs.MetricLog(tmp_path, resume_step=24, plot_interval=20).log(40, loss=1.0)
    assert drawn == [24, 48, 48], "20 steps behind the resume"
    logs.MetricLog(tmp_path, resume_step=24).log(999, loss=1.0)
    assert drawn == [24, 48, 48], "0: never on the way"


@pytest.mark.parametrize("values, line", [([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([-1.0, 0.0, 1.0], "▁▅█"),
                                          ([0.01, 0.1, 1.0], "▁▅█"), ([8.0, 4.0, 2.0, 1.0], "█▆▃▁")])
def test_sparkline_reaches_from_lowest_to_highest(values, line):
    assert logs.sparkline(values) == line


def test_long_sparkline_averages_neighbours():
    line = logs.sparkline([float(-i) for i in range(1000)], width=10)
    assert line == "█▇▆▆▅▄▃▃▂▁" and logs.sparkline([1.0, 1.0, 100.0, 100.0], width=2) == "▁█"


class Screen(io.StringIO):
    """A terminal that keeps what is written to it, or a file."""

    def __init__(self, live):
        super().__init__()
        self.isatty = lambda: live


@pytest.mark.parametrize("live", [True, False])
def test_sparkline_is_drawn_in_a_terminal_only(live, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(live))
    log = logs.MetricLog(tmp_path)
    bar = log.progress(3, "sft")
    for step, loss in ((1, 4.0), (2, float("nan")), (3, 1.0)):
        bar.update()
        log.log(step, loss=loss)
    log.log(3, val_loss=2.0)
    bar.close()
    text = sys.stderr.getvalue()
    assert ("█▁ 4 -> 1" in text) == live and (" -> " in text) == live and "sft" in text
    log.file.close()


def test_sparkline_of_a_policy_shows_its_reward_and_goes_on_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(True))
    write(tmp_path, [1, 2], loss=0.1, reward=-1.0).file.close()
    log = logs.MetricLog(tmp_path, resume_step=2)
    bar = log.progress(3, "grpo", 2)
    log.log(3, loss=0.5, reward=1.0)
    bar.close()
    assert "▁▁█ -1 -> 1" in sys.stderr.getvalue()
    log.file.close()


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


# -- Verdicts ----------------------------------------------------------------------------------------------------------
def history(held, losses, every=10, key="val_loss", train="loss", **more):
    """Rows of a run: a training line a step, an evaluation every `every` steps, the first before step 1."""
    rows = [{"step": 0, key: held[0]}]
    for step, loss in enumerate(losses, 1):
        usual = {"step": step, train: loss, "grad_norm": 1.0, "lr": 1e-3}
        rows.append(usual | {name: values[step - 1] for name, values in more.items()})
        if step % every == 0 and step // every < len(held):
            rows.append({"step": step, key: held[step // every]})
    return rows


def falling(count, start=8.0):
    """A loss as a power of the step, with a little noise of its own."""
    return [start * step ** -0.3 * (1 + 0.02 * (-1) ** step) for step in range(1, count + 1)]


GOOD = falling(60)
HELD = [8.0, *falling(60)[9::10]]


def test_falling_run_is_fine_at_each_evaluation():
    rows = history(HELD, GOOD)
    said = [logs.verdict(rows[:i + 1]) for i, row in enumerate(rows) if "val_loss" in row]
    assert said == ["", *["fine"] * 6]


@pytest.mark.parametrize("rows", [[], [{"step": 0, "val_loss": 8.0}], [{"step": 1, "loss": 8.0}]])
def test_no_verdict_without_training_and_evaluation(rows):
    assert logs.verdict(rows) == ""


def test_single_evaluation_is_fine_or_unstable():
    """DPO has none at step 0."""
    assert logs.verdict([{"step": 1, "loss": 0.69, "grad_norm": 1.0}, {"step": 1, "val_loss": 0.6}]) == "fine"
    assert logs.verdict([{"step": 1, "loss": 0.69, "grad_norm": 1.0}, {"step": 1, "val_loss": None}]).startswith("unst")


def test_two_steps_that_are_not_finite_are_unstable_and_one_is_not():
    for lost, word in (([55], "fine"), ([55, 56], "unstable"), ([12, 13], "fine")):
        rows = history(HELD, GOOD)
        for row in rows:
            if row["step"] in lost and "loss" in row:
                row.update(loss=None, grad_norm=None)
        assert logs.verdict(rows).split(":")[0] == word, lost
    rows = history(HELD, GOOD, grad_norm=[*[1.0] * 58, None, None])
    assert "not finite" in logs.verdict(rows), "bf16: the gradient alone can overflow"
    rows = history(HELD[:2], GOOD[:10], grad_norm=[*[None] * 5, *[1.0] * 5])
    assert logs.verdict(rows) == "fine", "fp16 finds its scale"


def test_held_out_value_that_is_not_finite_is_unstable():
    assert logs.verdict(history([*HELD[:-1], None], GOOD)).startswith("unstable: the held-out loss is not finite")


def test_loss_that_rises_beyond_its_noise_is_unstable():
    best = sum(GOOD[50:55]) / 5
    for factor, word in ((1.04, "fine"), (1.2, "unstable")):
        said = logs.verdict(history(HELD, [*GOOD[:55], *[best * factor] * 5]))
        assert said.split(":")[0] == word, factor
    noisy = [2.0 + 0.3 * (-1) ** (step // 3) for step in range(60)]
    assert logs.verdict(history(HELD, noisy)) == "fine", "as far apart as lines always were"


def test_gradient_norm_that_grows_is_unstable():
    for last, word in ((9.0, "fine"), (11.0, "unstable")):
        norms = [*[5.0] * 20, *[1.0] * 30, *[last] * 10]
        assert logs.verdict(history(HELD, GOOD, grad_norm=norms)).split(":")[0] == word
    started_high = [*[50.0] * 20, *[1.0] * 30, *[40.0] * 10]
    assert logs.verdict(history(HELD, GOOD, grad_norm=started_high)) == "fine"


def test_held_out_loss_that_rises_twice_while_training_falls_is_overfitting():
    assert logs.verdict(history([8, 4, 3, 2.8, 2.8, 2.9, 3.0], GOOD)).startswith(
        "overfitting: the held-out loss was best at step 30, 2.8, and is 3, while the training loss got better")
    assert logs.verdict(history([8, 4, 3, 2.8, 2.7, 2.6, 3.0], GOOD)) == "fine", "once may be an accident"
    assert logs.verdict(history([8, 4, 3, 2.8, 2.7, 2.75, 2.76], GOOD)) == "fine", "less than 3%"
    flat = [*GOOD[:30], *[sum(GOOD[25:30]) / 5] * 30]
    assert not logs.verdict(history([8, 4, 3, 2.5, 2.5, 2.9, 3.0], flat)).startswith("over"), "nothing is learnt either"
    assert logs.verdict(history([2.8, 2.9, 3.0], GOOD[:20])).startswith("overfitting"), "from a start that was best"


def test_second_half_that_brings_nothing_is_a_plateau():
    assert logs.verdict(history([8, 4, 3, 2.5, 2.495, 2.499, 2.49], GOOD)).startswith(
        "plateau: the held-out loss is no better than before step 30")
    assert logs.verdict(history([8, 4, 3, 2.5, 2.49, 2.48, 2.47], GOOD)) == "fine", "1% is something"
    assert logs.verdict(history([8, 8, 8, 8], GOOD[:30])) == "fine", "two evaluations in the second half are too few"
    assert logs.verdict(history([8] * 7, [8.0] * 60)).startswith("plateau"), "nothing learnt at all"


def test_warm_up_and_a_flat_reference_are_no_plateau():
    rising = [step * 1e-5 for step in range(60)]
    assert logs.verdict(history([8.0] * 7, [8.0] * 60, lr=rising)) == "fine"
    rows = history([8, 4, 3, 2.5, 2.5, 2.5, 2.5], GOOD)
    assert logs.verdict(rows, normal=(2.4, 2.6)) == "fine"
    assert logs.verdict(rows, normal=(2.0, 2.2)).startswith("plateau")


@pytest.mark.parametrize("key", ["val_reward", "pass_at_1"])
def test_rewards_are_better_when_higher(key):
    rewards = [0.01 * step + 0.02 * (-1) ** step for step in range(60)]
    rising = history([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], rewards, key=key, train="reward")
    assert logs.verdict(rising) == "fine"
    said = logs.verdict(history([0.0, 0.1, 0.4, 0.5, 0.4, 0.3, 0.2], rewards, key=key, train="reward"))
    assert said.startswith("overfitting") and "was best at step 30, 0.5, and is 0.2" in said
    collapsed = history([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.2], [*rewards[:50], *[0.1] * 10], key=key, train="reward")
    assert logs.verdict(collapsed).startswith("unstable: the training reward went from")
    same = history([0.0, 0.5, *[0.5] * 11], [0.5] * 120, key=key, train="reward")
    assert logs.verdict(same).startswith("plateau")
    assert logs.verdict(history([0.0, *[0.5] * 6], [0.5] * 60, key=key, train="reward")) == "fine", "answers are drawn"


# -- Reference curves --------------------------------------------------------------------------------------------------
CONDITIONS = {"stage": "pretrain", "model": {"hidden_size": 128}, "data": ["a", "b"], "parents": [],
              "batch_tokens": 2048, "steps": 60}


def finished(folder, held=HELD, losses=GOOD, seed=1, **changes):
    """A log folder of a finished run."""
    log = logs.MetricLog(folder, conditions=CONDITIONS | changes)
    log.save_json("args.json", {"seed": seed, "dtype": "float32"})
    for row in history(held, losses):
        log.log(**row)
    log.file.close()
    return str(folder)


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """An empty folder of reference curves, in the place of ours."""
    monkeypatch.setattr(logs, "CURVES", tmp_path / "assets" / "curves")
    return logs.CURVES


def test_curve_of_runs_is_found_by_their_conditions_only(tmp_path, curves, capsys):
    runs = [finished(tmp_path / f"seed{i}", losses=falling(60, 8 + i / 10), seed=i) for i in range(3)]
    assert logs.main(logs.parse_args([*runs, "--reference", str(curves / "mine.json")])) == 0
    curve = logs.find_curve(CONDITIONS)
    assert curve["file"] == "assets/curves/mine.json" and set(curve["bands"]) == {"loss", "val_loss"}
    assert [run["seed"] for run in curve["runs"]] == [0, 1, 2] and curve["runs"][0]["command"].startswith("python ")
    for key, value in CONDITIONS.items():
        other = value + 1 if isinstance(value, int) else [*value, "x"] if isinstance(value, list) else f"{value}x"
        assert logs.find_curve(CONDITIONS | {key: other}) is None, key
    assert max(len(line) for line in (curves / "mine.json").read_text().split("\n")[-20:]) < 80, "a point a line"
    assert capsys.readouterr().out.count("\n") == 1


def test_band_holds_the_runs_it_was_made_of(tmp_path, curves):
    series = [falling(60, start) for start in (7.9, 8.0, 8.2)]
    runs = [finished(tmp_path / f"seed{i}", losses=losses) for i, losses in enumerate(series)]
    curve = {"bands": logs.make_curve(runs)["bands"]}
    for step in range(1, 61):
        low, high = logs.band(curve, "loss", step)
        assert all(low <= losses[step - 1] <= high for losses in series)
        assert step < 10 or high - low < 0.25 * low, "and is narrow enough to say something"
    low, high = logs.band(curve, "val_loss", 60)
    assert (low, high) == pytest.approx((0.98 * HELD[6], 1.02 * HELD[6]), rel=1e-3), "runs that agree: 2%"


def test_shares_stay_between_0_and_1(tmp_path):
    assert logs._band_points([{5: 0.9}, {5: 1.0}, {5: 0.95}], share=True) == [[5, 0.8, 1.0]]
    assert logs._band_points([{5: 0.01}, {5: 0.1}], share=True)[0][1] == 0.0
    assert logs._band_points([{5: 0.5}, {5: 0.5}], share=True) == [[5, 0.45, 0.55]]
    assert logs._band_points([{5: -0.1}, {5: 0.1}]) == [[5, -0.3, 0.3]]
    assert logs._band_points([{5: 2.0}]) == [[5, 1.9, 2.1]], "one run: 5%"


def test_band_between_points_is_a_line_over_the_logarithm_and_ends_where_they_are_far_apart():
    curve = {"bands": {"loss": [(0, 8, 9), (10, 4.0, 5.0), (20, 3.0, 4.0), (50, 2.0, 3.0)]}}
    assert logs.band(curve, "loss", 20) == (3.0, 4.0)
    low, high = logs.band(curve, "loss", 200 ** 0.5)
    assert (low, high) == pytest.approx((3.5, 4.5))
    for step in (-1, 5, 30, 51):
        assert logs.band(curve, "loss", step) is None
    assert logs.band(curve, "val_loss", 20) is None and logs.band(None, "loss", 20) is None


def test_runs_that_differ_or_are_not_finished_make_no_curve(tmp_path, curves, capsys):
    good = finished(tmp_path / "good")
    for other, word in ((finished(tmp_path / "other", batch_tokens=1), "batch_tokens"),
                        (finished(tmp_path / "short", losses=GOOD[:50]), "ends at step 50 of 60"),
                        (str(tmp_path / "gone"), "no log")):
        assert logs.main(logs.parse_args([good, other, "--reference", str(curves / "x.json")])) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and word in text and text.count(";") >= 2
    timed = finished(tmp_path / "timed", steps=None)
    assert logs.main(logs.parse_args([timed, "--reference", str(curves / "x.json")])) == 2
    assert not curves.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"bands": {}}', "\x80", '{"bands": {"loss": [[1, 2]]}, "conditions": {}}',
                                  '{"bands": {"loss": 3}, "conditions": {}}'])
def test_damaged_curve_costs_one_line_and_hides_no_other(text, tmp_path, curves, capsys):
    logs.main(logs.parse_args([finished(tmp_path / "run"), "--reference", str(curves / "good.json")]))
    (curves / "bad.json").write_text(text, encoding="latin-1")
    capsys.readouterr()
    assert logs.find_curve(CONDITIONS)["file"].endswith("good.json")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "bad.json cannot be used" in said and said.count(";") == 2


def test_value_outside_the_band_is_named_with_causes_once(tmp_path):
    curve = {"file": "x.json", "bands": {"val_loss": [(10 * i, 2.0, 2.4) for i in range(1, 7)]}}
    said = [logs.off_normal(history([8, 2.2, 2.9, 2.3, 2.9, 1.9, 1.8][:count], GOOD), curve) for count in range(1, 8)]
    assert said[0] == said[1] == said[3] == ""
    assert said[2].startswith("held-out loss 2.9 is worse than normal here (2.00-2.40 in x.json); likely: other rates")
    assert said[4] == "worse than normal here"
    assert "1.9 is better than normal here" in said[5] and said[6] == "better than normal here"
    assert logs.off_normal(history([8, 2.9], GOOD[:10]), None) == ""
    curve["bands"]["val_loss"].insert(0, (0, 1.0, 2.0))
    assert logs.off_normal(history([8, 2.9], GOOD[:10]), curve).startswith("held-out loss 2.9 is worse"), "not step 0"


def test_run_is_told_what_is_expected_and_draws_it(tmp_path, curves, capsys):
    logs.main(logs.parse_args([finished(tmp_path / "run"), "--reference", str(curves / "mine.json")]))
    capsys.readouterr()
    log = logs.MetricLog(tmp_path / "again", conditions=CONDITIONS)
    assert capsys.readouterr().out == "what is normal for this run is known: assets/curves/mine.json\n"
    for row in history(HELD, GOOD):
        log.log(**row)
    text = log.expected(60, "val_loss")
    assert text.startswith(" (expected ") and text.endswith(" here)") and log.expected(60, "entropy") == ""
    log.judge()
    assert capsys.readouterr().out == "    verdict: fine\n"
    assert records.read_metrics(tmp_path / "again")[-1] == {"step": 60, "verdict": "fine"}
    log.close()
    plain = tmp_path / "plain" / "curves.png"
    plain.parent.mkdir()
    (tmp_path / "plain" / "metrics.jsonl").write_bytes((tmp_path / "again" / "metrics.jsonl").read_bytes())
    logs.plot_curves(plain.parent)
    assert (tmp_path / "again" / "curves.png").read_bytes() != plain.read_bytes(), "the band is drawn"
    longer = logs.MetricLog(tmp_path / "again", resume_step=60, conditions=CONDITIONS | {"steps": 100})
    assert longer.expected(60, "val_loss") == "" and not (tmp_path / "again" / "reference.json").exists()
    longer.file.close()


def test_other_ranks_say_nothing(tmp_path, curves, capsys):
    logs.main(logs.parse_args([finished(tmp_path / "run"), "--reference", str(curves / "mine.json")]))
    capsys.readouterr()
    log = logs.MetricLog(tmp_path / "run", is_main=False, conditions=CONDITIONS)
    log.judge()
    assert log.expected(60, "loss") == "" and capsys.readouterr().out == ""


def test_finished_run_is_judged_again(tmp_path, curves, capsys):
    run = finished(tmp_path / "run", held=[8, 4, 3, 2.8, 2.8, 2.9, 3.0])
    assert logs.main(logs.parse_args([run])) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[1].split()[:3] == ["step", "held-out", "loss"]
    assert [line.split()[-1] for line in lines[4:8]] == ["fine"] * 4 and "overfitting: the held-out" in lines[9]
    assert logs.main(logs.parse_args([str(tmp_path)])) == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_running_mean_is_shorter_at_the_ends():
    assert logs._means([(10, 1.0), (20, 2.0), (30, 6.0), (40, 10.0)], 3) == [(10, 1.5), (20, 3.0), (30, 6.0), (40, 8.0)]
    assert logs._means([(1, 5.0), (2, 7.0)], 1) == [(1, 5.0), (2, 7.0)]


def test_runs_are_drawn_over_each_other(tmp_path, monkeypatch, capsys):
    drawn, line = [], logs._line

    def note(axis, points, label, color):
        drawn.append((axis.get_title(), label, points, color))
        line(axis, points, label, color=color)

    monkeypatch.setattr(logs, "_line", note)
    runs = [finished(tmp_path / "a"), finished(tmp_path / "b", held=[8, 4, 3, 2.9, 2.8, 2.7, 2.6])]
    picture = tmp_path / "new" / "both.png"
    assert logs.main(logs.parse_args([*runs, "--plot", str(picture), "--keys", "val_loss"])) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [(title, label, color) for title, label, _, color in drawn] == [("val_loss", "a", "C0"),
                                                                          ("val_loss", "b", "C1")]
    assert drawn[1][2] == [(10 * i, value) for i, value in enumerate([8, 4, 3, 2.9, 2.8, 2.7, 2.6])]
    drawn.clear()
    assert logs.main(logs.parse_args([runs[0], runs[0], "--plot", str(picture)])) == 0
    assert {"loss", "val_loss"} <= {title for title, *_ in drawn} and {label for _, label, *_ in drawn} == {runs[0]}
    drawn.clear()
    seeds = [finished(tmp_path / seed / "logs" / "ppo") for seed in ("seed1", "seed2")]
    assert logs.main(logs.parse_args([*seeds, "--plot", str(picture), "--keys", "val_loss"])) == 0
    assert [label for _, label, *_ in drawn] == ["seed1", "seed2"]
    for flags, said in (([*runs, "--keys", "val_loss", "los"], "--keys los: none of the runs has logged it"),
                        ([*runs, str(tmp_path)], f"{tmp_path}: no metrics.jsonl with a line")):
        assert logs.main(logs.parse_args([*flags, "--plot", str(picture)])) == 2
        assert said in capsys.readouterr().err


def test_shipped_curves_are_whole():
    for path in logs.CURVES.glob("*.json"):
        curve = json.loads(path.read_text(encoding="utf-8"))
        assert logs.find_curve(curve["conditions"])["file"].endswith(path.name), "and no other has its conditions"
        assert "loss" in curve["bands"] and curve["runs"][0]["command"].startswith("python train_")
        for key, points in curve["bands"].items():
            steps = [step for step, *_ in points]
            assert steps == sorted(set(steps)) and steps[-1] == curve["conditions"]["steps"], key
            assert all(low < high for _, low, high in points), key


# -- A real run --------------------------------------------------------------------------------------------------------
def test_run_under_the_same_conditions_hears_what_is_normal_also_after_a_resume(stage, tmp_path, curves, monkeypatch,
                                                                                capsys):
    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: None)
    monkeypatch.setattr(common.StopSignal, "stop", lambda self, runtime: signal.SIGTERM if self.__dict__.pop("end", 0)
                        else 0)

    def start(name, *flags):
        module, argv = stage("train_pretrain", "--eval_interval", "1", "--save_weight", name, *flags)
        module.main(module.parse_args(argv))
        return capsys.readouterr().out

    start("first")
    folder = str(tmp_path / "out" / "logs" / "first")
    assert logs.main(logs.parse_args([folder, "--reference", str(curves / "tiny.json")])) == 0
    text = start("other", "--seed", "7", "--learning_rate", "1e-9")  # another recipe, the same conditions
    assert "what is normal for this run is known: assets/curves/tiny.json" in text
    assert text.count("    verdict: ") == 4 and len(re.findall(r"held-out loss [\d.]+ \(expected [\d.]+-", text)) == 4
    assert "expected" not in start("long", "--max_steps", "5") and "expected" not in start("wide", "--batch_size", "4")

    whole = start("whole", "--seed", "7", "--learning_rate", "0.05").split("loss at step 0")[1]
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: setattr(self, "end", 1))
    with pytest.raises(common.Interrupted):
        start("cut", "--seed", "7", "--learning_rate", "0.05")
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: None)
    capsys.readouterr()
    rest = start("cut", "--seed", "7", "--learning_rate", "0.05", "--from_resume", "1")

    def said(output):
        return [line for line in output.split("\n") if line.startswith(("    verdict", "step "))]

    assert len(said(rest)) == 6 and said(rest) == said(whole)[2:], "the history counts, not what this process has seen"


@pytest.mark.parametrize("name", sorted(DATA))
def test_every_stage_is_judged_and_passes_its_conditions_on(name, stage, tmp_path, curves, monkeypatch, capsys):
    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)
    module, argv = stage(name, "--max_steps", "2", "--eval_interval", "1")
    module.main(module.parse_args(argv))
    assert capsys.readouterr().out.count("\n    verdict: ") == 2
    kept = json.loads((tmp_path / "out" / "logs" / "run" / "conditions.json").read_text())["conditions"]
    assert kept == json.loads((tmp_path / "out" / "run" / "minillm.json").read_text())["conditions"]
    assert kept["stage"] == name.removeprefix("train_") and kept["steps"] == 2 and kept["parents"]
    run = str(tmp_path / "out" / "logs" / "run")
    assert logs.main(logs.parse_args([run, "--reference", str(curves / "x.json")])) == 0
    assert logs.find_curve(kept)


@pytest.mark.parametrize("args, conditions", [("[]", '{"conditions": {}}'), ("{}", "{}"), ("{}", '{"conditions": 5}')])
def test_files_of_another_kind_make_no_curve_and_harm_no_verdict(tmp_path, capsys, args, conditions):
    log = write(tmp_path, [1, 2, 3], loss=1.0, val_loss=2.0)
    log.close()
    (tmp_path / "args.json").write_text(args)
    (tmp_path / "conditions.json").write_text(conditions)
    with pytest.raises(ValueError, match="is no log of a training run .*; it holds .*; give out/logs"):
        logs.make_curve([tmp_path])
    logs.review(tmp_path)
    assert "held-out loss" in capsys.readouterr().out
