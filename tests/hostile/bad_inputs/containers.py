"""Cases of one file: as a .nf4 file by every command that opens one, and as the shard of a checkpoint."""

from __future__ import annotations

import os
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from unittest import mock

import numpy as np

from nf4format.container import Nf4File
from nf4format.header import read_header
from nf4format.sums import SUMS_NAME

from . import draft, headers, profiles
from .cases import COMPILE, DEEP, EXPORT, GENERATE, INSPECT, OPENING, VERIFY, Case, Command
from .kit import Q, edited, good, write_good

Edit = Callable[[bytes], bytes]

# First words of a case's name -> its row; the first that fits.
_HEADER_ROWS = {
    "array string number null two trailing comment byte NUL UTF-16": "header syntax",
    "leading newline": "white space",
    "invalid surrogate, surrogate control": "text encoding",
    "name": "tensor names",
    "duplicate": "duplicates",
    "metadata no": "metadata",
    "entry": "entries",
    "unknown": "unknown fields",
    "offsets offset three end": "offsets",
    "hole overlap same past bytes": "ranges",
    "shape dimension rank": "shapes",
    "dtype F4 size": "dtypes",
    "nesting": "nesting",
    "10^6 lists": "header bombs",
    "misaligned listed": "order and alignment",
}
_PROFILE_ROWS = {
    "version": "version",
    "blocksize alignment source config_hash data": "fixed metadata",
    "metadata": "fixed metadata",
    "sums": "table of sums",
    "codes absmax": "companions",
    "nested quant scales": "constants",
    "state offset": "quant_state",
    "pad": "pads",
    "unknown file": "embedded files",
    "config": "embedded config",
    "alias aliases": "aliases",
}
_EXCEPTIONS = {
    "config hash upper case": "fixed metadata",
    "nested map missing": "companions",
    "nested absmax off by one": "companions",
    "offset of 10^5 digits": "header bombs",
    "unknown reserved name": "embedded files",
}


def cases() -> Iterator[Case]:
    yield from _headers()
    yield from _sizes()
    yield from _formats()
    yield from _special()
    yield from _profiles()
    yield from _damage()
    yield from _in_use()


def _row(name: str, rows: dict[str, str]) -> str:
    first = name.split(" ", maxsplit=1)[0]
    return _EXCEPTIONS.get(name) or next(row for words, row in rows.items() if first in words.split(" "))


def _tensor_file(header: bytes, data: bytes, folder: Path, *, length: int | None = None) -> None:
    """The bytes as model.nf4, and as the only shard of the checkpoint `model`."""
    _both(struct.pack("<Q", len(header) if length is None else length) + header + data, folder)


def _both(content: bytes, folder: Path) -> None:
    (folder / "model.nf4").write_bytes(content)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(content)


def _headers() -> Iterator[Case]:
    everywhere = (*OPENING, COMPILE)
    for name, (header, says) in headers.REFUSED.items():
        prepare = partial(_tensor_file, header + b" " * (-len(header) % 8), headers.DATA)
        # In a .nf4 file the stricter rules may speak first.
        yield Case(_row(name, _HEADER_ROWS), name, prepare, everywhere, says)
    for name, (header, says) in headers.RELAXED.items():
        row = _row(name, _HEADER_ROWS)
        padding = b"" if name in ("misaligned", "newline padding") else b" " * (-len(header) % 8)
        prepare = partial(_tensor_file, header + padding, headers.DATA)
        yield Case(row, name, prepare, OPENING, says)
        yield Case(row, f"{name}, in a checkpoint", prepare, (COMPILE,), None, writes=frozenset({"out.nf4"}))
    many = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(200_001)}
    yield Case(
        "header bombs",
        "200,001 tensors of nothing",
        partial(_tensor_file, headers.text({"__metadata__": headers.META, **many}), b""),
        (INSPECT, COMPILE),
        "too many tensors, expected at most 200000",
    )


