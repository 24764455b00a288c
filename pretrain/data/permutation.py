"""Shuffled order without a shuffled list: the place of one index in O(1), whatever the size.

A Feistel network permutes the next power of four; indices that land outside are sent through again until they land
inside (cycle walking), which takes fewer than four rounds on average.
"""

_ROUNDS = 4
_MASK = (1 << 64) - 1


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` of range(size) goes in the permutation that `key` names.

    Raises:
        ValueError: the index is not in range(size).
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is not in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        index = _feistel(index, half, key)
        if index < size:
            return index


def mixed(*values: int) -> int:
    """A hash of whole numbers, 64 bits: keys and draws from (seed, step, place, ...)."""
    state = 0
    for value in values:
        state = _scrambled(state ^ _scrambled((value & _MASK) + 1))
    return state


def _feistel(index: int, half: int, key: int) -> int:
    mask = (1 << half) - 1
    left, right = index >> half, index & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (mixed(key, number, right) & mask)
    return left << half | right


def _scrambled(value: int) -> int:
    """SplitMix64: one step of its state and its finaliser."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
