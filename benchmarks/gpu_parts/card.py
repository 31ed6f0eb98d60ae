"""The name by which all parts call the card. A test puts a stub in its place that knows torch's names and arguments.

`from benchmarks.gpu_parts.card import cuda`, then `cuda.synchronize()`: what is called is looked up at each call.
"""

from typing import Any

import torch


class _Card:
    """Passes every name on to `module`, torch.cuda unless a test says otherwise."""

    module: Any = torch.cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


cuda = _Card()
