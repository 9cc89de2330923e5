"""Training beside its peers, as ratios: what a recipe reaches in the same time, and how long a step takes.

    python bench/training.py recipe --data_path DATA/pretrain/pretrain_en.jsonl.gz --minutes 2
    python bench/training.py speed                                     # needs transformers (requirements-dev.txt)
    python bench/training.py loading --data_path out/data/pretrain.train.jsonl --preset nano

recipe: three recipes train the same model on the same tokens with the same code; only what a recipe is differs: which
rows it sees, in which order and how many at once, the optimizer with its rates, and the initial weights. Held-out
documents are read each from its own start, which is how MiniMind trains and no other recipe here does.

loading: the time that drawing a step's rows takes, beside the step itself.

speed: one optimizer step of this project, of the same model in `transformers`, and of this project with single ideas
taken away. Contenders take turns, step by step, so that a slow minute of the machine hits all of them.

Recipes of the peers: jingyaogong/minimind, trainer/train_pretrain.py; karpathy/nanoGPT, train.py and model.py (2025).
Letters: B rows, T tokens, V vocabulary.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
if Path(sys.path[0]).resolve() == ROOT / "bench":  # run as a script: bench/tokenizer.py must not hide the project's
    sys.path[0] = str(ROOT)

import common  # noqa: E402
import kernels  # noqa: E402
import metrics  # noqa: E402
import optim  # noqa: E402
from configuration import ModelConfig  # noqa: E402
from dataset import PretrainData  # noqa: E402
from model import Transformer  # noqa: E402
from rows import read_rows  # noqa: E402
from tokenizer import train  # noqa: E402
from train_pretrain import row_parts, trained_blocks  # noqa: E402


# ----------------------------------------------------------------------------------------------------------------------
# recipe
@dataclasses.dataclass(frozen=True)
class Recipe:
    """What may differ between two recipes. Rates are peaks, warm-up is a share of the run, floor one of the peak."""

    # "windows" of the token stream; "crops" at random places; "starts": from a document's start on, across its end;
    # "documents": each cut or padded
    rows: str = "windows"
    order: str = "random"  # of the windows; "text": as they follow one another
    batch_size: int = 8
    accumulation_steps: int = 1
    optimizer: str = "muon"
    learning_rate: float = 1.2e-2
    muon_learning_rate: float = 0.01
    betas: tuple = (0.5, 0.95)
    momentum: float = 0.95
    momentum_warmup: int = 300
    fast: bool = False  # Muon in three Newton-Schulz iterations instead of Jordan's five
    weight_decay: float = 0.0  # on matrices; with decay_all on everything
    decay_all: bool = False
    embedding_decay: float = 0.2  # beside Muon
    schedule: str = "linear"
    warmup: float = 0.1
    floor: float = 0.0
    grad_clip: float = 1.0
    # "normal": 0.02 throughout; "gpt2": 0.02, and the projections into the residual stream smaller; "fan_in": as ours,
    # but the other matrices of the blocks from their width
    init: str = "ours"
    length_warmup: float = 0.0  # rows are shorter in this share of the run, as train_pretrain.row_parts() says
    depth_warmup: float = 0.0  # fewer blocks are trained in this share of the run, train_pretrain.trained_blocks()


RECIPES = {
    "minillm": Recipe(),
    "minillm, shorter rows first": Recipe(length_warmup=0.8),
    # whatever lowers bits per byte within two minutes
    "minillm, in short": Recipe(rows="starts", learning_rate=2e-2, embedding_decay=0.0, fast=True, schedule="wsd",
                                length_warmup=0.8, depth_warmup=0.6),
    "nanogpt": Recipe(rows="crops", optimizer="adamw", learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
                      schedule="cosine", warmup=0.05, floor=0.1, init="gpt2"),
    "minimind": Recipe(rows="documents", batch_size=32, optimizer="adamw", learning_rate=5e-4, betas=(0.9, 0.999),
                       weight_decay=0.01, decay_all=True, schedule="cosine", warmup=0.0, floor=0.1, init="normal"),
    "minimind, as shipped": Recipe(rows="documents", batch_size=32, accumulation_steps=8, optimizer="adamw",
                                   learning_rate=5e-4, betas=(0.9, 0.999), weight_decay=0.01, decay_all=True,
                                   schedule="cosine", warmup=0.0, floor=0.1, init="normal"),
}


def padded(pieces, length, pad_id):
    """Pieces of a token stream as rows: (ids int64 [B,T], mask float [B,T], 1 on targets)."""
    ids = np.full((len(pieces), length), pad_id, np.int64)  # [B,T]
    mask = np.zeros(ids.shape, np.float32)  # [B,T]
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)], mask[row, 1 : len(piece)] = piece, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


class Rows:
    """Training rows of a token stream in the order a recipe wants them."""

    def __init__(self, data, recipe, seed):
        self.data, self.recipe = data, recipe
        self.draw = np.random.default_rng(seed)
        stream = data.tokens.items
        self.starts = np.flatnonzero(stream == data.tokenizer.bos_id)  # of the documents
        self.position = 0
        self.shuffles = {}

    def batch(self, count, length):
        """(ids int64 [B,T], mask float [B,T], 1 on targets)."""
        stream, first = self.data.tokens.items, self.position
        self.position += count
        places = np.arange(first, first + count)
        ends = np.full(count, len(stream))
        if self.recipe.rows == "crops":
            starts = self.draw.integers(0, len(stream) - length, count)
        elif self.recipe.rows in ("documents", "starts"):
            chosen = self._shuffled(len(self.starts), places)
            starts = self.starts[chosen]
            ends = np.append(self.starts[1:], len(stream))[chosen] if self.recipe.rows == "documents" else ends
        else:
            windows = (len(stream) - 1) // (length - 1)
            chosen = places % windows if self.recipe.order == "text" else self._shuffled(windows, places)
            starts = chosen * (length - 1)
        pieces = [stream[start : min(end, start + length)] for start, end in zip(starts, ends, strict=True)]
        return padded(pieces, length, self.data.tokenizer.pad_id)

    def _shuffled(self, count, places):
        """Entries `places` of a shuffle of `count` items; there is one for each count."""
        if count not in self.shuffles:
            self.shuffles[count] = self.draw.permutation(count)
        return self.shuffles[count][places % count]


def build_model(recipe, config, seed):
    """The same Qwen3 shape for all, with the recipe's initial weights."""
    torch.manual_seed(seed)
    model = Transformer(config)
    for name, p in model.named_parameters() if recipe.init != "ours" else ():
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        if recipe.init == "fan_in":
            if p.ndim > 1 and "layers" in name and not into_residual:
                torch.nn.init.normal_(p, 0.0, p.shape[1] ** -0.5)
        elif p.ndim > 1:
            smaller = (2 * config.num_hidden_layers) ** -0.5 if into_residual and recipe.init == "gpt2" else 1.0
            torch.nn.init.normal_(p, 0.0, 0.02 * smaller)
    return model


