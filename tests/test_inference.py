"""Every form of a product is the product; copies of the weights decode what the model decodes; what is faster is taken.

    python -m pytest tests/test_inference.py
"""
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import BF16_SPEEDUP
from test_model import KINDS, answers, random_ids
from test_model import make_model as model_of

import inference
import optim
from configuration import ModelConfig
from forms import FORMS, INT8_FORMS, fastest_form, quantize
from inference import InferenceCopy, accelerate
from model import Transformer


def copy_with(monkeypatch, model, form, forms=FORMS, dtype=None):
    """An InferenceCopy with this form of product, whatever is fastest here."""
    monkeypatch.setattr(inference, "fastest_form", lambda forms, matrices, rows: form)
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
    assert fastest_form(forms, [torch.ones(4, 4)], 1) == "for one"
    assert fastest_form(forms, [torch.ones(4, 4)], 16) == "for many"


@pytest.mark.parametrize("form", INT8_FORMS)
def test_int8_products_are_off_by_their_rounding_only(form):
    """A rounding error is uniform within half a step of largest / 127: of standard deviation step / sqrt(12)."""
    skip_without(form)
    draw = torch.Generator().manual_seed(0)
    matrix, (pack, multiply) = torch.randn(64, 256, generator=draw), INT8_FORMS[form]
    numbers, _ = quantize(matrix)
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
    form = fastest_form(INT8_FORMS, [matrix])
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


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_every_optimizer_changes_weights_in_a_way_that_a_copy_sees(monkeypatch, name):
    """The fused AdamW does not count up the versions of what it changes, nor does .data.add_()."""
    model = model_of()
    optimizer = optim.build(model, name, 1e-3)
    copy = copy_with(monkeypatch, model, "plain products")
    model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
    assert copy.is_of(model)
    optimizer.step()
    assert not copy.is_of(model)
    copy = copy_with(monkeypatch, model, "plain products")
    model.model.norm.weight.data.add_(1e-3)
    assert not copy.is_of(model)


def test_the_faster_way_is_taken(monkeypatch):
    model = model_of()
    monkeypatch.setattr(inference, "module", lambda: None)
    for seconds, word in (([2.0, 1.0], "2.00x as fast"), ([1.0, 2.0], "2.00x as slow")):
        times = iter(seconds)
        monkeypatch.setattr(inference, "seconds_of_a_step", lambda decoder, rows, times=times: next(times))
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
    monkeypatch.setattr(inference, "FORMS", forms)
    assert InferenceCopy(model_of(), torch.float32).products <= FORMS.keys()
    monkeypatch.setattr(inference, "FORMS", {"nothing": forms["nothing"]})
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
