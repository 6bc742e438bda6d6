"""The attention function is the formula."""

import pytest
import torch

from train.models.attention import attention, attention_backend


@pytest.mark.parametrize(("queries", "keys", "heads", "width"), [(9, 9, 1, 40), (16, 5, 3, 8), (1, 77, 2, 160)])
def test_attention_is_its_formula(queries, keys, heads, width):
    q, k, v = (torch.randn(2, n, heads, width, requires_grad=True) for n in (queries, keys, keys))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    got = attention(q, k, v)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), weights), torch.autograd.grad(expected, (q, k, v), weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_backend_of_a_cpu_is_sdpa():
    assert attention_backend("cpu", torch.float32, 40) == "sdpa"


def test_bf16_on_a_cpu_keeps_its_dtype():
    q, k, v = (torch.randn(2, n, 2, 40).bfloat16() for n in (16, 77, 77))
    got = attention(q, k, v)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), attention(q.float(), k.float(), v.float()), rtol=1e-2, atol=1e-3)


def test_doubles_on_a_cpu_stay_double():
    q, k, v = (torch.randn(2, n, 2, 40, dtype=torch.float64) for n in (16, 77, 77))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 40**0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_on_cuda_is_the_formula(dtype):
    q, k, v = (torch.randn(2, n, 2, 40, device="cuda", dtype=dtype) for n in (16, 77, 77))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 40**0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(attention(q, k, v).double(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_attention_is_that_over_the_kept_keys(dtype):
    """In its gradients, too: what is masked gets none."""
    lengths = (3, 1, 13)
    q, k, v = (torch.randn(3, n, 2, 8, dtype=dtype, requires_grad=True) for n in (6, 13, 13))
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    got = attention(q, k, v, mask)
    for i, n in enumerate(lengths):
        alone = attention(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n])
        torch.testing.assert_close(got[i : i + 1], alone, rtol=1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    for gradient in torch.autograd.grad(got.float().square().sum(), (k, v)):
        assert not gradient[~mask].any()
        assert gradient[mask].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masked_attention_on_cuda_is_the_formula(dtype):
    q, k, v = (torch.randn(2, n, 2, 40, device="cuda", dtype=dtype) for n in (16, 77, 77))
    mask = torch.arange(77, device="cuda") < torch.tensor([5, 70], device="cuda")[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 40**0.5
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(attention(q, k, v, mask).double(), expected, rtol=2e-2, atol=1e-2)
