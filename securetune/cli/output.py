"""How the command line speaks: plain lines on standard output, one red block for an error."""

import contextlib
import errno
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from securetune.errors import GateFailed, SecuretuneError

ERROR_EXIT = 2
"""Exit status where something was wrong: the recipe, the data, a key, the machine."""
GATE_EXIT = 1
"""Exit status where everything worked and the release gate, or a check, said no."""


def console() -> Console:
    """Return the console for results; text is printed as it is, never cut or read as markup."""
    return Console(soft_wrap=True, markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def clean_exit() -> Iterator[None]:
    """Turn the errors securetune raises on purpose into one red block and an exit status.

    Anything else is a defect and keeps its traceback.

    Yields:
        Nothing.

    Raises:
        SystemExit: With status 1 for a failed release gate, 130 after Ctrl-C, 2 for every other error.
    """
    try:
        yield
    except SecuretuneError as error:
        print_error(str(error), title=type(error).__name__)
        sys.exit(GATE_EXIT if isinstance(error, GateFailed) else ERROR_EXIT)
    except OSError as error:
        if error.errno == errno.EPIPE:
            sys.stderr.close()  # the reader of a pipe has left: not an error, and Python must not report it
            sys.exit(GATE_EXIT)
        print_error(_describe_os_error(error), title="MachineError")
        sys.exit(ERROR_EXIT)
    except KeyboardInterrupt:
        print_error("Stopped. Start the same command with --resume to go on.", title="Interrupted")
        sys.exit(130)


def print_error(message: str, *, title: str) -> None:
    """Print an error in red on standard error.

    Args:
        message: One or several lines.
        title: The kind of error.
    """
    errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    errors.print(Text.assemble((f"{title}: ", "bold red"), (message, "red")))


def _describe_os_error(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    remedy = " Free some space and start again with --resume." if error.errno == errno.ENOSPC else ""
    return f"{name}{error.strerror or error}.{remedy}"
