"""What a chapter checks: asserted and printed where it is checked, listed in a table at its end."""

import re
from collections import Counter

from IPython.display import Markdown

from mamba_book.reference import relative_error

__all__ = ["Checks", "unbroken"]

HEAD = "| claim | compared with | tolerance | result |\n|---|---|---|---|\n"


class Checks:
    """The comparisons that one chapter makes.

        checks = Checks()
        checks.close("scan in chunks", "Python loop", y, y_loop)
        checks.holds("`stream`", "`generate` with the same key", text == whole)
        checks.table()

    A comparison that fails raises AssertionError, which names the claim. One that holds prints one
    line, the first time, and becomes a row of the table. The lines hold no measured number, so that
    every machine prints the same.
    """

    def __init__(self):
        self.rows = []  # (claim, compared with, tolerance) of each check, in words

    def close(self, claim, against, got, want, tolerance=1e-5):
        """Check that two results agree.

        Args:
            claim: what is checked, in a few words. The table reads it as Markdown.
            against: what it is compared with.
            got: an array, or a tree of arrays.
            want: what it must agree with, of the same shapes.
            tolerance: bound of ``relative_error(got, want)``. With 0, every number must be equal.

        Raises:
            AssertionError: the error is above the tolerance or NaN, or the shapes differ.
        """
        bound = f"{tolerance:.0e}".replace("e-0", "e-")
        try:
            error = relative_error(got, want)
        except ValueError as mismatch:
            raise AssertionError(f"{claim}, compared with {against}: {mismatch}") from None
        if not error <= tolerance:
            raise AssertionError(
                f"{claim}, compared with {against}: relative error {error:.1e}, not within {bound}"
            )
        row = claim, against, f"relative error ≤ {bound}" if tolerance else "exact"
        self._note(row, f"agrees with {against} {f'to {bound}' if tolerance else 'exactly'}")

    def holds(self, claim, against, condition, how="equal"):
        """Check that a condition is true.

        Args:
            claim: what is checked, in a few words. The table reads it as Markdown.
            against: what it is compared with, or on what it is measured.
            condition: the truth of it.
            how: how it compares: "equal", "bit for bit", "at least 90 %".

        Raises:
            AssertionError: the condition is false.
        """
        if not condition:
            raise AssertionError(f"{claim}: not {how} ({against})")
        self._note((claim, against, how), f"{how} ({against})")

    def table(self):
        """All checks so far as a Markdown table. A check that was made several times is one row."""
        lines = []
        for (claim, against, tolerance), times in Counter(self.rows).items():
            result = "holds" if times == 1 else f"holds, {times:,} times"
            lines.append(f"| {claim} | {against} | {unbroken(tolerance)} | {result} |")
        return Markdown(HEAD + "\n".join(lines))

    def _note(self, row, words):
        """Keep the row, and print it the first time: a check in a loop prints one line."""
        if row not in self.rows:
            print(f"{row[0]}: {words}".replace("`", ""))  # the table is Markdown, the line is not
        self.rows.append(row)


def unbroken(words):
    """Replace the hyphen of 1e-5 by one at which no line of a table ends."""
    return re.sub(r"(\de)-(\d)", "\\1\u2011\\2", words)
