"""Attention of packed rows beside plain torch in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels import attention as module
from inlay.kernels import native
from inlay.kernels.attention import Rows, attention, available, eager

needs_compiler = pytest.mark.skipif(not available(), reason="no C compiler on this machine")
CLOSE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""Of the largest value."""
SETTINGS = [
    {},
    {"window": 2},
    {"window": 13},
    {"window": 70},
    {"window": 530},
    {"cap": 3.0},
    {"window": 40, "cap": 30.0},
]


def plain(q, k, v, lengths, scale, window=None, cap=None):
    outs, first = [], 0
    for length in lengths:
        row = slice(first, first := first + length)
        keys, values = (t[row].repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = torch.einsum("mhd,nhd->hmn", q[row], keys) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        m, n = torch.arange(length)[:, None], torch.arange(length)
        seen = (n <= m) & (m - n < (window or length))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hmn,nhd->mhd", weights, values))
    return torch.cat(outs)


def draw(lengths, heads, kv_heads, width, dtype):
    generator = torch.Generator().manual_seed(width + sum(lengths))
    shapes = [(sum(lengths), h, width) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def check(compute, lengths, heads, kv_heads, width, dtype, **settings):
    """Compare the output of `compute` and its three gradients with those of `plain`."""
    *given, grad = draw(lengths, heads, kv_heads, width, dtype)
    scale = 1.3 * width**-0.5
    ours = [t.clone().requires_grad_() for t in given]
    out = compute(*ours, Rows.of(lengths), scale=scale, **settings)
    out.backward(grad)
    exact = [t.double().requires_grad_() for t in given]
    expected = plain(*exact, lengths, scale, **settings)
    expected.backward(grad.double())
    assert out.dtype == dtype
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for found, wanted in pairs:
        error = (found.detach().double() - wanted.detach()).abs().max()
        assert float(error) <= CLOSE[dtype] * float(wanted.detach().abs().max())


@pytest.mark.parametrize("compute", [pytest.param("compiled", marks=needs_compiler), "eager"])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("width", [2, 6, 64, 80])
def test_rotated_rows_are_those_of_rotated_queries_and_keys(width, dtype, compute, monkeypatch):
    if compute == "eager":
        monkeypatch.setattr(module, "compiled", lambda *_: False)
    lengths, scale = [5, 70, 1, 130], 0.6 * width**-0.5
    *given, grad = draw(lengths, 4, 2, width, dtype)
    generator = torch.Generator().manual_seed(1)
    # cosines and sines of their own for each number: nothing is shared between the halves
    rotation = torch.randn(2, sum(lengths), width, generator=generator).unbind()
    ours = [t.clone().requires_grad_() for t in given]
    out = attention(*ours, Rows.of(lengths), scale=scale, window=50, rotation=rotation)
    out.backward(grad)
    q, k, v = (t.double().requires_grad_() for t in given)
    cos, sin = (t.double()[:, None] for t in rotation)
    half = width // 2
    turned = [t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin for t in (q, k)]
    expected = plain(*turned, v, lengths, scale, window=50)
    expected.backward(grad.double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, (q, k, v), strict=True))]
    for found, wanted in pairs:
        error = (found.detach().double() - wanted.detach()).abs().max()
        assert found.dtype == dtype
        assert float(error) <= CLOSE[dtype] * float(wanted.detach().abs().max())


@needs_compiler
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("lengths", [[5], [16, 1, 64], [3, 0, 130, 63, 17], [600]], ids=str)
def test_compiled_rows_are_those_of_plain_torch(lengths, dtype, settings):
    check(attention, lengths, 4, 2, 32, dtype, **settings)


