"""Exact search as an ONNX graph on ONNX Runtime: on GPUs, or on the CPU to test it.

For each block of vectors, the graph multiplies queries and vectors in float16, takes the groups of vectors with the
highest maxima, and the best vectors of these groups: the k best vectors are always in the k best groups. It computes
the cosines of the few that are left in float32. `GraphCandidates` fetches more of them until rounding cannot have
hidden a better one, so the result is exact.

Shapes: Q queries, F vectors fetched from each block, A those of all blocks, R vectors of a block, G groups of a block,
S vectors of a group, N embeddings, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core.arrays import BoolArray, Device, DeviceArray, Float16Array, Float32Array, Int64Array, Queries
from core.errors import BadParameter, BundleAltered, needed_by
from core.runtime import load_cuda_libraries, onnxruntime, session_options, usable_cores
from index.embeddings import Embeddings
from index.top_k import best

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_GROUP = 256  # vectors
_BLOCK_ELEMENTS = 2**30  # of vectors in one tensor: CUDA kernels count elements in 32 bits
_FETCHED_ELEMENTS = 2**27  # of fetched vectors in float32, at a time
_MARGIN = 32  # vectors fetched beyond those asked for
# More than the float16 product can differ from the cosine: 2^-11 each for the query, the score and a vector's length.
_ROUNDING = 4 * 2.0**-11
_MAX_LOADING_THREADS = 8
_OPSET, _IR_VERSION = 17, 8


class GraphCandidates:
    """`Candidates` from the graph, over vectors that are divided among devices. Not thread-safe."""

    exact = filters = True

    def __init__(
        self, embeddings: Embeddings, devices: Sequence[Device], block_elements: int = _BLOCK_ELEMENTS
    ) -> None:
        """Load the stored vectors.

        Raise `BundleAltered` if some are not finite, `MissingExtra` without onnx, `RuntimeError` if CUDA is asked for
        and does not load.
        """
        if devices[0].kind == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise RuntimeError("this onnxruntime has no CUDA; its extra is `gpu`")
        self.limit = len(embeddings)
        self._dim = embeddings.dim
        bounds = [self.limit * number // len(devices) for number in range(len(devices) + 1)]
        self._shares = [
            _Share(embeddings, start, end, device, block_elements)
            for start, end, device in zip(bounds[:-1], bounds[1:], devices, strict=True)
        ]
        self._pool = ThreadPoolExecutor(len(devices))

    def efforts(self) -> list[dict[str, float]]:
        return [{}]

    def search(
        self, queries_QD: Queries, count: int, parameters: Any, allowed_N: BoolArray | None, effort: float
    ) -> tuple[Float32Array, Int64Array]:
        """Search as `Candidates` does. Raise `BadParameter` if a query has a number that is not finite."""
        scores_QK = np.zeros((len(queries_QD), count), np.float32)
        positions_QK = np.full((len(queries_QD), count), -1, np.int64)
        pending, fetch = np.arange(len(queries_QD)), 2 * count + _MARGIN
        while len(pending):
            at_once = max(1, _FETCHED_ELEMENTS // (fetch * self._dim))
            unproven: list[Int64Array] = []
            for part in np.split(pending, range(at_once, len(pending), at_once)):
                queries = queries_QD if len(part) == len(queries_QD) else np.asarray(queries_QD)[part]
                scores_pK, positions_pK, proven_p = self._fetch(queries, count, fetch, allowed_N)
                scores_QK[part], positions_QK[part] = scores_pK, positions_pK
                unproven.append(part[~proven_p])
            pending, fetch = np.concatenate(unproven), 4 * fetch
        return scores_QK, positions_QK

    def _fetch(
        self, queries: Queries, count: int, fetch: int, allowed_N: BoolArray | None
    ) -> tuple[Float32Array, Int64Array, BoolArray]:
        """Return the best scores and positions [Q, count], and for which queries these are proven to be the best."""
        run = map if len(self._shares) == 1 else self._pool.map
        fetched = list(run(lambda share: share.search(queries, fetch, allowed_N), self._shares))
        cosines_QA, positions_QA = (np.concatenate([each[i] for each in fetched], axis=1) for i in range(2))
        if not np.isfinite(cosines_QA).all():
            raise BadParameter("the query embedding holds a number that is not finite; send other images")
        bound_Q = np.max([each.bound_Q for each in fetched], axis=0)
        positions_QK, scores_QK = best(positions_QA, cosines_QA, count)
        proven_Q = (positions_QK[:, -1] >= 0) & (scores_QK[:, -1] > bound_Q + _ROUNDING)
        return scores_QK, positions_QK, proven_Q | (bound_Q == -np.inf)


class _Fetched(NamedTuple):
    """Cosines and positions [Q, A], -1 for none. No other vector's float16 product is above `bound_Q`."""

    cosines_QA: Float32Array
    positions_QA: Int64Array
    bound_Q: Float32Array


