"""PlanMask: to every operation it is the additive mask that eager attention would have got."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import masking_utils

import smartattn
from smartattn.integration import smart_attention, smart_mask
from smartattn.mask import PlanMask
from smartattn.plan import Pattern, Plan

from .agreement import CONTIGUOUS_MASKS, MASKS, WIDTH, assert_agree, assert_differ
from .tiny_models import tiny_model, token_ids

BATCH = 3


def arguments(padding: str = "left", **changes: Any) -> dict[str, Any]:
    """What create_causal_mask hands to a mask function."""
    given: dict[str, Any] = {
        "batch_size": BATCH,
        "q_length": WIDTH,
        "kv_length": WIDTH,
        "attention_mask": MASKS[padding].bool(),
        "mask_function": masking_utils.causal_mask_function,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    return {**given, **changes}


def pair(padding: str = "left", **changes: Any) -> tuple[PlanMask, Tensor]:
    """smartattn's mask of a batch, and eager's."""
    given = arguments(padding, **changes)
    mask = smart_mask(**given)
    assert isinstance(mask, PlanMask)
    return mask, masking_utils.eager_mask(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding", MASKS)
def test_looks_like_the_eager_mask(padding: str, dtype: torch.dtype) -> None:
    mask, expected = pair(padding, dtype=dtype)
    assert isinstance(mask, torch.Tensor)
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda"):
        assert getattr(mask, name) == getattr(expected, name), name
    for method in ("size", "numel", "dim", "stride", "is_contiguous", "is_floating_point"):
        assert getattr(mask, method)() == getattr(expected, method)(), method
    assert len(mask) == len(expected)
    assert "PlanMask" in repr(mask)


SCORES = torch.randn(BATCH, 4, WIDTH, WIDTH)

OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "index": lambda m: m[1],
    "index_all": lambda m: m[1, 0, 2, 3],
    "slice": lambda m: m[:, :, 2:5, :7],
    "slice_last_query": lambda m: m[..., -1:, :],
    "ellipsis": lambda m: m[..., :WIDTH],
    "new_axis": lambda m: m[:, None],
    "gather_rows": lambda m: m[torch.tensor([2, 0])],
    "boolean_index": lambda m: m[torch.tensor([True, False, True])],
    "index_select": lambda m: m.index_select(0, torch.tensor([1, 1])),
    "iterate": lambda m: list(m)[1],
    "unbind": lambda m: m.unbind(0)[2],
    "split": lambda m: m.split(5, dim=-1)[1],
    "chunk": lambda m: m.chunk(2, dim=2)[0],
    "add_number": lambda m: m + 1.5,
    "add_to_scores": lambda m: SCORES + m,
    "scores_added_to": lambda m: m + SCORES,
    "add_in_place_to_scores": lambda m: SCORES.clone().add_(m),
    "subtract": lambda m: 1.0 - m,
    "multiply": lambda m: m * 0.5,
    "negative": lambda m: -m,
    "equal_to_zero": lambda m: m == 0,
    "less": lambda m: m < 0,
    "as_boolean": lambda m: m.bool(),
    "half": lambda m: m.half(),
    "double": lambda m: m.to(torch.float64),
    "to_like": lambda m: m.to(SCORES.double()),
    "type_as": lambda m: m.type_as(SCORES.bfloat16()),
    "softmax": lambda m: (SCORES + m).softmax(-1),
    "sum": lambda m: (m == 0).sum(-1),
    "minimum": lambda m: m.min(),
    "clamp": lambda m: m.clamp(min=-10.0),
    "where": lambda m: torch.where(m < 0, torch.tensor(-5.0), m),
    "masked_fill": lambda m: m.masked_fill(m < 0, -7.0),
    "expand": lambda m: m.expand(-1, 4, -1, -1),
    "repeat": lambda m: m.repeat(1, 4, 1, 1),
    "repeat_interleave": lambda m: m.repeat_interleave(2, dim=0),
    "reshape": lambda m: m.reshape(BATCH, WIDTH * WIDTH),
    "view": lambda m: m.view(BATCH, WIDTH, WIDTH),
    "flatten": lambda m: m.flatten(1),
    "transpose": lambda m: m.transpose(-1, -2),
    "permute": lambda m: m.permute(1, 0, 2, 3),
    "squeeze": lambda m: m.squeeze(1),
    "unsqueeze": lambda m: m.unsqueeze(0),
    "concatenate": lambda m: torch.cat([m, m], dim=-1),
    "stack": lambda m: torch.stack([m, m]),
    "pad": lambda m: torch.nn.functional.pad(m, (0, 3), value=-1.0),
    "einsum": lambda m: torch.einsum("bhqk,bhqk->bqk", SCORES[:, :1], (m == 0).float()),
    "matmul": lambda m: (m == 0).float() @ SCORES[:, :1],
    "zeros_like": torch.zeros_like,
    "new_ones": lambda m: m.new_ones(3),
    "copied_into": lambda m: torch.empty(BATCH, 1, WIDTH, WIDTH).copy_(m),
    "equal": lambda m: torch.equal(m, m + 0),
    "item": lambda m: m[0, 0, 0, 0].item(),
    "truth": lambda m: bool((m == 0).any()),
    "list": lambda m: m.tolist(),
    "numpy": lambda m: m.numpy(),
    "numpy_forced": lambda m: m.numpy(force=True),
    "numpy_array": lambda m: np.asarray(m),
    "clone": lambda m: m.clone() + 0,
    "detach": lambda m: m.detach() + 0,
    "contiguous": lambda m: m.contiguous() + 0,
    "cpu": lambda m: m.cpu() + 0,
    "to_its_device": lambda m: m.to("cpu") + 0,
    "data": lambda m: m.data + 0,
    "deepcopy": copy.deepcopy,
    "copy": lambda m: copy.copy(m) + 0,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "scaled_dot_product_attention": lambda m: torch.nn.functional.scaled_dot_product_attention(
        SCORES, SCORES, SCORES, attn_mask=m
    ),
}


@pytest.mark.parametrize("padding", ["left", "holes", "empty_row", "ones"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_see_the_additive_values(operation: str, padding: str) -> None:
    mask, reference = pair(padding)
    actual, expected = OPERATIONS[operation](mask), OPERATIONS[operation](reference)
    if not isinstance(expected, Tensor):
        assert np.array_equal(actual, expected)
        return
    actual = actual + 0 if isinstance(actual, PlanMask) else actual
    assert type(actual) is Tensor
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    assert torch.equal(mask + 0, reference), "reading changes nothing"


@pytest.mark.parametrize("changes", [
    {"mask_function": masking_utils.bidirectional_mask_function},
    {"mask_function": masking_utils.bidirectional_mask_function, "q_length": 5},
    {"mask_function": masking_utils.sliding_window_causal_mask_function(3), "local_size": 3},
    {
        "mask_function": masking_utils.sliding_window_bidirectional_mask_function(2),
        "local_size": 2,
    },
    {
        "mask_function": masking_utils.chunked_causal_mask_function(
            4, torch.zeros(BATCH, dtype=torch.long)
        ),
        "local_size": 4,
    },
    {"q_length": 5, "q_offset": WIDTH - 5},
    {"q_length": 1, "q_offset": WIDTH - 1},
    {"kv_length": WIDTH + 6},
    {"kv_length": 6, "kv_offset": 6, "q_length": 2, "q_offset": 10},
    {"mask_function": masking_utils.or_masks(
        masking_utils.causal_mask_function, lambda b, h, q, k: (q < 4) & (k < 4)
    )},
    {"attention_mask": None},
], ids=[
    "bidirectional", "cross", "window", "symmetric_window", "chunked", "chunk_of_a_prefill",
    "decode", "static", "sliding_cache", "overlay", "no_padding",
])  # fmt: skip
@pytest.mark.parametrize("padding", MASKS)
def test_every_pattern_materialises_like_eagers(padding: str, changes: dict[str, Any]) -> None:
    mask, expected = pair(padding, **changes)
    assert torch.equal(mask + 0, expected)
    dense = mask.plan.dense_mask()
    if dense is None:
        assert not expected.any()
    else:
        assert torch.equal(dense.expand_as(expected), expected == 0)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "set_item": lambda m: m.__setitem__((slice(None), slice(None), 3, slice(0, 2)), -8.0),
    "set_boolean": lambda m: m.__setitem__(m < 0, -0.5),
    "add": lambda m: m.add_(torch.arange(WIDTH)),
    "multiply": lambda m: m.mul_(1e-38),
    "masked_fill": lambda m: m.masked_fill_(torch.eye(WIDTH, dtype=torch.bool), -9.0),
    "fill": lambda m: m.fill_(-1.0),
    "zero": lambda m: m.zero_(),
    "copy": lambda m: m.copy_(torch.full((WIDTH,), -2.0)),
    "clamp": lambda m: m.clamp_(min=-3.0),
    "through_a_view": lambda m: m[:, 0].sub_(torch.arange(WIDTH)),
    "through_a_slice": lambda m: m[..., :4].fill_(-4.0),
    "through_a_transpose": lambda m: m.transpose(-1, -2)[:, :, -1].add_(-6.0),
    "as_output": lambda m: torch.add(m, torch.arange(WIDTH), out=m),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_writes_reach_the_layers(write: str, inference: bool) -> None:
    """A layer must not go by the plan of a mask that somebody has changed since.

    Tensors made in inference mode have no version counter that would tell.
    """
    with torch.inference_mode(inference):
        check_write(write)


def check_write(write: str) -> None:
    mask, reference = pair("left")
    layer = tiny_model("bert", "smart").encoder.layer[0].attention.self
    states = [torch.randn(BATCH, 4, WIDTH, 8) for _ in range(3)]
    before, _ = smart_attention(layer, *states, mask)
    WRITES[write](mask)
    WRITES[write](reference)
    assert mask.plan is None
    assert torch.equal(mask.dense(), reference)
    assert torch.equal(mask + 0, reference)
    after, _ = smart_attention(layer, *states, mask)
    expected, _ = smart_attention(layer, *states, reference)
    assert_agree(after, expected)
    assert_differ(after, before)
    for copied in (mask.clone(), mask.detach(), copy.deepcopy(mask), mask.to("cpu")):
        assert torch.equal(copied + 0, reference)


def test_a_write_changes_this_mask_alone() -> None:
    """Copies, the plan and the masks of other layers keep their values."""
    mask, reference = pair("left")
    copied, again = mask.clone(), PlanMask(mask.plan, mask.dtype)
    plan = mask.plan
    mask.zero_()
    assert torch.equal(copied + 0, reference)
    assert torch.equal(again + 0, reference)
    assert torch.equal(plan.dense_mask().expand_as(reference), reference == 0)
    assert copied.plan is plan


@pytest.mark.parametrize("written_before", [False, True])
def test_a_write_after_a_view_was_taken(written_before: bool) -> None:
    """The view may be older than the layer's first look at the plan."""
    mask, reference = pair("left")
    layer = tiny_model("bert", "smart").encoder.layer[0].attention.self
    states = [torch.randn(BATCH, 4, WIDTH, 8) for _ in range(3)]
    view, reference_view = mask[:, :, :5], reference[:, :, :5]
    if written_before:
        mask[0, 0, 0, 0] = reference[0, 0, 0, 0] = -3.0
    smart_attention(layer, *states, mask)
    view.sub_(4.0 * torch.arange(WIDTH))
    reference_view.sub_(4.0 * torch.arange(WIDTH))
    after, _ = smart_attention(layer, *states, mask)
    expected, _ = smart_attention(layer, *states, reference)
    assert_agree(after, expected)


