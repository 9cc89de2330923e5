"""Proves the GRPO stage: advantages and losses against numpy and hand examples, the reward rules, its update in any
split of the batch, honest refusals.

    python -m pytest tests/test_train_grpo.py
"""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import common
import logs
import metrics
import train_grpo
from logprobs import token_logprobs
from metrics import Completion
from model import Transformer
from tokenizer import Tokenizer
from train_grpo import group_advantages, grpo_loss

F64 = torch.float64
KINDS = ("grpo", "dapo", "dr_grpo")


def tensors(*arrays):
    return [torch.tensor(a, dtype=F64) for a in arrays]


def random_batch(seed=0, rows=5, columns=8):
    """logp, old_logp, ref_logp [B, T], adv [B], mask [B, T] with answers of different lengths."""
    rng = np.random.default_rng(seed)
    old = rng.normal(-2, 1, size=(rows, columns))
    logp, ref = old + rng.normal(0, 0.3, size=old.shape), old + rng.normal(0, 0.3, size=old.shape)
    mask = np.zeros_like(old)
    for row in mask:
        first = rng.integers(0, columns)
        row[first:rng.integers(first + 1, columns + 1)] = 1
    return logp, old, ref, rng.normal(size=rows), mask


# -- Advantages --------------------------------------------------------------------------------------------------------
def test_group_advantages_equal_numpy():
    rewards = np.random.default_rng(0).normal(size=(6, 5))
    centred = rewards - rewards.mean(1, keepdims=True)
    scaled = centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    assert np.abs(group_advantages(torch.tensor(rewards)).numpy() - scaled).max() < 1e-12
    assert np.abs(group_advantages(torch.tensor(rewards), scale=False).numpy() - centred).max() < 1e-12


