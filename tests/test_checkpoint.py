"""Proves that a checkpoint survives any interruption, that a damaged one is named, that a resume is refused when it
would be neither run's, and that stage keys change with what changes a result.

    python -m pytest tests/test_checkpoint.py
"""
import argparse
import contextlib
import errno
import functools
import io
import json
import math
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import cut, flip, run_args

import checkpoint
import common
import records
import weights
from configuration import ModelConfig
from model import Transformer
from tokenizer import Tokenizer

with contextlib.suppress(ImportError):  # Windows
    import resource


# -- Atomic folders --------------------------------------------------------------------------------------------------
def fill(folder, content):
    """A complete small checkpoint in `folder` (which exists)."""
    (folder / "config.json").write_text(f'{{"content": "{content}"}}')
    (folder / "model.safetensors").write_text(content * 100)
    checkpoint.write_minillm(folder, {"progress": {"step": content}, "key": content, "stage": "test"})


def content_of(path):
    return json.loads((path / "config.json").read_text())["content"]


def written(tmp_path, *contents):
    """Write these one after the other to tmp_path/run, as a training run does."""
    for content in contents:
        with checkpoint.atomic_folder(tmp_path / "run") as tmp:
            fill(tmp, content)
    return tmp_path / "run"


@pytest.mark.parametrize("value", [None, 5, "x", [5], {"metric": "loss", "before": "x"}], ids=str)
def test_fields_of_another_type_are_as_good_as_missing(tmp_path, value):
    path = written(tmp_path, "first")
    for name in ("args", "metrics", "parents", "progress", "runtime", "seconds", "written"):
        (path / "minillm.json").write_text(json.dumps({"stage": "sft", "finished": True, name: value}))
        facts = checkpoint.read_minillm(checkpoint.find(tmp_path, "run"))
        assert (name in facts) == isinstance(value, records.KINDS[name]), name
        assert checkpoint.chat_parent(facts, tmp_path) is None
        assert all(row[1:5] == ["loss", "-", "-", "0"] for row in checkpoint.stage_rows(tmp_path))


def test_save_keeps_the_one_before_as_previous(tmp_path):
    path = written(tmp_path, "first", "second", "third")
    assert content_of(path) == "third"
    assert content_of(tmp_path / "run.previous") == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.previous"]


def test_exception_while_writing_leaves_the_old_folder(tmp_path):
    path = written(tmp_path, "old")
    with pytest.raises(KeyError), checkpoint.atomic_folder(path) as tmp:
        (tmp / "config.json").write_text("new")
        raise KeyError
    assert content_of(checkpoint.find(tmp_path, "run")) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "nothing half-written stays"


def test_between_the_two_renames_the_previous_one_is_used(tmp_path, capsys):
    path = written(tmp_path, "old")
    os.replace(path, tmp_path / "run.previous")
    assert checkpoint.find(tmp_path, "run") == tmp_path / "run.previous"
    assert "a save was interrupted" in capsys.readouterr().out


# -- Finding checkpoints ---------------------------------------------------------------------------------------------
def test_checkpoint_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    path = written(tmp_path, "one")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find(tmp_path, "run") == path
    assert checkpoint.find("elsewhere", str(path)) == path
    assert checkpoint.find("elsewhere", "./run") == Path("run")
    assert checkpoint.find(".", "run") == Path("run")
    monkeypatch.chdir(path)
    assert checkpoint.find("elsewhere", ".") == Path(".")


def test_folder_of_the_same_name_in_the_working_directory_hides_nothing(tmp_path, monkeypatch):
    path = written(tmp_path / "out", "one")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find("out", "run") == Path("out/run")
    assert path.is_dir()


def test_missing_checkpoint_is_answered_with_what_there_is(tmp_path):
    written(tmp_path, "one", "two")
    with pytest.raises(FileNotFoundError) as error:
        checkpoint.find(tmp_path, "sft")
    assert "'sft' not found" in str(error.value) and "there are: run;" in str(error.value)
    with pytest.raises(FileNotFoundError, match="there are: none; train that stage first"):
        checkpoint.find(tmp_path / "empty", "sft")


