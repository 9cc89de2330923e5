//! The splitter: GPT-4's pattern as plain code.
//!
//! ```text
//! (?i:'s|'t|'re|'ve|'m|'ll|'d)            1 contraction
//! [^\r\n\p{L}\p{N}]?\p{L}+                2 letters, with one character before them that is no number or newline
//! \p{N}{1,3}                              3 up to three digits
//!  ?[^\s\p{L}\p{N}]+[\r\n]*               4 punctuation, with one blank before and newlines behind
//! \s*[\r\n]+                              5 white space up to its last newline
//! \s+(?!\S)                               6 white space but for the last character, or all of it at the end
//! \s+                                     7 a single white space character before something else
//! ```
//! Alternatives are tried in this order at each position. Together they match every character, so the pieces joined
//! are the text.
//!
//! Plain ASCII goes 64 bytes at a time, with the rules above as operations on bits (`Splitter::look_ahead`); all else
//! character by character (`Splitter::piece_end`). Going character by character everywhere has the same result at three
//! quarters of the speed, most of it lost to branches that no processor foresees.

use std::sync::OnceLock;

/// What a character is to the pattern.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Class {
    /// None of the others: punctuation, symbols, marks, controls, unassigned
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s` but for the two newlines
    Space,
    /// CR or LF
    Newline,
}

/// So far behind every text that no position is in it.
const NO_WINDOW: usize = usize::MAX / 2;

/// Character classes in two steps: block of 256 code points, then place in the block. Equal blocks are stored once, so
/// that all of Chinese reads the same 256 bytes.
struct Classes {
    block_of: Vec<u8>, // [0x1100]
    blocks: Vec<[Class; 256]>,
    /// Class of each ASCII byte; for the bytes above, `Other` as a placeholder
    ascii: [Class; 256],
}

impl Classes {
    fn build() -> Classes {
        let mut flat = vec![Class::Other; 0x110000];
        for (pattern, class) in
            [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\p{White_Space}", Class::Space)]
        {
            let hir = regex_syntax::parse(pattern).expect("a constant pattern");
            let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(set)) = hir.kind() else {
                unreachable!("a class of characters parses to a class")
            };
            for range in set.ranges() {
                flat[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        flat['\r' as usize] = Class::Newline;
        flat['\n' as usize] = Class::Newline;

        let mut ascii = [Class::Other; 256];
        ascii[..128].copy_from_slice(&flat[..128]);
        let mut blocks: Vec<[Class; 256]> = Vec::new();
        let mut block_of = Vec::with_capacity(0x1100);
        for chunk in flat.chunks_exact(256) {
            let found = blocks.iter().position(|block| block == chunk);
            let index = found.unwrap_or_else(|| {
                blocks.push(chunk.try_into().expect("chunks of 256"));
                blocks.len() - 1
            });
            block_of.push(u8::try_from(index).expect("Unicode has fewer than 256 distinct blocks"));
        }
        Classes { block_of, blocks, ascii }
    }

    #[inline]
    fn get(&self, code: u32) -> Class {
        self.blocks[self.block_of[(code >> 8) as usize] as usize][(code & 0xFF) as usize]
    }
}

fn classes() -> &'static Classes {
    static CLASSES: OnceLock<Classes> = OnceLock::new();
    CLASSES.get_or_init(Classes::build)
}

/// The class of a character, as the pattern sees it.
pub fn class_of(character: char) -> Class {
    classes().get(character as u32)
}

/// Iterator over the pieces of a text, left to right. Linear in the length of the text: no white space run is scanned
/// more than three times.
pub struct Splitter<'a> {
    text: &'a str,
    bytes: &'a [u8],
    position: usize,
    classes: &'static Classes,
    /// Where the 64 bytes begin that `kinds` describes
    window: usize,
    /// Which bytes of the window are of which kind, see `kinds_of`
    kinds: [u64; 5],
    /// Ends of the pieces that `look_ahead` found, as bits
    ends: u64,
    /// What the bits in `ends` are counted from
    base: usize,
}

impl<'a> Splitter<'a> {
    /// Pieces of one document.
    pub fn new(text: &'a str) -> Self {
        Splitter {
            text,
            bytes: text.as_bytes(),
            position: 0,
            classes: classes(),
            window: NO_WINDOW,
            kinds: [0; 5],
            ends: 0,
            base: 0,
        }
    }

    /// Fill `ends` with where the next pieces end; each begins where the last one ended. Returns how many there are:
    /// fewer than asked for only at the end of the text.
    pub fn next_ends(&mut self, ends: &mut [usize]) -> usize {
        let mut count = 0;
        while count < ends.len() {
            if self.ends == 0 {
                match self.bytes.get(self.position) {
                    None => break,
                    Some(0..0x80) => self.look_ahead(),
                    Some(_) => {}
                }
            }
            if self.ends == 0 {
                ends[count] = self.piece_end(self.position);
                count += 1;
            }
            while self.ends != 0 && count < ends.len() {
                ends[count] = self.base + self.ends.trailing_zeros() as usize;
                self.ends &= self.ends - 1;
                count += 1;
            }
            self.position = ends[count - 1];
        }
        count
    }

    /// Find the pieces among the next bytes, all at once: bit `n` of a number says something about byte `n`, and
    /// `x << 1` about the byte before. Pieces that are certain go to `ends`; a piece with a character that is not plain
    /// ASCII text, or that may reach beyond the window, is left to `piece_end`.
    #[inline(never)]
    fn look_ahead(&mut self) {
        if self.position.wrapping_sub(self.window) > 48 {
            self.move_window();
        }
        let passed = self.position - self.window;
        let [letter, digit, blank, newline, hard] = self.kinds.map(|bits| bits >> passed);
        let space = blank | newline;
        let first_digit = digit & !(digit << 1);
        let three_digits = digit & digit << 1 & digit << 2;
        let fourth_digit = digit & (first_digit & three_digits >> 2) << 3;
        let seventh_digit = fourth_digit << 3 & digit & three_digits << 1;
        let end = !(u64::MAX >> (passed + 1)); // behind the window, and its last byte, whose next is not known
        let mut hard = hard | seventh_digit | end;
        let mark = !(letter | digit | space | hard);
        // Of white space the end decides: is there another newline (5), or what follows the last blank (6)?
        let unclear = newline & blank << 1 | hard & space << 1 & space << 2;
        if unclear != 0 {
            let before = (unclear & unclear.wrapping_neg()) - 1; // the bits below the lowest
            let first = u64::BITS - (before & !space).leading_zeros(); // of that white space
            hard |= 2 << first;
        }
        // a mark begins a piece unless another or a blank goes before; alone, it goes with the letters that follow
        let first_mark = mark & !(mark << 1 | blank << 1);
        let first_letter = letter & !(letter << 1 | blank << 1 | first_mark << 1);
        // the newlines behind marks are theirs: adding to the lowest bit of a run of ones clears the run
        let own = space & !(newline & !newline.wrapping_add(newline & mark << 1));
        let after_newline = blank & newline << 1;
        let last_blank = blank & blank << 1 & !(space >> 1);
        let first_space = own & !(own << 1) | after_newline | last_blank;
        let starts = first_letter | first_digit | fourth_digit | first_mark | first_space;
        // a piece ends where the next one starts; one that starts at the first byte is the one to be ended
        let certain = hard.wrapping_sub(1) & !hard; // the bits below the lowest hard one
        self.ends = starts & certain & !1;
        self.base = self.position;
    }

    /// Describe the 64 bytes from the present position on; what lies behind the text is hard.
    fn move_window(&mut self) {
        let rest = &self.bytes[self.position..];
        self.window = self.position;
        self.kinds = match rest.first_chunk() {
            Some(window) => kinds_of(window),
            None => {
                let mut window = [0xFF; 64];
                window[..rest.len()].copy_from_slice(rest);
                kinds_of(&window)
            }
        };
    }

    /// Class and length in bytes of the character at `at`; (Other, 0) at the end of the text.
    #[inline]
    fn at(&self, at: usize) -> (Class, usize) {
        let b = self.bytes;
        match b.get(at) {
            None => (Class::Other, 0),
            Some(&first) if first < 0x80 => (self.classes.ascii[first as usize], 1),
            // The text is valid UTF-8 and `at` a character's start, so the bytes that follow exist
            Some(&first) if first < 0xE0 => (self.classes.get((first as u32 & 0x1F) << 6 | b[at + 1] as u32 & 0x3F), 2),
            Some(&first) if first < 0xF0 => {
                let code = (first as u32 & 0x0F) << 12 | (b[at + 1] as u32 & 0x3F) << 6 | b[at + 2] as u32 & 0x3F;
                (self.classes.get(code), 3)
            }
            Some(&first) => {
                let high = (first as u32 & 0x07) << 18 | (b[at + 1] as u32 & 0x3F) << 12;
                (self.classes.get(high | (b[at + 2] as u32 & 0x3F) << 6 | b[at + 3] as u32 & 0x3F), 4)
            }
        }
    }

    /// End of the run of `class` that starts at `at`, at most `limit` characters long.
    #[inline]
    fn run(&self, mut at: usize, class: Class, limit: usize) -> usize {
        for _ in 0..limit {
            let (found, length) = self.at(at);
            if found != class || length == 0 {
                break;
            }
            at += length;
        }
        at
    }

    /// End of the run of letters that starts at `at`: eight bytes at a time where they are ASCII.
    #[inline]
    fn letters(&self, mut at: usize) -> usize {
        let b = self.bytes;
        while let Some(eight) = b[at..].first_chunk() {
            let letters = (non_letters(u64::from_le_bytes(*eight)).trailing_zeros() / 8) as usize;
            at += letters;
            if letters == 8 {
                continue;
            }
            let others = at;
            while let Some(&first @ 0x80..) = b.get(at) {
                at += match first {
                    0xE5..=0xE9 => 3, // U+5000 to U+9FFF: nothing but Chinese characters
                    _ => match self.at(at) {
                        (Class::Letter, length) => length,
                        _ => return at,
                    },
                };
            }
            if at == others {
                return at; // an ASCII character that is no letter
            }
        }
        self.run(at, Class::Letter, usize::MAX)
    }

    /// Length of the contraction behind the apostrophe at `at`, 0 if there is none. Case does not matter, and by
    /// Unicode's case folding the long s (U+017F) is an s.
    fn contraction(&self, at: usize) -> usize {
        let next = |n: usize| self.bytes.get(at + n).map_or(0, u8::to_ascii_lowercase);
        match (next(1), next(2)) {
            (b's' | b't' | b'm' | b'd', _) => 2,
            (b'r' | b'v', b'e') | (b'l', b'l') => 3,
            (0xC5, 0xBF) => 3,
            _ => 0,
        }
    }

    /// End of the piece made of white space that starts at `start` (alternatives 5 to 7).
    fn white_space(&self, start: usize) -> usize {
        let (mut end, mut last, mut newline) = (start, start, 0);
        loop {
            let (class, length) = self.at(end);
            match class {
                Class::Space => last = end,
                Class::Newline => {
                    last = end;
                    newline = end + 1;
                }
                _ => break,
            }
            end += length;
        }
        if newline > 0 {
            newline
        } else if end == self.bytes.len() || last == start {
            end
        } else {
            last
        }
    }

    fn piece_end(&self, start: usize) -> usize {
        let (class, length) = self.at(start);
        let next = start + length;
        match class {
            Class::Letter => self.letters(next),
            Class::Number => self.run(next, Class::Number, 2),
            Class::Newline => self.white_space(start),
            Class::Space => match self.at(next) {
                (Class::Letter, size) => self.letters(next + size),
                (Class::Other, 1..) if self.bytes[start] == b' ' => self.punctuation(next),
                _ => self.white_space(start),
            },
            Class::Other => {
                if self.bytes[start] == b'\'' {
                    let length = self.contraction(start);
                    if length > 0 {
                        return start + length;
                    }
                }
                match self.at(next) {
                    (Class::Letter, size) => self.letters(next + size),
                    _ => self.punctuation(start),
                }
            }
        }
    }

    #[inline]
    fn punctuation(&self, start: usize) -> usize {
        let end = self.run(start, Class::Other, usize::MAX);
        self.run(end, Class::Newline, usize::MAX)
    }
}

/// Which of 64 bytes are letters, digits, blanks, newlines, and which are hard: not ASCII, an apostrophe (it may begin
/// a contraction) or rare white space. Bit `n` of a number is byte `n`. What is none of these is a mark.
///
/// Sixteen bytes are compared at once, and their sign bits gathered into one number (SSE2, which every x86-64 has).
/// Comparisons are of signed bytes, so a range is moved to begin at the smallest of them, -128.
#[cfg(target_arch = "x86_64")]
#[inline]
#[allow(unsafe_code)]
fn kinds_of(window: &[u8; 64]) -> [u64; 5] {
    use std::arch::x86_64::*;
    let mut kinds = [0u64; 5];
    for (index, sixteen) in window.chunks_exact(16).enumerate() {
        // Safety: the 16 bytes read are those of the chunk, and the other instructions only need SSE2
        let masks = unsafe {
            let bytes = _mm_loadu_si128(sixteen.as_ptr().cast());
            let is = |byte: u8| _mm_cmpeq_epi8(bytes, _mm_set1_epi8(byte as i8));
            let within = |bytes, first: u8, count: u8| {
                let moved = _mm_add_epi8(bytes, _mm_set1_epi8(0x80_u8.wrapping_sub(first) as i8));
                _mm_cmplt_epi8(moved, _mm_set1_epi8(0x80_u8.wrapping_add(count) as i8))
            };
            let newline = is(b'\n');
            let rare_space = _mm_andnot_si128(newline, within(bytes, b'\t', 5));
            [
                within(_mm_or_si128(bytes, _mm_set1_epi8(0x20)), b'a', 26),
                within(bytes, b'0', 10),
                is(b' '),
                newline,
                _mm_or_si128(bytes, _mm_or_si128(is(b'\''), rare_space)), // above ASCII the sign bit is set already
            ]
            .map(|mask| _mm_movemask_epi8(mask) as u16 as u64)
        };
        for (kind, mask) in kinds.iter_mut().zip(masks) {
            *kind |= mask << (16 * index);
        }
    }
    kinds
}

/// The same on other processors: byte by byte into a byte of flags, by a loop that compilers turn into vector
/// instructions; then squares of eight bytes of eight flags, turned over their diagonal.
#[cfg(any(test, not(target_arch = "x86_64")))]
fn kinds_by_flags(window: &[u8; 64]) -> [u64; 5] {
    let mut kinds = [0u8; 64];
    for (kind, &byte) in kinds.iter_mut().zip(window) {
        let letter = (byte | 0x20).wrapping_sub(b'a') < 26;
        let digit = byte.wrapping_sub(b'0') < 10;
        let hard = (byte >= 0x80) | (byte == b'\'') | ((byte.wrapping_sub(b'\t') < 5) & (byte != b'\n'));
        let (blank, newline) = (byte == b' ', byte == b'\n');
        *kind = letter as u8 | (digit as u8) << 1 | (blank as u8) << 2 | (newline as u8) << 3 | (hard as u8) << 4;
    }
    let mut masks = [[0u8; 8]; 5];
    for (index, eight) in kinds.chunks_exact(8).enumerate() {
        let mut x = u64::from_le_bytes(eight.try_into().expect("chunks of 8"));
        for (shift, bits) in [(7, 0x00AA_00AA_00AA_00AA), (14, 0x0000_CCCC_0000_CCCC), (28, 0x0000_0000_F0F0_F0F0)] {
            let swapped = (x ^ x >> shift) & bits;
            x ^= swapped ^ swapped << shift;
        }
        for (mask, byte) in masks.iter_mut().zip(x.to_le_bytes()) {
            mask[index] = byte;
        }
    }
    masks.map(u64::from_le_bytes)
}

#[cfg(not(target_arch = "x86_64"))]
use kinds_by_flags as kinds_of;

/// The high bit of each byte that is no ASCII letter, the other bits 0.
#[inline]
fn non_letters(eight: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x80 * ONES;
    // A byte below 128 plus (128 - x) sets its high bit if it is at least x, and never carries into the next byte
    let lower = (eight & !HIGH) | (0x20 * ONES);
    let from_a = lower + (0x80 - b'a' as u64) * ONES;
    let above_z = lower + (0x80 - b'z' as u64 - 1) * ONES;
    (!from_a | above_z | eight) & HIGH
}

/// Cut a long text into parts of about `size` bytes, only where a piece ends in any case, so that the pieces of the
/// parts are those of the text: behind a letter that no letter follows, since a piece has letters at its end only. A
/// text without such a place stays whole.
pub fn cut(text: &str, size: usize) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let mut after_letter = false;
        let mut from = size.min(text.len());
        while !text.is_char_boundary(from) {
            from += 1;
        }
        let place = text[from..].char_indices().find(|&(_, character)| {
            let before = std::mem::replace(&mut after_letter, class_of(character) == Class::Letter);
            before && !after_letter
        });
        let (part, others) = text.split_at(place.map_or(text.len(), |(at, _)| from + at));
        rest = Some(others).filter(|others| !others.is_empty());
        Some(part)
    })
}

impl<'a> Iterator for Splitter<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let start = self.position;
        let mut end = [0];
        (self.next_ends(&mut end) == 1).then(|| &self.text[start..end[0]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Vec<&str> {
        Splitter::new(text).collect()
    }

    fn step_by_step(text: &str) -> Vec<&str> {
        let splitter = Splitter::new(text);
        let mut steps = vec![0];
        while steps[steps.len() - 1] < text.len() {
            steps.push(splitter.piece_end(steps[steps.len() - 1]));
        }
        steps.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect()
    }

    const TRAPS: [&str; 3] =
        ["It's a 'test' of\r\n it\u{17f}  \u{a0}x ", "你好，世界。 2024年！\u{3000}字 ", "a1 b!!\n\n c's 'll\tx"];

    #[test]
    fn words_numbers_and_punctuation() {
        assert_eq!(pieces("Hello, world!! 12345"), ["Hello", ",", " world", "!!", " ", "123", "45"]);
        assert_eq!(pieces("你好，世界。"), ["你好", "，世界", "。"]);
        assert_eq!(pieces("\u{a0}word \u{a0}x"), ["\u{a0}word", " ", "\u{a0}x"]);
        assert_eq!(pieces("a --\r\n\nb"), ["a", " --\r\n\n", "b"]);
        assert_eq!(pieces(""), Vec::<&str>::new());
    }

    #[test]
    fn contractions_fold_case_as_unicode_does() {
        assert_eq!(pieces("I'm we'RE it'\u{17f} 'tis"), ["I", "'m", " we", "'RE", " it", "'\u{17f}", " '", "tis"]);
        assert_eq!(pieces("'x 'l 'll"), ["'x", " '", "l", " '", "ll"]);
    }

    #[test]
    fn white_space_keeps_its_last_character_for_the_next_word() {
        assert_eq!(pieces("a   b"), ["a", "  ", " b"]);
        assert_eq!(pieces("a   1"), ["a", "  ", " ", "1"]);
        assert_eq!(pieces("a \n \n  b"), ["a", " \n \n", " ", " b"]);
        assert_eq!(pieces("a   "), ["a", "   "]);
        assert_eq!(pieces("\u{3000}\u{3000}字"), ["\u{3000}", "\u{3000}字"]);
        assert_eq!(pieces("\t!"), ["\t", "!"]);
    }

    #[test]
    fn tables_are_those_of_unicode_16() {
        let all = || (0..0x110000).filter_map(char::from_u32);
        let count = |class| all().filter(|&c| class_of(c) == class).count();
        assert_eq!(count(Class::Letter), 141_028);
        assert_eq!(count(Class::Number), 1_911);
        assert_eq!(count(Class::Space) + count(Class::Newline), 25);
    }

    #[test]
    fn letters_are_found_in_eight_bytes_as_one_by_one() {
        for byte in 0..=255u8 {
            for at in 0..8 {
                let mut eight = *b"azAZmMqQ";
                eight[at] = byte;
                let expected = eight.map(|byte| if byte.is_ascii_alphabetic() { 0 } else { 0x80 });
                assert_eq!(non_letters(u64::from_le_bytes(eight)).to_le_bytes(), expected, "{eight:?}");
            }
        }
    }

    #[test]
    fn looking_ahead_finds_the_pieces_of_going_step_by_step() {
        let mut seed = 9u64;
        let alphabet = [
            "a",
            "Zq",
            "the",
            "'",
            "s",
            " ",
            " ",
            "\n",
            "\r",
            "\t",
            "7",
            "12",
            "!",
            "(",
            "字",
            "\u{a0}",
            "wordwordword",
        ];
        for length in 0..2000 {
            let mut text = String::new();
            for _ in 0..length % 200 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                // few kinds make long runs without anything hard, many make all transitions
                text.push_str(alphabet[(seed >> 33) as usize % (3 + length % (alphabet.len() - 2))]);
            }
            assert_eq!(pieces(&text), step_by_step(&text));
        }
    }

    #[test]
    fn runs_of_white_space_and_marks_are_found_at_every_place_of_a_window() {
        let kinds = [" ", "\n", "!", "a", "7", "\t", "'"];
        let all = (0..kinds.len().pow(5))
            .map(|code| (0..5).map(|place| kinds[code / kinds.len().pow(place) % kinds.len()]).collect());
        for run in all.chain((6..15).map(|digits| "7".repeat(digits))) {
            // at 62, 63 and so on the run lies across the end of the window
            for before in [0, 1, 17, 47, 48, 49, 58, 59, 60, 61, 62, 63, 64] {
                let text = "b".repeat(before) + &run + &"c ".repeat(before % 3 * 20);
                assert_eq!(pieces(&text), step_by_step(&text), "{before}");
            }
        }
    }

    #[test]
    fn bytes_are_of_the_same_kinds_with_and_without_vector_instructions() {
        for shift in 0..=255u8 {
            let window = std::array::from_fn(|index| shift.wrapping_add(index as u8 * 3));
            assert_eq!(kinds_of(&window), kinds_by_flags(&window));
        }
    }

    #[test]
    fn parts_have_the_pieces_of_the_whole() {
        for text in TRAPS {
            let text = text.repeat(50);
            for size in [0, 1, 7, 100, 10_000] {
                let parts: Vec<&str> = cut(&text, size).collect();
                let cut_first: Vec<&str> = parts.iter().flat_map(|part| Splitter::new(part)).collect();
                assert_eq!(cut_first, pieces(&text));
                assert!(parts.len() > 1 || size > 100);
            }
        }
        assert_eq!(cut("", 10).collect::<Vec<_>>(), [""], "an empty document is a document");
        assert_eq!(cut(&"字".repeat(99), 10).count(), 1, "no place to cut");
    }

    #[test]
    fn pieces_joined_are_the_text() {
        let mut seed = 1u64;
        let alphabet =
            ["a", "Z", "'", "s", "\u{17f}", " ", "\n", "\r", "\u{a0}", "7", "，", "字", "😀", "\u{301}", "!"];
        for _ in 0..2000 {
            let mut text = String::new();
            for _ in 0..20 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                text.push_str(alphabet[(seed >> 33) as usize % alphabet.len()]);
            }
            assert_eq!(pieces(&text).concat(), text);
        }
    }
}
