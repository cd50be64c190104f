"""The plan of a run before anything is started, without Ray: where every actor goes, and the memory it takes.

`request` makes what Ray is asked for, `assign` finds where that fits on a cluster, `memory`, `learner` and `engine`
estimate what each process holds, and `plan` puts all of it together. A run that starts asks Ray for the same request.
"""

from ppo_ray.plan.cluster import ClusterShape, Node
from ppo_ray.plan.demand import ActorSpec
from ppo_ray.plan.plan import Plan, find_emulated_dtypes, make_plan
from ppo_ray.plan.request import ResourceRequest, make_request
from ppo_ray.plan.sizes import ModelSizes

__all__ = [
    "ActorSpec",
    "ClusterShape",
    "ModelSizes",
    "Node",
    "Plan",
    "ResourceRequest",
    "find_emulated_dtypes",
    "make_plan",
    "make_request",
]