def build_optimizer(recipe, model, dtype):
    """optim.build() with the recipe's settings."""
    optimizer = optim.build(model, recipe.optimizer, recipe.learning_rate, recipe.muon_learning_rate,
                            recipe.weight_decay, recipe.betas, dtype=dtype,
                            embedding_decay=recipe.embedding_decay)
    for group in optimizer.param_groups:
        group["weight_decay"] = recipe.weight_decay if recipe.decay_all else group["weight_decay"]
        # only Muon reads these
        group |= {"momentum": recipe.momentum, "momentum_warmup": recipe.momentum_warmup}
    optimizer.fast = recipe.fast
    return optimizer


def seconds_of(function):
    """Seconds that a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def run_recipe(recipe, config, data, held_out, limit, timed, evaluations, seed, dtype):
    """Train until `limit` (seconds of training when timed, else tokens read). Returns facts with the curve: a list of
    (tokens, seconds, bits per byte). Evaluations do not count as training time."""
    model = build_model(recipe, config, seed)
    optimizer = build_optimizer(recipe, model, dtype)
    rows = Rows(data, recipe, seed)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)  # noqa: E731
    curve, seconds, tokens, step, due = [], 0.0, 0, 0, 1
    while True:
        done = (seconds if timed else tokens) / limit
        if done >= due / evaluations or done >= 1:
            found = metrics.heldout_loss(model, held_out, autocast=autocast)
            curve.append((tokens, round(seconds, 2), round(found["bits_per_byte"], 4)))
            due += 1
        if done >= 1:
            return {"recipe": dataclasses.asdict(recipe), "seed": seed, "steps": step, "tokens": tokens,
                    "seconds": round(seconds, 2), "bits_per_byte": curve[-1][2], "curve": curve}
        begin = time.perf_counter()
        optim.set_lr(optimizer, common.lr_scale(done * 1e6, 1e6, recipe.warmup, recipe.schedule, recipe.floor))
        model.model.depth = trained_blocks(done, recipe.depth_warmup, config.num_hidden_layers)
        parts = row_parts(done, recipe.length_warmup)
        length, count = 256 // parts, recipe.batch_size * parts
        batches = [rows.batch(count, length) for _ in range(recipe.accumulation_steps)]
        targets = sum(mask[:, 1:].sum().item() for _, mask in batches)
        for ids, mask in batches:
            with autocast():
                total = model(ids, target_mask=mask, sum_targets=True)
            (-total / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - begin
        tokens += sum(ids.numel() for ids, _ in batches)
        step += 1


def prepare(args, folder):
    """(tokenizer, training data, batches of held-out documents): --vocab_size tokens learnt from the first 8 MB."""
    texts, size = [], 0
    for row, _ in read_rows(args.data_path):
        texts.append(row["text"])
        size += len(row["text"])
        if size > 8e6:
            break
    tokenizer = train(texts, args.vocab_size, progress=False)
    shared = dict(tokenizer=tokenizer, max_seq_len=256, val_ratio=0.01, cache_dir=folder)
    data, rest = (PretrainData(args.data_path, part=part, **shared) for part in ("train", "val"))
    starts = np.flatnonzero(rest.tokens.items == tokenizer.bos_id)[: args.heldout]
    documents = [rest.tokens.items[start:end][:256] for start, end in zip(starts, starts[1:], strict=False)]
    held_out = []
    for low in range(0, len(documents), 32):
        ids, mask = padded(documents[low : low + 32], 256, tokenizer.pad_id)
        size = (rest.byte_lengths[ids.numpy()] * (mask.numpy() > 0)).sum(1)
        held_out.append({"ids": ids, "mask": mask, "bytes": torch.from_numpy(size)})
    return tokenizer, data, held_out


def variant(text):
    """(name, Recipe) of "minillm muon_learning_rate=0.01 rows=crops": a recipe with single fields changed."""
    first = next((i for i, word in enumerate(text.split()) if "=" in word), None)
    name, changes = " ".join(text.split()[:first]), text.split()[first:] if first else []
    kinds = {field.name: field.type for field in dataclasses.fields(Recipe)}
    fields = {}
    for change in changes:
        field, _, value = change.partition("=")
        kind = kinds[field]
        fields[field] = (value == "1" if kind is bool else tuple(map(float, value.split(","))) if kind is tuple
                         else kind(value))
    return text, dataclasses.replace(RECIPES[name], **fields)


def compare_recipes(args, dtype):
    """Train every recipe for the same time or tokens; print a table, and write every curve to --output."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, data, held_out = prepare(args, folder)
        config = ModelConfig.preset(args.preset, vocab_size=tokenizer.vocab_size)
        print(data.summary())
        times = [seconds_of(lambda i=i: data.batch(data.position_batch(8 * i, 8))) for i in range(200)]
        short = data.of_length(32)
        more = [seconds_of(lambda i=i: short.batch(short.position_batch(64 * i, 64))) for i in range(200)]
        print(f"making a batch takes {1e3 * statistics.median(times):.2f} ms with 8 rows of 256 tokens, "
              f"{1e3 * statistics.median(more):.2f} ms with 64 of 32")
        print(f"{args.preset}, {sum(len(b['ids']) for b in held_out)} held-out documents, "
              + (f"{args.minutes} minutes each" if not args.tokens else f"{args.tokens} tokens each"), flush=True)
        for seed in args.seeds:
            for text in args.recipes:
                name, recipe = variant(text)
                facts = run_recipe(recipe, config, data, held_out, args.tokens or 60 * args.minutes, not args.tokens,
                                   args.evaluations, seed, dtype)
                way = ", ".join(f"{tokens // 1000}k: {bits:.3f}" for tokens, _, bits in facts["curve"][:-1])
                print(f"{facts['bits_per_byte']:.4f} bits per byte | {name} | seed {seed}, {facts['steps']} updates, "
                      f"{facts['tokens']} tokens, {facts['seconds']:.0f} s | {way}", flush=True)
                if args.output:
                    with open(args.output, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"name": name, **facts}) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# speed
