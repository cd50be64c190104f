"""What a person sees of a run: progress, curves, samples, the summary at the end."""

from ppo_ray.report.curves import draw_curves
from ppo_ray.report.plan import print_plan
from ppo_ray.report.progress import StepProgress
from ppo_ray.report.samples import write_samples
from ppo_ray.report.summary import print_agreements, print_evaluation, print_summary

__all__ = [
    "StepProgress",
    "draw_curves",
    "print_agreements",
    "print_evaluation",
    "print_plan",
    "print_summary",
    "write_samples",
]