def test_group_advantages_match_hand_example():
    """Rewards 1 0 0 0: mean 1/4, squared deviations 9/16 + 3/16 = 3/4, unbiased variance 1/4, deviation 1/2."""
    got = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=F64))
    assert np.allclose(got, np.array([[0.75, -0.25, -0.25, -0.25]]) / 0.5001, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exactly_zero(value):
    """Ten times 0.1 has a mean that is not 0.1 in floating point; its rounding must not become an advantage."""
    for scale in (True, False):
        for dtype in (torch.float32, F64):
            assert not group_advantages(torch.full((2, 10), value, dtype=dtype), scale).any()
    assert group_advantages(torch.tensor([[value]])).tolist() == [[0.0]]


# -- Loss --------------------------------------------------------------------------------------------------------------
def numpy_loss(logp, old, ref, adv, mask, clip, beta, aggregation, longest):
    """The formula of the docstring, token by token."""
    rows = []
    for i in range(len(mask)):
        row = []
        for t in np.flatnonzero(mask[i]):
            ratio = np.exp(logp[i, t] - old[i, t])
            gain = min(ratio * adv[i], min(max(ratio, 1 - clip), 1 + clip) * adv[i])
            row.append(-gain + beta * (np.exp(ref[i, t] - logp[i, t]) - (ref[i, t] - logp[i, t]) - 1))
        rows.append(row)
    if aggregation == "grpo":
        return np.mean([np.mean(row) for row in rows])
    total = sum(map(sum, rows))
    return total / sum(map(len, rows)) if aggregation == "dapo" else total / (len(rows) * longest)


@pytest.mark.parametrize("aggregation", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_equals_numpy(aggregation, beta):
    batch = random_batch()
    got = grpo_loss(*tensors(*batch), 0.2, beta, aggregation)
    assert abs(got.item() - numpy_loss(*batch, 0.2, beta, aggregation, 8)) < 1e-12
    # without a reference nothing may read it
    if not beta:
        logp, old, _, adv, mask = tensors(*batch)
        assert grpo_loss(logp, old, None, adv, mask, 0.2, 0.0, aggregation) == got


def test_aggregations_match_hand_example():
    """Two answers, ratio 1: one of 1 token with A = 1, one of 3 tokens with A = -1; rows of 4 columns.
    grpo: (-1 + 1) / 2 = 0.   dapo: (-1 + 3) / 4 = 1/2.   dr_grpo: (-1 + 3) / (2 * 4) = 1/4; with denom 2 * 10, 1/10.
    """
    logp, adv, mask = torch.zeros(2, 4), torch.tensor([1.0, -1.0]), torch.tensor([[1, 0, 0, 0], [0, 1, 1, 1]])
    values = {name: grpo_loss(logp, logp, None, adv, mask, 0.2, 0.0, name).item() for name in KINDS}
    assert values == {"grpo": 0.0, "dapo": 0.5, "dr_grpo": 0.25}
    assert grpo_loss(logp, logp, None, adv, mask, 0.2, 0.0, "dr_grpo", denom=20).item() == pytest.approx(0.1)


def test_k3_term_matches_hand_example():
    """The reference finds the token half as likely: l = log 2, k3 = 1/2 - 1 + log 2 = 0.193147; times beta 2."""
    logp, ref = torch.tensor([[0.5]], dtype=F64).log(), torch.tensor([[0.25]], dtype=F64).log()
    got = grpo_loss(logp, logp, ref, torch.zeros(1, dtype=F64), torch.ones(1, 1), 0.2, 2.0, "dapo")
    assert got.item() == pytest.approx(2 * 0.193147, abs=1e-6)


@pytest.mark.parametrize("aggregation", KINDS)
def test_gradient_at_ratio_one_is_minus_advantage_by_weight(aggregation):
    logp, _, _, adv, mask = tensors(*random_batch(1))
    logp.requires_grad_()
    grpo_loss(logp, logp.detach(), None, adv, mask, 0.2, 0.0, aggregation).backward()
    weights = {"grpo": mask / mask.sum(1, keepdim=True) / 5, "dapo": mask / mask.sum(), "dr_grpo": mask / 40}
    assert (logp.grad + adv[:, None] * weights[aggregation]).abs().max() < 1e-12


@pytest.mark.parametrize("ratio, adv, gradient", [(1.5, 1, 0), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0)])
def test_clip_cuts_the_gain_never_the_pull_back(ratio, adv, gradient):
    logp = torch.tensor([[ratio]], dtype=F64).log().requires_grad_()
    grpo_loss(logp, torch.zeros(1, 1), None, torch.tensor([float(adv)]), torch.ones(1, 1), 0.2, 0.0, "dapo").backward()
    assert abs(logp.grad.item() - gradient) < 1e-12


@pytest.mark.parametrize("aggregation", KINDS)
def test_micro_batches_add_up_to_the_whole(aggregation):
    batch = tensors(*random_batch(2))
    denom = {"grpo": 5, "dapo": batch[4].sum().item(), "dr_grpo": 40}[aggregation]
    whole = grpo_loss(*batch, 0.2, 0.1, aggregation)
    parts = [grpo_loss(*(x[s] for x in batch), 0.2, 0.1, aggregation, denom) for s in (slice(0, 1), slice(1, 5))]
    assert abs(whole - sum(parts)) < 1e-12


def test_advantages_may_be_given_per_token():
    logp, old, ref, adv, mask = tensors(*random_batch(3))
    one = grpo_loss(logp, old, ref, adv, mask, 0.2, 0.1, "dapo")
    assert one == grpo_loss(logp, old, ref, adv[:, None].expand(5, 8), mask, 0.2, 0.1, "dapo")


@pytest.mark.parametrize("aggregation", KINDS)
def test_a_batch_without_answer_tokens_gives_zero_not_nan(aggregation):
    logp = torch.full((2, 3), 1000.0, requires_grad=True)
    loss = grpo_loss(logp, -logp.detach(), -logp.detach(), torch.ones(2), torch.zeros(2, 3), 0.2, 0.1, aggregation)
    loss.backward()
    assert loss.item() == 0.0 and not logp.grad.any()


def test_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match="'mean'.*grpo, dapo, dr_grpo"):
        grpo_loss(*tensors(*random_batch()), 0.2, 0.0, "mean")


# -- Rewards -----------------------------------------------------------------------------------------------------------
def test_reward_asks_for_a_right_answer_that_ended_by_itself():
    item = {"check": "number", "answer": "7"}
    assert train_grpo.reward_correct(Completion("It is 7.", [1, 2], True), item) == 1.0
    assert train_grpo.reward_correct(Completion("It is 8.", [1, 2], True), item) == 0.0
    assert train_grpo.reward_correct(Completion("It is 7", [1], False), item) == 0.0


