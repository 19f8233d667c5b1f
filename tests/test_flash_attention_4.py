"""FlashAttention-4: which package it finds, and for what its kernels are built."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smartattn.backends import NAMED, flash_attention_2, flash_attention_4
from smartattn.backends.flash_attention_4 import FlashAttention4Backend
from smartattn.call import Call
from smartattn.faults import is_unsupported
from smartattn.plan import Pattern, Plan
from smartattn.workload import Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BACKEND = FlashAttention4Backend()

# -- the package -----------------------------------------------------------------------------------

_DENSE = "q, k, v, softmax_scale=None, causal=False, window_size=None, softcap=0.0, num_splits=1"
_VARLEN = f"{_DENSE}, cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None"
MODULE = f"""
def flash_attn_func({_DENSE}, deterministic=False): pass
def flash_attn_varlen_func({_VARLEN}, deterministic=False): pass
"""
#: As flash-attn 2 brings it along.
EARLY = """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False): pass
def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None): pass
"""
FLASH_2 = """
__version__ = "2.8.3"
flash_attn_func = flash_attn_varlen_func = flash_attn_with_kvcache = print
"""
MISSING = "flash-attn-4 is not installed (flash_attn.cute)"
SIGNATURE = "flash_attn.cute has other signatures than are known"
INSTALL = "pip install --pre flash-attn-4"
AGAIN = f"{INSTALL} --force-reinstall --no-deps"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts packages into a folder that imports look at first."""
    caches = (
        flash_attention_4._missing,
        flash_attention_4._functions,
        flash_attention_2._package,
    )

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]
        for cache in caches:
            cache.cache_clear()
        importlib.invalidate_caches()

    def made(around: str | None = None, cute: str | None = None, dist: bool = True) -> None:
        folder = tmp_path / "flash_attn"
        folder.mkdir()
        if around is not None:
            (folder / "__init__.py").write_text(around)
        if cute is not None:
            (folder / "cute").mkdir()
            (folder / "cute" / "__init__.py").write_text(cute)
            if dist:
                info = tmp_path / "flash_attn_4-4.0.0b36.dist-info"
                info.mkdir()
                (info / "METADATA").write_text("Name: flash-attn-4\nVersion: 4.0.0b36\n")
        forget()

    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: one for name, one in sys.modules.items() if name.split(".")[0] == "flash_attn"}
    forget()
    yield made
    forget()
    sys.modules.update(before)


def test_it_may_be_missing(install: Install) -> None:
    assert BACKEND.unavailable() == MISSING
    assert BACKEND.remedy() == INSTALL


def test_it_comes_alone_without_a_package_around_it(install: Install) -> None:
    install(cute=MODULE)
    assert BACKEND.unavailable() is None
    assert BACKEND.remedy() is None
    # It is no flash-attn 2.
    other = NAMED["flash_attention_2"].unavailable()
    assert other == "flash-attn 2 is needed, another package of its name is installed"


def test_both_work_in_one_folder(install: Install) -> None:
    install(around=FLASH_2, cute=MODULE)
    assert BACKEND.unavailable() is None
    assert NAMED["flash_attention_2"].unavailable() is None


def test_flash_attn_2_alone_is_not_imported_for_it(install: Install) -> None:
    install(around=FLASH_2)
    assert BACKEND.unavailable() == MISSING
    assert "flash_attn" not in sys.modules
    assert NAMED["flash_attention_2"].unavailable() is None