@pytest.mark.parametrize("how", ["detach", "alias", "data"])
def test_a_write_through_an_alias_reaches_the_mask(how: str) -> None:
    mask, reference = pair("left")
    aliases = {
        "detach": Tensor.detach,
        "alias": torch.ops.aten.alias.default,
        "data": lambda m: m.data,
    }
    aliases[how](mask).add_(1.0)
    aliases[how](reference).add_(1.0)
    assert torch.equal(mask + 0, reference)


@pytest.mark.parametrize(
    "keep",
    [
        lambda m: m,
        Tensor.detach,
        Tensor.clone,
        Tensor.contiguous,
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.float32),
        lambda m: m.to("meta"),
        lambda m: m.to(device="meta", non_blocking=True),
        lambda m: m.to(torch.empty(0, device="meta")),
    ],
    ids=[
        "itself", "detach", "clone", "contiguous", "to_same_device", "to_same_dtype",
        "to_device", "to_device_non_blocking", "to_other_tensor",
    ],
)  # fmt: skip
def test_the_plan_survives_what_does_not_change_the_mask(keep: Callable[[Tensor], Tensor]) -> None:
    mask, _ = pair("left")
    kept = keep(mask)
    assert isinstance(kept, PlanMask)
    assert kept.plan is not None
    assert kept.plan.padding is mask.plan.padding
    assert kept.device == kept.plan.device
    assert kept.dtype == mask.dtype


