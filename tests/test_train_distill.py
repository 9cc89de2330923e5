"""Proves distillation: the loss against numpy and torch, plain training as a special case, and what is refused.

    python -m pytest tests/test_train_distill.py
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
import common
import logs
import metrics
import records
import train_distill
import train_pretrain
import train_sft
from dataset import PretrainData, SFTData
from model import Transformer
from tokenizer import Tokenizer, train
from train_distill import distill_kl


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


# -- The loss ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_equals_numpy_and_torch_in_both_directions(temperature):
    student, teacher = np.random.default_rng(0).normal(size=(2, 7, 11)) * 3
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    a, b = torch.tensor(student), torch.tensor(teacher)
    for reverse, expected in ((False, (p * np.log(p / q)).sum(-1)), (True, (q * np.log(q / p)).sum(-1))):
        found = distill_kl(a, b, temperature, reverse)
        assert np.abs(found.numpy() - temperature**2 * expected).max() < 1e-12
    known = F.kl_div((a / temperature).log_softmax(-1), (b / temperature).softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(distill_kl(a, b, temperature), temperature**2 * known, atol=1e-12, rtol=0)


def test_kl_matches_hand_example():
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2; the other way 1/2 ln 2/3 + 1/2 ln 2."""
    teacher, student = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    assert distill_kl(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), abs=1e-6)
    assert distill_kl(student, teacher, reverse=True).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_is_temperature_times_the_difference_of_probabilities(temperature):
    student, teacher = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student.requires_grad_(True)
    distill_kl(student, teacher, temperature).sum().backward()
    q, p = (x.detach().div(temperature).softmax(-1) for x in (student, teacher))
    assert (student.grad - temperature * (q - p)).abs().max() < 1e-12


def test_a_teacher_who_is_sure_is_a_label():
    """KL to a one-hot teacher is cross-entropy."""
    student, labels = torch.randn(6, 8, dtype=torch.float64), torch.arange(6)
    teacher = 1e4 * F.one_hot(labels, 8).double()
    assert torch.allclose(distill_kl(student, teacher), F.cross_entropy(student, labels, reduction="none"), atol=1e-12)


def test_equal_predictions_cost_nothing_and_half_precision_is_widened():
    logits = torch.randn(4, 300).bfloat16()
    found = distill_kl(logits, logits + 1)  # a constant changes no prediction
    assert found.dtype == torch.float32 and found.abs().max() < 1e-2
    assert torch.equal(distill_kl(logits, logits, 2.0), torch.zeros(4))


# -- The script --------------------------------------------------------------------------------------------------------
@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: setattr(self, "requested", 0))
    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)  # half a second each, and tested with logs.py


def run(stage, *flags, **options):
    module, argv = stage("train_distill", *flags, **options)
    return module.main(module.parse_args(argv))


@pytest.mark.parametrize("kind", ["dense", "moe", "shared"])
@pytest.mark.parametrize("rows", ["pretrain", "sft"])
def test_alpha_1_is_plain_training(stage, tmp_path, quiet, rows, kind):
    """Same weights after four steps as from the script of that stage, which knows no teacher."""
    shared = ["--learning_rate", "1e-3", "--accumulation_steps", "2", "--eval_batches", "8"]
    # fine-tuning has no settings of its own for the embedding
    embedding = [] if rows == "pretrain" else ["--adam_beta1", "0.9", "--embedding_decay", "0"]
    module, argv = stage("train_distill", "--stage", rows, "--alpha", "1", *shared, *embedding, kind=kind)
    module.main(module.parse_args(argv))
    plain = {"pretrain": train_pretrain, "sft": train_sft}[rows]
    own = {"--teacher", "--stage", "--alpha", *embedding[::2]}
    kept = [word for pair in zip(argv[::2], argv[1::2], strict=True) if pair[0] not in own for word in pair]
    few = ["--eval_prompts", "0"] if rows == "sft" else []
    plain.main(plain.parse_args([*kept, *few, "--save_weight", "plain", "--warmup_steps", "0.1"]))
    found, expected = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("run", "plain"))
    assert max((found[key] - value).abs().max() for key, value in expected.items()) < 1e-9
    facts = checkpoint.read_minillm(tmp_path / "out" / "run")
    assert facts["stage"] == rows, "it decides whether eval.py chats"
    assert facts["metrics"]["val_loss"] == pytest.approx(
        checkpoint.read_minillm(tmp_path / "out" / "plain")["metrics"]["val_loss"], abs=1e-9)


