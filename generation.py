"""Decoding beyond sampling: what model.Transformer.generate does not do. Functions take a model object.

Here: beam search; prompt lookup, which writes several tokens a step where a text repeats itself; copies of the weights
from which a CPU decodes faster. Not here: greedy decoding, temperature, top-k, top-p, batches and streaming
(decoding.py), stop strings and chat (chat.py).

Beam search keeps the `num_beams` most probable beginnings instead of one, and so finds answers whose first word is not
the most likely one. For open text it is a poor choice (it prefers short, repetitive answers); for tasks with one right
answer it is the strongest simple decoder.

Prompt lookup guesses that what followed the last words earlier in the text follows again, and lets the model check
several guessed tokens in one forward: reading T tokens costs less than T times reading one. A guess is kept as far as
it is what the model would have chosen, so the answer is exactly that of greedy decoding.

Papers: Sutskever et al. 2014 (arXiv:1409.3215); length normalisation, Wu et al. 2016 (arXiv:1609.08144); speculative
decoding, Leviathan et al. 2022 (arXiv:2211.17192); lookup in the prompt, Yang et al. 2023 (arXiv:2304.04487); int8
products with a scale for each row and column, Dettmers et al. 2022 (arXiv:2208.07339).

    from generation import accelerate, beam_search, lookup_decoding
    print(accelerate(model));  model.generate(...)                # the same answers, sooner; int8=True: sooner still
    ids, score = beam_search(model, prompt_ids, num_beams=4, max_new_tokens=64, stop_ids={eos})[0]

Letters: B batch, T tokens, N rows (B * T) or rows of a matrix, V vocabulary, D hidden size, H heads, K kv heads, C
head_dim; in beam search K beams.
"""
import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from decoding import additive_mask, check_prompts


# -- Beam search -------------------------------------------------------------------------------------------------------
def beam_search(model, prompt: list[int], num_beams: int = 4, max_new_tokens: int = 64, length_penalty: float = 1.0,
                stop_ids: Iterable[int] = (), num_return: int = 1) -> list[tuple[list[int], float]]:
    """The best answers to one prompt, best first, as (ids with their stop id, score).

    score = (sum of log-probabilities) / (number of answer tokens) ** length_penalty: 0 compares sums and so prefers
    short answers, 1 compares means. The search ends when no running beam can beat the worst of `num_beams` finished
    answers at its present length, after max_new_tokens, or at max_position_embeddings. Equal to transformers'
    generate(num_beams=..., do_sample=False, early_stopping=False), a test holds the two together.

    Raises: ValueError for a prompt that generate() refuses too, and for counts below 1.
    """
    stops = frozenset(stop_ids)
    check_prompts([prompt], model.config)
    if num_beams < 1 or max_new_tokens < 1 or not 1 <= num_return <= num_beams:
        raise ValueError(f"num_beams={num_beams}, max_new_tokens={max_new_tokens}, num_return={num_return}; all are at "
                         "least 1 and no more answers are returned than there are beams; correct the value")
    steps = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
    decoder, context = model.decoder()
    with torch.inference_mode(), context():
        return _search(decoder, list(prompt), num_beams, steps, length_penalty, stops)[:num_return]


def _search(decoder, prompt, num_beams, steps, length_penalty, stops):
    """The loop of beam_search(): all finished answers, best first."""
    cache = decoder.new_cache(num_beams, len(prompt) + steps)
    device = cache.kv.device
    cache.keep([0])  # all beams start as the same one: the prompt is read once
    logits = decoder.lm_head(decoder.hidden_states(torch.tensor([prompt], device=device), cache=cache)[:, -1])  # [1,V]
    scores = torch.zeros(1, device=device, dtype=torch.promote_types(logits.dtype, torch.float32))  # [K]
    answers: list[list[int]] = [[]]
    finished: list[tuple[list[int], float]] = []
    for length in range(1, steps + 1):
        totals = scores[:, None] + logits.to(scores.dtype).log_softmax(-1)  # [K,V]
        running, ended = _split(totals, answers, stops, num_beams, last=length == steps)
        finished += [(ids, score / length**length_penalty) for ids, score in ended]
        finished = sorted(finished, key=lambda answer: -answer[1])[:num_beams]
        # The hope of a running beam is judged at its present length: more tokens only lower the sum.
        if not running or (len(finished) == num_beams and running[0][2] / length**length_penalty <= finished[-1][1]):
            break
        answers = [ids for _, ids, _ in running]
        scores = scores.new_tensor([score for _, _, score in running])
        cache.keep([beam for beam, _, _ in running])  # each beam goes on with the cache of the one it came from
        tokens = torch.tensor([ids[-1:] for ids in answers], device=device)  # [K,1]
        logits = decoder.lm_head(decoder.hidden_states(tokens, cache=cache)[:, -1])  # [K,V]
    return finished