@pytest.mark.parametrize(
    ("around", "cute", "dist", "reason", "remedy"),
    [
        (FLASH_2, EARLY, False, SIGNATURE, INSTALL),
        # Installed before flash-attn 2, which wrote over it.
        (FLASH_2, EARLY, True, SIGNATURE, AGAIN),
        (None, MODULE.replace("softcap", "cap"), True, SIGNATURE, AGAIN),
        # A new argument that it cannot do without, and names in another order.
        (None, MODULE.replace("v, softmax", "v, new, softmax"), True, SIGNATURE, AGAIN),
        (None, MODULE.replace("q, k, v", "k, q, v"), True, SIGNATURE, AGAIN),
        (
            FLASH_2,
            "import absent_cutlass",
            False,
            "flash-attn-4 is not installed: the flash_attn.cute here came with flash-attn 2",
            INSTALL,
        ),
        (
            None,
            "import absent_cutlass",
            True,
            "flash-attn-4 cannot be imported: ModuleNotFoundError: No module named "
            "'absent_cutlass'",
            INSTALL,
        ),
        (
            "raise OSError('undefined symbol')",
            MODULE,
            True,
            "flash-attn-4 cannot be imported: OSError: undefined symbol",
            AGAIN,
        ),
        (
            None,
            "flash_attn_func = 5",
            True,
            "flash-attn-4 cannot be imported: AttributeError: module 'flash_attn.cute' has no "
            "attribute 'flash_attn_varlen_func'",
            AGAIN,
        ),
    ],
)
def test_what_is_broken_or_foreign_is_a_refusal(
    install: Install, around: str | None, cute: str, dist: bool, reason: str, remedy: str
) -> None:
    install(around=around, cute=cute, dist=dist)
    assert BACKEND.unavailable() == reason
    assert BACKEND.remedy() == remedy


