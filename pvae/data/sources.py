"""The named data sets. Each is a function of the cache folder and returns named arrays.

To add one: write the function (its docstring's first line is what ``pvae list`` shows) and name it
in ``SOURCES``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvae.data.audio import fsdd
from pvae.data.downloads import Remote, find, provide
from pvae.data.files import PARTS, Arrays, read_amat, read_arrays, read_idx, reading
from pvae.data.images import cifar10, omniglot
from pvae.data.sequences import SEQUENCES
from pvae.data.sprites import sprites, sprites_32, sprites_video
from pvae.errors import DataError

__all__ = ["SOURCES", "sources"]

_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_TORONTO = "https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"

_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
_STATIC_SHA256 = {
    "train": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "valid": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "test": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
_DENSITY = (
    "https://raw.githubusercontent.com/UCLA-StarAI/Density-Estimation-Datasets/"
    "37d53c1a8ba488d0a39e8c64bd3387577080b143/datasets/"
)
# Name -> features, SHA-256 of the bits of each split (rows in order, a byte each), a line on it.
_DENSITY_SETS = {
    "nltcs": (
        16,
        {
            "train": "73385b66808848c9fb7380fbe1581f56108da45a2c07c3d6fa4049d84e573243",
            "valid": "41bb0f2f25694dbc5f9d29a1a01df5a0832b7dfaf113fc52726c691130798391",
            "test": "72c1a049d0fa72c165ca12d830a7523f9e8365f25e4adb01f170c480dcded06a",
        },
        "21574 people by 16 yes-or-no answers on disability; 16181 train, 2157 valid, 3236 test.",
    ),
    "plants": (
        69,
        {
            "train": "3eaa89d06027568f7aea9f5ea3d64a0a81c6be2d146b5bbe8e012b76ce101f46",
            "valid": "eadd45dd8d884cf6e3cc0c88a0367ba44142e36bbcdf502c0e3cf461cb435bcd",
            "test": "52371eb14299c29040c94af09a820d5a3f9038765174728cfcf14eaccc3c0369",
        },
        "23215 plants by 69 regions they grow in; 17412 train, 2321 valid, 3482 test.",
    ),
    "accidents": (
        111,
        {
            "train": "b63961d2d3f58e9483548eb1934bcce59a0eddfedd68890d9ce6b94ece97802d",
            "valid": "ce07b64803467d02eacb70ff18e5e0057c2b590a583ea6535b8942dd28628641",
            "test": "308dc0ef11aaf82f64f0dd75aadb2a711e8a8ce2ab43d402bdc336de6e90ac0b",
        },
        "17009 traffic accidents by 111 circumstances; 12758 train, 1700 valid, 2551 test.",
    ),
    "mushrooms": (
        112,
        {
            "train": "bdc96ef5b74d908aa8f0665aad1a060c95c29e3f0140e0c004f538785e7f37f4",
            "valid": "a02bb4bbe086e12738e27dca9436d43823ee5c6c6a2f684eb4eff51ebf924ecc",
            "test": "02d2b76d77c88d8f7e9c4e5b6be68e16d242c5e9db55b16bea81a953c3823d3c",
        },
        "8124 mushrooms by 112 one-hot features; 2000 train, 500 valid, 5624 test.",
    ),
    "dna": (
        180,
        {
            "train": "922e56f8c6c678f5f5cf3199ac80782855dc0121db2afcb247af12e0e29f2a0f",
            "valid": "4793c5edd798f7c884a969820f1a9c65888d2d0205200384fce23b9ff8f1568f",
            "test": "183aa2a8acb410c9d950e26030da5b30e3176da04b2ed2566c03565a5c3479a1",
        },
        "3186 stretches of DNA as 180 bits; 1600 train, 400 valid, 1186 test.",
    ),
    "baudio": (
        100,
        {
            "train": "3be82f2593dc3104bc0019a83e063e96c864ad4a67c4e7868a2fb08fb354a836",
            "valid": "277ee26b24f409d062d196bfc5ddc683f28faa4f8f5f54f628b0d847f6b3d4c8",
            "test": "7462f3e8a88c8e97323c5fc800825369d34094f393b91b1e666e671b25e8968a",
        },
        "20000 listeners by 100 artists they have heard; 15000 train, 2000 valid, 3000 test.",
    ),
}

_SINGLE_CELL = {
    "pbmc4k": (
        "single_cell/pbmc4k_top2000.npz",
        "4434f7798880a99312ea5e401336b6d8aac5a2da82fd3788c9b00cbd5ee8ff64",
        "4271 blood cells by counts of 2000 genes, 8 types of cell; in PVAE_DATA only.",
    ),
    "smfish": (
        "single_cell/smfish.npz",
        "54748ba92ca18e95c89431c155355871d76fdab5b3537a023a3deec6e8ec1a64",
        "4530 cells of mouse cortex by counts of 33 genes, 6 types of cell; in PVAE_DATA only.",
    ),
}


def sources() -> dict[str, str]:
    """Name -> one-line description of every named data set."""
    return {name: (source.__doc__ or "").partition("\n")[0] for name, source in SOURCES.items()}


def digits(root: str | Path | None) -> Arrays:
    """1797 handwritten digits of 8x8 pixels, grey 0 to 16; comes with scikit-learn."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return {"x": bunch.images, "labels": bunch.target}


