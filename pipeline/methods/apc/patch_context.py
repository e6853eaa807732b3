"""Patch embeddings → the same with the context of their row and column: ViT-PCM's HV-BiLSTM (docs/methods/apc.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchContext(nn.Module):
    """One bidirectional LSTM along rows and one along columns, outputs concatenated: f32[b,d,gh,gw] → f32[b,4·width,gh,gw].

    dim: channels d of the embeddings; width: channels of one direction of one LSTM.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.rows = nn.LSTM(dim, width, batch_first=True, bidirectional=True)
        self.cols = nn.LSTM(dim, width, batch_first=True, bidirectional=True)
        for name, parameter in self.named_parameters():  # as Keras initialises them
            if "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)
            elif "weight_hh" in name:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)
            if "bias_ih" in name:
                nn.init.ones_(parameter.data[width : 2 * width])  # forget gate
            if "bias_hh" in name:
                parameter.requires_grad_(False)  # Keras has one bias

    def forward(self, maps: Tensor, dropout: float) -> Tensor:
        """dropout: rate 0..1 of the LSTMs' input, always applied."""
        b, dim, gh, gw = maps.shape
        tokens = maps.permute(0, 2, 3, 1)
        along_rows = F.dropout(tokens, dropout).reshape(b * gh, gw, dim)
        along_cols = F.dropout(tokens, dropout).transpose(1, 2).reshape(b * gw, gh, dim)
        rows = self.rows(along_rows)[0].view(b, gh, gw, -1)
        cols = self.cols(along_cols)[0].view(b, gw, gh, -1).transpose(1, 2)
        return torch.cat([rows, cols], dim=3).permute(0, 3, 1, 2)
