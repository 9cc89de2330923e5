"""Byte-level BPE tokenizer: train, encode, decode, render conversations, and a Hugging Face folder in and out.

What a token is, how merges are learnt and how tokenizer.json keeps them: bpe.py. Training runs in Rust (minillm_bpe,
built from rustbpe/) or, where that is missing, in the slow Python twin there, which learns the same merges; encoding
runs in tiktoken, batches in Rust where built. Every text can be encoded and decode(encode(text)) == text. The tokenizer
*is* its folder: an object is built from the texts of tokenizer.json and its companions and writes those texts back
unchanged, so a folder of another project keeps its own template and settings.

What this file does not do: parse control tokens out of text. Text is data: "<|im_end|>" typed by a user stays seven-odd
plain tokens, and only render() writes control ids. (transformers does parse them; its split_special_tokens=True turns
that off.)

    python tokenizer.py train --data_path out/data/pretrain.train.jsonl --vocab_size 6400 --output out/tokenizer
    python tokenizer.py inspect --tokenizer out/tokenizer --compare DATA/tokenizers/minimind --data_path texts.jsonl
    echo "Hello" | python tokenizer.py encode --tokenizer out/tokenizer
"""

import codecs
import hashlib
import json
import os
import re
import shlex
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

import cli
from bpe import MAX_IDS, PATTERN, count_words, learn_merges, read_tokenizer_json, refusal, repair, tokenizer_json
from rows import all_texts, expand_paths, read_rows, row_format

