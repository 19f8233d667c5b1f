"""Whether the layers of a forward wait for the host: by what they take the device, and a host here.

A rule about packing is of the machine that was calibrated. What the device takes for a padded batch
is the same wherever that device is; what the host takes for the launches of the packed layers is
not: two machines with the same GPU differ twofold, and so do two models of one size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from .machine import Record
from .stack_rule import MARGIN, MAX_WIDTH
from .surroundings import TRAINING_DEVICE, TRAINING_HOST

if TYPE_CHECKING:
    from .stacks import Stack

#: Packed forwards that are remembered, and how many are needed to go by them: the first ones load
#: and build.
_REMEMBERED, _FEWEST = 8, 3
#: Of so many batches that stay padded for the host's sake one is packed, to see whether it must.
_AGAIN = 32
#: A host that took less than the device's time over this may have waited for the device.
_DEVICE_BOUND = 0.7
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
        self, causal: bool, batch: int, length: float, hidden: int, weights: float
    ) -> float | None:
        """What the device takes for a forward of the layers, padding included; None if unknown.

        Args:
            hidden: size of the hidden states, times the number of layers.
            weights: how many numbers a token is multiplied by in all these layers.
        """
        rate = self.decoder if causal else self.encoder
        if rate is None:
            return None
        return rate * 1e-9 * multiplications(causal, batch, length, hidden, weights, self.width)


def multiplications(
    causal: bool, batch: int, length: float, hidden: int, weights: float, width: float
) -> float:
    """Those of layers, with what their reads and writes are worth."""
    attention = _PER_KEY * length * hidden * (0.5 if causal else 1.0)
    return batch * length * (weights + _WIDTH_WEIGHTS * width * hidden + attention)


class HostTimes:
    """What the host took for the packed layers of one model, in the last forwards here.

    Copies begin anew, whether they are made in this process or saved for another machine.
    """

    def __init__(self) -> None:
        self._us: dict[Hashable, deque[float]] = {}
        self._passed = 0
        self._weights: float | None = None

    def __reduce__(self) -> tuple[type[HostTimes], tuple[()]]:
        return HostTimes, ()

    def weights(self, stack: Stack) -> float:
        """Those of the model's stack, counted once."""
        if self._weights is None:
            self._weights = stack.weights
        return self._weights

    def add(self, key: Hashable, us: float) -> None:
        """Takes down one packed forward.

        Args:
            key: what the time depends on, beside the machine.
        """
        self._us.setdefault(key, deque(maxlen=_REMEMBERED)).append(us)

    def least(self, key: Hashable) -> float | None:
        """The shortest of the last: other work on a machine only ever adds; None for too few."""
        known = tuple(self._us.get(key, ()))
        return min(known) if len(known) >= _FEWEST else None

    def again(self) -> bool:
        """Whether it is time to pack a batch that would stay padded."""
        self._passed += 1
        return self._passed % _AGAIN == 0


@dataclass(frozen=True, slots=True)
class Watch:
    """One forward whose layers are timed on the host if they are packed.

    Args:
        key: see :meth:`HostTimes.add`.
        padded_us: what the device takes for a forward of the padded layers, in microseconds.
        packed_us: and for the packed ones.
        training: a backward follows.
    """

    host: HostTimes
    key: Hashable
    padded_us: float
    packed_us: float
    training: bool

    @property
    def waits_for_host(self) -> bool:
        """Whether the host takes longer for packed layers than the device for these, padded."""
        host_us, device_us = self.host.least(self.key), self.padded_us
        if host_us is None:
            return False
        if self.training:
            device_us, host_us = TRAINING_DEVICE * device_us, TRAINING_HOST * host_us
        return device_us < (1 + MARGIN) * host_us

    def took(self, us: float) -> None:
        """Takes down what the host took for these layers, packed.

        Where that may be the device's time, for which a host that is far ahead has to wait, it says
        no more than that the host takes no longer.
        """
        least = self.host.least(self.key)
        if self.packed_us < _DEVICE_BOUND * us or (least is not None and us < least):
            self.host.add(self.key, us)
