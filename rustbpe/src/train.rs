//! Learning merges.
//!
//! The rule: make the most frequent pair of neighbouring tokens a new token, again and again; ties go to the smallest
//! (left id, right id); pairs are counted within words, overlapping ones too ("aaa" holds (a, a) twice), and replaced
//! from left to right. The result depends on nothing else, so any number of threads gives the same merges.
//!
//! What makes it fast is doing work only where something changes:
//! * Words are counted first, so each distinct word is merged once, with a weight.
//! * All words lie in one flat array. A token writes its id at its first and at its last byte, so both neighbours of
//!   any token are found without links: one cell to the left, one cell behind the end.
//! * Each pair knows the places where it occurs. A place may be out of date; two comparisons tell (see `Trainer`).
//! * The pairs that a merge destroys and creates are first tallied by neighbour in dense arrays; the hash table of
//!   pairs is then touched once for each distinct neighbour, not four times for each occurrence.
//! * The cells of these places lie all over memory, so many are asked for before the first is used.
//! * The queue is lazy: counts only sink, so an entry is checked when it comes up and queued again if it is too high.
//!
//! What was tried and lost, on 38 MB of English and 20 of Chinese: a list of words for each pair, as usual (13 times as
//! many cells are looked at); a hash map from pairs to entries elsewhere (5% slower than entries in the table); asking
//! ahead for the entries of pairs as for cells (no gain). Nearly all the time goes to Chinese, whose clauses are long
//! and mostly occur once.

use crate::parallel::{parallel, Clock, Interrupted};
use crate::split::Splitter;
use crate::{hash_bytes, hash_pair, key_of, prefetch, slot_of, KEY_BYTES};
use std::collections::{BinaryHeap, HashMap};
use std::sync::Mutex;

/// A pair of token ids, and in a list of merges the recipe of token 256 + index.
pub type Pair = (u32, u32);

/// Why a training came to no result.
#[derive(Debug, PartialEq, Eq)]
pub enum TrainError {
    /// The caller's check asked to stop.
    Interrupted,
    /// The distinct words are longer than 4 GiB altogether, or have had more pairs than that; both are counted in 32
    /// bits.
    TooManyWords,
}

impl From<Interrupted> for TrainError {
    fn from(_: Interrupted) -> Self {
        TrainError::Interrupted
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Counting words

struct Word {
    start: usize,
    length: u32,
    hash: u32,
    count: u64,
}

/// Distinct words with their counts. The bytes lie in one arena: no allocation for each word.
#[derive(Default)]
struct WordTable {
    arena: Vec<u8>,
    words: Vec<Word>,
    /// Open addressing: index into `words` plus one, 0 = free; the length is a power of two.
    slots: Vec<u32>,
    /// Short words met lately: their key and their index in `words`. Nine of ten words are found here, with one look
    /// instead of three (slot, word, bytes).
    recent: Vec<(u128, u32)>,
}

/// Places in `WordTable::recent`: 256 KiB.
const RECENT: usize = 1 << 13;

impl WordTable {
    fn bytes(&self, word: &Word) -> &[u8] {
        &self.arena[word.start..word.start + word.length as usize]
    }

    /// Count the pieces of a text.
    fn count(&mut self, text: &str) {
        self.recent.resize(RECENT, (0, 0));
        let bytes = text.as_bytes();
        let mut splitter = Splitter::new(text);
        let (mut start, mut ends) = (0, [0; 32]);
        loop {
            let count = splitter.next_ends(&mut ends);
            if count == 0 {
                return;
            }
            for &end in &ends[..count] {
                let piece = std::mem::replace(&mut start, end)..end;
                if piece.len() > KEY_BYTES {
                    self.add(&bytes[piece], 1);
                    continue;
                }
                let key = key_of(bytes, piece.start, piece.len());
                let slot = slot_of(key, RECENT);
                let (known, index) = self.recent[slot];
                if known == key {
                    self.words[index as usize].count += 1;
                } else {
                    self.recent[slot] = (key, self.add(&bytes[piece], 1));
                }
            }
        }
    }

    /// Add to the count of a word. Returns its index.
    fn add(&mut self, bytes: &[u8], count: u64) -> u32 {
        if self.words.len() * 2 >= self.slots.len() {
            self.grow();
        }
        let hash = hash_bytes(bytes) as u32;
        let mask = self.slots.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            let index = self.slots[slot];
            if index == 0 {
                break;
            }
            let word = &self.words[index as usize - 1];
            if word.hash == hash && self.bytes(word) == bytes {
                self.words[index as usize - 1].count += count;
                return index - 1;
            }
            slot = (slot + 1) & mask;
        }
        let start = self.arena.len();
        self.arena.extend_from_slice(bytes);
        self.words.push(Word { start, length: bytes.len() as u32, hash, count });
        self.slots[slot] = self.words.len() as u32;
        self.words.len() as u32 - 1
    }

    /// Make the slots anew, four for each word. Also repairs a table whose slots were taken away.
    #[cold]
    fn grow(&mut self) {
        let size = (self.words.len() * 4).next_power_of_two().max(1 << 12);
        self.slots.clear();
        self.slots.resize(size, 0);
        for (index, word) in self.words.iter().enumerate() {
            let mut slot = word.hash as usize & (size - 1);
            while self.slots[slot] != 0 {
                slot = (slot + 1) & (size - 1);
            }
            self.slots[slot] = index as u32 + 1;
        }
    }
}

/// Counts the words of documents, as many batches as there are. Memory: about 40 bytes for each distinct word and
/// thread, plus its text; nothing is kept of the documents.
pub struct Counter {
    tables: Mutex<Vec<WordTable>>, // one for each thread so far, merged when asked for
    num_threads: usize,
}

impl Counter {
    /// `num_threads`: 0 = one per core.
    pub fn new(num_threads: usize) -> Self {
        Counter { tables: Mutex::default(), num_threads }
    }

