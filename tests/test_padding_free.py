"""Padding taken out around the layers: equal at real tokens, zeros elsewhere, or refused."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from benchmarks import padding_free as benchmark
from benchmarks.models import build
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import smartattn
from smartattn import layouts, padded, padding_free, stacks
from smartattn.control import SETTINGS
from smartattn.packed_stack import Packing, packed_plan
from smartattn.padding_free import _FRAME
from smartattn.plan import Pattern, Plan
from smartattn.profile import load
from smartattn.profiles import shipped_profiles, stack_rules
from smartattn.stack_rule import StackRule, StackWhen, stack_rule

from .agreement import CACHE, MASKS, WIDTH, assert_agree, assert_differ, output_of, spans
from .moving import moving
from .padding_free_sweep import AGREE, REFUSED, SCENARIOS, examine
from .sweep.architectures import choose
from .test_integration import HostReads
from .tiny_models import PAD, from_config, tiny_config, tiny_model, token_ids

IDS = token_ids(3, WIDTH)
LEFT, RIGHT, HOLES = MASKS["left"], MASKS["right"], MASKS["holes"]


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """No test may leave a forward open in this thread."""
    yield
    assert _FRAME.get() is None


def both(
    model: PreTrainedModel, run: Callable[[PreTrainedModel], Any] | None = None, **inputs: Any
) -> tuple[Any, Any, list[smartattn.StackRow]]:
    """What eager attention gives with the padding, smart without it, and what became of it."""
    run = run or (lambda model: model(**inputs))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = run(model)
    model.set_attn_implementation("smart")
    with torch.no_grad(), padding_free(model, always=True), smartattn.trace() as trace:
        actual = run(model)
    return actual, expected, trace.stacks


def check_packed(model: PreTrainedModel, **inputs: Any) -> Any:
    """The packed result, after it was found equal at real tokens."""
    actual, expected, rows = both(model, **inputs)
    assert [row.packed for row in rows] == [True], rows
    assert_agree(output_of(actual), output_of(expected), where=inputs["attention_mask"])
    return actual


def check_refused(model: PreTrainedModel, because: str, **inputs: Any) -> Any:
    """The padded result, after it was found equal and the reason was found."""
    actual, expected, rows = both(model, **inputs)
    assert [row.packed for row in rows] == [False]
    assert because in rows[0].reason
    mask = inputs.get("attention_mask")
    flat = mask is not None and mask.ndim == 2
    assert_agree(output_of(actual), output_of(expected), where=mask if flat else None)
    return actual


# -- forwards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [name for name in MASKS if name != "ones"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_decoders(name: str, padding: str) -> None:
    check_packed(tiny_model(name), input_ids=IDS, attention_mask=MASKS[padding])


@pytest.mark.parametrize("padding", ["right", "left", "both", "outer", "equal", "empty_row"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "modernbert"])
def test_windows(name: str, padding: str) -> None:
    """Windows of 5 tokens in rows of up to 12: distances within a sequence stay as they are."""
    check_packed(tiny_model(name), input_ids=IDS, attention_mask=MASKS[padding])


@pytest.mark.parametrize("name", ["mistral", "gemma3", "modernbert"])
def test_windows_are_not_packed_across_holes(name: str) -> None:
    check_refused(tiny_model(name), "across holes", input_ids=IDS, attention_mask=HOLES)


def test_a_layer_that_cannot_be_packed_sees_the_padded_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Should a later layer turn out to be one, the tokens are put back before it."""
    monkeypatch.setattr(stacks.Stack, "has_windows", False)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny_model("gemma3", num_hidden_layers=3, layer_types=kinds)
    actual, expected, rows = both(model, input_ids=IDS, attention_mask=HOLES)
    assert rows[0].packed
    assert_agree(actual.logits, expected.logits, where=HOLES)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_encoders(name: str) -> None:
    result = check_packed(tiny_model(name), input_ids=IDS, attention_mask=RIGHT)
    expected = tiny_model(name)(input_ids=IDS, attention_mask=RIGHT)
    assert_agree(result.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("padding", ["left", "holes", "empty_row"])
def test_a_pooler_that_reads_padding(padding: str) -> None:
    """Equal to the padded model there as well, since it is not packed."""
    mask = MASKS[padding]
    result = check_refused(tiny_model("bert"), "first position", input_ids=IDS, attention_mask=mask)
    expected = tiny_model("bert", "smart")(input_ids=IDS, attention_mask=mask)
    torch.testing.assert_close(result.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("padding", ["left", "holes"])
def test_encoders_without_a_pooler(padding: str) -> None:
    model = from_config("BertForMaskedLM", tiny_config("bert"))
    check_packed(model, input_ids=IDS, attention_mask=MASKS[padding])


@pytest.mark.parametrize("name", ["llama", "gpt2", "modernbert"])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_padding_positions_are_zeros(name: str, mask: Tensor) -> None:
    model = tiny_model(name, "smart")
    base = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        assert output_of(base(input_ids=IDS, attention_mask=mask))[mask == 0].any()
        with padding_free(model, always=True):
            states = output_of(base(input_ids=IDS, attention_mask=mask))
    assert not states[mask == 0].any()
    assert states[mask == 1].any(dim=-1).all()


def test_norms_outside_of_the_stack_leave_zeros() -> None:
    config = transformers.RobertaPreLayerNormConfig(**tiny_config("roberta").to_diff_dict())
    model = from_config("RobertaPreLayerNormModel", config, "smart")
    nn.init.ones_(model.LayerNorm.bias)
    with torch.no_grad(), padding_free(model, always=True):
        for return_dict in (True, False):
            result = model(input_ids=IDS, attention_mask=RIGHT, return_dict=return_dict)
            assert not result[0][RIGHT == 0].any()
            assert result[0][RIGHT == 1].any()


def test_layers_see_real_tokens_alone() -> None:
    model = tiny_model("llama", "smart")
    shapes = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape[:2]))
    with torch.no_grad(), padding_free(model, always=True):
        model(input_ids=IDS, attention_mask=LEFT)
    assert shapes == [(1, int(LEFT.sum()))] * len(model.model.layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_custom_positions(name: str) -> None:
    positions = torch.stack([torch.randperm(WIDTH) for _ in range(3)])
    model = tiny_model(name)
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    result = check_packed(model, **inputs, position_ids=positions)
    assert_differ(result.logits[LEFT.bool()], model(**inputs).logits[LEFT.bool()].detach())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_embeddings_as_inputs(name: str) -> None:
    model = tiny_model(name)
    embedded = model.get_input_embeddings()(IDS).detach() * 2
    check_packed(model, inputs_embeds=embedded, attention_mask=RIGHT)


def test_token_types() -> None:
    model = tiny_model("bert")
    types = torch.randint(0, 2, IDS.shape)
    result = check_packed(model, input_ids=IDS, attention_mask=RIGHT, token_type_ids=types)
    other = model(input_ids=IDS, attention_mask=RIGHT, token_type_ids=1 - types)
    assert_differ(result[0][RIGHT.bool()], other[0][RIGHT.bool()].detach())


def test_one_row() -> None:
    check_packed(tiny_model("llama"), input_ids=IDS[:1], attention_mask=spans((3, 12)))


def test_positional_arguments() -> None:
    model = tiny_model("llama")
    actual, expected, rows = both(model, lambda model: model(IDS, LEFT))
    assert rows[0].packed
    assert_agree(actual.logits, expected.logits, where=LEFT)


def test_tuples_as_output() -> None:
    actual, expected, rows = both(
        tiny_model("llama"),
        input_ids=IDS,
        attention_mask=LEFT,
        return_dict=False,
        output_hidden_states=True,
        use_cache=False,
    )
    assert rows[0].packed
    assert_agree(actual[0], expected[0], where=LEFT)
    for state, right in zip(actual[1], expected[1], strict=True):
        assert_agree(state, right, where=LEFT)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_hidden_states(name: str) -> None:
    actual, expected, rows = both(
        tiny_model(name), input_ids=IDS, attention_mask=RIGHT, output_hidden_states=True
    )
    assert rows[0].packed
    assert len(actual.hidden_states) == len(expected.hidden_states) > 2
    for state, right in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_agree(state, right, where=RIGHT)
        assert not state[RIGHT == 0].any()


def test_float_types_of_a_mask() -> None:
    for dtype in (torch.bool, torch.float32, torch.int32):
        check_packed(tiny_model("llama"), input_ids=IDS, attention_mask=LEFT.to(dtype))


def test_autocast() -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        with padding_free(model, always=True):
            assert_agree(model(**inputs).logits, expected, where=LEFT, tolerance=0.1)


def test_masks_of_a_caller_that_serve_several_forwards() -> None:
    """The decision of one forward must not outlive it with the mask."""
    model = tiny_model("gemma3", "smart")
    arguments = {
        "config": model.config,
        "inputs_embeds": model.get_input_embeddings()(IDS).detach(),
        CACHE: None,
        "position_ids": None,
    }
    inputs = {"input_ids": IDS, "use_cache": False}
    expected = model(**inputs, attention_mask=LEFT).logits.detach()
    makers = (create_causal_mask, create_sliding_window_causal_mask)
    with torch.no_grad(), padding_free(model, always=True), smartattn.trace() as trace:
        full, sliding = (make(**arguments, attention_mask=LEFT) for make in makers)
        masks = {"full_attention": full, "sliding_attention": sliding}
        for _ in range(2):
            assert_agree(model(**inputs, attention_mask=masks).logits, expected, where=LEFT)
    assert [(row.packed, row.calls) for row in trace.stacks] == [(True, 2)]
    with torch.no_grad():
        assert_agree(model(**inputs, attention_mask=masks).logits, expected, where=LEFT)


@pytest.mark.parametrize("padding", ["right", "left", "holes", "empty_row"])
def test_sequences_of_the_packed_tokens_are_told_to_the_device_once(
    padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bounds that the gather needs are those of the packed kernels."""
    uploads = []
    monkeypatch.setattr(
        layouts, "upload", lambda *a, upload=layouts.upload: uploads.append(a) or upload(*a)
    )
    mask = MASKS[padding]
    real = mask.bool().numpy()
    padded = Plan(*mask.shape, mask.shape[1], Pattern.CAUSAL, mask.device, real=real)
    packed = packed_plan(padded)
    lengths = [int(n) for n in real.sum(axis=1) if n]
    places = padded.varlen(True).q_index
    assert places is not None
    assert places.tolist() == real.reshape(-1).nonzero()[0].tolist()
    layout = packed.varlen(True)
    assert layout.cu_seqlens_q.tolist() == layout.cu_seqlens_k.tolist()
    assert layout.cu_seqlens_q.diff().tolist() == lengths
    assert (layout.q_index, layout.k_index) == (None, None)
    assert (layout.total_q, layout.max_seqlen_k) == (sum(lengths), max(lengths))
    # Kernels need not know of rows without a token.
    assert len(uploads) == (2 if padding == "empty_row" else 1)
    assert packed.on(torch.device("meta")).varlen(True).cu_seqlens_q.is_meta


def test_other_masks_of_a_forward_need_the_same_padding() -> None:
    def plan(*rows: list[int]) -> Plan:
        real = np.array(rows, dtype=bool)
        return Plan(*real.shape, real.shape[1], Pattern.CAUSAL, torch.device("cpu"), real=real)

    left = plan([0, 1, 1, 1], [1, 1, 1, 1])
    assert Packing(left).covers(plan([0, 1, 1, 1], [1, 1, 1, 1]))
    assert not Packing(left).covers(plan([1, 1, 1, 0], [1, 1, 1, 1]))
    assert not Packing(left).covers(plan([1, 1, 1, 1], [0, 1, 1, 1]))
    # As many real tokens between the same two, but not the same ones.
    holes = plan([1, 0, 1, 1], [1, 1, 1, 1])
    assert not Packing(holes).covers(plan([1, 1, 0, 1], [1, 1, 1, 1]))


# -- refusals --------------------------------------------------------------------------------------


def test_attentions_asked_for() -> None:
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    check_refused(tiny_model("llama"), "output_attentions", **inputs, output_attentions=True)
    model = tiny_model("llama")
    model.config.output_attentions = True
    check_refused(model, "output_attentions", **inputs)


def test_a_mask_of_four_dimensions() -> None:
    hidden = torch.ones(3, 1, WIDTH, WIDTH, dtype=torch.bool).triu(1)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    check_refused(tiny_model("llama"), "no layer got", input_ids=IDS, attention_mask=mask)


def test_no_padding() -> None:
    check_refused(tiny_model("llama"), "no padding", input_ids=IDS)
    check_refused(tiny_model("llama"), "no padding", input_ids=IDS, attention_mask=MASKS["ones"])


def test_packed_batches_stay_as_they_are() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": IDS[:1], "position_ids": positions, "use_cache": False}
    with torch.no_grad(), smartattn.trace() as trace:
        expected = model(**inputs).logits
        with padding_free(model, always=True):
            assert_agree(model(**inputs).logits, expected)
    assert "packed already" in trace.stacks[0].reason


@pytest.mark.parametrize("base", [False, True])
def test_tensors_that_nobody_knows(base: bool) -> None:
    """Whether the model itself gets them or its layers do."""
    bounds = torch.tensor([0, 36], dtype=torch.int32)
    model = tiny_model("llama", "smart")
    with (
        smartattn.trace() as trace,
        padding_free(model, always=True),
        pytest.raises(ValueError, match="without padding"),
    ):
        (model.model if base else model)(input_ids=IDS, attention_mask=LEFT, cu_seq_lens_q=bounds)
    assert "cu_seq_lens_q" in trace.stacks[0].reason


def test_tokens_in_the_cache() -> None:
    model = tiny_model("llama")
    mask = spans((0, 12), (3, 12), (5, 12))

    def two_chunks(model: PreTrainedModel) -> Any:
        cache = DynamicCache(config=model.config)
        model(input_ids=IDS[:, :6], attention_mask=mask[:, :6], **{CACHE: cache})
        return model(input_ids=IDS[:, 6:], attention_mask=mask, **{CACHE: cache})

    actual, expected, rows = both(model, two_chunks)
    assert [(row.packed, row.calls) for row in rows] == [(True, 1), (False, 1)]
    assert "earlier tokens" in rows[1].reason
    assert_agree(actual.logits, expected.logits, where=mask[:, 6:])


def test_caches_that_are_not_known() -> None:
    class OwnCache(DynamicCache):
        pass

    model = tiny_model("llama", "smart")
    with smartattn.trace() as trace, torch.no_grad(), padding_free(model, always=True):
        model(input_ids=IDS, attention_mask=LEFT, **{CACHE: OwnCache(config=model.config)})
    assert "OwnCache" in trace.stacks[0].reason


def test_values_at_padding_that_are_to_be_kept() -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    with torch.no_grad(), smartattn.use(pad_output="sdpa"), smartattn.trace() as trace:
        expected = model(**inputs).logits
        with padding_free(model, always=True):
            torch.testing.assert_close(model(**inputs).logits, expected)
    assert "to be kept" in trace.stacks[0].reason


def test_backends_that_would_need_a_mask_of_all_tokens() -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    sdpa = smartattn.use(backends="sdpa")
    with torch.no_grad(), smartattn.trace() as trace, padding_free(model, always=True), sdpa:
        model(**inputs)
    assert "all tokens by all tokens" in trace.stacks[0].reason
    check_refused(tiny_model("gemma2"), "all tokens", input_ids=IDS, attention_mask=LEFT)


def test_a_name_that_only_sounds_like_a_state_space() -> None:
    """GptOssModel has "ssm" in it, but no state-space layer."""
    with pytest.raises(ValueError, match="its layers are not among those known"):
        padding_free(tiny_model("gpt_oss", "smart"))


def test_another_implementation_set_later() -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    with torch.no_grad(), padding_free(model, always=True), smartattn.trace() as trace:
        model.set_attn_implementation("eager")
        actual = model(**inputs).logits
    assert_agree(actual, tiny_model("llama")(**inputs).logits.detach())
    assert "no layer got a mask of smart" in trace.stacks[0].reason


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("t5", "cross-attention"),
        ("bart", "cross-attention"),
        ("bloom", "relative position bias"),
        ("mpt", "relative position bias"),
        ("mpnet", "relative position bias"),
        ("convbert", "convolution"),
        ("xglm", "not among those known"),
        ("splinter", "not among those known"),
    ],
)
def test_architectures_that_are_never_packed(name: str, because: str) -> None:
    model = tiny_model(name)
    model.config._attn_implementation = "smart"
    with pytest.raises(ValueError, match=because):
        padding_free(model)
    assert not model._forward_pre_hooks


def test_state_space_layers() -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    values = {name: getattr(tiny_config("llama"), name) for name in names}
    config = transformers.JambaConfig(
        **values, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="state-space"):
        padding_free(from_config("JambaForCausalLM", config, "smart"))


def test_heads_that_are_not_known() -> None:
    model = from_config("BertForQuestionAnswering", tiny_config("bert"), "smart")
    with pytest.raises(ValueError, match="padding positions"):
        padding_free(model)


def test_models_that_are_not_of_transformers() -> None:
    with pytest.raises(ValueError, match="no model of Transformers"):
        padding_free(nn.Sequential(tiny_model("llama", "smart")))


def test_layers_of_other_origin() -> None:
    model = tiny_model("llama", "smart")
    model.model.layers[1] = nn.Sequential(model.model.layers[1])
    with pytest.raises(ValueError, match="not those of Transformers"):
        padding_free(model)


def test_subclasses_are_not_known() -> None:
    class OwnModel(transformers.LlamaModel):
        pass

    with pytest.raises(ValueError, match="not among those known"):
        padding_free(OwnModel._from_config(tiny_config("llama"), attn_implementation="smart"))


def test_other_implementations_are_refused() -> None:
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        padding_free(tiny_model("llama", "sdpa"))


# -- training --------------------------------------------------------------------------------------


#: A training step whose labels leave the padding out.
STEP = {"input_ids": IDS, "attention_mask": RIGHT, "labels": IDS.masked_fill(RIGHT == 0, -100)}
#: GPT-2 has dropout by default.
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


def gradients(model: PreTrainedModel, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["no", "reentrant", "graph"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_training_step(name: str, checkpointing: bool | None) -> None:
    changes = NO_DROPOUT.get(name, {})
    expected = gradients(tiny_model(name, **changes).train(), **STEP)
    model = tiny_model(name, "smart", **changes).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    with padding_free(model, always=True), smartattn.trace() as trace:
        actual = gradients(model, **STEP)
    assert [row.packed for row in trace.stacks] == [True]
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert_agree(actual[key], value, tolerance=1e-4)


def test_checkpointed_layers_run_again_after_another_forward() -> None:
    model = tiny_model("llama", "smart").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradients(tiny_model("llama").train(), **STEP)
    with padding_free(model, always=True):
        loss = model(**STEP, use_cache=False).loss
        model(input_ids=token_ids(3, WIDTH, seed=5), attention_mask=HOLES)
        loss.backward()
    for name, parameter in model.named_parameters():
        assert_agree(parameter.grad, expected[name], tolerance=1e-4)


def test_labels_at_padding_positions() -> None:
    """A loss that counts them would be another one without what the layers compute there."""
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    labels = IDS.masked_fill(LEFT == 0, -100)
    model = tiny_model("llama", "smart")
    expected = model(**inputs, labels=labels).loss.detach()
    with padding_free(model, always=True), smartattn.trace() as trace, torch.no_grad():
        torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
        # The last padding position predicts the first real token.
        first = LEFT.argmax(dim=1)
        unseen = labels.clone()
        unseen[torch.arange(3), first] = -100
        items = (unseen != -100).sum()
        packed = model(**inputs, labels=unseen, num_items_in_batch=items).loss
        shifted = nn.functional.pad(unseen[:, 1:], (0, 1), value=-100)
        again = model(**inputs, labels=unseen, shift_labels=shifted).loss
    assert [(row.packed, row.calls) for row in trace.stacks] == [(False, 1), (True, 2)]
    assert "padding positions" in trace.stacks[0].reason
    assert_agree(packed, tiny_model("llama")(**inputs, labels=unseen).loss.detach())
    assert_agree(again, packed)


def test_labels_of_single_tokens() -> None:
    model = from_config("BertForMaskedLM", tiny_config("bert"), "smart")
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    for labels, packed in ((IDS, False), (IDS.masked_fill(LEFT == 0, -100), True)):
        expected = model(**inputs, labels=labels).loss.detach()
        with padding_free(model, always=True), smartattn.trace() as trace, torch.no_grad():
            assert_agree(model(**inputs, labels=labels).loss, expected)
        assert [row.packed for row in trace.stacks] == [packed]


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "LlamaForSequenceClassification"]
)
def test_classifiers_of_sequences(name: str) -> None:
    config = tiny_config("bert" if name.startswith("Bert") else "llama", num_labels=3)
    model = from_config(name, config)
    seen = {}
    for padding in ("right", "left"):
        mask = MASKS[padding]
        ids = IDS.masked_fill(mask == 0, PAD)
        actual, expected, rows = both(model, input_ids=ids, attention_mask=mask)
        assert_agree(actual.logits, expected.logits)
        seen[padding] = rows[0].packed
    assert seen == {"right": True, "left": name.startswith("Llama")}


def test_classifiers_that_pick_a_padding_position() -> None:
    """Padding that is not the padding token: the last token is taken for a real one."""
    model = from_config("LlamaForSequenceClassification", tiny_config("llama", num_labels=3))
    actual, _, rows = both(model, input_ids=IDS, attention_mask=RIGHT)
    assert "reads a padding position" in rows[0].reason
    model.set_attn_implementation("smart")
    torch.testing.assert_close(actual.logits, model(input_ids=IDS, attention_mask=RIGHT).logits)


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "deepseek_v3"])
def test_generation(name: str, cache: str | None) -> None:
    def generate(model: PreTrainedModel) -> Any:
        return model.generate(
            input_ids=IDS,
            attention_mask=LEFT,
            max_new_tokens=4,
            do_sample=False,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )

    actual, expected, rows = both(tiny_model(name), generate)
    assert rows[0].packed
    assert rows[0].calls == 1
    assert actual.sequences.equal(expected.sequences)
    assert_agree(torch.stack(actual.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", ["right", "both", "holes"])
def test_prompts_that_end_in_padding(name: str, padding: str) -> None:
    """What follows is made from a padding position: from the one of the padded model."""

    def generate(model: PreTrainedModel) -> Tensor:
        inputs = {"input_ids": IDS, "attention_mask": MASKS[padding]}
        return model.generate(**inputs, max_new_tokens=4, do_sample=False)

    model = tiny_model(name, "smart")
    expected = generate(model)
    with padding_free(model, always=True), smartattn.trace() as trace:
        assert generate(model).equal(expected)
    assert "last position" in trace.stacks[0].reason


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_prompts_whose_cache_will_be_used(name: str) -> None:
    """A prefill by hand; also under the cache's older name, which Transformers goes on taking."""
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": IDS, "attention_mask": RIGHT}
    with padding_free(model, always=True), smartattn.trace() as trace, torch.no_grad():
        model(**inputs, **{name: DynamicCache(config=model.config)})
    assert "last position" in trace.stacks[0].reason


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", ["dynamic", "lazy", "initialised", "static"])
def test_the_cache_is_left_in_the_padded_layout(
    name: str, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    made = moving(monkeypatch) if moved else []

    def prefill(model: PreTrainedModel) -> Any:
        cache: Any = DynamicCache(config=model.config)
        if name == "static":
            cache = StaticCache(config=model.config, max_cache_len=WIDTH + 4)
        elif name == "lazy":
            cache = DynamicCache()
        elif name == "initialised":
            for layer in cache.layers:
                layer.lazy_initialization(*torch.zeros(2, 3, 2, 1, 8))
        result = model(input_ids=IDS, attention_mask=LEFT, **{CACHE: cache})
        assert result[CACHE] is cache
        return cache

    actual, expected, rows = both(model, prefill)
    assert rows[0].packed
    assert int(actual.get_seq_length()) == WIDTH
    for layer, right in zip(actual.layers, expected.layers, strict=True):
        for states, others in ((layer.keys, right.keys), (layer.values, right.values)):
            assert states.shape == others.shape
            tokens = states[:, :, :WIDTH].transpose(1, 2)
            assert_agree(tokens, others[:, :, :WIDTH].transpose(1, 2), where=LEFT)
            assert not tokens[LEFT == 0].any()
            assert states.is_contiguous()
    # Keys and values of each layer, and the hidden states.
    assert len(made) == (2 * len(actual.layers) + 1 if moved else 0)


def test_tokens_that_follow_do_not_write_into_the_cache_of_others() -> None:
    model = tiny_model("llama", "smart")
    cache = DynamicCache(config=model.config)
    with padding_free(model, always=True), torch.no_grad():
        model.model(input_ids=IDS, attention_mask=LEFT, **{CACHE: cache})
        kept = [layer.keys for layer in cache.layers]
        before = [keys.clone() for keys in kept]
        mask = torch.cat([LEFT, LEFT[:, -1:]], dim=1)
        model.model(input_ids=IDS[:, :1], attention_mask=mask, **{CACHE: cache})
    assert int(cache.get_seq_length()) == WIDTH + 1
    assert all(torch.equal(keys, old) for keys, old in zip(kept, before, strict=True))


def test_gradients_through_the_cache() -> None:
    model = tiny_model("llama")

    def grads(model: PreTrainedModel) -> Any:
        cache = DynamicCache(config=model.config)
        model.zero_grad()
        model.model(input_ids=IDS, attention_mask=LEFT, **{CACHE: cache})
        weights = torch.randn(cache.layers[0].keys.shape, generator=torch.manual_seed(0))
        real = LEFT[:, None, :, None]
        sum((layer.keys * weights * real).sum() for layer in cache.layers).backward()
        return [p.grad for name, p in model.named_parameters() if "k_proj" in name]

    actual, expected, rows = both(model, torch.enable_grad()(grads))
    assert rows[0].packed
    for grad, other in zip(actual, expected, strict=True):
        assert_agree(grad, other)


def test_beams() -> None:
    def generate(model: PreTrainedModel) -> Tensor:
        return model.generate(
            input_ids=IDS, attention_mask=LEFT, max_new_tokens=4, do_sample=False, num_beams=3
        )

    actual, expected, rows = both(tiny_model("llama"), generate)
    assert rows[0].packed
    assert actual.equal(expected)


# -- the choice ------------------------------------------------------------------------------------

RULES = (
    StackRule(when=StackWhen(device="cuda", min_spared_work=100), pack=True, because="a"),
    StackRule(when=StackWhen(min_padding_share=0.5), pack=True, because="b"),
    StackRule(when=StackWhen(device="cpu"), pack=False, because="c"),
)


@pytest.mark.parametrize(
    ("batch", "because"),
    [
        (("cuda", 0.1, 100), "a"),
        (("cuda", 0.5, 99), "b"),
        (("cuda", 0.49, 99), None),
        (("cpu", 0.49, 1000), "c"),
        (("cpu", 0.9, 1), "b"),
    ],
)
def test_the_first_rule_that_holds_counts(
    batch: tuple[str, int, float], because: str | None
) -> None:
    rule = stack_rule(RULES, *batch)
    assert (rule and rule.because) == because


def test_the_default_profile_has_rules_for_every_device() -> None:
    default = load(shipped_profiles() / "default.json")
    assert default.padding_free
    assert {rule.when.device for rule in default.padding_free} >= {"cpu", "cuda"}
    own = default.model_copy(update={"padding_free": ()})
    assert stack_rules(own) == default.padding_free
    assert stack_rules(default.model_copy(update={"padding_free": RULES})) == RULES


def test_it_is_skipped_where_it_does_not_pay(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    share = 1 - float(LEFT.float().mean())
    model = tiny_model("llama", "smart")
    for limit, packed in ((share - 0.01, True), (share + 0.01, False)):
        rule = StackRule(when=StackWhen(min_padding_share=limit), pack=True, because="a test")
        path = tmp_path / "profile.json"
        path.write_text(
            json.dumps(
                {
                    "schema_version": "smartattn-profile/1",
                    "name": "mine",
                    "padding_free": [rule.model_dump(exclude_none=True)],
                }
            )
        )
        smartattn.profiles.set_profile(path)
        try:
            with torch.no_grad(), padding_free(model), smartattn.trace() as trace:
                model(**inputs)
        finally:
            smartattn.profiles.set_profile(None)
        assert [row.packed for row in trace.stacks] == [packed]
        expected = ": a test" if packed else "no rule of the profile"
        assert expected in trace.stacks[0].reason
        assert trace.stacks[0].facts["padding_share"] == pytest.approx(share, abs=1e-4)
        assert f"LlamaForCausalLM: 1 forward {'packed' if packed else 'padded'}" in str(trace)


# -- installing and undoing ------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything in the instances of all modules, hooks included, by value."""
    return {
        f"{path}.{name}": dict(value) if isinstance(value, dict) else value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_parameters")
    }


def test_undone_without_a_trace() -> None:
    model = tiny_model("llama", "smart")
    classes = {module: type(module) for module in model.modules()}
    before = state_of(model)
    padding_free(model)
    assert state_of(model) != before
    padded(model)
    assert state_of(model) == before
    assert all(type(module) is kind for module, kind in classes.items())
    padded(model)
    assert state_of(model) == before


def test_for_good_and_within_a_block() -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": IDS, "attention_mask": LEFT}

    def packs() -> bool:
        with torch.no_grad(), smartattn.trace() as trace:
            model(**inputs)
        return bool(trace.stacks) and trace.stacks[0].packed

    before = state_of(model)
    with padding_free(model, always=True) as given:
        assert given is model
        assert packs()
        with padding_free(model, always=True):
            assert packs()
        assert packs()
    assert not packs()
    assert state_of(model) == before
    padding_free(model, always=True)
    assert packs()
    with padding_free(model, always=True):
        pass
    assert packs()
    padded(model)
    assert not packs()


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    with torch.no_grad(), padding_free(model, always=True):
        expected = model(**inputs).logits
        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        assert _FRAME.get() is None
        handle.remove()
        torch.testing.assert_close(model(**inputs).logits, expected)


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def test_copies_have_hooks_of_their_own() -> None:
    model = tiny_model("llama", "smart")
    with padding_free(model, always=True):
        other = copy.deepcopy(model)
    with torch.no_grad(), smartattn.trace() as trace:
        other(input_ids=IDS, attention_mask=LEFT)
    assert trace.stacks[0].packed
    padded(other)
    assert not any(module._forward_pre_hooks for module in other.modules())


def test_a_model_within_another_forward() -> None:
    """Each finds its own forward, whichever began last."""
    outer, inner = tiny_model("llama", "smart"), tiny_model("gpt2", "smart")
    expected = outer(input_ids=IDS, attention_mask=LEFT).logits.detach()
    seen = []

    def interrupt(*_: Any) -> None:
        seen.append(inner(input_ids=IDS, attention_mask=HOLES).logits)

    reference = inner(input_ids=IDS, attention_mask=HOLES).logits.detach()
    outer.model.layers[0].mlp.register_forward_hook(interrupt)
    with torch.no_grad(), padding_free(outer, always=True), padding_free(inner, always=True):
        actual = outer(input_ids=IDS, attention_mask=LEFT).logits
    assert_agree(actual, expected, where=LEFT)
    assert_agree(seen[-1], reference, where=HOLES)


def test_threads_on_one_model() -> None:
    model = tiny_model("gemma3", "smart")
    masks = [LEFT, RIGHT, MASKS["outer"], MASKS["both"]]
    expected = [model(input_ids=IDS, attention_mask=mask).logits.detach() for mask in masks]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                with torch.no_grad():
                    actual = model(input_ids=IDS, attention_mask=masks[number]).logits
                assert_agree(actual, expected[number], where=masks[number])
        except BaseException as error:
            failures.append(error)

    with padding_free(model, always=True):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_settings_of_the_forward_reach_the_packed_layers() -> None:
    model = tiny_model("llama", "smart")
    with torch.no_grad(), padding_free(model, always=True), smartattn.trace() as trace:
        model(input_ids=IDS, attention_mask=LEFT)
    assert SETTINGS.get().trace is None
    assert [row.facts["pattern"] for row in trace.rows] == ["packed causal"]
    assert trace.rows[0].calls == len(model.model.layers)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_no_more_host_reads(name: str) -> None:
    """The mask is read once per type, as without the hooks, and nothing besides."""
    model = tiny_model(name, "smart")
    counts = []
    for _ in range(2):
        with torch.no_grad(), HostReads() as counted:
            model(input_ids=IDS, attention_mask=LEFT)
        counts.append(counted.reads)
        padding_free(model, always=True)
    assert counts[0] == counts[1]


def test_index_tensors_are_made_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, **k: made.append(a) or arange(*a, **k))
    counts = []
    for layers in (2, 4):
        model = tiny_model("llama", "smart", num_hidden_layers=layers)
        with torch.no_grad(), padding_free(model, always=True):
            made.clear()
            model(input_ids=IDS, attention_mask=LEFT)
        counts.append(len(made))
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_compiled_models_run_as_before() -> None:
    model = tiny_model("llama", "smart")
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    with torch.no_grad():
        expected = model(**inputs).logits
        with padding_free(model, always=True):
            compiled = torch.compile(model, backend="eager")
            assert_agree(compiled(**inputs).logits, expected, where=LEFT)


# -- architectures ---------------------------------------------------------------------------------


#: Each stands for a way to build a stack: shared layers, view after the norm, experts, ...
SAMPLE = (
    "AlbertForMaskedLM",
    "OPTForCausalLM",
    "GPTNeoXForCausalLM",
    "MixtralForCausalLM",
    "DistilBertForMaskedLM",
    "PhiForCausalLM",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_sweep(name: str) -> None:
    """All of them: python -m tests.padding_free_sweep."""
    [architecture] = choose([name], None)
    found = examine(architecture)
    verdicts = {scenario: verdict for scenario, (verdict, _) in found["scenarios"].items()}
    assert set(verdicts.values()) <= {AGREE, REFUSED, "-"}, found
    assert [verdicts[side] for side in ("right", "left", "holes", "zeros")] == [AGREE] * 4
    assert verdicts.keys() == SCENARIOS.keys()


# -- the benchmark ---------------------------------------------------------------------------------


def test_the_benchmark_on_tiny_models() -> None:
    device = torch.device("cpu")
    models = {}
    for workload in benchmark.tiny_workloads():
        model = models.setdefault(workload.model, build(workload.model, device, torch.float32))
        result = benchmark.measure(workload, model, device, rounds=1, seconds=0.0, always=True)
        assert result.packed
        assert result.median_ms.keys() >= {"sdpa", "smart", benchmark.PADDING_FREE, benchmark.IDEAL}
        # The ideal computes the same as the padded batch, or it would be no measure of it.
        assert max(result.difference.values()) < 1e-4
        assert "first-token" in workload.name or result.chosen[benchmark.IDEAL] == "sdpa_unpadded"
        assert len(benchmark.table([result]).splitlines()) == 3
        assert result.speedup is not None


# -- what it costs on the host --------------------------------------------------------------------


def python_calls(run: Callable[[], object]) -> int:
    """Python functions that a call enters, once everything is cached."""
    for _ in range(3):
        run()
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def more_calls(layers: int, mask: Tensor, always: bool) -> int:
    """Python calls that a forward makes more because of ``padding_free``."""
    config = tiny_config("bert")
    config.num_hidden_layers = layers
    model = from_config("BertModel", config, "smart").eval()

    @torch.no_grad()
    def run() -> None:
        model(input_ids=IDS, attention_mask=mask)

    plain = python_calls(run)
    with padding_free(model, always=always):
        return python_calls(run) - plain


NO_PADDING = torch.ones_like(RIGHT)


@pytest.mark.parametrize("mask", [NO_PADDING, RIGHT], ids=["unpadded", "padded"])
def test_layers_of_a_forward_that_is_not_packed_pay_nothing(mask: Tensor) -> None:
    few, many = more_calls(2, mask, False), more_calls(6, mask, False)
    # What Python itself does now and then is counted too: less than one call per layer.
    assert abs(many - few) < 4
    assert few <= 80


def test_layers_of_a_packed_forward_pay_little() -> None:
    # The same backend on both sides: what its kernels cost is not the question.
    with smartattn.use(backends="sdpa_unpadded"), smartattn.trace() as trace:
        few, many = more_calls(2, RIGHT, True), more_calls(6, RIGHT, True)
    assert all(row.packed for row in trace.stacks)
    assert (many - few) / 4 <= 11


def test_later_layers_get_hooks_once_a_batch_is_packed() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("smart")
    layers = model.model.layers

    def hooked() -> list[bool]:
        return [bool(layer._forward_pre_hooks) for layer in layers]

    def run(mask: Tensor) -> None:
        with torch.no_grad():
            model(input_ids=IDS, attention_mask=mask)

    first = [True] + [False] * (len(layers) - 1)
    with padding_free(model, always=True):
        run(NO_PADDING)
        assert hooked() == first
        run(RIGHT)
        assert all(hooked())
        # A backward may yet come to the packed layers.
        run(NO_PADDING)
        with padding_free(model):
            assert hooked() == first
        assert all(hooked())
    assert not any(hooked())


def test_a_first_layer_that_is_skipped_does_not_decide() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("smart")
    with padding_free(model, always=True), torch.no_grad():
        layers = model.model.layers
        model.model.layers = layers[1:]
        with smartattn.trace() as trace:
            for _ in range(2):
                model(input_ids=IDS, attention_mask=RIGHT)
        model.model.layers = layers
    assert [row.packed for row in trace.stacks] == [False, True]


def test_arguments_of_a_forward_do_not_outlive_it() -> None:
    """A cache held by the plan of a mask would keep its memory until a collection of cycles."""
    model = tiny_model("llama")
    model.set_attn_implementation("smart")
    gc.collect()
    gc.disable()
    try:
        with padding_free(model, always=True), torch.no_grad():
            cache = model(input_ids=IDS, attention_mask=RIGHT)[CACHE]
            alive = weakref.ref(cache)
            del cache
            assert alive() is None
    finally:
        gc.enable()


# -- forwards that other threads, copies and signals come into -------------------------------------


#: The package's attribute of that name is the function.
module = importlib.import_module("smartattn.padding_free")


def stack_reasons(model: Any, **arguments: Any) -> list[str]:
    with torch.no_grad(), smartattn.trace() as trace:
        model(input_ids=IDS, attention_mask=RIGHT, **arguments)
    return [f"{'packed' if row.packed else 'padded'}: {row.reason}" for row in trace.stacks]


def test_a_replica_of_data_parallel_runs_padded() -> None:
    """Its arguments are not read, such as labels whose loss counts padding."""
    model = tiny_model("llama")
    model.set_attn_implementation("smart")
    with padding_free(model, always=True):
        assert stack_reasons(model)[0].startswith("packed")
        replica = model._replicate_for_data_parallel()
        replica.model = model.model
        assert stack_reasons(replica) == ["padded: a replica of the model"]
        assert stack_reasons(model.model)[0].startswith("packed")


def test_a_forward_that_ctrl_c_ended_leaves_nothing_behind(monkeypatch: Any) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("smart")

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with padding_free(model, always=True):
        expected = stack_reasons(model)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stack_reasons(model)
        assert stack_reasons(model) == expected


def test_hooks_that_are_removed_during_a_forward_leave_it_padded(monkeypatch: Any) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("smart")
    with torch.no_grad():
        plain = model(input_ids=IDS, attention_mask=RIGHT)[0]
    padding_free(model, always=True)
    worth = module.worth

    def undone(*args: Any) -> Any:
        smartattn.padded(model)
        return worth(*args)

    monkeypatch.setattr(module, "worth", undone)
    with torch.no_grad(), smartattn.trace() as trace:
        output = model(input_ids=IDS, attention_mask=RIGHT)[0]
    assert [row.reason for row in trace.stacks] == ["padding_free was undone during this forward"]
    assert torch.equal(output[RIGHT.bool()], plain[RIGHT.bool()])
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    # The hooks that would have closed it are gone.
    module._FRAME.set(None)


def test_a_hook_that_torch_has_half_registered_does_nothing() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("smart")
    with padding_free(model, always=True):
        hooks = vars(model)[module._ATTRIBUTE]
        assert hooks._before_layer(model.model.layers[0], (IDS,)) is None


@pytest.mark.parametrize("how", ["compile", "forward"])
@torch.no_grad()
def test_layers_that_are_compiled_by_themselves_stay_padded(how: str) -> None:
    model = tiny_model("llama", "smart")
    expected = model(input_ids=IDS, attention_mask=LEFT).logits
    layer = model.model.layers[1]
    if how == "compile":
        layer.compile(backend="eager")
    else:
        layer.forward = torch.compile(layer.forward, backend="eager")
    with padding_free(model, always=True), smartattn.trace() as trace:
        found = model(input_ids=IDS, attention_mask=LEFT).logits
    assert_agree(found, expected, where=LEFT)
    assert "a layer is compiled by itself" in trace.stacks[0].reason
