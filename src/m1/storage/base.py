"""What every storage can do."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol


class Storage(Protocol):
    """Where stages keep what they make.

    A key is a relative POSIX path; the key of a folder names every file below it.
    """

    def ensure_usable(self) -> None:
        """Raise `M1Error` with the remedy unless this storage can be written now."""

    def uri(self, key: str) -> str:
        """Full address of `key`: an absolute path or an s3 uri."""

    def exists(self, key: str) -> bool:
        """Whether there is a file `key`; a folder does not count."""

    def read_bytes(self, key: str) -> bytes:
        """Content of the small file `key`; FileNotFoundError when there is none."""

    def open_read(self, key: str) -> BinaryIO:
        """The file `key` as a seekable stream; FileNotFoundError when there is none."""

    def write_bytes(self, key: str, data: bytes) -> None:
        """Create or replace the file `key`; never seen in part."""

    def create_bytes(self, key: str, data: bytes) -> bool:
        """Create the file `key` unless there is one; whether this call made it.

        Of any number of processes that try at once, one succeeds.
        """

    def upload_file(self, path: Path, key: str) -> None:
        """Make `key` hold the bytes of a local file."""

    def upload_folder(self, folder: Path, key: str) -> None:
        """Make `key` hold exactly the files of `folder`."""

    def download_folder(self, key: str, folder: Path) -> None:
        """Make `folder` hold exactly the files below `key`; it appears only when complete."""

    def remove_folder(self, key: str) -> None:
        """Remove every file below `key`, hidden ones too."""

    def hold(self, key: str, *, owner: str, timeout_seconds: float) -> AbstractContextManager[None]:
        """Keep other processes from entering a block with the same `key`.

        It saves them work that would be done twice. Correctness must not rest on it: a holder that
        was cut off for long may find that another entered.

        Args:
            key: Name of a hidden file that stands for the lock.
            owner: Who asks; a holder that died is followed at once by its own successor.
            timeout_seconds: Longest wait for another holder.

        Raises:
            TimeoutError: Another holder is alive after that time; the message says who.
        """

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Sorted keys of all files below the folder `prefix`."""
