"""Benchmarks, each run from the repository's root: ``python -m benchmarks.NAME --help``.

``--hide PACKAGE`` makes a package look as if it were not installed. Torch and Transformers ask for
optional packages when they are imported, so that it has to be done before: here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def hide(arguments: Sequence[str]) -> tuple[str, ...]:
    """Makes imports of every ``--hide PACKAGE`` of a command line fail in this process.

    Raises:
        RuntimeError: one of them has been imported already.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hide", action="append", default=[])
    names = tuple(parser.parse_known_args(arguments)[0].hide)
    for name in names:
        if sys.modules.get(name) is not None:
            raise RuntimeError(f"--hide {name}: it has been imported already")
        sys.modules[name] = None  # type: ignore[assignment]
    return names


#: Packages hidden from this process. ``-m`` stands in ``sys.argv`` only while Python looks for the
#: module to run, and this package is imported on the way to it.
HIDDEN = hide(sys.argv[1:]) if sys.argv[:1] == ["-m"] else ()
