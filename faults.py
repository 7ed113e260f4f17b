"""What the system refuses (a full disk, a folder that cannot be written to), in one line instead of a traceback."""

import errno
import os
import re
from collections.abc import Iterator

_WORDS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk's quota is used up; free some space",
    errno.EFBIG: "the file would be larger than the system allows; raise the limit (ulimit -f)",
    errno.EROFS: "it lies on a read-only disk; use another folder",
    errno.EACCES: "permission denied; use another folder, or change its permissions",
    errno.EPERM: "not permitted; use another folder, or change its permissions",
    errno.EEXIST: "something else stands in its place; move it away",
    errno.ENOTDIR: "a file stands where a folder is needed; use another folder",
    errno.EISDIR: "a folder stands where a file is written; move it away",
    errno.ENOTEMPTY: "a folder that is not empty stands in its place; move it away",
    errno.ENAMETOOLONG: "the name is too long; use a shorter one",
    errno.ELOOP: "its links lead in a circle; use another path",
    errno.EIO: "the disk cannot be read or written; look at it",
    errno.ESTALE: "the network's disk is gone; mount it again",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; close some",
}
_USERS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG} | {
    errno.ELOOP
}
"""What another folder mends."""
_KEPT = "what is finished is kept, and the same command continues"


def refusal(error: BaseException) -> tuple[str, str] | None:
    """(what the system refused, what to do about it) where an error is of that kind itself; None for any other."""
    words = _WORDS.get(_refused(error)[0])
    if words is None:
        return None
    problem, _, remedy = words.partition("; ")
    return problem, remedy


def system_words(error: BaseException) -> tuple[int, str] | None:
    """(exit code, one line) for an error that came of what the system refused; None for any other."""
    for each in _chain(error):
        if isinstance(each, RuntimeError) and "home directory" in str(each):
            return 2, "a path begins with ~ and a name that no user of this machine has; write it out"
        number, place = _refused(each)
        if number in _WORDS:
            return 2 if number in _USERS else 1, f"{place or 'writing'}: {_WORDS[number]}; {_KEPT}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it came from."""
    seen: set[int] = set()
    above: BaseException | None = error
    while above is not None and id(above) not in seen:
        seen.add(id(above))
        yield above
        above = above.__cause__ or above.__context__


def _refused(error: BaseException) -> tuple[int, str]:
    """(errno or 0, the file where it is known) of an error of the system; libraries keep both in their words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    said = str(error)
    if (found := re.search(r"\(os error (\d+)\)", said)) is not None:
        return int(found[1]), ""
    # torch says neither which file nor why
    written = "PytorchStreamWriter failed" in said or ("inline_container.cc" in said and "unexpected pos" in said)
    return (errno.ENOSPC, "") if written or "No space left on device" in said else (0, "")
