"""MaskDiT in plain torch, written from the paper and the table of names: the other side of a comparison.

It loads exported weights with strict key checking, as the code of a PyTorch user would, and imports nothing
of the package. `torch_step` trains it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOISE_FEATURES = 256


class Mask(NamedTuple):
    """keep_ids [B, K]: the visible tokens; restore_ids [B, N]: where each token is among kept and hidden."""

    keep_ids: Tensor
    restore_ids: Tensor

    @property
    def hidden(self) -> Tensor:
        """[B, N] float32: 1 = hidden."""
        return (self.restore_ids >= self.keep_ids.shape[1]).float()


class Denoiser(nn.Module):
    """D(x, sigma, labels) for x [B, C, H, W], sigma [B], one-hot labels [B, classes] (zeros: no class)."""

    def __init__(self, sigma_data: float, **network):
        super().__init__()
        self.sigma_data = sigma_data
        self.model = Network(**network)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor, mask: Mask | None = None) -> Tensor:
        s, d = sigma[:, None, None, None], self.sigma_data
        norm = (s**2 + d**2).sqrt()
        prediction = self.model(x / norm, sigma.log() / 4, labels, mask)
        return x * d**2 / norm**2 + prediction * s * d / norm


class Network(nn.Module):
    """F(x, c_noise, labels): the encoder sees the visible tokens, the decoder all. Freshly initialised."""

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        use_decoder: bool = True,
        mask_token: bool = True,
        decoder_hidden_size: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ):
        super().__init__()
        grid, self.patch_size = image_size // patch_size, patch_size
        self.register_buffer("pos_embed", position_table(hidden_size, grid))
        self.x_embedder = PatchMap(channels, hidden_size, patch_size)
        self.t_embedder = NoiseEmbedding(hidden_size)
        self.y_embedder = LabelTable(num_classes, hidden_size) if num_classes else None
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, hidden_size) for _ in range(depth))
        out, self.use_decoder = hidden_size, use_decoder
        if use_decoder:
            out = decoder_hidden_size
            self.register_buffer("decoder_pos_embed", position_table(out, grid))
            self.decoder_layer = ModulatedLinear(hidden_size, hidden_size, out)
            self.decoder_blocks = nn.ModuleList(
                Block(out, decoder_num_heads, hidden_size) for _ in range(decoder_depth)
            )
        self.mask_token = nn.Parameter(torch.empty(1, 1, out)) if use_decoder and mask_token else None
        self.final_layer = ModulatedLinear(out, hidden_size, patch_size**2 * channels)
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform, zero biases; the output layer, the bridge and every modulation zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.startswith(("t_embedder", "y_embedder", "mask_token")) and not name.endswith("bias"):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, (Block, ModulatedLinear)):
                nn.init.zeros_(module.adaLN_modulation.get_parameter("1.weight"))
            if isinstance(module, ModulatedLinear):
                nn.init.zeros_(module.linear.weight)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor, mask: Mask | None) -> Tensor:
        c = self.t_embedder(c_noise)
        if self.y_embedder is not None:
            c = c + self.y_embedder.embedding_table(labels)
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        if mask is not None:
            tokens = take(tokens, mask.keep_ids)
        for block in self.blocks:
            tokens = block(tokens, c)
        if self.use_decoder:
            tokens = self.fill(self.decoder_layer(tokens, c), mask) + self.decoder_pos_embed
            for block in self.decoder_blocks:
                tokens = block(tokens, c)
            patches = self.final_layer(tokens, c)
        else:
            patches = self.fill(self.final_layer(tokens, c), mask)
        batch, channels, height, _ = x.shape
        p = self.patch_size
        grid = height // p
        patches = patches.float().reshape(batch, grid, grid, p, p, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    def fill(self, kept: Tensor, mask: Mask | None) -> Tensor:
        """Tokens [B, N, D] of the visible ones [B, K, D]: the mask token, or zeros, in the holes."""
        if mask is None:
            return kept
        batch, num_keep, width = kept.shape
        filler = kept.new_zeros(1, 1, width) if self.mask_token is None else self.mask_token.to(kept.dtype)
        holes = filler.expand(batch, mask.restore_ids.shape[1] - num_keep, width)
        return take(torch.cat([kept, holes], dim=1), mask.restore_ids)


class PatchMap(nn.Module):
    def __init__(self, channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)


class NoiseEmbedding(nn.Module):
    """c_noise [B] → [B, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NOISE_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c_noise: Tensor) -> Tensor:
        half = NOISE_FEATURES // 2
        steps = torch.arange(half, device=c_noise.device)
        angles = c_noise[:, None] * torch.exp(-math.log(10000) * steps / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelTable(nn.Module):
    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Linear(num_classes, width, bias=False)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, condition: int):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(x, shift1, scale1))
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class ModulatedLinear(nn.Module):
    def __init__(self, width: int, condition: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Tokens [B, K, D] of [B, N, D] by ids [B, K]."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[-1]))


def position_table(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine table [1, grid², width]: half for the column, half for the row, sines first."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]
