"""Direct preference optimisation: prefer the chosen answer without a reward model and without sampling.

The KL-regularised reward problem has a closed-form solution, in which the reward of an answer y is, up to a constant of
the prompt, beta * log(pi(y) / ref(y)). Put into Bradley and Terry's model that gives, over the N pairs of one optimizer
step (all micro-batches, all ranks),
    h    = log pi(chosen) - log ref(chosen) - log pi(rejected) + log ref(rejected)
    loss = mean_n [ -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) ]     sigmoid; e = label smoothing
    loss = mean_n [ (h - 1 / (2 beta))^2 ]                                      ipo, in the paper's summed form
log pi(y) is the SUM over the answer's tokens, end token included, prompt not. The reference is the model the run starts
from, so the first loss is ln 2 for every sigmoid run: the script stops if it is not.

What to watch: the margin should rise because rejected answers fall, not because both fall. The loss cannot tell these
apart, chosen_logp can. No balance loss: the router of a mixture of experts is where the start left it.

Papers: Rafailov et al. 2023 (DPO, arXiv:2305.18290), Mitchell 2023 (conservative DPO), Azar et al. 2023 (IPO,
arXiv:2310.12036), Razin et al. 2024 (falling log-probs, arXiv:2410.08847).

    python train_dpo.py --from_weight sft                                                     # a laptop
    python train_dpo.py --from_weight out/sft --data_path my/pairs.jsonl --beta 0.2           # own data, one GPU
    torchrun --nproc_per_node 4 train_dpo.py --from_weight sft --data_path data/*.jsonl       # four GPUs or processes

Letters: B pairs, T tokens, V vocabulary, N pairs of a data set.
"""
import contextlib
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import common
import health
import logs
import metrics
import optim
import report
from dataset import PreferenceData, pack_batch
from model import Transformer
from rows import expand_paths, preference, read_rows, split_heldout
from tokenizer import Tokenizer

# what a step adds up over its pairs, in the order of the sums in the loop
LOGGED = ("loss", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "chosen_length",
          "rejected_length")


