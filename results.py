"""Scores on the disk and on the screen: eval_results.jsonl, and the tables made of its rows.

A row is a dict with "weight" (name of the checkpoint), "group" (what was measured) and the numbers of that group, as
eval.py makes them; every table here is made of such rows alone, so that `eval.py --mode summary` shows again what an
evaluation showed. A table is (title, header, rows of cells), for logs.table(); a group without rows has none.

What this file does not do: measure (eval.py, metrics.py, tasks.py); pages for the browser (report.py).
"""
import json
import math
import os
from collections import defaultdict

GROUPS = ("bits_per_byte", "exact_match", "preference", "pass_at_1", "pair_accuracy")  # of eval.py --mode score


# ----------------------------------------------------------------------------------------------------------------------
# 1. The file
def finite(value):
    """A result with None in place of nan, which is no JSON."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path, earlier, rows):
    """Write rows behind the earlier ones, in place of those for the same weight and group."""
    new = {(row["weight"], row["group"]) for row in rows}
    kept = [row for row in earlier if (row["weight"], row["group"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = [json.dumps(finite(row), ensure_ascii=False) + "\n" for row in [*kept, *rows]]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)  # as a whole: an interrupted run leaves the old scores


# ----------------------------------------------------------------------------------------------------------------------
# 2. Cells
def cell(row, name, error=""):
    """A number for a table, with its standard error in brackets; "-" where there is none."""
    value, spread = finite(row.get(name)), finite(row.get(error))
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if spread is None else f" ({spread:.3f})")


def number(value):
    """Four decimals, as lm-evaluation-harness prints; "-" for what is not there."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if value < 1e6 else f"{value:.4g}"


def pass_line(row):
    """What metrics.pass_rates() found as text: pass@1 0.120 (0.011), pass@2 ..."""
    return ", ".join(f"pass@{k} {cell({'rate': rate, 'error': row['pass_at_k_error'][k]}, 'rate', 'error')}"
                     for k, rate in row["pass_at_k"].items())


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
             if len(groups["pass_at_1"].get("pass_at_k", {})) > 1]
    for name, row in sorted(judges.items()):
        kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in row["accuracy_by_kind"].items())
        lines.append(f"{name}: pair accuracy {cell(row, 'accuracy', 'standard_error')}: {kinds}; correlation of score "
                     f"and length {row['length_correlation']:.2f}; n {row['n']}")
    return tables, lines


def score_table(speakers):
    """All scores of models that speak, {weight: {group: row}}."""
    langs = sorted({lang for groups in speakers.values() for row in groups.values() for lang in row.get("by_lang", {})})

    def with_langs(row, key):
        split = row.get("by_lang", {})
        return [cell(row, key, "standard_error"), *(cell(split.get(lang, {}), key) for lang in langs)]

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
    for part in ("by_skill", "apart"):
        for skill in sorted({skill for row in asked.values() for skill in row[part]}):
            cells = [row[part].get(skill, {}) for row in asked.values()]
            lines.append([skill, max(c.get("n", 0) for c in cells), *(cell(c, "exact_match") for c in cells)])
    return ("exact match by skill; the last ones are held out by wording only and not part of the total",
            ["skill", "n", *asked], lines)


def benchmarks(rows):
    """Table of --tasks: a line a score, the first of a task with what it is worth, in words; and lines of text on
    pass@k. Returns (tables, lines)."""
    rows, cells = [row for row in rows if "task" in row], []
    for row in rows:
        facts = [number(row["chance"]), number(row["majority"]), row.get("verdict") or "-", f"{row['seconds']:.1f}"]
        for metric, score in row["scores"].items():
            shown = [metric, number(score), number(row["errors"][metric])]
            first = metric == row["metric"]
            cells.append([row["weight"], row["task"], row["few_shot"], row["n"], *shown, *facts] if first else
                         ["", "", "", "", *shown, *[""] * len(facts)])
    header = ["weight", "task", "shots", "n", "metric", "score", "error", "chance", "majority", "in words", "seconds"]
    lines = [f"{row['weight']} {row['task']}, {row['drawn']['samples']} answers at temperature "
             f"{row['drawn']['temperature']:g}, {metric}: {pass_line(rates)}"
             for row in rows if "drawn" in row for metric, rates in row["drawn"]["rates"].items()]
    return [("benchmarks; majority: always the commonest right answer", header, cells)] * bool(cells), lines
