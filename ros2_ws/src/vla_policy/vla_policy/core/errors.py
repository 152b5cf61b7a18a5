"""One small tree of the errors that a user can cause and mend.

Every message is one line: what is wrong, where, what was expected, what to do. Command lines print it and exit with 2.
"""


class VlaError(Exception):
    """An error whose message is written for the user; anything else that escapes is a defect.

    A message stays one line whatever a library's text brings into it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line for part in message.splitlines() if (line := part.strip())))


class PolicyError(VlaError):
    """A checkpoint that is not what its configuration says, or a request that the policy cannot answer."""


class ArtefactError(VlaError):
    """A file that is missing, truncated, of another kind or version, or made from other parents."""


class ContractError(VlaError):
    """A topic contract, a message or a bag that does not fit it."""


class BudgetError(VlaError):
    """A budget that no allocation can meet."""


class DataError(VlaError):
    """Input data that cannot be used: wrong type, wrong shape, not finite."""


class EngineError(VlaError):
    """A policy or engine that cannot decide: it does not run, or its output is not finite. Nothing may move on it."""
