"""Benchmarks beside lm-evaluation-harness: seconds for the same questions on the same model, and the same numbers.

    python bench/evaluation.py --weight out/sft --task_dir DATA/eval --tasks hellaswag,piqa --limit 100

Both begin with the same texts (made by tasks.py; tests/test_tasks.py compares them with the harness's own) and end with
their log-probabilities, on one set of weights, in fp32 with the same threads. The harness runs its own HFLM on
`transformers`, with its own tokenising, sorting and batching, at the best of the batch sizes given. They take turns,
the median of the rounds is kept, and what is counted is processor time (over all threads), which a busy machine
disturbs less than the clock. Needs lm-eval (requirements-dev.txt). Reading files and starting up are counted for
neither.
"""
import argparse
import json
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


def questions(name, args):
    """Neighbouring items from the middle of one task: of an exam mostly of one subject, as in a whole run."""
    items, _ = tasks.load(name, args.task_dir, 0, args.few_shot)
    first = max(0, len(items) // 2 - args.limit // 2)
    return items[first : first + args.limit]


def ours(model, tokenizer, name, items, batch_size):
    """Log-probabilities in order (a page's windows added up), and seconds."""
    start = time.process_time()
    groups = tasks.requests(tasks.TASKS[name], items, tokenizer, model.config.max_position_embeddings)
    found = dict(metrics.sequence_scores(model, [rows for _, rows in groups], batch_size, pad_id=tokenizer.pad_id))
    seconds = time.process_time() - start
    if tasks.TASKS[name].kind == "rolling":
        pages = defaultdict(float)
        for n, (item, _) in enumerate(groups):
            pages[item] += found[n][0][0]
        return list(pages.values()), seconds
    return [logprob for n in range(len(groups)) for logprob, _ in found[n]], seconds


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


def parse_args(argv=None):
    """Flags of the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="checkpoint folder")
    parser.add_argument("--task_dir", required=True, help="folder with the published files")
    parser.add_argument("--tasks", default="hellaswag,arc_easy,winogrande,piqa,boolq,lambada,wikitext2,ceval,mmlu")
    parser.add_argument("--limit", type=int, default=64, help="items of each task")
    parser.add_argument("--few_shot", type=int, default=0, help="examples in front of each question")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32],
                        help="of the harness; the best counts")
    parser.add_argument("--batch_size", type=int, default=64, help="of this project")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both")
    parser.add_argument("--output", default="", help="file for the results, one JSON object a line")
    return parser.parse_args(argv)


def main(args):
    """Print a line a task and the ratio over all."""
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(args.threads)
    common._keep_freed_memory()  # as every script does; it serves both
    tokenizer, model = Tokenizer.from_pretrained(args.weight), Transformer.from_pretrained(args.weight)
    harness = HFLM(pretrained=args.weight, device="cpu", dtype="float32", batch_size=1)
    totals = [0.0, 0.0]
    for name in args.tasks.split(","):
        items = questions(name, args)
        seconds = {key: [] for key in ("ours", *args.batch_sizes)}
        for _ in range(args.rounds):
            own, spent = ours(model, tokenizer, name, items, args.batch_size)
            seconds["ours"].append(spent)
            for size in args.batch_sizes:
                other, spent = theirs(harness, name, items, size)
                seconds[size].append(spent)
        seconds = {key: statistics.median(values) for key, values in seconds.items()}
        best = min(args.batch_sizes, key=seconds.get)
        apart = max(abs(a - b) / max(1, abs(b)) for a, b in zip(own, other, strict=True))
        assert apart < 1e-3, f"{name}: log-probabilities differ by {apart:.1e} of their size"
        totals = [totals[0] + seconds["ours"], totals[1] + seconds[best]]
        row = {"task": name, "few_shot": args.few_shot, "items": len(items), "rows": len(own),
               "ours_s": round(seconds["ours"], 3), "harness_s": round(seconds[best], 3), "harness_batch": best,
               "ratio": round(seconds[best] / seconds["ours"], 2), "largest_difference": apart}
        print(f"{name:14} {row['ratio']:5.2f} times the harness's speed ({row['ours_s']:.2f} s and "
              f"{row['harness_s']:.2f} s at its batch size {best}), {len(own)} rows, apart by {apart:.0e}", flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(f"{'all':14} {totals[1] / totals[0]:5.2f} times")
    return {"ratio": totals[1] / totals[0]}


if __name__ == "__main__":
    main(parse_args())
