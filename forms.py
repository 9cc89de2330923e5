"""Products of a few rows with a matrix, in every form that torch has for them.

A form says how a matrix [M,K] is stored and how rows x [N,K] are multiplied with it. Which one is fastest depends on
processor, libraries, threads and shape, by factors; so fastest_form() times them.

What this file does not do: copy a model (inference.py), call the products written in Rust (inference.py too).

Paper: int8 products with a scale for each row and column, Dettmers et al. 2022 (arXiv:2208.07339).

Letters: N rows that are multiplied, M and K rows and columns of the matrix, P tables.
"""
import contextlib
import time
import warnings

import torch
import torch.nn.functional as F


# -- Which one ---------------------------------------------------------------------------------------------------------
def fastest_form(forms: dict, matrices: list, rows: int = 1) -> str:
    """Name of the form whose products are right and take least time with so many rows at once, for these matrices
    [M,K]. Raises: ValueError where none is right."""
    size = matrices[0].shape[1]
    inputs = [torch.linspace(-1, 1, n * size, dtype=matrices[0].dtype).view(n, size) for n in (1, 16, rows)]
    seconds = {}
    for name, (pack, multiply) in forms.items():
        with contextlib.suppress(RuntimeError, AttributeError):  # this build of torch may lack the product
            packed = [pack(matrix) for matrix in matrices]
            # a product that overflows may be fast as well
            wrong = [multiply(x, packed[0]) - F.linear(x, matrices[0]) for x in inputs]
            if all(e.norm() <= 0.03 * F.linear(x, matrices[0]).norm() for e, x in zip(wrong, inputs, strict=True)):
                seconds[name] = _seconds_of_products(multiply, inputs[-1], packed)
    if not seconds:
        raise ValueError(f"no right product among {', '.join(forms)} on this CPU; an inference copy needs one; decode "
                         "with the model itself")
    return min(seconds, key=seconds.get)


def _seconds_of_products(multiply, x, packed) -> float:
    """Seconds for the products of x with all matrices, the best of four."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for matrix in packed:
            multiply(x, matrix)
        times.append(time.perf_counter() - start)
    return min(times)


# -- fp32 and bf16 -----------------------------------------------------------------------------------------------------
def _in_two(matrix):
    """[M,K] as two blocks [2,M/2,K]."""
    return matrix.view(2, -1, matrix.shape[1])


def _multiply_in_two(x, blocks):
    """The blocks as a batch of two: some libraries read each with a thread of its own, but a lone matrix with one. With
    x transposed the row's stride is K; with stride 1 the same libraries are slow."""
    if len(x) != 1:
        return F.linear(x, blocks.flatten(0, 1))
    return torch.bmm(blocks, x.t().expand(2, -1, 1)).view(1, -1)


