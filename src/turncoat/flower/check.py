"""What is void or dangerous in what a Flower app puts together, why, and the cure."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from inspect import isclass
from itertools import chain
from pathlib import Path
from typing import Any

from turncoat.flower.sighting import UNKNOWN, App, Sighted, defines, is_a, is_legacy, sight

_SECAGG = ("secaggplus_mod", "secagg_mod")
_CLIPS = ("fixedclipping_mod", "adaptiveclipping_mod")
_HARMLESS = ("arrays_size_mod", "message_size_mod")

_READS_EACH = (
    *("Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg", "QFedAvg"),
    *("DifferentialPrivacyServerSideFixedClipping", "RobustLegacy", "Robust", "DPFedAvgLegacy"),
    "DifferentialPrivacyServerSideAdaptiveClipping",
)
_IGNORES_CLAIMS = (
    *("Krum", "Bulyan", "FedMedian", "FedTrimmedAvg", "QFedAvg"),
    *("Robust", "RobustLegacy", "DPFedAvg", "DPFedAvgLegacy"),
)
_FLOWERS_DP = (
    "DifferentialPrivacyServerSideFixedClipping",
    "DifferentialPrivacyServerSideAdaptiveClipping",
    "DifferentialPrivacyClientSideFixedClipping",
    "DifferentialPrivacyClientSideAdaptiveClipping",
)
_OUR_DP = ("DPFedAvg", "DPFedAvgLegacy")
_LOOPBACK = ("127.", "localhost", "[::1]", "::1")


class Severity(StrEnum):
    """How bad it is; in this order in a list of findings."""

    VOID = "void"  # a protection is named, and is not there
    DANGER = "danger"
    NOTE = "note"
    UNKNOWN = "unknown"  # it could not be determined


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about an app: the fact, the reason that it matters, and what to do."""

    severity: Severity
    what: str
    why: str
    cure: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.what} {self.why} {self.cure}"


def check(
    server_app: Any,
    client_app: Any,
    *,
    strategy: Any = None,
    num_nodes: int | None = None,
    model: Any = None,
    connection: Mapping[str, Any] | Path | str | None = None,
) -> list[Finding]:
    """Return what is void or dangerous in an app, worst first. Nothing of the app is run.

    Mods are read off the ClientApp; strategies that functions build, from their source, with the
    arguments that are written there. What could not be determined is a finding too.

    Args:
        strategy: The strategy in use, or several, where the source does not show it.
        num_nodes: How many nodes there are; whether a rule copes depends on it.
        model: A ``torch.nn.Module``, or what makes one, to look for batch normalisation.
        connection: How the SuperLink is reached: a table of Flower's ``config.toml``
            (``[superlink.NAME]``), or the path of such a file, all of whose tables are judged.
    """
    app = sight(server_app, client_app, strategy)
    found = chain(
        _secure_aggregation(app),
        *(_halts(workflow, app, num_nodes) for workflow in app.workflows),
        *(_precondition(each, num_nodes) for s in app.strategies for each in s.chain()),
        *(_noise(s, app) for s in app.strategies),
        _mods(app),
        _batch_norm(app, model),
        *(_claims(s, app) for s in app.strategies),
        *(_distances(each) for s in app.strategies for each in s.chain()),
        _transport(connection),
        _legacy(app),
        _unread(app),
    )
    order = list(Severity)
    return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.severity))