def parse_args(argv=None):
    """Flags of this stage. The model's shape comes from the weights it starts from."""
    parser = cli.Parser(__doc__)
    cli.data_flags(parser, "out/data/preference.train.jsonl", max_seq_len=256, val_ratio=0.05)
    g = parser.add_argument_group("model")
    g.add_argument("--from_weight", default="sft",
                   help="checkpoint to start from, also the reference: name below --save_dir, or folder")
    g.add_argument("--reference", default="precomputed", choices=("precomputed", "live"),
                   help="score all pairs once before training, or keep a second model in memory (data seen once)")
    cli.switch(g, "--gradient_checkpointing", 0,
               "recompute activations in the backward pass: less memory, about 30%% slower")
    g = parser.add_argument_group("loss")
    g.add_argument("--loss_type", default="sigmoid", choices=("sigmoid", "ipo"), help="shape of the loss")
    g.add_argument("--beta", type=cli.positive(float), default=0.1, help="how strongly the reference holds back")
    g.add_argument("--label_smoothing", type=cli.positive(float, zero=True), default=0.0,
                   help="assumed share of swapped pairs, below 0.5 (sigmoid only)")
    cli.optim_flags(parser, batch_size=32, learning_rate=5e-5, muon_learning_rate=2e-4, warmup_steps=0.1,
                    optimizer="adamw")
    cli.run_flags(parser, save_weight="dpo", eval_interval=50, save_interval=100,
                  watched=("val_loss", "val_accuracy", "val_margin", "regression_pass_rate"))
    cli.regression_flags(parser)
    parser.add_argument("--eval_batches", type=cli.positive(int), default=64, help="held-out batches per evaluation")
    parser.add_argument("--eval_prompts", type=cli.positive(int, zero=True), default=400,
                        help="held-out prompts answered by both models for the win rate at the end, 0 = none")
    parser.add_argument("--max_new_tokens", type=cli.positive(int), default=64, help="longest answer in that match")
    cli.switch(parser, "--use_compile", 0, "torch.compile: 20 s of warm-up, pays back after about 100 steps")
    return parser.parse_args(argv)


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0, loss_type="sigmoid"):
    """Preference loss of B pairs from summed log-probs of their answers.

    Args:
        pi_chosen, pi_rejected, ref_chosen, ref_rejected: [B], nats per answer, of policy and reference.
        beta: strength of the tie to the reference; label_smoothing: share of pairs assumed to be swapped.
        loss_type: "sigmoid" or "ipo".
    Returns: (loss, chosen_reward [B], rejected_reward [B]); rewards are beta * log(pi / ref), without gradient.
    Raises: ValueError for an unknown loss_type, and for smoothing outside [0, 0.5) or together with ipo.
    """
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type == "ipo"):
        raise ValueError(f"label_smoothing is {label_smoothing} with loss_type {loss_type}; it is the share of swapped "
                         "pairs, from 0 to below 0.5, and only the sigmoid loss has it; use 0")
    chosen, rejected = beta * (pi_chosen - ref_chosen), beta * (pi_rejected - ref_rejected)     # [B], [B]
    margin = chosen - rejected                                                                  # [B]
    if loss_type == "sigmoid":
        # conservative form: with swapped pairs in the data an endless margin would be endlessly wrong on them
        losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    elif loss_type == "ipo":
        # a fixed target instead of "as large as possible"; other codebases divide h by the answer length first
        losses = (margin / beta - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss_type {loss_type!r} is unknown; it is one of sigmoid, ipo; choose one of them")
    return losses.mean(), chosen.detach(), rejected.detach()


def completion_logps(model, batch, runtime):
    """log p(answer | prompt) of every row: the sum over its answer tokens, [2B], at least fp32."""
    ids, mask, documents, ends = pack_batch(batch, runtime.device)              # [R, T] three times
    with runtime.autocast():
        logps = model(ids, documents=documents, target_mask=mask)               # [R, T-1], 0 outside the answers
    # padding (-1) adds its zeros to row 0
    return logps.new_zeros(len(ends)).index_add(0, documents[:, 1:].clamp(min=0).flatten(), logps.flatten())


@torch.no_grad()
def reference_logps(model, data, indices, args, runtime):
    """Score the given pairs with the frozen start model, shared by the ranks.

    Returns: [N, 2] on the CPU, (chosen, rejected) of pair n; NaN for pairs that were not asked for.
    """
    starts = runtime.shard(list(range(0, len(indices), args.batch_size)))
    share = [completion_logps(model, data.batch(indices[i:i + args.batch_size]), runtime) for i in starts]
    rows = [row.view(2, -1).T for row in runtime.unshard([row.cpu() for row in share])]         # [2B] -> [B, 2]
    table = torch.full((len(data), 2), math.nan, dtype=rows[0].dtype)
    table[torch.as_tensor(indices)] = torch.cat(rows)
    return table


@torch.no_grad()
def evaluate(model, data, reference, args, runtime):
    """Implicit rewards on the first --eval_batches held-out batches, shared by the ranks.

    Args:
        reference: [N, 2] from reference_logps().
    Returns: dict of val_loss, accuracy (chosen reward above rejected; ties are wrong, so 0 before training),
        accuracy_by_kind, margin, chosen_drift and rejected_drift (log(pi / ref), nats per answer token), n.
    """
    count = min(len(data), args.eval_rows)
    share, kinds = [], []
    for i in runtime.shard(list(range(0, count, args.batch_size))):
        batch = data.batch(range(i, min(i + args.batch_size, count)))
        logps, lengths = completion_logps(model, batch, runtime).cpu(), batch["mask"].sum(1)
        share.append(torch.stack([*logps.chunk(2), *lengths.to(logps.dtype).chunk(2)]))         # [4, B]
        kinds.append(batch["kind"])
    pi_chosen, pi_rejected, chosen_length, rejected_length = torch.cat(runtime.unshard(share), 1)
    kinds = [kind for batch in runtime.unshard(kinds) for kind in batch]
    ref_chosen, ref_rejected = reference[:count].unbind(1)
    loss, chosen, rejected = dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, args.beta, args.label_smoothing,
                                      args.loss_type)
    return {"val_loss": loss.item(), **metrics.pair_accuracy(chosen.tolist(), rejected.tolist(), kinds),
            "margin": (chosen - rejected).mean().item(),
            "chosen_drift": ((pi_chosen - ref_chosen) / chosen_length).mean().item(),
            "rejected_drift": ((pi_rejected - ref_rejected) / rejected_length).mean().item()}