def test_format_reward_asks_for_the_polite_style():
    styles = {"rude": ["ugh"], "polite_openers": ["Sure!"], "max_characters": 72}
    assert train_grpo.reward_polite(Completion("Sure! It is 8.", [1], True), styles) == 1.0
    assert train_grpo.reward_polite(Completion("7", [1], True), styles) == 0.0
    assert train_grpo.reward_polite(Completion("Sure! It", [1], False), styles) == 0.0


@pytest.mark.parametrize("text, earned", [
    ("<think>2 and 5 make 7.</think>It is 7.", 1.0), ("\n<think>\nhm\n</think>\n\n7", 1.0), ("It is 7.", 0.0),
    ("It is 7. <think>2 + 5</think>", 0.0), ("<think> </think>7", 0.0), ("<think>hm</think>", 0.0),
    ("<think>a</think><think>b</think>7", 0.0), ("<think>never done", 0.0)])
def test_thinking_is_paid_when_it_comes_first_and_once_and_something_is_said(text, earned):
    assert train_grpo.reward_thinking(Completion(text, [1], True)) == earned
    assert train_grpo.reward_thinking(Completion(text, [1], False)) == 0.0


def test_what_is_only_thought_is_not_judged():
    item = {"check": "number", "answer": "7"}
    assert train_grpo.reward_correct(Completion("<think>Is it 8?</think>It is 7.", [1], True), item) == 1.0
    assert train_grpo.reward_correct(Completion("<think>It is 7.</think>I am not sure.", [1], True), item) == 0.0
    styles = {"rude": ["ugh"], "polite_openers": ["Sure!"], "max_characters": 20}
    assert train_grpo.reward_polite(Completion("<think>Ugh, a long thought.</think>Sure! 7.", [1], True), styles) == 1.0


# -- The stage ---------------------------------------------------------------------------------------------------------
def by_first_id(answer, item):
    """A rule that a random model fulfils half of the time, in place of arithmetic: the first id is below 150."""
    return float(answer.ids[0] < 150)


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    """run(*flags) -> final metrics of a small run in tmp_path/out."""
    rows = [{"conversations": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b),
             "check": "number", "lang": "en", "skill": "add" if b % 2 else "odd"} for a in range(6) for b in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:26]))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[26:]))

    def arguments(*flags):
        base = ["--from_weight", str(model_folder("dense")), "--data_path", str(tmp_path / "train.jsonl"), "--val_path",
                str(tmp_path / "held.jsonl"), "--save_dir", str(tmp_path / "out"), "--cache_dir",
                str(tmp_path / "cache"), "--max_seq_len", "96", "--dtype", "float32", "--threads", "1", "--device",
                "cpu", "--batch_size", "4", "--accumulation_steps", "2", "--num_generations", "4", "--max_new_tokens",
                "6", "--max_steps", "2", "--eval_prompts", "6", "--eval_samples", "2", "--learning_rate", "1e-3"]
        return train_grpo.parse_args([*base, *flags])

    def start(*flags):
        return train_grpo.main(arguments(*flags))

    start.out, start.arguments = tmp_path / "out", arguments
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: setattr(self, "requested", 0))
    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)  # half a second each
    monkeypatch.setattr(train_grpo, "reward_correct", by_first_id)
    return start


def weights(run, name="grpo"):
    """All tensors of the resume state of a checkpoint of this test."""
    return torch.load(run.out / name / "resume" / "state.pt", weights_only=True)["model"]


def log_rows(run, name="grpo"):
    """The numbers of metrics.jsonl, without verdicts and what depends on clock and machine."""
    lines = (run.out / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s" and not k.startswith(("time_", "sys_"))}
            for line in lines if "verdict" not in json.loads(line)]


