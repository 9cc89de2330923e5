"""Proximal policy optimisation: sample answers, let the reward model judge them, make the better ones more likely.

One step of this script is one iteration: --rollout_size answers are sampled from the current policy (temperature 1, no
top-k or top-p: what is sampled must be what is trained), judged, and used for --ppo_epochs passes of minibatches.
For token t of an answer, with pi the policy, ref the frozen model the run started from, V the value model:
    r_t  = -kl_coef * (log pi(x_t) - log ref(x_t))  +  [t is the last token] * (score - penalty if it did not end)
    A_t  = sum_k (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k})      advantage (GAE), 0 after the end; whitened
    loss = mean_t [ max(-A_t q_t, -A_t clip(q_t, 1 - c, 1 + c)) + (V_t - R_t)^2 / 2 ]        q_t = pi(x_t) / pi_old(x_t)
The mean is over all answer tokens of an optimizer step (all micro-batches, all ranks); R = A + V before whitening.

What to watch: the reward model is not the goal. Exact match and the share of polite answers, which the policy is not
paid for, stand beside the reward; KL says how far the policy has gone. The best policy by held-out reward within
--kl_limit is what out/ppo holds. No balance loss: the router of a mixture of experts stays as the start left it.

Papers: Schulman et al. 2017 (PPO, arXiv:1707.06347), Schulman et al. 2015 (GAE, arXiv:1506.02438), Ziegler et al. 2019
(KL control, arXiv:1909.08593), Huang et al. 2024 (the details that matter, arXiv:2403.17031).

    python train_ppo.py --from_weight sft --reward_weight reward                              # a laptop
    python train_ppo.py --data_path my/prompts.jsonl --rollout_size 512 --max_new_tokens 256  # own data, one GPU
    torchrun --nproc_per_node 4 train_ppo.py --batch_size 16 --accumulation_steps 1           # four GPUs or processes

Letters: N answers of a rollout, B answers of a micro-batch, T tokens (T-1 targets: entry t belongs to token t+1),
V vocabulary.
"""
import contextlib
import copy
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import common
import health
import logs
import metrics
import optim
import report
from dataset import PromptData, micro_batches, pad_rows, shuffled
from logprobs import token_logprobs
from model import ScalarHead, Transformer
from rows import expand_paths, read_rows
from tokenizer import Tokenizer

EVAL_ROWS = 2**31  # held-out answers draw from their own random streams, the same ones at every evaluation


def parse_args(argv=None):
    """Flags of this stage. Where a shared flag counts optimizer steps, a step is one iteration here."""
    parser = cli.Parser(__doc__)
    cli.data_flags(parser, "out/data/preference.train.jsonl", max_seq_len=256, val_ratio=0.05)
    whole, above_0, from_0 = cli.positive(int), cli.positive(float), cli.positive(float, zero=True)
    g = parser.add_argument_group("models")
    g.add_argument("--from_weight", default="sft",
                   help="policy to start from, also the reference: name below --save_dir, or folder")
    g.add_argument("--reward_weight", default="reward", help="reward model, starts the value model too: name or folder")
    g.add_argument("--value_head", default="zero", choices=("zero", "reward"), help="start of the value model's head")
    cli.switch(g, "--rule", 0, "no reward model: a rule pays for right answers in the preferred style "
               "(metrics.rule_score, with styles.json beside the data); the value model starts from the policy")
    cli.switch(g, "--force", 0, "use a reward model whose held-out accuracy is near chance or unknown")
    g = parser.add_argument_group("rollout")
    g.add_argument("--rollout_size", type=whole, default=128, help="answers per iteration, all processes together")
    g.add_argument("--max_new_tokens", type=whole, default=40, help="longest answer; prompts get the rest of a row")
    g.add_argument("--missing_eos_penalty", type=from_0, default=1.0, help="taken off the score of an unended answer")
    g = parser.add_argument_group("PPO")
    g.add_argument("--ppo_epochs", type=whole, default=2, help="passes over each rollout")
    g.add_argument("--clip_epsilon", type=above_0, default=0.2, help="a ratio brings no gain beyond 1 -+ this")
    g.add_argument("--value_clip", type=above_0, default=0.2, help="how far a value may move per rollout")
    g.add_argument("--value_learning_rate", type=above_0,
                   help=f"peak rate of the value model ({cli.rates(3e-4)})")
    parser.by_optimizer["value_learning_rate"] = lambda name: 3e-4 * cli.OPTIMIZERS[name]
    g.add_argument("--gamma", type=from_0, default=1.0, help="discount per token")
    g.add_argument("--lam", type=from_0, default=0.95, help="GAE: 0 = one-step estimate, 1 = whole return")
    g.add_argument("--kl_coef", type=from_0, default=0.05, help="price of a nat of KL to the reference, in the reward")
    g.add_argument("--adaptive_kl", type=from_0, default=0.0,
                   help="steer --kl_coef towards this KL in nats per answer, 0 = keep it fixed")
    g.add_argument("--target_kl", type=from_0, default=0.05,
                   help="leave a rollout when the policy has moved so far from it, nats per token, 0 = never")
    g.add_argument("--kl_limit", type=above_0, default=10.0,
                   help="end the run above this KL to the reference, nats per answer")
    g.add_argument("--entropy_floor", type=from_0, default=0.1,
                   help="end the run when entropy falls below this share of the first rollout's")
    cli.optim_flags(parser, batch_size=32, learning_rate=1e-4, muon_learning_rate=4e-4, max_steps=10, warmup_steps=0,
                    schedule="constant", accumulation_steps=2, optimizer="adamw",
                    unserved=("sophia", "schedulefree"))
    cli.run_flags(parser, save_weight="ppo", eval_interval=5, save_interval=5, log_interval=1,
                  watched=("val_reward", "exact_match", "sampled_exact_match", "polite", "stop_rate",
                           "regression_pass_rate"))
    cli.regression_flags(parser)
    parser.add_argument("--eval_prompts", type=whole, default=128, help="held-out prompts per evaluation")
    args = parser.parse_args(argv)
    if args.rule and args.value_head == "reward":
        parser.error("--value_head reward with --rule 1; there is no reward model whose head could be taken; give "
                     "--value_head zero")
    if args.rule and args.reward_weight != parser.get_default("reward_weight"):
        parser.error(f"--reward_weight {args.reward_weight} with --rule 1; there is one judge, the rule or the reward "
                     "model; leave one of them out")
    if args.adaptive_kl and not args.kl_coef:
        parser.error(f"--adaptive_kl {args.adaptive_kl:g} with --kl_coef 0; the price is steered by factors, and 0 "
                     "stays 0; give a --kl_coef to start from, such as 0.05")
    return args


