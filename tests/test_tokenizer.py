"""What is proved here: the Rust trainer and its Python twin learn the same merges; encoding equals three independent
encoders (transformers: test_ecosystem.py); text is never parsed for control tokens; only the assistant's words are
trained; nothing a user types or feeds breaks it.

    python -m pytest tests/test_tokenizer.py

Without Rust, tokenizers or shared data the tests that need them skip by name.
"""

import gzip
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer as tokenizer_file
from bpe import GPT2_PATTERN, PATTERN, count_words, learn_merges, repair
from tokenizer import SPECIALS, StreamDecoder, Tokenizer, train

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MINILLM_DATA", ROOT.parent / "shared" / "data"))
QWEN_PATTERN = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

rust = tokenizer_file.rust_module()
needs_rust = pytest.mark.skipif(rust is None, reason="minillm_bpe is not built (pip install ./rustbpe)")

ENGLISH = "The cat sat on the mat; it's 12345 o'clock, and I'LL say: \"Hello, hello!\"  \n\n  Then they'd left.\r\n" * 3
CHINESE = "春天来了，小猫在花园里玩。今天是2024年12月31日，天气很好！她说：“你好，世界。”　　春天来了。" * 3
EMOJI = "😀😀 family 👨‍👩‍👧‍👦 flags 🇨🇳🇬🇧 e\u0301 \u00e9 ’\u017f '\u017f \u00a0x\u2028y\ufeff\x00" * 3
TEXTS = [ENGLISH, CHINESE, EMOJI, "", "a", "\n", "    indented\n\tcode()\n", "<|im_end|> and <think>"]

# pieces that exercise every branch of the pattern, for random texts
PIECES = [*"aZé字，。'’!?_ \t\n\r0７\u00a0\u3000\u0301\u017f\x00"]
PIECES += ["'s", "'LL", "  ", "\r\n", "123", "the", "你好", "😀", "🇨🇳"]
random_text = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
any_text = st.text(max_size=60)  # hypothesis leaves lone surrogates out; they have tests of their own

CHAT = [
    {"role": "system", "content": "你是一个助手。"},
    {"role": "user", "content": "\n 2+2? 😀"},
    {"role": "assistant", "content": "\n 4.\n", "reasoning_content": "\ntwo and two\n"},
    {"role": "tool", "content": ""},
    {"role": "assistant", "content": "不客气！"},
]


@pytest.fixture(scope="module")
def tok():
    """A small vocabulary from the texts above, trained without Rust."""
    return train(TEXTS, vocab_size=400, backend="python", progress=False)


