"""Where every actor goes, and the memory that takes: known before anything is started, without Ray.

`request` says what Ray is asked for, `assign` where that fits on a cluster, `memory` what each process holds, and
`plan` all of it together. The launch of a run asks Ray for the same request.
"""

from ppo_ray.plan.cluster import ClusterShape, Node
from ppo_ray.plan.demand import ActorSpec
from ppo_ray.plan.plan import Plan, plan
from ppo_ray.plan.request import ResourceRequest, make_resource_request
from ppo_ray.plan.sizes import ModelSizes

__all__ = ["ActorSpec", "ClusterShape", "ModelSizes", "Node", "Plan", "ResourceRequest", "plan", "make_resource_request"]
