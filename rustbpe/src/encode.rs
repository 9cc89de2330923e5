//! Text to ids.
//!
//! The rule is tiktoken's: a piece that is a token is that token; otherwise start from its bytes and, again and again,
//! join the two neighbours whose joint bytes are the token of lowest rank, the leftmost first.
//!
//! Following the rule step by step ([`Encoder::join`]) costs a look at every pair for every join. Two shortcuts give
//! the same ids:
//! * Most words were seen a moment ago. A table of fixed size keeps the ids of short pieces; a newcomer evicts the
//!   older of two. This carries English, where 24 of 25 words are found.
//! * What is new goes by longest match and a check of neighbours ([`Encoder::walk`]). This carries Chinese, whose
//!   pieces are clauses: as long as a sentence, and hardly ever the same twice.
//!
//! What was tried and lost, on 20 MB of English and 10 of Chinese: the best pair by a scan (half the speed on
//! clauses); a hash map of whole tokens beside the trie; keeping the answers of [`Encoder::stay_apart`] (one in eight
//! was asked again in Chinese); one word a place instead of two (9% slower), a table of an eighth of the size (20%),
//! two tables, by length (5%); looking words up one at a time (10%).

use crate::parallel::{parallel, Interrupted};
use crate::split::Splitter;
use crate::{hash_pair, key_of, prefetch, slot_of, KEY_BYTES};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::Mutex;

/// The integer that holds an id: `u16` for vocabularies up to 65,536, else `u32`.
pub trait TokenId: Copy + Default + PartialEq + Send + Sync {
    /// The largest id it can hold.
    const LARGEST: u32;
    /// Convert; the caller has checked the range.
    fn new(id: u32) -> Self;
    /// Convert back.
    fn get(self) -> u32;
}

impl TokenId for u16 {
    const LARGEST: u32 = u16::MAX as u32;
    fn new(id: u32) -> Self {
        id as u16
    }
    fn get(self) -> u32 {
        self as u32
    }
}

