"""The report of an output folder: one page that tells the whole story, as report.html (a single file, nothing is
loaded from elsewhere) and report.md.

Everything is read from what the stages left: minillm.json and the weights' header in out/<stage>/; metrics.jsonl,
args.json, conditions.json, dataset_stats.json, machine.json and expert_load.json in out/logs/<stage>/; the scores in
out/eval_results.jsonl. What needs a model to be found out (answers, compression by language) comes from eval.py and is
kept in out/report.json. Any part may be missing; the page says which.

What is here: reading, arithmetic, layout. What is not: judgement (logs.verdict() and health.py made theirs while the
run could still be changed), and anything that runs a model.

    refresh("out")      # at the end of every training script: report.md and report.html are new, a failure is one line

A page is a list of sections (title, blocks); a block is a pair of a kind and its content, which html() and markdown()
each know how to show.
"""

import html as escaping
import io
import json
import math
import re
import time
from collections import defaultdict
from pathlib import Path

from records import GROUPS, STAGES, fields, read_fields, read_metrics, read_objects, replace_text

# One picture each: title, keys, whether a logarithmic axis serves it. Pictures without data are left out.
PANELS = [
    ("loss", ("loss", "val_loss"), True),
    ("held-out bits per byte", ("bits_per_byte",), True),
    ("share of right answers", ("exact_match", "sampled_exact_match", "pass_at_1", "regression_pass_rate"), False),
    ("pair accuracy", ("accuracy", "val_accuracy"), False),
    ("reward", ("reward", "val_reward"), False),
    ("KL to the reference or the teacher, nats", ("kl", "val_kl"), False),
    ("entropy, nats per token", ("entropy",), False),
    ("answer length, tokens", ("length", "val_length"), False),
    ("experts: load over the even share", ("expert_max", "expert_min"), False),
    ("gradient norm", ("grad_embed", "grad_attn", "grad_mlp", "grad_head", "grad_norm"), True),
    ("update / weight, in one step", ("update_embed", "update_attn", "update_mlp", "update_head"), True),
    ("learning rate", ("lr",), False),
    ("tokens per second", ("tokens_per_s",), False),
    ("memory, MB", ("sys_rss_mb", "sys_cuda_mb"), False),
]
INK = "#010203"  # stands for the page's text colour, which a picture must take on in light and in dark
COLOURS = ["#3f7fd9", "#e0752d", "#2c9c69", "#b45bc6", "#b8951c"]
POINTS = 300  # of a curve: more are averaged, so that the page of a long run stays small
# Columns of the table of scores: key, heading, key of its standard error
SCORES = [("bits_per_byte", "bits per byte", "standard_error"), ("exact_match", "exact match", "standard_error"),
          ("stop_rate", "stops", ""), ("loop_rate", "loops", ""), ("polite", "polite", "standard_error"),
          ("win_rate", "win rate", "win_rate_error"), ("pass_at_1", "pass@1", "standard_error"),
          ("accuracy", "pair accuracy", "standard_error")]


# -- What is there -----------------------------------------------------------------------------------------------------
def members(value):
    """The fields of a JSON object that are objects themselves."""
    return {key: entry for key, entry in value.items() if isinstance(entry, dict)}


def read_shapes(folder):
    """{name: shape} of all tensors in a checkpoint folder, from the headers of its safetensors files alone."""
    shapes = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, OverflowError, MemoryError, AttributeError, TypeError, KeyError):
            return {}  # damaged: what is not known is not shown
    return shapes


def read_stages(folder):
    """All stages of an output folder, finished or not, in the order of the story: a list of dicts."""
    folder = Path(folder)
    names = {path.parent.name for path in [*folder.glob("*/minillm.json"), *folder.glob("logs/*/metrics.jsonl")]}
    stages = []
    for name in sorted(name for name in names if not name.endswith((".tmp", ".previous"))):
        log = folder / "logs" / name
        facts, conditions = read_fields(folder / name / "minillm.json"), read_fields(log / "conditions.json")
        part = {file: read_fields(log / f"{file}.json")
                for file in ("args", "dataset_stats", "machine", "expert_load", "reference")}
        part["args"] = part["args"] or facts.get("args", {})
        part["dataset_stats"] = members(part["dataset_stats"])
        conditions["conditions"] = conditions.get("conditions") or facts.get("conditions") or {}
        rows = read_metrics(log)
        stages.append({"name": name, "facts": facts, "rows": rows, "conditions": conditions, **part,
                       "kind": facts.get("stage") or conditions["conditions"].get("stage") or "",
                       "config": read_fields(folder / name / "config.json"), "shapes": read_shapes(folder / name)})
    place = {kind: number for number, kind in enumerate(STAGES)}
    return sorted(stages, key=lambda stage: (place.get(stage["kind"], len(STAGES)), stage["facts"].get("written", "")))


