"""Two nodes on one machine: starts node.sh twice, one process each, on loopback addresses.

Usage: python rehearse.py --config smoke.yaml [--key value ...]

On machines with GPUs the two processes still compute on the CPU, as smoke.yaml says.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NODES = 2


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(port: int) -> dict[str, str]:
    """What both nodes are told; what is set already wins."""
    beside_this_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    told = {
        "HEAD": "127.0.0.1",
        "ADDRESS": "127.0.0.1",
        "PORT": str(port),
        "NODES": str(NODES),
        "PER_NODE": "1",
        "WAIT": "120",
        "SCRIPT": str(HERE / "train.py"),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": "1",
    }
    return {**told, **os.environ, "PATH": beside_this_python}


def main(arguments: list[str]) -> int:
    """Exit status of the first node that fails, 0 if none does."""
    command = ["bash", str(HERE / "node.sh"), *arguments]
    env = environment(free_port())
    nodes = [subprocess.Popen(command, env=env) for _ in range(NODES)]
    try:
        while any(node.poll() is None for node in nodes):
            if any(node.poll() for node in nodes):
                break
            time.sleep(0.2)
    finally:
        for node in nodes:  # torchrun ends its processes on SIGTERM
            if node.poll() is None:
                node.terminate()
        codes = [node.wait() for node in nodes]
    return next((abs(code) for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