def _split(totals, answers, stops, num_beams, last):
    """The best continuations of all beams: (running [(beam, ids, sum)], ended [(ids, sum)]), both best first.

    totals [K,V] are sums of log-probabilities. Enough candidates are looked at that `num_beams` go on even if every
    other one ends. An ended candidate counts only if it is among the first num_beams: a worse one would be an answer
    that plain search by rank had not reached yet.
    """
    count = min(max(2, 1 + len(stops)) * num_beams, totals.numel())
    values, indices = totals.flatten().topk(count)  # [count]
    running, ended = [], []
    for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        beam, token = divmod(index, totals.shape[1])
        ids = [*answers[beam], token]
        if last or token in stops:
            if rank < num_beams:
                ended.append((ids, value))
        elif len(running) < num_beams:
            running.append((beam, ids, value))
    return running, ended


# -- Prompt lookup -----------------------------------------------------------------------------------------------------
def lookup_decoding(model, prompt: list[int], max_new_tokens: int, lookahead: int = 4, stop_ids: Iterable[int] = (),
                    counts: dict | None = None) -> Iterator[int]:
    """Yield the ids of model.generate([prompt], max_new_tokens, temperature=0, stop_ids=stop_ids), some at a time.

    lookahead: how many tokens are guessed at most in a step. counts: a dict that receives steps (forwards), guessed and
    accepted (tokens); 1 + accepted / steps tokens come of a step.
    Raises: ValueError for a prompt that generate() refuses too, and for a lookahead below 1.
    """
    check_prompts([prompt], model.config)
    if lookahead < 1:
        raise ValueError(f"lookahead={lookahead}; at least 1 token is guessed in a step; correct the value")
    limit = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
    return _lookup(model, list(prompt), limit, lookahead, frozenset(stop_ids), {} if counts is None else counts)


def _lookup(model, text, limit, lookahead, stops, counts):
    """The loop of lookup_decoding(); `text` grows by the answer."""
    counts |= {"steps": 0, "guessed": 0, "accepted": 0}
    decoder, context = model.decoder()
    device = model.model.embed_tokens.weight.device
    end = len(text) + limit
    with torch.inference_mode(), context():
        cache = decoder.new_cache(1, end - 1)
    read = 0  # tokens in the cache
    while len(text) < end:
        # the last token of the text is always read anew: its logits say what comes next
        guess = look_up(text, min(lookahead, end - len(text) - 1)) if read else []
        with torch.inference_mode(), context():
            h = decoder.hidden_states(torch.tensor([text[read:] + guess], device=device), cache=cache)  # [1,T,D]
            choices = decoder.lm_head(h[0, -1 - len(guess):]).argmax(-1).tolist()  # 1 + guesses
        # choices[i] follows guess[:i]: it counts as long as the guesses before it were right
        right = next((i for i, (a, b) in enumerate(zip(guess, choices, strict=False)) if a != b), len(guess))
        counts["steps"] += 1
        counts["guessed"] += len(guess)
        counts["accepted"] += right
        read = len(text) + right
        cache.truncate(read)  # what was read of a wrong guess
        for token in choices[: right + 1]:
            text.append(token)
            yield token
            if token in stops:
                return


def look_up(text: list[int], count: int, longest: int = 3) -> list[int]:
    """`count` tokens that followed the last `longest` tokens of the text where these stood before, latest place first;
    with no such place the last two, then the last one, are looked up; else []. What followed may be shorter than
    `count`: then the text has begun to repeat it, and it is taken to go on so."""
    for size in range(min(longest, len(text) - 1), 0, -1):
        tail = text[-size:]
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - 1] == tail[-1] and text[end - size : end] == tail:
                return [text[end + i % (len(text) - end)] for i in range(count)]
    return []