@pytest.fixture
def recorded(run, model_folder, tokenizer):
    """recorded(*flags) -> (args, runtime, model, rollout): a real model in float64 and one rollout of its own."""
    def make(*flags):
        args = run.arguments("--dtype", "float64", *flags)
        runtime = common.setup(args)
        model = Transformer.from_pretrained(model_folder("dense"), dtype=F64)
        other = Transformer.from_pretrained(model_folder("dense"), dtype=F64)
        torch.nn.init.normal_(other.model.norm.weight, 1, 0.1)  # a reference that differs
        texts = ("What is 2 + 3?", "1 + 4?", "Anna", "e f g h")
        items = [{"ids": tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)[0],
                  "check": "number", "answer": "5"} for text in texts]
        rows = [range(4 * i, 4 * i + 4) for i in range(4)]
        rollout, numbers = train_grpo.make_rollout(model, other, tokenizer, items, rows, None, args, runtime)
        return SimpleNamespace(args=args, runtime=runtime, model=model, rollout=rollout, numbers=numbers, items=items)
    return make


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_rollout_masks_the_answers_and_counts_groups_with_signal(recorded):
    r = recorded("--beta", "0.1", "--updates_per_rollout", "2")
    rollout = r.rollout
    for i, item in enumerate(item for item in r.items for _ in range(4)):
        places = rollout["mask"][i].nonzero().flatten().tolist()
        assert places == list(range(len(item["ids"]) - 1, int(rollout["lengths"][i]) - 1))
    groups = rollout["advantages"].view(4, 4)
    assert r.numbers["signal"] == groups.any(1).double().mean() > 0
    with torch.no_grad():
        expected = token_logprobs(r.model(rollout["ids"]), rollout["ids"])
    assert ((rollout["old_logp"] - expected) * rollout["mask"]).abs().max() < 1e-9
    assert ((rollout["ref_logp"] - expected) * rollout["mask"]).abs().max() > 1e-3


def test_an_answer_does_not_depend_on_its_batch(recorded, tokenizer):
    r = recorded()
    prompts = [item["ids"] for item in r.items]
    rows = [range(4 * i, 4 * i + 4) for i in range(4)]
    whole = train_grpo.respond(r.model, tokenizer, prompts, rows, 1.0, r.args, r.runtime)
    alone = train_grpo.respond(r.model, tokenizer, prompts[2:3], [rows[2][1:2]], 1.0, r.args, r.runtime)
    assert alone == [[whole[2][1]]]


@pytest.mark.parametrize("aggregation", KINDS)
@pytest.mark.parametrize("beta", ["0", "0.1"])
def test_update_has_the_gradient_of_the_whole_rollout(recorded, aggregation, beta):
    """In any split, and although answers without signal are left out when beta is 0."""
    r = recorded("--aggregation", aggregation, "--beta", beta, "--updates_per_rollout", "2")
    r.rollout["advantages"][4:8] = 0
    rollout, gradients, results = r.rollout, [], []
    for size in (16, 3):
        r.args.batch_size = size
        r.model.zero_grad()
        results.append(train_grpo.backward_rollout(r.model, rollout, r.args, r.runtime)[0])
        gradients.append(gradient(r.model))
    r.model.zero_grad()
    logp = token_logprobs(r.model(rollout["ids"]), rollout["ids"])
    denom = 16 * 6 if aggregation == "dr_grpo" else None
    loss = grpo_loss(logp, rollout["old_logp"], rollout["ref_logp"], rollout["advantages"], rollout["mask"], 0.2,
                     float(beta), aggregation, denom)
    loss.backward()
    assert gradients[0].abs().max() > 1e-4
    for other in (gradients[1], gradient(r.model)):
        assert (other - gradients[0]).abs().max() < 1e-9
    assert abs(results[0]["loss"] - loss.item()) < 1e-9
    assert all(abs(results[0][name] - results[1][name]) < 1e-9 for name in results[0])


def test_one_update_needs_no_old_logprobs_and_gives_the_same_gradient(recorded):
    one, two = recorded(), recorded("--updates_per_rollout", "2")
    assert one.rollout["old_logp"] is None
    for r in (one, two):
        train_grpo.backward_rollout(r.model, r.rollout, r.args, r.runtime)
    assert (gradient(one.model) - gradient(two.model)).abs().max() < 1e-9


def test_without_signal_nothing_moves(recorded):
    """Momentum and weight decay would move the weights although the gradient is 0."""
    r = recorded()
    optimizer = torch.optim.AdamW(r.model.parameters(), lr=0.1, weight_decay=0.1)
    nonfinite = common.NonFinite(r.runtime)
    assert train_grpo.update(r.model, optimizer, r.rollout, 0, r.args, r.runtime, nonfinite)["grad_norm"] > 0
    before = [p.clone() for p in r.model.parameters()]
    r.rollout["advantages"].zero_()
    assert train_grpo.update(r.model, optimizer, r.rollout, 1, r.args, r.runtime, nonfinite) == {}
    assert all(torch.equal(a, b) for a, b in zip(before, r.model.parameters(), strict=True))