@pytest.fixture(scope="module")
def folder(tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tok.save_pretrained(path)
    return path


def rows_of(batch):
    ids, offsets = batch
    return [ids[start:end].tolist() for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def cli(*arguments, text=None):
    command = [sys.executable, str(ROOT / "tokenizer.py"), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", timeout=300)


def message_of(error):
    """The parts of an error message; the house rule is: what is wrong; the rule; how to fix."""
    parts = str(error.value).split("; ")
    assert len(parts) >= 3, parts
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@needs_rust
@pytest.mark.parametrize(
    "texts",
    [TEXTS, [ENGLISH], [CHINESE], [EMOJI], [], [""], ["a"], ["ab"], ["\n"], ["a" * 999], ["ab\ud800c 你\udfff好"] * 3],
    ids=["all", "english", "chinese", "emoji", "none", "empty", "1 byte", "1 pair", "newline", "aaa", "surrogates"],
)
def test_rust_and_python_learn_the_same_merges(texts):
    fast = train(texts, vocab_size=600, backend="rust", progress=False)
    slow = train(texts, vocab_size=600, backend="python", progress=False)
    assert fast.files == slow.files
    assert fast.fingerprint == slow.fingerprint


@needs_rust
@pytest.mark.parametrize("num_merges", [50, 1000])
def test_merges_are_those_of_rustbpe(num_merges):
    peer = pytest.importorskip("rustbpe", reason="rustbpe is not installed")
    if not hasattr(peer, "Tokenizer"):
        pytest.skip("rustbpe is not installed (the folder of that name is no module)")
    # a long text, so that counts tie less often by far than in the texts above
    texts = [*TEXTS, *(f"{ENGLISH[number % 97 :]}{CHINESE[number % 89 :]}" for number in range(50))]
    theirs = peer.Tokenizer()
    theirs.train_from_iterator(iter(texts), vocab_size=256 + num_merges)
    ranks = sorted(theirs.get_mergeable_ranks(), key=lambda item: item[1])
    merges, _ = tokenizer_file.learn(texts, num_merges, "rust")
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    assert [bytes(token) for token, _ in ranks] == tokens


@needs_rust
def test_threads_and_batches_do_not_change_the_merges():
    texts = [f"{ENGLISH[number % 90 :]} {number} {CHINESE[number % 50 :]}" for number in range(400)]
    reference = rust.Trainer(1)
    reference.feed(texts)
    threaded = rust.Trainer(3)
    for start in range(0, len(texts), 150):
        threaded.feed(texts[start : start + 150])
    assert threaded.num_words == reference.num_words
    assert threaded.train(300) == reference.train(300)


def test_ids_that_no_merge_fills_are_padding_and_the_size_stays_as_asked(tmp_path):
    small = train(["abab"], vocab_size=1000, backend="python", progress=False)
    assert small.vocab_size == 1000
    assert small.max_id == 256 + 2 + len(SPECIALS) - 1
    assert len(small.token_bytes) == 1000
    assert small.decode([999, small.max_id + 1]) == ""
    small.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 1000


@pytest.mark.parametrize("backend", ["python", pytest.param("rust", marks=needs_rust)])
def test_training_shows_how_far_it_is(backend, capsys):
    train([ENGLISH], vocab_size=300, backend=backend)
    bars = capsys.readouterr().err
    assert "count words" in bars and "learn merges: 100%" in bars
    train([ENGLISH], vocab_size=300, backend=backend, progress=False)
    assert capsys.readouterr().err == ""


def test_python_trainer_says_that_it_is_used(monkeypatch, capsys):
    monkeypatch.setattr(tokenizer_file, "rust_module", lambda: None)
    train(["hello"], vocab_size=300, progress=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "slow Python trainer" in lines[0]


# each prepares something and then works for many seconds in one call of the crate
LONG_WORK = {
    "feed": "work = lambda: minillm_bpe.Trainer(1).feed([words] * 300)",
    "train": "trainer = minillm_bpe.Trainer(1); trainer.feed([words]); work = lambda: trainer.train(10**9)",
    "encode": "encoder = minillm_bpe.Encoder([bytes([b]) for b in range(256)], range(256), True); "
    "work = lambda: encoder.encode_batch([words * 300], 1)",
}


@needs_rust
@pytest.mark.parametrize("work", LONG_WORK)
def test_ctrl_c_stops_rust(work):
    program = (
        "import minillm_bpe, random, signal, threading, time\n"
        "random.seed(0)\n"
        "words = ' '.join(''.join(random.choices('abcdefghij', k=12)) for _ in range(300_000))\n"
        f"{LONG_WORK[work]}\n"
        "def strike():\n"
        "    global struck\n"
        "    struck = time.monotonic()\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "threading.Timer(0.3, strike).start()\n"
        "try:\n"
        "    while True: work()\n"
        "except KeyboardInterrupt:\n"
        "    print(time.monotonic() - struck)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    # 0.02 to 0.05 s on a quiet machine; a call runs for many seconds, so that deaf ears would be far above this
    assert float(done.stdout) < 2, done.stderr


def test_training_reads_every_row_format(tmp_path, capsys):
    rows = [
        {"text": "alpha\u2028beta"},
        {"conversations": [{"role": "user", "content": "gamma"}, {"content": "delta", "reasoning_content": "eps"}]},
        {"messages": [{"role": "user", "content": "zeta"}]},
        {"prompt": "eta", "chosen": "theta", "rejected": [{"role": "assistant", "content": "iota"}]},
        {"instruction": "kappa", "output": "lambda"},
        {"conversations": [{"from": "human", "value": "mu"}]},
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.txt").write_text("one\ntwo\n\n\nthree\n", encoding="utf-8-sig")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"one\n<|endoftext|>\ntwo"))
    (tmp_path / "e.csv").write_text('lang,prompt,response\nen,"five, six",seven\n')
    expected = ["alpha\u2028beta", "gamma", "delta", "eps", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
    assert sorted(tokenizer_file.iter_texts([tmp_path / "a.jsonl"])) == sorted(expected)
    assert sorted(tokenizer_file.iter_texts([tmp_path / "b.jsonl.gz"])) == sorted(expected)
    assert list(tokenizer_file.iter_texts([tmp_path / "c.txt", "four"])) == ["one\ntwo", "three", "four"]
    assert list(tokenizer_file.iter_texts([tmp_path / "d.txt.gz"])) == ["one", "two"]
    assert list(tokenizer_file.iter_texts([tmp_path / "e.csv"])) == ["five, six", "seven"]
    train([tmp_path / "a.jsonl", "x\ud800"], vocab_size=280, backend="python")
    assert "1 lone surrogates became U+FFFD" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"body\nx\n", r"a.csv:2: found the keys \[body\] and no text; .*; rename a column: python prepare_data"),
    ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: found the keys \[body\] and no text; .*; rename .*a.text.jsonl"),
    ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, "a.jsonl:2: not valid JSON .*; .*; "),
    ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl:1: not valid JSON .*; .*; "),
    ("a.txt", "two words".encode("utf-16"), "a.txt:1: the file is UTF-16.*; .*; "),
    ("a.txt.gz", gzip.compress(b"x" * 99)[:-9], "a.txt.gz:1: broken gzip data .*; .*; "),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz:1: broken gzip data .*; .*; ")])
def test_training_refuses_files_without_text_with_file_line_and_fix(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(tokenizer_file.iter_texts([tmp_path / name]))


def test_a_sample_takes_equal_shares_of_all_files(tmp_path):
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text((letter * 99 + "\n\n") * 1000, encoding="utf-8")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    sample = "".join(tokenizer_file.sample_texts(paths, 0.05))
    assert abs(sample.count("a") - sample.count("b")) <= 200
    assert 50_000 <= len(sample) <= 50_200
    assert len("".join(tokenizer_file.sample_texts([*paths, *paths], 0))) == 198_000  # each file once


def test_unreadable_lines_are_skipped_and_counted_where_that_is_asked_for(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": \n\xff\n{"body": "x"}\n{"text": "two"}\n')
    argv = ["train", "--data_path", tmp_path / "a.jsonl", "--vocab_size", 270, "--output", tmp_path / "tok"]
    argv = [str(word) for word in [*argv, "--backend", "python"]]
    with pytest.raises(ValueError, match="a.jsonl:2: not valid JSON .*--skip_bad 1"):
        tokenizer_file.main(tokenizer_file.parse_args(argv))
    tokenizer_file.main(tokenizer_file.parse_args([*argv, "--skip_bad"]))
    said = capsys.readouterr().out
    assert "skipped 3 bad lines; the first: " in said and "a.jsonl:2: not valid JSON" in said and "2 documents" in said


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(random_text, any_text))
def test_any_unicode_round_trips(tok, text):
    assert tok.decode(tok.encode(text)) == text


@needs_rust
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.one_of(random_text, any_text), max_size=5))
def test_rust_batches_equal_tiktoken(tok, texts):
    assert tok._rust_encoder() is not None
    assert rows_of(tok.encode_batch(texts)) == [tok.encode(text) for text in texts]


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(random_text, any_text))
def test_encode_equals_hugging_face_tokenizers(folder, tok, text):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert other.encode(text).ids == tok.encode(text)


def test_batches_without_rust_give_the_same_array(tok, monkeypatch):
    expected = tok.encode_batch([*TEXTS, "x\ud800"])
    monkeypatch.setattr(tokenizer_file, "rust_module", lambda: None)
    ids, offsets = tok.encode_batch([*TEXTS, "x\ud800"])
    assert ids.dtype == np.uint16 and offsets.dtype == np.int64
    assert np.array_equal(ids, expected[0]) and np.array_equal(offsets, expected[1])
    assert rows_of(tok.encode_batch([])) == []
    ids[:1] = 0  # writable: torch.from_numpy wants it


def test_large_vocabularies_give_wide_ids():
    wide = train(["abab"], vocab_size=70_000, backend="python", progress=False)
    ids, _ = wide.encode_batch(["abab cd"])
    assert ids.dtype == np.uint32
    assert ids.tolist() == wide.encode("abab cd")


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_000_000,
        " " * 1_000_000 + "x tail",
        "word" + " " * 1_000_000 + "5",
        "\n" * 1_000_000,
        "a\n" + "\n \n" * 300_000 + "  !",
        "a" * 1_000_000,
        "字" * 400_000,
        "!" * 1_000_000,
    ],
    ids=["blanks", "blanks+word", "blanks+digit", "newlines", "mixed", "letters", "chinese", "marks"],
)
def test_a_million_equal_characters_encode_without_loss(tok, text):
    ids = tok._encode_clean(text)  # tiktoken; encode() hands texts of this length to Rust
    assert tok.decode(ids) == text
    assert rows_of(tok.encode_batch([text])) == [ids] == [tok.encode(text)]


@needs_rust
@pytest.mark.parametrize(
    "text",
    [
        " " * 1_000_000,
        "\n" * 1_000_000,
        "a" * 1_000_000,
        "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)),
        "".join(random.Random(1).choices("的一是不了在人有我他这为之大来以个中上们", k=1_000_000)),
        "\x00" * 1_000_000,
        "\ufeff\r\n" * 300_000,
        "\ud83d" * 1_000_000,
        "x" + "\u0301" * 1_000_000,
    ],
    ids=["blanks", "newlines", "one letter", "random letters", "chinese", "nul", "bom+crlf", "surrogates", "marks"],
)
def test_a_million_characters_train_and_encode_without_loss(text):
    learned = train([text], vocab_size=600, backend="rust", progress=False)
    ids, offsets = learned.encode_batch([text, "", text], 2)
    assert offsets[1] == offsets[2] and offsets[3] == 2 * offsets[1]
    assert learned.decode(ids[: offsets[1]].tolist()) == repair(text)[0]


@needs_rust
def test_every_assigned_character_encodes_as_in_tiktoken_in_five_contexts(tok):
    # unassigned, surrogate and private ones apart: the Unicode tables of this Python, 14.0 to 16.0
    every = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    assert len(every) > 140_000
    for context in ("{}\n", "a{}b ", " {}", "'{}s", "1{}2!{}"):
        text = "".join(context.format(character, character) for character in every)
        assert tok.encode_batch([text])[0].tolist() == tok._encoding.encode_ordinary(text), context


@needs_rust
def test_a_token_out_of_reach_of_the_merges_is_taken_whole_as_in_tiktoken(tok):
    # as in files converted from tiktoken: a token that no two lower ones make, and one that needs it
    model = json.loads(tok.files["tokenizer.json"])["model"]
    vocabulary = {**model["vocab"], "qzx": 400, "qzxqzx": 401}
    odd = Tokenizer(variant(tok, model={**model, "vocab": vocabulary, "ignore_merges": True}))
    texts = ["qzx", "aqzx", "qzxqzx", "qzxqzxqzx qzx", "the qzxs", ENGLISH]
    assert rows_of(odd.encode_batch(texts)) == [odd._encoding.encode_ordinary(text) for text in texts]
    assert odd.encode("qzx") == [400]


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN, QWEN_PATTERN], ids=["gpt4", "gpt2", "qwen"])
def test_long_runs_cut_by_hand_give_the_ids_of_the_pattern(tok, pattern, monkeypatch):
    other = Tokenizer(tok.files)
    other.pattern = pattern
    other._encoding = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=other._ranks, special_tokens={})
    monkeypatch.setattr(tokenizer_file, "LONG_RUN", 3)
    monkeypatch.setattr(tokenizer_file, "_LONG_SPACE", tokenizer_file.re.compile(f"[{tokenizer_file._SPACE}]{{3,}}"))
    generator = random.Random(1)
    for _ in range(3000):
        text = "".join(generator.choices("a!7字'  \n\r\t\u3000", k=12))
        assert other.encode(text) == other._encoding.encode_ordinary(text), repr(text)


