"""The model: a Qwen3-shaped Transformer, its layers, its cache, its sampling, and its Hugging Face folder.

Read it from top to bottom, each class uses only what stands above it: ModelConfig -> RMSNorm -> rotary positions ->
KVCache -> Attention -> MLP -> MoE -> Block -> Backbone -> the folder on disk -> sampling -> Transformer -> ScalarHead.

What it is not: no training (train_*.py), no text (tokenizer.py), no beam search or other decoding (generation.py).
Parameter names are the names that `transformers` writes to disk, so a saved folder opens there without any conversion:
dense = Qwen3ForCausalLM, experts = Qwen3MoeForCausalLM, experts with shared ones = Dots1ForCausalLM.

Papers: Vaswani et al. 2017 (arXiv:1706.03762); RMSNorm, Zhang and Sennrich 2019 (1910.07467); RoPE, Su et al. 2021
(2104.09864); SwiGLU, Shazeer 2020 (2002.05202); GQA, Ainslie et al. 2023 (2305.13245); YaRN, Peng et al. 2023
(2309.00071); experts and balance loss, Fedus et al. 2021 (2101.03961); bias balancing, Wang et al. 2024 (2408.15664);
Qwen3, Yang et al. 2025 (2505.09388).

    python -c "from model import *; print(Transformer(ModelConfig.preset('tiny')))"     # the picture of the modules
    m = Transformer.from_pretrained("out/sft");  logits = m(ids)                          # ids [B,T] -> logits [B,T,V]

Letters: B batch, T tokens, V vocabulary, D hidden size, H heads, K kv heads, C head_dim, S cache slots, E experts,
L layers, N tokens of a batch laid end to end.
"""
import copy
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# model_type in config.json -> the class of `transformers` that reads our folder
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "minillm_plain": "MiniLLMPlainForCausalLM",  # no such class exists: other readers shall refuse, not misread
}
# Type, smallest and largest accepted value. The upper ends are far above any real model: they turn a corrupt or hostile
# config.json into a message instead of an endless loop or an allocation of terabytes.
NUMBERS = {
    "vocab_size": (int, 1, 2**24), "hidden_size": (int, 2, 2**17), "num_hidden_layers": (int, 1, 1024),
    "num_attention_heads": (int, 1, 2**12), "num_key_value_heads": (int, 1, 2**12), "head_dim": (int, 2, 2**13),
    "intermediate_size": (int, 1, 2**20), "max_position_embeddings": (int, 1, 2**24), "num_experts": (int, 0, 1024),
    "num_experts_per_tok": (int, 1, 1024), "moe_intermediate_size": (int, 1, 2**20), "n_shared_experts": (int, 0, 64),
    "first_k_dense_replace": (int, 0, 1024), "rms_norm_eps": (float, 1e-12, 0.1), "rope_theta": (float, 1.0, 1e12),
    "dropout": (float, 0.0, 0.99), "initializer_range": (float, 0.0, 10.0), "routed_scaling_factor": (float, 1e-6, 1e6),
}  # fmt: skip
CHOICES = {"hidden_act": ("silu", "gelu"), "mlp_type": ("gated", "plain"), "tie_word_embeddings": (True, False),
           "norm_topk_prob": (True, False)}
# Fields of experts: only models that have some write them
EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "norm_topk_prob",
                 "routed_scaling_factor", "first_k_dense_replace")
# What --use_moe 1 adds to a preset. Two experts a token, not one: their two weights are normalised to sum 1, so the
# loss teaches the router how to mix them; one expert's normalised weight would be the constant 1, without a gradient.
MOE_BLOCK = {"num_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
PRESETS = {
    # nano is what two CPU cores can feed in a quarter of an hour; larger ones learn less there (docs/results.md)
    "nano": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=384),
    "tiny": dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768),
    "small": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408),
    "base": dict(hidden_size=768, num_hidden_layers=16, num_attention_heads=8, intermediate_size=2048),
    "moe": dict(hidden_size=640, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1728, **MOE_BLOCK),
}


def need(condition, wrong: str, rule: str, fix: str):
    """Raise a ValueError in the project's three parts (what is wrong; the rule; the fix) unless the condition holds."""
    if not condition:
        raise ValueError(f"{wrong}; {rule}; {fix}")


def is_number(x, kind: type, low: float, high: float) -> bool:
    """True for a number in [low, high]; kind float takes an int too. Never for a bool, which Python counts as an int,
    nor for NaN, which JSON can hold and which compares false with everything."""
    return isinstance(x, (int, kind)) and not isinstance(x, bool) and low <= x <= high