SPECIALS = [
    "<|bos|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
ROLES = ("system", "user", "assistant", "tool")

# The same text as render() writes. An assistant's text loses leading white space in both: a newline there would merge
# with the newline of the header, and the model would be trained on a token that its prompt never ends with.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}
            {%- if message["reasoning_content"] -%}
                {{- "<think>\\n" + message["reasoning_content"].strip("\\n") + "\\n</think>\\n\\n" -}}
            {%- endif -%}
            {{- message["content"].lstrip() + "<|im_end|>" -}}
        {%- endgeneration -%}
        {{- "\\n" -}}
    {%- else -%}
        {{- message["content"] + "<|im_end|>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""

# What inspect cuts when it is given no text
SENTENCES = [
    "The weather is fine today, so we're going to the park at 10:30.",
    "今天天气很好，我们上午十点半去公园玩。",
]

# Files that make up a tokenizer folder; the last three occur only in folders of other projects and are passed through
FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
]

# tiktoken's regex engine keeps one stack entry per character of a white space run and dies (as a panic, not an
# exception) somewhere between 500,000 and 1,000,000; longer runs than this are cut by hand in _encode_clean.
LONG_RUN = 100_000
# the 25 white space characters of \s in tiktoken and regex; Python's own \s has four more (U+001C to U+001F)
_SPACE = " \t\n\x0b\x0c\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_SPACE = re.compile(f"[{_SPACE}]{{{LONG_RUN},}}")

# Texts are handed to the Rust trainer in batches of about this many characters: memory stays flat, Ctrl-C stays quick
_BATCH_CHARS = 1_000_000


# ---------------------------------------------------------------------------------------------------------------------
# 1. Training


def rust_module():
    """The compiled crate, or None where it was not built. Imported late: nothing here depends on it."""
    try:
        import minillm_bpe
    except ImportError:
        return None
    return minillm_bpe


def train(texts_or_paths, vocab_size=6400, backend="auto", progress=True):
    """Learn a tokenizer.

    texts_or_paths: iterable of documents (str) and files (pathlib.Path, of any format of rows.py), read in a stream;
    memory grows with the number of distinct words only. vocab_size counts the special tokens; when the text has too
    few pairs, the ids left over are padding, and vocab_size stays as asked.
    backend: "rust", "python" (the slow twin, same merges) or "auto" (rust where built).
    Returns a Tokenizer. Raises ValueError (bad size, backend or row) and FileNotFoundError.
    """
    smallest = 256 + len(SPECIALS)
    if not smallest <= vocab_size < MAX_IDS:
        raise ValueError(
            f"vocab_size is {vocab_size}; 256 bytes and {len(SPECIALS)} special tokens need at least {smallest}, and "
            f"it is below {MAX_IDS}; give --vocab_size {smallest} or more (6400 suits small models)"
        )
    merges, facts = learn(texts_or_paths, vocab_size - smallest, backend, progress=progress)
    if progress:
        print(
            "tokenizer: {documents:,} documents, {characters:,} characters, {words:,} distinct words in "
            "{count_seconds:.1f} s; {merges:,} merges in {merge_seconds:.1f} s".format(**facts, merges=len(merges)),
            flush=True,
        )
        if facts["surrogates"]:
            print(f"tokenizer: {facts['surrogates']:,} lone surrogates became U+FFFD", flush=True)
        if len(merges) < vocab_size - smallest:
            left = vocab_size - smallest - len(merges)
            print(f"tokenizer: the text ran out of pairs; {left:,} ids are padding", flush=True)
    return Tokenizer(folder_files(merges, vocab_size))


def learn(texts_or_paths, num_merges, backend="auto", num_threads=0, progress=False):
    """Count words and learn merges: what train() does before it builds a tokenizer.

    num_threads: for counting in Rust, 0 = one per core. progress: show bars. Returns (pairs, facts): at most num_merges
    pairs (left id, right id), and a dict of counts and seconds. Raises ValueError for a backend that is not there.
    """
    if backend not in ("auto", "rust", "python"):
        raise ValueError(f"backend is {backend!r}; it must be auto, rust or python; leave it out for auto")
    rust = rust_module() if backend in ("auto", "rust") else None
    if backend == "rust" and rust is None:
        raise ValueError("backend is rust; its module minillm_bpe is not built; pip install ./rustbpe, or use auto")
    if rust is None:
        print("tokenizer: slow Python trainer in use (pip install ./rustbpe builds the fast one)", flush=True)
    facts = Counter(documents=0, characters=0, surrogates=0)
    start = time.perf_counter()
    trainer = None if rust is None else rust.Trainer(num_threads)
    words = Counter()
    # a log file gets a line every 15 seconds instead of redraws
    quiet = {"disable": not progress, "mininterval": 0.1 if sys.stderr.isatty() else 15}
    with tqdm(desc="count words", unit="char", unit_scale=True, **quiet) as bar:
        for batch in _batches(iter_texts(texts_or_paths)):
            facts["documents"] += len(batch)
            size = sum(map(len, batch))
            facts["characters"] += size
            try:
                if trainer is not None:
                    trainer.feed(batch)
                    bar.update(size)
                    continue
            except UnicodeEncodeError:
                pass  # nothing of the batch was counted; repair it and try again
            batch, lone = zip(*map(repair, batch), strict=True)
            facts["surrogates"] += sum(lone)
            if trainer is not None:
                trainer.feed(batch)
            else:
                words.update(count_words(batch))
            bar.update(size)
    facts["words"] = len(words) if trainer is None else trainer.num_words
    facts["count_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    with tqdm(desc="learn merges", unit="merge", total=num_merges, **quiet) as bar:
        report = lambda done: bar.update(done - bar.n)  # noqa: E731
        merges = learn_merges(words, num_merges, report) if trainer is None else trainer.train(num_merges, report)
        report(len(merges))
    facts["merge_seconds"] = time.perf_counter() - start
    return merges, facts


def _batches(documents):
    """Lists of documents, of about _BATCH_CHARS together."""
    batch = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def iter_texts(sources, bad=None):
    """Documents of a mix of strings (each a document) and Paths (files, read as by read_rows()), in order. bad: a list
    for the messages of unreadable lines and rows without text, which are skipped then, and errors without it."""
    if isinstance(sources, (str, Path)):
        sources = [sources]
    for source in sources:
        if isinstance(source, Path):
            yield from _file_texts(source, bad)
        elif isinstance(source, str):
            yield source
        else:
            raise ValueError(f"a {type(source).__name__} among the texts; texts are str, files Path; convert it")


def _file_texts(path, bad):
    for row, where in read_rows(path, bad is not None, bad):
        try:
            found = all_texts(row, where)
        except ValueError as error:
            if bad is None:
                raise
            bad.append(str(error))
        else:
            yield from found


# ---------------------------------------------------------------------------------------------------------------------
# 2. The texts of a folder


def folder_files(merges, vocab_size):
    """The texts of a tokenizer folder in the form that transformers 4.51 to 5.x, tokenizers and llama.cpp read alike.

    merges: pairs of ids, merge i makes id 256 + i. Special tokens follow the last merge; ids from there to vocab_size
    are padding. Returns {file name: text}.
    """
    spec = tokenizer_json(merges, SPECIALS)
    config = _config(spec["added_tokens"], vocab_size)
    # special_tokens_map.json repeats the config for readers from before tokenizer_config.json held everything
    names = {name: value for name, value in config.items() if name.endswith(("_token", "special_tokens"))}
    return {
        "tokenizer.json": _dump(spec),
        "tokenizer_config.json": _dump(config),
        "chat_template.jinja": CHAT_TEMPLATE,
        "special_tokens_map.json": _dump(names),
    }


def _config(added, vocab_size):
    """tokenizer_config.json as a dict. added: the special tokens as they stand in tokenizer.json."""
    names = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    return {
        # any Qwen class makes transformers 5 rebuild Qwen's own pipeline over our vocabulary, and the class name that
        # transformers 5 itself writes is unknown to 4.x
        "tokenizer_class": "PreTrainedTokenizerFast",
        # without this 4.57 returns token_type_ids, which generate() refuses
        "model_input_names": ["input_ids", "attention_mask"],
        # true would drop blanks before punctuation: decode(encode(text)) != text
        "clean_up_tokenization_spaces": False,
        # the model's limit stands in config.json; this one only silences a warning
        "model_max_length": 1_000_000,
        **names,
        "additional_special_tokens": [text for text in SPECIALS if text not in names.values()],
        # 4.x reads the ids from here, keyed by id as a string
        "added_tokens_decoder": {
            str(item["id"]): {key: value for key, value in item.items() if key != "id"} for item in added
        },
        # our own field: ids up to here may exist in the model, unused
        "padded_vocab_size": vocab_size,
        # both places are read by 4.57 and 5.x; engines that know only one of them know this one
        "chat_template": CHAT_TEMPLATE,
    }


def _dump(value):
    # indent 1: one token a line, so that two vocabularies can be compared with diff
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _object(files, name):
    """The JSON object in one text of a folder; {} where the folder has no such file."""
    try:
        value = json.loads(files.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}); the file is damaged; copy it anew") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__}; it is a JSON object; copy it anew")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# 3. The tokenizer


class Tokenizer:
    """Encode, decode, render. Build one with from_pretrained(folder) or train(...).

    Attributes: vocab_size (rows the model needs, padding included), max_id (highest id in use), bos_id (None where a
    foreign folder has none), eos_id (= im_end_id), pad_id (never eos_id), im_start_id, im_end_id, special_ids (set),
    token_bytes (list[bytes], index = id: special tokens their text, padding ids b""), fingerprint, pattern,
    replaced_surrogates (lone surrogates that became U+FFFD so far).
    """

    def __init__(self, files):
        """files: {name: text} of a tokenizer folder; tokenizer.json is required."""
        self.files = dict(files)
        spec, config = _object(self.files, "tokenizer.json"), _object(self.files, "tokenizer_config.json")
        self.pattern, self.nfc, ranks, added = read_tokenizer_json(spec)
        padded = config.get("padded_vocab_size") or 0
        if type(padded) is not int or not 0 <= padded < MAX_IDS:
            raise ValueError(f"tokenizer_config.json: padded_vocab_size is {padded!r:.40}; it is a whole number below "
                             f"{MAX_IDS}; give the rows of the model's embedding, or take it out")

        self.special_ids = set(added.values())
        self.max_id = max([*ranks.values(), *added.values()])
        self.vocab_size = max(self.max_id + 1, padded)
        self.token_bytes = [b""] * self.vocab_size
        for token, index in ranks.items():
            self.token_bytes[index] = token
        # special tokens decode to their text, also where the file calls them not special (Qwen's <think>)
        for text, index in added.items():
            self.token_bytes[index] = text.encode()
        self._choose_controls(added, config)
        self.replaced_surrogates = 0
        self._encoding = tiktoken.Encoding("minillm", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=added)
        self._ranks = ranks
        self._rust = None  # made at the first encode_batch

    def _choose_controls(self, added, config):
        """Decide which ids play bos, eos, pad. Foreign folders name them in tokenizer_config.json, sometimes badly."""

        def named(key):
            value = config.get(key)
            # a plain string, or in older folders an object with the token's settings
            return added.get(value["content"] if isinstance(value, dict) else value)

        self.im_start_id = added.get("<|im_start|>")
        self.im_end_id = added.get("<|im_end|>")
        self.think_ids = (added.get("<think>"), added.get("</think>"))
        self.bos_id = named("bos_token")
        self._own_eos = named("eos_token")
        # Qwen's base models name <|endoftext|> as eos; a chat must end at <|im_end|> all the same
        self.eos_id = self._own_eos if self.im_end_id is None else self.im_end_id
        self.pad_id = named("pad_token")
        if self.pad_id is None or self.pad_id in (self.eos_id, self.bos_id):
            # Padding that equals the end token would teach the model, or tell the sampler, to stop at random
            taken = {self.eos_id, self.bos_id, self.im_start_id, self.im_end_id, *self.think_ids}
            free = [text for text in added if added[text] not in taken]
            free.sort(key=lambda text: ("pad" not in text.lower(), text != "<|endoftext|>", added[text]))
            if not free:
                raise refusal("no token is left to pad with", "pad must differ from bos and eos")
            self.pad_id = added[free[0]]

    def __reduce__(self):
        return (Tokenizer, (self.files,))  # worker processes rebuild it; the encoders cannot be pickled

    @classmethod
    def from_pretrained(cls, folder):
        """Open a folder with tokenizer.json: ours, or another project's byte-level BPE (MiniMind, Qwen, Llama 3)."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no tokenizer.json there; a tokenizer is a folder with that file; make one with "
                "python tokenizer.py train, or name a checkpoint folder"
            )
        files = {}
        try:
            for name in [name for name in FILES if (folder / name).is_file()]:
                # bytes, not read_text(): line ends of a foreign template must survive
                files[name] = (folder / name).read_bytes().decode()
            return cls(files)
        except UnicodeError as error:
            what = f"{name} is not UTF-8: {error}"
        except (LookupError, TypeError, AttributeError, OverflowError) as error:
            # what a hand-edited file raises; messages of refusal() are ValueErrors and pass through
            what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: a tokenizer file is damaged ({what}); all must be whole; copy it anew")

    def save_pretrained(self, folder):
        """Write the folder that from_pretrained() and transformers.AutoTokenizer open; files of others unchanged."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in set(FILES) - set(self.files):
            (folder / name).unlink(missing_ok=True)  # a template left by an earlier tokenizer would win over ours
        for name, text in self.files.items():
            (folder / name).write_bytes(text.encode())

    @property
    def fingerprint(self):
        """16 hex digits that change with anything that changes the ids of a text: pattern, normaliser, ranks, special
        tokens. Not with the tokens that play bos, eos and pad."""
        digest = hashlib.sha256(f"{self.pattern}\0{self.nfc}\0{sorted(self.special_ids)}".encode())
        for index, token in enumerate(self.token_bytes):
            if token:
                digest.update(b"%d %d " % (index, len(token)) + token)
        return digest.hexdigest()[:16]

    def stop_ids(self, chat):
        """Ids that end a generation: in a chat the end of the turn, for a base model also the next document's bos."""
        ids = {self.im_end_id, self._own_eos}
        if not chat:
            ids.add(self.bos_id)
        return ids - {None}

    # -- text to ids ---------------------------------------------------------------------------------------------------

    def _clean(self, text):
        if not isinstance(text, str):
            raise ValueError(f"a {type(text).__name__} to encode; encode() takes a str; use encode_batch() for a list")
        text, lone = repair(text)
        self.replaced_surrogates += lone
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode(self, text):
        """list[int] of a text. Special tokens written in it stay text; no bos is added."""
        # tiktoken takes a second for a clause of a million characters, and has a stack to lose (see LONG_RUN)
        if isinstance(text, str) and len(text) >= LONG_RUN and self._rust_encoder() is not None:
            return self.encode_batch([text])[0].tolist()
        return self._encode_clean(self._clean(text))

    def _encode_clean(self, text):
        ids = []
        while len(text) >= LONG_RUN and (run := _LONG_SPACE.search(text)):
            # Cut where every pattern here cuts anyway. "\s*[\r\n]+" takes a run up to its last newline (GPT-2's
            # pattern has no such rule), "\s+(?!\S)" the rest but for one character, which may belong to what follows.
            start, end = run.span()
            if "[\\r\\n]" in self.pattern:
                start = max(start, text.rfind("\n", start, end) + 1, text.rfind("\r", start, end) + 1)
            stop = end if end == len(text) else max(start, end - 1)
            ids += self._encoding.encode_ordinary(text[:start])
            if stop > start:
                ids += self._encoding._encode_single_piece(text[start:stop])
            text = text[stop:]
        return ids + self._encoding.encode_ordinary(text)

    def encode_batch(self, texts, num_threads=0):
        """Encode many texts into one array: (ids uint16 or uint32, offsets int64 [N+1]); text n is
        ids[offsets[n]:offsets[n+1]]. uint16 where the vocabulary fits. num_threads: 0 = one per core (Rust only)."""
        # half the memory and disk for every vocabulary of this project; token files keep this type
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        rust = self._rust_encoder()
        if rust is not None and not self.nfc:
            try:  # nearly all texts are valid Unicode: to look first would cost a tenth of the time
                return self._arrays(rust.encode_batch(texts, num_threads), dtype)
            except (UnicodeEncodeError, TypeError):
                pass  # nothing was encoded; repair, or say what is no text
        texts = [self._clean(text) for text in texts]
        if rust is not None:
            return self._arrays(rust.encode_batch(texts, num_threads), dtype)
        rows = [np.array(self._encode_clean(text), dtype=dtype) for text in texts]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return np.concatenate(rows or [np.zeros(0, dtype=dtype)]), offsets

    @staticmethod
    def _arrays(buffers, dtype):
        ids, offsets = buffers
        return np.frombuffer(ids, dtype=dtype), np.frombuffer(offsets, dtype=np.int64)

    def _rust_encoder(self):
        """The crate's encoder, or None: not built, or a pattern other than the one its splitter is written for."""
        rust = rust_module()
        # asked anew at each call, so that tests can take Rust away
        if self._rust is None and rust is not None and self.pattern == PATTERN:
            tokens = sorted(self._ranks, key=self._ranks.get)
            ids = [self._ranks[token] for token in tokens]
            self._rust = rust.Encoder(tokens, ids, self.vocab_size <= 1 << 16)
        return self._rust if rust is not None else None

    # -- ids to text ---------------------------------------------------------------------------------------------------

    def decode(self, ids, skip_special=False):
        """str of ids. Bytes that are not UTF-8 (a character cut in half) become U+FFFD; padding ids are nothing."""
        drop = self.special_ids if skip_special else ()
        return b"".join([self._bytes_of(index) for index in ids if index not in drop]).decode("utf-8", "replace")

    def _bytes_of(self, index):
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index}; ids end at {self.vocab_size - 1}; use the tokenizer that made it")
        return self.token_bytes[index]

    # -- conversations -------------------------------------------------------------------------------------------------

    def render(self, messages, add_generation_prompt=False):
        """A conversation as ids, with a mask of what is trained.

        messages: list of {"role", "content"} and, for the assistant, optional "reasoning_content". Layout: bos, then
        per message <|im_start|>role\\ncontent<|im_end|>\\n; the prompt for an answer is <|im_start|>assistant\\n.
        Returns (ids, mask), two lists of one length; mask 1 = the assistant's text (with its reasoning) and the
        <|im_end|> that ends it. The newline after it is not trained: nothing is ever sampled there.
        Raises ValueError for a tokenizer without these tokens or a message that is not of this form.
        """
        if self.im_start_id is None or self.im_end_id is None:
            raise ValueError(
                "this tokenizer has no <|im_start|> and <|im_end|>; conversations are written with them; "
                "use a tokenizer of MiniLLM, MiniMind or Qwen"
            )
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"messages is {messages!r}; it must be a non-empty list; give [{{'role', 'content'}}]")
        # A conversation is a document, so it opens with bos. MiniMind declares <|im_start|> as its bos; a second one in
        # front of the first would be noise
        ids = [] if self.bos_id in (None, self.im_start_id) else [self.bos_id]
        mask = [0] * len(ids)
        newline = self.encode("\n")
        for number, message in enumerate(messages):
            header, body = self._message(message, number)
            ids += [*header, *body, self.im_end_id, *newline]
            # the end token is trained with the answer: a model that never saw it does not stop
            trained = int(message["role"] == "assistant")
            mask += [0] * len(header) + [trained] * (len(body) + 1) + [0] * len(newline)
        if add_generation_prompt:
            prompt = [self.im_start_id, *self.encode("assistant\n")]
            ids += prompt
            mask += [0] * len(prompt)
        return ids, mask

    def _message(self, message, number):
        """(header ids, body ids) of a message."""
        role, content = _checked(message, number)
        if role != "assistant":
            # encoded in one go, as the template's text is: a newline that opens the content joins the header's
            return [self.im_start_id, *self.encode(f"{role}\n{content}")], []
        # encoded apart: these are exactly the ids of the generation prompt, which the model will be asked to continue
        header = [self.im_start_id, *self.encode("assistant\n")]
        content = content.lstrip()
        reasoning = message.get("reasoning_content")
        if not reasoning:
            return header, self.encode(content)
        begin, end = self.think_ids
        if begin is None or end is None:
            raise ValueError(f"message {number} has reasoning_content; it needs <think> tokens; leave the field out")
        thought = self.encode("\n" + reasoning.strip("\n") + "\n")
        return header, [begin, *thought, end, *self.encode("\n\n" + content)]