def warning_lines(result, loss, early):
    """What usually goes wrong in DPO, as lines for the log: both log-probs falling, and over-training."""
    if result["chosen_drift"] < -0.3 and result["rejected_drift"] < 0:
        yield (f"warning: chosen and rejected answers both lose probability ({result['chosen_drift']:+.2f} and "
               f"{result['rejected_drift']:+.2f} nats per token): it moves to answers nobody preferred. Usual cure: a "
               "lower --learning_rate, a larger --beta, fewer steps")
    if early and loss < 0.01:
        yield (f"warning: loss {loss:.4f} before half of the steps: the pairs are learnt by heart. Usual cure: a lower "
               "--learning_rate, fewer steps")


def heldout_prompts(args, tokenizer):
    """Prompts of the match: the first --eval_prompts held-out questions that can be judged.

    Returns: (items, styles); items are dicts of ids, answer, check, lang and skill, styles is the content of the
        styles.json beside the data. Without that file, or rows with a check, there are no items.
    """
    rule = expand_paths(args.data_path)[0].with_name("styles.json")
    if not rule.is_file():
        return [], {}
    ratio = 0.0 if args.val_path else args.val_ratio
    items = []
    for row, where in read_rows(args.val_path or args.data_path, skip_bad=args.skip_bad):
        if len(items) >= args.eval_prompts:
            break
        if not row.get("check"):
            continue
        messages = preference(row, where)[0]
        question = next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])
        ids, _ = tokenizer.render(messages, add_generation_prompt=True)
        # the same split as PreferenceData's, by the hash of the first question
        if len(ids) < args.max_seq_len and (not ratio or split_heldout(question, ratio)):
            items.append({"ids": ids} | {name: row.get(name) for name in ("answer", "check", "lang", "skill")})
    return items, metrics.read_styles(rule)


def play(model, reference, tokenizer, items, styles, args, runtime):
    """Both models answer the same held-out prompts, sampled at temperature 1, each row with its own seed.

    A rule, not a model, judges: metrics.rule_score (right and in the preferred style). Equal scores count half.
    Returns: dict of win_rate, win_rate_error (standard error), win_rate_n, exact_match_before and exact_match (of the
        same sampled answers); the same on all ranks.
    """
    scores, exact = [], []
    mine = runtime.shard(list(range(len(items))))
    for player in (model, reference):
        with runtime.autocast():
            answers = metrics.complete(player, tokenizer, [items[i]["ids"] for i in mine], args.max_new_tokens,
                                       batch_size=64, temperature=1.0, seed=args.seed, row_seeds=mine)
        answers = runtime.unshard(answers)
        scores.append([metrics.rule_score(a.text, i["answer"], i["check"], styles)
                       for a, i in zip(answers, items, strict=True)])
        exact.append(metrics.exact_match(answers, items)["total"])
    rate, error = metrics.win_rate(*scores)
    return {"win_rate": rate, "win_rate_error": error, "win_rate_n": len(items), "exact_match_before": exact[1],
            "exact_match": exact[0]}


