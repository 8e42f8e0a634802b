"""``python -m d2scale``, and what the command ``d2scale`` starts."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line, and return its exit status.

    Ctrl-C while it is being imported, which takes a second, ends the process without a traceback.
    """
    interrupted = signal.getsignal(signal.SIGINT)
    # Whoever starts a program in the background may have it ignore Ctrl-C.
    if interrupted is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from d2scale import cli

    signal.signal(signal.SIGINT, interrupted)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
