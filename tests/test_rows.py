"""Proves the reader of rows: one table from every format, errors with file and line whatever is broken, all the shapes
of public collections.

    python -m pytest tests/test_rows.py
"""
import csv
import gzip
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

import rows as rows_file
from rows import conversation, expand_paths, preference, question, read_rows


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + turns


# ---------------------------------------------------------------------------------------------------------------------
# Files and formats


def test_paths_are_files_or_globs_and_errors_say_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "x[1].jsonl", "c.xml"):
        Path(name).write_text("{}\n")
    assert [str(p) for p in expand_paths(["x[1].jsonl", "[ab].jsonl"])] == ["x[1].jsonl", "a.jsonl", "b.jsonl"]
    assert expand_paths(None) == [] and expand_paths("a.jsonl") == [Path("a.jsonl")]
    with pytest.raises(FileNotFoundError, match="nothing.*looked from .*make_data"):
        expand_paths(["nothing*.jsonl"])
    with pytest.raises(ValueError, match="is a folder"):
        expand_paths([tmp_path])
    with pytest.raises(ValueError, match="unknown ending"):
        expand_paths(["c.xml"])


def test_lines_end_at_newline_only_and_a_bom_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "one\u2028two\x85"}\r\n\n{"text": "three"}'.encode())
    rows = list(read_rows([path]))
    assert [row["text"] for row, _ in rows] == ["one\u2028two\x85", "three"]
    assert [where for _, where in rows] == [f"{path}:1", f"{path}:3"]