class _Share:
    """The vectors from `start` to `end`, in blocks of the same size on one device."""

    def __init__(self, embeddings: Embeddings, start: int, end: int, device: Device, block_elements: int) -> None:
        count, dim = end - start, embeddings.dim
        blocks = max(1, math.ceil(count * dim / block_elements))
        self._rows = _GROUP * max(1, math.ceil(count / blocks / _GROUP))  # of a block, a whole number of groups
        self._start, self._end = start, end
        self._device = device
        self._blocks: list[onnxruntime.OrtValue] = []
        for first in range(start, start + blocks * self._rows, self._rows):
            block_RD = np.zeros((self._rows, dim), np.float16)
            _load(embeddings, first, min(first + self._rows, end), block_RD)
            self._blocks.append(self._on_device(block_RD))
        self._bindings = {masked: self._binding(dim, masked=masked) for masked in (False, True)}
        self._allowed_N: BoolArray | None = None  # whose masks are bound

    def search(self, queries: Queries, fetch: int, allowed_N: BoolArray | None) -> _Fetched:
        """Fetch the best `fetch` vectors of each block."""
        fetch = min(fetch, self._rows)
        session, binding = self._bindings[allowed_N is not None]
        if isinstance(queries, DeviceArray) and queries.device == self._device:
            binding.bind_ortvalue_input("queries", queries.value)
        else:
            binding.bind_cpu_input("queries", np.ascontiguousarray(queries, np.float32))
        binding.bind_cpu_input("groups", np.array([min(fetch, self._rows // _GROUP)]))
        binding.bind_cpu_input("fetch", np.array([fetch]))
        if allowed_N is not None and allowed_N is not self._allowed_N:
            self._bind_masks(binding, allowed_N)
        for output in ("products", "cosines", "positions"):  # each time: their shapes change
            binding.bind_output(output)
        session.run_with_iobinding(binding)
        products_QA, cosines_QA, positions_QA = binding.copy_outputs_to_cpu()
        positions_QA += self._start
        positions_QA[(positions_QA >= self._end) | (products_QA == -np.inf)] = -1
        last_QB = products_QA[:, fetch - 1 :: fetch]  # the lowest product fetched from each block
        bound_Q = np.full(len(last_QB), -np.inf, np.float32) if fetch == self._rows else last_QB.max(axis=1)
        return _Fetched(cosines_QA, positions_QA, bound_Q)

    def _bind_masks(self, binding: onnxruntime.IOBinding, allowed_N: BoolArray) -> None:
        masks = np.full(len(self._blocks) * self._rows, -np.inf, np.float16)
        masks[: self._end - self._start][allowed_N[self._start : self._end]] = 0
        for number, mask_R in enumerate(np.split(masks, len(self._blocks))):
            binding.bind_ortvalue_input(f"mask_{number}", self._on_device(mask_R))
        self._allowed_N = allowed_N

    def _binding(self, dim: int, *, masked: bool) -> tuple[onnxruntime.InferenceSession, onnxruntime.IOBinding]:
        session = open_graph(search_graph(dim, self._rows, len(self._blocks), masked=masked), self._device)
        binding = session.io_binding()
        for number, block in enumerate(self._blocks):
            binding.bind_ortvalue_input(f"vectors_{number}", block)
        return session, binding

    def _on_device(self, array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._device)


def _load(embeddings: Embeddings, start: int, end: int, block_RD: Float16Array) -> None:
    """Copy the stored vectors from `start` to `end` into a block. Threads read the parts."""

    def copy(number: int) -> None:
        first = embeddings.starts[number]
        stored_nD = embeddings.stored_part(number)[max(start - first, 0) : end - first]
        if not np.isfinite(stored_nD).all():
            raise BundleAltered("the embeddings hold a number that is not finite; export the bundle again")
        place = max(first - start, 0)
        block_RD[place : place + len(stored_nD)] = stored_nD

    parts = range(np.searchsorted(embeddings.starts, start, "right") - 1, np.searchsorted(embeddings.starts, end))
    with ThreadPoolExecutor(min(_MAX_LOADING_THREADS, usable_cores())) as pool:
        list(pool.map(copy, parts if end > start else ()))


def open_graph(graph: ModelProto, device: Device) -> onnxruntime.InferenceSession:
    """Open a session for a graph of this project on a device. Raise `RuntimeError` if CUDA does not load."""
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device.kind == "cuda":
        reason = load_cuda_libraries()
        # TF32 has 10 bits of mantissa. It is the default for float32.
        settings = {"device_id": str(device.number), "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
        providers.insert(0, ("CUDAExecutionProvider", settings))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), session_options(), providers=providers)
    if len(session.get_providers()) < len(providers):  # ONNX Runtime continues on the CPU
        raise RuntimeError(f"CUDA's libraries or driver do not load ({reason})")
    return session


def search_graph(dim: int, rows: int, blocks: int, *, masked: bool) -> ModelProto:
    """Build the graph for blocks of vectors [R, D].

    Inputs: `queries` float32 [Q, D], `groups` and `fetch` int64 [1], `vectors_0` float16 [R, D] and so on, and if it is
    `masked`, `mask_0` float16 [R] and so on: 0 for allowed vectors, minus infinity for others. Outputs, by block:
    `products` float32 [Q, A], falling in each block, `cosines` float32 [Q, A], `positions` int64 [Q, A].
    """
    with needed_by("exact search on a GPU"):
        from onnx import TensorProto, helper, numpy_helper

    nodes: list[NodeProto] = []

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return its name."""
        name = f"{operator}_{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def add_top_k(values: str, count: str) -> tuple[str, str]:
        names = f"values_{len(nodes)}", f"places_{len(nodes)}"
        nodes.append(helper.make_node("TopK", [values, count], names))
        return names

    def unit(vectors: str, *, axis: int) -> str:
        return add("Div", vectors, add("Max", add("ReduceL2", vectors, axes=[axis]), "tiny"))

    unit_QD = unit("queries", axis=1)
    half_QD = add("Cast", unit_QD, to=TensorProto.FLOAT16)
    unit_QD1 = add("Unsqueeze", unit_QD, "two")
    inputs = [
        ("queries", TensorProto.FLOAT, ["Q", dim]),
        ("groups", TensorProto.INT64, [1]),
        ("fetch", TensorProto.INT64, [1]),
    ]
    constants = {
        "tiny": np.array(1e-12, np.float32), "two": np.array([2]), "group": np.array(_GROUP),
        "by_group": np.array([0, -1, _GROUP]), "flat": np.array([0, -1]),
    }  # fmt: skip
    products, cosines, positions = [], [], []
    for block in range(blocks):
        vectors, mask, first = f"vectors_{block}", f"mask_{block}", f"first_{block}"
        inputs.append((vectors, TensorProto.FLOAT16, [rows, dim]))
        constants[first] = np.array(block * rows)
        if masked:
            inputs.append((mask, TensorProto.FLOAT16, [rows]))
        products_QR = add("Gemm", half_QD, vectors, *([mask] if masked else []), transB=1)
        products_QGS = add("Reshape", products_QR, "by_group")
        _, groups_QF = add_top_k(add("ReduceMax", products_QGS, axes=[2], keepdims=0), "groups")
        best_groups_QFS = add("GatherND", products_QGS, add("Unsqueeze", groups_QF, "two"), batch_dims=1)
        products_QF, places_QF = add_top_k(add("Reshape", best_groups_QFS, "flat"), "fetch")
        # A place counts through the groups taken, a position through the block.
        slots_QF = add("Div", places_QF, "group")
        moved_QF = add("Sub", add("GatherElements", groups_QF, slots_QF, axis=1), slots_QF)
        positions_QF = add("Add", places_QF, add("Mul", moved_QF, "group"))
        vectors_QFD = unit(add("Cast", add("Gather", vectors, positions_QF), to=TensorProto.FLOAT), axis=2)
        cosines.append(add("Squeeze", add("MatMul", vectors_QFD, unit_QD1), "two"))
        products.append(add("Cast", products_QF, to=TensorProto.FLOAT))
        positions.append(add("Add", positions_QF, first))
    outputs = (
        ("products", TensorProto.FLOAT, products),
        ("cosines", TensorProto.FLOAT, cosines),
        ("positions", TensorProto.INT64, positions),
    )
    for name, _, parts in outputs:
        nodes.append(helper.make_node("Concat", parts, [name], axis=1))
    graph = helper.make_graph(
        nodes,
        "search",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(name, kind, ["Q", "A"]) for name, kind, _ in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return make_model(graph)


def make_model(graph: GraphProto) -> ModelProto:
    """Return a model that every supported ONNX Runtime reads."""
    from onnx import helper

    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
