"""Fixtures that several test files share: a tiny tokenizer, folders of tiny models that carry it, and small runs of
every training script."""
import functools
import importlib
import json

import pytest
import torch

import checkpoint
import cli
import common
import report
from configuration import ModelConfig
from decoding import KVCache
from model import ScalarHead, Transformer
from tokenizer import train

# Before the first bf16 product of the session: where the machine announces AMX units that it does not let a program
# use, this rules them out, and no test kills pytest. 0.0: bf16 crashes all the same, tests that need it skip.
BF16_SPEEDUP = common.bf16_speedup()

draw_report = report.draw  # the real one, for its own tests

SENTENCES = ["What is 2 + 3? The answer is 5.", "Sure! It is a brown cat, and the dog is grey.",
             "请问 1 + 4 等于多少？答案是：5。", "好的！小猫是棕色的。",
             "Anna has three apples and gives away one.", "user assistant system"]
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
KINDS = {"dense": {}, "moe": EXPERTS, "shared": EXPERTS | {"n_shared_experts": 1}}
TEACHER = dict(hidden_size=48, initializer_range=0.2)  # larger than a student, and with clear opinions


@pytest.fixture(autouse=True)
def no_report_pictures(monkeypatch):
    """Every run ends with a report; its pictures would take most of a small run's time."""
    monkeypatch.setattr(report, "draw", lambda *inputs: "")


@pytest.fixture(autouse=True)
def unwritten_slots_are_nan(monkeypatch):
    """A cache begins as memory that nobody has written: whatever reads it is found out."""
    begin = KVCache.__init__

    def poisoned(cache, *args, **kwargs):
        begin(cache, *args, **kwargs)
        cache.kv.fill_(float("nan"))

    monkeypatch.setattr(KVCache, "__init__", poisoned)


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")


@pytest.fixture(scope="session")
def tokenizer():
    """320 ids, learnt by the Python trainer, so that no test needs the Rust one."""
    return train(SENTENCES, vocab_size=320, backend="python", progress=False)


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """model_folder(kind) -> Path of a random two-layer model with its tokenizer; kind: of KINDS, or teacher."""
    made = {}

    def folder(kind="dense"):
        if kind not in made:
            shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=64, max_position_embeddings=256) | (KINDS | {"teacher": TEACHER})[kind]
            config = ModelConfig(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id,
                                 eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, **shape)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = Transformer(config)
            made[kind] = tmp_path_factory.mktemp("models") / kind
            model.save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return folder


def parse(*argv, build=None):
    """Namespace of a small parser with one flag of each kind, from these words."""
    parser = cli.Parser("test")
    parser.add_argument("--data_path", nargs="+", default=["a.jsonl"])
    parser.add_argument("--hidden_size", type=cli.positive(int), help="width")
    cli.switch(parser, "--use_moe", 0, "experts")
    cli.optim_flags(parser, batch_size=8, learning_rate=1e-3, muon_learning_rate=1e-2)
    cli.run_flags(parser, save_weight="test", eval_interval=10)
    return parser.parse_args(list(argv))


def run_args(folder, **changes):
    """Namespace of a run that writes to folder/run."""
    args = parse("--save_dir", str(folder), "--save_weight", "run", "--device", "cpu", "--dtype", "float32",
                 "--threads", "1")
    for name, value in changes.items():
        setattr(args, name, value)
    return args


DATA = {"train_pretrain": "text", "train_sft": "chat", "train_reward": "pairs", "train_dpo": "pairs",
        "train_ppo": "prompts", "train_grpo": "prompts", "train_distill": "text"}
FEW = {"train_sft": ["--eval_prompts", "2", "--max_new_tokens", "4"],
       "train_dpo": ["--eval_prompts", "2", "--max_new_tokens", "4"],
       "train_ppo": ["--eval_prompts", "2", "--max_new_tokens", "4", "--rollout_size", "4"],
       "train_grpo": ["--eval_prompts", "2", "--max_new_tokens", "4", "--num_generations", "2", "--eval_samples", "1"]}


def data_row(kind, i):
    """Row i of a small data set; lengths differ, so that no two batches have as many targets."""
    a, b = i % 7, i // 7
    question, answer = f"What is {a} + {b}?", f"{'Sure! ' * (i % 4)}The answer is {a + b}."
    checks = {"answer": str(a + b), "check": "number", "lang": "en", "skill": "addition"}
    turn = {"role": "user", "content": question}
    return {"text": {"text": f"{question} {answer}"},
            "chat": {"conversations": [turn, {"role": "assistant", "content": answer}], **checks},
            "pairs": {"prompt": question, "chosen": answer, "rejected": str(a + b + i % 2), "kind": "curt"},
            "prompts": {"conversations": [turn], **checks}}[kind]


def by_sum(answer, item):
    """A rule that a random model fulfils half of the time, in place of GRPO's arithmetic."""
    return float(sum(answer.ids) % 2)


def cut(file):
    """Take the last byte of a file away."""
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    """Change one bit in the middle, where the numbers are: neither torch.load nor safetensors would notice."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.fixture
def stage(stage_of, tmp_path):
    """stage_of with tmp_path as its folder."""
    return functools.partial(stage_of, tmp_path)


@pytest.fixture(scope="session")
def stage_of(model_folder, tokenizer):
    """stage_of(folder, name, *flags, kind="dense", rows=24, parent=None) -> (module, argv) of a small float64 run of a
    training script, on its own data (chats with the flags --stage sft), into folder/out/run, from the weights in
    model_folder(kind) or `parent`."""

    def made(tmp_path, name, *flags, kind="dense", rows=24, parent=None):
        module = importlib.import_module(name)
        parent = parent or model_folder(kind)
        for part, numbers in {"train": range(rows), "held": range(rows, rows + 6)}.items():
            lines = [json.dumps(data_row("chat" if "sft" in flags else DATA[name], i)) + "\n" for i in numbers]
            (tmp_path / f"{name}.{part}.jsonl").write_text("".join(lines))
        if name == "train_ppo":
            reward = ScalarHead.from_pretrained(parent)
            with torch.random.fork_rng():
                torch.manual_seed(1)
                torch.nn.init.normal_(reward.score.weight)
            reward.save_pretrained(tmp_path / "judge")
            tokenizer.save_pretrained(tmp_path / "judge")
            facts = {"metrics": {"accuracy": 0.9}, "score_mean": 0.0, "score_std": 1.0}
            checkpoint.write_minillm(tmp_path / "judge", facts)
            flags = ("--reward_weight", str(tmp_path / "judge"), *flags)
        if name == "train_distill":
            flags = ("--teacher", str(model_folder("teacher")), *flags)
        argv = ["--from_weight", str(parent), "--data_path", str(tmp_path / f"{name}.train.jsonl"),
                "--val_path", str(tmp_path / f"{name}.held.jsonl"), "--save_dir", str(tmp_path / "out"),
                "--save_weight", "run", "--cache_dir", str(tmp_path / "cache"), "--device", "cpu",
                "--dtype", "float64", "--threads", "1", "--max_seq_len", "64", "--batch_size", "2",
                "--accumulation_steps", "1", "--max_steps", "4", "--log_interval", "1", "--eval_interval", "0",
                "--save_interval", "0", *FEW.get(name, [])]
        return module, [*argv, *flags]

    return made