@pytest.mark.parametrize(
    "operation", ["add_to_scores", "softmax", "equal_to_zero", "double", "where", "pad", "list"]
)
def test_the_plan_survives_being_read(operation: str) -> None:
    """A layer that adds the mask itself takes nothing from the layers that do not."""
    mask, _ = pair("left")
    plan = mask.plan
    OPERATIONS[operation](mask)
    assert mask.plan is plan


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "rows",
    [
        [[0, 0, 1, 1], [0, 0, 1, 1]],
        [[1, 0, 1, 1], [1, 0, 0, 1]],
        [[0, 0, 0, 1]] * 4,
        [[1, 1, 0, 0], [0, 0, 0, 0]],
    ],
    ids=["left", "holes", "one token", "empty row"],
)
def test_callers_may_hand_over_any_dtype(rows: list[list[int]], dtype: torch.dtype) -> None:
    """Transformers' own functions cast the 2D mask, those of other code need not."""
    real = torch.tensor(rows)
    given = arguments(batch_size=len(rows), q_length=4, kv_length=4)
    mask = smart_mask(**{**given, "attention_mask": real.to(dtype)})
    assert isinstance(mask, PlanMask)
    assert mask.plan is not None
    assert mask.plan.sequences is not None
    assert mask.plan.sequences.k_length.tolist() == real.sum(dim=1).tolist()
    expected = masking_utils.eager_mask(**{**given, "attention_mask": real.bool()})
    assert torch.equal(mask.dense(), expected)


