"""Which architectures the sweep covers: the model classes of Transformers' auto mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

# A base class is left out where a class with a head stands in for it.
MAPPINGS: tuple[tuple[str, str], ...] = (
    ("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("seq2seq", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("seq2seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ("masked", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("base", "MODEL_MAPPING_NAMES"),
)


@dataclass(frozen=True)
class Architecture:
    """One model class, and the model types that share it. `kind` names the auto mapping."""

    name: str
    kind: str
    model_types: tuple[str, ...]

    def model_class(self) -> type[PreTrainedModel]:
        """The class itself; AttributeError if this Transformers has it only by name."""
        return getattr(transformers, self.name)


def all_architectures() -> list[Architecture]:
    """Every architecture in scope, sorted by name."""
    found: dict[str, Architecture] = {}
    with_head: set[str] = set()
    for kind, mapping_name in MAPPINGS:
        mapping: Mapping[str, str | tuple[str, ...]] = getattr(modeling_auto, mapping_name)
        for model_type, classes in mapping.items():
            if kind == "base" and model_type in with_head:
                continue
            with_head.add(model_type)
            name = classes if isinstance(classes, str) else classes[0]
            known = found.get(name, Architecture(name, kind, ()))
            found[name] = replace(known, model_types=(*known.model_types, model_type))
    return [found[name] for name in sorted(found)]


def choose(names: Sequence[str], sample: int | None) -> list[Architecture]:
    """The architectures called for by class name or model type, or `sample` of them evenly spread.

    Raises ValueError for a name that is neither.
    """
    chosen = all_architectures()
    if names:
        known = {a.name for a in chosen} | {t for a in chosen for t in a.model_types}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"no such architecture: {', '.join(unknown)}")
        chosen = [a for a in chosen if not {a.name, *a.model_types}.isdisjoint(names)]
    if sample is not None and sample < len(chosen):
        by_kind = sorted(chosen, key=lambda a: (a.kind, a.name))
        step = len(by_kind) / sample
        chosen = [by_kind[int(step * (i + 0.5))] for i in range(sample)]
    return chosen