def test_lone_surrogates_become_one_replacement_each_and_are_counted(tok):
    fresh = Tokenizer(tok.files)
    assert fresh.decode(fresh.encode("a\ud800b\udfff \ufeff\ufffd")) == "a\ufffdb\ufffd \ufeff\ufffd"
    assert fresh.replaced_surrogates == 2
    assert fresh.decode(fresh.encode("\ud83d\ude00")) == "😀"  # a pair is a character
    assert fresh.replaced_surrogates == 2


def test_stream_decoder_gives_whole_characters_at_every_split_point(tok):
    text = "你好，😀👨‍👩‍👧 e\u0301é!"
    # one id a byte, the hardest case, and the ids the tokenizer would use
    for ids in (list(text.encode()), tok.encode(text)):
        for cut in range(len(ids) + 1):
            stream = StreamDecoder(tok)
            head = "".join(stream.push(index) for index in ids[:cut])
            assert text.startswith(head) and "\ufffd" not in head
            assert len(b"".join(tok.token_bytes[index] for index in ids[:cut])) - len(head.encode()) < 4
            tail = "".join(stream.push(index) for index in ids[cut:])
            assert head + tail + stream.flush() == text


def test_stream_decoder_ends_a_broken_character_as_decode_does(tok):
    for ids in ([*"你".encode()[:2]], [0xF0, 0x9F, ord("x")], [0xFF, 0xE4], [0xE4, tok.eos_id, 0xBD]):
        stream = StreamDecoder(tok)
        assert "".join(stream.push(index) for index in ids) + stream.flush() == tok.decode(ids)


