"""``python -m ke_ray``: the same commands as ``ke-ray``, for ``ray job submit``."""

from __future__ import annotations

from ke_ray.cli import main

if __name__ == "__main__":
    main()