def _checked(message, number):
    """role and content of a message, or an error that says which message is wrong."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise ValueError(f"message {number} is {message!r:.200}; it needs role and content, both text; fix the row")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"message {number} has role {role!r}; roles are {', '.join(ROLES)}; fix or drop the row")
    if message.get("tool_calls"):
        raise ValueError(f"message {number} has tool_calls; they are not rendered; write the call into content")
    return role, message["content"]


class StreamDecoder:
    """Decode one id at a time: push() returns the text that is certain by now.

    A character may be spread over several tokens (most emoji are), so incomplete bytes wait for the next token. All
    pushes and the flush together equal tokenizer.decode(ids).
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index):
        """Text completed by this id; may be empty."""
        return self.decoder.decode(self.tokenizer._bytes_of(index))

    def flush(self):
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self.decoder.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Command line


def sample_texts(paths, sample_mb, skip_bad=False):
    """The first sample_mb megabytes (UTF-8) of documents, taken from the files in turns by size, so that each file has
    an equal share while it lasts. 0 = everything. skip_bad: lines without readable text are skipped and counted."""
    if not sample_mb >= 0:  # nor nan
        raise ValueError(f"--sample_mb is {sample_mb}; it must be 0 (all) or more megabytes; 2 is usual")
    bad = [] if skip_bad else None
    readers = [[0, number, iter_texts(path, bad)] for number, path in enumerate(dict.fromkeys(paths))]
    total = 0
    while readers and (not sample_mb or total < sample_mb * 1_000_000):
        reader = min(readers)  # the file that gave least so far
        text = next(reader[2], None)
        if text is None:
            readers.remove(reader)
            continue
        size = len(text.encode("utf-8", "replace"))
        reader[0] += size
        total += size
        yield text
    if bad:
        print(f"skipped {len(bad)} bad lines; the first: {bad[0]}", flush=True)


