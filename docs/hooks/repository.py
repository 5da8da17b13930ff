"""Pages link to files outside docs/ (../README.md, ../benchmarks/results/x.json): right in the repository, dead on a site made of docs/ alone.

So what is linked there becomes part of the site, under repository/: Markdown as a page, source as a page that shows it, everything else as it is. Such pages are
in no menu, and not searched.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")  # no address with a scheme, no anchor alone
FENCE = re.compile(r"(^ *```.*?^ *``` *$)", re.S | re.M)
TIGHT_LIST = re.compile(r"^([^\s-].*)\n(- )", re.M)  # a list right under its paragraph, which GitHub reads as one and Python-Markdown does not
SHOWN = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".jsonl": "json"}
PLACE = "repository"
_at_home: dict[str, str] = {}  # page of the site -> its place in the repository


def on_files(files: Files, config: MkDocsConfig) -> Files:
    _at_home.clear()
    waiting = []
    for file in files.documentation_pages():
        if file.generated_by is None:
            _at_home[file.src_uri] = f"docs/{file.src_uri}"
            waiting.append(f"docs/{file.src_uri}")
    seen: set[str] = set()
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            if target in seen or _in_docs(target):
                continue
            seen.add(target)
            path, uri = ROOT / target, _place(target)
            if path.suffix == ".md":
                files.append(File.generated(config, uri, content=path.read_text(encoding="utf-8")))
                _at_home[uri] = target
                waiting.append(target)
            elif path.is_dir():
                files.append(File.generated(config, uri, content=_listing(target)))
                _at_home[uri] = f"{target}/."
                waiting.append(f"{target}/.")
            elif path.suffix in SHOWN:
                files.append(File.generated(config, uri, content=f"# {target}\n\n````{SHOWN[path.suffix]}\n{path.read_text(encoding='utf-8')}````\n"))
                _at_home[uri] = target
            else:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    if here not in _at_home:
        return markdown
    home = _at_home[here]
    if here.startswith(f"{PLACE}/"):
        page.meta["search"] = {"exclude": True}
    if not home.endswith((".md", "/.")):
        return markdown  # source, shown as it is

    def there(match: re.Match) -> str:
        target = _target(home, match[2])
        if target is None:
            return match[0]
        uri = target.removeprefix("docs/") if _in_docs(target) else _place(target)
        return match[1] + posixpath.relpath(uri, posixpath.dirname(here) or ".") + (match[3] or "")

    parts = FENCE.split(markdown)
    return "".join(part if part.lstrip().startswith("```") else TIGHT_LIST.sub(r"\1\n\n\2", LINK.sub(there, part)) for part in parts)


def _target(home: str, link: str) -> str | None:
    """The place in the repository that `link` on the page at `home` means; None where there is nothing, for mkdocs to complain of."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(home), link))
    return target if (ROOT / target).exists() and not target.startswith("..") else None


def _targets(home: str) -> list[str]:
    text = _listing(home[:-2]) if home.endswith("/.") else (ROOT / home).read_text(encoding="utf-8")
    found = [_target(home, match[2]) for part in FENCE.split(text) if not part.lstrip().startswith("```") for match in LINK.finditer(part)]
    return [target for target in found if target is not None]


def _in_docs(target: str) -> bool:
    """Has the site a page or file for it already? Of a folder it has none."""
    return target.startswith("docs/") and not (ROOT / target).is_dir()


def _place(target: str) -> str:
    path = ROOT / target
    return f"{PLACE}/{target}" + (".md" if path.is_dir() or path.suffix in SHOWN else "")


def _listing(folder: str) -> str:
    """A page of a folder's source files, by their places under it."""
    paths = sorted(p.relative_to(ROOT / folder).as_posix() for p in (ROOT / folder).rglob("*") if p.suffix in SHOWN or p.suffix == ".md")
    return f"# {folder}\n\n" + "".join(f"- [{path}]({path})\n" for path in paths)