# -- The mathematics: pure functions, [B, T] tensors over target tokens, mask 1 on answer tokens -----------------------
def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation, from the last answer token backwards (Schulman et al. 2015, eq. 16).

    Args:
        rewards, values, mask: [B, T]; values[:, t] is V before token t is chosen; mask 1 on the answer, in one piece.
        gamma: discount per token; lam: 0 trusts V, 1 trusts the rewards seen.
    Returns: (advantages [B, T], returns [B, T]), both 0 outside the mask. V after the last token is 0.
    """
    mask = mask.to(values.dtype)
    advantages = torch.zeros_like(values)
    running = next_value = torch.zeros_like(values[:, 0])                                   # [B]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # times mask: neither what padding is worth nor its advantage flows back into the answer
        running = (delta + gamma * lam * running) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def masked_whiten(x, mask):
    """Shift and scale the masked entries of x [B, T] to mean 0 and unbiased variance 1; 0 elsewhere.

    Give it the whole rollout: whitening a micro-batch would turn the better half of a bad batch into good examples.
    """
    mask = mask.to(x.dtype)
    count = mask.sum()
    mean = (x * mask).sum() / count.clamp(min=1)
    variance = ((x - mean) ** 2 * mask).sum() / (count - 1).clamp(min=1)
    return (x - mean) * mask / (variance + 1e-8).sqrt()


def kl_terms(logp, ref_logp):
    """Three estimates of KL(pi || ref) from samples of pi, per token (Schulman 2020, "Approximating KL divergence").

    k1 = l is unbiased and may be negative: right inside a reward. k2 = l^2 / 2 is biased, but its gradient is that of
    the KL. k3 = e^-l - 1 + l is unbiased and never negative: right for a log. l = log pi - log ref.
    """
    difference = logp - ref_logp
    return difference, difference ** 2 / 2, torch.expm1(-difference) + difference


def policy_loss(logp, old_logp, adv, mask, clip, denom=None):
    """Clipped surrogate loss of PPO (Schulman et al. 2017, eq. 7), mean over answer tokens.

    Args:
        logp, old_logp, adv, mask: [B, T]; logp carries the gradient.
        clip: no further gain from a ratio beyond 1 -+ clip.
        denom: answer tokens of the whole optimizer step, so that micro-batches and ranks add up; None = those given.
    Returns: (loss, clipfrac): clipfrac is the share of tokens whose gradient the clip has cut off.
    """
    mask = mask.to(logp.dtype)
    denom = mask.sum().clamp(min=1) if denom is None else denom
    # outside the mask log-probs are of padding: anything, and exp() of it could overflow to inf * 0 = NaN
    ratio = ((logp - old_logp) * mask).exp()
    free = -adv * ratio
    clipped = -adv * ratio.clamp(1 - clip, 1 + clip)
    # the larger loss: clipping takes away the gain of going too far, never the pull back
    loss = (torch.maximum(free, clipped) * mask).sum() / denom
    return loss, ((clipped > free) * mask).sum().detach() / denom


def value_loss(v, old_v, returns, mask, clip, denom=None):
    """Half the squared error of the values, or of the values held within old_v -+ clip, whichever is larger.

    Args:
        v, old_v, returns, mask: [B, T]; v carries the gradient. clip, denom: as in policy_loss, in units of the reward.
    """
    mask = mask.to(v.dtype)
    denom = mask.sum().clamp(min=1) if denom is None else denom
    held = old_v + (v - old_v).clamp(-clip, clip)
    return 0.5 * (torch.maximum((v - returns) ** 2, (held - returns) ** 2) * mask).sum() / denom


def token_rewards(scores, ended, k1, mask, kl_coef, missing_eos_penalty):
    """Spread the reward over the answer: a price for KL at every token, the score at the last one.

    Args:
        scores [B], normalised; ended [B], 1 where the answer closed itself; k1, mask: [B, T].
    Returns: rewards [B, T], 0 outside the mask.
    """
    mask = mask.to(k1.dtype)
    last = mask.cumsum(1).argmax(1, keepdim=True)                       # [B, 1]; argmax takes the first of the maxima
    final = scores - missing_eos_penalty * (1 - ended.to(scores.dtype))
    return (-kl_coef * k1 * mask).scatter_add(1, last, final.to(k1.dtype)[:, None])


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the mask: 1 = perfect values, 0 = no better than a constant."""
    error, target = (returns - values)[mask.bool()], returns[mask.bool()]
    return (1 - error.var() / target.var().clamp(min=1e-8)).item()


