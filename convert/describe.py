"""What a user should know of a source before it is fetched."""

from mm1_mlx import hub
from mm1_mlx.files import safe_join
from mm1_mlx.hub import SourceInfo

from .folder import Folder
from .place import SUBFOLDERS, licence_of, local_folder
from .shards import weight_files


def describe(name: str) -> SourceInfo:
    """Name, size in bytes and licence of a source, before anything is downloaded.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    folder = local_folder(name)
    if folder is None:
        return hub.describe(name, SUBFOLDERS)
    inside = [[], *([inner] for inner in Folder(name, folder).subfolders)]
    size = sum(
        safe_join(folder, *names, file).stat().st_size
        for names in inside
        for file in weight_files(folder, *names)
    )
    return SourceInfo(name, size, licence_of(folder))
