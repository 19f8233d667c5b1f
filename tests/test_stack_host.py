"""Whether the layers of a forward wait for the host: what is fitted, measured and made of it."""

from __future__ import annotations

import copy
import itertools
import pickle
import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, PreTrainedModel

import smartattn
from smartattn import padding_free, stack_choice, stacks
from smartattn.profile import Profile
from smartattn.samples import StackSample
from smartattn.stack_choice import WAITS_FOR_HOST
from smartattn.stack_fit import fit_layer_times, weights
from smartattn.stack_host import HostTimes, LayerTimes, Watch, multiplications
from smartattn.stack_measure import LAYERS, Kind, Stack, batch_of, build
from smartattn.stack_rule import StackRule, StackWhen
from smartattn.stacks import find_stack

from .agreement import MASKS, WIDTH, assert_agree
from .test_stack_fit import HEADER
from .tiny_models import tiny_model, token_ids

CPU = torch.device("cpu")
GPU = HEADER.model_copy(
    update={"device": HEADER.device.model_copy(update={"kind": "cuda", "threads": None})}
)
IDS = token_ids(3, WIDTH)
LEFT, RIGHT = MASKS["left"], MASKS["right"]


# -- what the device takes -------------------------------------------------------------------------


def timed(kind: Kind, hidden: int, power: int, rate: float, width: float) -> StackSample:
    """A forward that waits for a device of a known rate, or for the host, which takes 500 us."""
    workload = batch_of(Stack(kind, hidden, "forward"), 0.5, power, "bfloat16")
    assert workload is not None
    made = StackSample(workload, 4, 1.0, 1.0, 1.0, 0.01, 5)
    causal = kind == "decoder"
    count = multiplications(causal, workload.batch, workload.kv_len, hidden, weights(made), width)
    us = max(500.0, 4 * rate * 1e-9 * count)
    return StackSample(workload, 4, us, us, 1.0, 0.01, 5)


def test_the_rates_of_a_device_are_recovered() -> None:
    """Of encoders and decoders, whatever part of the forwards waits for the host."""
    encoders = [timed("encoder", h, p, 2.0, 0.0) for h in (512, 1024) for p in range(26, 37)]
    decoders = [timed("decoder", 2048, p, 3.5, 0.0) for p in range(28, 37)]
    fitted = fit_layer_times([*encoders, *decoders], GPU)
    assert fitted is not None
    for causal, rate in ((False, 2.0), (True, 3.5)):
        for hidden, batch, length in ((768, 64, 512), (1024, 64, 128), (2048, 8, 1024)):
            size = (causal, batch, length, hidden, 12.0 * hidden**2)
            expected = rate * 1e-9 * multiplications(*size, 0.0)
            assert fitted.forward_us(*size) == pytest.approx(expected, rel=0.1)
    only = fit_layer_times(encoders, GPU)
    assert only is not None
    assert only.decoder is None
    assert only.forward_us(True, 8, 128, 1024, 12e6) is None
    assert fit_layer_times([], GPU) is None
    # Host and device are the same there.
    assert fit_layer_times(encoders, HEADER) is None


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_weights_of_the_timed_stacks_are_those_that_they_have(kind: Kind) -> None:
    stack = find_stack(build(kind, 256, CPU, torch.float32))
    workload = batch_of(Stack(kind, 256, "forward"), 0.5, 24, "float32")
    assert workload is not None
    assert stack.weights == LAYERS * weights(StackSample(workload, 4, 1.0, 1.0, 1.0, 0.0, 1))


def test_layers_that_run_several_times_count_as_often() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    six, two = (
        find_stack(AlbertModel(AlbertConfig(**sizes, num_hidden_layers=runs))) for runs in (6, 2)
    )
    assert len(six.layers) == len(two.layers)
    assert six.weights == 3 * two.weights


# -- what the host takes ---------------------------------------------------------------------------


def test_the_shortest_of_the_last_forwards_counts() -> None:
    host = HostTimes()
    for us in (9.0, 5.0):
        host.add("a", us)
        assert host.least("a") is None
    host.add("a", 7.0)
    assert host.least("a") == 5.0
    assert host.least("b") is None
    for _ in range(8):
        host.add("a", 6.0)
    assert host.least("a") == 6.0
    assert [host.again() for _ in range(96)].count(True) == 3
    for other in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert other.least("a") is None


