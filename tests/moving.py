"""What the kernel that moves tokens does, by torch's operations on a CPU."""

from __future__ import annotations

import pytest
import torch

from smartattn import moves


def moving(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Lets tokens be moved as on a GPU; returns the list of targets, which grows."""
    made: list[torch.Tensor] = []

    def moved(states: torch.Tensor, index: torch.Tensor, target: torch.Tensor) -> bool:
        assert not (states.requires_grad and torch.is_grad_enabled())
        rows, length, parts, width = target.shape
        assert index.shape == (rows * length,)
        tokens = states.detach().reshape(-1, parts, width)
        chosen = tokens[index.clamp(min=0).long()] * (index >= 0)[:, None, None]
        target.copy_(chosen.view(target.shape))
        made.append(target)
        return True

    monkeypatch.setattr(moves, "unavailable", lambda device: None)
    monkeypatch.setattr(moves, "moved", moved)
    return made
