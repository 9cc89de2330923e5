"""Fixtures that several test files share: a tiny tokenizer, and folders of tiny models that carry it."""
import pytest
import torch

import common
from model import ModelConfig, Transformer
from tokenizer import train

# Before the first bf16 product of the session: where the machine announces AMX units that it does not let a program
# use, this rules them out, and no test kills pytest. 0.0: bf16 crashes all the same, tests that need it skip.
BF16_SPEEDUP = common.bf16_speedup()

SENTENCES = ["What is 2 + 3? The answer is 5.", "Sure! It is a brown cat, and the dog is grey.",
             "请问 1 + 4 等于多少？答案是：5。", "好的！小猫是棕色的。",
             "Anna has three apples and gives away one.", "user assistant system"]
KINDS = {"dense": {}, "moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
         "shared": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1)}


@pytest.fixture(scope="session")
def tokenizer():
    """320 ids, learnt by the Python trainer, so that no test needs the Rust one."""
    return train(SENTENCES, vocab_size=320, backend="python", progress=False)


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """model_folder(kind) -> Path of a random two-layer model with its tokenizer; kind: dense, moe, shared."""
    made = {}

    def folder(kind="dense"):
        if kind not in made:
            config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
                                 max_position_embeddings=256, bos_token_id=tokenizer.bos_id,
                                 eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, **KINDS[kind])
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = Transformer(config)
            made[kind] = tmp_path_factory.mktemp("models") / kind
            model.save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return folder
