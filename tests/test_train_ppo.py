"""Proves the PPO stage: its mathematics against numpy and hand examples, its networks row by row, its update in any
split of the batch, its stops and refusals.

    python -m pytest tests/test_train_ppo.py
"""
import copy
import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import common
import logs
import train_ppo
from metrics import Completion
from model import ScalarHead, Transformer
from tokenizer import Tokenizer
from train_ppo import adapted, explained_variance, gae, kl_terms, masked_whiten, policy_loss, token_rewards, value_loss

F64 = torch.float64


def spans(rng, rows, columns):
    """Random masks [rows, columns]: one piece of at least one token a row, as answers are."""
    mask = np.zeros((rows, columns))
    for row in mask:
        first = rng.integers(0, columns)
        row[first:rng.integers(first + 1, columns + 1)] = 1
    return mask


def tensors(*arrays):
    return [torch.tensor(a, dtype=F64) for a in arrays]


# -- GAE ---------------------------------------------------------------------------------------------------------------
def test_gae_matches_hand_example():
    """gamma 1, lam 1/2, rewards 0 0 1, values 1/2 1/4 1/2; from the end:
        t=2: delta = 1 + 0   - 1/2 = 1/2     A = 1/2
        t=1: delta = 0 + 1/2 - 1/4 = 1/4     A = 1/4 + 1/2 * 1/2 = 1/2
        t=0: delta = 0 + 1/4 - 1/2 = -1/4    A = -1/4 + 1/2 * 1/2 = 0
    and returns are A + V.
    """
    rewards, values = tensors([[0, 0, 1]], [[0.5, 0.25, 0.5]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 1.0, 0.5)
    assert advantages.tolist() == [[0.0, 0.5, 0.5]]
    assert returns.tolist() == [[0.5, 0.75, 1.0]]


def test_gae_equals_the_sum_over_deltas():
    """The definition, without recursion: A_t = sum_k (gamma lam)^k delta_{t+k} up to the last answer token."""
    rng = np.random.default_rng(0)
    rewards, values, mask = rng.normal(size=(6, 9)), rng.normal(size=(6, 9)), spans(rng, 6, 9)
    gamma, lam = 0.9, 0.7
    expected = np.zeros((6, 9))
    for i in range(6):
        inside = np.flatnonzero(mask[i])
        for t in inside:
            for k in inside[inside >= t]:
                following = values[i, k + 1] if k + 1 in inside else 0.0
                expected[i, t] += (gamma * lam) ** (k - t) * (rewards[i, k] + gamma * following - values[i, k])
    advantages, returns = gae(*tensors(rewards, values, mask), gamma, lam)
    assert np.abs(advantages.numpy() - expected).max() < 1e-12
    assert np.abs(returns.numpy() - (expected + values) * mask).max() < 1e-12


def test_padding_after_the_end_flows_nothing_back():
    rng = np.random.default_rng(1)
    rewards, values, mask = tensors(rng.normal(size=(5, 8)), rng.normal(size=(5, 8)), spans(rng, 5, 8))
    outside = 1 - mask
    first = gae(rewards, values, mask, 1.0, 0.95)
    second = gae(rewards + 1e6 * outside, values - 1e6 * outside, mask, 1.0, 0.95)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and not (a * outside).any()


def test_gae_ends_of_lambda():
    """lam 1: the return is the sum of the rewards to come, whatever V says; lam 0: the one-step error."""
    rng = np.random.default_rng(2)
    rewards, values = tensors(rng.normal(size=(3, 5)), rng.normal(size=(3, 5)))
    ones = torch.ones(3, 5)
    _, returns = gae(rewards, values, ones, 1.0, 1.0)
    assert torch.allclose(returns, rewards.flip(1).cumsum(1).flip(1), atol=1e-12)
    advantages, _ = gae(rewards, values, ones, 1.0, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=F64)], 1)
    assert torch.allclose(advantages, rewards + following - values, atol=1e-12)


