"""Checkpoints: folders that are written as a whole or not at all, the state to resume from, and what a new start means
for what is there already.

A checkpoint is a Hugging Face folder (weights, config, tokenizer) with minillm.json, which says what made it, and
resume/, which holds what only training needs. What this file does not do: know a model (whatever is saved comes in as
an object with save_pretrained(), or as a dict of tensors).

Sources: tmp + fsync + rename is the usual way to replace a file atomically (POSIX rename).
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

FORMAT_VERSION = 1  # of our checkpoint folders; part of every stage key, so that a new layout redoes old stages
# Flags that cannot change what a run computes: they are left out of the stage key, and resume may change them freely.
FREE_FLAGS = {"accumulation_steps", "batch_size", "cache_dir", "debug", "device", "dtype", "epochs", "eval_batches",
              "eval_interval", "eval_prompts", "from_resume", "fsdp", "if_needed", "keep_resume", "log_interval",
              "max_minutes", "max_steps", "overwrite", "save_dir", "save_interval",
              "save_weight", "show_batch", "threads", "tracker", "use_compile", "use_wandb", "zero"}
# ... but these do change the result of a whole stage, so the key keeps them although resume allows them.
KEY_FLAGS = {"max_steps", "epochs", "max_minutes", "accumulation_steps", "batch_size"}
# Empty file in a checkpoint that a launch with --max-restarts found and did not go on with: nor do its restarts.
EARLIER = "of_an_earlier_run"


# ----------------------------------------------------------------------------------------------------------------------
# Folders
@contextlib.contextmanager
def atomic_folder(path):
    """Fill a temporary folder, then put it in place of `path` as a whole; the folder that was there stays as
    `<path>.previous`.

    A crash at any moment leaves `path` or `<path>.previous` complete (find() knows both). An exception inside leaves
    the old one.
    """
    path = Path(path)
    tmp, previous = path.with_name(path.name + ".tmp"), _previous(path)
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        for file in tmp.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(tmp)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(path, previous)
    os.replace(tmp, path)
    _fsync(path.parent)


def _fsync(path):
    """Force a file's or folder's content to the disk (Windows cannot do it for folders, nor needs it)."""
    with contextlib.suppress(OSError, PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def find(save_dir, name):
    """Folder of a checkpoint given by name below save_dir or by path. A damaged one is named and its predecessor used
    instead.

    Raises FileNotFoundError that lists what there is.
    """
    # below save_dir first: a folder "sft" that happens to lie in the working directory must not hide out/sft
    candidates = [Path(save_dir) / name, Path(name)]
    there = [p for p in candidates if any((f / "config.json").is_file() for f in (p, _previous(p)))]
    path = (there or candidates[os.sep in str(name):])[0]
    previous = _previous(path)
    if (path / "config.json").is_file():
        damage = _damage(path)
        if not damage:
            return path
        if (previous / "config.json").is_file() and not _damage(previous):
            print(f"checkpoint {path} is damaged ({damage}); using {previous} instead", flush=True)
            return previous
        raise ValueError(f"checkpoint {path} is damaged ({damage}); there is no earlier one beside it; train that "
                         f"stage again")
    if (previous / "config.json").is_file():
        print(f"checkpoint {path} is missing (a save was interrupted); using {previous} instead", flush=True)
        return previous
    there = sorted(p.parent.name for p in Path(save_dir).glob("*/config.json")
                   if not p.parent.name.endswith((".previous", ".tmp")))
    raise FileNotFoundError(f"checkpoint {name!r} not found (looked for {path}/config.json from {Path.cwd()}); "
                            f"in {save_dir}/ there are: {', '.join(there) or 'none'}; "
                            "train that stage first, or give a folder")


def _previous(path):
    """Where atomic_folder keeps the folder that `path` replaced."""
    return Path(f"{path}.previous")


def _damage(path):
    """Why a checkpoint folder cannot be used, or ''. Sizes were written beside the weights, so a cut file is seen
    without reading it."""
    facts = read_minillm(path)
    if not facts and (path / "minillm.json").exists():
        return "minillm.json is unreadable"
    for name, size in facts.get("files", {}).items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return ""


def write_minillm(folder, facts):
    """Write minillm.json: what made this checkpoint (stage, parents, hashes, versions, seed, metrics) and the size of
    every file."""
    folder = Path(folder)
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()
             and f.name != "minillm.json"}
    content = {"format": FORMAT_VERSION, "torch": torch.__version__, "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
               **facts, "files": files}
    (folder / "minillm.json").write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str),
                                         encoding="utf-8")


def read_minillm(folder):
    """minillm.json of a checkpoint folder as a dict; {} for a folder from elsewhere or an unreadable file."""
    try:
        return json.loads((Path(folder) / "minillm.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def save(runtime, args, parts, state, facts, finished=False):
    """Write out/<save_weight> atomically: each part's own files, the resume state, minillm.json. Every rank must call
    it.

    Args:
        parts: objects with save_pretrained(folder): model and tokenizer.
        state: dict for resuming, of tensors and plain values (full-precision weights, optimizer, scaler, progress).
        facts: dict for minillm.json.
    Returns: True when written; False (with a message, training goes on) when the disk is full.
    """
    rng = runtime.gather(_rng_state())
    written = True
    if runtime.is_main:
        folder = Path(args.save_dir) / args.save_weight
        try:
            _check_space(folder, state)
            with atomic_folder(folder) as tmp:
                for part in parts:
                    part.save_pretrained(tmp)
                if not finished or args.keep_resume:
                    (tmp / "resume").mkdir()
                    torch.save({**state, "rng": rng, "args": _plain(args)}, tmp / "resume" / "state.pt")
                choice = {"dtype": str(runtime.dtype)[6:], "threads": runtime.threads, "world_size": runtime.world_size}
                seconds = round(time.time() - runtime.started, 1)
                write_minillm(tmp, {**facts, "finished": finished, "seconds": seconds, "args": _plain(args),
                                    "runtime": choice})
            if finished:  # the run is over and its checkpoint whole: the one before is no longer needed
                shutil.rmtree(_previous(folder), ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            # a disk that fills up while writing: torch.save raises RuntimeError, safetensors its own class
            last = read_minillm(folder).get("progress", {}).get("step", "none")
            print(f"checkpoint not written to {folder}: {error}. Training goes on; last good checkpoint: step {last}",
                  flush=True)
            written = False
    written = not runtime.any(not written)
    if finished and not written:
        raise OSError("the final checkpoint could not be written (see above); the last good one is untouched; make "
                      "room and go on with --from_resume 1")
    return written


def _check_space(folder, state):
    """Raise OSError before writing when the disk cannot hold a second copy (weights once more beside the state)."""
    need = sum(t.numel() * t.element_size() for t in _tensors(state))
    need += sum(t.numel() * t.element_size() for t in _tensors(state.get("model", {})))
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < 1.05 * need:
        raise OSError(f"it needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")


def _tensors(tree):
    """All tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def _rng_state():
    """torch's random state of this process (CPU and current CUDA device)."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def load_resume(runtime, args):
    """Resume state of out/<save_weight>, with this rank's random state restored. Raises ValueError naming changed
    flags that matter."""
    folder = find(args.save_dir, args.save_weight)
    try:
        # with FSDP each rank needs a slice only: mapped, the file is not in memory once for every rank
        state = torch.load(folder / "resume" / "state.pt", map_location="cpu", weights_only=True,
                           mmap=runtime.lockstep)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0][:100] or type(error).__name__
        raise ValueError(f"{folder}/resume/state.pt cannot be read ({reason}); the run "
                         f"cannot be resumed; start it again with --overwrite 1") from None
    now = _plain(args)
    changed = [f"--{name}: was {old!r}, is {now[name]!r}" for name, old in state["args"].items()
               if name not in FREE_FLAGS and name in now and now[name] != old]
    if changed:
        raise ValueError(f"cannot resume {folder} with changed flags ({'; '.join(changed)}); the result would be "
                         f"neither run's; give the old values, or start again with --overwrite 1")
    runtime.started -= read_minillm(folder).get("seconds", 0)
    rng = state["rng"]
    if len(rng) == runtime.world_size:
        torch.set_rng_state(rng[runtime.rank]["cpu"])
        if rng[runtime.rank]["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng[runtime.rank]["cuda"])
    else:
        runtime.print(f"resuming with {runtime.world_size} process(es), saved with {len(rng)}: no sample is lost or "
                      f"repeated, but dropout draws differ")
    return state


def _plain(args):
    """A namespace as JSON-safe values."""
    return {name: value for name, value in vars(args).items()
            if isinstance(value, (int, float, str, bool, list, type(None)))}


# ----------------------------------------------------------------------------------------------------------------------
# Stages: finished, interrupted or stale
def file_hash(path):
    """First 16 hex digits of a file's sha256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def stage_key(args, files=(), parents=()):
    """Hash of everything that decides a stage's result, as "flags-inputs": its flags and our format; the content of its
    input files and of its parent checkpoints (their own keys, or their weights where they come from elsewhere)."""
    flags = {k: v for k, v in _plain(args).items() if k in KEY_FLAGS or k not in FREE_FLAGS}
    origin = []
    for parent in parents:
        facts = read_minillm(parent)  # its key says how it was made, its step how far it had come
        origin.append([facts["key"], facts.get("progress", {}).get("step")] if "key" in facts
                      else [file_hash(f) for f in sorted(Path(parent).glob("model*.safetensors"))])
    parts = [FORMAT_VERSION, flags], [[file_hash(f) for f in files], origin]
    return "-".join(hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()[:12]
                    for part in parts)


