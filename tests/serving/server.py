"""KServe's server over SavedModels: `python server.py PORT NAME=FOLDER ...`.

It listens on 127.0.0.1 only. Requests are TensorFlow Serving's REST form and the Open
Inference Protocol ("V2"); arguments and answers pass as the SavedModel has them.
"""

import asyncio
import base64
import json
import sys

import kserve
import numpy as np
import tensorflow as tf
from kserve.errors import InvalidInput
from kserve.protocol.rest.server import RESTServer

V2_DTYPES = {tf.int64: "INT64", tf.float32: "FP32", tf.string: "BYTES"}


class SavedModel(kserve.Model):
    def __init__(self, name, folder):
        super().__init__(name)
        self.signatures = tf.saved_model.load(folder).signatures
        self.ready = True

    async def predict(self, payload, headers=None, response_headers=None):
        if isinstance(payload, kserve.InferRequest):
            return self.predict_v2(payload)
        if isinstance(payload, bytes):  # of another content type than JSON's
            payload = json.loads(payload)
        name = payload.get("signature_name", "serving_default")
        outputs = self.run(name, [*map(decoded, payload["instances"])])
        columns = {key: listed(value) for key, value in outputs.items()}
        rows = zip(*columns.values(), strict=True)
        if len(columns) == 1:
            return {"predictions": [row[0] for row in rows]}
        return {"predictions": [dict(zip(columns, row, strict=True)) for row in rows]}

    def predict_v2(self, request):
        outputs = []
        (array,) = [tensor.as_numpy() for tensor in request.inputs]
        for key, value in self.run("serving_default", array).items():
            dtype = V2_DTYPES[value.dtype]
            output = kserve.InferOutput(key, value.shape.as_list(), dtype)
            output.set_data_from_numpy(value.numpy(), binary_data=False)
            outputs.append(output)
        return kserve.InferResponse(request.id, self.name, outputs)

    def run(self, name, argument):
        if name not in self.signatures:
            raise InvalidInput(f"no signature {name}; there are {[*self.signatures]}")
        signature = self.signatures[name]
        ((keyword, spec),) = signature.structured_input_signature[1].items()
        try:
            dtype = spec.dtype.as_numpy_dtype
            array = np.array(argument, None if len(argument) else dtype)
            if dtype == np.uint8 and not np.array_equal(array, array.astype(dtype)):
                raise InvalidInput(f"{keyword} has numbers that are no uint8")
            return signature(**{keyword: tf.constant(array, spec.dtype)})
        except (TypeError, ValueError, tf.errors.OpError) as error:
            raise InvalidInput(str(error)) from error


def decoded(instance):
    """Returns an instance with the bytes that JSON cannot hold."""
    if isinstance(instance, dict):
        return base64.b64decode(instance["b64"])
    return instance


def listed(value):
    rows = value.numpy().tolist()
    return [row.decode() for row in rows] if value.dtype == tf.string else rows


def main(port, *models):
    server = kserve.ModelServer(enable_grpc=False)
    for model in models:
        server.register_model(SavedModel(*model.split("=", 1)))
    rest = RESTServer(
        "kserve.model_server:app",
        server.dataplane,
        server.model_repository_extension,
        http_port=int(port),
    )
    # KServe means all interfaces, and has no option for it.
    rest.config.host = "127.0.0.1"
    asyncio.run(rest.start())


if __name__ == "__main__":
    main(*sys.argv[1:])
