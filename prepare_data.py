"""Prepare data of one's own: mix sources, look at a file, fetch public sets, write tensors for other programs.

    mix       sources by category -> {pretrain,sft,preference,rl}.{train,heldout}.jsonl, which the scripts train on;
              without duplicates, and without the items of evaluation files
    inspect   lengths, languages, duplicates, samples and the trained share of any file that the scripts can read
    download  public sets by name, from several mirrors, resumed and checked
    export    input_ids, labels and loss_mask as .npz or .pt; or the rows themselves as .jsonl

How mix works. It reads everything twice. The first pass filters the rows and keeps thirteen numbers of each: a hash of
its text, one of its question, and eleven of its MinHash signature. They wait on the disk, and one column at a time
comes into memory, which so does not grow with the text. Then rows are chosen by hash, so that a second run picks the
same ones, and the second pass writes them.

How near duplicates are found. Two texts are as alike as their sets of five-character pieces (Jaccard similarity s).
MinHash: hash all pieces, and keep the smallest hash in each of 11 ranges; two texts have the same minimum in a range
with probability s. That is done with 11 hash functions, and texts with the same 11 minima for one of them count as
duplicates. It happens with probability 1 - (1 - s^11)^11: 2% at s = 0.55, 63% at 0.8, 98% at 0.9. The first text stays.

How evaluation items are found. Whoever shares 13 words in a row with a question of a benchmark has copied it or its
source: that is the rule of GPT-3 and of the tool with which lm-evaluation-harness cleans training data. Chinese has no
spaces; 20 characters take the place of 13 words. Shorter items are looked for as a whole. The runs of all items wait in
memory as sorted hashes (75 MB for all benchmarks that eval.py knows), and every row is looked up as it passes.

What this file does not do: clean text (it drops rows, it does not change them), or tell languages of one script apart.
Papers: Broder 1997 (MinHash), Li, Owen and Zhang 2012 (one permutation), Shrivastava and Li 2014 (empty ranges), Brown
et al. 2020 (GPT-3, appendix C: shared runs of words).

    python prepare_data.py mix --config mix.json --output out/data
    python prepare_data.py inspect my/chats.jsonl --tokenizer out/tokenizer
    python prepare_data.py download tinystories
    python prepare_data.py export --stage sft --data_path out/data/sft.train.jsonl --tokenizer out/tokenizer
"""
import contextlib
import errno
import functools
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import tempfile
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import cli
import common
import logs
from dataset import (
    PreferenceData,
    PretrainData,
    SFTData,
    conversation,
    document_hash,
    expand_paths,
    first_question,
    preference,
    read_rows,
)
from tokenizer import ROLES, Tokenizer

STAGES = ("pretrain", "sft", "preference", "rl")
# fields beside the text that the scripts and scores know
KEPT = ("answer", "check", "lang", "skill", "kind")
# Rows wanted of a category that the config does not set: a chat model's diet, with little of what is learnt quickly
TARGETS = {"general": {"count": 460_000}, "knowledge": {"count": 100_000}, "math": {"count": 8_000},
           "identity": {"count": 2_000, "max_repeat": 2}, "preference": {"count": 60_000}}
SHINGLE = 5        # characters of a piece: about a word of English, a phrase of Chinese
BANDS = 11         # hash functions of a signature, and minima of each
NEAR_LENGTH = 200  # shorter texts are compared exactly: "2 + 3?" and "2 + 4?" are near, and not the same
ODD = np.uint64(0x9E3779B97F4A7C15)
WORD_RUN = 13      # words in a row that only a copy has in common with an evaluation item (GPT-3, appendix C)
HAN_RUN = 20       # the same in Han characters: words of running Chinese have about 1.5 characters
WORD_WHOLE, HAN_WHOLE = 8, 12  # items below a run are found whole, down to GPT-3's shortest run; Han again times 1.5
UNITS = re.compile("[\u3400-\u9fff]|[^\\W_\u3400-\u9fff]+")  # a Han character, or a word of other letters and digits
# what rows of public benchmarks ask or show; their answers are too short to be told from other text
ASKED = ("question", "Question", "query", "ctx", "context", "context_options", "passage", "sentence", "goal", "sol1",
         "sol2", "problem", "prompt", "instruction")
EXAMPLE = ('{"sources": [{"name": "chats", "category": "general", "path": "my/*.jsonl"}], '
           '"targets": {"general": {"count": 10000}}}')


# ---------------------------------------------------------------------------------------------------------------------
# 1. Rows


def rename(row, mapping, where):
    """The row with the columns that `mapping` {our field: column} names under our names; the others stay as they are.
    Raises ValueError for a column that is not there."""
    missing = [column for column in mapping.values() if column not in row]
    if missing:
        raise ValueError(f"{where}: found the keys [{', '.join(map(str, row))}]; the map wants {', '.join(missing)}; "
                         "write the map as field=column with columns of the file")
    taken = set(mapping.values())
    return {**{key: value for key, value in row.items() if key not in taken},
            **{name: row[column] for name, column in mapping.items()}}


def _turn(turn, where):
    """A turn with the fields that training reads. Raises ValueError for a role that the tokenizer refuses."""
    if turn["role"] not in ROLES:
        raise ValueError(f"{where}: found the role {turn['role']!r}; expected one of {', '.join(ROLES)}; rename it")
    kept = {"role": turn["role"], "content": turn["content"]}
    return kept | ({"reasoning_content": turn["reasoning_content"]} if turn.get("reasoning_content") else {})


def standard_row(row, where="row"):
    """(stage, row in the form of that stage, reason to leave it out or ""): its keys decide which stage it is for.

    chosen and rejected: preference; text: pretrain; turns that end with an answer: sft, without one: rl. Raises
    ValueError for a row of no known shape.
    """
    kept = {key: row[key] for key in KEPT if row.get(key) is not None}
    if row.get("chosen") is not None:
        prompt, *sides = preference(row, where)
        prompt, sides = [_turn(turn, where) for turn in prompt], [_turn(turn, where) for turn in sides]
        texts = [turn["content"] if len(turn) == 2 else [turn] for turn in sides]
        reason = "empty" if not all(turn["content"].strip() for turn in sides) else (
            "equal answers" if texts[0] == texts[1] else "")
        said = prompt[0]["content"] if [turn["role"] for turn in prompt] == ["user"] else prompt
        return "preference", {"prompt": said, "chosen": texts[0], "rejected": texts[1], **kept}, reason
    if isinstance(row.get("text"), str):
        return "pretrain", {"text": row["text"], **kept}, "" if row["text"].strip() else "empty"
    turns = conversation(row, where)
    tools = any(turn.get("tool_calls") for turn in turns)  # the tokenizer does not render them
    turns = [_turn(turn, where) for turn in turns]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()  # prompts for reinforcement learning often come with an empty answer
    reason = "tool calls" if tools else "" if any(turn["content"].strip() for turn in turns) else "empty"
    stage = "sft" if turns and turns[-1]["role"] == "assistant" else "rl"
    return stage, {"conversations": turns, **kept}, reason


def turns_of(row):
    """Lists of turns of a standard row: one conversation, or those with the chosen and with the rejected answer."""
    if "conversations" in row:
        return [row["conversations"]]
    prompt, chosen, rejected = preference(row)
    return [[*prompt, chosen], [*prompt, rejected]]


def text_of(row):
    """All text of a standard row: what its length, its language and its likeness to others are taken from."""
    if "text" in row:
        return row["text"]
    (first, *others) = turns_of(row)
    said = [f"{turn['role']}\n{turn['content']}\n{turn.get('reasoning_content', '')}" for turn in first]
    return "\n".join(said + [turns[-1]["content"] for turns in others])


def question_of(row):
    """What decides whether a standard row is held out, as in dataset.py: the document, or the first question."""
    return row["text"] if "text" in row else first_question(turns_of(row)[0])


