"""A GGUF file holds the model and the tokenizer as llama.cpp expects them, or is refused; -m slow runs it there.

    python -m pytest tests/test_export_gguf.py
    MINILLM_LLAMA_PYTHON=python python -m pytest tests/test_export_gguf.py -m slow

MINILLM_LLAMA_PYTHON: an interpreter that has llama-cpp-python; without it the test builds one, which takes long.
"""
import json
import os
import re
import subprocess
import sys
import unicodedata
import venv

import pytest
import torch
from test_ecosystem import CODE, LIVELY, QUESTION, QWEN_TEMPLATE, qwen_files, sizes
from test_model import answers, make_model, random_ids, randomize
from test_tokenizer import CHAT, CHINESE, EMOJI, ENGLISH, split_stage

import checkpoint
import export_gguf
from bpe import GPT2_PATTERN
from model import ScalarHead, Transformer
from tokenizer import Tokenizer

EXPORTED = ["dense", "untied", "yarn", "moe", "shared", "shared_scaled"]
ARCHITECTURES = {"dense": "QWEN3", "untied": "QWEN3", "yarn": "QWEN3", "moe": "QWEN3MOE", "shared": "DOTS1",
                 "shared_scaled": "DOTS1"}


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf", reason="the gguf package is not installed (requirements-dev.txt)")


@pytest.fixture
def folder(tokenizer, tmp_path):
    """folder(kind, **fields) -> Path of a random model with a tokenizer."""
    def made(kind="dense", **fields):
        path = tmp_path / "out" / kind
        randomize(make_model(kind, **sizes(tokenizer), **fields), LIVELY).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path
    return made


def export(folder, *flags):
    return export_gguf.main(export_gguf.parse_args([str(folder), *flags]))


def read(gguf, path):
    """(facts, {name: (storage type, numbers)}) of a file, through the gguf package's reader."""
    reader = gguf.GGUFReader(path)
    found = {t.name: (t.tensor_type.name, torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)))
             for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, found


def expected_tensors(gguf, kind, model):
    """{llama.cpp's name: tensor}, by the table of names that llama.cpp's own converter uses."""
    config, state = model.config, dict(model.state_dict())
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[kind]), config.num_hidden_layers)
    if config.tie_word_embeddings and not config.n_shared_experts:
        del state["lm_head.weight"]
    for name in [n for n in state if ".mlp.experts.0." in n]:
        one = [name.replace(".experts.0.", f".experts.{i}.") for i in range(config.num_experts)]
        state[name.replace(".experts.0.", ".experts.")] = torch.stack([state.pop(n) for n in one])
    groups = config.num_attention_heads // config.num_key_value_heads
    for name in [n for n in state if config.n_shared_experts and re.search("self_attn.[kv]_proj", n)]:
        heads = state[name].split(config.head_dim)
        state[name] = torch.cat([head for head in heads for _ in range(groups)])
    state = {name.replace("e_score_correction_bias", "e_score_correction.bias"): x for name, x in state.items()}
    return {names.get_name(name, try_suffixes=(".weight", ".bias")): x for name, x in state.items()}


# -- The file ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_every_tensor_reads_back(gguf, folder, kind, dtype):
    path = folder(kind, hidden_size=64, intermediate_size=96)
    _, found = read(gguf, export(path, "--dtype", dtype)["file"])
    expected = expected_tensors(gguf, kind, Transformer.from_pretrained(path))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        form, y = found[name]
        assert y.shape == x.shape
        if dtype == "f32" or x.ndim == 1 or "ffn_gate_inp" in name:
            assert form == "F32" and torch.equal(y, x)
        elif dtype == "bf16" or x.shape[-1] % 32:  # experts 40 wide cannot be cut into blocks of 32
            assert form == "BF16" and torch.equal(y, x.bfloat16().float())
        else:
            step = x.unflatten(-1, (-1, 32)).abs().amax(-1) / 127  # of each block
            # half a step of rounding, and the scale itself is rounded to f16, 11 bits
            limit = (step * (0.5 + 127 / 2**11)).repeat_interleave(32, -1)
            assert form == "Q8_0" and ((y - x).abs() <= limit).all()


