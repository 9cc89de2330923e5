"""Proves the DPO stage: the loss against numpy, ln 2 at the start, the match judged by a rule.

    python -m pytest tests/test_train_dpo.py
"""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BF16_SPEEDUP

import checkpoint
import common
import logs
import train_dpo
from dataset import PreferenceData
from model import Transformer
from train_dpo import completion_logps, dpo_loss, reference_logps

STYLES = {"polite_openers": ["Sure!"], "rude": ["Ugh"], "max_characters": 72}


def numpy_loss(pi_c, pi_r, ref_c, ref_r, beta, smoothing=0.0, loss_type="sigmoid"):
    """The formulas of the docstring, written again with exp and log."""
    h = pi_c - ref_c - pi_r + ref_r
    if loss_type == "ipo":
        return np.mean((h - 1 / (2 * beta)) ** 2)
    p = 1 / (1 + np.exp(-beta * h))
    return np.mean(-(1 - smoothing) * np.log(p) - smoothing * np.log(1 - p))


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    """run(*flags) -> final metrics of a small run in tmp_path/out."""
    kinds = ["wrong", "curt"]
    rows = [{"prompt": f"What is {a} + {b}?", "chosen": f"Sure! The answer is {a + b}.", "kind": kinds[b % 2],
             "rejected": str(a + b) if b % 2 else f"Sure! The answer is {a + b + 1}.", "answer": str(a + b),
             "check": "number", "lang": "en", "skill": "add"} for a in range(6) for b in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:24]))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[24:]))

    def start(*flags, folder=None):
        base = ["--from_weight", str(folder or model_folder("dense")), "--data_path", str(tmp_path / "pairs.jsonl"),
                "--val_path", str(tmp_path / "held.jsonl"), "--save_dir", str(tmp_path / "out"),
                "--cache_dir", str(tmp_path / "cache"), "--max_seq_len", "96", "--dtype", "float32", "--threads", "1",
                "--device", "cpu", "--batch_size", "4", "--max_steps", "4", "--log_interval", "1",
                "--max_new_tokens", "8", "--learning_rate", "1e-3"]
        return train_dpo.main(train_dpo.parse_args([*base, *flags]))

    start.out, start.data = tmp_path / "out", tmp_path
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: setattr(self, "requested", 0))
    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)  # half a second each, and tested with logs.py
    return start


@pytest.fixture
def plain():
    """What completion_logps and reference_logps need of a Runtime, for one process in full precision."""
    return common.Runtime(torch.device("cpu"), torch.float32)


def weights(run, name="dpo"):
    """All saved tensors of a checkpoint of this test."""
    return Transformer.from_pretrained(run.out / name).state_dict()


def log_rows(run, name="dpo"):
    """The numbers of metrics.jsonl, without verdicts and what depends on clock and machine."""
    lines = (run.out / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s" and not k.startswith("sys_")}
            for line in lines if "verdict" not in json.loads(line)]


# -- The pure functions ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss_type, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0)])
def test_dpo_loss_and_rewards_equal_numpy(loss_type, smoothing):
    logps = np.random.default_rng(0).normal(size=(4, 50)) * 5 - 20
    loss, chosen, rejected = dpo_loss(*map(torch.tensor, logps), 0.3, smoothing, loss_type)
    assert abs(loss.item() - numpy_loss(*logps, 0.3, smoothing, loss_type)) < 1e-10
    assert np.allclose(chosen, 0.3 * (logps[0] - logps[2]), atol=1e-12)
    assert np.allclose(rejected, 0.3 * (logps[1] - logps[3]), atol=1e-12)