# -- Whitening, KL -----------------------------------------------------------------------------------------------------
def test_whitening_uses_the_unbiased_variance_of_masked_entries():
    rng = np.random.default_rng(3)
    x, mask = rng.normal(3, 5, size=(7, 6)), spans(rng, 7, 6)
    inside = x[mask > 0]
    white = masked_whiten(*tensors(x, mask)).numpy()
    assert np.abs(white[mask > 0] - (inside - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8)).max() < 1e-9
    assert not white[mask == 0].any()
    assert abs(white[mask > 0].mean()) < 1e-9 and abs(white[mask > 0].var(ddof=1) - 1) < 1e-6
    # hand example: 1 and 3 have mean 2 and unbiased variance 2
    assert torch.allclose(masked_whiten(*tensors([[1, 3, 9]], [[1, 1, 0]])),
                          torch.tensor([[-1, 1, 0]], dtype=F64) / 2 ** 0.5, atol=1e-8)


def test_whitening_one_or_no_token_gives_zero():
    assert masked_whiten(*tensors([[4.0, 5.0]], [[1, 0]])).tolist() == [[0.0, 0.0]]
    assert masked_whiten(*tensors([[4.0, 5.0]], [[0, 0]])).tolist() == [[0.0, 0.0]]


def test_kl_terms_on_a_categorical():
    """Summed over all outcomes: k1 and k3 are the KL; the gradient of k2, with the sampling weights held fixed, is the
    gradient of the KL, that of k1 is 0 (which is why k1 belongs into the reward, not into the loss)."""
    torch.manual_seed(0)
    theta = torch.randn(7, dtype=F64, requires_grad=True)
    logp, ref = theta.log_softmax(0), torch.randn(7, dtype=F64).log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum()
    expected, = torch.autograd.grad(kl, theta, retain_graph=True)
    weights = logp.exp().detach()
    terms = kl_terms(logp, ref)
    means = [(weights * k).sum() for k in terms]
    assert abs(means[0] - kl) < 1e-12 and abs(means[2] - kl) < 1e-12
    assert (terms[2] >= 0).all()
    gradients = [torch.autograd.grad(m, theta, retain_graph=True)[0] for m in means]
    assert gradients[0].abs().max() < 1e-12
    assert (gradients[1] - expected).abs().max() < 1e-12


def test_kl_terms_match_hand_example():
    """l = log 2 (twice as likely as before): k1 = 0.6931, k2 = 0.2402, k3 = 1/2 - 1 + log 2 = 0.1931."""
    k1, k2, k3 = kl_terms(torch.tensor([0.5], dtype=F64).log(), torch.tensor([0.25], dtype=F64).log())
    assert np.allclose([k1, k2, k3], [[0.693147], [0.240227], [0.193147]], atol=1e-6)


# -- Losses ------------------------------------------------------------------------------------------------------------
def numpy_policy_loss(logp, old, adv, mask, clip):
    """Equation 7 of the paper, token by token: the mean of min(ratio A, clipped ratio A), negated."""
    total, cut = 0.0, 0
    for i, t in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(logp[i, t] - old[i, t])
        held = min(max(ratio, 1 - clip), 1 + clip)
        total -= min(ratio * adv[i, t], held * adv[i, t])
        cut += held * adv[i, t] < ratio * adv[i, t]
    return total / mask.sum(), cut / mask.sum()


def test_policy_loss_equals_numpy():
    rng = np.random.default_rng(4)
    old, adv, mask = rng.normal(-2, 1, size=(5, 8)), rng.normal(size=(5, 8)), spans(rng, 5, 8)
    logp = old + rng.normal(0, 0.3, size=(5, 8))
    loss, clipfrac = policy_loss(*tensors(logp, old, adv, mask), 0.2)
    expected, cut = numpy_policy_loss(logp, old, adv, mask, 0.2)
    assert abs(loss.item() - expected) < 1e-12 and abs(clipfrac.item() - cut) < 1e-12
    assert 0 < cut < 1


