"""Proves the preparation of data: mixes of the sizes asked for that a re-run repeats, duplicates found and no others,
downloads that are whole or not there, exports equal to what training sees.

    python -m pytest tests/test_prepare_data.py
"""
import dataclasses
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import download
import prepare_data
import selection
from dataset import PreferenceData, PretrainData, PromptData, SFTData
from prepare_data import main, parse_args, standard_row
from rows import read_rows
from selection import language, signature
from tokenizer import Tokenizer, iter_texts

DATA = Path(os.environ.get("MINILLM_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
WORDS = "the cat sat on a mat while it rained and nobody knew why two birds sang in green trees near our house".split()


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chats(name, count):
    return [{"conversations": chat(f"{name} question {i}?", f"{name} answer {i}.")} for i in range(count)]


def prose(seed, count=120):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def run(*words):
    return main(parse_args([str(word) for word in words]))


@pytest.fixture
def mix(tmp_path):
    """mix(sources, *flags, **config) -> (stats, {file name: rows}); a source is (name, category, rows, settings)."""

    def made(sources, *flags, output="out", **config):
        named = [{"name": name, "category": category, "path": write(tmp_path / f"{name}.jsonl", rows), **settings}
                 for name, category, rows, settings in sources]
        (tmp_path / "mix.json").write_text(json.dumps({"sources": named, **config}))
        folder = tmp_path / output
        stats = run("mix", "--config", tmp_path / "mix.json", "--output", folder, *flags)
        return stats, {path.name: [row for row, _ in read_rows(path)] for path in sorted(folder.glob("*.jsonl"))}

    return made


# ---------------------------------------------------------------------------------------------------------------------
# mix


def test_categories_get_their_sizes_and_every_row_names_its_source(mix):
    stats, files = mix([("a", "general", chats("a", 300), {}), ("b", "general", chats("b", 100), {}),
                        ("c", "math", chats("c", 80), {}), ("d", "identity", chats("d", 30), {"val_ratio": 0})],
                       targets={"general": {"count": 200}, "math": {"share": 0.1},
                                "identity": {"count": 70, "max_repeat": 3}}, total=500, val_ratio=0.1)
    rows = files["sft.train.jsonl"] + files["sft.heldout.jsonl"]
    sizes = Counter(row["category"] for row in rows)
    assert sizes == {"general": 200, "math": 50, "identity": 70}
    assert {row["source"]: row["category"] for row in rows} == {"a": "general", "b": "general", "c": "math",
                                                                "d": "identity"}
    # 70 of 30 different rows: each twice, ten of them a third time; the others never twice
    copies = Counter(row["conversations"][0]["content"] for row in rows)
    assert Counter(count for text, count in copies.items() if text.startswith("d")) == {2: 20, 3: 10}
    assert {count for text, count in copies.items() if not text.startswith("d")} == {1}
    # rows of a category have equal chances: 150 of 300 and 50 of 100
    assert 130 < Counter(row["source"] for row in rows)["a"] < 170
    assert not any(row["source"] == "d" for row in files["sft.heldout.jsonl"])
    assert stats["sources"]["a"]["train"] == sum(row["source"] == "a" for row in files["sft.train.jsonl"])
    assert {name: len(rows) for name, rows in files.items()} == {
        name: facts["rows"] for name, facts in stats["files"].items()}
    assert stats["warnings"] == []


def test_a_second_run_writes_the_same_bytes_and_another_seed_other_rows(mix, tmp_path):
    sources = [("a", "general", chats("a", 400), {}), ("b", "math", chats("b", 50), {})]
    targets = {"general": {"count": 100}, "math": {"count": 20}}
    _, first = mix(sources, targets=targets, output="one")
    mix(sources, targets=targets, output="two")
    for name in first:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    _, other = mix(sources, targets=targets, seed=7, output="three")
    assert other["sft.train.jsonl"] != first["sft.train.jsonl"]
    # the choice hangs on the rows alone: in another order, and with another source beside, the same ones are taken
    _, moved = mix([("c", "new", chats("c", 30), {}), ("a", "general", chats("a", 400)[::-1], {}), sources[1]],
                   targets=targets, output="four")
    text = {name: sorted(json.dumps(row) for row in rows["sft.train.jsonl"] if row["source"] != "c")
            for name, rows in (("first", first), ("moved", moved))}
    assert text["first"] == text["moved"]


def test_a_smaller_ratio_takes_a_part_of_the_same_rows(mix):
    sources = [("a", "general", chats("a", 500), {}), ("b", "other", chats("b", 100), {})]
    _, whole = mix(sources, targets={"general": {"count": 300}}, val_ratio=0, output="whole")
    stats, part = mix(sources, "--global_sample_ratio", "0.1", targets={"general": {"count": 300}}, val_ratio=0,
                      output="part")
    assert Counter(row["category"] for row in part["sft.train.jsonl"]) == {"general": 30, "other": 10}
    texts = {name: {json.dumps(row) for row in rows["sft.train.jsonl"]} for name, rows in
             (("whole", whole), ("part", part))}
    assert texts["part"] < texts["whole"] and stats["warnings"] == []


def test_each_source_holds_out_its_own_share_and_no_question_is_on_both_sides(mix):
    shared = [{"conversations": chat(f"shared question {i}?", "one answer")} for i in range(400)]
    other = [{"conversations": chat(f"shared question {i}?", "another answer")} for i in range(400)]
    stats, files = mix([("a", "x", shared, {"val_ratio": 0.25}), ("b", "y", other, {"val_ratio": 0.05}),
                        ("c", "z", chats("c", 400), {"val_ratio": 0})])
    held = Counter(row["source"] for row in files["sft.heldout.jsonl"])
    assert 70 < held["a"] < 130 and 8 < held["b"] < 35 and held["c"] == 0
    questions = [{row["conversations"][0]["content"] for row in files[f"sft.{part}.jsonl"]}
                 for part in ("train", "heldout")]
    assert not questions[0] & questions[1]
    assert stats["sources"]["b"]["question held out elsewhere"] == held["a"] - held["b"]


def test_rows_of_all_stages_go_to_their_files_and_are_read_by_the_data_sets(mix, tmp_path, tokenizer):
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    rows = {"text": [{"text": f"document {i}"} for i in range(30)],
            "alpaca": [{"instruction": f"do {i}", "output": "done", "source": "web"} for i in range(30)],
            "pairs": [{**pair, "prompt": f"question {i}", "kind": "wrong"} for i in range(30)],
            "rl": [{"conversations": [*chat(f"2 + {i}?", "")], "answer": str(2 + i), "check": "number"}
                   for i in range(30)]}
    _, files = mix([(name, name, made, {}) for name, made in rows.items()], val_ratio=0.3)
    assert set(files) == {f"{stage}.{part}.jsonl" for stage in ("pretrain", "sft", "preference", "rl")
                          for part in ("train", "heldout")}
    assert files["sft.train.jsonl"][0]["source"] == "alpaca/web" and files["rl.train.jsonl"][0]["check"] == "number"
    kinds = {"pretrain": PretrainData, "sft": SFTData, "preference": PreferenceData, "rl": PromptData}
    for name, made in files.items():
        data = kinds[name.split(".")[0]](tmp_path / "out" / name, tokenizer, 64, tmp_path / "cache")
        assert data.stats["used"] == len(made) and data.stats["dropped"] == 0
    assert PreferenceData(tmp_path / "out/preference.train.jsonl", tokenizer, 64, tmp_path / "cache").stats["kinds"][
        "wrong"] == len(files["preference.train.jsonl"])


@pytest.mark.parametrize("script, part", [("train_pretrain", "pretrain"), ("train_sft", "sft"),
                                          ("train_dpo", "preference"), ("train_grpo", "rl")])
def test_the_training_scripts_run_on_a_mix(mix, stage, tmp_path, script, part):
    turns = [chat(f"What is {i} + 1?", f"It is {i + 1}.") for i in range(40)]
    rows = {"pretrain": [{"text": f"{i} + 1 is {i + 1}, as everybody knows. " * 3} for i in range(40)],
            "sft": [{"instruction": said["content"], "output": answer["content"]} for said, answer in turns],
            "preference": [{"conversations": [{"from": "human", "value": said["content"]}],
                            "chosen": {"from": "gpt", "value": answer["content"]},
                            "rejected": {"from": "gpt", "value": "No."}} for said, answer in turns],
            "rl": [{"messages": said[:1], "answer": str(i + 1), "check": "number"} for i, said in enumerate(turns)]}
    mix([("a", "x", rows[part], {"val_ratio": 0.4})])
    module, argv = stage(script, "--data_path", str(tmp_path / f"out/{part}.train.jsonl"), "--val_path",
                         str(tmp_path / f"out/{part}.heldout.jsonl"), "--max_steps", "2", "--overwrite")
    module.main(module.parse_args(argv))
    assert (tmp_path / "out/run/model.safetensors").exists()


def test_filters_count_what_they_leave_out(mix):
    rows = [{"text": "short"}, {"text": prose(1)}, {"text": prose(2, 900)}, {"text": "春天来了，花都开了。" * 20},
            {"text": " \n "}, {"text": "Привет, как дела? " * 20}, {"text": prose(3), "skill": "other"}]
    stats, files = mix([("a", "x", rows, {"min_chars": 20, "max_chars": 2000, "languages": ["en"],
                                          "where": {"skill": "good"}}),
                        ("b", "y", [{**row, "skill": row.get("skill", "good")} for row in rows],
                         {"min_chars": 20, "max_chars": 2000, "languages": ["en"], "where": {"skill": "good"}})],
                       val_ratio=0)
    found = stats["sources"]["b"]
    assert {key: found[key] for key in ("read", "too short", "too long", "other language", "empty", "not asked for",
                                        "train")} == {
        "read": 7, "too short": 1, "too long": 1, "other language": 2, "empty": 1, "not asked for": 1, "train": 1}
    assert [row["text"] for row in files["pretrain.train.jsonl"]] == [prose(1)]
    assert stats["warnings"] == ["source a ended empty: 7 rows read, 7 not asked for"]


def test_useless_pairs_and_tool_calls_are_left_out(mix):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    stats, files = mix([("a", "x", [{"prompt": "q", "chosen": "a", "rejected": "a"},
                                    {"prompt": "q", "chosen": "a", "rejected": " "},
                                    {"conversations": [{"role": "user", "content": "q"}, call]},
                                    {"prompt": "q", "chosen": "a", "rejected": "b"}], {})], val_ratio=0)
    found = stats["sources"]["a"]
    assert (found["equal answers"], found["empty"], found["tool calls"]) == (1, 1, 1)
    assert len(files["preference.train.jsonl"]) == 1 and len(files) == 1


def test_categories_without_a_target_have_the_sizes_of_the_documents(mix):
    """Ten rows of a category whose default is larger are all taken, and that is no warning."""
    text = (Path(prepare_data.__file__).parent / "docs/data.md").read_text(encoding="utf-8")
    for category, target in selection.TARGETS.items():
        assert f"{category} {target['count']:,}" in text
    sources = [("a", "general", chats("a", 10), {}), ("b", "identity", chats("b", 10), {})]
    for targets, copies in (({}, 2), ({"identity": {"max_repeat": 3}}, 3)):
        stats, files = mix(sources, val_ratio=0, targets=targets)
        assert Counter(row["source"] for row in files["sft.train.jsonl"]) == {"a": 10, "b": 10 * copies}
        assert not stats["warnings"] and list(stats["targets"]) == ["general", "identity"]


def test_a_short_category_is_a_warning(mix, capsys):
    stats, _ = mix([("a", "math", chats("a", 20), {})], targets={"math": {"count": 100}})
    assert stats["warnings"] == ["category math: 20 of 100 rows; add sources, or raise its max_repeat (1)"]
    assert "warning: category math" in capsys.readouterr().out


def test_columns_of_other_names_are_mapped(mix):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "prompt": "a column that means something else"} for i in range(9)]
    _, files = mix([("a", "x", rows, {"map": {"prompt": "question", "completion": "answer"}})], val_ratio=0)
    assert [row["conversations"] for row in files["sft.train.jsonl"]] == [chat(f"q{i}", f"a{i}") for i in range(9)]
    with pytest.raises(ValueError, match=r"a.jsonl:1: found the keys \[question, answer, prompt\]; the map wants ask;"):
        mix([("a", "x", rows, {"map": {"prompt": "ask"}})])