@pytest.mark.parametrize("kind", EXPORTED)
def test_the_facts_are_the_models(gguf, folder, tokenizer, kind):
    path = folder(kind)
    facts, _ = read(gguf, export(path)["file"])
    c, architecture = Transformer.from_pretrained(path).config, ARCHITECTURES[kind].lower()
    assert facts["general.architecture"] == architecture and facts["general.name"] == kind
    get = {name.removeprefix(f"{architecture}."): value for name, value in facts.items()}
    heads = c.num_attention_heads if architecture == "dots1" else c.num_key_value_heads
    assert [get[name] for name in ("context_length", "embedding_length", "block_count", "feed_forward_length",
            "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
            "rope.freq_base", "vocab_size")] == [c.max_position_embeddings, c.hidden_size, c.num_hidden_layers,
            c.intermediate_size, c.num_attention_heads, heads, c.head_dim, c.head_dim, c.rope_theta, c.vocab_size]
    assert get["attention.layer_norm_rms_epsilon"] == pytest.approx(c.rms_norm_eps)
    if kind in ("yarn", "shared_scaled"):
        assert (get["rope.scaling.type"], get["rope.scaling.factor"], get["rope.scaling.original_context_length"]) == (
            "yarn", 4.0, 32)
    if c.num_experts:
        assert (get["expert_count"], get["expert_used_count"], get["expert_feed_forward_length"]) == (4, 2, 40)
    if architecture == "dots1":
        assert (get["expert_shared_count"], get["leading_dense_block_count"], get["expert_weights_scale"]) == (
            c.n_shared_experts, c.first_k_dense_replace, c.routed_scaling_factor)
        assert get["expert_gating_func"] == gguf.ExpertGatingFuncType.SIGMOID and get["expert_weights_norm"] is True


def test_the_tokenizer_is_whole(gguf, folder, tokenizer):
    facts, _ = read(gguf, export(folder())["file"])
    get = {name.removeprefix("tokenizer.ggml."): value for name, value in facts.items()}
    spec = json.loads(tokenizer.files["tokenizer.json"])
    assert (get["model"], get["pre"], get["add_bos_token"]) == ("gpt2", "llama-bpe", False)
    assert (get["bos_token_id"], get["eos_token_id"], get["padding_token_id"]) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert get["merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]
    ids = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    assert len(get["tokens"]) == len(get["token_type"]) == len(set(get["tokens"])) == tokenizer.vocab_size
    assert all(get["tokens"][i] == text for text, i in ids.items())
    kinds = [gguf.TokenType(kind).name for kind in get["token_type"]]
    assert [i for i, kind in enumerate(kinds) if kind == "CONTROL"] == sorted(tokenizer.special_ids)
    assert [i for i, kind in enumerate(kinds) if kind == "UNUSED"] == sorted(
        set(range(tokenizer.vocab_size)) - set(ids.values()))
    assert kinds.count("NORMAL") == len(spec["model"]["vocab"])


def render(template, messages, prompt=True, bos="<|bos|>"):
    """A template as llama.cpp and transformers set Jinja up, without the tags that only transformers has."""
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=prompt, bos_token=bos)


@pytest.mark.parametrize("messages", [CHAT, CHAT[:2], QUESTION])
def test_the_chat_template_needs_no_tag_of_transformers_and_writes_our_layout(gguf, folder, tokenizer, messages):
    facts, _ = read(gguf, export(folder())["file"])
    template = facts["tokenizer.chat_template"]
    assert "generation %}" not in template.replace("add_generation_prompt", "") and "endgeneration" not in template
    assert render(template, messages) == tokenizer.decode(tokenizer.render(messages, add_generation_prompt=True)[0])


@pytest.mark.parametrize("left", ["{%", "{%-", "{%+"])
@pytest.mark.parametrize("right", ["%}", "-%}"])
def test_white_space_around_a_removed_tag_stays_as_it_was(tokenizer, left, right):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = (f"{{% for m in messages %}}\n  a {left} generation {right}\n {{{{ m.content }}}} \n"
            f"  {left} endgeneration {right}  \n b\n{{% endfor %}}")
    files = tokenizer.files | {"chat_template.jinja": text}
    compiled = transformers.utils.chat_template_utils._compile_jinja_template(text)
    assert render(export_gguf.chat_template(Tokenizer(files)), QUESTION) == compiled.render(messages=QUESTION)


