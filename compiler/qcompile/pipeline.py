"""The main path of the compiler, top to bottom.

    Checkpoint.open   headers of all shards, config.json, tokenizer files; no weights
    make_plan         what each tensor becomes, where it lies; all sizes are known from here on
    ResumableFile     a temporary file beside the output, its space claimed at once
    Journal           which tensors an earlier run finished, and which this one does
    emit_tensors      one pass over the weights, in parallel
    seal              sums over what was written, then the header; until then no reader accepts the file
    verify_output     (--verify) read back from the disk and compare
    Judge             (--eval-text) KL and perplexity, beside those of the level below, measured first of all
    rename            the output appears, complete

Whatever fails on the way, the output is as it was before. A run that is killed leaves the temporary file and
its journal, and with `resume` so does one that is interrupted; the bytes are the same as of one run.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from nf4format.checkpoint import Checkpoint, source_hash
from nf4format.container import Nf4File, seal
from nf4format.errors import FormatError
from nf4format.header import PREFIX_BYTES
from nf4format.resumable import ResumableFile, partial_path
from nf4format.stats import Stats

from .absorb import write_corrections
from .calibrated import Encoders
from .device import open_device
from .emit import Emitted, Progress, emit_files, emit_tensors
from .errors import CompileError, EvaluationError
from .evaluation import Evaluation, Judge, Watch
from .held_out import held_out_errors
from .journal import Journal, plan_key
from .options import CompileOptions
from .plan import SOURCE_HASH_KEY, Plan, make_plan
from .policy import Decision
from .quality import TensorError, group_errors, plain_ratio
from .roles import group_of
from .summary import CompileSummary, OutputError, TensorSummary, stored_bytes
from .verify import verify_output
from .writeback import Writeback

OutputErrors = tuple[dict[str, OutputError], dict[str, OutputError]]
"""By the encoder's own statistics, and by held-out ones."""