# shape, rows a step, tokens a row, vocabulary: 8192 tokens a step each
SHAPES = {"small": (dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=768, vocab_size=4096), 32, 256),
          "26M": (dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                       intermediate_size=1408, vocab_size=6400), 16, 512)}


@dataclasses.dataclass
class Contender:
    """One way to make an optimizer step: run() makes one, on the same rows as all others."""

    model: torch.nn.Module
    loss: Callable  # (model, ids [B,T]) -> sum of -log p over the targets
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    micro_batch: int

    def run(self, ids):
        """One step on ids [B,T]. Returns (seconds, loss in nats per token)."""
        begin = time.perf_counter()
        targets, total = ids.shape[0] * (ids.shape[1] - 1), 0.0
        for rows in ids.split(self.micro_batch):
            with torch.autocast("cpu", self.dtype, enabled=self.dtype == torch.bfloat16):
                nll = self.loss(self.model, rows)
            (nll / targets).backward()
            total += nll.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin, total / targets


def our_loss(model, ids):
    """Log-probabilities of the targets, a few rows of the head at a time: what the training scripts use."""
    return -model(ids, target_mask=torch.ones_like(ids), sum_targets=True)


def loss_with_torchs_attention(model, ids):
    """our_loss() with torch's own gradient of attention."""
    with mock.patch("model.attention", kernels.torchs_attention):
        return our_loss(model, ids)


