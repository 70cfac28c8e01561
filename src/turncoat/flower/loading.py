"""A Flower app as its folder describes it: components, run config and number of nodes."""

from __future__ import annotations

import hashlib
import importlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from turncoat.validate import at_least, nearest

Scalar = bool | float | int | str

_ROUNDS = ("num-server-rounds", "num-rounds", "server-rounds", "rounds", "num-rounds-fl")
_NODES = ("num-supernodes", "num-partitions", "num-clients", "num-nodes")
_SKIPPED = {"__pycache__", "node_modules", "venv"}
_FEW_NODES = 10


class AppUnreadable(ValueError):
    """A folder holds no Flower app, or one whose parts are not where it says."""


@dataclass(frozen=True)
class FlowerApp:
    """What an app's ``pyproject.toml`` says of it.

    Attributes:
        serverapp, clientapp: Where they are, as ``module:attribute``.
        config: ``[tool.flwr.app.config]``, nested keys joined by dots, as Flower joins them.
        num_nodes: How many nodes it is made for, if it says so.
    """

    folder: Path
    name: str
    serverapp: str
    clientapp: str
    config: Mapping[str, Scalar] = field(default_factory=dict)
    num_nodes: int | None = None
    about: str = ""

    @property
    def rounds_key(self) -> str | None:
        """The key of the run config that says how many rounds there are, if one does."""
        spelt = {key.replace("_", "-"): key for key in self.config}
        return next((spelt[name] for name in _ROUNDS if name in spelt), None)

    @property
    def digest(self) -> str:
        """A hash of every Python and TOML file of the app."""
        found = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            inside = path.relative_to(self.folder)
            if path.suffix in (".py", ".toml") and not _skipped(inside):
                found.update(str(inside).encode() + b"\0" + path.read_bytes() + b"\0")
        return found.hexdigest()

    def configured(self, settings: Sequence[str] = (), num_rounds: int | None = None) -> FlowerApp:
        """Return the app with some of its run config set: ``key=value`` each.

        A value takes the type of the one that it replaces; Flower allows no new keys either.
        """
        config = dict(self.config)
        for setting in settings:
            key, sign, value = setting.partition("=")
            if not sign:
                raise AppUnreadable(f"--set {setting!r} is no key=value")
            if key not in config:
                raise AppUnreadable(
                    f"the app's run config has no {key!r}; {nearest(key, self.config)}"
                )
            config[key] = _typed(key, value, config[key])
        if num_rounds is not None:
            at_least(1, "--rounds", rounds=num_rounds)
            if self.rounds_key is None:
                raise AppUnreadable(
                    "the app's run config has no key for its number of rounds that is known here "
                    f"({', '.join(_ROUNDS)}): use --set KEY=N, or leave --rounds out"
                )
            config[self.rounds_key] = num_rounds
        return replace(self, config=config)


def read_app(folder: Path) -> FlowerApp:
    """Return the app in ``folder``; import nothing of it."""
    path = folder / "pyproject.toml"
    try:
        whole = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise AppUnreadable(
            f"{folder} holds no pyproject.toml: give the folder of an app"
        ) from None
    except ValueError as error:
        raise AppUnreadable(f"{path} is not TOML: {error}") from None
    flwr = whole.get("tool", {}).get("flwr", {})
    app, project = flwr.get("app", {}), whole.get("project", {})
    parts = app.get("components", {})
    for part in ("serverapp", "clientapp"):
        if ":" not in str(parts.get(part, "")):
            raise AppUnreadable(
                f"{path} names no {part} in [tool.flwr.app.components]: it is no Flower app; "
                f'there should be {part} = "module:app"'
            )
    config = _flat(app.get("config", {}))
    return FlowerApp(
        folder.resolve(),
        str(project.get("name") or folder.resolve().name),
        parts["serverapp"],
        parts["clientapp"],
        config,
        _num_nodes(flwr, config),
        str(project.get("description") or ""),
    )


def load(reference: str) -> Any:
    """Return what ``module:attribute`` names; the app's folder must be on the path."""
    module, sign, attribute = reference.partition(":")
    if not sign or not module or not attribute:
        raise AppUnreadable(f"{reference!r} is no module:attribute")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise AppUnreadable(f"{module} has no {attribute!r}; {nearest(part, public(found))}")
        found = getattr(found, part)
    return found


def public(module: Any) -> list[str]:
    """Return the names of a module that do not begin with an underscore."""
    return [name for name in vars(module) if not name.startswith("_")]


def mirror(folder: Path, target: Path) -> None:
    """Make ``target`` look like ``folder``: what a run writes there does not litter the app.

    Folders are made anew and files are links, so large data cost nothing.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(folder.iterdir()):
        if _skipped(Path(entry.name)):
            continue
        if entry.is_dir():
            mirror(entry, target / entry.name)
        else:
            (target / entry.name).symlink_to(entry.resolve())


def _skipped(path: Path) -> bool:
    return any(part in _SKIPPED or part.startswith(".") for part in path.parts)


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


def _typed(key: str, text: str, before: Scalar) -> Scalar:
    if isinstance(before, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif isinstance(before, str):
        return text.strip("\"'")
    else:
        try:
            number = float(text)
            return int(number) if isinstance(before, int) and number == int(number) else number
        except ValueError:
            pass
    raise AppUnreadable(f"{key} is {before!r}, so {text!r} cannot replace it")


def _num_nodes(flwr: Mapping[str, Any], config: Mapping[str, Scalar]) -> int:
    """Return the number of nodes that an app says it is for, or Flower's usual ten."""
    for federation in (flwr.get("federations") or {}).values():
        if isinstance(federation, Mapping):
            said = _flat(federation).get("options.num-supernodes")
            if isinstance(said, int):
                return said
    spelt = {key.replace("_", "-"): value for key, value in config.items()}
    return next((v for name in _NODES if isinstance(v := spelt.get(name), int)), _FEW_NODES)
