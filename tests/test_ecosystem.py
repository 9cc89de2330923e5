"""What other programs are promised, and what hostile folders are denied; one test each, read from top to bottom.

    python -m pytest tests/test_ecosystem.py
    MINILLM_TRANSFORMERS4=DIR python -m pytest tests/test_ecosystem.py -m slow

DIR: where "pip install --target DIR transformers==4.57.6" went; without it the test installs it itself. Gradients and
merges of adapters against peft are in test_lora.py, GGUF files in test_export_gguf.py.
"""
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_model import KINDS, answers, make_model, random_ids, randomize
from test_tokenizer import CHAT, CHINESE, EMOJI, ENGLISH, any_text, split_stage

import checkpoint
import eval as evaluation
import lora
from bpe import PATTERN
from model import ScalarHead, Transformer
from tokenizer import SPECIALS, Tokenizer

ROOT = Path(__file__).parent.parent
CODE = "def f(x: int = 10_000) -> str:\n\treturn f\"{x!r:>8}\\n\" if x != 0x1F else None  # 100%\r\n\n\n    pass\n"
CLASSES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "dots1": "Dots1ForCausalLM"}
QWEN_PATTERN = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN_TEMPLATE = ("{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
                 "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
QUESTION = [{"role": "user", "content": "What is 2 + 3? 答案是？"}]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")


# Spread of random weights with which a model of three layers says dozens of different words; with test_model.py's 0.08
# it says two or three over and over, and equal answers would prove little.
LIVELY = 0.2


def sizes(tokenizer):
    """Fields of a ModelConfig that belong to this tokenizer, and a theta that is nobody's default."""
    return dict(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.pad_id, rope_theta=5e5)


def make_head(kind, tokenizer):
    return randomize(ScalarHead(make_model(kind, **sizes(tokenizer)).config)).eval()


@pytest.fixture(scope="module")
def ours(tokenizer, tmp_path_factory):
    """ours(kind) -> folder of a model of ours with random weights and a tokenizer. Kinds: those of test_model.py;
    "reward dense" and "reward moe" are score heads; "adapter" is a dense model that holds adapters in adapter/."""
    made = {}

    def folder(kind):
        if kind not in made:
            path = made[kind] = tmp_path_factory.mktemp("ours") / kind.replace(" ", "_")
            if kind.startswith("reward "):
                make_head(kind.split()[1], tokenizer).save_pretrained(path)
            else:
                model = make_model("dense" if kind == "adapter" else kind, **sizes(tokenizer))
                randomize(model, LIVELY).save_pretrained(path)
            tokenizer.save_pretrained(path)
        if kind == "adapter" and not (path := made[kind] / "adapter").exists():
            adapters = lora.Adapters(Transformer.from_pretrained(made[kind]), 4, 12, [], base=made[kind])
            randomize(torch.nn.ParameterList(adapters.state_dict().values()))
            adapters.save_adapters(path)
        return made[kind]

    return folder


def open_ours(folder):
    """The model of a folder as this project opens it, adapters included."""
    model = Transformer.from_pretrained(folder)
    if folder.name == "adapter":
        lora.Adapters.from_pretrained(model, folder / "adapter")
    return model.eval()


def open_theirs(transformers, folder, kind="AutoModelForCausalLM"):
    """The same in transformers; a missing or unexpected key fails."""
    model, report = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), f"transformers reports {report}"
    if folder.name == "adapter":
        peft = pytest.importorskip("peft", reason="peft is not installed (requirements-dev.txt)")
        model = peft.PeftModel.from_pretrained(model, folder / "adapter")
        stored = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert peft.get_peft_model_state_dict(model).keys() == stored.keys()
    return model.eval()


# -- Our folders in transformers and peft ------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [*KINDS, "adapter"])
@torch.no_grad()
def test_model_opens_without_missing_keys_and_gives_the_same_logits(transformers, ours, kind):
    model, theirs, ids = open_ours(ours(kind)), open_theirs(transformers, ours(kind)), random_ids(2, 70)
    if kind != "adapter":
        assert type(theirs).__name__ == CLASSES[model.config.model_type]
    expected = theirs(ids).logits
    assert (model(ids) - expected).abs().max() < 1e-4 and expected.abs().max() > 1


