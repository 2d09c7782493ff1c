"""How numbers and widths are written for readers."""

DASH = "-"


def percent(value: float | None) -> str:
    """Write an error with one decimal, or a dash."""
    return DASH if value is None else f"{value:.1f}"


def kilobytes(count: int | None) -> str:
    """Write a file's size, or a dash."""
    if count is None:
        return DASH
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def width(bits: str) -> str:
    """Write "w4a4" as W4A4; "float" stays."""
    return bits.upper() if bits.startswith("w") else bits


def method(name: str) -> str:
    """Write how a model was rounded."""
    return {"rtn": "nearest", "qdrop": "QDrop", "ttaq": "TTAQ", "pem": "PEM", "pcr": "PCR", "none": DASH}.get(
        name, name
    )


def domain(name: str) -> str:
    """Write a domain's name without underscores."""
    return name.replace("_", " ")


def maker(line) -> str:
    """Write in one word what a line's model is: float, nearest, QDrop or packed."""
    return method(line.method) if line.form == "fake-quantised" else line.form


def label(line) -> str:
    """Name a line: "resnet W4A4 packed", "resnet float"."""
    return f"{line.model} float" if line.form == "float" else f"{line.model} {width(line.bits)} {maker(line)}"


def milliseconds(value: float | None) -> str:
    """Write a time in ms with two decimals, or a dash."""
    return DASH if value is None else f"{1e3 * value:,.2f}"


def shorten(name: str, longest: int) -> str:
    """Leave out the middle of a dotted name that is too long: its ends tell layers apart."""
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2]}…{name[-(longest - longest // 2 - 1) :]}"
