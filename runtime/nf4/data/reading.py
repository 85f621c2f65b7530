"""Files -> examples, tokenized once: the whole way, read top to bottom.

Each file is streamed, its rows understood by `schema`, conversations rendered by `renderer`, texts tokenized
by all cores in batches, and the examples written to a store that the next run with the same file,
tokenizer and options finds again. Neither file nor tokens are ever in memory as a whole.

Plain text follows the protocol of `nf4 eval`, so that both report the same perplexity: documents are
separated by a line `<|doc|>`, each is encoded, the tokens are laid end to end and cut into windows of
seq_len, BOS in front of each where the model has one. The last, incomplete window is left out unless it is
the only one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from tqdm import tqdm

from nf4format.atomic import AtomicFile
from nf4format.errors import TakenError

from ..errors import TrainError
from .dataset import Concatenation, Dataset, FileReport, Source
from .documents import read_documents
from .encode import RowEncoder, TextEncoder, Windows, encode_pieces
from .files import DataFile, find_files
from .options import DataOptions
from .rows import read_rows
from .schema import FIELDS, Chat, Sample, Schema
from .store import VERSION, StoreWriter, TokenStore, open_store
from .template import Template, find_template
from .token_cache import TokenCache, find_cache

# Characters encoded at once: enough for all cores, some 100 MB of encodings.
_BATCH_CHARS = 1 << 20
_BATCH_ROWS = 4096
_T = TypeVar("_T")


def load_sources(
    paths: Sequence[tuple[str | Path, float]],
    tokenizer: TextEncoder,
    options: DataOptions,
    *,
    progress: bool = False,
) -> list[Source]:
    """Read and tokenize parts of the training data, or find them tokenized.

    Args:
        paths: (file or directory, weight) of each part.
        tokenizer: the model's.
        options: see there.
        progress: show a bar for each file that is tokenized.

    Raises:
        TrainError: options that cannot be used; a file of an unsupported kind, malformed or empty; rows
            that fit no schema; not one token with loss, or every row cut. Told with file and line.
        FormatError: a file that cannot be read.
        WriteError: the cache cannot be written.
    """
    return [Source(load_dataset([path], tokenizer, options, progress=progress), w) for path, w in paths]


def load_dataset(
    paths: Iterable[str | Path], tokenizer: TextEncoder, options: DataOptions, *, progress: bool = False
) -> Dataset:
    """`load_sources` of files and directories that count as one part."""
    options.check()
    if options.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    how = _Encoding(tokenizer, options, find_template(options.template, tokenizer.chat_templates))
    cache = None if tokenizer.fingerprint is None else find_cache(options)
    if cache is not None:
        cache.remove_abandoned()
    stores = []
    for path in map(Path, paths):
        # Empty files of a directory are left out; a file that was named must hold something.
        files = [file for file in find_files(path) if file == path or file.stat().st_size]
        if not files:
            raise TrainError(path, "every file in the directory is empty")
        stores += [_load_file(file, how, cache, progress) for file in files]
    if cache is not None:
        cache.evict()
    return stores[0] if len(stores) == 1 else Concatenation(stores)


def _load_file(path: Path, how: _Encoding, cache: TokenCache | None, progress: bool) -> Dataset:
    bar = tqdm(desc=f"tokenizing {path.name}", unit="B", unit_scale=True, disable=not progress, leave=False)
    with bar, DataFile(path, bar.update) as file:
        bar.total = file.size
        key = _key(file, how)
        if cache is not None and (known := cache.find(key, how.options.seq_len)) is not None:
            return known.with_path(path)
        bar.reset(file.size)
        if cache is not None:
            with suppress(TakenError):  # another process is at the same; not waited for
                return _make_store(cache.new(key), key, file, how)
        # Mapped and without a name: gone with the last who uses it.
        with tempfile.TemporaryDirectory(prefix="nf4-") as temporary:
            return _make_store(AtomicFile(Path(temporary, "tokens")), key, file, how)


def _key(file: DataFile, how: _Encoding) -> str:
    """Of everything that decides the examples of a file."""
    tokenizer, options, template = how
    parts = {
        "version": VERSION,
        "content": file.content_sum(),
        "kind": file.kind,
        "tokenizer": tokenizer.fingerprint,
        "special_tokens": dict(tokenizer.special_tokens),
        "template": template,
        "options": [options.seq_len, options.loss, sorted(options.columns.items())],
        "chat": [options.as_chat, options.system, options.date],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


class _Encoding(NamedTuple):
    """What decides how a file is encoded."""

    tokenizer: TextEncoder
    options: DataOptions
    template: Template | None


def _make_store(output: AtomicFile, key: str, file: DataFile, how: _Encoding) -> TokenStore:
    with output:
        writer = StoreWriter(output, wide=how.tokenizer.max_id >= 1 << 16)
        tokenize = _tokenize_text if file.kind == "text" else _tokenize_rows
        counts = tokenize(file, how, writer)
        file.check_unchanged()
        report = FileReport(
            str(file.path),
            counts.rows,
            len(writer),
            counts.truncated,
            counts.dropped,
            writer.tokens,
            writer.labelled,
            counts.notes,
        )
        writer.finish(key, report)
    store = open_store(output.path, key, how.options.seq_len)
    if store is None:
        problem = "tokenized data was damaged right after writing"
        raise TrainError(output.path, problem, remedy="check the disk")
    return store


class _Counts(NamedTuple):
    """What `FileReport` tells of rows."""

    rows: int
    truncated: int = 0
    dropped: int = 0
    notes: tuple[str, ...] = ()


def _tokenize_text(file: DataFile, how: _Encoding, writer: StoreWriter) -> _Counts:
    windows = Windows(how.tokenizer, how.options.seq_len)
    documents = 0
    batches = _batches(read_documents(file), lambda part: len(part.text))
    with closing(_ahead((parts, encode_pieces(how.tokenizer, parts)) for parts in batches)) as encoded:
        for parts, tokens in encoded:
            documents += sum(part.begins for part in parts)
            for example in windows.add(tokens):
                writer.add(example)
    for example in windows.finish():
        writer.add(example)
    if not len(writer):
        raise TrainError(file.path, "no text to train on", expected="at least two tokens")
    return _Counts(documents)


def _tokenize_rows(file: DataFile, how: _Encoding, writer: StoreWriter) -> _Counts:
    rows = truncated = dropped = 0
    batches = _batches(_samples(file, how), lambda pair: _characters(pair[1]))
    with (
        closing(RowEncoder(*how)) as encoder,
        closing(_ahead(encoder.encode(*zip(*batch, strict=True)) for batch in batches)) as encoded,
    ):
        for results in encoded:
            for examples, is_cut in results:
                rows += 1
                truncated += is_cut
                dropped += not examples
                for example in examples:
                    writer.add(example)
        notes = encoder.notes
    seq_len = how.options.seq_len
    if rows == 0:
        raise TrainError(file.path, "no rows", expected="at least one", got="an empty file")
    if not len(writer) and truncated:
        raise TrainError(
            file.path,
            f"every label is masked: all {dropped:,} prompts fill the sequence length of {seq_len}",
            remedy="raise the sequence length or shorten the prompts",
        )
    if not len(writer):
        raise TrainError(
            file.path,
            f"every label is masked: none of {dropped:,} rows has a completion or a message of the assistant",
            remedy="check the data, or learn every token with --loss all",
        )
    if truncated == rows:
        raise TrainError(
            file.path,
            f"every row is cut: all {rows:,} are longer than the sequence length of {seq_len}",
            remedy="raise the sequence length",
        )
    return _Counts(rows, truncated, dropped, notes)


def _samples(file: DataFile, how: _Encoding) -> Iterator[tuple[str, Sample]]:
    """(place, meaning) of every row; the first one's keys decide the schema."""
    schema: Schema | None = None
    options = how.options
    as_chat = how.template is not None if options.as_chat is None else options.as_chat
    for place, row in read_rows(file, FIELDS | set(options.columns.values())):
        if schema is None:
            schema = Schema.recognise(row, place, options.columns, as_chat=as_chat, system=options.system)
        yield place, schema.read(row, place)


def _characters(sample: Sample) -> int:
    texts = [m["content"] for m in sample.messages] if isinstance(sample, Chat) else sample
    return sum(map(len, texts))


def _ahead(items: Iterable[_T]) -> Generator[_T, None, None]:
    """The items, each made by a thread while the caller works on the one before."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield cast(_T, item)


def _batches(items: Iterator[_T], size: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Lists of items that together reach _BATCH_CHARS or _BATCH_ROWS."""
    batch: list[_T] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += size(item)
        if characters >= _BATCH_CHARS or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
