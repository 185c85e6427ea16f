"""A torchvision that was built for another build of torch cannot load its operators; two schemas let it be imported."""

import contextlib

with contextlib.suppress(ImportError):
    import torch

    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
