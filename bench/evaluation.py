"""Benchmarks beside lm-evaluation-harness: seconds for the same questions on the same model, and the same numbers.

    python bench/evaluation.py --weight out/sft --task_dir DATA/eval                     # the whole table
    python bench/evaluation.py --weight out/sft --task_dir DATA/eval --tasks hellaswag,piqa --limit 100 --few_shot 0

Both begin with the same texts (made by tasks.py; tests/test_tasks.py compares them with the harness's own) and end with
their log-probabilities, on one set of weights, with the same threads, in fp32 unless said otherwise. The harness runs
its own HFLM on `transformers`, with its own tokenising, sorting and batching, at the best of the batch sizes given.
They take turns, the median of the rounds is kept, and what is counted is processor time (over all threads), which a
busy machine disturbs less than the clock. Needs lm-eval (requirements-dev.txt). Reading files and starting up are
counted for neither.

Columns: seconds of both; times = the harness's best / ours; times its default = its batch size 1 / ours; arithmetic =
products of matrices that the harness computes / those needed (every distinct beginning once through the layers; the
last MLP and the head where an id is scored): what would be gained if both did equal work equally fast.
"""
import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if Path(sys.path[0]).resolve() == ROOT / "bench":  # run as a script: bench/ must not hide the project's files
    sys.path[0] = str(ROOT)

import common  # noqa: E402
import metrics  # noqa: E402
import tasks  # noqa: E402
from model import Transformer  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


