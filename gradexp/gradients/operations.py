"""The bias of every operation of a network (§3.4, for any network).

At the input z that it gets, a differentiable operation y = op(z) is the affine map y = J z + b, with J its Jacobian there. The
bias b = y - J z is explicit in a convolution (its parameter), implicit in a batch normalisation (beta - gamma mean / sigma), in
an activation (y - s'(z) z), a product (-z1 z2) or a softmax, and zero in a ReLU, a pooling, a concatenation and whatever else
satisfies op(k z) = k op(z) for k > 0. With the biases of all operations f(x) = <df/dx, x> + sum_op <df/dy, b>, which is
Proposition 6 without a list of layers.

A TorchFunctionMode sees the operations of a forward pass: functional calls, methods, operators and in-place calls. FX would
refuse control flow that depends on data, and a dispatch mode works below autograd, where no gradients can be taken.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from inspect import unwrap
from itertools import zip_longest
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from gradexp.base.errors import UserError

IMAGES = "input"  # their name among operations, as FullGrad.layers has it

# Functions by their names, torch's and those of gradexp.layers (convolve, normalise). The first four sets only save time: the
# bias of any other function is found by evaluating it once more.
HOMOGENEOUS = {  # op(k z) = k op(z) for k > 0, where all operands depend on the images
    *("relu", "relu_", "leaky_relu", "max_pool", "max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"),
    *("dropout", "interpolate", "mean", "sum", "cat", "chunk", "split", "unbind", "__getitem__", "contiguous", "flatten"),
    *("clone", "unflatten", "permute", "reshape", "roll", "squeeze", "to", "transpose", "unsqueeze", "view"),
}
SUMS = {"add", "add_", "sub", "sub_"}  # homogeneous where no operand is a number
MULTILINEAR = {"mul", "mul_", "matmul", "mm", "bmm", "einsum"}  # no bias where one operand depends on the images
DIVISIONS = {"div", "div_"}  # no bias where the numerator alone depends on them
AFFINE = {"linear", "convolve", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
PLANAR = {  # the outputs (B, c, h, w) are planes
    *("convolve", "conv2d", "conv_transpose2d", "interpolate", "pixel_shuffle", "pixel_unshuffle"),
    *("batch_norm", "normalise", "instance_norm", "group_norm"),
    *("max_pool", "max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"),
}
TURNING = {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "__get__"}  # the last is x.mT
PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}  # of two maps: no planes
REDUCING = {"mean", "sum", "amax", "amin", "max", "min", "prod", "std", "var", "logsumexp", "median"}  # with `dim` first
MOVING = {"flip", "fliplr", "flipud", "rot90", "gather", "index_select", "take_along_dim", "sort", "argsort"}
RESHAPING = {"reshape", "view", "view_as", "unflatten", "flatten"}

# A letter for each dimension: images, channels, rows, columns, pixels (or tokens of a grid). Shapes do not show the layout: the
# attention of 64 tokens is (B, heads, 64, 64), and so may be a map.
MAP, TOKENS, FLAT = "bchw", "bnc", "bcn"
PLANES = ("bhw", "bwh")  # without channels
Shifts = frozenset[tuple[tuple[str, int], int]]  # of what is rolled: letter and size of a dimension, and by how much
UNSHIFTED: Shifts = frozenset()
MOVED = "-"  # pixels or tokens that are no longer where they were: flipped, picked, or column by column


@dataclass(eq=False)
class Operation:
    """An operation with a bias.

    kind: `affine` (convolution or linear layer), `norm` (batch normalisation by running statistics) or `other`. bias: to be
    multiplied with the gradient at the output; None for a layer without one. gradient: at the output, once a backward pass has
    reached it. channels: the bias of an affine operation, (C,). statistics: of a norm, the arguments of `norm_bias`. before:
    of a norm, the affine operation whose output it was given. layout: of its output, where that is a map over
    pixels or its tokens.
    """

    name: str
    kind: str
    bias: Tensor | None
    gradient: Tensor | None = None
    channels: Tensor | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    before: Operation | None = None
    layout: str | None = None
    version: int = 0  # of its output, which an in-place call changes
    readers: list[Any] = field(default_factory=list)  # nodes of autograd's graph: the operations that its output was given to


def norm_bias(mean: Tensor, variance: Tensor, weight: Any, bias: Any, eps: float, before: Tensor | None = None) -> Tensor:
    """beta - gamma (mean - b) / sqrt(variance + eps), the bias of a batch normalisation; all (C,).

    weight, bias: gamma and beta; None for 1 and 0. before: b, the bias of the layer in front of it, merged into this one.
    """
    shift = mean if before is None else mean - before
    return (0 if bias is None else bias) - (1 if weight is None else weight) * shift * torch.rsqrt(variance + eps)


class Operations(TorchFunctionMode):
    """The operations with a bias of the forward passes inside `recording`, and the grids of pixels that their maps have.

    images: the tensor with `requires_grad` that all is computed from. differentiable: whether biases keep their graph.
    Gradients are stored in the operations by the backward pass. Raises UserError for an operation that can't be seen.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, differentiable: bool) -> None:
        super().__init__()
        self.all: list[Operation] = []
        self.grids = {tuple(images.shape[-2:])}
        self._model, self._images, self._differentiable = model, images, differentiable
        self._dependent = {id(images): images}  # what depends on the images; kept alive, so that no id is used twice
        self._layouts: dict[int, str] = {id(images): MAP}  # of those of them that are maps or tokens
        self._shapes = {images.shape: MAP}  # of maps, with the layout of the last one
        self._shifts: dict[int, Shifts] = {}  # of what depends on the images and is rolled
        self._constant: set[int] = set()  # copies of tensors that did not depend on the images before a call wrote to them
        self._makers: dict[int, Operation] = {}  # by the id of the output
        self._calls: list[tuple[str, bool]] = []  # modules that are being called: name, whether it is a leaf
        self._count = Counter({IMAGES: 1})  # a module of this name is `input:2`
        self._hooks: list[RemovableHandle] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, operations are recorded. All hooks are removed at exit."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if "ScriptModule" in type(module).__name__:
                    raise UserError(f"{name or 'the model'} is TorchScript, which can't be looked into: give its source")
                stack.callback(module.register_forward_pre_hook(partial(self._enter, name)).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(self)
            yield

    def close(self) -> None:
        """Removes hooks on gradients and references into autograd's graph, which would otherwise keep each other alive."""
        for hook in self._hooks:
            hook.remove()
        for operation in self.all:
            operation.readers.clear()

    def depends(self, value: Any) -> bool:
        """Whether a value was computed from the images by operations that were seen."""
        return id(value) in self._dependent

    def merged(self, output: Tensor) -> list[Operation]:
        """The operations, each batch normalisation together with the layer in front of it, unless others use its output.

        output: of the network. An operation that it does not depend on does not count as a user.
        """
        swallowed, reached = set(), set(_graph(output))
        for operation in self.all:
            before = operation.before
            if before and sum(reader in reached for reader in before.readers) == 1:
                swallowed.add(before)
                if operation.bias is not None and before.channels is not None:
                    whole = norm_bias(**operation.statistics, before=before.channels)
                    operation.bias = whole.view_as(operation.bias)
        return [operation for operation in self.all if operation not in swallowed]

    # --- names ----------------------------------------------------------------------------------------------

    def _enter(self, name: str, module: nn.Module, _: Any) -> None:
        self._calls.append((self._unique(name), not list(module.children())))

    def _leave(self, *_: Any) -> None:
        self._calls.pop()

    def _unique(self, name: str) -> str:
        self._count[name] += 1
        return name if self._count[name] == 1 else f"{name}:{self._count[name]}"

    def _name(self, function: str) -> str:
        """The module's name for the first operation of a leaf; otherwise with the function's name behind it."""
        path, leaf = self._calls[-1] if self._calls else ("", False)
        if leaf and all(operation.name != path for operation in self.all):
            return path
        return self._unique(f"{path}.{function.strip('_')}".lstrip("."))

    # --- operations -----------------------------------------------------------------------------------------

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for operand in operands:
            self.check_seen(operand)
        dependent = [operand for operand in operands if self.depends(operand)]
        if not dependent:
            return function(*args, **kwargs)
        call = Call(function, getattr(function, "__name__", str(function)), args, kwargs, operands)
        changed = call.changed
        rule, given = self._rule(call), call
        if changed is not None and rule == self._linearise:
            if aside := call.aside():  # before its operand is changed
                rule = partial(self._linearise, products=self._products(aside))
            else:
                given = self._with_copy(call, changed)
        versions = [operand._version for operand in dependent]
        above = {operand.grad_fn for operand in dependent}
        returned = function(*args, **kwargs)
        if changed is None and rule:
            returned = tree_map(partial(_own, operands), returned)
        if changed is None and versions != [operand._version for operand in dependent]:
            raise UserError(
                f"{self._name(call.name)} changes its input in place, unseen; call the form that returns a new tensor"
            )
        outputs = tree_leaves(returned if changed is None else changed)
        if changed is None:
            if (same := _returned(dependent, outputs)) is not None:
                self._pass_on(same, outputs[0])
                return returned
            outputs = [output if self._comes_from_images(output, above) else None for output in outputs]
        if any(map(_differentiable, outputs)):
            for maker in {self._makers[id(operand)] for operand in dependent if id(operand) in self._makers}:
                maker.readers += [next(each.grad_fn for each in outputs if _differentiable(each))]
            with _no_checkpoint():
                operations = rule(given, outputs) if rule else [None] * len(outputs)
            for output, operation in zip(outputs, operations, strict=True):
                if _differentiable(output):
                    self._record(output, operation, call, in_place=changed is not None)
        return returned

    def _comes_from_images(self, output: Any, above: set[Any]) -> bool:
        """Whether an output was computed from the values of the images, not only from their shape or dtype.

        above: the nodes of autograd's graph that the operands were computed by.
        """
        return _differentiable(output) and any(node in above or self._is_source(node) for node in _graph(output))

    def _is_source(self, node: Any) -> bool:
        """Whether a node of autograd's graph stands for the images, which are a leaf or a part of one."""
        return node is self._images.grad_fn or getattr(node, "variable", None) is self._images

    def _pass_on(self, operand: Tensor, output: Tensor) -> None:
        """Records the output of a call as the operand that the call returned unchanged."""
        self._dependent[id(output)] = output
        if id(operand) in self._layouts:
            self._layouts[id(output)] = self._layouts[id(operand)]
        self._shifts[id(output)] = self._shifts.get(id(operand), UNSHIFTED)
        if id(operand) in self._makers:
            self._makers[id(output)] = self._makers[id(operand)]

    def _rule(self, call: Call) -> Any:
        """The method that computes the biases of a call; None where there are none."""
        floating = list(filter(_is_floating, call.operands))
        varying = sum(map(self.depends, floating))
        if varying == len(floating) and (call.name in HOMOGENEOUS or (call.name in SUMS and varying == len(call.args))):
            return None
        if varying > 1:
            return partial(self._multilinear, factors=varying) if call.name in MULTILINEAR else self._linearise
        if call.name in MULTILINEAR or (call.name in DIVISIONS and self.depends(call.args[0]) and not call.kwargs):
            return None
        if call.name in AFFINE and any(map(self.depends, call.operands[:2])):
            return self._affine
        statistics = call.statistics()
        return self._linearise if statistics is None else partial(self._norm, statistics=statistics)

    def _affine(self, call: Call, outputs: list[Any]) -> list[Operation | None]:
        weight, bias = (
            call.kwargs.get(name, call.args[i] if len(call.args) > i else None) for i, name in ((1, "weight"), (2, "bias"))
        )
        shaped = bias if bias is None or call.name == "linear" else bias.view(-1, *[1] * (weight.ndim - 2))
        return [Operation(self._name(call.name), "affine", shaped, channels=bias)]

    def _norm(self, call: Call, outputs: list[Any], statistics: dict[str, Any]) -> list[Operation | None]:
        given = call.arguments["input"]
        before = self._makers.get(id(given))
        # A linear layer's channels are last, a norm's second.
        if before and (before.kind != "affine" or before.version != given._version or outputs[0].ndim == 3):
            before = None
        bias = norm_bias(**statistics).view(-1, *[1] * (outputs[0].ndim - 2))
        return [Operation(self._name(call.name), "norm", bias, statistics=statistics, before=before)]

    def _multilinear(self, call: Call, outputs: list[Any], factors: int) -> list[Operation | None]:
        """b = y - J z = (1 - n) y of a product of n factors that depend on the images."""
        return [self._other(call, (1 - factors) * self._value(outputs[0]))]

    def _linearise(self, call: Call, outputs: list[Any], products: list[Tensor | None] | None = None) -> list[Operation | None]:
        """b = y - J z of any operation."""
        operations: list[Operation | None] = []
        for output, product in zip(outputs, products or self._products(call), strict=True):
            operations.append(None)
            if _differentiable(output):
                value = self._value(output)
                operations[-1] = self._other(call, value.clone() if product is None else value - product)
        return operations

    def _value(self, output: Tensor) -> Tensor:
        return _finite(output if self._differentiable else output.detach())

    def _other(self, call: Call, bias: Tensor) -> Operation | None:
        """The operation with this bias; None where it is 0."""
        # A column is enough for most, and reading all of it takes as long as computing it.
        some = (bias.ndim and bias[..., 0].any()) or bias.any()
        return Operation(self._name(call.name), "other", bias) if some else None

    def _products(self, call: Call) -> list[Tensor | None]:
        """J z for each output."""
        try:
            return self._by_reverse_mode(call) if self._differentiable else self._by_forward_mode(call)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise UserError(f"the bias of {self._name(call.name)} can't be computed: {why}") from None

    def _by_forward_mode(self, call: Call) -> list[Tensor | None]:
        """The operation is evaluated once more, on dual numbers whose tangent is the operand itself."""

        def dual(leaf: Any) -> Any:
            if not self.depends(leaf):
                return leaf
            value = leaf.detach()
            if id(leaf) in self._constant:
                tangent = torch.zeros_like(value)
            else:
                tangent = _finite(value if call.changed is None else value.clone())
            if tangent.stride() != value.stride():  # `value` is expanded, or a slice
                value = value.contiguous()
            return forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]

        _load_forward_mode()
        try:
            with torch.no_grad(), forward_ad.dual_level():
                tangents = [_tangent(leaf) for leaf in call.with_arguments(dual).outputs()]
            if not any(tangent is not None for tangent in tangents):
                raise NotImplementedError  # an operator of an extension, which knows no dual numbers
            return tangents
        except NotImplementedError:
            return [product if product is None else product.detach() for product in self._by_reverse_mode(call)]

    def _by_reverse_mode(self, call: Call) -> list[Tensor | None]:
        """Differentiable: d/du <J'u, z>, which is J z, at u = 0."""
        operands = list[Tensor]()

        def copied(leaf: Any) -> Any:  # what is in the network may be changed in place later
            if not self.depends(leaf) or id(leaf) in self._constant:
                return leaf
            operands.append(leaf.clone() if leaf.requires_grad else leaf.clone().requires_grad_())
            return operands[-1].clone() if leaf is call.changed else operands[-1]

        with torch.enable_grad():
            products: list[Tensor | None] = []
            for output in call.with_arguments(copied).outputs():
                if not _differentiable(output):
                    products.append(None)
                    continue
                u = torch.zeros_like(output, requires_grad=True)
                slopes = torch.autograd.grad(output, operands, u, create_graph=True, allow_unused=True)
                found = zip(slopes, operands, strict=True)
                paired = [(slope, z) for slope, z in found if slope is not None and slope.requires_grad]
                sums, values = [slope for slope, _ in paired], [_finite(z) for _, z in paired]
                products.append(torch.autograd.grad(sums, u, values, create_graph=True)[0] if paired else None)
        return products

    def _record(self, output: Tensor, operation: Operation | None, call: Call, *, in_place: bool) -> None:
        if call.name in PLANAR and output.ndim == 4:
            self.grids.add(tuple(output.shape[-2:]))
        layout, self._shifts[id(output)] = self._place(output, call)
        self._layouts.pop(id(output), None)  # of what stood there before a call wrote to it
        if layout:
            self._layouts[id(output)] = layout
            if output.ndim == 4 and layout != MOVED:
                self._shapes[output.shape] = layout
        # What changes through a view is the tensor behind it, and later operations may take that through any other view.
        base = output._base if in_place and output._base is not None else output
        self._dependent |= {id(tensor): tensor for tensor in (output, base)}
        if operation is None:
            return
        layout = self._layouts.get(id(base))
        operation.layout = None if layout == MOVED or self._shifts.get(id(base)) else layout
        operation.version = output._version
        self.all.append(operation)
        self._makers[id(output)] = operation
        if base is not output:
            operation.bias = _behind(operation.bias, output, base)
        self._hooks.append(base.register_hook(partial(_keep, operation)))  # type: ignore[no-untyped-call]

    def _place(self, output: Tensor, call: Call) -> tuple[str | None, Shifts]:
        """The layout that an output would have if nothing were rolled, and by how much it is.

        Rolled pixels are elsewhere until they are rolled back, as behind the attention of shifted windows. A sum of rolled
        pixels and of others is where the others are; a product, as in attention, is where its first operand of as many
        dimensions is.
        """
        given = [each for each in call.operands if self.depends(each) and each is not call.overwritten]
        if not given:
            return None, UNSHIFTED
        if call.name == "roll":
            return self._rolled(given[0], call)
        if call.name in PRODUCTS and len(given) > 1:
            placed = [each for each in given if each.ndim == output.ndim][:1]
        else:
            placed = [each for each in given if self._has_pixels(each)]
        shifts = {self._shifts.get(id(each), UNSHIFTED) for each in placed} or {UNSHIFTED}
        if len(shifts) > 1 and UNSHIFTED not in shifts:
            return MOVED, UNSHIFTED
        layout = self._layout(output, call, given)
        return layout, UNSHIFTED if layout == MOVED or UNSHIFTED in shifts else shifts.pop()

    def _has_pixels(self, given: Tensor) -> bool:
        """Whether a tensor has a place for each pixel or token, unlike a gate, a mean over them or a class token."""
        layout = self._layouts.get(id(given))
        if layout is None or layout == MOVED:
            return bool(self._shifts.get(id(given)))
        return all(size > 1 for letter, size in zip(layout, given.shape, strict=True) if letter in "hwn")

    def _rolled(self, given: Tensor, call: Call) -> tuple[str | None, Shifts]:
        """Layout and shifts behind a `roll`. Rolled channels and features move no pixel."""
        shifts, moves = self._shifts.get(id(given), UNSHIFTED), call.moves()
        layout = self._layouts.get(id(given), MOVED)
        is_vector = id(given) not in self._layouts and given.ndim <= 4  # or the heads of an attention
        if is_vector and moves and all(dim % given.ndim == given.ndim - 1 for dim, _ in moves):
            return None, shifts
        if layout == MOVED or moves is None:
            return MOVED, UNSHIFTED
        total = Counter(dict(shifts))
        for dim, by in moves:
            total[layout[dim], given.shape[dim]] += by
        left = ((of, by % of[1]) for of, by in total.items() if of[0] != "c")
        return layout, frozenset((of, by) for of, by in left if by)

    def _layout(self, output: Tensor, call: Call, given: list[Tensor]) -> str | None:
        """The layout of an output of `given`; None for one without pixels, such as a product of maps."""
        known = [layout for each in given if (layout := self._layouts.get(id(each)))]
        if (known and set(known) == {MOVED}) or (known and call.name in MOVING) or (known and call.picks()):
            return MOVED
        given = [each for each in given if self._layouts.get(id(each)) != MOVED]
        if output.ndim not in (3, 4) or (call.name in PRODUCTS and len(given) > 1):
            return None
        if call.name in PLANAR and output.ndim == 4:
            return MAP
        if output.ndim == 3 and call.name not in RESHAPING and (maps := [each for each in given if each.ndim == 4]):
            return self._reduced(output, maps[0], call)
        if output.ndim == 4 and [self._layouts.get(id(each)) in PLANES for each in given] == [True]:
            return self._with_channel(output, given[0])
        alike = [operand for operand in given if operand.ndim == output.ndim]
        if call.name in RESHAPING and (output.ndim == 4 or not alike):
            return self._reshaped(output, given[0])
        for operand in alike:
            if layout := self._layouts.get(id(operand)):
                if layout in PLANES and (call.name in AFFINE or output.shape != operand.shape):
                    return None
                return turned(layout, operand, output) if call.name in TURNING else layout
        return TOKENS if output.ndim == 3 and (not alike or call.name in (*TURNING, "linear")) else None

    def _reduced(self, output: Tensor, given: Tensor, call: Call) -> str | None:
        """The layout of what is left of `given`, four dimensions, without one of them."""
        layout = self._layouts.get(id(given))
        if layout is None:
            return TOKENS
        if call.name not in REDUCING:  # a view of a part, or another function, such as `unfold`
            return turned(layout, given, output)
        dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else call.kwargs.get("axis"))
        gone = dim[0] if isinstance(dim, list | tuple) else dim
        return layout.replace(layout[gone], "") if isinstance(gone, int) else None

    def _with_channel(self, output: Tensor, plane: Tensor) -> str | None:
        """The layout of a plane with a dimension of size 1 more."""
        layout, shape = self._layouts[id(plane)], list(plane.shape)
        places = (place for place in (1, 2, 3) if list(output.shape) == [*shape[:place], 1, *shape[place:]])
        return next((f"{layout[:place]}c{layout[place:]}" for place in places), None)

    def _reshaped(self, output: Tensor, given: Tensor) -> str | None:
        """A map where an earlier one has the shape. Three dimensions are those of tokens unless they are a flattened map."""
        if output.ndim == 4:
            return self._shapes.get(output.shape)
        layout = self._layouts.get(id(given)) or ""
        if "w" in layout and "h" in layout and layout.index("w") < layout.index("h"):
            return MOVED
        is_flat = layout == MAP and output.shape[1] == given.shape[1]
        return FLAT if is_flat else TOKENS

    def _with_copy(self, call: Call, changed: Tensor) -> Call:
        """The call with a copy of the tensor that it is going to change."""
        copy = changed.clone() if self._differentiable else changed.detach().clone()
        if not self.depends(changed):
            self._constant.add(id(copy))
        self._dependent[id(copy)] = copy
        return call.with_arguments(lambda leaf: copy if leaf is changed else leaf)

    def check_seen(self, operand: Tensor) -> None:
        """Raises UserError for a value that was computed from the images by no torch function that can be seen."""
        if operand.grad_fn is None or self.depends(operand):
            return
        for node in _graph(operand):
            if self._is_source(node):
                where = f" of {self._calls[-1][0]}" if self._calls and self._calls[-1][0] else ""
                raise UserError(
                    f"{operand.grad_fn.name().removesuffix('Backward')}, whose value is an input{where}, is no torch function "
                    f"that can be seen: its bias can't be computed. Write it with torch's own functions, outside of "
                    f"autograd.Function, TorchScript, torch.vmap and torch.func"
                )


