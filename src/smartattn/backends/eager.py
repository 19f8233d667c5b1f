"""The eager attention function of the layer's own model: for arguments that no kernel knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..call import Call, Runner
from ..machine import Versions
from ..plan import Plan
from .base import Backend, Support


class EagerBackend(Backend):
    """Whatever the model's own code computes: attention sinks, softcap, sparse indices, ...

    The function comes with the call, in ``arguments["eager"]``.
    """

    name = "eager"
    walks = "padded"
    support = Support(mixed_head_dims=True)
    last_resort = True
    indispensable = True

    def refusals(self, plan: Plan, call: Call) -> list[str]:
        if not call.has_eager:
            return ["the model's own module has no eager_attention_forward"]
        return []

    def refusals_elsewhere(
        self,
        plan: Plan,
        call: Call,
        capability: tuple[int, int] | None,
        packages: Versions | None = None,
    ) -> list[str]:
        return self.refusals(plan, call)

    def uses_dense_mask(self, plan: Plan, call: Call) -> bool:
        return True

    def bind(self, plan: Plan, call: Call) -> Runner:
        mask = plan.additive_mask(call.dtype)

        def run(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            arguments: Mapping[str, Any],
        ) -> torch.Tensor:
            given = {k: v for k, v in arguments.items() if k not in ("module", "eager")}
            output, _ = arguments["eager"](
                arguments["module"],
                query,
                key,
                value,
                mask,
                dropout=call.dropout,
                scaling=call.scaling,
                **given,
            )
            assert isinstance(output, torch.Tensor)
            return output

        return run
