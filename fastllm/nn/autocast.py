"""Whether torch.autocast is on for a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def autocasting(x: Tensor) -> bool:
    """Whether operations on x would be cast now; never on devices without autocast, such as meta.

    Our modules then take inputs in the dtype of their weights, which autocast does not touch.
    """
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
