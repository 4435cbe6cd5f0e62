"""The same loss in PyTorch, chunked with the gradient formed in the forward pass.

The technique is Liger Kernel's (Hsu et al. 2024, arXiv:2410.10989), written out without its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

CHUNK = 256


def prepared(student: Any, teacher: Any, head: Any) -> Callable[[], tuple[Any, Any]]:
    """A function that gives (mean KL, gradient to the student's hidden states)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(student.dtype))
    s, t, w = (torch.tensor(np.asarray(a, np.float32)).to(device, dtype) for a in (student, teacher, head))

    @torch.no_grad()
    def call() -> tuple[Any, Any]:
        gradient, total = torch.empty_like(s), 0.0
        for start in range(0, len(s), CHUNK):
            piece = slice(start, start + CHUNK)
            log_p = (t[piece] @ w.T).float().log_softmax(-1)
            log_q = (s[piece] @ w.T).float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient[piece] = ((log_q.exp() - p) / len(s)).to(dtype) @ w
        if device == "cuda":
            torch.cuda.synchronize()
        return float(total) / len(s), gradient.float().cpu().numpy()

    return call
