"""Proves that every stage learns what it should.

    python -m pytest tests/test_learning.py                     # the smoke test: one seed, minutes
    python -m pytest -m slow tests/test_learning.py -s          # three seeds of the default run, an hour on 2 cores

The base model of the smoke test stays in pytest's cache, so that later runs train only what comes behind it. The runs
of the slow proof stay in the folder that LEARNING_DIR names: started again, it goes on where it stopped.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_distill
import train_pretrain
import train_sft
from model import Transformer

ROOT = Path(train_sft.__file__).parent
SEEDS = (1, 2, 3)
# a thousand held-out items for every number below
MANY = {"SFT_ARGS": "--eval_prompts 1400", "REWARD_ARGS": "--eval_batches 100", "DPO_ARGS": "--eval_prompts 1000",
        "PPO_ARGS": "--eval_prompts 1000", "GRPO_ARGS": "--eval_prompts 1000 --eval_interval 50"}
in_venv = pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="run.sh uses a virtual environment, here is none")


def run_sh(*words, **settings):
    """What a user types, in the environment that runs the tests."""
    done = subprocess.run(["bash", "run.sh", *words], cwd=ROOT, text=True, capture_output=True, timeout=7200,
                          env=os.environ | {"VENV_DIR": sys.prefix} | {k: str(v) for k, v in settings.items()})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@in_venv
def test_smoke_run_learns(request):
    """All stages, with the checks of tests/smoke_checks.py."""
    out = Path(request.config.cache.mkdir("learning"))
    base = out / "smoke" / "sft" / "minillm.json"
    cached = base.is_file() and json.loads(base.read_text(encoding="utf-8"))["finished"]
    text = run_sh("--smoke-test", *(["--from", "reward"] if cached else []), OUT=out)
    assert "checks passed" in text and "FAILED" not in text


# -- The default run, three seeds --------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=SEEDS, ids=lambda seed: f"seed {seed}")
def out(request, tmp_path_factory):
    """The folder of a default run with this seed."""
    kept = os.environ.get("LEARNING_DIR")
    folder = Path(kept or tmp_path_factory.mktemp("learning")).absolute() / f"seed{request.param}"
    for stage in ("data", "tokenizer", "pretrain", "sft", "reward", "dpo", "ppo", "grpo"):
        run_sh(stage, OUT=folder, SEED=request.param, **MANY)
    return folder


def metrics_of(out, stage, *names):
    """Final metrics of a stage, and a line with those named for whoever watches (-s)."""
    found = json.loads((out / stage / "minillm.json").read_text(encoding="utf-8"))["metrics"]
    print(f"\n{out.name} {stage}: " + ", ".join(f"{name} {found[name]}" for name in names))
    return found


@pytest.mark.slow
@in_venv
def test_fine_tuning_answers(out):
    found = metrics_of(out, "sft", "exact_match", "stop_rate", "n", "by_lang")
    assert found["n"] >= 1000
    assert found["exact_match"] >= 0.6 and found["stop_rate"] >= 0.98


@pytest.mark.slow
@in_venv
def test_reward_model_sees_style_and_wrong_answers(out):
    found = metrics_of(out, "reward", "accuracy", "accuracy_by_kind", "n")
    assert found["n"] >= 1000 and found["accuracy"] >= 0.8
    kinds = found["accuracy_by_kind"]
    assert min(kinds["curt"], kinds["impolite"], kinds["rambling"]) >= 0.97
    assert kinds["wrong"] >= 0.75


@pytest.mark.slow
@in_venv
def test_dpo_prefers_and_wins(out):
    found = metrics_of(out, "dpo", "accuracy", "accuracy_by_kind", "win_rate", "win_rate_error", "win_rate_n",
                       "exact_match_before", "exact_match")
    assert found["win_rate_n"] >= 1000
    assert found["accuracy"] >= 0.85 and found["win_rate"] >= 0.65


@pytest.mark.slow
@in_venv
def test_ppo_raises_the_reward_and_keeps_the_answers(out):
    found = metrics_of(out, "ppo", "at_start", "val_reward", "val_kl", "polite", "exact_match", "sampled_exact_match")
    before = found["at_start"]
    assert found["val_reward"] - before["val_reward"] >= 0.6 and found["val_kl"] <= 3
    assert found["polite"] - before["polite"] >= 0.3
    assert abs(found["exact_match"] - before["exact_match"]) <= 0.03


@pytest.mark.slow
@in_venv
def test_grpo_makes_right_answers_likely(out):
    found = metrics_of(out, "grpo", "before", "pass_at_1", "pass_at_k", "exact_match", "at_start")
    before = found["at_start"]
    assert 0.3 <= before["pass_at_1"] <= 0.8, "else there is too little to learn from"
    assert found["pass_at_1"] - before["pass_at_1"] >= 0.1
    assert found["exact_match"] >= before["exact_match"]


def common_flags(out, name, steps):
    return ["--save_dir", str(out), "--save_weight", name, "--cache_dir", str(out / "cache"), "--overwrite", "1",
            "--seed", out.name.removeprefix("seed"), "--max_steps", str(steps), "--eval_interval", "0",
            "--save_interval", "0"]


@pytest.mark.slow
@in_venv
def test_adapters_reach_most_of_what_all_weights_reach(out):
    """The tasks of GRPO, learnt from right answers: adapters with under 5% of the parameters reach 90% of the fall of
    the held-out loss, and of the gain in exact match as far as 1000 questions can tell."""
    for part in ("train", "heldout"):
        rows = [json.loads(line) for line in (out / "data" / f"rl.{part}.jsonl").read_text("utf-8").splitlines()]
        for row in rows:
            row["conversations"].append({"role": "assistant", "content": row["answer"]})
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"tasks.{part}.jsonl").write_text(text, "utf-8")
    data = ["--data_path", str(out / "tasks.train.jsonl"), "--val_path", str(out / "tasks.heldout.jsonl"),
            "--from_weight", "sft", "--eval_prompts", "1000"]
    # a step that moves nothing, for its evaluation of all 1000 questions: the one before the first step takes fewer
    start = train_sft.main(train_sft.parse_args([*common_flags(out, "start", 1), *data, "--optimizer", "adamw",
                                                 "--learning_rate", "1e-12"]))
    gain, right = {}, {}
    for name, flags in (("full", []), ("lora", ["--lora_rank", "6"])):
        final = train_sft.main(train_sft.parse_args([*common_flags(out, name, 800), *data, *flags]))
        gain[name] = start["val_loss"] - final["val_loss"]
        right[name] = final["exact_match"] - start["exact_match"]
        print(f"\n{out.name} {name}: held-out loss {start['val_loss']:.3f} -> {final['val_loss']:.3f}, exact match "
              f"{start['exact_match']:.3f} -> {final['exact_match']:.3f}")
    state = torch.load(out / "lora" / "resume" / "state.pt")["model"]
    trained = sum(tensor.numel() for tensor in state.values())
    whole = sum(p.numel() for p in Transformer.from_pretrained(out / "sft").parameters())
    assert trained < 0.05 * whole
    assert gain["lora"] >= 0.9 * gain["full"] > 0
    assert right["lora"] >= 0.9 * right["full"] - 0.02, "0.02: two standard errors of a difference on these questions"


@pytest.mark.slow
@in_venv
def test_distillation_comes_closer_to_the_teacher_than_plain_training(out):
    """A quarter of the teacher's width and half of its blocks, 400 steps: same rows in the same order, same rates."""
    data = [f"--{name}_path" for name in ("data", "val")]
    data = [data[0], str(out / "data" / "pretrain.train.jsonl"), data[1], str(out / "data" / "pretrain.heldout.jsonl")]
    shape = ["--preset", "nano", "--hidden_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "2",
             "--num_key_value_heads", "1", "--intermediate_size", "192", "--eval_batches", "64"]
    plain = train_pretrain.main(train_pretrain.parse_args(
        [*common_flags(out, "plain", 400), *data, *shape, "--tokenizer", str(out / "tokenizer")]))
    student = train_distill.main(train_distill.parse_args([*common_flags(out, "distill", 400), *data, *shape]))
    teacher = student["teacher_bits_per_byte"]
    print(f"\n{out.name} bits per byte: teacher {teacher:.4f}, distilled {student['bits_per_byte']:.4f}, plain "
          f"{plain['bits_per_byte']:.4f}")
    assert teacher < student["bits_per_byte"] < plain["bits_per_byte"]
