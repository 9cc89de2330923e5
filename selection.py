"""Which rows a mix takes: its config, the language of a text, duplicates, evaluation items, and the choice by hash.

How near duplicates are found. Two texts are as alike as their sets of five-character pieces (Jaccard similarity s).
MinHash: hash all pieces, and keep the smallest hash in each of 11 ranges; two texts have the same minimum in a range
with probability s. That is done with 11 hash functions, and texts with the same 11 minima for one of them count as
duplicates. It happens with probability 1 - (1 - s^11)^11: 2% at s = 0.55, 63% at 0.8, 98% at 0.9. The first text stays.

How evaluation items are found. Whoever shares 13 words in a row with a question of a benchmark has copied it or its
source: that is the rule of GPT-3 and of the tool with which lm-evaluation-harness cleans training data. Chinese has no
spaces; 20 characters take the place of 13 words. Shorter items are looked for as a whole. The runs of all items wait in
memory as sorted hashes (75 MB for all benchmarks that eval.py knows), and every row is looked up as it passes.

What this file does not do: read or write rows (prepare_data.py), or tell languages of one script apart.
Papers: Broder 1997 (MinHash), Li, Owen and Zhang 2012 (one permutation), Shrivastava and Li 2014 (empty ranges), Brown
et al. 2020 (GPT-3, appendix C: shared runs of words).
Commands: used by prepare_data.py mix and inspect.
"""
import functools
import json
import re
import unicodedata
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# Rows wanted of a category that the config does not set: a chat model's diet, with little of what is learnt quickly
TARGETS = {"general": {"count": 460_000}, "knowledge": {"count": 100_000}, "math": {"count": 8_000},
           "identity": {"count": 2_000, "max_repeat": 2}, "preference": {"count": 60_000}}
EXAMPLE = ('{"sources": [{"name": "chats", "category": "general", "path": "my/*.jsonl"}], '
           '"targets": {"general": {"count": 10000}}}')
SHINGLE = 5        # characters of a piece: about a word of English, a phrase of Chinese
BANDS = 11         # hash functions of a signature, and minima of each
NEAR_LENGTH = 200  # shorter texts are compared exactly: "2 + 3?" and "2 + 4?" are near, and not the same
ODD = np.uint64(0x9E3779B97F4A7C15)
WORD_RUN = 13      # words in a row that only a copy has in common with an evaluation item (GPT-3, appendix C)
HAN_RUN = 20       # the same in Han characters: words of running Chinese have about 1.5 characters
WORD_WHOLE, HAN_WHOLE = 8, 12  # items below a run are found whole, down to GPT-3's shortest run; Han again times 1.5
BETWEEN_HAN = re.compile("(?<=[\u3400-\u9fff]) (?=[\u3400-\u9fff])")
ENDS = " .?!。…\"'“”"  # what may differ around questions that are compared as they are
WORDS = re.compile("[\u3400-\u9fff]|[^\\W_\u3400-\u9fff]+")  # a Han character counts as a word


# ---------------------------------------------------------------------------------------------------------------------
# 1. Languages, and the config of a mix


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


def _is_text(value):
    return isinstance(value, str) and bool(value)