@pytest.mark.parametrize("kind", ["dense", "yarn", "moe", "shared", "adapter"])
def test_greedy_generation_is_the_same(transformers, ours, kind):
    model, theirs = open_ours(ours(kind)), open_theirs(transformers, ours(kind))
    stop, varied = model.config.eos_token_id, 0
    for seed in range(4):
        prompt = random_ids(1, 9 + seed, seed=seed)
        found = answers(model, prompt.tolist(), 32, temperature=0, stop_ids={stop})[0]
        expected = theirs.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32,
                                   do_sample=False, temperature=None, top_p=None)
        assert found == expected[0, prompt.shape[1]:].tolist()
        varied = max(varied, len(set(found)))
    assert varied > 4


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.no_grad()
def test_reward_model_opens_as_a_classifier_with_the_same_scores(transformers, ours, tokenizer, kind):
    folder = ours(f"reward {kind}")
    head, pad = ScalarHead.from_pretrained(folder), tokenizer.pad_id
    theirs = open_theirs(transformers, folder, "AutoModelForSequenceClassification")
    assert theirs.config.num_labels == 1
    ids, lengths = random_ids(3, 12), torch.tensor([12, 5, 8])
    ids[torch.arange(12) >= lengths[:, None]] = pad
    expected = theirs(ids, attention_mask=(ids != pad).long()).logits[:, 0]
    assert (head(ids, lengths) - expected).abs().max() < 1e-5 and expected.abs().max() > 0.1


@pytest.fixture(scope="module")
def their_tokenizer(transformers, ours):
    return transformers.AutoTokenizer.from_pretrained(ours("dense"))


@pytest.mark.parametrize("text", [CHINESE, ENGLISH, CODE, EMOJI, "", "\n", "1234567"])
def test_ids_are_the_same(tokenizer, their_tokenizer, text):
    assert set(their_tokenizer(text)) == {"input_ids", "attention_mask"}
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    assert their_tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_ids_of_any_unicode_are_the_same(tokenizer, their_tokenizer, text):
    ids = tokenizer.encode(text)
    # hypothesis also tries strings of the source code, markers among them
    assert their_tokenizer(text, split_special_tokens=True)["input_ids"] == ids and their_tokenizer.decode(ids) == text


@pytest.mark.parametrize("messages, prompt", [(CHAT, False), (CHAT[:2], True), (CHAT[1:4], False)])
def test_chat_template_gives_our_renderers_ids_and_mask(tokenizer, their_tokenizer, messages, prompt):
    ids, mask = tokenizer.render(messages, add_generation_prompt=prompt)
    text = their_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert text == tokenizer.decode(ids)
    theirs = their_tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True,
                                                 return_assistant_tokens_mask=True)
    assert theirs["input_ids"] == ids and theirs["assistant_masks"] == mask


@pytest.mark.parametrize("marker", SPECIALS)
def test_typed_markers_are_the_one_difference_and_can_be_switched_off(tokenizer, their_tokenizer, marker):
    """Who types a marker writes text here and a control token there: docs/ecosystem.md."""
    messages = [{"role": "user", "content": f"what is {marker}?"}]
    special = tokenizer.special_ids
    ids, _ = tokenizer.render(messages)
    theirs = their_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == their_tokenizer.decode(theirs)
    assert sum(i in special for i in ids) == 3 and sum(i in special for i in theirs) == 4
    text = messages[0]["content"]
    assert their_tokenizer(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)


