"""docs/licences.md names every package that we ask for, as its metadata does, and none that Apache-2.0 cannot need."""

import re

from .licences import DEVELOPMENT, PAGE, licence, listed, needed, page

MAY_BE_NEEDED = {
    *(
        "Apache-2.0",
        "MIT",
        "BSD",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "0BSD",
        "ISC",
        "Zlib",
        "CC0-1.0",
        "BSL-1.0",
        "PSF-2.0",
    ),
    *("CNRI-Python", "Unlicense", "HPND", "MPL-2.0", "Apache-2.0 WITH LLVM-exception", "MIT-0"),
}
"""Permissive, or (MPL) with conditions for its own files alone."""


def test_every_package_is_listed_with_what_its_metadata_says() -> None:
    assert listed().keys() == needed().keys(), "run python tests/licences.py"
    installed = {name: said for name in needed() if (said := licence(name))}
    assert {name: listed()[name] for name in installed} == installed, "run python tests/licences.py"
    assert page() == PAGE.read_text(encoding="utf-8")


def test_what_a_user_installs_may_be_used_with_apache_2() -> None:
    ours = {name: listed()[name] for name, uses in needed().items() if not set(uses) <= set(DEVELOPMENT)}
    assert {"torch", "bitsandbytes"} <= ours.keys()
    parts = {name: re.split(r" AND | OR ", said.strip("()")) for name, said in ours.items()}
    assert not {name: said for name, said in parts.items() if not set(said) <= MAY_BE_NEEDED}
