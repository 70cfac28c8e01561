"""The report: golden (verdicts of a made-up audit), oracle (intervals by SciPy), sabotage (names
that attack the page, folders half written, exhibits that point elsewhere), and the page opened in
Chromium where there is one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from tests.report_fixture import read_json, read_rows, write_audit, write_json, write_rows
from turncoat.report import palette, words
from turncoat.report.cost import costs
from turncoat.report.overview import variants, write_overview
from turncoat.report.page import page, write_report
from turncoat.report.pooled import squares, t_interval, wilson
from turncoat.report.ranking import Rank, ranked
from turncoat.report.record import UnreadableAudit, read
from turncoat.report.verdict import Verdict, still_can, verdicts

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FEW: dict[str, Any] = {
    "defences": ("none", "masks", "krum", "norm-bound"),
    "attacks": ("inverting-gradients", "loss-threshold", "alie", "trace"),
    "num_rounds": 4,
}
SECTIONS = [
    *("verdict", "matrix", "gallery", "roc", "accuracy"),
    *("costs", "partition", "threats", "provenance"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of 8 attacks and 6 defences with 3 seeds, and its report."""
    folder = write_audit(tmp_path_factory.mktemp("whole") / "audit")
    write_report(folder)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_audit(tmp_path / "audit", num_seeds=1, **FEW)


def page_of(folder: Path) -> str:
    return page(folder)[0]