def mnist(root: str | Path | None) -> Arrays:
    """70000 handwritten digits of 28x28 pixels, grey 0 to 255; 50000 train, 10000 valid and test.

    LeCun, Bottou, Bengio & Haffner (1998). The last 10000 of the original training set are valid.
    """
    return _idx_set("mnist", "mnist", _MNIST, _MNIST_SHA256, root)


def fashion_mnist(root: str | Path | None) -> Arrays:
    """70000 photographs of clothes of 28x28 pixels, grey 0 to 255; split as mnist.

    Xiao, Rasul & Vollgraf (2017).
    """
    url, sha256 = _FASHION_MNIST, _FASHION_MNIST_SHA256
    return _idx_set("fashion-mnist", "fashion_mnist", url, sha256, root)


def mnist_static(root: str | Path | None) -> Arrays:
    """70000 handwritten digits of 28x28 fixed bits; 50000 train, 10000 valid, 10000 test.

    Larochelle & Murray (2011); the binarisation is by Salakhutdinov & Murray (2008).
    """
    folder = "mnist_static_binary"
    packed = find(f"{folder}/binarized_mnist_packed.npz", root)
    if packed is not None:
        bits = _unpack(packed, 784)
    else:
        files = {part: f"binarized_mnist_{part}.amat" for part in PARTS}
        remotes = {
            part: Remote(f"{folder}/{file}", _TORONTO + file, _STATIC_SHA256[part])
            for part, file in files.items()
        }
        bits = {
            part: read_amat(provide("mnist-static", remote, root), 784)
            for part, remote in remotes.items()
        }
    return {part: array.reshape(-1, 28, 28) for part, array in bits.items()}


def _binary_density(name: str) -> Callable[[str | Path | None], Arrays]:
    """One of the binary sets for density estimation, from packed bits or from lines of text.

    The splits are those of Lowd & Davis (2010), and of Larochelle & Murray (2011) for dna and
    mushrooms. The hash of a download is that of its bits: its text may end lines as it likes.
    """
    width, sha256, line = _DENSITY_SETS[name]

    def content(path: Path) -> bytes:
        return read_amat(path, width).tobytes()

    def read(root: str | Path | None) -> Arrays:
        packed = find(f"binary_density/{name}.npz", root)
        if packed is not None:
            return _unpack(packed, width)
        files = {part: f"{name}.{part}.data" for part in PARTS}
        remotes = {
            part: Remote(
                f"binary_density/{file}", f"{_DENSITY}{name}/{file}", sha256[part], content
            )
            for part, file in files.items()
        }
        return {
            part: read_amat(provide(name, remote, root), width) for part, remote in remotes.items()
        }

    read.__doc__ = line
    return read


def _single_cell(name: str) -> Callable[[str | Path | None], Arrays]:
    """Counts of genes in single cells, kept as the entries that are not zero (CSR).

    pbmc4k as prepared by Tian et al. (2021), smfish by Lopez et al. (2019).
    """
    file, sha256, line = _SINGLE_CELL[name]

    def read(root: str | Path | None) -> Arrays:
        path = find(file, root)
        if path is None:
            raise DataError(
                f"{name} needs {file}, which no public address offers in this form: set PVAE_DATA "
                "to a folder that holds it"
            )
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise DataError(f"{path} is not the {name} that is known here: its SHA-256 differs")
        with reading(path, "sparse counts"), np.load(path) as arrays:
            counts = np.zeros(tuple(arrays["shape"]), np.uint16)
            rows = np.repeat(np.arange(len(counts)), np.diff(arrays["indptr"]))
            counts[rows, arrays["indices"]] = arrays["data"]
            _, labels = np.unique(arrays["labels"], return_inverse=True)
        return {"x": counts, "labels": labels}

    read.__doc__ = line
    return read


def _unpack(path: Path, width: int) -> Arrays:
    """The bits of ``train``, ``valid`` and ``test``, packed along rows: ``(N, width)`` each."""
    arrays = read_arrays(path)
    with reading(path, "packed bits"):
        return {part: np.unpackbits(arrays[part], axis=1, count=width) for part in PARTS}


SOURCES: Mapping[str, Callable[[str | Path | None], Arrays]] = dict(
    sorted(
        {
            "cifar-10": cifar10,
            "digits": digits,
            "fashion-mnist": fashion_mnist,
            "fsdd": fsdd,
            "mnist": mnist,
            "mnist-static": mnist_static,
            "sprites": sprites,
            "sprites-32": sprites_32,
            "sprites-video": sprites_video,
            "omniglot": omniglot,
            **{name: _binary_density(name) for name in _DENSITY_SETS},
            **{name: _single_cell(name) for name in _SINGLE_CELL},
            **SEQUENCES,
        }.items()
    )
)


def _idx_set(
    name: str, folder: str, url: str, sha256: Mapping[str, str], root: str | Path | None
) -> Arrays:
    def read(file: str) -> NDArray[np.uint8]:
        remote = Remote(f"{folder}/{file}.gz", f"{url}{file}.gz", sha256[file])
        return read_idx(provide(name, remote, root))

    images, labels = read("train-images-idx3-ubyte"), read("train-labels-idx1-ubyte")
    cut = len(images) - len(images) // 6
    return {
        "train": images[:cut],
        "train_labels": labels[:cut],
        "valid": images[cut:],
        "valid_labels": labels[cut:],
        "test": read("t10k-images-idx3-ubyte"),
        "test_labels": read("t10k-labels-idx1-ubyte"),
    }