def parts_of(row):
    """The texts of a standard row one by one: the document, or what every turn says."""
    if "text" in row:
        return [row["text"]]
    return [said for turns in turns_of(row) for turn in turns
            for said in (turn["content"], turn.get("reasoning_content")) if said]


def item_texts(row, where="row"):
    """What must not be trained of a row of an evaluation file: questions and contexts in the layouts of public
    benchmarks, else what question_of() says. Raises ValueError for a row without such a text."""
    if "sentence" in row and "option1" in row:
        return [row["sentence"].replace("_", row[name]) for name in ("option1", "option2")]  # Winogrande's gap, filled
    found = [text for key in ASKED if key in row for text in (row[key] if isinstance(row[key], list) else [row[key]])]
    found = [text.removeprefix("Question: ").removesuffix("\nAnswer:") for text in found if isinstance(text, str)]
    return found or [question_of(standard_row(row, where)[1])]


def language(text):
    """"zh", "en" or "other" by script. zh: a fifth or more of the letters are Han characters, and few are kana. en:
    else, if most letters are Latin, so French counts as en. other: also a text without letters."""
    points = np.frombuffer(text[:20_000].encode("utf-32-le", "surrogatepass"), np.uint32)  # [characters]

    def count(*ranges):
        return sum(int(((points >= first) & (points <= last)).sum()) for first, last in ranges)

    latin = count((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F))
    han, kana = count((0x4E00, 0x9FFF)), count((0x3040, 0x30FF))
    # all other scripts, without general, CJK and full-width punctuation
    letters = latin + count((0x250, 0x1FFF), (0x3040, 0xFDFF), (0xFF21, 0x10FFFF))
    if han and han * 5 >= letters and kana * 20 < letters:
        return "zh"
    return "en" if latin * 2 > letters else "other"


# ---------------------------------------------------------------------------------------------------------------------
# 2. Duplicates


def runs(values, longest):
    """Yield (n, hashes of all runs of n values, uint64 [N - n + 1]) for n = 1 .. longest, as long as there is one."""
    hashes = values
    for n in range(1, min(longest, len(values)) + 1):
        if n > 1:
            hashes = hashes[:-1] * ODD + values[n - 1:]  # wraps around
        yield n, hashes


@functools.lru_cache(maxsize=1)  # of a document it is asked for twice in a row: as a row, and as its question
def signature(text):
    """The MinHash signature of a text as BANDS numbers, uint64 [BANDS]; texts that share one of them are near
    duplicates. None for texts below NEAR_LENGTH."""
    text = " ".join(text.lower().split())
    if len(text) < NEAR_LENGTH:
        return None
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)  # [characters]
    *_, (_, pieces) = runs(points, SHINGLE)                                         # [pieces]
    # every function hashes anew: with one hashing for all 121 minima, many of a short text would be one piece
    salts = ODD * np.arange(1, BANDS + 1, dtype=np.uint64)                          # [BANDS]
    hashes = pieces ^ salts[:, None]                                                # [BANDS, pieces]
    for shift in (32, 29, 32):  # a product leaves the low bits poor, and only even hashes cut into equal ranges
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * ODD
    hashes.sort(axis=1)
    starts = np.arange(BANDS, dtype=np.uint64) * np.uint64(2**64 // BANDS)
    # the smallest hash in a range is the first one behind its start; an empty range borrows from the next
    minima = np.stack([row[np.searchsorted(row, starts) % len(pieces)] for row in hashes])  # [BANDS, BANDS]
    powers = ODD ** np.arange(1, BANDS + 1, dtype=np.uint64)
    return (minima * powers).sum(1, dtype=np.uint64)


class Fingerprints:
    """Numbers of every row, in files of one column each, so that one column at a time has to be in memory.

    Columns: 0 hash of the whole text, 1 hash of the question, 2.. the signature.
    """

    def __init__(self, folder, near=True):
        self.files = [open(Path(folder) / f"{i}.column", "w+b") for i in range(2 + BANDS * near)]
        self.count = 0

    def add(self, stage, row, text):
        """Append a standard row. Rows of different stages are never duplicates of each other."""
        exact = document_hash(f"{stage}\n{text}")
        bands = signature(text) if len(self.files) > 2 else None
        bands = [exact] * BANDS if bands is None else bands + np.uint64(STAGES.index(stage))
        record = np.array([exact, document_hash(question_of(row)), *bands], np.uint64)
        for file, value in zip(self.files, record, strict=False):
            file.write(value.tobytes())
        self.count += 1

    def column(self, i):
        """One column, uint64 [N]."""
        self.files[i].flush()
        self.files[i].seek(0)
        return np.fromfile(self.files[i], np.uint64)

    def duplicates(self):
        """(exact, near), bool [N] each: the row equals one before it; or does not, but is near to one."""
        exact, near = self._repeated(0), np.zeros(self.count, bool)
        for band in range(2, len(self.files)):
            near |= self._repeated(band)
        return exact, near & ~exact

    def _repeated(self, i):
        """True where a value of the column has stood in a row before, bool [N]."""
        values = self.column(i)
        order = np.argsort(values, kind="stable")  # equal values stay in the order of their rows
        repeated = np.zeros(len(values), bool)
        repeated[order[1:]] = values[order[1:]] == values[order[:-1]]
        return repeated

    def close(self):
        """Close the files."""
        for file in self.files:
            file.close()


# ---------------------------------------------------------------------------------------------------------------------
# 3. Contamination


def units(text):
    """The words of a text in small letters, Han characters one by one, without punctuation; full-width letters count as
    plain ones."""
    return UNITS.findall(unicodedata.normalize("NFKC", text).lower())


class Contamination:
    """The texts of evaluation items as hashes, and the search for them in rows: only the items are held in memory.

    A row is contaminated by a run of WORD_RUN words (HAN_RUN Han characters) that stands in an item; by a shorter item
    as a whole, down to WORD_WHOLE words (HAN_WHOLE characters); by a still shorter one where a turn says nothing else;
    or by a question that is a near duplicate of an item (signature()).
    """

    def __init__(self):
        self.places, self.lengths = [], set()  # of the items: where they stand; numbers of units of the runs
        self.hashes, self.owners = array("Q"), array("I")

    def add(self, text, where):
        """Take up a text of an item; texts without a letter or digit are left out."""
        found = units(text)
        if not found:
            return
        han = 2 * sum("\u3400" <= unit <= "\u9fff" for unit in found) > len(found)
        run, whole = (HAN_RUN, HAN_WHOLE) if han else (WORD_RUN, WORD_WHOLE)
        *_, (length, hashes) = runs(self._values(found), run)
        if length < whole:
            hashes = ~hashes  # another number than that of the same words inside a longer text
        else:
            self.lengths.add(length)
        near = signature(text)
        for number in {*hashes.tolist(), *([] if near is None else near.tolist())}:
            self.hashes.append(number)
            self.owners.append(len(self.places))
        self.places.append(where)

    def find(self, parts, question):
        """{"item": its place, "kind": "same words" or "near duplicate", "text": of the row} for an item that is in a
        row, or None. parts: the texts of the row; question: the one whose near duplicates count."""
        if not self.places:
            return None
        for part in parts:
            found = units(part)
            if not found:
                continue
            values = self._values(found)
            for length, hashes in runs(values, HAN_RUN):
                hit = self._look_up(hashes) if length in self.lengths else None
                if length == len(found) < HAN_WHOLE:
                    hit = hit or self._look_up(~hashes)
                if hit:
                    return {"item": hit[0], "kind": "same words", "text": " ".join(found[hit[1]:hit[1] + length])}
        near = signature(question)
        hit = None if near is None else self._look_up(near)
        return hit and {"item": hit[0], "kind": "near duplicate", "text": question[:100]}

    @staticmethod
    def _values(found):
        # Python's hash of a text differs from run to run, but every comparison here is within one
        return np.fromiter(map(hash, found), np.int64, len(found)).view(np.uint64)

    @functools.cached_property
    def _index(self):
        """(sorted hashes, their owners, a table that says for the last bits of a hash whether any has them)."""
        hashes, first = np.unique(np.frombuffer(self.hashes, np.uint64), return_index=True)
        table = np.zeros(1 << (8 * len(hashes)).bit_length(), bool)  # at most one in eight is set
        table[hashes & np.uint64(len(table) - 1)] = True
        return hashes, np.frombuffer(self.owners, np.uint32)[first], table

    def _look_up(self, hashes):
        """(place, index) of the first hash that an item has, or None."""
        known, owners, table = self._index
        # a binary search for every hash would take ten times as long as this look into a table
        candidates = np.flatnonzero(table[hashes & np.uint64(len(table) - 1)])
        for i in candidates:
            at = np.searchsorted(known, hashes[i])
            if at < len(known) and known[at] == hashes[i]:
                return self.places[owners[at]], int(i)
        return None


def read_items(paths, skip_bad):
    """Contamination with the items of evaluation files (any that read_rows reads). Raises ValueError."""
    items, bad = Contamination(), []
    for row, where in read_rows(paths, skip_bad, bad):
        for text in item_texts(row, where):
            items.add(text, where)
    print(f"{len(items.places)} texts of evaluation items are looked for", flush=True)
    if bad:
        print(f"skipped {len(bad)} bad rows of evaluation files; the first: {bad[0]}")
    return items


# ---------------------------------------------------------------------------------------------------------------------
# 4. mix


def _is_text(value):
    return isinstance(value, str) and bool(value)


def _is_share(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_count(value):
    return type(value) is int and value >= 0


# field of a source -> (what it must be, test)
RULES = {
    "name": ("a text", _is_text),
    "category": ("a text", _is_text),
    "path": ("a path or glob, or a list of them",
             lambda value: _is_text(value) or isinstance(value, list) and value and all(map(_is_text, value))),
    "map": ("an object {field: column}", lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))),
    "where": ("an object {field: value}", lambda value: isinstance(value, dict)),
    "val_ratio": ("a share from 0 to below 1", _is_share),
    "min_chars": ("a whole number", _is_count),
    "max_chars": ("a whole number", _is_count),
    "languages": ("a list of zh, en and other",
                  lambda value: isinstance(value, list) and all(name in ("zh", "en", "other") for name in value)),
}


