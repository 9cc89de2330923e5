//! Text to ids.
//!
//! The rule is tiktoken's: a piece that is a token is that token; otherwise start from its bytes and, again and again,
//! join the two neighbours whose joint bytes are the token of lowest rank, the leftmost first.
//!
//! Most pieces were seen a moment ago, so each thread keeps the ids of short pieces in a table of fixed size, one
//! place for each hash value: a newcomer evicts what is there. Memory does not grow with the text.

use crate::{even_ranges, hash_bytes, split::Splitter, thread_count};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Mutex;

/// The integer that holds an id: `u16` for vocabularies up to 65,536, else `u32`.
pub trait TokenId: Copy + Default + Send + Sync {
    /// The largest id it can hold.
    const LARGEST: u32;
    /// Convert; the caller has checked the range.
    fn new(id: u32) -> Self;
}

impl TokenId for u16 {
    const LARGEST: u32 = u16::MAX as u32;
    fn new(id: u32) -> Self {
        id as u16
    }
}

impl TokenId for u32 {
    const LARGEST: u32 = NONE - 1;
    fn new(id: u32) -> Self {
        id
    }
}

/// No token.
const NONE: u32 = u32::MAX;
/// Places in a thread's table; 2 MiB with u16 ids, which is about a core's second-level cache.
const CACHE_SIZE: usize = 1 << 16;
/// Pieces longer than this are not kept: 15 bytes and their number make one 16-byte key.
const CACHE_BYTES: usize = 15;
/// Pieces of more ids than this are not kept; an entry is 32 bytes with u16 ids.
const CACHE_IDS: usize = 6;
/// From this many bytes on, a queue finds the next pair to join: looking at all pairs takes time that grows with the
/// square of the length. Below, it is faster.
const LONG_PIECE: usize = 128;

/// Ids of a piece: `key` is its bytes, padded, with its length in the top byte; 0 = empty place.
#[derive(Clone, Copy, Default)]
struct Entry<T> {
    key: u128,
    number: u32,
    ids: [T; CACHE_IDS],
}

/// What a thread keeps between documents.
struct Scratch<T> {
    cache: Vec<Entry<T>>,   // [CACHE_SIZE]
    parts: Vec<(u32, u32)>, // of the piece at work: rank of the token, rank of it joined with the next
}

/// A vocabulary, ready to encode.
pub struct Encoder<T> {
    ids: Vec<T>,                                 // [ranks]
    byte_ranks: [u32; 256],                      // rank of each single byte
    whole: HashMap<Box<[u8]>, u32, ByteHashing>, // bytes -> rank
    pairs: PairTable,
    idle: Mutex<Vec<Scratch<T>>>, // of threads that are done: a warm cache serves the next call
}

impl<T: TokenId> Encoder<T> {
    /// `tokens` in the order in which they are joined (lowest rank first), `ids` the id of each.
    ///
    /// Errors: lengths differ, an id too large for T, an empty or doubled token, a byte without a token.
    pub fn new(tokens: &[&[u8]], ids: &[u32]) -> Result<Self, String> {
        if tokens.len() != ids.len() {
            return Err(format!("{} tokens with {} ids; each token needs one", tokens.len(), ids.len()));
        }
        if let Some(id) = ids.iter().find(|&&id| id > T::LARGEST) {
            return Err(format!("id {id} is above {}; ask for wide ids", T::LARGEST));
        }
        let mut whole = HashMap::with_capacity_and_hasher(tokens.len(), ByteHashing);
        for (rank, token) in tokens.iter().enumerate() {
            if token.is_empty() || whole.insert(Box::from(*token), rank as u32).is_some() {
                return Err(format!("token {rank} is empty or occurs twice: {token:?}"));
            }
        }
        let mut byte_ranks = [NONE; 256];
        for byte in 0..=255u8 {
            byte_ranks[byte as usize] =
                *whole.get([byte].as_slice()).ok_or(format!("byte 0x{byte:02x} has no token; all 256 must"))?;
        }
        // Every way to cut a token into two tokens, not only the way it was learned: tiktoken compares joint bytes
        let mut pairs = PairTable::new(tokens.len());
        for (rank, token) in tokens.iter().enumerate() {
            for cut in 1..token.len() {
                if let (Some(&left), Some(&right)) = (whole.get(&token[..cut]), whole.get(&token[cut..])) {
                    pairs.insert(left, right, rank as u32);
                }
            }
        }
        let ids = ids.iter().map(|&id| T::new(id)).collect();
        Ok(Encoder { ids, byte_ranks, whole, pairs, idle: Mutex::default() })
    }