def main(args):
    """Train and return the final metrics. The numbered banners are the same in every training script."""
    # -- 1. Inputs, processes, device, seed ----------------------------------------------------------------------------
    dpo_loss(*torch.zeros(4, 1), args.beta, args.label_smoothing, args.loss_type)  # refuses bad flags before any work
    parent = checkpoint.find(args.save_dir, args.from_weight)
    files = expand_paths(args.data_path) + expand_paths(args.val_path)
    key = checkpoint.stage_key(args, files, [parent])
    runtime = common.setup(args, checkpoint.earlier_choice(args, key))
    folder = Path(args.save_dir) / "logs" / args.save_weight

    # -- 2. Data -------------------------------------------------------------------------------------------------------
    tokenizer = Tokenizer.from_pretrained(parent)
    start = checkpoint.begin(runtime, args, key)
    if start == "skip":
        return checkpoint.read_minillm(Path(args.save_dir) / args.save_weight)["metrics"]
    shared = dict(tokenizer=tokenizer, max_seq_len=args.max_seq_len, cache_dir=args.cache_dir, seed=args.seed,
                  skip_bad=args.skip_bad, is_main=runtime.is_main, barrier=runtime.barrier)
    ratio = 0.0 if args.val_path else args.val_ratio
    parts = ("train", "val") if ratio else ("all", "all")
    data = PreferenceData(args.data_path, part=parts[0], val_ratio=ratio, **shared)
    held_out = PreferenceData(args.val_path or args.data_path, part=parts[1], val_ratio=ratio, **shared)
    prompts, styles = heldout_prompts(args, tokenizer)
    suite = metrics.fixed_prompts(read_rows(args.regression_path)) if args.regression_interval else []
    runtime.print(data.summary())

    # -- 3. Model and reference ----------------------------------------------------------------------------------------
    model = Transformer.from_pretrained(parent)
    common.check_vocabulary(model.config, tokenizer, args.from_weight)
    if args.max_seq_len > model.config.max_position_embeddings:
        raise ValueError(f"--max_seq_len {args.max_seq_len} is above the model's max_position_embeddings "
                         f"{model.config.max_position_embeddings}; rows must fit the context; shorten the rows")
    model = model.to(runtime.device, torch.float64 if runtime.dtype == torch.float64 else torch.float32)
    # both without dropout from here on: with it, policy and reference would differ before the first update
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    model.gradient_checkpointing = bool(args.gradient_checkpointing)
    runtime.print(f"model from {parent}: {model.num_parameters() / 1e6:.2f}M parameters")

    # -- 4. Optimizer --------------------------------------------------------------------------------------------------
    optimizer = optim.build(model, args.optimizer, args.learning_rate, args.muon_learning_rate, args.weight_decay,
                            dtype=runtime.dtype)
    per_step = args.batch_size * args.accumulation_steps * runtime.world_size
    max_steps = common.count_steps(args, len(data), per_step)
    budget = common.Budget(args.max_minutes)
    nonfinite = common.NonFinite(runtime)
    stop = common.StopSignal()
    eta = common.Eta(runtime)
    runtime.print(common.memory_line(
        runtime, [model, reference], 2 * args.batch_size, args.max_seq_len,
        lambda ids: model(ids, documents=torch.zeros_like(ids), target_mask=torch.ones_like(ids))))

    # -- 5. Resume, then the reference's log-probs ---------------------------------------------------------------------
    # `position` is the number of pairs drawn so far by all ranks together: the order does not depend on the rank count
    progress = {"step": 0, "position": 0, "tokens": 0, "max_steps": max_steps}
    tables = {}  # part -> [N, 2] reference log-probs; kept in the resume state, so a resumed run compares to the same
    if start == "resume":
        state = checkpoint.load_resume(runtime, args)
        model.load_state_dict(state["model"])
        optim.load_state(optimizer, state["optimizer"])
        progress, tables = progress | state["progress"], state["tables"]
        if not args.max_minutes and not common.out_of_patience(progress, args):
            # --max_steps, --epochs and what a step draws may be changed on resume
            progress["max_steps"] = common.count_steps(args, len(data), per_step, progress)
        runtime.print(f"resumed at step {progress['step']} of {progress['max_steps']}")
    conditions = checkpoint.conditions(runtime, args, "dpo", model.config, [data, held_out], [parent],
                                       progress["max_steps"])
    log = logs.MetricLog(folder, runtime.is_main, progress["step"] if start == "resume" else None,
                         args.tracker, conditions, args.plot_interval)
    watch = health.Watch(model, optimizer, progress, args, runtime, log)
    log.save_json("args.json", vars(args) | {"dtype": str(runtime.dtype)[6:], "threads": runtime.threads})
    log.save_json("dataset_stats.json", {"train": data.stats, "held_out": held_out.stats})
    if args.show_batch:
        runtime.print(logs.show_samples(data.samples(progress["position"]), tokenizer))

    per_micro_step = args.batch_size * runtime.world_size
    # a short run needs only the pairs it will draw; a resumed one may have drawn more of them a step
    drawn = min(len(data), progress["position"] + (progress["max_steps"] - progress["step"]) * per_step)
    wanted = {"held_out": (held_out, np.arange(min(len(held_out), args.eval_rows)))}
    if args.reference == "precomputed":
        wanted["train"] = (data, np.sort(data.position_batch(0, drawn)))
    for part, (source, indices) in wanted.items():
        if len(tables.get(part, [])) != len(source) or tables[part][indices].isnan().any():
            runtime.print(f"reference: scoring {len(indices)} {part} pairs")
            tables[part] = reference_logps(reference, source, indices, args, runtime)
    if args.reference == "precomputed":
        reference = None  # its memory is free for the training
    log.rate()  # the reference's seconds are not training seconds

    def save(finished, final=None):
        """Write out/<save_weight>; called by all ranks at the same step."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "progress": progress, "tables": tables}
        facts = {"stage": "dpo", "key": key, "parents": [str(parent)], "tokenizer": tokenizer.fingerprint,
                 "data": [str(f) for f in files], "seed": args.seed, "progress": progress, "metrics": final or {},
                 "conditions": conditions}
        return checkpoint.save(runtime, args, [model, tokenizer], state, facts, finished)

    # -- 6. Compile and DDP (last, so that everything above sees the plain module) -------------------------------------
    wrapped = model
    if runtime.world_size > 1:
        device_ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=device_ids)
    if args.use_compile:
        wrapped = torch.compile(wrapped)

    # -- 7. Training loop ----------------------------------------------------------------------------------------------
    bar = log.progress(progress["max_steps"], "dpo", progress["step"])
    result = None
    while progress["step"] < progress["max_steps"]:
        step = progress["step"]
        scale = common.lr_scale(step, progress["max_steps"], args.warmup_steps, args.schedule)
        lr = optim.set_lr(optimizer, scale)
        optim.to_gradient_point(optimizer)  # Schedule-Free only; the step, taken or skipped, leads back

        batches = []
        for micro in range(args.accumulation_steps):
            first = progress["position"] + micro * per_micro_step + runtime.rank * args.batch_size
            indices = data.position_batch(first, args.batch_size)
            batches.append((indices, data.batch(indices)))
        pairs, tokens = runtime.sum(sum(len(i) for i, _ in batches), sum(b["lengths"].sum() for _, b in batches))

        model.eval()
        sums = torch.zeros(len(LOGGED), device=runtime.device)
        for micro, (indices, batch) in enumerate(batches):
            if reference is None:
                ref_chosen, ref_rejected = tables["train"][indices].to(runtime.device).unbind(1)        # [B], [B]
            else:
                with torch.no_grad():
                    ref_chosen, ref_rejected = completion_logps(reference, batch, runtime).chunk(2)
            # gradients travel between ranks only with the last micro-batch
            last = micro == len(batches) - 1
            with contextlib.nullcontext() if last or runtime.world_size == 1 else wrapped.no_sync():
                pi_chosen, pi_rejected = completion_logps(wrapped, batch, runtime).chunk(2)             # [B], [B]
                loss, chosen, rejected = dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, args.beta,
                                                  args.label_smoothing, args.loss_type)
                loss_sum = loss * len(indices)
                # DDP averages over ranks; the factor makes it a sum, and the division by all pairs makes that the mean
                runtime.scaler.scale(loss_sum * (runtime.world_size / pairs)).backward()
            lengths = [x.sum().to(runtime.device) for x in batch["mask"].chunk(2)]
            sums += torch.stack([loss_sum.detach(), (chosen > rejected).sum(), chosen.sum(), rejected.sum(),
                                 pi_chosen.detach().sum(), pi_rejected.detach().sum(), *lengths])

        runtime.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf).item()
        means = {name: x / pairs for name, x in zip(LOGGED, runtime.sum(*sums.tolist()), strict=True)}
        if step == 0:
            # before the first update both models are the same, so the loss is known: ln 2, or IPO's target squared
            expected = math.log(2) if args.loss_type == "sigmoid" else (1 / (2 * args.beta)) ** 2
            runtime.print(f"loss at step 0: {means['loss']:.4f}, expected {expected:.4f}")
            exact = runtime.dtype in (torch.float32, torch.float64)
            if abs(means["loss"] - expected) > (1e-3 if exact else 1e-2) * max(1, expected, 10 * args.beta):
                if exact:
                    raise RuntimeError("policy and reference differ before the first update; this is a bug")
                runtime.print(f"warning: policy and reference differ before the first update; the rounding of "
                              f"{str(runtime.dtype)[6:]} does that to long answers. --dtype fp32 shows whether it is "
                              "only that")
        if not nonfinite.skip(step, means["loss"], grad_norm, lr):
            runtime.scaler.step(optimizer)
        runtime.scaler.update()  # also after a skipped step: unscale_ may be called once between two updates
        optimizer.zero_grad(set_to_none=True)
        progress["step"] += 1
        progress["position"] += per_micro_step * args.accumulation_steps
        progress["tokens"] += int(tokens)
        log.count(tokens)
        bar.update()

        # -- log, evaluate, save
        step = progress["step"]
        progress["max_steps"] = bar.total = budget.steps(step, progress["max_steps"], runtime)
        eta.report(step, progress["max_steps"])
        done = step >= progress["max_steps"]
        if step % args.log_interval == 0 or done or step == 1 or nonfinite.in_a_row:
            rate = log.rate()
            margin = means["chosen_reward"] - means["rejected_reward"]
            log.log(step, **means, margin=margin, lr=lr, grad_norm=grad_norm, tokens_per_s=rate,
                    **watch.numbers(grad_norm))
            bar.set_postfix_str(f"loss {means['loss']:.3f}, margin {margin:.2f}, {rate} tok/s")
        if done or (args.eval_interval and step % args.eval_interval == 0):
            result = evaluate(model, held_out, tables["held_out"], args, runtime)
            checked, failures = metrics.check_regression(model, tokenizer, suite, args, runtime, step, done)
            by_kind = {f"val_accuracy_{kind}": value for kind, value in result["accuracy_by_kind"].items()}
            log.log(step, val_loss=result["val_loss"], val_accuracy=result["accuracy"], val_margin=result["margin"],
                    chosen_drift=result["chosen_drift"], rejected_drift=result["rejected_drift"], **by_kind,
                    **checked)
            if runtime.is_main:
                logs.say(f"step {step}: held-out loss {result['val_loss']:.3f}{log.expected(step, 'val_loss')}, "
                         f"{describe(result)}{log.named(step, checked)}")
                for line in warning_lines(result, means["loss"], early=step < progress["max_steps"] / 2):
                    log.log(step, alarm=line)
                for line in failures:
                    logs.say(f"    {line}")
                log.judge()
            measured = {"val_accuracy": result["accuracy"], "val_margin": result["margin"], **checked}
            common.watch_evaluation(runtime, args, progress, result | measured)
            log.rate()  # the evaluation's seconds are not training seconds
        signal = stop.stop(runtime)
        due = args.save_interval and step % args.save_interval == 0 and not nonfinite.in_a_row
        if signal or (due and not done):
            saved = save(finished=False)
        if signal:
            common.leave(runtime, signal, step, saved)

    # -- 8. Final save and summary -------------------------------------------------------------------------------------
    bar.close()
    # a resume with nothing left to train still reports
    result = result or evaluate(model, held_out, tables["held_out"], args, runtime)
    reference = reference or Transformer.from_pretrained(parent).to(runtime.device, model.lm_head.weight.dtype)
    match = {}
    if prompts:
        save(finished=False)  # whatever happens in the match, the training is safe
        match = play(model, reference, tokenizer, prompts, styles, args, runtime)
    final = result | match | {"metric": "implicit accuracy", "before": 0.0, "after": result["accuracy"],
                              "steps": progress["step"], "skipped_steps": nonfinite.total}
    if match:
        final |= {"metric": "rule win rate over the start", "before": 0.5, "after": match["win_rate"]}
    save(finished=True, final=final)
    log.close()
    report.refresh(args.save_dir, runtime.is_main)
    runtime.print(f"done: {args.save_dir}/{args.save_weight}, held-out {describe(result)}. Curves: {folder}/curves.png")
    if match:
        runtime.print(f"against {args.from_weight}, by the rule: win rate {match['win_rate']:.3f} +- "
                      f"{match['win_rate_error']:.3f} (n {match['win_rate_n']}), exact match "
                      f"{match['exact_match_before']:.3f} -> {match['exact_match']:.3f}, sampled at temperature 1")
    runtime.print(f"Next: python eval.py --weight {args.save_weight}{common.in_folder(args)} --stream 1")
    runtime.close()
    return final


def describe(result):
    """One line about evaluate()'s result."""
    kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in result["accuracy_by_kind"].items())
    return (f"implicit accuracy {result['accuracy']:.3f} ({kinds}; n {result['n']}), margin {result['margin']:.2f}, "
            f"log-probs per token chosen {result['chosen_drift']:+.3f}, rejected {result['rejected_drift']:+.3f}")


if __name__ == "__main__":
    common.run(main, parse_args)
