"""`python -m ppo_ray` is `ppo-ray`."""

from ppo_ray.cli import main

main()
