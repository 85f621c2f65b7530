"""A short run of the fuzzer, and that it would notice; long runs: docs/hostile-input.md."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import fuzz
import mutators
import properties
import pytest

from nf4format import header as header_module
from nf4format.errors import FormatError

TOOL = Path(fuzz.__file__)


def test_nothing_is_violated(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, TOOL, "--count", "8000", "--seed", "11", "--jobs", "1", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(out.read_text())
    assert facts["inputs"] == 8000
    for name, target in facts["targets"].items():
        assert target["accepted"] > 50, name  # deep enough to be accepted at times
        assert target["kinds_of_refusal"] > 10, name


def test_the_corpus_is_good() -> None:
    with fuzz.checks() as by_target:
        for target in ("container", "source", "index"):
            for seed in fuzz.seeds(target):
                assert by_target[target](seed), target


def test_inputs_follow_from_the_seed() -> None:
    corpora = {target: fuzz.seeds(target) for target in fuzz.TARGETS}
    first, again = ([fuzz.input_of(3, i, corpora) for i in range(64)] for _ in range(2))
    assert first == again
    assert first != [fuzz.input_of(4, i, corpora) for i in range(64)]
    assert {target for target, _ in first} == set(fuzz.TARGETS)


def test_a_laxer_reader_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were sizes believed, something would soon be accepted that safetensors refuses."""

    class AnySize:
        def __ne__(self, other: object) -> bool:
            return False

    monkeypatch.setattr(header_module, "_tensor_bytes", lambda dtype, shape: AnySize())
    check = properties.Source()
    rng = random.Random(0)
    seed = fuzz.seeds("source")[1]
    with pytest.raises(properties.Violation):
        for _ in range(3000):
            check(mutators.source(seed, rng))


def test_other_exceptions_and_long_messages_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check = properties.Source()
    good = fuzz.seeds("source")[0]

    def fail(error: BaseException) -> None:
        def read(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(properties, "read_header", read)

    for error, message in [
        (KeyError("x"), "KeyError"),
        (MemoryError(), "MemoryError"),
        (FormatError("x", "wrong"), "nothing to do about it"),
        (FormatError("x", "wrong", remedy="y" * 5000), "not one printable line"),
    ]:
        fail(error)
        with pytest.raises(properties.Violation, match=message):
            check(good)
