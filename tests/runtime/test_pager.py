"""The pager against a dictionary of pages, and its promises: budget, eviction order, files, errors."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4.errors import TrainError
from nf4.paging.pager import FileStore, Pager

PAGE = 64


def fill(pager: Pager, index: int, value: int) -> None:
    with pager.page(index) as page:
        page.fill_(value)


def read(pager: Pager, index: int) -> int:
    with pager.page(index, write=False) as page:
        assert page.unique().numel() == 1
        return int(page[0])


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 5),
    actions=st.lists(
        st.tuples(st.sampled_from(["write", "read", "prefetch"]), st.integers(0, 6)), max_size=60
    ),
)
def test_behaves_as_a_plain_array_within_the_budget(slots: int, actions: list[tuple[str, int]]) -> None:
    pager = Pager(7, PAGE, budget_bytes=slots * PAGE + PAGE // 2)
    expected = [0] * 7
    for number, (action, index) in enumerate(actions, 1):
        if action == "write":
            expected[index] = number
            fill(pager, index, number)
        elif action == "read":
            assert read(pager, index) == expected[index]
        else:
            pager.prefetch(index)
        assert pager.resident_bytes <= pager.capacity_bytes <= slots * PAGE
    assert [read(pager, index) for index in range(7)] == expected
    pager.close()


def test_least_recently_used_page_leaves_and_counters_say_so() -> None:
    pager = Pager(4, PAGE, budget_bytes=2 * PAGE)
    fill(pager, 0, 1)
    fill(pager, 1, 2)
    read(pager, 0)
    fill(pager, 2, 3)  # page 1 leaves: 0 was used after it
    assert (pager.stats.hits, pager.stats.misses, pager.stats.bytes_out) == (1, 3, PAGE)
    read(pager, 0)
    assert pager.stats.hits == 2
    assert read(pager, 1) == 2  # page 2 leaves, page 1 comes back
    assert (pager.stats.misses, pager.stats.bytes_in, pager.stats.bytes_out) == (4, PAGE, 2 * PAGE)
    read(pager, 3)  # a page never stored is zeros and needs no reading; clean page 0 is not written again
    assert (pager.stats.bytes_in, pager.stats.bytes_out) == (PAGE, 3 * PAGE)
    pager.close()


def test_prefetched_page_is_a_hit_and_pinned_pages_stay() -> None:
    pager = Pager(3, PAGE, budget_bytes=2 * PAGE)
    fill(pager, 1, 5)
    with pager.page(0) as page:
        page.fill_(7)
        pager.prefetch(2)  # takes the slot of page 1
        pager.prefetch(1)  # and page 1 that of 2; page 0 is pinned
        with pager.page(1, write=False) as other:
            assert int(other[0]) == 5
            pager.prefetch(2)  # no slot left: ignored
            with pytest.raises(RuntimeError, match="all 2 slots are pinned"), pager.page(2):
                pass
        assert int(page[0]) == 7
    assert pager.stats.hits == 1
    pager.close()


def test_no_budget_needs_no_file(tmp_path: Path) -> None:
    for budget in (None, 8 * PAGE):
        pager = Pager(8, PAGE, budget_bytes=budget, backing=tmp_path / "pages")
        fill(pager, 3, 9)
        assert read(pager, 3) == 9
        assert not (tmp_path / "pages").exists()
        pager.close()


def test_named_page_file_is_reserved_then_removed_on_close_and_when_collected(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    pager = Pager(8, PAGE, budget_bytes=PAGE, backing=path)
    assert path.stat().st_size == 8 * PAGE
    with pytest.raises(TrainError, match=r"pages: page file exists; remove it"):
        Pager(8, PAGE, budget_bytes=PAGE, backing=path)
    pager.close()
    pager.close()
    assert not path.exists()
    pager = Pager(8, PAGE, budget_bytes=PAGE, backing=path)
    descriptors = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    del pager
    gc.collect()
    assert not path.exists()
    if descriptors:
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors - 1


def test_bad_settings_and_places_are_told(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="smaller than one page, expected at least 64 bytes, got 63"):
        Pager(8, PAGE, budget_bytes=63)
    with pytest.raises(TrainError, match="cannot create page file: No such file or directory"):
        Pager(8, PAGE, budget_bytes=PAGE, backing=tmp_path / "missing" / "pages")


def test_full_disk_at_the_start_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        TrainError, match="cannot reserve 512 bytes: No space left on device; free some space"
    ):
        FileStore(8, PAGE, tmp_path / "pages")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_and_short_file_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pages"
    pager = Pager(3, PAGE, budget_bytes=PAGE, backing=path)
    fill(pager, 0, 1)
    read(pager, 1)  # stores page 0
    os.truncate(path, 10)
    with pytest.raises(TrainError, match="page 0 is cut short, expected 64 bytes, got 10"):
        read(pager, 0)
    with pytest.raises(TrainError, match="page 0 is cut short"):  # the page stays lost
        read(pager, 0)

    def full(fd: int, data: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fill(pager, 2, 3)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TrainError, match=r"cannot write page 2: No space left on device; free some space"):
        read(pager, 1)
    pager.close()


def test_partial_transfers_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(2, PAGE)
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:9]], offset))
    page = torch.arange(PAGE, dtype=torch.uint8)
    store.write(1, page)
    back = torch.zeros_like(page)
    store.read(1, back)
    assert torch.equal(back, page)
    store.close()
