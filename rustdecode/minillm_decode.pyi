"""One step of decoding in Rust: the fast half of inference.py.

Weights stay numpy arrays of Python's, which may be a tensor's memory; bf16 comes as uint16, int8 as a pair of numbers
[M,K] and scales of rows [M]. Nothing is copied. All calls release the GIL.

Letters: B rows of the cache that are in use, B' those that it has, T tokens of a row, N = B * T, L layers, K kv heads,
S slots, C head_dim, D hidden size, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np

Matrix = np.ndarray | tuple[np.ndarray, np.ndarray]
Layer = tuple[
    np.ndarray, Matrix, Matrix, Matrix, np.ndarray, np.ndarray, Matrix, np.ndarray, Matrix, Matrix, Matrix
]

class Decoder:
    """A dense Qwen3 model."""

    def __init__(
        self, layers: Sequence[Layer], embedding: Matrix, norm: np.ndarray, head: Matrix, heads: int, kv_heads: int,
        mlp: int, eps: float, num_threads: int,
    ) -> None:
        """A layer: gain of the norm, q, k, v, gains of q and k, o, gain of the second norm, gate, up, down. mlp: rows
        of gate. Raises ValueError for shapes that do not fit each other."""

    def step(
        self, ids: Sequence[int], lengths: Sequence[int], kv: np.ndarray, cos: np.ndarray, sin: np.ndarray,
        with_logits: bool,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Hidden states behind the final norm [N,D] of ids [N], T for each row, and if wanted their logits [N,V]. Row b
        of the cache kv [L,2,B',K,S,C] holds lengths[b] tokens; the new ones are written behind them. cos, sin [S,C]:
        the rotation of each position, sin negative in the first half. Raises ValueError for what does not fit."""

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits [N,V] of hidden states [N,D]."""

    def guess(
        self, token: int, length: int, count: int, kv: np.ndarray, cos: np.ndarray, sin: np.ndarray
    ) -> list[int]:
        """The likeliest `count` tokens behind this one, in a cache of one row with `length` tokens."""