@dataclass
class Source:
    """One source of a mix, as the config names it; what it leaves out is taken from the config's own fields."""

    name: str
    category: str
    path: str | list
    map: dict = field(default_factory=dict)        # our field -> column of the file
    where: dict = field(default_factory=dict)      # only rows with these values, {"skill": "identity"}
    val_ratio: float = 0.01                        # held-out share, by hash of the question
    min_chars: int = 1                             # of the whole text of a row
    max_chars: int = 10**9
    languages: list = field(default_factory=list)  # empty: all

    def __post_init__(self):
        for key, (rule, holds) in RULES.items():
            if not holds(getattr(self, key)):
                raise ValueError(f"source {self.name!r}: {key} is {getattr(self, key)!r}; it must be {rule}; write the "
                                 f"config as {EXAMPLE}")


def _checked_keys(given, known, what):
    """Raise ValueError for anything but a JSON object with known keys: a misspelt one would be ignored in silence."""
    if not isinstance(given, dict) or set(given) - set(known):
        found = ", ".join(sorted(set(given) - set(known))) if isinstance(given, dict) else repr(given)[:60]
        raise ValueError(f"{what}: found {found}; the keys are {', '.join(known)}; write the config as {EXAMPLE}")


def read_config(path):
    """(list of Source, {category: {"count" or "share", "max_repeat"}}, config) of a mix. Raises ValueError."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}; it must hold one JSON object; write {EXAMPLE}") from None
    shared = ("val_ratio", "min_chars", "max_chars", "languages")
    _checked_keys(config, ("sources", "targets", "total", "seed", "near_duplicates", "exclude", *shared),
                  f"--config {path}")
    rule, holds = RULES["path"]
    if "exclude" in config and not holds(config["exclude"]):
        raise ValueError(f"--config {path}: exclude is {config['exclude']!r}; it must be {rule}; name the files whose "
                         "questions must stay out of training, or leave exclude out")
    sources = []
    for given in config.get("sources") or []:
        _checked_keys(given, RULES, f"--config {path}, source {len(sources) + 1}")
        lacking = [key for key in ("name", "category", "path") if key not in given]
        if lacking:
            raise ValueError(f"--config {path}, source {len(sources) + 1}: {', '.join(lacking)} missing; a source has "
                             f"a name, a category and a path; write {EXAMPLE}")
        sources.append(Source(**{key: config[key] for key in shared if key in config} | given))
    names = [source.name for source in sources]
    if not sources or len(set(names)) < len(names):
        raise ValueError(f"--config {path}: the sources are named {names}; there must be at least one, each with a "
                         f"name of its own; write {EXAMPLE}")
    return sources, _targets(path, config, {source.category for source in sources}), config


def _targets(path, config, categories):
    """{category: {"count", "share", "max_repeat"}}, the given ones over TARGETS."""
    given = config.get("targets", {})
    _checked_keys(given, sorted(categories), f"--config {path}, targets (of the categories of the sources)")
    targets = {}
    for category in categories:
        target = given.get(category, TARGETS.get(category, {}))
        _checked_keys(target, ("count", "share", "max_repeat"), f"--config {path}, target {category}")
        share, total, repeat = target.get("share"), config.get("total"), target.get("max_repeat", 1)
        if share is not None and (not (_is_share(share) or share == 1) or not share or not _is_count(total)):
            raise ValueError(f"--config {path}, target {category}: share is {share!r} with total {total!r}; a share "
                             "lies above 0 and up to 1 and needs a total; give \"total\": the number of rows of which "
                             "it is a share")
        count = target.get("count", None if share is None else round(share * total))
        if type(repeat) is not int or repeat < 1 or not (count is None or type(count) is int and count > 0):
            raise ValueError(f"--config {path}, target {category}: count {count!r}, max_repeat {repeat!r}; both are "
                             'whole numbers above 0; write {"count": 10000, "max_repeat": 2}')
        targets[category] = {"count": count, "max_repeat": repeat}
    return targets


def source_rows(source, skip_bad, counts, bad):
    """Stream (stage, standard row, text, "file:line") of the rows that pass the filters of a source. What is left out
    is counted by reason in `counts`; messages of bad rows, which only --skip_bad survives, are added to `bad`."""
    for row, where in read_rows(source.path, skip_bad, bad):
        counts["read"] += 1
        if any(row.get(key) != value for key, value in source.where.items()):
            counts["not asked for"] += 1
            continue
        try:
            stage, new, reason = standard_row(rename(row, source.map, where), where)
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"source {source.name}: {error}; or rename columns with a map (--map text=COLUMN), "
                                 "or skip such rows with --skip_bad 1") from None
            bad.append(str(error))
            continue
        text = "" if reason else text_of(new)
        reason = reason or _filtered(source, text)
        if reason:
            counts[reason] += 1
            continue
        own = row.get("source")
        named = new | {"source": f"{source.name}/{own}" if isinstance(own, str) and own else source.name}
        yield stage, named, text, where


def _filtered(source, text):
    """Why the filters of a source leave a text out, or "" where they do not."""
    if len(text) < source.min_chars:
        return "too short"
    if len(text) > source.max_chars:
        return "too long"
    return "other language" if source.languages and language(text) not in source.languages else ""


def choose(pool, count, max_repeat, priority):
    """Copies of each row of a category, int64 [N]: rows by ascending `priority`, each once before any comes twice.

    Args: pool: indices of the rows to choose from; count: rows wanted, None = each once; max_repeat: most copies of a
        row; priority: uint64 [N], a hash, so that the choice depends on content and seed alone.
    """
    copies = np.zeros(len(priority), np.int64)
    order = pool[np.argsort(priority[pool], kind="stable")]
    count = len(order) if count is None else min(count, max_repeat * len(order))
    copies[order] = count // max(1, len(order))
    copies[order[:count % max(1, len(order))]] += 1
    return copies


def plan(prints, contaminated, sources, sizes, targets, seed, ratio, counts):
    """Which rows are written how often: (copies in train int64 [N], held out bool [N]).

    Rows with evaluation items (numbers of rows `contaminated`) and duplicates leave first, then every category is
    brought to its size, then the questions that any source holds out leave training everywhere. counts: {source name:
    Counter}, to which the reasons are added.
    """
    leaked = np.zeros(prints.count, bool)
    leaked[contaminated] = True
    exact, near = (found & ~leaked for found in prints.duplicates())
    clean = ~(leaked | exact | near)
    owner = np.repeat(np.arange(len(sources)), sizes)                                   # [N], source of a row
    # another order for every seed, but the same for the same text
    priority = (prints.column(0) ^ np.uint64(document_hash(f"seed {seed}"))) * ODD      # [N]
    priority ^= priority >> np.uint64(32)
    copies = np.zeros(prints.count, np.int64)
    for category, target in targets.items():
        mine = np.isin(owner, [i for i, source in enumerate(sources) if source.category == category])
        pool = np.flatnonzero(mine & clean)
        wanted = target["count"] if target["count"] is not None else len(pool)
        copies += choose(pool, round(wanted * ratio), target["max_repeat"], priority * ODD)
    question = prints.column(1)
    limits = np.array([round(source.val_ratio * 2**64) for source in sources], np.uint64)
    heldout = (copies > 0) & (question < limits[owner])
    # a question that one source holds out must not be trained through another, which holds out less
    elsewhere = (copies > 0) & ~heldout & np.isin(question, question[heldout])
    for i, source in enumerate(sources):
        for reason, rows in (("contaminated", leaked), ("exact duplicate", exact), ("near duplicate", near),
                             ("not chosen", clean & (copies == 0)), ("question held out elsewhere", elsewhere)):
            counts[source.name][reason] += int((rows & (owner == i)).sum())
    copies[heldout | elsewhere] = 0
    return copies, heldout


def json_line(row):
    """A row as a line of .jsonl, bytes."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"  # lone surrogates, which UTF-8 refuses, stay escapes


