"""Networks, in the manner of `keras.applications`: functions that return models."""

from revnet_tf.models import irevnet, residual, revunet
from revnet_tf.models.irevnet import *  # noqa: F403
from revnet_tf.models.residual import *  # noqa: F403
from revnet_tf.models.revunet import *  # noqa: F403

__all__ = [*residual.__all__, *irevnet.__all__, *revunet.__all__]
