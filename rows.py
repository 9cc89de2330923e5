"""Rows from files: every format that is read, the shapes that rows come in, and the held-out split.

A row is a dict and comes with the place where it stands ("file:line"), so that every later error can name it. Files
are JSON lines, JSON arrays, CSV, parquet or plain text, all but parquet also as .gz, and are read as a stream: memory
does not grow with them. document(), conversation(), preference() and question() know the shapes of public collections,
so that every script takes them as they are. docs/data.md lists formats and shapes.

What this file does not do: know a tokenizer (dataset.py makes batches of rows), change or mix rows (prepare_data.py).

To look at rows:  python -c "import rows; print(next(rows.read_rows('out/data/sft.train.jsonl')))"
"""

import csv
import glob
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".txt", ".txt.gz", ".parquet")
READ_BYTES = 1 << 20  # taken from a file at a time where there are no lines to go by
LINE_LIMIT = 32 << 20  # no document is that long: such a line means missing line ends, and is not read into memory
DOCUMENT_LIMIT = 16 << 20  # a .txt file without blank lines is cut here, or it would be one document as large as itself
END_OF_TEXT = "<|endoftext|>"  # parts the documents of TinyStories' .txt files, which hold blank lines
FIX_LINE = "repair the line, or skip and count such lines with --skip_bad 1 (not in eval.py)"
CHAT = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
# fields of a row that hold its text, or a list of turns, in the shapes of every stage
TEXT_FIELDS = ("system", "text", "conversations", "messages", "instruction", "input", "prompt", "output", "completion",
               "response", "chosen", "rejected")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Files and their lines


def expand_paths(data_path: str | Path | Sequence[str | Path] | None) -> list[Path]:
    """Turn paths and globs into a list of files, in the given order (the matches of one glob are sorted).

    Raises FileNotFoundError for a path or glob without a match, ValueError for a folder or an unknown ending.
    """
    entries = [data_path] if isinstance(data_path, (str, Path)) else data_path or []
    files = []
    for entry in map(str, entries):
        # A name that exists is taken as it is: "data[1].jsonl" is a file name as well as a pattern.
        matches = [entry] if os.path.exists(entry) else sorted(glob.glob(entry, recursive=True))
        if not matches:
            raise FileNotFoundError(f"data file {entry} not found (looked from {os.getcwd()}); paths are relative to "
                                    "the working directory; check it, or write the embedded data: python make_data.py")
        files += [Path(match) for match in matches]
    for path in files:
        if path.is_dir():
            raise ValueError(f"data path {path} is a folder; files or globs are read; give '{path}/*.jsonl'")
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"data file {path} has an unknown ending; it is one of {', '.join(SUFFIXES)}; convert it")
    return files


def row_format(path: Path) -> str:
    """How a file is read: its ending without .gz, such as ".jsonl". The same bytes are other rows under another."""
    return Path(path.name.removesuffix(".gz")).suffix


def _open(path: Path) -> io.BufferedIOBase:
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes without the line end). Only b"\\n" ends a line: U+2028 occurs inside real rows.

    Of a line beyond LINE_LIMIT come the first LINE_LIMIT bytes, which _decode refuses.
    """
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(LINE_LIMIT):
                number += 1
                ended = len(line) < LINE_LIMIT or line.endswith(b"\n")
                yield number, line.rstrip(b"\r\n") if ended else line
                while not ended:
                    rest = file.readline(READ_BYTES)
                    ended = len(rest) < READ_BYTES or rest.endswith(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _broken_gzip(f"{path}:{number + 1}", error) from None


def _broken_gzip(where: str, error: Exception) -> ValueError:
    return ValueError(f"{where}: broken gzip data ({error}); the file must be whole; copy or download it again")


def _decode(raw: bytes, number: int) -> str:
    """One line as text. Raises ValueError with the reason alone; the caller knows file and line."""
    if len(raw) >= LINE_LIMIT:
        raise ValueError(f"a line of more than {LINE_LIMIT >> 20} MB (its line ends are missing)")
    if number == 1:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("the file is UTF-16, not UTF-8")
        raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of Windows editors
    # JSON writes NUL as an escape; a raw one says that the encoding is another, and every later error would mislead.
    if b"\0" in raw:
        raise ValueError("a NUL byte (UTF-16 without its mark, or a damaged file)")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line: {error.reason})") from None


def _refuse(where: str, reason: object, start: str, skip_bad: bool, bad: list[str]) -> None:
    """Raise the error of a bad line or row; with skip_bad add it to `bad` instead. `start` is enough of its text to
    find it in an editor."""
    message = f"{where}: {reason}; text starts: {start[:60]!r}"
    if not skip_bad:
        raise ValueError(f"{message}; lines are UTF-8, in .jsonl one object each; {FIX_LINE}") from None
    bad.append(message)


def _decoded(path: Path, decode: Callable, skip_bad: bool, bad: list[str]) -> Iterator[tuple[int, object, int]]:
    """(line number, decoded line, bytes). A bad line raises; with skip_bad it is added to `bad` instead."""
    for number, raw in _lines(path):
        try:
            value = decode(raw, number)
        except ValueError as error:
            _refuse(f"{path}:{number}", error, raw[:60].decode("utf-8", "replace"), skip_bad, bad)
            continue
        yield number, value, len(raw)


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(line without its end, "file:line") of a text file that holds something else than documents."""
    for number, line, _ in _decoded(path, _decode, False, []):
        yield line, f"{path}:{number}"


