"""The order in which a model meets the world: one corruption after another.

A stream is an iterable of `Batch`. It is made of domains (named `Images`) and an order: a list of segments
(number of the domain, indices into it), each cut into batches. A new order is a new function that returns segments.
All are seeded: every method that is measured on a stream of one seed meets the same images in the same order.
"""

from functools import partial

import numpy as np

from ._segments import check_mix, correlate, follow_one_another, shuffle, shuffle_names, thin_out
from ._stream import Stream
from .corruptions import CORRUPTIONS, check_corruption, corrupt


class Corrupted:
    """Make corrupted versions of clean `Images` when they are asked for; each is made once.

    CIFAR-C or ImageNet-C style, see `corrupt`. An image is the same in every stream of the same seed.

    Args:
        source: Clean `Images`.
        seed: Of the corruptions.
        table: "cifar" or "imagenet".
        frost_folder: Pictures to take frost from; None grows it.
        cache: Keep what was made, 8-bit, in memory: N x H x W x 3 bytes a domain, 2.3 GB for 15 x 1,000 at 224.
    """

    def __init__(self, source, *, seed=0, table="cifar", frost_folder=None, cache=True):
        self.source, self.seed, self.table = source, seed, table
        self.frost_folder, self.cache = frost_folder, cache
        self._made = {}

    def domain(self, name, severity):
        """Return the `Images` of one corruption at one severity, 1 to 5."""
        check_corruption(name, severity, self.table)
        if (name, severity) not in self._made:
            self._made[name, severity] = _OnDemand(self, name, severity)
        return self.source.over(self._made[name, severity], self.source.index, self.source.labels)


class _OnDemand:
    """Corrupted pixels behind the index of an array."""

    def __init__(self, corrupted, name, severity):
        self.corrupted, self.name, self.severity = corrupted, name, severity
        self.kept = {}

    def __len__(self):
        return len(self.corrupted.source.images)

    def __getitem__(self, index):
        if not self.corrupted.cache:
            return self._make(index)
        missing = np.array([number for number in index.tolist() if number not in self.kept], dtype=np.int64)
        if len(missing):
            self.kept.update(zip(missing.tolist(), self._make(missing), strict=True))
        return np.stack([self.kept[number] for number in index.tolist()])

    def _make(self, index):
        made = self.corrupted
        return corrupt(
            np.asarray(made.source.images[index]),
            self.name,
            self.severity,
            seed=made.seed,
            table=made.table,
            index=index,
            frost_folder=made.frost_folder,
        )


def continual(
    source,
    *,
    corruptions=CORRUPTIONS,
    severity=5,
    images=1000,
    batch_size=200,
    seed=0,
    table="cifar",
    frost_folder=None,
    cache=True,
):
    """Let one corruption follow another, as CoTTA's benchmark does (Wang et al., arXiv:2203.13591, section 4).

    The same images are met in every domain, drawn from the source by the seed, each time in another order.
    `Batch.first` marks where a domain opens: reset there, or do not.

    Args:
        source: Clean `Images`, corrupted on the way; or what has domains of its own: `CifarC`, `ImageNetC`,
            `Corrupted` (which several streams may share).
        corruptions: Names, in the order they are met.
        severity: 1 to 5.
        images: How many a domain; None takes all.
        batch_size: Images a batch; the last of a domain may be short.
        seed: Of the choice and order of images and of the corruptions made here.
        table: "cifar" or "imagenet", for clean images.
        frost_folder: Pictures to take frost from, for clean images; None grows it.
        cache: Keep corrupted images in memory, for clean images; see `Corrupted`.

    Returns:
        A `Stream`: iterate over it as often as needed; `len` counts the batches.

    Raises:
        ValueError: An argument is not as described, or a domain is missing.
    """
    made = {"table": table, "frost_folder": frost_folder, "cache": cache}
    domains = name_domains(source, corruptions=corruptions, severity=severity, seed=seed, **made)
    return Stream(domains, follow_one_another("continual", domains, images, seed, shuffle), batch_size)