@pytest.mark.parametrize("ratio, adv, loss, cut",
                         [(1.5, 1, -1.2, 1), (1.5, -1, 1.5, 0), (0.5, 1, -0.5, 0), (0.5, -1, 0.8, 1)])
def test_clip_matches_hand_example(ratio, adv, loss, cut):
    """clip 0.2. Ratio 1.5: a good token (A 1) gains no more than 1.2 and gets no gradient; a bad one (A -1) costs its
    full 1.5. Ratio 0.5: a good token costs its full -0.5; a bad one gains no more than 0.8."""
    logp = torch.tensor([[ratio]], dtype=F64).log().requires_grad_()
    got, clipfrac = policy_loss(logp, torch.zeros(1, 1), torch.tensor([[float(adv)]]), torch.ones(1, 1), 0.2)
    got.backward()
    assert abs(got.item() - loss) < 1e-12 and clipfrac.item() == cut
    # d loss / d logp = -A ratio where the clip is not active
    assert abs(logp.grad.item() - (0 if cut else -adv * ratio)) < 1e-12


def test_policy_gradient_at_ratio_one_is_minus_advantage():
    rng = np.random.default_rng(5)
    logp, adv, mask = tensors(rng.normal(size=(3, 6)), rng.normal(size=(3, 6)), spans(rng, 3, 6))
    logp.requires_grad_()
    policy_loss(logp, logp.detach(), adv, mask, 0.2)[0].backward()
    assert (logp.grad + adv * mask / mask.sum()).abs().max() < 1e-12


def test_value_loss_equals_numpy_and_hand_example():
    """V was 0, is 1, clip 0.2: held at 0.2. Return 2: errors 1 and 3.24, half the larger is 1.62. Return 0: 1 and 0.04,
    half the larger is 0.5, so that a value that ran away is pulled back."""
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    assert abs(value_loss(one, zero, 2 * one, one, 0.2).item() - 1.62) < 1e-12
    assert abs(value_loss(one, zero, zero, one, 0.2).item() - 0.5) < 1e-12
    rng = np.random.default_rng(6)
    v, old, returns, mask = *rng.normal(size=(3, 4, 7)), spans(rng, 4, 7)
    held = np.clip(v, old - 0.2, old + 0.2)
    expected = 0.5 * np.maximum((v - returns) ** 2, (held - returns) ** 2)[mask > 0].mean()
    assert abs(value_loss(*tensors(v, old, returns, mask), 0.2).item() - expected) < 1e-12


def test_micro_batches_add_up_to_the_whole():
    rng = np.random.default_rng(7)
    x, old, target = tensors(*rng.normal(size=(3, 6, 5)))
    mask = torch.tensor(spans(rng, 6, 5))
    denom = mask.sum().item()
    for function in (policy_loss, value_loss):
        whole = function(x, old, target, mask, 0.2)
        parts = [function(x[s], old[s], target[s], mask[s], 0.2, denom) for s in (slice(0, 1), slice(1, 6))]
        if function is policy_loss:
            assert abs(whole[1] - parts[0][1] - parts[1][1]) < 1e-12  # the clip fraction adds up, too
            whole, parts = whole[0], [part[0] for part in parts]
        assert abs(whole - sum(parts)) < 1e-12


def test_a_batch_without_answer_tokens_gives_zero_not_nan():
    """Log-probs of padding may be anything; exp(2000) is inf, and inf * 0 would be NaN."""
    logp = torch.full((2, 3), 1000.0, requires_grad=True)
    nothing = torch.zeros(2, 3)
    loss, clipfrac = policy_loss(logp, -logp.detach(), torch.ones(2, 3), nothing, 0.2)
    loss = loss + clipfrac + value_loss(logp, nothing, nothing, nothing, 0.2)
    loss.backward()
    assert loss.item() == 0.0 and not logp.grad.any()


