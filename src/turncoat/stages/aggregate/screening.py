"""Handing on to another rule those messages that passed a test."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from turncoat.messages import Clear
from turncoat.stage import Aggregate, Verdict, call, within


def hand_on(
    inner: Aggregate[Clear],
    messages: Sequence[Clear],
    suspects: Collection[int],
    offers: Mapping[str, Any],
    *,
    unfit: Collection[int] = (),
    verdict: Verdict,
) -> Tensor:
    """Return what ``inner`` makes of the messages without the suspects, and tell the verdict.

    Where ``inner`` needs more messages than are left, it gets the suspects too, and defends alone.

    Args:
        suspects: Positions of the messages that failed.
        offers: What ``inner`` may ask for; the cohort shrinks with the messages.
        unfit: Positions of messages that nobody may see: not finite, or absurdly long.
    """
    verdict.flag([*suspects, *unfit])
    fit = [i for i in range(len(messages)) if i not in unfit]
    kept = [i for i in fit if i not in suspects]
    if not _suffices(inner, len(kept)):
        kept = fit
    if not kept:
        return torch.zeros_like(messages[0].delta)
    less = dict(offers)
    if "cohort" in less:
        less["cohort"] = tuple(less["cohort"][i] for i in kept)
    seen = Verdict()
    step: Tensor = call(inner, [messages[i] for i in kept], **less, verdict=seen)
    verdict.flag(kept[i] for i in seen.flagged)
    return step


def _suffices(inner: Any, num_messages: int) -> bool:
    try:
        for stage in within(inner):
            if hasattr(stage, "check_cohort"):
                stage.check_cohort(num_messages)
    except ValueError:
        return False
    return num_messages > 0
