"""A user's mistake ends in one clear line and exit status 2."""

import os
import sys
from collections.abc import Callable

import torch

from utils.base.signals import Stopped, stop


class UserError(Exception):
    """Something the user can fix. The message is one line that names the value and the remedy.

    Attributes:
        of_one_rank: one of several processes may raise it alone; other errors are raised by all, rank 0 prints them.
    """

    of_one_rank = False


def run_main(main: Callable[[], object]) -> None:
    """Runs a script's main function. UserError and OSError become one line on stderr and exit status 2, Ctrl-C and
    SIGTERM exit status 130 and 143."""
    # None where a service started this process without them.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        with stop.handled():
            main()
        sys.stdout.flush()
    except Stopped as stopped:
        sys.stdout.flush()
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except UserError as error:
        _exit(str(error), error.of_one_rank)
    except BrokenPipeError:
        # The reader of our output (head, less) has ended; Python must not try to flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        named = f": '{error.filename}'; check the path and its permissions" if error.filename else ""
        _exit(f"{error.strerror or error}{named}")
    except torch.cuda.OutOfMemoryError:
        _exit(
            "the GPU's memory is full; use smaller mini-batches (in training --max_images_per_step); files are intact"
        )


def _exit(message: str, of_one_rank: bool = True) -> None:
    sys.stdout.flush()
    rank = os.environ.get("RANK", "0")
    if rank == "0" or of_one_rank:
        who = f"rank {rank}: " if "RANK" in os.environ and of_one_rank else ""
        print(f"error: {who}{' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
