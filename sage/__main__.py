"""The `sage` program. Ctrl-C ends it without a traceback even while Python is importing the rest."""

import signal


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's `&` ignores the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sage import cli

    cli.main()


if __name__ == "__main__":
    main()
