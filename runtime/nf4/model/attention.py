"""Scaled-dot-product attention over plain, padded or packed sequences: which tokens see which.

Shapes: B batch, T tokens, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Documents laid end to end in one row of tokens, each seeing only itself.

    Attributes:
        bounds: int32 [documents + 1], from 0 to the number of tokens; on the tokens' device.
        longest: tokens of the longest document.
        tokens: of all of them.
    """

    bounds: Tensor
    longest: int
    tokens: int

    @staticmethod
    def of(lengths: list[int], device: torch.device | str = "cpu") -> Segments:
        """Segments of documents of these lengths, in order."""
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Segments(bounds.to(device), max(lengths), sum(lengths))

    def to(self, device: torch.device) -> Segments:
        """The same on a device."""
        return Segments(self.bounds.to(device), self.longest, self.tokens)

    def positions(self) -> Tensor:
        """Position of each token in its own document, int64 [1, T]."""
        index = torch.arange(self.tokens, device=self.bounds.device)
        return (index - self.bounds[self._documents()])[None]

    def seen(self, window: int | None, packs: bool) -> Seen:
        """What `attend` takes for layers with this window: these segments where `packs` and it hides nothing,
        else a mask, bool [1, 1, T, T]: earlier tokens of the document, the last `window` of them."""
        if packs and (window is None or self.longest <= window):
            return self
        index = torch.arange(self.tokens, device=self.bounds.device)
        document = self._documents()
        seen = (index <= index[:, None]) & (document == document[:, None])
        if window is not None:
            seen &= index > index[:, None] - window
        return seen[None, None]

    def _documents(self) -> Tensor:
        """Which document each token belongs to, int64 [T]."""
        index = torch.arange(self.tokens, device=self.bounds.device, dtype=torch.int32)
        return torch.bucketize(index, self.bounds, right=True) - 1


# Who sees whom: a mask, bool [B or 1, 1, T, S]; segments, where `takes_segments` holds; or None.
Seen: TypeAlias = Tensor | Segments | None


def attend(q_BNTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, seen: Seen) -> Tensor:
    """Scaled-dot-product attention, [B, N, T, D], of queries [B, N, T, D] over keys and values [B, G, S, D].

    seen: None means causal, or one query that sees all keys.
    """
    if isinstance(seen, Segments):
        return _attend_packed(q_BNTD, k_BGSD, v_BGSD, seen)
    is_grouped = q_BNTD.shape[1] != k_BGSD.shape[1]
    # Without a mask the keys are exactly the queries' own tokens, or one query sees them all.
    is_causal = seen is None and q_BNTD.shape[2] > 1
    return F.scaled_dot_product_attention(
        q_BNTD, k_BGSD, v_BGSD, attn_mask=seen, is_causal=is_causal, enable_gqa=is_grouped
    )


def attention_bias(
    attention_mask: Tensor | None, past: int, new: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each query sees, bool [B or 1, 1, T, S], or None where plain causal attention does.

    None, where no window or padding is in force, means: the queries are all the tokens there are (causal), or
    one query sees all keys. Padding on the right alone needs no mask, as no real token looks to its right;
    what padding rows then compute is never used.
    """
    total = past + new
    if window is not None and total <= window:
        window = None
    if attention_mask is not None:
        is_right_padded = past == 0 and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
        if is_right_padded or bool(attention_mask.all()):
            attention_mask = None
    if attention_mask is None and window is None and (past == 0 or new == 1):
        return None
    query = torch.arange(past, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    if attention_mask is None:
        return seen[None, None]
    # A padding row would see nothing and come out as NaN: it sees itself.
    return ((seen & attention_mask.bool()[:, None, :]) | (key == query))[:, None]


def takes_segments(x: Tensor, head_size: int) -> bool:
    """Whether attention in x's dtype on its device goes document by document; elsewhere a mask does it."""
    return not x.is_cuda or (x.dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0)


def _attend_packed(q_1NTD: Tensor, k_1GTD: Tensor, v_1GTD: Tensor, segments: Segments) -> Tensor:
    if not q_1NTD.is_cuda:
        lengths = segments.bounds.diff().tolist()
        documents = zip(*(x.split(lengths, dim=2) for x in (q_1NTD, k_1GTD, v_1GTD)), strict=True)
        return torch.cat([attend(q, k, v, None) for q, k, v in documents], dim=2)
    q, k, v = (x[0].transpose(0, 1) for x in (q_1NTD, k_1GTD, v_1GTD))
    bounds, longest = segments.bounds, segments.longest
    # The variable-length form of FlashAttention 2 (arXiv 2307.08691) that torch carries, with its gradient.
    attended, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False
    )
    return attended.transpose(0, 1)[None]
