"""`python -m ppo_ray` is `ppo-ray`: a file in the current folder that is named like a library does not run instead."""

import sys

if not sys.flags.safe_path:  # else the current folder is not searched at all
    sys.path.append(sys.path.pop(0))

from ppo_ray.cli import main

main()
