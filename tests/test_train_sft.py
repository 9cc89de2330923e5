"""Proves what only fine-tuning has: noise on the embeddings, and exact match of held-out questions.

    python -m pytest tests/test_train_sft.py

Elsewhere: packing and masks (test_dataset.py), adapters (test_lora.py), resume and several processes (test_resume.py,
test_ddp.py).
"""
import json

import pytest
import torch
from safetensors.torch import load_file

import records
import train_sft
from train_sft import add_noise


def test_noise_is_uniform_as_wide_as_the_paper_says_and_only_in_training():
    embedding = torch.nn.Embedding(50, 64)
    ids = torch.arange(40).view(2, 20)  # T = 20, D = 64
    plain = embedding(ids)
    add_noise(embedding, alpha=5.0)
    torch.manual_seed(0)
    noise = torch.cat([embedding(ids) - plain for _ in range(20)])
    size = 5.0 / (20 * 64) ** 0.5
    assert noise.abs().max() <= size * (1 + 1e-4)
    assert noise.std().item() == pytest.approx(size / 3**0.5, rel=0.02) and abs(noise.mean().item()) < 0.02 * size
    embedding.eval()
    assert torch.equal(embedding(ids), plain)


def test_gradient_of_the_embedding_is_that_of_the_clean_one():
    embedding = torch.nn.Embedding(5, 4)
    add_noise(embedding, alpha=1.0)
    embedding(torch.tensor([[1, 3]])).sum().backward()
    assert torch.equal(embedding.weight.grad, torch.tensor([[0.0], [1], [0], [1], [0]]).expand(5, 4))


def test_noise_changes_training_and_not_the_evaluation(stage, tmp_path):
    for folder, alpha in (("plain", "0"), ("noisy", "5"), ("again", "5")):
        module, argv = stage("train_sft", "--neftune_alpha", alpha, "--save_weight", folder)
        module.main(module.parse_args(argv))
    plain, noisy, again = (load_file(tmp_path / "out" / name / "model.safetensors") for name in
                           ("plain", "noisy", "again"))
    assert all(torch.equal(again[key], value) for key, value in noisy.items()), "same seed, same noise"
    assert any((plain[key] - value).abs().max() > 1e-4 for key, value in noisy.items())
    first = [records.read_metrics(tmp_path / "out" / "logs" / name)[0] for name in ("plain", "noisy")]
    assert first[0]["step"] == 0 and first[0] == first[1]


def metric(stage, *flags):
    """The final metrics of a run, and whether before and after are exact matches (else losses)."""
    module, argv = stage("train_sft", *flags)
    final = module.main(module.parse_args(argv))
    exact = final["metric"] == "held-out exact match"
    assert final["after"] == final["exact_match" if exact else "val_loss"]
    assert (final["before"] <= 1) == exact, "a random model's loss is about ln 320"
    return final, exact


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_before_and_after_are_of_one_kind(stage, count, capsys):
    final, exact = metric(stage, "--eval_prompts", str(count), "--max_steps", "1")
    assert exact == (count > 0)
    if exact:
        assert f"of {count} questions (before {final['before']:.3f} of {(count + 4) // 5})" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["val_loss", "exact_match", "stop_rate"])
def test_patience_for_what_is_measured_is_no_error(stage, name):
    final, _ = metric(stage, "--eval_prompts", "2", "--patience", "1", "--patience_metric", name,
                      "--eval_interval", "1", "--max_steps", "2")
    assert final["steps"] == 2


def test_patience_for_what_is_not_measured_is_refused_before_the_first_step(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "answer_questions", lambda *rest: None)  # as where no row has a check
    with pytest.raises(ValueError, match="--patience_metric exact_match; this evaluation did not measure it"):
        metric(stage, "--eval_prompts", "2", "--patience", "2", "--patience_metric", "exact_match",
               "--eval_interval", "1", "--max_steps", "2")
    assert [row["step"] for row in records.read_metrics(tmp_path / "out" / "logs" / "sft")] == []


@pytest.mark.parametrize("first, then", [("0", "2"), ("2", "0"), ("6", "2")])
def test_questions_that_come_and_go_with_a_resume_leave_one_kind(stage, first, then):
    metric(stage, "--eval_prompts", first, "--max_steps", "1")
    final, exact = metric(stage, "--eval_prompts", then, "--max_steps", "2", "--from_resume", "1")
    assert exact == (first == "6") and ("exact_match" in final) == (then == "2")


def test_prompts_longer_than_a_row_are_no_reason_not_to_train(stage, tmp_path, capsys):
    turns = [("user", "What?"), ("assistant", "It is 5."), ("user", "cat " * 80), ("assistant", "5")]
    row = {"conversations": [{"role": role, "content": text} for role, text in turns], "answer": "5", "check": "number"}
    for count in ("0", "2"):
        module, argv = stage("train_sft", "--eval_prompts", count, "--max_steps", "1", "--save_weight", f"run{count}")
        (tmp_path / "train_sft.held.jsonl").write_text(json.dumps(row) + "\n")
        assert module.main(module.parse_args(argv))["metric"] == "held-out loss"
        said = "no exact match will be measured: no usable prompt sample" in capsys.readouterr().out
        assert said == (count == "2")


def test_question_that_fills_the_context_is_not_asked(stage, tmp_path, tokenizer):
    rows = [{"conversations": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "5"}],
             "answer": "5", "check": "number"} for n in range(2, 260)]
    asked = {len(tokenizer.render(row["conversations"][:1], add_generation_prompt=True)[0]): row for row in rows}
    module, argv = stage("train_sft", "--max_seq_len", "256", "--max_steps", "1", "--eval_prompts", "9")
    (tmp_path / "train_sft.held.jsonl").write_text("".join(json.dumps(asked[n]) + "\n" for n in (20, 255, 256)))
    assert module.main(module.parse_args(argv))["n"] == 2


def test_rows_of_a_replay_that_is_not_there_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_sft.parse_args(["--replay_rows", "2"])
    assert "--replay_rows 2 without --replay_path; " in capsys.readouterr().err
