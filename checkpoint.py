"""Checkpoints: folders that are written as a whole or not at all, the state to resume from, and what a new start means
for what is there already.

A checkpoint is a Hugging Face folder (weights, config, tokenizer) with minillm.json, which says what made it, and
resume/, which holds what only training needs. What this file does not do: know a model (whatever is saved comes in as
an object with save_pretrained(), or as a dict of tensors).

Sources: tmp + fsync + rename is the usual way to replace a file atomically (POSIX rename).
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pickle
import shutil
import time
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError

from records import STAGES, finite, read_fields

FORMAT_VERSION = 1  # of our checkpoint folders; part of every stage key, so that a new layout redoes old stages
# Flags that cannot change what a run computes: they are left out of the stage key, and resume may change them freely.
FREE_FLAGS = {"accumulation_steps", "batch_size", "cache_dir", "debug", "device", "dtype", "epochs", "eval_batches",
              "eval_interval", "eval_prompts", "eval_rows", "from_resume", "fsdp", "gradient_checkpointing", "health",
              "if_needed", "keep_resume", "learning_rate", "log_interval", "max_minutes", "max_steps", "merge",
              "muon_learning_rate", "overwrite", "patience", "plot_interval", "regression_interval", "regression_path",
              "save_dir", "save_interval", "save_weight", "show_batch", "threads", "tracker", "use_compile",
              "use_wandb", "value_learning_rate", "zero"}
# ... but these do change the result of a whole stage, so the key keeps them although resume allows them: a run that
# was stopped because its loss was not finite goes on at a lower rate.
KEY_FLAGS = {"max_steps", "epochs", "max_minutes", "accumulation_steps", "batch_size", "learning_rate", "merge",
             "muon_learning_rate", "patience", "value_learning_rate"}
# ... and these where evaluations decide what is kept, or when a run ends
EVAL_FLAGS = {"eval_batches", "eval_interval", "eval_prompts"}
# File in a checkpoint that a launch with --max-restarts found and did not go on with (nor do its restarts), or that a
# run is about to replace: its own log is gone then, and the file says so.
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
    path = _target(Path(path))
    tmp, previous = path.with_name(path.name + ".tmp"), _previous(path)
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        for file in tmp.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(tmp)
        if path.exists() and _damage(path, "whole"):
            shutil.rmtree(path)  # the one before is the only good one: it stays until the new one is in place
        elif path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(path, previous)
        os.replace(tmp, path)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    _fsync(path.parent)


def _fsync(path):
    """Force a file's or folder's content to the disk. Raises OSError when the disk says that it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # some disks report only now that they are full or broken; other errors say that the system knows no fsync here
        # (Windows for folders)
        if error.errno in (errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.EIO)):
            raise


def find(save_dir, name, resume=""):
    """Folder of a checkpoint given by name below save_dir or by path. A damaged one is named and its predecessor used
    instead. resume: as in _damage(); who only reads the weights does without the state.

    Raises FileNotFoundError that lists what there is.
    """
    # below save_dir first: a folder "sft" that happens to lie in the working directory must not hide out/sft
    candidates = [Path(save_dir) / name, Path(name)]
    there = [p for p in candidates if any((f / "config.json").is_file() for f in (p, _previous(p)))]
    path = (there or candidates[os.sep in str(name):])[0]
    previous = _previous(path)
    if (path / "config.json").is_file():
        damage = _damage(path, resume)
        if not damage:
            return path
        if (previous / "config.json").is_file() and not _damage(previous, resume):
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
    return Path(f"{_target(Path(path))}.previous")


def _target(path):
    """A link's target, such as a checkpoint that has moved to a larger disk: what is written goes there; else path."""
    return path.resolve() if path.is_symlink() else path


def _damage(path, resume=""):
    """Why a checkpoint folder cannot be used, or ''. Sizes and checksums were written beside the weights: flipped bits
    make no error when they are loaded, only a worse model. Of the state in resume/ it matters by `resume` nothing, that
    it is "there", or that it is "whole"."""
    facts = read_minillm(path)
    if not facts and (path / "minillm.json").exists():
        return "minillm.json is unreadable"
    sizes, checksums = facts.get("files", {}), facts.get("crc32", {})
    if not isinstance(sizes, dict) or not isinstance(checksums, dict):
        return "minillm.json is unreadable"
    for name in sizes | checksums:
        # a folder from elsewhere must not make us read what lies around it
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"minillm.json names {name}, which is outside"
    for name in [name for name in sizes | checksums if resume or not name.startswith("resume")]:
        if not (path / name).is_file():
            return f"{name} is missing"
        found = (path / name).stat().st_size
        if found != sizes.get(name, found):
            return f"{name} has {found} bytes, not {sizes[name]}"
    for name, crc in checksums.items():
        if (resume == "whole" or not name.startswith("resume")) and _crc32(path / name) != crc:
            return f"{name} has other bytes than were written"
    return ""