# ---------------------------------------------------------------------------------------------------------------------
# 2. Formats


def _decode_json(raw: bytes, number: int) -> dict | None:
    """One JSONL line as a dict, None for a blank line; errors as in _decode."""
    text = _decode(raw, number)
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except ValueError:
        raise ValueError("not valid JSON (a number with thousands of digits)") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} where an object {{...}} must stand")
    return row


def _text_rows(path: Path, skip_bad: bool, bad: list[str]) -> Iterator[tuple[int, dict, int]]:
    """The documents of a .txt file as {"text"} with their first line number: runs of lines between blank lines or, in
    a file that has such lines early on, between END_OF_TEXT lines."""
    marked = any(raw.strip() == END_OF_TEXT.encode() for _, raw in islice(_lines(path), 1000))
    parts, first, size = [], 1, 0
    for number, line, length in _decoded(path, _decode, skip_bad, bad):
        border = line.strip() == (END_OF_TEXT if marked else "")
        if parts and (border or size >= DOCUMENT_LIMIT):
            yield first, {"text": "\n".join(parts).rstrip("\n")}, size
            parts, size = [], 0
        if not border and (parts or line.strip()):
            first = first if parts else number
            parts.append(line)
            size += length + 1
    if parts:
        yield first, {"text": "\n".join(parts).rstrip("\n")}, size


def _csv_rows(path: Path, skip_bad: bool, bad: list[str]) -> Iterator[tuple[int, dict, int]]:
    """The rows of a CSV file as {column: text} with their first line number; the first row names the columns."""
    # The limit of 128 kB that Python sets is below real documents; without any, one open quote would take the whole
    # rest of the file into memory.
    csv.field_size_limit(DOCUMENT_LIMIT)
    taken = []  # numbers of the lines that the row being read is made of: a quoted text may hold line ends
    ended = []  # holds something when the reader has asked for a line behind the last one

    def text():
        for number, line, _ in _decoded(path, _decode, skip_bad, bad):
            taken.append(number)
            yield line + "\n"
        ended.append(True)

    def refuse(reason, start=""):
        for number in taken:  # a row of many lines, most likely from an open quote to the next one, loses them all
            lost = f"{reason}, in the row that begins in line {taken[0]}" if number > taken[0] else reason
            _refuse(f"{path}:{number}", lost, start, skip_bad, bad)

    rows, header = csv.reader(text(), strict=True), None
    while True:
        taken.clear()
        try:
            cells = next(rows, None)
        except csv.Error as error:
            if ended or len(taken) > 1 and "field limit" in str(error):
                raise ValueError(f"{path}:{taken[0]}: not valid CSV ({error}): a quote that opens in this row is not "
                                 f"closed; nobody knows which lines behind it are rows; close or remove it") from None
            refuse(f"not valid CSV ({error})")
            continue
        if cells is None:
            return
        if header is None and any(cells):
            header = cells
            if len(set(header)) < len(header):
                raise ValueError(f"{path}:{taken[0]}: found a column name twice in {header}; every column needs a name "
                                 "of its own, in the first row; rename it")
        elif any(cells) and len(cells) != len(header):
            refuse(f"{len(cells)} cells under {len(header)} columns", ",".join(cells))
        elif any(cells):
            yield taken[0], dict(zip(header, cells, strict=True)), sum(map(len, cells))


