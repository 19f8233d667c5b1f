"""Every backend against attention in float64, on cases generated from its own declarations.

On a CPU the two flash backends run with exact stand-ins for their kernels, which check what they
are handed. On a GPU (marker ``gpu``) the real ones run, and their errors are recorded beside those
of ``sdpa``.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from smartattn import tails
from smartattn.backends import (
    Backend,
    base,
    eager,
    flash,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    sdpa,
    sdpa_unpadded,
    torch_varlen,
    triton_varlen,
)
from smartattn.backends.base import DEFAULT_TOLERANCES, Support
from smartattn.backends.flash import Route
from smartattn.call import Call, Runner
from smartattn.layouts import LONGEST_TILE
from smartattn.packing import where_keys_lie
from smartattn.plan import Pattern, Plan

from . import gpu_results
from .cases import (
    CORE,
    Case,
    Situation,
    cases,
    feature_cases,
    fewest_kinds,
    shape_cases,
    situations,
    takes,
)
from .reference import (
    VarlenReference,
    assert_close,
    attention,
    bounded_attention,
    dense_attention,
    varlen_attention,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
N = 33


# -- the flash backends with exact kernels ---------------------------------------------------------


class FlashStandIn(flash_attention_2.FlashAttention2Backend):
    """Through the public functions of the package."""

    label = "flash_attention_2"
    support = replace(flash_attention_2.FlashAttention2Backend.support, devices=None, dtypes=None)
    thin = False

    def bind(self, plan: Plan, call: Call) -> Runner:
        extension = SimpleNamespace(fwd=_fwd, varlen_fwd=_varlen_fwd, fwd_kvcache=_fwd_kvcache)
        chosen = extension if self.thin else None
        with mock.patch.object(flash_attention_2, "_extension", return_value=chosen):
            return super().bind(plan, call)


class ThinFlashStandIn(FlashStandIn):
    """Through the compiled functions under it."""

    label = "flash_attention_2-thin"
    thin = True


class Flash3StandIn(flash_attention_3.FlashAttention3Backend):
    label = "flash_attention_3"
    support = replace(flash_attention_3.FlashAttention3Backend.support, devices=None, dtypes=None)

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        return [r for r in super().further_refusals(plan, call) if not r.startswith("this build")]


class Flash4StandIn(flash_attention_4.FlashAttention4Backend):
    label = "flash_attention_4"
    # Small heads are enough for what is around the kernels.
    support = replace(
        flash_attention_4.FlashAttention4Backend.support,
        devices=None,
        dtypes=None,
        head_dim_multiple=8,
    )


class TorchVarlenStandIn(torch_varlen.TorchVarlenBackend):
    """Through varlen_attn with a gradient, through the operator under it without."""

    label = "torch_varlen"
    support = replace(torch_varlen.TorchVarlenBackend.support, devices=None, dtypes=None)


class TritonVarlenStandIn(triton_varlen.TritonVarlenBackend):
    label = "triton_varlen"
    support = replace(triton_varlen.TritonVarlenBackend.support, devices=None, dtypes=None)


def _check_flash_arguments(*states: torch.Tensor) -> None:
    assert len({x.shape[-1] for x in states}) == 1
    assert all(x.stride(-1) == 1 for x in states)


def _flash_attn_func(
    q: Any, k: Any, v: Any, *, softmax_scale: Any, causal: bool, window_size: Any, softcap: float,
    dropout_p: float, deterministic: bool,
) -> torch.Tensor:  # fmt: skip
    window = (window_size[0], 0 if causal else window_size[1])
    return dense_attention(q, k, v, scale=softmax_scale, window=window, softcap=softcap)


def _fwd(
    q: Any, k: Any, v: Any, out: None, alibi: None, dropout: float, scale: float, causal: bool,
    left: int, right: int, softcap: float, softmax: bool, generator: None,
) -> list[torch.Tensor]:  # fmt: skip
    _check_flash_arguments(q, k, v)
    window = (left, 0 if causal else right)
    return [dense_attention(q, k, v, scale=scale, window=window, softcap=softcap)]


def _flash_attn_varlen_func(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, softmax_scale: Any,
    causal: bool, window_size: Any, softcap: float, dropout_p: float, deterministic: bool,
) -> torch.Tensor:  # fmt: skip
    window = (window_size[0], 0 if causal else window_size[1])
    return varlen_attention(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=softmax_scale, window=window, softcap=softcap
    )


def _varlen_fwd(
    q: Any, k: Any, v: Any, out: None, cu_q: Any, cu_k: Any, used_k: Any, leftpad: None,
    table: None, alibi: None, max_q: int, max_k: int, dropout: float, scale: float, zero: bool,
    causal: bool, left: int, right: int, softcap: float, softmax: bool, generator: None,
) -> list[torch.Tensor]:  # fmt: skip
    _check_flash_arguments(q, k, v)
    window = (left, 0 if causal else right)
    return [
        varlen_attention(
            q, k, v, cu_q, cu_k, max_q, max_k, used_k, scale=scale, window=window, softcap=softcap
        )
    ]


def _flash_attn_with_kvcache(
    q: Any, k: Any, v: Any, *, cache_seqlens: Any, cache_leftpad: Any, softmax_scale: Any,
    causal: bool, window_size: Any, softcap: float, num_splits: int,
) -> torch.Tensor:  # fmt: skip
    assert num_splits == 0
    window = (window_size[0], 0 if causal else window_size[1])
    return bounded_attention(
        q, k, v, cache_leftpad, cache_seqlens, scale=softmax_scale, window=window, softcap=softcap
    )


def _fwd_kvcache(
    q: Any, k: Any, v: Any, new_k: None, new_v: None, end: Any, cos: None, sin: None,
    index: None, start: Any, table: None, alibi: None, out: None, scale: float, causal: bool,
    left: int, right: int, softcap: float, interleaved: bool, splits: int,
) -> list[torch.Tensor]:  # fmt: skip
    _check_flash_arguments(q, k, v)
    # There are no parts without a GPU.
    assert splits == 0
    window = (left, 0 if causal else right)
    return [bounded_attention(q, k, v, start, end, scale=scale, window=window, softcap=softcap)]


def _varlen_attn(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, scale: Any,
    window_size: Any, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    assert enable_gqa or q.shape[1] == k.shape[1]
    return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window=window_size)


def _flash_attention_forward(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, dropout: float,
    causal: bool, debug: bool, *, scale: Any, window_size_left: int, window_size_right: int,
    seqused_k: Any = None,
) -> list[torch.Tensor]:  # fmt: skip
    _check_flash_arguments(q, k, v)
    window = (window_size_left, 0 if causal else window_size_right)
    if cu_q is None:
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        return [dense_attention(q, k, v, scale=scale, window=window)]
    return [
        varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, seqused_k, scale=scale, window=window)
    ]


def _scaled_dot_product_flash_attention(
    q: Any, k: Any, v: Any, dropout: float, causal: bool, debug: bool, *, scale: Any
) -> list[torch.Tensor]:
    states = [states.transpose(1, 2) for states in (q, k, v)]
    _check_flash_arguments(*states)
    window = (-1, 0 if causal else -1)
    return [dense_attention(*states, scale=scale, window=window).transpose(1, 2)]


def _clear(layout: Any, values: torch.Tensor, output: torch.Tensor | None = None) -> None:
    """What the Triton kernel does, in an output that holds NaN."""
    if output is not None:
        output.fill_(torch.nan)
    for first, last, begin, end in [] if layout.gaps is None else layout.gaps.tolist():
        tail = values[first:last]
        if not tail.isfinite().all():
            tail.nan_to_num_(0.0, 0.0, 0.0)
        if output is not None:
            assert end - begin <= layout.longest_gap
            output[begin:end] = 0.0


def _check_tiles(v: torch.Tensor, cu_q: Any, cu_k: Any, used_k: Any, used_q: Any = None) -> None:
    """What is loaded with the last tile of a sequence is multiplied by zero, and NaN stays NaN."""
    for i in range(len(cu_q) - 1):
        queries = cu_q[i + 1] - cu_q[i] if used_q is None else used_q[i]
        if queries and (used_k is None or used_k[i]):
            end = cu_k[i + 1] if used_k is None else cu_k[i] + used_k[i]
            assert bool(v[end : end + LONGEST_TILE].isfinite().all()), "NaN in a tile"


def _fa3_fwd(*arguments: Any) -> list[torch.Tensor]:
    given = dict(zip(flash_attention_3._ARGUMENTS, arguments, strict=True))
    options = {name: given.pop(name) for name in ("softmax_scale", "softcap")}
    q, k, v = (given.pop(name) for name in "qkv")
    _check_flash_arguments(q, k, v)
    left, right = given.pop("window_size_left"), given.pop("window_size_right")
    right = 0 if given.pop("is_causal") else right
    cu_q, cu_k = given.pop("cu_seqlens_q"), given.pop("cu_seqlens_k")
    max_q, max_k = given.pop("max_seqlen_q"), given.pop("max_seqlen_k")
    used_k, start = given.pop("seqused_k"), given.pop("leftpad_k")
    used_q, output = given.pop("seqused_q"), given.pop("out")
    assert given.pop("num_splits") in (0, 1)
    assert all(value in (None, 0, False) for value in given.values())
    settings = {
        "scale": options["softmax_scale"],
        "softcap": options["softcap"],
        "window": (left, right),
    }
    if cu_q is not None:
        assert start is None
        _check_tiles(v, cu_q, cu_k, used_k, used_q)
        settings |= {"used_q": used_q, "output": output}
        return [varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, used_k, **settings)]
    assert used_q is output is None
    if start is not None:
        return [bounded_attention(q, k, v, start, used_k, **settings)]
    return [dense_attention(q, k, v, **settings)]


def _attention_kernel(
    device: torch.device, kind: Any, grid: Any, tensors: Any, arguments: Any, **options: int
) -> None:
    """What the Triton kernel does with the same arguments; see ``triton_kernels``."""
    query, key, value, output, table = tensors
    assert arguments[:5] == tuple(one.data_ptr() for one in tensors)
    assert all(address % 16 == 0 for address in arguments[:4])
    scale, *numbers = arguments[5:]
    for i, states in enumerate((query, key, value)):
        assert states.stride() == (*(8 * n for n in numbers[3 * i : 3 * i + 3]), 1)
    sequences, q_len, heads, group, shift, left, right, rows, _, dim, width, windowed, stages = (
        numbers[9:]
    )
    assert query.shape[1:] == (heads, q_len, dim)
    assert width == max(16, 1 << (dim - 1).bit_length())
    assert options["num_stages"] == stages
    assert group == heads // key.shape[1]
    assert table.shape == (6, sequences)
    assert grid == (-(-int(table[5].max()) * group // rows), key.shape[1], sequences)
    assert windowed or left >= key.shape[2] + q_len
    output.fill_(torch.nan)
    for row, q_start, q_count, k_start, k_count, written in table.T.tolist():
        places = q_start + torch.arange(written)
        output[row, torch.where(places >= q_len, places - q_len, places)] = 0.0
        if not (q_count and k_count):
            continue
        queries = query[row, :, q_start : q_start + q_count].double()
        keys, values = (
            states[row, :, k_start : k_start + k_count].double().repeat_interleave(group, 0)
            for states in (key, value)
        )
        position = shift + q_start + torch.arange(q_count)[:, None]
        there = k_start + torch.arange(k_count)[None]
        seen = (there <= position + right) & (there >= position - left)
        scores = (queries @ keys.mT * scale / math.log2(math.e)).masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
        attended = (weights @ values).transpose(0, 1)
        output[row, q_start : q_start + q_count] = attended.to(output.dtype)


def _fa4_window(causal: bool, window_size: Any) -> tuple[int, int]:
    left, right = (-1 if side is None else side for side in window_size)
    return (left, 0 if causal else right)


def _fa4_func(
    q: Any, k: Any, v: Any, qv: None = None, softmax_scale: Any = None, causal: bool = False,
    window_size: Any = (None, None), softcap: float = 0.0, num_splits: int = 1,
    deterministic: bool = False,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    _check_flash_arguments(q, k, v)
    assert (qv, num_splits, deterministic) == (None, 1, False)
    window = _fa4_window(causal, window_size)
    return dense_attention(q, k, v, scale=softmax_scale, window=window, softcap=softcap), None


def _fa4_varlen_func(
    q: Any, k: Any, v: Any, qv: None = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: None = None, max_seqlen_k: None = None, seqused_k: Any = None,
    softmax_scale: Any = None, causal: bool = False, window_size: Any = (None, None),
    softcap: float = 0.0, num_splits: int = 1, deterministic: bool = False,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    _check_flash_arguments(q, k, v)
    assert (qv, max_seqlen_q, max_seqlen_k) == (None, None, None)
    assert (num_splits, deterministic) == (1, False)
    _check_tiles(v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    if seqused_k is not None:
        # A tile is loaded for a sequence of which no key is used, too.
        for first, last in itertools.pairwise(cu_seqlens_k.tolist()):
            assert bool(v[first : min(last, first + 144)].isfinite().all()), "NaN in a tile"
    assert torch.is_grad_enabled() or not q.requires_grad
    if q.requires_grad:
        # The backward multiplies by queries in whole tiles.
        assert seqused_k is None
        assert bool(q.isfinite().all())
    window = _fa4_window(causal, window_size)
    # FlashAttention-2 alone takes a longest query of 1 for a promise.
    longest = [max(2, int(cu.diff().max())) for cu in (cu_seqlens_q, cu_seqlens_k)]
    return varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, seqused_k, scale=softmax_scale,
        window=window, softcap=softcap,
    ), None  # fmt: skip


FA4 = flash_attention_4.Functions(_fa4_func, _fa4_varlen_func)
FA4_REAL = flash_attention_4.FlashAttention4Backend()


@pytest.fixture
def stand_in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(
        __version__="2.0",
        flash_attn_func=_flash_attn_func,
        flash_attn_varlen_func=_flash_attn_varlen_func,
        flash_attn_with_kvcache=_flash_attn_with_kvcache,
    )
    monkeypatch.setattr(flash_attention_2, "_package", lambda: (package, None))
    monkeypatch.setattr(flash_attention_2, "_has_dropout", lambda device: True)
    monkeypatch.setattr(flash_attention_3, "_operator", lambda: (_fa3_fwd, None))
    monkeypatch.setattr(flash_attention_3, "has", lambda feature, device: True)
    monkeypatch.setattr(flash_attention_4, "_missing", lambda: None)
    monkeypatch.setattr(flash_attention_4, "_functions", lambda: (FA4, None))
    monkeypatch.setattr(torch_varlen, "_varlen_attn", lambda: (_varlen_attn, {"enable_gqa"}, None))
    monkeypatch.setattr(torch_varlen, "_operator", lambda: _flash_attention_forward)
    monkeypatch.setattr(
        torch_varlen, "_dense_operator", lambda: _scaled_dot_product_flash_attention
    )
    monkeypatch.setattr(tails, "unavailable", lambda device: None)
    monkeypatch.setattr(tails, "clear", _clear)
    monkeypatch.setattr(triton_varlen, "_broken", lambda device: None)
    monkeypatch.setattr(triton_varlen, "_launch", _attention_kernel)


@pytest.fixture(autouse=True)
def padding_in_place_in_short_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it would not pay in training: the cases are small, and that way is to be tested."""
    monkeypatch.setattr(flash, "BACKWARD_QUERIES", 1)