class Outputs:
    """The files of a mix, written under other names until all of them are whole."""

    def __init__(self, folder):
        self.folder, self.files, self.facts = Path(folder), {}, {}

    def write(self, stage, part, row, times):
        """Append a row to {stage}.{part}.jsonl, several times."""
        name = f"{stage}.{part}.jsonl"
        if name not in self.files:
            self.files[name] = open(self.folder / f"{name}.tmp", "wb")
            self.facts[name] = {"rows": 0, "bytes": 0}
        self.facts[name]["rows"] += times
        self.facts[name]["bytes"] += self.files[name].write(json_line(row) * times)

    def commit(self):
        """Give every file its name."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def discard(self):
        """Remove what was not committed."""
        for name, file in self.files.items():
            file.close()
            (self.folder / f"{name}.tmp").unlink(missing_ok=True)


def _fingerprint(prints, items, sources, skip_bad, counts):
    """The first pass: fill `prints` and `counts`. Returns the number of rows that every source has left, the numbers of
    the rows in which one of `items` (Contamination) stands, and {source name: the first such case}."""
    sizes, contaminated, examples = [], [], {}
    for source in sources:
        before, bad = prints.count, []
        for stage, row, text, where in source_rows(source, skip_bad, counts[source.name], bad):
            if found := items.find(parts_of(row), question_of(row)):
                contaminated.append(prints.count)
                examples.setdefault(source.name, {"row": where, **found})
            prints.add(stage, row, text)
        counts[source.name]["bad"] = len(bad)
        if bad:
            print(f"source {source.name}: skipped {len(bad)} bad rows; the first: {bad[0]}")
        sizes.append(prints.count - before)
        print(f"source {source.name}: {counts[source.name]['read']} rows read, {sizes[-1]} left by the filters",
              flush=True)
    return sizes, contaminated, examples


def _write(outputs, sources, skip_bad, sizes, copies, heldout, counts):
    """The second pass: write the chosen rows, and count them."""
    number = 0
    for source, size in zip(sources, sizes, strict=True):
        end = number + size
        for stage, row, *_ in source_rows(source, skip_bad, Counter(), []):
            if number < end and (copies[number] or heldout[number]):
                part, times = ("heldout", 1) if heldout[number] else ("train", int(copies[number]))
                row["category"] = source.category
                outputs.write(stage, part, row, times)
                counts[source.name][part] += times
                counts[source.name]["different rows"] += 1
            number += 1
        if number != end:
            raise ValueError(f"source {source.name}: its files changed while they were read; both passes must see the "
                             "same rows; start again when nothing writes to them")


def _warnings(sources, targets, counts, examples, ratio, folder, facts):
    """What a reader of the stats should not miss, as lines. targets: those that the config itself sets."""
    for source in sources:
        found = counts[source.name]
        if not found["train"] + found["heldout"]:
            lost = ", ".join(f"{count} {reason}" for reason, count in found.items() if count and reason != "read")
            yield f"source {source.name} ended empty: {found['read']} rows read{lost and f', {lost}'}"
        if source.name in examples:
            yield (f"source {source.name}: {found['contaminated']} rows left out because evaluation items are in them; "
                   "the first: {row} has the {kind} as {item}: {text!r}".format(**examples[source.name]))
    for category, target in sorted(targets.items()):
        got = sum(counts[source.name][part] for source in sources for part in ("train", "heldout")
                  if source.category == category)
        wanted = round((target["count"] or 0) * ratio)
        if got < 0.99 * wanted:
            yield (f"category {category}: {got} of {wanted} rows; add sources, or raise its max_repeat "
                   f"({target['max_repeat']})")
    for name in (f"{stage}.{part}.jsonl" for stage in STAGES for part in ("train", "heldout")):
        if name not in facts and (folder / name).exists():
            yield f"{folder / name} is older than this mix, which has no such rows"


def mix(args):
    """Write the mix that --config describes and its dataset_stats.json; returns the stats."""
    sources, targets, config = read_config(args.config)
    folder, seed = Path(args.output), config.get("seed", 42)
    folder.mkdir(parents=True, exist_ok=True)
    written = {(folder / f"{stage}.{part}.jsonl").resolve() for stage in STAGES for part in ("train", "heldout")}
    for source in sources:
        if written & {path.resolve() for path in expand_paths(source.path)}:
            raise ValueError(f"source {source.name}: {source.path} lies in --output {folder} under a name that the mix "
                             "writes; a mix must not replace its own sources; give another --output")
    items = read_items(config["exclude"], args.skip_bad) if "exclude" in config else Contamination()
    if not items.places:
        print('evaluation items are not looked for; "exclude" in the config names their files')
    counts = {source.name: Counter() for source in sources}
    outputs = Outputs(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".mix") as scratch:
            prints = Fingerprints(scratch, near=config.get("near_duplicates", True))
            with contextlib.closing(prints):
                sizes, contaminated, examples = _fingerprint(prints, items, sources, args.skip_bad, counts)
                copies, heldout = plan(prints, contaminated, sources, sizes, targets, seed, args.global_sample_ratio,
                                       counts)
        _write(outputs, sources, args.skip_bad, sizes, copies, heldout, counts)
        outputs.commit()
    finally:
        outputs.discard()
    asked = {category: targets[category] for category in config.get("targets", {})}
    warnings = list(_warnings(sources, asked, counts, examples, args.global_sample_ratio, folder, outputs.facts))
    stats = {"config": config, "global_sample_ratio": args.global_sample_ratio, "targets": targets,
             "sources": {source.name: {"category": source.category, **counts[source.name]} for source in sources},
             "evaluation texts": len(items.places), "contamination": examples,
             "files": outputs.facts, "warnings": warnings}
    temporary = folder / "dataset_stats.json.tmp"
    temporary.write_text(json.dumps(stats, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "dataset_stats.json")
    print_mix(stats, folder)
    return stats


def print_mix(stats, folder):
    """Print what went in and out of a mix."""
    columns = ("read", "train", "heldout", "different rows")
    rows = [[name, found["category"], *(found.get(column, 0) for column in columns),
             ", ".join(f"{count} {reason}" for reason, count in found.items()
                       if reason not in ("category", *columns) and count)]
            for name, found in stats["sources"].items()]
    print(logs.table(["source", "category", *columns, "left out"], rows))
    for name, facts in stats["files"].items():
        print(f"{folder / name}: {facts['rows']} rows, {facts['bytes'] / 1e6:.2f} MB")
    for warning in stats["warnings"]:
        print(f"warning: {warning}")


# ---------------------------------------------------------------------------------------------------------------------
# 5. inspect


def _quantiles(values):
    """"10% 50% 90% max" of an array of lengths, as a line."""
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"10% {low:.0f}   50% {middle:.0f}   90% {high:.0f}   longest {max(values)}   mean {np.mean(values):.0f}"


def token_counts(tokenizer, row):
    """(tokens, trained tokens) of a standard row: all of a document but its first, in conversations the answers."""
    if "text" in row:
        count = len(tokenizer.encode(row["text"]))
        return count + 1, count
    masks = [tokenizer.render(turns)[1] for turns in turns_of(row)]
    if "prompt" in row:
        # of a pair only the two compared answers count, not those of earlier turns
        start = len(tokenizer.render(preference(row)[0], add_generation_prompt=True)[1])
        return sum(map(len, masks)), sum(sum(mask[start:]) for mask in masks)
    return len(masks[0]), sum(masks[0])


def inspect(args):
    """Print what is in the files; returns the facts."""
    source = Source("files", "inspected", args.files, _parse_map(args.map))
    tokenizer = Tokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None
    items = read_items(args.against, args.skip_bad) if args.against else None
    counts, bad, samples, shared = Counter(), [], [], []
    stages, languages, names = Counter(), Counter(), Counter()
    lengths, tokens, trained = array("q"), array("q"), 0
    with tempfile.TemporaryDirectory() as scratch, contextlib.closing(Fingerprints(scratch)) as prints:
        for stage, row, text, where in source_rows(source, args.skip_bad, counts, bad):
            prints.add(stage, row, text)
            if items and (found := items.find(parts_of(row), question_of(row))):
                shared.append("{row} has the {kind} as {item}: {text!r}".format(row=where, **found))
            stages[stage] += 1
            languages[language(text)] += 1
            names[row["source"].partition("/")[2] or "not named"] += 1
            lengths.append(len(text))
            if tokenizer:
                length, count = token_counts(tokenizer, row)
                tokens.append(length)
                trained += count
            # the rows of the smallest hashes: spread over the file, and the same ones each time
            samples = sorted([*samples, (document_hash(text), prints.count, row)],
                             key=lambda sample: sample[:2])[:args.samples]
        exact, near = (int(found.sum()) for found in prints.duplicates())
    facts = {"rows": len(lengths), "stages": dict(stages), "left out": {**counts, "bad": len(bad)},
             "languages": dict(languages), "sources": dict(names.most_common(10)), "exact duplicates": exact,
             "near duplicates": near, "characters": sum(lengths)}
    if items:
        facts |= {"contaminated": len(shared), "contaminated share": len(shared) / max(1, len(lengths))}
    if tokens:
        facts |= {"tokens": sum(tokens), "trained tokens": trained, "trained share": trained / sum(tokens)}
    for name, value in facts.items():
        print(f"{name:>18}  {value}")
    if lengths:
        print(f"{'characters a row':>18}  {_quantiles(lengths)}")
    if tokens:
        print(f"{'tokens a row':>18}  {_quantiles(tokens)}")
    for message in bad[:3]:
        print(f"{'bad':>18}  {message}")
    for message in shared[:3]:
        print(f"{'contaminated':>18}  {message}")
    for _, number, row in samples:
        shown = json.dumps(row, ensure_ascii=False, indent=1)[:1500]
        # lone surrogates, which no terminal takes, become question marks
        print(f"\nrow {number}\n{shown.encode('utf-8', 'replace').decode()}")
    return facts


def _parse_map(words):
    """["prompt=question", ...] -> {"prompt": "question"}."""
    pairs = [word.split("=", 1) for word in words]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"--map {'='.join(pair)}; a map is made of field=column; write --map prompt=question "
                             "completion=answer")
    return dict(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# 6. download


@dataclass(frozen=True)
class Public:
    """A public set: where it lies, and what is known about it."""

    repo: str                                   # id on the Hugging Face hub, perhaps @revision; or an address
    files: dict                                 # path there -> megabytes, 0 = not known
    licence: str
    shards: str = ""                            # path of shard number {}, of which --shards are fetched
    shard_mb: int = 0
    modelscope: str = ""                        # id on ModelScope, where it is there as well
    sha256: dict = field(default_factory=dict)  # path -> hash, where known; the hub states most others itself
    note: str = ""


def _minimind(mb, name, note=""):
    return Public("jingyaogong/minimind_dataset", {f"{name}.jsonl": mb}, "Apache-2.0 and CC BY-NC 2.0 (the card names "
                  "both)", modelscope="gongjy/minimind_dataset", note=note)


# MiniMind's files with their megabytes: the current names, and those until the end of 2025
MINIMIND = {"pretrain_t2t_mini": 1200, "pretrain_t2t": 10_000, "sft_t2t_mini": 1600, "sft_t2t": 14_000, "dpo": 53,
            "rlaif": 24, "agent_rl": 86, "agent_rl_math": 18}
MINIMIND_OLD = {"pretrain_hq": 1600, "sft_mini_512": 1200, "sft_512": 7500, "sft_1024": 5600, "sft_2048": 9000,
                "r1_mix_1024": 340, "rlaif-mini": 1, "lora_identity": 1, "lora_medical": 34}
STATED = "as generally stated, read its card"  # behind a licence that was not read at its source
GITHUB = "https://raw.githubusercontent.com/"
SETS = {
    **{name: _minimind(mb, name) for name, mb in MINIMIND.items()},
    **{name: _minimind(mb, name, f"a name of 2025; where it is gone, take one of {', '.join(MINIMIND)}")
       for name, mb in MINIMIND_OLD.items()},
    "tinystories": Public("roneneldan/TinyStories", {"TinyStoriesV2-GPT4-train.txt": 2230,
                                                     "TinyStoriesV2-GPT4-valid.txt": 23}, "CDLA-Sharing-1.0"),
    "fineweb-edu": Public("HuggingFaceFW/fineweb-edu", {}, "ODC-By 1.0", "sample/10BT/{:03d}_00000.parquet"),
    "climbmix": Public("karpathy/climbmix-400b-shuffle", {"shard_06542.parquet": 100}, "made from "
                       "nvidia/Nemotron-ClimbMix, which is for non-commercial use; read both cards",
                       "shard_{:05d}.parquet", 100, note="shard 6542 is for validation"),
    "smol-smoltalk": Public("HuggingFaceTB/smol-smoltalk", {"data/test-00000-of-00001.parquet": 48}, "Apache-2.0",
                            "data/train-{:05d}-of-00004.parquet", 230),
    "smoltalk": Public("HuggingFaceTB/smoltalk", {}, "Apache-2.0", "data/all/train-{:05d}-of-00009.parquet", 223),
    "ultrafeedback": Public("HuggingFaceH4/ultrafeedback_binarized", {"data/train_prefs-00000-of-00001.parquet": 222,
                                                                      "data/test_prefs-00000-of-00001.parquet": 7},
                            "MIT"),
    "dpo-en-zh-20k": Public("llamafactory/DPO-En-Zh-20k", {"dpo_en.json": 51, "dpo_zh.json": 29}, "Apache-2.0"),
    "hellaswag": Public(f"{GITHUB}rowanz/hellaswag/master", {"data/hellaswag_val.jsonl": 0}, "MIT", sha256={
        "data/hellaswag_val.jsonl": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"}),
    "gsm8k": Public(f"{GITHUB}openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data",
                    {"test.jsonl": 1, "train.jsonl": 4}, "MIT", sha256={
        "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}),
    "arc_easy": Public("allenai/ai2_arc", {"ARC-Easy/test-00000-of-00001.parquet": 0}, f"CC BY-SA 4.0 ({STATED})"),
    "arc_challenge": Public("allenai/ai2_arc", {"ARC-Challenge/test-00000-of-00001.parquet": 0},
                            f"CC BY-SA 4.0 ({STATED})"),
    "winogrande": Public("allenai/winogrande", {"winogrande_xl/validation-00000-of-00001.parquet": 0},
                         f"CC BY ({STATED})"),
    "piqa": Public("ybisk/piqa@078a131412f46a38025a762322c174a8bae2610c", {"plain_text/piqa-validation.parquet": 0},
                   f"AFL-3.0 ({STATED})"),
    "boolq": Public("google/boolq", {"data/validation-00000-of-00001.parquet": 0}, f"CC BY-SA 3.0 ({STATED})"),
    "lambada": Public("EleutherAI/lambada_openai", {"data/lambada_test_en.jsonl": 2}, "MIT"),
    "wikitext2": Public("Salesforce/wikitext", {"wikitext-2-raw-v1/test-00000-of-00001.parquet": 1},
                        "CC BY-SA 3.0 and GFDL"),
    "mmlu": Public("cais/mmlu", {"all/test-00000-of-00001.parquet": 0, "all/dev-00000-of-00001.parquet": 0},
                   f"MIT ({STATED})"),
    "ceval": Public("ceval/ceval-exam", {"ceval-exam.zip": 2}, "CC BY-NC-SA 4.0"),
    "cmmlu": Public("haonan-li/cmmlu", {"cmmlu_v1_0_1.zip": 0}, "CC BY-NC-SA 4.0"),
}
GROUPS = {"minimind": ("pretrain_t2t_mini", "sft_t2t_mini", "dpo"),
          "eval": ("hellaswag", "arc_easy", "arc_challenge", "winogrande", "piqa", "boolq", "lambada", "wikitext2",
                   "ceval", "cmmlu", "mmlu", "gsm8k")}
MIRRORS = {"huggingface": "https://huggingface.co", "hf-mirror": "https://hf-mirror.com", "modelscope": ""}
ATTEMPTS = 5      # in a row that bring nothing, before the next mirror is asked
PATIENCE = 30.0   # seconds without a byte that count as a broken connection
LONGEST_WAIT = 60
OFFLINE = "without a network the embedded data serve: python make_data.py"


class NotThere(Exception):  # noqa: N818 - a mirror's answer: asking it again would not help
    """Raised for a mirror that does not have the file, refuses it, or cannot be reached."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps what the hub states about a large file on the first answer: its SHA-256."""

    def __init__(self):
        self.sha256 = ""

    def note(self, headers):
        """Keep the hash that the headers of an answer state, if they do."""
        stated = headers.get("X-Linked-Etag", "").strip('"')
        self.sha256 = self.sha256 or (stated if re.fullmatch("[0-9a-f]{64}", stated) else "")

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Called by urllib for a redirect."""
        self.note(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def addresses(public, path, mirrors):
    """The addresses of a file, in the order in which they are tried."""
    path = urllib.parse.quote(path)
    if public.repo.startswith("http"):
        return [f"{public.repo}/{path}"]
    repo, _, revision = public.repo.partition("@")
    return [f"https://www.modelscope.cn/datasets/{public.modelscope}/resolve/master/{path}" if mirror == "modelscope"
            else f"{MIRRORS.get(mirror, mirror).rstrip('/')}/datasets/{repo}/resolve/{revision or 'main'}/{path}"
            for mirror in mirrors if mirror != "modelscope" or public.modelscope]


def check_space(folder, needed, path):
    """Raise OSError where `needed` bytes do not fit on the disk of `folder`, with some room left to work."""
    free = shutil.disk_usage(folder).free
    if free < needed + (100 << 20):
        raise OSError(f"{path}: {needed / 1e6:.0f} MB are still to come and {free / 1e6:.0f} MB are free in {folder}; "
                      "a download leaves 100 MB free; make room, or give another disk with --output")


def request(url, part, state):
    """One request: append what is missing to the file `part`.

    `state` remembers between requests what the server said of the file: etag, size, sha256. A server whose file has
    changed since then sends it whole (If-Range), and the part begins anew.
    Raises NotThere, ConnectionError for a transfer that ended early, urllib's and http's own errors.
    """
    have = part.stat().st_size if part.exists() and state.get("etag") else 0
    headers = {"User-Agent": "MiniLLM", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": state["etag"]}
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise NotThere("it sends a web page instead of the file")
        span = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", "")) if answer.status == 206 else None
        if not span or int(span[1]) != have:
            have = 0
            if answer.status == 206:
                raise NotThere("it sends another part than was asked for")
        redirects.note(answer.headers)
        length = answer.headers.get("Content-Length")
        etag = answer.headers.get("ETag", "")
        # a weak etag vouches for a meaning, not for bytes: nothing can be appended to such a file
        state |= {"etag": "" if etag.startswith("W/") else etag, "size": have + int(length) if length else None,
                  "sha256": redirects.sha256 or state.get("sha256", "")}
        check_space(part.parent, (state["size"] or 0) - have, part.name)
        part.with_suffix(".state").write_text(json.dumps(state), encoding="utf-8")
        bar = logs.progress(state["size"], part.stem, initial=have, unit="B", unit_scale=True)
        with contextlib.closing(bar), open(part, "ab" if have else "wb") as file:
            while block := answer.read1(1 << 18):  # what is there: a full block may never come
                bar.update(file.write(block))
    got = part.stat().st_size
    if state["size"] is not None and got < state["size"]:
        raise ConnectionError(f"the connection ended after {got} of {state['size']} bytes")


def _after(error, tries):
    """Seconds to wait before the next request: as the server asks, else longer each time. Raises NotThere where
    another request is useless."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code not in (408, 416, 425, 429) and error.code < 500:
            raise NotThere(f"HTTP {error.code} {error.reason}") from None
        asked = error.headers.get("Retry-After", "")
        return min(LONGEST_WAIT, int(asked)) if asked.isdigit() else min(LONGEST_WAIT, 2**tries)
    reason = getattr(error, "reason", error)
    # urllib wraps what fails before the answer begins: a mirror that cannot be reached at all is left at once
    unreachable = isinstance(error, urllib.error.URLError) and isinstance(reason, OSError) and (
        isinstance(reason, (socket.gaierror, TimeoutError, ConnectionRefusedError, ssl.SSLCertVerificationError))
        or reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH))
    if unreachable:
        raise NotThere(str(reason)) from None
    return min(LONGEST_WAIT, 2**tries)