    /// Count the words of some documents. Each is split by itself: no word spans two. Time: linear in the text.
    ///
    /// `interrupted` is asked about every 20 ms. Error: it said yes; the documents are counted in part.
    pub fn feed(&mut self, texts: &[&str], interrupted: impl FnMut() -> bool) -> Result<(), Interrupted> {
        parallel(texts, self.num_threads, interrupted, |chunk| {
            let table = self.tables.lock().ok().and_then(|mut tables| tables.pop());
            let mut table = table.unwrap_or_default();
            for (_, text) in chunk {
                table.count(text);
            }
            self.tables.lock().expect("no thread panics while it holds the lock").push(table);
        })?;
        Ok(())
    }

    /// Number of distinct words so far. Time: linear in it after new documents, none else.
    ///
    /// `interrupted` is asked about every 20 ms. Error: it said yes; nothing is lost.
    pub fn num_words(&mut self, mut interrupted: impl FnMut() -> bool) -> Result<usize, Interrupted> {
        Ok(self.merged(&mut interrupted)?.words.len())
    }

    /// The tables of all threads as one. Words move one by one, so an interrupt leaves each in one of the tables.
    fn merged(&mut self, interrupted: &mut dyn FnMut() -> bool) -> Result<&WordTable, Interrupted> {
        let tables = self.tables.get_mut().expect("no thread panics while it holds the lock");
        if tables.is_empty() {
            tables.push(WordTable::default());
        }
        tables.sort_by_key(|table| std::cmp::Reverse(table.words.len())); // the smaller ones go into the largest
        let mut clock = Clock::default();
        while tables.len() > 1 {
            let mut other = tables.pop().expect("there are two");
            (other.slots, other.recent) = (Vec::new(), Vec::new()); // they point at words that leave
            while let Some(word) = other.words.pop() {
                tables[0].add(other.bytes(&word), word.count);
                if other.words.len() % 4096 == 0 && clock.due() && interrupted() {
                    tables.push(other);
                    return Err(Interrupted);
                }
            }
        }
        Ok(&tables[0])
    }