    /// Encode documents. `num_threads`: 0 = one per core. Returns the ids in parts, one for each thread and in order,
    /// and the number of ids of each document.
    pub fn encode_batch(&self, texts: &[&str], num_threads: usize) -> (Vec<Vec<T>>, Vec<usize>) {
        let sizes: Vec<usize> = texts.iter().map(|text| text.len()).collect();
        // a thread costs some 20 us to start: below 64 KiB it does not pay
        let threads = thread_count(num_threads, sizes.iter().sum::<usize>() >> 16);
        let ranges = even_ranges(&sizes, threads);
        if ranges.len() == 1 {
            let (ids, counts) = self.encode_range(texts);
            return (vec![ids], counts);
        }
        let results: Vec<(Vec<T>, Vec<usize>)> = std::thread::scope(|scope| {
            let encode = |range| scope.spawn(move || self.encode_range(&texts[range]));
            let handles: Vec<_> = ranges.into_iter().map(encode).collect();
            handles.into_iter().map(|handle| handle.join().expect("an encoding thread does not panic")).collect()
        });
        let (parts, counts): (Vec<_>, Vec<_>) = results.into_iter().unzip();
        (parts, counts.concat())
    }

    fn encode_range(&self, texts: &[&str]) -> (Vec<T>, Vec<usize>) {
        let idle = self.idle.lock().map(|mut idle| idle.pop()).unwrap_or_default();
        let mut scratch =
            idle.unwrap_or_else(|| Scratch { cache: vec![Entry::default(); CACHE_SIZE], parts: Vec::new() });
        let bytes: usize = texts.iter().map(|text| text.len()).sum();
        let mut ids = Vec::with_capacity(bytes / 3); // a usual rate; it grows where a text has more
        let mut counts = Vec::with_capacity(texts.len());
        for text in texts {
            let before = ids.len();
            self.encode_text(text, &mut scratch, &mut ids);
            counts.push(ids.len() - before);
        }
        if let Ok(mut idle) = self.idle.lock() {
            idle.push(scratch);
        }
        (ids, counts)
    }

    fn encode_text(&self, text: &str, scratch: &mut Scratch<T>, out: &mut Vec<T>) {
        let bytes = text.as_bytes();
        let mut splitter = Splitter::new(text);
        while let Some(range) = splitter.next_range() {
            let length = range.len();
            if length > CACHE_BYTES {
                self.encode_piece(&bytes[range], &mut scratch.parts, out);
                continue;
            }
            let key = key_of(bytes, range.start, length);
            let slot = slot_of(key);
            let entry = &scratch.cache[slot];
            if entry.key == key {
                out.extend_from_slice(&entry.ids[..entry.number as usize]);
                continue;
            }
            let before = out.len();
            self.encode_piece(&bytes[range], &mut scratch.parts, out);
            let number = out.len() - before;
            if number <= CACHE_IDS {
                let mut ids = [T::default(); CACHE_IDS];
                ids[..number].copy_from_slice(&out[before..]);
                scratch.cache[slot] = Entry { key, number: number as u32, ids };
            }
        }
    }

    fn encode_piece(&self, piece: &[u8], parts: &mut Vec<(u32, u32)>, out: &mut Vec<T>) {
        if let Some(&rank) = self.whole.get(piece) {
            return out.push(self.ids[rank as usize]);
        }
        parts.clear();
        parts.extend(piece.iter().map(|&byte| (self.byte_ranks[byte as usize], NONE)));
        for index in 1..parts.len() {
            parts[index - 1].1 = self.pairs.get(parts[index - 1].0, parts[index].0);
        }
        if piece.len() >= LONG_PIECE {
            self.join_long(parts);
        } else {
            self.join_short(parts);
        }
        out.extend(parts.iter().map(|part| self.ids[part.0 as usize]));
    }

    /// Join until nothing joins, looking at all pairs each time. Time: square of the length, with a small factor.
    fn join_short(&self, parts: &mut Vec<(u32, u32)>) {
        loop {
            let (mut best, mut at) = (NONE, 0);
            for (index, part) in parts.iter().enumerate() {
                if part.1 < best {
                    (best, at) = (part.1, index);
                }
            }
            if best == NONE {
                return;
            }
            parts.remove(at + 1);
            let after = parts.get(at + 1).map_or(NONE, |next| self.pairs.get(best, next.0));
            parts[at] = (best, after);
            if at > 0 {
                parts[at - 1].1 = self.pairs.get(parts[at - 1].0, best);
            }
        }
    }

