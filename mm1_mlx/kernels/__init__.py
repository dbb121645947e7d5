"""Attention where mlx has no fused kernel: quantized keys and shared prefixes."""

from mm1_mlx.kernels.attention import attend as attend
from mm1_mlx.kernels.report import kernel_report as kernel_report
