"""`python -m sn_function`: see :mod:`sn_function.cli`.

`doctor` needs the standard library only: see :mod:`sn_function.doctor`.
"""
import sys

if __name__ == '__main__':
    if sys.argv[1:2] == ['doctor']:
        from sn_function import doctor
        sys.exit(doctor.main(sys.argv[1:]))
    from sn_function import cli
    sys.exit(cli.main())
