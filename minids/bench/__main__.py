"""`python -m minids.bench NAME [--rounds N] [--json FILE] [--check]`: run one benchmark and print its table.

A benchmark is a module of this package with a function `run(rounds: int) -> Report`.
"""

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

import minids.bench
from minids.bench.common import environment, format_report, one_thread, write_json

HELPERS = {"__main__", "common", "gpu_cases", "gpu_layers", "ladder_kernels", "peer"}


def names() -> list[str]:
    """The benchmarks there are: the modules of this package that are no helpers."""
    return sorted({module.name for module in pkgutil.iter_modules(minids.bench.__path__)} - HELPERS)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if --check is given and a target is missed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m minids.bench", description="Benchmarks beside their peers.")
    parser.add_argument("name", choices=names(), help="which benchmark")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the figures are medians (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: the folder {options.json.parent} does not exist")

    with one_thread():
        report = importlib.import_module(f"minids.bench.{options.name}").run(options.rounds)
        machine = environment()
    print(format_report(report, machine))
    if options.json is not None:
        write_json(report, machine, options.json)
        print(f"figures written to {options.json}")
    return int(options.check and bool(report.missed))


if __name__ == "__main__":
    sys.exit(main())