def test_tokenizer_survives_pickling(tok):
    copy = pickle.loads(pickle.dumps(tok))
    assert copy.fingerprint == tok.fingerprint
    assert copy.encode(CHINESE) == tok.encode(CHINESE)


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens and conversations


def test_special_tokens_follow_the_ranks_and_pad_differs_from_eos(tok):
    assert [tok.token_bytes[index].decode() for index in sorted(tok.special_ids)] == SPECIALS
    assert min(tok.special_ids) == tok.max_id + 1 - len(SPECIALS)
    assert len({tok.bos_id, tok.eos_id, tok.pad_id, tok.im_start_id}) == 4
    assert tok.token_bytes[tok.eos_id] == b"<|im_end|>"
    assert tok.stop_ids(chat=True) == {tok.eos_id}
    assert tok.stop_ids(chat=False) == {tok.eos_id, tok.bos_id}


def test_markers_typed_by_a_user_stay_text(tok):
    attack = "".join(SPECIALS)
    assert not tok.special_ids & set(tok.encode(attack))
    assert not tok.special_ids & set(tok.encode_batch([attack])[0].tolist())
    ids, _ = tok.render([{"role": "user", "content": attack}])
    assert [index for index in ids if index in tok.special_ids] == [tok.bos_id, tok.im_start_id, tok.eos_id]
    assert tok.decode(ids) == f"<|bos|><|im_start|>user\n{attack}<|im_end|>\n"


