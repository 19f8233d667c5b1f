"""What the rest of a layer takes, and what that makes of a call's host and device time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smartattn.call import Call
from smartattn.cost import Cost, Predictor
from smartattn.plan import Pattern, Plan
from smartattn.surroundings import Surroundings, measure_surroundings, waited_us

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
#: 300 us of launches per layer, 500 TFLOP/s, 4 TB/s.
LAYER = Surroundings(host_us=300.0, flops_per_us=5e8, bytes_per_us=4e6)


def _call(batch: int, q_len: int, **changes: object) -> Call:
    call = Call(CUDA, torch.bfloat16, batch, q_len, 2048, 32, 8, 64, 64)
    return replace(call, **changes)


def _slack(call: Call, causal: bool = True) -> float:
    pattern = Pattern.CAUSAL if causal else Pattern.BIDIRECTIONAL
    plan = Plan(call.batch, call.q_len, call.kv_len, pattern, CUDA, shift=call.kv_len - call.q_len)
    return LAYER.slack_us(plan, call)


def test_one_token_reads_the_weights_and_waits_for_the_host() -> None:
    read_us = 12 * 2048**2 * 2 / 4e6
    assert _slack(_call(1, 1)) == pytest.approx(read_us - 300.0)
    assert _slack(_call(1, 1)) < 0


def test_many_tokens_multiply_and_wait_for_the_device() -> None:
    multiply_us = 2 * 12 * 2048**2 * 8 * 4096 / 5e8
    assert _slack(_call(8, 4096)) == pytest.approx(multiply_us - 300.0)
    assert _slack(_call(8, 4096)) > 0


def test_the_layer_of_an_encoder_launches_less() -> None:
    causal, encoder = (_slack(_call(8, 512), causal) for causal in (True, False))
    assert encoder - causal == pytest.approx(0.6 * 300.0)
    # One query that sees everything is cross-attention in a decoder.
    assert _slack(_call(8, 1), causal=False) == _slack(_call(8, 1))


def test_a_backward_costs_the_device_more_than_the_host() -> None:
    forward, train = _slack(_call(8, 512)), _slack(_call(8, 512, grad=True))
    assert train + 2 * 300.0 == pytest.approx(3 * (forward + 300.0))


@pytest.mark.parametrize(
    ("host", "device", "slack", "added"),
    [
        (50.0, 20.0, 0.0, 50.0),
        (20.0, 50.0, 0.0, 50.0),
        # The device is busy anyway: launches are free, until they outlast what it is busy with.
        (50.0, 20.0, 1000.0, 20.0),
        (50.0, 20.0, 10.0, 40.0),
        # The host is busy anyway: kernels are free.
        (20.0, 50.0, -1000.0, 20.0),
        (20.0, 50.0, -10.0, 40.0),
    ],
)
def test_what_a_call_adds_to_its_layer(
    host: float, device: float, slack: float, added: float
) -> None:
    assert waited_us(host, device, slack) == added
    # From its meaning: the longer one of both, with the call and without it.
    for rest in (2000.0, 5000.0):
        layer_host, layer_device = rest, rest + slack
        longer = max(layer_host + host, layer_device + device) - max(layer_host, layer_device)
        assert longer == pytest.approx(added)


def _cost(backend: str, mode: str, host: float, device: float) -> Cost:
    return Cost(
        backend=backend,
        mode=mode,
        layout="plain",
        causal=mode != "decode",
        dtype="bfloat16",
        head_dim=64,
        host_us={"call": host},
        device_us={"call": device},
        longest_kv_len=4096,
        samples=10,
        median_error=0.0,
    )


def test_launches_decide_where_the_host_is_slower_and_kernels_where_the_device_is() -> None:
    costs = [
        _cost(name, mode, host, device)
        for mode in ("forward", "decode")
        for name, host, device in (("sdpa", 10.0, 40.0), ("flash_attention_3", 60.0, 20.0))
    ]
    alone, layered = Predictor(costs), Predictor(costs, LAYER)
    decode = Plan(1, 1, 2048, Pattern.CAUSAL, CUDA, shift=2047)
    prefill = Plan(16, 2048, 2048, Pattern.CAUSAL, CUDA)
    for predictor, plan, call, faster, bottleneck in (
        (alone, decode, _call(1, 1), "sdpa", None),
        (alone, prefill, _call(16, 2048), "sdpa", None),
        (layered, decode, _call(1, 1), "sdpa", "host"),
        (layered, prefill, _call(16, 2048), "flash_attention_3", "device"),
    ):
        found = {
            name: predictor.estimate(name, plan, call) for name in ("sdpa", "flash_attention_3")
        }
        assert min(found, key=lambda name: found[name].us) == faster
        assert {estimate.bottleneck for estimate in found.values()} == {bottleneck}


def test_a_cpu_waits_for_nobody() -> None:
    assert measure_surroundings(CPU) is None


@pytest.mark.gpu
def test_measured_on_a_gpu() -> None:
    found = measure_surroundings(CUDA)
    assert found is not None
    # A layer is some twenty launches of a few microseconds; no GPU reaches 10 PFLOP/s or 100 TB/s.
    assert 20.0 < found.host_us < 5000.0
    assert 1e7 < found.flops_per_us < 1e10
    assert 1e5 < found.bytes_per_us < 1e8


def test_the_better_of_two_measurements_counts() -> None:
    first = Surroundings(host_us=1026.0, flops_per_us=8.0e8, bytes_per_us=3.8e6)
    second = Surroundings(host_us=503.0, flops_per_us=7.9e8, bytes_per_us=3.9e6)
    expected = Surroundings(host_us=503.0, flops_per_us=8.0e8, bytes_per_us=3.9e6)
    assert first.or_faster(second) == second.or_faster(first) == expected
    assert first.or_faster(None) is first
