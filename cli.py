"""The command line of every script: the parser's rules, and the flags that mean the same in every training script.

A script adds its own flags beside these and passes its recipe in as defaults, so that the numbers stand where the loop
is. What this file does not do: read files or look at the machine (common.py, checkpoint.py).
"""

import argparse
import re
import sys
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16", "float64", "fp32", "bf16", "fp16", "fp64")

# --optimizer -> its default rate as a multiple of the stage's AdamW rate (sources: docs/training.md)
OPTIMIZERS = {"muon": 1.0, "adamw": 1.0, "lion": 0.3, "sophia": 1.0, "schedulefree": 1.0}
# why a stage cannot serve one of them
UNSERVED = {
    "sophia": "it measures curvature with labels drawn from next-token predictions, as only pretraining and SFT can",
    "schedulefree": "it trains at other weights than it samples from, so the first ratio of a rollout would not be 1",
}


class Parser(argparse.ArgumentParser):
    """argparse with this project's rules: no abbreviations, hyphens as good as underscores, defaults shown in the
    help."""

    def __init__(self, description, prog=None):
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self.by_optimizer = {}  # flag -> function of the optimizer's name that gives its default
        self.unserved = ()  # optimizers that this script refuses
        self.length = ()  # default --max_steps and --epochs, of a training script

    def parse_args(self, args=None, namespace=None):
        """As argparse's, with hyphens in flags read as underscores, and defaults that depend on --optimizer."""
        args = sys.argv[1:] if args is None else list(args)
        # only the flag itself is rewritten: its value may be a path with hyphens
        args = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in args]
        args = super().parse_args(args, namespace)
        if self.length:
            steps, epochs = self.length
            if args.max_steps is None:  # a stage's usual number of steps must not end what was asked for
                args.max_steps = 0 if args.epochs is not None or args.max_minutes else steps
            args.epochs = epochs if args.epochs is None else args.epochs
        for name, default in self.by_optimizer.items():
            if getattr(args, name) is None:
                setattr(args, name, default(args.optimizer))
        if getattr(args, "use_wandb", 0):
            args.tracker = "wandb"
        if self.unserved and args.optimizer in self.unserved:
            self.error(f"--optimizer {args.optimizer}; {UNSERVED[args.optimizer]}; give one of "
                       f"{', '.join(name for name in OPTIMIZERS if name not in self.unserved)}")
        if getattr(args, "patience_metric", "") == "regression_pass_rate" and not args.regression_interval:
            self.error("--patience_metric regression_pass_rate with --regression_interval 0; it would never be "
                       "measured; give --regression_interval 1")
        if getattr(args, "patience", 0) and not args.eval_interval:
            self.error("--patience with --eval_interval 0; it counts evaluations; give --eval_interval N")
        if getattr(args, "patience_metric", "") == "exact_match" and args.patience and not args.eval_prompts:
            self.error("--patience_metric exact_match with --eval_prompts 0; it would never be measured; give "
                       "--eval_prompts 120")
        if hasattr(args, "eval_batches"):
            args.eval_rows = args.eval_batches * args.batch_size  # a resume keeps it (checkpoint.load_resume)
        sharing = [f"--{name} 1" for name in ("zero", "fsdp") if getattr(args, name, 0)]
        if len(sharing) == 2:
            self.error("--zero 1 with --fsdp 1; FSDP shares the optimizer's state as well; give one of them")
        if sharing and args.optimizer != "adamw":
            self.error(f"{sharing[0]} with --optimizer {args.optimizer}; only AdamW's state is shared; give "
                       f"--optimizer adamw, or leave {sharing[0]} out")
        return args

    def error(self, message):
        """Leave with exit code 2 and one message (argparse would print the whole usage before it)."""
        self.exit(2, f"error: {message}\nSee: python {Path(sys.argv[0]).name} --help\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        # "(default: None)" would tell nobody anything; such a flag's help says what its absence means
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


def switch(parser, name, default, help):
    """Add a 0/1 flag whose value may be left out: absent = default, `--x` = 1, `--x 0` = 0 (type=bool would read
    'False' as true)."""
    parser.add_argument(name, type=int, choices=(0, 1), nargs="?", const=1, default=default, help=help)


def positive(kind, zero=False, below=1e15):
    """A type for argparse: a number above 0 (or from 0 on) and below a limit, so that absurd values are refused
    before any data is read."""

    def convert(text):
        value = kind(text)
        # written so that nan fails it
        if not 0 <= value < below or (value == 0 and not zero):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if zero else 'above'} 0 and below {below:g}")
        return value

    convert.__name__ = kind.__name__
    return convert