def _secure_aggregation(app: App) -> Iterator[Finding]:
    """SecAgg+ hands the strategy one aggregate in the place of all updates."""
    worn = any(_named(mod) in _SECAGG for mods in app.mods for mod in mods)
    if not worn and not app.workflows:
        return
    for strategy in app.strategies:
        for each in strategy.chain():
            if is_a(each.kind, *_READS_EACH) and _must_read(each):
                yield Finding(
                    Severity.VOID,
                    f"{_named_rule(each)} is void behind SecAgg+.",
                    "Flower's SecAgg+ overwrites every reply with the aggregate before it calls "
                    "the strategy, which must read each node's update: it runs, reports success "
                    "and protects nothing.",
                    "Choose: a robust rule without SecAgg+, or SecAgg+ with a plain mean and "
                    "clipping at the nodes.",
                )
                break
            if not _flowers_own(each):
                yield Finding(
                    Severity.UNKNOWN,
                    f"Whether {each} reads single updates behind SecAgg+ is not known.",
                    "It aggregates in its own way, and every update it is handed is the aggregate.",
                    "Make sure that it needs only the sum.",
                )
                break
    if worn and not app.workflows:
        unread = not app.strategies or bool(app.unread)
        yield Finding(
            Severity.UNKNOWN if unread else Severity.DANGER,
            "The client wears SecAgg+'s mod, and no SecAggPlusWorkflow was found at the server.",
            "The mod fails on every message that does not come from the workflow, and Flower's run "
            "ends with exit code 0 all the same.",
            "Run DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(...)), or take the mod off.",
        )
    if app.workflows and not worn:
        yield Finding(
            Severity.DANGER,
            "The server runs SecAgg+, and the client does not wear its mod.",
            "No node answers the protocol: secure aggregation halts, and Flower's run ends with "
            "exit code 0 all the same.",
            "ClientApp(client_fn=..., mods=[secaggplus_mod]).",
        )
    for mods in app.mods:
        names = [_named(mod) for mod in mods]
        masked = next((i for i, name in enumerate(names) if name in _SECAGG), 0)
        for name in (n for n in names[:masked] if n not in _HARMLESS):
            yield Finding(
                Severity.DANGER,
                f"{name} stands before {names[masked]}, so it acts on masked updates.",
                "The first mod of a list is the last to see a reply: what it clips, or adds noise "
                "to, are then integers modulo 2^32 under a mask.",
                f"Put {names[masked]} first.",
            )


def _halts(workflow: Sighted, app: App, num_nodes: int | None) -> Iterator[Finding]:
    """SecAgg+ gives up where too few nodes are left, and says so in one line of its log."""
    inside = workflow.inner or workflow
    threshold = inside.get("reconstruction_threshold")
    cohorts = [_cohort(strategy, num_nodes) for strategy in app.strategies]
    cohort = min((n for n, is_all in cohorts if is_all and n is not None), default=None)
    if not is_a(workflow.kind, "Watched"):
        yield Finding(
            Severity.DANGER,
            "Nobody is told when SecAgg+ halts.",
            "If too few nodes are left in a round, Flower logs one line and keeps the old model. "
            "Were it so in every round, the run would end with exit code 0 all the same.",
            "turncoat.flower.Watched(SecAggPlusWorkflow(...)), as the fit_workflow, counts it, and "
            "stops the run with its reason.",
        )
    if isinstance(threshold, int) and cohort is not None and threshold > cohort:
        yield Finding(
            Severity.VOID,
            f"SecAgg+ opens a secret with {threshold} shares, and the cohort has {cohort} nodes.",
            "It halts in every round.",
            "Lower reconstruction_threshold, or ask more nodes.",
        )
    elif isinstance(threshold, float) and threshold == 1:
        yield Finding(
            Severity.NOTE,
            "SecAgg+ needs every share to open a secret.",
            "One node that goes away halts the round for all.",
            "Set reconstruction_threshold below 1.",
        )


def _precondition(strategy: Sighted, num_nodes: int | None) -> Iterator[Finding]:
    """Flower's robust strategies hide their preconditions by max(1, ...) or skip the round."""
    f = strategy.get("num_malicious_nodes", "num_malicious_clients")
    cohort, is_all = _cohort(strategy, num_nodes)
    if is_a(strategy.kind, "Krum", "MultiKrum", "Bulyan"):
        if f is UNKNOWN:
            yield _not_known(strategy, "num_malicious_nodes", "how many forgers it withstands")
            return
        if f == 0:
            yield Finding(
                Severity.VOID,
                f"{strategy} is told that 0 nodes are malicious.",
                "It then selects as if every node were honest; that is Flower's default.",
                "Set num_malicious_nodes to how many you want to withstand.",
            )
            return
        a, formula = (4, "4f + 3") if is_a(strategy.kind, "Bulyan") else (2, "2f + 3")
        hides = (
            "Flower then skips the aggregation, and the run goes on with the old model."
            if a == 4
            else "Flower then counts max(1, n - f - 2) neighbours: forgers can be their own."
        )
        yield from _too_few(strategy, cohort, is_all, a * f + 3, formula, f, hides)
        kept = strategy.get("num_nodes_to_select", "num_clients_to_keep")
        many = isinstance(kept, int) and cohort is not None and kept > cohort - f
        if many and not is_a(strategy.kind, "Bulyan"):
            yield Finding(
                Severity.VOID,
                f"{strategy} selects {kept} of {cohort}, of which {cohort - f} are honest.",
                "What it selects must contain forged updates.",
                f"Select at most n - f = {cohort - f}.",
            )
    if is_a(strategy.kind, "FedTrimmedAvg"):
        beta = strategy.get("beta")
        if beta is UNKNOWN or cohort is None:
            yield _not_known(strategy, "beta or the number of nodes", "how many it trims")
        elif int(beta * cohort) == 0:
            yield Finding(
                Severity.VOID,
                f"{strategy} with beta = {beta} trims int({beta} * {cohort}) = 0 of {cohort}.",
                "It is then the plain mean of all updates.",
                f"Set beta to at least {1 / cohort:.3g}, or ask more nodes.",
            )
    if is_a(strategy.kind, "Robust", "RobustLegacy"):
        yield from _rule(strategy, cohort)


