"""ResNet-18 as its paper has it, and the recorded TensorRT engines of it."""

from __future__ import annotations

# the mean latency NVIDIA published with the files, in milliseconds
PUBLISHED = {"fp32": 2.000, "fp16": 0.863, "qat": 0.882, "qat-residual": 0.546, "qat-residual-qgap": 0.500}

# ResNet-18 at 224 × 224 (He et al. 2015, table 1): path, kernel, channels in and out, side of the output
BLOCKS = [
    (f"layer{n}.{i}", 64 * 2 ** max(n - 2, 0) if i == 0 else 32 * 2**n, 32 * 2**n) for n in (1, 2, 3, 4) for i in (0, 1)
]
CONVOLUTIONS = [("conv1", 7, 3, 64, 112)]
for path, before, maps in BLOCKS:
    side = 56 * 64 // maps
    CONVOLUTIONS += [(f"{path}.conv1", 3, before, maps, side), (f"{path}.conv2", 3, maps, maps, side)]
    if before != maps:
        CONVOLUTIONS.append((f"{path}.downsample.0", 1, before, maps, side))
MACS = {path: k * k * into * out * side**2 for path, k, into, out, side in CONVOLUTIONS} | {"fc": 512 * 1000}
# the batch normalisations are folded, so that a convolution has a bias
PARAMETERS = {path: k * k * into * out + out for path, k, into, out, _ in CONVOLUTIONS} | {"fc": 512 * 1000 + 1000}
