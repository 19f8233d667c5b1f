"""Gradients under every backend, with checkpointing, dropout and deterministic algorithms."""

from __future__ import annotations

import contextlib
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import smartattn
from smartattn.backends.base import Support, declared_refusals
from smartattn.backends.sdpa import SdpaBackend
from smartattn.call import Call
from smartattn.integration import smart_attention
from smartattn.mask import PlanMask
from smartattn.plan import Pattern, Plan

from .agreement import MASKS, WIDTH, assert_agree, output_of, relative_error, set_implementation
from .tiny_models import tiny_model, token_ids

MODELS = ("llama", "mistral", "gemma3", "deepseek_v3", "bert", "modernbert", "bart", "t5")
#: Free choice, and every backend of this machine; sdpa_unpadded where it can run.
CHOICES = (None, "sdpa", ("sdpa_unpadded", "sdpa"))

Gradients = dict[str, Tensor]


def inputs_of(name: str, padding: str | None) -> dict[str, Any]:
    mask = None if padding is None else MASKS[padding]
    inputs: dict[str, Any] = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    # In float64 eager has no answer: its mask overflows in a softmax that is always float32.
    if name in ("bart", "t5"):
        inputs["decoder_input_ids"] = token_ids(3, 7, seed=1)
    return inputs


def loss_of(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """A loss over real tokens in which every component has a weight of its own."""
    output = output_of(model(**inputs))
    mask = inputs["attention_mask"]
    if mask is not None and "decoder_input_ids" not in inputs:
        output = output[mask.bool()]
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum() + output.square().mean()


def gradients_of(model: PreTrainedModel) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(
    model: PreTrainedModel, implementation: str, inputs: dict[str, Any], backends: Any = None
) -> Gradients:
    """The gradients of one forward and backward in training mode."""
    set_implementation(model, implementation)
    model.train()
    model.zero_grad()
    with contextlib.ExitStack() as stack:
        if backends is not None:
            stack.enter_context(smartattn.use(backends=backends))
        loss_of(model, inputs).backward()
    return gradients_of(model)


def assert_gradients_agree(actual: Gradients, expected: Gradients, tolerance: float = 1e-4) -> None:
    """Relative to the largest gradient of all: some are zero in exact arithmetic."""
    assert actual.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0
    for name, gradient in actual.items():
        assert torch.isfinite(gradient).all(), name
        error = float((gradient - expected[name]).abs().max()) / scale
        assert error <= tolerance, f"{name}: {error:.2g} > {tolerance:g}"


@pytest.mark.parametrize("padding", [None, "ones", "right", "left", "both", "holes", "empty_row"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_eagers(name: str, padding: str | None) -> None:
    if padding == "empty_row" and name in ("bart", "t5"):
        pytest.skip("queries of cross-attention that see no key have no defined answer")
    model = tiny_model(name)
    inputs = inputs_of(name, padding)
    expected = train(model, "eager", inputs)
    for backends in CHOICES:
        assert_gradients_agree(train(model, "smart", inputs, backends), expected)


def test_gradients_depend_on_the_padding() -> None:
    """The comparison above tells a mask from another."""
    model = tiny_model("llama")
    padded = train(model, "eager", inputs_of("llama", "left"))
    inputs = inputs_of("llama", "left")
    other = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    other["attention_mask"][1, 4] = 1
    changed = train(model, "eager", other)
    with pytest.raises(AssertionError):
        assert_gradients_agree(changed, padded, tolerance=1e-2)


@pytest.mark.parametrize("padding", ["right", "left", "both", "empty_row"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_unpadded_layers_train(name: str, padding: str) -> None:
    """The same, where every layer has to run without padding or raise."""
    model = tiny_model(name)
    inputs = inputs_of(name, padding)
    expected = train(model, "eager", inputs)
    with smartattn.trace() as trace:
        actual = train(model, "smart", inputs, "sdpa_unpadded")
    assert_gradients_agree(actual, expected)
    assert [(row.backend, row.grad) for row in trace.rows] == [("sdpa_unpadded", True)]


@pytest.mark.parametrize("backends", CHOICES)
@pytest.mark.parametrize("padding", ["right", "left", "both", "holes", "empty_row"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradients_at_padding_are_zero(name: str, padding: str, backends: Any) -> None:
    """Padding moves nothing that the loss sees, so its gradient is zero: not NaN, not noise."""
    model = tiny_model(name, "smart").train()
    mask = MASKS[padding].bool()
    embedded = model.get_input_embeddings()(token_ids(3, WIDTH)).detach().requires_grad_()
    with smartattn.use(backends=backends):
        loss_of(model, {"inputs_embeds": embedded, "attention_mask": MASKS[padding]}).backward()
    assert torch.isfinite(embedded.grad).all()
    assert float(embedded.grad[~mask].abs().max()) <= 1e-5 * float(embedded.grad.abs().max())


def test_only_some_parameters_train() -> None:
    """Frozen queries and keys: the gradient is needed all the same."""
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("v_proj" in name)
    inputs = inputs_of("llama", "left")
    expected = train(model, "eager", inputs)
    for backends in CHOICES:
        assert_gradients_agree(train(model, "smart", inputs, backends), expected)


def test_a_backend_without_backward_refuses_when_a_gradient_is_needed() -> None:
    for grad in (False, True):
        call = Call(torch.device("cpu"), torch.float32, 1, 8, 8, 4, 4, 64, 64, grad=grad)
        refusals = declared_refusals(Support(backward=False), call)
        assert refusals == (["has no backward, and a gradient is needed"] if grad else [])


# -- gradient checkpointing ------------------------------------------------------------------------


def checkpointed(model: PreTrainedModel, reentrant: bool) -> PreTrainedModel:
    model.train()
    with warnings.catch_warnings():
        # Renamed in later versions of Transformers.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # Its recomputation needs an input with a gradient.
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("backends", CHOICES)
@pytest.mark.parametrize("padding", ["left", "holes"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "modernbert"])
def test_gradient_checkpointing(name: str, reentrant: bool, padding: str, backends: Any) -> None:
    inputs = inputs_of(name, padding)
    expected = train(tiny_model(name), "eager", inputs)
    model = checkpointed(tiny_model(name), reentrant)
    with smartattn.trace() as trace:
        actual = train(model, "smart", inputs, backends)
    assert_gradients_agree(actual, expected)
    layers = model.config.num_hidden_layers
    assert sum(row.calls for row in trace.rows) == 2 * layers, "every layer ran twice"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_two_forwards_before_one_backward(name: str, reentrant: bool) -> None:
    """Layers run again in backward, when the batch that was last seen is another one."""
    batches = [inputs_of(name, padding) for padding in ("left", "right", "holes")]
    batches[1]["input_ids"] = token_ids(3, WIDTH, seed=5)
    gradients = {}
    for implementation in ("eager", "smart"):
        model = tiny_model(name, implementation).train()
        if implementation == "smart":
            checkpointed(model, reentrant)
        torch.stack([loss_of(model, inputs) for inputs in batches]).sum().backward()
        gradients[implementation] = gradients_of(model)
    assert_gradients_agree(gradients["smart"], gradients["eager"])


@pytest.mark.parametrize("place", ["after_the_block", "another_thread"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_again_choose_as_before(reentrant: bool, place: str) -> None:
    """Backward on a GPU runs in a thread of torch's own, where no ``use`` block is in force."""
    inputs = inputs_of("llama", "left")
    expected = train(tiny_model("llama"), "eager", inputs)
    model = checkpointed(tiny_model("llama", "smart"), reentrant)
    errors: list[BaseException] = []

    def backward() -> None:
        try:
            loss.backward()
        except BaseException as error:
            errors.append(error)

    with smartattn.use(backends="sdpa_unpadded"):
        loss = loss_of(model, inputs)
        if place == "another_thread":
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
    if place == "after_the_block":
        backward()
    assert not errors, errors
    assert_gradients_agree(gradients_of(model), expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_forwards_of_other_modes_in_between(name: str) -> None:
    """A forward without gradients shares no choice with one that needs them."""
    model = tiny_model(name)
    inputs = inputs_of(name, "left")
    expected = train(model, "eager", inputs)
    set_implementation(model, "smart")
    model.zero_grad()
    with torch.inference_mode():
        model(**inputs)
    loss = loss_of(model, inputs)
    with torch.no_grad():
        model(**inputs_of(name, "right"))
    with torch.inference_mode():
        model(**inputs)
    loss.backward()
    assert_gradients_agree(gradients_of(model), expected)


# -- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backends", CHOICES)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dropout_runs_and_is_off_in_evaluation(name: str, backends: Any) -> None:
    field = "attention_probs_dropout_prob" if name == "bert" else "attention_dropout"
    model = tiny_model(name, "smart", **{field: 0.4})
    inputs = inputs_of(name, "left")
    real = MASKS["left"].bool()

    def output(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad(), smartattn.use(backends=backends):
            return output_of(model(**inputs))[real]

    evaluated = output(0)
    assert torch.equal(evaluated, output(1))
    set_implementation(model, "eager")
    assert_agree(evaluated, output(0))
    set_implementation(model, "smart")
    model.train()
    dropped = output(0)
    assert torch.isfinite(dropped).all()
    assert torch.equal(dropped, output(0)), "the same seed drops the same"
    assert relative_error(dropped, output(1)) > 1e-3
    assert relative_error(dropped, evaluated) > 1e-3


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_unpadded"])
def test_dropout_drops_the_right_share(backend: str) -> None:
    """Over many equal rows the mean is that without dropout, and the spread is not zero."""
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    rows, length, start = 4000, 6, 2
    states = [torch.randn(1, heads, length, 8).expand(rows, -1, -1, -1) for heads in (4, 2, 2)]
    real = torch.ones(rows, length, dtype=torch.bool)
    real[:, :start] = False
    plan = Plan(
        rows, length, length, Pattern.CAUSAL, real.device, real=real.numpy(), real_on_device=real
    )
    mask = PlanMask(plan, torch.float32)
    with smartattn.use(backends=backend), torch.no_grad():
        kept, _ = smart_attention(layer, *states, mask, dropout=0.0)
        dropped, _ = smart_attention(layer, *states, mask, dropout=0.25)
    kept, dropped = kept[:, start:], dropped[:, start:]
    assert float((dropped.mean(0) - kept[0]).abs().max()) < 0.1
    # The first query sees one key, which is dropped in a quarter of the rows.
    share = float((dropped[:, 0] == 0).all(-1).float().mean())
    assert abs(share - 0.25) < 0.02
    survivors = dropped[:, 0][(dropped[:, 0] != 0).any(-1)]
    assert_agree(survivors.abs().amax(0), kept[:, 0].abs().amax((0, 1)) / 0.75)


def test_dropout_trains_with_checkpointing() -> None:
    """What is recomputed drops what was dropped before."""
    gradients = []
    for reentrant in (None, False, True):
        model = tiny_model("llama", "smart", attention_dropout=0.3).train()
        if reentrant is not None:
            checkpointed(model, reentrant)
        torch.manual_seed(3)
        loss_of(model, inputs_of("llama", "left")).backward()
        gradients.append(gradients_of(model))
    assert_gradients_agree(gradients[1], gradients[0])
    assert_gradients_agree(gradients[2], gradients[0])


# -- deterministic algorithms ----------------------------------------------------------------------


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backends", CHOICES)
@pytest.mark.parametrize("padding", ["left", "holes"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "bart"])
def test_deterministic_algorithms(name: str, padding: str, backends: Any) -> None:
    model = tiny_model(name)
    inputs = inputs_of(name, padding)
    first = train(model, "smart", inputs, backends)
    second = train(model, "smart", inputs, backends)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert_gradients_agree(first, train(model, "eager", inputs), tolerance=1e-4)


def test_the_deterministic_mode_is_part_of_the_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Switched between two forwards, it must not find the choice made for the other mode."""
    asked: list[bool] = []
    original = SdpaBackend.refusals

    def recording(self: SdpaBackend, plan: Plan, call: Call) -> list[str]:
        asked.append(call.deterministic)
        return original(self, plan, call)

    monkeypatch.setattr(SdpaBackend, "refusals", recording)
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    # A shape of its own, so that no other test has made its choice before.
    states = [torch.randn(2, heads, 37, 8) for heads in (4, 2, 2)]
    mask = PlanMask(Plan(2, 37, 37, Pattern.CAUSAL, torch.device("cpu")), torch.float32)
    smart_attention(layer, *states, mask)
    torch.use_deterministic_algorithms(True)
    try:
        smart_attention(layer, *states, mask)
    finally:
        torch.use_deterministic_algorithms(False)
    smart_attention(layer, *states, mask)
    assert asked == [False, True]


def test_dropout_counts_as_a_gradient() -> None:
    """A reentrant checkpoint runs a layer without gradients first, and must repeat its dropout."""
    layer = tiny_model("bert", "smart").encoder.layer[0].attention.self
    states = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    with torch.no_grad(), smartattn.trace() as found:
        smart_attention(layer, *states, None, dropout=0.1)
        smart_attention(layer, *states, None)
    assert [row.grad for row in found.rows] == [True, False]