def begin(runtime, args, key):
    """Decide what this start means: "skip", "resume" or "fresh". Raises ValueError when it would destroy another run.

    Rank 0 looks, all ranks follow: a second look by another rank could see a newer state.
    """
    decision = runtime.gather(_decide(args, key) if runtime.is_main else None)[0]
    if runtime.is_main:
        _mark_earlier(Path(args.save_dir) / args.save_weight, decision)
    if isinstance(decision, ValueError):
        raise decision
    word, message = decision
    if message:
        runtime.print(message)
    return word


def _restarts():
    """(how often torchrun has started this process again after a failure, how often it may), both 0 elsewhere."""
    return tuple(int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))


def _started_again(folder):
    """Whether this process replaces one that failed, and the checkpoint in `folder` is that one's work."""
    return _restarts()[0] > 0 and not (folder / EARLIER).exists()


def _mark_earlier(folder, decision):
    """At the first start of a launch that may restart: mark what is in the folder, or unmark it if the run goes on with
    it. The run's own saves take the place of what is marked."""
    count, limit = _restarts()
    goes_on = isinstance(decision, tuple) and decision[0] != "fresh"
    for path in (folder, _previous(folder)):
        if count == 0 and goes_on:
            (path / EARLIER).unlink(missing_ok=True)
        elif count == 0 and limit and path.is_dir():
            (path / EARLIER).touch()


