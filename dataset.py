"""Rows -> token files on disk -> packed batches with masks.

Text is tokenised once, as a stream, into memory-mapped arrays under `cache_dir`. Afterwards a batch is a few slices of
a file: memory does not grow with the data, and processes share one copy. Four data sets stand on that store:

    PretrainData    {"text"}                          windows of T tokens; every token is a target once an epoch
    SFTData         {"conversations"}                 conversations packed into rows; mask 1 on assistant text
    PreferenceData  {"prompt", "chosen", "rejected"}  chosen and rejected rows in one batch; mask 1 on the completion
    PromptData      {"conversations", "answer", ...}  prompts for reinforcement learning and exact-match evaluation

A position counts samples since the start of training, and alone decides which sample comes next (a shuffle keyed by
seed and epoch). So a run resumes, or changes its number of processes, by remembering one integer.

What this file does not do: read files and know the shapes of rows (rows.py), know a model, use a DataLoader (a batch
costs microseconds, worker processes would only add start-up time).
Letters: B batch rows, T tokens in a row, N samples.

Sources: packed windows, Radford et al. 2019 (GPT-2); best-fit packing, Ding et al. 2024 (arXiv:2404.10830);
Philox random numbers, Salmon et al. 2011.
Commands: used by train_*.py and eval.py.
"""

import copy
import errno
import hashlib
import json
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from arrays import FORMAT_VERSION, ArrayFile, Ragged, content_hash, flatten, open_array, remove_orphans, write_json
from records import read_object
from rows import conversation, document, expand_paths, first_question, preference, row_format, scan, split_heldout

CHUNK_BYTES = 1 << 20  # text given to the tokenizer at a time: enough to amortise a call, little enough to forget
OPEN_ROWS = 64  # rows that packing keeps open; on 28k short conversations at T = 512 rows were 98.7% full, 97.9% with 4