ON_CPU: tuple[Backend, ...] = (
    sdpa.SdpaBackend(),
    sdpa_unpadded.SdpaUnpaddedBackend(),
    *(VarlenReference(how) for how in Route if how is not Route.DENSE),
    FlashStandIn(),
    ThinFlashStandIn(),
    Flash3StandIn(),
    Flash4StandIn(),
    TorchVarlenStandIn(),
    TritonVarlenStandIn(),
)


def _label(backend: Backend) -> str:
    return getattr(backend, "label", backend.name)


# -- one case --------------------------------------------------------------------------------------


def run_case(backend: Backend, case: Case, device: torch.device) -> dict[str, float]:
    """Runs a case and its backward and asserts that it is right; returns the largest errors."""
    s = case.situation
    query, key, value = case.tensors(device)
    plan, call = s.plan(device, case.dtype), case.call_with(key, value)
    assert backend.refusals(plan, call) == []
    bias = case.bias(device)
    arguments = {"position_bias": bias} if bias is not None else {}
    output = backend.run(plan, call, query, key, value, arguments)
    assert output.dtype == case.dtype
    assert bool(output.isfinite().all()), "not finite at a padding position"

    mask = torch.from_numpy(s.seen)[:, None].to(device)
    counts = torch.from_numpy(s.counts).to(device)
    exact = [x.detach().double().requires_grad_(case.grad) for x in (query, key, value)]
    exact_bias = None if bias is None else bias.detach().double().requires_grad_(case.grad)
    expected = attention(*exact, mask, scaling=call.scaling, softcap=call.softcap, bias=exact_bias)
    tolerance = backend.support.tolerances[case.dtype]
    found = {"output": assert_close(output, expected, tolerance, counts, "output").largest}
    if case.grad:
        # Without a gradient there are other ways to read the same batch.
        with torch.no_grad():
            again, without = s.plan(device, case.dtype), replace(call, grad=False)
            inference = backend.run(again, without, query, key, value, arguments)
        assert bool(inference.isfinite().all()), "not finite at a padding position"
        error = assert_close(inference, expected.detach(), tolerance, counts, "inference")
        found["inference"] = error.largest
        generator = torch.Generator(device).manual_seed(1)
        weights = torch.randn(output.shape, generator=generator, device=device).to(case.dtype)
        weights = weights * counts[:, :, None, None]
        inputs = {"query": query, "key": key, "value": value}
        wanted = list(exact)
        if bias is not None:
            inputs["position_bias"] = bias
            wanted.append(exact_bias)
        gradients = torch.autograd.grad(output, list(inputs.values()), weights)
        exact_gradients = torch.autograd.grad(expected, wanted, weights.double())
        for name, gradient, reference in zip(inputs, gradients, exact_gradients, strict=True):
            if float(reference.abs().max()) < 1e-12:
                # Whoever sees one key alone has a constant softmax: only rounding is left.
                noise = float(gradient.abs().max()) / float(exact_gradients[2].abs().max())
                assert noise <= tolerance, f"gradient of {name}: {noise:.2e} instead of zero"
                continue
            # Padding included: nothing that counts depends on it, so its gradient is zero.
            error = assert_close(gradient, reference, tolerance, None, f"gradient of {name}")
            found[name] = error.largest
    return found