    /// Learn at most `num_merges` merges from what was counted; fewer when no pair is left. The counts stay. Time:
    /// proportional to the places that change; memory: about 20 times the text of the distinct words.
    ///
    /// `interrupted` is asked about every 20 ms and told how many merges there are. Errors: it said yes; too many
    /// words.
    pub fn train(
        &mut self,
        num_merges: usize,
        mut interrupted: impl FnMut(usize) -> bool,
    ) -> Result<Vec<Pair>, TrainError> {
        let table = self.merged(&mut || interrupted(0))?;
        Trainer::new(table, &mut || interrupted(0))?.run(num_merges, interrupted)
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Merging

/// Stands between words.
const BORDER: u32 = u32::MAX;
/// Stands in cells inside a token: no pair begins here.
const INSIDE: u32 = u32::MAX - 1;
/// Positions handled together when a pair is merged.
const CHUNK: usize = 128;

/// One byte of a word.
#[derive(Clone, Copy)]
struct Cell {
    /// Id of the token that begins or ends at this byte, or INSIDE, or BORDER
    id: u32,
    /// Index in `Trainer::weights` of the word's count
    weight: u32,
}

/// What is known about a pair: how often it occurs, and where it did when it arose.
#[derive(Clone, Copy)]
struct Entry {
    pair: Pair,
    count: u64,
    start: u32, // first of its positions in Trainer::positions
    length: u32,
}

/// Stands in slots that hold no pair.
const FREE: Pair = (BORDER, BORDER);

/// Neighbours of one side met while a pair is merged.
#[derive(Default)]
struct Tally {
    weight: Vec<u64>,        // [ids] summed counts, by neighbour
    number: Vec<usize>,      // [ids] occurrences, by neighbour; a prefix sum of it later
    seen: Vec<u32>,          // neighbours met; one whose only event was taken back may be listed twice
    events: Vec<(u32, u32)>, // (neighbour, position of the new pair), positions ascending
}

impl Tally {
    fn push(&mut self, neighbour: u32, position: u32, weight: u64) {
        let index = neighbour as usize;
        if self.weight[index] == 0 {
            self.seen.push(neighbour);
        }
        self.weight[index] += weight;
        self.number[index] += 1;
        self.events.push((neighbour, position));
    }

    /// Take the newest event back.
    fn pop(&mut self, weight: u64) {
        let (neighbour, _) = self.events.pop().expect("the event of the merge just before");
        self.weight[neighbour as usize] -= weight;
        self.number[neighbour as usize] -= 1;
    }
}

/// All pairs that ever arose, found by their ids: open addressing, the entry itself in the slot, so that lowering a
/// count is one look at memory.
#[derive(Default)]
struct PairTable {
    slots: Vec<Entry>, // the length is a power of two; at most three quarters are taken
    used: usize,
}

impl PairTable {
    /// Index of the pair's slot, or of a free one, whose count is 0. The table is not empty.
    #[inline]
    fn slot(&self, pair: Pair) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = hash_pair(pair.0, pair.1) & mask;
        while self.slots[slot].pair != pair && self.slots[slot].pair != FREE {
            slot = (slot + 1) & mask;
        }
        slot
    }

    /// Add a pair that is not there yet.
    fn insert(&mut self, entry: Entry) {
        if self.used * 4 >= self.slots.len() * 3 {
            self.make_room();
        }
        let slot = self.slot(entry.pair);
        self.slots[slot] = entry;
        self.used += 1;
    }

    /// Drop the pairs that are gone for good, since a count of 0 never rises again, and double if that is not enough.
    #[cold]
    fn make_room(&mut self) {
        let live = self.slots.iter().filter(|entry| entry.count > 0).count();
        let size = if live * 2 < self.slots.len() { self.slots.len() } else { self.slots.len() * 2 };
        let free = Entry { pair: FREE, count: 0, start: 0, length: 0 };
        let old = std::mem::replace(&mut self.slots, vec![free; size.max(1 << 16)]);
        for entry in old.into_iter().filter(|entry| entry.count > 0) {
            let slot = self.slot(entry.pair);
            self.slots[slot] = entry;
        }
        self.used = live;
    }
}

/// Order of merging: highest count, then smallest pair.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Queued {
    count: u64,
    pair: std::cmp::Reverse<Pair>,
}

/// The state of a training.
///
/// Whether a kept position `p` of pair (a, b) still holds: cell `p` must read a, and the cell behind that token b.
/// This suffices. Cells inside tokens read INSIDE, so `p` is a token's first or last byte. No token a is made after
/// the pair has arisen, so a cell that reads a belongs to a token that was there then, and `p` was its first byte.
/// The cell behind a token is the first byte of the next one.
struct Trainer {
    cells: Vec<Cell>,
    weights: Vec<u64>, // the counts that occur, each once: they are few, so this stays near the core
    lengths: Vec<u32>, // [ids] bytes of each token
    positions: Vec<u32>,
    pairs: PairTable,
    left: Tally,
    right: Tally,
    queue: BinaryHeap<Queued>,
}

impl Trainer {
    fn new(table: &WordTable, interrupted: &mut dyn FnMut() -> bool) -> Result<Self, TrainError> {
        let total = table.arena.len() + table.words.len() + 1;
        if total >= INSIDE as usize {
            return Err(TrainError::TooManyWords);
        }
        let mut cells = Vec::with_capacity(total);
        let mut weights = Vec::new();
        let mut weight_of = HashMap::new();
        let mut clock = Clock::default();
        cells.push(Cell { id: BORDER, weight: 0 });
        for (index, word) in table.words.iter().enumerate() {
            if index % 4096 == 0 && clock.due() && interrupted() {
                return Err(TrainError::Interrupted);
            }
            let weight = *weight_of.entry(word.count).or_insert_with(|| {
                weights.push(word.count);
                weights.len() as u32 - 1
            });
            cells.extend(table.bytes(word).iter().map(|&byte| Cell { id: byte as u32, weight }));
            cells.push(Cell { id: BORDER, weight });
        }
        let mut trainer = Trainer {
            cells,
            weights,
            lengths: vec![1; 256],
            positions: Vec::new(),
            pairs: PairTable::default(),
            left: Tally::default(),
            right: Tally::default(),
            queue: BinaryHeap::new(),
        };
        trainer.index_bytes(interrupted)?;
        Ok(trainer)
    }

