"""A folder that one run works in at a time, of whatever thread, process or container."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from mm1_mlx.errors import CheckpointError

LOCK = "lock"


class Hold:
    """A folder, made if it is not there, and held until it is let go.

    What says so is a lock on a file in it. The system takes it back from a run that
    ends, however that ends, and knows it by the open file: not by a process number,
    which another container may have too. NFS hands it on to other machines.

    Args:
        folder: of files alone.

    Raises:
        CheckpointError: another run holds it, its disk cannot say, or it is a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: int | None = None
        found = folder.exists()
        try:
            self._take()
        except CheckpointError:
            raise
        except BaseException:
            # Stopped in between, where it may have made the folder but does not hold it.
            self.release()
            if not found:
                self._leave_none()
            raise

    def clear(self, *kept: str) -> None:
        """Take away its files but for those of these names, unless it went elsewhere."""
        if not self._is_there():
            return
        for path in self.folder.iterdir():
            if path.name not in (LOCK, *kept):
                path.unlink()

    def remove(self) -> None:
        """Take the folder away and let it go."""
        with suppress(OSError):
            self.clear()
            self._remove_empty()
        self.release()

    def release(self) -> None:
        """Let the folder go, once."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _leave_none(self) -> None:
        """Take the folder away if nobody has put anything but a lock there.

        On a disk without locks it stays once it has one, which may be another run's.
        """
        with suppress(CheckpointError, OSError):
            self._take()
            if [path.name for path in self.folder.iterdir()] == [LOCK]:
                self._remove_empty()
        self.release()
        # A full disk has room for a folder, and none for what would lie in it.
        with suppress(OSError):
            self.folder.rmdir()

    def _remove_empty(self) -> None:
        if self._is_there():
            # Last: who comes now finds none, or an empty folder.
            (self.folder / LOCK).unlink()
            self.folder.rmdir()

    def _take(self) -> None:
        """Lock it, again where another run has just taken it away."""
        while not self._is_there():
            self.release()
            made = self._make()
            with suppress(FileNotFoundError):
                # For writing too: else NFS does not lock it.
                self._file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    self._lock(self._file, made)
                except BaseException:
                    self.release()
                    raise

    def _make(self) -> bool:
        """Whether the folder was not there before."""
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            if not self.folder.is_dir():
                raise CheckpointError(
                    f"{str(self.folder)!r} is a file; give the name of a folder"
                ) from None
            return False
        return True

    def _lock(self, file: int, made: bool) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another run is at work in {str(self.folder)!r}; wait for its end, or "
                "choose another name"
            ) from None
        except OSError as error:
            # Some disks have no locks, but a folder is made by one run alone.
            if not made:
                raise CheckpointError(
                    f"{str(self.folder)!r} is there, and its disk cannot say whether a "
                    f"run is at work in it ({error.strerror}); if none is, remove it"
                ) from None

    def _is_there(self) -> bool:
        """Whether the locked file is the one that lies in the folder."""
        if self._file is None:
            return False
        try:
            found = (self.folder / LOCK).stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._file))
