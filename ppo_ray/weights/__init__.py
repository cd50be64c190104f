"""The policy's weights on their way from the learner to the engines: versioned, checksummed, acknowledged."""

from ppo_ray.weights.acks import PublishedWeights, WeightAck, check_acks
from ppo_ray.weights.checksums import weights_checksum
from ppo_ray.weights.manifest import TensorEntry, WeightManifest, num_buckets
from ppo_ray.weights.snapshot import Buffers, WeightSnapshot
from ppo_ray.weights.wire import Wire

__all__ = [
    "Buffers",
    "PublishedWeights",
    "TensorEntry",
    "WeightAck",
    "WeightManifest",
    "WeightSnapshot",
    "Wire",
    "check_acks",
    "num_buckets",
    "weights_checksum",
]
