"""pixelfly_compiler: torch.compile(model, backend="pixelfly") makes the matmuls of a PyTorch model sparse.

The public surface: the backend, `plan` (what would be done, and why), `export` and `package` (a model as one file),
`emit` (GPU code, without a GPU), `project_` and `project` (what it means), and compact models: `sparsify_`,
`densify_`, `load_weights_`, `factors`, `plan_of`.
"""

from pixelfly_compiler.backend import pixelfly
from pixelfly_compiler.decision import Entry, Plan
from pixelfly_compiler.emit import Emission, EmittedKernel, emit
from pixelfly_compiler.errors import (
    CompactError,
    EmitError,
    ExportError,
    OptionError,
    PixelflyError,
    PlanError,
    PlanMismatchError,
    UnknownSiteError,
)
from pixelfly_compiler.export import export, package
from pixelfly_compiler.passes.sites import SiteConfig
from pixelfly_compiler.plan import plan, project, project_, rescale_
from pixelfly_compiler.sparsify import densify_, factors, load_weights_, plan_of, sparsify_

__version__ = "0.1.0"
__all__ = [
    "CompactError",
    "Emission",
    "EmitError",
    "EmittedKernel",
    "Entry",
    "ExportError",
    "OptionError",
    "PixelflyError",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "SiteConfig",
    "UnknownSiteError",
    "densify_",
    "emit",
    "export",
    "factors",
    "load_weights_",
    "package",
    "pixelfly",
    "plan",
    "plan_of",
    "project",
    "project_",
    "rescale_",
    "sparsify_",
]
