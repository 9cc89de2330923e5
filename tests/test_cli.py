"""Proves that all training scripts keep one contract on the command line: the same flags mean the same, no flag is
dead, and whatever a user can get wrong is one message and exit code 2.

    python -m pytest tests/test_cli.py
"""
import argparse
import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import common
import logs
from configuration import ModelConfig
from model import Transformer

ROOT = Path(common.__file__).parent
TRAINERS = sorted(path.stem for path in ROOT.glob("train_*.py"))
SCRIPTS = [*TRAINERS, *(name for name in ("eval", "make_data", "tokenizer", "common")
                        if (ROOT / f"{name}.py").exists())]
# a default is a stage's own recipe; these mean the same everywhere and must have the same one
SAME_DEFAULT = ["save_dir", "cache_dir", "device", "dtype", "threads", "seed", "keep_resume", "from_resume",
                "if_needed", "overwrite", "debug", "skip_bad", "val_path", "max_minutes", "grad_clip",
                "gradient_checkpointing", "use_compile", "tracker", "use_wandb", "show_batch"]


class Built(Exception):
    """Carries a parser out of parse_args."""


@pytest.fixture
def parser_of(monkeypatch):
    """parser_of(script name) -> the argparse parser that its parse_args builds."""

    def build(name):
        def stop(self, args=None, namespace=None):
            raise Built(self)

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Built) as built:
                importlib.import_module(name).parse_args([])
        return built.value.args[0]

    return build


