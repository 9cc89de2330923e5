"""Byte-pair encoding: a vocabulary is learnt from text, and kept in a file that other programs read.

A text is cut into pieces by a regular expression (words, runs of up to three digits, punctuation, white space), each
piece becomes its UTF-8 bytes, and learned merges glue neighbouring bytes into longer tokens. Every byte is a token of
its own, so every text can be encoded. A vocabulary is no more than the pattern and the merges, in the order in which
they were learnt; tokenizer.json spells them out.

Learning here is the slow twin of the Rust trainer (rustbpe/): the same merges, 50 to 100 times slower, and the one to
read first.

What this file does not do: encode, know special tokens or conversations (tokenizer.py).

Papers: Gage 1994, A new algorithm for data compression; Sennrich et al. 2016 (arXiv 1508.07909); Radford et al. 2019
(GPT-2, byte-level BPE). Pattern: GPT-4's, in the spelling of Llama 3, which every engine reads alike.
"""

import functools
import heapq
import re
from collections import Counter, defaultdict

import regex
import tiktoken

# The order of alternatives matters: the first that matches wins. No possessive quantifier behind {1,3}: Hugging Face's
# engine reads "{1,3}+" as "one or more groups" and would cut digits differently from tiktoken.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a ByteLevel pre-tokenizer with use_regex=true means (MiniMind and other GPT-2 descendants)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A text with every kind of character: a split pattern must not lose any of them
PROBE = "We've 12345 x_y (z)!?  \t\r\n\n \u4f60\u597d\uff0c\u4e16\u754c\u3002 e\u0301\xa0\U0001f600\u200d\u0663 \x00 "
MAX_IDS = 2**24  # far above any real vocabulary: what a broken file asks for must not take all memory


# ---------------------------------------------------------------------------------------------------------------------
# 1. From text to merges


def repair(text):
    """Make a str valid Unicode: surrogate pairs become their character, lone surrogates U+FFFD.

    Python strings may hold lone surrogates (broken JSON escapes, undecodable file names); UTF-8 cannot.
    Returns (text, number of lone surrogates replaced).
    """
    if text.isascii():
        return text, 0
    try:
        text.encode()
    except UnicodeEncodeError:
        # UTF-16 without a byte order mark: a U+FEFF at the start of the text must survive
        fixed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return fixed, fixed.count("\ufffd") - text.count("\ufffd")
    return text, 0


@functools.cache
def class_fixes(pattern_classes=("\\p{L}", "\\p{N}")):
    """Characters that the `regex` package classes unlike tiktoken, each with a stand-in of the class tiktoken sees.

    The two carry different Unicode versions (regex knew 17,480 more letters and numbers when this was written). The
    encoder decides what a letter is, so the trainer has to ask it: with a pattern that matches only letters, tiktoken
    drops everything else, and what it returns is its table. Returns {code point: stand-in character}.
    """
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    fixes = {}
    for name, stand_in in zip(pattern_classes, "a1", strict=True):
        probe = tiktoken.Encoding("probe", pat_str=name + "+", mergeable_ranks=single_bytes, special_tokens={})
        seen = set(bytes(probe.encode_ordinary(every)).decode())
        here = set(regex.findall(name, every))
        fixes.update({ord(char): "\U0010fffd" for char in here - seen})  # neither letter nor number nor space
        fixes.update({ord(char): stand_in for char in seen - here})
    return fixes


def count_words(documents):
    """How often each piece occurs. A document is a boundary: no piece spans two. Returns Counter {bytes: count}."""
    splitter = regex.compile(PATTERN)
    fixes = class_fixes()  # empty where both packages carry the same Unicode version
    counts = Counter()
    for text in documents:
        masked = text if text.isascii() else text.translate(fixes)  # same length, so positions carry over
        counts.update(text[slice(*match.span())] for match in splitter.finditer(masked))
    return {word.encode(): count for word, count in counts.items()}


