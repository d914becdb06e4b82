"""Files and folders: paths, locks, atomic writes, a writing thread."""