def test_token_rewards_match_hand_example():
    """kl_coef 0.1; the answer is tokens 1 and 2. Ended: -0.1 * 2 at token 1, -0.1 * 3 + 5 at the last; cut off: 5 - 1.
    """
    k1, mask = tensors([[7, 2, 3, 7]] * 2, [[0, 1, 1, 0]] * 2)
    rewards = token_rewards(torch.tensor([5.0, 5.0]), torch.tensor([True, False]), k1, mask, 0.1, 1.0)
    assert np.allclose(rewards, [[0, -0.2, 4.7, 0], [0, -0.2, 3.7, 0]], atol=1e-6)


def test_explained_variance_of_perfect_constant_and_wrong_values():
    returns, mask = tensors([[1, 2, 3, 99]], [[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert abs(explained_variance(torch.zeros_like(returns), returns, mask)) < 1e-12
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)


def test_adaptive_price_of_kl_moves_towards_the_target():
    assert adapted(0.1, 6.0, 6.0) == 0.1
    assert adapted(0.1, 60.0, 6.0) == pytest.approx(0.12) and adapted(0.1, 0.0, 6.0) == pytest.approx(0.08)


def test_health_check_names_what_is_wrong():
    args = SimpleNamespace(kl_limit=5.0, entropy_floor=0.1)
    assert train_ppo.unhealthy({"kl": 4.9, "entropy": 0.2}, 1.0, args) == ""
    assert "--kl_limit" in train_ppo.unhealthy({"kl": 5.1, "entropy": 0.2}, 1.0, args)
    assert "--entropy_floor" in train_ppo.unhealthy({"kl": 4.9, "entropy": 0.09}, 1.0, args)


# -- The stage ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reward_folder(tokenizer, model_folder, tmp_path_factory):
    """A reward model with random weights and the minillm.json that train_reward.py would write."""
    folder = tmp_path_factory.mktemp("reward") / "reward"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = ScalarHead(Transformer.from_pretrained(model_folder("dense")).config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint.write_minillm(folder, {"stage": "reward", "key": "r", "metrics": {"accuracy": 0.9}, "score_mean": 0.01,
                                  "score_std": 0.02, "tokenizer": tokenizer.fingerprint})
    return folder


@pytest.fixture
def run(model_folder, reward_folder, tmp_path, monkeypatch):
    """run(*flags) -> final metrics of a small run in tmp_path/out."""
    rows = [{"conversations": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b),
             "check": "number", "lang": "en", "skill": "add"} for a in range(6) for b in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:26]))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[26:]))
    styles = {"rude": ["ugh"], "polite_openers": ["sure"], "max_characters": 72}
    (tmp_path / "styles.json").write_text(json.dumps(styles))

    def arguments(*flags):
        judge = [] if "--rule" in flags else ["--reward_weight", str(reward_folder)]
        base = ["--from_weight", str(model_folder("dense")), *judge, "--data_path", str(tmp_path / "train.jsonl"),
                "--val_path", str(tmp_path / "held.jsonl"), "--save_dir", str(tmp_path / "out"), "--cache_dir",
                str(tmp_path / "cache"), "--max_seq_len", "96", "--dtype", "float32", "--threads", "1", "--device",
                "cpu", "--rollout_size", "8", "--batch_size", "4", "--accumulation_steps", "1",
                "--max_new_tokens", "6", "--max_steps", "2", "--eval_prompts", "6", "--learning_rate", "1e-3"]
        return train_ppo.parse_args([*base, *flags])

    def start(*flags):
        return train_ppo.main(arguments(*flags))

    start.out, start.arguments = tmp_path / "out", arguments
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: setattr(self, "requested", 0))
    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)  # half a second each
    return start


def state(run, name="ppo"):
    """The resume state of a checkpoint of this test."""
    return torch.load(run.out / name / "resume" / "state.pt", weights_only=True)


def log_rows(run, name="ppo"):
    """The numbers of metrics.jsonl, without verdicts and what depends on clock and machine."""
    lines = (run.out / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s" and not k.startswith(("time_", "sys_"))}
            for line in lines if "verdict" not in json.loads(line)]


