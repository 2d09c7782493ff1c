"""What all figures share: their looks by day and night, wide and narrow, and the files that they become."""

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

WIDE, NARROW = 9.0, 4.5  # inches
FAMILY = "system-ui,sans-serif"

# Text has a contrast of at least 4.5 : 1 on paper, curves and marks of at least 3 : 1 (WCAG AA).
THEMES = {
    "light": {
        "paper": "#ffffff", "ink": "#1c2330", "faint": "#596271", "grid": "#e3e7ed", "c0": "#707987", "c1": "#1f6fc4",
        "c2": "#c4540d", "c3": "#1f8540", "c4": "#8e44b8", "c5": "#8a6d00", "c6": "#c62f2f",
    },
    "dark": {
        "paper": "#161b22", "ink": "#e6e9ee", "faint": "#9aa4b2", "grid": "#2b323c", "c0": "#98a1ae", "c1": "#62a8ee",
        "c2": "#f0935a", "c3": "#4cc376", "c4": "#c58be0", "c5": "#d9b84a", "c6": "#f07a7a",
    },
}  # fmt: skip
COLOURS = tuple(f"c{number}" for number in range(6))  # of a theme, for what is told apart
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Look:
    """How a figure is to look.

    Args:
        theme: Name to colour, of `THEMES`.
        width: Inches.
    """

    theme: dict[str, str]
    width: float = WIDE

    @classmethod
    def of(cls, *, dark: bool = False, narrow: bool = False) -> "Look":
        """Choose by what it is for: dark paper, a telephone."""
        return cls(THEMES["dark" if dark else "light"], NARROW if narrow else WIDE)

    @property
    def narrow(self) -> bool:
        """Whether panels go below each other."""
        return self.width < 6

    def __getitem__(self, name: str) -> str:
        return self.theme[name]


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn in every look.

    Args:
        name: Of its files.
        alt: What it shows, for those who do not see it.
        caption: What the reader needs to read it.
        plot: Draws it.
    """

    name: str
    alt: str
    caption: str
    plot: Callable[[Look], Any]

    def html(self) -> str:
        """Return a <figure> that is drawn in the colours of the page, wide and narrow."""
        both = ""
        for kind in ("wide", "narrow"):
            figure = self.plot(Look.of(narrow=kind == "narrow"))
            both += f'<div class="{kind}">{as_inline(figure, self.name + kind, self.alt)}</div>'
        return f"<figure>{both}<figcaption>{escape(self.caption)}</figcaption></figure>"


def start(look: Look, height: float) -> Any:
    """Return an empty figure of so many inches; its panels find their room by themselves.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('report: the figure needs matplotlib; pip install "ttaq[demo]"') from error
    figure = Figure(figsize=(look.width, height), facecolor=look["paper"], layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axes, look: Look, title: str, unit: str = "", *, along: str = "") -> None:
    """Give a panel its title, the units of both axes, a quiet grid and no frame."""
    axes.set_facecolor(look["paper"])
    title = textwrap.fill(title, 36) if look.narrow else title
    axes.set_title(title, loc="left", color=look["ink"], fontsize=10 if look.narrow else 10.5, fontweight="bold", pad=8)
    axes.set_ylabel(unit, color=look["faint"], fontsize=9)
    axes.set_xlabel(along, color=look["faint"], fontsize=9)
    axes.grid(axis="y", color=look["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=look["faint"], length=0, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def explain(figure_or_axes, look: Look, handles=None, **where) -> None:
    """Write a legend without a frame; `handles` in place of what is drawn."""
    given = {} if handles is None else {"handles": handles}
    style = {"frameon": False, "labelcolor": look["ink"], "fontsize": 9}
    legend = figure_or_axes.legend(**style | given | where)
    legend.set_in_layout("outside" in str(where.get("loc")))  # one inside a panel takes no room from it


def scale(axes, which: str, values: list[float], write: Callable[[float], str]) -> None:
    """Make an axis logarithmic where values span more than a factor of 3, with ticks at 1, 2 and 5 times powers of 10.

    Args:
        axes: A panel.
        which: "x" or "y".
        values: All that stand along it.
        write: Writes a tick's value.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    axis = getattr(axes, f"{which}axis")
    if low > 0 and high >= 3 * low:
        axes.set(**{f"{which}scale": "log"})
        steps = (1, 2, 5) if high < 60 * low else (1, 3) if high < 1000 * low else (1,)
        ticks = [m * 10.0**e for e in range(-9, 16) for m in steps if low / 1.5 <= m * 10.0**e <= high * 1.5]
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def as_png(figure) -> bytes:
    """Return a figure as a PNG file of 130 dots an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": "ttaq"})
    return file.getvalue()


def as_svg(figure, *, salt: str = "ttaq", text: bool = False) -> bytes:
    """Return a figure as an SVG file, the same bytes each time.

    Args:
        figure: Drawn.
        salt: Makes the names inside differ from those of other figures on one page.
        text: Keep letters as text, in the fonts of the reader; else as paths, which look the same everywhere.
    """
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none" if text else "path", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", dpi=130, metadata={"Date": None})
    return file.getvalue()


def as_inline(figure, salt: str, alt: str) -> str:
    """Return a light figure as an <svg> for an HTML page, whose variables give it its colours.

    Args:
        figure: Drawn in the light look.
        salt: As in `as_svg`.
        alt: What it shows.
    """
    text = as_svg(figure, salt=salt, text=True).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"(?<=base64,)[^\"]*", lambda found: "".join(found[0].split()), text)
    text = re.sub(r'(font: [^"]*?px) [^;"]*', rf"\1 {FAMILY}", text)
    box = re.search(r'viewBox="[^"]*"', text)[0]
    text = re.sub(r"<svg[^>]*>", f'<svg {box} role="img" aria-label="{escape(alt)}">', text, count=1)
    for name, colour in THEMES["light"].items():
        text = re.sub(colour, f"var(--{name})", text, flags=re.IGNORECASE)
    used = set(re.findall(r'#([\w-]+)(?:"|\))', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # hundredths of a point
    return re.sub(r"\s*\n\s*", " ", text).strip()