def _parameters(backends: tuple[Backend, ...], generate: Any) -> list[Any]:
    return [
        pytest.param(backend, case, id=f"{_label(backend)}-{case.id}")
        for backend in backends
        for case in generate(backend)
        if takes(backend, case)
    ]


@functools.cache
def _cpu_cases() -> list[Case]:
    half = cases(N, (torch.float32, torch.float64, torch.bfloat16, torch.float16), 7, 4)
    return half + feature_cases(N, (torch.float32,))


def _cpu_shape_cases(backend: Backend) -> list[Case]:
    return shape_cases(17, backend, (torch.float32,), layouts=1)


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize(("backend", "case"), _parameters(ON_CPU, lambda backend: _cpu_cases()))
def test_matches_float64(backend: Backend, case: Case) -> None:
    run_case(backend, case, CPU)


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize(("backend", "case"), _parameters(ON_CPU, _cpu_shape_cases))
def test_matches_float64_at_the_limits_of_its_declarations(backend: Backend, case: Case) -> None:
    run_case(backend, case, CPU)


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("backend", ON_CPU, ids=_label)
def test_refuses_exactly_what_it_cannot_run(backend: Backend) -> None:
    taken = refused = 0
    for case in [*_cpu_cases(), *_cpu_shape_cases(backend)]:
        reasons = backend.refusals(case.situation.plan(CPU, case.dtype), case.call(CPU))
        assert (reasons == []) == takes(backend, case), (case.id, reasons)
        taken, refused = taken + (not reasons), refused + bool(reasons)
    assert taken > (200 if backend.support.backward else 100)
    assert refused > (50 if backend.name != "sdpa" else 10)