    /// The same with a queue of pairs and links between neighbours. Time: length times its logarithm.
    fn join_long(&self, parts: &mut Vec<(u32, u32)>) {
        const GONE: u32 = NONE; // rank of a part that was joined to its left neighbour
        let length = parts.len();
        let mut next: Vec<usize> = (1..=length).collect(); // `length` = no next
        let mut previous: Vec<usize> = (0..length).map(|index| index.wrapping_sub(1)).collect();
        let waiting = parts.iter().enumerate().filter(|(_, part)| part.1 != NONE);
        let mut queue: BinaryHeap<_> = waiting.map(|(index, part)| Reverse((part.1, index))).collect();
        while let Some(Reverse((rank, at))) = queue.pop() {
            if parts[at].0 == GONE || parts[at].1 != rank {
                continue; // one of the two has been joined to something else since
            }
            let removed = next[at];
            let after = next[removed];
            parts[removed] = (GONE, NONE);
            next[at] = after;
            parts[at] = (rank, NONE);
            if after < length {
                previous[after] = at;
                parts[at].1 = self.pairs.get(rank, parts[after].0);
            }
            if parts[at].1 != NONE {
                queue.push(Reverse((parts[at].1, at)));
            }
            let before = previous[at];
            if before < length {
                parts[before].1 = self.pairs.get(parts[before].0, rank);
                if parts[before].1 != NONE {
                    queue.push(Reverse((parts[before].1, before)));
                }
            }
        }
        parts.retain(|part| part.0 != GONE);
    }
}

/// Bytes of a short piece as one number, its length in the top byte, so that trailing zero bytes count.
#[inline]
fn key_of(bytes: &[u8], start: usize, length: usize) -> u128 {
    let word = match bytes.get(start..start + 16) {
        // the usual case: read 16 bytes at once and cut off what belongs to the next pieces
        Some(window) => {
            let window = u128::from_le_bytes(window.try_into().expect("a window of 16"));
            window & ((1 << (8 * length)) - 1)
        }
        None => {
            let mut padded = [0; 16];
            padded[..length].copy_from_slice(&bytes[start..start + length]);
            u128::from_le_bytes(padded)
        }
    };
    word | (length as u128) << 120
}

