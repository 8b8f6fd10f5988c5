"""Flash attention for JAX on NVIDIA GPUs; the same call runs a reference path everywhere else."""

from jax_flashattn._api import attention as attention
from jax_flashattn._api import export_disabled_checks as export_disabled_checks
from jax_flashattn._api import lse_without_sinks as lse_without_sinks
from jax_flashattn._api import varlen_attention as varlen_attention
from jax_flashattn._explain import Explanation as Explanation
from jax_flashattn._explain import explain as explain

__version__ = "0.1.0"
