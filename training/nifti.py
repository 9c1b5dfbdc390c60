"""NIfTI files: their checks, and volumes along the axes of the body.

A volume lies along the axes if its voxels go from left to right, from back to front and
from bottom to top (RAS+). Files store voxels in any other order.
"""

import dataclasses
import zlib

import nibabel as nib
import numpy as np
from nibabel import affines, processing

from revnet_tf._files import replacing

# The network sees a file whose axes are off by a small angle as if they were not. The
# positions of its voxels stay as they are.
MAX_OBLIQUITY = 15  # degrees


@dataclasses.dataclass(frozen=True)
class Volume:
    """A volume along the axes, at the spacing of a run.

    Attributes:
        channels: `float32` array `(x, y, z, channels)`.
        affine: array `(4, 4)`, from the indices of a voxel to its position in mm.
    """

    channels: np.ndarray
    affine: np.ndarray


def opened(files, num_channels):
    """Opens the files of a volume, and checks their headers.

    Args:
        files: paths, of one file with all channels, or of one file for each channel.
        num_channels: int, the number of channels.

    Returns:
        A list of `nibabel` images, whose voxels are not read yet.

    Raises:
        OSError: a file cannot be opened.
        ValueError: the files hold another number of channels, or lie apart, or have
            axes that are not those of the body.
    """
    if len(files) not in (1, num_channels):
        raise ValueError(
            f"{files[0]}: expected a file for each of {num_channels} channels, found "
            f"{len(files)}; give all of them."
        )
    in_file = num_channels // len(files)
    images = [_opened(file, in_file) for file in files]
    for file, image in zip(files, images, strict=True):
        check_place(file, image, files[0], images[0])
    return images


def _opened(file, num_channels):
    """Opens a file, and checks its header."""
    if not file.is_file():
        # To open a pipe would wait for a writer.
        reason = "is no file" if file.exists() else "is missing"
        raise FileNotFoundError(f"{file} {reason}.")
    try:
        image = nib.load(file)
    except (
        OSError,
        EOFError,
        zlib.error,
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
    ) as error:
        raise OSError(
            f"{file} is no NIfTI file, or damaged: {error}; bring back a copy."
        ) from error
    if not isinstance(image, nib.Nifti1Pair):
        raise OSError(f"{file} is no NIfTI file; convert it.")
    if image.get_data_dtype().kind not in "iuf":
        raise ValueError(
            f"{file}: expected voxels of one number, found {image.get_data_dtype()}; "
            "convert the file."
        )
    shape = image.shape
    fits = len(shape) >= 3 and (*shape[3:], *[1] * (4 - len(shape))) == (num_channels,)
    if not fits or 0 in shape:
        wanted = f"(x, y, z, {num_channels})" if num_channels > 1 else "(x, y, z)"
        raise ValueError(
            f"{file}: expected {num_channels} channel(s), so the shape {wanted}, found "
            f"{shape}; give another file, or split this one."
        )
    sizes = affines.voxel_sizes(image.affine)
    if not (np.isfinite(image.affine).all() and np.linalg.det(image.affine[:3, :3])):
        raise ValueError(
            f"{file}: expected voxels with a size along each axis, found the sizes "
            f"{sizes.tolist()} mm; correct the affine in its header."
        )
    angle = np.degrees(affines.obliquity(image.affine).max())
    if angle > MAX_OBLIQUITY:
        raise ValueError(
            f"{file}: expected voxels along the axes of the body, up to "
            f"{MAX_OBLIQUITY} degrees, found an oblique orientation of {angle:.0f} "
            "degrees; resample the file, as nibabel.processing.conform does."
        )
    return image


def check_place(file, image, other_file, other):
    """Raises `ValueError` unless two images have the same voxels."""
    shape, other_shape = image.shape[:3], other.shape[:3]
    if shape != other_shape:
        raise ValueError(
            f"{file}: expected the shape of {other_file}, {other_shape}, found "
            f"{shape}; resample one of them."
        )
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    found, expected = (
        affines.apply_affine(each.affine, corners) for each in (image, other)
    )
    distance = np.abs(found - expected).max()
    # Programs round the affine of a copy.
    if distance > affines.voxel_sizes(other.affine).min() / 10:
        raise ValueError(
            f"{file}: expected the place of {other_file}, found a corner "
            f"{distance:.3g} mm away; correct the affine in its header."
        )


def voxels(file, image, dtype=np.float32):
    """Returns the voxels of an opened file.

    Raises:
        OSError: the file is damaged.
        ValueError: a voxel is NaN or infinite.
    """
    try:
        array = np.asarray(image.dataobj, dtype)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise OSError(
            f"{file} is damaged or cut: {error}; bring back a copy."
        ) from error
    if bad := array.size - np.count_nonzero(np.isfinite(array)):
        raise ValueError(
            f"{file}: expected finite voxels, found {bad:,} that are NaN or infinite; "
            "replace them."
        )
    return array


def read(files, images, spacing):
    """Returns the `Volume` of opened files, resampled linearly to a spacing."""
    channels = []
    for file, image in zip(files, images, strict=True):
        array = voxels(file, image).reshape(*image.shape[:3], -1)
        for channel in np.moveaxis(array, -1, 0):
            found = nib.Nifti1Image(channel, image.affine)
            channels.append(along_axes(found, spacing, order=1))
    arrays = [np.asarray(channel.dataobj) for channel in channels]
    return Volume(np.stack(arrays, axis=-1), channels[0].affine)


def along_axes(image, spacing, order):
    """Returns an image in three dimensions along the axes, resampled to a spacing.

    Args:
        image: `nibabel` image.
        spacing: sequence of the size of a voxel in mm along each axis.
        order: int, 0 for the nearest voxel, 1 for linear interpolation.
    """
    image = nib.as_closest_canonical(image)
    sizes = affines.voxel_sizes(image.affine)
    if np.allclose(sizes, spacing, rtol=1e-3):
        return image
    shape = np.array(image.shape)
    new_shape = np.maximum(np.rint(shape * sizes / spacing), 1).astype(int)
    affine = affines.rescale_affine(image.affine, shape, spacing, new_shape)
    target = (tuple(new_shape.tolist()), affine)
    return processing.resample_from_to(image, target, order, mode="nearest")


def write_labels(path, labels, affine, like):
    """Writes labels in the space of a file, as a whole or not at all.

    Args:
        path: path of the new file.
        labels: integer array `(x, y, z)` along the axes.
        affine: array `(4, 4)`, from the indices of `labels` to positions in mm.
        like: `nibabel` image, in whose space to write.
    """
    labels = nib.Nifti1Image(labels, affine)
    target = (like.shape[:3], like.affine)
    labels = processing.resample_from_to(labels, target, order=0, mode="nearest")
    header = like.header.copy()
    header.set_data_dtype(labels.get_data_dtype())
    header["cal_min"] = header["cal_max"] = 0  # The range of gray values is another.
    found = nib.Nifti1Image(np.asarray(labels.dataobj), like.affine, header)
    with replacing(path) as part:
        nib.save(found, part)
