"""Well-formed safetensors files, sums included, that are not .nf4 files: each for its own reason."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from nf4format.codebook import NESTED_MAP, NF4_LEVELS
from nf4format.container import config_sha256
from nf4format.layout import QUANT_STATE
from nf4format.sums import SUMS_NAME

from .draft import Draft, RawTensor

X = "model.layers.0.ragged.weight"  # float16 [7, 19]: 133 elements, 67 bytes of codes, 3 blocks
STATE = X + QUANT_STATE

Edit = Callable[[Draft], None]


def floats(*values: float) -> RawTensor:
    return ("F32", [len(values)], np.array(values, np.float32).tobytes())


def altered(table: np.ndarray, index: int, value: float) -> RawTensor:
    changed = table.copy()
    changed[index] = value
    return floats(*changed)


def metadata(**changes: str | None) -> Edit:
    def edit(draft: Draft) -> None:
        for key, value in changes.items():
            if value is None:
                del draft.metadata["nf4." + key]
            else:
                draft.metadata["nf4." + key] = value

    return edit


def store(name: str, tensor: RawTensor) -> Edit:
    """Replace a tensor, or add one in front of the embedded files."""

    def edit(draft: Draft) -> None:
        known = name in draft.tensors
        draft.tensors[name] = tensor
        if not known:
            draft.move(name, before="__file__/config.json")

    return edit


def state(**changes: object) -> Edit:
    return lambda draft: draft.state(**changes)


def state_text(change: Callable[[bytes], bytes]) -> Edit:
    return lambda draft: draft.state_text(change(draft.tensors[STATE][2]))


def config(text: bytes, *, honest: bool = True) -> Edit:
    def edit(draft: Draft) -> None:
        draft.tensors["__file__/config.json"] = ("U8", [len(text)], text)
        if honest:
            draft.metadata["nf4.config_sha256"] = config_sha256(text)

    return edit


def without(name: str) -> Edit:
    def edit(draft: Draft) -> None:
        del draft.tensors[name]

    return edit


def sums_tensor(change: Callable[[bytes], bytes]) -> Edit:
    def edit(draft: Draft) -> None:
        draft.fresh_sums = False
        data = change(draft.tensors[SUMS_NAME][2])
        draft.tensors[SUMS_NAME] = ("U8", [len(data)], data)

    return edit


def declared(table: np.ndarray, index: int, value: float) -> Edit:
    """Other levels, and the key that says so."""

    def edit(draft: Draft) -> None:
        named = {**draft.metadata, "nf4.levels": "custom"}
        first = {key: named.pop(key) for key in ("format", "nf4.version")}
        draft.metadata = first | dict(sorted(named.items()))
        draft.tensors[X + ".quant_map"] = altered(table, index, value)

    return edit


def unordered(draft: Draft) -> None:
    draft.metadata = {"nf4.version": "1", **draft.metadata}


def small_page(draft: Draft) -> None:
    draft.page = 64


# id -> (edit, pattern of the message)
BAD: dict[str, tuple[Edit, str]] = {
    "version missing": (metadata(version=None), "no nf4.version .* ordinary safetensors.*; compile"),
    "version 2": (metadata(version="2"), "expected '1', got '2'; the file needs a newer reader"),
    "version 0": (metadata(version="0"), "expected '1', got '0'"),
    "version empty": (metadata(version=""), "expected '1', got ''"),
    "blocksize 0": (metadata(blocksize="0"), "metadata nf4.blocksize, expected '64', got '0'"),
    "blocksize 2^31": (metadata(blocksize="2147483648"), "nf4.blocksize, expected '64'"),
    "alignment 3": (metadata(align="3"), "nf4.align, expected '4096', got '3'"),
    "alignment missing": (metadata(align=None), "nf4.align, expected '4096', got None"),
    "metadata out of order": (unordered, "metadata keys are out of order"),
    "source hash missing": (
        metadata(source_sha256=None),
        "nf4.source_sha256, expected 64 hex digits, got None",
    ),
    "config hash upper case": (metadata(config_sha256="A" * 64), "nf4.config_sha256, expected 64 hex"),
    "data not on a page": (small_page, "the data region is misaligned, expected a multiple of 4096"),
    "sums missing": (without(SUMS_NAME), f"expected {SUMS_NAME}, got '__file__/tokenizer.json'"),
    "sums not last": (lambda d: d.move(SUMS_NAME, before="__file__/config.json"), "not the table of sums"),
    "sums too short": (
        sums_tensor(lambda data: data[:-8]),
        f"'{SUMS_NAME}': .* a wrong size, expected .* got",
    ),
    "sums zero": (sums_tensor(lambda data: bytes(len(data))), "the table of sums is damaged"),
    "codes missing": (without(X), "'.*ragged.weight': its companion '.*ragged.weight' is missing"),
    "absmax missing": (
        without(X + ".absmax"),
        "'.*ragged.weight': its companion '.*weight.absmax' is missing",
    ),
    "nested map missing": (without(X + ".nested_quant_map"), "companion '.*nested_quant_map' is missing"),
    "codes flat": (store(X, ("U8", [67], bytes(67))), r"expected U8 \[bytes, 1\], got U8 \[67\]"),
    "codes I8": (
        store(X, ("I8", [67, 1], bytes(67))),
        r"'.*ragged.weight': not the codes .* I8 \[67, 1\]",
    ),
    "codes empty": (store(X, ("U8", [0, 1], b"")), "not the codes of a weight"),
    "absmax off by one": (
        store(X + ".absmax", ("U8", [4], bytes(4))),
        r"absmax'.*expected U8 \[3\], got U8 \[4",
    ),
    "absmax F32": (store(X + ".absmax", floats(1, 2, 3)), r"expected U8 \[3\], got F32 \[3\]"),
    "nested absmax off by one": (
        store(X + ".nested_absmax", floats(1, 2)),
        r"expected F32 \[1\], got F32 \[2\]",
    ),
    "nested absmax NaN": (
        store(X + ".nested_absmax", floats(np.nan)),
        "nested_absmax': not a scale.* got nan",
    ),
    "nested absmax infinite": (store(X + ".nested_absmax", floats(np.inf)), "not a scale.* got inf"),
    "nested absmax negative": (store(X + ".nested_absmax", floats(-1)), "not a scale.* got -1.0"),
    "scales overflow": (
        lambda d: (
            store(X + ".nested_absmax", floats(3e38))(d),
            d.state(nested_offset=float(np.float32(2e38))),
        ),
        "its scales overflow fp32, got 4.99",
    ),
    "quant map of 15": (
        store(X + ".quant_map", floats(*NF4_LEVELS[:15])),
        r"expected F32 \[16\], got F32 \[15\]",
    ),
    "quant map altered": (
        store(X + ".quant_map", altered(NF4_LEVELS, 3, -0.4)),
        "not the quant_map of NF4, got -0.4.* at 3 instead of -0.39",
    ),
    "quant map NaN": (store(X + ".quant_map", altered(NF4_LEVELS, 3, np.nan)), "not the quant_map of NF4"),
    "quant map declared, NaN": (declared(NF4_LEVELS, 3, np.nan), "not a table of levels: .* finite"),
    "quant map declared, out of order": (declared(NF4_LEVELS, 3, 0.5), "levels: .* ascending order"),
    "quant map declared, beyond 1": (declared(NF4_LEVELS, 15, 1e30), "levels: .* last in"),
    "nested map altered": (
        store(X + ".nested_quant_map", altered(NESTED_MAP, 255, 2.0)),
        "not the nested_quant_map of NF4, got 2.0 at 255 instead of 1.0",
    ),
    "state not JSON": (state_text(lambda text: text[:-60]), "quant_state.bitsandbytes__nf4': not JSON"),
    "state padded with NUL": (state_text(lambda text: text.rstrip() + bytes(9)), "not JSON"),
    "state not an object": (state_text(lambda text: b"[]"), "expected a JSON object, got list"),
    "state duplicate key": (
        state_text(lambda text: b'{"blocksize": 64, ' + text[1:]),
        "'blocksize' appears twice",
    ),
    "state too long": (state_text(lambda text: text + b" " * 4096), "expected U8 of at most 4096 bytes"),
    "state extra key": (state(extra=1), "its keys, expected quant_type, .* got .*extra"),
    "state missing key": (state(nested_dtype=...), "its keys"),
    "state other type": (state(quant_type="fp4"), "quant_type, expected 'nf4', got 'fp4'"),
    "state blocksize 0": (state(blocksize=0), "blocksize, expected 64, got 0"),
    "state blocksize 63": (state(blocksize=63), "blocksize, expected 64, got 63"),
    "state blocksize float": (state(blocksize=64.0), "blocksize, expected 64, got 64.0"),
    "state nested blocksize 2^31": (
        state(nested_blocksize=1 << 31),
        "nested_blocksize, expected 256, got 2147483648",
    ),
    "state dtype": (state(dtype="int8"), "dtype, expected float32 or bfloat16 or float16, got 'int8'"),
    "state dtype list": (state(dtype=["float16"]), "dtype, expected"),
    "state shape too small": (state(shape=[7, 18]), r"shape \[7, 18\] does not fit 67 bytes of codes"),
    "state shape negative": (state(shape=[-7, -19]), "expected dimensions from 0"),
    "state shape float": (state(shape=[7.0, 19]), "shape, expected a list of integers"),
    "state shape bool": (state(shape=[True, 133]), "shape, expected a list of integers"),
    "state shape huge": (state(shape=[1 << 40, 1 << 40]), "at most .* elements"),
    "state shape empty": (state(shape=[0, 19]), "an empty weight"),
    "state rank 9": (state(shape=[7, 19, *[1] * 7]), "at most 8 dimensions"),
    "offset not fp32": (state(nested_offset=0.1), "nested_offset, expected a finite fp32 value, got 0.1"),
    "offset integer": (state(nested_offset=0), "nested_offset, expected a finite fp32 value, got 0"),
    "offset string": (state(nested_offset="0.5"), "nested_offset, expected a finite fp32 value"),
    "offset above fp32": (state(nested_offset=1e300), "nested_offset, expected a finite fp32 value"),
    "offset NaN": (state(nested_offset=float("nan")), "NaN is not JSON"),
    "offset infinite": (
        state_text(lambda text: text.replace(b'"nested_offset": ', b'"nested_offset": 1e999, "x": ')),
        "out of range",
    ),
    "pad not zero": (
        lambda d: d.rename("flags", "__pad__.7"),
        "'__pad__.7': one dimension of U8|expected one dim",
    ),
    "pad with a program": (
        store("__pad__.7", ("U8", [5], b"\x7fELF\0")),
        "a pad holds bytes other than zero",
    ),
    "pad of 2 MB": (
        store("__pad__.7", ("U8", [1 << 21], bytes(1 << 21))),
        "not a pad, expected 1 to 4095",
    ),
    "pad without number": (store("__pad__.x", ("U8", [5], bytes(5))), "'__pad__.x': not a pad"),
    "unknown reserved name": (store("__nf4__.flags", ("U8", [5], bytes(5))), "version 1 does not have"),
    "file not on the list": (store("__file__/setup.py", ("U8", [5], b"pass\n")), "may be embedded"),
    "file outside": (store("__file__/.ssh/authorized_keys", ("U8", [1], b"k")), "may be embedded"),
    "file too large": (
        store("__file__/chat_template.jinja", ("U8", [(4 << 20) + 1], bytes((4 << 20) + 1))),
        "'__file__/chat_template.jinja': too large, expected at most 4194304 bytes, got 4194305",
    ),
    "config missing": (without("__file__/config.json"), "no embedded config.json"),
    "config changed": (config(b"{}", honest=False), "config.json': does not match nf4.config_sha256"),
    "config not JSON": (config(b"{hidden_size: 64}"), "config.json': not JSON at character 1"),
    "config with NaN": (config(b'{"rope_theta": NaN}'), "NaN is not JSON"),
    "config of 5 million lists": (
        config(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
        "more than 500000 commas",
    ),
    "config a list": (config(b"[]"), "expected a JSON object, got list"),
    "config nested 10^4": (config(b"[" * 10_000 + b"]" * 10_000), "deeper than 64"),
    "aliases not JSON": (metadata(aliases="{"), "metadata nf4.aliases: not JSON"),
    "alias of nothing": (
        metadata(aliases='{"a": "nothing"}'),
        "'a': metadata nf4.aliases: no such tensor.*'nothing'",
    ),
    "alias of a companion": (metadata(aliases=json.dumps({"a": X + ".absmax"})), "no such tensor to share"),
    "alias of a stored name": (
        metadata(aliases='{"flags": "steps"}'),
        "'flags': metadata .* not a free name",
    ),
    "alias as path": (metadata(aliases='{"../a": "steps"}'), "not a free name"),
    "alias of a number": (metadata(aliases='{"a": 5}'), "no such tensor to share, got 5"),
}
