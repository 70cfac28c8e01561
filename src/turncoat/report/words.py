"""How the report says things: seats, figures and views in words that need no manual."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite

SEATS = ("server", "coalition", "client", "peer", "user", "wire", "supplier", "neighbour")
_WHO = {
    "server": "The server",
    "coalition": "A coalition of dishonest clients",
    "client": "A curious client",
    "peer": "A dishonest peer",
    "user": "A user of the released model",
    "wire": "Someone on the wire",
    "supplier": "A dishonest supplier",
    "neighbour": "A neighbour on the same machine",
}
_METRICS = {
    "auc": "AUC",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "mse": "MSE",
    "lpips": "LPIPS",
    "f1": "F1",
    "epsilon": "ε",
    "gaussian": "Gaussian",
}
_PERCENT = re.compile(r"accuracy|success|rate|tpr|recall|precision|identified")
_VIEWS = {
    "ServerView": "of each client, by name, {}; and what it sent them",
    "PeerView": "of each neighbour, by name, {}, relative to its own state",
    "MixView": "its own state before and after each round",
    "BlindView": "of each client, by name, {}; not the global model",
    "AggregateView": "the global model before and after each round",
    "ClientView": "its own data, every model it starts from, its own training",
    "CoalitionView": "its members' own training; others' only as stated",
    "ModelView": "the released model, all weights",
    "QueryView": "answers of the released model; queries are counted",
    "TraceView": "times, sizes and addresses touched",
}
_MESSAGES = {
    "Update": "the update, readable",
    "Logits": "the predictions, readable",
    "Votes": "the votes on public examples, readable",
    "Clear": "the message, readable",
    "Masked": "a masked update; only the sum opens",
    "Ciphertext": "a ciphertext",
    "Shares": "a share that alone says nothing",
    "Share": "a share that alone says nothing",
    "Sealed": "a sealed box",
}


def who(seat: str) -> str:
    """Name a seat as a sentence begins.

    >>> who("user")
    'A user of the released model'
    """
    return _WHO.get(seat, f"The {seat.replace('_', ' ')}" if seat else "No seat that exists")


def order(seat: str) -> tuple[int, str]:
    """Sort seats from the middle of the federation outwards; unknown ones last."""
    return (SEATS.index(seat) if seat in SEATS else len(SEATS), seat)


def metric(name: str) -> str:
    """Name what is measured.

    >>> metric("auc"), metric("attack_success_rate"), metric("tpr_at_01pct_fpr")
    ('AUC', 'attack success rate', 'TPR at 0.1 % FPR')
    """
    if at := re.fullmatch(r"tpr_at_(0?)(\d+)pct_fpr", name):
        return f"TPR at {'0.' if at[1] else ''}{at[2]} % FPR"
    words = name.replace("_", " ").split()
    return " ".join(_METRICS.get(word, word) for word in words)


def number(value: float | None, name: str, unit: str = "", *, bare: bool = False) -> str:
    """Write a figure with the digits and the unit that its metric deserves.

    >>> number(0.9312, "accuracy"), number(0.9312, "auc"), number(23.42, "psnr", "dB")
    ('93.1 %', '0.931', '23.4 dB')
    """
    if value is None or not isfinite(value):
        return "unknown"
    if not unit and _PERCENT.search(name):
        text, unit = f"{100 * value:.1f}", "%"
    elif unit:
        text = f"{value:.1f}"
    else:
        text = f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
    if re.fullmatch(r"-0\.?0*", text):
        text = text[1:]
    text = text.replace("-", "−")  # noqa: RUF001
    return text if bare or not unit else f"{text} {unit}"


def interval(low: float | None, high: float | None, name: str, unit: str = "") -> str:
    """Write an interval, its unit once.

    >>> interval(0.88, 0.94, "auc"), interval(0.88, 0.94, "accuracy")
    ('0.880 to 0.940', '88.0 to 94.0 %')
    """
    if low is None or high is None:
        return "no interval"
    return f"{number(low, name, unit, bare=True)} to {number(high, name, unit)}"


def points(change: float, name: str) -> str:
    """Write a difference of two figures.

    >>> points(0.0412, "accuracy"), points(0.02, "dice")
    ('+4.1 points', '+0.020')
    """
    percent = _PERCENT.search(name)
    text = f"{100 * change:+.1f}" if percent else f"{change:+.3f}"
    if not text.strip("+-0."):
        text = text.replace("-", "±").replace("+", "±")
    return text.replace("-", "−") + (" points" if percent else "")  # noqa: RUF001


def size(num_bytes: float | None) -> str:
    """Write a number of bytes.

    >>> size(246_824), size(12)
    ('247 kB', '12 B')
    """
    if num_bytes is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.3g} {unit}"


def seconds(duration: float | None) -> str:
    """Write a duration.

    >>> seconds(0.0214), seconds(312)
    ('0.021 s', '5.2 min')
    """
    if duration is None:
        return "unknown"
    if duration >= 120:
        return f"{duration / 60:.1f} min"
    return f"{duration:#.2g}".rstrip(".") + " s" if duration < 100 else f"{duration:.0f} s"


def view(kind: str) -> str:
    """Say what a view shows. A kind without words here stays as it is.

    >>> view("ServerView[Masked]")
    'of each client, by name, a masked update; only the sum opens; and what it sent them'
    """
    match = re.fullmatch(r"(\w+)(?:\[(.+)\])?", kind)
    if not match or match[1] not in _VIEWS:
        return kind
    message = match[2] or "the message"
    return _VIEWS[match[1]].format(_MESSAGES.get(message, message))


def spoken(says: str, *, who: str, value: str, interval: str, baseline: str) -> str:
    """Fill a game's sentence; whatever else stands in braces is left alone.

    >>> spoken("At {value} {who} wins.", who="A user", value="9 %", interval="", baseline="")
    'At 9 % a user wins.'
    """
    filled = {"who": who, "value": value, "interval": interval, "baseline": baseline}

    def fill(match: re.Match[str]) -> str:
        text = filled[match[1]]
        within = match[1] == "who" and says[: match.start()].rstrip()[-1:] not in ("", ".", ":")
        return text[:1].lower() + text[1:] if within else text

    text = re.sub(r"\{(who|value|interval|baseline)\}", fill, says)
    return re.sub(r" {2,}", " ", re.sub(r" +([,;.])", r"\1", text))


def listed(names: Sequence[str], most: int = 6) -> str:
    """Join names as people do.

    >>> listed(["a", "b", "c"]), listed(list("abcdefgh"), most=3)
    ('a, b and c', 'a, b, c and 5 more')
    """
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))


def count(number: int, noun: str) -> str:
    """Count things.

    >>> count(1, "seed"), count(0, "attack")
    ('1 seed', '0 attacks')
    """
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"
