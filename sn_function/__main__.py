"""`python -m sn_function doctor`: see :mod:`sn_function.doctor`."""
import sys

from sn_function import doctor

if __name__ == '__main__':
    sys.exit(doctor.main(sys.argv[1:]))