def fetch(url, path, sha256=""):
    """Download one address to `path`, going on with what an earlier call has left. The file takes its name only when
    it is whole: of the stated size, and of the hash where one is known. Returns whether a hash was compared.

    Raises NotThere where this mirror cannot serve it, OSError where the disk is full.
    """
    part = path.with_name(f"{path.name}.part")
    state, tries = {}, 0
    with contextlib.suppress(OSError, ValueError):
        state = json.loads(part.with_suffix(".state").read_text(encoding="utf-8"))
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            request(url, part, state)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            if getattr(error, "code", 0) == 416:
                state.clear()  # what is there is longer than the file: begin anew
            after = part.stat().st_size if part.exists() else 0
            tries = 0 if after > before else tries + 1
            if tries >= ATTEMPTS:
                raise NotThere(f"{error}, {ATTEMPTS} times in a row") from None
            wait = _after(error, tries)
            logs.say(f"{path.name}: {error}; trying again in {wait} s, {after} bytes are kept")
            time.sleep(wait)
    wanted, found = sha256 or state["sha256"], file_hash(part)
    part.with_suffix(".state").unlink()
    if state["size"] not in (None, part.stat().st_size) or wanted not in ("", found):
        size = part.stat().st_size
        part.unlink()
        raise NotThere(f"what came is not the file: {size} bytes of {state['size']}, SHA-256 {found}, not {wanted}")
    os.replace(part, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {found} "
          f"({'as stated' if wanted else 'nothing to compare it with is known'})", flush=True)
    return bool(wanted)


