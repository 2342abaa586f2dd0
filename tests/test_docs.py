"""The pages: links lead somewhere, decisions are complete and listed, README's program runs.

Pure CPU. A page that code names in a docstring or a message has to be there, too.
"""

from __future__ import annotations

import pkgutil
import re
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import xfuser_fastcache as fc

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "toys" / "README.md"]
    + list((ROOT / "docs").rglob("*.md"))
)
DECISIONS = ROOT / "docs" / "decisions"
FOLDERS = (
    "xfuser_fastcache",
    "diffusers_adapters",
    "integrations",
    "scripts",
    "tests",
    "toys",
    "configs",
)
SOURCES = [p for f in FOLDERS for e in ("py", "sh", "yaml") for p in (ROOT / f).rglob(f"*.{e}")]


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return what its headings are called in links."""
    found = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    dead = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_pages_that_code_names_are_there() -> None:
    named = re.compile(r"\bdocs/[\w/-]+\.md\b")
    dead = {
        f"{source.relative_to(ROOT)}: {page}"
        for source in SOURCES
        for page in named.findall(source.read_text(encoding="utf-8"))
        if not (ROOT / page).exists()
    }
    assert not dead


def test_links_of_the_pages_that_commands_write_lead_somewhere() -> None:
    written = [
        (source, page)
        for source in (ROOT / "xfuser_fastcache" / "benchmarks").rglob("*.py")
        for page in re.findall(r"\]\(([\w/-]+\.md)\)", source.read_text(encoding="utf-8"))
    ]
    assert written
    assert [page for _, page in written if not (ROOT / "docs" / page).exists()] == []


def test_every_decision_has_a_decision_a_figure_and_a_consequence() -> None:
    pages = sorted(DECISIONS.glob("*.md"))
    assert len(pages) > 30
    for page in pages:
        if page.name != "README.md":
            headings = re.findall(r"^(#+ .+)$", prose(page), re.MULTILINE)
            assert headings[0].startswith("# "), page.name
            assert headings[1:] == ["## Decision", "## Figure", "## Consequence"], page.name


def test_every_decision_is_listed_once() -> None:
    listed = re.findall(r"^\|.+\| \[.+\]\((.+)\) \|$", prose(DECISIONS / "README.md"), re.MULTILINE)
    assert sorted(listed) == sorted(p.name for p in DECISIONS.glob("*.md") if p.stem != "README")


def test_the_first_screen_of_the_readme_installs_measures_and_runs() -> None:
    screen = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert "pip install" in screen and "times as fast" in screen
    assert len(program(screen).strip().splitlines()) <= 8
    assert len(screen.splitlines()) <= 40


def program(text: str) -> str:
    """Return the first Python program of a page."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


def test_the_readmes_program_prints_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"This prints `([\d.]+)`", text)
    (tmp_path / "program.py").write_text(program(text))
    (tmp_path / "toys").symlink_to(ROOT / "toys")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("program.py")
    assert capsys.readouterr().out.strip() == said
    assert (tmp_path / "ring.png").stat().st_size > 0


def test_the_site_has_every_page_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    docs = ROOT / site["docs_dir"]

    def pages(nav: list[dict[str, Any]]) -> list[str]:
        held = [value for entry in nav for value in entry.values()]
        return [p for value in held for p in (pages(value) if isinstance(value, list) else [value])]

    listed = pages(site["nav"])
    there = {str(p.relative_to(docs)) for p in docs.rglob("*.md")}
    left_out = {page for page in there if page.startswith("decisions/")}
    assert len(set(listed)) == len(listed) and set(listed) <= there
    assert there - set(listed) <= left_out
    assert site["strict"] and listed[0] == "index.md"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert f"/{site['site_dir'].split('/')[0]}/" in ignored


def test_every_name_of_the_api_page_is_there() -> None:
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    exported = set()
    for name in named:
        module, _, attribute = name.rpartition(".")
        found = pkgutil.resolve_name(name)
        exported |= {attribute} if hasattr(import_module(module), attribute) else set()
        assert found is not None
    by_backend = {name for name in fc.__all__ if name.endswith("CacheConfig")} - {"CacheConfig"}
    assert set(fc.__all__) - by_backend <= exported
    assert "xfuser_fastcache.config.by_backend" in named


def test_the_program_of_the_start_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (tmp_path / "program.py").write_text(program(text))
    (tmp_path / "toys").symlink_to(ROOT / "toys")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("program.py")
    assert "64.3%" in capsys.readouterr().out
    assert (tmp_path / "ring.png").stat().st_size > 0