def test_ids_of_the_controls_are_the_same(tokenizer, their_tokenizer, ours):
    assert (their_tokenizer.bos_token_id, their_tokenizer.eos_token_id, their_tokenizer.pad_token_id) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    generation = json.loads((ours("dense") / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)


OLD = """
import json, os, sys, torch, transformers
from safetensors.torch import load_file
out = {"version": transformers.__version__, "difference": {}, "keys": {}}
for folder in sys.argv[2:]:
    score = "reward" in folder
    auto = transformers.AutoModelForSequenceClassification if score else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    ours = load_file(os.path.basename(folder) + ".safetensors")
    with torch.no_grad():
        logits = model.eval()(ours["ids"]).logits
    out["difference"][folder] = (logits - ours["logits"]).abs().max().item()
    out["keys"][folder] = sorted(str(v) for v in report.values() if v)
    if not score:
        generated = model.generate(input_ids=ours["ids"][:1], attention_mask=torch.ones_like(ours["ids"][:1]),
                                   max_new_tokens=16, do_sample=False, temperature=None, top_p=None)
        out["keys"][folder] += [] if generated[0, 70:].tolist() == ours["answer"].tolist() else ["another answer"]
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
texts = json.loads(sys.argv[1])
out["ids"] = [tokenizer(text)["input_ids"] for text in texts["texts"]]
chat = tokenizer.apply_chat_template(texts["chat"], return_dict=True, return_assistant_tokens_mask=True)
out["chat"] = [chat["input_ids"], chat["assistant_masks"], sorted(tokenizer("x"))]
print(json.dumps(out))
"""


@pytest.mark.slow
@torch.no_grad()
def test_transformers_4_57_gives_the_same(ours, tokenizer, tmp_path):
    """An older transformers lies over this environment, which lends it torch; it runs in a process of its own."""
    overlay = os.environ.get("MINILLM_TRANSFORMERS4")
    if overlay is None:
        overlay = str(tmp_path / "overlay")
        wanted = ["transformers==4.57.6", "tokenizers>=0.22,<=0.23.0", "huggingface_hub>=0.34,<1"]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", overlay, *wanted],
                       check=True, timeout=600)
    folders, ids = [], random_ids(2, 70)
    for kind in ("dense", "untied", "yarn", "moe", "shared", "reward dense", "reward moe"):
        folders.append(str(ours(kind)))
        if kind.startswith("reward"):
            head = ScalarHead.from_pretrained(ours(kind))
            expected = {"logits": head(ids, torch.tensor([70, 70]))[:, None]}
        else:
            model = Transformer.from_pretrained(ours(kind))
            answer = answers(model, ids[:1].tolist(), 16, temperature=0, stop_ids={model.config.eos_token_id})[0]
            expected = {"logits": model(ids), "answer": torch.tensor(answer)}
        save_file(expected | {"ids": ids}, tmp_path / f"{ours(kind).name}.safetensors")
    texts = [CHINESE, ENGLISH, CODE, EMOJI]
    run = subprocess.run([sys.executable, "-c", OLD, json.dumps({"texts": texts, "chat": CHAT}), *folders],
                         env=os.environ | {"PYTHONPATH": overlay}, cwd=tmp_path, capture_output=True, text=True,
                         timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["version"].startswith("4.57")
    assert not any(found["keys"].values()) and max(found["difference"].values()) < 1e-4
    assert found["ids"] == [tokenizer.encode(text) for text in texts]
    assert found["chat"] == [*map(list, tokenizer.render(CHAT)), ["attention_mask", "input_ids"]]


# -- Folders of transformers here --------------------------------------------------------------------------------------
def qwen_files(tokenizer):
    """A tokenizer as Qwen publishes its own: one digit a piece, NFC, <think> not special, no bos, a template of its
    own, eos beside the end of a turn."""
    spec = json.loads(tokenizer.files["tokenizer.json"])
    spec |= {"pre_tokenizer": split_stage(QWEN_PATTERN), "normalizer": {"type": "NFC"}}
    spec["model"]["ignore_merges"] = False
    for token in spec["added_tokens"]:
        token["special"] = "think" not in token["content"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
              "pad_token": "<|pad|>", "model_input_names": ["input_ids", "attention_mask"], "add_prefix_space": False,
              "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(spec, ensure_ascii=False), "tokenizer_config.json": json.dumps(config),
            "chat_template.jinja": QWEN_TEMPLATE}


@pytest.fixture(scope="module")
def foreign(transformers, tokenizer, tmp_path_factory):
    """foreign(kind) -> folder that transformers wrote: bf16 weights in shards, head not tied, Qwen's kind of
    tokenizer."""
    made = {}

    def folder(kind):
        if kind not in made:
            shape = dict(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, intermediate_size=64, max_position_embeddings=256,
                         tie_word_embeddings=False, eos_token_id=[tokenizer.eos_id, tokenizer.bos_id],
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6})
            if kind == "qwen3":
                model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
            else:
                shape |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
                model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape))
            path = made[kind] = tmp_path_factory.mktemp("foreign") / kind
            randomize(model, LIVELY).to(torch.bfloat16).save_pretrained(path, max_shard_size="40KB")
            assert (path / "model.safetensors.index.json").is_file() and len(list(path.glob("*.safetensors"))) > 1
            for name, text in qwen_files(tokenizer).items():
                (path / name).write_text(text, encoding="utf-8")
        return made[kind]

    return folder


each_foreign = pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])


