"""Perplexity of a checkpoint's original and 4-bit weights on one text, by the protocol of `nf4 eval`.

python tools/bench/perplexity.py MODEL_DIR TEXT --window 512 --json tools/bench/results/perplexity.json
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
from report import Report, machine

import nf4
from nf4.text.perplexity import encode_documents, perplexity
from nf4.text.tokenizer import Tokenizer
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

WEIGHTS = {
    "original": CompileOptions(exclude=("*",)),
    "nf4 -O0": CompileOptions(level=0),
    "nf4 -O1": CompileOptions(level=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("text", type=Path, help="plain text, documents separated by a line <|doc|>")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--devices", nargs="+", default=["cpu"], choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    rows: list[list[str | float | int | None]] = []
    predicted = 0
    with tempfile.TemporaryDirectory() as folder:
        for weights, options in WEIGHTS.items():
            file = Path(folder) / f"{weights}.nf4"
            compile_checkpoint(arguments.model, file, options)
            for device, dtype in itertools.product(arguments.devices, ("float32", "bfloat16")):
                model = nf4.load(file, dtype=dtype, device=device)
                assert model.source is not None
                tokenizer = Tokenizer.from_file(model.source)
                tokens = encode_documents(tokenizer, arguments.text.read_text(encoding="utf-8"))
                began = time.perf_counter()
                result = perplexity(model, tokens, arguments.window, bos_id=tokenizer.bos_id)
                speed = result.tokens / (time.perf_counter() - began)
                predicted = result.tokens
                size = round(file.stat().st_size / 1e6, 1)
                arithmetic = dtype if arguments.devices == ["cpu"] else f"{dtype}, {device}"
                rows.append([weights, arithmetic, size, f"{result.perplexity:.3f}", round(speed)])
    Report(
        title=f"Perplexity of {arguments.model.name} on {arguments.text.name}",
        columns=["weights", "arithmetic", "file MB", "perplexity", "tokens/s"],
        rows=rows,
        machine=machine("nf4", "torch", gpu="cuda" in arguments.devices)
        | {"threads": str(torch.get_num_threads())},
        notes=[f"{predicted:,} tokens predicted, in windows of {arguments.window} that begin with BOS."],
    ).finish(arguments.json)


if __name__ == "__main__":
    main()
