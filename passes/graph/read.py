"""Reading an ONNX file that may be broken or hostile; tensors stay mapped on disk."""

from pathlib import Path

import onnx
import onnx_ir as ir

from ffmerge.errors import InputError
from ffmerge.passes.graph.tensors import stored


def read_model(path: Path) -> ir.Model:
    """Return the model in an ONNX file; all its tensors are there and can be read.

    External data must be a regular file in the model's folder or below, whole, and reached
    neither by ``..`` nor by an absolute path nor by a link out of the folder.

    Raises:
        InputError: the file is missing, truncated or not ONNX, or its external data is not so.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} {'is not a file' if path.exists() else 'does not exist'}.")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        model = ir.from_proto(proto)
    except Exception as error:  # onnx, protobuf and onnx_ir raise whatever the broken part hits
        raise InputError(f"{path} is truncated or not ONNX: {_first_line(error)}.") from error
    if not proto.ir_version or not proto.opset_import or not proto.graph.output:
        raise InputError(f"{path} is truncated or not ONNX: no version, opset or output in it.")
    if proto.graph.sparse_initializer:
        raise InputError(f"{path} has sparse initializers, which ffmerge does not read.")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if not node.outputs:
            raise InputError(
                f"{path} is not valid ONNX: {node.op_type} {node.name!r} has no output."
            )
    ir.external_data.set_base_dir(model.graph, path.parent)
    for item in stored(model):
        try:
            if isinstance(item.tensor, ir.ExternalTensor):
                _check_external(path, item.tensor)
            elif item.tensor.dtype != ir.DataType.STRING:
                item.tensor.numpy()
        except InputError:
            raise
        except Exception as error:  # as above
            what = f"{path}: tensor {item.name!r} is not what its shape says"
            raise InputError(f"{what}: {_first_line(error)}.") from error
    return model


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    location = Path(tensor.location)
    data = path.parent / location
    where = f"{path}: the external data of {tensor.name!r}, {str(location)!r},"
    if location.is_absolute() or ".." in location.parts:
        raise InputError(f"{where} is outside the model's folder.")
    if not data.is_file():
        raise InputError(f"{where} is missing.")
    if not data.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(f"{where} is a link to outside the model's folder.")
    if data.stat().st_nlink > 1:
        raise InputError(
            f"{where} is a hard link, so what it holds is not the model's own: copy it."
        )
    offset, length = tensor.offset or 0, tensor.length
    if offset < 0 or (length is not None and length != tensor.nbytes):
        raise InputError(
            f"{where} has {length} bytes at {offset}; its shape needs {tensor.nbytes}."
        )
    if offset + tensor.nbytes > data.stat().st_size:
        raise InputError(
            f"{where} is too short: {data.stat().st_size} bytes of {offset + tensor.nbytes}."
        )


def _first_line(error: Exception) -> str:
    cause = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    return (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
