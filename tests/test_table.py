"""The table on the terminal, wide and narrow."""

import io

from rich.console import Console

from ttaq.evaluation import Result
from ttaq.report import Results, tabulate


def printed(adapters, columns):
    results = Results("a title")
    for number, adapter in enumerate(adapters):
        row = {"model": "ttaq.models:ResNet", "bits": "w4a4", "method": "ttaq", "form": "packed", "bytes": 1024}
        results.add(Result({"fog": 20.0 + number}, {"fog": 10}), clean_error=None, adapter=adapter, **row)
    console = Console(width=columns, file=io.StringIO())
    console.print(tabulate(results, columns))
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_many_adapters_stand_below_one_another_on_a_narrow_terminal():
    lines = printed(["source", "norm", "tent"], 44)
    assert ["ttaq.models:ResNet", "source", "20.0"] in lines
    assert ["W4A4", "packed", "norm", "21.0"] in lines
    assert ["tent", "22.0"] in lines


def test_they_are_columns_where_there_is_room():
    lines = printed(["source", "norm", "tent"], 100)
    assert any({"source", "norm", "tent"} <= set(line) for line in lines)
    assert any({"20.0", "21.0", "22.0"} <= set(line) for line in lines)
    assert any({"source", "norm"} <= set(line) for line in printed(["source", "norm"], 56))
