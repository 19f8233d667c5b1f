"""No state leaks: two models, threads, nested models, copies, and machines without smartattn."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, EncoderDecoderConfig
from transformers.masking_utils import create_causal_mask

import smartattn
from smartattn.plan import Plan

from .agreement import CACHE, MASKS, WIDTH, assert_agree, output_of, run, set_implementation
from .tiny_models import BOS, PAD, from_config, tiny_config, tiny_model, token_ids

# -- several models --------------------------------------------------------------------------------


def test_two_models_take_turns_within_a_forward() -> None:
    """A hook in the middle of one model runs the other one on another batch."""
    outer, inner = tiny_model("llama", "smart"), tiny_model("bert", "smart")
    outer_inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}
    inner_inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["holes"]}
    expected = run(tiny_model("llama"), "eager", **outer_inputs)
    expected_inner = run(tiny_model("bert"), "eager", **inner_inputs)
    seen = []

    def interrupt(*_: Any) -> None:
        with torch.no_grad():
            seen.append(output_of(inner(**inner_inputs)))

    for layer in outer.model.layers:
        layer.self_attn.q_proj.register_forward_hook(interrupt)
    with torch.no_grad():
        actual = output_of(outer(**outer_inputs))
    assert_agree(actual, expected, where=MASKS["left"])
    assert len(seen) == 2
    for output in seen:
        assert_agree(output, expected_inner, where=MASKS["holes"])


def test_two_models_of_one_class_and_other_shapes() -> None:
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    batches = [
        {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS[padding]}
        for padding in ("left", "right")
    ]
    expected = [run(model, "eager", **batch) for model, batch in zip(models, batches, strict=True)]
    for _ in range(2):
        for model, batch, reference in zip(models, batches, expected, strict=True):
            assert_agree(run(model, "smart", **batch), reference, where=batch["attention_mask"])


def test_the_same_mask_tensor_with_new_values() -> None:
    """A serving loop that reuses its buffers: nothing may be remembered by a tensor's identity."""
    model = tiny_model("llama")
    buffer = MASKS["left"].clone()
    for padding in ("left", "right", "both", "holes", "left"):
        buffer.copy_(MASKS[padding])
        inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": buffer}
        actual = run(model, "smart", **inputs)
        assert_agree(actual, run(model, "eager", **inputs), where=buffer)


def test_nested_models() -> None:
    """A decoder of one class on top of an encoder of another, each with masks of its own."""
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        tiny_config("modernbert"), tiny_config("bert"), decoder_start_token_id=BOS, pad_token_id=PAD
    )
    model = from_config("EncoderDecoderModel", config)
    inputs = {
        "input_ids": token_ids(3, WIDTH),
        "attention_mask": MASKS["both"],
        "decoder_input_ids": token_ids(3, WIDTH, seed=1),
        "decoder_attention_mask": MASKS["right"],
    }
    outputs = {}
    for implementation in ("eager", "smart"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), smartattn.trace() as trace:
            outputs[implementation] = model(**inputs).logits
    assert_agree(outputs["smart"], outputs["eager"], where=MASKS["right"])
    # Windowed and full layers of the encoder, the decoder's own, and what joins the two.
    patterns = [(row.facts["pattern"], row.facts["window"]) for row in trace.rows]
    assert patterns[2:] == [("causal", None), ("bidirectional", None)]
    assert {window for pattern, window in patterns[:2]} == {3, None}
    assert [row.facts["padding"] for row in trace.rows] == ["both", "both", "right", "both"]


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_threads_with_their_own_batches(name: str) -> None:
    """One model, every thread with other padding, other lengths and another backend."""
    model = tiny_model(name)
    work = []
    for number, padding in enumerate(("left", "right", "both", "holes", "ones", "empty_row")):
        length = WIDTH - number % 3
        mask = MASKS[padding][:, :length]
        inputs = {"input_ids": token_ids(3, length, seed=number), "attention_mask": mask}
        backends = (None, "sdpa", ("sdpa_unpadded", "sdpa"))[number % 3]
        work.append((inputs, backends, run(model, "eager", **inputs)))
    set_implementation(model, "smart")
    start = threading.Barrier(len(work))

    def serve(inputs: dict[str, Any], backends: Any, expected: torch.Tensor) -> None:
        start.wait(timeout=60)
        for _ in range(5):
            with torch.no_grad(), smartattn.use(backends=backends), smartattn.trace() as trace:
                actual = output_of(model(**inputs))
            assert_agree(actual, expected, where=inputs["attention_mask"])
            assert sum(row.calls for row in trace.rows) == model.config.num_hidden_layers
            allowed = {backends} if isinstance(backends, str) else set(backends or ())
            assert not allowed or {row.backend for row in trace.rows} <= allowed

    with ThreadPoolExecutor(len(work)) as pool:
        for future in [pool.submit(serve, *job) for job in work]:
            future.result(timeout=120)


