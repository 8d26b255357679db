"""`python -m tawny` is `tawny`."""

from __future__ import annotations

from tawny.cli import main

if __name__ == "__main__":
    main()
