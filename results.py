"""Scores on the disk and on the screen: eval_results.jsonl, and the tables made of its rows.

A row is a dict with "weight" (name of the checkpoint), "group" (what was measured) and the numbers of that group, as
eval.py makes them; every table here is made of such rows alone, so that `eval.py --mode summary` shows again what an
evaluation showed. A table is (title, header, rows of cells), for logs.table(); a group without rows has none.

What this file does not do: measure (eval.py, metrics.py, tasks.py); pages for the browser (report.py).
"""
import contextlib
import json
import math
from collections import defaultdict

from records import GROUPS, finite, read_objects, replace_text


# ----------------------------------------------------------------------------------------------------------------------
# 1. The file
def read(path):
    """The rows of a file of scores, without what others may have written there."""
    return [row for row in read_objects(path)
            if isinstance(row.get("weight"), str) and isinstance(row.get("group"), str)]


@contextlib.contextmanager
def locked(path):
    """Keep other processes from changing a file meanwhile, where the system can: two evaluations may run at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:  # beside it: the file itself is another one after each write
        with contextlib.suppress(ImportError, OSError):  # not on Windows, nor on every network drive
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(path, rows):
    """Write rows behind the earlier ones of the file, in place of those for the same weight and group."""
    new = {(row["weight"], row["group"]) for row in rows}
    with locked(path):
        kept = [row for row in read(path) if (row["weight"], row["group"]) not in new]
        lines = [json.dumps(finite(row), ensure_ascii=False) + "\n" for row in [*kept, *rows]]
        replace_text(path, "".join(lines))


# ----------------------------------------------------------------------------------------------------------------------
# 2. Cells
def cell(row, name, error=""):
    """A number for a table, with its standard error in brackets; "-" where there is none."""
    value, spread = (entry if isinstance(entry, (int, float)) and math.isfinite(entry) else None
                     for entry in (row.get(name), row.get(error)))
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if spread is None else f" ({spread:.3f})")


def part(row, name):
    """What stands in a row under a name, where it is a dict as it should be; else {}."""
    return row[name] if isinstance(row.get(name), dict) else {}


def number(value, digits=4):
    """Four decimals, as lm-evaluation-harness prints; "-" for what is not there."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.4g}"


def pass_line(row):
    """What metrics.pass_rates() found as text: pass@1 0.120 (0.011), pass@2 ..."""
    return ", ".join(f"pass@{k} {cell({'rate': rate, 'error': part(row, 'pass_at_k_error').get(k)}, 'rate', 'error')}"
                     for k, rate in part(row, "pass_at_k").items())