def numbers(rows, key):
    """[(step, value)] of the rows that have a number under this key."""
    return [(row["step"], row[key]) for row in rows
            if isinstance(row.get(key), (int, float)) and not isinstance(row[key], bool)]


# -- Arithmetic --------------------------------------------------------------------------------------------------------
def parameters(shapes):
    """Number of parameters; the bias of a router is in the file, but no gradient moves it."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith("e_score_correction_bias"))


def flops_per_token(shapes, config, tokens):
    """Operations of a forward pass for one token of a row of `tokens` tokens: 2 per weight that multiplies, and 4 * L *
    H * C * T in attention (a third of model.Transformer.flops_per_token(), which counts the backward pass too)."""
    experts = config.get("num_experts") or config.get("n_routed_experts") or 1
    visited = (config.get("num_experts_per_tok") or 1) / experts
    weights = sum(math.prod(shape) * (visited if ".mlp.experts." in name else 1)
                  for name, shape in shapes.items() if len(shape) == 2)
    if not config.get("tie_word_embeddings", True) or "score.weight" in shapes:
        weights -= math.prod(shapes.get("model.embed_tokens.weight", [0]))  # only looked up; tied, it is the head
    width = config.get("num_attention_heads", 0) * config.get("head_dim", 0)
    return 2 * weights + 4 * config.get("num_hidden_layers", 0) * width * tokens


def passes(stage):
    """Forward passes that each token of a stage costs; a backward pass counts as two, and so does every network that
    takes part. None for a stage that is not known."""
    args = stage["args"]
    return {"pretrain": 3, "sft": 3, "reward": 3,
            "dpo": 4,  # and the reference's
            # sampled; judged by policy, value model, reference and reward model; then two networks are trained
            "ppo": 5 + 6 * args.get("ppo_epochs", 1),
            "grpo": 1 + bool(args.get("beta")) + (args.get("updates_per_rollout", 1) > 1)
            + 3 * args.get("updates_per_rollout", 1)}.get(stage["kind"])


def cost(stage):
    """Seconds, tokens, FLOP, tokens per second (median of the log) and peak memory in MB of a stage; None where it is
    not known. Evaluations are in the seconds, and not in the FLOP."""
    tokens = stage["facts"].get("progress", {}).get("tokens")
    length = stage["conditions"]["conditions"].get("batch_tokens") and stage["args"].get("max_seq_len")
    flop = None
    if tokens and length and stage["shapes"] and passes(stage):
        flop = tokens * passes(stage) * flops_per_token(stage["shapes"], stage["config"], length)
    speeds = sorted(value for _, value in numbers(stage["rows"], "tokens_per_s"))
    memory = [max((value for _, value in numbers(stage["rows"], key)), default=None)
              for key in ("sys_rss_mb", "sys_cuda_mb")]
    return {"seconds": stage["facts"].get("seconds"), "tokens": tokens, "flop": flop,
            "speed": speeds[len(speeds) // 2] if speeds else None, "rss": memory[0], "cuda": memory[1]}


def thin(points, most=POINTS):
    """At most `most` points: means over neighbours."""
    size = math.ceil(len(points) / most)
    blocks = [points[i:i + size] for i in range(0, len(points), size)] if size > 1 else []
    return [tuple(sum(column) / len(block) for column in zip(*block, strict=True)) for block in blocks] or points


def big(value, unit=""):
    """A large number for people: 3.07M, 1.2T; "-" for anything else."""
    if not isinstance(value, (int, float)):
        return "-"
    power = 0
    while abs(value) >= 999.5 and power < 6:
        value, power = value / 1000, power + 1
    return f"{value:.3g}{' ' if unit else ''}{' kMGTPE'[power].strip()}{unit}"


def duration(seconds):
    """Seconds for people: 27 s, 3 min 49 s, 2 h 5 min."""
    if seconds is None:
        return "-"
    seconds = round(seconds)
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def short(value, digits=3):
    """A number for a table; "-" for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.3g}"


# -- Verdicts and warnings ---------------------------------------------------------------------------------------------
def last_verdict(stage):
    """The verdict that stood under a stage's last evaluation, "" where there is none."""
    return next((str(row["verdict"]) for row in reversed(stage["rows"]) if "verdict" in row), "")