def test_every_pattern_and_padding_is_generated() -> None:
    generated = {case.situation.name.rsplit("-", 1)[0] for case in _cpu_cases()}
    assert generated == {s.name.rsplit("-", 1)[0] for s in situations(N)}
    assert set(CORE) <= generated
    combinations = {(case.layout, case.heads, case.head_dim) for case in _cpu_cases()}
    assert len(combinations) >= 28


def test_where_kernels_are_built_every_fact_comes_up_in_few_cases() -> None:
    every = [*_gpu_cases(), *_gpu_shape_cases(FA4_REAL)]
    few = fewest_kinds(FA4_REAL, every)
    taken = [case for case in every if takes(FA4_REAL, case)]
    assert 30 < len(few) < 80 < len(taken) / 10
    for fact in ("dtype", "head_dim", "grad", "feature", "layout"):
        found, wanted = ({getattr(case, fact) for case in some} for some in (few, taken))
        assert found == wanted, fact
    assert {case.situation.causal for case in few} == {True, False}
    assert {case.situation.window is None for case in few} == {True, False}
    # Others build nothing that would take its time.
    assert fewest_kinds(REAL[2], every) == every


# -- properties that no float64 reference shows ----------------------------------------------------


def _core(name: str, n: int = N) -> Situation:
    return next(s for s in situations(n) if s.name == f"{name}-{n}")


NAN_LAYOUTS = ("tokens first", "heads first", "fused", "sliced", "stacked")


def check_nan_in_padding(backend: Backend, case: Case, device: torch.device) -> None:
    """Fills the padding with what must not spread, where it lies, and compares the outputs."""
    s = case.situation
    plan = s.plan(device, case.dtype)
    query, key, value = case.tensors(device)
    call = case.call_with(key, value)
    clean = backend.run(plan, call, query, key, value, {})
    padding = torch.from_numpy(~s.real).to(device)[:, None, :, None]
    for poison in (torch.nan, torch.inf):
        states = case.tensors(device)
        # A single query is computed wherever it stands.
        first = 0 if s.q_len > 1 else 1
        for one, place in list(zip(states, (s.shift, 0, 0), strict=True))[first:]:
            hidden = padding[:, :, place : place + one.shape[2]]
            one.detach().masked_fill_(hidden, poison)
        before = [one.detach().clone() for one in states]
        assert torch.equal(backend.run(plan, call, *states, {}), clean)
        # What is written to keep it where it is stays in the padding too.
        for one, earlier, place in zip(states, before, (s.shift, 0, 0), strict=True):
            real = ~padding[:, :, place : place + one.shape[2]]
            assert torch.equal(torch.where(real, one.detach(), 0), torch.where(real, earlier, 0))


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize(
    "name",
    [
        "causal-left",
        "causal-both",
        "bidirectional-left",
        "bidirectional-right",
        "bidirectional-both",
        "bidirectional-holes",
        "decode-left",
        "decode-both",
        "cross-right",
    ],
)
@pytest.mark.parametrize(
    ("layout", "grad"),
    [("tokens first", True), ("heads first", True), *((one, False) for one in NAN_LAYOUTS)],
)
@pytest.mark.parametrize("backend", ON_CPU[2:], ids=_label)
def test_nan_in_padding_stays_there(backend: Backend, grad: bool, layout: str, name: str) -> None:
    """Backends that pack never read padding, whatever it holds (trap 1)."""
    case = Case(_core(name), 4, 2, 16, 16, layout, torch.float32, grad)
    if not takes(backend, case):
        pytest.skip("not a case of this backend")
    check_nan_in_padding(backend, case, CPU)


