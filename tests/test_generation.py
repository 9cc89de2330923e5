"""Beam search finds what transformers' and exhaustive search find; guessed tokens change no answer; copies of the
weights decode what the model decodes; the bench runs.

    python -m pytest tests/test_generation.py
"""
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import BF16_SPEEDUP
from test_model import KINDS, answers, random_ids
from test_model import make_model as model_of

import generation
from configuration import ModelConfig
from forms import FORMS, INT8_FORMS
from generation import beam_search, look_up, lookup_decoding
from inference import InferenceCopy, accelerate
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


# -- Inference copies --------------------------------------------------------------------------------------------------
def copy_with(monkeypatch, model, form, forms=FORMS, dtype=None):
    """An InferenceCopy with this form of product, whatever is fastest here."""
    monkeypatch.setattr(generation, "fastest_form", lambda forms, matrices, rows: form)
    return InferenceCopy(model, dtype or model.lm_head.weight.dtype, forms is INT8_FORMS)


def skip_without(form):
    """Skip where processor or torch lacks this product; fastest_form() passes it over there."""
    try:
        (FORMS | INT8_FORMS)[form][0](torch.ones(32, 32))
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"{form} is not on this machine: {error}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6, 5), (64, 48), (10, 33), (1200, 3)])
def test_every_form_of_a_matrix_gives_its_product(form, shape):
    skip_without(form)
    dtype, error = (torch.float32, 1e-5) if form == "packed" else (torch.float64, 1e-12)  # it has no float64
    matrix = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    pack, multiply = FORMS[form]
    for rows in (0, 1, 2, 7, 40):  # 0: an expert that nobody visits
        x = torch.randn(rows, shape[1], dtype=dtype, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(multiply(x, pack(matrix)), x @ matrix.T, atol=error, rtol=0)


def test_weighted_sums_of_bf16_rows_add_up_in_fp32():
    """Of 2048 numbers: added up in bf16 the result would be off by some percent, not by its own rounding."""
    draw = torch.Generator().manual_seed(0)
    matrix, x = (torch.rand(shape, generator=draw).bfloat16() for shape in ((600, 2048), (1, 2048)))
    pack, multiply = FORMS["weighted sums"]
    found = multiply(x, pack(matrix))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), x.double() @ matrix.double().T, atol=0, rtol=2**-8)


def test_the_form_is_chosen_for_the_rows_that_will_be_decoded():
    def sleeping(seconds):
        def multiply(x, matrix):
            time.sleep(seconds[len(x)])
            return F.linear(x, matrix)
        return lambda matrix: matrix, multiply

    forms = {"for one": sleeping({1: 0.001, 16: 0.02}), "for many": sleeping({1: 0.01, 16: 0.002})}
    assert generation.fastest_form(forms, [torch.ones(4, 4)], 1) == "for one"
    assert generation.fastest_form(forms, [torch.ones(4, 4)], 16) == "for many"


@pytest.mark.parametrize("form", INT8_FORMS)
def test_int8_products_are_off_by_their_rounding_only(form):
    """A rounding error is uniform within half a step of largest / 127: of standard deviation step / sqrt(12)."""
    skip_without(form)
    draw = torch.Generator().manual_seed(0)
    matrix, (pack, multiply) = torch.randn(64, 256, generator=draw), INT8_FORMS[form]
    numbers, _ = generation._quantize(matrix)
    assert numbers.dtype == torch.int8 and numbers.abs().max() == 127
    packed = pack(matrix)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 256, generator=draw)
        step = (matrix.abs().amax(1).mean() + x.abs().amax(1).mean()) / 127
        x[1::2] *= 1000  # a row's error is measured by its own numbers, not by those of its neighbours
        exact = x @ matrix.T
        error = (multiply(x, packed) - exact).norm(dim=1) / exact.norm(dim=1)  # [rows]
        assert 1e-4 < error.min() and error.max() < 2 * step / 12**0.5
    zero = multiply(torch.zeros(1, 256), packed)
    assert not zero.any() and not multiply(x, pack(torch.zeros(64, 256))).any(), "no division by zero"


@pytest.mark.parametrize("size", [20, 40, 48])
def test_no_int8_product_reads_past_a_short_row(size):
    """On one processor the product "int8 weights" ended the process with rows of 20, 24 and 40 numbers."""
    matrix = torch.randn(48, size, generator=torch.Generator().manual_seed(0))
    form = generation.fastest_form(INT8_FORMS, [matrix])
    assert form != "int8 weights"


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 1, 10, 7]], ids=["one", "single", "mixed"])
def test_copy_gives_the_models_logits(monkeypatch, kind, chunks):
    model = model_of("dense", torch.float64, mlp_type="plain") if kind == "plain" else model_of(kind, torch.float64)
    copy, ids = copy_with(monkeypatch, model, "transposed"), random_ids(3, 24)
    cache, parts, start = copy.new_cache(3, 24), [], 0
    for count in chunks:
        h = copy.hidden_states(ids[:, start : start + count], cache)
        parts.append(copy.lm_head(h.flatten(0, 1)).view(3, count, -1))
        start += count
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).detach(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["moe", "shared_scaled"])
def test_experts_are_copied_in_int8_too(monkeypatch, kind):
    model, ids = model_of(kind), random_ids(2, 12)
    copy = copy_with(monkeypatch, model, "int8 products", INT8_FORMS)
    monkeypatch.setattr(type(model.model.layers[-1].mlp), "forward", None)  # the model's own experts are not asked
    logits = copy.lm_head(copy.hidden_states(ids, copy.new_cache(2, 12)).flatten(0, 1))
    monkeypatch.undo()
    exact = model(ids).detach().flatten(0, 1)
    # the middle row: where two experts are about as good, rounding may choose the other one
    assert 1e-4 < ((logits - exact).norm(dim=1) / exact.norm(dim=1)).median() < 0.05


