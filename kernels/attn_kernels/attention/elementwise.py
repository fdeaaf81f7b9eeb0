"""Elementwise functions of scores, run on the arrays that a kernel has for a tile.

A function is traced once on small arrays that stand for a tile: of 2 queries and 3 keys, so that
the shape of everything in it says which axes it has. A kernel then runs it with arrays of its own,
which only have to broadcast: a number, a row, a column or all pairs, queries along either axis. A
vector has a number for every row of the pairs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

QUERIES, KEYS = 2, 3
PAIRS = (1, 1, QUERIES, KEYS)
PLACE = (1, 1, 1, 1), (1, 1, 1), (QUERIES, 1), (KEYS,)  # b, h and positions of queries and keys

CALLS = {
    name: key
    for names, key in (
        (("jit", "pjit", "remat2", "checkpoint"), "jaxpr"),
        (("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
    )
    for name in names
}
SHAPES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "reduce_sum"}
SAME = {"copy", "copy_p", "stop_gradient", "pcast", "pvary"}


def _pow(x, y):
    """`x ** y`, by logarithms."""
    y = jnp.asarray(y, x.dtype)
    size = jnp.where(y == 0, 1, jnp.exp(y * jnp.log(jnp.abs(x))))
    half = y / 2
    sign = jnp.where(half == jax.lax.round(half), 1, -1)
    negative = jnp.where(y == jax.lax.round(y), sign * size, jnp.nan)
    return jnp.where(x < 0, negative, size)


def _integer_pow(x, y):
    return 1 / _integer_pow(x, -y) if y < 0 else math.prod([x] * y, start=1)


def _erf(x):
    """To 2e-7: Abramowitz and Stegun, 7.1.26."""
    size = jnp.abs(x)
    t = 1 / (1 + 0.3275911 * size)
    terms = 1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592
    series = functools.reduce(lambda total, term: (total + term) * t, terms, 0.0)
    return jnp.sign(x) * (1 - series * jnp.exp(-size * size))


def _floor(x):
    nearest = jax.lax.round(x)
    return nearest - jnp.where(nearest > x, 1, 0).astype(x.dtype)


def _remainder(x, y):
    quotient = x / y
    return x - y * jnp.sign(quotient) * jnp.floor(jnp.abs(quotient))


# By name, functions of the arguments and parameters of a primitive.
REWRITTEN = {
    "add_any": lambda x, y: x + y,
    "ceil": lambda x: -jnp.floor(-x),
    "cosh": lambda x: (jnp.exp(x) + jnp.exp(-x)) / 2,
    "erf": lambda x, **_: _erf(x),
    "erfc": lambda x, **_: 1 - jax.lax.erf(x),
    "exp_neg_sq": lambda x, **_: jnp.exp(-x * x),
    "expm1": lambda x, **_: jnp.exp(x) - 1,
    "floor": _floor,
    "integer_pow": _integer_pow,
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "log1p": lambda x, **_: jnp.log(1 + x),
    "logistic": lambda x, **_: 1 / (1 + jnp.exp(-x)),
    "not": lambda x: x ^ jnp.array(True if x.dtype == jnp.bool_ else -1, x.dtype),
    "one_minus_square": lambda x: 1 - x * x,
    "pow": _pow,
    "rem of floats": _remainder,
    "sinh": lambda x: (jnp.exp(x) - jnp.exp(-x)) / 2,
    "square": lambda x: x * x,
    "tan": lambda x, **_: jnp.sin(x) / jnp.cos(x),
}
COMMON = frozenset(
    "abs add and clamp convert_element_type cos div eq exp exp2 ge gt le log lt max "
    "min mul ne neg or rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sqrt sub tanh xor".split()
)


def stand_ins(operands: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """A place and `[B|1, H|1, T|1, S|1]` operands, in the shapes that stand for a tile."""
    args = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in PLACE]
    for x in operands:
        axes = [n if length > 1 else 1 for n, length in zip((QUERIES, KEYS), x.shape[2:])]
        args.append(jax.ShapeDtypeStruct((1, 1, *axes), x.dtype))
    return args


def obstacle(function: Callable, args: Sequence[Any], primitives: frozenset[str]) -> str | None:
    """Why a function is not elementwise in these primitives, None if it is.

    Args:
      function: of arrays in the shapes that this module names.
      args: their shapes and dtypes.
      primitives: what a kernel has.
    """
    closed = jax.make_jaxpr(function)(*args)
    return _obstacle(closed.jaxpr, closed.consts, primitives)


def _obstacle(jaxpr, consts, primitives):
    for const in consts:
        if jnp.size(const) > 1:
            return f"it closes over an array of shape {jnp.shape(const)}: make that an operand"
    for eqn in jaxpr.eqns:
        name = _name(eqn)
        if name in CALLS:
            if found := _obstacle(*_inner(eqn), primitives):
                return found
        elif name in SHAPES:
            if not _keeps_axes(eqn):
                return f"{name} to {eqn.outvars[0].aval.shape} mixes queries and keys"
        elif name in primitives or name in SAME:
            continue
        elif name in REWRITTEN:
            closed = _rewritten(eqn)
            if found := _obstacle(closed.jaxpr, closed.consts, primitives):
                return found
        else:
            return f"the primitive {name!r} is not elementwise, or the kernel lacks it"
    return None


def _name(eqn):
    name = eqn.primitive.name
    if name == "custom_jvp_call":
        # The slope of erf: JAX 0.12 takes the bits of x apart for it, which kernels cannot.
        slope = eqn.params["call_jaxpr"].jaxpr.debug_info.func_name == "exp_neg_sq"
        return "exp_neg_sq" if slope else name
    floats = name == "rem" and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
    return "rem of floats" if floats else name


def _rewritten(eqn):
    function = functools.partial(REWRITTEN[_name(eqn)], **eqn.params)
    return jax.make_jaxpr(function)(*(x.aval for x in eqn.invars))


def _inner(eqn):
    inner = eqn.params[CALLS[eqn.primitive.name]]
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def _keeps_axes(eqn) -> bool:
    """Whether an operation on shapes leaves every number with its query and key."""
    before, after = ([n for n in x.aval.shape if n > 1] for x in (eqn.invars[0], eqn.outvars[0]))
    if eqn.primitive.name == "transpose":
        return True
    if eqn.primitive.name == "broadcast_in_dim":
        return sorted(after) in ([], [QUERIES], [KEYS], [QUERIES, KEYS])
    return before == after


def evaluate(
    function: Callable,
    args: Sequence[Any],
    shapes: Sequence[tuple[int, ...]],
    primitives: frozenset[str] = COMMON,
    reduce: Callable | None = None,
    known: Callable | None = None,
    wanted: Callable | None = None,
    positions: Sequence[int] = (),
) -> list[jax.Array]:
    """`function(*args)` for arrays of a kernel's own; the results as a list.

    Args:
      function: one to which nothing is an `obstacle`.
      args: arrays that broadcast against each other.
      shapes: what they stand for.
      primitives: what the kernel has; others are written in terms of these.
      reduce: sums pairs to a vector, where the function has a sum over columns.
      known: gives, of the function's jaxpr and constants, variables whose values are known.
      wanted: gives, of its jaxpr, what is returned in place of the results.
      positions: which of the arguments are whole numbers up to 2^24, that float32 has.
    """
    given = [jax.ShapeDtypeStruct(shape, jnp.result_type(x)) for x, shape in zip(args, shapes)]
    closed = jax.make_jaxpr(function)(*given)
    known = known(closed.jaxpr, closed.consts) if known else None
    wanted = wanted(closed.jaxpr) if wanted else None
    positions = [closed.jaxpr.invars[n] for n in positions]
    options = dict(known=known, wanted=wanted, reduce=reduce, aligned=_by_rows, positions=positions)
    return run(closed.jaxpr, closed.consts, args, primitives, **options)


def run(
    jaxpr,
    consts,
    args,
    primitives=COMMON,
    *,
    known=None,
    wanted=None,
    reduce=None,
    aligned=jnp.broadcast_arrays,
    positions=(),
):
    """The wanted variables of a jaxpr, by default its results, of its arguments and known ones.

    What broadcasts is `aligned`; `reduce` is that of `evaluate`, `positions` are such variables.
    """
    positions, differences = {*positions}, {}
    consts = [jnp.reshape(jnp.asarray(x), ()) for x in consts]
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args])) | (known or {})
    wanted = jaxpr.outvars if wanted is None else wanted

    def read(atom):
        return atom.val if isinstance(atom, Literal) else known[atom]

    for eqn in needed(jaxpr, wanted, known):
        given, name = [read(atom) for atom in eqn.invars], _name(eqn)
        if name in CALLS:
            out = run(*_inner(eqn), given, primitives, reduce=reduce, aligned=aligned)
        elif name == "reduce_sum" and not _keeps_axes(eqn):
            out = [reduce(given[0])]
        elif name == "select_n" and isinstance(given[0], np.ndarray):
            out = [given[1 + int(given[0])]]
        elif name in SHAPES or name in SAME:
            out = given[:1]
            if _among(eqn.invars, positions):
                positions.update(eqn.outvars)
        elif eqn.params.get("new_dtype") == jnp.float32 and _among(eqn.invars, differences):
            # Rows and columns are converted, which are fewer than pairs.
            terms = [x.astype(jnp.float32) for x in differences[eqn.invars[0]]]
            out = [jax.lax.sub(*aligned(*terms))]
        elif name in REWRITTEN and name not in primitives:
            closed = _rewritten(eqn)
            out = run(closed.jaxpr, closed.consts, given, primitives, aligned=aligned)
        else:
            if name == "sub" and _among(eqn.invars, positions):
                differences[eqn.outvars[0]] = given
            given = aligned(*given) if any(map(jnp.ndim, given)) else given
            out = [eqn.primitive.bind(*given, **eqn.params)]
        known.update(zip(eqn.outvars, out))
    return [read(atom) for atom in wanted]


def _among(atoms, variables):
    return all(not isinstance(x, Literal) and x in variables for x in atoms)


def steps(function: Callable, args: Sequence[Any]) -> int:
    """How many operations a function has for every pair.

    Args:
      function, args: as of `obstacle`.
    """

    return steps_of(jax.make_jaxpr(function)(*args).jaxpr.eqns)


def steps_of(eqns) -> int:
    """How many operations for every pair equations are."""
    found = 0
    for eqn in eqns:
        name, pairs = _name(eqn), eqn.outvars[0].aval.size == QUERIES * KEYS
        inner = name in CALLS
        found += steps_of(_inner(eqn)[0].eqns) if inner else pairs and name not in SHAPES | SAME
    return found


def conditions(jaxpr) -> list:
    """The variables of which the only result, a boolean, is the conjunction."""
    made = {x: eqn for eqn in jaxpr.eqns for x in eqn.outvars}

    def factors(atom):
        eqn = None if isinstance(atom, Literal) else made.get(atom)
        if eqn is None or eqn.primitive.name != "and":
            return [atom]
        return [x for given in eqn.invars for x in factors(given)]

    return factors(*jaxpr.outvars)


def _by_rows(*arrays):
    """They broadcast, vectors as numbers of rows."""
    rank = max(map(jnp.ndim, arrays))
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in arrays if jnp.ndim(x) == rank))
    return [over(x, shape) for x in arrays]


def over(x, shape: tuple[int, ...]) -> jax.Array:
    """Pairs, or a vector, of what broadcasts to them."""
    if jnp.ndim(x) == 1 < len(shape):
        return jax.lax.broadcast_in_dim(x, shape, [0])
    return jnp.broadcast_to(x, shape)


def needed(jaxpr, wanted, known) -> list:
    """The equations that make the wanted variables of the known ones."""
    open, found = {x for x in wanted if not isinstance(x, Literal) and x not in known}, []
    for eqn in reversed(jaxpr.eqns):
        if open.intersection(eqn.outvars):
            found.append(eqn)
            open.update(x for x in eqn.invars if not isinstance(x, Literal) and x not in known)
    return found[::-1]
