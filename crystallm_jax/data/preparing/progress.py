"""Progress of a preparation on a terminal: share of the input read, rate, time left."""

import sys
import time

from tqdm import tqdm

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}|{postfix} [{elapsed}, {remaining} left]"


class Progress:
    """A bar over the bytes of the input; quiet unless there is a terminal. Call `close` when done."""

    def __init__(self, total_bytes: int, *, shown: bool) -> None:
        self._total = max(total_bytes, 1)
        self._shown = shown and sys.stderr.isatty()
        self._bytes = self._records = self._dropped = self._first = 0
        self._since = time.monotonic()
        self._bar: tqdm | None = None

    def add_bytes(self, count: int) -> None:
        """Note that further bytes of the input were read."""
        self._bytes += count
        if self._bar is not None:
            self._bar.update(count)

    def begin(self, records: int) -> None:
        """Start bar and clock, after the records that an earlier run had done."""
        self._records = self._first = records
        self._since = time.monotonic()
        if self._shown:
            self._bar = tqdm(
                total=self._total, initial=self._bytes, desc="prepare", smoothing=0, bar_format=_FORMAT
            )

    def add_records(self, count: int, dropped: int) -> None:
        """Note that further records are done."""
        self._records += count
        self._dropped += dropped
        if self._bar is not None:
            rate = (self._records - self._first) / max(time.monotonic() - self._since, 1e-9)
            text = f"{self._records:,} crystals, {rate:,.0f}/s, {self._dropped:,} dropped"
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Leave the last state of the bar on the terminal."""
        if self._bar is not None:
            self._bar.close()
