"""Pretraining: learn to predict the next token of plain text.

Objective, over all target tokens t of one optimizer step (all micro-batches, all ranks):
    loss = - sum_t log p(x_t | x_<t) / number of targets          (nats per token; ln(vocabulary) before training)
Text is compared in bits per byte, loss * tokens / (ln 2 * bytes), because a loss per token depends on the tokenizer.

What is here: packed windows in random order, bf16 autocast, Muon, accumulation, DDP, exact resume. What is not: the
data format (dataset.py), the optimizer's mathematics (optim.py), ZeRO and FSDP (sharding.py).

Papers: Vaswani et al. 2017 (arXiv:1706.03762), Radford et al. 2019 (GPT-2), Yang et al. 2025 (Qwen3, arXiv:2505.09388),
Li et al. 2021 (shorter rows at first, arXiv:2108.06084), Bu 2025 (fewer blocks at first, arXiv:2511.04981).

    python train_pretrain.py --preset nano --data_path out/data/pretrain.train.jsonl       # a laptop
    python train_pretrain.py --preset small --data_path "data/*.jsonl.gz" --epochs 2       # one GPU
    torchrun --nproc_per_node 4 train_pretrain.py --preset base --data_path data/*.jsonl   # four GPUs, or CPU processes

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
import metrics
import optim
import report
import sharding
from configuration import MOE_BLOCK, PRESETS, ModelConfig
from dataset import PretrainData
from decoding import row_uniforms
from logprobs import token_logprobs
from model import Transformer
from rows import expand_paths
from tokenizer import Tokenizer


def parse_args(argv=None):
    """Flags of this stage. The recipe's numbers are the defaults; docs/results.md says what they were measured
    against."""
    parser = cli.Parser(__doc__)
    cli.data_flags(parser, "out/data/pretrain.train.jsonl", max_seq_len=256, val_ratio=0.01)
    g = parser.add_argument_group("model")
    g.add_argument("--tokenizer", help="folder with tokenizer.json (default: out/tokenizer)")
    g.add_argument("--from_weight", default="",
                   help="go on training this checkpoint (name below --save_dir, or folder); sets shape and tokenizer")
    g.add_argument("--preset", choices=sorted(PRESETS),
                   help="shape; the flags below change single fields of it (default: small)")
    g.add_argument("--hidden_size", type=cli.positive(int), help="width (preset's)")
    g.add_argument("--num_hidden_layers", type=cli.positive(int), help="blocks (preset's)")
    g.add_argument("--num_attention_heads", type=cli.positive(int), help="query heads (preset's)")
    g.add_argument("--num_key_value_heads", type=cli.positive(int), help="key and value heads (preset's)")
    g.add_argument("--intermediate_size", type=cli.positive(int), help="width inside the MLP (preset's)")
    g.add_argument("--max_position_embeddings", type=cli.positive(int),
                   help="longest context the model allows (preset's)")
    g.add_argument("--dropout", type=cli.positive(float, zero=True),
                   help="dropout on attention and residuals (preset's)")
    cli.switch(g, "--use_moe", None,
               "mixture of experts with a shared expert instead of the MLP, at the chosen width (default: 0)")
    g.add_argument("--num_experts", type=cli.positive(int), help="routed experts (4 with --use_moe)")
    g.add_argument("--num_experts_per_tok", type=cli.positive(int), help="routed experts a token visits")
    g.add_argument("--n_shared_experts", type=cli.positive(int, zero=True),
                   help="experts every token visits; 0 = Qwen3Moe's softmax router")
    g.add_argument("--router_aux_loss_coef", type=cli.positive(float, zero=True), default=0.01,
                   help="weight of the balance loss (softmax router)")
    g.add_argument("--router_bias_rate", type=cli.positive(float, zero=True), default=0.001,
                   help="step of the routing bias (router with shared experts)")
    cli.switch(g, "--gradient_checkpointing", 0,
               "recompute activations in the backward pass: less memory, about 30%% slower")
    cli.optim_flags(parser, batch_size=8, learning_rate=4e-3, muon_learning_rate=0.01, warmup_steps=0.1,
                    unserved=(), beside_muon=1.2e-2)
    cli.sharding_flags(parser)
    cli.run_flags(parser, save_weight="pretrain", eval_interval=250, save_interval=500,
                  watched=("val_loss", "bits_per_byte"))
    parser.add_argument("--length_warmup", type=cli.positive(float, zero=True, below=1.001), default=0.0,
                        help="share of the steps in which rows are shorter, 1/8 of --max_seq_len at first; 0 = none. "
                             "Better bits per byte in short runs, worse at looking things up in a text")
    parser.add_argument("--depth_warmup", type=cli.positive(float, zero=True, below=1.001), default=0.0,
                        help="share of the steps in which only the lower half of the blocks is trained, which saves "
                             "up to half of a step's time; 0 = none. Goes with --schedule wsd")
    parser.add_argument("--eval_batches", type=cli.positive(int), default=32, help="held-out batches per evaluation")
    cli.switch(parser, "--use_compile", 0, "torch.compile: 20 s of warm-up, pays back after about 100 steps")
    args = parser.parse_args(argv)
    for flag, default in {"preset": "small", "tokenizer": "out/tokenizer", "use_moe": 0}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif args.from_weight:
            parser.error(f"--{flag} {getattr(args, flag)} with --from_weight {args.from_weight}; shape and tokenizer "
                         f"come from the weights; leave --{flag} out")
    return args


def given_shape(args):
    """The shape flags that were given, as a dict."""
    fields = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
              "dropout", "max_position_embeddings", "num_experts", "num_experts_per_tok", "n_shared_experts"]
    return {name: getattr(args, name) for name in fields if getattr(args, name) is not None}


def build_config(args, tokenizer):
    """ModelConfig from preset, single fields and tokenizer. Flags that were not given keep the preset's value."""
    given = given_shape(args)
    if args.use_moe and args.preset != "moe":
        given = MOE_BLOCK | given
    return ModelConfig.preset(args.preset, vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id,
                              eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, **given)


