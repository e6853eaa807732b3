"""A device `cuda:0` that is not there: CPU values under CUDA's rules, for tests on a host without a GPU.

A Pretend tensor holds a CPU tensor but says that it is on cuda:0; to PyTorch's C++ it is on `meta`, since a PyTorch built
for CPUs has no allocator for CUDA. Every ATen operator passes through `dispatch`, which

- raises DeviceMismatch where CUDA would not take the operands, since some lie on the CPU;
- counts kernels, copies to the device (uploads) and places where the host waits for the device, by file and line;
- computes the result on the CPU. So code that depends on values runs on, and results can be compared with the CPU's.

What it cannot show: speed, memory, the last bits of CUDA's kernels, and what its drivers or libraries refuse.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
OUR_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
WAITING = {  # operators whose result, or the size of it, the host needs
    aten._local_scalar_dense, aten.nonzero, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.masked_select,
    aten.equal, aten.is_nonzero,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# what CUDA's autocast computes in half and in single precision, by the names of Python's functions (PyTorch's autocast op
# reference; only what a network may call). Attention of several heads is Python: its parts are not seen one by one
HALF = {
    "__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "einsum", "linear", "matmul", "mm",
    "multi_head_attention_forward", "mv", "prelu",
}  # fmt: skip
SINGLE = {
    "__pow__", "__rpow__", "acos", "asin", "binary_cross_entropy_with_logits", "cdist", "cosh", "cosine_similarity",
    "cross_entropy", "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "interpolate", "kl_div", "l1_loss",
    "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "mse_loss", "nll_loss", "norm", "normalize",
    "pow", "prod", "reciprocal", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss", "softmax", "softplus", "sum", "tan",
    "vector_norm",
}  # fmt: skip


# of CUDA's kernels, those that add in no fixed order and have no other for where one is asked for (the documentation of
# torch.use_deterministic_algorithms; what it says of layers, by the operators that compute them)
UNORDERED = {
    aten._adaptive_avg_pool2d_backward, aten._adaptive_avg_pool3d_backward, aten._ctc_loss_backward,
    aten._upsample_bicubic2d_aa_backward, aten._upsample_bilinear2d_aa_backward, aten.adaptive_max_pool2d_backward,
    aten.avg_pool3d_backward, aten.fractional_max_pool2d_backward, aten.fractional_max_pool3d_backward,
    aten.grid_sampler_2d_backward, aten.grid_sampler_3d_backward, aten.histc, aten.max_unpool2d, aten.max_unpool3d, aten.put,
    aten.put_, aten.reflection_pad1d_backward, aten.reflection_pad2d_backward, aten.reflection_pad3d_backward,
    aten.upsample_bicubic2d_backward, aten.upsample_bilinear2d_backward, aten.upsample_linear1d_backward,
    aten.upsample_trilinear3d_backward,
}  # fmt: skip
UNORDERED_IF: dict[Any, Callable[..., bool]] = {
    aten.nll_loss2d_forward: lambda scores, labels, weight, reduction, ignored: reduction != 0,
    aten.cumsum: lambda values, *_, **__: values.is_floating_point(),
    aten.bincount: lambda values, weights=None, *_: weights is not None,
    aten.median: lambda values, *dim: bool(dim),
    aten.scatter_reduce: lambda values, dim, index, source, reduce, **_: reduce == "prod",
}


class NotDeterministic(RuntimeError):
    """Deterministic kernels are asked for, and CUDA has none for this operator."""


class DeviceMismatch(RuntimeError):
    """Operands lie on several devices."""


@dataclass
class Counts:
    """How often, by the innermost line of pipeline/ that asked for it, such as methods/afa/labels.py:30."""

    kernels: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def totals(self) -> dict[str, int]:
        return {name: counter.total() for name, counter in vars(self).items()}

    def since(self, before: dict[str, int]) -> dict[str, int]:
        return {name: total - before[name] for name, total in self.totals().items()}


_counts = Counts()  # of the pretended device that is entered


class Pretend(torch.Tensor):
    """A tensor on cuda:0. value: the same on the CPU; views share its memory."""

    value: Tensor
    is_cuda, is_meta = True, False

    @staticmethod
    def __new__(cls, value: Tensor) -> Pretend:
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        pretend = torch.Tensor._make_subclass(cls, meta, False)
        pretend.value = value
        return pretend

    @property
    def device(self) -> torch.device:
        return CUDA

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)

    def tolist(self) -> Any:
        _counts.waits[caller()] += 1
        return self.value.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({self.value})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return Pretend(self.value.clone()).requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(operator, args, kwargs or {})


def caller() -> str:
    """The innermost line of pipeline/ on the stack; `elsewhere` if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        _, inside, path = frame.f_code.co_filename.rpartition("/pipeline/")
        if inside:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree of lists, tuples and dicts with function(leaf) in place of each leaf; quicker than torch.utils._pytree."""
    if isinstance(tree, (list, tuple)):
        return type(tree)([mapped(function, part) for part in tree])
    if isinstance(tree, dict):
        return {key: mapped(function, part) for key, part in tree.items()}
    return function(tree)


def leaves_of(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (list, tuple, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves_of(part)
    else:
        yield tree


def dispatch(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One ATen operator on operands of both devices → its result, on the device that CUDA would have it on."""
    tensors = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    plain = [tensor for tensor in tensors if not isinstance(tensor, Pretend)]
    on_device = _is_on_device(operator, args, kwargs, bool(pretended))
    if operator.overloadpacket in (aten._to_copy, aten.copy_):
        _count_copy(args, on_device)
    elif operator.overloadpacket in INDEXING:
        if pretended:
            _check_indexing(operator, args)
    elif pretended and plain:
        _check_operands(operator, plain)
    if pretended and (operator.overloadpacket in WAITING or operator is aten.repeat_interleave.Tensor):
        _counts.waits[caller()] += 1
    if pretended and torch.are_deterministic_algorithms_enabled():
        if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CUDA"):  # one of ours: this PyTorch has no other
            with _Dispatch():
                return operator.redispatch(OUR_KERNEL, *args, **kwargs)
        packet = operator.overloadpacket
        if packet in UNORDERED or UNORDERED_IF.get(packet, lambda *_, **__: False)(*args, **kwargs):
            raise NotDeterministic(f"{operator} adds in no fixed order on CUDA, at {caller()}")
    if on_device and not _is_view(operator):
        _counts.kernels[caller()] += 1
    return _compute(operator, args, kwargs, pretended, on_device)


