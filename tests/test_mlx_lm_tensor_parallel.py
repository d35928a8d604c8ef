"""A model in two parts, each rank with its share of the KV heads in pools of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
import tensor_parallel_rank

RANK = Path(tensor_parallel_rank.__file__)


def free_ports(count):
    """Return ports that are free now; they stay reserved until all are known."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.skipif(
    not mx.distributed.is_available("ring"), reason="this MLX has no ring to connect ranks"
)
def test_two_ranks_say_what_one_says(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    paths = [str(RANK.parent), str(RANK.parents[1])]
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK],
            env={
                **os.environ,
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(hosts),
                "PYTHONPATH": os.pathsep.join(paths),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    one = tensor_parallel_rank.run(None)
    assert first == second
    assert first["single"] == one["single"]
    assert first["batch"] == one["batch"]
    assert first["block_bytes"] * 2 == one["block_bytes"]
