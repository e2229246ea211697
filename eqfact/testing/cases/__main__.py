"""``python -m eqfact.testing.cases -o DIR``: write the conformance cases as files, the same to the byte on every machine."""

from __future__ import annotations

import argparse
import sys

from eqfact.testing.cases import all_cases, levels_of, write


def main() -> int:
    """Write the cases, and say how many."""
    parser = argparse.ArgumentParser("python -m eqfact.testing.cases", description="Write the conformance cases as JSON files.")
    parser.add_argument("-o", "--output", required=True, metavar="DIR",
                        help="a folder that is new, or empty, or holds such cases, which are replaced")
    parser.add_argument("--level", type=levels_of, metavar="LEVELS", help="for instance 0-4,6; default: all")
    args = parser.parse_args()
    try:
        cases = all_cases(args.level)
        write(args.output, cases)
    except (ValueError, OSError) as error:
        parser.exit(3, f"eqfact.testing.cases: error: {error}\n")
    sys.stdout.write(f"{len(cases)} cases written to {args.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
