//! Byte-level BPE for MiniLLM: split text into words, learn merges, encode.
//!
//! * [`split`] cuts text as GPT-4's regular expression does, by hand, about twenty times faster;
//! * [`train`] counts words and learns merges, with work proportional to the occurrences that change;
//! * [`encode`] turns text into ids, equal to tiktoken's.
//!
//! These three know no Python. `py` is the border: it converts, releases the GIL and looks for Ctrl-C.
//! The slow twin of `train` is in `tokenizer.py`; the tests hold one against the other.

#![warn(missing_docs)]

pub mod encode;
pub mod parallel;
#[cfg(feature = "python")]
mod py;
pub mod split;
pub mod train;

/// A fast hash for short byte strings. Not for hostile input tables that must not degrade: a word table of a tokenizer
/// trainer slows down on crafted collisions, it does not fail.
#[inline]
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    const K: u64 = 0x9E37_79B9_7F4A_7C15; // 2^64 / golden ratio: odd, bits well spread
    let mut hash = (bytes.len() as u64).wrapping_mul(K);
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let word = u64::from_le_bytes(chunk.try_into().expect("chunks of 8"));
        hash = (hash ^ word).wrapping_mul(K);
        hash ^= hash >> 29;
    }
    let mut tail = [0u8; 8];
    let rest = chunks.remainder();
    tail[..rest.len()].copy_from_slice(rest);
    hash = (hash ^ u64::from_le_bytes(tail)).wrapping_mul(K);
    hash ^ (hash >> 32)
}
