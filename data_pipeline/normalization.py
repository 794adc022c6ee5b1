"""Unicode and whitespace normalisation: the first thing that is done to a text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from shoal.configs.corpus import NormalizeConfig

_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# Controls other than tab and line feed; and what no reader sees: soft hyphens, zero-width blanks,
# word joiners, byte order marks. Joiners that shape letters (U+200C, U+200D) stay.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u2028\u2029\u2060\ufeff]")
_EMPTY_LINES = re.compile("\n{3,}")


@dataclass(frozen=True)
class Normalizer:
    """What the config asks for, as a function of a text; doing it twice changes nothing more."""

    config: NormalizeConfig

    def normalize(self, text: str) -> str:
        """Return the text in the chosen Unicode form with plain line ends and few blanks.

        Blanks within a line and at its start stay: they carry the layout of code and tables.
        """
        if self.config.whitespace:
            text = _plain_lines(text)
        if self.config.unicode != "none" and not text.isascii():
            text = unicodedata.normalize(self.config.unicode, text)
            if self.config.whitespace:  # NFKC makes blanks of some marks
                text = _trim(text)
        return text


def _plain_lines(text: str) -> str:
    """Make line ends line feeds, take out what cannot be seen, and trim."""
    if _INVISIBLE.search(text):
        text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    return _trim(text)


def _trim(text: str) -> str:
    """Take blanks from line ends, all but one of empty lines, and what surrounds the text."""
    text = "\n".join(map(str.rstrip, text.strip().split("\n")))
    return _EMPTY_LINES.sub("\n\n", text) if "\n\n\n" in text else text
