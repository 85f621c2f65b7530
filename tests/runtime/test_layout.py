"""Where moments lie in pages: every element once, blocks of 8-bit states whole."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4.paging.blockwise import BLOCK
from nf4.paging.layout import LEAST_8BIT, UNIT_BYTES, StateLayout, page_elements


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 300), st.integers(4000, 9000)), min_size=1, max_size=8),
    page_bytes=st.integers(65, 3000).map(lambda n: 8 * n),
    state_bits=st.sampled_from([8, 32]),
)
def test_layout_covers_every_element_once_in_whole_blocks(
    sizes: list[int], page_bytes: int, state_bits: int
) -> None:
    layout = StateLayout.cut(sizes, page_bytes, state_bits)
    covered = [[0] * size for size in sizes]
    for k, pieces in enumerate(layout.pages):
        bits, end = layout.bits(k), 0
        for param, start, stop, at in pieces:
            assert bits == (8 if state_bits == 8 and sizes[param] >= LEAST_8BIT else 32)
            assert at >= end
            if bits == 8:
                assert at % BLOCK == start % BLOCK == 0
            end = at + stop - start
            covered[param][start:stop] = [count + 1 for count in covered[param][start:stop]]
        assert end <= page_elements(bits, page_bytes)
        views = layout.fields(k, torch.zeros(page_bytes, dtype=torch.uint8))
        used = sum(view.nbytes for view in views.values())
        assert used <= page_bytes < used + UNIT_BYTES[bits]
    assert all(count == 1 for counts in covered for count in counts)
