"""Decoding beside `transformers`, as ratios on the same weights.

    python bench/generation.py                                # everything; needs transformers (requirements-dev.txt)
    python bench/generation.py single --shapes A --rounds 5
    python bench/generation.py --quick 1                      # tiny shapes: does it run, are the ids equal

single: one prompt, greedy, prompt included. batch: 16 rows, greedy. overhead: one prompt, 8 layers so narrow that their
products cost nothing; what is left is the program around them. sampling: drawing an id from logits, without a model.
products: the matrices of one step in every form that forms.py knows, beside reading them as an array is read.
lengths: many prompts whose answers end at different lengths, 16 rows at a time.

Contenders take turns within a round, so that a slow minute of the machine hits all of them; numbers are medians over
the rounds, ratios are against the first contender. Weights are random. An exact contender whose greedy ids are not
those of `transformers` stops the bench. bf16 takes part where this CPU is fast at it.

Letters: B rows, V vocabulary.
"""

import argparse
import contextlib
import copy
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if Path(sys.path[0]).resolve() == ROOT / "bench":  # run as a script: bench/tokenizer.py must not hide the project's
    sys.path[0] = str(ROOT)

import common  # noqa: E402
import forms  # noqa: E402
import inference  # noqa: E402
from configuration import ModelConfig  # noqa: E402
from decoding import sample  # noqa: E402
from model import Transformer  # noqa: E402

HEADS = dict(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True)
SHAPES = {
    "A": dict(hidden_size=512, num_hidden_layers=8, intermediate_size=1408, vocab_size=6400, **HEADS),
    "B": dict(hidden_size=768, num_hidden_layers=16, intermediate_size=2048, vocab_size=6400, **HEADS),
    "narrow": dict(hidden_size=64, num_hidden_layers=8, intermediate_size=176, vocab_size=6400, **HEADS),
    "quick": dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=320, **HEADS),
}
NEW_TOKENS = {"A": 128, "B": 64, "narrow": 128, "quick": 8}
PROMPT = 64  # tokens


def random_model(shape):
    """A Transformer with normal(0, 0.05) matrices: its own initialisation would make every block the identity, and
    greedy decoding would repeat one token."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPES[shape])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    return model


def random_prompts(count, length, vocab_size):
    """Lists of random ids."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (count, length), generator=draw).tolist()


def theirs(model):
    """The same weights in `transformers`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = model.config.to_dict()
    known = {key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                          "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps",
                                          "max_position_embeddings", "rope_parameters", "tie_word_embeddings")}
    made = Qwen3ForCausalLM(Qwen3Config(**known, attn_implementation="sdpa")).eval()
    made.load_state_dict(model.state_dict())
    return made


def their_answers(model, prompts, count):
    """Greedy ids of `transformers`, `count` for each of equally long prompts."""
    ids = torch.tensor(prompts)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                         do_sample=False, pad_token_id=0)
    return out[:, ids.shape[1] :].tolist()


def our_answers(model, prompts, count, **options):
    """Ids of generate(), greedy unless said otherwise."""
    answers = [[] for _ in prompts]
    for row, token in model.generate(prompts, count, **({"temperature": 0.0} | options)):
        answers[row].append(token)
    return answers


def accelerated(model, **kind):
    """A twin of the model, on the same weights, with a faster decoder."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    print("  " + inference.accelerate(twin, **kind), flush=True)
    return twin


def contenders(shape, bf16, rows=1):
    """{name: (function of prompts and count that returns rows of ids, share of rows that must equal transformers')}."""
    model = random_model(shape)
    other, fast, int8 = theirs(model), accelerated(model, rows=rows), accelerated(model, int8=True, rows=rows)
    found = {
        "transformers fp32": (lambda p, n: their_answers(other, p, n), 1.0),
        "minillm, the model itself": (lambda p, n: our_answers(model, p, n), 1.0),
        "minillm, fast": (lambda p, n: our_answers(fast, p, n), 1.0),
        "minillm, int8": (lambda p, n: our_answers(int8, p, n), 0.0),
    }
    if bf16:
        half, short = copy.deepcopy(other).bfloat16(), accelerated(model, dtype=torch.bfloat16, rows=rows)
        found["transformers bf16"] = (lambda p, n: their_answers(half, p, n), 0.0)
        found["minillm, fast in bf16"] = (lambda p, n: our_answers(short, p, n), 0.0)
    return found


