//! Text to ids.
//!
//! The rule is tiktoken's: a piece that is a token is that token; otherwise start from its bytes and, again and again,
//! join the two neighbours whose joint bytes are the token of lowest rank, the leftmost first.
//!
//! Following the rule step by step ([`Encoder::join`]) costs a look at every pair for every join. Two shortcuts give
//! the same ids:
//! * Most words were seen a moment ago. A table of fixed size, one for all threads, keeps the ids of short pieces; a
//!   newcomer evicts the older of two. This carries English, where 24 of 25 words are found.
//! * What is new goes by longest match and a check of neighbours ([`Encoder::walk`]). This carries Chinese, whose
//!   pieces are clauses: as long as a sentence, and hardly ever the same twice.
//!
//! What was tried and lost, on 20 MB of English and 10 of Chinese: the best pair by a scan (half the speed on clauses;
//! for short words alone, with all ranks in one vector, 6% slower); a hash map of whole tokens beside the trie, or a
//! table for their first two bytes; keeping the answers of [`Encoder::stay_apart`] (one in eight was asked again in
//! Chinese, one in three in English); one word a place instead of two (9% slower), a table of an eighth of the size
//! (20%), two tables, by length (5%), a table for each thread (the second thread added 7% less); looking words up one
//! at a time (10%); huge pages for the table (1% faster, by a call outside of Rust).

use crate::parallel::{parallel, Interrupted, Texts};
use crate::split::Splitter;
use crate::{hash_pair, key_of, prefetch, slot_of, KEY_BYTES};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{fence, AtomicU64};

/// The integer that holds an id: `u16` for vocabularies up to 65,536, else `u32`.
pub trait TokenId: Copy + Default + PartialEq + Send + Sync {
    /// The largest id it can hold.
    const LARGEST: u32;
    /// As many ids as twelve bytes hold.
    type Few: AsRef<[Self]>;
    /// Ids of a number of eight bytes and one of four, the lowest bits first.
    fn unpack(eight: u64, four: u32) -> Self::Few;
    /// Convert; the caller has checked the range.
    fn new(id: u32) -> Self;
    /// Convert back.
    fn get(self) -> u32;
}

impl TokenId for u16 {
    const LARGEST: u32 = u16::MAX as u32;
    type Few = [u16; 6];
    #[inline]
    fn unpack(eight: u64, four: u32) -> [u16; 6] {
        let part = |n: u32| (eight >> (16 * n)) as u16;
        [part(0), part(1), part(2), part(3), four as u16, (four >> 16) as u16]
    }
    fn new(id: u32) -> Self {
        id as u16
    }
    fn get(self) -> u32 {
        self as u32
    }
}

impl TokenId for u32 {
    const LARGEST: u32 = NONE - 1;
    type Few = [u32; 3];
    #[inline]
    fn unpack(eight: u64, four: u32) -> [u32; 3] {
        [eight as u32, (eight >> 32) as u32, four]
    }
    fn new(id: u32) -> Self {
        id
    }
    fn get(self) -> u32 {
        self
    }
}

/// No token.
const NONE: u32 = u32::MAX;

// --------------------------------------------------------------------------------------------------------------------
// The trie: which tokens does a text begin with?

/// All tokens as a trie in one array ("double array", Aoe 1989): a step is one look at one cell. A hash table from
/// (node, byte) to node takes as many steps, and several times the memory: what matters here is how much of the trie
/// stays in the caches near the core, so a node is four bytes, and the 60,000 of a vocabulary of 32,768 are 240 kB.
///
/// The children of a node share a `base`: the child for byte `b` is cell `base ^ b`. Each node with children has a base
/// of its own, so whether that cell is a child of this node is seen from the byte it is labelled with.
struct Trie {
    /// Base times BASE, plus ENDS where a token ends, plus TAKEN, plus the label; 0 for a free cell
    nodes: Vec<u32>,
    tokens: Vec<u32>, // [nodes] rank of the token that ends there
    root: u32,        // base of the root's children
}

const TAKEN: u32 = 1 << 8;
const ENDS: u32 = 1 << 9;
const BASE: u32 = 1 << 10;
/// The base of nodes without children. Nobody else has it, so no cell under it has the label that is asked for.
const CHILDLESS: u32 = 0;