def _is_on_device(operator: Any, args: Any, kwargs: dict[str, Any], any_pretended: bool) -> bool:
    """Whether the result is: as a device among the arguments says, else as the destination, else as any operand is."""
    if operator.overloadpacket is aten.copy_:
        return isinstance(args[0], Pretend)
    wanted = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
    return wanted[0].type in ("cuda", "meta") if wanted else any_pretended


def _is_view(operator: Any) -> bool:
    return any(argument.alias_info and not argument.alias_info.is_write for argument in operator._schema.arguments)


def _count_copy(args: Any, on_device: bool) -> None:
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    if isinstance(source, Pretend) and not on_device:
        _counts.waits[caller()] += 1
    elif on_device and not isinstance(source, Pretend):
        _counts.uploads[caller()] += 1


def _check_indexing(operator: Any, args: Any) -> None:
    """An index on the CPU is uploaded; a mask is first turned into indices, whose number the host waits for."""
    indices = [index for index in args[1] if index is not None]
    values = args[2] if len(args) > 2 else None
    if not isinstance(args[0], Pretend):
        raise DeviceMismatch(f"{operator}: a CPU tensor is indexed by one on cuda:0, at {caller()}")
    if values is not None and values.ndim and not isinstance(values, Pretend):
        raise DeviceMismatch(f"{operator}: values lie on the CPU, at {caller()}")
    if any(not isinstance(index, Pretend) for index in indices):
        _counts.uploads[caller()] += 1
    is_masked_fill = values is not None and values.ndim == 0
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not is_masked_fill:
        _counts.waits[caller()] += 1


def _check_operands(operator: Any, plain: list[Tensor]) -> None:
    """Beside operands on CUDA, single numbers may lie on the CPU, but not as parts of a stack, nor in a list of tensors."""
    name = operator.overloadpacket.__name__
    whole = [tuple(tensor.shape) for tensor in plain if tensor.ndim or name in ("stack", "cat")]
    if whole or (name.startswith("_foreach") and len(plain) > 1):
        raise DeviceMismatch(f"{operator}: operands on cuda:0 and, of shapes {whole}, on the CPU, at {caller()}")