def _crc32(path):
    """Checksum of a file's content, at several GB/s; torch.load and safetensors look at none."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def write_minillm(folder, facts):
    """Write minillm.json: what made this checkpoint (stage, parents, hashes, versions, seed, metrics), the size of
    every file and the checksum of those that hold tensors."""
    folder = Path(folder)
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()
             and f.name != "minillm.json"}
    content = {"format": FORMAT_VERSION, "torch": torch.__version__, "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
               **facts, "files": files, "crc32": {name: _crc32(folder / name) for name in files
                                                  if name.endswith((".safetensors", ".pt"))}}
    (folder / "minillm.json").write_text(json.dumps(finite(content), indent=1, ensure_ascii=False, default=str),
                                         encoding="utf-8")


def read_minillm(folder):
    """minillm.json of a checkpoint folder as a dict; {} for a folder from elsewhere or an unreadable file."""
    return read_fields(Path(folder) / "minillm.json")


def save(runtime, args, parts, state, facts, finished=False):
    """Write out/<save_weight> atomically: each part's own files, the resume state, minillm.json. Every rank must call
    it.

    Args:
        parts: objects with save_pretrained(folder): model and tokenizer.
        state: dict for resuming, of tensors and plain values (full-precision weights, optimizer, progress). The random
            state of every rank and the gradient scaler's are added.
        facts: dict for minillm.json.
    Returns: True when written; False (with a message, training goes on) when the disk is full.
    """
    rng = runtime.gather(_rng_state())
    written, folder = True, Path(args.save_dir) / args.save_weight
    if runtime.is_main:
        try:
            _check_space(folder, state)
            with atomic_folder(folder) as tmp:
                for part in parts:
                    part.save_pretrained(tmp)
                if not finished or args.keep_resume:
                    (tmp / "resume").mkdir()
                    whole = {**state, "scaler": runtime.scaler.state_dict(), "rng": rng, "args": _plain(args)}
                    torch.save(whole, tmp / "resume" / "state.pt")
                choice = {"dtype": str(runtime.dtype)[6:], "threads": runtime.threads, "world_size": runtime.world_size}
                seconds = round(time.time() - runtime.started, 1)
                write_minillm(tmp, {**facts, "finished": finished, "seconds": seconds, "args": _plain(args),
                                    "runtime": choice})
            if finished:  # the run is over and its checkpoint whole: the one before is no longer needed
                shutil.rmtree(_previous(folder), ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            # a disk that fills up while writing: torch.save raises RuntimeError, safetensors its own class
            last = (read_minillm(folder) or read_minillm(_previous(folder))).get("progress", {}).get("step", "none")
            print(f"checkpoint not written to {folder}: {error}. Training goes on; last good checkpoint: step {last}",
                  flush=True)
            written = False
    written = not runtime.any(not written)
    if finished and not written:
        there = any((path / "config.json").is_file() for path in (folder, _previous(folder)))
        rest = ("the last good one is untouched; make room and go on with --from_resume 1" if there else
                "there is no earlier one; make room and start again")
        raise OSError(f"the final checkpoint could not be written (see above); {rest}")
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
    """Resume state of out/<save_weight>, with this rank's random state and the gradient scaler restored. Raises
    ValueError naming changed flags that matter."""
    # with FSDP each rank needs a slice only: mapped, the file is not in memory once for every rank
    folder, state = _load_state(find(args.save_dir, args.save_weight, "there"), mmap=runtime.lockstep)
    now = _plain(args)
    changed = {name: f"--{name}: was {old!r}, is {now[name]!r}" for name, old in state["args"].items()
               if name in now and now[name] != old}
    refused = [words for name, words in changed.items() if name not in FREE_FLAGS]
    if refused:
        raise ValueError(f"cannot resume {folder} with changed flags ({'; '.join(refused)}); the result would be "
                         f"neither run's; give the old values, or start again with --overwrite 1. A resume may change "
                         f"--{', --'.join(sorted(FREE_FLAGS & now.keys() - {'eval_rows'}))}")
    if args.max_minutes and {"max_minutes", "max_steps", "epochs"} & changed.keys():
        raise ValueError(f"--max_minutes {args.max_minutes:g} with another length at a resume; the number of steps was "
                         "measured at the start and stays; for another give --max_minutes 0 --max_steps N")
    if "eval_rows" in now and "eval_batches" not in changed:
        args.eval_rows = state["args"].get("eval_rows", args.eval_rows)  # the same, whatever --batch_size is now
    if KEY_FLAGS & changed.keys():
        runtime.print(f"going on with changed flags: {'; '.join(changed[n] for n in changed if n in KEY_FLAGS)}")
    runtime.started -= read_minillm(folder).get("seconds", 0)
    if state["scaler"]:  # empty where the run was not in fp16 until now
        runtime.scaler.load_state_dict(state["scaler"])
    rng = state["rng"]
    if len(rng) == runtime.world_size:
        torch.set_rng_state(rng[runtime.rank]["cpu"])
        if rng[runtime.rank]["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng[runtime.rank]["cuda"])
    else:
        runtime.print(f"resuming with {runtime.world_size} process(es), saved with {len(rng)}: no sample is lost or "
                      f"repeated, but dropout draws differ")
    return state


def _load_state(folder, mmap):
    """(folder, content of its resume/state.pt); the predecessor's where this one is damaged. Raises ValueError when
    there is none."""
    reason = _damage(folder, "whole")
    if not reason:
        try:
            return folder, torch.load(folder / "resume" / "state.pt", map_location="cpu", weights_only=True, mmap=mmap)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, LookupError, TypeError) as error:
            reason = str(error).split("\n")[0][:100] or type(error).__name__
    previous = _previous(folder)
    # after --overwrite 1 the one before is of another run
    inputs = {read_minillm(f).get("key", "").split("-")[-1] for f in (folder, previous)}
    if (previous / "resume" / "state.pt").is_file() and len(inputs) == 1:
        print(f"{folder}/resume/state.pt cannot be read ({reason}); using {previous} instead", flush=True)
        return _load_state(previous, mmap)
    raise ValueError(f"{folder}/resume/state.pt cannot be read ({reason}); the run cannot be resumed; start it again "
                     "with --overwrite 1")


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


def _made(parent, fact):
    """How a parent checkpoint was made, as its minillm.json tells in `fact`, and how far it had come; the hashes of its
    weights where nobody knows."""
    facts = read_minillm(parent)
    if fact in facts:
        return [facts[fact], facts.get("progress", {}).get("step")]
    return [file_hash(f) for f in sorted(Path(parent).glob("model*.safetensors"))]


def stage_key(args, files=(), parents=(), also=frozenset()):
    """Hash of everything that decides a stage's result, as "flags-inputs": its flags and our format; the content of its
    input files and of its parent checkpoints (their own keys, or their weights where they come from elsewhere).
    also: names of flags that usually decide nothing and do here: EVAL_FLAGS where the stage keeps the best of what it
    evaluates.

    Raises: ValueError when a parent is the folder that the run will write.
    """
    folder = Path(args.save_dir) / args.save_weight
    if any(Path(parent).resolve() in (folder.resolve(), _previous(folder).resolve()) for parent in parents):
        raise ValueError(f"--save_weight {args.save_weight} is a checkpoint that this run starts from; the second save "
                         "would delete it, and no resume could find it; give another --save_weight")
    decides = KEY_FLAGS | (EVAL_FLAGS if getattr(args, "patience", 0) else also)
    flags = {k: v for k, v in _plain(args).items() if k in decides or k not in FREE_FLAGS}
    parts = [FORMAT_VERSION, flags], [[file_hash(f) for f in files], [_made(parent, "key") for parent in parents]]
    return "-".join(hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()[:12]
                    for part in parts)


def conditions(runtime, args, stage, config, data, parents, steps):
    """What decides which numbers are normal for a run; logs.MetricLog finds the reference curve by it.

    The recipe (rates, optimizer, schedule, dtype, seed) is left out on purpose: whether another recipe does better or
    worse is what the comparison is to show.

    Args:
        args: namespace with batch_size, accumulation_steps, max_seq_len, max_minutes; PPO's rollout_size.
        config: dataclass of the model's shape. Fields at their default are left out, so that a new one changes nothing.
        data: data sets with a `fingerprint` (content, tokenizer, row length), or None for one that is not used.
        parents: folders of the checkpoints it starts from. How they were made counts in the same way, recipe apart;
            the weights do where nobody knows.
        steps: optimizer steps of the run. They count for nothing where the clock decides: no curve fits then.
    Returns: dict of JSON values.
    """
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
             if getattr(config, f.name) != f.default}
    origin = [hashlib.sha256(json.dumps(_made(parent, "conditions"), sort_keys=True).encode()).hexdigest()[:12]
              for parent in parents]
    # a step of PPO is a rollout, however many updates are made of it
    rows = getattr(args, "rollout_size", args.batch_size * args.accumulation_steps * runtime.world_size)
    found = {"stage": stage, "model": shape, "data": [d.fingerprint for d in data if d is not None], "parents": origin,
             "batch_tokens": rows * args.max_seq_len, "steps": None if args.max_minutes else steps}
    return json.loads(json.dumps(found))  # as it will be read from a file: JSON has no tuples


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
    """At the first start of a launch: mark what is in the folder if it will be replaced, or if the launch may restart;
    unmark it if the run goes on with it. The run's own saves take the place of what is marked."""
    count, limit = _restarts()
    if count:
        return
    word = decision[0] if isinstance(decision, tuple) else ""
    for mark in (folder / EARLIER, _previous(folder) / EARLIER):
        if word in ("skip", "resume"):
            if mark.exists():  # a finished stage may lie where nothing can be written
                mark.unlink()
        elif mark.parent.is_dir():
            if word == "fresh":
                mark.write_text("replaced", encoding="utf-8")
            elif limit:
                mark.touch()