def check_shape(args, config):
    """Raise ValueError when a flag contradicts the model: its shape, where it comes from weights, or its context."""
    for name, value in given_shape(args).items() if args.from_weight else ():
        if value != getattr(config, name):
            raise ValueError(f"--{name} {value} with --from_weight {args.from_weight}, which has "
                             f"{getattr(config, name)}; the shape comes from the weights; leave the flag out")
    if args.max_seq_len > config.max_position_embeddings:
        raise ValueError(f"--max_seq_len {args.max_seq_len} is above max_position_embeddings "
                         f"{config.max_position_embeddings}; rows must fit the context; shorten the rows, or train a "
                         "model with a larger --max_position_embeddings")


def check_growth(args, model):
    """Raise ValueError when --depth_warmup cannot leave blocks out: unless they are the identity the model would jump
    when they join, FSDP expects gradients of all, and two optimizers keep averages that belong to every step."""
    other = "--fsdp 1" if args.fsdp else f"--optimizer {args.optimizer}"
    if args.depth_warmup and (args.fsdp or args.optimizer in ("sophia", "schedulefree")):
        raise ValueError(f"--depth_warmup {args.depth_warmup} with {other}; blocks that join later have no gradient "
                         "until then; leave one of the two out")
    left_out = model.model.layers[trained_blocks(0, args.depth_warmup, len(model.model.layers)):]
    if any(p.any() for name, p in left_out.named_parameters() if name.endswith(("o_proj.weight", "down_proj.weight"))):
        raise ValueError(f"--depth_warmup {args.depth_warmup} with --from_weight {args.from_weight}; blocks that join "
                         "later must not have been trained before; leave --depth_warmup out")


def smaller_preset(model, tokens):
    """(name, its share of this model's operations per token) of the next preset with fewer operations and parameters;
    None below the smallest. `tokens`: length of a row."""
    shares = {}
    for name in PRESETS:
        with torch.device("meta"):  # shapes only: neither memory nor random numbers
            other = Transformer(ModelConfig.preset(name, vocab_size=model.config.vocab_size))
        if other.num_parameters() < model.num_parameters():
            shares[name] = other.flops_per_token(tokens) / model.flops_per_token(tokens)
    return max((item for item in shares.items() if item[1] < 0.9), key=lambda item: item[1], default=None)


