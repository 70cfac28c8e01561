"""What users bring along: their files, imported under names of their own.

``turncoat.brought.mine_1f3a`` is the file ``mine.py`` of one folder. Neither another ``mine.py``
nor a library named ``mine`` can take its place, and worker processes find it the same way.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
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


def lay_out(folder: Path) -> None:
    """Copy what was brought, with the Python files beside it, for machines that have it not."""
    known = json.loads(os.environ.get(_KNOWN, "{}"))
    folder.mkdir(parents=True)
    (folder / "known.json").write_text(json.dumps(known))
    for name, where in known.items():
        (folder / name).mkdir()
        for source in Path(where).parent.glob("*.py"):
            shutil.copyfile(source, folder / name / source.name)


def take_up(folder: Path) -> None:
    """Find what was brought: where it was, if the same is there, else among the copies."""
    known = json.loads((folder / "known.json").read_text())
    for name, where in known.items():
        copies, original = folder / name, Path(where)
        if not all(_same(copy, original.with_name(copy.name)) for copy in copies.iterdir()):
            known[name] = str(copies / original.name)
        if (beside := str(Path(known[name]).parent)) not in sys.path:
            sys.path.append(beside)
    os.environ[_KNOWN] = json.dumps(known)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


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