def learn_merges(words, num_merges, report=None):
    """Byte-pair encoding: again and again, make the most frequent pair of neighbours a new token.

    words: {bytes: count}. Returns at most num_merges pairs (left id, right id); merge i creates id 256 + i.
    Ties go to the smallest (left, right), so the result does not depend on the order of anything.
    Every merge only touches the words that hold the pair; the queue is lazy: a count that has sunk since it was
    queued is queued again with its true value (counts of a waiting pair never rise, since new pairs have a new id).
    """
    sequences = [list(word) for word in words]  # a byte's id is its value
    weights = list(words.values())
    counts = Counter()
    holders = defaultdict(set)  # pair -> indices of words that held it at some time
    for index, ids in enumerate(sequences):
        for pair in zip(ids, ids[1:], strict=False):
            counts[pair] += weights[index]
            holders[pair].add(index)
    # heapq pops the smallest: the count is negated, and among equal counts the smaller pair comes first by itself
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    merges = []
    while queue and len(merges) < num_merges:
        queued, pair = heapq.heappop(queue)
        if counts[pair] != -queued:
            if counts[pair] > 0:
                heapq.heappush(queue, (-counts[pair], pair))
            continue
        new_id = 256 + len(merges)
        merges.append(pair)
        changed = set()
        for index in holders.pop(pair):
            before = sequences[index]
            after = _merge(before, pair, new_id)
            if len(after) == len(before):
                continue  # the word lost this pair to an earlier merge
            sequences[index] = after
            for old in zip(before, before[1:], strict=False):
                counts[old] -= weights[index]
            for new in zip(after, after[1:], strict=False):
                counts[new] += weights[index]
                if new_id in new:
                    holders[new].add(index)
                    changed.add(new)
        for new in changed:
            heapq.heappush(queue, (-counts[new], new))
        if report and len(merges) % 100 == 0:
            report(len(merges))
    return merges


def _merge(ids, pair, new_id):
    """Replace every occurrence of pair, from left to right ("aaa" with (a, a) becomes "aa" + "a")."""
    merged = []
    position = 0
    while position < len(ids):
        if ids[position] == pair[0] and position + 1 < len(ids) and ids[position + 1] == pair[1]:
            merged.append(new_id)
            position += 2
        else:
            merged.append(ids[position])
            position += 1
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# 2. tokenizer.json, written


def byte_alphabet():
    """The printable stand-in of each byte in tokenizer.json (GPT-2's table): list of 256 one-character strings.

    Printable Latin-1 bytes stand for themselves, the other 68 are moved up to U+0100 and on.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in range(256)]
    for shift, byte in enumerate(sorted(set(range(256)) - set(kept))):
        letters[byte] = chr(256 + shift)
    return letters


def tokenizer_json(merges, specials):
    """tokenizer.json as a dict, in the form that transformers 4.51 to 5.x, tokenizers and llama.cpp read alike.

    merges: pairs of ids, merge i makes id 256 + i. specials: texts of the special tokens, whose ids follow.
    """
    letters = byte_alphabet()
    spelled = list(letters)  # index = id
    for left, right in merges:
        spelled.append(spelled[left] + spelled[right])
    # "normalized": false matches the marker in the raw text; "special" lets split_special_tokens=True leave it text
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(spelled) + index, "content": text, **token} for index, text in enumerate(specials)]
    # Split cuts, ByteLevel only spells bytes as letters: with use_regex true it would cut a second time
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        # tiktoken looks a whole piece up before it merges; this asks the same of other engines
        "ignore_merges": True,
        "vocab": {text: index for index, text in enumerate(spelled)},
        "merges": [[spelled[left], spelled[right]] for left, right in merges],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        # none: any text must come back as it was
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        # no bos by itself: the chat template writes it, and a second one would follow
        "post_processor": None,
        # all four fields are needed: {"type": "ByteLevel"} alone is refused
        "decoder": byte_level,
        "model": model,
    }


# ---------------------------------------------------------------------------------------------------------------------
# 3. tokenizer.json, read


def refusal(what, rule):
    """The error for a tokenizer.json that this file could only read with different ids. Refusing beats guessing."""
    return ValueError(f"tokenizer.json: {what}; {rule}; use a byte-level BPE tokenizer (GPT-2, Llama 3, Qwen style)")


def _read_pattern(spec):
    """The split pattern of a tokenizer.json, in tiktoken's spelling."""
    stage = spec.get("pre_tokenizer") or {}
    stages = stage.get("pretokenizers", []) if stage.get("type") == "Sequence" else [stage]
    splits = [stage for stage in stages if stage.get("type") == "Split"]
    levels = [stage for stage in stages if stage.get("type") == "ByteLevel"]
    if len(levels) != 1 or len(splits) > 1 or len(splits) + 1 != len(stages):
        found = [stage.get("type") for stage in stages]
        raise refusal(f"pre_tokenizer is {found}", "it must be ByteLevel, or one Split and ByteLevel")
    if levels[0].get("add_prefix_space"):
        raise refusal("add_prefix_space is true", "this reader adds no space in front of a text")
    if not splits:
        # the default of use_regex is true: older files leave it out
        if not levels[0].get("use_regex", True):
            raise refusal("no split pattern", "a Split or use_regex must cut the text into words")
        return GPT2_PATTERN
    # ids of such a double cut were measured to differ on every real text (a space goes to the wrong side)
    if levels[0].get("use_regex", True):
        raise refusal("Split followed by ByteLevel with use_regex", "only one of them may split")
    if splits[0].get("behavior") != "Isolated" or splits[0].get("invert") or "Regex" not in splits[0]["pattern"]:
        raise refusal("a Split that is not an isolated regular expression", "nothing else is read")
    # Hugging Face's engine reads {1,3}+ as "one or more groups of up to three", tiktoken as possessive
    pattern = re.sub(r"(\\p\{N\}\{1,3\})\+", r"(?:\1)+", splits[0]["pattern"]["Regex"])
    _check_pattern(pattern)
    return pattern