def host_of(us: float) -> HostTimes:
    host = HostTimes()
    for _ in range(3):
        host.add("a", us)
    return host


@pytest.mark.parametrize(
    ("padded_us", "training", "waits"),
    [
        (102.0, False, True),
        (104.0, False, False),
        # Three times the device's time against twice the host's.
        (68.0, True, True),
        (69.0, True, False),
    ],
)
def test_where_a_forward_waits_for_the_host(padded_us: float, training: bool, waits: bool) -> None:
    assert Watch(host_of(100.0), "a", padded_us, 50.0, training).waits_for_host is waits
    assert not Watch(host_of(100.0), "b", padded_us, 50.0, training).waits_for_host


def test_times_that_may_be_the_devices_are_not_taken_down() -> None:
    host = HostTimes()
    for _ in range(3):
        Watch(host, "a", 200.0, 71.0, False).took(100.0)
    assert host.least("a") is None
    for _ in range(3):
        Watch(host, "a", 200.0, 69.0, False).took(100.0)
    assert host.least("a") == 100.0
    Watch(host, "a", 200.0, 90.0, False).took(110.0)
    assert host.least("a") == 100.0
    # The host takes no longer than that.
    Watch(host, "a", 200.0, 90.0, False).took(95.0)
    assert host.least("a") == 95.0


# -- what is made of it ----------------------------------------------------------------------------


def in_force(monkeypatch: pytest.MonkeyPatch, times: LayerTimes | float) -> None:
    """A profile under which everything pays, of a device of those times, or of one rate."""
    if isinstance(times, float):
        times = LayerTimes(encoder=times, decoder=times)
    profile = Profile(
        name="made up",
        padding_free=(StackRule(when=StackWhen(), pack=True, because="a test"),),
        layers=times,
    )
    monkeypatch.setattr(stack_choice, "profile_for", lambda device: profile)


def forwards(
    model: PreTrainedModel, count: int, mask: torch.Tensor = MASKS["left"]
) -> list[tuple[bool, str]]:
    found = []
    for _ in range(count):
        with smartattn.trace() as trace:
            model(input_ids=IDS, attention_mask=mask)
        (row,) = trace.stacks
        found.append((row.packed, row.reason))
    return found


@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_that_waits_for_the_host_here_stays_padded(
    monkeypatch: pytest.MonkeyPatch, grad: bool
) -> None:
    """After three, which show it; and now and then one shows whether it still does."""
    in_force(monkeypatch, 1e-6)
    model = tiny_model("llama", "smart", torch.bfloat16)
    with torch.set_grad_enabled(grad), padding_free(model):
        found = forwards(model, 3 + 64)
    assert all(packed for packed, _ in found[:3])
    padded, again = found[3:34], found[34]
    assert set(padded) == {(False, WAITS_FOR_HOST)}
    assert again[0]
    assert "to see whether" in again[1]
    assert [packed for packed, _ in found[3:]].count(True) == 2


