"""A second device that computes on the CPU and, as a GPU does, refuses operations on tensors of several devices.

A tensor on it has a storage without bytes, which holds the CPU's storage with its numbers; views and parameters share it."""
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils import backend_registration

INDEXED = "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"  # whose indices may lie on the CPU
LIBRARIES, GENERATORS, CPU_GENERATOR = [], weakref.WeakSet(), torch.Generator


def is_far(x): return isinstance(x, torch.Tensor) and x.device.type == "far"


def near(far):
    "The numbers of a tensor on the device, as a tensor on the CPU in the same memory"
    return torch.empty(0, dtype=far.dtype).set_(far.untyped_storage().near, far.storage_offset(), far.shape, far.stride())


def lie(far, storage, like):
    "Gives a tensor a storage, and the shape and strides of another: PyTorch's way for tensors without numbers looks at no memory"
    place = torch.ops.aten.set_.source_Storage_storage_offset
    return place._op_dk(torch._C.DispatchKey.Meta, far, storage, like.storage_offset(), like.shape, like.stride())


def put(like, storage=None):
    "A tensor on the device for one on the CPU: a view of the storage, or with one of its own"
    far = torch._C._acc.create_empty_tensor((0,), like.dtype)
    if storage is None:
        storage = far.untyped_storage()
        storage.near = like.untyped_storage()
    return lie(far, storage, like)


def through(f, x):
    "A tensor, device or list of them, changed; and anything else as it is"
    if isinstance(x, (list, tuple)): return [through(f, y) for y in x]
    return f(x) if isinstance(x, (torch.Tensor, torch.device)) else x


def written(op, args, kwargs):
    "The tensors that an operation writes to"
    given = [*zip(op._schema.arguments, args), *((a, kwargs[a.name]) for a in op._schema.arguments if a.name in kwargs)]
    return [value for a, value in given if a.alias_info and a.alias_info.is_write]


def check(op, args, kwargs, others):
    "Refuse tensors on the CPU beside some on the device, as a GPU does, unless they are one number to read, or indices"
    indices = args[1] if op._schema.name in INDEXED and is_far(args[0]) else ()
    for x in others:
        if any(x is i for i in indices) or not x.dim() and all(x is not w for w in written(op, args, kwargs)): continue
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, far:0 and cpu! (in {op})")


def compute(op, *args, **kwargs):
    "Any operation on the device, on the CPU's memory"
    pairs, others, draw = [], [], kwargs.get("generator")
    def take(x):
        if isinstance(x, torch.device): return torch.device("cpu")
        if is_far(x): pairs.append((x, near(x)))
        else: others.append(x)
        return pairs[-1][1] if is_far(x) else x
    taken, named = through(take, args), {name: through(take, x) for name, x in kwargs.items()}
    if pairs and others: check(op, args, kwargs, others)
    if draw is not None and all(draw._cdata != g._cdata for g in GENERATORS):
        raise RuntimeError("Expected a 'far' device type for generator but found 'cpu'")
    found = op(*taken, **named)
    for x, t in pairs:
        if x.shape != t.shape or x.stride() != t.stride(): lie(x, x.untyped_storage(), t)
    def give(y):
        for x, t in pairs:
            if t is y: return x
        shared = y.untyped_storage()._cdata
        return put(y, next((x.untyped_storage() for x, t in pairs if t.untyped_storage()._cdata == shared), None))
    return tuple(through(give, found)) if isinstance(found, tuple) else through(give, found)


def empty(size, *, dtype=None, memory_format=None, **kwargs):
    "What most operations begin with"
    return put(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def copy(source, to, non_blocking=False):
    "The one operation between devices"
    (near(to) if is_far(to) else to).copy_(near(source) if is_far(source) else source)
    return to


class Generator(torch._C.Generator):
    "Draws on the device what the CPU would draw"
    def __new__(cls, device="cpu"):
        return super().__new__(cls) if torch.device(device).type == "far" else CPU_GENERATOR(device)

    def __init__(self, device="cpu"): GENERATORS.add(self)

    @property
    def device(self): return torch.device("far:0")


def deepcopy(tensor, memo, usual=torch.Tensor.__deepcopy__):
    if not is_far(tensor): return usual(tensor, memo)
    return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))


@contextmanager
def far_device():
    "Within the context \"far\" is a device; skips where PyTorch knows no devices written in Python, or has a real one"
    start = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if start is None or torch.cuda.is_available(): pytest.skip("no device can be written in Python, or there is a GPU")
    if not LIBRARIES:
        start("far")
        for name, f in (("_", None), ("aten", copy)): LIBRARIES.append(torch.library.Library(name, "IMPL"))
        LIBRARIES[0].fallback(compute, "PrivateUse1")
        LIBRARIES[1].impl("_copy_from", copy, "PrivateUse1")
        LIBRARIES[1].impl("empty.memory_format", empty, "PrivateUse1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.Tensor, "__deepcopy__", deepcopy)
        yield


def moved(model):
    "The model, on the device"
    model = model.to("far")
    model.tie_weights()
    return model
