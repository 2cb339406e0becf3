"""The long run: see :mod:`.test_state_machine`."""
import sys

from tests.state_machine.test_state_machine import main

sys.exit(main())
