"""Builds one architecture and puts it through the scenarios under each implementation."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .architectures import Architecture
from .compare import all_finite, compare
from .inputs import INPUT_KINDS
from .scenarios import (
    SCENARIOS,
    NotApplicable,
    Results,
    Scenario,
    Subject,
    full_mask,
    left_mask,
    masked,
)
from .tiny import tiny_config

REFERENCE = "eager"
BASELINE = "sdpa"
# Registered for every architecture beside the tested implementation: tells a model that refuses any
# name it does not know, and one that never calls the interface, from a fault of the tested one.
CONTROL = "sweep_control"
MAX_PARAMETERS = 12_000_000
ATTENTION_CLASS = re.compile("[Aa]ttention|Attn|MLA")

AGREE, DISAGREE, ERROR, SKIP, REJECTED = "agree", "disagree", "error", "skip", "rejected"


@dataclass
class Verdict:
    """How one implementation did in one scenario. `rejected`: the model would not load with it."""

    verdict: str
    figure: float | None = None
    reason: str = ""


@dataclass
class Examination:
    """Everything found out about one architecture, ready for JSON."""

    model_types: list[str]
    kind: str
    built: bool = False
    reason: str = ""
    inputs: str = ""
    parameters: int = 0
    seconds: float = 0.0
    interface_calls: int | None = None
    padding_matters: bool | None = None
    scenarios: dict[str, dict[str, Verdict]] = field(default_factory=dict)


class NotBuilt(Exception):
    """The architecture cannot take part, for the reason given."""


def prepare_worker(implementation: str) -> None:
    """Once per worker process: one thread, no warnings, the tested implementation registered."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    register(implementation)


def register(implementation: str) -> None:
    """Makes the tested implementation known to Transformers: importing smartattn does it."""
    if implementation == "smart":
        importlib.import_module("smartattn")


def examine(
    architecture: Architecture, implementation: str, scenarios: Sequence[str]
) -> dict[str, Any]:
    """The examination of one architecture as a plain dictionary."""
    started = time.perf_counter()
    record = Examination(list(architecture.model_types), architecture.kind)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _save_tiny_model(architecture, Path(folder), record)
            _run_scenarios(architecture, Path(folder), implementation, scenarios, record)
        except NotBuilt as refusal:
            record.reason = str(refusal)
    record.seconds = round(time.perf_counter() - started, 2)
    return asdict(record)


def _save_tiny_model(architecture: Architecture, folder: Path, record: Examination) -> None:
    try:
        model_class = architecture.model_class()
        config = tiny_config(model_class.config_class)
        if architecture.kind == "causal" and hasattr(config, "is_decoder"):
            config.is_decoder = True
        record.parameters = _count_parameters(model_class, config)
        if record.parameters > MAX_PARAMETERS:
            raise NotBuilt(f"{record.parameters / 1e6:.0f}M parameters even when shrunk")
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation=REFERENCE)
        if not any(ATTENTION_CLASS.search(type(module).__name__) for module in model.modules()):
            raise NotBuilt("has no attention")
        model.save_pretrained(folder)
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"building: {_describe(error)}") from error


def _count_parameters(model_class: type[PreTrainedModel], config: Any) -> int:
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation=REFERENCE)
    return sum(parameter.numel() for parameter in model.parameters())


def _load(architecture: Architecture, folder: Path, implementation: str) -> PreTrainedModel:
    model_class = architecture.model_class()
    model = model_class.from_pretrained(
        folder, attn_implementation=implementation, dtype=torch.float32
    )
    return model.eval()


def _run_scenarios(
    architecture: Architecture,
    folder: Path,
    implementation: str,
    scenarios: Sequence[str],
    record: Examination,
) -> None:
    try:
        reference_model = _load(architecture, folder, REFERENCE)
    except Exception as error:
        raise NotBuilt(f"loading under eager: {_describe(error)}") from error
    subject = _find_inputs(reference_model)
    record.built = True
    record.inputs = subject.kind.name

    models: dict[str, PreTrainedModel | Verdict] = {}
    for name in dict.fromkeys((BASELINE, implementation)):
        models[name] = _load_same_weights(architecture, folder, name, reference_model)
    record.interface_calls = _count_interface_calls(architecture, folder, subject)
    tested = models[implementation]
    accepts_other_names = record.interface_calls is not None
    if isinstance(tested, Verdict) and implementation != BASELINE and accepts_other_names:
        models[implementation] = Verdict(ERROR, reason=f"loading: {tested.reason}")
    record.padding_matters = _padding_matters(subject, reference_model)
    for name in scenarios:
        record.scenarios[name] = run_scenario(SCENARIOS[name], subject, reference_model, models)