@pytest.fixture
def recorded(run, model_folder, reward_folder, tokenizer):
    """recorded(*flags) -> (args, runtime, team, rollout): real networks in float64 and one rollout of theirs."""
    def make(*flags):
        args = run.arguments("--dtype", "float64", *flags)
        runtime = common.setup(args)
        team = train_ppo.load_team(args, tokenizer, model_folder("dense"), reward_folder, runtime)
        torch.nn.init.normal_(team.both.value.score.weight)  # a zero head would hide errors of the value path
        prompts = [tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)[0]
                   for text in ("What is 2 + 3?", "1 + 4?", "请问 1 + 4 等于多少？", "Anna", "a", "b c", "d", "e f")]
        answers = train_ppo.respond(team.both.policy, tokenizer, prompts, range(8), 1.0, args, runtime)
        # one answer that ended early, so that lengths differ
        answers[1] = Completion("x", answers[1].ids[:2] + [tokenizer.eos_id], True)
        items = [{"ids": prompt} for prompt in prompts]
        rollout = train_ppo.judge(team, items, answers, None, train_ppo.minibatches(8, 0, args, runtime), args, runtime)
        train_ppo.add_advantages(rollout, 0.05, args)
        return args, runtime, team, rollout, prompts, answers
    return make


def test_networks_say_the_same_about_each_answer_alone(recorded):
    """An oracle without batches and padding: one row, one forward; only answer tokens are masked in."""
    _, _, team, rollout, prompts, answers = recorded()
    assert rollout["ended"].tolist() == [answer.stopped for answer in answers]
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor([prompt + answer.ids])
        with torch.no_grad():
            logp = team.both.policy(ids).log_softmax(-1)[0]
            values = team.both.value.values(ids)[0]
            score = team.reward(ids, torch.tensor([ids.shape[1]])).item()
        places = range(len(prompt), ids.shape[1])
        assert rollout["mask"][i].nonzero().flatten().tolist() == [t - 1 for t in places]
        for t in places:
            assert abs(rollout["old_logp"][i, t - 1] - logp[t - 1, ids[0, t]]) < 1e-9
            assert abs(rollout["values"][i, t - 1] - values[t - 1]) < 1e-9
            assert abs(rollout["entropy"][i, t - 1] + (logp[t - 1].exp() * logp[t - 1]).sum()) < 1e-9
        assert abs(rollout["scores"][i] - (score - 0.01) / 0.02) < 1e-7
    # the reference is the start, exactly
    assert torch.equal(rollout["old_logp"], rollout["ref_logp"])


def test_an_answer_does_not_depend_on_its_batch(recorded, tokenizer):
    args, runtime, team, _, prompts, answers = recorded()
    alone = train_ppo.respond(team.both.policy, tokenizer, prompts[3:4], [3], 1.0, args, runtime)
    assert alone[0] == answers[3]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_ratio_is_one_before_the_first_update(run, dtype):
    """To 1e-5 by rule. It is 1 to the last bit, because old and new log-probs come from batches of one shape."""
    run("--dtype", dtype, "--max_steps", "2", "--batch_size", "2", "--accumulation_steps", "2")
    assert [row["first_ratio"] for row in log_rows(run) if "first_ratio" in row] == [0.0, 0.0]


def test_a_rollout_of_another_policy_is_noticed(recorded):
    args, runtime, team, rollout, *_ = recorded()
    rollout["old_logp"] += 1e-3
    with pytest.raises(AssertionError, match="first ratio"):
        train_ppo.update(team.both, [], rollout, 0, args, runtime, None)


def test_a_reference_that_is_not_the_start_is_noticed(run, monkeypatch):
    load, loaded = Transformer.from_pretrained, []

    def other(*args):
        loaded.append(load(*args))
        with torch.no_grad():  # the first is the policy
            loaded[-1].model.norm.weight.mul_(1 + 0.01 * (len(loaded) > 1))
        return loaded[-1]

    monkeypatch.setattr(train_ppo.Transformer, "from_pretrained", other)
    with pytest.raises(AssertionError, match="ratio to the reference is off 1"):
        run("--max_steps", "1")


