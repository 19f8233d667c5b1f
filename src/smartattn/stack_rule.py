"""When it pays to take the padding out of a stack of layers: rules in profiles, not in code."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from .machine import Record

#: Largest bound of a rule on work, see :class:`StackWhen`.
MAX_WORK = 1e20
MAX_WIDTH = 1e5
#: How much faster packing has to be before it counts as paying: what a rule promises must hold for
#: other models too, and of plain "smart" nothing may be lost.
MARGIN = 0.03
Work = Annotated[float, Field(ge=0.0, le=MAX_WORK)]


class StackWhen(Record):
    """Conditions of a rule, all of which must hold; None says nothing.

    ``min_padding_share`` is the share of the (batch x length) tokens that is padding, 0 to 1.
    ``min_work`` is the number of all tokens, padding included, times the square of the hidden size,
    ``min_spared_work`` that of the padding tokens: the operations that a layer spends on them are
    about 24 times as many. The work of the padded batch says whether its forward waits for the
    host, where packing gains nothing; the spared work is what has to outweigh the copies. Bounds
    are inclusive.

    ``width`` is the hidden size at which a token's reads and writes take a device as long as its
    matrix products: they grow with the hidden size, not with its square, so that narrow layers take
    longer than their products. Work is tokens x hidden size x (hidden size + width) then.
    """

    device: Literal["cuda", "cpu"] | None = None
    min_padding_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    min_work: Work | None = None
    min_spared_work: Work | None = None
    width: Annotated[float, Field(ge=0.0, le=MAX_WIDTH)] | None = None

    def holds(
        self, device: str, padding_share: float, spared_work: float, hidden: int | None = None
    ) -> bool:
        """Whether the conditions hold for a batch.

        Args:
            spared_work: padding tokens x hidden size squared.
        """
        if self.width is not None and hidden:
            spared_work *= 1 + self.width / hidden
        return (
            (self.device is None or device == self.device)
            and (self.min_padding_share is None or padding_share >= self.min_padding_share)
            and (self.min_work is None or spared_work >= self.min_work * padding_share)
            and (self.min_spared_work is None or spared_work >= self.min_spared_work)
        )

    def work(self, tokens: int, hidden: int) -> float:
        """The work of so many tokens as this counts it."""
        return float(tokens * hidden * (hidden + (self.width or 0.0)))

    @property
    def unit(self) -> str:
        """What work is counted in, as a phrase."""
        return "hidden^2" if not self.width else f"hidden x (hidden + {self.width:.0f})"

    def __str__(self) -> str:
        phrases = [] if self.device is None else [f"on {self.device}"]
        if self.min_padding_share is not None:
            phrases.append(f"from {self.min_padding_share:.0%} padding on")
        if self.min_work is not None:
            phrases.append(f"tokens x {self.unit} at least {self.min_work:.2g}")
        if self.min_spared_work is not None:
            phrases.append(f"padding tokens x {self.unit} at least {self.min_spared_work:.2g}")
        return ", ".join(phrases) or "otherwise"


class StackRule(Record):
    """Whether to pack the batches that the conditions describe."""

    when: StackWhen = StackWhen()
    pack: bool
    #: One sentence with its source.
    because: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=2000)]


def stack_rule(
    rules: tuple[StackRule, ...],
    device: str,
    padding_share: float,
    spared_work: float,
    hidden: int | None = None,
) -> StackRule | None:
    """The first rule that holds for a batch on a kind of device."""
    for rule in rules:
        if rule.when.holds(device, padding_share, spared_work, hidden):
            return rule
    return None
