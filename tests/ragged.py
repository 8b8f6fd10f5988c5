"""Random bounds of packed sequences, valid ones and garbage, for a few programs; what must hold.

    python tests/ragged.py --first 1234 --way emulator               one batch again
    python tests/ragged.py --first 0 --count 10000 --way emulator    many

Ways are those of fuzz.py. Tokens of no sequence are NaN in all that is given.
"""

import argparse
import functools
import sys

import draws
import jax
import jax.numpy as jnp
import numpy as np
from cases import PACKED
from compare import with_seeds
from emulator import kernels
from oracle import attend, kept
from programs import COUNT, programs, steepness
from ways import Call

from jax_flashattn import varlen_attention

SPECIAL = (-(2**31), 2**31 - 1, -1, 0, 1, 2**29, -(2**29))
# Of the largest value. Rounding makes half of it; more with dropout, whose terms are larger.
TOLERANCE = {"float32": 5e-5, "float16": 4e-2, "bfloat16": 4e-2}
# By so much more where scores are steep, and few keys make a row: rounding alone comes to 1.1 times
# that in one of 10,000 batches, on a GPU and on the emulator.
STEEP, STEEP_ROUNDING = 3, 1.25  # the standard deviation of scores
GRADIENTS = ("query", "key", "value")


def program(number):
    """The call that a batch is one of, and how many sequences it has."""
    call = programs()[number % COUNT]
    return call, len(call.case.options[PACKED[0]]) - 1


def bounds(number):
    """cu_seqlens_q and cu_seqlens_k, int32 [2, sequences + 1], of a batch; whether they are valid.

    The others decrease, or lie outside of the arrays, or are any 32 bits.
    """
    call, count = program(number)
    dice, case = draws.Dice(number), call.case
    made = draws.packing(dice, case.q_len, case.k_len, count)
    made = np.array([made[name] for name in PACKED], np.int64)
    if dice.chance(0.6):
        return made.astype(np.int32), True
    rng, shape = dice.rng, made.shape
    near = rng.integers(-20, max(case.q_len, case.k_len) + 20, shape)
    wild = dice.pick(
        rng.integers(-(2**31), 2**31, shape),
        near,
        np.where(rng.random(shape) < 0.5, near, rng.choice(SPECIAL, shape)),
        np.where(rng.random(shape) < 0.1, rng.choice(SPECIAL, shape), made),
        np.flip(made, axis=1),
        made + dice.pick(-(2**30), -7, 7, 2**30),
        np.stack([made[0], np.flip(made[1])]),
    )
    return wild.astype(np.int32), False


def members(cu, tokens, xp=np):
    """bool [sequences, tokens]: which sequence a token may belong to."""
    i = xp.arange(tokens)
    return (cu[:-1, None] <= i) & (i < cu[1:, None])


def violations(case, dtype, made, cu, desired=None, xp=np):
    """What is wrong with out, lse and the gradients, for bounds cu [2, sequences + 1].

    Returns numbers by name, each of which must be 0; but `off` at most 1: how far the results are
    from the desired ones, in units of what they may be.
    """
    rows, keys = (
        members(x, tokens, xp).any(axis=0) for x, tokens in zip(cu, (case.q_len, case.k_len))
    )
    floats = {name: made[name][0].astype("float32") for name in ("out", *GRADIENTS)}
    lse = made["lse"][0]
    outside = {"out": rows, "query": rows, "key": keys, "value": keys}
    # Of valid bounds all must be finite, which `off` sees. Where garbage gives a row and a key
    # different ideas of their distance, exp(score - lse) in the gradient is any number.
    found = {"not finite": (~xp.isfinite(floats["out"])).sum()}
    found["not finite"] += (xp.isnan(lse) | xp.isposinf(lse)).sum()
    found["outside"] = (~xp.isneginf(lse) & ~rows).sum()
    for name, inside in outside.items():
        found["outside"] += ((floats[name] != 0) & ~inside[:, None, None]).sum()
    found["without a key"] = ((floats["out"] != 0) & xp.isneginf(lse.T)[..., None]).sum()
    if "dropout_rate" not in case.options:  # a mean of values
        values = case.arrays(dtype)["value"][0].astype("float32")
        most = xp.where(keys[:, None, None], values, 0)
        found["no mean"] = (abs(floats["out"]) > 1.01 * abs(most).max()).sum()
    if desired is not None:
        tolerance = TOLERANCE[dtype] / (1 - case.options.get("dropout_rate", 0)) ** 0.5
        tolerance *= STEEP_ROUNDING if steepness(case) > STEEP else 1
        found["off"] = xp.zeros(())
        for name, x in (floats | {"lse": lse}).items():
            of = desired[name][0]
            size = xp.maximum(1, abs(xp.where(xp.isfinite(of), of, 0)).max())
            with np.errstate(invalid="ignore"):  # -inf less -inf
                error = xp.where(x == of, 0, abs(x - of)).max() / (tolerance * size)
            found["off"] = xp.maximum(found["off"], error)
    return found


