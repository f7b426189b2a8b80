"""Generated GPU code on a machine without a GPU: get it from a function, and run it under Triton's interpreter."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import scipy.special
import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from pixelfly_compiler.kernels import codegen_gpu, lowering, lowering_gpu_grad, lowering_gpu_linear
from pixelfly_compiler.kernels.codegen_gpu import Code
from pixelfly_compiler.kernels.gpus import KNOWN, Gpu
from pixelfly_compiler.kernels.triton_binary import Binary, compile_kernel, load


def generate(
    function: Callable[..., Any], args: Sequence[Any], target: str, dynamic: bool | None = False
) -> list[Code]:
    """The code of the function's graphs: forward, and backward if an argument requires a gradient."""
    from torch._inductor.compile_fx import compile_fx

    lowering.register()
    codes: list[Code] = []

    def inner_compile(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        codes.append(codegen_gpu.generate(gm, inputs, KNOWN[target], **kwargs))
        return gm.forward

    def backend(gm: Any, inputs: Any) -> Any:
        with functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
            compile_fx(gm, inputs, inner_compile=inner_compile)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return codes


def binaries(code: Code, gpu: Gpu) -> dict[str, Binary]:
    """Our kernels of this code, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for name in code.nodes:
            path = Path(folder) / f"{name}.py"
            path.write_text(code.kernels[name])
            made[name] = compile_kernel(name, path, gpu)
        return made


@contextlib.contextmanager
def by_tma(place: int, **changes: int) -> Iterator[None]:
    """The launches that read through tensor descriptors run: of several that one; without any the default."""

    def chosen(launches: Callable[..., list[Any]], is_one: Callable[[Any], bool]) -> Callable[..., list[Any]]:
        def choose(*args: Any) -> list[Any]:
            found = [launch for launch in launches(*args) if is_one(launch)]
            known = {key: value for key, value in changes.items() if found and hasattr(found[place], key)}
            return [replace(found[place], **known)] if found else launches(*args)

        return choose

    linear = chosen(lowering_gpu_linear.linear_launches, lambda launch: launch.programs > 0)
    block_grad = chosen(lowering_gpu_grad.block_grad_launches, lambda launch: launch.tma)
    with (
        patch.object(lowering_gpu_linear, "linear_launches", linear),
        patch.object(lowering_gpu_grad, "block_grad_launches", block_grad),
    ):
        yield


# ---- under the interpreter ----


def run(code: Code, args: Sequence[Any]) -> list[Tensor]:
    """Run the wrapper on CPU tensors, its kernels interpreted; buffers begin as NaN. Needs TRITON_INTERPRET=1."""
    source = code.wrapper.replace("from torch._C import _cuda_getCurrentRawStream as", "from math import floor as")
    with tempfile.TemporaryDirectory() as folder:
        namespace: dict[str, Any] = {"__name__": "emitted"}
        compiler = SimpleNamespace(triton=_loader(Path(folder)), wait=lambda scope: None)
        source = source.replace("async_compile = AsyncCompile()", "async_compile = _compiler")
        exec(compile(source, "wrapper", "exec"), namespace | {"_compiler": compiler}, namespace)
        scope = namespace["Runner"].call.__globals__ if "Runner" in namespace else namespace["call"].__globals__
        scope |= namespace | {"empty_strided_cuda": _nan_filled, "_compiler": compiler}
        with _no_device(), mended():
            return list(namespace["call"](list(args)))


def _nan_filled(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    buffer = torch.empty_strided(size, stride, dtype=dtype)
    return buffer.fill_(float("nan")) if dtype.is_floating_point else buffer.fill_(-1)


@contextlib.contextmanager
def _no_device() -> Iterator[None]:
    with (
        patch.object(torch.cuda, "_DeviceGuard", lambda index: contextlib.nullcontext()),
        patch.object(torch.cuda, "set_device", lambda index: None),
    ):
        yield


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """The interpreter keeps bf16 as integers, multiplies those, and rounds to them by cutting off: both mended.

    So are loaded bounds of loops: NumPy 2.4 makes no integer of the arrays in which Triton 3.6 keeps them; and masks:
    those made of a number become integers, which Triton 3.9 does not take.
    """
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    original, original_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    original_load, original_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    original_tensor = interpreter._patch_lang_tensor

    def wide(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, wide(a), wide(b), *rest)

    def cast(self: Any, source: Any, wanted: Any) -> Any:
        if (source.dtype.scalar, wanted.scalar) != (tl.float32, tl.bfloat16):
            return original_cast(self, source, wanted)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16).reshape(source.data.shape), tl.bfloat16)

    def truths(mask: Any) -> Any:
        return mask if isinstance(mask, np.ndarray) else TensorHandle(mask.data.astype(bool), mask.dtype)

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        return original_load(self, ptrs, truths(mask), *rest, **kwargs)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        return original_store(self, ptrs, value, truths(mask), *rest, **kwargs)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with (
        patch.object(InterpreterBuilder, "create_dot", create_dot),
        patch.object(InterpreterBuilder, "cast_impl", cast),
        patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        patch.object(InterpreterBuilder, "create_masked_store", masked_store),
        patch.object(interpreter, "_patch_lang_tensor", patch_lang_tensor),
    ):
        yield


def _loader(folder: Path) -> Callable[..., Any]:
    def triton(name: str, source: str, **kwargs: Any) -> Any:
        path = folder / f"{name}.py"
        path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
        module: Any = load(path)
        if hasattr(module, "libdevice"):
            module.libdevice = SimpleNamespace(erf=_erf)
        return SimpleNamespace(run=_launcher(getattr(module, name)))

    return triton


def _launcher(autotuner: Any) -> Callable[..., None]:
    from torch._inductor.runtime.triton_heuristics import GridExpr

    config = autotuner.configs[0]
    constants = config.kwargs
    names = [name for name in autotuner.fn.arg_names if name not in constants]

    def launch(*args: Any, stream: Any) -> None:
        grid = args[len(names) :]
        if not grid:
            meta = dict(zip(names, args, strict=True)) | constants
            grid = GridExpr.from_meta(autotuner.inductor_meta, config).eval_slow(meta)
        autotuner.fn[grid](*args[: len(names)], **constants)

    return launch


def _erf(x: Any) -> Any:
    """The interpreter has no libdevice."""
    from triton.language import tensor
    from triton.runtime.interpreter import TensorHandle

    values = scipy.special.erf(x.handle.data).astype(np.float32)
    return tensor(TensorHandle(values, x.handle.dtype), x.type)
