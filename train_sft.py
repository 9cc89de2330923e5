"""Supervised fine-tuning: turn a model that continues text into one that answers.

Objective, over the trained tokens t (assistant text and its end token <|im_end|>) of one optimizer step:
    loss = - sum_t log p(x_t | x_<t) / number of trained tokens
The user's words are context, not targets: the model learns to answer, not to ask. Conversations are packed several to a
row; a document mask keeps them from seeing each other (without it the logits of packed rows are simply wrong).

With --replay_path some rows of every step are pretraining text, whose tokens are all targets. Fine-tuning overwrites
what it does not practise: a model that is only asked about some facts forgets the others; replay keeps them.

Papers: Ouyang et al. 2022 (InstructGPT, arXiv:2203.02155; its section 3.5 mixes pretraining gradients into PPO for the
same reason), Krell et al. 2021 (packing without cross-contamination, arXiv:2107.02027), Robins 1995 (rehearsal against
catastrophic forgetting).

    python train_sft.py --from_weight pretrain --data_path out/data/sft.train.jsonl          # a laptop
    python train_sft.py --from_weight out/pretrain --data_path my/chats.jsonl --epochs 3     # own data, one GPU
    torchrun --nproc_per_node 4 train_sft.py --from_weight pretrain --data_path data/*.jsonl # four GPUs or processes

Letters: B rows, T tokens, V vocabulary.
"""
import contextlib
import math
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import common
import health
import logs
import lora
import metrics
import optim
import report
import sharding
from dataset import PretrainData, PromptData, SFTData, join_windows
from decoding import row_uniforms
from logprobs import token_logprobs
from model import Transformer
from rows import expand_paths, read_rows
from tokenizer import Tokenizer


def parse_args(argv=None):
    """Flags of this stage. The model's shape comes from the weights it starts from."""
    parser = cli.Parser(__doc__)
    cli.data_flags(parser, "out/data/sft.train.jsonl", max_seq_len=256, val_ratio=0.02)
    g = parser.add_argument_group("replay")
    g.add_argument("--replay_path", nargs="+", default=[],
                   help="pretraining files to mix in, so that what they taught is not forgotten")
    g.add_argument("--replay_rows", type=cli.positive(int), default=1,
                   help="rows of that text beside every --batch_size rows of conversations")
    g = parser.add_argument_group("model")
    g.add_argument("--from_weight", default="pretrain",
                   help="checkpoint to start from: name below --save_dir, or folder")
    g.add_argument("--router_aux_loss_coef", type=cli.positive(float, zero=True), default=0.01,
                   help="weight of the balance loss (softmax router)")
    g.add_argument("--router_bias_rate", type=cli.positive(float, zero=True), default=0.001,
                   help="step of the routing bias (router with shared experts)")
    cli.switch(g, "--gradient_checkpointing", 0,
               "recompute activations in the backward pass: less memory, about 30%% slower")
    g.add_argument("--neftune_alpha", type=cli.positive(float, zero=True), default=0.0,
                   help="noise on the embeddings in training, 0 = none; 5 is usual (NEFTune)")
    g = parser.add_argument_group("LoRA")
    g.add_argument("--lora_rank", type=cli.positive(int, zero=True), default=0,
                   help="train adapters of this rank beside frozen weights, 0 = train all weights")
    g.add_argument("--lora_alpha", type=cli.positive(int, zero=True), default=0,
                   help="adapters count alpha / rank times, 0 = twice the rank")
    g.add_argument("--lora_targets", nargs="+", default=[],
                   help="layers to adapt, such as q_proj v_proj; left out: all in the blocks but routed experts")
    g.add_argument("--lora_dropout", type=cli.positive(float, zero=True, below=1), default=0.0,
                   help="share of an adapter's input that is dropped in training")
    cli.switch(g, "--merge", 1, "save the merged model with adapter/ in it; 0: the adapters alone")
    cli.optim_flags(parser, batch_size=8, learning_rate=2e-3, muon_learning_rate=0.01, warmup_steps=0.05,
                    unserved=())
    cli.sharding_flags(parser)
    cli.run_flags(parser, save_weight="sft", eval_interval=250, save_interval=500,
                  watched=("val_loss", "exact_match", "stop_rate", "regression_pass_rate"))
    cli.regression_flags(parser)
    parser.add_argument("--eval_batches", type=cli.positive(int), default=16, help="held-out batches per evaluation")
    parser.add_argument("--eval_prompts", type=cli.positive(int, zero=True), default=600,
                        help="held-out questions for the exact match at the end (before and on the way a fifth)")
    parser.add_argument("--max_new_tokens", type=cli.positive(int), default=64, help="longest answer in evaluations")
    cli.switch(parser, "--use_compile", 0, "torch.compile: 20 s of warm-up, pays back after about 100 steps")
    args = parser.parse_args(argv)
    for flag in ("lora_alpha", "lora_targets", "lora_dropout"):
        if getattr(args, flag) and not args.lora_rank:
            parser.error(f"--{flag} without --lora_rank; there are no adapters when all weights are trained; give both")
    if args.replay_rows != 1 and not args.replay_path:
        parser.error(f"--replay_rows {args.replay_rows} without --replay_path; there is no text to take rows from; "
                     "give both")
    return args


