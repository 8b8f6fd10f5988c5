"""Flash attention as the `attention_fn` of Flax's attention modules, NNX and Linen.

    from jax_flashattn.flax import attention_fn, make_attention_fn

    nnx.MultiHeadAttention(..., attention_fn=attention_fn)
    linen.MultiHeadDotProductAttention(..., attention_fn=make_attention_fn(is_causal=True))

Nothing of Flax is imported here: the hook is a plain function of arrays, the same for both APIs.
"""

import dataclasses
import inspect
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_flashattn._api import attention

__all__ = ["FlashAttentionFn", "attention_fn", "make_attention_fn"]

# What the module gives at each call, and the outputs that a module has no place for.
_NOT_OPTIONS = {"query", "key", "value", "bias", "mask", "dropout_rate", "dropout_key"} | {
    "return_residual",
    "return_lse",
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FlashAttentionFn:
    """A callable with the parameters that Flax's modules pass; `make_attention_fn` builds it.

    Two of them with equal options are equal, so that modules built alike share one jit cache entry
    and can be stacked with `nnx.vmap`, `nnx.scan` or `linen.scan`.
    """

    options: dict[str, Any]

    # Every name below is spelt out because linen.MultiHeadDotProductAttention drops, silently,
    # whatever the signature does not declare: with **kwargs not even the mask would arrive.
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        is_causal: bool = False,
        input_positions: Array | None = None,
    ) -> Array:
        """Attention of `query` over `key` and `value`, as `flax.nnx.dot_product_attention` has it.

        Args:
          query: [batch..., T, N, H], any number of batch dimensions, none included.
          key: [batch..., S, K, H]; N must be a multiple of K.
          value: [batch..., S, K, Hv].
          bias: added to the scaled scores; broadcastable to [batch..., N, T, S].
          mask: True (or nonzero: Flax's mask helpers give float32 zeros and ones) where a query may
            see a key; broadcastable to [batch..., N, T, S]. `is_causal` costs less than a causal
            mask: the kernels skip the tiles it hides and read no mask.
          broadcast_dropout: without effect: every batch entry and head drops weights of its own,
            as Flax does where this is False. Its default shares one mask among all of them, to save
            random numbers, which cost nothing here; what a single entry and head gets is alike in
            distribution, and the masks are never Flax's own.
          dropout_rng: a jax.random key, needed where dropout applies.
          dropout_rate: a Python number in [0, 1), of the attention weights.
          deterministic: Flax's meaning, "apply no dropout". (For gradients that are bitwise
            reproducible, `make_attention_fn(deterministic=True)`.)
          dtype: query, key and value are cast to it; by default to their common dtype.
          precision, force_fp32_for_softmax: without effect. Products are exact and summed in
            float32, the softmax is in float32, whatever they say.
          module: the module that asks for its attention weights (`sow_weights`); see Raises.
          qk_attn_weights_einsum, attn_weights_value_einsum: see Raises.
          is_causal: row i sees keys up to i; either this or the option of `make_attention_fn`.
          input_positions: see Raises.

        Returns:
          [batch..., T, N, Hv]. A row that sees no key is 0 (Flax gives the mean of `value`).

        Raises:
          NotImplementedError: `module` is given (the weights are never formed); an einsum or
            `input_positions` is given.
          ValueError: dropout without `dropout_rng`; a decode step with causality, a window or ALiBi
            whose alignment was not chosen.
        """
        del broadcast_dropout, precision, force_fp32_for_softmax
        if deterministic:
            dropout_rate = 0.0
        elif dropout_rate > 0.0 and dropout_rng is None:
            raise ValueError(
                f"attention_fn: dropout_rate={dropout_rate} needs dropout_rng, a jax.random key; "
                "deterministic=True applies no dropout."
            )
        if module is not None:
            raise NotImplementedError(
                "attention_fn: sow_weights=True needs the attention weights, which flash attention "
                "never forms. Use Flax's own dot_product_attention where you inspect them."
            )
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise NotImplementedError(
                "attention_fn: qk_attn_weights_einsum and attn_weights_value_einsum cannot replace "
                "the products inside a fused kernel. Leave the module's *_einsum_cls at None."
            )
        if input_positions is not None:
            raise NotImplementedError(
                "attention_fn: input_positions would need a rotary embedding, which is not part of "
                "attention. Rotate query and key in a function of yours that then calls this one."
            )
        if dtype is None:
            dtype = jnp.result_type(query, key, value)
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))

        options = dict(self.options)
        options["is_causal"] = bool(is_causal or options.get("is_causal", False))
        _check_decode_step(query, key, mask, options)

        batch = query.shape[:-3]
        if any(x.ndim != query.ndim or x.shape[:-3] != batch for x in (key, value)):
            raise ValueError(
                "attention_fn: query, key and value need the same batch dimensions, got shapes "
                f"{query.shape}, {key.shape} and {value.shape}."
            )
        if mask is not None:
            mask = _fold_batch(jnp.asarray(mask), batch, "mask").astype(bool)
        if bias is not None:
            bias = _fold_batch(jnp.asarray(bias), batch, "bias")
        if len(batch) > 1:
            query, key, value = (x.reshape(prod(batch), *x.shape[-3:]) for x in (query, key, value))
        out = attention(
            *(query, key, value, bias, mask),
            dropout_rate=dropout_rate,
            dropout_key=dropout_rng,
            **options,
        )
        return out.reshape(*batch, *out.shape[-3:])

    def __repr__(self) -> str:
        return f"make_attention_fn({', '.join(f'{n}={v!r}' for n, v in self.options.items())})"

    def _identity(self) -> tuple[tuple[str, Any], ...]:
        return tuple((name, _hashable(value)) for name, value in sorted(self.options.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlashAttentionFn) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def make_attention_fn(**options: Any) -> FlashAttentionFn:
    """An `attention_fn` with options that Flax's modules have no argument for.

    Args:
      **options: keyword arguments of `jax_flashattn.attention`: `is_causal`, `causal_alignment`,
        `local_window_size`, `scale`, `logits_soft_cap`, `alibi_slopes`, `sinks`, `implementation`,
        `deterministic` (bitwise reproducible gradients, not Flax's argument of that name),
        `query_seq_lengths`, ... Those with a batch dimension count all batch dimensions of the
        module's input as one. Arrays are constants: the module does not learn `sinks`.

        A module that trains with `is_causal=True` and then decodes from Flax's cache, one query
        against the whole cache, needs `causal_alignment="bottom_right"` too: it means the same
        where T = S, and leaves the decode step to the mask that the module makes. ALiBi is right
        then as well: counted from the end of the cache, its slopes differ by a constant of the row.

    Returns:
      A hashable callable for `attention_fn=` of `flax.nnx.MultiHeadAttention` and
      `flax.linen.MultiHeadDotProductAttention`; its parameters: `FlashAttentionFn.__call__`.

    Raises:
      TypeError: an option that `attention` does not have, or that the module itself sets or cannot
        take (bias, mask, dropout, return_residual, return_lse). Values are checked at the call.
    """
    allowed = [n for n in inspect.signature(attention).parameters if n not in _NOT_OPTIONS]
    for name in options:
        if name not in allowed:
            why = "is not set here" if name in _NOT_OPTIONS else "is not an option of attention"
            raise TypeError(f"make_attention_fn: {name} {why}; options: {', '.join(allowed)}.")
    return FlashAttentionFn(options)


attention_fn = make_attention_fn()


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:  # An array has no hash and no truth value of ==: it stands for itself.
        return id(value)
    return value


def _check_decode_step(query: Array, key: Array, mask: Any, options: dict[str, Any]) -> None:
    """Refuses positions counted from 0 where the one query stands at the cache's fill mark.

    Flax passes a decode step as T = 1 with a mask of the filled part. Top-left causality would
    leave it the first key only, without an error (Flax 0.12.8's own attention does that), and ALiBi
    would favour the oldest keys.
    """
    decodes = query.shape[-3] == 1 and key.shape[-3] > 1 and mask is not None
    given = {name for name, value in options.items() if value is not None}
    positional = options["is_causal"] or given & {"local_window_size", "alibi_slopes"}
    if decodes and {"alibi_slopes", "sinks"} <= given:
        raise ValueError(
            "attention_fn: a decode step with alibi_slopes and sinks. Slopes count from the end of "
            "the cache, which lowers every key's score by the same amount, but not the sink's. "
            "Pass the ALiBi term as a bias there, counted from the cache's fill mark."
        )
    if decodes and positional and "causal_alignment" not in options:
        raise ValueError(
            f"attention_fn: one query over {key.shape[-3]} keys with a mask looks like a decode "
            "step, where is_causal, local_window_size and alibi_slopes, counted from the first "
            "key, would mistake its place. Choose "
            'make_attention_fn(causal_alignment="bottom_right") (causality is then left to the '
            "module's mask; a window is counted from the end of the cache, so put it into the mask "
            'instead), or "top_left" if you mean it.'
        )


def _fold_batch(x: Array, batch: tuple[int, ...], name: str) -> Array:
    """[batch..., N, T, S], broadcastable, to rank 4 at most; N, T, S are never expanded."""
    if x.ndim <= 3 or len(batch) == 1:
        return x
    if x.ndim > len(batch) + 3:
        raise ValueError(
            f"attention_fn: {name} of shape {x.shape} has more dimensions than [batch..., N, T, S] "
            f"with batch {batch}."
        )
    own = (1,) * (len(batch) + 3 - x.ndim) + x.shape[:-3]
    if prod(own) == 1:
        return x.reshape(1, *x.shape[-3:])
    # Only here, where some batch dimensions are shared and others not, is anything copied.
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(prod(batch), *x.shape[-3:])
