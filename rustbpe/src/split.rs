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
}

impl<'a> Splitter<'a> {
    /// Pieces of one document.
    pub fn new(text: &'a str) -> Self {
        Splitter { text, bytes: text.as_bytes(), position: 0, classes: classes() }
    }

    /// Where the next piece lies in the text, for callers that also look at the bytes around it.
    #[inline]
    pub fn next_range(&mut self) -> Option<std::ops::Range<usize>> {
        if self.position == self.bytes.len() {
            return None;
        }
        let start = self.position;
        self.position = self.piece_end(start);
        Some(start..self.position)
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
            Class::Letter => self.run(next, Class::Letter, usize::MAX),
            Class::Number => self.run(next, Class::Number, 2),
            Class::Newline => self.white_space(start),
            Class::Space => match self.at(next) {
                (Class::Letter, size) => self.run(next + size, Class::Letter, usize::MAX),
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
                    (Class::Letter, size) => self.run(next + size, Class::Letter, usize::MAX),
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

impl<'a> Iterator for Splitter<'a> {
    type Item = &'a str;

    #[inline]
    fn next(&mut self) -> Option<&'a str> {
        self.next_range().map(|range| &self.text[range])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Vec<&str> {
        Splitter::new(text).collect()
    }

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
