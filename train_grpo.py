"""Group relative policy optimisation: answer each prompt several times and make the better answers more likely.

No reward model and no value model: the reward is a rule (the answer is right and ended by itself: 1, else 0), and the
mean reward of the K answers to the same prompt takes the place of the value. One step samples K = --num_generations
answers at temperature 1 to each of G prompts. For answer i of a group, and its token t,
    A_i  = (R_i - mean(R)) / (std(R) + 1e-4)                                      0 when all K rewards are equal
    loss = mean [ max(-A_i q_t, -A_i clip(q_t, 1 - c, 1 + c)) + beta k3_t ]       q_t = pi(x_t) / pi_old(x_t)
The mean is one of three (--aggregation): grpo, of the answers' own means; dapo, over all tokens of the step; dr_grpo,
the sum divided by a fixed length, so that a long wrong answer is not punished less per token than a short one.

What to watch: `signal`, the share of groups that teach anything. Prompts that always or never succeed give none, so
GRPO sharpens what the model can sometimes do; it does not teach what it never does. With --updates_per_rollout 1, the
default, q is 1 and the clip never acts: this is REINFORCE with a group baseline. beta 0: no reference model is loaded.

Papers: Shao et al. 2024 (GRPO, arXiv:2402.03300), Yu et al. 2025 (DAPO, arXiv:2503.14476), Liu et al. 2025 (Dr. GRPO,
arXiv:2503.20783).

    python train_grpo.py --from_weight sft                                                    # a laptop
    python train_grpo.py --data_path my/prompts.jsonl --batch_size 256 --accumulation_steps 2 # own data, one GPU
    torchrun --nproc_per_node 4 train_grpo.py --from_weight sft --accumulation_steps 2        # four GPUs or processes

Letters: G groups, K answers of a group, N = G K answers of a step, B answers of a micro-batch, T tokens (T-1 targets:
entry t belongs to token t+1), V vocabulary.
"""
import contextlib
import math
import re
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import common
import health
import logs
import metrics
import optim
import report
from dataset import PromptData, micro_batches, pad_rows
from logprobs import token_logprobs
from model import Transformer
from rows import expand_paths, read_rows
from tokenizer import Tokenizer

EVAL_ROWS = 2**31  # held-out answers draw from their own random streams, the same ones at every evaluation


def parse_args(argv=None):
    """Flags of this stage. A step has batch_size x accumulation_steps x processes answers, num_generations a prompt."""
    parser = cli.Parser(__doc__)
    cli.data_flags(parser, "out/data/rl.train.jsonl", max_seq_len=256, val_ratio=0.05)
    whole, above_0, from_0 = cli.positive(int), cli.positive(float), cli.positive(float, zero=True)
    g = parser.add_argument_group("rollout")
    g.add_argument("--from_weight", default="sft", help="policy to start from: name below --save_dir, or folder")
    g.add_argument("--num_generations", type=whole, default=8, help="answers to each prompt")
    g.add_argument("--max_new_tokens", type=whole, default=40, help="longest answer; prompts get the rest of a row")
    g.add_argument("--format_weight", type=from_0, default=0.0, help="extra reward of an answer in the wanted form")
    g.add_argument("--format", default="polite", choices=("polite", "think"),
                   help="that form: polite, by the rule in styles.json beside the data; or <think> reasoning </think> "
                        "before the answer")
    g = parser.add_argument_group("loss")
    cli.switch(g, "--scale_rewards", 1, "divide advantages by the group's standard deviation (0: Dr. GRPO)")
    g.add_argument("--aggregation", default="dapo", choices=("grpo", "dapo", "dr_grpo"), help="what the mean is over")
    g.add_argument("--clip_epsilon", type=above_0, default=0.2, help="a ratio brings no gain beyond 1 -+ this")
    g.add_argument("--beta", type=from_0, default=0.0, help="weight of the KL to the start, 0 = no reference model")
    g.add_argument("--updates_per_rollout", type=whole, default=1,
                   help="optimizer steps on the same answers; from 2 on the clip acts")
    cli.optim_flags(parser, batch_size=48, learning_rate=1e-4, muon_learning_rate=4e-4, max_steps=20, warmup_steps=0,
                    schedule="constant", accumulation_steps=8, optimizer="adamw",
                    unserved=("sophia", "schedulefree"))
    cli.run_flags(parser, save_weight="grpo", eval_interval=10, save_interval=10, log_interval=1,
                  watched=("pass_at_1", "pass_at_k", "exact_match", "stop_rate", "regression_pass_rate"))
    cli.regression_flags(parser)
    parser.add_argument("--eval_prompts", type=whole, default=128, help="held-out prompts per evaluation")
    parser.add_argument("--eval_samples", type=whole, default=4, help="sampled answers to each of them")
    return parser.parse_args(argv)