@pytest.mark.parametrize("padding", ["right", "left", "holes", "both"])
@pytest.mark.parametrize("causal", [True, False])
def test_sdpa_keeps_the_output_at_padding_on_request(padding: str, causal: bool) -> None:
    """Late-interaction models use outputs at padding positions (trap 11)."""
    kind = "causal" if causal else "bidirectional"
    case = Case(_core(f"{kind}-{padding}"), 4, 2, 16, 16, "tokens first", torch.float32, False)
    s = case.situation
    plan, call = s.plan(CPU, case.dtype), case.call(CPU, keep_padding_output=True)
    query, key, value = case.tensors(CPU)
    output = sdpa.SdpaBackend().run(plan, call, query, key, value, {})
    seen = torch.from_numpy(s.seen)
    expected = attention(query, key, value, seen[:, None])
    # Padding before all tokens sees nothing under a causal mask.
    assert (int(seen.any(-1).sum()) > int(s.counts.sum())) == (not causal or padding != "left")
    assert_close(output, expected, 2e-5, seen.any(-1))


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("backend", ON_CPU[1:], ids=_label)
def test_backends_that_skip_padding_refuse_to_keep_its_output(backend: Backend) -> None:
    for name in ("causal-right", "causal-left", "bidirectional-right"):
        case = Case(_core(name), 4, 2, 16, 16, "tokens first", torch.float32, False)
        plan = case.situation.plan(CPU, case.dtype)
        assert backend.refusals(plan, case.call(CPU)) == []
        reasons = backend.refusals(plan, case.call(CPU, keep_padding_output=True))
        assert reasons == ["padding positions of the output are to be kept"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_sdpa_is_finite_without_any_real_token(causal: bool, grad: bool) -> None:
    s = Situation("nothing", 2, 9, 9, causal, padding="nothing")
    case = Case(s, 4, 2, 16, 16, "tokens first", torch.float32, grad)
    plan, call = s.plan(CPU, case.dtype), case.call(CPU)
    inputs = case.tensors(CPU)
    output = sdpa.SdpaBackend().run(plan, call, *inputs, {})
    assert bool(output.isfinite().all())
    if grad:
        gradients = torch.autograd.grad(output.sum(), inputs)
        assert all(bool(x.isfinite().all()) for x in gradients)


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("backend", ON_CPU[1:], ids=_label)
def test_padding_positions_are_zeros_where_tokens_were_packed(backend: Backend) -> None:
    case = Case(_core("causal-left"), 4, 2, 16, 16, "tokens first", torch.float32, False)
    s = case.situation
    plan = s.plan(CPU, case.dtype)
    output = backend.run(plan, case.call(CPU), *case.tensors(CPU), {})
    padding = torch.from_numpy(~s.real)
    assert float(output[padding].abs().max()) == 0.0
    assert float(output[~padding].abs().min(0).values.max()) > 0.0


@pytest.mark.parametrize("backend", ON_CPU[:2], ids=_label)
def test_dropout_keeps_the_mean(backend: Backend) -> None:
    case = Case(_core("causal-left"), 4, 2, 16, 16, "tokens first", torch.float32, False)
    s = case.situation
    plan = s.plan(CPU, case.dtype)
    call = case.call(CPU, dropout=0.2, features=frozenset({"dropout"}))
    assert backend.refusals(plan, call) == []
    query, key, value = case.tensors(CPU)
    torch.manual_seed(0)
    runs = torch.stack([backend.run(plan, call, query, key, value, {}) for _ in range(150)])
    expected = attention(query, key, value, torch.from_numpy(s.seen)[:, None])
    counts = torch.from_numpy(s.counts)
    assert float((runs[0] - runs[1])[counts].abs().max()) > 0.05
    assert_close(runs.mean(0), expected, 0.15, counts)


def test_sdpa_takes_mixed_dtypes_under_autocast() -> None:
    case = Case(_core("causal-left"), 4, 2, 16, 16, "tokens first", torch.float32, False)
    call = case.call(CPU, features=frozenset({"mixed dtypes"}))
    plan = case.situation.plan(CPU, case.dtype)
    query, key, value = case.tensors(CPU)
    with torch.autocast("cpu", torch.bfloat16):
        output = sdpa.SdpaBackend().run(plan, call, query, key.bfloat16(), value.bfloat16(), {})
    seen = torch.from_numpy(case.situation.seen)[:, None]
    counts = torch.from_numpy(case.situation.counts)
    assert_close(output, attention(query, key, value, seen), 2e-2, counts)


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("backend", ON_CPU[1:], ids=_label)
@pytest.mark.parametrize("q_len", [1, 9])
def test_rows_of_equal_length_may_lie_scattered(backend: Backend, q_len: int) -> None:
    """Rows 0 and 2 alike, and 1, 3 and 4, with heads that sdpa cannot group."""
    for value_head_dim in (16, 24):
        if value_head_dim != 16 and not backend.support.mixed_head_dims:
            continue
        real = np.ones((5, 9), dtype=bool)
        real[[0, 2], :2] = False
        real[[1, 3, 4], :4] = False
        seen = real[:, None, :] & np.tri(9, dtype=bool)[-q_len:]
        shift = 9 - q_len
        plan = Plan(5, q_len, 9, Pattern.CAUSAL, CPU, shift=shift, real=real)
        query, key = torch.randn(5, 4, q_len, 16), torch.randn(5, 2, 9, 16)
        value = torch.randn(5, 2, 9, value_head_dim)
        call = CASE.call(CPU, batch=5, q_len=q_len, kv_len=9, dtype=torch.float32)
        call = replace(call, head_dim=16, value_head_dim=value_head_dim)
        assert backend.refusals(plan, call) == []
        output = backend.run(plan, call, query, key, value, {})
        expected = attention(query, key, value, torch.from_numpy(seen)[:, None])
        assert_close(output, expected, 2e-5, torch.from_numpy(real[:, shift:]))


# -- every declared refusal ------------------------------------------------------------------------

PADDED = _core("causal-left")
CASE = Case(PADDED, 4, 2, 64, 64, "tokens first", torch.bfloat16, False)


def _declared(backend: Backend) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(what, change of the call, expected sentence) for every limit a backend declares."""
    support = backend.support
    if support.devices is not None:
        assert support.devices == {"cuda"}
        yield "device", {"device": CPU}, "runs on cuda, given cpu"
    if support.dtypes is not None:
        names = " or ".join(sorted(str(d).removeprefix("torch.") for d in support.dtypes))
        for dtype in sorted(DEFAULT_TOLERANCES.keys() - support.dtypes, key=str):
            name = str(dtype).removeprefix("torch.")
            yield name, {"dtype": dtype}, f"takes {names}, given {name}"
    if support.max_head_dim is not None:
        dim = support.max_head_dim + support.head_dim_multiple
        change = {"head_dim": dim, "value_head_dim": dim}
        yield "head_dim", change, f"takes head_dim up to {support.max_head_dim}, given {dim}"
    if support.head_dim_multiple > 1:
        dim = 4 * support.head_dim_multiple + 1
        change = {"head_dim": dim, "value_head_dim": dim}
        sentence = f"takes head_dim in multiples of {support.head_dim_multiple}, given {dim}"
        yield "multiple", change, sentence
    if not support.mixed_head_dims:
        sentence = "needs one head_dim, given 64 for query, 128 for value"
        yield "value_head_dim", {"value_head_dim": 128}, sentence
    known = {"softcap", "dropout", "position_bias", "mixed dtypes", "s_aux", "indices"}
    known.add("broadcast batches")
    for feature in sorted(known - support.features):
        yield feature, {"features": frozenset({feature})}, f"does not implement {feature}"
    if not support.backward:
        yield "backward", {"grad": True}, "has no backward, and a gradient is needed"


REAL = (
    sdpa.SdpaBackend(),
    sdpa_unpadded.SdpaUnpaddedBackend(),
    flash_attention_2.FlashAttention2Backend(),
    flash_attention_3.FlashAttention3Backend(),
    FA4_REAL,
    torch_varlen.TorchVarlenBackend(),
    triton_varlen.TritonVarlenBackend(),
)


class _Restricted(VarlenReference):
    """A backend that declares every limit there is."""

    name = "restricted"
    support = Support(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float16}),
        max_head_dim=64,
        head_dim_multiple=4,
        backward=False,
    )


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize(
    ("backend", "change", "sentence"),
    [
        pytest.param(backend, change, sentence, id=f"{backend.name}-{what}")
        for backend in (*REAL, _Restricted())
        for what, change, sentence in _declared(backend)
    ],
)
def test_declared_refusal(backend: Backend, change: dict[str, Any], sentence: str) -> None:
    plan = PADDED.plan(CPU, CASE.dtype)
    # Facts alone: a CUDA call can be judged on a machine without one.
    dtype = torch.float16 if backend.name == "restricted" else torch.bfloat16
    fine = CASE.call(torch.device("cuda"), dtype=dtype)
    if backend.support.min_capability is not None:
        support = replace(backend.support, min_capability=None, max_capability=None)
        backend = type("Capable", (type(backend),), {"support": support})()
    assert backend.refusals(plan, fine) == []
    assert backend.refusals(plan, replace(fine, **change)) == [sentence]


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("backend", REAL[2:], ids=lambda backend: backend.name)
def test_older_cards_are_refused(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, call = PADDED.plan(CPU, CASE.dtype), CASE.call(torch.device("cuda"))
    lowest, highest = backend.support.min_capability, backend.support.max_capability
    for given in ((7, 5), (8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(base, "_capability", lambda device, found=given: found)
        wanted = []
        if given < lowest:
            wanted = [
                "needs compute capability {}.{}, the device has {}.{}".format(*lowest, *given)
            ]
        if highest is not None and given > highest:
            needed = "needs compute capability at most {}.{}, the device has {}.{}"
            wanted = [needed.format(*highest, *given)]
        assert backend.refusals(plan, call) == wanted


def _plan(**facts: Any) -> Plan:
    facts = {"batch": 2, "q_len": 8, "kv_len": 8, "causal": True, **facts}
    return Situation("refused", **facts).plan(CPU, torch.float32)


FURTHER = {
    "the mask is known only as a dense tensor": ({"given": "bool"}, {}),
    "padding positions of the output are to be kept": (
        {"padding": "left"},
        {"keep_padding_output": True},
    ),
    "no real token in the batch": ({"padding": "nothing"}, {}),
    # Real keys, but every query stands at a padding position.
    "no real token in the batch ": (
        {"q_len": 2, "shift": 6, "padding": "equal right"},
        {"q_len": 2},
    ),
    "the last query does not stand at the last visible key": ({"kv_len": 4}, {"kv_len": 4}),
    "a symmetric window needs as many queries as keys": (
        {"causal": False, "window": 2, "kv_len": 9},
        {"kv_len": 9},
    ),
    "a window cannot be packed across holes in the mask": (
        {"window": 2, "padding": "holes"},
        {},
    ),
    "a window over padded keys needs self-attention": (
        {"causal": False, "window": 2, "padding": "right", "cross": True},
        {"self_attention": False},
    ),
}


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("backend", ON_CPU[1:], ids=_label)
@pytest.mark.parametrize("sentence", FURTHER)
def test_what_cannot_be_packed_is_refused(backend: Backend, sentence: str) -> None:
    facts, change = FURTHER[sentence]
    if "kv_len" in facts and facts["kv_len"] < 8:
        plan = Plan(2, 8, facts["kv_len"], Pattern.CAUSAL, CPU)
    else:
        plan = _plan(**facts)
    call = CASE.call(CPU, batch=2, q_len=8, kv_len=8, dtype=torch.float32)
    assert sentence.strip() in backend.refusals(plan, replace(call, **change))


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("backend", ON_CPU[1:], ids=_label)
def test_a_call_of_another_shape_than_the_plan_is_refused(backend: Backend) -> None:
    plan = _plan(padding="left")
    call = CASE.call(CPU, batch=2, q_len=8, kv_len=8, dtype=torch.float32)
    assert backend.refusals(plan, call) == []
    for change in ({"batch": 3}, {"q_len": 7}, {"kv_len": 9}):
        reasons = " ".join(backend.refusals(plan, replace(call, **change)))
        assert "the mask describes 2 x 8 queries and 8 keys" in reasons


@pytest.mark.usefixtures("stand_in_kernels")
def test_refusals_of_single_backends() -> None:
    unpadded, flash, varlen = ON_CPU[1], FlashStandIn(), TorchVarlenStandIn()
    call = CASE.call(CPU, batch=2, q_len=8, kv_len=8, dtype=torch.float32)
    plain, left, holes = _plan(), _plan(padding="left"), _plan(padding="holes")
    assert unpadded.refusals(plain, call) == ["no padding to remove"]
    assert varlen.refusals(plain, call) == []
    assert varlen.refusals(plain, replace(call, grad=True)) == ["no padding to remove"]
    reasons = unpadded.refusals(holes, call)
    assert "real tokens must be contiguous, and the mask has holes" in reasons
    training = replace(call, grad=True, deterministic=True)
    assert varlen.refusals(left, training) == ["its backward is not deterministic"]
    assert varlen.refusals(left, replace(training, grad=False)) == []
    assert flash.refusals(left, training) == []
    empty = Plan(2, 0, 0, Pattern.BIDIRECTIONAL, CPU)
    assert "takes no empty tensors" in flash.refusals(empty, replace(call, q_len=0, kv_len=0))


def test_flash_attention_without_dropout_refuses_it(
    stand_in_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CASE.call(torch.device("cuda"), dropout=0.1, features=frozenset({"dropout"}))
    backend = FlashStandIn()
    backend.support = replace(backend.support, min_capability=None)
    plan = PADDED.plan(CPU, CASE.dtype)
    assert backend.refusals(plan, call) == []
    monkeypatch.setattr(flash_attention_2, "_has_dropout", lambda device: False)
    assert backend.refusals(plan, call) == ["this build of flash-attn has no dropout"]


def test_a_missing_or_foreign_flash_attn_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = flash_attention_2.FlashAttention2Backend()

    def fail(name: str) -> Any:
        raise OSError("undefined symbol")

    probe = flash_attention_2._package.__wrapped__
    monkeypatch.setattr(flash_attention_2, "_package", probe)
    monkeypatch.setattr(flash_attention_2.importlib, "import_module", fail)
    assert backend.unavailable() == "flash-attn cannot be imported: OSError: undefined symbol"
    part = SimpleNamespace()
    monkeypatch.setattr(flash_attention_2.importlib, "import_module", lambda name: part)
    said = "flash-attn 2 is needed, another package of its name is installed"
    assert backend.unavailable() == said
    early = SimpleNamespace(__version__="2.0", flash_attn_func=None, flash_attn_varlen_func=None)
    monkeypatch.setattr(flash_attention_2.importlib, "import_module", lambda name: early)
    assert backend.unavailable() == "flash-attn 2.0 has no flash_attn_with_kvcache"
    old = SimpleNamespace(__version__="1.0.9")
    monkeypatch.setattr(flash_attention_2.importlib, "import_module", lambda name: old)
    assert backend.unavailable() == "flash-attn 2 is needed, 1.0.9 is installed"


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("backend", ON_CPU[-5:], ids=_label)
def test_flash_kernels_are_not_used_on_rocm(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backend.unavailable() == "untested on ROCm, where its kernels ignore arguments"


@pytest.mark.parametrize(
    ("capability", "change"),
    [
        ((7, 5), {}),
        ((9, 0), {"dtype": torch.float32}),
        ((9, 0), {"grad": True}),
        ((9, 0), {"q_len": 1}),
        ((9, 0), {}),
    ],
)
def test_triton_builds_nothing_for_what_it_does_not_take(
    capability: tuple[int, int], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first build takes a second, and a C compiler."""
    asked: list[torch.device] = []
    monkeypatch.setattr(triton_varlen, "_broken", lambda device: asked.append(device) or "broken")
    monkeypatch.setattr(base, "_capability", lambda device: capability)
    call = replace(CASE.call(torch.device("cuda"), dtype=torch.bfloat16), **change)
    plan = Plan(
        call.batch, call.q_len, call.kv_len, Pattern.CAUSAL, CPU, shift=call.kv_len - call.q_len
    )
    backend = triton_varlen.TritonVarlenBackend()
    reasons = backend.refusals(plan, call)
    taken = capability == (9, 0) and not change
    assert bool(asked) == taken
    assert ("broken" in reasons) == taken
    assert "broken" not in backend.refusals_elsewhere(plan, call, (9, 0))


def test_triton_leaves_one_long_sequence_among_many_short_ones() -> None:
    backend, plan = triton_varlen.TritonVarlenBackend(), None
    for lengths, aside in (([30] * 20, False), ([600, *[1] * 30], True)):
        starts = np.zeros((1, sum(lengths)), dtype=bool)
        starts[0, np.cumsum([0, *lengths[:-1]])] = True
        total = sum(lengths)
        plan = Plan(1, total, total, Pattern.CAUSAL, CPU, packed=starts)
        call = CASE.call(CPU, batch=1, q_len=total, kv_len=total)
        assert (backend.set_aside(plan, call) is not None) == aside


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("how", ["address", "stride", "last stride", "expanded"])
def test_what_is_not_aligned_is_copied_for_triton(how: str) -> None:
    """16 bytes are loaded at once; what can be read as it is, is."""
    plan, (batch, heads, length, dim) = _plan(padding="left"), (2, 4, 8, 16)
    call = Call(
        CPU, torch.float32, batch, length, length, heads, heads, dim, dim, self_attention=True
    )
    query, key = torch.randn(2, batch, length, heads, dim).transpose(2, 3)
    memory = torch.randn(batch * heads * length * (dim + 1) + 1)
    value = {
        "address": memory[1:].as_strided((batch, heads, length, dim), (512, 128, 16, 1)),
        "stride": memory.as_strided((batch, heads, length, dim), (544, 136, 17, 1)),
        "last stride": torch.randn(batch, heads, dim, length).mT,
        "expanded": torch.randn(batch, 1, length, dim).expand(-1, heads, -1, -1),
    }[how]
    copied = triton_varlen._aligned(value)[0] is not value
    assert copied == (how != "expanded")
    backend = TritonVarlenStandIn()
    output = backend.run(plan, call, query, key, value, {})
    expected = backend.run(plan, call, query, key, value.contiguous(), {})
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("length", "kv_heads", "head_dim", "apart", "rows"),
    [
        (16384, 2, 64, True, 192),
        (16384, 2, 128, False, 32),
        (4096, 2, 64, False, 48),
        (2048, 2, 64, False, 192),
        (16384, 8, 64, False, 192),
    ],
)
def test_heads_of_long_sequences_stay_apart_and_their_padding_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    kv_heads: int,
    head_dim: int,
    apart: bool,
    rows: int,
) -> None:
    """FlashAttention-3 then reads left padding as sequences, which it can be told that for."""
    asked: list[Any] = []

    def forward(*arguments: Any) -> list[torch.Tensor]:
        given = dict(zip(flash_attention_3._ARGUMENTS, arguments, strict=True))
        asked.append((given["pack_gqa"], given["leftpad_k"] is None))
        return [torch.empty(0)]

    monkeypatch.setattr(flash_attention_3, "_operator", lambda: (forward, None))
    monkeypatch.setattr(tails, "unavailable", lambda device: None)
    real = np.arange(length)[None] >= np.array([[0], [length // 4]])
    plan = Plan(2, length, length, Pattern.CAUSAL, CPU, real=real)
    call = Call(
        CPU, torch.bfloat16, 2, length, length, 8, kv_heads, head_dim, head_dim,
        self_attention=True,
    )  # fmt: skip
    backend = flash_attention_3.FlashAttention3Backend()
    how = flash_attention_3._route(plan, call, in_place=True)
    assert how is (Route.IN_PLACE if length > 2048 else Route.KEY_BOUNDS)
    assert flash_attention_3._route(plan, call, in_place=False) is Route.KEY_BOUNDS
    kernel = flash_attention_3._varlen(plan, call, in_place=False)
    states = torch.empty(1, 1, head_dim)
    kernel(states, states, states, plan.used(True, length))
    assert asked == [(False if apart else None, True)]
    assert backend.tile(plan, call)[0] == rows
    # A step of decoding is shared, and told of its padding, as it was.
    step = replace(call, q_len=1)
    assert not flash_attention_3._heads_apart(plan, step)
    assert not flash_attention_3._left_out(plan, step)


@pytest.mark.parametrize(
    ("facts", "left_out"),
    [
        ({}, True),
        # A few drafted tokens, a chunk of a prefill: all queries are real.
        ({"q_len": 4}, False),
        ({"q_len": 512}, False),
        ({"padding": 1}, False),
        ({"padding": 300}, False),
        ({"causal": False, "own": False, "q_len": 64}, False),
        ({"token_major_queries": False}, False),
        ({"token_major_keys": False, "key_pitch": 0}, False),
        ({"token_major_keys": False, "key_pitch": 8 * 4096}, True),
    ],
)
def test_left_padding_is_left_out_where_there_is_some_and_nothing_is_copied(
    facts: dict[str, Any], left_out: bool
) -> None:
    length, causal = 4096, facts.pop("causal", True)
    q_len, padding = facts.pop("q_len", length), facts.pop("padding", 2048)
    real = np.arange(length)[None] >= np.array([[0], [padding]])
    pattern = Pattern.CAUSAL if causal else Pattern.BIDIRECTIONAL
    plan = Plan(2, q_len, length, pattern, CPU, shift=length - q_len, real=real)
    call = Call(
        CPU, torch.bfloat16, 2, q_len, length, 8, 8, 128, 128,
        self_attention=facts.pop("own", True), **facts,
    )  # fmt: skip
    how = flash_attention_3._route(plan, call, in_place=True)
    assert how is (Route.IN_PLACE if left_out else Route.KEY_BOUNDS)


def test_another_signature_of_torch_varlen_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = torch_varlen.TorchVarlenBackend()
    monkeypatch.setattr(torch_varlen, "_varlen_attn", torch_varlen._varlen_attn.__wrapped__)
    old = SimpleNamespace(varlen_attn=lambda query, key, value, is_causal: None)
    monkeypatch.setattr(torch_varlen.importlib, "import_module", lambda name: old)
    assert "another signature" in str(backend.unavailable())
    monkeypatch.setattr(torch_varlen.importlib, "import_module", lambda name: SimpleNamespace())
    assert "no varlen_attn" in str(backend.unavailable())


def test_eager_runs_the_functions_of_a_model_with_the_additive_mask() -> None:
    backend = eager.EagerBackend()
    case = Case(_core("causal-left"), 4, 4, 16, 16, "tokens first", torch.float32, False)
    plan, call = case.situation.plan(CPU, case.dtype), case.call(CPU)
    assert backend.refusals(plan, call) == ["the model's own module has no eager_attention_forward"]
    assert backend.refusals(plan, replace(call, has_eager=True)) == []
    given = {}

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        given.update(kwargs, mask=mask, module=module)
        return query.transpose(1, 2), None

    query, key, value = case.tensors(CPU)
    arguments = {"module": "layer", "eager": forward, "s_aux": 5}
    backend.run(plan, replace(call, scaling=0.5), query, key, value, arguments)
    seen = torch.from_numpy(case.situation.seen)[:, None]
    assert torch.equal(given.pop("mask") == 0.0, seen)
    assert given == {"module": "layer", "s_aux": 5, "dropout": 0.0, "scaling": 0.5}


# -- the real backends on a GPU --------------------------------------------------------------------

HALF = (torch.bfloat16, torch.float16)


@functools.cache
def _gpu_cases() -> list[Case]:
    # The last of these dims is one that no flash kernel takes.
    shapes = (
        (8, 8, 64, 64), (8, 2, 64, 64), (6, 2, 80, 80), (4, 1, 128, 128), (12, 4, 96, 96),
        (4, 4, 256, 256), (4, 2, 72, 40), (2, 1, 320, 320),
    )  # fmt: skip
    return (
        cases(33, HALF, every=2, shapes=shapes)
        + cases(197, HALF, every=2, shapes=shapes)
        + feature_cases(65, HALF)
    )


def _gpu_shape_cases(backend: Backend) -> list[Case]:
    own = shape_cases(97, backend, HALF)
    # Features are tried with small heads, where a backend takes them.
    return own if backend.support.head_dim_multiple <= 16 else own + feature_cases(65, HALF, 64)


def _gpu_parameters() -> list[Any]:
    if not torch.cuda.is_available():
        # One item that says so, instead of thousands.
        return [pytest.param(None, None, id="no-gpu")]
    able = tuple(backend for backend in REAL if backend.unavailable() is None)
    return _parameters(able, _gpu_cases_of)


def _gpu_cases_of(backend: Backend) -> list[Case]:
    return fewest_kinds(backend, [*_gpu_cases(), *_gpu_shape_cases(backend)])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def errors() -> Iterator[list[dict[str, Any]]]:
    collected: list[dict[str, Any]] = []
    yield collected
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    gpu_results.write(f"errors-{worker}", collected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("backend", "case"), _gpu_parameters())
def test_matches_float64_on_a_gpu(
    backend: Backend, case: Case, errors: list[dict[str, Any]]
) -> None:
    for what, error in run_case(backend, case, CUDA).items():
        errors.append(
            {
                "backend": backend.name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "what": what,
                "error": error,
                "case": case.id,
            }
        )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", REAL, ids=lambda backend: backend.name)
def test_refuses_exactly_what_it_cannot_run_on_a_gpu(backend: Backend) -> None:
    if (reason := backend.unavailable()) is not None:
        pytest.skip(reason)
    for case in [*_gpu_cases(), *_gpu_shape_cases(backend)]:
        reasons = backend.refusals(case.situation.plan(CUDA, case.dtype), case.call(CUDA))
        assert (reasons == []) == takes(backend, case), (case.id, reasons)
    full = replace(_gpu_cases()[0], dtype=torch.float32)
    takes_full_precision = backend.name.startswith("sdpa")
    plan = PADDED.plan(CUDA, torch.float32)
    call = replace(full, situation=PADDED, head_dim=64, value_head_dim=64).call(CUDA)
    assert (backend.refusals(plan, call) == []) == takes_full_precision


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "name", ["causal-left", "bidirectional-right", "bidirectional-holes", "decode-left"]
)
@pytest.mark.parametrize("backend", REAL[2:], ids=_label)
def test_nan_in_padding_stays_there_on_a_gpu(backend: Backend, name: str) -> None:
    """Kernels that read the padded tensors in place must not read what is padding (trap 1)."""
    if (reason := backend.unavailable()) is not None:
        pytest.skip(reason)
    for layout in NAN_LAYOUTS:
        case = Case(_core(name, 97), 8, 2, 64, 64, layout, torch.bfloat16, False)
        if takes(backend, case):
            check_nan_in_padding(backend, case, CUDA)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pattern", "dim"), [(Pattern.CAUSAL, 128), (Pattern.BIDIRECTIONAL, 64)])
@pytest.mark.parametrize("backend", REAL[2:], ids=_label)
def test_nan_behind_long_rows_stays_there_on_a_gpu(
    backend: Backend,
    pattern: Pattern,
    dim: int,
    dtype: torch.dtype,
    side: str,
    layout: str,
    rows: int,
) -> None:
    """Padding that is skipped, with tails of several tiles and several blocks of heads."""
    if (reason := backend.unavailable()) is not None:
        pytest.skip(reason)
    # One key in the last tile, and few: the rest of it is padding.
    lengths = np.array([1024, 385, 193])[:rows]
    real = np.arange(1024)[None] < lengths[:, None]
    if side == "left":
        real = real[:, ::-1].copy()
    if side == "both":
        real[:, :100] = False
    plan = Plan(rows, 1024, 1024, pattern, CUDA, real=real)
    shape = (rows, 1024, 8, dim)
    query, key, value = (
        torch.randn(shape, dtype=dtype, device=CUDA).transpose(1, 2) for _ in "qkv"
    )
    if layout == "heads first":
        key, value = key.contiguous(), value.contiguous()
    token_major, pitch = where_keys_lie(key, value)
    call = Call(
        CUDA, dtype, rows, 1024, 1024, 8, 8, dim, dim,
        self_attention=True, token_major_keys=token_major, key_pitch=pitch,
    )  # fmt: skip
    if backend.refusals(plan, call):
        pytest.skip("not a case of this backend")
    padding = torch.from_numpy(~real).to(CUDA)[:, None, :, None]
    clean = backend.run(plan, call, query, key, value, {})
    for poison in (torch.nan, torch.inf):
        dirty = [states.masked_fill(padding, poison) for states in (query, key, value)]
        poisoned = backend.run(plan, call, *dirty, {})
        kept = torch.from_numpy(real).to(CUDA)
        assert torch.equal(poisoned[kept], clean[kept])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["causal_window-left", "symmetric_window-right", "causal-holes"])
@pytest.mark.parametrize("backend", REAL[:2], ids=lambda backend: backend.name)
def test_long_masks_are_taken_in_parts(
    backend: Backend, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets into a mask of 2**32 elements overflow in torch's kernel: pytorch #187227."""
    case = Case(_core(name, 97), 4, 2, 64, 64, "tokens first", torch.float16, True)
    if not takes(backend, case):
        pytest.skip("not a case of this backend")
    calls = []
    attention_of_torch = torch.nn.functional.scaled_dot_product_attention

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return attention_of_torch(*args, **kwargs)

    monkeypatch.setattr(sdpa, "_MASK_LIMIT", 1000)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    run_case(backend, case, CUDA)
    assert len(calls) > 3
