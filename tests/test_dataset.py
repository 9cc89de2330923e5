"""Proves the data: every token a target once, order by (seed, epoch), masks on answers only, honest errors and caches.

    python -m pytest tests/test_dataset.py
"""
import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_rows import chat

import dataset
from arrays import ArrayFile
from dataset import PreferenceData, PretrainData, PromptData, SFTData, join_windows, pack, pad_rows

BOS, START, END, PAD = 256, 257, 258, 259


class ByteTokenizer:
    """Ids are UTF-8 bytes, four special ids behind them: rendering and counting can be checked by eye."""

    bos_id, im_start_id, im_end_id, eos_id, pad_id = BOS, START, END, END, PAD
    special_ids = {BOS, START, END, PAD}
    token_bytes = [bytes([i]) for i in range(256)] + [b"<|bos|>", b"<|im_start|>", b"<|im_end|>", b"<|pad|>"]
    vocab_size = 260

    def __init__(self, fingerprint="bytes"):
        self.fingerprint = fingerprint
        self.lock = threading.Lock()  # cannot be pickled, as the encoders of real tokenizers

    def encode_batch(self, texts):
        rows = [text.encode("utf-8", "replace") for text in texts]
        return np.frombuffer(b"".join(rows), np.uint8).astype(np.uint16), np.cumsum([0, *map(len, rows)])

    def render(self, messages, add_generation_prompt=False):
        ids, mask = [BOS], [0]
        for turn in messages:
            if turn["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"role {turn['role']!r} is unknown; rename it")
            head, body = [START, *f"{turn['role']}\n".encode()], [*turn["content"].encode(), END]
            ids += [*head, *body, 10]
            mask += [0] * len(head) + [int(turn["role"] == "assistant")] * len(body) + [0]
        prompt = [START, *b"assistant\n"] if add_generation_prompt else []
        return ids + prompt, mask + [0] * len(prompt)

    def decode(self, ids):
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", "replace")


@pytest.fixture
def make(tmp_path):
    """make(Class, rows or file, max_seq_len, ...) -> data set with a byte tokenizer and a cache of its own."""

    def build(kind, rows, max_seq_len=16, tokenizer=None, **settings):
        path = rows if isinstance(rows, (str, Path)) else write(tmp_path / "data.jsonl", rows)
        return kind(path, tokenizer or ByteTokenizer(), max_seq_len, tmp_path / "cache", **settings)

    return build


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(seed, count, longest=40):
    rng = random.Random(seed)
    drawn = ["".join(rng.choices("abc 中文é", k=rng.randint(1, longest))) for _ in range(count)]
    return [text.strip() or "x" for text in drawn]


def documents(*args):
    return [{"text": text} for text in texts(*args)]


# ---------------------------------------------------------------------------------------------------------------------
# Rows of other shapes, and of none


def test_turns_of_other_shapes_train_the_same_tokens(make):
    plain = make(SFTData, [{"conversations": chat("q", "a")}], 64).batch([0])
    for row in ({"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}):
        other = make(SFTData, [row], 64).batch([0])
        assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("kind, row, found", [
    (PretrainData, {"instruction": "a", "output": "b"}, r"\[instruction, output\]; expected text"),
    (PretrainData, {"text": 5}, r"\[text\]; expected text, a string"),
    (SFTData, {"text": "a"}, r"\[text\]; expected conversations"),
    (SFTData, {"conversations": []}, "expected a non-empty list"),
    (SFTData, {"messages": [{"who": "human", "text": "a"}]}, r"a turn with the keys \[who, text\]"),
    (SFTData, {"messages": [{"from": "human", "value": 3}]}, "3 as content"),
    (SFTData, {"instruction": "a"}, r"\[instruction\]; expected conversations .* instruction and output"),
    (SFTData, {"prompt": 5, "completion": "a"}, "5 as the turns"),
    (SFTData, {"instruction": "a", "history": [["q", 1]], "output": "b"}, "1 as content"),
    (SFTData, {"messages": [{"role": 5, "content": "a"}]}, "5 as role"),
    (PreferenceData, {"chosen": [{"role": [], "content": "a"}], "rejected": "b", "prompt": "q"}, r"\[\] as role"),
    (SFTData, {"instruction": "a", "history": 5, "output": "b"}, "5 as history"),
    (SFTData, {"instruction": "a", "history": [1], "output": "b"}, r"\[1\] as history"),
    (SFTData, {"instruction": "a", "history": [["q"]], "output": "b"}, "as history; expected .* a list of pairs"),
    (SFTData, {"instruction": "a", "input": 5, "output": "b"}, "5 as input"),
    (SFTData, {"system": 5, "prompt": "a", "completion": "b"}, "(?<!row: )found 5 as the turns"),
    (SFTData, {"messages": chat("q", "a")[:1] + [{"role": "assistant", "content": "a", "reasoning_content": 5}]},
     "5 as reasoning_content"),
    (PreferenceData, {"prompt": "a", "chosen": "b", "rejected": None}, "None as the turns"),
    (SFTData, {"messages": [{"role": "user", "content": None}]}, "None as content"),
    (SFTData, {"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "a"}]}, "'human'"),
    (PreferenceData, {"prompt": "a", "chosen": "b"}, r"\[prompt, chosen\]; expected prompt, chosen, rejected"),
    (PreferenceData, {"chosen": "a", "rejected": "b"}, r"\[chosen, rejected\]; expected prompt"),
    (PreferenceData, {"chosen": chat("p", "a"), "rejected": chat("q", "b")}, "differ before their last turn"),
    (PromptData, {"question": "a"}, r"\[question\]; expected conversations"),
    (PromptData, {"question": "a", "chosen": None}, "expected conversations"),
])
def test_wrong_keys_say_file_line_found_expected_and_fix(make, kind, row, found):
    good = {"text": "x", "conversations": chat("q", "a"), "prompt": "p", "chosen": "c", "rejected": "r"}
    keep = {PretrainData: ["text"], PreferenceData: ["prompt", "chosen", "rejected"]}.get(kind, ["conversations"])
    rows = [{key: good[key] for key in keep}, row]
    with pytest.raises(ValueError, match=f"data.jsonl:2: .*{found}") as error:
        make(kind, rows, 64)
    assert str(error.value).count("data.jsonl:2") == 1 and "--skip_bad 1" in str(error.value)
    assert make(kind, rows, 64, skip_bad=True).stats["bad"] == 1
    with pytest.raises(ValueError):  # the cache of the lenient start does not silence the strict one
        make(kind, rows, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining windows


@pytest.mark.parametrize("length", [2, 3, 7, 16, 1000])
def test_every_token_is_a_target_exactly_once(make, length):
    rows = documents(length, 30)
    data = make(PretrainData, rows, length)
    stream = [t for row in rows for t in (BOS, *row["text"].encode())]
    batch = data.batch(range(len(data)))
    targets = batch["ids"][batch["mask"] > 0].tolist()
    assert targets == stream[1:]
    assert batch["ids"].dtype == torch.int64 and not batch["mask"][:, 0].any()
    # the context of a window is the last token of the window before it
    assert batch["ids"][1:, 0].tolist() == batch["ids"][:-1, -1].tolist()
    size = sum(len(row["text"].encode()) for row in rows)
    assert int(batch["bytes"].sum()) == size == data.stats["bytes"]
    assert data.bytes_per_token == size / len(stream) and data.stats["tokens"] == len(stream)


def test_threads_change_nothing(make, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 50)  # many chunks
    rows = documents(1, 200)
    plain = np.array(make(PretrainData, rows).tokens.items)
    data = make(PretrainData, rows, tokenizer=ByteTokenizer("other"), workers=3)
    assert np.array_equal(plain, data.tokens.items)


def test_held_out_parts_are_disjoint_complete_and_do_not_depend_on_order(make, tmp_path):
    rows = documents(2, 400) + documents(2, 400)[:100]  # equal documents must land on one side

    def content(part, rows):
        data = make(PretrainData, write(tmp_path / "d.jsonl", rows), part=part, val_ratio=0.3)
        return Counter(bytes(piece[1:].astype(np.uint8)).decode() for piece in map(data.tokens.__getitem__,
                                                                                range(len(data.tokens))))

    train, val = content("train", rows), content("val", rows)
    assert not train.keys() & val.keys() and train + val == Counter(row["text"] for row in rows)
    assert 0.2 < sum(val.values()) / len(rows) < 0.4
    assert content("val", rows[::-1]) == val


def test_one_question_never_lies_on_both_sides(make):
    rows = [{"conversations": chat(f"question {i % 40}", f"answer {i}")} for i in range(400)]
    sides = [{data[i]["messages"][0]["content"] for i in range(len(data))}
             for data in (make(PromptData, rows, 64, part=part, val_ratio=0.3) for part in ("train", "val"))]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_epochs_are_different_permutations_fixed_by_the_seed(make):
    rows = documents(3, 60)
    data, again, other = (make(PretrainData, rows, seed=seed) for seed in (1, 1, 2))
    n = len(data)
    epochs = [data.position_batch(epoch * n, n) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert np.array_equal(epochs[2], again.position_batch(2 * n, n))  # resumed in the middle, without the epochs before
    assert not np.array_equal(epochs[0], other.position_batch(0, n))
    # random over windows: neighbours in the file are not neighbours in the order more often than by chance
    assert np.mean(np.abs(np.diff(epochs[0])) == 1) < 0.1
    assert data.order(n + 3) == epochs[1][3]
    assert data.position_batch(n - 2, 4).tolist() == [*epochs[0][-2:], *epochs[1][:2]]


def test_a_change_of_the_number_of_processes_neither_repeats_nor_loses_a_sample(make):
    data = make(PretrainData, documents(4, 90))
    n, size, position, seen = len(data), 3, 0, []
    ranks_of_step = [1] * 5 + [2] * 4 + [1] * 200
    for ranks in ranks_of_step:
        for rank in range(ranks):
            seen += data.position_batch(position + rank * size, size).tolist()
        position += ranks * size
    assert sorted(seen[:n]) == list(range(n)) and seen[: 2 * n] == data.position_batch(0, 2 * n).tolist()


def test_a_far_position_costs_one_shuffle(make, monkeypatch):
    data, shuffles, real = make(PretrainData, documents(4, 90)), [], dataset.shuffled
    monkeypatch.setattr(dataset, "shuffled", lambda *args: shuffles.append(args) or real(*args))
    data.position_batch(10**9 * len(data) + 5, 4)
    assert len(shuffles) == 1
    for epoch in range(20):
        data.order(epoch * len(data))
    assert len(data._orders) <= 2


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def test_packing_keeps_samples_whole_separate_and_rows_full():
    rng = np.random.default_rng(0)
    for trial in range(20):
        width = int(rng.integers(1, 60))
        lengths = rng.integers(1, width + 1, 300)
        rows = pack(lengths, rng.permutation(300), width)
        used = np.bincount(rows, weights=lengths)
        assert used.max() <= width and used.min() > 0
        # two rows that fit into one would be a wasted row; best fit leaves at most one row half empty
        assert (used <= width / 2).sum() <= 1, trial


def test_packed_rows_hold_every_sample_once_and_masks_only_its_answers(make):
    rng = random.Random(5)
    rows = [{"conversations": chat(*texts(i, 2 * rng.randint(1, 2), 12))} for i in range(80)]
    tokenizer = ByteTokenizer()
    data = make(SFTData, rows, 120)
    batch = data.batch(range(len(data)))
    found = []
    for ids, mask, documents_ in zip(batch["ids"], batch["mask"], batch["documents"], strict=True):
        real = documents_ >= 0
        assert (ids[~real] == PAD).all() and not mask[~real].any()
        assert real.int().diff().le(0).all()  # padding stands at the end only
        for number in range(int(documents_.max()) + 1):
            mine = documents_ == number
            found.append((ids[mine].tolist(), mask[mine].int().tolist()))
            assert int(mask[mine][0]) == 0  # the first token cannot be predicted from the sample before it
    expected = [tokenizer.render(row["conversations"]) for row in rows]
    assert sorted(found) == sorted((list(ids), list(mask)) for ids, mask in expected)
    s = data.stats
    trained = sum(sum(mask) for _, mask in expected)
    assert s["trained_share"] == trained / s["tokens"] and s["fill"] == s["tokens"] / (len(data) * 120) > 0.8
    assert s["roles"] == {"user": s["roles"]["assistant"], "assistant": s["roles"]["user"]}


def test_masks_cover_assistant_text_and_its_end_token_only(make):
    rows = [{"messages": chat("q1", "first", "q2", "second", system="be kind")}]
    batch = make(SFTData, rows, 200).batch([0])
    trained = ByteTokenizer().decode(batch["ids"][0][batch["mask"][0] > 0].tolist())
    assert trained == "first<|im_end|>second<|im_end|>"


def test_a_long_conversation_keeps_an_answer_token_or_is_dropped_and_counted(make):
    head = len(ByteTokenizer().render(chat("q"), add_generation_prompt=True)[0])
    rows = [{"conversations": chat("q", "a" * 5)}, {"conversations": chat("q" * 9, "a")}, {"conversations": chat("q")}]
    data = make(SFTData, rows, head + 1)
    s = data.stats
    assert (s["samples"], s["used"], s["truncated"], s["dropped"]) == (3, 1, 1, 2)
    assert s["reasons"] == {"without an answer": 1, f"no answer token within {head + 1}": 1}
    batch = data.batch([0])
    assert batch["ids"][0][batch["mask"][0] > 0].tolist() == [ord("a")]  # cut: no end token is invented
    assert "3 samples: 1 used, 1 truncated, 2 dropped" in data.summary() and "\n" not in data.summary()
    with pytest.raises(ValueError, match=f"no usable sft sample among 3 rows.*setting that works is {head + 1} "):
        make(SFTData, rows, head)


def test_windows_below_conversations_are_documents_of_their_own(make):
    rows = make(SFTData, [{"conversations": chat("a", "b")}], 24).batch([0])
    windows = make(PretrainData, [{"text": "abcdefghijklmnopqrstuvwxyz"}], 24)
    both = join_windows(rows, windows.batch([0, 1]))  # the second window holds the last 4 of 27 tokens
    assert all(torch.equal(both[name][:1], rows[name]) for name in ("ids", "mask", "documents"))
    assert both["documents"][1:].tolist() == [[0] * 24, [0] * 4 + [-1] * 20]
    assert both["mask"][1:].tolist() == [[0] + [1] * 23, [0] + [1] * 3 + [0] * 20]
    assert both["ids"][2, :4].tolist() == windows.batch([1])["ids"][0, :4].tolist() == list(b"wxyz")


def test_each_epoch_sees_every_packed_row_once(make):
    data = make(SFTData, [{"conversations": chat(*texts(i, 2))} for i in range(60)], 100)
    assert sorted(data.position_batch(len(data), len(data))) == list(range(len(data)))


# ---------------------------------------------------------------------------------------------------------------------
# Preferences and prompts


@pytest.mark.parametrize("row", [
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"prompt": chat("q"), "chosen": "good", "rejected": "bad"},
    {"prompt": chat("q"), "chosen": [{"role": "assistant", "content": "good"}],
     "rejected": [{"role": "assistant", "content": "bad"}]},
    {"chosen": chat("q", "good"), "rejected": chat("q", "bad")},
    {"prompt": "q", "chosen": chat("q", "good"), "rejected": chat("q", "bad"), "kind": "all"},
    {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    {"messages": chat("q"), "chosen": "good", "rejected": "bad"},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
     "rejected": {"from": "gpt", "value": "bad"}},
])
def test_all_preference_formats_give_the_same_pair(make, row):
    data = make(PreferenceData, [row], 64)
    batch = data.batch([0])
    prompt = ByteTokenizer().render(chat("q"), add_generation_prompt=True)[0]
    chosen, rejected = [*prompt, *b"good", END], [*prompt, *b"bad", END]
    sides, masks = (chosen, rejected), ([0] * len(prompt) + [1] * 5, [0] * len(prompt) + [1] * 4)
    assert len(chosen) < 32, "rows are padded to a multiple of 32"
    assert batch["ids"].tolist() == [side + [PAD] * (32 - len(side)) for side in sides]
    assert batch["lengths"].tolist() == [len(chosen), len(rejected)]
    assert batch["mask"].int().tolist() == [mask + [0] * (32 - len(mask)) for mask in masks]
    assert batch["kind"] == ["all"] and data.stats["kinds"] == {"all": 1}


def test_chosen_rows_come_first_and_a_system_text_is_put_in_front(make):
    rows = [{"prompt": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}", "kind": kind, "system": "s"}
            for i, kind in enumerate("xyz")]
    batch = make(PreferenceData, rows, 99).batch([2, 0])
    answers = [ByteTokenizer().decode(ids[mask > 0].tolist())
               for ids, mask in zip(batch["ids"], batch["mask"], strict=True)]
    assert answers == ["c2<|im_end|>", "c0<|im_end|>", "r2<|im_end|>", "r0<|im_end|>"] and batch["kind"] == ["z", "x"]
    assert ByteTokenizer().decode(batch["ids"][0].tolist()).startswith("<|bos|><|im_start|>system\ns<|im_end|>")


def test_useless_pairs_are_dropped_and_counted_by_reason(make):
    rows = [{"prompt": "q", "chosen": "same", "rejected": "same"}, {"prompt": "q", "chosen": " ", "rejected": "b"},
            {"prompt": "q" * 90, "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "chosen": "a" * 90 + "1", "rejected": "a" * 90 + "2"}]
    data = make(PreferenceData, rows, 60)
    assert data.stats["used"] == len(data) == 1 and data.stats["dropped"] == 4
    assert data.stats["reasons"] == {"with equal answers": 1, "with an empty answer": 1,
                                     "without room for an answer": 1, "with equal answers after the cut": 1}


def test_a_long_prompt_loses_whole_turns_from_its_start_and_keeps_system_and_question(make):
    turns = ["old question", "old answer", "mid", "answer", "new"]
    for first in (0, 2, 4):  # the oldest turn that is kept
        expected = chat(*turns[first:], system="sys")
        ids = ByteTokenizer().render(expected, True)[0] + [*b"good", END]
        row = {"prompt": chat(*turns, system="sys"), "chosen": "good", "rejected": "b"}
        data = make(PreferenceData, [row], len(ids))  # this much fits exactly
        assert data.batch([0])["ids"][0, : len(ids)].tolist() == ids and data.stats["truncated"] == int(first > 0)
        assert data.batch([0])["lengths"][0] == len(ids)


def test_prompts_carry_what_a_checker_needs(make):
    rows = [{"conversations": chat("q1", "a1"), "answer": "a1", "check": "exact", "lang": "en", "skill": "add"},
            {"conversations": chat("q2", "")}, {"conversations": chat("q3")}, {"conversations": chat("q" * 90)},
            {"prompt": "q4", "chosen": "c", "rejected": "r", "answer": 7}, {"messages": chat("q", "a")[1:]}]
    data = make(PromptData, rows, 40)
    assert [item["messages"] for item in data.items] == [chat(q) for q in ("q1", "q2", "q3", "q4")]
    assert data.items[0] == {"ids": ByteTokenizer().render(chat("q1"), add_generation_prompt=True)[0], "answer": "a1",
                             "messages": chat("q1"), "check": "exact", "lang": "en", "skill": "add", "index": 0}
    assert data.items[1]["answer"] is None and data.items[3]["answer"] == 7
    assert [item["index"] for item in data.items[1:3]] == [1, 2]
    assert data.stats["reasons"] == {"longer than 40 tokens": 1, "without a question": 1}


SHOWN = {"pretrain": (PretrainData, [{"text": f"text number {i}, 猫"} for i in range(9)]),
         "sft": (SFTData, [{"conversations": chat(f"q{i}", "回答" * (1 + i % 3))} for i in range(9)]),
         "preference": (PreferenceData, [{"prompt": f"q{i}", "chosen": "yes" * i, "rejected": "no"}
                                         for i in range(1, 9)])}


@pytest.mark.parametrize("name", SHOWN)
def test_shown_samples_are_those_of_the_next_batch_without_padding(name, make):
    kind, rows = SHOWN[name]
    data = make(kind, rows, max_seq_len=120 if name != "pretrain" else 16)
    for position in (0, 1, len(data) - 1):  # also across the end of an epoch
        batch = data.batch(data.position_batch(position, 2))
        order = [0, 2, 1, 3] if name == "preference" else [0, 1]  # a batch has all chosen rows first
        shown = data.samples(position)
        assert len(shown) == len(order)
        documents = batch.get("documents", torch.zeros_like(batch["ids"]))  # only SFT puts several into a row
        for (title, ids, mask), row in zip(shown, order, strict=True):
            trained = (batch["mask"][row] * (documents[row] == 0)).tolist()  # of the row's first sample
            assert batch["ids"][row][:len(ids)].tolist() == ids
            assert trained == mask + [0] * (len(trained) - len(mask)), "nothing that is trained is missing"
            assert title.startswith(f"{name} sample ")


def test_shown_prompts_have_no_targets_and_one_sample_is_enough(make):
    data = make(PromptData, [{"conversations": chat("q", "")}], max_seq_len=60)
    (_, ids, mask), = data.samples(5)
    assert ids == data[0]["ids"] and mask == [0] * len(ids)


def test_pad_rows_rounds_up_to_a_multiple():
    ids, lengths = pad_rows([[1, 2, 3], [4]], pad_id=9, multiple=4)
    assert ids.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]] and lengths.tolist() == [3, 1] and ids.dtype == torch.int64
    assert pad_rows([], 0)[0].shape == (0, 0)


def test_a_real_tokenizer_serves_all_data_sets(tokenizer, make):
    pairs = [{"prompt": chat("What is 2?", "2", "棕色 is?"), "chosen": "Sure! 小猫", "rejected": "\n x"}]
    batch = make(PreferenceData, pairs, 256, tokenizer).batch([0])
    for row, text in ((0, "Sure! 小猫"), (1, "\n x")):
        ids, mask = tokenizer.render([*pairs[0]["prompt"], {"role": "assistant", "content": text}])
        length = int(batch["lengths"][row])
        # all but the line break after the end token, and only the last answer is trained
        assert batch["ids"][row, :length].tolist() == ids[:length] and ids[length - 1] == tokenizer.eos_id
        last = len(tokenizer.render(pairs[0]["prompt"], add_generation_prompt=True)[0])
        assert batch["mask"][row].nonzero().flatten().tolist() == [i for i, m in enumerate(mask) if m and i >= last]
    rows = documents(9, 50)
    data = make(PretrainData, rows, 32, tokenizer)
    size = sum(len(row["text"].encode()) for row in rows)
    assert int(data.batch(range(len(data)))["bytes"].sum()) == data.stats["bytes"] == size
    assert make(SFTData, [{"conversations": chat("a", "b")}], 64, tokenizer).stats["used"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Too little data


@pytest.mark.parametrize("kind", [PretrainData, SFTData, PreferenceData, PromptData])
def test_an_empty_file_is_an_error_with_counts(make, kind, tmp_path):
    with pytest.raises(ValueError, match="no usable .* among 0 rows of .*data.jsonl: empty; .*--data_path"):
        make(kind, [])
    with pytest.raises(ValueError, match=f"no {kind.kind} data files"):
        kind(None, ByteTokenizer(), 16, tmp_path)


def test_fewer_samples_than_one_step_takes_name_the_largest_setting_that_works(make):
    rows = [{"text": "x" * 99}]  # 100 tokens
    with pytest.raises(ValueError, match=r"hold 7 windows of up to 16 tokens, one step takes 9.*at most 7, or "
                                         r"--max_seq_len 12$"):
        make(PretrainData, rows, min_samples=9)
    assert len(make(PretrainData, rows, 12, min_samples=9)) == 9
    assert len(make(PretrainData, rows, min_samples=7)) == 7


def test_an_empty_part_and_impossible_settings_are_refused(make):
    rows = [{"text": "only one"}]
    part = "train" if dataset.split_heldout("only one", 0.5) else "val"
    with pytest.raises(ValueError, match=f"1 not in part {part}.*--val_path"):
        make(PretrainData, rows, part=part, val_ratio=0.5)
    for settings in (dict(part="val"), dict(part="test"), dict(val_ratio=1.0)):
        with pytest.raises(ValueError, match="--val_ratio 0.01"):
            make(PretrainData, rows, **settings)
    with pytest.raises(ValueError, match="max_seq_len 1"):
        make(PretrainData, rows, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def count_builds(monkeypatch):
    builds, real = [], dataset.TokenData._build
    monkeypatch.setattr(dataset.TokenData, "_build", lambda self, facts: builds.append(facts) or real(self, facts))
    return builds


def test_the_cache_is_used_again_until_something_it_depends_on_changes(make, tmp_path, count_builds, capsys):
    path = write(tmp_path / "d.jsonl", [{"conversations": chat("q", f"answer {i}")} for i in range(9)])
    first = make(SFTData, path, 64)
    second = make(SFTData, path, 64)
    assert len(count_builds) == 1 and first.stats == second.stats and not capsys.readouterr().out
    path.touch()  # a new time with the same content is the same data
    make(SFTData, path, 64)
    assert len(count_builds) == 1
    make(SFTData, path, 64, ByteTokenizer("another"))
    assert "was built with tokenizer bytes, now another: rebuilding" in capsys.readouterr().out
    make(SFTData, path, 48)
    assert "max_seq_len 64, now 48" in capsys.readouterr().out
    write(path, [{"conversations": chat("q", "other")}])
    assert make(SFTData, path, 48).stats["used"] == 1
    assert "built with data [" in capsys.readouterr().out and len(count_builds) == 4


def test_fingerprint_names_content_tokenizer_and_row_length_but_not_the_order(make, tmp_path):
    rows = [{"text": "one two three"}, {"text": "four five six seven"}]
    first = make(PretrainData, rows).fingerprint
    moved = write(tmp_path / "moved.jsonl", rows)
    assert make(PretrainData, moved, seed=7).fingerprint == first
    others = [make(PretrainData, rows, max_seq_len=8), make(PretrainData, rows, tokenizer=ByteTokenizer("other")),
              make(PretrainData, rows[:1]), make(PretrainData, rows, part="train", val_ratio=0.01)]
    assert len({first, *(data.fingerprint for data in others)}) == 5
    assert first == "pretrain-a55ab49e41a92749"  # shipped reference curves know such names, so they must not change


@pytest.mark.parametrize("change", ["ending", "bos"])
def test_what_neither_contents_nor_vocabulary_tell_makes_another_store(make, tmp_path, change, capsys):
    """The bytes of a .txt file are the same as those of the .jsonl; the second tokenizer has another bos_token."""
    first = make(PretrainData, documents(5, 9))
    tokenizer, path = ByteTokenizer(), tmp_path / "data.jsonl"
    if change == "ending":
        path = path.rename(tmp_path / "data.txt")
    else:
        tokenizer.bos_id = START
    other = make(PretrainData, path, tokenizer=tokenizer)
    assert other.stats["used"] == (1 if change == "ending" else 9) and other.tokens.items[0] == tokenizer.bos_id
    assert other.fingerprint != first.fingerprint
    said = f"was built with bos, eos, pad as usual, now [{START}, {END}, {PAD}]: rebuilding"
    assert (said in capsys.readouterr().out) == (change == "bos")  # a file of another name has no earlier store


def test_windows_of_another_length_need_no_new_tokens(make, count_builds):
    rows = documents(1, 30)
    short, whole = make(PretrainData, rows, 8), make(PretrainData, rows, 16)
    assert len(short) > len(whole) and len(count_builds) == 1
    before = whole.position_batch(0, 5).tolist()
    view = whole.of_length(8)
    assert len(view) == len(short) and (view.position_batch(3, 9) == short.position_batch(3, 9)).all()
    assert torch.equal(view.batch([0, len(view) - 1])["ids"], short.batch([0, len(short) - 1])["ids"])
    assert whole.position_batch(0, 5).tolist() == before and whole.batch([0])["ids"].shape == (1, 16)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def wrong_count(path):
    content = path.read_bytes()
    path.write_bytes(content[:32] + b"\1" + content[33:])


def empty(path):
    path.write_bytes(b"")


def zero_header(path):
    path.write_bytes(bytes(64) + path.read_bytes()[64:])


@pytest.mark.parametrize("damage", [cut, lengthen, wrong_count, empty, zero_header, Path.unlink])
def test_a_damaged_cache_is_said_and_rebuilt(make, tmp_path, damage, capsys):
    rows = documents(6, 30)
    whole = np.array(make(PretrainData, rows).tokens.items)
    damage(next((tmp_path / "cache").glob("*.tokens.bin")))
    assert np.array_equal(make(PretrainData, rows).tokens.items, whole)
    assert "is damaged" in capsys.readouterr().out
    make(PretrainData, rows)
    assert not capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_named_with_its_flag(make, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="--cache_dir .*cache: File exists; .*name another folder"):
        make(PretrainData, documents(7, 30))
    (tmp_path / "cache").unlink()

    def fail(path, value):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(dataset, "write_json", fail)
    with pytest.raises(OSError, match="--cache_dir .*cache: Read-only file system"):
        make(PretrainData, documents(7, 30))


def test_an_interrupted_build_leaves_nothing_that_looks_complete(make, tmp_path, monkeypatch):
    rows = documents(7, 30)

    def fail(self, items):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArrayFile, "append", fail)
        with pytest.raises(OSError, match="the disk is full.*--cache_dir"):
            make(PretrainData, rows)
    assert not list((tmp_path / "cache").glob("pretrain*"))
    with monkeypatch.context() as patch:  # killed after the arrays, before the file that vouches for them
        patch.setattr(dataset, "write_json", lambda path, value: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(PretrainData, rows)
    assert make(PretrainData, rows).stats["used"] == 30


@pytest.mark.skipif(os.name != "posix", reason="processes are asked for with os.kill")
def test_files_of_a_killed_build_are_removed_at_the_next_one(make, tmp_path):
    rows, gone = documents(7, 30), subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    base = make(PretrainData, rows)._base(make(PretrainData, rows)._facts(record=False))
    cache = tmp_path / "cache"
    (cache / f"{base}.json").unlink()
    names = [f"{base}.tokens.bin.tmp{gone.pid}", f"{base}.tokens.bin.tmp{os.getppid()}", f"other.tmp{gone.pid}",
             f"{base}.mask.bin.tmp{gone.pid}"]
    for name in names:
        (cache / name).touch()
        os.utime(cache / name, (0, time.time() - (60 if ".mask." in name else 7200)))  # a minute old, or two hours
    make(PretrainData, rows)
    assert [(cache / name).exists() for name in names] == [False, True, True, True]


def test_one_process_builds_and_the_others_wait_for_it(make, count_builds):
    rows, order = documents(8, 30), []

    def barrier():
        order.append(len(count_builds))

    main = make(PretrainData, rows, is_main=True, barrier=barrier)
    other = make(PretrainData, rows, is_main=False, barrier=barrier)
    assert order == [1, 1] and np.array_equal(main.position_batch(0, 99), other.position_batch(0, 99))
    with pytest.raises(FileNotFoundError):
        make(PretrainData, rows, tokenizer=ByteTokenizer("unbuilt"), is_main=False)


MEMORY = """
import sys
import time
sys.path[:0] = [{root!r}, {tests!r}]
from test_dataset import ByteTokenizer
from dataset import {kind}
data = {kind}({path!r}, ByteTokenizer(), 512, {cache!r})
data.batch(data.position_batch(0, 8))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("kind", ["PretrainData", "SFTData"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """A file ten times as large (22 MB) may cost 20 MB more at the peak: offsets, and the order of one epoch."""
    peaks = []
    row = {"text": "x" * 400} if kind == "PretrainData" else {"conversations": chat("q" * 200, "a" * 200)}
    for size in (1, 10):
        path = tmp_path / f"{size}.jsonl"
        path.write_text((json.dumps(row) + "\n") * (5000 * size))
        code = MEMORY.format(root=str(Path(dataset.__file__).parent), tests=str(Path(__file__).parent), kind=kind,
                             path=str(path), cache=str(tmp_path / str(size)))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 20, peaks


def test_nothing_is_random_between_two_starts(make, tmp_path):
    rows = [{"conversations": chat(*texts(i, 2))} for i in range(60)]
    first, second = make(SFTData, rows, 100), make(SFTData, rows, 100)
    batches = [data.batch(data.position_batch(7, 9)) for data in (first, second)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("ids", "mask", "documents"))
    assert first.stats == second.stats
