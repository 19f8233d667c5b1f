"""Every sequence's real tokens through SDPA on their own; sequences of equal length together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..call import Call, Runner
from ..dense import local_mask
from ..layouts import upload
from ..packing import packs_queries, varlen_refusals
from ..plan import Padding, Plan
from .base import Backend, Support
from .sdpa import attend


class SdpaUnpaddedBackend(Backend):
    """For devices without a variable-length kernel, where padding costs more than more calls.

    A GPU runs one short call after the other in a fraction of its speed, and what that costs does
    not follow from the work: on an H200 in float32, from a fifth of the time of SDPA with a mask to
    seven times as long. It is considered there for rows that are all padded alike.
    """

    name = "sdpa_unpadded"
    walks = "groups"
    support = Support(mixed_head_dims=True, features=frozenset({"dropout"}))

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        reasons = varlen_refusals(plan, call)
        if plan.padding is Padding.HOLES:
            reasons.append("real tokens must be contiguous, and the mask has holes")
        if not plan.is_padded and not plan.is_packed:
            reasons.append("no padding to remove")
        return reasons

    def set_aside(self, plan: Plan, call: Call) -> str | None:
        if call.device.type != "cpu" and plan.is_padded and not plan.is_uniform:
            return "rows of several lengths would run one after the other"
        return super().set_aside(plan, call)

    def bind(self, plan: Plan, call: Call) -> Runner:
        groups = [
            (rows, queries, keys, *self._local(plan, queries, keys))
            for rows, queries, keys in _groups(plan, packs_queries(plan, call))
        ]

        def run(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            arguments: Mapping[str, Any],
        ) -> torch.Tensor:
            output = query.new_zeros(call.batch, call.q_len, call.heads, call.value_head_dim)
            for rows, queries, keys, mask, causal in groups:
                attended = attend(
                    query[rows, :, queries],
                    key[rows, :, keys],
                    value[rows, :, keys],
                    mask,
                    causal,
                    call,
                )
                output[rows, queries] = attended.transpose(1, 2)
            return output

        return run

    @staticmethod
    def _local(plan: Plan, queries: slice, keys: slice) -> tuple[torch.Tensor | None, bool]:
        """(mask, is_causal) of one sequence; the mask only where is_causal cannot say it.

        The mask is (1, 1, queries, keys).
        """
        q_len, kv_len = queries.stop - queries.start, keys.stop - keys.start
        causal = plan.is_causal and q_len > 1
        if plan.window is None and not (causal and q_len != kv_len):
            return None, causal
        shift = kv_len - q_len if plan.is_causal else 0
        mask = local_mask(q_len, kv_len, shift, plan.is_causal, plan.window, plan.device)
        return mask[None, None], False


def _groups(plan: Plan, pack_queries: bool) -> list[tuple[Any, slice, slice]]:
    """(rows, query slice, key slice) of sequences that lie alike; rows is a slice or a tensor."""
    sequences = plan.sequences
    assert sequences is not None
    q_start, q_length = sequences.q_start, sequences.q_length
    if not pack_queries:
        q_start, q_length = np.zeros_like(q_start), np.full_like(q_length, plan.q_len)
    alike: dict[tuple[int, ...], list[int]] = {}
    columns = zip(
        sequences.row, q_start, q_length, sequences.k_start, sequences.k_length, strict=True
    )
    for row, *span in columns:
        key = tuple(int(value) for value in span)
        if key[1] and key[3]:
            alike.setdefault(key, []).append(int(row))
    groups = []
    for (q0, nq, k0, nk), rows in alike.items():
        consecutive = rows[-1] - rows[0] + 1 == len(rows)
        if consecutive:
            chosen: Any = slice(rows[0], rows[-1] + 1)
        else:
            chosen = upload(np.array(rows), plan.device).long()
        groups.append((chosen, slice(q0, q0 + nq), slice(k0, k0 + nk)))
    return groups