    /// The pairs of bytes: counts and positions by a counting sort over the 65,536 possible pairs.
    fn index_bytes(&mut self, interrupted: &mut dyn FnMut() -> bool) -> Result<(), Interrupted> {
        let mut clock = Clock::default();
        let mut stop = |position: usize| position % (1 << 20) == 0 && clock.due() && interrupted();
        let mut weight = vec![0u64; 1 << 16];
        let mut number = vec![0usize; 1 << 16];
        let slot = |cells: &[Cell]| match (cells[0].id, cells[1].id) {
            (BORDER, _) | (_, BORDER) => None,
            (a, b) => Some((a << 8 | b) as usize),
        };
        for (position, cells) in self.cells.windows(2).enumerate() {
            if stop(position) {
                return Err(Interrupted);
            }
            if let Some(slot) = slot(cells) {
                weight[slot] += self.weights[cells[0].weight as usize];
                number[slot] += 1;
            }
        }
        let mut start = 0;
        for slot in 0..1 << 16 {
            let length = number[slot];
            number[slot] = start; // from here on: where the next position of this pair goes
            if length > 0 {
                self.add_pair((slot as u32 >> 8, slot as u32 & 0xFF), weight[slot], start, length);
            }
            start += length;
        }
        self.positions.resize(start, 0);
        for (position, cells) in self.cells.windows(2).enumerate() {
            if stop(position) {
                return Err(Interrupted);
            }
            if let Some(slot) = slot(cells) {
                self.positions[number[slot]] = position as u32;
                number[slot] += 1;
            }
        }
        Ok(())
    }

    fn add_pair(&mut self, pair: Pair, count: u64, start: usize, length: usize) {
        self.pairs.insert(Entry { pair, count, start: start as u32, length: length as u32 });
        self.queue.push(Queued { count, pair: std::cmp::Reverse(pair) });
    }

    fn run(mut self, num_merges: usize, mut interrupted: impl FnMut(usize) -> bool) -> Result<Vec<Pair>, TrainError> {
        let mut merges = Vec::new();
        let mut clock = Clock::default();
        while merges.len() < num_merges {
            if clock.due() && interrupted(merges.len()) {
                return Err(TrainError::Interrupted);
            }
            let Some(top) = self.queue.pop() else { break };
            let count = self.pairs.slots[self.pairs.slot(top.pair.0)].count;
            if count == top.count {
                merges.push(top.pair.0);
                self.merge(top.pair.0);
                if self.positions.len() > u32::MAX as usize {
                    return Err(TrainError::TooManyWords);
                }
            } else if count > 0 {
                self.queue.push(Queued { count, ..top });
            }
        }
        Ok(merges)
    }

