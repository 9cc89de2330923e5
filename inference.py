"""Decoders that are faster on a CPU than the model itself: a copy of its weights in torch, or the step in Rust.

At one token a step the arithmetic of a small model takes about as long as calling the functions that do it, and an
ordinary product of one row does not read weights as fast as memory gives them. accelerate() looks for what is fastest
here: a step in one call, written in Rust (native.py), where that module is built and knows the model; else a copy of
the weights with fewer and faster calls (InferenceCopy).

    from inference import accelerate
    print(accelerate(model));  model.generate(...)                # the same answers, sooner; int8=True: sooner still

What this file does not do: the loop over tokens (decoding.py), the products themselves (forms.py).

Letters: B batch, T tokens, N rows (B * T), V vocabulary, D hidden size, F MLP size, H heads, K kv heads, C head_dim, S
cache slots, M and K rows and columns of a matrix.
"""
import time

import torch
import torch.nn.functional as F

import native
from decoding import additive_mask
from forms import FORMS, INT8_FORMS, fastest_form


def accelerate(model, int8: bool = False, dtype: torch.dtype | None = None, rows: int = 1) -> str:
    """Give the model a decoder that generate() uses in its place, if it is faster. Returns what was done, in words.
    rows: how many answers will be decoded together; any number can be, but the choice is made for this one.

    The answers are those of the model within rounding; with int8 or a narrower dtype they are those of slightly other
    weights. A copy costs as much memory as the weights it holds; when the weights change it is passed over, and another
    call makes a new one. Only on CPUs: a GPU has fast products for one row, and other costs.
    """
    model.inference_copy = None
    device, dtype = model.model.embed_tokens.weight.device, dtype or model.model.embed_tokens.weight.dtype
    if device.type != "cpu" or dtype == torch.float16:
        return f"decoding with the model itself: copies are made on CPUs, not for {device.type} with {dtype}"
    if any(name.endswith("_proj") and type(module) is not torch.nn.Linear for name, module in model.named_modules()):
        return "decoding with the model itself: adapters stand beside its matrices; merge them to copy it"
    with torch.inference_mode():
        before = seconds_of_a_step(model, rows)
        found = [native.make_decoder(model, dtype, int8, rows)]
        if found[0] is None or rows > 1 or seconds_of_a_step(found[0]) > before:
            found.append(InferenceCopy(model, dtype, int8, rows))
        found = [(seconds_of_a_step(decoder, rows), decoder) for decoder in found if decoder is not None]
    after, best = min(found, key=lambda pair: pair[0])
    if after > before and not int8:  # int8 was asked for, and may be wanted for its numbers
        return f"decoding with the model itself: a copy of the weights is {after / before:.2f}x as slow"
    model.inference_copy = best
    return f"decoding with {best.name}, {before / after:.2f}x as fast"


def seconds_of_a_step(decoder, rows: int = 1, steps: int = 8) -> float:
    """Seconds that one token of so many rows takes, the best of some."""
    cache, times = decoder.new_cache(rows, steps), []
    token = torch.zeros(rows, 1, dtype=torch.int64)
    for _ in range(steps):
        start = time.perf_counter()
        decoder.lm_head(decoder.hidden_states(token, cache=cache)[:, -1])
        times.append(time.perf_counter() - start)
    return min(times)


def _product(multiply, packed):
    """The product with one matrix as a function of the rows."""
    return lambda x: multiply(x, packed)