def test_micro_batches_give_the_gradient_of_the_whole(recorded):
    args, runtime, team, rollout, *_ = recorded()
    rows = [6, 1, 3, 0, 2, 7]
    results, gradients = [], []
    for size in (6, 2, 1):
        args.batch_size = size
        team.both.zero_grad()
        results.append(train_ppo.backward_minibatch(team.both, rollout, rows, args, runtime))
        gradients.append(torch.cat([p.grad.flatten() for p in team.both.parameters()]))
    # the whole, straight from the formulas
    ids, pick = rollout["ids"][rows], {name: value[rows] for name, value in rollout.items()}
    team.both.zero_grad()
    logits, values = team.both(ids)
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    loss = policy_loss(logp, pick["old_logp"], pick["advantages"], pick["mask"], 0.2)[0]
    (loss + value_loss(values[:, :-1], pick["values"], pick["returns"], pick["mask"], 0.2)).backward()
    gradients.append(torch.cat([p.grad.flatten() for p in team.both.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() < 1e-9
    for result in results[1:]:
        assert all(abs(result[name] - results[0][name]) < 1e-9 for name in result)
    assert abs(results[0]["policy_loss"] - loss.item()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one_with_the_same_global_batch(world, run):
    """Rollout, scores and update are shared by the ranks; what comes out must not depend on their number."""
    run("--dtype", "float64", "--save_weight", "one", "--batch_size", "4")
    flags = [f"--{name}={value}" for name, value in vars(run.arguments()).items()
             if isinstance(value, (int, float, str)) and name not in ("dtype", "batch_size", "save_weight")]
    flags += ["--data_path", *run.arguments().data_path, "--val_path", *run.arguments().val_path]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world),
                    train_ppo.__file__, *flags, "--dtype=float64", f"--batch_size={4 // world}", "--save_weight=two"],
                   check=True)
    one, two = state(run, "one"), state(run, "two")
    for part in ("model", "best"):
        for name, value in one[part].items():
            assert (value - two[part][name]).abs().max() < 1e-9, name
    assert [row.keys() for row in log_rows(run, "one")] == [row.keys() for row in log_rows(run, "two")]


def test_early_stop_skips_the_step_itself(recorded):
    """After the first update the policy has moved, so a tiny --target_kl must end the rollout with exactly that one
    update: the momentum of a second step would move the weights even with a gradient of 0."""
    args, runtime, team, rollout, *_ = recorded("--batch_size", "8")
    weights = []
    for epochs, target in ((1, 0.0), (3, 1e-12)):
        args.ppo_epochs, args.target_kl = epochs, target
        both = copy.deepcopy(team.both)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (both.policy, both.value)]
        stats = train_ppo.update(both, optimizers, rollout, 0, args, runtime, common.NonFinite(runtime))
        assert stats["updates"] == 1
        weights.append(torch.cat([p.detach().flatten() for p in both.parameters()]))
    assert torch.equal(*weights)
    assert (weights[0] != torch.cat([p.detach().flatten() for p in team.both.parameters()])).any()


def test_a_gradient_that_is_not_finite_is_skipped(recorded):
    args, runtime, team, rollout, *_ = recorded("--batch_size", "8", "--ppo_epochs", "1")
    rollout["advantages"][0] = torch.nan
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (team.both.policy, team.both.value)]
    before = [p.clone() for p in team.both.parameters()]
    nonfinite = common.NonFinite(runtime)
    train_ppo.update(team.both, optimizers, rollout, 0, args, runtime, nonfinite)
    assert nonfinite.total == 1
    assert all(torch.equal(a, b) for a, b in zip(before, team.both.parameters(), strict=True))


