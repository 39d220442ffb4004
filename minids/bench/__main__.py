"""`python -m minids.bench NAME [--rounds N] [--json FILE] [--check]`: run one benchmark and print its table.

A benchmark is a module of this package with a function `run(rounds: int) -> Report`. One with `GROUPS` of rows can run some
of them, `run(rounds, only=groups, save=function)`, and its JSON is written after each row.
"""

import argparse
import functools
import importlib
import pkgutil
import sys
from pathlib import Path

import minids.bench
from minids.bench.common import environment, format_report, one_thread, write_json

HELPERS = {
    "__main__", "common", "gpu_attention", "gpu_cases", "gpu_layers", "gpu_report", "gpu_small", "gpu_training",
    "ladder_kernels", "peer",
}  # fmt: skip


def names() -> list[str]:
    """The benchmarks there are: the modules of this package that are no helpers."""
    return sorted({module.name for module in pkgutil.iter_modules(minids.bench.__path__)} - HELPERS)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if --check is given and a target is missed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m minids.bench", description="Benchmarks beside their peers.")
    parser.add_argument("name", choices=names(), help="which benchmark")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the figures are medians (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--only", nargs="+", default=[], metavar="GROUP", help="some of the rows, where a benchmark can")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: the folder {options.json.parent} does not exist")

    module = importlib.import_module(f"minids.bench.{options.name}")
    groups = getattr(module, "GROUPS", [])
    if unknown := [name for name in options.only if name not in groups]:
        parser.error(f"--only: got {' '.join(unknown)}, {options.name} has {' '.join(groups) or 'no groups'}")
    with one_thread():
        machine = environment()
        if groups:
            save = None if options.json is None else functools.partial(write_json, machine=machine, path=options.json)
            report = module.run(options.rounds, only=options.only, save=save)
        else:
            report = module.run(options.rounds)
    print(format_report(report, machine))
    if options.json is not None:
        write_json(report, machine, options.json)
        print(f"figures written to {options.json}")
    return int(options.check and bool(report.missed))


if __name__ == "__main__":
    sys.exit(main())