def compile_checkpoint(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: CompileOptions | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda line: None,
    *,
    watch: Watch | None = None,
) -> CompileSummary:
    """Compile a checkpoint directory into one .nf4 file.

    The bytes of the output depend on the weights, the embedded files, the recorded options and the version
    of this package; not on the number of jobs, the shards, directories, locale or time, and on the device
    from level 2 on only. Memory does not grow with the model: a chunk for each job (three more on the way
    through a GPU), the scales of the tensors at work, and the embedded files; from level 2 on also a weight,
    its statistics and a few matrices of their sizes (if these are on a GPU, three of the former two).

    Args:
        model_dir: Hugging Face directory: config.json, *.safetensors, tokenizer files.
        out: file to write; it appears whole, at the end, or not at all.
        options: see `CompileOptions`; default policy by default.
        progress: is told of every chunk that was read; with texts to evaluate on, from the beginning again
            for the level below.
        tell: takes a line for the user: that there is no GPU, if one was to be used where there is; what is
            being evaluated.
        watch: is told of every few windows that were evaluated.

    Raises:
        CompileError: the checkpoint cannot be compiled or the output exists; the level is refused
            (EvaluationError).
        FormatError: the checkpoint does not follow its format.
        WriteError: the output cannot be written.
    """
    options = options or CompileOptions()
    started = time.perf_counter()
    jobs = options.num_jobs()
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(model_dir))
        stats = stack.enter_context(Stats(options.stats))
        others = stack.enter_context(Stats(options.held_out))
        plan = make_plan(checkpoint, options)
        _check_output(Path(out), checkpoint, options)
        device = stack.enter_context(ExitStack())
        encoding = device.enter_context(open_device(options, jobs, tell))
        encoders = Encoders(plan, options, stats, encoding.data_free, encoding.rounder)
        judge = Judge(model_dir, options, tell, watch) if options.eval_texts else None
        if judge:
            judge.measure_below(
                Path(out),
                [decision.name for decision in plan.decisions if decision.quantize],
                lambda path, below: compile_checkpoint(model_dir, path, below, progress, tell),
            )
        with ResumableFile(out, overwrite=options.force, resume=options.resume, keep=options.resume) as file:
            key = plan_key(checkpoint, plan, options, encoding.rounder.device)
            journal = Journal(file, key, plan)
            file.preallocate(plan.layout.file_bytes)
            file.pwrite(bytes(PREFIX_BYTES), 0)  # no reader accepts it, if an earlier run had come so far
            with journal, _forgetting(file, checkpoint):
                done = journal.finished(jobs)
                with Writeback(file.fd):
                    emitted = _emit(checkpoint, plan, encoders, file, journal, done, options, progress)
                    sha256 = _source_sha256(checkpoint, plan, emitted)
                    seal(file, plan.layout, {SOURCE_HASH_KEY: sha256}, threads=jobs)
                device.close()  # its memory is for whoever evaluates
                held_out = {}
                if options.held_out:
                    with Nf4File.from_descriptor(file.fd, file.path) as packed_file:
                        held_out = held_out_errors(checkpoint, plan, packed_file, others)
                errors = {name: tensor.error for name, tensor in emitted.items() if tensor.error}
                verify_seconds = 0.0
                if options.verify:
                    verify_started = time.perf_counter()
                    errors = verify_output(checkpoint, plan, emitted, file, level=options.level, jobs=jobs)
                    verify_seconds = time.perf_counter() - verify_started
                add_adapter = partial(write_corrections, corrections=encoders.corrections, rank=options.rank)
                evaluation = None
                if judge:
                    unpublished = partial_path(file.path)
                    add = partial(add_adapter, out=unpublished) if options.adapter else None
                    evaluation = judge.judge(file.path, unpublished, add)
    if options.adapter:
        add_adapter(options.adapter, out=out)
    seconds = time.perf_counter() - started - verify_seconds - (judge.seconds if judge else 0.0)
    return _summarize(
        Path(out),
        plan,
        options,
        emitted,
        (encoders.output_errors | journal.output_errors, held_out),
        evaluation=evaluation,
        resumed=done.keys(),
        errors=errors,
        source_sha256=sha256,
        seconds=seconds,
    )


def _emit(  # noqa: PLR0917 - what the main path has made so far
    checkpoint: Checkpoint,
    plan: Plan,
    encoders: Encoders,
    file: ResumableFile,
    journal: Journal,
    done: Mapping[str, Emitted],
    options: CompileOptions,
    progress: Progress | None,
) -> dict[str, Emitted]:
    """Write all tensors that are not done, and the embedded files, of a checkpoint that does not change."""
    emitted = emit_tensors(
        checkpoint,
        plan,
        encoders.of,
        file,
        levels=options.level_table(),
        jobs=options.num_jobs(),
        done=done,
        note=lambda name, tensor: journal.add(name, tensor, encoders.output_error(name)),
        progress=progress,
    )
    checkpoint.check_unchanged()
    emit_files(checkpoint, plan, file)
    return emitted


def plan_checkpoint(model_dir: str | os.PathLike[str], options: CompileOptions | None = None) -> Plan:
    """The plan alone: nothing is written, no weight is read but tied ones. Raises as compile_checkpoint."""
    with Checkpoint.open(model_dir) as checkpoint:
        return make_plan(checkpoint, options or CompileOptions())


@contextmanager
def _forgetting(file: ResumableFile, checkpoint: Checkpoint) -> Iterator[None]:
    """What was written is not kept where going on with it would fail again, or mix two versions."""
    try:
        yield
    except EvaluationError:  # with --resume and --force-level nothing is left to do
        raise
    except CompileError:  # weights that cannot be packed, or a file that does not verify
        file.keep = False
        raise
    except FormatError:
        try:
            checkpoint.check_unchanged()
        except FormatError:
            file.keep = False
        raise


