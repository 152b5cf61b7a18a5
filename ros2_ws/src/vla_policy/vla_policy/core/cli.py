"""How every command line ends: 0 done, 2 an error that the user can mend, 130 interrupted."""

import sys
from collections.abc import Callable

from vla_policy.core.errors import VlaError


def run(main: Callable[[], int]) -> int:
    """Calls `main` and turns a VlaError into one line on stderr and exit code 2, Ctrl-C into 130."""
    try:
        return main()
    except VlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing half-written is left; the same command continues", file=sys.stderr)
        return 130
