"""pixelfly_compiler: torch.compile(model, backend="pixelfly") makes the matmuls of a PyTorch model sparse.

The public surface: the backend, `plan` (what would be done, and why), `emit` (GPU code,
without a GPU), `project_` and `project` (what it means).
"""

from pixelfly_compiler.backend import pixelfly
from pixelfly_compiler.decision import Entry, Plan
from pixelfly_compiler.emit import Emission, EmittedKernel, emit
from pixelfly_compiler.errors import (
    EmitError,
    OptionError,
    PixelflyError,
    PlanError,
    PlanMismatchError,
    UnknownSiteError,
)
from pixelfly_compiler.passes.sites import SiteConfig
from pixelfly_compiler.plan import plan, project, project_

__version__ = "0.1.0"
__all__ = [
    "Emission",
    "EmitError",
    "EmittedKernel",
    "Entry",
    "OptionError",
    "PixelflyError",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "SiteConfig",
    "UnknownSiteError",
    "emit",
    "pixelfly",
    "plan",
    "project",
    "project_",
]
