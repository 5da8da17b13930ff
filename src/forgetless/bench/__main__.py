"""python -m forgetless.bench NAME [options]: each benchmark adds its own options and runs itself."""

from __future__ import annotations

import argparse
import sys

from ..errors import ForgetlessError
from . import memory, osft, refresh, step, train

BENCHMARKS = {"memory": memory, "osft": osft, "refresh": refresh, "step": step, "train": train}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m forgetless.bench", description="Speed and memory of forgetless beside its peers, measured here.")
    names = parser.add_subparsers(required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        own = names.add_parser(
            name,
            help=benchmark.SUMMARY,
            description=benchmark.SUMMARY,
            epilog=benchmark.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        benchmark.add_options(own)
        own.set_defaults(run=benchmark.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ForgetlessError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