def plain_loss(model, ids):
    """Cross-entropy on all logits [B,T,V]."""
    logits = model(ids)
    logits = getattr(logits, "logits", logits)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


def contenders(shape, dtype, compiled):
    """{name: Contender}, all with the same weights; `compiled`: with torch.compile as well."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape, max_position_embeddings=512, tie_word_embeddings=True))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = lambda: Transformer.from_pretrained(folder)  # noqa: E731
        theirs = lambda: Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa")  # noqa: E731
        adamw = lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4)  # noqa: E731
        default = lambda model, name="muon": optim.build(model, name, 1e-4, 1e-4, dtype=dtype)  # noqa: E731

        def made(build, loss, optimizer, dtype, micro_batch=32, compile=False):
            model = build().train()
            return Contender(torch.compile(model) if compile else model, loss, optimizer(model), dtype, micro_batch)

        adamw_built = lambda model: default(model, "adamw")  # noqa: E731
        found = {"transformers fp32": made(theirs, plain_loss, adamw, torch.float32)}
        if dtype == torch.bfloat16:
            found["transformers bf16"] = made(theirs, plain_loss, adamw, dtype)
        found["minillm, Muon"] = made(ours, our_loss, default, dtype)
        found["minillm, AdamW"] = made(ours, our_loss, adamw_built, dtype)
        found["  8 rows at a time"] = made(ours, our_loss, adamw_built, dtype, 8)
        found["  all logits"] = made(ours, plain_loss, adamw_built, dtype)
        if dtype == torch.bfloat16:
            found["  torch's attention"] = made(ours, loss_with_torchs_attention, adamw_built, dtype)
            found["  fp32"] = made(ours, our_loss, adamw_built, torch.float32)
        if compiled:
            found["transformers fp32, compiled"] = made(theirs, plain_loss, adamw, torch.float32, compile=True)
            if dtype == torch.bfloat16:
                found["transformers bf16, compiled"] = made(theirs, plain_loss, adamw, dtype, compile=True)
            found["minillm, Muon, compiled"] = made(ours, our_loss, default, dtype, compile=True)
            found["minillm, AdamW, compiled"] = made(ours, our_loss, adamw_built, dtype, compile=True)
        return found


def matmul_rate(dtype, size=1024):
    """Floating-point operations per second of a plain matrix product of that dtype, the best of many."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def compare_speed(args, dtype):
    """Time the contenders step by step in turns; print a table of medians, ratios and utilisation."""
    for name in args.shapes:
        shape, rows, length = SHAPES[name]
        found = contenders(shape, dtype, args.compiled)
        draw = torch.Generator().manual_seed(0)
        seconds, rates = {contender: [] for contender in found}, []
        for round_ in range(args.rounds + 2):  # two to warm up
            ids = torch.randint(shape["vocab_size"], (rows, length), generator=draw)
            losses = []
            rates.append(matmul_rate(dtype))  # in each round: other users of the machine slow it down as well
            for contender, made in found.items():
                taken, loss = made.run(ids)
                losses.append(loss)
                seconds[contender] += [taken] * (round_ > 1)
            if round_ == 0:  # the weights are equal until the first update
                print(f"{name}: loss of the first step {min(losses):.5f} to {max(losses):.5f}", flush=True)
        operations = Transformer(ModelConfig(**shape)).flops_per_token(length) * rows * length
        base, rate = statistics.median(seconds["transformers fp32"]), statistics.median(rates)
        print(f"a {str(dtype)[6:]} matrix product of 1024 x 1024 runs at {rate / 1e9:.0f} GFLOP/s "
              f"({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f})")
        print(f"{'contender':<30} {'s a step':>9} {'tokens/s':>9} {'ratio':>6} {'of the matmul rate':>19}")
        for contender, times in seconds.items():
            median = statistics.median(times)
            print(f"{contender:<30} {median:9.3f} {rows * length / median:9.0f} {base / median:6.2f} "
                  f"{operations / median / rate:19.0%}", flush=True)
            if args.output:
                with open(args.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"shape": name, "name": contender.strip(), "seconds": times}) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# loading