# -- The models --------------------------------------------------------------------------------------------------------
class PolicyAndValue(nn.Module):
    """Both trained networks in one module, so that one forward through DDP arms the gradient exchange of both."""

    def __init__(self, policy, value):
        super().__init__()
        self.policy = policy
        self.value = value

    def forward(self, ids, first=0):
        """ids [B, T] -> (logits [B, T-first, V], values [B, T-first]) from position `first` on.

        Attention is causal and padding stands on the right, so padding needs no mask.
        """
        return self.policy(ids, logits_to_keep=ids.shape[1] - first), self.value.values(ids)[:, first:]


@dataclass
class Team:
    """The four networks of PPO and the tokenizer they share. Only `both` is trained. With --rule 1 reward is None."""
    both: PolicyAndValue
    reference: Transformer
    reward: ScalarHead | None
    tokenizer: Tokenizer

    def scores(self, ids, lengths):
        """Normalised scores of ids [B, T] by the reward model: [B]; 0 where there is none."""
        if self.reward is None:
            return torch.zeros(len(ids))
        return (self.reward(ids, lengths) - self.reward.score_mean) / self.reward.score_std


def check_judge(reward_folder, tokenizer, force):
    """ValueError for a reward model that cannot be used. Returns the facts of its minillm.json."""
    facts = checkpoint.read_minillm(reward_folder)
    accuracy = facts.get("metrics", {}).get("accuracy")
    if not force and (accuracy is None or accuracy < 0.55):
        raise ValueError(f"reward model {reward_folder} has held-out pair accuracy {accuracy}; PPO needs 0.55, or the "
                         "policy learns to please a coin; train it longer (train_reward.py), or give --force 1")
    if facts.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ValueError(f"reward model {reward_folder} has another tokenizer than the policy; it reads the policy's "
                         "token ids; train it from the same checkpoint")
    return facts


def load_team(args, tokenizer, parent, reward_folder, runtime):
    """Load policy, value model, reference and reward model (reward_folder None: a rule judges). ValueError where they
    cannot be used."""
    facts = check_judge(reward_folder, tokenizer, args.force) if reward_folder else {}
    precision = torch.float64 if runtime.dtype == torch.float64 else torch.float32
    policy, reference = (Transformer.from_pretrained(parent, runtime.device, precision) for _ in range(2))
    value = ScalarHead.from_pretrained(reward_folder or parent, runtime.device, precision)
    reward = ScalarHead.from_pretrained(reward_folder, runtime.device, precision) if reward_folder else None
    if value.config.vocab_size <= tokenizer.max_id:
        raise ValueError(f"token id {tokenizer.max_id} >= vocabulary {value.config.vocab_size} of "
                         f"{reward_folder or parent}; it reads the policy's token ids; train it from the same "
                         "checkpoint")
    room = min(policy.config.max_position_embeddings, value.config.max_position_embeddings)
    if args.max_seq_len > room:
        raise ValueError(f"--max_seq_len {args.max_seq_len} is above the models' max_position_embeddings {room}; "
                         "prompt and answer must fit the context; shorten it")
    if reward:
        reward.score_mean, reward.score_std = facts.get("score_mean", 0.0), facts.get("score_std") or 1.0
        reward.eval().requires_grad_(False)
    if args.value_head == "zero":
        nn.init.zeros_(value.score.weight)  # values start at 0, the mean of normalised rewards
    # eval() for good, in rollouts and updates alike: with dropout the first ratio would not be 1
    both = PolicyAndValue(policy, value).eval()
    return Team(both, reference.eval().requires_grad_(False), reward, tokenizer)


# -- Rollout -----------------------------------------------------------------------------------------------------------
def respond(policy, tokenizer, prompts, rows, temperature, args, runtime):
    """One answer to each prompt (lists of ids); the ranks share the work and all get all of it.

    rows: number of each prompt's random stream, so that no answer depends on its rank or batch.
    Returns: list of metrics.Completion; ids with the end token where it came, text without.
    """
    mine = runtime.shard(list(range(len(prompts))))
    with runtime.autocast():
        # every filter off: log-probs and KL below are those of the whole distribution
        answers = metrics.complete(policy, tokenizer, [prompts[i] for i in mine], args.max_new_tokens, batch_size=128,
                                   temperature=temperature, top_k=0, top_p=1.0, seed=args.seed,
                                   row_seeds=[rows[i] for i in mine], stop_ids={tokenizer.eos_id})
    return runtime.unshard(answers)


