"""A step in Rust gives the model's logits in every chunking, to the last bit the same alone and among others; guesses
change no token; what the module is not made for is refused or left to torch.

    python -m pytest tests/test_native.py
"""
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import SHAPE, answers, random_ids
from test_model import make_model as model_of

import inference
from forms import quantize
from inference import MOST_GUESSES, MOST_TOKENS, NativeDecoder, ReadAhead, make_native

pytestmark = pytest.mark.skipif(inference.module() is None, reason="minillm_decode is not built (pip install "
                                                                "./rustdecode)")
ROOT = Path(__file__).parent.parent
# heads of 16 numbers, of one and a half registers, of less than one; all heads in one group, each its own
SHAPES = {"dense": {}, "untied": {}, "yarn": {}, "yarn_given_factor": {}, "heads_of_24": dict(head_dim=24),
          "heads_of_6": dict(head_dim=6, hidden_size=54, intermediate_size=37),
          "one_kv_head": dict(num_key_value_heads=1), "no_groups": dict(num_key_value_heads=6)}


def model_like(shape, dtype=torch.float32):
    return model_of(shape if shape in ("untied", "yarn", "yarn_given_factor") else "dense", dtype, **SHAPES[shape])


def rounded(model, round_):
    """The model in float64 with these numbers in place of its matrices."""
    with torch.no_grad():
        for module in model.double().modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(round_(module.weight.float()).double())
    return model


def logits_of(decoder, ids, chunks, cache):
    """Logits [B,T,V] of ids [B,T], read in these chunks."""
    parts, start = [], 0
    for count in chunks:
        h = decoder.hidden_states(ids[:, start : start + count], cache)
        parts.append(decoder.lm_head(h.flatten(0, 1)).view(len(ids), count, -1).clone())
        start += count
    return torch.cat(parts, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunks", [[1] * 24, [4, 1, 1, 3, 2, 2, 1, 4, 4, 2], [10, 1, 13]], ids=["single", "mixed",
                                                                                             "long"])
