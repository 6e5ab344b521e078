"""`python -m timm_smpconv`: the same as the command `timm-smpconv`."""

import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