def file_hash(path):
    """SHA-256 of a file, forced to the disk before it is trusted."""
    digest = hashlib.sha256()
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(path):
    """Unpack a .zip into a folder beside it, which appears only when all of it is there. Raises ValueError."""
    folder = path.with_suffix("")
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            check_space(path.parent, sum(entry.file_size for entry in archive.infolist()), path)
            archive.extractall(temporary)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: {error}; it must be a whole archive; delete it and download it again") from None
    os.replace(temporary, folder)
    print(f"{folder}: unpacked")


def as_lines(path):
    """Write a benchmark's parquet beside it as .jsonl, or as .txt where the rows are the lines of one text (WikiText):
    scores are computed without pyarrow. Where it is missing now, that is said."""
    if path.with_suffix(".jsonl").exists() or path.with_suffix(".txt").exists():
        return
    temporary, one_text = path.with_suffix(".tmp"), True
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for row, _ in read_rows(path):
                one_text = one_text and list(row) == ["text"]
                file.write(row["text"] if one_text else json.dumps(row, ensure_ascii=False) + "\n")
    except ValueError as error:
        temporary.unlink()
        print(f"{path} is not converted: {error}")
        return
    target = path.with_suffix(".txt" if one_text else ".jsonl")
    os.replace(temporary, target)
    print(f"{target}: the same rows")


