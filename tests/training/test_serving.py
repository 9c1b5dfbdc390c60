"""A trained network in service: asked by clients, and in other runtimes.

TensorFlow Serving itself is in no package registry. KServe's server replaces it for
REST, and a service of `tensorflow-serving-api` for gRPC. A C program loads the
SavedModel as a server does.
"""

import base64
import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent import futures

import grpc
import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from twins import conv_sequence

from revnet_tf import models
from revnet_tf.export import decode_image, export_saved_model
from training import data, export, train
from training.recipes import RECIPES

ROOT = pathlib.Path(__file__).parents[2]
SERVING = ROOT / "tests" / "serving"
TENSORFLOW = pathlib.Path(tf.__file__).parent


@pytest.fixture(scope="module")
def digits():
    return data.load(RECIPES["digits_revnet"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of the default recipe, shorter."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    flags = "--train-steps 336 --decay-steps 210 294".split()
    train.main(["--run-dir", str(run_dir), *flags])
    return run_dir


def accuracy_of(run_dir):
    return json.loads((run_dir / "result.json").read_text())["test_accuracy"]


def trained(network, digits):
    """Returns the serving model of a network that has seen some digits."""
    network.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    x, y = digits.normalize(digits.train_images[:400]), digits.train_labels[:400]
    network.fit(x, y, batch_size=50, epochs=2, verbose=0)
    return RECIPES["digits_revnet"].task.serving_model(network, digits)


def small_revnet():
    return models.RevNet(
        (1, 1),
        (8, 8, 16),
        input_shape=(8, 8, 1),
        classes=10,
        classifier_activation=None,
    )


def model_of_blocks():
    x = keras.Input((8, 8, 1))
    y = keras.layers.Conv2D(8, 3, padding="same")(x)
    y = keras.layers.Flatten()(conv_sequence(2, 8)(y))
    return keras.Model(x, keras.layers.Dense(10)(y))


@pytest.fixture(scope="module")
def live(digits, two_replicas):
    """Live models by name: mixed precision, trained on two devices, of blocks."""
    with contextlib.ExitStack() as stack:
        stack.callback(keras.config.set_dtype_policy, "float32")
        keras.config.set_dtype_policy("mixed_float16")
        found = {"mixed": trained(small_revnet(), digits)}
    with two_replicas.scope():
        found["mirrored"] = trained(small_revnet(), digits)
    return found | {"blocks": trained(model_of_blocks(), digits)}


class Server:
    """KServe's server in a process of its own."""

    def __init__(self, folders, log):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.log = log
        models = [f"{name}={folder}" for name, folder in folders.items()]
        port = self.address.split(":")[1]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, SERVING / "server.py", port, *models],
                stdout=file,
                stderr=file,
            )

    def wait(self, seconds=120):
        """Returns when the server answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"http://{self.address}/v2/health/ready")
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-2000:])

    def post(self, path, content):
        """Returns the status and the content of an answer."""
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.address}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def predict(self, name, instances, **content):
        return self.post(
            f"/v1/models/{name}:predict", {"instances": instances, **content}
        )


@contextlib.contextmanager
def serving(folders, log):
    started = Server(folders, log)
    try:
        started.wait()
        yield started
    finally:
        started.process.terminate()
        started.process.wait(60)


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """The server of the run."""
    folders = {"digits": run / "export" / "1"}
    with serving(folders, tmp_path_factory.mktemp("served") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def live_server(live, digits, tmp_path_factory):
    """The server of the live models."""
    folder = tmp_path_factory.mktemp("served")
    folders = {name: folder / name / "1" for name in live}
    for name, model in live.items():
        folders[name].parent.mkdir()
        export_saved_model(
            model,
            folders[name],
            class_names=digits.class_names,
            decode=decode_image(digits.image_shape),
        )
    with serving(folders, folder / "log") as started:
        yield started


@pytest.mark.thorough
def test_server_listens_on_this_machine_only(server):
    listening = [
        connection.laddr.ip
        for connection in psutil.net_connections()
        if connection.pid == server.process.pid
        and connection.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


@pytest.mark.thorough
def test_accuracy_over_http_is_that_of_the_run(server, run, digits):
    status, answer = server.predict("digits", digits.test_images.tolist())
    assert status == 200
    names = [row["class_name"] for row in answer["predictions"]]
    right = np.mean(
        [digits.class_names[y] for y in digits.test_labels] == np.array(names)
    )
    assert right == pytest.approx(accuracy_of(run), abs=1e-6)
    assert right > 0.9  # of a network that has learnt the digits
    for row in answer["predictions"]:
        assert row["class_name"] == digits.class_names[np.argmax(row["predictions"])]
        assert row["class"] == np.argmax(row["predictions"])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mixed", "mirrored", "blocks"])
def test_every_kind_of_model_answers_over_http_as_it_does_live(
    live_server, live, digits, name
):
    x = digits.test_images[:40]
    status, answer = live_server.predict(name, x.tolist())
    assert status == 200
    got = [row["predictions"] for row in answer["predictions"]]
    # (`predict` would ask both replicas, which have moving statistics of their own.)
    expected = tf.function(live[name])(x, training=False)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.thorough
def test_open_inference_protocol_gives_the_same_answers(server, run, digits):
    x = digits.test_images[:7]
    tensor = {
        "name": "inputs",
        "shape": x.shape,
        "datatype": "UINT8",
        "data": x.ravel().tolist(),
    }
    status, answer = server.post(
        "/v2/models/digits/infer", {"id": "1", "inputs": [tensor]}
    )
    assert status == 200
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    expected = export.load(run).predict(x, verbose=0)
    got = np.reshape(outputs["predictions"], expected.shape)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    names = [digits.class_names[i] for i in expected.argmax(1)]
    assert outputs["class_name"] == names


def encoded(image, encode=tf.io.encode_png):
    return {"b64": base64.b64encode(encode(image).numpy()).decode()}


def test_encoded_images_are_served(server, run, digits):
    x = digits.test_images[:5]
    instances = [*map(encoded, x)]
    status, answer = server.predict("digits", instances, signature_name="encoded")
    assert status == 200
    got = [row["predictions"] for row in answer["predictions"]]
    np.testing.assert_allclose(got, export.load(run)(x), atol=1e-5)


JPEG = base64.b64encode(
    tf.io.encode_jpeg(np.arange(64, dtype="uint8").reshape(8, 8, 1)).numpy()[:-30]
).decode()


@pytest.mark.parametrize(
    "instances, signature, message",
    [
        (np.zeros((1, 9, 9, 1), int).tolist(), "serving_default", "[1,9,9,1]"),
        (np.zeros((1, 1, 1, 1), int).tolist(), "serving_default", "[1,1,1,1]"),
        (np.full((1, 8, 8, 1), 0.5).tolist(), "serving_default", "no uint8"),
        (np.full((1, 8, 8, 1), 300).tolist(), "serving_default", "no uint8"),
        (np.full((1, 8, 8, 1), "dog").tolist(), "serving_default", "'dog'"),
        ([], "serving_default", "an empty batch"),
        ([], "encoded", "an empty batch"),
        ([{"b64": JPEG}], "encoded", "Invalid JPEG data"),
        ([encoded(np.zeros((9, 9, 1), "uint8"))], "encoded", "[9,9,1]"),
        (np.zeros((1, 8, 8, 1), int).tolist(), "regress", "no signature regress"),
    ],
)  # fmt: skip
def test_bad_request_is_answered_with_its_error_and_the_server_goes_on(
    server, digits, instances, signature, message
):
    status, answer = server.predict("digits", instances, signature_name=signature)
    assert status == 400
    assert message in answer["error"]
    status, answer = server.predict("digits", digits.test_images[:1].tolist())
    assert status == 200 and len(answer["predictions"]) == 1


@pytest.fixture(scope="module")
def grpc_address(run):
    """TensorFlow Serving's gRPC service, on the SavedModel of the run."""
    signatures = tf.saved_model.load(str(run / "export" / "1")).signatures

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            name = request.model_spec.signature_name or "serving_default"
            arguments = {
                keyword: tf.constant(tf.make_ndarray(value))
                for keyword, value in request.inputs.items()
            }
            response = predict_pb2.PredictResponse()
            try:
                outputs = signatures[name](**arguments)
            except tf.errors.InvalidArgumentError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
            for keyword, value in outputs.items():
                response.outputs[keyword].CopyFrom(tf.make_tensor_proto(value))
            return response

    service = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        Service(), service
    )
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    yield f"127.0.0.1:{port}"
    service.stop(None).wait()