def _check_pattern(pattern):
    """Refuse an expression that leaves text out, matches nothing, or does not come to an end: tiktoken would lose the
    text or abort the process."""
    try:
        pieces = [match[0] for match in regex.finditer(pattern, PROBE, timeout=5)]
    except (regex.error, TimeoutError, RecursionError) as error:
        raise refusal(f"split pattern {pattern!r:.100} ({error})", "it is a regular expression") from None
    if "".join(pieces) != PROBE or "" in pieces:
        raise refusal(f"split pattern {pattern!r:.100}", "it cuts every text into pieces and leaves nothing out")


def _read_nfc(spec):
    """Whether text is brought to Unicode form NFC before splitting (Qwen does)."""
    stage = spec.get("normalizer")
    if stage is None:
        return False
    stages = stage.get("normalizers", []) if stage.get("type") == "Sequence" else [stage]
    if any(stage.get("type") != "NFC" for stage in stages):
        raise refusal(f"normalizer is {[stage.get('type') for stage in stages]}", "only NFC or none is read")
    return bool(stages)


def _read_ranks(spec, added):
    """{bytes: id} of the ordinary tokens. tiktoken merges in the order of ids, so merges must be listed in that order
    and must make exactly the tokens longer than a byte."""
    model = spec.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise refusal(f"model is {model.get('type')!r}", "it must be BPE with merges")
    letters = byte_alphabet()
    byte_of = str.maketrans({letter: chr(byte) for byte, letter in enumerate(letters)})
    known = set(letters)
    ranks = {}
    for text, index in model["vocab"].items():
        if text in added:
            continue  # some projects list control tokens in the vocabulary too
        if not text or not known.issuperset(text):
            raise refusal(f"token {index} is {text!r}", "tokens are spelled in the 256 letters of GPT-2's byte table")
        ranks[text.translate(byte_of).encode("latin-1")] = index
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise refusal(f"{len(missing)} bytes have no token, first 0x{missing[0]:02x}", "all 256 must")
    last = -1
    made = set()
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge  # "a b" until tokenizers 0.20
        if len(pair) != 2 or not model["vocab"].keys() >= {*pair, "".join(pair)}:
            raise refusal(f"merge {merge!r:.100}", "a merge joins two tokens of the vocabulary to a third")
        index = model["vocab"]["".join(pair)]
        # equal is fine: files converted from tiktoken (Llama 3) list every way to make a token
        if index < last:
            raise refusal(f"merge {merge!r} makes id {index} after id {last}", "merges must be in the order of ids")
        last = index
        made.add(index)
    # tiktoken joins any two neighbours that spell a token, so a token that others cannot reach would change ids;
    # with ignore_merges others take it whole, as tiktoken does
    orphans = [token for token, index in ranks.items() if len(token) > 1 and index not in made]
    if orphans and not model.get("ignore_merges"):
        raise refusal(f"{len(orphans)} tokens have no merge, first {orphans[0]!r}", "each token needs its merge")
    return ranks


def read_tokenizer_json(spec):
    """What a tokenizer.json says, ours or another project's: (split pattern, whether text is brought to NFC,
    {bytes: id} of the ordinary tokens, {text: id} of the special ones). Nothing is guessed from names of classes or
    folders. Raises ValueError for what could only be read with different ids."""
    added = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    if "" in added or len(set(added.values())) != len(added):
        raise refusal("an empty or doubled special token", "each has a text and an id of its own")
    pattern, nfc, ranks = _read_pattern(spec), _read_nfc(spec), _read_ranks(spec, added)
    ids = [*ranks.values(), *added.values()]
    if not all(type(n) is int and 0 <= n < MAX_IDS for n in ids) or len(set(ids)) != len(ids):
        raise refusal("an id that is doubled, negative, too large or no number",
                      f"each token has an id of its own below {MAX_IDS}")
    return pattern, nfc, ranks, added
