"""One measurement of bench/tokenizer.py: one contender, one task, in a process of its own.

A process of its own starts cold and has a peak memory of its own. This file imports a contender only when it is asked
for, so the same file runs in the project's environment (`ours`) and in the peers'. The job comes as JSON in argv[1]:
task (train, files, save, encode, compress), contender, paths, vocab_size (without special tokens), threads, tokenizer
(a folder). Prints one JSON line: seconds, bytes of text, peak_mb, start_mb (before the task), digest of the result.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def peak_mb():
    """Largest resident size of this process so far, in MB. (ru_maxrss would also count the process that started it.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1000
    return 0.0


# GPT-4's, as our tokenizer.json spells it; rustbpe has it built in
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_documents(paths):
    """Texts of JSONL files, as a list."""
    documents = []
    for path in paths:
        with open(path, encoding="utf-8", newline="\n") as lines:
            documents += [json.loads(line)["text"] for line in lines]
    return documents


# ---------------------------------------------------------------------------------------------------------------------
# Training: each returns the tokens above the 256 bytes, in order, as bytes (None where rules differ by design)


def save_ours(source, job):
    """Train and save the tokenizer that all encoders then use."""
    import tokenizer

    trained = tokenizer.train(source, job["vocab_size"] + len(tokenizer.SPECIALS), "rust", progress=False)
    trained.save_pretrained(job["tokenizer"])


def train_ours(source, job):
    import tokenizer

    merges, _ = tokenizer.learn(source, job["vocab_size"] - 256, "rust", job["threads"])
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens[256:]


def train_rustbpe(source, job):
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(source), vocab_size=job["vocab_size"])
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
    return [bytes(token) for token, rank in ranks if rank >= 256]


def train_tokenizers(source, job):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        source, trainers.BpeTrainer(vocab_size=job["vocab_size"], initial_alphabet=alphabet, show_progress=False)
    )
    return None  # ties go by other ids


def train_gigabpe(paths, job):
    import gigabpe

    gigabpe.train_bpe(paths, job["vocab_size"], pretokenizer="bytelevel", special_tokens=[], threads=job["threads"])
    return None  # a split of its own


# ---------------------------------------------------------------------------------------------------------------------
# Encoding: each returns a function from documents to (ids, offsets), ready to run


def read_ranks(folder):
    """{bytes: rank} of the ordinary tokens of a saved tokenizer."""
    spec = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in spec["added_tokens"]}
    # bytes are spelled as letters there, in GPT-2's table: printable ones as themselves, the others from U+0100 on
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = sorted(set(range(256)) - set(kept))
    byte_of = {chr(byte): byte for byte in kept} | {chr(256 + index): byte for index, byte in enumerate(moved)}
    vocabulary = spec["model"]["vocab"].items()
    return {bytes(byte_of[c] for c in text): rank for text, rank in vocabulary if text not in special}


def encode_ours(job):
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(job["tokenizer"])
    return lambda documents: tokenizer.encode_batch(documents, job["threads"])


