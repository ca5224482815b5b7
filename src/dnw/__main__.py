"""``python -m dnw``."""

from dnw.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
