"""How fast the sampler is, as ratios of two things timed in one run, on the same weights and prompts.

  python -m benchmarks.sampler [--sections host released overhead refill group] [--repeats 2]

Sections, each a module of this folder:

  host      the jitted loop against Algorithm 1 written plainly in JAX, at the tiny size
  released  the jitted loop against the released method in torch, at about 60 million parameters
  overhead  the jitted loop against the decode steps and the encoding of clips that it cannot avoid, by insertion policy
  refill    rows that are refilled as they finish against static batches, with answers of very different lengths
  group     one prefill for a group of answers against one for each

Compilation is not timed; the best of the repeats counts (refill runs once). Ratios mean something on an idle machine
only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from benchmarks.sampler import group, host, overhead, refill, released

SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "host": host.run,
    "released": released.run,
    "overhead": overhead.run,
    "refill": refill.run,
    "group": group.run,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen sections in order."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.sampler", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="rows of the jitted loop")
    parser.add_argument("--seconds", type=int, default=10, help="length of the recordings")
    parser.add_argument(
        "--requests",
        type=int,
        default=8,
        help="questions that the released method answers, and the loop as often as its rows allow",
    )
    parser.add_argument(
        "--policies", type=int, default=len(overhead.POLICIES), help="insertion policies to compare"
    )
    args = parser.parse_args(argv)
    for name in args.sections:
        print(f"== {name}", flush=True)
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
