"""Whether the layers of a forward wait for the host: by what they take the device, and a host here.

A rule about packing is of the machine that was calibrated. What the device takes for a padded batch
is the same wherever that device is; what the host takes for the launches of the packed layers is
not: two machines with the same GPU differ twofold, and so do two models of one size.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated

from pydantic import Field

from .machine import Record
from .stack_rule import MAX_WIDTH

#: Packed forwards that are remembered, and how many are needed to go by them: the first ones load
#: and build.
_REMEMBERED, _FEWEST = 8, 3
#: Of so many batches that stay padded for the host's sake one is packed, to see whether it must.
_AGAIN = 32
#: In units of weights x tokens: what a token's products with keys and values count, per key.
_PER_KEY = 2.0
#: Weights in multiples of hidden x (hidden + width), see ``StackWhen.width``.
_WIDTH_WEIGHTS = 12.0

Rate = Annotated[float, Field(gt=0.0, le=1e9)]


class LayerTimes(Record):
    """Device time of padded layers in 16 bits: microseconds per 1e9 multiplications of a forward.

    Decoders take longer than encoders for the same products: their norms and rotary embeddings
    are chains of small kernels. None where too little was measured.
    """

    encoder: Rate | None = None
    decoder: Rate | None = None
    #: See :class:`~smartattn.stack_rule.StackWhen`.
    width: Annotated[float, Field(ge=0.0, le=MAX_WIDTH)] = 0.0

    def forward_us(
        self, causal: bool, batch: int, length: int, hidden: int, weights: float
    ) -> float | None:
        """What the device takes for a forward of the layers, padding included; None if unknown.

        Args:
            hidden: size of the hidden states, once per layer.
            weights: how many numbers a token is multiplied by in one layer.
        """
        rate = self.decoder if causal else self.encoder
        if rate is None:
            return None
        return rate * 1e-9 * multiplications(causal, batch, length, hidden, weights, self.width)


def multiplications(
    causal: bool, batch: int, length: int, hidden: int, weights: float, width: float
) -> float:
    """Those of a layer, with what its reads and writes are worth."""
    attention = _PER_KEY * length * hidden * (0.5 if causal else 1.0)
    return batch * length * (weights + _WIDTH_WEIGHTS * width * hidden + attention)


class HostTimes:
    """What the host took for the packed layers of one model, in the last forwards here.

    The time from the choice to the end of the last layer is that of the launches wherever the
    device is ahead of them, and where it is not, that of the device for the packed batch: either
    way what the padded batch has to exceed for packing to pay.
    """

    def __init__(self) -> None:
        # A forward that autograd records costs the host more.
        self._us = {grad: deque[float](maxlen=_REMEMBERED) for grad in (False, True)}
        self._passed = 0

    def add(self, us: float, grad: bool) -> None:
        """Takes down one packed forward."""
        self._us[grad].append(us)

    def least(self, grad: bool) -> float | None:
        """The shortest of the last: other work on a machine only ever adds; None for too few."""
        known = tuple(self._us[grad])
        return min(known) if len(known) >= _FEWEST else None

    def again(self) -> bool:
        """Whether it is time to pack a batch that would stay padded."""
        self._passed += 1
        return self._passed % _AGAIN == 0