def _compute(operator: Any, args: Any, kwargs: dict[str, Any], pretended: list[Pretend], on_device: bool) -> Any:
    wrapper_of = {id(tensor.value): tensor for tensor in pretended}  # an operator in place returns its operand

    def unwrapped(leaf: Any) -> Any:
        if isinstance(leaf, Pretend):
            return leaf.value
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in wrapper_of:
            return wrapper_of[id(leaf)] if on_device else leaf.clone()
        if not on_device:
            return leaf
        with torch.inference_mode(leaf.is_inference()):  # a view of a normal tensor is normal in inference mode, too
            return Pretend(leaf)

    args, kwargs = mapped(unwrapped, (args, kwargs))
    return mapped(wrapped, operator(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"}))


class _Dispatch(TorchDispatchMode):
    """Sends operators without a Pretend operand to `dispatch`, too: torch.zeros(3, device="cuda")."""

    def __enter__(self) -> Any:
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the CPU, and copied
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*error)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(operator, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """`cuda` is `cuda:0`, as a driver would say; autocast's casts, which C++ does not make for tensors on meta."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(_numbered(value) for value in args)
        kwargs = {key: _numbered(value) for key, value in (kwargs or {}).items()}
        name = getattr(function, "__name__", "")
        if torch.is_autocast_enabled("cuda") and kwargs.get("out") is None:
            if name == "binary_cross_entropy":
                raise RuntimeError("binary_cross_entropy is unsafe to autocast")
            if name in HALF:
                args, kwargs = cast((args, kwargs), torch.get_autocast_dtype("cuda"))
            elif name in SINGLE:
                args, kwargs = cast((args, kwargs), torch.float32)
        return function(*args, **kwargs)


def _numbered(device: Any) -> Any:
    is_bare = isinstance(device, (str, torch.device)) and str(device) == "cuda"
    return CUDA if is_bare else device


def cast(tree: Any, dtype: torch.dtype) -> Any:
    def leaf(value: Any) -> Any:
        eligible = isinstance(value, Pretend) and value.is_floating_point() and value.dtype not in (dtype, torch.float64)
        return value.to(dtype) if eligible else value

    return mapped(leaf, tree)


def autocast_operands(*tensors: Tensor) -> list[Tensor]:
    if any(not isinstance(tensor, Pretend) for tensor in tensors):
        raise DeviceMismatch(f"an operand lies on the CPU, at {caller()}")
    return cast(list(tensors), torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else list(tensors)


class _Fused(torch.autograd.Function):
    """A function of CPU tensors as one kernel each way: what CUDA computes in one, and the CPU by operators of its own."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.random_state = function, torch.get_rng_state()
        _counts.kernels[caller()] += 1
        return Pretend(function(*(tensor.value.detach() for tensor in tensors)))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _counts.kernels[caller()] += 1
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)  # drops what the forward pass has dropped
            leaves = [tensor.value.detach().requires_grad_(tensor.is_floating_point()) for tensor in ctx.saved_tensors]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(ctx.function(*leaves), wanted, gradients[0].value, allow_unused=True))
        ordered = [next(found) if leaf.requires_grad else None for leaf in leaves]
        return None, *(None if gradient is None else Pretend(gradient) for gradient in ordered)


_sdpa, _lstm = F.scaled_dot_product_attention, torch._VF.lstm


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **settings: Any
) -> Any:
    if not isinstance(query, Pretend):
        return _sdpa(query, key, value, attn_mask, *rest, **settings)
    tensors = autocast_operands(query, key, value, *([] if attn_mask is None else [attn_mask]))
    return _Fused.apply(lambda q, k, v, mask=None: _sdpa(q, k, v, mask, *rest, **settings), *tensors)


def _recurrent(sequence: Tensor, hidden: Any, weights: Any, *settings: Any) -> Any:
    if not isinstance(sequence, Pretend):
        return _lstm(sequence, hidden, weights, *settings)
    tensors = autocast_operands(sequence, *hidden, *weights)
    zeros, dtype = [torch.zeros(state.shape) for state in hidden], tensors[0].dtype

    def outputs(x: Tensor, *parameters: Tensor) -> Tensor:
        return _lstm(x.float(), zeros, [parameter.float() for parameter in parameters], *settings)[0].to(dtype)

    return _Fused.apply(outputs, tensors[0], *tensors[1 + len(hidden) :]), None, None


@contextmanager
def pretended_cuda() -> Iterator[Counts]:
    """In it there is a device `cuda`; counts go on until it is left. torch.cuda.is_available() stays False."""
    global _counts
    _counts = Counts()
    availability = torch.cuda.amp.common
    saved = torch.cuda._lazy_init, availability.amp_definitely_not_available, torch.cuda.is_bf16_supported
    torch.cuda._lazy_init = lambda: None
    availability.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    F.scaled_dot_product_attention, torch._VF.lstm = _attention, _recurrent
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes parameters of another class
    try:
        with _Functions(), _Dispatch(), torch.autograd.set_multithreading_enabled(False):
            yield _counts
    finally:
        torch.cuda._lazy_init, availability.amp_definitely_not_available, torch.cuda.is_bf16_supported = saved
        F.scaled_dot_product_attention, torch._VF.lstm = _sdpa, _lstm
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.use_deterministic_algorithms(deterministic[0])  # as a training on CUDA sets them
        torch.backends.cudnn.deterministic = deterministic[1]
