"""What users bring along: their files, imported under names of their own.

``turncoat.brought.mine_1f3a`` is the file ``mine.py`` of one folder. Neither another ``mine.py``
nor a library named ``mine`` can take its place, and worker processes find it the same way.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_KNOWN = "TURNCOAT_BROUGHT"  # in the environment, which worker processes inherit


def import_file(path: Path) -> ModuleType:
    """Import a Python file; its folder joins the end of ``sys.path``, for what it imports."""
    whole = path.resolve()
    name = f"{__name__}.{whole.stem}_{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}"
    known = json.loads(os.environ.get(_KNOWN, "{}"))
    os.environ[_KNOWN] = json.dumps(known | {name: str(whole)})
    return importlib.import_module(name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        where = json.loads(os.environ.get(_KNOWN, "{}")).get(fullname)
        if where is None:
            return None
        if (folder := str(Path(where).parent)) not in sys.path:
            sys.path.append(folder)
        return spec_from_file_location(fullname, where)


sys.meta_path.append(_Finder())