def test_a_step_gives_the_models_logits(shape, chunks):
    model, ids = model_like(shape), random_ids(3, 24)
    decoder = NativeDecoder(model, torch.float32)
    found = logits_of(decoder, ids, chunks, decoder.new_cache(3, 24))
    torch.testing.assert_close(found.double(), model_like(shape, torch.float64)(ids).detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", ["untied", "heads_of_6"])
def test_narrow_weights_are_read_as_what_they_are(shape):
    """Beside fp32 keys: bf16 weights are exact numbers, of int8 ones what is multiplied has 16 bits."""
    ids = random_ids(3, 12)

    def from_int8(weight):
        numbers, scales = quantize(weight)
        return numbers * scales[:, None]

    for int8, round_, error in ((False, lambda w: w.bfloat16(), 2e-5), (True, from_int8, 2e-3)):
        decoder = NativeDecoder(model_like(shape), torch.bfloat16, int8)
        cache = decoder.twin.new_cache(3, 12, torch.float32)
        exact = rounded(model_like(shape), round_)(ids).detach()
        found = logits_of(decoder, ids, [1, 4, 5, 2], cache)
        assert (found - exact).norm() < error * exact.norm()
        # keys in bf16: off by their rounding, of 8 bits
        found = logits_of(decoder, ids, [1, 4, 5, 2], decoder.new_cache(3, 12))
        assert 1e-4 * exact.norm() < (found - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("dtype, int8", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_a_token_is_the_same_to_the_last_bit_alone_among_others_and_on_any_number_of_threads(dtype, int8):
    model, ids = model_of(), random_ids(4, 12)
    decoder = NativeDecoder(model, dtype, int8)
    alone = torch.cat([logits_of(decoder, row[None], [1] * 12, decoder.new_cache(1, 12)) for row in ids])
    for threads in (1, 2, 5):
        decoder.rust = inference.module().Decoder(*decoder.weights, threads)
        for chunks in ([1] * 12, [4, 4, 4], [3, 1, 2, 4, 2]):
            cache = decoder.new_cache(5, 12)
            cache.keep(range(4))
            assert torch.equal(logits_of(decoder, ids, chunks, cache), alone)


def test_shorter_rows_leave_no_hole_that_a_mask_would_read():
    """torch reads a ragged cache up to its longest row and multiplies what is masked by 0: it may not be NaN."""
    model, ids = model_of(), random_ids(3, 20)
    decoder = NativeDecoder(model, torch.float32)
    cache, lengths = decoder.new_cache(3, 20), [2, 9, 5]
    cache.kv.fill_(float("nan"))
    decoder.twin.hidden_states(ids[:, :9], cache=cache)
    cache.set_lengths(lengths)
    for _ in range(6):
        tokens = torch.stack([row[length] for row, length in zip(ids, cache.lengths, strict=True)])[:, None]
        found = decoder.lm_head(decoder.hidden_states(tokens, cache)[:, 0])
    tokens = torch.stack([row[length] for row, length in zip(ids, cache.lengths, strict=True)])[:, None]
    found = model.lm_head(model.hidden_states(tokens, cache=cache)[:, 0])
    for row, length, logits in zip(ids, cache.lengths, found, strict=True):
        torch.testing.assert_close(logits, model(row[None, :length])[0, -1], atol=1e-5, rtol=0)


SETTINGS = [dict(temperature=0.0), dict(temperature=0.8, top_k=10, top_p=0.9, seed=4, max_batch=2),
            dict(top_p=0.7, repetition_penalty=1.3, stop_ids=range(4, 30)),
            dict(temperature=0.0, min_new_tokens=5, stop_ids=range(4, 60))]


@pytest.mark.parametrize("options", SETTINGS, ids=["greedy", "sampled", "penalty", "at_least"])
def test_answers_are_the_models(options):
    model = model_of("yarn")
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 17, 2, 30, 17, 3)]
    expected = answers(model, prompts, 16, **options)
    model.inference_copy = NativeDecoder(model, torch.float32)
    assert answers(model, prompts, 16, **options) == expected


# -- Guesses -----------------------------------------------------------------------------------------------------------
def guided(model, count):
    """A ReadAhead that guesses as many tokens as it is told, whatever that costs here."""
    decoder = ReadAhead(NativeDecoder(model, torch.float32), NativeDecoder(model, torch.float32, int8=True))
    decoder._best_count = lambda share: count
    return decoder


@pytest.mark.parametrize("options", SETTINGS, ids=["greedy", "sampled", "penalty", "at_least"])
@pytest.mark.parametrize("count", [1, 3, MOST_GUESSES])
@pytest.mark.parametrize("wrong", [False, True])
def test_guesses_change_no_token(options, count, wrong, monkeypatch):
    model, prompts = model_of(), [random_ids(n, seed=n).tolist() for n in (1, 17, 2)]
    exact = NativeDecoder(model, torch.float32)
    decoder, guess, steps = guided(model, count), NativeDecoder.guess, []
    if wrong:
        monkeypatch.setattr(NativeDecoder, "guess", lambda *args: [(token + 1) % 97 for token in guess(*args)])
    read = decoder.exact.read
    decoder.exact.read = lambda *args: steps.append(1) or read(*args)
    for prompt in prompts:
        model.inference_copy = exact
        expected = answers(model, [prompt], 30, **options)
        model.inference_copy = decoder
        before = len(steps)
        assert answers(model, [prompt], 30, **options) == expected
        if options == SETTINGS[0] and not wrong:
            assert len(steps) - before < 30 / (1 + count) + 12, "right guesses save steps"


def test_guesses_do_not_outlive_their_text():
    """The states of guessed tokens belong to one cache at one length; a cache that was cut off and filled again to that
    length has others."""
    model, decoder = model_of(), guided(model_of(), 3)
    exact, ids = NativeDecoder(model, torch.float32), random_ids(2, 8)
    decoder.exact = exact
    cache, other = exact.new_cache(1, 20), exact.new_cache(1, 20)
    decoder.hidden_states(ids[:1], cache)
    decoder.hidden_states(ids[:1, :1], cache)  # three guesses wait behind it
    guess = torch.tensor([[decoder.pending[cache][1][0][0]]])
    cache.set_lengths([0])
    decoder.hidden_states(torch.cat((ids[1:], ids[1:, :1]), 1), cache)  # another text of the same length
    exact.hidden_states(torch.cat((ids[1:], ids[1:, :1]), 1), other)
    assert torch.equal(decoder.hidden_states(guess, cache), exact.hidden_states(guess, other))


def test_a_full_cache_is_filled_to_its_end_and_then_an_error():
    model = model_of()
    for decoder in (NativeDecoder(model, torch.float32), guided(model, 4)):
        cache = decoder.new_cache(1, 6)
        decoder.hidden_states(random_ids(1, 3), cache)
        for _ in range(3):
            decoder.hidden_states(random_ids(1, 1), cache)
        with pytest.raises(ValueError, match="KV cache overflow: 6 [+] 1 tokens in 6 slots; .*; "):
            decoder.hidden_states(random_ids(1, 1), cache)


def test_as_many_guesses_as_make_a_token_cheapest():
    decoder = ReadAhead(*[NativeDecoder(model_of(), torch.float32)] * 2)
    decoder.guess_seconds, decoder.step_seconds = 1.0, [4.0, 4.0]
    assert decoder._best_count(0.0) == 0 and decoder._best_count(1.0) == MOST_GUESSES
    # (4 + c) / (1 + p + ... + p^c): with p = 1/2 4, 10/3, 24/7, 56/15
    assert decoder._best_count(0.5) == 1
    decoder.step_seconds = [4.0, 4.0 + 8 * 3.0]  # (4 + 4 c) / ...: 4, 16/3
    assert decoder._best_count(0.9) == 0 and not decoder.pays()


def test_a_text_that_cannot_be_guessed_is_tried_now_and_then(monkeypatch):
    model = model_of()
    decoder = ReadAhead(NativeDecoder(model, torch.float32), NativeDecoder(model, torch.float32, int8=True))
    decoder.guess_seconds, decoder.step_seconds = 1.0, [4.0, 6.0]
    guessed, guess = [], NativeDecoder.guess
    monkeypatch.setattr(NativeDecoder, "guess", lambda self, token, cache, count: guessed.append(count) or [
        (token + 1) % 97 for token in guess(self, token, cache, count)])
    model.inference_copy = decoder
    answers(model, [[5]], 120, temperature=0.0)
    assert sum(guessed[:10]) > 10 and 1 <= len(guessed[10:]) <= 6 and set(guessed[-3:]) == {1}


# -- Which decoder -----------------------------------------------------------------------------------------------------
def test_fp32_weights_are_not_copied_and_others_are_passed_over_when_they_change():
    model, ids = model_of(), random_ids(1, 5)
    exact, narrow = NativeDecoder(model, torch.float32), NativeDecoder(model, torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    assert exact.is_of(model) and not narrow.is_of(model) and not exact.is_of(model_of())
    found = logits_of(exact, ids, [1] * 5, exact.new_cache(1, 5))
    torch.testing.assert_close(found, model(ids).detach(), atol=2e-5, rtol=0)


def test_outliers_in_the_weights_are_no_reason_to_fail():
    """One weight of each row ten times the others: in 8 bits a row keeps little of the rest, and nobody raises."""
    model = model_of()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 3] = 10
    for int8 in (False, True):
        assert "decoding with" in inference.accelerate(model, int8=int8)
        assert len(answers(model, [random_ids(30).tolist()], 4, temperature=0.0)[0]) == 4


def test_moved_weights_are_noticed():
    for move in (lambda model: model.to(torch.bfloat16), lambda model: setattr(
            model.lm_head.weight, "data", model.lm_head.weight.data.clone())):
        model = model_of()
        decoders = NativeDecoder(model, torch.float32), inference.InferenceCopy(model, torch.float32)
        assert all(decoder.is_of(model) for decoder in decoders)
        move(model)
        assert not any(decoder.is_of(model) for decoder in decoders)


def test_norms_of_bf16_weights_are_copies_and_passed_over_when_they_change():
    model = model_of().to(torch.bfloat16)
    decoder = NativeDecoder(model, torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(-1)
    assert not decoder.is_of(model)


def test_weights_that_do_not_lie_row_by_row_are_left_to_torch():
    model, prompt = model_of(), [random_ids(20).tolist()]
    expected = answers(model, prompt, 8, temperature=0.0)
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous().t())
    assert make_native(model, torch.float32, False) is None
    inference.accelerate(model)
    assert answers(model, prompt, 8, temperature=0.0) == expected
    with pytest.raises(ValueError, match="row by row"):
        NativeDecoder(model, torch.float32)


@pytest.mark.parametrize("stored, dtype", [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)])
def test_weights_that_would_be_widened_are_left_to_torch(stored, dtype):
    model = model_of(dtype=stored)
    assert make_native(model, dtype, False) is None


