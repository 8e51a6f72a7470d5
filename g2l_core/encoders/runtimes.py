"""Run exported networks with ONNX Runtime or OpenVINO, as a module that stands where torch's network would."""

import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from g2l_core.encoders.exported import AGAIN, RUNTIMES
from g2l_core.errors import EncoderError, UsageError

Session = Callable[[np.ndarray], np.ndarray]
"""From float32 (batch, 3, side, side) to float32 (batch, dim)."""


def installed_runtimes() -> tuple[str, ...]:
    """torch, and those of `RUNTIMES` whose package is installed."""
    return ("torch", *(name for name, package in RUNTIMES.items() if find_spec(package) is not None))


def require_runtime(runtime: str, *more: str) -> Any:
    """Import the package of a runtime.

    Args:
        runtime: A name of `RUNTIMES`, and of the extra that installs it.
        more: Further packages of the extra that must be there.

    Raises:
        UsageError: One is not installed.
    """
    for package in (RUNTIMES[runtime], *more):
        try:
            import_module(package)
        except ImportError as error:
            raise UsageError(
                f'--format and --runtime {runtime} need {package}: pip install "g2l[{runtime}]"'
            ) from error
    return import_module(RUNTIMES[runtime])


def open_session(path: Path, runtime: str) -> Session:
    """Open an exported network on the CPU, with as many threads as torch has.

    Raises:
        UsageError: The runtime is not installed.
        EncoderError: It cannot read the file.
    """
    package = require_runtime(runtime)
    opened: Callable[[Any, Path], Session] = {"onnx": _onnx_session, "openvino": _openvino_session}[runtime]
    try:
        return opened(package, path)
    except _failures() as error:
        reason = " ".join(str(error).split())[:300]
        raise EncoderError(f"{RUNTIMES[runtime]} cannot open {path}: {reason}. {AGAIN}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What the runtimes raise: OpenVINO errors of Python, ONNX Runtime classes of its own without a common base."""
    known: list[type[Exception]] = [RuntimeError, ValueError, TypeError]
    if "onnxruntime" in sys.modules:
        state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        known += [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return tuple(known)


def _onnx_session(package: Any, path: Path) -> Session:
    options = package.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # its warnings are about its own optimizations
    session = package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _openvino_session(package: Any, path: Path) -> Session:
    # bfloat16, which it takes where the processor has it, would make features depend on the machine
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = package.Core().compile_model(str(path), "CPU", settings)
    request, lock = compiled.create_infer_request(), threading.Lock()

    def run(images: np.ndarray) -> np.ndarray:
        with lock:  # a request serves one caller at a time
            return np.array(request.infer([images])[0])

    return run


class SessionNetwork(nn.Module):
    """An exported network: from normalized images to features, without gradients.

    Attributes:
        version: Of the runtime's package.
    """

    def __init__(self, path: Path, runtime: str, *, batch: int | None = None) -> None:
        """Open the network.

        Args:
            path: The file that the runtime opens.
            runtime: onnx or openvino.
            batch: Images that are run together; None is all. It is 1 for networks that scale their numbers by the
                whole batch, so that features never depend on the neighbors in it.

        Raises:
            UsageError: The runtime is not installed.
            EncoderError: The file cannot be opened.
        """
        super().__init__()
        self._run, self._batch = open_session(path, runtime), batch
        self._what = f"{path} in {RUNTIMES[runtime]}"
        self.version = str(getattr(require_runtime(runtime), "__version__", ""))

    def forward(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch dim"]:
        """Features of normalized images.

        Raises:
            EncoderError: The runtime fails.
        """
        pixels = np.ascontiguousarray(images.detach().cpu().numpy(), dtype=np.float32)
        step = self._batch or max(len(pixels), 1)
        try:
            parts = [self._run(pixels[start : start + step]) for start in range(0, len(pixels), step)]
        except _failures() as error:
            raise EncoderError(f"{self._what} failed: {' '.join(str(error).split())[:300]}") from error
        return torch.from_numpy(np.concatenate(parts))
