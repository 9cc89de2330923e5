"""A folder is read as it was written, and one that does not fit is refused with the likely reason.

    python -m pytest tests/test_weights.py
"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import make_model

from model import Transformer


def test_exported_float_type_is_written_to_the_config(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_model_with_other_weights_is_saved_as_one_of_its_own(model_folder, tmp_path, kind):
    model = Transformer.from_pretrained(model_folder(kind))
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    other = model.with_weights(weights)
    other.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path).state_dict()
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    make_model().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    Transformer.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


# -- What does not fit is refused --------------------------------------------------------------------------------------
def rename(**changes):
    def apply(tensors):
        return {changes.get("prefix", "") + k.removeprefix(changes.get("strip", "")): v for k, v in tensors.items()}
    return apply


@pytest.mark.parametrize("change, message", [
    (lambda t: t | {"score.weight": torch.zeros(1, 48)}, "reward model"),
    (rename(prefix="_orig_mod."), "torch.compile or DDP"), (rename(strip="model."), "lack 'model.'"),
    (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}, "biases"),
    (lambda t: t | {"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}, "about experts"),
    (lambda t: {k: v for k, v in t.items() if "layers.2" not in k}, "num_hidden_layers"),
    (lambda t: t | {"model.norm.weight": torch.zeros(50)}, r"model.norm.weight .* \[50\]; .* \[48\]"),
    (lambda t: t | {"model.norm.weight": torch.zeros(48, dtype=torch.int8)}, "has type I8"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named_with_the_likely_reason(tmp_path, change, message):
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(change(tensors), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_untied_config_with_tied_weights_says_so(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing 1: lm_head.weight; .*tie_word_embeddings"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "huge_header", "noise"])
def test_damaged_weights_are_a_clear_error(tmp_path, damage):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-100], "empty": b"", "huge_header": b"\xff" * 8 + data[8:],
                      "noise": bytes(range(256)) * 10}[damage])
    with pytest.raises(ValueError, match="model.safetensors is not a readable"):
        Transformer.from_pretrained(tmp_path)


def test_missing_files_and_shards_outside_the_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist; "):
        Transformer.from_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist; "):
        Transformer.from_pretrained(tmp_path)
    for names in ({"lm_head.weight": "../elsewhere.safetensors"}, {}, [1]):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(ValueError, match="weight_map"):
            Transformer.from_pretrained(tmp_path)
