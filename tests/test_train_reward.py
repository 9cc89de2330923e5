"""Proves the reward stage: the loss against numpy, packed scores, honest reports.

    python -m pytest tests/test_train_reward.py
"""
import json
import math

import numpy as np
import pytest
import torch

import checkpoint
import common
import logs
import train_reward
from dataset import PreferenceData, pack_batch
from model import ScalarHead
from tokenizer import Tokenizer
from train_reward import PackedScores, pairwise_loss


def numpy_loss(chosen, rejected, margin=0.0, center_coef=0.0):
    """The formula of the docstring, written again with exp and log."""
    p = 1 / (1 + np.exp(-(chosen - rejected - margin)))
    return np.mean(-np.log(p) + center_coef * (chosen + rejected) ** 2)


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    """run(*flags) -> final metrics of a small run in tmp_path/out."""
    kinds = ["wrong", "curt"]
    rows = [{"prompt": f"What is {a} + {b}?", "chosen": f"Sure! The answer is {a + b}.", "kind": kinds[b % 2],
             "rejected": str(a + b) if b % 2 else f"Sure! The answer is {a + b + 1}."}
            for a in range(6) for b in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:24]))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[24:]))

    def start(*flags, folder=None, pairs="pairs.jsonl"):
        base = ["--from_weight", str(folder or model_folder("dense")), "--data_path", str(tmp_path / pairs),
                "--val_path", str(tmp_path / "held.jsonl"), "--save_dir", str(tmp_path / "out"),
                "--cache_dir", str(tmp_path / "cache"), "--max_seq_len", "96", "--dtype", "float32", "--threads", "1",
                "--device", "cpu", "--batch_size", "4", "--max_steps", "4", "--log_interval", "1"]
        return train_reward.main(train_reward.parse_args([*base, *flags]))

    start.out = tmp_path / "out"
    monkeypatch.setattr(common.StopSignal, "__init__", lambda self: setattr(self, "requested", 0))
    monkeypatch.setattr(logs, "plot_curves", lambda folder: None)  # half a second each, and tested with logs.py
    return start


def weights(run, name="reward"):
    """All saved tensors of a checkpoint of this test."""
    return ScalarHead.from_pretrained(run.out / name).state_dict()


def log_rows(run, name="reward"):
    """The numbers of metrics.jsonl, without verdicts and what depends on clock and machine."""
    lines = (run.out / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s" and not k.startswith("sys_")}
            for line in lines if "verdict" not in json.loads(line)]


# -- The pure functions ------------------------------------------------------------------------------------------------
def test_pairwise_loss_equals_numpy():
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.normal(size=(3, 50)) * 3
    got = pairwise_loss(*map(torch.tensor, (chosen, rejected, margin)), center_coef=0.2)
    assert abs(got.item() - numpy_loss(chosen, rejected, margin, 0.2)) < 1e-12


def test_pairwise_loss_matches_hand_example():
    """Scores 1 and 0: -log sigmoid(1) = log(1 + 1/e) = 0.313262; centring adds 0.5 * (1 + 0)^2."""
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    assert abs(pairwise_loss(one, zero).item() - 0.313262) < 1e-6
    assert abs(pairwise_loss(one, zero, center_coef=0.5).item() - 0.813262) < 1e-6
    # a margin as large as the difference leaves nothing: ln 2, as for equal scores
    assert abs(pairwise_loss(one, zero, margin=1.0).item() - math.log(2)) < 1e-7
    assert abs(pairwise_loss(one, one).item() - math.log(2)) < 1e-7


def test_pairwise_gradient_is_sigmoid_of_minus_difference():
    """d/dc -log sigmoid(c - r) = -sigmoid(r - c), and the opposite for r; the mean divides both by B."""
    chosen = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64, requires_grad=True)
    pairwise_loss(chosen, rejected).backward()
    expected = -torch.sigmoid(rejected - chosen).detach() / 3
    assert torch.allclose(chosen.grad, expected, atol=1e-12)
    assert torch.allclose(rejected.grad, -expected, atol=1e-12)


def test_pairwise_loss_survives_huge_differences_and_half_precision():
    far = torch.tensor([1e4])
    assert pairwise_loss(far, -far).item() == 0.0
    assert pairwise_loss(-far, far).item() == 2e4
    loss = pairwise_loss(torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32


def test_packed_scores_equal_the_head_on_padded_rows(run, model_folder, tokenizer):
    """Each token once, each row whole, and no row sees its neighbours."""
    model = ScalarHead.from_pretrained(model_folder("dense"), dtype=torch.float64)
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.weight)  # zero at the start: tokens would not mix
    file = run.out.parent / "rambling.jsonl"
    long = json.dumps({"prompt": "Why?", "chosen": "Sure! It is.", "rejected": "It is a brown cat. " * 8})
    file.write_text((run.out.parent / "pairs.jsonl").read_text() + long + "\n")
    batch = PreferenceData([file], tokenizer, 128, run.out.parent / "cache").batch([*range(7), 24])
    ids, mask, documents, ends = pack_batch(batch, "cpu")
    assert len(ids) < 16 and ids.shape == mask.shape == documents.shape
    for row, length in enumerate(batch["lengths"]):
        assert torch.equal(ids[documents == row], batch["ids"][row, :length])
        assert torch.equal(mask[documents == row], batch["mask"][row, :length])
    packed = PackedScores(model)(ids, documents, ends)
    assert (packed - model(batch["ids"], batch["lengths"])).abs().max() < 1e-9
    assert packed.std() > 1e-3


