"""The pages under docs/: each is run from top to bottom on a tiny model, and the site is built without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import PAGES, ROOT, make_reader, run_document

from dataflex.config import MARKS, RunConfig, help_of


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page: Path, checkout: Path, data_dir: Path) -> None:
    make_reader(checkout, data_dir)
    run_document(page, checkout)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A link that leads nowhere, or a page that the navigation leaves out, fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    built = {path.parent.name for path in site.glob("*/index.html")}
    assert {page.stem for page in PAGES} - {"index"} <= built
    assert not list(site.rglob("*.py"))


def test_the_page_of_keys_has_every_key(site: Path) -> None:
    """Once each, with the first words of its help."""
    html = (site / "keys" / "index.html").read_text(encoding="utf-8")
    listed = re.findall(r"<li><strong><code>(\w+)</code></strong>", html)
    assert sorted(listed) == sorted(set(MARKS) - {"training_arguments"})
    text = re.sub(r"<.+?>", "", html)
    for key in set(RunConfig.model_fields) - {"training_arguments"}:
        assert re.split(r"[^\w ,]", help_of(key))[0] in text, key
