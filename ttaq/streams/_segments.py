"""Which image of which domain comes when: orders as numbers alone."""

import math

import numpy as np


def follow_one_another(subject, domains, images, seed, arrange, visit=0):
    """Order each domain once, in turn: the same choice of images everywhere, arranged anew in each.

    Args:
        subject: Who asks, for the error.
        domains: Pairs of a name and its `Images`.
        images: How many a domain; None takes all.
        seed: Of choice and order.
        arrange: Takes the (n,) chosen indices, their (n,) labels and a generator; gives (m,) of the indices.
        visit: Of the whole sequence, from 0: each arranges the same images anew.

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
        order.append((number, arrange(chosen, domain.labels[chosen], np.random.default_rng([seed, number, visit]))))
    return order


def mix(subject, domains, images, seed, arrange):
    """Arrange the images of all domains together; arguments as for `follow_one_another`, whose images are met.

    Returns:
        List of one segment ((m,) numbers of domains, (m,) indices into them).

    Raises:
        ValueError: A domain holds fewer images than asked for.
    """
    segments = follow_one_another(subject, domains, images, seed, shuffle)
    numbers = np.concatenate([np.full(len(index), number) for number, index in segments])
    index = np.concatenate([index for _, index in segments])
    labels = np.concatenate([domains[number][1].labels[index] for number, index in segments])
    places = arrange(np.arange(len(index)), labels, np.random.default_rng([seed, len(domains)]))
    return [(numbers[places], index[places])]


def shuffle_names(names, seed):
    """Give the names in an order that the seed draws."""
    names = tuple(names)
    return tuple(names[place] for place in np.random.default_rng([seed, 0, 0, 1]).permutation(len(names)))


def check_mix(subject, concentration, slot):
    """Refuse a mix of classes that cannot be drawn, in one sentence."""
    if not 0 < concentration < math.inf:
        raise ValueError(f"{subject}: concentration must be positive and finite, got {concentration}; 0.1 is usual")
    if slot < 1:
        raise ValueError(f"{subject}: slot must be at least 1, got {slot}; 50 is the default")


def shuffle(chosen, labels, rng):
    """Give all images in random order, (n,)."""
    return rng.permutation(chosen)


def correlate(chosen, labels, rng, *, concentration, slot):
    """Give all images, (n,), slot after slot, the classes of each mixed by a Dirichlet draw of its own."""
    shuffled = rng.permutation(len(chosen))
    chosen, labels = chosen[shuffled], labels[shuffled]
    names, left = np.unique(labels, return_counts=True)
    waiting = [chosen[labels == name] for name in names]
    slots = []
    while left.any():
        counts = _fill(left, min(slot, left.sum()), concentration, rng)
        left = left - counts
        taken = [waiting[k][left[k] : left[k] + counts[k]] for k in np.flatnonzero(counts)]
        slots.append(rng.permutation(np.concatenate(taken)))
    return np.concatenate(slots)


def _fill(left, size, concentration, rng):
    """Draw how many images of each class a slot takes, (C,), of those that are left, (C,).

    What a class cannot give is drawn again from the others. The mix is kept in logarithms (a gamma variate of shape a
    is one of shape a + 1 times a uniform to the power 1 / a): small shares do not vanish, so there are always some
    to renormalise.
    """
    mix = np.log(rng.standard_gamma(concentration + 1, len(left))) - rng.standard_exponential(len(left)) / concentration
    counts = np.zeros_like(left)
    while missing := size - counts.sum():
        there = np.flatnonzero(left > counts)
        share = np.exp(mix[there] - mix[there].max())
        drawn = rng.choice(there, missing, p=share / share.sum())
        counts = np.minimum(counts + np.bincount(drawn, minlength=len(left)), left)
    return counts


def thin_out(chosen, labels, rng, *, ratio, seed):
    """Give exponentially fewer images of one class after another, in random order, (m,); `seed` ranks the classes."""
    names, counts = np.unique(labels, return_counts=True)
    keys = np.random.default_rng([seed, 0, 1]).random(names[-1] + 1)  # a class has its key in every domain
    ranks = keys[names].argsort().argsort()
    kept = np.rint(counts.max() * float(ratio) ** (-ranks / max(len(names) - 1, 1))).astype(int).clip(1, counts)
    return rng.permutation(np.concatenate([chosen[labels == name][:n] for name, n in zip(names, kept, strict=True)]))