@each_foreign
@torch.no_grad()
def test_their_model_gives_the_same_logits_here(transformers, foreign, kind):
    model, theirs, ids = Transformer.from_pretrained(foreign(kind)), open_theirs(transformers, foreign(kind)), (
        random_ids(2, 60))
    assert model.config.rope_theta == 1e6 and isinstance(model.config.eos_token_id, tuple)
    expected = theirs(ids).logits
    assert (model(ids) - expected).abs().max() < 1e-4 and expected.abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_our_model_comes_back_from_their_save(transformers, ours, tmp_path, kind):
    """They write the new spelling of config.json only, and shards."""
    model, ids = Transformer.from_pretrained(ours(kind)), random_ids(2, 40)
    open_theirs(transformers, ours(kind)).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back = Transformer.from_pretrained(tmp_path)
    assert back.config == model.config and torch.equal(back(ids), model(ids))


@pytest.fixture(scope="module")
def qwen_tokenizers(transformers, foreign):
    return Tokenizer.from_pretrained(foreign("qwen3")), transformers.AutoTokenizer.from_pretrained(foreign("qwen3"))


@pytest.mark.parametrize("text", [CHINESE, ENGLISH, CODE, EMOJI, "1234567"])
def test_their_tokenizer_gives_the_same_ids_here(qwen_tokenizers, text):
    ours, theirs = qwen_tokenizers
    assert ours.encode(text) == theirs(text)["input_ids"]


@settings(max_examples=100, deadline=None)
@given(text=any_text)
def test_their_tokenizer_gives_the_same_ids_of_any_unicode_here(qwen_tokenizers, text):
    assume(not any(marker in text for marker in SPECIALS))
    ours, theirs = qwen_tokenizers
    assert ours.encode(text) == theirs(text)["input_ids"]


@each_foreign
def test_eval_answers_with_their_model_as_generate_does(transformers, foreign, kind):
    folder = foreign(kind)
    args = evaluation.parse_args(["--weight", str(folder), "--prompt", QUESTION[0]["content"], "--temperature", "0",
                                  "--max_new_tokens", "12", "--device", "cpu", "--dtype", "float32", "--threads", "1"])
    answer = evaluation.main(args)["answer"]
    theirs, tokenizer = open_theirs(transformers, folder), transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    assert answer == tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("flags", [[], ["--lora_rank", "2"]], ids=["all weights", "adapters"])
@each_foreign
def test_their_model_is_trained_here_and_goes_back(transformers, foreign, stage, tmp_path, kind, flags):
    module, argv = stage("train_sft", "--dtype", "float32", "--max_steps", "2", *flags, parent=foreign(kind))
    module.main(module.parse_args(argv))
    out, ids = tmp_path / "out" / "run", random_ids(1, 24)
    assert (out / "chat_template.jinja").read_text() == QWEN_TEMPLATE
    before, after = Transformer.from_pretrained(foreign(kind))(ids), Transformer.from_pretrained(out)(ids)
    assert (after - open_theirs(transformers, out)(ids).logits).abs().max() < 1e-4
    assert (after - before).abs().max() > 1e-4, "two steps changed nothing"
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    expected = theirs.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert Tokenizer.from_pretrained(out).render(QUESTION, add_generation_prompt=True)[0] == expected


# -- Safe by default ---------------------------------------------------------------------------------------------------
ODD = [None, True, -1, 0, 0.5, 10**30, -10**400, 1e308, float("nan"), float("inf"), "", "x", "../../../etc/passwd",
       "\0", [], [[]], [1, "x"], {}, {"a": [1]}]


def opens_or_explains(open_folder):
    """Open, or raise what a person can act on: a ValueError or FileNotFoundError in three parts. Returns whether it
    opened."""
    try:
        open_folder()
        return True
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError), repr(error)
        assert str(error).count("; ") >= 2, error
        return False


@pytest.fixture
def victim(ours, tmp_path):
    """victim(kind) -> tmp_path/victim, a copy of a folder of ours, to be damaged."""
    return lambda kind="dense": Path(shutil.copytree(ours(kind), tmp_path / "victim"))