def minibatches(count, number, args, runtime):
    """Pass `number` (counted over the whole run) through `count` answers, in an order fixed by seed and number.

    Returns: one list of rows for each optimizer step, the same on all ranks.
    """
    per_step = args.batch_size * args.accumulation_steps * runtime.world_size
    order = shuffled(count, args.seed, number).tolist()
    return [order[at:at + per_step] for at in range(0, count, per_step)]


def by_rule(answers, items, styles):
    """Scores [N] of --rule 1, in place of a reward model's: a right and polite answer 1, one that is only right or only
    polite 0."""
    return torch.tensor([metrics.rule_score(answer.text, item["answer"], item["check"], styles) - 1
                         for answer, item in zip(answers, items, strict=True)], dtype=torch.float64)


@torch.no_grad()
def judge(team, items, answers, styles, parts, args, runtime):
    """Everything the four networks say about N answers; the ranks share the work and all get all of it (it is small).

    items: of PromptData, one an answer; styles: the rule's markers, used where the team has no reward model.
    parts: lists of rows, N in all. With the first pass's minibatches each answer is computed here in the same company
        as in its first update: equal shapes round equally, and the first ratio is 1 to the last bit even in bf16.
    Returns: dict of CPU tensors: ids [N, T], lengths and starts (of the answers) [N], mask [N, T-1] (1 on answer
        tokens, end token included), old_logp, ref_logp, values, entropy [N, T-1], scores [N] (normalised), ended [N].
    """
    whole = [item["ids"] + answer.ids for item, answer in zip(items, answers, strict=True)]
    ids, lengths = pad_rows(whole, team.tokenizer.pad_id)                               # [N, T], [N]
    starts = torch.tensor([len(item["ids"]) for item in items])                         # [N]
    targets = torch.arange(1, ids.shape[1])                                             # [T-1]
    mask = (targets >= starts[:, None]) & (targets < lengths[:, None])                  # [N, T-1]
    rollout = {"ids": ids, "lengths": lengths, "starts": starts}
    found = {}  # row -> its numbers
    batches = (micro_batches(rollout, runtime.shard(rows), args.batch_size) for rows in parts)
    for chunk, columns in itertools.chain.from_iterable(batches):
        batch = ids[chunk, :columns.stop + 1].to(runtime.device)                        # [B, T]
        first = columns.start
        with runtime.autocast():
            # the forward that will train, not the cached one that sampled: old and new must differ by the update only
            logits, values = team.both(batch, first)                                    # [B, T, V], [B, T]
            ref_logits = team.reference(batch, logits_to_keep=batch.shape[1] - first)
            score = team.scores(batch, lengths[chunk].to(runtime.device))               # [B]
        logp, ref_logp = token_logprobs(logits, batch[:, first:]), token_logprobs(ref_logits, batch[:, first:])
        every = logits[:, :-1].to(logp.dtype).log_softmax(-1)                           # [B, T-1, V]
        entropy = -(every.exp() * every).sum(-1)
        wide = torch.zeros(len(chunk), 4, len(targets), dtype=logp.dtype)
        wide[:, :, columns] = torch.stack([logp, ref_logp, values[:, :-1], entropy], 1).cpu()
        # numpy: a row of a tensor would be pickled with all the others
        found |= dict(zip(chunk, zip(wide.numpy(), score.tolist(), strict=True), strict=True))
    found = {row: numbers for share in runtime.gather(found) for row, numbers in share.items()}
    tokens, scores = zip(*(found[row] for row in range(len(ids))), strict=True)
    tokens = torch.from_numpy(np.stack(tokens))                                         # [N, 4, T-1]
    names = ("old_logp", "ref_logp", "values", "entropy")
    scores = torch.tensor(scores, dtype=tokens.dtype) if team.reward else by_rule(answers, items, styles)
    return rollout | dict(zip(names, tokens.unbind(1), strict=True)) | {
        "mask": mask.to(tokens.dtype), "scores": scores.to(tokens.dtype),
        "ended": torch.tensor([answer.stopped for answer in answers])}


def add_advantages(rollout, kl_coef, args):
    """Turn scores into rewards, advantages and returns [N, T-1], put into the rollout. Returns a dict for the log."""
    mask = rollout["mask"]
    k1, _, _ = kl_terms(rollout["old_logp"], rollout["ref_logp"])
    rewards = token_rewards(rollout["scores"], rollout["ended"], k1, mask, kl_coef, args.missing_eos_penalty)
    advantages, returns = gae(rewards, rollout["values"], mask, args.gamma, args.lam)
    rollout["advantages"] = masked_whiten(advantages, mask)  # of the whole rollout, all ranks; returns stay as they are
    rollout["returns"] = returns
    return summarize(rollout) | {"entropy": ((rollout["entropy"] * mask).sum() / mask.sum()).item(),
                                 "explained_variance": explained_variance(rollout["values"], returns, mask)}


