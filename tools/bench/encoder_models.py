"""What the levels of the encoder, and other tables of levels, do to a model's predictions.

    python tools/bench/encoder_models.py MODEL_DIR --calibration TEXT --test TEXT --json FILE \\
        [--test TEXT --json FILE ...] [--types-json FILE]

Levels: files by qcompile, compared with the original by KL divergence, perplexity, and the error at the
outputs of the layers, with statistics of the test text. -O2 and -O3 are calibrated on another text. "All
packed" has embeddings and head in NF4 too, and is compared with the same -O0. Standard errors are those of a
bootstrap over windows, in which each draw takes the same windows of all models.

Data types: the comparison of QLoRA's table 2 (arXiv 2305.14314) on this model: scales in float32, as each
block's largest magnitude is; -O0, where they are quantized too; -O1.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

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
from nf4.text.perplexity import encode_documents, evenly, windows_of
from nf4.text.tokenizer import Tokenizer
from nf4format.blocks import dequantize, quantize_codes
from nf4format.codebook import BLOCK
from nf4format.container import Nf4File
from nf4format.levels import LEVELS
from nf4format.stats import Stats
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

TYPES = {"Int4": "int4", "FP4 E2M1": "fp4", "FP4 E3M0": "fp4-e3m0", "NF4": "nf4"}
DRAWS = 2000
Row = list[str | float | int | None]


class Bench:
    """One model and one text to calibrate on."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.model, self.folder = arguments.model, folder
        self.calibration, self.tokens = arguments.calibration, arguments.tokens
        self.seq_len, self.count = arguments.seq_len, arguments.windows
        self.device = arguments.device
        file = OriginalFile(self.model)
        self.original: CausalLM = build_original(file, torch.float32).to(self.device).eval()
        self._tokenizer = Tokenizer.from_file(file)  # type: ignore[arg-type]

    def windows(self, text: Path) -> torch.Tensor:
        ids = encode_documents(self._tokenizer, text.read_text(encoding="utf-8"))
        return evenly(windows_of(ids, self.seq_len, self._tokenizer.bos_id), self.count)

    def tested(self, text: Path, windows: torch.Tensor) -> str:
        """The note that says on what."""
        tokens = windows.shape[0] * (windows.shape[1] - 1)
        return (
            f"Tested on {tokens:,} tokens of {text.name}, {len(windows)} windows of {self.seq_len}, float32."
        )

    def compile(self, name: str, **options: Any) -> Path:
        out = self.folder / f"{name}.nf4"
        compile_checkpoint(self.model, out, CompileOptions(force=True, device=self.device, **options))
        return out

    def statistics(self, name: str, text: Path, packed: Path | None = None, tokens: int | None = None) -> str:
        out = self.folder / f"{name}.stats"
        options = CalibrateOptions(
            [text],
            full=True,
            packed=packed,
            tokens=tokens or self.tokens,
            seq_len=self.seq_len,
            device=self.device,
            force=True,
        )
        calibrate(self.model, out, options)
        return str(out)

    def levels(self) -> dict[str, Path]:
        """A file of each level."""
        first = self.statistics("first", self.calibration)
        second = self.compile("O2", level=2, stats=(first,))
        whole = {"quantize_embeddings": True, "quantize_head": True}
        return {
            "-O0": self.compile("O0", level=0),
            "-O1": self.compile("O1", level=1),
            "-O2": second,
            "-O3": self.compile("O3", level=3, stats=(self.statistics("second", self.calibration, second),)),
            "-O0, all packed": self.compile("O0-all", level=0, **whole),
            "-O2, all packed": self.compile("O2-all", level=2, stats=(first,), **whole),
        }

    def divergence(self, file: Path, windows: torch.Tensor) -> Divergence:
        return divergence(self.original, nf4.load(file, dtype="float32", device=self.device), windows)

    def divergence_with_float32_scales(
        self, names: tuple[str, ...], levels: str, windows: torch.Tensor
    ) -> Divergence:
        """Of the model whose weights of these names went through codes and came back."""
        model = build_original(OriginalFile(self.model), torch.float32).eval()
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))
            weight = with_float32_scales(module.get_buffer("weight").float().numpy(), levels)
            module.register_buffer("weight", torch.from_numpy(weight))
        return divergence(self.original, model.to(self.device), windows)

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


