"""A Ray cluster of several nodes on this machine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

SMALL_STORE = 100 << 20
"""Bytes of a node's object store."""

FAST_DETECTION = {  # of a node that is gone: within two seconds instead of fifteen
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


@contextlib.contextmanager
def ray_cluster(environment: dict[str, str], head_cpus: int) -> Iterator[Cluster]:
    """Start a head in the environment's RAY_TMPDIR; the environment is made to fit it."""
    environment |= FAST_DETECTION
    environment["RAY_AUTH_MODE"] = "disabled"  # a cluster of one machine, gone with the test
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    Path(environment["RAY_TMPDIR"], "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in environment:
            if name.startswith("RAY_"):
                patch.setenv(name, environment[name])
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": head_cpus, "object_store_memory": SMALL_STORE}
        )
        try:
            yield cluster
        finally:
            cluster.shutdown()