def wrong(found):
    """bool, or an array of them: whether violations() found something."""
    return functools.reduce(
        np.logical_or, [~(np.asarray(x) <= (name == "off")) for name, x in found.items()]
    )


# One batch, on the emulator ----------------------------------------------------------------------


def batch(number):
    """A batch as a Call, its bounds [2, sequences + 1], and whether these are valid."""
    call, _ = program(number)
    cu, is_valid = bounds(number)
    case = Call(**{name: x for name, x in vars(call.case).items() if name != "given"})
    case = case.but(**dict.fromkeys(PACKED))
    d_out, d_lse = case.cotangents(call.dtype)
    arrays = case.arrays(call.dtype) | {"d_out": d_out, "d_lse": d_lse}
    rows, keys = (members(x, tokens).any(axis=0) for x, tokens in zip(cu, (case.q_len, case.k_len)))
    arrays["query"][:, ~rows] = arrays["d_out"][:, ~rows] = np.nan
    arrays["key"][:, ~keys] = arrays["value"][:, ~keys] = np.nan
    arrays["d_lse"][..., ~rows] = np.nan
    arrays |= {name: x[None] for name, x in zip(PACKED, cu)}
    return case.on(**arrays), cu, is_valid


def by_oracle(case, dtype):
    d_out, d_lse = case.cotangents(dtype)
    arrays = with_seeds(case.arrays(dtype))
    return attend(**arrays, **case.static(), d_out=d_out, d_lse=d_lse, precision="float32")


def check_on_emulator(number, family=None):
    """Runs and judges a batch; AssertionError with the line that does it again."""
    call, _ = program(number)
    case, cu, is_valid = batch(number)
    family = family or ("sm80", "sm90")[number // COUNT % 2]
    again = f"python tests/ragged.py --first {number} --way emulator --family {family}"
    try:
        made = kernels.run(case, call.dtype, deterministic=call.deterministic, family=family,
                           seed=number, multiprocessors=2)  # fmt: skip
    except AssertionError as error:
        raise AssertionError(f"{again}\n{call}\n{cu}\n{error}") from error
    desired = by_oracle(case, call.dtype) if is_valid else None
    found = violations(case, call.dtype, made, cu, desired)
    assert not wrong(found), f"{again}\n{call}\n{cu}\n{found}"


# Many batches of one program, through jax --------------------------------------------------------


def plain(case, cu, keep, query, key, value, slopes=None, sinks=None, scale=None):
    """out [T, N, Hv] and lse [N, T] of valid bounds, in a few lines of jnp and float32."""
    options = case.options
    of_row, of_key = (members(x, tokens, jnp) for x, tokens in zip(cu, (case.q_len, case.k_len)))
    at = functools.partial(jnp.einsum, "ni,n->i", precision="highest")
    lengths = jnp.diff(cu, axis=1)
    offset = at(of_row, cu[1, :-1] - cu[0, :-1])  # from a row to the key at its position
    if "causal_alignment" in options:
        offset += at(of_row, lengths[1] - lengths[0])
    distance = jnp.arange(case.k_len) - (jnp.arange(case.q_len) + offset)[:, None]
    window = options.get("local_window_size") or (None, None)
    left, right = (window, window) if isinstance(window, int) else window
    right = 0 if "is_causal" in options else right
    sees = (of_row[:, :, None] & of_key[:, None]).any(axis=0)
    sees &= True if left is None else distance >= -left
    sees &= True if right is None else distance <= right

    key, value = (jnp.repeat(x, case.heads // case.kv_heads, axis=1) for x in (key, value))
    scale = options.get("scale", case.head_dim**-0.5) if scale is None else scale
    s = scale * jnp.einsum("inh,jnh->nij", query, key, precision="highest")
    if "logits_soft_cap" in options:
        s = options["logits_soft_cap"] * jnp.tanh(s / options["logits_soft_cap"])
    if slopes is not None:
        s -= slopes[:, None, None] * abs(distance)
    e = jnp.where(sees, jnp.exp(jnp.where(sees, s, 0)), 0)  # scores are small here
    total = e.sum(axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks)[:, None] * of_row.any(axis=0)
    some = total > 0
    lse = jnp.where(some, jnp.log(jnp.where(some, total, 1)), -jnp.inf)
    p = keep * e / jnp.where(some, total, 1)[..., None]
    return jnp.einsum("nij,jnh->inh", p, value, precision="highest"), lse


@functools.cache
def through_jax(index, implementation):
    """A function of bounds [M, 2, sequences + 1], compiled once: violations() and digests, M each.

    Its other argument are the bounds that attention gets: mutants are given others. It runs in the
    program's dtype, but in float32 for "xla".
    """
    call, _ = program(index)
    case, _, _ = batch(index)
    dtype = "float32" if implementation == "xla" else call.dtype
    case = case.on(**dict.fromkeys(("query", "key", "value", "d_out", "d_lse", *PACKED)))
    operands, (d_out, d_lse) = case.arrays(dtype), case.cotangents(dtype)
    qkv = [operands.pop(name)[0] for name in GRADIENTS]
    keep = 1.0
    if "dropout_rate" in case.options:
        seeds = with_seeds({"query": case.arrays(dtype)["query"], **operands})["dropout_seeds"]
        keep = kept(seeds, case.q_len, case.k_len, case.options["dropout_rate"])[0]
    scores = {n: operands.get(m) for n, m in
              (("slopes", "alibi_slopes"), ("sinks", "sinks"), ("scale", "scale"))}  # fmt: skip
    arrays = (*qkv, d_out[0], d_lse[0], np.float32(keep), scores, operands)

    def one(arrays, both):
        cu, given_cu = both
        *qkv, d_out, d_lse, keep, scores, operands = arrays
        rows, keys = (
            members(x, tokens, jnp).any(axis=0) for x, tokens in zip(cu, (case.q_len, case.k_len))
        )

        def fill(x, inside, filling):
            return jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1)), x, filling)

        def poisoned(filling):
            made = [fill(x, inside, filling) for x, inside in zip(qkv, (rows, keys, keys))]
            return made, (fill(d_out, rows, filling), fill(d_lse.T, rows, filling).T)

        def attention(*qkv):
            return varlen_attention(
                *qkv, *given_cu, **operands, **case.static(), return_lse=True,
                deterministic=call.deterministic, implementation=implementation,
            )  # fmt: skip

        def results(function, filling, dtype):
            given, cotangents = poisoned(filling)
            given = [x.astype(dtype) for x in given]
            (out, lse), pullback = jax.vjp(function, *given)
            cotangents = (cotangents[0].astype(out.dtype), cotangents[1])
            made = dict(zip(("out", "lse", *GRADIENTS), (out, lse, *pullback(cotangents))))
            return {name: x[None] for name, x in made.items()}

        made = results(attention, jnp.nan, dtype)
        desired = results(functools.partial(plain, case, cu, keep, **scores), 0, "float32")
        found = violations(case, dtype, made, cu, desired, jnp)
        bits = [
            jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype("uint32").sum()
            for name, x in made.items()
            if name != "query" or call.deterministic
        ]
        return found, jnp.stack(bits)

    many = jax.jit(lambda arrays, *cu: jax.lax.map(functools.partial(one, arrays), cu))
    return functools.partial(many, arrays)