def test_later_updates_of_a_rollout_are_clipped(recorded):
    r = recorded("--updates_per_rollout", "4", "--clip_epsilon", "0.01")
    optimizer = torch.optim.AdamW(r.model.parameters(), lr=0.01)
    stats = train_grpo.update(r.model, optimizer, r.rollout, 0, r.args, r.runtime, common.NonFinite(r.runtime))
    assert stats["clipfrac"] > 0


@pytest.mark.parametrize("name", ["old_logp", "ref_logp"])
def test_a_rollout_of_another_policy_is_noticed(recorded, name):
    r = recorded("--updates_per_rollout", "2", "--beta", "0.1")
    r.rollout[name] += 1e-3
    with pytest.raises(AssertionError, match={"old_logp": "first ratio", "ref_logp": "the reference"}[name]):
        train_grpo.update(r.model, None, r.rollout, 0, r.args, r.runtime, None)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one_with_the_same_global_batch(world, run, tmp_path, monkeypatch):
    """Groups, scores and update are shared by the ranks; what comes out must not depend on their number. A script of
    three lines brings the reward rule of this file along."""
    flags = ["--dtype=float64", "--beta=0.1", "--updates_per_rollout=2"]
    run(*flags, "--save_weight", "one", "--batch_size", "8")
    own = ("dtype", "beta", "updates_per_rollout", "batch_size", "save_weight")
    flags += [f"--{name}={value}" for name, value in vars(run.arguments()).items()
              if isinstance(value, (int, float, str)) and name not in own]
    flags += ["--data_path", *run.arguments().data_path, "--val_path", *run.arguments().val_path]
    script = tmp_path / "both.py"
    script.write_text("import train_grpo\ntrain_grpo.reward_correct = lambda answer, item: float(answer.ids[0] < 150)\n"
                      "train_grpo.main(train_grpo.parse_args())\n")
    monkeypatch.setenv("PYTHONPATH", str(Path(train_grpo.__file__).parent))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world),
                    script, *flags, f"--batch_size={8 // world}", "--save_weight=two"], check=True)
    one, two = weights(run, "one"), weights(run, "two")
    for name, value in one.items():
        assert (value - two[name]).abs().max() < 1e-9, name
    assert any(row.get("signal") for row in log_rows(run, "two"))


def test_run_writes_a_policy_and_says_what_it_did(run, capsys):
    final = run("--eval_interval", "1", "--beta", "0.1")
    facts = checkpoint.read_minillm(run.out / "grpo")
    assert facts["stage"] == "grpo" and facts["finished"] and facts["metrics"]["pass_at_1"] == final["pass_at_1"]
    assert Tokenizer.from_pretrained(run.out / "grpo").fingerprint == facts["tokenizer"]
    saved, last = Transformer.from_pretrained(run.out / "grpo").state_dict(), weights(run)
    assert all(torch.equal(saved[name], value) for name, value in last.items())
    rows = log_rows(run)
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    expected = {"reward", "signal", "length", "stop_rate", "loss", "entropy", "clipfrac", "kl", "grad_norm", "lr"}
    assert expected <= set(rows[1]) and rows[1]["kl"] == 0
    assert {"pass_at_1", "exact_match", "stop_rate", "by_skill"} <= set(rows[0])
    assert set(final["by_skill"]) == {"add", "odd"} and sum(n for *_, n in final["by_skill"].values()) == 6
    printed = capsys.readouterr().out
    assert "pass@1 before" in printed and "Next: python eval.py" in printed


def test_reward_rises(run):
    """The proof of the whole loop: a random model starts with about half of the rewards."""
    run("--max_steps", "16", "--batch_size", "32", "--learning_rate", "1e-2", "--num_generations", "8")
    rewards = [row["reward"] for row in log_rows(run) if "reward" in row]
    assert 0.2 < rewards[0] < 0.7 and sum(rewards[-3:]) / 3 > rewards[0] + 0.2


def test_a_reference_is_loaded_only_with_beta(run, monkeypatch):
    loaded = []
    load = Transformer.from_pretrained
    monkeypatch.setattr(train_grpo.Transformer, "from_pretrained", lambda *a: loaded.append(a) or load(*a))
    run("--max_steps", "1")
    assert len(loaded) == 1
    run("--max_steps", "1", "--beta", "0.1", "--overwrite", "1")
    assert len(loaded) == 3