def test_run_writes_the_best_policy_and_says_what_it_did(run, capsys):
    final = run("--eval_interval", "1", "--adaptive_kl", "3")
    facts = checkpoint.read_minillm(run.out / "ppo")
    assert facts["stage"] == "ppo" and facts["finished"] and facts["metrics"]["best_step"] == final["best_step"]
    assert Tokenizer.from_pretrained(run.out / "ppo").fingerprint == facts["tokenizer"]
    saved, resume = Transformer.from_pretrained(run.out / "ppo").state_dict(), state(run)
    assert all(torch.equal(saved[name], value) for name, value in resume["best"].items())
    assert any(name.startswith("value.") for name in resume["model"])
    rows = log_rows(run)
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    expected = {"reward", "kl", "entropy", "clipfrac", "approx_kl", "policy_loss", "value_loss", "explained_variance",
                "length", "stop_rate", "rollout_exact_match", "kl_coef", "lr", "grad_norm", "updates", "first_ratio"}
    assert expected <= set(rows[1]) and rows[1]["kl"] == 0 and rows[3]["kl_coef"] == pytest.approx(0.04)
    assert {"val_reward", "val_kl", "exact_match", "sampled_exact_match", "polite", "stop_rate"} <= set(rows[0])
    raw = json.loads((run.out / "logs" / "ppo" / "metrics.jsonl").read_text().splitlines()[1])
    assert sum(raw[f"time_{part}"] for part in ("rollout", "scoring", "update")) == pytest.approx(1, abs=1e-5)
    printed = capsys.readouterr().out
    assert "first ratio: off 1 by" in printed and "val reward" in printed and "Next: python eval.py" in printed


def test_reward_rises(run):
    """The proof of the whole loop: against a random judge the policy finds what it likes."""
    final = run("--max_steps", "6", "--rollout_size", "32", "--batch_size", "16", "--learning_rate", "1e-2",
                "--kl_limit", "100", "--target_kl", "0", "--eval_interval", "2", "--value_head", "reward")
    assert final["val_reward"] > final["before"] + 1.0 and final["best_step"] > 0


def test_a_retrained_parent_cannot_be_resumed_against(run, reward_folder, tmp_path, monkeypatch):
    run()
    monkeypatch.setattr(checkpoint, "read_minillm", lambda folder, real=checkpoint.read_minillm: real(folder) | (
        {"key": "another"} if str(folder) == str(reward_folder) else {}))
    with pytest.raises(ValueError, match="have changed"):
        run("--from_resume", "1", "--max_steps", "3")


def test_run_stops_by_name_and_keeps_the_policy_within_the_limit(run, model_folder, capsys):
    final = run("--max_steps", "9", "--kl_limit", "1e-9", "--learning_rate", "1e-2", "--target_kl", "0")
    assert "--kl_limit" in final["stopped"] and final["steps"] < 9 and final["best_step"] == 0
    assert "stopped at step" in capsys.readouterr().out
    saved, start = (Transformer.from_pretrained(f).state_dict() for f in (run.out / "ppo", model_folder("dense")))
    assert all(torch.equal(saved[name], value) for name, value in start.items())


def test_experts_train(run, model_folder):
    final = run("--max_steps", "1", "--from_weight", str(model_folder("shared")))
    assert final["steps"] == 1


def test_unusable_reward_models_are_refused(run, reward_folder, tmp_path):
    folder = tmp_path / "weak"
    facts = checkpoint.read_minillm(reward_folder)
    ScalarHead.from_pretrained(reward_folder).save_pretrained(folder)
    for change, words in (({"metrics": {"accuracy": 0.54}}, "0.54"), ({"metrics": {}}, "None"),
                          ({"tokenizer": "x"}, "tokenizer")):
        checkpoint.write_minillm(folder, {k: v for k, v in (facts | change).items() if k != "files"})
        with pytest.raises(ValueError, match=words):
            run("--reward_weight", str(folder))
    checkpoint.write_minillm(folder, {"metrics": {}})
    assert run("--reward_weight", str(folder), "--force", "1", "--max_steps", "1")["steps"] == 1


