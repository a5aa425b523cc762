"""One operation a file: an eager reference first, then what executes it on a device."""
