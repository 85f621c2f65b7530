"""The way of `nf4 calibrate`, top to bottom: open the models, cut the text, collect, write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nf4format.container import Nf4File
from nf4format.stats import StatsWriter

from ..data.documents import DOCUMENT_SEPARATOR
from ..device import resolve
from ..errors import LoadError
from ..loading import COMPUTE_DTYPES, build_original, load
from ..model.decoder import CausalLM
from ..text.perplexity import encode_documents, windows_of
from ..text.tokenizer import Tokenizer
from .collect import Progress, collect, entry_specs
from .original import OriginalFile


@dataclass(frozen=True)
class CalibrateOptions:
    """What a user may choose.

    Attributes:
        data: text files, in UTF-8.
        full: whole moments instead of their diagonals; second passes always have them.
        packed: a .nf4 file that runs beside the original (second pass).
        layers: (first, stop) of the layers to measure; None = all.
        tokens: the most tokens to run; windows are taken evenly over the texts.
        seq_len: tokens of a window, BOS included; None = 2048, or the model's context if shorter.
        separator: what stands between documents.
        dtype: of the arithmetic.
        device: where layers run, the original's one at a time.
        force: replace an existing output.
    """

    data: Sequence[str | os.PathLike[str]]
    full: bool = False
    packed: str | os.PathLike[str] | None = None
    layers: tuple[int, int | None] | None = None
    tokens: int = 262_144
    seq_len: int | None = None
    separator: str = field(default=DOCUMENT_SEPARATOR)
    dtype: str = "float32"
    device: str = "cpu"
    force: bool = False


@dataclass(frozen=True)
class CalibrateResult:
    """What was done: tokens run, windows of how many, which layers, entries of the file."""

    tokens: int
    windows: int
    seq_len: int
    layers: range
    entries: int
    data_sha256: str


def calibrate(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: CalibrateOptions,
    progress: Progress | None = None,
) -> CalibrateResult:
    """Collect the statistics of a model: a checkpoint directory, or a .nf4 file that keeps its weights.

    Raises:
        LoadError: a model or text that cannot serve, with the reason.
        FormatError: a file is damaged.
        WriteError: the output cannot be written.
    """
    model, device = _original(source, options), resolve(options.device, source)
    packed = None
    if options.packed is not None:
        packed = load(options.packed, device=device, dtype=options.dtype)
        _check_same_shape(model, packed, options.packed)
    layers = _layers(options.layers, model.config.num_hidden_layers, source)
    windows, sha256 = _windows(model, source, options)
    specs = entry_specs(model, layers)
    full = options.full or packed is not None
    metadata = {"data_sha256": sha256, "layers": f"{layers.start}:{layers.stop}"}
    if packed is not None:
        assert packed.source is not None
        metadata["packed_sha256"] = packed.source.fingerprint
    writer = StatsWriter(
        out,
        specs,
        metadata,
        tokens=windows.numel(),
        full=full,
        cross=packed is not None,
        overwrite=options.force,
    )
    with writer:
        folder = Path(out).absolute().parent
        collect(
            model,
            windows,
            layers,
            writer,
            full=full,
            packed=packed,
            device=device,
            folder=folder,
            progress=progress,
        )
    return CalibrateResult(windows.numel(), len(windows), windows.shape[1], layers, len(specs), sha256)


def _original(source: str | os.PathLike[str], options: CalibrateOptions) -> CausalLM:
    """On the CPU, mapped: layers go to the device one at a time."""
    if Path(source).is_dir():
        return build_original(OriginalFile(source), COMPUTE_DTYPES[options.dtype]).eval()
    model = load(source, dtype=options.dtype)
    assert isinstance(model.source, Nf4File)
    packed = sorted(name for name in model.source.packed_names if name.startswith("model.layers."))
    if packed:
        raise LoadError(
            source,
            "its weights are packed already",
            tensor=packed[0],
            expected="the original ones",
            got="NF4",
            remedy="give the checkpoint directory; a packed file goes with --with",
        )
    return model


def _check_same_shape(model: CausalLM, packed: CausalLM, path: str | os.PathLike[str]) -> None:
    for field_ in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        expected, got = getattr(model.config, field_), getattr(packed.config, field_)
        if expected != got:
            raise LoadError(
                path, f"another model: {field_}", expected=expected, got=got, remedy="compile this checkpoint"
            )


def _layers(chosen: tuple[int, int | None] | None, count: int, source: str | os.PathLike[str]) -> range:
    first, stop = chosen or (0, None)
    stop = count if stop is None else stop
    if not 0 <= first < stop <= count:
        raise LoadError(source, "layers", expected=f"a range within 0:{count}", got=f"{first}:{stop}")
    return range(first, stop)


def _windows(
    model: CausalLM, source: str | os.PathLike[str], options: CalibrateOptions
) -> tuple[torch.Tensor, str]:
    """int64 [windows, length], and the SHA-256 of these numbers."""
    assert model.source is not None
    context = model.config.max_position_embeddings
    seq_len = min(2048, context) if options.seq_len is None else options.seq_len
    if seq_len > context:
        raise LoadError(source, "seq-len", expected=f"at most the model's {context} positions", got=seq_len)
    tokenizer = Tokenizer.from_file(model.source)
    ids: list[int] = []
    for path in options.data:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            got = f"byte {error.object[error.start]:#04x} at offset {error.start}"
            raise LoadError(path, "not a text", expected="UTF-8", got=got) from error
        ids += encode_documents(tokenizer, text, options.separator)
    windows = windows_of(ids, seq_len, tokenizer.bos_id)
    if not 0 <= int(windows.min()) <= int(windows.max()) < model.config.vocab_size:
        raise LoadError(source, "token ids outside the vocabulary", remedy="the tokenizer is another model's")
    most = max(1, options.tokens // windows.shape[1])
    if len(windows) > most:
        windows = windows[torch.arange(most) * len(windows) // most]
    return windows, hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()