impl Trie {
    /// Time: about linear in the bytes of the tokens. Errors: a token that occurs twice; more than four million nodes.
    fn new(tokens: &[&[u8]]) -> Result<Self, String> {
        let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
        order.sort_unstable_by_key(|&rank| tokens[rank as usize]);
        if let Some(pair) = order.windows(2).find(|pair| tokens[pair[0] as usize] == tokens[pair[1] as usize]) {
            let (first, second) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
            return Err(format!("tokens {first} and {second} are equal; each occurs once"));
        }
        let mut trie = Trie { nodes: vec![0; 256], tokens: vec![NONE; 256], root: 0 };
        let mut rooms = Rooms { taken: vec![false; 256], tried: 0 };
        rooms.taken[CHILDLESS as usize] = true;
        // (cell of a node, NONE for the root; its depth; the run of sorted tokens that begin with it)
        let mut waiting = vec![(NONE, 0, 0..order.len())];
        let mut children: Vec<(u8, Range<usize>)> = Vec::new();
        while let Some((cell, depth, mut run)) = waiting.pop() {
            let first = order[run.start];
            if tokens[first as usize].len() == depth {
                trie.nodes[cell as usize] |= ENDS;
                trie.tokens[cell as usize] = first;
                run.start += 1;
            }
            children.clear();
            for index in run {
                let byte = tokens[order[index] as usize][depth];
                match children.last_mut() {
                    Some((last, run)) if *last == byte => run.end = index + 1,
                    _ => children.push((byte, index..index + 1)),
                }
            }
            let base = trie.room(&children, &mut rooms);
            if base > u32::MAX / BASE {
                let most = u32::MAX / BASE;
                return Err(format!(
                    "the tokens have more than {most} different beginnings; there is no room for more; \
                     train a smaller vocabulary, or on text without runs of millions of equal characters"
                ));
            }
            match cell {
                NONE => trie.root = base,
                _ => trie.nodes[cell as usize] |= base * BASE,
            }
            for (byte, run) in &children {
                let child = base ^ *byte as u32;
                trie.nodes[child as usize] = TAKEN | *byte as u32;
                waiting.push((child, depth + 1, run.clone()));
            }
        }
        Ok(trie)
    }

    /// A base that no other node has, under which the cells of all children are free. The array grows by blocks of 256,
    /// within which `base ^ byte` stays.
    fn room(&mut self, children: &[(u8, Range<usize>)], rooms: &mut Rooms) -> u32 {
        let Some((first, _)) = children.first() else { return CHILDLESS };
        // A single child fits nearly everywhere, and fills the holes that families leave. For a family only the end is
        // searched: to search all that is crowded takes too long
        let alone = children.len() == 1;
        for cell in if alone { rooms.tried } else { self.nodes.len().saturating_sub(512) }.. {
            if cell >= self.nodes.len() {
                self.nodes.resize(self.nodes.len() + 256, 0);
                self.tokens.resize(self.nodes.len(), NONE);
                rooms.taken.resize(self.nodes.len(), false);
            }
            let base = cell ^ *first as usize;
            if !rooms.taken[base] && children.iter().all(|(byte, _)| self.nodes[base ^ *byte as usize] == 0) {
                rooms.taken[base] = true;
                rooms.tried = if alone { cell + 1 } else { rooms.tried };
                return base as u32;
            }
        }
        unreachable!("a fresh block has room for any family")
    }

    /// Rank and length of the longest token that `text` begins with: there is one, since every byte is a token. For an
    /// empty text the rank is NONE.
    #[inline]
    fn longest(&self, text: &[u8]) -> (u32, usize) {
        let mut base = self.root;
        let (mut found, mut length) = (NONE, 0);
        for (index, &byte) in text.iter().enumerate() {
            let cell = base ^ byte as u32;
            let node = self.nodes[cell as usize];
            if node % ENDS != TAKEN | byte as u32 {
                break;
            }
            if node & ENDS != 0 {
                (found, length) = (cell, index + 1);
            }
            base = node / BASE;
        }
        (self.tokens.get(found as usize).copied().unwrap_or(NONE), length)
    }
}

/// What is known of the cells while a trie is built.
struct Rooms {
    taken: Vec<bool>, // [cells] whether some node has this base
    tried: usize,     // cells before this one were tried for single children
}