# -- The mathematics: pure functions -----------------------------------------------------------------------------------
def group_advantages(rewards, scale=True):
    """Rewards relative to the other answers to the same prompt: [G, K] -> [G, K].

    Minus the group's mean; with `scale` divided by its unbiased standard deviation + 1e-4. A group of equal rewards
    gives exactly 0, and so does K = 1.
    """
    centred = rewards - rewards.mean(1, keepdim=True)                                       # [G, K]
    # equal rewards such as 0.1 may leave rounding of the mean behind, which the division would blow up
    centred = centred * (rewards != rewards[:, :1]).any(1, keepdim=True)
    if not scale or rewards.shape[1] == 1:
        return centred
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def grpo_loss(logp, old_logp, ref_logp, adv, mask, clip, beta, aggregation, denom=None):
    """Clipped surrogate loss with a KL term, aggregated by name.

    Args:
        logp, old_logp, ref_logp, mask: [B, T]; logp carries the gradient, ref_logp is None when beta is 0.
        adv: [B], or [B, T]; clip: no further gain from a ratio beyond 1 -+ clip; beta: weight of k3 per token.
        aggregation, denom: "grpo" divides the sum of the answers' means by the number of answers, "dapo" the sum over
            tokens by their number, "dr_grpo" by answers * longest allowed answer. denom is that divisor for the whole
            optimizer step; None = of the rows given (dr_grpo: B * T).
    Returns: scalar loss; 0 when nothing is masked in.
    Raises: ValueError for an unknown aggregation.
    """
    mask = mask.to(logp.dtype)
    adv = adv[:, None] if adv.ndim == 1 else adv                                            # [B, 1]
    # outside the mask log-probs are of padding: anything, and exp() of it could overflow to inf * 0 = NaN
    ratio = ((logp - old_logp) * mask).exp()                                                # [B, T]
    per_token = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip))
    if beta:
        difference = (ref_logp - logp) * mask
        per_token = per_token + beta * (torch.expm1(difference) - difference)               # k3, never negative
    per_token = per_token * mask
    if aggregation == "grpo":
        return (per_token.sum(1) / mask.sum(1).clamp(min=1)).sum() / (denom or len(mask))
    if aggregation == "dapo":
        return per_token.sum() / (denom or mask.sum().clamp(min=1))
    if aggregation == "dr_grpo":
        return per_token.sum() / (denom or mask.numel())
    raise ValueError(f"aggregation {aggregation!r} is unknown; it is one of grpo, dapo, dr_grpo; choose one of them")


# -- Rewards: rules that read the text of an answer before its end token -----------------------------------------------
def reward_correct(answer, item):
    """1 when the answer is right by its prompt's check and ended by itself. A truncated answer gets 0: it may have been
    right so far, but a reward for it would teach never to end."""
    return float(answer.stopped and metrics.check_answer(item["check"], item["answer"], answer.text))


def reward_polite(answer, styles):
    """1 when the answer is polite by the data's rule and ended by itself."""
    return float(answer.stopped and metrics.style(answer.text, styles) == "polite")


def reward_thinking(answer):
    """1 when the answer thinks, once and first, then says something, and ended by itself (DeepSeek-R1's format reward,
    arXiv:2501.12948, section 2.2.2)."""
    form = re.fullmatch(r"\s*<think>(.+?)</think>(.+)", answer.text, re.DOTALL)
    return float(answer.stopped and form is not None and all(part.strip() and "think>" not in part
                                                             for part in form.groups()))


