"""The sections on streams: what came, what was refused, and how it drifted."""

from html import escape

from .drift import kind_of, picture_drift
from .markup import Section, card, folded, heads, items, number, row, table
from .streams import Stream

_SHOWN = 200  # refused images that are named


def stream_cards(streams: list[Stream]) -> list[str]:
    """Count what each stream brought."""
    found = []
    for one in streams:
        count, _, rest = one.count().removesuffix(", 0 refused").partition(" ")
        found.append(card(count, f"{one.name}: {rest}"))
    return found


def stream_sections(streams: list[Stream]) -> list[Section]:
    """Show a section for each stream."""
    return [_section(one, f"drift-{number + 1}" if len(streams) > 1 else "drift") for number, one in enumerate(streams)]


def _section(one: Stream, name: str) -> Section:
    sure = "" if one.confidence is None else f" Mean confidence of the predictions: {one.confidence:.1%}."
    lead = f"{one.count()}.{sure}"
    if not one.measured:
        lead += " Nobody measured drift: adapt with telemetry."
    pictures = (picture_drift(name, one.steps),) if one.measured else ()
    return Section(f"Stream: {one.name}", lead, _events(one) + _classes(one) + _refusals(one), pictures)


def _events(one):
    """Count the events of each kind, with the first and the latest batch and what it said there."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for batch, text in one.events():
        kinds.setdefault(kind_of(text) or "other", []).append((batch, text))
    if not kinds:
        return "<p>No events.</p>"
    rows = [
        row(kind, number(f"{len(found):,}"), number(str(found[0][0])), number(str(found[-1][0])), _text(found[-1][1]))
        for kind, found in kinds.items()
    ]
    head = heads(("event",), ("times", "first in batch", "latest in batch")) + heads(("what the latest said",))
    return table("Events", head, rows)


def _classes(one):
    """List how often each class was predicted, where predictions are at hand."""
    if not one.labels:
        return ""
    most = one.labels.most_common()
    rows = [row(name, number(f"{n:,}"), number(f"{n / one.predicted:.1%}")) for name, n in most[:_SHOWN]]
    filled = table("Predictions, most frequent first", heads(("class",), ("images", "share")), rows)
    return folded(f"Predicted classes: {len(most)}, most often {most[0][0]}", filled)


def _refusals(one):
    """Give each reason with its images, named up to a number."""
    reasons = one.reasons()
    if not reasons:
        return ""
    rows = [
        row(reason, number(f"{len(names):,}"), _text(", ".join(names[:3]) + ", ..." * (len(names) > 3)))
        for reason, names in reasons.items()
    ]
    filled = table("Refused images", heads(("reason",), ("images",)) + heads(("such as",)), rows)
    names = [f"{name}: {reason}" for name, reason in one.refused[:_SHOWN]]
    rest = len(one.refused) - len(names)
    names += [f"and {rest:,} more in {one.name}"] if rest else []
    return filled + folded("Every refused image", items(names))


def _text(text):
    return f'<td class="wrap">{escape(text)}</td>'
