"""diffusers as a host: a Stable Diffusion pipeline that concepts are trained on, applied to and drawn with.

    stack = ConceptStack((ConceptUse(load(path)),))
    with apply(pipeline, stack):
        pipeline("a photo of a <my-teddy> on the beach").images[0].save("beach.png")

``structure`` reads what a pipeline is made of and names its layers as the original UNet does, ``patching`` puts edits
over its projections and takes them off again, ``text`` encodes prompts with words in them, ``host`` is the pipeline as
the trainer sees it, ``apply`` puts concepts on a pipeline that is then called as ever, ``drawing`` makes pictures
without it.
"""

from __future__ import annotations

try:
    import diffusers as _diffusers  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "to use concepts with diffusers, diffusers and transformers must be installed: "
        'pip install "comfyui-perfusion[demo]"'
    ) from error

from .apply import apply
from .drawing import draw
from .host import DiffusersHost
from .structure import UnsupportedPipelineError
from .text import ClipText, encode_prompts

__all__ = ["ClipText", "DiffusersHost", "UnsupportedPipelineError", "apply", "draw", "encode_prompts"]
