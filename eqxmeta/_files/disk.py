"""What an error of the operating system says of a file that was to be read: that it is damaged,
that it is not there, or, as all others (no permission, no memory, no network), nothing."""

import errno

# As the disk, or the file system's own checksums, tell of data that they cannot give back.
_DAMAGED = {"EIO", "EUCLEAN", "EBADMSG", "EILSEQ", "ENODATA", "EREMOTEIO"}
_ABSENT = {"ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "ESTALE"}


def is_damage(error: BaseException) -> bool:
    return isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _DAMAGED


def is_absence(error: BaseException) -> bool:
    return isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _ABSENT
