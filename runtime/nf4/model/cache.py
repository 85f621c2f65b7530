"""Keys and values of the tokens seen so far: one preallocated buffer a layer, doubled when it is full.

Shapes: B batch, G key/value heads, S tokens held, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import ModelConfig


class KVCache:
    """Keys and values for `CausalLM.forward(..., cache=cache)`; for inference only (no gradient passes).

    Args:
        config: the model's; gives layers, heads and head size.
        batch: number of sequences; every call must bring as many.
        capacity: tokens to make room for at first. More may come: the buffers grow by doubling.
        dtype, device: of keys and values, the model's compute dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        capacity: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.length = 0  # tokens that every layer holds; CausalLM advances it after the last layer
        self.batch = batch
        shape = (2, batch, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self._buffers = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]

    @property
    def capacity(self) -> int:
        """Tokens that there is room for before the buffers grow."""
        return self._buffers[0].shape[3]

    def append(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return views [B, G, length + T, D] of all of them."""
        begin, end = self.length, self.length + k_BGTD.shape[2]
        buffer = self._buffers[layer]
        if end > buffer.shape[3]:
            shape = list(buffer.shape)
            shape[3] = max(end, 2 * shape[3])
            larger = buffer.new_empty(shape)
            larger[:, :, :, :begin] = buffer[:, :, :, :begin]
            self._buffers[layer] = buffer = larger
        buffer[0, :, :, begin:end] = k_BGTD
        buffer[1, :, :, begin:end] = v_BGTD
        return buffer[0, :, :, :end], buffer[1, :, :, :end]
