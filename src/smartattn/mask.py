"""What travels in the mask's place: a tensor that carries a plan and is still a mask.

Most models hand the mask from the mask function to every layer untouched, but some slice it, add it
to the scores themselves or move it. :class:`PlanMask` therefore has the shape and dtype of the
additive mask that eager attention would get, holds no memory, and becomes that mask on any
operation it does not know. The idea is that of ``torch.nn.attention.bias.CausalBias``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .plan import Plan

_aten = torch.ops.aten
#: Operations whose result is the same mask in the same memory.
_SAME = frozenset({_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default})


class _State:
    """What the aliases of one mask share."""

    __slots__ = ("dense", "plan", "shared")

    def __init__(self, plan: Plan | None, dense: torch.Tensor | None = None) -> None:
        self.plan = plan
        self.dense = dense
        #: Somebody has written into the dense mask, or holds a view through which they may.
        self.shared = False


class PlanMask(torch.Tensor):
    """A (batch, 1, q_len, kv_len) additive mask that is not built before somebody needs it.

    Args:
        plan: the facts about this batch.
        dtype: floating-point dtype of the mask it stands for.
    """

    _state: _State

    def __new__(cls, plan: Plan, dtype: torch.dtype) -> PlanMask:
        """A tensor without storage; see the class."""
        shape = (plan.batch, 1, plan.q_len, plan.kv_len)
        return _wrap(torch.Size(shape), dtype, plan.device, _State(plan))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def plan(self) -> Plan | None:
        """The plan, or None once somebody has written, or could write, into the mask."""
        state = self._state
        return None if state.shared else state.plan

    def own_plan(self) -> Plan | None:
        """The plan, which no other forward has from now on, see :meth:`Plan.own`."""
        plan = self.plan
        if plan is not None and plan.is_shared:
            plan = self._state.plan = plan.own()
        return plan

    def dense(self) -> torch.Tensor:
        """The additive mask itself: 0 where a query sees a key, the dtype's minimum elsewhere.

        Every call returns the same memory, so that what one operation writes the next one reads.
        """
        state = self._state
        if state.dense is None:
            assert state.plan is not None
            if state.plan.is_shared:
                # Of what is kept for other forwards nothing may be as large as a mask.
                state.plan = state.plan.own()
            mask = state.plan.additive_mask(self.dtype)
            if mask is None:
                state.dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            else:
                # A copy of its own, not an expanded view: models write into their mask.
                state.dense = mask.to(self.dtype).expand(self.shape).clone()
        return state.dense

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        described = {} if self._state.plan is None else self._state.plan.describe()
        facts = "".join(
            f"{name}={value}, " for name, value in described.items() if value is not None
        )
        return f"PlanMask({facts}dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = torch.Tensor.__reduce_ex__(self.dense(), protocol)  # type: ignore[no-untyped-call]
        return reduced

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = self.dense().clone()
        memo[id(self)] = copy
        return copy

    def tolist(self) -> Any:
        """The additive mask as nested lists."""
        return self.dense().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The additive mask as an array."""
        self._state.shared = True
        return self.dense().numpy(force=force)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PlanMask):
            if func in _SAME:
                return _wrap(first.shape, first.dtype, first.device, first._state)
            if (plan := first.plan) is not None:
                if func is _aten.clone.default:
                    return PlanMask(plan, first.dtype)
                if func is _aten._to_copy.default and _only_moves(first, kwargs):
                    return PlanMask(plan.on(torch.device(kwargs["device"])), first.dtype)
        dense = PlanMask.dense
        if func is _aten.cat.default and any(part.dtype == torch.bool for part in args[0]):
            # Beside a boolean mask it is one too.
            dense = PlanMask._boolean
        _note_sharing(func._schema, args, kwargs)
        args, kwargs = tree_map_only(PlanMask, dense, (args, kwargs))
        return func(*args, **kwargs)

    def _boolean(self) -> torch.Tensor:
        return self.dense() == 0

    # While a graph is traced the mask is the dense one: its plan cannot be read there.

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_inner"], None

    @property
    def _inner(self) -> torch.Tensor:
        return self.dense()

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any
    ) -> PlanMask:
        dense = inner["_inner"]
        return _wrap(dense.shape, dense.dtype, dense.device, _State(None, dense))


def _wrap(shape: torch.Size, dtype: torch.dtype, device: torch.device, state: _State) -> PlanMask:
    mask: PlanMask = torch.Tensor._make_wrapper_subclass(
        PlanMask, shape, dtype=dtype, device=device
    )
    mask._state = state
    return mask


def _only_moves(mask: PlanMask, kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a copy ask for another device and nothing else."""
    same = {"dtype": mask.dtype, "layout": torch.strided, "pin_memory": False}
    given = {name: value for name, value in kwargs.items() if value is not None}
    target = given.pop("device", None)
    given.pop("non_blocking", None)
    return target is not None and all(name in same and same[name] == v for name, v in given.items())


def _note_sharing(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Ends the trust in the plans of masks that an operation writes into or returns views of.

    Views made below autograd share no version counter with their base, so that nothing would tell
    of a later write through them.
    """
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for mask in value if isinstance(value, list | tuple) else (value,):
                if isinstance(mask, PlanMask):
                    mask._state.shared = True
