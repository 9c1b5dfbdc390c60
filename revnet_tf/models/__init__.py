"""Networks, in the manner of `keras.applications`: functions that return models."""

from revnet_tf.models import residual
from revnet_tf.models.residual import *  # noqa: F403

__all__ = [*residual.__all__]