def test_gzip_equals_plain_and_text_files_split_at_blank_lines(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    (tmp_path / "b.txt").write_bytes("\nfirst line\r\nsecond line\r\n \r\n\nthird\u2028\n".encode())
    rows = [row["text"] for row, _ in read_rows([tmp_path / "a.jsonl.gz", tmp_path / "b.txt"])]
    assert rows == ["zipped", "first line\nsecond line", "third\u2028"]


def test_a_text_file_without_blank_lines_is_cut_into_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_file, "DOCUMENT_LIMIT", 20)
    lines = [f"line {i}" for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    rows = [row["text"] for row, _ in read_rows(tmp_path / "a.txt")]
    assert len(rows) > 10 and "\n".join(rows).split("\n") == lines


BROKEN = {
    "json": (b'{"text": "ok"}\n{"text": "half\n', "a.jsonl:2: not valid JSON"),
    "array": (b'{"text": "ok"}\n[1, 2]\n', "a.jsonl:2: a JSON list"),
    "nul": (b'{"text": "ok"}\n{"text": "a\0b"}\n', "a.jsonl:2: a NUL byte"),
    "latin": ('{"text": "ok"}\n{"text": "é"}\n'.encode("latin-1"), "a.jsonl:2: not UTF-8"),
    "digits": (b'{"text": "ok"}\n{"text": ' + b"1" * 5000 + b"}\n", "a.jsonl:2: not valid JSON (a number"),
    "deep": (b'{"text": "ok"}\n' + b"[" * 100000 + b"\n", "a.jsonl:2: not valid JSON (nested too deeply)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_with_file_line_and_text_or_skipped_and_counted(tmp_path, capsys, name):
    content, expected = BROKEN[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_rows(path))
    assert expected in str(error.value) and "text starts: " in str(error.value) and "--skip_bad 1" in str(error.value)
    assert [row["text"] for row, _ in read_rows(path, skip_bad=True)] == ["ok"]
    assert "skipped 1 bad lines" in capsys.readouterr().out


def test_utf16_and_broken_gzip_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("hello", encoding="utf-16")
    with pytest.raises(ValueError, match="a.txt:1: the file is UTF-16"):
        list(read_rows(tmp_path / "a.txt"))
    whole = gzip.compress(json.dumps({"text": random.Random(0).randbytes(3000).hex()}).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip at all")
    for name in ("b.jsonl.gz", "c.jsonl.gz"):
        with pytest.raises(ValueError, match=f"{name}:1: broken gzip data"):
            list(read_rows(tmp_path / name))


def test_stories_are_parted_by_their_marker_and_keep_their_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\none\n\nstill one\n<|endoftext|>\n\ntwo\n\n<|endoftext|>\n")
    assert list(read_rows(tmp_path / "a.txt")) == [({"text": "one\n\nstill one"}, f"{tmp_path / 'a.txt'}:2"),
                                                   ({"text": "two"}, f"{tmp_path / 'a.txt'}:7")]


ROWS = [{"text": 'a "quoted", text\nof two lines', "n": "1"}, {"text": "\u2028 中文 é", "n": "2"},
        {"text": "c", "n": ""}]


def as_csv(rows, **style):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), **style)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("name, content", {
    "lines.jsonl": "\n".join(map(json.dumps, ROWS)),
    "lines.json": "\n\n".join(map(json.dumps, ROWS)),
    "array.json": json.dumps(ROWS),
    "indented.json": "\ufeff\n" + json.dumps(ROWS, indent=1, ensure_ascii=False),
    "unix.csv": as_csv(ROWS, lineterminator="\n"),
    "windows.csv": "\ufeff" + as_csv(ROWS),
}.items())
@pytest.mark.parametrize("packed", [False, True])
def test_one_table_reads_alike_from_every_format(tmp_path, name, content, packed, monkeypatch):
    """The files are written by Python's own json and csv modules."""
    monkeypatch.setattr(rows_file, "READ_BYTES", 7)  # an array then arrives in pieces that end anywhere
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    rows = list(read_rows(path))
    assert [row for row, _ in rows] == ROWS
    if name == "unix.csv":  # the second row begins on line 4, behind a text of two lines
        assert [where.removeprefix(str(path)) for _, where in rows] == [":2", ":4", ":5"]
    if name == "array.json":
        assert [where.removeprefix(str(path)) for _, where in rows] == [":1", ":2", ":3"]


def test_parquet_reads_like_lines(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist
    rows = [{"messages": chat("q", f"a{i}"), "n": i} for i in range(1000)]
    parquet.write_table(table(rows), tmp_path / "a.parquet", row_group_size=300)
    found = list(read_rows(tmp_path / "a.parquet"))
    assert [row for row, _ in found] == rows and found[999][1] == f"{tmp_path / 'a.parquet'}:1000"
    whole = (tmp_path / "a.parquet").read_bytes()
    for name, content in {"cut": whole[:-20], "empty": b"", "other": b"not parquet at all"}.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.parquet:1: broken parquet data .*;.*;"):
            list(read_rows(tmp_path / f"{name}.parquet", skip_bad=True))
    # the footer is whole, so the file opens; a page of the last row group is not
    (tmp_path / "page.parquet").write_bytes(whole[:len(whole) // 2] + bytes(200) + whole[len(whole) // 2 + 200:])
    with pytest.raises(ValueError, match=r"page.parquet:\d+: broken parquet data"):
        list(read_rows(tmp_path / "page.parquet"))


def test_parquet_columns_that_are_no_json_become_text(tmp_path, monkeypatch):
    """The types themselves in Python need pandas (ns) or a time zone that exists."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setitem(sys.modules, "pandas", None)
    second, turn = 10**9, arrow.struct([("content", arrow.string()), ("at", arrow.timestamp("ns", "UTC"))])
    columns = {"text": arrow.array(["a", "b"]),
               "ns": arrow.array([second + 1, None], arrow.timestamp("ns")),
               "nowhere": arrow.array([0, second], arrow.timestamp("us", "Asia/Nowhere")),
               "day": arrow.array([0, 1], arrow.date32()),
               "answer": arrow.array(["40.0", "65.0"]).cast(arrow.decimal128(9, 1)),
               "turns": arrow.array([[{"content": "q", "at": second + 1}], None], arrow.list_(turn)),
               "raw": arrow.array([b"caf\xc3\xa9", b"\x89PNG"]),
               "picture": arrow.array([{"bytes": b"\xff", "path": "p"}] * 2)}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    one, two = (row for row, _ in read_rows(tmp_path / "a.parquet"))
    assert one == {"text": "a", "ns": "1970-01-01 00:00:01.000000001", "nowhere": "1970-01-01 00:00:00.000000",
                     "day": "1970-01-01", "answer": "40.0", "raw": "café",
                     "turns": [{"content": "q", "at": "1970-01-01 00:00:01.000000001"}],
                     "picture": {"bytes": None, "path": "p"}}
    assert [two[name] for name in ("ns", "turns", "raw", "answer")] == [None, None, None, "65.0"]


def test_without_pyarrow_parquet_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # an import of it then fails
    with pytest.raises(ValueError, match="a.parquet: .*not installed; .*; run: pip install pyarrow"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("content, expected", [
    ('a,b\n1,2\n3\n4,5,6\n7,8\n', ["a.csv:3: 1 cells under 2 columns", "a.csv:4: 3 cells under 2 columns"]),
    ('a,b\n1,2\n"x" y,4\n7,8\n', ["a.csv:3: not valid CSV"]),
    ('a,b\n1,2\n"open,4\n5,6\n"x",y\n7,8\n', ["a.csv:3: not valid CSV", "a.csv:4: not", "a.csv:5: not .* in line 3"]),
    ('a,b\n1,2\n"open\n5,6\n"\n7,8\n', ["a.csv:3: 1 cells", "a.csv:4: 1 cells", "a.csv:5: 1 cells"]),
    ('a,b\n1,2\n\0,5\n7,8\n', ["a.csv:3: a NUL byte"]),
])
def test_a_broken_csv_row_is_named_or_skipped_and_counted(tmp_path, content, expected):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=f"{expected[0]}.*;.*--skip_bad 1"):
        list(read_rows(tmp_path / "a.csv"))
    bad = []
    assert [row["a"] for row, _ in read_rows(tmp_path / "a.csv", skip_bad=True, bad=bad)] == ["1", "7"]
    assert len(bad) == len(expected) and all(map(re.search, expected, bad))


@pytest.mark.parametrize("limit", [16 << 20, 1000])  # of a cell; beyond it the rest of the file is not waited for
def test_a_quote_that_is_never_closed_is_an_error_even_with_skip_bad(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(rows_file, "DOCUMENT_LIMIT", limit)
    (tmp_path / "a.csv").write_text('text\nrow\n"open quote\n' + "row\n" * 500)
    with pytest.raises(ValueError, match="a.csv:3: not valid CSV .* is not closed; .*; "):
        list(read_rows(tmp_path / "a.csv", skip_bad=True))


def test_csv_columns_need_names_of_their_own_and_long_cells_are_no_error(tmp_path):
    (tmp_path / "a.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match="a.csv:1: found a column name twice.*;.*;"):
        list(read_rows(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("text\n" + "x" * 300_000 + "\n")  # csv's own limit is 131,072
    assert len(next(read_rows(tmp_path / "b.csv"))[0]["text"]) == 300_000


@pytest.mark.parametrize("content, message", [
    ('[{"a": 1}, {"a": 2', "a.json:2: not valid JSON"), ('[{"a": 1}, {"a": 2}', "a.json:3: not valid JSON"),
    ('[{"a": 1}, {a}]', "a.json:2: not valid JSON"), ("[" * 100_000, "a.json:1: not valid JSON")])
def test_a_broken_array_is_an_error_even_with_skip_bad(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"{message}.*;.*;"):
        list(read_rows(tmp_path / "a.json", skip_bad=True))


def test_what_is_no_object_in_an_array_is_skipped_and_counted(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, 7, [2], {"a": 3}]')
    bad = []
    assert [row["a"] for row, _ in read_rows(tmp_path / "a.json", skip_bad=True, bad=bad)] == [1, 3]
    assert [re.sub(".*json:", "", text) for text in bad] == [
        "2: a JSON int where an object {...} must stand; text starts: '7'",
        "3: a JSON list where an object {...} must stand; text starts: '[2]'"]


@pytest.mark.parametrize("ending", ["jsonl", "txt", "csv"])
def test_an_endless_line_is_refused_and_the_next_one_read(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(rows_file, "LINE_LIMIT", 1000)
    line = {"jsonl": '{"text": "%s"}', "txt": "%s\n", "csv": "%s"}[ending]
    lines = ["text"] * (ending == "csv") + [line % "before", line % ("x" * 5000), line % "after"]
    path = tmp_path / f"a.{ending}"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"a.{ending}:\d: a line of more than 0 MB .*--skip_bad 1"):
        list(read_rows(path))
    assert [row["text"] for row, _ in read_rows(path, skip_bad=True)] == ["before", "after"]


HUGE = """
import sys
sys.path.insert(0, {root!r})
from rows import read_rows
print([row for row, _ in read_rows({path!r}, skip_bad=True)])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_a_line_of_100_mb_is_counted_and_not_held_in_memory(tmp_path):
    peaks = []
    for size in (1, 100 << 20):
        path = tmp_path / f"{size}.jsonl"
        with open(path, "wb") as file:
            file.write(b'{"text": "' + b"x" * size + b'"}\n{"text": "after"}\n')
        code = HUGE.format(root=str(Path(rows_file.__file__).parent), path=str(path))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        assert "'after'" in done.stdout and ("skipped 1 bad" in done.stdout) == (size > 1)
    # the part of the line that was read, once in pieces and once joined
    assert peaks[1] - peaks[0] < 3 * (rows_file.LINE_LIMIT >> 20), peaks


@trials(max_examples=150, deadline=None)
@given(data=st.data(), ending=st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".jsonl.gz", ".csv.gz"]))
def test_a_damaged_file_gives_rows_or_a_message_with_its_name_never_another_error(tmp_path_factory, data, ending):
    """Any run of bytes of a good file may be replaced by any other bytes."""
    good = {".csv": as_csv(ROWS).encode(), ".txt": b"a text\n\nanother\n", ".json": json.dumps(ROWS).encode()}
    content = good.get(ending.removesuffix(".gz"), "\n".join(map(json.dumps, ROWS)).encode())
    content = gzip.compress(content) if ending.endswith(".gz") else content
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    wild = st.sampled_from([b"", b"\0", b'"', b"\n", b"\xff\xfe", b"\xe4\xb8", b"[" * 3000, b"1" * 5000, b"NaN", b"{"])
    path = tmp_path_factory.mktemp("damaged") / f"a{ending}"
    path.write_bytes(content[:start] + data.draw(wild | st.binary(max_size=30)) + content[end:])
    for skip_bad in (False, True):
        try:
            rows = [row for row, _ in read_rows(path, skip_bad=skip_bad, bad=[])]
        except ValueError as error:
            assert re.search(re.escape(str(path)) + r"(:\d+)?: .*; .*", str(error), re.S), error
        else:
            assert all(isinstance(row, dict) for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes of public collections


@pytest.mark.parametrize("row", [
    {"conversations": chat("q", "a", system="s")},
    {"messages": chat("q", "a", system="s")},
    {"messages": chat("q", "a"), "system": "s", "conversations": None},
    {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                       {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "completion": "a", "system": "s"},
    {"prompt": chat("q", system="s"), "completion": chat("q", "a")[1:]},
    {"prompt": "q", "response": "a", "system": "s"},
    {"instruction": "q", "input": "", "output": "a", "system": "s"},
])
def test_every_shape_gives_the_same_conversation(row):
    assert conversation(row) == chat("q", "a", system="s")


@pytest.mark.parametrize("row", [
    {"prompt": "q", "chosen": None, "rejected": None}, {"prompt": "q", "completion": None, "output": None},
    {"messages": chat("q"), "chosen": None, "response": None}, {"messages": chat("q", "a"), "chosen": None}])
def test_empty_columns_of_a_table_say_nothing(row):
    assert question(row) == (chat("q"), "a" if len(row["messages"] if "messages" in row else []) == 2 else None)


def test_instruction_rows_join_their_input_and_keep_their_history():
    row = {"instruction": "Translate.", "input": "one", "output": "eins", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert conversation(row) == chat("q1", "a1", "q2", "a2", "Translate.\none", "eins")
    pair = {key: row[key] for key in ("instruction", "input")} | {"chosen": "eins", "rejected": "zwei"}
    assert preference(pair)[0] == chat("Translate.\none")
