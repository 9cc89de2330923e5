"""Beam search finds what transformers' beam search finds, and what exhaustive search finds.

    python -m pytest tests/test_generation.py
"""
import itertools

import pytest
import torch

from generation import beam_search
from model import ModelConfig, Transformer


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
def test_beam_search_equals_transformers(tmp_path, length_penalty):
    transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
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


def test_search_stops_at_the_context_limit():
    model = make_model()
    (ids, _), = beam_search(model, list(range(4, 40)) + list(range(4, 30)), num_beams=2, max_new_tokens=50)
    assert len(ids) == 2  # 62 of 64 positions are the prompt's


@pytest.mark.parametrize("prompt, fields", [([], {}), ([5] * 64, {}), ([5], {"num_beams": 0}),
                                            ([5], {"max_new_tokens": 0}), ([5], {"num_return": 9})])
def test_impossible_requests_are_named(prompt, fields):
    with pytest.raises(ValueError, match="; .*; "):
        beam_search(make_model(), prompt, **fields)
