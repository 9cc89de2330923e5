//! The hand-written splitter against the regular expression that it stands for, on texts made at random.
//!
//! `fancy-regex` is what tiktoken runs the pattern with. 4,000 texts take about two seconds.

use fancy_regex::Regex;
use minillm_bpe::split::{cut, Splitter};
use proptest::prelude::*;

const PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);

fn by_regex(text: &str) -> Vec<&str> {
    thread_local!(static REGEX: Regex = Regex::new(PATTERN).expect("a valid pattern"));
    REGEX.with(|regex| regex.find_iter(text).map(|found| found.expect("no limit is reached").as_str()).collect())
}

/// Long enough for several windows of 64 bytes; few kinds of characters at a time, so that runs of all lengths occur.
fn trap() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => "[a-zA-Z]{1,12}",
        4 => Just(" ".to_string()),
        1 => "[ \t\n\r\u{b}\u{c}\u{85}\u{a0}\u{2028}\u{3000}]{1,4}",
        1 => "'(s|T|re|VE|m|lL|d|\u{17f}|x)?",
        2 => "[0-9٣七½７]{1,5}",
        2 => "[!-/:-@\\[-`{-~\u{0}\u{301}，。😀\u{fffd}]{1,4}",
        2 => "[一-鿿éßЖʰ\u{345}한あ]{1,20}",
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..80).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn pieces_are_those_of_the_regular_expression(text in trap()) {
        prop_assert_eq!(Splitter::new(&text).collect::<Vec<_>>(), by_regex(&text));
    }

    #[test]
    fn a_text_cut_in_parts_has_the_same_pieces(text in trap(), size in 0..200usize) {
        let parts: Vec<&str> = cut(&text, size).flat_map(Splitter::new).collect();
        prop_assert_eq!(parts, by_regex(&text));
    }
}
