"""`python -m sn_function`: see :mod:`sn_function.cli`."""
import sys

from sn_function.cli import main

if __name__ == '__main__':
    sys.exit(main())