def questions(name, args, few_shot):
    """Neighbouring items from the middle of one task: of an exam mostly of one subject, as in a whole run."""
    items, _ = tasks.load(name, args.task_dir, 0, few_shot)
    first = max(0, len(items) // 2 - args.limit // 2)
    return items[first : first + args.limit]


def arithmetic(model, groups):
    """Weights times ids that the harness multiplies, divided by those that are needed; attention is left out."""
    head = model.config.vocab_size * model.config.hidden_size
    layers = model.flops_per_token(0) / 6 - head
    last = sum(p.numel() for p in model.model.layers[-1].mlp.parameters())  # only the head looks at what it gives
    # the harness, too, reads a context once for all answers of one id
    rows = sorted({(tuple(ids[:-1]), start) for group in groups for ids, start in group})
    distinct, scored = len(rows[0][0]), len(rows[0][0]) - rows[0][1] + 1
    for (before, _), (ids, start) in itertools.pairwise(rows):
        shared = len(os.path.commonprefix([before, ids]))
        distinct += len(ids) - shared
        scored += len(ids) - max(shared, start - 1)
    return sum(len(ids) for ids, _ in rows) * (layers + head) / (distinct * (layers - last) + scored * (last + head))


def ours(model, tokenizer, name, items, args):
    """Log-probabilities in order (a page's windows added up), seconds, and the requests."""
    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16")

    start = time.process_time()
    groups = tasks.requests(tasks.TASKS[name], items, tokenizer, model.config.max_position_embeddings)
    found = dict(metrics.sequence_scores(model, [rows for _, rows in groups], args.batch_size, args.max_tokens,
                                         tokenizer.pad_id, autocast))
    seconds = time.process_time() - start
    if tasks.TASKS[name].kind == "rolling":
        pages = defaultdict(float)
        for n, (item, _) in enumerate(groups):
            pages[item] += found[n][0][0]
        return list(pages.values()), seconds, groups
    return [logprob for n in range(len(groups)) for logprob, _ in found[n]], seconds, groups


def theirs(harness, name, items, batch_size):
    """The same from the harness's own model class, which tokenises, sorts, batches and scores pairs of texts."""
    from lm_eval.api.instance import Instance

    task = tasks.TASKS[name]
    if task.kind == "rolling":
        pairs = [(item.answers[0],) for item in items]
    else:
        space = "" if task.kind == "word" else " "
        pairs = [(context, space + answer) for item in items for context in item.contexts for answer in item.answers]
    wanted = [Instance("loglikelihood", {}, pair, n, metadata=(name, n, 1)) for n, pair in enumerate(pairs)]
    harness.batch_size_per_gpu = batch_size
    start = time.process_time()
    if task.kind == "rolling":
        return harness.loglikelihood_rolling(wanted, disable_tqdm=True), time.process_time() - start
    found = harness.loglikelihood(wanted, disable_tqdm=True)
    return [logprob for logprob, _ in found], time.process_time() - start


def compare(name, few_shot, model, tokenizer, harness, args):
    """A row of the table."""
    items, seconds = questions(name, args, few_shot), {key: [] for key in ("ours", *args.batch_sizes)}
    for _ in range(args.rounds):
        own, spent, groups = ours(model, tokenizer, name, items, args)
        seconds["ours"].append(spent)
        for size in args.batch_sizes:
            other, spent = theirs(harness, name, items, size)
            seconds[size].append(spent)
    seconds = {key: statistics.median(values) for key, values in seconds.items()}
    best = min(args.batch_sizes, key=seconds.get)
    apart = max(abs(a - b) / max(1, abs(b)) for a, b in zip(own, other, strict=True))
    allowed = 1e-3 if args.dtype == args.harness_dtype == "fp32" else 0.03
    assert apart < allowed, f"{name}: log-probabilities differ by {apart:.1e} of their size"
    return {"task": name, "few_shot": few_shot, "items": len(items), "rows": len(own),
            "ours_s": round(seconds["ours"], 3), "harness_s": round(seconds[best], 3), "harness_batch": best,
            "harness_default_s": round(seconds.get(1, math.nan), 3), "ratio": round(seconds[best] / seconds["ours"], 2),
            "arithmetic": round(arithmetic(model, [rows for _, rows in groups]), 2), "largest_difference": apart}


def show(rows):
    """Print a row as a line of the table; of several what they add up to."""
    if len(rows) > 1:
        total = {key: sum(row[key] for row in rows) for key in ("rows", "ours_s", "harness_s", "harness_default_s")}
        rows = [{"task": "all", "few_shot": "", "harness_batch": "best", "arithmetic": "", **total}]
    for row in rows:
        ratios = [f"{row[key] / row['ours_s']:.2f}" for key in ("harness_s", "harness_default_s")]
        cells = (row["task"], row["few_shot"], row["rows"], f"{row['ours_s']:.2f}", f"{row['harness_s']:.2f}",
                 row["harness_batch"], *ratios, row["arithmetic"])
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def parse_args(argv=None):
    """Flags of the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="checkpoint folder")
    parser.add_argument("--task_dir", required=True, help="folder with the published files")
    parser.add_argument("--tasks", default="hellaswag,arc_easy,arc_challenge,winogrande,piqa,boolq,lambada,ceval,cmmlu,"
                                           "mmlu", help="wikitext2 takes hours with as many pages as others have items")
    parser.add_argument("--limit", type=int, default=48, help="items of each task")
    parser.add_argument("--few_shot", type=int, nargs="+", default=[0, 5],
                        help="examples in front of each question; pages have none")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32],
                        help="of the harness; the best counts")
    parser.add_argument("--batch_size", type=int, default=64, help="of this project")
    parser.add_argument("--max_tokens", type=int, default=0, help="ids in one pass of this project; 0: as eval.py does")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of this project")
    parser.add_argument("--harness_dtype", choices=("fp32", "bf16"), default="fp32", help="of the harness")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both")
    parser.add_argument("--output", default="", help="file for the results, one JSON object a line")
    return parser.parse_args(argv)


def main(args):
    """Print the table, then sums of all tasks without and with examples."""
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(args.threads)
    common._keep_freed_memory()  # as every script does; it serves both
    tokenizer, model = Tokenizer.from_pretrained(args.weight), Transformer.from_pretrained(args.weight)
    harness = HFLM(pretrained=args.weight, device="cpu", batch_size=1,
                   dtype=common.SHORT_DTYPES[args.harness_dtype])
    print("| task | examples | rows | here, s | harness, s | its batch | times | times its default | arithmetic |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for few_shot, name in itertools.product(args.few_shot, args.tasks.split(",")):
        if tasks.shots(tasks.TASKS[name], few_shot) != few_shot:
            continue
        rows.append(compare(name, few_shot, model, tokenizer, harness, args))
        show(rows[-1:])
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    for few_shot in args.few_shot:
        part = [row for row in rows if row["few_shot"] == few_shot]
        if len(part) > 1:
            show(part)
    return {"ratio": sum(row["harness_s"] for row in rows) / sum(row["ours_s"] for row in rows)}


if __name__ == "__main__":
    main(parse_args())