def in_turns(found, rounds, *inputs):
    """Run {name: (function, share)} in turns, once to warm up and `rounds` times measured. Returns {name: seconds}.
    Raises: RuntimeError where less than that share of a contender's rows equals those of the first."""
    seconds = {name: [] for name in found}
    for round_ in range(rounds + 1):
        first = None
        for name, (function, share) in found.items():
            begin = time.perf_counter()
            ids = function(*inputs)
            seconds[name] += [time.perf_counter() - begin] * (round_ > 0)
            first = ids if first is None else first
            if share and sum(a == b for a, b in zip(ids, first, strict=True)) < share * len(first):
                raise RuntimeError(f"{name} gives other ids than {next(iter(found))}; that is a bug of one of them")
    return seconds


def report(part, seconds, count, unit, args):
    """Print a table of medians and ratios, and append it to --output. count: what the seconds are divided by."""
    base = statistics.median(next(iter(seconds.values())))
    print(f"{part:<34} {unit:>14} {'ratio':>7}")
    for name, times in seconds.items():
        median = statistics.median(times)
        shown = median / count * 1e6 if unit.startswith("us") else count / median
        print(f"{name:<34} {shown:14.1f} {base / median:7.2f}", flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps({"part": part, "name": name, unit: shown, "ratio": base / median,
                                       "seconds": times}) + "\n")


def compare_single(args, bf16):
    """One prompt."""
    for shape in ["quick"] if args.quick else args.shapes:
        count = NEW_TOKENS[shape]
        found = contenders(shape, bf16)
        prompts = random_prompts(1, PROMPT, SHAPES[shape]["vocab_size"])
        report(f"single, {shape}", in_turns(found, args.rounds, prompts, count), count, "tokens/s", args)


def compare_batch(args, bf16):
    """16 prompts at once."""
    shape = "quick" if args.quick else "A"
    count = NEW_TOKENS[shape] // 2
    prompts = random_prompts(16, PROMPT, SHAPES[shape]["vocab_size"])
    seconds = in_turns(contenders(shape, bf16, 16), args.rounds, prompts, count)
    report(f"batch of 16, {shape}", seconds, 16 * count, "tokens/s", args)


def compare_overhead(args, bf16):
    """One prompt through 8 layers of width 64."""
    shape = "quick" if args.quick else "narrow"
    found = {name: made for name, made in contenders(shape, False).items() if "int8" not in name}
    count = NEW_TOKENS[shape]
    prompts = random_prompts(1, PROMPT, SHAPES[shape]["vocab_size"])
    report(f"overhead, {shape}", in_turns(found, args.rounds, prompts, count), count, "us a token", args)


