"""Every architecture that padding_free knows, against its own padded self under eager attention.

``python -m tests.padding_free_sweep`` writes docs/reports/padding_free.md. With ``--discover`` it
tries the architectures of Transformers that are not known, as if they were: one that agrees in all
scenarios may be added to ``smartattn.stacks.STACKS`` once its code has been read.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import smartattn
from smartattn import stack_choice, stacks

from .agreement import output_of
from .sweep.architectures import Architecture, all_architectures, choose
from .sweep.compare import compare
from .sweep.inputs import token_ids
from .sweep.pool import run_jobs
from .sweep.tiny import tiny_config

REPORT = Path(__file__).resolve().parents[1] / "docs" / "reports" / "padding_free.md"
TOLERANCE = 1e-4
#: Gradients of weights that cancel in exact arithmetic are noise: see ``compare``.
COMMON_SCALE = 1e-2
NEW_TOKENS = 4
BATCH, LENGTH = 3, 20
AGREE, REFUSED, WRONG = "agrees", "refused", "WRONG"

Results = dict[str, Tensor]


def mask_of(side: str) -> Tensor:
    """(BATCH, LENGTH) mask with a full row, a half and a short one."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row, padding in ((1, 9), (2, 16)):
        mask[row, slice(None, padding) if side == "left" else slice(LENGTH - padding, None)] = 0
    if side == "holes":
        mask[:] = 1
        mask[1, [4, 5, 11]] = 0
        mask[2, [1, 2, 9, 17, 19]] = 0
    return mask


def forward(model: PreTrainedModel, side: str) -> Results:
    """The outputs at real tokens."""
    mask = mask_of(side)
    with torch.no_grad():
        output = output_of(model(input_ids=token_ids(), attention_mask=mask))
    assert output.shape[:2] == mask.shape, f"an output of shape {tuple(output.shape)}"
    return {"output": output[mask.bool()]}


def zeros(model: PreTrainedModel) -> Results:
    """What the model without its head gives, with zeros at padding."""
    mask = mask_of("right")
    base = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        states = base(input_ids=token_ids(), attention_mask=mask).last_hidden_state
    if model.config._attn_implementation == "eager":
        states = states * mask[:, :, None]
    return {"last hidden state": states}


def hidden_states(model: PreTrainedModel) -> Results:
    """Every hidden state at real tokens."""
    mask = mask_of("right")
    with torch.no_grad():
        result = model(input_ids=token_ids(), attention_mask=mask, output_hidden_states=True)
    states = result.hidden_states
    assert len(states) > 1
    return {f"hidden state {i}": state[mask.bool()] for i, state in enumerate(states)}


def gradients(model: PreTrainedModel, checkpointing: bool = False) -> Results:
    """Loss and gradients of a training step whose labels leave the padding out."""
    mask, ids = mask_of("right"), token_ids()
    model.train()
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if hasattr(model.config, "use_cache"):
            inputs["use_cache"] = False
        if "labels" in model.forward.__code__.co_varnames or model.get_output_embeddings():
            loss = model(**inputs, labels=ids.masked_fill(mask == 0, -100)).loss
        else:
            loss = output_of(model(**inputs))[mask.bool()].square().mean()
        loss.backward()
    finally:
        model.eval()
        if checkpointing:
            model.gradient_checkpointing_disable()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()[None], **found}


