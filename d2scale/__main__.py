"""``python -m d2scale``, and what the command ``d2scale`` starts."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line, and return its exit status.

    Ctrl-C while it is being imported, which takes a second, ends the process without a traceback.
    """
    # Whoever starts a program in the background may have it ignore Ctrl-C.
    heeds_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeds_interrupts:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from d2scale import cli

    if heeds_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
