"""What `test_a_disk_that_is_full` runs on a disk of 400 KiB, in FOLDER/disk: prints JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from fastmerge.checkpoint import CheckpointError
from fastmerge.jobs import engine
from fastmerge.methods import Average, Ties

from .jobs import hash_folder, make_plan


def main(folder: Path) -> None:
    disk = folder / "disk"
    out, filler = disk / "out", disk / "earlier"
    folders = {name: folder / name for name in ("base", "expert0", "expert1", "expert2")}
    engine.run(make_plan(folders, Average()), out)
    before = hash_folder(out)
    texts = {"tokenizer.json": b"x" * 150_000}
    plan = make_plan(folders, Ties(), texts=texts)
    weights = (out / "model.safetensors").stat().st_size
    found = {"size": weights + 150_000, "left": [], "kept": []}
    usage = shutil.disk_usage

    def attempt(name: str, free: int, honest: bool) -> None:
        """Run the job with so many bytes free, known to it or not."""
        filler.write_bytes(b"")
        filler.write_bytes(b"x" * max(0, usage(disk).free - free))
        if not honest:
            shutil.disk_usage = lambda path: type(usage(disk))(0, 0, 1 << 40)
        try:
            engine.run(plan, out, overwrite=True)
        except CheckpointError as error:
            found[name] = str(error)
        shutil.disk_usage = usage
        found["left"].append(sorted(path.name for path in disk.iterdir()))
        found["kept"].append(hash_folder(out) == before)

    attempt("noticed", weights + 50_000, True)
    attempt("weights", weights - 10_000, False)
    attempt("texts", weights + 50_000, False)
    filler.unlink()
    engine.run(plan, out, overwrite=True, resume=True)
    engine.run(plan, folder / "expected")
    found["resumed"] = hash_folder(out) == hash_folder(folder / "expected")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