DAMAGES = [(flip, "model.safetensors", "model.safetensors has other bytes than were written"),
           (cut, "model.safetensors", "model.safetensors has .* bytes, not"),
           (os.remove, "model.safetensors", "model.safetensors is missing"),
           (cut, "minillm.json", "minillm.json is unreadable"), (cut, "config.json", "config.json has .* bytes")]


@pytest.mark.parametrize("harm, name, words", DAMAGES)
def test_damage_is_named_and_the_previous_checkpoint_used(tmp_path, capsys, harm, name, words):
    path = written(tmp_path, "first", "second")
    harm(path / name)
    assert content_of(checkpoint.find(tmp_path, "run")) == "first"
    assert f"checkpoint {path} is damaged" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run.previous")
    with pytest.raises(ValueError, match=f"damaged .{words}.*train that stage again"):
        checkpoint.find(tmp_path, "run")


def test_folder_from_elsewhere_is_taken_as_it_is(tmp_path):
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text("{}")
    assert checkpoint.find("out", str(tmp_path / "qwen")) == tmp_path / "qwen"


# -- Saving and resuming ---------------------------------------------------------------------------------------------
class Part:
    """Stands for a model: something with save_pretrained."""

    def save_pretrained(self, folder):
        (folder / "config.json").write_text("{}")


def save(tmp_path, step, runtime=None, parts=None, **options):
    """Save a run of one weight at this step into tmp_path/run."""
    runtime = runtime or common.Runtime(torch.device("cpu"), torch.float32, scaler=torch.amp.GradScaler(enabled=False))
    args = run_args(tmp_path, **options.pop("flags", {}))
    state = {"model": {"w": torch.full((1000,), float(step))}, "progress": {"step": step}}
    facts = {"stage": "test", "key": "k", "progress": {"step": step}}
    return checkpoint.save(runtime, args, parts or [Part()], state, facts, **options), runtime, args


def test_resume_state_and_random_numbers_come_back(tmp_path):
    torch.manual_seed(3)
    written, runtime, args = save(tmp_path, 5)
    expected = torch.rand(4)
    torch.manual_seed(4)
    state = checkpoint.load_resume(runtime, args)
    assert written and torch.equal(torch.rand(4), expected)
    assert state["progress"] == {"step": 5} and state["model"]["w"][0] == 5


@pytest.mark.parametrize("changes", [{"weight_decay": 0.5}, {"seed": 1}, {"data_path": ["other.jsonl"]}])
def test_resume_refuses_changed_flags_and_names_both_values(tmp_path, changes):
    _, runtime, args = save(tmp_path, 5)
    (name, value), = changes.items()
    with pytest.raises(ValueError) as error:
        checkpoint.load_resume(runtime, run_args(tmp_path, **changes))
    assert f"--{name}: was {getattr(args, name)!r}, is {value!r}" in str(error.value)
    assert "--overwrite 1" in str(error.value)
    allowed = str(error.value).split("A resume may change ")[1].split(", ")
    assert {"--batch_size", "--max_steps", "--learning_rate", "--device", "--log_interval"} < set(allowed)
    assert f"--{name}" not in allowed


def test_measured_number_of_steps_stays_at_a_resume(tmp_path):
    _, runtime, _ = save(tmp_path, 5, flags={"max_minutes": 2.0})
    for changes in ({"max_minutes": 3.0}, {"max_minutes": 2.0, "max_steps": 99}):
        with pytest.raises(ValueError, match="--max_minutes 0 --max_steps N"):
            checkpoint.load_resume(runtime, run_args(tmp_path, **changes))
    for changes in ({"max_minutes": 2.0}, {"max_minutes": 0.0, "max_steps": 99}):
        assert checkpoint.load_resume(runtime, run_args(tmp_path, **changes))["progress"]["step"] == 5


