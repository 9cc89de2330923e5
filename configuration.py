"""Configurations: what describes a model, or the choice of its tokens, as values that check themselves.

ModelConfig is the shape of a model in the words of `transformers`: presets, and config.json in and out, in the spelling
of version 4 and in that of version 5. What model.py does not compute is refused by name. GenerationConfig holds the
options of generate(). A bad value is a ValueError in three parts: field and value; rule; fix.

    config = ModelConfig.preset("tiny", vocab_size=8000)
    config == ModelConfig.from_dict(config.to_dict())

What this file does not do: open files (weights.py), make layers (model.py), choose tokens (decoding.py).
"""
import math
from dataclasses import dataclass, fields

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


# -- The shape of a model ----------------------------------------------------------------------------------------------
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


# -- The choice of tokens ----------------------------------------------------------------------------------------------
# Type, smallest and largest accepted value of an option of generate()
OPTIONS = {"max_new_tokens": (int, 0, 2**31), "temperature": (float, 0, 1e4), "top_k": (int, 0, 2**31),
           "top_p": (float, 0, 1), "repetition_penalty": (float, 0.01, 100), "min_p": (float, 0, 1),
           "min_new_tokens": (int, 0, 2**31), "max_batch": (int, 0, 2**31)}


@dataclass(frozen=True)
class GenerationConfig:
    """How many tokens generate() makes and how it chooses them; Transformer.generate() says what each field does."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop_ids: frozenset[int]
    seed: int
    min_p: float
    min_new_tokens: int
    max_batch: int

    def __post_init__(self):
        for name, rule in OPTIONS.items():
            value = getattr(self, name)
            need(is_number(value, *rule), f"{name}={value!r}", f"it is a number from {rule[1]} to {rule[2]}",
                 "correct it")