def _is_share(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_count(value):
    return type(value) is int and 0 <= value < 10**15  # beyond it no array counts


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
# the same for the fields of the config itself, but for those of which its sources and targets take care
CONFIG_RULES = {
    "sources": ("a list", lambda value: isinstance(value, list)),
    "near_duplicates": ("true or false", lambda value: isinstance(value, bool)),
    "exclude": (f"{RULES['path'][0]} (the files whose questions must stay out of training)", RULES["path"][1]),
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

    def refusal(self, text):
        """Why the filters leave a text out, or "" where they do not."""
        if len(text) < self.min_chars:
            return "too short"
        if len(text) > self.max_chars:
            return "too long"
        return "other language" if self.languages and language(text) not in self.languages else ""


def _checked_keys(given, known, what):
    """Raise ValueError for anything but a JSON object with known keys: a misspelt one would be ignored in silence."""
    if not isinstance(given, dict) or set(given) - set(known):
        found = ", ".join(sorted(set(given) - set(known))) if isinstance(given, dict) else repr(given)[:60]
        raise ValueError(f"{what}: found {found}; the keys are {', '.join(known)}; write the config as {EXAMPLE}")


def read_config(path):
    """(list of Source, {category: {"count" or "share", "max_repeat"}}, config) of a mix. Raises ValueError."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {path}: {error}; it must hold one JSON object; write {EXAMPLE}") from None
    shared = ("val_ratio", "min_chars", "max_chars", "languages")
    _checked_keys(config, ("sources", "targets", "total", "seed", "near_duplicates", "exclude", *shared),
                  f"--config {path}")
    for key, (rule, holds) in CONFIG_RULES.items():
        if key in config and not holds(config[key]):
            raise ValueError(f"--config {path}: {key} is {config[key]!r:.60}; it must be {rule}; write {EXAMPLE}")
    sources = []
    for given in config.get("sources", []):
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


def sizes_itself(target):
    """Whether a target of the config says how many rows it wants; else those of TARGETS are wanted."""
    return bool({"count", "share"} & target.keys())


def _targets(path, config, categories):
    """{category: {"count", "max_repeat"}}, the given ones over TARGETS; count None = all rows."""
    given = config.get("targets", {})
    _checked_keys(given, sorted(categories), f"--config {path}, targets (of the categories of the sources)")
    targets = {}
    for category in sorted(categories):
        target = given.get(category, {})
        _checked_keys(target, ("count", "share", "max_repeat"), f"--config {path}, target {category}")
        target = target if sizes_itself(target) else TARGETS.get(category, {}) | target
        if "count" in target and "share" in target:
            raise ValueError(f"--config {path}, target {category}: count {target['count']!r} and share "
                             f"{target['share']!r}; each says how many rows are wanted; leave one of them out")
        share, total, repeat = target.get("share"), config.get("total"), target.get("max_repeat", 1)
        if share is not None and (not (_is_share(share) or share == 1) or not share or not _is_count(total)):
            raise ValueError(f"--config {path}, target {category}: share is {share!r} with total {total!r}; a share "
                             "lies above 0 and up to 1 and needs a total; give \"total\": the number of rows of which "
                             "it is a share")
        count = target.get("count", None if share is None else round(share * total))
        if not (_is_count(repeat) and repeat and (count is None or _is_count(count) and count)):
            raise ValueError(f"--config {path}, target {category}: count {count!r}, max_repeat {repeat!r}; both are "
                             'whole numbers above 0 and below 10^15; write {"count": 10000, "max_repeat": 2}')
        if repeat > 1 and count is None:
            raise ValueError(f"--config {path}, target {category}: max_repeat {repeat} without a count; rows are only "
                             'repeated to reach a number of them; write {"count": 10000, "max_repeat": 2}')
        targets[category] = {"count": count, "max_repeat": repeat}
    return targets


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

    def add(self, exact, question, text, kind):
        """Append a row by its two hashes and its text; rows of another `kind` (a small number) are never near to it."""
        bands = signature(text) if len(self.files) > 2 else None
        bands = [exact] * BANDS if bands is None else bands + np.uint64(kind)
        record = np.array([exact, question, *bands], np.uint64)
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


def plain(text):
    """A text in small letters, with single spaces and without full-width forms."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


class Contamination:
    """The texts of evaluation items as hashes, and the search for them in rows: only the items are held in memory.

    A row is contaminated by a run of WORD_RUN words (HAN_RUN Han characters) that stands in an item; by a shorter item
    as a whole, down to WORD_WHOLE words (HAN_WHOLE characters); by a still shorter one where a question of the row is
    just that; or by a question that is a near duplicate of an item (signature()).
    """

    def __init__(self):
        self.places, self.lengths = [], set()  # of the items: where they stand; numbers of words of the runs
        self.short = {}  # items too short for runs -> where they stand
        self.hashes, self.owners = array("Q"), array("I")

    def add(self, text, where):
        """Take up a text of an item; texts without a letter or digit are left out."""
        words = WORDS.findall(plain(text))
        if not words:
            return
        han = 2 * sum("\u3400" <= word <= "\u9fff" for word in words) > len(words)
        run, whole = (HAN_RUN, HAN_WHOLE) if han else (WORD_RUN, WORD_WHOLE)
        *_, (length, hashes) = runs(self._values(words), run)
        if length < whole:
            self.short[plain(text).strip(ENDS)] = where
            hashes = hashes[:0]
        else:
            self.lengths.add(length)
        near = signature(text)
        for number in {*hashes.tolist(), *([] if near is None else near.tolist())}:
            self.hashes.append(number)
            self.owners.append(len(self.places))
        self.places.append(where)

    def find(self, parts, questions):
        """{"item": its place, "kind": of match, "text": of the row} for an item that is in a row, or None.

        parts: the texts of the row one by one; questions: those of them that are asked, or the document.
        """
        if not self.places:
            return None
        for part in parts:
            words = WORDS.findall(plain(part))
            for length, hashes in runs(self._values(words), HAN_RUN):
                if length in self.lengths and (hit := self._look_up(hashes)):
                    shown = " ".join(words[hit[1]:hit[1] + length])
                    return {"item": hit[0], "kind": "same words", "text": BETWEEN_HAN.sub("", shown)}
        for question in questions:
            if place := self.short.get(plain(question).strip(ENDS)):
                return {"item": place, "kind": "same question", "text": question}
            near = signature(question)
            if near is not None and (hit := self._look_up(near)):
                return {"item": hit[0], "kind": "near duplicate", "text": question[:100]}
        return None

    @staticmethod
    def _values(words):
        # Python's hash of a text differs from run to run, but every comparison here is within one
        return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)

    @functools.cached_property
    def _index(self):
        """(sorted hashes, their owners, a table that says for the last bits of a hash whether any has them)."""
        hashes, first = np.unique(np.array(self.hashes, np.uint64), return_index=True)
        table = np.zeros(1 << (8 * len(hashes)).bit_length(), bool)  # at most one in eight is set
        table[hashes & np.uint64(len(table) - 1)] = True
        return hashes, np.array(self.owners, np.uint32)[first], table

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


# ---------------------------------------------------------------------------------------------------------------------
# 4. The choice


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


def plan(prints, contaminated, sources, sizes, targets, salt, ratio, counts):
    """Which rows are written how often: (copies in train int64 [N], held out bool [N]).

    Rows with evaluation items (numbers of rows `contaminated`) and duplicates leave first, then every category is
    brought to its size, then the questions that any source holds out leave training everywhere. sizes: rows of every
    source; salt: the number that stands for a seed; counts: {source name: Counter}, to which the reasons are added.
    """
    leaked = np.zeros(prints.count, bool)
    leaked[contaminated] = True
    exact, near = (found & ~leaked for found in prints.duplicates())
    clean = ~(leaked | exact | near)
    owner = np.repeat(np.arange(len(sources)), sizes)                                   # [N], source of a row
    # another order for every seed, but the same for the same text
    priority = (prints.column(0) ^ np.uint64(salt)) * ODD                               # [N]
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
