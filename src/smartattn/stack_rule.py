"""When it pays to take the padding out of a stack of layers: rules in profiles, not in code."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from .machine import Record


class StackWhen(Record):
    """Conditions of a rule, all of which must hold; None says nothing.

    ``min_padding_share`` is the share of the (batch x length) tokens that is padding, 0 to 1.
    ``min_spared_work`` is the number of padding tokens times the square of the hidden size: the
    operations that a layer spends on them are about 24 times as many. Bounds are inclusive.
    """

    device: Literal["cuda", "cpu"] | None = None
    min_padding_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    min_spared_work: Annotated[float, Field(ge=0.0, le=1e20)] | None = None

    def holds(self, device: str, padding_share: float, spared_work: float) -> bool:
        """Whether the conditions hold for a batch."""
        return (
            (self.device is None or device == self.device)
            and (self.min_padding_share is None or padding_share >= self.min_padding_share)
            and (self.min_spared_work is None or spared_work >= self.min_spared_work)
        )


class StackRule(Record):
    """Whether to pack the batches that the conditions describe."""

    when: StackWhen = StackWhen()
    pack: bool
    #: One sentence with its source.
    because: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=2000)]


def stack_rule(
    rules: tuple[StackRule, ...], device: str, padding_share: float, spared_work: float
) -> StackRule | None:
    """The first rule that holds for a batch on a kind of device."""
    for rule in rules:
        if rule.when.holds(device, padding_share, spared_work):
            return rule
    return None
