"""Say what was done to make a model safe, and why."""


def explain_safety(report: dict) -> list[str]:
    """Put `ttaq_report["safety"]` into a sentence; nothing where nothing broke and nothing was asked for.

    Args:
        report: As `protect` makes it.
    """
    broken, measures = report.get("broken", {}), " and ".join(report.get("measures", []))
    if not broken and not measures:
        return []
    if not broken:
        return [f"safety: {measures}, as asked for"]
    name, reason = next(iter(broken.items()))
    more = f", and {len(broken) - 1} more layers" if len(broken) > 1 else ""
    errors = ", ".join(f"{what}: {error:.3g}" for what, error in report["errors"].items())
    after = f"; {len(report['after'])} layers break still" if report.get("after") else ""
    return [f"safety: {measures or 'no measure'}, for {name} breaks ({reason}){more}; output errors {errors}{after}"]