def test_a_student_of_itself_has_nothing_to_learn(stage, tmp_path, quiet, model_folder):
    """Looked at before the first update: Adam and Muon make whole steps of gradients that are only rounding."""
    run(stage, "--teacher", str(model_folder("dense")))
    before, first = records.read_metrics(tmp_path / "out" / "logs" / "run")[:2]
    assert abs(before["val_kl"]) < 1e-12 and before["agreement"] == 1 and before["val_loss"] == before["teacher_loss"]
    assert abs(first["kl"]) < 1e-12 and first["grad_norm"] < 1e-9
    assert abs(first["loss"]) < 1e-12 < first["nll"], "alpha is 0: the text's own tokens do not count"


@pytest.mark.parametrize("flags", [[], ["--reverse", "1"], ["--temperature", "2", "--alpha", "0.3"]], ids=" ".join)
def test_student_comes_closer_to_its_teacher(stage, quiet, flags):
    final = run(stage, "--max_steps", "40", "--batch_size", "4", *flags)
    assert final["val_kl"] < 0.7 * final["before"]


@pytest.mark.parametrize("rows", ["pretrain", "sft"])
def test_evaluation_equals_the_usual_one(stage, tmp_path, quiet, model_folder, rows):
    """Losses and bits per byte against metrics.heldout_loss, KL and agreement against one pass over all logits."""
    module, argv = stage("train_distill", "--stage", rows)
    args = module.parse_args(argv)
    kind = SFTData if rows == "sft" else PretrainData
    data = kind(args.val_path, Tokenizer.from_pretrained(args.from_weight), args.max_seq_len, args.cache_dir, args.seed)
    student, teacher = (Transformer.from_pretrained(model_folder(k), dtype=torch.float64) for k in ("dense", "teacher"))
    runtime = common.Runtime(torch.device("cpu"), torch.float64)
    found = train_distill.evaluate(student, teacher, data, args, runtime)
    batch = data.batch(range(len(data)))
    for name, model in (("val", student), ("teacher", teacher)):
        known = metrics.heldout_loss(model, [batch])
        assert found[f"{name}_loss"] == pytest.approx(known["loss"], rel=1e-12)
        if rows == "pretrain":
            bits = found["bits_per_byte" if name == "val" else "teacher_bits_per_byte"]
            assert bits == pytest.approx(known["bits_per_byte"], rel=1e-12)
    documents = {"documents": batch["documents"]} if rows == "sft" else {}
    q, p = (m(batch["ids"], **documents)[:, :-1].log_softmax(-1) for m in (student, teacher))
    wanted = batch["mask"][:, 1:].bool()
    assert found["val_kl"] == pytest.approx((p.exp() * (p - q)).sum(-1)[wanted].mean().item(), rel=1e-12)
    assert found["agreement"] == pytest.approx((q.argmax(-1) == p.argmax(-1))[wanted].double().mean().item())
    assert ("bits_per_byte" in found) == (rows == "pretrain")


def test_fresh_student_of_any_shape(stage, tmp_path, quiet, tokenizer):
    module, argv = stage("train_distill", "--preset", "nano", "--hidden_size", "16", "--num_hidden_layers", "1",
                         "--num_attention_heads", "2", "--num_key_value_heads", "1", "--intermediate_size", "24")
    argv = argv[2:]  # without --from_weight
    assert "--from_weight" not in argv
    final = module.main(module.parse_args(argv))
    student = Transformer.from_pretrained(tmp_path / "out" / "run")
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (16, 1)
    assert student.config.eos_token_id == tokenizer.eos_id and final["val_kl"] < final["before"]


def refused(stage, words, *flags, **options):
    with pytest.raises(ValueError) as error:
        run(stage, *flags, **options)
    assert words in str(error.value) and str(error.value).count("; ") >= 2


def test_what_does_not_go_together_is_refused(stage, tmp_path, quiet, model_folder):
    other = tmp_path / "other"
    Transformer.from_pretrained(model_folder("dense")).save_pretrained(other)
    train(["ab abc " * 30], vocab_size=300, backend="python", progress=False).save_pretrained(other)
    refused(stage, "have different tokenizers", "--teacher", str(other))
    refused(stage, "--hidden_size 16 with --from_weight", "--hidden_size", "16")
    refused(stage, "max_position_embeddings 256 of the student", "--max_seq_len", "300")


def test_data_follow_the_stage():
    assert train_distill.parse_args(["--stage", "sft"]).data_path == ["out/data/sft.train.jsonl"]
    assert train_distill.parse_args([]).data_path == ["out/data/pretrain.train.jsonl"]
    assert train_distill.parse_args(["--data_path", "x.jsonl"]).data_path == ["x.jsonl"]