def _decide(args, key):
    """(word, message) for begin(), or the ValueError to raise."""
    folder = Path(args.save_dir) / args.save_weight
    try:
        folder = find(args.save_dir, args.save_weight)
    except FileNotFoundError:
        return "fresh", f"nothing to resume in {folder}: starting fresh" if args.from_resume else ""
    except ValueError as error:
        return "fresh", f"{error}: starting fresh"
    facts = read_minillm(folder)
    resumable = (folder / "resume" / "state.pt").is_file()
    same = facts.get("key") == key
    again = _started_again(folder)
    if again and same and facts.get("finished"):  # another rank failed behind the end
        return "skip", f"{folder} is finished: nothing is left to do"
    if args.if_needed and not again:
        if same and facts.get("finished"):
            return "skip", f"{folder} is finished with these flags and inputs: skipped"
        if same and resumable:
            return "resume", f"{folder} was interrupted: resuming"
        why = "holds no resume state" if same else "was made with other flags or inputs"
        return "fresh", f"{folder} {why}: doing it again"
    if args.from_resume or again:  # a restart resumes by itself; --overwrite was meant for what its first start found
        if resumable and facts.get("key", "").split("-")[-1] != key.split("-")[-1]:
            return ValueError(f"cannot resume {folder}: its data files or the checkpoint it started from have changed; "
                              "the result would be neither run's; bring them back, or start again with --overwrite 1")
        if resumable:
            return "resume", ""
        return "fresh", f"{folder} holds no resume state: starting fresh"
    if args.overwrite:
        return "fresh", ""
    state = "a finished" if facts.get("finished") else "an unfinished"
    return ValueError(f"{folder} already holds {state} run (stage {facts.get('stage', 'unknown')}); it is not replaced "
                      "silently; give --from_resume 1 to go on with it, --overwrite 1 to replace it, or another "
                      "--save_weight")


def earlier_choice(args):
    """dtype and threads of the run that is being resumed, else {}."""
    folder = Path(args.save_dir) / args.save_weight
    if not (getattr(args, "from_resume", 0) or getattr(args, "if_needed", 0) or _started_again(folder)):
        return {}
    earlier = (read_minillm(folder) or read_minillm(_previous(folder))).get("runtime", {})
    # threads are cores / processes: a run that goes on with more processes must not start cores threads in each
    same = earlier.get("world_size") == int(os.environ.get("WORLD_SIZE", 1))
    return earlier if same else {"dtype": earlier.get("dtype")}