def test_a_mask_of_the_caller_may_be_filled_anew() -> None:
    buffer = MASKS["left"].bool().clone()
    mask = smart_mask(**arguments(attention_mask=buffer))
    expected = masking_utils.eager_mask(**arguments("left"))
    buffer.fill_(True)
    assert isinstance(mask, PlanMask)
    assert torch.equal(mask.dense(), expected)


@pytest.mark.parametrize("backends", [None, "sdpa", "sdpa_unpadded", "eager"])
@pytest.mark.parametrize("padding", ["left", "holes"])
def test_one_mask_for_inference_and_then_for_training(padding: str, backends: str | None) -> None:
    if (padding, backends) == ("holes", "sdpa_unpadded"):
        backends = "sdpa"
    model = tiny_model("llama", "smart")
    mask = smart_mask(**arguments(padding, config=model.config))
    inputs = {"input_ids": token_ids(BATCH, WIDTH), "use_cache": False}
    with smartattn.use(backends=backends):
        with torch.inference_mode():
            seen = model(**inputs, attention_mask=mask).logits
        logits = model(**inputs, attention_mask=mask).logits
        assert_agree(logits.detach(), seen.clone(), where=MASKS[padding])
        logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("container", [list, tuple, lambda masks: {"full": masks[0]}])
def test_accelerate_moves_it(container: Callable[[list[Tensor]], Any]) -> None:
    from accelerate.utils import send_to_device

    mask, _ = pair("left")
    moved = send_to_device(container([mask]), torch.device("meta"))
    (moved_mask,) = moved.values() if isinstance(moved, dict) else moved
    assert isinstance(moved_mask, PlanMask)
    assert moved_mask.device.type == "meta"
    assert moved_mask.plan is mask.plan.on(torch.device("meta"))


def test_torch_save_and_load() -> None:
    mask, reference = pair("left")
    file = io.BytesIO()
    torch.save({"mask": mask}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["mask"], reference)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_the_plan(reentrant: bool) -> None:
    mask, reference = pair("left")
    seen: list[Tensor] = []

    def layer(states: Tensor, given: Tensor) -> Tensor:
        seen.append(given)
        return (states + given).softmax(-1)

    states = SCORES.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(
        layer, states, mask, use_reentrant=reentrant
    ).square().sum().backward()
    expected = SCORES.clone().requires_grad_()
    layer(expected, reference).square().sum().backward()
    assert_agree(states.grad, expected.grad)
    assert [isinstance(given, PlanMask) and given.plan is not None for given in seen[:2]] == [
        True,
        True,
    ]


def test_a_plan_is_not_used_for_other_shapes() -> None:
    """A layer that merges tokens gets the mask's values, or torch's error, never the plan."""
    mask, reference = pair("left")
    layer = tiny_model("bert", "smart").encoder.layer[0].attention.self
    query, key, value = (torch.randn(BATCH, 4, WIDTH, 8) for _ in range(3))
    for wrong in (query[:, :, :5], query[:2]):
        with pytest.raises((RuntimeError, ValueError)):
            smart_attention(layer, wrong, key, value, mask)
    one, _ = smart_attention(layer, query[:, :, -1:], key, value, mask[:, :, -1:])
    expected, _ = smart_attention(layer, query[:, :, -1:], key, value, reference[:, :, -1:])
    assert_agree(one, expected)


def test_memory_is_taken_on_first_use_only() -> None:
    """A mask of 2**20 tokens squared would be four terabytes."""
    length = 1 << 20
    plan = Plan(1, length, length, Pattern.CAUSAL, torch.device("cpu"))
    mask = PlanMask(plan, torch.float32)
    assert mask.shape == (1, 1, length, length)
    assert mask.clone().detach().plan is plan


def test_contiguous_masks_are_measured_as_such() -> None:
    names = {"right": "right", "left": "left", "both": "both", "outer": "both"}
    for padding, name in names.items():
        mask, _ = pair(padding, mask_function=masking_utils.bidirectional_mask_function)
        assert mask.plan.padding.value == name
        assert mask.plan.real_k == int(CONTIGUOUS_MASKS[padding].sum())
