"""The Adapter's state on disk: bit for bit, whole or not at all, even when the process is killed while it writes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_adapter import ALL, STREAM, cnn, images, run, vit

from ttaq.adaptation import adapt


@pytest.mark.parametrize(("method", "options"), ALL)
def test_a_state_on_disk_continues_bit_for_bit(method, options, tmp_path):
    adapter = adapt(cnn(), method, **options)
    run(adapter, STREAM)
    path = adapter.save(tmp_path / "states" / "stream.pt")
    expected = run(adapter, STREAM, seed=50)
    resumed = adapt(cnn(), method, **options)
    resumed.resume(path)
    assert all(torch.equal(a, b) for a, b in zip(expected, run(resumed, STREAM, seed=50), strict=True))


def test_what_is_no_state_is_refused_in_one_sentence(tmp_path):
    adapter = adapt(cnn(), "tent")
    run(adapter, STREAM)
    good = adapter.save(tmp_path / "good.pt")
    content = good.read_bytes()
    for name, broken in (("cut.pt", content[: len(content) // 2]), ("empty.pt", b""), ("text.pt", b"hello")):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=rf"^Adapter.resume: .*{name} holds no state of an Adapter"):
            adapter.resume(tmp_path / name)
    torch.save({"run": pytest.raises}, tmp_path / "code.pt")  # would run code if it were unpickled
    with pytest.raises(ValueError, match="holds no state of an Adapter"):
        adapter.resume(tmp_path / "code.pt")
    with pytest.raises(ValueError, match="there is no file"):
        adapter.resume(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="of method 'tent', got 3 of 'norm'"):
        adapter.resume(adapt(cnn(), "norm").save(tmp_path / "norm.pt"))
    with pytest.raises(ValueError, match="must have shape"):
        adapter.resume(adapt(vit(), "tent").save(tmp_path / "vit.pt"))
    adapter.resume(good)


WRITER = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_adapter import cnn, images
from ttaq.adaptation import adapt
torch.set_num_threads(1)
adapter = adapt(cnn(), "tent")
for number in range(10**6):
    adapter(images(4, number))
    adapter.save({path!r})
    print(number, flush=True)
"""


def test_a_process_that_is_killed_leaves_a_state_that_continues(tmp_path):
    path = tmp_path / "state.pt"
    script = WRITER.format(tests=os.path.dirname(__file__), path=str(path))
    for attempt in range(3):
        writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline().strip() == "0"
        time.sleep(0.05 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        adapter = adapt(cnn(), "tent")
        adapter.resume(path)
        expected = adapt(cnn(), "tent")
        assert adapter.steps > 0
        run_from_the_start(expected, adapter.steps)
        for name, tensor in expected.state_dict()["tensors"].items():
            assert torch.equal(tensor, adapter.state_dict()["tensors"][name])


def run_from_the_start(adapter, batches):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for number in range(batches):
        adapter(images(4, number))
    torch.set_num_threads(before)
