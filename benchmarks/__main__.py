"""Run benchmarks: ``python -m benchmarks [NAME ...] [--json FILE] [--device auto|cpu|cuda] [--quick]``.

Without a name, every benchmark that fits this machine runs. A ratio is value / baseline: below 1 is faster or
smaller. ``kernels`` also draws its plots, into ``--plots FOLDER``. ``--show FILE`` prints the table of an
earlier run's file instead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ._harness import (
    Context,
    DoesNotFit,
    OutputsDiffer,
    Result,
    current_commit,
    device_name,
    package_versions,
)
from ._plots import draw
from ._tables import print_kernels, print_table
from .bench_kernels import NAME as KERNELS
from .bench_kernels import OPS, works

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
PREFIX = "bench_"
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DOES_NOT_FIT = 3


def available() -> list[str]:
    """Return the names of the benchmarks in this folder, in alphabetical order."""
    return sorted(path.stem.removeprefix(PREFIX) for path in FOLDER.glob(f"{PREFIX}*.py"))


def run_benchmark(name: str, context: Context, json_file: Path | None) -> list[Result]:
    """Run one benchmark, and append each result to ``json_file`` as soon as it exists."""
    module = importlib.import_module(f"{__package__}.{PREFIX}{name}")
    results: list[Result] = []
    for result in module.run(context):
        results.append(result)
        if json_file is not None:
            with json_file.open("a", encoding="utf-8") as lines:
                lines.write(result.to_json() + "\n")
                lines.flush()
                os.fsync(lines.fileno())
    return results


def show(json_file: Path, plots: Path | None) -> int:
    """Print the table of a results file, and draw its plots if asked for."""
    if not json_file.exists():
        print(f"--show {json_file}: no such file.", file=sys.stderr)
        return EXIT_USAGE
    lines = json_file.read_text(encoding="utf-8").splitlines()
    results = [Result(**json.loads(line)) for line in lines]
    _print(results)
    if plots is not None:
        _draw(results, plots)
    return 0


def _print(results: Sequence[Result]) -> None:
    kernels = [result for result in results if result.benchmark in OPS]
    others = [result for result in results if result.benchmark not in (*OPS, KERNELS)]
    if others:
        print_table(others)
    if len(others) < len(results):
        is_whole = any(result.benchmark == KERNELS for result in results)
        print_kernels(kernels, list(works()), with_rest=is_whole)


def _draw(results: list[Result], folder: Path) -> None:
    for path in draw(list(works()), results, folder):
        print(f"drawn: {path}")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, print one table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(available())}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line per result to FILE")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="few rounds, small shapes: checks that it runs")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of a results file")
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help="where the plots of kernels go; benchmarks/results unless given",
    )
    options = parser.parse_args(arguments)
    if options.show is not None:
        return show(options.show, options.plots)
    unknown = [name for name in options.names if name not in available()]
    if unknown:
        print(
            f"no benchmark named {', '.join(unknown)}; there are: {', '.join(available())}.", file=sys.stderr
        )
        return EXIT_USAGE
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device here. Use --device cpu.", file=sys.stderr)
        return EXIT_USAGE
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    context = Context(device=torch.device(device), quick=options.quick)
    versions = ", ".join(
        f"{name} {version}" for name, version in package_versions(("torch", "triton")).items()
    )
    print(f"{device_name(context.device)}; {versions}; commit {current_commit()}")

    status = 0
    results: list[Result] = []
    # kernels runs the benchmarks of all ops
    for name in options.names or [name for name in available() if name not in OPS]:
        print(f"running {name} ...", flush=True)
        try:
            results += run_benchmark(name, context, options.json)
        except DoesNotFit as reason:
            print(f"{name}: does not fit this machine: {reason}")
            status = status or (EXIT_DOES_NOT_FIT if options.names else 0)
        except OutputsDiffer as difference:
            print(f"{name}: outputs differ, so no ratio is reported: {difference}", file=sys.stderr)
            status = EXIT_FAILED
    if results:
        print()
        _print(results)
    # a quick run shows nothing worth keeping
    folder = options.plots or (None if options.quick else RESULTS)
    if folder is not None and any(result.benchmark == "kernels" for result in results):
        _draw(results, folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