def _sizes() -> Iterator[Case]:
    header = headers.text(headers.GOOD)
    header += b" " * (-len(header) % 8)
    whole = struct.pack("<Q", len(header)) + header + headers.DATA
    for name, content, says in [
        ("0 bytes", b"", "too short for a header, expected 8 bytes, got 0"),
        ("7 bytes", whole[:7], "too short for a header"),
        ("8 bytes", whole[:8], "cut short inside its header"),
        ("cut in the header", whole[:40], "cut short inside its header"),
        ("one byte short", whole[:-1], "the file is cut short"),
        ("one byte long", whole + b"\0", "there are bytes after the last tensor"),
    ]:
        yield Case("file size", name, partial(_both, content), (*OPENING, COMPILE), says)
    for length in (0, 1, len(whole), 1 << 40, (1 << 64) - 1, (1 << 64) - 8, 100_000_001, (16 << 20) + 1):
        prepare = partial(_tensor_file, header, headers.DATA, length=length)
        yield Case(
            "header length", f"{length:,}", prepare, (*OPENING, COMPILE), "out of range|cut short inside"
        )
    prepare = partial(_tensor_file, b"{}" + b" " * (17 << 20), b"")
    yield Case("header length", "17 MiB of spaces", prepare, (INSPECT, COMPILE), "length out of range")
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.py", "print()")
    for name, more in [("zip", archive.getvalue()), ("ELF", b"\x7fELF" + bytes(60))]:
        prepare = partial(_both, good() + more)
        yield Case("appended data", name, prepare, OPENING, "there are bytes after the last tensor")


def _formats() -> Iterator[Case]:
    for name, content, says in [
        (
            "git-lfs pointer",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "git lfs pull",
        ),
        ("HTML page", b"<!DOCTYPE html><html>not found</html>", "HTML page"),
        ("gzip", b"\x1f\x8b\x08" + bytes(60), "gzip"),
        ("GGUF", b"GGUF\x03" + bytes(60), "GGUF"),
        ("zip or pickle", b"PK\x03\x04" + bytes(60), "zip archive, perhaps a PyTorch pickle"),
        ("pickle", b"\x80\x02}q\0" + bytes(60), "pickle"),
        ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
        ("NumPy", b"\x93NUMPY\x01" + bytes(60), "NumPy"),
        ("bare JSON", b'{"error": "Repository not found"}', "bare JSON"),
        ("zeros", bytes(8192), "never completed"),
    ]:
        yield Case("other formats", name, partial(_both, content), (*OPENING, COMPILE), says)


