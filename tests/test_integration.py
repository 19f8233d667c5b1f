"""Registration, loading, switching, host reads of a forward, and the version that is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import smartattn
from smartattn import integration

from .agreement import (
    CACHE,
    MASKS,
    WIDTH,
    assert_agree,
    assert_differ,
    run,
    set_implementation,
    spans,
)
from .tiny_models import EOS, PAD, from_config, tiny_config, tiny_model, token_ids

# -- registration ----------------------------------------------------------------------------------


def test_importing_registers_both_functions() -> None:
    """A name that stands in the first registry alone gets no mask at all, whatever the batch."""
    assert AttentionInterface()["smart"] is integration.smart_attention
    assert AttentionMaskInterface()["smart"] is integration.smart_mask
    assert "smart" in ALL_ATTENTION_FUNCTIONS.valid_keys()


def test_registering_again_changes_nothing() -> None:
    others = {name: function for name, function in AttentionInterface().items() if name != "smart"}
    smartattn.register()
    assert AttentionInterface()["smart"] is integration.smart_attention
    assert {n: f for n, f in AttentionInterface().items() if n != "smart"} == others


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own that finds smartattn where this one does."""
    source = str(Path(smartattn.__file__).resolve().parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "PYTHONPATH": source, **environment},
    )


@pytest.mark.slow
def test_nothing_of_transformers_is_patched() -> None:
    """All functions of the modules that smartattn touches are the ones that were there before."""
    code = """
import transformers, json
from transformers import masking_utils, modeling_utils, cache_utils, AttentionInterface
from transformers.integrations import sdpa_attention
import torch

modules = (masking_utils, modeling_utils, cache_utils, sdpa_attention, torch.nn.functional)
snapshot = [dict(vars(module)) for module in modules]
methods = dict(vars(modeling_utils.PreTrainedModel))
import smartattn

for module, before in zip(modules, snapshot):
    changed = [name for name in before if vars(module).get(name) is not before[name]]
    assert not changed, (module.__name__, changed)
now = vars(modeling_utils.PreTrainedModel)
assert all(now[name] is value for name, value in methods.items())
print("untouched")
"""
    result = run_python(code)
    assert result.stdout.strip() == "untouched", result.stderr


@pytest.mark.parametrize("installed", ["5.16.9", None])
def test_an_old_transformers_is_named_at_import(installed: str | None) -> None:
    code = f"""
from importlib import metadata
real = metadata.version
def version(name):
    if name != "transformers":
        return real(name)
    if {installed!r} is None:
        raise metadata.PackageNotFoundError(name)
    return {installed!r}
metadata.version = version
try:
    import smartattn
except ImportError as error:
    print(error)
"""
    message = run_python(code).stdout
    found = "transformers 5.16.9 is installed" if installed else "transformers is not installed"
    assert found in message
    assert f"needs transformers>={smartattn.MINIMUM_TRANSFORMERS}" in message
    assert f"pip install 'transformers>={smartattn.MINIMUM_TRANSFORMERS}'" in message


# -- loading and switching -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of single words, saved to disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    words = {"<pad>": PAD, "<s>": 1, "</s>": EOS, **{f"w{i}": i for i in range(EOS + 1, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    ).save_pretrained(folder)
    return folder


def test_from_pretrained(checkpoint: Path) -> None:
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}
    outputs = {}
    for implementation in ("eager", "smart"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        with torch.no_grad(), smartattn.trace() as trace:
            outputs[implementation] = model(**inputs).logits
        assert bool(trace.rows) == (implementation == "smart")
    assert_agree(outputs["smart"], outputs["eager"], where=MASKS["left"])


def test_set_attn_implementation_there_and_back() -> None:
    model = tiny_model("llama", "sdpa")
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}
    first = run(model, "sdpa", **inputs)
    for implementation in ("smart", "eager", "smart", "sdpa"):
        with smartattn.trace() as trace:
            output = run(model, implementation, **inputs)
        assert sum(row.calls for row in trace.rows) == (2 if implementation == "smart" else 0)
        assert_agree(output, first, where=MASKS["left"])
    assert torch.equal(run(model, "sdpa", **inputs), first)


