"""Which image of which domain comes when: orders as numbers alone."""

import numpy as np


def follow_one_another(subject, domains, images, seed, arrange):
    """Order each domain once, in turn: the same choice of images everywhere, arranged anew in each.

    Args:
        subject: Who asks, for the error.
        domains: Pairs of a name and its `Images`.
        images: How many a domain; None takes all.
        seed: Of choice and order.
        arrange: Takes the (n,) chosen indices, their (n,) labels and a generator; gives (m,) of the indices.

    Returns:
        List of (number of the domain, (m,) indices into it).

    Raises:
        ValueError: A domain holds fewer images than asked for.
    """
    order = []
    for number, (name, domain) in enumerate(domains):
        count = len(domain) if images is None else images
        if not 0 < count <= len(domain):
            raise ValueError(
                f"{subject}: images must be 1 to {len(domain)}, as many as {name} holds, got {count}; "
                "pass images=None for all"
            )
        chosen = np.random.default_rng(seed).permutation(len(domain))[:count]
        order.append((number, arrange(chosen, domain.labels[chosen], np.random.default_rng([seed, number]))))
    return order


def shuffle(chosen, labels, rng):
    """Give all images in random order, (n,)."""
    return rng.permutation(chosen)