def check_through_jax(index, numbers, implementation):
    """Runs batches of one program twice; AssertionError with the line that does one again."""
    many = [bounds(number) for number in numbers]
    cu, is_valid = (np.stack(x) for x in zip(*many))
    function = through_jax(index, implementation)
    (found, digests), (_, again) = function(cu, cu), function(cu, cu)
    found = {name: np.asarray(x) for name, x in found.items()}
    found["off"] = np.where(is_valid, found["off"], 0)
    found["another time"] = (np.asarray(digests) != np.asarray(again)).sum(axis=1)
    bad = np.flatnonzero(wrong(found))
    lines = [
        f"python tests/ragged.py --first {numbers[n]} --way {way_of(implementation)}: "
        f"{ {name: float(x[n]) for name, x in found.items()} }"
        for n in bad[:5]
    ]
    assert not len(bad), f"{len(bad)} batches of {program(index)}\n" + "\n".join(lines)
    return found


def way_of(implementation):
    return "reference" if implementation == "xla" else "gpu"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, required=True, help="the number of the first batch")
    parser.add_argument("--count", type=int, default=1, help="how many batches from there")
    parser.add_argument("--way", choices=("reference", "emulator", "gpu"), default="reference")
    parser.add_argument("--family", help="of kernels: sm80 or sm90; by default by turns, or auto")
    given = parser.parse_args(arguments)
    numbers, failures = range(given.first, given.first + given.count), 0
    if given.way == "emulator":
        checks = [functools.partial(check_on_emulator, n, given.family) for n in numbers]
    else:
        implementation = "xla" if given.way == "reference" else "cuda"
        implementation += f":{given.family}" if given.family else ""
        by_program = [[n for n in numbers if n % COUNT == index] for index in range(COUNT)]
        checks = [
            functools.partial(check_through_jax, index, some, implementation)
            for index, some in enumerate(by_program)
            if some
        ]
    for check in checks:
        try:
            check()
        except AssertionError as error:
            failures += 1
            print(f"FAILED {error}", flush=True)
    print(f"{given.count} batches through {given.way}: {failures or 'no'} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