def summarize(rollout):
    """Means over the answers: reward (normalised score), kl (nats per answer), length (tokens), stop_rate."""
    mask = rollout["mask"]
    k1, _, _ = kl_terms(rollout["old_logp"], rollout["ref_logp"])
    return {"reward": rollout["scores"].mean().item(), "kl": (k1 * mask).sum(1).mean().item(),
            "length": mask.sum(1).mean().item(), "stop_rate": rollout["ended"].double().mean().item()}


# -- Update ------------------------------------------------------------------------------------------------------------
def backward_minibatch(wrapped, rollout, rows, args, runtime):
    """Gradient of one optimizer step over the answers `rows` (of all ranks; each takes its share, in micro-batches).

    Returns: dict of policy_loss, value_loss, clipfrac, approx_kl (k3, nats per token) of the whole step, and of
        `deviation`, the largest |ratio - 1|; the same on all ranks.
    """
    denom = rollout["mask"][rows].sum().item()  # every rank holds the whole rollout, so no exchange is needed
    batches = list(micro_batches(rollout, runtime.shard(rows), args.batch_size))
    sums, deviation = torch.zeros(4, dtype=rollout["old_logp"].dtype), 0.0
    for number, (chunk, columns) in enumerate(batches):
        ids = rollout["ids"][chunk, :columns.stop + 1].to(runtime.device)               # [B, T]
        old_logp, old_values, advantages, returns, mask = (                             # [B, T-1] each
            rollout[name][chunk, columns].to(runtime.device)
            for name in ("old_logp", "values", "advantages", "returns", "mask"))
        # gradients travel between ranks only with the last micro-batch
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last or runtime.world_size == 1 else wrapped.no_sync():
            with runtime.autocast():
                logits, values = wrapped(ids, columns.start)                            # [B, T, V], [B, T]
            logp = token_logprobs(logits, ids[:, columns.start:])                       # [B, T-1]
            pg_loss, clipfrac = policy_loss(logp, old_logp, advantages, mask, args.clip_epsilon, denom)
            v_loss = value_loss(values[:, :-1], old_values, returns, mask, args.value_clip, denom)
            # no weight between the two: they share no parameter, and each optimizer clips its own gradient.
            # DDP averages over ranks; the factor makes it the sum
            runtime.scaler.scale((pg_loss + v_loss) * runtime.world_size).backward()
        with torch.no_grad():
            # masked first: on padding exp() could overflow to inf * 0 = NaN, and NaN is above no --target_kl
            _, _, k3 = kl_terms(old_logp * mask, logp * mask)
            sums += torch.stack([pg_loss, v_loss, clipfrac, k3.sum() / denom]).cpu()
            deviation = max(deviation, (((logp - old_logp) * mask).exp() - 1).abs().max().item())
    names = ("policy_loss", "value_loss", "clipfrac", "approx_kl")
    return dict(zip(names, runtime.sum(*sums), strict=True), deviation=max(runtime.gather(deviation)))


def update(wrapped, optimizers, rollout, step, args, runtime, nonfinite):
    """Train on one recorded rollout: --ppo_epochs passes of minibatches, in an order fixed by seed and step.

    Args:
        wrapped: PolicyAndValue, in DDP when there are several ranks; optimizers: (of the policy, of the value model).
        rollout: dict from judge() and add_advantages(), the same on all ranks.
    Returns: dict for the log: means over the minibatches, grad_norm, updates (optimizer steps made), first_ratio.
    """
    module = getattr(wrapped, "module", wrapped)
    history, norms, first_ratio = [], [], None
    passes = range(step * args.ppo_epochs, (step + 1) * args.ppo_epochs)
    for rows in (rows for number in passes for rows in minibatches(len(rollout["ids"]), number, args, runtime)):
        result = backward_minibatch(wrapped, rollout, rows, args, runtime)
        if first_ratio is None:
            first_ratio = result["deviation"]
            common.check_ratio("first ratio", first_ratio, step, runtime)
        history.append(result)
        if args.target_kl and result["approx_kl"] > args.target_kl:
            # skip the step itself: with a loss of 0 the optimizer's momentum would still move the weights. The number
            # was summed over ranks, so all of them leave together
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            break
        norms.append(apply_gradients(module, optimizers, result, step, args, runtime, nonfinite))
    means = {name: sum(h[name] for h in history) / len(history) for name in history[0] if name != "deviation"}
    return means | {"grad_norm": sum(norms) / max(len(norms), 1), "updates": len(norms), "first_ratio": first_ratio}


def apply_gradients(module, optimizers, result, step, args, runtime, nonfinite):
    """Clip each network's gradient by its own norm and step both optimizers; skips what is not finite. Returns the norm
    of the policy's gradient."""
    norms = []
    for network, optimizer in zip((module.policy, module.value), optimizers, strict=True):
        runtime.scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), args.grad_clip or math.inf).item())
    loss, rate = result["policy_loss"] + result["value_loss"], optimizers[0].param_groups[0]["lr"]
    skip = nonfinite.skip(step, loss, sum(norms), rate)
    for optimizer in optimizers:
        if not skip:
            runtime.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    runtime.scaler.update()
    return norms[0]


