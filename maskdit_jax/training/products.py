"""Matrix products of a function, and what its backward pass keeps of them, read from its jaxpr.

Nothing is run, and nothing here knows a method: a product belongs to the part of the network, a top-level
name among the parameters, whose parameter it multiplies. LINEAR is a product of data with a parameter,
ATTENTION one of data with data, which belongs to the part that made them.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

LINEAR, ATTENTION = "linear", "attention"
INPUT = "input"  # the part that data belong to before they have met a parameter
_PRODUCTS = ("dot_general", "conv_general_dilated")
# The same array in another shape, or a piece of it.
_VIEWS = (
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "slice",
    "dynamic_slice",
    "copy",
    "reduce_precision",
)


class Key(NamedTuple):
    """Where something is counted: a part of the network, and LINEAR or ATTENTION."""

    part: str
    kind: str


@dataclass(eq=False)
class Tensor:
    """An array that has to be in memory, in bytes; of a loop, of all its turns.

    It is an operand or the result of a product, the input of a turn of a loop, or has a name from
    `checkpoint_name`. kind is ATTENTION if nothing but products of data with data has to do with it.
    """

    size: int
    part: str
    kind: str


@dataclass(eq=False)
class _Value:
    """What is known of an array, and of its views. data: it depends on more than parameters.

    size: bytes; 0 for what the function is given. part: the last one that worked on it. tensor: what holds
    it, if it has to be in memory; otherwise it can be computed from its sources without a product.
    """

    size: int = 0
    part: str = ""
    data: bool = False
    sources: Sequence["_Value"] = ()
    tensor: Tensor | None = None

    def store(self, kind: str) -> None:
        """Note that it has to be in memory. What depends on parameters alone is with them."""
        if self.data and self.tensor is None:
            self.tensor = Tensor(self.size, self.part, kind)
        if self.tensor and kind == LINEAR:
            self.tensor.kind = LINEAR


def _tensors(value: _Value) -> frozenset[Tensor]:
    """What an array can be computed from without a product."""
    found, seen, waiting = set(), {value}, [value]
    while waiting:
        value = waiting.pop()
        if value.tensor:
            found.add(value.tensor)
            continue
        waiting += {source for source in value.sources if source not in seen}
        seen.update(value.sources)
    return frozenset(found)


class Products(NamedTuple):
    """macs: multiply-adds by Key, the parts as data meet them. kept: of each array returned, the tensors
    that it can be computed from without a product.
    """

    macs: Counter[Key]
    kept: list[frozenset[Tensor]]


def trace_products(function: Callable[..., Any], params: dict[str, Any], *data: Any) -> Products:
    """Products of function(params, *data); both may be shapes. Convolutions count as products.

    All turns of a `scan` are counted, of a `cond` the branch with most products.

    Raises:
      ValueError: there is a product in a loop whose turns are not known before it runs.
    """
    closed = jax.make_jaxpr(function)(params, *data)
    values = [_Value(part=path[0].key) for path, _ in jax.tree.leaves_with_path(params)]
    values += [_Value(part=INPUT, data=True) for _ in jax.tree.leaves(data)]
    walk = _Walk([INPUT])
    results = walk.run(closed, values, 1)
    return Products(walk.macs, [_tensors(value) for value in results])


@dataclass
class _Walk:
    """One pass over a jaxpr. order: the parts, as data meet their parameters."""

    order: list[str]
    macs: Counter[Key] = field(default_factory=Counter)

    def run(self, jaxpr: Jaxpr | ClosedJaxpr, arguments: Sequence[_Value], turns: int) -> list[_Value]:
        """Values of the results, given those of the arguments, of something that runs `turns` times."""
        jaxpr = _open(jaxpr)
        known = dict(zip(jaxpr.invars, arguments, strict=True))
        known |= {var: _Value() for var in jaxpr.constvars}

        def read(atom):
            return _Value() if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self.apply(equation, [read(atom) for atom in equation.invars], turns)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, equation: JaxprEqn, inputs: list[_Value], turns: int) -> list[_Value]:
        name, bodies = equation.primitive.name, _jaxprs_of(equation)
        if name in _PRODUCTS:
            return [self.product(equation, inputs, turns)]
        if name == "scan":
            return self.scan(equation, inputs, turns)
        if name == "cond":
            branches = [(walk := _Walk(self.order), walk.run(body, inputs[1:], turns)) for body in bodies]
            walk, chosen = max(branches, key=lambda branch: branch[0].macs.total())
            self.macs += walk.macs
            return chosen
        if len(bodies) == 1 and len(_open(bodies[0]).invars) == len(inputs):
            return self.run(bodies[0], inputs, turns)
        if any(map(_has_product, bodies)):
            raise ValueError(f"{name}: a product is computed in it who knows how often")
        if name in _VIEWS:
            return inputs[:1]
        results = [self.merge(inputs, atom.aval, turns) for atom in equation.outvars]
        if name == "name":
            results[0].store(LINEAR)
        return results

    def merge(self, inputs: Sequence[_Value], aval: Any, turns: int) -> _Value:
        """An array computed from all the inputs without a product."""
        data = any(value.data for value in inputs)
        parts = [value.part for value in inputs if value.part]
        if data:
            self.order += [part for part in dict.fromkeys(parts) if part not in self.order]
            parts.sort(key=self.order.index, reverse=True)
        return _Value(turns * _bytes(aval), parts[0] if parts else "", data, inputs)

    def product(self, equation: JaxprEqn, inputs: list[_Value], turns: int) -> _Value:
        kind = ATTENTION if all(value.data for value in inputs) else LINEAR
        result = self.merge(inputs, equation.outvars[0].aval, turns)
        result.part = next((v.part for v in inputs if v.part and not v.data), result.part)
        self.macs[Key(result.part, kind)] += turns * _multiply_adds(equation)
        for value in inputs:
            value.store(kind)
        result.store(kind)
        return result

    def scan(self, equation: JaxprEqn, inputs: list[_Value], turns: int) -> list[_Value]:
        body, length = equation.params["jaxpr"], equation.params["length"]
        first = equation.params["num_consts"]
        last = first + equation.params["num_carry"]
        avals = [atom.aval for atom in equation.invars[first:last]]

        def stored(values: Sequence[_Value], turns: int) -> list[_Value]:
            fresh = [_Value(turns * _bytes(a), v.part, v.data) for v, a in zip(values, avals)]
            for value in fresh:
                value.store(LINEAR)
            return fresh

        carried = inputs[first:last]
        while True:  # until what is known of the carried arrays no longer changes
            walk = _Walk(self.order)
            before = [*inputs[:first], *stored(carried, turns * length), *inputs[last:]]
            after = walk.run(body, before, turns * length)
            merged = [self.merge(pair, aval, turns) for pair, aval in zip(zip(carried, after), avals)]
            if [(v.part, v.data) for v in merged] == [(v.part, v.data) for v in carried]:
                self.macs += walk.macs
                return [*stored(merged, turns), *after[len(avals) :]]
            carried = merged


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _multiply_adds(equation: JaxprEqn) -> int:
    """Of a product, the number of its results times the number of summands of each."""
    avals: list[Any] = [atom.aval for atom in (*equation.invars, *equation.outvars)]
    left, right, out = (aval.shape for aval in avals)
    results = math.prod(out)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return results * math.prod(left[i] for i in contracted)
    out_features = right[equation.params["dimension_numbers"].rhs_spec[0]]
    return results * math.prod(right) // out_features


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _jaxprs_of(equation: JaxprEqn) -> list[Jaxpr | ClosedJaxpr]:
    """The jaxprs among the parameters of an equation."""
    found = []
    for value in equation.params.values():
        several = value if isinstance(value, tuple | list) else [value]
        found += [x for x in several if isinstance(x, Jaxpr | ClosedJaxpr)]
    return found


def _has_product(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
    equations = _open(jaxpr).eqns
    return any(e.primitive.name in _PRODUCTS or any(map(_has_product, _jaxprs_of(e))) for e in equations)