def test_settings_of_one_thread_are_not_another_s() -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}

    def backends_used() -> set[str]:
        with torch.no_grad(), smartattn.trace() as trace:
            model(**inputs)
        return {row.backend for row in trace.rows}

    free = backends_used()
    other = ({"sdpa", "sdpa_unpadded"} - free).pop()
    with smartattn.use(backends=other), ThreadPoolExecutor(1) as pool:
        assert backends_used() == {other}
        assert pool.submit(backends_used).result(timeout=60) == free
    assert backends_used() == free


def test_blocks_nest_and_end_with_an_exception() -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}

    def used() -> set[str]:
        with torch.no_grad(), smartattn.trace() as trace:
            model(**inputs)
        return {row.backend for row in trace.rows}

    with smartattn.use(backends="sdpa_unpadded"):
        with smartattn.use(backends="sdpa"):
            assert used() == {"sdpa"}
        with pytest.raises(KeyError), smartattn.use(backends="sdpa"):
            raise KeyError
        with smartattn.use(pad_output="zeros"):
            assert used() == {"sdpa_unpadded"}, "what is not named stays as it was"


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copy.copy],
    ids=["deepcopy", "pickle", "copy"],
)
def test_copies_of_a_model_that_has_run(duplicate: Any) -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}
    with torch.no_grad():
        expected = output_of(model(**inputs))
        twin = duplicate(model)
        assert twin.config._attn_implementation == "smart"
        assert torch.equal(output_of(twin(**inputs)), expected)


# -- machines without smartattn --------------------------------------------------------------------

WITHOUT_SMARTATTN = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "smartattn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
"""


def without_smartattn(code: str) -> str:
    """What code prints in a process that cannot import smartattn."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_SMARTATTN + code],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was used with smart and saved."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model("llama", "smart")
    with torch.no_grad():
        model(token_ids(1, 4))
    model.save_pretrained(folder)
    torch.save(model, folder / "whole.pt")
    return folder


def test_a_saved_configuration_does_not_name_smart(saved: Path) -> None:
    assert "smart" not in (saved / "config.json").read_text()
    assert "_attn_implementation" not in json.loads((saved / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_a_saved_model_elsewhere(saved: Path) -> None:
    """It loads as any other; asking for smart there, or a whole pickle, is a clear error."""
    code = f"""
folder = {str(saved)!r}
model = AutoModelForCausalLM.from_pretrained(folder)
print("loaded with", model.config._attn_implementation)
model(torch.tensor([[5, 6, 7]]))
try:
    AutoModelForCausalLM.from_pretrained(folder, attn_implementation="smart")
except ValueError as error:
    print("load:", error)
pickled = torch.load(folder + "/whole.pt", weights_only=False)
try:
    pickled(torch.tensor([[5, 6, 7]]))
except Exception as error:
    print("run:", error)
else:
    print("run: no error")
pickled.set_attn_implementation("sdpa")
pickled(torch.tensor([[5, 6, 7]]))
print("switched")
"""
    lines = without_smartattn(code).splitlines()
    assert lines[0] == "loaded with sdpa"
    load, run_, switched = lines[1:]
    assert 'attn_implementation="smart"` is not supported' in load
    assert "smart" in run_
    assert "not" in run_
    assert switched == "switched"


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("without_padding", [False, True])
@pytest.mark.parametrize("backends", [None, "sdpa_unpadded", "eager"])
@pytest.mark.parametrize("padding", ["left", "holes"])
def test_what_a_forward_measured_is_gone_with_it(
    padding: str, backends: str | None, without_padding: bool, devices: int
) -> None:
    """At once, and not when the garbage collector comes: it holds masks on the device."""
    if (padding, backends) == ("holes", "sdpa_unpadded"):
        backends = "sdpa"
    made = []
    original = Plan.__init__

    def remembered(self: Plan, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        made.append(weakref.ref(self))

    model = tiny_model("llama", "smart")
    if without_padding:
        smartattn.padding_free(model, always=True)
    moved = []

    def move(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """What accelerate does for a layer on another device."""
        mask = kwargs["attention_mask"].to("meta")
        mask.plan.dense_mask()
        moved.append(weakref.ref(mask.plan))

    if devices == 2:
        model.model.layers[1].register_forward_pre_hook(move, with_kwargs=True)
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS[padding]}
    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patched, torch.no_grad():
            patched.setattr(Plan, "__init__", remembered)
            with smartattn.use(backends=backends):
                model(**inputs)
        assert len(made) == 1 + without_padding
        assert len(moved) == devices - 1
        assert not [plan for plan in made + moved if plan() is not None]
    finally:
        gc.enable()


def test_a_callers_mask_does_not_keep_the_model() -> None:
    model = tiny_model("llama", "smart")
    smartattn.padding_free(model, always=True)
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=model.get_input_embeddings()(token_ids(3, WIDTH)).detach(),
        attention_mask=MASKS["left"],
        **{CACHE: None},
        position_ids=None,
    )
    with torch.no_grad():
        model(input_ids=token_ids(3, WIDTH), attention_mask=mask)
    smartattn.padded(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
