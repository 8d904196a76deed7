"""Files made to harm: refused in under a second, with little memory, and nothing of theirs runs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyro
import pytest
import torch
from torch import nn

from pvae import checkpoints
from pvae.errors import RunError
from pvae.foreign import import_weights


class Payload:
    """Makes the marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def with_manifest(folder: Path, content: bytes, **changes) -> Path:
    """A checkpoint folder around any bytes, with the right hashes: its maker knows our format."""
    manifest = {
        "format": 2,
        "manifest_sha256": "0" * 64,
        "files": {"tensors.safetensors": hashlib.sha256(content).hexdigest()},
        "bytes": {"tensors.safetensors": len(content)},
        "tensors": {},
        **changes,
    }
    text = json.dumps(manifest, indent=2).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    folder.mkdir()
    (folder / "tensors.safetensors").write_bytes(content)
    (folder / "manifest.json").write_bytes(text.replace(b"0" * 64, digest, 1))
    return folder


def safetensors_file(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def reduce_as_pt(place: Path, marker: Path) -> Path:
    torch.save({"weight": torch.zeros(2), "other": Payload(marker)}, place / "a.pt")
    return place / "a.pt"


def reduce_as_param_store(place: Path, marker: Path) -> Path:
    pyro.param("scale", torch.ones(1), constraint=pyro.distributions.constraints.positive)
    state = pyro.get_param_store().get_state()
    state["constraints"]["scale"] = Payload(marker)
    torch.save(state, place / "store.pt")
    return place / "store.pt"


def reduce_as_optimizer_state(place: Path, marker: Path) -> Path:
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = Payload(marker)
    torch.save(state, place / "optimizer.pt")
    return place / "optimizer.pt"


def bare_pickle(place: Path, marker: Path) -> Path:
    (place / "a.pt").write_bytes(pickle.dumps({"weight": Payload(marker)}))
    return place / "a.pt"


def legacy_tar(place: Path, marker: Path) -> Path:
    with tarfile.open(place / "a.pt", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps(Payload(marker))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return place / "a.pt"


def legacy_stream(place: Path, marker: Path) -> Path:
    content = {"weight": torch.zeros(2), "other": Payload(marker)}
    torch.save(content, place / "a.pt", _use_new_zipfile_serialization=False)
    return place / "a.pt"


def zip_bomb(place: Path, marker: Path) -> Path:
    with zipfile.ZipFile(place / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        archive.writestr("a/data/0", bytes(64 << 20))
    return place / "a.pt"


def overlapping_zip(place: Path, marker: Path) -> Path:
    """Stored entries that claim to be larger than the file."""
    torch.save({"weight": torch.zeros(2)}, place / "a.pt")
    content = bytearray((place / "a.pt").read_bytes())
    start = content.find(b"PK\x01\x02")
    content[start + 20 : start + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (place / "a.pt").write_bytes(bytes(content))
    return place / "a.pt"


def pickle_as_checkpoint(place: Path, marker: Path) -> Path:
    return with_manifest(place / "c", pickle.dumps(Payload(marker)))


def torch_file_as_checkpoint(place: Path, marker: Path) -> Path:
    return with_manifest(place / "c", reduce_as_pt(place, marker).read_bytes())


def huge_header(place: Path, marker: Path) -> Path:
    return with_manifest(place / "c", struct.pack("<Q", 101_000_000) + bytes(2000))


def huge_header_that_is_there(place: Path, marker: Path) -> Path:
    """A sparse file: 200 MB of header that take no disk."""
    folder = with_manifest(place / "c", b"", bytes={"tensors.safetensors": 10})
    with (folder / "tensors.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)
    return folder


def overlapping_offsets(place: Path, marker: Path) -> Path:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = {"a": entry, "b": entry | {"data_offsets": [8, 24]}}
    return with_manifest(place / "c", safetensors_file(header, bytes(24)))


def offsets_beyond_the_file(place: Path, marker: Path) -> Path:
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    return with_manifest(place / "c", safetensors_file(header, bytes(16)))


def path_that_climbs(place: Path, marker: Path) -> Path:
    content = safetensors_file({})
    digest = hashlib.sha256(content).hexdigest()
    (place / "secret").write_bytes(content)
    files = {"tensors.safetensors": digest, "../secret": digest}
    return with_manifest(place / "c", content, files=files)


def deep_manifest(place: Path, marker: Path) -> Path:
    folder = with_manifest(place / "c", safetensors_file({}))
    (folder / "manifest.json").write_text("[" * 100_000)
    return folder


def endless_file(place: Path, marker: Path) -> Path:
    folder = with_manifest(place / "c", safetensors_file({}))
    (folder / "tensors.safetensors").unlink()
    (folder / "tensors.safetensors").symlink_to("/dev/zero")
    return folder


CASES = [
    reduce_as_pt, reduce_as_param_store, reduce_as_optimizer_state, bare_pickle, legacy_tar,
    legacy_stream, zip_bomb, overlapping_zip, pickle_as_checkpoint, torch_file_as_checkpoint,
    huge_header, huge_header_that_is_there, overlapping_offsets, offsets_beyond_the_file,
    path_that_climbs, deep_manifest, endless_file,
]  # fmt: skip


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_refused_quickly_and_nothing_runs(make: Callable[[Path, Path], Path], tmp_path: Path):
    marker = tmp_path / "marker"
    (tmp_path / "files").mkdir()
    path = make(tmp_path / "files", marker)
    read = checkpoints.load_tensors if path.is_dir() else import_weights
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(RunError) as caught:
        read(path)
    assert time.process_time() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10  # KiB, on Linux
    assert str(tmp_path / "files") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_the_payload_is_a_real_one(tmp_path):
    """Opened the careless way it does run: what is refused above is no dud."""
    path = reduce_as_pt(tmp_path, tmp_path / "marker")
    torch.load(path, weights_only=False)
    assert (tmp_path / "marker").exists()


def test_state_dicts_of_others_are_imported(tmp_path):
    layer = nn.Linear(3, 2)
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    other = nn.Linear(3, 2)
    other.load_state_dict(import_weights(tmp_path / "a.pt"))
    assert torch.equal(layer.weight, other.weight)
    torch.save({"epoch": 3, "model": layer.state_dict()}, tmp_path / "b.pt")
    assert import_weights(tmp_path / "b.pt").keys() == {"model.weight", "model.bias"}
    from safetensors.torch import save_file

    save_file(layer.state_dict(), tmp_path / "c.safetensors")
    assert torch.equal(import_weights(tmp_path / "c.safetensors")["bias"], layer.bias)


@pytest.mark.parametrize("name", ["gone.pt", "empty.pt", "none.pt", "gone.safetensors"])
def test_what_holds_no_weights_is_refused(tmp_path, name):
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(RunError, match=name):
        import_weights(tmp_path / name)
