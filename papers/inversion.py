"""What an update gives away of images, and what stops it: `python -m papers.inversion`."""

from __future__ import annotations

import sys

from papers.adapted import ADAPTED
from papers.devices import DEVICES
from papers.informed import INFORMED
from papers.ledger import main
from papers.rebuilt import REBUILT
from papers.segmented import SEGMENTED

EXPERIMENTS = (*REBUILT, *INFORMED, *SEGMENTED, *DEVICES, *ADAPTED)


if __name__ == "__main__":
    from papers.inversion import EXPERIMENTS as SAME  # by the name that workers know it by

    sys.exit(main("inversion", SAME, sys.argv[1:]))