def _rule(strategy: Sighted, cohort: int | None) -> Iterator[Finding]:
    from turncoat.flower.robust import cohort_fault

    rule = strategy.get("rule")
    if rule is UNKNOWN or cohort is None:
        yield _not_known(strategy, "its rule or the number of nodes", "whether the rule copes")
    elif fault := cohort_fault(rule, cohort):
        yield Finding(
            Severity.DANGER,
            f"{strategy} cannot work in this cohort.",
            f"{fault[0].upper()}{fault[1:]}.",
            "The run will stop at its first round until this is put right.",
        )


def _too_few(
    strategy: Sighted,
    cohort: int | None,
    is_all: bool,
    needed: int,
    formula: str,
    f: int,
    hides: str,
) -> Iterator[Finding]:
    cure = "Lower num_malicious_nodes, or ask more nodes (min_train_nodes, min_fit_clients)."
    if cohort is None:
        yield _not_known(strategy, "the number of nodes", f"whether there are {needed}")
    elif cohort < needed and is_all:
        yield Finding(
            Severity.VOID,
            f"{strategy} needs {needed} nodes ({formula}, f = {f}), and the cohort has {cohort}.",
            hides,
            cure,
        )
    elif cohort < needed:
        yield Finding(
            Severity.UNKNOWN,
            f"{strategy} needs {needed} nodes ({formula}, f = {f}), and is content with {cohort}.",
            f"How many nodes there are is not known here. {hides}",
            cure,
        )


def _noise(strategy: Sighted, app: App) -> Iterator[Finding]:
    """What Flower's DP wrappers, and ours, need to hold."""
    if is_a(strategy.kind, *_OUR_DP):
        for name, why in (
            ("keeps_metrics", "Training metrics leave the server without noise."),
            ("seed", "Who knows the seed can draw the noise again and subtract it."),
        ):
            seed = strategy.get(name, f"_is_{name}ed")
            if seed is not UNKNOWN and seed is not None and seed is not False:
                yield Finding(
                    Severity.VOID, f"{strategy} with {name} has no guarantee.", why, f"Drop {name}."
                )
    if not is_a(strategy.kind, *_FLOWERS_DP):
        return
    if strategy.get("noise_multiplier") == 0:
        yield Finding(
            Severity.VOID,
            f"{strategy} adds no noise.",
            "Its noise_multiplier is 0: updates are clipped, and nothing is private.",
            "Set a noise multiplier, and state the epsilon that it gives.",
        )
    if "Adaptive" in strategy.kind.__name__:
        yield Finding(
            Severity.DANGER,
            f"{strategy} moves its clipping norm the wrong way.",
            "The formula of Andrew et al. takes the fraction of updates below the norm; Flower "
            "feeds it the fraction above. From below the quantile the norm runs to 0, and the "
            "model stops; from above it grows without bound, and so does the noise.",
            f"Use turncoat.flower.{_ours('DPFedAvg', strategy)}(strategy, Adaptive(...)), or a "
            "fixed norm.",
        )
    if inner := strategy.inner:
        averages = is_a(defines(inner.kind, "aggregate_train", "aggregate_fit"), "FedAvg")
        optimises = is_a(inner.kind, "FedOpt", "FedAvgM")
        own = not (averages or optimises) or is_a(inner.kind, *_IGNORES_CLAIMS, "MultiKrum")
        if own:
            yield Finding(
                Severity.DANGER,
                f"{strategy} around {inner}: its noise has no proof.",
                "The noise is calibrated to a mean of clipped updates, which one node can move by "
                "C / n. What this strategy gives instead can move further.",
                "Put a plain mean (FedAvg) inside.",
            )
        elif strategy.get("accountant") in (None, UNKNOWN):
            yield Finding(
                Severity.DANGER,
                f"{strategy} adds noise for equal weights, and {inner} weighs by num-examples.",
                "One node can move the mean by C times its share, which it claims itself: the "
                "noise, calibrated to C / n, is too small by up to a factor n.",
                "Send the same num-examples from all nodes and reject others, or use "
                f"turncoat.flower.{_ours('DPFedAvg', strategy)}, which counts all alike.",
            )
    if "ClientSide" in strategy.kind.__name__:
        mod = "adaptiveclipping_mod" if "Adaptive" in strategy.kind.__name__ else _CLIPS[0]
        if not any(_named(m) == mod for mods in app.mods for m in mods):
            yield Finding(
                Severity.VOID,
                f"{strategy} relies on {mod}, which the client does not wear.",
                "Nothing bounds an update, and the noise is calibrated to a bound.",
                f"ClientApp(mods=[{mod}]), or clip at the server.",
            )
        else:
            yield Finding(
                Severity.NOTE,
                f"{strategy} trusts each node to clip its own update.",
                "A node that leaves the mod off is not noticed, and is bound by nothing.",
                "Clip at the server if nodes may be dishonest.",
            )