def parse_args(argv=None):
    """Flags of the four commands."""
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,encode,decode,inspect}")

    def command(name, text):
        return commands.add_parser(name, help=text, description=text)

    def reading(sub, sample_mb, text, **needed):
        sub.add_argument("--data_path", nargs="+", help=f"files or globs{text}", **needed)
        sub.add_argument("--sample_mb", type=float, default=sample_mb, help="megabytes of that text, 0 = all")
        cli.switch(sub, "--skip_bad", 0, "skip and count lines without readable text instead of stopping at the first")

    sub = command("train", "learn a vocabulary from text and write a tokenizer folder")
    reading(sub, 2.0, " of rows for any stage (docs/data.md); every text in them is learnt from", required=True)
    sub.add_argument("--vocab_size", type=int, default=6400, help="tokens, special ones included")
    sub.add_argument("--output", default="out/tokenizer", help="folder to write")
    sub.add_argument("--backend", default="auto", choices=["auto", "rust", "python"], help="auto = rust where built")
    cli.switch(sub, "--retrain_tokenizer", 0,
               "train although --output was made from the same text with the same settings")
    for name, text in [
        ("encode", "print the ids of a text"),
        ("decode", "print the text of ids"),
        ("inspect", "print facts of a tokenizer and, with --text or --file, how it cuts a text"),
    ]:
        sub = command(name, text)
        sub.add_argument("--tokenizer", default="out/tokenizer", help="folder with tokenizer.json")
        if name == "decode":
            sub.add_argument("--ids", type=int, nargs="+", help="token ids; standard input when left out")
            continue
        sub.add_argument("--text", help="the text itself" + ("; standard input when left out" * (name == "encode")))
        sub.add_argument("--file", help="a UTF-8 file with the text")
        if name == "inspect":
            sub.add_argument("--compare", nargs="+", default=[], help="folders of other tokenizers, to stand beside it")
            reading(sub, 10.0, " whose text is encoded for the comparison")
            sub.add_argument("--merges", type=int, default=20, help="how many merges to list")
    return parser.parse_args(argv)