def warnings_of(stages, scores=(), samples=None):
    """(stage, text) of everything that a reader must know before believing a number. scores, samples: of outdated()."""
    found, written = [], {stage["name"]: stage["facts"].get("written", "") for stage in stages}
    for stage in stages:
        facts, name = stage["facts"], stage["name"]
        for row in stage["rows"]:
            for key in ("alarm", "sys_alarm"):
                found += [(name, f"step {row['step']}: {row[key]}")] if key in row else []
        found += bad_verdicts(stage)
        lost = [row["step"] for row in stage["rows"] if row.get("loss", 0) is None or row.get("grad_norm", 0) is None]
        if lost:
            found.append((name, f"loss or gradient not finite at step {', '.join(map(str, lost[:8]))}"
                                + f" and {len(lost) - 8} more" * (len(lost) > 8) + ": those steps were skipped"))
        if facts.get("metrics", {}).get("stopped"):
            found.append((name, f"stopped early: {facts['metrics']['stopped']}"))
        if not facts.get("finished"):
            found.append((name, f"not finished: {reached(stage)}"))
        for part, stats in stage["dataset_stats"].items():
            cut = [f"{stats[word]} {word}" for word in ("truncated", "dropped", "bad") if stats.get(word)]
            found += [(name, f"{part} data: {', '.join(cut)} of {stats.get('samples', '?')} samples")] if cut else []
        for parent in (Path(str(parent)).name for parent in facts.get("parents", [])):
            if written.get(parent, "") > facts.get("written", "~"):
                found.append((name, f"{parent} was trained again after this stage had started from it"))
    found += outdated(stages, scores, samples or {})
    torches = {stage["facts"]["torch"] for stage in stages if stage["facts"].get("torch")}
    return found + ([("all", f"stages ran under different versions of torch: {', '.join(sorted(torches))}")]
                    if len(torches) > 1 else [])


def outdated(stages, scores, samples):
    """(stage, text) of each checkpoint that was trained again after it had been measured, or had answered.

    scores: rows of eval_results.jsonl; samples: report.json, whose "checkpoints" says when those that answered had been
    written.
    """
    found, measured = [], defaultdict(list)  # weight -> (time, group)
    for row in map(fields, scores):
        measured[str(row.get("weight"))].append((row.get("time", "~"), str(row.get("group"))))
    for stage in stages:
        name, written = stage["name"], stage["facts"].get("written", "")
        old = [group for measured_at, group in measured[name] if measured_at < written]
        if old:
            found.append((name, f"older than this checkpoint: its scores of {', '.join(old)}; measure it again, as "
                                "with: python eval.py --mode score"))
        if str(samples.get("checkpoints", {}).get(name, "~")) < written:
            found.append((name, "its samples are older than this checkpoint: python eval.py --report FOLDER"))
    return found


def bad_verdicts(stage):
    """(stage, text) of each kind of verdict that is not "fine", in its last wording, and how often it stood there."""
    said = defaultdict(list)
    for row in stage["rows"]:
        text = str(row.get("verdict", ""))
        kind = next((word for word in ("unstable", "overfitting", "plateau", "worse than normal") if word in text), "")
        said[kind].append(f"step {row['step']}: {text}")
    return [(stage["name"], f"{texts[-1]} ({len(texts)} such verdicts)") for kind, texts in said.items() if kind]


def reached(stage):
    """How far a stage has come, in words."""
    step = stage["rows"][-1]["step"] if stage["rows"] else stage["facts"].get("progress", {}).get("step", 0)
    planned = stage["facts"].get("progress", {}).get("max_steps") or stage["conditions"]["conditions"].get("steps")
    return f"step {step} of {planned or '?'}"


