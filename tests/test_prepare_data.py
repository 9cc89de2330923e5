"""Proves the preparation of data: mixes of the sizes asked for that a re-run repeats, duplicates found and no others,
downloads that are whole or not there, exports equal to what training sees.

    python -m pytest tests/test_prepare_data.py
"""
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import prepare_data
from dataset import PreferenceData, PretrainData, PromptData, SFTData, read_rows
from prepare_data import language, main, parse_args, signature, standard_row

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
    ({"sources": [{"name": "a", "category": "x", "path": "p"}], "targets": {"x": {"share": 0.5}}}, "needs a total"),
])
def test_a_bad_config_is_explained(tmp_path, config, message):
    (tmp_path / "mix.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        run("mix", "--config", tmp_path / "mix.json", "--output", tmp_path / "out")
    assert str(error.value).count("; ") >= 2


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
        config = {"sources": [{"name": "a", "category": "x", "path": str(tmp_path / f"{size}.jsonl")}]}
        (tmp_path / "mix.json").write_text(json.dumps(config))
        code = MEMORY.format(root=str(Path(prepare_data.__file__).parent), config=str(tmp_path / "mix.json"),
                             output=str(tmp_path / "out"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks


# ---------------------------------------------------------------------------------------------------------------------
# Duplicates and languages


def shingles(text):
    text = " ".join(text.lower().split())
    return {text[i:i + prepare_data.SHINGLE] for i in range(len(text) - prepare_data.SHINGLE + 1)}


def test_near_duplicates_are_found_as_often_as_the_formula_says():
    """Jaccard similarity is counted from the sets themselves; the share found is compared with 1 - (1 - s^11)^11."""
    rng = random.Random(0)
    expected, found, variance = Counter(), Counter(), Counter()
    for _, changed in itertools.product(range(150), (2, 6, 14, 40)):
        one = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(150)]
        two = list(one)
        for i in rng.sample(range(150), changed):
            two[i] = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))
        one, two = " ".join(one), " ".join(two)
        a, b = shingles(one), shingles(two)
        probability = 1 - (1 - (len(a & b) / len(a | b)) ** 11) ** 11
        expected[changed] += probability
        variance[changed] += probability * (1 - probability)
        found[changed] += bool((signature(one) == signature(two)).any())
    for changed in found:
        assert abs(found[changed] - expected[changed]) < 4 * (variance[changed] + 0.5) ** 0.5, (expected, found)
    assert found[2] > 145 and found[40] < 5


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


def test_inspect_maps_columns_and_counts_bad_rows(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nq1,a1\nq2\nq3,a3\n")
    facts = run("inspect", tmp_path / "a.csv", "--map", "prompt=question", "completion=answer", "--skip_bad", "1")
    assert facts["rows"] == 2 and facts["left out"]["bad"] == 1 and facts["stages"] == {"sft": 2}
    with pytest.raises(ValueError, match="--map question; .*;.*"):
        run("inspect", tmp_path / "a.csv", "--map", "question")