# -- Evaluation --------------------------------------------------------------------------------------------------------
def evaluate(team, items, styles, args, runtime):
    """Answer held-out prompts, sampled (always from the same random streams) and greedy.

    Returns: dict of val_reward, val_kl, val_length, stop_rate and polite (share, where styles are known) of the sampled
        answers, sampled_exact_match and exact_match (greedy; where prompts have a check); the same on all ranks.
    """
    prompts, rows = [item["ids"] for item in items], [EVAL_ROWS + i for i in range(len(items))]
    sampled = respond(team.both.policy, team.tokenizer, prompts, rows, 1.0, args, runtime)
    greedy = respond(team.both.policy, team.tokenizer, prompts, rows, 0.0, args, runtime)
    numbers = summarize(judge(team, items, sampled, styles, [list(range(len(items)))], args, runtime))
    result = {"val_reward": numbers["reward"], "val_kl": numbers["kl"], "val_length": numbers["length"],
              "stop_rate": numbers["stop_rate"]}
    for name, answers in (("sampled_exact_match", sampled), ("exact_match", greedy)):
        found = metrics.exact_match(answers, items)
        result |= {name: found["total"]} if found["n"] else {}
    if styles:
        result["polite"] = metrics.share([metrics.style(answer.text, styles) == "polite" for answer in sampled])
    return result


def unhealthy(stats, first_entropy, args):
    """Why training must end now, or ''. These are the usual ways in which a policy learns to please only the judge."""
    if stats["kl"] > args.kl_limit:
        return (f"KL {stats['kl']:.1f} nats per answer is above --kl_limit {args.kl_limit:g}: the policy left the "
                "region the reward model knows. A larger --kl_coef or a lower --learning_rate keeps it nearer")
    if stats["entropy"] < args.entropy_floor * first_entropy:
        return (f"entropy {stats['entropy']:.4f} is below --entropy_floor {args.entropy_floor:g} of the first "
                f"{first_entropy:.4f}: the policy says one thing only. A lower --learning_rate or a larger --kl_coef "
                "helps")
    return ""