def test_render_trains_the_assistants_text_and_its_end_token_only(tok):
    ids, mask = tok.render(CHAT)
    assert len(ids) == len(mask) and set(mask) == {0, 1}
    trained = tok.decode([index for index, on in zip(ids, mask, strict=True) if on])
    assert trained == "<think>\ntwo and two\n</think>\n\n4.\n<|im_end|>不客气！<|im_end|>"
    begin, end = tok.think_ids
    assert ids.count(begin) == ids.count(end) == 1
    assert tok.render(CHAT[:2])[1].count(1) == 0


def test_generation_prompt_is_the_beginning_of_what_is_trained(tok):
    prompt, mask = tok.render(CHAT[:2], add_generation_prompt=True)
    full, full_mask = tok.render(CHAT[:3])
    assert full[: len(prompt)] == prompt
    assert not any(mask) and full_mask[len(prompt)] == 1
    # an answer that opens with a newline must not change the tokens of the prompt either
    full, _ = tok.render([*CHAT[:2], {"role": "assistant", "content": "\n\nhello"}])
    assert full[: len(prompt)] == prompt


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "user"}],
        [{"role": "asistant", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "content": "", "tool_calls": [{}]}],
        ["hello"],
    ],
)
def test_render_says_what_is_wrong_with_a_message(tok, messages):
    with pytest.raises(ValueError) as error:
        tok.render(messages)
    message_of(error)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_saved_folder_opens_unchanged(tok, folder):
    again = Tokenizer.from_pretrained(folder)
    assert again.files == tok.files
    assert again.fingerprint == tok.fingerprint
    assert (again.bos_id, again.eos_id, again.pad_id) == (tok.bos_id, tok.eos_id, tok.pad_id)