def _decide(args, key):
    """_wanted(), or the ValueError to raise where nothing can be written."""
    decision = _wanted(args, key)
    if isinstance(decision, ValueError) or decision[0] == "skip" or os.access(args.save_dir, os.W_OK):
        return decision
    return ValueError(f"nothing can be written to --save_dir {args.save_dir}, where a run keeps its checkpoint and its "
                      "log; name another folder")


def _wanted(args, key):
    """(word, message) for begin(), or the ValueError to raise."""
    try:
        Path(args.save_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return ValueError(f"--save_dir {args.save_dir}: {error.strerror}; a run writes there; name another folder")
    folder = Path(args.save_dir) / args.save_weight
    try:
        folder = find(args.save_dir, args.save_weight, "there")
    except FileNotFoundError:
        if folder.is_symlink() or folder.exists() and not folder.is_dir():
            return ValueError(f"{folder} is a file, or a link to what holds no checkpoint; a run writes a folder of "
                              "that name; remove it, or give another --save_weight")
        if folder.is_dir() and any(folder.iterdir()):
            return ValueError(f"{folder} holds files, but no checkpoint; a run would replace the whole folder; give "
                              "another --save_weight")
        return "fresh", f"nothing to resume in {folder}: starting fresh" if args.from_resume else ""
    except ValueError as error:
        if args.if_needed or args.overwrite:
            return "fresh", f"{error}: starting fresh"
        return ValueError(f"{error} with --overwrite 1, or give another --save_weight")
    facts = read_minillm(folder)
    resumable = (folder / "resume" / "state.pt").is_file()
    same = facts.get("key") == key
    again, mark = _started_again(folder), folder / EARLIER
    replaced = mark.is_file() and mark.read_text(encoding="utf-8") == "replaced"
    if again and same and facts.get("finished"):  # another rank failed behind the end
        return "skip", f"{folder} is finished: nothing is left to do"
    if args.if_needed and not again:
        if same and facts.get("finished"):
            return "skip", f"{folder} is finished with these flags and inputs: skipped"
        if same and resumable and not replaced:
            return "resume", f"{folder} was interrupted: resuming"
        why = ("was about to be replaced" if replaced else "holds no resume state" if same else
               "was made with other flags or inputs")
        return "fresh", f"{folder} {why}: doing it again"
    if args.from_resume or again:  # a restart resumes by itself; --overwrite was meant for what its first start found
        if resumable and facts.get("key", "").split("-")[-1] != key.split("-")[-1]:
            return ValueError(f"cannot resume {folder}: its data files or the checkpoint it started from have changed; "
                              "the result would be neither run's; bring them back, or start again with --overwrite 1")
        if replaced and not again:
            return ValueError(f"cannot resume {folder}: a run that was to replace it (--overwrite 1) has ended before "
                              "its first save, and has begun a new log; start again with --overwrite 1, or remove "
                              f"{mark} to go on with the earlier run all the same")
        if resumable:
            return "resume", ""
        if again:
            return "fresh", f"{folder} holds no resume state: starting fresh"
    if args.overwrite:
        return "fresh", ""
    if args.from_resume:
        return ValueError(f"{folder} holds a checkpoint without resume state; nothing can go on from it; give "
                          "--overwrite 1 to replace it, or another --save_weight")
    state = "a finished" if facts.get("finished") else "an unfinished"
    return ValueError(f"{folder} already holds {state} run (stage {facts.get('stage', 'unknown')}); it is not replaced "
                      "silently; give --from_resume 1 to go on with it, --overwrite 1 to replace it, or another "
                      "--save_weight")


def earlier_choice(args, key):
    """dtype and threads of the run that is being resumed, else {}. key: stage_key() of this start."""
    folder = Path(args.save_dir) / args.save_weight
    facts = read_minillm(folder) or read_minillm(_previous(folder))
    needed = getattr(args, "if_needed", 0) and facts.get("key") == key  # with another key it is done again, afresh
    if not (getattr(args, "from_resume", 0) or needed or _started_again(folder)):
        return {}
    earlier = facts.get("runtime", {})
    # threads are cores / processes: a run that goes on with more processes must not start cores threads in each
    same = earlier.get("world_size") == int(os.environ.get("WORLD_SIZE", 1))
    return earlier if same else {"dtype": earlier.get("dtype")}


# ----------------------------------------------------------------------------------------------------------------------
# All checkpoints of an output folder
def stage_order(name):
    """Sort key: the stages as run.sh makes them, then everything else by name."""
    return STAGES.index(name) if name in STAGES else len(STAGES), name


def names(save_dir):
    """Names of the checkpoints below save_dir, in stage_order()."""
    # one whose swap was interrupted is there under its earlier name only, which find() knows
    found = {path.parent.name.removesuffix(".previous") for path in Path(save_dir).glob("*/config.json")}
    return sorted((name for name in found if not name.endswith(".tmp")), key=stage_order)


def chosen(save_dir, weights):
    """Folders of the checkpoints in a comma list of names or paths; of all below save_dir for "" or "all"."""
    if weights not in ("", "all"):
        wanted = [name.strip() for name in weights.split(",") if name.strip()]
        if not wanted:
            raise ValueError(f"--weight {weights} names nothing; it is a comma list of checkpoints; give one, or all")
        return [find(save_dir, name) for name in wanted]
    found = names(save_dir)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {save_dir}/; scores need one; train with: bash run.sh, or give a "
                                "folder with --weight")
    return [find(save_dir, os.path.join(save_dir, name)) for name in found]


