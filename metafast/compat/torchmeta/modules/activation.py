"""Multi-head attention."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import multi_head_attention_forward

from metafast.compat import absent
from metafast.compat.torchmeta.modules.linear import MetaLinear
from metafast.compat.torchmeta.modules.module import MetaModule

__getattr__ = absent(__name__)


class MetaMultiheadAttention(nn.MultiheadAttention, MetaModule):
    """torch's ``MultiheadAttention`` whose ``forward`` takes ``params``; ``out_proj`` is a ``MetaLinear``.

    With gradients it computes by matrix products, for the fused attention has no second derivative.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = self.out_proj
        # Drawn after torch's own weights, so that a seed gives the numbers of the original.
        self.out_proj: Any = MetaLinear(
            self.embed_dim,
            self.embed_dim,
            bias=given.bias is not None,
            device=given.weight.device,
            dtype=given.weight.dtype,
        )

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        params: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``(output, weights)``; query, key and value are ``[rows, batch, features]``, or batch first where so made."""
        values: Any = dict(self.named_parameters()) if params is None else params
        swapped = self.batch_first and query.dim() == 3
        if swapped:
            query, key, value = (rows.transpose(0, 1) for rows in (query, key, value))
        separate = {
            f"{name}_proj_weight": values[f"{name}_proj_weight"]
            for name in ("q", "k", "v")
            if not self._qkv_same_embed_dim
        }
        with _twice_differentiable():
            output, weights = multi_head_attention_forward(
                query,
                key,
                value,
                self.embed_dim,
                self.num_heads,
                values.get("in_proj_weight"),
                values.get("in_proj_bias"),
                values.get("bias_k"),
                values.get("bias_v"),
                self.add_zero_attn,
                self.dropout,
                values["out_proj.weight"],
                values.get("out_proj.bias"),
                training=self.training,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                use_separate_proj_weight=bool(separate),
                **separate,
            )
        return output.transpose(0, 1) if swapped else output, weights


def _twice_differentiable() -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else nullcontext()