def test_held_out_rows_stay_the_same_whatever_the_batch_size_is(tmp_path):
    _, runtime, _ = save(tmp_path, 5, flags={"eval_batches": 4, "batch_size": 8, "eval_rows": 32})
    for changes, rows in (({"eval_batches": 4, "batch_size": 2, "eval_rows": 8}, 32),
                          ({"eval_batches": 3, "batch_size": 8, "eval_rows": 24}, 24)):
        args = run_args(tmp_path, **changes)
        checkpoint.load_resume(runtime, args)
        assert args.eval_rows == rows


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    checkpoint.write_minillm(tmp_path, {"metrics": {"error": math.nan, "all": [1.0, math.inf]}})
    text = (tmp_path / "minillm.json").read_text("utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {"error": None, "all": [1.0, None]}


def test_resume_allows_what_it_lists_and_says_what_then_changes_the_result(tmp_path, capsys):
    _, runtime, _ = save(tmp_path, 5)
    changes = dict(max_steps=99, log_interval=1, save_interval=3, batch_size=2, accumulation_steps=4, learning_rate=0.5)
    assert checkpoint.load_resume(runtime, run_args(tmp_path, **changes))["progress"]["step"] == 5
    said, = [line for line in capsys.readouterr().out.split("\n") if line.startswith("going on with changed flags")]
    assert "--batch_size: was 8, is 2" in said and "--learning_rate: was 0.001, is 0.5" in said
    assert "log_interval" not in said, "this one changes nothing"
    checkpoint.load_resume(runtime, run_args(tmp_path))
    assert "changed flags" not in capsys.readouterr().out


def test_resume_with_other_process_count_says_so(tmp_path, capsys):
    _, runtime, args = save(tmp_path, 5)
    path = tmp_path / "run" / "resume" / "state.pt"
    state = torch.load(path)
    torch.save(state | {"rng": state["rng"] * 2}, path)
    checkpoint.write_minillm(tmp_path / "run", {})
    checkpoint.load_resume(runtime, args)
    assert "resuming with 1 process(es), saved with 2" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"PK\x03\x04" + b"0" * 500,
                                     pickle.dumps(argparse.Namespace(), protocol=2)],
                         ids=["empty", "garbage", "broken archive", "foreign class"])
def test_unreadable_resume_state_is_one_message(tmp_path, content):
    _, runtime, args = save(tmp_path, 5)
    (tmp_path / "run" / "resume" / "state.pt").write_bytes(content)
    checkpoint.write_minillm(tmp_path / "run", {})  # sizes fit: the damage shows only when it is read
    with pytest.raises(ValueError, match="state.pt cannot be read.*--overwrite 1"):
        checkpoint.load_resume(runtime, args)


def test_damaged_resume_state_leads_to_the_one_before_but_never_to_another_run(tmp_path, capsys):
    save(tmp_path, 5)
    _, runtime, args = save(tmp_path, 6)
    flip(tmp_path / "run" / "resume" / "state.pt")
    assert checkpoint.load_resume(runtime, args)["progress"]["step"] == 5
    assert "state.pt has other bytes than were written); using" in capsys.readouterr().out
    checkpoint.write_minillm(tmp_path / "run.previous", {"key": "of-other-data"})
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_resume(runtime, args)


def test_kill_while_a_damaged_checkpoint_is_replaced_leaves_the_one_before(tmp_path, monkeypatch):
    for step in (5, 6):
        _, runtime, args = save(tmp_path, step)
    flip(tmp_path / "run" / "resume" / "state.pt")

    def dying(source, target):
        raise Killed

    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        save(tmp_path, 7)
    assert checkpoint.load_resume(runtime, args)["progress"]["step"] == 5


class Killed(BaseException):
    """Stands for kill -9: it is caught by nobody."""


