"""Beam search finds what transformers' and exhaustive search find; guessed tokens change no answer; the bench runs.

    python -m pytest tests/test_generation.py
"""
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import answers, random_ids
from test_model import make_model as model_of

from configuration import ModelConfig
from generation import beam_search, look_up, lookup_decoding
from inference import InferenceCopy
from model import Transformer

BENCH = Path(__file__).parent.parent / "bench" / "generation.py"


def make_model(vocab_size=40, **fields):
    """A small model with random weights large enough that its choices are not all alike."""
    config = ModelConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, bos_token_id=1,
                         eos_token_id=2, pad_token_id=3, **fields)
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beam_search_equals_transformers(transformers, tmp_path, length_penalty):
    model = make_model()
    model.save_pretrained(tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stops = [2, 6, 13]
    ended = 0
    for prompt in ([5, 9, 11], [7], [30, 31, 8, 4, 22, 17]):
        ours = beam_search(model, prompt, 4, 12, length_penalty, stop_ids=stops, num_return=4)
        theirs = oracle.generate(torch.tensor([prompt]), num_beams=4, do_sample=False, max_new_tokens=12,
                                 length_penalty=length_penalty, num_return_sequences=4, eos_token_id=stops,
                                 pad_token_id=3, return_dict_in_generate=True, output_scores=True, temperature=None,
                                 top_p=None, attention_mask=torch.ones(1, len(prompt), dtype=torch.int64))
        for (ids, score), row, row_score in zip(ours, theirs.sequences, theirs.sequences_scores, strict=True):
            answer = row[len(prompt):].tolist()
            assert ids == answer[: len(ids)] and set(answer[len(ids):]) <= {3}
            assert abs(score - row_score.item()) < 1e-5
            ended += ids[-1] in stops
    assert ended > 0, "no answer ended by itself: the test would not notice a wrong stop rule"


def test_wide_beam_search_finds_the_exhaustive_optimum():
    # 6 ids, 3 steps: 36 beams hold every prefix, so nothing can be pruned wrongly
    model, prompt = make_model(vocab_size=6), [1, 4]
    best, score = beam_search(model, prompt, num_beams=36, max_new_tokens=3, length_penalty=1.0)[0]
    rows = torch.tensor([[*prompt, *answer] for answer in itertools.product(range(6), repeat=3)])
    with torch.no_grad():
        logp = model(rows).log_softmax(-1)[:, 1:-1].gather(2, rows[:, 2:, None]).squeeze(2).sum(1)  # [216]
    assert best == rows[logp.argmax(), 2:].tolist()
    assert abs(score - logp.max().item() / 3) < 1e-5


def test_one_beam_is_greedy_decoding():
    model, prompt = make_model(), [5, 9, 11]
    greedy = [token for _, token in model.generate([prompt], 10, temperature=0, stop_ids={2})]
    assert beam_search(model, prompt, num_beams=1, max_new_tokens=10, stop_ids={2})[0][0] == greedy


def test_beams_are_searched_with_the_copy(monkeypatch):
    model, flags = make_model(), dict(num_beams=4, max_new_tokens=12, stop_ids={2, 6}, num_return=4)
    plain = beam_search(model, [5, 9, 11], **flags)
    model.inference_copy = InferenceCopy(model, torch.float32)
    reads, forward = [], InferenceCopy.hidden_states
    monkeypatch.setattr(InferenceCopy, "hidden_states", lambda self, ids, cache: reads.append(1) or forward(
        self, ids, cache))
    found = beam_search(model, [5, 9, 11], **flags)
    assert len(reads) > 3
    assert [ids for ids, _ in found] == [ids for ids, _ in plain]
    assert [score for _, score in found] == pytest.approx([score for _, score in plain], abs=1e-5)


def test_search_stops_at_the_context_limit():
    model = make_model()
    (ids, _), = beam_search(model, list(range(4, 40)) + list(range(4, 30)), num_beams=2, max_new_tokens=50)
    assert len(ids) == 2  # 62 of 64 positions are the prompt's


@pytest.mark.parametrize("prompt, fields", [([], {}), ([5] * 64, {}), ([40], {}), ([5], {"num_beams": 0}),
                                            ([5], {"max_new_tokens": 0}), ([5], {"num_return": 9})])
def test_impossible_requests_are_named(prompt, fields):
    with pytest.raises(ValueError, match="; .*; "):
        beam_search(make_model(), prompt, **fields)


# -- Prompt lookup -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dense", "moe", "shared"])
@pytest.mark.parametrize("lookahead", [1, 4, 9])
def test_guessed_tokens_change_no_answer(kind, lookahead):
    model, accepted = model_of(kind, torch.float64), 0
    for prompt in ([5, 9, 30] * 5, random_ids(12).tolist(), [7]):
        greedy = answers(model, [prompt], 40, temperature=0)[0]
        counts = {}
        assert list(lookup_decoding(model, prompt, 40, lookahead, counts=counts)) == greedy
        assert 0 <= counts["accepted"] <= counts["guessed"] <= lookahead * counts["steps"]
        assert counts["steps"] <= 40 <= counts["steps"] + counts["accepted"] + lookahead
        accepted += counts["accepted"]
        stop = greedy[7]
        assert list(lookup_decoding(model, prompt, 40, lookahead, {stop})) == greedy[: greedy.index(stop) + 1]
    assert accepted > 0, "no guess was right: the test would not notice a wrong cache behind one"


def test_a_loop_is_guessed_in_a_fraction_of_the_steps():
    """A model whose blocks are the identity and whose head is its embedding repeats its last token for ever."""
    model = Transformer(ModelConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, max_position_embeddings=64)).eval()
    counts = {}
    assert list(lookup_decoding(model, [5], 50, 4, counts=counts)) == [5] * 50
    assert counts["steps"] <= 50 / 5 + 2 and counts["accepted"] == 50 - counts["steps"]


@pytest.mark.parametrize("text, count, expected", [
    ([1, 2, 3, 9, 8, 1, 2, 3], 2, [9, 8]),  # three tokens stood there before
    ([1, 2, 3, 4, 2, 3, 5, 2, 3], 1, [5]),  # the latest place of the last two
    ([1, 2, 3], 4, []), ([7], 4, []), ([4, 4], 3, [4, 4, 4]), ([1, 2, 1, 2], 0, []),
    ([9, 1, 2, 3, 1, 2, 3], 7, [1, 2, 3, 1, 2, 3, 1]),  # a loop is taken to go on
])
def test_lookup_takes_the_longest_and_latest_place(text, count, expected):
    assert look_up(text, count) == expected


def test_lookup_fills_the_context_and_names_what_is_impossible():
    model = model_of()
    assert len(list(lookup_decoding(model, [5] * 120, 50))) == 8  # prompt and answer fill the 128 positions
    for prompt, lookahead in (([], 4), ([5] * 128, 4), ([97], 4), ([5], 0)):
        with pytest.raises(ValueError, match="; .*; "):
            lookup_decoding(model, prompt, 5, lookahead)


def test_bench_runs_and_finds_equal_ids():
    pytest.importorskip("transformers", reason="the contender, transformers, is not installed")
    done = subprocess.run([sys.executable, BENCH, "--quick", "1", "--rounds", "1", "--threads", "1"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("single, quick", "batch of 16, quick", "overhead, quick", "sampling, 16 rows", "lengths, quick",
                  "products, quick, 4 rows",
                  "minillm, fast", "minillm, int8", "rows leave, prompts join"):
        assert words in done.stdout
