"""All cases, each with the row of docs/hostile-input.md that it belongs to.

A case prepares a folder and names the commands to run in it. It is refused, by every command, with one line
that matches `says`; or accepted, where `says` is None.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

Command = tuple[str, ...]

INSPECT: Command = ("nf4", "inspect", "model.nf4")
VERIFY: Command = ("nf4", "verify", "model.nf4")
DEEP: Command = ("nf4", "verify", "--deep", "model.nf4")
EXPORT: Command = ("nf4", "export", "model.nf4", "out")
GENERATE: Command = (
    "nf4",
    "generate",
    "model.nf4",
    "-p",
    "w1 w2",
    "--max-new-tokens",
    "2",
    "--device",
    "cpu",
)
EVAL: Command = ("nf4", "eval", "model.nf4", "text.txt", "--device", "cpu")
TRAIN: Command = ("nf4", "train", "model.nf4", "--data", "text.txt", "--out", "adapter", "--device", "cpu")
COMPILE: Command = ("qcompile", "model", "out.nf4")
DRY_RUN: Command = ("qcompile", "model", "out.nf4", "--dry-run")

OPENING = (INSPECT, VERIFY, EXPORT, GENERATE)
"""Every way into a .nf4 file that a user has, as a sample: all open it by the same function."""

# Row of the table -> what it holds. The order is the table's.
ROWS: dict[str, str] = {
    "file size": "0 or 7 bytes; one byte short or long; cut inside the header",
    "header length": (
        "0, 1, past the end, so large that adding 8 wraps; above 16 MiB, though all of it is there"
    ),
    "header syntax": (
        "an array, a string, two objects, a trailing comma, a comment, NUL padding, UTF-16, a BOM"
    ),
    "white space": "spaces in front of the header, newlines behind it",
    "text encoding": "bad UTF-8, half surrogate pairs raw or escaped, control characters",
    "tensor names": "empty, 256 or 10^6 characters, NUL, newline, `../`, `/`, right-to-left marks",
    "duplicates": "the same name twice, also behind an escape; the same metadata key, the same field",
    "metadata": "not an object; numbers, null or objects in it; 10 MB; 2000 keys",
    "entries": "not an object, a field missing or of another type",
    "unknown fields": "a fourth field in an entry",
    "offsets": "negative, minus zero, float, exponent, bool, above 2^64, three of them, end before begin",
    "ranges": "a hole, an overlap, a range twice, past the end, bytes behind the last",
    "shapes": "overflow in any order and beside 0, rank 9 or 10^5, NaN, strings, bools, negative",
    "dtypes": "unknown, lower case, 4-bit of an odd count, a size that is wrong by one",
    "nesting": "200, 10^5 and 10^6 levels",
    "header bombs": "10^6 objects, 4 million lists, a number of 10^5 digits, 200,001 tensors",
    "order and alignment": (
        "entries out of the order of their data; a tensor not at a multiple of its element's size"
    ),
    "other formats": "git-lfs pointer, HTML, gzip, GGUF, zip or pickle, HDF5, NumPy, bare JSON, zeros",
    "special files": (
        "directory, FIFO, socket, device, file of /proc, loop of links, sparse TB, no permission"
    ),
    "appended data": "a zip or ELF file behind the end",
    "version": "missing, 0, 2, empty",
    "fixed metadata": (
        "block size 0, 63 or 2^31, alignment 3 or none, keys out of order, hashes that are none"
    ),
    "companions": "missing, of another dtype, absmax or nested absmax off by one, codes flat or empty",
    "constants": (
        "NaN, infinite or negative scales, scales that overflow, altered code table or 8-bit map, "
        "tables out of order"
    ),
    "quant_state": (
        "not JSON, other keys, other block sizes, shapes that do not fit, offsets that are no fp32 value"
    ),
    "legal constants": "scales of zero, denormal scales, negative offsets",
    "pads": "not zero, too long, a name without number, a program inside",
    "table of sums": "missing, not last, too short, zeros",
    "embedded files": "names off the list, paths, larger than their limits",
    "embedded config": "missing, another than its hash, not JSON, NaN, nested deeply",
    "aliases": "not JSON, of nothing, of a companion, of a stored name, as a path",
    "damage": (
        "a flipped bit in header, codes, constants, files or sums; pages swapped, zeroed, cut and extended"
    ),
    "while in use": "truncated or modified while it is loaded, renamed over while open",
    "index entries": (
        "`../`, absolute, folder, backslash, NUL, URL, pickle, number, 300 characters, control characters"
    ),
    "index content": "not JSON, a list, empty, duplicate keys, 10^6 tensors, 2000 shards, 1 TB",
    "index and shards": (
        "a shard missing, unlisted, of another version; a tensor in two shards or none; both layouts"
    ),
    "index metadata": "a total_size that is wrong",
    "shards": "cut short, empty, another format, a FIFO, an unknown dtype, duplicates",
    "links": "out of the directory; inside it or hard links",
    "config.json": (
        "missing, not JSON, NaN, huge numbers, long digits, duplicate keys, deep nesting, 1 TB, a FIFO"
    ),
    "other weights": "pickles, shards without an index, an adapter, nothing",
    "quantized already": "by its config, by its tensor names",
    "remote code": "auto_map, custom_pipelines, trust_remote_code in config.json: stored, never run",
    "configuration, compiled": "absurd numbers in config.json: the compiler asks tensors, not the config",
    "values": "NaN or infinity in a weight, NaN in a kept tensor",
    "odd values": (
        "zeros, denormals, -0.0, largest finite values, partial blocks, empty tensors, rank 1 and 3, F64, I8"
    ),
    "unpackable dtypes": "F8 in a weight",
    "reserved names": "a tensor of the checkpoint called as the format's own",
    "tied weights": "tie_word_embeddings, and a head that differs",
    "tokenizer, compiled": "not JSON, ids above the vocabulary: stored as bytes, never parsed",
    "oversized files": "tokenizer.json of 500 MB or 1 TB, templates of 5 MB",
    "configuration, run": (
        "layers 10^9, -1, '32' or 1e9, hidden 0, odd head, vocab 2^31, rope NaN, another family"
    ),
    "configuration, other model": "layers, vocabulary or widths other than the tensors have",
    "tokenizer, run": "none, not JSON, nested deeply, not UTF-8, NaN in its config, ids above the vocabulary",
    "chat template, run": "malformed, reaching for Python or files, recursive, writing 100 MB, taking 10 GB",
    "adapters": (
        "pickles, nothing, odd configs, ranks of 10^9, tensors cut short, of other names, shapes or dtypes"
    ),
    "output place": "a directory, a missing directory, a device, a too long name, no permission",
    "output exists": "a file that is there, the input itself by any name",
    "verify against": "a checkpoint with other weights, tensors or files than the file was made from",
}


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        row: of ROWS.
        name: unique in its row.
        prepare: fills an empty folder.
        commands: to run there, one after the other.
        says: what each message must match; None where the input is accepted.
        around: what to do while each command runs.
        writes: what may be new in the folder afterwards.
        not_root: root may do it, and the case says nothing then.
    """

    row: str
    name: str
    prepare: Callable[[Path], object]
    commands: tuple[Command, ...]
    says: str | None
    around: Callable[[Path], AbstractContextManager[object]] = lambda _: nullcontext()
    writes: frozenset[str] = frozenset()
    not_root: bool = False

    @property
    def id(self) -> str:
        return f"{self.row}: {self.name}"


def all_cases() -> list[Case]:
    """Every case, in the order of the rows."""
    from . import checkpoints, containers, models

    cases = [*containers.cases(), *checkpoints.cases(), *models.cases()]
    order = list(ROWS)
    return sorted(cases, key=lambda case: order.index(case.row))
