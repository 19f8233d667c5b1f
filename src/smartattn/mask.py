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
#: Operations under which the mask of a batch stays the mask of that batch.
_KEEPS_PLAN = frozenset(
    {
        _aten.detach.default,
        _aten.alias.default,
        _aten.lift_fresh.default,
        _aten.clone.default,
        _aten.contiguous.default,
    }
)


class PlanMask(torch.Tensor):
    """A (batch, 1, q_len, kv_len) additive mask that is not built before somebody needs it.

    Args:
        plan: the facts about this batch.
        dtype: floating-point dtype of the mask it stands for.
    """

    # ``__dict__`` entries of the instances.
    _plan: Plan | None
    _dense: torch.Tensor | None

    def __new__(cls, plan: Plan, dtype: torch.dtype) -> PlanMask:
        """A tensor without storage; see the class."""
        shape = (plan.batch, 1, plan.q_len, plan.kv_len)
        mask: PlanMask = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=plan.device
        )
        mask._plan = plan
        mask._dense = None
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def plan(self) -> Plan | None:
        """The plan, or None once somebody has written into the mask."""
        if self._dense is not None and self._dense._version:
            return None
        return self._plan

    def dense(self) -> torch.Tensor:
        """The additive mask itself: 0 where a query sees a key, the dtype's minimum elsewhere.

        Every call returns the same memory, so that what one operation writes the next one reads.
        """
        if self._dense is None:
            assert self._plan is not None
            mask = self._plan.additive_mask(self.dtype)
            if mask is None:
                dense = torch.zeros(self.shape, dtype=self.dtype, device=self._plan.device)
            else:
                # A copy of its own, not an expanded view: models write into their mask.
                dense = mask.to(self.dtype).expand(self.shape).clone()
            self._dense = dense
        return self._dense

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        described = {} if self._plan is None else self._plan.describe()
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
        return self.dense().numpy(force=force)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PlanMask) and (plan := first.plan) is not None:
            if func in _KEEPS_PLAN:
                return PlanMask(plan, first.dtype)
            if func is _aten._to_copy.default and _only_moves(kwargs):
                return PlanMask(plan.on(torch.device(kwargs["device"])), first.dtype)
        dense = PlanMask.dense
        if func is _aten.cat.default and any(part.dtype == torch.bool for part in args[0]):
            # Beside a boolean mask it is one too.
            dense = PlanMask._boolean
        args, kwargs = tree_map_only(PlanMask, dense, (args, kwargs))
        return func(*args, **kwargs)

    def _boolean(self) -> torch.Tensor:
        return self.dense() == 0

    # While a graph is traced the mask is the dense one: its plan cannot be read there.

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        self.dense()
        return ["_dense"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any
    ) -> PlanMask:
        dense = inner["_dense"]
        mask: PlanMask = torch.Tensor._make_wrapper_subclass(
            PlanMask, dense.shape, dtype=dense.dtype, device=dense.device
        )
        mask._plan = None
        mask._dense = dense
        return mask


def _only_moves(kwargs: dict[str, Any]) -> bool:
    given = {name for name, value in kwargs.items() if value is not None}
    return "device" in given and given <= {"device", "non_blocking"}