    /// Replace a pair by a new token everywhere and bring all counts up to date. Time: proportional to the places
    /// where the pair once was, plus the number of distinct neighbours.
    fn merge(&mut self, (a, b): Pair) {
        let new = self.lengths.len() as u32;
        let (a_length, b_length) = (self.lengths[a as usize], self.lengths[b as usize]);
        self.lengths.push(a_length + b_length);
        for tally in [&mut self.left, &mut self.right] {
            tally.weight.resize(new as usize + 1, 0);
            tally.number.resize(new as usize + 1, 0);
        }

        // Pairs (new, new): from "abab". Tallied apart, since they come from two replacements.
        let mut doubled: Vec<u32> = Vec::new();
        let mut doubled_weight = 0;
        let slot = self.pairs.slot((a, b));
        self.pairs.slots[slot].count = 0;
        let Entry { start, length, .. } = self.pairs.slots[slot];
        let range = start as usize..start as usize + length as usize;
        for chunk in self.positions[range].chunks(CHUNK) {
            // The cells lie all over memory. To ask for many before any is used lets them come at the same time
            chunk.iter().for_each(|&position| prefetch(&self.cells[position as usize]));
            for &position in chunk {
                let first = position as usize;
                let second = first + a_length as usize;
                if self.cells[first].id != a || self.cells[second].id != b {
                    continue;
                }
                let behind = second + b_length as usize;
                let weight = self.weights[self.cells[first].weight as usize];
                // the seam first: for tokens of one byte it is also the token's first or last byte
                self.cells[second - 1].id = INSIDE;
                self.cells[second].id = INSIDE;
                self.cells[first].id = new;
                self.cells[behind - 1].id = new;

                let before = self.cells[first - 1].id;
                if before == new {
                    // The left neighbour was replaced a moment ago and saw `a` to its right: that pair is gone
                    self.right.pop(weight);
                    doubled.push(position - (a_length + b_length));
                    doubled_weight += weight;
                } else if before != BORDER {
                    self.left.push(before, position - self.lengths[before as usize], weight);
                }
                let after = self.cells[behind].id;
                if after != BORDER {
                    self.right.push(after, position, weight);
                }
            }
        }

        self.lower((b, a), doubled_weight, (a, b));
        if !doubled.is_empty() {
            let start = self.positions.len();
            self.positions.extend_from_slice(&doubled);
            self.add_pair((new, new), doubled_weight, start, doubled.len());
        }
        let mut left = std::mem::take(&mut self.left);
        self.settle(&mut left, (a, b), |x| (x, a), |x| (x, new));
        self.left = left;
        let mut right = std::mem::take(&mut self.right);
        self.settle(&mut right, (a, b), |y| (b, y), |y| (new, y));
        self.right = right;
    }

    /// Book one side: for each neighbour the old pair loses what the new pair gains, and the new pair gets its
    /// positions, as one run of the arena (a counting sort by neighbour). Leaves the tally empty.
    fn settle(&mut self, tally: &mut Tally, merged: Pair, old: impl Fn(u32) -> Pair, new: impl Fn(u32) -> Pair) {
        let mut start = self.positions.len();
        for &neighbour in &tally.seen {
            let index = neighbour as usize;
            let weight = std::mem::take(&mut tally.weight[index]);
            if weight == 0 {
                continue; // its events were taken back, or this is its second listing
            }
            let length = tally.number[index];
            tally.number[index] = start; // where this neighbour's next position goes
            self.lower(old(neighbour), weight, merged);
            self.add_pair(new(neighbour), weight, start, length);
            start += length;
        }
        self.positions.resize(start, 0);
        for (neighbour, position) in tally.events.drain(..) {
            let next = &mut tally.number[neighbour as usize];
            self.positions[*next] = position;
            *next += 1;
        }
        for neighbour in tally.seen.drain(..) {
            tally.number[neighbour as usize] = 0;
        }
    }