@torch.no_grad()
@pytest.mark.parametrize("case", ["slow device", "32 bits", "always", "no rate"])
def test_a_forward_that_waits_for_the_device_is_packed(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    in_force(monkeypatch, 1e8 if case == "slow device" else 1e-6)
    if case == "no rate":
        monkeypatch.setattr(LayerTimes, "forward_us", lambda *args: None)
    model = tiny_model("llama", "smart", torch.float32 if case == "32 bits" else torch.bfloat16)
    with padding_free(model, always=case == "always"):
        assert all(packed for packed, _ in forwards(model, 6))


@torch.no_grad()
def test_a_host_that_was_busy_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device takes 100 s, more than the host does; but for a while that took 1000."""
    in_force(monkeypatch, 1.0)
    monkeypatch.setattr(LayerTimes, "forward_us", lambda *args: 100e6)
    model = tiny_model("llama", "smart", torch.bfloat16)
    clock = time.perf_counter
    ticks = itertools.count()
    with padding_free(model):
        with monkeypatch.context() as busy:
            busy.setattr(time, "perf_counter", lambda: clock() + 1000.0 * next(ticks))
            assert [packed for packed, _ in forwards(model, 4)] == [True, True, True, False]
        packed = [packed for packed, _ in forwards(model, 40)]
    assert not any(packed[:30])
    assert all(packed[31:])


@torch.no_grad()
def test_a_block_around_each_forward_learns_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    in_force(monkeypatch, 1e-6)
    model = tiny_model("llama", "smart", torch.bfloat16)
    found = []
    for _ in range(5):
        with padding_free(model):
            found += forwards(model, 1)
    assert [packed for packed, _ in found] == [True, True, True, False, False]


@torch.no_grad()
def test_autocast_decides_by_what_the_layers_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    in_force(monkeypatch, 1e-6)
    model = tiny_model("llama", "smart")
    with padding_free(model), torch.autocast("cpu", torch.bfloat16):
        assert forwards(model, 4)[-1] == (False, WAITS_FOR_HOST)


@torch.no_grad()
def test_copies_learn_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    in_force(monkeypatch, 1e-6)
    model = tiny_model("llama", "smart", torch.bfloat16)
    with padding_free(model):
        assert not forwards(model, 4)[-1][0]
        other: Any = copy.deepcopy(model)
        assert [packed for packed, _ in forwards(other, 4)] == [True, True, True, False]
        assert not forwards(model, 1)[-1][0]
    smartattn.padded(other)
    expected = model(input_ids=IDS, attention_mask=LEFT).logits
    found = other(input_ids=IDS, attention_mask=LEFT).logits
    assert_agree(found.float(), expected.float(), where=LEFT)


@pytest.mark.parametrize("name", ["bert", "llama"])
@torch.no_grad()
def test_what_a_forward_is_watched_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The device's times are those of all layers, of its own kind, with and without padding."""
    causal = name == "llama"
    # A BERT's first position is pooled.
    mask = LEFT if causal else RIGHT
    in_force(monkeypatch, LayerTimes(encoder=1e6, decoder=3e6, width=10.0))
    made: list[Watch] = []
    monkeypatch.setattr(Watch, "took", lambda watch, us: made.append(watch))
    model = tiny_model(name, "smart", torch.bfloat16)
    with padding_free(model):
        forwards(model, 1, mask)
    (watch,) = made
    config, stack = model.config, find_stack(model)
    hidden = config.hidden_size * config.num_hidden_layers
    rate = 3e-3 if causal else 1e-3
    for us, length in (
        (watch.padded_us, WIDTH),
        (watch.packed_us, float(mask.sum()) / len(mask)),
    ):
        work = stack.weights + 12 * 10.0 * hidden + (1 if causal else 2) * length * hidden
        assert us == pytest.approx(rate * len(mask) * length * work)
    assert watch.key == (CPU, torch.bfloat16, False)
    assert not watch.training


@pytest.mark.parametrize("case", ["deterministic", "ranks", "quantised", "no weights"])
@torch.no_grad()
def test_where_the_clock_must_not_decide(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    in_force(monkeypatch, 1e-6)
    model = tiny_model("llama", "smart", torch.bfloat16)
    if case == "ranks":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    elif case == "quantised":
        model.config.quantization_config = {"quant_method": "a test"}
    elif case == "no weights":
        monkeypatch.setattr(stacks, "_weights", lambda module: 0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(case == "deterministic")
    try:
        with padding_free(model):
            assert all(packed for packed, _ in forwards(model, 5))
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_learn_as_others(
    monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    in_force(monkeypatch, 1e-6)
    model = tiny_model("llama", "smart", torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with padding_free(model):
        assert [packed for packed, _ in forwards(model, 4)] == [True, True, True, False]


@torch.no_grad()
def test_times_in_one_dtype_say_nothing_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    in_force(monkeypatch, 1e-6)
    model = tiny_model("llama", "smart", torch.bfloat16)
    with padding_free(model):
        assert not forwards(model, 4)[-1][0]
        model.half()
        assert [packed for packed, _ in forwards(model, 4)] == [True, True, True, False]


def test_layers_with_sizes_count_by_them() -> None:
    """Quantised ones have buffers, or several numbers in one; adapters have the layer inside."""
    quantised = nn.Module()
    quantised.in_features, quantised.out_features = 8, 4
    quantised.register_buffer("packed", torch.zeros(4, 2))
    assert stacks._weights(quantised) == 32
    adapter = nn.Module()
    adapter.in_features, adapter.out_features = 8, 4
    adapter.base_layer = nn.Linear(8, 4)
    assert sum(map(stacks._weights, adapter.modules())) == 32
    assert stacks._weights(nn.LayerNorm(8)) == 0
