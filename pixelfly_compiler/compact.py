"""Compact forms of a model's dense weights, made at the boundary of a compiled graph and kept while they are valid.

A weight's compact form is computed once per version of the weight: after an optimizer step, `load_state_dict` or any
other in-place change it is made again. Writes to `weight.data`, which have no version, are noticed by samples. The
forms live as long as the weights. In training the projection is differentiable: gradients of
(blocks, u) become the gradient of the dense weight through P's adjoint.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from pixelfly_compiler.attached import Attached
from pixelfly_compiler.kernels import projection
from pixelfly_compiler.kernels.ops import support_index
from pixelfly_compiler.kernels.projection import project_each
from pixelfly_compiler.kernels.projector import Projector
from pixelfly_compiler.kernels.support import Support
from pixelfly_compiler.passes.regions import Region
from pixelfly_compiler.passes.rewrite import CompactInput
from pixelfly_compiler.passes.sites import SiteConfig

MOST_SAMPLES = 16  # elements of a matrix that are looked at in each call
MOST_LINES = 64  # of a weight whose dimensions fold: where along one of them
INTEGERS: dict[int, Literal["h", "i", "q"]] = {2: "h", 4: "i", 8: "q"}  # bytes -> format that memoryviews compare fast


@lru_cache(maxsize=512)
def _basis(in_features: int, rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return projection.fixed_basis(in_features, rank).to(device, dtype)


class Compact(NamedTuple):
    """blocks (nnz, b, b), u (out, r), v (in, r) of one weight, in the dtype the matmul runs in.

    Those of a weight of several matrices are stacked; v is not with the fixed basis, which all share.
    """

    blocks: Tensor
    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class Form:
    """The form that a graph needs one of its weights in; `weight` is the position among the graph's inputs."""

    weight: int
    config: SiteConfig
    transposed: bool
    dtype: torch.dtype
    basis: str
    region: Region | None = None

    @property
    def is_flat(self) -> bool:
        """Has each dimension of the matrix, or matrices, a stride in the weight's memory?"""
        return self.region is None or self.region.shape is None

    @cached_property
    def name(self) -> str:
        """What the form is, whichever the weight: a key that is cheap to look up."""
        return f"{self.config} {self.transposed} {self.dtype} {self.basis} {self.region}"


@dataclass(frozen=True)
class _Entry:
    """A compact weight, and what tells whether its weight has changed since."""

    version: int | None
    data_ptr: int
    shape: torch.Size
    sample: Tensor
    seen: Tensor  # a copy of the sample
    now: list[memoryview]  # the sample as it lies in the weight's memory, to be read while `is_of` holds
    then: list[memoryview]
    compact: Compact

    def is_of(self, weight: Tensor) -> bool:
        """Is the weight where it was, and written to by nothing that leaves a trace?"""
        if self.version is None or self.version != weight._version:
            return False
        return self.data_ptr == weight.data_ptr() and self.shape == weight.shape

    def has_changed(self) -> bool:
        """Is the sample, of a weight that lies where it did, other than it was? On a GPU `drop_changed` asks, for all
        weights at once.
        """
        return self.now != self.then


class CompactWeights:
    """The compact forms of all weights seen so far. They live as long as the weights."""

    def __init__(self) -> None:
        self._entries = Attached[str, _Entry]()
        self._of = self._entries.of

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries.clear()

    def get(self, weight: Tensor, form: Form) -> Compact:
        """The compact form of the weight as it is now, without autograd."""
        entries = self._of(weight)
        entry = entries.get(form.name)
        if entry is None or not entry.is_of(weight) or entry.has_changed():
            entry = entries[form.name] = _entry(weight, form)
        return entry.compact

    def drop_changed(self, weights: Iterable[Tensor]) -> None:
        """Forget the forms of weights that were written to without a trace, with one read for all of them: whenever a
        GPU is read from, the process waits until it idles.
        """
        known = [(weight, name, e) for weight in weights for name, e in self._of(weight).items() if e.is_of(weight)]
        for (weight, name, _), changed in zip(known, _have_changed([entry for *_, entry in known]), strict=True):
            if changed:
                del self._of(weight)[name]


def _have_changed(entries: Sequence[_Entry]) -> list[bool]:
    """Is the sample of each other than it was? By one read for each device."""
    elements: dict[torch.device, Iterator[bool]] = {}
    for device in {entry.sample.device for entry in entries}:
        there = [entry for entry in entries if entry.sample.device == device]
        now = torch.cat([entry.sample.flatten() for entry in there])
        then = torch.cat([entry.seen.flatten() for entry in there])
        elements[device] = iter((now != then).tolist())
    return [any(list(islice(elements[entry.sample.device], entry.sample.numel()))) for entry in entries]


