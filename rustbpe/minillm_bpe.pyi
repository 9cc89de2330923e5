"""Byte-level BPE in Rust: the fast half of tokenizer.py. Text must be valid Unicode (tokenizer.repair sees to it).

All that takes long releases the GIL and listens to Ctrl-C.
"""

from collections.abc import Callable, Sequence

class Trainer:
    """Counts words batch by batch, then learns merges. Memory grows with the number of distinct words."""

    def __init__(self, num_threads: int = 0) -> None:
        """num_threads: for counting; 0 = one per core."""

    @property
    def num_words(self) -> int:
        """Distinct words counted so far."""

    def feed(self, texts: Sequence[str]) -> None:
        """Count the words of documents. Raises UnicodeEncodeError on a lone surrogate, before counting anything, and
        KeyboardInterrupt on Ctrl-C, with the documents counted in part."""

    def train(self, num_merges: int, report: Callable[[int], object] | None = None) -> list[tuple[int, int]]:
        """At most num_merges pairs (left id, right id); merge i creates id 256 + i. The largest count wins, ties go to
        the smallest pair. May be called again, with the same answer. report is told the number of merges about every
        20 ms. Raises KeyboardInterrupt on Ctrl-C, OverflowError when the distinct words exceed 4 GiB."""

class Encoder:
    """Text to ids for tokens in merge order. Equal to tiktoken with the same ranks and the GPT-4 pattern."""

    def __init__(self, tokens: Sequence[bytes], ids: Sequence[int], narrow: bool) -> None:
        """tokens: in merge order, all 256 bytes among them; ids: the id of each; narrow: write uint16, not uint32.
        Raises ValueError."""

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> tuple[bytearray, bytearray]:
        """(ids as uint16 or uint32, offsets as int64 with one more entry than texts), native byte order."""

def split(text: str) -> list[str]:
    """The pieces of a text, as the pattern cuts them. For tests and for looking at."""