def _mods(app: App) -> Iterator[Finding]:
    """The first mod of a list is the last to see a reply."""
    for mods in app.mods:
        names = [_named(mod) for mod in mods]
        noisy = [i for i, name in enumerate(names) if name == "LocalDpMod"]
        clips = [i for i, name in enumerate(names) if name in _CLIPS]
        if any(c < n for c in clips for n in noisy):
            yield Finding(
                Severity.DANGER,
                f"{names[clips[0]]} clips after LocalDpMod has added its noise.",
                "The first mod of a list is the last to see a reply. What it shortens is then "
                "mostly noise, and the update is shortened with it; what the server takes for a "
                "bound on the update is none.",
                "Put LocalDpMod first: it clips by itself, before it adds noise.",
            )
        for i in clips:
            after = [n for n in names[:i] if n not in (*_SECAGG, *_HARMLESS, *_CLIPS, "LocalDpMod")]
            if after:
                yield Finding(
                    Severity.UNKNOWN,
                    f"{after[0]} acts after {names[i]} has clipped.",
                    "If it changes the arrays, they need no longer be within the norm.",
                    f"Put {names[i]} first, unless {after[0]} leaves the arrays alone.",
                )
        for mod in (mods[i] for i in noisy):
            yield from _local_noise(mod)
        for mod in mods:
            if type(mod).__module__.startswith("turncoat.flower.mods"):
                yield Finding(
                    Severity.NOTE,
                    f"The client wears an attack: {mod!r}.",
                    "Nodes with these partition ids lie.",
                    "Take it off before anything that counts.",
                )


def _local_noise(mod: Any) -> Iterator[Finding]:
    norm, sensitivity = mod.clipping_norm, mod.sensitivity
    if sensitivity < norm:
        yield Finding(
            Severity.VOID,
            f"LocalDpMod clips to {norm}, and its noise is for a sensitivity of {sensitivity}.",
            "One update can move further than the noise is calibrated to; two can be 2 C apart.",
            f"Set sensitivity to 2 * clipping_norm = {2 * norm}.",
        )
    elif sensitivity < 2 * norm:
        yield Finding(
            Severity.NOTE,
            f"LocalDpMod's noise is for a sensitivity of {sensitivity}; its updates are up to "
            f"{2 * norm} apart.",
            "Its epsilon holds for a node's update against none at all, not against another.",
            f"Set sensitivity to 2 * clipping_norm = {2 * norm} for local DP.",
        )
    if mod.epsilon > 1:
        yield Finding(
            Severity.DANGER,
            f"LocalDpMod states epsilon = {mod.epsilon}.",
            "Its formula, sqrt(2 ln(1.25 / delta)) / epsilon, is proven for epsilon below 1 only; "
            "and it is the cost of one round, of which each costs as much again.",
            "Calibrate with an accountant over all rounds (dp-accounting).",
        )