def compared(plain: Divergence, found: Divergence) -> tuple[float, float, float, float]:
    """KL over that of -O0, share of the gap in perplexity that is closed, each with its standard error."""
    columns = np.array(
        [
            plain.window_kl,
            found.window_kl,
            plain.window_original_nll,
            plain.window_nll,
            found.window_nll,
        ]
    )

    def figures(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        original, before, after = np.exp(means[2:])
        return means[1] / means[0], (before - after) / (before - original)

    count = columns.shape[1]
    drawn = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    ratio, gap = figures(columns.mean(axis=1))
    ratios, gaps = figures(columns[:, drawn].mean(axis=2))
    return float(ratio), float(ratios.std()), float(gap), float(gaps.std())


def level_rows(bench: Bench, files: dict[str, Path], text: Path, windows: torch.Tensor) -> list[Row]:
    held_out = bench.statistics("held-out", text, tokens=windows.numel())
    rows: list[Row] = []
    plain: Divergence | None = None
    plain_errors: dict[str, float] = {}
    for name, file in files.items():
        found, errors = bench.divergence(file, windows), bench.output_errors(file, held_out)
        plain, plain_errors = plain or found, plain_errors or errors
        ratio, ratio_error, gap, gap_error = compared(plain, found)
        rows.append(
            [
                name,
                found.kl,
                ratio,
                ratio_error if found is not plain else None,
                f"{found.perplexity:.3f}",
                gap,
                gap_error if found is not plain else None,
                float(np.mean([errors[key] / plain_errors[key] for key in plain_errors])),
                found.same_choice,
            ]
        )
        print(rows[-1], flush=True)
    rows.insert(0, ["original", 0.0, None, None, f"{found.original_perplexity:.3f}", None, None, None, 1.0])
    return rows


def type_rows(bench: Bench, windows: torch.Tensor) -> list[Row]:
    rows: list[Row] = []
    for title, levels in TYPES.items():
        row: Row = []
        for level in (0, 1):
            out = bench.folder / "type.nf4"
            options = CompileOptions(level=level, levels=levels, verify=True, force=True)
            summary = compile_checkpoint(bench.model, out, options)
            found = bench.divergence(out, windows)
            row += [summary.plain_ratio, found.kl, f"{found.perplexity:.3f}"]
        with Nf4File.open(out) as file:
            names = file.packed_names
        plain = bench.divergence_with_float32_scales(names, levels, windows)
        rows.append([title, plain.kl, f"{plain.perplexity:.3f}", *row])
        print(rows[-1], flush=True)
    rows.insert(0, ["original", 0.0, f"{found.original_perplexity:.3f}", *([None] * 6)])
    return rows


def with_float32_scales(weight: np.ndarray, levels: str) -> np.ndarray:
    """Through codes and back, scales as they are: bitsandbytes' 4 bits without double quantization."""
    packed, absmax = quantize_codes(weight.reshape(-1), "float32", levels=LEVELS[levels])
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: weight.size]
    decoded = LEVELS[levels][codes] * np.repeat(absmax, BLOCK)[: weight.size]
    return decoded.reshape(weight.shape)


def report_levels(bench: Bench, tests: list[Path], paths: list[Path]) -> None:
    files = bench.levels()
    for number, text in enumerate(tests):
        windows = bench.windows(text)
        Report(
            title=f"Levels of the encoder on {bench.model.name}, {text.name}",
            columns=[
                "file",
                "KL, nats a token",
                "over -O0's",
                "+-",
                "perplexity",
                "gap closed",
                "+-",
                "output error over -O0's",
                "same first choice",
            ],
            rows=level_rows(bench, files, text, windows),
            machine=machine("nf4", "torch", "numpy", gpu=bench.device != "cpu"),
            notes=[
                f"Calibrated on {bench.tokens:,} tokens of {bench.calibration.name}. "
                f"{bench.tested(text, windows)}",
                "Gap: between the perplexities of -O0 and of the original. +-: standard errors, over windows "
                "drawn anew. Output error: mean over layers, by statistics of the test text.",
            ],
        ).finish(paths[number] if paths else None)


def report_types(bench: Bench, text: Path, path: Path | None) -> None:
    windows = bench.windows(text)
    Report(
        title=f"Data types on {bench.model.name}",
        columns=[
            "data type",
            "float32 scales (4.5 bits): KL",
            "perplexity",
            "-O0 (4.127 bits): weight error over NF4's",
            "KL",
            "perplexity",
            "-O1 (4.127 bits): weight error over NF4's at -O0",
            "KL",
            "perplexity",
        ],
        rows=type_rows(bench, windows),
        machine=machine("nf4", "torch", "numpy", gpu=bench.device != "cpu"),
        notes=[
            bench.tested(text, windows),
            "Scales are the blocks' largest magnitudes, in float32 or, at -O0, doubly quantized; at -O1 they "
            "are searched for.",
        ],
    ).finish(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument(
        "--test",
        type=Path,
        action="append",
        required=True,
        help="text to test with, from another source; repeatable; data types take the first",
    )
    parser.add_argument("--tokens", type=int, default=262_144, help="to calibrate on (default 262144)")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=60, help="most windows of a text (default 60)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--only", choices=["levels", "types"], help="one of the two tables")
    parser.add_argument(
        "--json", type=Path, action="append", help="write the table of levels there: one a test"
    )
    parser.add_argument("--types-json", type=Path, help="write the table of data types there")
    arguments = parser.parse_args()
    if arguments.json and len(arguments.json) != len(arguments.test):
        parser.error("give as many --json as --test")
    with tempfile.TemporaryDirectory(prefix="nf4-bench-") as folder:
        bench = Bench(arguments, Path(folder))
        if arguments.only != "types":
            report_levels(bench, arguments.test, arguments.json or [])
        if arguments.only != "levels":
            report_types(bench, arguments.test[0], arguments.types_json)


if __name__ == "__main__":
    main()