def _given_text(args):
    if args.text is not None:
        return args.text
    if args.file is not None:
        return Path(args.file).read_bytes().decode("utf-8", "replace")  # read_text() drops the \r of \r\n
    return None


def _require_text(documents, where):
    """The same documents; an error at the end if there was no text: that must not become a vocabulary of bytes."""
    empty = True
    for text in documents:
        empty = empty and not text
        yield text
    if empty:
        raise ValueError(f"--data_path {' '.join(where)}: no text there; training needs text; check the file")


def training_key(args, paths):
    """16 hex digits that change with anything a training depends on: the text, the settings, this code."""
    digest = hashlib.sha256(f"{args.vocab_size} {args.sample_mb}".encode())
    for code in ("tokenizer", "bpe", "rows"):
        digest.update(Path(__file__).with_name(f"{code}.py").read_bytes())
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(f"a {row_format(path)} file ends".encode())
    return digest.hexdigest()[:16]


def _made_before(mark, key):
    """The tokenizer beside a mark that vouches for this training and for just this tokenizer, or None."""
    try:
        tokenizer = Tokenizer.from_pretrained(mark.parent)
        return tokenizer if mark.read_text() == f"{key} {tokenizer.fingerprint}" else None
    except (OSError, ValueError):  # missing, damaged or from elsewhere
        return None


