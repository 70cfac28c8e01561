"""Who was in the data, what of them, and what ε buys: `python -m papers.inference`."""

from __future__ import annotations

import sys

from papers.acted import ACTIVE
from papers.attributes import ATTRIBUTES
from papers.ledger import main
from papers.members import MEMBERS
from papers.noised import NOISED
from papers.released import RELEASED
from papers.sabotaged import SABOTAGED

EXPERIMENTS = (*MEMBERS, *ATTRIBUTES, *NOISED, *SABOTAGED, *RELEASED, *ACTIVE)


if __name__ == "__main__":
    from papers.inference import EXPERIMENTS as SAME  # by the name that workers know it by

    sys.exit(main("inference", SAME, sys.argv[1:]))
