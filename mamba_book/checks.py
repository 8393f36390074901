"""The table with which every chapter closes: what was compared with what, and how closely."""

import re
from collections import Counter

from IPython.display import Markdown

HEAD = "| claim | compared with | tolerance | result |\n|---|---|---|---|\n"


def checks_table(checks):
    """The comparisons that a chapter has made, each passed, as a table; repeated ones are counted.

    checks: (claim, compared with, tolerance), in order. The tolerance is a number, the bound of the
    relative difference, or words such as "bit for bit".
    """
    lines = []
    for (claim, against, tolerance), times in Counter(checks).items():
        result = "holds" if times == 1 else f"holds, {times:,} times"
        lines.append(f"| {claim} | {against} | {unbroken(bound(tolerance))} | {result} |")
    return Markdown(HEAD + "\n".join(lines))


def unbroken(words):
    """No line of a table ends within 1e-5: its hyphen becomes the one that does not break."""
    return re.sub(r"(\de)-(\d)", "\\1\u2011\\2", words)


def bound(tolerance):
    """1e-05 -> "relative difference < 1e-5", and 0 -> "exact"; words stay."""
    if isinstance(tolerance, str):
        return tolerance
    digits = f"{tolerance:.0e}".replace("e-0", "e-")
    return f"relative difference < {digits}" if tolerance else "exact"