def generate(model: PreTrainedModel) -> Results:
    """The logits of every new token after a left-padded batch of prompts."""
    if not model.can_generate():
        raise NotImplementedError("does not generate")
    with torch.no_grad():
        result = model.generate(
            input_ids=token_ids(),
            attention_mask=mask_of("left"),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    tokens = result.sequences[:, LENGTH:].float()
    return {"tokens": tokens, "logits": torch.stack(result.logits)}


SCENARIOS: dict[str, Callable[[PreTrainedModel], Results]] = {
    "right": functools.partial(forward, side="right"),
    "left": functools.partial(forward, side="left"),
    "holes": functools.partial(forward, side="holes"),
    "zeros": zeros,
    "hidden states": hidden_states,
    "gradients": gradients,
    "checkpointing": functools.partial(gradients, checkpointing=True),
    "generate": generate,
}


@dataclass
class Examination:
    """What became of one architecture."""

    name: str
    stack: str = ""
    #: Why padding_free does not take it, or why it could not be built.
    refused: str = ""
    #: Scenario to (verdict, relative error or reason).
    scenarios: dict[str, tuple[str, Any]] = field(default_factory=dict)

    @property
    def is_supported(self) -> bool:
        """It was packed in some scenario, and nothing disagrees."""
        verdicts = [verdict for verdict, _ in self.scenarios.values()]
        return AGREE in verdicts and WRONG not in verdicts


def examine(architecture: Architecture, discover: bool = False) -> dict[str, Any]:
    """One architecture through all scenarios, as a plain dictionary."""
    record = Examination(architecture.name)
    known = stacks.STACKS
    try:
        model = _build(architecture)
        if discover:
            known = known | _stack_like(model)
        with mock.patch.object(stacks, "STACKS", known):
            stack = stacks.find_stack(model)
        record.stack = stacks.qualified_name(stack.module) or ""
    except Exception as error:
        record.refused = _line(error)
        return asdict(record)
    for name, run in SCENARIOS.items():
        record.scenarios[name] = _scenario(model, run, known)
    return asdict(record)


def _scenario(
    model: PreTrainedModel, run: Callable[[PreTrainedModel], Results], known: frozenset[str]
) -> tuple[str, Any]:
    model.set_attn_implementation("eager")
    try:
        torch.manual_seed(0)
        expected = run(model)
    except NotImplementedError:
        return ("-", "")
    except Exception as error:
        return ("-", f"eager: {_line(error)}")
    model.set_attn_implementation("smart")
    try:
        actual, trace = _packed(model, run, known)
        if any(row.reason.endswith("packed sequences") for row in trace.stacks):
            # A kernel that a CPU lacks. Here its place is taken by a mask of all tokens.
            with mock.patch.object(stack_choice, "attention_refusal", return_value=None):
                actual, trace = _packed(model, run, known)
            may_be_dense = True
        else:
            may_be_dense = False
    except Exception as error:
        return (WRONG, _line(error))
    compared = compare(expected, actual, tolerance=TOLERANCE, common_scale=COMMON_SCALE)
    if not compared.agrees:
        return (WRONG, compared.reason)
    if not any(row.packed for row in trace.stacks):
        return (REFUSED, "; ".join(row.reason for row in trace.stacks))
    if any(row.facts["q_len"] > 1 and row.facts["padding"] != "none" for row in trace.rows):
        return (WRONG, "some layers saw the padded batch")
    if dense := {row.backend for row in trace.rows if row.backend in ("sdpa", "eager")}:
        patterns = {row.facts["pattern"] for row in trace.rows if row.backend in dense}
        packed = {pattern for pattern in patterns if pattern.startswith("packed")}
        if packed and not may_be_dense:
            return (WRONG, f"a mask of all tokens by all tokens for {packed}")
        if "other" in patterns:
            return (WRONG, "the mask of the packed tokens was lost on its way")
    return (AGREE, compared.figure)


def _packed(
    model: PreTrainedModel, run: Callable[[PreTrainedModel], Results], known: frozenset[str]
) -> tuple[Results, smartattn.Trace]:
    with (
        mock.patch.object(stacks, "STACKS", known),
        smartattn.padding_free(model, always=True),
        smartattn.trace() as trace,
    ):
        torch.manual_seed(0)
        return run(model), trace


def _build(architecture: Architecture) -> PreTrainedModel:
    model_class = architecture.model_class()
    config = tiny_config(model_class.config_class)
    if architecture.kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(config).parameters())
    if size > 12_000_000:
        raise ValueError(f"{size / 1e6:.0f}M parameters even when shrunk")
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation="smart").float().eval()


