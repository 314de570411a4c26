"""A training step of `torch_maskdit`, as a careful PyTorch user writes it: the same step as ours."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskdit_jax.benchmark.torch_maskdit import Denoiser, Mask


class Draws(NamedTuple):
    """clean and noisy [B, C, H, W], sigma [B], one-hot labels [B, classes] (some zero), mask (None: all)."""

    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    labels: Tensor
    mask: Mask | None


class TorchTraining:
    """Network, optimizer and EMA: fused AdamW, a foreach EMA, and on a GPU bfloat16 by autocast.

    options: `network` and `data` as a configuration's sections hold them, `method` (sigma_data, P_mean,
    P_std, mae_coef, label_dropout), `optimizer`, `ema_decay` and `num_keep`.
    """

    def __init__(self, options: dict[str, Any], device: str = "cpu", *, half: bool = False):
        self.method, self.num_keep = options["method"], options["num_keep"]
        self.num_classes, self.ema_decay = options["data"]["num_classes"], options["ema_decay"]
        self.device, self.half = device, half
        network = options["network"] | options["data"]
        self.denoiser = Denoiser(self.method["sigma_data"], **network).to(device)
        self.params: list[Tensor] = list(self.denoiser.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        adamw = options["optimizer"]
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=adamw["learning_rate"],
            betas=(adamw["b1"], adamw["b2"]),
            eps=adamw["eps"],
            weight_decay=adamw["weight_decay"],
            fused=True,
        )

    def step(self, clean: Tensor, labels: Tensor, form: str = "eager") -> None:
        """One update on clean [B, C, H, W] with labels [B]; form: eager or compiled."""
        self.update(self.draw(clean, labels), form)

    def draw(self, clean: Tensor, labels: Tensor) -> Draws:
        """Everything random of a step."""
        method, batch = self.method, len(clean)
        normal = torch.randn(batch, device=clean.device)
        sigma = (method["P_mean"] + method["P_std"] * normal).exp()
        noisy = clean + sigma[:, None, None, None] * torch.randn_like(clean)
        dropped = torch.rand(batch, device=clean.device) < method["label_dropout"]
        one_hot = F.one_hot(labels, max(self.num_classes, 1)).float() * ~dropped[:, None]
        num_tokens, mask = self.denoiser.model.pos_embed.shape[1], None
        if self.num_keep < num_tokens:
            shuffle_ids = torch.rand(batch, num_tokens, device=clean.device).argsort(dim=1)
            mask = Mask(shuffle_ids[:, : self.num_keep], shuffle_ids.argsort(dim=1))
        return Draws(clean, noisy, sigma, one_hot, mask)

    def update(self, draws: Draws, form: str = "eager") -> Tensor:
        """Loss, gradient, AdamW, EMA; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.compiled if form == "compiled" else self.loss)(draws)[0].mean()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.params, 1 - self.ema_decay)
        return loss.detach()

    @functools.cached_property
    def compiled(self) -> Callable[[Draws], tuple[Tensor, Tensor, Tensor | None]]:
        """`loss` by torch's compiler."""
        return torch.compile(self.loss)

    def loss(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss [B], and of it the denoising of what is visible [B] and the reconstruction of the rest [B]."""
        clean, noisy, sigma, labels, mask = draws
        sigma_data, mae_coef = self.method["sigma_data"], self.method["mae_coef"]
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.half):
            denoised = self.denoiser(noisy, sigma, labels, mask)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        error = self.patches(weight[:, None, None, None] * (denoised - clean) ** 2).mean(dim=-1)  # [B, N]
        if mask is None:
            return error.mean(dim=1), error.mean(dim=1), None
        hidden = mask.hidden
        denoise_loss = (error * (1 - hidden)).sum(dim=1) / (1 - hidden).sum(dim=1)
        if not mae_coef:
            return denoise_loss, denoise_loss, None
        target = self.patches(noisy)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        reconstruction = ((self.patches(denoised) - target) ** 2).mean(dim=-1)
        mae_loss = (reconstruction * hidden).sum(dim=1) / hidden.sum(dim=1)
        return denoise_loss + mae_coef * mae_loss, denoise_loss, mae_loss

    def patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, N, C·p·p]."""
        p = self.denoiser.model.patch_size
        batch, channels, height, _ = x.shape
        grid = height // p
        x = x.reshape(batch, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(batch, grid**2, channels * p**2)
