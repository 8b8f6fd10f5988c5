"""Multi-head attention for Equinox through flash attention.

    from jax_flashattn.equinox import MultiheadAttention, from_equinox

    layer = MultiheadAttention(num_heads=8, query_size=512, num_kv_heads=2, is_causal=True, key=key)
    out = jax.vmap(layer)(x, x, x)       # batched by vmap, as everything in Equinox
    layer = from_equinox(eqx_layer)      # the weights of an existing eqx.nn.MultiheadAttention

Lengths differ within a batch? `jax.vmap` the call over `key_value_seq_lengths` as well.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jax_flashattn._api import attention

try:
    import equinox as eqx
except ModuleNotFoundError as error:
    if error.name != "equinox":
        raise
    raise ImportError(
        'jax_flashattn.equinox needs Equinox: pip install "jax-flashattn[equinox]"'
    ) from error

__all__ = ["MultiheadAttention", "from_equinox"]

_OPTIONS = (
    *("scale", "is_causal", "causal_alignment", "local_window_size"),
    *("logits_soft_cap", "deterministic", "implementation"),
)
ProcessHeads = Callable[[Array, Array, Array], tuple[Array, Array, Array]]


class MultiheadAttention(eqx.Module):
    """`eqx.nn.MultiheadAttention`, with its constructor, its weights' layout and its call.

    More than it: grouped key and value heads, and the static options of `jax_flashattn.attention`
    (the attributes from `scale` on). Different from it: a query that may see no key gives 0, not
    the mean of the values, and a key for dropout makes another mask of the same distribution.
    """

    query_proj: eqx.nn.Linear
    key_proj: eqx.nn.Linear
    value_proj: eqx.nn.Linear
    output_proj: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    query_size: int = eqx.field(static=True)
    key_size: int = eqx.field(static=True)
    value_size: int = eqx.field(static=True)
    output_size: int = eqx.field(static=True)
    qk_size: int = eqx.field(static=True)
    vo_size: int = eqx.field(static=True)
    use_query_bias: bool = eqx.field(static=True)
    use_key_bias: bool = eqx.field(static=True)
    use_value_bias: bool = eqx.field(static=True)
    use_output_bias: bool = eqx.field(static=True)

    scale: float | None = eqx.field(static=True)
    is_causal: bool = eqx.field(static=True)
    causal_alignment: str = eqx.field(static=True)
    local_window_size: int | tuple[int | None, int | None] | None = eqx.field(static=True)
    logits_soft_cap: float | None = eqx.field(static=True)
    deterministic: bool = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        num_heads: int,
        query_size: int,
        key_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        qk_size: int | None = None,
        vo_size: int | None = None,
        use_query_bias: bool = False,
        use_key_bias: bool = False,
        use_value_bias: bool = False,
        use_output_bias: bool = False,
        dropout_p: float = 0.0,
        inference: bool = False,
        dtype: DTypeLike | None = None,
        *,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        causal_alignment: str = "top_left",
        local_window_size: int | tuple[int | None, int | None] | None = None,
        logits_soft_cap: float | None = None,
        deterministic: bool = False,
        implementation: str | None = None,
        key: Array,
    ):
        """Arguments up to `dtype`, and `key`: as `eqx.nn.MultiheadAttention` has them.

        Args:
          num_heads: heads of the query, N.
          query_size, key_size, value_size: input channels; the latter two default to the first.
          output_size: output channels, by default `query_size`.
          qk_size, vo_size: channels per head, H and Hv, by default `query_size // num_heads`.
          use_query_bias, use_key_bias, use_value_bias, use_output_bias: bias of each projection.
          dropout_p, inference: dropout on the attention weights. Kept so that a model built with
            them runs in inference mode; calling it in training mode raises.
          dtype: of the weights; by default float32 (float64 in x64 mode, which attention rejects).
          num_kv_heads: heads of key and value, K, a divisor of `num_heads`, by default equal to it.
          scale, is_causal, causal_alignment, local_window_size, deterministic, implementation:
            as `jax_flashattn.attention` has them.
          key: PRNG key of the weights' initialisation.

        Raises:
          ValueError: `num_heads` is not a multiple of `num_kv_heads`.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(
                "MultiheadAttention: num_heads must be a multiple of num_kv_heads, got "
                f"num_heads={num_heads} and num_kv_heads={num_kv_heads}."
            )
        key_size = query_size if key_size is None else key_size
        value_size = query_size if value_size is None else value_size
        output_size = query_size if output_size is None else output_size
        qk_size = query_size // num_heads if qk_size is None else qk_size
        vo_size = query_size // num_heads if vo_size is None else vo_size

        def linear(inputs: int, outputs: int, use_bias: bool, key: Array) -> eqx.nn.Linear:
            return eqx.nn.Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, key=key)

        # The split and its order are Equinox's: the same key gives the same weights as its layer.
        keys = jax.random.split(key, 4)
        self.query_proj = linear(query_size, num_heads * qk_size, use_query_bias, keys[0])
        self.key_proj = linear(key_size, num_kv_heads * qk_size, use_key_bias, keys[1])
        self.value_proj = linear(value_size, num_kv_heads * vo_size, use_value_bias, keys[2])
        self.output_proj = linear(num_heads * vo_size, output_size, use_output_bias, keys[3])
        self.dropout = eqx.nn.Dropout(dropout_p, inference=inference)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.query_size, self.key_size, self.value_size = query_size, key_size, value_size
        self.output_size, self.qk_size, self.vo_size = output_size, qk_size, vo_size
        self.use_query_bias, self.use_key_bias = use_query_bias, use_key_bias
        self.use_value_bias, self.use_output_bias = use_value_bias, use_output_bias
        self.scale, self.is_causal, self.causal_alignment = scale, is_causal, causal_alignment
        self.local_window_size, self.logits_soft_cap = local_window_size, logits_soft_cap
        self.deterministic, self.implementation = deterministic, implementation

    def __call__(
        self,
        query: Array,
        key_: Array,
        value: Array,
        mask: ArrayLike | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        process_heads: ProcessHeads | None = None,
        query_seq_lengths: ArrayLike | None = None,
        key_value_seq_lengths: ArrayLike | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        sinks: ArrayLike | None = None,
        alibi_slopes: ArrayLike | None = None,
    ) -> Array:
        """Attends; no batch dimension (`jax.vmap` adds it, for any of the arguments).

        Args:
          query: [T, query_size].
          key_: [S, key_size].
          value: [S, value_size].
          mask: bool [T, S] or [num_heads, T, S], True where a query may see a key.
          key: for dropout of the attention weights: one jax.random key, which `jax.vmap` should map
            like the sequences, or all of them drop the same.
          inference: True calls a layer that has dropout without it; None: as the layer says.
          process_heads: maps query [T, N, H], key [S, K, H] and value [S, K, Hv] to arrays of the
            same shapes, for instance to rotate query and key.
          query_seq_lengths, key_value_seq_lengths: int32 scalars, how much of T and S is filled:
            padding costs less this way than by a mask.
          segment_ids: int32 [T], or ([T], [S]) for queries and keys: documents packed into one
            sequence, which do not see each other.
          sinks, alibi_slopes: [num_heads], as `jax_flashattn.attention` has them; `sinks` may be a
            parameter of the module that calls this one.

        Returns:
          [T, output_size].

        Raises:
          RuntimeError: dropout without `key`, as Equinox's own layer.
          TypeError: a dropout probability that is traced (plain jax.jit or jax.grad of the layer;
            eqx.filter_jit and eqx.filter_grad leave it a number).
          ValueError: shapes that do not fit.
        """
        dropout_rate = self._dropout_rate(key, inference)
        if key_.shape[0] != value.shape[0]:
            raise ValueError(
                "MultiheadAttention: key_ and value must be of equal length, got "
                f"{key_.shape} and {value.shape}."
            )
        heads = (
            _project(self.query_proj, query, self.num_heads),
            _project(self.key_proj, key_, self.num_kv_heads),
            _project(self.value_proj, value, self.num_kv_heads),
        )
        if process_heads is not None:
            processed = process_heads(*heads)
            if [x.shape for x in processed] != [x.shape for x in heads]:
                raise ValueError(
                    "MultiheadAttention: process_heads must not change shapes; "
                    f"{[x.shape for x in heads]} became {[x.shape for x in processed]}."
                )
            heads = processed
        full = (self.num_heads, query.shape[0], key_.shape[0])
        if mask is not None and jax.numpy.shape(mask) not in (full, full[1:]):
            raise ValueError(
                f"MultiheadAttention: mask must have shape {full[1:]} or {full}, got "
                f"{jax.numpy.shape(mask)}."
            )
        query_ids, key_ids = (
            segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        )
        out = attention(
            *heads,
            mask=mask,
            scale=self.scale,
            is_causal=self.is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            query_segment_ids=query_ids,
            key_value_segment_ids=key_ids,
            dropout_rate=dropout_rate,
            dropout_key=key,
            implementation=self.implementation,
            causal_alignment=self.causal_alignment,
            deterministic=self.deterministic,
        )
        return jax.vmap(self.output_proj)(out.reshape(query.shape[0], -1))

    def _dropout_rate(self, key: Array | None, inference: bool | None) -> float:
        """What attention gets: 0 in inference mode."""
        p = self.dropout.p
        if isinstance(p, int | float) and p == 0:
            return 0.0
        if inference is None:
            inference = self.dropout.inference
        # Both are leaves of the module, so plain jax.jit makes tracers of them.
        if isinstance(inference, Tracer) or (isinstance(p, Tracer) and not inference):
            raise TypeError(
                "MultiheadAttention: the dropout probability or the inference flag is traced, and "
                "both must be known here. Transform the module with eqx.filter_jit and "
                "eqx.filter_grad, or close over it, or pass inference=True in the call."
            )
        if inference:
            return 0.0
        if key is None:
            raise RuntimeError(
                f"MultiheadAttention: dropout (p={p}) needs a key outside of inference mode: pass "
                "key=..., or inference=True, or use equinox.nn.inference_mode(model)."
            )
        return float(p)


