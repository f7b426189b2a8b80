"""A GPU that is not there: what torch and Triton ask a device for, answered from a description.

Inside `virtual_device(gpu)` Inductor generates code for `gpu` and Triton compiles it, on any machine and any build of
torch; nothing can be launched, and the caches of the machine are neither read nor written. Everything replaced is put
back at the end, and what was cached about devices in between is forgotten, so that a real GPU of this process is seen
again as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pixelfly_compiler.kernels.gpus import Gpu, gpu_of

_aten = torch.ops.aten

# Functions that remember facts of the current device. Those that a version of torch lacks are passed over.
_CACHED = {
    "torch.utils._triton": (
        "has_triton",
        "has_triton_experimental_host_tma",
        "has_triton_tensor_descriptor_host_tma",
        "has_triton_tma",
        "has_triton_tma_device",
        "has_triton_stable_tma_api",
        "has_datacenter_blackwell_tma_device",
        "_device_supports_tma",
        "triton_backend",
        "triton_hash_with_backend",
    ),
    "torch._inductor.utils": (
        "get_gpu_type",
        "is_big_gpu",
        "get_max_num_sms",
        "using_b200",
        "get_backend_num_stages",
        "get_device_tflops",
        "get_gpu_dram_gbps",
        "_triton_supported_fp8_dtypes",
        "_rocm_native_device_arch_name",
        "tlx_only_cuda_options",
    ),
    "torch._inductor.comm_analysis": ("get_gpu_type", "_has_nvlink"),
    "torch._inductor.kernel.mm": ("_is_sm7x_or_older_gpu",),
    "torch._inductor.codegen.cuda.cuda_env": ("get_cuda_arch", "get_cuda_version", "is_datacenter_blackwell_arch"),
    "torch._inductor.codegen.cutlass.utils": ("cutlass_arch",),
    "torch._inductor.runtime.hints": ("DeviceProperties.create",),
    "torch._subclasses.fake_tensor": ("init_gpu_context",),
    "torch.cuda": ("_check_bf16_tensor_supported",),
}


@contextlib.contextmanager
def virtual_device(gpu: Gpu) -> Iterator[None]:
    """In the block `gpu` is cuda:0, the only device, as far as code generation can tell."""
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_devices)
        stack.enter_context(_environment())
        for target, name, value in _answers(gpu):
            if hasattr(target, name):
                stack.enter_context(patch.object(target, name, value))
        stack.enter_context(_no_cached_devices())
        stack.enter_context(_triton_driver(gpu))
        _forget_devices()
        yield


def _answers(gpu: Gpu) -> Iterator[tuple[Any, str, Any]]:
    """(where, attribute, stand-in) for everything that is asked."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor

    properties = _properties(gpu)
    shared: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: gpu.capability >= (8, 0),
    }
    for where in (torch.cuda, CudaInterface):
        for name, answer in shared.items():
            yield where, name, staticmethod(answer) if where is CudaInterface else answer
    yield torch.cuda, "get_device_capability", lambda device=None: gpu.capability
    yield torch.cuda, "get_device_name", lambda device=None: gpu.name
    yield torch.cuda, "is_tf32_supported", lambda: gpu.capability >= (8, 0)
    yield torch.cuda, "_lazy_init", lambda: None
    yield torch.cuda, "_exchange_device", lambda device: 0
    yield torch.cuda, "_maybe_exchange_device", lambda device: 0
    yield torch.cuda, "get_rng_state", lambda device="cuda": torch.empty(0, dtype=torch.uint8)
    yield torch.cuda, "set_rng_state", lambda state, device="cuda": None
    yield CudaInterface.Worker, "get_device_properties", staticmethod(shared["get_device_properties"])
    yield CudaInterface.Worker, "current_device", staticmethod(shared["current_device"])
    yield torch.version, "hip", "6.4" if gpu.backend == "hip" else None
    yield torch.version, "cuda", None if gpu.backend == "hip" else (torch.version.cuda or "13.0")
    yield fake_tensor, "init_gpu_context", lambda *args: None
    yield fake_tensor.FakeTensorMode, "avoid_device_init", True  # constants are not copied to it
    for name, method in _METHODS.items():
        yield fake_tensor.FakeTensor, name, method
    yield triton_helpers, "set_driver_to_gpu", lambda: None