def test_warm_up_requests_are_what_the_grpc_service_answers(run, grpc_address):
    file = run / "export" / "1" / "assets.extra" / "tf_serving_warmup_requests"
    answered = {}
    with grpc.insecure_channel(grpc_address) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for record in tf.data.TFRecordDataset(str(file)):
            log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
            request = log.predict_log.request
            response = stub.Predict(request, timeout=60)
            answered[request.model_spec.signature_name] = set(response.outputs)
    top = {"predictions", "class", "class_name"}
    assert answered == {
        "serving_default": top,
        "encoded": top,
        "logits": {"logits"},
        "features": {"features"},
    }


def test_empty_batch_is_refused_over_grpc(grpc_address):
    request = predict_pb2.PredictRequest()
    empty = np.zeros((0, 8, 8, 1), np.uint8)
    request.inputs["inputs"].CopyFrom(tf.make_tensor_proto(empty))
    with grpc.insecure_channel(grpc_address) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="an empty batch"):
            stub.Predict(request, timeout=60)


def guide_blocks(language):
    """Returns the blocks of the guide's page on serving that ask a server."""
    page = (ROOT / "docs" / "serving.md").read_text()
    blocks = page.split(f"```{language}\n")[1:]
    return [code for code in (b.split("```")[0] for b in blocks) if "localhost" in code]


