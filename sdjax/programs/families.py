HELD_OUT = frozenset({"max_magnitude", "projection_removal"})
FAMILIES = HELD_OUT


def families_of(source, *, slots=3):
    return frozenset()
