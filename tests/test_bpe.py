"""Proves byte-pair encoding: the Python twin follows the rule in its shortest form, and so does Rust, which cuts text
and classes characters as the regular expression does. Whole texts, and tokenizer.json: test_tokenizer.py.

    python -m pytest tests/test_bpe.py

Without Rust the tests that need it skip by name.
"""
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import TEXTS, any_text, needs_rust, random_text, rust

from bpe import PATTERN, _merge, class_fixes, count_words, learn_merges


@pytest.fixture(scope="module")
def fixes():
    return class_fixes()


def naive_merges(words, num_merges):
    """The rule in its shortest form: count all pairs anew for every merge."""
    words = {tuple(word): count for word, count in words.items()}
    merges = []
    while len(merges) < num_merges:
        counts = {}
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = {tuple(_merge(word, best, 255 + len(merges))): n for word, n in words.items()}
    return merges


def test_twin_follows_the_rule_of_largest_count_then_smallest_pair():
    words = count_words(TEXTS)
    assert learn_merges(words, 150) == naive_merges(words, 150)
    # aaabdaaabac by hand: (a,a) counts 4 with overlaps; then (a,b) = (97,98) and (aa,a) tie at 2: smallest pair first
    assert learn_merges({b"aaabdaaabac": 1}, 3) == [(97, 97), (97, 98), (256, 257)]


def test_a_document_is_a_boundary():
    joined = count_words(["ab", "cd"])
    assert joined == {b"ab": 1, b"cd": 1}


@needs_rust
@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab字 \n", max_size=60), max_size=6))
def test_rust_and_naive_rule_agree_on_random_texts(texts):
    trainer = rust.Trainer()
    trainer.feed(texts)
    words = {}
    for text in texts:
        for piece in rust.split(text):
            words[piece.encode()] = words.get(piece.encode(), 0) + 1
    assert trainer.train(60) == naive_merges(words, 60)


@needs_rust
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(random_text, any_text))
def test_rust_splitter_equals_the_regular_expression(fixes, text):
    masked = text.translate(fixes)
    spans = [match.span() for match in regex.finditer(PATTERN, masked)]
    assert rust.split(text) == [text[start:end] for start, end in spans]


@needs_rust
def test_rust_and_tiktoken_class_every_character_alike():
    # planes 4 to 16 hold no letters to this day: a sample of them does
    codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 61)]
    characters = [chr(code) for code in codes]
    every = "".join(characters)
    single_bytes = {bytes([byte]): byte for byte in range(256)}

    def tiktoken_matches(pattern):
        probe = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        return set(bytes(probe.encode_ordinary(every)).decode())

    def joins_behind(start):
        # "a" + letter is one piece, "a" + anything else is not
        pieces = rust.split("".join(f"\n{start}{character}" for character in characters))
        return {piece[1] for piece in pieces if piece[0] == start and len(piece.rstrip("\n")) == 2}

    letters, numbers, spaces = (tiktoken_matches(pattern) for pattern in (r"\p{L}+", r"\p{N}+", r"\s+"))
    assert not joins_behind("a") ^ letters
    assert not joins_behind("1") ^ numbers
    # behind "!" letters and all that has no class join, so the rest must be numbers and white space
    rest = set(characters) - joins_behind("!")
    assert not (rest ^ (numbers | spaces)) - set("\r\n")
