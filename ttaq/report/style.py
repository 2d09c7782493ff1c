"""How the page looks: by day and by night, wide, narrow and in print."""

from .canvas import THEMES, Look


def _variables(look: Look) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in look.theme.items())


STYLE = (
    f":root{{{_variables(Look(THEMES['light']))}--page:#f6f7f9;--heat:234,90,40}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(Look(THEMES['dark']))}"
    "--page:#0e1116;--heat:240,110,60}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:70rem;margin:0 auto;padding:1.5rem clamp(1rem,4vw,2.5rem) 3rem}
h1{font-size:clamp(1.6rem,4.5vw,2.5rem);line-height:1.15;margin:.2rem 0 .6rem;letter-spacing:-.02em;
overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .7rem}
h3{font-size:1rem;margin:1.6rem 0 .5rem}
.brand{margin:0;color:var(--c1);font-weight:700;letter-spacing:.06em}
.lead{margin:0;max-width:44rem;color:var(--faint);font-size:1.08rem}
section>p,dd,li{max-width:60rem;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(12rem,1fr));gap:.9rem;margin-top:1.6rem}
.card{background:var(--paper);border:1px solid var(--grid);border-radius:.8rem;padding:1rem 1.1rem}
.card b{display:block;font-size:1.25rem;white-space:nowrap;line-height:1.2;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.card span{color:var(--faint);font-size:.9rem;overflow-wrap:anywhere}
ul{padding-left:1.2rem;max-width:56rem}li{margin:.35rem 0}
figure{margin:0 0 .9rem;background:var(--paper);border:1px solid var(--grid);border-radius:.8rem;padding:.8rem}
figure svg{display:block;width:100%;height:auto;stroke-linejoin:round;stroke-linecap:butt}
figure .narrow{display:none;max-width:30rem;margin:0 auto}
figcaption{color:var(--faint);font-size:.9rem;padding:.6rem .3rem 0;max-width:60rem}
@media screen and (max-width:44rem){figure .wide{display:none}figure .narrow{display:block}figure{padding:.5rem}}
.scroll{overflow:auto;max-height:34rem;background:var(--paper);border:1px solid var(--grid);border-radius:.8rem;
margin:0 0 .9rem}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--c1);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
.about{color:var(--faint);font-size:.9rem;margin:1.2rem .3rem .4rem}
thead th{position:sticky;top:0;background:var(--paper);z-index:2}
tbody th{position:sticky;left:0;background:var(--paper);z-index:1}
th,td{padding:.42rem .7rem;text-align:left;white-space:nowrap;border-bottom:1px solid var(--grid)}
thead th{color:var(--faint);font-weight:600}
tbody th{font-weight:400}
tbody tr:last-child th,tbody tr:last-child td{border-bottom:0}
td.wrap{white-space:normal;min-width:16rem;overflow-wrap:anywhere}
th.n,td.n{text-align:right}
tr.new th,tr.new td{border-top:2px solid var(--grid)}
.heat th,.heat td{padding:.36rem .5rem}
.heat thead th.n{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;height:10.5rem;padding:.5rem .3rem;
border-bottom:0;border-top:1px solid var(--grid)}
.heat td.n{background:rgba(var(--heat),calc(var(--v)*.6))}
.spark{width:6rem;height:1.5rem;vertical-align:middle}
.spark polyline{fill:none;stroke:var(--c1);stroke-width:1.6}
details{margin:0 0 .9rem}summary{cursor:pointer;padding:.3rem 0;color:var(--c1);font-weight:600}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 2.5rem}
dl{display:grid;grid-template-columns:minmax(5rem,auto) 1fr;gap:.2rem 1rem;margin:0;font-size:.9rem}
dt{color:var(--faint)}dd{margin:0}
footer{margin-top:3rem;color:var(--faint);font-size:.85rem}
@media print{body{background:#fff;font-size:11px}main{max-width:none;padding:0}
.scroll{overflow:visible;max-height:none;border:0}figure,.card{break-inside:avoid}
h2,h3,.about,section>p{break-after:avoid}tr{break-inside:avoid}
table{font-size:8px}th,td{padding:.2rem .25rem;white-space:normal}
.heat thead th.n{white-space:nowrap}
details::details-content{content-visibility:visible;block-size:auto}
*{print-color-adjust:exact}}
"""
)
