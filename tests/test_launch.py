"""Who joins whom: flags, Slurm, Cloud TPU pods, and programs that stay alone."""

from __future__ import annotations

import http.server
import threading

import pytest

from dfs_jax import launch
from dfs_jax.launch import Launch, choose_launch, read_metadata
from dfs_jax.types import UserError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
}
CLUSTER, ALONE = Launch(), None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        (SLURM, CLUSTER),
        ({**SLURM, "SLURM_NTASKS": "1"}, ALONE),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # srun --ntasks=1 in a larger job
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "16"}, CLUSTER),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, ALONE),  # the batch script, not its srun
        ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, CLUSTER),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ALONE),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, CLUSTER),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c", "JAX_PLATFORMS": "cpu"}, ALONE),
    ],
)
def test_clusters_are_found(environment, expected):
    assert choose_launch(None, None, None, environment) == expected
    assert choose_launch(None, 1, None, environment) is ALONE  # and can be refused
    assert choose_launch("node1:2222", 2, 0, environment) == ("node1:2222", 2, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", None, None), "--num_processes and --process_id are missing"),
        (("a:1", 2, None), "--process_id is missing"),
        ((None, 2, 1), "--coordinator is missing"),
        ((None, 1, 1), "--coordinator is missing"),
        (("a:1", 0, 0), "--num_processes must be at least 1, got 0"),
        (("a:1", 2, 2), "between 0 and 1, for --num_processes=2, got 2"),
        (("a:1", 2, -1), "got -1"),
        (("a", 2, 1), "HOST:PORT with a port from 1 to 65535, the same for all processes, got 'a'"),
        (("a:65536", 2, 1), "from 1 to 65535"),
        (("a:0", 2, 1), "from 1 to 65535"),
        (("http://a:1", 2, 1), "HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    coordinator, count, index = flags
    with pytest.raises(UserError, match=message):
        choose_launch(coordinator, count, index, {})


def test_addresses_of_both_kinds():
    assert choose_launch("[::1]:22", 2, 1, {}) == ("[::1]:22", 2, 1)


@pytest.mark.parametrize(
    ("hosts", "expected"), [("1:2:10.0.0.1,1:2:10.0.0.2", CLUSTER), ("a", ALONE)]
)
def test_the_metadata_server_tells_of_a_pod(monkeypatch, hosts, expected):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path.endswith("worker-network-endpoints")
            self.send_response(200 if found and self.headers["Metadata-Flavor"] else 404)
            self.end_headers()
            self.wfile.write(hosts.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setattr(launch, "_is_tpu_machine", lambda: True)
    try:
        environment = {"GCE_METADATA_IP": address}
        assert choose_launch(None, None, None, environment) == expected
        skipped = {**environment, "TPU_SKIP_MDS_QUERY": "1"}
        assert choose_launch(None, None, None, skipped) is ALONE
    finally:
        server.shutdown()
        server.server_close()
    assert read_metadata(address) == ""
