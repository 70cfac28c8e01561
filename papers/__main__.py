"""All reproductions, one ledger after the other: ``python -m papers``."""

from __future__ import annotations

import sys
from importlib import import_module

from papers.ledger import main

LEDGERS = ("foundation", "poisoning", "inversion", "inference")


if __name__ == "__main__":
    ends = [
        main(name, import_module(f"papers.{name}").EXPERIMENTS, sys.argv[1:]) for name in LEDGERS
    ]
    sys.exit(max(ends))
