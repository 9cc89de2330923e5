"""What a run shows and leaves behind: a line of metrics.jsonl per logged step, a progress bar, curves as PNG, tables.

metrics.jsonl is the only record: plots are drawn from it, and a resumed run continues it without gaps or doubles. No
account, no server; who has one may let a tracker (tensorboard, wandb, swanlab) follow.
"""

import importlib
import json
import math
import os
import shutil
import signal
import sys
import time
import unicodedata
from pathlib import Path

from tqdm import tqdm

# One panel of curves.png a row: title, the keys drawn in it. Panels without data are left out.
PANELS = [
    ("loss", ["loss", "val_loss"]),
    ("held-out bits per byte", ["bits_per_byte"]),
    ("exact match", ["exact_match"]),
    ("pair accuracy", ["accuracy", "val_accuracy"]),
    ("implicit reward margin", ["margin"]),
    ("reward", ["reward", "val_reward"]),
    ("KL to the reference (nats per sequence)", ["kl"]),
    ("entropy (nats per token)", ["entropy"]),
    ("clip fraction", ["clipfrac"]),
    ("pass@1", ["pass_at_1"]),
    ("groups with signal", ["signal"]),
    ("value loss", ["value_loss"]),
    ("completion length", ["length"]),
    ("MoE balance (1 = even)", ["balance"]),
    ("learning rate", ["lr"]),
    ("gradient norm", ["grad_norm"]),
    ("tokens per second", ["tokens_per_s"]),
]


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
    """

    def __init__(self, folder, is_main=True, resume_step=None, tracker="none"):
        self.folder = Path(folder)
        self.is_main = is_main
        self.tracker = None
        first_step = 0 if resume_step is None else resume_step + 1
        self.clock, self.tokens = time.perf_counter(), 0
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
        if tracker != "none":
            interrupt = signal.getsignal(signal.SIGINT)
            self.tracker = self._harmless(lambda: open_tracker(tracker, self.folder, first_step))
            signal.signal(signal.SIGINT, interrupt)  # swanlab takes Ctrl-C for itself, but the run wants to save first

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
        """Write one line. Values: numbers (floats are kept to 7 digits), strings or short lists."""
        if self.is_main:
            row = {k: _short(v) for k, v in metrics.items()}
            self._write({"step": step, **row})
            if self.tracker:
                numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
                self._harmless(lambda: self.tracker[0](numbers, step=step))

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
            try:
                plot_curves(self.folder)
            except OSError as error:
                say(f"{self.folder}/curves.png was not drawn ({error}); metrics.jsonl has its numbers")


def _short(value):
    """A float with 7 digits; null instead of NaN and infinity, which JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def read_metrics(folder):
    """The rows of a metrics.jsonl, without a half-written last line (kill -9 can leave one)."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Bar(tqdm):
    """A bar whose numbers appear with its next redraw. tqdm's own default redraws for them, which fills log files."""

    def set_postfix_str(self, s="", refresh=False):
        """Set the text beside the bar."""
        super().set_postfix_str(s, refresh)


def progress(total, desc, initial=0, is_main=True, unit="step", unit_scale=False):
    """A tqdm bar with an ETA; in a log file it writes a line every 15 seconds instead of redrawing.

    unit_scale: show 12.5M for 12500000.
    """
    live = sys.stderr.isatty()
    return Bar(total=total, initial=initial, desc=desc, unit=unit, unit_scale=unit_scale, disable=not is_main,
               dynamic_ncols=live, ncols=None if live else 110, mininterval=0.5 if live else 15,
               maxinterval=1 if live else 20, smoothing=0.1)


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
    """Draw <folder>/curves.png from metrics.jsonl, a panel for each kind of metric in it."""
    import matplotlib  # imported late: it costs half a second that only the end of a run needs to pay

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    panels = [(title, [k for k in keys if any(k in r for r in rows)]) for title, keys in PANELS]
    panels = [(title, keys) for title, keys in panels if keys]
    if not panels:
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3 * lines), squeeze=False, layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels, strict=False):
        for key in keys:
            points = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), (int, float))]
            # evaluations are few and far between: a marker shows where they were taken
            few = len(points) < 40
            axis.plot(*zip(*points, strict=True), label=key, marker="o" if few else None, markersize=3, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(Path(folder).name)
    figure.savefig(Path(folder) / "curves.png", dpi=90)
    plt.close(figure)
