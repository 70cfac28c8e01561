"""Defences and attacks for Flower apps, and a check of what an app puts together.

Everything here works on an app that uses nothing else of Turncoat. Flower is imported on use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from turncoat.flower.check import Finding, Severity, check  # at once: a module is named so too

if TYPE_CHECKING:
    from turncoat.flower.mods import Traitors
    from turncoat.flower.private import Adaptive, DPFedAvg, DPFedAvgLegacy, Fixed
    from turncoat.flower.robust import Robust, RobustLegacy
    from turncoat.flower.secagg import AggregationHalted, Watched

__all__ = [
    "Adaptive",
    "AggregationHalted",
    "DPFedAvg",
    "DPFedAvgLegacy",
    "Finding",
    "Fixed",
    "Robust",
    "RobustLegacy",
    "Severity",
    "Traitors",
    "Watched",
    "check",
]

_HOMES = {
    "Adaptive": "private",
    "AggregationHalted": "secagg",
    "DPFedAvg": "private",
    "DPFedAvgLegacy": "private",
    "Fixed": "private",
    "Robust": "robust",
    "RobustLegacy": "robust",
    "Traitors": "mods",
    "Watched": "secagg",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}: pip install turncoat[flower]") from error
