"""What the server of `commands` imports and sets up once: all that a command needs before it computes anything. It starts no threads."""

import torch._dynamo  # noqa: F401
from numba.core.registry import cpu_target

from roi_quantization.scripts import eval, explain, predict, predict_cost, recall, train  # noqa: F401

cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()
