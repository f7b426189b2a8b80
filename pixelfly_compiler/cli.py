"""The `pixelfly` command: look at a plan, package a model, emit GPU code, or measure this machine."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pixelfly_compiler.errors import PixelflyError


@click.group()
def main() -> None:
    """pixelfly: the matmuls of any PyTorch model, sparse."""


@main.command()
@click.argument("target", metavar="FILE.py:FACTORY")
@click.option("--budget", default=0.25, show_default=True, help="Share of the dense compute that may be kept.")
@click.option("--allocator", default="proportional", show_default=True)
@click.option("--block-size", type=int, default=None, help="16, 32, 64 or 128; by default chosen per site.")
@click.option("--include", multiple=True, help="Glob of weights to make sparse; repeatable.")
@click.option("--exclude", multiple=True, help="Glob of weights that stay dense; repeatable.")
@click.option("--force", is_flag=True, help="Make sites sparse even where dense is predicted faster.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), default=None, help="Save the plan here.")
def plan(target: str, json_path: str | None, **options: Any) -> None:
    """Show the plan of the model that FACTORY returns, as (model, args) or (model, args, kwargs)."""
    from pixelfly_compiler.plan import plan as make

    model, args, kwargs = _call(_factory(target), target)
    with _explained(target, model, args, kwargs):
        made = make(model, args, kwargs, **options)
        click.echo(str(made))
        if json_path:
            made.save(json_path)


@main.command()
@click.argument("source", metavar="FILE.py:FACTORY")
@click.option("--target", default="cuda:90", show_default=True, help="The GPU, as Triton counts architectures.")
@click.option("--out-dir", default="emitted", show_default=True, type=click.Path(file_okay=False))
@click.option("--training", is_flag=True, help="Emit the gradients too.")
@click.option("--budget", type=float, default=None, help="Share of the dense compute that may be kept; 0.25 if absent.")
@click.option("--block-size", type=int, default=None, help="16, 32, 64 or 128; by default chosen per site.")
@click.option("--include", multiple=True, help="Glob of weights to make sparse; repeatable.")
@click.option("--exclude", multiple=True, help="Glob of weights that stay dense; repeatable.")
@click.option("--force", is_flag=True, default=None, help="Make sites sparse even where dense is predicted faster.")
def emit(source: str, **options: Any) -> None:
    """Write the GPU code of the model that FACTORY returns, on a machine with or without a GPU."""
    from pixelfly_compiler.emit import emit as write

    model, args, kwargs = _call(_factory(source), source)
    with _progress(), _explained(source, model, args, kwargs):
        emission = write(model, args, kwargs, **_given(options))
    click.echo(str(emission.plan))
    click.echo(str(emission))
    click.echo(f"written to {emission.folder}")


@main.command()
@click.argument("source", metavar="FILE.py:FACTORY")
@click.argument("out", metavar="OUT.pt2", type=click.Path(dir_okay=False))
@click.option("--plan", type=click.Path(exists=True, dir_okay=False), default=None, help="A plan saved as JSON.")
@click.option("--budget", type=float, default=None, help="Share of the dense compute that may be kept; 0.25 if absent.")
@click.option("--force", is_flag=True, default=None, help="Make sites sparse even where dense is predicted faster.")
def export(source: str, out: str, **options: Any) -> None:
    """Compile the model that FACTORY returns into one file, which runs without this package.

    FACTORY returns (model, args), (model, args, kwargs) or (model, args, kwargs, dynamic_shapes).
    """
    from pixelfly_compiler.export import export as make
    from pixelfly_compiler.export import package

    model, args, kwargs, *shapes = _call(_factory(source), source, most=4)
    with _explained(source, model, args, kwargs):
        package(make(model, args, kwargs, dynamic_shapes=shapes[0] if shapes else None, **_given(options)), out)
    click.echo(f"written to {out}; load it with torch._inductor.aoti_load_package({out!r})")


@main.command()
def calibrate() -> None:
    """Measure this machine's CPU for the time model, and keep the result for later runs."""
    from pixelfly_compiler.passes.calibration import calibrate as measure
    from pixelfly_compiler.passes.cost import DENSE_ROWS, DENSE_WIDTHS

    device = measure(again=True)
    click.echo(device.name)
    for name, grid in device.dense.items():
        click.echo(f"  {name}: sparse kernels up to {device.rate[name] / 1e9:.0f} GFLOP/s; dense, by rows and width:")
        click.echo("          " + "".join(f"{width:>12}" for width in DENSE_WIDTHS))
        for rows, line in zip(DENSE_ROWS, grid, strict=True):
            click.echo(f"    {rows:>6}" + "".join(f"{seconds * 1e6:>10.0f}us" for seconds in line))
    click.echo(f"  memory: {device.bandwidth / 1e9:.0f} GB/s")


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the user gave: for a compact model an option asks for another plan."""
    return {name: value for name, value in options.items() if value not in (None, ())}


@contextmanager
def _explained(source: str, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Errors of ours as they are; of any other, whether the model raises it. What is left is a defect: shown whole."""
    try:
        yield
    except (PixelflyError, OSError) as cause:
        raise click.ClickException(str(cause)) from cause
    except Exception:
        try:
            model(*args, **kwargs)
        except Exception as cause:
            raise click.ClickException(
                f"the model of {source} does not run with its arguments: {type(cause).__name__}: {cause}\n"
                "  next step: FACTORY returns (model, args) or (model, args, kwargs) for model(*args, **kwargs)"
            ) from cause
        raise


@contextmanager
def _progress() -> Iterator[None]:
    """Show the progress that is logged: by `emit` alone, graph by graph, as it compiles every kernel for the target."""
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("pixelfly_compiler")
    before = log.level
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)


def _factory(target: str) -> Callable[[], Any]:
    path, _, name = target.rpartition(":")
    if not path:
        raise click.ClickException(f"{target!r} is not FILE.py:FACTORY, for example model.py:build")
    if not Path(path).is_file():
        raise click.ClickException(f"no file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise click.ClickException(f"{path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as cause:
        raise click.ClickException(f"{path!r} does not run: {type(cause).__name__}: {cause}") from cause
    factory = getattr(module, name, None)
    if not callable(factory):
        raise click.ClickException(f"{path!r} has no function {name!r}")
    return factory


def _call(factory: Callable[[], Any], target: str, most: int = 3) -> tuple[Any, ...]:
    """What the factory returns: model, args, kwargs, and up to `most` values in all."""
    try:
        made = factory()
    except (Exception, SystemExit) as cause:
        raise click.ClickException(f"{target} raised {type(cause).__name__}: {cause}") from cause
    if not isinstance(made, tuple) or not 2 <= len(made) <= most:
        raise click.ClickException(f"{target} must return (model, args) or (model, args, kwargs)")
    model, args, kwargs, *rest = made if len(made) > 2 else (*made, None)
    if not isinstance(kwargs, Mapping | None) or not all(isinstance(name, str) for name in kwargs or ()):
        given = f"of names {list(kwargs)}" if isinstance(kwargs, Mapping) else f"a {type(kwargs).__name__}"
        raise click.ClickException(f"{target} returned kwargs {given}, which must be a dictionary of named arguments")
    positional = tuple(args) if isinstance(args, tuple | list) else (args,)
    return model, positional, dict(kwargs or {}), *rest
