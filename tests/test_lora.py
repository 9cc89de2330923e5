"""Proves that adapters compute, learn, merge and are stored as peft's do, and what a run with them leaves behind.

    python -m pytest tests/test_lora.py
"""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import lora
from configuration import ModelConfig
from model import Transformer

SHAPE = dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
             head_dim=16, intermediate_size=80, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
             pad_token_id=3)
KINDS = {"dense": {}, "moe": dict(num_experts=4, moe_intermediate_size=32),
         "shared": dict(num_experts=4, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1)}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="peft is not installed (requirements-dev.txt)")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")


def randomize(module, seed=0):
    """Numbers in every parameter: zeros would hide wrong names and wrong scales."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            spread = 1.0 if p.ndim > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator) * spread * max(p.shape[-1], 1) ** -0.5 + (p.ndim == 1))
    return module


@pytest.fixture
def base(tmp_path):
    """base(kind) -> folder of a random model."""
    def made(kind="dense"):
        randomize(Transformer(ModelConfig(**(SHAPE | KINDS[kind])))).save_pretrained(tmp_path / kind)
        return tmp_path / kind
    return made


def adapted(folder, *targets, dtype=torch.float32, rank=4, alpha=12, random=True, **options):
    """(model, Adapters) on a base folder; random: A and B hold numbers, as after a training."""
    model = Transformer.from_pretrained(folder, dtype=dtype)
    adapters = lora.Adapters(model, rank, alpha, targets, base=folder, **options)
    if random:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in adapters.state_dict().values():
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return model, adapters


def random_ids(rows=2, tokens=20):
    return torch.randint(97, (rows, tokens), generator=torch.Generator().manual_seed(2))


def loss_of(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def close(a, b, tolerance):
    """Equal up to `tolerance` of the larger one's size."""
    return (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


# -- Equal to peft -----------------------------------------------------------------------------------------------------
def theirs_of(peft, transformers, base, folder):
    """peft's model: the base opened by transformers, the adapters by peft, ready to train. A missing or unknown tensor
    is an error."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, folder, is_trainable=True)
    stored = peft.get_peft_model_state_dict(model)
    file = load_file(folder / "adapter_model.safetensors")
    assert stored.keys() == file.keys() and all(torch.equal(stored[name], file[name]) for name in file)
    return model


@pytest.mark.parametrize("kind, targets", [("dense", []), ("dense", ["q_proj", "v_proj"]), ("moe", []),
                                           ("dense", ["layers.1.mlp.up_proj"]), ("shared", [])])
def test_logits_gradients_and_merged_weights_equal_peft(peft, transformers, base, tmp_path, kind, targets):
    """In fp32: transformers turns angles and norms in fp32 also in a float64 model. The layer alone stands below."""
    folder, ids = base(kind), random_ids()
    model, adapters = adapted(folder, *targets)
    adapters.save_adapters(tmp_path / "adapter")
    theirs = theirs_of(peft, transformers, folder, tmp_path / "adapter")
    logits, expected = model(ids), theirs(ids).logits
    assert not close(Transformer.from_pretrained(folder)(ids), expected, 1e-2), "the adapters matter"
    assert close(logits, expected, 1e-5)
    loss_of(logits, ids).backward()
    loss_of(expected, ids).backward()
    grads = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    ours = {lora.PREFIX + name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == ours.keys() and len(ours) == 2 * len(adapters.names)
    assert all(close(ours[name], grads[name], 1e-5) and grads[name].abs().max() > 1e-4 for name in grads)
    merged = theirs.merge_and_unload().state_dict()
    for name in adapters.names:
        weight = adapters.merged().get_submodule(name).weight
        assert close(weight, merged[f"{name}.weight"], 1e-5)
    with torch.no_grad():
        assert close(adapters.merged()(ids), expected, 1e-5)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES, ids=["fp32", "fp64"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layer_equals_pefts_layer(peft, dtype, tolerance, dropout):
    """One layer alone, also with dropout from the same random state: here float64 is float64 on both sides."""
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(24, 40, bias=False, dtype=dtype), torch.randn(3, 7, 24, dtype=dtype)
    config = peft.LoraConfig(r=5, lora_alpha=15, lora_dropout=dropout, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(plain), config, autocast_adapter_dtype=False).to(dtype)
    layer = theirs.base_model.model[0]
    ours = lora.LoRALinear(plain, 5, 15, dropout)
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            weight = torch.randn_like(getattr(ours, name).weight)
            getattr(ours, name).weight.copy_(weight)
            getattr(layer, name)["default"].weight.copy_(weight)
    outputs = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        outputs.append(module.train()(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(getattr(ours, name).weight.grad, getattr(layer, name)["default"].weight.grad,
                                   rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(ours.merged_weight(), layer.weight + layer.get_delta_weight("default"),
                               rtol=tolerance, atol=tolerance)


def test_first_numbers_are_drawn_as_pefts(peft):
    plain = torch.nn.Linear(400, 300, bias=False)
    theirs = peft.get_peft_model(torch.nn.Sequential(plain), peft.LoraConfig(r=64, target_modules=["0"]))
    theirs, ours = theirs.base_model.model[0], lora.LoRALinear(plain, 64, 64)
    assert not ours.lora_B.weight.any() and not theirs.lora_B["default"].weight.any()
    a, expected = ours.lora_A.weight, theirs.lora_A["default"].weight
    assert a.abs().max() <= 400**-0.5 and expected.abs().max() <= 400**-0.5  # the bound of Kaiming-uniform, a = sqrt(5)
    assert abs(a.std() / expected.std() - 1) < 0.03


@pytest.mark.parametrize("kind, wanted", [
    ("dense", ["q_proj", "down_proj"]), ("dense", "all-linear"), ("dense", r".*self_attn\.(q|v)_proj"),
    ("shared", ["v_proj"]), ("moe", [f"model.layers.1.self_attn.{name}" for name in ATTENTION])])
def test_adapters_written_by_peft_open_here(peft, transformers, base, tmp_path, kind, wanted):
    folder, ids = base(kind), random_ids()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=wanted, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(plain, config)
    randomize(torch.nn.ParameterList(p for p in theirs.parameters() if p.requires_grad))
    theirs.save_pretrained(tmp_path / "peft")
    model = Transformer.from_pretrained(folder)
    adapters = lora.Adapters.from_pretrained(model, tmp_path / "peft")
    assert adapters.settings["r"] == 3 and adapters.names
    with torch.no_grad():
        expected = theirs(ids).logits
        assert not close(Transformer.from_pretrained(folder)(ids), expected, 1e-2), "the adapters matter"
        assert close(model(ids), expected, 1e-5) and close(adapters.merged()(ids), expected, 1e-5)


# -- Which layers, what is frozen --------------------------------------------------------------------------------------
def test_outputs_are_bit_equal_before_the_first_step(base):
    for kind in KINDS:
        model, adapters = adapted(base(kind), random=False)
        assert torch.equal(model(random_ids()), Transformer.from_pretrained(base(kind))(random_ids()))
        assert any(p.any() for p in adapters.state_dict().values()), "A is not zero"


def test_default_is_every_linear_layer_of_the_blocks_but_routed_experts(base):
    dense = {f"self_attn.{n}" for n in ATTENTION} | {f"mlp.{n}" for n in MLP}
    expected = {"dense": [dense, dense], "moe": [{f"self_attn.{n}" for n in ATTENTION}] * 2,
                "shared": [dense, {f"self_attn.{n}" for n in ATTENTION} | {f"mlp.shared_experts.{n}" for n in MLP}]}
    for kind, layers in expected.items():
        model, adapters = adapted(base(kind))
        assert set(adapters.names) == {f"model.layers.{i}.{n}" for i, names in enumerate(layers) for n in names}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == adapters.state_dict().keys()
        count = sum(p.numel() for p in adapters.state_dict().values())
        assert model.num_parameters(trainable=True) == count and f"{count / 1e6:.2f}M parameters" in adapters.summary()


@pytest.mark.parametrize("kind, target, reason", [
    ("moe", "gate_proj", "routed experts get no adapters"), ("moe", "experts", "routed experts get no adapters"),
    ("shared", "experts.0.up_proj", "routed experts get no adapters"),
    ("shared", "model.layers.1.mlp.experts.3.down_proj", "routed experts get no adapters"),
    ("moe", "gate", "the router gets no adapter"), ("shared", "mlp.gate", "the router gets no adapter"),
    ("dense", "gate", "no linear layer of the blocks is called so"), ("dense", "proj", "no linear layer"),
    ("dense", "lm_head", "no linear layer"), ("dense", "embed_tokens", "no linear layer"),
    ("dense", "shared_experts.up_proj", "no linear layer"), ("dense", "layers.7.self_attn.q_proj", "no linear layer")])
def test_target_that_cannot_be_adapted_is_refused_with_the_reason(base, kind, target, reason):
    folder = base(kind)
    with pytest.raises(ValueError, match=rf"--lora_targets {target}; {reason}.*; name some of .*q_proj"):
        adapted(folder, "q_proj", target)
    # and nothing was changed before the refusal
    model = Transformer.from_pretrained(folder)
    with pytest.raises(ValueError):
        lora.Adapters(model, 4, 8, [target])
    assert all(p.requires_grad for p in model.parameters())


def test_shared_experts_can_be_named(base):
    _, adapters = adapted(base("shared"), "shared_experts.up_proj")
    assert adapters.names == ["model.layers.1.mlp.shared_experts.up_proj"]
    _, adapters = adapted(base("shared"), "up_proj")
    assert adapters.names == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared_experts.up_proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_with_recomputed_activations_and_only_to_adapters(base, kind):
    ids = random_ids()
    found = []
    for recompute in (False, True):
        model, adapters = adapted(base(kind), dtype=torch.float64)
        model.gradient_checkpointing = recompute
        (-model.train()(ids, target_mask=torch.ones_like(ids)).sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == adapters.state_dict().keys()
    assert all(torch.allclose(found[0][name], found[1][name], rtol=0, atol=1e-12) for name in found[0])


def test_dropout_acts_in_training_only_and_beside_the_weight_only(base):
    model, _ = adapted(base(), dropout=0.5)
    plain, _ = adapted(base())
    ids = random_ids()
    assert torch.equal(model.eval()(ids), plain.eval()(ids))
    assert not torch.allclose(model.train()(ids), plain(ids))
    model, _ = adapted(base(), dropout=0.5, random=False)  # B = 0: nothing to drop
    assert torch.equal(model.train()(ids), model.eval()(ids))


def test_an_answer_of_adapters_that_learn_has_no_dropout(base):
    model, _ = adapted(base(), dropout=0.5)
    greedy = list(model.eval().generate([[1, 5, 9]], 12, temperature=0))
    assert list(model.train().generate([[1, 5, 9]], 12, temperature=0)) == greedy and model.training


def test_cached_generation_goes_through_the_adapters(base):
    model, adapters = adapted(base())
    answers = [[token for _, token in m.generate([[1, 5, 9]], 12, temperature=0)] for m in
               (model, adapters.merged(), Transformer.from_pretrained(base()))]
    assert answers[0] == answers[1] != answers[2]


# -- Folders -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_base_give_back_what_was_saved(base, tmp_path, kind):
    folder = base(kind)
    model, adapters = adapted(folder)
    adapters.save_adapters(tmp_path / "a")
    again = Transformer.from_pretrained(folder)
    lora.Adapters.from_pretrained(again, tmp_path / "a")
    assert torch.equal(again(random_ids()), model(random_ids()))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder) and settings["task_type"] == "CAUSAL_LM"
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (4, 12, "none")


def test_merged_folder_is_a_plain_model_and_leaves_the_adapted_one_alone(base, tmp_path):
    folder, ids = base(), random_ids()
    model, adapters = adapted(folder)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    adapters.save_pretrained(tmp_path / "merged")
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert close(Transformer.from_pretrained(tmp_path / "merged")(ids), model(ids), 1e-5)
    again = Transformer.from_pretrained(folder)
    lora.Adapters.from_pretrained(again, tmp_path / "merged" / "adapter")
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("sharded", [False, True])
def test_command_merges_folders(transformers, base, tmp_path, capsys, sharded):
    folder, ids = base(), random_ids()
    model, adapters = adapted(folder)
    adapters.save_adapters(tmp_path / "a")
    if sharded:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        folder = tmp_path / "sharded"
        theirs.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    out = tmp_path / "deep" / "out"
    argv = ["merge", "--adapter", str(tmp_path / "a"), "--output", str(out)]
    lora.main(lora.parse_args(argv + ["--base", str(folder)] * sharded))
    assert "merged 14 layers" in capsys.readouterr().out
    assert torch.equal(Transformer.from_pretrained(out)(ids), adapters.merged()(ids))
    with pytest.raises(FileExistsError, match="there already; .*; give another --output"):
        lora.main(lora.parse_args(argv + ["--base", str(folder)]))
    assert not list(tmp_path.rglob("*.tmp"))


def test_merge_keeps_the_type_of_the_base_and_sums_in_fp32(base, tmp_path):
    folder = base()
    _, adapters = adapted(folder)
    adapters.save_adapters(tmp_path / "a")
    half = Transformer.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    lora.merge_folders(tmp_path / "half", tmp_path / "a", tmp_path / "out")
    merged, name = load_file(tmp_path / "out" / "model.safetensors"), adapters.names[0]
    a, b = (adapters.state_dict()[f"{name}.lora_{x}.weight"] for x in "AB")
    expected = half.state_dict()[f"{name}.weight"].float() + 3.0 * b @ a
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(merged[f"{name}.weight"], expected.to(torch.bfloat16))


@pytest.mark.parametrize("field, value", [
    ("use_dora", True), ("use_rslora", True), ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 2}),
    ("alpha_pattern", {"q_proj": 2}), ("bias", "all"), ("fan_in_fan_out", True), ("peft_type", "IA3"),
    ("init_lora_weights", "pissa"), ("lora_bias", True), ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("target_parameters", 5), ("trainable_token_indices", [1]),
    ("layer_replication", [[0, 1]]), ("invented_next_year", 1), ("r", None), ("r", 4.0), ("lora_alpha", "8")])
def test_what_is_not_plain_lora_is_refused_by_name(base, tmp_path, field, value):
    _, adapters = adapted(base())
    adapters.save_adapters(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    for use in (lambda: lora.Adapters.from_pretrained(Transformer.from_pretrained(base()), tmp_path / "a"),
                lambda: lora.merge_folders(base(), tmp_path / "a", tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"^{field}=.*adapter_config.json; only plain LoRA is read.*; merge"):
            use()
    assert not (tmp_path / "out").exists()


def test_damaged_or_foreign_folders_are_named(base, tmp_path):
    model, adapters = adapted(base())
    a = tmp_path / "a"

    def refused(message, kind=ValueError, on="dense"):
        plain = Transformer.from_pretrained(base(on))
        with pytest.raises(kind, match=message) as caught:
            lora.Adapters.from_pretrained(plain, a)
        assert str(caught.value).count("; ") >= 2
        with pytest.raises(kind, match=message):
            lora.merge_folders(base(on), a, tmp_path / "out")
        assert all(p.requires_grad for p in plain.parameters())

    refused("adapter_config.json does not exist", FileNotFoundError)
    adapters.save_adapters(a)
    tensors, file, config = load_file(a / "adapter_model.safetensors"), a / "adapter_model.safetensors", (
        a / "adapter_config.json").read_text()
    first = sorted(tensors)[0]
    refused("has shape.*fit only the model they were trained beside|is not there.*fit only", on="moe")
    for change in ({"extra": torch.ones(2)}, {first: torch.ones(5, tensors[first].shape[1])},
                   {first: torch.ones(4)}, {first: None}):
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        save_file(changed, file)
        refused("adapter_model.safetensors holds .*; it is pairs .*; take both files")
    save_file({name: x[:, :-1].contiguous() if "q_proj.lora_A" in name else x for name, x in tensors.items()}, file)
    refused("q_proj has shape .* adapts a layer of shape")
    file.write_bytes(b"not safetensors")
    refused("not a readable safetensors file")
    file.unlink()
    refused("pickled weights .* are not opened", FileNotFoundError)
    for text in ("{", "[1]", "3", "[" * 100_000):
        (a / "adapter_config.json").write_text(text)
        refused("no JSON object")
    (a / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match="1 adapter tensors do not fit, first .*; they belong to other layers; give"):
        adapters.load_state_dict({name: x for name, x in list(adapters.state_dict().items())[1:]})


# -- train_sft.py ------------------------------------------------------------------------------------------------------
LORA = ["--lora_rank", "2", "--optimizer", "adamw", "--learning_rate", "0.02"]


def train(stage, *flags, **options):
    module, argv = stage("train_sft", *LORA, *flags, **options)
    return module.main(module.parse_args(argv))


@pytest.mark.parametrize("kind", ["dense", "moe", "shared"])
def test_run_trains_adapters_only_and_saves_the_merged_model(stage, model_folder, tmp_path, kind, capsys):
    train(stage, "--dtype", "float32", kind=kind)
    assert "parameters are trained" in capsys.readouterr().out
    out, parent = tmp_path / "out" / "run", model_folder(kind)
    base, merged = load_file(parent / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name.removesuffix(".weight") for name in base if not torch.equal(base[name], merged[name])}
    names = lora.choose(Transformer.from_pretrained(parent))
    # down_proj and o_proj of a fresh model are zero, so nothing in front of them has a gradient in the first step
    assert changed == set(names)
    state = torch.load(out / "resume" / "state.pt", weights_only=True)
    assert {name.rpartition(".lora_")[0] for name in state["model"]} == set(names)
    model = Transformer.from_pretrained(parent)
    adapters = lora.Adapters.from_pretrained(model, out / "adapter")
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in adapters.state_dict().items())
    ids = torch.arange(24)[None]
    assert close(Transformer.from_pretrained(out)(ids), model(ids), 1e-5)


def test_merged_run_opens_in_transformers_and_answers_in_eval(stage, transformers, tmp_path, capsys):
    train(stage, "--dtype", "float32", "--max_steps", "8")
    out, ids = tmp_path / "out" / "run", torch.arange(24)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert close(Transformer.from_pretrained(out)(ids), theirs(ids).logits, 1e-5)
    argv = ["--weight", str(out), "--prompt", "What is 2 + 3?", "--max_new_tokens", "4", "--device", "cpu",
            "--temperature", "0", "--threads", "1", "--dtype", "float32"]
    merged = evaluation.main(evaluation.parse_args(argv))
    # the same run with the adapters alone answers the same
    train(stage, "--dtype", "float32", "--max_steps", "8", "--merge", "0", "--save_weight", "thin")
    thin = tmp_path / "out" / "thin"
    assert not list(thin.glob("model*")) and (thin / "adapter" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    again = evaluation.main(evaluation.parse_args(["--weight", str(thin), *argv[2:]]))
    assert again["answer"] == merged["answer"]
    assert "only continues" not in capsys.readouterr().out


def test_adapters_alone_open_in_peft_and_find_a_base_that_moved(stage, peft, transformers, model_folder, tmp_path):
    shutil.copytree(model_folder(), tmp_path / "out" / "start")
    train(stage, "--dtype", "float32", "--merge", "0", "--lora_targets", "q_proj", "mlp.up_proj",
          parent=tmp_path / "out" / "start")
    thin, ids = tmp_path / "out" / "run", torch.arange(24)[None]
    adapter = lora.alone(thin)
    opened = transformers.AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)  # base and adapters
    ours = Transformer.from_pretrained(lora.base_of(adapter))
    lora.Adapters.from_pretrained(ours, adapter)
    with torch.no_grad():
        assert close(ours(ids), opened(ids).logits, 1e-5)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    adapter = tmp_path / "moved" / "run" / "adapter"
    assert lora.base_of(adapter) == tmp_path / "moved" / "start"
    shutil.rmtree(tmp_path / "moved" / "start")
    with pytest.raises(FileNotFoundError, match="the base .*start of .*adapter is not there; .*; bring it back"):
        lora.base_of(adapter)


def test_next_stage_refuses_adapters_alone(stage, tmp_path):
    train(stage, "--merge", "0", "--max_steps", "1")
    with pytest.raises(ValueError, match="holds adapters without the model.*; .*; python lora.py merge --adapter"):
        train(stage, "--save_weight", "next", parent=tmp_path / "out" / "run")


@pytest.mark.parametrize("flag", ["--lora_alpha", "--lora_targets", "--lora_dropout"])
def test_flags_of_adapters_without_a_rank_are_refused(stage, flag, capsys):
    module, argv = stage("train_sft", flag, {"--lora_targets": "q_proj"}.get(flag, "0.5" if "drop" in flag else "8"))
    with pytest.raises(SystemExit):
        module.parse_args(argv)
    assert f"{flag} without --lora_rank" in capsys.readouterr().err


def test_adapters_alone_can_be_resumed_into_a_merged_folder(stage, tmp_path):
    flags, out = ["--schedule", "constant", "--warmup_steps", "2"], tmp_path / "out"
    train(stage, *flags, "--max_steps", "2", "--merge", "0")
    assert lora.alone(out / "run")
    train(stage, *flags, "--max_steps", "4", "--merge", "1", "--from_resume", "1")
    train(stage, *flags, "--max_steps", "4", "--save_weight", "whole")
    assert not lora.alone(out / "run")
    run, whole = (load_file(out / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(run[name], whole[name]) for name in whole)
