"""Made-up volumes, stored in any orientation, and their damage."""

import itertools
import json

import nibabel as nib
import numpy as np
from nibabel import orientations

AXES = [
    "".join(ends[axis] for axis, ends in zip(order, signs, strict=True))
    for order in itertools.permutations(range(3))
    for signs in itertools.product(("LPI", "RAS"), repeat=3)
]
# The names of cases, with their sizes, spacings and orientations.
CASES = {
    "a": ((12, 10, 9), (1, 1, 1), "RAS"),
    "b": ((9, 14, 11), (1, 1.5, 2), "LPS"),
    "c": ((7, 12, 13), (2, 1, 1), "PIR"),
    "d": ((10, 10, 10), (1, 1, 1), "SAL"),
    "e": ((11, 9, 12), (1, 2, 1), "ARI"),
}


def image_of(array, spacing=(1, 1, 1), axes="RAS", origin=(-20, 5, 7)):
    """Returns a NIfTI image of an array along the axes, stored in another order."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    image = nib.Nifti1Image(array, affine)
    ornt = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(axes)
    )
    return image.as_reoriented(ornt)


def case(name, channels=2):
    """Returns the array of a case `(x, y, z, channels)`, and its labels.

    The corner to the right, front and top is bright and labeled.
    """
    shape, _, _ = CASES[name]
    rng = np.random.default_rng(ord(name))
    array = rng.normal(size=(*shape, channels)).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    label[shape[0] // 2 :, shape[1] // 2 :, shape[2] // 2 :] = 1
    label[-2:, -2:, -2:] = 2
    array[..., 0] += 10 * label
    return array, label


def write_decathlon(folder, names="abcde", channels=2):
    """Writes a task of the Decathlon."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for name in names:
        _, spacing, axes = CASES[name]
        array, label = case(name, channels)
        array = array if channels > 1 else array[..., 0]
        for part, content in (("imagesTr", array), ("labelsTr", label)):
            image = image_of(content, spacing, axes)
            nib.save(image, folder / part / f"{name}.nii.gz")
    content = {
        "name": "made up",
        "modality": {str(i): f"m{i}" for i in range(channels)},
        "labels": {"0": "background", "1": "organ", "2": "tumour"},
        "training": [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
            for n in names
        ],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def cut(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_nan(array):
    array = array.copy()
    array[3, 3, 3] = np.nan
    return array


def turned(folder, name, degrees):
    path = folder / name
    image = nib.load(path)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rotation = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(image.dataobj, rotation @ image.affine), path)