def shuffled(
    source,
    *,
    corruptions=CORRUPTIONS,
    images=1000,
    batch_size=200,
    seed=0,
    **made,
):
    """Let one corruption follow another in an order that the seed draws.

    CoTTA is measured on ten such orders of ImageNet-C (Wang et al., arXiv:2203.13591, section 4): ten seeds here.

    Args:
        source: And all arguments not named here: as for `continual`.
        corruptions: Names; the seed draws their order.

    Returns:
        A `Stream`.

    Raises:
        ValueError: An argument is not as described, or a domain is missing.
    """
    domains = name_domains(source, corruptions=shuffle_names(corruptions, seed), seed=seed, **made)
    return Stream(domains, follow_one_another("shuffled", domains, images, seed, shuffle), batch_size)


def correlated(
    source,
    *,
    concentration=0.1,
    slot=50,
    images=1000,
    batch_size=200,
    seed=0,
    **made,
):
    """Let one corruption follow another, and in each let neighbours in time share their classes.

    Streams of this kind: NOTE (Gong et al., arXiv:2208.05117) and RoTTA (Yuan et al., arXiv:2303.13899). A domain is
    a sequence of slots; the mix of classes in each is drawn from a Dirichlet distribution and renormalised over the
    classes that still have images. The seed chooses the images that `continual` meets, each met once a domain.

    Args:
        source: And all arguments not named here: as for `continual`.
        concentration: Of the Dirichlet distribution: near 0, one class a slot; large, all alike.
        slot: Images a slot; the last may be short. Within one the order is random; batches ignore where slots end.

    Returns:
        A `Stream`.

    Raises:
        ValueError: An argument is not as described, or a domain is missing.
    """
    check_mix("correlated", concentration, slot)
    domains = name_domains(source, seed=seed, **made)
    arrange = partial(correlate, concentration=concentration, slot=slot)
    return Stream(domains, follow_one_another("correlated", domains, images, seed, arrange), batch_size)


def long_tailed(
    source,
    *,
    ratio=50,
    images=1000,
    batch_size=200,
    seed=0,
    **made,
):
    """Let one corruption follow another, with many images of a few classes and few of the others.

    The class of rank r of C keeps ``n * ratio ** (-r / (C - 1))`` of its chosen images, rounded, at least one and at
    most what it has; n is the size of the largest. The profile is that of Cui et al., arXiv:1901.05555; DELTA (Zhao
    et al., arXiv:2301.13018) adapts to streams of this kind. The seed ranks the classes; ranks and images are the
    same in every domain, shuffled anew in each.

    Args:
        source: And all arguments not named here: as for `continual`.
        ratio: Of the most frequent class to the rarest, 1 or more.
        images: How many a domain, before the tail is thinned out; None takes all.

    Returns:
        A `Stream`.

    Raises:
        ValueError: An argument is not as described, or a domain is missing.
    """
    if not ratio >= 1:
        raise ValueError(f"long_tailed: ratio must be at least 1, got {ratio}; 10 to 100 is usual")
    domains = name_domains(source, seed=seed, **made)
    arrange = partial(thin_out, ratio=ratio, seed=seed)
    return Stream(domains, follow_one_another("long_tailed", domains, images, seed, arrange), batch_size)


def name_domains(
    source,
    *,
    corruptions=CORRUPTIONS,
    severity=5,
    seed=0,
    table="cifar",
    frost_folder=None,
    cache=True,
    severities=None,
):
    """Pair the names of a stream's domains with their `Images`, made here of clean images.

    `severities` walks through each corruption, one domain of its name for each; None is `severity` alone.
    """
    if not hasattr(source, "domain"):
        source = Corrupted(source, seed=seed, table=table, frost_folder=frost_folder, cache=cache)
    path = [severity] if severities is None else list(severities)
    domains = []
    for name in corruptions:
        made = {level: source.domain(name, level) for level in sorted(set(path))}
        domains += [(name, made[level]) for level in path]
    return domains
