//! Byte-level BPE for MiniLLM: split text into words, learn merges, encode.
//!
//! * [`split`] cuts text as GPT-4's regular expression does, by hand, about twenty times faster;
//! * [`train`] counts words and learns merges, with work proportional to the occurrences that change;
//! * [`encode`] turns text into ids, equal to tiktoken's.
//!
//! These three know no Python. `py` is the border: it converts, releases the GIL and looks for Ctrl-C.
//! The slow twin of `train` is in `tokenizer.py`; the tests hold one against the other.

pub mod encode;
#[cfg(feature = "python")]
mod py;
pub mod split;
pub mod train;

/// How many threads to use: `asked`, or one per core for 0, and never more than there is work for.
pub(crate) fn thread_count(asked: usize, work: usize) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let wanted = if asked == 0 { cores() } else { asked };
    wanted.min(work).max(1)
}

/// Cut `sizes` into at most `parts` runs of neighbours of about equal sum. Returns ranges that cover all indices.
pub(crate) fn even_ranges(sizes: &[usize], parts: usize) -> Vec<std::ops::Range<usize>> {
    let total: usize = sizes.iter().sum();
    let mut ranges = Vec::with_capacity(parts);
    let (mut start, mut done) = (0, 0);
    for (index, size) in sizes.iter().enumerate() {
        done += size;
        // the n-th range ends where n/parts of the whole is reached
        if done * parts >= total * (ranges.len() + 1) && ranges.len() + 1 < parts {
            ranges.push(start..index + 1);
            start = index + 1;
        }
    }
    ranges.push(start..sizes.len());
    ranges
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_everything_in_order() {
        for parts in 1..5 {
            for sizes in [vec![], vec![1], vec![0, 0, 0], vec![9, 1, 1, 1], vec![1, 1, 1, 9]] {
                let ranges = even_ranges(&sizes, parts);
                let covered: Vec<usize> = ranges.iter().cloned().flatten().collect();
                assert_eq!(covered, (0..sizes.len()).collect::<Vec<_>>());
                assert!(ranges.len() <= parts);
            }
        }
    }
}
