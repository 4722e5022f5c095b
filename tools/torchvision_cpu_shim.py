"""Makes a CUDA build of torchvision importable beside a CPU build of torch.

torchvision's compiled operators cannot be loaded there, so its Python side fails at import time when it registers
meta kernels for operators torch has never heard of. Declaring those two operators first is all the import needs;
calling them still fails, which nothing on a CPU host does. With a CUDA build of torch this module changes nothing.

`tools/setup_env.py` copies it into site-packages together with a `.pth` file that imports it at interpreter start, so
it must stay cheap: torch is imported only when torchvision is.
"""

import importlib.abc
import sys

OPERATORS = ("nms", "qnms")
SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class TorchvisionOperatorDeclarer(importlib.abc.MetaPathFinder):
    """A finder that finds nothing: it only sees `import torchvision` coming, once, and declares the operators."""

    library = None  # a torch.library.Library takes its operators with it when collected

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            self.declare()
        return None  # the regular finders do the importing

    @classmethod
    def declare(cls):
        import torch

        if torch.version.cuda is None:
            cls.library = torch.library.Library("torchvision", "FRAGMENT")
            for name in OPERATORS:
                cls.library.define(SCHEMA.format(name))


sys.meta_path.insert(0, TorchvisionOperatorDeclarer())
