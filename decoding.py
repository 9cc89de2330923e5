"""Decoding, from a model and prompts to tokens: the KV cache, the draw of a token, the loop behind generate().

Read it from top to bottom: KVCache (and Prefix, the memory of a chat) -> sample() -> generate(), which yields (row,
token id) as tokens are made, for many prompts at once; rows that end make room for prompts that wait.

It knows no class of model. A model is what has config and decoder(); a decoder what has config, new_cache(),
hidden_states() and lm_head(): a Transformer (model.py) or a copy of its weights (inference.InferenceCopy). What it
does not do: text (tokenizer.py, chat.py), beam search and other ways to decode (generation.py).

Papers: top-p, Holtzman et al. 2020 (arXiv:1904.09751); min-p, Nguyen et al. 2024 (2407.01082); repetition penalty,
Keskar et al. 2019 (1909.05858); continuous batching, Yu et al. 2022 (Orca).

Letters: B batch, T tokens, V vocabulary, D hidden size, K kv heads, C head_dim, S cache slots, S' those in use, L
layers; in sample() k is the number of most likely ids.
"""
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


# -- The cache ---------------------------------------------------------------------------------------------------------
class KVCache:
    """Keys and values of all layers for up to `batch` rows of up to `slots` tokens, allocated once.

    config: the model's ModelConfig. Slot s of a row holds position s. `lengths` says how many slots of each row are
    real; what lies behind is never attended to and is overwritten next. Rows may differ in length ("ragged"), so
    prompts are padded on the right.
    """

    def __init__(self, config, batch: int, slots: int, dtype=torch.float32, device="cpu"):
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

    def check_room(self, count: int):
        """ValueError where `count` tokens more do not fit."""
        if self.end + count > self.slots:
            raise ValueError(f"KV cache overflow: {self.end} + {count} tokens in {self.slots} slots; a cache holds "
                             "prompt and answer; make it longer, or call truncate()")

    def reserve(self, count: int) -> Tensor:
        """Positions [B,count] of the next tokens ([1,count] where rows are equally long). Raises: ValueError when they
        do not fit."""
        self.check_room(count)
        end, rows = self.end, len(self.lengths)
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


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = may look) as what attention adds to its scores: 0 or -inf. For all layers it is made once,
    where from a bool mask each layer would make its own."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


# -- Sampling ----------------------------------------------------------------------------------------------------------
def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor, min_p=0.0) -> Tensor:
    """Draw one id a row: logits [B,V], uniform [B] in [0,1) -> ids [B].

    Inverse transform: the id at which the running sum of probabilities passes `uniform`. One number a row decides, so a
    row's draw does not depend on its neighbours. temperature 0 = the most likely id. top_k keeps the k most likely ids
    (0, or k >= V: all); of these top_p keeps the smallest set whose mass reaches p (1: all; 0: the most likely id
    only), and min_p those at least min_p times as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082).
    """
    if temperature < 1e-30 or top_k == 1 or top_p == 0:  # logits divided by less would be beyond fp32
        return logits.max(-1).indices  # the first of equal ones, as argmax, in a third of its time
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
        # torch's CPU generator uses 32 bits of its seed; the factor carries neighbouring seeds far from each other
        generator = torch.Generator().manual_seed((int(seed) * 0x9E3779B1 + int(row)) % 2**32)
        out.append(torch.rand(count, generator=generator))
    return torch.stack(out)


# -- The loop ----------------------------------------------------------------------------------------------------------
def check_prompts(prompts: list[list[int]], config):
    """ValueError for a prompt that is empty, fills the whole context, or holds an id outside the vocabulary."""
    room, size = config.max_position_embeddings, config.vocab_size
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty, and no bos_token_id stands in for it; a model continues at least "
                             "one token; give a prompt")
        if len(prompt) >= room:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens; max_position_embeddings {room} must leave room "
                             "for an answer; shorten the prompt")
        if not 0 <= min(prompt) <= max(prompt) < size:
            raise ValueError(f"prompt {row} has an id outside 0..{size - 1}; ids are below vocab_size; use the "
                             "tokenizer saved with the model")



def fill_holes(keep: list[int], count: int) -> list[int]:
    """Order the kept rows so that as few as possible move: rows below `count` stay, the others fill the holes."""
    tail = [row for row in keep if row >= count]
    stay = set(keep)
    return [row if row in stay else tail.pop() for row in range(count)]