def row_parts(done, share):
    """How many rows are read in place of one when `done` of the run (0 to 1) is over: 8, then 4, then 2, for a third of
    `share` each, then 1. They are as many times shorter, so a step has the same number of tokens from more places."""
    return 1 if done >= share else 8 >> int(3 * done / share)


def trained_blocks(done, share, blocks):
    """How many blocks, from the bottom, run when `done` of the run (0 to 1) is over: half of them until `share`, then
    all. A block that has not been trained is the identity (model.initialize), so nothing jumps when it joins."""
    return blocks if done >= share else max(1, blocks // 2)


def mean_cost(model, args):
    """How many times the operations of the first step one of the run has in the mean: rows get longer, blocks join."""
    blocks, head = model.config.num_hidden_layers, 6 * model.config.vocab_size * model.config.hidden_size

    def cost(done):
        whole = model.flops_per_token(args.max_seq_len // row_parts(done, args.length_warmup))
        return head + (whole - head) * trained_blocks(done, args.depth_warmup, blocks) / blocks

    return sum(cost(i / 100) for i in range(100)) / 100 / cost(0)


def evaluate(model, data, args, runtime):
    """Held-out loss (nats per token) and bits per byte over the first --eval_batches batches, shared by the ranks."""
    count = min(len(data), args.eval_rows)
    starts = runtime.shard(list(range(0, count, args.batch_size)))
    batches = (data.batch(range(i, min(i + args.batch_size, count))) for i in starts)
    part = metrics.heldout_loss(model, batches, runtime.device, runtime.autocast)
    nll, tokens, size = runtime.sum(part["nll"], part["tokens"], part["bytes"])
    return nll / max(tokens, 1), nll / math.log(2) / max(size, 1)


def sampled_gradient(wrapped, batches, position, targets, args, runtime):
    """Sophia's second backward pass: .grad becomes the gradient of the mean loss on labels that the model itself draws
    (Liu et al. 2023, Algorithm 2). Arguments as in main's step; `position` is its first sample."""
    for micro, batch in enumerate(batches):
        ids, mask = batch["ids"].to(runtime.device), batch["mask"].to(runtime.device)  # [B, T], [B, T]
        first = position + (micro * runtime.world_size + runtime.rank) * len(ids)
        rows = range(first, first + len(ids))  # each row has its own draws, on any rank
        last = micro == len(batches) - 1
        with contextlib.nullcontext() if last or runtime.world_size == 1 else wrapped.no_sync():
            with runtime.autocast():
                logits = wrapped(ids)  # [B, T, V]: all of them, there is no target before the draw
            labels = optim.sample_labels(logits, ids, row_uniforms(args.seed, rows, ids.shape[1] - 1))
            nll = -(token_logprobs(logits, labels) * mask[:, 1:]).sum()
            runtime.scaler.scale(nll * (runtime.world_size / max(targets, 1))).backward()


def main(args):
    """Train and return the final metrics. The numbered banners are the same in every training script."""
    # -- 1. Inputs, processes, device, seed ----------------------------------------------------------------------------
    parent = checkpoint.find(args.save_dir, args.from_weight) if args.from_weight else None
    files = expand_paths(args.data_path) + expand_paths(args.val_path)
    origin = [parent] if parent else []
    tokenizer = Tokenizer.from_pretrained(parent or args.tokenizer)
    key = checkpoint.stage_key(args, [*files, Path(parent or args.tokenizer) / "tokenizer.json"], origin)
    runtime = common.setup(args, checkpoint.earlier_choice(args, key))
    folder = Path(args.save_dir) / "logs" / args.save_weight

    # -- 2. Data -------------------------------------------------------------------------------------------------------
    start = checkpoint.begin(runtime, args, key)
    if start == "skip":
        return checkpoint.read_minillm(Path(args.save_dir) / args.save_weight)["metrics"]
    shared = dict(tokenizer=tokenizer, max_seq_len=args.max_seq_len, cache_dir=args.cache_dir, seed=args.seed,
                  skip_bad=args.skip_bad, is_main=runtime.is_main, barrier=runtime.barrier)
    ratio = 0.0 if args.val_path else args.val_ratio
    data = PretrainData(args.data_path, part="train" if ratio else "all", val_ratio=ratio, **shared)
    held_out = PretrainData(args.val_path or args.data_path, part="val" if ratio else "all", val_ratio=ratio, **shared)
    runtime.print(data.summary())
    lengths = {parts: data.of_length(args.max_seq_len // parts) for parts in (1, 2, 4, 8)}  # row_parts() -> windows

    # -- 3. Model ------------------------------------------------------------------------------------------------------
    model = Transformer.from_pretrained(parent) if parent else Transformer(build_config(args, tokenizer))
    check_shape(args, model.config)
    check_growth(args, model)
    common.check_vocabulary(model.config, tokenizer, args.from_weight)
    model.gradient_checkpointing = bool(args.gradient_checkpointing)
    zero, fsdp = sharding.modes(args, runtime)
    # FSDP takes the model from main memory block by block: as a whole it need not fit the card
    model = model.to("cpu" if fsdp else runtime.device,
                     torch.float64 if runtime.dtype == torch.float64 else torch.float32)
    if fsdp:
        sharding.shard(model, model.model.layers, runtime)
    source = f"from {parent}" if parent else args.preset
    runtime.print(f"model {source}: {model.num_parameters() / 1e6:.2f}M parameters, "
                  f"{model.flops_per_token(args.max_seq_len) / 1e6:.0f} MFLOP a token")
    if runtime.rank:  # all were seeded alike; from here on each rank draws its own dropout, also on a resume
        torch.manual_seed(args.seed + runtime.rank)

    # -- 4. Optimizer --------------------------------------------------------------------------------------------------
    optimizer = optim.build(model, args.optimizer, args.learning_rate, args.muon_learning_rate, args.weight_decay,
                            (args.adam_beta1, 0.95), dtype=runtime.dtype, zero=zero,
                            embedding_decay=args.embedding_decay)
    per_step = args.batch_size * args.accumulation_steps * runtime.world_size
    max_steps = common.count_steps(args, len(data), per_step)
    budget = common.Budget(args.max_minutes, slower=mean_cost(model, args))
    nonfinite = common.NonFinite(runtime)
    stop = common.StopSignal()
    eta = common.Eta(runtime, lambda: smaller_preset(model, args.max_seq_len))
    runtime.print(common.memory_line(
        runtime, [model], args.batch_size, args.max_seq_len,
        lambda ids: model(ids, target_mask=torch.ones_like(ids), sum_targets=True), zero))

    # -- 5. Resume -----------------------------------------------------------------------------------------------------
    # `position` is the number of samples drawn so far by all ranks together: the order is a function of it, not of
    # the rank count
    progress = {"step": 0, "position": 0, "tokens": 0, "max_steps": max_steps, "blocks": 0}
    if start == "resume":
        state = checkpoint.load_resume(runtime, args)
        sharding.load_full_state(model, optimizer, state["model"], state["optimizer"], optim.load_state)
        progress |= state["progress"]
        del state  # twice the size of the weights, or more
        if not args.max_minutes and not common.out_of_patience(progress, args):
            # --max_steps, --epochs and what a step draws may be changed on resume
            progress["max_steps"] = common.count_steps(args, len(data), per_step, progress)
        runtime.print(f"resumed at step {progress['step']} of {progress['max_steps']}")
    conditions = checkpoint.conditions(runtime, args, "pretrain", model.config, [data, held_out], origin,
                                       progress["max_steps"])
    log = logs.MetricLog(folder, runtime.is_main, progress["step"] if start == "resume" else None,
                         args.tracker, conditions, args.plot_interval)
    watch = health.Watch(model, optimizer, progress, args, runtime, log)
    log.save_json("args.json", vars(args) | {"dtype": str(runtime.dtype)[6:], "threads": runtime.threads})
    log.save_json("dataset_stats.json", {"train": data.stats, "held_out": held_out.stats})
    if args.show_batch:
        runtime.print(logs.show_samples(data.samples(progress["position"]), tokenizer))

    def save(finished, final=None):
        """Write out/<save_weight>; called by all ranks at the same step."""
        weights, moments = sharding.full_state(model, optimizer, runtime)
        state = {"model": weights, "optimizer": moments, "progress": progress}
        facts = {"stage": "pretrain", "key": key, "parents": [str(p) for p in origin],
                 "tokenizer": tokenizer.fingerprint, "data": [str(f) for f in files], "seed": args.seed,
                 "progress": progress, "metrics": final or {}, "conditions": conditions}
        holder = model.with_weights(weights) if fsdp and runtime.is_main else model
        return checkpoint.save(runtime, args, [holder, tokenizer], state, facts, finished)

    # -- 6. Compile and DDP (last, so that everything above sees the plain module) -------------------------------------
    wrapped = model
    ddp = runtime.world_size > 1 and not fsdp
    if ddp:
        wrapped = DistributedDataParallel(model, device_ids=[runtime.local_rank] if runtime.device.type == "cuda"
                                          else None, find_unused_parameters=args.depth_warmup > 0)
    if args.use_compile:
        wrapped = torch.compile(wrapped)

    # -- 7. Training loop ----------------------------------------------------------------------------------------------
    per_micro_step = args.batch_size * runtime.world_size
    bar = log.progress(progress["max_steps"], "pretrain", progress["step"])
    if progress["step"] == 0 or progress["step"] >= progress["max_steps"]:
        val_loss, bits = evaluate(model, held_out, args, runtime)
        if progress["step"] == 0:  # else a resume with nothing left: it only reports
            progress["before"] = bits
            log.log(0, val_loss=val_loss, bits_per_byte=bits)
        log.rate()
    while progress["step"] < progress["max_steps"]:
        step = progress["step"]
        scale = common.lr_scale(step, progress["max_steps"], args.warmup_steps, args.schedule)
        lr = optim.set_lr(optimizer, scale)
        optim.to_gradient_point(optimizer)  # Schedule-Free only; the step, taken or skipped, leads back

        # never fewer than before, should --max_minutes or a resume have moved the end away
        progress["blocks"] = model.model.depth = max(progress["blocks"], trained_blocks(
            step / progress["max_steps"], args.depth_warmup, model.config.num_hidden_layers))

        # all micro-batches first: the loss is divided by the number of targets of the whole step, which must be known
        # before backward
        parts = row_parts(step / progress["max_steps"], args.length_warmup)
        rows, batches = lengths[parts], []
        for micro in range(args.accumulation_steps):
            first = progress["position"] + micro * per_micro_step + runtime.rank * args.batch_size
            batches.append(rows.batch(rows.position_batch(parts * first, parts * args.batch_size)))
        targets = runtime.sum(sum(b["mask"][:, 1:].sum() for b in batches))

        if args.optimizer == "sophia" and step % args.hessian_interval == 0:
            model.eval()  # without dropout, and the router's counts belong to the step itself
            sampled_gradient(wrapped, batches, parts * progress["position"], targets, args, runtime)
            optimizer.update_hessian(targets, runtime.scaler.get_scale())
            optimizer.zero_grad(set_to_none=True)

        model.train()
        nll_sum = balance_sum = 0.0
        for micro, batch in enumerate(batches):
            ids = batch["ids"].to(runtime.device, non_blocking=True)  # [B, T]
            mask = batch["mask"].to(runtime.device, non_blocking=True)  # [B, T], 1 on target tokens
            # with DDP gradients travel between ranks only with the last micro-batch; FSDP sends them after each, for a
            # rank that waited would have to hold those of the whole model
            last = micro == len(batches) - 1
            with contextlib.nullcontext() if last or not ddp else wrapped.no_sync():
                with runtime.autocast():
                    # the sum of the targets' log-probabilities instead of logits [B, T, V], and the rows' balance [B]
                    logp, balance = wrapped(ids, token_mask=mask.bool(), target_mask=mask, sum_targets=True,
                                            return_balance=True)
                nll = -logp
                # each row's balance counts by its tokens, so that it adds up over micro-batches and ranks like the
                # loss does
                aux = (balance * mask[:, 1:].sum(1)).sum()
                # DDP averages over ranks; the factor makes it a sum, and the division by all targets makes that the
                # mean
                loss = (nll + args.router_aux_loss_coef * aux) * (runtime.world_size / targets)
                runtime.scaler.scale(loss).backward()
            nll_sum = nll_sum + nll.detach()
            balance_sum = balance_sum + aux.detach()

        runtime.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        grad_norm = sharding.whole(grad_norm).item()  # with FSDP over the slices of all ranks
        loss_value, balance_value = (x / targets for x in runtime.sum(nll_sum, balance_sum))
        skipped = nonfinite.skip(step, loss_value, grad_norm, lr)
        if not skipped:
            runtime.scaler.step(optimizer)
        # a skipped step moves nothing, but its visits must not count in the next one
        model.update_router_bias(0.0 if skipped else args.router_bias_rate, runtime.reduce)
        runtime.scaler.update()  # also after a skipped step: unscale_ may be called once between two updates
        optimizer.zero_grad(set_to_none=True)
        progress["step"] += 1
        progress["position"] += per_micro_step * args.accumulation_steps
        progress["tokens"] += int(targets)
        log.count(targets)
        bar.update()

        # -- log, evaluate, save
        step = progress["step"]
        progress["max_steps"] = bar.total = budget.steps(step, progress["max_steps"], runtime)
        eta.report(step, progress["max_steps"])
        done = step >= progress["max_steps"]
        if step == 1:
            runtime.print(f"loss at step 0: {loss_value:.3f}, ln(vocabulary) = {math.log(model.config.vocab_size):.3f}")
        if step % args.log_interval == 0 or done or step == 1 or nonfinite.in_a_row:
            extra = {"balance": balance_value} if model.config.num_experts else {}
            rate = log.rate()
            log.log(step, loss=loss_value, lr=lr, grad_norm=grad_norm, tokens_per_s=rate, **extra,
                    **watch.numbers(grad_norm))
            bar.set_postfix_str(f"loss {loss_value:.3f}{log.expected(step, 'loss')}, {rate} tok/s")
        if done or (args.eval_interval and step % args.eval_interval == 0):
            val_loss, bits = evaluate(model, held_out, args, runtime)
            log.log(step, val_loss=val_loss, bits_per_byte=bits)
            text = sample_text(model, tokenizer, held_out)  # by every rank: with FSDP no rank can do it alone
            if runtime.is_main:
                logs.say(f"step {step}: held-out loss {val_loss:.3f}{log.expected(step, 'val_loss')}, {bits:.3f} "
                         f"bits per byte | {text}")
                log.judge()
            common.watch_evaluation(runtime, args, progress, {"val_loss": val_loss, "bits_per_byte": bits})
            log.rate()  # the evaluation's seconds are not training seconds
        signal = stop.stop(runtime)
        due = args.save_interval and step % args.save_interval == 0 and not nonfinite.in_a_row
        if signal or (due and not done):
            saved = save(finished=False)
        if signal:
            common.leave(runtime, signal, step, saved)

    # -- 8. Final save and summary -------------------------------------------------------------------------------------
    bar.close()
    final = {"metric": "held-out bits per byte", "before": progress["before"], "after": bits, "val_loss": val_loss,
             "bits_per_byte": bits, "steps": progress["step"], "skipped_steps": nonfinite.total}
    save(finished=True, final=final)
    log.close()
    report.refresh(args.save_dir, runtime.is_main)
    runtime.print(f"done: {args.save_dir}/{args.save_weight}, held-out loss {val_loss:.3f}, {bits:.3f} bits per byte. "
                  f"Curves: {folder}/curves.png. Next: python train_sft.py --from_weight {args.save_weight}"
                  f"{common.in_folder(args)}")
    runtime.close()
    return final


def sample_text(model, tokenizer, data, max_new_tokens=40):
    """A greedy continuation of the beginning of a held-out window, to see with one's own eyes what has been learnt."""
    model.eval()  # every step calls train() again
    length = min(12, model.config.max_position_embeddings - 1)  # a continuation needs room
    prompt = data.batch([0])["ids"][0, :length].tolist()
    ids = [token for _, token in model.generate([prompt], max_new_tokens, temperature=0.0,
                                                stop_ids=tokenizer.stop_ids(chat=False))]
    return repr(tokenizer.decode([i for i in prompt
                                  if i not in tokenizer.special_ids]) + " >> " + tokenizer.decode(ids))


if __name__ == "__main__":
    common.run(main, parse_args)
