"""Write docs/methods.md from the registry, so that the page and the library cannot disagree. Run by `make docs`."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from gossamer.cli.methods import needs, required  # noqa: E402
from gossamer.core import Method, methods  # noqa: E402

SECTIONS = ("Args", "Returns", "Raises", "Example", "Reference", "Departs from")


def page() -> str:
    """The whole page."""
    known = methods(site=None).values()
    head = (
        "# All methods\n\nGenerated from the registry by `docs/generate.py`. `gossamer methods NAME` prints the same.\n"
    )
    table = ["| method | what it does | needs data | paper |", "|---|---|---|---|", *map(_row, known)]
    return "\n".join([head, *table, "", *map(section, known)])


def _row(m: Method) -> str:
    summary = m.summary.replace("|", "\\|")
    return f"| [`{m.name}`](#{m.name}) | {summary} | {'yes' if needs(m) else 'no'} | {paper(m)} |"


def paper(m: Method) -> str:
    """A link where the paper is on arXiv."""
    found = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", m.paper)
    return f"[{m.paper}](https://arxiv.org/abs/{found[1]})" if found else m.paper


def section(m: Method) -> str:
    """One method: its call, and its docstring as headed parts."""
    call = f"```python\n{m.name}({', '.join(_parameters(m))})\n```"
    trains = "It prunes while a model trains: `gossamer.attach`." if required(m) else ""
    trains = "It fine-tunes a frozen model: `gossamer.adapt`." if m.site == "delta" else trains
    trains = "It fine-tunes a frozen model by what it puts into its layers." if m.site == "attention" else trains
    body = [f"## {m.name}", call, trains, *_parts(inspect.getdoc(m.build) or "")]
    return "\n\n".join(part for part in body if part) + "\n"


def _parameters(m: Method) -> list[str]:
    found = inspect.signature(m.build).parameters.values()
    quoted = lambda value: json.dumps(value) if isinstance(value, str) else repr(value)
    return [f"{p.name}={quoted(p.default)}" if p.default is not p.empty else p.name for p in found]


def _parts(doc: str) -> list[str]:
    """Paragraphs; `Args:` and its kin become bold heads with lists or code beneath."""
    out, head, held = [], "", []
    for line in [*doc.splitlines(), "Reference:"]:
        found = re.match(rf"({'|'.join(SECTIONS)}):\s*(.*)", line)
        if found:
            out.append(_part(head, held))
            head, held = found[1], [found[2]] if found[2] else []
        else:
            held.append(line)
    return [part for part in out if part]


def _part(head: str, lines: list[str]) -> str:
    text = inspect.cleandoc("\n".join(lines)).strip()
    if not text:
        return ""
    if head == "Example":
        return f"**Example**\n\n```python\n{text}\n```"
    if head in ("Args", "Raises"):
        items = re.split(r"\n(?=\S)", text)
        rows = [re.sub(r"^([\w, ]+): ", r"`\1`: ", " ".join(i.split())) for i in items]
        return f"**{head}**\n\n" + "\n".join(f"- {row}" for row in rows)
    return f"**{head}**: {' '.join(text.split())}" if head else text


if __name__ == "__main__":
    (HERE / "methods.md").write_text(page(), encoding="utf-8")
