"""What is known of the matmuls with a weight: values, which `find.find_sites` makes and all that follows reads.

A `Site` is one weight, however many matmuls use it, or each part of a weight that matmuls use by itself (chunks of a
packed qkv). A `Match` is one matmul node of the graph, with what a rewrite needs. A weight that cannot become sparse is
a site with a reason (it still counts in the budget). A parameter that no matmul uses is `Skipped`, with a reason, and
with the flops of what else multiplies with it; not one of less than two dimensions, as a bias, of which torch counts no
flops. Nothing else is dropped silently.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from pixelfly_compiler.kernels.support import Support, flat_butterfly, kept_elements
from pixelfly_compiler.passes.operands import Operands
from pixelfly_compiler.passes.regions import Region


@dataclass(frozen=True)
class SiteConfig:
    """How a site is made sparse: `block` x `block` blocks on the diagonal and at `strides` strides, beginning at place
    `first` of their list (see `kernels.support`), and a term of rank `rank`.
    """

    block: int
    strides: int
    rank: int
    first: int = 0

    def support(self, out_features: int, in_features: int) -> Support:
        """The kept blocks of an (out, in) weight."""
        return flat_butterfly(out_features, in_features, self.block, self.strides, self.first)

    def kept_blocks(self, out_features: int, in_features: int) -> int:
        """Elements of the kept blocks of an (out, in) weight, without building the support."""
        return kept_elements(out_features, in_features, self.block, self.strides, self.first)

    def kept(self, out_features: int, in_features: int) -> int:
        """Elements of the kept blocks and of the low-rank factors."""
        return self.kept_blocks(out_features, in_features) + self.rank * (out_features + in_features)

    def __str__(self) -> str:
        begin = f" from {self.first}" if self.first else ""
        return f"block {self.block}, strides {self.strides}{begin}, rank {self.rank}"


@dataclass(frozen=True)
class Site:
    """One weight, or a part of one, and the matmuls that use it.

    `name` is the parameter's, with the part's indices behind it. `region` is the matrix inside the parameter, None if
    it is all of a two-dimensional one. `rows` is the hint of the symbolic `rows_expr`, the rows of all its matmuls.
    """

    name: str
    weight_shape: tuple[int, ...]
    out_features: int
    in_features: int
    transposed: bool  # the weight is stored (in, out), as in HF's Conv1D
    rows: int
    rows_expr: str
    role: str
    dtype: str  # of the matmul: bfloat16 under autocast, whatever the weight's own
    device: str
    uses: int = 1
    shared: bool = False  # the weight also feeds an embedding lookup, which stays dense
    aliases: tuple[str, ...] = ()  # the weight's other names in the model (tied weights)
    reason: str | None = None  # why this site cannot be sparse, None if it can
    region: Region | None = None
    matrices: int = 1  # that the weight holds; each row meets one of them
    trained: bool = False  # the weight requires a gradient: every step of training projects it
    modules: tuple[str, ...] = ()  # that multiply with it; "" is the one that Dynamo saw as `self`
    namesakes: tuple[str, ...] = ()  # other sites that its code may run for, after a graph break
    other_flops: int = 0  # of what else multiplies with it
    nodes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def elements(self) -> int:
        """Elements of the dense weight; of several matrices, those of one."""
        return self.out_features * self.in_features

    @property
    def parameter(self) -> str:
        """The name of the parameter."""
        return self.name.removesuffix(self.label)

    @property
    def label(self) -> str:
        """The indices of its part of the parameter, if it is one. A parameter's own name may look as if it had some."""
        return "" if self.region is None else self.region.label(self.weight_shape)

    @property
    def box(self) -> tuple[range, ...]:
        """The indices of the parameter that it uses, or more."""
        return (self.region or Region.whole(self.weight_shape)).box(self.weight_shape)


@dataclass(frozen=True)
class Match:
    """One matmul node of site `site`, of all or a part of `parameter`, as `Operands` puts it.

    `weight` is the node that it multiplies with. The parameter, or its part `region`, is stored (in, out) if
    `transposed`. `matrices` is None where the weight is a matrix, and how many where it holds several.
    """

    site: str
    parameter: str
    module: GraphModule
    node: Node
    x: Node
    weight: Node
    transposed: bool
    operands: Operands
    out_features: int
    in_features: int
    region: Region | None = None
    matrices: int | None = None
    bias: Node | None = None
    addend: Node | None = None
    rows: int = 0
    rows_expr: str = "0"
    dtype: torch.dtype = torch.float32

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.out_features * self.in_features


@dataclass(frozen=True)
class Skipped:
    """A parameter that no matmul uses as its weight, and why.

    `flops` are those of the operations with it that the counter of torch knows, such as convolutions.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    lookup: bool = False  # an embedding table
    used: bool = True
    aliases: tuple[str, ...] = ()
    flops: int = 0


@dataclass(frozen=True)
class Found:
    """What `find_sites` returns: sites, the matmuls of the eligible ones, and the parameters passed over.

    `differentiates`: of a whole model, if it runs only with gradients on. `second_derivatives`: if it asks
    for gradients that can be differentiated again.
    """

    sites: tuple[Site, ...]
    matches: tuple[Match, ...]
    skipped: tuple[Skipped, ...]
    differentiates: bool = False
    second_derivatives: bool = False
