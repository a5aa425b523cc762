"""Which branch to compute at which step: one policy a file, all of them a `CacheSchedule`."""
