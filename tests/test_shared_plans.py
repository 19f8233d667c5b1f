"""Batches that have nothing but their shape share a plan; what belongs to one stays out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

import smartattn
from smartattn import profile, shared_plans
from smartattn.backends import base
from smartattn.mask import PlanMask
from smartattn.masking import smart_mask
from smartattn.plan import Pattern
from smartattn.shared_plans import shared_plan

from .agreement import CACHE, MASKS, WIDTH, assert_agree
from .tiny_models import tiny_model, token_ids

IDS = token_ids(3, WIDTH)
ONES = torch.ones_like(IDS)
CPU = torch.device("cpu")


def plans_of(model: Any, run: Callable[[Any], Any]) -> list[Any]:
    """The plan that a model's layers get, of two forwards."""
    found = []
    layer = model.model.layers[0]

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        found.append(kwargs["attention_mask"].plan)

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            run(model)
            run(model)
    finally:
        handle.remove()
    return found


def forward(model: Any, **inputs: Any) -> Any:
    return model(**{"input_ids": IDS, "attention_mask": ONES, **inputs})


def test_forwards_without_padding_share_a_plan_and_its_choice() -> None:
    first, second = plans_of(tiny_model("llama", "smart"), forward)
    assert first is second
    assert first.is_shared
    assert len(first.decisions) == 1


@torch.no_grad()
def test_a_shared_plan_gives_the_same_answer() -> None:
    expected = forward(tiny_model("llama", "eager")).logits
    model = tiny_model("llama", "smart")
    for _ in range(3):
        assert_agree(forward(model).logits, expected)


def enabled(model: Any) -> Any:
    with torch.enable_grad():
        forward(model)


def traced(model: Any) -> Any:
    with smartattn.trace() as trace:
        forward(model)
    assert trace.rows[0].forwards == 1


def in_a_block(model: Any) -> Any:
    with smartattn.use(backends="sdpa"):
        forward(model)


def with_a_cache(model: Any) -> Any:
    cache = DynamicCache(config=model.config)
    mask = torch.ones(3, 2 * WIDTH, dtype=torch.long)
    model(input_ids=IDS, attention_mask=ONES, **{CACHE: cache})
    model(input_ids=IDS, attention_mask=mask, **{CACHE: cache})


@pytest.mark.parametrize(
    "run",
    [
        enabled,
        traced,
        lambda model: forward(model, attention_mask=MASKS["left"]),
        lambda model: forward(model, attention_mask=MASKS["right"]),
        lambda model: forward(model, input_ids=IDS[:, :1], attention_mask=ONES[:, :1]),
    ],
    ids=["gradients", "trace", "left", "right", "one token"],
)
def test_others_have_their_own(run: Callable[[Any], Any]) -> None:
    first, second = plans_of(tiny_model("llama", "smart"), run)
    assert first is not second
    assert not first.is_shared
    assert not second.is_shared


def test_earlier_tokens_have_a_plan_of_their_own() -> None:
    first, second, third, fourth = plans_of(tiny_model("llama", "smart"), with_a_cache)
    assert first is third
    assert second is not fourth
    assert not second.is_shared
    assert second.shift == WIDTH


def test_long_rows_have_a_plan_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartattn.masking._SHARED_TOKENS", WIDTH - 1)
    first, second = plans_of(tiny_model("llama", "smart"), forward)
    assert first is not second


def test_sequences_in_one_row_have_a_plan_of_their_own() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(WIDTH - 5)]).expand(3, -1)
    inputs = {"attention_mask": None, "position_ids": positions}
    first, second = plans_of(tiny_model("llama", "smart"), lambda m: forward(m, **inputs))
    assert first is not second
    assert first.is_packed


def test_what_a_block_says_has_a_plan_of_its_own() -> None:
    model = tiny_model("llama", "smart")
    (plain, _), (restricted, again) = plans_of(model, forward), plans_of(model, in_a_block)
    assert restricted is not plain
    assert restricted.settings.backends == ("sdpa",)
    assert again.settings.backends == ("sdpa",)


def test_windows_count() -> None:
    windows = [
        shared_plan(1, 8, 8, Pattern.CAUSAL, CPU, window) for window in (None, 3, 5, None, 3)
    ]
    assert len(set(map(id, windows))) == 3
    assert [plan.window for plan in windows] == [None, 3, 5, None, 3]


def test_another_profile_and_ended_quarantines_bring_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = shared_plan(1, 8, 8, Pattern.CAUSAL, CPU)
    try:
        profile.set_profile(None)
        changed = shared_plan(1, 8, 8, Pattern.CAUSAL, CPU)
        assert changed is not before
    finally:
        profile.set_profile(None)
    monkeypatch.setattr(base, "_releases", base.releases() + 1)
    assert shared_plan(1, 8, 8, Pattern.CAUSAL, CPU) not in (before, changed)


def test_every_stream_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = 1
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: (index, stream), raising=False
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(shared_plans, "profile_for", lambda device: None)
    device = torch.device("cuda")
    first = shared_plan(1, 8, 8, Pattern.CAUSAL, device)
    assert shared_plan(1, 8, 8, Pattern.CAUSAL, device) is first
    stream = 2
    assert shared_plan(1, 8, 8, Pattern.CAUSAL, device) is not first


# -- CUDA graphs -----------------------------------------------------------------------------------


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """All looks as if it were recorded for a CUDA graph."""
    for name in ("masking", "integration"):
        monkeypatch.setattr(f"smartattn.{name}.capturing", lambda device: True)


@pytest.mark.usefixtures("graph")
@torch.no_grad()
def test_graphs_get_the_masks_and_calls_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", "smart")
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(3, WIDTH, 32),
        attention_mask=None,
        **{CACHE: None},
    )
    assert not isinstance(mask, PlanMask)
    assert smart_mask(3, WIDTH, WIDTH) is None
    # Nothing is chosen, and no plan made.
    monkeypatch.setattr("smartattn.integration._choose", None)
    monkeypatch.setattr("smartattn.integration._plan_of", None)
    expected = tiny_model("llama", "eager")
    for padding in (None, "left"):
        inputs = {"attention_mask": None if padding is None else MASKS[padding]}
        where = inputs["attention_mask"]
        assert_agree(
            forward(model, **inputs).logits, forward(expected, **inputs).logits, where=where
        )


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert not shared_plans.capturing(CPU)
