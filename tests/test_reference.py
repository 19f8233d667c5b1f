"""The comparison helper must be able to fail, and the reference must be attention."""

from __future__ import annotations

import math

import pytest
import torch

from .reference import assert_close, attention, dense_attention, relative_error, varlen_attention


@pytest.fixture
def exact() -> torch.Tensor:
    return torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))


def test_equal_tensors_pass(exact):
    assert assert_close(exact.clone(), exact, 0.0).largest == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_never_pass(exact, bad):
    result = exact.clone()
    result[1, 4, 2, 3] = bad
    with pytest.raises(AssertionError, match="1 of 120 values are not finite"):
        assert_close(result, exact, math.inf)


def test_equal_nans_never_pass(exact):
    result = exact.clone()
    result[0, 0, 0, 0] = math.nan
    with pytest.raises(AssertionError, match="reference is not finite"):
        assert_close(result, result.clone(), math.inf)


def test_shapes_that_would_broadcast_never_pass(exact):
    with pytest.raises(AssertionError, match="shape"):
        assert_close(exact[:1], exact, math.inf)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(exact, exact[:, :, :1], math.inf)


def test_comparing_nothing_never_passes(exact):
    with pytest.raises(AssertionError, match="nothing is compared"):
        assert_close(exact, exact, math.inf, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(AssertionError, match="nothing is compared"):
        assert_close(exact[:0], exact[:0], math.inf)


def test_one_wrong_value_among_many_fails(exact):
    scale = exact.abs().max()
    result = exact.clone()
    result[1, 2, 0, 1] += 0.011 * scale
    with pytest.raises(AssertionError, match=r"relative error 1\.10e-02"):
        assert_close(result, exact, 1e-2)
    assert_close(result, exact, 1.2e-2)


def test_the_error_is_relative_to_the_reference(exact):
    for factor in (1e-6, 1.0, 1e6):
        error = relative_error(exact * factor * 1.01, exact * factor)
        assert error.largest == pytest.approx(0.01, rel=1e-3)
        assert error.norm == pytest.approx(0.01, rel=1e-3)


def test_an_error_spread_thin_fails_by_its_norm(exact):
    reference = torch.full_like(exact, 0.1)
    reference[0, 0, 0, 0] = 100.0
    result = reference.clone()
    result[1] = -0.1
    assert relative_error(result, reference).norm > relative_error(result, reference).largest


def test_only_selected_positions_are_compared(exact):
    where = torch.ones(2, 5, dtype=torch.bool)
    where[1, 3] = False
    result = exact.clone()
    result[1, 3] = math.nan
    assert_close(result, exact, 0.0, where)
    where[1, 3] = True
    with pytest.raises(AssertionError):
        assert_close(result, exact, math.inf, where)


def test_zeros_against_something_fail():
    zeros = torch.zeros(2, 2)
    assert assert_close(zeros, zeros.clone(), 0.0).norm == 0.0
    with pytest.raises(AssertionError, match="inf"):
        assert_close(zeros + 1e-30, zeros, 1e9)


def test_reference_against_one_query_by_hand():
    # Scores ln 1, ln 3 and a hidden key: weights 1/4 and 3/4.
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([0.0, math.log(3.0), 9.0]).view(1, 1, 3, 1)
    value = torch.tensor([[4.0, 0.0], [0.0, 8.0], [7.0, 7.0]]).view(1, 1, 3, 2)
    mask = torch.tensor([True, True, False]).view(1, 1, 1, 3)
    output = attention(query, key, value, mask, scaling=1.0)
    torch.testing.assert_close(output, torch.tensor([1.0, 6.0]).double().view(1, 1, 1, 2))


def test_reference_groups_heads_in_order():
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 3, 8)
    value = torch.arange(2.0).view(1, 2, 1, 1).expand(1, 2, 3, 1)
    output = attention(query, key, value, torch.ones(1, 1, 2, 3, dtype=torch.bool))
    assert output[0, 0, :, 0].tolist() == pytest.approx([0, 0, 1, 1])


def test_reference_matches_torch_with_bias_and_scaling():
    query, key, value = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(~mask, -math.inf), scale=0.3
    )
    output = attention(query, key, value, mask, scaling=0.3, bias=bias)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_reference_is_zero_where_nothing_is_seen_and_ignores_hidden_nans():
    query, key, value = (torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False], [False, False]]).view(1, 1, 2, 2)
    poisoned = torch.where(torch.tensor([0.0, 1.0]).view(1, 1, 2, 1) > 0, math.nan, value)
    output = attention(query, key, poisoned, mask)
    assert output[0, 1].tolist() == [[0.0] * 4]
    output.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (query, key))


def test_the_varlen_stand_in_checks_its_contract():
    q, k = torch.randn(5, 2, 4), torch.randn(7, 2, 4)
    cu_q, cu_k = torch.tensor([0, 2, 5]).int(), torch.tensor([0, 4, 7]).int()
    varlen_attention(q, k, k, cu_q, cu_k, 3, 4, scale=None)
    bad = [
        (cu_q.long(), cu_k, 3, 4),
        (cu_q - 1, cu_k, 3, 4),
        (cu_q, torch.tensor([0, 4, 6]).int(), 3, 4),
        (cu_q, cu_k, 2, 4),
        (cu_q, cu_k, 3, 3),
        (cu_q, torch.tensor([0, 7]).int(), 3, 7),
    ]
    one = torch.tensor([0, 1, 1]).int()
    with pytest.raises(AssertionError):
        varlen_attention(q[:1], k, k, one, cu_k, 1, 4, scale=None)
    varlen_attention(q[:1], k, k, one, cu_k, 2, 4, scale=None)
    for cu_seqlens_q, cu_seqlens_k, longest_q, longest_k in bad:
        with pytest.raises(AssertionError):
            varlen_attention(q, k, k, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, scale=None)


def test_the_dense_stand_in_aligns_at_the_lower_right():
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 5, 1, 4)
    v = torch.eye(5).view(1, 5, 1, 5)
    seen = dense_attention(q, k, v, scale=1.0, window=(1, 0))[0, :, 0] > 0
    assert seen.tolist() == [
        [False, False, True, True, False],
        [False, False, False, True, True],
    ]