def test_a_forked_process_decodes_as_well(tmp_path):
    """The threads of a step are not there after a fork: waiting for them would take for ever."""
    code = """
import os, signal, sys, torch
sys.path[:0] = sys.argv[1:]
from test_model import make_model, random_ids
import inference
torch.set_num_threads(1)
decoder = inference.NativeDecoder(make_model(), torch.float32)
decoder.rust = inference.module().Decoder(*decoder.weights, 2)
step = lambda: decoder.hidden_states(random_ids(1, 4), decoder.new_cache(1, 8))
first = step()
if os.fork() == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(step(), first) else 1)
sys.exit(os.wait()[1])
"""
    assert subprocess.run([sys.executable, "-c", code, ROOT, ROOT / "tests"], timeout=100).returncode == 0


def test_threads_may_share_a_decoder_that_guesses():
    model, results = model_of(), {}
    model.inference_copy = guided(model, 4)
    prompts = [random_ids(5 + seed, seed=seed).tolist() for seed in range(4)]

    def run(number):
        results[number] = answers(model, [prompts[number]], 60, temperature=0.0)[0]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.inference_copy = None
    assert [results[number] for number in range(4)] == [
        answers(model, [prompt], 60, temperature=0.0)[0] for prompt in prompts]


@pytest.mark.parametrize("kind, dtype, rows", [("moe", torch.float32, 1), ("geglu", torch.float32, 1),
                                               ("dense", torch.float64, 1), ("dense", torch.float32, MOST_TOKENS + 1)])