def _json_rows(path: Path, skip_bad: bool, bad: list[str]) -> Iterator[tuple[int, dict, int]]:
    """The rows of a .json file: lines as in .jsonl, or one array [{...}, ...], whose objects are counted from 1."""
    try:
        with _open(path) as raw:
            if raw.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                yield from _array_rows(io.TextIOWrapper(raw, encoding="utf-8-sig"), path, skip_bad, bad)
                return
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _broken_gzip(str(path), error) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); text is read as UTF-8; convert the file") from None
    yield from _decoded(path, _decode_json, skip_bad, bad)


def _array_rows(file: io.TextIOBase, path: Path, skip_bad: bool, bad: list[str]) -> Iterator[tuple[int, dict, int]]:
    """(number, object, characters) of a JSON array, read in pieces."""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    text, number = file.read(READ_BYTES), 1
    at = text.index("[") + 1
    while True:
        at = gap.match(text, at).end()
        if text.startswith("]", at):
            return
        try:
            row, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            # Most likely the object goes on behind what was read so far; doubling keeps the repeated work small.
            more = file.read(max(READ_BYTES, len(text) - at)) if len(text) - at < LINE_LIMIT else ""
            if not more:
                raise ValueError(f"{path}:{number}: not valid JSON ({error}), in object {number} of the array; behind "
                                 "it nobody knows where the next one begins; the file must be whole; repair it, copy "
                                 "or download it again") from None
            text, at = text[at:] + more, 0
            continue
        if isinstance(row, dict):
            yield number, row, end - at
        else:
            _refuse(f"{path}:{number}", f"a JSON {type(row).__name__} where an object {{...}} must stand",
                    text[at:end], skip_bad, bad)
        at, number = end, number + 1


def _with_leaves(arrow, kind, leaf: Callable):
    """An Arrow type with leaf(type) in the place of the types that its lists and structs are made of."""
    if arrow.types.is_struct(kind):
        return arrow.struct([field.with_type(_with_leaves(arrow, field.type, leaf)) for field in kind])
    if arrow.types.is_list(kind):
        return arrow.list_(kind.value_field.with_type(_with_leaves(arrow, kind.value_type, leaf)))
    return leaf(kind)


def _times_as_text(arrow, batch):
    """An Arrow batch as a table, with times, dates and decimals as text. JSON has none of them, and in Python some need
    pandas or a time zone that the machine knows."""

    def without_zone(kind):  # the time of UTC stays
        return arrow.timestamp(kind.unit) if arrow.types.is_timestamp(kind) else kind

    def as_text(kind):
        return arrow.string() if arrow.types.is_temporal(kind) or arrow.types.is_decimal(kind) else kind

    table = arrow.Table.from_batches([batch])
    for leaf in (without_zone, as_text):
        schema = arrow.schema([field.with_type(_with_leaves(arrow, field.type, leaf)) for field in table.schema])
        table = table if schema == table.schema else table.cast(schema)
    return table


def _without_bytes(value: object) -> object:
    """The same with bytes as text, or as None where they are none (pictures, sounds): JSON has no bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, dict):
        return {key: _without_bytes(entry) for key, entry in value.items()}
    return [_without_bytes(entry) for entry in value] if isinstance(value, list) else value


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict, int]]:
    """The rows of a parquet file as JSON values, counted from 1; pyarrow is asked for only here."""
    try:
        arrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise ValueError(f"{path}: parquet is read with pyarrow, which is not installed; it is optional here; run: "
                         "pip install pyarrow, or convert the file to .jsonl") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            holds_bytes = "binary" in str(file.schema_arrow.types)
            for batch in file.iter_batches(batch_size=256):
                for row in _times_as_text(arrow, batch).to_pylist():
                    number += 1
                    yield number, _without_bytes(row) if holds_bytes else row, batch.nbytes // batch.num_rows
    except (OSError, ValueError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{path}:{number + 1}: broken parquet data ({reason}); the file must be whole; copy or "
                         "download it again") from None


def scan(paths: Sequence[Path], skip_bad: bool, bad: list[str]) -> Iterator[tuple[dict, str, int]]:
    """(row, "file:line", bytes) of every row of the files: what read_rows() yields, with the size of the row's text."""
    for path in paths:
        kind = row_format(path)
        if kind == ".parquet":
            rows = _parquet_rows(path)
        elif kind == ".jsonl":
            rows = _decoded(path, _decode_json, skip_bad, bad)
        else:
            rows = {".txt": _text_rows, ".csv": _csv_rows, ".json": _json_rows}[kind](path, skip_bad, bad)
        for number, row, size in rows:
            if row is not None:
                yield row, f"{path}:{number}", size


