"""Builds the plugin library alone, on the device; `build` and `prove` do so where a plan needs it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine_build.backends.tensorrt.library import KERNELS, build_library
from vla_policy.core.cli import run
from vla_policy.core.errors import ArtefactError
from vla_policy.core.targets import TARGETS, find_target


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m engine_build.backends.tensorrt.library", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="orin-jp6", help="machine of the GPU (default: orin-jp6)")
    parser.add_argument("--out", type=Path, required=True, help="library to write, e.g. plugins.so")
    arguments = parser.parse_args(argv)
    capability = find_target(arguments.target).compute_capability
    if capability is None:
        raise ArtefactError(f"target {arguments.target} has no GPU; name one that has")
    build_library(arguments.out, capability)
    print(f"{arguments.out}: {len(KERNELS)} kernels for compute capability {capability[0]}.{capability[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