def at(code, server, grpc_address):
    code = code.replace("localhost:8501", server.address)
    return code.replace("localhost:8500", grpc_address)


def test_python_clients_of_the_guide_are_answered(server, grpc_address, capsys):
    clients = guide_blocks("python")
    assert len(clients) == 2
    names = {}
    for code in clients:
        exec(compile(at(code, server, grpc_address), "serving.md", "exec"), names)
    rest, over_grpc = capsys.readouterr().out.split("\n")[:2]
    assert rest == over_grpc and rest.startswith("['")


def test_curl_of_the_guide_is_answered(server, digits, tmp_path):
    (command,) = [code for code in guide_blocks("sh") if "curl" in code]
    assert shutil.which("curl"), "needs curl"
    digit = digits.test_images[0]
    (tmp_path / "digit.png").write_bytes(tf.io.encode_png(digit).numpy())
    done = subprocess.run(
        ["bash", "-euc", at(command, server, "")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["predictions"]
    assert row["class_name"] == digits.class_names[digits.test_labels[0]]


@pytest.fixture(scope="module")
def c_program(tmp_path_factory):
    compiler = shutil.which("cc")
    assert compiler, "needs a C compiler, as the package gcc has it"
    program = tmp_path_factory.mktemp("c") / "predict"
    subprocess.run(
        [
            compiler,
            "-Wall",
            SERVING / "predict.c",
            "-o",
            program,
            f"-I{TENSORFLOW / 'include'}",
            f"-L{TENSORFLOW}",
            "-l:libtensorflow_cc.so.2",
            "-l:libtensorflow_framework.so.2",
            f"-Wl,-rpath,{TENSORFLOW}",
        ],
        check=True,
        timeout=300,
    )
    return program


def ask(program, folder, requests):
    """Returns the lines of the answers to arrays."""
    definition = saved_model_pb2.SavedModel.FromString(
        (folder / "saved_model.pb").read_bytes()
    )
    signature = definition.meta_graphs[0].signature_def["serving_default"]
    tensors = [
        signature.inputs["inputs"].name,
        signature.outputs["predictions"].name,
        signature.outputs["class_name"].name,
    ]
    lines = []
    for i, array in enumerate(requests):
        file = program.parent / f"{i}.bin"
        array.tofile(file)
        lines.append(
            f"{file} {array.dtype} {array.ndim} {' '.join(map(str, array.shape))}"
        )
    done = subprocess.run(
        [program, folder, *tensors],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_c_program_gives_the_accuracy_and_the_numbers_of_the_run(
    c_program, run, digits
):
    lines = ask(c_program, run / "export" / "1", [digits.test_images])
    names, *columns = zip(*map(str.split, lines), strict=True)
    right = [digits.class_names[y] for y in digits.test_labels] == np.array(names)
    assert right.mean() == pytest.approx(accuracy_of(run), abs=1e-6)
    expected = export.load(run).predict(digits.test_images, verbose=0)
    got = np.array(columns, "float32").T
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_c_program_is_refused_what_is_no_batch_of_images_and_goes_on(
    c_program, run, digits
):
    bad = [
        np.zeros((1, 9, 9, 1), np.uint8),
        np.zeros((1, 1, 1, 1), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((0, 8, 8, 1), np.uint8),
        np.zeros((1, 8, 8, 1), np.float32),
    ]
    *lines, last = ask(c_program, run / "export" / "1", [*bad, digits.test_images[:1]])
    assert all(line.startswith("error: ") for line in lines)
    assert [
        text in line
        for text, line in zip(
            [
                "[1,9,9,1] is not compatible with expected shape [?,8,8,1]",
                "[1,1,1,1] is not compatible",
                "[8,8,1] is not compatible",
                "an empty batch",
                "Expects arg[0] to be uint8 but float is provided",
            ],
            lines,
            strict=True,
        )
    ] == [True] * len(bad)
    assert last.split()[0] in digits.class_names


@pytest.mark.thorough
@pytest.mark.parametrize("file_format", ["litert", "litert_int8", "onnx"])
def test_file_of_another_runtime_answers_as_the_run(run, digits, tmp_path, file_format):
    output = tmp_path / export.FILES[file_format]
    export.main([str(run), "--format", file_format, "--output", str(output)])
    if file_format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(output)
        got = session.run(["predictions"], {"inputs": digits.test_images})[0]
    else:
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(str(output)).get_signature_runner("serving_default")
        got = runner(inputs=digits.test_images)["predictions"]
    expected = export.load(run).predict(digits.test_images, verbose=0)
    right = np.mean(got.argmax(1) == digits.test_labels)
    if file_format == "litert_int8":
        assert right == pytest.approx(accuracy_of(run), abs=0.02)
        size = (tmp_path / "model_int8.tflite").stat().st_size
        parameters = export.load(run).count_params()
        assert size < 2 * parameters  # a byte each, and the graph
    else:
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert right == pytest.approx(accuracy_of(run), abs=1e-6)


@pytest.mark.thorough
def test_openvino_reads_the_saved_model_as_it_is(run, digits):
    import openvino

    core = openvino.Core()
    # On processors with bfloat16, OpenVINO computes in it by default.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    model = core.read_model(run / "export" / "1")
    compiled = core.compile_model(model, "CPU", options)
    got = compiled({"inputs": digits.test_images[:50]})["predictions"]
    expected = export.load(run).predict(digits.test_images[:50], verbose=0)
    np.testing.assert_allclose(got, expected, atol=1e-4)
