"""Personal data in texts: e-mail addresses, phone numbers, and numbers that name a person.

Every pattern is checked by what it is a pattern of (check digits, lengths, ranges), because
scientific text is full of numbers that merely look so.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from shoal.configs.corpus import ScrubConfig

_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]++@((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24})(?![\w-]|\.\w|@)"
)
_FILE_ENDINGS = (
    "png",
    "jpg",
    "jpeg",
    "gif",
    "svg",
    "webp",
    "js",
    "css",
    "html",
    "py",
)  # logo@2x.png

# Not within a number, a word, a DOI or a path, nor at the head or the tail of a longer number.
_BEFORE = r"(?<![\w/=#@])(?<![\d\w][.,:–-])(?<!\$)"
_AFTER = r"(?![\w/@=]|[.,:–-]\d)"

_INTERNATIONAL = re.compile(
    r"(?<![\w/=+.])\+(?:[1-9]\d{0,2})(?:[ .\-\u00a0]?\(0?\d{0,4}\))?(?:[ .\-\u00a0]?\d{1,12}){1,6}"
    + _AFTER
)
_NATIONAL = re.compile(  # North American Numbering Plan
    _BEFORE + r"(?:\+?1[-. ])?(?:\([2-9]\d\d\)[ \u00a0]?[2-9]\d\d[-. ]|"
    r"[2-9]\d\d(?:-[2-9]\d\d-|\.[2-9]\d\d\.| [2-9]\d\d-))\d{4}" + _AFTER
)
_NAMED = re.compile(
    r"\b(?:(?:tele)?phone|tel|fax|mobile|telefon|hotline|helpline)\b\.?"
    r"(?: ?(?:no|number|nr)\b\.?)?(?: is)?[:=]?\s?"
    r"([+(]?\d[\d()./\- \u00a0]{5,20}\d)" + _AFTER,
    re.IGNORECASE,
)
_YEARS = re.compile(r"(?:1[89]|20)\d\d")
_DATE = re.compile(r"(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{4})")

_CARD = re.compile(_BEFORE + r"\d{4}[ -]?\d{4,6}(?:[ -]?\d{1,5}){1,3}" + _AFTER)
_CARD_GROUPS = ([4, 4, 4, 4], [4, 6, 5], [4, 6, 4], [4, 4, 4, 4, 3])
_CARD_ISSUERS = re.compile(
    r"4\d{15}|4\d{18}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}|(?:6011\d\d|65\d{4}|64[4-9]\d{3})\d{10}|35(?:2[89]|[3-8]\d)\d{12}"
)
_ACCOUNT = re.compile(r"\b[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_ACCOUNT_LENGTHS = dict(
    re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BR29BY28CH21CR22CY28CZ24DE22DK18DO28EE20EG29ES24FI18"
        "FO18FR27GB22GE22GI23GL18GR27GT28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20"
        "LU20LV21LY25MC27MD24ME22MK19MR27MT31MU30NL18NO15PK24PL28PS29PT25QA29RO24RS22SA24SC31SD18"
        "SE24SI19SK24SM27ST25SV28TL23TN24TR26UA29VA22VG24XK20",
    )
)
_SOCIAL_SECURITY = re.compile(
    _BEFORE + r"(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}" + r"(?![\w/@=]|[.,:–-]\d|-\w)"
)
_IPV4 = re.compile(r"(?<![\w.:/-])(?<!//)(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_NUMBERED = re.compile(
    r"(?:\bE\.?C\.?|\bv\.?|\bver\.?|\bversion|\bsection|\bsec\.|§+|\bchapter|\brelease)[ :]*$",
    re.IGNORECASE,
)
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{3,34}(?![\w:])")


@dataclass(frozen=True)
class Scrubber:
    """Puts a mark in place of what the config names."""

    config: ScrubConfig

    def scrub(self, text: str, counts: Counter[str]) -> str:
        """Return the text with marks; each is counted under `scrub: <mark>`."""
        if self.config.emails and "@" in text:
            text = _mark(_EMAIL, "<email>", _is_email, text, counts)
        if self.config.numbers:
            text = _mark(_CARD, "<card>", _is_card, text, counts)
            text = _mark(_ACCOUNT, "<account>", _is_account, text, counts)
            text = _mark(_SOCIAL_SECURITY, "<ssn>", lambda _: True, text, counts)
            text = _mark(_IPV4, "<ip>", _is_address, text, counts)
            text = _mark(_IPV6, "<ip>", _is_address, text, counts)
        if self.config.phones:
            if "+" in text:
                text = _mark(_INTERNATIONAL, "<phone>", _is_international, text, counts)
            text = _mark(_NATIONAL, "<phone>", lambda _: True, text, counts)
            text = _mark(_NAMED, "<phone>", _is_named_phone, text, counts, group=1)
        return text


def _mark(
    pattern: re.Pattern[str],
    mark: str,
    check: Callable[[re.Match[str]], bool],
    text: str,
    counts: Counter[str],
    group: int = 0,
) -> str:
    parts: list[str] = []
    end = 0
    for match in pattern.finditer(text):
        if check(match):
            parts += (text[end : match.start(group)], mark)
            end = match.end(group)
            counts[f"scrub: {mark}"] += 1
    return "".join((*parts, text[end:])) if parts else text


def _digits(text: str) -> str:
    return "".join(filter(str.isdecimal, text))


def _is_email(match: re.Match[str]) -> bool:
    return not match[1].lower().endswith(_FILE_ENDINGS)


def _is_international(match: re.Match[str]) -> bool:
    """At most 15 digits (E.164) and at least 8; one dot alone makes a decimal number of them."""
    found, digits = match[0], _digits(match[0])
    decimal = found.count(".") == 1 and not any(mark in found for mark in " -()\u00a0")
    return 8 <= len(digits) <= 15 and not decimal


def _is_named_phone(match: re.Match[str]) -> bool:
    """Seven digits at least, and neither years nor a date."""
    found = match[1]
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
        if max(map(int, found.split("."))) < 100:
            return False
        if _NUMBERED.search(match.string[max(0, match.start() - 12) : match.start()]):
            return False
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False
