"""Ray clusters for tests: several nodes on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STORE = 80 * 2**20  # bytes; containers have little shared memory


@contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """A ray.cluster_utils.Cluster of nodes with a core each."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    try:
        for _ in range(nodes - 1):
            made.add_node(num_cpus=1, object_store_memory=STORE)
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@contextmanager
def two_nodes() -> Iterator[str]:
    """Address of a cluster."""
    with cluster(2) as made:
        yield made.address