def _getitem(self: FakeTensor, index: Any) -> Tensor:
    """`self[index]` by operators: they do not switch to the device, and `make_fx` and autograd see them."""
    if self.device.type == "cpu":
        return Tensor.__getitem__(self, index)
    items = index if isinstance(index, tuple) else (index,)
    value: Tensor = self
    dim = 0
    found: list[Tensor | None] = []  # an index for each dimension so far, a mask for several, None for all of it
    for place, item in enumerate(items):
        if item is Ellipsis:
            rest = value.dim() - dim - sum(map(_dims_of_index, items[place + 1 :]))
            dim, found = dim + rest, found + [None] * rest
        elif isinstance(item, slice):
            value = _aten.slice.Tensor(value, dim, item.start, item.stop, 1 if item.step is None else item.step)
            dim, found = dim + 1, [*found, None]
        elif item is None or isinstance(item, bool):
            value = _aten.unsqueeze.default(value, dim)
            dim, found = dim + 1, [*found, None if item is None else torch.zeros(int(item), dtype=torch.int64)]
        elif isinstance(item, int | torch.SymInt):
            value = _aten.select.int(value, dim, item)
        else:
            dim, found = dim + _dims_of_index(item), [*found, torch.as_tensor(item)]
    return value if all(item is None for item in found) else _aten.index.Tensor(value, found)


def _dims_of_index(item: Any) -> int:
    """Dimensions of the tensor that an item of an index is about."""
    if item is None or isinstance(item, bool):
        return 0
    tensor = None if isinstance(item, slice | int | torch.SymInt) else torch.as_tensor(item)
    return tensor.dim() if tensor is not None and tensor.dtype in (torch.bool, torch.uint8) else 1


# Python's own methods, unlike operators, switch to the device of a tensor first, also if the tensor is fake.
_METHODS: dict[str, Any] = {
    "__getitem__": _getitem,
    "__invert__": lambda self: torch.bitwise_not(self),
    "contiguous": lambda self, **options: _aten.contiguous.default(self, **options),
    "copy_": lambda self, source, non_blocking=False: _aten.copy_.default(self, source, non_blocking),
    "nonzero": lambda self: _aten.nonzero.default(self),
}


def _properties(gpu: Gpu) -> SimpleNamespace:
    """What `torch.cuda.get_device_properties` has, of a description."""
    major, minor = gpu.capability
    return SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        multi_processor_count=gpu.multiprocessors,
        total_memory=gpu.memory,
        regs_per_multiprocessor=gpu.registers,
        max_threads_per_multi_processor=gpu.threads,
        max_threads_per_block=1024,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_memory,
        warp_size=gpu.warp,
        gcnArchName=str(gpu.arch) if gpu.backend == "hip" else "",
    )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Caches that end with the block, and binaries without the paths of scratch files in their line numbers."""
    with tempfile.TemporaryDirectory(prefix="pixelfly-emit-", ignore_cleanup_errors=True) as folder:
        variables = {
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
            "TRITON_DISABLE_LINE_INFO": "1",
        }
        with patch.dict(os.environ, variables):
            yield


@contextlib.contextmanager
def _no_cached_devices() -> Iterator[None]:
    """Dynamo keeps properties of devices in two tables: empty inside, as they were outside."""
    from torch._dynamo import device_interface

    tables = (device_interface.caching_worker_device_properties, device_interface.caching_worker_current_devices)
    before = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            table.clear()
            table.update(values)


@contextlib.contextmanager
def _triton_driver(gpu: Gpu) -> Iterator[None]:
    """Triton's active driver names the target; it can compile, but not launch."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Virtual(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(gpu.backend, gpu.arch, gpu.warp)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_benchmarker(self) -> Any:
            raise RuntimeError(f"{gpu.name} is not there: nothing can be timed")

    before = driver._active
    driver.set_active(Virtual())
    try:
        yield
    finally:
        driver._active = before


def _forget_devices() -> None:
    gpu_of.cache_clear()
    for module_name, names in _CACHED.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name in names:
            function: Any = module
            for part in name.split("."):
                function = getattr(function, part, None)
            clear = getattr(function, "cache_clear", None)
            if clear is not None:
                clear()
