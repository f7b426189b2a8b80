"""The house: arrows between the folders, what an import costs, the names that are refused, the entry point."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pixelfly_compiler"
# A layer, and the layers it may import.
ARROWS = {"kernels": {"kernels"}, "passes": {"passes", "kernels"}, PACKAGE: {"passes", "kernels", PACKAGE}}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, also in functions; relative imports with their dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(module: str) -> str | None:
    """The layer that an imported module belongs to; None if it is not ours."""
    first, _, rest = module.partition(".")
    if first != PACKAGE:
        return None
    folder = rest.partition(".")[0]
    return folder if folder in ARROWS else PACKAGE


def python(code: str, *path: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with these folders in front on its path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd or "/", check=False)


def output(code: str, *path: Path, cwd: Path | None = None) -> str:
    done = python(code, *path, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", sources(*ARROWS), ids=name_of)
def test_imports_follow_the_arrows_and_are_absolute(path: Path) -> None:
    for module in imported(path):
        assert not module.startswith("."), f"relative import of {module}"
        assert module.partition(".")[0] not in ("passes", "kernels"), f"generic name {module}"
        assert layer(module) in {None, *ARROWS[path.parent.name]}, f"{module} is against the arrows"


@pytest.mark.parametrize("path", sources(*ARROWS, "tests", "examples", "benchmarks"), ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_importing_the_package_is_cheap() -> None:
    code = f"""
import sys, torch, {PACKAGE}
heavy = ("triton", "torch._inductor", "torch._dynamo", "matplotlib", "transformers")
print([name for name in sys.modules if name.startswith(heavy)], torch.cuda.is_initialized())
"""
    assert output(code) == "[] False"


def test_torch_finds_the_backend_by_name_without_our_import() -> None:
    code = f"""
import sys, torch
assert "{PACKAGE}" not in sys.modules
assert "pixelfly" in torch._dynamo.list_backends()
model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
with torch.no_grad():
    compiled = torch.compile(model, backend="pixelfly", options={{"budget": 0.5, "force": True}})
    compiled(torch.ones(2, 64))
print("{PACKAGE}" in sys.modules)
"""
    assert output(code) == "True"


@pytest.mark.parametrize("statement", ["import passes", "from passes import sites", "import passes.cost"])
def test_passes_are_refused_by_their_folder_s_name(statement: str) -> None:
    assert "import pixelfly_compiler.passes, not passes" in python(statement, ROOT).stderr


@pytest.mark.parametrize(
    "statement", ["import kernels.ops", "from kernels import ops", "from kernels.ops import linear"]
)
def test_kernels_are_refused_by_their_folder_s_name(statement: str) -> None:
    assert "import pixelfly_compiler.kernels, not kernels" in python(statement, ROOT).stderr


@pytest.mark.parametrize("path", [(ROOT,), ()], ids=["on PYTHONPATH", "as the working directory"])
def test_transformers_does_not_take_our_kernels_for_those_of_pypi(path: tuple[Path, ...]) -> None:
    pytest.importorskip("transformers")
    code = """
from transformers import GPT2LMHeadModel
from transformers.utils import is_kernels_available
import kernels
print(is_kernels_available(), getattr(kernels, "get_kernel", None), "kernels.ops" in __import__("sys").modules)
"""
    assert output(code, *path, cwd=ROOT) == "False None False"


def test_the_kernels_of_pypi_are_found_behind_ours(tmp_path: Path) -> None:
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("__version__ = '1.0'\nget_kernel = 'theirs'\n")
    (other / "layer.py").write_text("layer = 'theirs too'\n")
    code = f"""
from kernels import get_kernel
from kernels.layer import layer
import kernels, {PACKAGE}.kernels.ops
print(get_kernel, layer, kernels.__version__)
"""
    assert output(code, ROOT, tmp_path) == "theirs theirs too 1.0"


README_CODE = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", range(len(README_CODE)))
def test_the_code_in_the_readme_runs(block: int, tmp_path: Path) -> None:
    output(README_CODE[block], cwd=tmp_path)