def measure_loading(args, dtype):
    """Draw rows and train on them, as train_pretrain.py does; print the median time of both."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train([row["text"] for row, _ in itertools.islice(read_rows(args.data_path), 4000)],
                          args.vocab_size, progress=False)
        data = PretrainData(args.data_path, tokenizer, 256, folder)
        model = Transformer(ModelConfig.preset(args.preset, vocab_size=args.vocab_size))
        made = Contender(model, our_loss, optim.build(model, "muon", 1e-4, 1e-4, dtype=dtype), dtype, 8)
        drawing, step = [], []
        for n in range(args.rounds + 2):  # two to warm up
            begin = time.perf_counter()
            batch = data.batch(data.position_batch(8 * n, 8))
            drawing.append(time.perf_counter() - begin)
            step.append(made.run(batch["ids"])[0])
    drawn, trained = statistics.median(drawing[2:]), statistics.median(step[2:])
    print(f"{args.preset}: {1000 * drawn:.2f} ms to draw 8 rows of 256 tokens, {1000 * trained:.0f} ms for the step: "
          f"{drawn / (drawn + trained):.2%}")


def parse_args(argv=None):
    """Flags of this bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("part", choices=("recipe", "speed", "loading"))
    parser.add_argument("--data_path", help='recipe, loading: JSONL (.gz) of {"text"} rows')
    parser.add_argument("--preset", default="tiny", help="recipe, loading: shape of the model")
    parser.add_argument("--vocab_size", type=int, default=6400, help="recipe: of the tokenizer, learnt from the data")
    parser.add_argument("--minutes", type=float, default=2.0, help="recipe: training time of each")
    parser.add_argument("--tokens", type=float, default=0, help="recipe: instead of --minutes, tokens to read")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help='recipe: names, or names with single '
                        'fields changed, such as "minillm warmup=0.2"')
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="recipe: all of them, for each recipe")
    parser.add_argument("--evaluations", type=int, default=4, help="recipe: points of each curve")
    parser.add_argument("--heldout", type=int, default=256, help="recipe: held-out documents")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="speed: which models")
    parser.add_argument("--rounds", type=int, default=5,
                        help="speed, loading: measured steps of each contender")
    parser.add_argument("--compiled", type=int, choices=(0, 1), default=0, help="speed: with torch.compile as well")
    parser.add_argument("--threads", type=int, default=common.count_cores(), help="CPU threads")
    parser.add_argument("--output", help="file to which every result is appended as a line of JSON")
    return parser.parse_args(argv)


def main(args):
    """Run one part."""
    torch.set_num_threads(args.threads)
    common._keep_freed_memory()
    dtype, why = common.pick_dtype("auto", torch.device("cpu"))
    print(f"dtype {str(dtype)[6:]} ({why}), {args.threads} thread(s)", flush=True)
    {"recipe": compare_recipes, "speed": compare_speed, "loading": measure_loading}[args.part](args, dtype)


if __name__ == "__main__":
    main(parse_args())
