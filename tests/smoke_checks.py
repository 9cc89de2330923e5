"""Checks of a finished run folder, called by `bash run.sh --smoke-test`:  python tests/smoke_checks.py out/smoke

Each check looks at what the stages left on disk: files load again, the loss fell, answers end by themselves, every
stage's own metric moved the right way. Prints a line for each; exit code 1 when one fails.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the leaves are one folder up

import torch

from model import ScalarHead, Transformer
from tokenizer import Tokenizer

STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")


def facts(folder):
    return json.loads((folder / "minillm.json").read_text(encoding="utf-8"))


def evaluated(out, stage, key):
    """This number in all evaluations of a stage."""
    rows = [json.loads(line) for line in (out / "logs" / stage / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def losses(out, stage):
    """Mean loss of the first and of the last fifth of the logged steps."""
    values = evaluated(out, stage, "loss")
    part = max(1, len(values) // 5)
    return sum(values[:part]) / part, sum(values[-part:]) / part


def checks(out):
    """Yield (what, True or False, numbers)."""
    metrics = {stage: facts(out / stage)["metrics"] for stage in STAGES}
    models = {}
    for stage in STAGES:
        kind = ScalarHead if stage == "reward" else Transformer
        models[stage] = kind.from_pretrained(out / stage)
        whole = all(torch.isfinite(p).all() for p in models[stage].parameters())
        size = sum(p.numel() for p in models[stage].parameters())
        yield f"{stage}: weights load again, all finite", whole, f"{size} parameters"
        picture = (out / "logs" / stage / "curves.png").read_bytes()
        drawn = picture[:4] == b"\x89PNG" and len(picture) > 5000
        yield f"{stage}: curves.png is a picture", drawn, f"{len(picture)} bytes"
    for stage in ("pretrain", "sft", "reward", "dpo"):
        first, last = losses(out, stage)
        yield f"{stage}: loss fell", last < first, f"{first:.3f} -> {last:.3f}"

    moved = {stage: f"{m['before']:.3f} -> {m['after']:.3f}" for stage, m in metrics.items()}
    m = metrics["pretrain"]
    yield "pretrain: bits per byte fell by a third", m["after"] < 0.67 * m["before"], moved["pretrain"]
    m = metrics["sft"]
    yield "sft: exact match rose", m["after"] > m["before"], moved["sft"]
    yield "sft: answers end by themselves", m["stop_rate"] >= 0.9, f"{m['stop_rate']:.3f}"
    yield "reward: prefers the better answer", metrics["reward"]["after"] >= 0.6, moved["reward"]
    yield "dpo: implicit accuracy rose", metrics["dpo"]["accuracy"] >= 0.6, f"{metrics['dpo']['accuracy']:.3f}"
    for stage in ("ppo", "grpo"):
        m = metrics[stage]
        # a share of few answers may come out the same; how long they are does not
        lengths = evaluated(out, stage, "val_length")
        yield (f"{stage}: its answers changed", m["after"] != m["before"] or lengths[0] != lengths[-1],
               f"{moved[stage]}; {lengths[0]:.2f} -> {lengths[-1]:.2f} tokens")
    for stage, parent in (("dpo", "sft"), ("ppo", "sft"), ("grpo", "sft")):
        pairs = zip(models[stage].parameters(), models[parent].parameters(), strict=True)
        moved = max((a - b).abs().max().item() for a, b in pairs)
        yield f"{stage}: weights moved away from {parent}", 0 < moved < 1, f"{moved:.1e}"

    tokenizer = Tokenizer.from_pretrained(out / "sft")
    text = "Anna 有 3 个苹果。 \U0001F34E"
    yield "tokenizer: text comes back unchanged", tokenizer.decode(tokenizer.encode(text)) == text, repr(text)
    prompt, _ = tokenizer.render([{"role": "user", "content": "What is 2 + 3?"}], add_generation_prompt=True)
    for stage in ("sft", "dpo", "ppo", "grpo"):
        stops = tokenizer.stop_ids(chat=True)
        ids = [i for _, i in models[stage].generate([prompt], 64, temperature=0.0, stop_ids=stops)]
        yield f"{stage}: an answer ends with <|im_end|>", ids[-1] == tokenizer.eos_id, repr(tokenizer.decode(ids[:-1]))
    scored = {json.loads(line)["weight"] for line in (out / "eval_results.jsonl").read_text().splitlines()}
    yield "eval: scored every stage", scored >= set(STAGES), ", ".join(sorted(scored))
    page = (out / "report.html").read_text(encoding="utf-8")
    yield "report: tells of every stage", all(f">{stage}<" in page for stage in STAGES), f"{len(page)} characters"


def main():
    results = list(checks(Path(sys.argv[1])))
    for what, passed, numbers in results:
        print(f"{'ok    ' if passed else 'FAILED'} {what} ({numbers})")
    failed = sum(not passed for _, passed, _ in results)
    print(f"{failed} of {len(results)} checks failed" if failed else f"all {len(results)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
