"""A user's mistake ends in one clear line and exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch


class UserError(Exception):
    """Something the user can mend. The message is one line that names the value and the remedy."""


def run_main(main: Callable[[], object]) -> None:
    """Runs a script's main function; mistakes and what the system refuses become one line on stderr and
    exit status 2, Ctrl-C exit status 130."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _stop(str(error))
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; Python must not try to flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _stop(f"{error.strerror or error}: '{error.filename}'; check the path and its permissions")
    except torch.cuda.OutOfMemoryError:
        _stop("the GPU's memory is full; use a smaller --batch_size and --k; the last checkpoint is intact")
    except KeyboardInterrupt:
        print("\ninterrupted; the last checkpoint is that of the last complete epoch", file=sys.stderr)
        sys.exit(130)


def _stop(message: str) -> None:
    sys.stdout.flush()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