def test_dpo_loss_matches_hand_example():
    """log-ratios +2 and -3 give h = 5; beta 0.2 makes it 1: -log sigmoid(1) = 0.313262, ipo (5 - 2.5)^2 = 6.25."""
    logps = [torch.tensor([value]) for value in (-8.0, -13.0, -10.0, -10.0)]
    loss, chosen, rejected = dpo_loss(*logps, 0.2)
    assert abs(loss.item() - 0.313262) < 1e-6
    assert abs(chosen.item() - 0.4) < 1e-6 and abs(rejected.item() + 0.6) < 1e-6
    # smoothing 0.1: 0.9 * 0.313262 + 0.1 * 1.313262, because -log sigmoid(-1) is larger by exactly 1
    assert abs(dpo_loss(*logps, 0.2, 0.1)[0].item() - 0.413262) < 1e-6
    assert abs(dpo_loss(*logps, 0.2, loss_type="ipo")[0].item() - 6.25) < 1e-5


def test_dpo_loss_is_log2_when_policy_equals_reference():
    x, y = torch.randn(2, 7)
    for smoothing in (0.0, 0.2):
        assert abs(dpo_loss(x, y, x, y, 0.1, smoothing)[0].item() - math.log(2)) < 1e-6
    assert abs(dpo_loss(x, y, x, y, 0.1, loss_type="ipo")[0].item() - 25.0) < 1e-4


