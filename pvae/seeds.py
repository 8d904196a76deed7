"""Random streams from a few integers, so that a run depends on its seed and nothing else."""

from __future__ import annotations

import torch

__all__ = ["mix", "seed_noise"]

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A 63-bit seed from several integers (splitmix64): near ones give unrelated streams."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def seed_noise(device: torch.device, *numbers: int) -> None:
    """Seed the default generator of the CPU, and of the device if it is another."""
    seed = mix(*numbers)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        torch.cuda.default_generators[index].manual_seed(seed)
