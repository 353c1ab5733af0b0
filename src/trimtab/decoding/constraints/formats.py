"""The formats of JSON schema that are enforced, and how.

llguidance knows ten. Four of them are written out as patterns here since its own allow too much: days that a
month does not have, leap seconds at any minute, host names that are too long or not in ASCII's own form. Some
more are kept as patterns of their own or by a format that they contain. All others are annotations.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from trimtab.decoding.constraints.patterns import StringForm

NATIVE = frozenset({"duration", "email", "ipv4", "ipv6", "uuid", "uri"})
# Written in ASCII where more would be allowed: what is made is right, if not all that could be.
NARROWED = {"iri": "uri", "idn-email": "email", "idn-hostname": "hostname", "iri-reference": "uri-reference"}

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)


def _leap_seconds() -> str:
    """The last second of a day in UTC, as clocks show it that are off by whole quarters of an hour."""
    texts = []
    for sign in (1, -1):
        for offset in range(0, 24 * 60, 15):
            local = (24 * 60 - 1 + sign * offset) % (24 * 60)
            clock, off = divmod(local, 60), divmod(offset, 60)
            texts.append((clock, f"[{'+' if sign > 0 else '-'}]{off[0]:02}:{off[1]:02}"))
    return "|".join(f"{hour:02}:{minute:02}:60(?:[.][0-9]+)?{zone}" for (hour, minute), zone in texts)


_TIME = (
    "(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:[.][0-9]+)?(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
    f"|23:59:60(?:[.][0-9]+)?[Zz]|{_leap_seconds()})"
)
# A label of 1 to 63 characters without "--" in the third and fourth place, which is for other alphabets.
_LABEL = (
    "[A-Za-z0-9](?:[A-Za-z0-9]|[A-Za-z0-9-][A-Za-z0-9]|[A-Za-z0-9-]{2}[A-Za-z0-9]"
    "|[A-Za-z0-9-](?:[A-Za-z0-9][A-Za-z0-9-]|-[A-Za-z0-9])[A-Za-z0-9-]{0,58}[A-Za-z0-9])?"
)
_PART = "(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"
_FIRST = "(?:[A-Za-z0-9._~!$&'()*+,;=@-]|%[0-9A-Fa-f]{2})"
_IN_HOST = "(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*"
_USER = "(?:(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@)?"
_HOST = f"(?://{_USER}{_IN_HOST}(?::[0-9]*)?(?:/{_PART})?)"
_PATH = f"(?:/|/{_FIRST}{_PART}|{_FIRST}+(?:/{_PART})?)?"
_TAIL = (
    "(?:[?](?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*)?"
    "(?:#(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*)?"
)
_VARIABLE = (
    "(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2})(?:[.]?(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2}))*(?::[1-9][0-9]{0,3}|[*])?"
)
_TEMPLATE = (
    '(?:[^\\u0000- \\u007f"%<>\\\\^`{|}]|%[0-9A-Fa-f]{2}'
    f"|[{{][+#./;?&=,!@|]?{_VARIABLE}(?:,{_VARIABLE})*[}}])*"
)
_POINTER = "(?:/(?:[^~/]|~[01])*)*"

PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[Tt]{_TIME}$",
    "hostname": f"^{_LABEL}(?:[.]{_LABEL})*$",
    "uri-reference": f"^(?:[A-Za-z][A-Za-z0-9+.-]*:(?:{_HOST}|{_PATH})|{_HOST}|{_PATH}){_TAIL}$",
    "uri-template": f"^{_TEMPLATE}$",
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(?:0|[1-9][0-9]*)(?:#|{_POINTER})$",
}
_LENGTHS = {"hostname": 253}
ENFORCED = frozenset(NATIVE | PATTERNS.keys() | NARROWED.keys())


def as_schema(name: str) -> dict[str, Any] | None:
    """A string schema that llguidance keeps exactly and that stands for a format; None: an annotation."""
    name = NARROWED.get(name, name)
    if name in NATIVE:
        return {"format": name}
    if name not in PATTERNS:
        return None
    longest = {"maxLength": _LENGTHS[name]} if name in _LENGTHS else {}
    return {"pattern": PATTERNS[name], **longest}


@lru_cache(maxsize=64)
def form(name: str) -> StringForm:
    """What checks texts for an enforced format."""
    schema = as_schema(name)
    assert schema is not None, name
    return StringForm("format", schema)