def flags(parser):
    """Flag name -> argparse action, of a parser and its commands."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= flags(command)
        elif not isinstance(action, argparse._HelpAction):
            found[action.dest] = action
    return found


def names_read(path):
    """Names that a file reads as args.NAME, and the strings of functions that call getattr(args, ...), with those of
    the constants such a function uses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {target.id: node for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
                 if isinstance(target, ast.Name)}
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        found |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                  and node.value.id == "args" and isinstance(node.ctx, ast.Load)}
        if any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
               and isinstance(node.args[0], ast.Name) and node.args[0].id == "args" for node in nodes):
            used = [constants[node.id] for node in nodes if isinstance(node, ast.Name) and node.id in constants]
            found |= {node.value for part in [function, *used] for node in ast.walk(part)
                      if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_flag_is_dead(name, parser_of):
    files = (name, "cli", "common", "checkpoint", "health", "chat")
    read = set().union(*(names_read(ROOT / f"{file}.py") for file in files))
    assert not set(flags(parser_of(name))) - read


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help_and_its_name_is_its_destination(name, parser_of):
    for dest, action in flags(parser_of(name)).items():
        assert action.help and action.help != argparse.SUPPRESS, dest
        assert not action.option_strings or action.option_strings == [f"--{dest}"]
        assert action.type is not bool


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_printed_and_succeeds(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"python {name}.py" in text, "the commands of the docstring"
    assert "(default: None)" not in text


def test_shared_flags_mean_the_same_in_all_scripts(parser_of):
    """Type, number of values and choices are compared; for flags that are no stage's recipe the default as well. Only
    --patience_metric names what a stage has."""

    def meaning(dest, action):
        kind = getattr(action.type, "__name__", None)
        default = action.default if dest in SAME_DEFAULT else None
        return kind, action.nargs, tuple(action.choices or ()) if dest != "patience_metric" else (), str(default)

    seen = {}
    for name in TRAINERS:
        for dest, action in flags(parser_of(name)).items():
            seen.setdefault(dest, {}).setdefault(meaning(dest, action), []).append(name)
    assert not {dest: found for dest, found in seen.items() if len(found) > 1}


def test_every_training_script_has_the_flags_that_users_know(parser_of):
    known = {"batch_size", "accumulation_steps", "epochs", "max_steps", "learning_rate", "warmup_steps", "weight_decay",
             "grad_clip", "max_seq_len", "data_path", "save_dir", "save_weight", "from_weight", "from_resume", "device",
             "dtype", "log_interval", "eval_interval", "save_interval", "seed", "optimizer", "max_minutes", "tracker",
             "use_wandb", "show_batch"}
    for name in TRAINERS:
        assert not known - set(flags(parser_of(name))), name


@pytest.mark.parametrize("words", [["--no_such_flag", "1"], ["--learning", "0.1"], ["--batch_size", "0"],
                                   ["--learning_rate", "-1"], ["--dtype", "int8"], ["stray"], ["--threads", "9" * 9],
                                   ["--seed", "9" * 30], ["--save_weight", ""], ["--save_weight", "logs"],
                                   ["--save_weight", "../x"], ["--save_weight", "a/b"], ["--save_weight", "x.tmp/"],
                                   ["--patience", "1", "--eval_interval", "0"]],
                         ids=" ".join)
@pytest.mark.parametrize("name", TRAINERS)
def test_bad_flag_is_one_message_and_exit_code_2(name, words, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse_args(words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and words[0] in captured.err and captured.err.count("\n") == 2
    assert not captured.out


@pytest.fixture
def start(stage, monkeypatch, capsys):
    """start(name, *flags) -> (exit code, stderr) of a small run, through the same call as its last line."""

    def run(name, *words, **options):
        module, argv = stage(name, *words, **options)
        codes = []
        monkeypatch.setattr(os, "_exit", codes.append)
        monkeypatch.setattr(common.StopSignal, "__init__", lambda self: setattr(self, "requested", 0))
        monkeypatch.setattr(logs, "plot_curves", lambda folder: None)  # a second each; test_logs.py draws some
        monkeypatch.setattr("sys.argv", [f"{name}.py", *argv])
        capsys.readouterr()
        common.run(module.main, lambda: module.parse_args(argv))
        assert len(codes) < 2
        return (codes or [0])[0], capsys.readouterr().err

    return run


FILES = {"missing": (None, "no-such.jsonl"), "empty": ("", "bad.jsonl"), "broken JSON": ('{"text": \n', "bad.jsonl:1"),
         "not an object": ("[1]\n", "bad.jsonl:1"), "wrong keys": ('{"nonsense": 1}\n', "bad.jsonl:1"),
         "unknown ending": ("x", "bad.csv")}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("name", TRAINERS)
def test_bad_data_is_one_message_and_exit_code_2(name, case, start, tmp_path):
    content, where = FILES[case]
    path = tmp_path / where.split(":")[0]
    if content is not None:
        path.write_text(content)
    code, text = start(name, "--data_path", str(path))
    refused(code, text)
    assert where in text
    if case == "wrong keys":
        assert "nonsense" in text and "expected" in text, "found keys and expected ones"


def refused(code, text):
    """Exit code 2 and one message in three parts: what is wrong; the rule; how to fix it."""
    assert code == 2, text
    message = [line for line in text.strip().split("\n") if line.startswith("error: ")]
    assert len(message) == 1 and "Traceback" not in text
    assert message[0].count(";") >= 2, message[0]


SETTINGS = {"device": ["--device", "gpu"], "weights": ["--from_weight", "no-such"],
            "long rows": ["--max_seq_len", "1000"], "a file": ["--save_dir", __file__]}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", TRAINERS)
def test_bad_setting_is_one_message_and_exit_code_2(name, case, start):
    code, text = start(name, *SETTINGS[case])
    refused(code, text)
    assert SETTINGS[case][1] in text


@pytest.mark.parametrize("name", TRAINERS)
def test_run_is_not_replaced_silently_and_a_finished_one_has_nothing_to_resume(name, start, tmp_path):
    assert start(name, "--max_steps", "1")[0] == 0
    code, text = start(name, "--max_steps", "1")
    refused(code, text)
    assert "--from_resume 1" in text and "--overwrite 1" in text
    weights = tmp_path / "out" / "run" / "model.safetensors"
    before = weights.read_bytes()
    code, text = start(name, "--max_steps", "1", "--from_resume", "1")
    assert code == 0 and "error" not in text
    assert weights.read_bytes() == before
    assert start(name, "--max_steps", "1", "--overwrite", "1")[0] == 0


def test_shape_flags_that_contradict_the_weights_are_refused(start):
    code, text = start("train_pretrain", "--hidden_size", "64")
    refused(code, text)
    assert "hidden_size" in text


@pytest.mark.parametrize("name, words", [("train_pretrain", "--preset nano"), ("train_pretrain", "--use_moe 1"),
                                         ("train_pretrain", "--tokenizer out/tokenizer"),
                                         ("train_distill", "--preset nano")])
def test_what_the_weights_decide_cannot_be_given(name, words, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit):
        module.parse_args(["--from_weight", "pretrain", *words.split()])
    assert capsys.readouterr().err.startswith(f"error: {words} with --from_weight pretrain; ")
    assert module.parse_args(words.split()), "without weights it is a choice"
    assert module.parse_args([]).preset in ("nano", "small")


@pytest.mark.parametrize("name", sorted(set(TRAINERS) - {"train_ppo", "train_grpo"}))
def test_model_with_fewer_ids_than_the_tokenizer_is_refused(name, start, tokenizer, tmp_path):
    """The other two sample first, and generate() refuses such ids."""
    model = Transformer(ModelConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "narrow")
    teacher = ["--teacher", str(tmp_path / "narrow")] if name == "train_distill" else []
    code, text = start(name, *teacher, parent=tmp_path / "narrow")
    refused(code, text)
    assert "token id 319 >= vocabulary 300" in text


@pytest.mark.parametrize("context", [8, 12])
def test_rows_may_be_shorter_than_the_sample_that_is_shown(start, tokenizer, tmp_path, context):
    model = Transformer(ModelConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                    max_position_embeddings=context))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "short")
    code, text = start("train_pretrain", "--max_seq_len", str(context), "--max_steps", "1", parent=tmp_path / "short")
    assert code == 0, text


# heading of each stage's table
SHOWN = {"train_pretrain": "token target trained?", "train_sft": "token target trained?",
         "train_reward": "token scored?", "train_dpo": "token target trained?", "train_ppo": "token trained?",
         "train_grpo": "token trained?", "train_distill": "token target trained?"}


@pytest.mark.parametrize("name", TRAINERS)
def test_two_samples_are_shown_with_what_is_trained_and_the_run_goes_on(name, stage, capsys):
    module, argv = stage(name, "--max_steps", "1", "--show_batch", "1")
    final = module.main(module.parse_args(argv))
    assert final["steps"] == 1
    text = capsys.readouterr().out
    shown = text[text.index("\n-- "):]
    blocks = shown.split("\n-- ")[1:]
    pairs = name in ("train_reward", "train_dpo")
    assert len(blocks) == (4 if pairs else 2)
    for number, block in enumerate(blocks):
        lines = block.split("\n")
        at = next(i for i, line in enumerate(lines) if line.split() == SHOWN[name].split())
        rows = lines[at + 2:lines.index("", at)]
        marked = [row.split("  ")[0].strip("'") for row in rows if row.endswith("  yes")]
        assert f"{len(marked)} of " in lines[0], "the table is whole, so it agrees with the count above it"
        if pairs:
            assert ("chosen", "rejected")[number % 2] in lines[0]
        if name in ("train_pretrain", "train_distill"):
            assert len(marked) == len(rows)
        elif name == "train_reward":
            assert len(marked) == 1 and rows[-1].startswith("'<|im_end|>'")
        elif name in ("train_ppo", "train_grpo"):
            assert not marked and "assistant" in block
        else:
            trained = [row for row in rows if row.endswith("  yes")]
            assert 0 < len(trained) < len(rows), "the question is context, the answer is trained"
            assert "'<|im_end|>'" in trained[-1]


@pytest.mark.parametrize("flags", [["--tracker", "wandb"], ["--use_wandb", "1"]], ids="=".join)
@pytest.mark.parametrize("name", TRAINERS)
def test_run_survives_a_tracker_that_is_not_installed(name, flags, stage, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    module, argv = stage(name, "--max_steps", "1", *flags)
    assert module.main(module.parse_args(argv))["steps"] == 1
    assert capsys.readouterr().out.count("tracker off") == 1


@pytest.mark.parametrize("name", TRAINERS)
def test_default_rates_and_schedule_fit_the_optimizer(name, parser_of):
    parse = importlib.import_module(name).parse_args
    adamw = parse(["--optimizer", "adamw"])
    lion = parse(["--optimizer", "lion"])
    muon = parse(["--optimizer", "muon"])
    if name in ("train_pretrain", "train_distill"):  # a rate of its own for what Muon leaves to AdamW
        assert (muon.learning_rate, muon.adam_beta1, adamw.adam_beta1) == (1.2e-2, 0.5, 0.9)
        assert "0.012" in flags(parser_of(name))["learning_rate"].help
    else:
        assert muon.learning_rate == adamw.learning_rate
    assert lion.learning_rate == pytest.approx(adamw.learning_rate * cli.OPTIMIZERS["lion"]) != adamw.learning_rate
    assert parse(["--optimizer", "lion", "--learning_rate", "0.5"]).learning_rate == 0.5
    assert lion.schedule == adamw.schedule == parse([]).schedule
    assert f"{lion.learning_rate:g}" in flags(parser_of(name))["learning_rate"].help
    if "schedulefree" not in parser_of(name).unserved:
        assert parse(["--optimizer", "schedulefree"]).schedule == "constant"
        assert parse(["--optimizer", "schedulefree", "--schedule", "wsd"]).schedule == "wsd"


@pytest.mark.parametrize("name, optimizer", [
    ("train_reward", "sophia"), ("train_dpo", "sophia"), ("train_ppo", "sophia"), ("train_grpo", "sophia"),
    ("train_distill", "sophia"),
    ("train_ppo", "schedulefree"), ("train_grpo", "schedulefree")])
def test_optimizer_that_a_stage_cannot_serve_is_refused(name, optimizer, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse_args(["--optimizer", optimizer])
    assert stop.value.code == 2
    field, rule, fix = capsys.readouterr().err.split("\n")[0].split("; ")
    assert field == f"error: --optimizer {optimizer}"
    assert rule == cli.UNSERVED[optimizer]
    assert fix.startswith("give one of muon, adamw, lion") and optimizer not in fix


@pytest.mark.parametrize("name", ["train_pretrain", "train_sft"])
@pytest.mark.parametrize("words, message", [
    ("--zero 1", "--zero 1 with --optimizer muon; only AdamW's state is shared; give --optimizer adamw, or leave"),
    ("--fsdp 1 --optimizer lion", "--fsdp 1 with --optimizer lion; only AdamW's state is shared; give"),
    ("--zero 1 --fsdp 1 --optimizer adamw", "--zero 1 with --fsdp 1; FSDP shares the optimizer's state as well; give"),
])
def test_sharing_that_cannot_be_is_refused(name, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse_args(words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


# -- run.sh ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(os.name == "nt", reason="a bash script")
@pytest.mark.parametrize("words, message", [(["--from"], "--from needs a stage"), (["nope"], "not a stage or flag"),
                                            (["--from", "nope"], "is not one of"),
                                            (["tokenizer", "data"], "name one stage"),
                                            (["--from", "sft", "setup"], "give one of them")], ids=str)
def test_run_sh_refuses_what_it_would_not_do(words, message):
    done = subprocess.run(["bash", ROOT / "run.sh", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a bash script")
def test_data_are_up_to_date_only_when_all_files_of_the_same_making_are_there(tmp_path):
    def up_to_date(before, content="made so"):
        script = f"""source <(sed -n '/^marked()/,/^mark()/p' "{ROOT}/run.sh"); cd "{tmp_path}"; {before}
                     marked data "{content}" """
        return subprocess.run(["bash", "-c", script], timeout=60).returncode == 0

    assert up_to_date("mkdir data; touch data/a data/b; mark data 'made so'")
    assert up_to_date("true") and not up_to_date("true", "made otherwise")
    assert not up_to_date("rm data/b")
    assert up_to_date("touch data/b") and not up_to_date("rm data/.made_from")


@pytest.mark.parametrize("name, steps", [("train_ppo", 10), ("train_grpo", 20), ("train_sft", 0)])
def test_usual_number_of_steps_gives_way_to_a_length_that_was_asked_for(name, steps):
    parse = importlib.import_module(name).parse_args
    assert (parse([]).max_steps, parse([]).epochs) == (steps, 1.0)
    assert (parse(["--epochs", "3"]).max_steps, parse(["--epochs", "3"]).epochs) == (0, 3.0)
    assert parse(["--max_minutes", "5"]).max_steps == 0
    assert parse(["--epochs", "3", "--max_steps", "7"]).max_steps == 7