class Disk:
    """In place of every function with which a save changes the disk: call number `at` fails, in one of the WAYS."""

    def __init__(self, patch, way=None, at=0):
        self.way, self.at, self.calls, self.dead = way, at, [], False
        for module, name in ((os, "mkdir"), (os, "open"), (os, "fsync"), (os, "replace"), (os, "unlink"),
                             (os, "rmdir"), (io, "open"), (torch, "save"), (weights, "save_file")):
            patch.setattr(module, name, functools.partial(self.call, module.__name__ + "." + name,
                                                          getattr(module, name)))

    def call(self, name, real, *args, **options):
        if self.dead:
            raise Killed  # a killed process cleans nothing up
        writes = name in ("torch.save", "weights.save_file")
        if name == "io.open" and not set(options.get("mode", args[1] if len(args) > 1 else "r")) & set("wax"):
            return real(*args, **options)  # only read
        self.calls.append(name)
        if len(self.calls) != self.at:
            return real(*args, **options)
        if self.way == "killed behind it" or writes or name == "io.open":
            result = real(*args, **options)
            if writes and self.way != "killed behind it":
                os.truncate(args[1], os.path.getsize(args[1]) // 2)  # what is being written is there, but not whole
            if name == "io.open":
                result.close()
        if self.way == "raises":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.dead = True
        raise Killed


@pytest.fixture
def disk(tmp_path, monkeypatch, model_folder):
    """disk(step, **Disk's) -> (whether it was saved, Disk) of a save of a real model with tokenizer and state."""
    parts = [Transformer.from_pretrained(model_folder()), Tokenizer.from_pretrained(model_folder())]

    def act(step, **faults):
        with monkeypatch.context() as patch:
            now = Disk(patch, **faults)
            try:
                return save(tmp_path, step, parts=parts)[0], now
            except Killed:
                return None, now

    return act


@pytest.mark.parametrize("way", ["raises", "killed before it", "killed behind it"])
def test_failure_of_any_call_of_a_save_leaves_a_whole_checkpoint(tmp_path, disk, capsys, way):
    """Every call that changes the disk, once each: a folder made, a file opened, written or forced out, a rename, a
    removal. The run is never lost, a failed save says so, and the next one works."""
    disk(1)
    disk(2)
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-before")
    _, whole = disk(3)
    assert {"os.mkdir", "os.fsync", "os.replace", "io.open", "os.unlink", "os.rmdir", "torch.save",
            "weights.save_file"} <= set(whole.calls)
    for at, name in enumerate(whole.calls, 1):
        shutil.rmtree(tmp_path)
        shutil.copytree(tmp_path.parent / f"{tmp_path.name}-before", tmp_path)
        capsys.readouterr()
        saved, now = disk(3, way=way, at=at)
        where = f"call {at}, {name}"
        assert len(now.calls) >= at, where
        found = checkpoint.find(tmp_path, "run")
        runtime = common.Runtime(torch.device("cpu"), torch.float32)
        step = checkpoint.load_resume(runtime, run_args(tmp_path))["progress"]["step"]
        assert step == checkpoint.read_minillm(found)["progress"]["step"] and step in (2, 3), where
        Transformer.from_pretrained(found)
        if way == "raises":
            # what only tidies up may fail; a rename that does not follow from it is made
            told = f"last good checkpoint: step {step}" in capsys.readouterr().out
            assert saved is not told and not (tmp_path / "run.tmp").exists(), where
            assert not (saved and name == "os.fsync"), "the disk has said that something is not there"
            assert saved is (step == 3) or at > len(whole.calls) - 2, where  # those only make the rename last
        assert disk(4)[0], where
        assert checkpoint.read_minillm(checkpoint.find(tmp_path, "run"))["progress"]["step"] == 4, where


def test_finished_run_drops_the_previous_and_on_request_the_resume_state(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 6)
    assert (tmp_path / "run.previous").is_dir()
    save(tmp_path, 7, finished=True, flags={"keep_resume": 0})
    assert not (tmp_path / "run.previous").exists()
    assert not (tmp_path / "run" / "resume").exists()
    assert checkpoint.read_minillm(tmp_path / "run")["finished"] is True


def test_too_little_space_is_seen_before_writing_and_training_goes_on(tmp_path, capsys, monkeypatch):
    save(tmp_path, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    assert not save(tmp_path, 6)[0]
    text = capsys.readouterr().out
    assert "MB are free" in text and "Training goes on; last good checkpoint: step 5" in text
    assert checkpoint.read_minillm(tmp_path / "run")["progress"]["step"] == 5
    monkeypatch.undo()
    assert save(tmp_path, 7)[0]


class BigPart(Part):
    """A model whose file does not fit any more."""

    def save_pretrained(self, folder):
        from safetensors.torch import save_file
        super().save_pretrained(folder)
        save_file({"w": torch.zeros(100_000)}, folder / "model.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file size limits")
@pytest.mark.parametrize("part, limit", [(Part, 3000), (BigPart, 100_000)], ids=["resume state", "weights"])
def test_disk_that_fills_up_while_writing_costs_no_training(tmp_path, capsys, part, limit):
    save(tmp_path, 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # writes beyond it fail, as on a full disk
    try:
        written = save(tmp_path, 6, parts=[part()])[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not written
    assert "Training goes on; last good checkpoint: step 5" in capsys.readouterr().out
    assert checkpoint.read_minillm(checkpoint.find(tmp_path, "run"))["progress"]["step"] == 5
    assert not (tmp_path / "run.tmp").exists(), "what was half-written is removed, there is no space to spare"
    assert save(tmp_path, 7)[0]


# -- Stages ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def key(tmp_path):
    """key(**changes of flags) -> stage key of a run with one data file and one parent."""
    (tmp_path / "data.jsonl").write_text("one\n")
    parent = written(tmp_path, "parent")

    def of(**changes):
        args = run_args(tmp_path, **{"save_weight": "child"} | changes)
        return checkpoint.stage_key(args, [tmp_path / "data.jsonl"], [parent])

    return of


@pytest.mark.parametrize("name", ["run", "./other/../run"])
def test_a_run_that_would_replace_its_own_parent_is_refused(key, name):
    with pytest.raises(ValueError, match="is a checkpoint that this run starts from"):
        key(save_weight=name)


@pytest.mark.parametrize("changes", [{"learning_rate": 0.5}, {"seed": 1}, {"batch_size": 2}, {"max_steps": 3},
                                     {"epochs": 2.0}, {"optimizer": "adamw"}])
def test_stage_key_changes_with_flags_that_change_the_result(key, changes):
    assert key(**changes) != key()


@pytest.mark.parametrize("changes", [{"log_interval": 3}, {"save_interval": 3}, {"from_resume": 1}, {"overwrite": 1},
                                     {"if_needed": 1}, {"debug": 1}, {"threads": 7}, {"save_weight": "other"}])
def test_stage_key_stays_with_flags_that_do_not(key, changes):
    assert key(**changes) == key()


def test_stage_key_changes_with_data_content_but_not_with_its_date(key, tmp_path):
    first = key()
    os.utime(tmp_path / "data.jsonl", (0, 0))
    assert key() == first
    (tmp_path / "data.jsonl").write_text("two\n")
    assert key() != first


def test_stage_key_changes_with_the_parent(key, tmp_path):
    first = key()
    written(tmp_path, "another parent")
    assert key() != first


def test_stage_key_tells_an_interrupted_parent_from_a_finished_one(key, tmp_path):
    checkpoint.write_minillm(tmp_path / "run", {"key": "same", "progress": {"step": 10}})
    first = key()
    checkpoint.write_minillm(tmp_path / "run", {"key": "same", "progress": {"step": 20}})
    assert key() != first


# -- Conditions ------------------------------------------------------------------------------------------------------
@pytest.fixture
def conditions(tmp_path):
    """conditions(width=, data=, steps=, world=, parents=, **changes of flags) -> conditions of a run with a parent."""
    parent = written(tmp_path, "parent")

    def of(width=32, data=("a", None, "b"), steps=10, world=1, parents=(parent,), **changes):
        data = [name and argparse.Namespace(fingerprint=name) for name in data]
        runtime = common.Runtime(torch.device("cpu"), torch.float32, world_size=world)
        args = run_args(tmp_path, **{"max_seq_len": 64} | changes)
        return checkpoint.conditions(runtime, args, "sft", ModelConfig(hidden_size=width), data, parents, steps)

    return of


@pytest.mark.parametrize("changes", [{"width": 64}, {"data": ("a", "c")}, {"data": ("b", "a")}, {"steps": 11},
                                     {"world": 2}, {"batch_size": 4}, {"accumulation_steps": 2}, {"max_seq_len": 32},
                                     {"rollout_size": 64}, {"max_minutes": 5.0}, {"parents": ()}])
def test_conditions_change_with_what_decides_the_numbers(conditions, changes):
    assert conditions(**changes) != conditions()


@pytest.mark.parametrize("changes", [{"learning_rate": 0.5}, {"optimizer": "adamw"}, {"schedule": "cosine"},
                                     {"seed": 1}, {"dtype": "bfloat16"}, {"warmup_steps": 3}, {"eval_interval": 3},
                                     {"world": 2, "batch_size": 4}, {"batch_size": 4, "accumulation_steps": 2}])
def test_conditions_leave_the_recipe_out(conditions, changes):
    assert conditions(**changes) == conditions()


def test_conditions_name_no_default_of_the_model_and_survive_a_file(conditions):
    found = conditions()
    assert "dropout" not in found["model"] and found["model"]["hidden_size"] == 32
    assert json.loads(json.dumps(found)) == found


def test_conditions_of_a_parent_count_and_not_its_seed(conditions, tmp_path):
    """A foreign one counts by its weights, one of ours by how it was made and how far it came."""
    foreign = conditions()
    (tmp_path / "run" / "model.safetensors").write_text("other weights")
    assert conditions() != foreign
    made = [{"conditions": {"steps": steps}, "progress": {"step": step}, "seed": seed}
            for steps, step, seed in ((9, 9, 1), (9, 9, 2), (9, 3, 1), (8, 9, 1))]
    found = []
    for facts in made:
        checkpoint.write_minillm(tmp_path / "run", facts)
        found.append(conditions()["parents"])
    assert found[0] == found[1] and found[2] != found[0] != found[3] and found[2] != found[3]


# -- Starts ----------------------------------------------------------------------------------------------------------
def decide(tmp_path, key="k", **flags):
    runtime = common.Runtime(torch.device("cpu"), torch.float32)
    return checkpoint.begin(runtime, run_args(tmp_path, **flags), key)


def test_first_start_is_fresh_and_says_so_when_asked_to_resume(tmp_path, capsys):
    assert decide(tmp_path) == decide(tmp_path, if_needed=1) == "fresh"
    assert capsys.readouterr().out == ""
    assert decide(tmp_path, from_resume=1) == "fresh"
    assert "nothing to resume" in capsys.readouterr().out


def test_existing_run_is_not_replaced_silently(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(ValueError) as error:
        decide(tmp_path)
    assert all(words in str(error.value) for words in ("already holds an unfinished run (stage test)",
                                                       "--from_resume 1", "--overwrite 1", "--save_weight"))
    assert decide(tmp_path, from_resume=1) == "resume"
    assert decide(tmp_path, overwrite=1) == "fresh"


def test_a_run_that_another_began_to_replace_is_not_resumed_as_if_it_were_that_one(tmp_path, capsys):
    save(tmp_path, 5)
    assert decide(tmp_path, overwrite=1) == "fresh"  # and killed before its first save, behind its first lines of log
    with pytest.raises(ValueError, match="ended before its first save.*or remove .*of_an_earlier_run"):
        decide(tmp_path, from_resume=1)
    assert decide(tmp_path, if_needed=1) == "fresh" and "about to be replaced" in capsys.readouterr().out
    (tmp_path / "run" / checkpoint.EARLIER).unlink()
    assert decide(tmp_path, from_resume=1) == "resume"
    assert decide(tmp_path, overwrite=1) == "fresh"
    save(tmp_path, 2)
    assert decide(tmp_path, from_resume=1) == "resume", "now it is this run's"


def test_a_link_is_followed_and_a_file_is_no_place_for_a_run(tmp_path, capsys):
    save(tmp_path, 5)
    (tmp_path / "large disk").mkdir()
    (tmp_path / "run").rename(tmp_path / "large disk" / "run")
    (tmp_path / "run").symlink_to(tmp_path / "large disk" / "run")
    assert decide(tmp_path, from_resume=1) == "resume"
    for step in (6, 7, 8):
        save(tmp_path, step)
    assert checkpoint.read_minillm(tmp_path / "large disk" / "run")["progress"]["step"] == 8
    assert checkpoint.read_minillm(tmp_path / "large disk" / "run.previous")["progress"]["step"] == 7
    assert (tmp_path / "run").is_symlink() and checkpoint.find(tmp_path, "run") == tmp_path / "run"
    shutil.rmtree(tmp_path / "large disk" / "run")  # as if killed between the two renames
    assert checkpoint.find(tmp_path, "run") == tmp_path / "large disk" / "run.previous"
    shutil.rmtree(tmp_path / "large disk")
    with pytest.raises(ValueError, match="is a file, or a link to what holds no checkpoint"):
        decide(tmp_path)
    (tmp_path / "run").unlink()
    (tmp_path / "run").write_text("hello")
    with pytest.raises(ValueError, match="is a file, or a link to what holds no checkpoint"):
        decide(tmp_path, overwrite=1)


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    save(tmp_path, 5, finished=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert decide(tmp_path, if_needed=1) == "skip"
    with pytest.raises(ValueError, match="nothing can be written to --save_dir"):
        decide(tmp_path, overwrite=1)


def test_needed_stage_is_skipped_resumed_or_redone(tmp_path, capsys):
    save(tmp_path, 5)
    assert decide(tmp_path, if_needed=1) == "resume"
    save(tmp_path, 9, finished=True)
    assert decide(tmp_path, if_needed=1) == "skip"
    assert "is finished with these flags and inputs: skipped" in capsys.readouterr().out
    assert decide(tmp_path, key="other", if_needed=1) == "fresh"
    assert "made with other flags or inputs: doing it again" in capsys.readouterr().out


def test_damaged_run_without_predecessor_is_named_before_it_is_done_again(tmp_path, capsys):
    save(tmp_path, 5)
    os.remove(tmp_path / "run" / "resume" / "state.pt")
    assert decide(tmp_path, if_needed=1) == "fresh"
    assert "is damaged (resume/state.pt is missing)" in capsys.readouterr().out


def test_damaged_run_is_not_replaced_silently(tmp_path):
    save(tmp_path, 5)
    cut(tmp_path / "run" / "config.json")
    for flags in ({}, {"from_resume": 1}):
        with pytest.raises(ValueError, match="damaged .*train that stage again with --overwrite 1"):
            decide(tmp_path, **flags)
    assert decide(tmp_path, overwrite=1) == "fresh"


def test_folder_that_is_no_checkpoint_is_never_replaced(tmp_path):
    """--save_weight data would put a checkpoint in the place of out/data, and its end would delete that."""
    (tmp_path / "run").mkdir()
    assert decide(tmp_path) == "fresh", "an empty one is no loss"
    (tmp_path / "run" / "my.jsonl").write_text("data")
    for flags in ({}, {"overwrite": 1}, {"if_needed": 1}, {"from_resume": 1}):
        with pytest.raises(ValueError, match="holds files, but no checkpoint.*another --save_weight"):
            decide(tmp_path, **flags)


def test_resume_of_a_checkpoint_without_state_does_not_replace_it(tmp_path):
    save(tmp_path, 9, finished=True, flags={"keep_resume": 0})
    with pytest.raises(ValueError, match="without resume state; .*; give --overwrite 1"):
        decide(tmp_path, from_resume=1)
    assert decide(tmp_path, from_resume=1, overwrite=1) == "fresh"


def started(monkeypatch, count, limit=3):
    """The environment of a process that torchrun has started for the (count + 1)th time."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(limit))


@pytest.mark.parametrize("flags", [{}, {"overwrite": 1}, {"if_needed": 1}, {"from_resume": 1}])
def test_restarted_run_resumes_by_itself(tmp_path, monkeypatch, flags):
    started(monkeypatch, 0)
    assert decide(tmp_path, **flags) == "fresh"
    started(monkeypatch, 1)
    assert decide(tmp_path, **flags) == "fresh", "it failed before its first save"
    save(tmp_path, 5)
    assert decide(tmp_path, **flags) == "resume"
    assert checkpoint.earlier_choice(run_args(tmp_path, **flags), "key")["dtype"] == "float32"
    save(tmp_path, 9, finished=True)
    assert decide(tmp_path, **flags) == "skip", "it failed behind the end"


def test_restart_leaves_alone_what_its_first_start_did_not_go_on_with(tmp_path, monkeypatch):
    save(tmp_path, 5)
    started(monkeypatch, 0)
    assert decide(tmp_path, overwrite=1) == "fresh"
    started(monkeypatch, 1)
    assert decide(tmp_path, overwrite=1) == "fresh", "the older run is still there"
    assert checkpoint.earlier_choice(run_args(tmp_path, overwrite=1), "key") == {}
    save(tmp_path, 2)
    assert decide(tmp_path, overwrite=1) == "resume", "now it is this run's"
    started(monkeypatch, 0)
    for count in (0, 1):
        started(monkeypatch, count)
        with pytest.raises(ValueError, match="already holds"):
            decide(tmp_path)
    started(monkeypatch, 0)
    assert decide(tmp_path, from_resume=1) == "resume"
    started(monkeypatch, 1)
    assert decide(tmp_path) == "resume", "the mark is gone"


def test_launches_without_restarts_that_are_refused_mark_nothing(tmp_path, monkeypatch):
    save(tmp_path, 5)
    started(monkeypatch, 0, limit=0)
    with pytest.raises(ValueError, match="already holds"):
        decide(tmp_path)
    assert not (tmp_path / "run" / checkpoint.EARLIER).exists()


def test_stage_that_is_done_again_chooses_dtype_and_threads_afresh(tmp_path):
    save(tmp_path, 5)
    args = run_args(tmp_path, if_needed=1)
    assert checkpoint.earlier_choice(args, checkpoint.read_minillm(tmp_path / "run")["key"])["dtype"] == "float32"
    assert checkpoint.earlier_choice(args, "another-key") == {}


def test_weights_are_found_without_the_state_of_the_run(tmp_path):
    """Copied for use elsewhere, say: the state is two thirds of a folder."""
    save(tmp_path, 5)
    shutil.rmtree(tmp_path / "run" / "resume")
    assert checkpoint.find(tmp_path, "run") == tmp_path / "run"
    with pytest.raises(ValueError, match="resume/state.pt is missing"):
        decide(tmp_path, from_resume=1)


@pytest.mark.parametrize("also, patience, redone", [
    (set(), 0, False), (checkpoint.EVAL_FLAGS, 0, True), (set(), 2, True)])
def test_evaluations_count_as_far_as_they_decide_the_result(tmp_path, also, patience, redone):
    keys = {checkpoint.stage_key(run_args(tmp_path, eval_interval=interval, patience=patience), also=also)
            for interval in (5, 10)}
    assert (len(keys) == 2) == redone