@dataclass
class _Row:
    """One row of a running batch: which prompt it answers, its numbers in [0,1), its newest id, how many it made."""

    prompt: int
    draws: Iterator[float]
    last: int = 0
    made: int = 0


class _Decoding:
    """A running batch: rows leave when they end, and prompts that wait take their places."""

    def __init__(self, decoder, prompts, options, row_seeds, prefix):
        self.decoder, self.prompts, self.options, self.row_seeds = decoder, prompts, options, row_seeds
        self.prefix = prefix
        room = decoder.config.max_position_embeddings
        self.limits = [min(options.max_new_tokens, room - len(p)) for p in prompts]
        self.places = min(options.max_batch or len(prompts), len(prompts))
        self.waiting = list(range(len(prompts)))[::-1]  # the next one last
        self.rows: list[_Row] = []
        # the last token is never fed back, hence - 1
        slots = max(len(p) + limit for p, limit in zip(prompts, self.limits, strict=True)) - 1
        self.cache = decoder.new_cache(self.places, slots)
        self.cache.keep([])
        self.device = self.cache.kv.device
        # [B,V], for the penalty
        self.seen = torch.zeros(0, decoder.config.vocab_size, dtype=torch.bool, device=self.device)

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
                if row.last not in self.options.stop_ids and row.made < self.limits[row.prompt]]
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
        count = max(self.limits[i] for i in numbers) if self.options.temperature else 0
        # drawn up front: one call a row, not one a token
        draws = row_uniforms(self.options.seed, [self.row_seeds[i] for i in numbers], count).tolist()
        self.rows += [_Row(i, iter(row)) for i, row in zip(numbers, draws, strict=True)]
        if self.options.repetition_penalty != 1:
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
        rows, options = self.rows[start:], self.options
        logits = self.decoder.lm_head(h)  # [B,V]
        if len(self.seen):
            seen = self.seen[start:]
            weaker = torch.where(logits > 0, logits / options.repetition_penalty, logits * options.repetition_penalty)
            logits = torch.where(seen, weaker, logits)
        young = [i for i, row in enumerate(rows) if row.made < options.min_new_tokens]
        if young:
            stops = [i for i in options.stop_ids if 0 <= i < logits.shape[1]]
            logits[torch.tensor(young)[:, None], stops] = -math.inf
        uniform = None  # nothing is drawn
        if options.temperature:
            uniform = torch.tensor([next(row.draws) for row in rows], device=self.device)  # [B]
        ids = sample(logits, options.temperature, options.top_k, options.top_p, uniform, options.min_p)  # [B]
        if len(self.seen):
            seen.scatter_(1, ids[:, None], True)
        for row, token in zip(rows, ids.tolist(), strict=True):  # the one wait for the device in each step
            row.last, row.made = token, row.made + 1
        return [(row.prompt, row.last) for row in rows]


def generate(model, prompts: list[list[int]], options, row_seeds: list[int] | None = None,
             prefix: Prefix | None = None) -> Iterator[tuple[int, int]]:
    """The events of Transformer.generate(), see there; options: a GenerationConfig. Checks at the call, computes as the
    events are taken."""
    bos = model.config.bos_token_id
    prompts = [list(p) or ([] if bos is None else [bos]) for p in prompts]
    row_seeds = list(range(len(prompts))) if row_seeds is None else list(row_seeds)
    if len(row_seeds) != len(prompts):
        raise ValueError(f"{len(row_seeds)} row_seeds for {len(prompts)} prompts; each row has one; give as many seeds "
                         "as prompts")
    if prefix is not None and len(prompts) != 1:
        raise ValueError(f"a prefix with {len(prompts)} prompts; it is the memory of one chat; give one prompt")
    check_prompts(prompts, model.config)
    if not prompts or options.max_new_tokens == 0:
        return iter(())
    return _stream(model, prompts, options, row_seeds, prefix)


def _stream(model, prompts, options, row_seeds, prefix):
    """The loop behind generate(). It computes in chunks of one step inside, and yields outside, inference mode."""
    decoder, context = model.decoder()
    state = None
    while True:
        # not around the yield: the caller's own code would run in inference mode
        with torch.inference_mode(), context():
            state = state or _Decoding(decoder, prompts, options, row_seeds, prefix)
            events = state.step()
        if not events:
            return
        yield from events
