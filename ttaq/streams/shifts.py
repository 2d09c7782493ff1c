"""Orders in which the shift itself changes: gradually, for each image, or by coming back."""

from functools import partial

from ._segments import check_mix, correlate, follow_one_another, mix, shuffle
from ._stream import Stream
from .order import name_domains


def gradual(
    source,
    *,
    severity=5,
    images=1000,
    batch_size=200,
    seed=0,
    **made,
):
    """Let the severity of each corruption rise from 1 and fall back to 1 before the next one comes.

    ``1, 2, .., severity, .., 2, 1`` for every corruption: CoTTA's gradual setting (Wang et al., arXiv:2203.13591,
    section 4). A domain is a corruption at all its severities: its error is that of all its images, and
    `Batch.first` marks where the corruption changes.

    Args:
        source: And all arguments not named here: as for `continual`.
        severity: The highest, 1 to 5.
        images: How many at each severity, so 9 times as many a corruption at severity 5; None takes all.
        batch_size: Images a batch; the last at each severity may be short.

    Returns:
        A `Stream`.

    Raises:
        ValueError: An argument is not as described, or a domain is missing.
    """
    if severity not in range(1, 6):
        raise ValueError(f"gradual: severity must be 1 to 5, got {severity}; 5 is usual")
    path = [*range(1, severity), *range(severity, 0, -1)]
    domains = name_domains(source, seed=seed, severities=path, **made)
    return Stream(domains, follow_one_another("gradual", domains, images, seed, shuffle), batch_size)


def mixed(
    source,
    *,
    images=1000,
    batch_size=200,
    seed=0,
    **made,
):
    """Shuffle the images of all corruptions together, so that a batch holds many.

    The mixed shifts of SAR (Niu et al., arXiv:2302.12400, section 4) and mixed domains of ROID (Marsden et al.,
    arXiv:2306.00650). `Batch.domains` names the corruption of each image, and errors are counted by it. The images
    are those of `continual`: each is met once under every corruption.

    Args:
        source: And all arguments not named here: as for `continual`.
        batch_size: Images a batch; the last of the stream may be short.

    Returns:
        A `Stream`; it opens one domain, "mixed".

    Raises:
        ValueError: An argument is not as described, or a domain is missing.
    """
    domains = name_domains(source, seed=seed, **made)
    return Stream(domains, mix("mixed", domains, images, seed, shuffle), batch_size)


def mixed_correlated(
    source,
    *,
    concentration=0.1,
    slot=50,
    images=1000,
    batch_size=200,
    seed=0,
    **made,
):
    """Mix the images of all corruptions, and let neighbours in time share their classes.

    The hardest setting of ROID (Marsden et al., arXiv:2306.00650); classes come as in `correlated`, drawn over the
    images of all corruptions.

    Args:
        source: And all arguments not named here: as for `mixed`.
        concentration: As for `correlated`.
        slot: As for `correlated`.

    Returns:
        A `Stream`.

    Raises:
        ValueError: An argument is not as described, or a domain is missing.
    """
    check_mix("mixed_correlated", concentration, slot)
    domains = name_domains(source, seed=seed, **made)
    arrange = partial(correlate, concentration=concentration, slot=slot)
    return Stream(domains, mix("mixed_correlated", domains, images, seed, arrange), batch_size)


def recurring(
    source,
    *,
    visits=20,
    concentration=0.1,
    slot=50,
    images=1000,
    batch_size=200,
    seed=0,
    **made,
):
    """Walk through the sequence of corruptions again and again.

    Recurring TTA of PeTTA (Hoang et al., arXiv:2311.18193): the same images under the same corruptions in each visit,
    arranged anew. `Batch.visit` counts the visits, and `evaluate` gives the error of each.

    Args:
        source: And all arguments not named here: as for `continual`.
        visits: How often the sequence is met.
        concentration: As for `correlated`; None gives random order within each domain.
        slot: As for `correlated`.
        images: How many a domain in each visit; None takes all.

    Returns:
        A `Stream`.

    Raises:
        ValueError: An argument is not as described, or a domain is missing.
    """
    if visits < 1:
        raise ValueError(f"recurring: visits must be at least 1, got {visits}; 20 is usual")
    arrange = shuffle
    if concentration is not None:
        check_mix("recurring", concentration, slot)
        arrange = partial(correlate, concentration=concentration, slot=slot)
    domains = name_domains(source, seed=seed, **made)
    follow = partial(follow_one_another, "recurring", domains, images, seed, arrange)
    return Stream(domains, [part for visit in range(visits) for part in follow(visit)], batch_size, visits)