# --- calls ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of a torch function."""

    function: Any
    name: str
    args: Any
    kwargs: Any
    operands: list[Tensor]

    def with_arguments(self, change: Any) -> Call:
        """The same call with each leaf of its arguments replaced by `change(leaf)`."""
        args, kwargs = tree_map(change, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def outputs(self) -> list[Any]:
        """Calls. Returns the leaves of what it returns, or the tensor that it changes."""
        returned = self.function(*self.args, **self.kwargs)
        return tree_leaves(returned if self.changed is None else self.changed)

    @cached_property
    def changed(self) -> Tensor | None:
        """The tensor that the call changes in place or writes to, if it does."""
        if isinstance(self.kwargs.get("out"), Tensor):
            written: Tensor = self.kwargs["out"]
            return written
        first = self.args[0] if self.args else self.kwargs.get("input")
        method = self.name == "__setitem__" or (self.name.endswith("_") and not self.name.endswith("__"))
        if method or self.arguments.get("inplace"):
            assert isinstance(first, Tensor)
            return first
        return None

    @property
    def overwritten(self) -> Tensor | None:
        """The tensor all values of which the call replaces, if it does."""
        place = {"copy_": 1, "__setitem__": 2}.get(self.name)
        if place is None or self.changed is None or len(self.args) <= place:
            return None
        return self.changed if getattr(self.args[place], "shape", None) == self.changed.shape else None

    def aside(self) -> Call | None:
        """The same call of a function with an argument `inplace`, with a result of its own; None for other calls."""
        is_inplace = self.arguments.get("inplace")
        return replace(self, args=(), kwargs=self.arguments | {"inplace": False}) if is_inplace else None

    def moves(self) -> list[tuple[int, int]] | None:
        """Of a `roll`, (dimension, by how much it is rolled); None where it rolls a tensor as if it were flat."""
        given = (self.kwargs.get(name, value) for name, value in zip_longest(("shifts", "dims"), self.args[1:]))
        shifts, dims = ([index(each)] if isinstance(each, SupportsIndex) else list(each or ()) for each in given)
        return list(zip(dims, shifts, strict=True)) if dims else None

    def picks(self) -> bool:
        """Whether it takes pixels or tokens by a tensor of indices."""
        return self.name == "__getitem__" and any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.args[1:]))

    def statistics(self) -> dict[str, Any] | None:
        """What `norm_bias` takes, of a batch normalisation by running statistics; None for other calls."""
        given = self.arguments
        if self.name not in ("batch_norm", "normalise") or given.get("training"):
            return None
        if given.get("running_mean") is None or given.get("running_var") is None:
            return None
        names = {"mean": "running_mean", "variance": "running_var", "weight": "weight", "bias": "bias"}
        return {key: given.get(name) for key, name in names.items()} | {"eps": given.get("eps", 1e-5)}

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by their names, as far as these are known: those of builtin functions are not."""
        code = getattr(unwrap(self.function), "__code__", None)
        names = code.co_varnames[: code.co_argcount] if code else ()
        return dict(zip(names, self.args, strict=False)) | self.kwargs


def _graph(value: Tensor) -> Iterator[Any]:
    """The nodes of autograd's graph that a value was computed by."""
    nodes, seen = [value.grad_fn] if value.grad_fn else [], set[Any]()
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            yield node
            nodes += [below for below, _ in node.next_functions if below is not None]


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _own(operands: list[Tensor], leaf: Any) -> Any:
    """A copy of an output that is a view of a hidden tensor, as instance_norm returns it; other outputs as they are.

    An in-place operation on such a view would leave its hook behind, on a node that no gradient reaches any more.
    """
    if not _differentiable(leaf) or leaf._base is None:
        return leaf
    memory = leaf.untyped_storage().data_ptr()
    return leaf if any(memory == each.untyped_storage().data_ptr() for each in operands) else leaf.clone()


