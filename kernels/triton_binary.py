"""Compile the source of a generated Triton kernel ahead of time, and read off what the machine code needs.

Registers, spills and shared memory are the compiler's own figures: `cuobjdump` (shipped with Triton) reads them from a
cubin, and AMD's assembly states them. Instructions are counted in the assembly.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from pixelfly_compiler.kernels.gpus import Gpu
from pixelfly_compiler.kernels.virtual_device import virtual_device

# What computes on tensor cores, by the names of the instructions in PTX or in AMD's assembly.
TENSOR_CORE = {
    "wgmma": r"^\s*wgmma\.mma_async",
    "mma.sync": r"^\s*mma\.sync",
    "tcgen05": r"^\s*(?:@\S+\s+)?tcgen05\.mma",
    "mfma": r"^\s*v_mfma_",
}
VECTOR_LOADS = (
    r"^\s*(?:@\S+\s+)?(?:cp\.async\.c[ag]\.shared\.global .*0x10|cp\.async\.bulk\.tensor|ld\.global\S*\.v4)"
    r"|global_load_dwordx4|buffer_load_dwordx4"
)
LOCAL_ARRAYS = r"^\s*\.local .*__local_depot\d+\[(\d+)\]"
ASYNC_COPIES = r"^\s*(?:@\S+\s+)?cp\.async\.(?:c[ag]|bulk\.tensor)"


@dataclass(frozen=True)
class Binary:
    """One kernel, compiled. `spills`: bytes of local memory per thread; `code`: a file's ending -> its content."""

    name: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared_memory: int
    tensor_core: dict[str, int]
    vector_loads: int
    async_copies: int
    code: dict[str, str | bytes]


def compile_kernel(name: str, path: Path, gpu: Gpu) -> Binary:
    """Compile kernel `name` of the source file `path` for `gpu`, with the launch parameters that stand in it."""
    import triton
    from torch._inductor.runtime import triton_heuristics

    compiled: list[Any] = []

    def compile_only(*args: Any, **kwargs: Any) -> Any:
        compiled.append(triton.compiler.compile(*args, **kwargs))
        raise _Compiled

    with virtual_device(gpu), patch.object(triton, "compile", compile_only):
        autotuner = getattr(load(path), name)
        config = autotuner.configs[0]
        try:
            with _quiet(triton_heuristics.log):
                autotuner._precompile_config(config)
        except _Compiled:
            pass
    return describe(name, compiled[0])


class _Compiled(Exception):
    """Ends the heuristics' work before they load the binary."""


def _quiet(log: Any) -> Any:
    return patch.object(log, "exception", lambda *args, **kwargs: None)


def load(path: Path) -> ModuleType:
    """The module of a kernel's source. Triton reads the function's text from the file."""
    spec = importlib.util.spec_from_file_location(f"pixelfly_emitted_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(name: str, binary: Any) -> Binary:
    """What Triton has compiled."""
    assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
    registers, spills = _amd_usage(assembly) if "amdgcn" in binary.asm else _nvidia_usage(binary.asm["cubin"], assembly)
    counts = {kind: _count(pattern, assembly) for kind, pattern in TENSOR_CORE.items()}
    return Binary(
        name,
        binary.metadata.num_warps,
        binary.metadata.num_stages,
        registers,
        spills,
        binary.metadata.shared,
        {kind: count for kind, count in counts.items() if count},
        _count(VECTOR_LOADS, assembly),
        _count(ASYNC_COPIES, assembly),
        {kind: binary.asm[kind] for kind in ("ptx", "cubin", "amdgcn", "hsaco") if kind in binary.asm},
    )


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def _nvidia_usage(cubin: bytes, assembly: str) -> tuple[int, int]:
    """(registers, bytes of local memory that they are spilled to) per thread. Arrays that the code declares itself, as
    that of the sine and cosine of large arguments, are in local memory too, aligned to 8 bytes.
    """
    tool = Path(_nvidia_folder()) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    arrays = sum(-(-int(size) // 8) * 8 for size in re.findall(LOCAL_ARRAYS, assembly, re.MULTILINE))
    return found["REG"], max(found["STACK"] + found["LOCAL"] - arrays, 0)


def _nvidia_folder() -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent)


def _amd_usage(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    spills = re.search(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
    assert registers is not None and spills is not None
    return int(registers[1]), int(spills[1])