def folder_name(text):
    """A type for argparse: the name of a checkpoint, which stands beside folders with other uses."""
    name = Path(text).name
    # a folder in the folder of another run would go when that one is saved again
    if (Path(text).parts != (name,) or name in ("..", "logs", "cache", "data", "tokenizer")
            or name.endswith((".tmp", ".previous"))):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a checkpoint below --save_dir; it is one folder; "
                                         "logs, cache, data and tokenizer are taken, .tmp and .previous mark folders "
                                         "that are being written; give another")
    return text


def whole_number(text):
    """A type for argparse: a seed, which torch keeps in 64 bits."""
    if not -2**63 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} does not fit into 64 bits")
    return int(text)


def run_flags(parser, save_weight, eval_interval, save_interval=100, log_interval=10, watched=("val_loss",)):
    """Add the flags of a run that mean the same in every training script: where it is written, on what it runs, how
    often it speaks. watched: the held-out numbers that --patience can go by, the usual one first."""
    count = positive(int, zero=True)
    g = parser.add_argument_group("output")
    g.add_argument("--save_dir", default="out", help="folder of all checkpoints")
    g.add_argument("--save_weight", type=folder_name, default=save_weight,
                   help="name of this checkpoint below --save_dir")
    g.add_argument("--log_interval", type=positive(int), default=log_interval,
                   help="optimizer steps between two lines of metrics.jsonl")
    g.add_argument("--plot_interval", type=count, default=0,
                   help="optimizer steps after which curves.png is drawn again (a second each), 0 = only at the end")
    switch(g, "--health", 0, "log the activations behind each block as well: a little slower at the logged steps")
    g.add_argument("--tracker", default="none", choices=("none", "tensorboard", "wandb", "swanlab"),
                   help="where the numbers of metrics.jsonl go as well; offline unless you are logged in there")
    switch(g, "--use_wandb", 0, "another name for --tracker wandb")
    g.add_argument("--eval_interval", type=count, default=eval_interval,
                   help="optimizer steps between evaluations, 0 = only at the end")
    g.add_argument("--save_interval", type=count, default=save_interval,
                   help="optimizer steps between checkpoints, 0 = only at the end")
    g.add_argument("--patience", type=count, default=0,
                   help="end early when so many evaluations in a row have not bettered --patience_metric, 0 = never")
    g.add_argument("--patience_metric", default=watched[0], choices=watched, help="held-out number to go by")
    switch(g, "--keep_resume", 1, "keep the optimizer state after the end, so that training can go on")
    g = parser.add_argument_group("run")
    switch(g, "--from_resume", 0,
           "go on from the last checkpoint of --save_weight (starts fresh, and says so, where there is none)")
    switch(g, "--if_needed", 0,
           "skip when this checkpoint is finished with the same flags and inputs, resume when it was interrupted")
    switch(g, "--overwrite", 0, "replace a checkpoint of that name")
    switch(g, "--show_batch", 0, "print the tokens of two samples, and which of them are trained, before training")
    machine_flags(g)


def machine_flags(g):
    """Add the flags of whatever runs a model: on what, how exactly, with which random numbers."""
    g.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), or a torch device such as cuda:1")
    g.add_argument("--dtype", default="auto", choices=("auto", *DTYPES),
                   help="autocast dtype; float64 turns autocast off")
    g.add_argument("--threads", type=positive(int, zero=True, below=1025), default=0,
                   help="CPU threads of this process, 0 = cores / processes on this machine")
    g.add_argument("--seed", type=whole_number, default=42,
                   help="seed of all random numbers: weights, data order, sampling")
    switch(g, "--debug", 0, "show the traceback of an error")


def regression_flags(parser):
    """Add the flags of the suite of fixed prompts, for scripts whose model chats."""
    g = parser.add_argument_group("fixed prompts")
    g.add_argument("--regression_interval", type=positive(int, zero=True), default=0,
                   help="evaluations between two runs of the suite of fixed prompts, which the last one always has; "
                        "0 = none")
    suite_path(g)


def suite_path(parser):
    """Add --regression_path, which eval.py has as well."""
    parser.add_argument("--regression_path", default=str(Path(__file__).parent / "assets" / "regression.jsonl"),
                        help="file of fixed prompts, each with answer and check")


