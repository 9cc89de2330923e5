"""Benchmarks beside lm-evaluation-harness: seconds for the same questions on the same model, and the same numbers.

    python bench/evaluation.py --weight out/sft --task_dir DATA/eval --tasks hellaswag,piqa --limit 100

Both read the same requests (made by tasks.py, whose prompts tests/test_tasks.py compares) on one set of weights, in
fp32 with the same threads. The harness runs its own HFLM on `transformers` with its own batching, at the best of the
batch sizes given. They take turns, the median of the rounds is kept, and what is counted is processor time (over all
threads), which a busy machine disturbs less than the clock.
Needs lm-eval (requirements-dev.txt). Reading files, tokenising and starting up are counted for neither.
"""
import argparse
import json
import statistics
import sys
import time
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


def requests(name, args, tokenizer, context):
    """Groups of rows of one task: of all items, or of pages' first windows as many as --limit."""
    items, _ = tasks.load(name, args.task_dir, 0, args.few_shot)
    # evenly over the file, so that an exam shows more than its first subject
    items = items[:: max(1, len(items) // args.limit)][: args.limit]
    groups = tasks.requests(tasks.TASKS[name], items, tokenizer, context)
    return [rows for _, rows in groups][: args.limit]


def ours(model, groups, batch_size, pad_id):
    """Log-probabilities in order, and seconds."""
    start = time.process_time()
    found = dict(metrics.sequence_scores(model, groups, batch_size, pad_id=pad_id))
    seconds = time.process_time() - start
    return [logprob for n in range(len(groups)) for logprob, _ in found[n]], seconds


def theirs(harness, groups, batch_size):
    """The same from the harness's own loop over (context ids, continuation ids)."""
    wanted = [(("", str(n)), list(row.ids[:row.start]), list(row.ids[row.start:]))
              for n, row in enumerate(row for group in groups for row in group)]
    harness.batch_size_per_gpu = batch_size
    start = time.process_time()
    found = harness._loglikelihood_tokens(wanted, disable_tqdm=True)
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
        groups = requests(name, args, tokenizer, model.config.max_position_embeddings)
        seconds = {key: [] for key in ("ours", *args.batch_sizes)}
        for _ in range(args.rounds):
            own, spent = ours(model, groups, args.batch_size, tokenizer.pad_id)
            seconds["ours"].append(spent)
            for size in args.batch_sizes:
                other, spent = theirs(harness, groups, size)
                seconds[size].append(spent)
        seconds = {key: statistics.median(values) for key, values in seconds.items()}
        best = min(args.batch_sizes, key=seconds.get)
        apart = max(abs(a - b) / max(1, abs(b)) for a, b in zip(own, other, strict=True))
        assert apart < 1e-3, f"{name}: log-probabilities differ by {apart:.1e} of their size"
        totals = [totals[0] + seconds["ours"], totals[1] + seconds[best]]
        row = {"task": name, "few_shot": args.few_shot, "groups": len(groups), "rows": len(own),
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