def _find_inputs(model: PreTrainedModel) -> Subject:
    """The first kind of input that the model runs with."""
    failures = []
    for kind in INPUT_KINDS:
        if not kind.suits(model):
            continue
        try:
            subject = Subject(kind, kind.make(model))
            with torch.no_grad():
                SCENARIOS["no_mask"].run(subject, model)
        except Exception as error:
            failures.append(f"{kind.name}: {_describe(error)}")
        else:
            return subject
    if not failures:
        raise NotBuilt(f"no inputs known for {', '.join(_required_parameters(model))}")
    raise NotBuilt(f"running under eager: {failures[0]}")


def _required_parameters(model: PreTrainedModel) -> list[str]:
    signature = inspect.signature(model.forward)
    named = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [p.name for p in named if p.default is p.empty] or [p.name for p in named[:1]]


def _load_same_weights(
    architecture: Architecture, folder: Path, name: str, reference_model: PreTrainedModel
) -> PreTrainedModel | Verdict:
    """The model under another implementation, or why it does not load or does not keep it."""
    try:
        model = _load(architecture, folder, name)
    except Exception as error:
        return Verdict(REJECTED, reason=_describe(error))
    # Whatever is missing in the files was drawn at random a second time.
    model.load_state_dict(reference_model.state_dict())
    if model.config._attn_implementation != name:
        kept = model.config._attn_implementation
        return Verdict(REJECTED, reason=f"falls back to {kept} at load")
    return model


def _count_interface_calls(
    architecture: Architecture, folder: Path, subject: Subject
) -> int | None:
    """How often one forward calls a registered attention function; None if no name is accepted."""
    calls = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register(CONTROL, counting)
    AttentionMaskInterface.register(CONTROL, sdpa_mask)
    try:
        model = _load(architecture, folder, CONTROL)
    except Exception:
        return None
    with torch.no_grad(), contextlib.suppress(Exception):
        SCENARIOS["no_mask"].run(subject, model)
    return calls


def _padding_matters(subject: Subject, model: PreTrainedModel) -> bool | None:
    """Whether eager's answers at real positions change when the padding is unmasked.

    None where it cannot be told. Where False, the scenarios with padding prove little.
    """
    try:
        with torch.no_grad():
            honoured = masked(left_mask)(subject, model)
            ignored = masked(left_mask, shown=full_mask)(subject, model)
    except Exception:
        return None
    return not compare(honoured, ignored, tolerance=1e-3).agrees


def run_scenario(
    scenario: Scenario,
    subject: Subject,
    reference_model: PreTrainedModel,
    models: Mapping[str, PreTrainedModel | Verdict],
) -> dict[str, Verdict]:
    """The verdict on each implementation in one scenario; all skipped where eager is no judge."""
    try:
        with torch.no_grad():
            expected = (scenario.reference or scenario.run)(subject, reference_model)
    except NotApplicable as reason:
        return _skip_all(models, str(reason))
    except Exception as error:
        return _skip_all(models, f"eager: {_describe(error)}")
    if not all_finite(expected):
        return _skip_all(models, "eager gives NaN or infinity")
    verdicts = {
        name: model if isinstance(model, Verdict) else _judge(scenario, subject, model, expected)
        for name, model in models.items()
    }
    if scenario.reference and verdicts[BASELINE].verdict == REJECTED:
        own = _judge(scenario, subject, reference_model, expected)
        if own.verdict != AGREE:
            return _skip_all(models, "knows only eager, which takes the input amiss")
    if any(verdict.verdict == DISAGREE for verdict in verdicts.values()):
        again = replace(scenario, run=scenario.reference or scenario.run)
        if _judge(again, subject, reference_model, expected).verdict != AGREE:
            return _skip_all(models, "eager does not agree with itself when repeated")
    return verdicts


def _skip_all(names: Iterable[str], reason: str) -> dict[str, Verdict]:
    return {name: Verdict(SKIP, reason=reason) for name in names}


def _judge(
    scenario: Scenario, subject: Subject, model: PreTrainedModel, expected: Results
) -> Verdict:
    try:
        with torch.no_grad():
            actual = scenario.run(subject, model)
    except Exception as error:
        return Verdict(ERROR, reason=_describe(error))
    comparison = compare(
        expected, actual, tolerance=scenario.tolerance, common_scale=scenario.common_scale
    )
    verdict = AGREE if comparison.agrees else DISAGREE
    return Verdict(verdict, comparison.figure, comparison.reason)


def _describe(error: BaseException) -> str:
    """One line: the error's type, its message, and the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:200]}{place}"
