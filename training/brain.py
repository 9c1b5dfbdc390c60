"""The ICBM152 template, which is part of the package nilearn, as two volumes.

The template is the average brain of 152 people (Fonov et al., 2011). Its left and right
halves are mirror images, so the front is for the test and the back for the training.
"""

import dataclasses

import nibabel as nib
import numpy as np

from training.volumes import Layout

RESOLUTION = 2  # mm


def layout():
    """Returns the `Layout` of both halves: T1 in, tissues out.

    The class of a voxel is the largest of grey matter, white matter, the rest of the
    brain mask, and outside.
    """
    from nilearn import datasets

    image = datasets.load_mni152_template(resolution=RESOLUTION)
    parts = [
        np.asarray(load(resolution=RESOLUTION).dataobj, np.float32)
        for load in (
            datasets.load_mni152_brain_mask,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
        )
    ]
    mask, grey, white = parts
    shares = [1 - mask, mask - grey - white, grey, white]
    label = nib.Nifti1Image(np.argmax(shares, axis=0).astype(np.uint8), image.affine)
    middle = image.shape[1] // 2  # The second axis goes from back to front.
    back, front = slice(None, middle), slice(middle, None)
    return Layout(
        ["outside", "rest", "grey_matter", "white_matter"],
        [0, 1, 2, 3],
        None,
        ["T1"],
        False,
        [Half("back", image.slicer[:, back], label.slicer[:, back])],
        [Half("front", image.slicer[:, front], label.slicer[:, front])],
    )


@dataclasses.dataclass(frozen=True)
class Half:
    """A half of the template, with the attributes of `volumes.Files`."""

    name: str
    voxels: nib.Nifti1Image
    classes: nib.Nifti1Image
    images = ("the template of nilearn",)
    label = "the labels of nilearn"

    @property
    def identity(self):
        import nilearn

        return [self.name, nilearn.__version__, RESOLUTION]

    def open(self, num_channels):
        return [self.voxels], self.classes
