//! Byte-level BPE for MiniLLM: split text into words, learn merges, encode.
//!
//! * [`split`] cuts text as GPT-4's regular expression does, by hand, 64 bytes at a time;
//! * [`train`] counts words and learns merges, with work proportional to the occurrences that change;
//! * [`encode`] turns text into ids, equal to tiktoken's.
//!
//! [`parallel`] shares the work among threads. None of these knows Python: `py` is the border, where texts are
//! converted, the GIL is released and Ctrl-C is looked for.
//!
//! The slow twin of `train` is in `bpe.py`; the tests hold one against the other.

#![warn(missing_docs)]
#![deny(unsafe_code)] // but for the two places that say why

pub mod encode;
pub mod parallel;
#[cfg(feature = "python")]
mod py;
pub mod split;
pub mod train;

/// 2^64 / golden ratio: multiplied by it, numbers that differ little come to lie far apart in the upper bits.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

/// A pair of token ids spread over 32 bits.
#[inline]
pub(crate) fn hash_pair(left: u32, right: u32) -> usize {
    let key = (left as u64) << 32 | right as u64;
    (key.wrapping_mul(SPREAD) >> 32) as usize
}

/// A fast hash for short byte strings. Not for hostile input tables that must not degrade: a word table of a tokenizer
/// trainer slows down on crafted collisions, it does not fail.
#[inline]
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hash = (bytes.len() as u64).wrapping_mul(SPREAD);
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let word = u64::from_le_bytes(chunk.try_into().expect("chunks of 8"));
        hash = (hash ^ word).wrapping_mul(SPREAD);
        hash ^= hash >> 29;
    }
    let mut tail = [0u8; 8];
    let rest = chunks.remainder();
    tail[..rest.len()].copy_from_slice(rest);
    hash = (hash ^ u64::from_le_bytes(tail)).wrapping_mul(SPREAD);
    hash ^ (hash >> 32)
}

/// Ask for a place in memory that will be read soon, so that many can be on their way at the same time.
#[inline]
#[allow(unsafe_code)]
pub(crate) fn prefetch<T>(place: &T) {
    // Safety: a prefetch changes nothing that a program could see, and the address is that of a living value. There is
    // no safe way to say it: reading the value instead was tried, and waits for it.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Longest piece that has a key: 15 bytes and their number make 16.
pub(crate) const KEY_BYTES: usize = 15;

/// [n] the first n bytes of a number: cheaper to look up than to shift 128 bits.
const FIRST_BYTES: [u128; KEY_BYTES + 1] = {
    let mut masks = [0; KEY_BYTES + 1];
    let mut length = 1;
    while length <= KEY_BYTES {
        masks[length] = (1 << (8 * length)) - 1;
        length += 1;
    }
    masks
};

/// A piece of at most KEY_BYTES as one number, its length in the top byte, so that trailing zero bytes count. Never 0.
#[inline]
pub(crate) fn key_of(bytes: &[u8], start: usize, length: usize) -> u128 {
    let word = match bytes[start..].first_chunk() {
        // the usual case: read 16 bytes at once and cut off what belongs to the next pieces
        Some(window) => u128::from_le_bytes(*window) & FIRST_BYTES[length % 16],
        None => {
            let mut padded = [0; 16];
            padded[..length].copy_from_slice(&bytes[start..start + length]);
            u128::from_le_bytes(padded)
        }
    };
    word | (length as u128) << 120
}

/// The place of a key in a table of `size`, a power of two.
#[inline]
pub(crate) fn slot_of(key: u128, size: usize) -> usize {
    let mixed = (key as u64 ^ ((key >> 64) as u64).rotate_left(29)).wrapping_mul(SPREAD);
    (mixed >> (64 - size.trailing_zeros())) as usize
}