def _batch_norm(app: App, model: Any) -> Iterator[Finding]:
    """Statistics over a batch tie examples to each other, and are no gradients."""
    noisy = [e for s in app.strategies for e in s.chain() if is_a(e.kind, *_FLOWERS_DP, *_OUR_DP)]
    worn = [m for mods in app.mods for m in mods if _named(m) == "LocalDpMod"]
    if not noisy and not worn:
        return
    who = str(noisy[0]) if noisy else "LocalDpMod"
    why = (
        "Running means and variances are clipped with the weights, take up the norm's budget, and "
        "get noise: a variance can come out below 0, and the model then gives NaN. Under "
        "example-level DP it breaks the proof, for each example changes the others' outputs."
    )
    cure = "Replace it by GroupNorm, or keep its statistics at the nodes."
    if model is not None:
        from torch.nn.modules.batchnorm import _BatchNorm

        module = model() if isclass(model) or not hasattr(model, "modules") else model
        found = any(isinstance(part, _BatchNorm) for part in module.modules())
        where = [type(module).__name__] if found else []
    else:
        where = [name for name, source in app.modules.items() if "BatchNorm" in source]
    for name in where:
        yield Finding(
            Severity.DANGER, f"{name} has batch normalisation, and {who} clips it.", why, cure
        )
    if model is None and not app.modules:
        yield Finding(
            Severity.UNKNOWN,
            f"Whether the model that {who} clips has batch normalisation is not known.",
            why,
            "Give check the model; and if it has: " + cure[0].lower() + cure[1:],
        )


def _claims(strategy: Sighted, app: App) -> Iterator[Finding]:
    """FedAvg and what is built on it weigh a node by what it says of itself."""
    if is_a(strategy.kind, *_FLOWERS_DP, *_IGNORES_CLAIMS):
        return
    if not _flowers_own(strategy) or not is_a(strategy.kind, "FedAvg"):
        yield Finding(
            Severity.UNKNOWN,
            f"{strategy} aggregates in a way of its own, which is not judged here.",
            "Whether it weighs by what nodes claim, or survives a forged update, is not known.",
            "Run the audit: it plays forgers against it.",
        )
        return
    capped = " (SecAgg+ has a max_weight, which only honest nodes keep to)" if app.workflows else ""
    yield Finding(
        Severity.DANGER,
        f"{strategy} weighs each update by num-examples as its node claims it, without limit"
        f"{capped}.",
        "One node that claims 10^12 examples replaces the model by its own, in one round.",
        "Under masks no server can tell: choose between SecAgg+ and a rule that caps claims."
        if app.workflows
        else f"turncoat.flower.{_ours('Robust', strategy)}(rule, strategy) caps claims, and robust "
        "rules ignore them.",
    )


def _distances(strategy: Sighted) -> Iterator[Finding]:
    if not is_legacy(strategy.kind) and is_a(strategy.kind, "MultiKrum", "Krum", "Bulyan"):
        yield Finding(
            Severity.DANGER,
            f"{strategy} takes distances between whole models in float32, as |x|^2 + |y|^2 - 2xy.",
            "Where updates are small beside the weights, rounding is larger than the distances: "
            "with updates 5000 times smaller it can keep forgers that are plainly furthest out.",
            "turncoat.flower.Robust(MultiKrum(f), FedAvg()) subtracts first, in float64.",
        )


def _transport(connection: Mapping[str, Any] | Path | str | None) -> Iterator[Finding]:
    cure = "Start the SuperLink with --ssl-* and give root-certificates."
    if connection is None:
        yield Finding(
            Severity.UNKNOWN,
            "Whether nodes and server talk over TLS is not known.",
            "It is no part of the app. Without it, whoever is on the wire reads and rewrites "
            "every update.",
            f"{cure} turncoat.flower.check(..., connection=...) judges Flower's config.toml.",
        )
        return
    for name, table in remote_tables(connection):
        address = str(table.get("address", ""))
        if table.get("insecure") or not table.get("root-certificates"):
            near = address.startswith(_LOOPBACK)
            insecure = bool(table.get("insecure"))
            fact = "says insecure = true" if insecure else "has no root-certificates"
            yield Finding(
                Severity.NOTE if near else Severity.DANGER if insecure else Severity.NOTE,
                f"The connection {name} ({address or 'no address'}) {fact}.",
                "It stays on this machine: harmless, as long as it does."
                if near
                else "Whoever is on the wire reads and rewrites every update, and can be a node."
                if insecure
                else "The server is then trusted if any public authority vouches for it.",
                cure,
            )