@pytest.mark.parametrize("kind", ["dense", "moe", "shared", "yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copy_decodes_what_the_model_decodes(monkeypatch, kind, dtype):
    model = model_of(kind, dtype)
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 17, 2, 30, 17, 3)]
    settings = [dict(temperature=0.0), dict(temperature=0.8, top_k=10, top_p=0.9, seed=4, max_batch=2),
                dict(top_p=0.7, repetition_penalty=1.3, stop_ids=range(4, 30))]
    expected = [answers(model, prompts, 16, **options) for options in settings]
    model.inference_copy = copy_with(monkeypatch, model, "plain products")
    assert [answers(model, prompts, 16, **options) for options in settings] == expected
    used = []
    head = model.inference_copy.lm_head
    monkeypatch.setattr(model.inference_copy, "lm_head", lambda h: used.append(1) or head(h))
    answers(model, prompts[:1], 2)
    assert used, "the copy was not used"


def test_a_copy_is_passed_over_when_the_weights_change(monkeypatch):
    model = model_of()
    model.inference_copy = copy = copy_with(monkeypatch, model, "plain products")
    assert copy.is_of(model) and not copy.is_of(model_of())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    assert not copy.is_of(model) and model.decoder()[0] is model
    fresh = answers(model, [[5, 9]], 12, temperature=0)
    model.inference_copy = None
    assert fresh == answers(model, [[5, 9]], 12, temperature=0)


def test_the_faster_way_is_taken(monkeypatch):
    model = model_of()
    for seconds, word in (([2.0, 1.0], "2.00x as fast"), ([1.0, 2.0], "2.00x as slow")):
        times = iter(seconds)
        monkeypatch.setattr(generation, "_seconds_of_a_step", lambda decoder, device, rows, times=times: next(times))
        assert word in accelerate(model) and (model.inference_copy is None) == ("slow" in word)
    assert "half" not in accelerate(model, dtype=torch.float16) and model.inference_copy is None


def test_adapters_are_not_forgotten():
    """A copy of the matrices alone would decode without them."""
    model = model_of()
    model.model.layers[0].self_attn.q_proj = type("Adapted", (torch.nn.Linear,), {})(48, 96, bias=False)
    assert "adapters" in accelerate(model) and model.inference_copy is None


def test_a_wrong_product_is_never_chosen(monkeypatch):
    forms = {"nothing": (lambda matrix: matrix, lambda x, matrix: x.new_zeros(len(x), len(matrix))),
             "missing": (lambda matrix: matrix, lambda x, matrix: torch.no_such_product(x)), **FORMS}
    monkeypatch.setattr(generation, "FORMS", forms)
    assert InferenceCopy(model_of(), torch.float32).products <= FORMS.keys()
    monkeypatch.setattr(generation, "FORMS", {"nothing": forms["nothing"]})
    with pytest.raises(ValueError, match="nothing on this CPU; .*; "):
        InferenceCopy(model_of(), torch.float32)


def train_on_counting(steps):
    """A model that has learnt to continue arithmetic sequences modulo 61, and rows to measure it on."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=61, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, max_position_embeddings=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def rows(count):
        start, step = torch.randint(61, (count, 1)), torch.randint(1, 6, (count, 1))
        noise = (torch.rand(count, 16) < 0.05) * torch.randint(61, (count, 16))
        return (start + step * torch.arange(16) + noise) % 61

    for _ in range(steps):
        ids = rows(32)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), rows(64)


@pytest.mark.parametrize("forms, form, dtype", [(INT8_FORMS, form, torch.float32) for form in INT8_FORMS]
                         + [(FORMS, "plain products", torch.bfloat16)])
def test_narrow_copies_of_a_trained_model_keep_its_perplexity(monkeypatch, trained, forms, form, dtype):
    if dtype == torch.bfloat16 and not BF16_SPEEDUP:
        pytest.skip("bf16 products crash on this machine")
    if forms is INT8_FORMS:
        skip_without(form)
    model, ids = trained
    copy = copy_with(monkeypatch, model, form, forms, dtype)
    h = copy.hidden_states(ids[:, :-1], copy.new_cache(len(ids), 15))
    logits = copy.lm_head(h.flatten(0, 1)).float()  # [N,V]
    with torch.no_grad():
        exact = model(ids[:, :-1]).flatten(0, 1)
    before, after = (F.cross_entropy(x, ids[:, 1:].flatten()) for x in (exact, logits))
    assert before < 2 and abs((after - before).exp() - 1) < 0.01 and not torch.equal(exact, logits)
    model.inference_copy = copy
    greedy = answers(model, ids[:8, :4].tolist(), 8, temperature=0)
    model.inference_copy = None
    pairs = zip(sum(greedy, []), sum(answers(model, ids[:8, :4].tolist(), 8, temperature=0), []), strict=True)
    assert sum(a == b for a, b in pairs) > 0.9 * 64


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        return train_on_counting(150)


# -- The bench ---------------------------------------------------------------------------------------------------------
def test_bench_runs_and_finds_equal_ids():
    pytest.importorskip("transformers", reason="the contender, transformers, is not installed")
    done = subprocess.run([sys.executable, BENCH, "--quick", "1", "--rounds", "1", "--threads", "1"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("single, quick", "batch of 16, quick", "overhead, quick", "sampling, 16 rows", "lengths, quick",
                  "products, quick, 4 rows",
                  "minillm, fast copy", "minillm, int8 copy", "rows leave, prompts join"):
        assert words in done.stdout