# ---------------------------------------------------------------------------------------------------------------------
# 1. Order, packing, padding


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of 0..count-1, int64 [count], fixed by (seed, epoch).

    It sorts raw Philox words: numpy promises the same words in every version, but not the same Generator.permutation.
    """
    key = np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def pack(lengths: np.ndarray, order: np.ndarray, max_seq_len: int) -> np.ndarray:
    """Best-fit packing: each sample, in `order`, goes to the fullest open row with room for it. Returns its row, [N].

    Costs O(N log OPEN_ROWS). Sorting by length would fill rows a little better, but put all long samples together.
    """
    row_of = np.empty(len(lengths), np.int64)
    space, rows = [], 0  # space: sorted pairs (room left, row) of the open rows
    for sample in order:
        need = int(lengths[sample])
        at = bisect_left(space, (need, -1))  # the least room that is enough
        if at < len(space):
            room, row = space.pop(at)
        else:
            room, row = max_seq_len, rows
            rows += 1
        row_of[sample] = row
        if room > need:
            insort(space, (room - need, row))
        if len(space) > OPEN_ROWS:
            space.pop(0)  # the fullest row is the least likely to be used again
    return row_of


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad to (ids int64 [B,T], lengths int64 [B]). T is rounded up to a multiple, so that there are few different
    shapes: on a CPU a product in bf16 is a program of its own for each, which takes milliseconds to make."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)  # [B]
    width = -(-max(map(len, rows), default=0) // multiple) * multiple  # -(-a // b) rounds up
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)  # [B,T]
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(np.array(row, dtype=np.int64))
    return ids, lengths


def pack_batch(batch, device):
    """Lay the rows of a preference batch end to end, several to a row, so that short answers do not pay for long ones.

    Returns: ids, mask and documents (which row of the batch a token is from, -1 on padding), all [R, T] with R <= 2B,
        and ends [2B], where the last token of each row went to in [R * T]; on the device.
    """
    lengths, width = batch["lengths"], batch["ids"].shape[1]
    # the longest first: the short ones fill what they leave
    row_of = pack(lengths.numpy(), np.argsort(-lengths.numpy(), kind="stable"), width)
    filled = np.zeros(row_of.max() + 1, np.int64)                               # [R]
    first = torch.empty_like(lengths)                                           # [2B], where a row begins in [R * T]
    for source, row in enumerate(row_of):
        first[source] = int(row * width + filled[row])
        filled[row] += int(lengths[source])
    real = torch.arange(width) < lengths[:, None]                               # [2B, T]
    place = (first[:, None] + torch.arange(width))[real]                        # [tokens]
    ids = torch.zeros(len(filled) * width, dtype=torch.int64)                   # padding is masked: any id will do
    mask, documents = torch.zeros(len(ids)), torch.full_like(ids, -1)
    ids[place], mask[place] = batch["ids"][real], batch["mask"][real]
    documents[place] = torch.arange(len(lengths))[:, None].expand(-1, width)[real]
    tables = [x.view(-1, width).to(device, non_blocking=True) for x in (ids, mask, documents)]
    return *tables, (first + lengths - 1).to(device)


def micro_batches(rollout, rows, size):
    """Split answers into micro-batches of like length, so that little padding is computed.

    Yields: (list of at most `size` rows, slice of the T-1 targets that holds all of their answer tokens). Logits are
        made for these columns only: prompts need none, and V logits cost more than a token of a small model.
    """
    rows = sorted(rows, key=lambda i: int(rollout["lengths"][i]))
    for at in range(0, len(rows), size):
        chunk = rows[at:at + size]
        yield chunk, slice(int(rollout["starts"][chunk].min()) - 1, int(rollout["lengths"][chunk].max()) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# 2. What the data sets share: the store, the counts, the order


def _chunks(rows: Iterable[tuple[dict, str, int]]) -> Iterator[list[tuple[dict, str]]]:
    """Lists of (row, where) that hold about CHUNK_BYTES of text each."""
    chunk, total = [], 0
    for row, where, size in rows:
        chunk.append((row, where))
        total += size
        if total >= CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def _ordered_map(function: Callable, items: Iterable, workers: int) -> Iterator:
    """map() in some threads, with results in order and few items in flight.

    Threads, not processes: tiktoken and the Rust encoder release the interpreter lock, nothing has to be pickled, and
    small data pay no start-up.
    """
    if workers < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            # Without a bound the reader would run ahead and hold the whole file in memory.
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Dropped(Exception):  # noqa: N818 - not an error: the sample is counted under this reason
    """Raised by encode() for a sample that cannot be used; `needed` is the max_seq_len that would keep it, or 0."""

    def __init__(self, reason: str, needed: int = 0):
        super().__init__(reason)
        self.needed = needed


class TokenData:
    """Base class: opens the token store (and builds it first where needed) and maps positions to samples.

    paths, skip_bad    see rows.read_rows; skip_bad also skips rows with wrong keys
    tokenizer          an object with encode_batch, render, token_bytes, special_ids, vocab_size, bos_id, pad_id,
                       eos_id, fingerprint
    max_seq_len        T, tokens in a row; for PromptData the longest prompt
    part, val_ratio    "all" rows, or the "train" or "val" side of split_heldout with that ratio
    workers            tokenising threads, 0 = none
    min_samples        samples that one optimizer step takes; fewer than that in the data is an error
    is_main, barrier   with several processes: who builds, and the call in which the others wait for it
    Raises ValueError and FileNotFoundError for what a user can cause. `stats` holds the counts, summary() one line,
    `fingerprint` names the content.
    """

    kind = ""  # in messages and file names
    unit = ""  # what an index counts
    columns = {}  # name of each Ragged -> dtype of its items, None = the smallest that holds the vocabulary
    fits_length = True  # whether the stored arrays depend on max_seq_len

    def __init__(self, paths, tokenizer, max_seq_len: int, cache_dir="out/cache", seed: int = 42, part: str = "all",
                 val_ratio: float = 0.0, skip_bad: bool = False, workers: int = 0, min_samples: int = 1,
                 is_main: bool = True, barrier: Callable[[], None] | None = None):
        if max_seq_len < 2:
            raise ValueError(f"max_seq_len {max_seq_len}; a row holds at least 2 tokens; give --max_seq_len 128")
        if part not in ("all", "train", "val") or not 0 <= val_ratio < 1 or (part == "val" and not val_ratio):
            raise ValueError(f"part {part!r} with val_ratio {val_ratio}; part is all, train or val, val_ratio lies "
                             "in [0, 1) and val needs one; give --val_ratio 0.01, or a file of its own with --val_path")
        self.paths = expand_paths(paths)
        if not self.paths:
            raise ValueError(f"no {self.kind} data files; at least one is needed; give --data_path FILE")
        self.tokenizer, self.max_seq_len, self.seed, self.workers = tokenizer, max_seq_len, seed, workers
        self.part, self.val_ratio, self.skip_bad = part, val_ratio, bool(skip_bad)
        self.cache_dir = Path(cache_dir)
        self.token_dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self._orders = {}  # epoch -> permutation
        # One process builds. The others come to the barrier at once, and find store and hashes ready behind it.
        if is_main:
            self._ensure_store()
        if barrier is not None:
            barrier()
        facts = self._facts(record=False)
        self.stats = self._open_store(facts)
        # names contents, tokenizer and row length, but not the order: equal for every seed
        self.fingerprint = self._base(facts | {"max_seq_len": max_seq_len})
        self.prepare()
        if len(self) < min_samples:
            raise ValueError(self._too_few(min_samples))

    # -- what a data set defines ---------------------------------------------------------------------------------------

    def parse(self, row: dict, where: str) -> tuple[str, object]:
        """(text that decides the held-out split, checked sample). Raises ValueError for a row of another format."""
        raise NotImplementedError

    def encode(self, sample: object, row: dict, counts: Counter) -> dict[str, Sequence[int]]:
        """One piece for every column. Raises Dropped. Runs in a thread: it may change `counts`, not self."""
        raise NotImplementedError

    def collect(self, samples: list[dict], counts: Counter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The samples of a chunk -> (items, lengths) of every column."""
        return {name: flatten([sample[name] for sample in samples]) for name in self.columns}

    def prepare(self) -> None:
        """Called when the columns are open."""

    # -- order ---------------------------------------------------------------------------------------------------------

    def __len__(self):
        return len(getattr(self, next(iter(self.columns))))

    def order(self, position: int) -> int:
        """Sample index at a position (samples since the start of training). O(1), after one shuffle an epoch."""
        epoch, i = divmod(position, len(self))
        if epoch not in self._orders:
            # A batch touches two neighbouring epochs at most; older orders are forgotten.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = shuffled(len(self), self.seed, epoch)
        return int(self._orders[epoch][i])

    def position_batch(self, start: int, count: int) -> np.ndarray:
        """Indices at positions start..start+count-1 of the endless order, int64 [count].

        Rank r of R asks for (position + r * B, B) and all go on by R * B: the order is the same for every R.
        """
        return np.array([self.order(position) for position in range(start, start + count)], dtype=np.int64)

    def samples(self, position: int) -> list[tuple[str, list[int], list[int]]]:
        """The two samples at a position of the order as (title, ids, mask), without padding; mask 1 on target tokens.
        A pair gives two entries, a packed row its first conversation."""
        indices = self.position_batch(position, min(2, len(self))).tolist()
        return [(f"{self.kind} sample {index}{name}", list(ids), list(mask))
                for index in indices for name, ids, mask in self._shown(index)]

    def _shown(self, index: int) -> list[tuple[str, Sequence[int], Sequence[int]]]:
        """(name, ids, mask) of each sequence of a sample."""
        raise NotImplementedError

    # -- store ---------------------------------------------------------------------------------------------------------

    def _facts(self, record: bool) -> dict:
        """All that the stored arrays depend on. With `record`, file hashes are remembered for the next start."""
        register = self.cache_dir / "files.json"
        before = read_object(register)
        known = dict(before)
        hashes = [content_hash(path, known) for path in self.paths]
        if record and known != before:
            write_json(register, known)
        length = self.max_seq_len if self.fits_length else None
        # Contents, not names: a file that moved is the same data, a file that was edited is not. The seed is missing on
        # purpose, the order is made anew at every start.
        return {"format": FORMAT_VERSION, "kind": self.kind, "data": hashes, "tokenizer": self.tokenizer.fingerprint,
                "dtype": self.token_dtype.__name__, "max_seq_len": length, "part": self.part,
                "val_ratio": self.val_ratio, "skip_bad": self.skip_bad, **self._unusual()}

    def _unusual(self) -> dict:
        """Facts that neither contents nor the tokenizer's fingerprint tell. Those of our own data and tokenizers are
        left out: the names of their stores are known to reference curves (assets/curves)."""
        tok, found = self.tokenizer, {}
        formats, controls = [row_format(path) for path in self.paths], [tok.bos_id, tok.eos_id, tok.pad_id]
        if set(formats) != {".jsonl"}:
            found["formats"] = formats
        # which tokens part documents is said by tokenizer_config.json alone
        if [None if i is None else tok.token_bytes[i] for i in controls] != [b"<|bos|>", b"<|im_end|>", b"<|pad|>"]:
            found["bos, eos, pad"] = controls
        return found

    def _base(self, facts: dict) -> str:
        """Name of the store: its files are <base>.<column>.bin, <base>.<column>_lengths.bin and <base>.json."""
        return f"{self.kind}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"

    def _open_store(self, facts: dict) -> dict:
        """Set one Ragged attribute a column; returns the statistics. Raises OSError, ValueError if it is not whole."""
        base = self._base(facts)
        # The JSON is written last, so it vouches for all arrays together.
        record = json.loads((self.cache_dir / f"{base}.json").read_text(encoding="utf-8"))
        for name in self.columns:
            items, lengths = (open_array(self.cache_dir / f"{base}.{part}.bin", record["counts"][part])
                              for part in (name, f"{name}_lengths"))
            setattr(self, name, Ragged(items, lengths))
        return record["stats"]

    def _ensure_store(self) -> None:
        """Build the store unless a whole one is there; say why an earlier one does not serve. An error of the cache
        names its remedy, one of the data files stays as it is."""
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            facts = self._facts(record=True)
            name = self.cache_dir / self._base(facts)
            # The facts are in the name, so another tokenizer or setting means another store, not a wrong one.
            if Path(f"{name}.json").exists():
                try:
                    self._open_store(facts)
                    return
                except (OSError, ValueError, KeyError, TypeError) as error:
                    print(f"cache {name} is damaged ({error}): rebuilding", flush=True)
            else:
                self._explain(facts)
            self._build(facts)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(f"the disk is full while writing the token cache in {self.cache_dir}; it takes up to "
                              "twice the size of the data files; free space, or choose another disk with "
                              "--cache_dir") from None
            if Path(str(error.filename)).is_relative_to(self.cache_dir):
                raise OSError(f"--cache_dir {self.cache_dir}: {error.strerror}; tokens of the data are written there; "
                              "name another folder") from None
            raise

    def _explain(self, facts: dict) -> None:
        """Print in what the newest earlier store of the same files and part differs."""
        stores = sorted(self.cache_dir.glob(f"{self.kind}-*.json"), key=lambda path: path.stat().st_mtime_ns)
        records = [(path, read_object(path)) for path in reversed(stores)]
        for path, record in records:
            old = record.get("facts", {})
            if record.get("paths") == self._sources() and old.get("part") == self.part:
                changed = [f"{key} {old.get(key, 'as usual')}, now {facts.get(key, 'as usual')}"
                           for key in {**facts, **old} if facts.get(key) != old.get(key)]
                print(f"cache {path.with_suffix('')} was built with {'; '.join(changed)}: rebuilding", flush=True)
                return

    def _sources(self) -> list[str]:
        return [str(path.resolve()) for path in self.paths]

    def _build(self, facts: dict) -> None:
        """Stream all rows through _convert into the arrays; the JSON with counts and statistics comes last."""
        base, bad, counts, shortest = self._base(facts), [], Counter(), 0
        remove_orphans(self.cache_dir, base)
        files = {}
        try:
            for name, dtype in self.columns.items():
                files[name] = ArrayFile(self.cache_dir / f"{base}.{name}.bin", dtype or self.token_dtype)
                files[f"{name}_lengths"] = ArrayFile(self.cache_dir / f"{base}.{name}_lengths.bin", np.int32)
            chunks = _chunks(scan(self.paths, self.skip_bad, bad))
            for pieces, new, needed in _ordered_map(self._convert, chunks, self.workers):
                counts.update(new)
                shortest = min(shortest or needed, needed or shortest)
                for name, (items, lengths) in pieces.items():
                    files[name].append(items)
                    files[f"{name}_lengths"].append(lengths)
            counts["bad"] += len(bad)
            if counts["bad"]:
                print(f"skipped {counts['bad']} bad lines; the first: {bad[0] if bad else 'wrong keys'}", flush=True)
            # Before commit(): an empty store is never kept, so the error stays the same at the next start.
            if not counts["used"]:
                raise ValueError(self._nothing_left(counts, shortest))
            for file in files.values():
                file.commit()
        finally:
            for file in files.values():
                file.discard()
        sizes = {name: file.count for name, file in files.items()}
        record = {"facts": facts, "paths": self._sources(), "counts": sizes, "stats": self._structured(counts)}
        write_json(self.cache_dir / f"{base}.json", record)

    def _convert(self, rows: list[tuple[dict, str]]) -> tuple[dict, Counter, int]:
        """A chunk of rows -> ((items, lengths) of every column, counts, smallest max_seq_len that would help or 0)."""
        counts, samples, needed = Counter(), [], []
        for row, where in rows:
            try:
                key, sample = self.parse(row, where)
                if self.part != "all" and split_heldout(key, self.val_ratio) != (self.part == "val"):
                    counts["held_back"] += 1
                    continue
                samples.append(self.encode(sample, row, counts))
            except Dropped as reason:
                counts[f"reasons:{reason}"] += 1
                needed += [reason.needed] if reason.needed else []  # for the message, should nothing be left
            except ValueError as error:
                if not self.skip_bad:
                    # What the tokenizer refuses (an unknown role) does not know the line yet.
                    place = "" if str(error).startswith(where) else f"{where}: "
                    raise ValueError(f"{place}{error}; or skip such rows with --skip_bad 1") from None
                counts["bad"] += 1
        counts["used"] = len(samples)
        # Counts come back with the pieces instead of being added here: several threads run this method.
        return self.collect(samples, counts), counts, min(needed, default=0)

    @staticmethod
    def _structured(counts: Counter) -> dict:
        """Flat counts such as "roles:user" -> the statistics dict."""
        stats = {"samples": 0, "used": 0, "truncated": 0, "dropped": 0, "bad": 0, "held_back": 0, "reasons": {}}
        for key, value in sorted(counts.items()):
            group, _, name = key.partition(":")
            if name:
                stats.setdefault(group, {})[name] = value
            else:
                stats[key] = value
        # Summed from the reasons, so that the line printed always adds up: samples = used + dropped.
        stats["dropped"] = sum(stats["reasons"].values())
        stats["samples"] = stats["used"] + stats["dropped"]
        return stats

    def _nothing_left(self, counts: Counter, shortest: int) -> str:
        """The message where no sample is usable: how many were lost to what, and the smallest setting that works."""
        s = self._structured(counts)
        lost = {**s["reasons"], f"not in part {self.part}": s["held_back"], "bad lines": s["bad"]}
        lost = ", ".join(f"{count} {reason}" for reason, count in lost.items() if count)
        fix = "check the rows, or give other files with --data_path"
        if shortest:
            fix = f"the smallest setting that works is {shortest} (--max_seq_len, or the prompt limit)"
        elif s["held_back"] and not s["samples"]:
            fix = "use more rows, another --val_ratio, or a file of its own with --val_path"
        read = s["samples"] + s["held_back"] + s["bad"]
        return (f"no usable {self.kind} sample among {read} rows of {', '.join(map(str, self.paths))}"
                f"{f' ({lost})' if lost else ': empty'}; at least one is needed; {fix}")

    def _too_few(self, wanted: int) -> str:
        """The message where the data do not fill one step."""
        return (f"{self.kind} data hold {len(self)} {self.unit} of up to {self.max_seq_len} tokens, one step takes "
                f"{wanted}; a step must not see a sample twice; use more data, or choose --batch_size so that batch "
                f"size x accumulation steps x processes is at most {len(self)}")

    def summary(self) -> str:
        """The counts in one line, to be printed at the start of a run."""
        s = self.stats
        reasons = ", ".join(f"{count} {reason}" for reason, count in s["reasons"].items())
        return (f"{self.kind} data ({self.part}): {s['samples']} samples: {s['used']} used, {s['truncated']} truncated,"
                f" {s['dropped']} dropped{reasons and f' ({reasons})'}, {s['bad']} bad lines | {self._details()}")

    def _details(self) -> str:
        """What the summary says beyond the counts."""
        return f"up to {self.max_seq_len} tokens"