def test_experts_train(run, model_folder):
    assert run("--max_steps", "1", "--from_weight", str(model_folder("moe")))["steps"] == 1


def test_what_does_not_fit_is_named(run, tmp_path):
    (tmp_path / "free.jsonl").write_text(json.dumps({"conversations": [{"role": "user", "content": "Sing!"}]}) + "\n")
    for flags, words in ((("--num_generations", "3"), "--num_generations 3"),
                         (("--max_seq_len", "300"), "max_position_embeddings"),
                         (("--max_new_tokens", "96"), "--max_new_tokens 96"), (("--format_weight", "1"), "styles.json"),
                         (("--data_path", str(tmp_path / "free.jsonl")), "Sing!.*check")):
        with pytest.raises(ValueError, match=words):
            run(*flags)


def test_a_resume_is_measured_on_the_prompts_of_the_start(run):
    run("--max_steps", "1")
    with pytest.raises(ValueError, match="--eval_prompts 9 is 9 held-out prompts, .* measured on 6; .*; give the old"):
        run("--max_steps", "2", "--eval_prompts", "9", "--from_resume", "1")
    run("--max_steps", "2", "--from_resume", "1")


def test_another_number_of_held_out_prompts_is_another_run(run, capsys):
    run("--max_steps", "1", "--if_needed", "1")
    run("--max_steps", "1", "--if_needed", "1", "--eval_prompts", "4")
    assert "was made with other flags or inputs: doing it again" in capsys.readouterr().out
    assert len(log_rows(run)) == 3, "step 0, step 1 and its evaluation"


def test_greedy_answers_that_got_worse_are_said_once(run, monkeypatch):
    found = iter([1.0, 0.5, 0.5])
    real = train_grpo.evaluate
    monkeypatch.setattr(train_grpo, "evaluate", lambda *rest: real(*rest) | {"exact_match": next(found)})
    run("--max_steps", "1")
    run("--max_steps", "1", "--from_resume", "1")
    assert [row["step"] for row in log_rows(run) if "greedy answers got worse" in row.get("alarm", "")] == [1]


def test_pass_rates_are_of_the_same_prompts(run, monkeypatch):
    """Small talk has no place in pass@1, nor in pass@k; every answer is right there and wrong elsewhere."""
    held = [json.loads(line) for line in Path(run.arguments().val_path[0]).read_text().splitlines()]
    text = "".join(json.dumps(row | {"skill": ("add", "chat")[i % 2]}) + "\n" for i, row in enumerate(held))
    Path(run.arguments().val_path[0]).write_text(text)
    talk = {row["answer"] for row in held[1::2]} - {row["answer"] for row in held[::2]}
    monkeypatch.setattr(metrics, "check_answer", lambda check, answer, text: answer in talk)
    final = run("--max_steps", "1")
    assert final["pass_at_1"] == final["pass_at_k"] == final["exact_match"] == 0.0


def test_skills_are_paired_by_name():
    before, after = ({"pass_at_1": 0.5, "exact_match": 0.5, "by_skill": {s: [share, share, 2] for s, share in skills}}
                     for skills in ([("add", 0.1), ("odd", 0.9)], [("odd", 0.8), ("add", 0.2)]))
    lines = [line.split() for line in train_grpo.before_and_after(before, after).splitlines()]
    assert ["add", "2", "0.100", "0.200", "0.100", "0.200"] in [[w for w in line if w != "|"] for line in lines]


@pytest.mark.parametrize("beta", ["0", "0.1"])
def test_old_logprobs_come_from_the_micro_batches_of_the_update(recorded, beta):
    """Other shapes round in another way, and in fp32 the first ratio would leave its limit in a large model."""
    r = recorded("--updates_per_rollout", "2", "--batch_size", "3", "--beta", beta)
    r.rollout["advantages"][4:8] = 0
    seen = []
    r.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    r.rollout["old_logp"] = train_grpo.score_tokens(r.model, r.rollout, r.args, r.runtime)
    scored, seen[:] = list(seen), []
    assert train_grpo.backward_rollout(r.model, r.rollout, r.args, r.runtime)[1] == 0
    assert len(seen) == len(scored) and all(map(torch.equal, seen, scored))
