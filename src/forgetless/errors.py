"""Every error a user may cause, with the exit status the command line gives it. The message is the whole story: what, where, why, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ForgetlessError(Exception):
    """Base class; an error that is not one of the classes below is a defect of ours (exit 1)."""

    exit_code = 1


class ConfigError(ForgetlessError):
    """Command line, configuration, method options, no module matched, a foreign or locked output folder."""

    exit_code = 2


class DataError(ForgetlessError):
    """Data or model missing, malformed, or refused; a bad row; a label outside the set."""

    exit_code = 4


class GateRejected(ForgetlessError):
    """The gate refused the new model. It is kept aside; the accepted one stays current."""

    exit_code = 3


class Diverged(ForgetlessError):
    """The loss stopped being a number. The last committed task is kept."""

    exit_code = 5


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or the list of all of them when nothing is close.

    >>> nearest("gorb", ["gorp", "seqft"])
    "; did you mean 'gorp'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