def _pack_tables(matrix):
    """[M,K] as P tables [K,M/P] of some columns each, one below the other: the matrix transposed, in pieces whose sums
    stay in registers, and one or more for each thread, if it can be halved so often. Returns (tables [P*K,M/P], ids of
    all their rows [P*K], first row of each table [P])."""
    parts = 1
    while len(matrix) % (2 * parts) == 0 and (parts < torch.get_num_threads() or len(matrix) // parts > 256):
        parts *= 2
    tables = matrix.view(parts, -1, matrix.shape[1]).transpose(1, 2).flatten(0, 1).contiguous()
    ids = torch.arange(len(tables))
    return tables, ids, ids[:: matrix.shape[1]]


def _multiply_tables(x, packed):
    """A row times a matrix is a weighted sum of the matrix's rows, which is what recommendation models ask of tables of
    embeddings: their kernel fetches the next rows while it adds, and reads bf16 faster than products of one row do."""
    tables, ids, starts = packed
    if len(x) != 1:  # [P,N,M/P]
        return torch.matmul(x, tables.view(len(starts), x.shape[1], -1)).transpose(0, 1).flatten(1)
    weights = x.expand(len(starts), -1).flatten()  # [P*K]
    return F.embedding_bag(ids, tables, starts, mode="sum", per_sample_weights=weights).view(1, -1)


def _pack_for_onednn(matrix):
    """[M,K] in the blocks in which oneDNN multiplies few rows; F.linear() makes such blocks anew in every call."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), 16)


def _multiply_for_onednn(x, packed):
    """As F.linear()."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


# -- int8 --------------------------------------------------------------------------------------------------------------
def _row_scales(matrix):
    """What the largest number of each row [M] is divided by to become 127."""
    return matrix.float().abs().amax(1).clamp(min=1e-12) / 127


def quantize(matrix):
    """int8 numbers [M,K] and a scale for each row [M]: matrix ~ numbers * scales[:, None]."""
    scales = _row_scales(matrix)
    return (matrix / scales[:, None]).round().to(torch.int8), scales


def multiply_int8(x, packed):
    """Rows in int8 as well, with a scale each, so that the product is one of whole numbers."""
    weight, scales = packed
    steps = x.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)  # [N,1]
    rows = (x / steps).round_().to(torch.int8)
    return (torch._int_mm(rows, weight.t()) * (steps * scales)).to(x.dtype)


def _pack_int8(matrix):
    """quantize() in the order in which torch's product of packed matrices reads it."""
    if not torch.cpu._is_vnni_supported():  # without VNNI that product adds up in 16 bits, where sums may not fit
        raise RuntimeError("no int8 instructions")
    zeros = torch.zeros(len(matrix), dtype=torch.int64)
    with warnings.catch_warnings(record=True):  # torch says it will drop such matrices: then the other forms remain
        return torch.ops.quantized.linear_prepack(
            torch.quantize_per_channel(matrix.float(), _row_scales(matrix), zeros, 0, torch.qint8), None)


def _multiply_packed_int8(x, packed):
    """As multiply_int8(), in fewer calls. The product takes one scale for all rows, in which small numbers would be
    lost beside a row of large ones: so rows are made equally large before."""
    if len(x) == 1:
        return torch.ops.quantized.linear_dynamic(x.float(), packed).to(x.dtype)
    largest = x.abs().amax(1, keepdim=True).clamp_(min=1e-12)  # [N,1]
    return torch.ops.quantized.linear_dynamic((x / largest).float(), packed).mul_(largest).to(x.dtype)


def _pack_weights_int8(matrix):
    """quantize() for a product that reads whole vector registers, past the end of a shorter row."""
    if matrix.shape[1] % 32:
        raise RuntimeError("rows that do not fill registers")
    return quantize(matrix)


def multiply_widened(x, packed):
    """Only the weights in int8, and made wide for the product: for many rows."""
    weight, scales = packed
    return F.linear(x, weight.to(x.dtype)) * scales.to(x.dtype)


def _multiply_weights_int8(x, packed):
    """Only the weights in int8; the row in bf16, for which torch has this product."""
    if len(x) > 4:  # the kernel is made for few rows
        return multiply_widened(x, packed)
    weight, scales = packed
    return torch._weight_int8pack_mm(x.bfloat16(), weight, scales.bfloat16()).to(x.dtype)


# -- The names ---------------------------------------------------------------------------------------------------------
FORMS = {"plain products": (lambda matrix: matrix, F.linear),
         "transposed": (lambda matrix: matrix.t().contiguous(), torch.matmul),
         "split in two": (_in_two, _multiply_in_two),
         "weighted sums": (_pack_tables, _multiply_tables),
         "packed": (_pack_for_onednn, _multiply_for_onednn)}
INT8_FORMS = {"packed int8 products": (_pack_int8, _multiply_packed_int8),
              "int8 products": (quantize, multiply_int8),
              "int8 weights": (_pack_weights_int8, _multiply_weights_int8)}
