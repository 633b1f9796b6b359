"""The look of all reports: one HTML file that needs nothing else."""

import html
import os
import pathlib
from collections.abc import Iterable

from dualkv.errors import Error

CSS = """
:root { color-scheme: light dark; --ink: #1c2026; --page: #ffffff; --soft: #5c6672; --line: #d6dbe1; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ec; --page: #14171b; --soft: #9aa5b1; --line: #343b44; --band: #1c2127; }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 0.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
.soft { color: var(--soft); font-size: 0.9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.4rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; white-space: pre; } td.name, th.name { text-align: left; }
tbody tr:nth-child(even) { background: var(--band); }
.bad { color: #d6456b; font-weight: 600; }
figure { margin: 0.5rem 0 1rem; } svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
pre { overflow-x: auto; padding: 0.8rem; background: var(--band); font-size: 0.8rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); }
"""


def text(value: object) -> str:
    """Escaped."""
    return html.escape(str(value))


def figure(heading: str, svg: str, caption: str, otherwise: str) -> str:
    """A plot under its heading, or a sentence when there is none."""
    if not svg:
        return f'<h3>{text(heading)}</h3><p class="soft">{text(otherwise)}</p>'
    return f'<h3>{text(heading)}</h3><figure>{svg}<figcaption class="soft">{text(caption)}</figcaption></figure>'


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page of parts that are HTML."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<title>{text(title)}</title><style>{CSS}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def write(page: str, path: str | os.PathLike[str]) -> None:
    """Raises Error, ``io``."""
    try:
        pathlib.Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise Error(f"report: can't write {os.fspath(path)!r}: {error}", "io", error.errno or 0) from error
