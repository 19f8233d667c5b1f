"""Batches that have nothing but their shape share a plan; what belongs to one stays out of it."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers import masking_utils as masks
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import smartattn
from smartattn import profiles, shared_plans
from smartattn.backends import base
from smartattn.backends.sdpa import SdpaBackend
from smartattn.call import Call, Runner
from smartattn.choose import Chooser, Decision, UnsupportedCallError, Verdict
from smartattn.control import DEFAULT
from smartattn.first_use import FirstUses
from smartattn.integration import _Choice, _choice, smart_attention
from smartattn.integration import _choose as choose
from smartattn.mask import PlanMask
from smartattn.masking import is_causal_of, smart_mask
from smartattn.plan import Pattern, Plan
from smartattn.shared_plans import Askers, shared_plan

from .agreement import CACHE, MASKS, WIDTH, assert_agree, run
from .tiny_models import tiny_model, token_ids

add_asker = Askers.add
IDS = token_ids(3, WIDTH)
ONES = torch.ones_like(IDS)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_shared_before() -> None:
    """What other tests have left behind."""
    shared_plans._plan.cache_clear()


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
    (plain, _), (first, second) = plans_of(model, forward), plans_of(model, in_a_block)
    assert len({plain, first, second}) == 3
    assert not first.is_shared
    assert first.settings.backends == second.settings.backends == ("sdpa",)
    with pytest.MonkeyPatch.context() as patch:
        # What is said of the process is one object.
        patch.setattr("smartattn.control._process", DEFAULT)
        smartattn.configure(backends=["sdpa", "eager"])
        first, second = plans_of(model, forward)
    assert first is second
    assert first is not plain
    assert first.settings.backends == ("sdpa", "eager")


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gemma3"])
@torch.no_grad()
def test_no_mask_is_kept_for_other_forwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel takes softcap, sinks or a window alone, layers need one."""
    shared = []

    def made(*args: Any, **kwargs: Any) -> Plan:
        shared.append(Plan(*args, **kwargs))
        return shared[-1]

    monkeypatch.setattr(shared_plans, "Plan", made)
    model = tiny_model(name, "smart")
    expected = forward(tiny_model(name, "eager")).logits
    for _ in range(3):
        assert_agree(forward(model).logits, expected)
    assert shared
    assert any(plan.was_left for plan in shared)
    kept = [value for plan in shared for value in plan._derived.values()]
    assert not any(isinstance(value, torch.Tensor) for value in kept)
    assert not any(plan.decisions for plan in shared if plan.was_left)


@torch.no_grad()
def test_a_mask_that_is_wanted_as_a_tensor_is_not_kept() -> None:
    mask = smart_mask(2, 8, 8)
    assert isinstance(mask, PlanMask)
    plan = mask.plan
    assert plan is not None
    assert plan.is_shared
    assert torch.equal(mask.dense()[0, 0] == 0, torch.ones(8, 8).tril().bool())
    assert not plan._derived
    assert mask.plan is not plan
    again = smart_mask(2, 8, 8)
    assert isinstance(again, PlanMask)
    assert again.plan is not plan, "whoever wants it once wants it again"


@torch.no_grad()
def test_bounds_in_a_buffer_that_is_filled_anew() -> None:
    """For a batch with a mask of ones, and for one without any mask."""
    model = tiny_model("llama", "smart")
    bounds = torch.zeros(3, dtype=torch.int32)
    ids = IDS[:1]
    for values in ([0, 5, WIDTH], [0, 8, WIDTH]):
        bounds.copy_(torch.tensor(values))
        parts = [ids[:, a:b] for a, b in itertools.pairwise(values)]
        positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
        expected = torch.cat([model(input_ids=part).logits for part in parts], dim=1)
        for mask in (None, torch.ones_like(ids)):
            more = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            more |= {"max_length_q": WIDTH, "max_length_k": WIDTH}
            actual = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, **more
            ).logits
            assert_agree(actual, expected)


def test_a_quarantine_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_quarantine", {})
    model = tiny_model("llama", "smart")
    first, _ = plans_of(model, forward)
    (chosen,) = first.decisions.values()
    base.quarantine(chosen.decision.backend.name, CPU, "for this test")
    try:
        second, _ = plans_of(model, forward)
    finally:
        base.end_quarantine()
    assert second is not first
    # Eager attention ran, under a plan that keeps its mask.
    assert second.was_left
    assert not first.was_left


