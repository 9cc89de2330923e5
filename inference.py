"""Decoders that are faster on a CPU than the model itself: its step in Rust, or a copy of its weights in torch.

At one token a step the arithmetic of a small model takes about as long as calling the functions that do it, and an
ordinary product of one row does not read weights as fast as memory gives them. accelerate() looks for what is fastest
here. A decoder is what decoding.generate() asks a model for: config, new_cache(), hidden_states(), lm_head().

NativeDecoder hands the model's own tensors to the module of rustdecode/, which makes a step in one call and reads them
as fast as memory gives them: fp32 weights are not copied. Such a step is bound by the bytes of the weights, so int8
ones take about a quarter of the time of fp32 ones.

ReadAhead makes use of that for exact fp32: int8 weights guess the next tokens, and the exact ones read the guesses in
one step, which takes little longer than reading one token. A guess counts if the exact weights choose that token too:
every token, drawn or greedy, is theirs, and Rust adds up each row in the same order whatever is computed beside it, so
not even rounding differs. Leviathan et al. 2022 (arXiv:2211.17192); that a narrow copy of the same weights guesses:
Tiwari et al. 2025 (2502.10424).

InferenceCopy is for who has no Rust, for mixtures of experts and for many rows: the weights once more in torch,
arranged for fewer and faster calls.

    from inference import accelerate
    print(accelerate(model));  model.generate(...)                # the same answers, sooner; int8=True: sooner still

What this file does not do: the loop over tokens (decoding.py), the products in torch themselves (forms.py).

Letters: B batch, T tokens, N rows (B * T), V vocabulary, D hidden size, F MLP size, H heads, K kv heads, C head_dim, S
cache slots, M and K rows and columns of a matrix.
"""
import functools
import time
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from decoding import additive_mask
from forms import FORMS, INT8_FORMS, fastest_form, multiply_int8, multiply_widened, quantize

MOST_TOKENS = 16  # of one step in Rust; with more, products in torch are faster
MOST_GUESSES = 8


# -- Which one ---------------------------------------------------------------------------------------------------------
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
        step = make_native(model, dtype, int8, rows)
        # of a decoder that guesses the time without: how often guesses are right is for the text to decide
        found = [] if step is None else [(seconds_of_a_step(getattr(step, "exact", step), rows), step)]
        if not found or rows > 1 or found[0][0] > before:
            copy = InferenceCopy(model, dtype, int8, rows)
            found.append((seconds_of_a_step(copy, rows), copy))
    after, best = min(found, key=lambda pair: pair[0])
    if after > before and not int8:  # int8 was asked for, and may be wanted for its numbers
        return f"decoding with the model itself: a copy of the weights is {after / before:.2f}x as slow"
    model.inference_copy = best
    return f"decoding with {best.name}, {before / after:.2f}x as fast"