# -- The stage ---------------------------------------------------------------------------------------------------------
def test_run_writes_a_reward_folder_with_its_score_statistics(run):
    final = run()
    facts = checkpoint.read_minillm(run.out / "reward")
    assert facts["stage"] == "reward" and facts["finished"] and facts["metrics"]["accuracy"] == final["accuracy"]
    assert set(final["accuracy_by_kind"]) == {"wrong", "curt"} and final["n"] == 12
    assert Tokenizer.from_pretrained(run.out / "reward").fingerprint == facts["tokenizer"]
    config = json.loads((run.out / "reward" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    rows = log_rows(run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert "val_accuracy_curt" in rows[-1] and "length_correlation" in rows[-1]
    assert (facts["score_mean"], facts["score_std"]) == (final["score_mean"], final["score_std"])


def test_evaluation_equals_scoring_each_row_alone(run, tokenizer):
    """An oracle without batches, padding or packing: one row, one forward."""
    final = run("--max_steps", "1")
    model = ScalarHead.from_pretrained(run.out / "reward").eval()
    scores = []
    for line in (run.out.parent / "held.jsonl").read_text().splitlines():
        row = json.loads(line)
        for text in (row["chosen"], row["rejected"]):
            ids, mask = tokenizer.render([{"role": "user", "content": row["prompt"]},
                                          {"role": "assistant", "content": text}])
            last = max(i for i, trained in enumerate(mask) if trained)
            with torch.no_grad():
                scores.append(model(torch.tensor([ids[:last + 1]]), torch.tensor([last + 1])).item())
    chosen, rejected = np.array(scores).reshape(-1, 2).T
    assert final["accuracy"] == np.mean(chosen > rejected)
    assert abs(final["score_mean"] - np.mean(scores)) < 1e-6 and abs(final["score_std"] - np.std(scores)) < 1e-6
    assert abs(final["val_loss"] - numpy_loss(chosen, rejected, 0.0, 0.001)) < 1e-6


def test_ties_count_as_wrong(run, monkeypatch):
    def constant(self, ids, documents, ends):
        return self.model.score.weight.sum() * torch.zeros(len(ends))

    monkeypatch.setattr(train_reward.PackedScores, "forward", constant)
    final = run("--max_steps", "1")
    assert final["accuracy"] == 0.0 and final["length_correlation"] == 0.0


def test_scores_learn_to_separate_the_pairs(run, capsys):
    final = run("--max_steps", "30", "--learning_rate", "3e-3", "--optimizer", "adamw")
    assert final["accuracy_by_kind"]["curt"] == 1.0
    assert "Next: python train_ppo.py" in capsys.readouterr().out


def test_resuming_a_finished_run_reports_again(run):
    first = run()
    assert run("--from_resume", "1")["accuracy"] == first["accuracy"]


def test_frozen_backbone_moves_only_the_head(run, model_folder):
    run("--freeze_backbone", "1")
    trained, before = weights(run), ScalarHead.from_pretrained(model_folder("dense")).state_dict()
    assert all(torch.equal(trained[name], before[name]) for name in before if name != "score.weight")


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_new_layers_change_no_score_at_first_and_learn_above_a_frozen_backbone(run, model_folder, kind):
    parent = ScalarHead.from_pretrained(model_folder(kind))
    ids, lengths = torch.randint(0, 200, (3, 20), generator=torch.Generator().manual_seed(0)), torch.tensor([20, 9, 1])
    scores, count = parent(ids, lengths), parent.config.num_hidden_layers
    parent.deepen(2)
    assert torch.equal(parent(ids, lengths), scores) and len(parent.model.layers) == count + 2
    run("--freeze_backbone", "1", "--extra_layers", "2", folder=model_folder(kind))
    trained, before = weights(run), ScalarHead.from_pretrained(model_folder(kind)).state_dict()
    assert all(torch.equal(trained[name], before[name]) for name in before if name != "score.weight")
    new = {name for name in trained if name not in before}
    assert {name.split(".")[2] for name in new} == {str(count), str(count + 1)}
    # one that writes into the residual stream began at 0
    assert all(trained[f"model.layers.{n}.self_attn.o_proj.weight"].any() for n in (count, count + 1))
    assert ScalarHead.from_pretrained(run.out / "reward").config.num_hidden_layers == count + 2


def test_softmax_experts_train_and_shared_experts_are_refused_with_the_fix(run, model_folder):
    run("--max_steps", "1", folder=model_folder("moe"))
    with pytest.raises(ValueError, match="n_shared_experts"):
        run("--save_weight", "other", folder=model_folder("shared"))


def test_unfit_rows_and_missing_parents_are_named(run):
    with pytest.raises(ValueError, match="max_position_embeddings"):
        run("--max_seq_len", "300")
    with pytest.raises(FileNotFoundError, match="not found"):
        run(folder="nowhere")