def test_a_pipeline(checkpoint: Path) -> None:
    prompts = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13"]
    answers = {}
    for implementation in ("eager", "smart"):
        generate = pipeline(
            "text-generation",
            model=str(checkpoint),
            model_kwargs={"attn_implementation": implementation},
            device="cpu",
            batch_size=3,
        )
        assert generate.model.config._attn_implementation == implementation
        with smartattn.trace() as trace:
            answers[implementation] = generate(prompts, max_new_tokens=5, do_sample=False)
        assert bool(trace.rows) == (implementation == "smart")
        if trace.rows:
            assert trace.rows[0].facts["padding"] == "left"
    assert answers["smart"] == answers["eager"]


# -- models of several parts -----------------------------------------------------------------------


def llava(implementation: str | dict[str, str]) -> Any:
    """A vision tower without masks, and a Llama that sees its patches as four tokens."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=tiny_config("llama"),
        image_token_index=63,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return from_config("LlavaForConditionalGeneration", config, implementation)


def image_inputs() -> dict[str, torch.Tensor]:
    ids = token_ids(2, WIDTH).clamp(max=62)
    ids[:, 4:8] = 63
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = spans((0, WIDTH), (3, WIDTH))
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}


@pytest.mark.parametrize(
    ("implementation", "patterns"),
    [
        ("smart", {"causal", "bidirectional"}),
        ({"": "sdpa", "text_config": "smart", "vision_config": "sdpa"}, {"causal"}),
        ({"": "eager", "text_config": "eager", "vision_config": "smart"}, {"bidirectional"}),
        ({"text_config": "sdpa", "vision_config": "eager"}, set()),
    ],
    ids=["all", "text", "vision", "neither"],
)
@pytest.mark.parametrize("switched", [False, True])
def test_parts_of_a_multimodal_model(
    implementation: str | dict[str, str], patterns: set[str], switched: bool
) -> None:
    inputs = image_inputs()
    with torch.no_grad():
        expected = llava("eager")(**inputs).logits
        if switched:
            model = llava("eager")
            model.set_attn_implementation(implementation)
        else:
            model = llava(implementation)
        with smartattn.trace() as trace:
            actual = model(**inputs).logits
    assert_agree(actual, expected, where=inputs["attention_mask"])
    assert {row.facts["pattern"] for row in trace.rows} == patterns


def test_images_change_what_the_test_above_compares() -> None:
    inputs = image_inputs()
    with torch.no_grad():
        model = llava("eager")
        some = model(**inputs).logits
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert_differ(some, other)


# -- host reads ------------------------------------------------------------------------------------


class HostReads(torch.overrides.TorchFunctionMode):
    """Records what would make the host wait for a GPU, by which of our two functions asked for it.

    A copy to the host is one read; what is then done with the copy costs nothing more.
    """

    READS = frozenset(
        {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal"}
        | {"nonzero", "masked_select", "unique", "unique_consecutive", "argwhere", "__array__"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, str]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        on_host = any(isinstance(argument, OnHost) for argument in args)
        result = function(*args, **kwargs)
        if on_host:
            return result
        # A device object is wherever the batch is, here the same CPU; the word names the host.
        words = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, str)]
        to_host = name == "cpu" or (name == "to" and "cpu" in words)
        selects = name == "__getitem__" and _has_boolean(args[1])
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        if to_host or name in self.READS or selects or (repeats and _has_tensor(args[1:])):
            place = _who_asks()
            if place:
                self.reads.append((place, name))
            if to_host and place and isinstance(result, torch.Tensor):
                return result.as_subclass(OnHost)
        return result


class OnHost(torch.Tensor):
    """A tensor that has been read already."""


def _has_tensor(arguments: Any) -> bool:
    return any(isinstance(argument, torch.Tensor) for argument in arguments)


def _has_boolean(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, torch.Tensor) and p.dtype == torch.bool for p in parts)


def _who_asks() -> str | None:
    names = [frame.name for frame in traceback.extract_stack()]
    for place in ("smart_mask", "smart_attention"):
        if place in names:
            return place
    return None


def reads_of(model: Any, **inputs: Any) -> Counter[str]:
    set_implementation(model, "smart")
    with torch.no_grad(), HostReads() as counted:
        model(**inputs)
    return Counter(place for place, _ in counted.reads)


#: Mask types of a forward, which is how often the mask function is called.
MASK_TYPES = {"llama": 1, "mistral": 1, "gemma3": 2, "gemma2": 2, "bert": 1, "modernbert": 2}


@pytest.mark.parametrize("backends", [None, "sdpa", "sdpa_unpadded"])
@pytest.mark.parametrize("padding", ["ones", "right", "left", "both", "holes", "empty_row"])
@pytest.mark.parametrize("name", MASK_TYPES)
def test_one_host_read_per_mask_type_and_none_in_layers(
    name: str, padding: str, backends: str | None
) -> None:
    if backends and (name == "gemma2" or padding in ("ones", "holes")):
        backends = None  # softcap is for eager alone, and sdpa_unpadded takes padding at the edges
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS[padding]}
    model = tiny_model(name)
    with smartattn.use(backends=backends), smartattn.trace() as trace:
        reads = reads_of(model, **inputs)
    assert reads["smart_attention"] == 0
    assert reads["smart_mask"] <= MASK_TYPES[name]
    assert backends is None or {row.backend for row in trace.rows} == {backends}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_host_reads_without_a_mask(name: str, packed: bool, use_cache: bool, batch: int) -> None:
    """Position ids may have to be read once; more layers cost no more."""
    positions = torch.cat([torch.arange(5), torch.arange(7)]) if packed else torch.arange(WIDTH)
    inputs = {
        "input_ids": token_ids(batch, WIDTH),
        "position_ids": positions.expand(batch, -1),
        "use_cache": use_cache,
    }
    counts = []
    for layers in (2, 4):
        changes: dict[str, Any] = {"num_hidden_layers": layers}
        if name == "gemma3":
            changes["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
        counts.append(sum(reads_of(tiny_model(name, **changes), **inputs).values()))
    assert counts[0] == counts[1] <= MASK_TYPES[name]


def test_host_reads_of_a_decode_step() -> None:
    model = tiny_model("llama")
    cache = transformers.DynamicCache(config=model.config)
    ids, mask = token_ids(3, WIDTH), MASKS["left"]
    run(model, "eager", input_ids=ids[:, :-1], attention_mask=mask[:, :-1], **{CACHE: cache})
    step = {"input_ids": ids[:, -1:], "attention_mask": mask, CACHE: cache}
    reads = reads_of(model, **step)
    assert reads["smart_attention"] == 0
    assert reads["smart_mask"] <= 1


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.item(),
        lambda t: t.tolist(),
        bool,
        int,
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: t.numpy(),
        lambda t: t.expand(3).nonzero(),
        lambda t: torch.equal(t, t),
        lambda t: t.expand(3)[t.expand(3) > 0],
        lambda t: torch.arange(1)[t.bool()],
    ],
)
def test_the_counter_counts(read: Callable[[torch.Tensor], Any]) -> None:
    def smart_attention() -> None:
        read(torch.tensor(1))

    with HostReads() as counted:
        smart_attention()
        read(torch.tensor(1))
    assert [place for place, _ in counted.reads] == ["smart_attention"]


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["none", "ones", "right", "left", "holes"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layers_never_wait_for_the_gpu(name: str, padding: str) -> None:
    """torch itself says where the host waits."""
    mask = None if padding == "none" else MASKS[padding].cuda()
    model = tiny_model(name, "smart", torch.bfloat16, hidden_size=128, head_dim=32).cuda()
    ids = token_ids(3, WIDTH).cuda()
    with torch.no_grad():
        model(ids, attention_mask=mask)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(ids, attention_mask=mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    ours = [w for w in waits if "smartattn" in Path(w.filename).parts]
    assert len(ours) <= 1, [f"{w.filename}:{w.lineno}" for w in ours]


# -- output_attentions -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_output_attentions_is_like_sdpas(name: str) -> None:
    """No weights, and everything else as without them: eager is what computes weights."""
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}
    model = tiny_model(name)
    results = {}
    for implementation in ("eager", "sdpa", "smart"):
        set_implementation(model, implementation)
        with torch.no_grad():
            results[implementation] = model(**inputs, output_attentions=True)
    attentions = results["smart"].attentions
    assert attentions is None or all(weights is None for weights in attentions)
    assert (attentions is None) == (results["sdpa"].attentions is None)
    assert attentions is None or len(attentions) == len(results["sdpa"].attentions)
    assert_agree(results["smart"][0], results["eager"][0], where=MASKS["left"])


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "deepseek_v32"])
def test_output_attentions_forgets_no_argument(name: str, padding: str | None) -> None:
    """Sinks, softcaps and chosen keys are none of sdpa's: the answer is eager's all the same."""
    if name == "deepseek_v32" and not hasattr(transformers, "DeepseekV32ForCausalLM"):
        pytest.skip("this Transformers has no DeepSeek-V3.2")
    model = tiny_model(name)
    if name == "gpt_oss":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    mask = None if padding is None else MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    expected = run(model, "eager", **inputs)
    assert_agree(run(model, "smart", **inputs, output_attentions=True), expected, where=mask)
    # Without them the answer is another one.
    changes = {"gemma2": {"attn_logit_softcapping": None}, "deepseek_v32": {"index_topk": WIDTH}}
    without = tiny_model(name, **changes.get(name, {}))
    if name == "gpt_oss":
        for layer in without.model.layers:
            torch.nn.init.constant_(layer.self_attn.sinks, -1e4)
    assert_differ(run(without, "eager", **inputs), expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_output_attentions_sees_the_bounds_of_sequences(name: str) -> None:
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    inputs = {"input_ids": token_ids(1, 12), "position_ids": torch.arange(12)[None]}
    model = tiny_model(name)
    expected = run(model, "smart", **inputs, **packed)
    assert_agree(run(model, "smart", **inputs, **packed, output_attentions=True), expected)
    assert_differ(run(model, "smart", **inputs), expected)


def test_output_attentions_in_the_configuration_is_refused_like_sdpas(checkpoint: Path) -> None:
    messages = {}
    for implementation in ("sdpa", "smart"):
        with pytest.raises((ValueError, StrictDataclassError), match="output_attentions") as raised:
            AutoModelForCausalLM.from_pretrained(
                checkpoint, attn_implementation=implementation, output_attentions=True
            )
        messages[implementation] = str(raised.value).replace(implementation, "*")
    assert messages["smart"] == messages["sdpa"]


# -- what a trace says -----------------------------------------------------------------------------


def test_the_trace_of_a_model_is_plain_data() -> None:
    with smartattn.trace() as trace:
        run(
            tiny_model("gemma3"),
            "smart",
            input_ids=token_ids(3, WIDTH),
            attention_mask=MASKS["left"],
        )
    rows = json.loads(json.dumps(trace.as_dicts()))
    assert [row["facts"]["window"] for row in rows] == [5, None]
    assert all(row["facts"]["padding"] == "left" for row in rows)
    assert all(row["facts"]["real_tokens"] == int(MASKS["left"].sum()) for row in rows)
    assert [row["calls"] for row in rows] == [1, 1]
    assert str(trace).count("\n") == 3


def test_a_none_mask_remembers_few_choices_and_asks_the_profile_in_force() -> None:
    """The plan of a None mask is shared by all forwards of one shape, so it must not grow."""
    from smartattn import integration, profiles
    from smartattn.plan import Pattern
    from smartattn.shared_plans import shared_plan

    layer = tiny_model("bert", "smart").encoder.layer[0].attention.self
    states = [torch.randn(1, 4, 6, 8) for _ in range(3)]
    for _ in range(3 * integration._MAX_CHOICES):
        with smartattn.trace():
            integration.smart_attention(layer, *states, None)
    device = torch.device("cpu")
    in_force = profiles.profile_for(device)
    plan = shared_plan(1, 6, 6, Pattern.BIDIRECTIONAL, device)
    assert 0 < len(plan.decisions) <= integration._MAX_CHOICES
    try:
        profiles.set_profile(None)
        assert profiles.profile_for(device) is not in_force
        with smartattn.trace() as trace:
            integration.smart_attention(layer, *states, None)
        assert len(trace.rows) == 1
        fresh = shared_plan(1, 6, 6, Pattern.BIDIRECTIONAL, device)
        assert fresh is not plan
        assert len(fresh.decisions) == 1
    finally:
        profiles.set_profile(None)
