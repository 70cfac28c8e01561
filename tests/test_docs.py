"""What the pages say is run: TOML is loaded, code is executed, keys and codes are compared.

Kinds: contract.
"""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from turncoat import parts
from turncoat.cli import Exit
from turncoat.config import _OF_A_TRIAL, _TOP, load, load_all
from turncoat.federation import STAGES
from turncoat.plan import Audit, plan
from turncoat.stage import Aggregate
from turncoat.testing.contracts import attack_checks, stage_checks
from turncoat.trial import Memberships

ROOT = Path(__file__).parents[1]
CONFIG = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "papers/*.md")
    for page in ROOT.glob(pattern)
)

BASE = {
    "task": '[task]\nuse = "digits"\nnum_clients = 8\nmodel = { use = "mlp", hidden = [8] }\n',
    "federation": (
        '[federation]\ntrain = { use = "local-sgd", lr = 0.1 }\nchannel = "plain"\n'
        'aggregate = "mean"\n'
    ),
    "coalition": '[coalition]\nmembers = { use = "clients", ids = [0, 1] }\n',
    "attack": '[attack.loss]\nuse = "loss-threshold"\n',
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def loaded(fragment: str, folder: Path, **more: Any) -> Audit:
    """Return the audit of a file, or of a fragment with what it lacks."""
    given = tomllib.loads(fragment)
    lacking = [text for name, text in BASE.items() if name not in given]
    path = folder / "audit.toml"
    path.write_text("\n".join([fragment, *lacking]), encoding="utf-8")
    shutil.copy(ROOT / "examples" / "own_attack" / "mine.py", folder)
    return next(iter(load_all(path, **more).values()))  # the first variant, where it has some


@pytest.mark.parametrize("fragment", blocks(CONFIG, "toml"), ids=lambda text: text.split("\n")[0])
def test_every_table_on_the_page_of_the_config_can_be_audited(
    fragment: str, tmp_path: Path
) -> None:
    audit = loaded(fragment, tmp_path)
    assert plan(audit).cells
    assert set(tomllib.loads(fragment).get("defences", [])) <= {*audit.federations, "none"}


def test_the_file_in_the_readme_can_be_audited(tmp_path: Path) -> None:
    (whole,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "toml")
    audit = loaded(whole, tmp_path, overrides=["task.use=digits"])  # X-rays may not be at hand
    assert plan(audit).cells


def test_every_key_and_every_short_name_without_a_list_is_on_the_page() -> None:
    names = {*_TOP, *_OF_A_TRIAL, *STAGES}
    for kind in ("partition", "model", "game", "outcome", "trigger", "edge", "members", "schedule"):
        names |= parts.PARTS[kind].keys()
    missing = {n for n in names if not re.search(rf'[`"\[]{re.escape(n)}[`".\]]', CONFIG)}
    assert not missing


def test_every_part_is_named_on_some_page() -> None:
    text = "\n".join((ROOT / p).read_text(encoding="utf-8") for p in PAGES if "papers" not in p)
    names = {name for kind in parts.PARTS.values() for name in kind}
    assert not {n for n in names if not re.search(rf"(?<![\w-]){re.escape(n)}(?![\w-])", text)}


def test_the_exit_codes_on_the_page_are_those_of_the_program() -> None:
    table = CONFIG[CONFIG.index("| exit code |") :]
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)] == [*Exit]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", text):
        there = (ROOT / page).parent / target if target else ROOT / page
        assert there.exists(), target
        if heading:
            said = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
            plain = [re.sub(r"[^\w\s-]", "", one.lower()) for one in said]
            assert heading in [re.sub(r"\s", "-", one) for one in plain], heading


def test_the_example_of_an_own_attack_can_be_planned() -> None:
    audit = load(ROOT / "examples" / "own_attack" / "wine.toml")
    todo = plan(audit)
    assert len(todo.cells) == 24 and not any(cell.settled for cell in todo.cells)
    margin = audit.entries["margin"].trial.attack  # type: ignore[union-attr]
    for _, check in attack_checks(margin, cites=False):
        check()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Yield the modules whose text is on the page of contributors, as if they were installed."""
    made = {}
    for block in blocks(CONTRIBUTING, "python"):
        first, _, text = block.partition("\n")
        if first.startswith("# in "):
            continue
        path = first.removeprefix("# ")
        name = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
        module = ModuleType(name)
        module.__file__ = str(ROOT / path)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(text, path, "exec", dont_inherit=True), vars(module))
        assert len(text.splitlines()) <= 50
        made[path] = module
    yield made


def rows(file: str) -> list[str]:
    """Return the rows that the page adds to a table."""
    head = f"# in {file}\n"
    found = [b.removeprefix(head) for b in blocks(CONTRIBUTING, "python") if b.startswith(head)]
    assert len(found) == 2
    return found


def test_the_attack_and_the_rule_on_the_page_of_contributors_keep_their_contracts(
    written: dict[str, ModuleType],
) -> None:
    named: dict[str, Any] = {}
    for row in rows("src/turncoat/parts.py"):
        named |= eval(f"{{{row}}}", vars(parts))
    made = {n: getattr(sys.modules[t.split(":")[0]], t.split(":")[1]) for n, t in named.items()}
    examples: dict[str, Any] = {}
    for row in rows("tests/test_contracts.py"):
        scope = {c.__name__: c for c in made.values()}
        examples |= eval(f"{{{row}}}", {"cited": lambda part, *refused: (part, refused)} | scope)
    assert made.keys() == examples.keys() == {"top-probability", "cge"}
    attack, refused = examples["top-probability"]
    for _, check in attack_checks(attack, refused=refused):
        check()
    rule, refused = examples["cge"]
    for _, check in stage_checks(rule, Aggregate, refused=refused):
        check()


def test_the_tests_on_the_page_of_contributors_pass(written: dict[str, ModuleType]) -> None:
    tests = [f for n, f in vars(written["tests/test_cge.py"]).items() if n.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_attack_on_the_page_of_contributors_can_be_named_in_a_file(tmp_path: Path) -> None:
    for block in blocks(CONTRIBUTING, "python"):
        first, _, text = block.partition("\n")
        if first.startswith("# src/"):
            (tmp_path / Path(first).name).write_text(text, encoding="utf-8")
    audit = loaded(
        '[attack.top]\nuse = "top_probability.py:TopProbability"\nseats = ["user"]\n'
        '[defence.cge]\naggregate = { use = "cge.py:CGE", num_byzantine = 2 }\n'
        '[defence.masks]\nchannel = "secure-aggregation"\n',
        tmp_path,
    )
    assert list(audit.federations) == ["none", "cge", "masks"] and len(plan(audit).cells) == 3
    assert Memberships in type(audit.entries["top"].trial.attack).__call__.__globals__.values()  # type: ignore[union-attr]