# -- Forms of a matrix -------------------------------------------------------------------------------------------------
# A form says how a matrix [M,K] is stored and how rows x [N,K] are multiplied with it. Which one is fastest depends on
# processor, libraries, threads and shape, by factors; so they are timed.
def fastest_form(forms: dict, matrices: list, rows: int = 1) -> str:
    """Name of the form whose products are right and take least time with so many rows at once, for these matrices
    [M,K]. Raises: ValueError where none is right."""
    size = matrices[0].shape[1]
    inputs = [torch.linspace(-1, 1, n * size, dtype=matrices[0].dtype).view(n, size) for n in (1, 16, rows)]
    seconds = {}
    for name, (pack, multiply) in forms.items():
        with contextlib.suppress(RuntimeError, AttributeError):  # this build of torch may lack the product
            packed = [pack(matrix) for matrix in matrices]
            # a product that overflows may be fast as well
            wrong = [multiply(x, packed[0]) - F.linear(x, matrices[0]) for x in inputs]
            if all(e.norm() <= 0.03 * F.linear(x, matrices[0]).norm() for e, x in zip(wrong, inputs, strict=True)):
                seconds[name] = _seconds_of_products(multiply, inputs[-1], packed)
    if not seconds:
        raise ValueError(f"no right product among {', '.join(forms)} on this CPU; an inference copy needs one; decode "
                         "with the model itself")
    return min(seconds, key=seconds.get)


def _seconds_of_products(multiply, x, packed) -> float:
    """Seconds for the products of x with all matrices, the best of four."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for matrix in packed:
            multiply(x, matrix)
        times.append(time.perf_counter() - start)
    return min(times)


def _product(multiply, packed):
    """The product with one matrix as a function of the rows."""
    return lambda x: multiply(x, packed)


def _in_two(matrix):
    """[M,K] as two blocks [2,M/2,K]."""
    return matrix.view(2, -1, matrix.shape[1])


def _multiply_in_two(x, blocks):
    """The blocks as a batch of two: some libraries read each with a thread of its own, but a lone matrix with one. With
    x transposed the row's stride is K; with stride 1 the same libraries are slow."""
    if len(x) != 1:
        return F.linear(x, blocks.flatten(0, 1))
    return torch.bmm(blocks, x.t().expand(2, -1, 1)).view(1, -1)


def _pack_tables(matrix):
    """[M,K] as P tables [K,M/P] of some columns each, one below the other: the matrix transposed, in pieces whose sums
    stay in registers, and one or more for each thread, if it can be halved so often. Returns (tables [P*K,M/P], ids of
    all their rows [P*K], first row of each table [P])."""
    parts = 1
    while len(matrix) % (2 * parts) == 0 and (parts < torch.get_num_threads() or len(matrix) // parts > 256):
        parts *= 2
    tables = matrix.view(parts, -1, matrix.shape[1]).transpose(1, 2).flatten(0, 1).contiguous()
    ids = torch.arange(len(tables))
    return tables, ids, ids[:: matrix.shape[1]]


def _multiply_tables(x, packed):
    """A row times a matrix is a weighted sum of the matrix's rows, which is what recommendation models ask of tables of
    embeddings: their kernel fetches the next rows while it adds, and reads bf16 faster than products of one row do."""
    tables, ids, starts = packed
    if len(x) != 1:  # [P,N,M/P]
        return torch.matmul(x, tables.view(len(starts), x.shape[1], -1)).transpose(0, 1).flatten(1)
    weights = x.expand(len(starts), -1).flatten()  # [P*K]
    return F.embedding_bag(ids, tables, starts, mode="sum", per_sample_weights=weights).view(1, -1)


def _pack_for_onednn(matrix):
    """[M,K] in the blocks in which oneDNN multiplies few rows; F.linear() makes such blocks anew in every call."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), 16)


def _multiply_for_onednn(x, packed):
    """As F.linear()."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _row_scales(matrix):
    """What the largest number of each row [M] is divided by to become 127."""
    return matrix.float().abs().amax(1).clamp(min=1e-12) / 127


def _quantize(matrix):
    """int8 numbers [M,K] and a scale for each row [M]: matrix ~ numbers * scales[:, None]."""
    scales = _row_scales(matrix)
    return (matrix / scales[:, None]).round().to(torch.int8), scales


def _multiply_int8(x, packed):
    """Rows in int8 as well, with a scale each, so that the product is one of whole numbers."""
    weight, scales = packed
    steps = x.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)  # [N,1]
    rows = (x / steps).round_().to(torch.int8)
    return (torch._int_mm(rows, weight.t()) * (steps * scales)).to(x.dtype)