def test_what_rust_does_not_know_is_left_to_torch(kind, dtype, rows):
    model = model_of(kind, dtype)
    assert make_native(model, dtype, False, rows) is None
    inference.accelerate(model, rows=rows)
    assert not isinstance(model.inference_copy, (NativeDecoder, ReadAhead))


def test_without_the_module_a_copy_is_made(monkeypatch):
    monkeypatch.setattr(inference, "module", lambda: None)
    model = model_of()
    assert make_native(model, torch.float32, False) is None
    assert "in Rust" not in inference.accelerate(model, int8=True) and model.inference_copy is not None


@pytest.mark.parametrize("int8", [False, True])
def test_accelerate_takes_the_step_in_rust(int8):
    model = model_of()
    assert "in Rust" in inference.accelerate(model, int8=int8)
    assert len(answers(model, [[5, 6]], 4, temperature=0.0)[0]) == 4


# -- The border --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, message", [
    (dict(ids=[97]), "id 97 is outside a vocabulary of 97"), (dict(ids=[]), "at least one"),
    (dict(lengths=[16]), "do not fit"), (dict(lengths=[0, 0, 0], ids=[1, 1, 1]), "do not fit"),
    (dict(ids=[1, 1, 1], lengths=[0, 0]), "as many ids for each row"),
    (dict(kv=np.zeros((3, 2, 2, 2, 16, 8), np.float32)), "do not fit"),
    (dict(kv=np.zeros(4, np.float32)), "do not fit"),
    (dict(cos=np.zeros((9, 16), np.float32)), "do not fit"),
])
def test_wrong_input_is_an_error_and_never_a_crash(change, message):
    decoder = NativeDecoder(model_of(), torch.float32)
    turns = np.zeros((16, 16), np.float32)
    call = dict(ids=[5], lengths=[0], kv=decoder.new_cache(2, 16).kv.numpy(), cos=turns, sin=turns, with_logits=False)
    assert decoder.rust.step(**call)[0].shape == (1, SHAPE["hidden_size"])
    with pytest.raises(ValueError, match=message):
        decoder.rust.step(**call | change)


def test_weights_that_do_not_fit_each_other_are_named():
    layers, *rest = NativeDecoder(model_of(), torch.float32).weights
    layer = list(layers[1])
    layer[6] = layer[6][:, :-1].copy()  # o
    with pytest.raises(ValueError, match=r"o is \[48, 95\] with 48 scales; it has the shape \[48, 96\]"):
        inference.module().Decoder([layers[0], tuple(layer), layers[2]], *rest, 1)
    with pytest.raises(ValueError, match="heads are a multiple of kv heads"):
        inference.module().Decoder(layers, *rest[:3], 6, 4, *rest[5:], 1)


def test_two_decoders_may_run_at_the_same_time():
    """As two requests of a server would: each in a thread of Python's, both with threads of their own."""
    model, results = model_of(), {}
    prompts = [random_ids(7, seed=seed).tolist() for seed in range(4)]
    decoders = [NativeDecoder(model, torch.float32) for _ in prompts]
    for decoder in decoders:
        decoder.rust = inference.module().Decoder(*decoder.weights, 3)

    def run(number):
        ids = torch.tensor([prompts[number]])
        cache = decoders[number].new_cache(1, 60)
        token, found = decoders[number].hidden_states(ids, cache)[:, -1], []
        for _ in range(40):
            found.append(int(decoders[number].lm_head(token).argmax()))
            token = decoders[number].hidden_states(torch.tensor([[found[-1]]]), cache)[:, 0]
        results[number] = found

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [answers(model, [prompt], 40, temperature=0.0)[0] for prompt in prompts]
    assert [results[number] for number in range(4)] == expected
