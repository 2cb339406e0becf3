"""All rules in one machine."""
from tests.state_machine.calls import Calls
from tests.state_machine.copies import Copies
from tests.state_machine.faults import Faults
from tests.state_machine.hooks import Hooks
from tests.state_machine.renewals import Renewals
from tests.state_machine.weights import Weights


class Machine(Calls, Faults, Weights, Renewals, Hooks, Copies):
    pass
