"""MaskDiT's denoiser in plain torch layers, written from METHOD's words and the names table: the other side.

It exists to load exported weights with strict key checking, as the code of a PyTorch user would.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Denoiser(nn.Module):
    """D(x, sigma, labels) for x [B, C, H, W], sigma [B], one-hot labels [B, classes] (zeros: no class)."""

    def __init__(self, sigma_data, **options):
        super().__init__()
        self.sigma_data = sigma_data
        self.model = Network(**options)

    def forward(self, x, sigma, labels):
        s, d = sigma[:, None, None, None], self.sigma_data
        norm = (s**2 + d**2).sqrt()
        prediction = self.model(x / norm, sigma.log() / 4, labels)
        return x * d**2 / norm**2 + prediction * s * d / norm


class Network(nn.Module):
    def __init__(
        self, image_size, channels, patch_size, width, depth, heads, num_classes, decoder, mask_token
    ):
        super().__init__()
        tokens, self.patch_size = (image_size // patch_size) ** 2, patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch_size, patch_size)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        if num_classes:
            self.y_embedder = nn.Module()
            self.y_embedder.embedding_table = nn.Linear(num_classes, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads, width) for _ in range(depth))
        out = width
        if decoder:
            out, decoder_depth, decoder_heads = decoder
            self.decoder_pos_embed = nn.Parameter(torch.empty(1, tokens, out))
            self.decoder_layer = ModulatedLinear(width, width, out)
            self.decoder_blocks = nn.ModuleList(
                Block(out, decoder_heads, width) for _ in range(decoder_depth)
            )
        if mask_token:
            self.mask_token = nn.Parameter(torch.empty(1, 1, out))
        self.final_layer = ModulatedLinear(out, width, patch_size**2 * channels)

    def forward(self, x, c_noise, labels):
        angles = c_noise[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        if hasattr(self, "y_embedder"):
            c = c + self.y_embedder.embedding_table(labels)
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, c)
        if hasattr(self, "decoder_layer"):
            tokens = self.decoder_layer(tokens, c) + self.decoder_pos_embed
            for block in self.decoder_blocks:
                tokens = block(tokens, c)
        patches = self.final_layer(tokens, c)
        batch, channels, height, _ = x.shape
        p = self.patch_size
        grid = height // p
        patches = patches.reshape(batch, grid, grid, p, p, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class Block(nn.Module):
    def __init__(self, width, heads, condition):
        super().__init__()
        self.attn, self.mlp, self.heads = nn.Module(), nn.Module(), heads
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        batch, tokens, _ = x.shape
        qkv = self.attn.qkv(modulate(x, shift1, scale1))
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + gate1 * self.attn.proj(out)
        hidden = F.gelu(self.mlp.fc1(modulate(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * self.mlp.fc2(hidden)


class ModulatedLinear(nn.Module):
    def __init__(self, width, condition, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)))


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
