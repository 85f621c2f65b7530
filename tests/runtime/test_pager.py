"""The pager against a dictionary of pages, and its promises: budget, eviction order, files, errors."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4.errors import TrainError
from nf4.paging.pager import Pager
from nf4.paging.stores import FileStore, MemoryStore

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


def open_files() -> list[str]:
    """What the descriptors of this process stand for."""
    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of open files on this system")
@pytest.mark.parametrize("where", ["pages", ".", None])
def test_page_file_is_reserved_nameless_and_gone_when_closed_or_collected(
    where: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for ends in ("closed", "collected"):
        pager = Pager(8, PAGE, budget_bytes=PAGE, backing=where and tmp_path / where)
        fill(pager, 0, 7)
        assert read(pager, 1) == 0
        assert read(pager, 0) == 7
        mine = [name for name in open_files() if name.startswith(str(tmp_path))]
        assert len(mine) == 1
        assert mine[0].endswith(" (deleted)")  # so a process killed leaves nothing either
        assert list(tmp_path.iterdir()) == []
        assert pager._store is not None
        assert os.fstat(pager._store._fd).st_size == 8 * PAGE
        assert os.fstat(pager._store._fd).st_blocks > 0
        if ends == "closed":
            pager.close()
            pager.close()
        del pager
        gc.collect()
        assert not [name for name in open_files() if name.startswith(str(tmp_path))]


def test_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_text("mine")
    with pytest.raises(TrainError, match=r"pages: page file exists; name a folder, or a file that does not"):
        Pager(8, PAGE, budget_bytes=PAGE, backing=path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TrainError, match="page file exists"):
        Pager(8, PAGE, budget_bytes=PAGE, backing=tmp_path / "link")
    assert path.read_text() == "mine"


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
    pager = Pager(3, PAGE, budget_bytes=PAGE, backing=tmp_path / "pages")
    fill(pager, 0, 1)
    read(pager, 1)  # stores page 0
    assert isinstance(pager._store, FileStore)
    os.ftruncate(pager._store._fd, 10)
    for _ in range(2):  # the page stays lost
        with pytest.raises(TrainError, match="page 0 is cut short, expected 64 bytes, got 10; resume from"):
            read(pager, 0)

    def full(fd: int, data: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fill(pager, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(
            TrainError, match=r"cannot write page 2: No space left on device; free some space"
        ):
            read(pager, 1)
    with pytest.raises(TrainError, match=r"pages: page 2 is lost: it could not be written; resume from the"):
        read(pager, 2)
    pager.close()


@pytest.mark.parametrize("what", ["a bit", "a sector of zeros", "another page", "an older version"])
def test_page_that_the_disk_lost_or_tore_is_told(what: str, tmp_path: Path) -> None:
    size = 4096
    store = FileStore(3, size, tmp_path / "pages")
    generator = torch.Generator().manual_seed(3)
    pages = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for _ in range(3)]
    for k, page in enumerate(pages):
        store.write(k, page)
    back = torch.empty_like(pages[1])
    store.read(1, back)
    assert torch.equal(back, pages[1])
    if what == "a bit":
        os.pwrite(store._fd, bytes([int(pages[1][777]) ^ 4]), size + 777)
    elif what == "a sector of zeros":
        os.pwrite(store._fd, bytes(512), size + 1024)
    elif what == "another page":
        os.pwrite(store._fd, pages[2].numpy().tobytes(), size)
    else:
        store.write(1, pages[1] + 1)
        os.pwrite(store._fd, pages[1].numpy().tobytes(), size)
    with pytest.raises(
        TrainError,
        match=r"pages: page 1 came back from the disk damaged, expected XXH3 [0-9a-f]{16}, got [0-9a-f]{16}; "
        r"resume from the last checkpoint, with the page file on another disk",
    ):
        store.read(1, back)
    store.read(2, back)
    assert torch.equal(back, pages[2])
    store.write(1, pages[0])
    store.read(1, back)
    assert torch.equal(back, pages[0])
    store.close()


def test_memory_may_stand_behind_the_pool() -> None:
    pager = Pager(5, PAGE, budget_bytes=2 * PAGE, make_store=lambda: MemoryStore(5, PAGE))
    for index in range(5):
        fill(pager, index, index + 1)
    assert [read(pager, index) for index in range(5)] == [1, 2, 3, 4, 5]
    assert pager.capacity_bytes == 2 * PAGE
    pager.close()


def test_too_little_memory_is_told() -> None:
    with pytest.raises(TrainError, match=r"no room for optimizer state, expected .* set a page budget"):
        Pager(1 << 30, 1 << 30)
    with pytest.raises(TrainError, match=r"no memory for .* bytes of pages; keep pages in a file"):
        MemoryStore(1 << 30, 1 << 30)


class SlowStore(MemoryStore):
    """Reads wait until the test lets them go."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        super().__init__(num_pages, page_bytes)
        self.reads: list[int] = []
        self.may_read = threading.Semaphore(0)

    def read(self, page: int, into: torch.Tensor) -> None:
        assert self.may_read.acquire(timeout=10)
        self.reads.append(page)
        super().read(page, into)


def test_sweep_fetches_pages_in_its_order_while_one_is_in_use() -> None:
    store = SlowStore(8, PAGE)
    pager = Pager(8, PAGE, budget_bytes=4 * PAGE, make_store=lambda: store)
    for _ in pager.sweep(range(8)):  # zeros at first: nothing is read
        pass
    resident = 0
    for [(index, page)] in pager.sweep(range(7, -1, -1)):
        resident = max(resident, pager.resident_bytes)
        assert int(page[0]) == 0
        if index == 5:
            # Page 3 is two ahead: its transfer began, the caller did not wait for it, and 4 stayed.
            assert store.reads == []
            assert pager.stats.stall_seconds < 5
            for _ in range(4):
                store.may_read.release()
    assert store.reads == [3, 2, 1, 0]
    assert pager.stats.misses == 1  # the very first page; all others were there or on their way
    assert resident == 4 * PAGE
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
