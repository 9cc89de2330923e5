"""White-box distillation: a small model learns from the whole prediction of a larger one, not only from the next token.

Objective, over the target tokens t of one optimizer step; p teacher, q student, both softened by temperature tau:
    loss = sum_t [ (1 - alpha) tau^2 KL(p_t || q_t) - alpha log q(x_t | x_<t) ] / number of targets
A text names one next token where many would do. The teacher says how good each of the 6400 is, so that a token teaches
more; what it is worth fades as the student comes close to what its size allows. tau^2 keeps the gradient's size the
same at any temperature (Hinton et al.). KL(p || q) makes the student cover all that the teacher considers; --reverse 1
takes KL(q || p), which lets it leave out what it cannot hold.

Both need the same tokenizer, for a distribution is one over its tokens. --stage pretrain distils on plain text and
gives a base model, --stage sft on conversations (targets: assistant text) and gives one that chats. Any teacher that
eval.py opens can also write answers, thoughts included, from which train_sft.py learns as from other data:
    python eval.py --weight teacher --prompts questions.jsonl --max_new_tokens 256 --output answers.jsonl
    python train_sft.py --from_weight student --data_path answers.jsonl --skip_bad 1

Papers: Hinton et al. 2015 (arXiv:1503.02531), Sanh et al. 2019 (DistilBERT, arXiv:1910.01108), Gu et al. 2023 (reverse
KL, arXiv:2306.08543), Kim and Rush 2016 (learning from a teacher's answers, arXiv:1606.07947).

    python train_distill.py --teacher pretrain --num_hidden_layers 2 --hidden_size 64      # a laptop
    python train_distill.py --stage sft --teacher out/big_sft --from_weight small_pretrain # a student that chats
    torchrun --nproc_per_node 4 train_distill.py --teacher out/base --preset small         # four GPUs or processes

Letters: B rows, T tokens, V vocabulary, N targets of a micro-batch.
"""
import contextlib
import math
from pathlib import Path

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
from configuration import PRESETS, ModelConfig
from dataset import PretrainData, SFTData
from model import Transformer
from rows import expand_paths, read_rows
from tokenizer import Tokenizer

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def parse_args(argv=None):
    """Flags of this stage. The rates are those of pretraining, for the student usually starts from nothing."""
    parser = cli.Parser(__doc__)
    cli.data_flags(parser, "", max_seq_len=256, val_ratio=0.01)
    parser.set_defaults(data_path=[])
    g = parser.add_argument_group("teacher")
    g.add_argument("--teacher", default="pretrain", help="checkpoint to learn from: name below --save_dir, or folder")
    g.add_argument("--stage", default="pretrain", choices=("pretrain", "sft"),
                   help="pretrain: text, every token is a target; sft: conversations, targets are the answers. "
                        "Without --data_path: out/data/<stage>.train.jsonl")
    g.add_argument("--temperature", type=cli.positive(float), default=1.0, help="softens both predictions; above 1 the "
                   "unlikely tokens count more")
    g.add_argument("--alpha", type=cli.positive(float, zero=True, below=1.001), default=0.0,
                   help="share of the ordinary loss on the text's own tokens")
    cli.switch(g, "--reverse", 0, "KL(student || teacher) instead of KL(teacher || student)")
    g = parser.add_argument_group("student")
    g.add_argument("--from_weight", default="",
                   help="checkpoint to start from: name below --save_dir, or folder; left out: random weights")
    g.add_argument("--preset", choices=sorted(PRESETS), help="shape of a student with random weights; the flags below "
                   "change single fields of it (default: nano)")
    for name in SHAPE:
        g.add_argument(f"--{name}", type=cli.positive(int), help="(preset's)")
    g.add_argument("--router_aux_loss_coef", type=cli.positive(float, zero=True), default=0.01,
                   help="weight of the balance loss (softmax router)")
    g.add_argument("--router_bias_rate", type=cli.positive(float, zero=True), default=0.001,
                   help="step of the routing bias (router with shared experts)")
    cli.switch(g, "--gradient_checkpointing", 0,
               "recompute activations in the backward pass: less memory, about 30%% slower")
    cli.optim_flags(parser, batch_size=8, learning_rate=4e-3, muon_learning_rate=0.01, warmup_steps=0.1,
                    beside_muon=1.2e-2)
    cli.run_flags(parser, save_weight="distill", eval_interval=250, save_interval=500,
                  watched=("val_kl", "val_loss", "agreement", "regression_pass_rate"))
    cli.regression_flags(parser)
    parser.add_argument("--eval_batches", type=cli.positive(int), default=32, help="held-out batches per evaluation")
    cli.switch(parser, "--use_compile", 0, "torch.compile: 20 s of warm-up, pays back after about 100 steps")
    args = parser.parse_args(argv)
    if args.regression_interval and args.stage == "pretrain":
        parser.error(f"--regression_interval {args.regression_interval} with --stage pretrain; fixed prompts are "
                     "questions, and a base model only continues text; give --stage sft, or leave it out")
    if args.preset and args.from_weight:
        parser.error(f"--preset {args.preset} with --from_weight {args.from_weight}; the shape comes from the weights; "
                     "leave --preset out")
    args.preset = args.preset or "nano"
    args.data_path = args.data_path or [f"out/data/{args.stage}.train.jsonl"]
    return args