#[inline]
fn slot_of(key: u128) -> usize {
    let mixed = (key as u64 ^ ((key >> 64) as u64).rotate_left(29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> (64 - CACHE_SIZE.trailing_zeros())) as usize
}

/// (left rank, right rank) -> rank of the joined token: open addressing, keys and values in one array.
struct PairTable {
    slots: Vec<(u32, u32, u32)>, // left == NONE: free
    used: usize,
}

impl PairTable {
    fn new(expected: usize) -> Self {
        PairTable { slots: vec![(NONE, 0, 0); (expected * 4).next_power_of_two().max(16)], used: 0 }
    }

    #[inline]
    fn find(&self, left: u32, right: u32) -> usize {
        let key = (left as u64) << 32 | right as u64;
        let mixed = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mask = self.slots.len() - 1;
        let mut slot = (mixed >> 32) as usize & mask;
        while self.slots[slot].0 != NONE && (self.slots[slot].0, self.slots[slot].1) != (left, right) {
            slot = (slot + 1) & mask;
        }
        slot
    }

    fn insert(&mut self, left: u32, right: u32, rank: u32) {
        if self.used * 2 >= self.slots.len() {
            let larger = PairTable { slots: vec![(NONE, 0, 0); self.slots.len() * 2], used: 0 };
            let old = std::mem::replace(self, larger);
            for (left, right, rank) in old.slots.into_iter().filter(|slot| slot.0 != NONE) {
                self.insert(left, right, rank);
            }
        }
        let slot = self.find(left, right);
        self.slots[slot] = (left, right, rank);
        self.used += 1;
    }

    #[inline]
    fn get(&self, left: u32, right: u32) -> u32 {
        let slot = self.slots[self.find(left, right)];
        if slot.0 == NONE {
            NONE
        } else {
            slot.2
        }
    }
}

/// [`hash_bytes`] for the standard hash map.
#[derive(Clone, Copy, Default)]
struct ByteHashing;

#[derive(Default)]
struct ByteHasher(u64);

impl std::hash::BuildHasher for ByteHashing {
    type Hasher = ByteHasher;
    fn build_hasher(&self) -> ByteHasher {
        ByteHasher::default()
    }
}

impl std::hash::Hasher for ByteHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        self.0 = hash_bytes(bytes);
    }
    fn write_usize(&mut self, _: usize) {} // the length of a slice, which hash_bytes mixes in itself
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Counter;

    fn vocabulary(texts: &[&str], num_merges: usize) -> Vec<Vec<u8>> {
        let mut counter = Counter::new(1);
        counter.feed(texts);
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for (left, right) in counter.train(num_merges, || false).expect("not interrupted") {
            tokens.push([tokens[left as usize].as_slice(), &tokens[right as usize]].concat());
        }
        tokens
    }

    fn encoder<T: TokenId>(tokens: &[Vec<u8>]) -> Encoder<T> {
        let ids: Vec<u32> = (0..tokens.len() as u32).collect();
        let tokens: Vec<&[u8]> = tokens.iter().map(Vec::as_slice).collect();
        Encoder::new(&tokens, &ids).expect("a good vocabulary")
    }

    /// The rule of the module's first paragraph, with no thought of speed.
    fn encode_slowly(tokens: &[Vec<u8>], text: &str) -> Vec<u32> {
        let rank = |bytes: &[u8]| tokens.iter().position(|token| token == bytes);
        let mut ids = Vec::new();
        for piece in Splitter::new(text) {
            let mut parts: Vec<&[u8]> = piece.as_bytes().chunks(1).collect();
            let mut start: Vec<usize> = (0..=parts.len()).collect();
            if rank(piece.as_bytes()).is_some() {
                (parts, start) = (vec![piece.as_bytes()], vec![0, piece.len()]);
            }
            while let Some((_, at)) = (1..parts.len())
                .filter_map(|at| rank(&piece.as_bytes()[start[at - 1]..start[at + 1]]).map(|rank| (rank, at)))
                .min()
            {
                parts[at - 1] = &piece.as_bytes()[start[at - 1]..start[at + 1]];
                parts.remove(at);
                start.remove(at);
            }
            ids.extend(parts.iter().map(|part| rank(part).expect("a token") as u32));
        }
        ids
    }

    const TEXTS: [&str; 4] =
        ["the cat and the hat, then that", "你好世界，你好", "aaaaaaaaaaaaaaaaaaaaaaa", "\0\0 \0 'll 123456"];

    #[test]
    fn equals_the_slow_rule() {
        for num_merges in [0, 3, 20, 60] {
            let tokens = vocabulary(&TEXTS, num_merges);
            let encoder = encoder::<u16>(&tokens);
            for text in TEXTS.iter().chain(&["", "x", "that 你 cat 世界 aaaa", "\0", "\0\0\0"]) {
                let (parts, counts) = encoder.encode_batch(&[text, text], 1); // the second from the cache
                let ids: Vec<u32> = parts.concat().iter().map(|&id| id as u32).collect();
                let expected = encode_slowly(&tokens, text);
                assert_eq!(counts, [expected.len(); 2]);
                assert_eq!(ids, [expected.clone(), expected].concat(), "{text:?}");
            }
        }
    }

    #[test]
    fn long_pieces_join_as_short_ones_do() {
        let tokens = vocabulary(&TEXTS, 60);
        let encoder = encoder::<u32>(&tokens);
        let mut seed = 3u64;
        for length in 1..200 {
            let piece: Vec<u8> = (0..length)
                .map(|_| {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    b"aaathenc"[(seed >> 61) as usize]
                })
                .collect();
            let mut short: Vec<(u32, u32)> = piece.iter().map(|&b| (encoder.byte_ranks[b as usize], NONE)).collect();
            for index in 1..short.len() {
                short[index - 1].1 = encoder.pairs.get(short[index - 1].0, short[index].0);
            }
            let mut long = short.clone();
            encoder.join_short(&mut short);
            encoder.join_long(&mut long);
            assert_eq!(short, long);
        }
    }

    #[test]
    fn a_million_letters_or_blanks_take_no_time() {
        let encoder = encoder::<u16>(&vocabulary(&TEXTS, 60));
        for text in ["a".repeat(1_000_000), " ".repeat(1_000_000) + "x", "字".repeat(400_000)] {
            let (parts, counts) = encoder.encode_batch(&[&text], 1);
            assert_eq!(parts.concat().len(), counts[0]);
        }
    }

    #[test]
    fn threads_do_not_matter() {
        let encoder = encoder::<u32>(&vocabulary(&TEXTS, 60));
        let texts: Vec<String> = (0..3000).map(|n| format!("{} {n} {}", TEXTS[n % 4], TEXTS[n / 7 % 4])).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let (one, counts) = encoder.encode_batch(&texts, 1);
        let (three, same) = encoder.encode_batch(&texts, 3);
        assert_eq!((one.concat(), counts), (three.concat(), same));
    }

    #[test]
    fn bad_vocabularies_are_refused() {
        let bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        let all: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        let ids: Vec<u32> = (0..256).collect();
        assert!(Encoder::<u16>::new(&all, &ids).is_ok());
        assert!(Encoder::<u16>::new(&all[1..], &ids[1..]).is_err(), "a byte is missing");
        assert!(Encoder::<u16>::new(&all, &ids[1..]).is_err(), "an id is missing");
        assert!(Encoder::<u16>::new(&[all.clone(), vec![b"a"]].concat(), &[0; 257]).is_err(), "a token twice");
        assert!(Encoder::<u16>::new(&[all.clone(), vec![b""]].concat(), &[0; 257]).is_err(), "an empty token");
        assert!(Encoder::<u16>::new(&all, &[70_000; 256]).is_err(), "an id too large");
    }
}