@pytest.mark.parametrize("kind", ["dense", "moe", "shared"])
def test_no_value_in_config_does_more_than_a_message(victim, kind):
    folder = victim(kind)
    path = folder / "config.json"
    config, opened = json.loads(path.read_text()), 0
    for number, key in enumerate([*config, "quantization_config", "layer_types", "auto_map"]):
        for value in ODD[number % 4::4]:
            path.write_text(json.dumps(config | {key: value}))
            opened += opens_or_explains(lambda: Transformer.from_pretrained(folder))
    assert opened > len(config), "fields that this model does not read may hold anything"


@pytest.mark.parametrize("fields", [dict(num_hidden_layers=1024, num_experts=1024), dict(num_hidden_layers=1024)])
def test_a_config_that_asks_for_a_million_modules_is_refused_before_they_are_built(victim, fields):
    folder = victim("moe")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"num_local_experts": fields.get("num_experts", 4)} | fields
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_hidden_layers=1024.*; .*tensors.*; "):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "nul\0", "[" * 100_000, '{"a":' * 100_000, "[]", "3", '"x"', "NaN", "{" * 3,
                                  "\ufeff{}", '{"x": ' + "9" * 5000 + "}", "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json",
                                  "model.safetensors.index.json"])
def test_files_that_are_no_json_object_are_named(victim, name, text):
    folder = victim()
    if name.startswith("model"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    kind = Tokenizer if name.startswith("tokenizer") else Transformer
    if not opens_or_explains(lambda: kind.from_pretrained(folder)):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(name)):
            kind.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "a/b.safetensors", "..", ".", "", 3,
                                  "a\\..\\b", None, ["x"], "pytorch_model.bin", "\0.safetensors"])
def test_an_index_opens_no_file_outside_its_folder(victim, tmp_path, name):
    folder, secret = victim(), tmp_path / "secret.safetensors"
    (folder / "model.safetensors").rename(secret)  # a whole model lies there: it would open
    name = str(secret) if name == "/secret.safetensors" else name
    names = dict.fromkeys(load_file(secret), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert not opens_or_explains(lambda: Transformer.from_pretrained(folder))


def test_a_tensor_in_two_shards_and_a_missing_shard_are_refused(victim):
    folder = victim()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part in ("a", "b"):
        save_file(tensors, folder / f"{part}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{'ab'[n % 2]}.safetensors" for n, name in enumerate(tensors)}}))
    with pytest.raises(ValueError, match=r"\S+weight is in .*a.safetensors and .*b.safetensors; .*; "):
        Transformer.from_pretrained(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="b.safetensors does not exist; .*; "):
        Transformer.from_pretrained(folder)


