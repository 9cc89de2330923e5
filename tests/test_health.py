"""Proves that what the log says about gradients, updates, experts, activations and the machine is true, that looking
changes nothing, and that an alarm is raised once and with a cause.

    python -m pytest tests/test_health.py
"""
import argparse
import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import KINDS

import common
import health
import logs
import optim
import records
from configuration import ModelConfig
from model import Transformer

ROOT = Path(health.__file__).parent
RUNTIME = common.Runtime(torch.device("cpu"), torch.float64)


def small(kind="dense", **changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                   intermediate_size=64, **KINDS[kind], **changes)).double()


class Training:
    """A loop as in the scripts: backward, clip, step, log."""

    def __init__(self, folder, model=None, optimizer="adamw", watched=True, interval=1, flags=0, resume_step=None,
                 max_steps=100):
        self.model = model or small()
        self.optimizer = optim.build(self.model, optimizer, 1e-3, 1e-2)
        self.progress = {"step": resume_step or 0, "max_steps": max_steps}
        self.log = logs.MetricLog(folder, resume_step=resume_step)
        args = argparse.Namespace(log_interval=interval, health=flags)
        self.watch = health.Watch(self.model, self.optimizer, self.progress, args, RUNTIME, self.log) if watched else 0
        self.ids = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(1))  # [B, T]
        self.real = torch.ones(3, 8, dtype=torch.bool)  # [B, T], false on padding
        self.real[1, 5:] = False

    def step(self, clip=0.1, updates=1):
        """Returns (row of the log, gradients before clipping, weights before, weights after)."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for _ in range(updates):
            self.model.train()
            optim.to_gradient_point(self.optimizer)
            logp, balance = self.model(self.ids, token_mask=self.real, target_mask=self.real.long(), sum_targets=True,
                                       return_balance=True)
            (0.01 * balance.sum() - logp).backward()
            grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip).item()
            self.optimizer.step()
            self.optimizer.zero_grad()
        after = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.progress["step"] += 1
        row = {"grad_norm": norm} | (self.watch.numbers(norm) if self.watch else {})
        self.log.log(self.progress["step"], **row)
        return row, grads, before, after


def members(named, group):
    """The tensors of a group, by a list of names of its own."""
    patterns = {"embed": r"model\.embed_tokens", "attn": r"model\.layers\.\d\.(self_attn\.|input_layernorm)",
                "mlp": r"model\.layers\.\d\.(mlp\.|post_attention_layernorm)", "head": r"lm_head|model\.norm"}
    return torch.cat([t.flatten() for name, t in named.items() if re.match(patterns[group], name)])


# -- Gradients and updates ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("tied", [True, False])
def test_norms_of_the_groups_are_those_before_clipping_and_add_up(kind, tied, tmp_path):
    training = Training(tmp_path, small(kind, tie_word_embeddings=tied))
    row, grads, before, after = training.step()
    assert row["grad_norm"] > 0.1, "the gradient was clipped"
    for group in ("embed", "attn", "mlp", "head"):
        assert row[f"grad_{group}"] == pytest.approx(members(grads, group).norm().item(), rel=1e-6), group
    whole = math.sqrt(sum(row[f"grad_{group}"] ** 2 for group in ("embed", "attn", "mlp", "head")))
    assert whole == pytest.approx(row["grad_norm"], rel=1e-9)
    assert sum(len(members(before, group)) for group in ("embed", "attn", "mlp", "head")) == sum(
        p.numel() for p in training.model.parameters()), "every parameter has a group"


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion", "schedulefree"])
def test_update_is_that_of_a_full_copy(optimizer, tmp_path):
    """The tensors here are smaller than a sample, so it holds all of them."""
    training = Training(tmp_path, optimizer=optimizer)
    for _ in range(4):  # Schedule-Free's points are apart from the third on
        row, _, before, after = training.step()
        for group in ("embed", "attn", "mlp", "head"):
            old, new = members(before, group), members(after, group)
            assert row[f"update_{group}"] == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-9)


def test_sample_of_a_large_tensor_is_a_view_on_all_its_columns():
    p = torch.nn.Parameter(torch.arange(512 * 600.0).view(600, 512))
    found = health.sampled(p)
    assert health.SAMPLE <= len(found) < 2 * health.SAMPLE and found.data_ptr() == p.data_ptr(), "no copy"
    assert len({int(x) % 512 for x in found.tolist()}) == 512
    assert found[-1] > 0.99 * 512 * 600, "and on all its rows"


def test_only_steps_that_are_logged_are_looked_at(tmp_path):
    training = Training(tmp_path, interval=3, max_steps=7)
    seen = ["grad_attn" in training.step()[0] for _ in range(7)]
    assert seen == [True, False, True, False, False, True, True], "the first, each third, the last"


def test_of_several_updates_between_two_lines_the_first_counts(tmp_path):
    once, twice = Training(tmp_path / "a"), Training(tmp_path / "b")
    first, again = once.step()[0], twice.step(updates=3)[0]
    assert again["update_mlp"] == first["update_mlp"] and again["grad_norm"] != first["grad_norm"]
    assert again["grad_mlp"] / again["grad_norm"] == pytest.approx(first["grad_mlp"] / first["grad_norm"])


def test_frozen_groups_are_left_out(tmp_path):
    model = small()
    model.model.embed_tokens.requires_grad_(False)
    row = Training(tmp_path, model).step()[0]
    assert "grad_embed" not in row and "update_embed" not in row and row["grad_attn"] > 0 and "alarm" not in row


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_looking_changes_no_bit(kind, tmp_path):
    ends = []
    for watched in (True, False):
        training = Training(tmp_path / str(watched), small(kind), watched=watched, flags=1)
        rows = [training.step() for _ in range(3)]
        ends.append((rows[-1][3], torch.get_rng_state()))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


# -- Experts and activations -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["moe", "shared"])
def test_expert_load_counts_the_visits_of_the_training_forward(kind, tmp_path):
    training = Training(tmp_path, small(kind))
    twin = copy.deepcopy(training.model)
    with torch.no_grad():
        training.model(training.ids, token_mask=training.real)  # an evaluation: not counted
    training.model(training.ids)  # nobody says what is padding: not counted
    row = training.step()[0]
    seen = []
    for block in twin.model.layers:
        block.mlp.gate.register_forward_hook(lambda module, inputs, output: seen.append(output[2]))
    with torch.no_grad():
        twin(training.ids)
    visits = [[sum(e in pair for pair, real in zip(chosen.tolist(), training.real.flatten(), strict=True) if real)
               for e in range(4)] for chosen in seen]
    expected = [[count / (21 * 2 / 4) for count in line] for line in visits]  # 21 real tokens visit 2 of 4 experts
    kept = json.loads((tmp_path / "expert_load.json").read_text())
    assert kept["step"] == 1 and kept["load"] == pytest.approx(torch.tensor(expected).numpy(), abs=1e-4)
    assert row["expert_max"] == max(max(line) for line in expected)
    assert row["expert_min"] == min(min(line) for line in expected)
    assert training.step()[0]["expert_max"] <= 4, "counted anew for each line"


def test_expert_load_of_the_layers_that_run_is_of_this_step_only(tmp_path):
    """--depth_warmup: the upper block rests, and nothing may add up until it joins."""
    training = Training(tmp_path, small("moe"))
    training.model.model.depth = 1
    for _ in range(2):
        row = training.step()[0]
        kept = json.loads((tmp_path / "expert_load.json").read_text())["load"]
        assert len(kept) == 1 and sum(kept[0]) == pytest.approx(4, abs=1e-3)
        assert row["expert_max"] == pytest.approx(max(kept[0]), abs=1e-3)
        assert not any(counts is not None for counts in training.watch.visits)
    training.model.model.depth = 2
    training.step()
    assert len(json.loads((tmp_path / "expert_load.json").read_text())["load"]) == 2


def test_activations_are_those_behind_the_blocks_on_demand_only(tmp_path):
    training = Training(tmp_path / "a", flags=1)
    behind = []
    training.model.model.norm.register_forward_pre_hook(lambda module, inputs: behind.append(inputs[0]))
    row = training.step()[0]
    assert len(row["act_rms"]) == len(row["act_max"]) == 2
    assert row["act_rms"][1] == pytest.approx(behind[0].square().mean().sqrt().item(), rel=1e-3)
    assert row["act_max"][1] == pytest.approx(behind[0].abs().max().item(), rel=1e-3)
    assert "act_rms" not in Training(tmp_path / "b").step()[0]


def test_activation_that_is_not_finite_is_null_and_an_alarm(tmp_path):
    training = Training(tmp_path, flags=1)
    with torch.no_grad():
        training.model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    row = training.step()[0]
    assert row["act_rms"][0] is not None and row["act_rms"][1] is None
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text


# -- Alarms ------------------------------------------------------------------------------------------------------------
HEALTHY = {"grad_embed": 0.5, "grad_attn": 0.5, "grad_mlp": 0.5, "grad_head": 0.5, "update_embed": 1e-3,
           "update_mlp": 0.05, "expert_max": 1.5, "expert_min": 0.6, "act_rms": [1.0, 2.0], "act_max": [9.0, 800.0]}


@pytest.mark.parametrize("change, dtype, word, cause", [
    ({"grad_attn": 1e-9}, torch.float32, "grad_attn", "cut off from the loss"),
    ({"update_mlp": 0.5}, torch.float32, "update_mlp", "rate too high"),
    ({"expert_min": 0.0}, torch.float32, "expert_min", "balance too weak"),
    ({"act_max": [9.0, 3e4]}, torch.float16, "act_max", "fp16"),
    ({"act_max": [9.0, 3e7]}, torch.float32, "act_max", "rate too high"),
    ({"act_max": [None, 1.0]}, torch.float32, "act_max", "rate too high"),
])
def test_what_leaves_its_range_is_named_with_the_likely_cause(change, dtype, word, cause):
    said, = health.unhealthy(HEALTHY | change, 1.0, dtype)
    assert said.startswith(f"{word} ") and cause in said and "\n" not in said


@pytest.mark.parametrize("change, dtype", [({}, torch.float16), ({"act_max": [3e4]}, torch.bfloat16),
                                           ({"grad_head": 1e-4}, torch.float32), ({"update_mlp": 0.15}, torch.float32)])
def test_healthy_rows_raise_nothing(change, dtype):
    assert health.unhealthy(HEALTHY | change, 1.0, dtype) == [] and health.unhealthy({}, 0.0, dtype) == []


def test_alarm_is_raised_once_also_behind_a_resume(tmp_path, capsys):
    def train(resume_step=None):
        model = small()
        with torch.no_grad():  # gradients of the attention end at its output
            for block in model.model.layers:
                block.self_attn.o_proj.weight.zero_().requires_grad_(False)
        training = Training(tmp_path, model, resume_step=resume_step)
        for group in training.optimizer.param_groups:
            group["lr"] = 0.0
        return [training.step()[0] for _ in range(2)]

    first, second = train()
    assert first["alarm"].startswith("grad_attn 0.0e+00") and "alarm" not in second
    assert capsys.readouterr().out == f"    step 1: {first['alarm']}\n"
    assert not any("alarm" in row for row in train(resume_step=1)), "said in step 1 already"
    assert "alarm" in train(resume_step=0)[0], "step 1 is done again, and says it again"
    rows = [row for row in records.read_metrics(tmp_path) if "alarm" in row]
    assert [row["step"] for row in rows] == [1]


# -- The machine -------------------------------------------------------------------------------------------------------
def test_memory_and_load_of_this_process_are_logged(tmp_path):
    resource = pytest.importorskip("resource")
    training = Training(tmp_path)
    sum(i * i for i in range(300_000))  # one core is busy
    row = training.step()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if health.sys.platform == "darwin" else 1e3)
    assert 0.1 * peak < row["sys_rss_mb"] < 1.1 * peak and 0 < row["sys_cpu"] < 256
    assert not {key for key in row if key.startswith("sys_")} - {"sys_rss_mb", "sys_cpu"}, "no GPU here"
    assert health.memory_there() > health.memory_used()


def test_memory_that_is_nearly_full_is_an_alarm_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "memory_there", lambda: health.memory_used())
    training = Training(tmp_path)
    row = training.step()[0]
    assert row["sys_alarm"].startswith("sys_rss_mb ") and "--batch_size" in row["sys_alarm"] and "alarm" not in row
    assert "sys_alarm" not in training.step()[0]


def test_system_that_tells_nothing_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "memory_used", lambda: None)
    monkeypatch.setattr(health, "memory_there", lambda: None)
    row = Training(tmp_path).step()[0]
    assert "sys_rss_mb" not in row and "sys_cpu" in row and "sys_alarm" not in row


def test_machine_is_written_down(tmp_path):
    Training(tmp_path)
    facts = json.loads((tmp_path / "machine.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["cores"] >= 1 and facts["cpu"] and facts["memory_gb"] > 0
    assert {"python", "numpy", "system"} < facts.keys()


# -- In the scripts ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(ROOT.glob("train_*.py")), ids=lambda path: path.name)
def test_every_training_script_watches_and_reports_in_the_same_lines(path):
    code = path.read_text(encoding="utf-8")
    model, optimizer = ("policy", r"optimizers\[0\]") if path.name == "train_ppo.py" else ("model", "optimizer")
    assert len(re.findall(rf"watch = health\.Watch\({model}, {optimizer}, progress, args, runtime, log\)", code)) == 1
    assert len(re.findall(r"\*\*watch\.numbers\(", code)) == 1
    assert len(re.findall(r"^    report\.refresh\(args\.save_dir, runtime\.is_main\)$", code, re.M)) == 1