def read_rows(paths: str | Path | Sequence[str | Path], skip_bad: bool = False,
              bad: list[str] | None = None) -> Iterator[tuple[dict, str]]:
    """Stream the rows of files (endings: SUFFIXES) as (row, "file:line"); in JSON arrays and parquet "file:row".

    Raises ValueError naming file, line, reason and the start of the text for broken JSON or CSV, other encodings than
    UTF-8, NUL bytes, lines beyond LINE_LIMIT, and damaged gzip or parquet data. With skip_bad bad lines are skipped and
    their total is printed at the end, or the messages are added to the list `bad`; a damaged file stays an error.
    """
    skipped = [] if bad is None else bad
    for row, where, _ in scan(expand_paths(paths), skip_bad, skipped):
        yield row, where
    if skipped and bad is None:
        print(f"skipped {len(skipped)} bad lines; the first: {skipped[0]}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Shapes of rows. Errors say where ("file:line"), what was found, what is expected, and the fix.


def _wrong_keys(row: dict, where: str, expected: str, example: str) -> ValueError:
    found = ", ".join(map(str, row)) or "none"
    return ValueError(f"{where}: found the keys [{found}]; expected {expected}; write every row as {example}, "
                      "or rename keys with prepare_data.py export --map")


def _check_turns(turns: object, where: str) -> list[dict]:
    """A non-empty list of {"role", "content"} turns; ShareGPT's {"from", "value"} are rewritten. Which roles exist is
    the tokenizer's rule."""
    if not isinstance(turns, list) or not turns:
        found = f"{turns!r:.60} as the turns; expected a non-empty list"
        raise ValueError(f"{where}: found {found}; write {CHAT}")
    checked = []
    for turn in turns:
        if isinstance(turn, dict) and {"from", "value"} <= turn.keys() and "role" not in turn:
            turn = {"role": SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"]}
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            found = f"the keys [{', '.join(map(str, turn))}]" if isinstance(turn, dict) else f"{turn!r:.60}"
            raise ValueError(f"{where}: found a turn with {found}; expected role and content; write {CHAT}")
        for key in ("role", "content", "reasoning_content"):
            if not isinstance(turn.get(key), str) and (key != "reasoning_content" or turn.get(key) is not None):
                raise ValueError(f"{where}: found {turn[key]!r:.60} as {key}; expected a string; write {CHAT}")
        checked.append(turn)
    return checked


def _as_turns(said: object, role: str) -> object:
    """A text or a single turn as a list of turns; anything else as it is, for _check_turns to judge."""
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    return [said] if isinstance(said, dict) else said


def _prompt(row: dict, where: str) -> object:
    """What is said before the answer, in any of the shapes: turns (not checked), or None where nothing is."""
    if row.get("prompt") is not None:
        return _as_turns(row["prompt"], "user")
    if isinstance(row.get("instruction"), str):
        # Alpaca's columns: the task, what it is about, and earlier [question, answer] pairs
        history, given = row.get("history") or [], row.get("input") or ""
        if not isinstance(given, str) or not isinstance(history, list) or not all(
                isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise ValueError(f"{where}: found {given!r:.60} as input and {history!r:.60} as history; expected a string "
                             'and a list of pairs; write "input": "...", "history": [["question", "answer"]]')
        said = [text for pair in history for text in pair]
        said.append("\n".join(filter(None, (row["instruction"], given))))
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return next((row[key] for key in ("conversations", "messages") if row.get(key) is not None), None)


def _with_system(row: dict, turns: list[dict], where: str) -> list[dict]:
    """The turns with the `system` text of the row in front, where it has one and they have none."""
    if row.get("system") and turns[0]["role"] != "system":
        return _check_turns(_as_turns(row["system"], "system"), where) + turns
    return turns


def document(row: dict, where: str = "row") -> str:
    """The text of a pretraining row."""
    if not isinstance(row.get("text"), str):
        raise _wrong_keys(row, where, "text, a string (pretraining reads documents)", '{"text": "..."}')
    return row["text"]


def conversation(row: dict, where: str = "row") -> list[dict]:
    """The turns of an SFT or RL row, in any of the shapes of public collections:

    `conversations` or `messages`, turns with role and content, or with from and value; `prompt` and `completion` (or
    `response`), texts or lists of turns; `instruction`, perhaps with `input` and `history`, and `output`. A `system`
    text is put in front. Raises ValueError with file, line, what was found and what is expected.
    """
    turns = next((row[key] for key in ("conversations", "messages") if row.get(key) is not None), None)
    if turns is None:
        answer = next((row[key] for key in ("completion", "response", "output") if row.get(key) is not None), None)
        if answer is None or (turns := _prompt(row, where)) is None:
            raise _wrong_keys(row, where, "conversations (or messages), prompt and completion, or instruction and "
                              "output", f'{{"conversations": {CHAT}}}')
        turns = _check_turns(turns, where) + _check_turns(_as_turns(answer, "assistant"), where)
    return _with_system(row, _check_turns(turns, where), where)


def preference(row: dict, where: str = "row") -> tuple[list[dict], dict, dict]:
    """(prompt turns, chosen turn, rejected turn) of a preference row.

    Formats: a prompt (any shape that conversation() knows, without the answer) with chosen and rejected as text, as one
    assistant turn or as one in a list; or chosen and rejected as whole conversations that share all turns but the last.
    A `system` text is put in front.
    """
    expected = "prompt, chosen, rejected (or chosen and rejected as lists of turns)"
    error = _wrong_keys(row, where, expected, '{"prompt": "...", "chosen": "...", "rejected": "..."}')
    if "chosen" not in row or "rejected" not in row:
        raise error
    sides = [_check_turns(_as_turns(row[side], "assistant"), where) for side in ("chosen", "rejected")]
    # Only role and content are compared: collections add scores or ids to the turns of one side.
    before = [[(turn["role"], turn["content"]) for turn in side[:-1]] for side in sides]
    if before[0] != before[1] or {side[-1]["role"] for side in sides} != {"assistant"}:
        raise ValueError(f"{where}: found chosen and rejected that differ before their last turn, or do not end with "
                         "an assistant turn; expected one prompt and two answers; split the row")
    # In whole conversations a prompt beside them only repeats their start.
    prompt = sides[0][:-1] or _prompt(row, where)
    if prompt is None:
        raise error
    return _with_system(row, _check_turns(prompt, where), where), sides[0][-1], sides[1][-1]


def question(row: dict, where: str = "row") -> tuple[list[dict], str | None]:
    """(turns up to the question, text of the answer behind it or None) of a row in any of the formats above, or with
    nothing but a prompt."""
    if row.get("chosen") is not None:  # columns of a table are in every row, mostly empty
        return preference(row, where)[0], None
    answered = any(row.get(key) is not None for key in ("completion", "response", "output"))
    bare = None if answered else _prompt(row, where)
    *turns, last = conversation(row, where) if bare is None else _with_system(row, _check_turns(bare, where), where)
    return (turns, last["content"]) if last["role"] == "assistant" else ([*turns, last], None)


def all_texts(row: dict, where: str = "row") -> list[str]:
    """What a vocabulary is learnt from: the texts of a row for any stage (TEXT_FIELDS), of turns what they say."""
    found = []
    for value in [row[field] for field in TEXT_FIELDS if field in row]:
        for turn in value if isinstance(value, list) else [value]:
            said = map(turn.get, ("content", "value", "reasoning_content")) if isinstance(turn, dict) else [turn]
            found += [text for text in said if isinstance(text, str)]
    if not found:
        path = where.rpartition(":")[0]
        source, target = (shlex.quote(str(name)) for name in (path, Path(path).with_suffix(".text.jsonl")))
        raise ValueError(f"{where}: found the keys [{', '.join(map(str, row))}] and no text; a row has one of "
                         f"{', '.join(TEXT_FIELDS)}; rename a column: python prepare_data.py export --format jsonl "
                         f"--map text=COLUMN --data_path {source} --output {target}")
    return found


def first_question(turns: list[dict]) -> str:
    """What the held-out split hashes: the first user turn, so that one question never lies on both sides."""
    return next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"])


# ---------------------------------------------------------------------------------------------------------------------
# 4. The held-out split


def document_hash(key: str) -> int:
    """The first 64 bits of the SHA-1 of a text: equal on every machine and in every run."""
    # JSON may hold lone surrogates, which plain UTF-8 refuses. Not a secret: some systems forbid SHA-1 for those only.
    digest = hashlib.sha1(key.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big")


def split_heldout(key: str, ratio: float) -> bool:
    """True if the document is held out: its hash, read as a fraction of 1, is below `ratio`.

    The text alone decides: files may be reordered, and equal documents never lie on both sides.
    """
    return document_hash(key) < ratio * 2**64