def remote_tables(
    connection: Mapping[str, Any] | Path | str,
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the connections by name, but for simulations, in which nothing travels."""
    for name, table in _tables(connection):
        address = str(table.get("address", ""))
        if not address.startswith(":") and (address or "options" not in table):
            yield name, table


def _tables(connection: Mapping[str, Any] | Path | str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(connection, Mapping):
        yield str(connection.get("name", "given")), connection
        return
    path = Path(connection)
    whole = tomllib.loads(path.read_text(encoding="utf-8"))
    flwr = whole.get("tool", {}).get("flwr", {})
    for tables in (whole.get("superlink", {}), flwr.get("federations", {})):
        for name, table in tables.items():
            if isinstance(table, Mapping):
                yield name, table


def _legacy(app: App) -> Iterator[Finding]:
    old = [str(s) for s in app.strategies if is_legacy(s.kind)]
    parts = ["client_fn"] * app.has_client_fn + ([f"the strategy {old[0]}"] if old else [])
    if parts:
        yield Finding(
            Severity.NOTE,
            f"The app is on Flower's legacy path ({' and '.join(parts)}).",
            "Flower develops the Message API; SecAgg+ exists on the legacy path only.",
            "Move to @app.train() and flwr.serverapp.strategy, unless you need SecAgg+.",
        )


def _unread(app: App) -> Iterator[Finding]:
    if not app.strategies:
        yield Finding(
            Severity.UNKNOWN,
            "No strategy was found in the ServerApp.",
            "It is built where the source does not show it, so nothing is known of aggregation.",
            "Give check the strategy.",
        )
    for name in app.unread:
        yield Finding(
            Severity.UNKNOWN,
            f"The source of {name} cannot be read.",
            "What it builds is not known.",
            "Give check the strategy.",
        )


def _cohort(strategy: Sighted, num_nodes: int | None) -> tuple[int | None, bool]:
    """Return how many nodes are asked in a round, and whether that is all that can be said."""
    least = strategy.get("min_train_nodes", "min_fit_clients")
    share = strategy.get("fraction_train", "fraction_fit")
    if strategy.inner is not None and least is UNKNOWN:
        return _cohort(strategy.inner, num_nodes)
    if num_nodes is None:
        return (least, False) if isinstance(least, int) else (None, False)
    if share is UNKNOWN:
        return num_nodes, False
    asked = max(int(num_nodes * share), least if isinstance(least, int) else 0)
    return min(asked, num_nodes), True


def _must_read(strategy: Sighted) -> bool:
    rule = strategy.get("rule") if is_a(strategy.kind, "Robust", "RobustLegacy") else None
    if rule is None or rule is UNKNOWN:
        return True
    from turncoat.messages import Clear
    from turncoat.stage import takes

    return any(isclass(needed) and issubclass(needed, Clear) for needed in takes(rule))


def _flowers_own(strategy: Sighted) -> bool:
    """Say whether how it aggregates is Flower's, or ours, rather than the app's."""
    owner = defines(strategy.kind, "aggregate_train", "aggregate_fit")
    return owner.__module__.split(".")[0] in ("flwr", "turncoat")


def _ours(name: str, strategy: Sighted) -> str:
    return f"{name}Legacy" if is_legacy(strategy.kind) else name


def _named_rule(strategy: Sighted) -> str:
    rule = strategy.get("rule")
    return str(strategy) if rule is UNKNOWN else f"{strategy}({rule!r}, ...)"


def _named(mod: Any) -> str:
    return str(getattr(mod, "__name__", type(mod).__name__))


def _not_known(strategy: Sighted, what: str, whether: str) -> Finding:
    place = f" of {strategy.where}" if strategy.where else ""
    return Finding(
        Severity.UNKNOWN,
        f"{strategy}{place}: {what} could not be determined.",
        f"So it is not known {whether}.",
        "Give check the strategy and num_nodes.",
    )
