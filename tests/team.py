"""Processes of a team, started as torchrun would: Gloo on the CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HEADER = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
import ttaq
from ttaq import distributed
"""


def environment(rank, size, port):
    told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return os.environ | {key: str(value) for key, value in told.items()} | {"OMP_NUM_THREADS": "1"}


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(code, size=2):
    """Start `size` processes of a piece of code."""
    command, at = [sys.executable, "-W", "ignore", "-P", "-c", HEADER + code], port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=environment(rank, size, at), **pipes) for rank in range(size)]


def finish(processes, seconds=300):
    """Wait for processes; return (status, output, errors) of each."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def run(code, size=2):
    """Run a piece of code in `size` processes, all of which must succeed; return what they printed."""
    done = finish(start(code, size))
    for status, _, errors in done:
        assert status == 0, errors
    return [output for _, output, _ in done]