// --------------------------------------------------------------------------------------------------------------------
// The vocabulary

/// (left rank, right rank) -> rank of the joined token: open addressing, all in one array.
///
/// Most questions are about pairs that make no token. One bit for each hash value answers 19 of 20 of these, from a
/// table small enough for the caches near the core.
struct PairTable<T> {
    slots: Vec<[T; 3]>, // [left, right, joined]; three times LARGEST = free; at most half are taken
    maybe: Vec<u64>,    // eight bits for each slot; bit n: some pair has hash n
}

impl<T: TokenId> PairTable<T> {
    /// `most`: how many pairs will be inserted at most.
    fn new(most: usize) -> Self {
        let size = (most * 2).next_power_of_two().max(64);
        PairTable { slots: vec![[T::new(T::LARGEST); 3]; size], maybe: vec![0; size / 8] }
    }

    fn insert(&mut self, left: u32, right: u32, rank: u32) {
        let hash = hash_pair(left, right);
        let word = (hash / 64) & (self.maybe.len() - 1);
        self.maybe[word] |= 1 << (hash % 64);
        let mut slot = hash & (self.slots.len() - 1);
        while self.slots[slot] != [T::new(T::LARGEST); 3] {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = [left, right, rank].map(T::new);
    }

    /// Rank of the joined token, or NONE.
    #[inline]
    fn get(&self, left: u32, right: u32) -> u32 {
        let hash = hash_pair(left, right);
        if self.maybe[(hash / 64) & (self.maybe.len() - 1)] >> (hash % 64) & 1 == 0 {
            return NONE;
        }
        let mut slot = hash & (self.slots.len() - 1);
        loop {
            let [l, r, joined] = self.slots[slot];
            if [l, r, joined] == [T::new(T::LARGEST); 3] {
                return NONE;
            }
            if (l.get(), r.get()) == (left, right) {
                return joined.get();
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }
}

/// What encoding wants to know of a token, side by side: whoever asks for one thing soon asks for another.
#[derive(Clone, Copy)]
struct Token<T> {
    id: T,
    left: T, // ranks of the two tokens that it was joined from; of no use for the 256 bytes
    right: T,
    shorter: T,  // rank of the longest other token that it begins with; its own for a single byte
    length: u32, // in bytes
}

/// A vocabulary, ready to encode.
pub struct Encoder<T> {
    tokens: Vec<Token<T>>, // [ranks]
    bytes: [u32; 256],     // rank of each single byte
    trie: Trie,
    pairs: PairTable<T>,
    /// [256 * last byte of the left + first byte of the right] the lowest rank of all tokens joined from two halves
    /// that meet in these bytes
    seams: Vec<u32>,
    /// Whether the bytes come first and every other token is reached by joins of lower ranks, as in every trained
    /// vocabulary: only then is `walk` right
    regular: bool,
    words: Vec<Place>, // [WORDS]
}

impl<T: TokenId> Encoder<T> {
    /// `tokens` in the order in which they are joined (lowest rank first), `ids` the id of each. Time: about linear in
    /// the bytes of all tokens, 30 ms for 32,768; memory: that of the vocabulary, and 8 MiB for words.
    ///
    /// Errors: lengths differ, an id too large for T, an empty or doubled token, a byte without a token.
    pub fn new(tokens: &[&[u8]], ids: &[u32]) -> Result<Self, String> {
        if tokens.len() != ids.len() {
            return Err(format!("{} tokens with {} ids; each token needs one", tokens.len(), ids.len()));
        }
        if tokens.len() > T::LARGEST as usize + 1 {
            return Err(format!("{} tokens are more than {}; ask for wide ids", tokens.len(), T::LARGEST as usize + 1));
        }
        if let Some(id) = ids.iter().find(|&&id| id > T::LARGEST) {
            return Err(format!("id {id} is above {}; ask for wide ids", T::LARGEST));
        }
        let mut bytes = [NONE; 256];
        for (rank, token) in tokens.iter().enumerate() {
            match token {
                [] => return Err(format!("token {rank} is empty; each needs at least one byte")),
                [byte] => bytes[*byte as usize] = rank as u32,
                _ => {}
            }
        }
        if let Some(byte) = bytes.iter().position(|&rank| rank == NONE) {
            return Err(format!("byte 0x{byte:02x} has no token; all 256 must"));
        }
        let trie = Trie::new(tokens)?;
        let known = tokens.iter().zip(ids).enumerate().map(|(rank, (token, &id))| {
            let shorter = match trie.longest(&token[..token.len() - 1]) {
                (NONE, _) => rank as u32,
                (shorter, _) => shorter,
            };
            let (left, right) = (T::new(0), T::new(0));
            Token { id: T::new(id), left, right, shorter: T::new(shorter), length: token.len() as u32 }
        });
        let mut encoder = Encoder {
            tokens: known.collect(),
            bytes,
            trie,
            pairs: PairTable::new(tokens.len()),
            seams: vec![NONE; 1 << 16],
            regular: true,
            words: std::iter::repeat_with(Place::default).take(WORDS).collect(),
        };
        encoder.learn_pairs(tokens);
        Ok(encoder)
    }

    /// Find the two halves of each token: what the rule makes of its bytes with the tokens below it. That is the cut
    /// into two of these that stay apart while this token is unknown.
    fn learn_pairs(&mut self, tokens: &[&[u8]]) {
        self.regular = self.bytes.iter().all(|&rank| rank < 256);
        for (rank, token) in tokens.iter().enumerate().skip(256) {
            let mut whole = rank;
            let halves = loop {
                let left = self.tokens[whole].shorter.get();
                if left as usize == whole || !self.regular {
                    break None;
                }
                let cut = self.tokens[left as usize].length as usize;
                let (right, length) = self.trie.longest(&token[cut..]);
                let below = left.max(right) < rank as u32 && cut + length == token.len();
                let seam = seam_of(token, cut);
                if below && self.stay_apart(left, right, seam) {
                    break Some((left, right, seam));
                }
                whole = left as usize;
            };
            let Some((left, right, seam)) = halves else {
                self.regular = false;
                break;
            };
            (self.tokens[rank].left, self.tokens[rank].right) = (T::new(left), T::new(right));
            self.pairs.insert(left, right, rank as u32);
            self.seams[seam] = self.seams[seam].min(rank as u32);
        }
        if self.regular {
            return;
        }
        // Some token is out of reach of lower ranks, so it may arise from any two neighbours that spell it: tiktoken
        // compares joint bytes. In a regular vocabulary no other two than its halves ever meet.
        let mut pairs = Vec::new();
        for (rank, token) in tokens.iter().enumerate() {
            for cut in 1..token.len() {
                let (left, left_length) = self.trie.longest(&token[..cut]);
                let (right, right_length) = self.trie.longest(&token[cut..]);
                if left_length == cut && right_length == token.len() - cut {
                    pairs.push((left, right, rank as u32));
                }
            }
        }
        self.pairs = PairTable::new(pairs.len());
        for (left, right, rank) in pairs {
            self.pairs.insert(left, right, rank);
        }
    }

    /// The rule itself, with a queue of pairs and links between neighbours. Time: length times its logarithm.
    fn join(&self, piece: &[u8], parts: &mut Vec<u32>) {
        const GONE: u32 = NONE; // a part that was joined to its left neighbour
        parts.clear();
        parts.extend(piece.iter().map(|&byte| self.bytes[byte as usize]));
        let length = parts.len();
        let mut next: Vec<usize> = (1..=length).collect(); // `length` = no next
        let mut previous: Vec<usize> = (0..length).map(|index| index.wrapping_sub(1)).collect();
        let mut queue = BinaryHeap::new(); // lowest rank first, then leftmost
        let enqueue = |queue: &mut BinaryHeap<_>, parts: &[u32], left: usize, right: usize| {
            let rank = self.pairs.get(parts[left], parts[right]);
            if rank != NONE {
                queue.push(Reverse((rank, left, right)));
            }
        };
        for right in 1..length {
            enqueue(&mut queue, parts, right - 1, right);
        }
        while let Some(Reverse((rank, left, right))) = queue.pop() {
            // one of the two may have been joined to something else since
            if parts[left] == GONE || next[left] != right || self.pairs.get(parts[left], parts[right]) != rank {
                continue;
            }
            parts[left] = rank;
            parts[right] = GONE;
            next[left] = next[right];
            if next[left] < length {
                previous[next[left]] = left;
                enqueue(&mut queue, parts, left, next[left]);
            }
            if left > 0 {
                enqueue(&mut queue, parts, previous[left], left);
            }
        }
        parts.retain(|&part| part != GONE);
    }

    /// Whether the rule leaves `left` and `right` side by side when it meets their joint bytes.
    ///
    /// Time runs backwards here: of the two, the one of higher rank was made last, so it is taken apart first, and
    /// only its half at the seam matters. If the two that face each other at some moment make a token of a rank below
    /// what was joined instead, the rule would have joined across the seam.
    ///
    /// `seam`: of the bytes that meet, see [`seam_of`].
    fn stay_apart(&self, mut left: u32, mut right: u32, seam: usize) -> bool {
        // What crosses the seam is joined from two halves that meet in these two bytes: so nothing of lower rank does
        let first = self.seams[seam];
        let mut bound = NONE; // a join at the seam would have to be below this rank to come in time
        loop {
            if bound <= first {
                return true;
            }
            if self.pairs.get(left, right) < bound {
                return false;
            }
            if left.max(right) < 256 {
                return true; // two bytes: nothing is left to open
            }
            // Of two tokens of equal rank the left one was made first, being further left: the right one opens first.
            // A join at the seam lies to the right of all joins in the left token, so there it must be of lower rank
            // to come in time; in the right token equal rank will do
            let open_left = left > right;
            bound = if open_left { left } else { right + 1 };
            let inner =
                if open_left { self.tokens[left as usize].right } else { self.tokens[right as usize].left }.get();
            (left, right) = if open_left { (inner, right) } else { (left, inner) };
        }
    }
}

/// The place in `Encoder::seams` for two tokens that meet at `cut`.
#[inline]
fn seam_of(text: &[u8], cut: usize) -> usize {
    (text[cut - 1] as usize) << 8 | text[cut] as usize
}

// --------------------------------------------------------------------------------------------------------------------
// Encoding

/// Places in the table of words; 8 MiB.
const WORDS: usize = 1 << 17;
/// Pieces looked up together: the table is too large for the caches near the core, so all are asked for first.
const BATCH: usize = 32;
/// Stands for the key of a piece that is too long to have one.
const NO_KEY: u128 = u128::MAX;

/// The ids of words met lately. All threads share one table, so that each word is new once and not once a thread.
///
/// A place is a cache line and holds two words of four numbers: the key in two halves (0 = free), four ids, and a last
/// number with what is left of the ids in its upper half, below it how often this word was replaced, and in the lowest
/// byte the number of ids. There is no lock (a "seqlock", Boehm 2012): who replaces a word writes BUSY into the last
/// number first and a new last number at the end; who reads a word and finds the same last number before and after has
/// read one word, and not half of each. (Were a word replaced 2^24 times while one thread reads it, the count would be
/// what it was.)
#[derive(Default)]
#[repr(align(64))]
struct Place([[AtomicU64; 4]; 2]);

const BUSY: u64 = 0xFF;

impl Place {
    /// The ids of a word and how many they are, if it is here.
    #[inline]
    fn find<T: TokenId>(&self, key: u128) -> Option<(T::Few, usize)> {
        let is = |word: &[AtomicU64; 4]| {
            (word[0].load(Relaxed) ^ key as u64) | (word[1].load(Relaxed) ^ (key >> 64) as u64) == 0
        };
        let word = &self.0[!is(&self.0[0]) as usize]; // no branch: which of the two, nobody foresees
        let last = word[3].load(Acquire);
        let found = is(word);
        let ids = T::unpack(word[2].load(Relaxed), (last >> 32) as u32);
        fence(Acquire);
        let whole = last == word[3].load(Relaxed) && last & BUSY != BUSY;
        (found && whole).then_some((ids, (last & BUSY) as usize))
    }

    /// Put a newcomer in the place of the word that has been here longer, if it has few ids.
    fn keep<T: TokenId>(&self, key: u128, ids: &[T]) {
        let width = 8 * size_of::<T>();
        if ids.len() * width > 96 {
            return;
        }
        let packed = ids.iter().rev().fold(0, |packed, id| packed << width | id.get() as u128);
        let [first, second] = [0, 1].map(|n| self.0[n][3].load(Relaxed));
        let replaced = |last: u64| last as u32 >> 8; // how often
        let (word, last) = if replaced(second) < replaced(first) { (&self.0[1], second) } else { (&self.0[0], first) };
        // whoever else is at it may go on
        if last & BUSY == BUSY || word[3].compare_exchange(last, last | BUSY, Relaxed, Relaxed).is_err() {
            return;
        }
        fence(Release);
        word[0].store(key as u64, Relaxed);
        word[1].store((key >> 64) as u64, Relaxed);
        word[2].store(packed as u64, Relaxed);
        let once_more = (replaced(last) << 8).wrapping_add(1 << 8) as u64;
        word[3].store(((packed >> 64) as u64) << 32 | once_more | ids.len() as u64, Release);
    }
}

/// What a thread keeps from one piece to the next.
#[derive(Default)]
struct Scratch {
    parts: Vec<u32>, // ranks of the piece at work
    dead: Vec<u64>,  // one bit for each position of the piece: no encoding passes here
}

impl<T: TokenId> Encoder<T> {
    /// Encode documents. `num_threads`: 0 = one per core. Returns the ids in parts, in order, and the number of ids of
    /// each document. Time: linear in the text; memory: the ids.
    ///
    /// `interrupted` is asked about every 20 ms, on the calling thread. Error: it said yes, or a text cannot be had.
    pub fn encode_batch(
        &self,
        texts: &(impl Texts + ?Sized),
        num_threads: usize,
        interrupted: impl FnMut() -> bool,
    ) -> Result<(Vec<Vec<T>>, Vec<usize>), Interrupted> {
        let parts = parallel(texts, num_threads, interrupted, |chunk| {
            let mut scratch = Scratch::default();
            let bytes: usize = chunk.iter().map(|(_, text)| text.len()).sum();
            // room for short tokens: pages that are never written cost nothing
            let mut ids = Vec::with_capacity(bytes / 2);
            let mut counts = Vec::with_capacity(chunk.len());
            for (document, text) in chunk {
                let before = ids.len();
                self.encode_text(text, &mut scratch, &mut ids);
                counts.push((*document, ids.len() - before));
            }
            (ids, counts)
        })?;
        let mut totals = Vec::new();
        for &(document, count) in parts.iter().flat_map(|(_, counts)| counts) {
            if document == totals.len() {
                totals.push(count);
            } else {
                totals[document] += count; // one more part of a long document
            }
        }
        Ok((parts.into_iter().map(|(ids, _)| ids).collect(), totals))
    }

    fn encode_text(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<T>) {
        let bytes = text.as_bytes();
        let mut splitter = Splitter::new(text);
        let (mut ends, mut keys, mut places) = ([0; BATCH], [0; BATCH], [0; BATCH]);
        let mut start = 0; // of the next piece
        loop {
            let count = splitter.next_ends(&mut ends);
            if count == 0 {
                return;
            }
            let mut from = start;
            for ((&end, key), place) in ends[..count].iter().zip(&mut keys).zip(&mut places) {
                *key = if end - from > KEY_BYTES { NO_KEY } else { key_of(bytes, from, end - from) };
                *place = slot_of(*key, WORDS);
                prefetch(&self.words[*place]);
                from = end;
            }
            for ((&end, &key), &place) in ends[..count].iter().zip(&keys).zip(&places) {
                if let Some((ids, number)) = self.words[place].find::<T>(key) {
                    // a copy of fixed length is a few instructions, one of unknown length a function call
                    let length = out.len() + number;
                    out.extend_from_slice(ids.as_ref());
                    out.truncate(length);
                } else {
                    let before = out.len();
                    self.encode_piece(&bytes[start..end], scratch, out);
                    if key != NO_KEY {
                        self.words[place].keep(key, &out[before..]);
                    }
                }
                start = end;
            }
        }
    }

    #[inline(never)] // keeps the loop above short, so that its variables stay in registers
    fn encode_piece(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<T>) {
        let first = self.trie.longest(piece);
        if first.1 == piece.len() {
            return out.push(self.tokens[first.0 as usize].id);
        }
        match self.regular {
            true => self.walk(piece, first, scratch),
            false => self.join(piece, &mut scratch.parts),
        }
        out.extend(scratch.parts.iter().map(|&rank| self.tokens[rank as usize].id));
    }

    /// What [`Encoder::join`] does, from left to right: the longest token that fits its left neighbour, and back a step
    /// where none does. Time: linear, since a position given up is never tried again.
    ///
    /// Why the result is the same: joins never cross the final seams. So the rule does within two neighbours what it
    /// would do were they the whole text, and leaves them apart. The other way round, take any tokens of which each two
    /// neighbours stay apart, and think of the first join that crosses one of their seams: up to then the two tokens
    /// at that seam developed as they do alone, and alone they are not joined there. So there is none, and these
    /// tokens are the result. It follows that what leads to a position is unique, which is why a position that once
    /// proved a dead end stays one.
    fn walk(&self, piece: &[u8], first: (u32, usize), scratch: &mut Scratch) {
        let Scratch { parts, dead, .. } = scratch;
        parts.clear();
        dead.clear();
        dead.resize(piece.len() / 64 + 1, 0);
        let mut at = 0;
        let (mut token, mut length) = first; // the token to try at `at`
        loop {
            let end = at + length;
            let open = dead[end / 64] >> (end % 64) & 1 == 0;
            if open && parts.last().is_none_or(|&left| self.stay_apart(left, token, seam_of(piece, at))) {
                parts.push(token);
                if end == piece.len() {
                    return;
                }
                at = end;
                (token, length) = self.trie.longest(&piece[at..]);
                continue;
            }
            while self.tokens[token as usize].length == 1 {
                dead[at / 64] |= 1 << (at % 64); // nothing shorter: give up this position, and the token before it
                token = parts.pop().expect("every text has an encoding");
                at -= self.tokens[token as usize].length as usize;
            }
            token = self.tokens[token as usize].shorter.get();
            length = self.tokens[token as usize].length as usize;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Counter;

    fn vocabulary(texts: &[&str], num_merges: usize) -> Vec<Vec<u8>> {
        let mut counter = Counter::new(1);
        counter.feed(texts, || false).expect("not interrupted");
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for (left, right) in counter.train(num_merges, |_| false).expect("not interrupted") {
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

    fn encode<T: TokenId + Into<u32>>(encoder: &Encoder<T>, texts: &[&str], threads: usize) -> (Vec<u32>, Vec<usize>) {
        let (parts, counts) = encoder.encode_batch(texts, threads, || false).expect("not interrupted");
        (parts.concat().into_iter().map(Into::into).collect(), counts)
    }

    const TEXTS: [&str; 4] =
        ["the cat and the hat, then that", "你好世界，你好", "aaaaaaaaaaaaaaaaaaaaaaa", "\0\0 \0 'll 123456"];

    #[test]
    fn equals_the_slow_rule() {
        for num_merges in [0, 3, 20, 60] {
            let tokens = vocabulary(&TEXTS, num_merges);
            let encoder = encoder::<u16>(&tokens);
            assert!(encoder.regular);
            for text in TEXTS.iter().chain(&["", "x", "that 你 cat 世界 aaaa", "\0", "\0\0\0"]) {
                let (ids, counts) = encode(&encoder, &[text, text], 1); // the second from the table of words
                let expected = encode_slowly(&tokens, text);
                assert_eq!(counts, [expected.len(); 2]);
                assert_eq!(ids, [expected.clone(), expected].concat(), "{text:?}");
            }
        }
    }

    fn random(seed: &mut u64, bound: usize) -> usize {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 33) as usize % bound
    }

    #[test]
    fn walking_equals_joining_on_random_vocabularies() {
        let mut seed = 3;
        for letters in [1, 2, 3] {
            for _ in 0..40 {
                let mut word = |length| (0..length).map(|_| ["a", "b", "字"][random(&mut seed, letters)]).collect();
                let texts: Vec<String> = (1..20).map(&mut word).collect();
                let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                let encoder = encoder::<u32>(&vocabulary(&texts, 50));
                let mut scratch = Scratch::default();
                let mut parts = Vec::new();
                for length in (1..100).step_by(7) {
                    let piece: String = word(length);
                    encoder.walk(piece.as_bytes(), encoder.trie.longest(piece.as_bytes()), &mut scratch);
                    encoder.join(piece.as_bytes(), &mut parts);
                    assert_eq!(scratch.parts, parts, "{piece}");
                }
            }
        }
    }

    #[test]
    fn random_tokens_that_no_training_makes_follow_the_rule_too() {
        let mut seed = 5;
        let mut irregular = 0;
        for _ in 0..60 {
            let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
            for _ in 0..random(&mut seed, 8) {
                let token: Vec<u8> = (0..2 + random(&mut seed, 4)).map(|_| b"ab"[random(&mut seed, 2)]).collect();
                if !tokens.contains(&token) {
                    tokens.push(token);
                }
            }
            let encoder = encoder::<u16>(&tokens);
            irregular += !encoder.regular as usize;
            for length in 0..30 {
                let text: String = (0..length).map(|_| ["a", "b"][random(&mut seed, 2)]).collect();
                assert_eq!(
                    encode(&encoder, &[&text], 1).0,
                    encode_slowly(&tokens, &text),
                    "{text} {:?}",
                    &tokens[256..]
                );
            }
        }
        assert!((10..60).contains(&irregular), "both kinds were met");
    }

    #[test]
    fn a_million_letters_or_blanks_take_no_time() {
        let encoder = encoder::<u16>(&vocabulary(&TEXTS, 60));
        for text in ["a".repeat(1_000_000), " ".repeat(1_000_000) + "x", "字".repeat(400_000)] {
            let (ids, counts) = encode(&encoder, &[&text], 1);
            assert_eq!(ids.len(), counts[0]);
        }
    }

    #[test]
    fn who_reads_while_others_write_finds_whole_words_only() {
        let place = Place::default();
        // the ids of a word repeat its key, so half a word would be seen
        let ids_of = |key: u128| [key as u32, key as u32 * 3, !(key as u32)];
        let found = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (place, found, ids_of) = (&place, &found, &ids_of);
                scope.spawn(move || {
                    for turn in 0..200_000u128 {
                        let key = 1 + (turn * 7 + thread) % 5;
                        place.keep(key << 70 | key, &ids_of(key));
                        let asked = 1 + turn % 5;
                        if let Some((ids, number)) = place.find::<u32>(asked << 70 | asked) {
                            assert_eq!((ids, number), (ids_of(asked), 3));
                            found.fetch_add(1, Relaxed);
                        }
                    }
                });
            }
        });
        assert!(found.into_inner() > 1000);
    }

    #[test]
    fn a_place_keeps_two_words_of_few_ids() {
        let place = Place::default();
        for key in 1..5u128 {
            place.keep(key, &[key as u16; 6]);
        }
        let found: Vec<_> = (1..5).map(|key| place.find::<u16>(key)).collect();
        assert_eq!(found, [None, None, Some(([3; 6], 6)), Some(([4; 6], 6))]);
        place.keep(9, &[9u16; 7]);
        assert_eq!(place.find::<u16>(9), None, "too many ids");
        place.keep(10, &[10u16]);
        assert_eq!(place.find::<u16>(10), Some(([10, 0, 0, 0, 0, 0], 1)));
    }

    #[test]
    fn threads_do_not_matter() {
        let encoder = encoder::<u32>(&vocabulary(&TEXTS, 60));
        let texts: Vec<String> = (0..3000).map(|n| format!("{} {n} {}", TEXTS[n % 4], TEXTS[n / 7 % 4])).collect();
        let long = texts.concat().repeat(9);
        let texts: Vec<&str> = texts.iter().map(String::as_str).chain([long.as_str(), ""]).collect();
        assert_eq!(encode(&encoder, &texts, 1), encode(&encoder, &texts, 3));
        assert_eq!(encoder.encode_batch(&texts[..], 2, || true), Err(Interrupted));
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
        let many: Vec<Vec<u8>> = (0..70_000u32).map(|n| n.to_be_bytes()[1..].to_vec()).chain(bytes.clone()).collect();
        let many: Vec<&[u8]> = many.iter().map(Vec::as_slice).collect();
        let Err(message) = Encoder::<u16>::new(&many, &vec![0; many.len()]) else { panic!("ranks too large") };
        assert!(message.contains("wide"), "{message}");
    }
}