def test_the_modelfile_writes_our_layout_and_stops_where_we_stop(folder, tokenizer):
    path = folder()
    done = export(path)
    text = (path / "dense-f32.Modelfile").read_text(encoding="utf-8")
    assert done["modelfile"] == str(path / "dense-f32.Modelfile") and text.startswith("FROM ./dense-f32.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"\n' in text and "PARAMETER num_ctx 128\n" in text
    template = re.search('TEMPLATE """(.*?)"""', text, re.S)[1]
    head, turn, tail = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", template, re.S).groups()
    turns = "".join(turn.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in QUESTION)
    assert head + turns + tail == tokenizer.decode(tokenizer.render(QUESTION, add_generation_prompt=True)[0])


def test_a_pretrained_model_continues_text_and_holds_no_conversation(gguf, folder, capsys):
    path = folder()
    checkpoint.write_minillm(path, {"stage": "pretrain"})
    done = export(path)
    assert "tokenizer.chat_template" not in read(gguf, done["file"])[0]
    text = (path / "dense-f32.Modelfile").read_text(encoding="utf-8")
    assert 'TEMPLATE """<|bos|>{{ .Prompt }}"""' in text and 'stop "<|bos|>"' in text
    assert re.search(r"next: llama-completion -m \S+ -p '<\|bos\|>", capsys.readouterr().out)


def test_a_qwen_folder_keeps_its_pieces_template_and_token_kinds(gguf, folder, tokenizer):
    path = folder("untied")
    for name, text in qwen_files(tokenizer).items():
        (path / name).write_text(text, encoding="utf-8")
    facts, _ = read(gguf, export(path)["file"])
    assert facts["tokenizer.ggml.pre"] == "qwen2" and facts["tokenizer.chat_template"] == QWEN_TEMPLATE
    assert "tokenizer.ggml.bos_token_id" not in facts and facts["tokenizer.ggml.add_bos_token"] is False
    think = facts["tokenizer.ggml.tokens"].index("<think>")
    assert facts["tokenizer.ggml.token_type"][think] == gguf.TokenType.USER_DEFINED


def test_rows_without_a_token_are_marked_unused(gguf, folder, tokenizer, tmp_path):
    path = tmp_path / "wide"
    make_model("dense", **(sizes(tokenizer) | dict(vocab_size=tokenizer.vocab_size + 5))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    facts, found = read(gguf, export(path)["file"])
    assert len(facts["tokenizer.ggml.tokens"]) == tokenizer.vocab_size + 5 == len(found["token_embd.weight"][1])
    assert facts["tokenizer.ggml.token_type"][-5:] == [gguf.TokenType.UNUSED] * 5


# -- What is refused, and what a failure leaves ------------------------------------------------------------------------
@pytest.mark.parametrize("kind, fields, word", [
    ("geglu", {}, "hidden_act"), ("moe_top1_dense_first", {}, "norm_topk_prob"), ("yarn_given_factor", {}, "factor"),
    ("moe", dict(first_k_dense_replace=1), "first_k_dense_replace"), ("dense", dict(mlp_type="plain"), "mlp_type"),
    ("moe", dict(norm_topk_prob=False), "norm_topk_prob")])
def test_what_llama_cpp_would_compute_differently_is_refused(gguf, folder, kind, fields, word):
    path = folder(kind, **fields)
    with pytest.raises(ValueError, match=f"{word}.*; .*; "):
        export(path)
    assert not list(path.glob("*.gguf*"))


def test_a_tokenizer_that_llama_cpp_cannot_repeat_is_refused(gguf, folder, tokenizer):
    path = folder()
    spec = json.loads(tokenizer.files["tokenizer.json"])
    spec["pre_tokenizer"] = split_stage(r"\p{N}{1,2}|\P{N}+")
    (path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match="split pattern .*; .*llama-bpe.*; .*convert_hf_to_gguf"):
        export(path)
    assert not list(path.glob("*.gguf*"))


def test_tokenizer_of_another_model_is_refused(gguf, folder, tokenizer, tmp_path):
    small = tmp_path / "small"
    make_model("dense").save_pretrained(small)  # 97 rows
    tokenizer.save_pretrained(small)
    with pytest.raises(ValueError, match="token id .* with vocab_size 97; .*; "):
        export(small)


def test_without_the_package_one_line_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="gguf package .*; .*; install it: pip install gguf"):
        export(folder())


def test_a_reward_model_is_refused_in_words_for_a_user(gguf, folder):
    path = folder()
    ScalarHead.from_pretrained(path).save_pretrained(path)
    with pytest.raises(ValueError, match="is a reward model; .*; name another checkpoint"):
        export(path)


def test_a_failed_write_leaves_the_earlier_file(gguf, folder, monkeypatch):
    path = folder()
    export(path)
    before = (path / "dense-f32.gguf").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space"):
        export(path)
    assert (path / "dense-f32.gguf").read_bytes() == before and not list(path.glob("*.tmp"))


def test_files_go_where_they_are_asked_for_and_the_last_line_says_what_is_next(folder, tmp_path, capsys):
    done = export(folder("moe"), "--dtype", "q8_0", "--output", str(tmp_path / "new place" / "m.gguf"))
    assert sorted(p.name for p in (tmp_path / "new place").iterdir()) == ["m.Modelfile", "m.gguf"]
    first, last = capsys.readouterr().out.strip().split("\n")[-2:]
    assert "qwen3moe" in first and f"{done['bytes'] / 1e6:.1f} MB" in first and "q8_0" in first
    assert last.startswith(f"next: llama-cli -m '{tmp_path}/new place/m.gguf'") and "ollama create moe -f" in last
    with pytest.raises(ValueError, match="is a folder"):
        export(folder("moe"), "--output", str(tmp_path))


# -- In llama.cpp itself -----------------------------------------------------------------------------------------------
RUN = """
import json, sys
from llama_cpp import GGML_TYPE_F32, Llama, __version__
asked, out = json.load(open(sys.argv[1])), {"version": __version__, "answers": {}, "ids": {}, "chat": {}}
for path in asked["files"]:
    # f16 keys and values, or another order of sums, turn near-ties of a random model around after a few tokens
    llm = Llama(path, n_ctx=128, n_threads=1, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, flash_attn=False,
                verbose=False)
    answer = []
    for token in llm.generate(asked["prompt"], temp=0.0, repeat_penalty=1.0):
        answer.append(token)
        if len(answer) == asked["count"]:
            break
    out["answers"][path] = answer
    # add_bos asks for one; the file says no
    out["ids"][path] = [llm.tokenize(text.encode(), add_bos=True, special=False) for text in asked["texts"]]
    out["chat"][path] = llm.tokenize(asked["chat"].encode(), add_bos=True, special=True)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def llama_python(tmp_path_factory):
    """An interpreter with llama-cpp-python, built from its source package where none is named."""
    if "MINILLM_LLAMA_PYTHON" in os.environ:
        return os.environ["MINILLM_LLAMA_PYTHON"]
    place = tmp_path_factory.mktemp("llama")
    venv.create(place, with_pip=True)
    python = str(place / ("Scripts" if os.name == "nt" else "bin") / "python")
    options = "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DGGML_OPENMP=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1"
    wanted = ["--no-binary", "llama-cpp-python", "llama-cpp-python>=0.3.16"]
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted],
                   env=os.environ | {"CMAKE_ARGS": options}, check=True, timeout=7200)
    return python


def run_llama(python, tmp_path, files, prompt, texts, chat):
    """What RUN finds out about these files."""
    asked = {"files": files, "prompt": prompt, "count": 64, "texts": texts, "chat": chat}
    (tmp_path / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    run = subprocess.run([python, "-c", RUN, str(tmp_path / "asked.json")], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@torch.no_grad()
def test_llama_cpp_gives_the_same_64_tokens_and_the_same_ids(gguf, folder, tokenizer, llama_python, tmp_path):
    prompt, texts, kinds = random_ids(1, 40)[0].tolist(), [CHINESE, ENGLISH, CODE, EMOJI], {}
    for kind in EXPORTED:
        kinds[export(folder(kind))["file"]] = kind
    rounded = [export(tmp_path / "out" / "dense", "--dtype", dtype)["file"] for dtype in ("bf16", "q8_0")]
    chat, control = tokenizer.render(CHAT)[0], tokenizer.decode(tokenizer.render(CHAT)[0])
    found = run_llama(llama_python, tmp_path, [*kinds, *rounded], prompt, texts, control)
    for file, kind in kinds.items():
        expected = answers(Transformer.from_pretrained(tmp_path / "out" / kind), [prompt], 64, temperature=0)[0]
        assert found["answers"][file] == expected and len(set(expected)) > 4, kind
        assert found["ids"][file] == [tokenizer.encode(text) for text in texts] and found["chat"][file] == chat
    # llama.cpp rounds the activations as well, so these only run; their weights are compared above
    assert all(len(found["answers"][file]) == 64 for file in rounded)


@pytest.mark.slow
def test_llama_cpp_cuts_the_texts_of_other_tokenizers_alike(gguf, tokenizer, llama_python, tmp_path):
    """Qwen's and GPT-2's patterns. Qwen brings text to the form NFC first, which llama.cpp leaves out for it."""
    texts = [CHINESE, ENGLISH, CODE, unicodedata.normalize("NFC", EMOJI), "e\u0301"]
    for name, pattern in (("qwen", None), ("gpt2", GPT2_PATTERN)):
        path = tmp_path / name
        make_model("dense", **sizes(tokenizer)).save_pretrained(path)
        files = qwen_files(tokenizer)
        spec = json.loads(files["tokenizer.json"])
        if pattern:  # the form in which a folder names it: no Split, ByteLevel cuts
            spec |= {"pre_tokenizer": split_stage(None, use_regex=True), "normalizer": None}
        for file, text in (files | {"tokenizer.json": json.dumps(spec)}).items():
            (path / file).write_text(text, encoding="utf-8")
        file, ours = export(path)["file"], Tokenizer.from_pretrained(path)
        assert pattern in (None, ours.pattern)
        ids = run_llama(llama_python, tmp_path, [file], [5, 6], texts, "")["ids"][file]
        assert ids[:4] == [ours.encode(text) for text in texts[:4]]
        assert (ids[4] == ours.encode(texts[4])) == (name == "gpt2"), "docs/ecosystem.md tells of NFC"