class InferenceCopy:
    """The weights of a Transformer once more, arranged for decoding. generate() finds here what it needs of a model:
    config, new_cache(), hidden_states(), lm_head().

    At one token a step, calling functions costs about as much as the arithmetic of a small model. So there are fewer of
    them: q, k and v come of one product, gate and up of another; the gain of the norm before a product is part of its
    matrix; q and k are normalised and turned together; keys and values are written by one copy. Inside a head the two
    numbers of a rotated pair are neighbours, not halves apart: as a complex number they turn by one product. That
    reorders q and k alike, so their dot products stay.
    """

    def __init__(self, model, dtype: torch.dtype, int8: bool = False, rows: int = 1):
        self.config, self.model, self.dtype, self.rows = model.config, model, dtype, rows
        self.wide = torch.promote_types(dtype, torch.float32)
        self.parameters = [(p, p._version) for p in model.parameters()]
        self.forms = INT8_FORMS if int8 else FORMS
        self.embedding = model.model.embed_tokens.weight.detach()  # [V,D], shared
        self.layers = [self._layer(block) for block in model.model.layers]
        self.products = set()  # names of the forms in use
        for name in ("qkv", "o"):
            self._pack(name, self.layers)
        experts = [expert for layer in self.layers for expert in layer.get("experts", ())]
        shared = [layer["shared"] for layer in self.layers if "shared" in layer]
        for mlps in ([layer for layer in self.layers if "up" in layer], experts, shared):
            self._pack("up", mlps)
            self._pack("down", mlps)
        head = {"head": model.lm_head.weight.detach().to(dtype)}  # [V,D]
        self._pack("head", [head])
        self.lm_head = head["head"]  # h [B,D] -> logits [B,V]
        self.turns = torch.zeros(0)
        sizes = torch.tensor([model.config.hidden_size, model.config.head_dim], dtype=self.wide)
        self.eps, self.head_eps = (sizes * model.config.rms_norm_eps).sqrt()  # see _unit

    @property
    def name(self) -> str:
        """In words."""
        kind = "int8" if self.forms is INT8_FORMS else str(self.dtype)[6:]
        return f"a copy of the weights in {kind} ({', '.join(sorted(self.products))})"

    def __deepcopy__(self, memo):
        return None  # a copy of a model has weights of its own

    def is_of(self, model) -> bool:
        """Whether this is a copy of what the model's weights are now."""
        now = list(model.parameters())
        return len(now) == len(self.parameters) and all(
            p is old and p._version == version for p, (old, version) in zip(now, self.parameters, strict=True))

    def _layer(self, block) -> dict:
        """The matrices of one block, as plain tensors."""
        c, attention, mlp = self.config.head_dim, block.self_attn, block.mlp
        order = torch.arange(c).view(2, -1).T.flatten()  # [C], 0, C/2, 1, C/2 + 1 ...
        q, k = (p.weight.detach().unflatten(0, (-1, c))[:, order].flatten(0, 1)
                for p in (attention.q_proj, attention.k_proj))
        qkv = torch.cat((q, k, attention.v_proj.weight.detach()))  # [(H+2K)*C,D]
        gains = [norm.weight.detach()[order].expand(count, c) for norm, count in (
            (attention.q_norm, self.config.num_attention_heads), (attention.k_norm, self.config.num_key_value_heads))]
        root = self.config.hidden_size**0.5  # see _unit
        layer = {"qkv": (qkv * block.input_layernorm.weight.detach() * root).to(self.dtype),
                 "gains": torch.cat(gains).to(self.wide) * c**0.5,  # [H+K,C]
                 "o": attention.o_proj.weight.detach().to(self.dtype)}
        gain = block.post_attention_layernorm.weight.detach() * root
        if not block.is_moe:
            return layer | self._mlp_matrices(mlp, gain)
        layer |= {"router": mlp.gate, "gain": gain, "experts": [self._mlp_matrices(e, gain) for e in mlp.experts]}
        if self.config.n_shared_experts:
            layer["shared"] = self._mlp_matrices(mlp.shared_experts, gain)
        return layer

    def _mlp_matrices(self, mlp, gain) -> dict:
        """The matrices of one MLP behind a norm with this gain [D]."""
        parts = [mlp.gate_proj, mlp.up_proj] if mlp.gated else [mlp.up_proj]
        up = torch.cat([part.weight.detach() for part in parts])  # [2F,D] or [F,D]
        return {"up": (up * gain).to(self.dtype), "act": mlp.act, "gated": mlp.gated,
                "down": mlp.down_proj.weight.detach().to(self.dtype)}

    def _pack(self, name: str, layers: list[dict]):
        """Replace this matrix [M,K] of each of these layers or MLPs by the product with it: a function of rows x [N,K]
        -> [N,M]."""
        if not layers:
            return
        form = fastest_form(self.forms, [layer[name] for layer in layers[:3]], self.rows)
        self.products.add(form)
        pack, multiply = self.forms[form]
        for layer in layers:
            layer[name] = _product(multiply, pack(layer[name]))

    def new_cache(self, batch: int, slots: int):
        """An empty KVCache for this copy. Its keys are in this copy's order: no other decoder can go on with it."""
        return self.model.new_cache(batch, slots, self.dtype)

    @torch.no_grad()
    def hidden_states(self, ids, cache):
        """ids [B,T], appended to the cache -> hidden states after the final norm [B,T,D]."""
        b, t = ids.shape
        empty = cache.end == 0
        positions = cache.reserve(t)  # [B,T] or [1,T]
        mask = None if empty else cache.mask()  # [B,1,T,S] bool
        if mask is not None:
            mask = additive_mask(mask, self.dtype)
        if cache.slots > len(self.turns):  # e^(i * angle) of every position
            cos, sin = self.model.model.rotary(torch.arange(cache.slots)[None], self.wide)  # [1,S,1,C]
            turns = torch.complex(cos, sin).view(cache.slots, 1, 2, -1)
            self.turns = turns[:, :, 1]  # [S,1,C/2]: in the first half sin is negative
        turns = self.turns[positions].expand(b, -1, -1, -1).reshape(b * t, 1, -1)  # [N,1,C/2]
        x = F.embedding(ids.reshape(-1), self.embedding).to(self.wide)  # [N,D]
        for i, layer in enumerate(self.layers):
            q, kv = self._rotated(layer, x, turns, (b, t))  # [B,T,H,C], [2,B,K,T,C]
            keys, values = cache.write(i, kv).unbind(0)  # [B,K,S,C]
            x = x + layer["o"](self._attend(q, keys, values, mask, empty))
            x = x + self._second_half(layer, x)
        cache.advance(t)
        return self.model.model.norm(x).to(self.dtype).view(b, t, -1)

    def _rotated(self, layer, x, turns, shape):
        """Queries [B,T,H,C], and keys and values [2,B,K,T,C], of x [N,D]; turns [N,1,C/2]."""
        heads, kv_heads, c = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        qkv = layer["qkv"](self._unit(x, self.eps).to(self.dtype)).to(self.wide).view(len(x), -1, c)  # [N,H+2K,C]
        qk = qkv[:, : heads + kv_heads]
        torch.mul(self._unit(qk, self.head_eps), layer["gains"], out=qk)  # in place: v stays behind q and k
        torch.view_as_complex(qk.view(len(x), -1, c // 2, 2)).mul_(turns)
        q, kv = qkv.view(*shape, -1, c).split((heads, 2 * kv_heads), dim=2)
        # [B,T,2,K,C] -> [2,B,K,T,C]
        return q.to(self.dtype), kv.view(*shape, 2, kv_heads, c).permute(2, 0, 3, 1, 4)

    def _unit(self, x, eps):
        """RMSNorm of x [...,D] without its gain, and divided by sqrt(D): x / sqrt(|x|^2 + D * eps). The three functions
        called here take a third of the time of the norm itself, which torch puts together of smaller ones."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), eps)

    def _attend(self, q, keys, values, mask, causal):
        """q [B,T,H,C], keys and values [B,K,S,C] -> [N,H*C]."""
        b, t, heads, c = q.shape
        if t == 1:  # the query heads of a kv head as rows of one head, as in model.Attention
            y = F.scaled_dot_product_attention(q.reshape(b, keys.shape[1], -1, c), keys, values, attn_mask=mask)
            return y.reshape(b, heads * c)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, is_causal=causal,
                                           enable_gqa=True)
        return y.transpose(1, 2).reshape(b * t, heads * c)

    def _second_half(self, layer, x):
        """What the second half of a block adds to x [N,D]."""
        x = self._unit(x, self.eps)
        h = x.to(self.dtype)
        if "experts" not in layer:
            return self._mlp(layer, h)
        _, weights, chosen = layer["router"](x * layer["gain"])  # weights and experts of each row [N,k]
        y = self._mlp(layer["shared"], h) if "shared" in layer else torch.zeros_like(h)
        for expert in sorted(set(chosen.flatten().tolist())):  # one token visits few of them: the others cost nothing
            rows, choice = torch.where(chosen == expert)
            visits = self._mlp(layer["experts"][expert], h[rows])  # [rows,D]
            y.index_add_(0, rows, visits * weights[rows, choice, None].to(visits.dtype))
        return y

    def _mlp(self, mlp, h):
        """One MLP on h [N,D]."""
        h = mlp["up"](h)  # [N,2F] or [N,F]
        if not mlp["gated"]:
            return mlp["down"](mlp["act"](h))
        gate, up = h.chunk(2, dim=-1)
        return mlp["down"](mlp["act"](gate) * up)
