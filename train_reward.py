"""Reward model: learn from pairs of answers which one people prefer, as one number per answer.

A scalar head reads the final hidden state (after the backbone's one final norm) at the last real token of prompt plus
answer. Bradley and Terry: p(chosen beats rejected) = sigmoid(s_chosen - s_rejected), so over the N pairs of one
optimizer step (all micro-batches, all ranks)
    loss = mean_n [ -log sigmoid(s_chosen - s_rejected - margin) + center_coef * (s_chosen + s_rejected)^2 ]
The first term only fixes differences; the second keeps the level of the scores near 0. Mean and standard deviation of
the scores go into minillm.json, so that train_ppo.py can put rewards of any reward model on one scale.

What to watch: the accuracy per kind of error. Style is easy; "wrong" (a false answer in a good style) needs the model
to know the answer, and a reward model that is blind there is what PPO will exploit. Ties count as wrong. What the
backbone expects of the next token is finished in its last block, too late to be compared with the token that came: a
shallow model gains by --extra_layers, new blocks on top, and may then keep the backbone as it is (--freeze_backbone 1).

Papers: Ouyang et al. 2022 (InstructGPT, arXiv:2203.02155), Stiennon et al. 2020 (arXiv:2009.01325), Eisenstein et al.
2023 (centring, arXiv:2312.09244), Wu et al. 2024 (new blocks, arXiv:2401.02415).

    python train_reward.py --from_weight sft                                                  # a laptop
    python train_reward.py --from_weight out/sft --data_path my/pairs.jsonl --val_ratio 0.05  # own data, one GPU
    torchrun --nproc_per_node 4 train_reward.py --from_weight sft --data_path data/*.jsonl    # four GPUs or processes

Letters: B pairs, T tokens, N held-out pairs.
"""
import contextlib
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
from model import ScalarHead
from rows import expand_paths
from tokenizer import Tokenizer


def parse_args(argv=None):
    """Flags of this stage. The backbone's shape comes from the weights it starts from."""
    parser = cli.Parser(__doc__)
    cli.data_flags(parser, "out/data/preference.train.jsonl", max_seq_len=256, val_ratio=0.05)
    g = parser.add_argument_group("model")
    g.add_argument("--from_weight", default="sft", help="checkpoint to start from: name below --save_dir, or folder")
    g.add_argument("--extra_layers", type=cli.positive(int, zero=True), default=0,
                   help="new blocks on top of the backbone; 2 help a shallow one to see what is wrong")
    cli.switch(g, "--freeze_backbone", 0, "train the head and new blocks only: shows what the backbone already knows")
    g = parser.add_argument_group("loss")
    g.add_argument("--margin", type=cli.positive(float, zero=True), default=0.0,
                   help="score difference a pair must have before its loss falls below ln 2")
    g.add_argument("--center_coef", type=cli.positive(float, zero=True), default=0.001,
                   help="weight of the term that keeps scores near 0")
    cli.optim_flags(parser, batch_size=32, learning_rate=3e-4, muon_learning_rate=1e-3, warmup_steps=0.05,
                    optimizer="adamw")
    cli.run_flags(parser, save_weight="reward", eval_interval=100, save_interval=200,
                  watched=("val_loss", "val_accuracy"))
    parser.add_argument("--eval_batches", type=cli.positive(int), default=64, help="held-out batches per evaluation")
    cli.switch(parser, "--use_compile", 0, "torch.compile: 20 s of warm-up, pays back after about 100 steps")
    return parser.parse_args(argv)


def pairwise_loss(chosen, rejected, margin=None, center_coef=0.0):
    """Mean Bradley-Terry loss of pairs; ln 2 when all scores are equal (and margin is 0).

    Args:
        chosen, rejected: scores [B] of the two answers to the same prompt.
        margin: number or [B], the difference asked for (None = 0).
        center_coef: weight of (chosen + rejected)^2.
    Returns: scalar, at least fp32.
    """
    if chosen.dtype in (torch.float16, torch.bfloat16):
        chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected if margin is None else chosen - rejected - margin    # [B]
    # logsigmoid is log(sigmoid(x)) without the overflow of exp and without log(0)
    return (center_coef * (chosen + rejected) ** 2 - F.logsigmoid(difference)).mean()