def markdown(header, rows):
    """A markdown table; bars and line breaks inside a cell are written so that they do not end it."""
    def line(cells):
        safe = (str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>") for cell in cells)
        return "| " + " | ".join(safe) + " |\n"

    return line(header) + "|" + "---|" * len(header) + "\n" + "".join(line(row) for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Tables
def held_out(rows):
    """Tables of --mode score: a line a weight, then exact match by skill; and lines of text on pass@k and on reward
    models. Returns (tables, lines)."""
    found = defaultdict(lambda: defaultdict(dict))  # weight -> group -> row
    for row in rows:
        if row["group"].removesuffix(":files") in GROUPS:
            found[row["weight"]][row["group"].removesuffix(":files")] = row
    judges = {name: groups["pair_accuracy"] for name, groups in found.items() if "pair_accuracy" in groups}
    speakers = {name: groups for name, groups in found.items() if name not in judges}
    asked = {name: groups["exact_match"] for name, groups in speakers.items() if groups["exact_match"]}
    tables = [score_table(speakers)] * bool(speakers) + [skill_table(asked)] * bool(asked)
    lines = [f"{name}: {pass_line(groups['pass_at_1'])}" for name, groups in speakers.items()
             if len(part(groups["pass_at_1"], "pass_at_k")) > 1]
    for name, row in sorted(judges.items()):
        by_kind = part(row, "accuracy_by_kind")
        kinds = ", ".join(f"{kind} {cell(by_kind, kind)}" for kind in by_kind)
        lines.append(f"{name}: pair accuracy {cell(row, 'accuracy', 'standard_error')}: {kinds}; correlation of score "
                     f"and length {cell(row, 'length_correlation')}; n {row.get('n', '-')}")
    return tables, lines


def score_table(speakers):
    """All scores of models that speak, {weight: {group: row}}."""
    langs = sorted({lang for groups in speakers.values() for row in groups.values() for lang in part(row, "by_lang")})

    def with_langs(row, key):
        split = part(row, "by_lang")
        return [cell(row, key, "standard_error"), *(cell(part(split, lang), key) for lang in langs)]

    lines = []
    for name, groups in speakers.items():
        bits, exact, liked, passed = (groups[g] for g in ("bits_per_byte", "exact_match", "preference", "pass_at_1"))
        lines.append([name, *with_langs(bits, "bits_per_byte"), cell(bits, "perplexity"),
                      *with_langs(exact, "exact_match"), cell(exact, "stop_rate"), cell(exact, "loop_rate"),
                      cell(liked, "polite", "standard_error"), cell(liked, "win_rate", "win_rate_error"),
                      cell(passed, "pass_at_1", "standard_error")])
    header = ["weight", "bits/byte", *langs, "perplexity", "exact match", *langs, "stops", "loops", "polite",
              "win rate", "pass@1"]
    return "held-out scores, standard error in brackets (win rate: against the parent)", header, lines


def skill_table(asked):
    """Exact match of every skill (lines) and weight (columns), {weight: row}."""
    lines = []
    for half in ("by_skill", "apart"):
        for skill in sorted({skill for row in asked.values() for skill in part(row, half)}):
            cells = [part(part(row, half), skill) for row in asked.values()]
            lines.append([skill, max(c.get("n", 0) for c in cells), *(cell(c, "exact_match") for c in cells)])
    return ("exact match by skill; the last ones are held out by wording only and not part of the total",
            ["skill", "n", *asked], lines)


def benchmarks(rows):
    """Table of --tasks: a line a score, the first of a task with what it is worth, in words; and lines of text on
    pass@k. Returns (tables, lines)."""
    rows, cells = [row for row in rows if "task" in row], []
    for row in rows:
        facts = [number(row.get("chance")), number(row.get("majority")), row.get("verdict") or "-",
                 number(row.get("seconds"), 1)]
        for metric, score in part(row, "scores").items():
            shown = [metric, number(score), number(part(row, "errors").get(metric))]
            about = [row["weight"], row["task"], row.get("few_shot", "-"), row.get("n", "-")]
            first = metric == row.get("metric")
            cells.append([*about, *shown, *facts] if first else ["", "", "", "", *shown, *[""] * len(facts)])
    header = ["weight", "task", "shots", "n", "metric", "score", "error", "chance", "majority", "in words", "seconds"]
    lines = [f"{row['weight']} {row['task']}, {row['drawn'].get('samples')} answers at temperature "
             f"{row['drawn'].get('temperature', math.nan):g}, {metric}: {pass_line(rates)}"
             for row in rows for metric, rates in part(part(row, "drawn"), "rates").items()]
    return [("benchmarks; majority: always the commonest right answer", header, cells)] * bool(cells), lines


def others(rows):
    """Table of what else eval.py measures: fixed prompts, answers beside references, one checkpoint against another.
    Returns (tables, lines)."""
    cells = [[row["weight"], row["group"], name.replace("_", " "), cell(row, name, "standard_error"), row.get("n", "-")]
             for row in rows if "task" not in row and row["group"] not in GROUPS
             for name in ("pass_rate", "win_rate", "bleu", "chrf", "rouge_l") if name in row]
    header = ["weight", "what", "metric", "score", "n"]
    return [("other scores, standard error in brackets", header, cells)] * bool(cells), []
