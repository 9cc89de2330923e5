"""Decoding in Rust: one step of a dense model in one call, and cheap guesses for weights that are dear to read.

NativeDecoder hands the model's own tensors to the module of rustdecode/, which reads them as fast as memory gives them:
fp32 weights are not copied. A step with one row is bound by that speed; so the bytes of the weights decide, and int8
weights take a quarter of the time of fp32 ones.

ReadAhead makes use of that for exact fp32: int8 weights guess the next tokens, and the exact ones read the guesses in
one step, which takes little longer than reading one token. A guess counts if the exact weights choose that token too:
every token, drawn or greedy, is theirs, and Rust adds up each row in the same order whatever is computed beside it, so
not even rounding differs. Leviathan et al. 2022 (arXiv:2211.17192); a narrow copy as the one that guesses: Zhang et al.
2023 (2309.08168) use some of the layers, Tiwari et al. 2025 (2502.10424) fewer bits.

What this file does not do: choose (inference.accelerate()), mixtures of experts, GPUs, long prompts (torch reads them).

Letters: B rows, T tokens, D hidden size, V vocabulary, S cache slots, C head_dim.
"""
import functools
import time

import torch
from torch import nn

from forms import fastest_form, multiply_int8, multiply_widened, quantize

MOST_TOKENS = 16  # of one step; torch multiplies more rows as fast
MOST_GUESSES = 8


def module():
    """minillm_decode, or None where it is not built."""
    try:
        import minillm_decode
    except ImportError:
        return None
    return minillm_decode


def make_decoder(model, dtype: torch.dtype, int8: bool, rows: int = 1):
    """The fastest decoder in Rust for this model, or None: the module is not built, or does not know such a model."""
    config = model.config
    known = config.num_experts == 0 and (config.hidden_act, config.mlp_type) == ("silu", "gated")
    if module() is None or not known or rows > MOST_TOKENS or dtype not in (torch.float32, torch.bfloat16):
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
        self.parameters = [(p, p._version) for p in model.parameters()]
        stored = model.model.embed_tokens.weight.dtype
        self.shared = not int8 and stored == dtype  # reads the model's own memory
        # reads long prompts; its Linear weights are those that Rust reads
        self.twin = model.twin(None if int8 or self.shared else dtype)
        self.cos, self.sin = torch.zeros(0, 0), torch.zeros(0, 0)
        self.states = self.logits = torch.zeros(0, 0)  # of the last step [N,D], [N,V]
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
        # a small model's step is over before a second thread is awake
        seconds = {}
        for threads in {1, torch.get_num_threads()}:
            self.rust = module().Decoder(*self.weights, threads)
            seconds[threads] = _seconds_of_a_step(self), self.rust
        self.rust = min(seconds.values(), key=lambda pair: pair[0])[1]

    @property
    def name(self) -> str:
        """In words."""
        return f"a step in Rust ({'int8' if self.int8 else str(self.dtype)[6:]})"

    def __deepcopy__(self, memo):
        return None  # a copy of a model has weights of its own

    def is_of(self, model) -> bool:
        """Whether these are the model's weights as they are now."""
        now = list(model.parameters())
        return len(now) == len(self.parameters) and all(
            p is old and (self.shared or p._version == version)
            for p, (old, version) in zip(now, self.parameters, strict=True))

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
            self.states, self.logits = states, torch.from_numpy(logits)
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
        row, odd = divmod(h.data_ptr() - self.states.data_ptr(), 4 * self.config.hidden_size)
        if odd == 0 and 0 <= row <= len(self.states) - len(h) and h.is_contiguous():
            return self.logits[row : row + len(h)]
        if len(h) > MOST_TOKENS:
            return self.twin.lm_head(h if self.int8 else h.to(self.dtype))
        return torch.from_numpy(self.rust.logits(h.float().contiguous().numpy()))

    def _turns(self, slots: int):
        """Cosines and sines of the rotation at every position, [S,C] each."""
        if slots > len(self.cos):
            tables = self.twin.model.rotary(torch.arange(slots)[None], torch.float32)  # [1,S,1,C] each
            self.cos, self.sin = (table.reshape(slots, -1).contiguous() for table in tables)
        return self.cos.numpy(), self.sin.numpy()


class ReadAhead:
    """Exact weights that read what narrow ones guess; to generate() a decoder like any other.

    hidden_states() reads the token that it is given and the guesses behind it, and keeps their states: if the next call
    brings the token that was guessed, its states are there already. How many are guessed follows from how often guesses
    were right lately and from what a guess and a step cost here.
    """

    def __init__(self, exact: NativeDecoder, narrow: NativeDecoder):
        self.exact, self.narrow, self.config = exact, narrow, exact.config
        self.right, self.judged = 8.0, 10.0  # guesses, old ones with less and less weight; a share to begin with
        self.pending: list[tuple[int, torch.Tensor]] = []  # guessed tokens with their states [1,1,D]
        self.cache = None  # in which they stand
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
        if ids.numel() > 1 or cache.end == 0:
            self.pending = []
            return self.exact.hidden_states(ids, cache)
        cache.check_room(1)
        token = int(ids)
        if self.pending and self.cache is cache and cache.lengths == [self.place]:
            guess, states = self.pending.pop(0)
            self._judge(guess == token)
            if guess == token:
                cache.advance(1)
                self.place += 1
                return states
        room = cache.slots - cache.end - 1
        count = min(self._best_count(self.right / self.judged), room)
        self.idle += 1
        if not count and room and self.idle > 32:  # has the text become easier to guess?
            count = 1
        self.idle = 0 if count else self.idle
        guesses = self.narrow.guess(token, cache, count) if count else []
        self.cache, self.place = cache, cache.end + 1
        states = self.exact.read([token, *guesses], cache)[None]  # [1,T,D]
        cache.set_lengths([self.place])
        self.pending = [(guess, states[:, i : i + 1]) for i, guess in enumerate(guesses, 1)]
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


class Int8Linear(nn.Module):
    """A Linear module in 8 bits for many rows, on the numbers that Rust reads for few."""

    def __init__(self, weight):
        super().__init__()
        self.numbers, self.scales = quantize(weight)
        products = {"int8 products": multiply_int8, "widened": multiply_widened}
        forms = {name: (lambda matrix: (self.numbers, self.scales), product) for name, product in products.items()}
        self.multiply = products[fastest_form(forms, [weight], rows=64)]

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


def _seconds_of_a_step(decoder) -> float:
    """Seconds that one token takes."""
    cache = decoder.new_cache(1, 2)
    token = torch.zeros(1, 1, dtype=torch.int64)

    def step():
        cache.set_lengths([1])
        decoder.lm_head(decoder.hidden_states(token, cache)[0])
    return _seconds(step)


def _seconds(function, times: int = 5) -> float:
    """Seconds of a call, the best of some."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
