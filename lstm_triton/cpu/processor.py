"""What the processor is: all that compiled code depends on, and what plans do."""

import platform
import re
from functools import cache
from pathlib import Path

_FIELDS = r"(vendor_id|cpu family|model|model name|flags|Features|CPU implementer|CPU part|isa)\s*:"


@cache
def text() -> str:
    """Models and features of all processors (cores of one machine can differ), a line each."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join([platform.machine(), *sorted({line for line in lines if re.match(_FIELDS, line)})])


@cache
def multiplies_wide() -> bool:
    """Whether a core multiplies two vectors of 512 bits a cycle: Intel's with AVX-512, AMD's from Zen 5 (family 26) on.

    Others, as far as is known, multiply at most half of that: Zen 4 has such vectors, but takes them in two halves.
    """
    return is_wide(text())


def is_wide(described: str) -> bool:
    """`multiplies_wide` of a processor that `text` describes."""
    fields = dict(re.findall(r"^([^:\n]+?)\s*:\s*(.*)$", described, re.M))
    if "avx512f" not in fields.get("flags", "").split():
        return False
    family = fields.get("cpu family", "")
    newer = family.isdecimal() and int(family) >= 26
    return fields.get("vendor_id") == "GenuineIntel" or (fields.get("vendor_id") == "AuthenticAMD" and newer)