def _special() -> Iterator[Case]:
    def link_to(target: str, folder: Path) -> None:
        (folder / "model.nf4").symlink_to(target)

    def listen(folder: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(folder)  # paths of sockets are short
            server.bind("model.nf4")

    def sparse(size: int, folder: Path) -> None:
        os.truncate(write_good(folder / "model.nf4"), size)

    for name, prepare, says in [
        (
            "directory",
            lambda folder: (folder / "model.nf4").mkdir(),
            "expected a regular file, got a directory",
        ),
        ("FIFO", lambda folder: os.mkfifo(folder / "model.nf4"), "expected a regular file, got a FIFO"),
        ("socket", listen, "got a FIFO, socket|no such device"),
        ("endless device", partial(link_to, "/dev/zero"), "got a FIFO, socket or device"),
        ("file of /proc", partial(link_to, "/proc/self/maps"), "too short for a header|cut short"),
        ("loop of links", partial(link_to, "model.nf4"), "too many levels of symbolic links"),
        ("missing", lambda folder: None, "no such file or directory; check the path"),
        ("sparse, 1 TB", partial(sparse, 1 << 40), "there are bytes after the last tensor"),
        ("sparse, 8 TB", partial(sparse, 8 << 40), "there are bytes after the last tensor"),
    ]:
        yield Case("special files", name, prepare, OPENING, says)

    def forbidden(folder: Path) -> None:
        write_good(folder / "model.nf4").chmod(0)

    says = "permission denied; check the permissions"
    yield Case("special files", "no permission", forbidden, OPENING, says, not_root=True)


def _profiles() -> Iterator[Case]:
    def prepare(edit: profiles.Edit, folder: Path) -> None:
        path = draft.pack(folder / "model.nf4")
        taken_apart = draft.Draft(path, profiles.X.removesuffix(".weight") + ".weight")
        edit(taken_apart)
        taken_apart.write(path)

    for name, (edit, says) in profiles.BAD.items():
        yield Case(_row(name, _PROFILE_ROWS), name, partial(prepare, edit), OPENING, says)

    def constant(*values: float) -> Callable[[Path], None]:
        data = np.array(values, np.float32)
        return lambda folder: edited(
            folder / "model.nf4",
            lambda d: d.tensors.update({f"{Q}.nested_absmax": ("F32", [data.size], data.tobytes())}),
        )

    for name, legal in [
        ("zero scales", constant(0.0)),
        ("denormal scales", constant(1e-40)),
        (
            "negative offset",
            lambda folder: edited(folder / "model.nf4", lambda d: d.state(nested_offset=-0.5)),
        ),
    ]:
        yield Case(
            "legal constants",
            name,
            legal,
            (INSPECT, VERIFY, EXPORT, GENERATE),
            None,
            writes=frozenset({"out"}),
        )


def _damage() -> Iterator[Case]:
    content = good()
    path = Path("/proc/self/fd")  # only for messages
    fd = os.memfd_create("good")
    os.pwrite(fd, content, 0)
    header = read_header(fd, strict=True, name=path)
    os.close(fd)
    places = {
        "header": content.index(b'"nf4.producer"') + 17,
        "codes": header.entries[Q].begin + 5,
        "nested absmax": header.entries[f"{Q}.nested_absmax"].begin,
        "absmax": header.entries[f"{Q}.absmax"].begin + 1,
        "kept tensor": header.entries["model.norm.weight"].begin + 3,
        "config.json": header.entries["__file__/config.json"].begin + 2,
        "tokenizer.json": header.entries["__file__/tokenizer.json"].begin + 2,
        "sums": header.entries[SUMS_NAME].begin + 50,
    }
    weights = {"codes", "nested absmax", "absmax", "kept tensor", "tokenizer.json"}  # not read when opening
    for name, offset in places.items():
        flipped = bytearray(content)
        flipped[offset] ^= 1
        commands: tuple[Command, ...] = (VERIFY, DEEP) if name in weights else OPENING
        yield Case(
            "damage", f"bit of {name}", _writer(bytes(flipped)), commands, "damaged|does not match|not JSON"
        )
    begin = header.data_start
    one, other = content[begin : begin + 4096], content[begin + 4096 : begin + 8192]
    for name, changed in [
        ("pages swapped", content[:begin] + other + one + content[begin + 8192 :]),
        ("page zeroed", content[:begin] + bytes(4096) + content[begin + 4096 :]),
        ("page lost", content[:begin] + content[begin + 4096 :]),
        ("cut and extended", content[: begin + 4096] + bytes(len(content) - begin - 4096)),
        ("cut at a page", content[: begin + 4096]),
    ]:
        yield Case("damage", name, _writer(changed), (VERIFY, DEEP), "damaged|cut short|table of sums")


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.nf4").write_bytes(content)


def _in_use() -> Iterator[Case]:
    reading: tuple[Command, ...] = ((*GENERATE, "--no-mmap"),)

    @contextmanager
    def once_open(action: Callable[[Path], object], folder: Path) -> Iterator[None]:
        """Do something to the file as soon as it is open and checked."""
        original = Nf4File.__init__

        def opened(self: Nf4File, *arguments: object, **options: object) -> None:
            original(self, *arguments, **options)  # type: ignore[arg-type]
            action(folder / "model.nf4")

        with mock.patch.object(Nf4File, "__init__", opened):
            yield

    def cut(path: Path) -> None:
        os.truncate(path, 6000)

    def modify(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(read_header(path, strict=True).entries[Q].begin)
            file.write(b"\x5a")

    def replace(path: Path) -> None:
        path.rename(path.with_name("old"))
        path.write_bytes(b"something else")

    def prepare(folder: Path) -> None:
        write_good(folder / "model.nf4")

    changed = frozenset({"model.nf4", "old"})
    for name, action, commands, says in [
        ("truncated, reading", cut, reading, "the file ends while .* cut short while in use"),
        ("truncated, verifying", cut, (VERIFY,), "cut short while in use"),
        ("modified, reading", modify, reading, "damaged"),
        ("modified, verifying", modify, (VERIFY,), "damaged"),
        ("renamed over", replace, (GENERATE,), None),
        ("renamed over, reading", replace, reading, None),
    ]:
        around = partial(once_open, action)
        yield Case("while in use", name, prepare, commands, says, around=around, writes=changed)
