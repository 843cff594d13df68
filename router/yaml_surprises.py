"""Plain scalars that YAML 1.1 reads as something else than people mean: `010` is 8, `1:04` is 64 and `no` is false."""

import re

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_REAL = re.compile(r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
#: What begins so is meant as a number, where Python takes it for one.
_BEGINS_AS_NUMBER = re.compile(r"[-+.]?[0-9]")


def surprise(text: str, *, value: object) -> tuple[str, str] | None:
    """What is wrong with `text`, which stands without quotes and is read as `value`, and the remedy; else None."""
    quoted = f"put it in quotes, '{text}', where it is text"
    match value:
        case bool():
            if text.lower() not in ("true", "false"):
                return f"is read as {str(value).lower()}", f"write true or false, or {quoted}"
        case int() | float():
            form = _WHOLE if isinstance(value, int) else _REAL
            if not form.fullmatch(text):
                return f"is read as {value}", f"write the number in plain decimal digits, or {quoted}"
        case str():
            if _BEGINS_AS_NUMBER.match(text) and _is_number(text):
                return "is read as text", f"write the number in plain decimal digits, or {quoted}"
        case None:
            return None  # told by who reads it: there is no value
        case _:
            return f"is read as a {type(value).__name__}", quoted
    return None


def _is_number(text: str) -> bool:
    for read in (float, _any_base):
        try:
            read(text)
        except ValueError:
            continue
        return True
    return False


def _any_base(text: str) -> int:
    return int(text, 0)
