"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_first_screen_has_the_two_commands():
    first_screen = README.splitlines()[:20]
    assert '    pip install ".[demo]" && ttaq demo' in first_screen
    assert '    pip install -e ".[test]" && pytest' in first_screen


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    shared: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), shared)
    assert (tmp_path / "model.safetensors").stat().st_size > 0
    assert shared["logits"].shape == (2, 10)
    assert isinstance(shared["conv"](torch.randn(1, 3, 8, 8)), torch.Tensor)
