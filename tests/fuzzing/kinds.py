"""A kind of files: valid folders, the files that are mutated, and the loaders that read them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.fuzzing.inputs import Folder
from tests.fuzzing.mutations import Mutate

Load = Callable[[Path], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of files.

    Attributes:
        folders: valid folders to start from.
        donors: further files, whose parts mutations take.
        formats: the files that are mutated, with the mutation of their format.
        loaders: the functions that read the folder; the second number says for one in how many
            inputs, since some take long.
        words: strings that mean something to the loaders.
        shared: files of the working directory, which the mutated files may name.
        writes: whether loaders write to the folder.
    """

    folders: Sequence[Folder]
    formats: Mapping[str, Mutate]
    loaders: Sequence[tuple[Load, int]]
    words: Sequence[str] = ()
    donors: Sequence[Folder] = ()
    shared: Folder = dataclasses.field(default_factory=dict)
    writes: bool = False
