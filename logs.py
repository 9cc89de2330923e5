"""What a run shows and leaves behind: a line of metrics.jsonl per logged step, a progress bar, curves as PNG, tables,
and whether its numbers are normal.

metrics.jsonl is the only record: plots are drawn and verdicts given from it, and a resumed run continues it without
gaps or doubles. No account, no server; who has one may let a tracker (tensorboard, wandb, swanlab) follow.

Normal is what runs under the same conditions (data, tokenizer, shape, batch, length) have shown: assets/curves/ holds
their bands. As a program this file judges finished runs again, draws them over each other, or makes such a band:

    python logs.py out/logs/pretrain
    python logs.py out/logs/a out/logs/b --plot both.png --keys val_loss exact_match
    python logs.py out/logs/a out/logs/b out/logs/c --reference assets/curves/mine.json
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
import unicodedata
from bisect import bisect_left
from pathlib import Path

from tqdm import tqdm

from records import read_metrics

# One panel of curves.png a row: title, the keys drawn in it. Panels without data are left out.
PANELS = [
    ("loss", ["loss", "val_loss"]),
    ("held-out bits per byte", ["bits_per_byte"]),
    ("exact match", ["exact_match"]),
    ("fixed prompts passed", ["regression_pass_rate"]),
    ("pair accuracy", ["accuracy", "val_accuracy"]),
    ("implicit reward margin", ["margin"]),
    ("reward", ["reward", "val_reward"]),
    ("KL to the reference or the teacher (nats)", ["kl"]),
    ("entropy (nats per token)", ["entropy"]),
    ("clip fraction", ["clipfrac"]),
    ("pass@1", ["pass_at_1"]),
    ("groups with signal", ["signal"]),
    ("value loss", ["value_loss"]),
    ("completion length", ["length"]),
    ("MoE balance (even: experts a token)", ["balance"]),
    ("learning rate", ["lr"]),
    ("gradient norm", ["grad_norm"]),
    ("tokens per second", ["tokens_per_s"]),
]

CURVES = Path(__file__).parent / "assets" / "curves"
BARS = "▁▂▃▄▅▆▇█"
# What a reference curve holds a band of, as far as a stage logs it
BANDED = ["loss", "val_loss", "bits_per_byte", "exact_match", "val_accuracy", "val_margin", "reward", "val_reward",
          "pass_at_1"]
SHARES = {"exact_match", "val_accuracy", "pass_at_1"}  # never above 1
# What a verdict looks at; the first that a stage logs counts: held-out metric, the training metric beside it, the sign
# that makes more of it better, evaluations that can show a plateau, change that is noise whatever its size. A held-out
# loss is always of the same tokens; answers are sampled, and a share of n answers is off by up to 1 / sqrt(n)
JUDGED = [("val_loss", "loss", -1, 3, 0.0), ("val_reward", "reward", 1, 5, 0.03), ("pass_at_1", "reward", 1, 5, 0.03)]
NAMES = {"val_loss": "held-out loss", "val_reward": "held-out reward", "pass_at_1": "pass@1", "loss": "training loss",
         "reward": "training reward"}


# -- What is normal ----------------------------------------------------------------------------------------------------
def find_curve(conditions, folder=None):
    """The reference curve of just these conditions (checkpoint.conditions()) as a dict with its "file", else None.

    A file that cannot be used costs one line and never a run. `folder`: where to look, CURVES without it.
    """
    for path in sorted(Path(folder or CURVES).glob("*.json")):
        try:
            curve = json.loads(path.read_text(encoding="utf-8"))
            bands = {key: [tuple(map(float, point)) for point in points] for key, points in curve["bands"].items()}
            if any(len(point) != 3 for points in bands.values() for point in points):
                raise ValueError("a point is not [step, low, high]")
            if curve["conditions"] == conditions:
                return curve | {"bands": {key: sorted(points) for key, points in bands.items()},
                                "file": "/".join(path.parts[-3:])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            say(f"reference curve {path} cannot be used ({type(error).__name__}: {error}); the run goes on without it; "
                f"bring the file back, or delete it")
    return None


def band(curve, key, step):
    """(low, high) of a metric at an optimizer step, None where the curve does not reach.

    Between two points it is a line over log(step), as a loss nearly is. Points of which one has more than twice the
    other's step are too far apart: between steps 0 and 250 a loss falls from 8 to 1.3, and on no straight line.
    """
    points = curve["bands"].get(key, []) if curve else []
    i = bisect_left(points, step, key=lambda point: point[0])
    if i < len(points) and points[i][0] == step:
        return points[i][1:]
    if i in (0, len(points)) or points[i][0] > 2 * points[i - 1][0]:
        return None
    (before, *left), (after, *right) = points[i - 1], points[i]
    share = math.log(step / before) / math.log(after / before)
    return tuple(a + share * (b - a) for a, b in zip(left, right, strict=True))


def _range(low, high):
    """A band as text: 1.18-1.24, and -0.10 to 0.30 where a hyphen could be a sign."""
    digits = 3 if abs(high) < 1 else 2
    return f"{low:.{digits}f}{' to ' if low < 0 else '-'}{high:.{digits}f}"


def _judged(rows):
    """The entry of JUDGED for this log with its finished evaluations [(step, value)]; None where it has none."""
    for entry in JUDGED:
        held = [(row["step"], row[entry[0]]) for row in rows if entry[0] in row]
        if held:
            return entry, held
    return None


def verdict(rows, normal=None):
    """One line on how a run goes: "fine", or "unstable", "overfitting", "plateau" with the likely causes. "" before
    anything has been trained and evaluated.

    The first rule that holds counts. All are conservative: a false alarm teaches readers to overlook the true one.

    unstable     the held-out metric is not finite; or two logged lines since the evaluation before have no finite loss
                 or, behind step 50, gradient (one is an accident; fp16 finds its scale in the first steps); or the mean
                 of the last 5 lines of the training metric is worse than the best 5 lines before by 5% and by 3 times
                 their noise; or the median gradient norm of the last 10 lines is above 10 times the lowest and above
                 the first such median
    overfitting  the last two evaluations are worse than the best one by 3%, while the training metric got better by 1%
                 since then
    plateau      the second half of the run so far has not bettered the first by 0.5%. A fixed number of evaluations
                 would not do: a loss that falls as a power of the steps changes less and less from one to the next.
                 It says nothing while the rate still warms up, nor where the reference is as flat (`normal`)

    Args:
        rows: all rows of metrics.jsonl up to an evaluation (records.read_metrics()).
        normal: (low, high) of the held-out metric there, or None.
    """
    found = _judged(rows)
    if not found or not any(found[0][1] in row for row in rows):
        return ""
    (key, train, sign, enough, floor), held = found
    # from here on more is better, whatever the metric; sign leads back to what is shown
    trained = [(row["step"], sign * row[train]) for row in rows if isinstance(row.get(train), (int, float))]
    recent = [row for row in rows if len(held) < 2 or row["step"] > held[-2][0]]
    if held[-1][1] is None:
        return f"unstable: the {NAMES[key]} is not finite; likely: rate too high; resume with a lower --learning_rate"
    gained = [(step, sign * value) for step, value in held if value is not None]
    flat = normal and normal[0] <= held[-1][1] <= normal[1]
    return (_unstable(rows, recent, trained, sign, train, floor)
            or _overfitting(gained, trained, sign, key, train, floor)
            or ("" if flat else _plateau(gained, rows, key, enough)) or "fine")


def _blocks(values, size):
    """Values cut into blocks of `size`, counted from the end; what is left over at the beginning is dropped."""
    return [values[end - size:end] for end in range(len(values), size - 1, -size)][::-1]


def _unstable(rows, recent, trained, sign, train, floor):
    lost = sum(row.get(train, 0) is None or row.get("loss", 0) is None
               or (row["step"] > 50 and row.get("grad_norm", 0) is None) for row in recent)
    if lost > 1:
        return (f"unstable: {lost} steps since the last evaluation were not finite; likely: rate too high, or fp16; "
                "resume with a lower --learning_rate, or --dtype bf16 or fp32")
    values = [value for _, value in trained]
    means = [statistics.fmean(block) for block in _blocks(values, 5)]
    if len(means) > 2:
        best, last = max(means[:-1]), means[-1]
        # the median of the changes from line to line knows nothing of the long fall; 1.05 makes a deviation of it
        noise = 1.05 * statistics.median(abs(b - a) for a, b in zip(values, values[1:], strict=False))
        if best - last > max(0.05 * abs(best), 3 * noise, floor):
            return (f"unstable: the {NAMES[train]} went from {sign * best:.3g} to {sign * last:.3g}; likely: rate too "
                    "high, warm-up too short (--warmup_steps), no --grad_clip")
    norms = [row["grad_norm"] for row in rows if isinstance(row.get("grad_norm"), (int, float))]
    middles = [statistics.median(block) for block in _blocks(norms, 10)]
    if len(middles) > 2 and middles[-1] > max(10 * min(middles), middles[0]):
        return (f"unstable: the gradient norm went from {min(middles):.3g} to {middles[-1]:.3g}; likely: rate too "
                "high, no --grad_clip")
    return ""


def _overfitting(gained, trained, sign, key, train, floor):
    at, best = max(gained, key=lambda point: point[1])
    margin = max(0.03 * abs(best), floor)
    later = [value for step, value in gained[-2:] if step > at and value < best - margin]
    then = [value for step, value in trained if step <= at][-5:] or [value for _, value in trained[:1]]
    now = [value for step, value in trained if step > at][-5:]
    if len(later) < 2 or not then or not now:
        return ""
    if statistics.fmean(now) - statistics.fmean(then) <= 0.01 * abs(statistics.fmean(then)):
        return ""
    return (f"overfitting: the {NAMES[key]} was best at step {at}, {sign * best:.3g}, and is {sign * later[-1]:.3g}, "
            f"while the {NAMES[train]} got better; likely: too many passes over too few rows; fewer --epochs, or more "
            "data")


def _plateau(gained, rows, key, enough):
    half = gained[-1][0] / 2
    early = [value for step, value in gained if step <= half]
    late = [value for step, value in gained if step > half]
    rates = [row["lr"] for row in rows if row["step"] > half and isinstance(row.get("lr"), (int, float))]
    warming = len(rates) > 1 and rates[-1] > rates[0]
    if not early or len(late) < enough or warming or max(late) - max(early) > 0.005 * abs(max(early)):
        return ""
    return (f"plateau: the {NAMES[key]} is no better than before step {half:.0f}; likely: all is learnt that shape and "
            "data allow, the rate is far too low or too high, or the wrong tokens are trained (--show_batch 1)")


def off_normal(rows, curve):
    """What is to be said when the last evaluation lies outside the curve's band, "" when it does not. Causes are named
    the first time only; what was said before follows from the rows, so a resumed run says the same."""
    found = _judged(rows) if curve else None
    if not found:
        return ""
    (key, _, sign, *_), held = found
    sides = [0]  # of each evaluation: 1 better than normal, -1 worse, 0 inside or no band
    for step, value in held[held[0][0] == 0:]:  # what is measured before the first step is never judged
        low, high = band(curve, key, step) or (-math.inf, math.inf)
        sides.append(0 if value is None else sign * ((value > high) - (value < low)))
    if not sides[-1]:
        return ""
    word = "better" if sides[-1] > 0 else "worse"
    if sides[-1] in sides[:-1]:
        return f"{word} than normal here"
    causes = ("a better recipe, or held-out rows among the training rows" if sides[-1] > 0 else
              "other rates, --schedule or --optimizer, a weaker stage before, a change in the code")
    return (f"{NAMES[key]} {held[-1][1]:.3g} is {word} than normal here ({_range(*band(curve, key, held[-1][0]))} in "
            f"{curve['file']}); likely: {causes}")


# -- The record --------------------------------------------------------------------------------------------------------
def open_tracker(name, folder, first_step):
    """Open a tracker, imported only now. Returns (send(numbers, step), finish()); raises whatever the tracker does.

    Offline, with files below `folder`, unless the user is logged in there or has set WANDB_MODE or SWANLAB_MODE.
    """
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(str(folder / name), purge_step=first_step)  # what a resumed run repeats is hidden
        return lambda numbers, step: [writer.add_scalar(k, v, step) for k, v in numbers.items()], writer.close
    module = importlib.import_module(name)
    login = Path.home() / {"wandb": ".netrc", "swanlab": ".swanlab/.netrc"}[name]
    known = login.is_file() and name in login.read_text(encoding="utf-8")
    mode = None if known or os.environ.keys() & {f"{name.upper()}_API_KEY", f"{name.upper()}_MODE"} else "offline"
    words = ("name", "dir") if name == "wandb" else ("experiment_name", "logdir")
    module.init(project="minillm", mode=mode, **{words[0]: folder.name, words[1]: str(folder)})
    return module.log, module.finish


class MetricLog:
    """Appends one JSON object per step to <folder>/metrics.jsonl (rank 0 only) and draws curves.png at the end.

    Args:
        folder: out/logs/<save_weight>.
        is_main: only then anything is written.
        resume_step: None for a new run (the old folder is emptied); else lines after that step are dropped, because
            the run repeats them.
        tracker: "tensorboard", "wandb" or "swanlab": gets every number of metrics.jsonl as well. "none": nobody.
        conditions: what decides which numbers are normal (checkpoint.conditions()); None: no reference curve fits.
        plot_interval: optimizer steps after which curves.png is drawn again, 0 = at the end only.
    """

    def __init__(self, folder, is_main=True, resume_step=None, tracker="none", conditions=None, plot_interval=0):
        self.folder = Path(folder)
        self.is_main = is_main
        self.tracker = self.curve = self.bar = None
        self.plot_interval, self.plotted = plot_interval, resume_step or 0
        first_step = 0 if resume_step is None else resume_step + 1
        self.clock, self.tokens = time.perf_counter(), 0
        self.alarms = []  # of this run so far, also before a resume
        if not is_main:
            return
        if resume_step is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else [row for row in read_metrics(self.folder) if row["step"] <= resume_step]
        # beside and then in place: kill -9 between emptying the file and writing it again would lose the record
        path, tmp = self.folder / "metrics.jsonl", self.folder / "metrics.tmp"
        tmp.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        os.replace(tmp, path)
        self.file, self.waiting = open(path, "ab", buffering=0), b""  # unbuffered: a killed run leaves its last line
        self.alarms = [row[key] for row in kept for key in ("alarm", "sys_alarm") if key in row]
        self.history = [value for row in kept if (value := _live(row)) is not None]
        if tracker != "none":
            interrupt = signal.getsignal(signal.SIGINT)
            self.tracker = self._harmless(lambda: open_tracker(tracker, self.folder, first_step))
            signal.signal(signal.SIGINT, interrupt)  # swanlab takes Ctrl-C for itself, but the run wants to save first
        if conditions:
            command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
            self.save_json("conditions.json", {"conditions": conditions, "command": command,
                                               "torch": getattr(sys.modules.get("torch"), "__version__", "")})
            self.curve = find_curve(conditions)
        if self.curve:
            self.save_json("reference.json", self.curve)  # for curves.png
            say(f"what is normal for this run is known: {self.curve['file']}")
        else:
            (self.folder / "reference.json").unlink(missing_ok=True)  # of a run that a resume has made longer

    def _harmless(self, call):
        """call() of the tracker. Whatever goes wrong there ends the tracking and never the run."""
        try:
            return call()
        except (Exception, SystemExit) as error:
            self.tracker = None
            reason = (str(error) or type(error).__name__).split("\n")[0][:200]
            say(f"tracker off ({reason}); metrics.jsonl has every number; install or repair it, or give --tracker none")

    def _write(self, row):
        """Append a line. On a full disk it waits for the next one: that is no reason to lose a training."""
        silent = bool(self.waiting)
        self.waiting += json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting):]
        except OSError as error:
            if not silent:
                say(f"{self.folder}/metrics.jsonl cannot be written ({error}); its lines wait until there is room")

    def count(self, tokens):
        """Add tokens to the throughput that the next rate() reports."""
        self.tokens += tokens

    def rate(self):
        """Tokens per second since the last call."""
        now = time.perf_counter()
        speed = self.tokens / max(now - self.clock, 1e-9)
        self.clock, self.tokens = now, 0
        return round(speed)

    def log(self, step, **metrics):
        """Write one line, and print what it holds under "alarm" or "sys_alarm". Values: numbers (floats are kept to 7
        digits), strings or short lists."""
        if self.is_main:
            row = {k: _short(v) for k, v in metrics.items()}
            self._write({"step": step, **row})
            self._show(step, row)
            for text in [row[key] for key in ("alarm", "sys_alarm") if key in row]:
                self.alarms.append(text)
                say(f"    step {step}: {text}")
            if self.tracker:
                numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
                self._harmless(lambda: self.tracker[0](numbers, step=step))

    def progress(self, total, desc, initial=0):
        """progress() for this run, with a sparkline of what it logs below the bar."""
        self.bar = progress(total, desc, initial, self.is_main)
        return self.bar

    def _show(self, step, row):
        """What is to be seen while the run goes on: the line below the bar, and with --plot_interval curves.png."""
        value = _live(row)
        if value is not None:
            self.history.append(value)
            if self.bar is not None:  # `if self.bar` would ask for its length
                self.bar.draw(f"{sparkline(self.history)} {self.history[0]:.3g} -> {value:.3g}")
        if self.plot_interval and step >= self.plotted + self.plot_interval:
            self.plotted, start = step, time.perf_counter()
            self._plot()
            self.clock += time.perf_counter() - start  # these are no training seconds

    def _plot(self):
        """Draw curves.png; a full disk is no reason to lose a training."""
        try:
            plot_curves(self.folder)
        except OSError as error:
            say(f"{self.folder}/curves.png was not drawn ({error}); metrics.jsonl has its numbers")

    def expected(self, step, key):
        """" (expected 1.18-1.24 here)", to be printed behind a metric; "" where no reference curve fits."""
        normal = band(self.curve, key, step)
        return f" (expected {_range(*normal)} here)" if normal else ""

    def named(self, step, numbers):
        """Numbers of an evaluation (dict) as text behind others: ", exact match 0.512 (expected 0.49-0.55 here)"."""
        return "".join(f", {name.replace('_', ' ')} {value:.3f}{self.expected(step, name)}"
                       for name, value in numbers.items())

    def judge(self):
        """Print the verdict on the run so far below the evaluation just logged, and log it too (rank 0 only)."""
        rows = read_metrics(self.folder, self.waiting) if self.is_main else []
        found = _judged(rows)
        if found:
            said = [verdict(rows, band(self.curve, found[0][0], found[1][-1][0])), off_normal(rows, self.curve)]
            if any(said):
                text = "; ".join(filter(None, said))
                self._write({"step": rows[-1]["step"], "verdict": text})
                say(f"    verdict: {text}")

    def save_json(self, name, content):
        """Write <folder>/<name>, e.g. args.json (the run's configuration) or dataset_stats.json."""
        if self.is_main:
            (self.folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n",
                                            encoding="utf-8")

    def close(self):
        """Draw the curves and close the file."""
        if self.is_main:
            self.file.close()
            if self.tracker:
                self._harmless(self.tracker[1])
            self._plot()


def _live(row):
    """What the line below the bar draws: a row's reward, for the loss of a policy gradient says nothing, else its
    loss; None where it has neither."""
    return row.get("reward", row.get("loss"))


def _short(value):
    """A float with 7 digits; null instead of NaN and infinity, which JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


class Bar(tqdm):
    """A bar whose numbers appear with its next redraw. tqdm's own default redraws for them, which fills log files."""

    below = None  # a second line, drawn in a terminal only: a log file would keep each of its redraws

    def set_postfix_str(self, s="", refresh=False):
        """Set the text beside the bar."""
        super().set_postfix_str(s, refresh)

    def draw(self, text):
        """Set the text below the bar."""
        if self.below is None and not self.disable and sys.stderr.isatty():
            self.below = tqdm(total=0, position=1, bar_format="{desc}", leave=False)
        if self.below is not None:
            self.below.set_description_str(text)

    def close(self):
        """Close the line below first: it is found by its distance to the bar."""
        if self.below is not None:
            self.below.close()
        super().close()


def progress(total, desc, initial=0, is_main=True, unit="step", unit_scale=False):
    """A tqdm bar with an ETA; in a log file it writes a line every 15 seconds instead of redrawing.

    unit_scale: show 12.5M for 12500000.
    """
    live = sys.stderr.isatty()
    return Bar(total=total, initial=initial, desc=desc, unit=unit, unit_scale=unit_scale, disable=not is_main,
               dynamic_ncols=live, ncols=None if live else 110, mininterval=0.5 if live else 15,
               maxinterval=1 if live else 20, smoothing=0.1)


def sparkline(values, width=40):
    """Numbers as a line of bars from their lowest to their highest; more than `width` are averaged over neighbours.
    Losses (all above 0) by their logarithm: the fall of the first steps would flatten all that comes later."""
    size = math.ceil(len(values) / width)
    means = [statistics.fmean(values[i:i + size]) for i in range(0, len(values), size)]
    means = [math.log(mean) for mean in means] if min(means) > 0 else means
    low, high = min(means), max(means)
    return "".join(BARS[int((mean - low) / ((high - low) or 1) * (len(BARS) - 1) + 0.5)] for mean in means)


def say(text):
    """Print beside a running progress bar without tearing it."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def table(header, rows):
    """Rows as aligned text columns. Wide (Chinese) characters count two."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c + " " * (w - _width(c)) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def show_samples(samples, tokenizer, mark="trained?", targets=True, limit=64):
    """What --show_batch prints: samples as text and token by token, so that a wrong mask is seen before any training.

    Args:
        samples: list of (title, ids, mask), mask 1 on tokens that are targets.
        mark: heading of the mask's column.
        targets: show the next token beside each token, with the target's mark; else each token with its own mark.
        limit: rows a table may have; of a longer one the middle is left out.
    """
    blocks = []
    for title, ids, mask in samples:
        pieces, marks = [_spelling(tokenizer.token_bytes[i]) for i in ids], ["yes" if m else "-" for m in mask]
        columns = {"token": pieces[:-1], "target": pieces[1:], mark: marks[1:]} if targets else {
            "token": pieces, mark: marks}
        rows = list(zip(*columns.values(), strict=True))
        if len(rows) > limit:
            gap = (f"({len(rows) - limit} more)", *[""] * (len(columns) - 1))
            rows[limit // 2:limit // 2 - limit] = [gap]
        count = f"{marks.count('yes')} of {len(ids)} tokens {mark.rstrip('?')}"
        blocks.append(f"-- {title}: {count}\n{tokenizer.decode(ids)}\n\n{table(columns, rows)}\n")
    return "\n".join(blocks)


def _spelling(token):
    """A token's bytes in quotes, so that spaces and line breaks show. Chinese stays readable; a part of a character,
    which a byte-level token can be, is shown as bytes."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)[1:]


def _width(text):
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def plot_curves(folder):
    """Draw <folder>/curves.png from metrics.jsonl, a panel for each kind of metric in it, over what is normal."""
    rows = read_metrics(folder)
    reference = Path(folder) / "reference.json"
    curve = json.loads(reference.read_text(encoding="utf-8")) if reference.is_file() else None
    panels = [(title, [k for k in keys if any(k in r for r in rows)]) for title, keys in PANELS]
    panels = [(title, keys) for title, keys in panels if keys]
    if not panels:
        return
    with _figure(Path(folder) / "curves.png", [title for title, _ in panels], Path(folder).name) as axes:
        for axis, (_, keys) in zip(axes, panels, strict=True):
            for key in keys:
                points = _points(rows, key)
                _line(axis, points, key)
                normal = [(step, *limits) for step, _ in points if (limits := band(curve, key, step))]
                if normal:
                    axis.fill_between(*zip(*normal, strict=True), alpha=0.15, label="normal")
            if len(axis.get_legend_handles_labels()[0]) > 1:
                axis.legend(fontsize=8)


def plot_runs(folders, path, keys=()):
    """Draw several runs over each other, a panel for each key, a colour for each run.

    keys: metrics to draw; left out: those of PANELS. A panel none of the runs can fill is left out.
    Raises ValueError where nothing is left.
    """
    logged = [read_metrics(folder) for folder in folders]
    wanted = keys or [key for _, some in PANELS for key in some]
    found = [key for key in wanted if any(_points(rows, key) for rows in logged)]
    missing = [key for key in keys if key not in found]
    empty = [str(folder) for folder, rows in zip(folders, logged, strict=True) if not rows]
    if empty:
        raise ValueError(f"{', '.join(empty)}: no metrics.jsonl with a line in it; a curve needs one; give "
                         "out/logs/<save_weight>")
    if missing or not found:
        there = sorted({key for rows in logged for row in rows for key in row if _points([row], key)} - {"step"})
        raise ValueError(f"--keys {' '.join(missing)}: none of the runs has logged it; a panel needs numbers; choose "
                         f"from: {', '.join(there)}")
    # of each folder the first part, from the end, that tells the runs apart: save_weight in most cases
    parts = [Path(folder).parts[::-1] for folder in folders]
    names = next((some for some in zip(*parts, strict=False) if len(set(some)) == len(some)), list(map(str, folders)))
    with _figure(Path(path), found) as axes:
        for axis, key in zip(axes, found, strict=True):
            for n, (rows, name) in enumerate(zip(logged, names, strict=True)):
                points = _points(rows, key)
                if len(points) > 60:  # single batches: several runs over each other are told apart by their means
                    axis.plot(*zip(*points, strict=True), color=f"C{n}", linewidth=0.8, alpha=0.25)
                    points = _means(points, len(points) // 20)
                if points:
                    _line(axis, points, name, color=f"C{n}")
        axes[0].legend(fontsize=7)


def _points(rows, key):
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]


def _means(points, width):
    """Each value as the mean of the `width` values around it; fewer at the ends."""
    half, values = width // 2, [value for _, value in points]
    around = [values[max(0, n - half):n + half + 1] for n in range(len(values))]
    return [(step, statistics.mean(some)) for (step, _), some in zip(points, around, strict=True)]


def _line(axis, points, label, **style):
    # evaluations are few and far between: a marker shows where they were taken
    few = len(points) < 40
    axis.plot(*zip(*points, strict=True), label=label, marker="o" if few else None, markersize=3, linewidth=1.2,
              **style)


@contextlib.contextmanager
def _figure(path, titles, name=""):
    """Yield an axis for each title; the picture is written when all is drawn."""
    import matplotlib  # imported late: it costs half a second that only the end of a run needs to pay

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if len(titles) == 4 else min(3, len(titles))
    lines = math.ceil(len(titles) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3 * lines), squeeze=False, layout="constrained")
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(titles):]:
        axis.axis("off")
    try:
        yield list(axes.flat[:len(titles)])
        figure.suptitle(name)
        figure.savefig(path, dpi=90)
    finally:
        plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# python logs.py
def make_curve(runs):
    """The reference curve of finished runs under the same conditions, as find_curve() reads it.

    At each logged step: from the lowest to the highest run (a mean over 5 lines, for a single step is noisy), widened
    on both sides by that distance, at least by 2% of the value (5% where there is one run; 0.05 for shares of right
    answers), and by twice the noise of a single line. Points get farther apart, 5% of the step, as the curve gets
    flatter.

    Args:
        runs: folders out/logs/<save_weight>. Raises ValueError where one is not finished, or differs.
    """
    facts = [_read_facts(folder) for folder in runs]
    conditions, steps = facts[0]["conditions"], facts[0]["conditions"].get("steps")
    logged = [read_metrics(folder) for folder in runs]
    for folder, fact, rows in zip(runs, facts, logged, strict=True):
        other = [key for key in conditions if fact["conditions"].get(key) != conditions[key]]
        if other:
            raise ValueError(f"{folder} differs from {runs[0]} in {', '.join(other)}; one curve is for one set of "
                             "conditions; make one for each")
        if steps is None or not rows or rows[-1]["step"] != steps:
            raise ValueError(f"{folder} ends at step {rows[-1]['step'] if rows else 'none'} of {steps}; a curve is "
                             "made of finished runs of a fixed length (not --max_minutes); finish it")
    bands = {}
    for key in BANDED:
        series = [{row["step"]: row[key] for row in rows if isinstance(row.get(key), (int, float))} for rows in logged]
        if all(series):
            bands[key] = _band_points(series, key in SHARES)
    made = [{key: fact.get(key) for key in ("command", "seed", "dtype", "torch")} for fact in facts]
    return {"conditions": conditions, "runs": made, "bands": bands}


def _read_facts(folder):
    """conditions.json and args.json of a log folder as one dict."""
    try:
        facts = {**json.loads((Path(folder) / "args.json").read_text(encoding="utf-8")),
                 **json.loads((Path(folder) / "conditions.json").read_text(encoding="utf-8"))}
        return facts | {"conditions": dict(facts["conditions"])}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{folder} is no log of a training run ({error}); it holds metrics.jsonl, args.json and "
                         "conditions.json; give out/logs/<save_weight>") from None


def _band_points(series, share=False):
    """[step, low, high] of one metric; series: a dict step -> value of each run; share: it lies between 0 and 1."""
    steps = sorted(set.intersection(*map(set, series)))
    reach = 2 if len(steps) >= 20 else 0  # evaluations are few, and each is a mean over many tokens already
    least = 0.0 if min(run[step] for run in series for step in steps) >= 0 else -math.inf
    most = 1.0 if share else math.inf
    tolerance = 0.02 if len(series) > 1 else 0.05
    smooth, rest = [], []
    for i in range(len(steps)):
        r = min(reach, i, len(steps) - 1 - i)  # as many before as behind, so that a slope moves no mean
        smooth.append([statistics.fmean(run[step] for step in steps[i - r:i + r + 1]) for run in series])
        rest.append(statistics.fmean((run[steps[i]] - mean) ** 2 for run, mean in zip(series, smooth[i], strict=True)))
    points = []
    for i, step in enumerate(steps):
        low, high = min(smooth[i]), max(smooth[i])
        noise = math.sqrt(statistics.fmean(rest[max(0, i - 4):i + 5]))
        slack = max(high - low, 0.05 if share else tolerance * abs(low + high) / 2) + 2 * noise
        if not points or step >= 1.05 * points[-1][0] or i == len(steps) - 1:
            points.append([step, *(float(f"{x:.4g}") for x in (max(low - slack, least), min(high + slack, most)))])
    return points


def review(folder):
    """Print again what was said at each evaluation of a run: its value, what was expected, the verdict."""
    rows = read_metrics(folder)
    try:
        curve = find_curve(_read_facts(folder)["conditions"])
    except ValueError:
        curve = None  # a log of an earlier version: verdicts need no more than the metrics
    found = _judged(rows)
    if not found:
        raise ValueError(f"{folder} holds no evaluation; a verdict needs metrics.jsonl with two of them; give "
                         "out/logs/<save_weight>")
    lines = []
    for step, value in found[1]:
        past, normal = [row for row in rows if row["step"] <= step], band(curve, found[0][0], step)
        said = [verdict(past, normal), off_normal(past, curve)]
        lines.append([step, value, _range(*normal) if normal else "", "; ".join(filter(None, said))])
    print(table(["step", NAMES[found[0][0]], "expected", "verdict"], lines))


def parse_args(argv=None):
    """Flags of `python logs.py`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="log folders, out/logs/<save_weight>; with --reference: runs that "
                                                "differ in nothing but the seed")
    parser.add_argument("--reference", default="", help="write the reference curve of these runs to this .json file")
    parser.add_argument("--plot", default="", help="draw these runs over each other into this .png file")
    parser.add_argument("--keys", nargs="+", default=[], help="metrics to draw there; left out: all of curves.png")
    return parser.parse_args(argv)


def main(args):
    """Judge finished runs again, draw them, or make a reference curve of them. Returns the exit code."""
    try:
        if args.reference:
            curve = make_curve(args.runs)
            Path(args.reference).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(curve, indent=1, ensure_ascii=False)
            # a point of a band stays on one line
            Path(args.reference).write_text(re.sub(r"\[\s+([-\d.e+]+),\s+([-\d.e+]+),\s+([-\d.e+]+)\s+\]",
                                                   r"[\1, \2, \3]", text) + "\n", encoding="utf-8")
            print(f"{args.reference}: bands of {', '.join(curve['bands'])} from {len(args.runs)} run(s)")
        if args.plot:
            Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
            plot_runs(args.runs, args.plot, args.keys)
            print(f"{args.plot}: {len(args.runs)} run(s)")
        for folder in [] if args.reference or args.plot else args.runs:
            print(f"-- {folder}")
            review(folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