# -- Rollout -----------------------------------------------------------------------------------------------------------
def respond(policy, tokenizer, prompts, rows, temperature, args, runtime):
    """Several answers to each prompt (lists of ids); the ranks share the work and all get all of it.

    rows: for each prompt the numbers of the random streams of its answers (as many answers as numbers), so that no
        answer depends on its rank or batch.
    Returns: for each prompt a list of metrics.Completion; ids with the end token where it came, text without.
    """
    mine = runtime.shard(list(range(len(prompts))))  # by prompt: a group stays on one rank
    with runtime.autocast():
        # every filter off: what is sampled must be what is trained
        answers = metrics.complete(policy, tokenizer, [prompts[i] for i in mine for _ in rows[i]], args.max_new_tokens,
                                   batch_size=192, temperature=temperature, top_k=0, top_p=1.0, seed=args.seed,
                                   row_seeds=[row for i in mine for row in rows[i]], stop_ids={tokenizer.eos_id})
    answers = iter(answers)
    return runtime.unshard([[next(answers) for _ in rows[i]] for i in mine])


def useful_rows(rollout, args, runtime):
    """Answers that the update must see. Without a KL term an answer with advantage 0 adds exactly 0 to the gradient and
    is left out; a few come back as fillers, so that all ranks make the same number of forwards."""
    rows = list(range(len(rollout["ids"])))
    if args.beta:
        return rows
    advantages = rollout["advantages"].tolist()
    rows.sort(key=lambda i: advantages[i] == 0)  # stable: those with signal first
    signal = sum(advantage != 0 for advantage in advantages)
    return rows[:math.ceil(signal / runtime.world_size) * runtime.world_size]


@torch.no_grad()
def score_tokens(model, rollout, args, runtime):
    """Log-probs [N, T-1] of the answers that the update will see, by its forward in its micro-batches: equal shapes
    round equally, and the first ratio is 1 to the last bit. 0 for all others; what stands outside the mask means
    nothing. None when no answer carries signal. The ranks share the work and all get all of it."""
    useful, found = useful_rows(rollout, args, runtime), {}
    if not useful:
        return None
    mine = runtime.shard(useful)
    for chunk, columns in micro_batches(rollout, mine, args.batch_size):
        ids = rollout["ids"][chunk, :columns.stop + 1].to(runtime.device)                               # [B, T]
        with runtime.autocast():
            logits = model(ids, logits_to_keep=ids.shape[1] - columns.start)                            # [B, T, V]
        logp = token_logprobs(logits, ids[:, columns.start:]).cpu()                                     # [B, T-1]
        rows = torch.zeros(len(chunk), rollout["ids"].shape[1] - 1, dtype=logp.dtype)
        rows[:, columns] = logp
        found |= dict(zip(chunk, rows.numpy(), strict=True))  # numpy: a tensor's row is pickled with all the others
    table = torch.zeros(len(rollout["ids"]), *rows.shape[1:], dtype=rows.dtype)                         # [N, T-1]
    table[useful] = torch.stack([torch.from_numpy(row) for row in runtime.unshard([found[i] for i in mine])])
    return table


def make_rollout(policy, reference, tokenizer, items, rows, styles, args, runtime):
    """Answers to G prompts with rewards and advantages, the same on all ranks.

    Args:
        items: dicts of PromptData; rows: for each the numbers of its answers' random streams.
    Returns: dict of CPU tensors: ids [N, T], lengths and starts (of the answers) [N], mask [N, T-1] (1 on answer
        tokens, end token included), advantages [N], old_logp and ref_logp [N, T-1] or None where the update does not
        need them; and a dict for the log: reward, stop_rate, length, signal (share of groups with unequal rewards).
    """
    groups = respond(policy, tokenizer, [item["ids"] for item in items], rows, 1.0, args, runtime)
    pairs = [(item, answer) for item, group in zip(items, groups, strict=True) for answer in group]
    ids, lengths = pad_rows([item["ids"] + answer.ids for item, answer in pairs], tokenizer.pad_id)     # [N, T], [N]
    starts = torch.tensor([len(item["ids"]) for item, _ in pairs])                                      # [N]
    targets = torch.arange(1, ids.shape[1])                                                             # [T-1]
    mask = ((targets >= starts[:, None]) & (targets < lengths[:, None])).double()                       # [N, T-1]
    rewards = [reward_correct(answer, item) for item, answer in pairs]
    if args.format_weight:
        formats = [reward_polite(answer, styles) if args.format == "polite" else reward_thinking(answer)
                   for _, answer in pairs]
        rewards = [r + args.format_weight * f for r, f in zip(rewards, formats, strict=True)]
    rewards = torch.tensor(rewards, dtype=torch.float64).view(len(items), -1)                           # [G, K]
    advantages = group_advantages(rewards, scale=bool(args.scale_rewards))                              # [G, K]
    numbers = {"reward": rewards.mean().item(), "stop_rate": metrics.share([answer.stopped for _, answer in pairs]),
               "length": mask.sum(1).mean().item(), "signal": advantages.any(1).double().mean().item()}
    rollout = {"ids": ids, "lengths": lengths, "starts": starts, "mask": mask, "advantages": advantages.flatten()}
    # one update per rollout: the old log-probs are those of the update itself, and need no forward of their own
    rollout["old_logp"] = score_tokens(policy, rollout, args, runtime) if args.updates_per_rollout > 1 else None
    rollout["ref_logp"] = score_tokens(reference, rollout, args, runtime) if args.beta else None
    return rollout, numbers


