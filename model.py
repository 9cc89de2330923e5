"""The model: a Qwen3-shaped Transformer, from its layers to its two heads.

Read it from top to bottom, each class uses only what stands above it: RMSNorm -> rotary positions -> Attention -> MLP
-> MoE -> Block -> Backbone, and on it Transformer (the next token) or ScalarHead (a score). What surrounds the layers
lies in files that know none of them:

    configuration.py   ModelConfig: the shape of a model, its presets, config.json
    weights.py         the Hugging Face folder, in and out
    logprobs.py        log-probabilities of tokens, with and without their logits
    decoding.py        the KV cache, sampling, and the loop behind generate()

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
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decoding
from configuration import ARCHITECTURES, GenerationConfig, ModelConfig, need
from decoding import KVCache, Prefix, additive_mask
from kernels import attention, norm_rotate, rms_norm, rotate
from logprobs import head_logprobs
from weights import load_model, read_json, save_folder


# -- Norm and rotation -------------------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: LayerNorm without mean and bias."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [...,D] -> [...,D] in dtype, if not given that of the weight."""
        if self.weight.dtype.itemsize < 4:  # a bf16 copy of the weights: Qwen3's order is fp32, cast, then weight
            y = F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight
            return y.to(dtype or y.dtype)
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps, dtype)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normalised and turned, x [B,T,H,C] -> [B,T,H,C] in the dtype of x; with fp32 weights all is computed in fp32,
        also under autocast, where queries and keys arrive in bf16."""
        if self.weight.dtype.itemsize < 4:
            return rotate(self(x), cos, sin).to(x.dtype)
        return norm_rotate(x, self.weight, self.eps, cos, sin)


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


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast uses on this kind of device right now, None when it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def narrow(x: Tensor) -> Tensor:
    """x in the dtype of autocast. What several products read is cast once, and not by each of them."""
    return x.to(autocast_dtype(x.device.type) or x.dtype)


# -- Attention ---------------------------------------------------------------------------------------------------------
def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """layer(x) of each layer. While a CPU learns in bf16 they are one product: it and its gradients are faster there
    than several narrow ones. In fp32 they are not, and a decoder would join the weights for every token."""
    learns = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled()
    if not (learns and all(type(layer) is nn.Linear for layer in layers)):  # an adapter computes more than a product
        return tuple(layer(x) for layer in layers)
    weight = torch.cat([layer.weight for layer in layers])
    return F.linear(x, weight).split([layer.out_features for layer in layers], -1)


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
        """x [B,T,D] -> [B,T,D]. mask [B,1,T,S]: 0 where a token may look, else -inf; None is the causal rule. causal:
        no token looks ahead, which a mask that is given as well already says."""
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, -1, self.head_dim) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm.rotated(q, *rope), self.k_norm.rotated(k, *rope)  # [B,T,H,C], [B,T,K,C]; v [B,T,K,C]
        q, keys, values = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B,H,T,C], [B,K,T,C] twice
        if cache is not None:
            keys, values = cache.write(self.layer, torch.stack((keys, values)))  # [2,B,K,T,C] -> [B,K,S,C] each
            keys, values = keys.to(v.dtype), values.to(v.dtype)  # a cache made outside of autocast is fp32
        if cache is not None and t == 1:
            # One token a row: the query heads of a kv head become the query rows of one head, so that keys are read
            # once and never repeated.
            q = q.reshape(b, keys.shape[1], -1, self.head_dim)  # [B,K,H/K,C]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            return self.o_proj(y.reshape(b, 1, -1))
        # during a prompt the cache was empty, so keys are exactly these T tokens
        y = attention(q, keys, values, mask, causal)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))  # [B,H,T,C] -> [B,T,H*C] -> [B,T,D]


# -- MLP and experts ---------------------------------------------------------------------------------------------------
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
        x = narrow(x)
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


# -- Blocks ------------------------------------------------------------------------------------------------------------
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
        dtype = autocast_dtype(x.device.type)  # of what products read; a router reads fp32
        branch = self.self_attn(self.input_layernorm(x, dtype), rope, mask, causal, cache)
        x = x + F.dropout(branch, self.dropout, self.training)
        if wanted is not None:
            x = x.flatten(0, 1).index_select(0, wanted)[None]  # [B,T,D] -> [1,N,D]
        h = self.post_attention_layernorm(x, None if self.is_moe else dtype)
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
            mask = same & torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
        if positions is None:
            positions = torch.arange(t, device=ids.device)[None]  # [1,T]
        x = F.dropout(self.embed_tokens(ids), self.config.dropout, self.training)  # [B,T,D]
        if mask is not None:
            # in the dtype of the scores, or every layer would cast it
            mask = additive_mask(mask, autocast_dtype(x.device.type) or x.dtype)
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
        h = self.norm(x, autocast_dtype(x.device.type))
        return h, torch.stack(balances).mean(0) if balances else x.new_zeros(b)


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


# -- The language model ------------------------------------------------------------------------------------------------
def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder's config.json."""
    path = folder / "config.json"
    try:
        return ModelConfig.from_dict(read_json(path), str(path))
    except (TypeError, AttributeError) as error:  # a list where a number belongs, and the like
        raise ValueError(f"{path} has a field of the wrong type ({error}); the file is damaged; restore it") from None


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
        self.inference_copy = None  # inference.accelerate(): what generate() decodes with while the weights stay
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
            target_mask: [B,T], nonzero on target tokens: instead of logits the result is what logprobs.token_logprobs()
                makes of them [B,T-1], with 0 where it is zero. What training needs, several times cheaper.
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
        rows = F.pad(wanted, (0, 1)).flatten().nonzero().squeeze(1)  # [N]; indexing by a mask has a slow gradient
        h = h.flatten(0, 1).index_select(0, rows)  # [N,D]
        found = head_logprobs(h, narrow(self.lm_head.weight), ids[:, 1:][wanted], sum_targets)
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
        config = read_config(Path(folder))
        model = load_model(cls, config, Path(folder), device, dtype, tied if config.tie_word_embeddings else {})
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
        number) only. An empty prompt becomes [bos_token_id]. See decoding.sample() for temperature, top_k, top_p and
        min_p; repetition_penalty divides positive and multiplies negative logits of ids that occur in prompt or answer
        (arXiv:1909.05858), 1 = off. At most max_batch rows (0 = all) are decoded together: a row that ends makes room
        for the next prompt (continuous batching, Yu et al. 2022, Orca). prefix: see decoding.Prefix; for one prompt.
        Raises: ValueError for a prompt that is empty without bos, too long, or has ids outside the vocabulary.
        """
        options = GenerationConfig(max_new_tokens, temperature, top_k, top_p, repetition_penalty, frozenset(stop_ids),
                                   seed, min_p, min_new_tokens, max_batch)
        return decoding.generate(self, prompts, options, row_seeds, prefix)

    def decoder(self):
        """(what to decode with, autocast context): a copy made for decoding if there is one, else reader()."""
        if self.inference_copy is not None and self.inference_copy.is_of(self):
            device = self.model.embed_tokens.weight.device.type
            return self.inference_copy, lambda: torch.autocast(device, enabled=False)
        return self.reader()

    def reader(self):
        """(what to compute many forwards with, autocast context). Under autocast every matrix would be cast again for
        each; a twin whose Linear weights are cast once, and which shares everything else, gives the same numbers."""
        if hasattr(self, "unshard"):  # FSDP: weights come and go with every forward, there is nothing to share
            return self, nullcontext
        device = self.model.embed_tokens.weight.device.type
        dtype = autocast_dtype(device)
        # of a block or of an adapter; the embedding's is that of the blocks
        needs_eval = self.training and any(getattr(module, "dropout", 0) for module in self.modules())
        if dtype is None and not needs_eval:
            return self, nullcontext
        return self.twin(dtype), lambda: torch.autocast(device, dtype, enabled=dtype is not None)

    def twin(self, dtype: torch.dtype | None = None) -> "Transformer":
        """The same weights without dropout, those of its Linear modules in dtype, if one is given."""
        # the memo tells deepcopy that every parameter is already copied: the twin costs no memory until here
        twin = copy.deepcopy(self, {id(p): p for p in self.parameters()}).eval()
        for linear in twin.modules():
            if dtype is not None and isinstance(linear, nn.Linear):  # a tied head is copied, the embedding stays
                linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        return twin


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
        dtype = self.score.weight.dtype
        with torch.autocast(h.device.type, enabled=False):  # in bf16 the scores of close answers would be equal
            return self.score(h.to(dtype)).squeeze(-1).to(torch.promote_types(dtype, torch.float32))

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

        return load_model(cls, config, Path(folder), device, dtype, {"score.weight": fresh}, ("lm_head.weight",))
