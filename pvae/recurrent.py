"""Recurrent networks that can be staged."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["LSTM"]


class LSTM(nn.LSTM):
    """``torch.nn.LSTM``, traced step by step.

    On a CPU torch calls oneDNN, whose forward pass keeps what its backward pass needs only while
    gradients are recorded; a traced graph holds its own backward pass and records none. While it
    is traced, the network is therefore computed from torch's plain operations.
    """

    def forward(self, *inputs: Any) -> Any:
        """As ``torch.nn.LSTM``."""
        if get_proxy_mode() is None:
            return super().forward(*inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oneDNN settings for other devices
            with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
                return super().forward(*inputs)
