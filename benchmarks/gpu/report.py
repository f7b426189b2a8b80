"""The tables of a run, from what is in its JSON."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
TUNED_DENSE = ("torch.compile", "max-autotune")


def tables(report: Mapping[str, Any]) -> str:
    """All that is known, as text; sections that did not run are not in it."""
    console = Console(file=io.StringIO(), width=180)
    sections = report["sections"]
    console.print(", ".join(f"{key} {value}" for key, value in report["about"].items() if value))
    peaks = {row["ceiling"]: row["per_second"] for row in rows_of(sections, "ceilings")}
    for row in rows_of(sections, "tests"):
        counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "skipped"))
        console.print(f"tests: {counts}{'' if row['finished'] else ', then out of time'}", *row["failures"], sep="\n  ")
    for name, rate in peaks.items():
        console.print(f"{name}: {rate / 1e12:.3g} T{'B' if name == 'bandwidth' else 'flop'}/s measured")
    console.print(_table("layers, bf16", LAYER_COLUMNS, (_layer(row, peaks) for row in rows_of(sections, "layers"))))
    models = rows_of(sections, "models")
    console.print(_table("models, bf16 autocast", MODEL_COLUMNS, (_model(row, models) for row in models)))
    for name, section in sections.items():
        _print_errors(console, name, section["errors"])
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows_of(sections: Mapping[str, Any], name: str) -> list[Row]:
    rows: list[Row] = sections.get(name, {}).get("rows", [])
    return rows


def _print_errors(console: Console, section: str, errors: Mapping[str, Any]) -> None:
    missed = [key for key, error in errors.items() if str(error.get("error")).startswith("not reached")]
    if missed:
        console.print(f"{section}: {len(missed)} not reached: {', '.join(missed[:6])} ...", markup=False)
    for key, error in errors.items():
        if key not in missed:
            console.print(f"{section} {key}: ERROR {error['error']}", markup=False)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table | str:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("contender", "what") else "right")
    for row in rows:
        table.add_row(*row)
    return table if table.row_count else f"{title}: nothing"


LAYER_COLUMNS = (
    "rows, in -> out",
    "kept",
    "block",
    "what",
    "contender",
    "us",
    "roofline us",
    "of it",
    "TFLOP/s kept",
    "of cuBLAS's rate",
    "speed-up",
    "error",
)


def _layer(row: Row, peaks: Mapping[str, float]) -> list[str]:
    case = [f"{row['rows']:.0f}, {row['in']:.0f} -> {row['out']:.0f}", f"{row['kept']:.1%}", f"{row['block']:.0f}"]
    if "seconds" not in row:
        return [*case, row.get("operation", ""), row["contender"], row.get("wrong", row.get("left_out", ""))[:40]]
    floor = roofline(row, peaks)
    return [
        *case,
        row["operation"],
        row["contender"] + ("" if row["graph"] else " (no graph)"),
        f"{row['seconds'] * 1e6:.1f}",
        "-" if floor is None else f"{floor * 1e6:.1f}",
        "-" if floor is None else f"{floor / row['seconds']:.0%}",
        f"{row['flops'] / row['seconds'] / 1e12:.1f}",
        f"{row['of_cublas_rate']:.0%}" if "of_cublas_rate" in row else "-",
        f"{row['speedup']:.2f}x" if "speedup" in row else "-",
        f"{row['error']:.0e}",
    ]


def roofline(row: Row, peaks: Mapping[str, float]) -> float | None:
    """Seconds that the kept flops, or the least bytes, need at the rates that the device reaches; the larger."""
    if len(peaks) < 2:
        return None
    return max(row["flops"] / peaks["matmul"], row["bytes"] / peaks["bandwidth"])


MODEL_COLUMNS = (
    "model",
    "what",
    "contender",
    "compile mode",
    "ms",
    "items/s",
    "over tuned dense",
    "peak MiB",
    "compile s",
    "parameters",
    "error",
)


def _model(row: Row, rows: Sequence[Row]) -> list[str]:
    base = next((other for other in rows if _is_base(other, row)), None)
    return [
        row["model"],
        row["mode"],
        row["contender"],
        row["compile_mode"],
        f"{row['seconds'] * 1e3:.2f}",
        f"{row['items_per_second']:,.0f}",
        f"{base['seconds'] / row['seconds']:.2f}x" if base else "-",
        f"{row['peak_bytes'] / 2**20:,.0f}" if row["peak_bytes"] else "-",
        f"{row['compile_s']:.0f}",
        f"{row['weights'] / 1e6:.1f} M",
        "WRONG" if "wrong" in row else f"{row['error']:.0e}" if "error" in row else "-",
    ]


def _is_base(other: Row, row: Row) -> bool:
    same = other["model"] == row["model"] and other["mode"] == row["mode"]
    return same and (other["contender"], other["compile_mode"]) == TUNED_DENSE
