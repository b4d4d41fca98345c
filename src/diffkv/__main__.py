"""`python -m diffkv`: the same as the console command."""

import sys

from diffkv.cli import main

if __name__ == "__main__":
    sys.exit(main())