def _project(linear: eqx.nn.Linear, x: Array, heads: int) -> Array:
    """[L, channels] to [L, heads, channels per head]."""
    return jax.vmap(linear)(x).reshape(x.shape[0], heads, -1)


def from_equinox(module: eqx.nn.MultiheadAttention, **options: Any) -> MultiheadAttention:
    """The same layer through flash attention, sharing (not copying) the arrays of `module`.

    Args:
      module: its weights, sizes, dropout and inference flag are taken over. Works on a layer whose
        leaves are tracers, or None after `eqx.partition`.
      **options: `scale`, `is_causal`, `causal_alignment`, `local_window_size`, `logits_soft_cap`,
        `deterministic`, `implementation`, as the constructor has them.

    Returns:
      A layer with the outputs of `module`, up to rounding (and but for rows that see no key).

    Raises:
      TypeError: `module` is something else, or an option is not one of those.
    """
    if not isinstance(module, eqx.nn.MultiheadAttention):
        raise TypeError(
            f"from_equinox: expected an equinox.nn.MultiheadAttention, got {type(module).__name__}."
        )
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise TypeError(f"from_equinox: no option {unknown[0]}; there are {', '.join(_OPTIONS)}.")
    sizes = {
        name: getattr(module, name)
        for name in (
            *("num_heads", "query_size", "key_size", "value_size", "output_size", "qk_size"),
            *("vo_size", "use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"),
        )
    }
    # Built for its structure alone (no weight is drawn), then given the arrays.
    layer = eqx.filter_eval_shape(
        lambda key: MultiheadAttention(**sizes, **options, key=key), jax.random.key(0)
    )
    parts = ("query_proj", "key_proj", "value_proj", "output_proj", "dropout")
    return eqx.tree_at(
        lambda tree: [getattr(tree, part) for part in parts],
        layer,
        [getattr(module, part) for part in parts],
    )
