"""``python -m mm1_mlx.apps``: the command ``mm1`` where scripts have no fixed place."""

from .cli import main

if __name__ == "__main__":
    main()