def _stack_like(model: nn.Module) -> frozenset[str]:
    """All modules that own a list of layers, by name."""
    found = set()
    for module in model.modules():
        name = stacks.qualified_name(module)
        if name and any(isinstance(child, nn.ModuleList) for child in module.children()):
            found.add(name)
    return frozenset(found)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# -- the command -----------------------------------------------------------------------------------


def prepare() -> None:
    """Once per worker process: one thread, no warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def sweep(
    architectures: Sequence[Architecture], jobs: int, timeout: float, discover: bool
) -> Iterator[Examination]:
    """Examines architectures in worker processes."""
    work = functools.partial(examine, discover=discover)
    answers = run_jobs(architectures, work, prepare=prepare, workers=jobs, timeout=timeout)
    for architecture, answer, failure in answers:
        if answer is None:
            yield Examination(architecture.name, refused=failure)
        else:
            yield Examination(**answer)


def report(examinations: Sequence[Examination]) -> str:
    """The Markdown of docs/reports/padding_free.md."""
    supported = sorted((e for e in examinations if e.is_supported), key=lambda e: e.name)
    wrong = [e for e in examinations if WRONG in [v for v, _ in e.scenarios.values()]]
    lines = [
        "# Padding-free architectures",
        "",
        f"Written by `python -m tests.padding_free_sweep` on a CPU: Transformers "
        f"{transformers.__version__}, torch {torch.__version__}, float32, tiny random models, "
        f"batches of {BATCH} x {LENGTH} with padding. Each cell is the largest difference from the "
        "padded model under eager attention at real tokens, relative to the largest value "
        f"(gradients: relative to that of their own tensor plus {COMMON_SCALE:g} of the largest "
        f"of all); up to {TOLERANCE:g} agrees. *padded*: the forward is refused "
        "and runs with its padding, equal by construction. Generation compares the logits of "
        f"{NEW_TOKENS} new tokens, and the tokens.",
        "",
        f"**{len(supported)} architectures agree, {len(wrong)} disagree.**",
        "",
        f"| architecture | {' | '.join(SCENARIOS)} |",
        "|---|" + "---|" * len(SCENARIOS),
    ]
    for examination in [*wrong, *supported]:
        cells = [_cell(*examination.scenarios[name]) for name in SCENARIOS]
        lines.append(f"| {examination.name} | {' | '.join(cells)} |")
    reasons: dict[str, list[str]] = {}
    for examination in examinations:
        if examination.refused.startswith("ValueError: ") and ": " in examination.refused[12:]:
            reason = examination.refused[12:].split(": ", 1)[1]
            reasons.setdefault(reason, []).append(examination.name)
    lines += ["", "## Refused when asked for", ""]
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"- {reason}: {len(names)} ({', '.join(sorted(names)[:4])}, ...)")
    return "\n".join(lines) + "\n"


def _cell(verdict: str, detail: Any) -> str:
    if verdict == AGREE:
        return f"{detail:.0e}"
    return {REFUSED: "*padded*", "-": "-"}.get(verdict, f"**{verdict}**: {detail}")


def main() -> int:
    """Runs the sweep; 1 if anything disagrees."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="class names or model types, with commas")
    parser.add_argument("--sample", type=int, help="this many architectures, evenly spread")
    parser.add_argument("--discover", action="store_true", help="try the unknown ones as well")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per architecture")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, default=None, help=f"default: {REPORT}")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    architectures = choose(names, options.sample) if names or options.sample else None
    examinations = []
    for found in sweep(
        architectures or all_architectures(), options.jobs, options.timeout, options.discover
    ):
        examinations.append(found)
        bad = [f"{n}: {d}" for n, (v, d) in found.scenarios.items() if v == WRONG]
        verdict = "supported" if found.is_supported else found.refused or "; ".join(bad) or "padded"
        print(f"{found.name} [{found.stack}] {verdict}", flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(e) for e in examinations], indent=1))
    if options.report or not (names or options.sample or options.discover):
        (options.report or REPORT).write_text(report(examinations))
    return int(any(v == WRONG for e in examinations for v, _ in e.scenarios.values()))


if __name__ == "__main__":
    sys.exit(main())
