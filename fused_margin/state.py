"""State of modules: buffers that keep their precision; forwards that run again, and must not move them twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class KeepsPrecision(nn.Module):
    """A module whose buffers stay float32 (or float64) when `.bfloat16()`, `.half()` or `.to(dtype)` makes it 16-bit.

    A mean that moves by a hundredth of its distance stands still in 16 bit. Parameters follow, as in any module.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPrecision:
        before = {name: held for name, held in self._buffers.items() if held is not None}
        super()._apply(fn, recurse)
        for name, held in before.items():
            now = self._buffers[name]
            if now.dtype in _SIXTEEN_BITS and held.dtype in (torch.float32, torch.float64):
                self._buffers[name] = held.to(now.device)
        return self


def recomputing() -> bool:
    """Whether this forward is run by a backward pass, as `torch.utils.checkpoint` does: its state has moved already.

    Not seen in compiled code, where the compiler decides what is computed again.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