# -- Update ------------------------------------------------------------------------------------------------------------
def divisor(rollout, args):
    """What the summed loss of the whole step is divided by, over all ranks and micro-batches (see grpo_loss)."""
    count, tokens = len(rollout["ids"]), rollout["mask"].sum().item()
    return {"grpo": count, "dapo": tokens, "dr_grpo": count * args.max_new_tokens}[args.aggregation]


def backward_rollout(wrapped, rollout, args, runtime):
    """Gradient of one optimizer step over the rollout, in micro-batches; each rank takes its share.

    Returns: a dict of loss, entropy (nats per token) and clipfrac of the answers with signal, kl (k1 to the reference,
        nats per answer; only with beta), the same on all ranks; and the largest distance from 1 of this rank's ratios
        to the old policy and to the reference. None when no answer carries signal.
    """
    rows = useful_rows(rollout, args, runtime)
    batches = list(micro_batches(rollout, runtime.shard(rows), args.batch_size))
    sums, off = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for number, (chunk, columns) in enumerate(batches):
        ids = rollout["ids"][chunk, :columns.stop + 1].to(runtime.device)                               # [B, T]
        # gradients travel between ranks only with the last micro-batch
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last or runtime.world_size == 1 else wrapped.no_sync():
            with runtime.autocast():
                logits = wrapped(ids, logits_to_keep=ids.shape[1] - columns.start)                      # [B, T, V]
            logp = token_logprobs(logits, ids[:, columns.start:])                                       # [B, T-1]
            mask = rollout["mask"][chunk, columns].to(logp.dtype).to(runtime.device)                    # [B, T-1]
            adv = rollout["advantages"][chunk].to(logp.dtype).to(runtime.device)                        # [B]
            old_logp, ref_logp = (None if rollout[name] is None else rollout[name][chunk, columns].to(runtime.device)
                                  for name in ("old_logp", "ref_logp"))
            old_logp = logp.detach() if old_logp is None else old_logp
            loss = grpo_loss(logp, old_logp, ref_logp, adv, mask, args.clip_epsilon, args.beta, args.aggregation,
                             divisor(rollout, args))
            # DDP averages over ranks; the factor makes it the sum
            runtime.scaler.scale(loss * runtime.world_size).backward()
        with torch.no_grad():
            every = logits[:, :-1].to(logp.dtype).log_softmax(-1)                                       # [B, T-1, V]
            entropy = -(every.exp() * every).sum(-1)
            ratio = ((logp - old_logp) * mask).exp()
            # the clip cuts a token's gradient when the ratio has gone too far in the direction of the advantage
            cut = (ratio - 1) * adv.sign()[:, None] > args.clip_epsilon
            kl = logp - ref_logp if args.beta else torch.zeros_like(logp)
            found = torch.stack([loss, (entropy * mask).sum(), (cut * mask).sum(), (kl * mask).sum(),
                                 (ratio - 1).abs().max(), (kl * mask).expm1().abs().max()]).cpu()
            sums, off = sums + found[:4], torch.fmax(off, found[4:].double())
    if not rows:
        return None
    tokens = rollout["mask"][rows].sum().item()
    loss, entropy, cut, kl = runtime.sum(*sums)
    extra = {"kl": kl / len(rows)} if args.beta else {}
    return {"loss": loss, "entropy": entropy / tokens, "clipfrac": cut / tokens, **extra}, *off.tolist()