def download(args):
    """Fetch public sets into --output/NAME; without a name, list them. Returns {name: paths}."""
    if not args.names:
        print(logs.table(["name", "megabytes", "licence", "from"], [
            [name, sum(public.files.values()) + public.shard_mb or "not known", public.licence,
             public.repo.removeprefix(GITHUB)] for name, public in SETS.items()]))
        print("\n".join(f"{group}: {', '.join(names)}" for group, names in GROUPS.items()))
        return {}
    names = [each for name in args.names for each in GROUPS.get(name, (name,))]
    unknown = [name for name in names if name not in SETS]
    if unknown:
        raise ValueError(f"download {unknown[0]}: no set of that name; there are {', '.join([*SETS, *GROUPS])}; list "
                         "them with sizes and licences: python prepare_data.py download")
    endpoint = os.environ.get("HF_ENDPOINT", "")
    mirrors = args.mirror or [*([endpoint] if endpoint else []), *MIRRORS]
    for mirror in mirrors:
        if mirror not in MIRRORS and not mirror.startswith(("http://", "https://")):
            raise ValueError(f"--mirror {mirror}; a mirror is one of {', '.join(MIRRORS)}, or an address with https:// "
                             "(HF_ENDPOINT as well); correct it")
    done = {}
    for name in names:
        public = SETS[name]
        print(f"{name}: licence {public.licence}{public.note and f'; {public.note}'}", flush=True)
        paths = list(public.files)
        if public.shards:
            paths += [public.shards.format(i) for i in range(args.shards)]
        done[name] = [_get(public, path, Path(args.output) / name / Path(path).name, mirrors) for path in paths]
        for path in done[name]:
            if path.suffix == ".zip" and not path.with_suffix("").exists():
                unpack(path)
            if path.suffix == ".parquet" and name in GROUPS["eval"]:
                as_lines(path)
    return done


def _get(public, source, path, mirrors):
    """Bring one file of a set to `path` from the first mirror that has it. Raises OSError where none does."""
    if path.exists():
        print(f"{path}: is there already; delete it to fetch it again")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        tried = []
        for url in addresses(public, source, mirrors):
            try:
                fetch(url, path, public.sha256.get(source, ""))
                break
            except NotThere as error:
                tried.append(f"{urllib.parse.urlsplit(url).netloc}: {error}")
                logs.say(f"{path.name}: {tried[-1]}")
        else:
            raise OSError(f"{source}: no mirror has served it ({' | '.join(tried) or 'it is not on this one'}); it "
                          f"needs a network and a mirror that has it; try again later, or another --mirror; {OFFLINE}")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# 7. export


def sequences(data, add_bos, add_eos):
    """Yield the rows of a data set as lists of (name, ids, mask), in file order; mask 1 on what training would train.

    data: PretrainData (a row is a document, cut at max_seq_len and counted in its stats), SFTData or PreferenceData.
    """
    bos, eos, most = data.tokenizer.bos_id, data.tokenizer.eos_id, data.max_seq_len
    for i in range(_count(data)):
        if data.kind == "preference":
            head = int(data.prompt_length[i][0])
            rows = [(f"{side}_", ids.tolist(), [0] * head + [1] * (len(ids) - head))
                    for side, ids in (("chosen", data.chosen[i]), ("rejected", data.rejected[i]))]
        elif data.kind == "sft":
            rows = [("", data.tokens[i].tolist(), data.trained[i].tolist())]
        else:
            # the store begins every document with bos, or with eos where a foreign tokenizer has no bos
            ids = [bos] * (bos is not None) + data.tokens[i][1:].tolist() + [eos] * add_eos
            data.stats["truncated"] += len(ids) > most
            rows = [("", ids[:most], [0] + [1] * (len(ids[:most]) - 1))]
        if not add_bos:
            rows = [(name, ids[1:], [0, *mask[2:]]) if ids[0] == bos else (name, ids, mask) for name, ids, mask in rows]
        yield rows


def _count(data):
    """Conversations, documents or pairs of a data set (its own length counts packed rows or windows)."""
    return len(getattr(data, next(iter(data.columns))))


def _fill(data, args, folder):
    """Write the rows of a data set, padded on the right, into .npy files in `folder`; returns {name: mapped array}.

    input_ids; labels, -100 where nothing is trained, not shifted (models of transformers shift); loss_mask; lengths.
    """
    sides = ("chosen", "rejected") if data.kind == "preference" else ("tokens",)
    longest = max(int(getattr(data, side).lengths.max()) for side in sides) + args.add_eos
    count, width = _count(data), min(args.max_length, longest)
    kinds = {"input_ids": np.int32, "labels": np.int32, "loss_mask": np.uint8, "lengths": np.int32}
    arrays = {name + kind: np.lib.format.open_memmap(folder / f"{name}{kind}.npy", "w+", dtype,
                                                     (count, width)[:1 + (kind != "lengths")])   # [N, T], lengths [N]
              for name in (f"{side}_" if len(sides) > 1 else "" for side in sides) for kind, dtype in kinds.items()}
    for i, rows in enumerate(sequences(data, args.add_bos, args.add_eos)):
        for name, ids, mask in rows:
            labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
            padding = width - len(ids)
            arrays[f"{name}input_ids"][i] = ids + [data.tokenizer.pad_id] * padding
            arrays[f"{name}labels"][i] = labels + [-100] * padding
            arrays[f"{name}loss_mask"][i] = mask + [0] * padding
            arrays[f"{name}lengths"][i] = len(ids)
    return arrays