def test_hidden_is_missing(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(around=FLASH_2, cute=MODULE)
    for name in ("flash_attn.cute", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
        flash_attention_4._missing.cache_clear()
        assert BACKEND.unavailable() == MISSING
        monkeypatch.delitem(sys.modules, name)


def test_it_is_not_imported_for_what_it_refuses(install: Install) -> None:
    """The import takes seconds."""
    install(cute="raise RuntimeError('imported')")
    plan, call = _plan(2, 8), _call(2, 8, device=CPU)
    assert BACKEND.refusals(plan, call) == ["runs on cuda, given cpu"]
    on_gpu = replace(call, device=CUDA, dtype=torch.float32)
    capable = _Capable()
    assert capable.refusals(plan, on_gpu) == ["takes bfloat16 or float16, given float32"]
    fine = replace(on_gpu, dtype=torch.bfloat16)
    reason = "flash-attn-4 cannot be imported: RuntimeError: imported"
    assert capable.refusals(plan, fine) == [reason]


# -- what it takes, and how ------------------------------------------------------------------------


class _Capable(FlashAttention4Backend):
    support = replace(FlashAttention4Backend.support, min_capability=None, max_capability=None)


def _plan(batch: int, length: int, pattern: Pattern = Pattern.CAUSAL, **facts: Any) -> Plan:
    return Plan(batch, length, length, pattern, CPU, **facts)


def _call(batch: int, length: int, **facts: Any) -> Call:
    given = {"device": CUDA, "dtype": torch.bfloat16, "self_attention": True, **facts}
    heads, kv_heads = given.pop("heads", 8), given.pop("kv_heads", 2)
    dim = given.pop("head_dim", 64)
    return Call(
        batch=batch, q_len=length, kv_len=length, heads=heads, kv_heads=kv_heads, head_dim=dim,
        value_head_dim=dim, **given,
    )  # fmt: skip


def _rows(lengths: list[int], width: int, left: bool = False) -> np.ndarray[Any, Any]:
    real = np.arange(width)[None] < np.array(lengths)[:, None]
    return real[:, ::-1].copy() if left else real


class _CompilerError(Exception):
    """As the compiler of its kernels raises them."""


_CompilerError.__module__ = "cutlass.base_dsl.common"


@pytest.mark.parametrize(
    ("raised", "is_told"),
    [
        (_CompilerError("ptxas\nis missing"), True),
        (AssertionError("SplitKV not there"), True),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (torch.OutOfMemoryError("no memory"), False),
    ],
)
def test_what_cannot_be_compiled_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, is_told: bool
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise raised

    functions = flash_attention_4.Functions(fail, fail)
    monkeypatch.setattr(flash_attention_4, "_functions", lambda: (functions, None))
    states = torch.zeros(2, 8, 4, 64)
    call = _call(2, 4, kv_heads=8, device=CPU)
    with pytest.raises(NotImplementedError if is_told else type(raised)) as caught:
        BACKEND.run(_plan(2, 4), call, states, states, states)
    assert is_unsupported(caught.value) == is_told
    if is_told:
        said = f"{type(raised).__name__}: {' '.join(str(raised).split())}"
        assert str(caught.value) == f"flash-attn-4 has no kernel for it: {said}"


def test_its_deterministic_backward_is_refused() -> None:
    plan, call = _plan(2, 8), _call(2, 8, grad=True, deterministic=True)
    said = "its deterministic backward is untested"
    assert BACKEND.refusals_elsewhere(plan, call, (9, 0)) == [said]
    assert BACKEND.refusals_elsewhere(plan, replace(call, grad=False), (9, 0)) == []


def test_newer_cards_are_refused_until_somebody_tried_them() -> None:
    plan, call = _plan(2, 8), _call(2, 8)
    (said,) = BACKEND.refusals_elsewhere(plan, call, (10, 0))
    assert said == "needs compute capability at most 9.9, the device has 10.0"


def test_decoding_is_left_to_kernels_that_split_keys() -> None:
    decode = Plan(2, 1, 64, Pattern.CAUSAL, CPU, shift=63)
    call = replace(_call(2, 64), q_len=1)
    assert BACKEND.refusals_elsewhere(decode, call, (9, 0)) == []
    assert "single query" in str(BACKEND.set_aside(decode, call))
    assert BACKEND.set_aside(_plan(2, 64), _call(2, 64)) is None


def test_kinds_know_nothing_of_lengths_and_batches() -> None:
    def kind(batch: int, length: int, **facts: Any) -> Any:
        pattern = facts.pop("pattern", Pattern.CAUSAL)
        window = {"window": facts.pop("window")} if "window" in facts else {}
        return BACKEND.built_for(
            _plan(batch, length, pattern, **window), _call(batch, length, **facts)
        )

    usual = kind(2, 4096)
    assert usual == kind(7, 1000) == kind(1, 70_000, self_attention=False, has_eager=True)
    assert usual == kind(2, 4096, heads=32, kv_heads=8)
    assert usual == kind(2, 4096, scaling=0.3, device=torch.device("cuda", 1))
    others = [
        kind(2, 4096, grad=True),
        kind(2, 4096, dtype=torch.float16),
        kind(2, 4096, head_dim=128),
        kind(2, 4096, kv_heads=8),
        kind(2, 4096, softcap=30.0),
        kind(2, 4096, softcap=50.0),
        kind(2, 4096, pattern=Pattern.BIDIRECTIONAL),
        kind(2, 4096, window=100),
        # All rows of a tile fit in one, which are queries times heads of a group.
        kind(2, 48),
    ]
    assert len({usual, *others}) == len(others) + 1
    assert kind(2, 49) == usual
    assert kind(2, 49, window=5000) == usual
    # Without a mask it does not matter; in training tiles of the backward do.
    both = Pattern.BIDIRECTIONAL
    assert kind(2, 48, pattern=both) == kind(2, 4096, pattern=both)
    assert kind(2, 128, grad=True) != kind(2, 129, grad=True) == kind(2, 4096, grad=True)


def test_kinds_tell_apart_how_a_batch_is_read() -> None:
    def kind(real: np.ndarray[Any, Any], **facts: Any) -> Any:
        plan = _plan(*real.shape, real=real)
        return BACKEND.built_for(plan, _call(*real.shape, **facts))

    whole, left = _rows([512, 512], 512), _rows([300, 512], 512, left=True)
    holes = left.copy()
    holes[:, 400] = False
    dense, in_place, packed = kind(whole), kind(left), kind(holes)
    assert len({dense, in_place, packed}) == 3
    assert in_place == kind(_rows([30, 900, 5], 1000, left=True))
    # Training leaves the padding out, wherever it lies; right padding is computed.
    training = kind(left, grad=True)
    assert training == kind(holes, grad=True)
    assert training != kind(whole, grad=True) == kind(_rows([300, 512], 512), grad=True)
    # 129 rows are 259 sequences with the padding between them.
    many = _rows([300] * 129, 512, left=True)
    assert kind(many) != in_place
    assert kind(many[:127]) == in_place
    assert kind(many, grad=True) == training


def test_tiles_are_those_of_its_own_forward() -> None:
    found = {}
    for dim in (64, 96, 128, 192, 256):
        for pattern in (Pattern.CAUSAL, Pattern.BIDIRECTIONAL):
            plan, call = _plan(1, 1024, pattern), _call(1, 1024, head_dim=dim, kv_heads=8)
            found[dim, pattern.value] = BACKEND.tile(plan, call)
    assert found == {
        (64, "causal"): (192, 128),
        (64, "bidirectional"): (192, 128),
        (96, "causal"): (192, 128),
        (96, "bidirectional"): (192, 144),
        (128, "causal"): (128, 128),
        (128, "bidirectional"): (128, 128),
        (192, "causal"): (128, 112),
        (192, "bidirectional"): (128, 112),
        (256, "causal"): (128, 80),
        (256, "bidirectional"): (128, 80),
    }
    # The heads of a group share one.
    assert BACKEND.tile(_plan(1, 1024), _call(1, 1024, heads=32, kv_heads=8)) == (48, 128)
    windowed = _plan(1, 1024, window=100)
    assert BACKEND.tile(windowed, _call(1, 1024, head_dim=256, kv_heads=8)) == (128, 64)


# -- the real one ----------------------------------------------------------------------------------


def _compiled() -> int:
    """Kernels of the forward and of the backward in this process."""
    interface = importlib.import_module("flash_attn.cute.interface")
    names = ("_flash_attn_fwd", "_flash_attn_bwd")
    return sum(len(getattr(interface, name).compile_cache.cache) for name in names)


def _run(workload: Workload) -> None:
    plan, call = workload.plan(CUDA), workload.call(CUDA)
    tensors = workload.tensors(CUDA)
    output = BACKEND.run(plan, call, tensors.query, tensors.key, tensors.value)
    if tensors.grad_output is not None:
        torch.autograd.grad(output, tensors.leaves, tensors.grad_output)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("mode", "side"),
    [
        ("forward", "none"),
        ("forward", "left"),
        ("forward", "packed"),
        ("train", "none"),
        ("train", "left"),
        ("train", "packed"),
    ],
)
def test_nothing_is_built_again_for_a_kind_on_a_gpu(mode: Any, side: Any) -> None:
    """What `built_for` says against what the package compiles."""
    first = Workload(
        mode, True, side, "bfloat16", 1 if side == "packed" else 3, 700, 700, 8, 2, 64,
        padding_share=0.4 if side == "left" else 0.0, sequences=5 if side == "packed" else 0,
    )  # fmt: skip
    plan, call = first.plan(CUDA), first.call(CUDA)
    if reasons := BACKEND.refusals(plan, call):
        pytest.skip(reasons[0])
    _run(first)
    built = _compiled()
    assert built > 0
    others = [
        replace(first, q_len=1500, kv_len=1500, seed=1),
        replace(first, heads=16, kv_heads=4, seed=2),
        replace(first, q_len=333, kv_len=333, batch=first.batch + (side != "packed"), seed=3),
    ]
    for other in others:
        kind = BACKEND.built_for(other.plan(CUDA), other.call(CUDA))
        assert kind == BACKEND.built_for(plan, call), other
        _run(other)
        assert _compiled() == built, other