def compare_sampling(args, bf16):
    """Drawing ids at temperature 0.8 with top-k 50 and top-p 0.9, and with top-p alone."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    size, calls = 320 if args.quick else 6400, 5 if args.quick else 200
    draw = torch.Generator().manual_seed(0)
    for rows in (1, 16):
        # as of words in a text: the likelihood falls with the 1.5th power of the rank
        ranks = torch.stack([torch.randperm(size, generator=draw) for _ in range(rows)])  # [B,V]
        logits = -1.5 * (ranks + 1.0).log()  # [B,V]
        uniform = torch.rand(rows, generator=draw)  # [B]
        for top_k in (50, 0):
            steps = [TemperatureLogitsWarper(0.8), *([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(0.9)]
            warpers = LogitsProcessorList(steps)

            def their_draw(logits=logits, warpers=warpers):
                for _ in range(calls):
                    torch.multinomial(warpers(None, logits).softmax(-1), 1)

            def our_draw(logits=logits, uniform=uniform, top_k=top_k):
                for _ in range(calls):
                    sample(logits, 0.8, top_k, 0.9, uniform)

            found = {"transformers": (their_draw, 0.0), "minillm": (our_draw, 0.0)}
            with torch.inference_mode():
                seconds = in_turns(found, args.rounds)
            report(f"sampling, {rows} rows, top-k {top_k or 'off'}", seconds, calls, "us a step", args)


def compare_products(args, bf16):
    """The matrices of one step in their order, for 1, 4 and 16 rows; the first line is the floor that memory sets."""
    for shape in ["quick"] if args.quick else args.shapes:
        config = ModelConfig(**SHAPES[shape])
        c, d, width = config.head_dim, config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sizes = [((heads + 2 * kv_heads) * c, d), (d, heads * c), (2 * width, d), (d, width)]
        sizes = sizes * config.num_hidden_layers + [(config.vocab_size, d)]
        matrices = [0.05 * torch.randn(size) for size in sizes]
        found = {"reading all matrices in fp32": (functools.partial(multiply_all, lambda x, m: m.sum(), matrices), 0.0)}
        for name, (pack, multiply) in (forms.FORMS | forms.INT8_FORMS).items():
            with contextlib.suppress(RuntimeError, AttributeError):  # this build of torch may lack the product
                packed = [pack(matrix) for matrix in matrices]
                found[name] = (functools.partial(multiply_all, multiply, packed), 0.0)
        for count in (1, 4, 16):
            with torch.inference_mode():
                seconds = in_turns(found, args.rounds, [torch.randn(count, size[1]) for size in sizes])
            report(f"products, {shape}, {count} rows", seconds, 1, "us a step", args)


def multiply_all(multiply, matrices, rows):
    """Each matrix with its own rows."""
    for x, matrix in zip(rows, matrices, strict=True):
        multiply(x, matrix)


def compare_lengths(args, bf16):
    """Answers that end by themselves at different lengths, about geometrically distributed."""
    shape, waves, mean = ("quick", 2, 8) if args.quick else ("A", 4, 32)
    size, longest, rows = SHAPES[shape]["vocab_size"], 4 * mean, 16
    model = random_model(shape)
    inference.accelerate(model, rows=rows)
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(4, PROMPT, (waves * rows,), generator=draw).tolist()
    prompts = [random_prompts(1, length, size)[0] for length in sorted(lengths, reverse=True)]
    # Every id is about equally likely, so an answer ends after about `mean` tokens. A batch of another size rounds
    # differently, and a draw near a border may then fall on its other side: not every row must be equal.
    options = dict(temperature=1.0, top_k=50, stop_ids=set(range(size // mean)))
    seeds = list(range(len(prompts)))
    expected = our_answers(model, prompts, longest, row_seeds=seeds, max_batch=rows, **options)
    batches = [slice(at, at + rows) for at in range(0, len(prompts), rows)]

    def padded():  # until the longest answer of the batch ends, all rows are computed
        made = []
        for part in batches:
            count = max(map(len, expected[part]))
            ids = our_answers(model, prompts[part], count, row_seeds=seeds[part], **options | {"stop_ids": ()})
            made += [row[: len(end)] for row, end in zip(ids, expected[part], strict=True)]
        return made

    def shrinking():  # rows that end leave, the batch gets smaller
        return [row for part in batches
                for row in our_answers(model, prompts[part], longest, row_seeds=seeds[part], **options)]

    def continuous():
        return our_answers(model, prompts, longest, row_seeds=seeds, max_batch=rows, **options)

    found = {"padded to the longest": (padded, 0.9), "rows leave": (shrinking, 0.9),
             "rows leave, prompts join": (continuous, 0.9)}
    report(f"lengths, {shape}", in_turns(found, args.rounds), sum(map(len, expected)), "tokens/s", args)


PARTS = {"single": compare_single, "batch": compare_batch, "overhead": compare_overhead, "sampling": compare_sampling,
         "products": compare_products, "lengths": compare_lengths}


def parse_args(argv=None):
    """Flags of this bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("parts", nargs="*", default=[], metavar="part", help=f"of {', '.join(PARTS)}; left out: all")
    parser.add_argument("--shapes", nargs="+", default=["A", "B"], choices=("A", "B"),
                        help="single and products: which models")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each contender")
    parser.add_argument("--quick", type=int, choices=(0, 1), default=0, help="1: tiny shapes and few tokens")
    parser.add_argument("--threads", type=int, default=common.count_cores(), help="CPU threads")
    parser.add_argument("--output", help="file to which every result is appended as a line of JSON")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}; choose of these")
    return args


def main(args):
    """Run the parts."""
    torch.set_num_threads(args.threads)
    common._keep_freed_memory()
    dtype, why = common.pick_dtype("auto", torch.device("cpu"))
    print(f"torch {torch.__version__}, {args.threads} thread(s); bf16 "
          f"{'takes part' if dtype == torch.bfloat16 else 'is left out'}: {why}", flush=True)
    for part in args.parts or PARTS:
        PARTS[part](args, dtype == torch.bfloat16)


if __name__ == "__main__":
    main(parse_args())
