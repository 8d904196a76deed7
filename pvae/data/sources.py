"""The named data sets. Each is a function of the cache folder and returns named arrays.

To add one: write the function (its docstring's first line is what ``pvae list`` shows) and name it
in ``SOURCES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvae.data.downloads import Remote, find, provide
from pvae.data.files import PARTS, Arrays, read_amat, read_arrays, read_idx, reading

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
        arrays = read_arrays(packed)
        with reading(packed, "packed bits"):
            bits = {part: np.unpackbits(arrays[part], axis=1, count=784) for part in PARTS}
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


SOURCES: Mapping[str, Callable[[str | Path | None], Arrays]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "mnist-static": mnist_static,
}


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
