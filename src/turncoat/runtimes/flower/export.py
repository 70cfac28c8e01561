"""From an audit's file to a folder that `flwr run` takes."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turncoat import __version__
from turncoat.config import ConfigError, load
from turncoat.runtimes.flower.app import RUN_CONFIG
from turncoat.runtimes.flower.engines import hush

_PACKAGE = "federation_app"
_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = {title}
requires-python = ">=3.11"
dependencies = ["turncoat[flower]=={version}"]

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.flwr.app]
publisher = "turncoat"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# What `flwr run --run-config` may set: the names of the file's tables; 0 rounds: as the file says;
# set = "key.of.a.table=value; ..." overrides keys of the file; out is the server's folder.
# In a simulation say how many nodes: flwr run ... --federation-config 'num-supernodes={clients}'
[tool.flwr.app.config]
{config}
"""
_APP = '''"""Made by `turncoat flower export`: the federation is in {file}."""

from pathlib import Path

from turncoat.runtimes.flower.app import {half}

app = {half}(Path(__file__).with_name("{file}"))
'''


def export(file: Path, folder: Path) -> list[Path]:
    """Write an app for `flwr run` that plays the federation of a file; return what was written.

    Python files that the TOML names come along; nothing of anybody's data does.

    Raises:
        ConfigError: If the file describes no federation, or the folder holds something else.
    """
    hush()
    audit = load(file)
    if folder.exists() and any(folder.iterdir()) and not (folder / _PACKAGE).exists():
        raise ConfigError(f"{folder} is not empty: choose a new folder for the app")
    inside = folder / _PACKAGE
    inside.mkdir(parents=True, exist_ok=True)
    written = [inside / "__init__.py", inside / file.name]
    written[0].write_text("")
    shutil.copyfile(file, written[1])
    for brought in sorted(set(_brought(tomllib.loads(audit.text), file.parent))):
        there = inside / brought.name
        shutil.copyfile(brought, there)
        written.append(there)
    for half in ("server_app", "client_app"):
        written.append(inside / f"{half}.py")
        written[-1].write_text(_APP.format(half=half, file=file.name))
    active = RUN_CONFIG | {"defence": next(iter(audit.federations))}
    written.append(folder / "pyproject.toml")
    written[-1].write_text(
        _PYPROJECT.format(
            name=re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-") or "federation",
            title=json.dumps(audit.title),
            version=__version__,
            clients=len(audit.task.clients),
            package=_PACKAGE,
            config="\n".join(f"{k} = {json.dumps(v)}" for k, v in active.items()),
        )
    )
    return written


def _brought(table: Any, folder: Path) -> Iterator[Path]:
    """Yield the Python files beside the TOML that it names, with those that lie there too."""
    for value in table.values() if isinstance(table, dict) else table:
        if isinstance(value, dict | list):
            yield from _brought(value, folder)
        elif isinstance(value, str) and ":" in value:
            source = value.rpartition(":")[0]
            named = source if source.endswith(".py") else f"{source.replace('.', '/')}.py"
            if (folder / named).is_file():
                yield from (folder / named).resolve().parent.glob("*.py")