# -- Pictures ----------------------------------------------------------------------------------------------------------
def draw(title, keys, rows, logarithmic=False, bands=None):
    """One panel as the text of an <svg>, "" without data. No text of the user's goes in: matplotlib would read a dollar
    sign as the start of a formula.

    Args:
        rows: of metrics.jsonl; keys: drawn, as far as they are there.
        bands: {key: [[step, low, high]]} of a reference curve, drawn behind its key's line.
    """
    lines = {key: thin(points) for key in keys if (points := [p for p in numbers(rows, key) if math.isfinite(p[1])])}
    if not lines:
        return ""
    from matplotlib import rc_context, ticker  # imported late: half a second that only the end of a run needs to pay
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.color": INK, "axes.edgecolor": INK,
                     "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "font.size": 9}):
        figure = Figure(figsize=(4.4, 2.7))
        axis = figure.add_axes((0.17, 0.17, 0.80, 0.71))  # a layout engine would draw everything twice
        for (key, points), colour in zip(lines.items(), COLOURS, strict=False):
            band = (bands or {}).get(key)
            if band:
                axis.fill_between(*zip(*band, strict=True), color=colour, alpha=0.18, linewidth=0)
            few = len(points) < 40  # evaluations are few and far between: a marker shows where they were taken
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=key, marker="o" if few else None,
                      markersize=3)
        values = [value for points in lines.values() for _, value in points]
        if logarithmic and min(values) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if max(values) < 200 * min(values) else (1,)))
            axis.yaxis.set_major_formatter("{x:g}")  # 10^0 would be a formula, which takes most of the time
            axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=INK, alpha=0.12, linewidth=0.6)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("optimizer step", fontsize=8)
        if len(lines) > 1:
            axis.legend(fontsize=7, frameon=False, ncols=2, columnspacing=1, handlelength=1.2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return tidy(file.getvalue(), title)


def tidy(svg, title):
    """A picture of matplotlib's as part of a page: without header and size, in the page's own colours and font."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.S)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", re.sub(r"font-family: [^;\"]*;? ?", "", svg))
    svg = re.sub(r'<g id="[A-Za-z0-9.]+_\d+">', "<g>", svg)  # the same names in every picture of a page
    return svg.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


# -- The page ----------------------------------------------------------------------------------------------------------
def build(folder, found):
    """The page's sections, [(title, [(kind, content)])], from an output folder and eval.py's findings (report.json)."""
    stages = read_stages(folder)
    scores = read_objects(Path(folder) / "eval_results.jsonl")
    known = warnings_of(stages, scores, found)
    sections = [("Overview", overview(stages, known)), ("Warnings", warning_blocks(known)),
                ("Samples", sample_blocks(found)), ("Scores", score_blocks(scores)), ("Curves", curves(stages)),
                ("Experts", expert_blocks(stages)), ("Tokenizer and data", data_blocks(stages, found)),
                ("Time, memory, cost", cost_blocks(stages)), ("What ran", config_blocks(stages))]
    lacking = missing(folder, stages, scores, found)
    sections.append(("Not in this report", [("list", lacking)] if lacking else []))
    return [(title, blocks) for title, blocks in sections if blocks]


def overview(stages, known):
    """The whole run in a few numbers (`known`: its warnings), and what every stage changed."""
    costs = [cost(stage) for stage in stages]
    done = [stage for stage in stages if stage["facts"].get("finished")]
    sizes = [parameters(stage["shapes"]) for stage in stages if stage["shapes"]]
    total = {key: sum(c[key] or 0 for c in costs) for key in ("seconds", "tokens", "flop")}
    tiles = [(f"{len(done)} of {len(stages)}", "stages finished"), (duration(total["seconds"]), "in training scripts"),
             (big(max(sizes, default=None)), "parameters"), (big(total["tokens"] or None), "tokens"),
             (big(total["flop"] or None, "FLOP"), "computed, about"),
             (str(len(known)), "warnings")]
    rows = []
    for stage in stages:
        metrics = stage["facts"].get("metrics", {})
        verdict = last_verdict(stage).split(":")[0] or "-"
        rows.append([stage["name"], metrics.get("metric", "-"), short(metrics.get("before")),
                     short(metrics.get("after")), metrics.get("steps", reached(stage)),
                     duration(stage["facts"].get("seconds")), verdict])
    header = ["stage", "measured by", "before", "after", "steps", "time", "last verdict"]
    tiles = [tile for tile in tiles if tile[0] != "-"]
    return [("tiles", tiles), ("table", (header, rows))] if stages else [("text", "There is no stage in this folder.")]


def warning_blocks(found):
    """Everything that warnings_of() found, or that there is nothing."""
    if not found:
        return [("text", "None: every stage is finished, no alarm was raised, and nothing was dropped from the data.")]
    return [("warnings", found)]


def curves(stages):
    """Pictures of every stage, with what is normal behind them where a reference curve fitted."""
    blocks = []
    for stage in stages:
        supervised = any("val_loss" in row for row in stage["rows"])
        panels = PANELS if supervised else PANELS[1:]  # the loss of a policy gradient says nothing
        bands = stage["reference"].get("bands")
        pictures = [draw(title, keys, stage["rows"], log, bands) for title, keys, log in panels]
        if any(pictures):
            blocks += [("heading", stage["name"]), ("pictures", (stage["name"], [p for p in pictures if p]))]
    return blocks


def with_error(row, key, error):
    """A score as text, its standard error in brackets."""
    value, spread = short(row.get(key)), short(row.get(error)) if error else "-"
    return value if spread == "-" else f"{value} ({spread})"


def score_blocks(scores):
    """Held-out scores of all checkpoints, exact match by skill, and whatever else was measured."""
    table = defaultdict(dict)  # weight -> everything that was measured of it
    skills, others = defaultdict(dict), []
    for row in map(fields, scores):
        weight, group = str(row.get("weight")), str(row.get("group"))
        if group not in GROUPS:
            others.append(row)
            continue
        for key, _, error in SCORES:
            # a score belongs to the group that bears its name; the preference group repeats exact_match, as sampled
            if key in row and not (key == "exact_match" and group != "exact_match"):
                table[weight].setdefault(key, with_error(row, key, error))
        for lang, part in members(row.get("by_lang", {})).items() if group in GROUPS[:2] else ():
            table[weight][f"{group} {lang}"] = short(part.get(group))
        for part in ("by_skill", "apart") if group == "exact_match" else ():
            skills[weight] |= {skill: entry.get("exact_match") for skill, entry in members(row.get(part, {})).items()}
    columns = []
    for key, title, _ in SCORES:
        langs = sorted({name for row in table.values() for name in row if name.startswith(f"{key} ")})
        columns += [(key, title), *((name, name.split(" ")[1]) for name in langs)]
    columns = [(key, title) for key, title in columns if any(key in row for row in table.values())]
    blocks = []
    if columns:
        rows = [[weight, *(row.get(key, "-") for key, _ in columns)] for weight, row in table.items()]
        blocks += [("text", "Held-out, standard error in brackets. The win rate is against the stage it started from."),
                   ("table", (["weight", *(title for _, title in columns)], rows))]
    if skills:
        names = sorted({skill for row in skills.values() for skill in row})
        blocks += [("heading", "Exact match by skill"),
                   ("heat", (["skill", *skills], [[name, *(short(row.get(name), 2) for row in skills.values())]
                                                  for name in names]))]
    return blocks + other_scores(others)


def other_scores(rows):
    """A table of scores that have a group of their own, such as benchmark tasks."""
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if short(value) != "-"
                              and key not in ("seed", "limit", "step", "seconds", "bytes", "n")))
    body = [[row.get("weight", "-"), row.get("group") or row.get("task") or "-", row.get("n", "-"),
             *(short(row.get(key)) for key in keys)] for row in rows]
    header = ["weight", "what", "n", *(key.replace("_", " ") for key in keys)]
    return [("heading", "Other scores"), ("table", (header, body))]


def sample_blocks(found):
    """What every checkpoint says to the same held-out questions."""
    samples = [fields(sample) for sample in found.get("samples", ()) if isinstance(sample, dict)]
    note = [("text", f"Fixed held-out questions, the likeliest answer of each checkpoint (greedy), "
                     f"seed {found.get('seed', '-')}.")]
    return note + [("sample", sample) for sample in samples] if samples else []


def data_blocks(stages, found):
    """Compression of the tokenizer, and what became of the rows of every data set."""
    blocks, rows = [], []
    compression = [[lang, short(value, 2)] for lang, value in found.get("compression", {}).items()]
    for stage in stages:
        for part, stats in stage["dataset_stats"].items():
            sizes = [stats.get(key) for key in ("bytes", "tokens")]
            ratio = sizes[0] / sizes[1] if all(size and short(size) != "-" for size in sizes) else None
            if ratio and stage["kind"] == "pretrain":
                compression.append([f"all of the {part.replace('_', '-')} text of {stage['name']}", short(ratio, 2)])
            rows.append([stage["name"], part.replace("_", "-"), *(big(stats.get(key)) for key in (
                "samples", "used", "truncated", "dropped", "bad", "tokens")), short(stats.get("trained_share"), 2),
                short(stats.get("fill"), 2)])
    if compression:
        size = next((stage["config"]["vocab_size"] for stage in stages if stage["config"].get("vocab_size")), "?")
        blocks += [("text", f"UTF-8 bytes that a token stands for; vocabulary {size}. A Chinese character is 3 bytes."),
                   ("table", (["text", "bytes per token"], compression))]
    header = ["stage", "part", "samples", "used", "truncated", "dropped", "bad", "tokens", "trained share", "fill"]
    return blocks + ([("table", (header, rows))] if rows else [])


def expert_blocks(stages):
    """Share of the visits that each expert got, a line a layer; 1 is an even share."""
    blocks = []
    for stage in stages:
        load = [line for line in stage["expert_load"].get("load", ()) if isinstance(line, list)]
        if load:
            rows = [[f"layer {layer}", *(short(value, 2) for value in line)] for layer, line in enumerate(load)]
            blocks += [("heading", f"{stage['name']}, step {stage['expert_load'].get('step')}"),
                       ("text", "Visits over the even share: 1.00 is balance, 0.00 an expert that nobody visits."),
                       ("table", (["", *(f"expert {i}" for i in range(len(load[0])))], rows))]
    return blocks


def cost_blocks(stages):
    """Seconds, tokens, operations, memory of each stage."""
    rows = []
    for stage in stages:
        c = cost(stage)
        rows.append([stage["name"], duration(c["seconds"]), big(c["tokens"]), big(c["flop"], "FLOP"), big(c["speed"]),
                     big(c["rss"] and c["rss"] * 1e6, "B"), big(c["cuda"] and c["cuda"] * 1e6, "B")])
    note = ("Time is that of the whole script, evaluations included. FLOP are estimated from the weights, for the "
            "tokens that were trained or sampled (rows taken as full, evaluations left out). Tokens per second is the "
            "median of the log, memory the peak.")
    header = ["stage", "time", "tokens", "FLOP, about", "tokens/s", "main memory", "GPU memory"]
    return [("table", (header, rows)), ("text", note)] if rows else []


def config_blocks(stages):
    """Command, machine, versions, data with their hashes and every flag, folded up by stage."""
    blocks = []
    for stage in stages:
        facts, conditions = stage["facts"], stage["conditions"]
        shape, machine = conditions["conditions"].get("model", {}), stage["machine"]
        lines = [["seed", facts.get("seed", stage["args"].get("seed", "-"))],
                 ["torch", facts.get("torch") or conditions.get("torch") or "-"],
                 *([key.replace("_", " "), value] for key, value in machine.items() if key != "torch"),
                 ["dtype, threads, processes", ", ".join(str(facts.get("runtime", {}).get(key, "-"))
                                                         for key in ("dtype", "threads", "world_size"))],
                 ["model", ", ".join(f"{key} {value}" for key, value in shape.items())],
                 ["data files", ", ".join(map(str, facts.get("data", []))) or "-"],
                 ["data hashes", ", ".join(map(str, conditions["conditions"].get("data", []))) or "-"],
                 ["tokenizer hash", facts.get("tokenizer", "-")], ["stage key (flags-inputs)", facts.get("key", "-")],
                 ["started from", ", ".join(map(str, facts.get("parents", []))) or "nothing"],
                 ["written", facts.get("written", "-")],
                 ["flags", ", ".join(f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                                     for key, value in stage["args"].items() if value not in (None, "", []))]]
        blocks.append(("fold", (stage["name"], conditions.get("command", ""), lines)))
    return blocks


def missing(folder, stages, scores, found):
    """What a full report has and this folder does not, each with the command that makes it."""
    kinds = {stage["kind"] for stage in stages}
    lacking = [f"{kind}: not run (bash run.sh {kind})" for kind in STAGES if kind not in kinds]
    lacking += [f"{stage['name']}: no log below logs/{stage['name']}/, so no curves" for stage in stages
                if not stage["rows"]]
    if not scores:
        lacking.append(f"scores: none (python eval.py --mode score --save_dir {folder})")
    if not found.get("samples"):
        lacking.append(f"samples, compression by language: they need a model (python eval.py --report {folder})")
    return lacking


# -- Markdown ----------------------------------------------------------------------------------------------------------
def plain(value):
    """Any text as one line of Markdown that means only itself."""
    text = re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))
    return text.replace("\\_", "_") if re.fullmatch(r"[\w .,:;()/%+-]*", str(value)) else text


def fenced(text):
    """Text as a block that shows it as it is, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def markdown_table(header, rows):
    """A table, or "" without rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(plain(cell) if cell != '---' else cell for cell in line)} |" for line in lines)


def conversation(sample):
    """[(speaker, text)] of a sample: the turns, what was expected, every checkpoint's answer."""
    turns = [(message.get("role", ""), message.get("content", "")) for message in sample.get("messages", ())
             if isinstance(message, dict)]
    answers = [(weight, text or "(nothing)") for weight, text in sample.get("answers", {}).items()]
    return turns, [("expected", sample.get("expected"))] * bool(sample.get("expected")) + answers


def markdown_block(kind, content):
    """One block as Markdown."""
    if kind in ("table", "heat"):
        return markdown_table(*content)
    if kind == "tiles":
        return markdown_table([name for _, name in content], [[value for value, _ in content]])
    if kind in ("warnings", "list"):
        return "\n".join("- " + (plain(item) if kind == "list" else f"**{plain(item[0])}** {plain(item[1])}")
                         for item in content)
    if kind == "pictures":
        return f"![curves of {plain(content[0])}](<logs/{content[0]}/curves.png>)"
    if kind == "sample":
        title = plain(f"{content.get('kind', '')}, {content.get('lang', '')}")
        return f"**{title}**\n\n" + fenced("\n".join(f"{who}: {text}" for part in conversation(content)
                                                     for who, text in part))
    if kind == "fold":
        name, command, lines = content
        return f"### {plain(name)}\n\n{fenced(command)}\n\n{markdown_table(['what', 'value'], lines)}"
    return f"### {plain(content)}" if kind == "heading" else plain(content)


def markdown(title, sections):
    """The page as Markdown."""
    parts = [f"# {plain(title)}"]
    for name, blocks in sections:
        parts += [f"## {name}", *(markdown_block(*block) for block in blocks)]
    return "\n\n".join(parts) + "\n"


# -- HTML --------------------------------------------------------------------------------------------------------------
STYLE = """
:root { --ink: #1d2430; --soft: #667085; --line: #e2e6ec; --page: #f6f7f9; --card: #ffffff; --blue: #2f6fd0;
        --warn: #b3541e; --heat: 47, 111, 208; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ef; --soft: #98a2b3; --line: #2b3340; --page: #12161c; --card: #1a2029; --blue: #7fb0f5;
          --warn: #f0a070; --heat: 95, 150, 235; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
       font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", "PingFang SC",
       "Microsoft YaHei", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 48px 0 14px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 26px 0 10px; overflow-wrap: anywhere; }
p, .soft { color: var(--soft); margin: 6px 0 12px; }
nav { margin: 14px 0 0; display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 14px; }
a { color: var(--blue); text-decoration: none; } a:hover { text-decoration: underline; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(156px, 1fr)); margin: 16px 0 20px; }
.tile, .wide, .picture, .sample, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tile { padding: 14px 16px; } .tile b { display: block; font-size: 21px; line-height: 1.25; white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; margin: 0 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child, td.words, th.words { text-align: left; }
tr:last-child td { border-bottom: 0; } td:first-child { font-weight: 600; }
.pictures { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
.picture { padding: 8px; } .picture svg { display: block; width: 100%; height: auto; }
ul.warnings { list-style: none; margin: 0; padding: 0; }
ul.warnings li { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--warn);
  border-radius: 6px; padding: 8px 14px; margin: 0 0 8px; font-size: 15px; overflow-wrap: anywhere; }
.samples { columns: 2 440px; column-gap: 14px; }
.sample { break-inside: avoid; padding: 12px 16px; margin: 0 0 14px; font-size: 15px; }
.sample .tag { color: var(--soft); font-size: 13px; }
.said { display: grid; grid-template-columns: 84px 1fr; gap: 3px 12px; margin: 8px 0 0; }
.said dt { color: var(--soft); font-size: 13px; padding-top: 2px; overflow-wrap: anywhere; }
.said dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.said.answers { border-top: 1px solid var(--line); padding-top: 8px; } .answers dt { color: var(--blue); }
.answers dd { max-height: 6.2em; overflow-y: auto; }
details { padding: 0 16px; margin: 0 0 10px; } summary { cursor: pointer; padding: 12px 0; font-weight: 600; }
details pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; background: var(--page); padding: 10px;
  border-radius: 6px; }
details td { white-space: normal; overflow-wrap: anywhere; text-align: left; font-weight: 400; vertical-align: top; }
details td:first-child { color: var(--soft); width: 180px; padding-left: 0; }
footer { color: var(--soft); font-size: 13px; margin-top: 48px; }
@media (max-width: 560px) { main { padding: 20px 12px 60px; } th, td { padding: 7px 10px; }
  .said { grid-template-columns: 68px 1fr; } details td:first-child { width: 96px; } }
"""
# nothing may be loaded and no script run, whatever stands in the data
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def safe(value):
    """Any text as text in HTML."""
    return escaping.escape(str(value), quote=True)


def html_table(header, rows, heat=False):
    """A table; with heat, shares between 0 and 1 are shaded."""
    words = [all(not re.match(r"^[-+\d.]", str(row[i])) or str(row[i]) == "-" for row in rows)
             for i in range(len(header))]
    head = "".join(f"<th{' class=words' * w}>{safe(cell)}</th>" for cell, w in zip(header, words, strict=True))
    lines = []
    for row in rows:
        cells = []
        for number, (cell, word) in enumerate(zip(row, words, strict=True)):
            share = float(cell) if heat and number and cell != "-" else 0
            style = f' style="background: rgba(var(--heat), {0.55 * min(max(share, 0), 1):.2f})"' if share else ""
            cells.append(f"<td{' class=words' * word}{style}>{safe(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def html_said(pairs, kind):
    """Speakers and what they said."""
    return f'<dl class="said {kind}">' + "".join(f"<dt>{safe(who)}</dt><dd>{safe(text)}</dd>"
                                                 for who, text in pairs) + "</dl>"


def html_block(kind, content):
    """One block as HTML. Everything that comes from data goes through safe(); pictures are our own."""
    if kind in ("table", "heat"):
        return html_table(*content, heat=kind == "heat")
    if kind == "tiles":
        tiles = [f"<div class=tile><b>{safe(value)}</b><span>{safe(name)}</span></div>" for value, name in content]
        return f"<div class=tiles>{''.join(tiles)}</div>"
    if kind == "warnings":
        items = "".join(f"<li><b>{safe(name)}</b> {safe(text)}</li>" for name, text in content)
        return f"<ul class=warnings>{items}</ul>"
    if kind == "list":
        return f"<ul>{''.join(f'<li>{safe(item)}</li>' for item in content)}</ul>"
    if kind == "pictures":
        return f"<div class=pictures>{''.join(f'<div class=picture>{svg}</div>' for svg in content[1])}</div>"
    if kind == "sample":
        turns, answers = conversation(content)
        tag = safe(f"{content.get('kind', '')}, {content.get('lang', '')}")
        return (f'<div class=sample lang="{safe(content.get("lang") or "")}"><span class=tag>{tag}</span>'
                f"{html_said(turns, '')}{html_said(answers, 'answers')}</div>")
    if kind == "fold":
        name, command, lines = content
        rows = "".join(f"<tr><td>{safe(what)}</td><td>{safe(value)}</td></tr>" for what, value in lines)
        return (f"<details><summary>{safe(name)}</summary><pre>{safe(command)}</pre>"
                f"<table><tbody>{rows}</tbody></table></details>")
    return f"<h3>{safe(content)}</h3>" if kind == "heading" else f"<p>{safe(content)}</p>"


def html(title, sections):
    """The page as one HTML file."""
    parts, links = [], []
    for number, (name, blocks) in enumerate(sections):
        links.append(f'<a href="#s{number}">{safe(name)}</a>')
        shown = [(kind, html_block(kind, content)) for kind, content in blocks]
        samples = "".join(text for kind, text in shown if kind == "sample")
        body = "\n".join(text for kind, text in shown if kind != "sample")
        parts.append(f'<section id="s{number}"><h2>{safe(name)}</h2>\n{body}'
                     + f"<div class=samples>{samples}</div>" * bool(samples) + "</section>")
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{safe(title)}</title>\n'
            f"<style>{STYLE}</style></head>\n<body><main><h1>{safe(title)}</h1>\n<nav>{''.join(links)}</nav>\n"
            + "\n".join(parts) + f"\n<footer>Written {time.strftime('%Y-%m-%d %H:%M')}. The numbers are in "
            "logs/*/metrics.jsonl and eval_results.jsonl beside this file.</footer></main></body></html>\n")


# -- Writing -----------------------------------------------------------------------------------------------------------
def write(folder, found=None):
    """Write report.html and report.md into an output folder, each as a whole or not at all. Returns the paths.

    Args:
        found: what only a model can tell, a dict of seed, samples [{kind, lang, messages, expected, answers: {weight:
            text}}], checkpoints {weight: when it was written} and compression {lang: bytes per token}; kept in
            report.json. None: what is there already.
    Raises: OSError where the folder cannot be written.
    """
    folder = Path(folder)
    if found is not None:
        replace_text(folder / "report.json", json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    title = f"MiniLLM: report of {folder.resolve().name}"
    sections = build(folder, found or read_fields(folder / "report.json"))
    return [replace_text(folder / "report.html", html(title, sections)),
            replace_text(folder / "report.md", markdown(title, sections))]


def refresh(folder, is_main=True):
    """write(), at the end of a run (rank 0 only): says where the report is. Whatever goes wrong costs a line, never the
    run, which has saved everything already."""
    if not is_main:
        return
    try:
        print(f"report: {write(folder)[0]}", flush=True)
    except Exception as error:  # a broken file of another stage, a full disk, a matplotlib that cannot draw
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        print(f"no report ({reason}); the run itself is whole; try again: python eval.py --report {folder}", flush=True)