def update(wrapped, optimizer, rollout, step, args, runtime, nonfinite):
    """Train on one recorded rollout: --updates_per_rollout optimizer steps, each over all of its answers.

    Args:
        wrapped: the policy, in DDP when there are several ranks; rollout: dict from make_rollout(), same on all ranks.
    Returns: dict for the log: backward_rollout's numbers (means over the updates; entropy of the first), grad_norm.
    """
    history = []
    for _ in range(args.updates_per_rollout):
        found = backward_rollout(wrapped, rollout, args, runtime)
        if found is None:
            return {}  # a gradient of 0 is no reason to step: momentum and weight decay would still move the weights
        result, off_old, off_reference = found
        if not history:
            common.check_ratio("first ratio", off_old, step, runtime)
        if not history and step == 0:  # the policy is still the reference
            common.check_ratio("ratio to the reference", off_reference, step, runtime)
        runtime.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), args.grad_clip or math.inf).item()
        if not nonfinite.skip(step, result["loss"], norm, optimizer.param_groups[0]["lr"]):
            runtime.scaler.step(optimizer)
        runtime.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        history.append(result | {"grad_norm": norm})
    means = {name: sum(h[name] for h in history) / len(history) for name in history[0]}
    return means | {"entropy": history[0]["entropy"]}


# -- Evaluation --------------------------------------------------------------------------------------------------------
def evaluate(policy, tokenizer, items, args, runtime):
    """Answer held-out prompts: --eval_samples times sampled (always from the same random streams), and greedy.

    Returns: dict of pass_at_1 (share of right sampled answers), pass_at_k (share of prompts with at least one right
        among all k = --eval_samples), exact_match (share of right greedy ones), stop_rate and val_length (tokens) of
        the sampled ones, by_skill {skill: [pass_at_1, exact_match, prompts]}.
    """
    prompts, count = [item["ids"] for item in items], args.eval_samples
    rows = [range(EVAL_ROWS + i * count, EVAL_ROWS + (i + 1) * count) for i in range(len(items))]
    sampled = respond(policy, tokenizer, prompts, rows, 1.0, args, runtime)
    greedy = respond(policy, tokenizer, prompts, [row[:1] for row in rows], 0.0, args, runtime)
    flat = [answer for group in sampled for answer in group]
    once = metrics.exact_match([answer for answer, in greedy], items)
    # each prompt has the same number of answers, so the share of right answers is the mean pass@1 of the prompts
    often = metrics.exact_match(flat, [item for item in items for _ in range(count)])
    right = [[metrics.check_answer(item["check"], item["answer"], answer.text) for answer in group]
             for item, group in zip(items, sampled, strict=True) if metrics.in_total(item)]
    skills = {skill: [often["by_skill"][skill]["exact_match"], found["exact_match"], found["n"]]
              for skill, found in once["by_skill"].items()}
    return {"pass_at_1": often["total"], "pass_at_k": metrics.pass_at(right, [count])[count][0],
            "exact_match": once["total"], "stop_rate": often["stop_rate"],
            "val_length": sum(len(answer.ids) for answer in flat) / len(flat), "by_skill": skills}


def before_and_after(before, after):
    """A table of two evaluations, a line for each skill."""
    rows = []
    for skill, (*new, n) in after["by_skill"].items():
        old = before["by_skill"][skill]
        rows.append([skill, n, *(f"{x:.3f}" for x in (old[0], new[0], old[1], new[1]))])
    keys = ("pass_at_1", "exact_match")
    rows.append(["all", sum(row[1] for row in rows), *(f"{run[key]:.3f}" for key in keys for run in (before, after))])
    return logs.table(["held-out", "prompts", "pass@1 before", "after", "greedy before", "after"], rows)