def command_train(args):
    """Train on a sample of files and save, unless the folder already holds just that. Raises ValueError when there is
    no text at all."""
    paths = expand_paths(args.data_path)
    key = training_key(args, paths)
    mark = Path(args.output) / "trained_from.txt"
    if not args.retrain_tokenizer and (tokenizer := _made_before(mark, key)):
        print(f"tokenizer: {args.output} was made from this text with these settings; --retrain_tokenizer 1 redoes it")
        return {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    texts = _require_text(sample_texts(paths, args.sample_mb, args.skip_bad), args.data_path)
    tokenizer = train(texts, args.vocab_size, args.backend)
    mark.unlink(missing_ok=True)  # first, and written last: an interrupted save must not look whole
    tokenizer.save_pretrained(args.output)
    mark.write_text(f"{key} {tokenizer.fingerprint}")
    print(f"tokenizer: vocab_size {tokenizer.vocab_size}, fingerprint {tokenizer.fingerprint}, saved to {args.output}")
    print(f"next: python tokenizer.py inspect --tokenizer {shlex.quote(args.output)}")
    return {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}


def bytes_per_token(tokenizer, texts):
    """UTF-8 bytes per token of a list of texts: how far a vocabulary compresses them. nan without text."""
    size = sum(len(repair(text)[0].encode()) for text in texts)
    ids, _ = tokenizer.encode_batch(texts)
    return size / len(ids) if len(ids) else float("nan")


def by_language(texts):
    """{"English": texts, "Chinese": texts}: Chinese is a text of which a fifth or more are Chinese characters."""
    groups = {"English": [], "Chinese": []}
    for text in texts:
        chinese = sum("\u4e00" <= character <= "\u9fff" for character in text)
        groups["Chinese" if chinese * 5 >= len(text) else "English"].append(text)
    return groups


def _spelled(token):
    """Bytes as text: what is no whole character as <E4 B8>, line breaks and tabs as \\n, \\r, \\t."""
    try:
        return token.decode().replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    except UnicodeDecodeError:
        return f"<{token.hex(' ').upper()}>"


def _merge_table(tokenizer, number):
    """Lines "id: left + right = token" of the first merges; [] shows where a part begins and ends."""
    spec = json.loads(tokenizer.files["tokenizer.json"])["model"]
    for merge in spec["merges"][:number]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        left, right = (tokenizer.token_bytes[spec["vocab"][part]] for part in parts)
        index = spec["vocab"]["".join(parts)]
        yield f"{index:>8}: [{_spelled(left)}] + [{_spelled(right)}] = [{_spelled(left + right)}]"


def command_inspect(args):
    """Print what a reader wants to know of a tokenizer: its facts, its first merges, how it cuts sentences, and how far
    it compresses text, beside other tokenizers. Returns the facts."""
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    ordinary = [token for index, token in enumerate(tokenizer.token_bytes) if index not in tokenizer.special_ids]
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "highest id": tokenizer.max_id,
        "bos / eos / pad": f"{tokenizer.bos_id} / {tokenizer.eos_id} / {tokenizer.pad_id}",
        "special tokens": ", ".join(f"{tokenizer.token_bytes[i].decode()} {i}" for i in sorted(tokenizer.special_ids)),
        "pattern": tokenizer.pattern,
        "longest tokens": [t.decode("utf-8", "replace") for t in sorted(ordinary, key=len, reverse=True)[:8]],
        "fingerprint": tokenizer.fingerprint,
        "batch encoder": "tiktoken" if tokenizer._rust_encoder() is None else "rust",
    }
    text = _given_text(args)
    if text is not None:
        ids = tokenizer.encode(text)
        size = len(repair(text)[0].encode())
        facts["text"] = f"{size} bytes, {len(ids)} tokens, {size / max(len(ids), 1):.2f} bytes/token"
        facts["ids"] = " ".join(map(str, ids[:100])) + (" ..." if len(ids) > 100 else "")
    for name, value in facts.items():
        print(f"{name:>16}  {value}")
    print(f"\nthe first {args.merges} merges")
    print("\n".join(_merge_table(tokenizer, args.merges)))

    others = [(name, Tokenizer.from_pretrained(name)) for name in [args.tokenizer, *args.compare]]
    width = max(len(name) for name, _ in others)
    print("\nhow sentences fall into tokens")
    for sentence in [text] if text is not None else SENTENCES:
        for name, other in others:
            tokens = [_spelled(other.token_bytes[index]) for index in other.encode(sentence[:400])]
            print(f"{name:>{width}}  {'|'.join(tokens)}")
    files = expand_paths(args.data_path)
    groups = by_language(sample_texts(files, args.sample_mb, args.skip_bad) if files else SENTENCES)
    print("\nUTF-8 bytes per token (more is better); text: " + (" ".join(args.data_path or ["these sentences"])))
    print(f"{'':>{width}}  {'vocabulary':>10}" + "".join(f"{language:>9}" for language in groups))
    facts["bytes per token"] = {}
    for name, other in others:
        row = {language: bytes_per_token(other, texts) for language, texts in groups.items()}
        facts["bytes per token"][name] = row
        print(f"{name:>{width}}  {other.vocab_size:>10,}" + "".join(f"{value:9.2f}" for value in row.values()))
    return facts


def main(args):
    """Run one command. Returns its facts, as every script here does."""
    if args.command == "train":
        return command_train(args)
    if args.command == "inspect":
        return command_inspect(args)
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    if args.command == "encode":
        text = _given_text(args)
        ids = tokenizer.encode(sys.stdin.read() if text is None else text)
        print(*ids)
        return {"ids": ids}
    words = sys.stdin.read().split() if args.ids is None else args.ids
    try:
        ids = [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"standard input: {error}; decode reads whole numbers; separate them by spaces") from None
    text = tokenizer.decode(ids)
    print(text)
    return {"text": text}


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character must not end a run
        stream.reconfigure(errors="replace")
    try:
        main(parse_args())
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader left (head, less): not an error, but Python would complain while closing the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
