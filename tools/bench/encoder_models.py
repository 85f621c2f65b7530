"""What the levels of the encoder, and other tables of levels, do to a model's predictions.

    python tools/bench/encoder_models.py MODEL_DIR --calibration TEXT --test TEXT [--json FILE]

Levels: files by qcompile, compared with the original by KL divergence, perplexity, and the error at the
outputs of the layers, with statistics of the test text. -O2 and -O3 are calibrated on another text. "All
packed" has embeddings and head in NF4 too, and is compared with the same -O0.

Data types: the comparison of QLoRA's table 2 (arXiv 2305.14314) on this model, at -O0 and -O1.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from report import Report, machine
from safetensors import safe_open

import nf4
from nf4.calibration.original import OriginalFile
from nf4.calibration.run import CalibrateOptions, calibrate
from nf4.loading import build_original
from nf4.model.decoder import CausalLM
from nf4.text.divergence import Divergence, divergence
from nf4.text.perplexity import encode_documents, windows_of
from nf4.text.tokenizer import Tokenizer
from nf4format.blocks import dequantize
from nf4format.container import Nf4File
from nf4format.stats import Stats
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

TYPES = {"Int4": "int4", "FP4 E2M1": "fp4", "FP4 E3M0": "fp4-e3m0", "NF4": "nf4"}
Row = list[str | float | int | None]


class Bench:
    """One model, one text to calibrate on and one to test with."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.model, self.folder = arguments.model, folder
        self.calibration, self.test = arguments.calibration, arguments.test
        self.tokens, self.seq_len = arguments.tokens, arguments.seq_len
        file = OriginalFile(self.model)
        self.original: CausalLM = build_original(file, torch.float32).eval()
        tokenizer = Tokenizer.from_file(file)  # type: ignore[arg-type]
        ids = encode_documents(tokenizer, self.test.read_text(encoding="utf-8"))
        windows = windows_of(ids, self.seq_len, tokenizer.bos_id)
        count = min(len(windows), arguments.windows)
        self.windows = windows[torch.arange(count) * len(windows) // count]

    def compile(self, name: str, **options: object) -> Path:
        out = self.folder / f"{name}.nf4"
        compile_checkpoint(self.model, out, CompileOptions(force=True, **options))  # type: ignore[arg-type]
        return out

    def statistics(self, name: str, text: Path, packed: Path | None = None) -> str:
        out = self.folder / f"{name}.stats"
        options = CalibrateOptions(
            [text], full=True, packed=packed, tokens=self.tokens, seq_len=self.seq_len, force=True
        )
        calibrate(self.model, out, options)
        return str(out)

    def divergence(self, file: Path) -> Divergence:
        return divergence(self.original, nf4.load(file, dtype="float32"), self.windows)

    def output_errors(self, file: Path, statistics: str) -> dict[str, float]:
        """Squared error at the output of each packed layer, by given statistics."""
        errors = {}
        with Nf4File.open(file) as packed, Stats([statistics]) as stats:
            for path in sorted(self.model.glob("*.safetensors")):
                with safe_open(path, "pt") as tensors:
                    for name in set(tensors.keys()) & set(packed.packed_names) & set(stats.weights):
                        original = tensors.get_tensor(name).float().numpy()
                        difference = (
                            dequantize(packed.packed(name), "float32").reshape(original.shape) - original
                        )
                        moment = stats.weights[name].moment()
                        errors[name] = float(np.einsum("nk,nk->", difference @ moment, difference))
        return errors


def level_rows(bench: Bench) -> list[Row]:
    first = bench.statistics("first", bench.calibration)
    held_out = bench.statistics("held-out", bench.test)
    second = bench.compile("O2", level=2, stats=(first,))
    files = {
        "-O0": bench.compile("O0", level=0),
        "-O1": bench.compile("O1", level=1),
        "-O2": second,
        "-O3": bench.compile("O3", level=3, stats=(bench.statistics("second", bench.calibration, second),)),
        "-O0, all packed": bench.compile("O0-all", level=0, quantize_embeddings=True, quantize_head=True),
        "-O2, all packed": bench.compile(
            "O2-all", level=2, stats=(first,), quantize_embeddings=True, quantize_head=True
        ),
    }
    rows: list[Row] = []
    plain: Divergence | None = None
    plain_errors: dict[str, float] = {}
    for name, file in files.items():
        found, errors = bench.divergence(file), bench.output_errors(file, held_out)
        plain, plain_errors = plain or found, plain_errors or errors
        gap = math.exp(plain.nll) - math.exp(plain.original_nll)
        rows.append(
            [
                name,
                found.kl,
                found.kl_error,
                found.kl / plain.kl,
                f"{math.exp(found.nll):.3f}",
                (math.exp(plain.nll) - math.exp(found.nll)) / gap,
                float(np.mean([errors[key] / plain_errors[key] for key in plain_errors])),
                found.same_choice,
            ]
        )
        print(rows[-1], flush=True)
    rows.insert(0, ["original", 0.0, None, None, f"{math.exp(found.original_nll):.3f}", None, None, 1.0])
    return rows


def type_rows(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    for title, levels in TYPES.items():
        row: Row = [f"{title} with double quantization"]
        for level in (0, 1):
            out = bench.folder / "type.nf4"
            options = CompileOptions(level=level, levels=levels, verify=True, force=True)
            summary = compile_checkpoint(bench.model, out, options)
            found = bench.divergence(out)
            row += [summary.plain_ratio, found.kl, f"{math.exp(found.nll):.3f}"]
        rows.append(row)
        print(row, flush=True)
    rows.insert(0, ["original", None, 0.0, f"{math.exp(found.original_nll):.3f}", None, None, None])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--test", type=Path, required=True, help="text to test with, from another source")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens to calibrate on (default 32768)")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=60, help="windows to test with (default 60)")
    parser.add_argument("--only", choices=["levels", "types"], help="one of the two tables")
    parser.add_argument("--json", type=Path, help="write the table of levels there")
    parser.add_argument("--types-json", type=Path, help="write the table of data types there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nf4-bench-") as folder:
        bench = Bench(arguments, Path(folder))
        predicted = bench.windows.shape[0] * (bench.windows.shape[1] - 1)
        tested = f"Tested on {predicted:,} tokens of {bench.test.name}, windows of {bench.seq_len}, float32."
        if arguments.only != "types":
            Report(
                title=f"Levels of the encoder on {bench.model.name}",
                columns=[
                    "file",
                    "KL, nats a token",
                    "its standard error",
                    "over -O0's",
                    "perplexity",
                    "gap closed",
                    "output error over -O0's",
                    "same first choice",
                ],
                rows=level_rows(bench),
                machine=machine("nf4", "torch", "numpy"),
                notes=[
                    f"Calibrated on {bench.tokens:,} tokens of {bench.calibration.name}. {tested}",
                    "Gap: between the perplexities of -O0 and of the original; differences under 8 points "
                    "are noise. Output error: mean over layers, by statistics of the test text.",
                ],
            ).finish(arguments.json)
        if arguments.only != "levels":
            Report(
                title=f"Data types on {bench.model.name}",
                columns=[
                    "data type",
                    "-O0: weight error over NF4's",
                    "KL",
                    "perplexity",
                    "-O1: weight error over NF4's at -O0",
                    "KL at -O1",
                    "perplexity at -O1",
                ],
                rows=type_rows(bench),
                machine=machine("nf4", "torch", "numpy"),
                notes=[tested],
            ).finish(arguments.types_json)


if __name__ == "__main__":
    main()
