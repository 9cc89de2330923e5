"""Token files: flat arrays on disk that are either whole or not there, read as memory maps.

A file is a header of 64 bytes and raw items. While it is written it has another name; the header with the count comes
last, and only then the file takes its name. Whoever opens it says how many items it must hold. So neither a kill in the
middle of a write nor a disk that loses a piece goes unnoticed. Rows of different lengths lie end to end in one such
file, and their lengths in another (Ragged).

What this file does not do: know what the items mean (dataset.py builds, names and opens these files).
"""

import hashlib
import json
import os
import struct
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1  # raise it when the meaning of the arrays changes, so that old caches are not read
MAGIC = b"MINITOKN"
HEADER = struct.Struct("<8sII16sQ24x")  # magic, version, item size, dtype name, count: 64 bytes keep the items aligned


class ArrayFile:
    """Append-only writer of one flat array: a header, then raw items. It takes its name only when complete."""

    def __init__(self, path: Path, dtype: type):
        self.path, self.dtype, self.count = path, np.dtype(dtype), 0
        self.temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
        self.file = open(self.temporary, "wb")
        self.file.write(bytes(HEADER.size))  # filled in by commit()

    def append(self, items: np.ndarray) -> None:
        """Add items, converted to the dtype of the file."""
        self.file.write(np.ascontiguousarray(items, dtype=self.dtype).tobytes())
        self.count += len(items)

    def commit(self) -> None:
        """Write the header with the count, force all to disk, take the final name."""
        self.file.seek(0)
        self.file.write(HEADER.pack(MAGIC, FORMAT_VERSION, self.dtype.itemsize, self.dtype.name.encode(), self.count))
        self.file.flush()
        os.fsync(self.file.fileno())  # before the rename: after a power cut the name must not stand for half a file
        self.file.close()
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        """Remove what was not committed (nothing after commit)."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def remove_orphans(folder: Path, base: str) -> None:
    """Remove the temporary files base.*.tmpPID of processes that are gone: a kill -9 leaves them behind. Younger ones
    than an hour stay, for on a shared disk the process may be one of another machine."""
    if os.name != "posix":
        return  # there os.kill() ends the process instead of asking for it
    for path in folder.glob(f"{base}.*.tmp*"):
        owner = path.suffix.removeprefix(".tmp")
        try:
            if time.time() - path.stat().st_mtime > 3600:
                os.kill(int(owner), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, OSError, OverflowError):
            pass  # no number, or a process of somebody else


def open_array(path: Path, count: int) -> np.ndarray:
    """Memory-map an array file, read-only. Raises ValueError with the reason if it is not whole or not `count` long."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise ValueError(f"{path.name} is cut short ({size} bytes)")
    magic, version, itemsize, name, written = HEADER.unpack(head)
    if magic != MAGIC or version != FORMAT_VERSION:
        raise ValueError(f"{path.name} has no valid header")
    # Three witnesses of one number: the header, the build's JSON, the size on disk.
    if written != count or size != HEADER.size + count * itemsize:
        held = (size - HEADER.size) // itemsize
        raise ValueError(f"{path.name} holds {held} items, its header says {written}, the build counted {count}")
    dtype = np.dtype(name.rstrip(b"\0").decode())
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", HEADER.size, (count,)) if count else np.empty(0, dtype)


class Ragged:
    """N pieces of different lengths, one behind the other in `items`; the offsets are all that lives in memory."""

    def __init__(self, items: np.ndarray, lengths: np.ndarray):
        self.items, self.lengths = items, lengths

    @cached_property
    def offsets(self) -> np.ndarray:
        """Start of every piece and the end of the last, int64 [N+1]."""
        # int64: the lengths are int32, their sum passes 2**31 at a corpus of 8 GB
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return self.items[self.offsets[i] : self.offsets[i + 1]]


def flatten(pieces: list[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of ids -> (items, lengths), as Ragged keeps them."""
    items = np.concatenate([np.asarray(piece, np.int64) for piece in pieces]) if pieces else np.empty(0, np.int64)
    return items, np.array([len(piece) for piece in pieces], np.int64)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file that is always either the old or the new one, whole."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def content_hash(path: Path, known: dict) -> str:
    """SHA-256 of a file, 16 hex digits. `known` remembers it for as long as size and modification time stay."""
    state, name = path.stat(), str(path.resolve())
    # A corpus is read once to be hashed; at later starts its size and time vouch for it, in microseconds.
    if known.get(name, [])[:2] != [state.st_size, state.st_mtime_ns]:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        known[name] = [state.st_size, state.st_mtime_ns, digest.hexdigest()[:16]]
    return known[name][2]
