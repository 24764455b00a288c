"""What can be wrong with data: a collection that cannot be used, or one sample of it."""


class DataError(ValueError):
    """Data that cannot be used; names the file and what to do."""


class SampleError(ValueError):
    """One sample that cannot be used; says why. It is left out and counted."""