def add_noise(embedding, alpha):
    """NEFTune: in training every vector that the embedding gives gets uniform noise in +-alpha / sqrt(T D), so that
    answers are learnt less word by word. Jain et al. 2023 (arXiv:2310.05914)."""

    def noisy(module, inputs, vectors):  # [B, T, D]
        if not module.training:
            return vectors
        size = alpha / math.sqrt(vectors.shape[1] * vectors.shape[2])
        return vectors + torch.empty_like(vectors).uniform_(-size, size)

    embedding.register_forward_hook(noisy)


def heldout_questions(args, part, shared, runtime):
    """PromptData for the exact match; [], with a line that says why, where no prompt fits into a row: that is no reason
    not to train."""
    if not args.eval_prompts:
        return []
    # without the barrier, at which the other ranks would wait for one that failed: they wait for its word instead
    paths, options, prompts, why = args.val_path or args.data_path, part | shared | {"barrier": None}, None, ""
    if runtime.is_main:
        try:
            prompts = PromptData(paths, **options)
        except ValueError as error:
            why = str(error)
    why = runtime.gather(why)[0]
    if why:
        runtime.print(f"no exact match will be measured: {why}")
        return []
    return prompts or PromptData(paths, **options)


def evaluate_loss(model, data, args, runtime):
    """Held-out loss (nats per trained token) over the first --eval_batches batches, shared by the ranks."""
    count = min(len(data), args.eval_rows)
    starts = runtime.shard(list(range(0, count, args.batch_size)))
    batches = (data.batch(range(i, min(i + args.batch_size, count))) for i in starts)
    part = metrics.heldout_loss(model, batches, runtime.device, runtime.autocast)
    nll, tokens = runtime.sum(part["nll"], part["tokens"])
    return nll / max(tokens, 1)


