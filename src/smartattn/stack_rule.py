"""When it pays to take the padding out of a stack of layers: rules in profiles, not in code."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from .machine import Record


class StackWhen(Record):
    """Conditions of a rule, all of which must hold; None says nothing.

    ``min_tokens`` counts the tokens of the padded batch (batch x length), ``min_padding_share`` is
    the share of them that is padding, 0 to 1; bounds are inclusive.
    """

    device: Literal["cuda", "cpu"] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=10**12)] | None = None
    min_padding_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None

    def holds(self, device: str, tokens: int, padding_share: float) -> bool:
        """Whether the conditions hold for a batch."""
        return (
            (self.device is None or device == self.device)
            and (self.min_tokens is None or tokens >= self.min_tokens)
            and (self.min_padding_share is None or padding_share >= self.min_padding_share)
        )


class StackRule(Record):
    """Whether to pack the batches that the conditions describe."""

    when: StackWhen = StackWhen()
    pack: bool
    #: One sentence with its source.
    because: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=2000)]


def stack_rule(
    rules: tuple[StackRule, ...], device: str, tokens: int, padding_share: float
) -> StackRule | None:
    """The first rule that holds for a batch of (padded) tokens on a kind of device."""
    for rule in rules:
        if rule.when.holds(device, tokens, padding_share):
            return rule
    return None
