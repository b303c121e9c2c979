"""Personal data, replaced by what it was: <email>, <ip>, <phone>, <card>.

E-mail and public IP addresses as FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.7), and phone and card
numbers. All by form only: names and street addresses stay.
"""

import dataclasses
import ipaddress
import re

_EMAIL_NAME = re.compile(r"[A-Za-z0-9_+%-]+(?:[.'][A-Za-z0-9_+%-]+)*\Z")
_EMAIL_NAME_LENGTH = 64  # RFC 5321, section 4.5.3.1.1
# Not "logo@2x.png", a picture for screens of double resolution.
_EMAIL_DOMAIN = re.compile(
    r"@(?!\d+x\.)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9_])"
)

# Global unicast, 2000::/3, is all that is given to anybody (RFC 4291, section 2.4). "20:15:30" is none.
_IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}(?<![\w:.]....):(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")

# Stretches with five digits or more: the expressions for numbers are tried on these only.
_DIGITS = re.compile(r"[0-9](?:[ \u00a0().\-–/]{0,3}[0-9]){4,}")
_GAP = r"[ \u00a0.\-–/]?"
# ITU-T E.164: calling codes of one, two and three digits. In North America, area codes begin with 2 to 9.
_CALLING_CODE = (
    r"(?:1(?=\D{0,2}[2-9])|7|2(?:[07]|[1-689]\d)|3(?:[0-469]|[578]\d)|4(?:[013-9]|2\d)|5(?:[1-8]|[09]\d)|"
    r"6(?:[0-6]|[789]\d)|8(?:[1246]|[03578]\d)|9(?:[0-58]|[679]\d))"
)
# "+49 (0)30 1234567", "(+49) 30/1234567", "0049 30 1234567"
_INTERNATIONAL = (
    rf"(?:\(?\+{_CALLING_CODE}\)?{_GAP}|00 ?{_CALLING_CODE}[ \u00a0.\-/])(?:\(\d{{1,5}}\){_GAP})?\d(?:{_GAP}\d){{5,12}}"
)
# "(212) 555-0123", "1-212-555-0123", "212.555.0123"
_NORTH_AMERICAN = (
    r"(?:1[ \u00a0.\-–])?(?:\([2-9]\d\d\)[ \u00a0.-]?[2-9]\d\d[ .\-–]|[2-9]\d\d(?P<mark>[.\-–])[2-9]\d\d(?P=mark))\d{4}"
)
_IPV4 = r"\d{1,3}(?:\.\d{1,3}){3}"
_CARDS = r"\d{4}(?P<four>[ \u00a0-]?)\d{4}(?P=four)\d{4}(?P=four)\d{1,7}|3\d{3}(?P<six>[ \u00a0-])\d{6}(?P=six)\d{4,5}"
_NOT_AFTER = r"(?![\w%€£¥]|[.,:/\-–]\d)"
_NUMBER = re.compile(
    rf"(?<![\w.,+/#=-])(?:(?P<ip>{_IPV4})(?![\w-]|\.\d)|(?P<card>{_CARDS}){_NOT_AFTER}|"
    rf"(?P<phone>{_INTERNATIONAL}|{_NORTH_AMERICAN}){_NOT_AFTER})"
)
# Any other number is one of a phone only after a word that says so.
_CALL = re.compile(
    r"(?:\b(?:tel|tél|telephone|téléphone|telefon|teléfono|telefono|telefone|phone|ph|fon|fax|mobile|mobil|cell|handy|"
    r"whatsapp|call|dial|hotline)\b|☎|📞)[\s.:#)]{0,4}(?:(?:us|me|now|at|on|no|nr|number)\b[\s.:#]{0,3}){0,3}\Z",
    re.IGNORECASE,
)
_CALL_LENGTH = 40
_CALLED = re.compile(rf"\(?\d{{1,5}}\)?(?:{_GAP}\(?\d{{1,8}}\)?){{1,6}}{_NOT_AFTER}")
_NOT_DIGIT = re.compile(r"\D")

# ISO/IEC 7812 prefixes and lengths: Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay.
_CARD = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|"
    r"3(?:0[0-5]|[689]\d)\d{11}|(?:6011|64[4-9]\d|65\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)  # twice a digit, its digits added


@dataclasses.dataclass(frozen=True)
class Personal:
    """Replaces personal data, never drops a page; called again, it finds nothing more.

    - E-mail addresses.
    - IPv4 and IPv6 addresses of the public Internet; private and reserved ones stay, and so do those of four single
      digits, which are far more often versions and sections.
    - Phone numbers of 7 to 15 digits: with a calling code ("+49 30 1234567"), in North American form ("(212) 555-0123",
      "212-555-0123"), and any after a word such as "phone". Other numbers, dates and prices stay.
    - Numbers of payment cards, by prefix, length and checksum.
    """

    def __call__(self, text: str) -> str:
        return self.replace(text)[0]

    def replace(self, text: str) -> tuple[str, dict[str, int]]:
        """The text, and how many of each kind were replaced: "email", "ip", "phone", "card"."""
        counts = dict.fromkeys(("email", "ip", "phone", "card"), 0)
        for find in (_emails, _ipv6_addresses, _numbers):
            while found := list(find(text)):  # again, as what stood beside a number may be one itself
                parts, end = [], 0
                for start, stop, kind in found:
                    parts += text[end:start], f"<{kind}>"
                    end = stop
                    counts[kind] += 1
                text = "".join([*parts, text[end:]])
        return text, counts


def is_card_number(digits: str) -> bool:
    """Whether prefix, length and checksum (Luhn's, ISO/IEC 7812-1 annex B) are those of a payment card."""
    if not _CARD.fullmatch(digits):
        return False
    values = [int(digit) for digit in reversed(digits)]
    return (sum(values[::2]) + sum(_DOUBLED[value] for value in values[1::2])) % 10 == 0


# Each gives the places in order: start, end, kind.


def _emails(text: str):
    end = 0
    if "@" not in text:
        return
    for domain in _EMAIL_DOMAIN.finditer(text):
        begin = max(end, domain.start() - _EMAIL_NAME_LENGTH - 1)
        name = _EMAIL_NAME.search(text[begin : domain.start()])
        if name and len(name.group()) <= _EMAIL_NAME_LENGTH:
            end = domain.end()
            yield begin + name.start(), end, "email"


def _ipv6_addresses(text: str):
    if "::" in text or text.count(":") >= 7:
        for match in _IPV6.finditer(text):
            if _is_public(match.group()):
                yield match.start(), match.end(), "ip"


def _numbers(text: str):
    for stretch in _DIGITS.finditer(text):
        at, end = stretch.span()
        at -= 2 if text[max(0, at - 2) : at] in ("(+", "+(") else text[at - 1 : at] in ("(", "+")
        if _CALL.search(text[max(0, at - _CALL_LENGTH) : at]) and (match := _CALLED.match(text, at)):
            if 7 <= len(_NOT_DIGIT.sub("", match.group())) <= 15:
                yield at, match.end(), "phone"
                at = match.end()
        # What follows the stretch is seen by the conditions at the end of a number.
        for match in _NUMBER.finditer(text, at, end + 2):
            kind, digits = match.lastgroup, _NOT_DIGIT.sub("", match.group())
            if (
                kind == "phone"
                and 7 <= len(digits.removeprefix("00")) <= 15
                or kind == "card"
                and is_card_number(digits)
                or kind == "ip"
                and len(digits) > 4
                and _is_public(match.group())
            ):
                yield *match.span(), kind


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # looks like one only: "300.1.1.1"
        return False
