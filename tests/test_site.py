"""The pages as a site: all are in it, their links lead somewhere, and it builds without a warning (slow)."""

import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What links to headings of a page are called, as GitHub and MyST make them."""
    plain = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#{1,6} (.*)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """The targets of a page's links and pictures that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?://[\w.-]+\.\w+(/|$)", target):
            continue  # other people's pages come and go
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (heading and heading not in anchors(file)):
            broken.append(target)
    return broken


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# It's `b`, a page\n")
    page = tmp_path / "a.md"
    page.write_text(
        "## Here\n[x](b.md) [x](b.md#its-b-a-page) [x](#here) [x](https://a.org/b) `[x](no)`\n```\n[x](no)\n```\n"
    )
    assert broken_links(page) == []
    page.write_text("[x](c.md) ![x](c.png) [x](b.md#gone) [x](#gone) [x](https:/a.org)\n# Here\n```\n# Gone\n```\n")
    assert broken_links(page) == ["c.md", "c.png", "b.md#gone", "#gone", "https:/a.org"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_every_page_of_the_site_is_listed_once():
    lists = re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    entries = [line for text in lists for line in text.splitlines() if line and not line.startswith(":")]
    assert sorted(entries) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_the_api_page_names_what_exists():
    names = re.findall(r"^\.\. auto(?:class|function|exception):: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(names) >= 12
    for name in names:
        module, _, last = name.rpartition(".")
        source = ROOT / f"{module.replace('.', '/')}.py"
        source = source if source.exists() else source.with_suffix("") / "__init__.py"
        assert re.search(rf"^(class|def) {last}\b|^from .* import .*\b{last}\b", source.read_text(), re.MULTILINE), name


@pytest.fixture(scope="module")
def sphinx(tmp_path_factory) -> Path:
    """The Python that `make docs` builds with; made here where it has not run."""
    own = ROOT / ".venv-docs"
    if not (own / ".installed").exists():
        own = tmp_path_factory.mktemp("docs") / "venv"
        venv.create(own, with_pip=True)
        (site,) = own.glob("lib/python3*/site-packages")
        (site / "dfer.pth").write_text(sysconfig.get_path("purelib"))
        words = ["-m", "pip", "install", "--quiet", "-r", str(ROOT / "requirements-docs.txt")]
        subprocess.run([own / "bin" / "python", *words], check=True, timeout=600)
    return own / "bin" / "python"


def build(python: Path, source: Path, target: Path) -> subprocess.CompletedProcess:
    """Build the site as `make docs` does."""
    makefile = (ROOT / "Makefile").read_text()
    (command,) = re.findall(r"^\t\$\(DOCS\)/bin/python (-m sphinx.*) docs build/docs$", makefile, re.MULTILINE)
    words = [str(python), *command.split(), str(source), str(target)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(sphinx, tmp_path):
    done = build(sphinx, DOCS, tmp_path / "site")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "Float64[ndarray, 'N K']" in re.sub("<[^>]+>", "", (tmp_path / "site" / "api.html").read_text())
    for folder in ("dfer", "dali_pipes"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / folder).symlink_to(ROOT / folder)
    source = tmp_path / "copy" / "docs"
    shutil.copytree(DOCS, source)
    with open(source / "python.md", "a") as file:
        file.write("\n[nowhere](gone.md)\n")
    done = build(sphinx, source, tmp_path / "broken")
    assert done.returncode != 0 and "gone.md" in done.stderr