impl TokenId for u32 {
    const LARGEST: u32 = NONE - 1;
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

/// One node of the trie, that is, one prefix of a token; or a free cell.
#[derive(Clone, Copy)]
struct Node {
    /// The node it hangs on; NONE for a free cell
    parent: u32,
    /// The child for byte `b` is cell `base ^ b`, if the parent noted there is this node. The bit ENDS is set where a
    /// token ends here; its rank is in `Trie::tokens`
    base: u32,
}

const FREE: Node = Node { parent: NONE, base: 0 };
const ENDS: u32 = 1 << 31;
const ROOT: u32 = 0;

/// All tokens as a trie in one array ("double array", Aoe 1989): a step is one look at one cell, and the 60,000 nodes
/// of a vocabulary of 32,768 take half a megabyte. A hash table from (node, byte) to node takes as many steps and three
/// times the memory.
struct Trie {
    nodes: Vec<Node>,
    tokens: Vec<u32>, // [nodes] rank of the token that ends there
}

impl Trie {
    /// Time: about linear in the bytes of the tokens. Error: a token that occurs twice.
    fn new(tokens: &[&[u8]]) -> Result<Self, String> {
        let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
        order.sort_unstable_by_key(|&rank| tokens[rank as usize]);
        if let Some(pair) = order.windows(2).find(|pair| tokens[pair[0] as usize] == tokens[pair[1] as usize]) {
            let (first, second) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
            return Err(format!("tokens {first} and {second} are equal; each occurs once"));
        }
        let mut trie = Trie { nodes: vec![FREE; 256], tokens: vec![NONE; 256] };
        trie.nodes[ROOT as usize].parent = NONE - 1; // none, but the cell is taken
        let mut lowest_free = 1;
        // (node, its depth, the run of sorted tokens that begin with it)
        let mut waiting = vec![(ROOT, 0, 0..order.len())];
        let mut children: Vec<(u8, Range<usize>)> = Vec::new();
        while let Some((node, depth, mut run)) = waiting.pop() {
            let first = order[run.start];
            let ends = tokens[first as usize].len() == depth;
            if ends {
                trie.tokens[node as usize] = first;
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
            let base = trie.room(&children, &mut lowest_free);
            trie.nodes[node as usize].base = base | if ends { ENDS } else { 0 };
            for (byte, run) in &children {
                let child = base ^ *byte as u32;
                trie.nodes[child as usize].parent = node;
                waiting.push((child, depth + 1, run.clone()));
            }
        }
        Ok(trie)
    }

    /// A base under which the cells of all children are free. Cells only fill up, so the search starts at the lowest
    /// free one; the array grows by blocks of 256, within which `base ^ byte` stays.
    fn room(&mut self, children: &[(u8, Range<usize>)], lowest_free: &mut usize) -> u32 {
        let Some((first, _)) = children.first() else { return 0 };
        while self.nodes.get(*lowest_free).is_some_and(|node| node.parent != NONE) {
            *lowest_free += 1;
        }
        // A single child fits everywhere and fills the holes; for families a search of all that is crowded is too long
        let near = if children.len() == 1 { 0 } else { self.nodes.len().saturating_sub(512) };
        for cell in near.max(*lowest_free).. {
            if cell >= self.nodes.len() {
                self.nodes.resize(self.nodes.len() + 256, FREE);
                self.tokens.resize(self.nodes.len(), NONE);
            }
            let base = cell ^ *first as usize;
            if children.iter().all(|(byte, _)| self.nodes[base ^ *byte as usize].parent == NONE) {
                return base as u32;
            }
        }
        unreachable!("a fresh block has room for any family")
    }

    /// Rank and length of the longest token that `text` begins with: there is one, since every byte is a token. For an
    /// empty text the rank is NONE.
    #[inline]
    fn longest(&self, text: &[u8]) -> (u32, usize) {
        let mut node = ROOT;
        let (mut found, mut length) = (ROOT, 0);
        for (index, &byte) in text.iter().enumerate() {
            let base = self.nodes[node as usize].base;
            let child = (base & !ENDS) ^ byte as u32;
            let Node { parent, base } = self.nodes[child as usize];
            if parent != node {
                break;
            }
            if base & ENDS != 0 {
                (found, length) = (child, index + 1);
            }
            node = child;
        }
        (self.tokens[found as usize], length)
    }
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

/// A vocabulary, ready to encode.
pub struct Encoder<T> {
    ids: Vec<T>,         // [ranks]
    lengths: Vec<u32>,   // [ranks] in bytes
    halves: Vec<(T, T)>, // [ranks] the two tokens that each was joined from; of no use for the 256 bytes
    shorter: Vec<u32>,   // [ranks] the longest other token that each begins with; NONE for a single byte
    bytes: [u32; 256],   // rank of each single byte
    trie: Trie,
    pairs: PairTable<T>,
    /// Whether the bytes come first and every other token is reached by joins of lower ranks, as in every trained
    /// vocabulary: only then is `walk` right
    regular: bool,
    idle: Mutex<Vec<Scratch<T>>>, // of threads that are done: a warm table serves the next chunk
}

impl<T: TokenId> Encoder<T> {
    /// `tokens` in the order in which they are joined (lowest rank first), `ids` the id of each. Time: about linear in
    /// the bytes of all tokens, 30 ms for 32,768.
    ///
    /// Errors: lengths differ, an id too large for T, an empty or doubled token, a byte without a token.
    pub fn new(tokens: &[&[u8]], ids: &[u32]) -> Result<Self, String> {
        if tokens.len() != ids.len() {
            return Err(format!("{} tokens with {} ids; each token needs one", tokens.len(), ids.len()));
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
        let mut encoder = Encoder {
            ids: ids.iter().map(|&id| T::new(id)).collect(),
            lengths: tokens.iter().map(|token| token.len() as u32).collect(),
            halves: vec![(T::new(0), T::new(0)); tokens.len()],
            shorter: tokens.iter().map(|token| trie.longest(&token[..token.len() - 1]).0).collect(),
            bytes,
            trie,
            pairs: PairTable::new(tokens.len()),
            regular: true,
            idle: Mutex::default(),
        };
        encoder.learn_pairs(tokens);
        Ok(encoder)
    }

    /// Find the two halves of each token: what the rule makes of its bytes with the tokens below it. That is the cut
    /// into two of these that stay apart while this token is unknown.
    fn learn_pairs(&mut self, tokens: &[&[u8]]) {
        self.regular = self.bytes.iter().all(|&rank| rank < 256);
        for (rank, token) in tokens.iter().enumerate().skip(256) {
            let mut left = self.shorter[rank];
            let right = loop {
                if left == NONE || !self.regular {
                    break NONE;
                }
                let cut = self.lengths[left as usize] as usize;
                let (right, length) = self.trie.longest(&token[cut..]);
                let below = left.max(right) < rank as u32 && cut + length == token.len();
                if below && self.stay_apart(left, right) {
                    break right;
                }
                left = self.shorter[left as usize];
            };
            if right == NONE {
                self.regular = false;
                break;
            }
            self.halves[rank] = (T::new(left), T::new(right));
            self.pairs.insert(left, right, rank as u32);
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
    fn stay_apart(&self, mut left: u32, mut right: u32) -> bool {
        let mut bound = NONE; // a join at the seam would have to be below this rank to come in time
        loop {
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
            let inner = if open_left { self.halves[left as usize].1 } else { self.halves[right as usize].0 }.get();
            (left, right) = if open_left { (inner, right) } else { (left, inner) };
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Encoding

/// Places in a thread's table of words; 8 MiB with u16 ids.
const WORDS: usize = 1 << 17;
/// Pieces looked up together: the table is too large for the caches near the core, so all are asked for first.
const BATCH: usize = 32;
/// Stands for the key of a piece that is too long to have one.
const NO_KEY: u128 = u128::MAX;
/// Pieces of more ids are not kept; an entry is 32 bytes with u16 ids.
const WORD_IDS: usize = 6;

/// Ids of a piece: `key` is its bytes, padded, with its length in the top byte; 0 = empty place.
#[derive(Clone, Copy, Default)]
struct Word<T> {
    key: u128,
    number: u32,
    ids: [T; WORD_IDS],
}

/// Two words share a place, and a cache line: the one asked for last is the first.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Words<T>([Word<T>; 2]);

/// What a thread keeps from one document to the next.
struct Scratch<T> {
    words: Vec<Words<T>>, // [WORDS]
    parts: Vec<u32>,      // ranks of the piece at work
    dead: Vec<u64>,       // one bit for each position of the piece: no encoding passes here
}

impl<T: TokenId> Scratch<T> {
    fn new() -> Self {
        Scratch { words: vec![Words::default(); WORDS], parts: Vec::new(), dead: Vec::new() }
    }
}

impl<T: TokenId> Encoder<T> {
    /// Encode documents. `num_threads`: 0 = one per core. Returns the ids in parts, in order, and the number of ids of
    /// each document. Time: linear in the text; memory: the ids, and 8 MiB a thread (16 MiB with u32).
    ///
    /// `interrupted` is asked about every 20 ms, on the calling thread. Error: it said yes.
    pub fn encode_batch(
        &self,
        texts: &[&str],
        num_threads: usize,
        interrupted: impl FnMut() -> bool,
    ) -> Result<(Vec<Vec<T>>, Vec<usize>), Interrupted> {
        let parts = parallel(texts, num_threads, interrupted, |chunk| {
            let mut scratch = self.idle.lock().ok().and_then(|mut idle| idle.pop()).unwrap_or_else(Scratch::new);
            let bytes: usize = chunk.iter().map(|(_, text)| text.len()).sum();
            // room for short tokens: pages that are never written cost nothing
            let mut ids = Vec::with_capacity(bytes / 2);
            let mut counts = Vec::with_capacity(chunk.len());
            for (document, text) in chunk {
                let before = ids.len();
                self.encode_text(text, &mut scratch, &mut ids);
                counts.push((*document, ids.len() - before));
            }
            if let Ok(mut idle) = self.idle.lock() {
                idle.push(scratch);
            }
            (ids, counts)
        })?;
        let mut totals = vec![0; texts.len()];
        for (document, count) in parts.iter().flat_map(|(_, counts)| counts) {
            totals[*document] += count;
        }
        Ok((parts.into_iter().map(|(ids, _)| ids).collect(), totals))
    }

    fn encode_text(&self, text: &str, scratch: &mut Scratch<T>, out: &mut Vec<T>) {
        let bytes = text.as_bytes();
        let mut splitter = Splitter::new(text);
        let mut batch = Vec::with_capacity(BATCH); // (piece, its key, its place)
        loop {
            batch.clear();
            while batch.len() < BATCH {
                let Some(range) = splitter.next_range() else { break };
                let key = if range.len() > KEY_BYTES { NO_KEY } else { key_of(bytes, range.start, range.len()) };
                let place = slot_of(key, WORDS);
                prefetch(&scratch.words[place]);
                batch.push((range, key, place));
            }
            if batch.is_empty() {
                return;
            }
            for (range, key, place) in batch.drain(..) {
                let pair = &mut scratch.words[place].0;
                if pair[0].key != key {
                    pair.swap(0, 1);
                }
                let word = &pair[0];
                let before = out.len();
                if word.key == key {
                    // a copy of fixed length is a few instructions, one of unknown length a function call
                    out.extend_from_slice(&word.ids);
                    out.truncate(before + word.number as usize);
                    continue;
                }
                self.encode_piece(&bytes[range], scratch, out);
                let number = out.len() - before;
                if number <= WORD_IDS && key != NO_KEY {
                    let mut ids = [T::default(); WORD_IDS];
                    ids[..number].copy_from_slice(&out[before..]);
                    scratch.words[place].0[0] = Word { key, number: number as u32, ids };
                }
            }
        }
    }

    fn encode_piece(&self, piece: &[u8], scratch: &mut Scratch<T>, out: &mut Vec<T>) {
        let first = self.trie.longest(piece);
        if first.1 == piece.len() {
            return out.push(self.ids[first.0 as usize]);
        }
        match self.regular {
            true => self.walk(piece, first, scratch),
            false => self.join(piece, &mut scratch.parts),
        }
        out.extend(scratch.parts.iter().map(|&rank| self.ids[rank as usize]));
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
    fn walk(&self, piece: &[u8], first: (u32, usize), scratch: &mut Scratch<T>) {
        let Scratch { parts, dead, .. } = scratch;
        parts.clear();
        dead.clear();
        dead.resize(piece.len() / 64 + 1, 0);
        let mut at = 0;
        let (mut token, mut length) = first; // the token to try at `at`
        loop {
            let end = at + length;
            let open = dead[end / 64] >> (end % 64) & 1 == 0;
            if open && parts.last().is_none_or(|&left| self.stay_apart(left, token)) {
                parts.push(token);
                if end == piece.len() {
                    return;
                }
                at = end;
                (token, length) = self.trie.longest(&piece[at..]);
                continue;
            }
            token = self.shorter[token as usize];
            while token == NONE {
                dead[at / 64] |= 1 << (at % 64);
                let last = parts.pop().expect("every text has an encoding");
                at -= self.lengths[last as usize] as usize;
                token = self.shorter[last as usize];
            }
            length = self.lengths[token as usize] as usize;
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
                let mut scratch = Scratch::new();
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
    fn threads_do_not_matter() {
        let encoder = encoder::<u32>(&vocabulary(&TEXTS, 60));
        let texts: Vec<String> = (0..3000).map(|n| format!("{} {n} {}", TEXTS[n % 4], TEXTS[n / 7 % 4])).collect();
        let long = texts.concat().repeat(9);
        let texts: Vec<&str> = texts.iter().map(String::as_str).chain([long.as_str(), ""]).collect();
        assert_eq!(encode(&encoder, &texts, 1), encode(&encoder, &texts, 3));
        assert_eq!(encoder.encode_batch(&texts, 2, || true), Err(Interrupted));
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
