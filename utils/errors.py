"""A user's mistake ends in one clear line and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message is one line that names the value and the remedy."""


def run_main(main: Callable[[], object]) -> None:
    """Runs a script's main function; a UserError becomes one line on stderr and exit status 2, Ctrl-C exit status 130."""
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the last checkpoint is that of the last complete epoch", file=sys.stderr)
        sys.exit(130)
