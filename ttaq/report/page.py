"""The page: one HTML file with everything inside, for wide and narrow screens, by day and by night."""

import base64
from html import escape
from string import Template

from . import words
from .figure import draw
from .findings import find, headline
from .results import Line, Results

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header><p class="brand">ttaq</p><h1>$title</h1><p class="lead">$lead</p></header>
<section class="cards" aria-label="In short">$cards</section>
<section><h2>What the numbers say</h2><ul>$findings</ul></section>
<section><h2>Errors falling</h2>
<figure><picture><source media="(prefers-color-scheme: dark)" srcset="$dark"><img src="$light" alt="$alt"></picture>
<figcaption>Above, the error in each domain of the stream, in the order in which it is met. Below, the mean over the
stream for each width; dashes mark rounding to nearest without reconstruction.</figcaption></figure></section>
<section><h2>All results</h2><p>Mean error on the stream and error on clean images in percent; the best adapter of each
line is bold. Seconds are those of predicting and adapting, all adapters together. Only packed and float models have a
file.</p><div class="scroll">$table</div></section>
<section><h2>Error in each domain</h2><p>Percent; the darker, the worse.</p>
<div class="scroll">$domains</div></section>
<section class="facts"><div><h2>Settings</h2><dl>$settings</dl></div><div><h2>Machine</h2><dl>$machine</dl></div>
<div><h2>Seconds</h2><dl>$stages</dl></div></section>
</main>
</body>
</html>
""")

_STYLE = """
:root{--paper:#f6f7f9;--card:#fff;--ink:#1c2330;--faint:#5d6675;--line:#e3e7ed;--accent:#2f80d0;--heat:234,90,40}
@media (prefers-color-scheme:dark){:root{--paper:#0e1116;--card:#161b22;--ink:#e6e9ee;--faint:#9aa4b2;--line:#2b323c;
--accent:#62a8ee;--heat:240,110,60}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:70rem;margin:0 auto;padding:1.5rem clamp(1rem,4vw,2.5rem) 4rem}
h1{font-size:clamp(1.6rem,4.5vw,2.5rem);line-height:1.15;margin:.2rem 0 .6rem;letter-spacing:-.02em}
h2{font-size:1.2rem;margin:2.6rem 0 .7rem}
.brand{margin:0;color:var(--accent);font-weight:700;letter-spacing:.06em}
.lead{margin:0;max-width:44rem;color:var(--faint);font-size:1.08rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.9rem;margin-top:1.6rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.8rem;padding:1rem 1.1rem}
.card b{display:block;font-size:1.75rem;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card span{color:var(--faint);font-size:.9rem}
ul{padding-left:1.2rem;max-width:56rem}li{margin:.35rem 0}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.8rem;padding:.8rem;overflow-x:auto}
figure img{display:block;width:100%;min-width:36rem;height:auto}
figcaption{color:var(--faint);font-size:.9rem;padding:.4rem .3rem 0}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:.8rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .7rem;text-align:left;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--faint);font-weight:600}
tbody tr:last-child th,tbody tr:last-child td{border-bottom:0}
.n{text-align:right}
tr.new th,tr.new td{border-top:2px solid var(--line)}
.heat th,.heat td{padding:.36rem .5rem}
.heat thead th.n{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;height:9rem;padding:.5rem .3rem}
.heat td.n{background:rgba(var(--heat),calc(var(--v)*.72))}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:0 2rem}
dl{display:grid;grid-template-columns:auto 1fr;gap:.2rem 1rem;margin:0;font-size:.9rem}
dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere}
"""


def render(results: Results) -> bytes:
    """Make the page; it needs no network and no other file.

    Args:
        results: Of any run.

    Returns:
        UTF-8 HTML.
    """
    lines = results.lines()
    stream = len(results.errors[0])
    lead = (
        f"{len(results.rows)} evaluations on a stream of {stream} domain{'s' * (stream > 1)}, met one after another. "
        "Models adapt while they predict; every error counts the prediction made before the update."
    )
    text = _PAGE.substitute(
        title=escape(results.title),
        style=_STYLE.strip(),
        lead=escape(lead),
        cards="".join(_cards(lines)),
        findings="".join(f"<li>{escape(sentence)}</li>" for sentence in [*find(results), *results.notes]),
        light=_embed(draw(results)),
        dark=_embed(draw(results, dark=True)),
        alt="Error along the stream and mean error by width, for each adapter",
        table=_table(results, lines),
        domains=_domains(lines),
        settings=_facts(results.settings),
        machine=_facts(results.machine),
        stages=_facts({name: f"{seconds:.1f}" for name, seconds in results.stages.items()}),
    )
    return text.encode()


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _cards(lines: list[Line]):
    """Put the headline of each model in large figures."""
    for model in dict.fromkeys(line.model for line in lines):
        own = [line for line in lines if line.model == model]
        line = headline(own)
        whole = next((other for other in own if other.form == "float"), None)
        name = f"{escape(line.model)} {words.width(line.bits)}, {line.form}"
        best = min(line.rows, key=line.error)
        if best != "source" and line.error("source") is not None:
            yield _card(f"{line.error('source'):.1f} → {line.error(best):.1f} %", f"{name}: error, as it is → {best}")
        else:
            yield _card(f"{line.error(best):.1f} %", f"{name}: error with {best}")
        if whole and whole is not line and whole.bytes and line.bytes:
            sizes = f"{words.kilobytes(whole.bytes)} in float"
            yield _card(words.kilobytes(line.bytes), f"{name}: file, {line.bytes / whole.bytes:.2f} of {sizes}")


def _card(figure, caption):
    return f'<div class="card"><b>{figure}</b><span>{caption}</span></div>'


def _table(results: Results, lines: list[Line]) -> str:
    adapters = results.adapters()
    heads = "".join(f"<th>{name}</th>" for name in ("model", "bits", "method", "form"))
    heads += "".join(f'<th class="n">{escape(name)}</th>' for name in ("clean", *adapters, "file", "seconds"))
    rows = []
    for line, new in _with_breaks(lines):
        best = min(row["mean_error"] for row in line.rows.values())
        errors = [_cell(words.percent(line.error(a)), line.error(a) == best and len(line.rows) > 1) for a in adapters]
        ends = [_cell(words.kilobytes(line.bytes)), _cell(f"{line.seconds:.1f}")]
        rows.append(f"<tr{new}>{_names(line)}{_cell(words.percent(line.clean_error))}{''.join(errors + ends)}</tr>")
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _domains(lines: list[Line]) -> str:
    names = list(dict.fromkeys(name for line in lines for errors in line.errors.values() for name in errors))
    heads = "".join(f"<th>{name}</th>" for name in ("model", "bits", "method", "form", "adapter"))
    heads += "".join(f'<th class="n">{escape(words.domain(name))}</th>' for name in names)
    rows = []
    for line, new in _with_breaks(lines):
        for number, (adapter, errors) in enumerate(line.errors.items()):
            cells = "".join(_heat(errors.get(name)) for name in names)
            start = new if number == 0 else ""
            rows.append(f"<tr{start}>{_names(line)}<td>{escape(adapter)}</td>{cells}</tr>")
    return f'<table class="heat"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _with_breaks(lines):
    """Pair each line with the attribute that draws a rule above it where a model begins."""
    before = None
    for line in lines:
        yield line, "" if before in (None, line.model) else ' class="new"'
        before = line.model


def _names(line: Line) -> str:
    texts = (line.model, words.width(line.bits), words.method(line.method), line.form)
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _cell(text: str, bold: bool = False) -> str:
    return f'<td class="n">{f"<b>{text}</b>" if bold else text}</td>'


def _heat(error: float | None) -> str:
    if error is None:
        return '<td class="n">-</td>'
    return f'<td class="n" style="--v:{min(1.0, error / 100):.3f}">{error:.0f}</td>'


def _facts(values: dict) -> str:
    shown = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    return "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in shown.items())