def distill_kl(student, teacher, temperature=1.0, reverse=False):
    """tau^2 KL(teacher || student) of softened predictions, or of the reverse: logits [N,V], [N,V] -> nats [N].

    In fp32 at least. Without reverse the gradient for the student's logits z is tau (q - p): at 1 that of cross-entropy
    with the teacher's probabilities as labels, at a high temperature (z - v) / V, that of matching the teacher's logits
    v, both with mean 0 (Hinton et al. 2015, section 2.1).
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    q, p = ((logits.to(wide) / temperature).log_softmax(-1) for logits in (student, teacher))  # [N,V]
    if reverse:
        p, q = q, p
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def predictions(model, batch, runtime, **options):
    """(logits at the target tokens [N,V], these tokens [N], rest of the model's result) for a batch on the device."""
    with runtime.autocast():
        logits, balance = model(batch["ids"], documents=batch.get("documents"), return_balance=True, **options)
    wanted = batch["mask"][:, 1:] != 0  # [B,T-1]; logits[t-1] score token t
    return logits[:, :-1][wanted], batch["ids"][:, 1:][wanted], balance


def on_device(batch, runtime):
    """The tensors of a batch on the device."""
    return {name: tensor.to(runtime.device, non_blocking=True) for name, tensor in batch.items()}


@torch.no_grad()
def evaluate(model, teacher, data, args, runtime):
    """Both models on the first --eval_batches held-out batches, shared by the ranks: losses and KL(teacher || student)
    in nats per target, the share of targets at which both find the same token most likely, and of text bits per byte.
    """
    count = min(len(data), args.eval_rows)
    sums = dict.fromkeys(("targets", "bytes", "student", "teacher", "kl", "same"), 0.0)
    was_training = model.training
    model.eval()
    for start in runtime.shard(list(range(0, count, args.batch_size))):
        batch = on_device(data.batch(range(start, min(start + args.batch_size, count))), runtime)
        q, targets, _ = predictions(model, batch, runtime)
        p, _, _ = predictions(teacher, batch, runtime)
        wide = torch.promote_types(q.dtype, torch.float32)
        found = {"targets": torch.ones(len(targets)), "kl": distill_kl(q, p), "same": q.argmax(-1) == p.argmax(-1),
                 "student": F.cross_entropy(q.to(wide), targets, reduction="none"),
                 "teacher": F.cross_entropy(p.to(wide), targets, reduction="none"),
                 "bytes": batch.get("bytes", torch.zeros(1))}
        for name, values in found.items():
            sums[name] += values.cpu().double().sum().item()
    model.train(was_training)
    sums = dict(zip(sums, runtime.sum(*sums.values()), strict=True))
    targets = max(sums["targets"], 1)
    result = {"val_loss": sums["student"] / targets, "teacher_loss": sums["teacher"] / targets,
              "val_kl": sums["kl"] / targets, "agreement": sums["same"] / targets}
    if sums["bytes"]:
        result["bits_per_byte"] = sums["student"] / math.log(2) / sums["bytes"]
        result["teacher_bits_per_byte"] = sums["teacher"] / math.log(2) / sums["bytes"]
    return result


def build_student(args, teacher, origin):
    """The model to train: from a checkpoint, else of the preset's shape with random weights. Raises: ValueError where
    it does not go with the teacher."""
    given = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    if origin:
        student = Transformer.from_pretrained(origin)
        for name, value in given.items():
            if value != getattr(student.config, name):
                raise ValueError(f"--{name} {value} with --from_weight {args.from_weight}, which has "
                                 f"{getattr(student.config, name)}; the shape comes from the weights; leave it out")
    else:
        same = {name: getattr(teacher.config, name)
                for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        student = Transformer(ModelConfig.preset(args.preset, **same, **given))
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(f"vocab_size {student.config.vocab_size} of {args.from_weight}, {teacher.config.vocab_size} "
                         f"of {args.teacher}; predictions are compared token by token; take a student and a teacher "
                         "that were trained with one tokenizer")
    for name, model in (("the student", student), ("the teacher", teacher)):
        if args.max_seq_len > model.config.max_position_embeddings:
            raise ValueError(f"--max_seq_len {args.max_seq_len} is above max_position_embeddings "
                             f"{model.config.max_position_embeddings} of {name}; rows must fit the context; shorten "
                             "the rows")
    return student


def main(args):
    """Train and return the final metrics. The numbered banners are the same in every training script."""
    # -- 1. Inputs, processes, device, seed ----------------------------------------------------------------------------
    parent = checkpoint.find(args.save_dir, args.teacher)
    origin = checkpoint.find(args.save_dir, args.from_weight) if args.from_weight else None
    parents = [origin, parent] if origin else [parent]
    files = expand_paths(args.data_path) + expand_paths(args.val_path)
    key = checkpoint.stage_key(args, files, parents)
    runtime = common.setup(args, checkpoint.earlier_choice(args, key))
    folder = Path(args.save_dir) / "logs" / args.save_weight

    # -- 2. Data -------------------------------------------------------------------------------------------------------
    tokenizer = Tokenizer.from_pretrained(parent)
    if origin and Tokenizer.from_pretrained(origin).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{args.from_weight} and {args.teacher} have different tokenizers; predictions are compared "
                         "token by token; take a student that was trained with the teacher's tokenizer, or let the "
                         "teacher write answers and learn from them with train_sft.py")
    start = checkpoint.begin(runtime, args, key)
    if start == "skip":
        return checkpoint.read_minillm(Path(args.save_dir) / args.save_weight)["metrics"]
    shared = dict(tokenizer=tokenizer, max_seq_len=args.max_seq_len, cache_dir=args.cache_dir, seed=args.seed,
                  skip_bad=args.skip_bad, is_main=runtime.is_main, barrier=runtime.barrier)
    ratio = 0.0 if args.val_path else args.val_ratio
    kind = SFTData if args.stage == "sft" else PretrainData
    data = kind(args.data_path, part="train" if ratio else "all", val_ratio=ratio, **shared)
    held_out = kind(args.val_path or args.data_path, part="val" if ratio else "all", val_ratio=ratio, **shared)
    suite = metrics.fixed_prompts(read_rows(args.regression_path)) if args.regression_interval else []
    runtime.print(data.summary())

    # -- 3. Student and teacher ----------------------------------------------------------------------------------------
    dtype = torch.float64 if runtime.dtype == torch.float64 else torch.float32
    teacher = Transformer.from_pretrained(parent)
    common.check_vocabulary(teacher.config, tokenizer, args.teacher)
    model = build_student(args, teacher, origin).to(runtime.device, dtype)
    teacher = teacher.to(runtime.device, dtype).eval().requires_grad_(False)
    model.gradient_checkpointing = bool(args.gradient_checkpointing)
    runtime.print(f"teacher {parent}: {teacher.num_parameters() / 1e6:.2f}M parameters; student "
                  f"{origin or args.preset}: {model.num_parameters() / 1e6:.2f}M parameters")
    if runtime.rank:  # all were seeded alike; from here on each rank draws its own dropout, also on a resume
        torch.manual_seed(args.seed + runtime.rank)

    # -- 4. Optimizer --------------------------------------------------------------------------------------------------
    optimizer = optim.build(model, args.optimizer, args.learning_rate, args.muon_learning_rate, args.weight_decay,
                            (args.adam_beta1, 0.95), dtype=runtime.dtype, embedding_decay=args.embedding_decay)
    per_step = args.batch_size * args.accumulation_steps * runtime.world_size
    max_steps = common.count_steps(args, len(data), per_step)
    budget = common.Budget(args.max_minutes)
    nonfinite = common.NonFinite(runtime)
    stop = common.StopSignal()
    eta = common.Eta(runtime)
    runtime.print(common.memory_line(runtime, [model, teacher], args.batch_size, args.max_seq_len,
                                     lambda ids: model(ids).log_softmax(-1)))

    # -- 5. Resume -----------------------------------------------------------------------------------------------------
    # `position` is the number of rows drawn so far by all ranks together: the order does not depend on the rank count
    progress = {"step": 0, "position": 0, "tokens": 0, "max_steps": max_steps}
    if start == "resume":
        state = checkpoint.load_resume(runtime, args)
        model.load_state_dict(state["model"])
        optim.load_state(optimizer, state["optimizer"])
        progress |= state["progress"]
        del state  # twice the size of the weights, or more
        if not args.max_minutes and not common.out_of_patience(progress, args):
            # --max_steps, --epochs and what a step draws may be changed on resume
            progress["max_steps"] = common.count_steps(args, len(data), per_step, progress)
        runtime.print(f"resumed at step {progress['step']} of {progress['max_steps']}")
    conditions = checkpoint.conditions(runtime, args, "distill", model.config, [data, held_out], parents,
                                       progress["max_steps"])
    log = logs.MetricLog(folder, runtime.is_main, progress["step"] if start == "resume" else None,
                         args.tracker, conditions, args.plot_interval)
    watch = health.Watch(model, optimizer, progress, args, runtime, log)
    log.save_json("args.json", vars(args) | {"dtype": str(runtime.dtype)[6:], "threads": runtime.threads})
    log.save_json("dataset_stats.json", {"train": data.stats, "held_out": held_out.stats})
    if args.show_batch:
        runtime.print(logs.show_samples(data.samples(progress["position"]), tokenizer))

    def save(finished, final=None):
        """Write out/<save_weight>; called by all ranks at the same step. The stage is that of the rows: it decides
        whether the student chats."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress}
        facts = {"stage": args.stage, "key": key, "parents": [str(p) for p in parents],
                 "tokenizer": tokenizer.fingerprint, "data": [str(f) for f in files], "seed": args.seed,
                 "progress": progress, "metrics": final or {}, "conditions": conditions}
        return checkpoint.save(runtime, args, [model, tokenizer], state, facts, finished)

    # -- 6. Compile and DDP (last, so that everything above sees the plain module) -------------------------------------
    wrapped = model
    if runtime.world_size > 1:
        device_ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=device_ids)
    if args.use_compile:
        wrapped, teacher = torch.compile(wrapped), torch.compile(teacher)

    # -- 7. Training loop ----------------------------------------------------------------------------------------------
    per_micro_step = args.batch_size * runtime.world_size
    bar = log.progress(progress["max_steps"], "distill", progress["step"])
    if progress["step"] == 0 or progress["step"] >= progress["max_steps"]:
        result = evaluate(model, teacher, held_out, args, runtime)
        if progress["step"] == 0:  # else a resume with nothing left: it only reports
            progress["before"] = result["val_kl"]
            checked, _ = metrics.check_regression(model, tokenizer, suite, args, runtime, 0)
            log.log(0, **result, **checked)
        log.rate()
    while progress["step"] < progress["max_steps"]:
        step = progress["step"]
        scale = common.lr_scale(step, progress["max_steps"], args.warmup_steps, args.schedule)
        lr = optim.set_lr(optimizer, scale)
        optim.to_gradient_point(optimizer)  # Schedule-Free only; the step, taken or skipped, leads back

        # all micro-batches first: the loss is divided by the targets of the whole step, known only then
        batches = []
        for micro in range(args.accumulation_steps):
            first = progress["position"] + micro * per_micro_step + runtime.rank * args.batch_size
            batch = data.batch(data.position_batch(first, args.batch_size))
            # the tokens that count for a router: of a window the targets, of a packed row all but padding
            batch["real"] = batch["documents"] >= 0 if args.stage == "sft" else batch["mask"].bool()
            batches.append(batch)
        targets, tokens = runtime.sum(sum(b["mask"][:, 1:].sum() for b in batches),
                                      sum(b["real"].sum() for b in batches))

        model.train()
        kl_sum = nll_sum = balance_sum = 0.0
        for micro, batch in enumerate(batches):
            batch = on_device(batch, runtime)
            with torch.no_grad():
                p, _, _ = predictions(teacher, batch, runtime)                                      # [N,V]
            # gradients travel between ranks only with the last micro-batch
            last = micro == len(batches) - 1
            with contextlib.nullcontext() if last or runtime.world_size == 1 else wrapped.no_sync():
                q, labels, balance = predictions(wrapped, batch, runtime, token_mask=batch["real"])  # [N,V], [N], [B]
                kl = distill_kl(q, p, args.temperature, args.reverse).sum()
                nll = F.cross_entropy(q.to(torch.promote_types(q.dtype, torch.float32)), labels, reduction="sum")
                # a row's balance counts by its tokens, so that it adds up over micro-batches and ranks as the loss does
                aux = (balance * batch["real"].sum(1)).sum()
                # DDP averages over ranks; the factor makes it a sum. max(): a step without targets gives 0, never NaN
                loss = (((1 - args.alpha) * kl + args.alpha * nll) / max(targets, 1)
                        + args.router_aux_loss_coef * aux / max(tokens, 1)) * runtime.world_size
                runtime.scaler.scale(loss).backward()
            kl_sum, nll_sum = kl_sum + kl.detach(), nll_sum + nll.detach()
            balance_sum = balance_sum + aux.detach()

        runtime.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf).item()
        kl_value, nll_value, balance_value = runtime.sum(kl_sum, nll_sum, balance_sum)
        kl_value, nll_value = kl_value / max(targets, 1), nll_value / max(targets, 1)
        loss_value = (1 - args.alpha) * kl_value + args.alpha * nll_value
        skipped = nonfinite.skip(step, loss_value, grad_norm, lr)
        if not skipped:
            runtime.scaler.step(optimizer)
        # a skipped step moves nothing, but its visits must not count in the next one
        model.update_router_bias(0.0 if skipped else args.router_bias_rate, runtime.reduce)
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
            extra = {"balance": balance_value / max(tokens, 1)} if model.config.num_experts else {}
            rate = log.rate()
            log.log(step, loss=loss_value, kl=kl_value, nll=nll_value, lr=lr, grad_norm=grad_norm, tokens_per_s=rate,
                    **extra, **watch.numbers(grad_norm))
            bar.set_postfix_str(f"loss {loss_value:.3f}{log.expected(step, 'loss')}, {rate} tok/s")
        if done or (args.eval_interval and step % args.eval_interval == 0):
            result = evaluate(model, teacher, held_out, args, runtime)
            checked, failures = metrics.check_regression(model, tokenizer, suite, args, runtime, step, done)
            log.log(step, **result, **checked)
            if runtime.is_main:
                logs.say(f"step {step}: {describe(result)}{log.named(step, checked)}")
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
    final = result | {"metric": "held-out KL to the teacher", "before": progress["before"],
                      "after": result["val_kl"], "steps": progress["step"], "skipped_steps": nonfinite.total}
    save(finished=True, final=final)
    log.close()
    report.refresh(args.save_dir, runtime.is_main)
    following = (f"python eval.py --weight {args.save_weight}{common.in_folder(args)} --stream 1"
                 if args.stage == "sft" else
                 f"python train_sft.py --from_weight {args.save_weight}{common.in_folder(args)}")
    runtime.print(f"done: {args.save_dir}/{args.save_weight}, {describe(result)}. Curves: {folder}/curves.png. "
                  f"Next: {following}")
    runtime.close()
    return final


def describe(result):
    """One line about evaluate()'s result."""
    text = (f"held-out loss {result['val_loss']:.3f} (teacher {result['teacher_loss']:.3f}), KL "
            f"{result['val_kl']:.3f}, same first choice {result['agreement']:.3f}")
    if "bits_per_byte" in result:
        text += f", {result['bits_per_byte']:.3f} bits per byte (teacher {result['teacher_bits_per_byte']:.3f})"
    return text


if __name__ == "__main__":
    common.run(main, parse_args)