def _entry(weight: Tensor, form: Form) -> _Entry:
    # Not inference tensors, even in inference mode: training may use them next.
    with torch.inference_mode(False), torch.no_grad():
        version = None if weight.is_inference() or _is_gathered(weight) else weight._version
        stored = _stored(weight.detach(), form)
        sample = _sample(stored if form.is_flat else _in_order(stored))
        seen = sample.clone()
        lines = _memory(sample), _memory(seen)
        compact = _compact(_folded(stored, form), form)
        return _Entry(version, weight.data_ptr(), weight.shape, sample, seen, *lines, compact)


def _is_gathered(weight: Tensor) -> bool:
    """Is this where FSDP2 gathers a sharded weight, again and again, without raising the tensor's version?"""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    holders = gc.get_referrers(weight)
    fields = [holder if isinstance(holder, dict) else getattr(holder, "__dict__", {}) for holder in holders]
    return any(held.get("_unsharded_param") is weight for held in fields)


def _sample(matrix: Tensor) -> Tensor:
    """A few elements (k,) along the antidiagonal of a weight, or (n, k) of each of its matrices, as integers, in its
    own memory. What is written to `weight.data` leaves no trace in the version, and some optimizers write there: but
    then hardly any element stays as it is.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.element_size()]
    (rows, cols), (row, col) = matrix.shape[-2:], matrix.stride()[-2:]
    count = min(rows, cols, MOST_SAMPLES)
    down, across = rows // count * row, cols // count * col
    size, stride = (*matrix.shape[:-2], count), (*matrix.stride()[:-2], abs(down - across))
    first = matrix.storage_offset() + (count - 1) * min(down, across)
    return matrix.as_strided(size, stride, first).view(integer)


def _in_order(stored: Tensor) -> Tensor:
    """Dimensions as they lie in memory, and of all but the last two only some places."""
    ordered = stored.permute(sorted(range(stored.dim()), key=lambda dim: -stored.stride()[dim]))
    return ordered[tuple(slice(None, None, max(size // MOST_LINES, 1)) for size in ordered.shape[:-2])]


def _memory(sample: Tensor) -> list[memoryview]:
    """Each line of a sample as it lies in the memory of the CPU, to be compared without a call of torch's; and not by
    numpy, after which FSDP could not free the weight's storage.
    """
    if not sample.is_cpu:
        return []
    if sample.dim() > 1:
        return [line for part in sample for line in _memory(part)]
    size, step = sample.element_size(), sample.stride(-1)
    count = sample.shape[-1] if step else 1
    span = ctypes.c_char * (((count - 1) * step + 1) * size)
    line = memoryview(span.from_address(sample.data_ptr()))
    return [line.cast("B").cast(INTEGERS[size])[:: step or 1]]


def _compact(matrix: Tensor, form: Form) -> Compact:
    dense, rank = _oriented(matrix, form), form.config.rank
    if form.basis == "svd" and rank:
        parts = project_each(dense, lambda one: projection.project_svd(one, _support(one, form.config), rank))
        return Compact(*(part.to(form.dtype).contiguous() for part in parts))
    blocks, u = _projector(dense, form.config).project(dense, form.dtype)
    return Compact(blocks, u, _basis(dense.shape[-1], rank, dense.device, form.dtype))


def _stored(weight: Tensor, form: Form) -> Tensor:
    """The weight, or the part of it that the form is of, in its own memory."""
    return weight if form.region is None else form.region.unfolded(weight)


def _folded(stored: Tensor, form: Form) -> Tensor:
    """The matrix, or matrices, that this is: a copy where dimensions fold."""
    return stored if form.is_flat else stored.reshape(form.region.shape)  # type: ignore[union-attr, arg-type]


def _like_folded(stored: Tensor, form: Form) -> Tensor:
    """A tensor like the matrix, or matrices; its values do not matter."""
    return stored if form.is_flat else stored.new_empty(form.region.shape)  # type: ignore[union-attr, arg-type]


def _like(weight: Tensor, form: Form) -> Tensor:
    """A tensor like the weight, or its part, as (out, in); its values do not matter."""
    return _oriented(_like_folded(_stored(weight.detach(), form), form), form)


def _oriented(matrix: Tensor, form: Form) -> Tensor:
    """The matrix, or each of several, as (out, in), however it is stored."""
    return matrix.mT if form.transposed else matrix


def _support(dense: Tensor, config: SiteConfig) -> Support:
    return config.support(*dense.shape[-2:])


def _projector(dense: Tensor, config: SiteConfig) -> Projector:
    return Projector.of(_support(dense, config), config.rank, dense.device)


class _Project(torch.autograd.Function):
    """The cached (blocks, u) of a weight, as a differentiable function of it, or its part, as it is stored."""

    @staticmethod
    def forward(ctx: Any, stored: Tensor, form: Form, compact: Compact) -> tuple[Tensor, Tensor]:
        ctx.form, ctx.stored, ctx.shapes = form, stored.detach(), (compact.blocks.shape, compact.u.shape)
        ctx.set_materialize_grads(False)
        return compact.blocks.detach(), compact.u.detach()

    @staticmethod
    @_disable_dynamo  # it is called from compiled code where that calls `backward()`
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        if all(gradient is None for gradient in gradients):  # no result depends on the weight
            return None, None, None
        g_blocks, g_u = (
            ctx.stored.new_zeros(shape, dtype=ctx.form.dtype) if gradient is None else gradient
            for gradient, shape in zip(gradients, ctx.shapes, strict=True)
        )
        like = _oriented(_like_folded(ctx.stored, ctx.form), ctx.form)
        gradient = _oriented(_projector(like, ctx.form.config).adjoint(g_blocks, g_u, like), ctx.form)
        return gradient.reshape(ctx.stored.shape), None, None


class CompactInputs:
    """Computes the inputs that the rewritten graph takes beyond the old ones, from the weights of each call."""

    def __init__(self, added: tuple[CompactInput, ...], weights: CompactWeights, basis: str) -> None:
        self.weights = weights
        forms = [Form(key.weight, key.config, key.transposed, key.dtype, basis, key.region) for key in added]
        self.forms = list(dict.fromkeys(forms))
        self.wanted = [(form, key.part) for form, key in zip(forms, added, strict=True)]
        made = [(form, part) for form in self.forms for part in Compact._fields]
        made += [(form, "index") for form in self.forms]
        place = {wanted: place for place, wanted in enumerate(made)}
        self.places = [place[wanted] for wanted in self.wanted]
        self.indices: list[Tensor] = []
        self.elsewhere: list[int] = []  # positions of the weights that are not on the CPU

    def __call__(self, args: tuple[Any, ...]) -> list[Tensor]:
        if not self.indices:
            self.indices = [self._index(args, form) for form in self.forms]
            self.elsewhere = sorted({form.weight for form in self.forms if not args[form.weight].is_cpu})
        if self.elsewhere and not torch.cuda.is_current_stream_capturing():  # what is captured cannot be waited for
            self.weights.drop_changed(args[position] for position in self.elsewhere)
        training = torch.is_grad_enabled()
        made: list[Tensor] = []
        for form in self.forms:
            made += self._parts(args[form.weight], form, training)
        made += self.indices
        return [made[place] for place in self.places]

    def examples(self, args: tuple[Any, ...]) -> list[Tensor]:
        """Uninitialised tensors like those of a call, where only shapes matter: no weight is projected."""
        return [self._example(args[form.weight], form, part) for form, part in self.wanted]

    def prepare(self, args: tuple[Any, ...]) -> None:
        """Begin to compile what a call will need."""
        for form in self.forms:
            if form.basis == "fixed":
                dense = _like(args[form.weight], form)
                _projector(dense, form.config).prepare(dense, form.dtype)

    def _example(self, weight: Tensor, form: Form, part: str) -> Tensor:
        dense = _like(weight, form)
        support, rank, block = _support(dense, form.config), form.config.rank, form.config.block
        if part == "index":
            return support_index(support, weight.device)
        shapes = {
            "blocks": (*dense.shape[:-2], support.nnz, block, block),
            "u": (*dense.shape[:-2], support.out_features, rank),
            "v": (*(dense.shape[:-2] if form.basis == "svd" else ()), support.in_features, rank),
        }
        example = torch.empty(shapes[part], dtype=form.dtype, device=weight.device)
        return example.requires_grad_(part != "v" and weight.requires_grad and torch.is_grad_enabled())

    def _parts(self, weight: Tensor, form: Form, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """blocks, u and v, differentiable if `training` the weight."""
        compact = self.weights.get(weight, form)
        if not (training and weight.requires_grad):
            return compact
        return *_Project.apply(_stored(weight, form), form, compact), compact.v

    def _index(self, args: tuple[Any, ...], form: Form) -> Tensor:
        """The index of the support: the same for every weight that can stand here."""
        weight = args[form.weight]
        with torch.inference_mode(False):
            return support_index(_support(_like(weight, form), form.config), weight.device)