# -- Configuration -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, in the words of `transformers`. Checks itself; a bad value is a ValueError that names it.

    None means "derive it": head_dim = hidden_size / heads, intermediate_size = 8/3 hidden_size rounded up to 64 (SwiGLU
    has three matrices where a plain MLP of width 4D has two), moe_intermediate_size = intermediate_size,
    norm_topk_prob = more than one expert a token.
    """

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2  # query heads share these (GQA): the cache shrinks by heads / kv heads
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048  # tokens a row may have, prompt and answer together
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # YaRN: {"rope_type": "yarn", "factor", "original_max_position_embeddings", ...}
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"  # "silu" = SwiGLU, "gelu" = GEGLU
    mlp_type: str = "gated"  # "plain" = up, activation, down: for study only, no other program reads such a folder
    tie_word_embeddings: bool = True  # one table reads tokens and scores them; at V 6400 a quarter of a tiny model
    initializer_range: float = 0.02
    dropout: float = 0.0  # on embeddings and on both branches of a block, in training only
    num_experts: int = 0  # routed experts; 0 = dense
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    n_shared_experts: int = 0  # experts every token visits; more than 0 = sigmoid router with bias balancing (Dots1)
    norm_topk_prob: bool | None = None  # weights of the chosen experts sum to 1
    routed_scaling_factor: float = 1.0  # Dots1 only
    first_k_dense_replace: int = 0  # so many layers at the bottom stay dense
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        for name, rule in NUMBERS.items():
            value = getattr(self, name)
            derived = value is None and name in ("head_dim", "intermediate_size", "moe_intermediate_size")
            need(derived or is_number(value, *rule), f"{name}={value!r}",
                 f"it is {'a whole' if rule[0] is int else 'a'} number from {rule[1]} to {rule[2]}", "correct it")
        self._derive()
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            need(value in choices, f"{name}={value!r}", f"it is one of {', '.join(map(str, choices))}", "choose one")
        self._check_relations()

    def _derive(self):
        """Fill the fields left at None. A frozen dataclass is written once, here, through object.__setattr__."""
        need(self.head_dim or self.hidden_size % self.num_attention_heads == 0,
             f"hidden_size={self.hidden_size} with num_attention_heads={self.num_attention_heads}",
             "the width is divided evenly among the heads", "change one of them, or give head_dim")
        width = self.intermediate_size or math.ceil(self.hidden_size * 8 / 3 / 64) * 64
        derived = {"head_dim": self.hidden_size // self.num_attention_heads, "intermediate_size": width,
                   "moe_intermediate_size": width, "norm_topk_prob": self.num_experts_per_tok > 1}
        values = {name: value for name, value in derived.items() if getattr(self, name) is None}
        if isinstance(self.eos_token_id, list):  # JSON has no tuples
            values["eos_token_id"] = tuple(self.eos_token_id)
        if self.rope_scaling is not None:
            values["rope_scaling"] = check_yarn(self.rope_scaling, self.max_position_embeddings)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_relations(self):
        heads, kv, experts, shared = (self.num_attention_heads, self.num_key_value_heads, self.num_experts,
                                      self.n_shared_experts)
        need(self.head_dim % 2 == 0, f"head_dim={self.head_dim}", "rotary positions turn pairs of numbers, so it is "
             "even", "change hidden_size or num_attention_heads")
        need(heads % kv == 0, f"num_attention_heads={heads} with num_key_value_heads={kv}",
             "each kv head serves the same number of query heads", "make the first a multiple of the second")
        need(not experts or self.num_experts_per_tok <= experts, f"num_experts_per_tok={self.num_experts_per_tok} with "
             f"num_experts={experts}", "a token cannot visit more experts than there are", "lower it")
        need(not experts or self.mlp_type == "gated", "mlp_type='plain' with experts", "experts are gated in every "
             "published format", "set mlp_type to gated or num_experts to 0")
        # the router of Dots1 sums the two best experts of each group even when there is one group
        need(not shared or experts >= 2, f"n_shared_experts={shared} with num_experts={experts}",
             "shared experts stand beside at least 2 routed ones", "raise num_experts, or set n_shared_experts to 0")
        eos = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for name, value in (("bos", self.bos_token_id), ("pad", self.pad_token_id), *(("eos", i) for i in eos)):
            need(value is None or is_number(value, int, 0, self.vocab_size - 1), f"{name}_token_id={value!r}",
                 f"a token id is a whole number below vocab_size {self.vocab_size}", "take the ids from the tokenizer")

    @classmethod
    def preset(cls, name: str, **overrides) -> "ModelConfig":
        """A named shape ("nano", "tiny", "small", "base" or "moe") with single fields replaced; None keeps the
        preset's value."""
        need(name in PRESETS, f"preset {name!r}", f"it is one of {', '.join(PRESETS)}", "choose one of them")
        given = {key: value for key, value in overrides.items() if value is not None}
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known)
        need(not unknown, f"unknown model field {', '.join(unknown)}", f"fields are {', '.join(sorted(known))}",
             "correct the spelling")
        shape = dict(PRESETS[name])
        if given.get("hidden_size", shape["hidden_size"]) != shape["hidden_size"]:
            del shape["intermediate_size"]  # another width wants its own 8/3, not the preset's number
        return cls(**(shape | given))

    @property
    def model_type(self) -> str:
        """Name of the architecture in config.json: qwen3, qwen3_moe, dots1, or our own for the plain MLP."""
        if self.mlp_type == "plain":
            return "minillm_plain"
        return ("dots1" if self.n_shared_experts else "qwen3_moe") if self.num_experts else "qwen3"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` has experts instead of one MLP."""
        return self.num_experts > 0 and layer >= self.first_k_dense_replace

    def to_dict(self) -> dict:
        """config.json as `transformers` 4.51 to 5.x reads it.

        Every version silently misreads the other's spelling (4.x falls back to theta 10000 when it finds only
        rope_parameters), so both are written by hand: rope_theta and rope_parameters, torch_dtype and dtype,
        num_experts, num_local_experts and n_routed_experts. save_folder adds the dtype.
        """
        rope = dict(self.rope_scaling or {"rope_type": "default"})
        # our own words first; transformers ignores those it does not know (mlp_type, dropout)
        out = {field.name: getattr(self, field.name) for field in fields(self)}
        out |= {
            "architectures": [ARCHITECTURES[self.model_type]], "model_type": self.model_type,
            "rope_parameters": rope | {"rope_theta": self.rope_theta},
            # written out although they are defaults: another class's default, or next year's, may differ
            "attention_bias": False, "attention_dropout": 0.0, "use_cache": True, "use_sliding_window": False,
            "sliding_window": None, "max_window_layers": self.num_hidden_layers,
        }  # fmt: skip
        if self.model_type == "qwen3_moe":
            # every layer has experts but the lowest ones; without these two fields some versions decide otherwise
            out |= {"num_local_experts": self.num_experts, "decoder_sparse_step": 1,
                    "mlp_only_layers": list(range(self.first_k_dense_replace))}
        elif self.model_type == "dots1":
            # one group = no groups: DeepSeek's groups spare a cluster's network, we have none
            out |= {"num_local_experts": self.num_experts, "n_routed_experts": self.num_experts, "n_group": 1,
                    "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        else:
            out = {key: value for key, value in out.items() if key not in EXPERT_FIELDS}
        return out

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> "ModelConfig":
        """Read a config.json of ours or of `transformers` (either spelling). What this model cannot do is refused."""
        need(isinstance(raw, dict), f"{where} holds a {type(raw).__name__}", "it is a JSON object", "replace the file")
        kind = raw.get("model_type")
        need(isinstance(kind, str) and kind in ARCHITECTURES, f"model_type={kind!r} in {where}",
             f"this program reads {', '.join(ARCHITECTURES)}", "use a folder of one of these kinds")
        need(all(raw.get(key) is not None for key in ("vocab_size", "hidden_size", "num_hidden_layers",
                 "num_attention_heads")), f"a size is missing in {where}", "vocab_size, hidden_size, num_hidden_layers "
             "and num_attention_heads are required", "take the file from the model's source")
        refuse_foreign_features(raw, kind, where)
        # a field that is absent has the default of the class that wrote the file, not ours
        values = {"tie_word_embeddings": False, "max_position_embeddings": 32768,
                  "num_key_value_heads": raw["num_attention_heads"]}
        # Qwen3 alone has a fixed head_dim; the others derive it from the width
        values |= {"head_dim": 128} if kind == "qwen3" else {"norm_topk_prob": False}
        values |= {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None and f.name != "rope_scaling"}
        # version 5 wins where both are there, as it does in transformers
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        need(isinstance(rope, dict), f"rope_parameters={rope!r} in {where}", "it is an object", "correct the file")
        values["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
        # edited by hand in one place only? Which of the two was meant nobody can know
        theta, scaling = raw.get("rope_theta"), raw.get("rope_scaling")
        need(not theta or theta == values["rope_theta"], f"rope_theta={theta!r} in {where}",
             f"rope_parameters beside it says {values['rope_theta']!r}", "change both")
        same = not scaling or isinstance(scaling, dict) and rope | scaling == rope
        need(same, f"rope_scaling={scaling!r} in {where}", f"rope_parameters beside it says {rope!r}", "change both")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        if kind in ("qwen3_moe", "dots1"):
            # three spellings of one number: Dots1's, version 5's, version 4's
            counts = [raw.get(key) for key in ("n_routed_experts", "num_local_experts", "num_experts")]
            values["num_experts"] = next((n for n in counts if n is not None), 0)
            if kind == "qwen3_moe":
                values |= {"first_k_dense_replace": len(raw.get("mlp_only_layers") or []), "n_shared_experts": 0}
        else:
            values |= {"num_experts": 0, "n_shared_experts": 0}
        return cls(**values)


def refuse_foreign_features(raw: dict, kind: str, where: str):
    """ValueError for settings of a config.json that change the mathematics in a way this model does not have."""
    for key, allowed in (("attention_bias", False), ("use_sliding_window", False), ("n_group", 1), ("topk_group", 1),
                         ("decoder_sparse_step", 1), ("partial_rotary_factor", 1), ("quantization_config", None)):
        value = raw.get(key)
        need(value is None or value == allowed, f"{key}={value!r} in {where}", f"only {allowed} is supported",
             "use a model without this feature")
    layers = raw.get("layer_types") or []
    # Dots1 has no switch: without layer_types its layers above max_window_layers have a window by default
    windows = any(name != "full_attention" for name in layers) or (
        kind == "dots1" and not layers and raw.get("sliding_window", 4096) is not None
        and raw.get("max_window_layers", 62) < raw["num_hidden_layers"])
    need(not windows, f"sliding-window layers in {where}", "every layer sees the whole context here",
         "use a model without them")
    dense = raw.get("mlp_only_layers") or []
    need(dense == list(range(len(dense))), f"mlp_only_layers={dense!r} in {where}",
         "only the lowest layers may be dense", "use a model of that kind")
    need(kind != "dots1" or raw.get("n_shared_experts"), f"n_shared_experts missing in {where}",
         "a Dots1 model has shared experts", "take the file from the model's source")


def check_yarn(scaling: dict, max_positions: int) -> dict:
    """The fields of a YaRN entry, checked, with `transformers`' defaults filled in.

    Raises: ValueError for other kinds of scaling (linear, dynamic, llama3 ...) and for bad numbers.
    """
    need(isinstance(scaling, dict), f"rope_scaling={scaling!r}", "it is an object or null", "correct the field")
    kind = scaling.get("rope_type", scaling.get("type"))
    need(kind == "yarn", f"rope_scaling with rope_type={kind!r}", "only default and yarn are known", "use one of them")
    out = {"rope_type": "yarn", "factor": scaling.get("factor"), "beta_fast": scaling.get("beta_fast") or 32,
           "original_max_position_embeddings": scaling.get("original_max_position_embeddings") or max_positions,
           "beta_slow": scaling.get("beta_slow") or 1}
    out |= {key: scaling[key] for key in ("attention_factor", "mscale", "mscale_all_dim", "truncate")
            if scaling.get(key) is not None}
    for key, value in out.items():
        fine = key in ("rope_type", "truncate") or is_number(value, float, 1e-6, 2**24)
        need(fine, f"{key}={value!r} of rope_scaling", "it is a positive number", "correct the field")
    return out


# -- Layers ------------------------------------------------------------------------------------------------------------
def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x r w and r = 1 / sqrt(mean(x^2) + eps): x [...,D], weight [D] -> [...,D], [...,1]."""
    r = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()
    return (x * r).mul_(weight), r


class _NormOnCPU(torch.autograd.Function):
    """RMSNorm with its gradient by hand: half the time. On a CPU F.rms_norm consists of small operations, and autograd
    goes back through all of them, each reading and writing tensors of x's size.

    With r = 1 / sqrt(mean(x^2) + eps), y = r x w and its gradient dy:
        dw = sum over the rows of r dy x          dx = r dy w - r^3 x mean(dy w x)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [...,D], weight [D] -> [...,D]."""
        y, r = normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [...,D]."""
        x, weight, r = ctx.saved_tensors
        products = (grad * x).flatten(0, -2)  # [N,D]
        # both sums as products of matrices, so that they read `products` once and write nothing of its size
        grad_weight = r.view(-1) @ products if ctx.needs_input_grad[1] else None
        mean = (products @ weight).view_as(r) / x.shape[-1]  # [...,1]
        return (grad * weight).mul_(r).addcmul_(x, mean * r**3, value=-1), grad_weight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: LayerNorm without mean and bias."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype.itemsize < 4:  # a bf16 copy of the weights: Qwen3's order is fp32, cast, then weight
            return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight
        x = x.to(self.weight.dtype)  # fp32 weights, also under autocast, where q and k arrive in bf16: all in fp32
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            # past autograd the same numbers, to the last bit: a policy's first step is measured against such a forward
            if not torch.is_grad_enabled():
                return normalize(x, self.weight, self.eps)[0]
            return _NormOnCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each pair of numbers [C/2], and the factor on cos and sin (1 without YaRN).

    YaRN: pairs that turn often within the trained context keep their frequency, pairs that turn less than about once
    are slowed down by `factor`, those between are blended; the numbers follow transformers' _compute_yarn_parameters.
    """
    size, theta, yarn = config.head_dim, config.rope_theta, config.rope_scaling
    # on the CPU, so that all devices turn by the same numbers
    power = theta ** (torch.arange(0, size, 2, dtype=torch.int64, device="cpu").float() / size)  # [C/2]
    if yarn is None:
        return 1.0 / power, 1.0

    def pair_turning(times):  # index of the pair that turns so many times within the original context
        return size * math.log(yarn["original_max_position_embeddings"] / (times * 2 * math.pi)) / (2 * math.log(theta))

    def scale(weight=1.0):
        return 0.1 * weight * math.log(yarn["factor"]) + 1.0 if yarn["factor"] > 1 else 1.0

    # between these two pairs lies the blend: `low` turns beta_fast (32) times in the trained context, `high` once
    low, high = pair_turning(yarn["beta_fast"]), pair_turning(yarn["beta_slow"])
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    pairs = torch.arange(size // 2, device="cpu").float()
    # 0.001 is transformers' guard against 0 / 0
    slowed = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)  # [C/2], 0 = keep, 1 = divide by factor
    frequencies = slowed / (yarn["factor"] * power) + (1 - slowed) / power
    # longer contexts spread attention thinner; a larger factor on cos and sin sharpens it again
    factor = yarn.get("attention_factor")
    if factor is None and yarn.get("mscale") and yarn.get("mscale_all_dim"):
        factor = scale(yarn["mscale"]) / scale(yarn["mscale_all_dim"])
    return frequencies, scale() if factor is None else factor


class Rotary(nn.Module):
    """Positions -> (cos, sin) of the rotary angles. Angles are never narrower than fp32, also in a bf16 model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        frequencies, self.factor = rotary_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) would round the frequencies: at position 1000 the angle would be off by radians. So after any
        # move or cast they are computed anew on the new device.
        super()._apply(fn, recurse)
        self.frequencies = rotary_frequencies(self.config)[0].to(self.frequencies.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B,T] (or [1,T]) -> cos and sin [B,T,1,C] as rotate() wants them: both halves of C have the same
        angles, one for a pair, and sin is negative in the first half. The same for all heads."""
        wide = torch.promote_types(dtype, torch.float32)
        angles = (positions[..., None].to(wide) * self.frequencies)[:, :, None]  # [B,T,1,C/2]
        cos, sin = (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) = (x[i], x[i + C/2]) of x [B,T,H,C] by its angle: (a cos - b sin, b cos + a sin). Pairs are
    halves apart, as in Qwen3 and Llama files, not neighbours as in the paper."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # rolled, (b, a) stands where (a, b) did


class KVCache:
    """Keys and values of all layers for up to `batch` rows of up to `slots` tokens, allocated once.

    Slot s of a row holds position s. `lengths` says how many slots of each row are real; what lies behind is never
    attended to and is overwritten next. Rows may differ in length ("ragged"), so prompts are padded on the right.
    """

    def __init__(self, config: ModelConfig, batch: int, slots: int, dtype=torch.float32, device="cpu"):
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, slots, config.head_dim)
        # Keys and values side by side, so that one copy writes both. What lies behind `end` is never read; up to there
        # every slot holds a number, be it of a masked token: its weight is 0, but 0 times NaN would be NaN.
        self.kv = torch.empty(shape, dtype=dtype, device=device)  # [L,2,B,K,S,C]
        self.slots = slots
        self.lengths = [0] * batch  # Python numbers: asking a tensor would stall a GPU at each token

    @property
    def end(self) -> int:
        """Length of the longest row."""
        return max(self.lengths, default=0)

    def reserve(self, count: int) -> Tensor:
        """Positions [B,count] of the next tokens ([1,count] where rows are equally long). Raises: ValueError when they
        do not fit."""
        end, rows = self.end, len(self.lengths)
        need(end + count <= self.slots, f"KV cache overflow: {end} + {count} tokens in {self.slots} slots",
             "a cache holds prompt and answer", "make it longer, or call truncate()")
        self.ragged = len(set(self.lengths)) > 1
        first = torch.tensor(self.lengths if self.ragged else [end], device=self.kv.device)  # [B] or [1]
        self.positions = first[:, None] + torch.arange(count, device=self.kv.device)
        # the views of all layers in one call each: taken layer by layer they cost as much as a small matrix product
        self.seen = self.kv[:, :, :rows, :, : end + count].unbind(0)  # L times [2,B,K,S',C]
        fresh = self.kv[:, :, :rows, :, end : end + count]
        if self.ragged:  # shorter rows write elsewhere
            fresh.zero_()
        self.fresh = fresh.unbind(0)  # L times [2,B,K,count,C]
        return self.positions

    def mask(self) -> Tensor | None:
        """Which slots each reserved token may look at [B,1,count,S'], or None when it is all of them."""
        count, end = self.positions.shape[1], self.seen[0].shape[3]
        if count == 1 and not self.ragged:
            return None
        return torch.arange(end, device=self.kv.device) <= self.positions[:, None, :, None]

    def write(self, layer: int, kv: Tensor) -> Tensor:
        """Store keys and values kv [2,B,K,T,C] at the reserved positions; returns all so far [2,B,K,S',C]. No gradient
        flows through a cache."""
        kv = kv.detach()
        if self.ragged:
            rows = torch.arange(len(self.lengths), device=kv.device)[:, None]  # [B,1]
            # indexed dimensions come first: [B,T,2,K,C]
            self.seen[layer][:, rows, :, self.positions] = kv.permute(1, 3, 0, 2, 4).to(self.kv.dtype)
        else:  # equal lengths: one strided copy, half the time of an indexed one
            self.fresh[layer].copy_(kv)
        return self.seen[layer]

    def advance(self, count: int):
        """Count the tokens that all layers have written."""
        self.lengths = [length + count for length in self.lengths]

    def set_lengths(self, lengths: list[int]):
        """Say how many slots of each row are real, after a prompt batch with padding on the right was written."""
        self.lengths = list(lengths)

    def keep(self, rows: list[int]):
        """Row i becomes what row rows[i] was; rows may be dropped, reordered or repeated."""
        assert len(rows) <= self.kv.shape[2], "more rows than the cache was made for"
        moves, end = [(new, old) for new, old in enumerate(rows) if new != old], self.end
        if all(old >= len(rows) for _, old in moves):  # holes filled from the tail: only those rows are copied
            for new, old in moves:
                self.kv[:, :, new, :, :end] = self.kv[:, :, old, :, :end]
        else:  # any other order (beam search): the right side is read whole before it is written
            self.kv[:, :, : len(rows), :, :end] = self.kv[:, :, rows, :, :end]
        self.lengths = [self.lengths[row] for row in rows]

    def append(self, other: "KVCache", rows: list[int]):
        """Add these rows of another cache behind the present ones. Neighbours that are equal are copied at once."""
        start, end = len(self.lengths), other.end
        self.kv[:, :, :start, :, self.end : end] = 0
        for row, same in itertools.groupby(rows):
            count = len(list(same))
            new = self.kv[:, :, start : start + count]  # [L,2,count,K,S,C]
            new[..., :end, :] = other.kv[:, :, row : row + 1, :, :end]
            new[..., end : self.end, :] = 0
            start += count
        self.lengths += [other.lengths[row] for row in rows]

    def expand(self, count: int):
        """Repeat every row `count` times, neighbours together: one prompt, many samples."""
        self.kv = self.kv.repeat_interleave(count, dim=2)
        self.lengths = [length for length in self.lengths for _ in range(count)]

    def truncate(self, length: int):
        """Forget everything behind position `length`: the next chat turn keeps the common prefix."""
        self.lengths = [min(n, length) for n in self.lengths]


@dataclass
class Prefix:
    """What a chat has read so far: ids, and their keys and values in row 0 of a cache.

    generate(..., prefix=p) begins behind the longest common beginning of p.ids and the prompt, and leaves in p what it
    has read and written itself. So each turn of a chat reads only what is new. Keys belong to the weights that made
    them: where weights change, a new Prefix is due.
    """

    ids: list[int] = field(default_factory=list)
    cache: KVCache | None = None


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on queries and keys before the rotation (Qwen3)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        d, c = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, c
        self.q_proj = nn.Linear(d, config.num_attention_heads * c, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * c, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * c, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * c, d, bias=False)
        # one gain per number of a head, shared by all heads; keeps q k' bounded, so bf16 softmax does not overflow
        self.q_norm, self.k_norm = RMSNorm(c, config.rms_norm_eps), RMSNorm(c, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, mask: Tensor | None = None, causal=True, cache: KVCache | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]. mask [B,1,T,S] bool (True = may look) replaces the causal rule."""
        b, t, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).view(b, t, -1, self.head_dim)), *rope)  # [B,T,H,C]
        k = rotate(self.k_norm(self.k_proj(x).view(b, t, -1, self.head_dim)), *rope)  # [B,T,K,C]
        v = self.v_proj(x).view(b, t, -1, self.head_dim)  # [B,T,K,C]
        q, keys, values = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B,H,T,C], [B,K,T,C] twice
        if cache is not None:
            keys, values = cache.write(self.layer, torch.stack((keys, values)))  # [2,B,K,T,C] -> [B,K,S,C] each
            # under autocast q is fp32 (its norm's type) while the cache holds what the products made
            q, keys, values = q.to(v.dtype), keys.to(v.dtype), values.to(v.dtype)
        if cache is not None and t == 1:
            # One token a row: the query heads of a kv head become the query rows of one head, so that keys are read
            # once and never repeated.
            q = q.reshape(b, keys.shape[1], -1, self.head_dim)  # [B,K,H/K,C]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            return self.o_proj(y.reshape(b, 1, -1))
        # With is_causal (training, prompts) the kernel skips the upper triangle; a mask costs it that. During a prompt
        # the cache was empty, so keys are exactly these T tokens.
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))  # [B,H,T,C] -> [B,T,H*C] -> [B,T,D]


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU with silu, GEGLU with gelu; the plain kind has no gate."""

    def __init__(self, config: ModelConfig, width: int | None = None):
        super().__init__()
        d, width = config.hidden_size, width or config.intermediate_size
        if config.mlp_type == "gated":
            self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)
        # the exact gelu with erf: transformers means that one by "gelu", "gelu_new" would be the tanh form
        self.act = F.silu if config.hidden_act == "silu" else F.gelu
        self.gated = config.mlp_type == "gated"

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses the experts of each token: softmax scores (Qwen3Moe), or sigmoid scores plus a bias that takes part in
    the choice only (Dots1, DeepSeek-V3)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.n_shared_experts:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,D] -> scores of all experts [N,E], weights and indices of the chosen ones [N,k]."""
        config = self.config
        # at least fp32 even under autocast: in bf16 near-ties flip, and a flipped expert is another function
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = x.to(wide) @ self.weight.to(wide).t()  # [N,E]
        scores = logits.sigmoid() if config.n_shared_experts else logits.softmax(-1)
        # the bias steers who is chosen, never how much a choice weighs: balancing leaves no trace in the gradient
        choice = scores + self.e_score_correction_bias if config.n_shared_experts else scores
        chosen = choice.topk(config.num_experts_per_tok, dim=-1).indices  # [N,k]
        weights = scores.gather(1, chosen)
        if config.norm_topk_prob:
            # 1e-20 stands in Dots1 against sigmoids that all underflow; far too small to change a softmax's sum
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, weights * (config.routed_scaling_factor if config.n_shared_experts else 1.0), chosen


class MoE(nn.Module):
    """Mixture of experts: each token visits its num_experts_per_tok best MLPs, and all shared ones.

    Two ways to keep the experts equally busy, one per router: softmax models add a balance loss (returned by forward);
    models with shared experts shift the router's bias once a step (update_bias) and need no second loss.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = nn.ModuleList(MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        if config.n_shared_experts:
            self.shared_experts = MLP(config, config.n_shared_experts * config.moe_intermediate_size)
        # Tokens each expert got since the last bias update. A plain attribute, not a buffer: DDP copies rank 0's
        # buffers over everybody else's at each forward.
        self.counts = None

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B,T,D] -> ([B,T,D], balance loss of each row [B]). token_mask [B,T]: real tokens, for statistics only."""
        b, t, d = x.shape
        tokens = x.reshape(-1, d)  # [N,D], N = B*T
        scores, weights, chosen = self.gate(tokens)  # [N,E], [N,k], [N,k]
        k = chosen.shape[1]
        # Sort the N*k visits by expert: each expert then multiplies one contiguous block instead of masked rows.
        order = chosen.flatten().argsort(stable=True)  # [N*k]; visit i is choice i % k of token i // k
        visits = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = tokens[order // k].split(visits)  # E tensors [visits,D]
        # Every expert runs, if need be on zero tokens: its gradient is then zero, not missing, and DDP, which waits
        # for the gradient of every parameter, does not hang.
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])  # [N*k,D]
        # back to token order through the inverse permutation; index_add_ would sum in random order on a GPU
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        y = (outputs[back].view(-1, k, d) * weights[..., None].to(outputs.dtype)).sum(1).view(b, t, d)
        if self.config.n_shared_experts:
            y = y + self.shared_experts(x)
        return y, self._statistics(scores.view(b, t, -1), chosen.view(b, t, k), token_mask)

    def _statistics(self, scores: Tensor, chosen: Tensor, token_mask: Tensor | None) -> Tensor:
        """Balance loss E * sum_e f_e P_e of each row [B]: f_e visits per token, P_e mean score; the value is
        num_experts_per_tok when all experts are equally busy, and grows up to E times that."""
        real = torch.ones_like(scores[..., 0]) if token_mask is None else token_mask.to(scores.dtype)  # [B,T]
        visits = F.one_hot(chosen, scores.shape[-1]).sum(2) * real[..., None]  # [B,T,E]
        if self.config.n_shared_experts:
            # recomputation under gradient checkpointing counts everything twice: the bias uses only comparisons
            if self.training and torch.is_grad_enabled():
                counts = visits.detach().sum((0, 1))
                self.counts = counts if self.counts is None else self.counts + counts
            return scores.new_zeros(len(scores))
        tokens = real.sum(1, keepdim=True).clamp(min=1)  # [B,1]; a row of padding gives 0, not NaN
        # f counts and has no gradient; p does, and it is larger where f is: pushing p down there moves visits away
        f, p = visits.sum(1) / tokens, (scores * real[..., None]).sum(1) / tokens  # [B,E]
        return scores.shape[-1] * (f * p).sum(-1)

    @torch.no_grad()
    def update_bias(self, rate: float, counts: Tensor):
        """Raise by `rate` the bias of experts with fewer tokens than the mean, lower the others. counts [E]."""
        # the sign, not the difference: a step of known size, whatever the batch
        self.gate.e_score_correction_bias += rate * torch.sign(counts.float().mean() - counts)
        self.counts = None


class Block(nn.Module):
    """One layer:   x ---+-- norm -- attention --(+)--+-- norm -- MLP or MoE --(+)--> x
                         +-----------------------/    +------------------------/"""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        self.mlp = MoE(config) if self.is_moe else MLP(config)
        self.dropout = config.dropout

    def forward(self, x, rope, mask=None, causal=True, cache=None, token_mask=None,
                wanted=None) -> tuple[Tensor, Tensor | None]:
        """x [B,T,D] -> (x [B,T,D], balance loss [B] or None in a dense layer). wanted [N]: only these of the B*T places
        are computed to the end, as a row of their own [1,N,D]."""
        # norm before each branch, none on the residual stream itself: gradients reach the bottom unscaled
        branch = self.self_attn(self.input_layernorm(x), rope, mask, causal, cache)
        x = x + F.dropout(branch, self.dropout, self.training)
        if wanted is not None:
            x = x.flatten(0, 1)[wanted][None]  # [B,T,D] -> [1,N,D]
        h = self.post_attention_layernorm(x)
        branch, balance = self.mlp(h, token_mask) if self.is_moe else (self.mlp(h), None)
        return x + F.dropout(branch, self.dropout, self.training), balance


class Backbone(nn.Module):
    """Token ids -> hidden states after the final norm; what Transformer and ScalarHead share."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.depth = None  # only so many blocks run, from the bottom; None = all (train_pretrain.trained_blocks)

    def forward(self, ids, positions=None, documents=None, cache=None, token_mask=None, recompute=False, mask=None,
                wanted=None):
        """ids [B,T] -> (hidden states [B,T,D], balance loss [B], 0 where no layer has one). See Transformer.forward."""
        b, t = ids.shape
        causal = mask is None
        if cache is not None:
            assert documents is None and (positions is None) == causal, "a cache brings positions, and no documents"
            empty = cache.end == 0  # then the causal rule says it all: padding lies on the right
            slots = cache.reserve(t)
            if causal:
                positions, mask, causal = slots, None if empty else cache.mask(), empty
        elif documents is not None:
            same = documents[:, None, :, None] == documents[:, None, None, :]  # [B,1,T,T]
            # a token always sees itself, so no row of the softmax is empty
            mask, causal = same & torch.ones(t, t, dtype=torch.bool, device=ids.device).tril(), False
        if positions is None:
            positions = torch.arange(t, device=ids.device)[None]  # [1,T]
        x = F.dropout(self.embed_tokens(ids), self.config.dropout, self.training)  # [B,T,D]
        if mask is not None:  # what attention adds to its scores, made once for all layers
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill_(~mask, float("-inf"))
        rope = self.rotary(positions, x.dtype)  # once for all layers
        layers, balances = list(self.layers)[: self.depth], []
        for i, layer in enumerate(layers, 1):
            # nothing looks at the last layer's output but the head: what is not wanted of it need not be computed
            last = wanted if i == len(layers) else None
            # keep only x of each layer and run the layer again in backward: memory / L, time + 1/3
            if recompute and torch.is_grad_enabled():
                x, balance = checkpoint(layer, x, rope, mask, causal, cache, token_mask, last, use_reentrant=False)
            else:
                x, balance = layer(x, rope, mask, causal, cache, token_mask, last)
            if balance is not None:
                balances.append(balance.expand(b))
        if cache is not None:
            cache.advance(t)
        return self.norm(x), torch.stack(balances).mean(0) if balances else x.new_zeros(b)


@torch.no_grad()
def initialize(module: nn.Module, std: float):
    """Normal(0, std) for all matrices, ones for norms, and zeros for the two projections that write into the residual
    stream: at step 0 every block is the identity, whatever the depth, and the loss starts near ln V.

    All embeddings share one random direction. Added to every row of a tied head it shifts all logits alike, which
    softmax does not see; to attention it is the constant input that projections without bias need for heads that look
    at positions. Repeating random lists of 10 to 29 tokens was learnt faster with it (4.68 instead of 4.92 nats after
    150 steps of Muon, one seed)."""
    for name, parameter in module.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif parameter.ndim > 1:
            parameter.normal_(0.0, std)
        if name.endswith("embed_tokens.weight"):
            parameter.add_(torch.empty_like(parameter[0]).normal_(0.0, std))  # [D], to every row


# -- The folder on disk ------------------------------------------------------------------------------------------------
def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises: FileNotFoundError, or ValueError that names file and place."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model folder holds config.json and model.safetensors; "
                                "give the folder of a finished stage")
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); the file is damaged; restore it") from None
    need(isinstance(out, dict), f"{path} holds a {type(out).__name__}", "it is a JSON object", "restore the file")
    return out


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder's config.json."""
    path = folder / "config.json"
    try:
        return ModelConfig.from_dict(read_json(path), str(path))
    except (TypeError, AttributeError) as error:  # a list where a number belongs, and the like
        raise ValueError(f"{path} has a field of the wrong type ({error}); the file is damaged; restore it") from None


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    # bare names of this one format: "../../secret" in a downloaded index must not be opened, nor a pickle
    safe = isinstance(names, dict) and all(isinstance(n, str) and Path(n).name == n and n.endswith(".safetensors")
                                           for n in names.values())
    need(safe and names, f"weight_map of {index}", "it maps tensor names to .safetensors files of the same folder",
         "restore it")
    return [folder / name for name in sorted(set(names.values()))]


def read_tensors(folder: Path) -> dict[str, tuple[Path, tuple, str]]:
    """Name -> (file, shape, dtype) of every stored tensor, from the files' headers only."""
    found = {}
    for path in weight_files(folder):
        need(path.is_file() or not (folder / "adapter").is_dir(), f"{folder} holds adapters without the model they "
             "belong to", "training starts from whole models", f"python lora.py merge --adapter {folder}/adapter ...")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; the weights belong beside config.json; copy all files "
                                    "of the model")
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}
                here = {name: (path, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}); it is damaged or incomplete; copy "
                             "it again or use an earlier checkpoint") from None
        for name in sorted(found.keys() & here.keys())[:1]:
            raise ValueError(f"{name} is in {found[name][0]} and {path}; a tensor has one place; copy the model again")
        found |= here
    return found


def likely_reason(missing: list[str], unexpected: list[str]) -> str:
    """A guess in words why the names in a file are not the model's names."""
    names = " ".join(unexpected)  # patterns from the most to the least specific
    for pattern, reason in (
        (r"(^| )score\.weight", "this is a reward model; open it with ScalarHead.from_pretrained"),
        (r"(^| )(_orig_mod|module)\.", "it was saved through torch.compile or DDP; save the inner module instead"),
        (r"experts\.gate_up_proj", "the experts are fused in memory order; write the folder with save_pretrained()"),
        (r"\.bias", "the layers have biases, so this is another architecture; use a Qwen3, Qwen3Moe or Dots1 folder"),
        (r"(^| )layers\.", "the names lack 'model.', so only the backbone was saved; save the model with its head"),
        (r"experts\.", "config.json and weights disagree about experts; check num_experts and n_shared_experts"),
        (r"lora", "this is an adapter, not a model; merge it first (lora.py)"),
    ):
        if re.search(pattern, names):
            return reason
    if missing == ["lm_head.weight"]:
        return "the head is tied to the embedding; set tie_word_embeddings to true in config.json"
    if any("experts." in name for name in missing):
        return "config.json and weights disagree about experts; check num_experts and n_shared_experts"
    return "config.json belongs to another model; check num_hidden_layers, or take both files from one folder"


def check_names(targets: dict, found: dict, folder: Path, optional: tuple[str, ...], ignore: tuple[str, ...]):
    """Compare the model's tensors with the files' headers. Raises: ValueError with the first differences."""
    missing = sorted(set(targets) - set(found) - set(optional))
    unexpected = sorted(set(found) - set(targets) - set(ignore))
    if missing or unexpected:
        listed = "".join(f", {word} {len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                         for word, names in (("missing", missing), ("unexpected", unexpected)) if names)
        raise ValueError(f"weights of {folder} do not fit{listed}; the names must be exactly the model's; "
                         f"likely reason: {likely_reason(missing, unexpected)}")
    for name in sorted(set(targets) & set(found)):  # the names fit: now shapes and types
        path, shape, dtype = found[name]
        need(shape == tuple(targets[name].shape), f"{name} in {path} has shape {list(shape)}",
             f"config.json asks for {list(targets[name].shape)}", "take both files from one folder")
        need(dtype in ("F64", "F32", "F16", "BF16"), f"{name} in {path} has type {dtype}",
             "weights are F32, F16, BF16 or F64", "use a folder that is not quantised")


class SkipInit(TorchFunctionMode):
    """Within this context nothing is initialised: the numbers come from a file."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("kaiming_uniform_", "normal_", "zero_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_model(build, folder: Path, device, dtype, absent: dict, ignore: tuple[str, ...] = ()) -> nn.Module:
    """build(config) with every parameter and persistent buffer read from the folder, strictly.

    absent: name -> function(tensors) that makes a tensor the files may lack; ignore: tensors they may have too many.
    The module is built on the "meta" device and without initialisation: names and shapes are checked before any memory
    is taken, no time is lost on random numbers, and the global random state stays as it was (the exactness of a resumed
    run depends on it).
    """
    config, found = read_config(folder), read_tensors(folder)
    # a million modules take minutes even without memory: what config.json asks for is compared with the files first
    layers = config.num_hidden_layers
    least = layers + config.num_experts * sum(map(config.is_moe_layer, range(layers)))
    need(least <= max(len(found), 4096), f"num_hidden_layers={layers} with num_experts={config.num_experts} in "
         f"{folder}", f"that is over {least} tensors, and the files hold {len(found)}", "take config.json and weights "
         "from one folder")
    with torch.device("meta"), SkipInit():
        model = build(config)
    check_names(model.state_dict(), found, folder, tuple(absent), ignore)
    tensors = {}
    for path in sorted({path for path, _, _ in found.values()}):
        with safe_open(path, "pt") as file:
            for name in sorted(set(file.keys()) - set(ignore)):
                # a copy: the file may be replaced while the model lives
                tensors[name] = file.get_tensor(name).to(device, dtype, copy=True)
    for name, make in absent.items():
        if name not in tensors:
            tensors[name] = make(tensors)
    model.load_state_dict(tensors, assign=True)  # assign: a meta parameter has no memory to copy into
    return model.to(device).eval()


def save_folder(model: nn.Module, folder, config: dict, skip: tuple[str, ...] = ()):
    """Write config.json, generation_config.json, model.safetensors; skip: tied weights, stored under another name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = config | {"torch_dtype": dtype, "dtype": dtype}  # transformers 4 reads the first, 5 the second
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = ids | {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {name: x.detach().contiguous() for name, x in model.state_dict().items() if name not in skip}
    # transformers refuses files without this metadata
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- Probabilities and sampling ----------------------------------------------------------------------------------------
def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of each token given those before it: logits [B,T,V], ids [B,T] -> [B,T-1], entry t is log p(ids[:,t+1]).

    In fp32 at least, also under autocast: a bf16 log-probability has two digits.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits[:, :-1].to(wide)  # the last position scores a token that is not there
    return -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids[:, 1:].shape)


class _HeadLogprobs(torch.autograd.Function):
    """token_logprobs(h @ weight.T) a few rows at a time, so that the logits [N,V] never exist as a whole.

    For a small model with a large vocabulary the logits are by far the largest tensor, and writing and reading them
    costs more than computing them: the backward pass computes each piece again instead of keeping it.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """h [N,D], weight [V,D], targets [N] -> log p(targets) [N], in fp32 at least."""
        wide = torch.promote_types(h.dtype, torch.float32)
        out, norm = h.new_empty(len(h), dtype=wide), h.new_empty(len(h), dtype=wide)
        for part in _pieces(h, weight):
            logits = (h[part] @ weight.T).to(wide)  # [n,V]
            norm[part] = logits.logsumexp(-1)
            out[part] = logits.gather(1, targets[part, None]).squeeze(1) - norm[part]
        ctx.save_for_backward(h, weight, targets, norm)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        """d log p / d logits = onehot - softmax."""
        h, weight, targets, norm = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]  # not beside adapters: a frozen head's gradient is a third of the work
        grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=norm.dtype) if learns else None
        for part in _pieces(h, weight):
            d = (h[part] @ weight.T).to(norm.dtype).sub_(norm[part, None]).exp_()  # [n,V] softmax
            d.mul_(-grad[part, None]).scatter_add_(1, targets[part, None], grad[part, None])
            d = d.to(h.dtype)
            grad_h[part] = d @ weight
            if learns:
                grad_weight += d.T @ h[part]
        return grad_h, grad_weight.to(weight.dtype) if learns else None, None


class _HeadLogprobSum(torch.autograd.Function):
    """The sum of _HeadLogprobs. A sum gives every target the same factor, so the gradients for factor 1 can be made
    while the logits of a piece are at hand; the backward pass multiplies, and computes no logits again."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """h [N,D], weight [V,D], targets [N] -> sum of log p(targets), in fp32 at least."""
        wide = torch.promote_types(h.dtype, torch.float32)
        total = h.new_zeros((), dtype=wide)
        learns = ctx.needs_input_grad[1]  # as in _HeadLogprobs: not beside adapters
        if any(ctx.needs_input_grad):
            grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=wide) if learns else None
            ctx.save_for_backward(grad_h, grad_weight)
        for part in _pieces(h, weight):
            d = (h[part] @ weight.T).to(wide)  # [n,V], the logits
            index = targets[part, None]  # [n,1]
            d -= d.amax(-1, keepdim=True)  # softmax does not change, and exp cannot overflow
            total += d.gather(1, index).sum()
            sums = d.exp_().sum(-1, keepdim=True)  # [n,1]
            total -= sums.log().sum()
            if any(ctx.needs_input_grad):
                # onehot - softmax, in place
                d = d.div_(-sums).scatter_add_(1, index, torch.ones_like(index, dtype=wide)).to(h.dtype)
                grad_h[part] = d @ weight
                if learns:
                    grad_weight += d.T @ h[part]
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        """grad: the factor, a scalar."""
        grad_h, grad_weight = ctx.saved_tensors
        return *(None if g is None else (g * grad).to(grad_h.dtype) for g in (grad_h, grad_weight)), None


def _pieces(h: Tensor, weight: Tensor) -> list[slice]:
    """Slices of the rows of h whose logits fit a CPU's cache (2 million numbers), or a small part of a GPU's memory."""
    rows = max(1, (2**21 if h.device.type == "cpu" else 2**28) // len(weight))
    return [slice(i, i + rows) for i in range(0, len(h), rows)]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor, min_p=0.0) -> Tensor:
    """Draw one id a row: logits [B,V], uniform [B] in [0,1) -> ids [B].

    Inverse transform: the id at which the running sum of probabilities passes `uniform`. One number a row decides, so a
    row's draw does not depend on its neighbours. temperature 0 = the most likely id. top_k keeps the k most likely ids
    (0, or k >= V: all); of these top_p keeps the smallest set whose mass reaches p (1: all; 0: the most likely id
    only), and min_p those at least min_p times as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082).
    """
    if temperature < 1e-30 or top_k == 1 or top_p == 0:  # logits divided by less would be beyond fp32
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    size = logits.shape[-1]
    keep_all = not 0 < top_k < size
    if keep_all and top_p >= 1:
        if min_p > 0:
            logits = logits.masked_fill(logits < lowest(logits.amax(-1, True), temperature, min_p), -math.inf)
        return invert((logits / temperature).softmax(-1).cumsum(-1), uniform)
    if not keep_all:
        return draw_sorted(*logits.topk(top_k, dim=-1), None, temperature, top_p, min_p, uniform)
    # Sorting a whole vocabulary costs more than a small model's forward pass, and in a trained model the 64 most
    # likely ids usually hold the mass p. Rows where they do not are drawn again from more.
    total = (logits / temperature).logsumexp(-1, keepdim=True)  # [B,1], over all ids
    ids, rows, count = torch.empty(len(logits), dtype=torch.int64, device=logits.device), slice(None), 64
    while True:
        values, order = logits[rows].topk(min(count, size), dim=-1)  # [rows,k], most likely first
        ids[rows] = draw_sorted(values, order, total[rows], temperature, top_p, min_p, uniform[rows])
        short = (values / temperature - total[rows]).exp().sum(-1) < top_p  # [rows]
        if count >= size or not short.any():
            return ids
        # only the rows concerned, so that no row's draw depends on its neighbours
        rows, count = torch.arange(len(logits), device=logits.device)[rows][short], 8 * count


def lowest(best: Tensor, temperature: float, min_p: float) -> Tensor:
    """The smallest logits that min_p keeps beside the best ones."""
    return best + temperature * math.log(min_p)


def draw_sorted(values, order, total, temperature, top_p, min_p, uniform) -> Tensor:
    """Draw from logits sorted downwards: values [B,k] of the ids order [B,k] -> ids [B]. total [B,1]: logsumexp of all
    logits / temperature, None where the k are all that counts."""
    values = values / temperature
    sums = (values.softmax(-1) if total is None else (values - total).exp()).cumsum(-1)  # [B,k]
    last = None
    if top_p < 1:  # kept are the entries up to the one at which the sum reaches p
        last = (sums < top_p).sum(-1, keepdim=True).clamp_(max=sums.shape[1] - 1)  # [B,1]
    if min_p > 0:  # sorted, so these are the first ones as well
        likely = (values >= lowest(values[:, :1], 1.0, min_p)).sum(-1, keepdim=True) - 1  # [B,1]
        last = likely if last is None else torch.minimum(last, likely)
    return order.gather(1, invert(sums, uniform, last)[:, None]).squeeze(1)


def invert(sums: Tensor, uniform: Tensor, last: Tensor | None = None) -> Tensor:
    """Index [B] at which the running sums [B,k] pass uniform * (mass of the kept entries). Kept are all entries, or
    those up to `last` [B,1]."""
    mass = sums[:, -1:] if last is None else sums.gather(1, last)  # [B,1]
    # right: an entry of probability 0 is never drawn
    index = torch.searchsorted(sums, uniform.to(sums.dtype)[:, None] * mass, right=True)  # [B,1]
    # rounding may carry uniform ~ 1 past the end
    return (index.clamp_(max=sums.shape[1] - 1) if last is None else torch.minimum(index, last)).squeeze(1)


def row_uniforms(seed: int, rows: list[int], count: int) -> Tensor:
    """[len(rows), count] numbers in [0,1); each row's stream depends on (seed, row) only, not on who else is there, and
    a longer one begins with the shorter one."""
    out = []
    for row in rows:
        # torch's CPU generator uses 32 bits of its seed; an odd factor keeps all rows of one seed apart
        generator = torch.Generator().manual_seed((int(seed) * 0x9E3779B1 + int(row)) % 2**32)
        out.append(torch.rand(count, generator=generator))
    return torch.stack(out)


# -- The language model ------------------------------------------------------------------------------------------------
class Transformer(nn.Module):
    """Backbone plus language-model head.

        m = Transformer(ModelConfig.preset("tiny"));  logits = m(ids)     # ids int64 [B,T] -> [B,T,V]
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # [V,D], as the embedding
        self.gradient_checkpointing = False  # set to True: activations are computed twice, memory falls
        self.inference_copy = None  # generation.accelerate(): what generate() decodes with while the weights stay
        initialize(self, config.initializer_range)
        self.tie()

    def tie(self):
        """Let head and embedding be one parameter, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden_states(self, ids, positions=None, documents=None, cache=None, token_mask=None, mask=None,
                      wanted=None) -> Tensor:
        """Hidden states after the final norm [B,T,D]; lm_head turns them into logits. Arguments as in forward, and
        mask: bool [B,1,T,S], True where a token may look, in place of the causal rule; it goes with positions.
        wanted: int [N], numbers b * T + t of places; only their states are computed to the end and returned [1,N,D]."""
        return self.model(ids, positions, documents, cache, token_mask, self.gradient_checkpointing, mask, wanted)[0]

    def forward(self, ids, positions=None, documents=None, cache=None, token_mask=None, return_balance=False,
                logits_to_keep=0, target_mask=None, sum_targets=False):
        """Logits [B,T,V]: logits[:, t] scores token t + 1. With return_balance the pair (logits, balance [B]).

        Args:
            ids: int64 [B,T]. Padding stands on the right; no real token sees it, so no mask is needed for it.
            positions: int [B,T], when they are not 0..T-1.
            documents: int [B,T]; a token looks only at earlier tokens with its own number (packed rows).
            cache: KVCache with the tokens before these; they are appended. Positions then come from it.
            token_mask: bool [B,T], the real tokens; router statistics leave out the others.
            logits_to_keep: only the last so many positions, 0 = all.
            target_mask: [B,T], nonzero on target tokens: instead of logits the result is token_logprobs(logits, ids)
                [B,T-1], with 0 where it is zero. What training needs, several times cheaper than all logits.
            sum_targets: with target_mask, one number, the sum of these log-probabilities: cheaper still.
        balance[b] is the mean over the expert layers of E * sum_e f_e P_e over the row's real tokens (see MoE).
        """
        h, balance = self.model(ids, positions, documents, cache, token_mask, self.gradient_checkpointing)
        if target_mask is None:
            out = self.lm_head(h[:, -logits_to_keep:])  # -0: means all
        else:
            out = self._target_logprobs(h, ids, target_mask, sum_targets)
        return (out, balance) if return_balance else out

    @torch.compiler.disable  # the number of targets differs from batch to batch: each would be compiled anew
    def _target_logprobs(self, h: Tensor, ids: Tensor, target_mask: Tensor, sum_targets: bool) -> Tensor:
        """log p of the target tokens [B,T-1], or its sum, from hidden states [B,T,D]; the head runs on their positions
        only."""
        wanted = target_mask[:, 1:] != 0  # [B,T-1]
        dtype = autocast_dtype(h.device.type) or h.dtype
        head = _HeadLogprobSum if sum_targets else _HeadLogprobs
        found = head.apply(h[:, :-1][wanted].to(dtype), self.lm_head.weight.to(dtype), ids[:, 1:][wanted])
        if sum_targets:
            return found
        return torch.zeros(wanted.shape, dtype=found.dtype, device=h.device).masked_scatter(wanted, found)

    def num_parameters(self, trainable: bool = False) -> int:
        """Parameters, a tied one counted once; trainable: only those that an optimizer would change."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def flops_per_token(self, tokens: int) -> int:
        """Floating-point operations of forward and backward for one token of a row of `tokens` tokens.

        6 per weight that multiplies (2 forward, 4 backward; lookups are free, of the experts only the visited ones
        count) plus 12 * L * H * C * T for attention without a discount for the causal half (PaLM, arXiv:2204.02311).
        """
        c = self.config
        weights = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        weights -= 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size  # the lookup; tied, it is the head
        idle = (c.num_experts - c.num_experts_per_tok) * 3 * c.hidden_size * c.moe_intermediate_size
        weights -= sum(idle for i in range(c.num_hidden_layers) if c.is_moe_layer(i))
        return 6 * weights + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens

    def update_router_bias(self, rate: float, reduce=None) -> Tensor | None:
        """Bias balancing, once per optimizer step: busy experts become less attractive by `rate`, idle ones more.

        reduce: sums a tensor over the ranks (in place or returned). Returns the expert visits [L,E] since the last
        call; None for models without shared experts, where there is nothing to do.
        """
        # always in layer order, so that ranks add up like with like; those that did not run have nothing to balance
        layers = [m for m in self.modules() if isinstance(m, MoE) and m.counts is not None]
        if not layers or not self.config.n_shared_experts:
            return None
        counts = torch.stack([layer.counts for layer in layers]).float()  # [L,E], one collective for all layers
        reduced = reduce(counts) if reduce else None
        counts = counts if reduced is None else reduced
        for layer, row in zip(layers, counts, strict=True):
            layer.update_bias(rate, row)
        return counts

    def save_pretrained(self, folder):
        """Write config.json, generation_config.json and model.safetensors (in the weights' own dtype) to a folder."""
        tied = ("lm_head.weight",) if self.config.tie_word_embeddings else ()
        save_folder(self, folder, self.config.to_dict(), skip=tied)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32) -> "Transformer":
        """Open a folder written by save_pretrained, or by transformers (Qwen3, Qwen3Moe, Dots1; also in shards).

        Raises: FileNotFoundError, ValueError (not this architecture, damaged file, names or shapes that do not fit).
        """
        tied = {"lm_head.weight": lambda tensors: tensors["model.embed_tokens.weight"]}
        absent = tied if read_config(Path(folder)).tie_word_embeddings else {}
        model = load_model(cls, Path(folder), device, dtype, absent)
        model.tie()
        return model

    def with_weights(self, tensors: dict[str, Tensor]) -> "Transformer":
        """A plain model of this shape that holds these tensors (named as in state_dict), not copies of them: what is
        saved of a sharded model, whose own parameters are pieces."""
        with torch.device("meta"):  # shapes only
            model = Transformer(self.config)
        model.load_state_dict(tensors, assign=True)
        return model

    def new_cache(self, batch: int, slots: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty KVCache that fits this model's shape, device and (if not given) autocast dtype, else its own."""
        weight = self.model.embed_tokens.weight
        dtype = dtype or autocast_dtype(weight.device.type) or weight.dtype
        return KVCache(self.config, batch, slots, dtype, weight.device)

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, repetition_penalty: float = 1.0, stop_ids: Iterable[int] = (), seed: int = 0,
                 row_seeds: list[int] | None = None, min_p: float = 0.0, min_new_tokens: int = 0, max_batch: int = 0,
                 prefix: Prefix | None = None) -> Iterator[tuple[int, int]]:
        """Yield (row, token id) as tokens are made, row by row within a step.

        A row ends with its stop id (which is yielded; never among its first min_new_tokens), after max_new_tokens, or
        when prompt and answer fill max_position_embeddings. Its draws depend on (seed, row_seeds[row], default the row
        number) only. An empty prompt becomes [bos_token_id]. See sample() for temperature, top_k, top_p and min_p;
        repetition_penalty divides positive and multiplies negative logits of ids that occur in prompt or answer
        (arXiv:1909.05858), 1 = off. At most max_batch rows (0 = all) are decoded together: a row that ends makes room
        for the next prompt (continuous batching, Yu et al. 2022, Orca). prefix: see Prefix; for one prompt.
        Raises: ValueError for a prompt that is empty without bos, too long, or has ids outside the vocabulary.
        """
        bos = self.config.bos_token_id
        prompts = [list(p) or ([] if bos is None else [bos]) for p in prompts]
        row_seeds = list(range(len(prompts))) if row_seeds is None else list(row_seeds)
        need(len(row_seeds) == len(prompts), f"{len(row_seeds)} row_seeds for {len(prompts)} prompts",
             "each row has one", "give as many seeds as prompts")
        need(prefix is None or len(prompts) == 1, f"a prefix with {len(prompts)} prompts", "it is the memory of one "
             "chat", "give one prompt")
        check_prompts(prompts, self.config)
        choice = Choice(temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens, frozenset(stop_ids), seed)
        rules = {"max_new_tokens": (int, 0, 2**31), "temperature": (float, 0, 1e4), "top_k": (int, 0, 2**31),
                 "top_p": (float, 0, 1), "repetition_penalty": (float, 0.01, 100), "min_p": (float, 0, 1),
                 "min_new_tokens": (int, 0, 2**31), "max_batch": (int, 0, 2**31)}
        given = choice._asdict() | {"max_new_tokens": max_new_tokens, "max_batch": max_batch}
        for name, rule in rules.items():
            wrong, allowed = f"{name}={given[name]!r}", f"it is a number from {rule[1]} to {rule[2]}"
            need(is_number(given[name], *rule), wrong, allowed, "correct it")
        if not prompts or max_new_tokens == 0:
            return iter(())
        return self._stream(prompts, max_new_tokens, choice, row_seeds, max_batch, prefix)

    def _stream(self, prompts, max_new_tokens, choice, row_seeds, max_batch, prefix):
        """The loop behind generate(). It computes in chunks of one step inside, and yields outside, inference mode."""
        decoder, context = self.decoder()
        limits = [min(max_new_tokens, self.config.max_position_embeddings - len(p)) for p in prompts]
        state = None
        while True:
            # not around the yield: the caller's own code would run in inference mode
            with torch.inference_mode(), context():
                state = state or _Decoding(decoder, self.model.embed_tokens.weight.device, prompts, limits, choice,
                                           row_seeds, max_batch or len(prompts), prefix)
                events = state.step()
            if not events:
                return
            yield from events

    def decoder(self):
        """(what to decode with, autocast context). Under autocast every matrix would be cast again for every token;
        a twin whose Linear weights are cast once, and which shares everything else, gives the same numbers."""
        if hasattr(self, "unshard"):  # FSDP: weights come and go with every forward, there is nothing to share
            return self, nullcontext
        device = self.model.embed_tokens.weight.device.type
        if self.inference_copy is not None and self.inference_copy.is_of(self):
            return self.inference_copy, lambda: torch.autocast(device, enabled=False)
        dtype = autocast_dtype(device)
        needs_eval = self.training and self.config.dropout > 0
        if dtype is None and not needs_eval:
            return self, nullcontext
        # the memo tells deepcopy that every parameter is already copied: the twin costs no memory until here
        twin = copy.deepcopy(self, {id(p): p for p in self.parameters()}).eval()
        if dtype is None:
            return twin, nullcontext
        for linear in twin.modules():
            if isinstance(linear, nn.Linear):  # a tied head becomes a bf16 copy, the embedding stays as it is
                linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        return twin, lambda: torch.autocast(device, dtype)


def check_prompts(prompts: list[list[int]], config: ModelConfig):
    """ValueError for a prompt that is empty, fills the whole context, or holds an id outside the vocabulary."""
    room, size = config.max_position_embeddings, config.vocab_size
    for row, prompt in enumerate(prompts):
        need(prompt, f"prompt {row} is empty", "the model continues at least one token, and this one has no "
             "bos_token_id to start from", "give a prompt")
        need(len(prompt) < room, f"prompt {row} has {len(prompt)} tokens", f"max_position_embeddings {room} must "
             "leave room for an answer", "shorten the prompt")
        need(0 <= min(prompt) and max(prompt) < size, f"prompt {row} has an id outside 0..{size - 1}",
             "ids are below vocab_size", "use the tokenizer saved with the model")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast uses on this kind of device right now, None when it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def fill_holes(keep: list[int], count: int) -> list[int]:
    """Order the kept rows so that as few as possible move: rows below `count` stay, the others fill the holes."""
    tail = [row for row in keep if row >= count]
    stay = set(keep)
    return [row if row in stay else tail.pop() for row in range(count)]


class Choice(NamedTuple):
    """How generate() chooses ids; see there."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    min_new_tokens: int
    stop_ids: frozenset
    seed: int


@dataclass
class _Row:
    """One row of a running batch: which prompt it answers, its numbers in [0,1), its newest id, how many it made."""

    prompt: int
    draws: Iterator[float]
    last: int = 0
    made: int = 0


class _Decoding:
    """A running batch: rows leave when they end, and prompts that wait take their places."""

    def __init__(self, decoder, device, prompts, limits, choice: Choice, row_seeds, max_batch, prefix):
        self.decoder, self.device, self.prompts, self.limits = decoder, device, prompts, limits
        self.choice, self.row_seeds, self.prefix = choice, row_seeds, prefix
        self.places = min(max_batch, len(prompts))
        self.waiting = list(range(len(prompts)))[::-1]  # the next one last
        self.rows: list[_Row] = []
        # the last token is never fed back, hence - 1
        slots = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True)) - 1
        self.cache = decoder.new_cache(self.places, slots)
        self.cache.keep([])
        self.seen = torch.zeros(0, decoder.config.vocab_size, dtype=torch.bool, device=device)  # [B,V], for the penalty

    def step(self) -> list[tuple[int, int]]:
        """The next events: one id for every row, or the first ids of prompts that take free places; [] at the end."""
        self._leave()
        free = min(self.places - len(self.rows), len(self.waiting))
        # A prompt read alone costs much more than its share of a batch: wait until there are places for some.
        if free and (free >= self.places / 8 or free == len(self.waiting)):
            return self._begin([self.waiting.pop() for _ in range(free)])
        if not self.rows:
            return []
        ids = torch.tensor([[row.last] for row in self.rows], device=self.device)  # [B,1]
        h = self.decoder.hidden_states(ids, cache=self.cache)[:, 0]  # [B,D]
        if self.prefix is not None:  # only now: Ctrl-C may have come before all layers had written
            self.prefix.ids.append(self.rows[0].last)
        return self._choose(h, 0)

    def _leave(self):
        """Take out the rows that have ended: they cost nothing from here on."""
        keep = [i for i, row in enumerate(self.rows)
                if row.last not in self.choice.stop_ids and row.made < self.limits[row.prompt]]
        if len(keep) < len(self.rows):
            keep = fill_holes(keep, len(keep))
            self.cache.keep(keep)
            self.rows = [self.rows[i] for i in keep]
            self.seen = self.seen[keep] if len(self.seen) else self.seen

    def _begin(self, numbers: list[int]) -> list[tuple[int, int]]:
        """Read prompts, equal ones once (GRPO asks for many answers to each), and choose their first ids."""
        prompts = [tuple(self.prompts[i]) for i in numbers]
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        lengths = [len(prompt) for prompt in distinct]
        cache = self.decoder.new_cache(len(distinct), max(lengths))
        known = self._recall(cache, prompts[0]) if self.prefix is not None else 0
        padded = [[*p[known:], *[0] * (max(lengths) - len(p))] for p in distinct]  # padding on the right is invisible
        h = self.decoder.hidden_states(torch.tensor(padded, device=self.device), cache=cache)  # [distinct,T,D]
        cache.set_lengths(lengths)
        index = [distinct[prompt] for prompt in prompts]
        # logits of the last positions only
        h = h[torch.arange(len(h)), torch.tensor(lengths) - known - 1][index]  # [B,D]
        self.cache.append(cache, index)
        if self.prefix is not None:
            self.prefix.ids, self.prefix.cache = list(prompts[0]), self.cache
        count = max(self.limits[i] for i in numbers) if self.choice.temperature else 0
        # drawn up front: one call a row, not one a token
        draws = row_uniforms(self.choice.seed, [self.row_seeds[i] for i in numbers], count).tolist()
        self.rows += [_Row(i, iter(row)) for i, row in zip(numbers, draws, strict=True)]
        if self.choice.repetition_penalty != 1:
            seen = torch.zeros(len(prompts), self.seen.shape[1], dtype=torch.bool, device=self.device)
            for i, prompt in enumerate(prompts):
                seen[i, list(prompt)] = True
            self.seen = torch.cat((self.seen, seen))
        return self._choose(h, len(self.rows) - len(numbers))

    def _recall(self, cache: KVCache, prompt: tuple[int, ...]) -> int:
        """Put the beginning that the chat has read before into an empty cache. Returns its length: less than the
        prompt's, whose last token gives the logits."""
        pairs = zip(self.prefix.ids, prompt[:-1], strict=False)
        known = next((i for i, (old, new) in enumerate(pairs) if old != new),
                     min(len(self.prefix.ids), len(prompt) - 1))
        if known:
            self.prefix.cache.set_lengths([known])
            cache.keep([])
            cache.append(self.prefix.cache, [0])
        return known

    def _choose(self, h: Tensor, start: int) -> list[tuple[int, int]]:
        """Choose an id for the rows from `start` on, from their hidden states h [B,D]. Returns their events."""
        rows, choice = self.rows[start:], self.choice
        logits = self.decoder.lm_head(h)  # [B,V]
        if len(self.seen):
            seen = self.seen[start:]
            weaker = torch.where(logits > 0, logits / choice.repetition_penalty, logits * choice.repetition_penalty)
            logits = torch.where(seen, weaker, logits)
        young = [i for i, row in enumerate(rows) if row.made < choice.min_new_tokens]
        if young:
            stops = [i for i in choice.stop_ids if 0 <= i < logits.shape[1]]
            logits[torch.tensor(young)[:, None], stops] = -math.inf
        uniform = None  # nothing is drawn
        if choice.temperature:
            uniform = torch.tensor([next(row.draws) for row in rows], device=self.device)  # [B]
        ids = sample(logits, choice.temperature, choice.top_k, choice.top_p, uniform, choice.min_p)  # [B]
        if len(self.seen):
            seen.scatter_(1, ids[:, None], True)
        for row, token in zip(rows, ids.tolist(), strict=True):  # the one wait for the device in each step
            row.last, row.made = token, row.made + 1
        return [(row.prompt, row.last) for row in rows]


# -- The reward and value model ----------------------------------------------------------------------------------------
class ScalarHead(nn.Module):
    """Backbone plus one number per token: a reward model (number at the last real token) or a value model (all).

    Saved as Qwen3ForSequenceClassification or Qwen3MoeForSequenceClassification with one label.
    score_mean and score_std are for the scripts, which keep them in minillm.json.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        need(not config.n_shared_experts, f"n_shared_experts={config.n_shared_experts} under a score head",
             "no published class stores such a reward model", "start the reward model from a dense model or from one "
             "trained with --n_shared_experts 0")
        self.config = config
        self.model = Backbone(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.gradient_checkpointing = False
        self.score_mean, self.score_std = 0.0, 1.0
        initialize(self, config.initializer_range)

    def deepen(self, count: int):
        """Put `count` new blocks on top of the backbone; they begin as the identity, so no score changes.

        What a language model expects of the next token is finished in its last block: only a block behind that one can
        see whether the token is as expected. Blocks that begin so: Wu et al. 2024 (LLaMA Pro, arXiv:2401.02415).
        """
        first = self.config.num_hidden_layers
        self.config = self.model.config = replace(self.config, num_hidden_layers=first + count)
        for layer in range(first, first + count):
            block = Block(self.config, layer)
            initialize(block, self.config.initializer_range)
            self.model.layers.append(block)

    def values(self, ids: Tensor) -> Tensor:
        """ids [B,T] -> a number for every position [B,T], in fp32 at least."""
        h, _ = self.model(ids, recompute=self.gradient_checkpointing)
        return self.score(h).squeeze(-1).to(torch.promote_types(self.score.weight.dtype, torch.float32))

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids [B,T], lengths [B] -> scores [B]: the value at each row's last real token."""
        return self.values(ids).gather(1, lengths[:, None] - 1).squeeze(1)

    def save_pretrained(self, folder):
        """Write the folder as a classifier with one label. Raises: ValueError without pad_token_id."""
        need(self.config.pad_token_id is not None, "pad_token_id=None in a reward model", "transformers finds the last "
             "real token by the padding id", "build the config with the tokenizer's pad_id")
        need(self.config.model_type in ("qwen3", "qwen3_moe"), f"mlp_type={self.config.mlp_type!r} in a reward model",
             "no published class stores it", "use mlp_type gated")
        config = self.config.to_dict()
        # Qwen3ForCausalLM -> Qwen3ForSequenceClassification
        config["architectures"] = [ARCHITECTURES[self.config.model_type].replace("CausalLM", "SequenceClassification")]
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
                   "problem_type": "regression"}
        save_folder(self, folder, config)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32) -> "ScalarHead":
        """Open a reward folder, or a Transformer folder, whose head is replaced by a fresh random score head."""
        config = read_config(Path(folder))

        def fresh(tensors):
            return torch.empty(1, config.hidden_size, device=device, dtype=dtype).normal_(0, config.initializer_range)

        return load_model(cls, Path(folder), device, dtype, {"score.weight": fresh}, ignore=("lm_head.weight",))