def optim_flags(parser, batch_size, learning_rate, muon_learning_rate, max_steps=0, epochs=1.0, warmup_steps=0.05,
                schedule="linear", weight_decay=0.0, accumulation_steps=1, grad_clip=1.0, optimizer="muon",
                unserved=("sophia",), beside_muon=None):
    """Add the optimisation flags; a script passes its own recipe as defaults, so that the numbers stand where the
    loop is. learning_rate is AdamW's. beside_muon: its rate for what Muon leaves to it, in scripts that train weights
    from nothing. unserved: optimizers that the script refuses."""
    g = parser.add_argument_group("optimisation")
    g.add_argument("--batch_size", type=positive(int), default=batch_size, help="samples per process and micro-step")
    g.add_argument("--accumulation_steps", type=positive(int), default=accumulation_steps,
                   help="micro-steps per optimizer step")
    instead = ", 0 where --epochs or --max_minutes is given" * (max_steps > 0)
    g.add_argument("--max_steps", type=positive(int, zero=True),
                   help=f"optimizer steps, 0 = as --epochs says (default: {max_steps}{instead})")
    g.add_argument("--epochs", type=positive(float),
                   help=f"passes over the data, when --max_steps is 0; may be a fraction (default: {epochs:g})")
    parser.length = max_steps, epochs
    g.add_argument("--max_minutes", type=positive(float, zero=True), default=0.0,
                   help="wall-clock budget: sets the steps from the measured speed")
    parser.unserved = unserved
    refused = f"; not here: {', '.join(unserved)}" if unserved else ""
    g.add_argument("--optimizer", default=optimizer, choices=tuple(OPTIMIZERS),
                   help=f"muon: Muon on 2D weights, AdamW on the rest; sophia: Sophia-G{refused}")
    parser.by_optimizer |= {
        "learning_rate": lambda name: beside_muon if name == "muon" and beside_muon
        else learning_rate * OPTIMIZERS[name],
        # Schedule-Free averages instead of falling; a rate that falls as well would end its mean early
        "schedule": lambda name: "constant" if name == "schedulefree" else schedule,
    }
    g.add_argument("--learning_rate", type=positive(float, below=1),
                   help=f"peak rate, beside Muon of the AdamW part ({rates(learning_rate, beside_muon)})")
    g.add_argument("--muon_learning_rate", type=positive(float, below=1), default=muon_learning_rate,
                   help="peak rate of the Muon part")
    g.add_argument("--warmup_steps", type=positive(float, zero=True), default=warmup_steps,
                   help="steps of linear warm-up; below 1: share of all steps")
    g.add_argument("--schedule", choices=("linear", "cosine", "wsd", "constant"),
                   help=f"shape of the rate after warm-up (default: {schedule}, with schedulefree constant)")
    g.add_argument("--weight_decay", type=positive(float, zero=True), default=weight_decay,
                   help="decoupled weight decay on 2D weights")
    g.add_argument("--grad_clip", type=positive(float, zero=True), default=grad_clip,
                   help="largest gradient norm, 0 = no clipping")
    if beside_muon:
        # Beside Muon AdamW moves little but the embedding. A row of it changes when its token occurs, so the mean
        # gradient should forget soon; and at such a rate rows need a decay to stay as short as later stages expect them
        parser.by_optimizer["adam_beta1"] = lambda name: 0.5 if name == "muon" else 0.9
        g.add_argument("--adam_beta1", type=positive(float, below=1),
                       help="memory of AdamW's mean gradient (default: 0.5 beside Muon, else 0.9)")
        g.add_argument("--embedding_decay", type=positive(float, zero=True), default=0.2,
                       help="weight decay of embedding and head beside Muon; elsewhere they have --weight_decay")
    if "sophia" not in unserved:
        g.add_argument("--hessian_interval", type=positive(int), default=10,
                       help="sophia: optimizer steps between two estimates of the curvature, each a second backward "
                            "pass")


def sharding_flags(parser):
    """Add the flags of models beyond one card; Parser refuses what does not go with them."""
    g = parser.add_argument_group("several processes")
    switch(g, "--zero", 0, "share AdamW's state among the processes of torchrun (ZeRO); needs --optimizer adamw")
    switch(g, "--fsdp", 0,
           "share weights, gradients and AdamW's state among the processes of torchrun (FSDP); needs --optimizer adamw")


def rates(adamw, beside_muon=None):
    """The default rates of all optimizers as one phrase for a help text; arguments as of optim_flags()."""
    others = [f", with {name} {adamw * factor:g}" for name, factor in OPTIMIZERS.items() if factor != 1]
    muon = f"{beside_muon:g}, with others " if beside_muon else ""
    return f"default: {muon}{adamw:g}{''.join(others)}"


def data_flags(parser, data_path, max_seq_len, val_ratio=0.01):
    """Add the flags of a training set with its held-out part."""
    g = parser.add_argument_group("data")
    g.add_argument("--data_path", nargs="+", default=[data_path],
                   help="training files (.jsonl, .json, .csv, .txt, each also .gz; .parquet) or globs")
    g.add_argument("--val_path", nargs="+", default=[],
                   help="held-out files; without them --val_ratio of the training files is held out")
    g.add_argument("--val_ratio", type=positive(float, zero=True), default=val_ratio,
                   help="held-out share, chosen by document hash")
    g.add_argument("--max_seq_len", type=positive(int), default=max_seq_len, help="tokens per row")
    g.add_argument("--cache_dir", default="out/cache", help="where tokenised data is kept between runs")
    switch(g, "--skip_bad", 0, "skip and count unreadable lines instead of stopping at the first")
