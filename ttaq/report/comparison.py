"""Methods side by side: errors over domains and seeds, as a table, a file and a figure."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adaptation import adapt
from ..evaluation import Result, as_csv, evaluate
from ..files import write_atomically
from .figure import draw_comparison

FORMAT = 1
COLUMNS = {"mean": "mean_error", "ECE": "ece", "forwards": "forwards", "backwards": "backwards", "seconds": "seconds"}


@dataclass
class Comparison:
    """What several methods got wrong on the same streams, once a seed.

    Attributes:
        results: Method to seed to its `Result`.
    """

    results: dict[str, dict[int, Result]] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        """Every domain once, in the order in which they were first met."""
        all_errors = [result.errors for seeds in self.results.values() for result in seeds.values()]
        return list(dict.fromkeys(name for errors in all_errors for name in errors))

    def spread(self, method: str, domain: str | None = None) -> tuple[float, float | None]:
        """Return the mean over seeds of an error in percent, and its standard deviation (n - 1), None for one seed.

        Args:
            method: As it is called here.
            domain: Whose error; None takes the mean over domains.
        """
        return self._spread(method, lambda result: result.mean_error if domain is None else result.errors[domain])

    def _spread(self, method: str, value: Callable[[Result], float | None]) -> tuple[float, float | None]:
        values = [found for result in self.results[method].values() if (found := value(result)) is not None]
        if not values:
            return float("nan"), None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    def table(self) -> str:
        """Write Markdown: a line a method, mean ± standard deviation over seeds of each domain and of `COLUMNS`."""
        domains = self.domains
        head = ["method", *domains, *COLUMNS, "seeds"]
        lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for method, seeds in self.results.items():
            cells = [_words(*self.spread(method, domain)) for domain in domains]
            cells += [_words(*self._spread(method, lambda r, key=key: getattr(r, key))) for key in COLUMNS.values()]
            lines.append("| " + " | ".join([method, *cells, str(len(seeds))]) + " |")
        return "\n".join(lines) + "\n"

    def rows(self) -> list[dict]:
        """Return a row for each method, seed and domain: method and seed, then the row of `Result.rows`."""
        return [
            {"method": method, "seed": seed} | row
            for method, seeds in self.results.items()
            for seed, result in seeds.items()
            for row in result.rows()
        ]

    def write(self, path: str | os.PathLike) -> Path:
        """Write a file, whole or not at all: .json (which `read` takes), .csv (`rows`), .md (`table`) or .png.

        Raises:
            ValueError: The path ends otherwise, or matplotlib is missing for the figure.
        """
        makers = {
            ".json": lambda: (json.dumps(self._content(), indent=1) + "\n").encode(),
            ".csv": lambda: as_csv(self.rows()),
            ".md": lambda: self.table().encode(),
            ".png": lambda: draw_comparison(self),
        }
        if (kind := Path(path).suffix) not in makers:
            raise ValueError(f"Comparison.write: the path must end in {', '.join(makers)}, got {path}; name it so")
        return write_atomically(path, makers[kind]())

    def _content(self) -> dict:
        found = {method: {s: r.to_dict() for s, r in seeds.items()} for method, seeds in self.results.items()}
        return {"format": FORMAT, "results": found}

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Comparison":
        """Read a .json file that `write` wrote.

        Raises:
            ValueError: It holds something else.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT or "results" not in content:
            raise ValueError(f"Comparison.read: {path} must be a .json file of Comparison.write; compare again")
        return cls(
            {
                method: {int(seed): Result.from_dict(result) for seed, result in seeds.items()}
                for method, seeds in content["results"].items()
            }
        )


def evaluate_grid(
    model: nn.Module,
    stream: Callable[[int], Iterable],
    methods: Iterable[str] | Mapping[str, Mapping[str, Any]],
    *,
    seeds: Iterable[int] = (0, 1, 2),
    reset: bool = False,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    progress: Callable[[str, int, Result], object] | None = None,
) -> Comparison:
    """Evaluate methods on the same streams, each from the model as it is, once a seed: an Adapter is reset between.

    ``evaluate_grid(model, lambda seed: ttaq.mixed(images, seed=seed), ["source", "norm", "tent"]).write("all.csv")``

    Args:
        model: Float, prepared or packed; left as it is.
        stream: Called with a seed, gives the stream that all methods meet.
        methods: Names in `ttaq.adaptation.METHODS`; or what to call each, with arguments of `ttaq.adapt` as a dict,
            whose "method" is the name where it is called otherwise: ``{"slow": {"method": "tent", "lr": 1e-4}}``.
        seeds: Of the streams.
        reset: Reset the adapter where a domain begins.
        forward: Runs the model on images, when `model(x)` does not give logits.
        progress: Called with method, seed and `Result` after each.

    Returns:
        The results, with their table and figure.

    Raises:
        ValueError: There is no method or no seed, a method or an option is unknown, or a stream is empty.
    """
    chosen = {label: {"method": label} | dict(options) for label, options in _named(methods).items()}
    seeds = list(seeds)
    if not chosen or not seeds:
        raise ValueError('evaluate_grid: there must be a method and a seed; pass methods=["source"], seeds=[0]')
    # each is made once, before anything is measured: what it reads of the source is read once
    adapters = {label: adapt(model, forward=forward, **options) for label, options in chosen.items()}
    results: dict[str, dict[int, Result]] = {label: {} for label in chosen}
    for seed in seeds:
        batches = stream(seed)
        for label, adapter in adapters.items():
            adapter.reset()
            result = results[label][seed] = evaluate(adapter, batches, reset=reset)
            if progress is not None:
                progress(label, seed, result)
    return Comparison(results)


def _named(methods) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(methods, str):
        raise ValueError(f'evaluate_grid: methods must be a list or a dict, got {methods!r}; pass ["{methods}"]')
    return methods if isinstance(methods, Mapping) else {name: {} for name in methods}


def _words(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"