    /// A pair has lost `weight` occurrences. The pair being merged is already at zero.
    fn lower(&mut self, pair: Pair, weight: u64, merged: Pair) {
        if weight > 0 && pair != merged {
            let slot = self.pairs.slot(pair);
            self.pairs.slots[slot].count -= weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learn(texts: &[&str], num_merges: usize) -> Vec<Pair> {
        let mut counter = Counter::new(1);
        counter.feed(texts, || false).expect("not interrupted");
        learn_from(&mut counter, num_merges)
    }

    fn learn_from(counter: &mut Counter, num_merges: usize) -> Vec<Pair> {
        counter.train(num_merges, |_| false).expect("not interrupted")
    }

    /// The rule of the module's first paragraph, word for word, with no thought of speed.
    fn learn_slowly(texts: &[&str], num_merges: usize) -> Vec<Pair> {
        let split = |text| Splitter::new(text).map(|word| word.bytes().map(u32::from).collect::<Vec<_>>());
        let mut words: Vec<Vec<u32>> = texts.iter().flat_map(|text| split(text)).collect();
        let mut merges = Vec::new();
        while merges.len() < num_merges {
            let mut counts: HashMap<Pair, u64> = HashMap::new();
            for pair in words.iter().flat_map(|word| word.windows(2)) {
                *counts.entry((pair[0], pair[1])).or_default() += 1;
            }
            let best = counts.into_iter().max_by_key(|&(pair, count)| (count, std::cmp::Reverse(pair)));
            let Some((pair, _)) = best else { break };
            let new = 256 + merges.len() as u32;
            merges.push(pair);
            for word in &mut words {
                let mut merged = Vec::new();
                for &id in word.iter() {
                    // a token just made never equals pair.0, so "aaa" becomes (aa)(a)
                    if id == pair.1 && merged.last() == Some(&pair.0) {
                        merged.pop();
                        merged.push(new);
                    } else {
                        merged.push(id);
                    }
                }
                *word = merged;
            }
        }
        merges
    }

    #[test]
    fn wikipedia_example() {
        // aaabdaaabac: aa (4 overlapping counts), then ab before (aa)a by the smaller ids, then (aa)(ab)
        assert_eq!(learn(&["aaabdaaabac"], 3), [(97, 97), (97, 98), (256, 257)]);
    }

    #[test]
    fn runs_of_one_letter() {
        for length in 0..40 {
            let text = "a".repeat(length);
            assert_eq!(learn(&[&text], 20), learn_slowly(&[&text], 20), "{length} letters");
        }
    }

    #[test]
    fn random_words_give_the_merges_of_the_slow_rule() {
        let mut seed = 7u64;
        let mut next = |bound: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % bound
        };
        for letters in [2, 3, 5] {
            for _ in 0..60 {
                let texts: Vec<String> = (0..6)
                    .map(|_| (0..next(40)).map(|_| ["a", "b", "字", " ", "c"][next(letters)]).collect())
                    .collect();
                let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                assert_eq!(learn(&texts, 60), learn_slowly(&texts, 60), "{texts:?}");
            }
        }
    }

    #[test]
    fn nothing_to_learn() {
        assert_eq!(learn(&[], 10), []);
        assert_eq!(learn(&["", "a", "b"], 10), []);
        assert_eq!(learn(&["ab"], 10), [(97, 98)]);
        assert_eq!(learn(&["ab"], 0), []);
    }

    #[test]
    fn batches_and_threads_do_not_matter() {
        let texts: Vec<String> =
            (0..4000).map(|n| format!("word{} 数字{} and the rest of it\n", n % 97, n % 31)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let expected = learn(&texts, 300);
        let mut counter = Counter::new(3);
        for batch in texts.chunks(1500) {
            counter.feed(batch, || false).expect("not interrupted");
        }
        assert_eq!(counter.train(300, |_| false), Ok(expected.clone()));
        assert_eq!(counter.train(300, |_| false), Ok(expected), "training leaves the counts alone");
    }

    #[test]
    fn counts_above_32_bits_are_kept() {
        let mut counter = Counter::new(1);
        counter.feed(&["ab cd cd"], || false).expect("not interrupted");
        let tables = counter.tables.get_mut().expect("no thread panicked");
        tables[0].words[0].count = 1 << 40; // "ab"; in 32 bits that is 0, and " cd" would come first
        assert_eq!(learn_from(&mut counter, 1), [(97, 98)]);
    }

    #[test]
    fn no_count_is_lost_when_the_merge_of_tables_is_interrupted() {
        let spell = |n: usize| (0..4).map(|place| (b'a' + (n >> (4 * place) & 15) as u8) as char).collect::<String>();
        let words: Vec<String> = (0..30_000).map(|n| format!(" {}", spell(n))).collect();
        let tables = [&words[..20_000], &words[10_000..]].map(|words| {
            let mut table = WordTable::default();
            words.iter().for_each(|word| table.count(word));
            table
        });
        let mut counter = Counter::new(1);
        counter.tables.get_mut().expect("no thread panicked").extend(tables);
        assert_eq!(counter.num_words(|| true), Err(Interrupted));
        counter.feed(&[" aaaa new"], || false).expect("not interrupted");
        assert_eq!(counter.num_words(|| false), Ok(30_001));
        let counts = counter.tables.get_mut().expect("no thread panicked")[0].words.iter().map(|word| word.count);
        assert_eq!(counts.sum::<u64>(), 40_002);
    }

    #[test]
    fn an_interrupt_ends_training() {
        let mut counter = Counter::new(1);
        counter.feed(&["some words to learn from"], || false).expect("not interrupted");
        assert_eq!(counter.feed(&["more"], || true), Err(Interrupted));
        assert_eq!(counter.train(10, |_| true), Err(TrainError::Interrupted));
        assert_eq!(counter.train(3, |_| false).map(|merges| merges.len()), Ok(3), "and the counts survive it");
    }
}
