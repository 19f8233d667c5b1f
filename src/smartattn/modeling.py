"""What the code of an architecture says of how it takes attention."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel


def calls_attention_function(config: Any) -> bool:
    """Whether the model of a configuration goes through the attention registry.

    Some architectures compute eager attention themselves and add the mask they are given; they
    need the additive mask. False only where the modeling code is known not to name the registry.
    """
    modeling = _modeling(type(config))
    return modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def made_for_sdpa(kind: Any) -> bool:
    """Whether the code of an architecture takes the masks of sdpa, of which many are None.

    Args:
        kind: the class of a configuration, or of a layer.
    """
    modeling = _modeling(kind)
    if modeling is None:
        return True
    models = [
        value
        for value in vars(modeling).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == modeling.__name__
    ]
    own = [model for model in models if model.config_class is kind]
    return not models or any(model._supports_sdpa for model in own or models)


def _modeling(kind: type) -> ModuleType | None:
    """The module with the models of a configuration or a layer; None if it is not Transformers'."""
    name = kind.__module__
    if not name.startswith("transformers."):
        return None
    return sys.modules.get(name.replace(".configuration_", ".modeling_"))
