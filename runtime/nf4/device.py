"""Which device a model runs on: a CPU, a GPU that this installation can use, or the reason it cannot."""

from __future__ import annotations

import os
import re
import warnings

import torch

from .errors import LoadError

LEAST_CAPABILITY = (8, 0)  # Ampere: bf16, asynchronous copies


def resolve(device: str | torch.device, path: str | os.PathLike[str] = "") -> torch.device:
    """The device meant by "auto" (a GPU if it can be used, else the CPU), "cpu", "cuda" or "cuda:1".

    Args:
        path: the file at hand, for messages.

    Raises:
        LoadError: not such a device, or a GPU that cannot be used, with the reason.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        problem = gpu_problem(torch.cuda.current_device())
        if problem is None:
            return torch.device("cuda", torch.cuda.current_device())
        warnings.warn(f"running on the CPU: {problem[0]}; {problem[1]}", stacklevel=2)
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise LoadError(path, "device", expected="auto, cpu or cuda", got=str(device))
    if chosen.type == "cpu":
        return torch.device("cpu")
    problem = gpu_problem(chosen.index)
    if problem is not None:
        raise LoadError(path, f"device {device}: {problem[0]}", remedy=problem[1])
    return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)


def gpu_problem(index: int | None = None) -> tuple[str, str] | None:
    """Why GPU `index` (None: the current one) cannot be used, and what to do; None where it can."""
    return _driver_problem(index) or _kernels_problem(index)


def _driver_problem(index: int | None) -> tuple[str, str] | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA", "install a CUDA build of torch, or use the CPU"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
            return reason, "install a newer NVIDIA driver, or use the CPU"
        return "no NVIDIA GPU is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use the CPU"
    count = torch.cuda.device_count()
    if index is not None and not 0 <= index < count:
        return f"expected an index below {count}, got {index}", "see nvidia-smi for the GPUs there are"
    return None


def _kernels_problem(index: int | None) -> tuple[str, str] | None:
    try:
        from .ops import cuda as ops_cuda

        native = ops_cuda.kernels()
    except ImportError:
        return (
            "this installation has no GPU kernels (nf4._cuda)",
            "install it again where nvcc is found, with -C cmake.define.NF4_CUDA=ON, or use the CPU",
        )
    info = native.build_info()
    driver = native.driver_version()
    if driver // 1000 < info["runtime"] // 1000:
        versions = [f"{version // 1000}.{version % 1000 // 10}" for version in (info["runtime"], driver)]
        problem = f"the NVIDIA driver is too old: expected CUDA {versions[0]}, got {versions[1]}"
        return problem, "install a newer driver, or build with an older CUDA toolkit"
    name = torch.cuda.get_device_name(index)
    capability = torch.cuda.get_device_capability(index)
    shown = f"{name} of compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        return f"{shown} is not supported, expected 8.0 or newer", "use the CPU"
    if not runs_on(info["archs"], capability):
        built = ", ".join(info["archs"])
        arch = f"{capability[0]}{capability[1]}"
        remedy = f"install it again with -C cmake.define.NF4_CUDA_ARCHS={arch}"
        return f"the GPU kernels are built for {built}, got {shown}", remedy
    return None


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether kernels built for these (CMake's names) run on a GPU of that compute capability.

    Machine code ("-real") runs on its own major version from its minor on, PTX ("-virtual") on anything not
    older; a bare number is both. Names with a letter ("90a") run on exactly that capability.
    """
    for arch in archs:
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
        if found is None:
            continue
        built = (int(found[1]), int(found[2]))
        if found[3]:
            fits = capability == built
        elif found[4] == "-real":
            fits = capability[0] == built[0] and capability >= built
        else:
            fits = capability >= built
        if fits:
            return True
    return False