def encode_tiktoken(job):
    import tiktoken

    ranks = read_ranks(job["tokenizer"])
    encoding = tiktoken.Encoding("bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(documents):
        # its array form takes one text at a time; its batch form, which uses threads, makes lists
        if job["threads"] > 1:
            rows = encoding.encode_ordinary_batch(documents, num_threads=job["threads"])
        else:
            rows = [encoding.encode_to_numpy(text, disallowed_special=()) for text in documents]
        return np.concatenate(rows), None

    return encode


def encode_tokenizers(job):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(job["tokenizer"] + "/tokenizer.json")

    def encode(documents):
        rows = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        return np.concatenate([row.ids for row in rows]), None

    return encode


def encode_gigatoken(job):
    import gigatoken

    tokenizer = gigatoken.Tokenizer(job["tokenizer"] + "/tokenizer.json")

    def encode(documents):
        rows = tokenizer.encode_batch(documents, parallel=job["threads"] > 1)
        return np.asarray(rows.layout.content.data), np.asarray(rows.layout.offsets)

    return encode


def encode_quicktok(job):
    import quicktok
    from quicktok import _import_core

    ranks = read_ranks(job["tokenizer"])
    folder = job["tokenizer"]
    _import_core.write_files(folder, "bench", ranks, {}, "llama3", False)
    _import_core.ensure_tables(folder, os.path.join(os.path.dirname(quicktok.__file__), "data"), "llama3", False)
    tokenizer = quicktok.Tokenizer("bench", folder)
    return lambda documents: tokenizer.encode_batch(documents, job["threads"])


def compress(job):
    """Bytes per token on test text, for vocabularies of several sizes and shares of Chinese in the training text.

    job: prose (files to train on first, in whatever format and language), pools {language: texts file}, tests
    {language: texts file}, megabytes, shares, vocab_sizes, others {name: folder}.
    Returns {"curves": [[share, vocabulary, English, Chinese], ...], "others": {name: [English, Chinese]}}.
    """
    import tokenizer

    tests = {language: read_documents([path]) for language, path in job["tests"].items()}
    pools = tokenizer.by_language(tokenizer.iter_texts([Path(path) for path in job["prose"]]))
    for language, path in job["pools"].items():
        pools[language] += read_documents([path])

    def rates(trained):
        return [tokenizer.bytes_per_token(trained, tests[language]) for language in ("English", "Chinese")]

    curves = []
    for share in job["shares"]:
        documents = []
        for language, part in (("English", 1 - share), ("Chinese", share)):
            size = 0
            for text in pools[language]:
                if size >= part * job["megabytes"] * 1e6:
                    break
                documents.append(text)
                size += len(text.encode())
        # the merges of a small vocabulary are the first of a large one
        merges, _ = tokenizer.learn(documents, max(job["vocab_sizes"]), "rust")
        for vocab_size in job["vocab_sizes"]:
            kept = merges[: vocab_size - 256 - len(tokenizer.SPECIALS)]
            trained = tokenizer.Tokenizer(tokenizer.folder_files(kept, vocab_size))
            curves.append([share, vocab_size, *rates(trained)])
    others = {name: rates(tokenizer.Tokenizer.from_pretrained(folder)) for name, folder in job["others"].items()}
    return {"curves": curves, "others": others}


def main(job):
    """Run one job. Returns the facts to print."""
    if job["task"] == "compress":
        return compress(job)
    if job["task"] == "encode":
        run = globals()["encode_" + job["contender"]](job)
        run(["warm", "up"])  # load what is loaded late; two words do not fill a cache
        source = read_documents(job["paths"])
        size = sum(len(text.encode()) for text in source)
    else:
        train = globals()[("save_" if job["task"] == "save" else "train_") + job["contender"]]
        size = sum(os.path.getsize(path) for path in job["paths"])
        as_list = job["task"] == "train" and job["contender"] != "gigabpe"
        source = read_documents(job["paths"]) if as_list else job["paths"]
        if job["contender"] == "ours" and not as_list:
            source = [Path(path) for path in source]
        __import__({"ours": "tokenizer"}.get(job["contender"], job["contender"]))  # not part of the work
        run = lambda source: train(source, job)  # noqa: E731
    start_mb = peak_mb()
    start = time.perf_counter()
    result = run(source)
    seconds = time.perf_counter() - start
    peak = peak_mb()  # before the result is turned over
    digest = None
    if job["task"] == "encode":
        digest = hashlib.sha256(np.asarray(result[0]).astype(np.uint32).tobytes()).hexdigest()[:12]
    elif result is not None:
        digest = hashlib.sha256(b"".join(b"%d %s" % (len(token), token) for token in result)).hexdigest()[:12]
    return {"seconds": seconds, "bytes": size, "start_mb": start_mb, "peak_mb": peak, "digest": digest}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