def _pack_int8(matrix):
    """_quantize() in the order in which torch's product of packed matrices reads it."""
    if not torch.cpu._is_vnni_supported():  # without VNNI that product adds up in 16 bits, where sums may not fit
        raise RuntimeError("no int8 instructions")
    zeros = torch.zeros(len(matrix), dtype=torch.int64)
    with warnings.catch_warnings(record=True):  # torch says it will drop such matrices: then the other forms remain
        return torch.ops.quantized.linear_prepack(
            torch.quantize_per_channel(matrix.float(), _row_scales(matrix), zeros, 0, torch.qint8), None)


def _multiply_packed_int8(x, packed):
    """As _multiply_int8(), in fewer calls. The product takes one scale for all rows, in which small numbers would be
    lost beside a row of large ones: so rows are made equally large before."""
    if len(x) == 1:
        return torch.ops.quantized.linear_dynamic(x.float(), packed).to(x.dtype)
    largest = x.abs().amax(1, keepdim=True).clamp_(min=1e-12)  # [N,1]
    return torch.ops.quantized.linear_dynamic((x / largest).float(), packed).mul_(largest).to(x.dtype)


def _pack_weights_int8(matrix):
    """_quantize() for a product that reads whole vector registers, past the end of a shorter row."""
    if matrix.shape[1] % 32:
        raise RuntimeError("rows that do not fill registers")
    return _quantize(matrix)


def _multiply_weights_int8(x, packed):
    """Only the weights in int8; the row in bf16, for which torch has this product."""
    weight, scales = packed
    if len(x) > 4:  # the kernel is made for few rows
        return F.linear(x, weight.to(x.dtype)) * scales.to(x.dtype)
    return torch._weight_int8pack_mm(x.bfloat16(), weight, scales.bfloat16()).to(x.dtype)


FORMS = {"plain products": (lambda matrix: matrix, F.linear),
         "transposed": (lambda matrix: matrix.t().contiguous(), torch.matmul),
         "split in two": (_in_two, _multiply_in_two),
         "weighted sums": (_pack_tables, _multiply_tables),
         "packed": (_pack_for_onednn, _multiply_for_onednn)}
INT8_FORMS = {"packed int8 products": (_pack_int8, _multiply_packed_int8),
              "int8 products": (_quantize, _multiply_int8),
              "int8 weights": (_pack_weights_int8, _multiply_weights_int8)}


# -- Inference copies --------------------------------------------------------------------------------------------------
def accelerate(model, int8: bool = False, dtype: torch.dtype | None = None, rows: int = 1) -> str:
    """Give the model a copy of its weights that generate() decodes with, if it is faster. Returns what was done, in
    words. rows: how many answers will be decoded together; any number can be, but the copy is made for this one.

    The answers are those of the model within rounding; with int8 or a narrower dtype they are those of slightly other
    weights. The copy costs as much memory as the weights it holds. When the weights change it is passed over, and
    another call makes a new one. Only on CPUs: a GPU has fast products for one row, and other costs.
    """
    model.inference_copy = None
    device, dtype = model.model.embed_tokens.weight.device, dtype or model.model.embed_tokens.weight.dtype
    if device.type != "cpu" or dtype == torch.float16:
        return f"decoding with the model itself: copies are made on CPUs, not for {device.type} with {dtype}"
    if any(name.endswith("_proj") and type(module) is not torch.nn.Linear for name, module in model.named_modules()):
        return "decoding with the model itself: adapters stand beside its matrices; merge them to copy it"
    with torch.inference_mode():
        copy = InferenceCopy(model, dtype, int8, rows)
        before, after = (_seconds_of_a_step(decoder, device, rows) for decoder in (model, copy))
    if after > before and not int8:  # int8 was asked for, and may be wanted for its numbers
        return f"decoding with the model itself: a copy of the weights is {after / before:.2f}x as slow"
    model.inference_copy = copy
    kind = "int8" if int8 else str(dtype)[6:]
    return (f"decoding with a copy of the weights in {kind} ({', '.join(sorted(copy.products))}), "
            f"{before / after:.2f}x as fast")


def _seconds_of_a_step(decoder, device, rows=1, steps=8) -> float:
    """Seconds that one token of so many rows takes, the best of some."""
    cache, times = decoder.new_cache(rows, steps), []
    token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    for _ in range(steps):
        start = time.perf_counter()
        decoder.lm_head(decoder.hidden_states(token, cache=cache)[:, -1])
        times.append(time.perf_counter() - start)
    return min(times)


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