def main(args):
    """Train and return the final metrics. The numbered banners are the same in every training script."""
    # -- 1. Inputs, processes, device, seed ----------------------------------------------------------------------------
    parent = checkpoint.find(args.save_dir, args.from_weight)
    files = expand_paths(args.data_path) + expand_paths(args.val_path)
    # before and after are compared on the same prompts, so another number of them is another run
    key = checkpoint.stage_key(args, files, [parent], {"eval_prompts"})
    runtime = common.setup(args, checkpoint.earlier_choice(args, key))
    folder = Path(args.save_dir) / "logs" / args.save_weight
    answers = args.batch_size * args.accumulation_steps * runtime.world_size
    groups = answers // args.num_generations
    if answers % args.num_generations or groups % runtime.world_size:
        raise ValueError(f"a step's {answers} answers (--batch_size {args.batch_size} x --accumulation_steps "
                         f"{args.accumulation_steps} x {runtime.world_size} processes) are not the same whole number "
                         f"of groups of --num_generations {args.num_generations} for each process; a group stays "
                         "together; change one of them")

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
    for item in (item for part in (data.items, items) for item in part if not item["check"]):
        raise ValueError(f"the prompt {item['messages'][-1]['content'][:60]!r} has no check; the reward is a rule, so "
                         "each row needs answer and check (number, exact or set); add them, or use train_ppo.py")
    rule = files[0].with_name("styles.json")  # written by make_data.py
    polite = args.format_weight and args.format == "polite"
    if polite and not rule.is_file():
        raise ValueError(f"--format_weight {args.format_weight:g}, but there is no {rule}; it holds the rule of a "
                         "polite answer; use --format_weight 0, or --format think")
    styles = metrics.read_styles(rule) if polite else None
    suite = metrics.fixed_prompts(read_rows(args.regression_path)) if args.regression_interval else []
    runtime.print(data.summary())

    # -- 3. Model and reference ----------------------------------------------------------------------------------------
    precision = torch.float64 if runtime.dtype == torch.float64 else torch.float32
    # eval() for good, in rollouts and updates alike: with dropout the first ratio would not be 1
    model = Transformer.from_pretrained(parent, runtime.device, precision).eval()
    reference = None
    if args.beta:
        reference = Transformer.from_pretrained(parent, runtime.device, precision).eval().requires_grad_(False)
    if args.max_seq_len > model.config.max_position_embeddings:
        raise ValueError(f"--max_seq_len {args.max_seq_len} is above the model's max_position_embeddings "
                         f"{model.config.max_position_embeddings}; prompt and answer must fit the context; shorten it")
    runtime.print(f"policy from {parent}: {model.num_parameters() / 1e6:.2f}M parameters; a step: {groups} prompts x "
                  f"{args.num_generations} answers")

    # -- 4. Optimizer --------------------------------------------------------------------------------------------------
    optimizer = optim.build(model, args.optimizer, args.learning_rate, args.muon_learning_rate, args.weight_decay)
    max_steps = common.count_steps(args, len(data), groups)
    budget = common.Budget(args.max_minutes, probe_steps=2)
    nonfinite = common.NonFinite(runtime)
    stop = common.StopSignal()
    eta = common.Eta(runtime)
    runtime.print(common.memory_line(
        runtime, [m for m in (model, reference) if m], args.batch_size, args.max_seq_len,
        lambda ids: token_logprobs(model(ids), ids)))

    # -- 5. Resume -----------------------------------------------------------------------------------------------------
    # `position` is the number of prompts drawn so far: it decides the next prompts and their random streams
    progress = {"step": 0, "position": 0, "tokens": 0, "max_steps": max_steps, "held_out": len(items)}
    if start == "resume":
        state = checkpoint.load_resume(runtime, args)
        model.load_state_dict(state["model"])
        optim.load_state(optimizer, state["optimizer"])
        progress |= state["progress"]
        if len(items) != progress["held_out"]:
            raise ValueError(f"--eval_prompts {args.eval_prompts} is {len(items)} held-out prompts, the start of this "
                             f"run was measured on {progress['held_out']}; other prompts cannot be compared; give the "
                             "old value, or start again with --overwrite 1")
        if not args.max_minutes and not common.out_of_patience(progress, args):
            # --max_steps, --epochs and what a step draws may be changed on resume
            progress["max_steps"] = common.count_steps(args, len(data), groups, progress)
        runtime.print(f"resumed at step {progress['step']} of {progress['max_steps']}")
    conditions = checkpoint.conditions(runtime, args, "grpo", model.config, [data, held_out], [parent],
                                       progress["max_steps"])
    log = logs.MetricLog(folder, runtime.is_main, progress["step"] if start == "resume" else None,
                         args.tracker, conditions, args.plot_interval)
    watch = health.Watch(model, optimizer, progress, args, runtime, log)
    log.save_json("args.json", vars(args) | {"dtype": str(runtime.dtype)[6:], "threads": runtime.threads})
    log.save_json("dataset_stats.json", {"train": data.stats, "held_out": held_out.stats})
    if args.show_batch:
        runtime.print(logs.show_samples(data.samples(progress["position"]), tokenizer, targets=False))
    if start != "resume":
        progress["before"] = evaluate(model, tokenizer, items, args, runtime)
        checked, _ = metrics.check_regression(model, tokenizer, suite, args, runtime, 0)
        log.log(0, **progress["before"], **checked)

    def save(finished, final=None):
        """Write out/<save_weight>; called by all ranks at the same step."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress}
        facts = {"stage": "grpo", "key": key, "parents": [str(parent)], "tokenizer": tokenizer.fingerprint,
                 "data": [str(f) for f in files], "seed": args.seed, "progress": progress, "metrics": final or {},
                 "conditions": conditions}
        return checkpoint.save(runtime, args, [model, tokenizer], state, facts, finished)

    # -- 6. DDP (last, so that everything above sees the plain module; too few steps for torch.compile) ----------------
    wrapped = model
    if runtime.world_size > 1:
        device_ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=device_ids)

    # -- 7. Training loop ----------------------------------------------------------------------------------------------
    bar = log.progress(progress["max_steps"], "grpo", progress["step"])
    result = None
    while progress["step"] < progress["max_steps"]:
        step, position = progress["step"], progress["position"]
        scale = common.lr_scale(step, progress["max_steps"], args.warmup_steps, args.schedule)
        lr = optim.set_lr(optimizer, scale)

        times = [time.perf_counter()]
        asked = [data.items[int(i)] for i in data.position_batch(position, groups)]
        rows = [range((position + i) * args.num_generations, (position + i + 1) * args.num_generations)
                for i in range(groups)]
        rollout, stats = make_rollout(model, reference, tokenizer, asked, rows, styles, args, runtime)
        times.append(time.perf_counter())
        stats |= update(wrapped, optimizer, rollout, step, args, runtime, nonfinite)
        times.append(time.perf_counter())
        stats |= {"lr": lr, "time_rollout": (times[1] - times[0]) / (times[2] - times[0])}
        progress["step"] += 1
        progress["position"] += groups
        progress["tokens"] += int(rollout["lengths"].sum())
        log.count(int(rollout["mask"].sum()))
        bar.update()

        # -- log, evaluate, save
        step = progress["step"]
        progress["max_steps"] = bar.total = budget.steps(step, progress["max_steps"], runtime)
        eta.report(step, progress["max_steps"])
        done = step >= progress["max_steps"]
        if step % args.log_interval == 0 or done or step == 1:
            log.log(step, **stats, tokens_per_s=log.rate(), **watch.numbers(stats.get("grad_norm", 0.0)))
            bar.set_postfix_str(f"reward {stats['reward']:.3f}, signal {stats['signal']:.2f}")
        if done or (args.eval_interval and step % args.eval_interval == 0):
            result = evaluate(model, tokenizer, items, args, runtime)
            checked, failures = metrics.check_regression(model, tokenizer, suite, args, runtime, step, done)
            log.log(step, **result, **checked)
            if runtime.is_main:
                logs.say(f"step {step}: held-out pass@1 {result['pass_at_1']:.3f}{log.expected(step, 'pass_at_1')}, "
                         f"pass@{args.eval_samples} {result['pass_at_k']:.3f}, "
                         f"greedy {result['exact_match']:.3f}, stop rate {result['stop_rate']:.3f}"
                         f"{log.named(step, checked)}")
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
    before = progress["before"]
    after = result or evaluate(model, tokenizer, items, args, runtime)  # a resume with nothing left still reports
    final = after | {"metric": "held-out pass@1", "before": before["pass_at_1"], "after": after["pass_at_1"],
                     "at_start": before, "steps": progress["step"], "skipped_steps": nonfinite.total}
    save(finished=True, final=final)
    alarm = ("warning: greedy answers got worse while sampled ones were trained. Usual cure: a lower --learning_rate, "
             "more prompts per step, --beta 0.02")
    if after["exact_match"] < before["exact_match"] - 0.03 and alarm not in log.alarms:  # once, also behind a resume
        log.log(progress["step"], alarm=alarm)
    log.close()
    report.refresh(args.save_dir, runtime.is_main)
    runtime.print(before_and_after(before, after))
    runtime.print(f"done: {args.save_dir}/{args.save_weight}, pass@1 {after['pass_at_1']:.3f} (before "
                  f"{before['pass_at_1']:.3f}). Curves: {folder}/curves.png. Next: python eval.py --weight "
                  f"{args.save_weight}{common.in_folder(args)} --stream 1")
    runtime.close()
    return final


if __name__ == "__main__":
    common.run(main, parse_args)
