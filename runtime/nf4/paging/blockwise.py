"""8-bit moments: blocks of 256 elements, each with its largest magnitude and codes into a dynamic map
(8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861), as in bitsandbytes.

How it works. `value = map[code] * absmax`, one fp32 rounding. The other way, `x = value / absmax` is in
[-1, 1], and its code is the number of borders below x. Borders are the midpoints of the map, so that is the
nearest code, and a tie goes to the lower. One border differs: the first one of the unsigned map is 0 and not
half of the smallest level. Second moments stand under a root in the denominator of the update; one that
became 0 while its first moment did not would make the update as large as 1 / eps.

Counting borders one by one costs much. Here the upper 16 bits of x, as fp32, look up how many borders lie
below everything that begins so, and at most one more can: one comparison decides. On a GPU each thread
descends a search tree of the same borders (csrc/cuda/adamw_8bit.cu).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from nf4format.codebook import NESTED_MAP

BLOCK = 256  # elements that share an absmax, as in bitsandbytes

# As bits, because states that were saved depend on every one of them.
_UNSIGNED_MAP = """
    00000000 34ae7baa 35500998 360e9b38 3692ccf6 36de4c51 3714e5d5 3783126e
    37e171a0 381fe868 384f1800 387e479a 3896bb99 38ae5364 38c5eb31 3906594b
    394154ca 397c5049 399ba5e4 39b923a2 39d6a163 39f41f22 3a08ce71 3a178d50
    3a264c30 3a350b10 3a43c9ef 3a5288d0 3a6147af 3a70068e 3a7ec56e 3a958106
    3aba5e35 3adf3b64 3b020c4a 3b147ae1 3b26e978 3b395810 3b4bc6a7 3b5e3540
    3b70a3d7 3b818937 3b8ac082 3b93f7cf 3b9d2f1a 3ba66666 3baf9db2 3bb8d4fd
    3bc20c4a 3bcb4395 3bd47ae1 3bddb22e 3be6e978 3bf020c5 3bf9580f 3c0147ae
    3c05e354 3c0a7ef9 3c0f1aa0 3c13b645 3c1851eb 3c1ced92 3c218937 3c2f5c2a
    3c466667 3c5d70a3 3c747ae2 3c85c28f 3c9147af 3c9ccccd 3ca851eb 3cb3d70b
    3cbf5c29 3ccae147 3cd66667 3ce1eb87 3ced70a3 3cf8f5c3 3d023d70 3d080000
    3d0dc28f 3d13851f 3d1947af 3d1f0a3d 3d24cccd 3d2a8f5c 3d3051eb 3d36147b
    3d3bd70a 3d41999a 3d475c28 3d4d1eb8 3d52e147 3d58a3d7 3d5e6667 3d6428f7
    3d69eb87 3d6fae15 3d7570a3 3d7b3333 3d807ae2 3d835c2a 3d863d71 3d891eb8
    3d8c0000 3d8ee148 3d91c290 3d94a3d7 3d97851f 3d9a6667 3d9d47af 3da028f6
    3da30a3e 3da5eb85 3da8cccd 3dabae15 3dae8f5c 3db170a4 3db451eb 3db73333
    3dba147b 3dbcf5c3 3dbfd70b 3dc2b852 3dc5999a 3dc87ae2 3dcb5c29 3dd40000
    3de26666 3df0cccd 3dff3333 3e06cccc 3e0e0000 3e153334 3e1c6666 3e23999a
    3e2acccc 3e320000 3e393334 3e406666 3e47999a 3e4ecccc 3e560000 3e5d3334
    3e646666 3e6b999a 3e72cccc 3e7a0000 3e809999 3e843333 3e87cccd 3e8b6666
    3e8f0000 3e92999a 3e963333 3e99cccc 3e9d6666 3ea10000 3ea4999a 3ea83333
    3eabcccc 3eaf6666 3eb30000 3eb6999a 3eba3333 3ebdcccc 3ec16666 3ec50000
    3ec8999a 3ecc3333 3ecfcccc 3ed36666 3ed70000 3eda999a 3ede3333 3ee1cccc
    3ee56666 3ee90000 3eec999a 3ef03333 3ef3cccc 3ef76666 3efb0000 3efe9999
    3f01199a 3f02e666 3f04b333 3f068000 3f084ccc 3f0a199a 3f0be666 3f0db334
    3f0f8000 3f114ccd 3f13199a 3f14e666 3f16b334 3f188000 3f1a4ccd 3f1c199a
    3f1de666 3f1fb334 3f218000 3f234ccd 3f25199a 3f26e666 3f28b334 3f2a8000
    3f2c4ccd 3f2e199a 3f2fe666 3f31b334 3f338000 3f354ccd 3f37199a 3f38e666
    3f3ab334 3f3c8000 3f3e4ccd 3f40199a 3f41e666 3f43b334 3f458000 3f474ccc
    3f49199a 3f4ae666 3f4cb334 3f4e8000 3f504ccc 3f52199a 3f53e666 3f55b334
    3f578000 3f594ccc 3f5b199a 3f5ce666 3f5eb334 3f608000 3f624ccc 3f64199a
    3f65e666 3f67b334 3f698000 3f6b4ccc 3f6d199a 3f6ee666 3f70b334 3f728000
    3f744ccc 3f76199a 3f77e666 3f79b334 3f7b8000 3f7d4ccc 3f7f199a 3f800000