@needs_compiler
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("width", [1, 7, 20, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
def test_heads_may_have_any_width_and_share_keys(heads, kv_heads, width, dtype):
    check(attention, [70, 9], heads, kv_heads, width, dtype)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_the_eager_twin_computes_the_same(dtype, settings):
    check(eager, [16, 1, 90], 4, 2, 32, dtype, **settings)


@needs_compiler
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("flags", ["-march=native", "-march=haswell", "-march=x86-64"])
def test_code_for_lesser_processors_computes_the_same(flags, dtype, monkeypatch):
    if flags != "-march=native" and native._machine().find(" avx2 ") < 0:
        pytest.skip("not a processor that runs it")
    kept = tuple(flag for flag in native.FLAGS if flag != "-march=native")
    monkeypatch.setattr(native, "FLAGS", (*kept, flags))
    native.library.cache_clear()
    module._functions.cache_clear()
    try:
        assert available()
        check(attention, [5, 100], 4, 2, 24, dtype)
        check(attention, [70], 2, 1, 24, dtype, window=20, cap=5.0)
    finally:
        native.library.cache_clear()
        module._functions.cache_clear()


@needs_compiler
def test_any_number_of_threads_computes_the_same(monkeypatch):
    lengths = [100, 3, 64, 30, 80]
    q, k, v, grad = draw(lengths, 6, 3, 64, torch.float32)
    found = []
    for threads in (1, 2, 7, 200):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attention(*given, Rows.of(lengths), scale=0.1)
        out.backward(grad)
        found.append([out, *(t.grad for t in given)])
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_what_is_strided_is_read_in_place(dtype):
    """As a model gives it: q, k and v out of one product, heads before tokens."""
    joined = torch.randn(50, 8 * 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, parts = Rows.of([30, 20]), [96, 48, 48]
    views = [t.view(50, -1, 24) for t in joined.split(parts, -1)]
    whole = [t.contiguous() for t in views]
    swapped = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in whole]
    odd = [torch.stack((t, t), -1)[..., 0] for t in whole]
    outs = [attention(*given, rows, scale=0.2) for given in (whole, views, swapped, odd)]
    assert all(torch.equal(out, outs[0]) for out in outs)

    given = [t.requires_grad_() for t in whole]
    attention(*given, rows, scale=0.2).sum().backward()  # a gradient without strides
    first = [t.grad for t in given]
    for t in given:
        t.grad = None
    attention(*given, rows, scale=0.2).backward(torch.ones_like(outs[0]))
    assert all(torch.equal(a, t.grad) for a, t in zip(first, given, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_large_scores_stay_finite_and_what_is_no_number_stays_none(dtype):
    q, k, v, grad = draw([70], 1, 1, 16, dtype)
    check_finite = attention((q * 1e4).requires_grad_(), k * 10, v, Rows.of([70]), scale=1.0)
    assert check_finite.isfinite().all()
    check_finite.backward(grad)
    k[40] = torch.nan
    out = attention(q, k, v, Rows.of([70]), scale=1.0)
    assert out[:40].isfinite().all()
    assert out[40:].isnan().all()


def test_without_a_compiler_the_twin_computes_it(monkeypatch):
    monkeypatch.setenv("INLAY_NATIVE", "0")
    native.library.cache_clear()
    module._functions.cache_clear()
    try:
        assert not available()
        check(attention, [16, 1, 20], 4, 2, 32, torch.float32, window=5)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
        module._functions.cache_clear()


def test_the_largest_window_is_none_and_other_dtypes_take_the_twin():
    q, k, v, _ = draw([9, 12], 2, 2, 8, torch.float32)
    rows = Rows.of([9, 12])
    assert torch.equal(
        attention(q, k, v, rows, scale=1.0, window=12), attention(q, k, v, rows, scale=1.0)
    )
    check_double = attention(q.double(), k.double(), v.double(), rows, scale=1.0)
    torch.testing.assert_close(
        check_double, plain(q.double(), k.double(), v.double(), [9, 12], 1.0)
    )


@pytest.mark.parametrize("settings", [{}, {"window": 13}, {"window": 1000}], ids=str)
def test_torchs_own_is_told_the_same(settings, monkeypatch):
    """What varlen_attn is called with means the rows and the window, as its pages define them."""

    def varlen_attn(q, k, v, starts, key_starts, longest, longest_key, **told):
        assert starts is key_starts
        assert longest == longest_key == 90
        assert told["enable_gqa"]
        left, right = told["window_size"]
        assert right == 0  # none after the query itself
        window = None if left == -1 else left + 1  # `left` keys before it
        return plain(q, k, v, starts.diff().tolist(), told["scale"], window)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(module, "compiled", lambda *_: False)
    monkeypatch.setattr(module, "_varlen_takes", lambda *_: True)
    check(attention, [16, 1, 90], 4, 2, 32, torch.float32, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"window": 13}, {"cap": 3.0}], ids=str)
def test_on_a_gpu_the_rows_are_those_of_plain_torch(settings):
    def compute(*given, **told):
        *tensors, _ = given
        rows = Rows.of([40, 1, 200], "cuda")
        return attention(*(t.cuda() for t in tensors), rows, **told).cpu()

    check(compute, [40, 1, 200], 4, 2, 32, torch.bfloat16, **settings)