# ---------------------------------------------------------------------------------------------------------------------
# 3. The four data sets


class PretrainData(TokenData):
    """Documents as one stream <bos> text <bos> text ..., in windows of T tokens with stride T - 1.

    The first token of a window is context only: it was the last target of the window before. So every token but the
    first of the stream is a target exactly once an epoch; the last window is padded. stats adds tokens, bytes, windows.
    """

    kind = "pretrain"
    unit = "windows"
    columns = {"tokens": None}
    fits_length = False  # the stream is the same for all window lengths

    def parse(self, row, where):
        text = document(row, where)
        return text, text

    def encode(self, sample, row, counts):
        if not sample.strip():
            raise Dropped("empty")
        return sample  # encoded in collect(): one call for many texts is several times faster

    def collect(self, samples, counts):
        ids, offsets = self.tokenizer.encode_batch(samples)
        # Foreign tokenizers without <bos> (Qwen's) part documents with their end token.
        first = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        tokens = np.insert(np.asarray(ids, self.token_dtype), offsets[:-1], first)
        counts.update(tokens=len(tokens), bytes=int(self.byte_lengths[tokens].sum()))
        return {"tokens": (tokens, np.diff(offsets) + 1)}  # + 1: the <bos> of each document

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int64 [V]. Special tokens have none: <bos> costs bits, not bytes."""
        lengths = np.zeros(self.tokenizer.vocab_size, np.int64)
        for token, spelling in enumerate(self.tokenizer.token_bytes):
            lengths[token] = 0 if token in self.tokenizer.special_ids else len(spelling)
        return lengths

    def prepare(self):
        self.stats["windows"] = len(self)
        self.bytes_per_token = self.stats["bytes"] / self.stats["tokens"]

    def __len__(self):
        return -(-(len(self.tokens.items) - 1) // (self.max_seq_len - 1))  # targets / targets a window, rounded up

    def of_length(self, max_seq_len: int) -> "PretrainData":
        """The same stream in windows of another length and in an order of their own; nothing is read again."""
        other = copy.copy(self)
        other.max_seq_len, other._orders = max(2, max_seq_len), {}
        return other

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """ids int64 [B,T]; mask float [B,T], 1 on targets; bytes int64 [B], the text bytes of each window's targets.

        Sum of nll / ln 2 / sum of bytes is exact bits per byte (nll includes the <bos> that ends a document).
        """
        indices = list(indices)
        ids = np.full((len(indices), self.max_seq_len), self.tokenizer.pad_id, np.int64)  # [B,T]
        mask = np.zeros(ids.shape, np.float32)  # [B,T]
        for i, index in enumerate(indices):
            start = range(len(self))[index] * (self.max_seq_len - 1)  # range() refuses an index outside the data
            piece = self.tokens.items[start : start + self.max_seq_len]  # [T], the last window may be shorter
            ids[i, : len(piece)] = piece
            mask[i, 1 : len(piece)] = 1
        size = (self.byte_lengths[ids] * (mask > 0)).sum(axis=1)  # [B]
        return {"ids": torch.from_numpy(ids), "mask": torch.from_numpy(mask), "bytes": torch.from_numpy(size)}

    def _shown(self, index):
        piece = self.tokens.items[index * (self.max_seq_len - 1) :][: self.max_seq_len]
        return [("", piece.tolist(), [0] + [1] * (len(piece) - 1))]

    def _too_few(self, wanted):
        length = (len(self.tokens.items) - 1) // wanted + 1  # the longest windows of which there are enough
        shorter = f", or --max_seq_len {length}" if length > 1 else ""
        return f"{super()._too_few(wanted)}{shorter}"

    def _details(self):
        return (f"{self.stats['tokens']} tokens, {self.bytes_per_token:.2f} bytes a token, "
                f"{self.stats['windows']} windows of {self.max_seq_len}")


class SFTData(TokenData):
    """Conversations, rendered with their loss mask and packed into rows of T tokens. An index is a row.

    A conversation longer than T is cut at its end if an answer token remains (no end token is invented), else dropped.
    The seed fixes which samples share a row, (seed, epoch) the order of rows.
    stats adds roles, tokens, trained_tokens, trained_share, rows, fill.
    """

    kind = "sft"
    unit = "packed rows"
    columns = {"tokens": None, "trained": np.uint8}

    def parse(self, row, where):
        turns = conversation(row, where)
        return first_question(turns), turns

    def encode(self, sample, row, counts):
        ids, mask = self.tokenizer.render(sample)
        mask = [0, *mask[1:]]  # nothing stands before the first token that could predict it
        if 1 not in mask:
            raise Dropped("without an answer")
        if 1 not in mask[: self.max_seq_len]:
            raise Dropped(f"no answer token within {self.max_seq_len}", needed=mask.index(1) + 1)
        # Cut at the end: the beginning of an answer is a good target, a conversation without its beginning is not.
        counts["truncated"] += len(ids) > self.max_seq_len
        ids, mask = ids[: self.max_seq_len], mask[: self.max_seq_len]
        counts.update(f"roles:{turn['role']}" for turn in sample)
        counts.update(tokens=len(ids), trained_tokens=sum(mask))
        return {"tokens": ids, "trained": mask}

    def prepare(self):
        count = len(self.tokens)
        # Shuffled before packing: files are often sorted by skill, rows should not be. No real epoch is -1.
        order = shuffled(count, self.seed, -1)
        row_of = pack(self.tokens.lengths, order, self.max_seq_len)  # [N]
        members = order[np.argsort(row_of[order], kind="stable")]  # samples, row by row
        self.rows = Ragged(members, np.bincount(row_of))  # row -> its samples
        s = self.stats
        s["rows"], s["fill"] = len(self), s["tokens"] / (len(self) * self.max_seq_len)
        s["trained_share"] = s["trained_tokens"] / s["tokens"]

    def __len__(self):
        return len(self.rows)

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """ids int64 [B,T]; mask float [B,T], 1 on trained targets; documents int64 [B,T], sample in the row, -1 pad."""
        indices = list(indices)
        ids = np.full((len(indices), self.max_seq_len), self.tokenizer.pad_id, np.int64)  # [B,T]
        mask = np.zeros(ids.shape, np.float32)  # [B,T]
        documents = np.full(ids.shape, -1, np.int64)  # [B,T]
        for i, index in enumerate(indices):
            at = 0
            for number, sample in enumerate(self.rows[range(len(self))[index]]):
                end = at + len(self.tokens[sample])
                ids[i, at:end] = self.tokens[sample]
                mask[i, at:end] = self.trained[sample]
                documents[i, at:end] = number
                at = end
        return {"ids": torch.from_numpy(ids), "mask": torch.from_numpy(mask), "documents": torch.from_numpy(documents)}

    def _shown(self, index):
        sample = self.rows[index][0]
        return [(f", first of {len(self.rows[index])} in its row", self.tokens[sample].tolist(), self.trained[sample])]

    def _details(self):
        s = self.stats
        roles = " ".join(f"{name} {count}" for name, count in s["roles"].items())
        return (f"turns: {roles} | {s['trained_share']:.1%} of {s['tokens']} tokens trained, {s['rows']} rows of "
                f"{self.max_seq_len}, {s['fill']:.1%} full")


def join_windows(batch: dict, windows: dict) -> dict:
    """SFTData's batch [B,T] with the windows of a PretrainData batch [R,T] below it, as a batch [B+R,T].

    A window is one document: all of its tokens see those before them, as they did in pretraining.
    """
    real = windows["mask"] > 0  # [R,T]
    real[:, 0] = True  # context of the first target
    below = {"ids": windows["ids"], "mask": windows["mask"], "documents": torch.where(real, 0, -1)}
    return {name: torch.cat([batch[name], rows]) for name, rows in below.items()}


class PreferenceData(TokenData):
    """Pairs of a chosen and a rejected answer to one prompt. An index is a pair. stats adds kinds.

    Dropped and counted: equal answers, empty answers, pairs that do not fit. Where a pair is too long, the prompt first
    loses whole turns from its start, then the completions are cut at their end.
    """

    kind = "preference"
    unit = "pairs"
    columns = {"chosen": None, "rejected": None, "prompt_length": np.int32, "name": np.uint8}

    def parse(self, row, where):
        pair = preference(row, where)
        return first_question(pair[0]), pair

    def encode(self, sample, row, counts):
        prompt, *answers = sample
        if not all(answer["content"].strip() for answer in answers):
            raise Dropped("with an empty answer")
        head, tails, cut = self._fit(prompt, answers)
        if not all(tails):
            raise Dropped("without room for an answer", needed=len(head) + 1)
        if tails[0] == tails[1]:  # such a pair has no gradient in any preference loss, and drags the accuracy down
            raise Dropped("with equal answers after the cut" if cut else "with equal answers")
        name = str(row.get("kind") or "all")
        counts.update([f"kinds:{name}"])
        counts["truncated"] += cut
        return {"chosen": head + tails[0], "rejected": head + tails[1], "prompt_length": [len(head)],
                "name": list(name.encode())}

    def _fit(self, prompt: list[dict], answers: list[dict]) -> tuple[list[int], list[list[int]], bool]:
        """(prompt ids, ids of both completions, whether anything was cut away)."""
        cut = False
        while True:
            head = self.tokenizer.render(prompt, add_generation_prompt=True)[0]
            tails = [self._completion(prompt, answer, len(head)) for answer in answers]
            room = max(0, self.max_seq_len - len(head))
            if max(map(len, tails)) <= room:
                return head, tails, cut
            cut = True
            system = prompt[:1] if prompt[0]["role"] == "system" else []
            turns = prompt[len(system) :]
            # What is left begins with a user turn again, and the last question always stays.
            later = [i for i, turn in enumerate(turns) if i and turn["role"] == "user"]
            if not later:
                return head, [tail[:room] for tail in tails], cut
            prompt = system + turns[later[0] :]

    def _completion(self, prompt: list[dict], answer: dict, start: int) -> list[int]:
        """Ids of an answer with its end token, which begin at `start` of the rendered conversation.

        Without the line break behind the end token: nobody ever samples it, and the reward model must score the same
        last token here as in PPO.
        """
        ids, mask = self.tokenizer.render([*prompt, answer])
        return ids[start : len(mask) - mask[::-1].index(1)]

    def batch(self, indices: Iterable[int]) -> dict:
        """Chosen rows, then rejected rows: ids int64 [2B,T] padded on the right, mask float [2B,T] (the completion with
        its end token), lengths int64 [2B], kind list of B strings."""
        pairs = [range(len(self))[index] for index in indices]
        rows = [side[pair] for side in (self.chosen, self.rejected) for pair in pairs]
        # Not much wider than needed: most pairs are far shorter than max_seq_len.
        ids, lengths = pad_rows(rows, self.tokenizer.pad_id, 32)  # [2B,T], [2B]
        prompts = torch.tensor([int(self.prompt_length[pair][0]) for pair in pairs] * 2)  # [2B]
        column = torch.arange(ids.shape[1])  # [T]
        mask = ((column >= prompts[:, None]) & (column < lengths[:, None])).float()  # [2B,T]
        kinds = [self.name[pair].tobytes().decode() for pair in pairs]
        return {"ids": ids, "mask": mask, "lengths": lengths, "kind": kinds}

    def _shown(self, index):
        start = int(self.prompt_length[index][0])
        return [(name, ids.tolist(), [0] * start + [1] * (len(ids) - start))
                for name, ids in ((", chosen", self.chosen[index]), (", rejected", self.rejected[index]))]

    def _details(self):
        kinds = " ".join(f"{name} {count}" for name, count in self.stats["kinds"].items())
        return f"kinds: {kinds} | up to {self.max_seq_len} tokens"


class PromptData(TokenData, Sequence):
    """Prompts, with what a checker needs. max_seq_len is the longest prompt: half a question has another answer, so
    longer ones are dropped. A final assistant turn (SFT rows, or an empty one) is taken off first; of a preference row
    the prompt is taken.

    data.items[i] -> dict(ids, messages, answer, check, lang, skill, index), read from disk when asked for; the ids end
    with the generation prompt. Missing fields are None.
    """

    kind = "prompt"
    unit = "prompts"
    columns = {"tokens": None, "facts": np.uint8}

    def parse(self, row, where):
        turns = preference(row, where)[0] if row.get("chosen") is not None else conversation(row, where)
        return first_question(turns), turns[:-1] if turns[-1]["role"] == "assistant" else turns

    def encode(self, sample, row, counts):
        if not sample or sample[-1]["role"] == "assistant":
            raise Dropped("without a question")
        ids = self.tokenizer.render(sample, add_generation_prompt=True)[0]
        if len(ids) > self.max_seq_len:
            raise Dropped(f"longer than {self.max_seq_len} tokens", needed=len(ids))
        facts = {"messages": sample} | {key: row.get(key) for key in ("answer", "check", "lang", "skill")}
        # As JSON bytes in the store, because a million Python dicts would be memory that grows with the file. ASCII
        # escapes (the default) carry lone surrogates, which UTF-8 would refuse.
        return {"tokens": ids, "facts": list(json.dumps(facts).encode())}

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        return {"ids": self.tokens[index].tolist(), **json.loads(self.facts[index].tobytes()), "index": index}

    def _shown(self, index):
        ids = self.tokens[index].tolist()
        return [(", the answer is sampled behind it", ids, [0] * len(ids))]

    @property
    def items(self) -> Sequence:
        """The prompts as a read-only sequence of dicts."""
        return self