@pytest.mark.parametrize("loss_type, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0)])
def test_dpo_gradient_equals_finite_differences(loss_type, smoothing):
    logps = np.random.default_rng(1).normal(size=(4, 3)) * 4
    pi = torch.tensor(logps[:2], requires_grad=True)
    dpo_loss(*pi, *map(torch.tensor, logps[2:]), 0.4, smoothing, loss_type)[0].backward()
    for i in np.ndindex(2, 3):
        up, down = logps.copy(), logps.copy()
        up[i] += 1e-5
        down[i] -= 1e-5
        slope = (numpy_loss(*up, 0.4, smoothing, loss_type) - numpy_loss(*down, 0.4, smoothing, loss_type)) / 2e-5
        assert abs(pi.grad[i].item() - slope) < 1e-7


def test_dpo_gradient_has_the_published_form():
    """Rafailov et al., section 4: d loss / d log pi(chosen) = -beta * sigmoid(rejected reward - chosen reward) / B."""
    pi_chosen = torch.tensor([-3.0, -9.0], dtype=torch.float64, requires_grad=True)
    others = torch.tensor([[-5.0, -2.0], [-4.0, -4.0], [-6.0, -1.0]], dtype=torch.float64)
    loss, chosen, rejected = dpo_loss(pi_chosen, *others, 0.5)
    loss.backward()
    assert torch.allclose(pi_chosen.grad, -0.5 * torch.sigmoid(rejected - chosen) / 2, atol=1e-12)


def test_smoothing_bounds_the_useful_margin():
    """With e = 0.2 the loss is smallest at beta h = log(0.8 / 0.2); a larger margin costs again."""
    zero, best = torch.zeros(1, dtype=torch.float64), math.log(4)
    at = [dpo_loss(torch.tensor([h], dtype=torch.float64), zero, zero, zero, 1.0, 0.2)[0].item()
          for h in (best - 0.5, best, best + 0.5)]
    assert at[1] < min(at[0], at[2])


@pytest.mark.parametrize("flags", [dict(loss_type="hinge"), dict(label_smoothing=0.5), dict(label_smoothing=-0.1),
                                   dict(label_smoothing=0.1, loss_type="ipo")])
def test_impossible_losses_are_refused(flags):
    with pytest.raises(ValueError, match="choose one|use 0"):
        dpo_loss(*torch.zeros(4, 1), 0.1, **flags)


def test_completion_logps_equal_a_token_by_token_sum(run, model_folder, tokenizer, plain):
    """Oracle: every row alone, float64, a loop over its answer tokens; prompt and padding must not count."""
    model = Transformer.from_pretrained(model_folder("dense"))
    data = PreferenceData([run.data / "pairs.jsonl"], tokenizer, 96, run.data / "cache")
    batch = data.batch([3, 0, 8])
    got = completion_logps(model, batch, plain)
    rows = [json.loads(line) for line in (run.data / "pairs.jsonl").read_text().splitlines()]
    texts = [(rows[i]["prompt"], rows[i][side]) for side in ("chosen", "rejected") for i in (3, 0, 8)]
    for (prompt, answer), value in zip(texts, got, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids, mask = tokenizer.render(turns)
        logp = model(torch.tensor([ids])).double().log_softmax(-1)[0]
        expected = sum(logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])
        assert ids[max(t for t in range(len(ids)) if mask[t])] == tokenizer.eos_id
        assert abs(value.item() - expected) < 1e-4


def test_reference_table_holds_the_asked_pairs_only(run, model_folder, tokenizer, plain):
    model = Transformer.from_pretrained(model_folder("dense"))
    data = PreferenceData([run.data / "pairs.jsonl"], tokenizer, 96, run.data / "cache")
    table = reference_logps(model, data, np.array([2, 5, 7]), SimpleNamespace(batch_size=2), plain)
    assert table.shape == (len(data), 2) and table[[2, 5, 7]].isfinite().all()
    assert table.isnan().sum() == 2 * (len(data) - 3)
    assert torch.allclose(table[5], completion_logps(model, data.batch([5]), plain), atol=1e-4)


def test_warnings_name_falling_log_probs_and_overtraining():
    fine = {"chosen_drift": 0.1, "rejected_drift": -2.0}
    assert list(train_dpo.warning_lines(fine, 0.3, early=True)) == []
    falling = list(train_dpo.warning_lines({"chosen_drift": -0.5, "rejected_drift": -2.0}, 0.3, early=True))
    assert len(falling) == 1 and "lose probability" in falling[0]
    assert "by heart" in list(train_dpo.warning_lines(fine, 0.001, early=True))[0]
    assert list(train_dpo.warning_lines(fine, 0.001, early=False)) == []


# -- The stage ---------------------------------------------------------------------------------------------------------
def test_run_starts_at_log2_and_writes_a_checkpoint_with_metrics(run, capsys):
    final = run()
    rows = log_rows(run)
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-5 and abs(rows[0]["margin"]) < 1e-5
    assert {"accuracy", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "chosen_length", "lr",
            "rejected_length", "grad_norm"} <= set(rows[0])
    assert {"val_accuracy", "val_accuracy_wrong", "val_accuracy_curt", "chosen_drift"} <= set(rows[-1])
    facts = checkpoint.read_minillm(run.out / "dpo")
    assert facts["stage"] == "dpo" and facts["finished"] and facts["metrics"]["accuracy"] == final["accuracy"]
    assert "win_rate" not in final  # there is no styles.json beside these data
    printed = capsys.readouterr().out
    assert "loss at step 0: 0.6931, expected 0.6931" in printed and "Next: python eval.py" in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_that_differs_is_a_bug_in_fp32_and_a_warning_where_dtypes_round(run, capsys, monkeypatch, dtype):
    real = train_dpo.dpo_loss
    monkeypatch.setattr(train_dpo, "dpo_loss", lambda chosen, *rest: real(chosen + 0.5, *rest))
    if dtype == "float32":
        with pytest.raises(RuntimeError, match="policy and reference differ"):
            run("--dtype", dtype, "--loss_type", "ipo", "--max_steps", "1")
    elif BF16_SPEEDUP:
        assert run("--dtype", dtype, "--loss_type", "ipo", "--max_steps", "1")["steps"] == 1
        assert "warning: policy and reference differ" in capsys.readouterr().out


def test_implicit_accuracy_of_the_untrained_model_is_zero(run):
    """All rewards are ties, and ties are wrong; a rate of 1e-30 leaves the weights as they are."""
    final = run("--learning_rate", "1e-30", "--max_steps", "1")
    assert final["accuracy"] == 0.0 and final["margin"] == 0.0


def test_margin_and_accuracy_rise(run):
    final = run("--max_steps", "20")
    assert final["accuracy_by_kind"]["curt"] == 1.0 and final["margin"] > 0.1


def test_equal_models_tie_in_the_match(run):
    (run.data / "styles.json").write_text(json.dumps(STYLES))
    same = run("--learning_rate", "1e-30", "--max_steps", "1", "--eval_prompts", "10")
    assert (same["win_rate"], same["win_rate_error"], same["win_rate_n"]) == (0.5, 0.0, 10)
    assert same["exact_match"] == same["exact_match_before"]


def test_match_is_judged_by_the_rule(run, tokenizer, plain, monkeypatch):
    """Of four questions the new model wins two (same answer, politer), ties one, loses one: (2 + 0.5) / 4."""
    (run.data / "styles.json").write_text(json.dumps(STYLES))
    args = train_dpo.parse_args(["--data_path", str(run.data / "pairs.jsonl"), "--eval_prompts", "4",
                                 "--val_path", str(run.data / "held.jsonl")])
    items, styles = train_dpo.heldout_prompts(args, tokenizer)
    assert styles == STYLES and [item["answer"] for item in items] == ["4", "5", "6", "7"]
    answers = {"new": ["Sure! 4.", "Sure! 5.", "6", "Ugh."], "old": ["4", "5", "6", "7"]}
    monkeypatch.setattr(train_dpo.metrics, "complete",
                        lambda model, *a, **k: [train_dpo.metrics.Completion(t, [], True) for t in answers[model]])
    match = train_dpo.play("new", "old", tokenizer, items, styles, args, plain)
    assert match["win_rate"] == 0.625 and match["win_rate_n"] == 4
    assert (match["exact_match_before"], match["exact_match"]) == (1.0, 0.75)


@pytest.mark.parametrize("kind, loss_type", [("dense", "ipo"), ("moe", "sigmoid"), ("shared", "sigmoid")])
def test_live_reference_equals_precomputed_reference(run, model_folder, kind, loss_type):
    flags = ["--dtype", "float64", "--max_steps", "2", "--loss_type", loss_type]
    run(*flags, "--save_weight", "table", folder=model_folder(kind))
    run(*flags, "--save_weight", "live", "--reference", "live", folder=model_folder(kind))
    table, live = (torch.load(run.out / name / "resume/state.pt", weights_only=True)["model"]
                   for name in ("table", "live"))
    for name in table:
        assert (table[name] - live[name]).abs().max() < 1e-9, name


def test_longer_resume_scores_the_missing_pairs(run):
    run("--max_steps", "2")
    table = torch.load(run.out / "dpo/resume/state.pt", weights_only=True)["tables"]["train"]
    assert table.isnan().any(1).sum() == 24 - 8
    final = run("--max_steps", "6", "--from_resume", "1")
    table = torch.load(run.out / "dpo/resume/state.pt", weights_only=True)["tables"]["train"]
    assert final["steps"] == 6 and table.isfinite().all()


def test_resume_with_another_reference_is_refused(run, model_folder, tmp_path):
    parent = tmp_path / "sft"
    Transformer.from_pretrained(model_folder("dense")).save_pretrained(parent)
    for file in model_folder("dense").glob("*token*"):
        (parent / file.name).write_bytes(file.read_bytes())
    checkpoint.write_minillm(parent, {"key": "first"})
    run("--max_steps", "1", folder=parent)
    checkpoint.write_minillm(parent, {"key": "second"})
    with pytest.raises(ValueError, match="have changed"):
        run("--max_steps", "2", "--from_resume", "1", folder=parent)


def test_a_reference_that_differs_stops_the_run(run, monkeypatch):
    honest = train_dpo.reference_logps
    monkeypatch.setattr(train_dpo, "reference_logps", lambda *a: honest(*a) + torch.tensor([0.0, 1.0]))
    with pytest.raises(RuntimeError, match="policy and reference differ"):
        run()


def test_dropout_of_the_start_model_is_off(run, tokenizer, model_folder, tmp_path):
    config = json.loads((model_folder("dense") / "config.json").read_text()) | {"dropout": 0.5}
    parent = tmp_path / "sft"
    Transformer.from_pretrained(model_folder("dense")).save_pretrained(parent)
    tokenizer.save_pretrained(parent)
    (parent / "config.json").write_text(json.dumps(config))
    assert Transformer.from_pretrained(parent).config.dropout == 0.5
    run("--max_steps", "1", folder=parent)  # the check of ln 2 inside would fail with dropout
