"""What the rest of a layer takes beside its attention call: whether host or device is waited for.

A launch costs the host time and a kernel costs the device time, and both work at once. In a model
whose layers keep the device busier than the host the launches of an attention call are free; in one
that is all launches, such as a decoding step, its kernels are.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated, Any

import torch
from pydantic import Field

from .call import Call
from .machine import Record
from .plan import Plan

#: A layer's weights in multiples of the squared width: four projections of attention and the MLP.
_WEIGHTS = 12
#: Times as much work as a forward that a training step is, on the device and on the host, whose
#: backward is not Python.
TRAINING_DEVICE, TRAINING_HOST = 3.0, 2.0
#: An encoder's layer has no rotary embeddings, and a LayerNorm is one launch: BERT's takes 0.33 ms
#: of a host for which a Llama's takes 0.89 ms.
_ENCODER_HOST = 0.4
#: Layers of the two models whose difference is the host time of a layer.
_FEW, _MANY = 4, 16
#: Rows and columns of the weights that are multiplied by.
_WIDTH = 8192
_ROUNDS = 15

Positive = Annotated[float, Field(gt=0.0, le=1e15)]


class Surroundings(Record):
    """The rest of a layer on one device, as far as a call tells of it.

    ``host_us`` is what the other launches of a decoder's layer take, in microseconds of a forward;
    an encoder's has fewer. A layer's weights are taken to be 12 times its squared width
    (heads x head_dim), and its device time that of multiplying by them: ``flops_per_us`` and
    ``bytes_per_us`` are what the device reached with many tokens and with one.
    """

    host_us: Positive
    flops_per_us: Positive
    bytes_per_us: Positive

    def or_faster(self, other: Surroundings | None) -> Surroundings:
        """The better figures of two measurements: other work on a machine only ever slows it."""
        if other is None:
            return self
        return Surroundings(
            host_us=min(self.host_us, other.host_us),
            flops_per_us=max(self.flops_per_us, other.flops_per_us),
            bytes_per_us=max(self.bytes_per_us, other.bytes_per_us),
        )

    def slack_us(self, plan: Plan, call: Call) -> float:
        """Device time less host time of the rest of the layer that makes a call."""
        host_us, device_us = self.rest_us(plan, call)
        return device_us - host_us

    def rest_us(self, plan: Plan, call: Call) -> tuple[float, float]:
        """How long the rest of the layer that makes a call keeps host and device busy."""
        encoder = not plan.is_causal and call.q_len > 1
        host_us = self.host_us * (_ENCODER_HOST if encoder else 1.0)
        weights = float(_WEIGHTS * (call.heads * call.head_dim) ** 2)
        flops = 2.0 * weights * call.batch * call.q_len
        read = weights * call.dtype.itemsize
        device_us = max(flops / self.flops_per_us, read / self.bytes_per_us)
        if call.grad:
            return TRAINING_HOST * host_us, TRAINING_DEVICE * device_us
        return host_us, device_us


def waited_us(host_us: float, device_us: float, slack_us: float) -> float:
    """What a call adds to the time of a layer whose device time exceeds its host time by a slack.

    A negative slack is time that the device waits for the host; 0 is a call on its own.
    """
    return max(host_us - max(0.0, slack_us), device_us - max(0.0, -slack_us))


def measure_surroundings(device: torch.device) -> Surroundings | None:
    """Measures a device in about a second; None where host and device are the same."""
    if device.type != "cuda":
        return None
    with (
        torch.no_grad(),
        torch.cuda.device(device),
        torch.random.fork_rng(devices=[device]),
    ):
        layers = _MANY - _FEW
        host_us = (_model_us(_MANY, device) - _model_us(_FEW, device)) / layers - _sdpa_us(device)
        many = _product_us(4096, device)
        one = _product_us(1, device)
    return Surroundings(
        host_us=max(1.0, host_us),
        flops_per_us=2.0 * 4096 * _WIDTH**2 / many,
        bytes_per_us=2.0 * _WIDTH**2 / one,
    )


def _model_us(layers: int, device: torch.device) -> float:
    """A forward that is all launches: of the kind of layer that most language models have."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
    )
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model: torch.nn.Module = LlamaModel(config)
        model = model.bfloat16().eval()
        ids = torch.zeros(1, 16, dtype=torch.long)
    return _host_us(lambda: model(input_ids=ids, use_cache=False), device)


def _sdpa_us(device: torch.device) -> float:
    states = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16, device=device)
    attention = torch.nn.functional.scaled_dot_product_attention
    return _host_us(lambda: attention(states, states, states, is_causal=True), device)


def _product_us(tokens: int, device: torch.device) -> float:
    """Device time of multiplying tokens by a square of weights, in microseconds."""
    states = torch.randn(tokens, _WIDTH, dtype=torch.bfloat16, device=device)
    weights = torch.randn(_WIDTH, _WIDTH, dtype=torch.bfloat16, device=device)
    times: list[float] = []
    for _ in range(_ROUNDS):
        before, after = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        # The host is ahead while the first product runs.
        torch.mm(states, weights)
        before.record()
        for _ in range(4):
            torch.mm(states, weights)
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / 4)
    return median(times)


def _host_us(function: Any, device: torch.device) -> float:
    """Microseconds until a call returns, the device having nothing else to do."""
    times = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize(device)
    # As in ``timing``: other work on the cores only ever adds.
    return min(times)