class PackedScores(torch.nn.Module):
    """A ScalarHead over packed rows. Its own module, because what carries the loss must be what DDP wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, documents, ends):
        """ids and documents [R, T], ends [2B] from pack_batch() -> scores [2B], at least fp32."""
        h, _ = self.model.model(ids, documents=documents)                       # [R, T, D]
        h = h.flatten(0, 1)[ends]                                               # [2B, D], the last real tokens
        with torch.autocast(h.device.type, enabled=False):
            # in bf16 close scores would become equal
            return self.model.score(h.to(self.model.score.weight.dtype)).squeeze(1)


@torch.no_grad()
def evaluate(model, data, args, runtime):
    """Score the first --eval_batches held-out batches, shared by the ranks.

    Returns: dict of val_loss, accuracy, accuracy_by_kind, length_correlation (of score and answer length: a reward
        model that only counts words shows here), score_mean and score_std (over both answers), n.
    """
    count = min(len(data), args.eval_rows)
    share = []
    for i in runtime.shard(list(range(0, count, args.batch_size))):
        batch = data.batch(range(i, min(i + args.batch_size, count)))
        ids, _, documents, ends = pack_batch(batch, runtime.device)
        with runtime.autocast():
            scores = PackedScores(model)(ids, documents, ends)                  # [2B]
        lengths = batch["mask"].sum(1)                                          # [2B]
        columns = [*scores.float().cpu().chunk(2), *lengths.chunk(2)]           # four of [B]
        share.append(list(zip(*(c.tolist() for c in columns), batch["kind"], strict=True)))
    rows = [row for batch in runtime.unshard(share) for row in batch]
    chosen, rejected, chosen_length, rejected_length, kinds = (list(column) for column in zip(*rows, strict=True))
    scores = np.array(chosen + rejected)                                        # [2N]
    loss = pairwise_loss(torch.tensor(chosen), torch.tensor(rejected), args.margin, args.center_coef)
    return {"val_loss": loss.item(), **metrics.pair_accuracy(chosen, rejected, kinds),
            "length_correlation": metrics.length_correlation(scores, chosen_length + rejected_length),
            "score_mean": float(scores.mean()), "score_std": float(scores.std())}


def main(args):
    """Train and return the final metrics. The numbered banners are the same in every training script."""
    # -- 1. Inputs, processes, device, seed ----------------------------------------------------------------------------
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
    runtime.print(data.summary())

    # -- 3. Model ------------------------------------------------------------------------------------------------------
    model = ScalarHead.from_pretrained(parent)  # refuses a backbone with shared experts, and says what to do
    common.check_vocabulary(model.config, tokenizer, args.from_weight)
    if args.max_seq_len > model.config.max_position_embeddings:
        raise ValueError(f"--max_seq_len {args.max_seq_len} is above the model's max_position_embeddings "
                         f"{model.config.max_position_embeddings}; rows must fit the context; shorten the rows")
    if args.freeze_backbone:
        model.model.requires_grad_(False)
    model.deepen(args.extra_layers)
    model = model.to(runtime.device, torch.float64 if runtime.dtype == torch.float64 else torch.float32)
    runtime.print(f"model from {parent}: {sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f}M "
                  "trainable parameters")

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
        runtime, [model], 2 * args.batch_size, args.max_seq_len,
        lambda ids: PackedScores(model)(ids, torch.zeros_like(ids), torch.zeros_like(ids[:, 0]))))

    # -- 5. Resume -----------------------------------------------------------------------------------------------------
    # `position` is the number of pairs drawn so far by all ranks together: the order does not depend on the rank count
    progress = {"step": 0, "position": 0, "tokens": 0, "max_steps": max_steps}
    if start == "resume":
        state = checkpoint.load_resume(runtime, args)
        model.load_state_dict(state["model"])
        optim.load_state(optimizer, state["optimizer"])
        progress |= state["progress"]
        model.score_mean, model.score_std = progress.get("scale", (0.0, 1.0))
        if not args.max_minutes and not common.out_of_patience(progress, args):
            # --max_steps, --epochs and what a step draws may be changed on resume
            progress["max_steps"] = common.count_steps(args, len(data), per_step, progress)
        runtime.print(f"resumed at step {progress['step']} of {progress['max_steps']}")
    conditions = checkpoint.conditions(runtime, args, "reward", model.config, [data, held_out], [parent],
                                       progress["max_steps"])
    log = logs.MetricLog(folder, runtime.is_main, progress["step"] if start == "resume" else None,
                         args.tracker, conditions, args.plot_interval)
    watch = health.Watch(model, optimizer, progress, args, runtime, log)
    log.save_json("args.json", vars(args) | {"dtype": str(runtime.dtype)[6:], "threads": runtime.threads})
    log.save_json("dataset_stats.json", {"train": data.stats, "held_out": held_out.stats})
    if args.show_batch:
        # of each answer only the last token is scored
        ends = [(title, ids, [0] * (len(ids) - 1) + [1]) for title, ids, _ in data.samples(progress["position"])]
        runtime.print(logs.show_samples(ends, tokenizer, "scored?", targets=False))

    def save(finished, final=None):
        """Write out/<save_weight>; called by all ranks at the same step."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress}
        facts = {"stage": "reward", "key": key, "parents": [str(parent)], "tokenizer": tokenizer.fingerprint,
                 "data": [str(f) for f in files], "seed": args.seed, "progress": progress, "metrics": final or {},
                 "conditions": conditions,
                 "score_mean": model.score_mean, "score_std": model.score_std}
        return checkpoint.save(runtime, args, [model, tokenizer], state, facts, finished)

    # -- 6. Compile and DDP (last, so that everything above sees the plain module) -------------------------------------
    wrapped = PackedScores(model)
    if runtime.world_size > 1:
        device_ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=device_ids)
    if args.use_compile:
        wrapped = torch.compile(wrapped)

    # -- 7. Training loop ----------------------------------------------------------------------------------------------
    per_micro_step = args.batch_size * runtime.world_size
    bar = log.progress(progress["max_steps"], "reward", progress["step"])
    result = None
    if progress["step"] == 0:
        before = evaluate(model, held_out, args, runtime)
        progress["before"] = before["accuracy"]
        log.log(0, val_loss=before["val_loss"], val_accuracy=before["accuracy"])
        log.rate()
    while progress["step"] < progress["max_steps"]:
        step = progress["step"]
        scale = common.lr_scale(step, progress["max_steps"], args.warmup_steps, args.schedule)
        lr = optim.set_lr(optimizer, scale)
        optim.to_gradient_point(optimizer)  # Schedule-Free only; the step, taken or skipped, leads back

        batches = []
        for micro in range(args.accumulation_steps):
            first = progress["position"] + micro * per_micro_step + runtime.rank * args.batch_size
            batches.append(data.batch(data.position_batch(first, args.batch_size)))
        pairs, tokens = runtime.sum(sum(len(b["kind"]) for b in batches), sum(b["lengths"].sum() for b in batches))

        model.eval()  # no dropout from here on: noise in a score would be noise in the reward
        sums = torch.zeros(3, device=runtime.device)
        for micro, batch in enumerate(batches):
            ids, _, documents, ends = pack_batch(batch, runtime.device)         # [R, T], mask unused, [R, T], [2B]
            # gradients travel between ranks only with the last micro-batch
            last = micro == len(batches) - 1
            with contextlib.nullcontext() if last or runtime.world_size == 1 else wrapped.no_sync():
                with runtime.autocast():
                    scores = wrapped(ids, documents, ends)                      # [2B], chosen first, then rejected
                chosen, rejected = scores.chunk(2)                              # [B], [B]
                loss_sum = pairwise_loss(chosen, rejected, args.margin, args.center_coef) * len(chosen)
                # DDP averages over ranks; the factor makes it a sum, and the division by all pairs makes that the mean
                runtime.scaler.scale(loss_sum * (runtime.world_size / pairs)).backward()
            sums += torch.stack([loss_sum, (chosen > rejected).sum(), (chosen - rejected).sum()]).detach()

        runtime.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf).item()
        loss_value, accuracy, margin = (x / pairs for x in runtime.sum(*sums.tolist()))
        if not nonfinite.skip(step, loss_value, grad_norm, lr):
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
            log.log(step, loss=loss_value, accuracy=accuracy, margin=margin, lr=lr, grad_norm=grad_norm,
                    tokens_per_s=rate, **watch.numbers(grad_norm))
            bar.set_postfix_str(f"loss {loss_value:.3f}, accuracy {accuracy:.2f}, {rate} tok/s")
        if done or (args.eval_interval and step % args.eval_interval == 0):
            result = evaluate(model, held_out, args, runtime)
            model.score_mean, model.score_std = progress["scale"] = result["score_mean"], result["score_std"]
            by_kind = {f"val_accuracy_{kind}": value for kind, value in result["accuracy_by_kind"].items()}
            log.log(step, val_loss=result["val_loss"], val_accuracy=result["accuracy"], **by_kind,
                    length_correlation=result["length_correlation"])
            if runtime.is_main:
                logs.say(f"step {step}: held-out loss {result['val_loss']:.3f}{log.expected(step, 'val_loss')}, "
                         f"{describe(result)}")
                log.judge()
            common.watch_evaluation(runtime, args, progress, result | {"val_accuracy": result["accuracy"]})
            log.rate()  # the evaluation's seconds are not training seconds
        signal = stop.stop(runtime)
        due = args.save_interval and step % args.save_interval == 0 and not nonfinite.in_a_row
        if signal or (due and not done):
            saved = save(finished=False)
        if signal:
            common.leave(runtime, signal, step, saved)

    # -- 8. Final save and summary -------------------------------------------------------------------------------------
    bar.close()
    result = result or evaluate(model, held_out, args, runtime)  # a resume with nothing left to train still reports
    model.score_mean, model.score_std = result["score_mean"], result["score_std"]
    final = result | {"metric": "held-out pair accuracy", "before": progress["before"], "after": result["accuracy"],
                      "steps": progress["step"], "skipped_steps": nonfinite.total}
    save(finished=True, final=final)
    log.close()
    report.refresh(args.save_dir, runtime.is_main)
    runtime.print(f"done: {args.save_dir}/{args.save_weight}, held-out loss {result['val_loss']:.3f}, "
                  f"{describe(result)}. Curves: {folder}/curves.png")
    runtime.print(advice(result, args))
    runtime.close()
    return final


def describe(result):
    """One line about evaluate()'s result."""
    kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in result["accuracy_by_kind"].items())
    return (f"pair accuracy {result['accuracy']:.3f} ({kinds}; n {result['n']}), "
            f"correlation of score and length {result['length_correlation']:+.2f}")


def advice(result, args):
    """What the accuracies mean for the next stage, as the last printed line."""
    if result["accuracy"] < 0.55:
        return ("near chance: PPO would refuse this reward model. Usual causes: too few steps (--epochs), a rate far "
                "off (--learning_rate), chosen and rejected swapped in the data")
    weak = [kind for kind, value in result["accuracy_by_kind"].items() if value < 0.6]
    hint = f"blind to: {', '.join(weak)}; watch exact match beside the reward. " if weak else ""
    return (f"{hint}Next: python train_ppo.py --from_weight {args.from_weight} --reward_weight {args.save_weight}"
            f"{common.in_folder(args)}")


if __name__ == "__main__":
    common.run(main, parse_args)