def test_bad_rows_are_an_error_or_counted_and_nothing_is_left_behind(mix, tmp_path):
    rows = [*chats("a", 5), {"nothing": 1}, {"conversations": [{"role": "robot", "content": "x"}]}]
    with pytest.raises(ValueError, match="source a: .*a.jsonl:6: .*;.*;.*--skip_bad 1"):
        mix([("a", "x", rows, {})])
    assert list((tmp_path / "out").iterdir()) == []
    stats, _ = mix([("a", "x", rows, {})], "--skip_bad", "1")
    assert stats["sources"]["a"]["bad"] == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset_stats.json", "sft.train.jsonl"]
    assert json.loads((tmp_path / "out/dataset_stats.json").read_text())["sources"]["a"]["read"] == 7


@pytest.mark.parametrize("config, message", [
    ("{", "must hold one JSON object"), ("[]", r"found \[\]"), ("{}", "at least one"),
    ({"source": []}, "found source"), ({"sources": [{"name": "a"}]}, "category, path missing"),
    ({"sources": [{"name": "a", "category": "x", "path": 3}]}, "path is 3"),
    ({"sources": [{"name": "a", "category": "x", "path": "p", "val_ratio": 1}]}, "val_ratio is 1"),
    ({"sources": [{"name": "a", "category": "x", "path": "p", "languages": ["fr"]}]}, "languages is"),
    ({"sources": [{"name": "a", "category": "x", "path": "p"}] * 2}, "a name of its own"),
    ({"sources": [{"name": "a", "category": "x", "path": "p"}], "targets": {"y": {"count": 1}}}, "found y"),
    ({"sources": [{"name": "a", "category": "x", "path": "p"}], "targets": {"x": {"count": 0}}}, "count 0"),
    *(({"sources": [{"name": "a", "category": "x", "path": "p"}], "targets": {"x": {key: 10**400}}}, key)
      for key in ("count", "max_repeat")),
    ({"sources": [{"name": "a", "category": "x", "path": "p"}], "targets": {"x": {"share": 0.5}}}, "needs a total"),
    ({"sources": [{"name": "a", "category": "x", "path": "p"}], "targets": {"x": {"share": 2}}, "total": 9},
     "share is 2"),
    ({"sources": [{"name": "a", "category": "x", "path": "p"}], "targets": {"x": {"count": 5, "share": 1}}, "total": 9},
     "count 5 and share 1;"),
    ({"sources": [{"name": "a", "category": "x", "path": "p"}], "targets": {"x": {"max_repeat": 3}}},
     "max_repeat 3 without a count"),
    ({"sources": 5}, "sources is 5"), ({"sources": True}, "sources is True"),
    ("[" * 100_000, "must hold one JSON object"),
    *(({"near_duplicates": value}, "near_duplicates is .* true or false") for value in ("no", None, [], 2)),
    ({"sources": [{"name": "a", "category": "x", "path": "p"}], "targets": {"x": 5}}, "found 5"),
])
def test_a_bad_config_is_explained(tmp_path, config, message):
    (tmp_path / "mix.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        run("mix", "--config", tmp_path / "mix.json", "--output", tmp_path / "out")
    assert str(error.value).count("; ") >= 2


def test_a_config_may_begin_with_the_byte_order_mark_of_windows_editors(tmp_path):
    config = {"sources": [{"name": "a", "category": "x", "path": write(tmp_path / "a.jsonl", chats("a", 3))}]}
    (tmp_path / "mix.json").write_text(json.dumps(config), encoding="utf-8-sig")
    assert run("mix", "--config", tmp_path / "mix.json", "--output", tmp_path / "out")["sources"]["a"]["read"] == 3


def test_a_config_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(ValueError, match="--config .*none.json: .*No such file.*; .*; write "):
        run("mix", "--config", tmp_path / "none.json")


def test_a_mix_does_not_replace_its_own_sources(tmp_path):
    write(tmp_path / "sft.train.jsonl", chats("a", 3))
    config = {"sources": [{"name": "a", "category": "x", "path": str(tmp_path / "*.jsonl")}]}
    (tmp_path / "mix.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must not replace its own sources"):
        run("mix", "--config", tmp_path / "mix.json", "--output", tmp_path)
    assert len((tmp_path / "sft.train.jsonl").read_text().split("\n")) == 4


def test_lone_surrogates_survive_a_mix(mix, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": "half \\ud83d of a pair \\u4f60"}\n')
    _, files = mix([("a", "x", [], {"path": str(tmp_path / "odd.jsonl")})], val_ratio=0)
    assert [row["text"] for row in files["pretrain.train.jsonl"]] == ["half \ud83d of a pair \u4f60"]
    assert run("inspect", tmp_path / "odd.jsonl")["rows"] == 1
    odd = chats("half \ud83d", 1)
    (tmp_path / "exam.jsonl").write_text(json.dumps(odd[0]))
    stats, _ = mix([("b", "x", [], {"path": str(tmp_path / "exam.jsonl")})], exclude=str(tmp_path / "exam.jsonl"))
    assert json.loads((tmp_path / "out/dataset_stats.json").read_bytes()) == stats
    assert stats["contamination"]["b"]["text"] == odd[0]["conversations"][0]["content"]


MEMORY = """
import sys
sys.path.insert(0, {root!r})
from prepare_data import main, parse_args
main(parse_args(["mix", "--config", {config!r}, "--output", {output!r}]))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Ten times the text (from 3 to 32 MB) may cost 12 MB more at the peak: some numbers a row."""
    peaks = []
    for size in (1, 10):
        rows = ({"text": f"{i} {prose(i, 150)}"} for i in range(4000 * size))
        with open(tmp_path / f"{size}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        config = {"sources": [{"name": "a", "category": "x", "path": str(tmp_path / f"{size}.jsonl")}],
                  "exclude": write(tmp_path / "test.jsonl", [{"question": prose(-1)}])}
        (tmp_path / "mix.json").write_text(json.dumps(config))
        code = MEMORY.format(root=str(Path(prepare_data.__file__).parent), config=str(tmp_path / "mix.json"),
                             output=str(tmp_path / "out"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks


# ---------------------------------------------------------------------------------------------------------------------
# Duplicates


def shingles(text):
    text = " ".join(text.lower().split())
    return {text[i:i + selection.SHINGLE] for i in range(len(text) - selection.SHINGLE + 1)}


@pytest.mark.parametrize("words, changes", [(150, (2, 6, 14, 40)), (30, (1, 2, 3, 8))])
def test_near_duplicates_are_found_as_often_as_the_formula_says(words, changes):
    """Jaccard similarity is counted from the sets themselves; the share found is compared with 1 - (1 - s^11)^11."""
    rng = random.Random(0)
    expected, found, variance = Counter(), Counter(), Counter()
    for _, changed in itertools.product(range(150), changes):
        one = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(words)]
        two = list(one)
        for i in rng.sample(range(words), changed):
            two[i] = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))
        one, two = " ".join(one), " ".join(two)
        a, b = shingles(one), shingles(two)
        probability = 1 - (1 - (len(a & b) / len(a | b)) ** 11) ** 11
        expected[changed] += probability
        variance[changed] += probability * (1 - probability)
        found[changed] += bool((signature(one) == signature(two)).any())
    for changed in found:
        assert abs(found[changed] - expected[changed]) < 4 * (variance[changed] + 0.5) ** 0.5, (expected, found)
    assert found[changes[0]] > 140 and found[changes[-1]] < 5


def test_exact_and_near_duplicates_leave_and_short_or_different_texts_stay(mix):
    long = [prose(i, 150) for i in range(40)]
    near = [text.replace("house", "home", 1).upper() for text in long[:10]]
    sums = [{"conversations": chat(f"What is {i} + {i + 1}?", f"It is {2 * i + 1}.")} for i in range(40)]
    stats, files = mix([("a", "x", [{"text": text} for text in long], {}),
                        ("b", "y", [{"text": text} for text in near + long[20:25]] + sums, {}),
                        # the same text for another stage is no duplicate
                        ("c", "z", [{"conversations": chat("Write.", long[0])}], {})], val_ratio=0)
    assert stats["sources"]["a"]["train"] == 40
    found = stats["sources"]["b"]
    assert (found["exact duplicate"], found["near duplicate"], found["train"]) == (5, 10, 40)
    assert stats["sources"]["c"]["train"] == 1
    # first come, first kept; and without the search only equal texts leave
    stats, _ = mix([("a", "x", [{"text": text} for text in long + near + long[:3]], {})], near_duplicates=False)
    assert stats["sources"]["a"]["exact duplicate"] == 3 and "near duplicate" in stats["sources"]["a"]
    assert stats["sources"]["a"]["near duplicate"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Contamination

ENGLISH = ("A farmer has 17 sheep, and all but nine of them run away in the night; how many sheep are left in his "
           "field on the next morning?")
CHINESE = "甲公司是国内一家上市公司，对其各子公司实行全面预算管理，并通常使用增量预算方式进行战略控制。"


def slow_twin(items, parts):
    """What Contamination.find() must find but for near duplicates, by comparing lists of words."""

    def cut(text):
        return re.findall("[一-鿿]|[a-z0-9]+", text.lower())

    def within(short, long):
        return any(long[i:i + len(short)] == short for i in range(len(long) - len(short) + 1))

    for item, part in itertools.product(map(cut, items), map(cut, parts)):
        run, whole = (20, 12) if sum("一" <= word <= "鿿" for word in item) * 2 > len(item) else (13, 8)
        pieces = [item[i:i + run] for i in range(max(1, len(item) - run + 1))]
        if len(item) >= whole and any(within(piece, part) for piece in pieces):
            return True
    return False


def test_contamination_finds_what_comparing_all_runs_of_words_finds():
    rng, seen = random.Random(0), Counter()
    for _ in range(300):
        alphabet = rng.choice([["red", "Green", "blue,"], ["春", "夏", "秋。"], ["red", "Green", "春", "夏"]])
        gap = rng.choice(["", " "]) if "red" not in alphabet else " "
        base = rng.choices(alphabet, k=60)
        # the row holds a part of the item between other words
        start, length = rng.randrange(30), rng.choice([1, 5, 7, 8, 11, 12, 13, 14, 19, 20, 21, 30])
        item = base[start:start + rng.choice([length, length, length + 4])]
        row = ["x"] * rng.randrange(3) + base[start:start + length] + ["y"] * rng.randrange(3)
        items = selection.Contamination()
        items.add(gap.join(item), "here")
        found = items.find([gap.join(row)], [])
        assert bool(found) == slow_twin([gap.join(item)], [gap.join(row)]), (item, row)
        seen[bool(found)] += 1
    assert min(seen.values()) > 50


@pytest.mark.parametrize("item, row, kind", [
    (ENGLISH, f"Solve this. {ENGLISH.upper()} Think first.", "same words"),
    (ENGLISH, "Once " + " ".join(ENGLISH.split()[4:17]) + " they slept.", "same words"),
    (ENGLISH, "Once " + " ".join(ENGLISH.split()[4:16]) + " they slept.", None),
    (CHINESE, f"请看：{CHINESE}你怎么看？", "same words"), (CHINESE, f"某{CHINESE[3:24]}等等", "same words"),
    (CHINESE, f"某{CHINESE[3:22]}等等", None),
    ("What is the capital of the old kingdom?", "a b What is the capital of the old kingdom c", "same words"),
    ("What is it?", "what is  it", "same question"), ("What is it?", "Tell me what is it", None),
    ("床前明月光？", "床前明月光", "same question"), ("床前明月光", "床前明月光，疑是地上霜", None),
    ("Ａ１ ｂ", "a1 B!", "same question"), ("?!", "?!", None), ("", "", None),
    ("What is 2 + 3?", "What is 2 - 3?", None), ("What is 2 + 3?", "What is 2 + 3", "same question"),
    (prose(5, 60), " ".join("cow" if i % 12 == 5 else word for i, word in enumerate(prose(5, 60).split())),
     "near duplicate"),
    (prose(5, 60), prose(6, 60), None)])
def test_contamination_in_both_languages(item, row, kind):
    items = selection.Contamination()
    items.add(prose(99), "elsewhere")
    items.add(item, "test.jsonl:3")
    found = items.find([row], [row])
    assert (found and found["kind"]) == kind and (not found or found["item"] == "test.jsonl:3")


@pytest.mark.parametrize("row, texts", [
    ({"question": "q", "choices": ["a"], "answer": 0, "subject": "s"}, ["q"]),
    ({"id": "1", "question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}, ["q"]),
    ({"": "0", "Question": "问", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "A"}, ["问"]),
    ({"query": "Question: q\nAnswer:", "choices": ["a"], "gold": 0}, ["q"]),
    ({"ctx_a": "c", "ctx_b": "d", "ctx": "c d", "endings": ["e"], "label": 0}, ["c d"]),
    ({"sentence": "Ann saw Bea, so _ hid.", "option1": "Ann", "option2": "Bea", "answer": "1"},
     ["Ann saw Bea, so Ann hid.", "Ann saw Bea, so Bea hid."]),
    ({"goal": "g", "sol1": "s", "sol2": "t", "label": 1}, ["g", "s", "t"]),
    ({"question": "q", "passage": "p", "answer": True}, ["q", "p"]),
    ({"context_options": ["c", "d"], "continuation": "e", "gold": 0}, ["c", "d"]),
    ({"instruction": "i", "input": "q", "output": "a"}, ["i\nq"]), ({"instruction": "i", "input": ""}, ["i"]),
    ({"instruction": "i", "input": "q", "history": [["h", "a"]], "output": "a"}, ["h", "i\nq"]),
    ({"text": "t"}, ["t"]), ({"conversations": chat("q", "a"), "answer": "a"}, ["q"]),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["q"]), ({"messages": chat("q", "")[1:]}, [""]),
    ({"prompt": chat("q", "a")[:1], "completion": chat("q", "a")[1:]}, ["q"])])
def test_the_texts_of_evaluation_rows_are_known_in_public_layouts(row, texts):
    assert prepare_data.item_texts(row) == texts


@pytest.mark.parametrize("row", [{"sentence": "_ hid.", "option1": "Ann"},
                                 {"sentence": 5, "option1": "Ann", "option2": "Bea"}])
def test_an_evaluation_row_that_is_no_text_is_named(row):
    with pytest.raises(ValueError, match="a.jsonl:1: found .* as sentence, option1 and option2; .*; correct"):
        prepare_data.item_texts(row, "a.jsonl:1")


def test_a_mix_leaves_evaluation_items_out_and_says_which(mix, tmp_path, capsys):
    (tmp_path / "exam.csv").write_text(f"id,question,A,B\n0,{CHINESE},x,y\n", encoding="utf-8")
    held = write(tmp_path / "held.jsonl", [{"conversations": chat("Who are you?", "Nobody.")}, {"question": ENGLISH}])
    planted = [{"conversations": [{"role": "system", "content": "s"}, *chat(f"Please! {ENGLISH}", "9")]},
               {"conversations": chat("who are you", "I am new.")},
               {"conversations": chat("What shall I ask you?", "Who are you?")},
               {"conversations": chat("Explain.", f"In an exam: {CHINESE}")},
               {"prompt": ENGLISH, "chosen": "9", "rejected": "8"}, {"messages": chat(ENGLISH, "")}]
    text = [{"text": f"{prose(1)}\n{ENGLISH}"}, {"text": CHINESE}, {"text": prose(1)}]
    stats, files = mix([("a", "x", chats("a", 20) + planted, {}), ("b{0}", "y", text, {})], val_ratio=0.3,
                       exclude=[str(tmp_path / "*.csv"), held])
    assert [stats["sources"][name]["contaminated"] for name in ("a", "b{0}")] == [5, 2]
    assert sum(map(len, files.values())) == 22 and stats["evaluation texts"] == 3
    shown = json.dumps(list(files.values()), ensure_ascii=False).lower()
    assert not any(words in shown for words in ("sheep", "甲公司", "i am new"))
    assert stats["contamination"]["a"] == {"row": f"{tmp_path}/a.jsonl:21", "item": f"{held}:2", "kind": "same words",
                                           "text": "a farmer has 17 sheep and all but nine of them run away"}
    assert ("warning: source b{0}: 2 rows left out because evaluation items are in them; the first: "
            f"{tmp_path}/b{{0}}.jsonl:1 has the same words as") in capsys.readouterr().out
    stats, _ = mix([("a", "x", planted, {})])
    assert "evaluation items are not looked for" in capsys.readouterr().out and stats["contamination"] == {}


@pytest.mark.parametrize("content, message", [('{"name": "x"}', r"test.jsonl:1: found the keys \[name\]; .*; "),
                                              ("[1]", "test.jsonl:1: .*; ")])
def test_a_file_to_exclude_without_questions_is_an_error_with_file_and_line(mix, tmp_path, content, message):
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        mix([("a", "x", chats("a", 3), {})], exclude=str(tmp_path / "test.jsonl"))
    with pytest.raises(ValueError, match="exclude is 3; .*; "):
        mix([("a", "x", chats("a", 3), {})], exclude=3)


@pytest.mark.parametrize("name", ["gsm8k_test", "ceval_val", "arc_challenge_test_processed",
                                  "winogrande_xl_validation"])
def test_items_of_a_published_benchmark_are_kept_out_of_real_text(mix, name):
    """40 of its items are planted into chats and documents; other real text stays but for a trace."""
    exam, corpus = DATA / "eval" / f"{name}.jsonl.gz", DATA / "pretrain" / "pretrain_mini.jsonl"
    if not exam.exists() or not corpus.exists():
        pytest.skip(f"no {exam.name} or {corpus.name} in {DATA} (set MINILLM_DATA)")
    asked = [prepare_data.item_texts(row)[-1] for row, _ in itertools.islice(read_rows(exam), 40)]
    real = [row for row, _ in itertools.islice(read_rows(corpus), 200)]
    chats = [{"conversations": chat(f"Help me. {text}" if len(text) > 80 else text, "Yes.")} for text in asked]
    documents = [{"text": f"{row['text'][:300]}\n\n{text}"}
                 for row, text in zip(real, (text for text in asked if len(text) > 80), strict=False)]
    stats, files = mix([("chats", "x", chats, {}), ("documents", "y", documents, {}), ("real", "z", real, {})],
                       exclude=str(exam))
    found = {name: stats["sources"][name]["contaminated"] for name in stats["sources"]}
    assert (found["chats"], found["documents"]) == (40, len(documents)) and documents and found["real"] <= 1
    assert {row["source"].split("/")[0] for rows in files.values() for row in rows} == {"real"}


# ---------------------------------------------------------------------------------------------------------------------
# Languages and stages


@pytest.mark.parametrize("text, expected", [
    ("A plain sentence.", "en"), ("Élève à l'école", "en"), ("今天天气很好", "zh"), ("我喜欢用 Python 写代码", "zh"),
    ("The word 猫 means cat in Chinese.", "en"), ("今日はとても良い天気ですね", "other"), ("Привет, мир", "other"),
    ("1 + 2 = 3", "other"), ("“你好”，他说：『再见』。", "zh"), ("“Quotes” — and … dashes", "en"), ("", "other")])
def test_languages_are_told_by_script(text, expected):
    assert language(text) == expected


@pytest.mark.parametrize("row, stage", [
    ({"text": "a"}, "pretrain"), ({"messages": chat("q", "a")}, "sft"), ({"messages": chat("q", "a")[:1]}, "rl"),
    ({"messages": chat("q", "")}, "rl"), ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
    ({"text": None, "prompt": "q", "completion": "a"}, "sft")])
def test_the_keys_of_a_row_say_its_stage(row, stage):
    assert standard_row(row)[0] == stage


# ---------------------------------------------------------------------------------------------------------------------
# inspect


def test_inspect_counts_what_is_there(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "tok")
    rows = chats("a", 20) + chats("a", 5) + [{"text": prose(1)}, {"prompt": "q", "chosen": "yes", "rejected": "no"}]
    path = write(tmp_path / "a.jsonl", [{**row, "source": "here"} for row in rows] + [{"text": "好" * 30}])
    facts = run("inspect", path, "--tokenizer", tmp_path / "tok", "--samples", "2")
    assert facts["rows"] == 28 and facts["stages"] == {"sft": 25, "pretrain": 2, "preference": 1}
    assert facts["exact duplicates"] == 5 and facts["languages"] == {"en": 27, "zh": 1}
    assert facts["sources"] == {"here": 27, "not named": 1}
    masks = [tokenizer.render(row["conversations"])[1] for row in rows[:25]]
    sides = [tokenizer.render(chat("q", answer))[1] for answer in ("yes", "no")]
    texts = [len(tokenizer.encode(text)) for text in (prose(1), "好" * 30)]
    assert facts["trained tokens"] == sum(map(sum, masks + sides)) + sum(texts)
    assert facts["tokens"] == sum(map(len, masks + sides)) + sum(texts) + 2
    shown = capsys.readouterr().out
    assert shown.count("\nrow ") == 2 and "characters a row" in shown and "10% " in shown


def test_inspect_counts_evaluation_items(tmp_path, capsys):
    held = write(tmp_path / "held.jsonl", [{"question": ENGLISH}])
    path = write(tmp_path / "a.jsonl", [*chats("a", 3), {"messages": chat(ENGLISH, "9")}])
    facts = run("inspect", path, "--against", held)
    assert facts["contaminated"] == 1 and facts["contaminated share"] == 0.25
    assert f"contaminated  {path}:4 has the same words as {held}:1: 'a farmer" in capsys.readouterr().out
    assert "contaminated" not in run("inspect", path)


def test_inspect_shows_rows_as_they_are_and_names_wrong_types(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "no source"}, {"text": "a source", "source": "web"}])
    run("inspect", path)
    shown = capsys.readouterr().out
    assert '\n "text": "no source"\n}' in shown and '"source": "web"' in shown and '"files' not in shown
    with pytest.raises(ValueError, match="b.jsonl:1: found 3 as text; expected a string; "):
        run("inspect", write(tmp_path / "b.jsonl", [{"text": 3}]))


def test_inspect_maps_columns_and_counts_bad_rows(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nq1,a1\nq2\nq3,a3\n")
    facts = run("inspect", tmp_path / "a.csv", "--map", "prompt=question", "completion=answer", "--skip_bad", "1")
    assert facts["rows"] == 2 and facts["left out"]["bad"] == 1 and facts["stages"] == {"sft": 2}
    with pytest.raises(ValueError, match="--map question; .*;.*"):
        run("inspect", tmp_path / "a.csv", "--map", "question")


# ---------------------------------------------------------------------------------------------------------------------
# download, from a server on this machine that misbehaves as told

CONTENT = bytes(random.Random(0).randbytes(1_500_000))
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT. Each request takes the next word of `plan`; without one it is served as it should be."""

    daemon_threads = True
    content, etag, plan, requests, linked = CONTENT, '"v1"', (), (), ""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        word, server.plan = (server.plan or ("",))[0], server.plan[1:]
        server.requests = (*server.requests, (self.path, self.headers.get("Range"), self.headers.get("If-Range"), word))
        if word.startswith("HTTP"):
            self.send_response(int(word.split()[1]))
            if word.split()[2:]:
                self.send_header("Retry-After", word.split()[2])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif word == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/cdn?signature=1")
            self.send_header("X-Linked-Etag", f'"{server.linked}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_content(word)

    def send_content(self, word):
        server, start = self.server, 0
        asked = self.headers.get("Range")
        if asked and self.headers.get("If-Range") == server.etag and word != "ignores range":
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.content) and asked:
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if word == "web page" else "application/octet-stream")
        if start:
            self.send_header("Content-Range", f"bytes {start + (word == 'wrong part')}-/{len(server.content)}")
        if word != "no etag":
            self.send_header("ETag", f"W/{server.etag}" if word == "weak etag" else server.etag)
        if word != "no length":
            self.send_header("Content-Length", "abc" if word == "bad length" else str(len(body)))
        self.end_headers()
        if word in ("drops", "weak etag", "no etag"):
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.connection.close()
        elif word == "stalls":
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            server.waiting.wait(5)
        elif word == "damages":
            self.wfile.write(body[:-1] + bytes([body[-1] ^ 1]))
        else:
            self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A running Server; the waits of the code under test are recorded in server.waits instead of being slept."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    made = Server(("127.0.0.1", 0), Handler)
    made.waits, made.waiting, made.address = [], threading.Event(), f"http://127.0.0.1:{made.server_port}"
    monkeypatch.setattr(download.time, "sleep", made.waits.append)
    monkeypatch.setitem(download.SETS, "toy", download.Public("me/toy", {"data/toy.bin": 2}, "a toy licence"))
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.waiting.set()
    made.shutdown()
    made.server_close()
    thread.join()


def get(server, *flags, name="toy"):
    return run("download", name, "--output", "got", *(flags or ("--mirror", server.address)))


def left(folder="got/toy"):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_download_prints_the_licence_and_asks_the_address_of_the_hub(server, capsys):
    assert get(server) == {"toy": [Path("got/toy/toy.bin")]}
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT and left() == ["toy.bin"]
    assert server.requests == (("/datasets/me/toy/resolve/main/data/toy.bin", None, None, ""),)
    shown = capsys.readouterr().out
    assert "licence a toy licence" in shown and f"SHA-256 {SHA} (nothing to compare it with is known)" in shown
    get(server)
    assert "is there already" in capsys.readouterr().out and len(server.requests) == 1


@pytest.mark.parametrize("plan", [("drops",), ("drops",) * 9, ("stalls",), ("drops", "HTTP 503", "drops")])
def test_a_broken_transfer_goes_on_where_it_stopped(server, plan, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.3)
    server.plan = plan
    get(server)
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT and left() == ["toy.bin"]
    starts = [int(asked[6:-1]) for _, asked, _, _ in server.requests[1:]]
    assert starts == sorted(starts) and starts[0] == len(CONTENT) // 2
    assert {etag for _, _, etag, _ in server.requests[1:]} == {'"v1"'}


def test_a_second_start_goes_on_with_what_the_first_one_left(server):
    server.plan = ("drops", "HTTP 403")
    with pytest.raises(OSError, match="no mirror has served it .*HTTP 403.*; .*; .*make_data.py"):
        get(server)
    assert left() == ["toy.bin.part", "toy.bin.state"]  # nothing that could be taken for the file
    get(server)
    assert server.requests[-1][1] == f"bytes={len(CONTENT) // 2}-" and left() == ["toy.bin"]
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stop_behind_the_last_byte_asks_for_nothing_again(server, monkeypatch, damaged):
    toy = download.SETS["toy"]
    monkeypatch.setitem(download.SETS, "toy", dataclasses.replace(toy, sha256={"data/toy.bin": SHA}))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "file_hash", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        get(server)
    assert left() == ["toy.bin.part", "toy.bin.state"]
    if damaged:  # of the right size, but not what came: the hash tells, and the next mirror serves it
        Path("got/toy/toy.bin.part").write_bytes(CONTENT[::-1])
    get(server, "--mirror", server.address, f"{server.address}/second")
    assert len(server.requests) == 1 + damaged and left() == ["toy.bin"]
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_anew(server):
    server.plan = ("drops", "HTTP 403")
    with pytest.raises(OSError):
        get(server)
    server.content, server.etag = CONTENT[::-1], '"v2"'
    get(server)
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("first", ["weak etag", "no etag"])
def test_without_an_etag_that_vouches_for_bytes_it_begins_anew(server, first):
    server.plan = (first,)
    get(server)
    assert server.requests[1][1] is None and Path("got/toy/toy.bin").read_bytes() == CONTENT


def test_a_server_that_ignores_ranges_sends_the_file_once_not_one_and_a_half_times(server):
    server.plan = ("drops", "ignores range")
    get(server)
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT


def test_a_file_that_became_shorter_is_fetched_anew(server):
    server.plan = ("drops", "HTTP 403")
    with pytest.raises(OSError):
        get(server)
    server.content = CONTENT[:1000]
    get(server)
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT[:1000]


def test_a_throttled_request_waits_as_asked(server):
    server.plan = ("HTTP 429 7", "HTTP 503 3600", "HTTP 500")
    get(server)
    assert server.waits == [7, 60, 8] and Path("got/toy/toy.bin").read_bytes() == CONTENT


def test_redirects_are_followed_and_the_hash_of_the_first_answer_is_compared(server, capsys):
    server.plan, server.linked = ("redirect", "drops", "redirect"), SHA
    get(server)
    assert [path for path, *_ in server.requests][1::2] == ["/cdn?signature=1"] * 2
    assert server.requests[-1][1] == f"bytes={len(CONTENT) // 2}-" and "(as stated)" in capsys.readouterr().out
    shutil.rmtree("got")
    server.plan, server.linked = ("redirect", "damages"), SHA
    with pytest.raises(OSError, match=f"what came is not the file: .* not {SHA}"):
        get(server)
    assert left() == []


def test_a_known_hash_is_compared_and_the_next_mirror_asked(server, monkeypatch):
    toy = download.SETS["toy"]
    monkeypatch.setitem(download.SETS, "toy", dataclasses.replace(toy, sha256={"data/toy.bin": SHA}))
    server.plan = ("damages",)
    get(server, "--mirror", server.address, f"{server.address}/second/")
    assert server.requests[1][0] == "/second/datasets/me/toy/resolve/main/data/toy.bin"
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT and left() == ["toy.bin"]


def test_the_endpoint_of_the_environment_is_asked_first(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{server.address}/mine/")
    run("download", "toy", "--output", "got")
    assert [path for path, *_ in server.requests] == ["/mine/datasets/me/toy/resolve/main/data/toy.bin"]


@pytest.mark.parametrize("word, reason", [("HTTP 404", "HTTP 404"), ("web page", "sends a web page"),
                                          ("HTTP 401", "HTTP 401"), ("bad length", "a length of 'abc'")])
def test_a_mirror_without_the_file_is_left_at_once(server, word, reason):
    server.plan = (word,)
    with pytest.raises(OSError, match=f"{reason}.*; .*; "):
        get(server)
    assert len(server.requests) == 1 and server.waits == [] and left() == []


def test_an_empty_file_is_never_whole(server):
    server.content = b""
    with pytest.raises(OSError, match="what came is not the file: 0 bytes.*; .*; "):
        get(server)
    assert left() == []
    Path("got/toy/toy.bin").touch()  # as a version of before may have left it
    server.content = CONTENT
    get(server)
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT


def test_a_wrong_part_is_not_appended(server):
    server.plan = ("drops", "wrong part")
    with pytest.raises(OSError, match="another part than was asked for"):
        get(server)
    assert left() == ["toy.bin.part", "toy.bin.state"]


def test_a_server_that_only_fails_is_given_up(server):
    server.plan = ("HTTP 500",) * 20
    with pytest.raises(OSError, match="5 times in a row"):
        get(server)
    assert len(server.requests) == 5 and server.waits == [2, 4, 8, 16]


def test_a_file_without_a_length_is_read_to_its_end(server):
    server.plan = ("no length",)
    get(server)
    assert Path("got/toy/toy.bin").read_bytes() == CONTENT


def test_offline_it_says_so_and_names_the_embedded_data(server, tmp_path):
    """As a user would run it; port 9 is closed."""
    done = subprocess.run([sys.executable, prepare_data.__file__, "download", "tinystories", "--mirror",
                           "http://127.0.0.1:9", "http://no.such.host.invalid", "--output", str(tmp_path / "got")],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no mirror has served it (127.0.0.1:9: " in done.stderr and "python make_data.py" in done.stderr


@pytest.mark.slow
def test_a_killed_download_leaves_no_file_and_goes_on(server):
    server.plan = ("stalls",)
    code = ("import download, prepare_data as p\ndownload.SETS['toy'] = download.Public('me/toy', {'data/toy.bin': 2}, "
            f"'free')\np.main(p.parse_args(['download', 'toy', '--output', 'got', '--mirror', {server.address!r}]))")
    running = subprocess.Popen([sys.executable, "-c", code],
                               env={**os.environ, "PYTHONPATH": str(Path(prepare_data.__file__).parent)})
    part = Path("got/toy/toy.bin.part")
    for _ in range(600):
        if part.exists() and part.stat().st_size:
            break
        threading.Event().wait(0.1)
    running.kill()
    running.wait()
    assert left() == ["toy.bin.part", "toy.bin.state"] and part.stat().st_size
    get(server)
    assert server.requests[-1][1].startswith("bytes=") and Path("got/toy/toy.bin").read_bytes() == CONTENT


def test_too_little_room_is_said_before_anything_is_written(server, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=101 << 20))
    with pytest.raises(OSError, match=r"2 MB are still to come and 106 MB are free .*; .*; "):
        get(server)
    assert left() == []


def test_an_archive_is_unpacked_whole(server, monkeypatch):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("val/law.csv", "id,question\n")
    server.content = packed.getvalue()
    monkeypatch.setitem(download.SETS, "toy", download.Public("me/toy", {"exam.zip": 1}, "a toy licence"))
    get(server)
    assert Path("got/toy/exam/val/law.csv").read_text() == "id,question\n" and left() == ["exam", "exam.zip"]
    shutil.rmtree("got")
    server.content = packed.getvalue()[:-30]
    with pytest.raises(ValueError, match="exam.zip: .*; .*; delete it"):
        get(server)
    assert left() == ["exam.zip"]


@pytest.mark.parametrize("rows, name, expected", [
    ([{"question": "问", "choices": ["a", "b"], "answer": 1}] * 2, "test.jsonl",
     '{"question": "问", "choices": ["a", "b"], "answer": 1}\n' * 2),
    ([{"text": " = A title = \n"}, {"text": ""}, {"text": " Words . \n"}], "test.txt", " = A title = \n Words . \n")])
def test_a_benchmark_in_parquet_is_written_as_lines_too(server, monkeypatch, rows, name, expected):
    parquet, arrow, packed = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow"), io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), packed)
    server.content = packed.getvalue()
    monkeypatch.setitem(download.SETS, "toy", download.Public("me/toy", {"all/test.parquet": 1}, ""))
    monkeypatch.setitem(download.GROUPS, "eval", ("toy",))
    get(server)
    assert left() == sorted([name, "test.parquet"]) and Path("got/toy", name).read_text(encoding="utf-8") == expected


def test_without_pyarrow_a_benchmark_stays_as_it_came(server, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(download.SETS, "toy", download.Public("me/toy", {"all/test.parquet": 1}, ""))
    monkeypatch.setitem(download.GROUPS, "eval", ("toy",))
    get(server)
    assert left() == ["test.parquet"] and "pip install pyarrow" in capsys.readouterr().out


def test_shards_and_groups_name_their_files(server, monkeypatch, capsys):
    monkeypatch.setitem(download.SETS, "toy", download.Public("me/toy", {"last": 1}, "", "part_{:03d}", 1))
    monkeypatch.setitem(download.GROUPS, "both", ("toy", "toy"))
    server.content = b"x"
    done = get(server, "--mirror", server.address, "--shards", "2", name="both")
    assert [path.name for path in done["toy"]] == ["last", "part_000", "part_001"] and left() == [
        "last", "part_000", "part_001"]
    monkeypatch.setitem(download.SETS, "few", download.Public("me/few", {}, "", "part-{:05d}-of-00002.txt", 1))
    assert len(get(server, "--mirror", server.address, "--shards", "8", name="few")["few"]) == 2
    assert "few: has 2 shards; all of them are fetched" in capsys.readouterr().out
    with pytest.raises(ValueError, match="download nothing: no set of that name; .*; .*"):
        run("download", "nothing")
    with pytest.raises(ValueError, match="--mirror mirror.example; .*; "):
        get(server, "--mirror", "mirror.example")


def test_every_set_has_an_address_at_every_mirror_it_names(monkeypatch):
    for name, public in download.SETS.items():
        files = [*public.files, *([public.shards.format(3)] if public.shards else [])]
        assert files and public.licence, name
        for path in files:
            found = download.addresses(public, path, list(download.MIRRORS))
            hosts = [re.fullmatch(r"https://([\w.-]+)/[^ ]+", url)[1] for url in found]
            expected = ["raw.githubusercontent.com"] if "githubusercontent" in public.repo else [
                "huggingface.co", "hf-mirror.com"] + ["www.modelscope.cn"] * bool(public.modelscope)
            assert hosts == expected, name
    assert download.addresses(download.SETS["piqa"], "a b", ["huggingface"]) == [
        "https://huggingface.co/datasets/ybisk/piqa/resolve/078a131412f46a38025a762322c174a8bae2610c/a%20b"]
    table = (Path(prepare_data.__file__).parent / "docs/data.md").read_text(encoding="utf-8")
    assert not [name for name in download.SETS if f"`{name}`" not in table]
    for names in download.GROUPS.values():
        assert set(names) <= set(download.SETS)
    assert all(re.fullmatch("[0-9a-f]{64}", value) and path in public.files
               for public in download.SETS.values() for path, value in public.sha256.items())


# ---------------------------------------------------------------------------------------------------------------------
# export


@pytest.fixture
def export(tmp_path, tokenizer):
    """export(stage, rows, *flags) -> ({name: array}, facts)."""
    tokenizer.save_pretrained(tmp_path / "tok")

    def made(stage, rows, *flags, form="npz"):
        facts = run("export", "--stage", stage, "--data_path", write(tmp_path / "rows.jsonl", rows), "--tokenizer",
                    tmp_path / "tok", "--format", form, "--output", tmp_path / f"e.{form}", *flags)
        if form == "pt":
            return torch.load(tmp_path / "e.pt", weights_only=True), facts
        with np.load(tmp_path / "e.npz") as arrays:
            return dict(arrays), facts

    return made


def unpad(arrays, i, name=""):
    """(ids, mask) of row i, after a check of its padding and labels."""
    length = int(arrays[f"{name}lengths"][i])
    ids, labels, mask = (arrays[f"{name}{kind}"][i].tolist() for kind in ("input_ids", "labels", "loss_mask"))
    assert labels == [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
    assert not any(mask[length:])
    return ids[:length], mask[:length]


@pytest.mark.parametrize("form", ["npz", "pt"])
def test_exported_conversations_are_those_of_render(export, tokenizer, form):
    rows = [{"messages": chat("What is 2 + 3?", "It is 5." * (i + 1)) + chat("And now?", "Sure!")} for i in range(5)]
    arrays, facts = export("sft", rows, form=form)
    for i, row in enumerate(rows):
        ids, mask = tokenizer.render(row["messages"])
        assert unpad(arrays, i) == (ids, mask)
    width = max(len(tokenizer.render(row["messages"])[0]) for row in rows)
    assert arrays["input_ids"].shape == (5, width) and (arrays["input_ids"][0][-1] == tokenizer.pad_id)
    assert facts["truncated"] == facts["dropped"] == 0
    if form == "pt":
        assert {x.dtype for x in arrays.values()} == {torch.int64}


def test_exported_pairs_are_those_of_render_up_to_the_end_token(export, tokenizer):
    rows = [{"prompt": "What is 2 + 3?", "chosen": "Sure! It is 5.", "rejected": "5"}]
    arrays, _ = export("dpo", rows)
    for side in ("chosen", "rejected"):
        ids, mask = tokenizer.render(chat("What is 2 + 3?", rows[0][side]))
        end = len(mask) - mask[::-1].index(1)  # what follows the end token is not kept (dataset.py says why)
        assert unpad(arrays, 0, f"{side}_") == (ids[:end], mask[:end])


@pytest.mark.parametrize("add_bos, add_eos", [(1, 0), (1, 1), (0, 0), (0, 1)])
def test_exported_documents_begin_and_end_as_the_flags_say(export, tokenizer, add_bos, add_eos):
    texts = ["Anna has three apples.", "小猫是棕色的。", "a cat " * 30]
    arrays, facts = export("pretrain", [{"text": text} for text in texts], "--max_length", "20", "--add_bos", add_bos,
                           "--add_eos", add_eos)
    cut = 0
    for i, text in enumerate(texts):
        expected = [tokenizer.bos_id] * add_bos + tokenizer.encode(text) + [tokenizer.eos_id] * add_eos
        cut += len(expected) > 20
        expected = expected[:20]
        assert unpad(arrays, i) == (expected, [0] + [1] * (len(expected) - 1))
    assert facts["truncated"] == cut >= 1


def test_without_bos_a_conversation_loses_that_token_only(export, tokenizer):
    row = {"messages": chat("What is 2 + 3?", "It is 5.")}
    ids, mask = tokenizer.render(row["messages"])
    arrays, _ = export("sft", [row], "--add_bos", "0", "--max_length", len(ids) - 1)
    assert ids[0] == tokenizer.bos_id and unpad(arrays, 0) == (ids[1:], mask[1:])
    arrays, _ = export("sft", [row], "--add_bos", "0")
    assert arrays["input_ids"].shape == (1, len(ids) - 1)


@pytest.mark.parametrize("bos", ["<|im_start|>", None])
def test_what_opens_a_conversation_is_kept_where_it_is_no_bos_of_its_own(export, tokenizer, tmp_path, bos):
    """MiniMind's tokenizer names <|im_start|> as its bos, Qwen's has none."""
    config = json.loads(tokenizer.files["tokenizer_config.json"]) | {"bos_token": bos}
    foreign = Tokenizer(tokenizer.files | {"tokenizer_config.json": json.dumps(config)})
    foreign.save_pretrained(tmp_path / "tok")
    row = {"messages": chat("What is 2 + 3?", "It is 5.")}
    ids, mask = foreign.render(row["messages"])
    arrays, facts = export("sft", [row], "--add_bos", "0", "--max_length", len(ids))
    assert unpad(arrays, 0) == (ids, mask) and facts["truncated"] == 0
    arrays, facts = export("sft", [row], "--add_bos", "0", "--max_length", len(ids) - 2)
    assert unpad(arrays, 0) == (ids[:-2], mask[:-2]) and facts["truncated"] == 1
    for add_bos in (0, 1):  # documents lose it, and what stands in its place
        arrays, _ = export("pretrain", [{"text": "a cat"}], "--add_bos", add_bos)
        begin = [foreign.bos_id] if bos and add_bos else []
        assert unpad(arrays, 0)[0] == begin + foreign.encode("a cat") == arrays["input_ids"][0].tolist()


def test_what_is_cut_or_left_out_is_counted_and_warned_of(export, capsys):
    rows = [{"messages": chat("q", "a" * 100)}, {"messages": chat("q" * 100, "a")}, {"messages": chat("q", "a")}]
    arrays, facts = export("sft", rows, "--max_length", "24")
    assert (facts["rows"], facts["truncated"], facts["dropped"]) == (2, 1, 1) and arrays["input_ids"].shape[1] == 24
    assert "warning: 1 rows were longer than 24 tokens and are cut, 1 left out" in capsys.readouterr().out


def test_export_equals_what_training_sees(export, tokenizer, tmp_path):
    rows = [{"messages": chat(f"question {i}?", "answer " * (i + 1))} for i in range(6)]
    arrays, _ = export("sft", rows, "--max_length", "40")
    data = SFTData(tmp_path / "rows.jsonl", tokenizer, 40, tmp_path / "cache")
    batch = data.batch(range(len(data)))
    trained = [batch["ids"][row][(batch["mask"][row] > 0)].tolist() for row in range(len(data))]
    assert Counter(sum(trained, [])) == Counter(arrays["labels"][arrays["labels"] >= 0].tolist())


def test_a_file_with_other_columns_is_exported_as_lines_for_the_tokenizer(tmp_path):
    """The command in the error of `tokenizer.py train` is run as it stands, but for the column that only users know."""
    path = tmp_path / "my texts.csv"
    path.write_text('body,lang\n"one\ntwo",en\n"",en\n春天,zh\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"my texts.csv:2: found the keys \[body, lang\] and no text") as error:
        list(iter_texts([path]))
    words = shlex.split(re.search("python prepare_data.py (.*)", str(error.value))[1])
    with pytest.raises(ValueError, match="the map wants COLUMN"):
        run(*words)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["my texts.csv"]
    assert run(*(word.replace("COLUMN", "body") for word in words)) == {"read": 3, "empty": 1, "written": 2, "bad": 0}
    assert list(iter_texts([tmp_path / "my texts.text.jsonl"])) == ["one\ntwo", "春天"]


def test_exported_lines_are_rows_in_the_form_that_training_reads(export, tmp_path):
    rows = [{"instruction": "q", "output": "a", "source": "web"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    path = write(tmp_path / "a.jsonl", rows)
    run("export", "--format", "jsonl", "--data_path", path, "--output", tmp_path / "out.jsonl")
    assert [row for row, _ in read_rows(tmp_path / "out.jsonl")] == [
        {"conversations": chat("q", "a"), "source": "web"}, rows[1]]
    with pytest.raises(ValueError, match="a.jsonl:1: found a row for sft; --stage dpo .*; "):
        run("export", "--format", "jsonl", "--data_path", path, "--stage", "dpo", "--output", tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="export to npz: --stage missing, --tokenizer missing; .*; "):
        run("export", "--data_path", path)
    assert not list(tmp_path.glob("other*"))


def test_the_ending_of_the_output_is_the_format_and_no_flag_is_ignored_in_silence(export, tmp_path):
    export("sft", chats("a", 2))  # makes the tokenizer as well
    words = ["export", "--stage", "sft", "--data_path", tmp_path / "rows.jsonl"]
    tensors = [*words, "--tokenizer", tmp_path / "tok"]
    run(*tensors, "--output", tmp_path / "own.pt")
    assert set(torch.load(tmp_path / "own.pt", weights_only=True)) == {"input_ids", "labels", "loss_mask", "lengths"}
    assert run(*words, "--output", tmp_path / "own.jsonl")["written"] == 2
    with pytest.raises(ValueError, match="--output .*own.pt with --format npz; .*; leave --format out"):
        run(*tensors, "--output", tmp_path / "own.pt", "--format", "npz")
    for flags in (["--tokenizer", tmp_path / "tok"], ["--max_length", 5], ["--add_bos", 0], ["--add_eos", 1]):
        with pytest.raises(ValueError, match=f"{flags[0]}.* with jsonl; .*; leave it out"):
            run(*words, "--format", "jsonl", "--output", tmp_path / "own.jsonl", *flags)


def test_export_maps_columns_and_refuses_a_second_end_token(export):
    arrays, _ = export("sft", [{"q": "2 + 3?", "a": "5"}], "--map", "prompt=q", "completion=a")
    plain, _ = export("sft", [{"messages": chat("2 + 3?", "5")}])
    assert all(np.array_equal(arrays[name], plain[name]) for name in plain)
    with pytest.raises(ValueError, match="--add_eos 1 with --stage sft; .*; "):
        export("sft", [{"messages": chat("q", "a")}], "--add_eos")


@pytest.mark.parametrize("flags, message", [
    (["--map", "prompt=q", "completion=a"], r"/rows.jsonl:2: found 5 as the turns; .*; "),
    (["--map", "prompt=ask"], r"/rows.jsonl:1: found the keys \[q, a\]; the map wants ask; "),
    (["--max_length", "1"], "max_length 1; .*; give --max_length 128"),
    (["--map", "prompt=q", "completion=a", "--skip_bad", "1", "--max_length", "9"], "works is [0-9]+ .--max_length"),
])
def test_errors_of_an_export_name_the_file_and_the_flags_of_the_user(export, flags, message):
    with pytest.raises(ValueError, match=message):
        export("sft", [{"q": "2 + 3?", "a": "5"}, {"q": 5, "a": "5"}], *flags)


@pytest.mark.parametrize("form", ["npz", "jsonl"])
def test_an_export_replaces_neither_its_source_nor_a_folder(tmp_path, tokenizer, form):
    tokenizer.save_pretrained(tmp_path / "tok")
    path = write(tmp_path / "a.json", chats("a", 3))
    words = ["export", "--stage", "sft", "--format", form, "--data_path", path]
    words += ["--tokenizer", tmp_path / "tok"] if form == "npz" else []
    for output, why in ((tmp_path / "tok" / ".." / "a.json", "in --data_path as well"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"--output .* is {why}; .*; give another"):
            run(*words, "--output", output)
    assert len(list(read_rows(path))) == 3 and not list(tmp_path.parent.glob("*.tmp"))