def header_of(data):
    """(header of a safetensors file as a dict, what follows it)."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + size]), data[8 + size:]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_no_header_of_a_weight_file_does_more_than_a_message(ours, tmp_path_factory, draw):
    """Bytes changed, the file cut, another header length, fields of another type or size, entries gone or doubled."""
    data = (ours("dense") / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    damage = draw.draw(st.sampled_from(["flip", "cut", "length", "field", "entry"]))
    if damage == "flip":
        place, bit = draw.draw(st.integers(0, size + 7)), draw.draw(st.integers(0, 7))
        data = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1:]
    elif damage == "cut":
        data = data[:draw.draw(st.integers(0, len(data) - 1))]
    elif damage == "length":
        data = struct.pack("<Q", draw.draw(st.integers(0, 2**64 - 1))) + data[8:]
    else:
        header, body = header_of(data)
        name = draw.draw(st.sampled_from(sorted(header)))
        if damage == "field":
            field = draw.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            header[name][field] = draw.draw(st.sampled_from([*ODD, [2**63] * 2, [-1], "F8_E4M3", "BOOL", [0, 10**12]]))
        else:
            entry = header.pop(name)
            header |= draw.draw(st.sampled_from([{}, {"": entry}, {f"../{name}": entry}, {name: entry, "2": entry}]))
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + body
    folder = tmp_path_factory.getbasetemp() / "hostile_header"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((ours("dense") / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(data)
    opens_or_explains(lambda: Transformer.from_pretrained(folder))


def places(value, path=()):
    """Paths of keys and indices to every part of a JSON value; of what has many parts only to the first two."""
    yield path
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, item in items if len(items) <= 15 else items[:2]:
        yield from places(item, (*path, key))


def replaced(value, path, new):
    """A copy of a JSON value with another thing at a place."""
    if not path:
        return new
    value = value.copy()
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_no_value_in_a_tokenizer_does_more_than_a_message(tokenizer, tmp_path, name):
    """Every place of the two files takes every fourth odd value, beginning with another."""
    value = json.loads(tokenizer.files[name])
    tokenizer.save_pretrained(tmp_path)
    opened = []
    for number, path in enumerate(places(value)):
        for odd in ODD[number % 4::4]:
            (tmp_path / name).write_text(json.dumps(replaced(value, path, odd)))
            if opens_or_explains(lambda: opened.append(Tokenizer.from_pretrained(tmp_path))):
                assert opened[-1].decode(opened[-1].encode(CODE)) == CODE, "what opens loses no text"
    assert opened, "fields that this reader does not need may hold anything"


@pytest.mark.parametrize("change", [
    lambda spec: spec["model"]["vocab"].update({"zzz": 2**40}), lambda spec: spec["model"]["vocab"].update({"zz": 5}),
    lambda spec: spec["model"]["merges"].append("a"), lambda spec: spec["model"]["merges"].append(["a", "b", "c"]),
    lambda spec: spec["added_tokens"][0].update({"id": 5}), lambda spec: spec["added_tokens"][0].update({"id": 2**40}),
    lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update({"pattern": {"Regex": "("}}),
])
def test_a_tokenizer_with_impossible_ids_or_merges_is_refused(tokenizer, tmp_path, change):
    tokenizer.save_pretrained(tmp_path)
    spec = json.loads(tokenizer.files["tokenizer.json"])
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert not opens_or_explains(lambda: Tokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("key", ["files", "crc32", "stage", None])
@pytest.mark.parametrize("odd", ODD)
def test_no_value_in_minillm_json_does_more_than_a_message(victim, key, odd):
    folder = victim()
    (folder / "minillm.json").write_text(json.dumps(odd if key is None else {"stage": "sft", key: odd}))
    opens_or_explains(lambda: checkpoint.find("out", str(folder)))


@pytest.mark.parametrize("name", ["../secret", "inner/../../secret", "/secret"])
def test_checksums_are_taken_inside_the_folder_only(victim, tmp_path, name):
    folder, secret = victim(), tmp_path / "secret"
    secret.write_text("12345")
    facts = {"stage": "sft", "files": {str(secret) if name == "/secret" else name: 4}}
    (folder / "minillm.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="outside") as error:
        checkpoint.find("out", str(folder))
    assert "5 bytes" not in str(error.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_no_adapter_does_more_than_a_message(ours, tmp_path, name):
    source = ours("adapter") / "adapter"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (source / name).read_bytes()
    if name.endswith("json"):
        contents = [json.dumps(replaced(json.loads(data), path, odd)).encode()
                    for number, path in enumerate(places(json.loads(data))) for odd in ODD[number % 4::4]]
    else:
        contents = [data[:n] for n in (0, 7, 8, 100, len(data) - 1)] + [b"\xff" * 8 + data[8:]]
    for content in contents:
        (tmp_path / name).write_bytes(content)
        model = Transformer.from_pretrained(ours("dense"))
        opens_or_explains(lambda: lora.Adapters.from_pretrained(model, tmp_path))  # noqa: B023 - called at once


def test_code_and_pickles_beside_the_model_are_never_touched(victim, tokenizer):
    """auto_map names code to run, *.bin and *.pt hold pickles, a template may hold a program: all three stay data."""
    folder, mark = victim(), "executed"
    program = f"open({str(folder / mark)!r}, 'w')"
    (folder / "modeling.py").write_text(program)
    pickle = f"cbuiltins\nexec\n(V{program}\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin"):
        (folder / name).write_bytes(pickle)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('touch " + mark + "') }}")
    Transformer.from_pretrained(folder)
    Tokenizer.from_pretrained(folder).render(QUESTION)
    (folder / "model.safetensors").unlink()
    assert not opens_or_explains(lambda: Transformer.from_pretrained(folder))
    assert not (folder / mark).exists() and not (ROOT / mark).exists() and "modeling" not in sys.modules


@pytest.mark.parametrize("content", ["[]", "{", '{"architectures": 3}', '{"architectures": [3]}'])
def test_scripts_answer_a_hostile_folder_with_one_message(victim, content):
    folder = victim()
    (folder / "config.json").write_text(content)
    args = evaluation.parse_args(["--weight", str(folder), "--prompt", "x", "--device", "cpu", "--threads", "1",
                                  "--dtype", "float32"])
    assert not opens_or_explains(lambda: evaluation.main(args))
