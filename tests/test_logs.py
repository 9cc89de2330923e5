"""Proves what a run leaves behind: a metrics file without gaps or doubles after any interruption, curves, tables.

    python -m pytest tests/test_logs.py
"""
import json

import pytest

import logs


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