def _check_output(out: Path, checkpoint: Checkpoint, options: CompileOptions) -> None:
    """Refuse outputs that would cost the user a file; the rest is checked where the file is made."""
    try:
        is_directory, is_there = out.is_dir(), out.exists()
    except OSError as error:  # a name that is too long, for one
        problem = f"cannot be written: {(error.strerror or str(error)).lower()}"
        raise CompileError(out, problem, remedy="choose another place or a shorter name") from error
    if is_directory:
        raise CompileError(
            out, "is a directory", expected="the name of a file", remedy="give a name such as out.nf4"
        )
    if not is_there:
        return
    inputs: Iterable[Path] = [
        *checkpoint.path.iterdir(),
        *(checkpoint.path / shard for shard in checkpoint.shards),
    ]
    for source in set(inputs):
        if source.exists() and out.samefile(source):
            raise CompileError(
                out,
                "is a file of the checkpoint itself",
                got=f"the same file as {source}",
                remedy="choose another name",
            )
    if not options.force:
        raise CompileError(out, "exists already", remedy="choose another name, or give --force to replace it")


def _source_sha256(checkpoint: Checkpoint, plan: Plan, emitted: dict[str, Emitted]) -> str:
    hashes = {name: tensor.sha256 for name, tensor in emitted.items()}
    hashes |= {alias: hashes[stored] for alias, stored in plan.aliases.items()}  # compared: equal bytes
    return source_hash(checkpoint.tensors.values(), hashes)


def _summarize(
    out: Path,
    plan: Plan,
    options: CompileOptions,
    emitted: dict[str, Emitted],
    output_errors: OutputErrors,
    *,
    evaluation: Evaluation | None,
    resumed: Collection[str],
    errors: dict[str, TensorError],
    source_sha256: str,
    seconds: float,
) -> CompileSummary:
    packed = [decision for decision in plan.decisions if decision.quantize]
    packed_parameters = sum(math.prod(decision.shape) for decision in packed)
    negative = sum(emitted[d.name].negative_scales * math.prod(d.shape) for d in packed)
    return CompileSummary(
        out=str(out),
        num_packed=len(packed),
        num_kept=len(plan.decisions) - len(packed),
        num_aliases=len(plan.aliases),
        num_parameters=sum(math.prod(decision.shape) for decision in plan.decisions),
        packed_parameters=packed_parameters,
        source_bytes=sum(decision.source_bytes for decision in plan.decisions),
        resumed_bytes=sum(d.source_bytes for d in plan.decisions if d.name in resumed),
        file_bytes=plan.layout.file_bytes,
        packed_bytes=stored_bytes(plan, [decision.name for decision in packed]),
        measured_parameters=sum(error.measured for error in errors.values()),
        level=options.level,
        levels=options.levels_name,
        tensors=tuple(
            _tensor_summary(decision, emitted[decision.name], errors, output_errors) for decision in packed
        ),
        groups=group_errors((group_of(decision.name), errors[decision.name]) for decision in packed),
        plain_ratio=plain_ratio(list(errors.values())),
        negative_scales=negative / max(1, packed_parameters),
        source_sha256=source_sha256,
        seconds=seconds,
        verified=options.verify,
        evaluation=evaluation,
    )


def _tensor_summary(
    decision: Decision,
    emitted: Emitted,
    errors: dict[str, TensorError],
    output_errors: OutputErrors,
) -> TensorSummary:
    error = errors[decision.name]
    weight = error.squared_weight or 1.0
    return TensorSummary(
        name=decision.name,
        group=group_of(decision.name),
        dtype=decision.dtype,
        shape=decision.shape,
        parameters=error.num_values,
        measured=error.measured,
        before=error.plain_error / weight,
        after=error.squared_error / weight,
        negative_scales=emitted.negative_scales,
        seconds=emitted.seconds,
        output=output_errors[0].get(decision.name),
        held_out=output_errors[1].get(decision.name),
    )