def edit_plan(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plan = read_json(folder / "plan.json")
    change(plan)
    write_json(folder / "plan.json", plan)


def edit_cells(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    rows = [change(row) for row in read_rows(folder / "cells.jsonl")]
    write_rows(folder / "cells.jsonl", [row for row in rows if row])


def seat(folder: Path, name: str) -> Verdict:
    return next(v for v in verdicts(folder) if v.seat == name)


class Tags(HTMLParser):
    """All tags of a page, with their attributes, and whether each is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in ("meta", "link", "img", "br", "line", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "line"):
            assert self.open.pop() == tag


# ---- the page


def test_the_sections_come_in_order_with_the_verdict_first(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS


def test_the_page_is_well_formed_its_ids_are_unique_and_its_links_lead_somewhere(
    whole: Path,
) -> None:
    tags = Tags((whole / "report.html").read_text(encoding="utf-8"))
    assert tags.open == []
    ids = Counter(a["id"] for _, a in tags.found if "id" in a)
    assert max(ids.values()) == 1
    links = [a["href"] for tag, a in tags.found if tag in ("a", "use") and "href" in a]
    links += [a["xlink:href"] for _, a in tags.found if a.get("xlink:href", "").startswith("#")]
    for link in links:
        assert link[1:] in ids if link.startswith("#") else (whole / link).is_file(), link


def test_the_page_asks_nothing_of_the_network(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "@import" not in text
    for tag, attributes in Tags(text).found:
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
            address = attributes.get(name, "")
            assert not re.match(r"(?i)\s*(https?:|//|ftp:)", address), (tag, address)
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "http://" not in without_names
    assert "https://" not in without_names


def test_the_page_is_small_and_can_be_read_without_seeing(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    found = Tags(text).found
    assert all(a.get("alt") for tag, a in found if tag == "img")
    assert all("scope" in a for tag, a in found if tag == "th")
    drawings = [a for tag, a in found if tag == "svg" and a.get("aria-hidden") != "true"]
    assert drawings
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in drawings)
    levels = [int(tag[1]) for tag, _ in found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_figures_follow_light_and_dark(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in text
    drawn = "".join(re.findall(r"<svg xmlns.*?</svg>", text, flags=re.S))
    assert "var(--s0)" in drawn
    assert not re.search(r"(?:fill|stroke): ?#(?!fff)", drawn)


def test_the_same_folder_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {
        "defences": ("none", "krum"),
        "attacks": ("loss-threshold",),
        "num_rounds": 4,
    }
    again = write_audit(tmp_path / "again", num_seeds=1, **few)

    def everything() -> dict[str, bytes]:
        write_report(again)
        made = [again / "report.html", *(again / "figures").iterdir()]
        return {path.name: path.read_bytes() for path in made}

    assert everything() == everything()
    assert page_of(whole) == (whole / "report.html").read_text(encoding="utf-8")


def test_what_users_name_is_shown_and_never_obeyed(small: Path) -> None:
    nasty = "<script>alert(1)</script> $x_{ {{ 7*7 }} & \"'"

    def poison(plan: dict[str, Any]) -> None:
        plan["title"] = plan["command"] = plan["task"]["name"] = nasty
        plan["task"]["client_names"] = [nasty] * 10
        plan["task"]["classes"] = [nasty] * 10
        plan["defences"][1]["title"] = nasty
        plan["attacks"][0]["says"] = "{who.__class__} {0} " + nasty

    edit_plan(small, poison)
    edit_cells(small, lambda c: c | {"reason": c["reason"] and nasty})
    (small / "config.toml").write_text(nasty, encoding="utf-8")
    text = page_of(small)
    assert "<script" not in text
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]
    assert "&lt;script&gt;" in text
    assert Tags(text).open == []


def test_the_config_is_shown_to_the_letter(small: Path) -> None:
    text = 'x = "10 % & <b>"\n'
    (small / "config.toml").write_text(text, encoding="utf-8")
    assert "x = &#34;10 % &amp; &lt;b&gt;&#34;" in page_of(small)


@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_text_can_be_read_on_every_colour(colours: palette.Palette) -> None:
    on_heat = zip(colours.on_heat, colours.heat, strict=True)
    assert all(palette.contrast(text, heat) >= 4.5 for text, heat in on_heat)
    assert palette.contrast(colours.ink, colours.surface) >= 7
    assert palette.contrast(colours.muted, colours.surface) >= 4.5
    assert all(palette.contrast(line, colours.surface) >= 3 for line in colours.series)


# ---- the verdict


def test_each_seat_has_its_strongest_attack_and_what_the_best_defence_leaves(whole: Path) -> None:
    by_seat = {v.seat: v for v in verdicts(whole)}
    assert list(by_seat) == ["server", "coalition", "client", "user", "neighbour"]
    coalition = by_seat["coalition"]
    assert coalition.state == "open"
    assert coalition.strongest is not None
    assert coalition.strongest.attack == "model-replacement"
    assert coalition.strongest.num_seeds == 3
    assert coalition.finding.startswith("A coalition of dishonest clients has 9")
    assert "(95 % interval " in coalition.finding
    assert coalition.defence == "dp-8"
    assert "It costs " in coalition.remedy
    assert "points of accuracy" in coalition.remedy


def test_nothing_beaten_is_called_no_proof_of_safety(small: Path) -> None:
    edit_cells(small, lambda c: c | {"beats_baseline": False})
    found = seat(small, "user")
    assert found.state == "held"
    assert "no attack tried beat its baseline; that is no proof of safety" in found.finding


def test_a_seat_where_all_is_blocked_is_not_called_safe(small: Path) -> None:
    found = seat(small, "neighbour")
    assert found.state == "blocked"
    assert "Blocked is not safe" in found.finding


def test_a_blocked_cell_names_what_the_seat_can_still_do(small: Path) -> None:
    record = read(small)
    said = still_can(record, squares(record), "server", "masks")
    # nobody played it at the server, which sees the released model as its users do
    assert said.startswith("The server can still mount loss-threshold: AUC 0.5")
    assert "Played from the seat of a" in said
    assert said.replace("&", "") in page_of(small).replace("\N{NO-BREAK SPACE}", " ")


def test_a_seat_that_sees_more_is_not_judged_by_one_that_sees_less(small: Path) -> None:
    def only_queries(plan: dict[str, Any]) -> None:
        plan["attacks"][1]["seats"] = ["user"]
        plan["defences"][1]["sees"]["user"] = ["QueryView"]

    edit_plan(small, only_queries)
    edit_cells(small, lambda c: None if c["seat"] == "client" else c)
    record = read(small)
    said = still_can(record, squares(record), "server", "masks")
    assert said.endswith("what it can still do is unknown.")


def test_a_failed_cell_keeps_its_defence_from_being_the_best(small: Path) -> None:
    def krum_is_perfect(cell: dict[str, Any]) -> dict[str, Any]:
        mine = cell["defence"] == "krum" and cell["status"] == "scored"
        return cell | ({"value": cell["baseline"], "beats_baseline": False} if mine else {})

    edit_cells(small, krum_is_perfect)
    assert seat(small, "user").defence == "krum"
    assert seat(small, "coalition").defence == "norm-bound"  # ALIE failed against Krum


def test_of_two_defences_as_good_the_cheaper_is_named(small: Path) -> None:
    def equal(cell: dict[str, Any]) -> dict[str, Any]:
        mine = cell["defence"] != "none" and cell["seat"] == "user" and cell["value"]
        return cell | ({"value": 0.501, "beats_baseline": False} if mine else {})

    edit_cells(small, equal)
    record = read(small)
    quality = {n: c.quality.value for n, c in costs(record).items() if c.quality and n != "none"}
    assert seat(small, "user").defence == max(quality, key=lambda name: quality[name])


def two_attacks(folder: Path, found: Mapping[str, Sequence[tuple[float, bool]]]) -> Path:
    """Write an audit in which the success of ALIE and of a sign flip is made up, by defence.

    Each is the success, and whether it surely is one; the federation as it is loses all to both.
    """
    write_audit(folder, num_seeds=1, defences=("none", *found), attacks=("alie", "sign-flip"))

    def told(cell: dict[str, Any]) -> dict[str, Any]:
        of = found.get(cell["defence"], ((0.9, True), (0.9, True)))
        success, beats = of[("alie", "sign-flip").index(cell["attack"])]
        return cell | {"value": cell["baseline"] * (1 - success), "beats_baseline": beats}

    edit_cells(folder, told)
    return folder


def test_an_attack_that_surely_works_makes_no_defence_look_better(tmp_path: Path) -> None:
    """What may be chance counts, too: two defences that leave it are told apart by the rest."""
    chance = (0.3, False)
    found = two_attacks(
        tmp_path / "audit",
        {"median": ((0.0, False), chance), "clipping": ((0.1, True), chance)},
    )
    coalition = seat(found, "coalition")
    record = read(found)
    assert [round(r.worst.success, 2) for r in ranks_of(found) if r.worst][:2] == [0.3, 0.3]
    quality = {n: c.quality.value for n, c in costs(record).items() if c.quality and n != "none"}
    assert coalition.defence == max(quality, key=lambda name: quality[name]) == "clipping"
    assert "median is about as good, and no more accurate." in coalition.remedy
    assert "still beats its baseline: alie" in coalition.remedy
    assert "sign-flip went further, but that may be chance: accuracy" in coalition.remedy


def test_the_table_and_the_verdict_name_the_same_defence_first(tmp_path: Path) -> None:
    """A defence under which more may be chance is not the better for it: 0.22 is behind 0.14."""
    found = two_attacks(
        tmp_path / "audit",
        {"clipping": ((0.13, True), (0.22, False)), "median": ((0.14, True), (0.0, False))},
    )
    assert seat(found, "coalition").defence == "median"
    assert [r.defence for r in ranks_of(found)] == ["median", "clipping", "none"]


def test_a_difference_within_what_counts_as_equal_is_not_noticeable(tmp_path: Path) -> None:
    nearly = {"median": ((0.89, True), (0.89, True))}
    assert seat(two_attacks(tmp_path / "nearly", nearly), "coalition").defence is None
    stopped = {"median": ((0.89, False), (0.89, False))}
    assert seat(two_attacks(tmp_path / "stopped", stopped), "coalition").defence == "median"
    half = {"median": ((0.8, True), (0.5, True))}
    assert seat(two_attacks(tmp_path / "half", half), "coalition").defence == "median"


def test_a_defence_that_ruins_the_model_is_not_the_best(small: Path) -> None:
    def perfect(cell: dict[str, Any]) -> dict[str, Any]:
        mine = cell["defence"] == "krum" and cell["seat"] == "user" and cell["value"]
        return cell | ({"value": 0.5, "beats_baseline": False} if mine else {})

    edit_cells(small, perfect)
    assert seat(small, "user").defence == "krum"
    rows = read_rows(small / "trainings.jsonl")
    ruined = [t | {"history": [0.11]} if t["defence"] == "krum" else t for t in rows]
    write_rows(small / "trainings.jsonl", ruined)
    found = seat(small, "user")
    assert found.defence == "norm-bound"
    assert "Less is left under krum, but the model is ruined there." in found.remedy
    assert [r.defence for r in ranks_of(small) if r.ruined] == ["krum"]
    assert "ruins the model" in page_of(small)


def test_a_defence_that_opens_a_seat_is_told(small: Path) -> None:
    def opened(cell: dict[str, Any]) -> dict[str, Any]:
        if cell["seat"] != "user":
            return cell
        return cell | {"beats_baseline": cell["defence"] == "krum", "value": 0.6}

    edit_cells(small, opened)
    assert "But under krum, loss-threshold beats its baseline" in str(seat(small, "user"))


def test_the_verdict_is_printed_without_drawing_anything(small: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from turncoat.report.verdict import verdicts; "
        f"verdicts(Path({str(small)!r})); print([m for m in ('matplotlib', 'torch', 'jinja2') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- figures


def test_what_was_not_measured_is_said_once_for_all_attacks(small: Path) -> None:
    def remarked(cell: dict[str, Any]) -> dict[str, Any]:
        told = cell["family"] == "membership" and cell["status"] == "scored"
        return cell | ({"remarks": ["no TPR at <0.1> %"]} if told else {})

    assert "Not measured" not in page_of(small)
    edit_cells(small, remarked)
    page = page_of(small)
    assert page.count("Not measured, of ") == page.count(": no TPR at &lt;0.1&gt; %.") == 1


def test_intervals_equal_those_of_scipy() -> None:
    values = [0.91, 0.95, 0.97, 0.9]
    theirs = stats.t.interval(0.95, 3, stats.tmean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(theirs)
    exact = stats.binomtest(93, 100).proportion_ci(method="wilson")
    assert wilson(0.93, 100) == pytest.approx((exact.low, exact.high))


def test_seeds_are_pooled_and_compared_seed_by_seed(small: Path) -> None:
    template = next(c for c in read_rows(small / "cells.jsonl") if c["seat"] == "user")

    def pooled(*pairs: tuple[float, float]) -> Any:
        rows = [
            template | {"seed": i, "value": v, "baseline": b, "low": v - 0.01, "high": v + 0.01}
            for i, (v, b) in enumerate(pairs)
        ]
        write_rows(small / "cells.jsonl", rows)
        edit_plan(small, lambda plan: plan.update(seeds=list(range(len(pairs)))))
        return squares(read(small))["loss-threshold", "user", "none"]

    apart = pooled((0.6, 0.5), (0.8, 0.7), (0.7, 0.61))  # values vary, gains hardly do
    assert apart.headline.value == pytest.approx(0.7)
    assert apart.headline.low < apart.headline.baseline < apart.headline.high
    assert apart.beats
    assert not pooled((0.6, 0.5), (0.5, 0.6)).beats
    agreed = pooled((0.6, 0.5), (0.6, 0.5))  # no spread is no certainty
    assert (agreed.headline.low, agreed.headline.high) == pytest.approx((0.59, 0.61))


def test_half_of_the_seeds_are_said_to_be_half(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    shutil.copytree(whole, folder)
    edit_cells(
        folder,
        lambda c: (
            c | {"status": "failed", "error": "out of luck", "value": None}
            if c["seed"] == 1 and c["attack"] == "lira"
            else c
        ),
    )
    text = page_of(folder)
    assert "2 of 3 seeds" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "out of luck" in text


# ---- folders that are not as they should be


def test_a_killed_audit_reports_what_there_is_and_what_is_missing(small: Path) -> None:
    lines = (small / "cells.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (small / "cells.jsonl").write_text("".join(lines[:7]) + lines[7][:40], encoding="utf-8")
    text = page_of(small)
    # 4 defences x 5 rows; of 7 cells left all are of the first two defences
    assert "13 cells of 20 are missing" in text
    assert "not run" in text


@pytest.mark.parametrize("name", ["plan.json", "cells.jsonl", "trainings.jsonl"])
def test_a_missing_file_is_named_with_its_cure(small: Path, name: str) -> None:
    (small / name).unlink()
    with pytest.raises(UnreadableAudit, match=rf"{name}.*`turncoat (audit|report)"):
        write_report(small)


def test_a_broken_file_is_named_with_its_cure(small: Path) -> None:
    rows = (small / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    (small / "cells.jsonl").write_text("\n".join([rows[0], "{", rows[1]]), encoding="utf-8")
    with pytest.raises(UnreadableAudit, match=r"cells.jsonl, line 2, is not JSON.*again"):
        read(small)
    edit_plan(small, lambda plan: plan.update(schema_version=99))
    with pytest.raises(UnreadableAudit, match=r"schema_version 99.*use the version that wrote it"):
        read(small)


def test_exhibits_elsewhere_or_broken_are_not_shown_but_told(small: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    shutil.copy(next((small / "cells").glob("*.safetensors")), outside)
    broken = small / "cells" / "broken.safetensors"
    broken.write_bytes(b"\x00" * 4)
    places = iter(["../secret.safetensors", "cells/broken.safetensors", "cells/gone.safetensors"])
    edit_cells(small, lambda c: c | {"exhibits": next(places, None)} if c["exhibits"] else c)
    text = page_of(small)
    for said in ("lies outside the folder", "cannot be read", "gone.safetensors is missing"):
        assert said in text


def _all_failed(folder: Path) -> None:
    edit_cells(folder, lambda c: c | {"status": "failed", "error": "x", "exhibits": None})
    rows = [
        t | {"status": "failed", "error": "boom", "history": [], "metric": None}
        for t in read_rows(folder / "trainings.jsonl")
    ]
    bare = [{k: v for k, v in t.items() if not k.startswith("bytes")} for t in rows]
    write_rows(folder / "trainings.jsonl", bare)


def _long_names(folder: Path) -> None:
    text = (folder / "plan.json").read_text(encoding="utf-8")
    cells = (folder / "cells.jsonl").read_text(encoding="utf-8")
    trainings = (folder / "trainings.jsonl").read_text(encoding="utf-8")
    for name, content in (
        ("plan.json", text),
        ("cells.jsonl", cells),
        ("trainings.jsonl", trainings),
    ):
        longer = content.replace('"krum"', f'"{"krum" * 30}"').replace('"alie"', f'"{"漢" * 60}"')
        (folder / name).write_text(longer, encoding="utf-8")


def _nothing_yet(folder: Path) -> None:
    write_rows(folder / "cells.jsonl", [])
    write_rows(folder / "trainings.jsonl", [])
    (folder / "config.toml").unlink()


def _no_seat(folder: Path) -> None:
    edit_plan(folder, lambda plan: plan["attacks"][3].update(seats=[]))
    edit_cells(folder, lambda c: c | {"seat": None} if c["attack"] == "trace" else c)


def _not_of_classes(folder: Path) -> None:
    nothing: dict[str, Any] = {
        "label_counts": [],
        "classes": [],
        "image_shape": None,
        "metric": "dice",
    }
    edit_plan(folder, lambda plan: plan["task"].update(nothing))


def _many_attacks(folder: Path) -> None:
    cells = read_rows(folder / "cells.jsonl")

    def more(plan: dict[str, Any]) -> None:
        template = plan["attacks"][1]
        plan["attacks"] += [template | {"name": f"threshold-{i}"} for i in range(30)]

    edit_plan(folder, more)
    mine = [c for c in cells if c["attack"] == "loss-threshold" and c["seat"] == "user"]
    copies = [
        c | {"attack": f"threshold-{i}", "exhibits": None, "key": f"{i}"}
        for c in mine
        for i in range(30)
    ]
    write_rows(folder / "cells.jsonl", cells + copies)


@pytest.mark.parametrize(
    ("makes", "change"),
    [
        ({"defences": ("none",)}, None),
        ({"images": False}, None),
        ({"num_clients": 1000}, None),
        ({"attacks": ("trace",)}, None),
        ({}, _all_failed),
        ({}, _long_names),
        ({}, _nothing_yet),
        ({}, _no_seat),
        ({}, _not_of_classes),
        ({}, _many_attacks),
        ({"num_rounds": 1}, None),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_any_audit_has_a_report(
    tmp_path: Path, makes: dict[str, Any], change: Callable[[Path], None] | None
) -> None:
    folder = write_audit(tmp_path / "audit", num_seeds=1, **{**FEW, **makes})
    if change is not None:
        change(folder)
    text = page_of(folder)
    assert Tags(text).open == []
    assert [str(v) for v in verdicts(folder)]
    assert len(text.encode()) < 1_000_000


def test_words_of_metrics_that_the_games_use() -> None:
    assert words.metric("tpr_at_1pct_fpr") == "TPR at 1 % FPR"
    assert words.number(-0.00001, "accuracy") == "0.0 %"
    assert words.number(float("nan"), "auc") == "unknown"


# ---- in a browser


def chromium(tmp_path: Path, page: Path, *flags: str) -> tuple[str, str, list[str]]:
    """Open a page; return its DOM, the console, and what was asked of the network."""
    log = tmp_path / "net.json"
    quiet = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --disable-extensions"
    )
    quiet += " --disable-background-networking --disable-component-update --disable-default-apps"
    done = subprocess.run(
        [CHROMIUM, *quiet.split(), f"--user-data-dir={tmp_path / 'user'}", f"--log-net-log={log}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", *flags,
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    text = log.read_text(encoding="utf-8", errors="replace")
    wanted = re.findall(r'"url":"((?:https?|wss?|ftp):[^"]+)"', text)
    return done.stdout, console, wanted


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine to open the page with")
def test_a_browser_opens_the_page_without_an_error_or_a_request(
    whole: Path, tmp_path: Path
) -> None:
    dom, console, wanted = chromium(tmp_path, whole / "report.html")
    assert "What a dishonest party can do" in dom
    assert console == ""
    own = ("google.com", "gstatic.com", "googleapis.com")  # of the browser itself, if any
    assert [url for url in wanted if not any(host in url for host in own)] == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine to open the page with")
def test_the_page_fits_a_phone(whole: Path, tmp_path: Path) -> None:
    page = json.dumps((whole / "report.html").read_text(encoding="utf-8")).replace("</", "<\\/")
    frame = tmp_path / "phone.html"
    frame.write_text(
        '<meta charset="utf-8"><iframe width="400" height="800"></iframe><p></p><script>'
        f"const f = document.querySelector('iframe'); f.srcdoc = {page};"
        "f.onload = () => document.querySelector('p').textContent = 'width ' +"
        "f.contentDocument.documentElement.scrollWidth</script>",
        encoding="utf-8",
    )
    dom, _, _ = chromium(tmp_path, frame, "--virtual-time-budget=3000")
    width = re.search(r"width (\d+)", dom)
    assert width is not None
    assert int(width[1]) <= 400


def test_a_person_can_judge_what_a_reconstruction_is_worth(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    gallery = text[text.index('<section id="gallery">') : text.index('<section id="roc">')]
    captions = re.findall(r"<figcaption>([^<]*)</figcaption>", gallery)
    assert captions and all(re.fullmatch(r"-?\d+\.\d\sdB( ●)?", c) for c in captions)
    assert any("●" in c for c in captions) and not all("●" in c for c in captions)
    for said in ("mean image", "priors alone", "The strangers that these are likest to"):
        assert said in gallery
    strangers = gallery.count("a public image of the class, likest to")
    assert strangers == len(captions)


def test_the_gallery_explains_what_it_shows_and_shows_a_trigger_once(
    whole: Path, tmp_path: Path
) -> None:
    rebuilt, planted = "The same records before and after", "Inputs with the trigger"
    assert rebuilt in page_of(whole) and planted in page_of(whole)
    folder = write_audit(
        tmp_path / "audit", num_seeds=1, defences=("none",), attacks=("model-replacement",)
    )
    rows = read_rows(folder / "cells.jsonl")
    write_rows(folder / "cells.jsonl", rows + [row | {"attack": "pgd"} for row in rows])
    edit_plan(folder, lambda p: p["attacks"].append(p["attacks"][0] | {"name": "pgd"}))
    text = page_of(folder)
    assert planted in text and rebuilt not in text
    assert text.count('class="hall"') == 1
    assert "model-replacement and pgd <span>" in text


def test_defences_are_ranked_by_the_worst_that_is_left(whole: Path) -> None:
    record = read(whole)
    matrix, prices = squares(record), costs(record)
    ranks = ranked(record, matrix, prices, "coalition")
    left = [r.worst.success for r in ranks if r.worst is not None and not r.unknown]
    assert sorted(left) == pytest.approx(left, abs=0.01)
    for rank in ranks:
        others = [s.success for s in matrix.values() if s.seat == "coalition"]
        assert rank.worst is None or rank.worst.success in others
    none = next(r for r in ranks if r.defence == "none")
    assert none.worst is not None
    assert none.worst.attack == "model-replacement"
    assert "Defences by the worst that is left" in page_of(whole)


def test_a_defence_that_is_not_known_ranks_last(small: Path) -> None:
    best = ranked_names(small)[0]
    edit_cells(
        small, lambda c: {**c, "status": "failed", "error": "x"} if c["defence"] == best else c
    )
    names = ranked_names(small)
    assert names.index("none") < names.index(best)


def ranked_names(folder: Path) -> list[str]:
    return [rank.defence for rank in ranks_of(folder)]


def ranks_of(folder: Path) -> list[Rank]:
    record = read(folder)
    return ranked(record, squares(record), costs(record), "coalition")


def test_variants_stand_side_by_side_in_the_order_of_the_file(tmp_path: Path) -> None:
    for name in ("iid", "dirichlet"):
        write_audit(tmp_path / name, num_seeds=1, **FEW)
        config = tmp_path / name / "config.toml"
        config.write_text("[variant.iid]\n[variant.dirichlet]\n" + config.read_text())
    assert [f.name for f in variants(tmp_path)] == ["iid", "dirichlet"]
    text = write_overview(tmp_path).read_text(encoding="utf-8")
    assert text.index("iid/report.html") < text.index("dirichlet/report.html")
    assert text.count("Defences by the worst that is left in any variant") > 1
    assert "<script" not in text


def test_a_folder_without_variants_has_no_overview(small: Path, tmp_path: Path) -> None:
    assert variants(small) == []
    with pytest.raises(UnreadableAudit, match="no variant of an audit"):
        write_overview(tmp_path / "nowhere")
