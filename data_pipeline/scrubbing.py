"""Personal data in texts: e-mail addresses, phone numbers, and numbers that name a person.

Every pattern is checked by what it is a pattern of (check digits, lengths, ranges), because
scientific text is full of numbers that merely look so.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal.configs.corpus import ScrubConfig

_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]++@((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24})(?![\w-]|\.\w|@)"
)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")  # logo@2x.png

# A stretch of digits and what parts their groups: only there the patterns below are tried. It is
# taken whole, so that no text of brackets and blanks is gone through again and again.
_PARTING = "()./ \u00a0-"
_RUN = re.compile(rf"[+(\d][\d{_PARTING}]{{6,}}+")
_RUN_DIGITS = 4  # of an IP address
# Not within a number, a word, a DOI or a path, nor at the head or the tail of a longer number.
_BEFORE = r"(?<![\w/=#@$])(?<!\d[.,:–-])(?<![^\W\d][.-])"
_AFTER = r"(?![\w/@=]|[.,:–-]\d|-\w)"

_INTERNATIONAL = re.compile(
    r"(?<![\w/=+.])\+[1-9]\d{0,2}(?:[ .\u00a0-]?\(\d{1,4}\))?(?:[ .\u00a0-]?\d)++" + _AFTER
)
_NATIONAL = re.compile(  # North American Numbering Plan
    _BEFORE + r"(?:1[-. ])?(?:\([2-9]\d\d\)[ \u00a0]?[2-9]\d\d[-. ]|"
    r"[2-9]\d\d(?:-[2-9]\d\d-|\.[2-9]\d\d\.| [2-9]\d\d-))\d{4}" + _AFTER
)
_NAMED = re.compile(r"(?<![\w+(])[+(]?\d[\d()./ \u00a0-]{5,19}\d" + _AFTER)
_NAME = re.compile(
    r"\b(?:(?:tele)?phone|tel|fax|mobile|telefon|hotline|helpline)\.?"
    r"(?: ?(?:no|number|nr)\.?)?(?: is)?[:=]?\s?$",
    re.IGNORECASE,
)
_NAME_CHARACTERS = 24
_YEARS = re.compile(r"(?:1[89]|20)\d\d")
_DATE = re.compile(r"(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{4})")

_CARD = re.compile(_BEFORE + r"\d{4}[ -]?\d{4,6}(?:[ -]?\d{1,5}){1,3}" + _AFTER)
_CARD_GROUPS = ([4, 4, 4, 4], [4, 6, 5], [4, 6, 4], [4, 4, 4, 4, 3])
_CARD_ISSUERS = re.compile(
    r"4\d{15}|4\d{18}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|(?:6011\d\d|65\d{4}|64[4-9]\d{3})\d{10}|35(?:2[89]|[3-8]\d)\d{12}"
)
_ACCOUNT = re.compile(r"[A-Z]{2}\d\d(?<!\w....)(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_ACCOUNT_LENGTHS = dict(
    re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BR29BY28CH21CR22CY28CZ24DE22DK18DO28EE20EG29ES24FI18"
        "FO18FR27GB22GE22GI23GL18GR27GT28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20"
        "LU20LV21LY25MC27MD24ME22MK19MR27MT31MU30NL18NO15PK24PL28PS29PT25QA29RO24RS22SA24SC31SD18"
        "SE24SI19SK24SM27ST25SV28TL23TN24TR26UA29VA22VG24XK20",
    )
)
_SOCIAL_SECURITY = re.compile(_BEFORE + r"(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}" + _AFTER)
_IPV4 = re.compile(r"(?<![\w.:-])(?<!\w/)(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_NUMBERED = re.compile(
    r"(?:\bE\.?C\.?|\bv\.?|\bver\.?|\bversion|\bsection|\bsec\.|§+|\bchapter|\brelease)[ :]*$",
    re.IGNORECASE,
)
_ADDRESS_NAME = re.compile(r"\bIP(?:v4)?(?:[ -]addr(?:ess|\.)?)?(?: is)?[ :=]*$", re.IGNORECASE)
_IPV6 = re.compile(r"[23](?<![\w:.].)[0-9a-fA-F]{3}:[0-9a-fA-F:]{3,34}(?![\w:])")


def _digits(text: str) -> str:
    return "".join(filter(str.isdecimal, text))


def _is_email(match: re.Match[str]) -> bool:
    return not match[1].lower().endswith(_PICTURES)


def _is_international(match: re.Match[str]) -> bool:
    """At most 15 digits (E.164) and at least 8; one dot alone makes a decimal number of them."""
    found, digits = match[0], _digits(match[0])
    decimal = found.count(".") == 1 and not any(mark in found for mark in " -()\u00a0")
    return 8 <= len(digits) <= 15 and not decimal


def _is_named_phone(match: re.Match[str]) -> bool:
    """After a word such as `Tel.`; seven digits at least, and neither years nor a date."""
    before = match.string[max(0, match.start() - _NAME_CHARACTERS) : match.start()]
    if not _NAME.search(before):
        return False
    found = match[0]
    groups = re.findall(r"\d+", found)
    years = all(_YEARS.fullmatch(group) for group in groups)
    return 7 <= len(_digits(found)) <= 15 and not years and not _DATE.fullmatch(found)


def _is_card(match: re.Match[str]) -> bool:
    """Of a known issuer, in the usual groups, and its check digit right (ISO/IEC 7812)."""
    groups = re.split(r"[ -]", match[0])
    digits = "".join(groups)
    if len(groups) > 1 and [len(group) for group in groups] not in _CARD_GROUPS:
        return False
    if len(set(re.findall(r"[ -]", match[0]))) > 1 or not _CARD_ISSUERS.fullmatch(digits):
        return False
    doubled = "".join(str(2 * int(digit)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(map(int, doubled))) % 10 == 0


def _is_account(match: re.Match[str]) -> bool:
    """As long as its country has them, and its check digits right (ISO 13616)."""
    account = match[0].replace(" ", "")
    if str(len(account)) != _ACCOUNT_LENGTHS.get(account[:2]):
        return False
    return int("".join(str(int(sign, 36)) for sign in account[4:] + account[:4])) % 97 == 1


def _is_address(match: re.Match[str]) -> bool:
    """One that is routed in public; not a section, an enzyme or a version of four numbers."""
    found = match[0]
    if "." in found:
        before = match.string[max(0, match.start() - _NAME_CHARACTERS) : match.start()]
        if _NUMBERED.search(before):
            return False
        if max(map(int, found.split("."))) < 100 and not _ADDRESS_NAME.search(before):
            return False  # most likely a section: 2 % of addresses have small numbers alone
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


@dataclass(frozen=True)
class _Kind:
    """A pattern, what its matches must be besides, and the mark they get."""

    mark: str
    pattern: re.Pattern[str]
    check: Callable[[re.Match[str]], bool]


_EMAILS = (_Kind("<email>", _EMAIL, _is_email),)
_LETTERED_NUMBERS = (_Kind("<account>", _ACCOUNT, _is_account), _Kind("<ip>", _IPV6, _is_address))
_NUMBERS = (
    _Kind("<card>", _CARD, _is_card),
    _Kind("<ssn>", _SOCIAL_SECURITY, bool),
    _Kind("<ip>", _IPV4, _is_address),
)
_PHONES = (
    _Kind("<phone>", _INTERNATIONAL, _is_international),
    _Kind("<phone>", _NATIONAL, bool),
    _Kind("<phone>", _NAMED, _is_named_phone),
)


@dataclass(frozen=True)
class Scrubber:
    """Puts a mark in place of what the config names."""

    config: ScrubConfig

    def scrub(self, text: str, counts: Counter[str]) -> str:
        """Return the text with marks; each is counted under `scrub: <mark>`."""
        parts: list[str] = []
        end = 0
        for start, stop, mark in sorted(self._find(text)):
            if start >= end:  # of two that overlap the first one
                parts += (text[end:start], mark)
                end = stop
                counts[f"scrub: {mark}"] += 1
        return "".join((*parts, text[end:])) if parts else text

    def _find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Yield where marks belong: first character, the one after the last, mark."""
        everywhere: list[_Kind] = []
        in_runs: list[_Kind] = []
        if self.config.emails and "@" in text:
            everywhere += _EMAILS
        if self.config.numbers:
            everywhere += _LETTERED_NUMBERS
            in_runs += _NUMBERS
        if self.config.phones:
            in_runs += _PHONES
        spans = [(kind, 0, len(text)) for kind in everywhere]
        if in_runs:
            for run in _RUN.finditer(text):
                if sum(map(str.isdecimal, run[0])) < _RUN_DIGITS:
                    continue
                end = run.start() + len(run[0].rstrip(_PARTING)) + 3  # leaves room to look ahead
                spans += [(kind, run.start(), end) for kind in in_runs]
        for kind, begin, end in spans:
            for match in kind.pattern.finditer(text, begin, end):
                if kind.check(match):
                    yield match.start(), match.end(), kind.mark