def newest(save_dir):
    """Name of the stage finished last among those that speak; the later stage where two share a second.

    Raises FileNotFoundError with what to do when there is none.
    """
    finished, speakers = [], [name for name in STAGES if name != "reward"]
    for place, name in enumerate(speakers):
        try:
            # with the folder in front: a folder of that name in the working directory is something else
            facts = read_minillm(find(save_dir, os.path.join(save_dir, name)))
        except FileNotFoundError:
            continue
        except ValueError as error:
            print(error)  # damaged: named, and the others are still there to talk to
            continue
        if facts.get("finished"):
            # not simply the last stage: who has just trained sft again wants to talk to that
            finished.append((facts.get("written", ""), place, name))
    if not finished:
        raise FileNotFoundError(f"no finished checkpoint in {save_dir}/ (looked for {', '.join(speakers)}); chatting "
                                "needs one; train with: bash run.sh, or name another one with --weight")
    return max(finished)[2]


def chat_parent(facts, save_dir):
    """Folder of the chat model from which a checkpoint with these facts (minillm.json) was trained, or None."""
    for parent in facts.get("parents", []):
        # the path was written where the training ran; below this save_dir it may have moved
        for folder in (Path(str(parent)), Path(save_dir) / Path(str(parent)).name):
            if (folder / "config.json").is_file():
                return None if read_minillm(folder).get("stage") in ("pretrain", "reward") else folder
    return None


def stage_rows(save_dir):
    """[name, metric, before, after, seconds, folder] of every finished stage below save_dir: what it changed."""
    rows = []
    for name in names(save_dir):
        folder = Path(save_dir) / name
        facts = read_minillm(folder)
        found = facts.get("metrics", {})
        if facts.get("finished") and "metric" in found:
            ends = [found.get(key) for key in ("before", "after")]
            shown = [f"{end:.3f}" if isinstance(end, (int, float)) else "-" for end in ends]
            rows.append([name, found["metric"], *shown, f"{facts.get('seconds', 0):.0f}", str(folder)])
    return rows
