"""Proves that the benches run and that what they compare differs in what they say: recipes see their own rows.

    python -m pytest tests/test_bench.py
"""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train_pretrain
from dataset import PretrainData

BENCH = Path(__file__).parent.parent / "bench" / "training.py"


@pytest.fixture(scope="module")
def bench():
    """bench/training.py as a module; started as a script it changes sys.path, imported it must not."""
    spec, before = importlib.util.spec_from_file_location("bench_training", BENCH), list(sys.path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    assert sys.path == before
    return module


@pytest.fixture
def text(tmp_path):
    """400 documents of unequal length, all different; one in a hundred is held out by recipes."""
    path, texts = tmp_path / "text.jsonl", [f"Number {i} is even or odd. " * (1 + i % 7) for i in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def data(text, tokenizer, tmp_path):
    return PretrainData(text, tokenizer, 32, tmp_path / "cache")


def test_windows_come_once_in_random_order_and_shorter_ones_from_more_places(bench, data):
    rows = bench.Rows(data, bench.RECIPES["minillm"], seed=0)
    count = (len(data.tokens.items) - 1) // 31
    ids, mask = rows.batch(count, 32)
    assert ids.shape == mask.shape == (count, 32) and mask[:, 1:].all() and not mask[:, 0].any()
    expected = np.stack([data.tokens.items[i * 31 : i * 31 + 32] for i in range(count)])
    assert sorted(ids.tolist()) == sorted(expected.tolist()) and ids.tolist() != expected.tolist()
    assert rows.batch(64, 4)[0].shape == (64, 4)


def test_documents_are_cut_or_padded_and_crops_begin_anywhere(bench, data):
    stream, bos = data.tokens.items, data.tokenizer.bos_id
    ids, mask = bench.Rows(data, bench.RECIPES["minimind"], seed=0).batch(400, 32)
    assert (ids[:, 0] == bos).all() and not (ids[:, 1:] == bos).any(), "never more than one document in a row"
    starts = [*np.flatnonzero(stream == bos), len(stream)]
    lengths = sorted(min(32, end - start) for start, end in zip(starts, starts[1:], strict=False))
    assert sorted((1 + mask[:, 1:].sum(1).int()).tolist()) == lengths
    ids, mask = bench.Rows(data, bench.RECIPES["nanogpt"], seed=0).batch(40, 32)
    assert mask[:, 1:].all() and (ids[:, 0] != bos).any()


def test_our_recipe_is_what_pretraining_does_by_default(bench):
    ours, args = bench.RECIPES["minillm"], train_pretrain.parse_args([])
    same = ("batch_size", "accumulation_steps", "optimizer", "learning_rate", "muon_learning_rate", "weight_decay",
            "schedule", "grad_clip", "length_warmup", "depth_warmup", "embedding_decay")
    assert {name: getattr(ours, name) for name in same} == {name: getattr(args, name) for name in same}
    assert (ours.betas[0], ours.warmup) == (args.adam_beta1, args.warmup_steps)


def test_variants_change_single_fields(bench):
    name, recipe = bench.variant("minillm muon_learning_rate=0.03 rows=crops decay_all=1 betas=0.8,0.9")
    assert name.startswith("minillm muon") and recipe.betas == (0.8, 0.9) and recipe.decay_all is True
    assert (recipe.muon_learning_rate, recipe.rows) == (0.03, "crops")
    assert recipe.schedule == bench.RECIPES["minillm"].schedule


def test_recipes_run_and_write_their_curves(text, tmp_path):
    output = tmp_path / "results.jsonl"
    done = subprocess.run([sys.executable, str(BENCH), "recipe", "--data_path", str(text), "--preset", "nano",
                           "--vocab_size", "320", "--tokens", "9000", "--threads", "1", "--recipes", "minillm",
                           "nanogpt", "--output", str(output), "--evaluations", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["name"] for row in found] == ["minillm", "nanogpt"] and "ms with 64 of 32" in done.stdout
    for row in found:
        tokens, _, bits = zip(*row["curve"], strict=True)
        assert len(bits) == 2 and bits[-1] < bits[0] and tokens[-1] >= 9000


def test_loading_is_timed_beside_the_step(text):
    done = subprocess.run([sys.executable, str(BENCH), "loading", "--data_path", str(text), "--preset", "nano",
                           "--vocab_size", "320", "--rounds", "2", "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"nano: [\d.]+ ms to draw 8 rows of 256 tokens, \d+ ms for the step: [\d.]+%", done.stdout)