def _marks(model) -> list:
    """What tells whether weights are still those that a decoder was made of: each parameter, its memory, its version
    and some of its numbers. `.to()` and `.data =` change the memory and not the version; torch's fused optimizers and
    `.data.add_()` change neither."""
    return [(p, p.data_ptr(), p._version, p.detach().flatten()[:: p.numel() // 8 + 1].tolist())
            for p in model.parameters()]


def _unchanged(model, marks: list, in_place: bool = False) -> bool:
    """Whether the weights are those that were marked; in_place: new numbers in the same memory are no change."""
    now = _marks(model)
    return len(now) == len(marks) and all(
        p is old and place == old_place and (in_place or state == old_state)
        for (p, place, *state), (old, old_place, *old_state) in zip(now, marks, strict=True))


def seconds_of_a_step(decoder, rows: int = 1, steps: int = 8) -> float:
    """Seconds that one token of so many rows takes a hundred tokens into a text, the best of some. The likeliest token
    is part of it: of many rows torch finds it with all threads, and these look out for more work for some milliseconds,
    in the way of a step in Rust."""
    cache = decoder.new_cache(rows, 100 + steps)
    cache.kv.zero_()
    cache.set_lengths([100] * rows)
    token = torch.zeros(rows, 1, dtype=torch.int64)
    return _seconds(lambda: decoder.lm_head(decoder.hidden_states(token, cache=cache)[:, -1]).max(-1), steps)


def _seconds(function, times: int = 5) -> float:
    """Seconds of a call, the best of some; of a long one fewer, so that choosing takes no longer than a sentence."""
    found = []
    while len(found) < min(2, times) or len(found) < times and sum(found) < 0.25:  # one alone may have been disturbed
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return min(found)


# -- A step in Rust ----------------------------------------------------------------------------------------------------
def module():
    """minillm_decode, or None where it is not built."""
    try:
        import minillm_decode
    except ImportError:
        return None
    return minillm_decode


def make_native(model, dtype: torch.dtype, int8: bool, rows: int = 1):
    """The fastest decoder in Rust for this model, or None: the module is not built, or does not know such a model."""
    config, stored = model.config, {p.dtype for p in model.parameters()}
    known = config.num_experts == 0 and (config.hidden_act, config.mlp_type) == ("silu", "gated")
    known &= stored == {torch.float32} and dtype in (torch.float32, torch.bfloat16) or stored == {dtype, torch.bfloat16}
    if module() is None or not known or rows > MOST_TOKENS or not all(p.is_contiguous() for p in model.parameters()):
        return None
    found = NativeDecoder(model, dtype, int8)
    if dtype != torch.float32 or int8 or rows > 1:
        return found
    guided = ReadAhead(found, NativeDecoder(model, dtype, int8=True))
    return guided if guided.pays() else found


class NativeDecoder:
    """A model's weights in fp32, bf16 or int8 behind a step in Rust. generate() finds here what it needs of a model:
    config, new_cache(), hidden_states(), lm_head()."""

    def __init__(self, model, dtype: torch.dtype, int8: bool = False):
        self.config, self.dtype, self.int8 = model.config, dtype, int8
        self.marks = _marks(model)
        # reads the model's own memory, norms included
        self.shared = not int8 and all(p.dtype == dtype == torch.float32 for p in model.parameters())
        # reads long prompts; its Linear weights are those that Rust reads
        self.twin = model.twin(None if int8 or self.shared else dtype)
        self.turns = torch.zeros(0, 0), torch.zeros(0, 0)  # cosines and sines [S,C]
        # States [N,D] and logits [N,V] of the last step. Pairs are replaced as one: another thread may look at them.
        self.last = torch.zeros(0, 0), torch.zeros(0, 0)
        matrices = {}  # Linear module -> its numbers as arrays
        for parent in list(self.twin.modules()):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear) and int8:
                    linear = Int8Linear(linear.weight.detach())
                    setattr(parent, name, linear)
                if isinstance(linear, (nn.Linear, Int8Linear)):
                    matrices[linear] = _matrix(linear)
        layers = []
        for block in self.twin.model.layers:
            a, mlp = block.self_attn, block.mlp
            layers.append((_gain(block.input_layernorm), *(matrices[m] for m in (a.q_proj, a.k_proj, a.v_proj)),
                           _gain(a.q_norm), _gain(a.k_norm), matrices[a.o_proj], _gain(block.post_attention_layernorm),
                           *(matrices[m] for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))))
        config = self.config
        self.weights = (layers, _array(self.twin.model.embed_tokens.weight), _gain(self.twin.model.norm),
                        matrices[self.twin.lm_head], config.num_attention_heads, config.num_key_value_heads,
                        config.intermediate_size, config.rms_norm_eps)
        found = []
        for threads in sorted({1, torch.get_num_threads()}):
            self.rust = module().Decoder(*self.weights, threads)
            found.append((seconds_of_a_step(self, steps=16), self.rust))
        # a small model's step is over before a second thread is awake; but one that is awake helps when it gets longer
        self.rust = found[0][1] if found[0][0] < 0.9 * found[-1][0] else found[-1][1]

    @property
    def name(self) -> str:
        """In words."""
        return f"a step in Rust ({'int8' if self.int8 else str(self.dtype)[6:]})"

    def __deepcopy__(self, memo):
        return None  # a copy of a model has weights of its own

    def is_of(self, model) -> bool:
        """Whether these are the model's weights as they are now."""
        return _unchanged(model, self.marks, in_place=self.shared)

    def new_cache(self, batch: int, slots: int):
        """An empty KVCache for this decoder."""
        return self.twin.new_cache(batch, slots, self.dtype)

    @torch.no_grad()
    def hidden_states(self, ids, cache):
        """ids [B,T], appended to the cache -> hidden states after the final norm [B,T,D]."""
        b, t = ids.shape
        if b * t > MOST_TOKENS:
            narrow = self.dtype == torch.bfloat16 and not self.int8
            with torch.autocast("cpu", self.dtype, enabled=narrow):
                return self.twin.hidden_states(ids, cache=cache)
        cache.check_room(t)
        return self.read(ids.flatten().tolist(), cache, t == 1).view(b, t, -1)

    def read(self, ids: list[int], cache, with_logits: bool = True):
        """Hidden states [B*T,D] of T tokens for each row of the cache; with their logits, which lm_head() then has."""
        states, logits = self.rust.step(ids, cache.lengths, _array(cache.kv), *self._turns(cache.slots), with_logits)
        cache.advance(len(ids) // len(cache.lengths))
        states = torch.from_numpy(states)
        if with_logits:
            self.last = states, torch.from_numpy(logits)
        return states

    def guess(self, token: int, cache, count: int) -> list[int]:
        """The likeliest `count` tokens behind this one, which the only row of the cache is about to read. The cache
        stays as long as it was; what lies behind its end is overwritten."""
        return self.rust.guess(token, cache.end, count, _array(cache.kv), *self._turns(cache.slots))

    @torch.no_grad()
    def lm_head(self, h):
        """Hidden states [B,D] -> logits [B,V]."""
        # Logits of the last step were made with it, in one call. They are known by their place in memory: h is then a
        # part of these states, which stand there as long as they are kept here.
        states, logits = self.last
        row, odd = divmod(h.data_ptr() - states.data_ptr(), 4 * self.config.hidden_size)
        if odd == 0 and 0 <= row <= len(states) - len(h) and h.is_contiguous():
            return logits[row : row + len(h)]
        if len(h) > MOST_TOKENS:
            return self.twin.lm_head(h if self.int8 else h.to(self.dtype))
        return torch.from_numpy(self.rust.logits(h.float().contiguous().numpy()))

    def _turns(self, slots: int):
        """Cosines and sines of the rotation at every position, [S,C] each."""
        turns = self.turns
        if slots > len(turns[0]):
            tables = self.twin.model.rotary(torch.arange(slots)[None], torch.float32)  # [1,S,1,C] each
            self.turns = turns = tuple(table.reshape(slots, -1).contiguous() for table in tables)
        return [table.numpy() for table in turns]


class Int8Linear(nn.Module):
    """A Linear module in 8 bits for many rows, on the numbers that Rust reads for few."""

    def __init__(self, weight):
        super().__init__()
        self.numbers, self.scales = quantize(weight)
        products = {"int8 products": multiply_int8, "widened": multiply_widened}
        forms = {name: (lambda matrix: (self.numbers, self.scales), product) for name, product in products.items()}
        # right is what multiplies these numbers, however far they are from the weights
        self.multiply = products[fastest_form(forms, [self.numbers * self.scales[:, None]], rows=64)]

    def forward(self, x):
        """x [...,K] -> [...,M]."""
        return self.multiply(x.flatten(0, -2), (self.numbers, self.scales)).unflatten(0, x.shape[:-1])


def _matrix(linear):
    """What Rust takes: an array [M,K], or int8 numbers and the scales of their rows."""
    if isinstance(linear, Int8Linear):
        return linear.numbers.numpy(), linear.scales.numpy()
    return _array(linear.weight)


def _array(tensor):
    """A numpy array on a tensor's memory; bf16, which numpy does not know, as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _gain(norm):
    """The gain of a norm in fp32."""
    return norm.weight.detach().float().numpy()


# -- Guesses -----------------------------------------------------------------------------------------------------------
class ReadAhead:
    """Exact weights that read what narrow ones guess; to generate() a decoder like any other.

    hidden_states() reads the token that it is given and the guesses behind it, and keeps their states: if the next call
    brings the token that was guessed, its states are there already. How many are guessed follows from how often guesses
    were right lately and from what a guess and a step cost here.
    """

    def __init__(self, exact: NativeDecoder, narrow: NativeDecoder):
        self.exact, self.narrow, self.config = exact, narrow, exact.config
        self.right, self.judged = 8.0, 10.0  # guesses, old ones with less and less weight; a share to begin with
        # cache -> (its length, guessed tokens that stand behind it, with their states [1,1,D])
        self.pending = weakref.WeakKeyDictionary()
        self.idle = 0  # tokens since the last guess
        cache = self.new_cache(1, MOST_GUESSES + 2)

        def read(count):
            cache.set_lengths([1])
            exact.read([0] * count, cache)
        self.guess_seconds = _seconds(lambda: narrow.guess(0, cache, MOST_GUESSES)) / MOST_GUESSES
        self.step_seconds = [_seconds(functools.partial(read, count)) for count in (1, 1 + MOST_GUESSES)]

    @property
    def name(self) -> str:
        """In words."""
        return "a step in Rust (float32, tokens guessed in int8)"

    def __deepcopy__(self, memo):
        return None

    def is_of(self, model) -> bool:
        """As NativeDecoder.is_of(). The guesses may be of older weights: that costs time, and changes no token."""
        return self.exact.is_of(model)

    def new_cache(self, batch: int, slots: int):
        """An empty KVCache for both."""
        return self.exact.new_cache(batch, slots)

    def pays(self, share: float = 0.8) -> bool:
        """Whether guessing is worth its while if this share of the guesses is right."""
        return self._best_count(share) > 0

    def hidden_states(self, ids, cache):
        """As NativeDecoder.hidden_states()."""
        length, pending = self.pending.pop(cache, (0, []))
        if ids.numel() > 1 or cache.end == 0:
            return self.exact.hidden_states(ids, cache)
        cache.check_room(1)
        token = int(ids)
        if pending and cache.lengths == [length]:
            (guess, states), *pending = pending
            self._judge(guess == token)
            if guess == token:
                cache.advance(1)
                self.pending[cache] = length + 1, pending
                return states
        length, room = cache.end + 1, cache.slots - cache.end - 1
        count = min(self._best_count(self.right / self.judged), room)
        self.idle += 1
        if not count and room and self.idle > 32:  # has the text become easier to guess?
            count = 1
        self.idle = 0 if count else self.idle
        guesses = self.narrow.guess(token, cache, count) if count else []
        states = self.exact.read([token, *guesses], cache)[None]  # [1,T,D]
        cache.set_lengths([length])
        self.pending[cache] = length, [(guess, states[:, i : i + 1]) for i, guess in enumerate(guesses, 1)]
        return states[:, :1]

    def lm_head(self, h):
        """As NativeDecoder.lm_head()."""
        return self.exact.lm_head(h)

    def _judge(self, right: bool):
        """Remember whether a guess was right; half of the weight is that of the last twenty."""
        self.right, self.judged = 0.966 * self.right + right, 0.966 * self.judged + 1

    def _best_count(self, share: float) -> int:
        """How many guesses make a token cheapest if this share of them is right.

        With c guesses of which each is right with probability p, (1 - p^(c+1)) / (1 - p) tokens come of a step
        (Leviathan et al. 2022, equation 1).
        """
        one, most = self.step_seconds
        costs = [(c * self.guess_seconds + one + (most - one) * c / MOST_GUESSES) / sum(share**i for i in range(c + 1))
                 for c in range(MOST_GUESSES + 1)]
        return costs.index(min(costs))


# -- A copy in torch ---------------------------------------------------------------------------------------------------
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
        self.marks = _marks(model)
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
        return _unchanged(model, self.marks)

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