def answer_questions(model, tokenizer, prompts, count, args, runtime):
    """Greedy answers to `count` held-out questions spread over the file, scored by their check. None without checks.

    Returns: metrics.exact_match's dict with "samples", three (question, answer) pairs; the same on all ranks.
    """
    room = model.config.max_position_embeddings
    items = [item for item in prompts if item["check"] and len(item["ids"]) < room]
    items = metrics.pick(items, count)  # of a smaller count a part of those of a larger one
    if not items:
        return None
    mine = runtime.shard(items)
    with runtime.autocast():
        answers = metrics.complete(model, tokenizer, [i["ids"] for i in mine], args.max_new_tokens, batch_size=64)
    answers = runtime.unshard(answers)
    result = metrics.exact_match(answers, items)
    shown = range(0, len(items), len(items) // 3 + 1)
    result["samples"] = [(items[i]["messages"][-1]["content"], answers[i].text) for i in shown]
    return result


def sampled_gradient(wrapped, batches, position, targets, args, runtime):
    """Sophia's second backward pass: .grad becomes the gradient of the mean loss on labels that the model itself draws
    (Liu et al. 2023, Algorithm 2). Arguments as in main's step; `position` is its first sample."""
    for micro, batch in enumerate(batches):
        ids, mask = batch["ids"].to(runtime.device), batch["mask"].to(runtime.device)  # [B, T], [B, T]
        documents = batch["documents"].to(runtime.device)  # [B, T], -1 on padding
        place = position // args.batch_size + micro * runtime.world_size + runtime.rank
        rows = range(place * len(ids), (place + 1) * len(ids))  # each row has its own draws, on any rank
        last = micro == len(batches) - 1
        with contextlib.nullcontext() if last or runtime.world_size == 1 else wrapped.no_sync():
            with runtime.autocast():
                logits = wrapped(ids, documents=documents)  # [B, T, V]: all of them, there is no target before the draw
            labels = optim.sample_labels(logits, ids, row_uniforms(args.seed, rows, ids.shape[1] - 1))
            nll = -(token_logprobs(logits, labels) * mask[:, 1:]).sum()
            runtime.scaler.scale(nll * (runtime.world_size / max(targets, 1))).backward()


def main(args):
    """Train and return the final metrics. The numbered banners are the same in every training script."""
    # -- 1. Inputs, processes, device, seed ----------------------------------------------------------------------------
    parent = checkpoint.find(args.save_dir, args.from_weight)
    files = expand_paths(args.data_path) + expand_paths(args.val_path) + expand_paths(args.replay_path)
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
    data = SFTData(args.data_path, part="train" if ratio else "all", val_ratio=ratio, **shared)
    held_out = SFTData(args.val_path or args.data_path, part="val" if ratio else "all", val_ratio=ratio, **shared)
    replay = PretrainData(args.replay_path, part="all", **shared) if args.replay_path else None
    prompts = heldout_questions(args, {"part": "val" if ratio else "all", "val_ratio": ratio}, shared, runtime)
    suite = metrics.fixed_prompts(read_rows(args.regression_path)) if args.regression_interval else []
    runtime.print(data.summary())

    # -- 3. Model ------------------------------------------------------------------------------------------------------
    model = Transformer.from_pretrained(parent)
    common.check_vocabulary(model.config, tokenizer, args.from_weight)
    if args.max_seq_len > model.config.max_position_embeddings:
        raise ValueError(f"--max_seq_len {args.max_seq_len} is above the model's max_position_embeddings "
                         f"{model.config.max_position_embeddings}; rows must fit the context; shorten the rows")
    model.gradient_checkpointing = bool(args.gradient_checkpointing)
    zero, fsdp = sharding.modes(args, runtime)
    if args.lora_rank and (zero or fsdp):
        raise ValueError(f"--{'zero' if zero else 'fsdp'} 1 with --lora_rank {args.lora_rank}; adapters have little "
                         "state to share, and their base is whole on every card; leave one of the flags out")
    # FSDP takes the model from main memory block by block: as a whole it need not fit the card
    model = model.to("cpu" if fsdp else runtime.device,
                     torch.float64 if runtime.dtype == torch.float64 else torch.float32)
    if args.neftune_alpha:
        add_noise(model.model.embed_tokens, args.neftune_alpha)
    if fsdp:
        sharding.shard(model, model.model.layers, runtime)
    runtime.print(f"model from {parent}: {model.num_parameters() / 1e6:.2f}M parameters")
    trained = model  # what is saved and resumed
    if args.lora_rank:
        trained = lora.Adapters(model, args.lora_rank, args.lora_alpha or 2 * args.lora_rank, args.lora_targets,
                                args.lora_dropout, parent, args.merge)
        runtime.print(trained.summary())
    if runtime.rank:  # all were seeded alike; from here on each rank draws its own noise and dropout, also on a resume
        torch.manual_seed(args.seed + runtime.rank)

    # -- 4. Optimizer --------------------------------------------------------------------------------------------------
    optimizer = optim.build(model, args.optimizer, args.learning_rate, args.muon_learning_rate, args.weight_decay,
                            dtype=runtime.dtype, zero=zero)
    per_step = args.batch_size * args.accumulation_steps * runtime.world_size
    max_steps = common.count_steps(args, len(data), per_step)
    budget = common.Budget(args.max_minutes)
    nonfinite = common.NonFinite(runtime)
    stop = common.StopSignal()
    eta = common.Eta(runtime)
    runtime.print(common.memory_line(
        runtime, [model], args.batch_size + bool(replay) * args.replay_rows, args.max_seq_len,
        lambda ids: model(ids, documents=torch.zeros_like(ids), target_mask=torch.ones_like(ids), sum_targets=True),
        zero))

    # -- 5. Resume -----------------------------------------------------------------------------------------------------
    # `position` is the number of rows drawn so far by all ranks together: the order does not depend on the rank count
    progress = {"step": 0, "position": 0, "tokens": 0, "max_steps": max_steps, "answered": None}
    if start == "resume":
        state = checkpoint.load_resume(runtime, args)
        sharding.load_full_state(trained, optimizer, state["model"], state["optimizer"], optim.load_state)
        progress |= state["progress"]
        del state  # twice the size of the weights, or more
        if not args.max_minutes and not common.out_of_patience(progress, args):
            # --max_steps, --epochs and what a step draws may be changed on resume
            progress["max_steps"] = common.count_steps(args, len(data), per_step, progress)
        runtime.print(f"resumed at step {progress['step']} of {progress['max_steps']}")
    progress.setdefault("replayed", progress["position"] // args.batch_size * args.replay_rows)  # rows, as `position`
    conditions = checkpoint.conditions(runtime, args, "sft", model.config, [data, held_out, replay], [parent],
                                       progress["max_steps"])
    log = logs.MetricLog(folder, runtime.is_main, progress["step"] if start == "resume" else None,
                         args.tracker, conditions, args.plot_interval)
    watch = health.Watch(model, optimizer, progress, args, runtime, log)
    log.save_json("args.json", vars(args) | {"dtype": str(runtime.dtype)[6:], "threads": runtime.threads})
    log.save_json("dataset_stats.json", {"train": data.stats, "held_out": held_out.stats,
                                         **({"replay": replay.stats} if replay else {})})
    if args.show_batch:
        runtime.print(logs.show_samples(data.samples(progress["position"]), tokenizer))

    def save(finished, final=None):
        """Write out/<save_weight>; called by all ranks at the same step."""
        weights, moments = sharding.full_state(trained, optimizer, runtime)
        state = {"model": weights, "optimizer": moments, "progress": progress}
        facts = {"stage": "sft", "key": key, "parents": [str(parent)], "tokenizer": tokenizer.fingerprint,
                 "data": [str(f) for f in files], "seed": args.seed, "progress": progress, "metrics": final or {},
                 "conditions": conditions}
        holder = model.with_weights(weights) if fsdp and runtime.is_main else trained
        return checkpoint.save(runtime, args, [holder, tokenizer], state, facts, finished)

    # -- 6. Compile and DDP (last, so that everything above sees the plain module) -------------------------------------
    wrapped = model
    ddp = runtime.world_size > 1 and not fsdp
    if ddp:
        device_ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=device_ids)
    if args.use_compile:
        wrapped = torch.compile(wrapped)

    # -- 7. Training loop ----------------------------------------------------------------------------------------------
    per_micro_step = args.batch_size * runtime.world_size
    bar = log.progress(progress["max_steps"], "sft", progress["step"])
    if progress["step"] == 0 or progress["step"] >= progress["max_steps"]:
        val_loss = evaluate_loss(model, held_out, args, runtime)
        count = args.eval_prompts if progress["step"] else -(-args.eval_prompts // 5)
        answered = answer_questions(model, tokenizer, prompts, count, args, runtime)
        if progress["step"] == 0:  # else a resume with nothing left: it only reports
            progress |= {"before": val_loss, "answered": answered and [answered["total"], answered["n"]]}
            checked, _ = metrics.check_regression(model, tokenizer, suite, args, runtime, 0)
            found = {"exact_match": answered["total"], "stop_rate": answered["stop_rate"]} if answered else {}
            common.check_patience(args, {"val_loss": val_loss, **found})
            log.log(0, val_loss=val_loss, **found, **checked)
        log.rate()
    while progress["step"] < progress["max_steps"]:
        step = progress["step"]
        scale = common.lr_scale(step, progress["max_steps"], args.warmup_steps, args.schedule)
        lr = optim.set_lr(optimizer, scale)
        optim.to_gradient_point(optimizer)  # Schedule-Free only; the step, taken or skipped, leads back

        # all micro-batches first: the loss is divided by the trained tokens of the whole step, known only then
        batches = []
        for micro in range(args.accumulation_steps):
            first = progress["position"] + micro * per_micro_step + runtime.rank * args.batch_size
            batches.append(data.batch(data.position_batch(first, args.batch_size)))
            if replay:
                first = progress["replayed"] + (micro * runtime.world_size + runtime.rank) * args.replay_rows
                rows = replay.position_batch(first, args.replay_rows)
                batches[-1] = join_windows(batches[-1], replay.batch(rows))
        targets, tokens = runtime.sum(sum(b["mask"][:, 1:].sum() for b in batches),
                                      sum((b["documents"] >= 0).sum() for b in batches))

        if args.optimizer == "sophia" and step % args.hessian_interval == 0:
            model.eval()  # without dropout, and the router's counts belong to the step itself
            sampled_gradient(wrapped, batches, progress["position"], targets, args, runtime)
            optimizer.update_hessian(targets, runtime.scaler.get_scale())
            optimizer.zero_grad(set_to_none=True)

        model.train()
        nll_sum = balance_sum = 0.0
        for micro, batch in enumerate(batches):
            ids = batch["ids"].to(runtime.device, non_blocking=True)                # [B, T]
            mask = batch["mask"].to(runtime.device, non_blocking=True)              # [B, T], 1 on trained tokens
            documents = batch["documents"].to(runtime.device, non_blocking=True)    # [B, T], -1 on padding
            # with DDP gradients travel between ranks only with the last micro-batch; FSDP sends them after each, for a
            # rank that waited would have to hold those of the whole model
            last = micro == len(batches) - 1
            with contextlib.nullcontext() if last or not ddp else wrapped.no_sync():
                with runtime.autocast():
                    # the sum of the trained tokens' log-probabilities, and the rows' balance [B]
                    logp, balance = wrapped(ids, documents=documents, token_mask=documents >= 0, target_mask=mask,
                                            sum_targets=True, return_balance=True)
                nll = -logp
                # a row's balance counts by its tokens, so that it adds up over micro-batches and ranks as the loss does
                aux = (balance * (documents >= 0).sum(1)).sum()
                # DDP averages over ranks; the factor makes it a sum. max(): a step without targets gives 0, never NaN
                loss = (nll / max(targets, 1) + args.router_aux_loss_coef * aux / max(tokens, 1)) * runtime.world_size
                runtime.scaler.scale(loss).backward()
            nll_sum = nll_sum + nll.detach()
            balance_sum = balance_sum + aux.detach()

        runtime.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        grad_norm = sharding.whole(grad_norm).item()  # with FSDP over the slices of all ranks
        nll_value, balance_value = runtime.sum(nll_sum, balance_sum)
        loss_value = nll_value / max(targets, 1)
        skipped = nonfinite.skip(step, loss_value, grad_norm, lr)
        if not skipped:
            runtime.scaler.step(optimizer)
        # a skipped step moves nothing, but its visits must not count in the next one; with LoRA the base stays as it is
        model.update_router_bias(0.0 if skipped or args.lora_rank else args.router_bias_rate, runtime.reduce)
        runtime.scaler.update()  # also after a skipped step: unscale_ may be called once between two updates
        optimizer.zero_grad(set_to_none=True)
        progress["step"] += 1
        progress["position"] += per_micro_step * args.accumulation_steps
        progress["replayed"] += args.replay_rows * runtime.world_size * args.accumulation_steps
        progress["tokens"] += int(tokens)
        log.count(tokens)
        bar.update()

        # -- log, evaluate, save
        step = progress["step"]
        progress["max_steps"] = bar.total = budget.steps(step, progress["max_steps"], runtime)
        eta.report(step, progress["max_steps"])
        done = step >= progress["max_steps"]
        if step % args.log_interval == 0 or done or step == 1 or nonfinite.in_a_row:
            extra = {"balance": balance_value / max(tokens, 1)} if model.config.num_experts else {}
            rate = log.rate()
            log.log(step, loss=loss_value, lr=lr, grad_norm=grad_norm, tokens_per_s=rate, **extra,
                    **watch.numbers(grad_norm))
            bar.set_postfix_str(f"loss {loss_value:.3f}{log.expected(step, 'loss')}, {rate} tok/s")
        if done or (args.eval_interval and step % args.eval_interval == 0):
            val_loss = evaluate_loss(model, held_out, args, runtime)
            count = args.eval_prompts if done else -(-args.eval_prompts // 5)
            answered = answer_questions(model, tokenizer, prompts, count, args, runtime)
            found = {"exact_match": answered["total"], "stop_rate": answered["stop_rate"]} if answered else {}
            checked, failures = metrics.check_regression(model, tokenizer, suite, args, runtime, step, done)
            found |= checked
            log.log(step, val_loss=val_loss, **found)
            if runtime.is_main:
                logs.say(f"step {step}: held-out loss {val_loss:.3f}{log.expected(step, 'val_loss')}"
                         f"{log.named(step, found)}")
                for question, answer in answered["samples"] if answered else []:
                    logs.say(f"    {question!r} >> {answer!r}")
                for line in failures:
                    logs.say(f"    {line}")
                log.judge()
            common.watch_evaluation(runtime, args, progress, {"val_loss": val_loss, **found})
            log.rate()  # the evaluation's seconds are not training seconds
        signal = stop.stop(runtime)
        due = args.save_interval and step % args.save_interval == 0 and not nonfinite.in_a_row
        if signal or (due and not done):
            saved = save(finished=False)
        if signal:
            common.leave(runtime, signal, step, saved)

    # -- 8. Final save and summary -------------------------------------------------------------------------------------
    bar.close()
    final = {"metric": "held-out loss", "before": progress["before"], "after": val_loss, "val_loss": val_loss,
             "steps": progress["step"], "skipped_steps": nonfinite.total}
    score = ""
    if answered:
        final |= {"exact_match": answered["total"],
                  **{name: answered[name] for name in ("stop_rate", "n", "by_skill", "by_lang")}}
        score = f", exact match {answered['total']:.3f} of {answered['n']} questions"
    if answered and progress["answered"]:  # not where questions came in with a resume
        total, n = progress["answered"]
        final |= {"metric": "held-out exact match", "before": total, "after": answered["total"]}
        score += f" (before {total:.3f} of {n})"
    save(finished=True, final=final)
    log.close()
    report.refresh(args.save_dir, runtime.is_main)
    runtime.print(f"done: {args.save_dir}/{args.save_weight}, held-out loss {val_loss:.3f}{score}. Curves: "
                  f"{folder}/curves.png. Next: python eval.py --weight {args.save_weight}{common.in_folder(args)} "
                  "--stream 1")
    runtime.close()
    return final


if __name__ == "__main__":
    common.run(main, parse_args)