def adapted(kl_coef, kl, target):
    """The next price of KL: up when KL is above target, down below it, by at most a fifth (Ziegler et al. 2019; they
    allow a tenth of that, over a thousand times more iterations)."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2))


def main(args):
    """Train and return the final metrics. The numbered banners are the same in every training script."""
    # -- 1. Inputs, processes, device, seed ----------------------------------------------------------------------------
    parent = checkpoint.find(args.save_dir, args.from_weight)
    reward_folder = None if args.rule else checkpoint.find(args.save_dir, args.reward_weight)
    parents = [parent] if args.rule else [parent, reward_folder]
    files = expand_paths(args.data_path) + expand_paths(args.val_path)
    key = checkpoint.stage_key(args, files, parents, checkpoint.EVAL_FLAGS)
    runtime = common.setup(args, checkpoint.earlier_choice(args, key))
    folder = Path(args.save_dir) / "logs" / args.save_weight
    per_step = args.batch_size * args.accumulation_steps * runtime.world_size
    if args.rollout_size % per_step:
        raise ValueError(f"--rollout_size {args.rollout_size} is not a multiple of {per_step}, the answers of an "
                         f"optimizer step (--batch_size {args.batch_size} x --accumulation_steps "
                         f"{args.accumulation_steps} x {runtime.world_size} processes); each pass uses each answer "
                         "once; change one of them")

    # -- 2. Data -------------------------------------------------------------------------------------------------------
    tokenizer = Tokenizer.from_pretrained(parent)
    start = checkpoint.begin(runtime, args, key)
    if start == "skip":
        return checkpoint.read_minillm(Path(args.save_dir) / args.save_weight)["metrics"]
    if args.max_new_tokens >= args.max_seq_len:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_seq_len "
                         f"{args.max_seq_len}; both must fit; lower the first or raise the second")
    shared = dict(tokenizer=tokenizer, max_seq_len=args.max_seq_len - args.max_new_tokens, cache_dir=args.cache_dir,
                  seed=args.seed, skip_bad=args.skip_bad, is_main=runtime.is_main, barrier=runtime.barrier)
    ratio = 0.0 if args.val_path else args.val_ratio
    data = PromptData(args.data_path, part="train" if ratio else "all", val_ratio=ratio, **shared)
    held_out = PromptData(args.val_path or args.data_path, part="val" if ratio else "all", val_ratio=ratio, **shared)
    items = metrics.pick(held_out.items, args.eval_prompts)
    rule = files[0].with_name("styles.json")  # written by make_data.py; own data has none, and no polite rate
    styles = metrics.read_styles(rule) if rule.is_file() else None
    if args.rule and not styles:
        raise ValueError(f"--rule 1, but there is no {rule}; it holds the markers of the preferred style; put one "
                         "beside the data (make_data.py writes it), or train a reward model")
    suite = metrics.fixed_prompts(read_rows(args.regression_path)) if args.regression_interval else []
    runtime.print(data.summary())

    # -- 3. Model, value model, reference, reward model ----------------------------------------------------------------
    team = load_team(args, tokenizer, parent, reward_folder, runtime)
    policy, value = team.both.policy, team.both.value
    best = copy.deepcopy(policy).cpu().requires_grad_(False)
    runtime.print(f"policy from {parent}: {policy.num_parameters() / 1e6:.2f}M parameters; "
                  f"{'a rule judges; ' if args.rule else 'reward and '}value model from {parents[-1]}: "
                  f"{sum(p.numel() for p in value.parameters()) / 1e6:.2f}M")

    # -- 4. Optimizer --------------------------------------------------------------------------------------------------
    # eps 1e-5: the usual 1e-8 lets tokens with hardly any gradient take full steps (Huang et al. 2024)
    optimizers = [optim.build(network, args.optimizer, rate, args.muon_learning_rate, args.weight_decay, eps=1e-5)
                  for network, rate in ((policy, args.learning_rate), (value, args.value_learning_rate))]
    max_steps = common.count_steps(args, len(data), args.rollout_size)
    budget = common.Budget(args.max_minutes, probe_steps=2)
    nonfinite = common.NonFinite(runtime)
    stop = common.StopSignal()
    eta = common.Eta(runtime)
    runtime.print(common.memory_line(
        runtime, [network for network in (team.both, team.reference, team.reward) if network], args.batch_size,
        args.max_seq_len,
        lambda ids: (token_logprobs(policy(ids), ids), value.values(ids))))

    # -- 5. Resume -----------------------------------------------------------------------------------------------------
    # `position` is the number of prompts drawn so far: it decides the next prompts and their random streams
    progress = {"step": 0, "position": 0, "tokens": 0, "max_steps": max_steps, "stopped": "", "kl_coef": args.kl_coef,
                "held_out": len(items)}
    if start == "resume":
        state = checkpoint.load_resume(runtime, args)
        team.both.load_state_dict(state["model"])
        best.load_state_dict(state["best"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optim.load_state(optimizer, saved)
        progress |= state["progress"]
        if len(items) != progress["held_out"]:
            raise ValueError(f"--eval_prompts {args.eval_prompts} is {len(items)} held-out prompts, the start of this "
                             f"run was measured on {progress['held_out']}; other prompts cannot be compared; give the "
                             "old value, or start again with --overwrite 1")
        if not args.max_minutes and not common.out_of_patience(progress, args):
            progress["max_steps"] = max_steps  # --max_steps and --epochs may be changed on resume
        runtime.print(f"resumed at step {progress['step']} of {progress['max_steps']}")
    conditions = checkpoint.conditions(runtime, args, "ppo", policy.config, [data, held_out], parents,
                                       progress["max_steps"])
    log = logs.MetricLog(folder, runtime.is_main, progress["step"] if start == "resume" else None,
                         args.tracker, conditions, args.plot_interval)
    watch = health.Watch(policy, optimizers[0], progress, args, runtime, log)
    log.save_json("args.json", vars(args) | {"dtype": str(runtime.dtype)[6:], "threads": runtime.threads})
    log.save_json("dataset_stats.json", {"train": data.stats, "held_out": held_out.stats})
    if args.show_batch:
        runtime.print(logs.show_samples(data.samples(progress["position"]), tokenizer, targets=False))
    if start != "resume":
        # the policy to beat is the one it starts from: if nothing improves on it, nothing else is kept
        progress["before"] = evaluate(team, items, styles, args, runtime)
        progress["best"] = progress["before"] | {"step": 0}
        checked, _ = metrics.check_regression(policy, tokenizer, suite, args, runtime, 0)
        common.check_patience(args, progress["before"] | checked)
        log.log(0, **progress["before"], **checked)

    def save(finished, final=None):
        """Write out/<save_weight>: the best policy; the last one and the value model go to resume/. All ranks call."""
        state = {"model": team.both.state_dict(), "best": best.state_dict(), "progress": progress,
                 "optimizers": [o.state_dict() for o in optimizers]}
        facts = {"stage": "ppo", "key": key, "parents": [str(p) for p in parents], "seed": args.seed,
                 "tokenizer": tokenizer.fingerprint, "data": [str(f) for f in files], "progress": progress,
                 "metrics": final or {}, "conditions": conditions}
        return checkpoint.save(runtime, args, [best, tokenizer], state, facts, finished)

    # -- 6. DDP (last, so that everything above sees the plain modules; too few steps for torch.compile) ---------------
    wrapped = team.both
    if runtime.world_size > 1:
        device_ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
        wrapped = DistributedDataParallel(team.both, device_ids=device_ids)

    # -- 7. Training loop ----------------------------------------------------------------------------------------------
    bar = log.progress(progress["max_steps"], "ppo", progress["step"])
    while progress["step"] < progress["max_steps"] and not progress["stopped"]:
        step, position = progress["step"], progress["position"]
        scale = common.lr_scale(step, progress["max_steps"], args.warmup_steps, args.schedule)
        lr = [optim.set_lr(optimizer, scale) for optimizer in optimizers][0]

        # rollout
        times = [time.perf_counter()]
        asked = [data.items[int(i)] for i in data.position_batch(position, args.rollout_size)]
        prompts, rows = [item["ids"] for item in asked], range(position, position + args.rollout_size)
        answers = respond(policy, tokenizer, prompts, rows, 1.0, args, runtime)     # what is sampled is what is trained
        # scores, KL, rewards at the tokens, advantages
        times.append(time.perf_counter())
        first_pass = minibatches(args.rollout_size, step * args.ppo_epochs, args, runtime)
        rollout = judge(team, asked, answers, styles, first_pass, args, runtime)
        if step == 0:  # the policy is still the reference
            difference = (rollout["old_logp"] - rollout["ref_logp"]) * rollout["mask"]
            common.check_ratio("ratio to the reference", difference.expm1().abs().max().item(), step, runtime)
        stats = add_advantages(rollout, progress["kl_coef"], args)
        # epochs of minibatches
        times.append(time.perf_counter())
        stats |= update(wrapped, optimizers, rollout, step, args, runtime, nonfinite)
        times.append(time.perf_counter())
        shares = [(after - before) / (times[-1] - times[0]) for before, after in zip(times, times[1:], strict=False)]
        stats |= dict(zip(("time_rollout", "time_scoring", "time_update"), shares, strict=True))
        stats |= {"kl_coef": progress["kl_coef"], "lr": lr}
        found = metrics.exact_match(answers, asked)
        stats |= {"rollout_exact_match": found["total"]} if found["n"] else {}
        if args.adaptive_kl:
            progress["kl_coef"] = adapted(progress["kl_coef"], stats["kl"], args.adaptive_kl)
        progress["step"] += 1
        progress["position"] += args.rollout_size
        progress["tokens"] += int(rollout["lengths"].sum())
        log.count(sum(len(answer.ids) for answer in answers))
        bar.update()

        # -- log, evaluate, save
        step = progress["step"]
        progress["max_steps"] = bar.total = budget.steps(step, progress["max_steps"], runtime)
        eta.report(step, progress["max_steps"])
        progress["stopped"] = unhealthy(stats, progress.setdefault("first_entropy", stats["entropy"]), args)
        done = step >= progress["max_steps"] or bool(progress["stopped"])
        if step == 1:
            runtime.print(f"first ratio: off 1 by {stats['first_ratio']:.1e}")
        if step % args.log_interval == 0 or done or step == 1:
            log.log(step, **stats, tokens_per_s=log.rate(), **watch.numbers(stats["grad_norm"]))
            bar.set_postfix_str(f"reward {stats['reward']:.2f}, KL {stats['kl']:.2f}, length {stats['length']:.0f}")
        if done or (args.eval_interval and step % args.eval_interval == 0):
            result = evaluate(team, items, styles, args, runtime)
            checked, failures = metrics.check_regression(policy, tokenizer, suite, args, runtime, step, done)
            log.log(step, **result, **checked)
            if result["val_kl"] <= args.kl_limit and result["val_reward"] > progress["best"]["val_reward"]:
                best.load_state_dict(policy.state_dict())
                progress["best"] = result | {"step": step}
            if runtime.is_main:
                logs.say(f"step {step}: held-out {log.named(step, result | checked).removeprefix(', ')}")
                for line in failures:
                    logs.say(f"    {line}")
                log.judge()
            common.watch_evaluation(runtime, args, progress, result | checked)
            log.rate()  # the evaluation's seconds are not training seconds
        signal = stop.stop(runtime)
        due = args.save_interval and step % args.save_interval == 0 and not nonfinite.in_a_row
        if signal or (due and not done):
            saved = save(finished=False)
        if signal:
            common.leave(runtime, signal, step, saved)

    # -- 8. Final save and summary -------------------------------------------------------------------------------------
    bar.close()
    if progress["stopped"]:
        runtime.print(f"stopped at step {progress['step']}: {progress['stopped']}")
    before, after = progress["before"], progress["best"]
    final = after | {"metric": f"held-out reward ({'rule' if args.rule else 'normalised'})",
                     "before": before["val_reward"],
                     "after": after["val_reward"], "at_start": before, "best_step": after["step"],
                     "steps": progress["step"], "stopped": progress["stopped"], "skipped_steps": nonfinite.total}
    save(finished=True, final=final)
    log.close()
    report.refresh(args.save_dir, runtime.is_main)
    runtime.print(logs.table(["held-out", "before", f"best (step {after['step']})"],
                             [[k.replace("_", " "), f"{v:.3f}", f"{after[k]:.3f}"] for k, v in before.items()]))
    runtime.print(f"done: {args.save_dir}/{args.save_weight}, the policy of step {after['step']}. Curves: "
                  f"{folder}/curves.png. Next: python eval.py --weight {args.save_weight}{common.in_folder(args)} "
                  "--stream 1")
    runtime.close()
    return final


if __name__ == "__main__":
    common.run(main, parse_args)
