"""``python -m torch_flowprune``."""

from torch_flowprune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
