"""What the numbers say, in sentences, losses as plainly as gains."""

from . import words
from .results import Line, Results


def find(results: Results) -> list[str]:
    """Say for each model what packing, reconstruction and adaptation did, and what did not help.

    Args:
        results: Of any run.

    Returns:
        Sentences.
    """
    lines = results.lines()
    found = []
    for model in dict.fromkeys(line.model for line in lines):
        own = [line for line in lines if line.model == model]
        found += _packing(own) + _reconstruction(own)
    return found + _losses(lines)


def headline(lines: list[Line]) -> Line:
    """Choose the line to show first: packed W4A4, else anything packed, else the first."""
    packed = [line for line in lines if line.form == "packed"]
    return next((line for line in packed if line.bits == "w4a4"), (packed or lines)[0])


def _packing(lines):
    line = headline(lines)
    whole = next((other for other in lines if other.form == "float"), None)
    text = f"{words.label(line)}: mean error {_errors(line)}"
    if whole is None or whole is line:
        return [text + "."]
    size = ""
    if line.bytes and whole.bytes:
        size = f"; the file holds {words.kilobytes(line.bytes)}, {line.bytes / whole.bytes:.2f} of float"
    return [f"{text}. The float model has {_errors(whole)}{size}."]


def _errors(line):
    how = {adapter: "unadapted" if adapter == "source" else f"with {adapter}" for adapter in line.rows}
    return ", ".join(f"{words.percent(line.error(adapter))} % {how[adapter]}" for adapter in line.rows)


def _reconstruction(lines):
    """Compare both methods where they differ most, with the model as it is."""
    gaps = []
    for bits, (nearest, learned) in _pairs(lines).items():
        before, after = nearest.error("source"), learned.error("source")
        if before is not None and after is not None:
            gaps.append((before - after, bits, before, after))
    if not gaps or max(gaps)[0] < 0.1:
        return []
    _, bits, before, after = max(gaps)
    return [
        f"{lines[0].model}, {words.width(bits)}: reconstruction brings the error without adaptation "
        f"from {before:.1f} % (round to nearest) down to {after:.1f} %."
    ]


def _pairs(lines):
    """Give bits to its (nearest, reconstructed) pair of fake-quantised lines."""
    simulated = [line for line in lines if line.form == "fake-quantised"]
    nearest = {line.bits: line for line in simulated if line.method == "rtn"}
    return {
        line.bits: (nearest[line.bits], line) for line in simulated if line.method != "rtn" and line.bits in nearest
    }


def _losses(lines):
    """List where an adapter left the model no better, and where reconstruction did."""
    found = []
    packed = {(line.model, line.bits, line.method) for line in lines if line.form == "packed"}
    for line in lines:
        base = line.error("source")
        if line.form == "fake-quantised" and (line.model, line.bits, line.method) in packed:
            continue  # the packed line says it
        for adapter, row in line.rows.items():
            if adapter != "source" and base is not None and row["mean_error"] >= base:
                found.append(f"{adapter} on {words.label(line)} ({base:.1f} to {row['mean_error']:.1f} %)")
    for model in dict.fromkeys(line.model for line in lines):
        for bits, (nearest, learned) in _pairs([line for line in lines if line.model == model]).items():
            for adapter in (name for name in nearest.rows if name in learned.rows):
                before, after = nearest.error(adapter), learned.error(adapter)
                if after > before:
                    what = f"reconstruction of {model} {words.width(bits)}, {adapter}"
                    found.append(f"{what} ({before:.1f} to {after:.1f} %)")
    return [f"No gain from {'; '.join(found)}."] if found else []
