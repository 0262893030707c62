"""What plots are drawn with: one palette that colour-blind readers can tell apart, in a light and a dark variant."""

from __future__ import annotations

from dataclasses import dataclass

MARKERS = ("o", "s", "D", "^", "v", "P", "X")


@dataclass(frozen=True)
class Ink:
    """Colours of one theme; `series` after Okabe and Ito, lightened on dark paper to keep 4.5:1 contrast."""

    text: str
    faint: str
    grid: str
    dense: str
    series: tuple[str, ...]


LIGHT = Ink(
    text="#1d2429",
    faint="#5b6770",
    grid="#e3e7ea",
    dense="#7b8790",
    series=("#0072b2", "#c65300", "#00805c", "#a8448a", "#8a6a00", "#2c7da0"),
)
DARK = Ink(
    text="#e6eaed",
    faint="#9aa6af",
    grid="#2c343a",
    dense="#93a0a9",
    series=("#5ab4ec", "#ff9a52", "#3fce9f", "#e69ad0", "#e4bf4a", "#9ad1ea"),
)


def ink(dark: bool) -> Ink:
    """The palette of a theme."""
    return DARK if dark else LIGHT


def themed(svg: str) -> str:
    """An SVG drawn in light ink, with rules that turn each ink into its dark twin where the reader's theme is dark."""
    pairs = list(zip(LIGHT.series, DARK.series))
    pairs += [(getattr(LIGHT, n), getattr(DARK, n)) for n in ("text", "faint", "grid", "dense")]
    rules = [f'[style*="{k}: {old}"]{{{k}:{new} !important}}' for old, new in pairs for k in ("fill", "stroke")]
    style = f"<style>@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    head = svg.index(">") + 1
    return svg[:head] + style + svg[head:]
