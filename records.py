"""What the stages of a run leave on the disk for each other and for the report, read as values: minillm.json,
metrics.jsonl, eval_results.jsonl and the like.

A killed run, a full disk or another program may have left anything. So a file that is no JSON object reads as {}, a
line that is none is left out, and a field of another kind than KINDS says is as good as missing: who reads here need
not look twice.

What this file does not do: say where such files lie and what is in them (checkpoint.py, logs.py, results.py,
report.py), or read rows of training data, where damage is an error (rows.py).
"""
import json
import math
import os
from pathlib import Path

STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")  # in the order in which run.sh makes them
GROUPS = ("bits_per_byte", "exact_match", "preference", "pass_at_1", "pair_accuracy")  # of eval.py --mode score
# What the fields that somebody looks into must be
KINDS = {**dict.fromkeys(("answers", "apart", "args", "bands", "by_lang", "by_skill", "checkpoints", "compression",
                          "conditions", "metrics", "model", "progress", "runtime"), dict),
         **dict.fromkeys(("data", "load", "messages", "parents", "samples"), list),
         **dict.fromkeys(("command", "key", "stage", "time", "torch", "written"), str),
         **dict.fromkeys(("batch_tokens", "beta", "max_seq_len", "ppo_epochs", "seconds", "tokens",
                          "updates_per_rollout"), (int, float))}


def fields(value) -> dict:
    """A JSON object without the fields that KINDS rules out; {} for anything else."""
    found = value if isinstance(value, dict) else {}
    # other objects have names of the user's own in them, such as those of skills
    return {key: fields(entry) if key in ("args", "conditions", "progress") else entry for key, entry in found.items()
            if isinstance(entry, KINDS.get(key, object))}


def read_object(path) -> dict:
    """A file's JSON object; {} where the file is missing, broken or something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_fields(path) -> dict:
    """read_object() as fields()."""
    return fields(read_object(path))


def read_objects(path, waiting: bytes = b"") -> list[dict]:
    """The objects of a JSONL file; lines that are none, such as a half-written last one (kill -9 can leave it), are
    left out. waiting: what a full disk has not taken yet."""
    path, rows = Path(path), []
    content = (path.read_bytes() if path.is_file() else b"") + waiting
    for line in content.decode("utf-8", "replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]


def read_metrics(folder, waiting: bytes = b"") -> list[dict]:
    """The rows of a log folder's metrics.jsonl, without those that have no step."""
    return [row for row in read_objects(Path(folder) / "metrics.jsonl", waiting) if isinstance(row.get("step"), int)]


def finite(value):
    """The same with None for numbers that JSON does not have: nan and the infinities."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_text(path: Path, text: str) -> Path:
    """Put a text in place of a file: who reads it meanwhile sees the old one or the new one, and an interrupted write
    leaves the old one. Two processes may do so at once. Returns the path."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path