def export(args):
    """Write tensors of a stage for other programs, or rows of any stage as lines; returns the counts."""
    path = Path(args.output or f"out/export/{args.stage or 'rows'}.{args.format}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "jsonl":
        return export_lines(args, path)
    if not args.stage or not args.tokenizer:
        raise ValueError(f"export to {args.format}: --stage {args.stage or 'missing'}, --tokenizer "
                         f"{args.tokenizer or 'missing'}; tensors need both; give them, or --format jsonl for the rows")
    if args.add_eos and args.stage != "pretrain":
        raise ValueError(f"--add_eos 1 with --stage {args.stage}; every answer of a conversation has its end token "
                         "already; leave --add_eos out")
    kind = {"pretrain": PretrainData, "sft": SFTData, "dpo": PreferenceData}[args.stage]
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as scratch:
        scratch, paths = Path(scratch), args.data_path
        if args.map:
            paths = scratch / "renamed.jsonl"
            with open(paths, "wb") as file:
                for row, where in read_rows(args.data_path, args.skip_bad):
                    file.write(json_line(rename(row, _parse_map(args.map), where)))
        # where the bos goes, one more token of a conversation fits
        extra = not args.add_bos and tokenizer.bos_id is not None
        data = kind(paths, tokenizer, args.max_length + extra, scratch / "cache", skip_bad=args.skip_bad)
        arrays = _fill(data, args, scratch)
        _save(arrays, scratch, path, args.format)
        facts = {"rows": len(next(iter(arrays.values()))), "shapes": {name: x.shape for name, x in arrays.items()},
                 "tokens": int(sum(x.sum() for name, x in arrays.items() if name.endswith("lengths"))),
                 "trained": int(sum(x.sum() for name, x in arrays.items() if name.endswith("loss_mask"))),
                 **{key: data.stats[key] for key in ("truncated", "dropped", "reasons", "bad")}}
        del arrays  # mapped files cannot be deleted everywhere
    print(f"{path}: {', '.join(f'{name} {list(shape)}' for name, shape in facts['shapes'].items())}; "
          f"{facts['trained']} of {facts['tokens']} tokens are trained")
    if facts["truncated"] or facts["dropped"]:
        print(f"warning: {facts['truncated']} rows were longer than {args.max_length} tokens and are cut, "
              f"{facts['dropped']} left out {facts['reasons'] or ''}: raise --max_length to keep them whole")
    return facts


def export_lines(args, path):
    """Write the rows in the form in which training reads them as .jsonl, for programs that take no other file
    (tokenizer.py train); returns the counts."""
    source, counts, bad = Source("rows", "rows", args.data_path, _parse_map(args.map)), Counter(), []
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for stage, row, _, where in source_rows(source, args.skip_bad, counts, bad):
                if args.stage and stage != {"dpo": "preference"}.get(args.stage, args.stage):
                    raise ValueError(f"{where}: found a row for {stage}; --stage {args.stage} takes no other; leave "
                                     "--stage out to write all rows")
                own = row.pop("source").partition("/")[2]
                file.write(json_line(row | ({"source": own} if own else {})))
                counts["written"] += 1
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    counts["bad"] = len(bad)
    print(f"{path}: {', '.join(f'{count} {name}' for name, count in counts.items() if count)}")
    return dict(counts)


def _save(arrays, scratch, path, form):
    """Write the arrays as one file, which takes its name when it is whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    if form == "npz":
        for x in arrays.values():
            x.flush()
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in arrays:
                archive.write(scratch / f"{name}.npy", f"{name}.npy")
    else:
        # int64, because torch's cross_entropy takes no other labels
        torch.save({name: torch.from_numpy(x).long() for name, x in arrays.items()}, temporary)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# 8. The command


def parse_args(argv=None):
    """Flags of the four commands."""
    parser = cli.Parser(__doc__)

    def command_parser(prog, description):
        made = cli.Parser(description)
        made.prog = prog
        return made

    commands = parser.add_subparsers(dest="command", required=True, parser_class=command_parser,
                                     metavar="{mix,inspect,download,export}")

    def command(name, text):
        sub = commands.add_parser(name, description=text, help=text)
        cli.switch(sub, "--debug", 0, "show the traceback of an error")
        return sub

    def reading(sub):
        sub.add_argument("--map", nargs="+", default=[], metavar="FIELD=COLUMN",
                         help="columns of files whose fields have other names: --map prompt=question completion=answer")
        cli.switch(sub, "--skip_bad", 0, "skip and count unreadable lines and rows instead of stopping at the first")

    sub = command("mix", "mix sources by category into files for every stage")
    sub.add_argument("--config", required=True, help="JSON file with sources and targets (docs/data.md)")
    sub.add_argument("--output", default="out/mix", help="folder for the files and dataset_stats.json")
    sub.add_argument("--global_sample_ratio", type=cli.positive(float), default=1.0,
                     help="scales the rows wanted of every category; 0.01 for a trial")
    cli.switch(sub, "--skip_bad", 0, "skip and count unreadable lines and rows instead of stopping at the first")
    sub = command("inspect", "show lengths, languages, duplicates, samples and the trained share of files")
    sub.add_argument("files", nargs="+", help="files or globs")
    sub.add_argument("--tokenizer", default="", help="folder of a tokenizer or checkpoint, to count tokens")
    sub.add_argument("--samples", type=cli.positive(int, zero=True), default=3, help="rows to print")
    sub.add_argument("--against", nargs="+", default=[], metavar="FILE",
                     help="evaluation files (or globs): rows in which one of their questions stands are counted")
    reading(sub)
    sub = command("download", "fetch public sets by name; without one, list them with sizes and licences")
    sub.add_argument("names", nargs="*", help=f"sets, or groups of them: {', '.join([*GROUPS, *SETS])}")
    sub.add_argument("--output", default="out/downloads", help="folder; every set gets one of its name in it")
    sub.add_argument("--mirror", nargs="+", default=[],
                     help=f"where to ask, in this order: {', '.join(MIRRORS)}, or the address of another mirror of the "
                          "hub (left out: HF_ENDPOINT where it is set, then all)")
    sub.add_argument("--shards", type=cli.positive(int), default=1, help="how many of the files of a set in shards")
    sub = command("export", "write tensors of a stage, or rows as .jsonl, for other programs")
    sub.add_argument("--stage", default="", choices=("pretrain", "sft", "dpo"),
                     help="what the rows are read as (left out: rows of any stage, with --format jsonl only)")
    sub.add_argument("--data_path", nargs="+", required=True, help="files or globs")
    sub.add_argument("--tokenizer", default="", help="folder of a tokenizer or checkpoint, for npz and pt")
    sub.add_argument("--format", default="npz", choices=("npz", "pt", "jsonl"),
                     help="numpy archive, torch.save of a dict, or the rows themselves, not as tokens")
    sub.add_argument("--output", default="", help="file to write (left out: out/export/STAGE.FORMAT)")
    sub.add_argument("--max_length", type=cli.positive(int), default=2048, help="tokens of a row; longer ones are cut")
    cli.switch(sub, "--add_bos", 1, "begin every row with the tokenizer's first token, where it has one")
    cli.switch(sub, "--add_eos", 0, "pretrain: end every document that is not cut with the end token")
    reading(sub)
    return parser.parse_args(argv)


def main(args):
    """Run one command. Returns its facts."""
    return {"mix": mix, "inspect": inspect, "download": download, "export": export}[args.command](args)


if __name__ == "__main__":
    common.run(main, parse_args)