def test_fingerprint_changes_with_the_vocabulary_only(tok):
    assert len(tok.fingerprint) == 16
    assert train(TEXTS, vocab_size=401, backend="python", progress=False).fingerprint != tok.fingerprint
    assert Tokenizer({**tok.files, "chat_template.jinja": "x"}).fingerprint == tok.fingerprint


def variant(tok, **changes):
    """The files of a tokenizer with changes to tokenizer.json, as another project might write it."""
    spec = json.loads(tok.files["tokenizer.json"])
    spec.update(changes)
    return {"tokenizer.json": json.dumps(spec, ensure_ascii=False), "tokenizer_config.json": "{}"}


def split_stage(pattern, use_regex=False):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]} if pattern else byte_level


@pytest.mark.parametrize(
    ("stage", "normalizer"),
    [
        (split_stage(QWEN_PATTERN), {"type": "NFC"}),
        (split_stage(None, use_regex=True), None),
        (split_stage(PATTERN.replace("{1,3}", "{1,3}+")), {"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
    ],
    ids=["qwen", "gpt2", "possessive"],
)
def test_foreign_pipelines_give_the_ids_of_tokenizers(tok, stage, normalizer):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    files = variant(tok, pre_tokenizer=stage, normalizer=normalizer)
    ours, theirs = Tokenizer(files), tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    generator = random.Random(0)
    for text in [*TEXTS[:-1], *("".join(generator.choices(PIECES, k=30)) for _ in range(300))]:
        assert ours.encode(text) == theirs.encode(text).ids
        expected = text if normalizer is None else unicodedata.normalize("NFC", text)
        assert ours.decode(ours.encode(text)) == expected
    assert rows_of(ours.encode_batch(TEXTS)) == [ours.encode(text) for text in TEXTS]


def test_merges_written_as_strings_are_read(tok):
    model = json.loads(tok.files["tokenizer.json"])["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    assert Tokenizer(variant(tok, model=model)).fingerprint == tok.fingerprint


def test_a_foreign_pad_equal_to_eos_is_replaced(tok):
    files = variant(tok)
    files["tokenizer_config.json"] = json.dumps({"eos_token": "<|im_end|>", "pad_token": {"content": "<|im_end|>"}})
    other = Tokenizer(files)
    assert other.pad_id == tok.pad_id != other.eos_id
    assert other.bos_id is None
    assert other.render(CHAT)[0] == tok.render(CHAT)[0][1:]  # no bos where there is none


def test_minimind_tokenizer_opens_with_identical_ids_and_keeps_its_template(tmp_path, tok):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    source = DATA / "tokenizers" / "minimind"
    if not source.is_dir():
        pytest.skip(f"no MiniMind tokenizer in {DATA} (set MINILLM_DATA)")
    ours = Tokenizer.from_pretrained(source)
    theirs = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in TEXTS[:-1]:
        assert ours.encode(text) == theirs.encode(text).ids
    assert (ours.vocab_size, ours.eos_id, ours.pad_id) == (6400, 2, 0)
    ids, mask = ours.render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    assert ours.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    tok.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)  # over another tokenizer: nothing of the old one may stay
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()


def test_real_text_encodes_as_in_tokenizers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    source = DATA / "pretrain" / "pretrain_mini.jsonl"
    if not source.is_file():
        pytest.skip(f"no pretrain_mini.jsonl in {DATA} (set MINILLM_DATA)")
    texts = list(tokenizer_file.iter_texts([source]))
    tok = train(texts[:300], vocab_size=2000, progress=False)
    tok.save_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = [row.ids for row in theirs.encode_batch(texts)]
    assert [tok.encode(text) for text in texts] == expected
    assert rows_of(tok.encode_batch(texts)) == expected


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong is said in one message


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "WordPiece", "vocab": {}}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": split_stage(PATTERN, use_regex=True)},
        {"added_tokens": [{"id": 399, "content": ""}]},
    ],
    ids=["wordpiece", "lowercase", "metaspace", "double split", "empty special"],
)
def test_a_tokenizer_that_cannot_be_read_faithfully_is_refused(tok, changes):
    with pytest.raises(ValueError) as error:
        Tokenizer(variant(tok, **changes))
    assert "tokenizer.json" in message_of(error)


