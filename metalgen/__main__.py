"""``python -m metalgen``: the command line."""

from __future__ import annotations

from metalgen.cli import main

if __name__ == "__main__":
    main()