def test_flags_that_do_not_fit_are_named(run):
    for flags, words in ((("--rollout_size", "6"), "--rollout_size 6"),
                         (("--max_seq_len", "300"), "max_position_embeddings"),
                         (("--max_new_tokens", "96"), "--max_new_tokens 96")):
        with pytest.raises(ValueError, match=words):
            run(*flags)
    with pytest.raises(FileNotFoundError, match="not found"):
        run("--reward_weight", "nowhere")


def test_a_rule_takes_the_place_of_the_reward_model(run, monkeypatch):
    """The judge's verdict decides: a rule that likes even first ids, told to the script as if it read the text."""
    monkeypatch.setattr(train_ppo.metrics, "rule_score", lambda text, answer, check, styles: 2.0 * ("e" in text))
    seen, real = [], train_ppo.by_rule
    monkeypatch.setattr(train_ppo, "by_rule", lambda answers, *rest: seen.append((answers, real(answers, *rest)))
                        or seen[-1][1])
    final = run("--rule", "1")
    for answers, scores in seen:
        assert scores.tolist() == [2.0 * ("e" in answer.text) - 1 for answer in answers]
    assert final["metric"] == "held-out reward (rule)"
    assert final["at_start"]["val_reward"] == pytest.approx(seen[0][1].mean().item(), abs=1e-6)
    facts = checkpoint.read_minillm(run.out / "ppo")
    assert len(facts["parents"]) == 1, "no reward model was read"
    steps = [row for row in log_rows(run) if "policy_loss" in row]
    assert [row["reward"] for row in steps] == pytest.approx([scores.mean().item() for _, scores in seen[1:-1]])
    assert any(row["reward"] > -1 for row in steps), "the rule was fulfilled"


def test_rule_without_styles_or_with_the_head_of_a_reward_model_is_refused(run, tmp_path, capsys):
    (tmp_path / "styles.json").unlink()
    with pytest.raises(ValueError, match="--rule 1, but there is no .*styles.json; .*; put one beside"):
        run("--rule", "1")
    with pytest.raises(SystemExit):
        run("--rule", "1", "--value_head", "reward")
    assert "there is no reward model whose head" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--adaptive_kl", "3", "--kl_coef", "0"], ["--rule", "1", "--reward_weight", "x"]])
def test_flags_of_which_one_would_be_ignored_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        train_ppo.parse_args(words)
    text = capsys.readouterr().err
    assert all(word in text for word in words if word.startswith("--")) and text.count("; ") == 2


def test_a_judge_with_fewer_ids_than_the_policy_is_refused(run, reward_folder, tmp_path):
    """Its tokenizer is not known, and --force was meant for its accuracy."""
    config = ScalarHead.from_pretrained(reward_folder).config
    ScalarHead(dataclasses.replace(config, vocab_size=319)).save_pretrained(tmp_path / "narrow")
    checkpoint.write_minillm(tmp_path / "narrow", {})
    with pytest.raises(ValueError, match="token id 319 >= vocabulary 319 of .*narrow; .*; train it"):
        run("--reward_weight", str(tmp_path / "narrow"), "--force", "1")


def test_padding_has_no_part_in_the_kl(recorded):
    """exp() of what stands there may overflow, and inf * 0 would be NaN, which is above no limit."""
    args, runtime, team, rollout, *_ = recorded()
    rollout["old_logp"] -= 1e3 * (1 - rollout["mask"])
    result = train_ppo.backward_minibatch(team.both, rollout, list(range(8)), args, runtime)
    assert abs(result["approx_kl"]) < 1e-9


def test_a_resume_is_measured_on_the_prompts_of_the_start(run):
    run("--max_steps", "1")
    with pytest.raises(ValueError, match="--eval_prompts 9 is 9 held-out prompts, .* measured on 6; .*; give the old"):
        run("--max_steps", "2", "--eval_prompts", "9", "--from_resume", "1")
    run("--max_steps", "2", "--from_resume", "1")