"""


class DynamicMap:
    """An 8-bit map and the borders between its levels, on the CPU.

    Attributes:
        levels: float32 [256], ascending.
        borders: float32 [255], ascending; a code is the number of borders below a value.

    Args:
        levels: float32 [256], ascending.
        keeps_positive: nothing above 0 gets the code of 0.
    """

    def __init__(self, levels: np.ndarray, *, keeps_positive: bool) -> None:
        borders = (levels[:-1] + levels[1:]) / np.float32(2)
        if keeps_positive:
            borders[np.flatnonzero(levels == 0)] = 0
        self.levels = torch.from_numpy(levels.copy())
        self.borders = torch.from_numpy(borders)
        self._next_border = torch.cat([self.borders, torch.tensor([torch.inf])])
        starts = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32)
        ends = ((np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) | np.uint32(0xFFFF)).view(np.float32)
        # Below 0 a cell begins at the end of larger magnitude.
        least = np.nan_to_num(np.minimum(starts, ends), nan=np.inf)
        self._first_codes = torch.from_numpy(np.searchsorted(borders, least).astype(np.int32))

    def tree(self) -> Tensor:
        """The borders as a search tree, float32 [256]: node k has children 2k and 2k + 1, node 0 is not used.

        From node 1, go to 2k + 1 where x is above node k, else to 2k; after 8 steps k - 256 is the code.
        """
        tree = torch.zeros(256)
        for depth in range(8):
            first = 1 << depth
            step = 256 >> depth
            tree[first : 2 * first] = self.borders[step // 2 - 1 :: step]
        return tree

    def dequantize(self, codes: Tensor, absmax: Tensor, out: Tensor) -> None:
        """Blocks to values: uint8 [n * 256] and float32 [n] to float32 [n * 256]."""
        torch.index_select(self.levels, 0, codes.int(), out=out)
        out.view(-1, BLOCK).mul_(absmax[:, None])

    def quantize(self, values: Tensor, codes: Tensor, absmax: Tensor) -> None:
        """Values to blocks: float32 [n * 256], which is overwritten, to uint8 [n * 256] and float32 [n]."""
        rows = values.view(-1, BLOCK)
        torch.amax(rows.abs(), dim=1, out=absmax)
        rows.div_(absmax.where(absmax > 0, 1.0)[:, None])
        cells = (values.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        first = self._first_codes.index_select(0, cells)
        above = values > self._next_border.index_select(0, first)
        torch.add(first, above, out=first)
        codes.copy_(first)


@cache
def signed_map() -> DynamicMap:
    """For first moments; -0.993 to 1, 0 at 127."""
    return DynamicMap(NESTED_MAP, keeps_positive=False)


@cache
def unsigned_map() -> DynamicMap:
    """For second moments; 0 to 1."""
    bits = np.array([int(word, 16) for word in _UNSIGNED_MAP.split()], dtype=np.uint32)
    return DynamicMap(bits.view(np.float32), keeps_positive=True)