def _returned(operands: list[Tensor], outputs: list[Any]) -> Tensor | None:
    """The operand that a call returned as it was, such as `contiguous`, `float` or a dropout in eval mode; None for others."""
    if len(outputs) != 1 or not _differentiable(outputs[0]):
        return None
    return next((each for each in operands if each.dtype == outputs[0].dtype and each.is_set_to(outputs[0])), None)


def _finite(z: Tensor) -> Tensor:
    """z, with 0 for infinities and NaN.

    A finite output does not depend on them, as on the logits that a mask excludes; but zero times them would be NaN.
    """
    if z.device.type == "cpu" and z.detach().sum().isfinite():  # other devices would wait for it
        return z
    return torch.where(z.isfinite(), z, 0)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _tangent(leaf: Any) -> Tensor | None:
    return forward_ad.unpack_dual(leaf).tangent if _is_floating(leaf) else None  # type: ignore[no-untyped-call]


def _no_checkpoint() -> AbstractContextManager[Any]:
    """Inside, torch.utils.checkpoint does not see what is saved for biases: it expects what its part of the network saves."""
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


@cache
def _load_forward_mode() -> None:
    """Loads torch's derivatives of forward mode, without the warning about torch's own code that comes with them."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


def turned(layout: str, given: Tensor, output: Tensor) -> str | None:
    """The layout of a view of `given` with its dimensions in another order, which strides tell; None if it is no such view."""
    letters, found = list(zip(layout, given.shape, given.stride(), strict=True)), ""
    for size, stride in zip(output.shape, output.stride(), strict=True):
        same = next((each for each in letters if each[1:] == (size, stride)), None)
        if same is None:
            return None
        letters.remove(same)
        found += same[0]
    return found


def _keep(operation: Operation, gradient: Tensor) -> None:
    operation.gradient = gradient


def _behind(bias: Tensor | None, view: Tensor, base: Tensor) -> Tensor | None:
    """The bias of a view as one of the tensor behind it, zero elsewhere."""
    if bias is None:
        return None
    whole = torch.zeros_like(base)
    whole.as_strided(view.size(), view.stride(), view.storage_offset() - base.storage_offset()).copy_(bias)
    return whole