def test_missing_bytes_and_merges_out_of_order_are_refused(tok):
    model = json.loads(tok.files["tokenizer.json"])["model"]
    with pytest.raises(ValueError, match="0x41"):
        Tokenizer(variant(tok, model={**model, "vocab": {k: v for k, v in model["vocab"].items() if k != "A"}}))
    with pytest.raises(ValueError, match="order"):
        Tokenizer(variant(tok, model={**model, "merges": model["merges"][::-1]}))
    for merge in (["A", "\u4e00"], ["\u4e00", "A"], ["q", "Z"]):
        with pytest.raises(ValueError, match="tokenizer.json: merge .*; .* of the vocabulary .*; "):
            Tokenizer(variant(tok, model={**model, "merges": [merge, *model["merges"]]}))


def test_wrong_arguments_are_explained(tok, tmp_path):
    for call in (
        lambda: train(["x"], vocab_size=100),
        lambda: train(["x"], vocab_size=99_999_999_999),
        lambda: list(tokenizer_file.sample_texts([], float("nan"))),
        lambda: list(tokenizer_file.sample_texts([], -1.0)),
        lambda: train(["x"], backend="cuda"),
        lambda: train([3]),
        lambda: train([tmp_path / "missing.jsonl"]),
        lambda: Tokenizer.from_pretrained(tmp_path / "nowhere"),
        lambda: Tokenizer({**tok.files, "tokenizer_config.json": '{"padded_vocab_size": "x"}'}),
        lambda: tok.encode(None),
        lambda: tok.decode([100_000]),
        lambda: tok.decode([-1]),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            call()
        message_of(error)


@needs_rust
def test_rust_raises_ordinary_exceptions():
    trainer = rust.Trainer()
    with pytest.raises(UnicodeEncodeError):
        trainer.feed(["ok", "\ud800"])
    assert trainer.num_words == 0
    with pytest.raises(TypeError):
        trainer.feed([b"bytes"])
    with pytest.raises(ValueError, match="byte 0x00"):
        rust.Encoder([b"a"], [0], True)
    with pytest.raises(OverflowError):
        trainer.train(-1)


def test_command_line_trains_encodes_decodes_and_inspects(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": ENGLISH + CHINESE}) + "\n", encoding="utf-8")
    output = tmp_path / "tok"
    done = cli("train", "--data-path", tmp_path / "*.jsonl", "--vocab-size", "400", "--output", output)
    assert done.returncode == 0, done.stderr
    ids = cli("encode", "--tokenizer", output, "--text", "Hello, 世界").stdout.split()
    assert [int(index) for index in ids] == Tokenizer.from_pretrained(output).encode("Hello, 世界")
    assert cli("decode", "--tokenizer", output, text=" ".join(ids)).stdout == "Hello, 世界\n"
    shown = cli("inspect", "--tokenizer", output, "--text", "Hello, 世界").stdout
    assert "vocab_size  400" in shown and "13 bytes, " in shown
    assert "Hello|,|" in shown.split("fall into tokens")[1]
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    ids = cli("encode", "--tokenizer", output, "--file", tmp_path / "windows.txt").stdout.split()
    assert list(map(int, ids)) == Tokenizer.from_pretrained(output).encode("one\r\ntwo\r\n")


def test_a_terminal_without_chinese_gets_question_marks(folder, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = cli("inspect", "--tokenizer", folder, "--merges", "1")
    assert done.returncode == 0 and "?|?" in done.stdout and "bytes per token" in done.stdout


def test_inspect_compares_compression_by_language_and_lists_merges(tmp_path, tok, capsys):
    tok.save_pretrained(tmp_path / "a")
    train([ENGLISH], vocab_size=400, backend="python", progress=False).save_pretrained(tmp_path / "b")
    rows = [{"text": ENGLISH}, {"text": CHINESE}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = ["inspect", "--tokenizer", tmp_path / "a", "--compare", tmp_path / "b"]
    argv += ["--data_path", tmp_path / "rows.jsonl"]
    facts = tokenizer_file.main(tokenizer_file.parse_args([str(word) for word in [*argv, "--merges", 3]]))
    rates = facts["bytes per token"]
    for name in ("a", "b"):
        other = Tokenizer.from_pretrained(tmp_path / name)
        for language, text in (("English", ENGLISH), ("Chinese", CHINESE)):
            assert rates[str(tmp_path / name)][language] == len(text.encode()) / len(other.encode(text))
    assert rates[str(tmp_path / "a")]["Chinese"] > rates[str(tmp_path / "b")]["Chinese"]
    shown = capsys.readouterr().out
    left, right = learn_merges(count_words(TEXTS), 1)[0]
    spelled = [tokenizer_file._spelled(token) for token in (bytes([left]), bytes([right]), bytes([left, right]))]
    assert "256: [{}] + [{}] = [{}]\n".format(*spelled) in shown
    assert tokenizer_file._spelled("字\n".encode()) == "字\\n" and tokenizer_file._spelled(b"\xe5\xad") == "<E5 AD>"


def test_training_is_skipped_while_text_and_settings_stay(tmp_path, capsys):
    path = tmp_path / "rows.txt"
    path.write_text(ENGLISH, encoding="utf-8")

    def run(*more):
        argv = ["train", "--data_path", str(path), "--output", str(tmp_path / "tok"), "--backend", "python", *more]
        facts = tokenizer_file.main(tokenizer_file.parse_args(argv))
        return facts["fingerprint"], "was made from this text" in capsys.readouterr().out

    first, skipped = run("--vocab_size", "300")
    assert not skipped
    assert run("--vocab_size", "300") == (first, True)
    assert run("--vocab_size", "300", "--retrain_tokenizer") == (first, False)
    assert run("--vocab_size", "310")[1] is False
    path.write_text(ENGLISH.replace("cat", "dog"), encoding="utf-8")
    changed, skipped = run("--vocab_size", "310")
    assert not skipped and changed != first
    mark, vocabulary = tmp_path / "tok" / "trained_from.txt", tmp_path / "tok" / "tokenizer.json"
    train([CHINESE], 300, "python", progress=False).save_pretrained(tmp_path / "foreign")
    for damage in (mark.unlink,  # as after a save that was cut off
                   vocabulary.unlink, lambda: vocabulary.write_text("{"),
                   lambda: shutil.copy(tmp_path / "foreign" / "tokenizer.json", vocabulary)):
        damage()
        assert run("--vocab_size", "310") == (changed, False)
    assert run("--vocab_size", "310") == (changed, True)
    path = path.rename(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="rows.jsonl:1: not valid JSON"):  # so the same bytes were read as other rows
        run("--vocab_size", "310")


def test_command_line_errors_are_one_message_and_exit_code_2(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    for arguments, hint in (
        (["train", "--data_path", tmp_path / "bad.jsonl", "--output", tmp_path / "o"], "bad.jsonl:2"),
        (["train", "--data_path", tmp_path / "empty.txt", "--output", tmp_path / "o"], "no text"),
        (["train", "--data_path", tmp_path / "none*.jsonl"], "none*.jsonl"),
        (["train", "--data_path", tmp_path / "bad.jsonl", "--vocab_size", "10"], "vocab_size"),
        (["encode", "--tokenizer", tmp_path, "--text", "x"], "no tokenizer.json"),
        (["inspect", "--tok", tmp_path], "--tok"),
    ):
        done = cli(*arguments)
        assert done.returncode == 2, done
        assert hint in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "o").exists()
