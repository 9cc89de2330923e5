"""A configuration names its bad fields, and reads and writes every spelling of config.json.

    python -m pytest tests/test_configuration.py
"""
import json
import math

import pytest
import torch
from test_model import EXPERTS, KINDS, SHAPE, YARN, make_model, random_ids

from configuration import ModelConfig
from model import Transformer
from weights import SkipInit


@pytest.mark.parametrize("name, count", [("nano", 1_672_832), ("tiny", 6_361_088), ("small", 25_830_912),
                                         ("base", 104_034_048), ("moe", 145_031_040)])
def test_preset_sizes_are_pinned(name, count):
    with torch.device("meta"), SkipInit():
        assert Transformer(ModelConfig.preset(name)).num_parameters() == count


def test_preset_at_another_width_gets_that_widths_mlp():
    config = ModelConfig.preset("tiny", hidden_size=128, dropout=None)
    assert (config.intermediate_size, config.head_dim, config.dropout) == (384, 32, 0.0)


@pytest.mark.parametrize("fields", [
    dict(hidden_size=50, head_dim=None), dict(num_key_value_heads=4), dict(vocab_size=0), dict(hidden_size="48"),
    dict(num_hidden_layers=10**9), dict(head_dim=15), dict(hidden_act="relu"), dict(rms_norm_eps=math.nan),
    dict(num_experts=2, num_experts_per_tok=3), dict(n_shared_experts=1), dict(pad_token_id=97), dict(dropout=1.5),
    dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), dict(tie_word_embeddings="yes"),
    dict(num_experts=1, num_experts_per_tok=1, n_shared_experts=1), dict(eos_token_id=[1, -1]), dict(mlp_type="moe"),
    dict(rope_scaling={"rope_type": "yarn", "factor": "4"}), dict(mlp_type="plain", **EXPERTS),
])  # fmt: skip
def test_bad_configuration_names_field_rule_and_fix(fields):
    with pytest.raises(ValueError, match=rf"(?s){list(fields)[0]}.*; .*; ") as error:
        ModelConfig(**(SHAPE | fields))
    assert error.value.args[0].count(";") >= 2


def test_unknown_preset_and_field_are_refused():
    for name, fields in (("huge", {}), ("tiny", {"hiden_size": 8})):
        with pytest.raises(ValueError, match="hiden_size|huge"):
            ModelConfig.preset(name, **fields)


# -- config.json -------------------------------------------------------------------------------------------------------
def test_config_holds_both_spellings():
    dense, moe, shared = (ModelConfig(**(SHAPE | KINDS[kind])).to_dict() for kind in ("yarn", "moe", "shared"))
    assert dense["rope_theta"] == dense["rope_parameters"]["rope_theta"] and "num_experts" not in dense
    assert dense["rope_scaling"]["factor"] == dense["rope_parameters"]["factor"] == 4.0
    assert moe["num_experts"] == moe["num_local_experts"] == 4 and moe["norm_topk_prob"] is True
    assert moe["decoder_sparse_step"] == 1 and moe["mlp_only_layers"] == []
    assert shared["n_routed_experts"] == 4 and shared["n_group"] == shared["topk_group"] == 1
    assert shared["first_k_dense_replace"] == 0 and "head_dim" in shared


def test_config_written_by_transformers_4_is_understood(tmp_path):
    model, ids = make_model("yarn", rope_theta=5e5), random_ids(1, 60)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "dtype"):  # what 4.x does not write
        del config[key]
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(Transformer.from_pretrained(tmp_path)(ids), model(ids))


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"rope_scaling": YARN}])
def test_spellings_that_contradict_each_other_are_refused(change):
    raw = ModelConfig(**SHAPE).to_dict()
    assert ModelConfig.from_dict(raw) == ModelConfig(**SHAPE)
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*; rope_parameters beside it says .*; change both"):
        ModelConfig.from_dict(raw | change)


@pytest.mark.parametrize("content", [
    "", "{", "[1, 2]", "[" * 100_000, '{"model_type": "llama"}', '{"model_type": ["qwen3"]}', '{"model_type": "qwen3"}',
    dict(hidden_size="big"), dict(num_hidden_layers=10**12), dict(rope_parameters=5), dict(layer_types=7),
    dict(attention_bias=True), dict(use_sliding_window=True), dict(quantization_config={"bits": 4}),
    dict(rope_parameters={"rope_type": "llama3", "factor": 8}), dict(vocab_size=[97]), dict(hidden_act=["silu"]),
    dict(layer_types=["sliding_attention"]), dict(rms_norm_eps=float("nan")), dict(mlp_only_layers=3),
    dict(eos_token_id="two"), dict(num_hidden_layers=-1), dict(hidden_size=96, intermediate_size=2**20),
])  # fmt: skip
def test_broken_config_is_a_clear_error(tmp_path, content):
    make_model().save_pretrained(tmp_path)
    if isinstance(content, dict):
        content = json.dumps(json.loads((tmp_path / "config.json").read_text()) | content)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=";"):
        Transformer.from_pretrained(tmp_path)