def test_every_thread_has_its_own() -> None:
    """What has to be built for a shape is built for a thread."""
    found = [shared_plan(1, 8, 8, Pattern.CAUSAL, CPU)]
    thread = threading.Thread(
        target=lambda: found.append(shared_plan(1, 8, 8, Pattern.CAUSAL, CPU))
    )
    thread.start()
    thread.join()
    assert found[0] is not found[1]


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
        profiles.set_profile(None)
        changed = shared_plan(1, 8, 8, Pattern.CAUSAL, CPU)
        assert changed is not before
    finally:
        profiles.set_profile(None)
    monkeypatch.setattr(base, "_changes", base.changes() + 1)
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
    for name in ("masking.capturing_on", "integration.capturing"):
        monkeypatch.setattr(f"smartattn.{name}", lambda on: True)
    name = "transformers.utils.import_utils.is_cuda_stream_capturing"
    monkeypatch.setattr(name, lambda: True)


@pytest.mark.usefixtures("graph")
def test_masks_of_graphs_say_whether_they_are_causal_alone() -> None:
    whole = {"batch_size": 2, "q_length": 8, "kv_length": 8}
    both = {**whole, "mask_function": masks.bidirectional_mask_function}
    # What Transformers says of all functions but its own.
    never = {**whole, "allow_is_causal_skip": False}
    window = masks.sliding_window_causal_mask_function
    packed = masks.packed_sequence_mask_function(torch.zeros(2, 8, dtype=torch.long))
    step = {"batch_size": 2, "q_length": 1}
    for is_causal, arguments in (
        (True, whole),
        (False, {**both, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}),
        (True, {**whole, "mask_function": window(8), "local_size": 8}),
        (True, {**step, "kv_length": 8, "q_offset": 7}),
        (True, {**step, "kv_length": 6, "q_offset": 7, "kv_offset": 2}),
    ):
        # Versions of Transformers differ in which ones they make.
        mask = smart_mask(**arguments)
        assert mask is None or is_causal_of(mask) is is_causal
        if mask is not None:
            assert is_causal_of(mask.clone()) is None
            mask[0, 0, 0].zero_()
            assert is_causal_of(mask) is None
    assert is_causal_of(None) is None
    for arguments in (
        {**both, "allow_is_causal_skip": False},
        never,
        {**whole, "mask_function": window(7), "local_size": 7},
        {**never, "mask_function": masks.and_masks(masks.causal_mask_function, packed)},
        {**whole, "attention_mask": torch.ones(2, 8, dtype=torch.bool)},
        {**whole, "kv_length": 9, "q_offset": 1},
        {**whole, "q_length": 1},
        # A function that Transformers skips without a look at it.
        {
            **both,
            "mask_function": lambda row, head, query, key: key != 3,
            "allow_is_bidirectional_skip": True,
        },
        {**whole, "q_offset": torch.tensor(0)},
        {**never, "mask_function": lambda row, head, query, key: key <= query},
    ):
        mask = smart_mask(**arguments)
        assert isinstance(mask, torch.Tensor)
        assert not isinstance(mask, PlanMask)
        assert is_causal_of(mask) is None


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gemma3"])
@torch.no_grad()
def test_graphs_get_the_masks_and_calls_of_sdpa(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or of the model's own code, where sdpa would leave an argument out."""
    model = tiny_model(name, "smart")
    # Nothing is chosen, and no plan made.
    monkeypatch.setattr("smartattn.integration._choose", None)
    monkeypatch.setattr("smartattn.integration._plan_of", None)
    monkeypatch.setattr("smartattn.masking.Plan", None)
    assert not isinstance(smart_mask(3, WIDTH, WIDTH), PlanMask)
    expected = tiny_model(name, "eager")
    for padding in (None, "left"):
        where = None if padding is None else MASKS[padding]
        inputs = {"attention_mask": where}
        assert_agree(
            forward(model, **inputs).logits, forward(expected, **inputs).logits, where=where
        )


@torch.no_grad()
def test_masks_that_were_made_before_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that others find is made while one is captured, nor is what was found used."""
    model = tiny_model("llama", "smart")
    layer = model.model.layers[0].self_attn
    states = [torch.randn(2, heads, 8, 8) for heads in (4, 2, 2)]
    for warm in (False, True):
        mask = smart_mask(2, 8, 8)
        assert isinstance(mask, PlanMask)
        plan = mask.plan
        assert plan is not None
        if warm:
            expected = smart_attention(layer, *states, mask)[0]
            assert plan.decisions
            monkeypatch.setattr(_Choice, "run", None)
        else:
            expected = smart_attention(layer, *states, smart_mask(2, 8, 8))[0]
        with monkeypatch.context() as patch:
            patch.setattr("smartattn.integration.capturing", lambda states: True)
            assert_agree(smart_attention(layer, *states, mask)[0], expected)
        assert not any(isinstance(value, torch.Tensor) for value in plan._derived.values())


class _Recording(SdpaBackend):
    """Stands for a flash kernel, and keeps what it was asked for."""

    name = "flash_attention_2"
    indispensable = False

    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def bind(self, plan: Plan, call: Call) -> Runner:
        self.plans.append(plan)
        return super().bind(plan, call)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> _Recording:
    backend = _Recording()
    monkeypatch.setattr("smartattn.integration._chooser", Chooser([backend]))
    monkeypatch.setattr("smartattn.integration._first_uses", FirstUses([backend]))
    monkeypatch.setattr("smartattn.integration._FOR_GRAPHS", (backend.name,))
    return backend


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("known", ["built", "not built", "unknown", "alone"])
@torch.no_grad()
def test_graphs_run_sdpa_where_it_is_known_to_be_built(
    known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the form in which it was built, which may be another one than Transformers'."""
    flash, own = _Recording(), _Recording()
    own.name, own.indispensable = "sdpa", True  # type: ignore[misc]
    backends = [own] if known == "alone" else [own, flash]
    first = FirstUses(backends)
    monkeypatch.setattr("smartattn.integration._first_uses", first)
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    states = [torch.randn(2, heads, 8, 8) for heads in (4, 2, 2)]
    predicted = None if known == "unknown" else 1.0
    verdicts = (
        Verdict("sdpa", (), predicted, build_us=0.0 if known == "unknown" else 4e4),
        Verdict("flash_attention_2", (), predicted and 5.0),
    )[: len(backends)]

    def chosen(plan: Plan, call: Call, profile: Any, allowed: Any, objective: Any) -> Decision:
        able = [backend for backend in backends if backend.name in allowed]
        if not able:
            raise UnsupportedCallError("none")
        decision = Decision(able[0], "a test", verdicts, profile)
        if known == "built":
            first.take(decision, plan, call)
        return decision

    monkeypatch.setattr("smartattn.integration._chooser", chosen)
    expected = sdpa_attention_forward(layer, *states, None)[0]
    assert_agree(smart_attention(layer, *states, None)[0], expected)
    assert bool(own.plans) == (known == "built")
    assert bool(flash.plans) == (known in ("not built", "unknown"))


@pytest.mark.usefixtures("graph")
@torch.no_grad()
def test_graphs_without_a_mask_may_run_flash_kernels(recording: _Recording) -> None:
    """By plans of their own, which no later forward finds."""
    model = tiny_model("llama", "smart")
    with smartattn.trace() as trace:
        found = model(input_ids=IDS).logits
    assert_agree(found, tiny_model("llama", "eager")(input_ids=IDS).logits)
    assert len({id(plan) for plan in recording.plans}) == len(model.model.layers)
    assert all(plan.is_causal and not plan.is_shared for plan in recording.plans)
    assert [row.backend for row in trace.rows] == [recording.name]
    encoder = tiny_model("bert", "smart")
    recording.plans.clear()
    expected = tiny_model("bert", "eager")(input_ids=IDS).last_hidden_state
    assert_agree(encoder(input_ids=IDS).last_hidden_state, expected)
    assert recording.plans
    assert not any(plan.is_causal for plan in recording.plans)


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("why", ["padding", "grad", "dropout", "backends", "memory", "cache"])
def test_all_other_calls_in_graphs_are_those_of_sdpa(why: str, recording: _Recording) -> None:
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    query, key, value = (torch.randn(2, heads, 8, 8) for heads in (4, 2, 2))
    mask, dropout = None, 0.0
    if why == "padding":
        mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    if why == "grad":
        query.requires_grad_()
    if why == "dropout":
        dropout = 0.5
    if why == "cache":
        # Under a causal mask None says nothing of where the queries stand.
        query = query[:, :, :4]
    with contextlib.ExitStack() as stack:
        if why == "backends":
            stack.enter_context(smartattn.use(backends=["sdpa"]))
        if why == "memory":
            stack.enter_context(smartattn.use(objective="memory"))
        torch.manual_seed(0)
        found = smart_attention(layer, query, key, value, mask, dropout=dropout)[0]
    torch.manual_seed(0)
    expected = sdpa_attention_forward(layer, query, key, value, mask, dropout=dropout)[0]
    assert torch.equal(found, expected)
    assert not recording.plans


@pytest.mark.usefixtures("graph")
@torch.no_grad()
def test_masks_in_graphs_that_hide_nothing() -> None:
    """What they say comes before what a layer says of itself."""
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    states = [torch.randn(2, heads, 8, 8) for heads in (4, 2, 2)]
    mask = PlanMask(Plan(2, 8, 8, Pattern.BIDIRECTIONAL, CPU), torch.float32)
    expected = sdpa_attention_forward(layer, *states, None, is_causal=False)[0]
    assert_agree(smart_attention(layer, *states, mask)[0], expected)


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("padding", [None, "left"])
def test_graphs_in_inference_mode(padding: str | None) -> None:
    """Tensors that are made there have no count of what was written into them."""
    where = None if padding is None else MASKS[padding]
    with torch.inference_mode():
        found = tiny_model("llama", "smart")(input_ids=IDS, attention_mask=where).logits
        expected = tiny_model("llama", "eager")(input_ids=IDS, attention_mask=where).logits
    assert_agree(found, expected, where=where)


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert not shared_plans.capturing(IDS)
    assert not shared_plans.capturing_on(CPU)


# -- masks of a caller's own -----------------------------------------------------------------------


def given_plans(mask: torch.Tensor, monkeypatch: pytest.MonkeyPatch, layers: int = 3) -> list[Any]:
    """The plans under which layers with one mask choose; each answer is compared with sdpa's."""
    found: list[Plan] = []

    def kept(*arguments: Any, **more: Any) -> Any:
        found.append(arguments[4])
        return _choice(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr("smartattn.integration._choice", kept)
        for seed, layer in enumerate(attention_layers(layers)):
            torch.manual_seed(seed)
            states = [torch.randn(2, heads, 8, 8) for heads in (4, 2, 2)]
            expected = sdpa_attention_forward(layer, *states, mask)[0]
            assert_agree(smart_attention(layer, *states, mask)[0], expected)
    return found


@functools.cache
def attention_layers(count: int) -> list[Any]:
    """Of one model."""
    return [
        layer.self_attn
        for layer in tiny_model("llama", "smart", num_hidden_layers=count).model.layers
    ]


def another_model(layers: list[Any]) -> list[Any]:
    """The same layers with another configuration."""
    config = copy.copy(layers[0].config)
    other = [copy.copy(layer) for layer in layers]
    for layer in other:
        layer.config = config
    return other


def own_mask() -> torch.Tensor:
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    mask[..., 5, 1] = False
    return mask


def test_layers_share_the_plan_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one forward: the next one asks anew, whatever became of the mask."""
    mask = own_mask()
    plans = given_plans(mask, monkeypatch)
    assert len(set(map(id, plans))) == 1
    after = given_plans(mask, monkeypatch)
    assert len(set(map(id, after))) == 1
    assert after[0] is not plans[0]


@pytest.mark.parametrize("what", ["write", "quarantine"])
def test_layers_part_where_something_changed(what: str) -> None:
    mask = own_mask()
    plans = []
    for count, layer in enumerate(attention_layers(3)):
        if count == 1 and what == "write":
            mask[..., 6, 2] = False
        elif count == 1:
            base.end_quarantine()
        plans.append(shared_plans.plan_of_given(layer, mask, 2, 8, 8))
    assert plans[1] is not plans[0]
    assert plans[2] is plans[1]


@pytest.mark.parametrize("shared", [False, True], ids=["own configuration", "one configuration"])
def test_two_models_with_one_mask(shared: bool) -> None:
    """The second one's forward may come long after that of the first."""
    mask = own_mask()
    one = attention_layers(2)
    other = another_model(one) if not shared else [copy.copy(layer) for layer in one]
    plans = [shared_plans.plan_of_given(layer, mask, 2, 8, 8) for layer in (*one, *other)]
    assert plans[0] is plans[1]
    assert plans[1] is not plans[2]
    assert plans[2] is plans[3]


def test_towers_in_turn_with_one_mask() -> None:
    """Layers of two configurations run one after the other, each with the plan of its own."""
    mask = own_mask()
    one = attention_layers(2)
    other = another_model(one)
    in_turn = (one[0], other[0], one[1], other[1])
    plans = [shared_plans.plan_of_given(layer, mask, 2, 8, 8) for layer in in_turn]
    assert plans[0] is plans[2]
    assert plans[1] is plans[3]


def test_a_forward_that_skips_its_first_layer() -> None:
    mask = own_mask()
    layers = attention_layers(3)
    plans = [shared_plans.plan_of_given(layer, mask, 2, 8, 8) for layer in (*layers[1:], *layers)]
    assert len(set(map(id, plans[:2]))) == len(set(map(id, plans[2:]))) == 1
    assert plans[0] is not plans[2]


def test_what_was_chosen_for_a_mask_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next forward reads the mask anew, and chooses nothing; unless a kernel failed."""
    mask = own_mask()
    counted = []
    monkeypatch.setattr(
        "smartattn.integration._choose", lambda *args: counted.append(1) or choose(*args)
    )
    for _ in range(3):
        given_plans(mask, monkeypatch)
    assert len(counted) == 1
    (kept,) = (entry[2] for entry in shared_plans._given.values() if entry[0]() is mask)
    kept.forget_choices()
    given_plans(mask, monkeypatch)
    assert len(counted) == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("what", ["mask", "bounds"])
def test_checkpointed_layers_run_as_they_ran(
    what: str, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read or chosen in the backward, and the next forward begins behind it."""
    counted = []
    monkeypatch.setattr(
        "smartattn.integration._choose", lambda *args: counted.append(1) or choose(*args)
    )
    layers = attention_layers(3)
    mask = own_mask()[:1] if what == "mask" else None
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    more = {"cu_seq_lens_q": bounds} if what == "bounds" else {}
    asked = []
    monkeypatch.setattr(
        Askers, "add", lambda self, module: asked.append(add_asker(self, module)) or asked[-1]
    )

    def attend(layer: Any, states: torch.Tensor) -> torch.Tensor:
        heads = states.view(1, 8, 4, 8).transpose(1, 2)
        output = smart_attention(layer, heads, heads[:, :2], heads[:, :2], mask, **more)[0]
        return output.reshape(1, 8, 32)

    for _ in range(2):
        counted.clear()
        asked.clear()
        states = torch.randn(1, 8, 32, requires_grad=True)
        output = states
        for count, layer in enumerate(layers):
            if count == 0:
                output = attend(layer, output)
            else:
                output = checkpoint(attend, layer, output, use_reentrant=use_reentrant)
        forward = len(counted), len(asked)
        output.sum().backward()
        assert len(asked) > forward[1]
        assert not any(asked[forward[1] :])
        assert len(counted) == forward[0]
    # The second forward was noticed, in its first layer.
    assert asked[: forward[1]] == [True] + [False] * (forward[1] - 1)


#: Ways to fill a tensor anew that leave no trace in its version.
UNSEEN = {
    "data": lambda old, new: old.data.copy_(new),
    "numpy": lambda old, new: np.copyto(old.numpy(), new.numpy()),
    "dlpack": lambda old, new: torch.from_dlpack(old).copy_(new),
    "another storage": lambda old, new: setattr(old, "data", new.clone()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("way", UNSEEN)
def test_a_mask_that_is_filled_anew_unseen(way: str, boolean: bool, dtype: torch.dtype) -> None:
    """A server's buffer: each forward gets the mask that is in it, as under sdpa."""
    if boolean and way == "dlpack":
        pytest.skip("torch exports no booleans")
    first = torch.ones(3, 1, WIDTH, WIDTH, dtype=torch.bool).tril()
    second = first.clone()
    second[..., 6:, :6] = False
    if not boolean:
        low = torch.finfo(torch.float32).min
        first, second = (torch.zeros(m.shape).masked_fill(~m, low) for m in (first, second))
    model = tiny_model("llama", dtype=dtype)
    buffer = first.clone()
    version = buffer._version
    before = run(model, "smart", input_ids=IDS, attention_mask=buffer)
    UNSEEN[way](buffer, second)
    assert buffer._version == version
    after = run(model, "smart", input_ids=IDS, attention_mask=buffer)
    expected = run(model, "sdpa", input_ids=IDS, attention_mask=second)
    stale = float((before - expected).abs().max())
    assert float((after - expected).abs().max()) < 0.1 * stale


def test_bounds_of_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask they share a plan, but not what its sequences are taken for."""
    (one,) = attention_layers(1)
    (other,) = another_model([one])
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 12, 8) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    answers = []
    for layer, middle in ((one, 5), (other, 8)):
        bounds.numpy()[1] = middle
        packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        answers.append(smart_attention(layer, *states, None, is_causal=False, **packed)[0])
        fresh = {name: one.clone() for name, one in packed.items()}
        expected = smart_attention(layer, *states, None, is_causal=False, **fresh)[0]
        assert_agree(answers[-1], expected)
    assert not torch.allclose(*answers)


@pytest.mark.parametrize("way", ["data", "numpy", "inference"])
def test_bounds_that_are_filled_anew_unseen(way: str) -> None:
    """Without a mask a plan outlives its forward; the bounds of its sequences do not."""
    layer = attention_layers(1)[0]
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 12, 8) for heads in (4, 2, 2)]
    with torch.inference_mode(way == "inference"):
        bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
        for middle in (5, 8):
            if way == "inference":
                bounds[1] = middle
            else:
                UNSEEN[way](bounds, torch.tensor([0, middle, 12], dtype=torch.int32))
            alone = [
                sdpa_attention_forward(layer, *part, None, is_causal=False)[0]
                for part in zip(
                    *(x.split((middle, 12 - middle), dim=2) for x in states), strict=True
                )
            ]
            packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            actual = smart_attention(layer, *states, None, is_causal=False, **packed)[0]
            assert_agree(actual, torch.cat(alone, dim=1))


@pytest.mark.parametrize("why", ["inference", "large"])
def test_plans_that_masks_do_not_keep(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written into an inference tensor cannot be noticed."""
    with torch.inference_mode(why == "inference"):
        mask = own_mask()
        if why == "large":
            monkeypatch.setattr(shared_plans, "_MOST_KEPT", 100)
        plans = given_plans(mask, monkeypatch)
        mask[..., 6, 2] = False
        plans += given_plans(mask, monkeypatch)
    assert len(set(map(id, plans))) == len(plans)


def test_nothing_is_saved_or_copied_with_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = own_mask()
    first = given_plans(mask, monkeypatch)[0]
    assert not mask.__dict__
    copied = copy.deepcopy(mask)
    assert given_plans(copied, monkeypatch)[0] is not first
    known = len(shared_plans._given)
    del mask, copied
    assert len(shared_plans._given) == known - 2


def test_a_learned_mask_gets_its_gradient() -> None:
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    states = [torch.randn(2, heads, 8, 8) for heads in (4, 2, 2)]
    grads = []
    for attend in (smart_attention, sdpa_attention_forward):
        torch.manual_seed(0)
        weight = torch.randn(4, 8, 8, requires_grad=True)
        bias = weight[None].expand(2, -1, -1, -1)
        for _ in range(2):
            attend(layer, *states, bias)[0].square().sum().backward(retain_graph=True)
        grads.append(weight.grad)
    assert_agree(*grads)


def test_a_mask_and_its_plan_do_not_keep_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = own_mask()
    plan = weakref.ref(given_plans(mask, monkeypatch)[0])
    assert plan() is not None
    gc.collect()
    gc.disable()
    try:
        del mask
        assert plan() is None
    finally:
        gc.enable()
